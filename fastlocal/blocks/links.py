"""Links: rules by which one module's weights feed another's.

A link says in ``when`` at which point of a step it fires:

- ``"before_step"``: before a step begins, outside of a captured graph, so it may count on the host;
- ``"before_forward"``: at the start of every forward;
- ``"between_forward_and_backward"`` of block ``block``: after its head's loss, before any gradient is taken;
- ``"after_backward"`` of block ``block``: after its gradients were taken, before any block that the link reads is updated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import nn

from fastlocal.blocks.block import Slot
from fastlocal.errors import ArgumentError
from fastlocal.ops.ema_update import ema_update_


@dataclass
class CopyLink:
    """A read-only copy of another block's weight, refreshed before it is read (``tied="link"``).

    The owner trains the weight; the copy takes no gradient. Refreshing at the start of the next forward is the same as
    refreshing after the update, because weights are read in forward only, and it needs no word from the optimizer.
    """

    owner: Slot
    copy: Slot

    when: ClassVar[str] = "before_forward"
    block: ClassVar[int] = -1
    private: ClassVar[bool] = True

    @property
    def reads(self) -> tuple[Slot, ...]:
        return (self.owner,)

    @property
    def frozen(self) -> tuple[Slot, ...]:
        return (self.copy,)

    @torch.no_grad()
    def fire(self) -> None:
        self.copy.value.copy_(self.owner.value)


@dataclass
class EMALink:
    """``target = decay * target + (1 - decay) * source`` for the parameters of two modules of one architecture.

    Buffers are left alone. Under ``update="immediate"`` a link that fires after the backward of block k and reads a later
    block sees that block's parameters as they were before this step's update, as every order of updates does.

    Attributes:
        block: the block that it belongs to.
        sources, targets: slots of as many parameters.
        decay: weight of the past, from 0 to 1.
        when: ``"after_backward"`` or ``"between_forward_and_backward"``.
    """

    block: int
    sources: tuple[Slot, ...]
    targets: tuple[Slot, ...]
    decay: float
    when: str = "after_backward"

    private: ClassVar[bool] = True

    @classmethod
    def of(
        cls, block: int, source: nn.Module, target: nn.Module, decay: float, when: str = "after_backward"
    ) -> EMALink:
        """From all parameters of ``source`` to those of ``target``. Raises ArgumentError where they do not match."""
        pairs = [_slots(source), _slots(target)]
        if [(s.name, s.value.shape) for s in pairs[0]] != [(t.name, t.value.shape) for t in pairs[1]]:
            raise ArgumentError(
                f"source: {type(source).__name__} and {type(target).__name__} do not have the same parameters; "
                "a link averages modules of one architecture"
            )
        return cls(block, pairs[0], pairs[1], decay, when)

    @property
    def reads(self) -> tuple[Slot, ...]:
        return (*self.sources, *self.targets)

    @property
    def frozen(self) -> tuple[Slot, ...]:
        return self.targets

    @torch.no_grad()
    def fire(self) -> None:
        if not self.targets:
            return
        averages, sources = [slot.value for slot in self.targets], [slot.value for slot in self.sources]
        if self.when != "between_forward_and_backward":
            ema_update_(averages, sources, self.decay)
            return
        # The official code writes through `.data` here: the backward that follows reads the new weights, unnoticed.
        with torch.autograd._unsafe_preserve_version_counter(tuple(averages)):  # type: ignore[attr-defined]
            ema_update_(averages, sources, self.decay)


class Link(Protocol):
    """What `fastlocal.methods.Method.links` returns. ``frozen``: what it writes, which no optimizer may train.

    A link may also say, for schedules that run blocks side by side, which slots it reads (``reads``; without it, it may
    read any), and that what it writes is read by the block that owns it alone (``private``; without it, by any).
    """

    @property
    def when(self) -> str: ...
    @property
    def block(self) -> int: ...
    @property
    def frozen(self) -> tuple[Slot, ...]: ...
    def fire(self) -> None: ...


def _slots(module: nn.Module) -> tuple[Slot, ...]:
    return tuple(
        Slot(f"{path}.{key}" if path else key, owner, key)
        for path, owner in module.named_modules()
        for key, value in owner._parameters.items()
        if value is not None
    )


def fire(links: Sequence[Link], when: str, block: int | None = None) -> None:
    """Fires the links of this point, of one block or of all."""
    for link in links:
        if link.when == when and (block is None or link.block == block):
            link.fire()
