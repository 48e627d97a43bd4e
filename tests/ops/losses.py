"""Shared by the tests of the losses that are one operator: both forms, what they launch, and poisoned memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SYNCS = {"_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "masked_select", "unique", "_to_cpu"}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def with_gradient(loss: Callable[[Tensor], Tensor], features: Tensor) -> list[Tensor]:
    """The loss and its gradient by autograd."""
    leaf = features.detach().clone().requires_grad_()
    value = loss(leaf)
    return [value.detach(), torch.autograd.grad(value, leaf)[0]]


class Trace(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory is full of nan or of a large number, as it may be in a long run."""
    with monkeypatch.context() as m:
        for owner, name in [(torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")]:
            original = getattr(owner, name)

            def fill(*args: Any, original: Any = original, **kwargs: Any) -> Tensor:
                out = original(*args, **kwargs)
                return out.fill_(float("nan") if out.is_floating_point() else 113)

            m.setattr(owner, name, fill)
        yield
