"""`Block`, the one executable unit: a slice of the backbone with its auxiliary head, its loss and its own backward.

The reference step, the engine and level A run Blocks and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlocal.blocks.types import LocalLoss, StepContext
from fastlocal.ops._seed import ones

BlockFn = Callable[[Any], Any]


class Slot(NamedTuple):
    """Where a parameter or buffer lives. Read live, so that replaced parameters (FSDP, weight swaps) are seen."""

    name: str
    module: nn.Module
    key: str

    @property
    def value(self) -> Tensor:
        module = self.module
        return module._parameters[self.key] if self.key in module._parameters else module._buffers[self.key]  # type: ignore[return-value]


@dataclass
class BlockCost:
    """What one block costs on the sample: per image where the name says so."""

    boundary: tuple[int, ...] = ()
    macs: int = 0
    head_macs: int = 0
    saved_bytes: int = 0


@dataclass
class Block:
    """Consecutive units trained by one local loss.

    Attributes:
        index: position k, 0 to K-1. The last block has no head: the task loss of the backbone's own output trains it.
        name: module path of its last unit, after which it is cut.
        units: names of its units.
        fns: the slice, callables applied in order; None where the backbone is cut by hooks.
        head: module ``(h, StepContext) -> LocalLoss``; None for the last block.
        slots: its trainable parameters in the backbone, found by walking the autograd graph, never assumed.
        buffers: its buffers in the backbone.
        random: whether its forward draws random numbers.
        links: rules that fire at points of this block's part of a step (`fastlocal.blocks.links`).
    """

    index: int
    name: str
    units: tuple[str, ...]
    fns: tuple[BlockFn, ...] | None = None
    head: nn.Module | None = None
    slots: tuple[Slot, ...] = ()
    buffers: tuple[Slot, ...] = ()
    random: bool = False
    cost: BlockCost = field(default_factory=BlockCost)
    links: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        # Found once: walking the head's modules at every step would cost more than its small kernels.
        everything = (
            {id(t) for t in (*self.head.parameters(), *self.head.buffers())} if self.head is not None else set()
        )
        prefix = f"heads.{self.index}."
        self._head_slots = tuple(owned_slots(self.head, everything, prefix)) if self.head is not None else ()
        self._head_buffers = (
            tuple(owned_slots(self.head, everything, prefix, buffers=True)) if self.head is not None else ()
        )

    def __call__(self, x: Any) -> Any:
        """Runs the slice on the boundary activation of the block before."""
        if self.fns is None:
            raise TypeError(
                f"block {self.index} ({self.name}) was cut by hooks and runs only inside the backbone's own forward"
            )
        for fn in self.fns:
            x = fn(x)
        return x

    def backbone_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(slot.name, slot.value) for slot in self.slots]  # type: ignore[misc]

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Backbone and head parameters of this block, under the names they have in `LocalModel`."""
        return [(slot.name, slot.value) for slot in (*self.slots, *self._head_slots)]  # type: ignore[misc]

    def parameter_slots(self) -> tuple[Slot, ...]:
        return (*self.slots, *self._head_slots)

    def parameters(self) -> list[nn.Parameter]:
        return [slot.value for slot in (*self.slots, *self._head_slots)]  # type: ignore[misc]

    def head_parameters(self) -> list[nn.Parameter]:
        return [slot.value for slot in self._head_slots]  # type: ignore[misc]

    def head_slots(self) -> tuple[Slot, ...]:
        """Where the parameters and buffers of its head live."""
        return (*self._head_slots, *self._head_buffers)

    def buffer_slots(self) -> tuple[Slot, ...]:
        return (*self.buffers, *self._head_buffers)

    def all_buffers(self) -> list[Tensor]:
        return [slot.value for slot in self.buffer_slots()]

    def local_loss(self, h: Tensor, ctx: StepContext) -> LocalLoss:
        """The head's loss of ``h``. Not for the last block."""
        if self.head is None:
            raise TypeError(f"block {self.index} ({self.name}) is the last one: its loss is the task loss")
        return self.head(h, ctx)

    def fire(self, when: str) -> None:
        """Fires the links of this point; under ``torch.no_grad()``, where nothing is trained, none."""
        for link in self.links:
            if link.when == when and torch.is_grad_enabled():
                link.fire()

    def local_gradient(
        self,
        h: Tensor,
        ctx: StepContext,
        scale: Tensor | None = None,
        autocast: AbstractContextManager[Any] | None = None,
    ) -> tuple[LocalLoss, Tensor | None]:
        """GradSource: the local loss and its gradient at ``h``; the head's own gradients are accumulated on the way.

        ``h`` is not changed and its graph not touched; the head's graph is gone on return. ``scale`` multiplies the loss
        that backward starts from (fp16). Returns None for the gradient where ``h`` needs none.
        """
        z = h.detach().requires_grad_(h.requires_grad)
        with autocast or nullcontext():
            local = self.local_loss(z, ctx)
        self.fire("between_forward_and_backward")
        start_backward(local.loss, ctx, scale)
        return local, z.grad

    def split_gradients(
        self,
        h: Tensor,
        ctx: StepContext,
        scale: Tensor | None = None,
        autocast: AbstractContextManager[Any] | None = None,
    ) -> tuple[LocalLoss, Tensor | None, Tensor | None]:
        """`local_gradient` in two: of the loss that trains this block alone, and of the one that reaches blocks before it."""
        own, shared = (h.detach().requires_grad_(h.requires_grad) for _ in range(2))
        with autocast or nullcontext():
            local = self._split_loss(own, shared, ctx)
        self.fire("between_forward_and_backward")
        start_backward(local.loss, ctx, scale)
        return local, own.grad, shared.grad

    def _split_loss(self, own: Tensor, shared: Tensor, ctx: StepContext) -> LocalLoss:
        parts = getattr(self.head, "parts", None)
        return self.local_loss(shared, ctx) if parts is None else parts(own, shared, ctx)

    def take_gradients(
        self, h: Tensor, ctx: StepContext, scale: Tensor | None = None
    ) -> tuple[LocalLoss, list[nn.Parameter], list[Tensor | None]]:
        """Local loss, trainable parameters and their gradients, with nothing accumulated anywhere (level A).

        The graphs of head and block are gone on return. Under ``torch.no_grad()`` there are no parameters to report.
        """
        z = h.detach().requires_grad_(h.requires_grad)
        local = self.local_loss(z, ctx)
        self.fire("between_forward_and_backward")
        loss = local.loss if scale is None else local.loss * scale
        if not loss.requires_grad:
            return local, [], []
        head, (grad_out,), grads = self._head_gradients(loss, [z], ctx)
        own, below = self.take_backward(h, grad_out)
        return local, [*own, *head], exclusive([*below, *grads])

    def take_split_gradients(
        self, h: Tensor, ctx: StepContext
    ) -> tuple[LocalLoss, list[nn.Parameter], list[Tensor | None], Tensor | None, Tensor | None]:
        """`split_gradients` with nothing accumulated: the loss, the head's parameters and their gradients, and the two at ``h``."""
        leaves = [h.detach().requires_grad_(h.requires_grad) for _ in range(2)]
        local = self._split_loss(leaves[0], leaves[1], ctx)
        self.fire("between_forward_and_backward")
        if not local.loss.requires_grad:
            return local, [], [], None, None
        head, (own, shared), grads = self._head_gradients(local.loss, leaves, ctx)
        return local, head, exclusive(grads), own, shared

    def _head_gradients(
        self, loss: Tensor, leaves: list[Tensor], ctx: StepContext
    ) -> tuple[list[nn.Parameter], list[Tensor | None], list[Tensor | None]]:
        """The head's trainable parameters, the gradients of ``loss`` at the leaves, and at those parameters."""
        head = [p for p in self.head_parameters() if p.requires_grad]
        inputs = [z for z in leaves if z.requires_grad]
        with outside_autocast(loss):
            grads: list[Tensor | None] = list(
                torch.autograd.grad(loss, [*inputs, *head], _seed(loss, ctx), allow_unused=True)
            )
        return head, grads[: len(inputs)] if inputs else [None for _ in leaves], grads[len(inputs) :]

    def take_backward(self, h: Tensor, grad_out: Tensor | None) -> tuple[list[nn.Parameter], list[Tensor | None]]:
        """`backward` with nothing accumulated: the trainable parameters of the backbone and their gradients."""
        own = [p for _, p in self.backbone_parameters() if p.requires_grad] if h.grad_fn is not None else []
        if not own or grad_out is None:
            return own, [None] * len(own)
        with outside_autocast(h):
            return own, list(torch.autograd.grad(h, own, grad_out, allow_unused=True))

    def backward_into(self, h: Tensor, grad_out: Tensor | None) -> None:
        """`backward` that leaves out the gradient at the block's input, where that is a leaf to which one could go."""
        wanted = [p for _, p in self.backbone_parameters() if p.requires_grad]
        if grad_out is not None and h.grad_fn is not None and wanted:
            torch.autograd.backward(h, grad_out, inputs=wanted)

    @staticmethod
    def backward(h: Tensor, grad_out: Tensor | None) -> None:
        """Runs the block's own backward with a given ``grad_out`` and frees its graph. Every local rule is this."""
        if grad_out is not None and h.requires_grad and h.grad_fn is not None:
            torch.autograd.backward(h, grad_out)


def outside_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """For a backward inside a caller's autocast region, which would cast the float32 products of a backward, too."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def start_backward(loss: Tensor, ctx: StepContext, scale: Tensor | None = None) -> None:
    """``(loss * scale).backward()``, or nothing where ``loss`` needs no gradient.

    The gradient it starts from is one tensor for all blocks of the step, or ``scale`` itself, so no block launches its own.
    """
    if not loss.requires_grad:
        return
    torch.autograd.backward(loss, _seed(loss, ctx) if scale is None else scale.to(loss.dtype).expand_as(loss))


def _seed(loss: Tensor, ctx: StepContext) -> Tensor:
    """The one that backward starts from, which operators know by sight (`fastlocal.ops._seed`)."""
    return ctx.once(("seed", loss.dtype, loss.device, loss.shape), lambda: ones(loss))


def exclusive(grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients that may be changed in place: autograd can return one tensor for two parameters, or an expanded one."""
    seen: set[int] = set()
    result: list[Tensor | None] = []
    for g in grads:
        if g is not None:
            if g.data_ptr() in seen or 0 in g.stride():
                g = g.clone()
            seen.add(g.data_ptr())
        result.append(g)
    return result


def owned_slots(net: nn.Module, wanted: set[int], prefix: str, *, buffers: bool = False) -> list[Slot]:
    """Slots of the tensors whose ``id`` is in ``wanted``, in the order of ``net.named_modules()``, first name only."""
    found, seen = [], set()
    for path, module in net.named_modules():
        table = module._buffers if buffers else module._parameters
        for key, value in table.items():
            if value is not None and id(value) in wanted and id(value) not in seen:
                seen.add(id(value))
                name = f"{path}.{key}" if path else key
                found.append(Slot(prefix + name, module, key))
    return found


def runs_batch_norm(modules: Sequence[nn.Module]) -> str | None:
    """Name of the class of the first BatchNorm in training mode, None if there is none."""
    for root in modules:
        for module in root.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
                return type(module).__name__
    return None
