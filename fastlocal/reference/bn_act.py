"""Batch normalisation, a residual and an activation, as ordinary operators."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def bn_act(
    x: Tensor,
    norm: nn.Module,
    residual: Tensor | None = None,
    *,
    act: str = "relu",
    slope: float = 0.01,
    residual_norm: nn.Module | None = None,
) -> Tensor:
    """``act(norm(x) + residual)``, or ``act(norm(x) + residual_norm(residual))``.

    Args:
        x: ``[N, C]`` or ``[N, C, *spatial]``, what ``norm`` takes.
        norm: a BatchNorm module (any other normalisation too); its statistics are updated as by calling it.
        residual: of ``x``'s shape, or None.
        act: "relu", "leaky_relu" or "none".
        slope: of "leaky_relu" below zero.
        residual_norm: a module for the residual, which it needs, or None.
    """
    out = norm(x)
    own = out is not x  # in place on the norm's output only: x and the residual may be used elsewhere
    if residual is not None:
        added = residual if residual_norm is None else residual_norm(residual)
        out, own = out.add_(added) if own else out + added, True
    if act == "relu":
        return F.relu(out, inplace=own)
    if act == "leaky_relu":
        return F.leaky_relu(out, slope, inplace=own and slope >= 0)
    return out
