"""A read-only copy of a weight that another block trains."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import fastlocal as fl
from fastlocal.blocks.block import Slot
from fastlocal.blocks.links import CopyLink


def test_refresh_copies_the_value_and_keeps_the_tensor() -> None:
    a, b = nn.Linear(2, 3), nn.Linear(2, 3)
    b.weight.requires_grad_(False)
    kept = b.weight
    CopyLink(Slot("a.weight", a, "weight"), Slot("b.weight", b, "weight")).fire()
    assert torch.equal(b.weight, a.weight) and b.weight is kept and not b.weight.requires_grad
    assert b.weight.data_ptr() != a.weight.data_ptr()


class Tied(nn.Module):
    """Embedding and readout share a weight, as in GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(2))
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        for layer in self.layers:
            h = layer(h)
        return self.head(h)


IDS, TARGET = torch.arange(10).reshape(2, 5), (torch.arange(10).reshape(2, 5) * 3) % 11


def test_a_linked_copy_follows_its_owner_at_every_call() -> None:
    net = Tied()
    model = fl.localize(net, "dgl", blocks=2, sample=IDS, tied="link")
    assert len(model.links) == 1
    assert net.embed.weight is not net.head.weight
    assert not net.embed.weight.requires_grad and net.head.weight.requires_grad  # the last block trains it
    owners = [k for k, b in enumerate(model.blocks) for n, _ in b.named_parameters() if n == "backbone.head.weight"]
    copies = [k for k, b in enumerate(model.blocks) for n, _ in b.named_parameters() if n == "backbone.embed.weight"]
    assert owners == [1] and copies == []
    engine = fl.Engine(model, lambda named: torch.optim.SGD(named, lr=0.5))
    engine.step(IDS, TARGET)
    stale = net.embed.weight.detach().clone()
    assert not torch.equal(stale, net.head.weight)  # updated; the copy is refreshed before it is read again
    expected = copy.deepcopy(net)
    expected.embed.weight = expected.head.weight  # what a tied network computes
    model.eval()
    assert torch.equal(model(IDS), expected(IDS))
    assert torch.equal(net.embed.weight, net.head.weight)
    with torch.no_grad():
        net.head.weight.add_(1)
    assert torch.equal(model.backbone_state_dict()["embed.weight"], net.head.weight)  # export refreshes too


def test_a_deep_copy_links_its_own_weights() -> None:
    model = fl.localize(Tied(), "dgl", blocks=2, sample=IDS, tied="link")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.backbone.head.weight.add_(1)  # type: ignore[operator, union-attr]
    before = model.backbone.embed.weight.detach().clone()  # type: ignore[operator, union-attr]
    twin.eval()(IDS)
    assert torch.equal(twin.backbone.embed.weight, twin.backbone.head.weight)  # type: ignore[arg-type, union-attr]
    assert torch.equal(model.backbone.embed.weight, before)  # type: ignore[arg-type, union-attr]
