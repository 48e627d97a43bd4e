"""GLCAN and FBA: auxiliary networks made of units of the backbone, which also read a bank of earlier blocks' features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fastlocal.blocks.heads import AvgPool, FusedSequential, task_loss
from fastlocal.blocks.man import shape_after
from fastlocal.blocks.types import LocalLoss, StepContext
from fastlocal.errors import ArgumentError
from fastlocal.methods.auglocal import AugLocal
from fastlocal.methods.base import Method, Site, check_choice, check_number, register

_BANK = "glcan bank"
_BANKS = ("none", "features", "scores", "both")


class BankHead(nn.Module):
    """The task loss of a Linear that reads this block's features and, detached, those of earlier blocks; one term, ``"task"``.

    Args:
        trunk: boundary activation -> features [B, C].
        index: of the block; what it puts into the bank is found under this number.
        reads: blocks before it whose entries are read, with their sizes.
        features: C.
        bank: what an entry holds: "features", "scores" (of the classes), "both", or "none".
    """

    def __init__(
        self, trunk: nn.Module, index: int, reads: dict[int, int], features: int, num_classes: int, bank: str
    ) -> None:
        super().__init__()
        self.trunk, self.index, self.reads, self.bank = trunk, index, dict(reads), bank
        self.readout = FusedSequential(nn.Linear(features + sum(reads.values()), num_classes))

    def forward(self, h: Tensor, ctx: StepContext) -> LocalLoss:
        features = self.trunk(h)
        bank: dict[int, Tensor] = ctx.once(_BANK, dict)  # of this step; entries have no graph
        x = (
            torch.cat([features, *(self._entry(bank, k, features) for k in self.reads)], dim=1)
            if self.reads
            else features
        )
        if self.bank in ("scores", "both"):
            logits = self.readout(x)
            loss, scores = ctx.criterion(logits, ctx.target), {"logits": logits}
            entry = [logits.detach()]
        else:
            loss, scores = task_loss(self.readout, x, ctx)
            entry = []
        if self.bank in ("features", "both"):
            entry.append(features.detach())
        if entry:
            bank[self.index] = torch.cat(entry, dim=1) if len(entry) > 1 else entry[0]
        return LocalLoss.of(("task", loss, 1.0), **scores)

    def _entry(self, bank: dict[int, Tensor], k: int, features: Tensor) -> Tensor:
        if k not in bank:
            if not isinstance(features, FakeTensor):  # a plan may run one head alone
                raise ArgumentError(
                    f"bank: the head of block {self.index} reads what that of block {k} leaves, which has not run in this "
                    "forward; run all heads in order on one batch (for early exits early_exit, not predict_early), or use "
                    "bank='none'"
                )
            return features.new_zeros(len(features), self.reads[k])
        return bank[k].to(features.dtype)


@dataclass
class GLCANOptions:
    """What the papers' text leaves open.

    depth: units of the backbone in an auxiliary network (at most what is left of it).
    align: which: "uniform", sampled uniformly from the rest of the backbone up to its last unit, or "next", those that follow.
    bank: what a block leaves for later ones: its pooled "features", the "scores" of its classifier, "both", or "none".
    bank_size: how many of the blocks right before it a head reads; None is all.
    """

    depth: int = 2
    align: str = "uniform"
    bank: str = "features"
    bank_size: int | None = None


@register
class GLCAN(Method):
    """Auxiliary networks of the backbone's own units, a mean over positions and the task's linear layer, with a feature bank.

    Written from the text of two versions of one paper (GLCAN, then FBA), which has no released code: an auxiliary network
    reuses aligned blocks of the backbone and the head of the task, and a bank caches what earlier blocks' auxiliary networks
    found, pooled. Which units, how many, what is cached and how it is read (here: detached, beside the block's own features
    in front of its linear layer) are options of ours. Classification only; detection and super-resolution are not here.

    The backbone must offer ``make_unit(i, in_channels, stride)``. A unit halves the map where its stage is wider than the unit
    before it. The bank passes no gradient on, so blocks stay isolated, but heads must run in order. Both modes are the same.
    """

    name: ClassVar[str] = "glcan"
    summary: ClassVar[str] = (
        "auxiliary networks of the backbone's units that read earlier blocks' features, cross-entropy"
    )
    paper: ClassVar[str] = (
        "Zhu et al.: GLCAN: Global-Local Collaborative Auxiliary Network for Local Learning, arXiv 2406.00446v1; Advancing "
        "Supervised Local Learning Beyond Classification with Long-term Feature Bank, arXiv 2406.00446v4"
    )
    repository: ClassVar[str] = ""
    Options: ClassVar[type] = GLCANOptions

    def validate(self) -> None:
        o = self.options
        check_number("depth", o.depth, low=1, integer=True)
        check_choice("align", o.align, ("uniform", "next"))
        check_choice("bank", o.bank, _BANKS)
        if o.bank_size is not None:
            check_number("bank_size", o.bank_size, low=0, integer=True)
        self._sizes: dict[int, int] = {}

    def resolve(self, sites: list[Site]) -> None:
        self._sizes = {}  # of the entries, by block

    def head(self, site: Site) -> nn.Module:
        if site.dense:
            raise ArgumentError(
                "method: the heads of 'glcan' classify whole samples, but this network gives one output per position; use "
                "method='dgl'"
            )
        layers, features = self._trunk(site)
        o, k = self.options, site.index
        first = 0 if o.bank_size is None else max(0, k - o.bank_size)
        reads = {j: self._sizes[j] for j in range(first, k)} if o.bank != "none" else {}
        self._sizes[k] = (o.bank != "scores") * features + (o.bank in ("scores", "both")) * site.num_classes
        return BankHead(FusedSequential(*layers), k, reads, features, site.num_classes, o.bank)

    def _trunk(self, site: Site) -> tuple[list[nn.Module], int]:
        """Fresh units and a mean, and how many features they give."""
        make = getattr(site.net, "make_unit", None)
        if make is None:
            raise ArgumentError(
                f"method: 'glcan' builds its heads from units of the network, but {type(site.net).__name__} has no "
                "make_unit(i, in_channels, stride) that returns a fresh unit shaped like unit i; add it, take a network of "
                "fastlocal.models, or use method='dgl'"
            )
        if self.options.align == "next":
            sampled = list(range(site.unit + 1, min(site.units, site.unit + 1 + self.options.depth)))
        else:
            sampled = AugLocal.sampled_units(site.unit, site.units, self.options.depth)
        layers: list[nn.Module] = []
        shape, before = site.shape, site.unit
        for i in sampled:
            wider = site.widths is not None and site.widths[i] > site.widths[before]
            unit = make(i, shape[0] if site.is_image else shape[-1], 2 if site.is_image and wider else 1)
            shape, before = shape_after(unit, shape), i
            layers.append(unit)
        if len(shape) > 1:
            layers.append(AvgPool())
        return layers, shape[0] if site.is_image else shape[-1]
