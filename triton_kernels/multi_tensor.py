"""Many tensors in one launch: tables of addresses and sizes on the device, and the loads and stores that go through them.

A `Plan` stands for R lists of n tensors; element i of a tensor of one list belongs to element i of its partners. A
program works on one chunk of one tensor. What depends on shapes and dtypes alone (sizes, chunks) is uploaded once and
kept; so is the table of addresses, which is a pure function of them: an entry can be dropped, but never be wrong.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlocal.triton_kernels import configs

BLOCK = 2048  # elements of a chunk
WARPS = 8
MAX_PARTS = 512  # programs of a reduction: each program of the launch after it reads all of their results
KEPT_TABLES = 4096

# Codes of the dtypes, in the tables and as constants of the kernels.
FLOAT32, BFLOAT16, FLOAT16, BYTES, MIXED = (tl.constexpr(i) for i in range(5))
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Config(NamedTuple):
    """Launch configuration of a kernel on lists: elements of a chunk (a power of two) and warps."""

    block: int
    warps: int


def config(elements: int, lists: int) -> Config:
    """Pure choice of the launch configuration: the same for all sizes, so that their tables of chunks are shared."""
    return Config(BLOCK, WARPS)


class Plan(NamedTuple):
    """What a launch needs to find its tensors."""

    addresses: Tensor  # int64 [R * n + 1]; the last element is a counter of finished programs, at rest zero
    sizes: Tensor  # int64 [n], elements (bytes where the code is BYTES)
    codes: Tensor  # int32 [R * n]
    chunks: Tensor  # int32 [m, 2]: tensor, number of the chunk in it
    types: tuple[int, ...]  # for each list its code, or MIXED
    aligned: bool  # every address is a multiple of 16
    tensors: int
    programs: int
    config: Config

    @property
    def parts(self) -> int:
        return min(self.programs, MAX_PARTS)


class _Layout(NamedTuple):
    sizes: Tensor
    codes: Tensor
    chunks: Tensor
    types: tuple[int, ...]
    config: Config


class _Cache:
    """Least recently used entries go, but none that a CUDA graph may read."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.entries: OrderedDict[Hashable, Any] = OrderedDict()
        self.kept: dict[Hashable, Any] = {}

    def get(self, key: Hashable, capturing: bool) -> Any:
        found = self.kept.get(key)
        if found is None and (found := self.entries.get(key)) is not None:
            self.entries.move_to_end(key)
            if capturing:
                self.kept[key] = self.entries.pop(key)
        return found

    def put(self, key: Hashable, entry: Any) -> None:
        self.entries[key] = entry
        if len(self.entries) > self.size:
            self.entries.popitem(last=False)


_layouts, _tables = _Cache(KEPT_TABLES), _Cache(KEPT_TABLES)


def plan(lists: Sequence[Sequence[Tensor]], scalars: int | None = None, kernel: str = "multi_tensor") -> Plan:
    """The plan of these lists, all of one length and on one device, the tensors of a column of one memory layout.

    The first call uploads it; under a CUDA graph's capture the sizes must be known from an earlier call.

    Args:
        scalars: which list, if any, holds tensors of one element, for a whole tensor of the others.
        kernel: whose launch configuration it has.

    Raises:
        RuntimeError: first seen while a CUDA graph is captured.
    """
    device = lists[0][0].device
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    asked = configs.forced_for(kernel)
    shape_key = (device, *[(t.dtype, t.shape) for row in lists for t in row], len(lists), kernel, asked)
    layout = _layouts.get(shape_key, capturing)
    if layout is None:
        if capturing:
            raise RuntimeError(
                "tensors of these sizes are new to this process while a CUDA graph is captured; run the step once before"
            )
        layout = _make_layout(lists, device, kernel)
        _layouts.put(shape_key, layout)
    pointers = tuple(t.data_ptr() for row in lists for t in row)
    key = (device, len(lists), pointers)
    addresses = _tables.get(key, capturing)
    if addresses is None and capturing:
        addresses = fill_in_graph(pointers, device)  # the graph fills it at each replay: of no use to anyone else
    elif addresses is None:
        addresses = _upload([*pointers, 0], torch.int64, device)
        _tables.put(key, addresses)
    tensors, programs = len(lists[0]), layout.chunks.shape[0]
    loose = () if scalars is None else range(scalars * tensors, (scalars + 1) * tensors)
    aligned = not any(p & 15 for i, p in enumerate(pointers) if i not in loose)
    return Plan(
        addresses, layout.sizes, layout.codes, layout.chunks, layout.types, aligned, tensors, programs, layout.config
    )


def fill_in_graph(pointers: Sequence[int], device: torch.device) -> Tensor:
    """The table without a copy from the host: the numbers travel as arguments of two launches."""
    table = torch.empty(len(pointers) + 1, dtype=torch.int64, device=device)
    table.zero_()
    torch._foreach_add_(list(table[:-1].unbind()), list(pointers))
    return table


def _make_layout(lists: Sequence[Sequence[Tensor]], device: torch.device, kernel: str) -> _Layout:
    codes = [[CODES.get(t.dtype, BYTES.value) for t in row] for row in lists]
    types = tuple(row[0] if len(set(row)) == 1 else MIXED.value for row in codes)
    sizes = [
        t.numel() * (t.element_size() if code == BYTES.value else 1) for t, code in zip(lists[0], codes[0], strict=True)
    ]
    key = {"elements": triton.next_power_of_2(max(1, sum(sizes))), "lists": len(lists)}
    cfg = configs.tuned(kernel, device, key, config(**key))
    chunks = [(i, c) for i, size in enumerate(sizes) for c in range(max(1, triton.cdiv(size, cfg.block)))]
    return _Layout(
        _upload(sizes, torch.int64, device),
        _upload([code for row in codes for code in row], torch.int32, device),
        _upload(chunks, torch.int32, device),
        types,
        cfg,
    )


def _upload(rows: list, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Pinned, so that the host does not wait.
    return torch.tensor(rows, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def on(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def number(value: float | Tensor | None) -> Any:
    """An argument that is a number or a tensor of one element; kernels are told which by a constant."""
    return value if isinstance(value, Tensor) else float(value or 0.0)


@triton.jit
def where_am_i(sizes, chunks, BLOCK: tl.constexpr, i):
    """Tensor and first element of chunk i, and how many elements the tensor has."""
    t = tl.load(chunks + 2 * i)
    start = tl.load(chunks + 2 * i + 1).to(tl.int64) * BLOCK
    return t, start, tl.load(sizes + t)


@triton.jit
def read_as(address, o, m, dtype: tl.constexpr, MASKED: tl.constexpr, ALIGNED: tl.constexpr):
    p = address.to(tl.pointer_type(dtype))
    if ALIGNED:
        p = tl.multiple_of(p, 16)
    if MASKED:
        return tl.load(p + o, mask=m, other=0.0).to(tl.float32)
    return tl.load(p + o).to(tl.float32)


@triton.jit
def read(addresses, codes, i, o, m, TYPE: tl.constexpr, MASKED: tl.constexpr, ALIGNED: tl.constexpr):
    """Elements o of tensor i (counted over all lists), as float32."""
    address = tl.load(addresses + i)
    if TYPE == FLOAT32:
        x = read_as(address, o, m, tl.float32, MASKED, ALIGNED)
    elif TYPE == BFLOAT16:
        x = read_as(address, o, m, tl.bfloat16, MASKED, ALIGNED)
    elif TYPE == FLOAT16:
        x = read_as(address, o, m, tl.float16, MASKED, ALIGNED)
    else:
        code = tl.load(codes + i)
        if code == FLOAT32:
            x = read_as(address, o, m, tl.float32, MASKED, ALIGNED)
        else:
            if code == BFLOAT16:
                x = read_as(address, o, m, tl.bfloat16, MASKED, ALIGNED)
            else:
                x = read_as(address, o, m, tl.float16, MASKED, ALIGNED)
    return x


@triton.jit
def write_as(address, o, m, x, dtype: tl.constexpr, MASKED: tl.constexpr, ALIGNED: tl.constexpr):
    p = address.to(tl.pointer_type(dtype))
    if ALIGNED:
        p = tl.multiple_of(p, 16)
    if MASKED:
        tl.store(p + o, x.to(dtype), mask=m)
    else:
        tl.store(p + o, x.to(dtype))


@triton.jit
def write(addresses, codes, i, o, m, x, TYPE: tl.constexpr, MASKED: tl.constexpr, ALIGNED: tl.constexpr):
    """Stores x in the dtype of tensor i."""
    address = tl.load(addresses + i)
    if TYPE == FLOAT32:
        write_as(address, o, m, x, tl.float32, MASKED, ALIGNED)
    elif TYPE == BFLOAT16:
        write_as(address, o, m, x, tl.bfloat16, MASKED, ALIGNED)
    elif TYPE == FLOAT16:
        write_as(address, o, m, x, tl.float16, MASKED, ALIGNED)
    else:
        code = tl.load(codes + i)
        if code == FLOAT32:
            write_as(address, o, m, x, tl.float32, MASKED, ALIGNED)
        elif code == BFLOAT16:
            write_as(address, o, m, x, tl.bfloat16, MASKED, ALIGNED)
        else:
            write_as(address, o, m, x, tl.float16, MASKED, ALIGNED)


@triton.jit
def rounded(codes, i, x, TYPE: tl.constexpr):
    """x as `write` stores it, in float32."""
    if TYPE == BFLOAT16:
        x = x.to(tl.bfloat16).to(tl.float32)
    elif TYPE == FLOAT16:
        x = x.to(tl.float16).to(tl.float32)
    elif TYPE == MIXED:
        code = tl.load(codes + i)
        if code == BFLOAT16:
            x = x.to(tl.bfloat16).to(tl.float32)
        elif code == FLOAT16:
            x = x.to(tl.float16).to(tl.float32)
    return x


@triton.jit
def lerp(a, b, weight):
    """a + weight * (b - a), exact at both ends, as torch.lerp."""
    d = b - a
    return tl.where(weight < 0.5, a + weight * d, b - (1.0 - weight) * d)
