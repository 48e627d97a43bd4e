"""The audit finds exactly what each block trains, and what would break its isolation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlocal as fl
from fastlocal import models
from fastlocal.blocks.adapters import HookAdapter, SliceAdapter, logits_of
from fastlocal.blocks.audit import Audit, audit, graph_nodes, sharing_report
from fastlocal.blocks.partition import find_units
from fastlocal.errors import IsolationError
from tests.engine.untouched import untouched


def nets() -> dict[str, tuple[Callable[[], nn.Module], Tensor]]:
    image = torch.randn(2, 3, 12, 12)
    return {
        "resnet": (lambda: models.ResNetCIFAR(1, width=4, dropout=0.1), image),
        "vgg8b": (lambda: models.create("vgg8b", feat_mult=0.05, num_hidden=8), torch.randn(2, 3, 32, 32)),
        "vit": (lambda: models.create("vit_tiny", img_size=12, patch_size=6, dim=8, depth=3, heads=2), image),
        "mlp": (lambda: models.create("mlp", in_features=432, hidden=(8, 8, 8), batch_norm=True), image),
        "gpt": (
            lambda: models.create("gpt", vocab_size=13, block_size=8, n_layer=3, n_head=2, n_embd=8, tie=False),
            torch.arange(12).reshape(2, 6),
        ),
    }


def by_gradients(net: nn.Module, found: Audit, adapter: SliceAdapter | HookAdapter, x: Tensor) -> list[set[int]]:
    """Per block, the parameters that a loss of its output alone gives a gradient."""
    reached: list[set[int]] = []
    params = list(net.parameters())

    def note(k: int, h: Tensor) -> Tensor:
        grads = torch.autograd.grad((h * torch.rand_like(h)).sum(), params, allow_unused=True)
        reached.append({id(p) for p, g in zip(params, grads, strict=True) if g is not None})
        return h.detach()

    note(-1, logits_of(adapter.run(net, (x,), {}, note)))
    return reached


@pytest.mark.parametrize("name", ["resnet", "vgg8b", "vit", "mlp", "gpt"])
@pytest.mark.parametrize("kind", ["slices", "hooks"])
def test_a_block_owns_exactly_the_parameters_that_get_its_gradients(name: str, kind: str) -> None:
    make, x = nets()[name]
    net = make()
    units = find_units(net, (x,), {})
    count = len(units.names)
    cuts = [0, count // 2]
    if kind == "hooks":
        cuts = [c for c in cuts if isinstance(dict(net.named_modules()).get(units.names[c]), nn.Module)]
        units.fns = None
    adapter = units.adapter(cuts)
    names = [units.names[c] for c in [*cuts, count - 1]]
    net.train()
    with untouched(net):
        found = audit(net, adapter, names, (x,), {})
    assert found.parameters == by_gradients(net, found, adapter, x)
    assert set().union(*found.parameters) == {id(p) for p in net.parameters()}
    assert found.shared == {} and len(found.parameters) == len(found.shapes) == len(found.random) == len(cuts) + 1
    assert not set.intersection(*found.parameters)


def test_frozen_parameters_and_eval_mode_do_not_blind_it() -> None:
    net = models.ResNetCIFAR(1, width=4)
    net.eval().requires_grad_(False)
    x = torch.randn(2, 3, 8, 8)
    units = find_units(net, (x,), {})
    with untouched(net):
        found = audit(net, units.adapter([1]), ["a", "b"], (x,), {})
    assert set().union(*found.parameters) == {id(p) for p in net.parameters()}


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.one, self.two, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.enter(x))
        x = x + self.two(F.relu(self.one(x)))
        return self.out(x)


X = torch.randn(4, 4)


def test_a_skip_connection_over_a_cut() -> None:
    net = Residual()
    with untouched(net), pytest.raises(
        IsolationError, match=r"^blocks: a value computed in block 0 \('one'\) reaches block 1 \('out'\) around the cut.*cut elsewhere"
    ):  # fmt: skip
        audit(net, HookAdapter(["one"]), ["one", "out"], (X,), {})
    for name in ("one", "two"):  # the addition comes behind 'two'
        with untouched(net), pytest.raises(IsolationError, match=f"block 0 .'{name}'. reaches block 1"):
            fl.localize(net, "dgl", blocks=[name], sample=X)
    audit(net, HookAdapter(["enter"]), ["enter", "out"], (X,), {})


def test_a_boundary_that_is_used_twice_is_a_skip_connection_too() -> None:
    """U-Net's: the value jumps the cut after 'one', though its gradient does not."""

    class UNet(Residual):
        def forward(self, x: Tensor) -> Tensor:
            a = self.enter(x)
            return self.out(self.two(self.one(a)) + a)

    net = UNet()
    with untouched(net), pytest.raises(
        IsolationError, match=r"^blocks: the output of block 0 \('enter'\) is used in block 2 \('out'\) too, a skip connection over the "
        r"cut after 'one'.*Cut elsewhere"
    ):  # fmt: skip
        audit(net, HookAdapter(["enter", "one"]), ["enter", "one", "out"], (X,), {})
    audit(
        net, HookAdapter(["enter"]), ["enter", "out"], (X,), {}
    )  # the last boundary may be used as often as one likes


def test_the_input_may_be_used_anywhere() -> None:
    class Reads(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.two(self.one(x) + x) + x)

    net = Reads()
    found = audit(net, HookAdapter(["one", "two"]), ["one", "two", "out"], (X,), {})
    assert [len(ids) for ids in found.parameters] == [2, 2, 2]


def test_a_boundary_may_be_changed_in_place_by_the_next_block() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 3))
    found = audit(net, SliceAdapter([(net[0],), (net[1], net[2])]), ["0", "2"], (X,), {})
    assert [len(ids) for ids in found.parameters] == [2, 2]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.three.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.two(self.one(x)))


def test_tied_weights_are_reported_with_all_their_names() -> None:
    net = Tied()
    with untouched(net):
        found = audit(net, HookAdapter(["one", "two"]), ["one", "two", "three"], (X,), {})
    assert found.shared == {id(net.one.weight): [0, 2]}
    assert sharing_report(net, found.shared) == "one.weight = three.weight (blocks 0, 2)"
    assert audit(net, HookAdapter([]), ["three"], (X,), {}).shared == {}  # one block may tie what it likes


def test_random_blocks_and_buffers_of_each_block() -> None:
    net = nn.Sequential(
        nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()
    )  # fmt: skip
    units = find_units(net, (X,), {})
    assert units.names == ["1", "2", "6"]
    found = audit(net, units.adapter([0, 1]), units.names, (X,), {})
    assert found.random == [False, False, True]  # the dropout opens the unit behind it
    assert [[type(m).__name__ for m in modules] for modules in found.modules] == [
        ["Linear", "BatchNorm1d"], ["Linear"], ["Linear", "BatchNorm1d"]
    ]  # fmt: skip
    assert found.shapes == [(4,), (4,), (4,)]
    model = fl.localize(net, "dgl", blocks=3, sample=X)
    assert [[s.name for s in b.buffers] for b in model.blocks] == [
        [f"backbone.1.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")],
        [],
        [f"backbone.5.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")],
    ]
    assert [b.random for b in model.blocks] == [False, False, True]


def test_dropout_of_probability_zero_is_not_random_and_functional_dropout_is() -> None:
    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(super().forward(x), 0.5, self.training)

    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.0), nn.Linear(4, 4), Noisy(4, 4))
    found = audit(net, find_units(net, (X,), {}).adapter([0, 1]), ["0", "2", "3"], (X,), {})
    assert found.random == [False, False, True]


def test_graph_nodes() -> None:
    w, v = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    shared = w * 2
    interior, leaves = graph_nodes(shared + v)
    assert leaves == {id(w), id(v)} and shared.grad_fn in interior and len(interior) == 2
    assert graph_nodes(w) == (set(), {id(w)})
    assert graph_nodes(torch.ones(2)) == (set(), set())
