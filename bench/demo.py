"""`python -m fastlocal.bench.demo`: a ResNet-20 learns handwritten digits by BP, DGL and AugLocal, in about a minute.

Every method runs twice from the same weights on the same batches: as its plain loop (`fastlocal.reference.train_step`
with one torch.optim.SGD over all parameters, NCHW) and by `fastlocal.Engine` (channels_last, one optimizer per block).
Both are fp32. The two take turns, epoch by epoch, so that a busy machine slows both. Every printed number is measured
in this run.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fastlocal as fl
from fastlocal import models
from fastlocal.bench import plots
from fastlocal.bench.loop import History, Loop, Step
from fastlocal.blocks.measure import measure_step
from fastlocal.data import Batches, Images, load
from fastlocal.engine.model import LocalModel
from fastlocal.errors import ArgumentError, FastLocalError
from fastlocal.info import collect
from fastlocal.reference import train_step
from fastlocal.trainer import cosine, save
from fastlocal.trainer.progress import Bar

METHODS = {"bp": "BP", "dgl": "DGL", "auglocal": "AugLocal"}
PLAIN, FAST = "plain", "fastlocal"
LR, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 5e-4


@dataclass
class Side:
    """One method by one loop: its step, its model and optimizer."""

    method: str
    loop: str
    model: LocalModel
    step: fl.Engine | Step
    optimizer: torch.optim.Optimizer


def sides(method: str, images: Images, *, seed: int, network: str = "resnet20") -> list[Side]:
    """The plain loop of a method and fastlocal's, on models of equal weights; every unit is a block."""
    torch.manual_seed(seed)
    net = models.create(network, num_classes=images.num_classes, in_channels=images.shape[0])
    blocks = 1 if method == "bp" else len(net.units())  # type: ignore[operator]
    x, _ = next(Batches(images, batch_size=2).epoch(0))
    plain = fl.localize(net, method, blocks=blocks, sample=x)
    return [plain_side(method, copy.deepcopy(plain)), fast_side(method, plain)]


def plain_side(method: str, model: LocalModel) -> Side:
    # foreach is what torch.optim.SGD chooses by itself on a GPU; without it the launches below would be a loop's
    optimizer = torch.optim.SGD(
        model.parameters(), LR, momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY, foreach=True
    )
    return Side(method, PLAIN, model, lambda x, y: train_step(model, (x, y), optimizer), optimizer)


def fast_side(method: str, model: LocalModel) -> Side:
    engine = fl.Engine(
        model,
        lambda named: torch.optim.SGD(named, LR, momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY),
        memory_format="channels_last",
    )
    return Side(method, FAST, model, engine, engine.optimizer)


def count(side: Side, batch: tuple[torch.Tensor, torch.Tensor]) -> dict[str, Any]:
    """Launches, peak saved bytes of one step (optimizer included) on a copy of the side's model."""
    model = copy.deepcopy(side.model).train()
    twin = (plain_side if side.loop == PLAIN else fast_side)(side.method, model)
    take: Any = twin.step.step if isinstance(twin.step, fl.Engine) else twin.step
    take(*batch)  # the first step also makes the momentum buffers
    for parameter in model.parameters():
        parameter.grad = None
    measured = measure_step(lambda: take(*batch), [*model.parameters(), *model.buffers()])
    return {"launches": measured.launches, "saved_mib": round(measured.saved_peak / 2**20, 4)}


def run(
    images: Images, methods: list[str], *, epochs: int, batch_size: int, seed: int, network: str = "resnet20"
) -> tuple[list[dict[str, Any]], list[History], dict[str, LocalModel]]:
    """Trains and measures.

    Returns:
        Rows of the table (plain before fastlocal), the histories in that order, fastlocal's trained models by method.
    """
    rows, histories, trained = [], [], {}
    for method in methods:
        pair = sides(method, images, seed=seed, network=network)
        train = Batches(images, batch_size=batch_size, seed=seed)
        test = Batches(images, train=False, batch_size=500)
        batch = next(train.epoch(0))
        counts = [count(side, batch) for side in pair]  # also the warm-up
        steps = epochs * len(train)
        loops = [
            Loop(s.step, train, test, model=s.model, scheduler=cosine(s.optimizer, steps, steps // 20)) for s in pair
        ]
        with Bar(2 * steps, METHODS[method]) as bar:
            for epoch in range(epochs):
                for i in (0, 1) if epoch % 2 == 0 else (1, 0):
                    bar.label = f"{METHODS[method]:<8} {pair[i].loop:<9} {epoch + 1}/{epochs}"
                    bar.accuracy = loops[i].epoch(bar.step).test_accuracy
        for side, loop, counted in zip(pair, loops, counts):
            measured = {
                "method": METHODS[method],
                "loop": side.loop,
                "blocks": len(side.model.blocks),
                "batch_size": batch_size,
                "test_accuracy": round(loop.history.test_accuracy, 6),
                "steps_per_second": round(loop.history.steps_per_second, 2),
            }
            rows.append(measured | counted)
            histories.append(loop.history)
        trained[method] = pair[1].model
    return rows, histories, trained


HEADER = ("method", "blocks", "loop", "test accuracy", "steps/s", "launches/step", "peak saved MiB")


def cells(row: dict[str, Any]) -> list[str]:
    return [
        row["method"], str(row["blocks"]), row["loop"], f"{row['test_accuracy']:.1%}", f"{row['steps_per_second']:.1f}",
        str(row["launches"]), f"{row['saved_mib']:.2f}",
    ]  # fmt: skip


def table(rows: list[dict[str, Any]], markdown: bool = False) -> str:
    """The rows as aligned text, or as a markdown table."""
    lines = [list(HEADER), *map(cells, rows)]
    if markdown:
        rule = ["---"] * 3 + ["---:"] * 4
        return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    text = [
        "  ".join(c.ljust(w) if i in (0, 2) else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths)))
        for line in lines
    ]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def notes(batch_size: int) -> list[str]:
    """What the columns mean."""
    return [
        "plain: the method's step in ordinary PyTorch, NCHW, one SGD over all parameters; fastlocal: fl.Engine, "
        "channels_last. Both fp32, from the same weights, on the same batches, taking turns.",
        "steps/s: 1 / median step time. launches/step: operators that do work, optimizer included; multi-tensor ones "
        "count as a GPU would launch them.",
        f"peak saved: most bytes held for the backward at any moment of a step on {batch_size} images, parameters aside.",
    ]


def machine() -> dict[str, Any]:
    found = collect()
    return {
        "cpu": found["cpu"]["name"],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": found["python"],
        "torch": found["torch"]["version"],
        "fastlocal": found["fastlocal"],
    }


def main(arguments: list[str] | None = None) -> int:
    """Runs the demo; 0, or 2 for a bad argument."""
    parser = argparse.ArgumentParser(prog="fastlocal bench demo", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for what it writes (runs/demo)")
    parser.add_argument("--epochs", type=int, default=6, help="epochs of every run (6)")
    parser.add_argument("--batch-size", type=int, default=64, help="images a step (64)")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), help="which methods (all three)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and order (0)")
    parser.add_argument(
        "--threads", type=int, default=1,
        help="threads of PyTorch (1: maps this small gain little from more, and lose much on a busy machine)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        return _main(options)
    except FastLocalError as error:
        print(f"fastlocal bench demo: {error}", file=sys.stderr)
        return 2


def _main(options: argparse.Namespace) -> int:
    for name in ("epochs", "threads"):
        if getattr(options, name) < 1:
            raise ArgumentError(f"--{name}: got {getattr(options, name)}; give at least 1")
    images = load("digits")
    torch.set_num_threads(options.threads)
    about = machine()
    print(f"{images!r}; real scans, from scikit-learn")
    print(
        f"ResNet-20, {options.epochs} epochs, batch {options.batch_size}, {about['cpu']}, {options.threads} thread(s)",
        flush=True,
    )

    begin = time.perf_counter()
    rows, histories, trained = run(
        images, options.methods, epochs=options.epochs, batch_size=options.batch_size, seed=options.seed
    )
    seconds = time.perf_counter() - begin

    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    print(f"\n{table(rows)}\n")
    explained = notes(options.batch_size)
    print("\n".join(explained))
    command = " ".join(["python -m fastlocal.bench.demo", *_changed(options)])
    title = (
        f"ResNet-20 on scikit-learn's digits: {options.epochs} epochs, batch {options.batch_size}, fp32\n"
        f"{about['cpu']}, {options.threads} thread{'s' * (options.threads > 1)}, torch {about['torch']}"
    )
    record = {
        "command": command,
        "machine": about,
        "training_seconds": round(seconds, 1),
        "rows": rows,
        "notes": explained,
    }
    (out / "table.json").write_text(json.dumps(record, indent=2) + "\n")
    (out / "table.md").write_text("\n\n".join([table(rows, markdown=True), *explained, f"{title}: `{command}`"]) + "\n")
    for row, history in zip(rows, histories):
        history.write(out / f"{row['method'].lower()}-{row['loop']}.csv")
    for method, model in trained.items():
        save(out / f"{method}.safetensors", model, {"data": "digits", "model": "resnet20", "epochs": options.epochs})
    try:
        plots.comparison(out / "demo.png", rows, histories, title)
        picture = str(out / "demo.png")
    except FastLocalError as error:
        picture = f"none ({error})"
    print(f"\ntrained and measured in {seconds:.0f} s")
    print(f"picture     {picture}")
    print(f"table       {out / 'table.md'}, {out / 'table.json'}")
    print(f"checkpoint  {', '.join(str(out / f'{method}.safetensors') for method in trained)}")
    print("next        fastlocal train --model resnet32 --data digits --method auglocal --blocks 16 --epochs 2")
    return 0


def _changed(options: argparse.Namespace) -> list[str]:
    """The options that shape the numbers, as typed."""
    return [
        f"--epochs {options.epochs}", f"--batch-size {options.batch_size}", f"--threads {options.threads}",
        f"--seed {options.seed}", f"--methods {' '.join(options.methods)}",
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
