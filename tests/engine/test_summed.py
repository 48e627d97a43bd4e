"""Deep supervision: heads on a network without gradient borders, one backward of the sum of all losses."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlocal as fl
from fastlocal import models
from fastlocal.errors import ArgumentError
from fastlocal.methods import LocalLoss, Method, Site, StepContext
from fastlocal.reference import train_step

WEIGHT = 0.3


class Companion(nn.Module):
    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, classes)

    def forward(self, h: Tensor, ctx: StepContext) -> LocalLoss:
        logits = self.linear(h.mean((2, 3)))
        return LocalLoss.of(("task", ctx.criterion(logits, ctx.target), WEIGHT), logits=logits)


class Supervised(Method):
    isolated = False

    def head(self, site: Site) -> nn.Module:
        return Companion(site.shape[0], site.num_classes)


def build(dtype: torch.dtype = torch.float64) -> fl.LocalModel:
    torch.manual_seed(0)
    net = models.resnet20(width=4, num_classes=5).to(dtype)
    return fl.localize(net, Supervised(), blocks=3, sample=torch.randn(2, 3, 16, 16, dtype=dtype)).train()


def batch(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, 16, 16, generator=g, dtype=dtype), torch.randint(0, 5, (4,), generator=g)


def sgd(named: list) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for _, p in named], lr=0.3, momentum=0.9)


def by_hand(model: fl.LocalModel, x: Tensor, y: Tensor) -> list[Tensor]:
    """The losses with their graphs, from the network's units alone."""
    net, ends = model.backbone, {b.name: k for k, b in enumerate(model.blocks[:-1])}
    losses, h = [], x
    for name, unit in net.units():
        h = unit(h)
        if name in ends:
            scores = model.heads[ends[name]].linear(h.mean((2, 3)))
            losses.append(WEIGHT * F.cross_entropy(scores, y))
    return [*losses, F.cross_entropy(net.readout(h), y)]


@pytest.mark.parametrize("update", ["immediate", "end"])
def test_every_level_equals_plain_pytorch(update: str) -> None:
    model = build()
    plain, level_a, reference = (copy.deepcopy(model) for _ in range(3))
    engine = fl.Engine(model, sgd, update=update)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.3, momentum=0.9) for m in (plain, level_a, reference)]
    for step in range(3):
        x, y = batch(step)
        losses = by_hand(plain, x, y)
        optimizers[0].zero_grad()
        sum(losses).backward()
        optimizers[0].step()
        optimizers[1].zero_grad()
        out = level_a(x, y)
        out.loss.backward()
        optimizers[1].step()
        found = engine.step(x, y)
        for ours in (out.losses, found.losses, torch.stack(train_step(reference, (x, y), optimizers[2]))):
            assert torch.allclose(ours, torch.stack(losses), rtol=1e-12)
        assert torch.allclose(out.loss, sum(losses), rtol=1e-12)
    for other in (plain, level_a, reference):
        for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
            assert torch.allclose(a, b, rtol=1e-11, atol=1e-13), name


def test_gradients_do_cross_the_borders() -> None:
    model = build()
    x, y = batch()
    model(x, y).loss.backward()
    whole = model.backbone.conv1.weight.grad.clone()
    model.zero_grad()
    by_hand(model, x, y)[0].backward()
    assert not torch.allclose(model.backbone.conv1.weight.grad, whole, rtol=1e-2)


def test_accumulation_and_bf16() -> None:
    model = build()
    twin = copy.deepcopy(model)
    one, two = fl.Engine(model, sgd), fl.Engine(twin, sgd)
    for m in (model, twin):
        m.eval()
        m.train()
        for norm in m.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.eval()
    x, y = batch()
    one.step(x, y)
    two.accumulate(x[:2], y[:2])
    two.step(x[2:], y[2:])
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
    half = build(torch.float32)
    engine = fl.Engine(half, sgd, precision="bf16-mixed")
    first = engine.step(*batch(0, torch.float32)).loss
    for _ in range(5):
        last = engine.step(*batch(0, torch.float32)).loss
    assert last < first
    assert all(p.dtype == torch.float32 for p in half.parameters())


def test_fp16_is_refused() -> None:
    with pytest.raises(ArgumentError, match="bf16-mixed"):
        fl.Engine(build(torch.float32), sgd, precision="16-mixed")
