"""Cross-entropy with the goodness of each class as its logit: the specification.

    a = W x + b at every position     g_nk = mean over positions of a_nk^2                   (weight: Scalable
        Forward-Forward, Krutsylo, arXiv 2501.03176, with a 1x1 convolution)
    g_nk = mean of the squares of the k-th of K equal groups of channels, over positions     (no weight: channel-wise
        goodness of CwComp, Papachristodoulou et al., AAAI 2024)
    logits = scale g, that of the target less margin      loss = mean of CE over the rows that count

Everything is computed in at least float32, whatever the dtype of the features and the parameters. A mean over no rows
is nan with zero gradients, as in `torch.nn.functional.cross_entropy`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlocal.reference._cross_entropy import count_correct, cross_entropy, grad_of_logits
from fastlocal.reference._precision import no_autocast, wide_dtype


def flat_positions(x: Tensor) -> Tensor:
    """[N, C, *spatial] -> [N, C, P]; [N, C] has one position."""
    return x[:, :, None] if x.dim() == 2 else x.flatten(2)


def class_goodness(x: Tensor, weight: Tensor | None, bias: Tensor | None, num_classes: int) -> Tensor:
    """The goodness of each class, [N, K] in the wide dtype, differentiable to any order."""
    wide = wide_dtype(x)
    flat = flat_positions(x).to(wide)
    if weight is None:
        return flat.unflatten(1, (num_classes, -1)).square().mean((2, 3))
    with no_autocast(x):
        mapped = torch.einsum("kc,ncp->nkp", weight.to(wide), flat)
    if bias is not None:
        mapped = mapped + bias.to(wide)[:, None]
    return mapped.square().mean(2)


def with_margin(logits: Tensor, target: Tensor, margin: float, ignore_index: int) -> Tensor:
    """The logits, that of the target less ``margin``."""
    if not margin:
        return logits
    classes = target.where(target != ignore_index, 0)[:, None]  # ignored rows count for nothing
    return logits.scatter_add(1, classes, torch.full_like(logits[:, :1], -margin))


def class_goodness_cross_entropy(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    target: Tensor,
    *,
    num_classes: int | None = None,
    scale: float = 1.0,
    margin: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """Loss [] and number of correct rows [] (int64), differentiable to any order.

    Args:
        x: [N, C, *spatial] or [N, C].
        weight: [K, C], or None: `num_classes` equal groups of neighbouring channels are the classes.
        bias: [K] or None; None without a weight.
        target: class indices, int64 [N], or probabilities, floating [N, K] (without a margin).
    """
    classes = num_classes if weight is None else weight.shape[0]
    assert classes is not None
    g = class_goodness(x, weight, bias, classes)
    logits = with_margin(g * scale, target, margin, ignore_index)
    return cross_entropy(logits, target, label_smoothing, ignore_index), count_correct(g, target, ignore_index)


def class_goodness_cross_entropy_value_and_grad(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    target: Tensor,
    *,
    num_classes: int | None = None,
    scale: float = 1.0,
    margin: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    grad_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The same with the gradients of `grad_scale * loss` in closed form.

    Returns:
        loss [], correct [], and the gradients of x, weight and bias (None without one), each in the dtype of what it
        belongs to.
    """
    classes = num_classes if weight is None else weight.shape[0]
    assert classes is not None
    with no_autocast(x):
        loss, correct, factor, grad_weight, grad_bias = closed_form(
            x, weight, bias, target, classes, scale, margin, label_smoothing, ignore_index, grad_scale
        )
        grad_x = grad_of(x, weight, bias, factor)
    return (
        loss,
        correct,
        grad_x,
        None if weight is None or grad_weight is None else grad_weight.to(weight.dtype),
        None if bias is None or grad_bias is None else grad_bias.to(bias.dtype),
    )


def closed_form(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    target: Tensor,
    num_classes: int,
    scale: float,
    margin: float,
    label_smoothing: float,
    ignore_index: int,
    grad_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Loss, correct, the factor [N, K] of `grad_of`, and the gradients of weight and bias, all in the wide dtype."""
    g = class_goodness(x, weight, bias, num_classes)
    logits = with_margin(g * scale, target, margin, ignore_index)
    loss = cross_entropy(logits, target, label_smoothing, ignore_index)
    correct = count_correct(g, target, ignore_index)
    grad = grad_of_logits(logits, target, label_smoothing, ignore_index, grad_scale)
    flat = flat_positions(x).to(g.dtype)
    positions = flat.shape[2] * (flat.shape[1] // num_classes if weight is None else 1)
    factor = grad * (2 * scale / positions)
    if weight is None:
        return loss, correct, factor, None, None
    weighted = _mapped(flat, weight, bias) * factor[:, :, None]
    return loss, correct, factor, torch.einsum("nkp,ncp->kc", weighted, flat), weighted.sum((0, 2))


def grad_of(x: Tensor, weight: Tensor | None, bias: Tensor | None, factor: Tensor) -> Tensor:
    """The gradient of x in its dtype: every group of channels times its factor, or W^T diag(factor) (W x + b)."""
    flat = flat_positions(x).to(factor.dtype)
    if weight is None:
        grad = (flat.unflatten(1, (factor.shape[1], -1)) * factor[:, :, None, None]).flatten(1, 2)
    else:
        grad = torch.einsum("kc,nkp->ncp", weight.to(flat.dtype), _mapped(flat, weight, bias) * factor[:, :, None])
    return grad.reshape(x.shape).to(x.dtype)


def _mapped(flat: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    mapped = torch.einsum("kc,ncp->nkp", weight.to(flat.dtype), flat)
    return mapped if bias is None else mapped + bias.to(flat.dtype)[:, None]
