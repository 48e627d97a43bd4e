"""The CIFAR network of "Decoupled Greedy Learning of CNNs" (Belilovsky et al. 2020, arXiv:1901.08164).

Parameter names of the convolutions are those of ``auxiliary_nets_study/models.py`` in https://github.com/eugenium/DGL;
the last auxiliary network there, ``auxillary_nets.5.classifier``, is the readout here, ``classifier``.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlocal.errors import ArgumentError
from fastlocal.models._common import pool_linear, positive_int, stride_1_or_2, unit_index
from fastlocal.ops.modules import FusedSequential


def _layer(in_channels: int, out_channels: int, pool: bool) -> FusedSequential:
    conv = [nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels), nn.ReLU()]
    return FusedSequential(nn.MaxPool2d(2), *conv) if pool else FusedSequential(*conv)


class DGLCNN(nn.Module):
    """``depth`` 3x3 convolutions and a 3-layer perceptron: images [B, in_channels, H, W] -> logits [B, num_classes].

    Args:
        img_size: height and width of the images; it sets the readout's first pooling.
        feature_size: channels of the first convolution.
        depth: number of convolutions.
        downsample: indices of the convolutions that follow a 2x2 max-pool and double the channels.

    Raises ArgumentError for a non-positive size or an index in ``downsample`` that is not in 1..depth-1.
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        img_size: int = 32,
        feature_size: int = 128,
        depth: int = 6,
        downsample: Sequence[int] = (1, 3),
    ) -> None:
        super().__init__()
        self.num_classes = positive_int("num_classes", num_classes)
        out_channels = positive_int("feature_size", feature_size)
        depth = positive_int("depth", depth)
        size: float = positive_int("img_size", img_size)
        if not set(downsample) <= set(range(1, depth)):
            raise ArgumentError(
                f"downsample must hold indices of convolutions, 1 to {depth - 1}, got {tuple(downsample)}"
            )
        channels = positive_int("in_channels", in_channels)
        self.widths: list[int] = []
        layers = []
        for index in range(depth):
            if index in downsample:
                out_channels *= 2
                size /= 2
            layers.append(_layer(channels, out_channels, pool=index in downsample))
            self.widths.append(out_channels)
            channels = out_channels
        self.blocks = nn.Sequential(*layers)
        self.pool_size = math.ceil(size / 4)
        features = 4 * channels
        self.classifier = FusedSequential(
            nn.Linear(features, features),
            nn.BatchNorm1d(features),
            nn.ReLU(inplace=True),
            nn.Linear(features, features),
            nn.BatchNorm1d(features),
            nn.ReLU(inplace=True),
            nn.Linear(features, self.num_classes),
        )

    def units(self) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
        return [(f"blocks.{index}", unit) for index, unit in enumerate(self.blocks)]

    def readout(self, h: Tensor) -> Tensor:
        h = F.adaptive_avg_pool2d(h, self.pool_size)
        h = F.adaptive_avg_pool2d(h, 2)
        return self.classifier(torch.flatten(h, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.blocks(x))

    def make_unit(self, i: int, in_channels: int, stride: int) -> nn.Module:
        """A fresh convolution, BN and ReLU of unit ``i``'s width, after a 2x2 max-pool where ``stride`` is 2."""
        width = self.widths[unit_index(i, len(self.widths))]
        return _layer(positive_int("in_channels", in_channels), width, pool=stride_1_or_2(stride) == 2)

    def make_readout(self, in_features: int, num_classes: int) -> nn.Module:
        """A fresh global average pool, flatten and Linear."""
        return pool_linear(in_features, num_classes)


def dgl_cnn(**options: Any) -> DGLCNN:
    return DGLCNN(**options)
