"""LoPT, local post-training: ranges of layers of a language model keep their own input readable, the last learns the task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlocal.blocks.losses import full_precision
from fastlocal.errors import ArgumentError
from fastlocal.methods.base import LocalLoss, Method, Site, StepContext, check_number, register


@dataclass
class LoPTOptions:
    """Options, with the names of the paper and its code.

    lam: weight of the reconstruction losses ("lambda_aux"), of which the mean over all heads is taken.
    reduction: the head's hidden width is the model's over this.
    """

    lam: float = 10.0
    reduction: int = 4


class Embedding:
    """What goes into the first layer of a transformer, computed anew from the raw input without a gradient.

    The sum of token and position embeddings (GPT-2's ``wte`` and ``wpe``), a Hugging Face network's input embeddings, or
    the first of the network's ``units()``. A dropout behind the token embeddings is left out. ``shape`` is that of one row,
    where ``input_shape`` is given. Raises ArgumentError for a network that has none of these.
    """

    def __init__(self, net: nn.Module, input_shape: tuple[int, ...] | None = None):
        inner = getattr(net, "transformer", net)
        self.position: nn.Module | None = None
        self.of: Callable[[Any], Any]
        if hasattr(inner, "wte") and hasattr(inner, "wpe"):
            self.of, self.position = inner.wte, inner.wpe  # type: ignore[assignment]
        elif callable(getattr(net, "get_input_embeddings", None)):
            self.of = net.get_input_embeddings()  # type: ignore[operator]
        elif callable(getattr(net, "units", None)):
            self.of = net.units()[0][1]  # type: ignore[operator]
        else:
            raise ArgumentError(
                f"method: the first block's loss needs its embeddings, but {type(net).__name__} has no "
                "get_input_embeddings(); add it, or units() whose first one embeds"
            )
        self.shape: tuple[int, ...] = ()
        if input_shape is not None:
            like = next(net.parameters())
            self.shape = tuple(self(torch.zeros(1, *input_shape, dtype=like.dtype, device=like.device)).shape[1:])

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        h = self.of(x)
        return h if self.position is None else h + self.position(torch.arange(x.shape[1], device=x.device))


class LoPTHead(nn.Module):
    """LayerNorm, Linear, GELU, Linear from a block's output [..., D] to its input, in mean squared error, float32 at least.

    ``embedding``: gives the input of block 0, whose embeddings belong to the block; not a part of the head.
    """

    def __init__(self, width: int, hidden: int, weight: float, embedding: Embedding | None) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight, gain=0.1)
                nn.init.zeros_(layer.bias)
        self.weight, self.embedding = weight, embedding

    def forward(self, h: Tensor, ctx: StepContext) -> LocalLoss:
        target = ctx.boundary
        if target is None:
            assert self.embedding is not None and ctx.input is not None
            target = self.embedding(ctx.input)
        loss = F.mse_loss(full_precision(self.net(h)), full_precision(target))
        return LocalLoss.of(("reconstruction", loss, self.weight))


def layer_ranges(blocks: int, unit_names: list[str]) -> list[int] | None:
    """The last units of all ranges but the last: as many layers in each, in the first ones one more where they do not divide.

    Layers are the units whose names end with a number. None where there are fewer than blocks.
    """
    layers = [i for i, name in enumerate(unit_names) if name.rpartition(".")[2].isdigit()]
    if not 1 < blocks <= len(layers):
        return None
    base, extra = divmod(len(layers), blocks)
    return [layers[base * (k + 1) + min(k + 1, extra) - 1] for k in range(blocks - 1)]


@register
class LoPT(Method):
    """Each block but the last reconstructs its own detached input from its output; the last one has the task loss.

    Cut into ranges of as many layers, the first ones one longer where they do not divide; embeddings belong to block 0,
    final norm and readout to the last. The official code adds all losses up and runs one backward; gradients are the same.
    It unties the embeddings (``tied="untie"``), clips the norm over all blocks at 1 and trains the blocks before the last
    at a learning rate of their own. Both modes are the same.
    """

    name: ClassVar[str] = "lopt"
    summary: ClassVar[str] = "layer ranges of a language model reconstruct their input features"
    paper: ClassVar[str] = (
        "Shi et al.: Rethinking Local Learning: A Cheaper and Faster Recipe for LLM Post-Training, arXiv 2605.04913"
    )
    repository: ClassVar[str] = "HumyuShi/LoPT"
    reads_boundary = True
    Options: ClassVar[type] = LoPTOptions

    def validate(self) -> None:
        check_number("lam", self.options.lam, low=0)
        check_number("reduction", self.options.reduction, low=1, integer=True)

    def cuts(self, blocks: int, unit_names: list[str], net: nn.Module) -> list[int] | None:
        return layer_ranges(blocks, unit_names)

    def head(self, site: Site) -> nn.Module:
        o = self.options
        if len(site.shape) != 2:
            raise ArgumentError(
                f"method: 'lopt' reconstructs tokens [T, D], but block {site.index} gives {tuple(site.shape)} without the "
                "batch; use method='feature_reconstruction'"
            )
        width = site.shape[-1]
        embedding = Embedding(site.net) if site.index == 0 else None
        return LoPTHead(width, max(width // o.reduction, 1), o.lam / (site.blocks - 1), embedding)
