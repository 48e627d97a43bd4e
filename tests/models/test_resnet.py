import pytest
import torch
from torch import nn

from fastlocal import models


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


def test_initialisation_is_kaiming_fan_out():
    net = models.resnet18(num_classes=10)
    weight = net.layer4[1].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.01)
    assert all((m.weight == 1).all() and (m.bias == 0).all() for m in net.modules() if isinstance(m, nn.BatchNorm2d))
