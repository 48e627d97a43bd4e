"""LocalMIM: a masked transformer's layers are trained by reconstructions at several depths and scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from fastlocal.blocks.types import LocalLoss, StepContext
from fastlocal.errors import ArgumentError
from fastlocal.methods.base import Method, Site, check_number, register


class MaskedImageHead(nn.Module):
    """One term, called as the target: the mean squared error of the hidden patches that a decoder predicts.

    Args:
        decoder: boundary activation and ``masking.restore`` -> predictions.
        masking: which patches the network hid in this forward, see `fastlocal.models.masked_vit.Masking`.
        scale: predictions per patch and side.
    """

    def __init__(self, decoder: nn.Module, masking: Any, scale: float) -> None:
        super().__init__()
        self.decoder, self.masking, self.scale = decoder, masking, scale

    def forward(self, h: Tensor, ctx: StepContext) -> LocalLoss:
        assert ctx.input is not None
        predicted = self.decoder(h, self.masking.restore)
        return LocalLoss.of((self.masking.target, self.masking.loss(predicted, ctx.input, self.scale), 1.0))


@dataclass
class LocalMIMOptions:
    """scales: predictions per patch and side of the decoders of all blocks but the last, whose scale the network has."""

    scales: tuple[float, ...] = (4.0, 2.0, 1.0)


@register
class LocalMIM(Method):
    """Decoders on the blocks of a `fastlocal.models.MaskedViT`, the plain sum of their losses. **Not
    gradient-isolated**: there is no border, one backward of the sum reaches all layers below, and activations live until then.

    With ``blocks=4`` the cuts are the published ones, after transformer blocks 1, 3 and D - 3 of D. The network brings mask,
    targets and its last decoder (``criterion=net.criterion``, the images as targets). The mask is drawn by the first unit from
    torch's random stream, which ``Engine(deterministic=True)`` keys and saves per block. Another network needs
    ``make_decoder(scale)`` and ``masking`` like that one's. Both modes are the same.
    """

    name: ClassVar[str] = "localmim"
    summary: ClassVar[str] = "reconstruction of hidden patches at several depths; not isolated"
    paper: ClassVar[str] = "Wang et al.: Masked Image Modeling with Local Multi-Scale Reconstruction, CVPR 2023"
    repository: ClassVar[str] = "Haoqing-Wang/LocalMIM"
    isolated = False
    Options: ClassVar[type] = LocalMIMOptions

    def validate(self) -> None:
        scales = self.options.scales
        if not isinstance(scales, tuple | list) or not scales:
            raise ArgumentError(f"scales: got {scales!r}; give 4, 2, 1 or 0.5 for every block but the last")
        for scale in scales:
            check_number("scales", scale, low=0.5)

    def cuts(self, blocks: int, unit_names: list[str], net: nn.Module) -> list[int] | None:
        depth = len(unit_names) - 1  # unit 0 embeds
        return [2, 4, depth - 2] if blocks == 4 and depth > 6 else None

    def head(self, site: Site) -> nn.Module:
        net: Any = site.net
        scales = self.options.scales
        if not callable(getattr(net, "make_decoder", None)):
            raise ArgumentError(
                f"method: 'localmim' trains a network that sees a part of the patches, but got {type(net).__name__}; give a "
                "fastlocal.models.MaskedViT"
            )
        if len(scales) != site.blocks - 1:
            raise ArgumentError(
                f"scales: {len(scales)} numbers for {site.blocks} blocks; give one for every block but the last, or blocks="
                f"{len(scales) + 1}"
            )
        return MaskedImageHead(net.make_decoder(scales[site.index]), net.masking, scales[site.index])
