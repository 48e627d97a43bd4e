"""Class goodness + softmax cross-entropy as two operators, `torch.ops.fastlocal.class_goodness_cross_entropy` and its
backward.

The map of the auxiliary convolution, [N, K, *spatial], never outlives a call, and where it would be the larger one it never
exists: the goodness of a class is a quadratic form of the Gram matrix of each sample's channels. With the loss come the
small gradients (of weight and bias) and one number for each sample and class, from which the backward makes the gradient
of the features in one pass over them. Nothing is read back to the host. Deterministic on every backend.

Specification: fastlocal/reference/class_goodness_cross_entropy.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod
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
from fastlocal.reference.class_goodness_cross_entropy import closed_form, flat_positions, grad_of, with_margin

NAME = "class_goodness_cross_entropy"

_library = torch.library.Library("fastlocal", "FRAGMENT")
# needs: whether to compute factor [N, K] (from which the backward makes the gradient of x), grad_weight [K, C] and grad_bias
# [K]; the others come back as empty tensors. wide_grads: the last two in the dtype of the arithmetic, not of what they
# belong to, so that multiplying them by a loss scale later rounds once only.
_library.define(
    f"{NAME}(Tensor x, Tensor? weight, Tensor? bias, Tensor target, int num_classes, float scale, float margin, "
    "float label_smoothing, int ignore_index, float grad_scale, bool[3] needs, bool wide_grads, str impl) "
    "-> (Tensor loss, Tensor correct, Tensor factor, Tensor grad_weight, Tensor grad_bias)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# grad_loss: [], or None for one.
_library.define(
    f"{NAME}_backward(Tensor x, Tensor? weight, Tensor? bias, Tensor factor, Tensor? grad_loss, str impl) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_operator = getattr(torch.ops.fastlocal, NAME).default
_backward = getattr(torch.ops.fastlocal, f"{NAME}_backward").default
Result = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def class_goodness_cross_entropy(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    target: Tensor,
    *,
    num_classes: int | None = None,
    scale: float = 1.0,
    margin: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy with `scale` times the goodness of each class as its logit, once differentiable in x, weight and bias.

    With a weight the goodness of class k is the mean over the positions of (weight[k] . x + bias[k])^2: Scalable
    Forward-Forward (Krutsylo, arXiv 2501.03176) with a 1x1 auxiliary convolution. Without one it is the mean of the squares
    of the k-th of `num_classes` equal groups of neighbouring channels: CwComp (Papachristodoulou et al., AAAI 2024).

    Args:
        x: features, [N, C, *spatial] or [N, C], floating point, any strides. Saved for the backward as they are.
        weight: [K, C] or None. float16, bfloat16 and float32 may be mixed with those of x; float64 only with float64.
        bias: [K] or None; None without a weight.
        target: class indices, int64 [N], or probabilities, floating [N, K] (no gradient; without a margin).
        num_classes: K, needed without a weight; it divides C.
        scale: above 0.
        margin: taken off the target's logit.
        label_smoothing: in [0, 1].
        ignore_index: rows with this class index count neither in the loss nor in `correct`.
        impl: a backend for this call; None takes that of `fastlocal.backend`.

    Returns:
        loss [], the mean over the rows that count, in float32 (float64 for float64 input), and correct [], int64, the
        number of these rows whose largest goodness is the target's. With no row that counts the loss is nan and the
        gradients are zero, as in F.cross_entropy.

    Raises:
        ArgumentError: shapes, dtypes or options that do not fit.
        BackendError: `impl` cannot serve the call.
    """
    classes = _check(x, weight, bias, target, num_classes, scale, margin, label_smoothing, ignore_index, impl)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _Function.apply(
            x, weight, bias, target, classes, scale, margin, label_smoothing, ignore_index, impl or "auto"
        )
    options = (classes, scale, margin, label_smoothing, ignore_index)
    return _operator(x, weight, bias, target, *options, 1.0, [False] * 3, True, impl or "auto")[:2]


def class_goodness_cross_entropy_value_and_grad(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    target: Tensor,
    *,
    num_classes: int | None = None,
    scale: float = 1.0,
    margin: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    grad_scale: float = 1.0,
    impl: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The same with its gradients, without autograd.

    Args:
        grad_scale: multiplies the gradients, not the loss; a power of two keeps float16 gradients from underflow.
        The others are those of `class_goodness_cross_entropy`.

    Returns:
        loss [], correct [], and the gradients of x, weight and bias (None without one), each in the shape and dtype of
        what it belongs to.

    Raises:
        As `class_goodness_cross_entropy`.
    """
    classes = _check(x, weight, bias, target, num_classes, scale, margin, label_smoothing, ignore_index, impl)
    needs = [True, weight is not None, bias is not None]
    options = (classes, scale, margin, label_smoothing, ignore_index)
    with torch.no_grad():
        loss, correct, factor, grad_weight, grad_bias = _operator(
            x, weight, bias, target, *options, grad_scale, needs, False, impl or "auto"
        )
        grad_x = _backward(x, weight, bias, factor, None, impl or "auto")
    return loss, correct, grad_x, grad_weight if needs[1] else None, grad_bias if needs[2] else None


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        target: Tensor,
        classes: int,
        scale: float,
        margin: float,
        label_smoothing: float,
        ignore_index: int,
        impl: str,
    ) -> tuple[Tensor, Tensor]:
        needs = list(ctx.needs_input_grad[:3])
        options = (classes, scale, margin, label_smoothing, ignore_index)
        loss, correct, factor, *grads = _operator(x, weight, bias, target, *options, 1.0, needs, True, impl)
        # What only the gradient of x needs is not kept without it.
        ctx.save_for_backward(*((x, weight, bias) if needs[0] else (None,) * 3), factor, *grads)
        ctx.mark_non_differentiable(correct)
        ctx.set_materialize_grads(False)  # no zeros for `correct`
        ctx.dtypes = [None if t is None else t.dtype for t in (weight, bias)]
        ctx.impl = impl
        return loss, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        grad_loss = grad_outputs[0]
        if grad_loss is None:
            return (None,) * 10
        x, weight, bias, factor, *grads = ctx.saved_tensors
        one = is_one(grad_loss)
        needs = ctx.needs_input_grad
        grad_x = _backward(x, weight, bias, factor, None if one else grad_loss, ctx.impl) if needs[0] else None
        wanted = [grad for grad, need in zip(grads, needs[1:3]) if need]
        # Cast after the product: under a loss scale a float16 gradient rounds once, at its final size.
        scaled = iter(wanted if one or not wanted else torch._foreach_mul(wanted, grad_loss))
        small = [next(scaled).to(dtype) if need else None for need, dtype in zip(needs[1:3], ctx.dtypes)]
        return grad_x, *small, *[None] * 7


def _check(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    target: Tensor,
    num_classes: int | None,
    scale: float,
    margin: float,
    label_smoothing: float,
    ignore_index: int,
    impl: str | None,
) -> int:
    """Checks the call and returns the number of classes."""
    if x.dim() < 2 or (x[:1].numel() == 0 and len(x)):
        raise ArgumentError(
            f"x has shape {list(x.shape)}; give [N, C, *spatial] or [N, C] with a channel and a position"
        )
    channels = x.shape[1]
    if weight is None:
        if bias is not None:
            raise ArgumentError("bias without a weight: groups of channels have none; drop it")
        if num_classes is None or num_classes < 1 or channels % num_classes:
            raise ArgumentError(
                f"num_classes={num_classes}: without a weight the {channels} channels of x {list(x.shape)} are divided "
                "into that many equal groups"
            )
        classes = num_classes
    else:
        if weight.dim() != 2 or weight.shape[1] != channels or weight.shape[0] == 0:
            raise ArgumentError(
                f"weight has shape {list(weight.shape)}; x {list(x.shape)} takes [K, {channels}], K >= 1, or None"
            )
        classes = weight.shape[0]
        if num_classes not in (None, classes):
            raise ArgumentError(f"num_classes={num_classes}, but weight {list(weight.shape)} has {classes} classes")
        if bias is not None and tuple(bias.shape) != (classes,):
            raise ArgumentError(
                f"bias has shape {list(bias.shape)}; weight {list(weight.shape)} takes [{classes}] or None"
            )
    check_dtypes(x=x, weight=weight, bias=bias)
    check_target(target, x.shape[0], classes, x.device, label_smoothing, ignore_index)
    if margin and target.is_floating_point():
        raise ArgumentError(f"margin={margin} needs class indices, but target holds probabilities")
    if not scale > 0:
        raise ArgumentError(f"scale={scale} is not above 0")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.device != x.device:
            raise ArgumentError(f"{name} is on {t.device} and x on {x.device}; move them to one device")
    if impl is not None:
        _dispatch.check_backend(impl, "impl")
    return classes


class Signature(NamedTuple):
    """All that the choice of a backend depends on."""

    device: str
    triton: str | None
    dtypes: tuple[torch.dtype, ...]
    classes: int


def _signature(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    target: Tensor,
    *,
    num_classes: int | None = None,
    **_: Any,
) -> Signature:
    device, triton = _dispatch.platform(x.device)
    dtypes = tuple(t.dtype for t in (x, weight, bias, target) if t is not None)
    classes = num_classes if weight is None else weight.shape[0]
    return Signature(device, triton, dtypes, classes or 1)


_dispatch.register(
    NAME,
    _signature,
    [
        _dispatch.Candidate("triton", reject_triton),
        _dispatch.Candidate("aten", lambda s: None),
        _dispatch.Candidate("reference", lambda s: None),
    ],
)


def uses_gram(channels: int, positions: int, classes: int) -> bool:
    """Whether the Gram form takes fewer operations than the map: 4 P C^2 + 4 K C^2 against 8 P K C for each sample, forward
    and backward. It then holds less, too: [C, C + K] numbers for each sample, not [K, P]."""
    return channels * (positions + classes) <= 2 * positions * classes


def _run(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    target: Tensor,
    num_classes: int,
    scale: float,
    margin: float,
    label_smoothing: float,
    ignore_index: int,
    grad_scale: float,
    needs: Sequence[bool],
    wide_grads: bool,
    impl: str,
) -> Result:
    args = (x, weight, bias, target, num_classes, scale, margin, label_smoothing, ignore_index, grad_scale)
    chosen = _dispatch.choose(NAME, _signature(x, weight, bias, target, num_classes=num_classes), impl)
    loss, correct, factor, *grads = (
        closed_form(*args) if chosen == "reference" else _fast(*args, needs, chosen == "triton")
    )
    out = []
    for grad, like, needed in zip(grads, (weight, bias), needs[1:]):
        if needed:
            assert grad is not None and like is not None
            out.append(grad if wide_grads else grad.to(like.dtype))
        else:
            out.append(x.new_empty(0))
    return loss, correct, x.new_empty(0) if factor is None or not needs[0] else factor, out[0], out[1]


def _fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    target: Tensor,
    num_classes: int,
    scale: float,
    margin: float,
    label_smoothing: float,
    ignore_index: int,
    grad_scale: float,
    needs: Sequence[bool],
    wide_grads: bool,
    impl: str,
) -> Result:
    wide = wide_dtype(x)
    out = [
        x.new_empty(like.shape, dtype=wide if wide_grads else like.dtype)
        if needed and like is not None
        else x.new_empty(0)
        for like, needed in zip((weight, bias), needs[1:])
    ]
    factor = x.new_empty((x.shape[0], num_classes), dtype=wide) if needs[0] else x.new_empty(0)
    return x.new_empty((), dtype=wide), x.new_empty((), dtype=torch.int64), factor, out[0], out[1]


def _run_backward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, factor: Tensor, grad_loss: Tensor | None, impl: str
) -> Tensor:
    grad = torch.empty_like(x)
    scaled = factor if grad_loss is None else factor * grad_loss
    signature = _signature(x, weight, bias, factor, num_classes=factor.shape[1])
    if _dispatch.choose(NAME, signature, impl) == "reference":
        return grad.copy_(grad_of(x, weight, bias, scaled))
    if weight is not None:
        return _aten_grad_of(x, weight, bias, scaled, grad)
    groups = (factor.shape[1], -1)
    factors = scaled.view(*factor.shape, *[1] * (x.dim() - 1))
    torch.mul(x.unflatten(1, groups), factors, out=grad.unflatten(1, groups))  # one pass: it casts as it writes
    return grad


def _fake_backward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, factor: Tensor, grad_loss: Tensor | None, impl: str
) -> Tensor:
    return torch.empty_like(x)


def triton_launches(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Kernels that one call of torch.ops.fastlocal.class_goodness_cross_entropy launches where Triton serves it."""
    call = dict(zip((argument.name for argument in _operator._schema.arguments), args)) | kwargs
    x, weight, bias, needs = call["x"], call["weight"], call["bias"], call["needs"]
    launches = _copies(x) + (len(x) > 0) + 1 + (not counts_in_kernel(call["target"]))
    if weight is None:
        return launches
    narrow = [t is not None and t.dtype != torch.float32 for t in (x, weight, bias)]
    gram = uses_gram(x.shape[1], x[0:1, 0:1].numel() if len(x) else 1, call["num_classes"])
    launches += sum(narrow) + ((4 if bias is None else 8) if gram else 3)
    launches += needs[1] * (1 if gram else 3) + needs[2] * (2 if gram else 3)
    return launches + (0 if call["wide_grads"] else sum(need and n for need, n in zip(needs[1:], narrow[1:])))


def triton_backward_launches(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The same of torch.ops.fastlocal.class_goodness_cross_entropy_backward."""
    call = dict(zip((argument.name for argument in _backward._schema.arguments), args)) | kwargs
    x, weight, bias, factor = call["x"], call["weight"], call["bias"], call["factor"]
    launches = call["grad_loss"] is not None
    if weight is None:
        return launches + 1
    launches += _copies(x) + sum(t is not None and t.dtype != torch.float32 for t in (x, weight, bias))
    if uses_gram(x.shape[1], prod(x.shape[2:]), factor.shape[1]):
        launches += 3 + (0 if bias is None else 2)
    else:
        launches += 3
    return launches + (x.dtype != torch.float32 or _copies(torch.empty_like(x, device="meta")))


def _copies(x: Tensor) -> bool:
    """Whether `flat_positions` is no view."""
    inner = [(size, stride) for size, stride in zip(x.shape[2:], x.stride()[2:]) if size != 1]
    return x.numel() > 0 and any(a[1] != b[0] * b[1] for a, b in pairwise(inner))


def _without_autocast(*args: Any) -> Result:
    with torch.autocast(args[0].device.type, enabled=False):
        return _operator(*args)


def _backward_without_autocast(*args: Any) -> Tensor:
    with torch.autocast(args[0].device.type, enabled=False):
        return _backward(*args)


_library.impl(NAME, _run, "CompositeExplicitAutograd")  # every device: _dispatch looks at where the tensors are
_library.impl(f"{NAME}_backward", _run_backward, "CompositeExplicitAutograd")
for _key in ("AutocastCPU", "AutocastCUDA"):
    _library.impl(NAME, _without_autocast, _key)
    _library.impl(f"{NAME}_backward", _backward_without_autocast, _key)
torch.library.register_fake(f"fastlocal::{NAME}", _fake, lib=_library)
torch.library.register_fake(f"fastlocal::{NAME}_backward", _fake_backward, lib=_library)


def _fast(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    target: Tensor,
    num_classes: int,
    scale: float,
    margin: float,
    label_smoothing: float,
    ignore_index: int,
    grad_scale: float,
    needs: Sequence[bool],
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The closed form in few ATen calls; where Triton serves, groups of channels and the cross-entropy by its kernels."""
    wide = wide_dtype(x)
    channels, positions = x.shape[1], x[0:1, 0:1].numel() if len(x) else 1
    terms = positions
    products = mapped = None
    if weight is None:
        terms *= channels // num_classes
        if triton:
            squares = flat_positions(x)  # squared and added up in the kernel
        else:
            groups = x.unflatten(1, (num_classes, -1))
            squares = torch.linalg.vector_norm(groups, dim=tuple(range(2, groups.dim())), dtype=wide).square_()
    else:
        flat, w = flat_positions(x).to(wide), weight.to(wide)
        b = None if bias is None else bias.to(wide)
        if uses_gram(channels, positions, num_classes):
            squares, mapped, products = _by_gram(flat, w, b)
        else:
            grid = _map(flat, w, b)
            squares = torch.linalg.vector_norm(grid, dim=2).square_()
    options = (label_smoothing, ignore_index, grad_scale * 2 * scale / terms, any(needs))
    grad: Tensor | None
    if triton:
        from fastlocal.triton_kernels import class_cross_entropy as kernels  # Triton is optional

        loss, correct, grad, *_ = kernels.launch(
            squares, target, num_classes, scale / terms, margin, *options, counts_in_kernel(target)
        )
    else:
        scores = squares.mul_(scale / terms)
        loss, grad = cross_entropy_and_grad(with_margin(scores, target, margin, ignore_index), target, *options)
        correct = correct_rows(scores, target, ignore_index)
    grad_weight = grad_bias = None
    if weight is not None and grad is not None:
        if needs[1]:
            if products is not None:
                grad_weight = torch.einsum("nk,nck->kc", grad, products)
            else:
                grad_weight = torch.bmm(grid * grad[:, :, None], flat.transpose(1, 2)).sum(0)
        if needs[2]:
            grad_bias = (grad * (grid.sum(2) if mapped is None else mapped)).sum(0)
    return loss, correct, grad, grad_weight, grad_bias


def _map(flat: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """W x + b at every position, [N, K, P]."""
    w = weight.expand(len(flat), -1, -1)
    return torch.bmm(w, flat) if bias is None else torch.baddbmm(bias[:, None], w, flat)


def _by_gram(flat: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """With a = W x + b: the sums over the positions of a^2, [N, K], of a, [N, K] (None without a bias), and of x a^T,
    [N, C, K], without a."""
    rows, channels, positions = flat.shape
    gram = torch.bmm(flat, flat.transpose(1, 2))
    products = torch.mm(gram.view(rows * channels, channels), weight.t()).view(rows, channels, -1)
    if bias is None:
        return (products * weight.t()).sum(1), None, products
    sums = flat.sum(2)
    mapped = torch.addmm(bias, sums, weight.t(), beta=positions)
    products.addcmul_(sums[:, :, None], bias)
    return (products * weight.t()).sum(1).addcmul_(mapped, bias), mapped, products


def _aten_grad_of(x: Tensor, weight: Tensor, bias: Tensor | None, factor: Tensor, grad: Tensor) -> Tensor:
    """Writes W^T diag(factor) (W x + b) to `grad`, which is like x."""
    wide = factor.dtype
    flat, w = flat_positions(x).to(wide), weight.to(wide)
    b = None if bias is None else bias.to(wide)
    rows, channels, positions = flat.shape
    classes = len(w)
    if uses_gram(channels, positions, classes):
        left = torch.mul(w.t(), factor[:, None, :], out=factor.new_empty((rows, channels, classes)))
        left = torch.mm(left.view(rows * channels, classes), w).view(rows, channels, channels)
        right, shift = flat, None if b is None else torch.mm(factor * b, w)[:, :, None]
    else:
        left, right, shift = w.t().expand(rows, -1, -1), _map(flat, w, b).mul_(factor[:, :, None]), None
    direct = grad.dtype == wide and not _copies(grad)
    out = flat_positions(grad) if direct else torch.empty_like(flat)
    if shift is None:
        torch.bmm(left, right, out=out)
    else:
        torch.baddbmm(shift, left, right, out=out)
    return grad if direct else grad.copy_(out.view(grad.shape))
