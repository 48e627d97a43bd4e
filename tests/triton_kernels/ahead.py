"""Compiles Triton kernels for devices that are not there, from the arguments of a real launch."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Bytes of shared memory that one block may use.
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
}
_LAUNCH_OPTIONS = {"num_warps", "num_stages", "num_ctas", "maxnreg"}


class Recorder:
    """Stands in for a kernel and keeps what it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.calls: list[tuple[tuple, dict[str, Any]]] = []

    def __getitem__(self, grid: tuple) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            assert all(0 < size < 2**31 for size in grid)
            self.calls.append((args, kwargs))

        return launch


class Resources(NamedTuple):
    shared: int
    registers: int
    spilled: int  # bytes of stack: these kernels have no arrays, so all of it is spilled registers


def compile_for(capability: int, kernel: Any, args: tuple, kwargs: dict[str, Any], work: Path) -> Resources:
    """Compiles one recorded launch as the JIT would specialise it, and reads the cubin's resources."""
    options = {k: v for k, v in kwargs.items() if k in _LAUNCH_OPTIONS}
    values = dict(zip(kernel.arg_names, args)) | {k: v for k, v in kwargs.items() if k not in _LAUNCH_OPTIONS}
    signature, constants, attributes = {}, {}, {}
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
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    cubin = work / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    text = subprocess.run([cuobjdump(), "--dump-resource-usage", cubin], capture_output=True, text=True).stdout
    used = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return Resources(compiled.metadata.shared, used["REG"], used["STACK"] + used["LOCAL"])


def cuobjdump() -> str | None:
    """Triton's own copy, or the CUDA toolkit's; None without either."""
    own = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(own) if own.exists() else shutil.which("cuobjdump")
