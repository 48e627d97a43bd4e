"""LAKD, local attention knowledge distillation: each block learns where a teacher looks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fastlocal.blocks.heads import AvgPool, FusedSequential, task_loss
from fastlocal.blocks.losses import full_precision
from fastlocal.blocks.partition import find_units
from fastlocal.blocks.types import LocalLoss, StepContext
from fastlocal.errors import ArgumentError, did_you_mean
from fastlocal.methods.base import Method, Site, check_choice, check_number, register


class Teacher(nn.Module):
    """A frozen network: in eval mode, without gradients, in no ``parameters()`` and no ``state_dict()``; moved by ``.to()``."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.__dict__["net"] = net.eval()  # not registered: it is neither trained nor saved with the model

    @property
    def network(self) -> nn.Module:
        net: nn.Module = self.__dict__["net"]
        return net.eval() if net.training else net  # somebody who holds it, too, may have switched it

    @property
    def units(self) -> list[tuple[str, tuple[Callable[[Any], Any], ...]]]:
        """Names, and what to call one after the other."""
        net = self.network
        if callable(getattr(net, "units", None)):
            return [(name, (fn,)) for name, fn in net.units()]  # type: ignore[operator]
        found = find_units(net, (None,), {})
        assert found.fns is not None
        return list(zip(found.names, found.fns))

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        if isinstance(torch.empty(0), FakeTensor):  # a plan: the copy's tensors have no contents, either
            for t in (*self.network.parameters(), *self.network.buffers()):
                same = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)
                memo[id(t)] = nn.Parameter(same, t.requires_grad) if isinstance(t, nn.Parameter) else same
        return Teacher(copy.deepcopy(self.network, memo))

    def _apply(self, fn: Any, recurse: bool = True) -> Teacher:
        self.network._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def __repr__(self) -> str:
        return f"Teacher({type(self.network).__name__})"


class Walk:
    """One forward of the teacher, run as far as it is asked for. It holds one activation, not those of all units."""

    def __init__(self, teacher: Teacher, x: Tensor) -> None:
        self.units, self.input = teacher.units, x
        self.done, self.x = 0, x

    @torch.no_grad()
    def at(self, unit: int) -> Tensor:
        """The output of this unit."""
        if self.done > unit + 1:
            self.done, self.x = 0, self.input  # blocks ask in order; whoever does not pays for it
        for _, fns in self.units[self.done : unit + 1]:
            for fn in fns:
                self.x = fn(self.x)
        self.done = unit + 1
        return self.x


class LAKDHead(nn.Module):
    """Terms ``"task"``, ``"attention"`` and ``"feature"``; those of weight 0 are left out.

    Args:
        net: boundary activation -> class scores, or None.
        teacher: runs once a step; ``tap`` is its unit that this block is compared with.
        adapter: boundary activation -> features of the teacher's width, or None.
        weights: of the three terms.
        power, distance: see `LAKDOptions`.
    """

    def __init__(
        self,
        net: nn.Module | None,
        teacher: Teacher,
        tap: int,
        adapter: nn.Module | None,
        weights: tuple[float, float, float],
        power: float,
        distance: str,
    ) -> None:
        super().__init__()
        self.net, self.teacher, self.tap, self.adapter = net, teacher, tap, adapter
        self.weights, self.power, self.distance = weights, power, distance

    def forward(self, h: Tensor, ctx: StepContext) -> LocalLoss:
        task, attention, feature = self.weights
        terms: list[tuple[str, Tensor, float]] = []
        scores: dict[str, Tensor] = {}
        if self.net is not None:
            loss, scores = task_loss(self.net, h, ctx)
            terms.append(("task", loss, task))
        if attention or feature:
            assert ctx.input is not None
            x = ctx.input
            theirs = ctx.once(("lakd teacher", id(self.teacher)), lambda: Walk(self.teacher, x)).at(self.tap)
            if attention:
                apart = self._map(h, h) - self._map(theirs, h)
                value = apart.square().mean() if self.distance == "mse" else apart.norm(dim=1).mean()
                terms.append(("attention", value, attention))
            if feature:
                own = full_precision(h if self.adapter is None else self.adapter(h))
                terms.append(("feature", F.mse_loss(own, _resized(full_precision(theirs), h)), feature))
        return LocalLoss.of(*terms, **scores)

    def _map(self, features: Tensor, like: Tensor) -> Tensor:
        return F.normalize(_resized(attention_map(features, self.power), like).flatten(1), dim=1)


def attention_map(features: Tensor, power: float = 2.0) -> Tensor:
    """Where activations are strong, whatever their sign and channel: the sum over channels of ``|activation| ** power``.

    [B, C, H, W] -> [B, 1, H, W], [B, T, D] -> [B, T, 1], in float32 at least (Zagoruyko and Komodakis, ICLR 2017).
    """
    x = full_precision(features)
    strength = x.square() if power == 2 else x.abs().pow(power)
    return strength.sum(1 if x.dim() == 4 else 2, keepdim=True)


def _resized(theirs: Tensor, own: Tensor) -> Tensor:
    """The teacher's map at the size of the student's, by means over areas."""
    if theirs.dim() < 4 or theirs.shape[2:] == own.shape[2:]:
        return theirs
    return F.interpolate(theirs, size=own.shape[2:], mode="area")


@dataclass
class LAKDOptions:
    """The teacher, the weights, and what the paper's text leaves open.

    teacher: a trained network with ``units()`` (or an ``nn.Sequential``) for the same input. It is put into eval mode, moved
        with the model, and neither trained nor saved with it.
    taps: names of the teacher's units to compare with, one for every block but the last; None aligns the networks by stage.
    alpha: weight of the task loss; the attention loss has 1 - alpha.
    beta: weight of the mean squared error between features (the student's through a 1x1 convolution where widths differ).
    power: of the activations in an attention map.
    distance: between two maps: "l2", the mean over samples of the distance, or "mse".
    """

    teacher: nn.Module | None = None
    taps: Sequence[str] | None = None
    alpha: float = 0.5
    beta: float = 1.0
    power: float = 2.0
    distance: str = "l2"


@register
class LAKD(Method):
    """Gradient-isolated blocks, each distilled from a frozen teacher's attention map at the same depth, with a task head.

    Written from the text that is public (there is no released code): the student's modules have gradients of their own
    ("separation-decoupling mechanism"), and the loss is ``alpha * task + (1 - alpha) * attention + beta * feature``. What the
    "non-directional activation mapping" computes is not in it: here the strengths of activations, without sign and channel,
    as in attention transfer. That, the weights, the task head (a mean over positions and a Linear) and the alignment
    are ours. The last block is trained by the task loss of the network alone. Both modes are the same.

    The teacher runs once a step, without gradients, up to its last unit that is needed.
    """

    name: ClassVar[str] = "lakd"
    summary: ClassVar[str] = "distillation of a teacher's attention maps and features into each block, and a task loss"
    paper: ClassVar[str] = (
        "Zhang et al.: LAKD-Activation Mapping Distillation Based on Local Learning, arXiv 2408.11478"
    )
    repository: ClassVar[str] = ""
    Options: ClassVar[type] = LAKDOptions

    def validate(self) -> None:
        o = self.options
        check_number("alpha", o.alpha, low=0, high=1)
        check_number("beta", o.beta, low=0)
        check_number("power", o.power, low=1)
        check_choice("distance", o.distance, ("l2", "mse"))
        if o.teacher is None or isinstance(o.teacher, Teacher):
            return
        if not isinstance(o.teacher, nn.Sequential) and not callable(getattr(o.teacher, "units", None)):
            raise ArgumentError(
                f"teacher: {type(o.teacher).__name__} does not say what its units are; give a network of fastlocal.models, one "
                "with units(), or an nn.Sequential"
            )
        o.teacher = Teacher(o.teacher)

    def resolve(self, sites: list[Site]) -> None:
        o = self.options
        if o.teacher is None:
            raise ArgumentError("teacher: 'lakd' distils from a trained network; give teacher=net")
        if not sites:
            return
        own = {id(p) for p in sites[0].net.parameters()}
        if any(id(p) in own for p in o.teacher.network.parameters()):
            raise ArgumentError(
                "teacher: shares parameters with the network that it is to teach; give copy.deepcopy(net)"
            )
        like = next(sites[0].net.parameters())
        if not isinstance(like, FakeTensor):
            o.teacher.to(like)
        widths = getattr(o.teacher.network, "widths", None)
        names = [name for name, _ in o.teacher.units]
        if o.taps is None:
            self._taps = [_aligned(site, len(names), widths) for site in sites]
        else:
            for tap in o.taps:
                if tap not in names:
                    raise ArgumentError(f"taps: the teacher has no unit {tap!r}. {did_you_mean(tap, names)}")
            if len(o.taps) != len(sites):
                raise ArgumentError(f"taps: {len(o.taps)} names for {len(sites)} blocks with a head; give one for each")
            self._taps = [names.index(tap) for tap in o.taps]

    def head(self, site: Site) -> nn.Module:
        o = self.options
        if site.dense or len(site.shape) < 2:
            raise ArgumentError(
                f"method: 'lakd' compares maps of one sample's positions, but block {site.index} gives {tuple(site.shape)} for "
                f"{'one target per position' if site.dense else 'a sample'}; use method='dgl'"
            )
        tap = self._taps[site.index]
        theirs = self._shape(site, tap)
        channel = 0 if site.is_image else 1
        if len(theirs) != len(site.shape) or (not site.is_image and theirs[0] != site.shape[0]):
            raise ArgumentError(
                f"taps: the teacher's unit {o.teacher.units[tap][0]!r} gives {theirs}, which block {site.index} with "
                f"{tuple(site.shape)} cannot be compared with; name other units in taps="
            )
        width, wanted = site.shape[channel], theirs[channel]
        adapter: nn.Module | None = None
        if o.beta and width != wanted:
            adapter = nn.Conv2d(width, wanted, 1, bias=False) if site.is_image else nn.Linear(width, wanted, bias=False)
        net = FusedSequential(AvgPool(), nn.Linear(width, site.num_classes)) if o.alpha else None
        return LAKDHead(net, o.teacher, tap, adapter, (o.alpha, 1 - o.alpha, o.beta), o.power, o.distance)

    def _shape(self, site: Site, tap: int) -> tuple[int, ...]:
        """Of the teacher's output there, without the batch."""
        like = next(site.net.parameters())
        x = torch.zeros((1, *site.input_shape), dtype=like.dtype, device=like.device)
        try:
            return tuple(Walk(self.options.teacher, x).at(tap).shape[1:])
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise ArgumentError(
                f"teacher: {self.options.teacher} does not take an input of shape {tuple(site.input_shape)} ({error}); give one "
                "for the student's input"
            ) from error


def _aligned(site: Site, units: int, widths: Sequence[int] | None) -> int:
    """The teacher's unit at the depth of a block's last one: by stages (runs of one width) where both have as many."""
    if site.units == units:
        return site.unit
    if site.widths is not None and widths is not None:
        own, theirs = ([len(list(run)) for _, run in groupby(w)] for w in (site.widths, widths))
        if len(own) == len(theirs):
            start, there = 0, 0
            for mine, other in zip(own, theirs):
                if site.unit < start + mine:
                    return there + _scaled(site.unit - start, mine, other)
                start, there = start + mine, there + other
    return _scaled(site.unit, site.units, units)


def _scaled(i: int, count: int, other: int) -> int:
    """Unit ``i`` of ``count`` among ``other``: the last is the last."""
    return max(0, round((i + 1) * other / count) - 1)
