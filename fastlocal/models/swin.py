"""Swin Transformers (Liu et al., arXiv:2103.14030): attention in shifted windows, and fewer, wider tokens from stage to stage.

Parameter names and initialisation are those of the authors' code (microsoft/Swin-Transformer), so the weights of its
checkpoints load; the tables that they also hold (``relative_position_index``, ``attn_mask``) are computed here, not saved.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastlocal.errors import ArgumentError
from fastlocal.models._common import positive_int, probability, unit_index
from fastlocal.models.vit import FeedForward, TokenPool, _init_linear

_MASKED = -100.0  # added to the scores of tokens that are neighbours in a shifted window only


class SwinPatchEmbed(nn.Module):
    """Images [B, C, S, S] -> one normalised embedding per patch, [B, (S / patch_size)^2, dim]."""

    def __init__(self, img_size: int, in_channels: int, patch_size: int, dim: int) -> None:
        super().__init__()
        self.img_size = img_size
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2:] != (self.img_size, self.img_size):
            raise ArgumentError(
                f"x must hold images of img_size={self.img_size}, got {tuple(x.shape)}; "
                "resize them or build the model with their img_size"
            )
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))


class PatchMerging(nn.Module):
    """Every 2x2 tokens become one of twice the width: [B, side^2, dim] -> [B, side^2 / 4, 2 * dim]."""

    def __init__(self, side: int, dim: int) -> None:
        super().__init__()
        self.side = side
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, dim = x.shape
        half = self.side // 2
        # Of each 2x2: top left, bottom left, top right, bottom right.
        x = x.view(batch, half, 2, half, 2, dim).permute(0, 1, 3, 4, 2, 5).reshape(batch, half * half, 4 * dim)
        return self.reduction(self.norm(x))


class WindowAttention(nn.Module):
    """Self-attention with a learned bias per relative position, inside windows: [B * W, window^2, dim] -> the same.

    ``mask``: [W, window^2, window^2], added to the scores of the W windows of an image; None without a shift.
    """

    relative_position_index: Tensor

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", _relative_positions(window), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        windows, tokens, dim = x.shape
        width = dim // self.heads
        q, k, v = self.qkv(x).view(windows, tokens, 3, self.heads, width).permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.relative_position_index]  # [tokens^2, heads]
        bias = bias.view(tokens, tokens, self.heads).permute(2, 0, 1)
        scores = (q * width**-0.5) @ k.transpose(-2, -1) + bias
        if mask is not None:
            each = scores.view(-1, len(mask), self.heads, tokens, tokens)
            scores = (each + mask[:, None]).view(windows, self.heads, tokens, tokens)
        out = scores.softmax(-1) @ v
        return self.proj(out.transpose(1, 2).reshape(windows, tokens, dim))


class DropPath(nn.Module):
    """Stochastic depth: in training, leaves out the branch of a sample with probability ``rate``, and scales the others."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = 1 - self.rate
        return x * x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(keep).div_(keep)


class SwinBlock(nn.Module):
    """Pre-norm transformer block with windowed attention on a map of ``side`` x ``side`` tokens: [B, side^2, dim].

    ``window`` divides ``side``; with ``shifted``, windows lie half a window further (not where one covers the map).
    """

    attn_mask: Tensor | None

    def __init__(
        self, dim: int, heads: int, side: int, window: int, *, shifted: bool = False, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.side, self.window = side, window
        self.shift = window // 2 if shifted and window < side else 0
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads, window)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = FeedForward(dim)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else None
        mask = _shift_mask(side, window, self.shift) if self.shift else None
        self.register_buffer("attn_mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.side**2:
            raise ArgumentError(
                f"x must hold {self.side}x{self.side} tokens for this block, got {tuple(x.shape)}; make the unit for the "
                "width that the network has at that size"
            )
        x = x + self._dropped(self._attend(self.norm1(x)))
        return x + self._dropped(self.mlp(self.norm2(x)))

    def _dropped(self, branch: Tensor) -> Tensor:
        return branch if self.drop_path is None else self.drop_path(branch)

    def _attend(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        count, w = self.side // self.window, self.window
        x = x.view(batch, self.side, self.side, dim)
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
        x = x.view(batch, count, w, count, w, dim).transpose(2, 3).reshape(-1, w * w, dim)
        x = self.attn(x, self.attn_mask)
        x = x.view(batch, count, count, w, w, dim).transpose(2, 3).reshape(batch, self.side, self.side, dim)
        if self.shift:
            x = x.roll((self.shift, self.shift), (1, 2))
        return x.reshape(batch, tokens, dim)


class SwinStage(nn.Module):
    """Blocks of one width, and the merging after them where another stage follows."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        return x if self.downsample is None else self.downsample(x)


class Swin(nn.Module):
    """Swin Transformer: images [B, in_channels, img_size, img_size] -> logits [B, num_classes].

    Units: ``patch_embed``, every block ``layers.I.blocks.J``, and the merging ``layers.I.downsample`` at the end of every
    stage but the last; a boundary activation is [B, side^2, width]. The readout is ``norm``, the mean over tokens and
    ``head``.

    Args:
        img_size, patch_size: height and width of the images and of a patch.
        dim: width of the first stage; every later one has twice that of the one before.
        depths, heads: blocks and attention heads of every stage.
        window: height and width of a window in tokens; a stage whose map is smaller has one window.
        drop_path: stochastic depth, growing from 0 at the first block to this rate at the last (the paper: 0.2 for Tiny).

    For images of 32x32, ``patch_size=2, window=4`` gives maps of 16, 8, 4 and 2.

    Raises ArgumentError for a non-positive size, a ``drop_path`` outside [0, 1), ``depths`` and ``heads`` of different
    lengths, sizes that do not divide, and, when called, for images of another size.
    """

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        img_size: int = 224,
        patch_size: int = 4,
        dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        heads: Sequence[int] = (3, 6, 12, 24),
        window: int = 7,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes = positive_int("num_classes", num_classes)
        self.img_size = positive_int("img_size", img_size)
        self.dim = positive_int("dim", dim)
        probability("drop_path", drop_path)
        if not depths or len(depths) != len(heads):
            raise ArgumentError(f"depths and heads must have one number per stage, got {depths!r} and {heads!r}")
        if self.img_size % positive_int("patch_size", patch_size):
            raise ArgumentError(f"img_size must be a multiple of patch_size={patch_size}, got {img_size}")
        self.heads = tuple(positive_int("heads", n) for n in heads)
        depths = [positive_int("depths", n) for n in depths]
        positive_int("window", window)
        self.sides, self.windows = self._sizes(img_size // patch_size, len(depths), window)
        self.patch_embed = SwinPatchEmbed(img_size, positive_int("in_channels", in_channels), patch_size, dim)
        total = sum(depths)
        self.layers = nn.Sequential()
        self.widths = [dim]
        for stage, depth in enumerate(depths):
            done, width = sum(depths[:stage]), dim * 2**stage
            blocks = [
                self._block(stage, shifted=j % 2 == 1, drop_path=drop_path * (done + j) / max(1, total - 1))
                for j in range(depth)
            ]
            last = stage == len(depths) - 1
            self.layers.append(SwinStage(blocks, None if last else PatchMerging(self.sides[stage], width)))
            self.widths += [width] * depth + ([] if last else [2 * width])
        self.norm = nn.LayerNorm(self.widths[-1])
        self.pool = TokenPool("mean")
        self.head = nn.Linear(self.widths[-1], self.num_classes)
        _init_linears(self)

    def _sizes(self, side: int, stages: int, window: int) -> tuple[list[int], list[int]]:
        sides: list[int] = []
        windows: list[int] = []
        for stage in range(stages):
            if stage and sides[-1] % 2:
                raise ArgumentError(
                    f"depths: stage {stage} would merge a map of {sides[-1]}x{sides[-1]} tokens, which has no 2x2 parts; use "
                    "fewer stages, a smaller patch_size or other img_size"
                )
            sides.append(side if not stage else sides[-1] // 2)
            windows.append(min(window, sides[-1]))
            if sides[-1] % windows[-1]:
                raise ArgumentError(
                    f"window must divide the map of every stage, got {window} for {sides[-1]}x{sides[-1]} tokens at stage "
                    f"{stage}; use {math.gcd(window, sides[-1])} or another img_size or patch_size"
                )
        return sides, windows

    def _block(self, stage: int, *, shifted: bool, drop_path: float = 0.0) -> SwinBlock:
        dim, heads = self.dim * 2**stage, self.heads[stage]
        if dim % heads:
            raise ArgumentError(f"heads must divide the width of a stage, got {heads} for {dim} at stage {stage}")
        return SwinBlock(dim, heads, self.sides[stage], self.windows[stage], shifted=shifted, drop_path=drop_path)

    def units(self) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
        found: list[tuple[str, Callable[[Tensor], Tensor]]] = [("patch_embed", self.patch_embed)]
        for i, stage in enumerate(self.layers):
            assert isinstance(stage, SwinStage)
            found += [(f"layers.{i}.blocks.{j}", block) for j, block in enumerate(stage.blocks)]
            if stage.downsample is not None:
                found.append((f"layers.{i}.downsample", stage.downsample))
        return found

    def readout(self, h: Tensor) -> Tensor:
        return self.head(self.pool(self.norm(h)))

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.layers(self.patch_embed(x)))

    def make_unit(self, i: int, in_channels: int, stride: int) -> nn.Module:
        """A fresh block of the stage whose width is ``in_channels``, shifted as unit ``i`` is; ``stride`` must be 1.

        It keeps width and number of tokens, so that units of later stages can be imitated at an earlier one's size.
        """
        unit_index(i, len(self.widths))
        widths = [self.dim * 2**stage for stage in range(len(self.heads))]
        if in_channels not in widths:
            raise ArgumentError(f"in_channels must be the width of a stage, one of {widths}, got {in_channels!r}")
        if stride != 1:
            raise ArgumentError(f"stride must be 1 (a transformer block keeps every token), got {stride!r}")
        like = self.units()[i][1]
        shifted = isinstance(like, SwinBlock) and int(self.units()[i][0].rpartition(".")[2]) % 2 == 1
        return _init_linears(self._block(widths.index(in_channels), shifted=shifted))

    def make_readout(self, in_features: int, num_classes: int) -> nn.Module:
        """A fresh LayerNorm, mean over tokens and Linear."""
        return _init_linear(
            nn.Sequential(nn.LayerNorm(in_features), TokenPool("mean"), nn.Linear(in_features, num_classes))
        )


def _init_linears(module: nn.Module) -> nn.Module:
    """N(0, 0.02) truncated for every Linear, with zero biases where it has one."""
    for m in module.modules():
        if isinstance(m, nn.Linear):
            nn.init.trunc_normal_(m.weight, std=0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
    return module


def _relative_positions(window: int) -> Tensor:
    """[window^4]: the row of the bias table for every pair of tokens of a window, by how far apart they lie."""
    at = torch.arange(window)
    apart = at[:, None] - at[None] + window - 1
    rows = apart[:, None, :, None] * (2 * window - 1)
    return (rows + apart[None, :, None, :]).reshape(-1)


def _shift_mask(side: int, window: int, shift: int) -> Tensor:
    """[windows, window^2, window^2]: 0 for tokens of one region of the map, else -100.

    After the roll, the last windows hold tokens of opposite edges, which are no neighbours.
    """
    at = torch.arange(side)
    region = (at >= side - window).int() + (at >= side - shift).int()
    both = 3 * region[:, None] + region[None]
    count = side // window
    both = both.view(count, window, count, window).transpose(1, 2).reshape(count * count, window * window)
    return (both[:, :, None] != both[:, None]).to(torch.get_default_dtype()) * _MASKED


def swin_tiny(**options: Any) -> Swin:
    return Swin(**options)


def swin_small(*, depths: Sequence[int] = (2, 2, 18, 2), **options: Any) -> Swin:
    return Swin(depths=depths, **options)


def swin_base(
    *, dim: int = 128, depths: Sequence[int] = (2, 2, 18, 2), heads: Sequence[int] = (4, 8, 16, 32), **options: Any
) -> Swin:
    return Swin(dim=dim, depths=depths, heads=heads, **options)
