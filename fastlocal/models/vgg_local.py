"""VGG8b and VGG11b of "Training Neural Networks with Local Error Signals" (Nokland and Eidnes 2019, arXiv:1901.06656).

Parameter names are those of https://github.com/anokland/local-loss (its local heads live with the method, not here):
``features.N.encoder``, ``features.N.bn``, ``classifier.layers.M.encoder``, ``classifier.layers.M.bn`` and
``classifier.layer_out``.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from fastlocal.errors import ArgumentError
from fastlocal.models._common import pool_linear, positive_int, probability, stride_1_or_2, unit_index
from fastlocal.ops.modules import norm_act

_NONLINEARITIES = ("relu", "leakyrelu")
_VGG8B = (128, 256, "M", 256, 512, "M", 512, "M", 512, "M")
_VGG11B = (128, 128, 128, 256, "M", 256, 512, "M", 512, 512, "M", 512, "M")


class LocalLayer(nn.Module):
    """One separately trained layer: [dropout, max-pool, flatten of its input,] convolution or Linear, BN, ReLU."""

    def __init__(self, pre: Sequence[nn.Module], encoder: nn.Module, bn: nn.Module, nonlin: str) -> None:
        super().__init__()
        self.pre = nn.Sequential(*pre) if pre else None
        self.encoder = encoder
        self.bn = bn
        self.nonlin = nn.ReLU(inplace=True) if nonlin == "relu" else nn.LeakyReLU(0.01, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.pre is not None:
            x = self.pre(x)
        return norm_act(self.encoder(x), self.bn, self.nonlin)


class OutputLayer(nn.Linear):
    """A Linear with parameter-free modules before it."""

    def __init__(self, pre: Sequence[nn.Module], in_features: int, num_classes: int) -> None:
        super().__init__(in_features, num_classes)
        self.pre = nn.Sequential(*pre) if pre else None

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input if self.pre is None else self.pre(input))


class Classifier(nn.Module):
    """Hidden Linear layers ``layers`` and the output layer ``layer_out``, whose weight starts at zero."""

    def __init__(self, layers: Sequence[LocalLayer], layer_out: OutputLayer) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.layer_out = layer_out
        nn.init.zeros_(layer_out.weight)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.layer_out(x)


class _PoolLinear(nn.Sequential):
    """``pool_linear`` that also takes the flat output of a Linear layer."""

    def forward(self, input: Tensor) -> Tensor:
        return self[-1](input) if input.ndim == 2 else super().forward(input)


class VGGLocal(nn.Module):
    """VGG-like network of local-loss: images [B, in_channels, img_size, img_size] -> logits [B, num_classes].

    Every convolution, every hidden Linear and the output layer is a unit of its own, because each has its own loss in
    the paper; ``readout`` is therefore the identity. Dropout and max-pool run at the start of the next unit, so that a
    local loss sees the value before them; ``features`` keeps the published numbering, with an Identity at the pool's
    index.

    Args:
        layout: channels of each convolution, "M" for a 2x2 max-pool.
        img_size: height and width of the images. Above 64 the first convolution is 7x7 with stride 2, as published.
        feat_mult: multiplies the channels of every convolution, rounded down.
        num_layers, num_hidden: hidden Linear layers and their width; with ``num_layers=0`` the output layer, then named
            ``classifier``, follows the convolutions.
        dropout: probability, per channel after a convolution (Dropout2d), per number after a Linear.
        nonlin: "relu" or "leakyrelu" (slope 0.01).

    Raises ArgumentError for a non-positive size, a ``dropout`` outside [0, 1), an unknown ``nonlin``, a ``feat_mult``
    that leaves no channel, or an ``img_size`` that the pools shrink to nothing.
    """

    def __init__(
        self,
        layout: Sequence[int | str],
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        img_size: int = 32,
        feat_mult: float = 1.0,
        num_layers: int = 1,
        num_hidden: int = 1024,
        dropout: float = 0.0,
        nonlin: str = "relu",
    ) -> None:
        super().__init__()
        self.num_classes = positive_int("num_classes", num_classes)
        size = positive_int("img_size", img_size)
        num_hidden = positive_int("num_hidden", num_hidden)
        probability("dropout", dropout)
        if nonlin not in _NONLINEARITIES:
            raise ArgumentError(f"nonlin must be one of {', '.join(_NONLINEARITIES)}, got {nonlin!r}")
        if num_layers != 0:
            positive_int("num_layers", num_layers)
        if any(int(entry * feat_mult) < 1 for entry in layout if isinstance(entry, int)):
            raise ArgumentError(f"feat_mult must leave at least one channel in every convolution, got {feat_mult!r}")
        self.nonlin = nonlin
        self.widths: list[int] = []
        self.unit_names: list[str] = []

        layers: list[nn.Module] = []
        pre: list[nn.Module] = []  # what the next unit does to its input first
        channels = positive_int("in_channels", in_channels)
        for entry in layout:
            if not isinstance(entry, int):
                pre.append(nn.MaxPool2d(2))
                size //= 2
                layers.append(nn.Identity())
                continue
            large = not self.widths and size > 64
            out_channels = int(entry * feat_mult)
            conv = nn.Conv2d(channels, out_channels, 7, 2, 3) if large else nn.Conv2d(channels, out_channels, 3, 1, 1)
            size = size // 2 if large else size
            self._add_unit(f"features.{len(layers)}", out_channels)
            layers.append(LocalLayer(pre, conv, nn.BatchNorm2d(out_channels), nonlin))
            pre = [nn.Dropout2d(dropout)] if dropout > 0 else []
            channels = out_channels
        if size < 1:
            raise ArgumentError(f"img_size must be large enough for the max-pools of this layout, got {img_size}")
        self.features = nn.Sequential(*layers)

        pre.append(nn.Flatten())
        features = channels * size * size
        hidden: list[LocalLayer] = []
        for index in range(num_layers):
            self._add_unit(f"classifier.layers.{index}", num_hidden)
            hidden.append(LocalLayer(pre, nn.Linear(features, num_hidden), nn.BatchNorm1d(num_hidden), nonlin))
            pre = [nn.Dropout(dropout)] if dropout > 0 else []
            features = num_hidden
        self._add_unit("classifier.layer_out" if hidden else "classifier", self.num_classes)
        layer_out = OutputLayer(pre, features, self.num_classes)
        self.classifier = Classifier(hidden, layer_out) if hidden else layer_out

    def _add_unit(self, name: str, width: int) -> None:
        self.unit_names.append(name)
        self.widths.append(width)

    def units(self) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
        return [(name, self.get_submodule(name)) for name in self.unit_names]

    def readout(self, h: Tensor) -> Tensor:
        return h

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))

    def make_unit(self, i: int, in_channels: int, stride: int) -> nn.Module:
        """A fresh layer of unit ``i``'s kind and width, without dropout.

        A convolution takes a map of ``in_channels``, max-pooled first where ``stride`` is 2; a Linear layer takes
        ``in_channels`` flat features and no stride. Raises ArgumentError otherwise.
        """
        width = self.widths[unit_index(i, len(self.widths))]
        in_channels = positive_int("in_channels", in_channels)
        if self.unit_names[i].startswith("features"):
            pre = [nn.MaxPool2d(2)] if stride_1_or_2(stride) == 2 else []
            conv = nn.Conv2d(in_channels, width, 3, padding=1)
            return LocalLayer(pre, conv, nn.BatchNorm2d(width), self.nonlin)
        if stride != 1:
            raise ArgumentError(f"stride must be 1: unit {i} ({self.unit_names[i]}) is a Linear layer, got {stride!r}")
        if i == len(self.widths) - 1:
            layer_out = OutputLayer((), in_channels, width)
            nn.init.zeros_(layer_out.weight)
            return layer_out
        return LocalLayer((), nn.Linear(in_channels, width), nn.BatchNorm1d(width), self.nonlin)

    def make_readout(self, in_features: int, num_classes: int) -> nn.Module:
        """A fresh Linear, after a global average pool where its input is a map."""
        return _PoolLinear(*pool_linear(in_features, num_classes))


def vgg8b(**options: Any) -> VGGLocal:
    return VGGLocal(_VGG8B, **options)


def vgg11b(**options: Any) -> VGGLocal:
    return VGGLocal(_VGG11B, **options)
