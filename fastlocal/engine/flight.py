"""`Flight`: one training step on its way through the blocks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastlocal.blocks.cascade import Cascade, Done
from fastlocal.blocks.types import StepContext
from fastlocal.engine.model import LocalModel
from fastlocal.engine.output import Hits, StepOutput


@dataclass
class Flight:
    """What one step has made and not yet used up. Tasks of the engine read and write it.

    Attributes:
        step: its number.
        args, kwargs, target: the batch.
        updates: False for a micro-batch whose gradients wait.
        hits, losses: of the blocks whose head has run, in order.
        inputs: by block, what its forward takes or its cascade hands gradients to.
        outputs: by block, what its forward gave, with its graph.
        owed: by block, the gradient at its output that its own backward starts from.
        summed: losses with their graphs, where the method has no border.
        options: per block, what the optimizer's groups said when the step began; None where they are read when needed.
        running: blocks between forward and update, whose buffers go back if the step fails.
        updated: blocks that have had their update.
        skipped: by block, how many of its updates had been left out after this one, float32 [1]; where blocks are at different
            steps, and the guard's count may be that of a later one.
    """

    step: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Any
    ctx: StepContext
    hits: Hits
    cascade: Cascade | None
    updates: bool = True
    losses: list[Tensor] = field(default_factory=list)
    inputs: dict[int, Any] = field(default_factory=dict)
    outputs: dict[int, Any] = field(default_factory=dict)
    owed: dict[int, Tensor | None] = field(default_factory=dict)
    summed: list[Tensor] = field(default_factory=list)
    logits: Tensor | None = None
    options: list[list[dict[str, Any]]] | None = None
    running: set[int] = field(default_factory=set)
    updated: set[int] = field(default_factory=set)
    skipped: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: LocalModel, step: int, call: tuple[Any, ...], ctx: StepContext, *, updates: bool) -> Flight:
        args, kwargs, target = call
        cascade = Cascade(model.window) if model.window > 1 else None
        return cls(
            step, args, kwargs, target, ctx, Hits(target, model.criterion), cascade, updates, inputs={0: ctx.input}
        )

    def take(self, done: list[Done]) -> None:
        """Blocks that no later loss of the step reaches."""
        for block, h, grad_out in done:
            self.outputs[block.index], self.owed[block.index] = h, grad_out

    def output(self) -> StepOutput:
        assert self.logits is not None
        losses = torch.stack([v.float() if v.dtype.itemsize < 4 else v for v in self.losses])
        return StepOutput(self.step, losses, self.logits, self.hits, self.skipped)
