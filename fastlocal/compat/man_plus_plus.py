"""The networks of https://github.com/JunhaoSu0/MAN_PlusPlus (7b2d8a9), trained by fastlocal.

Its scripts name the modules ``resnetInfoPro_MANPP``, ``resnetDGL_MANPP``, ``resnetInfoPro_MANPP_ddp`` and ``vit_manpp``; this
module holds something of each name with the same factories.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastlocal import models
from fastlocal.blocks.heads import ClassifierHead
from fastlocal.blocks.links import fire
from fastlocal.blocks.losses import cross_entropy
from fastlocal.blocks.man import FusedHead, Fusion
from fastlocal.blocks.types import StepContext
from fastlocal.compat import man
from fastlocal.compat._official import OfficialNetwork, cut, holder, in_layout, stage_and_unit
from fastlocal.compat.man import InfoProResNet, _Places, heads_by_place, imagenet, register_copies
from fastlocal.engine.model import LocalModel
from fastlocal.errors import ArgumentError
from fastlocal.methods import Site
from fastlocal.methods.man import MAN
from fastlocal.methods.man_plus_plus import MANPlusPlus
from fastlocal.models.residual import BasicBlock
from fastlocal.models.vit import PatchEmbed, ViTBlock
from fastlocal.ops.modules import FusedSequential


class MANPPInfoProResNet(InfoProResNet):
    """`fastlocal.compat.man.InfoProResNet` with a trained scale per head and a head on the stem, of the same arguments.

    The stem's classifier is contrastive and "1c2f" whatever the arguments say.
    """

    method: ClassVar[str] = "man_plus_plus"

    def _register_heads(self, local: LocalModel, places: _Places) -> None:
        first = _first(local, places)
        self.ema_s_first = first.scale
        self.EMA_first, self.LB_first = first.ema, first.lb
        used = heads_by_place(local)
        self._register_infopro("stem", used.get("stem"), places)
        for name in places.names[1:]:
            self._register_infopro(name, used.get(name), places)
        self._register_copies(list(local.heads)[1:])

    def _register_copies(self, heads: Iterable[nn.Module]) -> None:
        register_copies(self, heads, scaled=True)


class MANPPDGLResNet(MANPPInfoProResNet):
    """The same with a DGL-type classifier and its cross-entropy in place of InfoPro's two losses.

    ``aux_net_config``, ``local_loss_mode``, ``aux_net_widen`` and the weights that ``forward`` takes change nothing.
    """

    def _recipe(self, **options: Any) -> MAN:
        for name in ("config", "loss", "widen"):
            del options[name]
        return super()._recipe(head="dgl", **options)

    def _register_heads(self, local: LocalModel, places: _Places) -> None:
        used = heads_by_place(local)
        for name in places.names:
            head = used[name].head if name in used else places.recipe._dgl(places.site(name))
            assert isinstance(head, ClassifierHead) and isinstance(head.net, nn.Sequential)
            net = [m for m in head.net if not isinstance(m, nn.AdaptiveAvgPool2d)]  # the code pools before it
            self.add_module(f"aux_classifier_{stage_and_unit(name)}", holder(head=in_layout(net)))
        self._register_copies(list(local.heads)[1:])
        first = _first(local, places)
        self.EMA_first, self.LB_first = first.ema, first.lb
        self.ema_s_first = first.scale

    def _weigh(self, first: tuple[float, float], last: tuple[float, float]) -> None:
        """Its only loss has weight 1."""


def _first(local: LocalModel, places: _Places) -> Fusion:
    """The copies on the stem, unused with one block."""
    for head in heads_by_place(local).values():
        return head.fusion
    return Fusion(places.site("stem").next_unit, fresh=True, scaled=True)


def resnet32(**kwargs: Any) -> MANPPInfoProResNet:
    return MANPPInfoProResNet(BasicBlock, [5, 5, 5], arch="resnet32", **kwargs)


def resnet110(**kwargs: Any) -> MANPPInfoProResNet:
    return MANPPInfoProResNet(BasicBlock, [18, 18, 18], arch="resnet110", **kwargs)


def resnet32_dgl(**kwargs: Any) -> MANPPDGLResNet:
    return MANPPDGLResNet(BasicBlock, [5, 5, 5], arch="resnet32", **kwargs)


def resnet110_dgl(**kwargs: Any) -> MANPPDGLResNet:
    return MANPPDGLResNet(BasicBlock, [18, 18, 18], arch="resnet110", **kwargs)


# --- ImageNet ---------------------------------------------------------------------------------------------------------


class _ImageNet(MANPlusPlus):
    def classifier(self, site: Site) -> FusedSequential:
        return super().classifier(replace(site, num_classes=1000))  # whatever the network's own number of classes


class ResNet(man.ResNet):
    """`fastlocal.compat.man.ResNet` with a trained scale per head, in 2 or 4 blocks (``resnetInfoPro_MANPP``)."""

    recipe: ClassVar[type[MAN]] = _ImageNet
    known: ClassVar[tuple[int, ...]] = (2, 4)


class ResNetDDP(ResNet):
    """The same, one block a call (``resnetInfoPro_MANPP_ddp``); the averages move before the block's backward.

    ``local_block_num`` is the block that the next call runs.
    """

    when: ClassVar[str] = "between_forward_and_backward"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.local_block_num = 0

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
        """In training, the output of the block before (first the images) -> that of this block, detached, and its loss, from
        which the script starts ``backward()``; the last call gives logits. In eval mode the logits.
        """
        if not self.training:
            return self._logits(x)
        k = self.local_block_num
        h, loss = self._run_block(k, x, self._context(x, initial_image, target, criterion))
        self.local_block_num = (k + 1) % len(self.local.blocks)
        return h, loss


def resnet101(pretrained: bool = False, **kwargs: Any) -> ResNet:
    return imagenet(ResNet, "resnet101", pretrained, **kwargs)


def resnet152(pretrained: bool = False, **kwargs: Any) -> ResNet:
    return imagenet(ResNet, "resnet152", pretrained, **kwargs)


def resnext101_32x8d(pretrained: bool = False, **kwargs: Any) -> ResNet:
    return imagenet(ResNet, "resnext101_32x8d", pretrained, groups=32, width_per_group=8, **kwargs)


def resnet101_ddp(pretrained: bool = False, **kwargs: Any) -> ResNetDDP:
    return imagenet(ResNetDDP, "resnet101", pretrained, **kwargs)


def resnet152_ddp(pretrained: bool = False, **kwargs: Any) -> ResNetDDP:
    return imagenet(ResNetDDP, "resnet152", pretrained, **kwargs)


def resnext101_32x8d_ddp(pretrained: bool = False, **kwargs: Any) -> ResNetDDP:
    return imagenet(ResNetDDP, "resnext101_32x8d", pretrained, groups=32, width_per_group=8, **kwargs)


# --- Vision Transformers ----------------------------------------------------------------------------------------------

MANPP_K = 4


class _PatchEmbed(PatchEmbed):
    """With a norm of the embeddings."""

    def __init__(self, in_channels: int, patch_size: int, dim: int) -> None:
        super().__init__(in_channels, patch_size, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class MANPPVisionTransformer(OfficialNetwork):
    """A ViT in four groups of blocks, one group a call; the averages move before the group's backward.

    Args, by their official names:
        img_size, patch_size, in_c, num_classes, embed_dim, depth, num_heads: of the network; ``groups`` divides ``depth``.
        groups: 4.
        mlp_ratio: 4. drop_path_ratio: 0.
        momentum: weight of the past in the averages.

    Raises ArgumentError for other values. ``gidx`` is the group that the next call runs.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_c: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        groups: int = MANPP_K,
        mlp_ratio: float = 4.0,
        drop_path_ratio: float = 0.0,
        momentum: float = 0.995,
    ) -> None:
        super().__init__()
        for name, value, only in (
            ("groups", groups, MANPP_K),
            ("mlp_ratio", mlp_ratio, 4),
            ("drop_path_ratio", drop_path_ratio, 0),
        ):
            if value != only:
                raise ArgumentError(f"{name}: got {value}; this network has {only}")
        if depth % groups or depth < 2 * groups:
            raise ArgumentError(f"depth: got {depth}; give a multiple of {groups}, of at least {2 * groups}")
        net = models.ViT(
            num_classes=num_classes,
            in_channels=in_c,
            img_size=img_size,
            patch_size=patch_size,
            dim=embed_dim,
            depth=depth,
            heads=num_heads,
        )
        net.patch_embed = _PatchEmbed(in_c, patch_size, embed_dim)
        self.grp = self.manpp_k = groups
        self.bp_g, self.num_aux_stages, self.momentum, self.gidx = depth // groups, groups - 1, momentum, 0
        cuts = [f"blocks.{k * self.bp_g - 1}" for k in range(1, groups)]
        local = cut(net, MANPlusPlus(mode="official", momentum=momentum), cuts, img_size)
        self.patch = net.patch_embed
        self.cls, self.pos = net.cls_token, net.pos_embed
        self.blocks = nn.ModuleList([_official_block(block) for block in net.blocks])
        heads: list[FusedHead] = list(local.heads)  # type: ignore[arg-type]
        self.aux_lb = nn.ModuleList([nn.Sequential(*map(_official_block, _trained(head))) for head in heads])
        self.aux_ema = nn.ModuleList([_official_block(head.fusion.ema) for head in heads])
        self.aux_clf = nn.ModuleList(
            [_official_head(head, lb, ema) for head, lb, ema in zip(heads, self.aux_lb, self.aux_ema)]
        )
        self.norm, self.head = net.norm, net.head
        nn.init.trunc_normal_(net.cls_token, std=0.02)  # type: ignore[arg-type]
        self._runs(local)

    def forward(self, x: Tensor, target: Tensor | None = None) -> Any:
        """In training, the output of the group before (first the images) and the labels -> this group's output, detached, its
        loss, from which the script starts ``backward()``, and the number of the next group; the last call gives logits and
        loss. In eval mode, images -> logits.
        """
        if not self.training:
            return self._logits(x)
        if target is None:
            raise ArgumentError(
                "target: a training step needs the labels of the batch; give target=, or call model.eval()"
            )
        self._check_modules()
        k, target = self.gidx, target.to(x.device)
        block = self.local.blocks[k]
        h = block(x)
        if block.head is None:
            self.gidx = 0
            return h, cross_entropy(h, target)
        loss = block.local_loss(h, StepContext(target, None, cross_entropy)).loss
        fire(self.local.links, "between_forward_and_backward", k)
        self.gidx = k + 1
        return h.detach(), loss, torch.tensor(self.gidx, device=x.device)


def _official_block(block: nn.Module) -> nn.Module:
    assert isinstance(block, ViTBlock)
    attention = holder(qkv=block.attn.qkv, proj=block.attn.proj)
    return holder(n1=block.norm1, attn=attention, n2=block.norm2, mlp=holder(fc1=block.mlp.fc1, fc2=block.mlp.fc2))


def _net(head: FusedHead) -> nn.Sequential:
    """The second trained block, and the readout."""
    assert isinstance(head.head, ClassifierHead) and isinstance(head.head.net, nn.Sequential)
    return head.head.net


def _trained(head: FusedHead) -> tuple[nn.Module, nn.Module]:
    return head.fusion.lb, _net(head)[0]


def _official_head(head: FusedHead, lb: nn.Module, ema: nn.Module) -> nn.Module:
    readout = _net(head)[1]
    assert isinstance(readout, nn.Sequential)
    made = holder(lb_block=lb, ema_block=ema, norm=readout[0], head=readout[2])
    made.register_parameter("s", head.fusion.scale)
    return made


def manpp_vit_tiny_patch16_224(num_classes: int = 1000, **kw: Any) -> MANPPVisionTransformer:
    return MANPPVisionTransformer(**{"embed_dim": 192, "num_heads": 3, "num_classes": num_classes, **kw})


def manpp_vit_small_patch16_224(num_classes: int = 1000, **kw: Any) -> MANPPVisionTransformer:
    return MANPPVisionTransformer(**{"embed_dim": 384, "num_heads": 6, "num_classes": num_classes, **kw})


def manpp_vit_base_patch16_224(num_classes: int = 1000, **kw: Any) -> MANPPVisionTransformer:
    return MANPPVisionTransformer(**{"num_classes": num_classes, **kw})


MANPP_VIT_FACTORIES = {
    "vit_tiny": manpp_vit_tiny_patch16_224,
    "vit_small": manpp_vit_small_patch16_224,
    "vit_base": manpp_vit_base_patch16_224,
}

# --- what the official scripts import ---------------------------------------------------------------------------------

resnetInfoPro_MANPP = resnetInfoPro_MAN = SimpleNamespace(
    resnet32=resnet32, resnet110=resnet110, resnet101=resnet101, resnet152=resnet152, resnext101_32x8d=resnext101_32x8d
)
resnetDGL_MANPP = resnetDGL_MAN = SimpleNamespace(resnet32=resnet32_dgl, resnet110=resnet110_dgl)
resnetInfoPro_MANPP_ddp = resnetInfoPro_MAN_ddp = SimpleNamespace(
    resnet101=resnet101_ddp, resnet152=resnet152_ddp, resnext101_32x8d=resnext101_32x8d_ddp
)
vit_manpp = SimpleNamespace(MANPP_K=MANPP_K, MANPP_VIT_FACTORIES=MANPP_VIT_FACTORIES)
