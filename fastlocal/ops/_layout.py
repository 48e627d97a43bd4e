"""In which order a tensor's elements lie in memory, for kernels that walk it so."""

from __future__ import annotations

import torch
from torch import Tensor


def strides_agree(a: Tensor, b: Tensor, first: int = 0) -> bool:
    """Whether elements lie in the same order from dimension `first` on; the stride of a single element says nothing."""
    sizes = a.shape[first:]
    return all(s == t or size <= 1 for s, t, size in zip(a.stride()[first:], b.stride()[first:], sizes))


def dense(t: Tensor, first: int = 0) -> bool:
    """Whether dimensions from `first` on fill one piece of memory, in whatever order."""
    expected = 1
    for stride, size in sorted((t.stride(d), t.shape[d]) for d in range(first, t.dim()) if t.shape[d] != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def arranged_like(t: Tensor, model: Tensor) -> Tensor:
    """`t`, copied where its elements lie in another order than those of `model`, which is dense."""
    return t if strides_agree(t, model) else torch.empty_like(model, dtype=t.dtype).copy_(t)
