import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import fastlocal as fl
from fastlocal import models
from fastlocal.blocks.losses import cross_entropy
from fastlocal.blocks.man import Fusion
from fastlocal.errors import ArgumentError
from fastlocal.methods import StepContext
from fastlocal.methods.man_plus_plus import MANPlusPlus
from fastlocal.models.residual import BasicBlock
from fastlocal.ops._dispatch import as_on_gpu
from tests.methods.sites import site
from tests.methods.test_man import ALL, batch, cut_names, local, unit_names
from tests.methods.three_ways import three_ways


def transformer(depth=8, **options):
    torch.manual_seed(0)
    net = models.ViT(img_size=8, patch_size=4, dim=12, heads=2, depth=depth, num_classes=5, **options).double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return net


def pp(blocks=4, **options):
    return local("man_plus_plus", blocks, **options)


def on_tokens(blocks=4, **options):
    return fl.localize(transformer(), "man_plus_plus", blocks=blocks, sample=batch(size=8)[0][:2], **options)


@pytest.mark.parametrize(
    ("net", "blocks", "options", "expected"),
    [
        ("resnet32", 2, {}, ["stem", "layer2.1"]),
        ("resnet32", 4, {}, ["stem", "layer1.2", "layer2.1", "layer3.0"]),
        ("resnet32", 16, {}, ["stem", *ALL["resnet32"][:-1]]),
        ("resnet110", 3, {"balanced_memory": True}, ["stem", "layer1.9", "layer2.2"]),
        ("resnet110", 55, {}, ["stem", *ALL["resnet110"][:-1]]),
        ("resnet20", 4, {}, None),
        ("resnet20", 10, {}, ["stem", *(f"layer{s}.{k}" for s in (1, 2, 3) for k in range(3))][:-1]),
        ("resnet101", 2, {"form": "imagenet"}, ["layer2.0"]),
        ("resnet152", 4, {"form": "imagenet"}, ["layer2.6", "layer3.13", "layer3.25"]),
        ("resnext101_32x8d", 4, {"form": "imagenet"}, ["layer2.2", "layer3.8", "layer3.16"]),
        ("vit_tiny", 4, {}, ["blocks.2", "blocks.5", "blocks.8"]),
        ("vit_tiny", 2, {}, ["blocks.5"]),
        ("vit_tiny", 5, {}, None),
    ],
)
def test_published_cuts(net, blocks, options, expected):
    with torch.device("meta"):
        net = models.create(net)
    assert cut_names(MANPlusPlus(**options), net, blocks) == expected


def test_the_stem_is_a_block_besides_the_official_8_and_32():
    with torch.device("meta"):
        assert len(cut_names(MANPlusPlus(), models.resnet32(), 8)) == 8
        cuts = cut_names(MANPlusPlus(), models.resnet110(), 32)
    assert len(cuts) == 32 and cuts[:3] == ["stem", "layer1.1", "layer1.2"]


@pytest.mark.parametrize(
    ("k", "blocks", "units", "expected"), [(16, 16, 16, 14), (8, 9, 16, 6), (55, 55, 55, 53), (32, 33, 55, 30)]
)
def test_official_weights_go_by_the_stage_and_the_published_k(k, blocks, units, expected):
    method = MANPlusPlus("official")
    third = (units - 1) // 3
    widths = [16] * (third + 1) + [32] * third + [64] * third
    method.resolve([site((16, 8, 8), blocks=blocks, unit=0, units=units)])
    assert method.k == k
    for unit, stage in ((0, 0), (1, 1), (third, 2), (units - 2, 3)):
        where = site((16, 8, 8), index=unit, blocks=blocks, unit=unit, units=units, widths=widths)
        assert method.weights(where) == pytest.approx((5 * (1 - stage / expected), 0.5 * (1 - stage / expected)))


def test_the_head_on_the_stem():
    """Official: contrastive and 1c2f, whatever the options say."""
    for mode, convs, contrast in (("official", 1, True), ("paper", 2, False)):
        model = pp(["stem", "layer1.0"], mode=mode, feature_dim=24)
        first, second = (head.head for head in model.heads)
        assert first.contrast is contrast and not second.contrast
        assert sum(isinstance(m, nn.Conv2d) for m in first.classifier) == convs
        assert sum(isinstance(m, nn.Conv2d) for m in second.classifier) == 2
        assert first.classifier[-1].out_features == (24 if contrast else 5)
        assert first.weights == (5.0, 0.5)
        fusion = model.heads[0].fusion
        assert fusion.lb.conv1.weight.shape == model.backbone.layer1[0].conv1.weight.shape
    model = pp(["layer1.0"], mode="official")
    assert not model.heads[0].head.contrast


def test_scale():
    torch.manual_seed(0)
    fusion = Fusion(models.ResNetCIFAR(2, width=4).layer2[0], fresh=True, scaled=True).double()
    assert fusion.scale.item() == 1 and fusion.scale.shape == () and fusion.scale.requires_grad
    one, two = copy.deepcopy(fusion.lb), copy.deepcopy(fusion.ema)
    x = torch.rand(4, 4, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        fusion.scale.fill_(0.3)
    torch.testing.assert_close(fusion(x), 0.3 * one(x) + 1.7 * two(x), rtol=1e-14, atol=1e-14)


def test_scaled_sum_of_a_gpu_equals_the_formula():
    torch.manual_seed(0)
    fusion = Fusion(BasicBlock(4, 8, 2), fresh=True, scaled=True).double()
    with torch.no_grad():
        fusion.scale.fill_(0.3)
    results = []
    for on_gpu in (False, True):
        own = copy.deepcopy(fusion)
        x = torch.rand(4, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with as_on_gpu() if on_gpu else nullcontext():
            y = own(x)
            (y * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)).sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in own.parameters() if p.requires_grad)])
        assert all(p.grad is None for p in own.ema.parameters())
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("options", [{"mode": "official"}, {"head": "dgl", "when": "between_forward_and_backward"}])
def test_steps_with_the_operators_of_a_gpu_are_equal(options):
    """What they saved for backward is the averages' new value where these move before it."""
    model = pp(["stem", "layer1.1", "layer2.0"], momentum=0.5, **options)
    trained = []
    for context in (nullcontext, as_on_gpu):
        net = copy.deepcopy(model)
        engine = fl.Engine(net, lambda named: torch.optim.SGD(named, lr=0.05, momentum=0.9))
        with context():
            for k in range(2):
                engine.step(*batch(k))
        trained.append(net.state_dict())
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("options", [{"mode": "official"}, {"head": "dgl"}])
def test_reference_and_both_levels_are_equal(options):
    model = pp(["stem", "layer1.1", "layer2.0"], momentum=0.5, **options)
    trained, _ = three_ways(model, [batch(k) for k in range(2)])
    assert all(head.fusion.scale.item() != 1 for head in trained.heads)


@pytest.mark.parametrize("mode", ["paper", "official"])
def test_transformers_in_three_ways(mode):
    model = on_tokens(momentum=0.5, mode=mode)
    assert [len(block.units) for block in model.blocks] == [3, 2, 2, 2]
    trained, losses = three_ways(model, [batch(k, size=8) for k in range(2)])
    assert torch.stack(losses).isfinite().all()
    for name, p in trained.named_parameters():
        moved = not torch.equal(p, dict(model.named_parameters())[name])
        assert moved or ".ema." in name, name


def test_parts_of_a_transformers_head():
    for mode in ("paper", "official"):
        model = on_tokens(blocks=2, mode=mode)
        head, blocks = model.heads[0], model.backbone.blocks
        second, readout = head.head.net
        for copied, unit in ((head.fusion.lb, blocks[4]), (head.fusion.ema, blocks[4]), (second, blocks[5])):
            same = [torch.equal(p, q) for p, q in zip(copied.parameters(), unit.parameters(), strict=True)]
            assert all(same) if mode == "paper" else not any(same)
            if mode == "official":
                assert not copied.attn.qkv.bias.any() and copied.attn.qkv.weight.std() < 0.025
        assert all(p.requires_grad for p in second.parameters())
        assert isinstance(readout[0], nn.LayerNorm) and readout[0].eps == 1e-6
        assert readout[1].pool == "cls" and readout[2].out_features == 5
        assert {"task"} == set(head(torch.rand(2, 5, 12, dtype=torch.float64), _context(2)).terms)


def _context(rows):
    return StepContext(target=torch.zeros(rows, dtype=torch.int64), input=None, criterion=cross_entropy)


def test_when_the_averages_move():
    def points(model):
        return {link.when for link in model.links}

    assert points(pp(3)) == points(pp(3, mode="official")) == points(on_tokens()) == {"after_backward"}
    assert points(on_tokens(mode="official")) == {"between_forward_and_backward"}
    assert points(on_tokens(mode="official", when="after_backward")) == {"after_backward"}
    method = MANPlusPlus("official", form="imagenet")
    assert method.update_point(site((4, 8, 8))) == "between_forward_and_backward"
    model = pp(3)
    assert [link.block for link in model.links] == [0, 1] and {link.decay for link in model.links} == {0.995}


def test_too_few_units_for_a_transformers_head():
    names = unit_names(transformer())
    with pytest.raises(ArgumentError, match=r"copies two units after each cut, but after 'blocks.6' there is one"):
        on_tokens(blocks=[names[7]])


def test_tokens_without_a_readout_are_refused():
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(8, 2, 8, batch_first=True, dropout=0.0) for _ in range(4)]
    net = nn.Sequential(*layers, nn.Linear(8, 5))
    with pytest.raises(ArgumentError, match=r"'man_plus_plus' on tokens needs Sequential.make_readout"):
        fl.localize(net, "man_plus_plus", blocks=["0"], sample=torch.rand(2, 3, 8))
