"""CUDA graphs on a CPU: operators are recorded with the very tensors and numbers that they were called with, and run again.

As on a device, a capture computes nothing, a replay runs no Python of the step, a number of the host stays as it was
captured, a tensor stays where it was, and reading a value while recording fails.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fastlocal as fl
from fastlocal.engine import graph

READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "item")


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.before: dict[int, tuple[Any, Tensor]] = {}  # memory that was there, as it was
        self.born: set[int] = set()
        self.fail_at: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in READS or name == self.fail_at:
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        for t in pytree.tree_leaves((args, kwargs or {})):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                at = storage.data_ptr()
                if at not in self.born and at not in self.before:
                    self.before[at] = (storage, torch.empty(0, dtype=torch.uint8).set_(storage).clone())  # type: ignore[call-overload]
        out = func(*args, **(kwargs or {}))
        for t in pytree.tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self.before:
                self.born.add(t.untyped_storage().data_ptr())
        self.calls.append((func, args, kwargs or {}, out))
        return out


class Recorded:
    """A captured graph."""

    def __init__(self, calls: list[tuple[Any, Any, Any, Any]]):
        self.calls = calls

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(pytree.tree_leaves(out), pytree.tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)


class Recorder:
    """The place of `fastlocal.engine.graph.CudaGraphs` in tests."""

    rate_dtype = torch.float64  # so that rates are those of eager steps to the last bit

    def __init__(self, device: torch.device | None = None):
        self.captures = 0
        self.warm = 0
        self.capturing = False
        self.fail_at: str | None = None
        self.after: Callable[[], None] | None = None  # runs at the end of a capture

    @contextlib.contextmanager
    def warm_up(self) -> Iterator[None]:
        self.warm += 1
        yield

    def capture(self, run: Callable[[], None], others: list[Any]) -> Recorded:
        assert all(isinstance(other, Recorded) for other in others)
        recording = _Recording()
        recording.fail_at = self.fail_at
        random = torch.get_rng_state()
        self.capturing = True
        try:
            with recording, mock.patch("torch.nn.functional.one_hot", _one_hot):
                run()
                if self.after is not None:
                    self.after()
        finally:
            self.capturing = False
            for storage, content in recording.before.values():
                torch.empty(0, dtype=torch.uint8).set_(storage).copy_(content)  # type: ignore[call-overload]
            torch.set_rng_state(random)
        self.captures += 1
        return Recorded(recording.calls)


def _one_hot(target: Tensor, num_classes: int) -> Tensor:
    """PyTorch's reads the targets, on a CPU only."""
    return torch.zeros(*target.shape, num_classes, dtype=torch.int64).scatter(-1, target[..., None], 1)


def engine(model: fl.LocalModel, make: Any, **options: Any) -> fl.Engine:
    """With graph="on" on a CPU, and reading nothing back, as on a device."""
    with mock.patch.object(graph, "graph_device", Recorder):
        made = fl.Engine(model, make, graph="on", **options)
    made._guard.waits = True
    return made


def eager(model: fl.LocalModel, make: Any, **options: Any) -> fl.Engine:
    """The same without graphs."""
    made = fl.Engine(model, make, **options)
    made._guard.waits = True
    return made
