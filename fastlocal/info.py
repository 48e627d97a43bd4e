"""`python -m fastlocal.info`: versions, what was built, and what this machine has. `--json` for machines."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from fastlocal._version import __version__
from fastlocal.engine import _native

# Distribution -> the extra of fastlocal that brings it ("" for a plain dependency).
PACKAGES = {
    "numpy": "",
    "safetensors": "",
    "tqdm": "",
    "triton": "triton",
    "scikit-learn": "demo",
    "matplotlib": "demo",
    "lightning": "integrations",
    "transformers": "integrations",
    "accelerate": "integrations",
}
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "asimd", "bf16", "sve")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _compiler() -> dict[str, str] | None:
    named = os.environ.get("CXX", "").split()
    path = next(filter(None, map(shutil.which, named[:1] or ("c++", "g++", "clang++"))), None)
    if path is None:
        return None
    try:
        run = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL)
        version = run.stdout.partition("\n")[0].strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        version = f"does not run: {error}"
    return {"path": path, "version": version}


def _cpu() -> dict[str, Any]:
    name, flags = platform.processor() or platform.machine(), set()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = (part.strip() for part in line.partition(":"))
            if key == "model name":
                name = value
            elif key in ("flags", "Features"):
                flags.update(value.split())
    except OSError:  # not Linux
        pass
    return {
        "name": name,
        "cores": os.cpu_count(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
        "bf16": bool(flags & {"avx512_bf16", "amx_bf16", "bf16"}),
        "amx": "amx_tile" in flags,
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
    }


def _cuda() -> dict[str, Any]:
    if torch.version.cuda is None and torch.version.hip is None:
        return {"available": False, "why_not": "this torch was built without CUDA", "devices": []}
    if not torch.cuda.is_available():
        return {"available": False, "why_not": "torch finds no usable device or driver", "devices": []}
    devices = []
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": found.name,
                "capability": f"{found.major}.{found.minor}",
                "memory_gib": round(found.total_memory / 2**30, 1),
                "multiprocessors": found.multi_processor_count,
            }
        )
    return {"available": True, "why_not": "", "devices": devices}


def collect() -> dict[str, Any]:
    """What there is, as plain values that JSON can hold. Starts CUDA only where a device is available."""
    return {
        "fastlocal": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": {"version": str(torch.__version__), "cuda": torch.version.cuda, "hip": torch.version.hip},
        "native": {"built": _native.available(), "why_not": _native.why_not()},
        "compiler": _compiler(),
        "cpu": _cpu(),
        "cuda": _cuda(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def to_text(found: dict[str, Any]) -> str:
    """`collect()` for people, one line per fact."""
    cpu, cuda, compiler, native = found["cpu"], found["cuda"], found["compiler"], found["native"]
    cuda_build = found["torch"]["cuda"] or found["torch"]["hip"]
    rows = [
        ("fastlocal", found["fastlocal"]),
        ("python", f"{found['python']} on {found['platform']}"),
        ("torch", f"{found['torch']['version']} ({f'CUDA {cuda_build}' if cuda_build else 'CPU only'})"),
        ("native part", "built" if native["built"] else f"missing: {native['why_not']}"),
        ("C++ compiler", f"{compiler['version']} ({compiler['path']})" if compiler else "none found"),
        ("cpu", f"{cpu['name']}, {cpu['cores']} cores, {cpu['threads']} threads in torch"),
        ("cpu flags", f"{' '.join(cpu['flags']) or 'unknown'} (torch uses {cpu['torch_capability']})"),
        ("cpu bf16", f"{'in hardware' if cpu['bf16'] else 'emulated'}, AMX {'yes' if cpu['amx'] else 'no'}"),
    ]
    if not cuda["available"]:
        rows.append(("gpu", f"none: {cuda['why_not']}"))
    for index, device in enumerate(cuda["devices"]):
        size = f"{device['memory_gib']} GiB, {device['multiprocessors']} multiprocessors"
        rows.append((f"gpu {index}", f"{device['name']}, compute capability {device['capability']}, {size}"))
    for name, version in found["packages"].items():
        wanted = f"fastlocal[{PACKAGES[name]}]" if PACKAGES[name] else name
        rows.append((name, version or f"not installed (pip install '{wanted}')"))
    return "\n".join(f"{label:<14}{value}" for label, value in rows)


def main(arguments: list[str] | None = None) -> int:
    """Prints `collect()`; returns 0."""
    parser = argparse.ArgumentParser(prog="python -m fastlocal.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    found = collect()
    print(json.dumps(found, indent=2) if options.json else to_text(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
