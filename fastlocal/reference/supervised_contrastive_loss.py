"""Supervised contrastive loss with one view per sample: the specification (Khosla et al., arXiv 2004.11362, "L_out").

    u = x / max(|x|, 1e-12)     s_ij = u_i . u_j / temperature     p_ij = softmax of s_ij over j != i
    loss = - mean over i of sum over j of w_ij log p_ij

w_ij is 1 / (number of positives of i) where j is another sample of i's class, else 0: an anchor without positives
counts as 0 but stays in the mean. Everything is computed in at least float32, whatever the dtype of the features. A mean
over no sample is nan.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlocal.reference._precision import no_autocast, wide_dtype

EPS = 1e-12  # of F.normalize


def class_indices(target: Tensor) -> Tensor:
    """[B] indices; of probabilities [B, V] the most probable class."""
    return target.argmax(dim=-1) if target.is_floating_point() else target


def positive_weights(target: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Which pairs are of one class. Depends on the labels only.

    Args:
        target: [B] class indices, or probabilities [B, V], which count as their most probable class.

    Returns:
        weights [B, B]: 1 / (number of positives of row i) where j is another sample of i's class, else 0;
        has_positive [B]: 1 where the row has a positive, else 0.
    """
    labels = class_indices(target)
    same = labels.unsqueeze(0) == labels.unsqueeze(1)
    same.fill_diagonal_(False)
    count = same.sum(dim=1, keepdim=True)
    return same.to(dtype) / count.clamp(min=1), (count > 0).flatten().to(dtype)


def supervised_contrastive_loss(
    features: Tensor,
    target: Tensor,
    temperature: float = 0.07,
    positives: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The loss [], differentiable to any order.

    Args:
        features: [B, D].
        target: [B] class indices or [B, V] probabilities.
        positives: what ``positive_weights(target, dtype)`` gives, when it is known already.
    """
    wide = wide_dtype(features)
    weights, has_positive = positive_weights(target, wide) if positives is None else positives
    with no_autocast(features):
        unit = F.normalize(features.to(wide), dim=1, eps=EPS)
        similarity = unit @ unit.T / temperature
        # The lowest finite number, not -inf: a batch of one would make 0 * inf in the backward.
        others = torch.diagonal_scatter(similarity, similarity.new_full((len(unit),), torch.finfo(wide).min))
        log_partition = torch.logsumexp(others, dim=1)
        return (has_positive * log_partition - (weights * similarity).sum(dim=1)).mean()


def supervised_contrastive_loss_value_and_grad(
    features: Tensor,
    target: Tensor,
    temperature: float = 0.07,
    positives: tuple[Tensor, Tensor] | None = None,
    *,
    grad_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The loss [] and the gradient of ``grad_scale * loss`` in closed form, [B, D] in the features' dtype."""
    wide = wide_dtype(features)
    weights = (positive_weights(target, wide) if positives is None else positives)[0]
    with no_autocast(features):
        loss, grad = closed_form(features, weights, temperature, grad_scale)
    return loss, grad.to(features.dtype)


def closed_form(features: Tensor, weights: Tensor, temperature: float, grad_scale: float) -> tuple[Tensor, Tensor]:
    """Loss [] and gradient [B, D], both in the wide dtype."""
    x = features.to(wide_dtype(features))
    has_positive = weights.sum(1) > 0
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    unit = x / norm.clamp(min=EPS)
    similarity = unit @ unit.T / temperature
    diagonal = torch.eye(len(x), dtype=torch.bool, device=x.device)
    others = similarity.masked_fill(diagonal, torch.finfo(x.dtype).min)
    loss = (has_positive * torch.logsumexp(others, 1) - (weights * similarity).sum(1)).mean()

    # d loss / d s_ij, zero on the diagonal; then through s, and through the normalisation.
    grad = (others.softmax(1) * has_positive[:, None]).masked_fill(diagonal, 0) - weights
    grad_unit = (grad + grad.T) @ unit * (grad_scale / (max(len(x), 1) * temperature))
    radial = (grad_unit * unit).sum(1, keepdim=True) * (norm > EPS)
    return loss, (grad_unit - radial * unit) / norm.clamp(min=EPS)
