"""`LocalModel`: a backbone cut into gradient-isolated blocks, as an ordinary `nn.Module` (level A)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastlocal.blocks.adapters import Adapter, logits_of
from fastlocal.blocks.batch import BatchFn, Unpacked, check_target, first_tensor, split_call, unpack_batch
from fastlocal.blocks.block import Block, exclusive, outside_autocast, runs_batch_norm
from fastlocal.blocks.cascade import Cascade, Done, Passes, leaf, scaled_down
from fastlocal.blocks.links import Link, fire
from fastlocal.blocks.types import StepContext
from fastlocal.engine.carrier import LossScale, carry
from fastlocal.engine.output import Hits, LocalOutput
from fastlocal.errors import ArgumentError
from fastlocal.methods.base import Method


class LocalModel(nn.Module):
    """A backbone with auxiliary heads, made by `fastlocal.localize`.

    Parameters are named ``backbone.*`` and ``heads.{k}.*``.

    In training, ``model(x, y)`` (or ``model(**batch)`` with labels) runs every block forward, takes its local gradients
    and frees its graph at once, and returns a `LocalOutput`; ``out.loss.backward()`` then delivers those gradients, times
    whatever factor the caller put on the loss. A training call without a target, and every call in eval mode, is the
    plain backbone.

    Attributes:
        backbone: the network that was given, not copied.
        heads: auxiliary heads of blocks 0 to K-2.
        blocks: the K `Block`s.
        method: the recipe.
        links: rules by which weights feed other weights (`fastlocal.blocks.links`).
        window: blocks that a block's loss reaches, its own included.
        summed: whether there is no gradient border, and one backward takes the sum of all losses.
    """

    accepts_loss_kwargs = (
        False  # Hugging Face Trainer: the loss is a mean, divide it by the accumulation steps yourself
    )

    def __init__(
        self,
        backbone: nn.Module,
        heads: list[nn.Module],
        *,
        blocks: list[Block],
        adapter: Adapter,
        method: Method,
        criterion: Callable[[Tensor, Tensor], Tensor],
        num_classes: int,
        batch: BatchFn | None = None,
        links: Sequence[Link] = (),
        passes: Sequence[tuple[_BatchNorm, int]] = (),
        check_targets: bool = True,
        target_dims: int | None = None,
    ):
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleList(heads)
        self.blocks = blocks
        self.method = method
        self.criterion = criterion
        self.num_classes = num_classes
        self.links = list(links)
        self.passes = Passes(list(passes))
        for block in blocks:
            block.links = tuple(link for link in self.links if link.block == block.index)
        self._adapter = adapter
        self._batch = batch
        self._check_targets = check_targets
        self._target_dims = target_dims
        self._scales: dict[str, LossScale] = {}
        # The engine that has steps of this model in flight, which lives as long as they do; None where all blocks are at one step.
        self.in_flight: Any = None

    @property
    def window(self) -> int:
        return min(self.method.window, len(self.blocks))

    @property
    def summed(self) -> bool:
        return not self.method.isolated and len(self.blocks) > 1

    # --- what a step needs -------------------------------------------------------------------------------------------

    def unpack(self, batch: Any) -> Unpacked:
        """``(args, kwargs, target)`` of a batch, by the ``batch`` function given to `localize` or the built-in rules."""
        return self._batch(batch) if self._batch is not None else unpack_batch(batch)

    def context(self, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any, *, fires: bool = True) -> StepContext:
        """What the heads of this step may read. ``fires`` links, so call it before block 0 runs."""
        if fires:
            fire(self.links, "before_forward")
        return StepContext(target=target, input=first_tensor((args, kwargs)), criterion=self.criterion)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], on_block: Callable[[int, Tensor], Tensor]) -> Any:
        """Runs the backbone; ``on_block(k, h)`` gets the output of every block but the last and returns what goes on."""
        return self._adapter.run(self.backbone, args, kwargs, on_block)

    def final_loss(self, output: Any, target: Any) -> Tensor:
        """The last block's loss: the task loss of the backbone's logits, times the method's weight."""
        loss = self.criterion(logits_of(output), target)
        weight = self.method.final_weight
        return loss if weight == 1.0 else loss * weight

    def validate(self, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any, *, read: bool | None = None) -> None:
        """Refuses a bad batch before any block has run. Reads the target's values only where that does not wait for a device."""
        self._refuse_sharded()
        x = first_tensor((args, kwargs))
        if x is None:
            raise ArgumentError("batch: holds no tensor; give (x, y) or a mapping of tensors with 'labels'")
        rows = x.shape[0] if x.dim() else None
        if rows == 0:
            raise ArgumentError("batch: the input holds no rows; leave out empty batches")
        if rows == 1 and (norm := runs_batch_norm([self.backbone, self.heads])):
            raise ArgumentError(
                f"batch: one sample gives {norm} no statistics in training; use at least 2, drop_last=True, or norm.eval()"
            )
        if self._check_targets:
            device_waits = isinstance(target, Tensor) and target.device.type != "cpu"
            read = not device_waits if read is None else read
            check_target(target, self.num_classes, rows, dims=self._target_dims, read=read)

    def _refuse_sharded(self) -> None:
        """FSDP2 gathers and reduces in hooks around the backward of its own modules, which a local step never runs."""
        sharded = any(base.__name__ == "FSDPModule" for m in (self, self.backbone) for base in type(m).__mro__)
        if sharded or any(type(slot.value).__name__ == "DTensor" for block in self.blocks for slot in block.slots):
            raise ArgumentError(
                "model: its parameters are sharded (FSDP2 or DTensor), but local gradients are taken in forward, where nothing reduces "
                "them; use DistributedDataParallel, or leave the model unsharded"
            )

    # --- level A -----------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, return_logits: bool = False, **kwargs: Any) -> Any:
        """See the class. ``return_logits=True`` adds the backbone's logits to the output (detached).

        Raises ArgumentError for a target out of range or of a wrong dtype, an empty batch, or one sample with BatchNorm.
        """
        self._settle()
        if self._batch is not None and (self.training or len(args) + len(kwargs) > 1):
            call: Unpacked | None = self._batch(args[0] if len(args) == 1 and not kwargs else args or kwargs)
        else:
            call = split_call(args, kwargs)
        if self.training and call is not None:
            return self._local_forward(*call, return_logits=return_logits)
        fire(self.links, "before_forward")
        # eval with a target: the backbone gets the input alone, unless it takes the target by name (Hugging Face)
        if call is not None and (self._batch is not None or not _takes(self.backbone, kwargs)):
            args, kwargs = call[0], call[1]
        return self.backbone(*args, **kwargs)

    def _local_forward(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any, *, return_logits: bool
    ) -> LocalOutput:
        self.validate(args, kwargs, target)
        if torch.is_grad_enabled():
            fire(self.links, "before_step")
        ctx = self.context(args, kwargs, target)
        taken = _Taken(self, ctx, self._fp16_scales())
        with self.passes.applied():
            output = self.run(args, kwargs, taken.add)
            loss = self.final_loss(output, target)
        taken.finish(loss, logits := logits_of(output).detach())
        self.passes.count()
        each = torch.stack([value.float() if value.dtype.itemsize < 4 else value for value in taken.losses])
        total = each.sum()
        if taken.summed:
            total = torch.stack([part.float() if part.dtype.itemsize < 4 else part for part in taken.summed]).sum()
        elif taken.params:
            total = carry(total, taken.grads, taken.params)
        extra = {"logits": logits} if return_logits else {}
        return LocalOutput(hits=taken.hits, loss=total, losses=each, **extra)

    def _fp16_scales(self) -> LossScale | None:
        """The block loss scales where gradients are computed in fp16, else None."""
        if not torch.is_grad_enabled():
            return None
        param = next(self.parameters(), None)
        if param is None:
            return None
        kind = param.device.type
        available = torch.amp.is_autocast_available(kind)
        autocast = available and torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
        if not autocast and param.dtype != torch.float16:
            return None
        if self.window > 1 or self.summed:
            raise ArgumentError(
                f"model: fp16 gives each block's loss a scale of its own, but losses of {self.method.name!r} reach several blocks; "
                "use bf16 or float32"
            )
        key = str(param.device)
        if key not in self._scales:
            self._scales[key] = LossScale(len(self.blocks), param.device)
        return self._scales[key]

    @property
    def config(self) -> Any:
        """The backbone's own, for trainers that read it (Hugging Face's); AttributeError where it has none."""
        return self.backbone.config

    # --- steps in flight ---------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Completes the steps that an engine has in flight, so that all blocks are at the same one."""
        engine = self.__dict__.get("in_flight")
        if engine is not None:
            engine._settle()

    def _apply(self, fn: Any, recurse: bool = True) -> LocalModel:
        self._settle()
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> LocalModel:
        if not mode:
            self._settle()
        return super().train(mode)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._settle()
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._settle()
        return super().load_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        return dict(self.__dict__)

    # --- the trained network -----------------------------------------------------------------------------------------

    def export(self, readout: bool = False) -> nn.Module:
        """The plain backbone, trained; its state_dict keys are the ones it came with.

        ``readout=True`` returns the network with the method's own way of predicting; for auxiliary-head methods that is
        the backbone too.
        """
        self._settle()
        fire(self.links, "before_forward")
        return self.backbone

    def backbone_state_dict(self) -> Mapping[str, Tensor]:
        """``export().state_dict()``."""
        return self.export().state_dict()

    def summary(self) -> str:
        """A table: blocks, units, parameters, boundary shapes, saved bytes and multiply-accumulates per image."""
        return summarize(self)

    def explain(self) -> str:
        """How the backbone is cut, and why so."""
        if self._adapter.kind == "slices":
            return f"{len(self.blocks)} blocks as slices: the units are known in order, so every schedule can run them."
        return (
            f"{len(self.blocks)} blocks by hooks on {', '.join(b.name for b in self.blocks[:-1]) or 'nothing'}: the order of units is "
            "known only to the backbone's own forward, so the schedule is sequential. units() and readout() on the network "
            "would let it be sliced."
        )

    def extra_repr(self) -> str:
        return f"method={self.method!r}, blocks={len(self.blocks)}, cut by {self._adapter.kind}"


class _Taken:
    """Losses and gradients of one level A forward, taken block by block with nothing accumulated in the parameters.

    Attributes:
        losses: of every block, detached.
        params, grads: what `carry` delivers.
        summed: the losses with their graphs, where the method has no border; nothing is taken then.
    """

    def __init__(self, model: LocalModel, ctx: StepContext, scales: LossScale | None):
        self.model, self.ctx, self.scales = model, ctx, scales
        self.hits = Hits(ctx.target, model.criterion)
        self.losses: list[Tensor] = []
        self.params: list[nn.Parameter] = []
        self.grads: list[Tensor | None] = []
        self.summed: list[Tensor] = []
        self._cascade = Cascade(model.window) if model.window > 1 else None
        self._x = ctx.input  # of the block that runs

    def add(self, k: int, h: Tensor) -> Tensor:
        """Block k gave ``h``; returns the input of the next."""
        model, ctx = self.model, self.ctx
        block = model.blocks[k]
        if model.summed:
            local = block.local_loss(h, ctx)
            self.summed.append(local.loss)
            after = h
        elif self._cascade is None:
            local, own, found = block.take_gradients(h, ctx, None if self.scales is None else self.scales.scale[k])
            self._collect(k, own, found)
            block.fire("after_backward")
            after = h.detach()
        else:
            local, own, found, alone, shared = block.take_split_gradients(h, ctx)
            self._collect(k, own, found)
            assert self._x is not None
            for done in self._cascade.add(block, self._x, h, alone, shared):
                self._close(done)
            block.fire("after_backward")
            after = self._x = leaf(h)
        self.losses.append(local.loss.detach())
        self.hits.add(local.logits, local.correct)
        if model.method.reads_boundary:
            ctx.boundary = after
        return after

    def finish(self, loss: Tensor, logits: Tensor) -> None:
        """The last block's loss."""
        model, last = self.model, len(self.model.blocks) - 1
        block = model.blocks[last]
        self.losses.append(loss.detach())
        self.hits.add(logits)
        if model.summed:
            self.summed.append(loss)
            for every in model.blocks:
                every.fire("after_backward")
            return
        block.fire("between_forward_and_backward")
        own = [p for p in block.parameters() if p.requires_grad]
        down = self._cascade is not None and self._x is not None and self._x.requires_grad
        inputs = [*own, self._x] if down else own
        if inputs and loss.requires_grad:
            scaled = loss if self.scales is None else loss * self.scales.scale[last]
            with outside_autocast(loss):
                found = exclusive(torch.autograd.grad(scaled, inputs, allow_unused=True))  # type: ignore[arg-type]
                self._collect(last, own, found[: len(own)])
                if self._cascade is not None:
                    for done in self._cascade.finish(
                        scaled_down(found[-1] if down else None, model.method.final_share)
                    ):
                        self._close(done)
        block.fire("after_backward")

    def _close(self, done: Done) -> None:
        params, grads = done.block.take_backward(done.h, done.grad_out)
        self._collect(done.block.index, params, exclusive(grads))

    def _collect(self, k: int, params: list[nn.Parameter], grads: list[Tensor | None]) -> None:
        self.params.extend(params)
        self.grads.extend(grads if self.scales is None else self.scales.unscale(k, grads))


def _takes(net: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether the forward of ``net`` accepts these (at least one) by name."""
    known = inspect.signature(net.forward).parameters
    any_name = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
    return bool(kwargs) and (any_name or all(name in known for name in kwargs))


def summarize(model: LocalModel) -> str:
    rows = [
        ("block", "last unit", "units", "params", "head params", "boundary", "MMAC/img", "head MMAC", "saved KiB/img")
    ]
    for b in model.blocks:
        own = sum(p.numel() for _, p in b.backbone_parameters())
        head = 0 if b.head is None else sum(p.numel() for p in b.head.parameters())
        rows.append(
            (
                str(b.index), b.name, str(len(b.units)), f"{own:,}", f"{head:,}", "x".join(map(str, b.cost.boundary)),
                f"{b.cost.macs / 1e6:.2f}", f"{b.cost.head_macs / 1e6:.2f}", f"{b.cost.saved_bytes / 1024:.1f}",
            )
        )  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(c.ljust(w) if i == 1 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True)))
        for r in rows
    ]
    total = sum(p.numel() for p in model.parameters())
    backbone = sum(p.numel() for p in model.backbone.parameters())
    worst = max(b.cost.saved_bytes for b in model.blocks)
    return "\n".join(
        [
            f"{model.method!r} on {type(model.backbone).__name__}, {len(model.blocks)} blocks, cut by {model._adapter.kind}",
            *lines,
            f"backbone {backbone:,} parameters, heads {total - backbone:,}; largest block saves {worst / 2**20:.2f} MiB per image",
        ]
    )
