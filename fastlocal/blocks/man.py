"""The auxiliary network of MAN and MAN++: a trained and an averaged copy of the next unit, side by side, under a head."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastlocal.blocks.heads import Upsample, conv_bn_relu
from fastlocal.blocks.types import LocalLoss, StepContext
from fastlocal.errors import ArgumentError
from fastlocal.ops._dispatch import backend, fuses
from fastlocal.ops.modules import AvgPool, FusedSequential


def twin(unit: nn.Module, *, fresh: bool, trained: bool = True) -> nn.Module:
    """A copy of a unit, its weights drawn anew with ``fresh``; it takes gradients where ``trained`` says so.

    Drawn as the official code does: convolutions from N(0, sqrt(2 / (k * k * out_channels))), linear layers from a truncated
    normal of 0.02 with biases of 0, norms 1 and 0.
    """
    made = copy.deepcopy(unit)
    for m in made.modules() if fresh else ():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(m, nn.Linear):
            nn.init.trunc_normal_(m.weight, std=0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, nn.modules.batchnorm._BatchNorm | nn.LayerNorm | nn.GroupNorm):
            m.reset_parameters()
    for p in made.parameters():
        p.grad = None
    return made.requires_grad_(trained)


def shape_after(unit: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a unit's output for one input of ``shape``, both without the batch. Raises ArgumentError where it has no
    parameters or does not run on such an input alone.
    """
    like = next(unit.parameters(), None)
    if like is None:
        raise ArgumentError(
            f"method: its heads copy the unit after a cut, and {type(unit).__name__} has no parameters; make that unit one module"
        )
    training = unit.training
    try:
        with torch.no_grad():
            return tuple(unit.eval()(torch.zeros((1, *shape), dtype=like.dtype, device=like.device)).shape[1:])
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ArgumentError(
            f"method: its heads copy the unit after a cut, and {type(unit).__name__} does not run on an activation of shape "
            f"{shape} alone ({error}); use other cuts, or method='dgl'"
        ) from error
    finally:
        unit.train(training)


class Fusion(nn.Module):
    """``lb(x) + ema(x)``, or ``scale * lb(x) + (2 - scale) * ema(x)``.

    ``lb`` ("learnable bias") is trained. ``ema`` takes no gradient and passes one on to ``x``; a link averages its source's
    parameters into it, while its BatchNorms keep statistics of their own.

    Args:
        unit: what both are copies of.
        fresh: draw both anew.
        scaled: add the trained ``scale``, 0-dim, 1 at first.
        early: the average moves between forward and backward. Then its half is run by plain modules everywhere: fused
            operators compute activations anew in backward, with norms that are not those of the forward any more.
    """

    def __init__(self, unit: nn.Module, *, fresh: bool, scaled: bool, early: bool = False) -> None:
        super().__init__()
        self.early = early
        self.lb = twin(unit, fresh=fresh)
        self.ema = twin(unit, fresh=fresh, trained=False)
        self.scale = nn.Parameter(torch.ones(())) if scaled else None

    def forward(self, x: Tensor) -> Tensor:
        trained = self.lb(x)
        with backend("reference") if self.early else nullcontext():
            averaged = self.ema(x)
        if self.scale is None:
            return trained + averaged
        if fuses(x.device):
            return _Scaled.apply(trained, averaged, self.scale)  # type: ignore[no-any-return]
        return self.scale * trained + (2 - self.scale) * averaged


class _Scaled(torch.autograd.Function):
    """``s * a + (2 - s) * b``, which is ``2 * b + s * (a - b)``: one map is saved, not two, and 7 launches do it, not 12."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, s: Tensor) -> Tensor:
        difference = a - b
        ctx.save_for_backward(difference, s)
        return torch.add(difference * s, b, alpha=2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        (dy,) = grads
        difference, s = ctx.saved_tensors
        da = dy * s
        db = torch.lerp(dy, da, -1.0)  # 2 * dy - da
        ds = torch.sum(dy * difference, dtype=s.dtype) if ctx.needs_input_grad[2] else None
        return da, db, ds


class FusedHead(nn.Module):
    """A head on the output of a `Fusion`: ``(h, ctx) -> LocalLoss``, its terms and scores."""

    def __init__(self, fusion: Fusion, head: nn.Module) -> None:
        super().__init__()
        self.fusion, self.head = fusion, head

    def forward(self, h: Tensor, ctx: StepContext) -> LocalLoss:
        return self.head(self.fusion(h), ctx)


def decoder_net_deep(in_channels: int, image: tuple[int, int, int]) -> FusedSequential:
    """The ImageNet decoder for maps of 1024 channels: [B, in_channels, h, w] -> image logits [B, C, H, W].

    1x1 conv -> 192; upsample to 1/8 of the image, 1x1 conv -> 64; then three times upsample (to 1/4, 1/2, 1) and 3x3 conv
    (-> 32, 12, the image's channels).
    """
    channels, height, width = image
    layers = conv_bn_relu(in_channels, 192, 1, bias=True)
    for part, kernel_size, (width_in, width_out) in ((8, 1, (192, 64)), (4, 3, (64, 32)), (2, 3, (32, 12))):
        layers.append(Upsample((height // part, width // part)))
        layers += conv_bn_relu(width_in, width_out, kernel_size, bias=True)
    return FusedSequential(*layers, Upsample((height, width)), nn.Conv2d(12, channels, 3, padding=1))


def classifier_net_deep(in_channels: int, num_classes: int) -> FusedSequential:
    """The ImageNet classifier for maps of 1024 channels: [B, in_channels, h, w] -> [B, num_classes].

    1x1 -> 256, 3x3 / 2 -> 256, 3x3 / 2 -> 512, 1x1 -> 2048 (each conv + BN + ReLU), mean, Linear.
    """
    layers = [
        *conv_bn_relu(in_channels, 256, 1),
        *conv_bn_relu(256, 256, 3, 2),
        *conv_bn_relu(256, 512, 3, 2),
        *conv_bn_relu(512, 2048, 1),
    ]
    return FusedSequential(*layers, AvgPool(), nn.Linear(2048, num_classes))
