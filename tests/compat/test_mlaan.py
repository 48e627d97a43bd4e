"""MLAAN's networks against the official code's numbers, by the official names alone."""

import pytest
import torch

from fastlocal.compat import mlaan
from fastlocal.errors import ArgumentError
from tests.compat.official import arguments, check_compat
from tests.compat.test_hpff import names_and_shapes, numbers
from tests.methods.oracles import load


def test_oracle():
    oracle = load("mlaan_resnet32_K15")
    worst = check_compat("mlaan_resnet32_K15", lambda: mlaan.resnet32(**arguments(oracle)))
    assert {"loss", "logits", "gradient", "param norm", "param sum", "bn norm", "eval logits"} <= set(worst)


def test_8_blocks_other_classes_and_weights():
    """From the official code, run in float64 on one thread. The last chain has two units, and both averages move."""
    torch.manual_seed(0)
    network = mlaan.resnet32(batch_size=4, local_module_num=8, class_num=7, momentum=0.9, wx=0.2, wy=0.5)
    assert names_and_shapes(network) == 430660058
    found = numbers(network, lambda n, x, y: n(x, y)[-1], 7)
    golden = [
        *(1.8952981874737922, 2.4064888108636646, 2940.242746107755, 797.8112983242531),
        *(1390.7247253407675, 1.405184048148312),
    ]
    assert found == pytest.approx(golden, rel=1e-9)


def test_imagenet_names_and_a_unit_that_is_twice_in_a_chain():
    """The official list of sources has such a unit once, so the third unit's weights go into the second average."""
    with torch.device("meta"):
        network = mlaan.resnet34(local_module_num=16)
    assert names_and_shapes(network) == 2924393107
    assert mlaan.resnet34.resnet34 is mlaan.resnet34  # the official script says networks.resnet34.resnet34
    last, averages = network.layer4[2], network.EMA_Net[13]
    (link,) = [k for k in network.local.links if k.block == 13 and k.sources[0].value is last.conv1.weight]
    assert link.targets[0].value is averages[1].conv1.weight


def test_copies_start_as_the_units_but_those_of_imagenet():
    torch.manual_seed(0)
    network = mlaan.resnet32(batch_size=4, local_module_num=8)
    assert torch.equal(network.Aug_Net[3][0].conv1.weight, network.layer3[0].conv1.weight)
    assert torch.equal(network.EMA_Net[6][1].conv1.weight, network.layer3[4].conv1.weight)
    assert network.Update_Net[6][1] is network.layer3[4]


def test_arguments_that_the_official_code_cannot_run_with():
    for make, options, message in (
        (
            mlaan.resnet32,
            {"local_module_num": 16},
            "local_module_num: got 16; the repository cuts resnet32 into 1, 8, 15",
        ),
        (mlaan.resnet110, {"local_module_num": 55}, "the repository cuts resnet110 into 1, 32, 54"),
        (
            mlaan.resnet34,
            {},
            "local_module_num: the repository's backprop of resnet34 leaves out its max-pool; give 16",
        ),
        (mlaan.resnet101, {"local_module_num": 34}, "the repository cuts resnet101 into 1, 33"),
    ):
        batch_size = {"batch_size": 4} if make in (mlaan.resnet32, mlaan.resnet110) else {}
        with torch.device("meta"), pytest.raises(ArgumentError, match=message):
            make(**batch_size, **options)
