"""Vision Transformers (Dosovitskiy et al., arXiv:2010.11929) of the sizes of DeiT (Touvron et al., arXiv:2012.12877).

Parameter names and initialisation are those of timm's ``vit_*_patch16_224``, so its checkpoints load.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlocal.errors import ArgumentError
from fastlocal.models._common import positive_int, probability, token_width, unit_index

_LAYER_NORM_EPS = 1e-6
_POOLS = ("cls", "mean")


def _init_linear(module: nn.Module) -> nn.Module:
    for m in module.modules():
        if isinstance(m, nn.Linear):
            nn.init.trunc_normal_(m.weight, std=0.02)
            nn.init.zeros_(m.bias)
    return module


class PatchEmbed(nn.Module):
    """Images [B, C, H, W] -> one embedding per patch, [B, H*W / patch_size^2, dim]."""

    def __init__(self, in_channels: int, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention, [B, T, dim] -> [B, T, dim]."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else None

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, dim)
        out = self.proj(out)
        return out if self.dropout is None else self.dropout(out)


class FeedForward(nn.Module):
    """Linear, GELU, Linear, with four times the width inside."""

    def __init__(self, dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else None

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.fc1(x))
        if self.dropout is None:
            return self.fc2(x)
        return self.dropout(self.fc2(self.dropout(x)))


class ViTBlock(nn.Module):
    """Pre-norm transformer block, [B, T, dim] -> [B, T, dim]."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=_LAYER_NORM_EPS)
        self.attn = Attention(dim, heads, dropout)
        self.norm2 = nn.LayerNorm(dim, eps=_LAYER_NORM_EPS)
        self.mlp = FeedForward(dim, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TokenPool(nn.Module):
    """The class token ("cls") or the mean over tokens ("mean"): [B, T, dim] -> [B, dim]."""

    def __init__(self, pool: str) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0] if self.pool == "cls" else x.mean(dim=1)


class ViT(nn.Module):
    """Vision Transformer: images [B, in_channels, img_size, img_size] -> logits [B, num_classes].

    Units: ``embed`` (patches, class token, positions and their dropout), then every transformer block.

    Args:
        img_size, patch_size: height and width of the images and of a patch.
        dim, depth, heads: width, number of blocks, attention heads.
        dropout: probability after the positions, every projection and both Linear layers of the feed-forward part, as
            in the paper; none on the attention weights.
        pool: "cls" reads the class token out; "mean" has no class token and averages the patches.

    Raises ArgumentError for a non-positive size, a ``dropout`` outside [0, 1), an ``img_size`` that ``patch_size`` does
    not divide, a ``dim`` that ``heads`` does not divide, an unknown ``pool``, and, when called, for images of another
    size.
    """

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        img_size: int = 224,
        patch_size: int = 16,
        dim: int = 192,
        depth: int = 12,
        heads: int = 3,
        dropout: float = 0.0,
        pool: str = "cls",
    ) -> None:
        super().__init__()
        self.num_classes = positive_int("num_classes", num_classes)
        self.img_size = positive_int("img_size", img_size)
        self.dim = positive_int("dim", dim)
        self.heads = positive_int("heads", heads)
        probability("dropout", dropout)
        if self.img_size % positive_int("patch_size", patch_size):
            raise ArgumentError(f"img_size must be a multiple of patch_size={patch_size}, got {img_size}")
        if self.dim % self.heads:
            raise ArgumentError(f"dim must be a multiple of heads={heads}, got {dim}")
        if pool not in _POOLS:
            raise ArgumentError(f"pool must be one of {', '.join(_POOLS)}, got {pool!r}")
        self.widths = [self.dim] * (1 + positive_int("depth", depth))
        tokens = (self.img_size // patch_size) ** 2 + (pool == "cls")
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim)) if pool == "cls" else None
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, dim))
        self.patch_embed = PatchEmbed(positive_int("in_channels", in_channels), patch_size, dim)
        self.pos_drop = nn.Dropout(dropout) if dropout > 0 else None
        self.blocks = nn.Sequential(*(ViTBlock(dim, heads, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=_LAYER_NORM_EPS)
        self.pool = TokenPool(pool)
        self.head = nn.Linear(dim, self.num_classes)
        _init_linear(self)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=1e-6)

    def embed(self, x: Tensor) -> Tensor:
        """Images [B, in_channels, img_size, img_size] -> tokens [B, T, dim]."""
        if x.shape[-2:] != (self.img_size, self.img_size):
            raise ArgumentError(
                f"x must hold images of img_size={self.img_size}, got {tuple(x.shape)}; "
                "resize them or build the model with their img_size"
            )
        h = self.patch_embed(x)
        if self.cls_token is not None:
            h = torch.cat((self.cls_token.expand(h.shape[0], -1, -1), h), dim=1)
        h = h + self.pos_embed
        return h if self.pos_drop is None else self.pos_drop(h)

    def units(self) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
        return [("embed", self.embed), *((f"blocks.{index}", unit) for index, unit in enumerate(self.blocks))]

    def readout(self, h: Tensor) -> Tensor:
        return self.head(self.pool(self.norm(h)))

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.blocks(self.embed(x)))

    def make_unit(self, i: int, in_channels: int, stride: int) -> nn.Module:
        """A fresh transformer block without dropout; ``in_channels`` must be ``dim`` and ``stride`` 1."""
        unit_index(i, len(self.widths))
        token_width(in_channels, stride, self.dim)
        return _init_linear(ViTBlock(self.dim, self.heads))

    def make_readout(self, in_features: int, num_classes: int) -> nn.Module:
        """A fresh LayerNorm, pool and Linear."""
        norm = nn.LayerNorm(in_features, eps=_LAYER_NORM_EPS)
        return _init_linear(nn.Sequential(norm, TokenPool(self.pool.pool), nn.Linear(in_features, num_classes)))


def vit_tiny(**options: Any) -> ViT:
    return ViT(**options)


def vit_small(*, dim: int = 384, heads: int = 6, **options: Any) -> ViT:
    return ViT(dim=dim, heads=heads, **options)


def vit_base(*, dim: int = 768, heads: int = 12, **options: Any) -> ViT:
    return ViT(dim=dim, heads=heads, **options)


def vit_large(*, dim: int = 1024, depth: int = 24, heads: int = 16, **options: Any) -> ViT:
    return ViT(dim=dim, depth=depth, heads=heads, **options)


def vit_huge(*, patch_size: int = 14, dim: int = 1280, depth: int = 32, heads: int = 16, **options: Any) -> ViT:
    return ViT(patch_size=patch_size, dim=dim, depth=depth, heads=heads, **options)
