"""Epochs of any training step, plain loops included, for runs that are compared: what the demo measures with."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from fastlocal.data import Batches
from fastlocal.engine.engine import PRECISIONS, Engine
from fastlocal.engine.model import LocalModel
from fastlocal.errors import ArgumentError
from fastlocal.trainer.evaluate import accuracy

Step = Callable[[Tensor, Tensor], Sequence[Tensor] | Tensor]
_READ_EVERY = 50  # steps between two looks at the losses, where a look waits for the device


@dataclass(frozen=True)
class Epoch:
    """One epoch: its number from 0, each block's mean training loss, test accuracy (0 to 1), and times.

    ``step_seconds`` is the wall time of each step; empty on an accelerator, where a step returns before it is done.
    """

    number: int
    losses: list[float]
    test_accuracy: float
    lr: float
    seconds: float
    steps: int
    step_seconds: list[float] = field(default_factory=list, repr=False)


@dataclass
class History:
    """The epochs of a training, in order."""

    epochs: list[Epoch] = field(default_factory=list)

    @property
    def test_accuracy(self) -> float:
        """After the last epoch."""
        return self.epochs[-1].test_accuracy

    @property
    def steps_per_second(self) -> float:
        """One over the median step time, or steps over seconds where single steps were not timed.

        The very first steps, which also allocate and choose kernels, weigh no more than any other in a median.
        """
        steps = [seconds for epoch in self.epochs for seconds in epoch.step_seconds]
        if steps:
            return 1 / median(steps)
        return sum(epoch.steps for epoch in self.epochs) / sum(epoch.seconds for epoch in self.epochs)

    def write(self, path: str | Path) -> None:
        """Writes a CSV file: a line per epoch, a column per block's loss."""
        names = ["epoch", "steps", "seconds", "lr", "test_accuracy"]
        blocks = len(self.epochs[0].losses) if self.epochs else 0
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*names, *(f"loss_{k}" for k in range(blocks))])
            for e in self.epochs:
                row = [e.number, e.steps, f"{e.seconds:.3f}", f"{e.lr:.6g}", f"{e.test_accuracy:.5f}"]
                writer.writerow([*row, *(f"{loss:.5f}" for loss in e.losses)])


class Loop:
    """Epochs of one training run, one `epoch` call each, so that several runs can take turns.

    Args:
        step: an `Engine`, or a function of (x, y) that trains on a batch and returns the K local losses.
        train: training batches.
        test: test batches.
        model: what ``step`` trains; an Engine's own by default.
        scheduler: stepped once a batch.

    Raises:
        ArgumentError: ``step`` is a plain function and ``model`` is missing.
    """

    def __init__(
        self,
        step: Engine | Step,
        train: Batches,
        test: Batches,
        *,
        model: LocalModel | None = None,
        scheduler: LRScheduler | None = None,
    ):
        engine = step if isinstance(step, Engine) else None
        if model is None:
            if engine is None:
                raise ArgumentError("model: a step that is no Engine does not say what it trains; pass the LocalModel")
            model = engine.model
        self.engine, self.model, self.scheduler = engine, model, scheduler
        self.train, self.test = train, test
        self.history = History()
        self._step: Step = step if engine is None else lambda x, y: engine.step(x, y).losses  # type: ignore[assignment]
        self._waits = train.x.device.type != "cpu"

    def epoch(self, on_step: Callable[[list[float] | None], Any] | None = None) -> Epoch:
        """Trains one epoch, then tests; adds the result to ``history`` and returns it.

        Args:
            on_step: called after every step with the K losses, or None at steps where reading them would make the
                device wait.
        """
        self.model.train()
        number = len(self.history.epochs)
        total: Tensor | None = None
        lr, times = self._lr(), []
        begin = time.perf_counter()
        for count, (x, y) in enumerate(self.train.epoch(number), start=1):
            step_begin = time.perf_counter()
            losses = self._step(x, y)
            if not self._waits:
                times.append(time.perf_counter() - step_begin)
            losses = losses if isinstance(losses, Tensor) else torch.stack(list(losses))
            total = losses.clone() if total is None else total.add_(losses)
            if self.scheduler is not None:
                self.scheduler.step()
            if on_step is not None:
                on_step(None if self._waits and count % _READ_EVERY else losses.tolist())
            if self.engine is not None and self.engine.should_stop:
                break
        if total is None:
            raise ArgumentError("train: holds no batch; give at least one sample")
        if self.engine is not None:
            self.engine.flush()
        means = (total / count).tolist()  # waits for the device, so the time below is that of finished work
        seconds = time.perf_counter() - begin
        dtype = PRECISIONS[self.engine.precision] if self.engine is not None else None
        result = Epoch(number, means, accuracy(self.model, self.test, dtype), lr, seconds, count, times)
        self.history.epochs.append(result)
        return result

    def _lr(self) -> float:
        if self.scheduler is not None:
            return float(self.scheduler.get_last_lr()[0])
        if self.engine is not None:
            return float(self.engine.optimizer.param_groups[0]["lr"])
        return float("nan")
