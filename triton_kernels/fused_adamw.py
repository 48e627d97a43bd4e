"""A step of AdamW over many tensors in one launch, with averages and low-precision copies of what it writes; two where the
norm of the gradients or whether they are finite must be known first."""

from __future__ import annotations

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastlocal.triton_kernels.multi_tensor import lerp, number, on, plan, read, where_am_i, write
from fastlocal.triton_kernels.optimizer_step import (
    BLOCK_STEPS,
    Before,
    count_steps,
    drawn,
    finish,
    halves,
    look,
    random_bits,
    random_keys,
)


@triton.jit
def one_minus_exp(x):
    """1 - exp(x) for x <= 0 without cancellation: a series near zero. In float32, 1 - beta**step loses 4 digits at step 1."""
    s = 1.0 + x / 9.0
    s = 1.0 + x / 8.0 * s
    s = 1.0 + x / 7.0 * s
    s = 1.0 + x / 6.0 * s
    s = 1.0 + x / 5.0 * s
    s = 1.0 + x / 4.0 * s
    s = 1.0 + x / 3.0 * s
    s = 1.0 + x / 2.0 * s
    return tl.where(x > -0.7, -x * s, 1.0 - tl.exp(x))


@triton.jit
def fused_adamw_part(
    addresses,
    codes,
    t,
    o,
    m,
    factor,
    shrink,
    rate,
    root,
    taken1,
    beta2,
    taken2,
    eps,
    weight,
    first,  # keys of the random bits
    second,
    N,
    STOCHASTIC: tl.constexpr,
    AVERAGE: tl.constexpr,
    COPY: tl.constexpr,
    TYPE_P: tl.constexpr,
    TYPE_G: tl.constexpr,
    TYPE_M: tl.constexpr,
    TYPE_V: tl.constexpr,
    TYPE_A: tl.constexpr,
    TYPE_C: tl.constexpr,
    MASKED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    b_p = read(addresses, codes, t, o, m, TYPE_P, MASKED, ALIGNED)
    b_g = read(addresses, codes, N + t, o, m, TYPE_G, MASKED, ALIGNED) * factor
    b_m = read(addresses, codes, 2 * N + t, o, m, TYPE_M, MASKED, ALIGNED)
    b_v = read(addresses, codes, 3 * N + t, o, m, TYPE_V, MASKED, ALIGNED)
    b_m = lerp(b_m, b_g, taken1)
    b_v = beta2 * b_v + taken2 * b_g * b_g
    x = 0
    y = 0
    b_ms = b_m
    b_vs = b_v
    if STOCHASTIC:
        x, y = random_bits(o, first, second)
        b_ms = drawn(codes, 2 * N + t, b_m, x >> 16, TYPE_M)
        b_vs = drawn(codes, 3 * N + t, b_v, y, TYPE_V)
    write(addresses, codes, 2 * N + t, o, m, b_ms, TYPE_M, MASKED, ALIGNED)
    write(addresses, codes, 3 * N + t, o, m, b_vs, TYPE_V, MASKED, ALIGNED)
    b_p = b_p * shrink - rate * (b_m / (tl.sqrt(b_v) / root + eps))
    if STOCHASTIC:
        b_p = drawn(codes, t, b_p, x, TYPE_P)
    i_average = 5 * N + t
    i_copy = i_average + AVERAGE * N
    finish(
        addresses, codes, t, i_average, i_copy, o, m, b_p, y >> 16, weight, STOCHASTIC, AVERAGE, COPY, TYPE_P, TYPE_A,
        TYPE_C, MASKED, ALIGNED,
    )  # fmt: skip


# Numbers that are specialized would make a variant for each of their kinds.
@triton.jit(do_not_specialize=["parts", "N", "lists", "programs", "seed_low", "seed_high"])
def fl_fused_adamw_kernel(
    addresses,  # parameters, gradients, averages of them, of their squares, steps; averages, copies: those that there are
    sizes,
    codes,
    chunks,
    sums,
    flags,
    norm,
    grad_scale,
    found_inf,
    max_norm,
    parts,
    lr,  # a number or a pointer
    sign,
    log_beta1,
    log_beta2,
    taken1,  # 1 - beta1
    beta2,
    taken2,  # 1 - beta2
    eps,
    weight_decay,
    decay,  # a number or a pointer
    weight,  # 1 - decay where decay is a number
    N,
    lists,
    programs,
    seed_low,
    seed_high,
    STOCHASTIC: tl.constexpr,
    AVERAGE: tl.constexpr,
    COPY: tl.constexpr,
    LR_TENSOR: tl.constexpr,
    DECAY_TENSOR: tl.constexpr,
    TYPE_P: tl.constexpr,
    TYPE_G: tl.constexpr,
    TYPE_M: tl.constexpr,
    TYPE_V: tl.constexpr,
    TYPE_A: tl.constexpr,
    TYPE_C: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    CLIP: tl.constexpr,
    CHECK: tl.constexpr,
    SCALE: tl.constexpr,
    FOUND: tl.constexpr,
    MAX_PARTS: tl.constexpr,
):
    factor, skip = look(sums, flags, norm, grad_scale, found_inf, max_norm, parts, CLIP, CHECK, SCALE, FOUND, MAX_PARTS)
    factor = factor * sign
    t, start, n = where_am_i(sizes, chunks, BLOCK, tl.program_id(0))
    if LR_TENSOR:
        rate = tl.load(lr).to(tl.float32)
    else:
        rate = lr
    if DECAY_TENSOR:
        w = (1.0 - tl.load(decay)).to(tl.float32)
    else:
        w = weight
    step = tl.load(tl.load(addresses + 4 * N + t).to(tl.pointer_type(tl.float32))) + 1.0
    shrink = 1.0 - rate * weight_decay
    size = rate / one_minus_exp(step * log_beta1)
    root = tl.sqrt(one_minus_exp(step * log_beta2))
    first = 0
    second = 0
    if STOCHASTIC:
        first, second = random_keys(seed_low, seed_high, t, step, start)
    o = start + tl.arange(0, BLOCK)
    m = o < n
    if skip == 0:
        if start + BLOCK <= n:
            fused_adamw_part(
                addresses, codes, t, o, m, factor, shrink, size, root, taken1, beta2, taken2, eps, w, first, second, N,
                STOCHASTIC, AVERAGE, COPY, TYPE_P, TYPE_G, TYPE_M, TYPE_V, TYPE_A, TYPE_C, False, ALIGNED,
            )  # fmt: skip
        else:
            fused_adamw_part(
                addresses, codes, t, o, m, factor, shrink, size, root, taken1, beta2, taken2, eps, w, first, second, N,
                STOCHASTIC, AVERAGE, COPY, TYPE_P, TYPE_G, TYPE_M, TYPE_V, TYPE_A, TYPE_C, True, ALIGNED,
            )  # fmt: skip
    count_steps(addresses, 4 * N, N, lists, programs, skip, BLOCK_T)


def launch(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    averages: Sequence[Tensor],
    copies: Sequence[Tensor],
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    ema_decay: float | Tensor | None,
    max_norm: float | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    check: bool,
    seed: int | None = None,
) -> Tensor | None:
    """In place; returns the norm of the gradients if `max_norm` is given. Arguments as checked by fastlocal.ops.fused_adamw."""
    lists = [row for row in (params, grads, exp_avgs, exp_avg_sqs, steps, averages, copies) if row]
    device = params[0].device
    with on(device):
        p = plan(lists, scalars=4, kernel="fused_adamw")
        before = Before(p, 1, device, max_norm, grad_scale, found_inf, check)
        types = iter(p.types[5:])
        fl_fused_adamw_kernel[(p.programs,)](
            p.addresses,
            p.sizes,
            p.codes,
            p.chunks,
            *before.args,
            number(lr),
            -1.0 if maximize else 1.0,
            math.log(beta1) if beta1 else -1e30,
            math.log(beta2) if beta2 else -1e30,
            1.0 - beta1,
            float(beta2),
            1.0 - beta2,
            float(eps),
            float(weight_decay),
            number(ema_decay),
            0.0 if isinstance(ema_decay, Tensor) or ema_decay is None else 1.0 - ema_decay,
            p.tensors,
            len(lists),
            p.programs,
            *halves(seed),
            STOCHASTIC=seed is not None,
            AVERAGE=bool(averages),
            COPY=bool(copies),
            LR_TENSOR=isinstance(lr, Tensor),
            DECAY_TENSOR=isinstance(ema_decay, Tensor),
            TYPE_P=p.types[0],
            TYPE_G=p.types[1],
            TYPE_M=p.types[2],
            TYPE_V=p.types[3],
            TYPE_A=next(types) if averages else 0,
            TYPE_C=next(types) if copies else 0,
            ALIGNED=p.aligned,
            BLOCK=p.config.block,
            BLOCK_T=BLOCK_STEPS,
            num_warps=p.config.warps,
            **before.options,
        )
    return before.norm
