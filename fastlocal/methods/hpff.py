"""HPFF, hierarchical locally supervised learning with patch feature fusion: losses of one and of two blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fastlocal.blocks.heads import (
    CascadeHead,
    FusedSequential,
    InfoProHead,
    NoHead,
    Upsample,
    classifier_net,
    classifier_net_imagenet,
    conv_bn_relu,
    decoder_net,
    init_convs,
)
from fastlocal.blocks.man import classifier_net_deep
from fastlocal.blocks.patches import PatchDecoders, PatchHead, PatchMean, Patchwise
from fastlocal.errors import ArgumentError
from fastlocal.methods.base import Site, check_choice, check_number, register
from fastlocal.methods.infopro import CONFIGS, DECODERS, NORMALISATION, InfoPro, InfoProOptions
from fastlocal.methods.man import CUTS as MAN_CUTS

IMAGENET_CUTS = {
    17: {4: "layer2.0 layer3.0 layer3.5"},  # ResNet-34
    34: {  # ResNet-101
        4: "layer3.0 layer3.9 layer3.17",
        8: "layer2.0 layer3.1 layer3.5 layer3.9 layer3.13 layer3.17 layer3.21",
    },
}
IMAGENET_CUTS[51] = IMAGENET_CUTS[34]  # ResNet-152
LAMBDAS = {"cifar": (5.0, 0.5, 0.0, 0.0), "imagenet": (5.0, 0.75)}

# The decoder of an ImageNet net: (part of the image's height, channels) after a 1x1 convolution to 128, by how many times
# the map is smaller than the image.
IMAGENET_DECODERS = {4: ((2, 16),), 8: ((4, 32), (2, 16)), 16: ((2, 64), (4, 32), (2, 16))}


@dataclass
class HPFFOptions(InfoProOptions):
    """InfoPro's options with this paper's defaults, and these.

    wx, wy: weights of the independent and of the cascade stream's losses.
    patches: n, of the n x n patches that an auxiliary network sees.
    lam: None is (5, 0.5, 0, 0) in the CIFAR form, (5, 0.75) in the ImageNet form, which has no other in official mode.
    config, loss: "2c2f" and "cross_entropy", as the repository's command.
    """

    config: str = "2c2f"
    loss: str = "cross_entropy"
    wx: float = 0.001
    wy: float = 0.999
    patches: int = 2


@register
class HPFF(InfoPro):
    """InfoPro's losses on two streams; for networks on images that can be sliced.

    The independent stream's classifier, weight ``wx``, trains its block alone. The cascade stream's decoder and classifier,
    weights ``wy * lam``, train the block and the one before it. Block 0 has no loss of its own, and the task loss at the end
    counts ``wx`` for the last block and ``wy`` for the last two. ``lam`` is linear over the block index in between, with
    ``ratio = index / (K - 2)``.

    ``blocks`` is the paper's K. Where that is the number of units (16 of ResNet-32, 55 of ResNet-110), the stem joins the
    first block, and K - 1 are trained; other published cuts are InfoPro's.

    Official mode follows the code. The CIFAR form has a decoder for each of the n x n patches of the map, which restores
    that patch of the image; the losses are summed, and classifiers see the whole map. The ImageNet form has no independent
    losses, and one decoder of the whole map, with the sum of the losses of n x n crops; its weights are not scaled by ``wy``.

    Paper mode is our reading of the text, which splits the input of every auxiliary network into n x n patches and averages:
    one network runs on all patches as one larger batch, a classifier's scores are averaged over a sample's patches, and a
    decoder restores each patch of the image from that of the map, with the mean of the losses. The ImageNet form then has
    the larger networks, both streams and their weights. A loss of weight 0 is left out.
    """

    name: ClassVar[str] = "hpff"
    summary: ClassVar[str] = "InfoPro's losses on patches, over one block and over two"
    paper: ClassVar[str] = (
        "Su et al.: HPFF: Hierarchical Locally Supervised Learning with Patch Feature Fusion, ECCV 2024, arXiv 2407.05638"
    )
    repository: ClassVar[str] = "Zeudfish/HPFF"
    Options: ClassVar[type] = HPFFOptions
    Losses: ClassVar[type[PatchHead]] = PatchHead
    window: int = 2

    def validate(self) -> None:
        o = self.options
        check_choice("form", o.form, ("cifar", "imagenet"))
        super().validate()
        check_stream_weights(o.wx, o.wy)
        check_number("patches", o.patches, low=1, integer=True)
        self.dataset = o.dataset or ("imagenet" if o.form == "imagenet" else "cifar10")
        self.official_imagenet = self.mode == "official" and o.form == "imagenet"
        self.independent = not self.official_imagenet and (o.wx > 0 or self.mode == "official")

    def prepare(self, blocks: int, units: int) -> int:
        return stem_joined(blocks, units)

    def cuts(self, blocks: int, unit_names: list[str], net: nn.Module) -> list[int] | None:
        o = self.options
        tables = IMAGENET_CUTS if o.form == "imagenet" else {} if o.balanced_memory else MAN_CUTS["cifar"]
        found = published_cuts(tables, blocks, unit_names)
        return found if found is not None or o.form == "imagenet" else super().cuts(blocks, unit_names, net)

    def passes(self, block: int, blocks: int, unit: int) -> int:
        return stream_passes(block, blocks, unit, self.window, self.independent)

    @property
    def final_weight(self) -> float:
        return 1.0 if self.official_imagenet else self.options.wx + self.options.wy

    @property
    def final_share(self) -> float:
        return 1.0 if self.official_imagenet else self.options.wy / self.final_weight

    def weights(self, site: Site) -> tuple[float, float]:
        """(lambda1, lambda2) of block ``site.index``, times ``wy`` where that counts."""
        o = self.options
        lam = o.lam or LAMBDAS[o.form]
        if self.official_imagenet:
            lam = LAMBDAS[o.form]
        k = site.units if site.blocks == site.units - 1 else site.blocks
        ratio = site.index / (k - 2) if k > 2 else 0.0
        scale = 1.0 if self.official_imagenet else o.wy
        lam1, lam2 = (scale * (a * (1 - ratio) + b * ratio) for a, b in zip(lam[:2], lam[-2:]))
        return lam1, lam2

    def head(self, site: Site) -> nn.Module:
        o, official = self.options, self.mode == "official"
        self._check(site)
        if site.index == 0:
            return NoHead()
        weights = self.weights(site)
        keep = [official or weight > 0 for weight in weights]
        own = self._losses(None, self._network(site), (0.0, o.wx), site) if self.independent else None
        shared = None
        if any(keep):
            decoder = self._restorer(site) if keep[0] else None
            # The sum over patches is so many times the mean over the image.
            count = o.patches**2 if official else 1
            shared = self._losses(
                decoder, self._network(site) if keep[1] else None, (weights[0] * count, weights[1]), site
            )
        elif own is None:
            raise ArgumentError(
                f"lam, wx: all weights of block {site.index} are 0, so it has no loss; give one above 0"
            )
        return init_convs(CascadeHead(own, shared))

    def _losses(
        self, decoder: nn.Module | None, classifier: nn.Module | None, weights: tuple[float, float], site: Site
    ) -> InfoProHead:
        o = self.options
        mean, std = (given or default for given, default in zip((o.mean, o.std), NORMALISATION[self.dataset]))
        return self.Losses(
            decoder,
            classifier,
            patches=1 if self.official_imagenet else o.patches,
            contrast=o.loss == "contrast" and o.form == "cifar",
            weights=weights,
            mean=mean,
            std=std,
            temperature=o.temperature,
        )

    def _network(self, site: Site) -> nn.Module:
        """A classifier."""
        o, channels = self.options, site.shape[0]
        classes = o.feature_dim if o.loss == "contrast" else site.num_classes
        if o.form == "imagenet":
            net = (classifier_net_deep if channels >= 1024 else classifier_net_imagenet)(channels, site.num_classes)
        else:
            small = max(site.shape[1:]) <= 8 if site.widths is None else site.widths[site.unit] == max(site.widths)
            convs, linears = CONFIGS[o.config]
            net = classifier_net(
                channels,
                [int(channels * (1 if small else 2) * o.widen)] * convs,
                1 if small else 2,
                [int(o.feature_dim * o.widen)] * (linears - 1) + [classes],
            )
        if self.mode == "official" or o.patches == 1:
            return net
        return FusedSequential(PatchMean(net[:-1], o.patches), net[-1])

    def _restorer(self, site: Site) -> nn.Module:
        """A decoder."""
        o = self.options
        n = 1 if self.official_imagenet else o.patches
        channels, height, width = site.input_shape
        image = (channels, height // n, width // n)

        def one() -> nn.Module:
            if o.form == "imagenet":
                return imagenet_decoder(site.shape, site.input_shape, image)
            return decoder_net(site.shape[0], image, convs=DECODERS[o.decoder], width=int(12 * o.widen))

        if self.mode == "official" and n > 1:
            return PatchDecoders([one() for _ in range(n * n)], n)
        return Patchwise(one(), n)

    def _check(self, site: Site) -> None:
        o = self.options
        if site.dense or not site.is_image or len(site.input_shape) != 3:
            raise ArgumentError(
                f"method: {self.name!r} reconstructs an image of one label from a feature map, but the input has shape "
                f"{tuple(site.input_shape)} and block {site.index} gives {tuple(site.shape)} without the batch; "
                "use method='mlaan', or 'dgl'"
            )
        for name in ("mean", "std"):
            given = getattr(o, name)
            if len(given or NORMALISATION[self.dataset][0]) != site.input_shape[0]:
                raise ArgumentError(
                    f"{name}: the image has {site.input_shape[0]} channels; give as many numbers that the input was "
                    "normalised with"
                )
        sizes = (*site.input_shape[1:], *site.shape[1:])
        if not self.official_imagenet and any(size % o.patches for size in sizes):
            raise ArgumentError(
                f"patches: {o.patches} does not divide the image {tuple(site.input_shape[1:])} and the map "
                f"{tuple(site.shape[1:])} of block {site.index}; give a number that does"
            )


def imagenet_decoder(
    shape: tuple[int, ...], input_shape: tuple[int, ...], image: tuple[int, int, int]
) -> FusedSequential:
    """The repository's decoder of a map ``shape`` of an image ``input_shape``: [B, C, h, w] -> logits [B, *image].

    ``image`` may be a patch. Raises ArgumentError where the map is not 4, 8 or 16 times smaller than the image.
    """
    parts = IMAGENET_DECODERS.get(input_shape[1] // shape[1])
    if parts is None:
        raise ArgumentError(
            f"form: the ImageNet decoders are for maps that are 4, 8 or 16 times smaller than the image, not "
            f"{input_shape[1] // shape[1]} times; use other cuts, or form='cifar'"
        )
    channels, height, width = image
    layers = conv_bn_relu(shape[0], 128, 1, bias=True)
    before = 128
    for part, after in parts:
        layers += [Upsample((height // part, width // part)), *conv_bn_relu(before, after, 3, bias=True)]
        before = after
    return FusedSequential(*layers, Upsample((height, width)), nn.Conv2d(before, channels, 3, padding=1))


# --- what HPFF and MLAAN have in common -------------------------------------------------------------------------------


def check_stream_weights(wx: float, wy: float) -> None:
    """Raises ArgumentError unless the weights of the two streams are numbers, wy above 0."""
    check_number("wx", wx, low=0)
    check_number("wy", wy, low=0)
    if wy == 0:
        raise ArgumentError("wy: 0 leaves no loss for block 0; give a number above 0")


def stem_joined(blocks: int, units: int) -> int:
    """Blocks of the published K: where every unit was to be one, the first unit joins the second."""
    return blocks - 1 if blocks == units and units > 2 else blocks


def published_cuts(tables: dict[int, dict[int, str]], blocks: int, unit_names: Sequence[str]) -> list[int] | None:
    """Units after which to cut, or None where the table (by units and blocks) has no entry."""
    units = len(unit_names)
    if blocks == units - 1 and units > 2:
        return list(range(1, units - 1))
    names = tables.get(units, {}).get(blocks, "").split()
    if not names or not all(name in unit_names for name in names):
        return None
    return [list(unit_names).index(name) for name in names]


def stream_passes(block: int, blocks: int, unit: int, window: int, independent: bool) -> int:
    """How often the published code runs a unit in a step: the first unit once for both streams; any other once on the
    independent stream (before the first loss even without one) and once for every loss of the cascade that reaches it.
    """
    if unit == 0:
        return 1
    window, last = min(window, blocks), blocks - 1
    cascade = min(block + window - 1, last) - max(block, window - 1) + 1
    return cascade + (independent or block < window - 1)
