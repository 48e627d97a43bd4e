"""The Forward-Forward loss (Hinton, arXiv 2212.13345): the specification.

    g_n = sum or mean of the squares of h_n     loss = mean of softplus(-s_n (g_n + offset_n - theta))

s_n is 1 for a positive sample and -1 for a negative one. Everything is computed in at least float32, whatever the dtype
of the features. A mean over no sample is nan.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlocal.reference._precision import wide_dtype


def row_goodness(h: Tensor, goodness: str = "mean") -> Tensor:
    """Sum or mean of the squares of each sample, [N, ...] -> [N] in the wide dtype."""
    squares = h.to(wide_dtype(h)).square().flatten(1)
    return squares.mean(1) if goodness == "mean" else squares.sum(1)


def goodness_loss(
    h: Tensor, positive: Tensor, *, theta: float = 2.0, goodness: str = "mean", offset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The loss [] and the goodness of each sample [N], without the offset; both differentiable to any order.

    Args:
        h: [N, ...].
        positive: bool [N].
        theta: the threshold.
        goodness: "sum" or "mean".
        offset: [N], added to the goodness, or None; no gradient.
    """
    g = row_goodness(h, goodness)
    return F.softplus(_negated(g, positive, theta, offset)).mean(), g


def goodness_loss_value_and_grad(
    h: Tensor,
    positive: Tensor,
    *,
    theta: float = 2.0,
    goodness: str = "mean",
    offset: Tensor | None = None,
    grad_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [], goodness [N], and the gradient of ``grad_scale * loss`` in closed form, in the features' shape and dtype."""
    loss, g, factor = closed_form(h, positive, theta, goodness, offset, grad_scale)
    return loss, g, grad_of(h, factor)


def closed_form(
    h: Tensor, positive: Tensor, theta: float, goodness: str, offset: Tensor | None, grad_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [], goodness [N] and the factor of each sample [N] that multiplies it to the gradient, in the wide dtype."""
    g = row_goodness(h, goodness)
    x = _negated(g, positive, theta, offset)
    terms = h[:1].numel() if goodness == "mean" else 1
    factor = _sign(positive, g.dtype) * torch.sigmoid(x) * (-2 * grad_scale / max(1, len(h) * terms))
    return F.softplus(x).mean(), g, factor


def grad_of(h: Tensor, factor: Tensor) -> Tensor:
    """Every sample times its factor, in the features' dtype."""
    return (h.to(factor.dtype) * factor.view(-1, *[1] * (h.dim() - 1))).to(h.dtype)


def _sign(positive: Tensor, dtype: torch.dtype) -> Tensor:
    return positive.to(dtype) * 2 - 1


def _negated(g: Tensor, positive: Tensor, theta: float, offset: Tensor | None) -> Tensor:
    total = g if offset is None else g + offset.to(g.dtype)
    return -_sign(positive, g.dtype) * (total - theta)
