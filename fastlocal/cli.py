"""The command line, ``fastlocal``: train, plan, bench, info, methods, models. Every command is a few calls of the library."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastlocal._version import __version__
from fastlocal.errors import ArgumentError, FastLocalError, did_you_mean

BENCHES = {
    "demo": "ResNet-20 on digits under BP, DGL and AugLocal: one table and one picture",
    "ledger": "launches, block passes, MACs and saved bytes of a step of every method",
    "step_time": "milliseconds of a step: plain loop or official code against the engine, in turns",
}
OPTIMIZERS = {"sgd": (0.1, 5e-4), "adamw": (1e-3, 0.05)}  # default learning rate and weight decay

_Raw = argparse.RawDescriptionHelpFormatter

EXAMPLES = """examples:
  fastlocal train
  fastlocal train --model resnet32 --data digits --method auglocal --blocks 16 --epochs 2
  fastlocal train --model resnet20 --data cifar.npz --method infopro --blocks 4 --crop 4 --flip --epochs 50
  fastlocal train --model vit_tiny --model-option patch_size=2 --method dgl --optimizer adamw
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; 0, 1 where a bench says so, 2 for a bad argument (one line on stderr), 130 for Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except FastLocalError as error:
        print(f"fastlocal: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastlocal: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastlocal", description="Train networks as gradient-isolated blocks.")
    parser.add_argument("--version", action="version", version=f"fastlocal {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _train_parser(commands)
    _plan_parser(commands)
    bench = commands.add_parser("bench", help="run a measurement", description=_benches(), formatter_class=_Raw)
    bench.add_argument("name", nargs="?", metavar="NAME", help="which")
    bench.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="its own options; see NAME --help")
    bench.set_defaults(run=_bench)
    info = commands.add_parser("info", help="versions, what was built, and what this machine has")
    info.add_argument("--json", action="store_true", help="one JSON object")
    info.set_defaults(run=_info)
    commands.add_parser("methods", help="list the methods with their options").set_defaults(run=_methods)
    commands.add_parser("models", help="list the models with their options").set_defaults(run=_models)
    return parser


def _train_parser(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train a model on images",
        description="Trains a model of fastlocal.models on images in memory; without options resnet20, digits, auglocal.",
        epilog=EXAMPLES,
        formatter_class=_Raw,
    )
    add = train.add_argument
    add("--model", default="resnet20", help="see `fastlocal models` (resnet20)")
    add(
        "--model-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the model; may be repeated",
    )
    add("--data", default="digits", metavar="digits|PATH.npz", help="digits, or uint8 x_train, y_train, x_test, y_test")
    add("--method", default="auglocal", help="see `fastlocal methods` (auglocal)")
    add("--mode", default="paper", help="paper or official (paper)")
    add("--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the method; may be repeated")
    add("--blocks", metavar="N|NAMES|auto", help="how many, or names to cut after (a,b), or auto (every unit; bp: 1)")
    add("--memory-budget", metavar="4GiB", help="for --blocks auto, of one batch")
    add("--epochs", type=int, default=10, help="(10)")
    add("--batch-size", type=int, default=64, help="(64)")
    add("--optimizer", choices=OPTIMIZERS, default="sgd", help="sgd (Nesterov momentum 0.9) or adamw (sgd)")
    add("--lr", type=float, help="top of the cosine (sgd 0.1, adamw 0.001)")
    add("--weight-decay", type=float, help="(sgd 0.0005, adamw 0.05)")
    add("--warmup", type=float, default=0.05, help="fraction of the steps in which the learning rate rises (0.05)")
    add("--crop", type=int, default=0, metavar="PIXELS", help="random crops with this reflected border (0: off)")
    add("--flip", action="store_true", help="random mirroring")
    add("--precision", default="32-true", help="32-true, bf16-mixed or 16-mixed (32-true)")
    add(
        "--channels-last",
        action=argparse.BooleanOptionalAction,
        help="memory format (on where the network has 2-d convolutions)",
    )
    add("--device", default="auto", help="auto, cpu, cuda, ... (auto: cuda if there is one)")
    add("--threads", type=int, help="CPU threads of PyTorch (its own default)")
    add("--seed", type=int, default=0, help="of weights, order, crops and flips (0)")
    add(
        "--out",
        type=Path,
        help="folder for config.json, log.csv, checkpoint.safetensors, curves.png (a new one in runs/)",
    )
    add("--quiet", action="store_true", help="no progress bar")
    train.set_defaults(run=_train)


def _plan_parser(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        help="what a training step will cost, without running one",
        description="Predicts memory, FLOPs, bytes moved, launches and roofline time of a step. Needs no device and no data.",
        epilog="example:\n  fastlocal plan --model vit_base --method dgl --batch 256 --device h100 --budget 16GiB",
        formatter_class=_Raw,
    )
    add = plan.add_argument
    add("--model", default="resnet20", help="see `fastlocal models` (resnet20)")
    add("--model-option", action="append", default=[], metavar="NAME=VALUE", help="an option of the model; repeatable")
    add("--method", default="auglocal", help="see `fastlocal methods` (auglocal)")
    add("--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the method; repeatable")
    add("--blocks", metavar="N|NAMES", help="how many, or names to cut after (a,b) (every unit; bp: 1)")
    add(
        "--budget",
        metavar="16GiB",
        help="without --blocks: the fewest blocks that fit; with it: exit code 1 if too large",
    )
    add("--batch", type=int, default=64, metavar="ROWS", help="(64)")
    add("--shape", metavar="3x224x224", help="of one input (what the model says, else 3x32x32 or 3x224x224)")
    add("--device", default="h100", help="whose roofline: h100, h200, a100, cpu-core (h100)")
    add("--optimizer", default="momentum", help="sgd, momentum or adam (momentum)")
    add("--precision", default="32-true", help="32-true, bf16-mixed or 16-mixed (32-true)")
    add("--channels-last", action="store_true", help="plan that memory format")
    add("--draw", type=Path, metavar="PATH", help="write a chart, such as plan.png")
    plan.set_defaults(run=_plan)


# ---------------------------------------------------------------------------------------------------------------- train


def _train(o: argparse.Namespace) -> int:
    from fastlocal import trainer
    from fastlocal.data import Batches, load
    from fastlocal.engine.engine import Engine
    from fastlocal.engine.localize import localize

    _check(o)
    if o.threads is not None:
        torch.set_num_threads(o.threads)
    torch.manual_seed(o.seed)
    device = _device(o.device)
    images = load(o.data).to(device)
    train = Batches(images, batch_size=o.batch_size, seed=o.seed, crop=o.crop, flip=o.flip)
    test = Batches(images, train=False, batch_size=max(256, o.batch_size))
    x = next(train.epoch(0))[0][:2]
    net = _network(o, images.shape, images.num_classes).to(device)
    _try(net, x, o)
    model = localize(
        net,
        o.method,
        blocks=_blocks(o, net),
        sample=x,
        mode=o.mode,
        num_classes=images.num_classes,
        memory_budget=o.memory_budget,
        budget_batch=o.batch_size if o.memory_budget else None,
        **_method_options(o, images),
    )
    lr, decay = OPTIMIZERS[o.optimizer]
    lr = lr if o.lr is None else o.lr
    decay = decay if o.weight_decay is None else o.weight_decay
    convolutions = any(isinstance(module, nn.Conv2d) for module in net.modules())
    channels_last = convolutions if o.channels_last is None else o.channels_last

    def optimizer(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        if o.optimizer == "sgd":
            return torch.optim.SGD(named, lr, momentum=0.9, nesterov=True, weight_decay=decay)
        return torch.optim.AdamW(named, lr, weight_decay=decay)

    engine = Engine(
        model,
        optimizer,
        precision=o.precision,
        seed=o.seed,
        memory_format="channels_last" if channels_last else "preserve",
    )
    steps = o.epochs * len(train)
    scheduler = trainer.cosine(engine.optimizer, steps, int(o.warmup * steps))

    out = _folder(o)
    config = {key: value for key, value in vars(o).items() if key not in ("run", "command")}
    config |= {"out": str(out), "lr": lr, "weight_decay": decay, "channels_last": channels_last, "device": str(device)}
    config |= {"threads": torch.get_num_threads(), "torch": str(torch.__version__), "fastlocal": __version__}
    config["resolved"] = trainer.describe(model)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(f"{images!r} on {device}")
    print(f"{o.method} on {o.model}: {len(model.blocks)} blocks; {model.summary().splitlines()[-1]}", flush=True)

    history = trainer.fit(
        engine,
        train,
        test,
        epochs=o.epochs,
        scheduler=scheduler,
        log=out / "log.csv",
        label=o.method,
        progress=not o.quiet,
    )
    trainer.save(out / "checkpoint.safetensors", model, config)
    written = ["config.json", "log.csv", "checkpoint.safetensors", *_curves(out, history, o)]
    speed = f"{history.steps_per_second:.1f} steps/s"
    epochs = len(history.epochs)
    print(f"test accuracy {history.test_accuracy:.2%} after {epochs} epoch{'s' * (epochs > 1)}, {speed}")
    print(f"written to {out}: {', '.join(written)}")
    return 0


def _check(o: argparse.Namespace) -> None:
    for name in ("epochs", "threads"):
        value = getattr(o, name)
        if value is not None and value < 1:
            raise ArgumentError(f"--{name}: got {value}; give at least 1")
    for name in ("lr", "weight_decay"):
        value = getattr(o, name)
        if value is not None and not 0 <= value < float("inf"):
            raise ArgumentError(f"--{name.replace('_', '-')}: got {value}; give a number from 0")
    if not 0 <= o.warmup <= 1:
        raise ArgumentError(f"--warmup: got {o.warmup}; give a fraction of the steps, 0 to 1")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError(
            f"--device: {name!r} cannot be used ({str(error).splitlines()[0]}); use auto or cpu"
        ) from error
    return device


def _network(o: argparse.Namespace, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """The model, with what the images decide filled in where it takes it; given options win."""
    from fastlocal import models

    accepted = models.options(o.model)
    channels, height, width = shape
    if "num_classes" not in accepted:
        raise ArgumentError(
            f"--model: {o.model} does not classify images; see `fastlocal models` for one with num_classes"
        )
    fitting = {"num_classes": num_classes, "in_channels": channels, "in_features": channels * height * width}
    if "img_size" in accepted:
        if height != width:
            raise ArgumentError(
                f"--model: {o.model} takes square images, these are {height}x{width}; use another model"
            )
        fitting["img_size"] = height
    given = _pairs("--model-option", o.model_option)
    return models.create(o.model, **{key: value for key, value in fitting.items() if key in accepted} | given)


@torch.no_grad()
def _try(net: nn.Module, x: torch.Tensor, o: argparse.Namespace) -> None:
    try:
        net.eval()(x)
    except (RuntimeError, ValueError) as error:
        size = "x".join(map(str, x.shape[1:]))
        reason = str(error).splitlines()[0]
        raise ArgumentError(f"--model: {o.model} cannot take {size} images ({reason}); use another one") from error
    net.train()


def _method_options(o: argparse.Namespace, images: Any) -> dict[str, Any]:
    """Those given; a method that works on the image itself is told how it was normalised."""
    from fastlocal.methods import get_method

    given = _pairs("--option", o.option)
    known = {field.name for field in dataclasses.fields(get_method(o.method).Options)}
    normalised = {"mean": images.mean.tolist(), "std": images.std.tolist()}
    return {key: value for key, value in normalised.items() if key in known} | given


def _blocks(o: argparse.Namespace, net: nn.Module) -> Any:
    if o.blocks is None:
        return 1 if o.method == "bp" else len(net.units())  # type: ignore[operator]
    if o.blocks == "auto":
        return "auto"
    try:
        return int(o.blocks)
    except ValueError:
        return o.blocks.split(",")


def _pairs(flag: str, texts: Sequence[str]) -> dict[str, Any]:
    """``["depth=3", "form=cifar"]`` -> ``{"depth": 3, "form": "cifar"}``."""
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key.isidentifier() or not equals:
            raise ArgumentError(f"{flag}: got {text!r}; write NAME=VALUE, such as depth=3")
        try:
            found[key] = ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(value, value))
        except (ValueError, SyntaxError):
            found[key] = value
    return found


def _folder(o: argparse.Namespace) -> Path:
    """``--out``, or a new folder in runs/. One that holds a run is never written over."""
    if o.out is not None:
        if (o.out / "config.json").exists():
            raise ArgumentError(f"--out: {o.out} holds a run already; name another folder, or remove it")
        out = o.out
    else:
        base = Path("runs") / f"{o.model}-{Path(o.data).stem}-{o.method}"
        out, number = base, 1
        while out.exists():
            number += 1
            out = base.with_name(f"{base.name}-{number}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(f"--out: cannot make the folder {out} ({error.strerror}); name another") from error
    return out


def _curves(out: Path, history: Any, o: argparse.Namespace) -> list[str]:
    from fastlocal.bench import plots

    try:
        plots.training(out / "curves.png", history, f"{o.method} on {o.model}, {Path(o.data).stem}")
    except FastLocalError as error:
        print(f"no curves.png: {error}")
        return []
    return ["curves.png"]


# ----------------------------------------------------------------------------------------------------------- the others


def _plan(o: argparse.Namespace) -> int:
    from fastlocal import models
    from fastlocal.engine.plan import plan

    if o.batch < 2:
        raise ArgumentError(f"--batch: got {o.batch}; give at least 2 rows")
    given = _pairs("--model-option", o.model_option)
    accepted = models.options(o.model) | given
    blocks: Any
    if o.blocks is None and o.budget is not None and o.method != "bp":
        blocks, budget = "auto", o.budget
    else:
        with torch.device("meta"):  # names of units only
            blocks, budget = _blocks(o, models.create(o.model, **given)), None
    found = plan(
        lambda: models.create(o.model, **given),
        _sample_shape(o, accepted),
        device=o.device,
        method=o.method,
        blocks=blocks,
        budget=budget,
        optimizer=o.optimizer,
        precision=o.precision,
        memory_format="channels_last" if o.channels_last else "preserve",
        **_pairs("--option", o.option),
    )
    print(found.to_text())
    if o.draw is not None:
        found.draw(o.draw)
        print(f"drawn to {o.draw}")
    if o.budget is not None and not found.fits(o.budget):
        print(f"over the budget of {o.budget}")
        return 1
    return 0


def _sample_shape(o: argparse.Namespace, accepted: dict[str, Any]) -> torch.Tensor:
    """A batch on the meta device: token ids for a language model, else images or vectors."""
    if "block_size" in accepted:
        return torch.empty((o.batch, accepted["block_size"]), dtype=torch.int64, device="meta")
    if o.shape is not None:
        try:
            shape = tuple(int(n) for n in o.shape.split("x"))
        except ValueError as error:
            raise ArgumentError(f"--shape: got {o.shape!r}; write 3x224x224") from error
    elif "in_features" in accepted:
        shape = (accepted["in_features"],)
    else:
        size = accepted.get("img_size") or (224 if accepted.get("num_classes") == 1000 else 32)
        shape = (accepted.get("in_channels", 3), size, size)
    return torch.empty((o.batch, *shape), device="meta")


def _bench(o: argparse.Namespace) -> int:
    if o.name is None:
        print(_benches())
        return 0
    if o.name not in BENCHES:
        raise ArgumentError(f"bench: there is no {o.name!r}. {did_you_mean(o.name, BENCHES)}")
    return importlib.import_module(f"fastlocal.bench.{o.name}").main(o.rest)


def _benches() -> str:
    return "\n".join(["measurements:", *(f"  {name:<10}{text}" for name, text in BENCHES.items())])


def _info(o: argparse.Namespace) -> int:
    from fastlocal import info

    return info.main(["--json"] if o.json else [])


def _methods(o: argparse.Namespace) -> int:
    from fastlocal.methods import list_methods

    for method in list_methods():
        print(f"{method['name']:<10}{method['summary']}")
        if method["paper"]:
            print(f"{'':<10}{method['paper']}")
        if method["options"]:
            print(f"{'':<10}options: {_defaults(method['options'])}")
    return 0


def _models(o: argparse.Namespace) -> int:
    from fastlocal import models

    print(f"{'model':<12}{'units':>5}{'parameters':>13}  options")
    for name in models.list_models():
        with torch.device("meta"):  # shapes only
            net = models.create(name)
        parameters = sum(p.numel() for p in net.parameters())
        print(f"{name:<12}{len(net.units()):>5}{parameters:>13,}  {_defaults(models.options(name))}")  # type: ignore[operator]
    return 0


def _defaults(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items())


if __name__ == "__main__":
    sys.exit(main())
