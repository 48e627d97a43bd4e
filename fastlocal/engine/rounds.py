"""`Rounds`: runs the steps of an engine by a schedule, blocks side by side and steps in flight.

One call of ``engine.step`` is one round: a new step is admitted, every task of a round runs once, each on the step that
its stage says, and the oldest step is complete. All is done when the round ends, so nothing runs between two calls. On
a CPU the streams of a schedule are threads, on a CUDA device they are streams.
"""

from __future__ import annotations

import contextvars
import heapq
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastlocal.engine import schedule as schedules
from fastlocal.engine.flight import Flight
from fastlocal.engine.memory import is_out_of_memory, out_of_memory
from fastlocal.engine.schedule import StepSchedule, best_schedule
from fastlocal.engine.tasks import Task, compile_step
from fastlocal.errors import ArgumentError, BackendError

if TYPE_CHECKING:
    from fastlocal.engine.engine import Engine

WARM_UP = 2  # steps in sequence, before a schedule is made: the second is timed, task by task


class Rounds:
    """The steps in flight, and the lanes in which their tasks run.

    Args:
        engine: complete but for this.
        kind: ``"overlap"`` or ``"pipeline"``.
        workers: tasks that may run at once.
        in_flight: the most steps on their way at once.
        memory_budget: bytes for a step's tasks; None for no limit.

    Attributes:
        schedule: None until the costs of the tasks are known.
    """

    def __init__(self, engine: Engine, kind: str, workers: int, in_flight: int, memory_budget: int | None):
        self._engine = engine
        self.kind, self.workers, self.in_flight, self.memory_budget = kind, workers, in_flight, memory_budget
        model = engine.model
        if engine._cast:
            engine._cast.let_live(len(model.blocks))  # any block may run beside any other
        self._guards = [engine._guard.alone(block.index, block) for block in model.blocks]
        owners = [[slot.module for slot in block.buffer_slots()] for block in model.blocks]
        self._passes = [model.passes.of(modules) for modules in owners]
        self._writes_input: set[int] = set()
        self._owned: list[set[str]] = [set() for _ in model.blocks]  # options that a block's optimizer writes
        self._step = compile_step(model, engine.update, casts=engine._cast is not None)
        self._warm = 0
        self._cost = [0.0] * len(self._step.tasks)
        self.schedule: StepSchedule | None = None
        self.refused = ""  # why there is no schedule
        self._flights: dict[int, Flight] = {}  # by stage
        self._next = 0  # number of the next step
        random = any(task.random for task in self._step.tasks)
        self.threads = 1 if random or engine.compile is not None else workers
        self._why_one = "blocks draw random numbers" if random else "units are compiled"
        self._intra_op = max(1, torch.get_num_threads() // workers)
        self._lanes: Lanes | None = None

    # --- what the engine calls ---------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether steps are in flight."""
        return bool(self._flights)

    def step(self, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> None:
        """Admits a step and runs a round. The engine gets what is complete then."""
        engine = self._engine
        if self.refused:
            raise ArgumentError(self.refused)
        if not self._flights:
            self._next = engine.steps
        if self.in_flight > 1 and _step_hooks(engine):
            if engine._chooser is not None:
                engine._chooser.overlap_only().step(args, kwargs, target)
                return
            raise BackendError(
                "schedule: 'pipeline' has no moment at which every block is at the same step, but hooks are registered on the "
                "steps of engine.optimizer; remove them, or use schedule='overlap'"
            )
        flight = self._admit((args, kwargs, target))
        if self.schedule is None:
            with self.threads_of_a_worker():
                self._warm_up(flight)
            if self._warm == WARM_UP:
                try:
                    self._make_schedule(args, target)
                except ArgumentError as error:  # a budget that cannot be met
                    self.refused = str(error)  # this step is complete: the next one says it
        else:
            self._round(flight)

    def drain(self) -> None:
        """Completes the steps in flight."""
        while self._flights:
            self._round(None)

    @contextmanager
    def threads_of_a_worker(self) -> Iterator[None]:
        """Inside, an operator has as many threads as in a worker: sums depend on their number in the last bits."""
        before = torch.get_num_threads()
        if self._engine.device.type != "cpu" or before == self._intra_op:
            yield
            return
        torch.set_num_threads(self._intra_op)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def explain(self) -> str:
        """The schedule in words."""
        if self.schedule is None:
            return f"schedule: {self.kind}; the first {WARM_UP} steps are sequential, to learn what tasks cost"
        plan = self.schedule.plan
        lanes = "stream" if self._engine.device.type == "cuda" else "thread"
        count = max(plan.stream) + 1
        text = f"schedule: {self.kind}; {count} {lanes}{_s(count)}, {plan.in_flight} step{_s(plan.in_flight)} in flight"
        if lanes == "thread":
            text += f", {self._intra_op} thread{_s(self._intra_op)} in an operator"
            if self.threads < self.workers:
                text += f"; all on the calling thread, because {self._why_one}"
        return f"{text}; a round is {plan.period * 1e3:.2f} ms by the costs of its tasks, {sum(self.schedule.cost) * 1e3:.2f} in sequence"

    # --- steps -------------------------------------------------------------------------------------------------------

    def _admit(self, call: tuple[Any, ...]) -> Flight:
        engine, model = self._engine, self._engine.model
        ctx = model.context(*call, fires=False)
        flight = Flight.of(model, self._next, call, ctx, updates=True)
        if self.in_flight > 1:  # rates change between steps; a block has those of the step it is at
            flight.options = [
                [] if inner is None else [_fixed(group) for group in inner.param_groups]
                for inner in engine.optimizer.blocks
            ]
        self._next += 1
        return flight

    def _warm_up(self, flight: Flight) -> None:
        """A step in sequence, task by task."""
        tasks = self._step.tasks
        flights = {0: flight}
        with self._in_a_round(flights):
            for i, task in enumerate(tasks):
                begin = self._now()
                versions = _version(flight, task)
                self._do(flight, task)
                if versions is not None and versions[0]._version != versions[1]:
                    self._writes_input.add(task.block)
                self._cost[i] = self._now() - begin
        self._warm += 1
        self._engine._completed(flight.output())

    def _now(self) -> float:
        if self._engine.device.type == "cuda":
            torch.cuda.synchronize(self._engine.device)  # twice a task, in the warm-up only
        return time.perf_counter()

    def _make_schedule(self, args: tuple[Any, ...], target: Any) -> None:
        engine, model = self._engine, self._engine.model
        if self._writes_input:
            self._step = compile_step(
                model, engine.update, casts=engine._cast is not None, writes_input=self._writes_input
            )
        tensors = [t for t in pytree.tree_leaves((args, target)) if isinstance(t, Tensor)]
        made, freed = schedules.byte_counts(
            model,
            self._step.tasks,
            tensors[0].shape[0],
            sum(t.numel() * t.element_size() for t in tensors),
            4 if engine._dtype is None else engine._dtype.itemsize,
        )
        self.schedule = best_schedule(
            self.kind, self._step, self._cost, host=engine.device.type == "cpu", bytes_made=made, bytes_freed=freed,
            streams=self.workers, in_flight=self.in_flight, memory_budget=self.memory_budget,
        )  # fmt: skip
        if engine.device.type == "cuda":
            self._lanes = StreamLanes(engine.device, self.schedule.streams)
        elif self.threads > 1:
            self._lanes = ThreadLanes(self.schedule.streams, self._intra_op)

    def _round(self, new: Flight | None) -> None:
        """Runs every task once, on the step that its stage says; tasks without one only keep the others' order."""
        engine, schedule = self._engine, self.schedule
        assert schedule is not None
        plan, tasks = schedule.plan, schedule.tasks
        flights = {stage + 1: flight for stage, flight in self._flights.items()}
        if new is not None:
            flights[0] = new
        jobs: list[Callable[[], None] | None] = [None] * len(tasks)
        for i, task in enumerate(tasks):
            flight = flights.get(plan.stage[i])
            if flight is not None:
                jobs[i] = _job(self._do, flight, task)
        self._flights = {}  # what a task of the round calls must not start another one
        with self.threads_of_a_worker(), self._in_a_round(flights):
            if self._lanes is None or _is_watched():
                for i in plan.order:
                    job = jobs[i]
                    if job is not None:
                        job()
            else:
                self._lanes.run(schedule, jobs)
        oldest = flights.pop(plan.in_flight - 1, None)
        self._flights = flights
        if oldest is not None:
            engine._completed(oldest.output())

    @contextmanager
    def _in_a_round(self, flights: dict[int, Flight]) -> Iterator[None]:
        engine = self._engine
        together = engine.update == "end"
        if together:
            engine._guard.begin()
            engine._streams_before = None if engine._streams is None else list(engine._streams)
        try:
            with engine.model.passes.applied():
                yield
            if together:
                engine.model.passes.count()
                engine._guard.end(flights[0].step)
        except BaseException as error:
            self._abandon(error, list(flights.values()))
            if is_out_of_memory(error) and isinstance(getattr(error, "_fastlocal_task", None), Failed):
                failed: Failed = error._fastlocal_task  # type: ignore[attr-defined]
                raise out_of_memory(
                    error, engine.model, max(failed.task.block, 0), failed.task.kind, failed.flight.step, engine.device,
                    () if together else failed.flight.updated,
                ) from error  # fmt: skip
            raise

    def _abandon(self, error: BaseException, flights: list[Flight]) -> None:
        """After an exception: steps in flight are dropped; blocks that had begun one of them get their buffers back."""
        engine = self._engine
        if engine._cast:
            engine._cast.leave()
        if engine.update == "end":
            engine._guard.end(engine.steps, undo=range(len(engine.model.blocks)))
            engine._streams = engine._streams_before
        else:
            for flight in flights:
                for k in flight.running:
                    self._guards[k].end(flight.step, undo=(0,))
        engine._free_gradients()
        if len(flights) > 1 or self.in_flight > 1:
            lines = [
                f"step {f.step}: "
                + (f"blocks {_ranges(f.updated)} had been updated" if f.updated else "no block had been updated")
                for f in sorted(flights, key=lambda f: f.step)
            ]
            error.add_note(
                "Steps in flight were dropped. " + "; ".join(lines) + ". Training can go on with the next batch."
            )

    # --- one task ----------------------------------------------------------------------------------------------------

    def _do(self, flight: Flight, task: Task) -> None:
        try:
            self._run(flight, task)
        except BaseException as error:
            if not hasattr(error, "_fastlocal_task"):
                error._fastlocal_task = Failed(flight, task)  # type: ignore[attr-defined]
            raise

    def _run(self, flight: Flight, task: Task) -> None:
        engine, k, kind = self._engine, task.block, task.kind
        if kind in ("link", "free") or k < 0:
            engine._do(flight, task, inside=False)
            return
        alone = engine.update != "end"
        own_stream = task.random and engine._streams is not None
        if own_stream:
            engine._resume_stream(k)
        if kind == "forward":
            if alone:
                self._guards[k].begin()
            flight.running.add(k)
            engine._open(k)
            x = flight.inputs.get(k)
            if isinstance(x, Tensor) and x.is_cuda:  # made on another stream, and dropped there while this one reads it
                x.record_stream(torch.cuda.current_stream(x.device))
            known = k in self._writes_input
            before = None if known else _version(flight, task)
            engine._do(flight, task, inside=False)
            if self.schedule is not None and before is not None and before[0]._version != before[1]:
                raise BackendError(
                    f"schedule: block {k} ('{engine.model.blocks[k].name}') changed its input in place in this step and not in the "
                    f"first {WARM_UP}, while others may read it; make its first operator not in place, or use schedule='sequential'"
                )
        else:
            with _options_of(engine, flight, k, self._owned[k]) if kind == "update" else nullcontext():
                engine._do(flight, task, inside=False)
        if kind == "update":
            if alone:
                self._passes[k].count()
                self._guards[k].end(flight.step)
                if self.in_flight > 1:
                    flight.skipped[k] = self._guards[k].skipped.clone()
            flight.running.discard(k)
            flight.updated.add(k)
        if own_stream:
            engine._leave(k)


class Failed:
    """Which task of which step raised."""

    def __init__(self, flight: Flight, task: Task):
        self.flight, self.task = flight, task


def _job(do: Callable[[Flight, Task], None], flight: Flight, task: Task) -> Callable[[], None]:
    return lambda: do(flight, task)


def _version(flight: Flight, task: Task) -> tuple[Tensor, int] | None:
    """The input of a forward behind block 0, and its version."""
    x = flight.inputs.get(task.block) if task.kind == "forward" and task.block > 0 else None
    return None if x is None or x.is_inference() else (x, x._version)


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _fixed(group: dict[str, Any]) -> dict[str, Any]:
    """The options as they are now, also of a rate that is a tensor, which schedules fill anew."""
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in _options(group).items()}


@contextmanager
def _options_of(engine: Engine, flight: Flight, k: int, owned: set[str]) -> Iterator[None]:
    """Inside, the groups of block k say what they said when the step began.

    ``owned``: what the optimizer itself writes there, such as counts, is never taken back.
    """
    inner = engine.optimizer.blocks[k]
    if flight.options is None or inner is None:
        yield
        return
    groups = inner.param_groups
    thens = [{key: v for key, v in then.items() if key not in owned} for then in flight.options[k]]
    nows = [{key: group[key] for key in then if key in group} for group, then in zip(groups, thens)]
    for group, then in zip(groups, thens):
        group.update(then)
    try:
        yield
    finally:
        for group, then, now in zip(groups, thens, nows):
            owned |= {key for key, value in then.items() if group.get(key) is not value}
            group.update({key: value for key, value in now.items() if key not in owned})


def _step_hooks(engine: Engine) -> bool:
    optimizer = engine.optimizer
    return bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)


def _is_watched() -> bool:
    """Whether something changes or looks at the operators of the calling thread alone (a counter, saved-tensor hooks, a
    caller's autocast): then all run there."""
    return bool(
        torch.is_autocast_enabled("cpu")
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._autograd._top_saved_tensors_default_hooks(True)
    )


def _s(count: int) -> str:
    return "s" * (count != 1)


def _ranges(numbers: set[int]) -> str:
    """``{0, 1, 2, 5}`` as ``0-2, 5``."""
    parts: list[list[int]] = []
    for n in sorted(numbers):
        if parts and parts[-1][1] == n - 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


# --- lanes ------------------------------------------------------------------------------------------------------------


class Lanes(Protocol):
    """Runs the jobs of a round; returns when all are done, or raises what one raised."""

    def run(self, schedule: StepSchedule, jobs: list[Callable[[], None] | None]) -> None: ...


class ThreadLanes:
    """The calling thread and others take tasks as they become ready, in the order of the schedule.

    A task is not held to the stream it was planned for: costs differ from step to step, and no thread idles while
    another has something left to do.
    """

    def __init__(self, count: int, intra_op: int):
        self._queues: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue() for _ in range(count - 1)]
        self._results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for i, own in enumerate(self._queues):
            thread = threading.Thread(
                target=_work, args=(own, self._results, intra_op), name=f"fastlocal-{i + 1}", daemon=True
            )
            thread.start()
        weakref.finalize(self, _stop, self._queues)

    def run(self, schedule: StepSchedule, jobs: list[Callable[[], None] | None]) -> None:
        shared = _Shared(schedule, jobs)
        grad = torch.is_grad_enabled()
        work = [(contextvars.copy_context(), grad, shared) for _ in self._queues]
        sent: list[None] = []  # grows with each that was sent, wherever an interrupt comes
        try:
            sent.extend(map(queue.SimpleQueue.put, self._queues, work))
            shared.work()
        except BaseException as error:
            shared.fail(error)
        while True:
            try:
                while shared.ended < len(sent):  # not by what was taken from the queue: an interrupt may lose that
                    self._results.get()
                break
            except BaseException as error:  # an interrupt: the others finish their task first
                shared.fail(error)
        # no cycle may stay: the error's traceback holds the activations of the round
        failure, shared.failure = shared.failure, None
        if failure is not None:
            try:
                raise failure
            finally:
                del failure


class _Shared:
    """The tasks of one round, taken by whoever is free."""

    def __init__(self, schedule: StepSchedule, jobs: list[Callable[[], None] | None]):
        self._jobs, plan = jobs, schedule.plan
        self._after, self._open = schedule.within_a_round()
        self._rank = [0] * len(jobs)
        for rank, i in enumerate(plan.order):
            self._rank[i] = rank
        self._order = plan.order
        self._ready = [self._rank[i] for i, count in enumerate(self._open) if count == 0]
        heapq.heapify(self._ready)
        self._left = len(jobs)
        self._change = threading.Condition()
        self.failure: BaseException | None = None
        self.ended = 0  # threads, but for the calling one

    def work(self) -> None:
        done: int | None = None
        while True:
            with self._change:
                if done is not None:
                    self._release(done)
                while not self._ready and self._left and self.failure is None:
                    self._change.wait()
                if not self._left or self.failure is not None:
                    return
                done = self._order[heapq.heappop(self._ready)]
            job = self._jobs[done]
            if job is not None:
                try:
                    job()
                except BaseException as error:
                    self.fail(error)
                    return

    def end(self) -> None:
        with self._change:
            self.ended += 1

    def fail(self, error: BaseException) -> None:
        with self._change:
            self.failure = self.failure or error
            self._change.notify_all()

    def _release(self, done: int) -> None:
        self._left -= 1
        found = 0
        for v in self._after[done]:
            self._open[v] -= 1
            if self._open[v] == 0:
                heapq.heappush(self._ready, self._rank[v])
                found += 1
        if not self._left:
            self._change.notify_all()
        elif found > 1:  # one of them is for the thread that is here
            self._change.notify(found - 1)


def _work(jobs: queue.SimpleQueue[Any], results: queue.SimpleQueue[Any], intra_op: int) -> None:
    torch.set_num_threads(intra_op)
    while True:
        job = jobs.get()
        if job is None:
            return
        context, grad, shared = job
        try:
            with torch.set_grad_enabled(grad):
                context.run(shared.work)
        except BaseException as error:
            shared.fail(error)
        shared.end()
        del context, shared, job
        results.put(None)


def _stop(queues: list[queue.SimpleQueue[Any]]) -> None:
    for own in queues:
        own.put(None)


class StreamLanes:
    """CUDA streams, fed by the calling thread; what crosses streams waits for events.

    Tensors are handed over inside a round by events, and between rounds by a barrier on the device: every stream waits
    for all others before the next round, so memory that one stream frees is not given out while another reads it.
    """

    def __init__(self, device: torch.device, count: int):
        self._device = device
        self._streams = [torch.cuda.Stream(device) for _ in range(count)]

    def run(self, schedule: StepSchedule, jobs: list[Callable[[], None] | None]) -> None:
        plan = schedule.plan
        current = torch.cuda.current_stream(self._device)
        for stream in self._streams:
            stream.wait_stream(current)
        needed = {u for waits in plan.waits for u in waits}
        events: dict[int, torch.cuda.Event] = {}
        try:
            for i in plan.order:
                stream = self._streams[plan.stream[i]]
                for u in plan.waits[i]:
                    if u in events:
                        stream.wait_event(events[u])
                job = jobs[i]
                if job is not None:
                    with torch.cuda.stream(stream):
                        job()
                if i in needed:
                    events[i] = stream.record_event()
        finally:
            for stream in self._streams:
                current.wait_stream(stream)
