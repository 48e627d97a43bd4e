"""The deep end: a network of a thousand layers planned at a batch that back-propagation has no memory for, then trained a little.

    python -m fastlocal.bench.deep [--model resnet1202] [--batch 128] [--budget 4GiB] [--rows 8] [--steps 3] [--record]

For back-propagation and for every method at 16 blocks and at the fewest blocks that fit the budget: the planned peak of a
step at ``--batch``, what planning and cutting take, and a training at ``--rows`` whose tracked peak stands beside the plan
of that step.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

import fastlocal as fl
from fastlocal import info, models
from fastlocal.blocks.measure import StorageTracker
from fastlocal.engine.localize import parse_bytes

RESULTS = Path(__file__).resolve().parent / "results" / "deep.jsonl"
CASES: list[tuple[str, int | Literal["auto"]]] = [
    ("bp", 1),
    ("dgl", 16),
    ("auglocal", 16),
    ("dgl", "auto"),
    ("auglocal", "auto"),
]


def sgd(named: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(named, lr=1e-3, momentum=0.9)


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What it returns, and the seconds of processor time that it took: with one thread, those of a machine to itself."""
    start = time.process_time()
    return call(), time.process_time() - start


def measure(
    name: str, method: str, blocks: int | Literal["auto"], *, batch: int, budget: str, rows: int, steps: int
) -> dict[str, Any]:
    """One case: plans for ``batch`` and for ``rows``, and ``steps`` steps of ``rows`` with every storage tracked.

    The tracked peak is that of the steps after the first, which makes the optimizer's state; weights, state and batch are
    in it. ``step_seconds`` is one step more, without the tracker.
    """
    torch.manual_seed(0)
    x, y = torch.randn(rows, 3, 32, 32), torch.randint(0, 10, (rows,))
    auto: dict[str, Any] = {"memory_budget": budget, "budget_batch": batch} if blocks == "auto" else {}
    net = models.create(name)
    model, cut_seconds = timed(
        lambda: fl.localize(net, method, blocks=blocks, sample=torch.randn(2, 3, 32, 32), **auto)
    )
    images = torch.empty(batch, 3, 32, 32, device="meta")
    how: dict[str, Any] = {"blocks": "auto", "budget": budget} if auto else {"blocks": blocks}
    plan, plan_seconds = timed(
        lambda: fl.plan(lambda: models.create(name), images, method=method, device="cpu-core", **how)
    )
    small = fl.plan(model, (x, y), device="cpu-core")  # the operators that run below
    storages, losses = StorageTracker(), []
    with storages:
        own = copy.deepcopy(model)
        engine = fl.Engine(own, sgd)
        call = x.clone(), y.clone()
        for step in range(steps):
            if step == 1:
                gc.collect()
                storages.mark("step")
            losses.append(engine.step(*call).losses[-1].item())
    step_seconds = timed(lambda: engine.step(*call).losses[-1].item())[1]
    return {
        "method": method,
        "asked": blocks,
        "blocks": len(model.blocks),
        "parameters": sum(p.numel() for p in model.parameters()),
        "planned": plan.peak_bytes,
        "planned_blocks": len(plan.blocks),
        "cut_seconds": cut_seconds,
        "plan_seconds": plan_seconds,
        "planned_small": small.peak_bytes,
        "tracked_small": storages.peaks["step"],
        "step_seconds": step_seconds,
        "losses": losses,
    }


def table(record: dict[str, Any]) -> str:
    """The record's cases as Markdown. K is what was asked for; AugLocal makes one block of its last ones."""
    batch, rows = record["case"]["batch"], record["case"]["rows"]
    lines = [
        f"| method | K | blocks | parameters | planned GiB, batch {batch} | planned MiB, batch {rows} | tracked MiB, batch {rows} | "
        "cut s | plan s | step s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in record["cases"]:
        cells = (
            r["method"],
            str(r["asked"]),
            str(r["blocks"]),
            f"{r['parameters'] / 1e6:.1f} M",
            f"{r['planned'] / 2**30:.2f}",
            f"{r['planned_small'] / 2**20:,.1f}",
            f"{r['tracked_small'] / 2**20:,.1f}",
            *(f"{r[key]:.1f}" for key in ("cut_seconds", "plan_seconds", "step_seconds")),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet1202", help="(resnet1202)")
    parser.add_argument("--batch", type=int, default=128, help="rows of the planned step (128)")
    parser.add_argument("--budget", default="4GiB", help="for the fewest blocks (4GiB)")
    parser.add_argument("--rows", type=int, default=8, help="rows of the steps that are trained (8)")
    parser.add_argument("--steps", type=int, default=3, help="how many of them are tracked, at least 2 (3)")
    parser.add_argument("--threads", type=int, default=1, help="(1)")
    parser.add_argument("--record", action="store_true", help=f"append to {RESULTS.relative_to(RESULTS.parents[2])}")
    args = parser.parse_args(argv)
    if args.steps < 2:
        parser.error(f"--steps: got {args.steps}; the first step makes the optimizer's state, so give at least 2")
    budget = parse_bytes(args.budget)
    torch.set_num_threads(args.threads)
    how = {"batch": args.batch, "budget": args.budget, "rows": args.rows, "steps": args.steps}
    record: dict[str, Any] = {"case": {"model": args.model, "threads": args.threads} | how, "cases": []}
    for method, blocks in CASES:
        record["cases"].append(measure(args.model, method, blocks, **how))
        found = record["cases"][-1]
        fits = "within" if found["planned"] <= budget else "over"
        print(
            f"{method:9} K={found['blocks']:<4} {found['planned']:>15,} bytes planned at batch {args.batch}, {fits} {args.budget}; "
            f"at batch {args.rows} {found['planned_small']:>13,} planned, {found['tracked_small']:>13,} tracked; "
            f"loss of the last block {found['losses'][0]:.3f} to {found['losses'][-1]:.3f}",
            flush=True,
        )
    print(table(record))
    if args.record:
        record["machine"] = info.collect()
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(record, default=str) + "\n")
    held = all(abs(r["planned_small"] / r["tracked_small"] - 1) <= 0.1 for r in record["cases"])
    fit = all(r["planned"] <= budget for r in record["cases"] if r["method"] != "bp")
    finite = all(math.isfinite(loss) for r in record["cases"] for loss in r["losses"])
    return 0 if held and fit and finite else 1


if __name__ == "__main__":
    raise SystemExit(main())
