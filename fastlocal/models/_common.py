"""Argument checks and small parts shared by the models."""

import operator

from torch import nn

from fastlocal.errors import ArgumentError


def positive_int(name: str, value: int) -> int:
    """Return ``value`` as an int >= 1, or raise an ArgumentError that names the argument."""
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1 or isinstance(value, bool):
        raise ArgumentError(f"{name} must be an integer of at least 1, got {value!r}")
    return number


def probability(name: str, value: float) -> float:
    """Return ``value`` as a float in [0, 1), or raise an ArgumentError that names the argument."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value < 1.0:
        raise ArgumentError(f"{name} must be a number in [0, 1), got {value!r}")
    return float(value)


def unit_index(i: int, count: int) -> int:
    """Return ``i`` if it numbers one of ``count`` units, else raise an ArgumentError."""
    if not 0 <= i < count:
        raise ArgumentError(f"i must be the index of a unit, 0 to {count - 1}, got {i!r}")
    return i


def stride_1_or_2(stride: int) -> int:
    """Return ``stride`` if it is 1 or 2 (a 2x2 max-pool in the models that use this), else raise an ArgumentError."""
    if stride not in (1, 2):
        raise ArgumentError(f"stride must be 1 or 2 (2 puts a 2x2 max-pool first), got {stride!r}")
    return stride


def token_width(in_channels: int, stride: int, dim: int) -> None:
    """Refuse a transformer block whose width or stride differs from the backbone's: its residual stream is fixed."""
    if in_channels != dim:
        raise ArgumentError(f"in_channels must be {dim}, the width of the residual stream, got {in_channels!r}")
    if stride != 1:
        raise ArgumentError(f"stride must be 1 (a transformer block keeps every token), got {stride!r}")


def init_conv_bn(module: nn.Module) -> nn.Module:
    """Fill every convolution with N(0, sqrt(2 / (k*k*C_out))) and every batch norm with 1 and 0, in place."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, nn.BatchNorm2d):
            nn.init.ones_(m.weight)
            nn.init.zeros_(m.bias)
    return module


def pool_linear(in_features: int, num_classes: int) -> nn.Sequential:
    """Global average pool, flatten, Linear: [B, C, H, W] -> [B, num_classes]."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_features, num_classes))
