"""BatchNorm + residual + activation as one operator: forward, backward, and a folded form for evaluation.

Saved for backward: the input, mean and 1/std, and where an activation follows a residual that, by alias (it lives anyway
as another operator's output) or one bit for each element; never the output. "native" serves channels_last maps and
matrices on a CPU (csrc/bn_act.cpp) and saves the output in the residual's place, which the next convolution there saves
anyway. Deterministic on every backend (the CPU's for a given number of threads). Specification: fastlocal/reference/bn_act.py.

The gradient that comes in is never overwritten: whether autograd hands the same tensor to another operator (an addition
does), to a hook or to the caller cannot be known here. `bn_act_conv` overwrites it, because there it is its own.
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

from fastlocal.errors import ArgumentError, did_you_mean
from fastlocal.ops import _dispatch
from fastlocal.reference.bn_act import bn_act as plain

NAME = "bn_act"
ACTS = ("relu", "leaky_relu", "none")
SAVES = ("residual", "mask")
MIN_ELEMENTS = 1 << 15  # native: below, one autograd.Function costs more than the passes that it saves
ONE_LAUNCH = 1 << 15  # Triton: up to so many elements a program takes whole channels, and one launch does all
BITS = 8  # of a byte of the mask

_aten = torch.ops.aten
_library = torch.library.Library("fastlocal", "FRAGMENT")
_NORMS = (
    "Tensor weight, Tensor bias, Tensor(a!) running_mean, Tensor(b!) running_var, float momentum, float eps, "
    "Tensor? weight2, Tensor? bias2, Tensor(c!)? running_mean2, Tensor(d!)? running_var2, float momentum2, float eps2"
)
_library.define(
    f"{NAME}_forward(Tensor x, Tensor? residual, {_NORMS}, str act, float slope, bool mask, str impl) "
    "-> (Tensor y, Tensor stats, Tensor mask)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"{NAME}_backward(Tensor dy, Tensor x, Tensor? residual, Tensor? y, Tensor? mask, Tensor weight, Tensor bias, "
    "Tensor? weight2, Tensor? bias2, Tensor stats, str act, float slope, bool need_x, bool need_residual, str impl) "
    "-> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# dy becomes dx; `again` asks for the activation.
_library.define(
    f"{NAME}_backward_(Tensor(a!) dy, Tensor x, Tensor weight, Tensor bias, Tensor stats, str act, float slope, "
    "bool again, str impl) -> (Tensor dweight, Tensor dbias, Tensor activation)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"{NAME}_eval(Tensor x, Tensor? residual, Tensor weight, Tensor bias, Tensor running_mean, Tensor running_var, "
    "float eps, Tensor? weight2, Tensor? bias2, Tensor? running_mean2, Tensor? running_var2, float eps2, str act, "
    "float slope, str impl) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_forward = torch.ops.fastlocal.bn_act_forward.default
_backward = torch.ops.fastlocal.bn_act_backward.default
_backward_ = torch.ops.fastlocal.bn_act_backward_.default
_eval = torch.ops.fastlocal.bn_act_eval.default


def bn_act(
    x: Tensor,
    norm: nn.Module,
    residual: Tensor | None = None,
    *,
    act: str = "relu",
    slope: float = 0.01,
    residual_norm: nn.Module | None = None,
    save: str = "residual",
    impl: str | None = None,
) -> Tensor:
    """``act(norm(x) + residual)`` or ``act(norm(x) + residual_norm(residual))``, differentiable once where it is fused.

    Args:
        x: ``[N, C]`` or ``[N, C, *spatial]``; any strides, fused without a copy where contiguous or channels_last.
        norm: the normalisation module. A plain BatchNorm without hooks can be fused, in training, and in evaluation where
            no gradient is recorded; any other module is called.
        residual: of ``x``'s shape, or None. It is not changed.
        act: "relu", "leaky_relu" or "none".
        slope: of "leaky_relu" below zero.
        residual_norm: a second BatchNorm for the residual, with statistics of its own (a projection shortcut), or None.
        save: what tells backward where the activation was on after a residual without a norm: "residual", by alias, or
            "mask", one bit for each element, where the residual would otherwise be freed.
        impl: a backend for this call; None takes that of `fastlocal.backend`.

    Returns:
        A new tensor of ``x``'s shape, dtype and layout. The running statistics are updated as by calling the modules.

    Raises:
        ArgumentError: no such activation, `save` or backend; `residual_norm` without a residual.
        BackendError: `impl` cannot serve the call.
    """
    if act not in ACTS:
        raise ArgumentError(f"act={act!r} is not an activation. {did_you_mean(str(act), ACTS)}")
    if save not in SAVES:
        raise ArgumentError(f"save={save!r} is not one of {', '.join(map(repr, SAVES))}")
    if residual_norm is not None and residual is None:
        raise ArgumentError("residual_norm normalises the residual, and there is none; give one")
    if impl is not None:
        _dispatch.check_backend(impl, "impl")
    chosen = choice(NAME, signature(x, norm, residual, act=act, residual_norm=residual_norm, save=save), impl)
    if chosen == "reference":
        return plain(x, norm, residual, act=act, slope=slope, residual_norm=residual_norm)
    x = dense(x)
    if residual is not None:
        residual = like(residual, x)
    first = norm.weight, norm.bias, norm.running_mean, norm.running_var
    second: tuple[Any, ...] = (None,) * 4
    eps2 = momentum2 = 0.0
    if residual_norm is not None:
        second = residual_norm.weight, residual_norm.bias, residual_norm.running_mean, residual_norm.running_var
        eps2, momentum2 = residual_norm.eps, residual_norm.momentum  # type: ignore[assignment]
    if not norm.training:
        return _eval(x, residual, *first, norm.eps, *second, eps2, act, slope, chosen)
    count(norm)
    if residual_norm is not None:
        count(residual_norm)
    bits = save == "mask" and act != "none" and residual is not None and residual_norm is None
    numbers = norm.momentum, norm.eps, momentum2, eps2
    return _Function.apply(
        x, residual, *first[:2], *second[:2], *first[2:], *second[2:], *numbers, act, slope, bits, chosen
    )  # type: ignore[no-any-return]


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        weight2: Tensor | None,
        bias2: Tensor | None,
        mean: Tensor,
        var: Tensor,
        mean2: Tensor | None,
        var2: Tensor | None,
        momentum: float,
        eps: float,
        momentum2: float,
        eps2: float,
        act: str,
        slope: float,
        bits: bool,
        impl: str,
    ) -> Tensor:
        y, stats, mask = _forward(
            x, residual, weight, bias, mean, var, momentum, eps, weight2, bias2, mean2, var2, momentum2, eps2, act,
            slope, bits, impl,
        )  # fmt: skip
        on = act != "none"
        ctx.save_for_backward(
            x,
            residual if weight2 is not None or (on and not bits and impl != "native") else None,
            y if on and impl == "native" else None,
            mask if bits else None,
            weight,
            bias,
            weight2,
            bias2,
            stats,
        )
        ctx.options = act, slope, impl
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        act, slope, impl = ctx.options
        needs = ctx.needs_input_grad[:6]
        two = ctx.saved_tensors[6] is not None
        passed = act == "none" and not two  # the residual's gradient is the one that comes in
        need_residual = needs[1] and not passed
        out = _backward(grads[0], *ctx.saved_tensors, act, slope, needs[0], need_residual, impl)
        maps = iter(out[4 if two else 2 :])
        dx = next(maps) if needs[0] else None
        dresidual = next(maps) if need_residual else grads[0] if needs[1] else None
        own = [d if need else None for d, need in zip(out[: 4 if two else 2], needs[2:])]
        return dx, dresidual, *own, *[None] * (16 - len(own))


# --- the choice -------------------------------------------------------------------------------------------------------


class Signature(NamedTuple):
    """What the choice depends on: `misfit` is the reason why only the modules can do it, `native` that against "native"."""

    device: str
    triton: str | None
    dtype: torch.dtype
    misfit: str | None
    native: str | None


def signature(
    x: Tensor,
    norm: nn.Module,
    residual: Tensor | None = None,
    *,
    act: str = "relu",
    slope: float = 0.01,
    residual_norm: nn.Module | None = None,
    save: str = "residual",
) -> Signature:
    device, triton = (x.device.type, None) if torch.compiler.is_compiling() else _dispatch.platform(x.device)
    misfit = _misfit(x, norm, residual)
    if misfit is None and residual_norm is not None and residual is not None:
        misfit = _misfit(residual, residual_norm, x)
        if misfit is None and norm.training != residual_norm.training:
            misfit = "one norm is in training and the other is not"
    native = _native_misfit(x, norm, residual, act, residual_norm, save) if misfit is None and device == "cpu" else None
    return Signature(device, triton, x.dtype, misfit, native)


def _misfit(x: Tensor, norm: nn.Module, residual: Tensor | None) -> str | None:
    kind = type(norm)
    if kind is not nn.BatchNorm2d and kind is not nn.BatchNorm1d and kind is not nn.BatchNorm3d:
        return f"{kind.__name__} is not a plain BatchNorm1d, BatchNorm2d or BatchNorm3d"
    mean, var, weight, bias = norm.running_mean, norm.running_var, norm.weight, norm.bias
    if mean is None or var is None or weight is None or bias is None or norm.momentum is None:
        return "the norm is without running statistics, weight, bias or a momentum"
    if plainly_called(norm) is not None:
        return plainly_called(norm)
    recorded = not norm.training and torch.is_grad_enabled()
    if recorded and any(t is not None and t.requires_grad for t in (x, residual, weight, bias)):
        return "the norm is not in training, and gradients are recorded"
    if not x.is_floating_point():
        return f"{x.dtype} is not a floating-point dtype"
    dim = x.dim()
    if dim != 4 if kind is nn.BatchNorm2d else dim != 5 if kind is nn.BatchNorm3d else dim != 2 and dim != 3:
        return "x has a number of dimensions that the norm does not take"  # the module says so
    if x.shape[1] != norm.num_features:
        return "x has another number of channels than the norm"
    values = x.numel()
    if values == 0 or (norm.training and values == x.shape[1]):
        return "no or one value per channel"  # the module says that this is an error
    dtype = weight.dtype
    if not (bias.dtype == mean.dtype == var.dtype == dtype) or (dtype != x.dtype and dtype != torch.float32):
        return "the norm's tensors are neither all float32 nor all of the dtype of x"
    if dtype != x.dtype and x.dtype == torch.float64:
        return "x is float64 and the norm is not"
    tensors: tuple[Any, ...] = (weight, bias, mean, var)
    for p in tensors:
        if p.device != x.device or not p.is_contiguous():
            return "the norm's tensors are not contiguous on the device of x"
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device):
        return "the residual has another shape, dtype or device than x"
    return None


def plainly_called(module: nn.Module) -> str | None:
    """The reason why calling the module is more than its class's forward (hooks, a forward of its own), or None."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"{type(module).__name__} has hooks"
    if _has_any_global_hook():
        return "hooks on all modules are registered"
    if "forward" in module.__dict__:
        return f"{type(module).__name__} has a forward of its own"
    return None


def _native_misfit(
    x: Tensor, norm: nn.Module, residual: Tensor | None, act: str, residual_norm: nn.Module | None, save: str
) -> str | None:
    if act == "leaky_relu" or residual_norm is not None or save != "residual":
        return "it has no leaky_relu, residual_norm or mask"
    if not norm.training:
        return "the norm is not in training"
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"{x.dtype} is neither float32 nor bfloat16"
    if norm.weight.dtype != torch.float32:
        return "the norm's tensors are not float32"
    if x.numel() < MIN_ELEMENTS:
        return f"fewer than {MIN_ELEMENTS} elements"
    if (x.dim() != 2 and x.dim() != 4) or not _rows(x):
        return "x is neither a channels_last map nor a contiguous matrix"
    if residual is not None and not _rows(residual):
        return "the residual has another layout than x"
    return None


def _rows(x: Tensor) -> bool:
    """Whether memory holds the channels of one position side by side, position after position."""
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    if x.dim() == 5:
        return x.is_contiguous(memory_format=torch.channels_last_3d)
    return x.dim() == 2 and x.is_contiguous()


def dense(x: Tensor) -> Tensor:
    """x, copied where it is neither contiguous nor channels_last."""
    return x if x.is_contiguous() or _rows(x) else x.contiguous()


def same_layout(t: Tensor, x: Tensor) -> bool:
    return t.is_contiguous() if x.is_contiguous() else _rows(t)


def like(t: Tensor, x: Tensor) -> Tensor:
    """t in the layout of x, which is dense; copied where it is not."""
    if same_layout(t, x):
        return t
    if x.is_contiguous():
        return t.contiguous()
    return t.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


def count(norm: nn.Module) -> None:
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)  # type: ignore[operator]


def choice(operator: str, s: Signature, impl: str | None) -> str:
    """The backend. Compiled code asks when it runs, inside the operator, so that here only the modules are ruled out."""
    impl = impl or "auto"
    if not torch.compiler.is_compiling() or impl == "native" or (s.misfit is not None and impl != "auto"):
        return _dispatch.choose(operator, s, impl)
    return "reference" if s.misfit is not None else impl


@functools.cache
def _native() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("fastlocal._native"), ""
    except ImportError as error:
        return None, f"the native extension is not built ({error}); python -m fastlocal.info says how"


def _reject_native(s: Signature) -> str | None:
    if s.misfit is not None:
        return s.misfit
    if s.device != "cpu":
        return f"it runs on the CPU, not on {s.device}"
    return s.native or _native()[1] or None


def reject_triton(s: Signature) -> str | None:
    if s.misfit is not None:
        return s.misfit
    if s.triton is not None:
        return s.triton
    if s.dtype == torch.float64:
        return "float64; the kernel accumulates in float32"
    if s.device == "cpu" and s.dtype == torch.bfloat16:
        return "bfloat16, which the Triton interpreter computes wrongly; give float32"
    return None


# "auto" on a CPU takes the modules before "aten", which saves memory but not time there.
_dispatch.register(
    NAME,
    signature,
    [
        _dispatch.Candidate("native", _reject_native),
        _dispatch.Candidate("triton", reject_triton),
        _dispatch.Candidate("reference", lambda s: None),
        _dispatch.Candidate("aten", lambda s: s.misfit),
    ],
)


def resolved(x: Tensor, impl: str) -> str:
    """What serves the operator itself: "native", "triton" or "aten"."""
    if impl == "auto":
        device, triton = _dispatch.platform(x.device)
        impl = _dispatch.choose(NAME, Signature(device, triton, x.dtype, None, "compiled code saves no output"), impl)
    return "aten" if impl == "reference" else impl


# --- shapes -----------------------------------------------------------------------------------------------------------


def geometry(x: Tensor) -> tuple[int, int, int]:
    """(A, C, S) of a dense x: it lies in memory as [A, C, S]. Channels_last maps and matrices have S = 1."""
    channels = x.shape[1]
    if x.is_contiguous():
        return x.shape[0], channels, x.numel() // (x.shape[0] * channels)
    return x.numel() // channels, channels, 1


def mask_shape(x: Tensor) -> tuple[int, int, int]:
    outer, channels, inner = geometry(x)
    return -(-outer // BITS), channels, inner


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def one_launch(shape: tuple[int, int, int]) -> bool:
    """Whether a program takes whole channels of [A, C, S]: it does statistics and all that follows in one launch."""
    outer, _, inner = shape
    return outer * inner <= ONE_LAUNCH // (1 if inner > 1 else 16)  # a matrix is read 16 channels wide at least


def forward_launches(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Kernels that a call of torch.ops.fastlocal.bn_act_forward launches where Triton serves it."""
    return 1 if one_launch(geometry((*args, *kwargs.values())[0])) else 2


def backward_launches(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The same of bn_act_backward, and of bn_act_backward_."""
    dy, x = (*args, *kwargs.values())[:2]
    return (1 if one_launch(geometry(x)) else 2) + (not same_layout(dy, x))  # a gradient in another layout is copied


def _new(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=x.device)


def _written(*tensors: Tensor | None) -> None:
    """Tells autograd, which sees neither addresses nor kernels."""
    increment_version([t for t in tensors if t is not None and not t.is_inference()])


def _kernels() -> Any:
    from fastlocal.triton_kernels import bn_act as kernels  # Triton is optional

    return kernels


# --- implementations --------------------------------------------------------------------------------------------------


# fmt: off
def _run_forward(x, residual, weight, bias, mean, var, momentum, eps, weight2, bias2, mean2, var2, momentum2, eps2, act, slope, mask, impl):  # type: ignore[no-untyped-def]
    # fmt: on
    impl = resolved(x, impl)
    _written(mean, var, mean2, var2)
    if impl == "native":
        y, stats = _native_forward(x, residual, weight, bias, mean, var, momentum, eps, act == "relu")
        return y, stats, _new(x, (0,), torch.uint8)
    if impl == "triton":
        shape = geometry(x)
        bits = _new(x, mask_shape(x) if mask else (0,), torch.uint8)
        y, stats = _kernels().forward(
            x, residual, weight, bias, mean, var, momentum, eps, weight2, bias2, mean2, var2, momentum2, eps2, act, slope,
            bits if mask else None, shape, one_launch(shape),
        )  # fmt: skip
        return y, stats, bits
    y, *stats = _aten_norm(x, weight, bias, mean, var, momentum, eps)
    if residual is not None:
        if weight2 is not None:
            added, *more = _aten_norm(residual, weight2, bias2, mean2, var2, momentum2, eps2)
            stats += more
        else:
            added = residual
        y.add_(added)
    bits = _pack(y, x) if mask else _new(x, (0,), torch.uint8)
    return _act_(y, act, slope), torch.stack(stats), bits


# fmt: off
def _run_backward(dy, x, residual, y, mask, weight, bias, weight2, bias2, stats, act, slope, need_x, need_residual, impl):  # type: ignore[no-untyped-def]
    # fmt: on
    impl = resolved(x, impl)
    if impl == "native":
        return _native_backward(dy, x, y, weight, stats, need_x, need_residual)
    dy = like(dy, x)
    if impl == "triton":
        shape = geometry(x)
        maps = [torch.empty_like(x) if need else None for need in (need_x, need_residual)]
        grads = _kernels().backward(
            dy, x, residual, mask, weight, bias, weight2, bias2, stats, act, slope, *maps, None, shape, one_launch(shape)
        )
        return grads + [t for t in maps if t is not None]
    if mask is not None:
        g = torch.where(_unpack(mask, x), dy, dy * slope if act == "leaky_relu" else 0)
    elif act == "none":
        g = dy
    else:
        z = _aten_apply(x, weight, bias, stats)
        if residual is not None:
            z.add_(residual if weight2 is None else _aten_apply(residual, weight2, bias2, stats[2:]))
        g = _act_backward(dy, z, act, slope)
    dx, dweight, dbias = _aten_norm_backward(g, x, weight, stats, need_x)
    out = [dweight, dbias]
    if weight2 is not None:
        g, dweight2, dbias2 = _aten_norm_backward(g, residual, weight2, stats[2:], need_residual)
        out += [dweight2, dbias2]
    if need_x:
        out.append(dx)
    if need_residual:
        out.append(g.clone() if g is dy else g)
    return out


def _run_backward_(dy, x, weight, bias, stats, act, slope, again, impl):  # type: ignore[no-untyped-def]
    impl = resolved(x, impl)
    _written(dy)
    if impl == "triton":
        shape = geometry(x)
        activation = torch.empty_like(x) if again else None
        dweight, dbias = _kernels().backward(
            dy, x, None, None, weight, bias, None, None, stats, act, slope, dy, None, activation, shape, one_launch(shape)
        )
        return dweight, dbias, _new(x, (0,), x.dtype) if activation is None else activation
    z = _aten_apply(x, weight, bias, stats)
    g = dy if act == "none" else _act_backward(dy, z, act, slope)
    dx, dweight, dbias = _aten_norm_backward(g, x, weight, stats, True)
    dy.copy_(dx)
    return dweight, dbias, _act_(z, act, slope) if again else _new(x, (0,), x.dtype)


def _run_eval(x, residual, weight, bias, mean, var, eps, weight2, bias2, mean2, var2, eps2, act, slope, impl):  # type: ignore[no-untyped-def]
    if resolved(x, impl) == "triton":
        return _kernels().evaluate(
            x, residual, weight, bias, mean, var, eps, weight2, bias2, mean2, var2, eps2, act, slope, geometry(x)
        )
    y = _aten.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)[0]
    if residual is not None:
        if weight2 is not None:
            residual = _aten.native_batch_norm(residual, weight2, bias2, mean2, var2, False, 0.0, eps2)[0]
        y.add_(residual)
    return _act_(y, act, slope)


def _aten_norm(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, momentum: float, eps: float) -> Any:
    """Normalised x, mean, 1/std; running statistics are updated. Parameters in half precision are widened, as the statistics
    that come out would be in half precision too."""
    if weight.dtype == wide(x.dtype):
        return _aten.native_batch_norm(x, weight, bias, mean, var, True, momentum, eps)
    running = mean.float(), var.float()
    out = _aten.native_batch_norm(x, weight.float(), bias.float(), *running, True, momentum, eps)
    mean.copy_(running[0])
    var.copy_(running[1])
    return out


def _aten_apply(x: Tensor, weight: Tensor, bias: Tensor, stats: Tensor) -> Tensor:
    """What `_aten_norm` returned first, from the statistics that it returned: as in evaluation with a variance of one."""
    dtype = wide(x.dtype)
    one = torch.ones_like(stats[0])
    return _aten.native_batch_norm(x, weight.to(dtype) * stats[1], bias.to(dtype), stats[0], one, False, 0.0, 0.0)[0]


def _aten_norm_backward(g: Tensor, x: Tensor, weight: Tensor, stats: Tensor, need_x: bool) -> Any:
    """dx (None where not needed), dweight, dbias."""
    dx, dweight, dbias = _aten.native_batch_norm_backward(
        g, x, weight.to(wide(x.dtype)), None, None, stats[0], stats[1], True, 0.0, [need_x, True, True]
    )
    return dx, dweight.to(weight.dtype), dbias.to(weight.dtype)


def _act_(z: Tensor, act: str, slope: float) -> Tensor:
    return z.relu_() if act == "relu" else _aten.leaky_relu_(z, slope) if act == "leaky_relu" else z


def _act_backward(dy: Tensor, z: Tensor, act: str, slope: float) -> Tensor:
    if act == "relu":
        return _aten.threshold_backward(dy, z, 0)
    return _aten.leaky_relu_backward(dy, z, slope, False)


def _pack(z: Tensor, x: Tensor) -> Tensor:
    """Bit i of byte [a, c, s] is whether the activation of [8 a + i, c, s] is on (a nan is: a ReLU lets its gradient pass)."""
    outer, channels, inner = geometry(x)
    groups = -(-outer // BITS)
    on = _new(x, (groups * BITS, channels, inner), torch.uint8)
    on[:outer] = ~(_flat(z) <= 0)
    on[outer:] = 0
    weights = torch.tensor([1 << i for i in range(BITS)], dtype=torch.uint8, device=x.device).view(1, BITS, 1, 1)
    return (on.view(groups, BITS, channels, inner) * weights).sum(1, dtype=torch.uint8)


def _unpack(mask: Tensor, x: Tensor) -> Tensor:
    outer, channels, inner = geometry(x)
    shifts = torch.arange(BITS, dtype=torch.uint8, device=x.device).view(1, BITS, 1, 1)
    on = (mask[:, None] >> shifts & 1).view(-1, channels, inner)[:outer].to(torch.bool)
    out = torch.empty_like(x, dtype=torch.bool)
    _flat(out).copy_(on)
    return out


def _flat(x: Tensor) -> Tensor:
    """[A, C, S], a view."""
    outer, channels, inner = geometry(x)
    if x.is_contiguous():
        return x.view(outer, channels, inner)
    return x.movedim(1, -1).view(outer, channels, 1)


# --- the CPU ----------------------------------------------------------------------------------------------------------


def _native_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    channels = x.shape[1]
    y = torch.empty_like(x)
    mean, rstd = stats = weight.new_empty(2, channels)
    native = _native()[0]
    assert native is not None
    native.bn_act_forward(
        x.data_ptr(), 0 if residual is None else residual.data_ptr(), y.data_ptr(), weight.data_ptr(), bias.data_ptr(),
        running_mean.data_ptr(), running_var.data_ptr(), mean.data_ptr(), rstd.data_ptr(), x.numel() // channels,
        channels, momentum, eps, relu, x.dtype == torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    return y, stats


def _native_backward(
    dy: Tensor, x: Tensor, y: Tensor | None, weight: Tensor, stats: Tensor, need_x: bool, need_residual: bool
) -> list[Tensor]:
    channels = x.shape[1]
    if dy.dtype != x.dtype or not _rows(dy):
        dy = torch.empty_like(x).copy_(dy)
    dx = torch.empty_like(x)
    dresidual = torch.empty_like(x) if need_residual else None
    dweight, dbias = torch.empty_like(weight), torch.empty_like(weight)
    native = _native()[0]
    assert native is not None
    native.bn_act_backward(
        dy.data_ptr(), x.data_ptr(), 0 if y is None else y.data_ptr(), dx.data_ptr(),
        0 if dresidual is None else dresidual.data_ptr(), weight.data_ptr(), stats[0].data_ptr(), stats[1].data_ptr(),
        dweight.data_ptr(), dbias.data_ptr(), x.numel() // channels, channels, y is not None,
        x.dtype == torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    return [dweight, dbias, *([dx] if need_x else []), *([] if dresidual is None else [dresidual])]


# --- registration -----------------------------------------------------------------------------------------------------


def _fake_forward(x, residual, weight, bias, mean, var, momentum, eps, weight2, *more):  # type: ignore[no-untyped-def]
    mask = more[-2]
    stats = _new(x, (2 if weight2 is None else 4, x.shape[1]), wide(x.dtype))
    return torch.empty_like(x), stats, _new(x, mask_shape(x) if mask else (0,), torch.uint8)


# fmt: off
def _fake_backward(dy, x, residual, y, mask, weight, bias, weight2, bias2, stats, act, slope, need_x, need_residual, impl):  # type: ignore[no-untyped-def]
    # fmt: on
    params = [weight, weight] if weight2 is None else [weight, weight, weight2, weight2]
    return [torch.empty_like(p) for p in params] + [torch.empty_like(x) for need in (need_x, need_residual) if need]


def _fake_backward_(dy, x, weight, bias, stats, act, slope, again, impl):  # type: ignore[no-untyped-def]
    return (
        torch.empty_like(weight),
        torch.empty_like(weight),
        torch.empty_like(x) if again else _new(x, (0,), x.dtype),
    )


def _fake_eval(x, *_):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


for _suffix, _function, _fake in (
    ("forward", _run_forward, _fake_forward),
    ("backward", _run_backward, _fake_backward),
    ("backward_", _run_backward_, _fake_backward_),
    ("eval", _run_eval, _fake_eval),
):
    _library.impl(f"{NAME}_{_suffix}", _function, "CompositeExplicitAutograd")  # every device: `impl` says what serves
    torch.library.register_fake(f"fastlocal::{NAME}_{_suffix}", _fake, lib=_library)
