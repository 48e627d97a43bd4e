"""What the operators on lists of tensors check, and when Triton's tables of addresses can stand for the lists."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastlocal.errors import ArgumentError

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_partners(first: str, lists: Mapping[str, Sequence[Tensor]]) -> None:
    """Raises ArgumentError unless all lists agree in length, shapes and device with the one called `first`."""
    own = lists[first]
    for name, other in lists.items():
        if len(other) != len(own):
            raise ArgumentError(f"{name} has {len(other)} tensors and {first} {len(own)}; give one for each")
        for i, (a, b) in enumerate(zip(own, other)):
            if b.shape != a.shape:
                raise ArgumentError(f"{name}[{i}] has shape {list(b.shape)}; {first}[{i}] takes {list(a.shape)}")
            if b.device != own[0].device:
                raise ArgumentError(
                    f"{name}[{i}] is on {b.device} and {first}[0] on {own[0].device}; move them to one device"
                )


def check_number(name: str, value: float | Tensor, device: torch.device | None) -> None:
    """Raises ArgumentError unless value is a number, or a float32 or float64 tensor of one element on the device."""
    if not isinstance(value, Tensor):
        if not isinstance(value, (int, float)):
            raise ArgumentError(f"{name}={value!r}; give a number or a 0-dim tensor")
        return
    if value.numel() != 1 or value.dtype not in (torch.float32, torch.float64):
        raise ArgumentError(
            f"{name} is {value.dtype} {list(value.shape)}; give a float32 or float64 tensor of one element"
        )
    if device is not None and value.device != device:
        raise ArgumentError(f"{name} is on {value.device} and the tensors on {device}; move it there")


class Traits(NamedTuple):
    """What the choice of a backend depends on in lists whose columns belong together."""

    dtypes: frozenset[torch.dtype]
    columns: frozenset[tuple[torch.dtype, ...]]  # dtypes of partners
    same_memory: bool  # partners have their elements at the same places, without gaps


def traits(*lists: Sequence[Tensor]) -> Traits:
    """The traits of lists of one length; a list without tensors is left out."""
    columns = list(zip(*[row for row in lists if row]))
    dtypes = frozenset(tuple(t.dtype for t in column) for column in columns)
    same = all(_same_memory(column[0].shape, *[t.stride() for t in column]) for column in columns)
    return Traits(frozenset(d for column in dtypes for d in column), dtypes, same)


@functools.lru_cache(maxsize=8192)
def _same_memory(shape: torch.Size, *strides: tuple[int, ...]) -> bool:
    if 0 in shape:
        return True
    places = [tuple(s for n, s in zip(shape, stride) if n != 1) for stride in strides]
    if len(set(places)) > 1:
        return False
    expected = 1
    for stride, n in sorted(zip(places[0], [n for n in shape if n != 1])):
        if stride != expected:
            return False
        expected *= n
    return True


def reject_kernel(
    device: str, triton: str | None, has: Traits, *, copies: bool, stochastic: bool = False
) -> str | None:
    """Why a kernel through tables of addresses cannot serve. `copies`: partners of another dtype may be equal.
    `stochastic`: bfloat16 is rounded in integers."""
    if triton is not None:
        return triton
    for column in has.columns:
        for dtype in column:
            if dtype not in KERNEL_DTYPES and not (copies and not dtype.is_floating_point and len(set(column)) == 1):
                return f"{dtype}; the kernel takes float32, bfloat16 and float16"
    if not has.same_memory:
        return "tensors that belong together have other strides, or gaps in memory"
    if device == "cpu" and torch.bfloat16 in has.dtypes and not stochastic:
        return "bfloat16, which the Triton interpreter computes wrongly; give float32"
    return None
