"""Exponential moving average of many tensors in one launch; integers are copied byte by byte."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastlocal.triton_kernels.multi_tensor import (
    BYTES,
    MIXED,
    lerp,
    number,
    on,
    plan,
    read,
    where_am_i,
    write,
)


@triton.jit
def ema_update_part(
    addresses,
    codes,
    t,
    o,
    m,
    weight,
    N,
    COPIED: tl.constexpr,
    TYPE_A: tl.constexpr,
    TYPE_S: tl.constexpr,
    MASKED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    if COPIED:
        p_a = tl.load(addresses + t).to(tl.pointer_type(tl.uint8)) + o
        p_s = tl.load(addresses + N + t).to(tl.pointer_type(tl.uint8)) + o
        tl.store(p_a, tl.load(p_s, mask=m, other=0), mask=m)
    else:
        b_a = read(addresses, codes, t, o, m, TYPE_A, MASKED, ALIGNED)
        b_s = read(addresses, codes, N + t, o, m, TYPE_S, MASKED, ALIGNED)
        write(addresses, codes, t, o, m, lerp(b_a, b_s, weight), TYPE_A, MASKED, ALIGNED)


@triton.jit(do_not_specialize=["N"])  # else a variant for each kind of number
def fl_ema_update_kernel(
    addresses,  # [2 * N + 1]: averages, sources
    sizes,  # [N]
    codes,  # [2 * N]
    chunks,  # [programs, 2]
    decay,  # a number or a pointer
    weight,  # 1 - decay where decay is a number
    N,
    DECAY_TENSOR: tl.constexpr,
    TYPE_A: tl.constexpr,
    TYPE_S: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t, start, n = where_am_i(sizes, chunks, BLOCK, tl.program_id(0))
    if DECAY_TENSOR:
        w = (1.0 - tl.load(decay)).to(tl.float32)  # the difference in the dtype of decay
    else:
        w = weight
    o = start + tl.arange(0, BLOCK)
    m = o < n
    if TYPE_A == BYTES:
        ema_update_part(addresses, codes, t, o, m, w, N, True, TYPE_A, TYPE_S, True, ALIGNED)
    else:
        if TYPE_A == MIXED:
            copied = tl.load(codes + t) == BYTES
        else:
            copied = False
        if copied:
            ema_update_part(addresses, codes, t, o, m, w, N, True, TYPE_A, TYPE_S, True, ALIGNED)
        elif start + BLOCK <= n:
            ema_update_part(addresses, codes, t, o, m, w, N, False, TYPE_A, TYPE_S, False, ALIGNED)
        else:
            ema_update_part(addresses, codes, t, o, m, w, N, False, TYPE_A, TYPE_S, True, ALIGNED)


def launch(averages: Sequence[Tensor], sources: Sequence[Tensor], decay: float | Tensor) -> None:
    """One launch, in place on `averages`. Arguments as checked by fastlocal.ops.ema_update."""
    if not averages:
        return
    p = plan([averages, sources], kernel="ema_update")
    tensor = isinstance(decay, Tensor)
    with on(averages[0].device):
        fl_ema_update_kernel[(p.programs,)](
            p.addresses,
            p.sizes,
            p.codes,
            p.chunks,
            number(decay),
            0.0 if tensor else 1.0 - decay,
            p.tensors,
            DECAY_TENSOR=tensor,
            TYPE_A=p.types[0],
            TYPE_S=p.types[1],
            ALIGNED=p.aligned,
            BLOCK=p.config.block,
            num_warps=p.config.warps,
        )
