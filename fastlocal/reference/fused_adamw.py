"""A step of AdamW on lists of tensors, in place, with all that may belong to it: the plain loop."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlocal.reference.fused_sgd import assign, draw_bits, follow, prepared_gradients, wide_dtype


@torch.no_grad()
def fused_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    maximize: bool = False,
    averages: Sequence[Tensor] = (),
    ema_decay: float | Tensor | None = None,
    copies: Sequence[Tensor] = (),
    max_norm: float | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    check: bool = False,
    rounding: str = "nearest",
    seed: int = 0,
) -> Tensor | None:
    """See `fastlocal.ops.fused_adamw_` (Loshchilov and Hutter: Decoupled Weight Decay Regularization, 2019). Every tensor
    is rounded once, when it is written; the corrections of the biases are computed in float64."""
    if not params:
        return None if max_norm is None else torch.zeros(())
    wide, norm, skip = prepared_gradients(
        grads, maximize=maximize, max_norm=max_norm, grad_scale=grad_scale, found_inf=found_inf, check=check
    )
    beta1, beta2 = betas
    draws = draw_bits(params, [step + 1 for step in steps], seed if rounding == "stochastic" else None)
    for p, g, m, v, step, bits in zip(params, wide, exp_avgs, exp_avg_sqs, steps, draws, strict=True):
        value = p.to(wide_dtype(p, g))
        dtype = value.dtype
        g = g.to(dtype)
        assign(step, step + 1, skip)
        count = step.double()
        corrections = [(1 - torch.pow(torch.full_like(count, beta), count)).to(dtype) for beta in betas]
        rate = lr.to(dtype).reshape(()) if isinstance(lr, Tensor) else lr
        mean = m.to(dtype).lerp(g, 1 - beta1)
        square = beta2 * v.to(dtype) + (1 - beta2) * g * g
        value = value * (1 - rate * weight_decay)
        value = value - rate / corrections[0] * mean / (square.sqrt() / corrections[1].sqrt() + eps)
        assign(m, mean, skip, bits[1])
        assign(v, square, skip, bits[2])
        assign(p, value, skip, bits[0])
    follow(params, averages, copies, ema_decay, skip, draws)
    return norm
