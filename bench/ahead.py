"""Triton kernels without a device: what an operator launches, and what a launch compiles to for a GPU that is not there."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import fastlocal.triton_kernels
from fastlocal.ops import _dispatch

# Bytes of shared memory that one block may use.
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
PREFIX = "fl_"  # of the name of every kernel that is launched
_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}
_LAUNCH_OPTIONS = {"num_warps", "num_stages", "num_ctas", "maxnreg"}


class Recorder:
    """Stands in for a kernel and keeps what it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            assert all(0 < size < 2**31 for size in grid)
            self.calls.append((args, kwargs))

        return launch


class Resources(NamedTuple):
    shared: int
    registers: int
    spilled: int  # bytes of stack: these kernels have no arrays, so all of it is spilled registers


def modules() -> list[ModuleType]:
    """All modules of fastlocal.triton_kernels."""
    package = fastlocal.triton_kernels
    return [importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)]


def kernels() -> dict[str, Any]:
    """Every kernel of the package by name."""
    return {name: value for module in modules() for name, value in vars(module).items() if name.startswith(PREFIX)}


@contextlib.contextmanager
def recording() -> Iterator[dict[str, Recorder]]:
    """Inside, operators on CPU tensors choose as on a GPU, and no kernel runs: each launch is kept. What the operators
    return is whatever was in memory."""
    recorders = {name: Recorder(kernel) for name, kernel in kernels().items()}
    places = [(vars(module), name) for module in modules() for name in recorders if name in vars(module)]
    before = [(space, name, space[name]) for space, name in places]
    platform = _dispatch.platform
    try:
        for space, name in places:
            space[name] = recorders[name]
        _dispatch.platform = lambda device: _dispatch.Platform("cuda", None)
        yield recorders
    finally:
        _dispatch.platform = platform
        for space, name, kernel in before:
            space[name] = kernel


def specialized(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict, dict, dict, dict[str, Any]]:
    """Signature, constants, attributes and options of a launch, as the JIT would specialise it."""
    options = {k: v for k, v in kwargs.items() if k in _LAUNCH_OPTIONS}
    values = dict(zip(kernel.arg_names, args)) | {k: v for k, v in kwargs.items() if k not in _LAUNCH_OPTIONS}
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, Tensor):
            signature[parameter.name] = f"*{_TYPES[value.dtype]}"
            if value.data_ptr() % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes, options


def compile_for(capability: int, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], work: Path) -> Resources:
    """Compiles one recorded launch, and reads the cubin's resources."""
    signature, constants, attributes, options = specialized(kernel, args, kwargs)
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    cubin = work / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    command = [str(cuobjdump()), "--dump-resource-usage", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True).stdout
    used = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return Resources(compiled.metadata.shared, used["REG"], used["STACK"] + used["LOCAL"])


def cuobjdump() -> str | None:
    """Triton's own copy, or the CUDA toolkit's; None without either."""
    own = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(own) if own.exists() else shutil.which("cuobjdump")
