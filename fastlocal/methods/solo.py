"""SOLO, shared-output local learning: every block of a language model predicts the next token through one shared readout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlocal.blocks.block import Slot
from fastlocal.blocks.heads import token_targets
from fastlocal.blocks.links import Link
from fastlocal.errors import ArgumentError
from fastlocal.methods.base import LocalLoss, Method, Site, StepContext, check_choice, check_number, register
from fastlocal.methods.lopt import layer_ranges
from fastlocal.ops._dispatch import fuses
from fastlocal.ops.pool_linear_cross_entropy import MAX_CLASSES, pool_linear_cross_entropy

_EPS = 1e-6


@dataclass
class SOLOOptions:
    """Options.

    depth: H, transformer blocks of a head.
    refresh: S, steps between two refreshes of the heads' copy of the readout weight; 1 copies it before every step.
    units: "auto" makes a head's blocks by the network's ``make_unit`` where it has one, "transformer++" by
        `TransformerPlusPlus` always.
    heads: attention heads of a `TransformerPlusPlus`; None is the number of ``net.config`` or ``net.n_head``, or one per 64
        channels.
    bias: a trained bias of every head's class scores, drawn as zero.
    """

    depth: int = 2
    refresh: int = 1
    units: str = "auto"
    heads: int | None = None
    bias: bool = False


class TransformerPlusPlus(nn.Module):
    """Causal pre-norm block with RMSNorm, rotary positions and SwiGLU ("Transformer++"), [B, T, D] -> [B, T, D].

    Positions count from the first token of the sequence, and all earlier tokens are seen: pad on the right.
    """

    def __init__(self, width: int, heads: int, hidden: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        hidden = hidden or 8 * math.ceil(width / 3)  # 8/3 of the width, as many parameters as a GELU of four times
        self.norm1 = nn.RMSNorm(width, eps=_EPS)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.norm2 = nn.RMSNorm(width, eps=_EPS)
        self.gate = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        for layer in (self.qkv, self.proj, self.gate, self.down):
            nn.init.normal_(layer.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = _rotated(torch.stack((q, k)))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(out.transpose(1, 2).reshape(batch, tokens, width))
        gate, up = self.gate(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def _rotated(x: Tensor) -> Tensor:
    """Rotary positions: [..., T, D] with D even, halves turned by angles of base 10,000."""
    tokens, width = x.shape[-2:]
    rate = torch.arange(0, width, 2, device=x.device, dtype=torch.float32) / width
    angle = torch.arange(tokens, device=x.device, dtype=torch.float32)[:, None] * 10_000.0**-rate
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class ReadoutCopy(nn.Module):
    """A read-only copy of the readout's weight, one for all heads: frozen, and in the state_dict with its step count."""

    steps: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._count: int | None = 0  # `steps` on the host; None: read it

    @property
    def count(self) -> int:
        if self._count is None:
            self._count = int(self.steps)
        return self._count

    @count.setter
    def count(self, value: int) -> None:
        self._count = value
        self.steps.fill_(value)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._count = None


@dataclass
class RefreshLink:
    """``copy`` becomes the weight of ``readout`` before every step whose number ``refresh`` divides, the first included."""

    readout: nn.Module
    copy: ReadoutCopy
    refresh: int

    when: ClassVar[str] = "before_step"
    block: ClassVar[int] = -1

    @property
    def reads(self) -> tuple[Slot, ...]:
        return (Slot("weight", self.readout, "weight"), *self.frozen)

    @property
    def frozen(self) -> tuple[Slot, ...]:
        return (Slot("weight", self.copy, "weight"),)

    @torch.no_grad()
    def fire(self) -> None:
        if self.copy.count % self.refresh == 0:
            self.copy.weight.copy_(self.readout.weight)  # type: ignore[arg-type]
        self.copy.count += 1


class SOLOHead(nn.Module):
    """Blocks, RMSNorm, a trained temperature, then the copied readout: [B, T, D] -> the task loss of one score per token.

    The head of block 0 holds the copy; the others only refer to it, so that it is saved once.
    """

    def __init__(self, blocks: Sequence[nn.Module], width: int, copy: ReadoutCopy, *, first: bool, bias: bool) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.RMSNorm(width, eps=_EPS)
        self.temperature = nn.Parameter(torch.ones(()))
        self.bias = nn.Parameter(torch.zeros(len(copy.weight))) if bias else None
        self._copy = (copy,)  # a tuple hides it from the list of submodules
        if first:
            self.readout = copy

    def forward(self, h: Tensor, ctx: StepContext) -> LocalLoss:
        features = self.norm(self.blocks(h)) * self.temperature
        weight = self._copy[0].weight.detach()
        options, target = token_targets(ctx)
        if options is not None and (fuses(h.device) or len(weight) > MAX_CLASSES):
            loss, correct = pool_linear_cross_entropy(
                features.flatten(0, 1), weight, self.bias, target, pool="none", **options
            )
            return LocalLoss.of(("task", loss, 1.0), correct=correct)
        logits = F.linear(features, weight, self.bias)
        return LocalLoss.of(("task", ctx.criterion(logits, ctx.target), 1.0), logits=logits)


@register
class SOLO(Method):
    """Every block but the last has a head of fresh transformer blocks that predicts with a copy of the network's readout.

    Only the last block's loss trains the readout. Blocks have as many layers each. For networks that score every token:
    those of ``fastlocal.models`` and Hugging Face's decoders. With a large vocabulary, a head's logits are never in memory
    as a whole, on any device. There is no official code; both modes are the same.
    """

    name: ClassVar[str] = "solo"
    summary: ClassVar[str] = "fresh transformer blocks and a shared read-only copy of the readout, next-token loss"
    paper: ClassVar[str] = (
        "Yin et al.: SOLO: Pretraining Billion-Parameter Language Models with Shared-Output Local Learning, arXiv 2609.35440"
    )
    Options: ClassVar[type] = SOLOOptions

    def validate(self) -> None:
        o = self.options
        check_number("depth", o.depth, low=0, integer=True)
        check_number("refresh", o.refresh, low=1, integer=True)
        check_choice("units", o.units, ("auto", "transformer++"))
        if o.heads is not None:
            check_number("heads", o.heads, low=1, integer=True)

    def cuts(self, blocks: int, unit_names: list[str], net: nn.Module) -> list[int] | None:
        return layer_ranges(blocks, unit_names)

    def resolve(self, sites: list[Site]) -> None:
        self._copy: ReadoutCopy | None = None

    def head(self, site: Site) -> nn.Module:
        if len(site.shape) != 2 or not site.dense:
            raise ArgumentError(
                f"method: 'solo' predicts a class for every token, but block {site.index} gives {tuple(site.shape)} without "
                f"the batch and the task has {'one target per token' if site.dense else 'one target per sample'}; use "
                "method='dgl' or 'auglocal'"
            )
        width = site.shape[-1]
        if site.index == 0:
            self._copy = ReadoutCopy(readout_of(site.net, width, site.num_classes).weight)  # type: ignore[arg-type]
        assert self._copy is not None
        blocks = [self._block(site, width) for _ in range(self.options.depth)]
        return SOLOHead(blocks, width, self._copy, first=site.index == 0, bias=self.options.bias)

    def _block(self, site: Site, width: int) -> nn.Module:
        make = getattr(site.net, "make_unit", None)
        if callable(make) and self.options.units == "auto":
            return make(site.unit, width, 1)
        config = getattr(site.net, "config", None)
        own = getattr(config, "num_attention_heads", None) or getattr(site.net, "n_head", None)
        heads = self.options.heads or own or max(1, width // 64)
        if width % (2 * heads):
            raise ArgumentError(
                f"heads: {heads} attention heads do not divide a width of {width} into even parts; give another number"
            )
        return TransformerPlusPlus(width, heads)

    def links(self, sites: list[Site], heads: list[nn.Module]) -> Sequence[Link]:
        if not sites:
            return ()
        copy = heads[0].readout
        assert isinstance(copy, ReadoutCopy)
        readout = readout_of(sites[0].net, sites[0].shape[-1], sites[0].num_classes)
        self._copy = None
        return (RefreshLink(readout, copy, self.options.refresh),)


def readout_of(net: nn.Module, width: int, num_classes: int) -> nn.Module:
    """The module whose weight [num_classes, width] scores the classes: the output embeddings, or the last Linear that fits.

    Raises ArgumentError where there is none.
    """
    found = net.get_output_embeddings() if callable(getattr(net, "get_output_embeddings", None)) else None  # type: ignore[operator]
    if found is None:
        fits = [m for m in net.modules() if isinstance(m, nn.Linear) and m.weight.shape == (num_classes, width)]
        found = fits[-1] if fits else None
    if found is None or found.weight.shape != (num_classes, width):
        raise ArgumentError(
            f"method: 'solo' shares the readout, but {type(net).__name__} has no Linear of weight [{num_classes}, {width}]; "
            "give it get_output_embeddings(), or use method='dgl' or 'auglocal'"
        )
    return found
