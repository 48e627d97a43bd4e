"""Steps per second, peak memory and kernel times on a CUDA device, against the rivals that its owner already has.

    python -m fastlocal.bench.gpu --out runs/gpu/bench.jsonl [--budget 240] [--tests runs/gpu/tests.jsonl]
    python -m fastlocal.bench.gpu --dry-run      every code path on a CPU with tiny sizes; measures nothing

Variants of a case take turns, so that a warm or throttled minute of the device hits all of them; times are medians of
CUDA events around a few steps, after a warm-up. Nothing reads a loss while the clock runs. Records (JSONL) hold every
single time, the peak of memory, and what ran where: device, driver, versions, clocks, commit. The operators and their
rivals are those of fastlocal.bench.operators. See docs/gpu.md.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastlocal as fl
from fastlocal.bench import operators
from fastlocal.bench.device import Cpu, Cuda, machine, never_fall_back_to_eager
from fastlocal.bench.operators import EAGER, OURS
from fastlocal.errors import BackendError
from fastlocal.reference import train_step

SGD = dict(lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4)
Record = dict[str, Any]
PLAIN = "plain loop, fp32"  # the base of every ratio of steps; that of operators is EAGER
NO_TIME = "no time left in the budget"
NOT_GREEN = "no figures: not all of its GPU tests passed in this run"


# --- steps ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A method on a network. ``rivals``: whether BP takes part; ``schedules``: whether the engine's other schedules do."""

    method: str
    blocks: int
    batch: int
    options: dict[str, Any] = field(default_factory=dict)
    model: str = "resnet110"
    rivals: str = ""  # "", "eager" or "compiled"
    schedules: bool = False

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
    captures: int = 0  # steps within which it captures graphs by itself
    about: Callable[[], str] = str  # what the engine says that it does

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
        for precision, layout in (("fp32", ""), ("bf16", last)):
            name = f"engine graph, {precision} {layout}".strip()
            found[name] = functools.partial(self.engine, precision, layout, graph="on")
        for schedule in ("overlap", "pipeline") if self.case.schedules else ():
            for graph in ("off", "on"):  # a round of captured pieces, composed into one graph
                name = f"engine {'graph ' if graph == 'on' else ''}{schedule}, {low} {last}"
                found[name] = functools.partial(self.engine, low, last, graph=graph, schedule=schedule)
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

    def engine(
        self, precision: str, layout: str, graph: Literal["on", "off"] = "off", schedule: str = "sequential"
    ) -> Variant:
        model, x = self._own(self.model, "")
        run = fl.Engine(
            model,
            lambda named: torch.optim.SGD(named, **SGD),  # type: ignore[arg-type]
            precision={"fp32": "32-true", "bf16": "bf16-mixed"}[precision],
            memory_format="channels_last" if layout else "preserve",
            graph=graph,
            schedule=schedule,  # type: ignore[arg-type]
        )
        x = x.contiguous(memory_format=torch.channels_last) if layout else x
        return Variant(
            lambda: run.step(x, self.y).losses[-1],
            model,
            run.optimizer,
            captures=0 if graph == "off" else 4 if schedule == "sequential" else 12,  # of every phase of a pipeline
            about=run.explain,
        )

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


# --- the run ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """What is run: the real sizes, or those of a dry run."""

    cases: tuple[Case, ...]
    operators: tuple[operators.Case, ...]
    image: int = 32
    rounds: int = 15
    cache_bytes: int = 256 << 20
    copy_bytes: int = 1 << 30


def _cases(model: str, batches: tuple[int, ...], many: int, depth: int, few: int = 0) -> tuple[Case, ...]:
    """DGL and AugLocal in many blocks; with `few` also DGL in few beside backpropagation."""
    found: list[Case] = []
    for batch in batches:
        found += [
            Case("auglocal", many, batch, {"depth": depth}, model=model),
            Case("dgl", many, batch, model=model, schedules=few > 0),
        ]
        if few:
            found.append(Case("dgl", few, batch, model=model, rivals="eager", schedules=True))
    if few:
        found += [Case("bp", 1, batch, model=model, rivals="compiled") for batch in batches]
    return tuple(found)


def schedule_cases() -> tuple[Case, ...]:
    """Those in which the engine's schedules stand beside each other and BP."""
    return tuple(case for case in real().cases if case.schedules)


def _others(model: str, batch: int, many: int) -> tuple[Case, ...]:
    """The other published methods, in as many blocks."""
    options: dict[str, dict[str, Any]] = {
        "hpff": {}, "man": {}, "man_plus_plus": {"head": "dgl"}, "mlaan": {},
        "infopro": {"loss": "cross_entropy", "lam": (5.0, 0.5, 0.5, 1.0)}, "predsim": {"variant": "auglocal"},
    }  # fmt: skip
    return tuple(Case(method, many, batch, how, model=model) for method, how in options.items())


def real() -> Sizes:
    """Headline first: ResNet-110 at batch 128, then the others, smallest first; compiling a whole network is last."""
    deep = _cases("resnet110", (128, 1024), many=55, depth=3, few=16)
    shallow = _cases("resnet32", (128, 1024), many=16, depth=2)
    steps = (*deep[:3], *_others("resnet110", 128, 55), *shallow, *deep[3:])
    return Sizes(cases=steps, operators=tuple(sorted(operators.cases(), key=lambda case: case.must_move())))


def tiny() -> Sizes:
    steps = (*_cases("resnet20", (2,), many=8, depth=1, few=3), *_others("resnet20", 2, 10)[:2])
    return Sizes(steps, operators.tiny_cases(), image=8, rounds=1, cache_bytes=1 << 10, copy_bytes=1 << 16)


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
        """Operators first (they are quick), then steps."""
        jobs: list[tuple[str, float, Callable[[float], list[Record]]]] = [("copy", 0.2, self._copy)]
        jobs += [(case.name, 0.5, functools.partial(self._operator, case)) for case in self.sizes.operators]
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
        stamp = {
            "verified": verified(self.tests, records[0].get("operator"), self.machine),
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

    def _operator(self, case: operators.Case, deadline: float) -> list[Record]:
        """Every variant by eager launches and by graph replays, on more input sets than the cache holds."""
        count = max(1, min(64, math.ceil(self.sizes.cache_bytes / case.must_move())))
        sets = [case.inputs(self.device.type) for _ in range(count)]
        served, beginning = case.explain(sets[0]), operators.copied(sets[0])
        ready: dict[str, tuple[Callable[[], Any], Record]] = {}
        failed: list[Record] = []
        truth: Any = None
        variants = case.variants(sets[0], self.device.compiled)
        for name in sorted(variants, key=lambda name: "compile" in name):  # compilers take what time is left
            record = self._record("operator", case.name, name)
            record |= {"operator": case.operator, "size": case.size, "dtype": str(case.dtype), "sets": count}
            record["backend"] = served if name.startswith(OURS) and not name.endswith("aten") else None
            if name != EAGER and name != OURS and time.monotonic() > deadline - 1:
                failed.append(record | {"kind": "skipped", "why": NO_TIME})
                continue
            try:
                call = variants[name].make()
                result = call(*operators.copied(beginning))
                if truth is None:
                    truth = [t.clone() for t in operators.tensors(result)]
                record["disagreement"] = operators.disagreement(result, truth)
                del result
                run = _through(call, sets)
                run()
                record["peak_bytes"] = self.device.peak(run)
                ready[f"{name} eager"] = run, record | {"mode": "eager"}
                if variants[name].graph:
                    ready[f"{name} graph"] = self.device.graph(run)[0], record | {"mode": "graph"}
            except Exception as error:
                failed.append(record | {"error": _first_line(error)})
        floor = case.must_move() / self.bandwidth
        for record in self._take_turns(ready, deadline, per_call=count):
            record |= {"must_move_bytes": case.must_move(), "floor_seconds": floor}
            record["bytes_per_second"] = case.must_move() / record["median"]
            record["part_of_bandwidth"] = floor / record["median"]
        return [record for _, record in ready.values()] + failed

    def _steps(self, case: Case, deadline: float) -> list[Record]:
        x, y = self._batch(case.batch)
        model = self._localize(case)
        steps = Steps(case, model, x, y, self.device)
        ready: dict[str, tuple[Callable[[], Any], Record]] = {}
        abouts: dict[str, Callable[[], str]] = {}
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
                if variant.captures:  # its memory is the graph's own, taken while it is captured
                    many = range(variant.captures)
                    record["peak_bytes"] = self.device.peak(lambda: [variant.step() for _ in many])  # noqa: B023
                elif variant.graph_peak is None:
                    variant.forget_gradients()
                    record["peak_bytes"] = self.device.peak(variant.step)
                else:
                    record["peak_bytes"] = variant.graph_peak
                record["static_bytes"] = variant.static_bytes()
                ready[name], abouts[name] = (variant.step, record), variant.about
            except BackendError as error:  # it says that it cannot
                failed.append(record | {"kind": "refused", "why": _first_line(error)})
            except Exception as error:
                failed.append(record | {"error": _first_line(error)})
                self.device.release()
        for record in self._take_turns(ready, deadline):
            record["steps_per_second"] = 1 / record["median"]
            record["images_per_second"] = case.batch / record["median"]
        base = ready[PLAIN][1]["first_loss"] if PLAIN in ready else None
        for name, (step, record) in ready.items():
            record["finite"] = math.isfinite(float(step()))
            record["about"] = abouts[name]()
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


def _through(call: Callable[..., Any], sets: list[operators.Inputs]) -> Callable[[], None]:
    """One call on every input set. Results are dropped at once, as in training."""

    def run() -> None:
        for inputs in sets:
            call(*inputs)

    return run


def verified(tests: Path | None, operator: str | None, where: Record) -> bool:
    """Whether the GPU tests of an operator (None: of everything that is no operator) passed on this code and device.

    A fast number from wrong code is worth nothing, so the table shows none then. `tests` is what `make gpu` reports: the
    sources and the device first, then how many tests each file has, then a line for every test. No report, a report of
    other code or of another device, a test that failed or never ran: not verified.
    """
    if tests is None or not tests.exists():
        return False
    lines = [json.loads(line) for line in tests.read_text().splitlines() if line.strip()]
    about = next((line for line in lines if "source" in line), None)
    if about is None or about["source"] != where["source"] or about["device"] != where["device"]:
        return False
    if operator is not None:
        wanted = tests_of(operator)
    else:
        others = {file for case in operators.cases() for file in tests_of(case.operator)}
        seen = {_file(line["test"]) for line in lines if "test" in line}
        wanted = tuple(
            file for file in seen | {f for line in lines for f in line.get("by_file", ())} if file not in others
        )
    relevant = [line for line in lines if "test" in line and _file(line["test"]) in wanted]
    outcomes = [line["outcome"] for line in relevant]
    if "passed" not in outcomes or "failed" in outcomes:
        return False
    expected = sum(line["by_file"].get(file, 0) for line in lines if "by_file" in line for file in wanted)
    return len({line["test"] for line in relevant}) >= expected


def tests_of(operator: str) -> tuple[str, ...]:
    """The files of tests/gpu that stand for an operator."""
    if operator in ("ema_update_", "fused_sgd_", "fused_adamw_"):
        return ("test_updates.py",)
    return (f"test_{operator.removesuffix('_')}.py",)


def _file(test: str) -> str:
    return test.partition("::")[0].rpartition("/")[2]


def _quantile(values: list[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]


def table(records: list[Record]) -> str:
    """The records as text. Ratios are speeds over the plain loop (steps) and over eager PyTorch (operators)."""
    lines: list[str] = []
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
        if timed and not timed[0]["verified"] and not timed[0]["dry_run"]:
            lines.append(f"  {NOT_GREEN}")
        elif timed:
            lines += (_operator_rows if timed[0]["kind"] == "operator" else _step_rows)(timed)
    lines += _findings(records)
    if any(r["dry_run"] for r in records):
        lines.append("dry run on a CPU: no number above is a measurement")
    return "\n".join(lines)


def _step_rows(rows: list[Record]) -> Iterator[str]:
    base = next((r["median"] for r in rows if r["variant"] == PLAIN), None)
    for r in rows:
        ratio = f"{base / r['median']:7.2f}x" if base and r["verified"] else "       -"
        wrong = "" if r["finite"] and r.get("first_loss_agrees", True) else "  WRONG LOSS"
        numbers = f"{r['median'] * 1e3:9.2f} ms {r['steps_per_second']:8.2f}/s {r['peak_bytes'] / 2**20:9.1f} MiB"
        yield f"  {r['variant']:<48}{numbers}{ratio}{wrong}"


def _operator_rows(rows: list[Record]) -> Iterator[str]:
    """Eager launch, host time, graph replay, the part of the copy bandwidth that it reaches, peak, ratio of replays."""
    by_mode = {mode: {r["variant"]: r for r in rows if r["mode"] == mode} for mode in ("eager", "graph")}
    for name, eager in by_mode["eager"].items():
        text = f"  {name:<31}{eager['median'] * 1e6:9.1f} us {eager['host_median'] * 1e6:8.1f} host"
        if graph := by_mode["graph"].get(name):
            text += f"{graph['median'] * 1e6:9.1f} us in a graph {graph['part_of_bandwidth']:6.1%}"
            if EAGER in by_mode["graph"] and graph["verified"]:
                text += f"{by_mode['graph'][EAGER]['median'] / graph['median']:7.2f}x"
        yield text + f"{eager['peak_bytes'] / 2**20:9.1f} MiB" + ("" if _agrees(eager) else "  WRONG RESULT")


def short(records: list[Record]) -> str:
    """One line for each operator and size, the fastest of each kind of step, and what is wrong or missing."""
    lines: list[str] = []
    heading = f"{'':<76}{'us':>9}{'in a graph':>12}{'of copy':>9}{'x eager':>9}  fastest rival"
    for case in dict.fromkeys(r["case"] for r in records):
        rows = [r for r in records if r["case"] == case]
        timed = [r for r in rows if "median" in r]
        if rows[0]["kind"] == "copy" and "bytes_per_second" in rows[0]:
            lines += [f"copy on the device: {rows[0]['bytes_per_second'] / 1e9:.0f} GB/s, read and written", heading]
        elif timed and not timed[0]["verified"] and not timed[0]["dry_run"]:
            lines.append(f"{case}: {NOT_GREEN}")
        elif timed and timed[0]["kind"] == "operator":
            lines.append(_short_operator(case, timed))
        elif timed:
            lines.append(case)
            kinds = (PLAIN, "plain loop, bf16", "engine, ", "engine graph, ", "BP")
            groups = [[r for r in timed if r["variant"].startswith(kind)] for kind in kinds]
            fastest = [min(group, key=lambda r: r["median"]) for group in groups if group]
            base = [r for r in timed if r["variant"] == PLAIN]
            lines += [line for line in _step_rows(base + [r for r in fastest if r not in base])]
        lines += [
            f"  {r.get('variant', r['kind'])}: {r.get('error') or r['why']}"
            for r in rows
            if "median" not in r and (r["kind"] != "skipped" or not timed) and r["kind"] != "copy"
        ]
    lines += _findings(records)
    left = sum(r["kind"] == "skipped" for r in records)
    lines += [f"{left} left out: {NO_TIME}"] if left else []
    lines += ["dry run on a CPU: no number above is a measurement"] if any(r["dry_run"] for r in records) else []
    return "\n".join(lines)


def _short_operator(case: str, timed: list[Record]) -> str:
    eager, graph = ({r["variant"]: r for r in timed if r["mode"] == mode} for mode in ("eager", "graph"))
    if OURS not in graph:
        return f"{case}: only {', '.join(eager | graph)} ran"
    own, rivals = graph[OURS], {n: r["median"] for n, r in graph.items() if not n.startswith(OURS)}
    text = f"{case:<76}{eager[OURS]['median'] * 1e6:9.1f}{own['median'] * 1e6:12.1f}{own['part_of_bandwidth']:9.1%}"
    if rivals and own["verified"]:
        best = min(rivals, key=lambda name: rivals[name])
        first = rivals[EAGER] / own["median"] if EAGER in rivals else float("nan")
        text += f"{first:8.2f}x  {best} {rivals[best] / own['median']:.2f}x"
    return text + ("" if _agrees(own) else "  WRONG RESULT")


def _agrees(r: Record) -> bool:
    return r["disagreement"] <= (1e-3 if r["dtype"] == "torch.float32" else 5e-2)  # nan: no


def _findings(records: list[Record]) -> Iterator[str]:
    """Where the operator that was chosen is not the fastest, and where it is far from the bandwidth of a copy."""
    timed = [r for r in records if r["kind"] == "operator" and "median" in r and r["verified"]]
    for case in dict.fromkeys(r["case"] for r in timed):
        for mode in ("eager", "graph"):
            rows = {r["variant"]: r for r in timed if r["case"] == case and r["mode"] == mode}
            own = rows.pop(OURS, None)
            rivals = {name: r["median"] for name, r in rows.items() if not name.startswith(OURS)}
            if own is None or not rivals:
                continue
            best = min(rivals, key=lambda name: rivals[name])
            if rivals[best] < own["median"]:
                yield f"a rival is faster ({mode}): {case}: {best}, {own['median'] / rivals[best]:.2f}x"
            if mode == "graph" and own["backend"] == "triton" and own["part_of_bandwidth"] < 0.85:
                yield f"below 85 % of the copy: {case}: {own['part_of_bandwidth']:.0%}"


def main(argv: list[str] | None = None) -> int:
    """Returns 0, 1 where a case or a variant of fastlocal's failed, 2 without a CUDA device."""
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
    bench = Bench(
        tiny() if args.dry_run else real(), Cpu() if args.dry_run else Cuda(), args.out, args.budget, args.tests
    )
    records = bench.run()
    print(table(records))
    ours = ("fastlocal", "engine", "plain")  # a rival that fails is a record, and no fault of this code
    return int(any("error" in r and r.get("variant", "engine").startswith(ours) for r in records))


if __name__ == "__main__":
    raise SystemExit(main())
