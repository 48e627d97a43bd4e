"""Batch normalisation, a residual, an activation and a global mean, as ordinary operators."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def bn_act_pool(
    x: Tensor,
    norm: nn.Module,
    residual: Tensor | None = None,
    *,
    act: str = "relu",
    slope: float = 0.01,
    residual_norm: nn.Module | None = None,
) -> Tensor:
    """The mean over positions of ``act(norm(x) + residual)``, or of ``act(norm(x) + residual_norm(residual))``.

    Args:
        x: ``[N, C]`` or ``[N, C, *spatial]``, what ``norm`` takes.
        norm: a BatchNorm module (any other normalisation too); its statistics are updated as by calling it.
        residual: of ``x``'s shape, or None.
        act: "relu", "leaky_relu" or "none".
        slope: of "leaky_relu" below zero.
        residual_norm: what ``residual`` goes through first, or None.

    Returns:
        ``[N, C]`` in the dtype of the activation, differentiable to any order. The sum is divided, not the
        activation: the gradient of the mean is then a stride-0 view.
    """
    out = norm(x)
    if residual is not None:
        out = out + (residual if residual_norm is None else residual_norm(residual))
    if act == "relu":
        out = F.relu(out)
    elif act == "leaky_relu":
        out = F.leaky_relu(out, slope)
    positions = tuple(range(2, out.dim()))
    if not positions:
        return out
    if out.dtype == torch.float16:
        return out.mean(positions)  # the sum could overflow
    return out.sum(positions) / math.prod(out.shape[2:])
