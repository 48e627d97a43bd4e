"""The networks of https://github.com/JunhaoSu0/MAN (a6d20c5), trained by fastlocal.

For its ``train.py`` (CIFAR-10, SVHN, STL-10) and ``imagenet_DDP.py`` replace ``import networks.resnetInfoPro_MAN`` by
``from fastlocal.compat import man as networks``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from fastlocal import models
from fastlocal.blocks.heads import InfoProHead
from fastlocal.blocks.links import fire
from fastlocal.blocks.losses import cross_entropy
from fastlocal.blocks.man import FusedHead
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
    set_weights,
    stage_and_unit,
    stem_width,
    unit_names,
)
from fastlocal.engine.model import LocalModel
from fastlocal.errors import ArgumentError
from fastlocal.methods import Site, get_method
from fastlocal.methods.infopro import BALANCED_CUTS
from fastlocal.methods.infopro import CUTS as INFOPRO_CUTS
from fastlocal.methods.man import CUTS, MAN
from fastlocal.methods.man_plus_plus import MANPlusPlus
from fastlocal.models.residual import BasicBlock, Bottleneck
from fastlocal.ops.modules import FusedSequential

resnetInfoPro_MAN = sys.modules[__name__]  # the official scripts say networks.resnetInfoPro_MAN.resnet32


class InfoProResNet(OfficialNetwork):
    """A CIFAR ResNet in ``local_module_num`` blocks, each but the last with copies of the next unit and heads on them.

    Args, by their official names:
        block: `BasicBlock`, ``layers``: how many of them in each of the three stages, ``arch``: "resnet32" or "resnet110".
        local_module_num: 1 is backprop; 2, 3, 4, 8, 16 of both, and 32 and 55 of ResNet-110. (16 and 55 give one block fewer:
            the stem is not alone.)
        batch_size: not used.
        image_size: 32 or 96.
        balanced_memory, dataset: the other cuts of ResNet-110 into 2, 3 and 4 for "cifar10" and "stl10". With "cifar" in
            ``dataset``, images are taken to be normalised by CIFAR-10's mean and deviation, else by 0.5.
        wide_list: (16, 16, 32, 64).
        aux_net_config, local_loss_mode, aux_net_widen, aux_net_feature_dim: the classifiers, as in InfoPro.
        momentum: weight of the past in the averages.

    Raises ArgumentError for a value that the official code cannot run with.
    """

    method: ClassVar[str] = "man"

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
    ) -> None:
        super().__init__()
        net = models.ResNetCIFAR(
            layers[0], num_classes=class_num, width=stem_width(wide_list, True), dropout=dropout_rate
        )
        names = unit_names(net)
        known = {1, *(BALANCED_CUTS.get(dataset, {}) if balanced_memory and len(names) == 55 else {})}
        if not balanced_memory:
            known |= {*INFOPRO_CUTS[len(names)], *CUTS["cifar"].get(len(names), {}), len(names)}
        if local_module_num not in known:
            raise ArgumentError(
                f"local_module_num: got {local_module_num}; there are cuts of {arch} on {dataset} with "
                f"balanced_memory={balanced_memory} for {', '.join(map(str, sorted(known)))}"
            )
        self.local_module_num, self.class_num, self.momentum = local_module_num, class_num, momentum
        recipe = self._recipe(
            balanced_memory=balanced_memory,
            dataset=dataset if balanced_memory else "cifar10" if "cifar" in dataset else "svhn",
            config=aux_net_config,
            loss=local_loss_mode,
            widen=aux_net_widen,
            feature_dim=aux_net_feature_dim,
            momentum=momentum,
        )
        cuts = recipe.cuts(recipe.prepare(local_module_num, len(names)), names, net) if local_module_num > 1 else []
        assert cuts is not None
        local = cut(net, recipe, [names[k] for k in cuts], image_size)
        register(self, net, "conv1", "bn1", "relu", "layer1", "layer2", "layer3", "avgpool")
        self.fc = nn.Linear(64, class_num)  # not used
        self.fc64 = net.fc
        self._register_heads(local, _Places(net, recipe, image_size, class_num))
        self.Encoder_Net = encoders(net, names, [names[k] for k in cuts])
        init_convs_and_norms(self)
        self._runs(local)

    def _recipe(self, **options: Any) -> MAN:
        recipe = get_method(self.method)(mode="official", **options)
        assert isinstance(recipe, MAN)
        return recipe

    def _register_heads(self, local: LocalModel, places: _Places) -> None:
        used = heads_by_place(local)
        for name in places.names[1:]:
            self._register_infopro(name, used.get(name), places)
        self._register_copies(local.heads)

    def _register_infopro(self, name: str, used: FusedHead | None, places: _Places) -> None:
        decoder, classifier = places.infopro(name) if used is None else infopro_chains(used)
        place = stage_and_unit(name)
        pair = {
            f"decoder_{place}": holder(decoder=decoder_layout(decoder)),
            f"aux_classifier_{place}": holder(head=in_layout(classifier)),
        }
        for official, module in reversed(pair.items()) if name == "stem" else pair.items():
            self.add_module(official, module)

    def _register_copies(self, heads: Iterable[nn.Module]) -> None:
        register_copies(self, heads)

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
    ) -> tuple[Tensor, Tensor | None]:
        """Images [B, 3, H, W] -> ``(logits, loss of the last block)``.

        In training all gradients are in ``.grad`` on return, the averages have moved, and logits and loss are detached. In
        eval mode the loss is None without a target.
        """
        if not self.training:
            logits = self._logits(img)
            return logits, None if target is None else cross_entropy(logits, target)
        self._weigh((ixx_1, ixy_1), (ixx_2, ixy_2))
        out = self._step(img, target)
        assert out.logits is not None
        return out.logits, out.losses[-1]

    def _weigh(self, first: tuple[float, float], last: tuple[float, float]) -> None:
        weights = []
        for k in range(len(self.local.heads)):
            stage = int(stage_and_unit(place_of(self.local, k))[0])
            ratio = stage / (self.local_module_num - 2) if self.local_module_num > 2 else 0.0
            weights.append((first[0] * (1 - ratio) + last[0] * ratio, first[1] * (1 - ratio) + last[1] * ratio))
        set_weights([head.head for head in heads_by_place(self.local).values()], weights)


def resnet32(**kwargs: Any) -> InfoProResNet:
    return InfoProResNet(BasicBlock, [5, 5, 5], arch="resnet32", **kwargs)


def resnet110(**kwargs: Any) -> InfoProResNet:
    return InfoProResNet(BasicBlock, [18, 18, 18], arch="resnet110", **kwargs)


# --- ImageNet ---------------------------------------------------------------------------------------------------------


UNITS = {"resnet101": 34, "resnext101_32x8d": 34, "resnet152": 51}


class _ImageNet(MAN):
    def classifier(self, site: Site) -> FusedSequential:
        return super().classifier(replace(site, num_classes=1000))  # whatever the network's own number of classes


class ResNet(OfficialNetwork):
    """An ImageNet ResNet in ``local_module_num`` blocks; images [B, 3, 224, 224].

    Args, by their official names:
        block: `Bottleneck`, ``layers``: how many of them in each of the four stages, ``arch``: the name by which it is cut.
        local_module_num: 2.
        num_classes: of the last layer; the local classifiers always have 1000.
        zero_init_residual: whether the last norm of every residual branch starts at 0.
        groups, width_per_group: of the 3x3 convolutions (ResNeXt).
        norm_layer: constructor of the norms of backbone and copies, BatchNorm2d by default.
        net_layer_dict: not used.
        momentum: weight of the past in the averages.

    Raises ArgumentError for another block, or a number of blocks without published cuts.
    """

    recipe: ClassVar[type[MAN]] = _ImageNet
    when: ClassVar[str] = "after_backward"
    known: ClassVar[tuple[int, ...]] = (2,)

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
        momentum: float = 0.995,
    ) -> None:
        super().__init__()
        if block is not Bottleneck:
            raise ArgumentError("block: the heads read 512 or 1024 channels, so fastlocal.compat.man.Bottleneck")
        net = imagenet_backbone(block, layers, num_classes, groups, width_per_group, norm_layer)
        names = unit_names(net)
        published = CUTS["imagenet"].get(UNITS.get(arch, 0), {})
        if local_module_num not in self.known or local_module_num not in published:
            raise ArgumentError(
                f"local_module_num: got {local_module_num}; {arch} is cut into "
                f"{', '.join(str(k) for k in self.known if k in published) or 'no number'} of blocks"
            )
        self.local_module_num, self.momentum = local_module_num, momentum
        cuts = published[local_module_num].split()
        recipe = self.recipe(mode="official", form="imagenet", momentum=momentum, when=self.when)
        local = cut(net, recipe, cuts, 224)
        stages = [f"layer{stage}" for stage in (1, 2, 3, 4)]
        register(self, net, "conv1", "bn1", "relu", "maxpool", *stages, "avgpool", "fc")
        self.Encoder_Net = encoders(net, names, cuts)
        register_copies(self, local.heads, scaled=recipe.scaled)
        for name, head in zip(cuts, heads_by_place(local).values()):
            decoder, classifier = infopro_chains(head)
            place = stage_and_unit(name)  # here, of the unit before the cut
            self.add_module(f"decoder{place}", holder(decoder=in_layout(decoder, also=[nn.Sigmoid()])))
            self.add_module(f"aux{place}", holder(head=in_layout(classifier)))
        init_convs_and_norms(self)
        if zero_init_residual:
            init_residuals(self)
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
        """In training, images and ``initial_image``, the same before normalisation, -> ``(logits, loss of the last block)``,
        detached, with all gradients in ``.grad`` and the averages moved; in eval mode the logits.

        The weights are 5 and 0.75; ``layer_wise``, ``ixx_r`` and ``ixy_r`` are not used, as in the official code.
        """
        if not self.training:
            return self._logits(x)
        ctx = self._context(x, initial_image, target, criterion)
        ddp = nn.parallel.DistributedDataParallel._get_active_ddp_module()
        if ddp is not None and ddp.process_group.size() > 1:
            raise ArgumentError(
                f"model: {type(self).__name__} takes its gradients inside forward, where DistributedDataParallel does not reduce "
                "them over processes; use one process, or fastlocal.compat.man_plus_plus's networks that run one block a call"
            )
        for k in range(len(self.local.blocks)):
            x, loss = self._run_block(k, x, ctx)
            loss.backward()
            fire(self.local.links, "after_backward", k)
        return x, loss.detach()

    def _context(
        self,
        x: Tensor,
        initial_image: Tensor | None,
        target: Tensor | None,
        criterion: Callable[[Tensor, Tensor], Tensor] | None,
    ) -> StepContext:
        if target is None or initial_image is None:
            raise ArgumentError("target, initial_image: a training step needs both; give them, or call model.eval()")
        self._check_modules()
        head = next(iter(heads_by_place(self.local).values())).head
        assert isinstance(head, InfoProHead)
        return StepContext(target, x, criterion or cross_entropy, cache={("image", *head.normalisation): initial_image})

    def _run_block(self, k: int, x: Tensor, ctx: StepContext) -> tuple[Tensor, Tensor]:
        """Block ``k``'s output, detached, and its loss; the averages of MAN++ move here."""
        block = self.local.blocks[k]
        h = block(x)
        loss = ctx.criterion(h, ctx.target) if block.head is None else block.local_loss(h, ctx).loss
        fire(self.local.links, "between_forward_and_backward", k)
        return h.detach(), loss


def resnet101(pretrained: bool = False, **kwargs: Any) -> ResNet:
    return imagenet(ResNet, "resnet101", pretrained, **kwargs)


def resnet152(pretrained: bool = False, **kwargs: Any) -> ResNet:
    return imagenet(ResNet, "resnet152", pretrained, **kwargs)


def resnext101_32x8d(pretrained: bool = False, **kwargs: Any) -> ResNet:
    return imagenet(ResNet, "resnext101_32x8d", pretrained, groups=32, width_per_group=8, **kwargs)


Network = TypeVar("Network", bound="ResNet")


def imagenet(kind: type[Network], arch: str, pretrained: bool, **kwargs: Any) -> Network:
    if pretrained:
        raise ArgumentError("pretrained: weights are not downloaded; load them by load_state_dict")
    layers = [3, 8, 36, 3] if arch == "resnet152" else [3, 4, 23, 3]
    return kind(Bottleneck, layers, arch=arch, **kwargs)


# --- shared with MAN++ ------------------------------------------------------------------------------------------------


class _Places:
    """What a head at any unit looks like: the official networks build one there whether it is used or not."""

    def __init__(self, net: models.ResNetCIFAR, recipe: MAN, image_size: int, classes: int) -> None:
        self.net, self.recipe, self.names = net, recipe, tuple(unit_names(net))
        self.image, self.classes = (3, image_size, image_size), classes

    def site(self, name: str) -> Site:
        widths, k = self.net.widths, self.names.index(name)
        side = self.image[1] * widths[0] // widths[k]
        return Site(
            index=0,
            blocks=2,
            unit=k,
            units=len(self.names),
            name=name,
            shape=(widths[k], side, side),
            input_shape=self.image,
            num_classes=self.classes,
            dense=False,
            widths=widths,
            net=self.net,
            first_unit=k,
            unit_names=self.names,
        )

    def infopro(self, name: str) -> tuple[nn.Sequential, nn.Sequential]:
        """Decoder and classifier."""
        site = self.site(name)
        recipe = self.recipe.of_stem() if name == "stem" and isinstance(self.recipe, MANPlusPlus) else self.recipe
        return recipe.decoder(site.shape[0], self.image), recipe.classifier(site)


def place_of(local: LocalModel, k: int) -> str:
    """The unit that names head ``k``: the one after the cut, but the stem's own."""
    return "stem" if local.blocks[k].name == "stem" else local.blocks[k + 1].units[0]


def heads_by_place(local: LocalModel) -> dict[str, FusedHead]:
    return {place_of(local, k): head for k, head in enumerate(local.heads)}  # type: ignore[misc]


def infopro_chains(head: FusedHead) -> tuple[nn.Sequential, nn.Sequential]:
    """Decoder and classifier of a head."""
    found = head.head
    assert isinstance(found, InfoProHead)
    assert isinstance(found.decoder, nn.Sequential) and isinstance(found.classifier, nn.Sequential)
    return found.decoder, found.classifier


def register_copies(owner: nn.Module, heads: Iterable[nn.Module], *, scaled: bool = False) -> None:
    """``LB``, ``EMA_Net`` and ``ema_s`` of these heads."""
    fusions = [head.fusion for head in heads if isinstance(head, FusedHead)]
    owner.add_module("LB", nn.ModuleList([fusion.lb for fusion in fusions]))
    owner.add_module("EMA_Net", nn.ModuleList([fusion.ema for fusion in fusions]))
    if scaled:
        owner.add_module("ema_s", nn.ParameterList([fusion.scale for fusion in fusions]))
