import pytest
import torch
from torch import nn

from fastlocal import models

SMALL = {"width": 4, "hidden": 16, "num_classes": 10}


def test_names_shapes_and_order_are_the_official_ones(published, shapes):
    wanted = published("vgg13")["parameters"]
    with torch.device("meta"):
        own = shapes(models.vgg13())
    assert own == wanted and list(own) == list(wanted)


# torchvision's counts of vgg13_bn and vgg19_bn.
@pytest.mark.parametrize(("name", "parameters", "units"), [("vgg13", 133_053_736, 10), ("vgg19", 143_678_248, 16)])
def test_parameter_counts(name, parameters, units, count):
    with torch.device("meta"):
        net = models.create(name)
        logits = net.eval()(torch.empty(1, 3, 224, 224))
    assert count(net) == parameters and len(net.units()) == len(net.widths) == units
    assert logits.shape == (1, 1000)


def test_features_keep_the_published_numbering():
    net = models.vgg19(**SMALL)
    assert [name for name, _ in net.units()] == [
        f"features.{i}" for i in (0, 1, 3, 4, 6, 7, 8, 9, 11, 12, 13, 14, 16, 17, 18, 19)
    ]
    assert net.widths == [4] * 2 + [8] * 2 + [16] * 4 + [32] * 8


def test_pools_run_at_the_start_of_the_next_unit():
    net = models.vgg13(**SMALL)
    x, sizes = torch.randn(2, 3, 64, 64), []
    for _, fn in net.units():
        x = fn(x)
        sizes.append(x.shape[-1])
    assert sizes == [64, 64, 32, 32, 16, 16, 8, 8, 4, 4]


def test_equals_the_published_layout():
    """Convolutions and pools in the published order, written out, with the same weights."""
    net = models.vgg13(**SMALL).eval()
    h = x = torch.randn(2, 3, 64, 64)
    for i in range(15):
        layer = net.features[i]
        if i in (2, 5, 8, 11, 14):
            h = nn.functional.max_pool2d(h, 2)
        else:
            h = torch.relu(layer.bn1(layer.conv1(h)))
    h = nn.functional.adaptive_avg_pool2d(h, 7).flatten(1)
    assert torch.equal(net(x), net.fc(h))


def test_initialisation():
    net = models.vgg13(width=16, hidden=64, num_classes=10)
    assert net.features[12].conv1.weight.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)
    assert net.fc[0].weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert all((m.bias == 0).all() for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))


@pytest.mark.parametrize(("in_channels", "kinds"), [(64, ["Conv2d"]), (16, ["MaxPool2d", "Conv2d"])])
def test_make_unit_pools_where_the_width_changes(in_channels, kinds):
    net = models.vgg13(width=8, hidden=16, num_classes=10)
    unit = net.make_unit(9, in_channels, 1)
    assert [type(m).__name__ for m in unit] == [*kinds, "BatchNorm2d", "ReLU"]
    conv = unit[-3]
    # torch's default is uniform within 1/sqrt(fan_in) and gives the bias values other than zero.
    assert conv.bias.abs().max() > 0 and conv.weight.abs().max() <= (9 * in_channels) ** -0.5


def test_make_aux_readout_takes_any_map():
    readout = models.vgg13(**SMALL).make_aux_readout(0, 10)
    for shape in [(2, 64, 14, 14), (2, 512, 1, 1)]:
        assert readout(torch.randn(shape)).shape == (2, 10)
    assert sum(isinstance(m, nn.Linear) for m in readout) == 3
