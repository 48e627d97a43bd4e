"""Softmax cross-entropy of one score for each class, with its gradient, for heads whose scores are no plain logits.

One program per row, the row of classes in registers: it reads the scores, or makes them from the squares of groups of
channels, and writes the loss, the hit and the gradient of the scores. A second kernel sums over the rows. For scores that are
cosines a third takes the lengths; products are those of vectors as they are, and the row kernel divides. Float32
accumulation, no atomics: results are bit-reproducible. Nothing is read back to the host, every output element is written.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlocal.triton_kernels import configs
from fastlocal.triton_kernels.pool_linear_cross_entropy import _divisor, fl_pool_linear_cross_entropy_divisor_kernel

BLOCK_N = 1024  # rows of a step of a sum over them


class Config(NamedTuple):
    """Launch configuration of the row kernel: classes and elements of a group in a tile (powers of two), and warps."""

    block_k: int
    block_m: int
    warps: int


def config(classes: int, group: int) -> Config:
    """Pure choice of the launch configuration. group: elements that make a score, 0 where scores are given.

    Tiles hold at most 4096 elements, 16 a thread.
    """
    block_k = triton.next_power_of_2(classes)
    block_m = min(triton.next_power_of_2(max(group, 1)), max(1, 4096 // block_k))
    return Config(block_k, block_m, 8 if block_k * block_m > 2048 else 4)


@triton.jit
def fl_class_cross_entropy_length_kernel(x, lengths, D, stride_n, stride_d, BLOCK_D: tl.constexpr):
    """x [N, D], lengths [N]."""
    n = tl.program_id(0).to(tl.int64)
    b_sum = tl.zeros([BLOCK_D], dtype=tl.float32)
    for d in range(0, D, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        b_x = tl.load(x + n * stride_n + o_d.to(tl.int64) * stride_d, mask=o_d < D, other=0.0).to(tl.float32)  # [BD]
        b_sum += b_x * b_x
    tl.store(lengths + n, tl.sqrt_rn(tl.sum(b_sum, axis=0)))


@triton.jit
def _bounded(length, eps):
    return tl.where(length < eps, eps, length)  # a nan stays one


@triton.jit
def fl_class_cross_entropy_row_kernel(
    x,  # [N, C, S], read where GROUPS: the score of a class is the sum of the squares of its C / K channels
    scores,  # [N, K], read otherwise
    target,
    divisor,  # [] of the loss, read where COUNT is false
    lengths,  # [N], where HAS_LENGTHS: a score is divided by the length of its row
    class_lengths,  # [K], where HAS_CLASS_LENGTHS: and by that of its class
    grad,  # [N, K], of the scores
    along,  # [N], where HAS_LENGTHS: the gradient of a row has x times this taken off
    losses,  # [N]
    hits,  # [N] int32
    N,
    S,
    stride_xn,
    stride_xc,
    stride_xs,
    stride_tn,
    stride_tk,
    ignore_index,
    scale,
    margin,
    label_smoothing,
    grad_scale,
    eps,
    G: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    LAST: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_CLASS_LENGTHS: tl.constexpr,
    HAS_MARGIN: tl.constexpr,
    PROBABILITIES: tl.constexpr,
    COUNT: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)
    m_k = o_k < K
    p_k = o_k.to(tl.int64)

    if GROUPS:
        b_sum = tl.zeros([BLOCK_K, BLOCK_M], dtype=tl.float32)
        for m in range(0, G * S, BLOCK_M):
            o_m = m + tl.arange(0, BLOCK_M)
            if LAST:  # in the order of the memory
                o_g = o_m % G
                o_s = o_m // G
            else:
                o_g = o_m // S
                o_s = o_m % S
            p_c = p_k[:, None] * G + o_g.to(tl.int64)[None, :]
            p_x = x + n * stride_xn + p_c * stride_xc + o_s.to(tl.int64)[None, :] * stride_xs
            b_x = tl.load(p_x, mask=m_k[:, None] & (o_m < G * S)[None, :], other=0.0).to(tl.float32)  # [BK, BM]
            b_sum += b_x * b_x
        b_scores = tl.sum(b_sum, axis=1)
    else:
        b_scores = tl.load(scores + n * K + o_k, mask=m_k, other=0.0)
    if HAS_LENGTHS:
        length = tl.load(lengths + n)
        b_scores /= _bounded(length, eps)
        if HAS_CLASS_LENGTHS:
            b_class_lengths = _bounded(tl.load(class_lengths + o_k, mask=m_k, other=1.0), eps)
            b_scores /= b_class_lengths

    b_logits = tl.where(m_k, b_scores * scale, -float("inf"))
    guess = tl.argmax(b_logits, axis=0)
    if not PROBABILITIES:
        label = tl.load(target + n * stride_tn)
        if HAS_MARGIN:
            b_logits -= tl.where(p_k == label, margin, 0.0)
    b_shifted = b_logits - tl.max(b_logits, axis=0)
    b_exp = tl.exp(b_shifted)
    norm = tl.sum(b_exp, axis=0)
    b_log_prob = b_shifted - tl.log(norm)

    if PROBABILITIES:
        b_target = tl.load(target + n * stride_tn + p_k * stride_tk, mask=m_k, other=0.0).to(tl.float32)
        hit = guess == tl.argmax(tl.where(m_k, b_target, -float("inf")), axis=0)
        valid = n < N  # always
    else:
        valid = label != ignore_index
        hit = valid & (guess == label)
        # A class that does not exist makes the loss and the gradients nan: never a silent number.
        b_target = tl.where((label >= 0) & (label < K), tl.where(p_k == label, 1.0, 0.0), float("nan"))
    b_wanted = tl.where(m_k, b_target * (1.0 - label_smoothing) + label_smoothing / K, 0.0)
    loss = -tl.sum(tl.where(b_wanted != 0.0, b_wanted * b_log_prob, 0.0), axis=0)
    tl.store(losses + n, tl.where(valid, loss, 0.0))
    tl.store(hits + n, tl.where(hit, 1, 0))

    if NEED_GRAD:
        if COUNT:
            total = _divisor(target, None, N, K, stride_tn, 0, ignore_index, PROBABILITIES, False, BLOCK_N)
        else:
            total = tl.load(divisor)
        b_grad = (b_exp / norm * tl.sum(b_wanted, axis=0) - b_wanted) * (grad_scale / total)
        b_grad = tl.where(valid & m_k, b_grad, 0.0)
        if HAS_LENGTHS:
            bounded = _bounded(length, eps)
            radial = tl.sum(tl.where(m_k, b_grad * b_scores, 0.0), axis=0)
            tl.store(along + n, tl.where(length > eps, radial / bounded / bounded, 0.0))
            b_grad /= bounded
            if HAS_CLASS_LENGTHS:
                b_grad /= b_class_lengths
        tl.store(grad + n * K + o_k, b_grad, mask=m_k)


@triton.jit
def fl_class_cross_entropy_reduce_kernel(
    target,
    divisor,
    losses,
    hits,
    products,  # [N, K] and
    grad,  # [N, K], where NEED_ALONG
    class_lengths,  # [K]
    loss,
    correct,
    along,  # [K]: the gradient of a class has its vector times this taken off
    N,
    K,
    stride_tn,
    ignore_index,
    eps,
    PROBABILITIES: tl.constexpr,
    COUNT: tl.constexpr,
    NEED_ALONG: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid = tl.program_id(0)
    if pid == 0:
        b_loss = tl.zeros([BLOCK_N], dtype=tl.float32)
        b_hits = tl.zeros([BLOCK_N], dtype=tl.int64)
        for i in range(0, N, BLOCK_N):
            o_n = i + tl.arange(0, BLOCK_N)
            m_n = o_n < N
            b_loss += tl.load(losses + o_n, mask=m_n, other=0.0)
            b_hits += tl.load(hits + o_n, mask=m_n, other=0).to(tl.int64)
        if COUNT:
            total = _divisor(target, None, N, K, stride_tn, 0, ignore_index, PROBABILITIES, False, BLOCK_N)
        else:
            total = tl.load(divisor)
        # 0 / 0 is nan where no row counts, as in F.cross_entropy.
        tl.store(loss, tl.sum(b_loss, axis=0) / total)
        tl.store(correct, tl.sum(b_hits, axis=0))
    if NEED_ALONG:
        o_k = pid * BLOCK_K + tl.arange(0, BLOCK_K)
        m_k = o_k < K
        b_sum = tl.zeros([BLOCK_R, BLOCK_K], dtype=tl.float32)
        for i in range(0, N, BLOCK_R):
            o_n = (i + tl.arange(0, BLOCK_R)).to(tl.int64)
            m = (o_n < N)[:, None] & m_k[None, :]
            o = o_n[:, None] * K + o_k[None, :]
            # The lengths cancel: gradient of the product times product is gradient of the cosine times cosine.
            b_sum += tl.load(grad + o, mask=m, other=0.0) * tl.load(products + o, mask=m, other=0.0)  # [BR, BK]
        b_length = tl.load(class_lengths + o_k, mask=m_k, other=1.0)
        b_bounded = _bounded(b_length, eps)
        b_along = tl.where(b_length > eps, tl.sum(b_sum, axis=0) / b_bounded / b_bounded, 0.0)
        tl.store(along + o_k, b_along, mask=m_k)


def _on(t: Tensor) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


def lengths(x: Tensor) -> Tensor:
    """L2 norms of the rows of x [N, D], float32 [N]."""
    rows, features = x.shape
    out = torch.empty(rows, dtype=torch.float32, device=x.device)
    block = min(4096, max(128, triton.next_power_of_2(features)))
    with _on(x):
        if rows:
            fl_class_cross_entropy_length_kernel[(rows,)](
                x, out, features, *x.stride(), BLOCK_D=block, num_warps=8 if block > 2048 else 4
            )
    return out


class Result(NamedTuple):
    """loss [], correct [] int64, the gradient of the scores [N, K] where needed; of cosines also what to take off."""

    loss: Tensor
    correct: Tensor
    grad: Tensor | None
    along: Tensor | None
    class_along: Tensor | None


def launch(
    scores: Tensor,
    target: Tensor,
    classes: int,
    scale: float,
    margin: float,
    label_smoothing: float,
    ignore_index: int,
    grad_scale: float,
    needs_grad: bool,
    count_in_kernel: bool,
    row_lengths: Tensor | None = None,
    class_lengths: Tensor | None = None,
    needs_class_along: bool = False,
    eps: float = 0.0,
) -> Result:
    """Cross-entropy with the logits `scale * scores`, that of the target less `margin`; all results float32.

    Args:
        scores: dense float32 [N, K]; or features [N, C, S] in any strides, whose groups of C / K channels, squared and
            summed, are the scores.
        grad_scale: of the gradient of the scores; includes `scale`.
        count_in_kernel: each program adds up the divisor of the loss itself, or reads it.
        row_lengths, class_lengths: [N] and [K], by which a score is divided. The gradient is then that of the undivided
            one; and with u = x / |x| the gradient of x is its product with the classes, less x times `along` (likewise
            `class_along`, where needs_class_along). Lengths below `eps` count as the constant `eps`.
        The others are those of fastlocal.ops.class_goodness_cross_entropy.
    """
    groups = scores.dim() == 3
    rows, positions = scores.shape[0], scores.shape[2] if groups else 1
    group = scores.shape[1] // classes if groups else 0
    last = groups and scores.stride(1) == 1 and positions > 1
    key = dict(classes=classes, group=group * positions, layout="channels_last" if last else "contiguous")
    default = config(classes, group * positions)
    cfg = configs.tuned("class_cross_entropy", scores.device, key, default)
    cfg = cfg._replace(block_k=default.block_k)  # a row is one block
    probabilities = target.is_floating_point()

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=scores.device)

    loss, correct = empty(), empty(dtype=torch.int64)
    losses, hits = empty(rows), empty(rows, dtype=torch.int32)
    grad = empty(rows, classes) if needs_grad else None
    along = empty(rows) if needs_grad and row_lengths is not None else None
    class_along = empty(classes) if needs_class_along else None
    divisor = None if count_in_kernel else empty()
    with _on(scores):
        if divisor is not None:
            fl_pool_linear_cross_entropy_divisor_kernel[(1,)](
                target,
                None,
                divisor,
                rows,
                classes,
                target.stride(0),
                0,
                ignore_index,
                HAS_WEIGHT=False,
                BLOCK_N=BLOCK_N,
                num_warps=4,
            )
        if rows:
            fl_class_cross_entropy_row_kernel[(rows,)](
                scores if groups else None,
                None if groups else scores,
                target,
                divisor,
                row_lengths,
                class_lengths,
                grad,
                along,
                losses,
                hits,
                rows,
                positions,
                *(scores.stride() if groups else (0, 0, 0)),
                target.stride(0),
                target.stride(1) if probabilities else 0,
                ignore_index,
                float(scale),
                float(margin),
                float(label_smoothing),
                float(grad_scale),
                eps,
                G=group,
                K=classes,
                GROUPS=groups,
                LAST=last,
                HAS_LENGTHS=row_lengths is not None,
                HAS_CLASS_LENGTHS=class_lengths is not None,
                HAS_MARGIN=margin != 0,
                PROBABILITIES=probabilities,
                COUNT=count_in_kernel,
                NEED_GRAD=needs_grad,
                BLOCK_K=cfg.block_k,
                BLOCK_M=cfg.block_m,
                BLOCK_N=BLOCK_N,
                num_warps=cfg.warps,
            )
        fl_class_cross_entropy_reduce_kernel[(triton.cdiv(classes, 64) if needs_class_along else 1,)](
            target,
            divisor,
            losses,
            hits,
            scores,
            grad,
            class_lengths,
            loss,
            correct,
            class_along,
            rows,
            classes,
            target.stride(0),
            ignore_index,
            eps,
            PROBABILITIES=probabilities,
            COUNT=count_in_kernel,
            NEED_ALONG=needs_class_along,
            BLOCK_N=BLOCK_N,
            BLOCK_R=32,
            BLOCK_K=64,
            num_warps=4,
        )
    return Result(loss, correct, grad, along, class_along)
