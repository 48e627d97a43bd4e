"""Pool, linear layer and softmax cross-entropy: the specification of the smallest auxiliary head.

    pooled = mean of x over positions     logits = norm(pooled) W^T + b     loss = mean of CE over the rows that count

Everything after the pool is computed in at least float32, whatever the dtype of the features and the parameters.
A mean over no rows (an empty batch, or every target ignored) is nan with zero gradients, as in
`torch.nn.functional.cross_entropy`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlocal.errors import ArgumentError

POOLS = ("mean", "tokens", "cls", "none")


def wide_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of the arithmetic after the pool: float64 if an input is, else float32."""
    return torch.float64 if torch.float64 in (x.dtype, weight.dtype) else torch.float32


def pooled_dims(x: Tensor, pool: str) -> tuple[int, ...]:
    """The dimensions of `x` that `pool` averages: "mean" [N, C, *spatial], "tokens" [N, T, C]; none of the others."""
    if pool == "mean":
        return tuple(range(2, x.dim()))
    if pool == "tokens":
        return (1,)
    if pool in ("cls", "none"):
        return ()
    raise ArgumentError(f"pool={pool!r} is not one of {', '.join(map(repr, POOLS))}")


def positions(x: Tensor, pool: str) -> int:
    """How many positions of `x` are averaged into one."""
    count = 1
    for dim in pooled_dims(x, pool):
        count *= x.shape[dim]
    return count


def pool_features(x: Tensor, pool: str, dtype: torch.dtype) -> Tensor:
    """Mean over the pooled dimensions, or the first token for "cls", [N, C] in `dtype`.

    The sum is divided, not the input: autograd then divides the small gradient before it expands it, and hands back a
    stride-0 view where `x.mean(...)` would write a gradient of the size of `x`.
    """
    dims = pooled_dims(x, pool)
    if not dims:
        return (x[:, 0] if pool == "cls" else x).to(dtype)
    return x.sum(dims, dtype=dtype) / positions(x, pool)


def expand_gradient(grad_pooled: Tensor, shape: torch.Size, pool: str, dtype: torch.dtype) -> Tensor:
    """The gradient of the features from that of one position, [N, C]: a stride-0 view, but zeros behind a class token."""
    if pool == "cls":
        full = grad_pooled.new_zeros(shape, dtype=dtype)
        full[:, 0] = grad_pooled
        return full
    grad_pooled = grad_pooled.to(dtype)
    if pool == "none":
        return grad_pooled
    if pool == "tokens":
        return grad_pooled[:, None, :].expand(shape)
    return grad_pooled[(...,) + (None,) * (len(shape) - 2)].expand(shape)


def norm_input(pooled: Tensor, norm: nn.Module) -> Tensor:
    """What a norm is given: the pooled features, in its own dtype where that is a half precision."""
    weight = getattr(norm, "weight", None)
    return pooled.to(weight.dtype) if weight is not None and weight.dtype.itemsize == 2 else pooled


def count_correct(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """How many rows the largest logit gets right, int64 []; ignored rows are never right."""
    guess = logits.argmax(1)
    if target.is_floating_point():
        return (guess == target.argmax(1)).sum()
    return ((guess == target) & (target != ignore_index)).sum()


def pool_linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    pool: str = "mean",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    class_weight: Tensor | None = None,
    norm: nn.Module | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss and number of correct rows, differentiable to any order.

    Args:
        x: features, [N, C, *spatial] ("mean"), [N, T, C] ("tokens", or "cls" for the first token) or [N, C] ("none").
        weight: [K, C].
        bias: [K] or None.
        target: class indices, int64 [N], or probabilities, floating [N, K].
        class_weight: [K], the `weight` of `torch.nn.functional.cross_entropy`: the terms of a class count so often. With
            class indices the mean is over the weights of the targets, with probabilities over the rows.
        norm: a module [N, C] -> [N, C] between pool and linear, such as a BatchNorm1d, called once.

    Returns:
        loss [] (float64 for float64 input, else float32) and correct [] (int64).
    """
    wide = wide_dtype(x, weight)
    pooled = pool_features(x, pool, wide)
    if norm is not None:
        pooled = norm(norm_input(pooled, norm)).to(wide)
    logits = F.linear(pooled, weight.to(wide), None if bias is None else bias.to(wide))
    loss = _loss(logits, target, label_smoothing, ignore_index, class_weight)
    return loss, count_correct(logits, target, ignore_index)


def pool_linear_cross_entropy_value_and_grad(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    pool: str = "mean",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    class_weight: Tensor | None = None,
    grad_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The same with the gradients of `grad_scale * loss`, in closed form.

    Returns:
        loss [], correct [], gradient of x (`expand_gradient`, x.dtype), of weight [K, C] and of bias [K] (None without
        one), each in the dtype of what it belongs to.
    """
    loss, correct, grad_pooled, grad_weight, grad_bias = closed_form(
        x, weight, bias, target, class_weight, pool, label_smoothing, ignore_index, grad_scale
    )
    grad_x = expand_gradient(grad_pooled, x.shape, pool, x.dtype)
    return loss, correct, grad_x, grad_weight.to(weight.dtype), None if bias is None else grad_bias.to(bias.dtype)


def closed_form(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    pool: str,
    label_smoothing: float,
    ignore_index: int,
    grad_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, correct, and the gradients of one position [N, C], of the weight and of the bias, all in the wide dtype."""
    wide = wide_dtype(x, weight)
    classes = weight.shape[0]
    pooled = pool_features(x, pool, wide)
    logits = F.linear(pooled, weight.to(wide), None if bias is None else bias.to(wide))

    loss = _loss(logits, target, label_smoothing, ignore_index, class_weight)

    # The distribution that each row should have, times the weight of each class; and what the sum is divided by.
    each = logits.new_ones(classes) if class_weight is None else class_weight.to(wide)
    if target.is_floating_point():
        counts = torch.ones_like(target[:, 0], dtype=torch.bool)
        wanted = target.to(wide)
        total = counts.sum()
    else:
        counts = target != ignore_index
        known = target.where(counts, 0)
        wanted = torch.zeros_like(logits).scatter(1, known[:, None], 1.0)
        total = (each[known] * counts).sum()
    wanted = (wanted * (1 - label_smoothing) + label_smoothing / classes) * each

    # d/dlogits of -sum(wanted * log_softmax(logits)); the rows of `wanted` need not sum to one.
    grad_logits = (logits.softmax(1) * wanted.sum(1, keepdim=True) - wanted) * (grad_scale / total.to(wide))
    grad_logits = grad_logits.where(counts[:, None], 0.0)
    return (
        loss,
        count_correct(logits, target, ignore_index),
        grad_logits @ weight.to(wide) / positions(x, pool),
        grad_logits.T @ pooled,
        grad_logits.sum(0),
    )


def _loss(
    logits: Tensor, target: Tensor, label_smoothing: float, ignore_index: int, class_weight: Tensor | None
) -> Tensor:
    each = None if class_weight is None else class_weight.to(logits.dtype)
    if target.is_floating_point():
        return F.cross_entropy(logits, target.to(logits.dtype), each, label_smoothing=label_smoothing)
    return F.cross_entropy(logits, target, each, ignore_index=ignore_index, label_smoothing=label_smoothing)
