import pytest
import torch

from fastlocal import models
from fastlocal.errors import ArgumentError


def test_names():
    net = models.mlp(in_features=64, hidden=(8, 6), batch_norm=True)
    assert [name for name, _ in net.named_parameters()] == [
        *(f"layers.{i}.{p}" for i in (0, 1) for p in ("linear.weight", "linear.bias", "bn.weight", "bn.bias")),
        "head.weight",
        "head.bias",
    ]
    assert net.widths == [8, 6] and [name for name, _ in net.units()] == ["layers.0", "layers.1"]


def test_forward_is_the_textbook_one():
    net = models.mlp(in_features=64, hidden=(8, 6))
    x = torch.randn(4, 1, 8, 8)
    h = x.flatten(1)
    for layer in net.layers:
        h = torch.relu(h @ layer.linear.weight.T + layer.linear.bias)
    torch.testing.assert_close(net(x), h @ net.head.weight.T + net.head.bias)


def test_dropout_runs_at_the_start_of_what_follows():
    net = models.mlp(in_features=64, hidden=(256, 256), dropout=0.5)
    assert net.layers[0].dropout is None and net.layers[1].dropout is not None
    h = torch.ones(4, 256)
    torch.manual_seed(0)
    first = net.readout(h)
    assert not torch.equal(first, net.readout(h)), "the readout drops"
    assert torch.equal(net.eval().readout(h), net.readout(h))


def test_make_unit():
    net = models.mlp(in_features=64, hidden=(8, 6), batch_norm=True, dropout=0.1)
    unit = net.make_unit(1, 20, 1)
    assert unit(torch.randn(4, 20)).shape == (4, 6) and unit.bn is not None and unit.dropout is None
    with pytest.raises(ArgumentError, match="stride must be 1"):
        net.make_unit(1, 20, 2)
