import copy
import pickle
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import fastlocal as fl
from fastlocal.blocks.heads import AvgPool, ClassifierHead
from fastlocal.errors import ArgumentError
from fastlocal.methods import Method, get_method, list_methods, register
from fastlocal.methods import base as base_module

NAMES = ["auglocal", "bp", "dgl", "infopro", "predsim"]


def test_list_methods_says_what_there_is():
    listed = {entry["name"]: entry for entry in list_methods()}
    assert set(NAMES) <= set(listed)
    for name in NAMES:
        entry = listed[name]
        assert entry["paper"] and entry["summary"]
        assert entry["isolated"] == (name != "bp")
        get_method(name)("paper", **entry["options"])  # every default is accepted
        get_method(name)("official")


def test_unknown_method_names_near_and_valid_ones():
    with pytest.raises(ArgumentError, match=r"method: no method 'auglocl'.*auglocal.*Valid: .*infopro"):
        get_method("auglocl")


@pytest.mark.parametrize("name", NAMES)
def test_unknown_option_and_mode_are_named(name):
    with pytest.raises(ArgumentError, match=f"wieght: not an option of method '{name}'"):
        get_method(name)(wieght=1)
    with pytest.raises(ArgumentError, match=r"mode: got 'offical'. Valid: 'paper', 'official'"):
        get_method(name)("offical")


def test_a_misspelt_option_is_answered_with_near_names_and_all_options():
    with pytest.raises(ArgumentError, match=r'Did you mean "pyramid_coeff".*depth=2'):
        get_method("auglocal")(pyramid_coef=0.2)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dgl", {"head": "mlp"}, r"head: got 'mlp'. Valid: 'dgl', 'dgl_mlp', 'dgl_cnn', 'auglocal', 'man\+\+'"),
        ("predsim", {"variant": "vgg"}, "variant: got 'vgg'"),
        ("predsim", {"losses": "both"}, "losses: got 'both'"),
        ("predsim", {"beta": 1.5}, "beta: got 1.5; give a number from 0 up to 1"),
        ("predsim", {"dim_in_decoder": 0}, "dim_in_decoder: got 0; give an integer from 1"),
        ("auglocal", {"depth": 0}, "depth: got 0; give an integer from 1"),
        ("auglocal", {"depth": 2.5}, "depth: got 2.5"),
        ("auglocal", {"depth": True}, "depth: got True"),
        ("auglocal", {"form": "stl"}, "form: got 'stl'"),
        ("auglocal", {"pyramid": "yes"}, "pyramid: got 'yes'"),
        ("auglocal", {"widen": 0}, "widen: got 0"),
        ("infopro", {"config": "3c2f"}, "config: got '3c2f'. Valid: '0c1f'"),
        ("infopro", {"loss": "ce"}, "loss: got 'ce'"),
        ("infopro", {"decoder": "3c"}, "decoder: got '3c'"),
        ("infopro", {"dataset": "cifar"}, "dataset: got 'cifar'"),
        ("infopro", {"lam": (1, 2, 3)}, "lam: got .*; give 2 or 4 numbers"),
        ("infopro", {"lam": 5}, "lam: got 5"),
        ("infopro", {"lam": (1, -1)}, "lam: got .*at least 0"),
        ("infopro", {"std": (0.0, 1.0, 1.0)}, "std: got .*positive"),
        ("infopro", {"temperature": 0}, "temperature: got 0"),
    ],
)
def test_bad_values_name_the_option_and_what_would_do(name, options, message):
    with pytest.raises(ArgumentError, match=message):
        get_method(name)(**options)


@pytest.mark.parametrize("name", NAMES)
def test_methods_survive_copy_and_pickle(name):
    method = get_method(name)("official")
    for other in (copy.deepcopy(method), pickle.loads(pickle.dumps(method))):
        assert repr(other) == repr(method)
        assert other.final_weight == method.final_weight


@dataclass
class LinearOptions:
    scale: float = 1.0


class LinearReadout(Method):
    name: ClassVar[str] = "linear-readout-for-tests"
    paper: ClassVar[str] = "none"
    repository: ClassVar[str] = "none"
    Options: ClassVar[type] = LinearOptions

    def head(self, site):
        return ClassifierHead(torch.nn.Sequential(AvgPool(), torch.nn.Linear(site.shape[0], site.num_classes)))


def test_a_method_of_one_s_own_is_registered_once(monkeypatch):
    monkeypatch.setattr(base_module, "_REGISTRY", dict(base_module._REGISTRY))
    assert register(LinearReadout) is LinearReadout
    assert register(LinearReadout) is LinearReadout  # a module that is reloaded registers itself again
    assert get_method(LinearReadout.name) is LinearReadout
    assert LinearReadout(scale=2.0).options.scale == 2.0

    class Other(LinearReadout):
        pass

    with pytest.raises(ArgumentError, match="is registered already by"):
        register(Other)


def test_bp_is_one_block_without_heads():
    bp = get_method("bp")()
    assert bp.prepare(1, 16) == 1
    assert bp.final_weight == 1.0
    with pytest.raises(ArgumentError, match="no auxiliary heads, so it takes blocks=1"):
        bp.head(_site())


def _site():
    from fastlocal.methods import Site

    net = torch.nn.Linear(1, 1)
    return Site(0, 2, 0, 2, "a", (4, 8, 8), (3, 8, 8), 10, False, None, net, 0)


class Nameless(Method):
    """A method of a user's own script, with no more than it must have."""

    def __init__(self, make) -> None:
        super().__init__()
        self.make = make

    def head(self, site):
        return self.make(site)


class LossOnly(torch.nn.Linear):
    def forward(self, h, ctx):
        return super().forward(h.mean((2, 3))).square().mean()


def _net():
    return torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Conv2d(4, 4, 3), AvgPool(), torch.nn.Linear(4, 10))


def test_a_method_without_a_name_is_called_as_its_class():
    def head(site):
        return ClassifierHead(torch.nn.Sequential(AvgPool(), torch.nn.Linear(site.shape[0], site.num_classes)))

    model = fl.localize(_net(), Nameless(head), blocks=["0"], sample=torch.zeros(2, 1, 8, 8))
    assert model.method.name == "Nameless" and "Nameless" not in [m["name"] for m in fl.list_methods()]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda site: torch.nn.Flatten(), r"head of 'Nameless', Flatten, does not take \(h, ctx\).*ClassifierHead\("),
        (lambda site: "dgl", r"head\(\) of 'Nameless' returned str; return an nn\.Module"),
        (lambda site: LossOnly(4, 1), r"head of 'Nameless' returned Tensor; return LocalLoss\.of"),
    ],
)
def test_heads_that_the_blocks_cannot_use(make, message):
    with pytest.raises(ArgumentError, match="^method: .*" + message):
        fl.localize(_net(), Nameless(make), blocks=["0"], sample=torch.zeros(2, 1, 8, 8))


def test_a_list_of_modules_is_no_network():
    with pytest.raises(ArgumentError, match=r"^net: ModuleList has no forward; give nn\.Sequential"):
        fl.localize(torch.nn.ModuleList(_net()), "dgl", blocks=2, sample=torch.zeros(2, 1, 8, 8))
