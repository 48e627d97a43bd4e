"""Batch normalisation, a residual and ReLU, as three ordinary operators."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def bn_act(x: Tensor, norm: nn.Module, residual: Tensor | None = None, *, relu: bool = True) -> Tensor:
    """``relu(norm(x) + residual)``.

    Args:
        x: ``[N, C]`` or ``[N, C, *spatial]``, what ``norm`` takes.
        norm: a BatchNorm module (any other normalisation too); its statistics are updated as by calling it.
        residual: of ``x``'s shape, or None.
        relu: False leaves the activation out.
    """
    out = norm(x)
    if residual is not None:
        out += residual  # in place on the norm's output only: the residual may be another block's output, still in use
    return F.relu(out, inplace=True) if relu else out
