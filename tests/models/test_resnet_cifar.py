import math

import pytest
import torch
from torch import nn

from fastlocal import models
from fastlocal.errors import ArgumentError


def test_names_shapes_and_order_are_the_official_ones(published, shapes):
    wanted = published("resnet32")["parameters"]
    own = shapes(models.resnet32())
    assert own == wanted and list(own) == list(wanted)


def test_logits_are_the_official_ones(published, official_logits):
    wanted = torch.tensor(published("resnet32")["logits_0_5"], dtype=torch.float64)
    torch.testing.assert_close(official_logits(models.resnet32()), wanted, rtol=1e-9, atol=1e-9)


# The published counts of He et al. 2016 with parameter-free shortcuts, plus the two 1x1 projections with BN.
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet20", 269_722),
        ("resnet32", 464_154),
        ("resnet44", 658_586),
        ("resnet56", 853_018),
        ("resnet110", 1_727_962),
        ("resnet1202", 19_421_274),
    ],
)
def test_parameter_counts(name, parameters, count):
    with torch.device("meta"):
        net = models.create(name)
    assert count(net) == parameters + 2752
    assert len(net.units()) == 1 + (int(name.removeprefix("resnet")) - 2) // 2


def test_units_and_widths():
    net = models.resnet32()
    assert [name for name, _ in net.units()] == ["stem"] + [f"layer{s}.{i}" for s in (1, 2, 3) for i in range(5)]
    assert net.widths == [16] * 6 + [32] * 5 + [64] * 5


def test_stages_halve_the_map():
    net = models.resnet20(width=4)
    x = torch.randn(2, 3, 32, 32)
    sizes = []
    for _, fn in net.units():
        x = fn(x)
        sizes.append(x.shape[-1])
    assert sizes == [32] * 4 + [16] * 3 + [8] * 3


def test_initialisation():
    net = models.resnet110()
    for name, m in net.named_modules():
        if isinstance(m, nn.Conv2d):
            std = math.sqrt(2 / (m.kernel_size[0] * m.kernel_size[1] * m.out_channels))
            n = m.weight.numel()
            assert m.weight.std().item() == pytest.approx(std, rel=6 / math.sqrt(2 * n)), name
            assert m.weight.mean().abs().item() < 6 * std / math.sqrt(n), name
            assert m.bias is None
        if isinstance(m, nn.BatchNorm2d):
            assert (m.weight == 1).all() and (m.bias == 0).all()
    assert net.fc.weight.abs().max() <= 1 / math.sqrt(64), "fc keeps torch's default"


def test_width_is_the_width_of_the_first_stage():
    assert models.resnet20(width=32).widths == [32] * 4 + [64] * 3 + [128] * 3
    assert models.resnet20(width=16 * 0.5).widths == [8] * 4 + [16] * 3 + [32] * 3


def test_dropout_acts_between_the_convolutions():
    net = models.resnet20(width=4, dropout=0.5)
    block = net.layer1[0]
    seen = {}
    block.conv2.register_forward_hook(lambda m, i, o: seen.update(conv2_in=i[0]))
    block.dropout.register_forward_hook(lambda m, i, o: seen.update(drop_out=o))
    x = torch.randn(2, 4, 8, 8)
    block(x)
    assert seen["conv2_in"] is seen["drop_out"]
    assert len([m for m in net.modules() if isinstance(m, nn.Dropout)]) == 9
    net.eval()
    assert torch.equal(net(torch.ones(2, 3, 16, 16)), net(torch.ones(2, 3, 16, 16)))


def test_state_dict_is_the_same_with_dropout():
    assert list(models.resnet20(dropout=0.1).state_dict()) == list(models.resnet20().state_dict())


@pytest.mark.parametrize(
    ("i", "in_channels", "stride", "projected"),
    [(1, 16, 1, False), (1, 16, 2, True), (15, 16, 1, True), (0, 16, 1, False)],
)
def test_make_unit_projects_where_the_shape_changes(i, in_channels, stride, projected):
    unit = models.resnet32().make_unit(i, in_channels, stride)
    assert (unit.downsample is not None) == projected
    if projected:
        assert next(iter(unit.downsample.state_dict())) == "0.weight" and unit.downsample[0].stride == (stride, stride)


def test_make_unit_initialises_as_the_network():
    unit = models.resnet32().make_unit(15, 64, 1)
    assert unit.conv1.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.03)


def test_make_unit_refuses_no_channels():
    with pytest.raises(ArgumentError, match="in_channels must be an integer of at least 1, got 0"):
        models.resnet20().make_unit(1, 0, 1)
