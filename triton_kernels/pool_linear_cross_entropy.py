"""Pool + linear + softmax cross-entropy with its gradients: one program per row, the row of classes in registers.

Three routes. A small weight is read by every program: pool, logits, loss and both row gradients are one kernel. A large
one belongs to cuBLAS: the library pools and multiplies, the same kernel starts from the logits. A second kernel sums
over the rows. More classes than registers hold come in chunks, whose logits the library multiplies: `Online` scans them
for the loss and, when they are made again, turns them into their gradient. Float32 accumulation, no atomics: results are
bit-reproducible. Nothing is read back to the host, every output element is written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlocal.triton_kernels import configs

# Left to itself, ptxas spills a register or two here to fit one block more; two of 256 threads are enough.
OPTIONS = {} if torch.version.hip else {"maxnreg": 128}


class Config(NamedTuple):
    """Launch configuration of the row kernel: block sizes (powers of two) and warps."""

    block_k: int
    block_c: int
    block_s: int
    warps: int


def config(channels: int, positions: int, classes: int, channels_last: bool) -> Config:
    """Pure choice of the launch configuration.

    Tiles hold at most 4096 elements (16 registers a thread at 8 warps) and lie along the contiguous dimension.
    """
    block_k = triton.next_power_of_2(classes)
    c, s = triton.next_power_of_2(channels), triton.next_power_of_2(positions)
    widest = 4096 // block_k
    if channels_last:
        block_c = min(c, 256, widest)
        block_s = min(s, max(1, 4096 // block_c))
    else:
        block_s = min(s, 512)
        block_c = min(c, widest, max(1, 4096 // block_s))
    warps = 8 if max(block_k, block_s) * block_c > 2048 else 4
    return Config(block_k, block_c, block_s, warps)


@triton.jit
def _divisor(
    target,
    class_weight,
    N,
    K,
    stride_tn,
    stride_cw,
    ignore_index,
    PROBABILITIES: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What the sum of the losses is divided by: the rows that count, or the weights of their classes."""
    if PROBABILITIES:
        total = N * 1.0
    else:
        b_total = tl.zeros([BLOCK_N], dtype=tl.float32)
        for i in range(0, N, BLOCK_N):
            o_n = i + tl.arange(0, BLOCK_N)
            b_label = tl.load(target + o_n.to(tl.int64) * stride_tn, mask=o_n < N, other=ignore_index)
            if HAS_WEIGHT:
                m = (b_label != ignore_index) & (b_label >= 0) & (b_label < K)
                b_total += tl.load(class_weight + b_label * stride_cw, mask=m, other=0.0).to(tl.float32)
            else:
                b_total += (b_label != ignore_index).to(tl.float32)
        total = tl.sum(b_total, axis=0)
    return total


@triton.jit
def _weigh(b_target, class_weight, p_k, m_k, stride_cw, label_smoothing, K, HAS_WEIGHT: tl.constexpr):
    """What the classes `p_k` of a row should have, from their probabilities: smoothed, times the weights of the classes."""
    b_wanted = b_target * (1.0 - label_smoothing) + label_smoothing / K
    if HAS_WEIGHT:
        b_wanted *= tl.load(class_weight + p_k * stride_cw, mask=m_k, other=0.0).to(tl.float32)
    return tl.where(m_k, b_wanted, 0.0)


@triton.jit
def fl_pool_linear_cross_entropy_divisor_kernel(
    target,
    class_weight,
    divisor,
    N,
    K,
    stride_tn,
    stride_cw,
    ignore_index,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    total = _divisor(target, class_weight, N, K, stride_tn, stride_cw, ignore_index, False, HAS_WEIGHT, BLOCK_N)
    tl.store(divisor, total)


@triton.jit
def fl_pool_linear_cross_entropy_fwd_kernel(
    x,
    weight,
    bias,
    target,
    class_weight,
    logits,  # [N, K], read instead of x, weight and bias where FUSED is false
    divisor,  # [] of the loss, read where COUNT is false
    pooled,  # [N, C]
    grad_logits,  # [N, K]
    grad_pooled,  # [N, C], of one position
    losses,  # [N]
    hits,  # [N] int32
    N,
    S,
    stride_xn,
    stride_xc,
    stride_xs,
    stride_wk,
    stride_wc,
    stride_b,
    stride_tn,
    stride_tk,
    stride_cw,
    ignore_index,
    label_smoothing,
    grad_scale,
    C: tl.constexpr,
    K: tl.constexpr,
    FUSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    PROBABILITIES: tl.constexpr,
    COUNT: tl.constexpr,
    NEED_POOLED: tl.constexpr,
    NEED_GRAD_LOGITS: tl.constexpr,
    NEED_GRAD_POOLED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)
    m_k = o_k < K
    p_k = o_k.to(tl.int64)

    if FUSED:
        b_logits = tl.zeros([BLOCK_K], dtype=tl.float32)
        if HAS_BIAS:
            b_logits += tl.load(bias + p_k * stride_b, mask=m_k, other=0.0).to(tl.float32)
        for c in range(0, C, BLOCK_C):
            o_c = c + tl.arange(0, BLOCK_C)
            m_c = o_c < C
            p_c = o_c.to(tl.int64)
            b_sum = tl.zeros([BLOCK_C, BLOCK_S], dtype=tl.float32)
            for s in range(0, S, BLOCK_S):
                o_s = s + tl.arange(0, BLOCK_S)
                p_x = x + n * stride_xn + p_c[:, None] * stride_xc + o_s.to(tl.int64)[None, :] * stride_xs
                b_sum += tl.load(p_x, mask=m_c[:, None] & (o_s < S)[None, :], other=0.0).to(tl.float32)  # [BC, BS]
            b_pooled = tl.sum(b_sum, axis=1) / S
            if NEED_POOLED:
                tl.store(pooled + n * C + o_c, b_pooled, mask=m_c)
            p_w = weight + p_k[:, None] * stride_wk + p_c[None, :] * stride_wc
            b_weight = tl.load(p_w, mask=m_k[:, None] & m_c[None, :], other=0.0).to(tl.float32)  # [BK, BC]
            b_logits += tl.sum(b_weight * b_pooled[None, :], axis=1)
    else:
        b_logits = tl.load(logits + n * K + o_k, mask=m_k, other=0.0).to(tl.float32)

    b_logits = tl.where(m_k, b_logits, -float("inf"))
    guess = tl.argmax(b_logits, axis=0)
    b_shifted = b_logits - tl.max(b_logits, axis=0)
    b_exp = tl.exp(b_shifted)
    norm = tl.sum(b_exp, axis=0)
    b_log_prob = b_shifted - tl.log(norm)

    if PROBABILITIES:
        b_target = tl.load(target + n * stride_tn + p_k * stride_tk, mask=m_k, other=0.0).to(tl.float32)
        hit = guess == tl.argmax(tl.where(m_k, b_target, -float("inf")), axis=0)
        valid = n < N  # always
    else:
        label = tl.load(target + n * stride_tn)
        valid = label != ignore_index
        hit = valid & (guess == label)
        # A class that does not exist makes the loss and the gradients nan: never a silent number.
        b_target = tl.where((label >= 0) & (label < K), tl.where(p_k == label, 1.0, 0.0), float("nan"))
    b_wanted = _weigh(b_target, class_weight, p_k, m_k, stride_cw, label_smoothing, K, HAS_WEIGHT)
    mass = tl.sum(b_wanted, axis=0)
    if COUNT:
        total = _divisor(
            target, class_weight, N, K, stride_tn, stride_cw, ignore_index, PROBABILITIES, HAS_WEIGHT, BLOCK_N
        )
    else:
        total = tl.load(divisor)

    # A class of no weight costs nothing, also where its probability is zero.
    loss = -tl.sum(tl.where(b_wanted != 0.0, b_wanted * b_log_prob, 0.0), axis=0)
    tl.store(losses + n, tl.where(valid, loss, 0.0))
    tl.store(hits + n, hit.to(tl.int32))

    if NEED_GRAD_LOGITS or NEED_GRAD_POOLED:
        b_grad = (b_exp / norm * mass - b_wanted) * (grad_scale / total)
        b_grad = tl.where(valid & m_k, b_grad, 0.0)
        if NEED_GRAD_LOGITS:
            tl.store(grad_logits + n * K + o_k, b_grad, mask=m_k)
        if NEED_GRAD_POOLED:
            for c in range(0, C, BLOCK_C):
                o_c = c + tl.arange(0, BLOCK_C)
                m_c = o_c < C
                p_w = weight + p_k[:, None] * stride_wk + o_c.to(tl.int64)[None, :] * stride_wc
                b_weight = tl.load(p_w, mask=m_k[:, None] & m_c[None, :], other=0.0).to(tl.float32)  # [BK, BC]
                tl.store(grad_pooled + n * C + o_c, tl.sum(b_weight * b_grad[:, None], axis=0) / S, mask=m_c)


@triton.jit
def fl_pool_linear_cross_entropy_reduce_kernel(
    target,
    class_weight,
    divisor,
    losses,
    hits,
    grad_logits,
    loss,
    correct,
    grad_bias,
    N,
    K,
    stride_tn,
    stride_cw,
    ignore_index,
    HAS_WEIGHT: tl.constexpr,
    PROBABILITIES: tl.constexpr,
    COUNT: tl.constexpr,
    NEED_GRAD_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
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
            total = _divisor(
                target, class_weight, N, K, stride_tn, stride_cw, ignore_index, PROBABILITIES, HAS_WEIGHT, BLOCK_N
            )
        else:
            total = tl.load(divisor)
        # 0 / 0 is nan where no row counts, as in F.cross_entropy.
        tl.store(loss, tl.sum(b_loss, axis=0) / total)
        tl.store(correct, tl.sum(b_hits, axis=0))
    if NEED_GRAD_BIAS:
        o_k = pid * BLOCK_K + tl.arange(0, BLOCK_K)
        m_k = o_k < K
        b_sum = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
        for i in range(0, N, BLOCK_N):
            o_n = (i + tl.arange(0, BLOCK_N)).to(tl.int64)
            m = (o_n < N)[:, None] & m_k[None, :]
            b_sum += tl.load(grad_logits + o_n[:, None] * K + o_k[None, :], mask=m, other=0.0)  # [BN, BK]
        tl.store(grad_bias + o_k, tl.sum(b_sum, axis=0), mask=m_k)


@triton.jit
def fl_pool_linear_cross_entropy_scan_kernel(
    logits,  # [N, WIDTH], of the classes from `first` on
    target,
    class_weight,
    state,  # [4, N]: largest logit so far, sum of exp(logit - largest), sum of wanted, sum of wanted * (logit - largest)
    picks,  # [2, N] int32: class of the largest logit so far, and of the largest probability
    chances,  # [N], the largest probability so far
    losses,  # [N], written with the last chunk, as `hits`
    hits,  # [N] int32
    N,
    K,
    first,
    width,
    stride_tn,
    stride_tk,
    stride_cw,
    ignore_index,
    label_smoothing,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    PROBABILITIES: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    if FIRST:
        top = -float("inf")
        norm = 0.0
        dot = 0.0
        mass = 0.0
        guess = 0
        chance = -float("inf")
        wish = 0
    else:
        top = tl.load(state + n)
        norm = tl.load(state + N + n)
        mass = tl.load(state + 2 * N + n)
        dot = tl.load(state + 3 * N + n)
        guess = tl.load(picks + n)
        if PROBABILITIES:
            chance = tl.load(chances + n)
            wish = tl.load(picks + N + n)
    if not PROBABILITIES:
        label = tl.load(target + n * stride_tn)

    for k in range(0, width, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        m_k = o_k < width
        p_k = first + o_k.to(tl.int64)
        b_logits = tl.load(logits + n * width + o_k, mask=m_k, other=-float("inf"))  # [BK]
        highest = tl.max(b_logits, axis=0)
        guess = tl.where(highest > top, first + k + tl.argmax(b_logits, axis=0), guess)
        largest = tl.maximum(top, highest)
        shift = tl.where(largest == -float("inf"), 0.0, largest)  # every class so far may be switched off
        norm = norm * tl.exp(top - shift) + tl.sum(tl.exp(b_logits - shift), axis=0)
        dot += tl.where(mass != 0.0, mass * (top - shift), 0.0)
        top = largest
        if PROBABILITIES:
            b_target = tl.load(target + n * stride_tn + p_k * stride_tk, mask=m_k, other=0.0).to(tl.float32)
            b_chance = tl.where(m_k, b_target, -float("inf"))
            likely = tl.max(b_chance, axis=0)
            wish = tl.where(likely > chance, first + k + tl.argmax(b_chance, axis=0), wish)
            chance = tl.maximum(chance, likely)
        else:
            b_target = tl.where(p_k == label, 1.0, 0.0)
        b_wanted = _weigh(b_target, class_weight, p_k, m_k, stride_cw, label_smoothing, K, HAS_WEIGHT)
        dot += tl.sum(tl.where(b_wanted != 0.0, b_wanted * (b_logits - shift), 0.0), axis=0)
        mass += tl.sum(b_wanted, axis=0)

    if LAST:
        if PROBABILITIES:
            valid = n < N  # always
            hit = guess == wish
        else:
            valid = label != ignore_index
            hit = valid & (guess == label)
            mass = tl.where((label >= 0) & (label < K), mass, float("nan"))
        loss = mass * tl.log(norm) - dot
        tl.store(losses + n, tl.where(valid, loss, 0.0))
        tl.store(hits + n, tl.where(hit, 1, 0))
    else:
        tl.store(state + 3 * N + n, dot)
        tl.store(picks + n, guess)
        if PROBABILITIES:
            tl.store(chances + n, chance)
            tl.store(picks + N + n, wish)
    tl.store(state + n, top)
    tl.store(state + N + n, norm)
    tl.store(state + 2 * N + n, mass)


@triton.jit
def fl_pool_linear_cross_entropy_turn_kernel(
    logits,  # [N, WIDTH], becomes their gradient
    target,
    class_weight,
    state,  # [4, N], as the last scan left it: its last row is not read
    divisor,  # [], read unless PROBABILITIES
    N,
    K,
    first,
    width,
    stride_tn,
    stride_tk,
    stride_cw,
    ignore_index,
    label_smoothing,
    grad_scale,
    HAS_WEIGHT: tl.constexpr,
    PROBABILITIES: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    o_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = o_k < width
    p_k = first + o_k.to(tl.int64)
    if PROBABILITIES:
        b_target = tl.load(target + n * stride_tn + p_k * stride_tk, mask=m_k, other=0.0).to(tl.float32)
        valid = n < N  # always
        total = N * 1.0
    else:
        label = tl.load(target + n * stride_tn)
        b_target = tl.where(p_k == label, 1.0, 0.0)
        valid = label != ignore_index
        total = tl.load(divisor)
    b_wanted = _weigh(b_target, class_weight, p_k, m_k, stride_cw, label_smoothing, K, HAS_WEIGHT)
    b_logits = tl.load(logits + n * width + o_k, mask=m_k, other=-float("inf"))  # [BK]
    b_prob = tl.exp(b_logits - tl.load(state + n)) / tl.load(state + N + n)
    b_grad = (b_prob * tl.load(state + 2 * N + n) - b_wanted) * (grad_scale / total)
    tl.store(logits + n * width + o_k, tl.where(valid, b_grad, 0.0), mask=m_k)


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    pool: str,
    label_smoothing: float,
    ignore_index: int,
    grad_scale: float,
    needs: Sequence[bool],
    fused: bool,
    count_in_kernel: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Loss [] float32, correct [] int64, and where needed the gradients of one position [N, C], of the weight [K, C]
    and of the bias [K], all float32. Arguments as checked by fastlocal.ops.pool_linear_cross_entropy.

    fused: pool and linear inside the row kernel, or in the library's kernels before it.
    count_in_kernel: each program adds up the divisor of the loss itself, or reads it.
    """
    if pool == "tokens":
        x = x.transpose(1, 2)
    else:
        x = x.flatten(2) if pool == "mean" else x[:, :, None]  # [N, C, S]; copies only where no one stride fits
    rows, channels, positions = x.shape
    classes = weight.shape[0]
    need_x, need_weight, need_bias = needs
    last = x.stride(1) == 1 and positions > 1
    key = dict(
        channels=channels, positions=positions, classes=classes, layout="channels_last" if last else "contiguous"
    )
    default = config(channels, positions, classes, last)
    cfg = configs.tuned("pool_linear_cross_entropy", x.device, key, default)
    cfg = cfg._replace(block_k=default.block_k)  # a row is one block

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    loss, correct = empty(), empty(dtype=torch.int64)
    losses, hits = empty(rows), empty(rows, dtype=torch.int32)
    grad_bias = empty(classes) if need_bias else None
    probabilities = target.is_floating_point()
    if fused:
        logits = None
        pooled = empty(rows, channels) if need_weight else None
        grad_pooled = empty(rows, channels) if need_x else None
        grad_logits = empty(rows, classes) if need_weight or need_bias else None
    else:
        # No autograd here, so the mean's dense gradient never exists.
        pooled = x[:, :, 0].float() if positions == 1 else x.mean(2, dtype=torch.float32)
        wide_weight = weight.float()
        logits = pooled @ wide_weight.t() if bias is None else torch.addmm(bias.float(), pooled, wide_weight.t())
        grad_pooled = None
        grad_logits = logits if any(needs) else None  # in place: a program reads its row before it writes it

    about = dict(HAS_WEIGHT=class_weight is not None, PROBABILITIES=probabilities, COUNT=count_in_kernel)
    stride_cw = 0 if class_weight is None else class_weight.stride(0)
    divisor = None if count_in_kernel else empty()

    with _on(x):
        if divisor is not None:
            _launch_divisor(target, class_weight, divisor, rows, classes, ignore_index)
        if rows:
            fl_pool_linear_cross_entropy_fwd_kernel[(rows,)](
                x,
                weight,
                bias,
                target,
                class_weight,
                logits,
                divisor,
                pooled,
                grad_logits,
                grad_pooled,
                losses,
                hits,
                rows,
                positions,
                *x.stride(),
                *weight.stride(),
                0 if bias is None else bias.stride(0),
                target.stride(0),
                target.stride(1) if probabilities else 0,
                stride_cw,
                ignore_index,
                label_smoothing,
                grad_scale,
                C=channels,
                K=classes,
                FUSED=fused,
                HAS_BIAS=bias is not None,
                **about,
                NEED_POOLED=fused and need_weight,
                NEED_GRAD_LOGITS=grad_logits is not None,
                NEED_GRAD_POOLED=grad_pooled is not None,
                BLOCK_K=cfg.block_k,
                BLOCK_C=cfg.block_c,
                BLOCK_S=cfg.block_s,
                BLOCK_N=512,
                num_warps=cfg.warps,
                **OPTIONS,
            )
        block_k = min(64, cfg.block_k)
        fl_pool_linear_cross_entropy_reduce_kernel[(triton.cdiv(classes, block_k) if need_bias else 1,)](
            target,
            class_weight,
            divisor,
            losses,
            hits,
            grad_logits,
            loss,
            correct,
            grad_bias,
            rows,
            classes,
            target.stride(0),
            stride_cw,
            ignore_index,
            **about,
            NEED_GRAD_BIAS=need_bias,
            BLOCK_N=min(512, 4096 // block_k),
            BLOCK_K=block_k,
            num_warps=4,
            **OPTIONS,
        )
    grad_weight = None
    if grad_logits is not None:
        if need_x and not fused:
            grad_pooled = torch.addmm(empty(), grad_logits, wide_weight, beta=0, alpha=1.0 / positions)
        if need_weight and pooled is not None:
            grad_weight = torch.mm(grad_logits.t(), pooled)
    return loss, correct, grad_pooled, grad_weight, grad_bias


class Online:
    """The rows of a batch with more classes than registers, chunk by chunk; see ops for the order of the calls."""

    def __init__(
        self,
        pooled: Tensor,
        classes: int,
        target: Tensor,
        class_weight: Tensor | None,
        label_smoothing: float,
        ignore_index: int,
        grad_scale: float,
    ) -> None:
        rows, device = pooled.shape[0], pooled.device
        self.rows, self.classes, self.target, self.class_weight = rows, classes, target, class_weight
        self.label_smoothing, self.ignore_index, self.grad_scale = label_smoothing, ignore_index, grad_scale
        self.probabilities = target.is_floating_point()
        self.state = torch.empty(4, rows, dtype=torch.float32, device=device)
        self.picks = torch.empty(2, rows, dtype=torch.int32, device=device)
        self.losses = torch.empty(rows, dtype=torch.float32, device=device)
        self.hits = torch.empty(rows, dtype=torch.int32, device=device)
        self.chances = torch.empty(rows, dtype=torch.float32, device=device) if self.probabilities else None
        self.divisor = None if self.probabilities else torch.empty((), dtype=torch.float32, device=device)
        self.strides = (
            target.stride(0),
            target.stride(1) if self.probabilities else 0,
            0 if class_weight is None else class_weight.stride(0),
        )
        self.about = dict(HAS_WEIGHT=class_weight is not None, PROBABILITIES=self.probabilities)

    def scan(self, logits: Tensor, first: int) -> None:
        """Takes the logits of the classes from `first` on, [N, width] contiguous; chunks come in order."""
        width = logits.shape[1]
        with _on(logits):
            if self.rows:
                fl_pool_linear_cross_entropy_scan_kernel[(self.rows,)](
                    logits,
                    self.target,
                    self.class_weight,
                    self.state,
                    self.picks,
                    self.chances,
                    self.losses,
                    self.hits,
                    self.rows,
                    self.classes,
                    first,
                    width,
                    *self.strides,
                    self.ignore_index,
                    self.label_smoothing,
                    FIRST=first == 0,
                    LAST=first + width == self.classes,
                    **self.about,
                    BLOCK_K=min(4096, triton.next_power_of_2(width)),
                    num_warps=8,
                    **OPTIONS,
                )

    def finish(self) -> tuple[Tensor, Tensor]:
        """Loss [] and correct [], after the last chunk."""
        loss = torch.empty((), dtype=torch.float32, device=self.losses.device)
        correct = torch.empty((), dtype=torch.int64, device=self.losses.device)
        with _on(self.losses):
            if self.divisor is not None:
                _launch_divisor(
                    self.target, self.class_weight, self.divisor, self.rows, self.classes, self.ignore_index
                )
            fl_pool_linear_cross_entropy_reduce_kernel[(1,)](
                self.target,
                self.class_weight,
                self.divisor,
                self.losses,
                self.hits,
                None,
                loss,
                correct,
                None,
                self.rows,
                self.classes,
                self.strides[0],
                self.strides[2],
                self.ignore_index,
                **self.about,
                COUNT=self.probabilities,
                NEED_GRAD_BIAS=False,
                BLOCK_N=512,
                BLOCK_K=1,
                num_warps=4,
                **OPTIONS,
            )
        return loss, correct

    def gradient(self, logits: Tensor, first: int) -> Tensor:
        """Turns the logits of a chunk into their gradient, in place; after `finish`."""
        width = logits.shape[1]
        block = min(2048, triton.next_power_of_2(width))
        with _on(logits):
            if self.rows:
                fl_pool_linear_cross_entropy_turn_kernel[(self.rows, triton.cdiv(width, block))](
                    logits,
                    self.target,
                    self.class_weight,
                    self.state,
                    self.divisor,
                    self.rows,
                    self.classes,
                    first,
                    width,
                    *self.strides,
                    self.ignore_index,
                    self.label_smoothing,
                    self.grad_scale,
                    **self.about,
                    BLOCK_K=block,
                    num_warps=4,
                    **OPTIONS,
                )
        return logits


def _on(tensor: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _launch_divisor(
    target: Tensor, class_weight: Tensor | None, divisor: Tensor, rows: int, classes: int, ignore_index: int
) -> None:
    fl_pool_linear_cross_entropy_divisor_kernel[(1,)](
        target,
        class_weight,
        divisor,
        rows,
        classes,
        target.stride(0),
        0 if class_weight is None else class_weight.stride(0),
        ignore_index,
        HAS_WEIGHT=class_weight is not None,
        BLOCK_N=4096,
        num_warps=8,
        **OPTIONS,
    )
