"""Exponential moving average of many tensors as one operator, `torch.ops.fastlocal.ema_update_`, in place.

On a GPU one launch over all tensors, whatever their dtypes; the tables of their addresses are uploaded once and used
again as long as nobody moves. Reads nothing back to the host. Deterministic on every backend.
Specification: fastlocal/reference/ema_update.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastlocal.errors import ArgumentError
from fastlocal.ops import _dispatch
from fastlocal.ops._lists import Traits, check_number, check_partners, reject_kernel, traits
from fastlocal.reference.ema_update import ema_update_ as specification

NAME = "ema_update_"

_library = torch.library.Library("fastlocal", "FRAGMENT")
_library.define(
    f"{NAME}(Tensor(a!)[] averages, Tensor[] sources, Tensor? decay_tensor, float decay, str impl) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_operator = getattr(torch.ops.fastlocal, NAME).default


def ema_update_(
    averages: Sequence[Tensor], sources: Sequence[Tensor], decay: float | Tensor, *, impl: str | None = None
) -> None:
    """``average = decay * average + (1 - decay) * source`` for every pair, in place, without autograd.

    Args:
        averages: any shapes. Floating-point tensors are averaged, others (counters) become copies of their sources.
            float32 averages of half-precision sources lose nothing; a half-precision average stops moving where
            ``1 - decay`` is small.
        sources: one for each average, of its shape. Floating where the average is, else of its dtype.
        decay: weight of the past, from 0 to 1: a number, or a tensor of one element on the device of the averages, which
            a captured graph reads anew at each replay. Float64 keeps ``1 - decay`` exact, float32 to a part in 10,000
            at 0.9999.
        impl: a backend for this call; None takes that of `fastlocal.backend`.

    Raises:
        ArgumentError: lists, shapes, dtypes or a decay that do not fit.
        BackendError: `impl` cannot serve the call.
        RuntimeError: a CUDA graph is being captured, and tensors of these sizes were never updated before.
    """
    averages, sources = list(averages), list(sources)
    check_partners("averages", {"averages": averages, "sources": sources})
    for i, (a, s) in enumerate(zip(averages, sources)):
        if not (a.is_floating_point() and s.is_floating_point()) and a.dtype != s.dtype:
            raise ArgumentError(
                f"sources[{i}] is {s.dtype} and averages[{i}] {a.dtype}; give both floating or both alike"
            )
        if a.is_complex():
            raise ArgumentError(f"averages[{i}] is {a.dtype}; give its real view (torch.view_as_real)")
    check_number("decay", decay, averages[0].device if averages else None)
    if not isinstance(decay, Tensor) and not 0 <= decay <= 1:
        raise ArgumentError(f"decay={decay} is outside [0, 1]")
    if impl is not None:
        _dispatch.check_backend(impl, "impl")
    if not averages:
        return
    tensor, number = (decay, 0.0) if isinstance(decay, Tensor) else (None, float(decay))
    with torch.no_grad():
        _operator(averages, sources, tensor, number, impl or "auto")


class Signature(NamedTuple):
    """All that the choice of a backend depends on."""

    device: str
    triton: str | None
    traits: Traits


def _signature(averages: Sequence[Tensor], sources: Sequence[Tensor], decay: Any = 0.0, **_: Any) -> Signature:
    device, triton = _dispatch.platform(averages[0].device) if averages else ("cpu", "there is no tensor")
    return Signature(device, triton, traits(averages, sources))


_dispatch.register(
    NAME,
    _signature,
    [
        _dispatch.Candidate("triton", lambda s: reject_kernel(s.device, s.triton, s.traits, copies=True)),
        _dispatch.Candidate("aten", lambda s: None),
        _dispatch.Candidate("reference", lambda s: None),
    ],
)


def _run(averages: list[Tensor], sources: list[Tensor], decay_tensor: Tensor | None, decay: float, impl: str) -> None:
    chosen = _dispatch.choose(NAME, _signature(averages, sources), impl)
    value = decay if decay_tensor is None else decay_tensor
    if chosen == "triton":
        from fastlocal.triton_kernels import ema_update as kernels  # Triton is optional

        kernels.launch(averages, sources, value)
        increment_version(averages)
    elif chosen == "aten":
        _aten(averages, sources, value)
    else:
        specification(averages, sources, value)


def _fake(averages: list[Tensor], sources: list[Tensor], decay_tensor: Tensor | None, decay: float, impl: str) -> None:
    return None


_library.impl(NAME, _run, "CompositeExplicitAutograd")  # every device: _dispatch looks at where the tensors are
torch.library.register_fake(f"fastlocal::{NAME}", _fake, lib=_library)


def _aten(averages: Sequence[Tensor], sources: Sequence[Tensor], decay: float | Tensor) -> None:
    """One foreach lerp for each dtype. It takes one dtype only: where a pair has two, or half precision and a weight
    that is a tensor, copies in the wider of them."""
    weight = 1 - decay
    groups: dict[tuple[torch.dtype, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for a, s in zip(averages, sources):
        mine, theirs = groups.setdefault((a.dtype, s.dtype), ([], []))
        mine.append(a)
        theirs.append(s)
    for (own, other), (mine, theirs) in groups.items():
        if not own.is_floating_point:
            torch._foreach_copy_(mine, theirs)
            continue
        wide = own if own == other else torch.promote_types(torch.promote_types(own, other), torch.float32)
        if isinstance(weight, Tensor):
            wide = torch.promote_types(wide, torch.float32)
        into = _converted(mine, wide)
        end = _converted(theirs, wide)
        if isinstance(weight, Tensor):
            torch._foreach_lerp_(into, end, [weight.to(wide).reshape(())] * len(into))
        else:
            torch._foreach_lerp_(into, end, weight)
        if into is not mine:
            torch._foreach_copy_(mine, into)


def _converted(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    if tensors[0].dtype == dtype:
        return tensors
    made = [torch.empty_like(t, dtype=dtype) for t in tensors]
    torch._foreach_copy_(made, tensors)
    return made
