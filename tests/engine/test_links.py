"""Links in a training step: when they fire, what they read, and that all levels agree."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fastlocal as fl
from fastlocal import models
from fastlocal.blocks.links import EMALink
from fastlocal.errors import ArgumentError
from fastlocal.methods import LocalLoss, Method, Site, StepContext
from fastlocal.reference import train_step

DECAY = 0.75


class TwinHead(nn.Module):
    """A copy of the next unit that follows it by an average, then a mean and a linear layer."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.average = copy.deepcopy(site.next_unit).requires_grad_(False)
        self.linear = nn.LazyLinear(site.num_classes)
        self.linear(torch.zeros(1, 8 if site.unit >= 3 else 4))

    def forward(self, h: Tensor, ctx: StepContext) -> LocalLoss:
        logits = self.linear(self.average(h).mean((2, 3)))
        return LocalLoss.of(("task", ctx.criterion(logits, ctx.target), 1.0), logits=logits)


class Twin(Method):
    when = "after_backward"

    def head(self, site: Site) -> nn.Module:
        return TwinHead(site)

    def links(self, sites: list[Site], heads: list[nn.Module]) -> list[EMALink]:
        return [EMALink.of(s.index, s.next_unit, h.average, DECAY, self.when) for s, h in zip(sites, heads)]


def build(when: str = "after_backward", dtype: torch.dtype = torch.float64) -> fl.LocalModel:
    torch.manual_seed(0)
    net = models.resnet20(width=4, num_classes=5).to(dtype)
    names = [name for name, _ in net.units()]
    method = Twin()
    method.when = when
    return fl.localize(net, method, blocks=[names[1], names[3]], sample=torch.randn(2, 3, 16, 16, dtype=dtype)).train()


def batch(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, 16, 16, generator=g, dtype=dtype), torch.randint(0, 5, (4,), generator=g)


def sgd(named: list) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for _, p in named], lr=0.3, momentum=0.9)


def averages(model: fl.LocalModel) -> list[Tensor]:
    return [p.detach().clone() for head in model.heads for p in head.average.parameters()]


def sources(model: fl.LocalModel) -> list[Tensor]:
    return [slot.value.detach().clone() for link in model.links for slot in link.sources]


def expected(model: fl.LocalModel) -> list[Tensor]:
    """What the averages are after a step that starts now: they read the weights as they are before any update."""
    return [DECAY * a + (1 - DECAY) * s for a, s in zip(averages(model), sources(model), strict=True)]


def close(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-13, atol=1e-15) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("update", ["immediate", "end"])
def test_averages_read_the_weights_before_the_update(update: str) -> None:
    model = build()
    engine = fl.Engine(model, sgd, update=update)
    for step in range(3):
        wanted, old = expected(model), averages(model)
        engine.step(*batch(step))
        assert close(averages(model), wanted)
        if step:
            assert not close(old, wanted)


@pytest.mark.parametrize("when", ["after_backward", "between_forward_and_backward"])
def test_all_levels_agree(when: str) -> None:
    model = build(when)
    twins = [copy.deepcopy(model) for _ in range(3)]
    engine = fl.Engine(model, sgd)
    ended = fl.Engine(twins[0], sgd, update="end")
    of_a, of_reference = (torch.optim.SGD(t.parameters(), lr=0.3, momentum=0.9) for t in twins[1:])
    for step in range(3):
        x, y = batch(step)
        engine.step(x, y)
        ended.step(x, y)
        of_a.zero_grad()
        twins[1](x, y).loss.backward()
        of_a.step()
        train_step(twins[2], (x, y), of_reference)
    for twin in twins:
        for (name, a), b in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-14), name


def test_between_forward_and_backward_the_gradient_goes_through_the_new_weights() -> None:
    x, y = batch()
    model, after = build("between_forward_and_backward"), build()
    new = copy.deepcopy(after)
    with torch.no_grad():
        for p in new.heads[0].average.parameters():
            p.add_(1)
        for link in (model.links[0], after.links[0]):  # so that the average moves at once
            for slot in link.sources:
                slot.value.add_(4)
    first = [model.blocks[0].backbone_parameters()[0][1], after.blocks[0].backbone_parameters()[0][1]]
    model(x, y).loss.backward()
    after(x, y).loss.backward()
    assert not torch.allclose(first[0].grad, first[1].grad)
    assert close(averages(model), averages(after))  # it is only the backward that differs


def test_a_group_of_micro_batches_moves_the_averages_once() -> None:
    model = build()
    engine = fl.Engine(model, sgd)
    wanted, old = expected(model), averages(model)
    engine.step(*batch(0))
    assert close(averages(model), wanted)
    wanted, old = expected(model), averages(model)
    engine.accumulate(*batch(1))
    assert all(torch.equal(a, b) for a, b in zip(averages(model), old))
    engine.step(*batch(2))
    assert close(averages(model), wanted)


@pytest.mark.parametrize("when", ["after_backward", "between_forward_and_backward"])
def test_low_precision_weights_are_not_what_is_averaged(when: str) -> None:
    model = build(when, dtype=torch.float32)
    engine = fl.Engine(model, sgd, precision="bf16-mixed")
    for step in range(2):
        wanted = expected(model)
        engine.step(*batch(step, torch.float32))
        assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-8) for a, b in zip(averages(model), wanted, strict=True))
    assert any(not torch.equal(a, a.bfloat16().float()) for a in averages(model))


def test_a_step_that_fails_or_is_not_finite_moves_nothing_at_the_end_of_which_all_update() -> None:
    model = build()
    engine = fl.Engine(model, sgd, update="end", nonfinite="skip")
    engine.step(*batch(0))
    old = averages(model)
    with torch.no_grad():
        model.backbone.fc.weight.fill_(float("nan"))
    engine.step(*batch(1))
    assert engine.skipped.sum() > 0
    assert all(torch.equal(a, b) for a, b in zip(averages(model), old, strict=True))


def test_under_no_grad_nothing_moves() -> None:
    model = build()
    fl.Engine(model, sgd).step(*batch(0))
    old = averages(model)
    with torch.no_grad():
        model(*batch(1))
    assert all(torch.equal(a, b) for a, b in zip(averages(model), old, strict=True))


def test_averages_are_not_trained() -> None:
    model = build()
    assert not any(p.requires_grad for head in model.heads for p in head.average.parameters())
    held = {id(p) for g in fl.LocalOptimizer(model, sgd).param_groups for p in g["params"]}
    assert not held & {id(p) for head in model.heads for p in head.average.parameters()}
    from fastlocal.trainer.finetune import unfreeze

    unfreeze(model)
    assert not any(p.requires_grad for head in model.heads for p in head.average.parameters())


def test_a_deep_copy_has_links_of_its_own() -> None:
    model = build()
    twin = copy.deepcopy(model)
    old = averages(model)
    engine = fl.Engine(twin, sgd)
    engine.step(*batch(0))
    engine.step(*batch(1))
    assert all(torch.equal(a, b) for a, b in zip(averages(model), old, strict=True))
    assert not close(averages(twin), old)


def test_modules_of_two_architectures_cannot_be_linked() -> None:
    with pytest.raises(ArgumentError, match="same parameters"):
        EMALink.of(0, nn.Linear(2, 3), nn.Linear(3, 2), 0.9)
