"""Where to cut: finds the units of a backbone, measures them, and groups them into blocks of balanced cost."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fastlocal.blocks.adapters import Adapter, HookAdapter, SliceAdapter, logits_of
from fastlocal.blocks.measure import MacCounter, SavedBytes
from fastlocal.errors import PartitionError

UnitFn = Callable[[Any], Any]


@dataclass
class Units:
    """The units of a backbone in order, and how to run them.

    Attributes:
        names: module path of each unit. A cut after unit i lies behind module ``names[i]``.
        fns: the callables of each unit where the backbone can be sliced, else None (hooks).
        shapes: output shape of each unit without the batch.
        costs: multiply-accumulates of each unit on the sample, plus the elements of its output.
        saved: bytes that autograd saves in each unit on the sample.
        output_shape: shape of the logits without the batch.
    """

    names: list[str]
    fns: list[tuple[UnitFn, ...]] | None
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    costs: list[int] = field(default_factory=list)
    saved: list[int] = field(default_factory=list)
    output_shape: tuple[int, ...] = ()

    def adapter(self, cuts: list[int]) -> Adapter:
        """Runs the backbone with a block border after each unit of ``cuts`` (ascending, without the last unit)."""
        if self.fns is None:
            return HookAdapter([self.names[c] for c in cuts])
        slices, start = [], 0
        for end in [*cuts, len(self.fns) - 1]:
            slices.append(tuple(fn for unit in self.fns[start : end + 1] for fn in unit))
            start = end + 1
        return SliceAdapter(slices)


@contextmanager
def undisturbed(net: nn.Module) -> Iterator[None]:
    """Training mode inside; modes, buffers, requires_grad and random state are put back afterwards."""
    modes = {m: m.training for m in net.modules()}
    grads = {p: p.requires_grad for p in net.parameters()}
    buffers = [(m, key, b, _contents(b)) for m in modes for key, b in m._buffers.items()]
    devices = list({p.device for p in net.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            net.train()
            for p in grads:
                if p.is_floating_point():
                    p.requires_grad_(True)
            with torch.enable_grad():
                yield
        finally:
            for p, flag in grads.items():
                p.requires_grad_(flag)
            with torch.no_grad():
                for module, key, buffer, value in buffers:
                    module._buffers[key] = buffer  # a forward may put another tensor in its place
                    if buffer is not None and value is not None:
                        buffer.copy_(value)
            for module, mode in modes.items():
                module.training = mode


def _contents(b: Tensor | None) -> Tensor | None:
    """A copy of a buffer; None where there is nothing to copy, as on a plan's tensors (copies of which take time all the same)."""
    return None if b is None or isinstance(b, FakeTensor) else b.detach().clone()


def find_units(net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: list[str] | None = None) -> Units:
    """Declared units, the children of a Sequential, or the repeated modules of any other network (for hooks).

    ``names``: modules the user wants to cut after; where they are not among the units, the hook adapter takes them.
    """
    units = _declared_units(net) or _sequential_units(net)
    if units is not None and len(args) == 1 and not kwargs and (names is None or all(n in units.names for n in names)):
        return units
    return _hooked_units(net, args, kwargs, names)


def _declared_units(net: nn.Module) -> Units | None:
    if not (callable(getattr(net, "units", None)) and callable(getattr(net, "readout", None))):
        return None
    declared = net.units()  # type: ignore[operator]
    fns: list[tuple[UnitFn, ...]] = [(fn,) for _, fn in declared]
    fns[-1] = (*fns[-1], net.readout)  # type: ignore[arg-type]
    return Units([name for name, _ in declared], fns)


def _sequential_units(net: nn.Module) -> Units | None:
    """A unit starts at each child that has parameters and is no normalisation (or PReLU); what follows it belongs to it."""
    if type(net) is not nn.Sequential or len(net) == 0:
        return None
    joins = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.PReLU)
    pooling = nn.modules.pooling
    opens = (
        pooling._MaxPoolNd, pooling._AvgPoolNd, pooling._AdaptiveAvgPoolNd, pooling._AdaptiveMaxPoolNd, nn.Flatten,
        nn.modules.dropout._DropoutNd,
    )  # fmt: skip
    names: list[str] = []
    fns: list[tuple[UnitFn, ...]] = []
    lead: tuple[UnitFn, ...] = ()
    for name, child in net._modules.items():  # not named_children(), which leaves out a module that stands there twice
        assert child is not None
        if any(True for _ in child.parameters()) and not isinstance(child, joins):
            names.append(name)
            fns.append((*lead, child))
            lead = ()
        elif fns and not isinstance(child, opens):
            names[-1] = name
            fns[-1] = (*fns[-1], *lead, child)
            lead = ()
        else:
            lead = (*lead, child)  # pools and dropout open the next unit, so that a local loss sees the value before
    if not fns:
        return None
    fns[-1] = (*fns[-1], *lead)
    return Units(names, fns)


def _hooked_units(net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: list[str] | None) -> Units:
    modules = dict(net.named_modules())
    if names is not None:
        for name in names:
            if name not in modules or not name:
                near = difflib.get_close_matches(name, [n for n in modules if n], n=3, cutoff=0.4)
                hint = f"; near names: {', '.join(near)}" if near else ""
                raise PartitionError(f"blocks: the backbone has no module '{name}'{hint}")
        if len(set(names)) < len(names):
            raise PartitionError(f"blocks: {list(names)} names a module twice; name each cut once")
        seen = _running_order(net, args, kwargs, names)
        for name in names:
            if seen.count(name) != 1:
                raise PartitionError(
                    f"blocks: module '{name}' runs {seen.count(name)} times in a forward, so a cut after it is not one place; "
                    "cut after a module that runs once"
                )
        if seen != list(names):
            raise PartitionError(f"blocks: {list(names)} is not in the order in which the modules run; that is {seen}")
        return Units([*names, "output"], None)
    candidates: list[str] = []
    for path, module in modules.items():
        parent = modules.get(path.rpartition(".")[0]) if path else None
        repeated = isinstance(parent, nn.ModuleList | nn.Sequential) and len(parent) > 1
        inside = any(path.startswith(c + ".") for c in candidates)
        if repeated and not inside and any(True for _ in module.parameters()) and any(True for _ in module.children()):
            candidates.append(path)
    seen = _running_order(net, args, kwargs, candidates)
    order = [name for name in seen if seen.count(name) == 1]
    if not order:
        raise PartitionError(
            f"net: found no repeated modules to cut {type(net).__name__} at; name the modules, blocks=['layer1', 'layer2'], or give "
            "the network units() and readout()"
        )
    return Units(order, None)


def _running_order(net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: list[str]) -> list[str]:
    """``names`` in the order in which they run in one forward of the sample, once for each time they run."""
    seen: list[str] = []
    handles = [net.get_submodule(n).register_forward_hook(lambda m, i, o, n=n: seen.append(n)) for n in names]
    try:
        with undisturbed(net), torch.no_grad():
            net(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def measure_units(net: nn.Module, units: Units, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """One forward of the sample through all units, in training mode, leaving no trace; fills shapes, costs, saved."""
    everywhere = units.adapter(list(range(len(units.names) - 1)))
    macs: list[int] = []
    saved: list[int] = []
    shapes: list[tuple[int, ...]] = []
    kept: list[Tensor] = []  # keeps the graphs alive, so that saved bytes add up

    known = [*net.parameters(), *net.buffers()]
    with undisturbed(net), MacCounter() as counter, SavedBytes(exclude=known) as bytes_:

        def note(k: int, h: Tensor) -> Tensor:
            macs.append(counter.total)
            saved.append(bytes_.current)
            shapes.append(tuple(h.shape[1:]))
            kept.append(h)
            return h.detach()

        output = everywhere.run(net, args, kwargs, note)
        logits = logits_of(output)
        note(len(units.names) - 1, logits)
    units.output_shape = shapes[-1]
    units.shapes = shapes
    units.saved = [b - a for a, b in zip([0, *saved], saved, strict=False)]
    units.costs = [b - a + _numel(s) for a, b, s in zip([0, *macs], macs, shapes, strict=False)]


def _numel(shape: tuple[int, ...]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n


def balanced_cuts(costs: list[int], blocks: int) -> list[int]:
    """Cuts the units into ``blocks`` runs so that the dearest run is as cheap as can be. Exact and deterministic.

    Returns the index of the last unit of every run but the last.
    """
    n = len(costs)
    if not 1 <= blocks <= n:
        raise PartitionError(f"blocks: {blocks} asked for, but the backbone has {n} units; use 1 to {n}")

    def runs(limit: int) -> list[int]:
        cuts, load = [], 0
        for i, cost in enumerate(costs):
            if load and load + cost > limit:
                cuts.append(i - 1)
                load = 0
            load += cost
        return cuts

    low, high = max(costs), sum(costs)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(runs(middle)) < blocks else (middle + 1, high)
    cuts = runs(low)
    while len(cuts) < blocks - 1:  # fewer runs suffice for the same maximum: split the dearest that can be split
        starts = [0, *(c + 1 for c in cuts)]
        ends = [*cuts, n - 1]
        spans = [(sum(costs[s : e + 1]), -s, s, e) for s, e in zip(starts, ends, strict=True) if e > s]
        _, _, start, end = max(spans)
        half, best, best_at = 0, None, start
        total = sum(costs[start : end + 1])
        for i in range(start, end):
            half += costs[i]
            worst = max(half, total - half)
            if best is None or worst < best:
                best, best_at = worst, i
        cuts = sorted([*cuts, best_at])
    return cuts


def named_cuts(units: Units, names: list[str]) -> list[int]:
    """The unit indices of module names to cut after, checked for existence, order and repetition."""
    cuts = []
    for name in names:
        if name not in units.names:
            near = difflib.get_close_matches(name, units.names, n=3, cutoff=0.4) or units.names[:3]
            raise PartitionError(f"blocks: '{name}' is no unit of the backbone; near names: {', '.join(near)}")
        cuts.append(units.names.index(name))
    if cuts != sorted(set(cuts)):
        order = [units.names[c] for c in sorted(set(cuts))]
        raise PartitionError(
            f"blocks: {list(names)} is not in the order in which the modules run, or names one twice; use {order}"
        )
    if cuts and cuts[-1] == len(units.names) - 1:
        raise PartitionError(f"blocks: '{names[-1]}' is the last unit; the last block ends there anyway, leave it out")
    return cuts
