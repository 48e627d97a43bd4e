"""What the kernels of SGD and AdamW share: the launch that looks at all gradients first, and what comes of it."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlocal.triton_kernels.multi_tensor import (
    BFLOAT16,
    MAX_PARTS,
    MIXED,
    Plan,
    lerp,
    read,
    rounded,
    where_am_i,
    write,
)

BLOCK_STEPS = 128  # so many steps are counted at a time
GOLDEN = tl.constexpr(0x9E3779B9)
LARGEST = tl.constexpr(torch.finfo(torch.bfloat16).max)


@triton.jit
def mix(x):
    """A hash of 32-bit integers; with `random_keys` and `random_bits` that of fastlocal/reference/rounding.py."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def random_keys(seed_low, seed_high, t, step, start):
    number = t.to(tl.uint32)
    count = step.to(tl.int32).to(tl.uint32)
    first = mix(mix(mix(seed_low.to(tl.uint32)) ^ number) ^ count)
    second = mix(mix(mix(seed_high.to(tl.uint32) ^ GOLDEN) ^ count) ^ number)
    return first, second ^ (start >> 32).to(tl.uint32)  # the same for a whole chunk


@triton.jit
def random_bits(o, first, second):
    """16 bits each in x (parameter), x >> 16 (first state), y (second state), y >> 16 (average)."""
    x = mix(mix(o.to(tl.uint32) + first) ^ second)
    return x, mix(x + GOLDEN)


@triton.jit
def drawn(codes, i, x, bits, TYPE: tl.constexpr):
    """x rounded to bfloat16 at random, if that is the dtype of tensor i: `write` then stores it as it is."""
    if TYPE == BFLOAT16 or TYPE == MIXED:  # noqa: SIM109 (Triton has no tuples of constants)
        b = x.to(tl.uint32, bitcast=True)
        b += tl.where(tl.abs(x) >= LARGEST, 0x8000, bits & 0xFFFF)  # no inf that rounding to nearest has not
        b = tl.where(x != x, 0x7FC00000, b & 0xFFFF0000)
        r = b.to(tl.float32, bitcast=True)
        if TYPE == MIXED:
            r = tl.where(tl.load(codes + i) == BFLOAT16, r, x)
        x = r
    return x


@triton.jit
def count_steps(addresses, i_steps, N, lists, programs, skip, BLOCK_T: tl.constexpr):
    """The steps are counted by the program that comes here last: all others have read theirs."""
    counter = addresses + lists * N
    tl.debug_barrier()
    if tl.atomic_add(counter, 1) == programs - 1:
        tl.store(counter, 0)
        if skip == 0:
            for first in range(0, N, BLOCK_T):
                o = first + tl.arange(0, BLOCK_T)
                m = o < N
                # A masked place reads address 0, and nothing is read there.
                p = tl.load(addresses + i_steps + o, mask=m, other=0).to(tl.pointer_type(tl.float32))
                tl.store(p, tl.load(p, mask=m, other=0.0) + 1.0, mask=m)


def halves(seed: int | None) -> tuple[int, int]:
    """The lower and the upper 32 bits, as int32: arguments of one kind whatever the seed."""
    low, high = (seed or 0) & 0xFFFFFFFF, (seed or 0) >> 32
    return low - ((low >> 31) << 32), high


@triton.jit(do_not_specialize=["first", "programs", "parts"])  # else a variant for each kind of number
def fl_gradients_kernel(
    addresses,
    sizes,
    codes,
    chunks,
    sums,  # [parts], of the squares
    flags,  # [parts] int32, whether one is not finite
    first,  # of the gradients, counted over all lists
    programs,
    parts,
    TYPE_G: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    part = tl.program_id(0)
    b_sum = tl.zeros([BLOCK], dtype=tl.float32)
    b_bad = tl.zeros([BLOCK], dtype=tl.int32)
    for i in range(part, programs, parts):
        t, start, n = where_am_i(sizes, chunks, BLOCK, i)
        o = start + tl.arange(0, BLOCK)
        m = o < n
        if start + BLOCK <= n:
            b_g = read(addresses, codes, first + t, o, m, TYPE_G, False, ALIGNED)
        else:
            b_g = read(addresses, codes, first + t, o, m, TYPE_G, True, ALIGNED)
        b_sum += b_g * b_g
        b_bad |= (b_g - b_g != 0.0).to(tl.int32)  # nan for nan and inf
    tl.store(sums + part, tl.sum(b_sum, axis=0))
    tl.store(flags + part, tl.max(b_bad, axis=0))


@triton.jit
def look(
    sums,
    flags,
    norm,
    grad_scale,
    found_inf,
    max_norm,
    parts,
    CLIP: tl.constexpr,
    CHECK: tl.constexpr,
    SCALE: tl.constexpr,
    FOUND: tl.constexpr,
    MAX_PARTS: tl.constexpr,
):
    """What a gradient is multiplied by, and whether to skip. The first program writes the norm and the flag."""
    pid = tl.program_id(0)
    factor = 1.0
    skip = pid < 0  # never
    if SCALE:
        factor = 1.0 / tl.load(grad_scale).to(tl.float32)
    if FOUND:
        skip = tl.load(found_inf) != 0.0
    o = tl.arange(0, MAX_PARTS)
    if CHECK:
        bad = tl.max(tl.load(flags + o, mask=o < parts, other=0), axis=0) != 0
        # The others may read the flag before or after it is set: they have seen the same parts.
        if (pid == 0) & bad & (skip == 0):
            tl.store(found_inf, 1.0)
        skip = skip | bad
    if CLIP:
        total = tl.sqrt(tl.sum(tl.load(sums + o, mask=o < parts, other=0.0), axis=0)) * factor
        if pid == 0:
            tl.store(norm, total)
        clip = max_norm / (total + 1e-6)
        factor = factor * tl.where(clip >= 1.0, 1.0, clip)  # nan stays
    return factor, skip


@triton.jit
def finish(
    addresses,
    codes,
    i_p,
    i_average,
    i_copy,
    o,
    m,
    b_p,
    bits,  # of the average
    weight,
    STOCHASTIC: tl.constexpr,
    AVERAGE: tl.constexpr,
    COPY: tl.constexpr,
    TYPE_P: tl.constexpr,
    TYPE_A: tl.constexpr,
    TYPE_C: tl.constexpr,
    MASKED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Writes the parameter, its average and its copy."""
    write(addresses, codes, i_p, o, m, b_p, TYPE_P, MASKED, ALIGNED)
    b_p = rounded(codes, i_p, b_p, TYPE_P)
    if AVERAGE:
        b_a = read(addresses, codes, i_average, o, m, TYPE_A, MASKED, ALIGNED)
        b_a = lerp(b_a, b_p, weight)
        if STOCHASTIC:
            b_a = drawn(codes, i_average, b_a, bits, TYPE_A)
        write(addresses, codes, i_average, o, m, b_a, TYPE_A, MASKED, ALIGNED)
    if COPY:
        write(addresses, codes, i_copy, o, m, b_p, TYPE_C, MASKED, ALIGNED)


class Before:
    """The first launch, if one is needed, and the arguments for the kernel that updates."""

    def __init__(
        self,
        plan: Plan,
        grads: int,
        device: torch.device,
        max_norm: float | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        check: bool,
    ):
        """grads: which list of the plan holds the gradients."""
        needed = max_norm is not None or check
        sums = flags = self.norm = None
        if needed:
            sums = torch.empty(plan.parts, dtype=torch.float32, device=device)
            flags = torch.empty(plan.parts, dtype=torch.int32, device=device)
            fl_gradients_kernel[(plan.parts,)](
                plan.addresses,
                plan.sizes,
                plan.codes,
                plan.chunks,
                sums,
                flags,
                grads * plan.tensors,
                plan.programs,
                plan.parts,
                TYPE_G=plan.types[grads],
                ALIGNED=plan.aligned,
                BLOCK=plan.config.block,
                num_warps=plan.config.warps,
            )
        if max_norm is not None:
            self.norm = torch.empty((), dtype=torch.float32, device=device)
        self.args = (sums, flags, self.norm, grad_scale, found_inf, float(max_norm or 0.0), plan.parts)
        self.options: dict[str, Any] = {
            "CLIP": max_norm is not None,
            "CHECK": check,
            "SCALE": grad_scale is not None,
            "FOUND": found_inf is not None,
            "MAX_PARTS": MAX_PARTS,
        }
