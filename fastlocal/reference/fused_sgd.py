"""A step of SGD on lists of tensors, in place, with all that may belong to it: the plain loop."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlocal.reference.rounding import random_bits, rounded


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of arithmetic: float64 where one of them is, else float32."""
    wide = torch.float32
    for t in tensors:
        wide = torch.promote_types(wide, t.dtype)
    return wide


def prepared_gradients(
    grads: Sequence[Tensor],
    *,
    maximize: bool,
    max_norm: float | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    check: bool,
) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """Gradients in the dtype of arithmetic, unscaled, clipped and turned round; their norm before clipping; whether to skip.

    `check` adds to `found_inf` (to 1 at least) whether a gradient is not finite.
    """
    wide = [g.to(wide_dtype(g), copy=True) for g in grads]
    if check and found_inf is not None:
        for g in wide:
            found_inf.copy_(torch.maximum(found_inf, (~g.isfinite().all()).to(found_inf)))
    if grad_scale is not None:
        wide = [g / grad_scale.to(g.dtype) for g in wide]
    norm = None
    if max_norm is not None:
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in wide]))
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        wide = [g * factor.to(g.dtype) for g in wide]
    if maximize:
        wide = [-g for g in wide]
    return wide, norm, None if found_inf is None else (found_inf != 0).reshape(())


def assign(t: Tensor, value: Tensor, skip: Tensor | None, bits: Tensor | None = None) -> None:
    """t = value in t's dtype, or nothing where skip."""
    value = rounded(value, t.dtype, bits)
    t.copy_(value if skip is None else torch.where(skip, t, value))


def follow(
    params: Sequence[Tensor],
    averages: Sequence[Tensor],
    copies: Sequence[Tensor],
    ema_decay: float | Tensor | None,
    skip: Tensor | None,
    draws: Sequence[Sequence[Tensor | None]] | None = None,
) -> None:
    """After the update: averages of the new parameters, and copies of them in another dtype."""
    for i, (p, average) in enumerate(zip(params, averages)):
        wide = wide_dtype(p, average)
        weight = 1 - ema_decay  # type: ignore[operator]
        if isinstance(weight, Tensor):
            weight = weight.to(wide).reshape(())
        assign(average, average.to(wide).lerp(p.to(wide), weight), skip, draws[i][3] if draws else None)
    for p, copy in zip(params, copies):
        assign(copy, p, skip)


def draw_bits(params: Sequence[Tensor], counts: Sequence[Tensor], seed: int | None) -> list[list[Tensor | None]]:
    """For each parameter what `random_bits` gives; without a seed None, four times. `counts`: steps, with this one."""
    if seed is None:
        return [[None] * 4 for _ in params]
    return [[*random_bits(p, seed, i, count)] for i, (p, count) in enumerate(zip(params, counts, strict=True))]


@torch.no_grad()
def fused_sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] = (),
    *,
    lr: float | Tensor,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first: bool = False,
    averages: Sequence[Tensor] = (),
    ema_decay: float | Tensor | None = None,
    copies: Sequence[Tensor] = (),
    max_norm: float | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    check: bool = False,
    steps: Sequence[Tensor] = (),
    rounding: str = "nearest",
    seed: int = 0,
) -> Tensor | None:
    """See `fastlocal.ops.fused_sgd_`. Every tensor is rounded once, when it is written; the average is that of the
    parameter as it was written."""
    if not params:
        return None if max_norm is None else torch.zeros(())
    wide, norm, skip = prepared_gradients(
        grads, maximize=maximize, max_norm=max_norm, grad_scale=grad_scale, found_inf=found_inf, check=check
    )
    draws = draw_bits(params, [step + 1 for step in steps], seed if rounding == "stochastic" else None)
    for i, (p, g) in enumerate(zip(params, wide, strict=True)):
        value = p.to(wide_dtype(p, g))
        g = g.to(value.dtype)
        if weight_decay:
            g = g + weight_decay * value
        if momentum_buffers:
            buffer = g if first else momentum * momentum_buffers[i].to(value.dtype) + (1 - dampening) * g
            g = g + momentum * buffer if nesterov else buffer
            assign(momentum_buffers[i], buffer, skip, draws[i][1])
        rate = lr.to(value.dtype).reshape(()) if isinstance(lr, Tensor) else lr
        assign(p, value - rate * g, skip, draws[i][0])
    for step in steps:
        assign(step, step + 1, skip)
    follow(params, averages, copies, ema_decay, skip, draws)
    return norm
