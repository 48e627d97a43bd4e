"""The three small types that blocks, heads and methods exchange."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlocal.errors import ArgumentError


class LocalLoss(NamedTuple):
    """What a head returns.

    ``loss`` is 0-dim, backward starts from it. ``terms`` maps a name to (unweighted detached value, weight), and ``loss`` is the
    sum of weight times value. ``logits`` are detached class scores, None for heads without (contrastive). Holding a LocalLoss
    keeps a graph alive only through ``loss``. ``correct``: int64, 0-dim, the number of samples whose class is right, from a head
    that has it without logits.
    """

    loss: Tensor
    terms: dict[str, tuple[Tensor, float]]
    logits: Tensor | None
    correct: Tensor | None = None

    @classmethod
    def of(
        cls, *terms: tuple[str, Tensor, float], logits: Tensor | None = None, correct: Tensor | None = None
    ) -> LocalLoss:
        """The weighted sum of ``(name, value, weight)``; a weight of one costs no multiplication."""
        parts = [value if weight == 1.0 else value * weight for _, value, weight in terms]
        loss = parts[0]
        for part in parts[1:]:
            loss = loss + part
        return cls._made(loss, terms, logits, correct)

    @classmethod
    def of_weighted(
        cls, *terms: tuple[str, Tensor, float], logits: Tensor | None = None, correct: Tensor | None = None
    ) -> LocalLoss:
        """The same sum of values whose own backwards multiply by the weights already (``grad_scale`` of the operators of
        ``fastlocal.ops``): the sum hands its gradient on as it is, which costs no launch.
        """
        weights = [float(weight) for _, _, weight in terms]
        values = [value for _, value, _ in terms]
        loss = values[0] if weights == [1.0] else _WeightedSum.apply(weights, *values)
        return cls._made(loss, terms, logits, correct)

    @classmethod
    def _made(
        cls, loss: Tensor, terms: Sequence[tuple[str, Tensor, float]], logits: Tensor | None, correct: Tensor | None
    ) -> LocalLoss:
        return cls(
            loss,
            {name: (value.detach(), float(weight)) for name, value, weight in terms},
            None if logits is None else logits.detach(),
            correct,
        )


class _WeightedSum(torch.autograd.Function):
    """The sum of weights times values, where the values' own backwards multiply by the weights: two launches and none."""

    @staticmethod
    def forward(ctx: Any, weights: list[float], *values: Tensor) -> Tensor:
        ctx.count = len(values)
        first, *rest = torch._foreach_mul(values, weights)
        for part in rest:
            first += part
        return first

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, *[grads[0]] * ctx.count  # the very tensor: operators know a one by sight


@dataclass
class StepContext:
    """What every head of one training step may read: targets, the raw input, the task loss, and a cache that lives one step.

    ``cache`` holds what depends on the batch only (label masks, the restored image), so K heads compute it once; use ``once``.
    ``boundary`` is the detached input of the block whose head runs (the output of the block before), for methods with
    ``reads_boundary``; None for block 0, whose input is ``input``.
    """

    target: Tensor
    input: Tensor | None
    criterion: Callable[[Tensor, Tensor], Tensor]
    cache: dict[Any, Any] = field(default_factory=dict)
    boundary: Tensor | None = None

    def once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """``compute()`` at the first call with this key in the step, its result at every later one."""
        if key not in self.cache:
            self.cache[key] = compute()
        return self.cache[key]


@dataclass(frozen=True, eq=False)
class Site:
    """Where a head goes: block ``index`` of ``blocks``, which ends with unit number ``unit`` of ``units``.

    ``shape`` is the boundary activation without its batch: (C, H, W), (T, D) or (D,). ``dense``: one target per token.
    ``widths`` has one width per unit where the net declares them. ``net`` is the backbone, for ``make_unit`` and
    ``make_readout``; a head must not keep it. ``unit_names`` are the names of all units.
    """

    index: int
    blocks: int
    unit: int
    units: int
    name: str
    shape: tuple[int, ...]
    input_shape: tuple[int, ...]
    num_classes: int
    dense: bool
    widths: list[int] | None
    net: nn.Module
    first_unit: int
    unit_names: tuple[str, ...] = ()

    @property
    def next_unit(self) -> nn.Module:
        """The first unit of the next block. Raises ArgumentError where the net's units are not modules."""
        name = self.unit_names[self.unit + 1] if self.unit + 1 < len(self.unit_names) else ""
        module = dict(self.net.named_modules()).get(name) if name else None
        if module is None:
            raise ArgumentError(
                f"method: its heads are made like the unit after '{self.name}', but {type(self.net).__name__} has no module "
                f"{name!r} there; give it units() whose names are modules, or other cuts"
            )
        return module

    @property
    def is_image(self) -> bool:
        """True for a (C, H, W) boundary."""
        return len(self.shape) == 3
