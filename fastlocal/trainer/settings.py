"""`Settings`: everything that decides a training on images, as plain values; `build` makes the Trainer and its data of them.

The command line's flags, its JSON files and the recipes are all `Settings`.
"""

# ruff: noqa: RUF009  (`_setting` makes a dataclass field)
from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlocal import models
from fastlocal.data import Batches, FolderImages, Images, Mixing, Source, load
from fastlocal.engine.clip import Clip
from fastlocal.engine.localize import localize
from fastlocal.errors import ArgumentError, did_you_mean
from fastlocal.methods import get_method
from fastlocal.trainer import optimizers
from fastlocal.trainer import schedule as schedules
from fastlocal.trainer.callbacks import Callback, EarlyStopping
from fastlocal.trainer.finetune import freeze, load_pretrained
from fastlocal.trainer.trainer import Trainer

OPTIMIZERS = {"sgd": (0.1, 5e-4), "adamw": (1e-3, 0.05), "adam": (1e-3, 0.0)}  # default rate and weight decay
_RISING = ("cosine", "tanh", "poly")  # schedules that rise over the first twentieth unless told otherwise


def _setting(
    kind: str, default: Any, help: str, metavar: str | None = None, *, low: float = 0, choices: Any = ()
) -> Any:
    """A field: ``kind`` says which values it takes (see `_fitting`), ``low`` the least number, ``help`` is for --help."""
    about = {"kind": kind, "help": help, "metavar": metavar, "low": low, "choices": tuple(choices)}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=about)
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class Settings:
    """A training on images. The fields are the flags of ``fastlocal train``; its ``--help`` says what each means.

    None takes what fits the others: the optimizer's usual rate, every unit a block, channels_last where there are 2-d
    convolutions, the image set's own mean and std.

    Raises:
        ArgumentError: a value of the wrong type, or out of range.
    """

    # data
    data: str = _setting(
        "text", "digits", "digits, cifar10, cifar100, svhn, stl10, mnist, fashion_mnist, PATH.npz or FOLDER"
    )
    root: str | None = _setting("text?", None, "folder of a named set's files; nothing is downloaded", "DIR")
    size: int | None = _setting("int?", None, "side of the square cut from pictures in folders", "PIXELS", low=1)
    lazy: bool = _setting("bool", False, "decode a folder's pictures batch by batch, with random resized crops")
    workers: int = _setting("int", 0, "processes that decode for --lazy")
    train_samples: int | float | None = _setting(
        "amount?", None, "only so many training images of each class, or a fraction such as 0.1", "N"
    )
    test_samples: int | float | None = _setting("amount?", None, "the same for the test images", "N")
    mean: tuple[float, ...] | None = _setting("numbers?", None, "of the channels, 0 to 1 (the training set's)", "M,M,M")
    std: tuple[float, ...] | None = _setting("numbers?", None, "of the channels (the training set's)", "S,S,S")
    crop: int = _setting("int", 0, "random crops with this border", "PIXELS")
    border: str = _setting("choice", "reflect", "of crops", choices=("reflect", "black"))
    flip: bool = _setting("bool", False, "mirror every second image at random")
    cutout: int = _setting("int", 0, "side of a square of mean colour put on each image at random", "PIXELS")
    mixup: float = _setting("number", 0.0, "alpha of mixup", "ALPHA")
    cutmix: float = _setting("number", 0.0, "alpha of CutMix", "ALPHA")
    smoothing: float = _setting("number", 0.0, "of the labels")
    # network and method
    model: str = _setting("text", "resnet20", "see `fastlocal models`")
    model_option: dict[str, Any] = _setting("pairs", {}, "an option of the model; may be repeated", "NAME=VALUE")
    pretrained: str | None = _setting("text?", None, "weights of the plain network to begin with", "FILE")
    freeze: tuple[int | str, ...] = _setting("names", (), "blocks by number, modules and parameters by name", "NAMES")
    method: str = _setting("text", "auglocal", "see `fastlocal methods`")
    mode: str = _setting("text", "paper", "paper or official")
    option: dict[str, Any] = _setting("pairs", {}, "an option of the method; may be repeated", "NAME=VALUE")
    blocks: int | str | list[str] | None = _setting(
        "blocks", None, "how many, names to cut after (a,b), or auto (every unit; bp: 1)", "N|NAMES|auto"
    )
    memory_budget: str | None = _setting("text?", None, "for --blocks auto, of one batch", "4GiB")
    # optimization
    epochs: int = _setting("int", 10, "", low=1)
    batch_size: int = _setting("int", 64, "images a batch", low=1)
    accumulate: int = _setting("int", 1, "batches an update", low=1)
    optimizer: str = _setting("choice", "sgd", "", choices=OPTIMIZERS)
    lr: float | None = _setting("number?", None, "top learning rate (sgd 0.1, else 0.001)")
    momentum: float = _setting("number", 0.9, "of sgd")
    nesterov: bool = _setting("bool", True, "Nesterov's form of sgd's momentum")
    weight_decay: float | None = _setting("number?", None, "(sgd 0.0005, adamw 0.05, adam 0)")
    decay_all: bool = _setting("bool", True, "weight decay also for biases, norms and tokens")
    layer_decay: float | None = _setting(
        "number?", None, "factor of the learning rate from each unit to the one before"
    )
    scheduler: str = _setting("choice", "cosine", "", choices=("none", *schedules.NAMES))
    scheduler_option: dict[str, Any] = _setting(
        "pairs", {}, "an option of the scheduler; may be repeated", "NAME=VALUE"
    )
    warmup_epochs: float | None = _setting(
        "number?", None, "epochs in which the rate rises (a twentieth of cosine, tanh, poly)", "N"
    )
    clip: float | None = _setting("number?", None, "largest norm, value or ratio of gradients", "VALUE")
    clip_mode: str = _setting("choice", "norm", "", choices=("norm", "value", "agc"))
    clip_scope: str = _setting("choice", "block", "", choices=("block", "global"))
    ema: float | None = _setting("number?", None, "decay of a moving average of the weights, such as 0.999", "DECAY")
    recalibrate: int = _setting(
        "int", 0, "training batches that BatchNorm statistics are averaged over at the end", "N"
    )
    # machine
    precision: str = _setting("text", "32-true", "32-true, bf16-mixed or 16-mixed")
    channels_last: bool | None = _setting("bool?", None, "memory format (on where the network has 2-d convolutions)")
    schedule: str = _setting("choice", "auto", "of blocks", choices=("auto", "sequential", "overlap", "pipeline"))
    schedule_workers: int | None = _setting("int?", None, "tasks at once in a schedule (2 to 4; 2 on a GPU)", low=1)
    in_flight: int | None = _setting(
        "int?", None, "steps on their way at once in a pipeline (as many as workers)", low=1
    )
    schedule_budget: str | None = _setting("text?", None, "for what the tasks in flight hold", "4GiB")
    graph: str = _setting("choice", "auto", "CUDA graphs", choices=("auto", "on", "off"))
    backend: str = _setting("choice", "auto", "of operators", choices=("auto", "reference", "triton", "native"))
    update: str = _setting("choice", "auto", "when blocks are updated", choices=("auto", "immediate", "end"))
    device: str = _setting("text", "auto", "auto (cuda if there is one), cpu, cuda, ...")
    threads: int | None = _setting("int?", None, "CPU threads of PyTorch (its own default)", low=1)
    # run
    seed: int = _setting("int", 0, "of weights, order, crops, flips, mixing")
    deterministic: bool = _setting("bool", False, "deterministic kernels on CUDA")
    nonfinite: str = _setting(
        "choice", "raise", "what a loss or gradient that is not finite does", choices=("raise", "skip", "stop")
    )
    validate_every: int = _setting("int", 1, "epochs", low=1, metavar="N")
    early_stopping: int | None = _setting(
        "int?", None, "stop after so many epochs without improvement", "PATIENCE", low=1
    )
    monitor: str | None = _setting(
        "text?", None, "column of metrics.csv for the best checkpoint, plateaus, early stopping", "COLUMN"
    )
    save_every: int | None = _setting("int?", None, "batches between checkpoints within an epoch", "N", low=1)
    keep_last: int = _setting("int", 3, "checkpoints kept", "N", low=1)
    keep_best: int = _setting("int", 1, "best checkpoints kept besides", "N")
    log_every: int = _setting("int", 50, "steps between rows of steps.csv", "N", low=1)
    tensorboard: bool = _setting("bool", False, "log to TensorBoard too")
    wandb: bool = _setting("bool", False, "log to Weights & Biases too")

    def __post_init__(self) -> None:
        for one in fields(self):
            object.__setattr__(self, one.name, _fitting(one, getattr(self, one.name)))

    def with_(self, **changes: Any) -> Settings:
        """The same with changes.

        Options are merged name by name. What belonged to something that is replaced goes with it: another model, method
        or scheduler drops the options of the old one, another optimizer its rates, other data their mean and std.

        Raises:
            ArgumentError: an unknown name, or a bad value.
        """
        known = [one.name for one in fields(self)]
        now: dict[str, Any] = {one.name: getattr(self, one.name) for one in fields(self)}
        for name in changes:
            if name not in known:
                raise ArgumentError(f"{name}: is no setting. {did_you_mean(name, known)}")
        for name, dependent in _DEPENDENT.items():
            if name in changes and changes[name] != now[name]:
                now |= {one.name: _default(one) for one in fields(self) if one.name in dependent}
        if changes.get("method") == "bp":
            now["blocks"] = None
        for name, value in changes.items():
            merged = isinstance(now[name], dict) and isinstance(value, Mapping)
            now[name] = {**now[name], **value} if merged else value
        return Settings(**now)

    def changed(self) -> dict[str, Any]:
        """The settings that are not the default ones."""
        return {one.name: getattr(self, one.name) for one in fields(self) if getattr(self, one.name) != _default(one)}

    def write(self, path: str | Path) -> None:
        """All settings as a JSON file that `read_settings` takes."""
        Path(path).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")


_DEPENDENT = {
    "model": ("model_option",),
    "method": ("option", "mode"),
    "scheduler": ("scheduler_option", "warmup_epochs"),
    "optimizer": ("lr", "weight_decay"),
    "data": ("mean", "std"),
}


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings in a JSON file, such as a run's ``command.json``, for `Settings.with_`.

    Raises:
        ArgumentError: there is no such file, or it is not a JSON object of settings.
    """
    try:
        found = json.loads(Path(path).read_text())
    except OSError as error:
        raise ArgumentError(f"config: cannot read {path} ({error.strerror}); give a JSON file of settings") from error
    except ValueError as error:
        raise ArgumentError(f"config: {path} is no JSON ({error}); write such as {{'epochs': 20}}") from error
    if not isinstance(found, dict):
        raise ArgumentError(f"config: {path} holds {type(found).__name__}; write an object such as {{'epochs': 20}}")
    if isinstance(found.get("model"), dict):
        raise ArgumentError(f"config: {path} is the record of a run; give the command.json beside it")
    return found


def _default(one: dataclasses.Field[Any]) -> Any:
    return {} if one.default is dataclasses.MISSING else one.default


def _fitting(one: dataclasses.Field[Any], value: Any) -> Any:
    """The value in its final form. Raises ArgumentError where it does not fit the field."""
    kind, low, choices = (one.metadata[key] for key in ("kind", "low", "choices"))
    if value is None and (kind.endswith("?") or kind == "blocks"):
        return None
    kind = kind.removesuffix("?")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    whole = isinstance(value, int) and not isinstance(value, bool)
    good, wanted = False, ""
    if kind == "int":
        good, wanted = whole and value >= low, f"an integer from {low}"
    elif kind == "number":
        good, wanted = number and low <= value < math.inf, f"a number from {low}"
        value = float(value) if good else value
    elif kind == "amount":
        good = value >= 1 if whole else number and 0 < value <= 1
        wanted = "images of each class (an integer from 1) or a fraction (0.0 < n <= 1.0)"
    elif kind == "bool":
        good, wanted = isinstance(value, bool), "true or false"
    elif kind == "choice":
        good, wanted = value in choices, f"one of {', '.join(choices)}"
    elif kind == "text":
        value = str(value) if isinstance(value, Path) else value
        good, wanted = isinstance(value, str), "text"
    elif kind == "pairs":
        good, wanted = isinstance(value, Mapping) and all(isinstance(key, str) for key in value), "names and values"
        value = dict(value) if good else value
    elif kind == "numbers":
        good = isinstance(value, list | tuple) and all(isinstance(n, int | float) for n in value)
        wanted, value = "a number for each channel", tuple(value) if good else value
    elif kind == "names":
        good = isinstance(value, list | tuple) and all(isinstance(n, int | str) for n in value)
        wanted, value = "a list of names", tuple(value) if good else value
    elif kind == "blocks":
        good = whole or isinstance(value, str) or (isinstance(value, list) and all(isinstance(n, str) for n in value))
        wanted = "how many, a list of names, or auto"
    if not good:
        raise ArgumentError(f"{one.name}: got {value!r}; give {wanted}")
    return value


# --------------------------------------------------------------------------------------------------------------- build


class Run(NamedTuple):
    """A Trainer and what it trains on."""

    trainer: Trainer
    train: Source
    test: Source
    epochs: int
    about: str

    def fit(self, *, resume: bool = False) -> list[dict[str, Any]]:
        """See `Trainer.fit`."""
        return self.trainer.fit(self.train, self.test, epochs=self.epochs, resume=resume)


def build(
    settings: Settings,
    images: Images | None = None,
    *,
    folder: str | Path | None = None,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    fast_dev_run: bool | int = False,
    going_on: bool = False,
) -> Run:
    """The Trainer of ``settings`` and its data. Seeds PyTorch's global stream; writes nothing.

    Args:
        settings: what to train.
        images: instead of ``settings.data``.
        folder, callbacks, progress, fast_dev_run: see `Trainer`; None writes nothing.
        going_on: a checkpoint will be loaded, so pretrained weights are not.

    Raises:
        ArgumentError: settings that do not fit each other, or a set that cannot be read.
    """
    s = settings
    device = pick_device(s.device)
    torch.manual_seed(s.seed)
    data = _lazy(s, device) if s.lazy and images is None else _in_memory(s, images, device)
    x = next(data.train.epoch(0))[0][:2]
    net = _network(s, data.shape, data.num_classes).to(device)
    _try(net, x, s)
    if s.pretrained is not None and not going_on:
        load_pretrained(net, s.pretrained)
    model = localize(
        net,
        s.method,
        blocks=_blocks(s, net),
        sample=x,
        mode=s.mode,
        num_classes=data.num_classes,
        memory_budget=s.memory_budget,
        budget_batch=s.batch_size if s.memory_budget else None,
        **_method_options(s, data),
    )
    if s.freeze:
        freeze(model, *s.freeze)
    plan = _scheduler(s)
    lr, factory = _optimizer(s)
    probe = torch.optim.SGD(
        [torch.zeros(1, requires_grad=True)], lr
    )  # bad options are refused before a file is written
    schedules.make(plan, probe, epochs=s.epochs, steps_per_epoch=math.ceil(len(data.train) / s.accumulate))
    mixed = bool(s.mixup or s.cutmix or s.smoothing)
    stopping: list[Callback] = []
    if s.early_stopping is not None:
        watched = s.monitor or "val_accuracy"
        stopping = [EarlyStopping(watched, mode="min" if "loss" in watched else "max", patience=s.early_stopping)]
    trainer = Trainer(
        model,
        factory,
        scheduler=plan,
        precision=s.precision,
        schedule=s.schedule,  # type: ignore[arg-type]
        workers=s.schedule_workers,
        in_flight=s.in_flight,
        memory_budget=s.schedule_budget,
        graph=s.graph,  # type: ignore[arg-type]
        backend=s.backend,  # type: ignore[arg-type]
        update=s.update,  # type: ignore[arg-type]
        channels_last="auto" if s.channels_last is None else s.channels_last,
        accumulate=s.accumulate,
        clip=None if s.clip is None else Clip(s.clip, mode=s.clip_mode, scope=s.clip_scope),  # type: ignore[arg-type]
        mixing=Mixing(s.mixup, s.cutmix, smoothing=s.smoothing, seed=s.seed) if mixed else None,
        ema=s.ema,
        nonfinite=s.nonfinite,  # type: ignore[arg-type]
        deterministic=s.deterministic,
        seed=s.seed,
        folder=folder,
        save_every=s.save_every,
        keep_last=s.keep_last,
        keep_best=s.keep_best,
        monitor=s.monitor,
        callbacks=[*stopping, *callbacks],
        loggers=[name for name in ("tensorboard", "wandb") if getattr(s, name)],
        progress=progress,
        log_every=s.log_every,
        validate_every=s.validate_every,
        recalibrate=s.recalibrate,
        fast_dev_run=fast_dev_run,
    )
    return Run(trainer, data.train, data.test, s.epochs, f"{data.about} on {device}")


class _Data(NamedTuple):
    train: Source
    test: Source
    shape: tuple[int, int, int]
    num_classes: int
    mean: list[float]
    std: list[float]
    about: str


def _in_memory(s: Settings, images: Images | None, device: torch.device) -> _Data:
    if images is None:
        options: dict[str, Any] = {} if s.root is None else {"root": s.root}
        if s.size is not None:
            options["size"] = s.size
        images = load(s.data, **options)
    if s.train_samples is not None:
        images = images.subset(s.train_samples)
    if s.test_samples is not None:
        swapped = dataclasses.replace(images, x_train=images.x_test, y_train=images.y_test).subset(s.test_samples)
        images = dataclasses.replace(images, x_test=swapped.x_train, y_test=swapped.y_train)
    images = dataclasses.replace(
        images, mean=_channels("mean", s.mean, images.mean), std=_channels("std", s.std, images.std)
    ).to(device)
    augmentation: dict[str, Any] = {"crop": s.crop, "flip": s.flip, "cutout": s.cutout, "border": s.border}
    train = Batches(images, batch_size=s.batch_size, seed=s.seed, **augmentation)
    test = Batches(images, train=False, batch_size=max(256, s.batch_size))
    return _Data(train, test, images.shape, images.num_classes, images.mean.tolist(), images.std.tolist(), repr(images))


def _channels(name: str, given: tuple[float, ...] | None, own: Tensor) -> Tensor:
    if given is None:
        return own
    if len(given) not in (1, len(own)) or (name == "std" and min(given) <= 0):
        raise ArgumentError(f"{name}: got {given}; give 1 or {len(own)} numbers{', above 0' * (name == 'std')}")
    return torch.tensor(given, dtype=torch.float32).expand(len(own)).clone()


def _lazy(s: Settings, device: torch.device) -> _Data:
    for name in ("crop", "cutout", "train_samples", "test_samples"):
        if getattr(s, name):
            raise ArgumentError(
                f"{name}: pictures that are decoded batch by batch cannot have it; leave it or lazy out"
            )
    root = Path(s.root or s.data)
    held = "val" if (root / "val").is_dir() else "test"
    size = s.size or 224
    parts = [FolderImages(root, part=part, size=size, flip=s.flip, seed=s.seed) for part in ("train", held)]
    options: dict[str, Any] = {"workers": s.workers, "device": device, "seed": s.seed, "mean": s.mean, "std": s.std}
    train = parts[0].batches(batch_size=s.batch_size, **options)
    test = parts[1].batches(batch_size=max(256, s.batch_size), **options)
    return _Data(
        train, test, (3, size, size), parts[0].num_classes, list(train.mean), list(train.std),
        f"{parts[0]!r}, {len(parts[1])} for validation",
    )  # fmt: skip


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is one. Raises ArgumentError for one that cannot be used."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ArgumentError(f"device: {name!r} cannot be used ({reason}); use auto or cpu") from error
    return device


def _network(s: Settings, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """The model, with what the images decide filled in where it takes it; given options win."""
    accepted = models.options(s.model)
    channels, height, width = shape
    if "num_classes" not in accepted:
        raise ArgumentError(
            f"model: {s.model} does not classify images; see `fastlocal models` for one with num_classes"
        )
    fitting = {"num_classes": num_classes, "in_channels": channels, "in_features": channels * height * width}
    if "img_size" in accepted:
        if height != width:
            raise ArgumentError(f"model: {s.model} takes square images, these are {height}x{width}; use another model")
        fitting["img_size"] = height
    return models.create(s.model, **{key: value for key, value in fitting.items() if key in accepted} | s.model_option)


@torch.no_grad()
def _try(net: nn.Module, x: Tensor, s: Settings) -> None:
    try:
        net.eval()(x)
    except (RuntimeError, ValueError) as error:
        size = "x".join(map(str, x.shape[1:]))
        reason = str(error).splitlines()[0]
        raise ArgumentError(f"model: {s.model} cannot take {size} images ({reason}); use another one") from error
    net.train()


def _method_options(s: Settings, data: _Data) -> dict[str, Any]:
    """Those given; a method that works on the image itself is told how it was normalised."""
    known = {one.name for one in fields(get_method(s.method).Options)}
    return {key: value for key, value in (("mean", data.mean), ("std", data.std)) if key in known} | s.option


def _blocks(s: Settings, net: nn.Module) -> Any:
    if s.blocks is None:
        return 1 if s.method == "bp" else len(net.units())  # type: ignore[operator]
    return s.blocks


def _scheduler(s: Settings) -> Any:
    if s.scheduler == "none":
        return None
    options = dict(s.scheduler_option)
    if s.warmup_epochs is not None:
        options["warmup_epochs"] = s.warmup_epochs
    elif s.scheduler in _RISING:
        options.setdefault("warmup_epochs", s.epochs / 20)
    return s.scheduler, options


def _optimizer(s: Settings) -> tuple[float, optimizers.Factory]:
    lr, decay = OPTIMIZERS[s.optimizer]
    lr = lr if s.lr is None else s.lr
    decay = decay if s.weight_decay is None else s.weight_decay
    own: dict[str, Any] = {"weight_decay": decay, "no_decay": not s.decay_all, "layer_decay": s.layer_decay}
    if s.optimizer == "sgd":
        return lr, optimizers.sgd(lr, momentum=s.momentum, nesterov=s.nesterov, **own)
    kind = torch.optim.AdamW if s.optimizer == "adamw" else torch.optim.Adam
    return lr, optimizers.factory(kind, lr=lr, **own)
