"""Units of every kind of network, what they cost, and cuts of the best balance."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastlocal import models
from fastlocal.blocks.measure import LaunchCounter
from fastlocal.blocks.partition import Units, balanced_cuts, find_units, measure_units, named_cuts, undisturbed
from fastlocal.errors import PartitionError
from tests.engine.untouched import untouched

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def dearest(costs: list[int], cuts: tuple[int, ...] | list[int]) -> int:
    edges = [0, *(c + 1 for c in cuts), len(costs)]
    return max(sum(costs[a:b]) for a, b in itertools.pairwise(edges))


@pytest.mark.parametrize("seed", range(60))
def test_balanced_cuts_against_every_other_cut(seed: int) -> None:
    draw = random.Random(seed)
    costs = [draw.choice([0, 1, 2, 3, 5, 8, 40]) for _ in range(draw.randint(1, 9))]
    for blocks in range(1, len(costs) + 1):
        cuts = balanced_cuts(costs, blocks)
        assert len(cuts) == blocks - 1 and cuts == sorted(set(cuts)) and all(0 <= c < len(costs) - 1 for c in cuts)
        best = min(dearest(costs, c) for c in itertools.combinations(range(len(costs) - 1), blocks - 1))
        assert dearest(costs, cuts) == best, (costs, blocks, cuts)
        assert balanced_cuts(costs, blocks) == cuts


def test_balanced_cuts_split_what_is_still_too_big() -> None:
    assert balanced_cuts([1, 1, 1, 1], 2) == [1]
    assert balanced_cuts([0, 0, 0], 3) == [0, 1]
    cuts = balanced_cuts([9, 1, 1, 1, 1], 4)  # two runs suffice for 9; the other cuts share out the rest
    assert cuts[0] == 0 and dearest([1, 1, 1, 1], [c - 1 for c in cuts[1:]]) == 2


@pytest.mark.parametrize("blocks", [0, 4, -1])
def test_more_blocks_than_units(blocks: int) -> None:
    with pytest.raises(PartitionError, match=rf"^blocks: {blocks} asked for, but the backbone has 3 units; use 1 to 3"):
        balanced_cuts([1, 2, 3], blocks)


# ---------------------------------------------------------------------------------------------------------------- units


def same_function(net: nn.Module, units: Units, x: Tensor) -> None:
    """Every unit a slice of its own computes what the network does, bit for bit."""
    net.eval()
    seen: list[int] = []

    def on_block(k: int, h: Tensor) -> Tensor:
        seen.append(k)
        return h.detach()

    out = units.adapter(list(range(len(units.names) - 1))).run(net, (x,), {}, on_block)
    assert torch.equal(out, net(x)) and seen == list(range(len(units.names) - 1))


def test_declared_units() -> None:
    net = models.ResNetCIFAR(2, width=4)
    units = find_units(net, (X,), {})
    assert units.names == ["stem", *(f"layer{s}.{i}" for s in (1, 2, 3) for i in (0, 1))]
    assert units.fns is not None and len(units.fns[-1]) == 2  # the readout joins the last unit
    same_function(net, units, X)


def test_a_sequential_is_grouped_by_convolution_norm_and_activation() -> None:
    relu = nn.ReLU()
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), relu,                     # 0-2
        nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.PReLU(),  # 3-6: the pool opens it
        nn.Dropout(0.1), nn.Conv2d(4, 4, 1), relu,                                  # 7-9: the same activation again
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5),                     # 10-12
    )  # fmt: skip
    units = find_units(net, (X,), {})
    assert units.names == ["2", "6", "9", "12"]
    assert units.fns is not None and [len(fns) for fns in units.fns] == [3, 4, 3, 3]
    same_function(net, units, X)


def test_what_leads_or_trails_a_sequential_joins_its_neighbour() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.ReLU(), nn.Linear(4, 3), nn.Dropout(0.1))
    units = find_units(net, (X,), {})
    assert units.names == ["2", "3"]
    assert units.fns is not None and [len(fns) for fns in units.fns] == [3, 2]
    same_function(net, units, X)


class Hooked(nn.Module):
    """A network whose order of units only its forward knows."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 4, 3)
        self.layers = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()) for _ in range(layers))
        self.spare = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 1)) for _ in range(2))  # never runs
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.fc(F.dropout(x, 0.1, self.training).mean((2, 3)))


def test_hooks_cut_after_repeated_modules() -> None:
    net = Hooked()
    with untouched(net):
        units = find_units(net, (X,), {})
    assert units.names == ["layers.0", "layers.1", "layers.2"] and units.fns is None


def test_a_module_that_runs_twice_is_no_candidate() -> None:
    class Again(Hooked):
        def forward(self, x: Tensor) -> Tensor:
            x = self.layers[2](self.layers[1](self.layers[0](self.layers[1](self.enter(x)))))
            return self.fc(x.mean((2, 3)))

    assert find_units(Again(), (X,), {}).names == ["layers.0", "layers.2"]


def test_keyword_inputs_go_by_hooks_though_the_network_could_be_sliced() -> None:
    net = models.ResNetCIFAR(2, width=4)
    units = find_units(net, (), {"x": X})
    assert units.fns is None and "layer1.0" in units.names


def test_nothing_to_cut() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(192, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.flatten(1))

    net = Plain()
    with (
        untouched(net),
        pytest.raises(PartitionError, match=r"^net: found no repeated modules to cut Plain at; name the modules"),
    ):
        find_units(net, (X,), {})


# ----------------------------------------------------------------------------------------------------------- named cuts


def test_named_cuts() -> None:
    units = Units(["a", "b", "c"], None)
    assert named_cuts(units, []) == [] and named_cuts(units, ["a", "b"]) == [0, 1]
    for names, message in (
        (["b", "a"], r"\['b', 'a'\] is not in the order in which the modules run.*use \['a', 'b'\]"),
        (["a", "a"], r"names one twice; use \['a'\]"),
        (["c"], r"'c' is the last unit; the last block ends there anyway, leave it out"),
        (["d"], r"'d' is no unit of the backbone; near names: a, b, c"),
    ):
        with pytest.raises(PartitionError, match="^blocks: .*" + message):
            named_cuts(units, names)


def test_named_modules_inside_units_are_hooked() -> None:
    net = models.ResNetCIFAR(2, width=4)
    units = find_units(net, (X,), {}, ["layer1.1", "layer2.0"])
    assert units.fns is not None  # units, so slices
    units = find_units(net, (X,), {}, ["layer1.1", "layer2.1.bn2"])
    assert units.fns is None and units.names == ["layer1.1", "layer2.1.bn2", "output"]


@pytest.mark.parametrize(
    "names, message",
    [
        (["layers.9"], r"the backbone has no module 'layers.9'; near names: layers"),
        (["zzzzzz"], r"the backbone has no module 'zzzzzz'"),
        ([""], r"the backbone has no module ''"),
        (["layers.1", "layers.0"], r"is not in the order in which the modules run; that is \['layers.0', 'layers.1'\]"),
        (["layers.1", "layers.1"], r"\['layers.1', 'layers.1'\] names a module twice; name each cut once"),
        (["spare.0"], r"module 'spare.0' runs 0 times in a forward.*cut after a module that runs once"),
    ],
)
def test_names_that_are_no_place(names: list[str], message: str) -> None:
    net = Hooked()
    with untouched(net), pytest.raises(PartitionError, match="^blocks: .*" + message):
        find_units(net, (X,), {}, names)


def test_a_module_that_runs_twice_is_no_place() -> None:
    class Twice(Hooked):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + super().forward(x)

    net = Twice()
    with untouched(net), pytest.raises(PartitionError, match=r"^blocks: module 'enter' runs 2 times in a forward"):
        find_units(net, (X,), {}, ["enter"])


# ------------------------------------------------------------------------------------------------------------ measuring


def test_measured_costs() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    x = torch.randn(5, 4)
    units = find_units(net, (x,), {})
    with untouched(net):
        measure_units(net, units, (x,), {})
    assert units.shapes == [(6,), (3,)] and units.output_shape == (3,)
    assert units.costs == [5 * 24 + 6, 5 * 18 + 3]  # multiply-accumulates, and the numbers of one output
    assert units.saved == [4 * 5 * (4 + 6), 0]  # x and the ReLU's result, which the second unit saves as well


class Stateful(nn.Module):
    """Everything that a forward in training mode may change."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)) for _ in range(2)
        )
        self.register_buffer("replaced", torch.zeros(4))
        self.register_buffer("late", None)
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        if self.training:
            self.replaced = self.replaced + x.detach().mean(0)
            self.late = x.detach()
        return x * self.frozen


@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_no_trace(training: bool) -> None:
    net, x = Stateful(), torch.randn(5, 4)
    net.train(training)
    net.layers[0][1].eval()  # a frozen norm inside a network in training
    units = find_units(net, (x,), {})
    with untouched(net):
        measure_units(net, units, (x,), {})


def test_undisturbed_puts_everything_back_after_an_error() -> None:
    net = Stateful().eval()
    with untouched(net), pytest.raises(ZeroDivisionError), undisturbed(net):
        assert net.training and net.frozen.requires_grad
        net(torch.randn(5, 4))
        raise ZeroDivisionError


def test_undisturbed_copies_no_tensor_without_contents() -> None:
    real, counted = Stateful(), []
    with FakeTensorMode():
        fake = Stateful()
    before = dict(fake.named_buffers())
    for net in (real, fake):
        with LaunchCounter() as launches, undisturbed(net):
            assert net.training
        counted.append(launches.by_op["aten::clone"] + launches.by_op["aten::copy_"])
    assert counted == [2 * len(before), 0] and all(b is before[name] for name, b in fake.named_buffers())
