"""Sites for tests of methods, without cutting a network."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastlocal.blocks.losses import cross_entropy
from fastlocal.methods import Site, StepContext


def sites_of(net: nn.Module, sample: torch.Tensor, blocks: int | None = None) -> list[Site]:
    """The sites of all heads of a net with declared units, one unit per block, for the first ``blocks`` - 1 blocks."""
    units = net.units()
    blocks = blocks or len(units)
    sites, h = [], sample
    with torch.no_grad():
        for k, (name, fn) in enumerate(units):
            h = fn(h)
            sites.append(
                Site(
                    index=k,
                    blocks=blocks,
                    unit=k,
                    units=len(units),
                    name=name,
                    shape=tuple(h.shape[1:]),
                    input_shape=tuple(sample.shape[1:]),
                    num_classes=net.num_classes,
                    dense=getattr(net, "causal", False),
                    widths=net.widths,
                    net=net,
                    first_unit=k,
                )
            )
    return sites[: blocks - 1]


def site(shape: tuple[int, ...], **changes: Any) -> Site:
    """One site of a net that declares nothing."""
    values: dict[str, Any] = {
        "index": 0,
        "blocks": 3,
        "unit": 0,
        "units": 3,
        "name": "0",
        "shape": shape,
        "input_shape": (3, 32, 32),
        "num_classes": 5,
        "dense": False,
        "widths": None,
        "net": nn.Linear(1, 1),
        "first_unit": 0,
    }
    return Site(**{**values, **changes})


def run_head(head: nn.Module, site: Site, rows: int = 4) -> Any:
    """A head's loss and backward on random data; asserts that it trains the head and hands back a gradient."""
    g = torch.Generator().manual_seed(0)
    h = torch.randn(rows, *site.shape, generator=g).requires_grad_()
    shape = (rows, *site.shape[:-1]) if site.dense else (rows,)
    target = torch.randint(0, site.num_classes, shape, generator=g)
    image = torch.rand(rows, *site.input_shape, generator=g)
    local = head(h, StepContext(target=target, input=image, criterion=cross_entropy))
    local.loss.backward()
    assert local.loss.isfinite() and h.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
    return local


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
