"""Deterministic measuring tools: kernel launches, saved bytes, live storages, multiply-accumulates, block passes.

They look at what PyTorch dispatches, so they need no GPU and give the same number at every run; on a CUDA device they
count the operators that CUDA tensors dispatch. None of them sees inside a CUDA graph replay, a ``torch.compile``
region, or a kernel launched without an operator around it.

All of them nest in one another in any order (:func:`measure_step` does it), may be entered again, and go on adding up.
"""

from __future__ import annotations

import gc
import weakref
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook, saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from fastlocal.errors import ArgumentError
from fastlocal.ops.bn_act import backward_launches as _bn_act_backward_launches
from fastlocal.ops.bn_act import forward_launches as _bn_act_forward_launches
from fastlocal.ops.bn_act_pool import backward_launches as _pool_backward_launches
from fastlocal.ops.bn_act_pool import forward_launches as _pool_forward_launches
from fastlocal.ops.class_goodness_cross_entropy import triton_backward_launches as _class_goodness_backward_launches
from fastlocal.ops.class_goodness_cross_entropy import triton_launches as _class_goodness_launches
from fastlocal.ops.fused_adamw import triton_launches as _adamw_launches
from fastlocal.ops.fused_sgd import triton_launches as _sgd_launches
from fastlocal.ops.goodness_loss import triton_backward_launches as _goodness_backward_launches
from fastlocal.ops.goodness_loss import triton_launches as _goodness_launches
from fastlocal.ops.norm_linear_cross_entropy import triton_launches as _norm_linear_launches
from fastlocal.ops.pool_linear_cross_entropy import triton_launches as _head_launches
from fastlocal.ops.reconstruction_loss import triton_backward_launches as _reconstruction_backward_launches
from fastlocal.ops.reconstruction_loss import triton_launches as _reconstruction_launches
from fastlocal.ops.similarity_matching_loss import launches as _similarity_launches
from fastlocal.ops.supervised_contrastive_loss import triton_launches as _contrastive_launches

__all__ = [
    "LaunchCounter",
    "register_launches",
    "multi_tensor_launches",
    "SavedBytes",
    "StorageTracker",
    "LiveStorage",
    "MacCounter",
    "count_macs",
    "BlockPasses",
    "StepMeasure",
    "measure_step",
]


_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


class _OpMode(TorchDispatchMode):
    """Runs every operator and shows it to ``_record``; composite ones (seen in inference mode only) by their parts."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = func.namespace != "prim"  # what fake tensors ask of their device is no operator of the dispatcher
        if (
            known
            and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), _COMPOSITE)
            and not self._is_leaf(func)
        ):
            with self:  # ATen's own composition, not func.decompose(), which prefers a Python one with other operators
                return func._op_dk(_COMPOSITE, *args, **kwargs)
        out = func(*args, **kwargs)
        self._record(func, args, kwargs, out)
        return out

    def _is_leaf(self, func: Any) -> bool:
        return False

    @abstractmethod
    def _record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Called after each operator has run."""


def _tensors(*trees: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(trees) if isinstance(leaf, Tensor)]


# ------------------------------------------------------------------------------------------------------------- launches

_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"}
# What neither schema nor tags tell: a view in disguise, and questions about a tensor.
_METADATA = {"_unsafe_view", "_efficientzerotensor", "record_stream", "is_same_size", "_assert_tensor_metadata"}
_METADATA |= {"sym_size", "sym_stride", "sym_numel", "sym_storage_offset", "_has_same_storage_numel"}
_NO_KERNEL = _ALLOCATIONS | _METADATA
_MULTI_TENSOR = ("_foreach_", "_fused_sgd", "_fused_adam", "_fused_adagrad", "_amp_foreach_")
_REDUCTIONS = {"_foreach_norm", "_foreach_max", "_foreach_powsum"}
_registered: dict[str, int | Callable[[tuple[Any, ...], dict[str, Any]], int]] = {
    "fastlocal::bn_act_forward": _bn_act_forward_launches,
    "fastlocal::bn_act_backward": _bn_act_backward_launches,
    "fastlocal::bn_act_backward_": _bn_act_backward_launches,
    "fastlocal::bn_act_pool_forward": _pool_forward_launches,
    "fastlocal::bn_act_pool_backward": _pool_backward_launches,
    "fastlocal::fused_adamw_": _adamw_launches,
    "fastlocal::fused_sgd_": _sgd_launches,
    "fastlocal::class_goodness_cross_entropy": _class_goodness_launches,
    "fastlocal::class_goodness_cross_entropy_backward": _class_goodness_backward_launches,
    "fastlocal::goodness_loss": _goodness_launches,
    "fastlocal::goodness_loss_backward": _goodness_backward_launches,
    "fastlocal::norm_linear_cross_entropy": _norm_linear_launches,
    "fastlocal::pool_linear_cross_entropy": _head_launches,
    "fastlocal::reconstruction_loss": _reconstruction_launches,
    "fastlocal::reconstruction_loss_backward": _reconstruction_backward_launches,
    "fastlocal::similarity_matching_loss": _similarity_launches,
    "fastlocal::supervised_contrastive_loss": _contrastive_launches,
}

# Limits of ATen's multi_tensor_apply, by number of tensor lists (1 to 5). They are those of a 4 KB kernel argument;
# builds for CUDA 13 take seven times as many tensors and blocks per launch, so there these counts are upper bounds.
MAX_TENSORS = (110, 64, 48, 36, 30)
MAX_BLOCKS, CHUNK_ELEMENTS = 320, 65536


def register_launches(op_name: str, launches: int | Callable[[tuple[Any, ...], dict[str, Any]], int]) -> None:
    """Say how many kernels one call of a fused operator launches; an operator nobody registered counts 1.

    The number stands for the fused kernel, whichever backend serves the call, so counts taken on a CPU hold for a GPU.

    Args:
        op_name: ``"namespace::name"``, without the overload.
        launches: the number, or a function of the call's ``(args, kwargs)`` that returns it (see
            :func:`multi_tensor_launches` for operators on lists). A later registration replaces an earlier one.

    Raises:
        ArgumentError: a name without a namespace, or a number below 0.
    """
    if op_name.count("::") != 1 or "." in op_name:
        raise ArgumentError(f'op_name must be "namespace::name" without overload, got {op_name!r}')
    if not callable(launches) and (not isinstance(launches, int) or launches < 0):
        raise ArgumentError(f"launches must be an int of at least 0 or a function of (args, kwargs), got {launches!r}")
    _registered[op_name] = launches


def multi_tensor_launches(numels: Iterable[int], depth: int, max_tensors: int | None = None) -> int:
    """Kernels that ATen's ``multi_tensor_apply`` launches for lists of tensors with these element counts.

    A launch takes at most ``MAX_TENSORS[depth - 1]`` tensors (110, 64, 48, 36, 30 for 1 to 5 lists) and at most 320
    blocks of 65,536 elements; empty tensors are skipped. Where no tensor is large this is ``ceil(tensors / limit)``.

    Args:
        numels: elements of each tensor of one list.
        depth: number of tensor lists that the kernel reads and writes, 1 to 5.
        max_tensors: another limit of tensors per launch.
    """
    if not 1 <= depth <= len(MAX_TENSORS):
        raise ArgumentError(f"depth must be 1 to {len(MAX_TENSORS)} tensor lists, got {depth}")
    limit = max_tensors or MAX_TENSORS[depth - 1]
    launches = tensors = blocks = 0
    for numel in numels:
        chunks = -(-numel // CHUNK_ELEMENTS)
        tensors += chunks > 0
        for chunk in range(chunks):
            last = chunk == chunks - 1
            blocks += 1
            if blocks == MAX_BLOCKS or (last and tensors == limit):
                launches, blocks, tensors = launches + 1, 0, 0 if last else 1
    return launches + (blocks > 0)


def _list_launches(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    given = {a.name: v for a, v in zip(func._schema.arguments, args)} | kwargs
    given.pop("state_steps", None)  # the fused optimizers' step counters travel beside the lists
    lists = [v for v in given.values() if isinstance(v, (list, tuple)) and v and isinstance(v[0], Tensor)]
    if not lists:
        return 0
    reduction = name in _REDUCTIONS
    depth = min(len(lists) + (not name.endswith("_") and not reduction), len(MAX_TENSORS))  # results are a list too
    limit = 96 if depth == 1 and "ScalarList" in func._overloadname else None
    launches = multi_tensor_launches((t.numel() for t in lists[0]), depth, limit)
    return launches + 2 * reduction  # a reduction also clears its partial results and joins them


class LaunchCounter(_OpMode):
    """Counts kernel launches: every dispatched operator that does work, forward, backward and optimizer alike.

    The rule:

    - An operator counts 1. Not counted: views (by schema, so ``detach``, ``alias`` and ``lift_fresh`` too), in-place
      views (``squeeze_``, ``resize_``, ``set_``), ``_unsafe_view``, allocations without a value (``empty`` and its
      kin), questions about metadata, and the ``prim`` and ``profiler`` namespaces.
    - Counted: whatever writes or moves bytes, small as it is. That includes the ``ones_like`` that starts a backward,
      ``add_`` of BN's batch counter, sums of gradients inside the graph, and adding to a ``.grad`` that is there
      already. So a step that begins with ``zero_grad(set_to_none=True)`` counts no accumulation. A device-to-host read
      (``aten::_local_scalar_dense``, that is ``.item()``) counts 1; look it up in ``by_op`` to find host syncs.
    - Multi-tensor operators (``_foreach_*``, ``_fused_*`` optimizers, ``_amp_foreach_*``) count what CUDA's fast path
      launches, whatever the device: see :func:`multi_tensor_launches`, with one list more where the results are new
      tensors. Norms and maxima count 2 more, for clearing the partial results and joining them. The slow path (mixed
      dtypes or layouts) is not modelled.
    - A fused operator counts what :func:`register_launches` says.

    An ATen operator that launches several kernels (a convolution's backward) still counts 1: dispatches are counted.

    Args:
        device: count only operators with a tensor on this device type, e.g. ``"cuda"`` to leave out arithmetic on CPU
            scalars. By default everything counts.

    Attributes:
        total: launches so far.
        by_op: ``Counter`` by operator name without overload, e.g. ``"aten::add_"``.
    """

    def __init__(self, device: str | None = None) -> None:
        super().__init__()
        self.device = device
        self.by_op: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return sum(self.by_op.values())

    def report(self) -> str:
        """A table, most launches first, the total last."""
        rows = [*self.by_op.most_common(), ("total", self.total)]
        return "\n".join(f"{count:>8}  {name}" for name, count in rows)

    def _is_leaf(self, func: Any) -> bool:
        return func._schema.name in _registered

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if self.device and all(t.device.type != self.device for t in _tensors(args, kwargs, out)):
            return
        if launches := _launches(func, args, kwargs):
            self.by_op[func._schema.name] += launches


def _launches(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    qualified = func._schema.name
    if (registered := _registered.get(qualified)) is not None:
        return registered(args, kwargs) if callable(registered) else registered
    namespace, name = qualified.split("::")
    if namespace in ("prim", "profiler"):
        return 0
    if namespace == "aten":
        if func.is_view or torch.Tag.inplace_view in func.tags or name in _NO_KERNEL:
            return 0
        if name.startswith(_MULTI_TENSOR):
            return _list_launches(func, name, args, kwargs)
    return 1


# ---------------------------------------------------------------------------------------------------------- saved bytes


class _Saved:
    """What autograd holds instead of a saved tensor; its death is the release."""

    __slots__ = ("key", "owner", "tensor")

    def __init__(self, owner: SavedBytes, tensor: Tensor) -> None:
        # Detached, because a hook that returns its own argument makes a reference cycle where an output is saved.
        self.tensor = tensor.detach()
        self.owner = owner
        self.key = owner._hold(tensor.untyped_storage())

    def __del__(self) -> None:
        self.owner._release(self.key)


class SavedBytes:
    """Bytes of the distinct storages that autograd's saved tensors hold.

    A storage counts once, whole, however many nodes saved it or however small a view they saved, from the first save to
    the death of the last reference. Counting goes on after the context has closed, for what was saved inside. Not seen:
    tensors kept as plain attributes of an ``autograd.Function`` context, and what runs under saved-tensor hooks of its
    own (``torch.utils.checkpoint``); :class:`StorageTracker` sees those.

    Args:
        exclude: tensors whose storages do not count: parameters and buffers, which live anyway.
        timeline: keep ``current`` after every change.

    Attributes:
        current: bytes held now.
        peak: the most bytes held at any time.
        timeline: every value ``current`` took, or None.
    """

    def __init__(self, exclude: Iterable[Tensor] = (), *, timeline: bool = False) -> None:
        self.current = self.peak = 0
        self.timeline: list[int] | None = [] if timeline else None
        self._excluded = {t.untyped_storage()._cdata: t for t in exclude}  # the tensors too: their addresses stay taken
        self._held: dict[int, list[int]] = {}  # storage -> [references, bytes]
        self._hooks: list[saved_tensors_hooks] = []

    def __enter__(self) -> SavedBytes:
        self._hooks.append(saved_tensors_hooks(partial(_Saved, self), lambda saved: saved.tensor))
        self._hooks[-1].__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._hooks.pop().__exit__(*exc)

    def _hold(self, storage: torch.UntypedStorage) -> int:
        key = storage._cdata
        if key not in self._excluded:
            entry = self._held.setdefault(key, [0, storage.nbytes()])
            entry[0] += 1
            if entry[0] == 1:
                self._change(entry[1])
        return key

    def _release(self, key: int) -> None:
        if (entry := self._held.get(key)) is not None:
            entry[0] -= 1
            if entry[0] == 0:
                self._change(-self._held.pop(key)[1])

    def _change(self, nbytes: int) -> None:
        self.current += nbytes
        self.peak = max(self.peak, self.current)
        if self.timeline is not None:
            self.timeline.append(self.current)


# ------------------------------------------------------------------------------------------------------------- storages


@dataclass(frozen=True)
class LiveStorage:
    """A storage that is alive: its bytes, the operator and shape it was created with, the mark set at that time."""

    nbytes: int
    op: str
    shape: tuple[int, ...]
    mark: str


class StorageTracker(_OpMode):
    """Every storage that an operator created inside the context and that is still alive, whoever holds it.

    Holds weak references only. Counting down goes on after the context has closed. Workspace that an operator takes and
    gives back inside its kernel is not seen, nor is the rounding of the caching allocator.

    Args:
        device: track only this device type, e.g. ``"cuda"``.

    Attributes:
        current: bytes alive now.
        peak: the most bytes alive at any time.
        peaks: the same for the time each mark was set.
    """

    def __init__(self, device: str | None = None) -> None:
        super().__init__()
        self.device = device
        self.current = self.peak = 0
        self.peaks: dict[str, int] = {}
        self._mark = ""
        self._live: dict[int, tuple[weakref.ref[Any], LiveStorage]] = {}

    def mark(self, name: str) -> None:
        """Label what is created from here on, and start ``peaks[name]`` (or go on with it)."""
        self._mark = name
        self._grow(0)

    def alive(self, mark: str | None = None) -> list[LiveStorage]:
        """The storages alive now, largest first; with ``mark``, those created under it."""
        found = [live for _, live in self._live.values() if mark is None or live.mark == mark]
        return sorted(found, key=lambda live: -live.nbytes)

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        fresh = func is torch.ops.aten.lift_fresh.default  # torch.tensor(...): its input was made just now, unseen
        known = set() if fresh else {t.untyped_storage()._cdata for t in _tensors(args, kwargs)}
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            key, nbytes = storage._cdata, storage.nbytes()
            if key in self._live:
                ref, live = self._live[key]
                if live.nbytes != nbytes:  # resized, as an out= argument is
                    self._live[key] = ref, replace(live, nbytes=nbytes)
                    self._grow(nbytes - live.nbytes)
            elif key not in known and self.device in (None, tensor.device.type):
                live = LiveStorage(nbytes, func._schema.name, tuple(tensor.shape), self._mark)
                self._live[key] = weakref.ref(storage, partial(self._free, key)), live
                self._grow(nbytes)

    def _free(self, key: int, _: Any) -> None:
        self.current -= self._live.pop(key)[1].nbytes

    def _grow(self, nbytes: int) -> None:
        self.current += nbytes
        self.peak = max(self.peak, self.current)
        self.peaks[self._mark] = max(self.peaks.get(self._mark, 0), self.current)


# ----------------------------------------------------------------------------------------------------------------- MACs


def _cpu_attention_flops(
    query: Tensor, key: Tensor, value: Tensor, *args: Any, out_val: Any = None, **kwargs: Any
) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _linear_loss_flops(x: Tensor, weight: Tensor, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """Of the logits; the gradients that come with them belong to the backward."""
    return 2 * x.shape[0] * weight.numel()


_MORE_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention_flops,
    torch.ops.fastlocal.pool_linear_cross_entropy: _linear_loss_flops,
}


class MacCounter(_OpMode):
    """Multiply-accumulates of the forward: convolutions (groups included), matrix products, attention.

    Formulas are those of ``torch.utils.flop_counter``, halved; fused operators join by its ``register_flop_formula``.
    Causal attention counts the whole matrix. Whatever runs inside autograd's backward does not count, recomputation
    under checkpointing included, nor does an operator with "backward" in its name.

    Attributes:
        total: multiply-accumulates so far.
        by_op: ``Counter`` by operator name without overload.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_op: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return sum(self.by_op.values())

    def _is_leaf(self, func: Any) -> bool:
        return func.overloadpacket in flop_registry

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        formula: Any = flop_registry.get(func.overloadpacket) or _MORE_FLOPS.get(func.overloadpacket)
        if formula is None or "backward" in func._schema.name or torch._C._current_graph_task_id() != -1:
            return
        self.by_op[func._schema.name] += formula(*args, **kwargs, out_val=out) // 2


def count_macs(fn: Callable[..., Any], *args: Any, per_image: bool = False, **kwargs: Any) -> float:
    """Forward multiply-accumulates of ``fn(*args, **kwargs)``, counted as :class:`MacCounter` says.

    Runs ``fn`` once as it is: in training mode, batch statistics are updated.

    Args:
        per_image: divide by the length of the first tensor among ``args``.

    Raises:
        ArgumentError: ``per_image`` without a tensor of at least one dimension in ``args``.
    """
    images = next((len(a) for a in args if isinstance(a, Tensor) and a.dim()), 0) if per_image else 1
    if not images:
        raise ArgumentError("per_image divides by the batch: pass a non-empty batch tensor as a positional argument")
    with MacCounter() as macs:
        fn(*args, **kwargs)
    return macs.total / images if per_image else macs.total


# --------------------------------------------------------------------------------------------------------- block passes


class BlockPasses:
    """Counts forward and backward passes of modules, called as ``module(...)``.

    A forward counts each call (recomputation too). A backward counts each time the gradient of a call's output is
    there, which is when its backward starts; once per backward for modules with several outputs. The hook sits on the
    outputs, so it changes no graph and allows in-place operators, unlike full backward hooks.

    Args:
        modules: a mapping from name to module, or a sequence of modules (named "0", "1", ...).

    Attributes:
        forward, backward: ``Counter`` by name.
    """

    def __init__(self, modules: Mapping[str, nn.Module] | Sequence[nn.Module]) -> None:
        named = modules if isinstance(modules, Mapping) else {str(i): m for i, m in enumerate(modules)}
        self._modules = dict(named)
        self._hooks: list[Any] = []
        self.forward: Counter[str] = Counter()
        self.backward: Counter[str] = Counter()

    def __enter__(self) -> BlockPasses:
        self._hooks = [m.register_forward_hook(partial(self._seen, name)) for name, m in self._modules.items()]
        return self

    def __exit__(self, *exc: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def _seen(self, name: str, module: nn.Module, args: Any, out: Any) -> None:
        self.forward[name] += 1
        # The base of a view: changing a view in place takes its own node out of the graph.
        views = ((t, t._base if t._is_view() else t) for t in _tensors(out))
        nodes = [base if base is not None and base.grad_fn else t for t, base in views if t.grad_fn]
        if nodes:
            register_multi_grad_hook(nodes, lambda grad: self.backward.update([name]), mode="any")


# ------------------------------------------------------------------------------------------------------------- one step


@dataclass(frozen=True)
class StepMeasure:
    """What one step cost: launches, peak bytes saved for backward, peak bytes of storages created, forward MACs."""

    launches: int
    launches_by_op: dict[str, int]
    saved_peak: int
    storage_peak: int
    macs: int


def measure_step(fn: Callable[[], Any], params: Iterable[Tensor] = (), *, device: str | None = None) -> StepMeasure:
    """Run ``fn()`` once under all tools.

    ``fn`` runs as it is and changes what it changes. Begin from gradients set to None (see :class:`LaunchCounter`), and
    run it once before where the first step allocates optimizer state.

    Args:
        fn: the step, with or without the optimizer.
        params: tensors whose storages are not "saved": parameters and buffers.
        device: as in :class:`LaunchCounter` and :class:`StorageTracker`.
    """
    gc.collect()  # garbage in cycles must not die at a time of its own inside the step
    launches, macs, storages, saved = LaunchCounter(device), MacCounter(), StorageTracker(device), SavedBytes(params)
    with launches, macs, storages, saved:
        fn()
    return StepMeasure(launches.total, dict(launches.by_op), saved.peak, storages.peak, macs.total)
