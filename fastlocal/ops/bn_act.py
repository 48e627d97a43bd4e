"""BatchNorm + residual + ReLU in training as one operator: two passes over memory forward and two backward.

Saved for backward: the input and the output (which the next convolution saves anyway), mean and 1/std. "native" serves
channels_last maps and matrices on a CPU (csrc/bn_act.cpp); everything else is the module itself, an addition and a ReLU.
Deterministic for a given number of threads. Specification: fastlocal/reference/bn_act.py.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version
from torch.nn.modules.module import _has_any_global_hook

from fastlocal.ops import _dispatch
from fastlocal.reference.bn_act import bn_act as plain

NAME = "bn_act"
MIN_ELEMENTS = 1 << 15  # below, one autograd.Function costs more than the passes that it saves

_library = torch.library.Library("fastlocal", "FRAGMENT")
_library.define(
    f"{NAME}_forward(Tensor x, Tensor? residual, Tensor weight, Tensor bias, Tensor(a!) running_mean, "
    "Tensor(b!) running_var, float momentum, float eps, bool relu) -> (Tensor y, Tensor mean, Tensor rstd)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"{NAME}_backward(Tensor dy, Tensor x, Tensor? y, Tensor weight, Tensor mean, Tensor rstd, bool needs_residual) "
    "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_forward = torch.ops.fastlocal.bn_act_forward.default
_backward = torch.ops.fastlocal.bn_act_backward.default


def bn_act(
    x: Tensor, norm: nn.Module, residual: Tensor | None = None, *, relu: bool = True, impl: str | None = None
) -> Tensor:
    """``relu(norm(x) + residual)``, differentiable once where it is fused.

    Args:
        x: ``[N, C]`` or ``[N, C, *spatial]``.
        norm: the normalisation module. A plain BatchNorm1d/2d in training without hooks can be fused; any other is called.
        residual: of ``x``'s shape, or None. It is not changed.
        relu: False leaves the activation out.
        impl: a backend for this call; None takes that of `fastlocal.backend`.

    Returns:
        A new tensor of ``x``'s shape, dtype and layout. The running statistics of ``norm`` are updated as by calling it.

    Raises:
        ArgumentError: no such backend.
        BackendError: `impl` cannot serve the call.
    """
    if impl is not None:
        _dispatch.check_backend(impl, "impl")
    if _dispatch.choose(NAME, _signature(x, norm, residual), impl or "auto") == "reference":
        return plain(x, norm, residual, relu=relu)
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)  # type: ignore[operator]
    return _Function.apply(
        x, residual, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.momentum, norm.eps, relu
    )


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
        relu: bool,
    ) -> Tensor:
        y, mean, rstd = _forward(x, residual, weight, bias, running_mean, running_var, momentum, eps, relu)
        ctx.save_for_backward(x, y if relu else None, weight, mean, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        x, y, weight, mean, rstd = ctx.saved_tensors
        needs_x, needs_residual, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        dx, dresidual, dweight, dbias = _backward(grads[0], x, y, weight, mean, rstd, needs_residual)
        return (
            dx if needs_x else None,
            dresidual if needs_residual else None,
            dweight if needs_weight else None,
            dbias if needs_bias else None,
            *[None] * 5,
        )


# --- the choice -------------------------------------------------------------------------------------------------------


class Signature(NamedTuple):
    """What the choice depends on; `fits` is the reason why only the module itself can do it, or None."""

    device: str
    fits: str | None


def _signature(x: Tensor, norm: nn.Module, residual: Tensor | None = None, **_: Any) -> Signature:
    return Signature(x.device.type, _misfit(x, norm, residual))


def _misfit(x: Tensor, norm: nn.Module, residual: Tensor | None) -> str | None:
    if type(norm) is not nn.BatchNorm2d and type(norm) is not nn.BatchNorm1d:
        return f"{type(norm).__name__} is not a plain BatchNorm1d or BatchNorm2d"
    if not norm.training or norm.running_mean is None or norm.weight is None or norm.momentum is None:
        return "the norm is not in training with running statistics, weight, bias and a momentum"
    if norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks or norm._backward_pre_hooks:
        return "the norm has hooks"
    if _has_any_global_hook():
        return "hooks on all modules are registered"
    if "forward" in norm.__dict__:
        return "the norm has a forward of its own"
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"{x.dtype} is neither float32 nor bfloat16"
    if x.numel() < max(MIN_ELEMENTS, 2):
        return f"fewer than {MIN_ELEMENTS} elements"
    if x.dim() != (4 if type(norm) is nn.BatchNorm2d else 2) or not _rows(x) or x.shape[1] != norm.num_features:
        return "x is neither a channels_last map nor a contiguous matrix"
    if x.numel() == x.shape[1]:
        return "one value per channel"  # the module says that this is an error
    parts: tuple[Any, ...] = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    if any(p.dtype != torch.float32 or not p.is_contiguous() or p.device != x.device for p in parts):
        return "the norm's tensors are not contiguous float32 on the device of x"
    if residual is not None and (
        residual.shape != x.shape or residual.dtype != x.dtype or not _rows(residual) or residual.device != x.device
    ):
        return "the residual has another shape, dtype or layout than x"
    return None


def _rows(x: Tensor) -> bool:
    """Whether memory holds the channels of one position side by side, position after position."""
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.dim() == 2 and x.is_contiguous()


@functools.cache
def _native() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("fastlocal._native"), ""
    except ImportError as error:
        return None, f"the native extension is not built ({error}); python -m fastlocal.info says how"


def _reject_native(signature: Signature) -> str | None:
    if signature.device != "cpu":
        return f"it runs on the CPU, not on {signature.device}"
    return signature.fits or _native()[1] or None


_dispatch.register(
    NAME,
    _signature,
    [_dispatch.Candidate("native", _reject_native), _dispatch.Candidate("reference", lambda signature: None)],
)

# --- the CPU ----------------------------------------------------------------------------------------------------------


def _cpu_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    channels = x.shape[1]
    y = torch.empty_like(x)
    mean, rstd = weight.new_empty(channels), weight.new_empty(channels)
    native = _native()[0]
    assert native is not None
    native.bn_act_forward(
        x.data_ptr(), 0 if residual is None else residual.data_ptr(), y.data_ptr(), weight.data_ptr(), bias.data_ptr(),
        running_mean.data_ptr(), running_var.data_ptr(), mean.data_ptr(), rstd.data_ptr(), x.numel() // channels,
        channels, momentum, eps, relu, x.dtype == torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    increment_version([t for t in (running_mean, running_var) if not t.is_inference()])  # autograd sees no addresses
    return y, mean, rstd


def _cpu_backward(
    dy: Tensor, x: Tensor, y: Tensor | None, weight: Tensor, mean: Tensor, rstd: Tensor, needs_residual: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels = x.shape[1]
    if dy.dtype != x.dtype or not _rows(dy):
        dy = torch.empty_like(x).copy_(dy)
    dx = torch.empty_like(x)
    dresidual = torch.empty_like(x) if needs_residual else x.new_empty(0)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(weight)
    native = _native()[0]
    assert native is not None
    native.bn_act_backward(
        dy.data_ptr(), x.data_ptr(), 0 if y is None else y.data_ptr(), dx.data_ptr(),
        dresidual.data_ptr() if needs_residual else 0, weight.data_ptr(), mean.data_ptr(), rstd.data_ptr(),
        dweight.data_ptr(), dbias.data_ptr(), x.numel() // channels, channels, y is not None,
        x.dtype == torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    return dx, dresidual, dweight, dbias


_library.impl(f"{NAME}_forward", _cpu_forward, "CPU")
_library.impl(f"{NAME}_backward", _cpu_backward, "CPU")


@torch.library.register_fake(f"fastlocal::{NAME}_forward", lib=_library)
def _(x, residual, weight, bias, running_mean, running_var, momentum, eps, relu):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


@torch.library.register_fake(f"fastlocal::{NAME}_backward", lib=_library)
def _(dy, x, y, weight, mean, rstd, needs_residual):  # type: ignore[no-untyped-def]
    dresidual = torch.empty_like(x) if needs_residual else x.new_empty(0)
    return torch.empty_like(x), dresidual, torch.empty_like(weight), torch.empty_like(weight)
