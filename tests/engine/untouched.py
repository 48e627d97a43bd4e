"""Everything a refused call must leave as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def state_of(
    *modules: nn.Module, optimizer: torch.optim.Optimizer | None = None, random: bool = True
) -> dict[str, Any]:
    """Parameters (identity, value, layout, gradient, requires_grad, hooks), buffers, modes, hooks, attributes,
    optimizer and random state."""
    state: dict[str, Any] = {}
    for i, root in enumerate(modules):
        for path, module in root.named_modules():
            where = f"{i}:{path}"
            state[f"{where} mode"] = module.training
            state[f"{where} hooks"] = [len(getattr(module, name)) for name in _HOOKS]
            state[f"{where} attributes"] = sorted(vars(module))
            for key, p in module._parameters.items():
                if p is not None:
                    hooks = len(p._backward_hooks or ()), len(p._post_accumulate_grad_hooks or ())
                    facts = id(p), p.requires_grad, p.stride(), p.dtype, hooks, p.grad is None
                    state[f"{where}.{key} parameter"] = facts
                    state[f"{where}.{key}"] = p.detach().clone()
            for key, b in module._buffers.items():
                state[f"{where}.{key} buffer"] = id(b)
                state[f"{where}.{key}"] = None if b is None else b.clone()
    if optimizer is not None:
        state["optimizer"] = copy.deepcopy(optimizer.state_dict())
    if random:
        state["random state"] = torch.get_rng_state()
    return state


def assert_same(a: Any, b: Any, where: str = "state") -> None:
    """Deep equality, tensors bit for bit (NaN equals NaN)."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape, where
        same = (a == b) | ((a != a) & (b != b)) if a.is_floating_point() else a == b
        assert bool(same.all()), f"{where} changed"
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), f"{where}: {a.keys() ^ b.keys()}"
        for key in a:
            assert_same(a[key], b[key], f"{where} / {key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, f"{where}: {a!r} became {b!r}"


@contextmanager
def untouched(
    *modules: nn.Module, optimizer: torch.optim.Optimizer | None = None, random: bool = True
) -> Iterator[None]:
    """Fails if the body changes anything in ``modules``, the optimizer's state or the random state."""
    before = state_of(*modules, optimizer=optimizer, random=random)
    yield
    assert_same(before, state_of(*modules, optimizer=optimizer, random=random))
