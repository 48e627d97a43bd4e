"""How long the native scheduler takes, and how close to the bound its rounds are: steps of K blocks with five tasks each.

    python -m fastlocal.bench.scheduler_time --record

The time is that of the whole call from Python, conversions included, on its one thread's own clock, so that other load counts
little: the shortest of some repetitions. `period` is in units of its
lower bound, the larger of the work for each stream and the largest block; `peak` is in units of the largest block's bytes.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

from fastlocal import info
from fastlocal.engine import _native

RECORDS = Path(__file__).parent / "results" / "scheduler.jsonl"
PARTS = (1.0, 0.3, 2.0, 0.2, 0.0)  # forward, head, backward, update, free of the previous block's boundary
INSIDE, HEAD, BOUNDARY = 100, 3, 10  # bytes that a forward keeps for its backward, that a head needs, that go on


def step(blocks: int, seed: int = 0) -> dict[str, Any]:
    """Arguments of `pipeline` for one step of blocks whose costs vary by a factor of three."""
    rng = random.Random(seed)
    edges: list[tuple[int, int, int]] = []
    for k in range(blocks):
        forward, head, backward, update, free = range(5 * k, 5 * k + 5)
        edges += [(forward, head, 0), (head, backward, 0), (backward, update, 0), (update, forward, 1)]
        edges += [(backward, free, 0)]
        if k:
            edges += [(forward - 5, forward, 0), (backward, free - 5, 0)]
    return {
        "cost": [part * rng.uniform(0.5, 1.5) for _ in range(blocks) for part in PARTS],
        "edges": edges,
        "bytes_made": [INSIDE + BOUNDARY, HEAD, 0, 0, 0] * blocks,
        "bytes_freed": [0, HEAD, INSIDE, 0, BOUNDARY] * blocks,
        "group": [task // 5 for task in range(5 * blocks)],
    }


def measure(blocks: int, streams: int, in_flight: int, budget: int | None, repeat: int) -> dict[str, Any]:
    arguments = step(blocks)
    seconds = []
    for _ in range(repeat):
        start = time.thread_time()
        plan = _native.pipeline(**arguments, streams=streams, in_flight=in_flight, memory_budget=budget)
        seconds.append(time.thread_time() - start)
    cost = arguments["cost"]
    bound = max(sum(cost) / streams, *(sum(cost[5 * k : 5 * k + 5]) for k in range(blocks)))
    return {
        "tasks": 5 * blocks,
        "streams": streams,
        "in_flight": in_flight,
        "budget": budget,
        "seconds": seconds,
        "period": plan.period / bound,
        "taken": plan.in_flight,
        "peak": plan.peak_bytes / (INSIDE + BOUNDARY + HEAD),
        "pools": len(set(plan.pools)),
        "operations": plan.operations,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=[80, 275, 1_000, 10_000, 100_000])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 8])
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--budget", type=int, help="bytes; a block has 113")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--record", action="store_true", help=f"append the table to {RECORDS.name}")
    args = parser.parse_args(argv)
    print(f"{'tasks':>8}{'streams':>8}{'in flight':>10}{'taken':>6}{'ms':>9}{'period':>8}{'peak':>8}{'pools':>7}")
    rows = []
    for tasks in args.tasks:
        for streams in args.streams:
            for in_flight in args.in_flight:
                row = measure(max(1, tasks // 5), streams, in_flight, args.budget, args.repeat)
                rows.append(row)
                print(
                    f"{row['tasks']:8}{streams:8}{in_flight:10}{row['taken']:6}{min(row['seconds']) * 1e3:9.1f}"
                    f"{row['period']:8.3f}{row['peak']:8.1f}{row['pools']:7}"
                )
    if args.record:
        RECORDS.parent.mkdir(parents=True, exist_ok=True)
        with RECORDS.open("a") as file:
            file.write(json.dumps({"rows": rows, "machine": info.collect()}, default=str) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
