"""A schedule to look at: as text, as a Gantt picture, and as a Chrome trace.

`timeline` plays the rounds of a `StepSchedule`; a simulation of many ranks has a `Timeline` of its own. Both are drawn and
written by the same functions. Times are those that a schedule was made with: predictions, unless its costs were measured.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fastlocal.errors import ArgumentError, BackendError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Span", "Timeline", "timeline", "to_text", "summary", "draw", "trace", "chrome_trace"]

SENDS, SENDS_BACK = "send", "send back"  # kinds of spans that are messages on a link
_MESSAGES = (SENDS, SENDS_BACK)


class Scheduled(Protocol):
    """What is read of a `fastlocal.engine.schedule.StepSchedule`."""

    kind: str
    tasks: Any  # each with kind, block, name
    cost: Any  # seconds
    bytes_made: Any
    bytes_freed: Any
    streams: int
    plan: Any  # a `fastlocal.engine._native.Pipeline`


@dataclass(frozen=True)
class Span:
    """One task of one step, or one message.

    Attributes:
        row: index in `Timeline.rows`.
        start, end: seconds.
        kind: "forward", "head", "backward", "link", "update", "free"; of messages, "send" or "send back", in the row of
            the sender, beside whose tasks they may run.
        block: index of the block, -1 for all; of a pipeline of ranks, the first block of the rank.
        step: the training step (batch), counted from 0.
        name: what a label says.
        round: of the schedule; -1 where there are none.
    """

    row: int
    start: float
    end: float
    kind: str
    block: int
    step: int
    name: str
    round: int = -1

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True)
class Timeline:
    """Spans in rows.

    Attributes:
        title: stands above pictures.
        rows: names, such as "stream 0" or "rank 3".
        spans: by start.
        rounds: where each round starts, and where the last one ends; empty without rounds.
        zoom: the part that a picture shows once more at large, in seconds; None for no such part.
        unit: what ``rows`` are, in one word.
        bytes_alive: (seconds, bytes) at every change, for a trace; may be empty.
    """

    title: str
    rows: tuple[str, ...]
    spans: tuple[Span, ...]
    rounds: tuple[float, ...] = ()
    zoom: tuple[float, float] | None = None
    unit: str = "stream"
    bytes_alive: tuple[tuple[float, int], ...] = ()

    @property
    def seconds(self) -> float:
        return max((span.end for span in self.spans), default=0.0)


# ------------------------------------------------------------------------------------------------------------- the rounds


def timeline(schedule: Scheduled, steps: int | None = None) -> Timeline:
    """The rounds that ``steps`` training steps take, from the first of the prologue to the last of the epilogue.

    A full round is as the schedule has it. In a round of the prologue or epilogue the tasks that it leaves out take no
    time; their order and waits hold, so what is left starts no later than in a full round.

    Args:
        schedule: a `StepSchedule`.
        steps: how many; default two more than are in flight, which shows three full rounds.

    Raises:
        ArgumentError: fewer than one step.
    """
    plan = schedule.plan
    if steps is None:
        steps = plan.in_flight + 2
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ArgumentError(f"steps: expected at least 1, got {steps!r}")
    spans: list[Span] = []
    bounds = [0.0]
    full = -1
    changes: list[tuple[float, int, int]] = []
    for r in range(steps + plan.in_flight - 1):
        runs = [0 <= r - plan.stage[u] < steps for u in range(len(schedule.tasks))]
        if all(runs) and full < 0:
            full = r
        begin = bounds[-1]
        starts, ends = _play(schedule, runs)
        for u in plan.order:
            if runs[u]:
                task = schedule.tasks[u]
                at = begin + starts[u], begin + ends[u]
                spans.append(Span(plan.stream[u], *at, task.kind, task.block, r - plan.stage[u], task.name, r))
                # what a task frees is gone before what starts when it ends is made
                changes += [(at[0], 1, int(schedule.bytes_made[u])), (at[1], 0, -int(schedule.bytes_freed[u]))]
        bounds.append(begin + (plan.period if all(runs) else max(ends, default=0.0)))
    return Timeline(
        _headline(schedule),
        tuple(f"stream {s}" for s in range(schedule.streams)),
        tuple(sorted(spans, key=lambda span: (span.start, span.row))),
        tuple(bounds),
        (bounds[full], bounds[full + 1]) if full >= 0 else None,
        "stream",
        tuple(_levels(changes)),
    )


def _play(schedule: Scheduled, runs: Sequence[bool]) -> tuple[list[float], list[float]]:
    """Start and end of every task within a round in which only those of ``runs`` are run."""
    plan = schedule.plan
    if all(runs):
        return list(plan.start), [start + cost for start, cost in zip(plan.start, schedule.cost)]
    starts, ends = [0.0] * len(runs), [0.0] * len(runs)
    free = [0.0] * schedule.streams
    for u in plan.order:
        starts[u] = max([free[plan.stream[u]], *(ends[w] for w in plan.waits[u])])
        ends[u] = free[plan.stream[u]] = starts[u] + (schedule.cost[u] if runs[u] else 0.0)
    return starts, ends


def _levels(changes: Iterable[tuple[float, int, int]]) -> Iterable[tuple[float, int]]:
    """The sum after every moment at which it changes."""
    alive = 0
    points: dict[float, int] = {}
    for at, _, change in sorted(changes):
        alive += change
        points[at] = alive
    return points.items()


# ------------------------------------------------------------------------------------------------------------------- text


def busy(schedule: Scheduled) -> list[float]:
    """Seconds of tasks on each stream in a full round."""
    found = [0.0] * schedule.streams
    for cost, stream in zip(schedule.cost, schedule.plan.stream):
        found[stream] += cost
    return found


def _headline(schedule: Scheduled) -> str:
    plan = schedule.plan
    blocks = 1 + max((task.block for task in schedule.tasks), default=-1)
    streams = f"{schedule.streams} stream{'s' * (schedule.streams > 1)}"
    flight = f"{plan.in_flight} step{'s' * (plan.in_flight > 1)} in flight"
    return f"{schedule.kind}: {blocks} block{'s' * (blocks != 1)} on {streams}, {flight}"


def summary(schedule: Scheduled) -> list[str]:
    """Three lines or more: what a round takes, how idle each stream is, what is alive; why other schedules do not serve."""
    plan, work = schedule.plan, busy(schedule)
    total = sum(work)
    ratio = total / plan.period if plan.period > 0 else 1.0
    idle = ", ".join(
        f"{s}: {_share(max(0.0, 1 - w / plan.period)) if plan.period > 0 else '0 %'}" for s, w in enumerate(work)
    )
    return [
        _headline(schedule),
        f"a round takes {_ms(plan.period)} ms, its tasks one after another {_ms(total)} ms: {ratio:.2f} x",
        f"idle share of stream {idle}",
        f"tasks hold {_mib(plan.peak_bytes)} MiB at most",
        *(f"not {name}: {reason}" for name, reason in (getattr(schedule, "reasons", None) or {}).items()),
    ]


def to_text(schedule: Scheduled) -> str:
    """The summary, then for every stream its tasks of a full round in their order.

    Columns: start and duration in ms, the task, the step it works on (t is the newest in the round), bytes that it makes
    and frees in MiB, and the tasks on other streams that it waits for.
    """
    plan = schedule.plan
    head = ("start ms", "ms", "task", "step", "makes", "frees", "waits for")
    lines = summary(schedule)
    for stream in range(schedule.streams):
        rows = [head]
        for u in plan.order:
            if plan.stream[u] == stream:
                waits = ", ".join(f"{schedule.tasks[w].name} of {_step(plan.stage[w])}" for w in plan.waits[u])
                sizes = _mib(schedule.bytes_made[u]), _mib(schedule.bytes_freed[u])
                times = _ms(plan.start[u]), _ms(schedule.cost[u])
                rows.append((*times, schedule.tasks[u].name, _step(plan.stage[u]), *sizes, waits))
        lines += ["", f"stream {stream}", *_columns(rows, left=(2, 3, 6))]
    return "\n".join(lines)


def _step(stage: int) -> str:
    return f"t-{stage}" if stage else "t"


def _columns(rows: Sequence[Sequence[str]], left: Iterable[int] = (0,)) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip()
        for row in rows
    ]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.3f}"


def _mib(nbytes: float) -> str:
    return f"{nbytes / 2**20:,.2f}"


def _share(part: float) -> str:
    return f"{100 * part:.1f} %"


# ------------------------------------------------------------------------------------------------------------ Chrome trace


def chrome_trace(found: Timeline) -> dict[str, Any]:
    """The timeline in the JSON Trace Event Format, for Perfetto (ui.perfetto.dev) and chrome://tracing.

    One process with a thread for each row and for the messages of each direction that leave it, complete events ("X") with
    microseconds, and a counter of the bytes alive.
    """
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": 0, "tid": 0, "args": {"name": found.title}}
    ]
    # Events of one thread must nest, and a message runs beside tasks.
    threads = {(row, ""): 3 * row for row in range(len(found.rows))}
    threads |= {(s.row, s.kind): 3 * s.row + 1 + _MESSAGES.index(s.kind) for s in found.spans if s.kind in _MESSAGES}
    for (row, kind), tid in sorted(threads.items(), key=lambda item: item[1]):
        name = f"{found.rows[row]}: {kind}" if kind else found.rows[row]
        events.append({"ph": "M", "name": "thread_name", "pid": 0, "tid": tid, "args": {"name": name}})
        events.append({"ph": "M", "name": "thread_sort_index", "pid": 0, "tid": tid, "args": {"sort_index": tid}})
    for span in found.spans:
        args: dict[str, Any] = {"block": span.block, "step": span.step}
        if span.round >= 0:
            args["round"] = span.round
        events.append(
            {
                "ph": "X", "name": f"{span.name}, step {span.step}", "cat": span.kind, "pid": 0,
                "tid": threads[span.row, span.kind if span.kind in _MESSAGES else ""],
                "ts": span.start * 1e6, "dur": span.seconds * 1e6, "args": args,
            }
        )  # fmt: skip
    for at, alive in found.bytes_alive:
        events.append({"ph": "C", "name": "bytes alive", "pid": 0, "ts": at * 1e6, "args": {"bytes": alive}})
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def trace(found: Timeline, path: str | Path) -> None:
    """Writes `chrome_trace` as JSON to ``path``."""
    Path(path).write_text(json.dumps(chrome_trace(found)) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------- pictures

# Okabe and Ito's colours: neighbouring steps are told apart by colour-blind people too.
_STEPS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
# share of the step's colour, the rest being white (above 0) or black (below), and the hatch
_KINDS: dict[str, tuple[float, str]] = {
    "forward": (0.4, ""), "head": (0.4, "/////"), "backward": (1.0, ""), "link": (1.0, "....."), "update": (-0.6, ""),
    "free": (0.15, ""), SENDS: (0.7, ""), SENDS_BACK: (0.7, ""),
}  # fmt: skip
_WIDTH = 16.0  # inches
_PER_STRIP = 36  # blocks in one line of the enlarged part, at most


def draw(found: Timeline, path: str | Path) -> None:
    """A Gantt picture: one line per row, time to the right, a colour per step, a shade or hatch per kind of task.

    Above stands the whole timeline, below it the part ``found.zoom`` at large, cut into several lines where it holds much.
    Numbers in the bars are blocks. The format is the suffix of ``path`` (``.svg``, ``.png``, ``.pdf``).

    Raises BackendError without matplotlib, ArgumentError for a suffix that it does not know.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise BackendError("matplotlib is not installed; pip install 'fastlocal[demo]'") from error
    rows = len(found.rows)
    strips = _strips(found)
    heights = [max(1.6, 0.42 * rows + 0.7), *([max(1.2, 0.5 * rows + 0.55)] * len(strips))]
    fig = Figure(figsize=(_WIDTH, sum(heights) + 1.1), layout="constrained")
    panels = fig.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    fig.suptitle(found.title, fontsize=13, x=0.01, ha="left")
    end = found.seconds or 1.0
    _panel(panels[0], found, 0.0, end)
    panels[0].set_title(_overview_title(found), fontsize=10, loc="left", pad=14 if found.rounds else 6)
    if found.rounds:
        for r, (a, b) in enumerate(pairwise(found.rounds)):
            if b > a:
                panels[0].text((a + b) / 2 * 1e3, 1.0, f"round {r}" if r == 0 else str(r), fontsize=8, ha="center",
                               va="bottom", transform=panels[0].get_xaxis_transform())  # fmt: skip
    for i, (axes, (a, b)) in enumerate(zip(panels[1:], strips)):
        _panel(axes, found, a, b)
        if i == 0:
            axes.set_title("one full round" if found.rounds else "a part at large", fontsize=10, loc="left")
    panels[-1].set_xlabel("ms", fontsize=10)
    kinds = [kind for kind in _KINDS if any(span.kind == kind and span.seconds > 0 for span in found.spans)]
    keys = [
        Patch(facecolor=_shade("#777777", _KINDS[kind][0]), hatch=_KINDS[kind][1], edgecolor="white", label=kind)
        for kind in kinds
    ]
    steps = sorted({span.step for span in found.spans})
    named = [f"step {s}" + (" (and every 7th)" if s == steps[0] and len(steps) > len(_STEPS) else "") for s in steps]
    keys += [Patch(facecolor=_STEPS[s % len(_STEPS)], label=name) for s, name in zip(steps[: len(_STEPS)], named)]
    fig.legend(handles=keys, loc="outside lower left", ncols=len(keys), frameon=False, fontsize=9)
    try:
        fig.savefig(path, dpi=120)
    except ValueError as error:
        raise ArgumentError(f"path: cannot draw to {path} ({error})") from error


def _overview_title(found: Timeline) -> str:
    if not found.rounds:
        return "the run"
    return "all rounds, from the first of the prologue to the last of the epilogue; numbers in bars are blocks"


def _strips(found: Timeline) -> list[tuple[float, float]]:
    """The enlarged part, cut into as many lines as its fullest row needs."""
    if found.zoom is None:
        return []
    a, b = found.zoom
    inside = [span for span in found.spans if a <= span.start < b and span.kind not in _MESSAGES and span.seconds > 0]
    fullest = max((sum(1 for _ in _runs(inside, row)) for row in range(len(found.rows))), default=0)
    lines = max(1, math.ceil(fullest / _PER_STRIP))
    return [(a + (b - a) * i / lines, a + (b - a) * (i + 1) / lines) for i in range(lines)]


def _runs(spans: Iterable[Span], row: int) -> Iterable[tuple[float, float, int]]:
    """Stretches of one row on which one block works on one step: start, end, block."""
    run: tuple[float, float, int, int] | None = None
    for span in spans:
        if span.row != row:
            continue
        if run is not None and run[2:] == (span.block, span.step) and span.start - run[1] <= 1e-3 * span.seconds:
            run = (run[0], span.end, span.block, span.step)
            continue
        if run is not None:
            yield run[:3]
        run = (span.start, span.end, span.block, span.step)
    if run is not None:
        yield run[:3]


def _panel(axes: Axes, found: Timeline, a: float, b: float) -> None:
    """The timeline between two moments."""
    bars: dict[tuple[int, str, int], list[tuple[float, float]]] = defaultdict(list)
    shown = [span for span in found.spans if span.end > a and span.start < b]
    for span in shown:
        start, end = max(a, span.start), min(b, span.end)
        bars[span.row, span.kind, span.step % len(_STEPS)].append((start * 1e3, (end - start) * 1e3))
    inches = (_WIDTH - 1.2) / max((b - a) * 1e3, 1e-12)
    for (row, kind, step), ranges in bars.items():
        share, hatch = _KINDS.get(kind, (0.7, ""))
        low, height = {SENDS: (row + 0.36, 0.1), SENDS_BACK: (row - 0.46, 0.1)}.get(kind, (row - 0.34, 0.68))
        wide = max(width for _, width in ranges) * inches > 0.04
        axes.broken_barh(
            ranges, (low, height), facecolors=_shade(_STEPS[step], share), hatch=hatch if wide else "",
            edgecolors="white" if wide else "none", linewidths=0.3 if wide else 0.0,
        )  # fmt: skip
    for row in range(len(found.rows)):
        work = [span for span in shown if span.kind not in _MESSAGES and span.seconds > 0]
        labels = [(start, end, _label(block)) for start, end, block in _runs(work, row)]
        sizes = [(min(b, end) - max(a, start), text) for start, end, text in labels]
        if sum(size for size, text in sizes if _fits(size, text, inches)) < 0.7 * sum(size for size, _ in sizes):
            labels = [(start, end, text) for start, end, text in _ranges(work, row)]  # one for the blocks of a step
        for start, end, text in labels:
            left, right = max(a, start), min(b, end)
            if _fits(right - left, text, inches):
                axes.text((left + right) / 2 * 1e3, row, text, fontsize=8, ha="center", va="center", clip_on=True,
                          bbox={"boxstyle": "round,pad=0.12", "facecolor": "white", "edgecolor": "none", "alpha": 0.75},
                          )  # fmt: skip
    for at in found.rounds:
        if a <= at <= b:
            axes.axvline(at * 1e3, color="black", linewidth=0.8)
    axes.set_xlim(a * 1e3, b * 1e3)
    axes.set_ylim(len(found.rows) - 0.5, -0.5)
    axes.set_yticks(range(len(found.rows)), found.rows)
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _label(block: int) -> str:
    return "all" if block < 0 else str(block)


def _fits(seconds: float, text: str, inches: float) -> bool:
    return seconds * 1e3 * inches > 0.075 * len(text) + 0.03


def _ranges(spans: Iterable[Span], row: int) -> Iterable[tuple[float, float, str]]:
    """Stretches of one row on which one step is worked on: start, end, its first and last block."""
    found: list[list[Span]] = []
    for span in spans:
        if span.row == row:
            previous = found[-1][-1] if found else span
            if (
                not found
                or (previous.step, previous.round) != (span.step, span.round)
                or span.start > previous.end + span.seconds
            ):
                found.append([])
            found[-1].append(span)
    for run in found:
        first, last = min(s.block for s in run), max(s.block for s in run)
        yield run[0].start, run[-1].end, _label(first) if first == last else f"{max(0, first)}-{last}"


def _shade(color: str, share: float) -> tuple[float, float, float]:
    """Mixed with white where ``share`` is below 1, with black where it is negative."""
    red, green, blue = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    if share < 0:
        return -share * red, -share * green, -share * blue
    return 1 - (1 - red) * share, 1 - (1 - green) * share, 1 - (1 - blue) * share
