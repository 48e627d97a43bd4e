"""Pool + linear + softmax cross-entropy as one operator, `torch.ops.fastlocal.pool_linear_cross_entropy`.

The loss is a scalar, so its gradients are taken with it: they are small ([N, C], [K, C] and [K]), and neither the
logits nor an expanded gradient of the pool outlive the call. The autograd form multiplies them by the incoming
gradient, the value-and-grad form returns them. No implementation reads a value back to the host.

Deterministic on every backend. Specification: fastlocal/reference/pool_linear_cross_entropy.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastlocal.errors import ArgumentError
from fastlocal.ops import _dispatch
from fastlocal.ops._seed import is_one
from fastlocal.ops.bn_act import bn_act
from fastlocal.reference.pool_linear_cross_entropy import (
    POOLS,
    closed_form,
    expand_gradient,
    norm_input,
    pooled_dims,
    positions,
    wide_dtype,
)

NAME = "pool_linear_cross_entropy"
MAX_CLASSES = 1024  # a row of logits lives in registers; of more classes, a chunk at a time is in memory
CHUNK_ELEMENTS = 1 << 22  # of logits: 16 MB
FUSED_WEIGHT = 1 << 16  # up to so many elements each Triton program reads the whole weight; beyond, cuBLAS does
COUNT_ROWS = 4096  # up to so many rows each Triton program adds up itself what the loss is divided by

_library = torch.library.Library("fastlocal", "FRAGMENT")
# needs: which of grad_pooled [N, C] (of one position of x), grad_weight [K, C] and grad_bias [K] to compute; the others
# come back as empty tensors. wide_grads: gradients in the dtype of the arithmetic, not of what they belong to, so that
# multiplying them by a loss scale later rounds once only.
_library.define(
    f"{NAME}(Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight, str pool, float label_smoothing, "
    "int ignore_index, float grad_scale, bool[3] needs, bool wide_grads, str impl) "
    "-> (Tensor loss, Tensor correct, Tensor grad_pooled, Tensor grad_weight, Tensor grad_bias)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_operator = getattr(torch.ops.fastlocal, NAME).default
Result = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def pool_linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    pool: str = "mean",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    class_weight: Tensor | None = None,
    norm: nn.Module | None = None,
    dense_grad: bool = False,
    grad_scale: float = 1.0,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of a linear layer on pooled features, once differentiable in x, weight and bias.

    Args:
        x: features, [N, C, *spatial] for pool="mean", [N, T, C] for "tokens" (their mean) and "cls" (the first),
            [N, C] for "none"; any strides.
        weight: [K, C]. float16, bfloat16 and float32 may be mixed with those of x; float64 only with float64.
        bias: [K] or None.
        target: class indices, int64 [N], or probabilities, floating [N, K] (no gradient).
        label_smoothing: in [0, 1].
        ignore_index: rows with this class index count neither in the loss nor in `correct`.
        class_weight: [K] or None, as `weight` of F.cross_entropy, any of the dtypes that fit (no gradient).
        norm: a BatchNorm1d between pool and linear, in training (its statistics updated as by calling it) or not. By
            `bn_act`, which calls what it cannot fuse: any module [N, C] -> [N, C] will do, and has its own gradients.
        dense_grad: give the gradient of a mean as a tensor in the layout of x, where whoever reads it would copy a view.
        grad_scale: multiplies the gradients, not the loss: the weight of this loss in a sum, without a launch of its own.
        impl: a backend for this call; None takes that of `fastlocal.backend`.

    Returns:
        loss [], the mean over the rows that count (with class indices weighted by their class_weight), in float32
        (float64 for float64 input), and correct [], int64, the number of these rows whose largest logit is the
        target's. The gradient of x is a stride-0 view of a mean, zeros behind the first token for "cls".
        With no row that counts the loss is nan and the gradients are zero, as in F.cross_entropy. A class index out
        of range raises IndexError on the CPU; on a GPU the loss becomes nan or a device-side assert fires.

    Raises:
        ArgumentError: shapes, dtypes or options that do not fit.
        BackendError: `impl` cannot serve the call.
    """
    _check(x, weight, bias, target, class_weight, pool, label_smoothing, ignore_index, impl)
    if norm is not None:
        x, pool, dense_grad = _normed(_pooled(x, pool, dense_grad), norm, impl), "none", False
    options = (pool, label_smoothing, ignore_index)
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _Function.apply(x, weight, bias, target, class_weight, *options, grad_scale, dense_grad, impl or "auto")
    return _operator(x, weight, bias, target, class_weight, *options, 1.0, [False] * 3, True, impl or "auto")[:2]


def pool_linear_cross_entropy_value_and_grad(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    pool: str = "mean",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    class_weight: Tensor | None = None,
    norm: nn.Module | None = None,
    dense_grad: bool = False,
    grad_scale: float = 1.0,
    impl: str | None = None,
) -> tuple[Tensor | None, ...]:
    """The same with its gradients, without autograd.

    Args:
        grad_scale: multiplies the gradients, not the loss; a power of two keeps float16 gradients from underflow.
        The others are those of `pool_linear_cross_entropy`.

    Returns:
        loss [], correct [], grad_x (x.shape and x.dtype; of a mean a stride-0 view unless `dense_grad`: do not write
        to it), grad_weight [K, C] and grad_bias [K] (None without a bias), each in the dtype of its parameter. With a
        norm also the gradients of those of its parameters that require one, in the order of `norm.parameters()`.

    Raises:
        As `pool_linear_cross_entropy`.
    """
    _check(x, weight, bias, target, class_weight, pool, label_smoothing, ignore_index, impl)
    if norm is not None:
        return _normed_value_and_grad(
            x, weight, bias, target, norm, pool, dense_grad, grad_scale, impl,
            label_smoothing=label_smoothing, ignore_index=ignore_index, class_weight=class_weight,
        )  # fmt: skip
    needs = [True, True, bias is not None]
    with torch.no_grad():
        loss, correct, grad_pooled, grad_weight, grad_bias = _operator(
            x,
            weight,
            bias,
            target,
            class_weight,
            pool,
            label_smoothing,
            ignore_index,
            grad_scale,
            needs,
            False,
            impl or "auto",
        )
        grad_x = _gradient(grad_pooled, x.shape, pool, x.dtype, _memory_format(x) if dense_grad else None)
    return loss, correct, grad_x, grad_weight, None if bias is None else grad_bias


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, weight, bias, target, class_weight, pool, label_smoothing, ignore_index, grad_scale, dense_grad, impl
    ):
        needs = list(ctx.needs_input_grad[:3])
        loss, correct, *grads = _operator(
            x, weight, bias, target, class_weight, pool, label_smoothing, ignore_index, grad_scale, needs, True, impl
        )
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(correct)
        ctx.set_materialize_grads(False)  # no zeros for `correct`
        ctx.shape, ctx.pool = x.shape, pool
        ctx.memory_format = _memory_format(x) if dense_grad else None
        ctx.dtypes = [None if t is None else t.dtype for t in (x, weight, bias)]
        return loss, correct

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _):
        if grad_loss is None:
            return (None,) * 11
        needed = ctx.needs_input_grad[:3]
        grads = [grad for grad, need in zip(ctx.saved_tensors, needed) if need]
        if not is_one(grad_loss):
            grads = torch._foreach_mul(grads, grad_loss)
        # Cast after the product: under a loss scale a float16 gradient rounds once, at its final size.
        left = iter(grads)
        grad_x = _gradient(next(left), ctx.shape, ctx.pool, ctx.dtypes[0], ctx.memory_format) if needed[0] else None
        others = [next(left).to(dtype) if need else None for need, dtype in zip(needed[1:], ctx.dtypes[1:])]
        return grad_x, *others, *[None] * 8


class _Mean(torch.autograd.Function):
    """[N, C] in the dtype of the arithmetic; its gradient is a stride-0 view where autograd's would be dense."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pool: str, dense_grad: bool) -> Tensor:
        ctx.shape, ctx.pool, ctx.dtype, ctx.count = x.shape, pool, x.dtype, positions(x, pool)
        ctx.memory_format = _memory_format(x) if dense_grad else None
        wide = torch.promote_types(x.dtype, torch.float32)
        if x.device.type == "cpu" and x.dtype != wide:
            return _sum(x, pooled_dims(x, pool), wide).div_(ctx.count)
        return x.mean(pooled_dims(x, pool), dtype=wide)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return _gradient(grads[0] / ctx.count, ctx.shape, ctx.pool, ctx.dtype, ctx.memory_format), None, None


def _pooled(x: Tensor, pool: str, dense_grad: bool) -> Tensor:
    if pool in ("cls", "none"):
        return (x[:, 0] if pool == "cls" else x).to(torch.promote_types(x.dtype, torch.float32))
    return _Mean.apply(x, pool, dense_grad)


def _normed(pooled: Tensor, norm: nn.Module, impl: str | None) -> Tensor:
    return bn_act(norm_input(pooled, norm), norm, act="none", impl=impl)


def _normed_value_and_grad(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    norm: nn.Module,
    pool: str,
    dense_grad: bool,
    grad_scale: float,
    impl: str | None,
    **options: Any,
) -> tuple[Tensor | None, ...]:
    """The norm has its gradients from autograd, from that of its output on."""
    parameters = [p for p in norm.parameters() if p.requires_grad]
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        pooled = _pooled(leaf, pool, dense_grad)
        normed = _normed(pooled, norm, impl)
    loss, correct, grad, grad_weight, grad_bias = pool_linear_cross_entropy_value_and_grad(
        normed.detach(), weight, bias, target, pool="none", grad_scale=grad_scale, impl=impl, **options
    )
    grad_x, *others = torch.autograd.grad(normed, [leaf, *parameters], grad)
    return loss, correct, grad_x, grad_weight, grad_bias, *others


def _gradient(
    grad_pooled: Tensor, shape: torch.Size, pool: str, dtype: torch.dtype, memory_format: torch.memory_format | None
) -> Tensor:
    """The gradient of the features in `dtype`, dense in `memory_format` unless that is None."""
    if memory_format is None or pool in ("cls", "none"):
        return expand_gradient(grad_pooled, shape, pool, dtype)
    view = expand_gradient(grad_pooled, shape, pool, grad_pooled.dtype)
    return torch.empty(shape, dtype=dtype, device=view.device, memory_format=memory_format).copy_(view)


def _memory_format(x: Tensor) -> torch.memory_format:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if last is not None and x.is_contiguous(memory_format=last) and not x.is_contiguous():
        return last
    return torch.contiguous_format


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    pool: str,
    label_smoothing: float,
    ignore_index: int,
    impl: str | None,
) -> None:
    if pool not in POOLS:
        raise ArgumentError(f"pool={pool!r} is not one of {', '.join(map(repr, POOLS))}")
    tokens = pool in ("tokens", "cls")
    wanted = "[N, T, C]" if tokens else {"mean": "[N, C, *spatial]", "none": "[N, C]"}[pool]
    if not (x.dim() >= 3 if pool == "mean" else x.dim() == (3 if tokens else 2)):
        raise ArgumentError(f"x has shape {list(x.shape)}; pool={pool!r} takes {wanted}")
    if positions(x, pool) == 0 or (pool == "cls" and x.shape[1] == 0):
        raise ArgumentError(f"x has shape {list(x.shape)}: there is no position to pool; give at least one")
    channels = x.shape[2] if tokens else x.shape[1]
    if weight.dim() != 2 or weight.shape[1] != channels or weight.shape[0] == 0:
        raise ArgumentError(f"weight has shape {list(weight.shape)}; x {list(x.shape)} takes [K, {channels}], K >= 1")
    classes = weight.shape[0]
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != classes):
        raise ArgumentError(f"bias has shape {list(bias.shape)}; weight {list(weight.shape)} takes [{classes}] or None")
    if class_weight is not None and (class_weight.dim() != 1 or class_weight.shape[0] != classes):
        raise ArgumentError(f"class_weight has shape {list(class_weight.shape)}; {classes} classes take [{classes}]")

    dtypes = [t.dtype for t in (x, weight, bias, class_weight) if t is not None]
    low = (torch.float16, torch.bfloat16, torch.float32)
    if not (all(d in low for d in dtypes) or all(d == torch.float64 for d in dtypes)):
        raise ArgumentError(
            f"x, weight, bias, class_weight are {dtypes}; give float16, bfloat16 or float32 throughout, or float64"
        )
    if target.is_floating_point():
        if target.dim() != 2 or target.shape[0] != x.shape[0] or target.shape[1] != classes:
            raise ArgumentError(
                f"target has shape {list(target.shape)}; probabilities for x {list(x.shape)} and weight "
                f"{list(weight.shape)} are [{x.shape[0]}, {classes}]"
            )
        if ignore_index >= 0:
            raise ArgumentError(
                f"ignore_index={ignore_index} needs class indices, but target holds probabilities; drop it or give "
                "target as int64 [N]"
            )
    elif target.dtype != torch.int64:
        raise ArgumentError(f"target is {target.dtype}; give int64 class indices (target.long()) or probabilities")
    elif target.dim() != 1 or target.shape[0] != x.shape[0]:
        raise ArgumentError(
            f"target has shape {list(target.shape)}; class indices for x {list(x.shape)} are [{x.shape[0]}]"
        )
    if not 0.0 <= label_smoothing <= 1.0:
        raise ArgumentError(f"label_smoothing={label_smoothing} is outside [0, 1]")
    for name, t in (("target", target), ("class_weight", class_weight)):
        if t is not None and t.requires_grad and torch.is_grad_enabled():
            raise ArgumentError(
                f"{name} requires grad, and this operator has no gradient for it; detach it, or call "
                "fastlocal.reference.pool_linear_cross_entropy, which has one"
            )
    for name, t in (("weight", weight), ("bias", bias), ("target", target), ("class_weight", class_weight)):
        if t is not None and t.device != x.device:
            raise ArgumentError(f"{name} is on {t.device} and x on {x.device}; move them to one device")
    if impl is not None:
        _dispatch.check_backend(impl, "impl")


class Signature(NamedTuple):
    """All that the choice of a backend depends on."""

    device: str
    triton: str | None
    dtypes: tuple[torch.dtype, ...]
    classes: int


def _signature(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *, class_weight: Tensor | None = None, **_: Any
) -> Signature:
    device, triton = _dispatch.platform(x.device)
    dtypes = tuple(t.dtype for t in (x, weight, bias, target, class_weight) if t is not None)
    return Signature(device, triton, dtypes, weight.shape[0])


def _reject_triton(s: Signature) -> str | None:
    if s.triton is not None:
        return s.triton
    if torch.float64 in s.dtypes:
        return "float64; the kernel accumulates in float32"
    if s.device == "cpu" and torch.bfloat16 in s.dtypes:
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


def _fused(weight: Tensor) -> bool:
    return weight.numel() <= FUSED_WEIGHT


def _counts_in_kernel(target: Tensor) -> bool:
    return target.is_floating_point() or target.shape[0] <= COUNT_ROWS


def triton_launches(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Kernels that one call of torch.ops.fastlocal.pool_linear_cross_entropy launches where Triton serves it."""
    names = [argument.name for argument in _operator._schema.arguments]
    call = dict(zip(names, args)) | kwargs
    x, weight, bias, target, needs = (call[name] for name in ("x", "weight", "bias", "target", "needs"))
    narrow = [t is not None and t.dtype != torch.float32 for t in (x, weight, bias)]
    pools = narrow[0] or positions(x, call["pool"]) > 1
    results = 0 if call["wide_grads"] else sum(need and n for need, n in zip(needs, narrow))
    if weight.shape[0] > MAX_CLASSES:
        chunks = len(range(0, weight.shape[0], chunk_classes(x.shape[0], weight.shape[0])))
        logits = 1 + narrow[1]
        launches = pools + narrow[2] + (not target.is_floating_point()) + chunks * (logits + 1) + 1
        if any(needs):  # the last chunk's logits are still there
            launches += (chunks - 1) * logits + chunks * (1 + sum(needs))
        return launches + results
    launches = 2 + needs[1] + (not _counts_in_kernel(target))  # rows, sums, weight gradient, divisor
    if not _fused(weight):
        launches += pools + 1 + needs[0] + narrow[1] + narrow[2]  # pool, logits, gradient of the pool, casts
    return launches + results


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    pool: str,
    label_smoothing: float,
    ignore_index: int,
    grad_scale: float,
    needs: list[bool],
    wide_grads: bool,
    impl: str,
) -> Result:
    chosen = _dispatch.choose(NAME, _signature(x, weight, bias, target, class_weight=class_weight), impl)
    args = (x, weight, bias, target, class_weight, pool, label_smoothing, ignore_index, grad_scale)
    if pool == "cls":
        args = (x[:, 0], *args[1:5], "none", *args[6:])
    if chosen == "triton":
        from fastlocal.triton_kernels import pool_linear_cross_entropy as kernels  # Triton is optional

        if weight.shape[0] > MAX_CLASSES:
            loss, correct, *grads = _by_chunks(kernels.Online, *args, needs)
        else:
            loss, correct, *grads = kernels.launch(*args, needs, _fused(weight), _counts_in_kernel(target))
    elif chosen == "aten":
        if weight.shape[0] > MAX_CLASSES:
            loss, correct, *grads = _by_chunks(_Online, *args, needs)
        else:
            loss, correct, *grads = _aten(*args, needs)
    else:
        loss, correct, *grads = closed_form(*args)
    out = [
        grad.to(wide_dtype(x, weight) if wide_grads or like is None else like.dtype)
        if needed and grad is not None
        else x.new_empty(0)
        for grad, like, needed in zip(grads, (x, weight, bias), needs)
    ]
    return loss, correct, out[0], out[1], out[2]


def _fake(x, weight, bias, target, class_weight, pool, smoothing, ignore, scale, needs, wide_grads, impl) -> Result:
    wide = wide_dtype(x, weight)
    shapes = ((x.shape[0], weight.shape[1]), weight.shape, weight.shape[:1])
    grads = [
        x.new_empty(shape, dtype=wide if wide_grads or like is None else like.dtype) if needed else x.new_empty(0)
        for shape, like, needed in zip(shapes, (x, weight, bias), needs)
    ]
    return x.new_empty((), dtype=wide), x.new_empty((), dtype=torch.int64), grads[0], grads[1], grads[2]


def _without_autocast(*args) -> Result:
    # Inside, every step has the dtype it should have: autocast would put the logits in half precision.
    with torch.autocast(args[0].device.type, enabled=False):
        return _operator(*args)


_library.impl(NAME, _run, "CompositeExplicitAutograd")  # every device: _dispatch looks at where the tensors are
for _key in ("AutocastCPU", "AutocastCUDA"):
    _library.impl(NAME, _without_autocast, _key)
torch.library.register_fake(f"fastlocal::{NAME}", _fake, lib=_library)


def _aten(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    pool: str,
    label_smoothing: float,
    ignore_index: int,
    grad_scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The closed form in as few ATen calls as it takes: the divisions ride on the matrix products."""
    wide = wide_dtype(x, weight)
    rows, classes = x.shape[0], weight.shape[0]
    dims = pooled_dims(x, pool)
    scale = 1.0 / positions(x, pool)
    summed = _sum(x, dims, wide) if dims else x.to(wide)
    wide_weight = weight.to(wide)
    if bias is None:
        logits = _scaled_mm(summed, wide_weight.t(), scale)
    else:
        logits = torch.addmm(bias.to(wide), summed, wide_weight.t(), alpha=scale)
    log_probs = torch.log_softmax(logits, 1)
    guess = logits.argmax(1)
    each = None if class_weight is None else class_weight.to(wide)
    backward = any(needs)
    grad: Tensor | None = None

    if target.is_floating_point():
        wanted = target.to(wide)
        if label_smoothing:
            wanted = wanted * (1 - label_smoothing) + label_smoothing / classes
        if each is not None:
            wanted = wanted * each
        loss = (wanted * log_probs).sum() / -rows
        correct = (guess == target.argmax(1)).sum()
        if backward:
            grad = wanted * (-grad_scale / max(rows, 1))
    else:
        loss, total = torch.ops.aten.nll_loss_forward(log_probs, target, each, 1, ignore_index)
        hits = guess == target
        if 0 <= ignore_index < classes:  # elsewhere no guess can equal it
            hits = hits & (target != ignore_index)
        correct = hits.sum()
        if backward:
            one = torch.full((), grad_scale * (1 - label_smoothing), dtype=wide, device=x.device)
            grad = torch.ops.aten.nll_loss_backward(one, log_probs, target, each, 1, ignore_index, total)
        if label_smoothing:
            share = torch.where(target != ignore_index, total.reciprocal(), 0.0)
            smooth = log_probs.sum(1) if each is None else log_probs @ each
            loss = (1 - label_smoothing) * loss - label_smoothing / classes * (smooth @ share)
            if grad is not None:
                push = share[:, None] if each is None else torch.outer(share, each)
                grad.sub_(push, alpha=grad_scale * label_smoothing / classes)
    if grad is None:
        return loss, correct, None, None, None
    grad_logits = torch.ops.aten._log_softmax_backward_data(grad, log_probs, 1, wide)
    return (
        loss,
        correct,
        _scaled_mm(grad_logits, wide_weight, scale) if needs[0] else None,
        _scaled_mm(grad_logits.t(), summed, scale) if needs[1] else None,
        grad_logits.sum(0) if needs[2] else None,
    )


def _sum(x: Tensor, dims: tuple[int, ...], wide: torch.dtype) -> Tensor:
    # The CPU's sum into another dtype first converts the whole input (2 to 5 times the time); its bfloat16 sum
    # accumulates in float32 and rounds once. A float16 sum could overflow.
    if x.dtype == torch.bfloat16 and x.device.type == "cpu":
        return x.sum(dims).to(wide)
    return x.sum(dims, dtype=wide)


def _scaled_mm(a: Tensor, b: Tensor, scale: float) -> Tensor:
    if scale == 1.0:
        return torch.mm(a, b)
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scale)  # beta=0: the first argument is never read


def chunk_classes(rows: int, classes: int) -> int:
    """How many classes are taken at a time where there are more than MAX_CLASSES: never all of them."""
    return min(max(MAX_CLASSES, CHUNK_ELEMENTS // max(rows, 1)), -(-classes // 256) * 128)


def _by_chunks(
    online: Any,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    pool: str,
    label_smoothing: float,
    ignore_index: int,
    grad_scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """A chunk of classes at a time: logits once for the loss and once more, as its gradient; [N, K] is never in memory."""
    wide = wide_dtype(x, weight)
    classes = weight.shape[0]
    dims = pooled_dims(x, pool)
    pooled = x.mean(dims, dtype=wide) if positions(x, pool) > 1 else x.flatten(1).to(wide)
    wide_bias = None if bias is None else bias.to(wide)
    state = online(pooled, classes, target, class_weight, label_smoothing, ignore_index, grad_scale)
    chunk = chunk_classes(x.shape[0], classes)
    starts = range(0, classes, chunk)

    def logits_of(first: int) -> tuple[Tensor, Tensor]:
        part = weight[first : first + chunk].to(wide)
        if wide_bias is None:
            return torch.mm(pooled, part.t()), part
        return torch.addmm(wide_bias[first : first + chunk], pooled, part.t()), part

    for first in starts:
        logits, part = logits_of(first)
        state.scan(logits, first)
    loss, correct = state.finish()
    if not any(needs):
        return loss, correct, None, None, None

    grad_pooled = torch.empty(pooled.shape, dtype=wide, device=x.device) if needs[0] else None
    grad_weight = torch.empty(weight.shape, dtype=wide, device=x.device) if needs[1] else None
    grad_bias = torch.empty(classes, dtype=wide, device=x.device) if needs[2] else None
    for first in reversed(starts):
        last = first == starts[-1]
        if not last:
            logits, part = logits_of(first)
        grad = state.gradient(logits, first)
        if grad_pooled is not None:
            grad_pooled.addmm_(grad, part, beta=0 if last else 1, alpha=1.0 / positions(x, pool))
        if grad_weight is not None:
            torch.mm(grad.t(), pooled, out=grad_weight[first : first + chunk])
        if grad_bias is not None:
            torch.sum(grad, 0, out=grad_bias[first : first + chunk])
    return loss, correct, grad_pooled, grad_weight, grad_bias


class _Online:
    """The rows of a batch, chunk by chunk: what kernels.Online is, from ATen calls."""

    def __init__(
        self,
        pooled: Tensor,
        classes: int,
        target: Tensor,
        class_weight: Tensor | None,
        label_smoothing: float,
        ignore_index: int,
        grad_scale: float,
    ) -> None:
        rows, wide = pooled.shape[0], pooled.dtype
        self.target, self.smoothing, self.grad_scale = target, label_smoothing, grad_scale
        self.share = label_smoothing / classes
        self.each = pooled.new_ones(1).expand(classes) if class_weight is None else class_weight.to(wide)
        self.top = self.chance = pooled.new_full((rows,), -torch.inf)  # largest logit and probability so far
        self.norm = pooled.new_zeros(rows)  # sum of exp(logit - top)
        self.mass = pooled.new_zeros(rows)  # sum of what the classes should have
        self.dot = pooled.new_zeros(rows)  # sum of that times (logit - top)
        self.guess = self.wish = torch.zeros(rows, dtype=torch.int64, device=pooled.device)
        self.probabilities = target.is_floating_point()
        if self.probabilities:
            self.counts = torch.ones(rows, dtype=torch.bool, device=pooled.device)
            self.total = pooled.new_full((), rows)
            return
        self.counts = target != ignore_index
        known = target.where(self.counts, 0)
        # -1 would count from the end; out of range it raises, like any class that does not exist.
        row_weight = self.each[known.where(known >= 0, classes)] * self.counts
        self.own = (1 - label_smoothing) * row_weight
        self.total = row_weight.sum()

    def scan(self, logits: Tensor, first: int) -> None:
        top, index = logits.max(1)
        self.guess = torch.where(top > self.top, index + first, self.guess)
        top = torch.maximum(top, self.top)
        shift = torch.where(top > -torch.inf, top, 0.0)  # every class so far may be switched off
        self.norm = self.norm * (self.top - shift).exp() + (logits - shift[:, None]).exp_().sum(1)
        # Less the largest logit before it is added up: of large logits little else would be left.
        self.dot = self.dot + torch.where(self.mass != 0, self.mass * (self.top - shift), 0.0)
        self.top = top
        if self.probabilities:
            chance, index = self._part(self.target, logits, first).to(logits.dtype).max(1)
            self.wish = torch.where(chance > self.chance, index + first, self.wish)
            self.chance = torch.maximum(chance, self.chance)
            wanted = self._wanted(logits, first)
            self.dot = self.dot + (wanted * (logits - shift[:, None])).sum(1)
            self.mass = self.mass + wanted.sum(1)
            return
        inside, at = self._where(logits, first)
        self.dot = self.dot + torch.where(inside, self.own * (logits.gather(1, at)[:, 0] - shift), 0.0)
        self.mass = self.mass + torch.where(inside, self.own, 0.0)
        if self.smoothing:
            each = self._part(self.each, logits, first)
            self.dot = self.dot + self.share * ((logits - shift[:, None]) @ each)
            self.mass = self.mass + self.share * each.sum()

    def finish(self) -> tuple[Tensor, Tensor]:
        """Loss [] and correct [], after the last chunk."""
        losses = torch.where(self.counts, self.mass * self.norm.log() - self.dot, 0.0)
        self.scale = torch.where(self.counts, self.grad_scale / self.total, 0.0)
        right = self.guess == (self.wish if self.probabilities else self.target)
        return losses.sum() / self.total, (right & self.counts).sum()

    def gradient(self, logits: Tensor, first: int) -> Tensor:
        """Turns the logits of a chunk into their gradient, in place; after `finish`."""
        grad = logits.sub_(self.top[:, None]).exp_().mul_((self.mass * self.scale / self.norm)[:, None])
        if self.probabilities:
            return grad.sub_(self._wanted(logits, first).mul_(self.scale[:, None]))
        inside, at = self._where(logits, first)
        grad.scatter_add_(1, at, torch.where(inside, -self.own * self.scale, 0.0)[:, None])
        if self.smoothing:
            grad.addr_(self.scale, self._part(self.each, logits, first), alpha=-self.share)
        return grad

    def _part(self, of_classes: Tensor, logits: Tensor, first: int) -> Tensor:
        return of_classes[..., first : first + logits.shape[1]]

    def _wanted(self, logits: Tensor, first: int) -> Tensor:
        wanted = self._part(self.target, logits, first).to(logits.dtype) * (1 - self.smoothing) + self.share
        return wanted * self._part(self.each, logits, first)

    def _where(self, logits: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Whether the target is in the chunk, [N], and where, [N, 1]."""
        at, width = self.target - first, logits.shape[1]
        return (at >= 0) & (at < width), at.clamp(0, width - 1)[:, None]
