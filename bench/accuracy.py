"""`python -m fastlocal.bench.accuracy`: what methods reach on real images, in short runs on a CPU.

    python -m fastlocal.bench.accuracy --data cifar10.npz --model resnet20 --method auglocal --json accuracy.jsonl
    python -m fastlocal.bench.accuracy --data cifar10.npz --suite methods --json accuracy.jsonl
    python -m fastlocal.bench.accuracy --data fashion_mnist.npz --suite all --seeds 0 1 --json accuracy.jsonl
    python -m fastlocal.bench.accuracy --draw docs --json accuracy.jsonl

A run trains with `fastlocal.Trainer` on the first images of each class and appends one record to the JSONL file. A suite
is a list of runs; those that the file holds already are left out. Nothing is downloaded: ``--data`` is a .npz file or a
folder that `fastlocal.data.load` knows.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastlocal as fl
from fastlocal import models
from fastlocal.bench import plots
from fastlocal.data import Batches, Images, load
from fastlocal.errors import ArgumentError, FastLocalError
from fastlocal.info import collect
from fastlocal.methods import list_methods

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path("bench") / "results" / "accuracy.jsonl"
NAMES = {"bp": "BP", "predsim": "PredSim", "auglocal": "AugLocal", "infopro": "InfoPro", "dgl": "DGL"}
TITLES = {
    "man": "MAN",
    "man_plus_plus": "MAN++",
    "hpff": "HPFF",
    "mlaan": "MLAAN",
    "dsn": "DSN",
    "glcan": "GLCAN",
    "lakd": "LAKD",
    "lopt": "LoPT",
    "feature_reconstruction": "feature reconstruction",
}
NETS = {"resnet20": "ResNet-20", "vgg8b": "VGG8b"}
SETS = {"cifar10": "CIFAR-10", "fashion_mnist": "Fashion-MNIST"}


# ---------------------------------------------------------------------------------------------------------------- a run


@dataclass
class Case:
    """One run, as its record says it. The defaults are what the suites train with.

    ``convolutions``: only the convolutions are units, and what follows them is the readout; see `Convolutions`.
    ``train``, ``test``: images, equally many of each class, the first in the set's order. ``held_out``: test on the
    training images that come next, for choosing learning rates.
    """

    data: str
    model: str = "resnet20"
    method: str = "bp"
    blocks: int | None = None
    model_option: dict[str, Any] = field(default_factory=dict)
    option: dict[str, Any] = field(default_factory=dict)
    convolutions: bool = False
    optimizer: str = "sgd"
    lr: float = 0.1
    weight_decay: float = 1e-4
    epochs: int = 5
    batch_size: int = 64
    warmup: float = 0.5
    crop: int = 0
    flip: bool = False
    train: int = 6_000
    test: int = 3_000
    held_out: bool = False
    precision: str = "bf16-mixed"
    threads: int = 1
    seed: int = 0

    def command(self, data: str) -> str:
        """What repeats the run, from the set at ``data``."""
        words = ["python -m fastlocal.bench.accuracy", f"--data {data}"]
        for known in fields(self):
            value, flag = getattr(self, known.name), "--" + known.name.replace("_", "-")
            if known.name == "data" or value == known.default or value in (None, {}):
                continue
            if isinstance(value, dict):
                words += [f"{flag} {key}={_text(entry)}" for key, entry in value.items()]
            else:
                words.append(flag if value is True else f"{flag} {value}")
        return " ".join(words)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


class Convolutions(nn.Module):
    """A VGG8b or VGG11b whose fully connected layers are the readout, so that each unit is a convolution.

    AugLocal makes its heads like later units and puts a linear layer behind them, so the layers of the classifier cannot
    be among the units; InfoPro's decoder needs feature maps.
    """

    def __init__(self, net: models.VGGLocal):
        super().__init__()
        self.net = net
        self.count = sum(name.startswith("features") for name in net.unit_names)

    @property
    def widths(self) -> list[int]:
        return self.net.widths[: self.count]

    def units(self) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
        return [(f"net.{name}", unit) for name, unit in self.net.units()[: self.count]]

    def readout(self, h: Tensor) -> Tensor:
        return self.net.classifier(h)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def make_unit(self, i: int, in_channels: int, stride: int) -> nn.Module:
        return self.net.make_unit(i, in_channels, stride)

    def make_readout(self, in_features: int, num_classes: int) -> nn.Module:
        return self.net.make_readout(in_features, num_classes)


def part(images: Images, case: Case) -> Images:
    """The images that a run trains and tests on; mean and standard deviation stay those of the whole set.

    Raises:
        ArgumentError: a class has too few images, or the numbers do not divide by the classes.
    """
    classes = images.num_classes
    for name, count in (("train", case.train), ("test", case.test)):
        if count < classes or count % classes:
            raise ArgumentError(f"--{name}: got {count}; give a multiple of the {classes} classes")
    train = _rows("train", images.y_train, classes, 0, case.train // classes)
    if case.held_out:
        test = _rows("test", images.y_train, classes, case.train // classes, case.test // classes)
        x_test, y_test = images.x_train[test], images.y_train[test]
    else:
        test = _rows("test", images.y_test, classes, 0, case.test // classes)
        x_test, y_test = images.x_test[test], images.y_test[test]
    return replace(images, x_train=images.x_train[train], y_train=images.y_train[train], x_test=x_test, y_test=y_test)


def _rows(name: str, labels: Tensor, classes: int, start: int, count: int) -> Tensor:
    keep = []
    for label in range(classes):
        members = (labels == label).nonzero().flatten()
        if len(members) < start + count:
            raise ArgumentError(
                f"--{name}: class {label} has {len(members)} images, not {start + count}; give at most "
                f"{(len(members) - start) * classes}"
            )
        keep.append(members[start : start + count])
    return torch.cat(keep).sort().values


def network(case: Case, images: Images) -> nn.Module:
    """The net of a run, newly drawn."""
    accepted = models.options(case.model)
    channels, size, _ = images.shape
    fitting = {"num_classes": images.num_classes, "in_channels": channels, "img_size": size}
    net = models.create(case.model, **{k: v for k, v in fitting.items() if k in accepted} | case.model_option)
    if not case.convolutions:
        return net
    if not isinstance(net, models.VGGLocal):
        raise ArgumentError(f"--convolutions: is for vgg8b and vgg11b, not {case.model}; leave it out")
    return Convolutions(net)


def run(images: Images, case: Case, progress: bool = False) -> dict[str, Any]:
    """Trains, and returns the record.

    Raises:
        ArgumentError: a value that is not one of those.
    """
    images = part(images, case)
    options = dict(case.option)
    if "mean" in known_options(case.method):
        options = {"mean": images.mean.tolist(), "std": images.std.tolist()} | options
    if case.method == "lakd":  # its teacher is the same network under backprop, as long
        options["teacher"] = _train(images, replace(case, method="bp", option={}), {}, progress)[0].export()
    model, history, seconds = _train(images, case, options, progress)
    return _record(images, case, model, history, seconds)


def known_options(method: str) -> dict[str, Any]:
    """The options of a method, with their defaults."""
    return next(known["options"] for known in list_methods() if known["name"] == method)


def _train(
    images: Images, case: Case, options: dict[str, Any], progress: bool
) -> tuple[fl.LocalModel, list[dict[str, Any]], float]:
    """The trained model, its history and the seconds that it took."""
    torch.manual_seed(case.seed)
    net = network(case, images)
    train = Batches(images, batch_size=case.batch_size, seed=case.seed, crop=case.crop, flip=case.flip)
    test = Batches(images, train=False, batch_size=250)
    blocks = 1 if case.method == "bp" else case.blocks or len(net.units())  # type: ignore[operator]
    model = fl.localize(net, case.method, blocks=blocks, sample=next(train.epoch(0))[0][:2], **options)

    def optimizer(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        if case.optimizer == "adam":
            return torch.optim.Adam(named, case.lr)
        return torch.optim.SGD(named, case.lr, momentum=0.9, nesterov=True, weight_decay=case.weight_decay)

    trainer = fl.Trainer(
        model,
        optimizer,
        scheduler=("cosine", {"warmup_epochs": case.warmup, "warmup_factor": 0.05, "warmup_prefix": True}),
        precision=case.precision,
        seed=case.seed,
        folder=None,
        progress=progress,
    )
    begin = time.perf_counter()
    history = trainer.fit(train, test, epochs=case.epochs)
    return model, history, time.perf_counter() - begin


def _record(
    images: Images, case: Case, model: fl.LocalModel, history: list[dict[str, Any]], seconds: float
) -> dict[str, Any]:
    net: Any = model.backbone
    last, count = history[-1], len(model.blocks)
    found = collect()
    return {
        "case": asdict(case),
        "blocks": count,
        "units": [unit for unit, _ in net.units()],
        "parameters": sum(p.numel() for p in net.parameters()),
        "samples": {"train": len(images.y_train), "test": len(images.y_test), "shape": list(images.shape)},
        "accuracy": last["val_accuracy"],
        "accuracies": [last.get(f"val_accuracy_{k}") for k in range(count)],
        "losses": [last[f"loss_{k}"] for k in range(count)],
        "curve": [
            {
                "accuracy": row["val_accuracy"],
                "accuracies": [row.get(f"val_accuracy_{k}") for k in range(count)],
                "loss": row["loss"],
            }
            for row in history
        ],
        "seconds": round(seconds, 1),
        "seconds_note": "not a benchmark: other processes ran on the machine",
        "machine": {
            "cpu": found["cpu"]["name"],
            "threads": torch.get_num_threads(),
            "torch": found["torch"]["version"],
            "fastlocal": found["fastlocal"],
            "commit": _commit(),
        },
    }


def _commit() -> str | None:
    try:
        found = subprocess.run(
            ["git", "rev-parse", "--short=10", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


# -------------------------------------------------------------------------------------------------------------- suites

LAMBDAS = [5, 0.05, 0.2, 0.5]  # InfoPro's own for ResNet-32 with every unit a block; none are published for these nets
OPTIONS: dict[str, dict[str, Any]] = {"auglocal": {"depth": 2}, "infopro": {"lam": LAMBDAS, "loss": "cross_entropy"}}
# by the trials of docs/accuracy.md; DGL has AugLocal's, whose loss it shares
RATES: dict[tuple[str, str], tuple[str, float]] = {
    ("resnet20", "bp"): ("sgd", 0.1),
    ("resnet20", "predsim"): ("adam", 0.005),
    ("resnet20", "auglocal"): ("sgd", 0.1),
    ("resnet20", "infopro"): ("sgd", 0.3),
    ("resnet20", "dgl"): ("sgd", 0.1),
    ("vgg8b", "bp"): ("sgd", 0.03),
    ("vgg8b", "predsim"): ("adam", 0.005),
    ("vgg8b", "auglocal"): ("sgd", 0.03),
    ("vgg8b", "infopro"): ("sgd", 0.1),
}


# The suite "all": each unit a block on a narrow ResNet-32; for methods of tokens, four blocks on a small ViT.
NARROW: dict[str, dict[str, Any]] = {
    "resnet32": {"width": 8},
    "vit_tiny": {"patch_size": 4, "dim": 64, "depth": 6, "heads": 2},
}
OF_TOKENS = ("feature_reconstruction", "lopt")
WITHOUT_ACCURACY = {"solo": "it predicts tokens", "localmim": "it has no classes"}
GREEDY = {
    "config": "0c1f",
    "loss": "cross_entropy",
    "lam": [0, 1],
}  # plain greedy: a linear classifier behind each block
# What differs from SGD with 0.1 and from the method's defaults; not tuned on these nets.
OF_METHOD: dict[str, dict[str, Any]] = {
    "infopro": {"option": {"loss": "cross_entropy"}},
    "predsim": {"optimizer": "adam", "lr": 0.005},
    "dsn": {"option": {"loss": "softmax"}, "lr": 0.01},  # the squared hinge grows without bound at this rate
}
VIT: dict[str, Any] = {"optimizer": "adam", "lr": 0.001}
# Where a map has an odd size: 28x28 images have one of 7x7.
ODD: dict[str, dict[str, Any]] = {"hpff": {"option": {"patches": 1}}}


def everything(data: str) -> dict[str, Case]:
    """The runs of the suite "all" by name: every registered method that has an accuracy, plain greedy, and BP on each net.

    A method that is registered later is among them, on the ResNet with its defaults.
    """
    augmented: dict[str, Any] = {"crop": 4, "flip": True} if data == "cifar10" else {}
    names = [known["name"] for known in list_methods() if known["name"] not in WITHOUT_ACCURACY]
    cases = {"BP": Case(data, "resnet32", "bp"), "greedy": Case(data, "resnet32", "infopro", option=GREEDY)}
    for method in sorted(names, key=lambda name: name in OF_TOKENS):
        own = OF_METHOD.get(method, {}) | ({} if data == "cifar10" else ODD.get(method, {}))
        if method in OF_TOKENS:
            cases.setdefault("BP, ViT", Case(data, "vit_tiny", "bp", **VIT))
            cases[title(method)] = Case(data, "vit_tiny", method, blocks=4, **VIT | own)
        elif method != "bp":
            cases[title(method)] = Case(data, "resnet32", method, **own)
    short: dict[str, Any] = {"train": 3_000, "test": 3_000, "epochs": 4, "batch_size": 32}
    return {name: replace(case, model_option=NARROW[case.model], **short, **augmented) for name, case in cases.items()}


def title(method: str) -> str:
    """A method as papers write it, or as it is registered."""
    return NAMES.get(method) or TITLES.get(method, method)


def suite(name: str, data: str) -> list[Case]:
    """The runs of a suite on one set: ``methods`` (two nets under four methods), ``blocks`` (accuracy against K) or ``all``
    (every method on one narrow net).

    Raises:
        ArgumentError: no such suite.
    """
    augmented: dict[str, Any] = {"crop": 4, "flip": True} if data == "cifar10" else {}
    wanted: list[tuple[str, str, int | None]]
    if name == "methods":
        wanted = [(model, method, None) for model in NETS for method in ("bp", "predsim", "auglocal", "infopro")]
    elif name == "blocks":
        wanted = [("resnet20", "dgl", blocks) for blocks in (2, 4, 10)]
    elif name == "all":
        return list(everything(data).values())
    else:
        raise ArgumentError(f"--suite: got {name!r}; valid are 'methods', 'blocks', 'all'")
    cases = []
    for model, method, blocks in wanted:
        optimizer, lr = RATES[model, method]
        cases.append(
            Case(
                data=data,
                model=model,
                method=method,
                blocks=blocks,
                model_option={"feat_mult": 0.125, "num_hidden": 128} if model == "vgg8b" else {},
                option=OPTIONS.get(method, {}),
                convolutions=model == "vgg8b" and method in ("auglocal", "infopro"),
                optimizer=optimizer,
                lr=lr,
                **augmented,
            )
        )
    return cases


# ------------------------------------------------------------------------------------------------------------- records


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file, the newest of each case; none where there is no file."""
    if not path.exists():
        return []
    newest: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        newest[json.dumps(record["case"], sort_keys=True)] = record
    return list(newest.values())


def append(path: Path, record: dict[str, Any]) -> None:
    """One line more, with numbers rounded to what they can bear."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(_rounded(record)) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, list) else value


# ---------------------------------------------------------------------------------------------------- tables, pictures


@dataclass(frozen=True)
class Published:
    """A paper's accuracy of a method, and of BP in the same setting, in percent."""

    bp: float
    accuracy: float
    setting: str
    source: str

    @property
    def gap(self) -> float:
        return self.bp - self.accuracy


_LOCAL_LOSS = "Nøkland and Eidnes 2019, README of anokland/local-loss"
_AUGLOCAL = "Ma et al. 2024, arXiv 2402.17318, quoted second-hand"
_INFOPRO = "Wang et al. 2021, arXiv 2101.10832, table 2"
PUBLISHED = {
    ("cifar10", "vgg8b", "predsim"): Published(94.01, 94.42, "VGG8b, 400 epochs, dropout", _LOCAL_LOSS),
    ("fashion_mnist", "vgg8b", "predsim"): Published(95.47, 95.35, "VGG8b, 200 epochs, jitter and flips", _LOCAL_LOSS),
    ("cifar10", "resnet20", "predsim"): Published(94.61, 74.95, "ResNet-110, K=55, 400 epochs", _AUGLOCAL),
    ("cifar10", "resnet20", "auglocal"): Published(94.61, 93.96, "ResNet-110, K=55, depth 6, 400 epochs", _AUGLOCAL),
    ("cifar10", "resnet20", "infopro"): Published(92.63, 85.77, "ResNet-32, K=16, cross-entropy, 160 epochs", _INFOPRO),
}
# InfoPro's table 2: ResNet-32 on CIFAR-10, test error in percent, K to DGL's; K=1 is BP
PUBLISHED_DGL = {1: 7.37, 2: 8.69, 4: 11.48, 8: 14.17, 16: 16.21}


Runs = list[dict[str, Any]]  # of one case, by seed


def compared(records: Runs) -> dict[tuple[str, str], dict[str, Runs]]:
    """The runs of the ``methods`` suite by (data, model), then method; only seeds that all its methods have."""
    found: dict[tuple[str, str], dict[str, Runs]] = {}
    for data in SETS:
        for model in NETS:
            chosen = [r for r in records if _is(r, data, model) and r["case"]["blocks"] is None]
            of_pair = {method: runs for method in NAMES if (runs := _by_seed(chosen, method))}
            if "bp" not in of_pair:
                continue
            common = set.intersection(*({r["case"]["seed"] for r in runs} for runs in of_pair.values()))
            if common:
                found[data, model] = {
                    method: [r for r in runs if r["case"]["seed"] in common] for method, runs in of_pair.items()
                }
    return found


def against_blocks(records: Runs) -> dict[int, Runs]:
    """DGL's runs of ResNet-20 on CIFAR-10 by number of blocks, with BP's as 1; seeds that all of them have."""
    chosen = [r for r in records if _is(r, "cifar10", "resnet20")]
    found = {1: _by_seed(chosen, "bp")}
    dgl = _by_seed(chosen, "dgl")
    for count in sorted({r["blocks"] for r in dgl}):
        found[count] = [r for r in dgl if r["blocks"] == count]
    common = set.intersection(*({r["case"]["seed"] for r in runs} for runs in found.values()))
    return {k: [r for r in runs if r["case"]["seed"] in common] for k, runs in found.items()} if common else {}


def _is(record: dict[str, Any], data: str, model: str) -> bool:
    """A run of that set and net, of the suites' size and learning rate."""
    case, usual = record["case"], asdict(Case(data, model=model))
    if RATES.get((model, case["method"])) != (case["optimizer"], case["lr"]):
        return False
    return all(
        case[key] == usual[key] for key in ("data", "model", "held_out", "epochs", "batch_size", "train", "test")
    )


def _by_seed(records: Runs, method: str) -> Runs:
    return sorted((r for r in records if r["case"]["method"] == method), key=lambda r: r["case"]["seed"])


def percent(runs: Runs) -> float:
    """Mean test accuracy."""
    return 100 * statistics.mean(r["accuracy"] for r in runs)


def against(runs: Runs, bp: Runs) -> float:
    """Mean difference to BP's run of the same seed, in points; negative is below BP."""
    of_seed = {r["case"]["seed"]: r["accuracy"] for r in bp}
    return 100 * statistics.mean(r["accuracy"] - of_seed[r["case"]["seed"]] for r in runs)


def _means(lists: list[list[float | None]]) -> list[float]:
    """Percent, column by column; NaN where a head has no accuracy."""
    return [100 * statistics.mean(math.nan if a is None else a for a in column) for column in zip(*lists)]


def draw(records: Runs, folder: Path) -> list[Path]:
    """The pictures of docs/accuracy.md, as far as there are records for them; their paths.

    Raises:
        ArgumentError: there is no record of BP to compare with.
        BackendError: matplotlib is not installed.
    """
    groups = compared(records)
    if not groups:
        raise ArgumentError("--json: holds no run of BP; run `--suite methods` first")
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "accuracy_curves.png", folder / "accuracy_heads.png"]
    _draw_curves(paths[0], groups)
    _draw_heads(paths[1], groups)
    of_blocks = against_blocks(records)
    if len(of_blocks) > 1:
        paths.append(folder / "accuracy_blocks.png")
        _draw_blocks(paths[2], of_blocks)
    return paths


_COLOR = dict(zip(NAMES, plots.COLORS, strict=False))


def _panels(title: str, groups: dict[tuple[str, str], Any]) -> tuple[Any, list[tuple[tuple[str, str], Any]]]:
    fig = plots.figure(11, 4 * math.ceil(len(groups) / 2))
    fig.suptitle(title, fontsize=12)
    axes = fig.subplots(math.ceil(len(groups) / 2), 2, squeeze=False).flatten()
    for spare in axes[len(groups) :]:
        spare.set_visible(False)
    for axis, (data, model) in zip(axes, groups):
        axis.set_title(f"{SETS[data]}, {NETS[model]}", fontsize=11, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
        axis.tick_params(labelsize=9)
    return fig, list(zip(groups, axes))


def _label(axis: Any, x: float, ends: dict[str, float]) -> None:
    """Names at the right end of the lines, moved apart where they would overlap."""
    low, high = axis.get_ylim()
    step = 0.065 * (high - low)
    at = sorted(ends, key=lambda name: ends[name])
    places = [ends[name] for name in at]
    for _ in range(100):
        for i in range(len(places) - 1):
            short = step - (places[i + 1] - places[i])
            if short > 0:
                places[i], places[i + 1] = places[i] - short / 2, places[i + 1] + short / 2
    for method, y in zip(at, places):
        text = f" {NAMES[method]} {ends[method]:.1f}"
        axis.annotate(text, (x, y), color=_COLOR[method], fontsize=9, va="center", annotation_clip=False)


def _draw_curves(path: Path, groups: dict[tuple[str, str], dict[str, Runs]]) -> None:
    seeds = max(len(runs) for of_pair in groups.values() for runs in of_pair.values())
    of = "one seed" if seeds == 1 else "one seed (where there are more: their mean, each of them faint)"
    fig, panels = _panels(f"Test accuracy by epoch, %: short runs on part of the data, {of}", groups)
    for key, axis in panels:
        for method, runs in groups[key].items():
            curves = [[row["accuracy"] for row in record["curve"]] for record in runs]
            epochs = range(1, len(curves[0]) + 1)
            for curve in curves if len(runs) > 1 else []:
                axis.plot(epochs, [100 * a for a in curve], color=_COLOR[method], linewidth=0.8, alpha=0.4)
            axis.plot(epochs, _means(curves), "o-", color=_COLOR[method], markersize=3.5, linewidth=1.8)
        axis.set_xlabel("epoch", fontsize=10)
        axis.set_xticks(epochs)
        axis.set_xlim(0.8, 1.28 * len(epochs))
        _label(axis, 1.02 * len(epochs), {method: percent(runs) for method, runs in groups[key].items()})
    fig.savefig(path, dpi=120)


def _draw_heads(path: Path, groups: dict[tuple[str, str], dict[str, Runs]]) -> None:
    fig, panels = _panels("Test accuracy of each block's head, %; the last point is the network's own output", groups)
    for key, axis in panels:
        longest = max(runs[0]["blocks"] for runs in groups[key].values())
        ends = {}
        for method, runs in groups[key].items():
            values = _means([record["accuracies"] for record in runs])
            if method == "bp":
                axis.plot([0.7, longest], values * 2, "--", color=_COLOR[method], linewidth=1.4)
                ends[method] = values[-1]
                continue
            # every unit is a block, but the last block holds all that is left of the network
            units = [*range(1, len(values)), longest]
            axis.plot(units, values, "o-", color=_COLOR[method], markersize=3.5, linewidth=1.8)
            ends[method] = values[-1]
        axis.set_xlabel("after unit", fontsize=10)
        axis.set_xticks(range(1, longest + 1))
        axis.set_xlim(0.7, longest * 1.28)
        _label(axis, 1.02 * longest, ends)
    fig.savefig(path, dpi=120)


def _draw_blocks(path: Path, of_blocks: dict[int, Runs]) -> None:
    fig = plots.figure(7, 4)
    axis = fig.subplots()
    here = {k: against(runs, of_blocks[1]) for k, runs in of_blocks.items()}
    there = {k: PUBLISHED_DGL[1] - error for k, error in PUBLISHED_DGL.items()}
    for name, points, style, color in (
        ("ResNet-20, short runs here", here, "o-", plots.COLORS[2]),
        ("ResNet-32, 160 epochs, as published", there, "s--", plots.COLORS[1]),
    ):
        axis.plot(list(points), list(points.values()), style, color=color, label=name, linewidth=1.8, markersize=5)
        for k, value in points.items():
            if k > 1:
                look = {"textcoords": "offset points", "ha": "left", "fontsize": 9, "color": color}
                axis.annotate(f"{value:+.1f}", (k, value), xytext=(6, 3), **look)
    axis.set_title("DGL on CIFAR-10: points of accuracy against BP, by number of blocks", fontsize=11, loc="left")
    axis.set_xscale("log", base=2)
    ticks = sorted({*of_blocks, *PUBLISHED_DGL})
    axis.set_xticks(ticks, ["1 (BP)" if k == 1 else str(k) for k in ticks])
    axis.set_xlabel("blocks", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    axis.legend(frameon=False, fontsize=9, loc="lower left")
    axis.margins(x=0.08, y=0.12)
    fig.savefig(path, dpi=120)


def summary_rows(records: Runs) -> list[list[str]]:
    """A row a (data, model): accuracy of each method, its points against BP, and those published where there are any."""
    methods = ("bp", "predsim", "auglocal", "infopro")
    rows = [["", *(NAMES[method] for method in methods)]]
    for (data, model), of_pair in compared(records).items():
        cells = []
        for method in methods:
            runs = of_pair.get(method)
            if runs is None or method == "bp":
                cells.append("-" if runs is None else f"{percent(runs):.1f}")
                continue
            known = PUBLISHED.get((data, model, method))
            there = "" if known is None else f"; {-known.gap:+.2f}"
            cells.append(f"{percent(runs):.1f} ({against(runs, of_pair['bp']):+.1f}{there})")
        rows.append([f"{SETS[data]}, {NETS[model]}", *cells])
    return rows


def full_rows(records: Runs) -> list[list[str]]:
    """A row a method, beside the closest published setting."""
    rows = [
        ["data", "net", "method", "K", "accuracy %", "each seed", "against BP", "published against BP", "in", "source"]
    ]
    for (data, model), of_pair in compared(records).items():
        for method, runs in of_pair.items():
            if method == "dgl":
                continue
            known = PUBLISHED.get((data, model, method))
            cells = [SETS[data], NETS[model], NAMES[method], str(runs[0]["blocks"]), f"{percent(runs):.1f}"]
            cells.append(", ".join(f"{100 * record['accuracy']:.1f}" for record in runs))
            cells.append("-" if method == "bp" else f"{against(runs, of_pair['bp']):+.1f}")
            if known is None:
                cells += ["-" if method == "bp" else "none found", "", ""]
            else:
                cells += [f"{-known.gap:+.2f}", known.setting, known.source]
            rows.append(cells)
    return rows


def everything_rows(records: Runs) -> list[list[str]]:
    """A row a run of the suite "all": accuracy of every seed, against BP's and plain greedy's run of the same seed and net."""
    rows = [["data", "net", "method", "K", "accuracy %", "each seed", "against BP", "against greedy"]]
    for data in SETS:
        found = {name: _seeds_of(case, records) for name, case in everything(data).items()}
        for name, runs in found.items():
            if not runs:
                continue
            case = runs[0]["case"]
            base = {"BP": found["BP"], "greedy": found["greedy"]}
            if case["model"] != "resnet32":
                base = {"BP": found.get("BP, ViT", []), "greedy": []}
            cells = [
                SETS[data],
                {"resnet32": "ResNet-32", "vit_tiny": "ViT"}[case["model"]],
                name.removesuffix(", ViT"),
            ]
            cells += [str(runs[0]["blocks"]), f"{percent(runs):.1f}"]
            cells.append(", ".join(f"{100 * record['accuracy']:.1f}" for record in runs))
            for other, others in base.items():
                seeds = {r["case"]["seed"] for r in others}
                both = [r for r in runs if r["case"]["seed"] in seeds]
                same = name.removesuffix(", ViT") == other
                cells.append("-" if same or not both else f"{against(both, others):+.1f}")
            rows.append(cells)
    return rows


def _seeds_of(case: Case, records: Runs) -> Runs:
    """The runs of a case, whatever their seed, in its order."""
    wanted = asdict(replace(case, seed=0))
    return sorted((r for r in records if r["case"] | {"seed": 0} == wanted), key=lambda r: r["case"]["seed"])


def head_rows(records: Runs) -> list[list[str]]:
    """A row a local method: every head's accuracy, first to last."""
    rows = [["", "method", "accuracy % of each block's head, first to last"]]
    for (data, model), of_pair in compared(records).items():
        for method, runs in of_pair.items():
            if method not in ("bp", "dgl"):
                values = _means([record["accuracies"] for record in runs])
                text = ", ".join("-" if math.isnan(a) else f"{a:.1f}" for a in values)
                rows.append([f"{SETS[data]}, {NETS[model]}", NAMES[method], text])
    return rows


def block_rows(records: Runs) -> list[list[str]]:
    """Accuracy of DGL against the number of blocks, beside the published one."""
    of_blocks = against_blocks(records)
    rows = [["K", "ResNet-20 here, %", "against BP", "ResNet-32 published, %", "against BP"]]
    for k in sorted({*of_blocks, *PUBLISHED_DGL}) if of_blocks else []:
        here, there = of_blocks.get(k), PUBLISHED_DGL.get(k)
        cells = ["1 (BP)" if k == 1 else str(k)]
        cells += ["-", "-"] if here is None else [f"{percent(here):.1f}", f"{against(here, of_blocks[1]):+.1f}"]
        cells += ["-", "-"] if there is None else [f"{100 - there:.2f}", f"{PUBLISHED_DGL[1] - there:+.2f}"]
        rows.append([cells[0], cells[1], "-", cells[3], "-"] if k == 1 else cells)
    return rows


def rate_rows(records: Runs) -> list[list[str]]:
    """The trials that chose optimizer and learning rate: accuracy on training images that were held out."""
    rows = [["net", "method", "held-out accuracy %"]]
    trials: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        if record["case"]["held_out"]:
            trials.setdefault((record["case"]["model"], record["case"]["method"]), []).append(record)
    for model in NETS:
        for method in NAMES:
            cells = []
            for record in trials.get((model, method), []):
                case = record["case"]
                text = f"{case['optimizer'].upper() if case['optimizer'] == 'sgd' else 'Adam'} {case['lr']:g}: "
                text += f"{100 * record['accuracy']:.1f}"
                chosen = RATES.get((model, method)) == (case["optimizer"], case["lr"])
                cells.append(f"**{text}**" if chosen else text)
            if cells:
                rows.append([NETS[model], NAMES[method], ", ".join(cells)])
    return rows


def conditions(records: Runs) -> str:
    """What all compared runs share, read from the records."""
    chosen = [record for of_pair in compared(records).values() for runs in of_pair.values() for record in runs]

    def values(read: Callable[[dict[str, Any]], Any]) -> str:
        return ", ".join(dict.fromkeys(str(read(record)) for record in chosen))

    count = values(lambda r: f"{r['samples']['train']:,} training and {r['samples']['test']:,} test images")
    more = [
        f"{SETS[data]}, {NETS[model]}: mean of {len(of_pair['bp'])}"
        for (data, model), of_pair in compared(records).items()
        if len(of_pair["bp"]) > 1
    ]
    seeds = f"one seed{' (' + '; '.join(more) + ')' if more else ''}"
    return (
        f"{count} of each set, equally many of each class, {values(lambda r: r['case']['epochs'])} epochs, batch "
        f"{values(lambda r: r['case']['batch_size'])}, {values(lambda r: r['case']['precision'])}, {seeds}, "
        f"{values(lambda r: r['machine']['cpu'])}, "
        f"{values(lambda r: r['case']['threads'])} thread, torch {values(lambda r: r['machine']['torch'])}, fastlocal "
        f"{values(lambda r: r['machine']['commit'])}."
    )


# ---------------------------------------------------------------------------------------------------------------- main


def main(argv: Sequence[str] | None = None) -> int:
    """Runs, suites, pictures; 0, or 2 for a bad argument."""
    options = _parser().parse_args(argv)
    try:
        return _main(options)
    except FastLocalError as error:
        print(f"fastlocal bench accuracy: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastlocal bench accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", metavar="PATH", help="a .npz file, or a folder of a known set")
    add("--suite", choices=("methods", "blocks", "all"), help="a list of runs instead of one; takes --seed alone")
    add(
        "--seeds",
        type=int,
        nargs="+",
        metavar="N",
        help="with --suite: all of it for each of these, in place of --seed",
    )
    add("--json", type=Path, metavar="PATH", help="append the records to this .jsonl file")
    add("--draw", type=Path, metavar="DIR", help="write the pictures of the records in --json, and train nothing")
    add("--list", action="store_true", help="print the commands of the suite, and train nothing")
    add("--quiet", action="store_true", help="no progress bar")
    default = Case("")
    for known in fields(Case):
        value, flag = getattr(default, known.name), "--" + known.name.replace("_", "-")
        if known.name == "data":
            continue
        if isinstance(value, dict):
            add(flag, action="append", default=[], metavar="NAME=VALUE", help="repeatable")
        elif isinstance(value, bool):
            add(flag, action="store_true")
        else:
            kind = int if known.name == "blocks" else type(value)
            add(flag, type=kind, default=value, help=f"({value})")
    return parser


def _main(o: argparse.Namespace) -> int:
    if o.draw is not None:
        if o.json is None:
            raise ArgumentError("--draw: needs the records; give --json PATH")
        for path in draw(read(o.json), o.draw):
            print(path)
        return 0
    if o.data is None:
        raise ArgumentError("--data: give a .npz file or the folder of a set that fastlocal.data.load knows")
    images = load(o.data)
    if o.suite is None and o.seeds:
        raise ArgumentError("--seeds: is for --suite; give --seed to a single run")
    if o.suite is None:
        cases = [_case(o, images.name)]
    else:
        seeds = o.seeds or [o.seed]
        cases = [replace(case, seed=seed) for seed in seeds for case in suite(o.suite, images.name)]
    if o.list:
        print("\n".join(case.command(o.data) for case in cases))
        return 0
    there = [] if o.json is None else [record["case"] for record in read(o.json)]
    for case in cases:
        if o.suite is not None and asdict(case) in there:
            continue
        torch.set_num_threads(case.threads)
        record = run(images, case, progress=not o.quiet)
        if o.json is not None:
            append(o.json, record)
        heads = " ".join("-" if a is None else f"{a:.1%}" for a in record["accuracies"])
        print(
            f"{record['accuracy']:.2%}  {case.command(o.data)}\n  blocks {heads}; {record['seconds']:.0f} s", flush=True
        )
    return 0


def _case(o: argparse.Namespace, data: str) -> Case:
    given = {known.name: getattr(o, known.name) for known in fields(Case)} | {"data": data}
    for name in ("model_option", "option"):
        given[name] = dict(_pair(name, text) for text in given[name])
    for name in ("epochs", "batch_size", "threads", "train", "test"):
        if given[name] < 1:
            raise ArgumentError(f"--{name.replace('_', '-')}: got {given[name]}; give at least 1")
    for name in ("lr", "weight_decay", "warmup"):
        if not (math.isfinite(given[name]) and given[name] >= 0):
            raise ArgumentError(f"--{name.replace('_', '-')}: got {given[name]}; give a number from 0")
    if given["optimizer"] not in ("sgd", "adam"):
        raise ArgumentError(f"--optimizer: got {given['optimizer']!r}; valid are 'sgd', 'adam'")
    return Case(**given)


def _pair(name: str, text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not key.isidentifier() or not equals:
        raise ArgumentError(f"--{name.replace('_', '-')}: got {text!r}; write NAME=VALUE, such as depth=3")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


if __name__ == "__main__":
    raise SystemExit(main())
