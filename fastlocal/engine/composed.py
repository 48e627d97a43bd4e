"""Rounds of a schedule as CUDA graphs: pieces of the step are captured one by one and composed by the plan's edges.

A piece is what one stream runs between two waits. It is captured once for each variant of the step's buffers, on the
stream of the plan and in the memory pool of its block; a round is then one executable graph with a child graph for each
piece. No capture spans several streams, and one launch runs a round.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastlocal.engine import _native
from fastlocal.engine._native import Pipeline
from fastlocal.engine.graph import CudaGraphs
from fastlocal.errors import ArgumentError, BackendError

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


class CudaComposer(CudaGraphs):
    """Captures each stream of the plan on a stream of its own: workspaces of cuBLAS belong to a stream, so pieces that
    run side by side must not have been captured on one.

    Args:
        device: a CUDA device.
        composed: False launches the pieces one by one on streams, with events between them.

    Raises:
        BackendError: what composition needs is not there, and why.
    """

    def __init__(self, device: torch.device, *, composed: bool = True):
        super().__init__(device)
        self._composed = composed
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
        gc.collect()  # what is collected in a capture may free memory, which a capture forbids
        torch.cuda.empty_cache()

    def capture(self, run: Callable[[], None], stream: Any, pool: Any) -> Any:
        side = self._streams.get(stream)
        if side is None:
            side = self._streams[stream] = torch.cuda.Stream(self._device)
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        random = torch.cuda.get_rng_state(self._device)
        try:
            with torch.cuda.stream(side):
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


def pieces_of(plan: Pipeline, group: Sequence[int]) -> list[Piece]:
    """Cuts the tasks of a round into pieces, in the order of their first tasks.

    A task is the first of its piece where it waits, and the last where others wait for it; a piece has one stage, so that
    rounds which leave out a step leave out whole pieces, and one pool.

    Args:
        plan: of one step.
        group: per task its group, -1 for a task of none, which gets a pool of its own.
    """
    awaited = {u for waits in plan.waits for u in waits}
    alone = 1 + max(plan.pools, default=-1)
    parts: list[list[int]] = []
    at: dict[int, int] = {}  # the piece of a task
    last: dict[int, int] = {}  # the newest piece of a stream
    keys: list[tuple[int, int, int]] = []
    for v in plan.order:
        pool = plan.pools[group[v]] if group[v] >= 0 else alone + v
        key = (plan.stream[v], plan.stage[v], pool)
        own = last.get(plan.stream[v])
        if own is None or keys[own] != key or plan.waits[v] or parts[own][-1] in awaited:
            own = last[plan.stream[v]] = len(parts)
            parts.append([])
            keys.append(key)
        parts[own].append(v)
        at[v] = own
    waits = [sorted({at[u] for u in plan.waits[tasks[0]]}) for tasks in parts]
    return [
        Piece(tuple(tasks), stream, stage, pool, tuple(before))
        for tasks, (stream, stage, pool), before in zip(parts, keys, waits, strict=True)
    ]


def variants_of(plan: Pipeline) -> int:
    """How many sets of buffers the steps need: step t has set t modulo this number.

    A buffer that a task of stage a writes and one of stage b reads is read in round t + b at the latest. The next step
    of the same set writes it in round t + n + a, which must be later: n > b - a. The batch is there from round t on and
    read until the last stage, so n is the largest stage and 1.
    """
    return 1 + max(plan.stage)


def check_order(plan: Pipeline, edges: Sequence[tuple[int, int, int]], pieces: Sequence[Piece]) -> None:
    """Raises ArgumentError where a dependency is not kept by streams and waits, in a full round or in one with fewer steps.

    Args:
        edges: ``(u, v, distance)``.
    """
    at = {v: (i, j) for i, piece in enumerate(pieces) for j, v in enumerate(piece.tasks)}
    inside = []
    for u, v, distance in edges:
        if plan.stage[u] > plan.stage[v] + distance:
            raise ArgumentError(
                f"plan: task {v} needs task {u}, {distance} step(s) before, which runs in a later round"
            )
        if plan.stage[u] == plan.stage[v] + distance:
            inside.append((u, v))
    top = max(plan.stage)
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
        watch: whether operators are looked at while they are captured, to refuse those that draw random numbers.

    Attributes:
        variants: sets of buffers, see `variants_of`.
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
        watch: bool = True,
    ):
        self.plan, self.names, self.device, self._watch = plan, list(names), device, watch
        self.pieces = pieces_of(plan, group)
        check_order(plan, edges, self.pieces)
        check_pools(plan, group)
        self.variants = variants_of(plan)
        self.stages = 1 + max(plan.stage)
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
                raise BackendError(f"graph: a round could not be composed: {error}") from None
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
