"""MAN, momentum auxiliary network: each block's head starts with a trained and an averaged copy of the next unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from fastlocal.blocks.heads import (
    ClassifierHead,
    InfoProHead,
    classifier_net,
    classifier_net_imagenet,
    decoder_net,
    decoder_net_imagenet,
    init_convs,
    man_plus_plus_net,
)
from fastlocal.blocks.links import EMALink, Link
from fastlocal.blocks.man import FusedHead, Fusion, classifier_net_deep, decoder_net_deep, shape_after
from fastlocal.errors import ArgumentError
from fastlocal.methods.base import Method, Site, check_choice, check_number, register
from fastlocal.methods.infopro import BALANCED_CUTS, CONFIGS, NORMALISATION, check_lam, check_normalisation
from fastlocal.methods.infopro import CUTS as INFOPRO_CUTS
from fastlocal.ops.modules import FusedSequential

# Cuts beside InfoPro's, by form, units of the net and blocks.
CUTS = {
    "cifar": {
        55: {
            32: "layer1.1 layer1.2 layer1.4 layer1.5 layer1.7 layer1.9 layer1.11 layer1.13 layer1.14 layer1.16 layer1.17 "
            "layer2.1 layer2.2 layer2.4 layer2.5 layer2.7 layer2.9 layer2.11 layer2.13 layer2.14 layer2.16 layer2.17 "
            "layer3.1 layer3.3 layer3.4 layer3.6 layer3.7 layer3.9 layer3.11 layer3.13 layer3.15"
        }
    },
    "imagenet": {
        34: {2: "layer2.0", 4: "layer2.2 layer3.8 layer3.16"},  # ResNet-101, ResNeXt-101
        51: {2: "layer2.5", 4: "layer2.6 layer3.13 layer3.25"},  # ResNet-152
    },
}
LAMBDAS = {"cifar": (5.0, 0.5), "imagenet": (5.0, 0.75)}


@dataclass
class MANOptions:
    """Options, with the names of the paper and its code.

    momentum: m, weight of the past in the average.
    head: "infopro" (a decoder and a classifier) or "dgl" (the pooled MLP of the MAN++ repository; of the options below, it
        reads ``feature_dim``, ``form`` and those of the partition).
    lam: (lambda1, lambda2) of every head's reconstruction and label loss, or (lambda1 first, lambda2 first, lambda1 last,
        lambda2 last). None is (5, 0.5) in the CIFAR form, from where official mode goes to (0, 0), and (5, 0.75) in the
        ImageNet form, where official mode has no other. A term of weight 0 is left out in paper mode.
    config: convolutions and linear layers of the classifier, "2c2f" for two and two.
    loss: "cross_entropy" or "contrast" (supervised contrastive); the ImageNet form has cross-entropy always.
    widen, feature_dim: factor of all widths of decoder and classifier; width of linear layers and contrastive features.
    form: "cifar" or "imagenet", the two published sets of heads and cuts.
    dataset: "cifar10", "stl10", "svhn" or "imagenet": which normalisation applies, and which balanced cuts. None goes by
        ``form``.
    balanced_memory: cut where the blocks take equal memory, as InfoPro*.
    mean, std: what the input was normalised with, per channel; None takes those of the dataset.
    when: the point of a step at which the averages move, "after_backward" of the block, or "between_forward_and_backward",
        after its forward: then its gradient is taken through the new average. None is what the mode does.
    """

    momentum: float = 0.995
    head: str = "infopro"
    lam: Sequence[float] | None = None
    config: str = "2c2f"
    loss: str = "cross_entropy"
    widen: float = 1.0
    feature_dim: int = 128
    temperature: float = 0.07
    form: str = "cifar"
    dataset: str | None = None
    balanced_memory: bool = False
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    when: str | None = None


@register
class MAN(Method):
    """``y = LB(h) + EMA(h)`` of two copies of the next block's first unit, under InfoPro's heads; for residual networks.

    LB is trained; EMA takes no gradient, passes one on to the block, and averages the unit's parameters with weight
    ``momentum`` after the block's backward, before any update of the step. Its BatchNorms use the batch and keep statistics
    of their own. The heads have the width of the next unit.

    ``blocks`` is the paper's K. Where that is the number of units (16 of ResNet-32, 55 of ResNet-110), the stem joins the
    first block, and K - 1 are trained.

    Paper mode is our reading of the paper: both copies start with the unit's weights, and ``lam`` is linear over the block
    index. Official mode follows the code: unit, LB and EMA are three independent draws, and ``lam`` goes by
    ``ratio = stage / (K - 2)`` with the stage (1, 2, 3) of the next unit in the block index's place, beyond the last value
    where K is small.
    """

    name: ClassVar[str] = "man"
    summary: ClassVar[str] = "a trained and an averaged copy of the next unit, then InfoPro's or DGL's loss"
    paper: ClassVar[str] = (
        "Su et al.: Momentum Auxiliary Network for Supervised Local Learning, ECCV 2024, arXiv 2407.05623"
    )
    repository: ClassVar[str] = "JunhaoSu0/MAN"
    Options: ClassVar[type] = MANOptions
    scaled: ClassVar[bool] = False

    def validate(self) -> None:
        o = self.options
        check_number("momentum", o.momentum, low=0, high=1)
        check_choice("head", o.head, ("infopro", "dgl"))
        check_choice("config", o.config, CONFIGS)
        check_choice("loss", o.loss, ("cross_entropy", "contrast"))
        check_number("widen", o.widen, low=0.1)
        check_number("feature_dim", o.feature_dim, low=1, integer=True)
        check_number("temperature", o.temperature, low=1e-4)
        check_choice("form", o.form, ("cifar", "imagenet"))
        if o.dataset is None:
            o.dataset = "cifar10" if o.form == "cifar" else "imagenet"
        check_choice("dataset", o.dataset, NORMALISATION)
        check_choice("balanced_memory", o.balanced_memory, (False, True))
        check_choice("when", o.when, (None, "after_backward", "between_forward_and_backward"))
        if o.lam is not None:
            if o.head == "dgl":
                raise ArgumentError(f"lam: got {o.lam}, but head='dgl' has one loss, of weight 1; leave lam out")
            check_lam(o)
        check_normalisation(o)
        self.k = 0  # the published K, see resolve

    def prepare(self, blocks: int, units: int) -> int:
        return blocks - 1 if blocks == units and units > 2 else blocks

    def cuts(self, blocks: int, unit_names: list[str], net: nn.Module) -> list[int] | None:
        o, units = self.options, len(unit_names)
        if blocks == units - 1 and units > 2:
            return list(range(1, units - 1))
        if o.balanced_memory:
            tables = [BALANCED_CUTS.get(o.dataset, {}) if units == 55 and o.form == "cifar" else {}]
        else:
            tables = [CUTS[o.form].get(units, {}), INFOPRO_CUTS.get(units, {}) if o.form == "cifar" else {}]
        names = next((table[blocks] for table in tables if blocks in table), "").split()
        if names and all(name in unit_names for name in names):
            return [unit_names.index(name) for name in names]
        if o.balanced_memory and blocks > 1:
            raise ArgumentError(
                f"balanced_memory: no published cuts of {units} units into {blocks} blocks on {o.dataset}; there are some for "
                "ResNet-110 into 2, 3 and 4 on cifar10 and stl10; pass blocks=[names of the units to cut after]"
            )
        return None

    def resolve(self, sites: list[Site]) -> None:
        if sites:
            # K does not count a block of the stem alone, except where every unit is a block.
            blocks, units = sites[0].blocks - (sites[0].unit == 0), sites[0].units
            self.k = units if blocks == units - 1 else blocks

    def weights(self, site: Site) -> tuple[float, float]:
        """(lambda1, lambda2) of block ``site.index``."""
        o = self.options
        if self.mode == "paper":
            lam = o.lam or LAMBDAS[o.form]
            ratio = site.index / (site.blocks - 2) if site.blocks > 2 else 0.0
        elif o.form == "imagenet":
            return LAMBDAS[o.form]
        else:
            lam = o.lam or (*LAMBDAS[o.form], 0.0, 0.0)
            ratio = self.stage(site) / (self.k - 2) if self.k > 2 else 0.0
        lam1, lam2 = (a * (1 - ratio) + b * ratio for a, b in zip(lam[:2], lam[-2:]))
        return lam1, lam2

    def stage(self, site: Site) -> int:
        """Number of the next unit's stage, 1 for the first: stages are told by their widths."""
        if site.widths is None:
            raise ArgumentError(
                f"mode: official weights go by the number of the stage, which {type(site.net).__name__} does not tell by "
                "widths, one per unit; use mode='paper'"
            )
        return sorted(set(site.widths)).index(site.widths[site.unit + 1]) + 1

    def head(self, site: Site) -> nn.Module:
        if site.dense or not site.is_image or len(site.input_shape) != 3:
            raise ArgumentError(
                f"method: the heads of {self.name!r} are for feature maps of images with one label, but the input has shape "
                f"{tuple(site.input_shape)} and block {site.index} gives {tuple(site.shape)} without the batch; use "
                "method='dgl' or 'auglocal'"
            )
        fusion = self.fusion(site)
        after = replace(site, shape=shape_after(fusion.ema, site.shape), unit=site.unit + 1)
        return FusedHead(
            fusion, init_convs(self._dgl(after) if self.options.head == "dgl" else self._infopro(after, site))
        )

    def fusion(self, site: Site) -> Fusion:
        """The two copies of the unit after the cut."""
        early = self.update_point(site) == "between_forward_and_backward"
        return Fusion(site.next_unit, fresh=self.mode == "official", scaled=self.scaled, early=early)

    def _dgl(self, after: Site) -> nn.Module:
        width = self.options.feature_dim
        return ClassifierHead(man_plus_plus_net(after.shape, after.num_classes, width, 4 * width))

    def _infopro(self, after: Site, site: Site) -> nn.Module:
        """InfoPro's head for the next unit's output, with the weights of this block."""
        o = self.options
        image = (site.input_shape[0], site.input_shape[1], site.input_shape[2])
        mean, std = (given or default for given, default in zip((o.mean, o.std), NORMALISATION[o.dataset]))
        if len(mean) != image[0] or len(std) != image[0]:
            raise ArgumentError(
                f"mean, std: the image has {image[0]} channels, but mean has {len(mean)} numbers and std {len(std)}; "
                "give mean=(...), std=(...) that the input was normalised with"
            )
        weights = self.weights(site)
        keep = [self.mode == "official" or weight > 0 for weight in weights]
        if not any(keep):
            raise ArgumentError(
                f"lam: both weights of block {site.index} are 0, so it would not be trained; give one above 0"
            )
        return InfoProHead(
            self.decoder(after.shape[0], image) if keep[0] else None,
            self.classifier(after) if keep[1] else None,
            contrast=o.loss == "contrast" and o.form == "cifar",
            weights=weights,
            mean=mean,
            std=std,
            temperature=o.temperature,
        )

    def decoder(self, channels: int, image: tuple[int, int, int]) -> FusedSequential:
        """A new decoder for maps of ``channels``."""
        if self.options.form == "imagenet":
            return (decoder_net_deep if channels >= 1024 else decoder_net_imagenet)(channels, image)
        return decoder_net(channels, image, width=int(12 * self.options.widen))

    def classifier(self, site: Site) -> FusedSequential:
        """A new classifier for the output of unit ``site.unit``: it doubles the width at stride 2, but in the net's last
        stage (without ``net.widths``: on maps of 8x8 and smaller).
        """
        o, channels = self.options, site.shape[0]
        if o.form == "imagenet":
            return (classifier_net_deep if channels >= 1024 else classifier_net_imagenet)(channels, site.num_classes)
        if site.widths is not None:
            grow = site.widths[site.unit] < max(site.widths)
        else:
            grow = max(site.shape[1:]) > 8
        convs, linears = CONFIGS[o.config]
        out = o.feature_dim if o.loss == "contrast" else site.num_classes
        return classifier_net(
            channels,
            [int((2 if grow else 1) * channels * o.widen)] * convs,
            2 if grow else 1,
            [int(o.feature_dim * o.widen)] * (linears - 1) + [out],
        )

    def update_point(self, site: Site) -> str:
        """When the average of this block's head moves."""
        return self.options.when or "after_backward"

    def links(self, sites: list[Site], heads: list[nn.Module]) -> Sequence[Link]:
        return [
            EMALink.of(site.index, site.next_unit, head.fusion.ema, self.options.momentum, self.update_point(site))  # type: ignore[union-attr, arg-type]
            for site, head in zip(sites, heads)
        ]
