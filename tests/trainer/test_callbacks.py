from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from fastlocal.errors import ArgumentError
from fastlocal.trainer.callbacks import HOOKS, Callback, Callbacks, EarlyStopping, LambdaCallback

NAN = float("nan")


def stops_after(stopping: EarlyStopping, values: list[float | None]) -> int | None:
    """The number of the epoch after which it asks to stop."""
    trainer = SimpleNamespace(should_stop=False)
    runner = Callbacks([stopping])
    runner.on_fit_start(trainer)
    for epoch, value in enumerate(values):
        runner.on_epoch_end(trainer, {stopping.monitor: value})
        if trainer.should_stop:
            return epoch
    return None


@pytest.mark.parametrize(
    ("options", "values", "expected"),
    [
        ({"patience": 2}, [0.1, 0.2, 0.15, 0.2, 0.9], 3),
        ({"patience": 2}, [0.1, 0.2, 0.15, 0.3, 0.2, 0.4], None),
        ({"patience": 1}, [0.1, 0.1], 1),
        ({"patience": 2, "min_delta": 0.1}, [0.5, 0.55, 0.59, 0.9], 2),
        ({"patience": 2, "min_delta": 0.1}, [0.5, 0.55, 0.61, 0.7], None),
        ({"patience": 2, "mode": "min"}, [1.0, 0.5, 0.6, 0.7], 3),
        ({"patience": 2}, [0.5, None, None, None, 0.4, None, 0.3], 6),
        ({"patience": 2}, [NAN, NAN, 0.5], 1),
        ({"patience": 2}, [0.5, NAN, 0.6, NAN, NAN], 4),
        ({"patience": 3, "mode": "min"}, [NAN, 2.0, float("inf"), 1.0], None),
    ],
)
def test_early_stopping(options: dict[str, Any], values: list[float | None], expected: int | None) -> None:
    assert stops_after(EarlyStopping("val_accuracy", **options), values) == expected


def test_it_goes_on_where_it_was_saved() -> None:
    values = [0.3, 0.2, 0.3, 0.1]
    for cut in range(4):
        first, second = EarlyStopping(patience=3), EarlyStopping(patience=3)
        assert stops_after(first, list(values[:cut])) is None
        state = json.loads(json.dumps(Callbacks([first]).state_dict()))
        Callbacks([second]).load_state_dict(state)
        assert second.best == first.best
        assert stops_after(second, list(values[cut:])) == 3 - cut
    # saved after it had asked to stop: stops before the first step
    trainer = SimpleNamespace(should_stop=False)
    second.on_fit_start(trainer)
    assert trainer.should_stop
    second.reset()
    trainer.should_stop = False
    second.on_fit_start(trainer)
    assert not trainer.should_stop and second.best is None


def test_a_column_that_is_not_there_is_named() -> None:
    stopping = EarlyStopping("val_acuracy")
    with pytest.raises(ArgumentError, match=r"^monitor: .*'val_acuracy'. Did you mean \"val_accuracy\""):
        stopping.on_epoch_end(SimpleNamespace(), {"epoch": 0, "val_accuracy": 0.5})


@pytest.mark.parametrize(
    ("options", "name"),
    [({"mode": "up"}, "mode"), ({"patience": 0}, "patience"), ({"min_delta": -1}, "min_delta"),
     ({"min_delta": NAN}, "min_delta"), ({"patience": 1.5}, "patience")],
)  # fmt: skip
def test_arguments_of_early_stopping(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{name}: got"):
        EarlyStopping(**options)


def run_all(runner: Callbacks, trainer: Any) -> None:
    runner.on_fit_start(trainer)
    runner.on_step_end(trainer, "output")
    runner.on_epoch_end(trainer, {"epoch": 0})
    runner.on_exception(trainer, ValueError("x"))
    runner.on_fit_end(trainer)


def test_hooks_run_in_order_with_their_arguments() -> None:
    calls: list[Any] = []

    def note(tag: str, hook: str) -> Any:
        return lambda trainer, *rest: calls.append((tag, hook, trainer, *rest))

    one, two = (LambdaCallback(**{hook: note(tag, hook) for hook in HOOKS}) for tag in "ab")
    runner = Callbacks([one, Callback(), two])
    run_all(runner, "trainer")
    assert [(call[0], call[1]) for call in calls] == [(tag, hook) for hook in HOOKS for tag in "ab"]
    assert all(call[2] == "trainer" for call in calls)
    assert calls[2][3] == "output" and calls[4][3] == {"epoch": 0} and isinstance(calls[6][3], ValueError)
    assert len(runner) == 3 and next(iter(runner)) is one and runner.state_dict() == {}
    run_all(Callbacks(), "trainer")
    run_all(Callbacks([LambdaCallback()]), "trainer")


def test_what_a_callback_raises_ends_the_training() -> None:
    def fail(trainer: Any, row: dict[str, Any]) -> None:
        raise ZeroDivisionError

    after: list[Any] = []
    runner = Callbacks(
        [LambdaCallback(on_epoch_end=fail), LambdaCallback(on_epoch_end=lambda t, row: after.append(row))]
    )
    with pytest.raises(ZeroDivisionError):
        runner.on_epoch_end(None, {})
    assert after == []


def test_what_is_no_callback_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"^on_epoch_ends: .*Did you mean \"on_epoch_end\""):
        LambdaCallback(on_epoch_ends=print)
    with pytest.raises(ArgumentError, match=r"^on_epoch_end: expected a function, got int"):
        LambdaCallback(on_epoch_end=3)  # type: ignore[arg-type]
    for wrong in (print, EarlyStopping):
        with pytest.raises(ArgumentError, match=r"^callbacks: .* is no Callback; .*LambdaCallback"):
            Callbacks([wrong])  # type: ignore[list-item]


def test_states_of_other_callbacks_are_refused_and_nothing_changes() -> None:
    first, second = EarlyStopping(), EarlyStopping("val_loss", mode="min")
    stops_after(first, [0.5, 0.4])
    state = Callbacks([first, LambdaCallback(), second]).state_dict()
    assert state == {"0:EarlyStopping": {"best": 0.5, "waited": 1}, "2:EarlyStopping": {"best": None, "waited": 0}}
    own = EarlyStopping()
    for other in ([own], [], [LambdaCallback(), own]):
        with pytest.raises(ArgumentError, match=r"^callbacks: .*0:EarlyStopping, 2:EarlyStopping.*same order"):
            Callbacks(other).load_state_dict(state)
    assert own.best is None
    # callbacks without a state may come and go behind those that have one
    fine = Callbacks([own, LambdaCallback(), EarlyStopping(), LambdaCallback()])
    fine.load_state_dict(state)
    assert own.best == 0.5 and own.waited == 1
