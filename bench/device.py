"""The clock, the memory and the graphs of a device, what it is, and which code runs on it. Shared by the benchmarks."""

from __future__ import annotations

import gc
import hashlib
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fastlocal as fl
from fastlocal.blocks.measure import StorageTracker

ROOT = Path(fl.__file__).resolve().parents[1]


class Cuda:
    """What is done differently on a CUDA device. Everything else in this file knows no device."""

    type = "cuda"
    compile_backend = "inductor"

    def compiled(self, fn: Callable[..., Any], mode: str | None = None) -> Callable[..., Any]:
        """``torch.compile`` for one size."""
        return torch.compile(fn, dynamic=False, mode=mode)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def seconds(self, fn: Callable[[], Any], times: int) -> tuple[float, float]:
        """Seconds of one call on the device, and of its launching on the host; the mean of ``times`` calls in a row."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begun = time.perf_counter()
        start.record()
        for _ in range(times):
            fn()
        end.record()
        host = time.perf_counter() - begun
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / times, host / times

    def peak(self, fn: Callable[[], Any]) -> int:
        """Most bytes that a call has allocated at any time beyond what lived before it."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fn()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def graph(self, fn: Callable[[], Any]) -> tuple[Callable[[], Any], int]:
        """A replay of ``fn`` captured in a CUDA graph, and the peak of its own pool."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                fn()
        torch.cuda.current_stream().wait_stream(side)
        captured, outputs = torch.cuda.CUDAGraph(), []

        def capture() -> None:
            with torch.cuda.graph(captured):
                outputs.append(fn())

        peak = self.peak(capture)

        def replay() -> Any:
            captured.replay()
            return outputs[0]

        return replay, peak

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def clocks(self) -> dict[str, str]:
        return smi("clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu", "power.draw", "utilization.gpu")


class Cpu(Cuda):
    """For ``--dry-run``: the same calls on a CPU. Its times and bytes are no measurement."""

    type = "cpu"
    compile_backend = "eager"

    def compiled(self, fn: Callable[..., Any], mode: str | None = None) -> Callable[..., Any]:
        return torch.compile(fn, dynamic=False, backend=self.compile_backend)

    def synchronize(self) -> None: ...

    def seconds(self, fn: Callable[[], Any], times: int) -> tuple[float, float]:
        begun = time.perf_counter()
        for _ in range(times):
            fn()
        each = (time.perf_counter() - begun) / times
        return each, each

    def peak(self, fn: Callable[[], Any]) -> int:
        with StorageTracker() as tracker:
            fn()
        return tracker.peak

    def graph(self, fn: Callable[[], Any]) -> tuple[Callable[[], Any], int]:
        return fn, self.peak(fn)

    def release(self) -> None:
        gc.collect()

    def clocks(self) -> dict[str, str]:
        return {}


def smi(*names: str) -> dict[str, str]:
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [v.strip() for v in run.stdout.strip().split(",")]
    return dict(zip(names, values)) if run.returncode == 0 and len(values) == len(names) else {}


def git(*arguments: str) -> str | None:
    try:
        run = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def source_hash() -> str:
    """SHA-256 over what is measured, so that a record says which code it belongs to where there is no repository."""
    digest = hashlib.sha256()
    for folder in ("fastlocal", "triton_kernels", "bench", "csrc"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h", ".cu") and path.is_file():
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def machine() -> dict[str, Any]:
    """What ran, and where. ``device`` is None without a CUDA device."""
    try:
        import triton

        triton_version: str | None = triton.__version__
    except ImportError:
        triton_version = None
    found: dict[str, Any] = {
        "device": None,
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "triton": triton_version,
        "python": platform.python_version(),
        "fastlocal": fl.__version__,
        "commit": os.environ.get("FASTLOCAL_COMMIT") or git("rev-parse", "HEAD"),
        "changed_since_commit": bool(git("status", "--porcelain", "-uno")),
        "source": source_hash(),
        "cores": os.cpu_count(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "driver": smi("driver_version").get("driver_version"),
            "tf32_convolutions": torch.backends.cudnn.allow_tf32,
        }
    return found


def never_fall_back_to_eager() -> None:
    """A rival that torch.compile gives up on, silently, is no compiled rival."""
    config: Any = torch._dynamo.config
    for name, value in {"recompile_limit": 256, "cache_size_limit": 256, "fail_on_recompile_limit_hit": True}.items():
        if hasattr(config, name):
            setattr(config, name, value)
