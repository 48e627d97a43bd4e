"""MLAAN, multilaminar leap augmented auxiliary networks: HPFF's streams, and heads made like later units of the backbone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from fastlocal.blocks.heads import (
    AvgPool,
    CascadeHead,
    ClassifierHead,
    FusedSequential,
    NoHead,
    conv_bn_relu,
    init_convs,
)
from fastlocal.blocks.links import EMALink, Link
from fastlocal.blocks.man import Fusion, shape_after, twin
from fastlocal.errors import ArgumentError
from fastlocal.methods.base import Method, Site, check_choice, check_number, refuse_dense_images, register
from fastlocal.methods.hpff import check_stream_weights, published_cuts, stem_joined, stream_passes
from fastlocal.methods.infopro import CUTS
from fastlocal.methods.man import CUTS as MAN_CUTS

# Units of the auxiliary network of every block but the last, by units of the net and blocks: (so many blocks, stage.unit).
CHAINS: dict[tuple[int, int], list[tuple[int, str]]] = {
    (16, 8): [
        (2, "2.0 3.0 3.2 3.4"),
        (1, "2.0 3.0 3.3 3.4"),
        (2, "3.0 3.2 3.3 3.4"),
        (1, "3.2 3.3 3.4"),
        (1, "3.3 3.4"),
    ],
    (16, 15): [
        *((2, "2.0 3.0 3.2 3.4"), (1, "2.0 3.0 3.3 3.4"), (1, "2.0 3.0 3.2 3.4"), (1, "2.0 3.0 3.3 3.4")),
        *((5, "3.0 3.2 3.3 3.4"), (1, "3.1 3.2 3.4"), (1, "3.2 3.3 3.4"), (1, "3.3 3.4"), (1, "3.4")),
    ],
    (55, 32): [
        *((11, "2.0 3.0 3.2 3.17"), (10, "3.0 3.2 3.3 3.17"), (1, "3.0 3.3 3.4 3.17"), (4, "3.8 3.17")),
        *((2, "3.14 3.17"), (1, "3.15 3.17"), (1, "3.16 3.17"), (1, "3.17")),
    ],
    (55, 54): [
        *((18, "2.0 3.0 3.2 3.17"), (17, "3.0 3.2 3.3 3.17"), (1, "3.0 3.3 3.4 3.17"), (7, "3.8 3.17")),
        *((4, "3.14 3.17"), (2, "3.15 3.17"), (3, "3.16 3.17"), (1, "3.17")),
    ],
    (17, 16): [
        *((3, "2.0 2.1 3.0 4.0 4.2"), (4, "2.1 3.0 4.0 4.2"), (6, "3.1 4.0 4.1"), (1, "4.1 4.1 4.2"), (1, "4.1 4.2")),
    ],
    (34, 33): [(3, "2.0 3.0 4.0 4.2"), (4, "3.0 4.0 4.1"), (23, "4.0 4.1"), (2, "4.1 4.2")],
    (51, 50): [(3, "2.0 3.0 4.0 4.2"), (8, "3.0 4.0 4.1"), (36, "4.0 4.1"), (2, "4.1 4.2")],
}


@dataclass
class MLAANOptions:
    """Options, with the names of the paper and its code.

    wx, wy: weights of the independent and of the cascade stream's losses.
    momentum: m, weight of the past in the averages.
    form: "cifar" or "imagenet": the latter has a window of 3, and two 1x1 convolutions before the independent stream's
        classifier on maps of up to 128 channels.
    window: blocks that a loss of the cascade stream reaches; None goes by ``form``, 2 or 3.
    """

    wx: float = 0.001
    wy: float = 0.999
    momentum: float = 0.995
    form: str = "cifar"
    window: int | None = None


@register
class MLAAN(Method):
    """Cross-entropy on two streams; the cascade stream's head is a chain of copies of one to five later units.

    The first unit of a chain is there twice, trained ("Aug") and averaged ("EMA"), and their outputs are added; the other
    units are trained copies; a mean over positions and a linear layer end it. The independent stream has only these two.
    Blocks before the first full window have no loss of their own.

    ``blocks`` is the number of units, or what the repository calls K (15 is the same as 16 for a ResNet-32): then the stem
    joins the first block. The chains of ResNet-32 (8 and 15 blocks), ResNet-110 (32, 54), ResNet-34 (16), ResNet-101 (33) and
    ResNet-152 (50) are the published ones. Elsewhere, which is our choice, a chain has the first unit of every later stage
    (without stages left: the next unit) and the last unit of the network.

    In paper mode copies start with the units' weights, every average moves once a step, after its block's backward, and the
    task loss at the end counts ``wx`` for the last block and ``wy`` for the last ``window``. Official mode follows the code:
    in the CIFAR form only the last average moves, and the task loss counts 1 for the last two blocks; in the ImageNet form
    the copies' convolutions are drawn anew, and the last average moves twice.

    Where a published chain starts with an earlier block's unit (ResNet-34), ``Engine(update="immediate")`` averages weights
    that this step has updated already; ``update="end"`` and level A take them from before, as the official code does.
    """

    name: ClassVar[str] = "mlaan"
    summary: ClassVar[str] = (
        "chains of trained and averaged later units, cross-entropy over one block and over two or three"
    )
    paper: ClassVar[str] = (
        "Zhang et al.: MLAAN: Scaling Supervised Local Learning with Multilaminar Leap Augmented Auxiliary Network, 2024, "
        "arXiv 2406.16633"
    )
    repository: ClassVar[str] = "Wendy231015/MLAAN"
    Options: ClassVar[type] = MLAANOptions

    def validate(self) -> None:
        o = self.options
        check_stream_weights(o.wx, o.wy)
        check_number("momentum", o.momentum, low=0, high=1)
        check_choice("form", o.form, ("cifar", "imagenet"))
        if o.window is None:
            o.window = 3 if o.form == "imagenet" else 2
        check_number("window", o.window, low=2, integer=True)
        self.window = o.window
        self.independent = o.wx > 0 or self.mode == "official"

    def prepare(self, blocks: int, units: int) -> int:
        return stem_joined(blocks, units)

    def cuts(self, blocks: int, unit_names: list[str], net: nn.Module) -> list[int] | None:
        tables = {16: CUTS[16], 55: {**CUTS[55], **MAN_CUTS["cifar"][55]}} if self.options.form == "cifar" else {}
        return published_cuts(tables, blocks, unit_names)

    def passes(self, block: int, blocks: int, unit: int) -> int:
        return stream_passes(block, blocks, unit, self.window, self.independent)

    @property
    def final_weight(self) -> float:
        return 1.0 if self._cascade_only else self.options.wx + self.options.wy

    @property
    def final_share(self) -> float:
        return 1.0 if self._cascade_only else self.options.wy / self.final_weight

    @property
    def _cascade_only(self) -> bool:
        return self.mode == "official" and self.options.form == "cifar"

    def head(self, site: Site) -> nn.Module:
        refuse_dense_images(self.name, site)
        if site.index < min(self.window, site.blocks) - 1:
            return NoHead()
        o = self.options
        first, *others = self.chain(site)
        fresh = self.mode == "official" and o.form == "imagenet"
        units: list[nn.Module] = [Fusion(first, fresh=fresh, scaled=False)]
        units += [twin(unit, fresh=fresh) for unit in others]
        shape = site.shape
        for unit in (first, *others):
            shape = shape_after(unit, shape)
        own = None
        if self.independent:
            own = ClassifierHead(FusedSequential(*self._convs(site), *_readout(site, site.shape)), o.wx)
        return CascadeHead(own, ClassifierHead(FusedSequential(*units, *_readout(site, shape)), o.wy))

    def chain(self, site: Site) -> list[nn.Module]:
        """The units of the backbone that the auxiliary network of a block is made like."""
        published = [text for count, text in CHAINS.get((site.units, site.blocks), ()) for _ in range(count)]
        names = [f"layer{name}" for name in published[site.index].split()] if published else []
        if not names or not all(name in site.unit_names for name in names):
            later, widths = range(site.unit + 1, site.units), site.widths
            starts = [i for i in later if widths is not None and widths[i] != widths[i - 1]][:4]
            picked = dict.fromkeys([*(starts or later[:1]), *(later[-1:] if len(starts) < 4 else ())])
            names = [site.unit_names[i] for i in picked]
        modules = dict(site.net.named_modules())
        for name in names:
            if name not in modules:
                raise ArgumentError(
                    f"method: 'mlaan' copies units of the network, but {type(site.net).__name__} has no module {name!r}; give "
                    "it units() whose names are modules, or use method='dgl'"
                )
        return [modules[name] for name in names]

    def _convs(self, site: Site) -> list[nn.Module]:
        channels = site.shape[0]
        if self.options.form == "cifar" or not site.is_image or channels > 128:
            return []
        convs = nn.Sequential(*conv_bn_relu(channels, 2 * channels, 1), *conv_bn_relu(2 * channels, channels, 1))
        init_convs(convs)
        return list(convs)

    def decay(self, index: int, blocks: int) -> float | None:
        """The weight of the past when the average of block ``index`` moves; None where it does not."""
        last = index == blocks - 2
        if self._cascade_only:
            return self.options.momentum if last else None
        twice = self.mode == "official" and last  # with the same weights
        return self.options.momentum ** (2 if twice else 1)

    def links(self, sites: list[Site], heads: list[nn.Module]) -> Sequence[Link]:
        links = []
        for site, head in zip(sites, heads):
            decay = self.decay(site.index, site.blocks)
            if decay is not None and isinstance(head, CascadeHead):
                fusion: Any = head.shared.net[0]  # type: ignore[union-attr, index]
                links.append(EMALink.of(site.index, self.chain(site)[0], fusion.ema, decay))
        return links


def _readout(site: Site, shape: tuple[int, ...]) -> list[nn.Module]:
    """From activations of ``shape`` to class scores."""
    make = getattr(site.net, "make_readout", None)
    if not site.is_image and make is not None:
        return [make(shape[-1], site.num_classes)]
    pool = [AvgPool()] if len(shape) == 3 or (len(shape) == 2 and not site.dense) else []
    return [*pool, nn.Linear(shape[0] if len(shape) == 3 else shape[-1], site.num_classes)]
