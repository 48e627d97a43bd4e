"""A step of AdamW over many tensors in one launch, with averages and low-precision copies of what it writes; two where the
norm of the gradients or whether they are finite must be known first."""

from __future__ import annotations

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastlocal.triton_kernels.multi_tensor import lerp, number, on, plan, read, where_am_i, write
from fastlocal.triton_kernels.optimizer_step import Before, finish, look

BLOCK_STEPS = 128  # so many steps are counted at a time


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
    N,
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
    write(addresses, codes, 2 * N + t, o, m, b_m, TYPE_M, MASKED, ALIGNED)
    write(addresses, codes, 3 * N + t, o, m, b_v, TYPE_V, MASKED, ALIGNED)
    b_p = b_p * shrink - rate * (b_m / (tl.sqrt(b_v) / root + eps))
    i_average = 5 * N + t
    i_copy = i_average + AVERAGE * N
    finish(
        addresses, codes, t, i_average, i_copy, o, m, b_p, weight, AVERAGE, COPY, TYPE_P, TYPE_A, TYPE_C, MASKED, ALIGNED
    )  # fmt: skip


@triton.jit(do_not_specialize=["parts", "N", "lists", "programs"])  # else a variant for each kind of number
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
    o = start + tl.arange(0, BLOCK)
    m = o < n
    if skip == 0:
        if start + BLOCK <= n:
            fused_adamw_part(
                addresses, codes, t, o, m, factor, shrink, size, root, taken1, beta2, taken2, eps, w, N, AVERAGE, COPY,
                TYPE_P, TYPE_G, TYPE_M, TYPE_V, TYPE_A, TYPE_C, False, ALIGNED,
            )  # fmt: skip
        else:
            fused_adamw_part(
                addresses, codes, t, o, m, factor, shrink, size, root, taken1, beta2, taken2, eps, w, N, AVERAGE, COPY,
                TYPE_P, TYPE_G, TYPE_M, TYPE_V, TYPE_A, TYPE_C, True, ALIGNED,
            )  # fmt: skip
    # The steps are counted by the program that comes here last: all others have read theirs.
    counter = addresses + lists * N
    tl.debug_barrier()
    if tl.atomic_add(counter, 1) == programs - 1:
        tl.store(counter, 0)
        if skip == 0:
            for first in range(0, N, BLOCK_T):
                o_t = first + tl.arange(0, BLOCK_T)
                m_t = o_t < N
                # A masked place reads address 0, and nothing is read there.
                p_t = tl.load(addresses + 4 * N + o_t, mask=m_t, other=0).to(tl.pointer_type(tl.float32))
                tl.store(p_t, tl.load(p_t, mask=m_t, other=0.0) + 1.0, mask=m_t)


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
