"""`fastlocal.localize`: cuts a module into gradient-isolated blocks with the heads of a method."""

from __future__ import annotations

import inspect
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastlocal.blocks.adapters import Adapter, HookAdapter, logits_of
from fastlocal.blocks.audit import Audit, audit, random_devices, random_state, same_state, sharing_report
from fastlocal.blocks.batch import TARGET_KEYS, BatchFn, first_tensor, unpack_batch
from fastlocal.blocks.block import Block, BlockCost, Slot, owned_slots, runs_batch_norm
from fastlocal.blocks.links import CopyLink, fire
from fastlocal.blocks.losses import CausalLMLoss, cross_entropy
from fastlocal.blocks.measure import MacCounter, SavedBytes
from fastlocal.blocks.partition import Units, balanced_cuts, find_units, measure_units, named_cuts, undisturbed
from fastlocal.blocks.types import LocalLoss, Site, StepContext
from fastlocal.engine.model import LocalModel
from fastlocal.errors import ArgumentError, IsolationError, PartitionError
from fastlocal.methods import Method, get_method

Tied = Literal["error", "untie", "link"]


def localize(
    net: nn.Module,
    method: str | Method = "auglocal",
    *,
    blocks: int | list[str] | Literal["auto"] | None = None,
    sample: Any,
    criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
    batch: BatchFn | None = None,
    mode: str = "paper",
    tied: Tied = "error",
    num_classes: int | None = None,
    memory_budget: str | float | None = None,
    budget_batch: int | None = None,
    **options: Any,
) -> LocalModel:
    """Cuts ``net`` into blocks and gives each but the last an auxiliary head.

    Args:
        net: any ``nn.Module``; it is wrapped, not copied. A network with ``units()`` and ``readout()``, or an
            ``nn.Sequential``, is cut into slices, any other by hooks at named modules.
        method: name of a method (`fastlocal.list_methods`) or a `Method`.
        blocks: how many (cut where the dearest block is cheapest, by the multiply-accumulates measured on the sample), the
            names of modules to cut after, or ``"auto"``: the fewest whose step is within ``memory_budget`` by
            `fastlocal.plan` (of up to 128 counts none that fits is missed, though memory need not fall with every block
            more; above, steps of an eighth are tried, and after a hit what lies before it). The count is the paper's K:
            AugLocal trains the last d+1 of them together. ``method="bp"`` takes one.
        sample: a small batch (2 rows are enough): the input tensor, or any batch that training will see.
        criterion: the task loss ``(logits, target) -> 0-dim``; default cross-entropy over class indices or probabilities,
            shifted by one token for causal language models.
        batch: ``batch -> (args, kwargs, target)`` where the built-in rules do not fit.
        mode: ``"paper"``, or ``"official"`` to follow the official code where it differs.
        tied: what to do with a weight that two blocks use: ``"error"``; ``"untie"`` gives each block its own copy;
            ``"link"`` lets the last of them train it and the others read a copy that is refreshed every step.
        num_classes: where the size of the logits is not the number of classes.
        memory_budget: bytes or ``"4GiB"``, with ``blocks="auto"``: for the peak of a whole `Engine` step with
            ``budget_batch`` rows (default: the rows of the sample) in float32 with SGD and momentum, so parameters, buffers,
            one optimizer moment, the batch, and the largest block's saved tensors, gradients and workspace. For another
            optimizer or precision take the number of blocks from `fastlocal.plan`, which is told of both. What the
            allocator and library kernels take on top is not in it.
        options: the method's own.

    Returns:
        A `LocalModel`. Nothing is changed in ``net`` besides what ``tied`` asks for.

    Raises:
        ArgumentError: an argument, option or method that does not exist or does not fit.
        PartitionError: more blocks than units, or a cut that is no place (unknown, repeated or conditional module).
        IsolationError: a skip connection that jumps a cut, or tied weights across one.
    """
    if not isinstance(net, nn.Module):
        raise ArgumentError(f"net: expected an nn.Module, got {type(net).__name__}")
    if isinstance(net, LocalModel):
        raise ArgumentError("net: is a LocalModel already; pass its .export() to cut it anew")
    if getattr(net.forward, "__func__", None) is nn.Module.forward:
        raise ArgumentError(
            f"net: {type(net).__name__} has no forward; give nn.Sequential(*blocks, classifier), or a module with one"
        )
    if tied not in ("error", "untie", "link"):
        raise ArgumentError(f"tied: got {tied!r}; valid are 'error', 'untie', 'link'")
    builder = prepare(
        net,
        method,
        sample=sample,
        criterion=criterion,
        batch=batch,
        mode=mode,
        tied=tied,
        num_classes=num_classes,
        **options,
    )
    recipe = builder.method
    if blocks is None:
        if recipe.name != "bp":
            raise ArgumentError(
                "blocks: say how many blocks, which modules to cut after, or 'auto' with memory_budget="
            )
        blocks = 1
    if recipe.name == "bp" and blocks != 1:
        raise ArgumentError(
            f"blocks: method 'bp' is end-to-end backprop in one block, got {blocks!r}; use blocks=1 or another method"
        )
    if blocks == "auto":
        if memory_budget is None:
            raise ArgumentError("memory_budget: blocks='auto' needs it, such as memory_budget='4GiB'")
        if budget_batch is not None and (not isinstance(budget_batch, int) or budget_batch < 1):
            raise ArgumentError(f"budget_batch: expected a number of rows of at least 1, got {budget_batch!r}")
        return builder.within(parse_bytes(memory_budget), budget_batch)
    for name, value in (("memory_budget", memory_budget), ("budget_batch", budget_batch)):
        if value is not None:
            raise ArgumentError(f"{name}: is used with blocks='auto' only, got blocks={blocks!r}")
    return builder.build(blocks)


def prepare(
    net: nn.Module,
    method: str | Method,
    *,
    sample: Any,
    criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
    batch: BatchFn | None = None,
    mode: str = "paper",
    tied: Tied = "error",
    num_classes: int | None = None,
    **options: Any,
) -> _Builder:
    """What `localize` builds with, its arguments checked."""
    recipe = _method(method, mode, options)
    args, kwargs, target = _sample_call(sample, batch, net)
    _check_sample(net, args, kwargs)
    task = criterion or default_criterion(net)
    return _Builder(net, recipe, args, kwargs, target, task, batch, tied, num_classes, criterion is None)


def _warn_of_untrained(net: nn.Module, blocks: list[Block]) -> None:
    owned = {id(slot.value) for block in blocks for slot in block.slots}
    left = [name for name, p in net.named_parameters() if p.requires_grad and id(p) not in owned]
    if left:
        shown = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
        warnings.warn(
            f"net: no local loss reaches {shown} ({len(left)} in all), so they stay as they are. Either the forward does not use "
            "them, or no gradient passes, as in checkpoint(..., use_reentrant=True), whose input is a block's detached one: "
            "pass use_reentrant=False, or freeze them with requires_grad_(False)",
            UserWarning,
            stacklevel=5,
        )


def parse_bytes(text: str | float) -> int:
    """``"4GiB"``, ``"500 MB"`` or a number of bytes."""
    if isinstance(text, int | float) and not isinstance(text, bool) and math.isfinite(text) and text > 0:
        return int(text)
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([KMGT]i?B|B)?\s*", text) if isinstance(text, str) else None
    if not match:
        raise ArgumentError(f"memory_budget: cannot read {text!r}; write bytes, '500MB' or '4GiB'")
    unit = match.group(2) or "B"
    power = "BKMGT".index(unit[0])
    return int(float(match.group(1)) * (1024 if "i" in unit else 1000) ** power)


def _method(method: str | Method, mode: str, options: dict[str, Any]) -> Method:
    if isinstance(method, Method):
        if options:
            raise ArgumentError(f"{next(iter(options))}: give options to the Method itself, or name it by a string")
        return method
    if not isinstance(method, str):
        raise ArgumentError(f"method: expected a name or a Method, got {type(method).__name__}")
    return get_method(method)(mode=mode, **options)


def _sample_call(
    sample: Any, batch: BatchFn | None, net: nn.Module
) -> tuple[tuple[Any, ...], dict[str, Any], Tensor | None]:
    """The sample as a call of the backbone, on its device, and its target if it has one."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Any = None
    if isinstance(sample, Tensor):
        args, kwargs = (sample,), {}
    elif batch is not None:
        args, kwargs, target = batch(sample)
    elif isinstance(sample, Mapping) and not any(k in sample for k in (*TARGET_KEYS, "input_ids")):
        args, kwargs = (), dict(sample)
    else:
        args, kwargs, target = unpack_batch(sample)
    param = next(net.parameters(), None)
    if param is None:
        raise ArgumentError(f"net: {type(net).__name__} has no parameters to train")

    def move(value: Any) -> Any:
        return value.to(param.device) if isinstance(value, Tensor) else value

    found = move(target) if isinstance(target, Tensor) else None
    return tuple(move(a) for a in args), {k: move(v) for k, v in kwargs.items()}, found


def _check_sample(net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    x = first_tensor((args, kwargs))
    if x is None or x.dim() == 0:
        raise ArgumentError("sample: holds no batch; give a small one, such as x[:2]")
    if x.shape[0] < 2:
        with undisturbed(net):
            norm = runs_batch_norm([net])
        if norm or x.shape[0] == 0:
            raise ArgumentError(
                f"sample: {x.shape[0]} row(s) give {norm or 'the audit'} no statistics; give at least 2, such as x[:2]"
            )


class _Builder:
    """Measures once, then builds as many partitions as asked."""

    def __init__(
        self,
        net: nn.Module,
        method: Method,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        target: Tensor | None,
        criterion: Callable[[Tensor, Tensor], Tensor],
        batch: BatchFn | None,
        tied: Tied,
        num_classes: int | None,
        check_targets: bool,
    ):
        self.net, self.method, self.args, self.kwargs = net, method, args, kwargs
        self.criterion, self.batch, self.tied, self.num_classes = criterion, batch, tied, num_classes
        self.check_targets, self.target = check_targets, target

    def build(self, blocks: int | list[str]) -> LocalModel:
        if isinstance(blocks, bool) or not isinstance(blocks, int | list | tuple):
            raise ArgumentError(f"blocks: expected an int, a list of module names or 'auto', got {blocks!r}")
        names = list(blocks) if not isinstance(blocks, int) else None
        if names is not None and not all(isinstance(n, str) for n in names):
            raise ArgumentError(f"blocks: the list names modules to cut after, got {blocks!r}")
        with self._atomic():
            if blocks == 1 or names == []:
                units = Units(["output"], None)
                measure_units(self.net, units, self.args, self.kwargs)
            else:
                units = self.units(names)
            return self._assemble(units, self._cuts(units, blocks, names))

    def units(self, names: list[str] | None = None) -> Units:
        units = find_units(self.net, self.args, self.kwargs, names)
        measure_units(self.net, units, self.args, self.kwargs)
        return units

    def trial(self, units: Units, blocks: int) -> LocalModel:
        """``blocks`` blocks of measured units, their costs not measured; one is BP, whatever the method."""
        if blocks > 1:
            return self._assemble(units, self._cuts(units, blocks, None), measure=False)
        whole = Units(["output"], None, [units.output_shape], output_shape=units.output_shape)
        recipe, self.method = self.method, get_method("bp")()
        try:
            return self._assemble(whole, [], measure=False)
        finally:
            self.method = recipe

    @contextmanager
    def _atomic(self) -> Iterator[None]:
        """After an exception, the network's parameters and the random state are what they were."""
        before = [(slot, slot.value) for slot in _all_slots(self.net)]
        state = torch.get_rng_state()  # heads are drawn on the CPU
        try:
            yield
        except BaseException:
            _put_back(before)
            torch.set_rng_state(state)
            raise

    def _cuts(self, units: Units, blocks: int | list[str], names: list[str] | None) -> list[int]:
        count = len(units.names)
        if names is not None:
            return named_cuts(units, names)  # taken as they are: the last block is the tail
        assert isinstance(blocks, int)
        if not 1 <= blocks <= count:
            raise PartitionError(
                f"blocks: {blocks} asked for, but {type(self.net).__name__} has {count} units; use 1 to {count}"
            )
        final = self.method.prepare(blocks, count)
        prescribed = self.method.cuts(final, units.names, self.net)
        if prescribed is not None:
            return prescribed
        cuts = list(range(count - 1)) if blocks == count else balanced_cuts(units.costs, blocks)
        return cuts[: final - 1]  # blocks trained together at the end become the last one

    def _assemble(self, units: Units, cuts: list[int], measure: bool = True) -> LocalModel:
        ends = [*cuts, len(units.names) - 1]
        starts = [0, *(c + 1 for c in cuts)]
        names = [units.names[e] for e in ends]
        adapter = units.adapter(cuts) if len(ends) > 1 else HookAdapter([])
        found, links = self._isolate(adapter, names)
        if not found.parameters[-1]:
            raise PartitionError(
                f"blocks: '{names[-2]}' is the last module with parameters, so nothing is left to train after it; leave it out"
                if len(names) > 1
                else "net: its output depends on no parameter, so nothing can be trained"
            )
        sites = self._sites(units, starts, ends, found)
        self.method.resolve(sites)
        like = next(self.net.parameters())
        made = [self.method.head(site) for site in sites]
        heads = [_as_backbone(_checked_head(head, self.method), like) for head in made]
        made_links = [*links, *self.method.links(sites, heads)]
        own = _owned(self.net, found.parameters)
        ran = [{id(b) for m in modules for b in m._buffers.values() if b is not None} for modules in found.modules]
        buffers = _owned(self.net, ran, buffers=True)
        blocks = [
            Block(
                index=k,
                name=names[k],
                units=tuple(units.names[start : end + 1]),
                fns=adapter.slices[k] if not isinstance(adapter, HookAdapter) else None,
                head=heads[k] if k < len(heads) else None,
                slots=own[k],
                buffers=buffers[k],
                random=found.random[k] or _has_dropout(heads[k] if k < len(heads) else None),
            )
            for k, (start, end) in enumerate(zip(starts, ends, strict=True))
        ]
        model = LocalModel(
            self.net,
            heads,
            blocks=blocks,
            adapter=adapter,
            method=self.method,
            criterion=self.criterion,
            num_classes=self._classes(units),
            batch=self.batch,
            links=made_links,
            passes=self._passes(units, blocks, starts, found),
            check_targets=self.check_targets,
            target_dims=len(units.output_shape) if len(units.output_shape) in (1, 2) else None,
        )
        if measure:
            _warn_of_untrained(self.net, blocks)
            x = first_tensor((self.args, self.kwargs))
            assert x is not None
            target, criterion = self.task(units)
            ctx = StepContext(target=target, input=x, criterion=criterion)
            _measure_blocks(model, self.args, self.kwargs, ctx, x.shape[0])
        else:
            for block, end in zip(model.blocks, ends, strict=True):
                block.cost = BlockCost(units.shapes[end], macs=0, head_macs=0, saved_bytes=0)
        return model

    def task(self, units: Units) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]:
        """A target for the sample and a loss that takes it."""
        if self.target is not None:
            return self.target, self.criterion
        x = first_tensor((self.args, self.kwargs))
        assert x is not None
        classes_first = len(units.output_shape) > 2  # [B, V, H, W], as in torch
        positions = units.output_shape[1:] if classes_first else units.output_shape[:-1]
        target = torch.zeros((x.shape[0], *positions), dtype=torch.int64, device=x.device)
        # which targets a loss of the caller's would take is not known
        return target, self.criterion if self.check_targets else _any_loss

    def _classes(self, units: Units) -> int:
        if self.num_classes is not None:
            return self.num_classes
        if not units.output_shape:
            raise ArgumentError(
                "num_classes: the backbone's output has no class dimension; give num_classes and a criterion"
            )
        return units.output_shape[0 if len(units.output_shape) > 2 else -1]  # [B, V, H, W], as in torch

    def _sites(self, units: Units, starts: list[int], ends: list[int], found: Audit) -> list[Site]:
        x = first_tensor((self.args, self.kwargs))
        assert x is not None
        widths = getattr(self.net, "widths", None)
        return [
            Site(
                index=k,
                blocks=len(ends),
                unit=ends[k],
                units=len(units.names),
                name=units.names[ends[k]],
                shape=found.shapes[k],
                input_shape=tuple(x.shape[1:]),
                num_classes=self._classes(units),
                dense=len(units.output_shape) > 1,
                widths=list(widths) if widths is not None and len(widths) == len(units.names) else None,
                net=self.net,
                first_unit=starts[k],
                unit_names=tuple(units.names),
            )
            for k in range(len(ends) - 1)
        ]

    def _passes(
        self, units: Units, blocks: list[Block], starts: list[int], found: Audit
    ) -> list[tuple[_BatchNorm, int]]:
        """BatchNorms that the published algorithm runs several times in a step, and how often."""
        if self.method.window == 1 or len(blocks) == 1:
            return []
        if any(block.fns is None for block in blocks):
            raise ArgumentError(
                f"method: losses of {self.method.name!r} reach over several blocks, which needs a network that can be sliced; give "
                f"{type(self.net).__name__} units() and readout()"
            )
        modules = dict(self.net.named_modules())
        unit_of = {id(m): i for i, name in enumerate(units.names) if name in modules for m in modules[name].modules()}
        many = []
        for k, ran in enumerate(found.modules):
            for module in dict.fromkeys(ran):
                if isinstance(module, _BatchNorm) and module.track_running_stats:
                    passes = self.method.passes(k, len(blocks), unit_of.get(id(module), starts[k]))
                    if passes > 1:
                        many.append((module, passes))
        return many

    def _isolate(self, adapter: Adapter, names: list[str]) -> tuple[Audit, list[CopyLink]]:
        """The audit, after untying what ``tied`` allows."""
        found = audit(self.net, adapter, names, self.args, self.kwargs)
        if not found.shared:
            return found, []
        report = sharing_report(self.net, found.shared)
        if self.tied == "error":
            raise IsolationError(
                f"tied: parameters are used on both sides of a cut: {report}; use tied='untie' (each block its own copy), "
                "tied='link' (the last trains it, the others read a copy), or other cuts"
            )
        links = _split_tied(self.net, found, link=self.tied == "link")
        again = audit(self.net, adapter, names, self.args, self.kwargs)
        if again.shared:
            raise IsolationError(
                f"tied: {sharing_report(self.net, again.shared)} is used by two blocks through one module, so it cannot be split "
                f"by tied={self.tied!r}; give the second use a parameter of its own, or cut elsewhere"
            )
        frozen = {id(link.copy.value) for link in links}
        again.parameters = [ids - frozen for ids in again.parameters]
        return again, links

    def within(self, budget: int, rows: int | None) -> LocalModel:
        """The fewest blocks whose planned step fits the budget; nothing of the trials is left in the network."""
        from fastlocal.engine.plan import fewest_blocks  # which stands on this module

        blocks = fewest_blocks(self, budget, rows)
        if blocks > 1:
            return self.build(blocks)
        self.method = get_method("bp")()
        return self.build(1)


def _all_slots(net: nn.Module) -> list[Slot]:
    return [
        Slot(f"{path}.{key}", module, key)
        for path, module in net.named_modules()
        for key, value in module._parameters.items()
        if value is not None
    ]


def _owned(net: nn.Module, wanted: list[set[int]], *, buffers: bool = False) -> list[tuple[Slot, ...]]:
    """`owned_slots` of every block, in one walk over the network."""
    blocks_of: dict[int, list[int]] = {}
    for k, ids in enumerate(wanted):
        for i in ids:
            blocks_of.setdefault(i, []).append(k)
    found: list[list[Slot]] = [[] for _ in wanted]
    for slot in owned_slots(net, set(blocks_of), "backbone.", buffers=buffers):
        for k in blocks_of[id(slot.value)]:
            found[k].append(slot)
    return [tuple(slots) for slots in found]


def _put_back(slots: list[tuple[Slot, Tensor]]) -> None:
    for slot, value in slots:
        slot.module._parameters[slot.key] = value  # type: ignore[assignment]


def _split_tied(net: nn.Module, found: Audit, *, link: bool) -> list[CopyLink]:
    """Gives every module but the last that holds a shared parameter a parameter of its own."""
    links = []
    for shared in found.shared:
        holders = [slot for slot in _all_slots(net) if id(slot.value) == shared]
        if len(holders) < 2:
            continue  # one module, used twice: the second audit will say so
        used_in = {id(m): k for k, modules in enumerate(found.modules) for m in modules}
        holders.sort(key=lambda slot: used_in.get(id(slot.module), -1))
        owner = holders[-1]
        for slot in holders[:-1]:
            if used_in.get(id(slot.module), -1) == used_in.get(id(owner.module), -2):
                continue  # both in the owner's block: stays tied
            copy = nn.Parameter(owner.value.detach().clone(), requires_grad=not link and owner.value.requires_grad)
            slot.module._parameters[slot.key] = copy
            if link:
                links.append(CopyLink(owner, slot))
    return links


def _checked_head(head: Any, method: Method) -> nn.Module:
    """What somebody's own method returns, if the blocks can use it."""
    if not isinstance(head, nn.Module):
        raise ArgumentError(f"method: head() of {method.name!r} returned {type(head).__name__}; return an nn.Module")
    try:
        inspect.signature(head.forward).bind("h", "ctx")
    except TypeError:
        raise ArgumentError(
            f"method: the head of {method.name!r}, {type(head).__name__}, does not take (h, ctx); a plain classifier becomes a head as "
            "fastlocal.blocks.heads.ClassifierHead(classifier)"
        ) from None
    return head


def _as_backbone(head: nn.Module, like: Tensor) -> nn.Module:
    """On the device and in the dtype of the backbone; parameters that are so already stay (fake ones cannot be swapped)."""
    if any(p.device != like.device or p.dtype != like.dtype for p in head.parameters()):
        return head.to(device=like.device, dtype=like.dtype)
    for module in head.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                dtype = like.dtype if buffer.is_floating_point() else buffer.dtype
                module._buffers[key] = buffer.to(device=like.device, dtype=dtype)
    return head


def _has_dropout(module: nn.Module | None) -> bool:
    return module is not None and any(
        isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in module.modules()
    )


def _any_loss(logits: Tensor, target: Tensor) -> Tensor:
    return logits.float().square().mean()


def _measure_blocks(
    model: LocalModel, args: tuple[Any, ...], kwargs: dict[str, Any], ctx: StepContext, rows: int
) -> None:
    """Runs every block with its head once on the sample and notes what it costs, leaving no trace."""
    known = [*model.parameters(), *model.buffers()]
    with undisturbed(model), MacCounter() as macs, SavedBytes(exclude=known) as saved:
        for link in model.links:
            for slot in link.frozen:
                slot.value.requires_grad_(False)  # as in training; put back with the rest
        mark = 0
        devices = random_devices(model)

        def note(k: int, h: Tensor, loss: Any = None) -> Tensor:
            nonlocal mark
            block = model.blocks[k]
            own = macs.total
            if block.head is not None:
                before = random_state(devices)
                loss = block.local_loss(h.detach().requires_grad_(), ctx)
                if not isinstance(loss, LocalLoss):
                    raise ArgumentError(
                        f"method: the head of {model.method.name!r} returned {type(loss).__name__}; return "
                        "LocalLoss.of(('task', loss, 1.0))"
                    )
                block.random = block.random or not same_state(before, random_state(devices))
            block.cost = BlockCost(
                boundary=tuple(h.shape[1:]),
                macs=(own - mark) // rows,
                head_macs=(macs.total - own) // rows,
                saved_bytes=saved.current // rows,  # h is detached and nothing else holds the blocks before
            )
            del loss
            mark = macs.total
            h = h.detach()
            if model.method.reads_boundary:
                ctx.boundary = h
            return h

        fire(model.links, "before_forward")
        output = model.run(args, kwargs, note)
        logits = logits_of(output)
        note(len(model.blocks) - 1, logits, ctx.criterion(logits, ctx.target))


def default_criterion(net: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """Cross-entropy, of the next token for causal language models (own, or by the class name Hugging Face gives them)."""
    causal = getattr(net, "causal", False) is True or type(net).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    return CausalLMLoss() if causal else cross_entropy
