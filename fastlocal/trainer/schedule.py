"""Learning-rate schedules: by timm's names, by the papers' names, as (epoch, rate) lists, or PyTorch's own schedulers.

All work on a `LocalOptimizer` as on any optimizer: its groups keep their proportions, whatever rate each block has.
"""

from __future__ import annotations

import inspect
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from fastlocal.errors import ArgumentError, did_you_mean

Shape = Callable[[int, int, int, float], float]  # (time, whole time, time of an epoch, top rate) -> rate


class _Cosine:
    """A class, not a closure: the scheduler's state_dict carries its numbers."""

    def __init__(self, steps: int, warmup: int):
        self.steps, self.warmup = steps, warmup

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def cosine(optimizer: Optimizer, steps: int, warmup: int = 0) -> LambdaLR:
    """A linear rise over ``warmup`` steps, then half a cosine down to 0 at step ``steps``; step it once a batch.

    Args:
        optimizer: `Engine.optimizer` or any other; each group's own ``lr`` is the top of its curve.
        steps: steps of the whole training.
        warmup: those of the rise.

    Raises:
        ArgumentError: ``steps`` below 1, or ``warmup`` not from 0 to ``steps``.
    """
    if steps < 1:
        raise ArgumentError(f"steps: got {steps}; give the number of training steps, at least 1")
    if not 0 <= warmup <= steps:
        raise ArgumentError(f"warmup: got {warmup}; give 0 up to steps ({steps})")
    return LambdaLR(optimizer, _Cosine(steps, warmup))


# --- what `make` returns ---------------------------------------------------------------------------------------------


class Schedule:
    """Counts steps and epochs, and leaves the learning rates alone. What `make` returns is this or a subclass.

    Attributes:
        optimizer: whose groups are set.
        steps, epochs: completed ones.
    """

    kind = "none"

    def __init__(self, optimizer: Optimizer, steps_per_epoch: int):
        self.optimizer, self.steps_per_epoch = optimizer, steps_per_epoch
        self.steps = self.epochs = 0

    @property
    def lrs(self) -> list[float]:
        """The current rate of each parameter group."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def after_step(self) -> None:
        """Call it once after every optimizer step."""
        self.steps += 1
        self._stepped()

    def after_epoch(self, metric: float | None = None) -> None:
        """Call it once after every epoch, after the last ``after_step``.

        Args:
            metric: what a plateau is looked for in; None (nothing was measured) leaves a plateau schedule as it is.
        """
        self.epochs += 1
        self.steps = self.epochs * self.steps_per_epoch  # an epoch may have been shorter than announced
        self._finished(metric)

    def _stepped(self) -> None: ...

    def _finished(self, metric: float | None) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        """Numbers, strings and lists and dicts of these: `CheckpointStore` saves it."""
        return {"kind": self.kind, "steps": self.steps, "epochs": self.epochs, **self._state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where ``state`` was taken; sets the rates of that moment.

        Raises:
            ArgumentError: ``state`` is of another kind of schedule, or of another number of parameter groups.
        """
        if state.get("kind") != self.kind:
            raise ArgumentError(
                f"state_dict: is of the schedule {state.get('kind')!r}, this one is {self.kind!r}; resume with the same schedule"
            )
        self._load(state)
        self.steps, self.epochs = state["steps"], state["epochs"]
        self._loaded()

    def _state(self) -> dict[str, Any]:
        return {}

    def _load(self, state: dict[str, Any]) -> None: ...

    def _loaded(self) -> None: ...

    def _check_groups(self, saved: int) -> None:
        here = len(self.optimizer.param_groups)
        if saved != here:
            raise ArgumentError(
                f"state_dict: has the rates of {saved} parameter groups, the optimizer {here}; resume with the same model and optimizer"
            )


class _Curve(Schedule):
    """Rates as a function of the time alone, so that a resumed run cannot drift from an uninterrupted one."""

    def __init__(
        self, kind: str, shape: Shape, per_step: bool, optimizer: Optimizer, epochs: int, steps_per_epoch: int
    ):
        super().__init__(optimizer, steps_per_epoch)
        self.kind, self._shape, self._per_step, self._whole = kind, shape, per_step, epochs
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", float(group["lr"]))
        self._base = [float(group["initial_lr"]) for group in optimizer.param_groups]
        self._top = _top(optimizer, self._base)
        self._set()

    def _set(self) -> None:
        unit = self.steps_per_epoch if self._per_step else 1
        now = self.steps if self._per_step else self.epochs
        whole = self._whole * unit
        rate = self._shape(min(now, whole), whole, unit, self._top)
        for group, base in zip(self.optimizer.param_groups, self._base, strict=True):
            _put(group, "lr", rate if base == self._top else rate * (base / self._top))

    def _stepped(self) -> None:
        if self._per_step:
            self._set()

    def _finished(self, metric: float | None) -> None:
        self._set()

    def _state(self) -> dict[str, Any]:
        return {"top": self._top, "base": list(self._base)}

    def _load(self, state: dict[str, Any]) -> None:
        self._check_groups(len(state["base"]))
        self._top, self._base = state["top"], list(state["base"])

    def _loaded(self) -> None:
        self._set()


# What PyTorch's schedulers write into a group.
_FIELDS = ("lr", "initial_lr", "max_lr", "min_lr", "momentum", "base_momentum", "max_momentum", "betas")


class _Torch(Schedule):
    """A scheduler of PyTorch. Several of them go on from the rate in the group, so the state has the groups' fields too."""

    def __init__(
        self,
        scheduler: LRScheduler | ReduceLROnPlateau,
        per_step: bool,
        optimizer: Optimizer,
        steps_per_epoch: int,
        last: int | None = None,
    ):
        super().__init__(optimizer, steps_per_epoch)
        self.kind, self.scheduler, self._per_step, self._last = type(scheduler).__name__, scheduler, per_step, last

    def _stepped(self) -> None:
        if self._per_step and (self._last is None or self.steps <= self._last):
            self.scheduler.step()  # type: ignore[call-arg]

    def _finished(self, metric: float | None) -> None:
        if isinstance(self.scheduler, ReduceLROnPlateau):
            if metric is not None:
                self.scheduler.step(metric)
        elif not self._per_step:
            self.scheduler.step()

    def _state(self) -> dict[str, Any]:
        groups = [
            {key: float(g[key]) if isinstance(g[key], Tensor) else g[key] for key in _FIELDS if key in g}
            for g in self.optimizer.param_groups
        ]
        return {"scheduler": self.scheduler.state_dict(), "groups": groups}

    def _load(self, state: dict[str, Any]) -> None:
        self._check_groups(len(state["groups"]))
        self.scheduler.load_state_dict(state["scheduler"])
        for group, saved in zip(self.optimizer.param_groups, state["groups"], strict=True):
            for key, value in saved.items():
                _put(group, key, tuple(value) if key == "betas" else value)


class PerStep:
    """A PyTorch scheduler that is stepped once a batch instead of once an epoch.

    Args:
        make: function of the optimizer, such as ``lambda opt: OneCycleLR(opt, 0.1, total_steps=1000)``.

    Raises:
        ArgumentError: ``make`` is no function.
    """

    def __init__(self, make: Callable[[Optimizer], LRScheduler]):
        if isinstance(make, LRScheduler) or not callable(make):
            raise ArgumentError(
                f"make: expected a function from the optimizer to a scheduler, got {type(make).__name__}"
            )
        self.make = make


def _put(group: dict[str, Any], key: str, value: Any) -> None:
    if isinstance(group.get(key), Tensor):  # a capturable optimizer reads this very tensor
        group[key].fill_(value)
    else:
        group[key] = value


def _top(optimizer: Optimizer, base: list[float]) -> float:
    """The rate that the optimizer was made with: what a schedule's numbers refer to."""
    made = optimizer.defaults.get("lr")
    return max(base) or 1.0 if isinstance(made, Tensor) or not made else float(made)  # a tensor may be the group's own


# --- shapes ----------------------------------------------------------------------------------------------------------


def _cosine(min_lr: float = 0.0, warmup_prefix: bool = False) -> Shape:
    def shape(t: int, whole: int, unit: int, top: float) -> float:
        return min_lr + 0.5 * (top - min_lr) * (1 + math.cos(math.pi * t / whole))

    return shape


def _tanh(lb: float = -7.0, ub: float = 3.0, min_lr: float = 0.0, warmup_prefix: bool = False) -> Shape:
    if not lb < ub:
        raise ArgumentError(f"schedule: lb must be below ub, got {lb} and {ub}")

    def shape(t: int, whole: int, unit: int, top: float) -> float:
        done = t / whole
        return min_lr + 0.5 * (top - min_lr) * (1 - math.tanh(lb * (1.0 - done) + ub * done))

    return shape


def _poly(power: float = 1.0, min_lr: float = 0.0, warmup_prefix: bool = False) -> Shape:
    def shape(t: int, whole: int, unit: int, top: float) -> float:
        return min_lr + (top - min_lr) * (1 - t / whole) ** power

    return shape


def _step(decay_epochs: float, decay_rate: float = 0.1, min_lr: float = 0.0) -> Shape:
    if decay_epochs <= 0:
        raise ArgumentError(f"schedule: decay_epochs must be above 0, got {decay_epochs}")
    return lambda t, whole, unit, top: max(min_lr, top * decay_rate ** (t // (decay_epochs * unit)))


def _multistep(milestones: Sequence[int], decay_rate: float = 0.1, min_lr: float = 0.0) -> Shape:
    if list(milestones) != sorted(milestones):
        raise ArgumentError(f"schedule: milestones must rise, got {list(milestones)}")
    return lambda t, whole, unit, top: max(min_lr, top * decay_rate ** bisect_right([m * unit for m in milestones], t))


def _exponential(decay_rate: float, min_lr: float = 0.0) -> Shape:
    return lambda t, whole, unit, top: max(min_lr, top * decay_rate ** (t / unit))


def _constant() -> Shape:
    return lambda t, whole, unit, top: top


def _local(warmup_epochs: int = 10, warmup_lr: float = 0.01) -> Shape:
    """The CIFAR schedule of InfoPro, which AugLocal and its descendants share: rates of whole epochs, counted from 1.

    During the warm-up the cosine's weight rises by 1/warmup_epochs an epoch from 0, and that of ``warmup_lr`` falls.
    """

    def shape(t: int, whole: int, unit: int, top: float) -> float:
        epoch = min(t + 1, whole)
        half = 0.5 * top * (1 + math.cos(math.pi * epoch / whole))
        if epoch > warmup_epochs:
            return half
        return half * (epoch - 1) / warmup_epochs + warmup_lr * (warmup_epochs + 1 - epoch) / warmup_epochs

    return shape


_SHAPES: dict[str, tuple[Callable[..., Shape], bool]] = {  # and whether the rate changes at every step by default
    "cosine": (_cosine, True),
    "tanh": (_tanh, True),
    "poly": (_poly, True),
    "step": (_step, False),
    "multistep": (_multistep, False),
    "exponential": (_exponential, False),
    "constant": (_constant, False),
}
_PAPERS: dict[str, tuple[str, dict[str, Any]]] = {
    "infopro": ("local", {}),
    "auglocal": ("local", {}),
    "infopro-imagenet": ("cosine", {"per_step": False}),
    "auglocal-imagenet": ("cosine", {"per_step": False}),
    "predsim": ("multistep", {"milestones": [200, 300, 350, 375], "decay_rate": 0.25}),
    "dgl": ("step", {"decay_epochs": 15, "decay_rate": 0.2}),
    "dgl-imagenet": ("step", {"decay_epochs": 10, "decay_rate": 0.1}),
}
NAMES = (*_SHAPES, "plateau", "onecycle", *_PAPERS)
_COMMON = ("per_step", "warmup_epochs", "warmup_lr", "warmup_factor")


def _warmed(shape: Shape, epochs: float, rate: float | None, factor: float | None, prefix: bool) -> Shape:
    """``shape`` after a linear rise. With ``prefix`` it starts at its end, else it had been running under it."""

    def warmed(t: int, whole: int, unit: int, top: float) -> float:
        warm = epochs * unit
        if t >= warm:
            return shape(t - warm, max(1, whole - warm), unit, top) if prefix else shape(t, whole, unit, top)  # type: ignore[arg-type]
        low = top * factor if factor is not None else 1e-5 if rate is None else rate
        return low + t * ((top - low) / warm)

    return warmed


def _named(name: str, options: dict[str, Any], optimizer: Optimizer, epochs: int, steps_per_epoch: int) -> Schedule:
    if name not in NAMES:
        raise ArgumentError(f"schedule: there is no {name!r}. {did_you_mean(name, NAMES)}")
    base, own = _PAPERS.get(name, (name, {}))
    options = {**own, **options}
    if base == "plateau":
        return _plateau(options, optimizer, steps_per_epoch)
    if base == "onecycle":
        return _one_cycle(options, optimizer, epochs, steps_per_epoch)
    if base == "local":
        _check(name, options, _local, ())
        return _Curve(name, _local(**options), False, optimizer, epochs, steps_per_epoch)
    make, per_step = _SHAPES[base]
    _check(name, options, make, _COMMON)
    per_step = options.pop("per_step", per_step)
    warm = options.pop("warmup_epochs", 0)
    rate, factor = options.pop("warmup_lr", None), options.pop("warmup_factor", None)
    if rate is not None and factor is not None:
        raise ArgumentError("schedule: give warmup_lr or warmup_factor, not both")
    shape = make(**options)
    if warm:
        shape = _warmed(shape, warm, rate, factor, options.get("warmup_prefix", False))
    return _Curve(name, shape, per_step, optimizer, epochs, steps_per_epoch)


def _check(name: str, options: dict[str, Any], make: Callable[..., Any], common: Sequence[str]) -> None:
    """Refuses options that ``make`` does not have, lacks, or that have the wrong type."""
    known = inspect.signature(make).parameters
    valid = (*known, *common)
    for key, value in options.items():
        if key not in valid:
            raise ArgumentError(f"schedule: {name!r} has no option {key!r}. {did_you_mean(key, valid)}")
        if key == "milestones":
            good, kind = (
                isinstance(value, (list, tuple)) and all(_is_number(m) and m >= 0 for m in value),
                "a list of epochs",
            )
        elif key in ("per_step", "warmup_prefix"):
            good, kind = isinstance(value, bool), "True or False"
        elif key in ("lb", "ub"):
            good, kind = _is_number(value), "a number"
        else:
            good, kind = _is_number(value) and value >= 0, "a number from 0"
        if not good:
            raise ArgumentError(f"schedule: {key} must be {kind}, got {value!r}")
    lacking = [key for key, p in known.items() if p.default is p.empty and key not in options]
    if lacking:
        raise ArgumentError(f"schedule: {name!r} needs {lacking[0]}; give ({name!r}, {{{lacking[0]!r}: ...}})")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _plateau(options: dict[str, Any], optimizer: Optimizer, steps_per_epoch: int) -> Schedule:
    def known(patience: int = 10, decay_rate: float = 0.1, mode: str = "max", threshold: float = 1e-4,
              threshold_mode: str = "rel", cooldown: int = 0, min_lr: float = 0.0) -> None: ...  # fmt: skip

    texts = {key: options[key] for key in ("mode", "threshold_mode") if key in options}
    _check("plateau", {key: value for key, value in options.items() if key not in texts}, known, ())
    options = {"mode": "max", **options}
    factor = options.pop("decay_rate", 0.1)
    try:
        scheduler = ReduceLROnPlateau(optimizer, factor=factor, **options)
    except ValueError as error:
        raise ArgumentError(f"schedule: 'plateau' refuses {options} and decay_rate={factor}: {error}") from error
    return _Torch(scheduler, False, optimizer, steps_per_epoch)


def _one_cycle(options: dict[str, Any], optimizer: Optimizer, epochs: int, steps_per_epoch: int) -> Schedule:
    taken = ("optimizer", "total_steps", "epochs", "steps_per_epoch", "last_epoch", "verbose", "self")
    valid = [key for key in inspect.signature(OneCycleLR).parameters if key not in taken]
    for key in options:
        if key not in valid:
            raise ArgumentError(f"schedule: 'onecycle' has no option {key!r}. {did_you_mean(key, valid)}")
    last = epochs * steps_per_epoch
    own = [float(group.get("max_lr", group["lr"])) for group in optimizer.param_groups]
    try:
        scheduler = OneCycleLR(optimizer, **{"max_lr": own, **options}, total_steps=last)
    except (ValueError, TypeError) as error:
        raise ArgumentError(f"schedule: 'onecycle' refuses {options}: {error}") from error
    return _Torch(scheduler, True, optimizer, steps_per_epoch, last)


def _table(spec: Sequence[Any]) -> Shape:
    """``[(0, 0.1), (30, 0.01)]``: from epoch 0 on 0.1, from epoch 30 on 0.01."""
    pairs = [tuple(entry) if isinstance(entry, (list, tuple)) else (entry,) for entry in spec]
    good = all(len(p) == 2 and isinstance(p[0], int) and _is_number(p[1]) and p[1] >= 0 for p in pairs)
    starts = [p[0] for p in pairs]
    if not good or not pairs or starts[0] != 0 or any(a >= b for a, b in pairwise(starts)):
        raise ArgumentError(
            f"schedule: got {list(spec)!r}; a list has an (epoch, rate) for epoch 0 first and then rising epochs, such as "
            "[(0, 0.1), (30, 0.01)]"
        )
    return lambda t, whole, unit, top: float(pairs[bisect_right(starts, t) - 1][1])


def make(spec: Any, optimizer: Optimizer, *, epochs: int, steps_per_epoch: int) -> Schedule:
    """A schedule for ``optimizer``, whose rates are set for the first step at once.

    Every number is for a group with the ``lr`` that the optimizer was made with (``optimizer.defaults["lr"]``); groups
    that have another ``lr`` at first keep their ratio to it.

    Args:
        spec: what schedule.

            - None: the rates stay.
            - a name, or ``(name, options)``. ``"cosine"`` (min_lr), ``"tanh"`` (lb, ub, min_lr), ``"poly"`` (power, min_lr),
              ``"step"`` (decay_epochs, decay_rate), ``"multistep"`` (milestones, decay_rate; the epochs, from 0, that have
              the lower rate first), ``"exponential"`` (decay_rate, of an epoch), ``"constant"``. All of them take
              per_step (True for the first three: the rate changes at every step), warmup_epochs and warmup_lr (1e-5) or
              warmup_factor (of the top rate): a linear rise to the top. As in timm the curve runs on under the warm-up;
              warmup_prefix=True lets the first three begin after it.
            - ``"plateau"`` (patience, decay_rate, mode="max", threshold, threshold_mode, cooldown, min_lr), by the metric
              given to ``after_epoch``, and ``"onecycle"`` (PyTorch's options; max_lr is each group's own).
            - ``"infopro"`` and ``"auglocal"``: CIFAR-10 recipe, a cosine over the epochs 1 to E with ten epochs of warm-up
              from 0.01; ``"infopro-imagenet"``, ``"auglocal-imagenet"``: a cosine by epochs from 0; ``"predsim"``: a
              quarter at epochs 200, 300, 350, 375; ``"dgl"``: a fifth every 15 epochs; ``"dgl-imagenet"``: a tenth every 10.
            - a list of (epoch, rate).
            - a function of the optimizer that returns one of PyTorch's schedulers, stepped once an epoch (once a step in
              `PerStep`; `ReduceLROnPlateau` by the metric), or such a scheduler of this very optimizer.
        optimizer: `Engine.optimizer`, or any other.
        epochs: of the whole training.
        steps_per_epoch: optimizer steps of an epoch.

    Raises:
        ArgumentError: ``spec`` is none of these, has an unknown, missing or wrong option, or a number is below 1.
    """
    for key, value in (("epochs", epochs), ("steps_per_epoch", steps_per_epoch)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ArgumentError(f"{key}: got {value!r}; give an integer from 1")
    if spec is None:
        return Schedule(optimizer, steps_per_epoch)
    if isinstance(spec, str):
        return _named(spec, {}, optimizer, epochs, steps_per_epoch)
    if isinstance(spec, (list, tuple)) and len(spec) == 2 and isinstance(spec[0], str) and isinstance(spec[1], dict):
        return _named(spec[0], spec[1], optimizer, epochs, steps_per_epoch)
    if isinstance(spec, (list, tuple)):
        return _Curve("list", _table(spec), False, optimizer, epochs, steps_per_epoch)
    per_step = isinstance(spec, PerStep)
    if isinstance(spec, PerStep):
        spec = spec.make
    if isinstance(spec, (LRScheduler, ReduceLROnPlateau)):
        scheduler: Any = spec
    elif callable(spec):
        scheduler = spec(optimizer)
    else:
        raise ArgumentError(
            f"schedule: got {type(spec).__name__}; give a name such as 'cosine', (name, options), a list of (epoch, rate), or a "
            "function from the optimizer to one of PyTorch's schedulers"
        )
    if not isinstance(scheduler, (LRScheduler, ReduceLROnPlateau)):
        raise ArgumentError(
            f"schedule: the function returned {type(scheduler).__name__}; return one of PyTorch's schedulers"
        )
    if per_step and isinstance(scheduler, ReduceLROnPlateau):
        raise ArgumentError(
            "schedule: ReduceLROnPlateau goes by the metric of an epoch; pass its function without PerStep"
        )
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise ArgumentError(
            "schedule: the scheduler is of another optimizer; pass a function of the optimizer, such as "
            "lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 90)"
        )
    return _Torch(scheduler, per_step, optimizer, steps_per_epoch)
