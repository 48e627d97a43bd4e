"""Residual blocks and the network both ResNet families are made of (He et al. 2016, arXiv:1512.03385)."""

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastlocal.errors import ArgumentError
from fastlocal.models._common import init_conv_bn, pool_linear, positive_int, probability, unit_index
from fastlocal.ops.modules import hooked, norm_act, norm_act_conv, norm_act_pool


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, groups=groups, bias=False)


def _projection(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """1x1 convolution + BN for the shortcut, or None where the shortcut is the identity."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
    )


class _Residual(nn.Module):
    """What both residual blocks share: how the shortcut joins, and what a global mean of the output needs."""

    relu: nn.Module
    dropout: nn.Module | None
    downsample: nn.Sequential | None

    @abstractmethod
    def _main(self, x: Tensor) -> tuple[Tensor, nn.Module]:
        """The main path up to its last norm, and that norm."""

    def _shortcut(self, x: Tensor) -> tuple[Tensor, nn.Module | None]:
        """The shortcut, or what goes into the norm that ends it, and that norm."""
        if self.downsample is None:
            return x, None
        if len(self.downsample) != 2 or hooked(self.downsample):
            return self.downsample(x), None
        return self.downsample[0](x), self.downsample[1]

    def _act_conv(self, x: Tensor, norm: nn.Module, conv: nn.Module, dropout: nn.Module | None = None) -> Tensor:
        if dropout is None:
            return norm_act_conv(x, norm, self.relu, conv)
        return conv(dropout(norm_act(x, norm, self.relu)))

    def forward(self, x: Tensor) -> Tensor:
        out, norm = self._main(x)
        return norm_act(out, norm, self.relu, *self._shortcut(x))

    def pooled(self, x: Tensor) -> Tensor:
        """The mean of ``self(x)`` over all positions, [B, C]; the map itself need not be stored."""
        out, norm = self._main(x)
        return norm_act_pool(out, norm, self.relu, *self._shortcut(x))


class BasicBlock(_Residual):
    """Two 3x3 convolutions and a shortcut: [B, in_channels, H, W] -> [B, planes, H/stride, W/stride]."""

    expansion = 1

    def __init__(self, in_channels: int, planes: int, stride: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else None
        self.conv2 = _conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = _projection(in_channels, planes, stride)

    def _main(self, x: Tensor) -> tuple[Tensor, nn.Module]:
        return self._act_conv(self.conv1(x), self.bn1, self.conv2, self.dropout), self.bn2


class Bottleneck(_Residual):
    """1x1, 3x3 (strided), 1x1 convolutions and a shortcut: [B, in_channels, H, W] -> [B, 4*planes, H/stride, W/stride].

    The stride sits on the 3x3 convolution, as in torchvision. ResNeXt (Xie et al. 2017, arXiv:1611.05431) has ``groups`` groups
    there, of ``width_per_group`` channels each where ``planes`` is 64, and in proportion elsewhere.
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        planes: int,
        stride: int = 1,
        dropout: float = 0.0,
        groups: int = 1,
        width_per_group: int = 64,
    ) -> None:
        super().__init__()
        inner = int(planes * (width_per_group / 64)) * groups
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = _conv3x3(inner, inner, stride, groups)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, planes * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else None
        self.downsample = _projection(in_channels, planes * self.expansion, stride)

    def _main(self, x: Tensor) -> tuple[Tensor, nn.Module]:
        out = self._act_conv(self.conv1(x), self.bn1, self.conv2, self.dropout)
        return self._act_conv(out, self.bn2, self.conv3), self.bn3


class ResidualNet(nn.Module):
    """Stem, stages ``layer1``, ``layer2``, ... of residual blocks, global average pool, ``fc``.

    Every stage doubles the width; every stage but the first starts with stride 2. Subclasses give the stem: a
    convolution, and a max-pool that follows its BN and ReLU (or None).
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        stem_conv: nn.Conv2d,
        stem_pool: nn.Module | None,
        num_classes: int,
        width: int | float,
        dropout: float,
        groups: int = 1,
        width_per_group: int = 64,
    ) -> None:
        super().__init__()
        self.num_classes = positive_int("num_classes", num_classes)
        probability("dropout", dropout)
        planes = [int(width * 2**stage) for stage in range(len(depths))]
        self.block = block
        self.groups = positive_int("groups", groups)
        self.width_per_group = positive_int("width_per_group", width_per_group)
        if block is not Bottleneck and (groups, width_per_group) != (1, 64):
            raise ArgumentError(
                f"groups={groups}, width_per_group={width_per_group}: {block.__name__} has neither; take a network of "
                "Bottlenecks (resnet50 and deeper), or leave them at 1 and 64"
            )
        if int(planes[0] * (width_per_group / 64)) < 1:
            raise ArgumentError(
                f"width_per_group={width_per_group} leaves no channel at width={width}; give at least {-(-64 // planes[0])}"
            )
        self.widths = [planes[0]] + [p for p, depth in zip(planes, depths, strict=True) for _ in range(depth)]
        self.conv1 = stem_conv
        self.bn1 = nn.BatchNorm2d(planes[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = stem_pool
        self.stages = [f"layer{stage + 1}" for stage in range(len(depths))]
        channels = planes[0]
        for name, p, depth in zip(self.stages, planes, depths, strict=True):
            blocks = []
            for index in range(depth):
                stride = 2 if index == 0 and name != "layer1" else 1
                blocks.append(self._block(channels, p, stride, dropout))
                channels = p * block.expansion
            setattr(self, name, nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, self.num_classes)
        init_conv_bn(self)

    def stem(self, x: Tensor) -> Tensor:
        x = norm_act(self.conv1(x), self.bn1, self.relu)
        return x if self.maxpool is None else self.maxpool(x)

    def units(self) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
        named: list[tuple[str, Callable[[Tensor], Tensor]]] = [("stem", self.stem)]
        for stage in self.stages:
            named += [(f"{stage}.{index}", unit) for index, unit in enumerate(getattr(self, stage))]
        return named

    def readout(self, h: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.avgpool(h), 1))

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_channels, H, W] -> logits [B, num_classes]."""
        x = self.stem(x)
        for stage in self.stages:
            x = getattr(self, stage)(x)
        return self.readout(x)

    def make_unit(self, i: int, in_channels: int, stride: int) -> nn.Module:
        """A fresh residual block of unit ``i``'s width (for the stem too), projected where its shape changes.

        Without dropout, as in AugLocal's auxiliary networks. Raises ArgumentError for an ``i`` that is no unit.
        """
        planes = self.widths[unit_index(i, len(self.widths))]
        return init_conv_bn(self._block(positive_int("in_channels", in_channels), planes, stride))

    def _block(self, in_channels: int, planes: int, stride: int, dropout: float = 0.0) -> nn.Module:
        if self.block is Bottleneck:
            return Bottleneck(in_channels, planes, stride, dropout, self.groups, self.width_per_group)
        return self.block(in_channels, planes, stride, dropout)

    def make_readout(self, in_features: int, num_classes: int) -> nn.Module:
        """A fresh global average pool, flatten and Linear."""
        return pool_linear(in_features, num_classes)


def stem_width(width: int | float, usual: int) -> int:
    """Channels of the first stage, or an ArgumentError where ``width`` is no width."""
    if isinstance(width, bool) or not isinstance(width, (int, float)) or width < 1:
        raise ArgumentError(
            f"width must be at least 1, the channels of the first stage (usually {usual}), got {width!r}"
        )
    return int(width)
