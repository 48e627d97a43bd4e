"""Similarity matching (Nøkland and Eidnes, arXiv 1901.06656): the specification.

    z = standard deviation of each channel over its positions (of a feature map or of tokens), or the features themselves
    c = z - mean of z over its features     u = c / (|c| + 1e-8)     S = u u^T clamped to [-1, 1]
    loss = mean of (S - S of the one-hot targets)^2

Everything is computed in at least float32, whatever the dtype of the features. A mean over no sample is nan.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlocal.reference._precision import no_autocast, wide_dtype

EPS = 1e-8


def deviation_dim(x: Tensor) -> int | None:
    """The dimension whose standard deviation stands for a channel, counted after ``x.flatten(2)``; None: ``x`` is taken flat.

    A feature map [B, C, H, W] with C > 3 and H > 1 has 2; tokens [B, T, D] with D > 3 and T > 1 have 1.
    """
    if x.dim() == 4 and x.shape[1] > 3 and x.shape[2] > 1:
        return 2
    if x.dim() == 3 and x.shape[2] > 3 and x.shape[1] > 1:
        return 1
    return None


def similarity_matrix(x: Tensor) -> Tensor:
    """Centred cosine similarity of every two samples, [B, B] in [-1, 1], differentiable to any order.

    A feature map [B, C, H, W] with C > 3 and H > 1 is first reduced to the standard deviation of each channel over its
    positions; tokens [B, T, D] likewise, as D channels with T positions, where D > 3 and T > 1. Everything else is
    flattened to [B, N].
    """
    x, dim = x.to(wide_dtype(x)), deviation_dim(x)
    x = x.flatten(1) if dim is None else x.flatten(2).std(dim=dim)
    with no_autocast(x):
        x = x - x.mean(dim=1, keepdim=True)
        x = x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + EPS)
        return (x @ x.T).clamp(-1, 1)


def target_similarity(target: Tensor, num_classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """``similarity_matrix`` of the one-hot targets (or of probabilities as they are), [B, B]: labels only."""
    if not target.is_floating_point():
        target = F.one_hot(target.long(), num_classes)
    return similarity_matrix(target.to(dtype))


def class_similarity(num_classes: int) -> tuple[float, float]:
    """``target_similarity`` of two one-hot targets of one class, and of two classes: all that there is of indices."""
    square, product = 1 - 1 / num_classes, -1 / num_classes
    if num_classes == 1:  # nothing is left without the mean
        return 0.0, 0.0
    return square / (math.sqrt(square) + EPS) ** 2, product / (math.sqrt(square) + EPS) ** 2


def similarity_matching_loss(
    features: Tensor, target: Tensor, num_classes: int, matched: Tensor | None = None
) -> Tensor:
    """The loss [], differentiable to any order.

    Args:
        features: [B, C, H, W], [B, T, D] or [B, D].
        target: [B] class indices or [B, V] probabilities.
        matched: ``target_similarity(target, num_classes, dtype)``, when it is known already.
    """
    similarity = similarity_matrix(features)
    if matched is None:
        matched = target_similarity(target, num_classes, similarity.dtype)
    return F.mse_loss(similarity, matched)


def similarity_matching_loss_value_and_grad(
    features: Tensor, target: Tensor, num_classes: int, matched: Tensor | None = None, *, grad_scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The loss [] and the gradient of ``grad_scale * loss`` in closed form, in the features' shape and dtype."""
    if matched is None:
        matched = target_similarity(target, num_classes, wide_dtype(features))
    with no_autocast(features):
        loss, grad, centred = closed_form(features, matched, grad_scale)
    if centred is not None:
        grad = centred * grad
    return loss, grad.to(features.dtype).reshape(features.shape)


def closed_form(features: Tensor, matched: Tensor, grad_scale: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss [], and the gradient in the wide dtype as a factor and the centred positions, of ``features.flatten(2)``, that it
    multiplies.

    Where there are no positions the centred ones are None, and the factor is the gradient, [B, N].
    """
    x, dim = features.to(wide_dtype(features)), deviation_dim(features)
    centred = None
    if dim is None:
        z = x.flatten(1)
    else:
        x = x.flatten(2)
        z, centred = x.std(dim, keepdim=True), x - x.mean(dim, keepdim=True)
    flat = z.flatten(1)
    c = flat - flat.mean(1, keepdim=True)
    norm = torch.linalg.vector_norm(c, dim=1, keepdim=True)
    unit = c / (norm + EPS)
    similarity = (unit @ unit.T).clamp(-1, 1)
    difference = similarity - matched
    loss = F.mse_loss(similarity, matched)

    # The clamp needs no mask: where it acts, two samples are parallel and the gradient is radial, which is taken
    # away. The rows of the gradient sum to zero but for rounding, which the last line takes out.
    grad_unit = (difference + difference.T) @ unit * (2 * grad_scale / max(len(x), 1) ** 2)
    radial = (grad_unit * unit).sum(1, keepdim=True) * ((norm + EPS) / norm).masked_fill(norm == 0, 0)
    grad = (grad_unit - radial * unit) / (norm + EPS)
    grad = grad - grad.mean(1, keepdim=True)
    if dim is None:
        return loss, grad, None
    assert centred is not None
    grad = grad.view_as(z) / (z * (x.shape[dim] - 1))
    return loss, grad.masked_fill(z == 0, 0), centred
