import pytest
import torch
from torch import nn

from fastlocal import models
from fastlocal.blocks.measure import SavedBytes
from fastlocal.errors import ArgumentError
from fastlocal.methods import StepContext
from fastlocal.methods.auglocal import AugLocal
from tests.methods.oracles import plain_localize
from tests.methods.sites import count, run_head, site, sites_of

CIFAR = torch.zeros(2, 3, 32, 32)


def strides(head):
    """Stride of every auxiliary unit."""
    return [unit.conv1.stride[0] for unit in head.net if hasattr(unit, "conv1")]


@pytest.mark.parametrize(
    ("blocks", "depth", "expected"),
    [
        (16, 3, [3] * 6 + [2] * 6),
        (16, 2, [2] * 13),
        (16, 1, [1] * 14),
        (55, 5, [5] * 12 + [4] * 25 + [3] * 12),
    ],
)
def test_pyramid_depths_are_the_published_ones(blocks, depth, expected):
    method = AugLocal(depth=depth)
    cut = method.prepare(blocks, blocks)
    assert cut == blocks - depth
    assert [method.depth_at(k, cut) for k in range(cut - 1)] == expected


def test_depth_is_constant_without_pyramid_and_in_the_imagenet_form():
    assert {AugLocal(depth=4, pyramid=False).depth_at(k, 12) for k in range(11)} == {4}
    assert {AugLocal(depth=4, form="imagenet").depth_at(k, 17) for k in range(16)} == {4}
    assert AugLocal(depth=4, form="imagenet", pyramid=True, pyramid_coeff=0.9).depth_at(15, 17) == 1
    assert AugLocal(depth=4).depth_at(0, 2) == 4


@pytest.mark.parametrize(
    ("unit", "units", "depth", "expected"),
    [
        (0, 16, 2, [8, 15]),  # 7.5 is rounded to the even 8
        (1, 16, 4, [4, 8, 12, 15]),  # 4.5 to 4, 11.5 to 12
        (0, 16, 1, [15]),
        (12, 16, 3, [13, 14, 15]),
        (13, 16, 3, [14, 15]),
        (15, 16, 3, []),
    ],
)
def test_units_are_sampled_uniformly_with_rounding_to_even(unit, units, depth, expected):
    assert AugLocal.sampled_units(unit, units, depth) == expected


@pytest.mark.parametrize(("depth", "ratio"), [(1, 1.73), (2, 2.87), (3, 3.24), (5, 3.61)])
def test_resnet32_heads_have_the_official_size(depth, ratio):
    model = plain_localize(models.resnet32(), "auglocal", blocks=16, sample=CIFAR, depth=depth)
    assert len(model.heads) == 16 - depth - 1
    assert count(model.heads) / count(model.backbone) == pytest.approx(ratio, abs=0.005)


def test_imagenet_resnet34_heads_have_the_official_size():
    method, net = AugLocal(depth=4, form="imagenet"), models.resnet34()
    assert method.prepare(17, 17) == 17
    with torch.device("meta"):
        heads = [method.head(s) for s in sites_of(models.resnet34(), torch.zeros(1, 3, 64, 64, device="meta"))]
    assert len(heads) == 16
    assert sum(map(count, heads)) / 1e6 == pytest.approx(154.36, abs=0.01)
    assert count(net) / 1e6 == pytest.approx(21.80, abs=0.01)
    assert not any(isinstance(m, nn.BatchNorm1d) for head in heads for m in head.modules())


def test_one_hop_over_two_stages_halves_the_map_once():
    net = models.resnet32()
    at = sites_of(net, CIFAR, 16)
    assert strides(AugLocal(depth=1).head(at[0])) == [2]  # 16 -> 64: the second halving is dropped
    assert strides(AugLocal(depth=2, pyramid=False).head(at[0])) == [2, 2]  # 16 -> 32 -> 64
    assert strides(AugLocal(depth=3, pyramid=False).head(at[5])) == [2, 2, 1]
    assert strides(AugLocal(depth=2, pyramid=False).head(at[12])) == [1, 1]


def test_a_left_over_halving_moves_to_the_next_unit():
    net = models.resnet32()
    net.widths = [16, 64, 64, 64]
    first = site((16, 8, 8), units=4, blocks=4, widths=net.widths, net=net)
    assert strides(AugLocal(depth=3, pyramid=False).head(first)) == [2, 2, 1]


def test_a_head_of_depth_one_has_a_norm_before_its_last_layer_in_the_cifar_form():
    at = sites_of(models.resnet32(), CIFAR, 16)
    assert [type(m) for m in AugLocal(depth=1).head(at[0]).net[-2:]] == [nn.BatchNorm1d, nn.Linear]
    for method in (AugLocal(depth=2), AugLocal(depth=1, form="imagenet")):
        assert not any(isinstance(m, nn.BatchNorm1d) for m in method.head(at[0]).modules())


def test_bottleneck_heads_take_the_expanded_width():
    net = models.resnet50(num_classes=7)
    at = sites_of(net, torch.zeros(2, 3, 32, 32))
    method = AugLocal(depth=2, form="imagenet")
    for k in (0, 3, 9, 15):
        head = method.head(at[k])
        assert head.net[0].conv1.in_channels == at[k].shape[0]
        assert head.net[-1].in_features == 2048
    run_head(method.head(at[9]), at[9])


def test_vgg_heads_pool_where_the_width_changes_and_end_in_an_mlp():
    net = models.vgg13(num_classes=7, width=8, hidden=16)
    at = sites_of(net, torch.zeros(2, 3, 32, 32))
    head = AugLocal(depth=2, form="imagenet").head(at[5])
    pools = [any(isinstance(m, nn.MaxPool2d) for m in unit.modules()) for unit in head.net[:2]]
    assert pools == [True, False]  # 32 -> 64, 64 -> 64
    assert [m.out_features for m in head.net[-1] if isinstance(m, nn.Linear)] == [512, 512, 7]
    assert run_head(head, at[5]).logits.shape == (4, 7)


def test_transformers_are_sampled_alike_and_read_out_by_the_backbone_s_readout():
    vit = models.vit_tiny(num_classes=7, img_size=16, patch_size=4, dim=16, depth=6, heads=2)
    at = sites_of(vit, torch.zeros(1, 3, 16, 16))
    head = AugLocal(depth=2).head(at[1])
    assert len(head.net) == 3 and run_head(head, at[1]).logits.shape == (4, 7)
    gpt = models.gpt(vocab_size=11, block_size=8, n_layer=4, n_head=2, n_embd=8)
    at = sites_of(gpt, torch.zeros(1, 8, dtype=torch.int64))
    head = AugLocal(depth=2).head(at[1])
    assert run_head(head, at[1]).logits.shape == (4, 8, 11)
    tied = {p.data_ptr() for p in gpt.parameters()}
    assert not any(p.data_ptr() in tied for p in head.parameters())


def test_vectors_of_an_mlp():
    net = models.mlp(num_classes=7, in_features=12, hidden=(8, 16, 4))
    at = sites_of(net, torch.zeros(1, 12))
    head = AugLocal(depth=2).head(at[0])
    assert run_head(head, at[0]).logits.shape == (4, 7)


def test_widen_needs_a_make_unit_that_takes_a_width():
    at = sites_of(models.resnet32(), CIFAR, 14)
    with pytest.raises(
        ArgumentError, match=r"widen: 2.0 needs ResNetCIFAR.widths and a make_unit\(i, in_channels, str"
    ):
        AugLocal(widen=2.0).head(at[0])

    class Wide(models.ResNetCIFAR):
        def make_unit(self, i, in_channels, stride, width=None):
            return type(self.layer1[0])(in_channels, width or self.widths[i], stride)

    at = sites_of(Wide(5), CIFAR, 14)
    head = AugLocal(widen=1.5).head(at[0])
    assert [unit.conv1.out_channels for unit in head.net[:2]] == [48, 96]
    assert strides(head) == [2, 2]  # by the widths of the backbone, not the widened ones
    run_head(head, at[0])


def test_units_and_weights_are_fresh():
    net = models.resnet32()
    at = sites_of(net, CIFAR, 14)
    torch.manual_seed(0)
    own = {p.data_ptr() for p in net.parameters()}
    head = AugLocal(depth=2).head(at[3])
    assert not any(p.data_ptr() in own for p in head.parameters())
    assert not any(m is net for m in head.modules())
    assert head.training and all(m.training for m in head.modules())
    assert all(int(b) == 0 for name, b in head.named_buffers() if name.endswith("num_batches_tracked"))


def test_refusals():
    with pytest.raises(ArgumentError, match=r"depth: 4 is too much for blocks=4.*use depth up to 3, more blocks"):
        AugLocal(depth=4).prepare(4, 16)
    assert AugLocal(depth=4).prepare(1, 16) == 1
    assert AugLocal(depth=3).prepare(4, 16) == 1
    with pytest.raises(ArgumentError, match=r"Linear has no make_unit\(i, in_channels, stride\).*method='dgl'"):
        AugLocal().head(site((8, 4, 4)))
    with pytest.raises(ArgumentError, match="classify whole images"):
        AugLocal().head(site((8, 4, 4), dense=True))

    class NoReadout(nn.Module):
        def make_unit(self, i, in_channels, stride):
            return nn.Linear(in_channels, in_channels)

    with pytest.raises(ArgumentError, match=r"needs NoReadout.make_readout"):
        AugLocal().head(site((6, 8), net=NoReadout()))
    net = models.vgg8b(feat_mult=0.125)
    at = sites_of(net, torch.zeros(2, 3, 32, 32))
    with pytest.raises(ArgumentError, match="cannot put a unit like unit 7 of VGGLocal"):
        AugLocal(depth=1).head(at[0])


def test_a_block_of_resnet110_saves_no_more_than_the_official_code():
    """At most 0.67 MiB an image (0.673 before rounding) for d=3, block and head together, 0.34 for DGL's head."""
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8)
    for name, options, limit in (("auglocal", {"depth": 3}, 0.674), ("dgl", {"head": "auglocal"}, 0.343)):
        model = plain_localize(models.resnet110(), name, blocks=55, sample=x, **options)
        peak, h = 0, x
        for block, head in zip(model.blocks, model.heads):
            h = h.detach()
            lasting = [*model.backbone.parameters(), *head.parameters(), *model.backbone.buffers(), *head.buffers()]
            with SavedBytes(exclude=[*lasting, h]) as saved:
                for fn in block.fns:
                    h = fn(h)
                local = head(h, StepContext(target=y, input=x, criterion=nn.functional.cross_entropy))
            peak = max(peak, saved.peak)
            local.loss.backward()
        boundary = 64 / 1024  # 16x32x32 float32, which the block before has counted already
        assert peak / 2**20 / len(x) + boundary <= limit
