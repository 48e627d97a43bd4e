"""Modules that call the fused operators: what networks and heads are written with.

Each function takes the modules as they are (normalisation, activation, convolution), so parameter names, hooks and
replacements work as in plain PyTorch: whatever is not what an operator computes is called as a module. On a CPU all of it is,
unless a backend is asked for: `bn_act`'s native form is faster than the modules by itself, but its threads and PyTorch's
stand in each other's way, and whole steps of ResNet-110 took 6 to 14 % longer with it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastlocal.ops._dispatch import fuses
from fastlocal.ops.bn_act import bn_act, plainly_called
from fastlocal.ops.bn_act_conv import bn_act_conv
from fastlocal.ops.bn_act_pool import bn_act_pool

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_ACTIVATIONS = (nn.ReLU, nn.LeakyReLU)


def hooked(module: nn.Module) -> bool:
    """Whether somebody watches or replaces this module's call, so that it must not be left out."""
    return plainly_called(module) is not None


def activation(module: nn.Module | None) -> dict[str, Any] | None:
    """The operators' options for an activation module (None: no activation), or None for one that they do not know."""
    if module is None:
        return {"act": "none"}
    if type(module) is nn.ReLU and not hooked(module):
        return {"act": "relu"}
    if type(module) is nn.LeakyReLU and not hooked(module):
        return {"act": "leaky_relu", "slope": module.negative_slope}
    return None


def norm_act(
    x: Tensor,
    norm: nn.Module,
    act: nn.Module | None,
    residual: Tensor | None = None,
    residual_norm: nn.Module | None = None,
) -> Tensor:
    """``act(norm(x) + residual)`` or ``act(norm(x) + residual_norm(residual))``, see `fastlocal.ops.bn_act`."""
    options = activation(act) if fuses(x.device) else None
    if options is not None:
        return bn_act(x, norm, residual, residual_norm=residual_norm, **options)
    out = norm(x)
    if residual is not None:
        # In place on the norm's side only: the residual may be another block's output, still in use.
        out += residual if residual_norm is None else residual_norm(residual)
    return out if act is None else act(out)


def norm_act_conv(x: Tensor, norm: nn.Module, act: nn.Module | None, conv: nn.Module) -> Tensor:
    """``conv(act(norm(x)))``, see `fastlocal.ops.bn_act_conv`."""
    options = activation(act) if fuses(x.device) else None
    return conv(norm_act(x, norm, act)) if options is None else bn_act_conv(x, norm, conv, **options)


def norm_act_pool(
    x: Tensor,
    norm: nn.Module,
    act: nn.Module | None,
    residual: Tensor | None = None,
    residual_norm: nn.Module | None = None,
) -> Tensor:
    """The mean of `norm_act` over all positions, [N, C], see `fastlocal.ops.bn_act_pool`."""
    options = activation(act) if fuses(x.device) else None
    if options is None:
        return global_mean(norm_act(x, norm, act, residual, residual_norm))
    return bn_act_pool(x, norm, residual, residual_norm=residual_norm, **options)


def global_mean(x: Tensor) -> Tensor:
    """Mean over the positions of [N, C, H, W] (or the tokens of [N, T, D]), as [N, C] (or [N, D])."""
    positions = (2, 3) if x.dim() == 4 else (1,)
    if x.dtype == torch.float16:
        return x.mean(positions)  # the sum could overflow
    # Dividing the small tensor keeps the gradient a stride-0 view of it; mean() would divide the expanded one.
    return x.sum(positions) / math.prod(x.shape[d] for d in positions)


class AvgPool(nn.Module):
    """`global_mean` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        return global_mean(x)


class FusedSequential(nn.Sequential):
    """``nn.Sequential`` whose neighbours run together where an operator computes both.

    BatchNorm, activation and then a convolution, a global mean, or nothing; and a unit with a method ``pooled`` before
    a global mean. Same numbers within rounding, same parameter names; members with hooks are called.
    """

    def forward(self, input: Tensor) -> Tensor:
        return self.run(input, len(self._modules))

    def readout(self) -> tuple[int, nn.Linear, bool] | None:
        """For a chain that ends with a Linear: how many members come before it, the Linear, and whether the last of
        these is an `AvgPool` that no operator before it takes in. None for any other chain, or one with hooks there.
        """
        members = list(self._modules.values())
        if not members or hooked(self) or type(members[-1]) is not nn.Linear or hooked(members[-1]):
            return None
        before: list[nn.Module] = members[:-1]  # type: ignore[assignment]
        pools = False
        if before and type(before[-1]) is AvgPool and not hooked(before[-1]):
            kind, count = _groups(tuple(map(type, before)))[-1]
            pools = kind == "single" or any(map(hooked, before[-count:]))
        return len(before) - pools, members[-1], pools

    def run(self, x: Tensor, end: int) -> Tensor:
        """The first ``end`` members."""
        members: list[nn.Module] = list(self._modules.values())[:end]  # type: ignore[arg-type]
        i = 0
        for kind, count in _groups(tuple(map(type, members))):
            part = members[i : i + count]
            i += count
            x = self._group(kind, part, x)
        return x

    def _group(self, kind: str, part: Sequence[nn.Module], x: Tensor) -> Tensor:
        if kind == "single" or any(map(hooked, part)):
            for member in part:
                x = member(x)
            return x
        if kind == "pooled":
            return part[0].pooled(x)  # type: ignore[operator]
        norm, act = part[0], part[1]
        if kind == "conv":
            return norm_act_conv(x, norm, act, part[2])
        return norm_act_pool(x, norm, act) if kind == "pool" else norm_act(x, norm, act)


@functools.lru_cache(maxsize=1024)
def _groups(types: tuple[type[nn.Module], ...]) -> tuple[tuple[str, int], ...]:
    """Kinds and lengths of the neighbours that run together."""
    found, i = [], 0
    while i < len(types):
        after = types[i + 2] if i + 2 < len(types) else None
        kind, count = "single", 1
        following = types[i + 1] if i + 1 < len(types) else None
        if types[i] in _NORMS and following in _ACTIVATIONS:
            kind, count = "act", 2
            if types[i] is nn.BatchNorm2d and after in (nn.Conv2d, AvgPool):
                kind, count = "conv" if after is nn.Conv2d else "pool", 3
        elif hasattr(types[i], "pooled") and following is AvgPool:
            kind, count = "pooled", 2
        found.append((kind, count))
        i += count
    return tuple(found)
