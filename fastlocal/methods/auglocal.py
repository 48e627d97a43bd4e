"""AugLocal: each block's auxiliary network is made like later units of the backbone, sampled uniformly in depth."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from fastlocal.blocks.heads import AvgPool, ClassifierHead, FusedSequential
from fastlocal.errors import ArgumentError
from fastlocal.methods.base import Method, Site, check_choice, check_number, refuse_dense_images, register


@dataclass
class AugLocalOptions:
    """Options by the names of the paper and its code.

    depth: d, units of an auxiliary network (at most what is left of the backbone).
    pyramid: let the depth fall linearly with the block index; None is True for the CIFAR form, False for the ImageNet
        form.
    pyramid_coeff: how far it falls: the last auxiliary network has depth d * (1 - pyramid_coeff) + pyramid_coeff.
    widen: factor of the auxiliary units' widths; other than 1 needs a backbone whose ``make_unit`` takes ``width``.
    form: "cifar": the last d + 1 blocks are trained together by the task loss, and an auxiliary network of depth 1 has
        a BatchNorm1d before its last layer. "imagenet": all blocks but the last get one, never with that norm.
    """

    depth: int = 2
    pyramid: bool | None = None
    pyramid_coeff: float = 0.5
    widen: float = 1.0
    form: str = "cifar"


@register
class AugLocal(Method):
    """Auxiliary networks of fresh units ("uniform sampling"), a mean over positions and a linear layer; cross-entropy.

    The backbone must offer ``make_unit(i, in_channels, stride)`` and, for tokens and vectors,
    ``make_readout(in_features, num_classes)``; where it offers ``make_aux_readout`` (VGG), that replaces mean and
    linear layer. Both modes are the same at ``widen=1``; otherwise the official CIFAR code takes a unit that is wider than the
    widened unit before it for one of a later stage, and halves the map there.
    """

    name: ClassVar[str] = "auglocal"
    summary: ClassVar[str] = "auxiliary networks made of sampled later units, cross-entropy"
    paper: ClassVar[str] = (
        "Ma, Wu, Si, Tan: Scaling Supervised Local Learning with Augmented Auxiliary Networks, ICLR 2024"
    )
    repository: ClassVar[str] = "ChenxiangMA/AugLocal"
    Options: ClassVar[type] = AugLocalOptions

    def validate(self) -> None:
        o = self.options
        check_number("depth", o.depth, low=1, integer=True)
        check_choice("form", o.form, ("cifar", "imagenet"))
        check_choice("pyramid", o.pyramid, (None, True, False))
        check_number("pyramid_coeff", o.pyramid_coeff, low=0, high=1)
        check_number("widen", o.widen, low=0.1)
        if o.pyramid is None:
            o.pyramid = o.form == "cifar"

    def prepare(self, blocks: int, units: int) -> int:
        if blocks == 1 or self.options.form == "imagenet":
            return blocks
        if self.options.depth >= blocks:
            raise ArgumentError(
                f"depth: {self.options.depth} is too much for blocks={blocks}, because the last depth + 1 blocks are "
                f"trained together; use depth up to {blocks - 1}, more blocks, or form='imagenet'"
            )
        return blocks - self.options.depth

    def depth_at(self, index: int, blocks: int) -> int:
        """Depth of the auxiliary network of block ``index``, of ``blocks`` that are cut."""
        o = self.options
        if not o.pyramid or blocks <= 2:
            return o.depth
        fall = index * o.pyramid_coeff / (blocks - 2)
        return max(1, round(o.depth * (1 - fall) + fall))

    @staticmethod
    def sampled_units(unit: int, units: int, depth: int) -> list[int]:
        """The ``depth`` later units that an auxiliary network after ``unit`` is made like (all where no more are
        left).
        """
        left = units - 1 - unit
        if depth >= left:
            return list(range(unit + 1, units))
        return [round(unit + left / depth * i) for i in range(1, depth + 1)]

    def head(self, site: Site) -> nn.Module:
        refuse_dense_images(self.name, site)
        if not callable(getattr(site.net, "make_unit", None)):
            raise ArgumentError(
                f"method: 'auglocal' builds its heads from units of the network, but {type(site.net).__name__} has no "
                "make_unit(i, in_channels, stride) that returns a fresh unit shaped like unit i; add it (and, unless "
                "units give feature maps, make_readout(in_features, num_classes)), take a network of "
                "fastlocal.models, or use method='dgl'"
            )
        depth = self.depth_at(site.index, site.blocks)
        width = site.widths[site.unit] if site.widths is not None else 1
        channels = site.shape[0] if site.is_image else site.shape[-1]
        widened = self.mode == "official" and self.options.form == "cifar"
        halvings = 0
        layers: list[nn.Module] = []
        for i in self.sampled_units(site.unit, site.units, depth):
            stride = 1
            if site.is_image and site.widths is not None:
                # One halving of the map per unit at most: what is left over moves on to the next unit, or is dropped.
                halvings += int(math.log2(max(1, site.widths[i] // width)))
                stride = 2 if halvings >= 1 else 1
                halvings -= stride - 1
                width = int(site.widths[i] * (self.options.widen if widened else 1))
            unit = self._make_unit(site, i, channels, stride)
            layers.append(unit)
            channels = _channels_out(unit, channels, site, i)
        return ClassifierHead(FusedSequential(*layers, *self._readout(site, channels, depth)))

    def _make_unit(self, site: Site, i: int, channels: int, stride: int) -> nn.Module:
        make: Callable[..., nn.Module] = site.net.make_unit  # type: ignore[assignment]
        if self.options.widen == 1:
            return make(i, channels, stride)
        if site.widths is None or "width" not in inspect.signature(make).parameters:
            raise ArgumentError(
                f"widen: {self.options.widen} needs {type(site.net).__name__}.widths and a "
                "make_unit(i, in_channels, stride, width) there; use widen=1"
            )
        return make(i, channels, stride, width=int(site.widths[i] * self.options.widen))

    def _readout(self, site: Site, channels: int, depth: int) -> list[nn.Module]:
        aux = getattr(site.net, "make_aux_readout", None)
        if aux is not None:
            return [aux(channels, site.num_classes)]
        if site.is_image:
            norm = [nn.BatchNorm1d(channels)] if depth <= 1 and self.options.form == "cifar" else []
            return [AvgPool(), *norm, nn.Linear(channels, site.num_classes)]
        make = getattr(site.net, "make_readout", None)
        if make is None:
            raise ArgumentError(
                f"method: 'auglocal' needs {type(site.net).__name__}.make_readout(in_features, num_classes), a fresh "
                f"readout of {tuple(site.shape)} activations; add it, or use method='dgl'"
            )
        return [make(channels, site.num_classes)]


def _channels_out(unit: nn.Module, channels: int, site: Site, index: int) -> int:
    """Output channels of a fresh unit: seen on a tiny map; tokens keep their width."""
    if len(site.shape) == 2:
        return channels
    like = next(unit.parameters())
    shape = (1, channels, 4, 4) if site.is_image else (1, channels)
    training = unit.training
    try:
        with torch.no_grad():
            return unit.eval()(torch.zeros(shape, dtype=like.dtype, device=like.device)).shape[1]
    except (RuntimeError, ValueError) as error:
        raise ArgumentError(
            f"method: 'auglocal' cannot put a unit like unit {index} of {type(site.net).__name__} on activations of "
            f"{channels} channels ({error}); use a smaller depth, fewer blocks, or method='dgl'"
        ) from error
    finally:
        unit.train(training)
