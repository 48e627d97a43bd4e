"""Local learning on transformers: each block classifies, and reconstructs its own input features (or the image)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from fastlocal.blocks.heads import (
    FusedSequential,
    InfoProHead,
    classifier_net,
    decoder_net,
    decoder_net_imagenet,
    init_convs,
)
from fastlocal.blocks.losses import full_precision
from fastlocal.errors import ArgumentError
from fastlocal.methods.base import LocalLoss, Method, Site, StepContext, check_choice, check_number, register
from fastlocal.methods.infopro import CONFIGS, NORMALISATION, check_lam, check_normalisation
from fastlocal.methods.lopt import Embedding

FEATURE_WIDTH = 32  # of the convolution inside a decoder of features, as in cvlab-stonybrook/local_learning_wsi


@dataclass
class FeatureReconstructionOptions:
    """Options.

    reconstruct: "features", the block's own input; or "image", which is InfoPro-Transformer.
    first: what the first block reconstructs: "embedding", the output of the network's embedding, which makes two blocks
        differ from InfoPro-Transformer; or "image".
    decoder: "conv" (InfoPro's: resize, convolution, BatchNorm, ReLU, convolution; above 64 pixels its ImageNet form),
        "linear" (LayerNorm and one Linear to the target's tokens) or "transformer" (a fresh unit of the network before it).
    lam: (lambda1, lambda2), weights of reconstruction and classification, or their values at the first and at the last head.
    config: convolutions and linear layers of the classifier, as in InfoPro ("0c1f": mean and Linear).
    loss: "cross_entropy" or "contrast".
    feature_dim, temperature: width of the classifier's linear layers; of the contrastive loss.
    dataset: whose normalisation is undone on images: "cifar10", "stl10", "svhn" or "imagenet".
    mean, std: the same by numbers.
    """

    reconstruct: str = "features"
    first: str = "embedding"
    decoder: str = "conv"
    lam: Sequence[float] = (1.0, 1.0)
    config: str = "1c2f"
    loss: str = "cross_entropy"
    feature_dim: int = 128
    temperature: float = 0.07
    dataset: str = "cifar10"
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None


class ToMap(nn.Module):
    """Patch tokens [B, T, D] as a map [B, D, S, S], without a class token; a map stays."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 4:
            return x
        side = math.isqrt(x.shape[1])
        return x[:, x.shape[1] - side**2 :].transpose(1, 2).unflatten(2, (side, side))


class FeatureHead(nn.Module):
    """The classifier of ``task``, and the mean squared error of what ``decoder`` makes of the output to the block's input.

    ``embedding``: gives the input of block 0; None where that is the image.
    """

    def __init__(self, decoder: nn.Module, task: InfoProHead, weight: float, embedding: Embedding | None) -> None:
        super().__init__()
        self.decoder, self.task = decoder, task
        self.weight, self.embedding, self.to_map = weight, embedding, ToMap()

    def forward(self, h: Tensor, ctx: StepContext) -> LocalLoss:
        target = ctx.boundary
        if target is None:
            assert self.embedding is not None and ctx.input is not None
            target = self.embedding(ctx.input)
        loss = F.mse_loss(full_precision(self.decoder(h)), full_precision(self.to_map(target)))
        own = LocalLoss.of(("reconstruction", loss, self.weight))
        task = self.task(h, ctx)
        return LocalLoss(own.loss + task.loss, {**own.terms, **task.terms}, task.logits, task.correct)


@register
class FeatureReconstruction(Method):
    """A decoder and a classifier on every block but the last, for transformers (and other networks) on images.

    ``reconstruct="image"`` is InfoPro-Transformer. No official code; both modes are the same.
    """

    name: ClassVar[str] = "feature_reconstruction"
    summary: ClassVar[str] = "reconstruction of the block's own input features, and classification, for transformers"
    paper: ClassVar[str] = (
        "Pathak, Zhang, Samaras: Local Learning on Transformers via Feature Reconstruction, arXiv 2212.14215"
    )
    reads_boundary = True
    Options: ClassVar[type] = FeatureReconstructionOptions

    def validate(self) -> None:
        o = self.options
        check_choice("reconstruct", o.reconstruct, ("features", "image"))
        check_choice("first", o.first, ("embedding", "image"))
        check_choice("decoder", o.decoder, ("conv", "linear", "transformer"))
        check_choice("config", o.config, CONFIGS)
        check_choice("loss", o.loss, ("cross_entropy", "contrast"))
        check_choice("dataset", o.dataset, NORMALISATION)
        check_number("feature_dim", o.feature_dim, low=1, integer=True)
        check_number("temperature", o.temperature, low=1e-4)
        check_lam(o)
        if min(o.lam) == 0:
            raise ArgumentError(f"lam: got {o.lam}; give weights above 0")
        check_normalisation(o)

    def resolve(self, sites: list[Site]) -> None:
        self._shapes = [site.shape for site in sites]

    def head(self, site: Site) -> nn.Module:
        o = self.options
        if site.dense or len(site.input_shape) != 3 or len(site.shape) < 2:
            raise ArgumentError(
                f"method: {self.name!r} is for images of one label, but the input has shape {tuple(site.input_shape)} and "
                f"block {site.index} gives {tuple(site.shape)} without the batch; use method='lopt' for language models"
            )
        ratio = site.index / (site.blocks - 2) if site.blocks > 2 else 0.0
        lam1, lam2 = (a * (1 - ratio) + b * ratio for a, b in zip(o.lam[:2], o.lam[-2:]))
        mean, std = (given or default for given, default in zip((o.mean, o.std), NORMALISATION[o.dataset]))
        image = o.reconstruct == "image" or (site.index == 0 and o.first == "image")
        if image and not len(mean) == len(std) == site.input_shape[0]:
            raise ArgumentError(
                f"mean, std: the image has {site.input_shape[0]} channels, but mean has {len(mean)} numbers and std "
                f"{len(std)}; give mean=(...), std=(...) that the input was normalised with"
            )
        embedding = None if image or site.index else self._embedding(site)
        if image:
            channels, side = site.input_shape[0], site.input_shape[1]
        else:
            channels, side = _map_shape(embedding.shape if embedding else self._shapes[site.index - 1], self.name)
        decoder = self._decoder(site, channels, side, image)
        task = InfoProHead(
            decoder if image else None,
            FusedSequential(ToMap(), *self._classifier(site)),
            contrast=o.loss == "contrast",
            weights=(lam1, lam2),
            mean=mean,
            std=std,
            temperature=o.temperature,
        )
        return init_convs(task if image else FeatureHead(decoder, task, lam1, embedding))

    def _embedding(self, site: Site) -> Embedding:
        if site.unit == 0:
            raise ArgumentError(
                "first: the first block is the embedding alone, which would reconstruct itself; cut later, or use "
                "first='image'"
            )
        if site.is_image:
            raise ArgumentError(
                f"first: {type(site.net).__name__} has maps, and its first unit may have BatchNorm statistics that a second "
                "forward would move; use first='image'"
            )
        return Embedding(site.net, site.input_shape)

    def _decoder(self, site: Site, channels: int, side: int, image: bool) -> nn.Module:
        """From the block's output to a map [B, channels, side, side]: image logits, or features."""
        width, own = _map_shape(site.shape, self.name)
        kind = self.options.decoder
        if kind == "conv":
            if image and side > 64:
                return FusedSequential(ToMap(), *decoder_net_imagenet(width, (channels, side, side)))
            inside = 12 if image else FEATURE_WIDTH
            return FusedSequential(ToMap(), *decoder_net(width, (channels, side, side), width=inside))
        if side % own:
            raise ArgumentError(
                f"decoder: {kind!r} makes a whole number of outputs of every token, but block {site.index} has a map of "
                f"{own}x{own} and its target one of {side}x{side}; use decoder='conv'"
            )
        layers: list[nn.Module] = []
        if kind == "transformer":
            if not callable(getattr(site.net, "make_unit", None)) or site.is_image:
                raise ArgumentError(
                    f"decoder: 'transformer' needs {type(site.net).__name__}.make_unit for tokens; use 'conv' or 'linear'"
                )
            layers.append(site.net.make_unit(site.unit, width, 1))  # type: ignore[operator]
        if not site.is_image:
            layers.append(nn.LayerNorm(width))
        scale = side // own
        return FusedSequential(*layers, ToMap(), nn.Conv2d(width, channels * scale**2, 1), nn.PixelShuffle(scale))

    def _classifier(self, site: Site) -> nn.Sequential:
        o = self.options
        width, side = _map_shape(site.shape, self.name)
        grow = side > 8 if site.widths is None else site.widths[site.unit] < max(site.widths)
        convs, linears = CONFIGS[o.config]
        out = o.feature_dim if o.loss == "contrast" else site.num_classes
        widths = [(2 if grow else 1) * width] * convs
        return classifier_net(width, widths, 2 if grow else 1, [o.feature_dim] * (linears - 1) + [out])


def _map_shape(shape: Sequence[int], method: str) -> tuple[int, int]:
    """Channels and side of an activation as `ToMap` sees it. Raises ArgumentError where its tokens are no square."""
    if len(shape) == 3 and shape[1] == shape[2]:
        return shape[0], shape[1]
    side = math.isqrt(shape[0]) if len(shape) == 2 else 0
    if not side or shape[0] - side**2 > 1:
        raise ArgumentError(
            f"method: {method!r} needs maps, or tokens of a square grid with or without a class token, got a boundary of "
            f"shape {tuple(shape)} without the batch; use method='dgl' or 'auglocal'"
        )
    return shape[1], side
