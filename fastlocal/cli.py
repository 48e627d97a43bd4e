"""The command line, ``fastlocal``: train, plan, bench, info, methods, models, recipes. Every command is a few calls of the library."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastlocal._version import __version__
from fastlocal.errors import ArgumentError, FastLocalError, did_you_mean

if TYPE_CHECKING:
    from fastlocal.trainer.settings import Settings

BENCHES = {
    "demo": "ResNet-20 on digits under BP, DGL and AugLocal: one table and one picture",
    "ledger": "launches, block passes, MACs and saved bytes of a step of every method",
    "methods": "what every method isolates, costs and was checked against, as one table",
    "kernels": "registers, shared memory and spills of every Triton kernel, compiled without a GPU",
    "gpu": "operators and whole steps on a CUDA device, beside their rivals",
    "tune": "launch configurations for this CUDA device, as a table that the kernels read",
    "accuracy": "short runs on real images, one record each",
    "plan_time": "planned memory and time against measured ones",
    "step_time": "milliseconds of a step: plain loop or official code against the engine, in turns",
    "schedules": "schedules of a step against each other and BP: speed, memory, where the time goes",
    "deep": "a thousand layers planned for a budget, and trained a little under the tracker",
}
GROUPS = {
    "data": "data",
    "model": "network and method",
    "epochs": "optimization",
    "precision": "machine",
    "seed": "run",
}
MAY_CHANGE = (  # in a resumed run
    *("root", "epochs", "save_every", "keep_last", "keep_best", "tensorboard", "wandb"),
    *("schedule", "schedule_workers", "in_flight", "schedule_budget"),
)

_Raw = argparse.RawDescriptionHelpFormatter

EXAMPLES = """examples:
  fastlocal train
  fastlocal train --model resnet32 --data digits --method auglocal --blocks 16 --epochs 2
  fastlocal train --model resnet20 --data cifar.npz --method infopro --blocks 4 --crop 4 --flip --epochs 50
  fastlocal train --model vit_tiny --model-option patch_size=2 --method dgl --optimizer adamw
  fastlocal train --recipe auglocal-cifar10-r32 --root ~/cifar --epochs 100
  fastlocal train --resume runs/resnet20-digits-auglocal
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
    recipes = commands.add_parser("recipes", help="list the papers' settings, or show those of one")
    recipes.add_argument("name", nargs="?", metavar="NAME", help="show this one as flags")
    recipes.set_defaults(run=_recipes)
    commands.add_parser("models", help="list the models with their options").set_defaults(run=_models)
    return parser


def _train_parser(commands: Any) -> None:
    from fastlocal.trainer.settings import Settings

    train = commands.add_parser(
        "train",
        help="train a model on images",
        description="Trains a model of fastlocal.models on images; without options resnet20, digits, auglocal. Flags win over "
        "--config, which wins over --recipe. Defaults stand in brackets.",
        epilog=EXAMPLES,
        formatter_class=_Raw,
    )
    group = train.add_argument_group("begin with")
    group.add_argument("--recipe", metavar="NAME", help="a paper's settings; see `fastlocal recipes`")
    group.add_argument("--config", type=Path, metavar="FILE", help="JSON of these flags, such as a run's command.json")
    group.add_argument("--resume", type=Path, metavar="FOLDER", help="go on with a run, to the same bytes")
    group.add_argument("--out", type=Path, metavar="FOLDER", help="for what it writes (a new one in runs/)")
    group.add_argument(
        "--fast-dev-run", nargs="?", type=int, const=2, default=0, metavar="N", help="N batches (2), no file"
    )
    group.add_argument("--quiet", action="store_true", help="no progress bar")
    for one in dataclasses.fields(Settings):
        if one.name in GROUPS:
            group = train.add_argument_group(GROUPS[one.name])
        _add_setting(group, one)
    train.set_defaults(run=_train)


def _add_setting(group: Any, one: dataclasses.Field[Any]) -> None:
    """One flag. What is not given does not appear in the namespace."""
    flag, kind = f"--{one.name.replace('_', '-')}", one.metadata["kind"].removesuffix("?")
    options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": one.metadata["help"]}
    if kind == "bool":
        if one.default is True:
            options["help"] += " (on)"
        if one.name == "decay_all":
            group.add_argument(flag, action="store_true", **options)
            off = options | {"help": "no weight decay for biases, norms and tokens"}
            group.add_argument("--no-decay", action="store_false", dest=one.name, **off)
        else:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        return
    if one.default not in (None, "", (), dataclasses.MISSING):
        options["help"] = f"{options['help']} ({one.default})".strip()
    if kind == "choice":
        options["choices"] = one.metadata["choices"]
        if len(one.metadata["choices"]) > 4:
            options |= {"metavar": "NAME", "help": f"{', '.join(one.metadata['choices'])} ({one.default})"}
    else:
        metavar = {"number": "X", "int": "N", "text": "NAME"}.get(kind)
        options["metavar"] = one.metadata["metavar"] or metavar
        options["type"] = _PARSERS.get(kind, str)
    if kind == "pairs":
        options |= {"action": "append", "type": str}
    group.add_argument(flag, **options)


def _amount(text: str) -> int | float:
    return int(text) if text.isdigit() else float(text)


def _floats(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _names(text: str) -> tuple[int | str, ...]:
    return tuple(int(part) if part.lstrip("-").isdigit() else part for part in text.split(","))


def _cuts(text: str) -> int | str | list[str]:
    """``--blocks``: 4, auto, or a,b."""
    if text == "auto":
        return text
    return int(text) if text.lstrip("-").isdigit() else text.split(",")


_PARSERS: dict[str, Callable[[str], Any]] = {
    "int": int,
    "number": float,
    "amount": _amount,
    "numbers": _floats,
    "names": _names,
    "blocks": _cuts,
}


def _plan_parser(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        help="what a training step will cost, without running one",
        description="Predicts memory, FLOPs, bytes moved, launches and roofline time of a step. Needs no device and no data.",
        epilog="examples:\n  fastlocal plan --model vit_base --method dgl --batch 256 --device h100 --budget 16GiB\n"
        "  fastlocal plan --model resnet110 --method dgl --blocks 16 --schedule pipeline --gantt schedule.svg\n"
        "  fastlocal plan --model resnet110 --method dgl --blocks 16 --ranks 4 --bandwidth 25GB --latency 1e-5",
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
    add(
        "--device",
        default="h100",
        help="whose roofline: h100, h200, a100, cpu-core, or here, which is measured first (h100)",
    )
    add("--optimizer", default="momentum", help="sgd, momentum or adam (momentum)")
    add("--precision", default="32-true", help="32-true, bf16-mixed or 16-mixed (32-true)")
    add("--channels-last", action="store_true", help="plan that memory format")
    add("--draw", type=Path, metavar="PATH", help="write a chart, such as plan.png")
    run = plan.add_argument_group("schedule")
    add = run.add_argument
    add("--schedule", default="sequential", help="sequential, overlap or pipeline (sequential)")
    add("--streams", type=int, default=2, metavar="N", help="tasks that may run at once (2)")
    add("--in-flight", type=int, metavar="N", help="steps that a pipeline may have on their way (as many as streams)")
    add("--memory-budget", metavar="4GiB", help="for what the tasks of the steps in flight hold (no limit)")
    add("--tasks", action="store_true", help="print every task of a round: stream, start, step, bytes, waits")
    add("--gantt", metavar="PATH", help="draw the schedule (.svg or .png)")
    add("--trace", metavar="PATH", help="write the schedule as a Chrome trace, for ui.perfetto.dev")
    ranks = plan.add_argument_group("many ranks", "a simulation: the blocks as a pipeline beside GPipe and 1F1B")
    add = ranks.add_argument
    add("--ranks", type=int, metavar="N", help="how many devices in a chain")
    add("--bandwidth", metavar="25GB", help="of each link, a second (no limit)")
    add("--latency", type=float, default=0.0, metavar="SECONDS", help="of each link (0)")
    add("--microbatches", type=int, metavar="N", help="of GPipe and 1F1B (the best power of two)")
    add("--straggler", action="append", default=[], metavar="RANK=FACTOR", help="a rank that is slower; repeatable")
    plan.set_defaults(run=_plan)


# ---------------------------------------------------------------------------------------------------------------- train


def _train(o: argparse.Namespace) -> int:
    from fastlocal.trainer import LambdaCallback, checkpoint
    from fastlocal.trainer.settings import build

    settings = _settings(o)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    folder = None if o.fast_dev_run else _folder(o, settings)
    begin = LambdaCallback(on_fit_start=lambda _: settings.write(folder / "command.json") if folder else None)
    run = build(
        settings,
        folder=folder,
        callbacks=[begin],
        progress=not o.quiet,
        fast_dev_run=o.fast_dev_run,
        going_on=o.resume is not None and (o.resume / "checkpoints").is_dir(),
    )
    model, trainer = run.trainer.model, run.trainer
    if folder is not None:
        _make(folder)
    print(run.about)
    print(
        f"{settings.method} on {settings.model}: {len(model.blocks)} blocks; {model.summary().splitlines()[-1]}",
        flush=True,
    )
    try:
        rows = run.fit(resume=o.resume is not None)
    except (KeyboardInterrupt, SystemExit):
        if folder is not None:
            print(f"go on with: fastlocal train --resume {folder}", file=sys.stderr)
        raise
    if folder is None:
        print(
            f"{o.fast_dev_run} batches: {', '.join(f'{k} {v:.4g}' for k, v in rows[-1].items() if k.endswith('loss'))}"
        )
        return 0

    extra = {"command": dataclasses.asdict(settings), "epoch": trainer.epoch, "step": trainer.engine.steps}
    written = [
        name
        for name in ("config.json", "command.json", "metrics.csv", "steps.csv", "timing.csv")
        if (folder / name).exists()
    ]
    checkpoint.save(folder / "checkpoint.safetensors", model, extra)
    written += ["checkpoints/", "checkpoint.safetensors"]
    if trainer.ema is not None:
        checkpoint.save(folder / "ema.safetensors", trainer.ema.model, extra)
        written.append("ema.safetensors")
    written += _curves(folder, rows, settings)
    epochs = trainer.epoch
    print(f"test accuracy {rows[-1]['val_accuracy']:.2%} after {epochs} epoch{'s' * (epochs > 1)}")
    if trainer.engine.schedule != "sequential":
        print(trainer.engine.explain().splitlines()[0])
    print(f"written to {folder}: {', '.join(written)}")
    return 0


def _settings(o: argparse.Namespace) -> Settings:
    """Defaults, then --recipe, --config and the flags; or those of the resumed run, and what of them may change."""
    from fastlocal.trainer import recipes
    from fastlocal.trainer.settings import Settings, read_settings

    given = {one.name: getattr(o, one.name) for one in dataclasses.fields(Settings) if hasattr(o, one.name)}
    for name in ("model_option", "option", "scheduler_option"):
        if name in given:
            given[name] = _pairs(f"--{name.replace('_', '-')}", given[name])
    if o.resume is None:
        settings = Settings() if o.recipe is None else recipes.get(o.recipe).settings
        return settings.with_(**({} if o.config is None else read_settings(o.config))).with_(**given)
    command = o.resume / "command.json"
    if not command.is_file():
        raise ArgumentError(
            f"--resume: {o.resume} holds no command.json of `fastlocal train`; name the folder of a run"
        )
    settings = Settings().with_(**read_settings(command))
    for name, value in given.items():
        if name not in MAY_CHANGE and value != getattr(settings, name):
            raise ArgumentError(
                f"--resume: --{name.replace('_', '-')} was {getattr(settings, name)!r} and stays so; only "
                f"{', '.join(f'--{n}'.replace('_', '-') for n in MAY_CHANGE)} can be given anew. Begin a new run with --config {command}"
            )
    for name in ("recipe", "config", "out"):
        if getattr(o, name) is not None:
            raise ArgumentError(f"--resume: goes on with the run in {o.resume}; leave --{name} out")
    return settings.with_(**given)


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


def _folder(o: argparse.Namespace, settings: Settings) -> Path:
    """``--resume``, ``--out``, or a new folder in runs/. One that holds a run is never written over."""
    if o.resume is not None:
        return o.resume
    if o.out is not None:
        if (o.out / "config.json").exists():
            raise ArgumentError(
                f"--out: {o.out} holds a run already; name another folder, or go on with --resume {o.out}"
            )
        return o.out
    base = Path("runs") / f"{settings.model}-{Path(settings.data).stem}-{settings.method}"
    out, number = base, 1
    while out.exists():
        number += 1
        out = base.with_name(f"{base.name}-{number}")
    return out


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(f"--out: cannot make the folder {folder} ({error.strerror}); name another") from error


def _curves(folder: Path, rows: list[dict[str, Any]], settings: Settings) -> list[str]:
    from fastlocal.bench import plots

    title = f"{settings.method} on {settings.model}, {Path(settings.data).stem}"
    try:
        plots.training(folder / "curves.png", rows, title)
    except FastLocalError as error:
        print(f"no curves.png: {error}")
        return []
    return ["curves.png"]


# ----------------------------------------------------------------------------------------------------------- the others


def _plan(o: argparse.Namespace) -> int:
    from fastlocal import models
    from fastlocal.engine import gantt
    from fastlocal.engine.plan import plan

    if o.batch < 2:
        raise ArgumentError(f"--batch: got {o.batch}; give at least 2 rows")
    bandwidth = math.inf if o.bandwidth is None else _size("--bandwidth", o.bandwidth)
    slow = _factors("--straggler", o.straggler)
    given = _pairs("--model-option", o.model_option)
    accepted = models.options(o.model) | given
    blocks: Any
    if o.blocks is None and o.budget is not None and o.method != "bp":
        blocks, budget = "auto", o.budget
    else:
        with torch.device("meta"):  # names of units only
            units = len(models.create(o.model, **given).units())  # type: ignore[operator]
        blocks, budget = (1 if o.method == "bp" else units) if o.blocks is None else _cuts(o.blocks), None
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
        schedule=o.schedule,
        streams=o.streams,
        in_flight=o.in_flight,
        memory_budget=o.memory_budget,
        **_pairs("--option", o.option),
    )
    print(found.to_text())
    if o.tasks:
        assert found.schedule is not None
        print(f"\n{gantt.to_text(found.schedule)}")
    for path, draw in ((o.draw, found.draw), (o.gantt, found.draw_schedule)):
        if path is not None:
            draw(path)
            print(f"drawn to {path}")
    if o.trace is not None:
        found.trace_schedule(o.trace)
        print(f"traced to {o.trace}")
    if o.ranks is not None:
        runs = found.simulate(
            o.ranks, bandwidth=bandwidth, latency=o.latency, microbatches=o.microbatches, straggler=slow or None
        )
        print(f"\n{runs.to_text()}")
    if o.budget is not None and not found.fits(o.budget):
        print(f"over the budget of {o.budget}")
        return 1
    return 0


def _size(flag: str, text: str) -> int:
    from fastlocal.engine.localize import parse_bytes

    try:
        return parse_bytes(float(text) if text.replace(".", "").replace("e", "").isdigit() else text)
    except ArgumentError as error:
        raise ArgumentError(f"{flag}: got {text!r}; write bytes, '500MB' or '25GB'") from error


def _factors(flag: str, texts: list[str]) -> dict[int, float]:
    """RANK=FACTOR, each."""
    found = {}
    for text in texts:
        rank, _, factor = text.partition("=")
        try:
            found[int(rank)] = float(factor)
        except ValueError:
            raise ArgumentError(f"{flag}: got {text!r}; write RANK=FACTOR, such as 2=1.5") from None
    return found


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


def _recipes(o: argparse.Namespace) -> int:
    from fastlocal.trainer import recipes

    if o.name is not None:
        print(recipes.get(o.name).explain())
        return 0
    for paper, found in recipes.by_paper().items():
        print(paper)
        for recipe in found:
            print(f"  {recipe.name:<40}{recipe.claim_text()}")
    print("Accuracies are the papers' claims, not reproduced here. `fastlocal recipes NAME` shows one.")
    return 0


def _defaults(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items())


if __name__ == "__main__":
    sys.exit(main())
