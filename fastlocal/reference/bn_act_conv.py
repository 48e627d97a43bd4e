"""Batch normalisation, an activation and a convolution (or a linear layer), as ordinary operators."""

from __future__ import annotations

from torch import Tensor, nn

from fastlocal.reference.bn_act import bn_act


def bn_act_conv(x: Tensor, norm: nn.Module, conv: nn.Module, *, act: str = "relu", slope: float = 0.01) -> Tensor:
    """``conv(act(norm(x)))``.

    Args:
        x: what ``norm`` takes.
        norm: a BatchNorm module (any other normalisation too); its statistics are updated as by calling it.
        conv: what takes the activation.
        act: "relu", "leaky_relu" or "none".
        slope: of "leaky_relu" below zero.
    """
    return conv(bn_act(x, norm, act=act, slope=slope))
