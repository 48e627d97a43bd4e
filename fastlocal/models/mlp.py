"""A multi-layer perceptron."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from fastlocal.errors import ArgumentError
from fastlocal.models._common import positive_int, probability, unit_index
from fastlocal.ops.modules import norm_act


class MLPLayer(nn.Module):
    """[Dropout of its input,] flatten, Linear, [BN,] ReLU: [B, ...] -> [B, out_features]."""

    def __init__(self, in_features: int, out_features: int, batch_norm: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout) if dropout > 0 else None
        self.linear = nn.Linear(in_features, out_features)
        self.bn = nn.BatchNorm1d(out_features) if batch_norm else None
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        if self.dropout is not None:
            x = self.dropout(x)
        x = self.linear(x)
        return self.relu(x) if self.bn is None else norm_act(x, self.bn, self.relu)


class MLP(nn.Module):
    """Perceptron with ReLU: inputs [B, ...] of ``in_features`` numbers each -> logits [B, num_classes].

    Args:
        hidden: widths of the hidden layers, each a unit. The output layer ``head`` is the readout.
        batch_norm: a BatchNorm1d between every hidden Linear and its ReLU.
        dropout: probability, on every hidden layer's output (it runs at the start of what follows).

    Raises ArgumentError for a non-positive size, an empty ``hidden`` or a ``dropout`` outside [0, 1).
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        in_features: int = 784,
        hidden: Sequence[int] = (1024, 1024, 1024),
        batch_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes = positive_int("num_classes", num_classes)
        if isinstance(hidden, int) or not hidden:
            raise ArgumentError(
                f"hidden must be a sequence of at least one width, such as (1024, 1024), got {hidden!r}"
            )
        self.widths = [positive_int("hidden", width) for width in hidden]
        self.batch_norm = batch_norm
        probability("dropout", dropout)
        ins = [positive_int("in_features", in_features), *self.widths]
        self.layers = nn.Sequential(
            *(MLPLayer(ins[k], width, batch_norm, dropout if k > 0 else 0.0) for k, width in enumerate(self.widths))
        )
        self.dropout = nn.Dropout(dropout) if dropout > 0 else None
        self.head = nn.Linear(self.widths[-1], self.num_classes)

    def units(self) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
        return [(f"layers.{index}", unit) for index, unit in enumerate(self.layers)]

    def readout(self, h: Tensor) -> Tensor:
        return self.head(h if self.dropout is None else self.dropout(h))

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.layers(x))

    def make_unit(self, i: int, in_channels: int, stride: int) -> nn.Module:
        """A fresh hidden layer of unit ``i``'s width on ``in_channels`` features, no dropout; ``stride`` must be 1."""
        if stride != 1:
            raise ArgumentError(f"stride must be 1 (a Linear layer has no stride), got {stride!r}")
        width = self.widths[unit_index(i, len(self.widths))]
        return MLPLayer(positive_int("in_channels", in_channels), width, self.batch_norm)

    def make_readout(self, in_features: int, num_classes: int) -> nn.Module:
        """A fresh Linear."""
        return nn.Linear(in_features, num_classes)


def mlp(**options: Any) -> MLP:
    return MLP(**options)
