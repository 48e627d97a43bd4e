"""`StepGraphs`: the sequential step as one CUDA graph for each shape of a batch, with the answers of eager steps.

A captured step runs no Python, so everything that Python decided while it was captured is compared before each replay
(`Stamp`). What differs drops the graphs, and the steps that follow run eagerly until a new capture. Rates are read from the
device, where they are written when they change.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain, compress
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module
from torch.optim import optimizer as _optimizer
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from fastlocal.engine.output import Hits, StepOutput
from fastlocal.errors import BackendError
from fastlocal.ops import _dispatch
from fastlocal.ops._update import Fused

if TYPE_CHECKING:
    from fastlocal.engine.engine import Engine

WARM_UP = 2  # eager steps of a shape, with everything as it will be captured; the first step of all has one more
MAX_GRAPHS = 8  # shapes that get a graph of their own
_MAX_SHAPES = 64  # shapes that are counted
_PATIENCE = 20  # steps without a graph because something always changes, before that is said

_ADAM = (torch.optim.Adam, torch.optim.AdamW)
# Modules of exactly these types have nothing that is changed between steps but their tensors; BatchNorms, three numbers.
_PLAIN = (
    nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Identity, nn.Flatten, nn.ReLU, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d,
)  # fmt: skip
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_NORM = operator.itemgetter("training", "momentum", "eps")
_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
)  # fmt: skip
_STANDARD = frozenset(vars(nn.Module()))


class GraphDevice(Protocol):
    """What capture and replay need of a device."""

    rate_dtype: torch.dtype

    def warm_up(self) -> AbstractContextManager[None]:
        """Around an eager step before a capture."""
        ...

    def capture(self, run: Callable[[], None], others: list[Any]) -> Any:
        """Records what ``run`` launches, without computing anything; ``replay()`` of the result launches it.

        ``others``: results of captures before, whose memory it may use.
        """
        ...


class CudaGraphs:
    """Warm-up and capture on one side stream, so that autograd, cuBLAS and cuDNN meet the stream that they know."""

    rate_dtype = torch.float32  # all that PyTorch's fused optimizers read on the device

    def __init__(self, device: torch.device):
        self._device = device
        self._stream: torch.cuda.Stream | None = None

    @contextmanager
    def warm_up(self) -> Iterator[None]:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            current.wait_stream(self._stream)

    def capture(self, run: Callable[[], None], others: list[Any]) -> Any:
        # A pool lives as long as a graph in it; the handle of one that is gone must not be used again.
        pool = others[0].pool() if others else torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        random = torch.cuda.get_rng_state(self._device)
        failed: list[BaseException] = []

        def recorded() -> None:
            try:
                run()
            except BaseException as error:
                failed.append(error)
                raise

        try:
            # torch.cuda.graph leaves its stream current if the end of a capture fails. Other threads may pin memory meanwhile.
            with self.warm_up(), torch.cuda.graph(graph, pool, self._stream, capture_error_mode="thread_local"):
                recorded()
        except BaseException as error:
            torch.cuda.set_rng_state(random, self._device)
            if failed and error is not failed[0]:  # the end of a broken capture hides what broke it
                raise failed[0] from None
            raise
        return graph


def check_device(device: torch.device) -> None:
    """Raises BackendError where there are no CUDA graphs."""
    if device.type != "cuda":
        raise BackendError(
            f"graph: 'on' needs a CUDA device, the model is on {device.type}; move it there before the Engine is made, or use "
            "'auto' or 'off'"
        )


def graph_device(device: torch.device) -> GraphDevice:
    """Raises BackendError where there are no CUDA graphs."""
    check_device(device)
    return CudaGraphs(device)


def refusal(engine: Engine) -> str | None:
    """Why the steps of an engine cannot be captured, with the remedy; None if nothing is known to be in the way."""
    if engine.deterministic and len(engine.model.blocks) > 1 and any(b.random for b in engine.model.blocks):
        return (
            "deterministic=True gives each block a random stream of its own, and streams cannot be switched while a graph is "
            "captured; use deterministic=False, or graph='off'"
        )
    for k, inner in enumerate(engine.optimizer.blocks):
        reason = _optimizer_refusal(inner)
        if reason is not None:
            return f"the optimizer of block {k}, {type(inner).__name__}, {reason}"
    return None


def _optimizer_refusal(inner: torch.optim.Optimizer | None) -> str | None:
    if inner is None:
        return None
    from fastlocal.engine.engine import _skips_on_device

    groups = inner.param_groups
    if not _skips_on_device(inner):
        return (
            "cannot leave out a step without the host knowing; use SGD (without dampening), Adam or AdamW with fused=True, or "
            "fl.ops.FusedSGD or FusedAdamW, or graph='off'"
        )
    known = type(inner) is torch.optim.SGD or type(inner) in _ADAM or isinstance(inner, Fused)
    if not known and not all(g.get("capturable") for g in groups):
        return (
            "is not known to keep all that changes on the device; if it does, set capturable=True in its groups, else use "
            "graph='off'"
        )
    if inner._optimizer_step_pre_hooks or inner._optimizer_step_post_hooks:
        return "has step hooks, which a graph would not call; register them on engine.optimizer, or use graph='off'"
    return None


class Rates:
    """The learning rates of all groups in one tensor on the device.

    Groups hold views of it only while a step runs or is captured, so schedulers and checkpoints see what they wrote.
    """

    def __init__(self, groups: list[dict[str, Any]], device: torch.device, dtype: torch.dtype):
        self._values = torch.zeros(len(groups), dtype=dtype, device=device)
        self._views = list(self._values.unbind())
        self._now: list[float] | None = None

    def __len__(self) -> int:
        return len(self._views)

    @torch.no_grad()
    def write(self, groups: list[dict[str, Any]]) -> None:
        """Brings what the groups say to the device, if it has changed. Does not wait."""
        rates = [g["lr"] for g in groups]
        on_device = [isinstance(r, Tensor) and r.device == self._values.device for r in rates]
        now = [0.0 if there else float(r) for r, there in zip(rates, on_device, strict=True)]
        if now != self._now:
            if len(set(now)) == 1:
                self._values.fill_(now[0])
            else:
                cuda = self._values.device.type == "cuda"
                self._values.copy_(torch.tensor(now, dtype=self._values.dtype, pin_memory=cuda), non_blocking=True)
            self._now = now
        if any(on_device):
            torch._foreach_copy_(
                list(compress(self._views, on_device)), [r.reshape(()) for r in compress(rates, on_device)]
            )

    @contextmanager
    def lent(self, groups: list[dict[str, Any]], *, capturing: bool = False) -> Iterator[None]:
        """Inside, the groups' rates are the device's; in a capture Adam, which asks, is told that it may be captured."""
        before = [(g["lr"], g.get("capturable")) for g in groups]
        try:
            for g, view in zip(groups, self._views, strict=True):
                g["lr"] = view
                if capturing and "capturable" in g:
                    g["capturable"] = True
            yield
        finally:
            for g, (rate, capturable) in zip(groups, before):
                g["lr"] = rate
                if "capturable" in g:
                    g["capturable"] = capturable


def _lendable(inner: torch.optim.Optimizer) -> bool:
    return type(inner) is torch.optim.SGD or type(inner) in _ADAM or isinstance(inner, Fused)


def _flat(dicts: list[dict[Any, Any]]) -> list[Any]:
    return [*chain.from_iterable(map(dict.values, dicts))]


_data_ptr = Tensor.data_ptr
_requires_grad = operator.attrgetter("requires_grad")
_fused_options = operator.attrgetter(
    "max_norm", "check", "master", "impl", "rounding", "seed", "_averages", "_ema_decay"
)


class Stamp:
    """All that Python looks at while it runs a step, and the addresses that it hands to the device.

    The comparisons are those of whole lists, in C: tens of nanoseconds an entry.
    """

    def __init__(self, engine: Engine):
        model = engine.model
        modules = list(model.modules())
        others = [
            vars(o) for o in (model.method, model.criterion) if hasattr(o, "__dict__") and not isinstance(o, nn.Module)
        ]
        tables = [t for m in modules for t in (m._parameters, m._buffers, m._modules) if t]
        self._engine = engine
        self._tables = tables
        self._entries = _flat(tables)
        self._is_tensor = [isinstance(t, Tensor) for t in self._entries]
        tensors = list(compress(self._entries, self._is_tensor))
        self._addresses = list(map(_data_ptr, tensors))
        self._kept = [t.detach() for t in tensors]  # the memory is not given to others while a graph writes into it
        self._leaves = [t for t in tensors if isinstance(t, nn.Parameter)]
        self._grads = list(map(_requires_grad, self._leaves))
        self._norms = [vars(m) for m in modules if type(m) in _NORMS]
        self._norm_values = list(map(_NORM, self._norms))
        self._vars = [vars(m) for m in modules if type(m) not in _PLAIN and type(m) not in _NORMS] + others
        self._values = _flat(self._vars)
        own = [(d, key, v) for d in self._vars for key, v in d.items() if key not in _STANDARD]
        self._loose = [(d, key, t, t.data_ptr()) for d, key, t in own if isinstance(t, Tensor)]
        self._containers = [v for _, _, v in own if isinstance(v, (list, dict, set))]
        self._contents = [_copy(v) for v in self._containers]
        self._inners = [o for o in engine.optimizer.blocks if o is not None]
        self._groups = [g for o in self._inners for g in o.param_groups]
        self._options = [_constants(g, _lendable(o)) for o in self._inners for g in o.param_groups]
        self._option_values = [get(g) for get, g in zip(self._options, self._groups, strict=True)]
        self._members = [*chain.from_iterable(g["params"] for g in self._groups)]
        self._states = [*chain.from_iterable(o.state.values() for o in self._inners)]
        self._state_values = _flat(self._states)
        self.fused = [o for o in self._inners if isinstance(o, Fused)]
        self._fused_values = list(map(_fused_options, self.fused))
        self._own = self._of_engine()
        self._settings = _settings(engine.device)
        hooked = [getattr(m, name) for m in modules for name in _HOOKS]
        hooked += [
            getattr(o, name)
            for o in self._inners
            for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
        ]
        hooked += [t for name, t in vars(_module).items() if name.startswith("_global_") and isinstance(t, dict)]
        hooked += [_optimizer._global_optimizer_pre_hooks, _optimizer._global_optimizer_post_hooks]
        self._hooked = hooked
        self._hooks = self._count_hooks()
        self._last_hook = RemovableHandle.next_id
        self._restorable = [(d, dict(d)) for d in (*tables, *self._vars, *self._states)]
        self._inner_states = [(o.state, dict(o.state)) for o in self._inners]

    def difference(self) -> str | None:
        """What is no longer as it was, or None."""
        try:
            return self._difference()
        except Exception:  # a tensor or an array took another's place: comparing them has no truth value
            return "an attribute of a module, or the optimizer's state"

    def _difference(self) -> str | None:
        entries = _flat(self._tables)
        if entries != self._entries:
            return "parameters, buffers or modules of the model"
        if list(map(_data_ptr, compress(entries, self._is_tensor))) != self._addresses:
            return "addresses of parameters or buffers"
        if list(map(_requires_grad, self._leaves)) != self._grads:
            return "requires_grad of a parameter"
        if list(map(_NORM, self._norms)) != self._norm_values:
            return "training mode, momentum or eps of a BatchNorm"
        if _flat(self._vars) != self._values or self._containers != self._contents:
            return "training mode or an attribute of a module"
        if any(d.get(key) is not t or t.data_ptr() != at for d, key, t, at in self._loose):
            return "a tensor that is an attribute of a module"
        groups = [g for o in self._inners for g in o.param_groups]
        if [get(g) for get, g in zip(self._options, groups, strict=True)] != self._option_values:
            return "options of the optimizer other than the rate"
        if [*chain.from_iterable(g["params"] for g in groups)] != self._members:
            return "parameters of the optimizer"
        states = [*chain.from_iterable(o.state.values() for o in self._inners)]
        if len(states) != len(self._states) or _flat(states) != self._state_values:  # type: ignore[arg-type]
            return "the optimizer's state"
        if list(map(_fused_options, self.fused)) != self._fused_values:
            return "options or averages of the optimizer"
        if self._of_engine() != self._own:
            return "the engine's options"
        if _settings(self._engine.device) != self._settings:
            return "settings of PyTorch (precision, determinism, autocast) or the backend"
        if RemovableHandle.next_id != self._last_hook or self._hooks:
            if self._count_hooks() != self._hooks:
                return "hooks"
            self._last_hook = RemovableHandle.next_id
        return None

    def restore(self) -> None:
        """Gives modules and the optimizer's state the tensors and attributes back that they had."""
        for states, saved in self._inner_states:
            for p in [p for p in states if p not in saved]:
                del states[p]
        for d, saved in self._restorable:
            if len(d) != len(saved) or any(d.get(key) is not v for key, v in saved.items()):
                d.clear()
                d.update(saved)

    def _count_hooks(self) -> list[Any]:
        found: list[Any] = [*chain.from_iterable(self._hooked)]
        for i, p in enumerate(self._leaves):
            if p._backward_hooks or p._post_accumulate_grad_hooks:  # type: ignore[attr-defined]
                found += [i, *(p._backward_hooks or ()), *(p._post_accumulate_grad_hooks or ())]  # type: ignore[attr-defined]
        return found

    def _of_engine(self) -> tuple[Any, ...]:
        engine = self._engine
        model, cast, guard = engine.model, engine._cast, engine._guard
        return (
            engine.clip, engine.update, engine.memory_format, engine._dtype, model.criterion, model.method, model._adapter,
            [b.head for b in model.blocks], guard._copies, None if cast is None else (cast._scratch, len(cast._lows)),
        )  # fmt: skip


def _copy(container: Any) -> Any:
    kinds = (list, dict, set)
    return next(kind for kind in kinds if isinstance(container, kind))(container)


def _constants(group: dict[str, Any], lendable: bool) -> Callable[[dict[str, Any]], Any]:
    """Gets all of a group that is captured as it is."""
    keys = [key for key in group if key not in ("lr", "initial_lr", "params", "capturable")]
    if not lendable:
        return lambda g: [*(g[key] for key in keys), id(g["lr"]) if isinstance(g["lr"], Tensor) else g["lr"]]
    return operator.itemgetter(*keys) if keys else lambda g: None


def _settings(device: torch.device) -> tuple[Any, ...]:
    cudnn = torch.backends.cudnn
    return (
        cudnn.enabled,
        cudnn.benchmark,
        cudnn.deterministic,
        _allows_tf32(cudnn),
        _allows_tf32(torch.backends.cuda.matmul),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_autocast_enabled(device.type),
        torch.get_autocast_dtype(device.type),
        torch.is_grad_enabled(),
        _dispatch.requested(),
    )


def _allows_tf32(where: Any) -> Any:
    try:
        return where.allow_tf32
    except RuntimeError:  # whoever uses the newer names cannot ask by the older one
        return where.fp32_precision


class _Place(NamedTuple):
    """Where a result stands among those of its dtype."""

    flat: int
    start: int
    stop: int
    shape: torch.Size

    def of(self, flats: list[Tensor]) -> Tensor:
        return flats[self.flat][self.start : self.stop].view(self.shape)


class _Results:
    """Results of a captured step: one tensor for each dtype, so that a step takes its own with one launch."""

    def __init__(self, losses: Tensor, logits: Tensor | None, scores: list[Tensor | None]):
        parts: dict[torch.dtype, list[Tensor]] = {}
        ends: dict[torch.dtype, int] = {}
        known: dict[tuple[int, torch.Size, torch.dtype], _Place] = {}  # the last block's scores are the logits

        def place(t: Tensor | None) -> _Place | None:
            if t is None:
                return None
            key = (t.data_ptr(), t.shape, t.dtype)
            if key not in known:
                start = ends.get(t.dtype, 0)
                parts.setdefault(t.dtype, []).append(t.reshape(-1))
                ends[t.dtype] = start + t.numel()
                known[key] = _Place(list(parts).index(t.dtype), start, ends[t.dtype], t.shape)
            return known[key]

        self.losses = place(losses)
        self.logits = place(logits)
        self.scores = [place(s) for s in scores]
        self.flats = [torch.cat(tensors) for tensors in parts.values()]


class _Hits(Hits):
    """Hits of a replayed step: the scores are looked up when somebody asks."""

    def __init__(self, target: Any, criterion: Any, places: list[_Place | None], flats: list[Tensor]):
        super().__init__(target, criterion)
        self._places, self._flats = places, flats

    @torch.no_grad()
    def result(self) -> Tensor:
        if self._result is None:
            self.scores = [None if place is None else place.of(self._flats) for place in self._places]
            self._flats = []
        return super().result()


class _Batch(NamedTuple):
    """What is copied for each replay, and what a graph is captured for."""

    key: Any  # None: a graph cannot take it
    tensors: list[Tensor]
    build: Callable[[list[Tensor]], tuple[Any, Any, Any]]


def _look_at(args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> _Batch:
    leaves, spec = pytree.tree_flatten((args, kwargs, target))
    tensors: list[Tensor] = []
    seen: dict[int, int] = {}
    at: list[int | None] = []
    key: list[Any] = [spec]
    usable = True
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            at.append(None)
            key.append((type(leaf), leaf))
            usable = usable and isinstance(leaf, (bool, int, float, str, type(None)))
            continue
        if id(leaf) not in seen:
            seen[id(leaf)] = len(tensors)
            tensors.append(leaf)
        at.append(seen[id(leaf)])
        key.append((seen[id(leaf)], leaf.shape, leaf.stride(), leaf.dtype, leaf.device))
        overlaps = any(step == 0 and size > 1 for size, step in zip(leaf.shape, leaf.stride()))
        usable = usable and type(leaf) is Tensor and not leaf.requires_grad and not overlaps

    def build(new: list[Tensor]) -> tuple[Any, Any, Any]:
        return pytree.tree_unflatten([leaf if i is None else new[i] for leaf, i in zip(leaves, at)], spec)

    return _Batch((str(spec), *key[1:]) if usable else None, tensors, build)


@dataclass
class _Shape:
    """A shape of a batch: its eager steps, and then its graph."""

    runs: int = 0
    graph: Any = None
    inputs: list[Tensor] | None = None
    results: _Results | None = None
    norms: list[tuple[Any, Any]] | None = None


class StepGraphs:
    """Runs the steps of an engine: eagerly at first, then by capturing and replaying them.

    Args:
        engine: complete but for this.

    Raises:
        BackendError: no CUDA graphs on this device, or a step that cannot be captured.

    Attributes:
        number: of the step, on the device.
    """

    def __init__(self, engine: Engine):
        self._device = graph_device(engine.device)
        reason = refusal(engine)
        if reason is not None:
            raise BackendError(f"graph: {reason}")
        self._engine = engine
        self._shapes: dict[Any, _Shape] = {}
        self._stamp: Stamp | None = None
        self._rates = Rates([], engine.device, self._device.rate_dtype)
        self.number = torch.zeros((), device=engine.device)
        self._next = 0  # what `number` holds
        self._why = "every shape of a batch has eager steps first"
        self.replays = self.eager = self.captures = 0

    def knows(self, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> bool:
        """Whether such a batch has been through eager steps, so that it need not be looked at again."""
        self._batch = _look_at(args, kwargs, target)
        shape = self._shapes.get(self._batch.key)
        return shape is not None and shape.graph is not None

    def forget(self, why: str) -> None:
        """Drops all graphs; the next steps are eager."""
        self._shapes.clear()
        self._stamp = None
        self._why = why

    def step(self, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> StepOutput:
        """One step on the batch that `knows` was asked about, which checks it if it returned False."""
        engine = self._engine
        batch = self._batch
        groups = [g for o in engine.optimizer.blocks if o is not None and _lendable(o) for g in o.param_groups]
        if len(groups) != len(self._rates):
            self.forget("the optimizer has other groups")
            self._rates = Rates(groups, engine.device, self._device.rate_dtype)
        self._rates.write(groups)
        if self._next != engine.steps:
            self.number.fill_(engine.steps)
            self._next = engine.steps
        shape = self._shape_of(batch)
        if shape is None or (shape.graph is None and shape.runs < WARM_UP):
            with self._device.warm_up() if shape is not None else nullcontext(), self._rates.lent(groups):
                output = engine._run(args, kwargs, target, update=True)
            if shape is not None:
                shape.runs += 1
            self.eager += 1
            if self.eager == _PATIENCE and not self.captures:
                warnings.warn(f"graph='on': {_PATIENCE} steps have run and none is captured: {self._why}", stacklevel=3)
            return output
        if shape.graph is None:
            self._capture(shape, batch, groups)
        return self._replay(shape, batch.tensors, target)

    def _shape_of(self, batch: _Batch) -> _Shape | None:
        """What is known of a shape; None where its steps stay eager."""
        if batch.key is None:
            self._why = "a batch holds what cannot be copied: a tensor that takes a gradient, repeats its elements or is of a subclass"
            return None
        if self._engine._pending is not None:
            self._why = "micro-batches are accumulated"
            return None
        why = "the first step" if self._stamp is None else self._stamp.difference()
        if why is not None:
            if self._stamp is not None:
                self.forget(f"changed since: {why}")
            self._stamp = Stamp(self._engine)
        elif self._shapes:
            self._why = f"every shape of a batch has eager steps first, {len(self._shapes)} were seen"
        shape = self._shapes.get(batch.key)
        if shape is None and len(self._shapes) < _MAX_SHAPES:
            shape = self._shapes[batch.key] = _Shape()
        if shape is None or (
            shape.graph is None and sum(s.graph is not None for s in self._shapes.values()) >= MAX_GRAPHS
        ):
            return None
        return shape

    def _capture(self, shape: _Shape, batch: _Batch, groups: list[dict[str, Any]]) -> None:
        engine, stamp = self._engine, self._stamp
        assert stamp is not None
        reason = refusal(engine)
        if reason is not None:
            raise BackendError(f"graph: {reason}")
        with torch.no_grad():
            inputs = [
                torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t) for t in batch.tensors
            ]
        args, kwargs, target = batch.build(inputs)
        made: list[_Results] = []

        def run() -> None:
            output = engine._run(args, kwargs, target, update=True, capturing=True)
            self.number.add_(1)
            made.append(_Results(output.losses, output.logits, output._hits.scores))

        others = [s.graph for s in self._shapes.values() if s.graph is not None]
        try:
            with self._rates.lent(groups, capturing=True):
                graph = self._device.capture(run, others)
        except Exception as error:
            stamp.restore()
            k, phase = engine._at
            raise BackendError(
                f"graph: block {k} ('{engine.model.blocks[k].name}') could not be captured, at its {phase}: "
                f"{type(error).__name__}: {_first_line(error)}. Nothing was changed. Take "
                "what waits for the device out of the step, or use graph='off'"
            ) from error
        except BaseException:
            stamp.restore()
            raise
        why = stamp.difference()
        if why is not None:
            stamp.restore()
            raise BackendError(
                f"graph: a step replaces what the next one reads ({why}), so a graph would go on reading the old one. Write into "
                "it in place, or use graph='off'"
            )
        shape.graph, shape.inputs, shape.results = graph, inputs, made[0]
        shape.norms = [(o, o.norm) for o in stamp.fused if o.norm is not None]
        self.captures += 1

    def _replay(self, shape: _Shape, tensors: list[Tensor], target: Any) -> StepOutput:
        engine, results = self._engine, shape.results
        assert results is not None and shape.inputs is not None and shape.norms is not None
        with torch.no_grad():
            for own, new in zip(shape.inputs, tensors, strict=True):
                own.copy_(new, non_blocking=True)
            shape.graph.replay()
            flats = [flat.clone() for flat in results.flats]  # the next replay overwrites the graph's own
        for inner, norm in shape.norms:
            inner.norm = norm
        self._next += 1
        self.replays += 1
        assert results.losses is not None
        losses = results.losses.of(flats)
        output = StepOutput(engine.steps, losses, losses, _Hits(target, engine.model.criterion, results.scores, flats))
        output.logits = None if results.logits is None else results.logits.of(flats)
        return output

    def explain(self) -> str:
        graphs = sum(s.graph is not None for s in self._shapes.values())
        text = f"graph: on; {graphs} shapes captured, {self.replays} steps replayed, {self.eager} eager"
        return text if graphs else f"{text} ({self._why})"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0].rstrip(".")
