import copy
import math
import pickle

import pytest
import torch
from torch import nn

from fastlocal.errors import ArgumentError
from fastlocal.models.masked_vit import HOG, MaskedViT, sincos_positions

TINY = {"img_size": 32, "patch_size": 8, "dim": 16, "depth": 2, "heads": 2, "decoder_dim": 16, "decoder_heads": 2}


@pytest.fixture
def golden(published):
    return published("localmim_vit")


@pytest.fixture
def images():
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1234), dtype=torch.float64)


def weighted(t):
    return (t * torch.linspace(0, 1, t.numel(), dtype=t.dtype).view_as(t)).sum().item()


@pytest.mark.parametrize("cell", [4, 8, 16, 32])
def test_hog_targets_are_the_official_ones(golden, images, cell):
    net = MaskedViT(**golden["net"]).double()
    target = net.masking.targets(images, 16 / cell)
    expected = golden["hog"][str(cell)]
    assert target.shape == (3, (64 // cell) ** 2, 27)
    torch.testing.assert_close(target[0, 0].tolist(), expected["first"], rtol=0, atol=1e-12)
    assert target.sum().item() == pytest.approx(expected["sum"], rel=1e-12)
    assert weighted(target) == pytest.approx(expected["weighted"], rel=1e-12)


@pytest.mark.parametrize("cell", [8, 16, 32])
def test_pixel_targets_are_the_official_ones(golden, images, cell):
    net = MaskedViT(**golden["net"], target="pixels").double()
    target = net.masking.targets(images, 16 / cell)
    expected = golden["pixels"][str(cell)]
    torch.testing.assert_close(target[0, 0, :9].tolist(), expected["first"], rtol=0, atol=1e-12)
    assert weighted(target) == pytest.approx(expected["weighted"], rel=1e-9)


def test_hog_of_edges_by_hand():
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)  # grows to the right: the gradient is (-8, 0), angle -pi/2
    histogram = HOG(9)(ramp, 8)[0, :, 0, 0]
    inner = 6 * 8.0 / 8  # six of eight columns; the reflected borders have no gradient
    expected = torch.zeros(9)
    expected[math.floor(-4.5) % 9] = inner
    torch.testing.assert_close(histogram, expected)
    assert HOG(9)(ramp.transpose(2, 3), 8)[0, :, 0, 0].argmax() == 0  # angle pi
    both = HOG(4)(torch.cat([ramp, ramp.transpose(2, 3)], 1), 4)
    assert both.shape == (1, 8, 2, 2)  # all bins of a channel, then the next channel's


def test_targets_stay_float32_under_autocast():
    net, x = MaskedViT(**TINY), torch.rand(2, 3, 32, 32)
    plain = net.masking.targets(x, 2)
    net.masking._cells = None
    with torch.autocast("cpu", torch.bfloat16):
        loss = net.criterion(net(x), x)
        torch.testing.assert_close(net.masking.targets(x, 2), plain, rtol=0, atol=0)
    assert loss.dtype == torch.float32


def test_positions_are_the_official_ones(golden):
    positions = MaskedViT(**golden["net"]).double().pos_embed
    assert positions.sum().item() == pytest.approx(golden["pos_embed"]["sum"], rel=1e-12)
    assert positions[0, 7, :8].tolist() == pytest.approx(golden["pos_embed"]["row"], rel=1e-12)
    assert not sincos_positions(8, 3)[0, 0].any()
    with pytest.raises(ArgumentError, match="dim: fixed positions need a multiple of 4, got 6"):
        sincos_positions(6, 2)


def test_a_mask_hides_its_share_of_every_image_and_another_one_each_time():
    net, x = MaskedViT(**TINY), torch.rand(4, 3, 32, 32)
    h = net.embed(x)
    assert h.shape == (4, 1 + 4, 16)
    fine = net.masking.mask(4.0, x.dtype)
    assert fine.shape == (4, 256) and (fine.sum(1) == 0.75 * 256).all()
    mask = net.masking.mask(1.0, x.dtype)
    assert len({tuple(row.tolist()) for row in mask}) == 4
    # fine predictions lie in their patches: position (5, 6) of a 16 x 16 grid is in patch (1, 1) of 4 x 4
    torch.testing.assert_close(fine.view(4, 16, 16)[:, 5, 6], mask.view(4, 4, 4)[:, 1, 1])
    coarse = net.masking.mask(0.5, x.dtype).view(4, 2, 2)
    torch.testing.assert_close(coarse[:, 0, 1], mask.view(4, 4, 4)[:, :2, 2:].mean((1, 2)))
    net.embed(x)
    assert not torch.equal(net.masking.mask(1.0, x.dtype), mask)


def test_visible_tokens_are_the_patches_the_mask_leaves():
    net, x = MaskedViT(**TINY), torch.rand(2, 3, 32, 32)
    h = net.embed(x)
    every = net.patch_embed(x) + net.pos_embed[:, 1:]
    for b in range(2):
        seen = (net.masking.mask(1.0, x.dtype)[b] == 0).nonzero().flatten().tolist()
        found = [min(range(16), key=lambda t: (every[b, t] - token).norm()) for token in h[b, 1:]]
        assert sorted(found) == seen
        torch.testing.assert_close(h[b, 1:], every[b, found])


def test_hidden_patches_do_not_reach_the_prediction():
    net, x = MaskedViT(**TINY).double(), torch.rand(2, 3, 32, 32, dtype=torch.float64)
    noise = torch.rand(2, 16)
    net.masking.noise = lambda rows, device: noise
    before = net(x)
    hidden = net.masking.mask(1.0, x.dtype).view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    torch.testing.assert_close(net(x + hidden), before, rtol=0, atol=0)
    assert not torch.equal(net(x + 1 - hidden), before)


def test_units_and_readout_are_the_forward():
    net, x = MaskedViT(**TINY), torch.rand(2, 3, 32, 32)
    torch.manual_seed(3)
    expected = net(x)
    torch.manual_seed(3)
    h = x
    for _, fn in net.units():
        h = fn(h)
    assert torch.equal(net.readout(h), expected)
    assert [name for name, _ in net.units()] == ["embed", "blocks.0", "blocks.1"] and len(net.widths) == 3
    assert expected.shape == (2, 4, 27)


def test_copies_share_no_mask_and_their_criterion_is_their_own():
    net, x = MaskedViT(**TINY), torch.rand(2, 3, 32, 32)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert other.criterion.masking is other.masking is not net.masking
        assert other.hog is other.masking.hog
        net(x)
        kept = net.masking.restore
        other(x)
        assert net.masking.restore is kept
    assert "pos_embed" in net.state_dict() and not any("sobel" in key for key in net.state_dict())


def test_the_criterion_counts_images_and_keeps_nothing_of_the_batch():
    net, x = MaskedViT(**TINY), torch.rand(3, 3, 32, 32)
    net.criterion(net(x), x)
    assert net.masking._cells is None
    assert net.criterion.count(x).item() == 3 and net.criterion.correct(x, x).item() == -1


def test_to_vit_copies_the_encoder():
    net = MaskedViT(**TINY).double()
    for pool in ("cls", "mean"):
        vit = net.to_vit(num_classes=5, pool=pool)
        x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
        tokens = net.patch_embed(x) + net.pos_embed[:, 1:]
        if pool == "cls":
            tokens = torch.cat([(net.cls_token + net.pos_embed[:, :1]).expand(2, -1, -1), tokens], 1)
        torch.testing.assert_close(vit(x), vit.readout(net.blocks(tokens)))
        assert vit(x).shape == (2, 5)
        assert vit.blocks[0].attn.qkv.weight is not net.blocks[0].attn.qkv.weight


def test_initialisation_is_the_official_one():
    net = MaskedViT(**{**TINY, "dim": 64})
    bound = math.sqrt(6 / (64 + 3 * 8 * 8))
    weight = net.patch_embed.proj.weight
    assert bound * 0.98 < weight.abs().max() <= bound
    for m in net.modules():
        if isinstance(m, nn.Linear):
            limit = math.sqrt(6 / sum(m.weight.shape))
            assert 0.95 * limit < m.weight.abs().max() <= limit and not m.bias.any()
    assert net.decoder.mask_token.std().item() == pytest.approx(0.02, rel=0.6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": 36}, "img_size must be a multiple of patch_size=8, got 36"),
        ({"patch_size": 2}, "patch_size must be a multiple of 4"),
        ({"target": "vgg"}, "target must be one of hog, pixels, got 'vgg'"),
        ({"dim": 18, "heads": 4}, "dim must be a multiple of its 4 heads, got 18"),
        ({"decoder_dim": 18, "decoder_heads": 4}, "decoder_dim must be a multiple of its 4 heads, got 18"),
        ({"mask_ratio": 0.0}, "mask_ratio: 0.0 leaves 16 of 16"),
        ({"mask_ratio": 0.99}, "mask_ratio: 0.99 leaves 0 of 16"),
        ({"mask_ratio": 1.0}, r"mask_ratio must be a number in \[0, 1\)"),
        ({"scale": 3}, "scale must be one of 4, 2, 1, 0.5, got 3"),
        ({"img_size": 24}, "scale: 0.5 needs an even number of patches a side, got 3"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ArgumentError, match=message):
        MaskedViT(**{**TINY, **options})
    with pytest.raises(ArgumentError, match="x must hold images of img_size=32"):
        MaskedViT(**TINY)(torch.rand(1, 3, 16, 16))
