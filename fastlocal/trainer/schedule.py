"""Learning-rate schedules, as PyTorch's own schedulers; a `LocalOptimizer` takes them like any optimizer."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fastlocal.errors import ArgumentError


class _Cosine:
    """A class, not a closure: the scheduler's state_dict carries its numbers."""

    def __init__(self, steps: int, warmup: int):
        self.steps, self.warmup = steps, warmup

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def cosine(optimizer: Optimizer, steps: int, warmup: int = 0) -> LambdaLR:
    """A linear rise over ``warmup`` steps, then half a cosine down to 0 at step ``steps``; step it once a batch.

    Args:
        optimizer: `Engine.optimizer` or any other; each group's own ``lr`` is the top of its curve.
        steps: steps of the whole training.
        warmup: those of the rise.

    Raises:
        ArgumentError: ``steps`` below 1, or ``warmup`` not from 0 to ``steps``.
    """
    if steps < 1:
        raise ArgumentError(f"steps: got {steps}; give the number of training steps, at least 1")
    if not 0 <= warmup <= steps:
        raise ArgumentError(f"warmup: got {warmup}; give 0 up to steps ({steps})")
    return LambdaLR(optimizer, _Cosine(steps, warmup))
