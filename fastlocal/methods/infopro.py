"""InfoPro, information propagation: each block reconstructs the image and separates the classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from fastlocal.blocks.heads import (
    InfoProHead,
    classifier_net,
    classifier_net_imagenet,
    decoder_net,
    decoder_net_imagenet,
    init_convs,
    segmentation_net,
)
from fastlocal.errors import ArgumentError
from fastlocal.methods.base import Method, Site, check_choice, check_number, register

CONFIGS = {"0c1f": (0, 1), "0c2f": (0, 2), "1c1f": (1, 1), "1c2f": (1, 2), "1c3f": (1, 3), "2c2f": (2, 2)}
DECODERS = {"2c": 2, "4c": 4}
FORMS = {"cifar": "cifar10", "imagenet": "imagenet", "cityscapes": "cityscapes"}  # and their data sets

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_GREY = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
NORMALISATION = {
    "cifar10": ((125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255)),
    "stl10": _GREY,
    "svhn": _GREY,
    "imagenet": _IMAGENET,
    "cityscapes": _IMAGENET,
}

# Names of the units after which the papers cut, by number of units of the net (ResNet-32, ResNet-110), and blocks.
CUTS = {
    16: {
        2: "layer2.1",
        3: "layer1.4 layer2.4",
        4: "layer1.2 layer2.1 layer3.0",
        8: "layer1.0 layer1.2 layer1.4 layer2.1 layer2.3 layer3.0 layer3.2",
    },
    55: {
        2: "layer2.8",
        3: "layer1.17 layer2.17",
        4: "layer1.11 layer2.7 layer3.3",
        8: "layer1.4 layer1.11 layer2.0 layer2.7 layer2.14 layer3.3 layer3.10",
        16: "layer1.1 layer1.4 layer1.7 layer1.10 layer1.13 layer1.16 layer2.1 layer2.4 layer2.7 layer2.11 layer2.15 "
        "layer3.1 layer3.5 layer3.9 layer3.13",
    },
}
BALANCED_CUTS = {
    "cifar10": {2: "layer1.14", 3: "layer1.9 layer2.2", 4: "layer1.6 layer1.14 layer2.8"},
    "stl10": {2: "layer1.14", 3: "layer1.8 layer2.1", 4: "layer1.6 layer1.14 layer2.8"},
}
# By units and groups of the convolutions: ResNet-101, ResNeXt-101 32x8d, ResNet-152. Balanced in memory, all of them.
IMAGENET_CUTS = {(34, 1): {2: "layer2.0"}, (34, 32): {2: "layer2.2"}, (51, 1): {2: "layer2.5"}}
CITYSCAPES_CUT = ("layer3.12", "layer3.", 23)  # the unit after which a ResNet-101 is cut, its stage, the units of that

ANY = 0  # number of units
# (lambda1, lambda2) at the first and at the last head, by (units, blocks).
LAMBDAS: dict[str, dict[tuple[int, int], tuple[float, float, float, float]]] = {
    "cifar10": {
        (16, 2): (5, 1, 0, 0),
        (16, 4): (6, 0, 1, 2),
        (16, 8): (5, 0, 0, 2),
        (16, 16): (5, 0.05, 0.2, 0.5),
        (55, 2): (5, 0.5, 0, 0),
        (55, 4): (1, 0, 0, 1),
        (55, 8): (5, 0, 0, 1),
        (55, 16): (5, 0, 0.5, 1),
        (55, 55): (5, 0, 0.5, 1),  # from the AugLocal repository
    },
    "stl10": {
        (55, 2): (10, 1, 0, 0),
        (55, 4): (20, 0.2, 5, 2),
        (55, 8): (20, 0.2, 5, 1),
        (55, 16): (20, 0.5, 10, 0.1),
    },
    "svhn": {
        (55, 2): (1, 0.1, 0, 0),
        (55, 4): (5, 0, 0.5, 1),
        (55, 8): (5, 0, 0.5, 2),
        (55, 16): (5, 0.2, 0.5, 1),
    },
    "imagenet": {(34, 2): (5, 0.75, 5, 0.75), (51, 2): (5, 1, 5, 1)},
    "cityscapes": {(ANY, 2): (1.5, 1, 1.5, 1)},  # DeepLabV3 on ResNet-101; a network of one's own has its own units
}
BALANCED_LAMBDAS: dict[str, dict[tuple[int, int], tuple[float, float, float, float]]] = {
    "cifar10": {(55, 2): (5, 0.1, 0, 0), (55, 3): (5, 0, 5, 0.1), (55, 4): (5, 0, 5, 0.1)},
    "stl10": {(55, 2): (20, 1, 0, 0), (55, 3): (20, 0.5, 5, 2), (55, 4): (20, 0.5, 10, 1)},
    "imagenet": LAMBDAS["imagenet"],
    "cityscapes": LAMBDAS["cityscapes"],
}


@dataclass
class InfoProOptions:
    """Options, with the names of the paper and its code.

    lam: (lambda1, lambda2) of every head, or (lambda1 first, lambda2 first, lambda1 last, lambda2 last), linear over
        the block index in between. None takes the published values of the net, ``blocks`` and ``dataset``, and is
        refused where there are none. A term whose lambda is 0 is left out in paper mode; in official mode it is
        computed and multiplied by 0.
    config: convolutions and linear layers of the second head, "1c2f" for one and two ("0c1f" is greedy supervised
        learning).
    loss: "contrast" (supervised contrastive) or "cross_entropy"; the other forms than "cifar" have the task loss always.
    decoder: "2c" or "4c", convolutions of the decoder.
    widen, feature_dim: factor of all widths; width of the linear layers and of the contrastive features.
    form: "cifar", "imagenet" or "cityscapes", the three published sets of heads. A network that gives one output per
        position (segmentation) has the last one whatever ``form`` says.
    dataset: "cifar10", "stl10", "svhn", "imagenet" or "cityscapes": which lambdas, cuts and normalisation apply. None
        goes by the form.
    balanced_memory: cut where the blocks take equal memory ("InfoPro*"), as the published cuts of the last two forms do
        anyway.
    mean, std: what the input was normalised with, per channel; None takes those of the dataset.
    """

    lam: Sequence[float] | None = None
    config: str = "1c2f"
    loss: str = "contrast"
    decoder: str = "2c"
    widen: float = 1.0
    feature_dim: int = 128
    temperature: float = 0.07
    form: str = "cifar"
    dataset: str | None = None
    balanced_memory: bool = False
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None


@register
class InfoPro(Method):
    """A decoder and a contrastive or classification head on every block but the last; for networks on images.

    On ResNet-32 and ResNet-110 (CIFAR form), ResNet-101, ResNet-152 and ResNeXt-101 32x8d (ImageNet form) and segmentation
    networks on ResNet-101 (``form="cityscapes"``) the published cuts are used where there are any for the number of blocks;
    elsewhere blocks are balanced by cost. The second head doubles the width at stride 2 until the net's last stage, where
    it keeps both (without ``net.widths``: on maps of 8x8 and smaller). A segmentation network's predicts a class per pixel.
    """

    name: ClassVar[str] = "infopro"
    summary: ClassVar[str] = "image reconstruction and a contrastive or cross-entropy loss per block"
    paper: ClassVar[str] = "Wang et al.: Revisiting Locally Supervised Learning, ICLR 2021, arXiv 2101.10832"
    repository: ClassVar[str] = "blackfeather-wang/InfoPro-Pytorch"
    Options: ClassVar[type] = InfoProOptions

    def validate(self) -> None:
        o = self.options
        check_choice("config", o.config, CONFIGS)
        check_choice("loss", o.loss, ("contrast", "cross_entropy"))
        check_choice("decoder", o.decoder, DECODERS)
        check_choice("form", o.form, FORMS)
        check_choice("balanced_memory", o.balanced_memory, (False, True))
        check_choice("dataset", o.dataset, (None, *NORMALISATION))
        check_number("widen", o.widen, low=0.1)
        check_number("feature_dim", o.feature_dim, low=1, integer=True)
        check_number("temperature", o.temperature, low=1e-4)
        if o.lam is not None:
            check_lam(o)
        check_normalisation(o)

    def cuts(self, blocks: int, unit_names: list[str], net: nn.Module) -> list[int] | None:
        o = self.options
        units = len(unit_names)
        if o.form == "cityscapes":
            last, stage, length = CITYSCAPES_CUT
            found = [i for i, name in enumerate(unit_names) if name.endswith(last)]
            known = blocks == 2 and len(found) == 1 and sum(stage in name for name in unit_names) == length
            return found if known else None
        if o.form == "imagenet":
            table = IMAGENET_CUTS.get((units, getattr(net, "groups", 1)), {})
        elif o.balanced_memory:
            table = BALANCED_CUTS.get(self._dataset(o.form), {}) if units == 55 else {}
        else:
            table = CUTS.get(units, {})
        names = table.get(blocks, "").split()
        if names and all(name in unit_names for name in names):
            return [unit_names.index(name) for name in names]
        if o.balanced_memory and blocks > 1:
            raise ArgumentError(
                f"balanced_memory: no published cuts of {units} units into {blocks} blocks on {self._dataset(o.form)}; "
                "there are some for ResNet-110 into 2, 3 and 4 on cifar10 and stl10, and for ResNet-101, ResNet-152 and "
                "ResNeXt-101 32x8d into 2 with form='imagenet'; pass blocks=[names of the units to cut after]"
            )
        return None

    def weights(self, site: Site) -> tuple[float, float]:
        """(lambda1, lambda2) of block ``site.index``. Raises ArgumentError where none are published and none were
        given.
        """
        o = self.options
        lam = o.lam
        if lam is None:
            dataset = self._dataset(self._form(site))
            table = (BALANCED_LAMBDAS if o.balanced_memory else LAMBDAS).get(dataset, {})
            lam = table.get((site.units, site.blocks), table.get((ANY, site.blocks)))
            if lam is None:
                known = ", ".join(f"{k} blocks" + (f" of {n} units" if n != ANY else "") for n, k in table) or "none"
                raise ArgumentError(
                    f"lam: no published values for {site.blocks} blocks of {site.units} units on {dataset} (there "
                    f"are: {known}); give lam=(lambda1, lambda2) or (lambda1 first, lambda2 first, lambda1 last, "
                    "lambda2 last)"
                )
        first, last = lam[:2], lam[-2:]
        ratio = site.index / (site.blocks - 2) if site.blocks > 2 else 0
        lam1, lam2 = (a * (1 - ratio) + b * ratio for a, b in zip(first, last))
        return lam1, lam2

    def head(self, site: Site) -> nn.Module:
        o = self.options
        form = self._form(site)
        if not site.is_image or len(site.input_shape) != 3:
            raise ArgumentError(
                f"method: 'infopro' reconstructs an image from a feature map, but the input has shape "
                f"{tuple(site.input_shape)} and block {site.index} gives {tuple(site.shape)} without the batch; "
                "use method='dgl' or 'auglocal'"
            )
        if form == "cityscapes" and not site.dense:
            raise ArgumentError(
                "form: 'cityscapes' has one label per pixel, but this network gives one output per image; use "
                "form='imagenet' or 'cifar'"
            )
        image = (site.input_shape[0], site.input_shape[1], site.input_shape[2])
        mean, std = (given or default for given, default in zip((o.mean, o.std), NORMALISATION[self._dataset(form)]))
        if len(mean) != image[0] or len(std) != image[0]:
            raise ArgumentError(
                f"mean, std: the image has {image[0]} channels, but mean has {len(mean)} numbers and std {len(std)}; "
                "give mean=(...), std=(...) that the input was normalised with"
            )
        weights = self.weights(site)
        keep = [weight > 0 or self.mode == "official" for weight in weights]
        if not any(weights):
            raise ArgumentError(
                f"lam: both weights of block {site.index} are 0, so it would not be trained; give one above 0"
            )
        head = InfoProHead(
            self._decoder(site, form, image) if keep[0] else None,
            self._classifier(site, form, image) if keep[1] else None,
            contrast=o.loss == "contrast" and form == "cifar",
            weights=weights,
            mean=mean,
            std=std,
            temperature=o.temperature,
        )
        return head if form == "cityscapes" else init_convs(head)

    def _form(self, site: Site) -> str:
        return "cityscapes" if site.dense else self.options.form

    def _dataset(self, form: str) -> str:
        return self.options.dataset or FORMS[form]

    def _decoder(self, site: Site, form: str, image: tuple[int, int, int]) -> nn.Module:
        o = self.options
        channels, height, width = site.shape
        if form == "cifar":
            return decoder_net(channels, image, convs=DECODERS[o.decoder], width=int(12 * o.widen))
        return decoder_net_imagenet(channels, image, (height, width) if form == "cityscapes" else (1, 1))

    def _classifier(self, site: Site, form: str, image: tuple[int, int, int]) -> nn.Module:
        o = self.options
        channels = site.shape[0]
        if form == "cityscapes":
            return segmentation_net(channels, site.num_classes, image[1:])
        if form == "imagenet":
            return classifier_net_imagenet(channels, site.num_classes)
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


def check_lam(o: Any) -> None:
    """Makes the option ``lam`` of ``o`` a tuple of floats. Raises ArgumentError."""
    o.lam = _numbers("lam", o.lam, (2, 4), "(lambda1, lambda2) or their values at the first and at the last head")
    if min(o.lam) < 0:
        raise ArgumentError(f"lam: got {o.lam}; give weights of at least 0")


def check_normalisation(o: Any) -> None:
    """Makes the options ``mean`` and ``std`` of ``o``, where given, tuples of floats. Raises ArgumentError."""
    for name in ("mean", "std"):
        if getattr(o, name) is not None:
            setattr(o, name, _numbers(name, getattr(o, name), (1, 2, 3, 4), "one per image channel"))
    if o.std is not None and min(o.std) <= 0:
        raise ArgumentError(f"std: got {o.std}; give positive numbers")


def _numbers(name: str, values: Sequence[float], lengths: Sequence[int], what: str) -> tuple[float, ...]:
    good = isinstance(values, Sequence) and len(values) in lengths
    if not good or not all(isinstance(v, int | float) for v in values):
        raise ArgumentError(f"{name}: got {values!r}; give {' or '.join(map(str, lengths))} numbers: {what}")
    return tuple(float(v) for v in values)
