"""A decoder of GPT-2's shape (Radford et al. 2019): its names, initialisation and, by default, tied embeddings."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlocal.errors import ArgumentError
from fastlocal.models._common import positive_int, probability, token_width, unit_index


def _init(module: nn.Module, n_layer: int) -> nn.Module:
    """N(0, 0.02) for weights, over sqrt(2 * n_layer) where a Linear feeds the residual stream; zero biases."""
    for name, m in module.named_modules():
        if isinstance(m, (nn.Linear, nn.Embedding)):
            std = 0.02 / math.sqrt(2 * n_layer) if name.endswith("c_proj") else 0.02
            nn.init.normal_(m.weight, std=std)
        if isinstance(m, nn.Linear) and m.bias is not None:
            nn.init.zeros_(m.bias)
    return module


class CausalAttention(nn.Module):
    """Multi-head self-attention in which a token sees itself and earlier ones: [B, T, n_embd] -> [B, T, n_embd]."""

    def __init__(self, n_embd: int, n_head: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.n_head = n_head
        self.attn_dropout = dropout
        self.c_attn = nn.Linear(n_embd, 3 * n_embd)
        self.c_proj = nn.Linear(n_embd, n_embd)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else None

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.c_attn(x).view(batch, tokens, 3, self.n_head, width // self.n_head).permute(2, 0, 3, 1, 4)
        p = self.attn_dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        out = self.c_proj(out.transpose(1, 2).reshape(batch, tokens, width))
        return out if self.dropout is None else self.dropout(out)


class GPTFeedForward(nn.Module):
    """Linear, GELU (tanh form), Linear, with four times the width inside."""

    def __init__(self, n_embd: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.c_fc = nn.Linear(n_embd, 4 * n_embd)
        self.c_proj = nn.Linear(4 * n_embd, n_embd)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
        return x if self.dropout is None else self.dropout(x)


class GPTBlock(nn.Module):
    """Pre-norm decoder block, [B, T, n_embd] -> [B, T, n_embd]."""

    def __init__(self, n_embd: int, n_head: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(n_embd)
        self.attn = CausalAttention(n_embd, n_head, dropout)
        self.ln_2 = nn.LayerNorm(n_embd)
        self.mlp = GPTFeedForward(n_embd, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2-shaped decoder: tokens [B, T] of an integer dtype, T <= block_size -> logits [B, T, vocab_size].

    The defaults are GPT-2 small (124,439,808 parameters). Units: ``embed`` (token and position embeddings and their
    dropout), then every block ``h.N``; the readout is ``ln_f`` and ``lm_head``.

    Args:
        vocab_size, block_size: number of tokens known, longest sequence.
        n_layer, n_head, n_embd: number of blocks, attention heads, width.
        dropout: probability on embeddings, attention weights and what joins the residual stream.
        tie: ``lm_head.weight`` is ``wte.weight``.

    Raises ArgumentError for a non-positive size, a ``dropout`` outside [0, 1), an ``n_embd`` that ``n_head`` does not
    divide and, when called, for tokens that are not integers [B, T] with T <= block_size.
    """

    causal = True

    def __init__(
        self,
        *,
        vocab_size: int = 50257,
        block_size: int = 1024,
        n_layer: int = 12,
        n_head: int = 12,
        n_embd: int = 768,
        dropout: float = 0.0,
        tie: bool = True,
    ) -> None:
        super().__init__()
        self.num_classes = positive_int("vocab_size", vocab_size)
        self.block_size = positive_int("block_size", block_size)
        self.n_layer = positive_int("n_layer", n_layer)
        self.n_head = positive_int("n_head", n_head)
        self.n_embd = positive_int("n_embd", n_embd)
        probability("dropout", dropout)
        if self.n_embd % self.n_head:
            raise ArgumentError(f"n_embd must be a multiple of n_head={n_head}, got {n_embd}")
        self.widths = [self.n_embd] * (1 + self.n_layer)
        self.wte = nn.Embedding(self.num_classes, self.n_embd)
        self.wpe = nn.Embedding(self.block_size, self.n_embd)
        self.drop = nn.Dropout(dropout) if dropout > 0 else None
        self.h = nn.Sequential(*(GPTBlock(self.n_embd, self.n_head, dropout) for _ in range(self.n_layer)))
        self.ln_f = nn.LayerNorm(self.n_embd)
        self.lm_head = nn.Linear(self.n_embd, self.num_classes, bias=False)
        _init(self, self.n_layer)
        if tie:
            self.lm_head.weight = self.wte.weight

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens [B, T] -> their embeddings [B, T, n_embd]."""
        if tokens.is_floating_point() or tokens.is_complex():
            raise ArgumentError(f"tokens must have an integer dtype such as torch.int64, got {tokens.dtype}")
        if tokens.ndim != 2 or tokens.shape[1] > self.block_size:
            raise ArgumentError(
                f"tokens must be [B, T] with T at most block_size={self.block_size}, got {tuple(tokens.shape)}; "
                "cut the sequence or build the model with a larger block_size"
            )
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        h = self.wte(tokens) + self.wpe(positions)
        return h if self.drop is None else self.drop(h)

    def units(self) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
        return [("embed", self.embed), *((f"h.{index}", unit) for index, unit in enumerate(self.h))]

    def readout(self, h: Tensor) -> Tensor:
        return self.lm_head(self.ln_f(h))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.readout(self.h(self.embed(tokens)))

    def make_unit(self, i: int, in_channels: int, stride: int) -> nn.Module:
        """A fresh decoder block without dropout; ``in_channels`` must be ``n_embd`` and ``stride`` 1."""
        unit_index(i, len(self.widths))
        token_width(in_channels, stride, self.n_embd)
        return _init(GPTBlock(self.n_embd, self.n_head), self.n_layer)

    def make_readout(self, in_features: int, num_classes: int) -> nn.Module:
        """A fresh LayerNorm and Linear (no bias, as ``lm_head``), applied to every token."""
        head = nn.Sequential(nn.LayerNorm(in_features), nn.Linear(in_features, num_classes, bias=False))
        return _init(head, self.n_layer)


def gpt(**options: Any) -> GPT:
    return GPT(**options)
