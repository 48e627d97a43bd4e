"""Networks with the architectures, parameter names and initialisation of the published local-learning experiments.

Every model says how it may be cut:

- ``units()``: ordered ``(name, fn)`` pairs, the smallest pieces that are never cut. ``name`` is a module path, or the
  name of the bound method ``fn`` (``stem``, ``embed``).
- ``readout(h)``: what follows the last unit. ``net(x)`` equals ``readout(fn_n(...fn_1(x)))`` bit for bit.
- ``widths``: one width per unit (the planes of a bottleneck before its expansion).
- ``make_unit(i, in_channels, stride)``: a fresh unit shaped like unit ``i``, for auxiliary networks.
- ``make_readout(in_features, num_classes)``: a fresh readout.

A max-pool or dropout between two units runs at the start of the second one.
"""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from fastlocal.errors import ArgumentError, did_you_mean
from fastlocal.models.dgl_cnn import DGLCNN, dgl_cnn
from fastlocal.models.gpt import GPT, gpt
from fastlocal.models.masked_vit import MaskedViT
from fastlocal.models.mlp import MLP, mlp
from fastlocal.models.resnet import (
    ResNet,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
)
from fastlocal.models.resnet_cifar import ResNetCIFAR, resnet20, resnet32, resnet44, resnet56, resnet110, resnet1202
from fastlocal.models.swin import Swin, swin_base, swin_small, swin_tiny
from fastlocal.models.vgg import VGG, vgg13, vgg19
from fastlocal.models.vgg_local import VGGLocal, vgg8b, vgg11b
from fastlocal.models.vit import ViT, vit_base, vit_huge, vit_large, vit_small, vit_tiny

_MODELS: dict[str, Callable[..., nn.Module]] = {
    constructor.__name__: constructor
    for constructor in (
        resnet20,
        resnet32,
        resnet44,
        resnet56,
        resnet110,
        resnet1202,
        resnet18,
        resnet34,
        resnet50,
        resnet101,
        resnet152,
        resnext50_32x4d,
        resnext101_32x8d,
        vgg13,
        vgg19,
        vgg8b,
        vgg11b,
        dgl_cnn,
        vit_tiny,
        vit_small,
        vit_base,
        vit_large,
        vit_huge,
        swin_tiny,
        swin_small,
        swin_base,
        mlp,
        gpt,
    )
}
_ALIASES = {
    "vit_t": "vit_tiny",
    "vit_ti": "vit_tiny",
    "vit_s": "vit_small",
    "vit_b": "vit_base",
    "vit_l": "vit_large",
    "vit_h": "vit_huge",
    "swin_t": "swin_tiny",
    "swin_s": "swin_small",
    "swin_b": "swin_base",
}

__all__ = [
    "GPT",
    "MLP",
    "VGG",
    "DGLCNN",
    "MaskedViT",
    "ResNet",
    "ResNetCIFAR",
    "Swin",
    "VGGLocal",
    "ViT",
    "create",
    "list_models",
    "options",
    *_MODELS,
]


def list_models() -> list[str]:
    """The names that ``create`` takes (it also takes the aliases vit_t, vit_ti, vit_s, vit_b, vit_l, vit_h, swin_t, swin_s
    and swin_b)."""
    return list(_MODELS)


def options(name: str) -> dict[str, Any]:
    """The options of a model with their defaults. Raises ArgumentError for an unknown name."""
    constructor = _constructor(name)
    # A constructor passes its options on to the class it returns; its own keywords are other defaults for some of them.
    accepted: dict[str, Any] = {}
    for function in (constructor.__annotations__["return"].__init__, constructor):
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                accepted[parameter.name] = parameter.default
    return accepted


def create(name: str, **kw: Any) -> nn.Module:
    """Build a model by name, e.g. ``create("resnet32", num_classes=100)``.

    Raises ArgumentError for an unknown name or option, offering the nearest ones, and for an option's bad value.
    """
    constructor = _constructor(name)
    accepted = options(name)
    for key in kw:
        if key not in accepted:
            raise ArgumentError(f"{name} has no option {key!r}. {did_you_mean(key, accepted)}")
    return constructor(**kw)


def _constructor(name: str) -> Callable[..., nn.Module]:
    found = _MODELS.get(_ALIASES.get(name, name)) if isinstance(name, str) else None
    if found is None:
        raise ArgumentError(
            f"name must be a known model, got {name!r}. {did_you_mean(str(name), [*_MODELS, *_ALIASES])}"
        )
    return found
