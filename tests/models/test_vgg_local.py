import pytest
import torch
from torch import nn

from fastlocal import models
from fastlocal.errors import ArgumentError

QUARTER = {"feat_mult": 0.25, "num_hidden": 128}


@pytest.mark.parametrize(("data", "options"), [("vgg8b", {}), ("vgg8b_quarter", QUARTER)])
def test_names_shapes_and_order_are_the_official_ones(data, options, published, shapes):
    wanted = published(data)["parameters"]
    with torch.device("meta"):
        own = shapes(models.vgg8b(**options))
    assert own == wanted and list(own) == list(wanted)


def test_logits_are_the_official_ones(published, official_logits):
    wanted = torch.tensor(published("vgg8b_quarter")["logits_0_5"], dtype=torch.float64)
    torch.testing.assert_close(official_logits(models.vgg8b(**QUARTER)), wanted, rtol=1e-9, atol=1e-9)


def test_every_layer_is_a_unit_and_the_readout_is_the_identity():
    net = models.vgg8b(**QUARTER)
    convs = [f"features.{i}" for i in (0, 1, 3, 4, 6, 8)]
    assert [name for name, _ in net.units()] == [*convs, "classifier.layers.0", "classifier.layer_out"]
    assert net.widths == [32, 64, 64, 128, 128, 128, 128, 10]
    h = torch.randn(2, 10)
    assert net.readout(h) is h


def test_vgg11b_units():
    net = models.vgg11b(feat_mult=1 / 16, num_hidden=16)
    convs = [f"features.{i}" for i in (0, 1, 2, 3, 5, 6, 8, 9, 11)]
    assert [name for name, _ in net.units()] == [*convs, "classifier.layers.0", "classifier.layer_out"]
    assert net.widths == [8, 8, 8, 16, 16, 32, 32, 32, 32, 16, 10]


def test_widths_round_down():
    assert models.vgg8b(feat_mult=0.3, num_hidden=16).widths[:2] == [38, 76]


def test_dropout_and_pool_open_the_next_unit():
    net = models.vgg8b(feat_mult=1 / 16, num_hidden=16, num_layers=2, dropout=0.3)
    first = {name: [type(m).__name__ for m in fn.pre or ()] for name, fn in net.units()}
    assert first == {
        "features.0": [],
        "features.1": ["Dropout2d"],
        "features.3": ["Dropout2d", "MaxPool2d"],
        "features.4": ["Dropout2d"],
        "features.6": ["Dropout2d", "MaxPool2d"],
        "features.8": ["Dropout2d", "MaxPool2d"],
        "classifier.layers.0": ["Dropout2d", "MaxPool2d", "Flatten"],
        "classifier.layers.1": ["Dropout"],
        "classifier.layer_out": ["Dropout"],
    }
    assert all(m.p == 0.3 for m in net.modules() if isinstance(m, nn.modules.dropout._DropoutNd))


def test_initialisation():
    net = models.vgg8b(**QUARTER)
    assert (net.classifier.layer_out.weight == 0).all() and net.classifier.layer_out.bias.abs().max() > 0
    assert net.features[0].encoder.weight.abs().max() <= (9 * 3) ** -0.5, "convolutions keep torch's default"


def test_without_hidden_layers_the_classifier_is_a_linear():
    net = models.vgg8b(feat_mult=1 / 16, num_layers=0)
    assert net.units()[-1][0] == "classifier"
    assert net.classifier.weight.shape == (10, 32 * 2 * 2) and net.classifier.weight.abs().max() > 0


@pytest.mark.parametrize("size", [28, 32, 96])
def test_image_sizes(size):
    net = models.vgg8b(feat_mult=1 / 16, num_hidden=16, img_size=size)
    assert net(torch.randn(2, 3, size, size)).shape == (2, 10)
    assert net.features[0].encoder.kernel_size == ((7, 7) if size > 64 else (3, 3))


def test_leaky_relu():
    net = models.vgg8b(feat_mult=1 / 16, num_hidden=16, nonlin="leakyrelu")
    assert (net.features[0](torch.randn(2, 3, 32, 32)) < 0).any()


def test_make_unit_of_linear_layers():
    net = models.vgg8b(**QUARTER)
    assert net.make_unit(6, 20, 1)(torch.randn(4, 20)).shape == (4, 128)
    assert (net.make_unit(7, 20, 1).weight == 0).all()
    with pytest.raises(
        ArgumentError, match=r"stride must be 1: unit 6 \(classifier.layers.0\) is a Linear layer, got 2"
    ):
        net.make_unit(6, 20, 2)
    with pytest.raises(ArgumentError, match=r"stride must be 1 or 2.*got 4"):
        net.make_unit(1, 20, 4)
