"""CIFAR ResNets, in the form that the InfoPro family uses (InfoPro, AugLocal, MAN, HPFF).

Three stages of widths 16, 32, 64 on a 3x3 stem without pooling; shortcuts that change shape are 1x1 convolutions with
BN (2,752 parameters more than the parameter-free shortcuts of He et al. 2016). Parameter names and initialisation are
those of https://github.com/ChenxiangMA/AugLocal.
"""

from typing import Any

from torch import nn

from fastlocal.models._common import positive_int
from fastlocal.models.residual import BasicBlock, ResidualNet, stem_width


class ResNetCIFAR(ResidualNet):
    """CIFAR ResNet of depth ``6 * blocks_per_stage + 2``: images [B, in_channels, H, W] -> logits [B, num_classes].

    Args:
        blocks_per_stage: residual blocks in each of the three stages.
        width: channels of the first stage; the others have two and four times as many. A float is rounded down.
        dropout: probability of a Dropout between the first ReLU and the second convolution of every block.

    Raises ArgumentError for a non-positive size or a ``dropout`` outside [0, 1).
    """

    def __init__(
        self,
        blocks_per_stage: int,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        width: int | float = 16,
        dropout: float = 0.0,
    ) -> None:
        depth = positive_int("blocks_per_stage", blocks_per_stage)
        stem = nn.Conv2d(positive_int("in_channels", in_channels), stem_width(width, 16), 3, padding=1, bias=False)
        super().__init__(BasicBlock, (depth,) * 3, stem, None, num_classes, width, dropout)


def resnet20(**options: Any) -> ResNetCIFAR:
    return ResNetCIFAR(3, **options)


def resnet32(**options: Any) -> ResNetCIFAR:
    return ResNetCIFAR(5, **options)


def resnet44(**options: Any) -> ResNetCIFAR:
    return ResNetCIFAR(7, **options)


def resnet56(**options: Any) -> ResNetCIFAR:
    return ResNetCIFAR(9, **options)


def resnet110(**options: Any) -> ResNetCIFAR:
    return ResNetCIFAR(18, **options)


def resnet1202(**options: Any) -> ResNetCIFAR:
    return ResNetCIFAR(200, **options)
