"""Auxiliary heads: small networks from a block's boundary activation to its local loss.

A head is a module with ``forward(h, ctx) -> LocalLoss``. Everything method-specific (which head, which widths, which
weights) is decided in ``fastlocal.methods``; the networks here know shapes only. ReLUs that follow a norm or a linear
layer are in place: neither needs its output for its backward.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlocal.blocks import losses
from fastlocal.blocks.types import LocalLoss, StepContext
from fastlocal.ops._dispatch import fuses
from fastlocal.ops.modules import AvgPool, FusedSequential, global_mean, hooked
from fastlocal.ops.pool_linear_cross_entropy import pool_linear_cross_entropy


class ClassifierHead(nn.Module):
    """The task loss of class scores that ``net`` computes from the boundary activation, times ``weight``; one term, ``"task"``."""

    def __init__(self, net: nn.Module, weight: float = 1.0) -> None:
        super().__init__()
        self.net, self.weight = net, weight

    def forward(self, h: Tensor, ctx: StepContext) -> LocalLoss:
        loss, scores = task_loss(self.net, h, ctx, self.weight)
        return LocalLoss.of_weighted(("task", loss, self.weight), **scores)


def task_loss(net: nn.Module, h: Tensor, ctx: StepContext, grad_scale: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    """The task loss of the class scores ``net(h)``, and ``{"logits": ...}`` or ``{"correct": ...}``.

    ``grad_scale`` multiplies the gradient, not the loss: for ``LocalLoss.of_weighted``.

    In training on a GPU, a chain that ends with a Linear under a cross-entropy computes no logits: pool, Linear and loss
    are one operator, which counts the hits too (`fastlocal.ops.pool_linear_cross_entropy`). One target per token, the
    causal loss included, is served as one row per token.
    """
    options, target, tokens = None, ctx.target, False
    if net.training and fuses(h.device) and isinstance(net, FusedSequential):
        options = losses.cross_entropy_options(ctx.criterion, target)
        if options is None:
            options, target = token_targets(ctx)
            tokens = options is not None
    readout = _linear_readout(net) if options is not None else None  # type: ignore[arg-type]
    if options is None or readout is None:
        logits = net(h)
        return losses.scaled_gradient(ctx.criterion(logits, ctx.target), grad_scale), {"logits": logits}
    features_of, linear, pools = readout
    features = features_of(h)
    pool = {2: "none", 3: "tokens" if pools else "", 4: "mean" if pools else ""}.get(features.dim(), "")
    if tokens:
        pool = "" if pools or features.shape[:-1] != ctx.target.shape else "none"
    if pool == "" or len(features) != len(ctx.target):
        logits = linear(global_mean(features) if pools else features)
        return losses.scaled_gradient(ctx.criterion(logits, ctx.target), grad_scale), {"logits": logits}
    if tokens:
        features = features.flatten(0, 1)
    loss, correct = pool_linear_cross_entropy(
        features, linear.weight, linear.bias, target, pool=pool, grad_scale=grad_scale, **options
    )
    return loss, {"correct": correct}


def token_targets(ctx: StepContext) -> tuple[dict[str, Any] | None, Tensor]:
    """Where the loss takes one class index per token, [B, T]: the operator's options, and its targets [B * T]."""
    criterion, target = ctx.criterion, ctx.target
    if not isinstance(target, Tensor) or target.dim() != 2 or target.is_floating_point():
        return None, target
    if type(criterion) is losses.CausalLMLoss:
        options = {"ignore_index": criterion.ignore_index, "label_smoothing": criterion.label_smoothing}
        shifted = ctx.once(
            ("next token", criterion.ignore_index),
            lambda: F.pad(target[:, 1:], (0, 1), value=criterion.ignore_index).flatten(),
        )
        return options, shifted
    if isinstance(criterion, nn.CrossEntropyLoss):  # which takes [B, V, T] for such targets
        return None, target
    flat = target.flatten()
    return losses.cross_entropy_options(criterion, flat), flat


def _linear_readout(net: FusedSequential) -> tuple[Callable[[Tensor], Tensor], nn.Linear, bool] | None:
    """`FusedSequential.readout`, also of a chain whose last member is an ``nn.Sequential`` (a model's ``make_readout``)."""
    found = net.readout()
    if found is not None:
        end, linear, pools = found
        return lambda h: net.run(h, end), linear, pools
    tail = net[-1] if len(net) else None
    if type(tail) is not nn.Sequential or not len(tail) or type(tail[-1]) is not nn.Linear:
        return None
    if any(map(hooked, (net, tail, tail[-1]))):
        return None

    def features_of(h: Tensor) -> Tensor:
        x = net.run(h, len(net) - 1)
        for member in list(tail)[:-1]:
            x = member(x)
        return x

    return features_of, tail[-1], False


def conv_bn_relu(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, *, bias: bool = False
) -> list[nn.Module]:
    """Convolution with "same" padding, BatchNorm2d, ReLU."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=bias)
    return [conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]


def init_convs(module: nn.Module) -> nn.Module:
    """Redraws convolution weights from N(0, sqrt(2 / (k * k * out_channels))), as in ResNets; returns the module."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
    return module


def mlp(sizes: Sequence[int], norm: type[nn.Module], *, bias: bool = True) -> list[nn.Module]:
    """Linear, norm, ReLU for every size but the last; then a Linear (with bias) to the last."""
    layers: list[nn.Module] = []
    for width_in, width_out in itertools.pairwise(sizes[:-1]):
        layers += [nn.Linear(width_in, width_out, bias=bias), norm(width_out), nn.ReLU(inplace=True)]
    return [*layers, nn.Linear(sizes[-2], sizes[-1])]


def dgl_net(
    shape: tuple[int, ...],
    num_classes: int,
    *,
    convs: int = 3,
    kernel_size: int = 1,
    hidden: int = 3,
    bias: bool = True,
    part: int = 4,
) -> FusedSequential:
    """The heads of the DGL repository: [B, C, H, W] -> [B, num_classes].

    Pool to 1/``part`` of the size (not before 3x3 convolutions), ``convs`` times conv + BN + ReLU of the same width,
    pool to 2x2, flatten to 4C, ``hidden`` times Linear + BN + ReLU of the same width, Linear. The default is its
    "mlp-sr"; ``convs=0`` its "mlp"; ``convs=2, kernel_size=3, hidden=0`` its "cnn", which has a BatchNorm2d in place of
    the hidden layers; ``hidden=2, bias=False`` the variant of the AugLocal repository.
    """
    channels, height, width = shape
    layers: list[nn.Module] = []
    size = (math.ceil(height / part), math.ceil(width / part))
    if kernel_size == 1:
        layers.append(nn.AdaptiveAvgPool2d(size))
    for _ in range(convs):
        layers += conv_bn_relu(channels, channels, kernel_size)
    if kernel_size != 1:
        size = (height, width)
    # The DGL repository blows a map of 1x1 up to 2x2, AugLocal's variant leaves it.
    last = (2, 2) if bias else (min(size[0], 2), min(size[1], 2))
    if size != last:
        layers.append(nn.AdaptiveAvgPool2d(last))
    if hidden == 0:
        layers.append(nn.BatchNorm2d(channels))
    features = channels * last[0] * last[1]
    layers += [nn.Flatten(), *mlp([features] * (hidden + 1) + [num_classes], nn.BatchNorm1d, bias=bias)]
    return FusedSequential(*layers)


def man_plus_plus_net(shape: tuple[int, ...], num_classes: int, width: int = 128, hidden: int = 512) -> FusedSequential:
    """The DGL-type head of the MAN++ repository: [B, C, H, W] -> [B, num_classes].

    Pool to 8x8, three times 1x1 conv -> ``width`` + BN + ReLU, mean, three times Linear -> ``hidden`` + BN + ReLU,
    Linear.
    """
    layers: list[nn.Module] = [] if shape[1:] == (8, 8) else [nn.AdaptiveAvgPool2d(8)]
    for channels in (shape[0], width, width):
        layers += conv_bn_relu(channels, width, 1)
    return FusedSequential(*layers, AvgPool(), *mlp([width, hidden, hidden, hidden, num_classes], nn.BatchNorm1d))


def token_mlp(shape: tuple[int, ...], num_classes: int, *, dense: bool, hidden: int = 3) -> FusedSequential:
    """The token form of an MLP head, ours: ``hidden`` x [Linear, LayerNorm, ReLU] of the same width, Linear.

    [B, D] -> [B, num_classes]; [B, T, D] is averaged over tokens first, or with ``dense`` gives [B, T, num_classes].
    """
    pool = [AvgPool()] if len(shape) == 2 and not dense else []
    return FusedSequential(*pool, *mlp([shape[-1]] * (hidden + 1) + [num_classes], nn.LayerNorm))


class PredSimHead(nn.Module):
    """Prediction and similarity-matching losses of one layer (Nøkland and Eidnes, arXiv 1901.06656).

    Terms: ``"pred"``, the task loss of a linear readout of the pooled and flattened activation, times ``1 - beta``;
    ``"sim"``, the similarity-matching loss of a 3x3 convolution (of a Linear for [B, D] and [B, T, D]), times ``beta``.
    ``losses`` keeps one of the two at weight 1, or both.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        num_classes: int,
        *,
        losses: str = "predsim",
        beta: float = 0.99,
        dim_in_decoder: int = 4096,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.weights = {"predsim": (1 - beta, beta), "pred": (1.0, 0.0), "sim": (0.0, 1.0)}[losses]
        width = shape[0] if len(shape) == 3 else shape[-1]
        self.pred: nn.Sequential | None = None
        self.sim: nn.Module | None = None
        if losses != "sim":
            pool, features = _decoder_pool(shape, dim_in_decoder)
            self.pred = FusedSequential(*pool, nn.Linear(features, num_classes))
        if losses != "pred":
            image = len(shape) == 3
            self.sim = (
                nn.Conv2d(width, width, 3, padding=1, bias=False) if image else nn.Linear(width, width, bias=False)
            )

    def forward(self, h: Tensor, ctx: StepContext) -> LocalLoss:
        terms: list[tuple[str, Tensor, float]] = []
        scores: dict[str, Tensor] = {}
        fused = fuses(h.device)  # operators take the weights into their backwards
        scales = self.weights if fused else (1.0, 1.0)
        if self.pred is not None:
            task, scores = task_loss(self.pred, h, ctx, scales[0])
            terms.append(("pred", task, self.weights[0]))
        if self.sim is not None:
            features = self.sim(h)
            dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
            matched = None  # a kernel compares the targets itself
            if not fuses(features.device):
                matched = ctx.once(
                    ("target_similarity", self.num_classes, dtype),
                    lambda: losses.target_similarity(ctx.target, self.num_classes, dtype),
                )
            sim = losses.similarity_matching_loss(features, ctx.target, self.num_classes, matched, grad_scale=scales[1])
            terms.append(("sim", sim, self.weights[1]))
        return (LocalLoss.of_weighted if fused else LocalLoss.of)(*terms, **scores)


class BioPredSimHead(nn.Module):
    """The "biologically plausible" form of `PredSimHead`: no weight of the head is transposed or learned from the classes.

    The classes are projected to ``target_proj_size`` random numbers. Terms: ``"pred"``, binary cross-entropy of a linear readout
    of the pooled activation with the signs of these numbers, whose gradient goes back through random weights of its own
    (feedback alignment); ``"sim"``, the similarity of the pooled activations against that of the numbers. There are no class
    scores.
    """

    projection: Tensor
    feedback: Tensor

    def __init__(
        self,
        shape: tuple[int, ...],
        num_classes: int,
        *,
        losses: str = "predsim",
        beta: float = 0.99,
        dim_in_decoder: int = 4096,
        target_proj_size: int = 128,
    ) -> None:
        super().__init__()
        self.weights = {"predsim": (1 - beta, beta), "pred": (1.0, 0.0), "sim": (0.0, 1.0)}[losses]
        layers, features = _decoder_pool(shape, dim_in_decoder)
        self.pool = nn.Sequential(*[layer for layer in layers if not isinstance(layer, nn.Flatten)])
        self.pred = nn.Linear(features, target_proj_size) if losses != "sim" else None
        if self.pred is not None:
            nn.init.zeros_(self.pred.weight)
            nn.init.zeros_(self.pred.bias)
            self.register_buffer("feedback", nn.Linear(features, target_proj_size, bias=False).weight.detach())
        self.register_buffer("projection", nn.Linear(num_classes, target_proj_size, bias=False).weight.detach())

    def forward(self, h: Tensor, ctx: StepContext) -> LocalLoss:
        h = losses.full_precision(self.pool(h))
        wide = h.dtype
        target, projection = ctx.target, self.projection.to(wide).t()
        projected = target.to(wide) @ projection if target.is_floating_point() else projection[target]
        terms: list[tuple[str, Tensor, float]] = []
        if self.pred is not None:
            signs = (projected > 0).to(wide)
            scores = _FeedbackAlignment.apply(h.flatten(1), self.pred.weight, self.pred.bias, self.feedback)
            terms.append(("pred", F.binary_cross_entropy_with_logits(scores, signs), self.weights[0]))
        if self.weights[1] > 0:
            sim = F.mse_loss(losses.similarity_matrix(h), losses.similarity_matrix(projected))
            terms.append(("sim", sim, self.weights[1]))
        return LocalLoss.of(*terms)


class _FeedbackAlignment(torch.autograd.Function):
    """A linear layer whose input's gradient takes other, fixed weights (Lillicrap et al., arXiv 1411.0247)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, feedback: Tensor) -> Tensor:
        ctx.save_for_backward(x, feedback)
        return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        x, feedback = ctx.saved_tensors
        (grad,) = grads
        return grad @ feedback.to(grad.dtype), grad.t() @ x, grad.sum(0), None


def _decoder_pool(shape: tuple[int, ...], limit: int) -> tuple[list[nn.Module], int]:
    """Layers that pool and flatten an activation to at most ``limit`` numbers where they can, and how many that gives.

    Window sizes are powers of two, the height's never smaller than the width's; a map that they do not divide is
    padded.
    """
    if len(shape) < 3:
        return ([AvgPool()] if len(shape) == 2 else []), shape[-1]
    channels, height, width = shape
    window = [1, 1]
    out = [height, width]
    while channels * out[0] * out[1] > limit and window[0] < height:
        for axis, size in enumerate((height, width)):
            if channels * out[0] * out[1] > limit:
                window[axis] *= 2
                out[axis] = math.ceil(size / window[axis])
    layers: list[nn.Module] = [nn.Flatten()]
    if window != [1, 1]:
        pad_h, pad_w = (k * (o - size // k) // 2 for k, o, size in zip(window, out, (height, width)))
        layers.insert(0, nn.AvgPool2d((window[0], window[1]), padding=(pad_h, pad_w)))
    return layers, channels * out[0] * out[1]


class InfoProHead(nn.Module):
    """Reconstruction of the image and a classification or contrastive loss (InfoPro, Wang et al., ICLR 2021).

    Args:
        decoder: boundary activation -> image logits [B, C, H, W] (before the sigmoid), or None to leave the term out.
        classifier: boundary activation -> class scores, or the features of the contrastive loss; None to leave it out.
        contrast: whether the second loss is the supervised contrastive one.
        weights: (lambda1, lambda2) of the two terms ``"reconstruction"`` and ``"task"`` or ``"contrast"``.
        mean, std: per channel, what the input images were normalised with.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        decoder: nn.Module | None,
        classifier: nn.Module | None,
        *,
        contrast: bool,
        weights: tuple[float, float],
        mean: Sequence[float],
        std: Sequence[float],
        temperature: float = 0.07,
    ) -> None:
        super().__init__()
        self.decoder, self.classifier = decoder, classifier
        self.contrast, self.weights, self.temperature = contrast, weights, temperature
        self.normalisation = (tuple(mean), tuple(std))
        for name, values in (("mean", mean), ("std", std)):
            # float64, so that a float64 run restores the image exactly; not saved, it is an option.
            buffer = torch.tensor(tuple(values), dtype=torch.float64).view(-1, 1, 1)
            self.register_buffer(name, buffer, persistent=False)

    def forward(self, h: Tensor, ctx: StepContext) -> LocalLoss:
        terms: list[tuple[str, Tensor, float]] = []
        scores: dict[str, Tensor] = {}
        fused = fuses(h.device)  # operators take the weights into their backwards
        scales = self.weights if fused else (1.0, 1.0)
        if self.decoder is not None:
            image = ctx.once(("image", *self.normalisation), lambda: self._image(ctx))
            loss = losses.reconstruction_loss(self.decoder(h), image, grad_scale=scales[0])
            terms.append(("reconstruction", loss, self.weights[0]))
        if self.classifier is not None:
            if self.contrast:
                terms.append(("contrast", self._contrast(self.classifier(h), ctx, scales[1]), self.weights[1]))
            else:
                task, scores = task_loss(self.classifier, h, ctx, scales[1])
                terms.append(("task", task, self.weights[1]))
        return (LocalLoss.of_weighted if fused else LocalLoss.of)(*terms, **scores)

    def _image(self, ctx: StepContext) -> Tensor:
        assert ctx.input is not None
        return losses.restore_image(ctx.input, self.mean, self.std)

    def _contrast(self, features: Tensor, ctx: StepContext, grad_scale: float) -> Tensor:
        dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
        positives = None  # a kernel compares the labels itself
        if not fuses(features.device):
            positives = ctx.once(("positives", dtype), lambda: losses.positive_weights(ctx.target, dtype))
        return losses.supervised_contrastive_loss(
            features, ctx.target, self.temperature, positives, grad_scale=grad_scale
        )


class Upsample(nn.Module):
    """Bilinear resize with aligned corners to a fixed size; the input itself where it has that size already."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[-2:]) == self.size:
            return x
        return F.interpolate(x, size=self.size, mode="bilinear", align_corners=True)


def decoder_net(in_channels: int, image: tuple[int, int, int], *, convs: int = 2, width: int = 12) -> FusedSequential:
    """InfoPro's decoder: [B, in_channels, h, w] -> image logits [B, C, H, W].

    Upsample to the image, ``convs - 1`` times 3x3 conv -> ``width`` + BN + ReLU, 3x3 conv to the image's channels. All
    convolutions have a bias.
    """
    layers: list[nn.Module] = [Upsample(image[1:])]
    for channels in [in_channels] + [width] * (convs - 2):
        layers += conv_bn_relu(channels, width, 3, bias=True)
    return FusedSequential(*layers, nn.Conv2d(width, image[0], 3, padding=1))


def decoder_net_imagenet(
    in_channels: int, image: tuple[int, int, int], least: tuple[int, int] = (1, 1)
) -> FusedSequential:
    """InfoPro's decoder for ImageNet and Cityscapes: [B, in_channels, h, w] -> image logits [B, C, H, W].

    1x1 conv -> 128; three times upsample (to 1/4, 1/2, 1 of the image, but not below ``least``) and 3x3 conv (-> 32, 12, the
    image's channels).
    """
    channels, height, width = image
    layers = conv_bn_relu(in_channels, 128, 1, bias=True)
    for part, (width_in, width_out) in ((4, (128, 32)), (2, (32, 12))):
        size = (max(height // part, least[0]), max(width // part, least[1]))
        layers += [Upsample(size), *conv_bn_relu(width_in, width_out, 3, bias=True)]
    return FusedSequential(*layers, Upsample((height, width)), nn.Conv2d(12, channels, 3, padding=1))


def segmentation_net(in_channels: int, num_classes: int, size: tuple[int, int]) -> FusedSequential:
    """InfoPro's second head for segmentation: [B, in_channels, h, w] -> a class score per pixel, [B, num_classes, *size].

    3x3 conv (with bias) to half the channels + BN + ReLU, Dropout2d of 0.1, 1x1 conv, upsample. The published one has 1,024
    channels and makes them 512.
    """
    width = max(1, in_channels // 2)
    layers = [*conv_bn_relu(in_channels, width, 3, bias=True), nn.Dropout2d(0.1), nn.Conv2d(width, num_classes, 1)]
    return FusedSequential(*layers, Upsample(size))


def classifier_net(
    in_channels: int, conv_widths: Sequence[int], stride: int, linear_widths: Sequence[int]
) -> FusedSequential:
    """InfoPro's second head: [B, in_channels, h, w] -> [B, linear_widths[-1]].

    3x3 conv + BN + ReLU per width (the first with ``stride``), mean, Linear layers with ReLU in between.
    """
    layers: list[nn.Module] = []
    for i, width in enumerate(conv_widths):
        layers += conv_bn_relu(in_channels, width, 3, stride if i == 0 else 1)
        in_channels = width
    layers.append(AvgPool())
    for i, width in enumerate(linear_widths):
        layers += [*([nn.ReLU(inplace=True)] if i else []), nn.Linear(in_channels, width)]
        in_channels = width
    return FusedSequential(*layers)


def classifier_net_imagenet(in_channels: int, num_classes: int) -> FusedSequential:
    """InfoPro's second head for ImageNet: [B, in_channels, h, w] -> [B, num_classes].

    1x1 -> 128, 3x3 / 2 -> 256, 3x3 / 2 -> 512, 1x1 -> 2048 (each conv + BN + ReLU), mean, Linear.
    """
    layers = [
        *conv_bn_relu(in_channels, 128, 1),
        *conv_bn_relu(128, 256, 3, 2),
        *conv_bn_relu(256, 512, 3, 2),
        *conv_bn_relu(512, 2048, 1),
    ]
    return FusedSequential(*layers, AvgPool(), nn.Linear(2048, num_classes))


class NoHead(nn.Module):
    """For a block that only the losses of later blocks train (``Method.window`` above 1): loss 0, no parameters."""

    def forward(self, h: Tensor, ctx: StepContext) -> LocalLoss:
        dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
        return LocalLoss(ctx.once(("zero", dtype), lambda: torch.zeros((), dtype=dtype, device=h.device)), {}, None)


class CascadeHead(nn.Module):
    """Two heads of a method whose losses reach several blocks (HPFF, MLAAN).

    Args:
        own: head of the loss that trains this block alone, ``(h, ctx) -> LocalLoss``, or None.
        shared: head of the loss that trains this block and the ``Method.window - 1`` blocks before it, or None.
    """

    def __init__(self, own: nn.Module | None, shared: nn.Module | None) -> None:
        super().__init__()
        self.own, self.shared = own, shared

    def forward(self, h: Tensor, ctx: StepContext) -> LocalLoss:
        return self.parts(h, h, ctx)

    def parts(self, own: Tensor, shared: Tensor, ctx: StepContext) -> LocalLoss:
        """The sum of both losses, each of an activation of its own. The scores are the shared head's where it has any."""
        parts = [head(h, ctx) for head, h in ((self.own, own), (self.shared, shared)) if head is not None]
        if len(parts) == 1:
            return parts[0]
        first, second = parts
        scores = second if second.logits is not None or second.correct is not None else first
        terms = {**{f"own.{name}": term for name, term in first.terms.items()}, **second.terms}
        return LocalLoss(first.loss + second.loss, terms, scores.logits, scores.correct)
