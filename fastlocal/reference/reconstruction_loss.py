"""Reconstruction of an image (InfoPro, Wang et al., ICLR 2021): the specification.

    p = sigmoid(logits)     loss = - mean of t max(log p, -100) + (1 - t) max(log(1 - p), -100)

Everything is computed in at least float32, whatever the dtype of the logits. p is rounded to that dtype, so where the
sigmoid saturates the logarithm takes its bound and the gradient vanishes, as `torch.nn.BCELoss` has it. A mean over
nothing is nan.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlocal.reference._precision import no_autocast, wide_dtype

LEAST_VARIANCE = 1e-12  # PyTorch divides by p (1 - p), or by this where it is smaller


def reconstruction_loss(logits: Tensor, image: Tensor) -> Tensor:
    """The loss [], differentiable to any order in the logits.

    Args:
        logits: any shape.
        image: the same shape, in [0, 1].
    """
    wide = wide_dtype(logits)
    with no_autocast(logits):
        return F.binary_cross_entropy(torch.sigmoid(logits.to(wide)), image.to(wide))


def reconstruction_loss_value_and_grad(
    logits: Tensor, image: Tensor, *, grad_scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The loss [] and the gradient of ``grad_scale * loss`` in closed form, in the logits' shape and dtype."""
    with torch.no_grad():
        loss = reconstruction_loss(logits, image)
        return loss, closed_form_grad(logits, image, loss.new_tensor(grad_scale))


def closed_form_grad(logits: Tensor, image: Tensor, grad_loss: Tensor) -> Tensor:
    """``grad_loss`` times the gradient of the loss, in the logits' dtype."""
    wide = wide_dtype(logits)
    p = torch.sigmoid(logits.to(wide))
    variance = p * (1 - p)
    grad = (p - image.to(wide)) * (variance / variance.clamp(min=LEAST_VARIANCE))
    return (grad * (grad_loss.to(wide) / max(1, logits.numel()))).to(logits.dtype)
