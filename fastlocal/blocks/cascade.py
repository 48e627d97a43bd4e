"""Losses that reach over several blocks, from one forward of each: the exact rewrite of HPFF and MLAAN.

Published, every block runs again for each stream that passes it, with the same numbers each time. Here it runs once. The
loss of block k reaches the blocks k, k-1, ... k-window+1: its gradient is handed down by backwards that stop at a block's
input and compute no weight gradient; what a block is owed is added up, and one full backward with the sum, after the last
loss that reaches it, gives its parameters' gradients.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from fastlocal.blocks.block import Block
from fastlocal.errors import ArgumentError


class Done(NamedTuple):
    """A block that no later loss of the step reaches: ``h``, its output with its graph, and the whole gradient there."""

    block: Block
    h: Tensor
    grad_out: Tensor | None


@dataclass
class _Open:
    block: Block
    x: Tensor
    h: Tensor
    owed: Tensor | None


class Cascade:
    """The blocks of one step whose graphs still live, at most ``window`` of them."""

    def __init__(self, window: int):
        self.window = window
        self._open: deque[_Open] = deque()

    def add(self, block: Block, x: Tensor, h: Tensor, own: Tensor | None, shared: Tensor | None) -> list[Done]:
        """Block ``block`` has run.

        Args:
            x: its input, a leaf (of block 0: the network's, which gets no gradient).
            h: its output.
            own: gradient at ``h`` of the loss that trains this block alone.
            shared: gradient at ``h`` of the loss that reaches the blocks before it too.

        Returns:
            The blocks that are complete now: one, or none while the window fills.
        """
        self._open.append(_Open(block, x, h, _sum(own, shared)))
        self._hand_down(len(self._open) - 1, shared, self.window - 1)
        return [self._close()] if len(self._open) == self.window else []

    def finish(self, grad: Tensor | None) -> Iterator[Done]:
        """The last block has had its backward; ``grad`` is the gradient at its input. Yields the blocks before it, in order."""
        if grad is not None and self._open:
            last = self._open[-1]
            last.owed = _sum(last.owed, grad)
            self._hand_down(len(self._open) - 1, grad, self.window - 2)
        while self._open:
            yield self._close()

    def _hand_down(self, at: int, grad: Tensor | None, hops: int) -> None:
        """``grad`` at the output of open block ``at`` goes on to the outputs of ``hops`` blocks before it."""
        while grad is not None and hops > 0 and at > 0:
            block = self._open[at]
            if block.h.grad_fn is None or not block.x.requires_grad:
                return
            # not torch.autograd.grad: there an operator cannot tell which leaves are asked for
            torch.autograd.backward(block.h, grad, inputs=[block.x], retain_graph=True)
            grad, block.x.grad = block.x.grad, None
            at, hops = at - 1, hops - 1
            self._open[at].owed = _sum(self._open[at].owed, grad)

    def _close(self) -> Done:
        done = self._open.popleft()
        return Done(done.block, done.h, done.owed)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Never in place: what goes into the sum may be handed on."""
    if a is None or b is None:
        return b if a is None else a
    for t in (a, b):
        # made on another block's stream perhaps, and dropped while this one reads it
        if t.is_cuda and not torch.cuda.is_current_stream_capturing():
            t.record_stream(torch.cuda.current_stream(t.device))
    return a + b


def leaf(h: Tensor) -> Tensor:
    """The input of the next block, at which a gradient can be asked for."""
    h = h.detach()
    return h.requires_grad_() if h.is_floating_point() else h


def scaled_down(grad: Tensor | None, share: float) -> Tensor | None:
    """The part of the last block's gradient at its input that goes on (`Method.final_share`)."""
    return grad if grad is None or share == 1.0 else grad * share


class Passes:
    """BatchNorms whose block runs once where the published algorithm runs it several times, on the same batch each time.

    n updates ``r = (1 - m) r + m s`` with the same statistics s are one with the momentum ``1 - (1 - m)^n``.

    Args:
        norms: ``(module, passes)``, with passes above 1.

    Raises:
        ArgumentError: a module with ``momentum=None``, whose average has no such form.
    """

    def __init__(self, norms: Sequence[tuple[_BatchNorm, int]]):
        for module, passes in norms:
            if module.momentum is None:
                raise ArgumentError(
                    f"net: a {type(module).__name__} has momentum=None (a cumulative average), which cannot stand for the "
                    f"{passes} forwards a step of this method; give it a momentum"
                )
        self.norms = norms

    def of(self, modules: Collection[object]) -> Passes:
        """Those of some modules."""
        wanted = {id(module) for module in modules}
        return Passes([(module, passes) for module, passes in self.norms if id(module) in wanted])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """While blocks run. An exception leaves the counters as the forwards that ran left them."""
        if not self.norms:
            yield
            return
        before = [module.momentum or 0.0 for module, _ in self.norms]
        for (module, passes), momentum in zip(self.norms, before):
            module.momentum = 1 - (1 - momentum) ** passes
        try:
            yield
        finally:
            for (module, _), momentum in zip(self.norms, before):
                module.momentum = momentum

    @torch.no_grad()
    def count(self) -> None:
        """After the forward: the counters get what the forwards that were spared would have added."""
        by_passes: dict[int, list[Tensor]] = {}
        for module, passes in self.norms:
            counter = module._buffers.get("num_batches_tracked")
            if module.training and counter is not None:
                by_passes.setdefault(passes, []).append(counter)
        for passes, counters in by_passes.items():
            torch._foreach_add_(counters, passes - 1)
