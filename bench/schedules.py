"""Schedules of one step against each other and against back-propagation, in turns: speed, memory, and where the time goes.

    python -m fastlocal.bench.schedules [--only fp32,bf16] [--rounds 5] [--threads 2] [--record]

Every variant trains its own copy of the same weights on the same batch, and the variants take turns in an order drawn anew
each round: a step to come back, then two that are timed. For
``overlap`` and ``pipeline`` a second look says where a round's time goes: what its tasks take beside each other and one
after the other, how long a lane has nothing to run, and what the executor itself costs the host. On a CUDA device the
cases and variants are those of fastlocal.bench.gpu, composed graphs among them (also part of ``make gpu``).
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import random
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import fastlocal as fl
from fastlocal import info
from fastlocal.bench.step_time import SGD, backprop
from fastlocal.blocks.measure import StorageTracker
from fastlocal.engine.rounds import Rounds

RESULTS = Path(__file__).resolve().parent / "results" / "schedules.jsonl"
SCHEDULES = ("sequential", "overlap", "pipeline", "auto")
BASE = "sequential"
TIMED = 2  # steps of a turn
_MOST_WARM_UP = 40  # steps until "auto" must have chosen


@dataclass(frozen=True)
class Case:
    """A method on a network. ``rivals``: which forms of back-propagation take part."""

    method: str
    blocks: int
    batch: int
    model: str = "resnet110"
    options: dict[str, Any] = field(default_factory=dict)
    precision: str = "32-true"
    memory_format: str = "preserve"
    rivals: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        layout = "NCHW, " if self.memory_format == "preserve" else "channels_last, "
        layout = layout if len(input_shape(self)) == 4 else ""
        precision = "fp32" if self.precision == "32-true" else "bf16"
        return f"{self.model} {self.method} K={self.blocks}, batch {self.batch}, {layout}{precision}"


_VIT = {"img_size": 32, "patch_size": 4, "num_classes": 10}
_LAST = {"memory_format": "channels_last"}
_LOW = {"precision": "bf16-mixed"}
CASES: dict[str, Case] = {
    "fp32": Case("dgl", 16, 32, rivals=("BP", "BP compiled")),
    "fp32-last": Case("dgl", 16, 32, **_LAST, rivals=("BP",)),  # type: ignore[arg-type]
    "bf16": Case("dgl", 16, 32, **_LOW),  # type: ignore[arg-type]
    "bf16-last": Case("dgl", 16, 32, **_LOW, **_LAST),  # type: ignore[arg-type]
    "few": Case("dgl", 4, 32, **_LAST),  # type: ignore[arg-type]
    "many": Case("dgl", 55, 32, **_LAST),  # type: ignore[arg-type]
    "small": Case("dgl", 16, 4, **_LAST),  # type: ignore[arg-type]
    "large": Case("dgl", 16, 128, **_LAST),  # type: ignore[arg-type]
    "vit": Case("dgl", 6, 32, "vit_tiny", _VIT),
    "mlp": Case("dgl", 4, 128, "mlp", {"hidden": [1024] * 5}),
}


def input_shape(case: Case) -> tuple[int, ...]:
    """Of a batch, NCHW; of a network that takes vectors, two-dimensional."""
    if case.model == "mlp":
        return case.batch, int(case.options.get("in_features", 784))
    return case.batch, 3, 32, 32


@dataclass
class Variant:
    """One way to train: a step, and the engine behind it, where there is one."""

    step: Callable[[], float]
    engine: fl.Engine | None = None

    @property
    def rounds(self) -> Rounds | None:
        return None if self.engine is None else self.engine._rounds

    @property
    def in_flight(self) -> int:
        return 0 if self.rounds is None else self.rounds.in_flight

    @property
    def about(self) -> str:
        return "" if self.engine is None else self.engine.explain().splitlines()[0]


def variants(case: Case) -> dict[str, Callable[[], Variant]]:
    """Name -> function that makes it, ready for its first step."""
    torch.manual_seed(0)
    shape = input_shape(case)
    x, y = torch.randn(shape), torch.randint(0, 10, (case.batch,))
    net = fl.models.create(case.model, **case.options)
    model = fl.localize(copy.deepcopy(net), case.method, blocks=case.blocks, sample=x[:2])

    def engine(schedule: str) -> Variant:
        run = fl.Engine(
            copy.deepcopy(model),
            lambda named: torch.optim.SGD(named, **SGD),
            schedule=schedule,  # type: ignore[arg-type]
            precision=case.precision,
            memory_format=case.memory_format,  # type: ignore[arg-type]
        )
        batch = x.contiguous(memory_format=torch.channels_last) if case.memory_format == "channels_last" else x
        return Variant(lambda: float(run.step(batch, y).losses[-1]), run)

    def bp(compiled: bool) -> Variant:
        own, batch = copy.deepcopy(net), x
        if case.memory_format == "channels_last":
            own, batch = own.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return Variant(backprop(own, batch, y, compiled=compiled))

    found: dict[str, Callable[[], Variant]] = {name: lambda name=name: engine(name) for name in SCHEDULES}  # type: ignore[misc]
    found |= {name: lambda name=name: bp(name == "BP compiled") for name in case.rivals}  # type: ignore[misc]
    return found


def settle(variant: Variant) -> int:
    """Steps until it trains as it will go on to: costs learnt, pipeline full, "auto" decided. Returns how many."""
    engine, done = variant.engine, 0
    while done < 2 or (engine is not None and _unsettled(engine) and done < _MOST_WARM_UP):
        variant.step()
        done += 1
    for _ in range(variant.in_flight):
        variant.step()
    return done + variant.in_flight


def _unsettled(engine: fl.Engine) -> bool:
    rounds, chooser = engine._rounds, engine._chooser
    return (rounds is not None and rounds.schedule is None) or (chooser is not None and chooser.choice is None)


# ------------------------------------------------------------------------------------------------ memory and time of a round


def peak_bytes(variant: Variant) -> int:
    """The most bytes alive in a step beyond weights, optimizer state and batch: activations, gradients, workspace.

    Every storage is tracked, that of all steps in flight. Under the tracker all tasks run on one thread in the order in
    which they are dispatched, so two operators' temporaries are never alive together here.
    """
    with StorageTracker() as storages:
        for _ in range(variant.in_flight + 1):  # what is in flight from before was not seen
            variant.step()
        gc.collect()
        storages.mark("steady")
        for _ in range(2):
            variant.step()
    return storages.peaks["steady"]


@dataclass
class Ran:
    """A task that ran: on which thread, from when to when, and how long that thread had the processor."""

    kind: str
    thread: int
    begin: float
    end: float
    cpu: float


def watched_rounds(variant: Variant, count: int) -> list[tuple[float, list[Ran]]]:
    """Wall seconds of each of ``count`` rounds, and the tasks that ran in it."""
    rounds, ran = variant.rounds, []
    assert rounds is not None
    do = rounds._do

    def watched(flight: Any, task: Any) -> None:
        cpu, begin = time.thread_time(), time.perf_counter()
        do(flight, task)
        end = time.perf_counter()
        ran.append(Ran(task.kind, threading.get_ident(), begin, end, time.thread_time() - cpu))

    rounds._do = watched  # type: ignore[method-assign]
    found = []
    try:
        for _ in range(count):
            begin = time.perf_counter()
            variant.step()
            found.append((time.perf_counter() - begin, list(ran)))
            ran.clear()
    finally:
        del rounds._do
    return found


def account(wall: float, ran: list[Ran], lanes: int) -> dict[str, float]:
    """Where ``lanes`` times ``wall`` seconds went.

    ``run``: processor time of tasks. ``blocked``: inside tasks without the processor (Python's lock, other processes).
    ``idle``: lanes that had no task: waits for another lane, the barrier, and what the engine does around a round.
    """
    busy = sum(r.end - r.begin for r in ran)
    run = sum(r.cpu for r in ran)
    return {"wall": wall, "run": run, "blocked": busy - run, "idle": lanes * wall - busy}


def in_line(variant: Variant, count: int) -> list[tuple[float, list[Ran]]]:
    """As `watched_rounds`, all tasks on the calling thread in the order of the schedule."""
    rounds = variant.rounds
    assert rounds is not None
    lanes, rounds._lanes = rounds._lanes, None
    try:
        return watched_rounds(variant, count)
    finally:
        rounds._lanes = lanes


def lanes_seconds(variant: Variant, count: int) -> list[float]:
    """Seconds of a round without tasks: threads woken, events set and waited for, the barrier."""
    rounds = variant.rounds
    assert rounds is not None and rounds.schedule is not None
    lanes, found = rounds._lanes, []
    for _ in range(0 if lanes is None else count):
        begin = time.perf_counter()
        lanes.run(rounds.schedule, [None] * len(rounds.schedule.tasks))  # type: ignore[union-attr]
        found.append(time.perf_counter() - begin)
    return found


def profile(variant: Variant, count: int = 5) -> dict[str, Any] | None:
    """Where a round's time goes, medians over ``count`` rounds; None for a variant that has no rounds.

    ``side`` and ``line``: `account` of rounds on their lanes and of rounds on the calling thread alone. ``host``: what the
    executor costs, seconds a step: a round in line less its tasks, and a round of the lanes without tasks. ``slower``: by
    kind, processor time of tasks beside others over that of the same tasks in line. ``promised``: the period of the schedule.
    """
    rounds = variant.rounds
    if rounds is None or rounds.schedule is None:
        return None
    lanes = rounds.schedule.streams if rounds._lanes is not None else 1
    side, line = watched_rounds(variant, count), in_line(variant, count)
    empty = lanes_seconds(variant, 20)
    kinds: list[dict[str, float]] = [defaultdict(float), defaultdict(float)]
    for i, rows in enumerate((side, line)):
        for _, ran in rows:
            for r in ran:
                kinds[i][r.kind] += r.cpu
    outside = statistics.median(wall - sum(r.end - r.begin for r in ran) for wall, ran in line)
    return {
        "lanes": lanes,
        "promised": rounds.schedule.plan.period,
        "side": _median([account(wall, ran, lanes) for wall, ran in side]),
        "line": _median([account(wall, ran, 1) for wall, ran in line]),
        "host": outside + (statistics.median(empty) if empty else 0.0),
        "slower": {kind: kinds[0][kind] / kinds[1][kind] for kind in kinds[1] if kinds[1][kind] > 0},
        "planned_bytes": rounds.schedule.plan.peak_bytes,
    }


def _median(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


# ----------------------------------------------------------------------------------------------------------------- the run


def measure(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant, two in every round.

    Who ran before shows in a step's time (idle threads, caches, freed memory), so the first step of a turn is not timed, and
    no variant always follows the same other.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    draw = random.Random(0)
    for _ in range(rounds):
        for name in draw.sample(list(steps), len(steps)):
            steps[name]()
            for _ in range(TIMED):
                begin = time.perf_counter()
                steps[name]()
                times[name].append(time.perf_counter() - begin)
    return times


def run_case(case: Case, rounds: int, threads: int, looks: int = 3) -> dict[str, Any]:
    """One record: seconds of every step of every variant, peaks, profiles, and what was left out and why."""
    torch.set_num_threads(threads)
    ready: dict[str, Variant] = {}
    left_out: dict[str, str] = {}
    settled: dict[str, float] = {}
    for name, make in variants(case).items():
        begin = time.perf_counter()
        try:
            variant = make()
            settle(variant)
        except Exception as error:
            if name in SCHEDULES:
                raise
            left_out[name] = (
                f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            )
            continue
        ready[name], settled[name] = variant, time.perf_counter() - begin
    seconds = measure({name: variant.step for name, variant in ready.items()}, rounds)
    return {
        "case": asdict(case),
        "name": case.name,
        "threads": threads,
        "rounds": rounds,
        "seconds": seconds,
        "settled": settled,
        "about": {name: variant.about for name, variant in ready.items()},
        "profile": {name: found for name, variant in ready.items() if (found := profile(variant, looks))},
        "peak_bytes": {name: peak_bytes(variant) for name, variant in ready.items()},
        "left_out": left_out,
    }


def ratio(record: dict[str, Any], name: str, base: str = BASE) -> float:
    """Steps per second of a variant over those of another, by medians."""
    seconds = record["seconds"]
    return statistics.median(seconds[base]) / statistics.median(seconds[name])


def text(record: dict[str, Any]) -> str:
    """A record as a table and sentences."""
    lines = [f"{record['name']}, {record['threads']} threads, {record['rounds']} rounds"]
    lines.append(f"  {'':14}{'ms/step':>9}{'best':>8}{'steps/s':>9}{'speed':>8}{'peak MiB':>10}{'host us':>9}")
    for name, times in record["seconds"].items():
        middle, host = statistics.median(times), record["profile"].get(name)
        lines.append(
            f"  {name:14}{middle * 1e3:9.1f}{min(times) * 1e3:8.1f}{1 / middle:9.2f}{ratio(record, name):8.3f}"
            f"{record['peak_bytes'][name] / 2**20:10.1f}" + (f"{host['host'] * 1e6:9.0f}" if host else f"{'':>9}")
        )
    for name, found in record["profile"].items():
        side, line = found["side"], found["line"]
        parts = ", ".join(f"{key} {side[key] * 1e3:.1f}" for key in ("run", "blocked", "idle"))
        slower = ", ".join(f"{kind} {factor:.2f}" for kind, factor in found["slower"].items())
        lines.append(
            f"  {name}: {found['lanes']} lanes x {side['wall'] * 1e3:.1f} ms = {parts}; in line {line['wall'] * 1e3:.1f} ms; "
            f"promised {found['promised'] * 1e3:.1f}; tasks beside others take {slower} times as long"
        )
    lines += [f"  {name}: {about}" for name, about in record["about"].items() if name == "auto"]
    lines += [f"  {name} left out: {why}" for name, why in record["left_out"].items()]
    return "\n".join(lines)


def rows(records: list[dict[str, Any]]) -> list[list[str]]:
    """For the generated table of the pages: a line for every case, speed over sequential, memory, and the executor's cost."""
    names, memory, host = SCHEDULES[1:], (BASE, *SCHEDULES[1:3], "BP"), SCHEDULES[1:3]
    head = ["", "sequential ms", *names, "BP", "BP compiled"]
    found = [[*head, f"peak MiB: {', '.join(memory)}", f"host us: {', '.join(host)}"]]
    for r in records:
        speeds = {name: f"{ratio(r, name):.2f}" for name in r["seconds"]}
        if r["about"].get("auto", "").startswith("schedule: sequential"):
            speeds["auto"] += " (sequential)"
        peaks = {name: f"{peak / 2**20:,.0f}" for name, peak in r["peak_bytes"].items()}
        hosts = {name: f"{of['host'] * 1e6:,.0f}" for name, of in r["profile"].items()}
        found.append(
            [
                r["name"],
                f"{statistics.median(r['seconds'][BASE]) * 1e3:,.1f}",
                *(speeds.get(name, "-") for name in (*names, "BP", "BP compiled")),
                " / ".join(peaks.get(name, "-") for name in memory),
                " / ".join(hosts.get(name, "-") for name in host),
            ]
        )
    return found


def read(path: Path = RESULTS) -> list[dict[str, Any]]:
    """The newest record of every case, in the order of the cases."""
    lines = path.read_text().splitlines() if path.exists() else []
    latest = {record["name"]: record for record in map(json.loads, lines)}
    order = [case.name for case in CASES.values()]
    return sorted(latest.values(), key=lambda r: order.index(r["name"]) if r["name"] in order else len(order))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"some of {','.join(CASES)} (all)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every variant, of two timed steps each (5)")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch (2)")
    parser.add_argument("--budget", type=float, default=120, help="seconds, on a CUDA device (120)")
    parser.add_argument("--record", action="store_true", help=f"append to {RESULTS.relative_to(RESULTS.parents[2])}")
    args = parser.parse_args(argv)
    if torch.cuda.is_available():
        return _on_a_gpu(args.budget, args.record)
    wanted = args.only.split(",") if args.only else list(CASES)
    if unknown := sorted(set(wanted) - CASES.keys()):
        parser.error(f"--only: there is no {', '.join(unknown)}; valid are {', '.join(CASES)}")
    for name in wanted:
        record = run_case(CASES[name], args.rounds, args.threads)
        print(text(record), flush=True)
        if args.record:
            RESULTS.parent.mkdir(parents=True, exist_ok=True)
            with RESULTS.open("a") as file:
                file.write(json.dumps(record | {"machine": info.collect()}, default=str) + "\n")
    return 0


def _on_a_gpu(budget: float, record: bool) -> int:
    from fastlocal.bench import gpu
    from fastlocal.bench.device import Cuda

    torch.backends.cudnn.benchmark = True
    sizes = gpu.Sizes(cases=gpu.schedule_cases(), operators=())
    records = gpu.Bench(sizes, Cuda(), RESULTS.with_name("schedules_gpu.jsonl") if record else None, budget).run()
    print(gpu.table(records))
    return int(any("error" in r for r in records))


if __name__ == "__main__":
    raise SystemExit(main())
