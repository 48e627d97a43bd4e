import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastlocal as fl
from fastlocal import models
from fastlocal.engine.clip import Clip, readout
from fastlocal.errors import ArgumentError


def params(seed=0, scale=1.0):
    """Of all ranks, with unlike sizes; the third has no gradient."""
    gen = torch.Generator().manual_seed(seed)
    shapes = [(8, 3, 3, 3), (8,), (5,), (4, 8), (), (1, 6, 4), (2, 3)]
    made = [nn.Parameter(torch.randn(shape, generator=gen)) for shape in shapes]
    for p in made:
        p.grad = torch.randn(p.shape, generator=gen) * scale
    made[2].grad = None
    return made


def grads(made):
    return [None if p.grad is None else p.grad.clone() for p in made]


def same(a, b):
    return all(x is y is None or torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("value", [0.5, 1e6])
def test_norm_is_torchs_bitwise(value):
    own, theirs = params(), params()
    before = grads(own)
    total = Clip(value)(own)
    assert torch.equal(total, nn.utils.clip_grad_norm_(theirs, value))
    assert same(grads(own), grads(theirs))
    assert same(grads(own), before) == (value > 1)
    assert own[2].grad is None


def test_value_is_torchs_bitwise():
    own, theirs = params(), params()
    before = grads(own)
    assert Clip(0.3, "value")(own) is None
    nn.utils.clip_grad_value_(theirs, 0.3)
    assert same(grads(own), grads(theirs)) and not same(grads(own), before)


def unit_by_unit(p, factor):
    """The rule of the paper, one unit after another, in float64."""
    g, w = p.grad.double(), p.detach().double()
    if p.dim() <= 1:
        most, have = factor * max(w.norm().item(), 1e-3), g.norm().item()
        return g * (most / have) if have > most else g
    result = g.clone()
    for i in range(len(g)):
        most, have = factor * max(w[i].norm().item(), 1e-3), g[i].norm().item()
        if have > most:
            result[i] *= most / have
    return result


@pytest.mark.parametrize("scale", [0.02, 1.0])
def test_agc_is_the_rule_of_the_paper(scale):
    made = params(scale=scale)
    with torch.no_grad():
        made[3][1] = 0  # a unit at zero counts as 1e-3
    before = grads(made)
    expected = [None if p.grad is None else unit_by_unit(p, 0.02) for p in made]
    assert Clip(0.02, "agc")(made) is None
    for p, e in zip(made, expected, strict=True):
        assert p.grad is e is None or torch.allclose(p.grad.double(), e, rtol=1e-5, atol=0)
    row = made[3].grad[1]
    assert row.norm().item() == pytest.approx(0.02 * 1e-3, rel=1e-4)
    # what is within its bound stays bitwise as it was
    kept = [torch.equal(p.grad, b) for p, b in zip(made, before, strict=True) if b is not None]
    assert any(kept) == (scale < 1)


def test_agc_of_zero_and_half_precision_gradients():
    p = nn.Parameter(torch.ones(3, 4, dtype=torch.bfloat16))
    q = nn.Parameter(torch.ones(3))
    p.grad, q.grad = torch.full_like(p, 8), torch.zeros(3)
    Clip(0.5, "agc")([p, q])
    assert torch.equal(p.grad, torch.full_like(p, 0.5)) and torch.equal(q.grad, torch.zeros(3))


@pytest.mark.parametrize("mode", ["norm", "value", "agc"])
def test_no_gradients(mode):
    p = nn.Parameter(torch.ones(2))
    assert Clip(1.0, mode)([p]) is None and Clip(1.0, mode)([]) is None and p.grad is None


@pytest.mark.parametrize(
    ("method", "options"),
    [("dgl", {}), ("predsim", {}), ("infopro", {"lam": (1.0, 1.0), "loss": "cross_entropy"}), ("auglocal", {})],
)
def test_bind_leaves_the_last_linear_layers_alone(method, options):
    torch.manual_seed(0)
    net = models.create("resnet20", width=4, num_classes=7)
    model = fl.localize(net, method, blocks=4, sample=torch.zeros(2, 3, 16, 16), **options)
    left = Clip(0.01, "agc").bind(model)._left_out
    names = [n for n, p in model.named_parameters() if id(p) in left]
    last = [m for b in model.blocks[:-1] for m in b.head.modules() if isinstance(m, nn.Linear) and m.out_features == 7]
    assert "backbone.fc.weight" in names and "backbone.fc.bias" in names
    assert len(last) == len(model.blocks) - 1 and all(id(m.weight) in left for m in last)
    assert {id(p) for m in (*last, net.fc) for p in m.parameters()} == set(left)


def test_bound_agc_clips_the_rest():
    torch.manual_seed(0)
    model = fl.localize(models.create("resnet20", width=4), "dgl", blocks=2, sample=torch.zeros(2, 3, 16, 16))
    twin = copy.deepcopy(model)
    clip = Clip(1e-4, "agc").bind(model)
    for m in (model, twin):
        m(torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.arange(4)).loss.backward()
    for block in model.blocks:
        clip(block.parameters())
    changed = {
        n for (n, p), q in zip(model.named_parameters(), twin.parameters()) if p.grad is not None
        and not torch.equal(p.grad, q.grad)
    }  # fmt: skip
    left = {n for n, p in model.named_parameters() if id(p) in clip._left_out}
    assert "backbone.layer1.0.conv1.weight" in changed and not changed & left
    assert len(changed) > 0.9 * (len(list(model.parameters())) - len(left))


def test_bind_of_the_other_modes_is_the_same_object():
    clip = Clip(1.0)
    model = fl.localize(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), "dgl", blocks=2, sample=torch.zeros(2, 4))
    assert clip.bind(model) is clip


def test_readout_takes_the_last_layer_of_that_size():
    a, b, c = nn.Linear(3, 3), nn.Linear(3, 3, bias=False), nn.LayerNorm(4)
    order = [*a.parameters(), *b.parameters(), *c.parameters()]
    assert [id(p) for p in readout(order, 3)] == [id(b.weight)]
    assert readout(order, 5) == []


def test_coerce():
    assert Clip.coerce(None) is None
    assert Clip.coerce(2) == Clip(2, "norm", "block")
    clip = Clip(0.5, "value", "global")
    assert Clip.coerce(clip) is clip
    assert repr(clip).startswith("Clip(value=0.5, mode='value', scope='global'")


@pytest.mark.parametrize("given", [True, "1.0", [1.0], torch.tensor(1.0)])
def test_coerce_refuses(given):
    with pytest.raises(ArgumentError, match=r"^clip: got"):
        Clip.coerce(given)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("value", (0,)),
        ("value", (-1.0,)),
        ("value", (float("nan"),)),
        ("value", (float("inf"),)),
        ("value", ("1",)),
        ("value", (True,)),
        ("mode", (1.0, "norms")),
        ("scope", (1.0, "norm", "all")),
    ],
)
def test_bad_values(name, args):
    with pytest.raises(ArgumentError, match=f"^{name}: got"):
        Clip(*args)


class Calls(TorchDispatchMode):
    """Names of the operators that were called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["norm", "value", "agc"])
def test_nothing_is_read_on_the_host_and_launches_do_not_grow_with_vectors(mode):
    counts = []
    for vectors in (1, 20):
        made = [nn.Parameter(torch.ones(4, 4)), *(nn.Parameter(torch.ones(4)) for _ in range(vectors))]
        for p in made:
            p.grad = torch.ones_like(p)
        with Calls() as calls:
            Clip(0.1, mode)(made)
        assert not {"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero"} & set(calls.names)
        counts.append(sum(name != "aten::view" for name in calls.names))
    assert counts[0] == counts[1]
