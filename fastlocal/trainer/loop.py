"""`fit`: epochs of any training step, with a progress bar, a CSV log and the test accuracy after each epoch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from fastlocal.data import Batches
from fastlocal.engine.engine import PRECISIONS, Engine
from fastlocal.engine.model import LocalModel
from fastlocal.errors import ArgumentError
from fastlocal.trainer.history import Epoch, History
from fastlocal.trainer.progress import Bar

Step = Callable[[Tensor, Tensor], Sequence[Tensor] | Tensor]
_READ_EVERY = 50  # steps between two looks at the losses, where a look waits for the device


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


def fit(
    step: Engine | Step,
    train: Batches,
    test: Batches,
    *,
    epochs: int,
    model: LocalModel | None = None,
    scheduler: LRScheduler | None = None,
    log: str | Path | None = None,
    label: str = "",
    progress: bool = True,
) -> History:
    """Trains for ``epochs`` epochs; see `Loop` for the other arguments.

    Args:
        log: CSV file, written anew after every epoch.
        label: stands before the progress bar.
        progress: show the bar, on stderr.

    Returns:
        The `History`. It is shorter than ``epochs`` when the engine asked to stop (``nonfinite="stop"``).

    Raises:
        ArgumentError: ``epochs`` below 1, or what `Loop` refuses.
    """
    if epochs < 1:
        raise ArgumentError(f"epochs: got {epochs}; give at least 1")
    loop = Loop(step, train, test, model=model, scheduler=scheduler)
    with Bar(epochs * len(train), label, enabled=progress) as bar:
        for number in range(epochs):
            bar.label = f"{label} {number + 1}/{epochs}".strip()
            bar.accuracy = loop.epoch(bar.step).test_accuracy
            if log is not None:
                loop.history.write(log)
            if loop.engine is not None and loop.engine.should_stop:
                break
    return loop.history


@torch.no_grad()
def accuracy(model: torch.nn.Module, batches: Batches, dtype: torch.dtype | None = None) -> float:
    """Fraction of samples that ``model`` in eval mode classifies rightly; its mode is put back.

    Args:
        dtype: of autocast, or None for the model's own.
    """
    training = model.training
    model.eval()
    try:
        right = torch.zeros((), dtype=torch.int64, device=batches.y.device)
        with torch.autocast(batches.x.device.type, dtype) if dtype is not None else nullcontext():
            for x, y in batches.epoch(0):
                right += (model(x).argmax(1) == y).sum()
    finally:
        model.train(training)
    return right.item() / len(batches.y)
