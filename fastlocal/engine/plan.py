"""`fastlocal.plan`: what a training step will cost, from fake tensors. No device, no data, no training.

The step that is looked at is `Engine`'s own, run on tensors without contents, so the plan follows the engine wherever it
goes. Bytes, FLOPs and launches are counted; the time is a roofline over them for a device of a table.
"""

from __future__ import annotations

import bisect
import copy
import gc
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeCopyMode,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
    unset_fake_temporarily,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count

from fastlocal.blocks.adapters import SliceAdapter
from fastlocal.blocks.batch import first_tensor
from fastlocal.blocks.measure import (
    _MORE_FLOPS,
    LaunchCounter,
    SavedBytes,
    StorageTracker,
    _launches,
    _tensors,
)
from fastlocal.blocks.partition import Units, find_units
from fastlocal.blocks.types import StepContext
from fastlocal.engine import gantt
from fastlocal.engine.engine import PRECISIONS, Engine
from fastlocal.engine.flight import Flight
from fastlocal.engine.localize import _all_slots, _Builder, _put_back, localize, parse_bytes, prepare
from fastlocal.engine.model import LocalModel
from fastlocal.engine.optimizer import OptimizerFactory
from fastlocal.engine.schedule import SCHEDULES, StepSchedule, best_schedule, make_schedule, refusal
from fastlocal.engine.simulate import Comparison, Cost, compare, simulate
from fastlocal.engine.tasks import StepTasks, compile_step
from fastlocal.errors import ArgumentError, BackendError, did_you_mean
from fastlocal.ops._dispatch import as_on_gpu

__all__ = ["Device", "DEVICES", "BlockPlan", "Plan", "plan"]


# --------------------------------------------------------------------------------------------------------------- devices


Curve = tuple[tuple[float, float], ...]  # (size, rate), sizes ascending


@dataclass(frozen=True)
class Device:
    """The roof of a roofline, or what was measured.

    Attributes:
        name: shown in plans.
        flops: peak dense FLOP/s by dtype; a dtype that is missing counts as float32.
        bandwidth: bytes per second of its memory.
        launch: seconds an operator takes at least. Not on any data sheet: an assumption for PyTorch's eager mode.
        memory: bytes it has, None for a host.
        tf32: FLOP/s of float32 products in TF32, used where PyTorch's flags allow it (by default for convolutions).
        rates: what operators achieve, by name and dtype: FLOP/s over the narrowest dimension of their matrices, or bytes per
            second over the bytes they move. Where there are some, they stand instead of ``flops`` and ``bandwidth``.
        waits: an operator is done before the next begins, so ``launch`` comes on top of every one's time.
    """

    name: str
    flops: dict[torch.dtype, float]
    bandwidth: float
    launch: float
    memory: int | None = None
    tf32: float | None = None
    rates: dict[tuple[str, torch.dtype], Curve] = field(default_factory=dict, repr=False)
    waits: bool = False

    @staticmethod
    def measure(kind: str | None = None) -> Device:
        """The machine at hand ("cpu" or "cuda"), measured for some seconds, once per process and number of threads."""
        from fastlocal.engine.calibrate import measure_device  # which stands on this module

        return measure_device(kind, torch.get_num_threads())


def _tensor_cores(half: float, single: float, double: float) -> dict[torch.dtype, float]:
    return {torch.bfloat16: half, torch.float16: half, torch.float32: single, torch.float64: double}


# NVIDIA's data sheets for the SXM boards, dense (without sparsity); the 80 GB A100. The CPU entry is the arithmetic of one
# AVX2 core (2 FMA units x 8 lanes x 2 at 2.5 GHz) with its share of a server's memory.
DEVICES: dict[str, Device] = {
    "h100": Device("h100", _tensor_cores(989e12, 67e12, 67e12), 3.35e12, 5e-6, 80 * 10**9, 494e12),
    "h200": Device("h200", _tensor_cores(989e12, 67e12, 67e12), 4.8e12, 5e-6, 141 * 10**9, 494e12),
    "a100": Device("a100", _tensor_cores(312e12, 19.5e12, 19.5e12), 2.039e12, 5e-6, 80 * 10**9, 156e12),
    "cpu-core": Device("cpu-core", _tensor_cores(80e9, 80e9, 40e9), 10e9, 5e-6),
}

_OPTIMIZERS: dict[str, OptimizerFactory] = {
    "sgd": lambda named: torch.optim.SGD(named, lr=0.1),
    "momentum": lambda named: torch.optim.SGD(named, lr=0.1, momentum=0.9),
    "adam": lambda named: torch.optim.AdamW(named, lr=1e-3),
}


# ---------------------------------------------------------------------------------------------------------------- result


@dataclass
class BlockPlan:
    """One block's part of a step. Bytes are those alive above what outlives every step.

    Attributes:
        index, name: of the block.
        parameters: how many numbers it trains, head included.
        boundary_bytes: of its output, which is all that lives on when the block is done.
        peak_bytes: the most bytes alive while the block runs; the sum of the next three.
        saved_bytes, gradient_bytes, workspace_bytes: at that moment, what autograd holds for backward (the block's input
            among it), gradients of parameters, and the rest: values on their way, and what earlier blocks left.
        most_saved_bytes: the most that autograd holds at any moment.
        flops: of products (matrix, convolution, attention), forward and backward; a multiply-accumulate is two.
        bytes_moved: of the inputs and outputs of every launched operator, update included.
        launches: as `fastlocal.blocks.measure.LaunchCounter` counts.
        seconds: sum over operators of the largest of FLOPs, bytes and launches over the device's figures.
    """

    index: int
    name: str
    parameters: int = 0
    boundary_bytes: int = 0
    peak_bytes: int = 0
    saved_bytes: int = 0
    gradient_bytes: int = 0
    workspace_bytes: int = 0
    most_saved_bytes: int = 0
    flops: int = 0
    bytes_moved: int = 0
    launches: int = 0
    seconds: float = 0.0


@dataclass
class Plan:
    """What a step costs. In sequence ``peak_bytes`` is the sum of the five parts that it is made of.

    Attributes:
        method, device, rows, precision: what was planned.
        parameter_bytes: parameters and buffers, heads included.
        optimizer_bytes: state of the optimizer.
        engine_bytes: what the engine keeps between steps (copies of BatchNorm statistics, flags).
        batch_bytes: the batch itself.
        blocks: per block.
        costs: per block, as `fastlocal.engine.simulate` takes them.
        schedule: the tasks of a step with their seconds and bytes, and how they are run. Its ``plan.period`` is the predicted
            time of a step under it. The bytes are those of the step's own tasks and of the batch.
    """

    method: str
    device: Device
    rows: int
    precision: str
    parameter_bytes: int = 0
    optimizer_bytes: int = 0
    engine_bytes: int = 0
    batch_bytes: int = 0
    blocks: list[BlockPlan] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list, repr=False)
    schedule: StepSchedule | None = field(default=None, repr=False)
    _one_order: str = field(default="", repr=False)  # why steps can only be run in sequence
    _behind: str = field(default="", repr=False)  # why blocks cannot stand one behind the other on ranks
    _stages: Callable[[int], Plan] | None = field(default=None, repr=False, compare=False)

    @property
    def resident_bytes(self) -> int:
        """What lives through the whole step, the batch included."""
        return self.parameter_bytes + self.optimizer_bytes + self.engine_bytes + self.batch_bytes

    @property
    def peak_bytes(self) -> int:
        """Most bytes alive at any moment, by the schedule."""
        if self.schedule is not None and self.schedule.kind != "sequential":
            return self.resident_bytes - self.batch_bytes + self.schedule.plan.peak_bytes
        return self.resident_bytes + max(b.peak_bytes for b in self.blocks)

    @property
    def flops(self) -> int:
        return sum(b.flops for b in self.blocks)

    @property
    def bytes_moved(self) -> int:
        return sum(b.bytes_moved for b in self.blocks)

    @property
    def launches(self) -> int:
        return sum(b.launches for b in self.blocks)

    @property
    def seconds(self) -> float:
        return sum(b.seconds for b in self.blocks)

    @property
    def table(self) -> list[dict[str, Any]]:
        """One dict per block, with the attributes of `BlockPlan` as keys."""
        return [asdict(b) for b in self.blocks]

    def fits(self, budget: str | float | None = None) -> bool:
        """Whether the peak is within ``budget`` (bytes or "16GiB"; default the device's memory)."""
        if budget is None:
            return self.device.memory is None or self.peak_bytes <= self.device.memory
        return self.peak_bytes <= parse_bytes(budget)

    def simulate(
        self,
        ranks: int,
        *,
        bandwidth: float = math.inf,
        latency: float = 0.0,
        microbatches: int | None = None,
        straggler: Mapping[int, float] | Sequence[float] | None = None,
        jitter: float = 0.0,
        seed: int = 0,
        overlap: bool = True,
        buffers: int = 2,
        steps: int | None = None,
    ) -> Comparison:
        """This step on many ranks: its blocks as a pipeline, beside the same network under GPipe and 1F1B.

        Blocks have this plan's seconds and bytes. Those of back-propagation are planned for the same network under "bp", unit
        by unit, for a micro-batch as it is: what a small batch cannot fill is not made up for. See docs/schedules.md for what
        is left out.

        Args:
            ranks: devices of the plan's kind, in a chain.
            bandwidth, latency: of the links: bytes per second, and seconds.
            microbatches: of back-propagation, equal parts of the batch; default the power of two, up to four for each rank,
                with the shortest step under 1F1B.
            straggler, jitter, seed, overlap, buffers, steps: as for `fastlocal.engine.simulate.simulate`.

        Returns:
            A `Comparison`; ``print`` it, or draw one of its ``runs``. It has no "local" for plans of "bp", and for methods
            whose blocks need something of the blocks behind them.

        Raises:
            ArgumentError: a value out of range, more ranks than blocks or units, or micro-batches that do not divide the
                batch evenly, or have one row where there is BatchNorm.
            BackendError: for a network that is cut by hooks, or a plan without its network (unpickled).
        """
        if isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1:
            raise ArgumentError(f"ranks: expected an integer of at least 1, got {ranks!r}")
        if microbatches is not None:
            if isinstance(microbatches, bool) or not isinstance(microbatches, int) or microbatches < 1:
                raise ArgumentError(f"microbatches: expected an integer of at least 1, got {microbatches!r}")
            if self.rows % microbatches:
                raise ArgumentError(
                    f"microbatches: {microbatches} do not divide a batch of {self.rows} rows evenly; give a divisor of it"
                )
        if self._stages is None:
            raise BackendError("simulate: this plan has lost its network; make it anew with fastlocal.plan")
        machine: dict[str, Any] = {
            "ranks": ranks, "bandwidth": bandwidth, "latency": latency, "overlap": overlap, "straggler": straggler,
            "jitter": jitter, "seed": seed, "steps": steps,
        }  # fmt: skip
        whole = micro = self._stages(self.rows).costs
        if microbatches is None:
            microbatches, micro = self._best_microbatches(whole, machine)
        elif microbatches > 1:
            micro = self._stages(self.rows // microbatches).costs
        link = "free links" if bandwidth == math.inf else f"links of {bandwidth / 1e9:,.3g} GB/s"
        title = (
            f"{self.rows} rows on {ranks} rank{'s' * (ranks > 1)} of {self.device.name}, {link}, {latency * 1e6:,.3g} us; "
            f"local: {self.method}, {len(self.blocks)} blocks; bp: {microbatches} micro-batches of "
            f"{self.rows // microbatches} rows"
        )
        alone = self._behind or ("there is one block" if len(self.blocks) == 1 else "")
        if alone:
            title += f"\nno local pipeline: {alone}"
        return compare(
            None if alone else self.costs, whole, micro, title=title, microbatches=microbatches, buffers=buffers, **machine
        )  # fmt: skip

    def _best_microbatches(self, whole: list[Cost], machine: dict[str, Any]) -> tuple[int, list[Cost]]:
        """1, 2, 4, ... of two rows or more, up to four for each rank: the number whose 1F1B step is the shortest."""
        assert self._stages is not None
        costs = {1: whole}
        while (more := 2 * max(costs)) <= 4 * machine["ranks"] and self.rows % more == 0 and self.rows // more > 1:
            costs[more] = self._stages(self.rows // more).costs
        best = min(costs, key=lambda m: (simulate(costs[m], "1f1b", microbatches=m, **machine).seconds, m))
        return best, costs[best]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stages": None}  # which holds the network

    def with_schedule(
        self,
        schedule: str,
        *,
        streams: int = 2,
        in_flight: int | None = None,
        memory_budget: str | float | None = None,
    ) -> Plan:
        """The same step under another schedule; for the arguments see `plan`.

        Where the schedule cannot serve the model, as in the engine, the result is sequential, and its text says why.

        Raises:
            ArgumentError: a value that is not valid, or a budget that no order of the tasks meets.
            BackendError: ``"pipeline"`` with ``update="end"``, or a missing native extension.
        """
        if schedule not in SCHEDULES:
            raise ArgumentError(f"schedule: got {schedule!r}. {did_you_mean(str(schedule), SCHEDULES)}")
        for name, value in (("streams", streams), ("in_flight", 1 if in_flight is None else in_flight)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ArgumentError(f"{name}: expected an integer of at least 1, got {value!r}")
        budget = None if memory_budget is None else parse_bytes(memory_budget)
        old = self.schedule
        assert old is not None
        if schedule == "pipeline" and any(task.block < 0 for task in old.tasks):
            raise BackendError(
                "schedule: 'pipeline' updates a block while others are at other steps, but update='end' holds every update back to "
                "the end of a step; use 'overlap', or update='immediate'"
            )
        if reason := self._one_order if schedule != "sequential" else "":
            return replace(self, schedule=replace(old, reasons={schedule: reason}))
        step = StepTasks(old.tasks, old.edges)
        host = self.device.memory is None
        if host and any(task.random for task in old.tasks):
            streams = 1  # random numbers are drawn on the calling thread, and then all runs there
        found = best_schedule(
            schedule, step, old.cost, host=host, bytes_made=old.bytes_made, bytes_freed=old.bytes_freed, streams=streams,
            in_flight=max(2, streams) if in_flight is None else in_flight, memory_budget=budget,
        )  # fmt: skip
        return replace(self, schedule=found)

    def draw_schedule(self, path: str | Path, steps: int | None = None) -> None:
        """A Gantt picture of the schedule, from the first to the last of ``steps``; the format is the suffix of ``path``.

        Raises BackendError without matplotlib.
        """
        assert self.schedule is not None
        gantt.draw(gantt.timeline(self.schedule, steps), path)

    def trace_schedule(self, path: str | Path, steps: int | None = None) -> None:
        """The same as a Chrome trace, for Perfetto or chrome://tracing."""
        assert self.schedule is not None
        gantt.trace(gantt.timeline(self.schedule, steps), path)

    def to_text(self) -> str:
        """A table and its sums."""
        head = ("block", "last unit", "params", "boundary", "peak", "saved", "grads", "workspace", "GFLOP", "moved",
                "launches", "ms")  # fmt: skip
        rows: list[tuple[str, ...]] = [head]
        for b in self.blocks:
            sizes = (b.boundary_bytes, b.peak_bytes, b.saved_bytes, b.gradient_bytes, b.workspace_bytes)
            rows.append(
                (
                    str(b.index), b.name, f"{b.parameters:,}", *map(_mib, sizes), f"{b.flops / 1e9:,.2f}",
                    _mib(b.bytes_moved), f"{b.launches:,}", f"{b.seconds * 1e3:.3f}",
                )
            )  # fmt: skip
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = [
            "  ".join(c.ljust(w) if i == 1 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))) for row in rows
        ]
        worst = max(self.blocks, key=lambda b: b.peak_bytes)
        parts = [
            ("parameters and buffers", self.parameter_bytes),
            ("optimizer", self.optimizer_bytes),
            ("engine", self.engine_bytes),
        ]
        scheduled: list[str] = []
        if self.schedule is None or self.schedule.kind == "sequential":
            parts += [("batch", self.batch_bytes), (f"block {worst.index}", worst.peak_bytes)]
            if self.schedule is not None:
                scheduled = [f"{name} cannot serve: {reason}" for name, reason in self.schedule.reasons.items()]
        else:
            parts.append(("batches and tasks in flight", self.schedule.plan.peak_bytes))
            scheduled = gantt.summary(self.schedule)
        return "\n".join(
            [
                f"{self.method}, {len(self.blocks)} blocks, {self.rows} rows, {self.precision}, on {self.device.name}; "
                "sizes in MiB",
                *lines,
                f"peak {_mib(self.peak_bytes)} MiB = " + " + ".join(f"{name} {_mib(n)}" for name, n in parts),
                f"{self.flops / 1e9:,.1f} GFLOP, {_mib(self.bytes_moved)} MiB moved, {self.launches:,} launches, "
                f"{self.seconds * 1e3:.2f} ms by the roofline of {self.device.name}",
                *scheduled,
            ]
        )

    def draw(self, path: str | Path, bp: Plan | None = None) -> None:
        """Bars per block of the sequential step: bytes at its peak by what they are, and time below.

        The format is the suffix of ``path``.

        ``bp``, the plan of the same network under back-propagation, adds a line at its peak.

        Raises BackendError without matplotlib.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise BackendError("matplotlib is not installed; pip install 'fastlocal[demo]'") from error
        at = range(len(self.blocks))
        peak = self.resident_bytes + max(b.peak_bytes for b in self.blocks)
        whole = self.resident_bytes / 2**20
        fig = Figure(figsize=(max(9.0, min(16.0, 4 + 0.3 * len(self.blocks))), 7), layout="constrained")
        fig.suptitle(
            f"{self.method.partition('(')[0]}, {len(self.blocks)} blocks, {self.rows} rows, {self.precision}: "
            f"peak {_mib(peak)} MiB, {self.seconds * 1e3:.1f} ms a step", fontsize=12,
        )  # fmt: skip
        memory, time = fig.subplots(2, 1, sharex=True)
        low = [whole] * len(self.blocks)
        memory.bar(at, low, color="#BBBBBB", label="parameters, optimizer, batch")
        for key, color, label in (
            ("saved", "#0072B2", "saved for backward"), ("gradient", "#D55E00", "gradients"), ("workspace", "#E69F00", "workspace"),
        ):  # fmt: skip
            sizes = [getattr(b, f"{key}_bytes") / 2**20 for b in self.blocks]
            memory.bar(at, sizes, bottom=low, color=color, label=label)
            low = [a + b for a, b in zip(low, sizes)]
        memory.axhline(peak / 2**20, color="black", linewidth=0.8, label="peak of the step")
        if bp is not None:
            memory.axhline(bp.peak_bytes / 2**20, color="black", linestyle="--", linewidth=0.8, label="peak under BP")
        memory.set_ylabel("MiB at the block's peak")
        memory.set_ylim(0, 1.05 * max(peak, bp.peak_bytes if bp else 0) / 2**20)
        memory.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
        time.bar(at, [b.seconds * 1e3 for b in self.blocks], color="#009E73")
        time.set_ylabel(f"ms on {self.device.name}")
        time.set_xlabel("block, by its last unit")
        step = math.ceil(len(at) / 40)
        time.set_xticks(
            at[::step],
            [f"{b.index}\n{b.name}" if len(at) <= 10 else f"{b.index} {b.name}" for b in self.blocks][::step],
        )
        if len(at) > 10:
            time.tick_params(axis="x", rotation=90, labelsize=8)
        for axes in (memory, time):
            axes.spines[["top", "right"]].set_visible(False)
        fig.savefig(path)

    def __repr__(self) -> str:
        return (
            f"Plan({self.method}, {len(self.blocks)} blocks, {self.rows} rows: peak {_mib(self.peak_bytes)} MiB, "
            f"{self.flops / 1e9:,.1f} GFLOP, {self.launches:,} launches, {self.seconds * 1e3:.2f} ms on {self.device.name})"
        )


def _mib(nbytes: float) -> str:
    return f"{nbytes / 2**20:,.2f}"


# ------------------------------------------------------------------------------------------------------------------ plan


def plan(
    model: nn.Module | Callable[[], nn.Module],
    sample: Any,
    *,
    device: str | Device = "h100",
    rows: int | None = None,
    method: str | None = None,
    blocks: int | list[str] | Literal["auto"] | None = None,
    budget: str | float | None = None,
    optimizer: str | OptimizerFactory = "momentum",
    precision: str = "32-true",
    update: Literal["immediate", "end"] = "immediate",
    memory_format: Literal["preserve", "channels_last"] = "preserve",
    schedule: Literal["sequential", "overlap", "pipeline"] = "sequential",
    streams: int = 2,
    in_flight: int | None = None,
    memory_budget: str | float | None = None,
    **options: Any,
) -> Plan:
    """Predicts memory, FLOPs, bytes moved, launches and time of one `Engine` step, in steady state.

    Nothing is computed and nothing in ``model`` changes; its weights may be on any device, "meta" included.

    Args:
        model: a `LocalModel`, a network, or a function without arguments that makes either (called where tensors have no
            contents, so a network of any size takes no memory).
        sample: a batch as ``engine.step`` takes it, ``(x, y)`` or a mapping, or the input alone, for which targets are made.
        device: name in `fastlocal.engine.plan.DEVICES`, "here" for `Device.measure()`, or a `Device` with figures of your own.
            It decides the time only.
        rows: batch size, where it is not that of the sample.
        method, blocks, options: for a network, as in `fastlocal.localize`; default "bp". ``"auto"`` takes the fewest blocks
            whose planned peak is within ``budget``; of up to 128 counts none that fits is missed.
        budget: bytes or "16GiB", for ``blocks="auto"``.
        optimizer: "sgd", "momentum", "adam", or a function of a block's ``[(name, parameter)]`` as for `Engine`.
        precision, update, memory_format: as for `Engine`.
        schedule: ``"sequential"``, ``"overlap"`` or ``"pipeline"``, as for `Engine`. The table of blocks is that of the
            sequential step in every case; ``Plan.schedule`` and ``peak_bytes`` are the schedule's.
        streams: tasks that may run at once, of other schedules than sequential. Each is taken to be as fast as alone.
        in_flight: the most steps on their way at once, for ``"pipeline"``; default as many as streams, at least 2.
        memory_budget: bytes or "4GiB" for what the tasks of the steps in flight hold, batches included; None for no limit.

    Returns:
        A `Plan`. Operators are those a CPU would run. Not in it: rounding and fragmentation of an allocator, workspace that a
        kernel takes and gives back, and what the CUDA context holds.

    Raises:
        ArgumentError: an argument that does not exist or fit, or a budget that no number of blocks or no order meets.
        BackendError: as `Plan.with_schedule`.
    """
    roof = _device(device)
    if schedule not in SCHEDULES:
        raise ArgumentError(f"schedule: got {schedule!r}. {did_you_mean(str(schedule), SCHEDULES)}")
    if memory_format not in ("preserve", "channels_last"):
        raise ArgumentError(f"memory_format: got {memory_format!r}; valid are 'preserve', 'channels_last'")
    if isinstance(optimizer, str) and optimizer not in _OPTIMIZERS:
        raise ArgumentError(f"optimizer: got {optimizer!r}. {did_you_mean(optimizer, _OPTIMIZERS)}")
    if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 1):
        raise ArgumentError(f"rows: expected a batch size of at least 1, got {rows!r}")
    if (blocks == "auto") != (budget is not None):
        raise ArgumentError("budget: goes with blocks='auto', and blocks='auto' with budget='16GiB'")
    factory = _OPTIMIZERS[optimizer] if isinstance(optimizer, str) else optimizer
    made = {"precision": precision, "update": update, "memory_format": memory_format}
    found = _plan(model, sample, roof, rows, method, blocks, budget, factory, made, options)
    kept: dict[str, Any] = {
        key: options[key] for key in ("criterion", "batch", "num_classes", "tied") if key in options
    }
    found._stages = partial(_stages, model, sample, roof, factory, made, kept)
    if schedule == "sequential" and memory_budget is None:
        return found
    return found.with_schedule(schedule, streams=streams, in_flight=in_flight, memory_budget=memory_budget)


def _plan(
    model: nn.Module | Callable[[], nn.Module],
    sample: Any,
    roof: Device,
    rows: int | None,
    method: str | None,
    blocks: int | list[str] | Literal["auto"] | None,
    budget: str | float | None,
    factory: OptimizerFactory,
    made: dict[str, Any],
    options: dict[str, Any],
) -> Plan:
    with _no_contents() as fakes:
        net = _fake_model(model, fakes)
        batch = _fake_batch(sample, fakes)
        if isinstance(net, LocalModel):
            if method is not None or blocks is not None or options:
                raise ArgumentError(
                    "method, blocks, options: the model is cut already; give its .backbone to cut it anew"
                )
            return _plan_step(net, _of_rows(_complete(net, batch), rows), factory, roof, made, fakes)
        if blocks != "auto":
            cut = localize(net, method or "bp", blocks=blocks, sample=_of_rows(batch, 2), **options)
            return _plan_step(cut.train(), _of_rows(_complete(cut, batch), rows), factory, roof, made, fakes)
        assert budget is not None
        builder = prepare(net, method or "bp", sample=_of_rows(batch, 2), **options)
        given = first_tensor(batch)
        assert given is not None
        search = _Search(builder, factory, roof, made, fakes)
        return search.fewest(parse_bytes(budget), rows or given.shape[0], "budget")[1]


@contextmanager
def _no_contents() -> Iterator[FakeTensorMode]:
    """Tensors have no contents inside. Real ones that no module registers, such as a method's constants, are let in."""
    with FakeTensorMode(allow_non_fake_inputs=True) as fakes, _Copies(), _Reads(), torch.random.fork_rng(devices=[]):
        yield fakes


def _stages(
    model: nn.Module | Callable[[], nn.Module],
    sample: Any,
    roof: Device,
    factory: OptimizerFactory,
    made: dict[str, Any],
    options: dict[str, Any],
    rows: int,
) -> Plan:
    """The same network under back-propagation, with the costs of its units."""
    with _no_contents() as fakes:
        net = _fake_model(model, fakes)
        batch = _fake_batch(sample, fakes)
        if isinstance(net, LocalModel):
            batch = _complete(net, batch)
            options = {"criterion": net.criterion, "batch": net._batch, "num_classes": net.num_classes}
            net = net.backbone
        cut = localize(net, "bp", blocks=1, sample=_of_rows(batch, 2), **options)
        return _plan_step(cut.train(), _of_rows(_complete(cut, batch), rows), factory, roof, made, fakes, units=True)


# ------------------------------------------------------------------------------------------------- the number of blocks


EVERY_COUNT = 128  # up to here a search for the number of blocks leaves none out


class _Over(Exception):
    """A step is over its limit and has been left."""


def fewest_blocks(builder: _Builder, budget: int, rows: int | None) -> int:
    """For `localize`: the fewest blocks whose step of float32 and SGD with momentum is within ``budget`` bytes.

    Raises ArgumentError where no count fits, or where the network cannot run on tensors without contents.
    """
    made = {"precision": "32-true", "update": "immediate", "memory_format": "preserve"}
    with _no_contents() as fakes:
        own = copy.copy(builder)
        own.net, own.method = _fake_model(builder.net, fakes), copy.deepcopy(builder.method)
        if isinstance(own.criterion, nn.Module):
            own.criterion = _fake_model(own.criterion, fakes)
        call = builder.args, builder.kwargs, builder.target
        own.args, own.kwargs, own.target = tree_map_only(Tensor, _fake, call)
        on_gpu = any(p.device.type == "cuda" for p in builder.net.parameters())  # only the operators matter here
        search = _Search(own, _OPTIMIZERS["momentum"], DEVICES["h100" if on_gpu else "cpu-core"], made, fakes)
        try:
            return search.fewest(budget, rows, "memory_budget")[0]
        except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
            raise ArgumentError(
                f"blocks: 'auto' plans steps of tensors without contents, and {type(builder.net).__name__} needs some "
                f"({error}); give a number of blocks"
            ) from error


@dataclass
class _Search:
    """Finds the fewest blocks whose planned peak is within a budget, on tensors without contents.

    Peaks need not fall with every block more, so counts are tried upwards from 1, and every one up to `EVERY_COUNT`. Most are
    cheap to rule out by what a step holds at least: the parameters and what autograd saves in the largest block without its
    head, or all parameters and what lives while the largest blocks run by themselves. Any other is planned, and left at
    the moment it is over. Above `EVERY_COUNT` steps of an eighth are taken, and after a hit all counts since the step before.
    """

    builder: _Builder
    factory: OptimizerFactory
    device: Device
    made: dict[str, Any]
    fakes: FakeTensorMode

    def fewest(self, budget: int, rows: int | None, argument: str) -> tuple[int, Plan]:
        """The count as `localize` takes it, and its plan. ``argument`` is what the error names the budget."""
        builder = self.builder
        units = builder.units()  # of the sample's rows, as those that `localize` will cut
        call = builder.args, builder.kwargs, builder.target
        builder.args, builder.kwargs, builder.target = _of_rows(call, rows)
        units.saved = builder.units().saved
        target, builder.criterion = builder.task(units)
        builder.target = target
        builder.net.train()
        builder.batch = _as_is
        batch = builder.args, builder.kwargs, target
        refused: ArgumentError | None = None

        def attempt(blocks: int, limit: int | None) -> Plan | None:
            nonlocal refused
            before = [(slot, slot.value) for slot in _all_slots(builder.net)]
            try:
                if limit is not None and self._alone(units, blocks, limit) > limit:
                    return None
                model = builder.trial(units, blocks).train()
                return _plan_step(model, batch, self.factory, self.device, self.made, self.fakes, limit)
            except _Over:
                return None
            except ArgumentError as error:  # the method has no head for these blocks; for others it may
                refused = error
                return None
            finally:
                _put_back(before)

        least: dict[int, int] = {}
        tried = 0
        for blocks in _counts(len(units.names)):
            try:
                least[blocks] = self._least(units, blocks)
            except ArgumentError as error:
                refused = error
            else:
                found = attempt(blocks, budget) if least[blocks] <= budget else None
                if found is not None:
                    between = ((fewer, attempt(fewer, budget)) for fewer in range(tried + 1, blocks))
                    return next(((fewer, plan) for fewer, plan in between if plan is not None), (blocks, found))
            tried = blocks
        nearest = sorted(least, key=lambda blocks: (least[blocks], blocks))
        plans = [(blocks, attempt(blocks, None)) for blocks in (nearest[:4] if len(nearest) > 12 else nearest)]
        whole = [(found.peak_bytes, blocks) for blocks, found in plans if found is not None]
        if not whole:
            assert refused is not None
            raise refused
        peak, blocks = min(whole)
        x = first_tensor(batch)
        assert x is not None
        raise ArgumentError(
            f"{argument}: {budget:,} bytes are too few for {x.shape[0]} rows; the smallest step found takes {peak:,} bytes with "
            f"blocks={blocks}. Give that much, or a smaller batch"
        )

    def _least(self, units: Units, blocks: int) -> int:
        """Bytes that a step of so many blocks takes at least."""
        parameters = list(self.builder.net.parameters())
        saved = max(sum(units.saved[start:end]) for start, end in self._spans(units, blocks))
        if not all(p.requires_grad for p in parameters):  # less is saved than was measured
            saved = 0
        return self._resident(parameters) + (saved if PRECISIONS[self.made["precision"]] is None else saved // 2)

    def _spans(self, units: Units, blocks: int) -> list[tuple[int, int]]:
        cuts = self.builder._cuts(units, blocks, None) if blocks > 1 else []
        return list(zip([0, *(cut + 1 for cut in cuts)], [*(cut + 1 for cut in cuts), len(units.names)]))

    def _resident(self, parameters: Iterable[Tensor]) -> int:
        moments = {"momentum": 1, "adam": 2}
        known = next((n for name, n in moments.items() if self.factory is _OPTIMIZERS[name]), 0)
        return sum(p.numel() * p.element_size() * (1 + known * p.requires_grad) for p in parameters)

    def _alone(self, units: Units, blocks: int, limit: int) -> int:
        """All parameters and the most alive while one of the three largest blocks runs with its head; less once over ``limit``."""
        builder, spans = self.builder, self._spans(units, blocks)
        parameters = list(builder.net.parameters())
        if units.fns is None or PRECISIONS[self.made["precision"]] is not None or self.made["update"] == "end":
            return 0
        if blocks == 1 or len(spans) == 1 or not all(p.requires_grad for p in parameters):
            return 0
        found: Any = SimpleNamespace(shapes=[units.shapes[end - 1] for _, end in spans])
        sites = builder._sites(units, [start for start, _ in spans], [end - 1 for _, end in spans], found)
        builder.method.resolve(sites)
        x = first_tensor((builder.args, builder.kwargs))
        assert x is not None and builder.target is not None
        ctx = StepContext(target=builder.target, input=x, criterion=builder.criterion)
        heads = [builder.method.head(site).train() for site in sites]
        resident = self._resident(p for module in (builder.net, *heads) for p in module.parameters())
        worst = max(sum(units.saved[start:end]) for start, end in spans)
        for k in sorted(range(len(sites)), key=lambda k: -sum(units.saved[slice(*spans[k])]))[:3]:
            if resident + worst > limit:
                break
            storages = StorageTracker()
            with storages, torch.enable_grad():
                h = x if k == 0 else torch.empty((x.shape[0], *sites[k - 1].shape), dtype=parameters[0].dtype)
                before = 0 if k else h.untyped_storage().nbytes()
                for unit in units.fns[spans[k][0] : spans[k][1]]:
                    for fn in unit:
                        h = fn(h)
                z = h.detach().requires_grad_()
                heads[k](z, ctx).loss.backward()
                h.backward(z.grad)
            worst = max(worst, before + storages.peak)
            del h, z
            for p in parameters:
                p.grad = None
        return resident + worst


def _as_is(call: Any) -> Any:
    return call


def _counts(units: int) -> list[int]:
    coarse = (int(EVERY_COUNT * 1.125**i) for i in range(1, 200))
    return sorted({*range(1, min(units, EVERY_COUNT) + 1), *(n for n in coarse if n < units), units})


def _device(device: str | Device) -> Device:
    if isinstance(device, Device):
        return device
    if device == "here":
        return Device.measure()
    if device not in DEVICES:
        raise ArgumentError(
            f"device: {device!r} is not in the table. {did_you_mean(str(device), [*DEVICES, 'here'])} A Device "
            "with figures of your own will do too"
        )
    return DEVICES[device]


def _fake_model(
    model: Any, fakes: FakeTensorMode, memory_format: torch.memory_format = torch.preserve_format
) -> nn.Module:
    """A copy whose parameters and buffers have no contents, in training mode."""
    if not isinstance(model, nn.Module):
        made = model() if callable(model) else None
        if not isinstance(made, nn.Module):
            raise ArgumentError(f"model: expected a module or a function that makes one, got {type(model).__name__}")
        return made.train()
    memo: dict[int, Any] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for t in table.values():
                if t is not None and id(t) not in memo:
                    memo[id(t)] = _fake(t, memory_format)
    with FakeCopyMode(fakes):
        return copy.deepcopy(model, memo).train()


def _fake(t: Tensor, memory_format: torch.memory_format = torch.preserve_format) -> Tensor:
    """As ``t``, on the CPU, without contents; ``memory_format`` is for what has four dimensions."""
    if t.dim() == 4 and memory_format is torch.channels_last:
        same = torch.empty(t.shape, dtype=t.dtype, device="cpu", memory_format=memory_format)
    else:
        same = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu")
    return nn.Parameter(same, t.requires_grad) if isinstance(t, nn.Parameter) else same


def _fake_batch(sample: Any, fakes: FakeTensorMode) -> Any:
    if isinstance(sample, tuple | list) and sample and all(isinstance(n, int) for n in sample):
        return torch.empty(tuple(sample))
    if first_tensor(sample) is None:
        raise ArgumentError("sample: holds no tensor; give a batch such as (x, y), the input, or its shape")
    return tree_map_only(Tensor, _fake, sample)


def _complete(model: LocalModel, batch: Any) -> Any:
    """With a target, where the batch is the input alone: one index for each row, token or pixel that the output scores."""
    if not isinstance(batch, Tensor):
        return batch
    scores = model.blocks[-1].cost.boundary
    return batch, torch.zeros((batch.shape[0], *scores[:-1]), dtype=torch.int64)


def _of_rows(batch: Any, rows: int | None) -> Any:
    """The batch with that many rows: what has as many rows as the first tensor gets the new number."""
    x = first_tensor(batch)
    if rows is None or x is None or not x.dim() or x.shape[0] == rows:
        return batch
    old = x.shape[0]
    return tree_map_only(
        Tensor, lambda t: t.new_empty((rows, *t.shape[1:])) if t.dim() and t.shape[0] == old else t, batch
    )


# -------------------------------------------------------------------------------------------------------------- one step


class _Copies(TorchFunctionMode):
    """A deep copy of a buffer without contents has none either: heads that start as copies of modules need it."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and isinstance(args[0], FakeTensor):
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = _fake(tensor)
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


class _Reads(TorchDispatchMode):
    """What the host reads from a tensor without contents is 0: the engine asks whether something is not finite."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func._schema.name.startswith("aten::_fused_") and func._schema.name.endswith("_"):
            return None  # an optimizer's step, in place; fake tensors would run it for want of a meta kernel, on real memory
        if func is torch.ops.aten._local_scalar_dense.default and getattr(args[0], "constant", None) is None:
            dtype = args[0].dtype
            return False if dtype is torch.bool else 0.0 if dtype.is_floating_point else 0
        if func is torch.ops.aten.equal.default and not any(isinstance(t, FakeTensor) for t in args):
            with unset_fake_temporarily():  # random states are real
                return func(*args)
        return func(*args, **(kwargs or {}))


class _Storages(StorageTracker):
    """Notes what is alive when a block's peak is reached."""

    def __init__(self, saved: SavedBytes):
        super().__init__()
        self.saved = saved
        self.gradients = 0
        self.limit: int | None = None
        self.block: BlockPlan | None = None
        self.part: _Part | None = None

    def enter(self, block: BlockPlan) -> None:
        self.block, self.gradients = block, 0
        self.saved.peak = self.saved.current
        self.mark(str(block.index))

    def _grow(self, nbytes: int) -> None:
        super()._grow(nbytes)
        if self.part is not None:
            self.part.peak = max(self.part.peak, self.current)
        block = self.block
        if block is None:
            return
        block.most_saved_bytes = self.saved.peak
        now = self.current
        if self.limit is not None and now > self.limit:
            raise _Over
        if now > block.peak_bytes:
            block.peak_bytes, block.saved_bytes, block.gradient_bytes = now, self.saved.current, self.gradients
            block.workspace_bytes = now - self.saved.current - self.gradients


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


def _linear_loss(x: Tensor, weight: Tensor, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """Of the logits, and of the gradients of features and weight that come with them."""
    return 2 * x.shape[0] * weight.numel() * (1 + sum(grad.numel() > 0 for grad in out_val[2:4]))


_FLOPS = {
    **_MORE_FLOPS,
    torch.ops.fastlocal.pool_linear_cross_entropy: _linear_loss,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
_CONVOLUTIONS = {torch.ops.aten.convolution, torch.ops.aten.convolution_backward, torch.ops.aten._convolution}


class _Roofline(LaunchCounter):
    """FLOPs, bytes, launches and time of every launched operator, added to the block that is running."""

    def __init__(self, device: Device):
        super().__init__()
        self.roof = device
        self.block: BlockPlan | None = None
        self.part: _Part | None = None
        self.unit: tuple[int, str] | None = None  # of a network of one block: which unit runs, and what of it
        self.units: dict[tuple[int, str], float] = defaultdict(float)  # seconds
        self.boundary = 0, 0  # the block that reads it, and its storage
        self.writes_input: set[int] = set()  # blocks whose forward changes it in place

    def _is_leaf(self, func: Any) -> bool:
        return func.overloadpacket in flop_registry or super()._is_leaf(func)

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        launches = _launches(func, args, kwargs)
        if not launches or self.block is None:
            return
        flops, moved, size, dtype = work_of(func, args, kwargs, out)
        block = self.block
        block.flops += flops
        block.bytes_moved += moved
        block.launches += launches
        seconds = self._seconds(func, flops, moved, launches, size, dtype)
        block.seconds += seconds
        if self.part is not None:
            self.part.seconds += seconds
        if self.unit is not None:
            self.units[self.unit] += seconds
        if func._schema.is_mutable and self.part is not None:
            reader, storage = self.boundary
            written = (a for a, info in zip(args, func._schema.arguments) if info.is_write)
            if (self.part.kind, self.part.block) == ("forward", reader) and any(
                t.untyped_storage()._cdata == storage for t in _tensors(*written)
            ):
                self.writes_input.add(reader)

    def _seconds(
        self, func: Any, flops: int, moved: int, launches: int, size: float, dtype: torch.dtype | None
    ) -> float:
        roof, host = self.roof, launches * self.roof.launch
        name = func._schema.name
        curve = None if dtype is None else roof.rates.get((name, dtype)) or roof.rates.get((name, torch.float32))
        if curve:
            work = (flops or moved) / _rate(curve, size)
        else:
            work = moved / roof.bandwidth
            if flops and dtype is not None:
                work = max(work, flops / self._peak(func, dtype))
        return host + work if roof.waits else max(host, work)

    def _peak(self, func: Any, dtype: torch.dtype) -> float:
        if dtype is torch.float32 and self.roof.tf32 is not None:
            convolution = func.overloadpacket in _CONVOLUTIONS
            flags = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
            if flags[0 if convolution else 1]:
                return self.roof.tf32
        return self.roof.flops.get(dtype, self.roof.flops[torch.float32])


def work_of(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> tuple[int, int, float, torch.dtype | None]:
    """FLOPs, bytes moved, the size that decides what an operator achieves, and its dtype."""
    inputs, outputs = _tensors(args, kwargs), _tensors(out)
    formula: Any = flop_registry.get(func.overloadpacket) or _FLOPS.get(func.overloadpacket)
    flops = 0 if formula is None else formula(*args, **kwargs, out_val=out)
    # an expanded tensor is no larger than what it is expanded from
    moved = sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in (*inputs, *outputs))
    dtype = next((t.dtype for t in (*inputs, *outputs) if t.is_floating_point()), None)
    size = float(moved)
    if flops:
        if func.overloadpacket in _CONVOLUTIONS:
            weight = args[2 if "backward" in func._schema.name else 1]
            size = min(weight.shape[:2])
        elif "attention" in func._schema.name:
            size = inputs[0].shape[-1]
        else:
            size = min(n for t in inputs if t.dim() > 1 for n in t.shape[-2:])
    return flops, moved, size, dtype


def _rate(curve: Curve, size: float) -> float:
    """Between two measured sizes by logarithms; beyond the last ones, theirs."""
    i = bisect.bisect(curve, size, key=lambda point: point[0])
    if i in (0, len(curve)):
        return curve[min(i, len(curve) - 1)][1]
    (a, low), (b, high) = curve[i - 1], curve[i]
    part = math.log(size / a) / math.log(b / a)
    return low * (high / low) ** part


class _Watched(Engine):
    """Says which block and which task runs."""

    on_enter: Callable[[int], None] | None = None
    on_begin: Callable[[str, int], None] | None = None
    on_hand_off: Callable[[int, Tensor], None] | None = None

    def _enter(self, k: int) -> None:
        super()._enter(k)
        if self.on_enter is not None and self.on_begin is not None:
            self.on_enter(k)
            self.on_begin("forward", k)

    def _begin(self, kind: str, k: int) -> None:
        super()._begin(kind, k)
        if self.on_begin is not None:
            self.on_begin(kind, k)

    def _hand_off(self, flight: Flight, k: int, h: Tensor, keep: bool) -> Tensor:
        after = super()._hand_off(flight, k, h, keep)
        if self.on_hand_off is not None:
            self.on_hand_off(k, after)
        return after


@dataclass
class _Part:
    """A stretch of a step: one task."""

    kind: str
    block: int
    seconds: float = 0.0
    before: int = 0  # bytes alive when it begins
    peak: int = 0
    after: int = 0  # when the next one begins


class _Parts:
    """Cuts a step into its tasks: bytes and seconds of each, in the order in which they ran."""

    def __init__(self, storages: _Storages, roofline: _Roofline):
        self.storages, self.roofline = storages, roofline
        self.found: list[_Part] = []

    def begin(self, kind: str, k: int) -> None:
        self.end()
        now = self.storages.current
        if not self.found or (self.found[-1].kind, self.found[-1].block) != (kind, k):
            self.found.append(_Part(kind, k, before=now, peak=now))
        self.storages.part = self.roofline.part = self.found[-1]

    def end(self) -> None:
        if self.found:
            self.found[-1].after = self.storages.current

    def per_task(self, step: StepTasks, batch_bytes: int) -> tuple[list[float], list[int], list[int]]:
        """Seconds, bytes made and bytes freed of every task, so that in sequence what is alive is what was tracked.

        What a task makes is how far it goes above what was alive before it; it frees what is gone when it ends. The batch
        lives from the first task to the last, and what the step leaves behind is counted to it.
        """
        count = len(step.tasks)
        seconds, made, freed = [0.0] * count, [0] * count, [0] * count
        ran: dict[int, list[_Part]] = defaultdict(list)
        at = 0
        for part in self.found:
            while (step.tasks[at].kind, step.tasks[at].block) != (part.kind, part.block):
                at += 1
            ran[at].append(part)
        for i, parts in ran.items():
            peak = max(part.peak for part in parts)
            seconds[i] = sum(part.seconds for part in parts)
            made[i], freed[i] = peak - parts[0].before, peak - parts[-1].after
        made[0] += batch_bytes
        freed[-1] += sum(made) - sum(freed)
        return seconds, made, freed

    def costs(self, blocks: Sequence[BlockPlan], inputs: Sequence[int]) -> list[Cost]:
        """Per block; links count to the update."""
        seconds: Counter[tuple[str, int]] = Counter()
        for part in self.found:
            kind = part.kind if part.kind in ("forward", "head", "backward") else "update"
            seconds[kind, part.block] += part.seconds  # type: ignore[assignment]
        together = seconds["update", -1] / len(blocks)
        return [
            Cost(
                seconds["forward", k], seconds["backward", k], seconds["head", k], seconds["update", k] + together,
                b.boundary_bytes, max(0, b.most_saved_bytes - b.boundary_bytes - inputs[k]), b.name,
            )
            for k, b in enumerate(blocks)
        ]  # fmt: skip


class _ByUnit:
    """Cuts a step of one block, which is back-propagation, into its units: what a stage of a pipeline would be made of.

    The seconds of all add up to those of the step. The backward of a unit begins when the gradient at its output is there.
    """

    def __init__(self, names: list[str], fns: list[tuple[Any, ...]], roofline: _Roofline, saved: SavedBytes):
        self.names, self.roofline, self.saved = names, roofline, saved
        self.parameters: Counter[int] = Counter()
        self.sizes: dict[int, tuple[int, int]] = {}  # of the output, and what is saved beside input and output
        self.adapter = SliceAdapter([tuple(partial(self._run, i, own) for i, own in enumerate(fns))])
        roofline.unit = 0, "forward"

    def _run(self, i: int, fns: tuple[Any, ...], x: Any) -> Any:
        self.roofline.unit = i, "forward"
        held = set(self.saved._held)
        h = x
        for fn in fns:
            h = fn(h)
        out = first_tensor(h)
        assert out is not None
        own = {key: size for key, (_, size) in self.saved._held.items() if key not in held}
        for t in (first_tensor(x), out):
            assert t is not None
            own.pop(t.untyped_storage()._cdata, None)
        self.sizes[i] = out.numel() * out.element_size(), sum(own.values())
        if out.requires_grad:
            out.register_hook(partial(self._backward, i))
        return h

    def _backward(self, i: int, grad: Tensor) -> None:
        self.roofline.unit = i, "backward"

    def begin(self, kind: str) -> None:
        if kind in ("backward", "update"):
            self.roofline.unit = len(self.names) - 1, kind

    def accumulated(self, p: Tensor) -> None:
        assert self.roofline.unit is not None
        self.parameters[self.roofline.unit[0]] += p.numel()

    def costs(self) -> list[Cost]:
        """Per unit; the update is shared out by parameters."""
        seconds = self.roofline.units
        update = seconds[len(self.names) - 1, "update"]
        whole = max(1, self.parameters.total())
        return [
            Cost(
                seconds[i, "forward"], seconds[i, "backward"], 0.0, update * self.parameters[i] / whole,
                *self.sizes[i], name,
            )
            for i, name in enumerate(self.names)
        ]  # fmt: skip


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def _plan_step(
    model: LocalModel,
    batch: Any,
    optimizer: OptimizerFactory,
    device: Device,
    made: dict[str, Any],
    fakes: FakeTensorMode,
    limit: int | None = None,
    *,
    units: bool = False,
) -> Plan:
    """``units``: of a model of one block, `Plan.costs` are those of the network's units."""
    x = first_tensor(batch)
    assert x is not None
    if made["memory_format"] == "channels_last":  # not by Module.to, which cannot swap fake parameters
        model = _fake_model(model, fakes, torch.channels_last)  # type: ignore[assignment]
        batch = tree_map_only(
            Tensor, lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t, batch
        )
    weights = [*model.parameters(), *model.buffers()]
    before = StorageTracker()
    with before:
        engine = _Watched(model, optimizer, schedule="sequential", precision=made["precision"], update=made["update"])
        engine_bytes = before.current
        engine._guard.waits = device.memory is not None  # a device's step reads no flag, a host's reads each
        engine.steps = 1  # and looks at the targets' values in its first step only
        _fill_state(engine)
    state = [t for s in engine.optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    plan = Plan(
        repr(model.method),
        device,
        x.shape[0] if x.dim() else 1,
        made["precision"],
        _nbytes(weights),
        _nbytes(state),
        engine_bytes,
        _nbytes(_tensors(batch)),
        [BlockPlan(b.index, b.name, sum(p.numel() for p in b.parameters() if p.requires_grad)) for b in model.blocks],
    )
    for b, own in zip(plan.blocks, model.blocks):
        b.boundary_bytes = x.shape[0] * math.prod(own.cost.boundary) * _boundary_size(engine)
    saved = SavedBytes([*weights, *_tensors(batch)])
    storages, roofline = _Storages(saved), _Roofline(device)
    if limit is not None:
        storages.limit = limit - plan.resident_bytes

    parts = _Parts(storages, roofline)
    by_unit = None
    if units:
        found = find_units(model.backbone, (x,), {})
        if found.fns is None:
            raise BackendError(
                f"simulate: {type(model.backbone).__name__} is cut by hooks, so that it is not known where back-propagation could be "
                "cut into stages; give it units() and readout()"
            )
        by_unit = _ByUnit(found.names, found.fns, roofline, saved)
        model._adapter = by_unit.adapter

    def enter(k: int) -> None:
        storages.enter(plan.blocks[k])
        roofline.block = plan.blocks[k]

    def begin(kind: str, k: int) -> None:
        parts.begin(kind, k)
        if by_unit is not None:
            by_unit.begin(kind)

    def accumulated(p: Tensor) -> None:
        storages.gradients += p.numel() * p.element_size()
        if by_unit is not None:
            by_unit.accumulated(p)

    def hand_off(k: int, after: Tensor) -> None:
        roofline.boundary = k + 1, after.untyped_storage()._cdata

    engine.on_enter, engine.on_begin, engine.on_hand_off = enter, begin, hand_off
    hooks = [p.register_post_accumulate_grad_hook(accumulated) for p in model.parameters() if p.requires_grad]
    roofline.block = storages.block = plan.blocks[0]  # what the step begins with
    gc.collect()
    parts.begin("forward", 0)
    try:
        # a device's step calls the fused operators, a host's the plain modules
        with nullcontext() if device.memory is None else as_on_gpu(), storages, roofline, saved:
            engine.step(batch)
            parts.end()
    finally:
        for hook in hooks:
            hook.remove()
    inputs = [0, *(b.boundary_bytes for b in plan.blocks)]
    casts = engine._cast is not None
    step = compile_step(model, made["update"], casts=casts, writes_input=roofline.writes_input)
    plan._one_order = refusal(model, casts=casts) or ""
    plan._behind = _needs_what_is_behind(model, step)
    cost, more, less = parts.per_task(step, plan.batch_bytes)
    plan.schedule = make_schedule("sequential", step, cost, bytes_made=more, bytes_freed=less)
    plan.costs = parts.costs(plan.blocks, inputs) if by_unit is None else by_unit.costs()
    return plan


def _needs_what_is_behind(model: LocalModel, step: StepTasks) -> str:
    """Why blocks cannot stand on ranks one behind the other with messages forward only; empty where they can."""
    if model.summed:
        return f"{model.method.name!r} has no gradient border"
    if any(task.block < 0 for task in step.tasks):
        return "update='end' holds every update back to the end of the step"
    for u, v, _ in step.edges:
        before, after = step.tasks[u], step.tasks[v]
        if before.block > after.block and after.kind != "free":
            return f"'{after.name}' needs '{before.name}', which is behind it"
    return ""


def _boundary_size(engine: Engine) -> int:
    dtype = engine._dtype or next(engine.model.parameters()).dtype
    return dtype.itemsize


def _fill_state(engine: Engine) -> None:
    """The optimizer's state as after a first step."""
    for k, block in enumerate(engine.model.blocks):
        params = [p for p in block.parameters() if p.requires_grad]
        for p in params:
            p.grad = torch.zeros_like(p)
        engine.optimizer.step_block(k)
        for p in params:
            p.grad = None
