"""What a method is: a recipe that says where to cut, which auxiliary head each block gets, and what its local loss is.

A method file subclasses :class:`Method`, gives a dataclass of options, and builds heads. It holds no loop over blocks
and touches no optimizer: blocks, engine and reference do that, the same way for every method.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import nn

from fastlocal.blocks.links import Link
from fastlocal.blocks.types import LocalLoss, Site, StepContext
from fastlocal.errors import ArgumentError, did_you_mean

__all__ = ["LocalLoss", "Method", "Site", "StepContext", "get_method", "list_methods", "register"]

MODES = ("paper", "official")


@dataclass
class NoOptions:
    """A method without options."""


class Method:
    """Base of all methods. One instance per ``fl.localize`` call; plain attributes only (it is pickled, deep-copied).

    ``mode="paper"`` follows the paper, ``mode="official"`` also reproduces what the official code does otherwise.
    Raises ArgumentError for an unknown mode or option, or a value out of range.
    """

    name: ClassVar[str] = ""  # a subclass without one is called as its class
    paper: ClassVar[str] = ""
    repository: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    isolated: bool = True  # False: no gradient border; one backward of the sum of all losses
    window: int = 1  # blocks, its own included, that the shared loss of a CascadeHead reaches
    reads_boundary: bool = False  # heads read ctx.boundary
    Options: ClassVar[type] = NoOptions

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.name:
            cls.name = cls.__name__

    def __init__(self, mode: str = "paper", **options: Any) -> None:
        check_choice("mode", mode, MODES)
        known = [f.name for f in fields(self.Options)]
        for key in options:
            if key not in known:
                raise ArgumentError(
                    f"{key}: not an option of method {self.name!r}. {did_you_mean(key, known)} {self._option_list()}"
                )
        self.mode = mode
        self.options = self.Options(**options)
        self.validate()

    def validate(self) -> None:
        """Checks ``self.options``; override and raise ArgumentError."""

    def prepare(self, blocks: int, units: int) -> int:
        """How many blocks to cut when the user asks for ``blocks`` of ``units`` units. Raises ArgumentError."""
        return blocks

    def cuts(self, blocks: int, unit_names: list[str], net: nn.Module) -> list[int] | None:
        """Units after which to cut into ``blocks`` (what ``prepare`` returned), or None: balance by measured cost."""
        return None

    def resolve(self, sites: list[Site]) -> None:
        """Called once with the sites of all heads, before the first ``head``; for schedules over the block index."""

    def head(self, site: Site) -> nn.Module:
        """A new auxiliary head for block ``site.index``: ``forward(h, ctx) -> LocalLoss``. Raises ArgumentError."""
        raise ArgumentError(f"method: {self.name!r} has no auxiliary heads, so it takes blocks=1, not {site.blocks}")

    def links(self, sites: list[Site], heads: list[nn.Module]) -> Sequence[Link]:
        """Rules by which weights feed other weights, such as `fastlocal.blocks.links.EMALink`; called once, after the heads."""
        return ()

    def passes(self, block: int, blocks: int, unit: int) -> int:
        """How often a step of the published algorithm forwards unit ``unit`` of the network, in block ``block``: as often
        its BatchNorm statistics move, although the engine runs it once.
        """
        return 1

    @property
    def final_weight(self) -> float:
        """The factor of the last block's task loss."""
        return 1.0

    @property
    def final_share(self) -> float:
        """With ``window > 1``: the part of the last block's loss whose gradient goes on into the blocks before it."""
        return 1.0

    def _option_list(self) -> str:
        known = [f"{f.name}={_default(f)!r}" for f in fields(self.Options)]
        return f"Its options: {', '.join(known)}." if known else "It has no options."

    def __repr__(self) -> str:
        options = ", ".join(f"{f.name}={getattr(self.options, f.name)!r}" for f in fields(self.Options))
        return f"{type(self).__name__}(mode={self.mode!r}{', ' if options else ''}{options})"


_REGISTRY: dict[str, type[Method]] = {}


def register(cls: type[Method]) -> type[Method]:
    """Class decorator: makes a method known by its name. Raises ArgumentError if another class has that name."""
    other = _REGISTRY.get(cls.name)
    if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ArgumentError(
            f"name: method {cls.name!r} is registered already by {other.__module__}.{other.__qualname__}; choose "
            "another"
        )
    _REGISTRY[cls.name] = cls
    return cls


def get_method(name: str) -> type[Method]:
    """The class registered under ``name``. Raises ArgumentError naming near and valid names."""
    if name not in _REGISTRY:
        raise ArgumentError(
            f"method: no method {name!r}. {did_you_mean(name, sorted(_REGISTRY))} Valid: "
            f"{', '.join(sorted(_REGISTRY))}."
        )
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


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raises ArgumentError unless ``value`` is one of ``choices``."""
    choices = list(choices)
    if value not in choices:
        raise ArgumentError(f"{name}: got {value!r}. Valid: {', '.join(map(repr, choices))}.")


def check_number(
    name: str, value: Any, *, low: float | None = None, high: float | None = None, integer: bool = False
) -> None:
    """Raises ArgumentError unless ``value`` is a number (an int where asked) from ``low`` to ``high``."""
    kind = int if integer else (int, float)
    good = isinstance(value, kind) and not isinstance(value, bool)  # type: ignore[arg-type]
    if good and (low is None or value >= low) and (high is None or value <= high):
        return
    span = " ".join(
        text for text in (f"from {low}" if low is not None else "", f"up to {high}" if high is not None else "") if text
    )
    raise ArgumentError(f"{name}: got {value!r}; give {'an integer' if integer else 'a number'} {span}".rstrip())


def refuse_dense_images(method: str, site: Site) -> None:
    """Raises ArgumentError where an image boundary meets a task with one target per position (segmentation)."""
    if site.is_image and site.dense:
        raise ArgumentError(
            f"method: the heads of {method!r} classify whole images, but this network gives one output per position; "
            "write a Method with a dense head, and pass it as method="
        )


def _default(f: Any) -> Any:
    return f.default_factory() if callable(f.default_factory) else f.default
