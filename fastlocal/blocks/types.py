"""The three small types that blocks, heads and methods exchange."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn


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
        return cls(
            loss,
            {name: (value.detach(), float(weight)) for name, value, weight in terms},
            None if logits is None else logits.detach(),
            correct,
        )


@dataclass
class StepContext:
    """What every head of one training step may read: targets, the raw input, the task loss, and a cache that lives one step.

    ``cache`` holds what depends on the batch only (label masks, the restored image), so K heads compute it once; use ``once``.
    """

    target: Tensor
    input: Tensor | None
    criterion: Callable[[Tensor, Tensor], Tensor]
    cache: dict[Any, Any] = field(default_factory=dict)

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
    ``make_readout``; a head must not keep it.
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

    @property
    def is_image(self) -> bool:
        """True for a (C, H, W) boundary."""
        return len(self.shape) == 3
