"""The supervised contrastive loss and its gradient in three launches; no [B, B] matrix is ever in memory.

Unit vectors and norms; then, for a tile of rows, the other rows in tiles: their similarities for a running log-sum-exp,
and again for the gradient, which takes the sums of both rows of a pair. The last launch adds the loss up. Float32
throughout, no atomics: results are bit-reproducible. Nothing is read back to the host, every output element is written.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlocal.triton_kernels import configs

EPS = tl.constexpr(1e-12)  # of F.normalize, as in the specification
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
# Left to itself, ptxas spills a register or two here to fit one block more.
OPTIONS = {} if torch.version.hip else {"maxnreg": 240}


class Config(NamedTuple):
    """Launch configuration: rows of a program and rows that they are compared with at once (powers of two from 16 on), and
    warps."""

    block_m: int
    block_n: int
    warps: int


def config(rows: int) -> Config:
    """Pure choice of the launch configuration: few rows for a program, so that 128 of them already take 8 programs."""
    return Config(16, min(32, max(16, triton.next_power_of_2(rows))), 8)


def blocks(features: int) -> tuple[int, int]:
    """Features of one step of a product, and of a program's part of the gradient."""
    d = max(16, triton.next_power_of_2(features))
    return min(d, 32), min(d, 128)


@triton.jit
def fl_supervised_contrastive_loss_unit_kernel(
    features, unit, norm, N, D, stride_n, stride_d, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):
    """unit [B, D] = features / max(|features|, EPS), and norm [B]."""
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < N
    b_sum = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        o_d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        m = m_m[:, None] & (o_d < D)[None, :]
        p = features + o_m[:, None] * stride_n + o_d[None, :] * stride_d
        b_x = tl.load(p, mask=m, other=0.0).to(tl.float32)  # [BM, BD]
        b_sum += b_x * b_x
    b_norm = tl.sqrt_rn(tl.sum(b_sum, axis=1))
    tl.store(norm + o_m, b_norm, mask=m_m)
    b_norm = tl.where(b_norm < EPS, EPS, b_norm)[:, None] + tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        o_d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        m = m_m[:, None] & (o_d < D)[None, :]
        p = features + o_m[:, None] * stride_n + o_d[None, :] * stride_d
        b_x = tl.load(p, mask=m, other=0.0).to(tl.float32)  # [BM, BD]
        tl.store(unit + o_m[:, None] * D + o_d[None, :], tl.div_rn(b_x, b_norm), mask=m)


@triton.jit
def _cosines(unit, o_m, o_n, N, D, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    b_cosine = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        o_d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        b_i = tl.load(
            unit + o_m[:, None] * D + o_d[None, :], mask=(o_m < N)[:, None] & (o_d < D)[None, :], other=0.0
        )  # [BM, BD]
        b_j = tl.load(
            unit + o_n[None, :] * D + o_d[:, None], mask=(o_n < N)[None, :] & (o_d < D)[:, None], other=0.0
        )  # [BD, BN]
        b_cosine = tl.dot(b_i, b_j, b_cosine, input_precision="ieee")
    return b_cosine


@triton.jit
def fl_supervised_contrastive_loss_fwd_kernel(
    unit,  # [B, D]
    labels,  # [B], read where HAS_WEIGHTS is false
    weights,  # [B, B], read where it is true
    partition,  # [B], the log of what a row's softmax is divided by
    near,  # [B], the similarities of a row's positives, weighed and summed
    total,  # [B], the number of its positives; where HAS_WEIGHTS is true, the sum of their weights
    N,
    D,
    stride_l,
    stride_wi,
    stride_wj,
    scale,  # 1 / temperature
    HAS_WEIGHTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < N
    b_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_near = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_total = tl.zeros([BLOCK_M], dtype=tl.float32)
    if not HAS_WEIGHTS:
        b_own = tl.load(labels + o_m * stride_l, mask=m_m, other=0)
    for start in range(0, N, BLOCK_N):
        o_n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        m_n = o_n < N
        b_s = _cosines(unit, o_m, o_n, N, D, BLOCK_M, BLOCK_N, BLOCK_D) * scale
        m_self = o_m[:, None] == o_n[None, :]
        m_pair = m_m[:, None] & m_n[None, :] & ~m_self
        if HAS_WEIGHTS:
            b_w = tl.load(weights + o_m[:, None] * stride_wi + o_n[None, :] * stride_wj, mask=m_pair, other=0.0)
        else:
            b_other = tl.load(labels + o_n * stride_l, mask=m_n, other=0)
            b_w = ((b_own[:, None] == b_other[None, :]) & m_pair).to(tl.float32)  # [BM, BN]
        b_near += tl.sum(b_w * b_s, axis=1)
        b_total += tl.sum(b_w, axis=1)
        # Itself the lowest finite number: a row alone has no other, and 0 times infinity is nan.
        b_s = tl.where(m_n[None, :], tl.where(m_self, LOWEST, b_s), float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, axis=1))
        b_sum = b_sum * tl.exp(b_max - b_new) + tl.sum(tl.exp(b_s - b_new[:, None]), axis=1)
        b_max = b_new
    tl.store(partition + o_m, b_max + tl.log(b_sum), mask=m_m)
    # Nothing is made of the sums here: Triton's compiler fails where what a loop has summed is used twice.
    tl.store(near + o_m, b_near, mask=m_m)
    tl.store(total + o_m, b_total, mask=m_m)


@triton.jit
def _all_and_each(b_total, HAS_WEIGHTS: tl.constexpr):
    """Weight of a row's positives together, and of one of them (with HAS_WEIGHTS, by what it has to be multiplied)."""
    if HAS_WEIGHTS:
        b_all = b_total
        b_each = tl.full(b_total.shape, 1.0, dtype=tl.float32)
    else:
        b_all = (b_total > 0.0).to(tl.float32)
        b_each = b_all / tl.where(b_total > 0.0, b_total, 1.0)
    return b_all, b_each


@triton.jit
def fl_supervised_contrastive_loss_bwd_kernel(
    unit,  # [B, D]
    labels,
    weights,
    norm,  # [B]
    partition,  # [B]
    near,  # [B]
    total,  # [B]
    loss,  # []
    grad,  # [B, D]
    N,
    D,
    stride_l,
    stride_wi,
    stride_wj,
    scale,
    grad_scale,  # grad_scale / (B temperature)
    HAS_WEIGHTS: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    WHOLE: tl.constexpr,  # a program has all features of its rows
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    if tl.program_id(0) + tl.program_id(1) == 0:
        b_loss = tl.zeros([1024], dtype=tl.float32)
        for i in range(0, N, 1024):
            o = i + tl.arange(0, 1024)
            b_all, b_each = _all_and_each(tl.load(total + o, mask=o < N, other=0.0), HAS_WEIGHTS)
            b_loss += b_all * tl.load(partition + o, mask=o < N, other=0.0)
            b_loss -= b_each * tl.load(near + o, mask=o < N, other=0.0)
        tl.store(loss, tl.sum(b_loss, axis=0) / N)  # 0 / 0 is nan where there is no row
    if NEED_GRAD:
        o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        o_o = tl.program_id(1).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
        m_m = o_m < N
        m_o = o_o < D
        b_part = tl.load(partition + o_m, mask=m_m, other=0.0)
        b_all, b_each = _all_and_each(tl.load(total + o_m, mask=m_m, other=0.0), HAS_WEIGHTS)
        if not HAS_WEIGHTS:
            b_own = tl.load(labels + o_m * stride_l, mask=m_m, other=0)
        b_grad = tl.zeros([BLOCK_M, BLOCK_O], dtype=tl.float32)
        b_radial = tl.zeros([BLOCK_M], dtype=tl.float32)
        for start in range(0, N, BLOCK_N):
            o_n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
            m_n = o_n < N
            b_cosine = _cosines(unit, o_m, o_n, N, D, BLOCK_M, BLOCK_N, BLOCK_D)
            b_s = b_cosine * scale
            m_pair = m_m[:, None] & m_n[None, :] & (o_m[:, None] != o_n[None, :])
            b_all_j, b_each_j = _all_and_each(tl.load(total + o_n, mask=m_n, other=0.0), HAS_WEIGHTS)
            b_p = tl.exp(b_s - b_part[:, None])
            b_p_j = tl.exp(b_s - tl.load(partition + o_n, mask=m_n, other=0.0)[None, :])
            if HAS_WEIGHTS:
                b_w = tl.load(weights + o_m[:, None] * stride_wi + o_n[None, :] * stride_wj, mask=m_pair, other=0.0)
                b_w += tl.load(weights + o_n[None, :] * stride_wi + o_m[:, None] * stride_wj, mask=m_pair, other=0.0)
            else:
                b_other = tl.load(labels + o_n * stride_l, mask=m_n, other=0)
                b_w = tl.where(b_own[:, None] == b_other[None, :], b_each[:, None] + b_each_j[None, :], 0.0)
            b_pull = b_p * b_all[:, None] + b_p_j * b_all_j[None, :] - b_w
            b_pull = tl.where(m_pair, b_pull, 0.0)  # [BM, BN]
            b_u = tl.load(unit + o_n[:, None] * D + o_o[None, :], mask=m_n[:, None] & m_o[None, :], other=0.0)
            b_grad = tl.dot(b_pull, b_u, b_grad, input_precision="ieee")  # [BM, BO]
            if not WHOLE:
                b_radial += tl.sum(b_pull * b_cosine, axis=1)
        m = m_m[:, None] & m_o[None, :]
        b_u = tl.load(unit + o_m[:, None] * D + o_o[None, :], mask=m, other=0.0)  # [BM, BO]
        if WHOLE:
            b_radial = tl.sum(b_grad * b_u, axis=1)
        b_norm = tl.load(norm + o_m, mask=m_m, other=1.0)
        b_radial = tl.where(b_norm > EPS, b_radial, 0.0)  # below, the norm is a constant
        b_norm = tl.where(b_norm < EPS, EPS, b_norm)
        b_grad = (b_grad - b_radial[:, None] * b_u) * grad_scale / b_norm[:, None]
        tl.store(grad + o_m[:, None] * D + o_o[None, :], b_grad.to(grad.dtype.element_ty), mask=m)


def launch(
    features: Tensor,
    labels: Tensor | None,
    weights: Tensor | None,
    temperature: float,
    grad_scale: float,
    grad_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """Loss [] in float32, and where a dtype is given the gradient [B, D] in it. Either labels [B] or weights [B, B], arguments
    as checked by fastlocal.ops.supervised_contrastive_loss."""
    rows, dim = features.shape
    device = features.device

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    loss, unit = empty(), empty(rows, dim)
    norm, partition, near, total = (empty(rows) for _ in range(4))
    grad = None if grad_dtype is None else torch.empty((rows, dim), dtype=grad_dtype, device=device)
    cfg = configs.tuned("supervised_contrastive_loss", device, {"rows": rows, "dim": dim}, config(rows))
    block_d, block_o = blocks(dim)
    if labels is not None and labels.dtype == torch.bool:
        labels = labels.view(torch.uint8)
    pairs = (
        0 if labels is None else labels.stride(0),
        0 if weights is None else weights.stride(0),
        0 if weights is None else weights.stride(1),
        1 / temperature,
    )
    tiles = triton.cdiv(rows, cfg.block_m)
    parts = triton.cdiv(dim, block_o)
    needs_grad = grad is not None and grad.numel() > 0
    with torch.cuda.device(device) if features.is_cuda else contextlib.nullcontext():
        if rows:
            fl_supervised_contrastive_loss_unit_kernel[(triton.cdiv(rows, 8),)](
                features,
                unit,
                norm,
                rows,
                dim,
                features.stride(0),
                features.stride(1),
                BLOCK_M=8,
                BLOCK_D=min(256, max(16, triton.next_power_of_2(dim))),
                num_warps=4,
            )
            fl_supervised_contrastive_loss_fwd_kernel[(tiles,)](
                unit,
                labels,
                weights,
                partition,
                near,
                total,
                rows,
                dim,
                *pairs,
                HAS_WEIGHTS=weights is not None,
                BLOCK_M=cfg.block_m,
                BLOCK_N=cfg.block_n,
                BLOCK_D=block_d,
                num_warps=cfg.warps,
                **OPTIONS,
            )
        fl_supervised_contrastive_loss_bwd_kernel[(tiles, parts) if needs_grad else (1, 1)](
            unit,
            labels,
            weights,
            norm,
            partition,
            near,
            total,
            loss,
            grad if needs_grad else None,
            rows,
            dim,
            *pairs,
            grad_scale / (max(rows, 1) * temperature),
            HAS_WEIGHTS=weights is not None,
            NEED_GRAD=needs_grad,
            WHOLE=parts <= 1,
            BLOCK_M=cfg.block_m,
            BLOCK_N=cfg.block_n,
            BLOCK_D=block_d,
            BLOCK_O=block_o,
            num_warps=cfg.warps,
            **OPTIONS,
        )
    return loss, grad
