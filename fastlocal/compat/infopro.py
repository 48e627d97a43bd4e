"""The networks of https://github.com/blackfeather-wang/InfoPro-Pytorch (a38362a), trained by fastlocal.

In its ``train.py`` (CIFAR-10, SVHN, STL-10) and in its ``imagenet_DDP.py`` replace ``import networks.resnet`` by
``from fastlocal.compat import infopro as networks``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from fastlocal import models
from fastlocal.blocks.heads import InfoProHead
from fastlocal.blocks.losses import cross_entropy
from fastlocal.blocks.types import StepContext
from fastlocal.compat._official import (
    OfficialNetwork,
    cut,
    decoder_layout,
    holder,
    imagenet_backbone,
    in_layout,
    init_convs_and_norms,
    init_residuals,
    register,
    set_weights,
    stage_and_unit,
    stem_width,
    unit_names,
)
from fastlocal.errors import ArgumentError
from fastlocal.methods import Site
from fastlocal.methods.infopro import BALANCED_CUTS, CUTS, InfoPro
from fastlocal.models.residual import BasicBlock, Bottleneck

resnet = sys.modules[__name__]  # the official scripts say networks.resnet.resnet32

k2_infopro = {"resnet101": 0, "resnet152": 5, "resnext101_32x8d": 2}


class InfoProResNet(OfficialNetwork):
    """A CIFAR ResNet in ``local_module_num`` blocks, each but the last with a decoder and a classifier.

    Args, by their official names:
        block: `BasicBlock`, ``layers``: how many of them in each of the three stages, ``arch``: "resnet32" or "resnet110".
        local_module_num: 1 (backprop), 2, 3, 4, 8 or 16; with ``balanced_memory`` up to 4, for ResNet-110 on "cifar10" and "stl10".
        batch_size: not used.
        image_size: height and width of the images.
        dataset: with "cifar" in it, images are taken to be normalised by CIFAR-10's mean and deviation, else by 0.5.
        wide_list: widths of stem and stages, (w, w, 2w, 4w); w = 16 where there are heads.
        aux_net_config: "0c1f", "0c2f", "1c1f", "1c2f", "1c3f" or "2c2f".
        local_loss_mode: "contrast" or "cross_entropy".
        aux_net_widen, aux_net_feature_dim: factor of the widths of both nets; width of the classifier's linear layers.

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
        aux_net_config: str = "1c2f",
        local_loss_mode: str = "contrast",
        aux_net_widen: float = 1,
        aux_net_feature_dim: int = 128,
    ) -> None:
        super().__init__()
        width = stem_width(wide_list, local_module_num > 1)
        net = models.ResNetCIFAR(layers[0], num_classes=class_num, width=width, dropout=dropout_rate)
        self.local_module_num, self.class_num = local_module_num, class_num
        cuts = _cuts(arch, unit_names(net), local_module_num, balanced_memory, dataset)
        recipe = InfoPro(
            mode="official",
            lam=(1, 1),
            config=aux_net_config,
            loss=local_loss_mode,
            widen=aux_net_widen,
            feature_dim=aux_net_feature_dim,
            dataset="cifar10" if "cifar" in dataset else "svhn",
        )
        local = cut(net, recipe, cuts, image_size)
        register(self, net, "conv1", "bn1", "relu", "layer1", "layer2", "layer3", "avgpool", "fc")
        for name, head in zip(cuts, local.heads):
            assert isinstance(head, InfoProHead)
            decoder, classifier = _chains(head)
            self.add_module(f"decoder_{stage_and_unit(name)}", holder(decoder=decoder_layout(decoder)))
            self.add_module(f"aux_classifier_{stage_and_unit(name)}", holder(head=in_layout(classifier)))
        init_convs_and_norms(self)
        self._runs(local)

    def forward(
        self,
        img: Tensor,
        target: Tensor | None = None,
        ixx_1: float = 0,
        ixy_1: float = 0,
        ixx_2: float = 0,
        ixy_2: float = 0,
    ) -> tuple[Tensor, Tensor | None]:
        """Images [B, 3, H, W] -> ``(logits, loss of the last block)``.

        In training all gradients are in ``.grad`` on return; logits and loss are detached. In eval mode the loss is None
        without a target.
        """
        if self.training:
            self.set_loss_weights(ixx_1, ixy_1, ixx_2, ixy_2)
            out = self._step(img, target)
            return out.logits, out.losses[-1]
        logits = self._logits(img)
        return logits, None if target is None else cross_entropy(logits, target)


def resnet32(**kwargs: Any) -> InfoProResNet:
    return InfoProResNet(BasicBlock, [5, 5, 5], arch="resnet32", **kwargs)


def resnet110(**kwargs: Any) -> InfoProResNet:
    return InfoProResNet(BasicBlock, [18, 18, 18], arch="resnet110", **kwargs)


def _cuts(arch: str, names: list[str], blocks: int, balanced: bool, dataset: str) -> list[str]:
    """The units after which the repository cuts. Raises ArgumentError where it has no entry."""
    found: dict[int, list[str]] = {}
    if not balanced:
        found = {k: text.split() for k, text in CUTS.get(len(names), {}).items()}
        if len(names) == 16:
            found[16] = names[:-1]
    elif len(names) == 55:
        found = {k: text.split() for k, text in BALANCED_CUTS.get(dataset, {}).items()}
    if found or not balanced:
        found[1] = []
    if blocks not in found:
        raise ArgumentError(
            f"local_module_num: got {blocks}; the repository cuts {arch}{' with balanced_memory on ' + dataset if balanced else ''} "
            f"into {', '.join(map(str, sorted(found))) or 'no number'} of blocks"
        )
    return found[blocks]


def _chains(head: InfoProHead) -> tuple[nn.Sequential, nn.Sequential]:
    assert isinstance(head.decoder, nn.Sequential) and isinstance(head.classifier, nn.Sequential)
    return head.decoder, head.classifier


# --- ImageNet ---------------------------------------------------------------------------------------------------------


class _ImageNet(InfoPro):
    def head(self, site: Site) -> nn.Module:
        return super().head(replace(site, num_classes=1000))  # whatever the network's own number of classes


class ResNet(OfficialNetwork):
    """An ImageNet ResNet in two blocks, cut after ``layer2[k2_infopro]``; images [B, 3, 224, 224].

    Args, by their official names:
        block: `Bottleneck`, ``layers``: how many of them in each of the four stages.
        num_classes: of the last layer; the local classifier always has 1000.
        zero_init_residual: whether the last norm of every residual branch starts at 0.
        groups, width_per_group: of the 3x3 convolutions (ResNeXt).
        norm_layer: constructor of the backbone's norms, BatchNorm2d by default.
        net_layer_dict: not used.

    Raises ArgumentError for another block.
    """

    def __init__(
        self,
        block: type[nn.Module],
        layers: Sequence[int],
        k2_infopro: int,
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        norm_layer: Callable[[int], nn.Module] | None = None,
        net_layer_dict: Any = None,
    ) -> None:
        super().__init__()
        if block is not Bottleneck:
            raise ArgumentError(
                "block: the heads read 512 channels after layer2, so fastlocal.compat.infopro.Bottleneck"
            )
        net = imagenet_backbone(block, layers, num_classes, groups, width_per_group, norm_layer)
        local = cut(net, _ImageNet(mode="official", form="imagenet", lam=(1, 1)), [f"layer2.{k2_infopro}"], 224)
        head = local.heads[0]
        assert isinstance(head, InfoProHead)
        decoder, classifier = _chains(head)
        register(self, net, "conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool")
        self.decoder = holder(decoder=in_layout(decoder, also=[nn.Sigmoid()]))
        self.head = in_layout(classifier)
        self.fc = net.fc
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
        """In training one block a call, whose loss the script starts ``backward()`` from; in eval mode the logits.

        ``layer_wise=0``: images (and ``initial_image``, the same before normalisation) -> the first block's output, detached,
        and its loss. ``layer_wise=1``: that output -> logits and loss.
        """
        if not self.training:
            return self._logits(x)
        if layer_wise not in (0, 1) or target is None or (layer_wise == 0 and initial_image is None):
            raise ArgumentError(
                "layer_wise: a training step is two calls, layer_wise=0 with the images, initial_image= and target=, and "
                f"layer_wise=1 with its result and target=; got layer_wise={layer_wise}"
            )
        self._check_modules()
        task = criterion or cross_entropy
        if layer_wise == 1:
            logits = self.local.blocks[1](x)
            return logits, task(logits, target)
        head = self.local.heads[0]
        assert isinstance(head, InfoProHead)
        set_weights([head], [(ixx_r, ixy_r)])
        h = self.local.blocks[0](x)
        ctx = StepContext(target, x, task, cache={("image", *head.normalisation): initial_image})
        return h.detach(), head(h, ctx).loss


def resnet101(pretrained: bool = False, **kwargs: Any) -> ResNet:
    return _imagenet("resnet101", [3, 4, 23, 3], pretrained, **kwargs)


def resnet152(pretrained: bool = False, **kwargs: Any) -> ResNet:
    return _imagenet("resnet152", [3, 8, 36, 3], pretrained, **kwargs)


def resnext101_32x8d(pretrained: bool = False, **kwargs: Any) -> ResNet:
    return _imagenet("resnext101_32x8d", [3, 4, 23, 3], pretrained, groups=32, width_per_group=8, **kwargs)


def _imagenet(arch: str, layers: list[int], pretrained: bool, **kwargs: Any) -> ResNet:
    if pretrained:
        raise ArgumentError("pretrained: weights are not downloaded; load them by load_state_dict")
    return ResNet(Bottleneck, layers, k2_infopro=k2_infopro[arch], **kwargs)
