"""`Engine`: fastlocal owns the step (level B). Every block is updated and freed before the next block's head starts."""

from __future__ import annotations

import functools
import time
import warnings
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastlocal.blocks.adapters import logits_of
from fastlocal.blocks.batch import first_tensor, split_call
from fastlocal.blocks.block import start_backward
from fastlocal.blocks.cascade import leaf, scaled_down
from fastlocal.blocks.links import Link, fire
from fastlocal.engine import _native
from fastlocal.engine.cast import CastWeights
from fastlocal.engine.choose import Chooser
from fastlocal.engine.clip import Clip
from fastlocal.engine.composed import ComposedRounds, composer_for
from fastlocal.engine.flight import Flight
from fastlocal.engine.graph import StepGraphs
from fastlocal.engine.guard import BatchCounts, Guard
from fastlocal.engine.localize import parse_bytes
from fastlocal.engine.memory import is_out_of_memory, out_of_memory
from fastlocal.engine.model import LocalModel
from fastlocal.engine.optimizer import LocalOptimizer, OptimizerFactory
from fastlocal.engine.output import StepOutput, count_targets
from fastlocal.engine.rounds import Rounds
from fastlocal.engine.schedule import refusal
from fastlocal.engine.tasks import StepTasks, Task, sequence
from fastlocal.errors import ArgumentError, BackendError, NonFiniteError
from fastlocal.ops import _dispatch

PRECISIONS = {
    "32-true": None, "fp32": None, "bf16-mixed": torch.bfloat16, "bf16": torch.bfloat16, "16-mixed": torch.float16, "fp16": torch.float16,
}  # fmt: skip
_MAX_COMPILES = 256
_CHECK_EVERY = 50  # steps between two looks at the device's non-finite flags, where a look waits for the device


@dataclass
class _Pending:
    """Micro-batches whose gradients wait for the step that updates.

    Each weighs as many targets as it has, measured in those of the first: equal micro-batches weigh exactly 1.
    """

    batches: int
    first: Tensor  # targets of the first micro-batch, float32
    total: Tensor  # sum of the weights, float32
    weight: Tensor | None  # of the micro-batch that runs now; None for the first


class Engine:
    """Trains a `LocalModel` block by block.

    A step runs, for every block in order: forward, local loss, the head's backward, the block's backward, the update; then
    its graph and gradients are gone. Only the boundary activation lives on.

    Args:
        model: from `fastlocal.localize`.
        optimizer: called once per block with its ``[(name, parameter)]``, or a `LocalOptimizer` made so.
        schedule: in which order the tasks of a step run (docs/schedules.md). ``"sequential"``: block by block. ``"overlap"``:
            a block's head, backward and update beside the next block's forward. ``"pipeline"``: blocks of several steps side
            by side; then `step` returns the output of an earlier step. ``"auto"``: on a CPU, what a few steps of each show to
            be faster (sequential with ``deterministic=True``, for the number of threads in an operator shows in the last
            bits); elsewhere sequential. Every order gives the same numbers. A model that has but one order is run in that one,
            with a warning, and `explain` says why.
        precision: ``"32-true"``, ``"bf16-mixed"`` or ``"16-mixed"`` (autocast; fp16 with one loss scale per block, on the device).
        graph: ``"on"`` captures the whole step in a CUDA graph, once for each shape of a batch (8 at most, the others stay
            eager), after two or three eager steps of that shape. A replay reads the rates and the step's number from the
            device; whatever else changes (modules, tensors, their addresses, ``requires_grad``, modes, other options of the
            optimizer) is noticed before the next replay and leads to eager steps and a new capture. Steps that close an
            accumulation are eager. Forward hooks, and Python in a module's forward, run at a capture only. Rates are
            rounded to float32. With ``schedule="overlap"`` or ``"pipeline"`` the pieces of a step are captured one by one, and
            a round is one graph that is composed of them (not for blocks that draw random numbers, losses that reach several
            blocks, or ``update="end"``). ``"off"``, and today ``"auto"``, are eager.
        backend: ``"auto"`` lets each operator choose the best that can serve it, block optimizers take PyTorch's fused step, and
            casts a block's weights together under autocast; ``"reference"`` leaves everything plain and runs every operator
            by its specification. ``"triton"`` and ``"native"`` ask for that form of every operator that has one, and raise
            where it cannot serve.
        update: ``"immediate"`` steps a block and frees its gradients at once; ``"end"`` steps all blocks after the last backward,
            or none: a step that fails or turns non-finite changes nothing, BatchNorm statistics included.
        deterministic: one random stream per block, keyed by (seed, block), and PyTorch's deterministic algorithms. The schedules
            but the sequential one have such streams in any case.
        seed: of those streams.
        memory_format: ``"preserve"``, or ``"channels_last"`` to convert the model now and every 4-D input.
        nonfinite: what a non-finite loss or gradient leads to: ``"raise"`` a NonFiniteError that names block and step,
            ``"skip"`` that block's update, or ``"stop"``: skip it and set ``engine.should_stop``. The block's parameters,
            optimizer state and BatchNorm statistics stay as they were in every case. On an accelerator the flags are read
            every 50 steps (and by `flush`), so that no step waits for the device.
        compile: ``"blocks"`` calls ``torch.nn.Module.compile`` on every unit of the backbone that is a module, and on every
            head: in place, so that names and state_dict stay, and they are compiled for evaluation, too. Each shape of a
            batch is compiled by itself. With ``graph="on"`` this happens in the eager steps. Not for a network cut by hooks.
        workers: tasks that may run at once: threads on a CPU, streams on a GPU. Default: 2 to 4 threads, 2 streams. Operators
            get the CPU's threads divided by it.
        in_flight: the most steps on their way at once, for ``"pipeline"`` (default: as many as workers) and, where that is more
            than 1, for ``"auto"``.
        memory_budget: bytes or "4GiB" for what the tasks of the steps in flight hold (activations, gradients, batches), by the
            sizes that `localize` measured; None for no limit.
        clip: limits a block's gradients just before its update: a `Clip`, or a number, which is the largest norm of one
            block's gradients. ``Clip(..., scope="global")`` takes the norm over all blocks, and needs ``update="end"``.

    Attributes:
        optimizer: the `LocalOptimizer`.
        steps: completed steps, each an update.
        should_stop: set by ``nonfinite="stop"``.

    Raises:
        ArgumentError: a value that is not one of these.
        BackendError: a schedule, graph mode or backend asked for by name that cannot serve; with ``graph="on"`` also from
            `step`, where the step cannot be captured. Nothing has been changed then.
    """

    def __init__(
        self,
        model: LocalModel,
        optimizer: OptimizerFactory | LocalOptimizer,
        *,
        schedule: Literal["auto", "sequential", "overlap", "pipeline"] = "auto",
        precision: str = "32-true",
        graph: Literal["auto", "on", "off"] = "auto",
        backend: Literal["auto", "reference", "triton", "native"] = "auto",
        update: Literal["immediate", "end"] = "immediate",
        deterministic: bool = False,
        seed: int = 0,
        memory_format: Literal["preserve", "channels_last"] = "preserve",
        nonfinite: Literal["raise", "skip", "stop"] = "raise",
        clip: Clip | float | None = None,
        compile: Literal["blocks"] | None = None,
        workers: int | None = None,
        in_flight: int | None = None,
        memory_budget: str | float | None = None,
    ):
        if not isinstance(model, LocalModel):
            raise ArgumentError(f"model: expected a LocalModel from fastlocal.localize, got {type(model).__name__}")
        _one_of("schedule", schedule, ("auto", "sequential", "overlap", "pipeline"))
        _one_of("precision", precision, tuple(PRECISIONS))
        _one_of("graph", graph, ("auto", "on", "off"))
        _one_of("backend", backend, ("auto", "reference", "triton", "native"))
        _one_of("update", update, ("immediate", "end"))
        _one_of("memory_format", memory_format, ("preserve", "channels_last"))
        _one_of("nonfinite", nonfinite, ("raise", "skip", "stop"))
        _at_least_one("workers", workers)
        _at_least_one("in_flight", in_flight)
        budget = None if memory_budget is None else parse_bytes(memory_budget)
        if compile is not None:
            _one_of("compile", compile, ("blocks",))
            if any(block.fns is None for block in model.blocks):
                raise BackendError(
                    f"compile: {type(model.backbone).__name__} is cut by hooks, which cannot be compiled; give it units() and "
                    "readout(), or use compile=None"
                )
        device = next(model.parameters()).device
        if backend == "triton" and (reason := _dispatch.platform(device).triton):
            raise BackendError(f"backend: 'triton' cannot serve this model: {reason}. Or use 'auto'")
        if backend == "native" and device.type != "cpu":
            raise BackendError(
                f"backend: 'native' serves on a CPU, the model is on {device.type}; use 'auto' or 'triton'"
            )
        if PRECISIONS[precision] is torch.float16 and (model.window > 1 or model.summed):
            raise ArgumentError(
                f"precision: {precision!r} gives each block's loss a scale of its own, but losses of {model.method.name!r} reach "
                "several blocks; use 'bf16-mixed' or '32-true'"
            )
        self.clip = Clip.coerce(clip)
        if self.clip is not None and self.clip.scope == "global" and update != "end":
            raise ArgumentError(
                "clip: a norm over all blocks is known only after the last one; use update='end', or scope='block'"
            )
        if self.clip is not None:
            self.clip = self.clip.bind(model)
        model._settle()  # steps that another engine has in flight
        self.model, self.device = model, device
        self.deterministic, self.seed, self.graph = deterministic, seed, graph
        self.backend, self.compile = backend, compile
        self.precision, self.update, self.memory_format = precision, update, memory_format
        self._dtype = PRECISIONS[precision]
        self.schedule, self._why_sequential = self._schedule_that_serves(schedule)
        if isinstance(optimizer, LocalOptimizer):
            optimizer.check_model(model)
            self.optimizer = optimizer
        else:
            self.optimizer = LocalOptimizer(model, optimizer, fused=backend != "reference")
        self._graphs = StepGraphs(self) if graph == "on" and self.schedule == "sequential" else None
        composer = composer_for(self) if graph == "on" and self.schedule != "sequential" else None
        if memory_format == "channels_last":  # in place, and last: a refusal above leaves the model as it was
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if compile is not None:
            for block in model.blocks:
                for part in (*(block.fns or ()), block.head):
                    if isinstance(part, nn.Module):
                        part.compile(dynamic=False)
        self.nonfinite = nonfinite
        self.steps = 0
        self.should_stop = False
        count = len(model.blocks)
        self._guard = Guard(model.blocks, self.device, together=update == "end")
        self._batch_counts = BatchCounts(model)
        self._reported = 0.0
        self._scales = (
            [torch.full((), 2.0**14, dtype=torch.float32, device=self.device) for _ in range(count)]
            if self._dtype is torch.float16
            else None
        )
        self._good = [torch.zeros((), dtype=torch.int32, device=self.device) for _ in range(count)]
        self._one = torch.ones((), dtype=torch.float32, device=self.device)
        alive = len(model.blocks) if model.summed else model.window
        self._cast = CastWeights(model.blocks, self._dtype, alive) if self._dtype and backend != "reference" else None
        self._streams: list[list[Tensor]] | None = None
        self._params: list[list[nn.Parameter]] = [[] for _ in range(count)]
        self._updated = 0  # blocks whose update is done in this step
        self._pending: _Pending | None = None
        self._streams_before: list[list[Tensor]] | None = None
        self._at = (0, "forward")  # block and phase that runs, for the report of an exhausted memory
        self._random = any(block.random for block in model.blocks)
        self._outputs: deque[StepOutput] = deque()  # of completed steps that nobody has had yet
        self._rounds: Rounds | None = None
        self._chooser: Chooser | None = None
        workers = workers or _default_workers(self.device)
        if self.schedule == "auto":
            self._chooser = Chooser(self, workers, in_flight or 1, budget)
        elif self.schedule != "sequential":
            depth = 1 if self.schedule == "overlap" else in_flight or max(2, workers)
            kind = self.schedule
            self._rounds = (
                Rounds(self, kind, workers, depth, budget)
                if composer is None
                else ComposedRounds(self, kind, workers, depth, budget, composer)
            )
        if self.schedule != "sequential":
            own = weakref.ref(self)
            self.optimizer.register_state_dict_pre_hook(lambda _: _settle(own()))
        self._keeps_inputs = model.window > 1 or model.method.reads_boundary  # until its head or backward is done
        self._after = [
            [task for task in run if task.kind != "free" or self._keeps_inputs]
            for run in StepTasks(sequence(model, update), []).after()
        ]

    def _schedule_that_serves(self, schedule: str) -> tuple[str, str]:
        """The schedule for this model, and why it is not the one that was asked for.

        Raises BackendError where another argument or the installation is in the way.
        """
        if schedule == "sequential":
            return schedule, ""
        reason = refusal(self.model, casts=self._dtype is not None and self.backend != "reference")
        if schedule == "auto":
            reason = reason or Chooser.refusal(self)
            return ("sequential", reason) if reason else (schedule, "")
        if not _native.available():
            raise BackendError(
                f"schedule: {schedule!r} needs the native scheduler: {_native.why_not()}. Or use 'sequential'"
            )
        if schedule == "pipeline" and self.update == "end":
            raise BackendError(
                "schedule: 'pipeline' updates a block while others are at other steps, but update='end' (and a clipping over all "
                "blocks) holds every update back to the end of a step; use 'overlap', or update='immediate'"
            )
        if reason is None:
            return schedule, ""
        warnings.warn(f"schedule: {schedule!r} cannot serve, so steps are sequential: {reason}", stacklevel=3)
        return "sequential", f"{schedule} cannot serve: {reason}"

    # --- the step ----------------------------------------------------------------------------------------------------

    def step(self, *batch: Any, **kwargs: Any) -> StepOutput:
        """One training step on ``(x, y)``, a mapping, or whatever the model's ``batch`` function maps.

        Returns:
            `StepOutput` with ``losses`` and ``correct``, on the device; nothing waits for it. With steps in flight it is the
            oldest completed step's that was not returned before (``out.step``), and while none is complete, its ``step``
            is None.

        Raises:
            ArgumentError: a bad batch; nothing has been changed then.
            NonFiniteError: see ``nonfinite``.
            OutOfMemoryError: names the block; it and all blocks after it are as they were, and gradients are freed.
        """
        call, model = self._unpack(batch, kwargs), self.model
        if model.in_flight is not self:
            model._settle()
        self.optimizer.before_step()
        if self._pending is None and self._rounds is None:
            fire(model.links, "before_step")
        begin = time.perf_counter()
        with self._deterministic(), self._served():
            if self._rounds is not None and self._pending is None:
                try:
                    self._rounds.step(*call)
                finally:
                    model.in_flight = self if self._rounds.busy else None
            elif self._graphs is None:
                with self._threads():
                    self._completed(self._run(*call, update=True))
            else:
                self._completed(self._graphs.step(*call))
        if self._chooser is not None:
            self._chooser.note(time.perf_counter() - begin, first_tensor(call[:2]))
        if self._outputs:
            output = self._outputs.popleft()
        else:
            output = StepOutput.none_yet(len(self.model.blocks), call[2], self.model.criterion)
        if not self._guard.waits or self.steps % _CHECK_EVERY == 0:
            try:
                self._report()
            except NonFiniteError as error:
                if model.in_flight is self and output.step not in (None, error.step):
                    self._outputs.appendleft(output)  # of an earlier step
                raise
        return output

    def _completed(self, output: StepOutput) -> None:
        """A step is complete: every block has had its update."""
        self._outputs.append(output)
        self.optimizer.after_step()
        self.steps += 1
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # schedulers ask whether a step came before theirs

    def _threads(self) -> AbstractContextManager[Any]:
        """A step in sequence between scheduled ones computes with as many threads, for the sake of the last bits."""
        return nullcontext() if self._rounds is None else self._rounds.threads_of_a_worker()

    def accumulate(self, *batch: Any, **kwargs: Any) -> StepOutput:
        """A micro-batch: its gradients are added up, and the next `step` updates with the mean over all of them.

        The mean is over targets, not over micro-batches: a ragged one counts by what it holds, and targets that the
        loss ignores do not count (where the criterion has ``ignore_index`` or ``count(target)``, else -100 is taken for
        it). All blocks' gradients live on until that step, so this costs the memory of one copy of the parameters.
        BatchNorm takes the statistics of each micro-batch. If a micro-batch fails, the whole group is dropped.

        Returns:
            The micro-batch's own losses, under the number of the step that it belongs to.

        Raises:
            As `step`.
        """
        call = self._unpack(batch, kwargs)
        self.model._settle()
        if self._chooser is not None:
            self._chooser.accumulating()
        if self._pending is None:
            fire(self.model.links, "before_step")
        with self._deterministic(), self._served(), self._threads():
            return self._run(*call, update=False)

    @property
    def pending(self) -> int:
        """Micro-batches that wait for the next `step`."""
        return 0 if self._pending is None else self._pending.batches

    @property
    def skipped(self) -> Tensor:
        """float32 ``[K]`` on the device: how many updates of each block were left out as not finite."""
        return self._guard.skipped

    def _unpack(self, batch: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        model = self.model
        call = split_call(batch, kwargs) if batch and kwargs else None
        args, kw, target = call or model.unpack(kwargs or (batch[0] if len(batch) == 1 else batch))
        if not model.training:
            raise ArgumentError("model: is in eval mode; call model.train() before engine.step")
        if self.memory_format == "channels_last":
            args = tuple(
                a.contiguous(memory_format=torch.channels_last) if isinstance(a, Tensor) and a.dim() == 4 else a
                for a in args
            )
        if self._graphs is None or not self._graphs.knows(args, kw, target):
            model.validate(args, kw, target, read=self.steps == 0 or not self._guard.waits)
        return args, kw, target

    def _run(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any, *, update: bool, capturing: bool = False
    ) -> StepOutput:
        """A step in sequence: after every block's forward the tasks that stand between it and the next one's."""
        model = self.model
        last = len(model.blocks) - 1
        self._updated = 0
        if self._pending is None:
            self._streams_before = None if self._streams is None else list(self._streams)
            self._guard.begin()
        self._batch_counts.begin()
        try:
            ctx = model.context(args, kwargs, target)
            flight = Flight.of(model, self.steps, (args, kwargs, target), ctx, updates=update)

            def train_block(k: int, h: Tensor) -> Tensor:
                after = self._hand_off(flight, k, h, self._keeps_inputs)
                with torch.autocast(self.device.type, enabled=False) if self._dtype else nullcontext():
                    for task in self._after[k]:
                        self._do(flight, task)
                self._enter(k + 1)
                return after

            self._weigh(target, update)
            self._enter(0)
            with model.passes.applied():
                with self._autocast():
                    flight.outputs[last] = model.run(args, kwargs, train_block)
                for task in self._after[last]:
                    self._do(flight, task)
            self._leave(last)
            model.passes.count()
            self._batch_counts.end()
            if update:
                self._guard.end(self.steps if self._graphs is None else self._graphs.number)
                self._pending = None
            elif self._pending is not None:
                self._pending.batches += 1
        except BaseException as error:
            if capturing:
                self._abandon()
                raise
            updated = 0 if self.update == "end" else self._updated
            self._undo()
            if is_out_of_memory(error):
                raise out_of_memory(error, model, *self._at, self.steps, self.device, range(updated)) from error
            raise
        return flight.output()

    # --- the tasks of a step -----------------------------------------------------------------------------------------

    def _do(self, flight: Flight, task: Task, inside: bool = True) -> None:
        """Runs one task of a step, outside of autocast. ``inside``: a block's low-precision weights may be in place then."""
        k = task.block
        self._begin(task.kind, k)
        if task.kind == "forward":
            self._forward(flight, k)
        elif task.kind == "head":
            self._head(flight, k)
        elif task.kind == "backward":
            self._backward(flight, k)
        elif task.kind == "link":
            with self._cast.outside() if self._cast and inside else nullcontext():
                self._fire(flight, task.links)
        elif task.kind == "update":
            self._finish(flight, k) if k >= 0 else self._update_all(flight)
        else:
            flight.inputs.pop(k + 1, None)

    def _begin(self, kind: str, k: int) -> None:
        """A task of block k begins."""
        self._at = (max(k, 0), kind)

    def _forward(self, flight: Flight, k: int) -> None:
        """Runs the slice of block k; not where the backbone runs itself."""
        block = self.model.blocks[k]
        x = flight.args[0] if k == 0 else flight.inputs[k] if self._keeps_inputs else flight.inputs.pop(k)
        with self._autocast():
            h = block(x)
        if k < len(self.model.blocks) - 1:
            self._hand_off(flight, k, h, True)
        else:
            flight.outputs[k] = h

    def _hand_off(self, flight: Flight, k: int, h: Tensor, keep: bool) -> Tensor:
        """Keeps block k's output for its head and backward; returns the input of the next block, which it may keep too."""
        flight.outputs[k] = h
        after = h if self.model.summed else h.detach() if flight.cascade is None else leaf(h)
        if keep:
            flight.inputs[k + 1] = after
        return after

    def _head(self, flight: Flight, k: int) -> None:
        """The local loss of block k, its own gradients, and the gradient at the block's output."""
        model, block, h = self.model, self.model.blocks[k], flight.outputs[k]
        ctx = flight.ctx
        if k == len(model.blocks) - 1:
            with self._autocast():
                loss = model.final_loss(h, flight.target)
            flight.logits = logits_of(h).detach()
            flight.hits.add(flight.logits)
            flight.losses.extend(part.detach() for part in (*flight.summed, loss))
            flight.outputs[k] = loss
            block.fire("between_forward_and_backward")
            return
        x = flight.inputs.pop(k, None)  # a cascade holds it for as long as a gradient may go there
        if model.method.reads_boundary:
            ctx = replace(ctx, boundary=x if k else None)
        if model.summed:
            with self._autocast():
                local = block.local_loss(h, ctx)
            flight.summed.append(local.loss)
        elif flight.cascade is None:
            local, flight.owed[k] = block.local_gradient(h, ctx, self._start(k), self._autocast())
            flight.losses.append(local.loss.detach())
        else:
            local, own, shared = block.split_gradients(h, ctx, self._start(k), self._autocast())
            flight.losses.append(local.loss.detach())
            flight.take(flight.cascade.add(block, x, flight.outputs.pop(k), own, shared))
        flight.hits.add(local.logits, local.correct)

    def _backward(self, flight: Flight, k: int) -> None:
        """Block k's own backward; its graph is gone then, and its float32 weights have their gradients."""
        model, block, h = self.model, self.model.blocks[k], flight.outputs.pop(k)
        if k < len(model.blocks) - 1:
            if flight.cascade is None:
                block.backward(h, flight.owed.pop(k))
            else:
                block.backward_into(h, flight.owed.pop(k))
        else:
            start_backward(functools.reduce(torch.add, flight.summed, h), flight.ctx, self._start(k))
            flight.summed.clear()
            if flight.cascade is not None:
                x = flight.inputs.pop(k)
                down = None if x is None else x.grad
                flight.take(list(flight.cascade.finish(scaled_down(down, model.method.final_share))))
        if self._cast:
            for j in range(k + 1) if model.summed else (k,):
                self._cast.leave_block(j)

    def _weigh(self, target: Any, update: bool) -> None:
        """Sets the weight of this micro-batch; a step of one batch weighs nothing and launches nothing."""
        if self._pending is None:
            if update:
                return
            first = count_targets(target, self.model.criterion)
            self._pending = _Pending(0, first, torch.ones_like(first), None)
        else:
            weight = count_targets(target, self.model.criterion) / self._pending.first
            self._pending.weight = weight
            self._pending.total = self._pending.total + weight

    def _start(self, k: int) -> Tensor | None:
        """What backward of block k's loss starts from, if it is not 1: loss scale times weight of the micro-batch."""
        scale = self._scale(k)
        weight = None if self._pending is None else self._pending.weight
        if weight is None or scale is None:
            return scale if weight is None else weight
        return scale * weight

    def _finish(self, flight: Flight, k: int) -> None:
        """Checks and unscales a block's gradients, then updates it and frees them (or keeps them for the end)."""
        loss = flight.losses[k]
        if not flight.updates:  # a gradient that is not finite stays so in the sum
            self._guard.check(k, [loss], self._one)
            return
        params = self._params[k]
        inverse = self._one if self._scales is None else self._scales[k].reciprocal()
        if self._pending is not None:
            inverse = inverse / self._pending.total
        # The loss is looked at too: it can be infinite where its gradient is not. Unscaling must not change it.
        checked = [loss if inverse is self._one else loss.clone(), *(p.grad for p in params if p.grad is not None)]
        self._guard.check(k, checked, inverse)
        found = self._guard.found[k]
        if self._scales is not None:
            torch._amp_update_scale_(self._scales[k], self._good[k], found, 2.0, 0.5, 2000)
        if self.update == "immediate":
            if self.clip is not None:
                self.clip(params)
            self._step_block(k, found)
            for p in params:
                p.grad = None
        self._updated = k + 1

    def _step_block(self, k: int, bad: Tensor) -> None:
        """Updates block k unless ``bad`` says that something is not finite."""
        inner = self.optimizer.blocks[k]
        if not self._guard.waits or not _skips_on_device(inner):
            # free on a CPU; elsewhere this optimizer cannot skip on the device, and the read waits for it
            if not bool(bad):
                self.optimizer.step_block(k)
        elif inner is not None:
            inner.found_inf = bad  # type: ignore[attr-defined]
            try:
                self.optimizer.step_block(k)
            finally:
                del inner.found_inf  # type: ignore[attr-defined]

    def _fire(self, flight: Flight, links: Sequence[Link]) -> None:
        """Links, once for an update; those after a backward fire at the end of the step with ``update="end"``."""
        if flight.updates and torch.is_grad_enabled():
            for link in links:
                link.fire()

    def _update_all(self, flight: Flight) -> None:
        """``update="end"``: steps every block, or none if any is not finite."""
        if not flight.updates:
            return
        bad = self._guard.any_found()
        for block in self.model.blocks:
            block.fire("after_backward")
        if self.clip is not None:
            together = self.clip.scope == "global"
            for params in [[p for block in self._params for p in block]] if together else self._params:
                self.clip(params)
        for k in range(len(self.model.blocks)):
            self._step_block(k, bad)
        self._free_gradients()

    # --- what a block must leave behind when it fails ----------------------------------------------------------------

    def _enter(self, k: int) -> None:
        """Before block k's forward in sequence."""
        if k:
            self._leave(k - 1)
        self._at = (k, "forward")
        self._open(k)
        if self._streams is not None and self.model.blocks[k].random:
            self._resume_stream(k)

    def _open(self, k: int) -> None:
        """Before block k's forward: forgets gradients that are not this step's, casts its weights."""
        params = self._params[k] = self.model.blocks[k].parameters()
        if self.pending == 0:
            for p in params:
                p.grad = None
        if self._cast:
            self._cast.enter(k)

    def _resume_stream(self, k: int) -> None:
        """Block k draws its random numbers where it stopped."""
        assert self._streams is not None
        _set_random_state(self._streams[k], self.device)

    def _leave(self, k: int) -> None:
        if self._streams is not None and self.model.blocks[k].random:
            self._streams[k] = _random_state(self.device)

    def _undo(self) -> None:
        """After an exception: blocks that were not updated get their buffers back, and no gradient stays."""
        if self._cast:
            self._cast.leave()
        self._batch_counts.end()
        self._guard.end(self.steps, undo=range(0 if self.update == "end" else self._updated, len(self.model.blocks)))
        if self.update == "end":
            self._streams = self._streams_before
        self._pending = None
        self._free_gradients()

    def _abandon(self) -> None:
        """After an exception in a capture, where nothing was computed: Python's side of `_undo`, without a launch."""
        if self._cast:
            self._cast.abandon()
        self._batch_counts.abandon()
        self._pending = None
        self._free_gradients()

    def _free_gradients(self) -> None:
        for params in self._params:
            for p in params:
                p.grad = None

    def _report(self) -> None:
        """Reads the device's non-finite counters and acts as ``nonfinite`` says."""
        total = float(self._guard.skipped.sum())
        if total == self._reported:
            return
        self._reported = total
        if self._scales is not None and min(float(s) for s in self._scales) >= 1.0:
            # an fp16 overflow is how the loss scale finds its place; it is an error only when the scale has run out
            self._guard.first_bad.fill_(-1)
            return
        where = self._guard.first_bad.tolist()
        bad = [(int(step), k) for k, step in enumerate(where) if step >= 0]
        self._guard.first_bad.fill_(-1)
        if not bad or self.nonfinite == "skip":
            return
        if self.nonfinite == "stop":
            self.should_stop = True
            return
        step, k = min(bad)
        name = self.model.blocks[k].name
        kept = (
            "no block was updated"
            if self.update == "end"
            else f"block {k} was not updated at that step, the others were"
        )
        raise NonFiniteError(
            f"a loss or gradient of block {k} ('{name}') was not finite at step {step}; {kept}. Lower the learning rate, look at the "
            "batch, or use nonfinite='skip'",
            block=k,
            name=name,
            step=step,
            updated=[]
            if self.update == "end"
            else [b.index for b in self.model.blocks if b.index not in {i for _, i in bad}],
        )

    # --- precision, backends and randomness --------------------------------------------------------------------------

    def _served(self) -> AbstractContextManager[Any]:
        """What the operators of a step are asked for, and how often a unit's class may be compiled."""
        stack = ExitStack()
        if self.backend != "auto":
            named = _dispatch.backend if self.backend == "reference" else _dispatch.where_it_exists
            stack.enter_context(named(self.backend))
        if self.compile is not None:  # PyTorch counts over all units of a class, and stops at 8
            stack.enter_context(torch._dynamo.config.patch(recompile_limit=_MAX_COMPILES))
        return stack

    def _autocast(self) -> AbstractContextManager[Any]:
        """Without the weight cache: a block's weights are cast once, used once, and updated before the region ends."""
        if self._dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self._dtype, cache_enabled=False)

    def _scale(self, k: int) -> Tensor | None:
        return None if self._scales is None else self._scales[k]

    def _own_streams(self) -> bool:
        """Whether each block draws its random numbers from a stream of its own."""
        return len(self.model.blocks) > 1 and (self.deterministic or (self._rounds is not None and self._random))

    @contextmanager
    def _deterministic(self) -> Iterator[None]:
        own_streams = self._own_streams()
        if not self.deterministic and not own_streams:
            yield
            return
        before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        outside = _random_state(self.device)
        if self._streams is None and own_streams:
            self._streams = []
            for k in range(len(self.model.blocks)):
                torch.manual_seed((self.seed * 1_000_003 + k) % 2**63)
                self._streams.append(_random_state(self.device))
            _set_random_state(outside, self.device)
        if self.deterministic:
            torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            if self._streams is not None:
                _set_random_state(outside, self.device)

    # --- state -------------------------------------------------------------------------------------------------------

    def flush(self) -> list[StepOutput]:
        """Completes the steps in flight and reports non-finite blocks now.

        Returns:
            The outputs that `step` has not returned yet, oldest first; in sequence, none.
        """
        self._settle()
        self._report()
        outputs = list(self._outputs)
        self._outputs.clear()
        return outputs

    def _settle(self) -> None:
        """Every block has had every step that was given; outputs wait for `step` or `flush`."""
        if self._rounds is not None and self._rounds.busy:
            try:
                with self._deterministic(), self._served():
                    self._rounds.drain()
            finally:
                self.model.in_flight = None

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs besides ``model.state_dict()`` and the caller's own random state.

        Steps in flight are completed first; `flush` still returns their outputs.
        """
        self._settle()
        return {
            "steps": self.steps,
            "precision": self.precision,
            "optimizer": self.optimizer.state_dict(),
            "scales": [s.clone() for s in self._scales or []],
            "good": [g.clone() for g in self._good],
            "skipped": self._guard.skipped.clone(),
            "streams": [[t.clone() for t in s] for s in self._streams or []],
            "pending": self._pending_state(),
            "schedule": None if self._chooser is None else self._chooser.choice,
        }

    def _pending_state(self) -> dict[str, Any] | None:
        """In the middle of an accumulation: the sums so far, and what a group that fails has to give back."""
        if self._pending is None:
            return None
        grads = [p.grad for params in self._params for p in params]
        return {
            "batches": self._pending.batches,
            "first": self._pending.first.clone(),
            "total": self._pending.total.clone(),
            "gradients": [None if g is None else g.clone() for g in grads],
            "guard": self._guard.state(),
            "streams": [[t.clone() for t in s] for s in self._streams_before or []],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ArgumentError for the state of another number of blocks or another precision, before anything changes."""
        count = len(self.model.blocks)
        missing = [key for key in self.state_dict() if key not in state and key != "schedule"]  # which is younger
        if missing:
            raise ArgumentError(f"state_dict: lacks {', '.join(missing)}; pass what Engine.state_dict() returned")
        if len(state["good"]) != count:
            raise ArgumentError(
                f"state_dict: comes from {len(state['good'])} blocks, this engine has {count}; localize with that many"
            )
        if PRECISIONS.get(state["precision"]) != self._dtype or len(state["scales"]) != len(self._scales or []):
            raise ArgumentError(
                f"state_dict: comes from precision {state['precision']!r}, this engine has {self.precision!r}; make it with the one "
                "it was trained with"
            )
        if self._own_streams() and any(len(s) != len(_random_state(self.device)) for s in state["streams"]):
            raise ArgumentError(
                f"state_dict: its random streams are of another device type than {self.device.type!r}; resume on the one it came from"
            )
        pending = state["pending"]
        if pending is not None and len(pending["gradients"]) != sum(len(b.parameters()) for b in self.model.blocks):
            raise ArgumentError(
                f"state_dict: holds {len(pending['gradients'])} gradients of an accumulation, the model has another number of "
                "parameters; localize it as the one that was saved"
            )
        if self._graphs is not None:
            self._graphs.forget("a state was loaded")
        self.optimizer.load_state_dict(state["optimizer"])
        self._outputs.clear()
        if self._chooser is not None and state.get("schedule") is not None:
            self._chooser.choose(state["schedule"])
        self.steps = state["steps"]
        for own, saved in zip(self._scales or [], state["scales"], strict=True):
            own.copy_(saved)
        for own, saved in zip(self._good, state["good"], strict=True):
            own.copy_(saved)
        self._guard.skipped.copy_(state["skipped"])
        self._reported = float(self._guard.skipped.sum())
        streams = [[t.clone() for t in s] for s in state["streams"]]
        self._streams = (streams or None) if self._own_streams() else None
        self._load_pending(pending)

    @torch.no_grad()
    def _load_pending(self, state: dict[str, Any] | None) -> None:
        self._params = [block.parameters() for block in self.model.blocks]
        self._free_gradients()
        self._pending = None
        if state is None:
            return
        for p, saved in zip([p for params in self._params for p in params], state["gradients"], strict=True):
            if saved is not None:  # with the strides that autograd gives it, which the order of a norm's sum depends on
                p.grad = torch.empty_like(p, dtype=saved.dtype).copy_(saved)
        first, total = (state[key].to(self.device) for key in ("first", "total"))
        self._pending = _Pending(state["batches"], first, total, None)
        self._guard.load(state["guard"])
        self._streams_before = [[t.clone() for t in s] for s in state["streams"]] or None

    def _explain_schedule(self) -> str:
        if self._rounds is not None:
            text = self._rounds.explain()
            return text if self._chooser is None else f"{text}; {self._chooser.explain()}"
        why = self._why_sequential if self._chooser is None else self._chooser.explain()
        return f"schedule: sequential{'; ' if why else ''}{why}"

    def _explain_graphs(self) -> str:
        if isinstance(self._rounds, ComposedRounds):
            return self._rounds.explain_graphs()
        return self._graphs.explain() if self._graphs is not None else f"graph: off; {_why_eager(self.graph)}"

    def explain(self) -> str:
        """Which schedule, graph mode and backend serve this engine, and why the others do not."""
        fused = sum(bool(o and o.param_groups[0].get("fused")) for o in self.optimizer.blocks)
        return "\n".join(
            [
                self._explain_schedule(),
                self._explain_graphs(),
                f"backend: {self.backend}",
                f"optimizer: fused step in {fused} of {len(self.optimizer.blocks)} blocks",
                f"precision: {self.precision}; memory format: {self.memory_format}; update: {self.update}",
                self.model.explain(),
            ]
        )


def _settle(engine: Engine | None) -> None:
    if engine is not None:
        engine._settle()


def _default_workers(device: torch.device) -> int:
    return min(4, max(2, torch.get_num_threads() // 2)) if device.type == "cpu" else 2


def _at_least_one(name: str, value: Any) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ArgumentError(f"{name}: got {value!r}; give an integer of at least 1, or None")


def _why_eager(graph: str) -> str:
    if graph == "off":
        return "as asked for"
    return "'auto' is eager, because graphs have not been measured on a device; 'on' captures the step"


def _skips_on_device(inner: torch.optim.Optimizer | None) -> bool:
    """Whether this optimizer leaves everything as it is where ``found_inf`` is set, without the host knowing."""
    if inner is None:
        return True
    # A skipped first step of fused SGD leaves its momentum uninitialised; LocalOptimizer can prevent it without dampening only.
    return getattr(inner, "_step_supports_amp_scaling", False) and not any(
        g.get("dampening") for g in inner.param_groups
    )


def _one_of(name: str, value: Any, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ArgumentError(f"{name}: got {value!r}; valid are {', '.join(map(repr, valid))}")


def _random_state(device: torch.device) -> list[Tensor]:
    state = [torch.get_rng_state()]
    return [*state, torch.cuda.get_rng_state(device)] if device.type == "cuda" else state


def _set_random_state(state: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
