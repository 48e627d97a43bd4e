import copy

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import fastlocal as fl
from fastlocal import models
from fastlocal.errors import ArgumentError
from fastlocal.methods import StepContext
from fastlocal.methods.glcan import GLCAN
from tests.methods.sites import run_head, site, sites_of
from tests.methods.three_ways import in_bf16, never_waits, resumes, sgd, three_ways

NETS = {
    "resnet": lambda: models.ResNetCIFAR(1, width=4),
    "vit": lambda: models.vit_tiny(num_classes=10, img_size=8, patch_size=4, dim=16, depth=3, heads=2),
    "mlp": lambda: models.mlp(in_features=3 * 8 * 8, num_classes=10, hidden=[16, 16, 16]),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def data(count=3, rows=6):
    g = torch.Generator().manual_seed(1)
    return [
        (torch.randn(rows, 3, 8, 8, generator=g, dtype=torch.float64), torch.randint(10, (rows,), generator=g))
        for _ in range(count)
    ]


def localize(net="resnet", blocks=4, **options):
    return fl.localize(NETS[net](), "glcan", blocks=blocks, sample=torch.randn(2, 3, 8, 8), **options).double()


def test_units_are_aligned_uniformly_or_with_those_that_follow():
    net = models.resnet32()
    at = sites_of(net, torch.zeros(2, 3, 32, 32))
    method = GLCAN(depth=3)
    method.resolve(at)
    planes = [unit.conv1.out_channels for unit in list(method.head(at[0]).trunk)[:-1]]
    assert planes == [16, 32, 64]  # units 5, 10 and 15
    strides = [unit.conv1.stride[0] for unit in list(method.head(at[0]).trunk)[:-1]]
    assert strides == [1, 2, 2]
    middle = list(GLCAN(depth=3, bank="none").head(at[8]).trunk)[:-1]  # units 10, 13 and 15
    assert [(unit.conv1.out_channels, unit.conv1.stride[0]) for unit in middle] == [(32, 1), (64, 2), (64, 1)]
    follow = GLCAN(depth=3, align="next")
    follow.resolve(at)
    trunk = list(follow.head(at[0]).trunk)[:-1]
    assert [unit.conv1.out_channels for unit in trunk] == [16, 16, 16]
    late = GLCAN(depth=3, align="next")
    late.resolve(at)
    for k in range(13):
        late.head(at[k])
    assert len(late.head(at[13]).trunk) == 2 + 1  # two units are left, and the mean


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [16, 32, 48]),
        ({"bank": "none"}, [16, 16, 16]),
        ({"bank": "scores"}, [16, 26, 36]),
        ({"bank": "both"}, [16, 42, 68]),
        ({"bank_size": 1}, [16, 32, 32]),
        ({"bank_size": 2}, [16, 32, 48]),
        ({"bank_size": 0}, [16, 16, 16]),
    ],
)
def test_what_a_classifier_reads(options, expected):
    model = localize(**options)
    assert [head.readout[0].in_features for head in model.heads] == expected
    model.method.resolve([])  # another partition starts with an empty bank
    assert model.method._sizes == {}


def test_a_head_reads_exactly_what_the_blocks_before_it_left():
    model, (x, y) = localize(bank="both"), data(1)[0]
    ctx = StepContext(y, x, F.cross_entropy)
    h, features, scores = x, [], []
    for head, (_, fn) in zip(model.heads, model.backbone.units()):
        h = fn(h)
        own = head.trunk(h)
        earlier = [part.detach() for pair in zip(scores, features) for part in pair]
        logits = head.readout(torch.cat([own, *earlier], 1))
        local = head(h, ctx)
        torch.testing.assert_close(local.logits, logits)
        torch.testing.assert_close(local.loss, F.cross_entropy(logits, y))
        features.append(own)
        scores.append(logits)
    assert all(not entry.requires_grad for entry in ctx.cache["glcan bank"].values())


def by_hand(model, batches, bank):
    """Isolated blocks in plain PyTorch, with lists for the bank."""
    model = copy.deepcopy(model)
    net, heads = model.backbone, model.heads
    optimizer = sgd(model.parameters())
    cuts = [block.name for block in model.blocks[:-1]]
    found = []
    for x, y in batches:
        optimizer.zero_grad()
        h, losses, kept = x, [], []
        for name, fn in net.units():
            h = fn(h)
            if name in cuts:
                head = heads[len(losses)]
                features = h
                for unit in head.trunk:
                    features = unit(features)
                logits = F.linear(torch.cat([features, *kept], 1), head.readout[0].weight, head.readout[0].bias)
                kept = (
                    kept if bank == "none" else [*kept, (features if bank == "features" else logits).detach().clone()]
                )
                loss = F.cross_entropy(logits, y)
                loss.backward()
                losses.append(loss.detach())
                h = h.detach()
        loss = F.cross_entropy(net.readout(h), y)
        loss.backward()
        losses.append(loss.detach())
        optimizer.step()
        found.append(torch.stack(losses))
    return model, found


@pytest.mark.parametrize("bank", ["features", "scores", "none"])
@pytest.mark.parametrize("net", ["resnet", "vit"])
def test_every_way_equals_a_loop_written_by_hand(net, bank):
    model, batches = localize(net, 4 if net == "resnet" else 3, bank=bank), data()
    expected, losses = by_hand(model, batches, bank)
    spec, got = three_ways(model, batches)
    torch.testing.assert_close(got, losses, rtol=1e-11, atol=1e-12)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(spec.state_dict()[name], value, rtol=1e-10, atol=1e-11, msg=name)


def test_blocks_stay_isolated():
    """The loss of a later block changes nothing in an earlier one, although it reads its features."""
    model, (x, y) = localize(), data(1)[0]
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.heads[2].readout[0].weight.mul_(3)
    for net in (model, other):
        net(x, y).loss.backward()
    a, b = (dict(net.named_parameters()) for net in (model, other))
    assert not torch.equal(a["heads.2.readout.0.weight"].grad, b["heads.2.readout.0.weight"].grad)
    for k in (0, 1):
        for name, _ in model.blocks[k].named_parameters():
            assert torch.equal(a[name].grad, b[name].grad), name
    # and the bank is read: what block 0 found moves the loss of block 2
    with torch.no_grad():
        other.heads[2].readout[0].weight.div_(3)
        next(other.heads[0].parameters()).mul_(2)
    assert model(x, y).losses[2] != other(x, y).losses[2]


def test_resumes_and_plans():
    resumes(localize(), data(4))
    plan = fl.plan(localize(), data(1)[0])
    assert plan.peak_bytes > 0


def test_a_plan_may_run_one_head_alone():
    model = localize()
    with FakeTensorMode(allow_non_fake_inputs=True):
        h, y = torch.empty(6, 4, 8, 8, dtype=torch.float64), torch.empty(6, dtype=torch.int64)
        local = model.heads[1](h, StepContext(y, h, F.cross_entropy))
    assert local.logits.shape == (6, 10) and model.heads[1].reads


def test_tokens_and_vectors():
    model = localize("vit", 3)
    assert [type(m).__name__ for m in model.heads[0].trunk] == ["ViTBlock", "ViTBlock", "AvgPool"]
    at = site((16,), net=NETS["mlp"](), units=3)
    method = GLCAN(depth=1)
    method.resolve([at])
    local = run_head(method.head(at), at)
    assert set(local.terms) == {"task"} and local.logits.shape == (4, 5)


def test_a_head_out_of_order_is_refused():
    model, (x, y) = localize(), data(1)[0]
    h = model.backbone.units()[0][1](x)
    for _, fn in model.backbone.units()[1:2]:
        h = fn(h)
    with pytest.raises(ArgumentError, match=r"bank: the head of block 1 reads what that of block 0 leaves.*early_exit"):
        model.heads[1](h, StepContext(y, x, F.cross_entropy))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "depth: got 0; give an integer from 1"),
        ({"align": "stage"}, "align: got 'stage'. Valid: 'uniform', 'next'"),
        ({"bank": "maps"}, "bank: got 'maps'"),
        ({"bank_size": -1}, "bank_size: got -1; give an integer from 0"),
    ],
)
def test_bad_values(options, message):
    with pytest.raises(ArgumentError, match=message):
        GLCAN(**options)


def test_networks_that_it_cannot_take():
    with pytest.raises(ArgumentError, match="Linear has no make_unit"):
        GLCAN().head(site((8, 4, 4)))
    with pytest.raises(ArgumentError, match="one output per position"):
        GLCAN().head(site((6, 8), dense=True))


def test_on_an_accelerator_it_never_waits_and_in_bf16_it_is_much_the_same():
    in_bf16(localize(), *data(1)[0])
    never_waits(localize().float(), data(1)[0][0].float(), data(1)[0][1])
