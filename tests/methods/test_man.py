import copy

import pytest
import torch
from torch import nn

import fastlocal as fl
from fastlocal import models
from fastlocal.blocks.losses import cross_entropy
from fastlocal.blocks.man import Fusion, classifier_net_deep, decoder_net_deep, shape_after
from fastlocal.blocks.measure import LaunchCounter
from fastlocal.errors import ArgumentError
from fastlocal.methods import StepContext
from fastlocal.methods.man import MAN
from fastlocal.models.residual import BasicBlock
from fastlocal.ops._dispatch import as_on_gpu
from tests.methods.sites import run_head, site
from tests.methods.three_ways import three_ways


def unit_names(net):
    return [name for name, _ in net.units()]


def cut_names(method, net, blocks):
    """The names after which ``blocks`` asked for cut."""
    names = unit_names(net)
    cuts = method.cuts(method.prepare(blocks, len(names)), names, net)
    return None if cuts is None else [names[c] for c in cuts]


def small(seed=0, **options):
    torch.manual_seed(seed)
    return models.ResNetCIFAR(2, width=4, num_classes=5, **options).double()


def batch(seed=0, rows=6, size=16, classes=5):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(rows, 3, size, size, generator=g, dtype=torch.float64)
    return x, torch.randint(0, classes, (rows,), generator=g)


def local(method="man", blocks=4, **options):
    return fl.localize(small(), method, blocks=blocks, sample=batch()[0][:2], **options)


ALL = {
    name: [f"layer{stage}.{k}" for stage in (1, 2, 3) for k in range(depth)]
    for name, depth in (("resnet32", 5), ("resnet110", 18))
}


@pytest.mark.parametrize(
    ("net", "blocks", "options", "expected"),
    [
        ("resnet32", 2, {}, ["layer2.1"]),
        ("resnet32", 8, {}, ["layer1.0", "layer1.2", "layer1.4", "layer2.1", "layer2.3", "layer3.0", "layer3.2"]),
        ("resnet32", 16, {}, ALL["resnet32"][:-1]),
        ("resnet32", 15, {}, ALL["resnet32"][:-1]),
        ("resnet110", 3, {}, ["layer1.17", "layer2.17"]),
        ("resnet110", 2, {"balanced_memory": True}, ["layer1.14"]),
        ("resnet110", 3, {"balanced_memory": True, "dataset": "stl10"}, ["layer1.8", "layer2.1"]),
        ("resnet110", 55, {}, ALL["resnet110"][:-1]),
        ("resnet20", 4, {}, None),
        ("resnet101", 2, {"form": "imagenet"}, ["layer2.0"]),
        ("resnext101_32x8d", 2, {"form": "imagenet"}, ["layer2.0"]),
        ("resnet152", 2, {"form": "imagenet"}, ["layer2.5"]),
        ("resnet101", 4, {"form": "imagenet"}, ["layer2.2", "layer3.8", "layer3.16"]),
        ("resnet152", 4, {"form": "imagenet"}, ["layer2.6", "layer3.13", "layer3.25"]),
    ],
)
def test_published_cuts(net, blocks, options, expected):
    with torch.device("meta"):
        net = models.create(net)
    assert cut_names(MAN(**options), net, blocks) == expected


def test_32_blocks_of_resnet110():
    with torch.device("meta"):
        net = models.resnet110()
    cuts = cut_names(MAN(), net, 32)
    assert len(cuts) == 31 and cuts == [n for n in ALL["resnet110"] if n in cuts]
    left = [int(n[7:]) for n in ALL["resnet110"] if n not in cuts]
    assert left == [0, 3, 6, 8, 10, 12, 15, *(0, 3, 6, 8, 10, 12, 15), *(0, 2, 5, 8, 10, 12, 14, 16, 17)]


def test_unpublished_balanced_cuts_are_refused():
    with torch.device("meta"):
        net = models.resnet110()
    with pytest.raises(ArgumentError, match=r"balanced_memory: no published cuts.*pass blocks=\[names"):
        cut_names(MAN(balanced_memory=True), net, 5)


def test_the_stem_joins_the_first_block():
    model = local(blocks=7, head="dgl")  # of 7 units
    assert [block.units for block in model.blocks][:2] == [("stem", "layer1.0"), ("layer1.1",)]
    assert len(model.blocks) == 6 and len(local(blocks=3).blocks) == 3


@pytest.mark.parametrize(
    ("options", "k", "unit", "expected"),
    [
        # (5, 0.5) to (0, 0), by stage / (K - 2); the site is the unit before the cut
        ({"mode": "official"}, 16, 1, (5 * 13 / 14, 0.5 * 13 / 14)),
        ({"mode": "official"}, 16, 5, (5 * 12 / 14, 0.5 * 12 / 14)),
        ({"mode": "official"}, 16, 14, (5 * 11 / 14, 0.5 * 11 / 14)),
        ({"mode": "official"}, 2, 7, (5, 0.5)),
        ({"mode": "official"}, 3, 5, (-5, -0.5)),
        ({"mode": "official"}, 4, 7, (0, 0)),
        ({"mode": "official", "lam": (4, 0, 0, 2)}, 8, 10, (2, 1)),
        ({"mode": "official", "form": "imagenet", "lam": (1, 2)}, 4, 7, (5, 0.75)),
        ({}, 16, 1, (5, 0.5)),
        ({}, 16, 14, (5, 0.5)),
        ({"lam": (5, 0.5, 0, 2)}, 16, 1, (5, 0.5)),
        ({"lam": (5, 0.5, 0, 2)}, 16, 14, (0, 2)),
        ({"lam": (13, 0, 0, 13)}, 16, 6, (8, 5)),
        ({"form": "imagenet"}, 2, 7, (5, 0.75)),
        ({"form": "imagenet", "lam": (1, 2)}, 2, 7, (1, 2)),
    ],
)
def test_loss_weights(options, k, unit, expected):
    method = MAN(**options)
    blocks = 15 if k == 16 else k
    where = site((16, 8, 8), index=unit - 1, blocks=blocks, unit=unit, units=16, widths=[16] * 6 + [32] * 5 + [64] * 5)
    method.resolve([site((16, 8, 8), index=0, blocks=blocks, unit=1, units=16)])
    assert method.weights(where) == pytest.approx(expected)


def test_official_mode_trains_with_weights_of_zero_and_below_it_the_paper_leaves_them_out():
    head = local(blocks=["layer1.0", "layer2.0", "layer3.0"], mode="official").heads[1].head
    assert head.weights == (0.0, 0.0) and head.decoder is not None and head.classifier is not None
    head = local(blocks=3, lam=(0, 1)).heads[0].head
    assert head.decoder is None and head.classifier is not None
    with pytest.raises(ArgumentError, match=r"lam: both weights of block 1 are 0.*give one above 0"):
        local(blocks=3, lam=(5, 0.5, 0, 0))
    with pytest.raises(ArgumentError, match=r"mode: official weights go by the number of the stage.*mode='paper'"):
        method = MAN("official")
        method.resolve([site((4, 8, 8), blocks=4, units=9)])
        method.weights(site((4, 8, 8), blocks=4, units=9))


def test_copies_start_as_the_unit_on_paper_and_anew_officially():
    net = small()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.25)  # as if trained: norms too
    net.layer1[1].conv1.weight.grad = torch.ones_like(net.layer1[1].conv1.weight)
    net.layer1[1].requires_grad_(False)
    unit = {n: t.clone() for n, t in net.layer1[1].state_dict().items()}
    for mode in ("paper", "official"):
        model = fl.localize(copy.deepcopy(net), "man", blocks=["layer1.0"], sample=batch()[0][:2], mode=mode)
        fusion = model.heads[0].fusion
        for half, trained in ((fusion.lb, True), (fusion.ema, False)):
            assert all(p.requires_grad is trained and p.grad is None for p in half.parameters())
            for name, value in half.state_dict().items():
                if mode == "paper" or "running" in name or "tracked" in name:
                    assert torch.equal(value, unit[name]), name
                elif "bn" in name:
                    assert torch.equal(value, torch.full_like(value, float("weight" in name))), name
                else:
                    assert not torch.isclose(value, unit[name]).any(), name
        assert fusion.scale is None
        assert torch.equal(fusion.lb.conv1.weight, fusion.ema.conv1.weight) is (mode == "paper")
        assert fusion.lb.conv1.weight.data_ptr() != fusion.ema.conv1.weight.data_ptr()


def test_output_and_gradients_are_those_of_two_units():
    torch.manual_seed(0)
    net = small()
    fusion = Fusion(net.layer2[0], fresh=True, scaled=False)
    one, two = copy.deepcopy(fusion.lb), copy.deepcopy(fusion.ema).requires_grad_()
    x = torch.rand(4, 4, 8, 8, dtype=torch.float64).requires_grad_()
    z = x.detach().clone().requires_grad_()
    y, expected = fusion(x), one(z) + two(z)
    assert torch.equal(y, expected)
    g = torch.rand_like(y)
    y.backward(g)
    expected.backward(g)
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-12, atol=1e-12)
    for p, q in zip(fusion.lb.parameters(), one.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)
    assert all(p.grad is None for p in fusion.ema.parameters())
    # Batch statistics, kept by each for itself.
    for p, q in zip((*fusion.lb.buffers(), *fusion.ema.buffers()), (*one.buffers(), *two.buffers())):
        assert torch.equal(p, q)
    assert int(fusion.ema.bn1.num_batches_tracked) == 1 and not torch.equal(
        fusion.ema.bn2.running_mean, fusion.lb.bn2.running_mean
    )


def test_the_averaged_half_takes_no_weight_gradient():
    """Counted: one convolution backward for each of its convolutions; a trained one whose input is not stored takes two."""
    torch.manual_seed(0)
    x = torch.rand(4, 8, 8, 8)
    for trained, expected in ((True, {"conv": 4, "weights": 3}), (False, {"conv": 3, "weights": 0})):
        unit = BasicBlock(8, 16, 2).requires_grad_(trained)
        wanted = []

        class Counter(LaunchCounter):
            def _record(self, func, args, kwargs, out):
                super()._record(func, args, kwargs, out)
                if "convolution_backward" in func.name():
                    wanted.append(args[-1][1])  # noqa: B023

        with as_on_gpu():
            z = x.clone().requires_grad_()
            y = unit(z)
            with Counter() as counter:
                y.backward(torch.ones_like(y))
        assert counter.by_op["aten::convolution_backward"] == expected["conv"] and sum(wanted) == expected["weights"]
        assert z.grad is not None


@pytest.mark.parametrize("when", ["after_backward", "between_forward_and_backward"])
def test_averages_move_by_the_formula_at_their_point(when):
    model = local(blocks=3, momentum=0.75, when=when, head="dgl", mode="official")
    start = copy.deepcopy(model)
    x, y = batch()
    engine = fl.Engine(model, lambda named: torch.optim.SGD(named, lr=0.1), backend="reference", update="immediate")
    engine.step(x, y)
    sources = [start.blocks[k + 1].units[0] for k in range(2)]
    for k, source in enumerate(sources):
        unit = start.backbone.get_submodule(source)  # as it was before the step's updates
        before, after = start.heads[k].fusion.ema, model.heads[k].fusion.ema
        for p, theta, q in zip(before.parameters(), unit.parameters(), after.parameters(), strict=True):
            torch.testing.assert_close(q, 0.75 * p + 0.25 * theta, rtol=1e-12, atol=1e-12)
        assert not torch.equal(after.bn1.running_mean, model.backbone.get_submodule(source).bn1.running_mean)

    # The gradient that reached block 0 went through the averages of before, or of after their move.
    h = start.blocks[0](x)
    loss = start.heads[0](h, StepContext(target=y, input=x, criterion=cross_entropy)).loss
    if when == "between_forward_and_backward":
        for p, q in zip(start.heads[0].fusion.ema.parameters(), model.heads[0].fusion.ema.parameters()):
            p.data = q.data
    loss.backward()
    conv = start.backbone.conv1.weight
    torch.testing.assert_close(model.backbone.conv1.weight, conv - 0.1 * conv.grad, rtol=1e-10, atol=1e-12)


def test_between_and_after_are_not_the_same():
    x, y = batch()
    trained = []
    for when in ("after_backward", "between_forward_and_backward"):
        torch.manual_seed(1)
        model = local(blocks=3, momentum=0.25, when=when, head="dgl", mode="official")
        fl.Engine(model, lambda named: torch.optim.SGD(named, lr=0.1)).step(x, y)
        trained.append(model.backbone.conv1.weight.detach())
    assert not torch.allclose(*trained, rtol=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"head": "dgl", "when": "between_forward_and_backward"}, {"loss": "contrast", "mode": "official"}]
)
def test_reference_and_both_levels_are_equal(options):
    three_ways(local(blocks=["layer1.0", "layer2.0"], momentum=0.5, **options), [batch(k) for k in range(2)])


def test_heads_are_those_of_the_next_unit():
    torch.manual_seed(0)
    model = local(blocks=7, config="1c3f", feature_dim=24)
    shapes = []
    for head in model.heads:
        convs = [m for m in head.head.classifier if isinstance(m, nn.Conv2d)]
        shapes.append(
            (convs[0].in_channels, convs[0].out_channels, convs[0].stride[0], head.head.decoder[1].in_channels)
        )
    # after layer1.0, layer1.1 | layer2.0, layer2.1 | layer3.0
    widths = [(4, 8, 2), (8, 16, 2), (8, 16, 2), (16, 16, 1), (16, 16, 1)]
    assert [s[:3] for s in shapes] == widths
    linears = [m.out_features for m in model.heads[0].head.classifier if isinstance(m, nn.Linear)]
    assert linears == [24, 24, 5]
    assert model.heads[1].fusion.lb.downsample is not None  # layer2.0


def test_default_heads():
    torch.manual_seed(0)
    model = local(blocks=3)
    head = model.heads[0].head
    assert sum(isinstance(m, nn.Conv2d) for m in head.classifier) == 2 and not head.contrast
    assert head.weights == (5.0, 0.5) and head.mean.flatten().tolist()[0] == pytest.approx(125.3 / 255)
    dgl = local(blocks=3, head="dgl", feature_dim=12).heads[0].head.net
    assert [m.out_features for m in dgl if isinstance(m, nn.Linear)] == [48, 48, 48, 5]
    grey = local(blocks=3, dataset="svhn", mean=(0.1, 0.2, 0.3)).heads[0].head
    assert grey.std.flatten().tolist() == [0.5] * 3 and grey.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])


def test_deep_imagenet_heads():
    """The sizes that the repository gives maps of 1024 channels; an image of 32 is cut to 4, 8, 16 as 224 to 28, 56, 112."""
    torch.manual_seed(0)
    decoder, classifier = decoder_net_deep(1024, (3, 32, 32)), classifier_net_deep(1024, 7)
    shapes = [tuple(p.shape) for p in decoder.parameters() if p.dim() == 4]
    assert shapes == [(192, 1024, 1, 1), (64, 192, 1, 1), (32, 64, 3, 3), (12, 32, 3, 3), (3, 12, 3, 3)]
    sizes = [m.size for m in decoder if hasattr(m, "size")]
    assert sizes == [(4, 4), (8, 8), (16, 16), (32, 32)]
    shapes = [(*p.shape[:2], m.stride[0]) for m in classifier if isinstance(m, nn.Conv2d) for p in [m.weight]]
    assert shapes == [(256, 1024, 1), (256, 256, 2), (512, 256, 2), (2048, 512, 1)]
    x = torch.rand(2, 1024, 2, 2)
    assert decoder(x).shape == (2, 3, 32, 32) and classifier(x).shape == (2, 7)
    method = MAN(form="imagenet")
    for channels, first in ((512, 128), (1024, 256)):
        assert method.classifier(site((channels, 2, 2)))[0].out_channels == first
        assert method.decoder(channels, (3, 32, 32))[0].out_channels == {128: 128, 256: 192}[first]


def test_imagenet_form():
    torch.manual_seed(0)
    net = models.ResNet(models.residual.Bottleneck, [1, 1, 1, 1], width=8, num_classes=5)
    model = fl.localize(net, "man", blocks=["layer1.0"], sample=torch.rand(2, 3, 64, 64), form="imagenet")
    head = model.heads[0].head
    assert head.weights == (5.0, 0.75) and head.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert head.decoder[0].in_channels == 64 and head.classifier[-1].out_features == 5


def test_a_plan_needs_no_real_step():
    model = local(blocks=7, head="dgl")
    x, y = batch()
    plan = fl.plan(model, (x, y), rows=8, device="h100")
    assert plan.launches > 0


def test_any_sequential_of_units():
    """Units that declare no widths; the head says by the map's size whether to double."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3), *(BasicBlock(6, 6) for _ in range(3)), nn.Sequential(nn.Flatten(), nn.Linear(6 * 36, 4))
    )
    x, y = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
    model = fl.localize(net, "man", blocks=["1", "2"], sample=x, mean=[0.5], std=[0.2])
    engine = fl.Engine(model, lambda named: torch.optim.SGD(named, lr=0.1))
    assert engine.step(x, y).losses.isfinite().all()
    head = model.heads[0]
    run_head(copy.deepcopy(head.head), site((6, 6, 6), input_shape=(1, 8, 8), num_classes=4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 1.5}, "momentum: got 1.5"),
        ({"head": "dg"}, "head: got 'dg'"),
        ({"when": "later"}, "when: got 'later'"),
        ({"config": "3c3f"}, "config: got '3c3f'"),
        ({"loss": "ce"}, "loss: got 'ce'"),
        ({"form": "vit"}, "form: got 'vit'"),
        ({"dataset": "mnist"}, "dataset: got 'mnist'"),
        ({"lam": (1, 2, 3)}, "lam: got .*give 2 or 4 numbers"),
        ({"lam": (1, -2)}, "lam: got .*at least 0"),
        ({"lam": (1, 2), "head": "dgl"}, "lam: got .*head='dgl' has one loss"),
        ({"std": (0, 1, 1)}, "std: got .*positive"),
        ({"mean": "grey"}, "mean: got 'grey'"),
        ({"widen": 0}, "widen: got 0"),
        ({"feature_dim": 1.5}, "feature_dim: got 1.5"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ArgumentError, match=message):
        MAN(**options)


def test_networks_that_do_not_fit_are_refused():
    torch.manual_seed(0)
    vit = models.ViT(img_size=8, patch_size=4, dim=8, depth=4, heads=2, num_classes=5)
    with pytest.raises(ArgumentError, match=r"the heads of 'man' are for feature maps.*use method='dgl' or 'auglocal'"):
        fl.localize(vit, "man", blocks=2, sample=torch.rand(2, 3, 8, 8))
    with pytest.raises(ArgumentError, match=r"mean, std: the image has 1 channels"):
        net = models.ResNetCIFAR(1, width=4, in_channels=1)
        fl.localize(net, "man", blocks=3, sample=torch.rand(2, 1, 16, 16))
    # A unit of a Sequential is called as its last member.
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    with pytest.raises(ArgumentError, match=r"copy the unit after a cut, and ReLU has no parameters; make.*one module"):
        fl.localize(net, "man", blocks=["0"], sample=torch.rand(2, 3, 8, 8))
    with pytest.raises(ArgumentError, match=r"copy the unit after a cut, and Bilinear does not run"):
        shape_after(nn.Bilinear(4, 4, 4), (4,))
