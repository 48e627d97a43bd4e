"""Steps per second of a local method: the official code or the plain loop of the same method, against fastlocal's engine.

    python -m fastlocal.bench.step_time --model resnet110 --method auglocal --blocks 55 --option depth=3 --batch 64

Every variant trains its own copy of the same initial weights on the same batch; the variants take turns, so that a slow minute
of the machine hits all of them. With ``--official DIR``, a checkout of the AugLocal repository, its own network joins in
(``auglocal`` and ``dgl``; NCHW fp32, its training loop's one SGD and its ``.item()``).
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastlocal as fl
from fastlocal import info
from fastlocal.reference import train_step

SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}


def variants(model: fl.LocalModel, x: torch.Tensor, y: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """Name -> one training step. Each has its own copy of the model."""

    def plain() -> Callable[[], Any]:
        own = copy.deepcopy(model)
        optimizer = torch.optim.SGD(own.parameters(), **SGD)
        return lambda: float(train_step(own, (x, y), optimizer)[-1])  # official loops read the loss every step

    def engine(precision: str, memory_format: str) -> Callable[[], Any]:
        run = fl.Engine(
            copy.deepcopy(model),
            lambda named: torch.optim.SGD(named, **SGD),
            precision=precision,
            memory_format=memory_format,  # type: ignore[arg-type]
        )
        return lambda: float(run.step(x, y).losses[-1])

    return {
        "plain loop, fp32 NCHW": plain(),
        "fastlocal, fp32 NCHW": engine("32-true", "preserve"),
        "fastlocal, fp32 channels_last": engine("32-true", "channels_last"),
        "fastlocal, bf16 channels_last": engine("bf16-mixed", "channels_last"),
    }


def backprop(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], Any]:
    """End-to-end backprop of the same backbone, for scale."""
    own = copy.deepcopy(net)
    optimizer = torch.optim.SGD(own.parameters(), **SGD)

    def step() -> float:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(own(x), y)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def official(folder: str, args: argparse.Namespace, options: dict[str, Any]) -> Callable[[], Any]:
    """The AugLocal repository's own network and loop, on a CPU."""
    sys.path.insert(0, folder)
    torch.Tensor.cuda = lambda self, *a, **k: self  # type: ignore[method-assign,assignment]
    from networks import resnet  # type: ignore[import-not-found]

    rule = {"auglocal": "AugLocal", "dgl": "DGL"}[args.method]
    depth = options.get("depth", 0)
    net = getattr(resnet, args.model)(
        local_module_num=args.blocks - depth, batch_size=args.batch, image_size=32, dataset="cifar10", class_num=10,
        wide_list=(16, 16, 32, 64), dropout_rate=0, aux_net_config="unifSamp" if rule == "AugLocal" else "DGL",
        aux_net_config_aux_loss="2c", aux_net_feature_dim=128, hidden_dim=512, rule=rule, aux_net_depth=depth,
        is_pyramid=rule == "AugLocal", paramid_coeff=0.5,
    )  # fmt: skip
    optimizer = torch.optim.SGD(net.parameters(), **SGD)
    x, y = torch.randn(args.batch, 3, 32, 32), torch.randint(0, 10, (args.batch,))

    def step() -> float:
        optimizer.zero_grad()
        loss = net(x, y, ixx_1=0, ixy_1=1, ixx_2=0, ixy_2=1)[1]
        optimizer.step()
        return float(loss.detach())

    return step


def measure(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant, one step a turn, after one turn of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet110")
    parser.add_argument("--method", default="auglocal")
    parser.add_argument("--blocks", type=int, default=55)
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="a method option; repeatable"
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--official", metavar="DIR", help="a checkout of the AugLocal repository")
    parser.add_argument("--json", type=Path, help="append the record to this .jsonl file")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    options: dict[str, Any] = {}
    for pair in args.option:
        name, _, value = pair.partition("=")
        options[name] = json.loads(value) if value[:1] in "0123456789-[{tfn" else value
    torch.manual_seed(0)
    x, y = torch.randn(args.batch, 3, 32, 32), torch.randint(0, 10, (args.batch,))
    net = fl.models.create(args.model)
    steps: dict[str, Callable[[], Any]] = {"BP, fp32 NCHW": backprop(net, x, y)}
    if args.official:
        steps["official code, fp32 NCHW"] = official(args.official, args, options)
    steps |= variants(fl.localize(net, args.method, blocks=args.blocks, sample=x[:2], **options), x, y)
    times = measure(steps, args.rounds)
    base = statistics.median(times.get("official code, fp32 NCHW", times["plain loop, fp32 NCHW"]))
    print(
        f"{args.model}, {args.method} K={args.blocks} {options}, batch {args.batch}, {args.threads} threads, {args.rounds} rounds"
    )
    print(f"{'':34}{'ms/step':>10}{'best':>9}{'ratio':>8}")
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        print(f"{name:34}{middle * 1e3:10.0f}{min(seconds) * 1e3:9.0f}{base / middle:8.2f}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "case": vars(args) | {"json": None, "official": bool(args.official)},
            "seconds": times,
            "machine": info.collect(),
        }
        with args.json.open("a") as file:
            file.write(json.dumps(record, default=str) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
