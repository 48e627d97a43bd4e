import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastlocal as fl
from fastlocal import models
from fastlocal.blocks.heads import CascadeHead, NoHead
from fastlocal.blocks.losses import cross_entropy
from fastlocal.blocks.patches import PatchDecoders, PatchMean, Patchwise, split
from fastlocal.errors import ArgumentError
from fastlocal.methods import StepContext
from fastlocal.methods.hpff import HPFF, imagenet_decoder, stream_passes
from tests.methods.sites import run_head, site


def names_of(net):
    return [name for name, _ in net.units()]


def at(index, blocks, units=16, shape=(16, 16, 16), **changes):
    return site(shape, index=index, blocks=blocks, units=units, unit=index + 1, **changes)


@pytest.mark.parametrize(
    ("net", "blocks", "options", "expected"),
    [
        (models.resnet32, 16, {}, [f"layer{s}.{u}" for s in (1, 2, 3) for u in range(5)][:-1]),
        (models.resnet32, 15, {}, [f"layer{s}.{u}" for s in (1, 2, 3) for u in range(5)][:-1]),
        (models.resnet32, 8, {}, ["layer1.0", "layer1.2", "layer1.4", "layer2.1", "layer2.3", "layer3.0", "layer3.2"]),
        (models.resnet110, 55, {}, [f"layer{s}.{u}" for s in (1, 2, 3) for u in range(18)][:-1]),
        (models.resnet110, 3, {"balanced_memory": True, "dataset": "stl10"}, ["layer1.8", "layer2.1"]),
        (models.resnet101, 4, {"form": "imagenet"}, ["layer3.0", "layer3.9", "layer3.17"]),
        (
            models.resnet152,
            8,
            {"form": "imagenet"},
            ["layer2.0", "layer3.1", "layer3.5", "layer3.9", "layer3.13", "layer3.17", "layer3.21"],
        ),
        (models.resnet101, 5, {"form": "imagenet"}, None),
        (models.resnet20, 4, {}, None),
    ],
)
def test_published_cuts(net, blocks, options, expected):
    with torch.device("meta"):
        net = net()
    names = names_of(net)
    method = HPFF(**options)
    cuts = method.cuts(method.prepare(blocks, len(names)), names, net)
    assert (None if cuts is None else [names[c] for c in cuts]) == expected


def test_resnet110_in_32_blocks():
    names = names_of(models.resnet110())
    assert len(HPFF().cuts(32, names, None)) == 31


def test_k_counts_the_stem_where_every_unit_is_a_block():
    model = fl.localize(models.resnet20(width=4), "hpff", blocks=10, sample=torch.zeros(2, 3, 8, 8))
    assert len(model.blocks) == 9 and model.blocks[0].units == ("stem", "layer1.0")
    assert isinstance(model.heads[0], NoHead) and all(isinstance(head, CascadeHead) for head in model.heads[1:])


@pytest.mark.parametrize(
    ("block", "blocks", "window", "independent", "expected"),
    [
        (0, 15, 2, True, 2), (1, 15, 2, True, 3), (13, 15, 2, True, 3), (14, 15, 2, True, 2),
        (0, 4, 2, False, 2), (1, 4, 2, False, 2), (3, 4, 2, False, 1),
        (0, 16, 3, True, 2), (1, 16, 3, True, 3), (2, 16, 3, True, 4), (13, 16, 3, True, 4), (14, 16, 3, True, 3),
        (15, 16, 3, True, 2), (0, 2, 3, True, 2), (1, 2, 3, True, 2),
    ],
)  # fmt: skip
def test_passes(block, blocks, window, independent, expected):
    """Counted by hand in the official codes' loops."""
    assert stream_passes(block, blocks, 5, window, independent) == expected
    assert stream_passes(block, blocks, 0, window, independent) == 1


def test_weights_go_by_k_and_by_stream():
    method = HPFF("official", wx=0.01, wy=0.5)
    assert method.weights(at(7, 15)) == pytest.approx((0.5 * 2.5, 0.5 * 0.25))  # 7 / (16 - 2)
    assert method.weights(at(2, 4)) == (0, 0)
    assert HPFF(lam=(4, 2), wy=0.5).weights(at(3, 8)) == (2, 1)
    assert HPFF("official", form="imagenet", lam=(9, 9)).weights(at(1, 4, 34)) == (5, 0.75)
    assert method.final_weight == 0.51 and method.final_share == 0.5 / 0.51
    imagenet = HPFF("official", form="imagenet")
    assert (imagenet.final_weight, imagenet.final_share) == (1, 1)
    paper = HPFF("paper", form="imagenet")
    assert (paper.final_weight, paper.final_share) == (1, 0.999)


def test_official_heads_of_the_cifar_form():
    torch.manual_seed(0)
    where = at(3, 15)
    head = HPFF("official").head(where)
    local = run_head(head, where)
    ratio = 3 / 14
    assert {name: weight for name, (_, weight) in local.terms.items()} == pytest.approx(
        {"own.task": 0.001, "reconstruction": 4 * 0.999 * 5 * (1 - ratio), "task": 0.999 * 0.5 * (1 - ratio)}
    )
    assert head.own.decoder is None
    decoders = head.shared.decoder
    assert isinstance(decoders, PatchDecoders) and len(decoders) == 4
    assert len({id(m) for m in decoders.modules() if isinstance(m, nn.BatchNorm2d)}) == 4
    convs = [m for m in head.own.classifier if isinstance(m, nn.Conv2d)]
    assert [(c.out_channels, c.stride) for c in convs] == [(32, (2, 2)), (32, (1, 1))]  # 2c2f


def test_the_reconstruction_is_the_sum_of_the_quadrants_losses():
    torch.manual_seed(0)
    where = at(3, 15, shape=(8, 4, 4))
    head = HPFF("official", lam=(1, 0), wx=0.0, wy=1.0).head(where).double().eval()
    z = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    image = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    ctx = StepContext(
        target=torch.tensor([0, 1]), input=(image - head.shared.mean) / head.shared.std, criterion=cross_entropy
    )
    expected = 0.0
    for q, decoder in enumerate(head.shared.decoder):
        i, j = divmod(q, 2)
        patch = F.interpolate(
            z[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2], (16, 16), mode="bilinear", align_corners=True
        )
        crop = image[:, :, 16 * i : 16 * i + 16, 16 * j : 16 * j + 16]
        expected += F.binary_cross_entropy(torch.sigmoid(decoder(patch)), crop)
    assert head(z, ctx).loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_the_image_is_restored_once_a_step():
    torch.manual_seed(0)
    where = at(3, 15)
    heads = [HPFF("official").head(where) for _ in range(2)]
    ctx = StepContext(target=torch.tensor([0, 1]), input=torch.rand(2, 3, 32, 32), criterion=cross_entropy)
    for head in heads:
        head(torch.rand(2, 16, 16, 16), ctx)
    (image,) = [value for key, value in ctx.cache.items() if key[0] == "image"]
    assert image.shape == (2, 4, 3, 16, 16) and image.is_contiguous()


def test_paper_mode_runs_one_network_on_every_patch_and_averages():
    torch.manual_seed(0)
    where = at(3, 15)
    head = HPFF().head(where).double()
    run_head(HPFF().head(where), where)
    classifier = head.own.classifier
    assert isinstance(classifier[0], PatchMean) and isinstance(head.shared.decoder, Patchwise)
    z = torch.randn(3, 16, 16, 16, dtype=torch.float64)
    classifier.eval()
    patches = [z[:, :, i : i + 8, j : j + 8] for i in (0, 8) for j in (0, 8)]
    scores = [classifier[-1](classifier[0].net(patch)) for patch in patches]
    assert torch.allclose(classifier(z), sum(scores) / 4, rtol=1e-12)
    decoder = head.shared.decoder.eval()
    assert torch.allclose(decoder(z), torch.stack([decoder.net(p) for p in patches], 1), rtol=1e-12)


def test_patches_are_numbered_row_by_row():
    x = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    parts = split(x, 2)
    assert torch.equal(parts[:, 1], x[:, :, :2, 3:]) and torch.equal(parts[:, 2], x[:, :, 2:, :3])
    seen = PatchDecoders([nn.Identity() for _ in range(4)], 2)(x)
    assert torch.equal(seen, parts)


def test_a_loss_of_weight_zero_is_left_out_in_paper_mode_only():
    last = at(2, 4)  # the weights of the published lam have come down to 0
    head = HPFF().head(last)
    assert head.shared is None and head.own is not None
    assert HPFF("official").head(last).shared is not None
    assert HPFF(wx=0).head(at(1, 4)).own is None
    with pytest.raises(ArgumentError, match=r"lam, wx: all weights of block 2 are 0.*give one above 0"):
        HPFF(wx=0).head(last)


def test_imagenet_forms():
    torch.manual_seed(0)
    where = at(1, 4, 34, shape=(32, 8, 8), input_shape=(3, 64, 64))
    head = HPFF("official", form="imagenet").head(where)
    assert head.own is None
    local = run_head(head, where)
    assert {name: weight for name, (_, weight) in local.terms.items()} == {"reconstruction": 20.0, "task": 0.75}
    paper = HPFF(form="imagenet").head(where)
    assert {name: weight for name, (_, weight) in run_head(paper, where).terms.items()} == pytest.approx(
        {"own.task": 0.001, "reconstruction": 0.999 * 5, "task": 0.999 * 0.75}
    )
    deep = HPFF("official", form="imagenet").head(at(1, 4, 34, shape=(1024, 14, 14), input_shape=(3, 224, 224)))
    convs = [m for m in deep.shared.classifier if isinstance(m, nn.Conv2d)]
    assert [c.out_channels for c in convs] == [256, 256, 512, 2048]


@pytest.mark.parametrize(
    ("size", "widths", "sizes"),
    [
        (56, [128, 16, 3], [112, 224]),
        (28, [128, 32, 16, 3], [56, 112, 224]),
        (14, [128, 64, 32, 16, 3], [112, 56, 112, 224]),
    ],
)
def test_imagenet_decoders(size, widths, sizes):
    net = imagenet_decoder((8, size, size), (3, 224, 224), (3, 224, 224))
    assert [m.out_channels for m in net if isinstance(m, nn.Conv2d)] == widths
    assert [m.size for m in net if hasattr(m, "size")] == [(s, s) for s in sizes]


def test_refusals():
    with pytest.raises(ArgumentError, match=r"'hpff' reconstructs an image.*use method='mlaan', or 'dgl'"):
        HPFF().head(site((6, 8), index=1))
    with pytest.raises(
        ArgumentError, match=r"patches: 3 does not divide the image .* of block 1; give a number that does"
    ):
        HPFF(patches=3).head(at(1, 4))
    with pytest.raises(
        ArgumentError, match=r"form: the ImageNet decoders are for maps that are 4, 8 or 16 times smaller"
    ):
        HPFF("official", form="imagenet").head(at(1, 4, shape=(64, 32, 32)))
    with pytest.raises(ArgumentError, match="mean: the image has 3 channels; give as many"):
        HPFF(mean=(0.5,)).head(at(1, 4))
    for options, message in (
        ({"wx": -1}, "wx: got -1"),
        ({"wy": 0}, "wy: 0 leaves no loss for block 0"),
        ({"patches": 0}, "patches: got 0"),
        ({"form": "cityscapes"}, "form: got 'cityscapes'"),
    ):
        with pytest.raises(ArgumentError, match=message):
            HPFF(**options)
