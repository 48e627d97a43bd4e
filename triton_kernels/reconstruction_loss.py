"""Mean binary cross-entropy of a sigmoid: one pass for the loss, one for the gradient, which begins from the logits again.

Tensors are walked in the order of their memory, so all have the same strides. The loss is summed in two steps without
atomics: results are bit-reproducible. Nothing is read back to the host, every output element is written.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlocal.triton_kernels import configs

LEAST_VARIANCE = tl.constexpr(1e-12)  # PyTorch divides by p (1 - p), or by this where it is smaller


class Config(NamedTuple):
    """Launch configuration: elements of a tile (a power of two), most programs of the loss's kernel, warps."""

    block: int
    programs: int
    warps: int


def config(elements: int) -> Config:
    """Pure choice of the launch configuration: tiles of 8 elements a thread, and enough programs for any device."""
    return Config(min(1024, max(128, triton.next_power_of_2(elements))), 1024, 4)


@triton.jit
def _log1p(e):
    u = 1.0 + e
    return tl.where(u == 1.0, e, tl.log(u) * (e / (u - 1.0)))


@triton.jit
def fl_reconstruction_loss_fwd_kernel(logits, image, partial, M, TRIPS, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    b_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for i in range(0, TRIPS):
        o = (i * tl.num_programs(0) + pid).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        b_x = tl.load(logits + o, mask=o < M, other=0.0).to(tl.float32)
        b_t = tl.load(image + o, mask=o < M, other=0.0).to(tl.float32)
        b_exp = tl.exp(-tl.abs(b_x))
        # Of the more probable side, -log1p(e); of the other, that less |x|, but no number where p rounds to 0 or 1.
        b_near = -_log1p(b_exp)
        b_far = tl.where((b_x >= 0.0) & (1.0 + b_exp == 1.0), -100.0, b_near - tl.abs(b_x))
        b_far = tl.where(b_far < -100.0, -100.0, b_far)
        b_log_p = tl.where(b_x >= 0.0, b_near, b_far)
        b_log_q = tl.where(b_x >= 0.0, b_far, b_near)
        b_loss = -(b_t * b_log_p + (1.0 - b_t) * b_log_q)
        b_sum += tl.where(o < M, b_loss, 0.0)  # [B]
    tl.store(partial + pid, tl.sum(b_sum, axis=0))


@triton.jit
def fl_reconstruction_loss_reduce_kernel(partial, loss, P, M, BLOCK: tl.constexpr):
    b_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for i in range(0, P, BLOCK):
        o = i + tl.arange(0, BLOCK)
        b_sum += tl.load(partial + o, mask=o < P, other=0.0)
    # 0 / 0 is nan where there is no element.
    tl.store(loss, tl.sum(b_sum, axis=0) / M)


@triton.jit
def fl_reconstruction_loss_bwd_kernel(
    logits, image, grad_loss, grad, M, scale, HAS_GRAD_LOSS: tl.constexpr, BLOCK: tl.constexpr
):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(logits + o, mask=o < M, other=0.0).to(tl.float32)
    b_t = tl.load(image + o, mask=o < M, other=0.0).to(tl.float32)
    b_exp = tl.exp(-tl.abs(b_x))
    b_p = tl.where(b_x >= 0.0, 1.0, b_exp) / (1.0 + b_exp)
    b_ratio = b_p * (1.0 - b_p) / LEAST_VARIANCE
    b_grad = (b_p - b_t) * tl.where(b_ratio > 1.0, 1.0, b_ratio)
    if HAS_GRAD_LOSS:
        scale = scale * tl.load(grad_loss).to(tl.float32)
    tl.store(grad + o, (b_grad * scale).to(grad.dtype.element_ty), mask=o < M)


def launch(logits: Tensor, image: Tensor) -> Tensor:
    """The loss [], float32. Arguments as checked by fastlocal.ops.reconstruction_loss, dense, with equal strides."""
    elements = logits.numel()
    cfg = configs.tuned("reconstruction_loss", logits.device, {"elements": elements}, config(elements))
    programs = min(triton.cdiv(elements, cfg.block), cfg.programs)
    loss = torch.empty((), dtype=torch.float32, device=logits.device)
    partial = torch.empty(programs, dtype=torch.float32, device=logits.device)
    with torch.cuda.device(logits.device) if logits.is_cuda else contextlib.nullcontext():
        if programs:
            trips = triton.cdiv(elements, programs * cfg.block)
            fl_reconstruction_loss_fwd_kernel[(programs,)](
                logits, image, partial, elements, trips, BLOCK=cfg.block, num_warps=cfg.warps
            )
        fl_reconstruction_loss_reduce_kernel[(1,)](partial, loss, programs, elements, BLOCK=1024, num_warps=4)
    return loss


def launch_backward(logits: Tensor, image: Tensor, grad_loss: Tensor | None, scale: float, grad: Tensor) -> None:
    """Writes the gradient of `scale` (times `grad_loss`, []) times the loss to `grad`; all dense, with equal strides."""
    elements = logits.numel()
    if not elements:
        return
    cfg = configs.tuned("reconstruction_loss", logits.device, {"elements": elements}, config(elements))
    with torch.cuda.device(logits.device) if logits.is_cuda else contextlib.nullcontext():
        fl_reconstruction_loss_bwd_kernel[(triton.cdiv(elements, cfg.block),)](
            logits,
            image,
            grad_loss,
            grad,
            elements,
            float(scale) / elements,
            HAS_GRAD_LOSS=grad_loss is not None,
            BLOCK=cfg.block,
            num_warps=cfg.warps,
        )
