"""The supervised contrastive loss as one operator, `torch.ops.fastlocal.supervised_contrastive_loss`.

The gradient of the features is taken with the loss: [B, D] is all that is kept for the backward, and no [B, B] matrix
outlives the call; "triton" makes none at all. Nothing is read back to the host. Deterministic on every backend.

Specification: fastlocal/reference/supervised_contrastive_loss.py.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastlocal.errors import ArgumentError
from fastlocal.ops import _dispatch
from fastlocal.ops._seed import is_one
from fastlocal.reference._precision import wide_dtype
from fastlocal.reference.supervised_contrastive_loss import EPS, class_indices, closed_form, positive_weights

__all__ = [
    "class_indices",
    "positive_weights",
    "supervised_contrastive_loss",
    "supervised_contrastive_loss_value_and_grad",
]

NAME = "supervised_contrastive_loss"

_library = torch.library.Library("fastlocal", "FRAGMENT")
# Either labels [B] or weights [B, B]. wide_grad: the gradient in the dtype of the arithmetic, not of the features, so that
# multiplying it by a loss scale later rounds once only. Without needs_grad it comes back as an empty tensor.
_library.define(
    f"{NAME}(Tensor features, Tensor? labels, Tensor? weights, float temperature, float grad_scale, bool needs_grad, "
    "bool wide_grad, str impl) -> (Tensor loss, Tensor grad)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_operator = getattr(torch.ops.fastlocal, NAME).default
Positives = tuple[Tensor, Tensor]


def supervised_contrastive_loss(
    features: Tensor,
    target: Tensor,
    temperature: float = 0.07,
    positives: Positives | None = None,
    *,
    grad_scale: float = 1.0,
    impl: str | None = None,
) -> Tensor:
    """Supervised contrastive loss with one view per sample (Khosla et al., arXiv 2004.11362, "L_out"), once
    differentiable in the features.

    Features are L2-normalised; positives of an anchor are the other samples of its class; an anchor without positives
    counts as 0 but stays in the mean.

    Args:
        features: [B, D], floating point, any strides.
        target: class indices, integers [B], or probabilities, floating [B, V], which count as their most probable class.
        temperature: above 0.
        positives: what `fastlocal.reference.positive_weights(target, dtype)` gives, when it is known already; dtype is
            that of the result. `target` is then not looked at. "triton" needs no such matrix, and reads it where it is given.
        grad_scale: multiplies the gradient, not the loss: the weight of this loss in a sum, without a launch of its own.
        impl: a backend for this call; None takes that of `fastlocal.backend`.

    Returns:
        The mean over the batch, [], in float32 (float64 for float64 features); nan for an empty batch.

    Raises:
        ArgumentError: shapes, dtypes or a temperature that do not fit.
        BackendError: `impl` cannot serve the call.
    """
    labels, weights = _prepare(features, target, temperature, positives, impl)
    if torch.is_grad_enabled() and features.requires_grad:
        return _Function.apply(features, labels, weights, temperature, grad_scale, impl or "auto")
    return _operator(features, labels, weights, temperature, 1.0, False, True, impl or "auto")[0]


def supervised_contrastive_loss_value_and_grad(
    features: Tensor,
    target: Tensor,
    temperature: float = 0.07,
    positives: Positives | None = None,
    *,
    grad_scale: float = 1.0,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The same with its gradient, without autograd.

    Args:
        grad_scale: multiplies the gradient, not the loss; a power of two keeps float16 gradients from underflow.
        The others are those of `supervised_contrastive_loss`.

    Returns:
        loss [], and the gradient of the features, [B, D] in their dtype.

    Raises:
        As `supervised_contrastive_loss`.
    """
    labels, weights = _prepare(features, target, temperature, positives, impl)
    with torch.no_grad():
        return _operator(features, labels, weights, temperature, grad_scale, True, False, impl or "auto")


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        labels: Tensor | None,
        weights: Tensor | None,
        temperature: float,
        grad_scale: float,
        impl: str,
    ) -> Tensor:
        loss, grad = _operator(features, labels, weights, temperature, grad_scale, True, True, impl)
        ctx.save_for_backward(grad)
        ctx.dtype = features.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = ctx.saved_tensors
        return (grad if is_one(grads[0]) else grad * grads[0]).to(ctx.dtype), *[None] * 5


def _prepare(
    features: Tensor, target: Tensor, temperature: float, positives: Positives | None, impl: str | None
) -> tuple[Tensor | None, Tensor | None]:
    """Checks the call and returns the labels, or the weights of the pairs."""
    if features.dim() != 2 or not features.is_floating_point():
        raise ArgumentError(
            f"features has shape {list(features.shape)} and {features.dtype}; give a floating-point [B, D]"
        )
    if not temperature > 0:
        raise ArgumentError(f"temperature={temperature} is not above 0")
    if impl is not None:
        _dispatch.check_backend(impl, "impl")
    rows, wide = features.shape[0], wide_dtype(features)
    if positives is None:
        if target.shape[:1] != features.shape[:1] or target.dim() != (2 if target.is_floating_point() else 1):
            raise ArgumentError(
                f"target has shape {list(target.shape)} and {target.dtype}; features {list(features.shape)} take class "
                f"indices [{rows}] or floating-point probabilities [{rows}, V]"
            )
        _same_device(target, features)
        return class_indices(target), None
    weights = positives[0]
    if weights.shape != (rows, rows) or weights.dtype != wide:
        raise ArgumentError(
            f"positives has weights of shape {list(weights.shape)} and {weights.dtype}; features "
            f"{list(features.shape)} take [{rows}, {rows}] in {wide}: fastlocal.reference.positive_weights(target, {wide})"
        )
    _same_device(weights, features)
    return None, weights


def _same_device(labels: Tensor, features: Tensor) -> None:
    if labels.device != features.device:
        raise ArgumentError(
            f"target or positives is on {labels.device} and features on {features.device}; move them to one device"
        )


class Signature(NamedTuple):
    """All that the choice of a backend depends on."""

    device: str
    triton: str | None
    dtype: torch.dtype


def _signature(features: Tensor, *_: Any, **__: Any) -> Signature:
    return Signature(*_dispatch.platform(features.device), features.dtype)


def _reject_triton(s: Signature) -> str | None:
    if s.triton is not None:
        return s.triton
    if s.dtype == torch.float64:
        return "float64; the kernel accumulates in float32"
    if s.device == "cpu" and s.dtype == torch.bfloat16:
        return "bfloat16, which the Triton interpreter computes wrongly; give float32"
    return None


_dispatch.register(
    NAME,
    _signature,
    [
        _dispatch.Candidate("triton", _reject_triton),
        _dispatch.Candidate("aten", lambda s: None),
        _dispatch.Candidate("reference", lambda s: None),
    ],
)


def _run(
    features: Tensor,
    labels: Tensor | None,
    weights: Tensor | None,
    temperature: float,
    grad_scale: float,
    needs_grad: bool,
    wide_grad: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    chosen = _dispatch.choose(NAME, _signature(features), impl)
    wide = wide_dtype(features)
    if chosen == "triton":
        from fastlocal.triton_kernels import supervised_contrastive_loss as kernels  # Triton is optional

        dtype = (wide if wide_grad else features.dtype) if needs_grad else None
        loss, found = kernels.launch(features, labels, weights, temperature, grad_scale, dtype)
        return loss, features.new_empty(0) if found is None else found
    if weights is None:
        assert labels is not None
        weights = positive_weights(labels, wide)[0]
    if chosen == "aten":
        loss, grad = _aten(features, weights, temperature, grad_scale, needs_grad)
    else:
        loss, grad = closed_form(features, weights, temperature, grad_scale)
    if not needs_grad:
        return loss, features.new_empty(0)
    return loss, grad if wide_grad else grad.to(features.dtype)


def _fake(
    features: Tensor,
    labels: Tensor | None,
    weights: Tensor | None,
    temperature: float,
    grad_scale: float,
    needs_grad: bool,
    wide_grad: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    wide = wide_dtype(features)
    grad = features.new_empty(features.shape, dtype=wide if wide_grad else features.dtype)
    return features.new_empty((), dtype=wide), grad if needs_grad else features.new_empty(0)


def _without_autocast(*args: Any) -> tuple[Tensor, Tensor]:
    with torch.autocast(args[0].device.type, enabled=False):
        return _operator(*args)


def triton_launches(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Kernels that one call of torch.ops.fastlocal.supervised_contrastive_loss launches where Triton serves it."""
    call = dict(zip((argument.name for argument in _operator._schema.arguments), args)) | kwargs
    return 3 if len(call["features"]) else 1


_library.impl(NAME, _run, "CompositeExplicitAutograd")  # every device: _dispatch looks at where the tensors are
for _key in ("AutocastCPU", "AutocastCUDA"):
    _library.impl(NAME, _without_autocast, _key)
torch.library.register_fake(f"fastlocal::{NAME}", _fake, lib=_library)


def _aten(
    features: Tensor, weights: Tensor, temperature: float, grad_scale: float, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    """The closed form in as few ATen calls as it takes; grad is empty without need."""
    rows = features.shape[0]
    x = features.to(wide_dtype(features)).contiguous()
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    bounded = norm.clamp_min(EPS)
    unit = x / bounded
    # beta=0: the first argument is never read. The diagonal gets the lowest finite number, not -inf: 0 * inf is nan.
    similarity = torch.addmm(x.new_empty(()), unit, unit.t(), beta=0, alpha=1 / temperature)
    log_probs = torch.log_softmax(similarity.fill_diagonal_(torch.finfo(x.dtype).min), 1)
    loss = (weights * log_probs).sum() * (-1 / rows if rows else math.nan)
    if not needs_grad:
        return loss, x.new_empty(0)
    grad = torch.ops.aten._log_softmax_backward_data(weights, log_probs, 1, x.dtype)
    scale = -grad_scale / (max(rows, 1) * temperature)
    grad = torch.addmm(x.new_empty(()), grad + grad.t(), unit, beta=0, alpha=scale)
    radial = (grad * unit).sum(1, keepdim=True)
    radial = torch.ops.aten.threshold_backward(radial, norm, EPS)  # below, the norm is a constant
    return loss, grad.addcmul_(unit, radial, value=-1).div_(bounded)
