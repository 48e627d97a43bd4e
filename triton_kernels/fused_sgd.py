"""A step of SGD over many tensors in one launch, with averages and low-precision copies of what it writes; two where the
norm of the gradients or whether they are finite must be known first."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastlocal.triton_kernels.multi_tensor import number, on, plan, read, where_am_i, write
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
def fused_sgd_part(
    addresses,
    codes,
    t,
    o,
    m,
    factor,
    rate,
    weight_decay,
    momentum,
    taken,
    weight,
    first,  # keys of the random bits
    second,
    N,
    STOCHASTIC: tl.constexpr,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    FIRST: tl.constexpr,
    AVERAGE: tl.constexpr,
    COPY: tl.constexpr,
    TYPE_P: tl.constexpr,
    TYPE_G: tl.constexpr,
    TYPE_B: tl.constexpr,
    TYPE_A: tl.constexpr,
    TYPE_C: tl.constexpr,
    MASKED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    b_p = read(addresses, codes, t, o, m, TYPE_P, MASKED, ALIGNED)
    b_g = read(addresses, codes, N + t, o, m, TYPE_G, MASKED, ALIGNED) * factor
    b_g += weight_decay * b_p
    x = 0
    y = 0
    if STOCHASTIC:
        x, y = random_bits(o, first, second)
    if MOMENTUM:
        b_b = b_g
        if not FIRST:
            b_b = momentum * read(addresses, codes, 2 * N + t, o, m, TYPE_B, MASKED, ALIGNED) + taken * b_g
        b_s = b_b
        if STOCHASTIC:
            b_s = drawn(codes, 2 * N + t, b_b, x >> 16, TYPE_B)
        write(addresses, codes, 2 * N + t, o, m, b_s, TYPE_B, MASKED, ALIGNED)
        if NESTEROV:
            b_g += momentum * b_b
        else:
            b_g = b_b
    i_average = (2 + MOMENTUM) * N + t
    i_copy = i_average + AVERAGE * N
    b_p -= rate * b_g
    if STOCHASTIC:
        b_p = drawn(codes, t, b_p, x, TYPE_P)
    finish(
        addresses, codes, t, i_average, i_copy, o, m, b_p, y >> 16, weight, STOCHASTIC, AVERAGE, COPY, TYPE_P, TYPE_A,
        TYPE_C, MASKED, ALIGNED,
    )  # fmt: skip


# Numbers that are specialized would make a variant for each of their kinds.
@triton.jit(do_not_specialize=["parts", "N", "lists", "programs", "seed_low", "seed_high"])
def fl_fused_sgd_kernel(
    addresses,  # parameters, gradients, momentum, averages, copies, steps: those that there are
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
    weight_decay,
    momentum,
    taken,  # 1 - dampening
    decay,  # a number or a pointer
    weight,  # 1 - decay where decay is a number
    N,
    lists,
    programs,
    seed_low,
    seed_high,
    STOCHASTIC: tl.constexpr,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    FIRST: tl.constexpr,
    AVERAGE: tl.constexpr,
    COPY: tl.constexpr,
    LR_TENSOR: tl.constexpr,
    DECAY_TENSOR: tl.constexpr,
    TYPE_P: tl.constexpr,
    TYPE_G: tl.constexpr,
    TYPE_B: tl.constexpr,
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
    first = 0
    second = 0
    i_steps = (lists - 1) * N
    if STOCHASTIC:
        step = tl.load(tl.load(addresses + i_steps + t).to(tl.pointer_type(tl.float32))) + 1.0
        first, second = random_keys(seed_low, seed_high, t, step, start)
    o = start + tl.arange(0, BLOCK)
    m = o < n
    if skip == 0:
        if start + BLOCK <= n:
            fused_sgd_part(
                addresses, codes, t, o, m, factor, rate, weight_decay, momentum, taken, w, first, second, N,
                STOCHASTIC, MOMENTUM, NESTEROV, FIRST, AVERAGE, COPY, TYPE_P, TYPE_G, TYPE_B, TYPE_A, TYPE_C, False, ALIGNED,
            )  # fmt: skip
        else:
            fused_sgd_part(
                addresses, codes, t, o, m, factor, rate, weight_decay, momentum, taken, w, first, second, N,
                STOCHASTIC, MOMENTUM, NESTEROV, FIRST, AVERAGE, COPY, TYPE_P, TYPE_G, TYPE_B, TYPE_A, TYPE_C, True, ALIGNED,
            )  # fmt: skip
    if STOCHASTIC:
        count_steps(addresses, i_steps, N, lists, programs, skip, BLOCK_T)


def launch(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    averages: Sequence[Tensor],
    copies: Sequence[Tensor],
    lr: float | Tensor,
    weight_decay: float,
    momentum: float,
    dampening: float,
    nesterov: bool,
    maximize: bool,
    first: bool,
    ema_decay: float | Tensor | None,
    max_norm: float | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    check: bool,
    steps: Sequence[Tensor] = (),
    seed: int | None = None,
) -> Tensor | None:
    """In place; returns the norm of the gradients if `max_norm` is given. Arguments as checked by fastlocal.ops.fused_sgd."""
    lists = [row for row in (params, grads, momentum_buffers, averages, copies, steps) if row]
    device = params[0].device
    with on(device):
        p = plan(lists, scalars=len(lists) - 1 if steps else None, kernel="fused_sgd")
        before = Before(p, 1, device, max_norm, grad_scale, found_inf, check)
        types = iter(p.types[2:])
        fl_fused_sgd_kernel[(p.programs,)](
            p.addresses,
            p.sizes,
            p.codes,
            p.chunks,
            *before.args,
            number(lr),
            -1.0 if maximize else 1.0,
            float(weight_decay),
            float(momentum),
            1.0 - dampening,
            number(ema_decay),
            0.0 if isinstance(ema_decay, Tensor) or ema_decay is None else 1.0 - ema_decay,
            p.tensors,
            len(lists),
            p.programs,
            *halves(seed),
            STOCHASTIC=seed is not None,
            MOMENTUM=bool(momentum_buffers),
            NESTEROV=nesterov,
            FIRST=first,
            AVERAGE=bool(averages),
            COPY=bool(copies),
            LR_TENSOR=isinstance(lr, Tensor),
            DECAY_TENSOR=isinstance(ema_decay, Tensor),
            TYPE_P=p.types[0],
            TYPE_G=p.types[1],
            TYPE_B=next(types) if momentum_buffers else 0,
            TYPE_A=next(types) if averages else 0,
            TYPE_C=next(types) if copies else 0,
            ALIGNED=p.aligned,
            BLOCK=p.config.block,
            BLOCK_T=BLOCK_STEPS,
            num_warps=p.config.warps,
            **before.options,
        )
    return before.norm
