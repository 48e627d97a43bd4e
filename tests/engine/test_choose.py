"""``schedule="auto"``: what it decides, by a clock that the test winds; no time of this machine matters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fastlocal as fl
from fastlocal.engine import choose
from fastlocal.engine.choose import _GAIN, _SETTLING, _TIMED
from fastlocal.engine.rounds import WARM_UP
from tests.engine.schedules import Run, assert_same, data_of, local, sgd, tensors, train

TASK = 1e-3  # seconds that each task takes by the clock of the warm-up
COUNT = 14  # tasks of a step
STEP = COUNT * TASK


@pytest.fixture(autouse=True)
def _two_threads() -> Any:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


class Wound:
    """An engine whose steps take ``sequential``, or ``scheduled`` once a schedule runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, scheduled: float, sequential: float = STEP, **options: Any):
        self.model = options.pop("model", None) or local("dgl")
        self.run = fl.Engine(self.model, sgd, schedule="auto", workers=2, **options)
        self.sequential, self.scheduled, self.task = sequential, scheduled, TASK
        note = choose.Chooser.note

        def noted(own: Any, seconds: float, x: Any) -> None:
            rounds = self.run._rounds
            running = rounds is not None and rounds.schedule is not None
            note(own, self.scheduled if running else self.sequential, x)

        monkeypatch.setattr(choose.Chooser, "note", noted)
        start = choose.Rounds

        def started(*args: Any) -> Any:
            rounds, now = start(*args), [0.0]

            def tick() -> float:
                now[0] += self.task
                return now[0]

            rounds._now = tick  # type: ignore[method-assign]
            return rounds

        monkeypatch.setattr(choose, "Rounds", started)

    def steps(self, count: int, rows: int = 4) -> list[int | None]:
        return [self.run.step(*batch).step for batch in data_of("cnn", count, (rows,))]

    @property
    def choice(self) -> str | None:
        assert self.run._chooser is not None
        return self.run._chooser.choice

    @property
    def running(self) -> str:
        return "sequential" if self.run._rounds is None else self.run._rounds.kind


SEQUENTIAL = _SETTLING + _TIMED  # steps before another schedule is tried
TRIED = SEQUENTIAL + WARM_UP + 2 + _TIMED + 2  # and before it is decided, at most


def test_it_stays_sequential_where_the_plan_promises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    wound = Wound(monkeypatch, scheduled=STEP / 10)
    wound.task = STEP  # each task as long as a whole step
    assert "'auto' is still measuring" in wound.run.explain()
    wound.steps(SEQUENTIAL)
    assert wound.choice is None and wound.running == "overlap"
    wound.steps(WARM_UP)
    assert wound.choice == "sequential" == wound.running, "no round was run"
    text = wound.run.explain()
    assert (
        "schedule: sequential; 'auto' chose sequential: a round would take" in text
        and "ms by the costs of its tasks" in text
    )
    assert f"in sequence {STEP * 1e3:.1f}" in text


def test_it_stays_sequential_where_the_trial_is_no_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    wound = Wound(monkeypatch, scheduled=STEP * _GAIN * 1.01)
    assert wound.steps(TRIED) == [*range(TRIED)]
    assert wound.choice == "sequential" == wound.running
    assert "'auto' chose sequential: overlap took" in wound.run.explain()
    wound.scheduled = 0.0
    wound.steps(20)
    assert wound.running == "sequential", "the choice is made once"


@pytest.mark.parametrize(
    ("options", "kind"), [({}, "overlap"), ({"in_flight": 2}, "pipeline"), ({"in_flight": 1}, "overlap")]
)
def test_it_takes_what_is_faster(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], kind: str) -> None:
    wound = Wound(monkeypatch, scheduled=STEP * _GAIN * 0.99, **options)
    order = wound.steps(TRIED)
    assert wound.choice == kind == wound.running
    text = wound.run.explain()
    assert f"schedule: {kind}; 2 threads" in text and f"'auto' chose {kind}: 13.2 ms a step, in sequence 14.0" in text
    rest = [out.step for out in wound.run.flush()]
    assert [n for n in (*order, *rest) if n is not None] == [*range(TRIED)]
    assert (None in order) == (kind == "pipeline")


def test_outputs_that_wait_come_in_order_after_a_return_to_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    wound = Wound(monkeypatch, scheduled=STEP * 2, in_flight=2)
    order = wound.steps(TRIED + 3)
    assert wound.choice == "sequential" == wound.running and order.count(None) == 1
    assert order[-1] == TRIED + 1, "one step later, as those before"
    rest = [out.step for out in wound.run.flush()]
    assert [n for n in (*order, *rest) if n is not None] == [*range(TRIED + 3)]
    assert wound.steps(1) == [TRIED + 3]
    assert wound.model.in_flight is None


def test_a_batch_of_another_shape_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    wound = Wound(monkeypatch, scheduled=STEP / 2, in_flight=2)
    wound.steps(SEQUENTIAL - 1)
    wound.steps(_TIMED, rows=3)
    wound.steps(SEQUENTIAL - 2, rows=3)
    assert wound.running == "sequential" and wound.choice is None
    wound.steps(1 + WARM_UP + 2, rows=3)
    assert wound.running == "pipeline" and wound.choice is None
    wound.steps(_TIMED, rows=4)
    assert wound.running == "sequential" and wound.choice is None, "in the middle of the trial, too"
    wound.steps(TRIED, rows=4)
    assert wound.choice == "pipeline"
    wound.steps(3, rows=3)
    assert wound.choice == "pipeline", "once made, the choice stays"


@pytest.mark.parametrize("before", [0, SEQUENTIAL + 1, TRIED])
def test_accumulation_is_sequential_with_all_threads(monkeypatch: pytest.MonkeyPatch, before: int) -> None:
    wound = Wound(monkeypatch, scheduled=STEP / 2)
    wound.steps(before)
    assert wound.running == ("sequential" if not before else "overlap")
    threads: list[int] = []
    run_block = wound.run._finish
    monkeypatch.setattr(wound.run, "_finish", lambda *args: (threads.append(torch.get_num_threads()), run_block(*args)))
    for _ in range(TRIED):
        wound.run.accumulate(*data_of("cnn", 1, (4,))[0])
        wound.steps(1)
    assert wound.choice == "sequential" == wound.running and set(threads) == {2}
    assert "micro-batches are accumulated" in wound.run.explain()


def test_a_ragged_batch_is_not_timed_and_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    wound = Wound(monkeypatch, scheduled=STEP / 2)
    for _ in range(TRIED):  # epochs of two batches, the last one smaller
        wound.steps(1)
        wound.sequential = wound.scheduled = STEP * 100
        wound.steps(1, rows=3)
        wound.sequential, wound.scheduled = STEP, STEP / 2
    wound.steps(TRIED)
    assert wound.choice == "overlap"
    assert f"7.0 ms a step, in sequence {STEP * 1e3:.1f}" in wound.run.explain()


def test_the_numbers_are_those_of_the_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = local("man"), data_of("cnn", TRIED + 6, (4,))
    torch.set_num_threads(1)
    expected = train(fl.Engine(copy.deepcopy(model), sgd, schedule="sequential"), data)
    for scheduled in (STEP / 2, STEP * 2):
        with monkeypatch.context() as patch:
            torch.set_num_threads(2)
            wound = Wound(patch, scheduled=scheduled, model=copy.deepcopy(model), in_flight=3)
            patch.setattr(torch, "get_num_threads", lambda: 1)  # so that all steps compute with one
            torch.set_num_threads(1)
            assert_same(train(wound.run, data), expected)
            assert wound.choice == ("pipeline" if scheduled < STEP else "sequential")


def test_the_choice_is_saved_and_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    wound = Wound(monkeypatch, scheduled=STEP / 2, in_flight=2)
    wound.steps(5)
    assert wound.run.state_dict()["schedule"] is None
    early = copy.deepcopy((wound.model.state_dict(), wound.run.state_dict()))
    wound.steps(TRIED)
    assert wound.model.in_flight is wound.run
    state = wound.run.state_dict()
    assert state["schedule"] == "pipeline" and wound.model.in_flight is None
    saved = copy.deepcopy((wound.model.state_dict(), state))
    record = Run()
    for out in wound.run.flush():
        record.note(out)

    def resumed(saved: Any, **options: Any) -> fl.Engine:
        model = local("dgl")
        model.load_state_dict(saved[0])
        run = fl.Engine(model, sgd, schedule="auto", workers=2, **options)
        run.load_state_dict(saved[1])
        return run

    again = resumed(saved, in_flight=2)
    assert "'auto' chose pipeline: as in the run that was resumed" in again.explain()
    assert resumed(saved)._chooser.choice == "overlap", "which this run allows"  # type: ignore[union-attr]
    open_still = resumed(early, in_flight=2)
    assert open_still._chooser.choice is None and open_still._rounds is None  # type: ignore[union-attr]
    data = data_of("cnn", 6, (4,))
    for run in (again, wound.run):
        for batch in data:
            run.step(*batch)
    one, two = tensors(again), tensors(wound.run)
    assert [key for key in one if not torch.equal(one[key], two[key])] == []
    with monkeypatch.context() as patch:
        slow = Wound(patch, scheduled=STEP * 2)
        slow.steps(TRIED)
        saved = copy.deepcopy((slow.model.state_dict(), slow.run.state_dict()))
    assert saved[1]["schedule"] == "sequential"
    run = resumed(saved, in_flight=2)
    assert run._rounds is None and "chose sequential: as in the run that was resumed" in run.explain()


def test_a_budget_that_cannot_be_met_leaves_the_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    wound = Wound(monkeypatch, scheduled=STEP / 2, memory_budget=1000)
    assert wound.steps(TRIED) == [*range(TRIED)]
    assert wound.choice == "sequential"
    assert "chose sequential: memory_budget of 1000 bytes cannot be met" in wound.run.explain()


def test_an_accumulation_in_the_middle_of_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    wound = Wound(monkeypatch, scheduled=STEP / 2, in_flight=2)
    order = wound.steps(SEQUENTIAL + WARM_UP + 2)
    batch = data_of("cnn", 1, (4,))[0]
    wound.run.accumulate(*batch)
    order += wound.steps(TRIED)
    order += [out.step for out in wound.run.flush()]
    numbers = [n for n in order if n is not None]
    assert numbers == [*range(len(numbers))] and len(numbers) == SEQUENTIAL + WARM_UP + 2 + TRIED
    assert wound.choice == "sequential"


def test_where_there_is_nothing_to_choose() -> None:
    dropout = local("dgl", dropout=0.2)
    for options, model, why in (
        ({"deterministic": True}, None, "with deterministic=True nothing may depend on how fast a step was"),
        (
            {"update": "end"},
            None,
            "with update='end', graph='on' or compile= other schedules must be asked for by name",
        ),
        ({}, dropout, "blocks draw random numbers, which only the calling thread may do"),
        ({}, local("dsn"), "'dsn' has no gradient border"),
    ):
        run = fl.Engine(model or local("dgl"), sgd, **options)  # type: ignore[arg-type]
        assert run._chooser is None and run._rounds is None
        assert f"schedule: sequential; {why}" in run.explain()
    torch.set_num_threads(1)
    run = fl.Engine(local("dgl"), sgd)
    assert "schedule: sequential; PyTorch has one thread here" in run.explain()
    assert isinstance(run.model.backbone, nn.Module) and run.state_dict()["schedule"] is None
