"""Low-precision weights of one block at a time, cast together.

Autocast casts every weight by itself and every weight gradient back: two small kernels and two autograd nodes a weight. A block's
weights are all known before it runs, so here they are cast in one multi-tensor launch into a scratch buffer that blocks share
whose graphs do not live together, and their gradients come back in another. The numbers are autocast's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastlocal.blocks.block import Block, Slot

# Modules of exactly these types cast weight and bias to the low dtype under autocast; all others are left to autocast itself.
_CAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class CastWeights:
    """Swaps a block's weights for low-precision copies while it runs.

    Args:
        blocks: in order.
        dtype: bfloat16 or float16.
        alive: blocks in a row whose graphs live at the same time.
    """

    def __init__(self, blocks: Sequence[Block], dtype: torch.dtype, alive: int = 1):
        written = {  # while the block is inside: the copy would be written in their place
            (id(slot.module), slot.key)
            for block in blocks
            for link in block.links
            if link.when == "between_forward_and_backward"
            for slot in link.frozen
        }
        self._slots = [
            [slot for slot in block.parameter_slots() if _casts(slot) and (id(slot.module), slot.key) not in written]
            for block in blocks
        ]
        self._dtype = dtype
        self._masters: dict[int, list[Tensor]] = {}  # of the blocks that are inside
        self.let_live(alive)

    def let_live(self, alive: int) -> None:
        """From now on the graphs of ``alive`` blocks in a row may live at the same time. While no block is inside."""
        self._scratch: list[Tensor | None] = [None] * alive
        self._lows: dict[int, list[Tensor]] = {}

    @torch.no_grad()
    def enter(self, k: int) -> None:
        """Before block k's forward: its weights are cast and take the place of the float32 ones."""
        slots = self._slots[k]
        if not slots:
            return
        masters = [slot.value for slot in slots]
        lows = self._lows.get(k)
        if lows is None or any(_differs(low, p) for low, p in zip(lows, masters, strict=True)):
            lows = self._lows[k] = self._place(k, masters)
        torch._foreach_copy_(lows, masters)
        for slot, low, master in zip(slots, lows, masters, strict=True):
            low.requires_grad_(master.requires_grad)
            slot.module._parameters[slot.key] = low  # type: ignore[assignment]
        self._masters[k] = masters

    def leave(self) -> None:
        """After the backward of the blocks that are inside, or a failure: their float32 weights are back, with gradients."""
        for k in list(self._masters):
            self.leave_block(k)

    @torch.no_grad()
    def leave_block(self, k: int) -> None:
        """The same for block k alone."""
        masters = self._masters.pop(k, None)
        if masters is None:
            return
        into: list[Tensor] = []
        source: list[Tensor] = []
        grown: list[Tensor] = []
        more: list[Tensor] = []
        for slot, low, master in zip(self._slots[k], self._lows[k], masters, strict=True):
            slot.module._parameters[slot.key] = master  # type: ignore[assignment]
            if low.grad is None:
                continue
            if master.grad is None:
                master.grad = torch.empty_like(master)
                into.append(master.grad)
                source.append(low.grad)
            else:  # gradients of a micro-batch before, or a tied weight, used elsewhere in the block too
                grown.append(master.grad)
                more.append(low.grad)
            low.grad = None
        if into:
            torch._foreach_copy_(into, source)
        if grown:
            torch._foreach_add_(grown, more)

    @contextmanager
    def outside(self) -> Iterator[None]:
        """The float32 weights are in place for a while, also of blocks that are inside."""
        inside = [(slot, low) for k in self._masters for slot, low in zip(self._slots[k], self._lows[k], strict=True)]
        masters = [master for k in self._masters for master in self._masters[k]]
        for (slot, _), master in zip(inside, masters, strict=True):
            slot.module._parameters[slot.key] = master  # type: ignore[assignment]
        try:
            yield
        finally:
            for slot, low in inside:
                slot.module._parameters[slot.key] = low  # type: ignore[assignment]

    def abandon(self) -> None:
        """The float32 weights are back, and nothing is launched."""
        for k, masters in self._masters.items():
            for slot, low, master in zip(self._slots[k], self._lows[k], masters, strict=True):
                slot.module._parameters[slot.key] = master  # type: ignore[assignment]
                low.grad = None
        self._masters.clear()

    def _place(self, k: int, masters: list[Tensor]) -> list[Tensor]:
        """Tensors in the scratch buffer of block k, with the masters' shapes and strides."""
        need = sum(p.numel() for p in masters)
        which = k % len(self._scratch)
        scratch = self._scratch[which]
        if scratch is None or scratch.numel() < need or scratch.device != masters[0].device:
            scratch = self._scratch[which] = torch.empty(need, dtype=self._dtype, device=masters[0].device)
            for other in [i for i in self._lows if i % len(self._scratch) == which]:
                del self._lows[other]
        lows, at = [], 0
        for p in masters:
            lows.append(scratch.as_strided(p.size(), p.stride(), at).detach())
            at += p.numel()
        return lows


def _casts(slot: Slot) -> bool:
    p = slot.value
    hooked = getattr(p, "_backward_hooks", None) or getattr(p, "_post_accumulate_grad_hooks", None)
    return type(slot.module) in _CAST and slot.key in ("weight", "bias") and p.dtype == torch.float32 and not hooked


def _differs(low: Tensor, p: Tensor) -> bool:
    return low.shape != p.shape or low.stride() != p.stride() or low.device != p.device
