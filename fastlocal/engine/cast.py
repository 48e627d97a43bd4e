"""Low-precision weights of one block at a time, cast together.

Autocast casts every weight by itself and every weight gradient back: two small kernels and two autograd nodes a weight. A block's
weights are all known before it runs, so here they are cast in one multi-tensor launch into a scratch buffer that all blocks
share, and their gradients come back in another. The numbers are autocast's.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    """

    def __init__(self, blocks: Sequence[Block], dtype: torch.dtype):
        self._slots = [[slot for slot in block.parameter_slots() if _casts(slot)] for block in blocks]
        self._dtype = dtype
        self._scratch: Tensor | None = None
        self._lows: dict[int, list[Tensor]] = {}
        self._masters: list[Tensor] = []
        self._inside: int | None = None

    @torch.no_grad()
    def enter(self, k: int) -> None:
        """Before block k's forward: its weights are cast and take the place of the float32 ones."""
        slots = self._slots[k]
        if not slots:
            return
        masters = [slot.value for slot in slots]
        lows = self._lows.get(k)
        if lows is None or any(_differs(low, p) for low, p in zip(lows, masters, strict=True)):
            lows = self._lows[k] = self._place(masters)
        torch._foreach_copy_(lows, masters)
        for slot, low, master in zip(slots, lows, masters, strict=True):
            low.requires_grad_(master.requires_grad)
            slot.module._parameters[slot.key] = low  # type: ignore[assignment]
        self._masters, self._inside = masters, k

    @torch.no_grad()
    def leave(self) -> None:
        """After the block's backward, or its failure: the float32 weights are back, with their gradients."""
        if self._inside is None:
            return
        k, self._inside = self._inside, None
        into: list[Tensor] = []
        source: list[Tensor] = []
        grown: list[Tensor] = []
        more: list[Tensor] = []
        for slot, low, master in zip(self._slots[k], self._lows[k], self._masters, strict=True):
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
        self._masters = []
        if into:
            torch._foreach_copy_(into, source)
        if grown:
            torch._foreach_add_(grown, more)

    def abandon(self) -> None:
        """The float32 weights are back, and nothing is launched."""
        if self._inside is None:
            return
        for slot, low, master in zip(self._slots[self._inside], self._lows[self._inside], self._masters, strict=True):
            slot.module._parameters[slot.key] = master  # type: ignore[assignment]
            low.grad = None
        self._masters, self._inside = [], None

    def _place(self, masters: list[Tensor]) -> list[Tensor]:
        """Tensors in the shared scratch buffer, with the masters' shapes and strides."""
        need = sum(p.numel() for p in masters)
        if self._scratch is None or self._scratch.numel() < need or self._scratch.device != masters[0].device:
            self._scratch = torch.empty(need, dtype=self._dtype, device=masters[0].device)
            self._lows.clear()
        lows, at = [], 0
        for p in masters:
            lows.append(self._scratch.as_strided(p.size(), p.stride(), at).detach())
            at += p.numel()
        return lows


def _casts(slot: Slot) -> bool:
    p = slot.value
    hooked = getattr(p, "_backward_hooks", None) or getattr(p, "_post_accumulate_grad_hooks", None)
    return type(slot.module) in _CAST and slot.key in ("weight", "bias") and p.dtype == torch.float32 and not hooked


def _differs(low: Tensor, p: Tensor) -> bool:
    return low.shape != p.shape or low.stride() != p.stride() or low.device != p.device
