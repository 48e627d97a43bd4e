"""The Forward-Forward loss as two operators, `torch.ops.fastlocal.goodness_loss` and `goodness_loss_backward`.

The gradient of a sample is the sample times one number, which is taken with the loss: the features (which live anyway)
and one number for each sample are all that is kept, and the gradient is one pass over them. Nothing is read back to the
host. Deterministic on every backend.

Specification: fastlocal/reference/goodness_loss.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastlocal.errors import ArgumentError
from fastlocal.ops import _dispatch
from fastlocal.ops._layout import dense, strides_agree
from fastlocal.reference._precision import wide_dtype
from fastlocal.reference.goodness_loss import closed_form, grad_of

NAME = "goodness_loss"
GOODNESS = ("mean", "sum")

_library = torch.library.Library("fastlocal", "FRAGMENT")
# factor [N]: a sample times its factor is its gradient; an empty tensor without needs_grad.
_library.define(
    f"{NAME}(Tensor h, Tensor positive, Tensor? offset, float theta, str goodness, float grad_scale, bool needs_grad, "
    "str impl) -> (Tensor loss, Tensor row_goodness, Tensor factor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# grad_loss: [], or None for one.
_library.define(
    f"{NAME}_backward(Tensor h, Tensor factor, Tensor? grad_loss, str impl) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_operator = getattr(torch.ops.fastlocal, NAME).default
_backward = getattr(torch.ops.fastlocal, f"{NAME}_backward").default


def goodness_loss(
    h: Tensor,
    positive: Tensor,
    *,
    theta: float = 2.0,
    goodness: str = "mean",
    offset: Tensor | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean of softplus(-s (g + offset - theta)) over the samples, s = 1 for positive and -1 for negative ones (Hinton, "The
    Forward-Forward Algorithm", arXiv 2212.13345), once differentiable in h.

    Args:
        h: features [N, ...], at least two dimensions, floating point, any strides. Saved for the backward as they are.
        positive: bool [N].
        theta: the threshold; with goodness="sum" the number of features of a sample is usual.
        goodness: a sample's goodness g is the "mean" or the "sum" of its squares.
        offset: [N], added to the goodness, or None: the goodness of other layers in layer collaboration (Lorberbom et
            al., arXiv 2305.12393). No gradient.
        impl: a backend for this call; None takes that of `fastlocal.backend`.

    Returns:
        loss [] and the goodness of each sample, [N], without the offset and without a gradient; both in float32
        (float64 for float64 features). The loss of an empty batch is nan.

    Raises:
        ArgumentError: shapes, dtypes or options that do not fit.
        BackendError: `impl` cannot serve the call.
    """
    _check(h, positive, offset, goodness, impl)
    if torch.is_grad_enabled() and h.requires_grad:
        return _Function.apply(h, positive, offset, theta, goodness, impl or "auto")
    return _operator(h, positive, offset, theta, goodness, 1.0, False, impl or "auto")[:2]


def goodness_loss_value_and_grad(
    h: Tensor,
    positive: Tensor,
    *,
    theta: float = 2.0,
    goodness: str = "mean",
    offset: Tensor | None = None,
    grad_scale: float = 1.0,
    impl: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with its gradient, without autograd.

    Args:
        grad_scale: multiplies the gradient, not the loss; a power of two keeps float16 gradients from underflow.
        The others are those of `goodness_loss`.

    Returns:
        loss [], goodness [N], and the gradient of h in its shape and dtype.

    Raises:
        As `goodness_loss`.
    """
    _check(h, positive, offset, goodness, impl)
    with torch.no_grad():
        loss, g, factor = _operator(h, positive, offset, theta, goodness, grad_scale, True, impl or "auto")
        return loss, g, _backward(h, factor, None, impl or "auto")


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, positive: Tensor, offset: Tensor | None, theta: float, goodness: str, impl: str
    ) -> tuple[Tensor, Tensor]:
        loss, g, factor = _operator(h, positive, offset, theta, goodness, 1.0, True, impl)
        ctx.save_for_backward(h, factor)
        ctx.mark_non_differentiable(g)
        ctx.set_materialize_grads(False)  # no zeros for the goodness
        ctx.impl = impl
        return loss, g

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        if grads[0] is None:
            return (None,) * 6
        h, factor = ctx.saved_tensors
        return _backward(h, factor, grads[0], ctx.impl), None, None, None, None, None


def _check(h: Tensor, positive: Tensor, offset: Tensor | None, goodness: str, impl: str | None) -> None:
    if h.dim() < 2 or not h.is_floating_point():
        raise ArgumentError(f"h has shape {list(h.shape)} and {h.dtype}; give a floating-point [N, ...]")
    rows = h.shape[0]
    if rows and h[:1].numel() == 0:
        raise ArgumentError(f"h has shape {list(h.shape)}: a sample is empty; give at least one feature")
    if positive.dtype != torch.bool or positive.dim() != 1 or positive.shape[0] != rows:
        raise ArgumentError(
            f"positive has shape {list(positive.shape)} and {positive.dtype}; h {list(h.shape)} takes bool [{rows}]"
        )
    if goodness not in GOODNESS:
        raise ArgumentError(f"goodness={goodness!r} is not one of {', '.join(map(repr, GOODNESS))}")
    if offset is not None:
        if not offset.is_floating_point() or offset.dim() != 1 or offset.shape[0] != rows:
            raise ArgumentError(
                f"offset has shape {list(offset.shape)} and {offset.dtype}; h {list(h.shape)} takes floating-point "
                f"[{rows}]"
            )
        if offset.requires_grad and torch.is_grad_enabled():
            raise ArgumentError("offset requires grad, and this operator has no gradient for it; detach it")
    for name, t in (("positive", positive), ("offset", offset)):
        if t is not None and t.device != h.device:
            raise ArgumentError(f"{name} is on {t.device} and h on {h.device}; move them to one device")
    if impl is not None:
        _dispatch.check_backend(impl, "impl")


class Signature(NamedTuple):
    """All that the choice of a backend depends on."""

    device: str
    triton: str | None
    dtypes: tuple[torch.dtype, ...]


def _signature(h: Tensor, positive: Tensor, *, offset: Tensor | None = None, **_: Any) -> Signature:
    device, triton = _dispatch.platform(h.device)
    return Signature(device, triton, (h.dtype,) if offset is None else (h.dtype, offset.dtype))


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


def triton_launches(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Kernels that one call of torch.ops.fastlocal.goodness_loss launches where Triton serves it."""
    h = _features(_operator, args, kwargs)
    return 1 + (len(h) > 0) + (not dense(h, 1))  # the samples, the sum, a copy


def triton_backward_launches(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The same of torch.ops.fastlocal.goodness_loss_backward."""
    h = _features(_backward, args, kwargs)
    if not len(h):
        return 0
    grad = torch.empty_like(h, device="meta")
    if not dense(grad, 1):
        return 2 + (not h.is_contiguous())
    return 1 + (not strides_agree(h, grad, 1))


def _features(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return (dict(zip((argument.name for argument in operator._schema.arguments), args)) | kwargs)["h"]


def _run(
    h: Tensor,
    positive: Tensor,
    offset: Tensor | None,
    theta: float,
    goodness: str,
    grad_scale: float,
    needs_grad: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    chosen = _dispatch.choose(NAME, _signature(h, positive, offset=offset), impl)
    factor: Tensor | None
    if chosen == "triton":
        from fastlocal.triton_kernels import goodness_loss as kernels  # Triton is optional

        h = h if dense(h, 1) else h.contiguous()
        loss, g, factor = kernels.launch(h, positive, offset, theta, goodness == "mean", grad_scale, needs_grad)
    elif chosen == "aten":
        loss, g, factor = _aten(h, positive, offset, theta, goodness, grad_scale, needs_grad)
    else:
        loss, g, factor = closed_form(h, positive, theta, goodness, offset, grad_scale)
    return loss, g, h.new_empty(0) if factor is None or not needs_grad else factor


def _fake(
    h: Tensor,
    positive: Tensor,
    offset: Tensor | None,
    theta: float,
    goodness: str,
    grad_scale: float,
    needs_grad: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = wide_dtype(h)
    g = h.new_empty(h.shape[:1], dtype=wide)
    return h.new_empty((), dtype=wide), g, torch.empty_like(g) if needs_grad else h.new_empty(0)


def _run_backward(h: Tensor, factor: Tensor, grad_loss: Tensor | None, impl: str) -> Tensor:
    grad = torch.empty_like(h)
    chosen = _dispatch.choose(NAME, _signature(h, factor), impl)
    if chosen == "triton":
        if len(h):
            _triton_backward(h, factor, grad_loss, grad)
        return grad
    scaled = factor if grad_loss is None else factor * grad_loss
    if chosen == "aten":
        return torch.mul(h, scaled.view(-1, *[1] * (h.dim() - 1)), out=grad)  # one pass: it casts as it writes
    return grad.copy_(grad_of(h, scaled))


def _triton_backward(h: Tensor, factor: Tensor, grad_loss: Tensor | None, grad: Tensor) -> None:
    from fastlocal.triton_kernels import goodness_loss as kernels

    if not dense(grad, 1):  # the samples lie between one another
        out = torch.empty(h.shape, dtype=h.dtype, device=h.device)
        kernels.launch_backward(h.contiguous(), factor, grad_loss, out)
        grad.copy_(out)
        return
    kernels.launch_backward(
        h if strides_agree(h, grad, 1) else torch.empty_like(grad).copy_(h), factor, grad_loss, grad
    )


def _fake_backward(h: Tensor, factor: Tensor, grad_loss: Tensor | None, impl: str) -> Tensor:
    return torch.empty_like(h)


_library.impl(NAME, _run, "CompositeExplicitAutograd")  # every device: _dispatch looks at where the tensors are
_library.impl(f"{NAME}_backward", _run_backward, "CompositeExplicitAutograd")
torch.library.register_fake(f"fastlocal::{NAME}", _fake, lib=_library)
torch.library.register_fake(f"fastlocal::{NAME}_backward", _fake_backward, lib=_library)


def _aten(
    h: Tensor,
    positive: Tensor,
    offset: Tensor | None,
    theta: float,
    goodness: str,
    grad_scale: float,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The closed form in few ATen calls, with one pass over the features, none of it in memory."""
    wide = wide_dtype(h)
    g = torch.linalg.vector_norm(h, dim=tuple(range(1, h.dim())), dtype=wide).square_()
    terms = h[:1].numel() if goodness == "mean" else 1
    if terms > 1:
        g.div_(terms)
    sign = torch.where(positive, -1.0, 1.0).to(wide)
    x = (g - theta if offset is None else (g + offset).sub_(theta)).mul_(sign)
    loss = F.softplus(x).mean()
    if not needs_grad:
        return loss, g, g
    return loss, g, x.sigmoid_().mul_(sign).mul_(2 * grad_scale / max(1, h.shape[0] * terms))
