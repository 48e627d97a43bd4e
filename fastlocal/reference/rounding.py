"""Rounding to bfloat16 up or down at random, so that the mean is the value (Gupta et al.: Deep Learning with Limited Numerical
Precision, 2015). The bits depend on nothing but a seed, a tensor's number, its step and the element: the Triton kernels
draw the same.

The generator is a hash of 32-bit integers: two rounds of lowbias32 (Wellons, github.com/skeeto/hash-prospector) over the
element's number under two keys, one more round for further bits. The keys are such hashes of seed, tensor and step.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
GOLDEN = 0x9E3779B9

Number = TypeVar("Number", int, Tensor)


def mix(x: Number) -> Number:
    """lowbias32 of 0 <= x < 2**32, in int64: a product that overflows keeps its lower bits."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & MASK
    return x ^ (x >> 16)


def places(t: Tensor) -> Tensor:
    """Where each element lies, counted from the tensor's first, int64: kernels number elements so."""
    out = torch.zeros(t.shape, dtype=torch.int64, device=t.device)
    for d, (n, stride) in enumerate(zip(t.shape, t.stride())):
        out += (torch.arange(n, device=t.device) * stride).view([-1 if i == d else 1 for i in range(t.dim())])
    return out


def random_bits(p: Tensor, seed: int, number: int, step: Tensor) -> list[Tensor]:
    """Four times 16 bits for each element of p, int64: for the parameter, its first and second state, its average."""
    count = step.to(torch.int64).reshape(())
    element = places(p)
    first = mix(mix(mix(seed & MASK) ^ number) ^ count)
    second = mix(mix(mix((seed >> 32) ^ GOLDEN) ^ count) ^ number) ^ (element >> 32)
    x = mix(mix((element + first) & MASK) ^ second)
    y = mix((x + GOLDEN) & MASK)
    return [x & 0xFFFF, x >> 16, y & 0xFFFF, y >> 16]


def rounded(value: Tensor, dtype: torch.dtype, bits: Tensor | None) -> Tensor:
    """value in dtype: at random where that is bfloat16 and there are bits, else to nearest.

    The bits are added below bfloat16's mantissa, and the sum is cut off. Beyond the largest finite number it is rounded to
    nearest: no sum turns into inf that would not anyway. inf and nan stay.
    """
    if bits is None or dtype != torch.bfloat16:
        return value.to(dtype)
    value = value.to(torch.float32)
    pattern = value.view(torch.int32).to(torch.int64)
    bits = torch.where(value.abs() >= torch.finfo(torch.bfloat16).max, 0x8000, bits)
    pattern = torch.where(value.isnan(), 0x7FC0, (pattern + bits) >> 16)
    return pattern.to(torch.int16).view(torch.bfloat16)
