"""Deeply-supervised nets: companion losses on hidden layers, beside the task loss and with full back-propagation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlocal.blocks.heads import AvgPool, NoHead
from fastlocal.blocks.losses import cross_entropy, full_precision
from fastlocal.blocks.types import LocalLoss, StepContext
from fastlocal.errors import ArgumentError
from fastlocal.methods.base import Method, Site, check_choice, check_number, register


def squared_hinge_loss(scores: Tensor, target: Tensor) -> Tensor:
    """Each class against the rest: the sum over classes of ``max(0, 1 -+ score)**2``, the mean over rows; 0-dim.

    The loss of the repository's output layer, too: ``fl.localize(..., criterion=squared_hinge_loss)``.

    Args:
        scores: [B, classes].
        target: class indices, int64 [B].

    Raises ArgumentError for other shapes or a target of probabilities.
    """
    if target.is_floating_point() or target.shape != scores.shape[:-1] or scores.dim() != 2:
        raise ArgumentError(
            f"target: the squared hinge takes scores [B, classes] and class indices [B], got {list(scores.shape)} and "
            f"{list(target.shape)} of {target.dtype}; use loss='softmax' for probabilities"
        )
    scores = full_precision(scores)
    signed = scores.scatter(1, target[:, None], -scores.gather(1, target[:, None]))
    return (1 + signed).clamp(min=0).square().sum() / len(scores)


class _ScaleGradient(torch.autograd.Function):
    """The tensor itself; its gradient is multiplied by a 0-dim tensor, which stays on the device."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (scale,) = ctx.saved_tensors
        return grads[0] * scale.to(grads[0].dtype), None


class CompanionHead(nn.Module):
    """A linear classifier of the flattened activation; one term, ``"companion"``.

    ``step`` (int64, saved with the model) counts the training forwards, so that the decay goes on after a resume. It is
    advanced on the device: no step waits for it.
    """

    step: Tensor

    def __init__(self, shape: tuple[int, ...], num_classes: int, options: DSNOptions, *, decay_loss: bool) -> None:
        super().__init__()
        self.options, self.decay_loss = options, decay_loss
        tokens = len(shape) == 2
        self.flatten: nn.Module = AvgPool() if tokens else nn.Flatten()
        features = shape[-1] if tokens else math.prod(shape)
        self.linear = nn.Linear(features, num_classes)
        bound = math.sqrt(3 / features)
        nn.init.uniform_(self.linear.weight, -bound, bound)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.off = NoHead()

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled backward would take it anew, from the next step
    def decay(self, dtype: torch.dtype) -> Tensor | None:
        """Counts a step in training and returns its factor, 0-dim on the device; None for one. The first is number 1."""
        o = self.options
        if self.training:
            self.step.add_(1)
        if o.decay == "power_inv":
            return (1 + o.localgamma * self.step.to(dtype)).pow(-o.localpower)
        if o.decay == "linear":
            assert o.steps is not None
            return (1 - self.step.to(dtype) / o.steps).clamp(min=0)
        return None

    def forward(self, h: Tensor, ctx: StepContext) -> LocalLoss:
        o = self.options
        if not o.companions:
            return self.off(h, ctx)
        dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
        decay = self.decay(dtype)
        x = self.flatten(h)
        if self.decay_loss:
            scores = self.linear(x)
        else:
            rate = o.lr_multiplier * (h.new_ones((), dtype=dtype) if decay is None else decay)
            weight, bias = self.linear.weight, self.linear.bias
            scores = F.linear(x, _ScaleGradient.apply(weight, rate), _ScaleGradient.apply(bias, 2 * rate))
        loss = (squared_hinge_loss if o.loss == "squared_hinge" else cross_entropy)(scores, ctx.target)
        if o.gamma:
            loss = (loss - o.gamma).clamp(min=0)
        if decay is not None and self.decay_loss:
            loss = loss * decay
        return LocalLoss.of(("companion", loss, o.alpha), logits=scores)


@dataclass
class DSNOptions:
    """Options by the names of the paper and the repository.

    loss: of the companions, "squared_hinge" or "softmax" (cross-entropy).
    alpha: weight of each companion loss.
    gamma: the companion loss counts for what it is above this.
    decay: "power_inv", (1 + localgamma * t) ** -localpower at step t; "linear", 1 - t / steps; or "none".
    localpower, localgamma: of "power_inv".
    steps: of "linear": where it reaches 0.
    lr_multiplier: mode="official": of the companion classifiers' own learning rate.
    companions: False leaves the companion losses out (the fine-tuning that follows); their parameters stay in the model, so
        that its checkpoints load.
    """

    loss: str = "squared_hinge"
    alpha: float = 1.0
    gamma: float = 0.0
    decay: str = "power_inv"
    localpower: float = 0.75
    localgamma: float = 1e-4
    steps: int | None = None
    lr_multiplier: float = 0.001
    companions: bool = True


@register
class DSN(Method):
    """A linear companion classifier on every block but the last. **Not gradient-isolated**: there is no border, one backward of
    the sum of all losses reaches all layers below, and activations live until then.

    ``mode="paper"`` decays the weight of the companion losses. In the authors' code nothing decays a loss: ``mode="official"``
    keeps their weight and instead slows the companion classifiers' own learning, by ``lr_multiplier`` (twice that for biases)
    and the decay. It does so by scaling their gradients, which is the same under SGD with momentum; under Adam it has no
    effect, and the optimizer's weight decay is not scaled with them (give ``heads.*`` a group without).

    The decay counts training forwards: where m micro-batches make an update, divide ``localgamma`` by m (multiply ``steps``).
    The authors' classifiers read the convolution before its ReLU; here they read the block's output: a map flattened, tokens
    by their mean. ``gamma`` and the linear decay are the paper's, the repository has neither.
    """

    name: ClassVar[str] = "dsn"
    summary: ClassVar[str] = "companion losses of linear classifiers beside full back-propagation; not isolated"
    paper: ClassVar[str] = "Lee, Xie, Gallagher, Zhang, Tu: Deeply-Supervised Nets, AISTATS 2015, arXiv 1409.5185"
    repository: ClassVar[str] = "s9xie/DSN"
    isolated = False
    Options: ClassVar[type] = DSNOptions

    def validate(self) -> None:
        o = self.options
        check_choice("loss", o.loss, ("squared_hinge", "softmax"))
        check_choice("decay", o.decay, ("power_inv", "linear", "none"))
        check_choice("companions", o.companions, (True, False))
        for name in ("alpha", "gamma", "localpower", "localgamma", "lr_multiplier"):
            check_number(name, getattr(o, name), low=0)
        if o.steps is not None or o.decay == "linear":
            check_number("steps", o.steps, low=1, integer=True)

    def head(self, site: Site) -> nn.Module:
        if site.dense:
            raise ArgumentError(
                "method: the companions of 'dsn' classify whole samples, but this network gives one output per position; "
                "use method='dgl'"
            )
        return CompanionHead(site.shape, site.num_classes, self.options, decay_loss=self.mode == "paper")
