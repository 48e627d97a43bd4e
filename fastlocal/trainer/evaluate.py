"""What a trained model is worth: every block's loss and accuracy in one pass, early exits; and BatchNorm recalibration."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple
from warnings import warn

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastlocal.blocks.adapters import logits_of
from fastlocal.blocks.batch import Unpacked
from fastlocal.blocks.links import fire
from fastlocal.blocks.losses import class_indices, full_precision
from fastlocal.blocks.types import StepContext
from fastlocal.data import Batches
from fastlocal.engine.engine import PRECISIONS
from fastlocal.engine.model import LocalModel
from fastlocal.engine.output import Hits, count_targets
from fastlocal.errors import ArgumentError

_BatchNorm = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found, block by block; the last entry is the backbone's own output.

    Attributes:
        count: targets that the means are over.
        losses: ``[K]``, each head's local loss, and the criterion of the backbone's output.
        accuracies: ``[K]``, 0 to 1; None for a head without class scores.
    """

    count: int
    losses: list[float]
    accuracies: list[float | None]

    @property
    def loss(self) -> float:
        """Of the last block."""
        return self.losses[-1]

    @property
    def accuracy(self) -> float | None:
        """Of the last block."""
        return self.accuracies[-1]

    def to_row(self, prefix: str = "val") -> dict[str, float]:
        """``val_loss, val_accuracy, val_loss_0, val_accuracy_0, ...`` for a log; accuracies that are None are left out."""
        row: dict[str, float | None] = {"loss": self.loss, "accuracy": self.accuracy}
        for k, (loss, accuracy) in enumerate(zip(self.losses, self.accuracies, strict=True)):
            row |= {f"loss_{k}": loss, f"accuracy_{k}": accuracy}
        start = prefix and prefix.rstrip("_") + "_"
        return {start + name: value for name, value in row.items() if value is not None}


def evaluate(
    model: LocalModel,
    source: Any,
    *,
    precision: str = "32-true",
    channels_last: bool = False,
    limit: int | None = None,
) -> Evaluation:
    """Loss and accuracy of every block in one pass over the data, in eval mode and without gradients.

    Head k is measured on the output of block k, the last block by the backbone's own output. Losses are means over
    targets: a smaller last batch counts by its true number, and what the criterion ignores does not count. A loss that
    compares the samples of a batch (similarity, contrastive) depends on how the data is cut into batches. Losses that
    are not finite are reported as they are. Nothing waits for the device before the end.

    The model is left as it was: modes (frozen norms too), buffers, gradients. Random states as well. Only copies of
    linked weights (``tied="link"``) are refreshed, as by every forward.

    Args:
        source: an object with ``epoch(number)``, of which epoch 0 is taken, or a re-iterable of batches, in any form that the
            model trains on. They are moved to the model's device.
        precision: as in `fastlocal.Engine`.
        channels_last: convert 4-D inputs.
        limit: most batches to read.

    Raises:
        ArgumentError: no batch, no target that counts, a bad batch, or a source that can be read only once.
    """
    device, autocast = _check(model, precision)
    wide = torch.float64 if device.type != "mps" else torch.float32
    sums = torch.zeros(len(model.blocks), dtype=wide, device=device)
    right = torch.zeros(len(model.blocks), dtype=torch.int64, device=device)
    total = torch.zeros((), dtype=wide, device=device)
    with _put_back(model, training=False):
        for args, kwargs, target in _read(model, source, channels_last, limit):
            losses: list[Tensor] = []
            hits = Hits(target, model.criterion)

            def measure(
                k: int, h: Tensor, ctx: StepContext, losses: list[Tensor] = losses, hits: Hits = hits
            ) -> Tensor:
                local = model.blocks[k].local_loss(h, ctx)
                losses.append(local.loss.to(wide))
                hits.add(_scores(model, local.logits, ctx.target))
                return h

            with torch.no_grad(), autocast():
                output = _run(model, args, kwargs, target, measure)
                logits = logits_of(output)
                losses.append(model.criterion(logits, target).to(wide))
            hits.add(_scores(model, logits, target))
            count = count_targets(target, model.criterion).to(wide)
            # the mean over no target is NaN, and says nothing
            sums += torch.where(count > 0, torch.stack(losses) * count, 0.0)
            right += hits.result()
            total += count
    targets = round(total.item())
    if targets == 0:
        raise ArgumentError("source: holds no target that counts, all are ignored; look at the labels")
    return Evaluation(
        targets, [s / targets for s in sums.tolist()], [None if r < 0 else r / targets for r in right.tolist()]
    )


# --- early exit ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def accuracy(model: nn.Module, batches: Batches, dtype: torch.dtype | None = None) -> float:
    """Fraction of samples that ``model`` in eval mode classifies rightly; its mode is put back.

    Args:
        dtype: of autocast, or None for the model's own.
    """
    training = model.training
    model.eval()
    try:
        right = torch.zeros((), dtype=torch.int64, device=batches.y.device)
        with torch.autocast(batches.x.device.type, dtype) if dtype is not None else nullcontext():
            for x, y in batches.epoch(0):
                right += (model(x).argmax(1) == y).sum()
    finally:
        model.train(training)
    return right.item() / len(batches.y)


@dataclass(frozen=True)
class EarlyExit:
    """A network that lets a sample leave at the first block whose confidence reaches ``threshold``.

    Attributes:
        accuracy: 0 to 1.
        left: ``[K]``, the fraction of samples that left at each block; the rest leaves at the last.
        macs: mean multiply-accumulates an image, the heads on the way included.
        full_macs: of the backbone alone, without exits.
    """

    threshold: float
    accuracy: float
    left: list[float]
    macs: float
    full_macs: int


class Early(NamedTuple):
    """``classes``: int64 ``[B]``; ``blocks``: int64 ``[B]``, where each sample left."""

    classes: Tensor
    blocks: Tensor


def early_exit(
    model: LocalModel,
    source: Any,
    thresholds: Sequence[float] = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99),
    *,
    precision: str = "32-true",
    channels_last: bool = False,
    limit: int | None = None,
) -> list[EarlyExit]:
    """What early exits by confidence would give, for each threshold, from one pass over the data.

    Confidence is the largest softmax probability (after BranchyNet, Teerapittayanon et al., ICPR 2016, arXiv 1709.01686,
    which takes the entropy). Heads without class scores are no exits, and are not counted. A threshold above 1 is never
    reached: all samples pass all exits. See `evaluate` for the other arguments and what is left as it was.

    Raises:
        ArgumentError: no batch, a negative threshold, or a task with more than one prediction a sample.
    """
    levels = [_threshold(t) for t in thresholds]
    _, autocast = _check(model, precision)
    sure: list[Tensor] = []  # of each batch, [exits, B]
    right: list[Tensor] = []
    exits: list[int] = []
    with _put_back(model, training=False):
        for args, kwargs, target in _read(model, source, channels_last, limit):
            labels = class_indices(target)
            rows: list[tuple[Tensor, Tensor]] = []
            exits = []

            def look(
                k: int,
                logits: Tensor | None,
                labels: Tensor = labels,
                exits: list[int] = exits,
                rows: list[tuple[Tensor, Tensor]] = rows,
            ) -> None:
                if logits is not None:
                    confidence, classes = _confidence(logits, labels)
                    exits.append(k)
                    rows.append((confidence, classes == labels))

            def measure(k: int, h: Tensor, ctx: StepContext, look: Any = look) -> Tensor:
                look(k, model.blocks[k].local_loss(h, ctx).logits)
                return h

            with torch.no_grad(), autocast():
                look(len(model.blocks) - 1, logits_of(_run(model, args, kwargs, target, measure)))
            sure.append(torch.stack([r[0] for r in rows]))
            right.append(torch.stack([r[1] for r in rows]))
    confidence, correct = torch.cat(sure, 1), torch.cat(right, 1)
    total = correct.shape[1]
    # price[i]: everything that runs before a sample leaves at exits[i]
    costs = [b.cost for b in model.blocks]
    own = [sum(c.macs for c in costs[: k + 1]) for k in exits]
    price = [own[i] + sum(costs[k].head_macs for k in exits[: i + 1]) for i in range(len(exits))]
    results = []
    for level in levels:
        leaves = confidence >= level
        leaves[-1] = True
        first = leaves.int().argmax(0)  # the first of equal ones
        counts = torch.bincount(first, minlength=len(exits)).tolist()
        left = [0.0] * len(costs)
        for k, n in zip(exits, counts, strict=True):
            left[k] = n / total
        hit = int(correct.gather(0, first[None]).sum())
        macs = sum(n * p for n, p in zip(counts, price, strict=True)) / total
        results.append(EarlyExit(level, hit / total, left, macs, own[-1]))
    return results


def predict_early(model: LocalModel, x: Tensor, threshold: float, *, precision: str = "32-true") -> Early:
    """Predicts ``x`` [B, ...] and computes no further than it must: samples leave at the first block that is confident.

    The decision of `early_exit`. The host waits for the device after each block, to gather the samples that stay.

    Raises:
        ArgumentError: a negative threshold, no row, or a network that is cut by hooks, whose blocks cannot run alone.
    """
    level = _threshold(threshold)
    device, autocast = _check(model, precision)
    blocks = model.blocks
    if len(blocks) > 1 and any(b.fns is None for b in blocks):
        raise ArgumentError(
            f"model: {type(model.backbone).__name__} is cut by hooks, so its blocks run only inside its own forward; give it "
            "units() and readout(), or use early_exit, which runs all of them"
        )
    if not isinstance(x, Tensor) or x.dim() == 0 or len(x) == 0:
        raise ArgumentError("x: expected the input tensor of at least one row")
    h = x = x.to(device)
    stay = torch.arange(len(x), device=device)
    classes, where = torch.zeros_like(stay), torch.zeros_like(stay)
    with _put_back(model, training=False), torch.no_grad(), autocast():
        fire(model.links, "before_forward")
        for k, block in enumerate(blocks):
            h = block(h) if block.fns is not None else model.backbone(h)
            last = k == len(blocks) - 1
            if last:
                logits: Tensor | None = logits_of(h)
            else:
                no_target = torch.zeros(len(h), dtype=torch.int64, device=device)
                logits = block.local_loss(h, StepContext(no_target, x[stay], _no_loss)).logits
            if logits is None:
                continue
            confidence, found = _confidence(logits, stay)
            leaves = torch.ones_like(stay, dtype=torch.bool) if last else confidence >= level
            classes[stay[leaves]], where[stay[leaves]] = found[leaves], k
            if not last:
                h, stay = h[~leaves], stay[~leaves]
            if len(stay) == 0:
                break
    return Early(classes, where)


def _confidence(logits: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Largest probability and its class, both [B]."""
    if logits.dim() != 2 or rows.dim() != 1:
        raise ArgumentError(
            f"model: early exit needs one prediction a sample, logits [B, classes], got {list(logits.shape)}"
        )
    probability = torch.softmax(full_precision(logits), 1).amax(1)
    return probability, logits.argmax(1)


def _threshold(value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise ArgumentError(f"threshold: got {value!r}; give a probability from 0 (above 1: no sample leaves early)")
    return float(value)


def _no_loss(logits: Tensor, target: Tensor) -> Tensor:
    return logits.new_zeros(())


# --- BatchNorm -------------------------------------------------------------------------------------------------------


def recalibrate(
    model: LocalModel,
    source: Any,
    batches: int = 100,
    *,
    precision: str = "32-true",
    channels_last: bool = False,
    epoch: int = 0,
) -> int:
    """Recomputes the running statistics of all BatchNorms as the exact average over training batches, weights as they are.

    As ``torch.optim.swa_utils.update_bn`` (every batch counts the same, ``num_batches_tracked`` starts anew), but by the
    path of training: the heads' norms too, targets moved along. Everything else stays: weights, momentum, modes, random
    states. In a model in training mode, norms that are in eval mode are frozen and stay; a model in eval mode has all
    its norms recalibrated.

    Args:
        source: training batches; see `evaluate`.
        batches: how many to average over, or as many as the epoch holds.
        epoch: which of the source's epochs, where it has several.

    Returns:
        The number of batches averaged over; 0, without reading one, where there is no norm to recalibrate.

    Raises:
        ArgumentError: no batch, or a bad one. All statistics are what they were then.

    Warns:
        RuntimeWarning: the new statistics are not finite; the old ones stay.
    """
    if isinstance(batches, bool) or not isinstance(batches, int) or batches < 1:
        raise ArgumentError(f"batches: got {batches!r}; give an integer from 1")
    _, autocast = _check(model, precision)
    with _put_back(model, training=None):
        if not model.training:
            model.train()
        norms = {
            name: m
            for name, m in model.named_modules()
            if isinstance(m, _BatchNorm) and m.training and m.running_mean is not None
        }
        if not norms:
            return 0
        momenta = {m: m.momentum for m in norms.values()}
        before = [(b, b.clone()) for m in norms.values() for b in m.buffers(recurse=False)]
        count = 0
        try:
            for m in norms.values():
                m.reset_running_stats()
                m.momentum = None
            for args, kwargs, target in _read(model, source, channels_last, batches, epoch):
                with torch.no_grad(), autocast():
                    _run(model, args, kwargs, target, lambda k, h, ctx: _run_head(model, k, h, ctx))
                count += 1
            bad = [name for name, m in norms.items() if not all(bool(b.isfinite().all()) for b in m.buffers(False))]
            if bad:
                warn(
                    f"the statistics of {bad[0]} ({len(bad)} of {len(norms)} norms) are not finite; the old ones stay",
                    RuntimeWarning,
                    stacklevel=2,
                )
                _restore(before)
        except BaseException:
            _restore(before)
            raise
        finally:
            for m, momentum in momenta.items():
                m.momentum = momentum
    return count


def _run_head(model: LocalModel, k: int, h: Tensor, ctx: StepContext) -> Tensor:
    model.blocks[k].local_loss(h, ctx)
    return h


@torch.no_grad()
def _restore(saved: list[tuple[Tensor, Tensor]]) -> None:
    for buffer, value in saved:
        buffer.copy_(value)


# --- shared ----------------------------------------------------------------------------------------------------------


def _check(model: Any, precision: str) -> tuple[torch.device, Any]:
    """The model's device, and a maker of autocast regions. One region for each batch: the source's own work stays outside."""
    if not isinstance(model, LocalModel):
        raise ArgumentError(f"model: expected a LocalModel from fastlocal.localize, got {type(model).__name__}")
    if precision not in PRECISIONS:
        raise ArgumentError(f"precision: got {precision!r}; valid are {', '.join(map(repr, PRECISIONS))}")
    device, dtype = next(model.parameters()).device, PRECISIONS[precision]

    def autocast() -> AbstractContextManager[Any]:
        return torch.autocast(device.type, dtype) if dtype is not None else nullcontext()

    return device, autocast


@contextmanager
def _put_back(model: LocalModel, *, training: bool | None) -> Iterator[None]:
    """Sets the mode (None leaves it); afterwards every module's own mode and the random states are what they were."""
    modes = [(m, m.training) for m in model.modules()]
    outside = random.getstate(), np.random.get_state()
    devices = list({p.device for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):  # a DataLoader draws its seed, even where it does not shuffle
        try:
            if training is not None:
                model.train(training)
            yield
        finally:
            for m, mode in modes:
                m.training = mode
            random.setstate(outside[0])
            np.random.set_state(outside[1])


def _run(model: LocalModel, args: Any, kwargs: Any, target: Any, on_block: Any) -> Any:
    """The backbone's output; ``on_block(k, h, ctx)`` sees every boundary on the way."""
    ctx = model.context(args, kwargs, target)

    def see(k: int, h: Tensor) -> Any:
        after = on_block(k, h, ctx)
        if model.method.reads_boundary:
            ctx.boundary = after.detach()
        return after

    return model.run(args, kwargs, see)


def _read(model: LocalModel, source: Any, channels_last: bool, limit: int | None, epoch: int = 0) -> Iterator[Unpacked]:
    """Checked batches on the model's device. Raises ArgumentError where there is none."""
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ArgumentError(f"limit: got {limit!r}; give a number of batches from 1, or None")
    device = next(model.parameters()).device

    def move(value: Tensor) -> Tensor:
        value = value.to(device, non_blocking=True)
        return value.contiguous(memory_format=torch.channels_last) if channels_last and value.dim() == 4 else value

    empty = True
    for batch in islice(_batches(source, epoch), limit):
        empty = False
        args, kwargs, target = model.unpack(batch)
        args, kwargs = pytree.tree_map_only(Tensor, move, (tuple(args), dict(kwargs)))
        target = target.to(device, non_blocking=True) if isinstance(target, Tensor) else target
        model.validate(args, kwargs, target)
        yield args, kwargs, target
    if empty:
        raise ArgumentError("source: holds no batch; give at least one")


def _batches(source: Any, epoch: int) -> Iterable[Any]:
    if callable(getattr(source, "epoch", None)):
        return source.epoch(epoch)
    if isinstance(source, Tensor | Mapping) or (
        isinstance(source, tuple) and any(isinstance(v, Tensor) for v in source)
    ):
        raise ArgumentError(
            f"source: a {type(source).__name__} is one batch, not a source of batches; put it into a list"
        )
    if not isinstance(source, Iterable):
        raise ArgumentError(
            f"source: got {type(source).__name__}; give an object with epoch(number), a DataLoader or a list of batches"
        )
    if isinstance(source, Iterator):
        raise ArgumentError("source: an iterator can be read only once; give a DataLoader or a list of batches")
    return source


def _scores(model: LocalModel, logits: Tensor | None, target: Tensor) -> Tensor | None:
    """The class scores, or None where the output is none (regression)."""
    if logits is None or hasattr(model.criterion, "correct"):
        return logits
    if target.is_floating_point():
        classes = target.shape == logits.shape and logits.dim() > 1 and logits.shape[-1] > 1
    else:
        classes = target.shape in (logits.shape[:-1], logits.shape[:1] + logits.shape[2:])
    return logits if classes else None
