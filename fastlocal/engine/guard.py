"""`Guard`: a block whose loss or gradient is not finite stays as it was, and the host need not know."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlocal.blocks.block import Block

_SMALL = 65536  # elements; buffers up to this size are given back together


class Guard:
    """A non-finite flag per block, and what the blocks' buffers (BatchNorm statistics) and averages (links) held before.

    Works on all blocks together, so that only `check` is launched for each.

    Args:
        blocks: in order.
        device: where the flags live.
        together: one flagged block takes all buffers back (``update="end"``), and the averages, which else move even where
            their block is skipped.

    Attributes:
        found: this step's flags, one 0-dim float32 view per block, 1 where something was not finite.
        waits: whether reading a value makes the host wait for the device; then nothing is read.
        skipped: float32 ``[K]``, how many updates of each block were left out.
        first_bad: float32 ``[K]``, the first such step since it was last reset, or -1.
    """

    def __init__(self, blocks: Sequence[Block], device: torch.device, *, together: bool = False):
        self.waits = device.type != "cpu"
        self._together = together
        self._all_found = torch.zeros(len(blocks), dtype=torch.float32, device=device)
        self.found = list(self._all_found.unbind())
        self.skipped = torch.zeros(len(blocks), dtype=torch.float32, device=device)
        self.first_bad = torch.full((len(blocks),), -1.0, dtype=torch.float32, device=device)
        self._slots = [
            (slot, k)
            for k, block in enumerate(blocks)
            for slot in (*block.buffer_slots(), *(s for link in block.links for s in link.frozen if together))
        ]
        self._copies = self._make_copies(self._live())

    def alone(self, k: int, block: Block) -> Guard:
        """The guard of block k by itself, for a step whose blocks do not begin and end together; flags and counters are these."""
        own = copy.copy(self)
        own._together = False
        own._all_found, own.skipped, own.first_bad = (
            t[k : k + 1] for t in (self._all_found, self.skipped, self.first_bad)
        )
        own.found = [self.found[k]]
        own._slots = [(slot, 0) for slot in block.buffer_slots()]
        own._copies = own._make_copies(own._live())
        return own

    def begin(self) -> None:
        """Before block 0: clears the flags and copies the buffers."""
        self._all_found.zero_()
        live = self._live()
        if any(not copies.fit(live) for copies in self._copies):  # moved or converted since
            self._copies = self._make_copies(live)
        for copies in self._copies:
            copies.take(live)

    def _make_copies(self, live: list[Tensor]) -> list[_Copies]:
        alike: dict[Any, list[int]] = {}
        for i, b in enumerate(live):
            alike.setdefault((b.dtype, b.device, b.numel() <= _SMALL), []).append(i)
        owners = [k for _, k in self._slots]
        return [_Copies(at, live, owners, flat=small) for (*_, small), at in alike.items()]

    def check(self, k: int, tensors: Sequence[Tensor], inverse: Tensor) -> None:
        """Multiplies the tensors by ``inverse`` (float32, 0-dim), and sets block k's flag if one is not finite."""
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for t in tensors:
            by_dtype.setdefault(t.dtype, []).append(t)
        for group in by_dtype.values():
            torch._amp_foreach_non_finite_check_and_unscale_(group, self.found[k], inverse)

    def any_found(self) -> Tensor:
        """1 if any block's flag is set, 0-dim."""
        return self._all_found.amax()

    def end(self, step: int | Tensor, undo: Sequence[int] = ()) -> None:
        """After the last block: counts the flags and gives the buffers of flagged blocks their values back.

        Args:
            step: its number, for ``first_bad``; 0-dim on the device where the step is captured.
            undo: of a step that failed: blocks whose buffers go back although nothing was flagged.
        """
        if not (self.waits or undo or bool(self._all_found.any())):
            return
        bad = self._all_found > 0
        self.skipped.add_(self._all_found)
        self.first_bad.masked_fill_(bad & (self.first_bad < 0), step)
        if self._together:
            bad |= bad.any()
        for k in undo:
            bad[k] = True
        live = self._live()
        for copies in self._copies:
            copies.give_back(live, bad)

    def state(self) -> dict[str, Any]:
        """Between two micro-batches: the flags so far, and the buffers as they were before the first."""
        return {"found": self._all_found.clone(), "buffers": [c.clone() for part in self._copies for c in part.copies]}

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` returned, for the same blocks."""
        self._copies = self._make_copies(self._live())
        self._all_found.copy_(state["found"])
        for own, saved in zip([c for part in self._copies for c in part.copies], state["buffers"], strict=True):
            own.copy_(saved)

    def _live(self) -> list[Tensor]:
        return [slot.value for slot, _ in self._slots]


class _Copies:
    """Copies of the buffers at the positions ``at``, all of one dtype and device.

    ``flat`` holds them in one tensor, with the number of the owning block beside each element: then giving back takes a
    few launches instead of two for each buffer.
    """

    def __init__(self, at: list[int], live: list[Tensor], owners: list[int], *, flat: bool):
        self.at = at
        self.blocks = [owners[i] for i in at]
        self.flat: Tensor | None = None
        self.copies = [torch.empty_like(live[i]) for i in at]
        if flat:
            sizes = [c.numel() for c in self.copies]
            self.flat = self.copies[0].new_empty(sum(sizes))
            self.copies = [part.view(c.shape) for c, part in zip(self.copies, self.flat.split(sizes))]
            owner = torch.repeat_interleave(torch.tensor(self.blocks), torch.tensor(sizes), output_size=sum(sizes))
            self.owner = owner.to(self.flat.device)

    def fit(self, live: list[Tensor]) -> bool:
        """Whether the buffers still have the shapes, dtype and device that they had."""
        return all(
            live[i].shape == c.shape and live[i].dtype == c.dtype and live[i].device == c.device
            for i, c in zip(self.at, self.copies)
        )

    @torch.no_grad()
    def take(self, live: list[Tensor]) -> None:
        torch._foreach_copy_(self.copies, [live[i] for i in self.at])

    @torch.no_grad()
    def give_back(self, live: list[Tensor], bad: Tensor) -> None:
        """Buffers of the blocks that ``bad`` [K] marks get their copies' values; the device decides."""
        buffers = [live[i] for i in self.at]
        if self.flat is None:
            for buffer, copy, k in zip(buffers, self.copies, self.blocks):
                buffer.copy_(torch.where(bad[k], copy, buffer))
            return
        now = torch.cat([b.reshape(-1) for b in buffers])
        kept = torch.where(bad.index_select(0, self.owner), self.flat, now).split([b.numel() for b in buffers])
        torch._foreach_copy_(buffers, [part.view(b.shape) for part, b in zip(kept, buffers)])


class BatchCounts:
    """Counts the batches that BatchNorms see on the host, and adds them to their counters in one launch.

    ``num_batches_tracked`` is used only where ``momentum=None``, but every forward adds 1 to it on the device: one
    launch in nine of an AugLocal step. Where it is not used, a number stands in for it while a step runs.
    """

    def __init__(self, root: torch.nn.Module):
        norms = torch.nn.modules.batchnorm
        forwards = (norms._BatchNorm.forward, norms.SyncBatchNorm.forward)
        self._norms = [m for m in root.modules() if type(m).forward in forwards]
        self._counting: list[tuple[torch.nn.Module, _Number]] = []

    def begin(self) -> None:
        for m in self._norms:
            if m.momentum is not None and m._buffers.get("num_batches_tracked") is not None:
                number = _Number()
                m.__dict__["num_batches_tracked"] = number  # found before the buffer, which stays where it is
                self._counting.append((m, number))

    @torch.no_grad()
    def end(self) -> None:
        """Adds what was counted; the counters are tensors again."""
        by_calls: dict[int, list[Tensor]] = {}
        for m, number in self._counting:
            del m.__dict__["num_batches_tracked"]
            if number.calls:
                by_calls.setdefault(number.calls, []).append(m._buffers["num_batches_tracked"])  # type: ignore[arg-type]
        self._counting.clear()
        for calls, counters in by_calls.items():
            torch._foreach_add_(counters, calls)

    def abandon(self) -> None:
        """The counters are tensors again, and nothing is added."""
        for m, _ in self._counting:
            del m.__dict__["num_batches_tracked"]
        self._counting.clear()


class _Number:
    """What ``BatchNorm.forward`` asks of its counter."""

    def __init__(self) -> None:
        self.calls = 0

    def add_(self, count: int) -> None:
        self.calls += count
