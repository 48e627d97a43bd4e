"""What every model promises: units, readout, fresh units, copies."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fastlocal import models
from fastlocal.errors import ArgumentError

IMAGES = (4, 3, 32, 32)
# Small versions of every family: name, options, input shape.
CASES = [
    ("resnet20", {"width": 4}, IMAGES),
    ("resnet20", {"width": 4, "dropout": 0.2}, IMAGES),
    ("resnet18", {"width": 4, "num_classes": 10}, IMAGES),
    ("resnet50", {"width": 4, "num_classes": 10, "dropout": 0.2}, (4, 3, 64, 64)),
    ("vgg13", {"width": 4, "hidden": 16, "num_classes": 10}, IMAGES),
    ("vgg8b", {"feat_mult": 1 / 16, "num_hidden": 16}, IMAGES),
    ("vgg8b", {"feat_mult": 1 / 16, "num_layers": 0}, IMAGES),
    ("vgg11b", {"feat_mult": 1 / 16, "num_hidden": 16, "num_layers": 2, "dropout": 0.2, "nonlin": "leakyrelu"}, IMAGES),
    ("vgg8b", {"feat_mult": 1 / 16, "num_hidden": 16, "img_size": 96, "in_channels": 1}, (4, 1, 96, 96)),
    ("dgl_cnn", {"feature_size": 4}, IMAGES),
    ("dgl_cnn", {"feature_size": 4, "img_size": 8, "in_channels": 1, "depth": 3, "downsample": (2,)}, (4, 1, 8, 8)),
    ("vit_tiny", {"dim": 12, "depth": 2, "img_size": 32, "patch_size": 8, "num_classes": 10}, IMAGES),
    ("vit_tiny", {"dim": 12, "depth": 2, "img_size": 32, "dropout": 0.2, "pool": "mean", "num_classes": 10}, IMAGES),
    (
        "swin_tiny",
        {"dim": 6, "depths": (1, 2), "heads": (1, 2), "img_size": 32, "window": 4, "num_classes": 10},
        IMAGES,
    ),
    (
        "swin_tiny",
        {"dim": 6, "depths": (2, 1), "heads": (2, 3), "img_size": 32, "window": 2, "drop_path": 0.3, "num_classes": 10},
        IMAGES,
    ),
    ("mlp", {"in_features": 64, "hidden": (16, 12)}, (4, 1, 8, 8)),
    ("mlp", {"in_features": 64, "hidden": (16, 12), "batch_norm": True, "dropout": 0.2}, (4, 64)),
    ("gpt", {"vocab_size": 10, "block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 8}, (4, 8)),
    (
        "gpt",
        {"vocab_size": 10, "block_size": 9, "n_layer": 2, "n_head": 2, "n_embd": 8, "dropout": 0.2, "tie": False},
        (4, 8),
    ),
]


@pytest.fixture(params=CASES, ids=[f"{name}-{i}" for i, (name, _, _) in enumerate(CASES)])
def case(request):
    name, options, shape = request.param
    net = models.create(name, **options)
    x = torch.randint(0, 10, shape) if name == "gpt" else torch.randn(shape)
    return net, x


def compose(units, readout, x):
    for _, fn in units:
        x = fn(x)
    return readout(x)


@pytest.mark.parametrize("training", [True, False])
def test_forward_is_the_composition_of_units_and_readout_bitwise(case, training):
    net, x = case
    net.train(training)
    torch.manual_seed(1)
    whole = net(x)
    torch.manual_seed(1)
    pieces = compose(net.units(), net.readout, x)
    assert torch.equal(whole, pieces)
    assert whole.shape == (*x.shape[:2], 10) if getattr(net, "causal", False) else (x.shape[0], 10)
    assert net.num_classes == 10


def test_unit_names_are_module_paths_or_bound_methods(case):
    net, _ = case
    for name, fn in net.units():
        if isinstance(fn, nn.Module):
            assert net.get_submodule(name) is fn
        else:
            assert fn == getattr(net, name)


def test_units_and_readout_share_out_the_parameters(case):
    net, x = case
    parameters = dict(net.named_parameters())
    owned: list[set[str]] = []
    for name, fn in [*net.units(), ("readout", net.readout)]:
        out = fn(x.detach())
        grads = (
            torch.autograd.grad(out.sum(), list(parameters.values()), allow_unused=True) if out.requires_grad else ()
        )
        owned.append({n for n, g in zip(parameters, grads) if g is not None})
        assert owned[-1] or name == "readout", name
        x = out
    assert set.union(*owned) == set(parameters)
    shared = {n for k, names in enumerate(owned) for later in owned[k + 1 :] for n in names & later}
    tied = isinstance(net, models.GPT) and net.lm_head.weight is net.wte.weight
    assert shared == ({"wte.weight"} if tied else set())


def test_units_leave_their_input_alone(case):
    net, x = case
    for name, fn in net.units():
        before, version = x.clone(), x._version
        out = fn(x)
        assert x._version == version and torch.equal(x, before), name
        x = out.detach()
    before, version = x.clone(), x._version
    net.readout(x)
    assert x._version == version and torch.equal(x, before)


def test_widths_are_those_of_the_units(case):
    net, x = case
    assert len(net.widths) == len(net.units())
    for width, (name, fn) in zip(net.widths, net.units()):
        x = fn(x)
        expansion = net.block.expansion if isinstance(net, models.ResNet) and name != "stem" else 1
        channels = x.shape[1] if x.ndim in (2, 4) else x.shape[2]
        assert channels == width * expansion, name


@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_carry_their_own_units(case, how):
    net, x = case
    net.eval()
    expected = net(x)
    twin, units, readout = how((net, net.units(), net.readout))
    assert torch.equal(compose(units, readout, x), expected)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(0.01)
    assert torch.equal(compose(units, readout, x), twin(x))
    assert not torch.equal(twin(x), expected)
    assert torch.equal(net(x), expected)


def test_gradients_reach_every_parameter(case):
    net, x = case
    net(x).square().sum().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name


def test_no_dropout_module_without_dropout():
    for name, options, _ in CASES:
        if "dropout" not in options and name != "vgg13":  # the published VGG classifier always holds its two
            net = models.create(name, **options)
            assert not [m for m in net.modules() if isinstance(m, nn.modules.dropout._DropoutNd)], name


@pytest.mark.parametrize(("name", "options"), [c[:2] for c in CASES], ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)])
def test_same_seed_same_parameters(name, options):
    nets = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        nets.append(list(models.create(name, **options).parameters()))
    assert all(torch.equal(a, b) for a, b in zip(nets[0], nets[1]))
    assert not all(torch.equal(a, b) for a, b in zip(nets[0], nets[2]))


CNNS = [c for c in CASES if c[0].startswith(("resnet", "vgg", "dgl")) and "dropout" not in c[1]]


@pytest.mark.parametrize(("name", "options", "shape"), CNNS, ids=[f"{c[0]}-{i}" for i, c in enumerate(CNNS)])
def test_make_unit_gives_fresh_trainable_units_of_the_wanted_shape(name, options, shape):
    net = models.create(name, **options)
    maps = [(i, width) for i, (width, (unit, _)) in enumerate(zip(net.widths, net.units())) if "classifier" not in unit]
    h = torch.randn(2, 6, 8, 8)
    for i, width in maps:
        unit = net.make_unit(i, 6, 2)
        out = unit(h)
        expansion = net.block.expansion if hasattr(net, "block") else 1
        assert out.shape == (2, width * expansion, 4, 4)
        out.sum().backward()
        assert all(p.grad is not None for p in unit.parameters())
        assert {id(p) for p in unit.parameters()}.isdisjoint({id(p) for p in net.parameters()})
        assert not [m for m in unit.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]


@pytest.mark.parametrize("bad", [-1, 99])
def test_make_unit_refuses_an_index_that_is_no_unit(case, bad):
    net, _ = case
    with pytest.raises(ArgumentError, match="i must be the index of a unit, 0 to"):
        net.make_unit(bad, 8, 1)


def test_make_readout_turns_every_boundary_into_logits(case):
    net, x = case
    for name, fn in net.units():
        x = fn(x)
        features = x.shape[1] if x.ndim in (2, 4) else x.shape[2]
        readout = net.make_readout(features, 7)
        logits = readout(x)
        wanted = (*x.shape[:2], 7) if getattr(net, "causal", False) else (x.shape[0], 7)
        assert logits.shape == wanted, name
        assert not torch.equal(logits, net.make_readout(features, 7)(x)), "a fresh readout has its own weights"
