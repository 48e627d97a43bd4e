"""BatchNorm + residual + activation: statistics and apply, both reductions and dx, and the folded form of evaluation.

A map lies in memory as [A, C, S]: A images of S positions, or (channels_last, matrices) A rows and S = 1. A program takes
a block of channels and a range of tiles [BA, BC, BS]. Where it takes whole channels one launch does everything; else a
first launch writes partial sums, and in a second one every program adds up those of its channels. Variances are sums of
squared differences from a mean (of the channel, or of the part, then merged), never a difference of squares. Float32
accumulation, no atomics: results are bit-reproducible.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlocal.triton_kernels import configs

# Left to itself, ptxas spills a register or two here to fit one block more.
OPTIONS = {} if torch.version.hip else {"maxnreg": 128}
RELU, LEAKY = tl.constexpr(1), tl.constexpr(2)
_ACTS = {"none": 0, "relu": 1, "leaky_relu": 2}
PROGRAMS = 528  # of the two launches: four for each multiprocessor of a large device
MAX_PARTS = 256  # of a channel, added up by every program


class Config(NamedTuple):
    """Launch configuration: a tile (powers of two), warps, and into how many parts a channel is divided."""

    block_a: int
    block_c: int
    block_s: int
    warps: int
    parts: int


def config(outer: int, channels: int, inner: int, single: bool, bits: bool = False, programs: int = PROGRAMS) -> Config:
    """Pure choice of the launch configuration.

    Tiles hold 8 elements a thread and lie along what is contiguous: positions, or channels where there is one position;
    at least 32 elements side by side where there are as many.

    Args:
        outer, channels, inner: A, C, S.
        single: one program takes whole channels.
        bits: tiles are at least 8 rows high, as a byte of the mask is.
        programs: how many are wanted where one does not take whole channels.
    """
    wanted = 4096 if single and outer * inner >= 16384 else 2048
    low = 8 if bits else 1
    if inner == 1:
        block_s, block_c = 1, min(triton.next_power_of_2(channels), 16 if single else 64)
    else:
        widths = [w for w in (1024, 512, 256, 128, 64) if w * low <= wanted]
        widths = [min(w, triton.next_power_of_2(inner)) for w in widths]
        padding = [triton.cdiv(inner, w) * w - inner for w in widths]
        # The widest that wastes less than an eighth; where all waste more, the least.
        block_s = next((w for w, p in zip(widths, padding) if p * 8 <= inner), widths[padding.index(min(padding))])
        block_c = min(triton.next_power_of_2(channels), max(1, 32 // block_s))
    block_a = max(low, min(triton.next_power_of_2(outer), wanted // (block_c * block_s)))
    warps = max(1, min(16, block_a * block_c * block_s // 256))
    if single:
        return Config(block_a, block_c, block_s, warps, 1)
    tiles = triton.cdiv(outer, block_a) * triton.cdiv(inner, block_s)
    parts = min(tiles, MAX_PARTS, triton.cdiv(programs, triton.cdiv(channels, block_c)))
    return Config(block_a, block_c, block_s, warps, parts)


# --- pieces -----------------------------------------------------------------------------------------------------------


@triton.jit
def place(t, o_c, A, C, S, tiles_s, BA: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr):
    """Offsets of tile t, which elements exist, and the first row."""
    first = (t // tiles_s) * BA
    o_a = (first + tl.arange(0, BA))[:, None, None]
    o_s = ((t % tiles_s) * BS + tl.arange(0, BS))[None, None, :]
    c = o_c[None, :, None]
    m = (o_a < A) & (c < C) & (o_s < S)
    return (o_a.to(tl.int64) * C + c) * S + o_s, m, first  # [BA, BC, BS]


@triton.jit
def total(b):
    """[BA, BC, BS] -> [BC]"""
    return tl.sum(tl.sum(b, axis=2), axis=0)


@triton.jit
def moments(x, o_c, begin, end, A, C, S, tiles_s, BA: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr):
    """Number, mean and sum of squared differences from it of the tiles begin to end, the last two [BC]."""
    count = 0
    b_sum = tl.zeros([BA, BC, BS], dtype=tl.float32)
    for t in range(begin, end):
        o, m, first = place(t, o_c, A, C, S, tiles_s, BA, BC, BS)
        b_sum += tl.load(x + o, mask=m, other=0.0).to(tl.float32)
        count += tl.minimum(A - first, BA) * tl.minimum(S - (t % tiles_s) * BS, BS)
    n = count.to(tl.float32)  # type: ignore[attr-defined]
    mean = total(b_sum) / n
    b_off = tl.zeros([BA, BC, BS], dtype=tl.float32)
    b_squares = tl.zeros([BA, BC, BS], dtype=tl.float32)
    for t in range(begin, end):
        o, m, first = place(t, o_c, A, C, S, tiles_s, BA, BC, BS)
        b_x = tl.load(x + o, mask=m, other=0.0).to(tl.float32)
        b_d = tl.where(m, b_x - mean[None, :, None], 0.0)
        b_off += b_d
        b_squares += b_d * b_d
    off = total(b_off)  # what rounding left out of the mean
    return n, mean + off / n, total(b_squares) - off * (off / n)


@triton.jit
def column(p, i: tl.constexpr, first, P, o_c, C, K: tl.constexpr, BP: tl.constexpr):
    """Sum i of the parts from first on, of partial sums [P, K, C]: [BP, BC]"""
    o_p = first + tl.arange(0, BP)[:, None]
    m = (o_p < P) & (o_c < C)[None, :]
    return tl.load(p + (o_p * K + i).to(tl.int64) * C + o_c[None, :], mask=m, other=0.0)


@triton.jit
def added(p, i: tl.constexpr, P, o_c, C, K: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr):
    """Sum i over all parts: [BC]"""
    b_sum = tl.zeros([BP, BC], dtype=tl.float32)
    for first in range(0, P, BP):
        b_sum += column(p, i, first, P, o_c, C, K, BP)
    return tl.sum(b_sum, axis=0)


@triton.jit
def merged(p, i: tl.constexpr, P, o_c, C, M, K: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr):
    """Mean and sum of squared differences of all parts, from the sums i to i + 2."""
    start = tl.load(p + (i + 1) * C + o_c, mask=o_c < C, other=0.0)  # the mean of the first part
    b_off = tl.zeros([BP, BC], dtype=tl.float32)
    for first in range(0, P, BP):
        b_off += column(p, i, first, P, o_c, C, K, BP) * (column(p, i + 1, first, P, o_c, C, K, BP) - start[None, :])
    mean = start + tl.sum(b_off, axis=0) / M
    b_squares = tl.zeros([BP, BC], dtype=tl.float32)
    for first in range(0, P, BP):
        b_d = column(p, i + 1, first, P, o_c, C, K, BP) - mean[None, :]
        b_squares += column(p, i + 2, first, P, o_c, C, K, BP) + column(p, i, first, P, o_c, C, K, BP) * b_d * b_d
    return mean, tl.sum(b_squares, axis=0)


@triton.jit
def parameter(p, o_c, C):
    return tl.load(p + o_c, mask=o_c < C, other=0.0).to(tl.float32)


@triton.jit
def finished(
    mean, squares, stats, running_mean, running_var, o_c, C, M, kept, momentum, eps, unbiased, writes, row: tl.constexpr
):  # fmt: skip
    """1/std; one program for each channel writes mean, 1/std and the running statistics."""
    rstd = 1.0 / tl.sqrt_rn(squares / M + eps)
    if writes:
        m = o_c < C
        tl.store(stats + row * C + o_c, mean, mask=m)
        tl.store(stats + (row + 1) * C + o_c, rstd, mask=m)
        old_mean, old_var = parameter(running_mean, o_c, C), parameter(running_var, o_c, C)
        new_mean, new_var = kept * old_mean + momentum * mean, kept * old_var + momentum * (squares / unbiased)
        tl.store(running_mean + o_c, new_mean.to(running_mean.dtype.element_ty), mask=m)
        tl.store(running_var + o_c, new_var.to(running_var.dtype.element_ty), mask=m)
    return rstd


@triton.jit
def activated(b_z, slope, ACT: tl.constexpr):
    if ACT == RELU:
        return tl.where(b_z < 0.0, 0.0, b_z)  # a nan stays
    elif ACT == LEAKY:
        return tl.where(b_z > 0.0, b_z, b_z * slope)
    else:
        return b_z


@triton.jit
def applied(
    x, residual, y, mask, o_c, mean, scale, shift, mean2, scale2, shift2, begin, end, A, C, S, tiles_s, slope,
    ACT: tl.constexpr, RESIDUAL: tl.constexpr, BITS: tl.constexpr, BA: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """act((x - mean) * scale + shift + ...) of the tiles begin to end, and a bit for each where that sum is above zero."""
    for t in range(begin, end):
        o, m, first = place(t, o_c, A, C, S, tiles_s, BA, BC, BS)
        b_z = (tl.load(x + o, mask=m, other=0.0).to(tl.float32) - mean[None, :, None]) * scale[None, :, None]
        b_z += shift[None, :, None]
        if RESIDUAL > 0:
            b_r = tl.load(residual + o, mask=m, other=0.0).to(tl.float32)
            if RESIDUAL == 2:
                b_r = (b_r - mean2[None, :, None]) * scale2[None, :, None] + shift2[None, :, None]
            b_z += b_r
        tl.store(y + o, activated(b_z, slope, ACT).to(y.dtype.element_ty), mask=m)
        if BITS:
            b_on = tl.where((b_z <= 0.0) | ~m, 0, 1)  # a nan is on: a ReLU lets its gradient pass
            b_on = tl.reshape(b_on, [BA // 8, 8, BC, BS]) << tl.arange(0, 8)[None, :, None, None]
            o_a = (first // 8 + tl.arange(0, BA // 8))[:, None, None]
            o_s = ((t % tiles_s) * BS + tl.arange(0, BS))[None, None, :]
            c = o_c[None, :, None]
            m_b = (o_a * 8 < A) & (c < C) & (o_s < S)
            tl.store(mask + (o_a.to(tl.int64) * C + c) * S + o_s, tl.sum(b_on, axis=1).to(tl.uint8), mask=m_b)


# --- forward ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["tiles_s", "tiles", "per_part"])
def fl_bn_act_stats_kernel(
    x,
    residual,
    partials,  # [P, 3 or 6, C]: number, mean, sum of squared differences
    A,
    C,
    S,
    tiles_s,
    tiles,
    per_part,
    TWO: tl.constexpr,
    BA: tl.constexpr,
    BC: tl.constexpr,
    BS: tl.constexpr,
):
    part = tl.program_id(1)
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    m_c = o_c < C
    begin = part * per_part
    end = tl.minimum(begin + per_part, tiles)
    n, mean, squares = moments(x, o_c, begin, end, A, C, S, tiles_s, BA, BC, BS)
    p = partials + part.to(tl.int64) * (6 if TWO else 3) * C + o_c
    tl.store(p, tl.zeros([BC], dtype=tl.float32) + n, mask=m_c)
    tl.store(p + C, mean, mask=m_c)
    tl.store(p + 2 * C, squares, mask=m_c)
    if TWO:
        n, mean, squares = moments(residual, o_c, begin, end, A, C, S, tiles_s, BA, BC, BS)
        tl.store(p + 3 * C, tl.zeros([BC], dtype=tl.float32) + n, mask=m_c)
        tl.store(p + 4 * C, mean, mask=m_c)
        tl.store(p + 5 * C, squares, mask=m_c)


@triton.jit(do_not_specialize=["tiles_s", "tiles", "per_part", "P"])
def fl_bn_act_fwd_kernel(
    x,
    residual,
    y,
    mask,
    weight,
    bias,
    running_mean,
    running_var,
    weight2,
    bias2,
    running_mean2,
    running_var2,
    stats,  # [2 or 4, C]: mean, 1/std
    partials,  # read where SINGLE is false
    A,
    C,
    S,
    tiles_s,
    tiles,
    per_part,
    P,
    M,
    unbiased,
    kept,
    momentum,
    eps,
    kept2,
    momentum2,
    eps2,
    slope,
    SINGLE: tl.constexpr,
    ACT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BITS: tl.constexpr,
    BA: tl.constexpr,
    BC: tl.constexpr,
    BS: tl.constexpr,
    BP: tl.constexpr,
):
    part = tl.program_id(1)
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    begin = part * per_part
    end = tl.minimum(begin + per_part, tiles)
    if SINGLE:
        _, mean, squares = moments(x, o_c, begin, end, A, C, S, tiles_s, BA, BC, BS)
    else:
        mean, squares = merged(partials, 0, P, o_c, C, M, 6 if RESIDUAL == 2 else 3, BP, BC)
    writes = part == 0
    rstd = finished(
        mean, squares, stats, running_mean, running_var, o_c, C, M, kept, momentum, eps, unbiased, writes, 0
    )  # fmt: skip
    scale, shift = rstd * parameter(weight, o_c, C), parameter(bias, o_c, C)
    mean2 = mean
    scale2 = mean
    shift2 = mean
    if RESIDUAL == 2:
        if SINGLE:
            _, mean2, squares2 = moments(residual, o_c, begin, end, A, C, S, tiles_s, BA, BC, BS)
        else:
            mean2, squares2 = merged(partials, 3, P, o_c, C, M, 6, BP, BC)
        rstd2 = finished(
            mean2, squares2, stats, running_mean2, running_var2, o_c, C, M, kept2, momentum2, eps2, unbiased, writes, 2
        )  # fmt: skip
        scale2, shift2 = rstd2 * parameter(weight2, o_c, C), parameter(bias2, o_c, C)
    applied(
        x, residual, y, mask, o_c, mean, scale, shift, mean2, scale2, shift2, begin, end, A, C, S, tiles_s, slope,
        ACT, RESIDUAL, BITS, BA, BC, BS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tiles_s", "tiles", "per_part"])
def fl_bn_act_eval_kernel(
    x,
    residual,
    y,
    weight,
    bias,
    running_mean,
    running_var,
    weight2,
    bias2,
    running_mean2,
    running_var2,
    A,
    C,
    S,
    tiles_s,
    tiles,
    per_part,
    eps,
    eps2,
    slope,
    ACT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BA: tl.constexpr,
    BC: tl.constexpr,
    BS: tl.constexpr,
):
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    begin = tl.program_id(1) * per_part
    end = tl.minimum(begin + per_part, tiles)
    mean = parameter(running_mean, o_c, C)
    scale = parameter(weight, o_c, C) / tl.sqrt_rn(parameter(running_var, o_c, C) + eps)
    shift = parameter(bias, o_c, C)
    mean2 = mean
    scale2 = mean
    shift2 = mean
    if RESIDUAL == 2:
        mean2 = parameter(running_mean2, o_c, C)
        scale2 = parameter(weight2, o_c, C) / tl.sqrt_rn(parameter(running_var2, o_c, C) + eps2)
        shift2 = parameter(bias2, o_c, C)
    applied(
        x, residual, y, None, o_c, mean, scale, shift, mean2, scale2, shift2, begin, end, A, C, S, tiles_s, slope,
        ACT, RESIDUAL, False, BA, BC, BS,
    )  # fmt: skip


# --- backward ---------------------------------------------------------------------------------------------------------


@triton.jit
def gradient(
    dy, x, residual, mask, t, o_c, mean, scale, shift, mean2, scale2, shift2, A, C, S, tiles_s, slope,
    ACT: tl.constexpr, RESIDUAL: tl.constexpr, BITS: tl.constexpr, AGAIN: tl.constexpr,
    BA: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """The gradient before the activation, x and the residual less their means, the sum that was activated, of tile t."""
    o, m, first = place(t, o_c, A, C, S, tiles_s, BA, BC, BS)
    b_g = tl.load(dy + o, mask=m, other=0.0).to(tl.float32)
    b_d = tl.load(x + o, mask=m, other=0.0).to(tl.float32) - mean[None, :, None]
    b_e = b_d
    b_z = b_d
    if BITS:
        o_a = (first + tl.arange(0, BA))[:, None, None]
        o_s = ((t % tiles_s) * BS + tl.arange(0, BS))[None, None, :]
        p = mask + ((o_a // 8).to(tl.int64) * C + o_c[None, :, None]) * S + o_s
        b_on = (tl.load(p, mask=m, other=0).to(tl.int32) >> (o_a % 8)) & 1
        b_g = tl.where(b_on == 1, b_g, b_g * slope if ACT == LEAKY else 0.0)
    elif ACT > 0 or AGAIN:
        b_z = b_d * scale[None, :, None] + shift[None, :, None]
        if RESIDUAL > 0:
            b_e = tl.load(residual + o, mask=m, other=0.0).to(tl.float32)
            if RESIDUAL == 2:
                b_e -= mean2[None, :, None]
                b_z += b_e * scale2[None, :, None] + shift2[None, :, None]
            else:
                b_z += b_e
        if ACT == RELU:
            b_g = tl.where(b_z <= 0.0, 0.0, b_g)
        elif ACT == LEAKY:
            b_g = tl.where(b_z > 0.0, b_g, b_g * slope)
    elif RESIDUAL == 2:
        b_e = tl.load(residual + o, mask=m, other=0.0).to(tl.float32) - mean2[None, :, None]
    return b_g, b_d, b_e, b_z, o, m


@triton.jit
def sums(
    dy, x, residual, mask, begin, end, o_c, mean, scale, shift, mean2, scale2, shift2, A, C, S, tiles_s, slope,
    ACT: tl.constexpr, RESIDUAL: tl.constexpr, BITS: tl.constexpr,
    BA: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Sums of g, g (x - mean) and g (residual - mean2) over the tiles begin to end, each [BC]."""
    b_sum = tl.zeros([BA, BC, BS], dtype=tl.float32)
    b_dot = tl.zeros([BA, BC, BS], dtype=tl.float32)
    b_dot2 = tl.zeros([BA, BC, BS], dtype=tl.float32)
    for t in range(begin, end):
        b_g, b_d, b_e, _, _, _ = gradient(
            dy, x, residual, mask, t, o_c, mean, scale, shift, mean2, scale2, shift2, A, C, S, tiles_s, slope,
            ACT, RESIDUAL, BITS, False, BA, BC, BS,
        )  # fmt: skip
        b_sum += b_g
        b_dot += b_g * b_d
        if RESIDUAL == 2:
            b_dot2 += b_g * b_e
    dot = total(b_dot)
    dot2 = dot
    if RESIDUAL == 2:
        dot2 = total(b_dot2)
    return total(b_sum), dot, dot2


@triton.jit
def constants(stats, weight, bias, o_c, C, row: tl.constexpr):
    mean, rstd = parameter(stats + row * C, o_c, C), parameter(stats + (row + 1) * C, o_c, C)
    return mean, rstd, rstd * parameter(weight, o_c, C), parameter(bias, o_c, C)


@triton.jit(do_not_specialize=["tiles_s", "tiles", "per_part"])
def fl_bn_act_sums_kernel(
    dy,
    x,
    residual,
    mask,
    weight,
    bias,
    weight2,
    bias2,
    stats,
    partials,  # [P, 2 or 3, C]
    A,
    C,
    S,
    tiles_s,
    tiles,
    per_part,
    slope,
    ACT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BITS: tl.constexpr,
    BA: tl.constexpr,
    BC: tl.constexpr,
    BS: tl.constexpr,
):
    part = tl.program_id(1)
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    m_c = o_c < C
    begin = part * per_part
    end = tl.minimum(begin + per_part, tiles)
    mean, _, scale, shift = constants(stats, weight, bias, o_c, C, 0)
    mean2 = mean
    scale2 = mean
    shift2 = mean
    if RESIDUAL == 2:
        mean2, _, scale2, shift2 = constants(stats, weight2, bias2, o_c, C, 2)
    s, dot, dot2 = sums(
        dy, x, residual, mask, begin, end, o_c, mean, scale, shift, mean2, scale2, shift2, A, C, S, tiles_s, slope,
        ACT, RESIDUAL, BITS, BA, BC, BS,
    )  # fmt: skip
    p = partials + part.to(tl.int64) * (3 if RESIDUAL == 2 else 2) * C + o_c
    tl.store(p, s, mask=m_c)
    tl.store(p + C, dot, mask=m_c)
    if RESIDUAL == 2:
        tl.store(p + 2 * C, dot2, mask=m_c)


@triton.jit(do_not_specialize=["tiles_s", "tiles", "per_part", "P"])
def fl_bn_act_bwd_kernel(
    dy,
    x,
    residual,
    mask,
    weight,
    bias,
    weight2,
    bias2,
    stats,
    partials,  # read where SINGLE is false
    dx,  # may be dy: a tile is read before it is written, and by one program
    dresidual,
    activation,
    dweight,
    dbias,
    dweight2,
    dbias2,
    A,
    C,
    S,
    tiles_s,
    tiles,
    per_part,
    P,
    M,
    slope,
    SINGLE: tl.constexpr,
    ACT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BITS: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_RESIDUAL: tl.constexpr,
    AGAIN: tl.constexpr,
    BA: tl.constexpr,
    BC: tl.constexpr,
    BS: tl.constexpr,
    BP: tl.constexpr,
):
    part = tl.program_id(1)
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    begin = part * per_part
    end = tl.minimum(begin + per_part, tiles)
    mean, rstd, scale, shift = constants(stats, weight, bias, o_c, C, 0)
    mean2 = mean
    scale2 = mean
    shift2 = mean
    rstd2 = mean
    if RESIDUAL == 2:
        mean2, rstd2, scale2, shift2 = constants(stats, weight2, bias2, o_c, C, 2)
    if SINGLE:
        s, dot, dot2 = sums(
            dy, x, residual, mask, begin, end, o_c, mean, scale, shift, mean2, scale2, shift2, A, C, S, tiles_s, slope,
            ACT, RESIDUAL, BITS, BA, BC, BS,
        )  # fmt: skip
    else:
        s = added(partials, 0, P, o_c, C, 3 if RESIDUAL == 2 else 2, BP, BC)
        dot = added(partials, 1, P, o_c, C, 3 if RESIDUAL == 2 else 2, BP, BC)
        dot2 = dot
        if RESIDUAL == 2:
            dot2 = added(partials, 2, P, o_c, C, 3 if RESIDUAL == 2 else 2, BP, BC)
    if part == 0:
        m_c = o_c < C
        tl.store(dweight + o_c, (dot * rstd).to(dweight.dtype.element_ty), mask=m_c)
        tl.store(dbias + o_c, s.to(dbias.dtype.element_ty), mask=m_c)
        if RESIDUAL == 2:
            tl.store(dweight2 + o_c, (dot2 * rstd2).to(dweight2.dtype.element_ty), mask=m_c)
            tl.store(dbias2 + o_c, s.to(dbias2.dtype.element_ty), mask=m_c)
    if NEED_X or NEED_RESIDUAL or AGAIN:
        away, slant = s / M, dot / M * rstd * rstd
        slant2 = slant
        if RESIDUAL == 2:
            slant2 = dot2 / M * rstd2 * rstd2
        for t in range(begin, end):
            b_g, b_d, b_e, b_z, o, m = gradient(
                dy, x, residual, mask, t, o_c, mean, scale, shift, mean2, scale2, shift2, A, C, S, tiles_s, slope,
                ACT, RESIDUAL, BITS, AGAIN, BA, BC, BS,
            )  # fmt: skip
            b_rest = b_g - away[None, :, None]
            if NEED_X:
                b_dx = (b_rest - b_d * slant[None, :, None]) * scale[None, :, None]
                tl.store(dx + o, b_dx.to(dx.dtype.element_ty), mask=m)
            if NEED_RESIDUAL:
                if RESIDUAL == 2:
                    b_g = (b_rest - b_e * slant2[None, :, None]) * scale2[None, :, None]
                tl.store(dresidual + o, b_g.to(dresidual.dtype.element_ty), mask=m)
            if AGAIN:
                tl.store(activation + o, activated(b_z, slope, ACT).to(activation.dtype.element_ty), mask=m)


# --- launchers --------------------------------------------------------------------------------------------------------


class _Grid(NamedTuple):
    """What every launch of a call shares."""

    size: tuple[int, int]
    numbers: tuple[int, ...]  # A, C, S, tiles_s, tiles, per_part
    parts: int
    values: float
    blocks: dict[str, Any]
    block_p: int  # parts added up at a time


def _grid(x: Tensor, shape: tuple[int, int, int], single: bool, bits: bool, name: str, programs: int) -> _Grid:
    return _cached_grid(x.device, *shape, single, bits, name, programs, configs.forced_for(name))


@functools.lru_cache(maxsize=4096)
def _cached_grid(
    device: torch.device, outer: int, channels: int, inner: int, single: bool, bits: bool, name: str, programs: int, _: Any
) -> _Grid:  # fmt: skip
    key = dict(outer=outer, channels=channels, inner=inner, single=single, bits=bits)
    cfg = configs.tuned(name, device, key, config(outer, channels, inner, single, bits, programs))
    block_a = max(cfg.block_a, 8) if bits else cfg.block_a  # a program writes whole bytes
    tiles_s = triton.cdiv(inner, cfg.block_s)
    tiles = triton.cdiv(outer, block_a) * tiles_s
    per_part = tiles if single else triton.cdiv(tiles, cfg.parts)
    parts = triton.cdiv(tiles, per_part)
    blocks = dict(BA=block_a, BC=cfg.block_c, BS=cfg.block_s, num_warps=cfg.warps, **OPTIONS)
    block_p = min(triton.next_power_of_2(parts), max(1, 2048 // cfg.block_c))
    size = (triton.cdiv(channels, cfg.block_c), parts)
    return _Grid(size, (outer, channels, inner, tiles_s, tiles, per_part), parts, float(outer * inner), blocks, block_p)


def _on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _residual_kind(residual: Tensor | None, weight2: Tensor | None) -> int:
    return 0 if residual is None else 1 if weight2 is None else 2


def _partials(x: Tensor, sums: int, grid: _Grid) -> Tensor:
    return torch.empty((grid.parts, sums, x.shape[1]), dtype=torch.float32, device=x.device)


def forward(
    x: Tensor, residual: Tensor | None,
    weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, eps: float,
    weight2: Tensor | None, bias2: Tensor | None, running_mean2: Tensor | None, running_var2: Tensor | None,
    momentum2: float, eps2: float, act: str, slope: float, mask: Tensor | None, shape: tuple[int, int, int], single: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y like x and float32 statistics [2 or 4, C]; running statistics are updated, `mask` is written if there is one.

    shape: (A, C, S) of x. single: one launch. Arguments as checked by fastlocal.ops.bn_act.
    """
    kind = _residual_kind(residual, weight2)
    g = _grid(x, shape, single, mask is not None, "bn_act", PROGRAMS)
    y = torch.empty_like(x)
    stats = torch.empty((4 if kind == 2 else 2, x.shape[1]), dtype=torch.float32, device=x.device)
    partials = None
    with _on(x):
        if not single:
            partials = _partials(x, 6 if kind == 2 else 3, g)
            fl_bn_act_stats_kernel[g.size](x, residual, partials, *g.numbers, TWO=kind == 2, **g.blocks)
        fl_bn_act_fwd_kernel[g.size](
            x, residual, y, mask, weight, bias, running_mean, running_var, weight2, bias2, running_mean2, running_var2,
            stats, partials, *g.numbers, g.parts, g.values, max(g.values - 1.0, 1.0),
            1.0 - momentum, float(momentum), float(eps), 1.0 - momentum2, float(momentum2), float(eps2), float(slope),
            SINGLE=single, ACT=_ACTS[act], RESIDUAL=kind, BITS=mask is not None,
            BP=g.block_p, **g.blocks,
        )  # fmt: skip
    return y, stats


def backward(
    dy: Tensor, x: Tensor, residual: Tensor | None, mask: Tensor | None, weight: Tensor, bias: Tensor,
    weight2: Tensor | None, bias2: Tensor | None, stats: Tensor, act: str, slope: float, dx: Tensor | None,
    dresidual: Tensor | None, activation: Tensor | None, shape: tuple[int, int, int], single: bool,
) -> list[Tensor]:  # fmt: skip
    """The gradients of weight, bias, and of weight2 and bias2 if they are there; dx (which may be dy), dresidual and
    activation are written where given. All maps lie in memory as x does."""
    kind = 2 if weight2 is not None else 0 if residual is None else 1
    g = _grid(x, shape, single, False, "bn_act_backward", PROGRAMS)
    params = (weight, bias) if weight2 is None or bias2 is None else (weight, bias, weight2, bias2)
    grads = [torch.empty_like(p) for p in params]
    partials = None
    common = dict(ACT=_ACTS[act], RESIDUAL=kind, BITS=mask is not None)
    inputs = (dy, x, residual, mask, weight, bias, weight2, bias2, stats)
    with _on(x):
        if not single:
            partials = _partials(x, 3 if kind == 2 else 2, g)
            fl_bn_act_sums_kernel[g.size](*inputs, partials, *g.numbers, float(slope), **common, **g.blocks)
        fl_bn_act_bwd_kernel[g.size](
            *inputs, partials, dx, dresidual, activation, *grads, *(None,) * (4 - len(grads)),
            *g.numbers, g.parts, g.values, float(slope),
            SINGLE=single, NEED_X=dx is not None, NEED_RESIDUAL=dresidual is not None, AGAIN=activation is not None,
            BP=g.block_p, **common, **g.blocks,
        )  # fmt: skip
    return grads


def evaluate(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float,
    weight2: Tensor | None, bias2: Tensor | None, mean2: Tensor | None, var2: Tensor | None, eps2: float,
    act: str, slope: float, shape: tuple[int, int, int],
) -> Tensor:  # fmt: skip
    """y like x, from running statistics, in one launch."""
    g = _grid(x, shape, False, False, "bn_act_eval", 4 * PROGRAMS)
    y = torch.empty_like(x)
    with _on(x):
        fl_bn_act_eval_kernel[g.size](
            x, residual, y, weight, bias, mean, var, weight2, bias2, mean2, var2, *g.numbers, float(eps), float(eps2),
            float(slope), ACT=_ACTS[act], RESIDUAL=_residual_kind(residual, weight2), **g.blocks,
        )  # fmt: skip
    return y
