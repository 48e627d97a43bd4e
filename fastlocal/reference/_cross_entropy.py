"""Mean softmax cross-entropy over the rows that count, with its gradient: shared by the specifications of heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def count_correct(scores: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """How many rows the largest score gets right, int64 []; ignored rows are never right."""
    guess = scores.argmax(1)
    if target.is_floating_point():
        return (guess == target.argmax(1)).sum()
    return ((guess == target) & (target != ignore_index)).sum()


def cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float, ignore_index: int) -> Tensor:
    """The loss [], differentiable to any order; nan where no row counts."""
    if target.is_floating_point():
        return F.cross_entropy(logits, target.to(logits.dtype), label_smoothing=label_smoothing)
    return F.cross_entropy(logits, target, ignore_index=ignore_index, label_smoothing=label_smoothing)


def grad_of_logits(
    logits: Tensor, target: Tensor, label_smoothing: float, ignore_index: int, grad_scale: float
) -> Tensor:
    """The gradient of ``grad_scale * cross_entropy``, [N, K]; zero where no row counts."""
    if target.is_floating_point():
        counts = torch.ones_like(target[:, 0], dtype=torch.bool)
        wanted = target.to(logits.dtype)
    else:
        counts = target != ignore_index
        wanted = torch.zeros_like(logits).scatter(1, target.where(counts, 0)[:, None], 1.0)
    wanted = (wanted * (1 - label_smoothing) + label_smoothing / logits.shape[1]) * counts[:, None]
    # d/dlogits of -sum(wanted * log_softmax(logits)); the rows of `wanted` need not sum to one.
    grad = logits.softmax(1) * wanted.sum(1, keepdim=True) - wanted
    return grad * (grad_scale / counts.sum().clamp(min=1).to(logits.dtype))
