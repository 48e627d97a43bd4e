"""Losses of blocks and heads, in plain PyTorch.

Each computes in float32 at least (float64 stays), whatever dtype the network runs in and whether or not autocast is on,
and returns a 0-dim mean over the batch. Pieces that depend on labels or on the image only are functions of their own,
so a training step computes them once and shares them between its blocks.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlocal.errors import ArgumentError

IGNORE_INDEX = -100


def full_precision(x: Tensor) -> Tensor:
    """float16 and bfloat16 become float32; float32 and float64 stay."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def cross_entropy(
    logits: Tensor, target: Tensor, *, ignore_index: int = IGNORE_INDEX, label_smoothing: float = 0.0
) -> Tensor:
    """Mean softmax cross-entropy, the default task loss.

    Args:
        logits: [B, V]; [B, T, V] with one target per token; [B, V, H, W, ...] with one target per pixel, as in torch.
        target: class indices (int64) of ``logits``' shape without its class dimension, where ``ignore_index`` is left
            out of the mean; or class probabilities (floating point) of ``logits``' shape.
        label_smoothing: as in ``torch.nn.functional.cross_entropy``.

    Raises:
        ArgumentError: the shapes fit none of these.
    """
    logits = full_precision(logits)
    if target.is_floating_point():
        if target.shape != logits.shape:
            raise ArgumentError(
                f"target: probabilities need the shape of the logits {list(logits.shape)}, got {list(target.shape)}"
            )
        target = target.to(logits.dtype)
        if logits.dim() == 3:
            logits, target = logits.flatten(0, 1), target.flatten(0, 1)
        return F.cross_entropy(logits, target, label_smoothing=label_smoothing)
    if logits.dim() == 3 and target.shape == logits.shape[:-1]:
        logits, target = logits.flatten(0, 1), target.flatten()
    elif target.shape != logits.shape[:1] + logits.shape[2:]:
        raise ArgumentError(
            f"target: class indices of shape {list(target.shape)} do not fit logits of shape {list(logits.shape)}; "
            "give one index per sample, per token ([B, T] for [B, T, V]) or per pixel, or probabilities of the "
            "logits' shape"
        )
    return F.cross_entropy(logits, target, ignore_index=ignore_index, label_smoothing=label_smoothing)


class CausalLMLoss:
    """Cross-entropy of the next token: logits at position t are compared with the target at t + 1.

    Called with logits [B, T, V] and token ids [B, T] (int64; ``ignore_index`` is left out of the mean).
    """

    def __init__(self, ignore_index: int = IGNORE_INDEX, label_smoothing: float = 0.0) -> None:
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        if logits.dim() != 3 or target.shape != logits.shape[:-1]:
            raise ArgumentError(
                f"target: the causal loss takes logits [B, T, V] and token ids [B, T], got {list(logits.shape)} and "
                f"{list(target.shape)}"
            )
        # The target is shifted, not the logits: they are the big tensor, and a slice of them would be copied.
        shifted = F.pad(target[:, 1:], (0, 1), value=self.ignore_index)
        return cross_entropy(logits, shifted, ignore_index=self.ignore_index, label_smoothing=self.label_smoothing)

    def count(self, target: Tensor) -> Tensor:
        """Number of tokens that are predicted: int64, 0-dim."""
        return (target[:, 1:] != self.ignore_index).sum()

    @torch.no_grad()
    def correct(self, logits: Tensor, target: Tensor) -> Tensor:
        """Number of tokens that are predicted rightly: int64, 0-dim."""
        return (logits[:, :-1].argmax(-1) == target[:, 1:]).sum()

    def __repr__(self) -> str:
        return f"CausalLMLoss(ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing})"


def class_indices(target: Tensor) -> Tensor:
    """[B] indices; of probabilities [B, V] the most probable class."""
    return target.argmax(dim=-1) if target.is_floating_point() else target


def positive_weights(target: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """For the contrastive loss: which pairs are of one class. Depends on the labels only.

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
    """Supervised contrastive loss with one view per sample (Khosla et al., arXiv 2004.11362, the form "L_out").

    Features are L2-normalised; positives of an anchor are the other samples of its class; an anchor without positives
    counts as 0 but stays in the mean. InfoPro uses it with temperature 0.07.

    Args:
        features: [B, D].
        target: [B] class indices or [B, V] probabilities.
        positives: what ``positive_weights(target, dtype)`` gives, when it is known already.
    """
    features = full_precision(features)
    weights, has_positive = positive_weights(target, features.dtype) if positives is None else positives
    with _no_autocast(features):
        unit = F.normalize(features, dim=1)
        similarity = unit @ unit.T / temperature
        # The lowest finite number, not -inf: a batch of one would make 0 * inf in the backward.
        others = torch.diagonal_scatter(
            similarity, similarity.new_full((len(unit),), torch.finfo(similarity.dtype).min)
        )
        log_partition = torch.logsumexp(others, dim=1)
        return (has_positive * log_partition - (weights * similarity).sum(dim=1)).mean()


def similarity_matrix(x: Tensor) -> Tensor:
    """Centred cosine similarity of every two samples, [B, B] in [-1, 1] (Nøkland and Eidnes, arXiv 1901.06656).

    A feature map [B, C, H, W] with C > 3 and H > 1 is first reduced to the standard deviation of each channel over its
    positions; tokens [B, T, D] likewise, as D channels with T positions, where D > 3 and T > 1. Everything else is
    flattened to [B, N].
    """
    if x.dim() == 4 and x.shape[1] > 3 and x.shape[2] > 1:
        x = x.flatten(2).std(dim=2)
    elif x.dim() == 3 and x.shape[2] > 3 and x.shape[1] > 1:
        x = x.std(dim=1)
    x = full_precision(x.flatten(1))
    with _no_autocast(x):
        x = x - x.mean(dim=1, keepdim=True)
        x = x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-8)
        return (x @ x.T).clamp(-1, 1)


def target_similarity(target: Tensor, num_classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """``similarity_matrix`` of the one-hot targets (or of probabilities as they are), [B, B]: labels only."""
    if not target.is_floating_point():
        target = F.one_hot(target, num_classes)
    return similarity_matrix(target.to(dtype))


def similarity_matching_loss(
    features: Tensor, target: Tensor, num_classes: int, matched: Tensor | None = None
) -> Tensor:
    """Mean squared difference between ``similarity_matrix(features)`` and that of the targets ("sim", same paper).

    Args:
        features: [B, C, H, W], [B, T, D] or [B, D].
        target: [B] class indices or [B, V] probabilities.
        matched: ``target_similarity(target, num_classes, dtype)``, when it is known already.
    """
    similarity = similarity_matrix(features)
    if matched is None:
        matched = target_similarity(target, num_classes, similarity.dtype)
    return F.mse_loss(similarity, matched)


def restore_image(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Undoes the normalisation of images: ``x * std + mean``, clamped to [0, 1] against rounding; no gradient.

    Args:
        x: [B, C, H, W].
        mean, std: [C, 1, 1], on the device of ``x`` (a constant made here would be a copy from the host in every step).
    """
    x = full_precision(x.detach())
    return torch.addcmul(mean.to(x.dtype), x, std.to(x.dtype)).clamp_(0, 1)


def reconstruction_loss(logits: Tensor, image: Tensor) -> Tensor:
    """Mean binary cross-entropy between ``sigmoid(logits)`` and an image in [0, 1], both [B, C, H, W].

    The logarithms are clamped at -100, as ``torch.nn.BCELoss`` does, so the gradient vanishes where the sigmoid
    saturates.
    """
    with _no_autocast(logits):
        return F.binary_cross_entropy(torch.sigmoid(full_precision(logits)), image)


def _no_autocast(x: Tensor) -> AbstractContextManager:
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
