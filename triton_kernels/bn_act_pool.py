"""Batch normalisation, residual, activation and mean over positions, on tiles [samples, positions, channels].

A program has a tile of channels: one where a channel's positions lie side by side, several where its channels do. Two
routes. Few values per channel: the program takes all of them, statistics and means in one launch, and where they fit
its registers reads them once. Many: the samples are split among programs, a first launch leaves partial results, and
each program of the second merges those of its channels, in one order, before it goes on. Arithmetic in float32 (moments
by Welford's and Chan's updates), no atomics: results are bit-reproducible. Nothing is read back to the host, every
output element is written.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlocal.triton_kernels.configs import tuned

ACTS = {"none": 0, "relu": 1, "leaky_relu": 2}
TILE = 2048  # elements, 8 for each thread of 8 warps
MAX_PARTS, PROGRAMS = 64, 512  # of one channel, at most; of the launch, about


class Config(NamedTuple):
    """Launch configuration: block sizes (powers of two), samples that a program takes, and warps."""

    block_n: int
    block_s: int
    block_c: int
    rows: int
    warps: int


def config(rows: int, channels: int, positions: int, channels_last: bool, whole: bool, tile: int = TILE) -> Config:
    """Pure choice of the launch configuration.

    whole: a program takes all samples of its channels.
    tile: elements of a tile, at most.
    """
    c, s = triton.next_power_of_2(channels), triton.next_power_of_2(positions)
    if channels_last:
        block_c = min(c, 16 if whole else 32)
    else:
        block_c = min(c, max(1, 16 // s))  # short runs of positions: those of the next channel lie beside them
    if whole:
        per_program = rows
    else:
        parts = min(MAX_PARTS, rows, max(1, PROGRAMS // triton.cdiv(channels, block_c)))
        per_program = triton.cdiv(rows, parts)
    block_s = min(s, tile // block_c)
    block_n = min(triton.next_power_of_2(per_program), max(1, tile // (block_c * block_s)))
    warps = min(16, max(1, block_n * block_s * block_c // 256))
    return Config(block_n, block_s, block_c, per_program, warps)


@triton.jit
def _load(x, stride_n, stride_c, stride_s, o_n, o_s, o_c, mask):
    p = x + o_n.to(tl.int64) * stride_n + o_s.to(tl.int64) * stride_s + o_c.to(tl.int64) * stride_c
    return tl.load(p, mask=mask, other=0.0).to(tl.float32)  # [BN, BS, BC]


@triton.jit
def _store(x, stride_n, stride_c, stride_s, o_n, o_s, o_c, mask, value):
    p = x + o_n.to(tl.int64) * stride_n + o_s.to(tl.int64) * stride_s + o_c.to(tl.int64) * stride_c
    tl.store(p, value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _sum(b):
    return tl.sum(tl.sum(b, axis=0), axis=0)  # [BN, BS, BC] -> [BC]


@triton.jit
def _moments_of(b_x, mask, values):
    """Mean and sum of squared deviations of one tile, [BC] each."""
    b_mean = _sum(b_x) / values
    b_delta = tl.where(mask, b_x - b_mean[None, None, :], 0.0)
    return b_mean, _sum(b_delta * b_delta)


@triton.jit
def _moments(
    x, stride_n, stride_c, stride_s, begin, end, S, o_c, m_c, BN: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr
):
    """The same of samples begin to end."""
    b_count = tl.zeros([BN, BS, 1], dtype=tl.float32)
    b_mean = tl.zeros([BN, BS, BC], dtype=tl.float32)
    b_m2 = tl.zeros([BN, BS, BC], dtype=tl.float32)
    for n in range(begin, end, BN):
        o_n = n + tl.arange(0, BN)[:, None, None]
        for s in range(0, S, BS):
            o_s = s + tl.arange(0, BS)[None, :, None]
            m_ns = (o_n < end) & (o_s < S)
            mask = m_ns & m_c
            b_x = _load(x, stride_n, stride_c, stride_s, o_n, o_s, o_c, mask)
            b_count += m_ns.to(tl.float32)
            b_delta = tl.where(mask, b_x - b_mean, 0.0)
            b_mean += b_delta * (1.0 / tl.maximum(b_count, 1.0))
            b_m2 += tl.where(mask, b_delta * (b_x - b_mean), 0.0)
    b_all = _sum(b_count * b_mean) / _sum(b_count)
    b_off = b_mean - b_all[None, None, :]
    return b_all, _sum(b_m2 + b_count * b_off * b_off)


@triton.jit
def _merged(partials, N, C, S, rows, values, o_c, m_c, BP: tl.constexpr):
    """The same of all samples, from `partials` [2, P, C] of `rows` samples each (fewer in the last part)."""
    o_p = tl.arange(0, BP)[:, None]
    parts = tl.cdiv(N, rows)
    mask = (o_p < parts) & m_c[None, :]
    p_mean = partials + o_p.to(tl.int64) * C + o_c[None, :]
    p_m2 = partials + (o_p + parts).to(tl.int64) * C + o_c[None, :]
    b_count = tl.where(o_p < parts, tl.minimum(rows, N - o_p * rows), 0).to(tl.float32) * S
    b_mean = tl.load(p_mean, mask=mask, other=0.0)  # [BP, BC]
    b_m2 = tl.load(p_m2, mask=mask, other=0.0)
    b_all = tl.sum(b_count * b_mean, axis=0) / values
    b_off = b_mean - b_all[None, :]
    return b_all, tl.sum(b_m2 + b_count * b_off * b_off, axis=0)


@triton.jit
def _update(b_mean, b_m2, running_mean, running_var, values, momentum, eps, o_c, mask):
    """1 / standard deviation; moves the running statistics where mask."""
    b_running = tl.load(running_mean + o_c, mask=mask, other=0.0).to(tl.float32)
    b_running = b_running * (1.0 - momentum) + b_mean * momentum
    tl.store(running_mean + o_c, b_running.to(running_mean.dtype.element_ty), mask=mask)
    b_running = tl.load(running_var + o_c, mask=mask, other=0.0).to(tl.float32)
    b_running = b_running * (1.0 - momentum) + b_m2 / (values - 1.0) * momentum
    tl.store(running_var + o_c, b_running.to(running_var.dtype.element_ty), mask=mask)
    return 1.0 / tl.sqrt_rn(b_m2 / values + eps)


@triton.jit
def _count(batches):
    if batches is not None:
        tl.store(batches, tl.load(batches) + 1)


@triton.jit
def _vector(p, o_c, m_c):
    return tl.load(p + o_c, mask=m_c, other=0.0).to(tl.float32)


@triton.jit
def _act(b_z, slope, ACT: tl.constexpr):
    if ACT == 1:
        b_z = tl.where(b_z <= 0.0, 0.0, b_z)  # a nan stays
    elif ACT == 2:
        b_z = tl.where(b_z > 0.0, b_z, b_z * slope)
    return b_z


@triton.jit
def _act_backward(b_z, b_g, slope, ACT: tl.constexpr):
    if ACT == 1:
        b_g = tl.where(b_z <= 0.0, 0.0, b_g)
    elif ACT == 2:
        b_g = tl.where(b_z > 0.0, b_g, b_g * slope)
    return b_g


@triton.jit
def fl_bn_act_pool_moments_kernel(
    x,
    residual,
    partials,  # [2, P, C], mean and sum of squared deviations
    residual_partials,
    N,
    C,
    S,
    rows,
    stride_xn,
    stride_xc,
    stride_xs,
    stride_rn,
    stride_rc,
    stride_rs,
    TWO: tl.constexpr,  # whether the residual has a norm
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    part = tl.program_id(1)
    begin = part * rows
    end = tl.minimum(begin + rows, N)
    o_out = part.to(tl.int64) * C + o_c
    o_m2 = tl.num_programs(1).to(tl.int64) * C + o_out
    c, m = o_c[None, None, :], m_c[None, None, :]
    b_mean, b_m2 = _moments(x, stride_xn, stride_xc, stride_xs, begin, end, S, c, m, BLOCK_N, BLOCK_S, BLOCK_C)
    tl.store(partials + o_out, b_mean, mask=m_c)
    tl.store(partials + o_m2, b_m2, mask=m_c)
    if TWO:
        b_mean, b_m2 = _moments(
            residual, stride_rn, stride_rc, stride_rs, begin, end, S, c, m, BLOCK_N, BLOCK_S, BLOCK_C
        )
        tl.store(residual_partials + o_out, b_mean, mask=m_c)
        tl.store(residual_partials + o_m2, b_m2, mask=m_c)


@triton.jit
def fl_bn_act_pool_fwd_kernel(
    x,
    residual,
    pooled,  # [N, C]
    weight,
    bias,
    running_mean,
    running_var,
    batches,
    mean,  # [C], written
    rstd,
    residual_weight,
    residual_bias,
    residual_running_mean,
    residual_running_var,
    residual_batches,
    residual_mean,
    residual_rstd,
    partials,  # read where MOMENTS is "partial"
    residual_partials,
    N,
    C,
    S,
    rows,
    stride_xn,
    stride_xc,
    stride_xs,
    stride_rn,
    stride_rc,
    stride_rs,
    values,  # N * S
    momentum,
    eps,
    residual_momentum,
    residual_eps,
    slope,
    MOMENTS: tl.constexpr,  # "own": of all samples, here; "partial": merged; "running": evaluation
    RESIDUAL: tl.constexpr,  # 0: none, 1: added, 2: normalised and added
    ACT: tl.constexpr,
    SINGLE: tl.constexpr,  # one tile holds all samples: it is read once
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    c, m = o_c[None, None, :], m_c[None, None, :]
    begin = tl.program_id(1) * rows
    end = tl.minimum(begin + rows, N)
    first = tl.program_id(1) == 0  # the one that writes what belongs to a channel

    if SINGLE:
        o_n = tl.arange(0, BLOCK_N)[:, None, None]
        o_s = tl.arange(0, BLOCK_S)[None, :, None]
        mask = (o_n < N) & (o_s < S) & m
        b_x = _load(x, stride_xn, stride_xc, stride_xs, o_n, o_s, c, mask)
        if RESIDUAL != 0:
            b_r = _load(residual, stride_rn, stride_rc, stride_rs, o_n, o_s, c, mask)

    if MOMENTS == "running":
        b_mean = _vector(running_mean, o_c, m_c)
        b_rstd = 1.0 / tl.sqrt_rn(_vector(running_var, o_c, m_c) + eps)
    else:
        if MOMENTS == "partial":
            b_mean, b_m2 = _merged(partials, N, C, S, rows, values, o_c, m_c, BLOCK_P)
        elif SINGLE:
            b_mean, b_m2 = _moments_of(b_x, mask, values)
        else:
            b_mean, b_m2 = _moments(x, stride_xn, stride_xc, stride_xs, 0, N, S, c, m, BLOCK_N, BLOCK_S, BLOCK_C)
        b_rstd = _update(b_mean, b_m2, running_mean, running_var, values, momentum, eps, o_c, m_c & first)
        if (tl.program_id(0) == 0) & first:
            _count(batches)
    tl.store(mean + o_c, b_mean, mask=m_c & first)
    tl.store(rstd + o_c, b_rstd, mask=m_c & first)
    b_mean, b_rstd = b_mean[None, None, :], b_rstd[None, None, :]
    b_weight, b_bias = _vector(weight, c, m), _vector(bias, c, m)

    if RESIDUAL == 2:
        if MOMENTS == "running":
            b_mean2 = _vector(residual_running_mean, o_c, m_c)
            b_rstd2 = 1.0 / tl.sqrt_rn(_vector(residual_running_var, o_c, m_c) + residual_eps)
        else:
            if MOMENTS == "partial":
                b_mean2, b_m2 = _merged(residual_partials, N, C, S, rows, values, o_c, m_c, BLOCK_P)
            elif SINGLE:
                b_mean2, b_m2 = _moments_of(b_r, mask, values)
            else:
                b_mean2, b_m2 = _moments(
                    residual, stride_rn, stride_rc, stride_rs, 0, N, S, c, m, BLOCK_N, BLOCK_S, BLOCK_C
                )
            b_rstd2 = _update(
                b_mean2, b_m2, residual_running_mean, residual_running_var, values, residual_momentum, residual_eps,
                o_c, m_c & first,
            )  # fmt: skip
            if (tl.program_id(0) == 0) & first:
                _count(residual_batches)
        tl.store(residual_mean + o_c, b_mean2, mask=m_c & first)
        tl.store(residual_rstd + o_c, b_rstd2, mask=m_c & first)
        b_mean2, b_rstd2 = b_mean2[None, None, :], b_rstd2[None, None, :]
        b_weight2, b_bias2 = _vector(residual_weight, c, m), _vector(residual_bias, c, m)

    for n in range(begin, end, BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)[:, None, None]
        b_sum = tl.zeros([BLOCK_N, BLOCK_S, BLOCK_C], dtype=tl.float32)
        for s in range(0, S, BLOCK_S):
            o_s = s + tl.arange(0, BLOCK_S)[None, :, None]
            mask = (o_n < end) & (o_s < S) & m
            if not SINGLE:
                b_x = _load(x, stride_xn, stride_xc, stride_xs, o_n, o_s, c, mask)
                if RESIDUAL != 0:
                    b_r = _load(residual, stride_rn, stride_rc, stride_rs, o_n, o_s, c, mask)
            b_z = (b_x - b_mean) * b_rstd * b_weight + b_bias
            if RESIDUAL == 1:
                b_z += b_r
            elif RESIDUAL == 2:
                b_z += (b_r - b_mean2) * b_rstd2 * b_weight2 + b_bias2
            b_sum += tl.where(mask, _act(b_z, slope, ACT), 0.0)
        b_pooled = tl.sum(b_sum, axis=1) / S  # [BN, BC]
        o_row = n + tl.arange(0, BLOCK_N)[:, None]
        p = pooled + o_row.to(tl.int64) * C + o_c[None, :]
        tl.store(p, b_pooled.to(pooled.dtype.element_ty), mask=(o_row < end) & m_c[None, :])


@triton.jit
def _hat(b_x, b_mean, b_rstd):
    return (b_x - b_mean) * b_rstd


@triton.jit
def _dy(
    dpooled,
    stride_gn,
    stride_gc,
    b_hat,
    b_r,
    b_weight,
    b_bias,
    b_weight2,
    b_bias2,
    slope,
    o_n,
    S,
    c,
    end,
    mask,
    m,
    RESIDUAL: tl.constexpr,
    ACT: tl.constexpr,
):
    """The gradient of the activation's input. b_r: the residual, normalised where it has a norm."""
    b_g = _load(dpooled, stride_gn, stride_gc, 0, o_n, tl.zeros([1, 1, 1], tl.int32), c, (o_n < end) & m) / S
    b_z = b_hat * b_weight + b_bias
    if RESIDUAL == 1:
        b_z += b_r
    elif RESIDUAL == 2:
        b_z += b_r * b_weight2 + b_bias2
    return tl.where(mask, _act_backward(b_z, b_g, slope, ACT), 0.0)


@triton.jit
def fl_bn_act_pool_sums_kernel(
    dpooled,
    x,
    residual,
    weight,
    bias,
    mean,
    rstd,
    residual_weight,
    residual_bias,
    residual_mean,
    residual_rstd,
    partials,  # [2 or 3, P, C], sums of dy, dy * x_hat, and dy * residual_hat
    N,
    C,
    S,
    rows,
    stride_gn,
    stride_gc,
    stride_xn,
    stride_xc,
    stride_xs,
    stride_rn,
    stride_rc,
    stride_rs,
    slope,
    RESIDUAL: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    begin = tl.program_id(1) * rows
    end = tl.minimum(begin + rows, N)
    b_dy, b_dyx, b_dyr = _sums(
        dpooled, x, residual, weight, bias, mean, rstd, residual_weight, residual_bias, residual_mean, residual_rstd,
        begin, end, C, S, stride_gn, stride_gc, stride_xn, stride_xc, stride_xs, stride_rn, stride_rc, stride_rs, slope,
        o_c, m_c, RESIDUAL, ACT, BLOCK_N, BLOCK_S, BLOCK_C,
    )  # fmt: skip
    size = tl.num_programs(1).to(tl.int64) * C
    p = partials + tl.program_id(1).to(tl.int64) * C + o_c
    tl.store(p, b_dy, mask=m_c)
    tl.store(p + size, b_dyx, mask=m_c)
    if RESIDUAL == 2:
        tl.store(p + 2 * size, b_dyr, mask=m_c)


@triton.jit
def _sums(
    dpooled,
    x,
    residual,
    weight,
    bias,
    mean,
    rstd,
    residual_weight,
    residual_bias,
    residual_mean,
    residual_rstd,
    begin,
    end,
    C,
    S,
    stride_gn,
    stride_gc,
    stride_xn,
    stride_xc,
    stride_xs,
    stride_rn,
    stride_rc,
    stride_rs,
    slope,
    o_c,
    m_c,
    RESIDUAL: tl.constexpr,
    ACT: tl.constexpr,
    BN: tl.constexpr,
    BS: tl.constexpr,
    BC: tl.constexpr,
):
    """Sums over samples begin to end of dy, dy * x_hat, and (with a norm) dy * residual_hat, [BC] each."""
    c, m = o_c[None, None, :], m_c[None, None, :]
    b_mean, b_rstd = _vector(mean, c, m), _vector(rstd, c, m)
    b_weight, b_bias = _vector(weight, c, m), _vector(bias, c, m)
    b_weight2, b_bias2 = b_weight, b_bias
    if RESIDUAL == 2:
        b_mean2, b_rstd2 = _vector(residual_mean, c, m), _vector(residual_rstd, c, m)
        b_weight2, b_bias2 = _vector(residual_weight, c, m), _vector(residual_bias, c, m)
    b_sum = tl.zeros([BN, BS, BC], dtype=tl.float32)
    b_sum_x = tl.zeros([BN, BS, BC], dtype=tl.float32)
    b_sum_r = tl.zeros([BN, BS, BC], dtype=tl.float32)
    for n in range(begin, end, BN):
        o_n = n + tl.arange(0, BN)[:, None, None]
        for s in range(0, S, BS):
            o_s = s + tl.arange(0, BS)[None, :, None]
            mask = (o_n < end) & (o_s < S) & m
            b_hat = _hat(_load(x, stride_xn, stride_xc, stride_xs, o_n, o_s, c, mask), b_mean, b_rstd)
            b_r = b_hat
            if RESIDUAL != 0:
                b_r = _load(residual, stride_rn, stride_rc, stride_rs, o_n, o_s, c, mask)
                if RESIDUAL == 2:
                    b_r = _hat(b_r, b_mean2, b_rstd2)
            b_dy = _dy(
                dpooled, stride_gn, stride_gc, b_hat, b_r, b_weight, b_bias, b_weight2, b_bias2, slope, o_n, S, c, end,
                mask, m, RESIDUAL, ACT,
            )  # fmt: skip
            b_sum += b_dy
            b_sum_x += b_dy * b_hat
            if RESIDUAL == 2:
                b_sum_r += b_dy * b_r
    b_dyr = _sum(b_sum)
    if RESIDUAL == 2:
        b_dyr = _sum(b_sum_r)
    return _sum(b_sum), _sum(b_sum_x), b_dyr


@triton.jit
def fl_bn_act_pool_bwd_kernel(
    dpooled,
    x,
    residual,
    dx,
    dresidual,
    weight,
    bias,
    mean,
    rstd,
    residual_weight,
    residual_bias,
    residual_mean,
    residual_rstd,
    dweight,
    dbias,
    dresidual_weight,
    dresidual_bias,
    partials,  # read where PARTIAL
    N,
    C,
    S,
    rows,
    stride_gn,
    stride_gc,
    stride_xn,
    stride_xc,
    stride_xs,
    stride_rn,
    stride_rc,
    stride_rs,
    stride_dxn,
    stride_dxc,
    stride_dxs,
    stride_drn,
    stride_drc,
    stride_drs,
    parts,
    values,
    slope,
    PARTIAL: tl.constexpr,
    TRAINING: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACT: tl.constexpr,
    NEED_DX: tl.constexpr,
    NEED_DRESIDUAL: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    c, m = o_c[None, None, :], m_c[None, None, :]
    begin = tl.program_id(1) * rows
    end = tl.minimum(begin + rows, N)
    b_mean, b_rstd = _vector(mean, c, m), _vector(rstd, c, m)
    b_weight, b_bias = _vector(weight, c, m), _vector(bias, c, m)
    b_weight2, b_bias2 = b_weight, b_bias
    if RESIDUAL == 2:
        b_mean2, b_rstd2 = _vector(residual_mean, c, m), _vector(residual_rstd, c, m)
        b_weight2, b_bias2 = _vector(residual_weight, c, m), _vector(residual_bias, c, m)

    if SINGLE:
        o_n = tl.arange(0, BLOCK_N)[:, None, None]
        o_s = tl.arange(0, BLOCK_S)[None, :, None]
        mask = (o_n < N) & (o_s < S) & m
        b_hat = _hat(_load(x, stride_xn, stride_xc, stride_xs, o_n, o_s, c, mask), b_mean, b_rstd)
        b_r = b_hat
        if RESIDUAL != 0:
            b_r = _load(residual, stride_rn, stride_rc, stride_rs, o_n, o_s, c, mask)
            if RESIDUAL == 2:
                b_r = _hat(b_r, b_mean2, b_rstd2)
        b_dy = _dy(
            dpooled, stride_gn, stride_gc, b_hat, b_r, b_weight, b_bias, b_weight2, b_bias2, slope, o_n, S, c, end,
            mask, m, RESIDUAL, ACT,
        )  # fmt: skip
        b_sum, b_sum_x = _sum(b_dy), _sum(b_dy * b_hat)
        b_sum_r = b_sum
        if RESIDUAL == 2:
            b_sum_r = _sum(b_dy * b_r)
    elif PARTIAL:
        o_p = tl.arange(0, BLOCK_P)[:, None]
        m_p = (o_p < parts) & m_c[None, :]
        p = partials + o_c[None, :]
        b_sum = tl.sum(tl.load(p + o_p.to(tl.int64) * C, mask=m_p, other=0.0), axis=0)
        b_sum_x = tl.sum(tl.load(p + (o_p + parts).to(tl.int64) * C, mask=m_p, other=0.0), axis=0)
        b_sum_r = b_sum
        if RESIDUAL == 2:
            b_sum_r = tl.sum(tl.load(p + (o_p + 2 * parts).to(tl.int64) * C, mask=m_p, other=0.0), axis=0)
    else:
        b_sum, b_sum_x, b_sum_r = _sums(
            dpooled, x, residual, weight, bias, mean, rstd, residual_weight, residual_bias, residual_mean,
            residual_rstd, 0, N, C, S, stride_gn, stride_gc, stride_xn, stride_xc, stride_xs, stride_rn, stride_rc,
            stride_rs, slope, o_c, m_c, RESIDUAL, ACT, BLOCK_N, BLOCK_S, BLOCK_C,
        )  # fmt: skip

    m_first = m_c & (tl.program_id(1) == 0)
    tl.store(dbias + o_c, b_sum.to(dbias.dtype.element_ty), mask=m_first)
    tl.store(dweight + o_c, b_sum_x.to(dweight.dtype.element_ty), mask=m_first)
    if RESIDUAL == 2:
        tl.store(dresidual_bias + o_c, b_sum.to(dresidual_bias.dtype.element_ty), mask=m_first)
        tl.store(dresidual_weight + o_c, b_sum_r.to(dresidual_weight.dtype.element_ty), mask=m_first)

    if NEED_DX or NEED_DRESIDUAL:
        share = 0.0
        if TRAINING:
            share = 1.0 / values
        b_sum = (b_sum * share)[None, None, :]
        b_sum_x = (b_sum_x * share)[None, None, :]
        b_sum_r = (b_sum_r * share)[None, None, :]
        for n in range(begin, end, BLOCK_N):
            o_n = n + tl.arange(0, BLOCK_N)[:, None, None]
            for s in range(0, S, BLOCK_S):
                o_s = s + tl.arange(0, BLOCK_S)[None, :, None]
                mask = (o_n < end) & (o_s < S) & m
                if not SINGLE:
                    b_hat = _hat(_load(x, stride_xn, stride_xc, stride_xs, o_n, o_s, c, mask), b_mean, b_rstd)
                    b_r = b_hat
                    if RESIDUAL != 0:
                        b_r = _load(residual, stride_rn, stride_rc, stride_rs, o_n, o_s, c, mask)
                        if RESIDUAL == 2:
                            b_r = _hat(b_r, b_mean2, b_rstd2)
                    b_dy = _dy(
                        dpooled, stride_gn, stride_gc, b_hat, b_r, b_weight, b_bias, b_weight2, b_bias2, slope, o_n, S,
                        c, end, mask, m, RESIDUAL, ACT,
                    )  # fmt: skip
                if NEED_DX:
                    b_dx = b_weight * b_rstd * (b_dy - b_sum - b_hat * b_sum_x)
                    _store(dx, stride_dxn, stride_dxc, stride_dxs, o_n, o_s, c, mask, b_dx)
                if NEED_DRESIDUAL:
                    b_dr = b_dy
                    if RESIDUAL == 2:
                        b_dr = b_weight2 * b_rstd2 * (b_dy - b_sum - b_r * b_sum_r)
                    _store(dresidual, stride_drn, stride_drc, stride_drs, o_n, o_s, c, mask, b_dr)


def _view(x: Tensor) -> Tensor:
    """[N, C, S]."""
    return x.flatten(2) if x.dim() > 2 else x[:, :, None]


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else _view(x).stride()


def _plan(name: str, x: Tensor, channels_last: bool, whole: bool, tile: int) -> tuple[Config, int, tuple[int, int]]:
    """The configuration, parts of a channel, and grid."""
    rows, channels, positions = _view(x).shape
    default = config(rows, channels, positions, channels_last, whole, tile)
    layout = "channels_last" if channels_last else "channels_first"
    key = {"rows": rows, "channels": channels, "positions": positions, "layout": layout, "whole": whole}
    cfg = tuned(name, x.device, key, default)
    parts = 1 if whole else triton.cdiv(rows, cfg.rows)
    return cfg, parts, (triton.cdiv(channels, cfg.block_c), parts)


def _options(cfg: Config) -> dict[str, int]:
    """Left to itself, ptxas spills a few registers to fit one block more; it may take all that a block can have."""
    return {"num_warps": cfg.warps} | ({} if torch.version.hip else {"maxnreg": min(255, 2048 // cfg.warps)})


def _device(x: Tensor) -> Any:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def forward(
    x: Tensor,
    norm: tuple[Any, ...],
    residual: Tensor | None,
    residual_norm: tuple[Any, ...] | None,
    training: bool,
    act: str,
    slope: float,
    channels_last: bool,
    one_launch: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Pooled [N, C] in x's dtype; mean and 1 / standard deviation [C] of both norms (empty without a second), float32.

    A norm is (weight, bias, running_mean, running_var, batches, momentum, eps); the running statistics and the count of
    batches are written in training. One stride leads through all positions of x, and of the residual.
    channels_last: of one position, the channels lie side by side. one_launch: a program takes all samples.
    """
    rows, channels, positions = _view(x).shape
    whole = training and one_launch
    # Few programs, if they have a channel each: larger tiles, so that more channels are read once.
    cfg, parts, grid = _plan("bn_act_pool", x, channels_last, whole, 2 * TILE if whole else TILE)
    single = whole and cfg.block_n >= rows and cfg.block_s >= positions

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    two = residual_norm is not None
    pooled = torch.empty((rows, channels), dtype=x.dtype, device=x.device)
    mean, rstd = empty(channels), empty(channels)
    residual_mean, residual_rstd = empty(channels * two), empty(channels * two)
    *tensors, momentum, eps = norm
    *others, residual_momentum, residual_eps = residual_norm or (None, None, None, None, None, 0.0, 0.0)
    partials = residual_partials = None
    per_program = rows if whole else cfg.rows
    sizes = rows, channels, positions, per_program, *_strides(x), *_strides(residual)
    blocks = dict(BLOCK_N=cfg.block_n, BLOCK_S=cfg.block_s, BLOCK_C=cfg.block_c, **_options(cfg))
    with _device(x):
        if training and not whole:
            partials = empty(2, parts, channels)
            residual_partials = empty(2, parts, channels) if two else None
            fl_bn_act_pool_moments_kernel[grid](x, residual, partials, residual_partials, *sizes, TWO=two, **blocks)
        fl_bn_act_pool_fwd_kernel[grid](
            x,
            residual,
            pooled,
            *tensors,
            mean,
            rstd,
            *others,
            residual_mean,
            residual_rstd,
            partials,
            residual_partials,
            *sizes,
            float(rows * positions),
            momentum,
            eps,
            residual_momentum,
            residual_eps,
            slope,
            MOMENTS="running" if not training else "own" if whole else "partial",
            RESIDUAL=0 if residual is None else 1 + two,
            ACT=ACTS[act],
            SINGLE=single,
            BLOCK_P=triton.next_power_of_2(parts),
            **blocks,
        )
    return pooled, mean, rstd, residual_mean, residual_rstd


def backward(
    dpooled: Tensor,
    x: Tensor,
    norm: tuple[Tensor, ...],
    residual: Tensor | None,
    residual_norm: tuple[Tensor, ...] | None,
    dx: Tensor | None,
    dresidual: Tensor | None,
    training: bool,
    act: str,
    slope: float,
    channels_last: bool,
    one_launch: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Writes dx and dresidual where they are given; returns the gradients of both norms' weight and bias [C] (empty
    without a second). A norm is (weight, bias, mean, rstd)."""
    rows, channels, positions = _view(x).shape
    cfg, parts, grid = _plan("bn_act_pool_backward", x, channels_last, one_launch, TILE)
    single = one_launch and cfg.block_n >= rows and cfg.block_s >= positions
    two = residual_norm is not None
    grads = [torch.empty_like(norm[0]), torch.empty_like(norm[1])]
    if residual_norm is not None:
        grads += [torch.empty_like(residual_norm[0]), torch.empty_like(residual_norm[1])]
    kind = 0 if residual is None else 1 + two
    per_program = rows if one_launch else cfg.rows
    sizes = rows, channels, positions, per_program, *dpooled.stride(), *_strides(x), *_strides(residual)
    parameters = *norm, *(residual_norm or (None,) * 4)
    blocks = dict(BLOCK_N=cfg.block_n, BLOCK_S=cfg.block_s, BLOCK_C=cfg.block_c, **_options(cfg))
    partials = None
    with _device(x):
        if not one_launch:
            partials = torch.empty((2 + two, parts, channels), dtype=torch.float32, device=x.device)
            fl_bn_act_pool_sums_kernel[grid](
                dpooled, x, residual, *parameters, partials, *sizes, slope, RESIDUAL=kind, ACT=ACTS[act], **blocks
            )
            if dx is None and dresidual is None:
                grid = (grid[0], 1)  # what is left is the sums of the parts
        fl_bn_act_pool_bwd_kernel[grid](
            dpooled,
            x,
            residual,
            dx,
            dresidual,
            *parameters,
            *grads,
            *(() if two else (None, None)),
            partials,
            *sizes,
            *_strides(dx),
            *_strides(dresidual),
            parts,
            float(rows * positions),
            slope,
            PARTIAL=not one_launch,
            TRAINING=training,
            RESIDUAL=kind,
            ACT=ACTS[act],
            NEED_DX=dx is not None,
            NEED_DRESIDUAL=dresidual is not None,
            SINGLE=single,
            BLOCK_P=triton.next_power_of_2(parts),
            **blocks,
        )
    if two:
        return grads[0], grads[1], grads[2], grads[3]
    return grads[0], grads[1], norm[0].new_empty(0), norm[0].new_empty(0)
