"""BatchNorm + activation + convolution (or linear layer) that keeps no activation.

Saved for backward: the BatchNorm's input, mean and 1/std, and the weights (under autocast the cast weight, as autocast
saves). The activation is a temporary of forward, and of backward where the weight needs its gradient: backward takes the
gradient of the activation from the convolution, then one call of `bn_act`'s backward turns it into that of the input, in
place, and writes the activation again; then comes the gradient of the weight. The convolutions are PyTorch's. As
deterministic as these. Specification: fastlocal/reference/bn_act_conv.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastlocal.errors import ArgumentError, did_you_mean
from fastlocal.ops import _dispatch
from fastlocal.ops._needs import needed
from fastlocal.ops.bn_act import ACTS, Signature, bn_act, choice, count, dense, like, plainly_called, reject_triton
from fastlocal.ops.bn_act import signature as norm_signature

NAME = "bn_act_conv"

_aten = torch.ops.aten
_forward = torch.ops.fastlocal.bn_act_forward.default
_backward_ = torch.ops.fastlocal.bn_act_backward_.default


def bn_act_conv(
    x: Tensor, norm: nn.Module, conv: nn.Module, *, act: str = "relu", slope: float = 0.01, impl: str | None = None
) -> Tensor:
    """``conv(act(norm(x)))``, differentiable once where it is fused.

    Args:
        x: ``[N, C]`` or ``[N, C, *spatial]``; any strides, fused without a copy where contiguous or channels_last.
        norm: the normalisation module. A plain BatchNorm in training without hooks can be fused; with any other module,
            `fastlocal.ops.bn_act` is called, then ``conv``.
        conv: an nn.Conv2d padded by numbers with zeros, or an nn.Linear on ``[N, C]``; without hooks. Any other module is
            called.
        act: "relu", "leaky_relu" or "none".
        slope: of "leaky_relu" below zero.
        impl: a backend for this call; None takes that of `fastlocal.backend`.

    Returns:
        What ``conv`` returns, under autocast too. The running statistics are updated once, as by calling the norm.

    Raises:
        ArgumentError: no such activation or backend.
        BackendError: `impl` cannot serve the call.
    """
    if act not in ACTS:
        raise ArgumentError(f"act={act!r} is not an activation. {did_you_mean(str(act), ACTS)}")
    if impl is not None:
        _dispatch.check_backend(impl, "impl")
    chosen = choice(NAME, signature(x, norm, conv), impl)
    if chosen == "reference" or not torch.is_grad_enabled():
        return conv(bn_act(x, norm, act=act, slope=slope, impl=impl))  # nothing is saved there
    count(norm)
    geometry: tuple[Any, ...] = ()
    if type(conv) is nn.Conv2d:
        geometry = conv.stride, conv.padding, conv.dilation, conv.groups
    parameters = norm.weight, norm.bias, conv.weight, conv.bias
    statistics = norm.running_mean, norm.running_var, norm.momentum, norm.eps
    return _Function.apply(dense(x), *parameters, *statistics, act, slope, geometry, chosen)  # type: ignore[no-any-return]


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        momentum: float,
        eps: float,
        act: str,
        slope: float,
        geometry: tuple[Any, ...],
        impl: str,
    ) -> Tensor:
        activation, stats, _ = _forward(
            x, None, norm_weight, norm_bias, mean, var, momentum, eps, None, None, None, None, 0.0, 0.0, act, slope,
            False, impl,
        )  # fmt: skip
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        weight = weight.to(x.dtype)  # as autocast would
        bias = None if bias is None else bias.to(x.dtype)
        if geometry:
            stride, padding, dilation, groups = geometry
            y = _aten.convolution(activation, weight, bias, stride, padding, dilation, False, (0, 0), groups)
        else:
            y = torch.nn.functional.linear(activation, weight, bias)
        ctx.save_for_backward(x, norm_weight, norm_bias, weight, stats)
        ctx.options = act, slope, geometry, impl
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        (dy,) = grads
        x, norm_weight, norm_bias, weight, stats = ctx.saved_tensors
        act, slope, geometry, impl = ctx.options
        need_x, need_norm_weight, need_norm_bias, need_weight, need_bias = needed(ctx, 5)
        if geometry:
            dx = _convolution_backward(dy, x, weight, geometry, [True, False, False])[0]  # of x only the shape is used
        else:
            dx = dy @ weight
        dx = like(dx, x)  # the activation's gradient now, and nobody else's
        dnorm_weight, dnorm_bias, activation = _backward_(
            dx, x, norm_weight, norm_bias, stats, act, slope, need_weight, impl
        )
        dweight = dbias = None
        if geometry and (need_weight or need_bias):
            wanted = [False, need_weight, need_bias]
            _, dweight, dbias = _convolution_backward(dy, activation if need_weight else x, weight, geometry, wanted)
        elif not geometry:
            dweight = dy.t() @ activation if need_weight else None
            dbias = dy.sum(0) if need_bias else None
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            dx if need_x else None,
            dnorm_weight if need_norm_weight else None,
            dnorm_bias if need_norm_bias else None,
            None if dweight is None else dweight.to(weight_dtype),
            None if dbias is None else dbias.to(bias_dtype),
            *[None] * 8,
        )


def _convolution_backward(
    dy: Tensor, x: Tensor, weight: Tensor, geometry: tuple[Any, ...], wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    stride, padding, dilation, groups = geometry
    return _aten.convolution_backward(
        dy, x, weight, [weight.shape[0]], stride, padding, dilation, False, (0, 0), groups, wanted
    )


def signature(x: Tensor, norm: nn.Module, conv: nn.Module, **_: Any) -> Signature:
    s = norm_signature(x, norm)
    if s.misfit is None and not norm.training:
        return s._replace(misfit="the norm is not in training")
    return s if s.misfit is not None else s._replace(misfit=_misfit(x, conv))


def _misfit(x: Tensor, conv: nn.Module) -> str | None:
    kind = type(conv)
    if kind is nn.Conv2d:
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            return f"padding {conv.padding!r} of mode {conv.padding_mode!r}; it takes numbers and zeros"
        if x.dim() != 4 or x.shape[1] != conv.in_channels:
            return "x is no map of as many channels as the convolution takes"
    elif kind is nn.Linear:
        if x.dim() != 2 or x.shape[1] != conv.in_features:
            return "x is no matrix of as many columns as the linear layer takes"
    else:
        return f"{kind.__name__} is neither a plain Conv2d nor a plain Linear"
    if (why := plainly_called(conv)) is not None:
        return why
    device = x.device.type
    weight, bias = conv.weight, conv.bias
    if weight.device != x.device or (bias is not None and bias.device != x.device):
        return "the weight is on another device than x"
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        if torch.get_autocast_dtype(device) != x.dtype:
            return f"autocast would convert the activation, which has the dtype of x, {x.dtype}"
    elif weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        return "the weight has another dtype than x"
    return None


_dispatch.register(
    NAME,
    signature,
    [
        _dispatch.Candidate("triton", reject_triton),
        _dispatch.Candidate("reference", lambda s: None),
        _dispatch.Candidate("aten", lambda s: s.misfit),
    ],
)
