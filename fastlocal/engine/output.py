"""What a local step returns, at level A (`LocalOutput`) and level B (`StepOutput`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Criterion = Callable[[Tensor, Tensor], Tensor]

# Elements. Larger scores of a head are reduced to a count of hits at once, so that K of them do not pile up; a larger output of
# the backbone is not kept at all, because it would live on while the next step runs.
KEEP_SCORES = 1 << 16
KEEP_LOGITS = 1 << 18


class Hits:
    """Counts correct predictions of each block, when asked and not before: a step that nobody asks launches nothing."""

    def __init__(self, target: Tensor, criterion: Criterion):
        self.target = target
        self.count = getattr(criterion, "correct", count_correct)
        self.scores: list[Tensor | None] = []
        self._result: Tensor | None = None

    @torch.no_grad()
    def add(self, logits: Tensor | None, correct: Tensor | None = None) -> None:
        """A block's class scores, or the number of its hits (int64, 0-dim) where that is there already."""
        if correct is not None:
            self.scores.append(correct)
        elif logits is not None and logits.numel() > KEEP_SCORES:
            self.scores.append(self.count(logits.detach(), self.target))
        else:
            self.scores.append(None if logits is None else logits.detach())

    @torch.no_grad()
    def result(self) -> Tensor:
        """int64 ``[K]``: correct predictions of each block's head, -1 for a head without class scores."""
        if self._result is None:
            none = torch.full((), -1, device=self.target.device)  # filled there: torch.tensor would copy and wait
            counts = [none if s is None else s if s.dim() == 0 else self.count(s, self.target) for s in self.scores]
            self._result = torch.stack(counts)
            self.scores = []
        return self._result


def count_correct(logits: Tensor, target: Tensor) -> Tensor:
    """Number of rows (tokens, pixels) whose largest score is the target's class; int64, 0-dim. No host sync.

    Classes are the last dimension, or dimension 1 where the target has the other ones ([B, V, H, W] with [B, H, W]).
    """
    probabilities = target.dtype.is_floating_point
    images = logits.dim() > 3
    if target.shape == (logits.shape if probabilities else logits.shape[:1] + logits.shape[2:]) and (
        images or (not probabilities and target.shape != logits.shape[:-1])
    ):
        return (logits.argmax(1) == (target.argmax(1) if probabilities else target)).sum()
    return (logits.argmax(-1) == (target.argmax(-1) if probabilities else target)).sum()


def count_targets(target: Tensor, criterion: Criterion) -> Tensor:
    """Number of targets that a mean over ``target`` is taken over: float32, 0-dim, on its device. No host sync.

    The criterion's own ``count(target)`` where it has one; else rows of probabilities, or class indices that are not the
    criterion's ``ignore_index`` (-100).
    """
    own = getattr(criterion, "count", None)
    if own is not None:
        return own(target).to(torch.float32)
    if target.dtype.is_floating_point:  # probabilities, or values: classes are counted once
        classes = target.shape[1 if target.dim() > 3 else -1] if target.dim() > 1 else 1
        return torch.full((), target.numel() / max(1, classes), device=target.device)
    return (target != getattr(criterion, "ignore_index", -100)).sum().to(torch.float32)


class LocalOutput(dict[str, Any]):
    """Result of ``model(x, y)`` in training: attribute and mapping access.

    Keys: ``loss`` (0-dim, the sum of the local losses; its backward delivers the gradients), ``losses`` (``[K]``,
    detached), ``correct`` (int64 ``[K]``, computed at first access; -1 for a head without class scores), and ``logits``
    with ``return_logits=True``. Trainers that convert what a model returns rebuild it as ``type(out)(mapping)``; such a
    copy has the same keys, and ``correct`` only where it had been read before.
    """

    def __init__(self, *values: Any, hits: Hits | None = None, **named: Any):
        super().__init__(*values, **named)
        self._hits = hits

    def __missing__(self, key: str) -> Any:
        if key == "correct" and self._hits is not None:
            self["correct"] = self._hits.result()
            return self["correct"]
        raise KeyError(key)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return self[name]
        except KeyError:
            names = dict.fromkeys([*self, "correct"] if self._hits is not None else self)
            raise AttributeError(f"LocalOutput has no {name!r}; it has {', '.join(names)}") from None


def _flatten(out: LocalOutput) -> tuple[list[Any], Any]:
    return list(out.values()), (tuple(out), out._hits)


def _unflatten(values: Any, context: Any) -> LocalOutput:
    return LocalOutput(zip(context[0], values, strict=True), hits=context[1])


# DistributedDataParallel with static_graph=True finds the loss that it has to watch by flattening the output.
pytree.register_pytree_node(LocalOutput, _flatten, _unflatten, serialized_type_name="fastlocal.LocalOutput")


class StepOutput:
    """Result of ``engine.step``: ``losses`` ``[K]`` and ``correct`` int64 ``[K]`` on the device, and the number of the step.

    ``logits`` are the backbone's own, detached; None where they have more than 2**18 elements, because an output is held while
    the next step runs.

    While a pipeline fills, no step is complete: then ``step`` and ``logits`` are None, the losses NaN, the counts -1.
    """

    def __init__(
        self,
        step: int | None,
        losses: Tensor,
        logits: Tensor | None,
        hits: Hits,
        skipped: Mapping[int, Tensor] | None = None,
    ):
        self.step = step
        self.losses = losses
        self.logits = logits if logits is not None and logits.numel() <= KEEP_LOGITS else None
        self._hits = hits
        self._skipped = skipped

    @property
    def skipped(self) -> Tensor | None:
        """``engine.skipped`` as of this step, float32 ``[K]``, where blocks may be at later steps (a pipeline); else None."""
        counts = self._skipped
        return torch.cat([counts[k] for k in sorted(counts)]) if counts else None

    @classmethod
    def none_yet(cls, blocks: int, target: Tensor, criterion: Criterion) -> StepOutput:
        hits = Hits(target, criterion)
        hits.scores = [None] * blocks
        return cls(None, torch.full((blocks,), math.nan, device=target.device), None, hits)

    @property
    def loss(self) -> Tensor:
        """Sum of the local losses, 0-dim."""
        return self.losses.sum()

    @property
    def correct(self) -> Tensor:
        return self._hits.result()

    def __repr__(self) -> str:
        return f"StepOutput(step={self.step}, losses={self.losses.tolist()})"
