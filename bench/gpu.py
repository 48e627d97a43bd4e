"""Steps per second, peak memory and kernel times on a CUDA device, against the rivals that its owner already has.

    python -m fastlocal.bench.gpu --out runs/gpu/bench.jsonl [--budget 240] [--tests runs/gpu/tests.jsonl]
    python -m fastlocal.bench.gpu --dry-run      every code path on a CPU with tiny sizes; measures nothing

Variants of a case take turns, so that a warm or throttled minute of the device hits all of them; times are medians of
CUDA events around a few steps, after a warm-up. Nothing reads a loss while the clock runs. Records (JSONL) hold every
single time, the peak of memory, and what ran where: device, driver, versions, clocks, commit. See docs/gpu.md.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import hashlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastlocal as fl
from fastlocal.blocks.measure import StorageTracker
from fastlocal.reference import train_step

SGD = dict(lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4)
ROOT = Path(fl.__file__).resolve().parents[1]
Record = dict[str, Any]
PLAIN = "plain loop, fp32"  # the base of every ratio of steps
EAGER = "eager"  # and of kernels
NO_TIME = "no time left in the budget"


# --- the device -------------------------------------------------------------------------------------------------------


class Cuda:
    """What is done differently on a CUDA device. Everything else in this file knows no device."""

    type = "cuda"
    compile_backend = "inductor"

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
        return _smi("clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu", "power.draw", "utilization.gpu")


class Cpu(Cuda):
    """For ``--dry-run``: the same calls on a CPU. Its times and bytes are no measurement."""

    type = "cpu"
    compile_backend = "eager"

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


def _smi(*names: str) -> dict[str, str]:
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [v.strip() for v in run.stdout.strip().split(",")]
    return dict(zip(names, values)) if run.returncode == 0 and len(values) == len(names) else {}


def _git(*arguments: str) -> str | None:
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
        "commit": os.environ.get("FASTLOCAL_COMMIT") or _git("rev-parse", "HEAD"),
        "changed_since_commit": bool(_git("status", "--porcelain", "-uno")),
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
            "driver": _smi("driver_version").get("driver_version"),
            "tf32_convolutions": torch.backends.cudnn.allow_tf32,
        }
    return found


def never_fall_back_to_eager() -> None:
    """A rival that torch.compile gives up on, silently, is no compiled rival."""
    config: Any = torch._dynamo.config
    for name, value in {"recompile_limit": 256, "cache_size_limit": 256, "fail_on_recompile_limit_hit": True}.items():
        if hasattr(config, name):
            setattr(config, name, value)


# --- steps ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A method on a network. ``rivals``: whether BP takes part."""

    method: str
    blocks: int
    batch: int
    options: dict[str, Any] = field(default_factory=dict)
    model: str = "resnet110"
    rivals: str = ""  # "", "eager" or "compiled"

    @property
    def name(self) -> str:
        options = "".join(f" {key}={value}" for key, value in self.options.items())
        return f"{self.model} {self.method} K={self.blocks}{options} batch {self.batch}"


@dataclass
class Variant:
    """One way to train: a step that returns a loss, and the memory it holds between steps."""

    step: Callable[[], Tensor]
    module: nn.Module
    optimizer: torch.optim.Optimizer
    graph_peak: int | None = None

    def static_bytes(self) -> int:
        state = (t for values in self.optimizer.state.values() for t in values.values() if isinstance(t, Tensor))
        held = [*self.module.parameters(), *self.module.buffers(), *state]
        return sum(t.numel() * t.element_size() for t in held)

    def forget_gradients(self) -> None:
        for p in self.module.parameters():
            p.grad = None


Maker = Callable[[], Variant]


class Steps:
    """The variants of one case: name -> function that makes it. Every variant trains a copy of the same weights."""

    def __init__(self, case: Case, model: fl.LocalModel, x: Tensor, y: Tensor, device: Cuda):
        self.case, self.model, self.device = case, model, device
        self.x, self.y = x.to(device.type), y.to(device.type)
        self._compiled: dict[str, Variant] = {}

    def makers(self) -> dict[str, Maker]:
        low, last = "bf16", "channels_last"
        found: dict[str, Maker] = {}
        rivals: dict[str, dict[str, Any]] = {}
        if self.case.rivals == "compiled":  # alone and last: compiling a whole network takes minutes
            rivals["BP compiled whole"] = {"compiled": "whole"}
            rivals["BP compiled whole, CUDA graph"] = {"compiled": "whole", "graph": True}
            return {
                f"{name}, bf16 channels_last": functools.partial(self.bp, low, last, **rivals[name]) for name in rivals
            }
        for precision, layout in (("fp32", ""), ("bf16", last)):
            found[f"plain loop, {precision} {layout}".strip()] = functools.partial(self.plain, precision, layout)
        for precision, layout in (("fp32", ""), ("fp32", last), ("bf16", ""), ("bf16", last)):
            found[f"engine, {precision} {layout}".strip()] = functools.partial(self.engine, precision, layout)
        if self.case.rivals:
            found["BP, fp32"] = functools.partial(self.bp, "fp32", "")
            rivals = {
                "BP": {},
                "BP, CUDA graph": {"graph": True},
                "BP, every unit checkpointed": {"segments": 0},
                "BP, 8 segments checkpointed": {"segments": 8},
                "BP compiled by unit": {"compiled": "units"},
                "BP compiled by unit, CUDA graph": {"compiled": "units", "graph": True},
            }
            for name, options in rivals.items():
                found[f"{name}, bf16 channels_last"] = functools.partial(self.bp, low, last, **options)
        return found

    def _own(self, module: Any, layout: str) -> tuple[Any, Tensor]:
        own, x = copy.deepcopy(module).to(self.device.type), self.x
        if layout:
            own, x = own.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
        return own, x

    def _autocast(self, precision: str, cache: bool = True) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=cache)

    def plain(self, precision: str, layout: str) -> Variant:
        model, x = self._own(self.model, layout)
        optimizer = torch.optim.SGD(model.parameters(), **SGD)  # type: ignore[arg-type]

        def step() -> Tensor:
            with self._autocast(precision):
                return train_step(model, (x, self.y), optimizer)[-1]

        return Variant(step, model, optimizer)

    def engine(self, precision: str, layout: str) -> Variant:
        model, x = self._own(self.model, "")
        run = fl.Engine(
            model,
            lambda named: torch.optim.SGD(named, **SGD),  # type: ignore[arg-type]
            precision={"fp32": "32-true", "bf16": "bf16-mixed"}[precision],
            memory_format="channels_last" if layout else "preserve",
        )
        x = x.contiguous(memory_format=torch.channels_last) if layout else x
        return Variant(lambda: run.step(x, self.y).losses[-1], model, run.optimizer)

    def bp(
        self, precision: str, layout: str, graph: bool = False, compiled: str = "", segments: int | None = None
    ) -> Variant:
        """Backpropagation of the same network. The graph of a compiled network is captured from its own step."""
        variant = self._compiled.get(compiled)
        if variant is None:
            variant = self._bp(precision, layout, compiled, segments)
            if compiled:
                self._compiled[compiled] = variant
        if not graph:
            return variant
        replay, peak = self.device.graph(variant.step)
        return Variant(replay, variant.module, variant.optimizer, graph_peak=peak)

    def _bp(self, precision: str, layout: str, compiled: str, segments: int | None) -> Variant:
        net, x = self._own(self.model.backbone, layout)
        optimizer = torch.optim.SGD(net.parameters(), **SGD, fused=True)  # type: ignore[arg-type]
        forward: Callable[[Tensor], Tensor] = net
        if compiled == "whole":
            forward = torch.compile(net, dynamic=False, backend=self.device.compile_backend)
        elif compiled == "units":
            for _, unit in net.units():
                if isinstance(unit, nn.Module):
                    unit.compile(dynamic=False, backend=self.device.compile_backend)
        if segments is not None:
            forward = functools.partial(_checkpointed, net, segments)

        def step() -> Tensor:
            optimizer.zero_grad()
            # A cache of cast weights has no use here (each is used once) and no place in a capture.
            with self._autocast(precision, cache=False):
                loss = F.cross_entropy(forward(x), self.y)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return Variant(step, net, optimizer)


def _checkpointed(net: Any, segments: int, x: Tensor) -> Tensor:
    """Full activation checkpointing: only the input of every segment is kept (0: every unit is one)."""
    units = [unit for _, unit in net.units()]
    size = math.ceil(len(units) / segments) if segments else 1
    for at in range(0, len(units), size):
        x = checkpoint(_chain, units[at : at + size], x, use_reentrant=False, preserve_rng_state=False)
    return net.readout(x)


def _chain(units: list[Callable[[Tensor], Tensor]], x: Tensor) -> Tensor:
    for unit in units:
        x = unit(x)
    return x


# --- one operator -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A call of pool_linear_cross_entropy: features [rows, channels, side, side]."""

    rows: int
    channels: int
    side: int
    classes: int
    dtype: torch.dtype = torch.float32
    channels_last: bool = False

    @property
    def name(self) -> str:
        layout = " channels_last" if self.channels_last else ""
        size = f"{self.rows}x{self.channels}x{self.side}x{self.side}"
        return f"pool_linear_cross_entropy {size} -> {self.classes}, {str(self.dtype)[6:]}{layout}"

    def must_move(self) -> int:
        """Bytes that no implementation can avoid: read features, parameters and targets, write the three gradients."""
        bytes_each = self.dtype.itemsize
        features = self.rows * self.channels * self.side**2
        small = 2 * (self.classes * self.channels + self.classes) + self.rows * self.channels
        return (features + small) * bytes_each + 8 * self.rows


class Calls:
    """The rivals of one operator at one shape, as functions of one of several input sets."""

    def __init__(self, shape: Shape, device: Cuda, total_bytes: int):
        self.shape, self.device = shape, device
        sets = max(1, min(64, math.ceil(total_bytes / shape.must_move())))  # together more than the cache holds
        self.sets = [self._inputs() for _ in range(sets)]

    def _inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        s, device = self.shape, self.device.type
        x = torch.randn(s.rows, s.channels, s.side, s.side, device=device).to(s.dtype)
        if s.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        weight = (torch.randn(s.classes, s.channels, device=device) / s.channels**0.5).to(s.dtype)
        bias = torch.zeros(s.classes, device=device, dtype=s.dtype)
        target = torch.randint(s.classes, (s.rows,), device=device)
        return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), target

    def makers(self) -> dict[str, Callable[[], Callable[..., Any]]]:
        found: dict[str, Callable[[], Callable[..., Any]]] = {
            EAGER: lambda: _with_gradients(_eager),
            "eager, mean": lambda: _with_gradients(_eager_mean),
            "compiled": self._compiled,
            "fastlocal": lambda: self._ours(None),
            "fastlocal, aten": lambda: self._ours("aten"),
        }
        if hasattr(F, "linear_cross_entropy"):
            found["F.linear_cross_entropy"] = lambda: _with_gradients(_linear_cross_entropy)
        return found

    def _ours(self, impl: str | None) -> Callable[..., Any]:
        def call(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Any:
            return fl.ops.pool_linear_cross_entropy_value_and_grad(
                x.detach(), weight.detach(), bias.detach(), target, impl=impl
            )

        return call

    def _compiled(self) -> Callable[..., Any]:
        return _with_gradients(torch.compile(_eager, dynamic=False, backend=self.device.compile_backend))

    def through(self, call: Callable[..., Any]) -> Callable[[], Any]:
        """One call on every input set. Results are dropped at once, as in training."""

        def run() -> None:
            for inputs in self.sets:
                call(*inputs)

        return run


def _eager(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    """The pool's gradient is divided while it is small, and then expanded without memory."""
    pooled = x.sum((2, 3)) / (x.shape[2] * x.shape[3])
    return F.cross_entropy(F.linear(pooled, weight, bias), target)


def _eager_mean(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x.mean((2, 3)), weight, bias), target)


def _linear_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    pooled = x.sum((2, 3)) / (x.shape[2] * x.shape[3])
    return F.linear_cross_entropy(pooled, weight, target, linear_bias=bias)  # type: ignore[attr-defined]


def _with_gradients(loss_of: Callable[..., Tensor]) -> Callable[..., Any]:
    def call(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Any:
        loss = loss_of(x, weight, bias, target)
        return loss.detach(), torch.autograd.grad(loss, (x, weight, bias))

    return call


# --- the run ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """What is run: the real sizes, or those of a dry run."""

    cases: tuple[Case, ...]
    shapes: tuple[Shape, ...]
    image: int = 32
    rounds: int = 15
    cache_bytes: int = 256 << 20
    copy_bytes: int = 1 << 30


def _cases(model: str, batches: tuple[int, ...], many: int, few: int, depth: int) -> tuple[Case, ...]:
    found: list[Case] = []
    for batch in batches:
        found += [
            Case("dgl", few, batch, model=model, rivals="eager"),
            Case("auglocal", many, batch, {"depth": depth}, model=model),
            Case("dgl", many, batch, model=model),
        ]
    return (*found, *(Case("bp", 1, batch, model=model, rivals="compiled") for batch in batches))


_LOW = dict(dtype=torch.bfloat16, channels_last=True)
REAL = Sizes(
    cases=_cases("resnet110", (128, 1024), many=55, few=16, depth=3),
    shapes=(
        Shape(128, 64, 8, 10),
        Shape(128, 16, 32, 10),
        Shape(1024, 64, 8, 10, **_LOW),  # type: ignore[arg-type]
        Shape(1024, 16, 32, 10),
        Shape(1024, 16, 32, 10, **_LOW),  # type: ignore[arg-type]
        Shape(256, 512, 14, 1000, **_LOW),  # type: ignore[arg-type]
    ),
)
TINY = Sizes(
    cases=_cases("resnet20", (2,), many=8, few=3, depth=1),
    shapes=(Shape(3, 4, 5, 6), Shape(4, 3, 2, 5, **_LOW)),  # type: ignore[arg-type]
    image=8,
    rounds=1,
    cache_bytes=1 << 10,
    copy_bytes=1 << 16,
)


class Bench:
    """Runs cases until the time is up; every record is written as soon as its case is done."""

    def __init__(self, sizes: Sizes, device: Cuda, out: Path | None, budget: float, tests: Path | None = None):
        self.sizes, self.device, self.out = sizes, device, out
        self.deadline = time.monotonic() + budget
        self.machine = machine()
        self.tests = tests
        self.records: list[Record] = []
        self.models: dict[str, fl.LocalModel] = {}

    def run(self) -> list[Record]:
        """Kernels first (they are quick), then steps, smallest batch first; compiling a whole network comes last."""
        jobs: list[tuple[str, float, Callable[[float], list[Record]]]] = [("copy", 0.2, self._copy)]
        jobs += [(shape.name, 0.6, functools.partial(self._kernel, shape)) for shape in self.sizes.shapes]
        weights = {"": 1.0, "eager": 3.0, "compiled": 4.0}
        jobs += [(case.name, weights[case.rivals], functools.partial(self._steps, case)) for case in self.sizes.cases]
        for i, (name, weight, job) in enumerate(jobs):
            left = self.deadline - time.monotonic()
            share = min(left - 3, left * weight / sum(w for _, w, _ in jobs[i:]) * 1.5)
            if share < 2:
                self._write([{"kind": "skipped", "case": name, "why": NO_TIME}])
                continue
            print(f"{name}: up to {share:.0f} s", flush=True)
            try:
                self._write(job(time.monotonic() + share))
            except Exception as error:
                self._write([{"kind": "error", "case": name, "error": _first_line(error)}])
            self.device.release()
        return self.records

    def _write(self, records: list[Record]) -> None:
        kinds = {r["kind"] for r in records}
        stamp = {
            "verified": verified(self.tests, "kernel" if "kernel" in kinds else "step"),
            "dry_run": self.device.type == "cpu",
            "clocks": self.device.clocks(),
            "machine": self.machine,
        }
        records = [r | stamp for r in records]
        self.records += records
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            with self.out.open("a") as file:
                file.writelines(json.dumps(r) + "\n" for r in records)

    def _copy(self, deadline: float) -> list[Record]:
        """Bandwidth of a copy on the device, counting bytes read and written: the ceiling of every kernel here."""
        source = torch.randn(self.sizes.copy_bytes // 4, device=self.device.type)
        into = torch.empty_like(source)
        into.copy_(source)
        times = [self.device.seconds(lambda: into.copy_(source), 5)[0] for _ in range(self.sizes.rounds)]
        self.bandwidth = 2 * source.numel() * 4 / statistics.median(times)
        return [{"kind": "copy", "case": "copy", "variant": "copy", "bytes_per_second": self.bandwidth}]

    def _kernel(self, shape: Shape, deadline: float) -> list[Record]:
        calls = Calls(shape, self.device, self.sizes.cache_bytes)
        ready: dict[str, tuple[Callable[[], Any], Record]] = {}
        failed: list[Record] = []
        choice = fl.ops.explain(fl.ops.pool_linear_cross_entropy, *calls.sets[0]).chosen
        for name, make in calls.makers().items():
            record = self._record("kernel", shape.name, name)
            record |= {"shape": {**asdict(shape), "dtype": str(shape.dtype)}, "sets": len(calls.sets)}
            record["backend"] = choice if name == "fastlocal" else None
            try:
                run = calls.through(make())
                run()
                record["peak_bytes"] = self.device.peak(run)
                ready[f"{name} eager"] = run, record | {"mode": "eager"}
                ready[f"{name} graph"] = self.device.graph(run)[0], record | {"mode": "graph"}
            except Exception as error:
                failed.append(record | {"error": _first_line(error)})
        floor = shape.must_move() / self.bandwidth
        for record in self._take_turns(ready, deadline, per_call=len(calls.sets)):
            record |= {"must_move_bytes": shape.must_move(), "floor_seconds": floor}
            record["part_of_bandwidth"] = floor / record["median"]
        return [record for _, record in ready.values()] + failed

    def _steps(self, case: Case, deadline: float) -> list[Record]:
        x, y = self._batch(case.batch)
        model = self._localize(case)
        steps = Steps(case, model, x, y, self.device)
        ready: dict[str, tuple[Callable[[], Any], Record]] = {}
        failed: list[Record] = []
        for name, make in steps.makers().items():
            record = self._record("step", case.name, name) | {
                "settings": asdict(case),
                "trained_blocks": len(model.blocks),
            }
            if time.monotonic() > deadline - 1 and name != PLAIN:
                failed.append(record | {"kind": "skipped", "why": NO_TIME})
                continue
            try:
                variant = make()
                record["first_loss"] = float(variant.step())
                for _ in range(2):
                    variant.step()
                if variant.graph_peak is None:
                    variant.forget_gradients()
                    record["peak_bytes"] = self.device.peak(variant.step)
                else:
                    record["peak_bytes"] = variant.graph_peak
                record["static_bytes"] = variant.static_bytes()
                ready[name] = variant.step, record
            except Exception as error:
                failed.append(record | {"error": _first_line(error)})
                self.device.release()
        for record in self._take_turns(ready, deadline):
            record["steps_per_second"] = 1 / record["median"]
            record["images_per_second"] = case.batch / record["median"]
        base = ready[PLAIN][1]["first_loss"] if PLAIN in ready else None
        for name, (step, record) in ready.items():
            record["finite"] = math.isfinite(float(step()))
            if base is not None and not name.startswith("BP"):  # the last block's loss, from the same weights and batch
                record["first_loss_agrees"] = abs(record["first_loss"] - base) <= 0.05 * abs(base)
        return [record for _, record in ready.values()] + failed

    def _take_turns(
        self, ready: dict[str, tuple[Callable[[], Any], Record]], deadline: float, per_call: int = 1
    ) -> Iterator[Record]:
        """Times every variant, one turn each at a time, until the rounds or the time are used up; at least three."""
        counts: dict[str, int] = {}
        times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in ready}
        for name, (run, _) in ready.items():
            counts[name] = max(1, min(50, int(0.04 / self.device.seconds(run, 1)[0])))
        for turn in range(self.sizes.rounds):
            if turn >= 3 and time.monotonic() > deadline:
                break
            for name, (run, _) in ready.items():
                device, host = self.device.seconds(run, counts[name])
                times[name][0].append(device / per_call)
                times[name][1].append(host / per_call)
        for name, (_, record) in ready.items():
            each, hosts = times[name]
            record |= {"seconds": each, "median": statistics.median(each), "calls_a_turn": counts[name]}
            record |= {"p20": _quantile(each, 0.2), "p80": _quantile(each, 0.8)}
            record["host_median"] = statistics.median(hosts)
            yield record

    def _localize(self, case: Case) -> fl.LocalModel:
        """Models are cut once for all batch sizes, on the CPU."""
        key = f"{case.model} {case.method} {case.blocks} {case.options}"
        if key not in self.models:
            torch.manual_seed(0)
            net = fl.models.create(case.model)
            self.models[key] = fl.localize(
                net, case.method, blocks=case.blocks, sample=self._batch(2)[0], **case.options
            )
        return self.models[key]

    def _batch(self, rows: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(rows)
        x = torch.randn(rows, 3, self.sizes.image, self.sizes.image, generator=generator)
        return x, torch.randint(10, (rows,), generator=generator)

    @staticmethod
    def _record(kind: str, case: str, variant: str) -> Record:
        return {"kind": kind, "case": case, "variant": variant}


def verified(tests: Path | None, kind: str) -> bool:
    """Whether the GPU tests of this run, of the operators or of the steps, passed; without a report they did not.

    A fast number from wrong code is worth nothing, so the table shows no ratio then.
    """
    if tests is None or not tests.exists():
        return False
    lines = [json.loads(line) for line in tests.read_text().splitlines() if line.strip()]
    outcomes = [t["outcome"] for t in lines if "outcome" in t and ("/test_pool_" in t["test"]) == (kind == "kernel")]
    return "passed" in outcomes and "failed" not in outcomes


def _quantile(values: list[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]


def table(records: list[Record]) -> str:
    """The records as text. Ratios are speeds over the plain loop (steps) and over eager PyTorch (kernels)."""
    lines: list[str] = []
    unverified = {r["kind"] for r in records if r["kind"] in ("step", "kernel") and not r["verified"]}
    for case in dict.fromkeys(r["case"] for r in records):
        rows = [r for r in records if r["case"] == case]
        if rows[0]["kind"] == "copy" and "bytes_per_second" in rows[0]:
            lines.append(f"copy on the device: {rows[0]['bytes_per_second'] / 1e9:.0f} GB/s, read and written")
            continue
        lines.append(case)
        lines += [
            f"  {r.get('variant', r['kind']):<48} {r.get('error') or r['why']}" for r in rows if "median" not in r
        ]
        timed = [r for r in rows if "median" in r]
        lines += (
            _kernel_rows(timed, unverified) if timed and timed[0]["kind"] == "kernel" else _step_rows(timed, unverified)
        )
    if unverified:
        lines.append(f"no ratios for {' and '.join(sorted(unverified))}: the GPU tests of this run did not all pass")
    if any(r["dry_run"] for r in records):
        lines.append("dry run on a CPU: no number above is a measurement")
    return "\n".join(lines)


def _step_rows(rows: list[Record], unverified: set[str]) -> Iterator[str]:
    base = next((r["median"] for r in rows if r["variant"] == PLAIN), None)
    for r in rows:
        ratio = f"{base / r['median']:7.2f}x" if base and "step" not in unverified else "       -"
        wrong = "" if r["finite"] and r.get("first_loss_agrees", True) else "  WRONG LOSS"
        numbers = f"{r['median'] * 1e3:9.2f} ms {r['steps_per_second']:8.2f}/s {r['peak_bytes'] / 2**20:9.1f} MiB"
        yield f"  {r['variant']:<48}{numbers}{ratio}{wrong}"


def _kernel_rows(rows: list[Record], unverified: set[str]) -> Iterator[str]:
    """Eager launch, host time, graph replay, the part of the copy bandwidth that it reaches, and its ratio."""
    by_mode = {mode: {r["variant"]: r for r in rows if r["mode"] == mode} for mode in ("eager", "graph")}
    for name, eager in by_mode["eager"].items():
        text = f"  {name:<26}{eager['median'] * 1e6:9.1f} us {eager['host_median'] * 1e6:8.1f} host"
        if graph := by_mode["graph"].get(name):
            text += f"{graph['median'] * 1e6:9.1f} us in a graph {graph['part_of_bandwidth']:6.1%}"
            if EAGER in by_mode["graph"] and "kernel" not in unverified:
                text += f"{by_mode['graph'][EAGER]['median'] / graph['median']:7.2f}x"
        yield text


def main(argv: list[str] | None = None) -> int:
    """Returns 0, 1 where a case or variant failed, 2 without a CUDA device."""
    parser = argparse.ArgumentParser(
        prog="python -m fastlocal.bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="append the records to this .jsonl file")
    parser.add_argument("--budget", type=float, default=240, help="seconds (default 240)")
    parser.add_argument("--tests", type=Path, help="tests.jsonl of `make gpu`: ratios are shown only where it is green")
    parser.add_argument("--dry-run", action="store_true", help="run every code path on a CPU with tiny sizes")
    parser.add_argument("--machine", action="store_true", help="print what would run where, as JSON, and stop")
    args = parser.parse_args(argv)
    if args.machine:
        print(json.dumps(machine()))
        return 0
    if not args.dry_run and not torch.cuda.is_available():
        print("no CUDA device: nothing to measure (--dry-run runs the code on a CPU)", file=sys.stderr)
        return 2
    if args.dry_run:
        torch.set_num_threads(1)
    else:
        torch.backends.cudnn.benchmark = True  # for every variant alike
    never_fall_back_to_eager()
    bench = Bench(TINY if args.dry_run else REAL, Cpu() if args.dry_run else Cuda(), args.out, args.budget, args.tests)
    records = bench.run()
    print(table(records))
    return int(any("error" in r for r in records))


if __name__ == "__main__":
    raise SystemExit(main())
