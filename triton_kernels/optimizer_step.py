"""What the kernels of SGD and AdamW share: the launch that looks at all gradients first, and what comes of it."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlocal.triton_kernels.multi_tensor import (
    MAX_PARTS,
    Plan,
    lerp,
    read,
    rounded,
    where_am_i,
    write,
)


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
    weight,
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
        write(addresses, codes, i_average, o, m, lerp(b_a, b_p, weight), TYPE_A, MASKED, ALIGNED)
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
