"""Auxiliary networks on the patches of a feature map (HPFF): one network for all of them, or one for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastlocal.blocks.heads import InfoProHead
from fastlocal.blocks.types import StepContext


def split(x: Tensor, n: int) -> Tensor:
    """[B, C, H, W] -> its n x n patches, row by row: [B, n * n, C, H / n, W / n], a view as far as that goes."""
    b, c, h, w = x.shape
    return x.view(b, c, n, h // n, n, w // n).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


class PatchHead(InfoProHead):
    """InfoPro's losses where the decoder gives the logits of n x n patches, [B, n * n, C, h, w]; without patches, as there."""

    def __init__(self, *args: Any, patches: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.patches = patches  # of all heads of a model alike, which share the image

    def _image(self, ctx: StepContext) -> Tensor:
        image = super()._image(ctx)
        return split(image, self.patches).contiguous() if self.patches > 1 else image


class PatchMean(nn.Module):
    """The mean over n x n patches of what ``net`` gives for each: [B, C, H, W] -> [B, F]."""

    def __init__(self, net: nn.Module, n: int) -> None:
        super().__init__()
        self.net, self.n = net, n

    def forward(self, x: Tensor) -> Tensor:
        features = self.net(split(x, self.n).flatten(0, 1))
        return features.unflatten(0, (len(x), self.n**2)).mean(1)


class Patchwise(nn.Module):
    """``net`` on every one of n x n patches: [B, C, H, W] -> [B, n * n, *]; with n = 1 just ``net``."""

    def __init__(self, net: nn.Module, n: int) -> None:
        super().__init__()
        self.net, self.n = net, n

    def forward(self, x: Tensor) -> Tensor:
        if self.n == 1:
            return self.net(x)
        return self.net(split(x, self.n).flatten(0, 1)).unflatten(0, (len(x), self.n**2))


class PatchDecoders(nn.ModuleList):
    """A network of its own for each of n x n patches: [B, C, H, W] -> [B, n * n, *]."""

    def __init__(self, nets: Sequence[nn.Module], n: int) -> None:
        super().__init__(nets)
        self.n = n

    def forward(self, x: Tensor) -> Tensor:
        # Unbound, not sliced: the gradients of slices would each be a map of zeros, to be filled and added up.
        rows = x.unflatten(2, (self.n, -1)).unbind(2)
        patches = [patch for row in rows for patch in row.unflatten(3, (self.n, -1)).unbind(3)]
        return torch.stack([net(patch) for net, patch in zip(self, patches)], 1)
