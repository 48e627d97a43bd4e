"""Vision Transformers that see a part of the patches and predict the others (LocalMIM, Wang et al., CVPR 2023).

The encoder's parameters are named as in `fastlocal.models.ViT`; positions are fixed sines and cosines. Architecture, targets
and initialisation are those of the repository Haoqing-Wang/LocalMIM (314a6e5).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlocal.errors import ArgumentError
from fastlocal.models._common import positive_int, probability, token_width, unit_index
from fastlocal.models.vit import PatchEmbed, ViT, ViTBlock

_EPS = 1e-6
_TARGETS = ("hog", "pixels")
SCALES = (4.0, 2.0, 1.0, 0.5)  # of a decoder's grid, in patches


def _float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _init_linear(module: nn.Module) -> nn.Module:
    for m in module.modules():
        if isinstance(m, nn.Linear):
            nn.init.xavier_uniform_(m.weight)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
    return module


def sincos_positions(dim: int, grid: int) -> Tensor:
    """Fixed positions of a class token (zeros) and ``grid`` x ``grid`` patches: float32 [1, 1 + grid**2, dim].

    The first half of the channels encodes the column, the second the row. Raises ArgumentError unless 4 divides ``dim``.
    """
    if dim % 4:
        raise ArgumentError(f"dim: fixed positions need a multiple of 4, got {dim}")
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * omega
    line = torch.cat([angle.sin(), angle.cos()], dim=1)  # [grid, dim / 2]
    column, row = line.repeat(grid, 1), line.repeat_interleave(grid, 0)
    positions = torch.cat([column, row], dim=1)
    return torch.cat([positions.new_zeros(1, dim), positions]).float()[None]


class HOG(nn.Module):
    """Histograms of oriented gradients of every channel: [B, C, H, W] -> [B, C * nbins, H / cell, W / cell], no gradient.

    The gradients are Sobel's (reflected borders); each position adds its magnitude to the one bin of its angle; a bin is the
    mean over a cell. Bins are not normalised yet. Computed in float32 (float64 for float64 images), under autocast too.
    """

    sobel: Tensor

    def __init__(self, nbins: int = 9) -> None:
        super().__init__()
        self.nbins = nbins
        across = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
        self.register_buffer("sobel", torch.stack([across, across.t()])[:, None], persistent=False)

    @torch.no_grad()
    def forward(self, images: Tensor, cell: int) -> Tensor:
        x = _float(images)
        batch, channels, height, width = x.shape
        kind = x.device.type
        with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
            padded = F.pad(x.reshape(batch * channels, 1, height, width), (1, 1, 1, 1), mode="reflect")
            gradient = F.conv2d(padded, self.sobel.to(x.dtype))
            angle = torch.atan2(gradient[:, 0], gradient[:, 1])
            bins = (angle / math.pi * self.nbins).floor().long() % self.nbins
            magnitude = gradient.norm(dim=1, keepdim=True)
            histogram = x.new_zeros(batch * channels, self.nbins, height, width)
            histogram.scatter_(1, bins[:, None], magnitude)
            cells = F.avg_pool2d(histogram, cell)
        return cells.view(batch, channels * self.nbins, *cells.shape[-2:])


class Masking:
    """What one forward of a `MaskedViT` leaves for its losses: which patches were hidden, and the targets of its images.

    A plain object that the network, its criterion and the heads share, so that a mask is drawn once a forward.

    Attributes:
        ratio: share of the patches that are hidden.
        restore: int64 [B, T], the place of every patch in the shuffled order; the first ``keep`` were seen.
    """

    def __init__(self, ratio: float, grid: int, patch: int, target: str, hog: HOG) -> None:
        self.ratio, self.grid, self.patch, self.target, self.hog = ratio, grid, patch, target, hog
        self.keep = int(grid * grid * (1 - ratio))
        self.restore: Tensor | None = None
        self._cells: Tensor | None = None

    def noise(self, rows: int, device: torch.device) -> Tensor:
        """What decides which patches are hidden: [rows, T], from torch's random stream of the device."""
        return torch.rand(rows, self.grid * self.grid, device=device)

    def draw(self, tokens: Tensor) -> Tensor:
        """Draws a mask for each row of ``tokens`` [B, T, D] and returns those that stay visible, [B, keep, D]."""
        order = self.noise(len(tokens), tokens.device).argsort(dim=1)
        self.restore = order.argsort(dim=1)
        self._cells = None
        return tokens.gather(1, order[:, : self.keep, None].expand(-1, -1, tokens.shape[-1]))

    def mask(self, scale: float, dtype: torch.dtype) -> Tensor:
        """The hidden share of every position of a decoder's grid, [B, (grid * scale)**2]: 1 hidden, 0 seen."""
        assert self.restore is not None
        hidden = (self.restore >= self.keep).to(dtype).view(-1, self.grid, self.grid)
        if scale < 1:
            return F.avg_pool2d(hidden[:, None], round(1 / scale)).flatten(1)
        s = round(scale)
        return hidden[:, :, None, :, None].expand(-1, -1, s, -1, s).flatten(1)

    def targets(self, images: Tensor, scale: float) -> Tensor:
        """What a decoder of this scale has to predict: [B, (grid * scale)**2, features]."""
        cell = round(self.patch / scale)
        if self.target == "pixels":
            x = _float(images.detach())
            batch, channels, height, width = x.shape
            x = x.view(batch, channels, height // cell, cell, width // cell, cell)
            x = x.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, cell * cell * channels)
            return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-6).sqrt()
        finest = round(self.patch / SCALES[0])
        if self._cells is None:  # the histogram is as large as nine batches: kept as means over the smallest cells
            self._cells = self.hog(images, finest)
        cells = self._cells if cell == finest else F.avg_pool2d(self._cells, cell // finest)
        cells = F.normalize(cells.unflatten(1, (-1, self.hog.nbins)), dim=2).flatten(1, 2)
        return cells.flatten(2).transpose(1, 2)

    def loss(self, predicted: Tensor, images: Tensor, scale: float) -> Tensor:
        """Mean squared error of the hidden positions, 0-dim; in float32 at least."""
        predicted = _float(predicted)
        error = (predicted - self.targets(images, scale).to(predicted.dtype)).square().mean(-1)
        mask = self.mask(scale, predicted.dtype)
        return (error * mask).sum() / mask.sum()


class MaskedImageLoss:
    """The criterion of a `MaskedViT`: ``criterion(net(images), images)``, for the mask that this forward drew."""

    def __init__(self, masking: Masking, scale: float) -> None:
        self.masking, self.scale = masking, scale

    def __call__(self, predicted: Tensor, images: Tensor) -> Tensor:
        try:
            return self.masking.loss(predicted, images, self.scale)
        finally:
            self.masking._cells = None  # the last loss of a forward: nothing of the batch lives on

    @staticmethod
    def count(images: Tensor) -> Tensor:
        """Number of images: every one hides as many patches. float32, 0-dim."""
        return torch.full((), float(len(images)), device=images.device)

    @staticmethod
    def correct(predicted: Tensor, images: Tensor) -> Tensor:
        """-1: there are no classes. int64, 0-dim."""
        return torch.full((), -1, device=images.device)

    def __repr__(self) -> str:
        return f"MaskedImageLoss(target={self.masking.target!r}, scale={self.scale})"


class _ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class MaskedDecoder(nn.Module):
    """Predicts the targets of all patches from the visible tokens: [B, 1 + keep, dim] -> [B, (grid * scale)**2, features].

    LayerNorm, Linear to ``width``, mask tokens in place of the hidden patches, fixed positions, transformer blocks, LayerNorm;
    then transposed convolutions (``scale`` 4 and 2), nothing (1) or a mean over 2 x 2 patches (0.5), and a 1x1 convolution.
    """

    pos_embed: Tensor

    def __init__(
        self, dim: int, features: int, scale: float, grid: int, *, width: int = 256, depth: int = 1, heads: int = 8
    ) -> None:
        super().__init__()
        self.grid = grid
        self.input_norm = nn.LayerNorm(dim, eps=_EPS)
        self.embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.register_buffer("pos_embed", sincos_positions(width, grid), persistent=False)
        self.blocks = nn.Sequential(*(ViTBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=_EPS)
        layers: list[nn.Module] = []
        if scale == 4.0:
            layers += [
                nn.ConvTranspose2d(width, width // 2, 2, stride=2),
                _ChannelNorm(width // 2, eps=_EPS),
                nn.GELU(),
            ]
            layers += [nn.ConvTranspose2d(width // 2, width // 4, 2, stride=2)]
        elif scale == 2.0:
            layers += [nn.ConvTranspose2d(width, width // 2, 2, stride=2)]
        elif scale == 0.5:
            layers += [nn.AvgPool2d(2)]
        out = {4.0: width // 4, 2.0: width // 2}.get(scale, width)
        self.pred = nn.Sequential(*layers, nn.Conv2d(out, features, 1))
        _init_linear(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, x: Tensor, restore: Tensor) -> Tensor:
        x = self.embed(self.input_norm(x))
        hidden = self.mask_token.to(x.dtype).expand(len(x), restore.shape[1] + 1 - x.shape[1], -1)
        patches = torch.cat([x[:, 1:], hidden], dim=1).gather(1, restore[..., None].expand(-1, -1, x.shape[-1]))
        x = torch.cat([x[:, :1], patches], dim=1) + self.pos_embed
        x = self.norm(self.blocks(x))[:, 1:]
        return self.pred(x.transpose(1, 2).unflatten(2, (self.grid, self.grid))).flatten(2).transpose(1, 2)


class MaskedViT(nn.Module):
    """Vision Transformer over the visible patches: images [B, C, img_size, img_size] -> the last decoder's prediction.

    Every forward, in training and in evaluation, hides other patches of every image, drawn from torch's random stream of the
    device. Train it by its own ``criterion`` with the images as targets::

        net = MaskedViT(dim=384, depth=12, heads=6)
        model = fl.localize(net, "localmim", blocks=4, sample=images[:2], criterion=net.criterion)
        engine.step(images)

    Units: ``embed`` (patches, positions, the mask, class token), then every transformer block. `to_vit` gives the encoder.

    Args:
        img_size, patch_size: of the images and of a patch.
        dim, depth, heads: of the encoder.
        mask_ratio: share of the patches that are hidden.
        target: "hog", histograms of oriented gradients of ``nbins`` bins, or "pixels", each cell's normalised pixels. A cell has
            ``patch_size / scale`` pixels a side: 4, 8, 16 and 32 at a patch of 16.
        scale: of the last decoder: 4, 2, 1 or 0.5 predictions per patch and side.
        decoder_dim, decoder_depth, decoder_heads: of every decoder.

    Raises ArgumentError for values that are none of these, an ``img_size`` that ``patch_size`` does not divide, a ``patch_size``
    that 4 does not divide, an odd grid of patches with a scale of 0.5, a ``mask_ratio`` that hides nothing or everything, and,
    when called, for images of another size.
    """

    pos_embed: Tensor

    def __init__(
        self,
        *,
        in_channels: int = 3,
        img_size: int = 224,
        patch_size: int = 16,
        dim: int = 384,
        depth: int = 12,
        heads: int = 6,
        mask_ratio: float = 0.75,
        target: str = "hog",
        nbins: int = 9,
        scale: float = 0.5,
        decoder_dim: int = 256,
        decoder_depth: int = 1,
        decoder_heads: int = 8,
    ) -> None:
        super().__init__()
        self.in_channels = positive_int("in_channels", in_channels)
        self.img_size, self.patch_size = positive_int("img_size", img_size), positive_int("patch_size", patch_size)
        self.dim, self.heads = positive_int("dim", dim), positive_int("heads", heads)
        probability("mask_ratio", mask_ratio)
        if img_size % patch_size:
            raise ArgumentError(f"img_size must be a multiple of patch_size={patch_size}, got {img_size}")
        if patch_size % 4:
            raise ArgumentError(f"patch_size must be a multiple of 4, for 4 x 4 predictions a patch, got {patch_size}")
        if target not in _TARGETS:
            raise ArgumentError(f"target must be one of {', '.join(_TARGETS)}, got {target!r}")
        for name, width, count in (("dim", dim, heads), ("decoder_dim", decoder_dim, decoder_heads)):
            if width % positive_int(f"{name.removesuffix('dim')}heads", count):
                raise ArgumentError(f"{name} must be a multiple of its {count} heads, got {width}")
        self.widths = [self.dim] * (1 + positive_int("depth", depth))
        self.grid = img_size // patch_size
        self.masking = Masking(mask_ratio, self.grid, patch_size, target, HOG(positive_int("nbins", nbins)))
        if not 0 < self.masking.keep < self.grid**2:
            raise ArgumentError(
                f"mask_ratio: {mask_ratio} leaves {self.masking.keep} of {self.grid**2} patches visible"
            )
        self._decoder = {"width": decoder_dim, "depth": decoder_depth, "heads": decoder_heads}
        self.hog = self.masking.hog  # registered, so that it moves with the network
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.register_buffer("pos_embed", sincos_positions(dim, self.grid))
        self.patch_embed = PatchEmbed(self.in_channels, patch_size, dim)
        self.blocks = nn.Sequential(*(ViTBlock(dim, heads) for _ in range(depth)))
        _init_linear(self.blocks)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(dim, -1))
        nn.init.normal_(self.cls_token, std=0.02)
        self.decoder = self.make_decoder(scale)
        self.criterion = MaskedImageLoss(self.masking, float(scale))

    def embed(self, x: Tensor) -> Tensor:
        """Images -> the class token and the visible patches, [B, 1 + keep, dim]."""
        if x.shape[-2:] != (self.img_size, self.img_size):
            raise ArgumentError(
                f"x must hold images of img_size={self.img_size}, got {tuple(x.shape)}; "
                "resize them or build the model with their img_size"
            )
        h = self.masking.draw(self.patch_embed(x) + self.pos_embed[:, 1:])
        token = (self.cls_token + self.pos_embed[:, :1]).to(h.dtype)
        return torch.cat((token.expand(len(h), -1, -1), h), dim=1)

    def units(self) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
        return [("embed", self.embed), *((f"blocks.{index}", unit) for index, unit in enumerate(self.blocks))]

    def readout(self, h: Tensor) -> Tensor:
        assert self.masking.restore is not None
        return self.decoder(h, self.masking.restore)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.blocks(self.embed(x)))

    def make_unit(self, i: int, in_channels: int, stride: int) -> nn.Module:
        """A fresh transformer block; ``in_channels`` must be ``dim`` and ``stride`` 1."""
        unit_index(i, len(self.widths))
        token_width(in_channels, stride, self.dim)
        return _init_linear(ViTBlock(self.dim, self.heads))

    def make_decoder(self, scale: float) -> MaskedDecoder:
        """A fresh decoder: [B, 1 + keep, dim] -> [B, (grid * scale)**2, features]. Raises ArgumentError for another scale."""
        if scale not in SCALES:
            raise ArgumentError(f"scale must be one of {', '.join(f'{s:g}' for s in SCALES)}, got {scale!r}")
        if scale == 0.5 and self.grid % 2:
            raise ArgumentError(f"scale: 0.5 needs an even number of patches a side, got {self.grid}; use 1, 2 or 4")
        cell = round(self.patch_size / scale)
        features = self.in_channels * (self.hog.nbins if self.masking.target == "hog" else cell * cell)
        return MaskedDecoder(self.dim, features, float(scale), self.grid, **self._decoder)

    @torch.no_grad()
    def to_vit(self, num_classes: int = 1000, pool: str = "cls") -> ViT:
        """A `ViT` with a copy of this encoder, for fine-tuning; its last norm and its head are fresh."""
        vit = ViT(
            num_classes=num_classes, in_channels=self.in_channels, img_size=self.img_size, patch_size=self.patch_size,
            dim=self.dim, depth=len(self.blocks), heads=self.heads, pool=pool,
        )  # fmt: skip
        vit.patch_embed.load_state_dict(self.patch_embed.state_dict())
        vit.blocks.load_state_dict(self.blocks.state_dict())
        vit.pos_embed.copy_(self.pos_embed if pool == "cls" else self.pos_embed[:, 1:])
        if vit.cls_token is not None:
            vit.cls_token.copy_(self.cls_token)
        return vit.to(self.cls_token)
