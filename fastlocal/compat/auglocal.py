"""The networks of https://github.com/ChenxiangMA/AugLocal (98c90d6), trained by fastlocal.

In its ``train.py`` (CIFAR-10, SVHN, STL-10) and ``exp_imagenet/imagenet_DDP.py`` replace ``import networks.resnet`` (and
``networks.vgg``) by ``from fastlocal.compat import auglocal as networks``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from fastlocal import models
from fastlocal.blocks.heads import AvgPool, FusedSequential, InfoProHead, PredSimHead, dgl_net
from fastlocal.blocks.losses import cross_entropy
from fastlocal.blocks.types import StepContext
from fastlocal.compat._official import (
    OfficialNetwork,
    TaskHead,
    cut,
    decoder_layout,
    holder,
    imagenet_backbone,
    in_layout,
    init_convs_and_norms,
    init_residuals,
    leaves,
    register,
    stage_and_unit,
    stem_width,
    unit_names,
    unit_outputs,
)
from fastlocal.errors import ArgumentError
from fastlocal.methods import Method, Site, get_method
from fastlocal.methods.base import check_choice
from fastlocal.models.residual import BasicBlock, Bottleneck

resnet = vgg = sys.modules[__name__]  # the official scripts say networks.resnet.resnet32

CLASSIFIERS = ("unifSamp", "DGL", "InfoPro", "PredSim", "0c1f")


class LocalResNet(OfficialNetwork):
    """A CIFAR ResNet whose first ``local_module_num - 1`` units have a head each; the rest is trained end to end.

    Args, by their official names:
        block: `BasicBlock`, ``layers``: how many of them in each of the three stages, ``arch``: "resnet32" or "resnet110".
        local_module_num: heads and the rest, 1 to the number of units (16, 55); 1 is backprop. (The official script subtracts
            ``aux_net_depth`` under the rule "AugLocal".)
        batch_size: not used.
        image_size: 32 or 96.
        dataset: with "cifar" in it, images are taken to be normalised by CIFAR-10's mean and deviation, else by 0.5.
        wide_list: widths of stem and stages, (w, w, 2w, 4w); w = 16 where there are heads.
        aux_net_config: "unifSamp" (AugLocal), "DGL", "InfoPro", "PredSim" or "0c1f", the classifier of every head.
        aux_net_config_aux_loss: "2c" or "4c", the decoder under the rule "InfoPro".
        aux_net_widen, aux_net_widen_aux_loss: factors of the widths of the classifier and of that decoder.
        hidden_dim: most features that the classifier "PredSim" pools to.
        rule: "InfoPro" adds the reconstruction loss, "PredSim" the similarity loss, weighted by ixx; any other neither.
        aux_net_depth, is_pyramid, paramid_coeff: depth of the classifier "unifSamp", and how it falls.
        aux_net_feature_dim, hidden_dim_aux_loss: not used, as in the official code.

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
        dataset: str = "cifar10",
        class_num: int = 10,
        wide_list: Sequence[int] = (16, 16, 32, 64),
        dropout_rate: float = 0,
        aux_net_config: str = "1c2f",
        aux_net_config_aux_loss: str = "1c2f",
        aux_net_widen: float = 1,
        aux_net_widen_aux_loss: float = 1,
        aux_net_feature_dim: int = 128,
        hidden_dim: int = 1024,
        hidden_dim_aux_loss: int = 1024,
        rule: str = "AugLocal",
        aux_net_depth: int = 1,
        is_pyramid: bool = False,
        paramid_coeff: float = 1,
    ) -> None:
        super().__init__()
        net = Backbone(
            layers[0], num_classes=class_num, width=stem_width(wide_list, local_module_num > 1), dropout=dropout_rate
        )
        names = unit_names(net)
        if not 1 <= local_module_num <= len(names):
            raise ArgumentError(
                f"local_module_num: got {local_module_num}; {arch} has {len(names)} units, so 1 to {len(names)}"
            )
        self.local_module_num, self.class_num, self.rule = local_module_num, class_num, rule
        cuts = names[: local_module_num - 1]
        recipe = Auxiliary(
            mode="official",
            rule=rule,
            config=aux_net_config,
            decoder=aux_net_config_aux_loss,
            widen=aux_net_widen,
            widen_decoder=aux_net_widen_aux_loss,
            hidden_dim=hidden_dim,
            depth=aux_net_depth,
            pyramid=is_pyramid,
            pyramid_coeff=paramid_coeff,
            dataset=dataset,
        )
        local = cut(net, recipe, cuts, image_size)
        register(self, net, "conv1", "bn1", "relu", "layer1", "layer2", "layer3", "avgpool", "fc")
        for k, (name, head) in enumerate(zip(cuts, local.heads)):
            place = stage_and_unit(name)
            if isinstance(head, InfoProHead):
                assert isinstance(head.decoder, nn.Sequential)
                self.add_module(f"decoder_{place}", holder(decoder=decoder_layout(head.decoder)))
            elif isinstance(head, PredSimHead):
                assert head.sim is not None
                self.add_module(f"decoder_{place}", holder(decoder=nn.Sequential(head.sim)))
            height = local.blocks[k].cost.boundary[-1]
            self.add_module(
                f"aux_classifier_{place}", holder(head=_classifier_layout(_classifier(head), aux_net_config, height))
            )
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
        return_features: bool = False,
    ) -> tuple[Any, ...]:
        """Images [B, 3, H, W] -> ``(logits, loss of the last block, [], [], [])``, and the features of all units if asked.

        In training all gradients are in ``.grad`` on return; logits and loss are detached. In eval mode the loss is None
        without a target.
        """
        units = [unit for stage in (self.layer1, self.layer2, self.layer3) for unit in stage.children()]  # type: ignore[union-attr]
        loss: Tensor | None
        collect: AbstractContextManager[list[Tensor]] = unit_outputs(units) if return_features else nullcontext([])
        with collect as features:
            if self.training:
                self.set_loss_weights(ixx_1, ixy_1, ixx_2, ixy_2)
                out = self._step(img, target)
                logits, loss = out.logits, out.losses[-1]
            else:
                logits = self._logits(img)
                loss = None if target is None else cross_entropy(logits, target)
        result: tuple[Any, ...] = (logits, loss, [], [], [])
        return (*result, [*features, logits.detach()]) if return_features else result


def resnet32(**kwargs: Any) -> LocalResNet:
    return LocalResNet(BasicBlock, [5, 5, 5], arch="resnet32", **kwargs)


def resnet110(**kwargs: Any) -> LocalResNet:
    return LocalResNet(BasicBlock, [18, 18, 18], arch="resnet110", **kwargs)


# --- the heads --------------------------------------------------------------------------------------------------------


class Backbone(models.ResNetCIFAR):
    """A ResNet whose fresh units can have another width, for ``aux_net_widen``."""

    def make_unit(self, i: int, in_channels: int, stride: int, width: int | None = None) -> nn.Module:
        return super().make_unit(i, in_channels, stride) if width is None else BasicBlock(in_channels, width, stride)


@dataclass
class AuxiliaryOptions:
    """See `LocalResNet`."""

    rule: str = "AugLocal"
    config: str = "unifSamp"
    decoder: str = "2c"
    widen: float = 1.0
    widen_decoder: float = 1.0
    hidden_dim: int = 1024
    depth: int = 1
    pyramid: bool = False
    pyramid_coeff: float = 1.0
    dataset: str = "cifar10"


class Auxiliary(Method):
    """The heads of the repository: a classifier by ``config``, and by ``rule`` a decoder or a similarity loss beside it."""

    Options = AuxiliaryOptions

    def head(self, site: Site) -> nn.Module:
        o = self.options
        check_choice("aux_net_config", o.config, CLASSIFIERS)
        net = self._classifier(site)
        if o.rule == "InfoPro":
            dataset = "cifar10" if "cifar" in o.dataset else "svhn"
            options = {"decoder": o.decoder, "widen": o.widen_decoder, "dataset": dataset}
            head = get_method("infopro")(loss="cross_entropy", lam=(1, 1), **options).head(site)
            assert isinstance(head, InfoProHead)
            head.classifier = net
            return head
        if o.rule == "PredSim":
            both = PredSimHead(site.shape, site.num_classes)
            both.pred = net
            return both
        return TaskHead(net)

    def _classifier(self, site: Site) -> FusedSequential:
        o = self.options
        channels = site.shape[0]
        if o.config == "unifSamp" and self.depth_at(site) > 0:
            options = {"depth": self.depth_at(site), "pyramid": False, "widen": o.widen}
            return _classifier(get_method("auglocal")(mode="official", **options).head(site))
        if o.config == "DGL":
            return _classifier(get_method("dgl")(head="auglocal").head(site))
        if o.config == "InfoPro":
            return _classifier(get_method("infopro")(loss="cross_entropy", lam=(1, 1), widen=o.widen).head(site))
        if o.config == "PredSim":
            options = {"losses": "pred", "dim_in_decoder": o.hidden_dim}
            return _classifier(get_method("predsim")(variant="auglocal", **options).head(site))
        if o.widen != 1:
            raise ArgumentError(f"aux_net_widen: got {o.widen}; a linear classifier takes the map as it is, so 1")
        norm = [nn.BatchNorm1d(channels)] if o.config == "unifSamp" else []
        return FusedSequential(AvgPool(), *norm, nn.Linear(channels, site.num_classes))

    def depth_at(self, site: Site) -> int:
        """``aux_net_depth`` of this head."""
        o = self.options
        if not o.pyramid or site.blocks <= 2:
            return o.depth
        fall = site.index * o.pyramid_coeff / (site.blocks - 2)
        return max(1, round(o.depth * (1 - fall) + fall))


def _classifier(head: nn.Module) -> FusedSequential:
    """The network from which a head has its class scores."""
    net = next(getattr(head, name) for name in ("net", "classifier", "pred") if hasattr(head, name))
    assert isinstance(net, FusedSequential)
    return net


def _classifier_layout(net: FusedSequential, config: str, height: int) -> nn.Sequential:
    if config == "PredSim":
        pool = next((m for m in net if isinstance(m, nn.AvgPool2d)), nn.Identity())
        return in_layout(net, pool, nn.Flatten(), None)
    if config == "DGL":
        quarter = math.ceil(height / 4)
        hidden = [None, None, nn.ReLU()]
        first, last = (nn.AdaptiveAvgPool2d(size) for size in (quarter, min(quarter, 2)))
        return in_layout(net, first, *hidden * 3, last, nn.Flatten(), *hidden * 2, None)
    return in_layout(net)


# --- ImageNet ---------------------------------------------------------------------------------------------------------


class _ImageNetwork(OfficialNetwork):
    """What the ImageNet networks share: every unit is a block, and the script calls ``backward()``."""

    layerwise_train: bool

    def _all_blocks(
        self,
        x: Tensor,
        target: Tensor | None,
        criterion: Callable[[Tensor, Tensor], Tensor] | None,
    ) -> tuple[Tensor, Tensor, list[Tensor], float]:
        object.__setattr__(self.local, "criterion", criterion or cross_entropy)
        out = self._local_step(x, target)
        scores = [head.take_scores() for head in self.local.heads]  # type: ignore[operator]
        return out.logits, out.loss, scores, out.losses[-1].item()

    def _one_block(
        self,
        k: int,
        x: Tensor,
        target: Tensor | None,
        criterion: Callable[[Tensor, Tensor], Tensor] | None,
        record: list[Tensor] | None,
    ) -> tuple[Tensor, Tensor, list[Tensor] | None]:
        if target is None:
            raise ArgumentError(
                "target: a training step needs the labels of the batch; give target=, or call model.eval()"
            )
        self._check_modules()
        h = self.local.blocks[k](x)
        if k == len(self.local.blocks) - 1:
            return h, (criterion or cross_entropy)(h, target), record
        head = self.local.heads[k]
        assert isinstance(head, TaskHead)
        local = head(h, StepContext(target, None, cross_entropy))
        scores = head.take_scores()
        if record is not None and scores is not None:
            record.append(scores)
        return h.detach(), local.loss, record


class ResNet(_ImageNetwork):
    """An ImageNet ResNet with a head on every unit but the last.

    Args, by their official names:
        block: `BasicBlock` or `Bottleneck`, ``layers``: how many of them in each of the four stages; ``arch``: its name.
        local_module_num: 1 (backprop) or the number of units, 17 for ResNet-34 and 34 for ResNet-101.
        num_classes: of the last layer; the heads always have 1000.
        zero_init_residual: whether the last norm of every residual branch of the backbone starts at 0.
        groups, width_per_group, norm_layer: of the backbone, as in torchvision.
        aux_net_config: "unifSamp". ``aux_net_widen``: 1. ``aux_net_depth``, ``is_pyramid``, ``paramid_coeff``: depth of the
            heads, and how it falls.
        layerwise_train: whether the script calls every block by itself.

    Raises ArgumentError for a value that the official code cannot run with.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        arch: str,
        local_module_num: int,
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        norm_layer: Callable[[int], nn.Module] | None = None,
        aux_net_config: str = "unifSamp",
        aux_net_widen: float = 1,
        aux_net_depth: int = 1,
        layerwise_train: bool = False,
        is_pyramid: bool = False,
        paramid_coeff: float = 0.2,
    ) -> None:
        super().__init__()
        net = imagenet_backbone(block, layers, num_classes, groups, width_per_group, norm_layer)
        cuts = _every_unit(arch, unit_names(net), local_module_num)
        self.local_module_num, self.layerwise_train, self.layers = local_module_num, layerwise_train, list(layers)
        check_choice("aux_net_config", aux_net_config, ("unifSamp",))
        check_choice("aux_net_widen", aux_net_widen, (1,))
        recipe = AuxiliaryImageNet(
            mode="official",
            config=aux_net_config,
            depth=aux_net_depth,
            pyramid=is_pyramid,
            pyramid_coeff=paramid_coeff,
        )
        local = cut(net, recipe, cuts, 64)
        register(self, net, "conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool")
        for name, head in zip(cuts, local.heads):
            self.add_module(f"aux_classifier_{stage_and_unit(name)}", holder(head=in_layout(_classifier(head))))
        self.fc = net.fc
        init_convs_and_norms(self)
        if zero_init_residual:
            init_residuals(net)
        self._runs(local)

    def forward(
        self,
        x: Tensor,
        target: Tensor | None = None,
        criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
        stage_i: int | None = None,
        layer_i: int | None = None,
        hidden_logits_record: list[Tensor] | None = None,
    ) -> Any:
        """In eval mode images [B, 3, H, W] -> logits. In training, the loss's ``backward()`` is left to the script:

        - with ``layerwise_train``, the input of unit ``layer_i`` of stage ``stage_i`` -> its output (detached; logits after
          the last), its loss, and ``hidden_logits_record`` with the scores of its head added;
        - else images -> logits, the sum of all losses, the scores of all heads, the last block's loss as a float. All
          gradients are taken by then; ``backward()`` delivers them.
        """
        if not self.training:
            return self._logits(x)
        if not self.layerwise_train:
            return self._all_blocks(x, target, criterion)
        names = [name for block in self.local.blocks for name in block.units[-1:]]
        name = "stem" if stage_i == 0 else f"layer{stage_i}.{layer_i}"
        if name not in names:
            raise ArgumentError(f"stage_i, layer_i: got {stage_i!r} and {layer_i!r}, which is no block of this network")
        return self._one_block(names.index(name), x, target, criterion, hidden_logits_record)


class VGG(_ImageNetwork):
    """VGG-13 with batch norm and a head on every convolution but the last.

    Args, by their official names:
        arch: "vgg13".
        local_module_num: 1 (backprop) or 10.
        num_classes: of the last layer; the heads always have 1000.
        init_weights: False leaves the backbone as torch draws it.
        dropout: of the two hidden linear layers of the backbone.
        aux_net_config: "DGL" or "unifSamp". ``aux_net_widen`` is not used.
        aux_net_depth, is_pyramid, paramid_coeff: depth of the heads "unifSamp", and how it falls.
        layerwise_train: whether the script calls every block by itself.

    Raises ArgumentError for a value that the official code cannot run with.
    """

    def __init__(
        self,
        arch: str,
        local_module_num: int,
        num_classes: int = 1000,
        init_weights: bool = True,
        dropout: float = 0.5,
        aux_net_config: str = "DGL",
        aux_net_widen: float = 1,
        aux_net_depth: int = 1,
        layerwise_train: bool = False,
        is_pyramid: bool = False,
        paramid_coeff: float = 0.2,
    ) -> None:
        super().__init__()
        check_choice("arch", arch, ("vgg13",))
        check_choice("aux_net_config", aux_net_config, ("DGL", "unifSamp"))
        net = models.vgg13(num_classes=num_classes, dropout=dropout)
        if not init_weights:
            for m in net.modules():
                if isinstance(m, nn.Conv2d | nn.Linear):
                    m.reset_parameters()
        cuts = _every_unit(arch, unit_names(net), local_module_num)
        self.local_module_num, self.layerwise_train = local_module_num, layerwise_train
        recipe = AuxiliaryImageNet(
            mode="official",
            config=aux_net_config,
            depth=aux_net_depth,
            pyramid=is_pyramid,
            pyramid_coeff=paramid_coeff,
        )
        local = cut(net, recipe, cuts, 64)
        register(self, net, "features", "avgpool", "fc")
        for name, head in zip(cuts, local.heads):
            chain = [leaf for member in _classifier(head) for leaf in leaves(member)]
            self.add_module(f"aux_classifier_{name.removeprefix('features.')}", holder(head=in_layout(chain)))
        self._runs(local)

    def forward(
        self,
        x: Tensor,
        target: Tensor | None = None,
        criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
        stage_i: int | None = None,
        layer_i: int | None = None,
        hidden_logits_record: list[Tensor] | None = None,
    ) -> Any:
        """As `ResNet.forward`; ``layer_i`` is the index of a convolution in ``features``, ``stage_i`` is not used."""
        if not self.training:
            return self._logits(x)
        if not self.layerwise_train:
            return self._all_blocks(x, target, criterion)
        names = [name for block in self.local.blocks for name in block.units[-1:]]
        if f"features.{layer_i}" not in names:
            raise ArgumentError(
                f"layer_i: got {layer_i!r}; the blocks are {', '.join(n.removeprefix('features.') for n in names)}"
            )
        return self._one_block(names.index(f"features.{layer_i}"), x, target, criterion, hidden_logits_record)


def resnet34(pretrained: bool = False, **kwargs: Any) -> ResNet:
    _refuse_download(pretrained)
    return ResNet(BasicBlock, [3, 4, 6, 3], arch="resnet34", **kwargs)


def resnet101(pretrained: bool = False, **kwargs: Any) -> ResNet:
    _refuse_download(pretrained)
    return ResNet(Bottleneck, [3, 4, 23, 3], arch="resnet101", **kwargs)


def vgg13(**kwargs: Any) -> VGG:
    return VGG("vgg13", **kwargs)


class AuxiliaryImageNet(Method):
    """The heads of the repository's ImageNet part, whose class scores the script wants."""

    Options = AuxiliaryOptions

    def head(self, site: Site) -> nn.Module:
        o = self.options
        if o.config == "DGL":
            channels = site.shape[0]
            size = 224 * 64 // channels  # by width, so 28 in the last stage too
            return TaskHead(dgl_net((channels, size, size), 1000, hidden=2, bias=False), keep=True)
        options = {"form": "imagenet", "depth": o.depth, "pyramid": o.pyramid, "pyramid_coeff": o.pyramid_coeff}
        recipe = get_method("auglocal")(mode="official", **options)
        return TaskHead(_classifier(recipe.head(replace(site, num_classes=1000))), keep=True)


def _every_unit(arch: str, names: list[str], blocks: int) -> list[str]:
    if blocks not in (1, len(names)):
        raise ArgumentError(f"local_module_num: got {blocks}; the repository cuts {arch} into 1 or {len(names)} blocks")
    return names[: blocks - 1]


def _refuse_download(pretrained: bool) -> None:
    if pretrained:
        raise ArgumentError("pretrained: weights are not downloaded; load them by load_state_dict")
