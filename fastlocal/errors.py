"""The exceptions that fastlocal raises; each is also the builtin error that a caller would expect."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import torch


class FastLocalError(Exception):
    """Base of every error that fastlocal raises on purpose."""


class ArgumentError(FastLocalError, ValueError):
    """An argument that cannot be used; the message names it, what was given, and what would do."""


class PartitionError(ArgumentError):
    """The network cannot be cut into blocks as asked."""


class IsolationError(ArgumentError):
    """A gradient, a weight or a module would cross the border between two blocks."""


class BackendError(FastLocalError, RuntimeError):
    """A backend was asked for by name and is missing, or cannot serve the call."""


class CheckpointError(FastLocalError, RuntimeError):
    """A checkpoint is truncated, belongs to another model or method, or holds more than weights."""


class NonFiniteError(FastLocalError, RuntimeError):
    """A block produced a non-finite loss or gradient.

    Attributes:
        block: index of the block.
        name: name of the block, or of the parameter that was hit.
        step: the training step, counted from 0.
        updated: indices of the blocks whose update had already been applied in that step.
    """

    def __init__(self, message: str, *, block: int, name: str, step: int, updated: Iterable[int] = ()) -> None:
        super().__init__(message)
        self.block = block
        self.name = name
        self.step = step
        self.updated = tuple(updated)

    def __reduce__(self) -> tuple[Any, ...]:
        # The default calls the class with `args` alone and would lose the keyword-only fields.
        return _rebuild_non_finite, (str(self), self.block, self.name, self.step, self.updated)


class OutOfMemoryError(FastLocalError, torch.OutOfMemoryError):
    """The memory of the device did not suffice for a block; the message names it, the peak and the remedies.

    Attributes:
        block: index of the block that ran.
        name: its name.
        step: the training step, counted from 0.
        phase: what it did: forward, head and backward, or update.
    """

    def __init__(self, message: str, *, block: int, name: str, step: int, phase: str) -> None:
        super().__init__(message)
        self.block, self.name, self.step, self.phase = block, name, step, phase

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_out_of_memory, (str(self), self.block, self.name, self.step, self.phase)


def _rebuild_out_of_memory(message: str, block: int, name: str, step: int, phase: str) -> OutOfMemoryError:
    return OutOfMemoryError(message, block=block, name=name, step=step, phase=phase)


def _rebuild_non_finite(message: str, block: int, name: str, step: int, updated: tuple[int, ...]) -> NonFiniteError:
    return NonFiniteError(message, block=block, name=name, step=step, updated=updated)


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """A sentence that ends a "no such name" message: near names if there are any, else what there is.

    >>> did_you_mean("auglcoal", ["auglocal", "dgl"])
    'Did you mean "auglocal"?'
    >>> did_you_mean("zzz", ["auglocal", "dgl"])
    'Available: auglocal, dgl.'
    """
    options = list(dict.fromkeys(options))
    folded: dict[str, str] = {}
    for option in options:
        folded.setdefault(option.lower(), option)
    near = [folded[match] for match in difflib.get_close_matches(str(name).lower(), list(folded), n=3, cutoff=0.6)]
    if near:
        return "Did you mean " + " or ".join(f'"{option}"' for option in near) + "?"
    if not options:
        return "There is none."
    shown = ", ".join(options[:20])
    return f"Available: {shown}." if len(options) <= 20 else f"Available: {shown}, ... ({len(options)} in all)."
