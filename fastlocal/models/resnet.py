"""ImageNet ResNets with torchvision's parameter names (also those of AugLocal's ImageNet code)."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from fastlocal.models._common import positive_int
from fastlocal.models.residual import BasicBlock, Bottleneck, ResidualNet, stem_width


class ResNet(ResidualNet):
    """ImageNet ResNet: images [B, in_channels, H, W] -> logits [B, num_classes].

    The stem (7x7 stride-2 convolution, BN, ReLU, 3x3 stride-2 max-pool) is one unit.

    Args:
        block: BasicBlock or Bottleneck.
        depths: residual blocks in each of the four stages.
        width: channels of the stem and planes of the first stage; each later stage has twice as many.
        dropout: probability of a Dropout after the first ReLU of every block.
        groups, width_per_group: ResNeXt's, for Bottlenecks: groups of the 3x3 convolutions, and channels of one group in
            the first stage where ``width`` is 64.

    Raises ArgumentError for a non-positive size or a ``dropout`` outside [0, 1).
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        width: int | float = 64,
        dropout: float = 0.0,
        groups: int = 1,
        width_per_group: int = 64,
    ) -> None:
        channels = stem_width(width, 64)
        stem = nn.Conv2d(positive_int("in_channels", in_channels), channels, 7, stride=2, padding=3, bias=False)
        pool = nn.MaxPool2d(3, stride=2, padding=1)
        super().__init__(block, depths, stem, pool, num_classes, width, dropout, groups, width_per_group)


def resnet18(**options: Any) -> ResNet:
    return ResNet(BasicBlock, (2, 2, 2, 2), **options)


def resnet34(**options: Any) -> ResNet:
    return ResNet(BasicBlock, (3, 4, 6, 3), **options)


def resnet50(**options: Any) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 6, 3), **options)


def resnet101(**options: Any) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 23, 3), **options)


def resnet152(**options: Any) -> ResNet:
    return ResNet(Bottleneck, (3, 8, 36, 3), **options)


def resnext50_32x4d(*, groups: int = 32, width_per_group: int = 4, **options: Any) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 6, 3), groups=groups, width_per_group=width_per_group, **options)


def resnext101_32x8d(*, groups: int = 32, width_per_group: int = 8, **options: Any) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 23, 3), groups=groups, width_per_group=width_per_group, **options)
