"""`ComposedRounds`: rounds of a schedule as CUDA graphs, composed from captured pieces by the edges of the plan.

A piece is what one stream runs between two waits. It is captured once for each variant of the step's buffers, on the
stream of the plan and in the memory pool of its block; a round is then one executable graph with a child graph for each
piece. No capture spans several streams, and one launch runs a round.

Rounds that fill or drain the pipeline leave out steps that do not exist. They are composed from the same captured pieces,
when they are first needed.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastlocal.engine import _native
from fastlocal.engine._native import Pipeline
from fastlocal.engine.flight import Flight
from fastlocal.engine.graph import (
    _MAX_SHAPES,
    _PATIENCE,
    MAX_GRAPHS,
    WARM_UP,
    Rates,
    Stamp,
    _Batch,
    _first_line,
    _Hits,
    _lendable,
    _look_at,
    _Results,
    check_device,
    refusal,
)
from fastlocal.engine.output import StepOutput
from fastlocal.engine.rounds import Rounds, _step_hooks
from fastlocal.errors import ArgumentError, BackendError

if TYPE_CHECKING:
    from fastlocal.engine.engine import Engine

_MAX_ROUNDS = 64  # executable graphs that are kept; one is some kilobytes of the device's memory for each kernel


# --------------------------------------------------------------------------------------------------------------- device


class Executable(Protocol):
    """A composed round."""

    nodes: int
    edges: int

    def upload(self, stream: int) -> None: ...

    def launch(self, stream: int) -> None: ...

    def close(self) -> None: ...


class ComposedDevice(Protocol):
    """What capture, composition and launch need of a device."""

    rate_dtype: torch.dtype

    def new_pool(self) -> Any:
        """Of memory that only captured graphs use. It may go when all graphs captured in it are gone."""
        ...

    def begin(self) -> None:
        """Before some captures."""
        ...

    def capture(self, run: Callable[[], None], stream: int, pool: Any) -> Any:
        """Records what ``run`` launches on a stream of the plan; nothing is computed.

        Memory that lives when ``run`` ends is kept from other captures in ``pool`` for as long as a tensor holds it.
        ``raw_cuda_graph()`` of the result is its handle; the memory is there for as long as the result.
        """
        ...

    def compose(self, segments: list[tuple[str, int, int, list[int]]]) -> Executable:
        """Segments: name, handle, stream and the numbers of earlier ones that it waits for. Raises RuntimeError."""
        ...

    def launch(self, round_: Executable) -> None:
        """Behind all that was launched before on the current stream, and before all that will be."""
        ...


class CudaComposer:
    """Captures each stream of the plan on a stream of its own: workspaces of cuBLAS belong to a stream, so pieces that
    run side by side must not have been captured on one.

    Args:
        device: a CUDA device.
        composed: False launches the pieces one by one on streams, with events between them.

    Raises:
        BackendError: what composition needs is not there, and why.
    """

    rate_dtype = torch.float32  # all that PyTorch's fused optimizers read on the device

    def __init__(self, device: torch.device, *, composed: bool = True):
        self._device, self._composed = device, composed
        self._streams: dict[int, torch.cuda.Stream] = {}
        native: Any = _native._load()[0]
        if native is None:
            raise BackendError(f"graph: composed graphs need the native extension: {_native.why_not()}")
        if not hasattr(torch.cuda.CUDAGraph, "raw_cuda_graph"):
            raise BackendError(
                f"graph: PyTorch {torch.__version__} does not give out the graphs that it captures; use one with "
                "CUDAGraph.raw_cuda_graph, or schedule='sequential'"
            )
        if torch.cuda.get_allocator_backend() == "cudaMallocAsync":
            raise BackendError(
                "graph: graphs that allocate memory (cudaMallocAsync) cannot be composed; take that out of "
                "PYTORCH_CUDA_ALLOC_CONF, or use schedule='sequential'"
            )
        try:
            # PyTorch's own library stands for the runtime that it was linked with: no other one must be asked.
            self._runtime = native.CudaRuntime("libc10_cuda.so", True)
        except RuntimeError as error:
            raise BackendError(f"graph: the CUDA runtime of PyTorch was not found: {error}") from None
        self._native = native

    def new_pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    def begin(self) -> None:
        torch.cuda.synchronize(self._device)
        gc.collect()
        torch.cuda.empty_cache()

    def capture(self, run: Callable[[], None], stream: int, pool: Any) -> Any:
        side = self._streams.get(stream)
        if side is None:
            side = self._streams[stream] = torch.cuda.Stream(self._device)
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        random = torch.cuda.get_rng_state(self._device)
        collects = gc.isenabled()
        gc.disable()  # what is collected may call what a capture forbids
        try:
            with torch.cuda.stream(side), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The CUDA Graph is empty")  # a block of identities may launch nothing
                graph.capture_begin(pool, capture_error_mode="thread_local")
                try:
                    run()
                except BaseException:
                    with suppress(RuntimeError):  # of a broken capture: what broke it is raised
                        graph.capture_end()
                    raise
                graph.capture_end()
        except BaseException:
            torch.cuda.set_rng_state(random, self._device)
            raise
        finally:
            if collects:
                gc.enable()
        return graph

    def compose(self, segments: list[tuple[str, int, int, list[int]]]) -> Executable:
        with torch.cuda.device(self._device):
            made: Executable = self._native.RoundExecutor(self._runtime, segments, self._composed)
            made.upload(torch.cuda.current_stream(self._device).cuda_stream)
        return made

    def launch(self, round_: Executable) -> None:
        with torch.cuda.device(self._device):
            round_.launch(torch.cuda.current_stream(self._device).cuda_stream)


# --------------------------------------------------------------------------------------------------------------- pieces


class Piece(NamedTuple):
    """What one stream runs between two waits, as one captured graph.

    Attributes:
        tasks: in their order.
        stream, stage: of all of them.
        pool: of all of them, a number.
        waits: earlier pieces, on other streams.
    """

    tasks: tuple[int, ...]
    stream: int
    stage: int
    pool: int
    waits: tuple[int, ...]


def pieces_of(plan: Pipeline, group: Sequence[int], idle: Collection[int] = ()) -> list[Piece]:
    """Cuts the tasks of a round into pieces, in the order of their first tasks.

    A task is the first of its piece where it waits, and the last where others wait for it; a piece has one stage, so that
    rounds which leave out a step leave out whole pieces, and one pool.

    Args:
        plan: of one step.
        group: per task its group, -1 for a task of none, which gets a pool of its own.
        idle: tasks that launch nothing. They are in no piece where no other stream waits for them; what they wait for is
            what the next task of their stream waits for, which may need it too.
    """
    awaited = {u for waits in plan.waits for u in waits}
    taken_over: dict[int, set[int]] = {}  # waits of idle tasks, by stream
    alone = 1 + max(plan.pools, default=-1)
    parts: list[list[int]] = []
    at: dict[int, int] = {}  # the piece of a task
    last: dict[int, int] = {}  # the newest piece of a stream
    keys: list[tuple[int, int, int]] = []
    waits: list[list[int]] = []
    for v in plan.order:
        stream = plan.stream[v]
        before = {at[u] for u in plan.waits[v]} | taken_over.pop(stream, set())
        if v in idle and v not in awaited:
            taken_over[stream] = before
            continue
        pool = plan.pools[group[v]] if group[v] >= 0 else alone + v
        key = (stream, plan.stage[v], pool)
        own = last.get(stream)
        if own is None or keys[own] != key or before or parts[own][-1] in awaited:
            own = last[stream] = len(parts)
            parts.append([])
            keys.append(key)
            waits.append(sorted(before))
        parts[own].append(v)
        at[v] = own
    return [
        Piece(tuple(tasks), stream, stage, pool, tuple(before))
        for tasks, (stream, stage, pool), before in zip(parts, keys, waits, strict=True)
    ]


def variants_of(pieces: Sequence[Piece]) -> int:
    """How many sets of buffers the steps need: step t has set t modulo this number.

    A buffer that a task of stage a writes and one of stage b reads is read in round t + b at the latest. The next step
    of the same set writes it in round t + n + a, which must be later: n > b - a. The batch is there from round t on and
    read until the last stage, so n is the largest stage and 1.
    """
    return 1 + max(piece.stage for piece in pieces)


def check_order(plan: Pipeline, edges: Sequence[tuple[int, int, int]], pieces: Sequence[Piece]) -> None:
    """Raises ArgumentError where a dependency is not kept by streams and waits, in a full round or in one with fewer steps.

    Args:
        edges: ``(u, v, distance)``.
    """
    at = {v: (i, j) for i, piece in enumerate(pieces) for j, v in enumerate(piece.tasks)}
    inside = []
    for u, v, distance in edges:
        if u not in at or v not in at:
            continue
        if plan.stage[u] > plan.stage[v] + distance:
            raise ArgumentError(
                f"plan: task {v} needs task {u}, {distance} step(s) before, which runs in a later round"
            )
        if plan.stage[u] == plan.stage[v] + distance:
            inside.append((u, v))
    top = max(piece.stage for piece in pieces)
    for low in range(top + 1):
        for high in range(low, top + 1):
            before: list[int] = []  # per piece, a bit for each one that is over when it starts
            last: dict[int, int] = {}
            for i, piece in enumerate(pieces):
                direct: list[int] = []
                if low <= piece.stage <= high:
                    direct = [j for j in piece.waits if low <= pieces[j].stage <= high]
                    direct += [last[piece.stream]] if piece.stream in last else []
                    last[piece.stream] = i
                bits = 0
                for j in direct:
                    bits |= before[j] | 1 << j
                before.append(bits)
            for u, v in inside:
                if low <= plan.stage[u] <= high and low <= plan.stage[v] <= high:
                    (i, j), (k, n) = at[u], at[v]
                    if not (before[k] >> i & 1 or (i == k and j < n)):
                        raise ArgumentError(f"plan: task {v} needs task {u}, and may start before it has ended")


def check_pools(plan: Pipeline, group: Sequence[int]) -> None:
    """Raises ArgumentError where two groups of one pool can be alive at the same time: they would write over one another.

    Also where a group is on several streams: a backward runs on its forward's, and workspaces belong to a stream.
    """
    if len(plan.pools) <= max(group, default=-1):
        raise ArgumentError(
            f"plan: has pools for {len(plan.pools)} groups, of {1 + max(group)}; make it with these groups"
        )
    place = [0] * len(plan.order)
    for i, v in enumerate(plan.order):
        place[v] = i
    size = len(plan.order)
    members: dict[int, list[int]] = {}
    for v, g in enumerate(group):
        if g >= 0:
            members.setdefault(g, []).append(v)
    taken: dict[int, tuple[int, list[tuple[int, int, int]]]] = {}  # per pool its stream, and arcs of the round
    for g, tasks in members.items():
        streams = {plan.stream[v] for v in tasks}
        if len(streams) > 1:
            raise ArgumentError(f"plan: group {g} runs on streams {sorted(streams)}; a captured block needs one")
        moments = [plan.stage[v] * size + place[v] for v in tasks]
        first, last = min(moments), max(moments)
        stream, arcs = taken.setdefault(plan.pools[g], (plan.stream[tasks[0]], []))
        for other, a, b in arcs:
            # one of the lives begins while the other lasts, in some pair of steps
            if stream != plan.stream[tasks[0]] or (first - a) % size <= b - a or (a - first) % size <= last - first:
                raise ArgumentError(
                    f"plan: groups {other} and {g} share pool {plan.pools[g]} and can be alive together"
                )
        arcs.append((g, first, last))


# -------------------------------------------------------------------------------------------------------------- capture


@dataclass(eq=False)
class CapturedStep:
    """One variant of a step: a graph for each piece, one more for the results, and all that they read and write."""

    graphs: list[Any] = field(default_factory=list)
    results: Any = None
    kept: list[Any] = field(default_factory=list)


class Composition:
    """Captures the pieces of a step, composes rounds of them, and launches these.

    Args:
        plan: of one step; every group on one stream.
        edges: ``(u, v, distance)``, what the plan keeps.
        group: per task, -1 for none.
        names: per task, for messages.
        device: that captures.
        idle: see `pieces_of`.
        watch: whether operators are looked at while they are captured, to refuse those that draw random numbers.

    Attributes:
        variants: sets of buffers, see `variants_of`.
        stages: of a step, as many.
        composed: rounds that were composed so far.

    Raises:
        ArgumentError: a plan that does not keep a dependency, or lets two groups of one pool live together.
    """

    def __init__(
        self,
        plan: Pipeline,
        edges: Sequence[tuple[int, int, int]],
        group: Sequence[int],
        names: Sequence[str],
        device: ComposedDevice,
        *,
        idle: Collection[int] = (),
        watch: bool = True,
    ):
        self.plan, self.names, self.device, self._watch = plan, list(names), device, watch
        check_pools(plan, group)
        self.pieces = pieces_of(plan, group, idle)
        check_order(plan, edges, self.pieces)
        self.variants = self.stages = variants_of(self.pieces)
        self._pools: dict[Any, Any] = {}
        self._rounds: dict[tuple[CapturedStep | None, ...], Executable] = {}
        self.composed = 0

    def capture(
        self,
        variant: int,
        run: Callable[[int], None],
        alive: Callable[[], Iterable[Tensor]],
        results: Callable[[], None] | None = None,
    ) -> CapturedStep:
        """Captures one step, piece by piece, in an order that its dependencies allow.

        Each variant has pools of its own. What outlives a block (its output, its loss) lies where memory was free when it was
        captured: with one pool for all variants, where another step's block writes while this one is still read.

        Args:
            variant: of its buffers, 0 to ``variants - 1``.
            run: runs a task.
            alive: what the step has made so far and later pieces may read. These tensors are held from the end of the piece
                that made them on: were one freed, a later capture in the same pool would get its memory, and write there
                while others still read.
            results: captured last, to run in the last round of the step.

        Raises:
            BackendError: a task draws random numbers.
        """
        order = sorted(range(len(self.pieces)), key=lambda i: (self.pieces[i].stage, i))
        step = CapturedStep([None] * len(self.pieces))
        pools = dict(self._pools)

        def pool_of(key: Any) -> Any:
            if key not in pools:
                pools[key] = self.device.new_pool()
            return pools[key]

        def tasks_of(piece: Piece) -> None:
            for v in piece.tasks:
                with _Draws(self.names[v]) if self._watch else nullcontext():
                    run(v)

        self.device.begin()
        for i in order:
            piece = self.pieces[i]
            step.graphs[i] = self.device.capture(partial(tasks_of, piece), piece.stream, pool_of((piece.pool, variant)))
            step.kept.append(list(alive()))
        if results is not None:
            step.results = self.device.capture(results, 0, pool_of(("results", variant)))
        self._pools = pools  # where a capture failed, those that it was the first in are gone
        return step

    def launch(self, steps: Sequence[CapturedStep | None]) -> None:
        """Runs a round.

        Args:
            steps: per stage, the step that its tasks work on; None where there is none, before the first step and behind
                the last.

        Raises:
            BackendError: the runtime failed; the message names the call, the task and what it returned.
        """
        key = tuple(steps)
        made = self._rounds.pop(key, None)
        if made is not None:
            self._rounds[key] = made  # the last one to be dropped
        else:
            while len(self._rounds) >= _MAX_ROUNDS:
                self._close(next(iter(self._rounds)))
            try:
                made = self._rounds[key] = self.device.compose(self.segments(key))
            except RuntimeError as error:
                raise BackendError(
                    f"graph: a round could not be composed: {error}; use schedule='sequential'"
                ) from None
            self.composed += 1
        try:
            self.device.launch(made)
        except RuntimeError as error:
            raise BackendError(f"graph: a round could not be launched, or not to its end: {error}") from None

    def segments(self, steps: Sequence[CapturedStep | None]) -> list[tuple[str, int, int, list[int]]]:
        """Of the pieces whose stage has a step: name, handle, stream, and the numbers of those that they wait for."""
        number: dict[int, int] = {}
        found: list[tuple[str, int, int, list[int]]] = []
        for i, piece in enumerate(self.pieces):
            step = steps[piece.stage]
            if step is None:
                continue
            number[i] = len(found)
            names = ", ".join(self.names[v] for v in piece.tasks)
            waits = [number[j] for j in piece.waits if j in number]
            found.append((names, step.graphs[i].raw_cuda_graph(), piece.stream, waits))
        last = steps[self.stages - 1]
        if last is not None and last.results is not None:
            ends = [number[i] for i, piece in enumerate(self.pieces) if piece.stage == self.stages - 1]
            found.append(("results", last.results.raw_cuda_graph(), 0, ends))
        return found

    def _close(self, key: tuple[CapturedStep | None, ...]) -> None:
        self._rounds.pop(key).close()

    def close(self) -> None:
        """Drops all rounds; the captured steps are the caller's."""
        for key in list(self._rounds):
            self._close(key)


class _Draws(TorchDispatchMode):
    """Refuses operators that draw from PyTorch's generators.

    PyTorch moves their offsets on in ``CUDAGraph.replay()``. A composed graph is launched past that, so it would draw the
    same numbers at every step.
    """

    def __init__(self, task: str):
        super().__init__()
        self._task = task

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags and _draws(func, args, kwargs or {}):
            raise BackendError(
                f"task '{self._task}' draws random numbers ({func.overloadpacket.__name__}), and a composed graph would draw the "
                "same ones at every step; use schedule='sequential', or graph='off'"
            )
        return func(*args, **(kwargs or {}))


def _draws(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """False for attention without dropout and the like."""
    given = dict(zip([a.name for a in func._schema.arguments], args)) | kwargs
    for a in func._schema.arguments:
        if a.name in ("p", "dropout_p"):
            return bool(given.get(a.name, a.default_value))
    return True


# --------------------------------------------------------------------------------------------------------------- engine


def composer(device: torch.device) -> ComposedDevice:
    """Raises BackendError where graphs cannot be composed."""
    check_device(device)
    return CudaComposer(device)


def composer_for(engine: Engine) -> ComposedDevice:
    """What captures the rounds of an engine. Raises BackendError with the reason where they cannot be composed."""
    found = composer(engine.device)
    reason = composed_refusal(engine)
    if reason is not None:
        raise BackendError(f"graph: {reason}")
    return found


def composed_refusal(engine: Engine) -> str | None:
    """Why the rounds of an engine cannot be composed graphs, with the remedy; None if nothing is known to be in the way."""
    if any(block.random for block in engine.model.blocks):
        return (
            "blocks draw random numbers, whose offsets PyTorch moves on when it replays a graph of its own; a composed one would "
            "draw the same numbers at every step. Use schedule='sequential', or graph='off'"
        )
    if engine.model.window > 1:
        return (
            f"losses of {engine.model.method.name!r} reach several blocks, so a backward runs on streams of other captures; use "
            "schedule='sequential', or graph='off'"
        )
    if engine.update != "immediate":
        return "update='end' takes all blocks together; use 'immediate', schedule='sequential' or graph='off'"
    return refusal(engine)


@dataclass(eq=False)
class _Variant(CapturedStep):
    """A captured step of an engine, with the buffers that its batches are copied to."""

    inputs: list[Tensor] = field(default_factory=list)
    flats: _Results | None = None
    blocks: int = 0
    norms: list[tuple[Any, Any]] = field(default_factory=list)


@dataclass
class _Captured:
    """A shape of a batch: its eager steps, and then its variants."""

    runs: int = 0
    variants: list[_Variant] | None = None


class _InFlight(NamedTuple):
    """A step that composed rounds have begun."""

    step: int
    variant: _Variant
    target: Any


class ComposedRounds(Rounds):
    """`Rounds` whose rounds are composed graphs, after eager ones of each shape of a batch.

    Args:
        engine, kind, workers, in_flight, memory_budget: see `Rounds`.
        device: that captures.

    Raises:
        BackendError: a step that cannot be captured, here or at its first capture; nothing has been changed then.

    Attributes:
        captures, launches, eager: shapes that were captured, rounds that were launched, steps that ran eagerly.
    """

    def __init__(
        self,
        engine: Engine,
        kind: str,
        workers: int,
        in_flight: int,
        memory_budget: int | None,
        device: ComposedDevice,
    ):
        super().__init__(engine, kind, workers, in_flight, memory_budget)
        self._device = device
        self._composition: Composition | None = None
        self._shapes: dict[Any, _Captured] = {}
        self._stamp: Stamp | None = None
        self._rates: list[Rates] = []  # of each variant: a block has the rates of the step it is at
        self._numbers: list[Tensor] = []  # of each variant: the step's number, on the device
        self._hold: list[int] = []  # what they hold
        self._line: list[_InFlight | None] = []  # by stage, of composed rounds
        self._admitted = 0  # steps since the variants were captured
        self._why = "every shape of a batch has eager steps first"
        self.captures = self.launches = self.eager = 0

    @property
    def busy(self) -> bool:
        return super().busy or any(step is not None for step in self._line)

    def step(self, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> None:
        engine = self._engine
        batch = _look_at(args, kwargs, target)
        shape = self._shape_of(batch)
        hooked = self.in_flight > 1 and _step_hooks(engine)  # which eager rounds refuse
        if shape is None or hooked or self.schedule is None or (shape.variants is None and shape.runs < WARM_UP):
            self._drain_graphs()
            super().step(args, kwargs, target)
            self.eager += 1
            if shape is not None:
                shape.runs += 1
            if self.eager == _PATIENCE and not self.captures:
                warnings.warn(f"graph='on': {_PATIENCE} steps have run and none is captured: {self._why}", stacklevel=4)
            return
        if self._flights:
            super().drain()
        if shape.variants is None:
            self._capture(shape, batch)
        if not self.busy:
            self._next = engine.steps
        self._begin(shape, batch, target)

    def drain(self) -> None:
        super().drain()
        self._drain_graphs()

    def forget(self, why: str) -> None:
        """Drops all graphs; the next steps are eager. Not with steps in flight."""
        self._shapes.clear()
        self._stamp = None
        self._why = why
        if self._composition is not None:
            self._composition.close()
            self._composition = None

    # --- steps -------------------------------------------------------------------------------------------------------

    def _shape_of(self, batch: _Batch) -> _Captured | None:
        """What is known of a shape; None where its steps stay eager."""
        if batch.key is None:
            self._why = "a batch holds what cannot be copied: a tensor that takes a gradient, repeats its elements or is of a subclass"
            return None
        why = "the first step" if self._stamp is None else self._difference(self._stamp)
        if why is not None:
            if self._stamp is not None:
                if why in _MEMORY and any(step is not None for step in self._line):
                    raise BackendError(
                        f"graph: {why} were replaced while {self._steps_in_flight()} are in flight, whose graphs write to what was "
                        "there before; call engine.flush() before you replace them"
                    )
                self._drain_graphs()  # they began before the change
                self.forget(f"changed since: {why}")
            with self._between_steps():
                self._stamp = Stamp(self._engine)
        shape = self._shapes.get(batch.key)
        if shape is None and len(self._shapes) < _MAX_SHAPES:
            shape = self._shapes[batch.key] = _Captured()
        if shape is not None and shape.variants is None:
            full = sum(s.variants is not None for s in self._shapes.values()) >= MAX_GRAPHS
            return None if full else shape
        return shape

    @contextmanager
    def _between_steps(self) -> Iterator[None]:
        """The model as it is when nothing is in flight: that is no change of what was captured."""
        model = self._engine.model
        before, model.in_flight = model.in_flight, None
        try:
            yield
        finally:
            model.in_flight = before

    def _difference(self, stamp: Stamp) -> str | None:
        with self._between_steps():
            return stamp.difference()

    def _steps_in_flight(self) -> str:
        return "steps " + ", ".join(str(s.step) for s in reversed(self._line) if s is not None)

    def _begin(self, shape: _Captured, batch: _Batch, target: Any) -> None:
        """A round with a new step."""
        assert shape.variants is not None and self._composition is not None
        at = self._admitted % self._composition.variants
        variant, number = shape.variants[at], self._next
        self._rates[at].write(self._groups())
        with torch.no_grad():
            for own, new in zip(variant.inputs, batch.tensors, strict=True):
                own.copy_(new, non_blocking=True)
            if self._hold[at] != number:
                self._numbers[at].fill_(number)
        self._hold[at] = number + self._composition.variants  # the captured step adds that
        self._admitted += 1
        self._next += 1
        self._run_round(_InFlight(number, variant, target))

    def _run_round(self, new: _InFlight | None) -> None:
        """One launch; the step at the last stage is complete then."""
        composition = self._composition
        assert composition is not None
        self._line = line = [new, *self._line[:-1]]
        try:
            composition.launch([None if step is None else step.variant for step in line])
        except BaseException as error:
            error.add_note(f"Dropped: {self._steps_in_flight()}, of which some blocks may have had their update.")
            self._line = [None] * composition.stages
            self._hold = [-1] * composition.variants  # who knows what has run
            raise
        self.launches += 1
        done = line[-1]
        if done is None:
            return
        line[-1] = None
        results = done.variant.flats
        assert results is not None and results.losses is not None
        with torch.no_grad():
            flats = [flat.clone() for flat in results.flats]  # a later step of this variant overwrites them
        for inner, norm in done.variant.norms:
            inner.norm = norm
        losses, blocks = results.losses.of(flats), done.variant.blocks
        hits = _Hits(done.target, self._engine.model.criterion, results.scores[:blocks], flats)
        skipped = {k: place.of(flats) for k, place in enumerate(results.scores[blocks:]) if place is not None}
        output = StepOutput(done.step, losses, None, hits, skipped)
        output.logits = None if results.logits is None else results.logits.of(flats)
        self._engine._completed(output)

    def _drain_graphs(self) -> None:
        while any(step is not None for step in self._line):
            self._run_round(None)

    def _groups(self) -> list[dict[str, Any]]:
        inners = self._engine.optimizer.blocks
        return [g for inner in inners if inner is not None and _lendable(inner) for g in inner.param_groups]

    # --- capture -----------------------------------------------------------------------------------------------------

    def _capture(self, shape: _Captured, batch: _Batch) -> None:
        engine, schedule = self._engine, self.schedule
        assert schedule is not None
        reason = composed_refusal(engine)
        if reason is not None:
            raise BackendError(f"graph: {reason}")
        if self._composition is None:
            tasks = schedule.tasks
            self._composition = Composition(
                schedule.plan, schedule.edges, [t.block for t in tasks], [t.name for t in tasks], self._device,
                idle={i for i, t in enumerate(tasks) if t.kind == "free"}, watch=engine.compile is None,
            )  # fmt: skip
            count, groups = self._composition.variants, self._groups()
            self._rates = [Rates(groups, engine.device, self._device.rate_dtype) for _ in range(count)]
            self._numbers = [torch.zeros((), device=engine.device) for _ in range(count)]
            self._hold = [0] * count
            self._line, self._admitted = [None] * self._composition.stages, 0
        try:
            shape.variants = [self._capture_variant(batch, at) for at in range(self._composition.variants)]
        except BaseException:
            if all(s.variants is None for s in self._shapes.values()):
                self._composition = None  # pools go with the last graph in them, and must not be used again then
            raise
        self.captures += 1

    def _capture_variant(self, batch: _Batch, at: int) -> _Variant:
        engine, stamp, composition, schedule = self._engine, self._stamp, self._composition, self.schedule
        assert stamp is not None and composition is not None and schedule is not None
        with torch.no_grad():
            inputs = [
                torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t) for t in batch.tensors
            ]
        call = batch.build(inputs)
        number: Any = self._numbers[at]
        flight = Flight.of(engine.model, number, call, engine.model.context(*call, fires=False), updates=True)
        made: list[_Results] = []

        def run(i: int) -> None:
            task = schedule.tasks[i]
            if task.kind != "free":  # it launches nothing, and what other pieces read must stay where it is
                self._do(flight, task)

        def alive() -> list[Tensor]:
            norms = [inner.norm for inner in stamp.fused if inner.norm is not None]
            return [t.detach() for t in _tensors((_values(flight), norms))]

        def results() -> None:
            output = flight.output()
            number.add_(composition.variants)
            skipped = [flight.skipped[k] for k in sorted(flight.skipped)]
            made.append(_Results(output.losses, output.logits, [*output._hits.scores, *skipped]))

        try:
            with self._rates[at].lent(self._groups(), capturing=True), engine.model.passes.applied():
                step = composition.capture(at, run, alive, results)
        except Exception as error:
            self._put_back(stamp)
            k, phase = engine._at
            raise BackendError(
                f"graph: block {k} ('{engine.model.blocks[k].name}') could not be captured, at its {phase}: "
                f"{type(error).__name__}: {_first_line(error)}. Nothing was changed. Take what waits for the device out of the "
                "step, or use graph='off'"
            ) from error
        except BaseException:
            self._put_back(stamp)
            raise
        why = self._difference(stamp)
        if why is not None:
            self._put_back(stamp)
            raise BackendError(
                f"graph: a step replaces what the next one reads ({why}), so a graph would go on reading the old one. Write into "
                "it in place, or use graph='off'"
            )
        norms = [(inner, inner.norm) for inner in stamp.fused if inner.norm is not None]
        kept = [*step.kept, flight, self._rates[at], number]
        return _Variant(step.graphs, step.results, kept, inputs, made[0], len(flight.hits.scores), norms)

    def _put_back(self, stamp: Stamp) -> None:
        """After a failed capture, in which nothing was computed."""
        self._engine._abandon()
        stamp.restore()

    def explain_graphs(self) -> str:
        """What was captured, and why no more."""
        shapes = sum(s.variants is not None for s in self._shapes.values())
        text = (
            f"graph: on, composed; {shapes} shapes captured, {self.launches} rounds launched, {self.eager} steps eager"
        )
        if not shapes or self._composition is None:
            return f"{text} ({self._why})"
        pieces, variants = len(self._composition.pieces), self._composition.variants
        return f"{text}; {pieces} graphs in a round, {variants} variant(s) of the buffers"


# Differences of a stamp that mean other memory than that which captured graphs write to.
_MEMORY = (
    "parameters, buffers or modules of the model", "addresses of parameters or buffers", "parameters of the optimizer",
    "the optimizer's state", "a tensor that is an attribute of a module",
)  # fmt: skip


def _values(flight: Flight) -> list[Any]:
    """What a step has made that tasks of other blocks may read; not what stays inside a block until its backward."""
    return [
        flight.args, flight.kwargs, flight.target, flight.inputs, flight.losses, flight.logits, flight.skipped,
        vars(flight.hits), vars(flight.ctx),
    ]  # fmt: skip


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for v in value.values():
            yield from _tensors(v)
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from _tensors(v)
