import copy

import pytest
import torch
from torch import nn

import fastlocal as fl
from fastlocal import models
from fastlocal.blocks.heads import CascadeHead, NoHead
from fastlocal.blocks.losses import cross_entropy
from fastlocal.errors import ArgumentError
from fastlocal.methods import StepContext
from fastlocal.methods.mlaan import CHAINS, MLAAN
from tests.methods.sites import run_head, site, sites_of

IMAGE = torch.zeros(2, 3, 8, 8)


def unit_names(net):
    return [name for name, _ in net.units()]


def localized(net, blocks, sample=IMAGE, **options):
    torch.manual_seed(0)
    return fl.localize(net, "mlaan", blocks=blocks, sample=sample, **options)


def chain(net, blocks, unit, **options):
    """The names in the chain of a block that ends with ``unit``, of ``blocks`` that are one unit each after the first."""
    names = unit_names(net)
    where = site((1,), index=names.index(unit) - 1, blocks=blocks, unit=names.index(unit), units=len(names), net=net,
                 widths=net.widths, unit_names=tuple(names))  # fmt: skip
    of = {id(m): name for name, m in net.named_modules()}
    return [of[id(m)].removeprefix("layer") for m in MLAAN(**options).chain(where)]


@pytest.mark.parametrize(("key", "heads"), [(key, key[1] - 1) for key in CHAINS])
def test_there_is_a_published_chain_for_every_head(key, heads):
    assert sum(count for count, _ in CHAINS[key]) == heads
    assert {len(text.split()) for _, text in CHAINS[key]} <= {1, 2, 3, 4, 5}


@pytest.mark.parametrize(
    ("net", "blocks", "unit", "expected"),
    [
        (models.resnet32, 15, "layer1.0", "2.0 3.0 3.2 3.4"),
        (models.resnet32, 15, "layer1.2", "2.0 3.0 3.3 3.4"),
        (models.resnet32, 15, "layer2.4", "3.0 3.2 3.3 3.4"),
        (models.resnet32, 15, "layer3.1", "3.2 3.3 3.4"),
        (models.resnet32, 15, "layer3.3", "3.4"),
        (models.resnet110, 54, "layer2.17", "3.0 3.3 3.4 3.17"),
        (models.resnet110, 54, "layer3.13", "3.16 3.17"),
        (models.resnet34, 16, "layer2.0", "2.1 3.0 4.0 4.2"),
        (models.resnet34, 16, "layer4.0", "4.1 4.1 4.2"),
        (models.resnet101, 33, "layer3.22", "4.0 4.1"),
        (models.resnet101, 33, "layer4.1", "4.1 4.2"),
        (models.resnet20, 9, "layer1.1", "2.0 3.0 3.2"),
        (models.resnet20, 9, "layer2.2", "3.0 3.2"),
        (models.resnet20, 9, "layer3.0", "3.1 3.2"),
        (models.resnet20, 9, "layer3.1", "3.2"),
    ],
)
def test_chains(net, blocks, unit, expected):
    with torch.device("meta"):
        net = net()
    assert chain(net, blocks, unit) == expected.split()


def test_heads():
    net = models.resnet20(width=4)
    names = unit_names(net)
    for where in sites_of(net, IMAGE, 10)[3:]:
        where = copy.copy(where)
        object.__setattr__(where, "unit_names", tuple(names))
        torch.manual_seed(0)
        head = MLAAN(wx=0.25, wy=0.5).head(where)
        first = head.shared.net[0]
        assert all(p.requires_grad for p in first.lb.parameters()) and not any(
            p.requires_grad for p in first.ema.parameters()
        )
        h = torch.rand(4, *where.shape).requires_grad_()
        ctx = StepContext(target=torch.tensor([0, 1, 2, 3]), input=None, criterion=cross_entropy)
        local = head(h, ctx)
        local.loss.backward()
        assert {name: weight for name, (_, weight) in local.terms.items()} == {"own.task": 0.25, "task": 0.5}
        value = sum(float(v) * w for v, w in local.terms.values())
        assert local.loss.item() == pytest.approx(value)
        assert h.grad.abs().sum() > 0
        # the copies start as the units are
        source = MLAAN().chain(where)[0]
        for copied in (first.lb, first.ema):
            assert all(torch.equal(a, b) for a, b in zip(copied.parameters(), source.parameters()))
        # the first unit is there twice, and the chain goes on with trained copies
        x = torch.rand(2, *where.shape)
        head.eval()
        expected = first.lb(x) + first.ema(x)
        for unit in head.shared.net[1:-2]:
            expected = unit(expected)
        expected = head.shared.net[-1](expected.mean((2, 3)))
        assert torch.allclose(head.shared.net(x), expected, atol=1e-5)
        assert torch.allclose(head.own.net(x), head.own.net[-1](x.mean((2, 3))), atol=1e-5)


def test_blocks_before_the_first_window_have_no_head():
    two, three = localized(models.resnet20(width=4), 10), localized(models.resnet20(width=4), 10, form="imagenet")
    assert [isinstance(head, NoHead) for head in two.heads][:3] == [True, False, False]
    assert [isinstance(head, NoHead) for head in three.heads][:3] == [True, True, False]
    assert (two.window, three.window) == (2, 3)


def test_the_imagenet_form_has_two_convolutions_on_narrow_maps():
    net = models.resnet20(width=4)
    where = next(s for s in sites_of(net, IMAGE, 10) if s.name == "layer2.1")
    object.__setattr__(where, "unit_names", tuple(unit_names(net)))
    head = MLAAN(form="imagenet").head(where)
    assert [m.out_channels for m in head.own.net if isinstance(m, nn.Conv2d)] == [16, 8]
    assert not [m for m in MLAAN().head(where).own.net if isinstance(m, nn.Conv2d)]


@pytest.mark.parametrize(
    ("options", "moved", "decay"),
    [
        ({}, range(1, 8), 0.9),
        ({"mode": "official"}, [7], 0.9),
        ({"form": "imagenet"}, range(2, 8), 0.9),
        ({"mode": "official", "form": "imagenet"}, range(2, 8), 0.9),
    ],
)
def test_averages(options, moved, decay):
    """After a step, with the weights from before it."""
    model = localized(models.resnet20(width=4), 10, momentum=decay, **options)
    fusions = {k: head.shared.net[0] for k, head in enumerate(model.heads) if isinstance(head, CascadeHead)}
    torch.manual_seed(1)
    with torch.no_grad():  # away from where they start
        for fusion in fusions.values():
            for p in fusion.ema.parameters():
                p.add_(torch.randn_like(p))
    before = copy.deepcopy(model)
    engine = fl.Engine(model, lambda named: torch.optim.SGD([p for _, p in named], lr=0.1))
    engine.step(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]))
    sources = {link.block: link.sources for link in before.links}
    assert set(sources) == set(moved)
    for k, fusion in fusions.items():
        old = list(before.heads[k].shared.net[0].ema.parameters())
        weight = decay**2 if k == 7 and options == {"mode": "official", "form": "imagenet"} else decay
        for j, (p, past) in enumerate(zip(fusion.ema.parameters(), old)):
            expected = weight * past + (1 - weight) * sources[k][j].value if k in sources else past
            assert torch.allclose(p, expected, atol=1e-6)
        assert all(p.grad is None for p in fusion.ema.parameters())


def test_official_copies_of_the_imagenet_form_are_drawn_anew():
    model = localized(models.resnet20(width=4), 10, mode="official", form="imagenet")
    fusion = model.heads[3].shared.net[0]
    source = model.backbone.layer2[0]
    assert not torch.equal(fusion.lb.conv1.weight, source.conv1.weight)
    assert not torch.equal(fusion.lb.conv1.weight, fusion.ema.conv1.weight)


@pytest.mark.parametrize(
    ("mode", "form", "expected"),
    [("paper", "cifar", (1.0, 0.999)), ("official", "cifar", (1, 1)), ("official", "imagenet", (1.0, 0.999))],
)
def test_the_last_loss(mode, form, expected):
    method = MLAAN(mode, form=form)
    assert (method.final_weight, method.final_share) == expected


def test_vectors_tokens_and_other_widths():
    torch.manual_seed(0)
    vectors = localized(models.mlp(in_features=6, hidden=(8, 8, 8, 8)), 4, sample=torch.zeros(2, 6))
    assert len(vectors.blocks) == 3
    vectors(torch.rand(4, 6), torch.tensor([0, 1, 2, 3])).loss.backward()
    tokens = localized(models.vit_tiny(img_size=8, patch_size=4, dim=8, depth=4, heads=2), 5)
    out = tokens(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]))
    out.loss.backward()
    assert out.losses.isfinite().all() and len(tokens.heads[1].shared.net) == 3
    run = site((4,), index=1, unit_names=("a", "b", "c"))
    with pytest.raises(ArgumentError, match=r"'mlaan' copies units of the network.*or use method='dgl'"):
        run_head(MLAAN().head(run), run)


def test_refusals():
    for options, message in (
        ({"momentum": 1.5}, "momentum: got 1.5"),
        ({"form": "svhn"}, "form: got 'svhn'"),
        ({"window": 1}, "window: got 1"),
        ({"wy": 0}, "wy: 0 leaves no loss"),
        ({"wx": "a"}, "wx: got 'a'"),
    ):
        with pytest.raises(ArgumentError, match=message):
            MLAAN(**options)
    with pytest.raises(ArgumentError, match="classify whole images"):
        MLAAN().head(site((4, 8, 8), index=1, dense=True))
