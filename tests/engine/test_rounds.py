"""What happens to threads, buffers and gradients when a round fails; what a round leaves behind; memory and random numbers."""

from __future__ import annotations

import contextlib
import copy
import gc
import signal
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlocal as fl
from fastlocal.engine.cast import CastWeights
from fastlocal.engine.rounds import Rounds, ThreadLanes, _ranges
from fastlocal.errors import OutOfMemoryError
from tests.engine.schedules import Run, assert_same, data_of, engine, images, local, sgd, tensors, train


def rounds_of(run: fl.Engine) -> Rounds:
    assert run._rounds is not None
    return run._rounds


def workers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("fastlocal-")]


def ended(before: int) -> bool:
    """Whether the threads are gone, soon."""
    for _ in range(200):
        gc.collect()
        if len(workers()) <= before:
            return True
        time.sleep(0.01)
    return False


# --- failures ---------------------------------------------------------------------------------------------------------


class Planted:
    """Raises when it is called for the n-th time from now."""

    def __init__(self, error: BaseException):
        self.error, self.left = error, -1
        self.threads: set[str] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.threads.add(threading.current_thread().name)
        if self.left > 0:
            self.left -= 1
            if self.left == 0:
                raise self.error


def plant(run: fl.Engine, where: str, error: BaseException) -> Planted:
    """In block 1."""
    planted, block = Planted(error), run.model.blocks[1]
    if where == "forward":
        block.fns[-1].register_forward_hook(lambda *_: planted())  # type: ignore[index, union-attr]
    elif where == "head":
        block.head.register_forward_hook(lambda *_: planted())  # type: ignore[union-attr]
    elif where == "backward":
        # of BatchNorm, which has no copy in low precision
        norm = next(s for s in block.slots if isinstance(s.module, nn.BatchNorm2d))
        norm.value.register_hook(lambda g: planted())
    else:
        inner = run.optimizer.blocks[1]
        inner.register_step_pre_hook(lambda *_: planted())  # type: ignore[union-attr]
    return planted


ERRORS: dict[str, Callable[[], BaseException]] = {
    "RuntimeError": lambda: RuntimeError("planted"),
    "out of memory": lambda: torch.OutOfMemoryError("planted"),
    "KeyboardInterrupt": KeyboardInterrupt,
}


@pytest.mark.parametrize("where", ["forward", "head", "backward", "optimizer"])
@pytest.mark.parametrize("kind", ERRORS)
def test_a_failure_in_a_round(where: str, kind: str) -> None:
    """In any place and on any thread: it is raised with a note, nothing hangs or stays behind, and training goes on."""
    run = engine(local("man"), "pipeline", in_flight=3, workers=3, precision="bf16-mixed")
    planted, data = plant(run, where, ERRORS[kind]()), data_of("cnn", 12)
    guard, held = rounds_of(run)._guards[1], []
    begin = type(guard).begin

    def began(own: Any = guard) -> None:  # what block 1 held when it began the step that fails
        begin(own)
        held[:] = [b.clone() for b in run.model.blocks[1].all_buffers()]

    guard.begin = began  # type: ignore[method-assign]
    for batch in data[:6]:
        run.step(*batch)
    plan = rounds_of(run).schedule
    assert plan is not None and plan.plan.in_flight > 1
    expected = {"RuntimeError": RuntimeError, "out of memory": OutOfMemoryError, "KeyboardInterrupt": KeyboardInterrupt}
    counts = run.skipped.clone()
    planted.left = 1
    with pytest.raises(expected[kind]) as raised:
        run.step(*data[6])
    error = raised.value.__cause__ if kind == "out of memory" else raised.value
    assert isinstance(error, BaseException)
    (note,) = error.__notes__
    assert note.startswith("Steps in flight were dropped. step ") and note.endswith(
        "Training can go on with the next batch."
    )
    assert note.count("step ") == len([s for s in range(20) if f"step {s}:" in note]) > 1
    if kind == "out of memory":
        assert isinstance(raised.value, OutOfMemoryError) and raised.value.block == 1
        assert raised.value.phase == {"optimizer": "update"}.get(where, where)
    assert not rounds_of(run).busy and run.model.in_flight is None
    assert all(p.grad is None for p in run.model.parameters()), "gradients are freed"
    assert all(p.dtype == torch.float32 for p in run.model.parameters()), "low-precision copies are gone"
    assert isinstance(run._cast, CastWeights) and not run._cast._masters
    assert [torch.equal(a, b) for a, b in zip(run.model.blocks[1].all_buffers(), held, strict=True)] == [True] * len(
        held
    )
    assert torch.equal(run.skipped, counts)
    done, before = run.steps, len(run.flush())
    assert before <= 2
    outs = [run.step(*batch) for batch in data[7:]] + run.flush()
    assert [out.step for out in outs if out.step is not None] == [*range(done, done + 5)]
    assert all(out.losses.isfinite().all() for out in outs if out.step is not None)
    assert all(value.isfinite().all() for value in tensors(run).values())


def test_failures_on_worker_threads_and_on_the_calling_one() -> None:
    """Whoever runs the task: each thread's failure reaches the caller."""
    seen: set[str] = set()
    for attempt in range(12):
        run = engine(local("dgl"), "overlap", workers=3, seed=attempt)
        planted, data = plant(run, "head", RuntimeError("planted")), data_of("cnn", 4)
        for batch in data[:3]:
            run.step(*batch)
        planted.left, planted.threads = 1, set()
        with pytest.raises(RuntimeError, match="planted"):
            run.step(*data[3])
        seen |= {name.split("-")[0] for name in planted.threads}
        if seen == {"fastlocal", "MainThread"}:
            break
    assert "fastlocal" in seen or "MainThread" in seen
    assert run.step(*data[3]).step == 3


def test_a_failure_under_update_end_changes_nothing() -> None:
    run = engine(local("man"), "overlap", update="end")
    planted, data = plant(run, "backward", RuntimeError("planted")), data_of("cnn", 8)
    for batch in data[:4]:
        run.step(*batch)
    before = tensors(run)
    planted.left = 1
    with pytest.raises(RuntimeError, match="planted"):
        run.step(*data[4])
    after = tensors(run)
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    assert run.step(*data[5]).step == 4


def test_a_block_whose_update_failed_is_as_it_was() -> None:
    """Others may have been updated in that step, as tasks that do not depend on each other run in any order."""
    run = engine(local("dgl"), "overlap")
    planted, data = plant(run, "optimizer", RuntimeError("planted")), data_of("cnn", 6)
    for batch in data[:4]:
        run.step(*batch)
    before = tensors(run)
    planted.left = 1
    with pytest.raises(RuntimeError, match="planted") as raised:
        run.step(*data[4])
    assert not hasattr(raised.value, "__notes__"), "no other step was in flight"
    after = tensors(run)
    assert all(torch.equal(before[slot.name], after[slot.name]) for slot in run.model.blocks[1].slots)
    planted.error = torch.OutOfMemoryError("planted")
    planted.left = 1
    with pytest.raises(
        OutOfMemoryError, match=r"block 1 .*, update, at step 4; .*(No block was|Blocks [0-2, to]+ were) updated"
    ):
        run.step(*data[5])


def test_an_interrupt_while_the_caller_waits_for_a_worker() -> None:
    """Ctrl-C arrives in the calling thread, whatever it does; the workers end their task and no thread hangs."""
    go, slow = threading.Event(), threading.Event()
    model = local("dgl")
    run = engine(model, "overlap", workers=2)
    data = data_of("cnn", 8)

    def wait(*_: Any) -> None:
        if slow.is_set():
            go.set()
            time.sleep(0.2)

    for block in model.blocks:
        block.slots[0].module.register_forward_hook(wait)
    for batch in data[:3]:
        run.step(*batch)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for delay in (0.05, 0.1, 0.25, 0.3):
            go.clear()
            slow.set()
            signal.setitimer(signal.ITIMER_REAL, delay)
            with pytest.raises(KeyboardInterrupt):
                run.step(*data[3])
                time.sleep(1.0)
            slow.clear()
            assert all(p.grad is None for p in model.parameters())
            assert run.step(*data[4]).losses.isfinite().all()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_an_interrupt_that_takes_a_worker_s_result_with_it() -> None:
    """The message that a worker has ended may be lost to an interrupt; what counts is that it has ended."""

    class Interrupted:
        def __init__(self, inner: Any):
            self.inner, self.left = inner, 1

        def put(self, value: Any) -> None:
            self.inner.put(value)

        def get(self) -> Any:
            value = self.inner.get()
            if self.left:
                self.left -= 1
                raise KeyboardInterrupt
            return value

    run = engine(local("dgl"), "overlap", workers=2)
    data = data_of("cnn", 6)
    for batch in data[:3]:
        run.step(*batch)
    lanes = rounds_of(run)._lanes
    assert isinstance(lanes, ThreadLanes)
    lanes._results = Interrupted(lanes._results)  # type: ignore[assignment]
    # the worker puts into the queue that it was made with
    with pytest.raises(KeyboardInterrupt):
        for batch in data[3:]:
            run.step(*batch)
        raise AssertionError
    assert run.step(*data[5]).losses.isfinite().all()


def test_an_error_holds_no_activations_once_it_is_handled() -> None:
    run = engine(local("dgl"), "overlap", workers=2)
    planted, data = plant(run, "optimizer", RuntimeError("planted")), data_of("cnn", 5)
    for batch in data[:3]:
        run.step(*batch)
    gc.collect()
    gc.disable()
    try:
        x = data[3][0].clone()
        alive = weakref.ref(x)
        planted.left = 1
        with contextlib.suppress(RuntimeError):
            run.step(x, data[3][1])
        planted.error.__traceback__ = None  # held by this test
        planted.error.__dict__.clear()
        del x
        assert alive() is None
    finally:
        gc.enable()


# --- threads ----------------------------------------------------------------------------------------------------------


def test_threads_end_with_their_engine() -> None:
    before, data = len(workers()), data_of("cnn", 3)
    model = local("dgl")
    for _ in range(50):
        run = engine(model, "overlap", workers=3)
        for batch in data:
            run.step(*batch)
    assert len(workers()) >= 2
    del run
    assert ended(before)


def test_threads_of_the_caller_are_as_before() -> None:
    torch.set_num_threads(2)
    model, data = local("dgl"), data_of("cnn", 6)
    run = engine(copy.deepcopy(model), "pipeline", workers=2)
    seen: set[int] = set()
    handles = [
        b.slots[0].module.register_forward_hook(lambda *_: seen.add(torch.get_num_threads())) for b in run.model.blocks
    ]  # type: ignore[index, union-attr]
    for batch in data:
        run.step(*batch)
        assert torch.get_num_threads() == 2
    run.accumulate(*data[0])
    run.flush()
    assert seen == {1} and torch.get_num_threads() == 2 and len(handles) == 3
    single = engine(copy.deepcopy(model), "sequential")
    torch.set_num_threads(1)
    expected = train(single, data)
    torch.set_num_threads(2)
    assert_same(train(engine(copy.deepcopy(model), "pipeline", workers=2), data), expected)


def test_large_maps_in_worker_threads() -> None:
    """Operators that open threads of their own (the native one of BatchNorm and ReLU, convolutions) inside workers."""
    torch.set_num_threads(4)  # two in each worker
    try:
        model = fl.localize(
            fl.models.ResNetCIFAR(1, width=8, num_classes=5), "dgl", blocks=3, sample=torch.randn(2, 3, 32, 32)
        )
        data = images(4, 32, (4,))
        torch.set_num_threads(2)
        expected = train(engine(copy.deepcopy(model), "sequential"), data)
        torch.set_num_threads(4)
        assert_same(train(engine(copy.deepcopy(model), "pipeline", workers=2), data), expected)
    finally:
        torch.set_num_threads(1)


def test_grad_mode_of_the_caller_reaches_the_workers() -> None:
    """Under no_grad nothing has a gradient, on any thread; a step is then an error or changes nothing, as in sequence."""
    data, model = data_of("cnn", 6), local("dgl")
    runs = []
    for name in ("sequential", "overlap"):
        run = engine(copy.deepcopy(model), name, workers=2)
        for batch in data[:3]:
            run.step(*batch)
        with torch.no_grad():
            losses = run.step(*data[3]).losses
        runs.append((losses, tensors(run)))
    (a, one), (b, two) = runs
    assert torch.equal(a, b)
    assert [key for key in one if not torch.equal(one[key], two[key])] == []


def test_tasks_run_on_several_threads() -> None:
    model = local("dgl")
    run = engine(model, "overlap", workers=2)
    seen: set[str] = set()
    barrier = threading.Barrier(2)

    def meet(*_: Any) -> None:
        name = threading.current_thread().name
        if name not in seen:
            seen.add(name)
            try:
                barrier.wait(30.0)  # two tasks at once, or the test fails
            except threading.BrokenBarrierError:
                seen.add("alone")

    data = data_of("cnn", 4)
    for batch in data[:2]:
        run.step(*batch)
    model.blocks[1].fns[0].register_forward_hook(meet)  # type: ignore[index, union-attr]
    model.blocks[0].head.register_forward_hook(meet)  # type: ignore[union-attr]
    run.step(*data[2])
    assert len(seen) == 2 and "alone" not in seen and any(name.startswith("fastlocal-") for name in seen)


class Shared(nn.Module):
    """A unit that reads the model's state inside a step, as a callback of a user might."""

    def __init__(self, width: int, first: bool):
        super().__init__()
        self.conv = nn.Conv2d(3 if first else width, width, 3, padding=1)
        self.ask: Callable[[], Any] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.ask is not None:
            self.ask()
        return self.conv(x).relu()


def test_reading_the_model_inside_a_round_starts_no_other() -> None:
    net = nn.Sequential(*(Shared(4, k == 0) for k in range(3)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    model = fl.localize(net, "dgl", blocks=["0", "1", "2"], sample=torch.randn(2, 3, 8, 8))
    data = images(8, 8)
    expected = train(engine(copy.deepcopy(model), "sequential"), data)
    run = engine(model, "pipeline", workers=2)
    net[1].ask = lambda: model.backbone_state_dict()  # type: ignore[union-attr]
    assert_same(train(run, data), expected)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_a_round_leaves_nothing_but_the_steps_in_flight() -> None:
    run = engine(local("hpff"), "pipeline", in_flight=2, workers=2)
    seen: list[weakref.ref[Tensor]] = []
    data = data_of("cnn", 8)
    for x, y in data:
        own = x.clone()
        seen.append(weakref.ref(own))
        run.step(own, y)
    del own
    rounds = rounds_of(run)
    assert rounds.schedule is not None and rounds.schedule.plan.in_flight == 2
    assert [ref() is not None for ref in seen] == [False] * 7 + [True]
    assert [flight.step for flight in rounds._flights.values()] == [7]
    run.flush()
    assert seen[-1]() is None and not rounds._flights


def test_a_budget_is_kept_by_threads() -> None:
    """However tasks are taken, no more is alive than the plan counted."""
    model = local("dgl")
    for budget in (60_000, 10_000_000):
        run = engine(copy.deepcopy(model), "overlap", workers=3, memory_budget=budget)
        for batch in data_of("cnn", 3):
            run.step(*batch)
        schedule = rounds_of(run).schedule
        assert schedule is not None and schedule.budgeted and schedule.plan.peak_bytes <= budget
        after, _ = schedule.within_a_round()
        lanes: dict[int, int] = {}
        for i in schedule.plan.order:
            stream = schedule.plan.stream[i]
            if stream in lanes:
                assert i in after[lanes[stream]]
            lanes[stream] = i


def test_words() -> None:
    assert _ranges({0, 1, 2, 5, 7, 8}) == "0-2, 5, 7-8"
    assert _ranges({3}) == "3"


def test_outputs_are_those_of_their_step() -> None:
    """Rates of zero from step 5 on: then the losses of one batch stay as they are, whichever step is returned."""
    model, batch = local("dgl"), data_of("cnn", 1)[0]
    run = fl.Engine(model, sgd, schedule="pipeline", in_flight=3, workers=3)
    record = Run()
    for i in range(12):
        if i == 5:
            for group in run.optimizer.param_groups:
                group["lr"] = 0.0
        record.note(run.step(*batch))
    for out in run.flush():
        record.note(out)
    assert sorted(record.losses) == [*range(12)]
    assert len({tuple(record.losses[i].tolist()) for i in range(6)}) == 6
    assert all(torch.equal(record.losses[i], record.losses[5]) for i in range(6, 12))
