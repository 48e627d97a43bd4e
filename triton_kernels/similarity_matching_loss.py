"""The similarity matching loss and its gradient in three launches, four for large maps; no [B, B] matrix is ever in memory.

1. A program for a sample: the deviation of its channels over their positions, then their unit vector. Of a large map, and
   of features that have no positions, the two are launches of their own, or only the second.
2. A program for a tile of rows and some of the other rows: their similarities, what they should be (from equal labels, from
   the unit vectors of probabilities, or read), the squared error, and its share of the gradient of the unit vectors.
3. A program for a sample: its shares added up, and the gradient of the deviations, or of the map. One adds up the loss.

Means are taken of the differences from the first number, so that what hardly varies loses no digits and what is constant
has no deviation. Float32 throughout, no atomics: results are bit-reproducible. Nothing is read back to the host, every
output element is written.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlocal.triton_kernels import configs

EPS = tl.constexpr(1e-8)  # as in the specification
# Left to itself, ptxas spills a register or two of the pairs' kernel to fit one block more.
OPTIONS = {} if torch.version.hip else {"maxnreg": 240}
TILE = 2048  # of a map, 8 for each thread of 8 warps
SPLITS, PROGRAMS = 8, 256  # of a row of pairs, at most; of the launch over the pairs, about


class Config(NamedTuple):
    """Launch configuration of the pairs: rows of a program and rows that they are compared with at once (powers of two from
    16 on), and warps."""

    block_m: int
    block_n: int
    warps: int


def config(rows: int) -> Config:
    """Pure choice of the launch configuration."""
    block = 16 if rows <= 512 else 32
    return Config(block, block, 8)


def blocks(width: int) -> tuple[int, int]:
    """Numbers of one step of a product, and of a program's part of the gradient."""
    d = max(16, triton.next_power_of_2(width))
    return min(d, 32), min(d, 256)


def splits(rows: int, width: int, c: Config) -> tuple[int, int]:
    """Into how many parts the other rows are split, so that a small batch has programs enough, and rows of each."""
    programs = triton.cdiv(rows, c.block_m) * triton.cdiv(width, blocks(width)[1])
    tiles = triton.cdiv(rows, c.block_n)
    span = triton.cdiv(tiles, max(1, min(SPLITS, tiles, PROGRAMS // programs)))
    return triton.cdiv(tiles, span), span * c.block_n


def map_blocks(channels: int, positions: int, channels_last: bool) -> tuple[int, int]:
    """Channels and positions of a tile, which lies along the dimension that is contiguous."""
    c, s = triton.next_power_of_2(channels), triton.next_power_of_2(positions)
    block_c = min(c, 64) if channels_last else min(c, max(1, TILE // s))
    return block_c, min(s, TILE // block_c)


def channel_span(channels: int, positions: int, block_c: int) -> int:
    """Channels that a program takes of a sample of a large map: a few tiles."""
    return min(channels, max(1, 4 * TILE // (block_c * positions)) * block_c)


@triton.jit
def _unit(source, stride, D, unit, norm, BLOCK: tl.constexpr):
    """unit = c / (|c| + EPS) and, if wanted, norm = |c|, where c are D numbers without their mean. All point at a row."""
    first = tl.load(source).to(tl.float32)
    b_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, D, BLOCK):
        o = start + tl.arange(0, BLOCK)
        b = tl.load(source + o.to(tl.int64) * stride, mask=o < D, other=0.0).to(tl.float32)
        b_sum += tl.where(o < D, b - first, 0.0)
    mean = tl.sum(b_sum, axis=0) / D
    b_square = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, D, BLOCK):
        o = start + tl.arange(0, BLOCK)
        b = tl.load(source + o.to(tl.int64) * stride, mask=o < D, other=0.0).to(tl.float32)
        b = tl.where(o < D, b - first - mean, 0.0)
        b_square += b * b
    length = tl.sqrt_rn(tl.sum(b_square, axis=0))
    if norm is not None:
        tl.store(norm, length)
    b_length = tl.zeros([BLOCK], dtype=tl.float32) + (length + EPS)
    for start in range(0, D, BLOCK):
        o = start + tl.arange(0, BLOCK)
        b = tl.load(source + o.to(tl.int64) * stride, mask=o < D, other=0.0).to(tl.float32)
        tl.store(unit + o, tl.div_rn(b - first - mean, b_length), mask=o < D)


@triton.jit
def _deviations(
    x, stride_c, stride_s, centred, stride_cc, stride_cs, deviation, mean, begin, end, S,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Of the channels from begin to end: their standard deviation, and what is wanted of their positions without their mean
    and of that mean, less the first position. All point at a sample."""
    for start in range(begin, end, BLOCK_C):
        o_c = start + tl.arange(0, BLOCK_C)
        m_c = o_c < end
        p_c = x + o_c.to(tl.int64) * stride_c
        b_first = tl.load(p_c, mask=m_c, other=0.0).to(tl.float32)[:, None]
        b_sum = tl.zeros([BLOCK_C, BLOCK_S], dtype=tl.float32)
        for s in range(0, S, BLOCK_S):
            o_s = s + tl.arange(0, BLOCK_S)
            m = m_c[:, None] & (o_s < S)[None, :]
            b = tl.load(p_c[:, None] + o_s.to(tl.int64)[None, :] * stride_s, mask=m, other=0.0).to(tl.float32)
            b_sum += tl.where(m, b - b_first, 0.0)  # [BC, BS]
        b_mean = tl.sum(b_sum, axis=1) / S
        b_square = tl.zeros([BLOCK_C, BLOCK_S], dtype=tl.float32)
        for s in range(0, S, BLOCK_S):
            o_s = s + tl.arange(0, BLOCK_S)
            m = m_c[:, None] & (o_s < S)[None, :]
            b = tl.load(p_c[:, None] + o_s.to(tl.int64)[None, :] * stride_s, mask=m, other=0.0).to(tl.float32)
            b = tl.where(m, b - b_first - b_mean[:, None], 0.0)  # [BC, BS]
            b_square += b * b
            if centred is not None:
                p = centred + o_c.to(tl.int64)[:, None] * stride_cc + o_s.to(tl.int64)[None, :] * stride_cs
                tl.store(p, b.to(centred.dtype.element_ty), mask=m)
        tl.store(deviation + o_c, tl.sqrt_rn(tl.sum(b_square, axis=1) / (S - 1)), mask=m_c)
        if mean is not None:
            tl.store(mean + o_c, b_mean, mask=m_c)


@triton.jit
def fl_similarity_matching_loss_deviation_kernel(
    x,  # [B, C, S]
    target,  # [B, V], read where V is not 0
    centred,  # [B, C, S], or None
    deviation,  # [B, C]
    mean,  # [B, C], or None
    unit,  # [B, C], written where ALL
    norm,  # [B]
    target_unit,  # [B, V]
    C,
    S,
    V,
    stride_xn,
    stride_xc,
    stride_xs,
    stride_cn,
    stride_cc,
    stride_cs,
    stride_tn,
    stride_tv,
    span,  # channels of a program
    ALL: tl.constexpr,  # it has them all, and goes on to their unit vector; a second program then has the target's
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    begin = part * span
    if begin < C:
        sample = x + n * stride_xn
        out = centred
        if centred is not None:
            out = centred + n * stride_cn
        average = mean
        if mean is not None:
            average = mean + n * C
        end = tl.minimum(begin + span, C)
        _deviations(
            sample, stride_xc, stride_xs, out, stride_cc, stride_cs, deviation + n * C, average, begin, end, S,
            BLOCK_C, BLOCK_S,
        )  # fmt: skip
        if ALL:
            tl.debug_barrier()  # the program's other threads have written what it reads now
            _unit(deviation + n * C, 1, C, unit + n * C, norm + n, BLOCK_D)
    elif target is not None:
        _unit(target + n * stride_tn, stride_tv, V, target_unit + n * V, None, BLOCK_D)


@triton.jit
def fl_similarity_matching_loss_unit_kernel(
    x, target, unit, norm, target_unit, D, V, stride_xn, stride_xd, stride_tn, stride_tv, BLOCK_D: tl.constexpr
):
    n = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) == 0:
        _unit(x + n * stride_xn, stride_xd, D, unit + n * D, norm + n, BLOCK_D)
    elif target is not None:
        _unit(target + n * stride_tn, stride_tv, V, target_unit + n * V, None, BLOCK_D)


@triton.jit
def _similarities(unit, o_m, o_n, N, D, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    b_s = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        o_d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        b_i = tl.load(
            unit + o_m[:, None] * D + o_d[None, :], mask=(o_m < N)[:, None] & (o_d < D)[None, :], other=0.0
        )  # [BM, BD]
        b_j = tl.load(
            unit + o_n[None, :] * D + o_d[:, None], mask=(o_n < N)[None, :] & (o_d < D)[:, None], other=0.0
        )  # [BD, BN]
        b_s = tl.dot(b_i, b_j, b_s, input_precision="ieee")
    b_s = tl.where(b_s > 1.0, 1.0, b_s)
    return tl.where(b_s < -1.0, -1.0, b_s)  # a nan stays


@triton.jit
def fl_similarity_matching_loss_pairs_kernel(
    unit,  # [B, D]
    labels,  # [B], or None
    target_unit,  # [B, V], or None
    matched,  # [B, B], or None
    shares,  # [J, B, D] of the gradient of `unit`
    sums,  # [tiles, J] of the squared errors
    N,
    D,
    V,
    stride_l,
    stride_mi,
    stride_mj,
    same,  # what two samples of one class should have
    different,
    span,  # other rows of a program, a multiple of BLOCK_N
    NEED_GRAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    split = tl.program_id(1)
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_o = tl.program_id(2).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    m_m = o_m < N
    if labels is not None:
        b_own = tl.load(labels + o_m * stride_l, mask=m_m, other=0)
    b_sum = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    b_grad = tl.zeros([BLOCK_M, BLOCK_O], dtype=tl.float32)
    for start in range(split * span, tl.minimum(split * span + span, N), BLOCK_N):
        o_n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        m_n = o_n < N
        m_pair = m_m[:, None] & m_n[None, :]
        b_e = _similarities(unit, o_m, o_n, N, D, BLOCK_M, BLOCK_N, BLOCK_D)
        if labels is not None:
            b_other = tl.load(labels + o_n * stride_l, mask=m_n, other=0)
            b_e -= tl.where(b_own[:, None] == b_other[None, :], same, different)
        elif target_unit is not None:
            b_e -= _similarities(target_unit, o_m, o_n, N, V, BLOCK_M, BLOCK_N, BLOCK_D)
        else:
            b_e -= tl.load(matched + o_m[:, None] * stride_mi + o_n[None, :] * stride_mj, mask=m_pair, other=0.0)
        b_e = tl.where(m_pair, b_e, 0.0)  # [BM, BN]
        b_sum += b_e * b_e
        if NEED_GRAD:
            b_u = tl.load(unit + o_n[:, None] * D + o_o[None, :], mask=m_n[:, None] & (o_o < D)[None, :], other=0.0)
            b_grad = tl.dot(b_e, b_u, b_grad, input_precision="ieee")  # [BM, BO]
    if tl.program_id(2) == 0:
        tl.store(sums + tl.program_id(0) * tl.num_programs(1) + split, tl.sum(tl.sum(b_sum, axis=1), axis=0))
    if NEED_GRAD:
        p = shares + (split.to(tl.int64) * N + o_m[:, None]) * D + o_o[None, :]
        tl.store(p, b_grad, mask=m_m[:, None] & (o_o < D)[None, :])


@triton.jit
def _added(shares, n, J, N, D, o, mask):
    b = tl.zeros(o.shape, dtype=tl.float32)
    for j in range(0, J):
        b += tl.load(shares + (n + j * N) * D + o, mask=mask, other=0.0)
    return b


@triton.jit
def fl_similarity_matching_loss_finish_kernel(
    sums,  # [P]
    loss,  # []
    shares,  # [J, B, D]
    unit,  # [B, D]
    norm,  # [B]
    deviation,  # [B, D] of a map, else None
    x,  # [B, D, S], read where `grad` is of its shape
    mean,  # [B, D], likewise
    grad,  # [B, D] or [B, D, S], or None: only the loss
    P,
    J,
    N,
    D,
    S,
    stride_xn,
    stride_xd,
    stride_xs,
    stride_gn,
    stride_gd,
    stride_gs,
    span,  # channels of a program
    scale,  # 4 grad_scale / B^2
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    if tl.program_id(0) + tl.program_id(1) == 0:
        b_loss = tl.zeros([1024], dtype=tl.float32)
        for i in range(0, P, 1024):
            o = i + tl.arange(0, 1024)
            b_loss += tl.load(sums + o, mask=o < P, other=0.0)
        tl.store(loss, tl.sum(b_loss, axis=0) / N / N)  # 0 / 0 is nan where there is no row
    if grad is not None:
        b_radial = tl.zeros([BLOCK_D], dtype=tl.float32)
        for start in range(0, D, BLOCK_D):
            o = start + tl.arange(0, BLOCK_D)
            b_u = tl.load(unit + n * D + o, mask=o < D, other=0.0)
            b_radial += _added(shares, n, J, N, D, o, o < D) * b_u
        length = tl.load(norm + n)
        # The unit vector of equal numbers is 0, and so is its product with anything: any divisor but 0 will do.
        radial = tl.sum(b_radial, axis=0) * ((length + EPS) / tl.where(length == 0.0, 1.0, length))
        scale = scale / (length + EPS)
        begin = tl.program_id(1) * span
        end = tl.minimum(begin + span, D)
        for start in range(begin, end, BLOCK_C):
            o_c = start + tl.arange(0, BLOCK_C)
            m_c = o_c < end
            b_u = tl.load(unit + n * D + o_c, mask=m_c, other=0.0)
            b_g = (_added(shares, n, J, N, D, o_c, m_c) - radial * b_u) * scale
            if deviation is not None:
                b_z = tl.load(deviation + n * D + o_c, mask=m_c, other=0.0)
                # No gradient where all positions are equal.
                b_g = tl.where(b_z == 0.0, 0.0, b_g / (tl.where(b_z == 0.0, 1.0, b_z) * (S - 1)))
            p_g = grad + n * stride_gn + o_c.to(tl.int64) * stride_gd
            if mean is None:
                tl.store(p_g, b_g.to(grad.dtype.element_ty), mask=m_c)
            else:
                p_x = x + n * stride_xn + o_c.to(tl.int64) * stride_xd
                b_first = tl.load(p_x, mask=m_c, other=0.0).to(tl.float32)[:, None]
                b_mean = tl.load(mean + n * D + o_c, mask=m_c, other=0.0)[:, None]
                for s in range(0, S, BLOCK_S):
                    o_s = (s + tl.arange(0, BLOCK_S)).to(tl.int64)[None, :]
                    m = m_c[:, None] & (o_s < S)
                    b = tl.load(p_x[:, None] + o_s * stride_xs, mask=m, other=0.0).to(tl.float32)
                    b = (b - b_first - b_mean) * b_g[:, None]  # [BC, BS]
                    tl.store(p_g[:, None] + o_s * stride_gs, b.to(grad.dtype.element_ty), mask=m)


def launch(
    x: Tensor,
    target: Tensor | None,
    matched: Tensor | None,
    classes: tuple[float, float],
    grad_scale: float,
    whole: bool,
    loss: Tensor,
    grad: Tensor | None = None,
    centred: Tensor | None = None,
) -> None:
    """Writes the loss [] and what is given of the others; arguments as checked by fastlocal.ops.similarity_matching_loss.

    Args:
        x: [B, D], or a map [B, C, S] with S > 1; any strides.
        target: labels [B] or probabilities [B, V]; or None with `matched` [B, B].
        classes: with labels, the similarity of two targets of one class and of two classes.
        whole: of a map, whether a program takes a sample through the whole first launch; else there are two.
        grad: of the shape of `x` the gradient of `x`; [B, C] for a map the factor of its centred positions.
        centred: of the shape of `x`, a map.
    """
    rows, width = x.shape[:2]
    positions = x.shape[2] if x.dim() == 3 else 1
    device = x.device

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    labels = target if target is not None and target.dim() == 1 else None
    weights = target if labels is None else None  # probabilities
    if labels is not None and labels.dtype == torch.bool:
        labels = labels.view(torch.uint8)
    spread = 0 if weights is None else weights.shape[1]
    strides_x = (*x.stride(), 0)[:3]
    strides_w = (0, 0) if weights is None else weights.stride()
    block_w = min(1024, triton.next_power_of_2(max(width, spread)))
    block_c, block_s, span = block_w, 1, width
    maps = x.dim() == 3
    if maps:
        block_c, block_s = map_blocks(width, positions, x.stride(1) == 1 and x.stride(2) != 1)
        span = width if whole else channel_span(width, positions, block_c)
    needs_grad = grad is not None and rows > 0
    unit, norm = empty(rows, width), empty(rows)
    target_unit = None if weights is None else empty(rows, spread)
    deviation = empty(rows, width) if maps else None
    mean = empty(rows, width) if maps and needs_grad and grad is not None and grad.dim() == 3 else None
    cfg = configs.tuned("similarity_matching_loss", device, {"rows": rows, "width": width}, config(rows))
    block_d, block_o = blocks(width)
    tiles, (parts, share) = triton.cdiv(rows, cfg.block_m), splits(rows, width, cfg) if rows else (0, 0)
    sums = empty(tiles * parts)
    shares = empty(parts, rows, width) if needs_grad else None
    own = 2 if weights is not None else 1
    with torch.cuda.device(device) if x.is_cuda else contextlib.nullcontext():
        if rows and maps:
            fl_similarity_matching_loss_deviation_kernel[(rows, own if whole else triton.cdiv(width, span))](
                x,
                weights if whole else None,
                centred,
                deviation,
                mean,
                unit,
                norm,
                target_unit,
                width,
                positions,
                spread,
                *strides_x,
                *((0, 0, 0) if centred is None else centred.stride()),
                *strides_w,
                span,
                ALL=whole,
                BLOCK_C=block_c,
                BLOCK_S=block_s,
                BLOCK_D=block_w,
                num_warps=8,
            )
        if rows and not (maps and whole):
            source = x if deviation is None else deviation
            fl_similarity_matching_loss_unit_kernel[(rows, own)](
                source,
                weights,
                unit,
                norm,
                target_unit,
                width,
                spread,
                *source.stride(),
                *strides_w,
                BLOCK_D=block_w,
                num_warps=4,
            )
        if rows:
            fl_similarity_matching_loss_pairs_kernel[(tiles, parts, triton.cdiv(width, block_o) if needs_grad else 1)](
                unit,
                labels,
                target_unit,
                matched,
                shares,
                sums,
                rows,
                width,
                spread,
                0 if labels is None else labels.stride(0),
                *((0, 0) if matched is None else matched.stride()),
                *classes,
                share,
                NEED_GRAD=needs_grad,
                BLOCK_M=cfg.block_m,
                BLOCK_N=cfg.block_n,
                BLOCK_D=block_d,
                BLOCK_O=block_o,
                num_warps=cfg.warps,
                **OPTIONS,
            )
        fl_similarity_matching_loss_finish_kernel[(rows, triton.cdiv(width, span)) if needs_grad else (1, 1)](
            sums,
            loss,
            shares,
            unit,
            norm,
            deviation,
            x,
            mean,
            grad if needs_grad else None,
            tiles * parts,
            parts,
            rows,
            width,
            positions,
            *strides_x,
            *((0, 0, 0) if grad is None else (*grad.stride(), 0)[:3]),
            span,
            4 * grad_scale / max(rows, 1) ** 2,
            BLOCK_D=block_w,
            BLOCK_C=block_c,
            BLOCK_S=block_s,
            num_warps=4,
        )
