"""The Forward-Forward loss: one program per sample for goodness and factor, one pass for the gradient.

A sample is walked in the order of its memory. Float32 accumulation, no atomics: results are bit-reproducible. Nothing is
read back to the host, every output element is written.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlocal.triton_kernels import configs


class Config(NamedTuple):
    """Launch configuration: elements of a tile (a power of two) and warps."""

    block: int
    warps: int


def config(features: int) -> Config:
    """Pure choice of the launch configuration: at most 16 elements a thread."""
    block = min(4096, max(128, triton.next_power_of_2(features)))
    return Config(block, 8 if block > 2048 else 4)


@triton.jit
def _log1p(e):
    u = 1.0 + e
    return tl.where(u == 1.0, e, tl.log(u) * (e / (u - 1.0)))


@triton.jit
def fl_goodness_loss_fwd_kernel(
    h,
    positive,  # [N] uint8
    offset,  # [N]
    losses,  # [N]
    goodness,  # [N]
    factor,  # [N]
    N,
    M,
    stride_n,
    stride_p,
    stride_o,
    theta,
    grad_scale,
    MEAN: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    NEED_FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    b_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, M, BLOCK):
        o = start + tl.arange(0, BLOCK)
        b_h = tl.load(h + n * stride_n + o.to(tl.int64), mask=o < M, other=0.0).to(tl.float32)  # [B]
        b_sum += b_h * b_h
    g = tl.sum(b_sum, axis=0)
    terms = 1.0
    if MEAN:
        terms = M * 1.0
    g = g / terms
    tl.store(goodness + n, g)
    total = g
    if HAS_OFFSET:
        total += tl.load(offset + n * stride_o).to(tl.float32)
    sign = tl.where(tl.load(positive + n * stride_p) != 0, 1.0, -1.0)
    x = -sign * (total - theta)
    e = tl.exp(-tl.abs(x))
    tl.store(losses + n, tl.where(x < 0.0, 0.0, x) + _log1p(e))  # a nan stays one
    if NEED_FACTOR:
        sigmoid = tl.where(x >= 0.0, 1.0, e) / (1.0 + e)
        tl.store(factor + n, sign * sigmoid * (-2.0 * grad_scale / (N * terms)))


@triton.jit
def fl_goodness_loss_reduce_kernel(losses, loss, N, BLOCK: tl.constexpr):
    b_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for i in range(0, N, BLOCK):
        o = i + tl.arange(0, BLOCK)
        b_sum += tl.load(losses + o, mask=o < N, other=0.0)
    # 0 / 0 is nan where there is no sample.
    tl.store(loss, tl.sum(b_sum, axis=0) / N)


@triton.jit
def fl_goodness_loss_bwd_kernel(
    h,
    factor,  # [N]
    grad_loss,  # []
    grad,
    M,
    blocks,
    stride_n,
    stride_gn,
    HAS_GRAD_LOSS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    n = (pid // blocks).to(tl.int64)
    o = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(factor + n)
    if HAS_GRAD_LOSS:
        scale *= tl.load(grad_loss).to(tl.float32)
    p = o.to(tl.int64)
    b_h = tl.load(h + n * stride_n + p, mask=o < M, other=0.0).to(tl.float32)  # [B]
    tl.store(grad + n * stride_gn + p, (b_h * scale).to(grad.dtype.element_ty), mask=o < M)


def launch(
    h: Tensor,
    positive: Tensor,
    offset: Tensor | None,
    theta: float,
    mean: bool,
    grad_scale: float,
    needs_factor: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss [], goodness [N] and where needed factor [N], all float32. Arguments as checked by
    fastlocal.ops.goodness_loss; the memory of each sample of h is dense."""
    rows, features = h.shape[0], h[:1].numel()

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=h.device)

    loss, losses, goodness = empty(), empty(rows), empty(rows)
    factor = empty(rows) if needs_factor else None
    cfg = configs.tuned("goodness_loss", h.device, {"features": features}, config(features))
    with torch.cuda.device(h.device) if h.is_cuda else contextlib.nullcontext():
        if rows:
            fl_goodness_loss_fwd_kernel[(rows,)](
                h,
                positive.view(torch.uint8),
                offset,
                losses,
                goodness,
                factor,
                rows,
                features,
                h.stride(0),
                positive.stride(0),
                0 if offset is None else offset.stride(0),
                float(theta),
                float(grad_scale),
                MEAN=mean,
                HAS_OFFSET=offset is not None,
                NEED_FACTOR=needs_factor,
                BLOCK=cfg.block,
                num_warps=cfg.warps,
            )
        fl_goodness_loss_reduce_kernel[(1,)](losses, loss, rows, BLOCK=1024, num_warps=4)
    return loss, goodness, factor


def launch_backward(h: Tensor, factor: Tensor, grad_loss: Tensor | None, grad: Tensor) -> None:
    """Writes every sample times its factor (and `grad_loss`, []) to `grad`; samples dense, in the same order in both."""
    rows, features = h.shape[0], h[:1].numel()
    if not rows:
        return
    cfg = configs.tuned("goodness_loss", h.device, {"features": features}, config(features))
    blocks = triton.cdiv(features, cfg.block)
    with torch.cuda.device(h.device) if h.is_cuda else contextlib.nullcontext():
        fl_goodness_loss_bwd_kernel[(rows * blocks,)](
            h,
            factor,
            grad_loss,
            grad,
            features,
            blocks,
            h.stride(0),
            grad.stride(0),
            HAS_GRAD_LOSS=grad_loss is not None,
            BLOCK=cfg.block,
            num_warps=cfg.warps,
        )
