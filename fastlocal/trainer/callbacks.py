"""Callbacks: own code at fixed points of a training, with a state that checkpoints keep."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from fastlocal.errors import ArgumentError, did_you_mean

HOOKS = ("on_fit_start", "on_step_end", "on_epoch_end", "on_exception", "on_fit_end")


class Callback:
    """Base of callbacks; every hook does nothing. What a hook raises ends the training, as any error in it does.

    A callback whose behaviour depends on what came before overrides `state_dict` and `load_state_dict`; then a resumed
    training goes on with it.
    """

    def on_fit_start(self, trainer: Any) -> None:
        """Before the first step of a ``fit``, after a checkpoint was loaded."""

    def on_step_end(self, trainer: Any, output: Any) -> None:
        """After a step; ``output`` is its `StepOutput`. Reading its tensors makes the host wait for the device.

        Once for each step, in order. In a pipeline a step is complete some batches after its own was given (``output.step``
        is its number): nothing is told while the pipeline fills, ``trainer.batch``, rates and weights are ahead, and the
        last steps are told before a validation, a checkpoint and the end. Use ``schedule="overlap"`` where the weights must be
        those of the step.
        """

    def on_epoch_end(self, trainer: Any, row: dict[str, Any]) -> None:
        """After an epoch and its validation; ``row`` is what is logged."""

    def on_exception(self, trainer: Any, error: BaseException) -> None:
        """When an exception, or an interruption, ends the training."""

    def on_fit_end(self, trainer: Any) -> None:
        """After the last step, also of a training that was stopped."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs, made of numbers, text, lists, dicts and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `state_dict` returned."""


class EarlyStopping(Callback):
    """Sets ``trainer.should_stop`` once a column of the epoch's row has not improved for ``patience`` epochs.

    An epoch where the column is empty (no validation) does not count; NaN counts as no improvement. A training that is
    resumed after it was stopped stops at once; `reset` makes it go on.

    Args:
        monitor: the column.
        patience: epochs, at least 1.
        mode: ``"max"`` or ``"min"``, what is better.
        min_delta: what an improvement must exceed.

    Attributes:
        best: the best value so far, or None.
        waited: epochs since then.

    Raises:
        ArgumentError: a bad argument; in training, a row that lacks the column.
    """

    def __init__(
        self, monitor: str = "val_accuracy", *, mode: str = "max", patience: int = 5, min_delta: float = 0.0
    ) -> None:
        if mode not in ("max", "min"):
            raise ArgumentError(f"mode: got {mode!r}; valid are 'max', 'min'")
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
            raise ArgumentError(f"patience: got {patience!r}; give a number of epochs from 1")
        if isinstance(min_delta, bool) or not isinstance(min_delta, int | float) or not 0 <= min_delta < math.inf:
            raise ArgumentError(f"min_delta: got {min_delta!r}; give a number from 0")
        self.monitor, self.mode, self.patience, self.min_delta = monitor, mode, patience, min_delta
        self.reset()

    def reset(self) -> None:
        """Forgets what it has seen."""
        self.best: float | None = None
        self.waited = 0

    def on_fit_start(self, trainer: Any) -> None:
        self._stop(trainer)

    def on_epoch_end(self, trainer: Any, row: dict[str, Any]) -> None:
        if self.monitor not in row:
            raise ArgumentError(
                f"monitor: the epochs' rows have no column {self.monitor!r}. {did_you_mean(self.monitor, row)} A column of "
                "validation needs validation data"
            )
        if row[self.monitor] is None:
            return
        value = float(row[self.monitor])
        if self._better(value):
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        self._stop(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.waited = state["best"], state["waited"]

    def _better(self, value: float) -> bool:
        if self.best is None or math.isnan(value):
            return not math.isnan(value)
        return value > self.best + self.min_delta if self.mode == "max" else value < self.best - self.min_delta

    def _stop(self, trainer: Any) -> None:
        if self.waited >= self.patience:
            trainer.should_stop = True

    def __repr__(self) -> str:
        return (
            f"EarlyStopping({self.monitor!r}, mode={self.mode!r}, patience={self.patience}, min_delta={self.min_delta})"
        )


class LambdaCallback(Callback):
    """Functions as hooks: ``LambdaCallback(on_epoch_end=lambda trainer, row: print(row))``.

    Raises:
        ArgumentError: no such hook, or no function.
    """

    def __init__(self, **hooks: Callable[..., Any]) -> None:
        for name, function in hooks.items():
            if name not in HOOKS:
                raise ArgumentError(f"{name}: no hook of callbacks. {did_you_mean(name, HOOKS)}")
            if not callable(function):
                raise ArgumentError(f"{name}: expected a function, got {type(function).__name__}")
            setattr(self, name, function)


class Callbacks:
    """Runs the hooks of callbacks in the order given, and keeps their states by position and class.

    Raises:
        ArgumentError: something that is no `Callback`.
    """

    def __init__(self, callbacks: Iterable[Callback] = ()) -> None:
        self._all = list(callbacks)
        for callback in self._all:
            if not isinstance(callback, Callback):
                raise ArgumentError(
                    f"callbacks: {callback!r} is no Callback; subclass fastlocal.trainer.callbacks.Callback, or wrap a function "
                    "in LambdaCallback(on_epoch_end=...)"
                )
        self._untold: deque[tuple[Callback, Any]] = deque()  # callbacks that have yet to hear of a step

    @property
    def watch_steps(self) -> bool:
        """Whether one of them has an ``on_step_end``."""
        return any(
            "on_step_end" in vars(callback) or type(callback).on_step_end is not Callback.on_step_end
            for callback in self._all
        )

    def on_fit_start(self, trainer: Any) -> None:
        self._untold.clear()
        for callback in self._all:
            callback.on_fit_start(trainer)

    def on_step_end(self, trainer: Any, output: Any) -> None:
        """Where a hook completes further steps (it saves), they are told within it, and each callback hears of them in order."""
        self._untold.extend((callback, output) for callback in self._all)
        while self._untold:
            callback, told = self._untold.popleft()
            callback.on_step_end(trainer, told)

    def on_epoch_end(self, trainer: Any, row: dict[str, Any]) -> None:
        for callback in self._all:
            callback.on_epoch_end(trainer, row)

    def on_exception(self, trainer: Any, error: BaseException) -> None:
        for callback in self._all:
            callback.on_exception(trainer, error)

    def on_fit_end(self, trainer: Any) -> None:
        for callback in self._all:
            callback.on_fit_end(trainer)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """States of the callbacks that have one, by position and class: ``{"0:EarlyStopping": {...}}``."""
        return {name: callback.state_dict() for name, callback in self._stateful()}

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """Gives each callback its state.

        Raises:
            ArgumentError: the states are those of other callbacks; none has been changed then.
        """
        own = dict(self._stateful())
        if own.keys() != state.keys():
            raise ArgumentError(
                f"callbacks: the checkpoint holds the states of {_names(state)}, this training has {_names(own)}; resume with the "
                "same callbacks in the same order, or start anew from the checkpoint's weights"
            )
        for name, callback in own.items():
            callback.load_state_dict(state[name])

    def _stateful(self) -> list[tuple[str, Callback]]:
        return [
            (f"{i}:{type(callback).__name__}", callback)
            for i, callback in enumerate(self._all)
            if type(callback).state_dict is not Callback.state_dict
        ]

    def __iter__(self) -> Iterator[Callback]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)


def _names(states: Iterable[str]) -> str:
    return ", ".join(states) or "no callback"
