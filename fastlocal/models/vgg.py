"""VGG with batch norm in ImageNet form (Simonyan and Zisserman 2015), as AugLocal and DGL train it.

Parameter names are those of ``exp_imagenet/networks/vgg.py`` in https://github.com/ChenxiangMA/AugLocal:
``features.N.conv1``, ``features.N.bn1``, ``fc.M``.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastlocal.models._common import init_conv_bn, pool_linear, positive_int, probability, unit_index
from fastlocal.ops.modules import FusedSequential, norm_act

# Convolutions in each of the five stages; stage widths are 1, 2, 4, 8, 8 times the first.
_STAGE_WIDTHS = (1, 2, 4, 8, 8)


class VGGLayer(nn.Module):
    """[2x2 max-pool,] 3x3 convolution, BN, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, pool: bool) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2) if pool else None
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = self.pool(x)
        return norm_act(self.conv1(x), self.bn1, self.relu)


class VGG(nn.Module):
    """VGG with BN: images [B, in_channels, H, W] (H, W at least 32) -> logits [B, num_classes].

    Every convolution (with BN and ReLU) is a unit. A max-pool between two units runs at the start of the second, so
    that a local loss sees the map before it; ``features`` keeps the published numbering, with an Identity at the pool's
    index. The last max-pool is part of the readout.

    Args:
        depths: convolutions in each of the five stages.
        width: channels of the first stage.
        hidden: width of the two hidden Linear layers of the readout.
        dropout: probability of the two Dropouts of the readout.

    Raises ArgumentError for a non-positive size or a ``dropout`` outside [0, 1).
    """

    def __init__(
        self,
        depths: Sequence[int],
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        width: int = 64,
        hidden: int = 4096,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.num_classes = positive_int("num_classes", num_classes)
        width = positive_int("width", width)
        hidden = positive_int("hidden", hidden)
        probability("dropout", dropout)
        self.widths: list[int] = []
        self.unit_names: list[str] = []
        layers: list[nn.Module] = []
        channels = positive_int("in_channels", in_channels)
        for stage, depth in enumerate(depths):
            for index in range(depth):
                out_channels = width * _STAGE_WIDTHS[stage]
                self.unit_names.append(f"features.{len(layers)}")
                self.widths.append(out_channels)
                layers.append(VGGLayer(channels, out_channels, pool=stage > 0 and index == 0))
                channels = out_channels
            layers.append(nn.Identity() if stage + 1 < len(depths) else nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        self.fc = nn.Sequential(
            nn.Linear(channels * 7 * 7, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, self.num_classes),
        )
        init_conv_bn(self.features)
        for m in self.fc:
            if isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, 0.0, 0.01)
                nn.init.zeros_(m.bias)

    def units(self) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
        return [(name, self.get_submodule(name)) for name in self.unit_names]

    def readout(self, h: Tensor) -> Tensor:
        return self._classify(self.features[-1](h))

    def _classify(self, h: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.avgpool(h), 1))

    def forward(self, x: Tensor) -> Tensor:
        return self._classify(self.features(x))

    def make_unit(self, i: int, in_channels: int, stride: int) -> nn.Module:
        """AugLocal's auxiliary layer of unit ``i``'s width: a max-pool where the width changes, convolution, BN, ReLU.

        The change of width alone decides on the pool, as in AugLocal; ``stride`` is not read. Initialised as torch does
        it, because AugLocal builds these after it initialised the network.
        """
        out_channels = self.widths[unit_index(i, len(self.widths))]
        layers: list[nn.Module] = [nn.MaxPool2d(2)] if in_channels != out_channels else []
        layers += [
            nn.Conv2d(positive_int("in_channels", in_channels), out_channels, 3, padding=1),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        ]
        return FusedSequential(*layers)

    def make_readout(self, in_features: int, num_classes: int) -> nn.Module:
        """A fresh global average pool, flatten and Linear."""
        return pool_linear(in_features, num_classes)

    def make_aux_readout(self, in_features: int, num_classes: int) -> nn.Module:
        """AugLocal's readout of a VGG auxiliary network: the flat map averaged to 512 numbers, then three Linear.

        The pooling makes it independent of the map's size, so ``in_features`` is not read.
        """
        return FusedSequential(
            nn.Flatten(),
            nn.AdaptiveAvgPool1d(512),
            nn.Linear(512, 512),
            nn.BatchNorm1d(512),
            nn.ReLU(inplace=True),
            nn.Linear(512, 512),
            nn.BatchNorm1d(512),
            nn.ReLU(inplace=True),
            nn.Linear(512, num_classes),
        )


def vgg13(**options: Any) -> VGG:
    return VGG((2, 2, 2, 2, 2), **options)


def vgg19(**options: Any) -> VGG:
    return VGG((2, 2, 4, 4, 4), **options)
