"""BatchNorm + residual + activation + mean over positions as one operator: the activation is never in memory.

The gradient of a mean is one number per sample and channel, so backward needs the input (and the residual), the
statistics, and that number; it recomputes the activation's sign. Forward reads the input, backward reads it and writes
its gradient; nothing else has the size of the input.

Deterministic on every backend. Specification: fastlocal/reference/bn_act_pool.py.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from fastlocal.errors import ArgumentError, did_you_mean
from fastlocal.ops import _dispatch
from fastlocal.ops.bn_act import plainly_called
from fastlocal.reference._precision import wide_dtype
from fastlocal.reference.bn_act_pool import bn_act_pool as plain

NAME = "bn_act_pool"
ACTS = ("relu", "leaky_relu", "none")
# Up to so many values per channel one Triton program has a channel for itself: statistics and means, in one launch.
# Where channels lie side by side it must have several, and there are fewer programs.
ONE_LAUNCH, ONE_LAUNCH_LAST = 32768, 2048
_DIMS: dict[type[nn.Module], tuple[int, ...]] = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}

_library = torch.library.Library("fastlocal", "FRAGMENT")
# The statistics are written in training only. What does not exist comes back as an empty tensor.
_library.define(
    f"{NAME}_forward(Tensor x, Tensor weight, Tensor bias, Tensor(a!) running_mean, Tensor(b!) running_var, "
    "Tensor(c!)? batches, float momentum, float eps, Tensor? residual, Tensor? residual_weight, "
    "Tensor? residual_bias, Tensor(d!)? residual_running_mean, Tensor(e!)? residual_running_var, "
    "Tensor(f!)? residual_batches, float residual_momentum, float residual_eps, bool training, str act, float slope, "
    "str impl) -> (Tensor pooled, Tensor mean, Tensor rstd, Tensor residual_mean, Tensor residual_rstd)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# needs: which of dx and dresidual; the gradients of the parameters are always there.
_library.define(
    f"{NAME}_backward(Tensor dpooled, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, "
    "Tensor? residual, Tensor? residual_weight, Tensor? residual_bias, Tensor? residual_mean, Tensor? residual_rstd, "
    "bool training, str act, float slope, bool[2] needs, str impl) -> (Tensor dx, Tensor dresidual, Tensor dweight, "
    "Tensor dbias, Tensor dresidual_weight, Tensor dresidual_bias)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_forward = torch.ops.fastlocal.bn_act_pool_forward.default
_backward = torch.ops.fastlocal.bn_act_pool_backward.default


def bn_act_pool(
    x: Tensor,
    norm: nn.Module,
    residual: Tensor | None = None,
    *,
    act: str = "relu",
    slope: float = 0.01,
    residual_norm: nn.Module | None = None,
    impl: str | None = None,
) -> Tensor:
    """The mean over positions of ``act(norm(x) + residual)``, or of ``act(norm(x) + residual_norm(residual))``.

    Args:
        x: ``[N, C, *spatial]`` (or ``[N, C]``: there is one position then), any strides.
        norm: the normalisation module. A plain BatchNorm1d/2d/3d with running statistics, parameters in float32 or
            the dtype of ``x``, and no hooks is fused, in training and in evaluation; any other is called.
        residual: of ``x``'s shape and dtype, or None. It is not changed.
        act: "relu", "leaky_relu" or "none".
        slope: of "leaky_relu" below zero.
        residual_norm: a BatchNorm module for ``residual``, in the mode of ``norm``, or None.
        impl: a backend for this call; None takes that of `fastlocal.backend`.

    Returns:
        ``[N, C]`` in the dtype of ``x``. Where it is fused, everything up to the mean is float32 (float64 for float64
        input) and only the mean is rounded to ``x.dtype``; no sum overflows float16. Differentiable once there; saved
        for backward are ``x``, the residual, and a few vectors of C numbers. Running statistics are updated as by
        calling the modules.

    Raises:
        ArgumentError: no such activation or backend, or a residual_norm without a residual.
        BackendError: `impl` cannot serve the call.
        ValueError: one value per channel in training, as the module says.
    """
    if act not in ACTS:
        raise ArgumentError(f"act={act!r} is not an activation. {did_you_mean(str(act), ACTS)}")
    if residual_norm is not None and residual is None:
        raise ArgumentError("residual_norm is given, but residual is None; give both, or neither")
    if impl is not None:
        _dispatch.check_backend(impl, "impl")
    signature = _signature(x, norm, residual, residual_norm=residual_norm)
    chosen = _choose(*signature, impl or "auto")
    if chosen == "reference":
        return plain(x, norm, residual, act=act, slope=slope, residual_norm=residual_norm)
    return _Function.apply(
        x, norm.weight, norm.bias, norm.running_mean, norm.running_var, _counter(norm), norm.momentum,
        norm.eps, residual, *_parts(residual_norm), norm.training, act, slope, chosen,
    )  # fmt: skip


def _counter(norm: nn.Module) -> Tensor | None:
    """The batch counter for the operator to count; what the engine puts in its place counts here."""
    batches = norm.num_batches_tracked
    if batches is None or (isinstance(batches, Tensor) and batches.device == norm.weight.device):
        return batches
    if norm.training:
        batches.add_(1)  # type: ignore[operator]
    return None


def _parts(norm: nn.Module | None) -> tuple[Any, ...]:
    if norm is None:
        return None, None, None, None, None, 0.0, 0.0
    return (
        norm.weight, norm.bias, norm.running_mean, norm.running_var, _counter(norm), norm.momentum, norm.eps
    )  # fmt: skip


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        batches: Tensor | None,
        momentum: float,
        eps: float,
        residual: Tensor | None,
        residual_weight: Tensor | None,
        residual_bias: Tensor | None,
        residual_running_mean: Tensor | None,
        residual_running_var: Tensor | None,
        residual_batches: Tensor | None,
        residual_momentum: float,
        residual_eps: float,
        training: bool,
        act: str,
        slope: float,
        impl: str,
    ) -> Tensor:
        pooled, mean, rstd, residual_mean, residual_rstd = _forward(
            x, weight, bias, running_mean, running_var, batches, momentum, eps, residual, residual_weight,
            residual_bias, residual_running_mean, residual_running_var, residual_batches, residual_momentum,
            residual_eps, training, act, slope, impl,
        )  # fmt: skip
        normed = residual_weight is not None
        kept = residual if normed or act != "none" else None  # without an activation its gradient does not depend on it
        ctx.save_for_backward(
            x, weight, bias, mean, rstd, kept, residual_weight, residual_bias, *(
                (residual_mean, residual_rstd) if normed else (None, None))
        )  # fmt: skip
        ctx.options = training, act, slope
        ctx.impl = impl
        ctx.like = None if residual is None or kept is not None else (residual.shape, residual.dtype)
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        needed = ctx.needs_input_grad
        x, weight, bias, mean, rstd, residual, residual_weight, residual_bias, residual_mean, residual_rstd = (
            ctx.saved_tensors
        )
        dx, dresidual, dweight, dbias, dresidual_weight, dresidual_bias = _backward(
            grads[0], x, weight, bias, mean, rstd, residual, residual_weight, residual_bias, residual_mean,
            residual_rstd, *ctx.options, [needed[0], needed[8] and residual is not None], ctx.impl,
        )  # fmt: skip
        if ctx.like is not None and needed[8]:
            shape, dtype = ctx.like
            share = (grads[0] / max(1, math.prod(shape[2:]))).to(dtype)
            dresidual = share[(...,) + (None,) * (len(shape) - 2)].expand(shape)
        found = {0: dx, 1: dweight, 2: dbias, 8: dresidual, 9: dresidual_weight, 10: dresidual_bias}
        return tuple(found[i] if needed[i] and i in found else None for i in range(20))


# --- the choice -------------------------------------------------------------------------------------------------------


class Signature(NamedTuple):
    """What the choice depends on; `fits` is the reason why only the modules themselves can do it, or None."""

    device: str
    triton: str | None
    dtype: torch.dtype
    fits: str | None


@torch.compiler.assume_constant_result  # compiled code keeps the choice of when it was traced
def _choose(device: str, triton: str | None, dtype: torch.dtype, fits: str | None, impl: str) -> str:
    return _dispatch.choose(NAME, Signature(device, triton, dtype, fits), impl)


def _signature(
    x: Tensor, norm: nn.Module, residual: Tensor | None = None, *, residual_norm: nn.Module | None = None, **_: Any
) -> Signature:
    device, triton = _dispatch.platform(x.device)
    fits = _norm_misfit(x, norm) or _residual_misfit(x, norm, residual, residual_norm)
    return Signature(device, triton, x.dtype, fits)


def _norm_misfit(x: Tensor, norm: nn.Module) -> str | None:
    if type(norm) not in _DIMS:
        return f"{type(norm).__name__} is not a plain BatchNorm"
    if norm.running_mean is None or norm.weight is None or norm.momentum is None:
        return "the norm is without running statistics, weight, bias or a momentum"
    reason = plainly_called(norm)
    if reason is not None:
        return reason
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        return f"{x.dtype} is no dtype of features"
    if x.dim() not in _DIMS[type(norm)] or x.shape[1] != norm.num_features:
        return "x does not have the shape that the norm takes"
    if x.numel() == 0:
        return "there is no value"
    if norm.training and x.numel() == x.shape[1]:
        return "one value per channel"  # the module says that this is an error
    parts: tuple[Any, ...] = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    dtypes = {p.dtype for p in parts}
    if dtypes != {wide_dtype(x)} and dtypes != {x.dtype}:
        return f"the norm's tensors are neither all {wide_dtype(x)} nor all of the dtype of x"
    if any(p.device != x.device or not p.is_contiguous() for p in parts):
        return "the norm's tensors are not contiguous on the device of x"
    return None


def _residual_misfit(
    x: Tensor, norm: nn.Module, residual: Tensor | None, residual_norm: nn.Module | None
) -> str | None:
    if residual is None:
        return None
    if residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device:
        return "the residual has another shape, dtype or device than x"
    if residual_norm is None:
        return None
    if residual_norm is norm:
        return "one norm is used twice"
    if residual_norm.training != norm.training:
        return "one norm is in training, the other is not"
    reason = _norm_misfit(residual, residual_norm)
    return f"residual_norm: {reason}" if reason else None


def _reject_triton(s: Signature) -> str | None:
    if s.fits is not None or s.triton is not None:
        return s.fits or s.triton
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
        _dispatch.Candidate("reference", lambda s: None),  # before "aten", which is there to be asked for
        _dispatch.Candidate("aten", lambda s: s.fits),
    ],
)

# --- the operators ----------------------------------------------------------------------------------------------------


def _run_forward(
    x, weight, bias, running_mean, running_var, batches, momentum, eps, residual, residual_weight, residual_bias,
    residual_running_mean, residual_running_var, residual_batches, residual_momentum, residual_eps, training, act,
    slope, impl,
):  # fmt: skip
    own = weight, bias, running_mean, running_var, batches, momentum, eps
    other = None
    if residual_weight is not None:
        other = (
            residual_weight, residual_bias, residual_running_mean, residual_running_var, residual_batches,
            residual_momentum, residual_eps,
        )  # fmt: skip
    if impl == "aten":
        return _aten_forward(x, own, residual, other, training, act, slope)
    from fastlocal.triton_kernels import bn_act_pool as kernels  # Triton is optional

    x, residual = _merged(x), None if residual is None else _merged(residual)
    out = kernels.forward(x, own, residual, other, training, act, slope, _channels_last(x), _one_launch(x))
    if training:  # autograd does not see what a kernel writes
        increment_version([t for t in (*own[2:5], *(other or ())[2:5]) if t is not None and not t.is_inference()])
    return out


def _run_backward(
    dpooled, x, weight, bias, mean, rstd, residual, residual_weight, residual_bias, residual_mean, residual_rstd,
    training, act, slope, needs, impl,
):  # fmt: skip
    own = weight, bias, mean, rstd
    other = None if residual_weight is None else (residual_weight, residual_bias, residual_mean, residual_rstd)
    if impl == "aten":
        return _aten_backward(dpooled, x, own, residual, other, training, act, slope, needs)
    from fastlocal.triton_kernels import bn_act_pool as kernels  # Triton is optional

    x, residual = _merged(x), None if residual is None else _merged(residual)
    dx, dresidual = (_empty_like(t) if need else None for t, need in zip((x, residual), needs))
    options = training, act, slope, _channels_last(x), _one_launch(x)
    grads = kernels.backward(dpooled, x, own, residual, other, dx, dresidual, *options)
    return *(x.new_empty(0) if t is None else t for t in (dx, dresidual)), *grads


def _fake_forward(
    x, weight, bias, running_mean, running_var, batches, momentum, eps, residual, residual_weight, residual_bias,
    residual_running_mean, residual_running_var, residual_batches, residual_momentum, residual_eps, training, act,
    slope, impl,
):  # fmt: skip
    mean = x.new_empty(weight.shape, dtype=wide_dtype(x))
    other = mean.new_empty(0 if residual_weight is None else weight.shape)
    return x.new_empty(x.shape[:2]), mean, torch.empty_like(mean), other, torch.empty_like(other)


def _fake_backward(
    dpooled, x, weight, bias, mean, rstd, residual, residual_weight, residual_bias, residual_mean, residual_rstd,
    training, act, slope, needs, impl,
):  # fmt: skip
    dx = _empty_like(x) if needs[0] else x.new_empty(0)
    dresidual = _empty_like(residual) if needs[1] else x.new_empty(0)
    other = weight.new_empty(0) if residual_weight is None else torch.empty_like(residual_weight)
    return dx, dresidual, torch.empty_like(weight), torch.empty_like(bias), other, torch.empty_like(other)


for _name, _run, _fake in (("forward", _run_forward, _fake_forward), ("backward", _run_backward, _fake_backward)):
    # Every device: `impl` is what _dispatch chose.
    _library.impl(f"{NAME}_{_name}", _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastlocal::{NAME}_{_name}", _fake, lib=_library)


def _mergeable(x: Tensor) -> bool:
    """Whether one stride leads through all positions of x, so that x.flatten(2) is a view."""
    spatial = [(size, stride) for size, stride in zip(x.shape[2:], x.stride()[2:]) if size != 1]
    return all(a == size * b for (_, a), (size, b) in itertools.pairwise(spatial))


def _merged(x: Tensor) -> Tensor:
    return x if _mergeable(x) else x.contiguous()


def _channels_last(x: Tensor) -> bool:
    return x.shape[1] > 1 and x.stride(1) == 1 and _mergeable(x)


def _one_launch(x: Tensor) -> bool:
    return x.numel() // x.shape[1] <= (ONE_LAUNCH_LAST if _channels_last(x) else ONE_LAUNCH)


def forward_launches(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Kernels that one call of torch.ops.fastlocal.bn_act_pool_forward launches where Triton serves it."""
    x, residual, training = _arguments(_forward, args, kwargs, "x", "residual", "training")
    copies = sum(t is not None and not _mergeable(t) for t in (x, residual))
    return copies + (2 if training and not _one_launch(x) else 1)


def backward_launches(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Kernels that one call of torch.ops.fastlocal.bn_act_pool_backward launches where Triton serves it."""
    x, residual = _arguments(_backward, args, kwargs, "x", "residual")
    copies = sum(t is not None and not _mergeable(t) for t in (x, residual))
    return copies + (1 if _one_launch(x) else 2)


def _arguments(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *names: str) -> list[Any]:
    call = dict(zip([argument.name for argument in operator._schema.arguments], args)) | kwargs
    return [call[name] for name in names]


def _format(x: Tensor) -> torch.memory_format:
    """The layout of a gradient of x."""
    for dims, last in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.dim() == dims and x.is_contiguous(memory_format=last):
            return last
    return torch.contiguous_format


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=_format(x))


# --- ATen -------------------------------------------------------------------------------------------------------------


def _across(v: Tensor, x: Tensor) -> Tensor:
    """[C] -> [C, 1, ...], to go with x; [N, C] -> [N, C, 1, ...]."""
    return v[(...,) + (None,) * (x.dim() - 2)]


def _statistics(x: Tensor, norm: tuple[Any, ...], training: bool) -> tuple[Tensor, Tensor]:
    """Mean and 1 / standard deviation of each channel; moves the running statistics in training."""
    _, _, running_mean, running_var, batches, momentum, eps = norm
    if not training:
        return running_mean.to(x.dtype, copy=True), (running_var.to(x.dtype) + eps).rsqrt()
    values = x.numel() // x.shape[1]
    var, mean = torch.var_mean(x, (0, *range(2, x.dim())), correction=0)
    running_mean.copy_(running_mean * (1 - momentum) + mean * momentum)
    running_var.copy_(running_var * (1 - momentum) + var * (momentum * values / (values - 1)))
    if batches is not None:
        batches.add_(1)
    return mean, (var + eps).rsqrt()


def _affine(x_hat: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x_hat * _across(weight.to(x_hat.dtype), x_hat) + _across(bias.to(x_hat.dtype), x_hat)


def _normalized(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return (x - _across(mean, x)) * _across(rstd, x)


def _aten_forward(x, own, residual, other, training, act, slope):
    wide = x.to(wide_dtype(x))
    mean, rstd = _statistics(wide, own, training)
    z = _affine(_normalized(wide, mean, rstd), *own[:2])
    residual_mean, residual_rstd = mean.new_empty(0), mean.new_empty(0)
    if residual is not None:
        added = residual.to(wide.dtype)
        if other is not None:
            residual_mean, residual_rstd = _statistics(added, other, training)
            added = _affine(_normalized(added, residual_mean, residual_rstd), *other[:2])
        z += added
    if act == "relu":
        z = z.relu()
    elif act == "leaky_relu":
        z = torch.nn.functional.leaky_relu(z, slope)
    pooled = z.mean(tuple(range(2, x.dim()))) if x.dim() > 2 else z
    return pooled.to(x.dtype), mean, rstd, residual_mean, residual_rstd


def _aten_backward(dpooled, x, own, residual, other, training, act, slope, needs):
    weight, bias, mean, rstd = own
    wide = wide_dtype(x)
    reduced = (0, *range(2, x.dim()))
    values = x.numel() // x.shape[1]
    x_hat = _normalized(x.to(wide), mean, rstd)
    residual_hat = None
    if other is not None:
        residual_hat = _normalized(residual.to(wide), other[2], other[3])
    dy = _across(dpooled.to(wide) / math.prod(x.shape[2:]), x).expand(x.shape)
    if act != "none":
        z = _affine(x_hat, weight, bias)
        if residual_hat is not None:
            z += _affine(residual_hat, *other[:2])
        elif residual is not None:
            z += residual.to(wide)
        # As PyTorch has it: through a nan a ReLU lets the gradient pass, a leaky one its share.
        dy = torch.where(z <= 0, 0, dy) if act == "relu" else torch.where(z > 0, dy, dy * slope)
    dbias = dy.sum(reduced)

    def through(x_hat: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
        dweight = (dy * x_hat).sum(reduced)
        dx = dy
        if training:
            dx = dy - _across(dbias / values, x) - x_hat * _across(dweight / values, x)
        return dweight.to(weight.dtype), dx * _across(weight.to(wide) * rstd, x)

    dweight, dx = through(x_hat, weight, rstd)
    dresidual, dresidual_weight, dresidual_bias = dy, weight.new_empty(0), weight.new_empty(0)
    if other is not None:
        dresidual_weight, dresidual = through(residual_hat, other[0], other[3])
        dresidual_bias = dbias.to(other[1].dtype, copy=True)
    out = [
        _empty_like(like).copy_(grad) if need else x.new_empty(0)
        for grad, like, need in zip((dx, dresidual), (x, residual), needs)
    ]
    return out[0], out[1], dweight, dbias.to(bias.dtype, copy=True), dresidual_weight, dresidual_bias
