"""Exponential moving average of lists of tensors, in place: the plain loop."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def ema_update_(averages: Sequence[Tensor], sources: Sequence[Tensor], decay: float | Tensor) -> None:
    """``average = decay * average + (1 - decay) * source`` for floating-point tensors, ``average = source`` for others.

    Computed as ``average + (1 - decay) * (source - average)`` in float32 (float64 where one of the two is), and rounded
    once. ``1 - decay`` is taken in the dtype of decay: float64 for a number.
    """
    for average, source in zip(averages, sources, strict=True):
        if not average.is_floating_point():
            average.copy_(source)
            continue
        wide = torch.promote_types(torch.promote_types(average.dtype, source.dtype), torch.float32)
        weight = (1 - decay).to(average.device, wide).reshape(()) if isinstance(decay, Tensor) else 1 - decay
        average.copy_(average.to(wide).lerp(source.to(wide), weight))
