import pytest
import torch

from fastlocal import models
from fastlocal.errors import ArgumentError


def official(name: str) -> str:
    return name.replace("classifier", "auxillary_nets.5.classifier")


def test_names_shapes_and_order_are_the_official_ones(published, shapes):
    wanted = published("dgl_cnn_16")["parameters"]
    own = {official(name): shape for name, shape in shapes(models.dgl_cnn(feature_size=16)).items()}
    assert own == wanted and list(own) == list(wanted)


def test_logits_are_the_official_ones(published, official_logits):
    wanted = torch.tensor(published("dgl_cnn_16")["logits_0_5"], dtype=torch.float64)
    torch.testing.assert_close(official_logits(models.dgl_cnn(feature_size=16), official), wanted, rtol=1e-9, atol=1e-9)


def test_widths_and_sizes():
    net = models.dgl_cnn(feature_size=4)
    assert net.widths == [4, 8, 8, 16, 16, 16]
    x, sizes = torch.randn(2, 3, 32, 32), []
    for _, fn in net.units():
        x = fn(x)
        sizes.append(x.shape[-1])
    assert sizes == [32, 16, 16, 8, 8, 8]


def test_make_unit_refuses_other_strides():
    with pytest.raises(ArgumentError, match=r"stride must be 1 or 2.*got 3"):
        models.dgl_cnn(feature_size=4).make_unit(1, 4, 3)
