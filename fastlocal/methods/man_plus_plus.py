"""MAN++: MAN with a trained scale between its two branches, a head on the stem, and a form for Vision Transformers."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import ClassVar

from torch import nn

from fastlocal.blocks.heads import ClassifierHead
from fastlocal.blocks.man import FusedHead, twin
from fastlocal.errors import ArgumentError
from fastlocal.methods.base import Site, register
from fastlocal.methods.infopro import CUTS as INFOPRO_CUTS
from fastlocal.methods.man import CUTS, MAN
from fastlocal.ops.modules import FusedSequential


@register
class MANPlusPlus(MAN):
    """``y = s * LB(h) + (2 - s) * EMA(h)`` with a trained ``s``, 1 at first; else as MAN, whose options it takes.

    CIFAR form: the stem is a block of its own with a head, besides the K that the official tables name (8 of ResNet-32, 32 of
    ResNet-110 and so on), so that ``blocks=8`` trains 9; 16 of ResNet-32 and 55 of ResNet-110 are all units. ImageNet form:
    the stem joins the first block.

    Transformers whose units give tokens ([T, D]) get ``y``, a trained copy of the next block's second unit, and the network's
    own readout, under the task loss; K blocks of equally many units, the embedding in the first.

    Official mode does, besides what it does in MAN: the stem's head is contrastive with one convolution ("1c2f") whatever
    ``loss`` and ``config`` say, at stage 0; in the ImageNet form and in transformers, the averages move between forward and
    backward.
    """

    name: ClassVar[str] = "man_plus_plus"
    summary: ClassVar[str] = (
        "a trained and an averaged copy of the next unit, scaled, then InfoPro's, DGL's or the task loss"
    )
    paper: ClassVar[str] = (
        "Su et al.: MAN++: Scaling Momentum Auxiliary Network for Supervised Local Learning in Vision Tasks, TPAMI 2026, "
        "arXiv 2507.16279"
    )
    repository: ClassVar[str] = "JunhaoSu0/MAN_PlusPlus"
    scaled: ClassVar[bool] = True

    def prepare(self, blocks: int, units: int) -> int:
        if self.options.form == "imagenet":
            return super().prepare(blocks, units)
        published = blocks in INFOPRO_CUTS.get(units, {}) or blocks in CUTS["cifar"].get(units, {})
        return blocks + 1 if published else blocks

    def cuts(self, blocks: int, unit_names: list[str], net: nn.Module) -> list[int] | None:
        units = len(unit_names)
        if unit_names[0] == "embed":  # as transformers call it
            size, rest = divmod(units - 1, blocks)
            return None if rest or blocks == 1 else [k * size for k in range(1, blocks)]
        if self.options.form == "imagenet":
            return super().cuts(blocks, unit_names, net)
        if blocks == units:
            return list(range(units - 1))
        after_stem = super().cuts(blocks - 1, unit_names, net) if blocks > 2 else None
        return None if after_stem is None else [0, *after_stem]

    def stage(self, site: Site) -> int:
        return 0 if site.unit == 0 else super().stage(site)

    def head(self, site: Site) -> nn.Module:
        return super().head(site) if len(site.shape) != 2 else self._tokens(site)

    def _tokens(self, site: Site) -> nn.Module:
        if not callable(getattr(site.net, "make_readout", None)):
            raise ArgumentError(
                f"method: {self.name!r} on tokens needs {type(site.net).__name__}.make_readout(in_features, num_classes), a "
                "fresh readout; add it, or use method='dgl'"
            )
        if site.unit + 2 >= site.units:
            raise ArgumentError(
                f"blocks: {self.name!r} on tokens copies two units after each cut, but after '{site.name}' there is one; "
                "use fewer blocks"
            )
        second = twin(replace(site, unit=site.unit + 1).next_unit, fresh=self.mode == "official")
        readout = site.net.make_readout(site.shape[-1], site.num_classes)  # type: ignore[operator]
        return FusedHead(self.fusion(site), ClassifierHead(FusedSequential(second, readout)))

    def _infopro(self, after: Site, site: Site) -> nn.Module:
        of_stem = self.mode == "official" and self.options.form == "cifar" and site.unit == 0
        return super(MANPlusPlus, self.of_stem() if of_stem else self)._infopro(after, site)

    def of_stem(self) -> MANPlusPlus:
        """The recipe of the stem's head, which the official code builds without passing the options on."""
        recipe = copy.copy(self)
        recipe.options = replace(self.options, config="1c2f", loss="contrast")
        return recipe

    def update_point(self, site: Site) -> str:
        early = self.mode == "official" and (self.options.form == "imagenet" or not site.is_image)
        return self.options.when or ("between_forward_and_backward" if early else "after_backward")
