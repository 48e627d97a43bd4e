"""The tasks of a step and their dependencies: any order that keeps them gives the numbers of the steps in sequence."""

from __future__ import annotations

import copy
from typing import Any

import pytest

import fastlocal as fl
from fastlocal.engine.flight import Flight
from fastlocal.engine.schedule import make_schedule
from fastlocal.engine.tasks import StepTasks, Task, compile_step, sequence
from fastlocal.errors import ArgumentError, NonFiniteError
from tests.engine.schedules import assert_same, data_of, engine, in_any_order, local, train

FORMS = {  # method, net, mode, precision: each compiles to other tasks or dependencies
    "dgl": ("dgl", "cnn", "paper", "32-true"),
    "bf16": ("auglocal", "cnn", "paper", "bf16-mixed"),
    "fp16": ("predsim", "cnn", "paper", "16-mixed"),
    "bank": ("glcan", "cnn", "paper", "32-true"),
    "teacher": ("lakd", "cnn", "paper", "32-true"),
    "window": ("hpff", "cnn", "paper", "bf16-mixed"),
    "official window": ("hpff", "cnn", "official", "32-true"),
    "window and links": ("mlaan", "cnn", "paper", "32-true"),
    "official window and links": ("mlaan", "cnn", "official", "32-true"),
    "links": ("man", "cnn", "paper", "bf16-mixed"),
    "official links": ("man", "cnn", "official", "32-true"),
    "links in the backward": ("man_plus_plus", "cnn", "official", "bf16-mixed"),
    "boundary": ("lopt", "gpt", "paper", "bf16-mixed"),
    "shared readout": ("solo", "gpt", "paper", "32-true"),
    "tokens": ("feature_reconstruction", "vit", "paper", "bf16-mixed"),
}


def edges(step: StepTasks) -> set[tuple[str, str, int]]:
    return {(step.tasks[u].name, step.tasks[v].name, distance) for u, v, distance in step.edges}


def names(tasks: list[Task]) -> list[str]:
    return [task.name for task in tasks]


@pytest.mark.parametrize("form", FORMS)
def test_any_order_that_keeps_the_dependencies_gives_the_same_bits(form: str) -> None:
    method, net, mode, precision = FORMS[form]
    model, data = local(method, net, 0.2, mode), data_of(net, 6)
    expected = train(engine(copy.deepcopy(model), "sequential", precision=precision), data)
    for seed in range(2):
        run = engine(copy.deepcopy(model), "pipeline", precision=precision)
        assert_same(in_any_order(run, data, seed), expected)
    assert len(set(expected.losses)) == 6 and any(block.random for block in model.blocks)


@pytest.mark.parametrize("form", ["dgl", "window and links", "links"])
def test_the_orders_differ(form: str) -> None:
    """So the test above compares what it says: without those on the step before, steps give other numbers or fail."""
    method, net, mode, precision = FORMS[form]
    model, data = local(method, net, 0.2, mode), data_of(net, 6)
    expected = train(engine(copy.deepcopy(model), "sequential", precision=precision), data)
    wrong = 0
    for seed in range(4):
        run = engine(copy.deepcopy(model), "pipeline", precision=precision)
        assert run._rounds is not None
        step = run._rounds._step
        run._rounds._step = StepTasks(step.tasks, [e for e in step.edges if e[2] == 0])
        try:
            assert_same(in_any_order(run, data, seed), expected)
        except (AssertionError, IndexError, KeyError, RuntimeError, NonFiniteError):
            wrong += 1
    assert wrong > 0


def test_the_tasks_of_a_step_in_sequence() -> None:
    tail = ["forward 2", "head 2", "backward 2", "update 2", "free 1"]
    first = ["forward 0", "head 0", "backward 0", "update 0", "forward 1", "head 1", "backward 1", "update 1", "free 0"]
    assert names(sequence(local("dgl"))) == [*first, *tail]
    assert names(sequence(local("dgl"), "end")) == [*first, *tail, "update"]
    links = names(sequence(local("man")))
    assert links.index("link 0") == links.index("backward 0") + 1 == links.index("update 0") - 1
    window = names(sequence(local("hpff")))  # of two blocks: a backward waits for the next block's loss
    assert window.index("head 1") < window.index("backward 0") < window.index("update 0") < window.index("forward 2")
    assert names(sequence(local("solo", "gpt")))[0] == "link 0"


def test_dependencies_of_isolated_blocks() -> None:
    step = compile_step(local("dgl"))
    found = edges(step)
    for k in range(3):
        assert {
            (f"forward {k}", f"head {k}", 0), (f"head {k}", f"backward {k}", 0), (f"backward {k}", f"update {k}", 0),
            (f"update {k}", f"forward {k}", 1),
        } <= found  # fmt: skip
    assert ("forward 0", "forward 1", 0) in found and ("forward 1", "forward 2", 0) in found
    assert not any(v.split()[0] == "forward" and u.split()[0] != "forward" and u[-1] != v[-1] for u, v, _ in found), (
        "a block's head, backward and update hold up no other block's forward"
    )
    assert not any(d == 1 and u[-1] != v[-1] for u, v, d in found), "blocks are at steps of their own"


def test_an_operator_in_place_makes_a_forward_wait_for_the_other_readers_of_its_input() -> None:
    model = local("dgl")
    more = edges(compile_step(model, writes_input={1})) - edges(compile_step(model))
    assert {("head 0", "forward 1", 0), ("backward 0", "forward 1", 0)} <= more


def test_averages_wait_for_the_blocks_that_they_follow() -> None:
    found = edges(compile_step(local("man")))
    assert ("link 0", "update 1", 0) in found, "the average sees the next block before this step's update"
    assert ("update 1", "link 0", 1) in found and ("link 0", "head 0", 1) in found
    casts = edges(compile_step(local("man"), casts=True))
    assert ("link 0", "forward 1", 0) in casts and ("link 0", "forward 1", 0) not in found
    assert ("link 1", "link 0", 1) in casts and ("link 1", "link 0", 1) not in found, "which waits for backward 1"


def test_the_update_of_all_blocks_is_the_last_task() -> None:
    step = compile_step(local("dgl"), "end")
    last = len(step.tasks) - 1
    assert {u for u, v, d in step.edges if v == last and d == 0} >= {
        names(step.tasks).index(f"update {k}") for k in range(3)
    }
    assert {v for u, v, d in step.edges if u == last and d == 1} >= {
        names(step.tasks).index(f"forward {k}") for k in range(3)
    }


# Shortest round on four workers with tasks of length 1: what the dependencies allow. In sequence it is the number of tasks.
PERIODS = {
    ("dgl", "cnn"): (14, 6.0, 4.0),  # the cycle of a block: forward, head, backward, update
    ("glcan", "cnn"): (14, 6.0, 4.0),
    ("lopt", "gpt"): (14, 6.0, 4.0),
    ("man", "cnn"): (16, 6.0, 4.0),
    ("hpff", "cnn"): (14, 7.0, 6.0),
    ("mlaan", "cnn"): (15, 7.0, 6.0),
    ("solo", "gpt"): (15, 6.0, 6.0),  # all heads read what the last block's update has written
}


@pytest.mark.parametrize(("method", "net"), PERIODS)
def test_no_dependency_is_there_for_nothing(method: str, net: str) -> None:
    step = compile_step(local(method, net))
    cost = [1.0] * len(step.tasks)
    overlap, pipeline = (
        make_schedule(kind, step, cost, streams=4, in_flight=3).plan for kind in ("overlap", "pipeline")
    )
    tasks, best, across = PERIODS[method, net]
    assert len(step.tasks) == tasks and overlap.period <= best and pipeline.period <= across
    assert overlap.in_flight == 1 and pipeline.in_flight == (2 if across < best else 1)


def test_a_budget_keeps_to_the_order_that_it_was_counted_in() -> None:
    step = compile_step(local("dgl"))
    cost = [1.0] * len(step.tasks)
    made = [8 if task.kind == "forward" else 0 for task in step.tasks]
    freed = [8 if task.kind == "update" else 0 for task in step.tasks]
    free = make_schedule("overlap", step, cost, bytes_made=made, bytes_freed=freed)
    tight = make_schedule("overlap", step, cost, bytes_made=made, bytes_freed=freed, memory_budget=8)
    assert free.plan.peak_bytes > tight.plan.peak_bytes == 8
    before = names(step.tasks).index("update 0"), names(step.tasks).index("forward 1")
    waits = {(u, v) for u, after in enumerate(tight.within_a_round()[0]) for v in after}
    reached, queue = set(), [before[0]]
    while queue:
        u = queue.pop()
        reached |= (more := {v for a, v in waits if a == u} - reached)
        queue += more
    assert before[1] in reached, "block 1 begins when block 0 has freed what it held"
    with pytest.raises(ArgumentError, match="memory_budget of 7 bytes"):
        make_schedule("overlap", step, cost, bytes_made=made, bytes_freed=freed, memory_budget=7)


@pytest.mark.parametrize(("method", "net"), [("lopt", "gpt"), ("hpff", "cnn")])
def test_a_step_in_sequence_frees_boundaries_as_it_goes(method: str, net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a method whose heads read their block's input, or whose losses reach over several blocks."""
    held: list[int] = []
    hand_off = fl.Engine._hand_off

    def counted(run: fl.Engine, flight: Flight, *args: Any) -> Any:
        after = hand_off(run, flight, *args)
        held.append(sum(k > 0 for k in flight.inputs))
        return after

    monkeypatch.setattr(fl.Engine, "_hand_off", counted)
    model = local(method, net, blocks=4)
    engine(model, "sequential").step(*data_of(net, 1)[0])
    assert len(held) == len(model.blocks) - 1 >= 2 and max(held) == 2
