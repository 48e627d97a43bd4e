"""The reconstruction loss of a decoder as two operators, `torch.ops.fastlocal.reconstruction_loss` and its backward.

The logits and the image are kept as they are (a decoder's logits in half precision are half of the sigmoid in float32
that plain PyTorch keeps), and the gradient is one pass over them. Nothing is read back to the host. Deterministic on
every backend.

Specification: fastlocal/reference/reconstruction_loss.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastlocal.errors import ArgumentError
from fastlocal.ops import _dispatch
from fastlocal.ops._layout import arranged_like, dense, strides_agree
from fastlocal.reference._precision import wide_dtype
from fastlocal.reference.reconstruction_loss import reconstruction_loss as specification

NAME = "reconstruction_loss"

_library = torch.library.Library("fastlocal", "FRAGMENT")
_library.define(f"{NAME}(Tensor logits, Tensor image, str impl) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
# grad_loss: [], or None for one; the result is in the logits' dtype and strides.
_library.define(
    f"{NAME}_backward(Tensor logits, Tensor image, Tensor? grad_loss, float grad_scale, str impl) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_operator = getattr(torch.ops.fastlocal, NAME).default
_backward = getattr(torch.ops.fastlocal, f"{NAME}_backward").default


def reconstruction_loss(logits: Tensor, image: Tensor, *, grad_scale: float = 1.0, impl: str | None = None) -> Tensor:
    """Mean binary cross-entropy between sigmoid(logits) and an image (InfoPro, Wang et al., ICLR 2021), differentiable in
    the logits, once by a fused backend.

    The logarithms are clamped at -100, as `torch.nn.BCELoss` does, so the gradient vanishes where the sigmoid saturates.

    Args:
        logits: any shape, floating point, any strides. Saved for the backward as they are, like the image.
        image: the same shape, floating point, in [0, 1] (not checked: that would read it back). No gradient.
        grad_scale: multiplies the gradient, not the loss: the weight of this loss in a sum, without a launch of its own.
        impl: a backend for this call; None takes that of `fastlocal.backend`.

    Returns:
        The mean over all elements, [], in float32 (float64 for float64 logits); nan without elements.

    Raises:
        ArgumentError: shapes, dtypes or options that do not fit.
        BackendError: `impl` cannot serve the call.
    """
    _check(logits, image, impl)
    # Compiled code chooses when it runs, inside the operators.
    if (
        grad_scale == 1.0
        and not torch.compiler.is_compiling()
        and _dispatch.choose(NAME, _signature(logits, image), impl or "auto") == "reference"
    ):
        return specification(logits, image)
    if torch.is_grad_enabled() and logits.requires_grad:
        return _Function.apply(logits, image, grad_scale, impl or "auto")
    return _operator(logits, image, impl or "auto")


def reconstruction_loss_value_and_grad(
    logits: Tensor, image: Tensor, *, grad_scale: float = 1.0, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """The same with its gradient, without autograd.

    Args:
        grad_scale: multiplies the gradient, not the loss; a power of two keeps float16 gradients from underflow.
        The others are those of `reconstruction_loss`.

    Returns:
        loss [], and the gradient of the logits in their shape and dtype.

    Raises:
        As `reconstruction_loss`.
    """
    _check(logits, image, impl)
    with torch.no_grad():
        loss = _operator(logits, image, impl or "auto")
        return loss, _backward(logits, image, None, grad_scale, impl or "auto")


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, image: Tensor, grad_scale: float, impl: str) -> Tensor:
        ctx.save_for_backward(logits, image)
        ctx.grad_scale, ctx.impl = grad_scale, impl
        return _operator(logits, image, impl)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        logits, image = ctx.saved_tensors
        return _backward(logits, image, grads[0], ctx.grad_scale, ctx.impl), None, None, None


def _check(logits: Tensor, image: Tensor, impl: str | None) -> None:
    if image.shape != logits.shape:
        raise ArgumentError(f"image has shape {list(image.shape)} and logits {list(logits.shape)}; give equal shapes")
    low = (torch.float16, torch.bfloat16, torch.float32)
    if not all(t.dtype in low for t in (logits, image)) and logits.dtype != torch.float64:
        raise ArgumentError(
            f"logits and image are {logits.dtype} and {image.dtype}; give float16, bfloat16 or float32, or float64 logits"
        )
    if not image.is_floating_point():
        raise ArgumentError(f"image is {image.dtype}; give floating point in [0, 1]")
    if image.requires_grad and torch.is_grad_enabled():
        raise ArgumentError("image requires grad, and this operator has no gradient for it; detach it")
    if image.device != logits.device:
        raise ArgumentError(f"image is on {image.device} and logits on {logits.device}; move them to one device")
    if impl is not None:
        _dispatch.check_backend(impl, "impl")


class Signature(NamedTuple):
    """All that the choice of a backend depends on."""

    device: str
    triton: str | None
    dtypes: tuple[torch.dtype, torch.dtype]


def _signature(logits: Tensor, image: Tensor, *_: Any, **__: Any) -> Signature:
    device, triton = _dispatch.platform(logits.device)
    return Signature(device, triton, (logits.dtype, image.dtype))


def _reject_triton(s: Signature) -> str | None:
    if s.triton is not None:
        return s.triton
    if torch.float64 in s.dtypes:
        return "float64; the kernel computes in float32"
    if s.device == "cpu" and torch.bfloat16 in s.dtypes:
        return "bfloat16, which the Triton interpreter computes wrongly; give float32"
    return None


# On a CPU the specification is as fast (3 % faster), and autograd's own.
_dispatch.register(
    NAME,
    _signature,
    [
        _dispatch.Candidate("triton", _reject_triton),
        _dispatch.Candidate("reference", lambda s: None),
        _dispatch.Candidate("aten", lambda s: None),
    ],
)


def triton_launches(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Kernels that one call of torch.ops.fastlocal.reconstruction_loss launches where Triton serves it."""
    logits, image = _named(_operator, args, kwargs, "logits", "image")
    copies = not dense(logits)
    return 1 + (logits.numel() > 0) + copies + (not strides_agree(image, logits.contiguous() if copies else logits))


def triton_backward_launches(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The same of torch.ops.fastlocal.reconstruction_loss_backward."""
    logits, image = _named(_backward, args, kwargs, "logits", "image")
    if not logits.numel():
        return 0
    grad = torch.empty_like(logits, device="meta")
    return 1 + (not strides_agree(logits, grad)) + (not strides_agree(image, grad))


def _named(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *names: str) -> list[Any]:
    call = dict(zip((argument.name for argument in operator._schema.arguments), args)) | kwargs
    return [call[name] for name in names]


def _run(logits: Tensor, image: Tensor, impl: str) -> Tensor:
    if _dispatch.choose(NAME, _signature(logits, image), impl) == "triton":
        from fastlocal.triton_kernels import reconstruction_loss as kernels  # Triton is optional

        logits = logits if dense(logits) else logits.contiguous()
        return kernels.launch(logits, arranged_like(image, logits))
    return specification(logits, image)  # in ATen nothing is shorter


def _fake(logits: Tensor, image: Tensor, impl: str) -> Tensor:
    return logits.new_empty((), dtype=wide_dtype(logits))


def _run_backward(logits: Tensor, image: Tensor, grad_loss: Tensor | None, grad_scale: float, impl: str) -> Tensor:
    grad = torch.empty_like(logits)
    if _dispatch.choose(NAME, _signature(logits, image), impl) == "triton":
        from fastlocal.triton_kernels import reconstruction_loss as kernels

        if logits.numel():
            kernels.launch_backward(
                arranged_like(logits, grad), arranged_like(image, grad), grad_loss, grad_scale, grad
            )
        return grad
    # The calls that autograd makes for the specification, whichever other backend was asked for.
    wide = wide_dtype(logits)
    if grad_loss is None:
        one = torch.full((), grad_scale, dtype=wide, device=logits.device)
    else:
        one = grad_loss if grad_scale == 1.0 else grad_loss * grad_scale
    p = torch.sigmoid(logits.to(wide))
    wide_grad = torch.ops.aten.binary_cross_entropy_backward(one, p, image.to(wide), None, 1)
    # In place, or one pass that casts as it writes.
    out = wide_grad if logits.dtype == wide and wide_grad.stride() == logits.stride() else grad
    return torch.ops.aten.sigmoid_backward.grad_input(wide_grad, p, grad_input=out)


def _fake_backward(logits: Tensor, image: Tensor, grad_loss: Tensor | None, grad_scale: float, impl: str) -> Tensor:
    return torch.empty_like(logits)


_library.impl(NAME, _run, "CompositeExplicitAutograd")  # every device: _dispatch looks at where the tensors are
_library.impl(f"{NAME}_backward", _run_backward, "CompositeExplicitAutograd")
torch.library.register_fake(f"fastlocal::{NAME}", _fake, lib=_library)
torch.library.register_fake(f"fastlocal::{NAME}_backward", _fake_backward, lib=_library)
