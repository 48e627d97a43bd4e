"""Softmax cross-entropy of a head's logits with its gradient, in few ATen calls; the checks of its arguments; and what
the operators have in common that end in it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlocal.errors import ArgumentError

MAX_CLASSES = 4096  # a row of logits lives in registers
COUNT_ROWS = 4096  # up to so many rows each Triton program adds up itself what the loss is divided by


def check_target(
    target: Tensor, rows: int, classes: int, device: torch.device, label_smoothing: float, ignore_index: int
) -> None:
    """Raises ArgumentError unless target and options fit `rows` rows of `classes` classes."""
    if target.is_floating_point():
        if tuple(target.shape) != (rows, classes):
            raise ArgumentError(
                f"target has shape {list(target.shape)}; probabilities for these features are [{rows}, {classes}]"
            )
        if ignore_index >= 0:
            raise ArgumentError(
                f"ignore_index={ignore_index} needs class indices, but target holds probabilities; drop it or give "
                "target as int64 [N]"
            )
        if target.requires_grad and torch.is_grad_enabled():
            raise ArgumentError("target requires grad, and this operator has no gradient for it; detach it")
    elif target.dtype != torch.int64:
        raise ArgumentError(f"target is {target.dtype}; give int64 class indices (target.long()) or probabilities")
    elif target.dim() != 1 or target.shape[0] != rows:
        raise ArgumentError(f"target has shape {list(target.shape)}; class indices for these features are [{rows}]")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ArgumentError(f"label_smoothing={label_smoothing} is outside [0, 1]")
    if target.device != device:
        raise ArgumentError(f"target is on {target.device} and the features on {device}; move them to one device")


def check_dtypes(**tensors: Tensor | None) -> None:
    """Raises ArgumentError unless all are float16, bfloat16 or float32, or all float64."""
    dtypes = [t.dtype for t in tensors.values() if t is not None]
    low = (torch.float16, torch.bfloat16, torch.float32)
    if not (all(d in low for d in dtypes) or all(d == torch.float64 for d in dtypes)):
        raise ArgumentError(
            f"{', '.join(tensors)} are {dtypes}; give float16, bfloat16 or float32 throughout, or float64"
        )


def reject_triton(s: Any) -> str | None:
    """Why the kernels cannot serve a signature with device, triton, dtypes and classes, or None."""
    if s.triton is not None:
        return s.triton
    if torch.float64 in s.dtypes:
        return "float64; the kernel accumulates in float32"
    if s.classes > MAX_CLASSES:
        return f"{s.classes} classes; a row of at most {MAX_CLASSES} lives in registers"
    if s.device == "cpu" and torch.bfloat16 in s.dtypes:
        return "bfloat16, which the Triton interpreter computes wrongly; give float32"
    return None


def counts_in_kernel(target: Tensor) -> bool:
    """Whether each Triton program adds up itself what the loss is divided by."""
    return target.is_floating_point() or target.shape[0] <= COUNT_ROWS


def cross_entropy_and_grad(
    logits: Tensor,
    target: Tensor,
    label_smoothing: float,
    ignore_index: int,
    grad_scale: float,
    needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Loss [], and the gradient of `grad_scale * loss` with respect to the logits, [N, K] (empty without need)."""
    rows, classes = logits.shape
    log_probs = torch.log_softmax(logits, 1)
    if target.is_floating_point():
        wanted = target.to(logits.dtype)
        if label_smoothing:
            wanted = wanted * (1 - label_smoothing) + label_smoothing / classes
        loss = (wanted * log_probs).sum() / -rows
        grad = wanted * (-grad_scale / max(rows, 1)) if needs_grad else None
    else:
        loss, total = torch.ops.aten.nll_loss_forward(log_probs, target, None, 1, ignore_index)
        grad = None
        if needs_grad:
            one = torch.full((), grad_scale * (1 - label_smoothing), dtype=logits.dtype, device=logits.device)
            grad = torch.ops.aten.nll_loss_backward(one, log_probs, target, None, 1, ignore_index, total)
        if label_smoothing:
            share = (target != ignore_index).to(logits.dtype) / total.clamp(min=1)
            loss = (1 - label_smoothing) * loss - label_smoothing / classes * (log_probs.sum(1) @ share)
            if grad is not None:
                grad.sub_(share[:, None], alpha=grad_scale * label_smoothing / classes)
    if grad is None:
        return loss, logits.new_empty(0)
    return loss, torch.ops.aten._log_softmax_backward_data(grad, log_probs, 1, logits.dtype)


def correct_rows(scores: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """How many rows the largest score gets right, int64 []."""
    guess = scores.argmax(1)
    if target.is_floating_point():
        return (guess == target.argmax(1)).sum()
    hits = guess == target
    if 0 <= ignore_index < scores.shape[1]:  # elsewhere no guess can equal it
        hits = hits & (target != ignore_index)
    return hits.sum()
