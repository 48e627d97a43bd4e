"""`as_source`: anything that gives batches, as epochs that a run can repeat and resume in the middle."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastlocal.data._random import key
from fastlocal.errors import ArgumentError


class Source(ABC):
    """Batches in epochs. ``epoch(number)`` gives the same batches at every call, whatever was drawn in between."""

    @abstractmethod
    def epoch(self, number: int, start: int = 0) -> Iterator[Any]:
        """The batches of epoch ``number`` from index ``start`` on; they depend on the source's seed and the number alone.

        Raises ArgumentError for a ``start`` below 0 or beyond the epoch's end.
        """

    @abstractmethod
    def __len__(self) -> int:
        """Batches an epoch. Raises TypeError where the data does not say; see ``length``."""

    @property
    def length(self) -> int | None:
        """Batches an epoch, or None where the data does not say, as an IterableDataset without ``__len__``."""
        try:
            return len(self)
        except TypeError:
            return None

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Kind, samples, batch size, seed and the like, as values that JSON takes."""


def as_source(data: Any, *, seed: int = 0) -> Source:
    """A `Source` of any data that can be iterated more than once.

    - A `Source`, such as `Batches`, is returned as it is; so is anything with its ``epoch``, ``__len__`` and
      ``describe``, completed by ``length``.
    - A ``torch.utils.data.DataLoader`` (or another object whose every ``iter()`` starts anew): order and augmentation
      become a function of (seed, epoch). The loader works in a random stream of its own (PyTorch's CPU generator,
      Python's ``random``, NumPy's global state, and the generators that loader and samplers were given), seeded at the
      start of each epoch; what the model draws does not reach it, and it disturbs nobody else's state.
      ``set_epoch(epoch)`` of samplers and data set is called where there is one. Workers are started anew each epoch,
      ``persistent_workers`` or not, because their seeds are set when they start. Starting at batch n loads and drops
      the n before it.
    - A list of batches: these, in this order, every epoch.

    What stays outside: a generator object inside the user's own data set or transform, which nobody else can find; with
    workers it is copied to each as it is, without workers it goes on from epoch to epoch.

    Args:
        data: see above; batches may have any form.
        seed: of the random stream; a `Source` has its own.

    Raises:
        ArgumentError: a bare iterator or generator, a data set instead of a loader, a loader with ``in_order=False`` and
            workers, or nothing iterable.
    """
    if isinstance(data, Source):
        return data
    if callable(getattr(data, "epoch", None)):
        missing = [name for name in ("__len__", "describe") if not callable(getattr(data, name, None))]
        if missing:
            raise ArgumentError(
                f"data: {_named(data)} has epoch() but no {' and no '.join(missing)}; a Source has all three"
            )
        return _Completed(data)
    if isinstance(data, Iterator):
        raise ArgumentError(
            f"data: {_named(data)} is an iterator, which can be read once; give what it was made of (a DataLoader, a list of batches) "
            "or a Source"
        )
    if isinstance(data, list | tuple):
        return _Listed(data)
    looks_huggingface = hasattr(data, "column_names") and hasattr(data, "features")
    if looks_huggingface or (isinstance(data, Dataset) and not isinstance(data, DataLoader)):
        raise ArgumentError(
            f"data: {_named(data)} is a data set of single samples; give DataLoader(data, batch_size=..., shuffle=True)"
        )
    if isinstance(data, Tensor | dict | str | bytes) or not isinstance(data, Iterable):
        raise ArgumentError(f"data: {_named(data)} holds no batches; give a DataLoader, a Source, or a list of batches")
    if getattr(data, "num_workers", 0) and not getattr(data, "in_order", True):
        raise ArgumentError(
            "data: a DataLoader with in_order=False gives its batches in the order in which workers finish, which no seed decides; "
            "make it with in_order=True"
        )
    return _Loaded(data, seed)


def check_start(start: int, length: int | None) -> None:
    """Raises ArgumentError unless an epoch of ``length`` batches can start at ``start``."""
    good = isinstance(start, int) and not isinstance(start, bool) and start >= 0
    if not good or (length is not None and start > length):
        until = "" if length is None else f" up to {length}, the batches of an epoch"
        raise ArgumentError(f"start: got {start!r}; give an integer from 0{until}")


class _Completed(Source):
    """Somebody's own source, with ``length``."""

    def __init__(self, inner: Any):
        self.inner = inner

    def epoch(self, number: int, start: int = 0) -> Iterator[Any]:
        return self.inner.epoch(number, start)

    def __len__(self) -> int:
        return len(self.inner)

    def describe(self) -> dict[str, Any]:
        return self.inner.describe()


class _Listed(Source):
    def __init__(self, batches: list[Any] | tuple[Any, ...]):
        if any(isinstance(batch, Tensor) for batch in batches):
            raise ArgumentError(
                "data: got tensors in a list; give a list of batches, [(x, y), ...], or a DataLoader of a TensorDataset"
            )
        self.batches = list(batches)

    def epoch(self, number: int, start: int = 0) -> Iterator[Any]:
        check_start(start, len(self))
        return iter(self.batches[start:])

    def __len__(self) -> int:
        return len(self.batches)

    def describe(self) -> dict[str, Any]:
        return {"kind": "list", "batches": len(self)}


class _Loaded(Source):
    """A loader whose every ``iter()`` and ``next()`` runs in the random stream of (seed, epoch)."""

    def __init__(self, loader: Any, seed: int):
        self.loader, self.seed = loader, seed

    def __len__(self) -> int:
        if not isinstance(self.loader, Sized):
            raise TypeError(
                f"{_named(self.loader)} does not say how many batches it has; ask .length, which is None then"
            )
        return len(self.loader)

    def epoch(self, number: int, start: int = 0) -> Iterator[Any]:
        check_start(start, self.length)
        return self._epoch(number, start)

    def _epoch(self, number: int, start: int) -> Iterator[Any]:
        for part in self._parts():
            if callable(getattr(part, "set_epoch", None)):
                part.set_epoch(number)
        stream = _Stream(self.seed, number, self._generators())
        with stream:
            _forget_workers(self.loader)
            iterator = iter(self.loader)
            _forget_workers(self.loader)  # they are this epoch's own
        index = 0
        while True:
            with stream:
                try:
                    batch = next(iterator)
                except StopIteration:
                    break
            if index >= start:
                yield batch
            index += 1
        if index < start:
            raise ArgumentError(
                f"start: got {start}, but epoch {number} ended after {index} batches; give at most {index}"
            )

    def describe(self) -> dict[str, Any]:
        loader = self.loader
        data = getattr(loader, "dataset", None)
        found: dict[str, Any] = {"kind": type(loader).__name__}
        if data is not None:
            found["data"] = type(data).__name__
        try:
            found["samples"] = len(data)  # type: ignore[arg-type]
        except TypeError:
            found["samples"] = None
        sampler = getattr(loader, "sampler", None)
        return found | {
            "batch_size": _plain(getattr(loader, "batch_size", None)),
            "batches": self.length,
            "sampler": None if sampler is None else type(sampler).__name__,
            "workers": _plain(getattr(loader, "num_workers", 0)),
            "seed": self.seed,
        }

    def _parts(self) -> list[Any]:
        """Loader, samplers and data set, each once."""
        loader = self.loader
        batch_sampler = getattr(loader, "batch_sampler", None)
        found = [
            getattr(loader, "dataset", None),
            getattr(loader, "sampler", None),
            batch_sampler,
            getattr(batch_sampler, "sampler", None),
            loader,
        ]
        return list({id(part): part for part in found if part is not None}.values())

    def _generators(self) -> list[torch.Generator]:
        found = [getattr(part, "generator", None) for part in self._parts()]
        own = [g for g in found if isinstance(g, torch.Generator) and g is not torch.default_generator]
        return list({id(g): g for g in own}.values())


class _Stream:
    """Inside ``with``, the random states are this stream's; outside, everybody else's. Nothing is drawn to swap them."""

    def __init__(self, seed: int, epoch: int, generators: list[torch.Generator]):
        self._python = random.Random(key(seed, epoch, "python")).getstate()
        self._numpy = np.random.RandomState(key(seed, epoch, "numpy") % 2**32).get_state()
        self._torch = _seeded(torch.device("cpu"), key(seed, epoch, "torch"))
        self._generators = [(g, _seeded(g.device, key(seed, epoch, "generator", i))) for i, g in enumerate(generators)]

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *_: object) -> None:
        self._swap()

    def _swap(self) -> None:
        python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        self._python, self._numpy, self._torch = python, numpy, cpu
        for i, (generator, state) in enumerate(self._generators):
            self._generators[i] = (generator, generator.get_state())
            generator.set_state(state)


def _seeded(device: torch.device, seed: int) -> Tensor:
    return torch.Generator(device).manual_seed(seed).get_state()


def _forget_workers(loader: Any) -> None:
    # A DataLoader with persistent workers keeps its iterator here, and would go on with the old epoch's seeds.
    if getattr(loader, "persistent_workers", False) and getattr(loader, "_iterator", None) is not None:
        loader._iterator = None


def _named(data: Any) -> str:
    return f"{type(data).__module__}.{type(data).__qualname__}"


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str | bool | None) else str(value)
