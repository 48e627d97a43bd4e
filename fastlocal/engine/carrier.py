"""Level A: gradients taken in forward, delivered by the ``loss.backward()`` of any trainer.

Precedent: Liger's fused linear cross-entropy, which computes gradients in forward and multiplies them by ``grad_output``
in backward. Here the whole local step is that operator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _Carrier(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, grads: list[Tensor | None], *params: nn.Parameter) -> Tensor:
        ctx.grads = grads
        return total.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError(
                "loss.backward(): the gradients of this forward were delivered already and their graphs are gone; "
                "call the model again before another backward"
            )
        scale = grad_outputs[0]
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for g in grads:
            if g is not None:
                by_dtype.setdefault(g.dtype, []).append(g)
        for dtype, group in by_dtype.items():
            torch._foreach_mul_(group, scale.to(dtype))
        return (None, None, *grads)


def carry(total: Tensor, grads: list[Tensor | None], params: list[nn.Parameter]) -> Tensor:
    """A loss of value ``total`` whose backward adds ``grads * grad_output`` to ``params``. ``grads`` is consumed.

    Gradients of half-precision parameters may be handed over in float32; autograd casts them when it delivers.
    """
    return _Carrier.apply(total, grads, *params)  # type: ignore[no-any-return]


class LossScale:
    """A power of two per block that keeps fp16 gradients, which are taken before the trainer's scaler acts, in range.

    Lives on the device: it halves when a gradient overflows and doubles after 2,000 clean steps, without a host sync.
    The infinite gradient itself is handed on, so the trainer's scaler sees it and skips the step.
    """

    def __init__(self, blocks: int, device: torch.device, start: float = 2.0**14):
        self.scale = [torch.full((), start, device=device) for _ in range(blocks)]
        self.good = [torch.zeros((), dtype=torch.int32, device=device) for _ in range(blocks)]

    def unscale(self, k: int, grads: list[Tensor | None]) -> list[Tensor | None]:
        """Divides by block k's scale in float32, and adapts the scale."""
        wide = [None if g is None else g.float() for g in grads]
        found = torch.zeros((), device=self.scale[k].device)
        real = [g for g in wide if g is not None]
        if real:
            torch._amp_foreach_non_finite_check_and_unscale_(real, found, self.scale[k].reciprocal())
        torch._amp_update_scale_(self.scale[k], self.good[k], found, 2.0, 0.5, 2000)
        return wide
