"""Where `localize` cuts, what it builds there, and that it leaves the network alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

import fastlocal as fl
from fastlocal import models
from fastlocal.blocks.losses import CausalLMLoss, cross_entropy
from fastlocal.blocks.measure import StorageTracker
from fastlocal.blocks.types import LocalLoss, Site, StepContext
from fastlocal.engine import plan
from fastlocal.engine.localize import default_criterion, parse_bytes
from fastlocal.errors import ArgumentError
from tests.engine.formula import predicted_peak
from tests.engine.untouched import assert_same, untouched

X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 3, 9, 1])


def resnet(per_stage: int = 2) -> nn.Module:
    return models.ResNetCIFAR(per_stage, width=4)


class Tied(nn.Module):
    """Embedding and readout share a weight."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(layers))
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        for layer in self.layers:
            h = layer(h)
        return self.head(h)


IDS = torch.arange(10).reshape(2, 5)


# ----------------------------------------------------------------------------------------------------------------- cuts


def test_a_count_is_cut_where_the_dearest_block_is_cheapest() -> None:
    net = resnet()
    with untouched(net, random=False):
        model = fl.localize(net, "dgl", blocks=3, sample=X[:2])
    assert model.backbone is net and len(model.blocks) == 3 and len(model.heads) == 2
    assert [u for b in model.blocks for u in b.units] == [name for name, _ in net.units()]
    macs = [b.cost.macs for b in model.blocks]
    assert sum(macs) == 1 * 144 * 4 * 27 + sum(_unit_macs(*shape) for shape in _UNITS) + 16 * 10
    assert max(macs) < 0.5 * sum(macs)
    assert all(p.grad is None for p in model.parameters())


_UNITS = [(4, 4, 144), (4, 4, 144), (4, 8, 36), (8, 8, 36), (8, 16, 9), (16, 16, 9)]  # channels in, out; pixels


def _unit_macs(c_in: int, c_out: int, pixels: int) -> int:
    shortcut = c_in * c_out if c_in != c_out else 0
    return pixels * (9 * c_in * c_out + 9 * c_out * c_out + shortcut)


def test_all_units_and_one_block() -> None:
    model = fl.localize(resnet(1), "dgl", blocks=4, sample=X[:2])
    assert [b.name for b in model.blocks] == ["stem", "layer1.0", "layer2.0", "layer3.0"]
    for method, blocks in (("bp", 1), ("bp", None), ("dgl", 1), ("dgl", [])):
        model = fl.localize(resnet(1), method, blocks=blocks, sample=X[:2])
        assert len(model.blocks) == 1 and len(model.heads) == 0
        assert {id(p) for p in model.blocks[0].parameters()} == {id(p) for p in model.parameters()}


def test_names_cut_slices_where_they_are_units_and_hooks_elsewhere() -> None:
    """'layer1' ends where its last unit does: the same blocks, the same training, by hooks instead of slices."""
    runs = []
    for names in (["layer1.1", "layer2.0"], ["layer1", "layer2.0"]):
        torch.manual_seed(0)
        model = fl.localize(resnet(), "dgl", blocks=names, sample=X[:2])
        optimizer = fl.LocalOptimizer(model, lambda named: torch.optim.SGD(named, lr=0.1))
        for _ in range(2):
            optimizer.zero_grad()
            model(X, Y).loss.backward()
            optimizer.step()
        runs.append(model)
    slices, hooks = runs
    assert "3 blocks as slices" in slices.explain()
    assert "3 blocks by hooks on layer1, layer2.0" in hooks.explain() and "units() and readout()" in hooks.explain()
    assert [[n for n, _ in b.named_parameters()] for b in slices.blocks] == [
        [n for n, _ in b.named_parameters()] for b in hooks.blocks
    ]
    assert_same(dict(slices.state_dict()), dict(hooks.state_dict()))


def test_a_cut_inside_a_unit_without_a_skip() -> None:
    net = models.create("mlp", in_features=432, hidden=(8, 8))
    model = fl.localize(net, "dgl", blocks=["layers.0.linear"], sample=X[:2])
    assert "by hooks on layers.0.linear" in model.explain()
    assert [n for n, _ in model.blocks[0].backbone_parameters()] == [
        "backbone.layers.0.linear.weight",
        "backbone.layers.0.linear.bias",
    ]


def test_a_method_says_how_many_blocks_and_where() -> None:
    model = fl.localize(models.ResNetCIFAR(3, width=4), "auglocal", blocks=5, depth=2, sample=X[:2])
    assert len(model.blocks) == 3  # the last depth + 1 are trained together


@pytest.mark.parametrize(
    "sample",
    [X[:2], (X[:2], Y[:2]), [X[:2], Y[:2]], {"x": X[:2]}, {"x": X[:2], "labels": Y[:2]}, {"x": X[:2], "target": Y[:2]}],
)
def test_samples(sample: Any) -> None:
    net = resnet(1)
    with untouched(net, random=False):
        model = fl.localize(net, "dgl", blocks=["layer1.0"], sample=sample)
    assert len(model.blocks) == 2 and model.num_classes == 10


def test_a_sample_by_the_callers_own_batch_function() -> None:
    def batch(b: Any) -> Any:
        return (b.image,), {}, b.label

    model = fl.localize(resnet(1), "dgl", blocks=2, sample=SimpleNamespace(image=X[:2], label=Y[:2]), batch=batch)
    assert len(model.blocks) == 2
    model = fl.localize(resnet(1), "dgl", blocks=2, sample=X[:2], batch=batch)  # a tensor is the input itself
    out = fl.Engine(model, lambda named: torch.optim.SGD(named, lr=0.1)).step(SimpleNamespace(image=X, label=Y))
    assert out.losses.shape == (2,)


def test_any_task_loss_can_be_measured_without_its_targets() -> None:
    """Regression: float targets that the class indices of the measuring run would not fit."""
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    x, y = torch.randn(5, 4), torch.randn(5, 3)

    def loss(out: Tensor, target: Tensor) -> Tensor:
        assert target.shape == out.shape
        return F.mse_loss(out, target)

    for sample in (x, (x, y)):
        model = fl.localize(net, "dgl", blocks=3, sample=sample, criterion=loss)
        assert torch.isfinite(model(x, y).losses).all()


def test_the_default_task_loss() -> None:
    assert default_criterion(nn.Linear(2, 2)) is cross_entropy
    assert isinstance(default_criterion(type("ToyForCausalLM", (nn.Linear,), {})(2, 2)), CausalLMLoss)
    assert isinstance(default_criterion(type("ToyLMHeadModel", (nn.Linear,), {})(2, 2)), CausalLMLoss)
    causal = nn.Linear(2, 2)
    causal.causal = True  # type: ignore[assignment]
    assert isinstance(default_criterion(causal), CausalLMLoss)


# --------------------------------------------------------------------------------------------------- a budget of memory


def make(method: str) -> tuple[Callable[[], nn.Module], dict[str, Any]]:
    options: dict[str, dict[str, Any]] = {"auglocal": {"depth": 1}, "dgl": {}, "predsim": {}}
    return (lambda: models.ResNetCIFAR(2, width=4)), options[method]


def planned(model: fl.LocalModel, x: Tensor, rows: int) -> int:
    return fl.plan(model, x, rows=rows, device="cpu-core").peak_bytes


@pytest.mark.parametrize("method", ["dgl", "auglocal", "predsim"])
def test_auto_takes_the_fewest_blocks_that_fit(method: str) -> None:
    net, options = make(method)
    peaks = {1: planned(fl.localize(net(), "bp", sample=X[:2]), X, 64)}
    for blocks in range(2, 8):
        try:
            model = fl.localize(net(), method, blocks=blocks, sample=X[:2], **options)
        except ArgumentError:  # depth needs more blocks
            continue
        peaks[blocks] = planned(model, X, 64)
    assert list(peaks.values()) != sorted(peaks.values(), reverse=True)  # a bisection could miss one
    for budget in sorted(set(peaks.values()))[::4]:
        fewest = min(k for k, peak in peaks.items() if peak <= budget)
        torch.manual_seed(5)
        same = fl.localize(net(), method if fewest > 1 else "bp", blocks=fewest, sample=X[:2], **options if fewest > 1 else {})  # fmt: skip
        torch.manual_seed(5)
        model = fl.localize(
            net(), method, blocks="auto", memory_budget=budget, budget_batch=64, sample=X[:2], **options
        )
        assert [b.name for b in model.blocks] == [b.name for b in same.blocks]
        # the trials drew no random number of the caller's: the heads start from the same weights
        assert_same(dict(model.state_dict()), dict(same.state_dict()))


def test_auto_looks_between_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """28 equal layers: 13 blocks (of up to 3) are too few, 15 fit (of up to 2), and so do 14, which are no step."""
    monkeypatch.setattr(plan, "EVERY_COUNT", 12)
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(28)))
    x = torch.randn(2, 8)
    assert 14 not in plan._counts(28) and {13, 15, 28} < set(plan._counts(28))
    budget = 1.01 * planned(fl.localize(net, "dgl", blocks=14, sample=x), x, 20000)  # 15 have a head more
    model = fl.localize(net, "dgl", blocks="auto", memory_budget=budget, budget_batch=20000, sample=x)
    assert len(model.blocks) == 14


def test_auto_on_a_network_that_needs_contents() -> None:
    class Counting(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[x.sum(1) > -1e9])

    net = nn.ModuleDict({"body": Counting(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))})
    net.forward = net["body"].forward  # type: ignore[method-assign]
    with pytest.raises(ArgumentError, match="blocks: 'auto' plans steps of tensors without contents"):
        fl.localize(net, "dgl", blocks="auto", memory_budget="1GiB", sample=torch.randn(2, 4))


@pytest.mark.parametrize("rows", [4, 32])
@pytest.mark.parametrize("method, blocks", [("bp", 1), ("dgl", 3), ("dgl", 7), ("auglocal", 5), ("predsim", 4)])
def test_a_real_step_stays_below_the_predicted_peak(method: str, blocks: int, rows: int) -> None:
    torch.manual_seed(1)
    options = {"depth": 1} if method == "auglocal" else {}
    model = fl.localize(models.ResNetCIFAR(2, width=16), method, blocks=blocks, sample=X[:2], **options)
    engine = fl.Engine(model, lambda named: torch.optim.SGD(named, lr=0.01, momentum=0.9))
    x, y = torch.randn(rows, 3, 12, 12), torch.arange(rows) % 10
    engine.step(x, y)  # the momentum is there now
    with StorageTracker() as storages:
        engine.step(x, y)
    twice = 2 * sum(p.numel() * p.element_size() for p in model.parameters())
    real, predicted = twice + storages.peak, predicted_peak(model, rows)
    assert 0.7 * predicted < real <= 1.02 * predicted, (real, predicted)


def test_auto_with_linked_weights_keeps_its_links() -> None:
    """Trials of fewer blocks link too; what they did must be undone, or the last one finds nothing to link."""
    peaks = {}
    for blocks in (1, 2, 3):
        method = "dgl" if blocks > 1 else "bp"
        peaks[blocks] = planned(fl.localize(Tied(40), method, blocks=blocks, sample=IDS, tied="link"), IDS, 2000)
    assert peaks[1] > peaks[2] > peaks[3]
    net = Tied(40)
    model = fl.localize(net, "dgl", blocks="auto", memory_budget=peaks[3], budget_batch=2000, sample=IDS, tied="link")
    assert len(model.blocks) == 3 and len(model.links) == 1
    assert net.embed.weight is not net.head.weight and not net.embed.weight.requires_grad


@pytest.mark.parametrize(
    "text, number",
    [("4GiB", 4 << 30), ("500MB", 500_000_000), ("1.5 KiB", 1536), (" 10 B ", 10), ("12", 12), (7, 7), (2.5e9, 2_500_000_000),
     ("2TB", 2 * 10**12), (".5MiB", 1 << 19)],
)  # fmt: skip
def test_parse_bytes(text: Any, number: int) -> None:
    assert parse_bytes(text) == number


# --------------------------------------------------------------------------------------------------------- tied weights


def test_untie_gives_each_block_a_copy_of_its_own() -> None:
    net = Tied()
    value = net.embed.weight.detach().clone()
    model = fl.localize(net, "dgl", blocks=2, sample=IDS, tied="untie")
    assert net.embed.weight is not net.head.weight and model.links == []
    assert torch.equal(net.embed.weight, value) and torch.equal(net.head.weight, value)
    owners = {n: k for k, b in enumerate(model.blocks) for n, _ in b.named_parameters()}
    assert owners["backbone.embed.weight"] == 0 and owners["backbone.head.weight"] == 1
    out = fl.Engine(model, lambda named: torch.optim.SGD(named, lr=0.5)).step(IDS, IDS)
    assert torch.isfinite(out.losses).all()
    assert not torch.equal(net.embed.weight, value) and not torch.equal(net.head.weight, value)
    assert not torch.equal(net.embed.weight, net.head.weight)


def test_weights_tied_inside_one_block_stay_tied() -> None:
    class Inside(Tied):
        def forward(self, ids: Tensor) -> Tensor:
            h = self.embed(ids) @ self.embed.weight.T @ self.embed.weight
            for layer in self.layers:
                h = layer(h)
            return self.head(h)

    net = Inside()
    net.head.weight = nn.Parameter(torch.randn(11, 6))
    with untouched(net, random=False):
        fl.localize(net, "dgl", blocks=2, sample=IDS)


def test_parameters_that_no_loss_reaches_are_named() -> None:
    """Unused ones, and those behind a reentrant checkpoint at the beginning of a block; frozen ones are meant to stay."""

    class Layer(nn.Module):
        def __init__(self, reentrant: bool, unused: bool = False):
            super().__init__()
            self.f, self.reentrant = nn.Linear(8, 8), reentrant
            self.unused = nn.Linear(2, 2).requires_grad_(unused)

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.f, x, use_reentrant=self.reentrant)

    def cut(*layers: nn.Module) -> None:
        fl.localize(nn.Sequential(*layers, nn.Linear(8, 3)), "dgl", blocks=2, sample=torch.randn(4, 8))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cut(Layer(False), Layer(False))
    with pytest.warns(UserWarning, match=r"no local loss reaches 0\.unused\.weight, 0\.unused\.bias \(2 in all\)"):
        cut(Layer(False, unused=True), Layer(False))
    with pytest.warns(UserWarning, match=r"no local loss reaches 0\.f\.weight.*use_reentrant=False"):
        cut(Layer(True), Layer(False))


def test_a_buffer_belongs_to_every_block_that_its_module_runs_in() -> None:
    norm = nn.BatchNorm1d(6, affine=False)
    net = nn.Sequential(nn.Linear(6, 6), norm, nn.Linear(6, 6), norm, nn.Linear(6, 2))
    model = fl.localize(net, "dgl", blocks=3, sample=torch.randn(4, 6))
    names = [f"backbone.1.{key}" for key in ("running_mean", "running_var", "num_batches_tracked")]
    assert [[slot.name for slot in block.buffers] for block in model.blocks] == [names, names, []]
    weights = [[f"backbone.{i}.weight", f"backbone.{i}.bias"] for i in (0, 2, 4)]
    assert [[slot.name for slot in block.slots] for block in model.blocks] == weights


class Noisy(nn.Module):
    """A head that draws random numbers in its forward, with no dropout module in it."""

    def __init__(self, features: int, noise: bool) -> None:
        super().__init__()
        self.readout, self.noise = nn.Linear(features, 10), noise

    def forward(self, h: Tensor, ctx: StepContext) -> LocalLoss:
        pooled = h.mean((2, 3))
        if self.noise:
            pooled = F.dropout(pooled, 0.5)
        return LocalLoss.of(("task", ctx.criterion(self.readout(pooled), ctx.target), 1.0))


@pytest.mark.parametrize("noise", [False, True])
def test_a_head_that_draws_random_numbers_is_found_by_running_it(noise: bool) -> None:
    class Once(fl.Method):
        def head(self, site: Site) -> nn.Module:
            return Noisy(site.shape[0], noise and site.index == 1)

    model = fl.localize(resnet(), Once(), blocks=3, sample=X)
    assert [block.random for block in model.blocks] == [False, noise, False]
