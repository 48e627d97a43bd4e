"""Cross-entropy of a linear layer on L2-normalised features: the specification.

    u = x / max(|x|, 1e-12)     logits = scale u W^T     loss = mean of CE over the rows that count

W is a matrix, its rows normalised likewise on request (a cosine head), or the fixed basis of LLS (Apolinario et al.,
arXiv 2405.15868): W_ki = sin(f_k i), f in radians, or its sign. The product f_k i is rounded to float32 in every dtype:
it is large, so another rounding would be another basis. Everything else is computed in at least float32, whatever the
dtype of the features. A mean over no rows is nan with zero gradients, as in `torch.nn.functional.cross_entropy`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlocal.reference._cross_entropy import count_correct, cross_entropy, grad_of_logits
from fastlocal.reference._precision import no_autocast, wide_dtype

EPS = 1e-12  # of F.normalize
BASES = ("weight", "sine", "square")


def frequencies(num_classes: int, low: float = 50.0, high: float = 512.0, device: torch.device | None = None) -> Tensor:
    """Those of LLS, float32 [K]."""
    return torch.linspace(low, high, num_classes, dtype=torch.float32, device=device)


def matrix(weight: Tensor, basis: str, features: int, dtype: torch.dtype) -> Tensor:
    """W, [K, D] in `dtype`. basis: "weight" ([K, D] itself), "sine" or "square" (of the frequencies [K])."""
    if basis == "weight":
        return weight.to(dtype)
    angle = weight.float()[:, None] * torch.arange(features, dtype=torch.float32, device=weight.device)
    sine = torch.sin(angle.to(dtype))
    return sine if basis == "sine" else torch.sign(sine)


def norm_linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    basis: str = "weight",
    scale: float = 1.0,
    normalize_weight: bool = False,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """Loss [] and number of correct rows [] (int64), differentiable to any order.

    Args:
        x: [N, ...], taken as [N, D].
        weight: [K, D], or the frequencies [K] of a basis.
        target: class indices, int64 [N], or probabilities, floating [N, K].
    """
    wide = wide_dtype(x)
    flat = x.to(wide).flatten(1)
    w = matrix(weight, basis, flat.shape[1], wide)
    if normalize_weight:
        w = F.normalize(w, dim=1, eps=EPS)
    with no_autocast(x):
        logits = F.linear(F.normalize(flat, dim=1, eps=EPS), w) * scale
    return cross_entropy(logits, target, label_smoothing, ignore_index), count_correct(logits, target, ignore_index)


def norm_linear_cross_entropy_value_and_grad(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    basis: str = "weight",
    scale: float = 1.0,
    normalize_weight: bool = False,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    grad_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The same with the gradients of `grad_scale * loss` in closed form.

    Returns:
        loss [], correct [], the gradient of x in its shape and dtype, and of the weight [K, D] in its dtype (None for
        frequencies).
    """
    with no_autocast(x):
        loss, correct, grad_x, grad_weight = closed_form(
            x, weight, target, basis, scale, normalize_weight, label_smoothing, ignore_index, grad_scale
        )
    return (
        loss,
        correct,
        grad_x.to(x.dtype).reshape(x.shape),
        grad_weight.to(weight.dtype) if basis == "weight" else None,
    )


def closed_form(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    basis: str,
    scale: float,
    normalize_weight: bool,
    label_smoothing: float,
    ignore_index: int,
    grad_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, correct, and the gradients of x [N, D] and of W [K, D], all in the wide dtype."""
    wide = wide_dtype(x)
    flat = x.to(wide).flatten(1)
    w = matrix(weight, basis, flat.shape[1], wide)
    length = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    unit = flat / length.clamp(min=EPS)
    w_length = torch.linalg.vector_norm(w, dim=1, keepdim=True)
    w_unit = w / w_length.clamp(min=EPS) if normalize_weight else w
    logits = F.linear(unit, w_unit) * scale
    loss = cross_entropy(logits, target, label_smoothing, ignore_index)
    grad = grad_of_logits(logits, target, label_smoothing, ignore_index, grad_scale * scale)
    grad_x = through_norm(grad @ w_unit, unit, length)
    grad_w = grad.T @ unit
    if normalize_weight:
        grad_w = through_norm(grad_w, w_unit, w_length)
    return loss, count_correct(logits, target, ignore_index), grad_x, grad_w


def through_norm(grad: Tensor, unit: Tensor, length: Tensor) -> Tensor:
    """The gradient before a normalisation of rows; below EPS the length is a constant."""
    radial = (grad * unit).sum(1, keepdim=True) * (length > EPS)
    return (grad - radial * unit) / length.clamp(min=EPS)
