"""Linear layer on L2-normalised features + softmax cross-entropy as one operator,
`torch.ops.fastlocal.norm_linear_cross_entropy`.

The loss is a scalar, so its gradients are taken with it: [N, D] and [K, D] are all that is kept for the backward, and
neither the unit vectors nor the logits outlive the call. Nothing is read back to the host. Deterministic on every backend.

Specification: fastlocal/reference/norm_linear_cross_entropy.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastlocal.errors import ArgumentError
from fastlocal.ops import _dispatch
from fastlocal.ops._cross_entropy import (
    check_dtypes,
    check_target,
    correct_rows,
    counts_in_kernel,
    cross_entropy_and_grad,
    reject_triton,
)
from fastlocal.ops._seed import is_one
from fastlocal.reference._precision import wide_dtype
from fastlocal.reference.norm_linear_cross_entropy import BASES, EPS, closed_form, matrix

NAME = "norm_linear_cross_entropy"

_library = torch.library.Library("fastlocal", "FRAGMENT")
# needs: which of grad_x [N, D] and grad_weight [K, D] to compute; the others come back as empty tensors. wide_grads:
# gradients in the dtype of the arithmetic, not of what they belong to, so that multiplying them by a loss scale later
# rounds once only.
_library.define(
    f"{NAME}(Tensor x, Tensor weight, Tensor target, str basis, float scale, bool normalize_weight, "
    "float label_smoothing, int ignore_index, float grad_scale, bool[2] needs, bool wide_grads, str impl) "
    "-> (Tensor loss, Tensor correct, Tensor grad_x, Tensor grad_weight)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_operator = getattr(torch.ops.fastlocal, NAME).default
Result = tuple[Tensor, Tensor, Tensor, Tensor]


def norm_linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    basis: str = "weight",
    scale: float = 1.0,
    normalize_weight: bool = False,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of `scale` times a linear layer on L2-normalised features, once differentiable in x and weight.

    A cosine head with `normalize_weight`; the head of LLS (Apolinario et al., arXiv 2405.15868; 1 / temperature is the
    scale) with the fixed basis sin(f_k i). Pool before. The learned mixtures of LLS, M and MxM, are weights: m[:, None] *
    basis and G.T @ basis, to which the gradient of the weight flows on.

    Args:
        x: features, [N, ...], taken as [N, D]; floating point, any strides.
        weight: [K, D]; or for another basis the frequencies, [K] (`fastlocal.reference.frequencies`), without a gradient.
            float16, bfloat16 and float32 may be mixed; float64 features take a float64 weight, frequencies are float32.
        target: class indices, int64 [N], or probabilities, floating [N, K] (no gradient).
        basis: "weight", or "sine" or "square" (its sign), made from the frequencies.
        scale: multiplies the logits, above 0.
        normalize_weight: whether the rows of the weight, too, are L2-normalised.
        label_smoothing: in [0, 1].
        ignore_index: rows with this class index count neither in the loss nor in `correct`.
        impl: a backend for this call; None takes that of `fastlocal.backend`.

    Returns:
        loss [], the mean over the rows that count, in float32 (float64 for float64 input), and correct [], int64, the
        number of these rows whose largest logit is the target's. With no row that counts the loss is nan and the
        gradients are zero, as in F.cross_entropy.

    Raises:
        ArgumentError: shapes, dtypes or options that do not fit.
        BackendError: `impl` cannot serve the call.
    """
    _check(x, weight, target, basis, scale, label_smoothing, ignore_index, impl)
    options = (basis, scale, normalize_weight, label_smoothing, ignore_index)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Function.apply(x, weight, target, *options, impl or "auto")
    return _operator(x, weight, target, *options, 1.0, [False] * 2, True, impl or "auto")[:2]


def norm_linear_cross_entropy_value_and_grad(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    basis: str = "weight",
    scale: float = 1.0,
    normalize_weight: bool = False,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    grad_scale: float = 1.0,
    impl: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The same with its gradients, without autograd.

    Args:
        grad_scale: multiplies the gradients, not the loss; a power of two keeps float16 gradients from underflow.
        The others are those of `norm_linear_cross_entropy`.

    Returns:
        loss [], correct [], the gradient of x in its shape and dtype, and of the weight in its dtype (None for
        frequencies).

    Raises:
        As `norm_linear_cross_entropy`.
    """
    _check(x, weight, target, basis, scale, label_smoothing, ignore_index, impl)
    needs = [True, basis == "weight"]
    options = (basis, scale, normalize_weight, label_smoothing, ignore_index)
    with torch.no_grad():
        loss, correct, grad_x, grad_weight = _operator(
            x, weight, target, *options, grad_scale, needs, False, impl or "auto"
        )
        return loss, correct, grad_x.view(x.shape), grad_weight if needs[1] else None


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        target: Tensor,
        basis: str,
        scale: float,
        normalize_weight: bool,
        label_smoothing: float,
        ignore_index: int,
        impl: str,
    ) -> tuple[Tensor, Tensor]:
        needs = list(ctx.needs_input_grad[:2])
        options = (basis, scale, normalize_weight, label_smoothing, ignore_index)
        loss, correct, *grads = _operator(x, weight, target, *options, 1.0, needs, True, impl)
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(correct)
        ctx.set_materialize_grads(False)  # no zeros for `correct`
        ctx.shape, ctx.dtypes = x.shape, (x.dtype, weight.dtype)
        return loss, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        grad_loss = grad_outputs[0]
        if grad_loss is None:
            return (None,) * 9
        needs = ctx.needs_input_grad[:2]
        wanted = [grad for grad, need in zip(ctx.saved_tensors, needs) if need]
        # Cast after the product: under a loss scale a float16 gradient rounds once, at its final size.
        scaled = iter(wanted if is_one(grad_loss) else torch._foreach_mul(wanted, grad_loss))
        grads = [next(scaled).to(dtype) if need else None for need, dtype in zip(needs, ctx.dtypes)]
        if grads[0] is not None:
            grads[0] = grads[0].view(ctx.shape)
        return *grads, *[None] * 7


def _check(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    basis: str,
    scale: float,
    label_smoothing: float,
    ignore_index: int,
    impl: str | None,
) -> None:
    if x.dim() < 2 or (x[:1].numel() == 0 and len(x)):
        raise ArgumentError(f"x has shape {list(x.shape)}; give [N, ...] with at least one feature")
    if basis not in BASES:
        raise ArgumentError(f"basis={basis!r} is not one of {', '.join(map(repr, BASES))}")
    features = 1
    for size in x.shape[1:]:
        features *= size
    if basis == "weight":
        if weight.dim() != 2 or weight.shape[1] != features or weight.shape[0] == 0:
            raise ArgumentError(
                f"weight has shape {list(weight.shape)}; x {list(x.shape)} takes [K, {features}], K >= 1"
            )
        check_dtypes(x=x, weight=weight)
    else:
        if weight.dim() != 1 or weight.shape[0] == 0 or weight.dtype != torch.float32:
            raise ArgumentError(
                f"weight has shape {list(weight.shape)} and {weight.dtype}; basis={basis!r} takes float32 frequencies "
                "[K], K >= 1: fastlocal.reference.frequencies(K)"
            )
        if weight.requires_grad and torch.is_grad_enabled():
            raise ArgumentError("weight holds frequencies and requires grad; there is none, detach it")
        check_dtypes(x=x)
    check_target(target, x.shape[0], weight.shape[0], x.device, label_smoothing, ignore_index)
    if not scale > 0:
        raise ArgumentError(f"scale={scale} is not above 0")
    if weight.device != x.device:
        raise ArgumentError(f"weight is on {weight.device} and x on {x.device}; move them to one device")
    if impl is not None:
        _dispatch.check_backend(impl, "impl")


class Signature(NamedTuple):
    """All that the choice of a backend depends on."""

    device: str
    triton: str | None
    dtypes: tuple[torch.dtype, ...]
    classes: int


def _signature(x: Tensor, weight: Tensor, target: Tensor, **_: Any) -> Signature:
    device, triton = _dispatch.platform(x.device)
    return Signature(device, triton, (x.dtype, weight.dtype, target.dtype), weight.shape[0])


_dispatch.register(
    NAME,
    _signature,
    [
        _dispatch.Candidate("triton", reject_triton),
        _dispatch.Candidate("aten", lambda s: None),
        _dispatch.Candidate("reference", lambda s: None),
    ],
)


def _run(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    basis: str,
    scale: float,
    normalize_weight: bool,
    label_smoothing: float,
    ignore_index: int,
    grad_scale: float,
    needs: Sequence[bool],
    wide_grads: bool,
    impl: str,
) -> Result:
    args = (x, weight, target, basis, scale, normalize_weight, label_smoothing, ignore_index, grad_scale)
    chosen = _dispatch.choose(NAME, _signature(x, weight, target), impl)
    loss: Tensor
    if chosen == "triton":
        loss, correct, *grads = _triton(*args, needs)
    elif chosen == "aten":
        loss, correct, *grads = _aten(*args, needs)
    else:
        loss, correct, *grads = closed_form(*args)
    out = [
        (grad if wide_grads else grad.to(like.dtype)) if needed and grad is not None else x.new_empty(0)
        for grad, like, needed in zip(grads, (x, weight), needs)
    ]
    return loss, correct, out[0], out[1]


def _fake(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    basis: str,
    scale: float,
    normalize_weight: bool,
    label_smoothing: float,
    ignore_index: int,
    grad_scale: float,
    needs: Sequence[bool],
    wide_grads: bool,
    impl: str,
) -> Result:
    wide = wide_dtype(x)
    features = x.flatten(1).shape[1]
    out = [
        x.new_empty((rows, features), dtype=wide if wide_grads else like.dtype) if needed else x.new_empty(0)
        for rows, like, needed in zip((x.shape[0], weight.shape[0]), (x, weight), needs)
    ]
    return x.new_empty((), dtype=wide), x.new_empty((), dtype=torch.int64), out[0], out[1]


def triton_launches(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Kernels that one call of torch.ops.fastlocal.norm_linear_cross_entropy launches where Triton serves it."""
    call = dict(zip((argument.name for argument in _operator._schema.arguments), args)) | kwargs
    x, weight, basis, needs = call["x"], call["weight"], call["basis"], call["needs"]
    normalize = call["normalize_weight"]
    narrow = [t.dtype != torch.float32 for t in (x, weight)]
    made = {"weight": narrow[1], "sine": 3, "square": 4}[basis]  # the matrix
    launches = _copies(x) + narrow[0] + made + (len(x) > 0) + normalize + 1  # lengths, product
    launches += (len(x) > 0) + 1 + (not counts_in_kernel(call["target"]))
    launches += 2 * needs[0] + needs[1] * (1 + normalize)
    return launches + (0 if call["wide_grads"] else sum(need and n for need, n in zip(needs, narrow)))


def _copies(x: Tensor) -> bool:
    """Whether flattening a row takes a copy."""
    inner = [(size, stride) for size, stride in zip(x.shape[1:], x.stride()[1:]) if size != 1]
    return x.numel() > 0 and any(a[1] != b[0] * b[1] for a, b in pairwise(inner))


def _without_autocast(*args: Any) -> Result:
    with torch.autocast(args[0].device.type, enabled=False):
        return _operator(*args)


_library.impl(NAME, _run, "CompositeExplicitAutograd")  # every device: _dispatch looks at where the tensors are
for _key in ("AutocastCPU", "AutocastCUDA"):
    _library.impl(NAME, _without_autocast, _key)
torch.library.register_fake(f"fastlocal::{NAME}", _fake, lib=_library)


def _triton(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    basis: str,
    scale: float,
    normalize_weight: bool,
    label_smoothing: float,
    ignore_index: int,
    grad_scale: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The form of `_aten` with lengths and cross-entropy by kernels, which apply the lengths to the small matrices."""
    from fastlocal.triton_kernels import class_cross_entropy as kernels  # Triton is optional

    flat = x.flatten(1).to(torch.float32)
    w = matrix(weight, basis, flat.shape[1], torch.float32)
    loss, correct, grad, along, w_along = kernels.launch(
        torch.mm(flat, w.t()),
        target,
        len(w),
        scale,
        0.0,
        label_smoothing,
        ignore_index,
        grad_scale * scale,
        any(needs),
        counts_in_kernel(target),
        kernels.lengths(flat),
        kernels.lengths(w) if normalize_weight else None,
        normalize_weight and needs[1],
        EPS,
    )
    grad_x = grad_w = None
    if needs[0]:
        assert grad is not None and along is not None
        grad_x = torch.mm(grad, w).addcmul_(flat, along[:, None], value=-1)
    if needs[1]:
        assert grad is not None
        grad_w = torch.mm(grad.t(), flat)
        if w_along is not None:
            grad_w.addcmul_(w, w_along[:, None], value=-1)
    return loss, correct, grad_x, grad_w


def _aten(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    basis: str,
    scale: float,
    normalize_weight: bool,
    label_smoothing: float,
    ignore_index: int,
    grad_scale: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The closed form in few ATen calls: lengths divide the small matrix of cosines, not the features.

    With G the gradient of the logits over both lengths, E the gradient times the cosines: the gradient of x is
    G W - x (sum of E over its row) / |x|^2, and that of W is G^T x - W (sum of E over its column) / |W|^2.
    """
    wide = wide_dtype(x)
    flat = x.flatten(1).to(wide)
    w = matrix(weight, basis, flat.shape[1], wide)
    length = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    bounded = length.clamp_min(EPS)
    cosines = torch.mm(flat, w.t()).div_(bounded)
    w_length = w_bounded = None
    if normalize_weight:
        w_length = torch.linalg.vector_norm(w, dim=1)
        w_bounded = w_length.clamp_min(EPS)
        cosines.div_(w_bounded)
    logits = cosines if scale == 1 else cosines * scale
    loss, grad = cross_entropy_and_grad(logits, target, label_smoothing, ignore_index, grad_scale * scale, any(needs))
    correct = correct_rows(logits, target, ignore_index)
    if not any(needs):
        return loss, correct, None, None
    radial = cosines.mul_(grad)
    grad_x = grad_w = None
    if w_bounded is not None:
        grad = grad.div_(w_bounded)
    grad.div_(bounded)
    if needs[0]:
        along = _along(radial.sum(1, keepdim=True), length, bounded)
        grad_x = torch.mm(grad, w).addcmul_(flat, along, value=-1)
    if needs[1]:
        grad_w = torch.mm(grad.t(), flat)
        if w_length is not None and w_bounded is not None:
            along = _along(radial.sum(0), w_length, w_bounded)
            grad_w.addcmul_(w, along[:, None], value=-1)
    return loss, correct, grad_x, grad_w


def _along(radial: Tensor, length: Tensor, bounded: Tensor) -> Tensor:
    """`radial` over the length squared; 0 at and below EPS, where the length is a constant."""
    return torch.ops.aten.threshold_backward(radial.div_(bounded).div_(bounded), length, EPS)
