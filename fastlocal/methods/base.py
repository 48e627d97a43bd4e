"""What a method is: a recipe that says where to cut, which auxiliary head each block gets, and what its local loss is.

A method file subclasses :class:`Method`, gives a dataclass of options, and builds heads. It holds no loop over blocks and
touches no optimizer: blocks, engine and reference do that, the same way for every method.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from fastlocal.errors import ArgumentError

MODES = ("paper", "official")


class LocalLoss(NamedTuple):
    """What a head returns.

    ``loss`` is 0-dim, backward starts from it. ``terms`` maps a name to (unweighted detached value, weight), and ``loss`` is the
    sum of weight times value. ``logits`` are detached class scores, None for heads without (contrastive). Holding a LocalLoss
    keeps a graph alive only through ``loss``.
    """

    loss: Tensor
    terms: dict[str, tuple[Tensor, float]]
    logits: Tensor | None

    @classmethod
    def of(cls, *terms: tuple[str, Tensor, float], logits: Tensor | None = None) -> LocalLoss:
        """The weighted sum of ``(name, value, weight)``; a weight of one costs no multiplication."""
        parts = [value if weight == 1.0 else value * weight for _, value, weight in terms]
        loss = parts[0]
        for part in parts[1:]:
            loss = loss + part
        return cls(
            loss,
            {name: (value.detach(), float(weight)) for name, value, weight in terms},
            None if logits is None else logits.detach(),
        )


@dataclass
class StepContext:
    """What every head of one training step may read: targets, the raw input, the task loss, and a cache that lives one step.

    ``cache`` holds what depends on the batch only (label masks, the restored image), so K heads compute it once; use ``once``.
    """

    target: Tensor
    input: Tensor | None
    criterion: Callable[[Tensor, Tensor], Tensor]
    cache: dict[Any, Any] = field(default_factory=dict)

    def once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """``compute()`` at the first call with this key in the step, its result at every later one."""
        if key not in self.cache:
            self.cache[key] = compute()
        return self.cache[key]


@dataclass(frozen=True, eq=False)
class Site:
    """Where a head goes: block ``index`` of ``blocks``, which ends with unit number ``unit`` of ``units``.

    ``shape`` is the boundary activation without its batch: (C, H, W), (T, D) or (D,). ``dense``: one target per token.
    ``widths`` has one width per unit where the net declares them. ``net`` is the backbone, for ``make_unit`` and
    ``make_readout``; a head must not keep it.
    """

    index: int
    blocks: int
    unit: int
    units: int
    name: str
    shape: tuple[int, ...]
    input_shape: tuple[int, ...]
    num_classes: int
    dense: bool
    widths: list[int] | None
    net: nn.Module
    first_unit: int

    @property
    def is_image(self) -> bool:
        """True for a (C, H, W) boundary."""
        return len(self.shape) == 3


@dataclass
class NoOptions:
    """A method without options."""


class Method:
    """Base of all methods; one instance per ``fl.localize`` call, holding plain attributes only (it is pickled and deep-copied).

    ``mode="paper"`` follows the paper, ``mode="official"`` also reproduces what the official code does otherwise.
    Raises ArgumentError for an unknown mode or option, or a value out of range.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    repository: ClassVar[str]
    summary: ClassVar[str] = ""
    isolated: bool = True
    Options: ClassVar[type] = NoOptions

    def __init__(self, mode: str = "paper", **options: Any) -> None:
        check_choice("mode", mode, MODES)
        known = [f.name for f in fields(self.Options)]
        for key in options:
            if key not in known:
                raise ArgumentError(f"{key}: not an option of method {self.name!r}{did_you_mean(key, known)}; {self._option_list()}")
        self.mode = mode
        self.options = self.Options(**options)
        self.validate()

    def validate(self) -> None:
        """Checks ``self.options``; override and raise ArgumentError."""

    def prepare(self, blocks: int, units: int) -> int:
        """How many blocks to cut when the user asks for ``blocks`` of a net of ``units`` units. Raises ArgumentError."""
        return blocks

    def cuts(self, blocks: int, unit_names: list[str], net: nn.Module) -> list[int] | None:
        """Indices of the units after which to cut into ``blocks`` (what ``prepare`` returned), or None: balance by measured cost."""
        return None

    def resolve(self, sites: list[Site]) -> None:
        """Called once with the sites of all heads, before the first ``head``; for schedules over the block index."""

    def head(self, site: Site) -> nn.Module:
        """A new auxiliary head for block ``site.index``; ``forward(h, ctx) -> LocalLoss``. Raises ArgumentError where it cannot be."""
        raise ArgumentError(f"method: {self.name!r} has no auxiliary heads, so it takes blocks=1, not {site.blocks}")

    @property
    def final_weight(self) -> float:
        """The factor of the last block's task loss."""
        return 1.0

    def _option_list(self) -> str:
        known = [f"{f.name}={_default(f)!r}" for f in fields(self.Options)]
        return f"its options are {', '.join(known)}" if known else "it has no options"

    def __repr__(self) -> str:
        options = ", ".join(f"{f.name}={getattr(self.options, f.name)!r}" for f in fields(self.Options))
        return f"{type(self).__name__}(mode={self.mode!r}{', ' if options else ''}{options})"


_REGISTRY: dict[str, type[Method]] = {}


def register(cls: type[Method]) -> type[Method]:
    """Class decorator: makes a method known by its name. Raises ArgumentError if another class has that name."""
    other = _REGISTRY.get(cls.name)
    if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ArgumentError(f"name: method {cls.name!r} is registered already by {other.__module__}.{other.__qualname__}; choose another")
    _REGISTRY[cls.name] = cls
    return cls


def get_method(name: str) -> type[Method]:
    """The class registered under ``name``. Raises ArgumentError naming near and valid names."""
    if name not in _REGISTRY:
        raise ArgumentError(f"method: no method {name!r}{did_you_mean(name, _REGISTRY)}; valid are {', '.join(sorted(_REGISTRY))}")
    return _REGISTRY[name]


def list_methods() -> list[dict[str, Any]]:
    """One dict per method: name, summary, paper, repository, isolated, options (name to default)."""
    return [
        {
            "name": cls.name,
            "summary": cls.summary,
            "paper": cls.paper,
            "repository": cls.repository,
            "isolated": cls.isolated,
            "options": {f.name: _default(f) for f in fields(cls.Options)},
        }
        for _, cls in sorted(_REGISTRY.items())
    ]


def did_you_mean(word: Any, known: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` or nothing."""
    near = difflib.get_close_matches(str(word), list(known), n=2)
    return f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raises ArgumentError unless ``value`` is one of ``choices``."""
    choices = list(choices)
    if value not in choices:
        near = did_you_mean(value, [c for c in choices if isinstance(c, str)])
        raise ArgumentError(f"{name}: got {value!r}{near}; valid are {', '.join(map(repr, choices))}")


def check_number(name: str, value: Any, *, low: float | None = None, high: float | None = None, integer: bool = False) -> None:
    """Raises ArgumentError unless ``value`` is a number (an int where asked) from ``low`` to ``high``."""
    kind = int if integer else (int, float)
    good = isinstance(value, kind) and not isinstance(value, bool)  # type: ignore[arg-type]
    if good and (low is None or value >= low) and (high is None or value <= high):
        return
    span = " ".join(text for text in (f"from {low}" if low is not None else "", f"up to {high}" if high is not None else "") if text)
    raise ArgumentError(f"{name}: got {value!r}; give {'an integer' if integer else 'a number'} {span}".rstrip())


def _default(f: Any) -> Any:
    return f.default_factory() if callable(f.default_factory) else f.default
