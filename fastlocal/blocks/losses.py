"""Losses of blocks and heads: plain PyTorch, and three of the operators of ``fastlocal.ops``.

Each computes in float32 at least (float64 stays), whatever dtype the network runs in and whether or not autocast is on,
and returns a 0-dim mean over the batch. Pieces that depend on labels or on the image only are functions of their own,
so a training step computes them once and shares them between its blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlocal.errors import ArgumentError
from fastlocal.ops.reconstruction_loss import reconstruction_loss
from fastlocal.ops.similarity_matching_loss import similarity_matching_loss, similarity_matrix, target_similarity
from fastlocal.ops.supervised_contrastive_loss import class_indices, positive_weights, supervised_contrastive_loss

__all__ = [
    "IGNORE_INDEX",
    "CausalLMLoss",
    "class_indices",
    "cross_entropy",
    "cross_entropy_options",
    "full_precision",
    "positive_weights",
    "reconstruction_loss",
    "restore_image",
    "scaled_gradient",
    "similarity_matching_loss",
    "similarity_matrix",
    "supervised_contrastive_loss",
    "target_similarity",
]

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


def cross_entropy_options(criterion: Callable[..., Tensor], target: Tensor) -> dict[str, Any] | None:
    """Options of `fastlocal.ops.pool_linear_cross_entropy` that make it compute ``criterion(logits, target)``.

    None where it cannot: another function than `cross_entropy` and ``nn.CrossEntropyLoss``, or a target that is neither one
    class index nor one row of probabilities for each sample.
    """
    if not isinstance(target, Tensor) or target.dim() != (2 if target.is_floating_point() else 1):
        return None
    options: dict[str, Any]
    if isinstance(criterion, functools.partial) and criterion.func is cross_entropy and not criterion.args:
        options = dict(criterion.keywords)
    elif criterion is cross_entropy:
        options = {}
    elif type(criterion) is torch.nn.CrossEntropyLoss and criterion.reduction == "mean" and criterion.weight is None:
        if target.is_floating_point() and criterion.ignore_index >= 0:
            return None  # torch refuses it
        options = {"ignore_index": criterion.ignore_index, "label_smoothing": criterion.label_smoothing}
    else:
        return None
    if target.is_floating_point():
        options.pop("ignore_index", None)
    return options


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


def restore_image(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Undoes the normalisation of images: ``x * std + mean``, clamped to [0, 1] against rounding; no gradient.

    Args:
        x: [B, C, H, W].
        mean, std: [C, 1, 1], on the device of ``x`` (a constant made here would be a copy from the host in every step).
    """
    x = full_precision(x.detach())
    return torch.addcmul(mean.to(x.dtype), x, std.to(x.dtype)).clamp_(0, 1)


def scaled_gradient(loss: Tensor, scale: float) -> Tensor:
    """``loss`` whose gradient is multiplied by ``scale``; its value is not, and a scale of one costs nothing."""
    return loss if scale == 1.0 else _ScaledGradient.apply(loss, scale)


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.scale, None
