"""Steps per second of a local method: the official code or the plain loop of the same method, against fastlocal's engine.

    python -m fastlocal.bench.step_time --model resnet110 --method auglocal --blocks 55 --option depth=3 --batch 64

Every variant trains its own copy of the same initial weights on the same batch; the variants take turns, so that a slow minute
of the machine hits all of them. With ``--official DIR``, a checkout of the repository that published the method (CIFAR
networks), its own network joins in: NCHW fp32, its training loop's one SGD and its ``.item()``.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import fastlocal as fl
from fastlocal import info
from fastlocal.errors import ArgumentError
from fastlocal.methods.infopro import NORMALISATION
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


def backprop(net: nn.Module, x: torch.Tensor, y: torch.Tensor, compiled: bool = False) -> Callable[[], Any]:
    """End-to-end backprop of the same backbone, for scale; ``compiled``: every unit by ``torch.compile``."""
    own: Any = copy.deepcopy(net)
    for _, unit in own.units() if compiled else ():
        if isinstance(unit, nn.Module):
            unit.compile(dynamic=False)
    optimizer = torch.optim.SGD(own.parameters(), **SGD)

    def step() -> float:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(own(x), y)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


class Rival(NamedTuple):
    """A network file of an official repository: ``folder/file.py``, arguments beyond the common ones, weights of losses."""

    file: str
    arguments: dict[str, Any]
    weights: tuple[float, float, float, float] = (0, 1, 0, 1)


_FAMILY = {
    "aux_net_config": "2c2f", "local_loss_mode": "cross_entropy", "aux_net_widen": 1.0, "aux_net_feature_dim": 128,
    "balanced_memory": False,
}  # fmt: skip
_AUGLOCAL = {"aux_net_config_aux_loss": "2c", "aux_net_feature_dim": 128, "hidden_dim": 512, "paramid_coeff": 0.5}


def rival(method: str, blocks: int, options: dict[str, Any]) -> Rival:
    """What the official code calls this run. Raises ArgumentError where it has no such network."""
    depth = options.get("depth", 2) if method == "auglocal" else 0
    if method in ("auglocal", "dgl", "predsim") or (method, options.get("loss")) == ("infopro", "cross_entropy"):
        rule, config = {
            "auglocal": ("AugLocal", "unifSamp"), "dgl": ("DGL", "DGL"), "predsim": ("PredSim", "PredSim"),
            "infopro": ("InfoPro", "InfoPro"),
        }[method]  # fmt: skip
        own = {"local_module_num": blocks - depth, "rule": rule, "aux_net_config": config, "aux_net_depth": depth}
        weights = (5.0, 0.05, 0.2, 0.5) if method == "infopro" else (0, 1, 0, 1)
        return Rival("networks/resnet", _AUGLOCAL | own | {"is_pyramid": rule == "AugLocal"}, weights)
    family = _FAMILY | {"local_module_num": blocks}
    lam = (5, 0.5, 0, 0)
    if method == "infopro":
        family |= {"aux_net_config": "1c2f", "local_loss_mode": "contrast"}
        return Rival("networks/resnet", family, (5, 0.05, 0.2, 0.5))
    average = {"momentum": 0.995}
    streams = {"wx": 0.001, "wy": 0.999}
    if method == "man_plus_plus":
        head = {"dgl": "DGL", "infopro": "InfoPro"}[options.get("head", "infopro")]
        return Rival(f"networks/resnet{head}_MANPP", family | average, lam)
    known = {
        "man": Rival("networks/resnetInfoPro_MAN", family | average, lam),
        "hpff": Rival("network/resnetInfoPro_HPFF", family | streams, lam),
        "mlaan": Rival("networks/resnetMLAAN", family | average | streams, (0, 0, 0, 0)),
    }
    if method not in known:
        raise ArgumentError(f"--official: no official network is known for {method!r}; leave it out")
    return known[method]


def official(folder: str, args: argparse.Namespace, options: dict[str, Any]) -> Callable[[], Any]:
    """The official repository's own network and loop, on a CPU."""
    other = rival(args.method, args.blocks, options)
    found = sorted(
        Path(folder).rglob(f"{other.file}.py"), key=lambda path: ("imagenet" in str(path).lower(), str(path))
    )
    if not found:
        raise ArgumentError(f"--official: {folder} has no {other.file}.py; give a checkout of the method's repository")
    sys.path.insert(0, str(found[0].parents[1]))
    torch.Tensor.cuda = lambda self, *a, **k: self  # type: ignore[method-assign,assignment]
    nn.Module.cuda = lambda self, *a, **k: self  # type: ignore[method-assign,assignment]
    module = importlib.import_module(other.file.replace("/", "."))
    net = getattr(module, args.model)(
        batch_size=args.batch, image_size=32, dataset="cifar10", class_num=10, wide_list=(16, 16, 32, 64), dropout_rate=0,
        **other.arguments,
    )  # fmt: skip
    optimizer = torch.optim.SGD(net.parameters(), **SGD)
    x, y = torch.randn(args.batch, 3, 32, 32), torch.randint(0, 10, (args.batch,))
    weights = dict(zip(("ixx_1", "ixy_1", "ixx_2", "ixy_2"), other.weights))
    if other.weights[0]:  # its image loss takes images in [0, 1]
        mean, std = (torch.tensor(NORMALISATION["cifar10"][i]).view(3, 1, 1) for i in range(2))
        x = (torch.rand_like(x) - mean) / std

    def step() -> float:
        optimizer.zero_grad()
        loss = next(out for out in net(x, y, **weights) if out.dim() == 0)  # HPFF returns two streams' logits before it
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
    parser.add_argument("--official", metavar="DIR", help="a checkout of the repository that published the method")
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
    mode = "official" if args.official else "paper"  # the same losses as the rival's
    steps |= variants(fl.localize(net, args.method, blocks=args.blocks, sample=x[:2], mode=mode, **options), x, y)
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
