"""The networks of https://github.com/Zeudfish/HPFF (343b8e1), trained by fastlocal.

In its ``train.py`` (CIFAR-10, SVHN, STL-10) and in its ``imagenet_DDP.py`` replace ``import networks.resnetInfoPro_HPFF`` by
``from fastlocal.compat import hpff as networks``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor, nn

from fastlocal import models
from fastlocal.blocks.heads import CascadeHead
from fastlocal.blocks.losses import cross_entropy
from fastlocal.blocks.patches import PatchHead, Patchwise
from fastlocal.blocks.types import StepContext
from fastlocal.compat._official import (
    OfficialNetwork,
    cut,
    decoder_layout,
    encoders,
    holder,
    imagenet_backbone,
    in_layout,
    init_convs_and_norms,
    init_residuals,
    register,
    stage_and_unit,
    stem_width,
    unit_names,
)
from fastlocal.errors import ArgumentError
from fastlocal.methods import Method, Site
from fastlocal.methods.hpff import HPFF, IMAGENET_CUTS
from fastlocal.methods.infopro import BALANCED_CUTS
from fastlocal.methods.infopro import CUTS as INFOPRO_CUTS
from fastlocal.methods.man import CUTS as MAN_CUTS
from fastlocal.models.residual import BasicBlock, Bottleneck

resnetInfoPro_HPFF = sys.modules[__name__]  # the official scripts say networks.resnetInfoPro_HPFF.resnet32


class InfoProResNet(OfficialNetwork):
    """A CIFAR ResNet whose losses reach over one block and over two.

    Args, by their official names:
        block: `BasicBlock`, ``layers``: how many of them in each of the three stages, ``arch``: "resnet32" or "resnet110".
        local_module_num: 1 is backprop; 2, 3, 4, 8, 16 of both, and 32 and 55 of ResNet-110. (16 of ResNet-32 and 55 give one
            block fewer: the stem is not alone.)
        batch_size: not used.
        image_size: 32 or 96.
        balanced_memory, dataset: the other cuts of ResNet-110 into 2, 3 and 4 for "cifar10" and "stl10". With "cifar" in
            ``dataset``, images are taken to be normalised by CIFAR-10's mean and deviation, else by 0.5.
        wide_list: (16, 16, 32, 64).
        aux_net_config, local_loss_mode, aux_net_widen, aux_net_feature_dim: the classifiers, as in InfoPro.
        wx, wy: weights of the independent and of the cascade stream.

    Raises ArgumentError for a value that the official code cannot run with.
    """

    def __init__(
        self,
        block: type[nn.Module],
        layers: Sequence[int],
        arch: str,
        local_module_num: int,
        batch_size: int,
        image_size: int = 32,
        balanced_memory: bool = False,
        dataset: str = "cifar10",
        class_num: int = 10,
        wide_list: Sequence[int] = (16, 16, 32, 64),
        dropout_rate: float = 0,
        aux_net_config: str = "0c2f",
        local_loss_mode: str = "contrast",
        aux_net_widen: float = 1,
        aux_net_feature_dim: int = 128,
        wx: float = 0.001,
        wy: float = 0.999,
    ) -> None:
        super().__init__()
        net = models.ResNetCIFAR(
            layers[0], num_classes=class_num, width=stem_width(wide_list, True), dropout=dropout_rate
        )
        names = unit_names(net)
        self.local_module_num, self.class_num, self.wx, self.wy = local_module_num, class_num, wx, wy
        recipe = HPFF(
            mode="official",
            config=aux_net_config,
            loss=local_loss_mode,
            widen=aux_net_widen,
            feature_dim=aux_net_feature_dim,
            dataset=dataset if balanced_memory else "cifar10" if "cifar" in dataset else "svhn",
            balanced_memory=balanced_memory,
            wx=wx,
            wy=wy,
        )
        cuts = cascade_cuts(recipe, arch, names, local_module_num, known_cuts(len(names), balanced_memory, dataset))
        local = cut(net, recipe, cuts, image_size)
        register(self, net, "conv1", "bn1", "relu", "layer1", "layer2", "layer3", "avgpool")
        self.fc = nn.Linear(64, class_num)  # not used
        self.fc64 = net.fc
        heads = dict(zip(cuts, local.heads))
        for name in (*cuts, names[-1]):
            site = site_at(net, names, name, image_size)
            head = heads.get(name)
            own, shared = (head.own, head.shared) if isinstance(head, CascadeHead) else (None, None)
            for stream, used in (("net", own), ("aux", shared)):
                decoder: Any = getattr(used, "decoder", None) or recipe._restorer(site)
                classifier: Any = getattr(used, "classifier", None) or recipe._network(site)
                place = stage_and_unit(name)
                decoders = nn.ModuleList([decoder_layout(each) for each in decoder])
                self.add_module(f"{stream}_decoder_{place}", holder(decoders=decoders))
                self.add_module(f"{stream}_classifier_{place}", holder(head=in_layout(classifier)))
        self.Encoder_Net = encoders(net, names, cuts)
        init_convs_and_norms(self)
        self._runs(local)

    def forward_original(self, img: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> logits, in the network's mode."""
        return self._logits(img)

    def forward(
        self,
        img: Tensor,
        target: Tensor | None = None,
        ixx_1: float = 0,
        ixy_1: float = 0,
        ixx_2: float = 0,
        ixy_2: float = 0,
    ) -> tuple[Tensor | None, ...]:
        """Images [B, 3, H, W] -> ``(logits, the same logits, loss of the last block)`` in training, in eval mode
        ``(logits, loss)``.

        The official code computes the logits of both streams, which are equal. All gradients are in ``.grad`` on return from
        a training call; logits and loss are detached. In eval mode the loss is None without a target.
        """
        if not self.training:
            logits = self._logits(img)
            return logits, None if target is None else cross_entropy(logits, target)
        for i, head in enumerate(self.local.heads):
            if isinstance(head, CascadeHead):
                ratio = i / (self.local_module_num - 2) if self.local_module_num > 2 else 0.0
                ixx, ixy = ixx_1 * (1 - ratio) + ixx_2 * ratio, ixy_1 * (1 - ratio) + ixy_2 * ratio
                # The sum over four quadrants is four times the mean.
                head.shared.weights = (4 * self.wy * ixx, self.wy * ixy)  # type: ignore[union-attr]
        out = self._step(img, target)
        return out.logits, out.logits, out.losses[-1]


def resnet32(**kwargs: Any) -> InfoProResNet:
    return InfoProResNet(BasicBlock, [5, 5, 5], arch="resnet32", **kwargs)


def resnet110(**kwargs: Any) -> InfoProResNet:
    return InfoProResNet(BasicBlock, [18, 18, 18], arch="resnet110", **kwargs)


# --- ImageNet ---------------------------------------------------------------------------------------------------------


class _GivenImage(PatchHead):
    """With the image before normalisation as the script gives it."""

    image: Tensor | None = None

    def _image(self, ctx: StepContext) -> Tensor:
        return super()._image(ctx) if self.image is None else self.image


class _ImageNet(HPFF):
    Losses: ClassVar[type[PatchHead]] = _GivenImage

    def head(self, site: Site) -> nn.Module:
        return super().head(replace(site, num_classes=1000))  # whatever the network's own number of classes


class ResNet(OfficialNetwork):
    """An ImageNet ResNet in 4 or 8 blocks whose losses reach over two; images [B, 3, 224, 224].

    Args, by their official names:
        block: `Bottleneck`, ``layers``: how many of them in each of the four stages.
        arch: "resnet34" (the cuts of the repository's ``resnet50``), "resnet101", "resnet152" or "resnext101_32x8d".
        local_module_num: 4, or 8 but for "resnet34".
        num_classes: of the last layer; the local classifiers always have 1000.
        zero_init_residual: whether the last norm of every residual branch starts at 0.
        groups, width_per_group: of the 3x3 convolutions (ResNeXt).
        norm_layer: constructor of the backbone's norms, BatchNorm2d by default.
        net_layer_dict, wx, wy: not used.

    Raises ArgumentError for a value that the official code cannot train with.
    """

    def __init__(
        self,
        block: type[nn.Module],
        layers: Sequence[int],
        arch: str,
        local_module_num: int,
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        norm_layer: Callable[[int], nn.Module] | None = None,
        net_layer_dict: Any = None,
        wx: float = 0.0001,
        wy: float = 0.9999,
    ) -> None:
        super().__init__()
        if block is not Bottleneck:
            raise ArgumentError("block: the heads read 512 channels and more, so fastlocal.compat.hpff.Bottleneck")
        net = imagenet_backbone(block, layers, num_classes, groups, width_per_group, norm_layer)
        names = unit_names(net)
        recipe = _ImageNet(mode="official", form="imagenet")
        known = IMAGENET_CUTS[17] if arch == "resnet34" else IMAGENET_CUTS[34]
        cuts = cascade_cuts(recipe, arch, names, local_module_num, {k: text.split() for k, text in known.items()})
        local = cut(net, recipe, cuts, 224)
        self.local_module_num = local_module_num
        register(self, net, "conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool", "fc")
        self.Encoder_Net = encoders(net, names, cuts)
        heads = dict(zip(cuts, local.heads))
        for name in (*cuts, names[-1]):
            head = heads.get(name)
            shared = head.shared if isinstance(head, CascadeHead) else None
            place = stage_and_unit(name)
            channels = site_at(net, names, name, 224).shape[0]
            for i, used in (("1", shared), ("2", None)):
                self.add_module(f"decoder{i}{place}", _decoders(channels, getattr(used, "decoder", None), name))
            for i, used in (("1", shared), ("2", None)):
                self.add_module(f"aux{i}{place}", _classifier(channels, getattr(used, "classifier", None)))
        init_convs_and_norms(self)
        if zero_init_residual:
            init_residuals(net)
        self._runs(local)

    def forward(
        self,
        x: Tensor,
        initial_image: Tensor | None = None,
        target: Tensor | None = None,
        criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
        layer_wise: int = -1,
        ixx_r: float = 0,
        ixy_r: float = 1,
    ) -> Any:
        """Images [B, 3, 224, 224] -> ``(logits, loss of the last block)`` in training, the logits in eval mode.

        ``initial_image``: the images before normalisation; without them they are restored. ``criterion``: the task loss of
        all blocks. ``layer_wise``, ``ixx_r``, ``ixy_r``: not used. All gradients are in ``.grad`` on return from a training
        call; logits and loss are detached.
        """
        if not self.training:
            return self._logits(x)
        heads = [head.shared for head in self.local.heads if isinstance(head, CascadeHead)]
        self.local.criterion = criterion or cross_entropy
        try:
            for head in heads:
                head.image = initial_image  # type: ignore[union-attr, assignment]
            out = self._step(x, target)
        finally:
            for head in heads:
                head.image = None  # type: ignore[union-attr, assignment]
        return out.logits, out.losses[-1]


def resnet50(pretrained: bool = False, **kwargs: Any) -> ResNet:
    return _imagenet("resnet34", [3, 4, 6, 3], pretrained, **kwargs)


def resnet101(pretrained: bool = False, **kwargs: Any) -> ResNet:
    return _imagenet("resnet101", [3, 4, 23, 3], pretrained, **kwargs)


def resnet152(pretrained: bool = False, **kwargs: Any) -> ResNet:
    return _imagenet("resnet152", [3, 8, 36, 3], pretrained, **kwargs)


def resnext101_32x8d(pretrained: bool = False, **kwargs: Any) -> ResNet:
    return _imagenet("resnext101_32x8d", [3, 4, 23, 3], pretrained, groups=32, width_per_group=8, **kwargs)


def _imagenet(arch: str, layers: list[int], pretrained: bool, **kwargs: Any) -> ResNet:
    if pretrained:
        raise ArgumentError("pretrained: weights are not downloaded; load them by load_state_dict")
    return ResNet(Bottleneck, layers, arch, **kwargs)


# The four decoders that are registered for every map: convolutions (out, kernel size), each but the last with a norm.
_DECODERS = (
    ((128, 1), (16, 3), (3, 3)),
    ((128, 1), (32, 3), (16, 3), (3, 3)),
    ((128, 1), (64, 3), (32, 3), (16, 3), (3, 3)),
    ((128, 1), (64, 3), (32, 1), (12, 3), (6, 3), (3, 3)),
)
_CLASSIFIERS = {256: (128, 256, 512, 2048), 512: (128, 256, 512, 2048), 1024: (256, 256, 512, 2048)}


def _decoders(channels: int, used: Patchwise | None, name: str) -> nn.Module:
    """Decoders for maps that are 4, 8, 16 and 32 times smaller than the image, of which the map's own runs."""
    module = nn.Module()
    for stage, convs in enumerate(_DECODERS, 1):
        layers: list[nn.Module] = []
        before = channels
        for k, (width, kernel_size) in enumerate(convs):
            # Upsampling has an index of its own before every convolution but the first.
            layers += [nn.Identity()] if k else []
            layers.append(nn.Conv2d(before, width, kernel_size, padding=kernel_size // 2))
            layers += [nn.BatchNorm2d(width), nn.ReLU()] if k < len(convs) - 1 else [nn.Sigmoid()]
            before = width
        chain: nn.Module = nn.Sequential(*layers)
        if used is not None and name.startswith(f"layer{stage}."):
            chain = in_layout(used.net, also=[nn.Sigmoid()])  # type: ignore[arg-type]
        module.add_module(f"decoder{stage}", chain)
    return module


def _classifier(channels: int, used: nn.Module | None) -> nn.Module:
    if used is not None:
        return holder(head=in_layout(used))  # type: ignore[arg-type]
    # The one for 2048 channels, which is at the end and never runs, has norms that do not fit its convolutions.
    widths = _CLASSIFIERS.get(channels, (512, 512, 1024, 2048))
    norms = _CLASSIFIERS.get(channels, (256, 256, 512, 2048))
    layers: list[nn.Module] = []
    before = channels
    for width, norm, kernel_size, stride in zip(widths, norms, (1, 3, 3, 1), (1, 2, 2, 1)):
        conv = nn.Conv2d(before, width, kernel_size, stride, kernel_size // 2, bias=False)
        layers += [conv, nn.BatchNorm2d(norm), nn.ReLU()]
        before = width
    return holder(head=nn.Sequential(*layers, nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(2048, 1000)))


# --- shared with MLAAN ------------------------------------------------------------------------------------------------


def known_cuts(units: int, balanced: bool, dataset: str) -> dict[int, list[str]]:
    """Names of the units after which the repository cuts a CIFAR ResNet, by its numbers of local modules."""
    if balanced:
        return {k: text.split() for k, text in BALANCED_CUTS.get(dataset, {}).items()} if units == 55 else {}
    tables = {**INFOPRO_CUTS.get(units, {}), **MAN_CUTS["cifar"].get(units, {})}
    return {units: [], **{k: text.split() for k, text in tables.items()}}


def cascade_cuts(
    recipe: Method, arch: str, names: Sequence[str], blocks: int, known: dict[int, list[str]]
) -> list[str]:
    """The units after which to cut ``arch`` into what the repository calls ``blocks``, of which it has ``known`` and 1 ([] in
    ``known``: every unit, the stem with the first). Raises ArgumentError for another number.
    """
    if blocks == 1:
        return []
    if blocks not in known:
        raise ArgumentError(
            f"local_module_num: got {blocks}; the repository cuts {arch} into "
            f"{', '.join(map(str, sorted({1, *known})))} local modules"
        )
    return known[blocks] or list(names[1:-1])


def site_at(net: models.ResNetCIFAR | models.ResNet, names: Sequence[str], name: str, image_size: int) -> Site:
    """What a head after unit ``name`` would see, cut there or not."""
    k, widths = list(names).index(name), net.widths
    shrunk = 4 * 2 ** (int(name[5]) - 1) if "layer4" in net.stages else widths[k] // widths[0]
    return Site(
        index=1,
        blocks=3,
        unit=k,
        units=len(names),
        name=name,
        shape=(widths[k] * net.block.expansion, image_size // shrunk, image_size // shrunk),
        input_shape=(3, image_size, image_size),
        num_classes=net.num_classes,
        dense=False,
        widths=widths,
        net=net,
        first_unit=k,
        unit_names=tuple(names),
    )
