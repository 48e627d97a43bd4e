"""The networks of https://github.com/Wendy231015/MLAAN (70effbe), trained by fastlocal.

In its CIFAR ``train.py`` replace ``import networks.resnetMLAAN`` by ``from fastlocal.compat import mlaan as networks`` (and leave
out the imports of its other networks), in its ``imagenet_DDP.py`` the same for ``import networks.resnet101``.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from fastlocal import models
from fastlocal.blocks.heads import CascadeHead, conv_bn_relu
from fastlocal.blocks.links import EMALink
from fastlocal.blocks.losses import cross_entropy
from fastlocal.compat._official import (
    OfficialNetwork,
    cut,
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
from fastlocal.compat.hpff import cascade_cuts, known_cuts, site_at
from fastlocal.engine.model import LocalModel
from fastlocal.errors import ArgumentError
from fastlocal.methods import Site
from fastlocal.methods.mlaan import MLAAN
from fastlocal.models.residual import BasicBlock, Bottleneck

resnetMLAAN = sys.modules[__name__]  # the official scripts say networks.resnetMLAAN.resnet32


class InfoProResNet(OfficialNetwork):
    """A CIFAR ResNet with chains of copied units, whose losses reach over one block and over two.

    Args, by their official names:
        block: `BasicBlock`, ``layers``: how many of them in each of the three stages, ``arch``: "resnet32" or "resnet110".
        local_module_num: 1 (backprop), 8 or 15 of ResNet-32, 1, 32 or 54 of ResNet-110.
        batch_size: not used.
        image_size: 32 or 96.
        balanced_memory: backprop only.
        wide_list: (16, 16, 32, 64).
        momentum: weight of the past in the averages.
        wx, wy: weights of the independent and of the cascade stream.
        dataset, aux_net_config, local_loss_mode, aux_net_widen, aux_net_feature_dim: not used, as in the official code.

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
        momentum: float = 0.999,
        wx: float = 0.001,
        wy: float = 0.999,
    ) -> None:
        super().__init__()
        net = models.ResNetCIFAR(
            layers[0], num_classes=class_num, width=stem_width(wide_list, True), dropout=dropout_rate
        )
        names = unit_names(net)
        self.local_module_num, self.class_num, self.momentum = local_module_num, class_num, momentum
        recipe = MLAAN(mode="official", momentum=momentum, wx=wx, wy=wy)
        published = {8: known_cuts(16, False, dataset)[8], 15: []} if len(names) == 16 else {}
        if len(names) == 55:
            published = {32: known_cuts(55, False, dataset)[32], 54: []}
        cuts = cascade_cuts(recipe, arch, names, local_module_num, {} if balanced_memory else published)
        local = cut(net, recipe, cuts, image_size)
        register(self, net, "conv1", "bn1", "relu", "layer1", "layer2", "layer3", "avgpool")
        self.fc = nn.Linear(64, class_num)  # not used
        self.fc64 = net.fc
        heads = {stage_and_unit(name): (k, head) for k, (name, head) in enumerate(zip(cuts, local.heads))}
        places = [f"{stage}_{unit}" for stage in (1, 2, 3) for unit in range(layers[0])]
        for j in range(55):
            for place in places:
                k, head = heads.get(place, (-1, None))
                used = _last(head.shared) if k == j and isinstance(head, CascadeHead) else None
                self.add_module(f"aux_classifier_{place}_{j}", _pooled(used or nn.Linear(64, class_num)))
        for place in places:
            _, head = heads.get(place, (-1, None))
            used = _last(head.own) if isinstance(head, CascadeHead) else None
            width = wide_list[int(place[0])]
            self.add_module(f"net_classifier_{place}", _pooled(used or nn.Linear(width, class_num)))
        self.Encoder_Net = encoders(net, names, cuts)
        _register_chains(self, local, recipe, [site_at(net, names, name, image_size) for name in cuts])
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
    ) -> tuple[Tensor | None, Tensor | None]:
        """Images [B, 3, H, W] -> ``(logits, loss of the last block)``. ``ixx_1`` to ``ixy_2`` are not used.

        In training all gradients are in ``.grad`` on return, the last average has moved, and logits and loss are detached. In
        eval mode the loss is None without a target.
        """
        if not self.training:
            logits = self._logits(img)
            return logits, None if target is None else cross_entropy(logits, target)
        out = self._step(img, target)
        return out.logits, out.losses[-1]


def resnet32(**kwargs: Any) -> InfoProResNet:
    return InfoProResNet(BasicBlock, [5, 5, 5], arch="resnet32", **kwargs)


def resnet110(**kwargs: Any) -> InfoProResNet:
    return InfoProResNet(BasicBlock, [18, 18, 18], arch="resnet110", **kwargs)


# --- ImageNet ---------------------------------------------------------------------------------------------------------


class _ImageNet(MLAAN):
    def head(self, site: Site) -> nn.Module:
        return super().head(replace(site, num_classes=1000))  # whatever the network's own number of classes


class ResNet(OfficialNetwork):
    """An ImageNet ResNet with every residual unit a block, whose losses reach over one block and over three.

    Args, by their official names:
        block, arch: `BasicBlock` and "resnet34", or `Bottleneck` and "resnet101", with ``layers`` of them per stage.
        num_classes: of the last layer; the local classifiers always have 1000.
        zero_init_residual: whether the last norm of every residual branch starts at 0, which of "resnet34" it always does.
        groups, width_per_group: of the 3x3 convolutions.
        norm_layer: constructor of the backbone's norms, BatchNorm2d by default.
        net_layer_dict: not used.
        wx, wy: weights of the independent and of the cascade stream.
        momentum: weight of the past in the averages.
        local_module_num: 16 of "resnet34", 33 of "resnet101"; 1 of "resnet101" is backprop.

    Raises ArgumentError for a value that the official code cannot train with.
    """

    def __init__(
        self,
        block: type[nn.Module],
        layers: Sequence[int],
        arch: str,
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        norm_layer: Callable[[int], nn.Module] | None = None,
        net_layer_dict: Any = None,
        wx: float = 0.001,
        wy: float = 0.999,
        momentum: float = 1.0,
        local_module_num: int = 1,
    ) -> None:
        super().__init__()
        if arch not in ("resnet34", "resnet101"):
            raise ArgumentError(f"arch: got {arch!r}; the repository has 'resnet34' and 'resnet101'")
        if arch == "resnet34" and local_module_num == 1:
            raise ArgumentError(
                "local_module_num: the repository's backprop of resnet34 leaves out its max-pool; give 16"
            )
        net = imagenet_backbone(block, layers, num_classes, groups, width_per_group, norm_layer)  # type: ignore[arg-type]
        names = unit_names(net)
        recipe = _ImageNet(mode="official", form="imagenet", momentum=momentum, wx=wx, wy=wy)
        cuts = cascade_cuts(recipe, arch, names, local_module_num, {16 if arch == "resnet34" else 33: []})
        local = cut(net, recipe, cuts, 224)
        self.local_module_num, self.momentum = local_module_num, momentum
        register(self, net, "conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool")
        self.fc_conv = nn.Sequential(*conv_bn_relu(512, 2048, 1, bias=True))  # not used
        self.fc = net.fc
        self.Encoder_Net = encoders(net, names, cuts)
        sites = [site_at(net, names, name, 224) for name in cuts]
        _register_chains(self, local, recipe, sites)
        heads = dict(zip(cuts, local.heads))
        for name in (*cuts, names[-1]):
            head = heads.get(name)
            own, shared = (head.own, head.shared) if isinstance(head, CascadeHead) else (None, None)
            site = site_at(net, names, name, 224)
            alone = list(own.net) if own is not None else _alone(recipe, site)  # type: ignore[arg-type, union-attr]
            self.add_module(f"net_classifier_{stage_and_unit(name)}", holder(head=in_layout(alone)))
            last = nn.Linear(512 * net.block.expansion, 1000) if shared is None else _last(shared)
            chain = nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), last)
            self.add_module(f"aux_classifier_{stage_and_unit(name)}", holder(head=chain))
        init_convs_and_norms(self)
        if zero_init_residual or arch == "resnet34":
            init_residuals(self)
        self._runs(local)

    def forward_original(self, x: Tensor) -> Tensor:
        """Images [B, 3, 224, 224] -> logits, in the network's mode; with the max-pool that the official one leaves out."""
        return self._logits(x)

    def forward(
        self,
        x: Tensor,
        initial_image: Tensor | None = None,
        target: Tensor | None = None,
        criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Any:
        """Images [B, 3, 224, 224] -> ``(logits, loss of the last block)`` in training, the logits in eval mode.

        ``initial_image``, ``criterion``: not used; the loss is the cross-entropy. All gradients are in ``.grad`` on return
        from a training call, the averages have moved, and logits and loss are detached.
        """
        if not self.training:
            return self._logits(x)
        out = self._step(x, target)
        return out.logits, out.losses[-1]


def resnet34(pretrained: bool = False, **kwargs: Any) -> ResNet:
    return _imagenet(BasicBlock, "resnet34", [3, 4, 6, 3], pretrained, **kwargs)


def resnet101(pretrained: bool = False, **kwargs: Any) -> ResNet:
    return _imagenet(Bottleneck, "resnet101", [3, 4, 23, 3], pretrained, **kwargs)


resnet34.resnet34 = resnet34  # type: ignore[attr-defined]  # the official scripts say networks.resnet34.resnet34
resnet101.resnet101 = resnet101  # type: ignore[attr-defined]


def _imagenet(block: type[nn.Module], arch: str, layers: list[int], pretrained: bool, **kwargs: Any) -> ResNet:
    if pretrained:
        raise ArgumentError("pretrained: weights are not downloaded; load them by load_state_dict")
    return ResNet(block, layers, arch, **kwargs)


def _alone(recipe: MLAAN, site: Site) -> list[nn.Module]:
    """The independent stream's classifier of a block that has none."""
    return [*recipe._convs(site), nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(site.shape[0], 1000)]


# --- both -------------------------------------------------------------------------------------------------------------


def _last(head: Any) -> nn.Module:
    """The linear layer of a `ClassifierHead`."""
    return head.net[-1]  # type: ignore[no-any-return]


def _pooled(linear: nn.Module) -> nn.Module:
    return holder(head=nn.AdaptiveAvgPool2d((1, 1)), fc=linear)


def _register_chains(network: nn.Module, local: LocalModel, recipe: MLAAN, sites: Sequence[Site]) -> None:
    """``Aug_Net``, ``EMA_Net`` and ``Update_Net``: of every block but the last the trained copies, the averages and the units
    that they follow. Only the first average of a chain ever runs; the others move with it, as in the official code.
    """
    trained, averaged, followed = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
    for k, (site, head) in enumerate(zip(sites, local.heads)):
        units = recipe.chain(replace(site, index=k, blocks=len(local.blocks)))
        aug, ema = [copy.deepcopy(unit) for unit in units], [copy.deepcopy(unit) for unit in units]
        if isinstance(head, CascadeHead):
            first, *others = list(head.shared.net)[: len(units)]  # type: ignore[union-attr, arg-type]
            aug, ema = [first.lb, *others], [first.ema, *ema[1:]]
            decay = recipe.decay(k, len(local.blocks))
            if decay is not None:
                # A unit that is twice in a chain has its weights once in the list that the official code goes by.
                sources = list(dict.fromkeys(units))
                links = [EMALink.of(k, unit, average, decay) for unit, average in zip(sources[1:], ema[1:])]
                local.links += links
                local.blocks[k].links += tuple(links)
        trained.append(nn.Sequential(*aug))
        averaged.append(nn.Sequential(*ema).requires_grad_(False))
        followed.append(nn.Sequential(*units))
    network.Aug_Net, network.EMA_Net, network.Update_Net = trained, averaged, followed
