import pytest
import torch
from torch import nn

from fastlocal import models
from fastlocal.errors import ArgumentError


@pytest.mark.parametrize("name", ["resnet34", "resnet101"])
def test_names_shapes_and_order_are_the_official_ones(name, published, shapes):
    wanted = published(name)["parameters"]
    with torch.device("meta"):
        own = shapes(models.create(name))
    assert own == wanted and list(own) == list(wanted)


# torchvision's counts; units without the stem.
@pytest.mark.parametrize(
    ("name", "parameters", "blocks"),
    [
        ("resnet18", 11_689_512, 8),
        ("resnet34", 21_797_672, 16),
        ("resnet50", 25_557_032, 16),
        ("resnet101", 44_549_160, 33),
        ("resnet152", 60_192_808, 50),
        ("resnext50_32x4d", 25_028_904, 16),
        ("resnext101_32x8d", 88_791_336, 33),
    ],
)
def test_parameter_counts(name, parameters, blocks, count):
    with torch.device("meta"):
        net = models.create(name)
        logits = net.eval()(torch.empty(2, 3, 224, 224))
    assert count(net) == parameters
    assert len(net.units()) == len(net.widths) == 1 + blocks
    assert logits.shape == (2, 1000)


def test_the_stem_pools():
    net = models.resnet18(width=4)
    assert net.units()[0] == ("stem", net.stem)
    assert net.stem(torch.randn(2, 3, 64, 64)).shape == (2, 4, 16, 16)


def test_stride_of_a_bottleneck_is_on_its_3x3_convolution():
    with torch.device("meta"):
        block = models.resnet50().layer2[0]
    assert (block.conv1.stride, block.conv2.stride, block.downsample[0].stride) == ((1, 1), (2, 2), (2, 2))


def test_widths_of_a_bottleneck_network_are_planes():
    with torch.device("meta"):
        net = models.resnet50()
    assert net.widths == [64] * 4 + [128] * 4 + [256] * 6 + [512] * 3


def test_make_unit_of_a_bottleneck_network():
    net = models.resnet50(width=4, num_classes=10)
    after_stem = net.make_unit(1, 4, 1)
    assert after_stem.downsample is not None and after_stem.conv3.out_channels == 16
    assert net.make_unit(2, 16, 1).downsample is None


def test_the_grouped_convolutions_of_resnext():
    with torch.device("meta"):
        net = models.resnext101_32x8d()
        fresh = net.make_unit(4, 256, 2)
    for block, inner in ((net.layer1[0], 256), (net.layer4[2], 2048), (fresh, 512)):
        assert block.conv2.groups == 32 and block.conv2.in_channels == block.conv2.out_channels == inner
        assert block.conv1.out_channels == block.conv3.in_channels == block.bn1.num_features == inner
    assert net.layer1[0].conv3.out_channels == 256 and fresh.conv2.stride == (2, 2)
    small = models.resnext50_32x4d(width=16, num_classes=7)
    assert small.layer1[0].conv2.weight.shape == (32, 1, 3, 3)
    assert small(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    # A group sees its own channels only.
    x = torch.randn(1, 32, 4, 4)
    y = x.clone()
    y[:, 5] += 1
    changed = (small.layer1[0].conv2(x) != small.layer1[0].conv2(y)).flatten(2).any(2)[0]
    assert changed.nonzero().flatten().tolist() == [5]


def test_groups_that_do_not_fit():
    with pytest.raises(ArgumentError, match=r"groups=2, width_per_group=64: BasicBlock has neither"):
        models.resnet18(groups=2)
    with pytest.raises(ArgumentError, match=r"width_per_group=4 leaves no channel at width=8; give at least 8"):
        models.resnext50_32x4d(width=8)
    with pytest.raises(ArgumentError, match="groups"):
        models.resnet50(groups=0)


def test_initialisation_is_kaiming_fan_out():
    net = models.resnet18(num_classes=10)
    weight = net.layer4[1].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.01)
    assert all((m.weight == 1).all() and (m.bias == 0).all() for m in net.modules() if isinstance(m, nn.BatchNorm2d))
