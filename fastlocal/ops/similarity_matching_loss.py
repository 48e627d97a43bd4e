"""The similarity matching loss as one operator, `torch.ops.fastlocal.similarity_matching_loss`.

The gradient is taken with the loss. Of a feature map or of tokens it is the centred positions times one factor per
channel; the autograd form keeps the two apart and multiplies in its backward, the value-and-grad form multiplies at
once. No [B, B] matrix outlives the call; "triton" makes none at all. Nothing is read back to the host. Deterministic on
every backend.

Specification: fastlocal/reference/similarity_matching_loss.py.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastlocal.errors import ArgumentError
from fastlocal.ops import _dispatch
from fastlocal.ops._seed import is_one
from fastlocal.reference._precision import wide_dtype
from fastlocal.reference.similarity_matching_loss import (
    EPS,
    class_similarity,
    closed_form,
    deviation_dim,
    similarity_matrix,
    target_similarity,
)

__all__ = [
    "similarity_matching_loss",
    "similarity_matching_loss_value_and_grad",
    "similarity_matrix",
    "target_similarity",
]

NAME = "similarity_matching_loss"

_library = torch.library.Library("fastlocal", "FRAGMENT")
# Either target, indices [B] or probabilities [B, V], or matched [B, B].
# form: "value" (both other results empty), "grad" (of the features, in their dtype; centred empty) or "parts": grad is the
# factor of `centred` in the dtype of the arithmetic, or the whole gradient where the features have no positions.
_library.define(
    f"{NAME}(Tensor features, Tensor? target, Tensor? matched, int num_classes, float grad_scale, str form, str impl) "
    "-> (Tensor loss, Tensor grad, Tensor centred)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_operator = getattr(torch.ops.fastlocal, NAME).default
# Numbers that a sample is compared by, at most, with Triton; and of a sample of a map whose deviations and unit vector are
# one launch.
WIDEST, ONE_LAUNCH = 4096, 32768
Result = tuple[Tensor, Tensor, Tensor]


def similarity_matching_loss(
    features: Tensor,
    target: Tensor,
    num_classes: int,
    matched: Tensor | None = None,
    *,
    grad_scale: float = 1.0,
    impl: str | None = None,
) -> Tensor:
    """Mean squared difference of the features' similarity matrix from the targets' (Nøkland and Eidnes, arXiv
    1901.06656, "sim"), once differentiable in the features.

    Args:
        features: [B, C, H, W], [B, T, D] or [B, D], floating point, any strides.
        target: class indices, integers [B] from 0 to num_classes - 1 (not checked: that would read them back), or
            probabilities, floating [B, V].
        num_classes: of the indices; not looked at with probabilities or `matched`.
        matched: `fastlocal.reference.target_similarity(target, num_classes, dtype)`, when it is known already: a symmetric
            [B, B] in the dtype of the result. `target` is then not looked at. "triton" needs no such matrix, and reads it
            where it is given.
        grad_scale: multiplies the gradient, not the loss: the weight of this loss in a sum, without a launch of its own.
        impl: a backend for this call; None takes that of `fastlocal.backend`.

    Returns:
        The mean over the pairs, [], in float32 (float64 for float64 features); nan for an empty batch.

    Raises:
        ArgumentError: shapes, dtypes or a number of classes that do not fit.
        BackendError: `impl` cannot serve the call.
    """
    labels = _prepare(features, target, num_classes, matched, impl)
    if torch.is_grad_enabled() and features.requires_grad:
        return _Function.apply(features, labels, matched, num_classes, grad_scale, impl or "auto")
    return _operator(features, labels, matched, num_classes, 1.0, "value", impl or "auto")[0]


def similarity_matching_loss_value_and_grad(
    features: Tensor,
    target: Tensor,
    num_classes: int,
    matched: Tensor | None = None,
    *,
    grad_scale: float = 1.0,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The same with its gradient, without autograd.

    Args:
        grad_scale: multiplies the gradient, not the loss; a power of two keeps float16 gradients from underflow.
        The others are those of `similarity_matching_loss`.

    Returns:
        loss [], and the gradient of the features in their shape and dtype.

    Raises:
        As `similarity_matching_loss`.
    """
    labels = _prepare(features, target, num_classes, matched, impl)
    with torch.no_grad():
        return _operator(features, labels, matched, num_classes, grad_scale, "grad", impl or "auto")[:2]


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        target: Tensor | None,
        matched: Tensor | None,
        num_classes: int,
        grad_scale: float,
        impl: str,
    ) -> Tensor:
        loss, grad, centred = _operator(features, target, matched, num_classes, grad_scale, "parts", impl)
        ctx.save_for_backward(grad, centred)
        ctx.shape, ctx.dtype = features.shape, features.dtype
        ctx.whole = deviation_dim(features) is None
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        grad, centred = ctx.saved_tensors
        if not is_one(grads[0]):
            grad = grad * grads[0]
        if not ctx.whole:  # one pass: it casts as it writes
            grad = torch.mul(centred, grad, out=torch.empty_like(centred))
        return grad.to(ctx.dtype).reshape(ctx.shape), *[None] * 5


def _prepare(
    features: Tensor, target: Tensor, num_classes: int, matched: Tensor | None, impl: str | None
) -> Tensor | None:
    """Checks the call and returns the target, or None where `matched` stands for it."""
    if features.dim() not in (2, 3, 4) or not features.is_floating_point():
        raise ArgumentError(
            f"features has shape {list(features.shape)} and {features.dtype}; give a floating-point [B, C, H, W], "
            "[B, T, D] or [B, D]"
        )
    if features[:1].numel() == 0 and len(features):
        raise ArgumentError(f"features has shape {list(features.shape)}: a sample is empty; give at least one number")
    if impl is not None:
        _dispatch.check_backend(impl, "impl")
    rows, wide = features.shape[0], wide_dtype(features)
    if matched is None:
        if target.shape[:1] != features.shape[:1] or target.dim() != (2 if target.is_floating_point() else 1):
            raise ArgumentError(
                f"target has shape {list(target.shape)} and {target.dtype}; features {list(features.shape)} take class "
                f"indices [{rows}] or floating-point probabilities [{rows}, V]"
            )
        if num_classes < 1 and not target.is_floating_point():
            raise ArgumentError(f"num_classes={num_classes}; give the number of classes of the target, at least 1")
        _same_device(target, features)
        return target
    if matched.shape != (rows, rows) or matched.dtype != wide:
        raise ArgumentError(
            f"matched has shape {list(matched.shape)} and {matched.dtype}; features {list(features.shape)} take "
            f"[{rows}, {rows}] in {wide}: fastlocal.reference.target_similarity(target, num_classes, {wide})"
        )
    _same_device(matched, features)
    return None


def _same_device(target: Tensor, features: Tensor) -> None:
    if target.device != features.device:
        raise ArgumentError(
            f"target or matched is on {target.device} and features on {features.device}; move them to one device"
        )


class Signature(NamedTuple):
    """All that the choice of a backend depends on."""

    device: str
    triton: str | None
    dtype: torch.dtype
    width: int  # numbers that a sample is compared by


def _signature(features: Tensor, *_: Any, **__: Any) -> Signature:
    return Signature(*_dispatch.platform(features.device), features.dtype, _width(features))


def _width(features: Tensor) -> int:
    dim = deviation_dim(features)
    return math.prod(features.shape[1:]) if dim is None else features.shape[3 - dim]


def _one_launch(features: Tensor) -> bool:
    return math.prod(features.shape[1:]) <= ONE_LAUNCH


def _reject_triton(s: Signature) -> str | None:
    if s.triton is not None:
        return s.triton
    if s.dtype == torch.float64:
        return "float64; the kernel accumulates in float32"
    if s.width > WIDEST:
        return (
            f"samples of {s.width} numbers; beyond {WIDEST} the kernel, which keeps no matrix of all pairs, computes too "
            "much of it anew"
        )
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
    target: Tensor | None,
    matched: Tensor | None,
    num_classes: int,
    grad_scale: float,
    form: str,
    impl: str,
) -> Result:
    chosen = _dispatch.choose(NAME, _signature(features), impl)
    if chosen == "triton":
        return _triton(features, target, matched, num_classes, grad_scale, form)
    wide = wide_dtype(features)
    if matched is None:
        assert target is not None
        matched = (_matched if chosen == "aten" else target_similarity)(target, num_classes, wide)
    if chosen == "aten":
        loss, grad, centred = _aten(features, matched, grad_scale, form != "value")
    else:
        loss, grad, centred = closed_form(features, matched, grad_scale)
    none = features.new_empty(0)
    if form == "value":
        return loss, none, features.new_empty(0)
    assert grad is not None
    if form == "grad":
        grad = grad if centred is None else centred.mul_(grad)
        return loss, grad.to(features.dtype).reshape(features.shape), none
    return loss, grad, none if centred is None else centred.to(features.dtype)


def _triton(
    features: Tensor, target: Tensor | None, matched: Tensor | None, num_classes: int, grad_scale: float, form: str
) -> Result:
    from fastlocal.triton_kernels import similarity_matching_loss as kernels  # Triton is optional

    dim = deviation_dim(features)
    x = _flat(features, dim)  # copies only where no one stride fits
    loss, grad, centred = _results(features, x, dim, form)
    same, different = class_similarity(num_classes) if matched is None and num_classes > 0 else (1.0, 0.0)
    kernels.launch(
        _channels_first(x, dim),
        target,
        matched,
        (same, different),
        grad_scale,
        _one_launch(features),
        loss,
        None if form == "value" else grad.flatten(1) if form == "parts" else _channels_first(_flat(grad, dim), dim),
        _channels_first(centred, dim) if form == "parts" and dim is not None else None,
    )
    return loss, grad, centred


def _flat(x: Tensor, dim: int | None) -> Tensor:
    """[B, N], or with one dimension for the positions."""
    return x.flatten(1 if dim is None else 2)


def _channels_first(x: Tensor, dim: int | None) -> Tensor:
    """A view [B, C, S] of a map or of tokens, else x itself."""
    return x.transpose(1, 2) if dim == 1 else x


def _results(features: Tensor, x: Tensor, dim: int | None, form: str) -> Result:
    """The three results, not filled; `x` is the features without spatial dimensions."""
    wide = wide_dtype(features)
    loss, none = features.new_empty((), dtype=wide), features.new_empty(0)
    if form == "value":
        return loss, none, features.new_empty(0)
    if form == "grad":
        return loss, torch.empty_like(x).reshape(features.shape), none
    if dim is None:
        return loss, torch.empty_like(x, dtype=wide), none
    factor = [1 if d == dim else size for d, size in enumerate(x.shape)]
    return loss, features.new_empty(factor, dtype=wide), torch.empty_like(x)


def _fake(
    features: Tensor,
    target: Tensor | None,
    matched: Tensor | None,
    num_classes: int,
    grad_scale: float,
    form: str,
    impl: str,
) -> Result:
    dim = deviation_dim(features)
    return _results(features, _flat(features, dim), dim, form)


def _without_autocast(*args: Any) -> Result:
    with torch.autocast(args[0].device.type, enabled=False):
        return _operator(*args)


def launches(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Kernels that one call of torch.ops.fastlocal.similarity_matching_loss launches on an accelerator: Triton's, or ATen's
    where Triton does not serve."""
    call = dict(zip((argument.name for argument in _operator._schema.arguments), args)) | kwargs
    features = call["features"]
    dim = deviation_dim(features)
    if _reject_triton(Signature("cuda", None, features.dtype, _width(features))) is not None:
        return _aten_launches(features, call["target"] if call["matched"] is None else None, dim, call["form"])
    copies = _copies(features, dim)
    if not len(features):
        return 1 + copies
    return 3 + copies + (dim is not None and not _one_launch(features))


def _copies(features: Tensor, dim: int | None) -> bool:
    """Whether no one stride leads through the positions, or through all numbers of a sample."""
    kept = features.shape[: 1 if dim is None else 2]
    try:
        features.view(*kept, math.prod(features.shape[len(kept) :]))
    except RuntimeError:
        return features.numel() > 0
    return False


def _aten_launches(features: Tensor, target: Tensor | None, dim: int | None, form: str) -> int:
    wide = wide_dtype(features)
    whole, narrow = dim is None, features.dtype != wide
    count = 8 + narrow + 3 * (not whole)  # the loss
    if target is not None:  # the targets' similarity
        count += 7 + (target.dtype != wide if target.is_floating_point() else 3)
    if form != "value":
        count += 11 + 3 * (not whole) + (form == "grad" and not whole)
        count += narrow and (form == "grad" or not whole)  # back into the dtype of the features
    return count


_library.impl(NAME, _run, "CompositeExplicitAutograd")  # every device: _dispatch looks at where the tensors are
for _key in ("AutocastCPU", "AutocastCUDA"):
    _library.impl(NAME, _without_autocast, _key)
torch.library.register_fake(f"fastlocal::{NAME}", _fake, lib=_library)


def _matched(target: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """`target_similarity` without a look at the indices, which `one_hot` takes on a CPU."""
    if not target.is_floating_point():
        target = (target.unsqueeze(1) == torch.arange(num_classes, device=target.device)).to(dtype)
    return target_similarity(target, num_classes, dtype)


def _aten(
    features: Tensor, matched: Tensor, grad_scale: float, needs_grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The closed form in as few ATen calls as it takes: loss, gradient or factor, centred positions."""
    x, dim = features.to(wide_dtype(features)), deviation_dim(features)
    if dim is None:
        z, centred = x.flatten(1), None
    else:
        z, centred = (_deviation_on_the_cpu if x.device.type == "cpu" else _deviation)(x.flatten(2), dim)
    flat = z.flatten(1)
    c = (flat - flat.mean(1, keepdim=True)).to(x.dtype)
    norm = torch.linalg.vector_norm(c, dim=1, keepdim=True)
    shifted = norm + EPS
    unit = c.div_(shifted)
    similarity = torch.mm(unit, unit.t()).clamp_(-1, 1)
    loss = F.mse_loss(similarity, matched)
    if not needs_grad:
        return loss, None, None
    rows = max(x.shape[0], 1)
    # `matched` is symmetric, so both factors of the product get the same gradient. beta=0: the first argument is not read.
    difference = similarity.sub_(matched)
    grad = torch.addmm(x.new_empty(()), difference, unit, beta=0, alpha=4 * grad_scale / rows**2)
    # The norm of a row of equal numbers is 0, and so is its unit vector: any divisor but 0 will do.
    radial = (grad * unit).sum(1, keepdim=True).mul_(shifted).div_(norm.clamp_min_(torch.finfo(x.dtype).tiny))
    grad = grad.addcmul_(unit, radial, value=-1).div_(shifted)
    grad.sub_(grad.mean(1, keepdim=True))  # zero but for rounding
    if centred is None or dim is None:
        return loss, grad, None
    z = z.to(x.dtype)
    factor = grad.view(z.shape).div_(z * (centred.shape[dim] - 1))
    return loss, torch.ops.aten.threshold_backward(factor, z, 0), centred  # no gradient where all positions are equal


def _deviation(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Standard deviation along `dim`, which is kept with size 1, and `x` without its mean."""
    variance, mean = torch.var_mean(x, dim, keepdim=True)
    return variance.sqrt_(), x - mean


def _deviation_on_the_cpu(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The same; the deviation in float64, which spares it a rounding before the channels' mean is taken from it.

    The CPU's var takes one number after the other, fifteen times as long as these passes.
    """
    centred = x - x.mean(dim, keepdim=True)
    return centred.square().sum(dim, keepdim=True).double().div_(x.shape[dim] - 1).sqrt_(), centred
