"""A training step on many ranks, simulated: block pipelining by local learning against pipelined back-propagation.

Plain Python, event driven, deterministic. What is given (seconds, bytes, links) decides everything; nothing is measured. What
the model leaves out is listed in docs/schedules.md.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastlocal.engine import gantt
from fastlocal.engine.gantt import SENDS, SENDS_BACK, Span, Timeline
from fastlocal.errors import ArgumentError, did_you_mean

__all__ = ["Cost", "Simulation", "Comparison", "simulate", "compare", "assign", "SCHEDULES"]

SCHEDULES = {
    "local": "blocks of local learning, one behind the other: activations travel forward, nothing travels back",
    "gpipe": "back-propagation: all forwards of the micro-batches, then all backwards, then the update",
    "1f1b": "back-propagation: after a warm-up each forward is followed by a backward; the update when all are done",
    "sequential": "everything on one rank",
}


@dataclass(frozen=True)
class Cost:
    """What one block costs: of local learning for a batch, of back-propagation for one micro-batch.

    Attributes:
        forward, head, backward: seconds. ``head`` is a local head's forward and backward; 0 where there is none.
        update: seconds of the optimizer, once a step.
        output_bytes: of the activation at the block's end, which is what travels to the next.
        saved_bytes: what lives from the start of its forward to the end of its backward, input and output left out.
        name: for tables.
    """

    forward: float
    backward: float
    head: float = 0.0
    update: float = 0.0
    output_bytes: int = 0
    saved_bytes: int = 0
    name: str = ""

    def __post_init__(self) -> None:
        for key in ("forward", "backward", "head", "update", "output_bytes", "saved_bytes"):
            _number(key, getattr(self, key))


@dataclass(frozen=True)
class Simulation:
    """A run of some steps.

    Attributes:
        schedule, ranks, microbatches, steps: what was run.
        seconds: of a step in steady state: the mean over the second half of the steps.
        fill: seconds that the run takes beyond ``steps * seconds``: what filling (and draining) costs once in a run.
        idle: share of a steady step in which each rank does not compute.
        link_bytes: bytes a step over each link, by (from, to).
        peak_bytes: most bytes of activations and their gradients alive on each rank.
        blocks: the first block of each rank, and one past its last.
        spans: of all tasks and messages; rows are ranks.
    """

    schedule: str
    ranks: int
    microbatches: int
    steps: int
    seconds: float
    fill: float
    idle: tuple[float, ...]
    link_bytes: dict[tuple[int, int], int]
    peak_bytes: tuple[int, ...]
    blocks: tuple[tuple[int, int], ...]
    spans: tuple[Span, ...] = field(repr=False, compare=False)

    @property
    def bubble(self) -> float:
        """Share of all ranks' time, in steady state, in which nothing is computed."""
        return sum(self.idle) / len(self.idle)

    @property
    def bytes_sent(self) -> int:
        """Over all links, a step."""
        return sum(self.link_bytes.values())

    def timeline(self, steps: int | None = None) -> Timeline:
        """For `gantt.draw` and `gantt.trace`: the first ``steps``, by default those that show how the ranks fill up."""
        if steps is None:
            steps = self.ranks + 3 if self.schedule == "local" else 3
        micro = f", {self.microbatches} micro-batches" if self.microbatches > 1 else ""
        return Timeline(
            f"{self.schedule} on {self.ranks} rank{'s' * (self.ranks > 1)}{micro}: {self.seconds * 1e3:,.3f} ms a step, "
            f"{100 * self.bubble:.1f} % idle",
            tuple(f"rank {r}" for r in range(self.ranks)),
            tuple(span for span in self.spans if span.step < steps),
            unit="rank",
        )

    def draw(self, path: str | Path, steps: int | None = None) -> None:
        """A Gantt picture of `timeline`. Raises BackendError without matplotlib."""
        gantt.draw(self.timeline(steps), path)

    def trace(self, path: str | Path, steps: int | None = None) -> None:
        """A Chrome trace of `timeline`."""
        gantt.trace(self.timeline(steps), path)


# ------------------------------------------------------------------------------------------------------------- the machine


@dataclass
class _Task:
    """Work of one queue, which does one thing at a time, in the order in which it was added."""

    queue: int
    seconds: float
    after: list[int]  # tasks that must be done
    delay: float  # seconds from its end until others see it: a message's latency
    span: Span
    start: float = 0.0
    end: float = 0.0


class _Machine:
    """Queues (ranks and links), each of which runs its tasks in order, as soon as what they wait for is there."""

    def __init__(self) -> None:
        self.tasks: list[_Task] = []
        self.queues: dict[Any, int] = {}

    def add(self, queue: Any, seconds: float, after: Sequence[int | None], span: Span, delay: float = 0.0) -> int:
        own = self.queues.setdefault(queue, len(self.queues))
        self.tasks.append(_Task(own, seconds, [u for u in after if u is not None], delay, span))
        return len(self.tasks) - 1

    def run(self) -> None:
        tasks = self.tasks
        missing = [len(task.after) for task in tasks]
        readers: list[list[int]] = [[] for _ in tasks]
        queue: list[list[int]] = [[] for _ in self.queues]
        for u, task in enumerate(tasks):
            queue[task.queue].append(u)
            for v in task.after:
                readers[v].append(u)
        at = [0] * len(queue)
        working = [False] * len(queue)
        events: list[tuple[float, int, int, bool]] = []  # time, number, task, whether others see its end only now
        number = 0

        def begin(q: int, now: float) -> None:
            nonlocal number
            if working[q] or at[q] == len(queue[q]) or missing[queue[q][at[q]]]:
                return
            u = queue[q][at[q]]
            working[q] = True
            tasks[u].start, tasks[u].end = now, now + tasks[u].seconds
            heapq.heappush(events, (tasks[u].end, number, u, False))
            number += 1

        for q in range(len(queue)):
            begin(q, 0.0)
        while events:
            now, _, u, arrived = heapq.heappop(events)
            task = tasks[u]
            if not arrived:
                working[task.queue] = False
                at[task.queue] += 1
                begin(task.queue, now)
                if task.delay:
                    heapq.heappush(events, (now + task.delay, number, u, True))
                    number += 1
                    continue
            for v in readers[u]:
                missing[v] -= 1
                begin(tasks[v].queue, now)
        assert all(at[q] == len(queue[q]) for q in range(len(queue))), "a task waits for itself"


# ---------------------------------------------------------------------------------------------------------------- simulate


def assign(seconds: Sequence[float], ranks: int) -> list[tuple[int, int]]:
    """Blocks on ranks, in order, so that the busiest rank has as little as can be: first block and one past the last.

    Raises ArgumentError for more ranks than blocks.
    """
    if ranks > len(seconds):
        raise ArgumentError(f"ranks: {ranks} ranks for {len(seconds)} blocks; give at most one rank per block")

    def cut(limit: float) -> list[tuple[int, int]] | None:
        spans: list[tuple[int, int]] = []
        first, load = 0, 0.0
        for k, own in enumerate(seconds):
            # the ranks that follow need a block each
            if k > first and (load + own > limit or len(seconds) - k == ranks - 1 - len(spans)):
                spans.append((first, k))
                first, load = k, 0.0
            load += own
            if load > limit or len(spans) == ranks:
                return None
        return [*spans, (first, len(seconds))]

    low, high = max(seconds), math.fsum(seconds) * (1 + 1e-9)
    best = cut(low)
    if best is None:
        best = cut(high)
        while high - low > 1e-9 * high:  # as exact as times are known
            middle = (low + high) / 2
            found = cut(middle)
            low, high, best = (low, middle, found) if found is not None else (middle, high, best)
    assert best is not None
    return best


def simulate(
    blocks: Sequence[Cost],
    schedule: str = "local",
    *,
    ranks: int = 1,
    microbatches: int = 1,
    bandwidth: float = math.inf,
    latency: float = 0.0,
    overlap: bool = True,
    recompute: bool = False,
    straggler: Mapping[int, float] | Sequence[float] | None = None,
    jitter: float = 0.0,
    seed: int = 0,
    buffers: int = 2,
    steps: int | None = None,
) -> Simulation:
    """Runs some training steps of blocks on ranks that are linked in a chain.

    Args:
        blocks: in order. Under "gpipe" and "1f1b" the seconds and bytes are those of one micro-batch.
        schedule: a key of `SCHEDULES`.
        ranks: neighbouring blocks are given to ranks by `assign`.
        microbatches: per step, under "gpipe" and "1f1b"; a local pipeline sends whole batches.
        bandwidth: bytes per second of each link and direction. A link carries one message at a time.
        latency: seconds between the end of a message on its link and its arrival.
        overlap: whether a rank computes while it sends.
        recompute: under "gpipe" and "1f1b", keep only the input of each rank's part and run its forward again before every
            backward.
        straggler: factor on the seconds of a rank, ``{rank: factor}`` or one number for each rank.
        jitter: each task takes ``1 + jitter * e`` times its seconds, ``e`` exponentially distributed with mean 1.
        seed: of the jitter.
        buffers: how many activations may be on their way or in use between two ranks of a local pipeline; a rank that is
            that far ahead waits.
        steps: how many are run; default ``8 + 4 * ranks``, with jitter at least 200.

    Raises:
        ArgumentError: a value out of range, or one that does not go with the schedule.
    """
    if schedule not in SCHEDULES:
        raise ArgumentError(f"schedule: got {schedule!r}. {did_you_mean(str(schedule), SCHEDULES)}")
    if not blocks:
        raise ArgumentError("blocks: there are none; give the Cost of at least one")
    for name, value in (("ranks", ranks), ("microbatches", microbatches), ("buffers", buffers)):
        _count(name, value)
    if steps is None:
        steps = max(8 + 4 * ranks, 200 if jitter else 0)
    _count("steps", steps)
    if steps < 2:
        raise ArgumentError("steps: give at least 2; the second half of them is the steady state")
    if not isinstance(bandwidth, int | float) or not bandwidth > 0:
        raise ArgumentError(f"bandwidth: expected bytes per second above 0, got {bandwidth!r}")
    _number("latency", latency)
    _number("jitter", jitter)
    local = schedule in ("local", "sequential")
    if local and microbatches != 1:
        raise ArgumentError("microbatches: go with 'gpipe' and '1f1b'; a local pipeline sends whole batches")
    if local and recompute:
        raise ArgumentError("recompute: goes with 'gpipe' and '1f1b'")
    if schedule == "sequential" and ranks != 1:
        raise ArgumentError(f"ranks: 'sequential' is one rank, got {ranks}; 'local' is the pipeline")
    factors = _factors(straggler, ranks)
    spans = assign([microbatches * (b.forward + b.head + b.backward) + b.update for b in blocks], ranks)
    run = _Run(blocks, spans, bandwidth, latency, overlap, factors, jitter, random.Random(seed))
    for step in range(steps):
        if local:
            run.local_step(step, buffers)
        else:
            run.bp_step(step, schedule, microbatches, recompute)
    run.machine.run()
    return run.result(schedule, microbatches, steps)


class _Run:
    """Tasks, messages and what is held in memory from when to when."""

    def __init__(
        self,
        blocks: Sequence[Cost],
        spans: list[tuple[int, int]],
        bandwidth: float,
        latency: float,
        overlap: bool,
        factors: list[float],
        jitter: float,
        rng: random.Random,
    ):
        self.machine = _Machine()
        self.blocks, self.spans = blocks, spans
        self.bandwidth, self.latency, self.overlap = bandwidth, latency, overlap
        self.factors, self.jitter, self.rng = factors, jitter, rng
        self.held: list[tuple[int, int, int, tuple[int, ...]]] = []  # rank, bytes, from start of, to the last end of
        self.sent: dict[tuple[int, int], int] = {}
        self.uses: list[list[int]] = [[] for _ in spans]  # local: the task after which a rank's input is done with

    def task(
        self, rank: int, kind: str, block: int, step: int, seconds: float, *after: int | None, tag: str = ""
    ) -> int:
        seconds *= self.factors[rank]
        if self.jitter:
            seconds *= 1 + self.jitter * self.rng.expovariate(1.0)
        span = Span(rank, 0.0, 0.0, kind, block, step, f"{kind} {block}{tag}")
        return self.machine.add(("rank", rank), seconds, after, span)

    def message(self, source: int, to: int, block: int, nbytes: int, step: int, after: int, tag: str = "") -> int:
        kind = SENDS if to > source else SENDS_BACK
        queue = (source, to) if self.overlap else ("rank", source)
        self.sent[source, to] = self.sent.get((source, to), 0) + nbytes
        span = Span(source, 0.0, 0.0, kind, block, step, f"{kind} {block}{tag}")
        return self.machine.add(queue, nbytes / self.bandwidth, (after,), span, self.latency)

    def hold(self, rank: int, nbytes: int, start: int, *ends: int) -> None:
        self.held.append((rank, nbytes, start, ends))

    # --- local learning ----------------------------------------------------------------------------------------------

    def local_step(self, step: int, buffers: int) -> None:
        """Rank by rank; a rank sends as soon as its last forward is done, before that block's head and backward."""
        arrived: int | None = None
        for rank, (first, end) in enumerate(self.spans):
            last_rank = rank == len(self.spans) - 1
            start_of_input = arrived  # the output of the block before
            sent: int | None = None
            for k in range(first, end):
                own = self.blocks[k]
                waits = [arrived if k == first else None]
                if k == end - 1 and not last_rank and step >= buffers:
                    waits.append(self.uses[rank + 1][step - buffers])  # a place for its output
                forward = self.task(rank, "forward", k, step, own.forward, *waits)
                if k == end - 1 and not last_rank:
                    sent = self.message(rank, rank + 1, k, own.output_bytes, step, forward)
                if own.head:
                    self.task(rank, "head", k, step, own.head)
                backward = self.task(rank, "backward", k, step, own.backward)
                if own.update:
                    self.task(rank, "update", k, step, own.update)
                self.hold(rank, own.saved_bytes, forward, backward)
                if start_of_input is not None:
                    self.hold(rank, self.blocks[k - 1].output_bytes, start_of_input, backward)
                if k == end - 1:
                    self.hold(rank, own.output_bytes, forward, *([backward] if sent is None else [backward, sent]))
                if k == first:
                    self.uses[rank].append(backward)
                start_of_input = forward
            arrived = sent

    # --- back-propagation ---------------------------------------------------------------------------------------------

    def bp_step(self, step: int, schedule: str, microbatches: int, recompute: bool) -> None:
        """All ranks' orders are fixed; they are added in an order in which what a task waits for is known."""
        ranks = len(self.spans)
        orders = [_order(schedule, rank, ranks, microbatches) for rank in range(ranks)]
        at = [0] * ranks
        forwards: dict[tuple[int, int], int] = {}
        there: dict[tuple[int, int], int] = {}  # message with the input of (rank, micro-batch)
        back: dict[tuple[int, int], int] = {}  # with the gradient at its output
        outputs: dict[tuple[int, int], int] = {}  # the message that carries its output away
        while any(at[rank] < len(orders[rank]) for rank in range(ranks)):
            for rank in range(ranks):
                while at[rank] < len(orders[rank]):
                    kind, m = orders[rank][at[rank]]
                    if kind == "forward" and rank and (rank, m) not in there:
                        break
                    if kind == "backward" and rank < ranks - 1 and (rank, m) not in back:
                        break
                    at[rank] += 1
                    first, end = self.spans[rank]
                    part, tag = self.blocks[first:end], f" of micro-batch {m}" if microbatches > 1 else ""
                    seconds = sum(b.forward for b in part)
                    output = part[-1].output_bytes
                    if kind == "forward":
                        u = self.task(rank, kind, first, step, seconds, there.get((rank, m)), tag=tag)
                        forwards[rank, m] = u
                        if rank < ranks - 1:
                            there[rank + 1, m] = self.message(rank, rank + 1, first, output, step, u, tag)
                            outputs[rank, m] = there[rank + 1, m]
                        continue
                    cost = sum(b.backward + b.head for b in part) + (seconds if recompute else 0.0)
                    u = self.task(rank, kind, first, step, cost, back.get((rank, m)), tag=tag)
                    inner = sum(b.saved_bytes for b in part) + sum(b.output_bytes for b in part[:-1])
                    self.hold(rank, inner, u if recompute else forwards[rank, m], u)
                    self.hold(rank, output, forwards[rank, m], outputs.get((rank, m), u))
                    if rank < ranks - 1:
                        self.hold(rank, output, back[rank, m], u)
                    if rank:
                        entry = self.blocks[first - 1].output_bytes
                        back[rank - 1, m] = self.message(rank, rank - 1, first, entry, step, u, tag)
                        self.hold(rank, entry, there[rank, m], u)
                        self.hold(rank, entry, u, back[rank - 1, m])
        for rank, (first, end) in enumerate(self.spans):
            if update := sum(b.update for b in self.blocks[first:end]):
                self.task(rank, "update", first, step, update)

    # --- what came of it ---------------------------------------------------------------------------------------------

    def result(self, schedule: str, microbatches: int, steps: int) -> Simulation:
        ranks, tasks = len(self.spans), self.machine.tasks
        done = [0.0] * steps
        work = [[0.0] * steps for _ in range(ranks)]
        for task in tasks:
            done[task.span.step] = max(done[task.span.step], task.end)
            if task.span.kind not in (SENDS, SENDS_BACK):
                work[task.span.row][task.span.step] += task.seconds
        half = steps // 2
        seconds = (done[-1] - done[half - 1]) / (steps - half)
        fill = done[-1] - steps * seconds
        idle = [1 - sum(own[half:]) / (steps - half) / seconds if seconds else 0.0 for own in work]
        return Simulation(
            schedule,
            ranks,
            microbatches,
            steps,
            seconds,
            fill if fill > 1e-9 * done[-1] else 0.0,  # rounding
            tuple(max(0.0, share) for share in idle),  # rounding
            {link: nbytes // steps for link, nbytes in sorted(self.sent.items())},
            tuple(self._peaks()),
            tuple(self.spans),
            tuple(
                sorted(
                    (replace(t.span, start=t.start, end=t.end) for t in tasks), key=lambda span: (span.start, span.row)
                )
            ),
        )

    def _peaks(self) -> list[int]:
        tasks = self.machine.tasks
        changes: list[list[tuple[float, bool, int]]] = [[] for _ in self.spans]
        for rank, nbytes, start, ends in self.held:
            # what ends at a moment is gone before what starts then
            changes[rank].append((tasks[start].start, True, nbytes))
            changes[rank].append((max(tasks[u].end for u in ends), False, -nbytes))
        peaks = []
        for own in changes:
            alive = peak = 0
            for _, _, change in sorted(own):
                alive += change
                peak = max(peak, alive)
            peaks.append(peak)
        return peaks


def _order(schedule: str, rank: int, ranks: int, microbatches: int) -> list[tuple[str, int]]:
    """Forwards and backwards of one rank in a step."""
    forwards = [("forward", m) for m in range(microbatches)]
    if schedule == "gpipe":
        return [*forwards, *(("backward", m) for m in reversed(range(microbatches)))]
    ahead = min(microbatches, ranks - 1 - rank)
    pairs = [pair for m in range(microbatches - ahead) for pair in (("forward", m + ahead), ("backward", m))]
    return [*forwards[:ahead], *pairs, *(("backward", m) for m in range(microbatches - ahead, microbatches))]


def _factors(straggler: Mapping[int, float] | Sequence[float] | None, ranks: int) -> list[float]:
    if straggler is None:
        return [1.0] * ranks
    if isinstance(straggler, Mapping):
        for rank in straggler:
            if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < ranks:
                raise ArgumentError(f"straggler: there is no rank {rank!r}; ranks are 0 to {ranks - 1}")
        found = [straggler.get(rank, 1.0) for rank in range(ranks)]
    else:
        found = list(straggler)
        if len(found) != ranks:
            raise ArgumentError(
                f"straggler: {len(found)} factors for {ranks} ranks; give one each, or {{rank: factor}}"
            )
    for factor in found:
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < math.inf:
            raise ArgumentError(f"straggler: expected factors above 0, got {factor!r}")
    return found


def _count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArgumentError(f"{name}: expected an integer of at least 1, got {value!r}")


def _number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ArgumentError(f"{name}: expected a number from 0, got {value!r}")


# ----------------------------------------------------------------------------------------------------------------- compare


@dataclass(frozen=True)
class Comparison:
    """Simulations of one network by name, as a table.

    Attributes:
        title: the machine and the batch.
        runs: by name.
    """

    title: str
    runs: dict[str, Simulation]

    def __getitem__(self, name: str) -> Simulation:
        """Raises ArgumentError for a name that is not in ``runs``."""
        if name not in self.runs:
            raise ArgumentError(f"name: got {name!r}. {did_you_mean(name, self.runs)}")
        return self.runs[name]

    def to_text(self) -> str:
        """Milliseconds a step, how many times the same work on one rank, idle share, MiB sent, peak MiB, ms to fill."""
        rows = [
            ("schedule", "ranks", "ms/step", "x one rank", "idle", "sent MiB/step", "peak MiB of a rank", "fill ms")
        ]
        for name, run in self.runs.items():
            alone = self.runs["local, one rank" if run.schedule in ("local", "sequential") else "bp, one rank"]
            rows.append(
                (
                    name, str(run.ranks), f"{run.seconds * 1e3:,.3f}",
                    f"{alone.seconds / run.seconds if run.seconds else 1.0:.2f}", f"{100 * run.bubble:.1f} %",
                    f"{run.bytes_sent / 2**20:,.2f}", f"{max(run.peak_bytes) / 2**20:,.2f}", f"{run.fill * 1e3:,.3f}",
                )
            )  # fmt: skip
        return "\n".join([self.title, *gantt._columns(rows)])

    __str__ = to_text


def compare(
    local: Sequence[Cost] | None,
    bp: Sequence[Cost],
    micro: Sequence[Cost],
    *,
    title: str,
    ranks: int,
    microbatches: int,
    buffers: int = 2,
    straggler: Mapping[int, float] | Sequence[float] | None = None,
    **machine: Any,
) -> Comparison:
    """The same batch by local pipelining, GPipe and 1F1B, each beside its own work on one rank without stragglers.

    Args:
        local: blocks of local learning for a whole batch; None leaves local learning out.
        bp: stages of back-propagation for a whole batch.
        micro: the same for one micro-batch.
        machine: bandwidth, latency, overlap, jitter, seed, steps as for `simulate`.

    Raises:
        ArgumentError: as `simulate`.
    """
    alone = {key: value for key, value in machine.items() if key in ("jitter", "seed", "steps")}
    many: dict[str, Any] = {"ranks": ranks, "straggler": straggler, **machine}
    runs: dict[str, Simulation] = {}
    if local is not None:
        runs["local, one rank"] = simulate(local, "sequential", **alone)
        runs["local"] = simulate(local, "local", buffers=buffers, **many)
    runs["bp, one rank"] = simulate(bp, "gpipe", **alone)
    for schedule in ("gpipe", "1f1b"):
        for recompute in (False, True):
            name = f"{schedule}, recompute" if recompute else schedule
            runs[name] = simulate(micro, schedule, microbatches=microbatches, recompute=recompute, **many)
    return Comparison(title, runs)
