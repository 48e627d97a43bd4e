"""HPFF's networks against the official code's numbers, by the official names alone."""

import json
import zlib

import pytest
import torch

from fastlocal.compat import hpff
from fastlocal.errors import ArgumentError
from tests.compat.official import arguments, check_compat
from tests.methods.oracles import load, official_value


def names_and_shapes(network):
    return zlib.crc32(json.dumps([[name, list(t.shape)] for name, t in network.state_dict().items()]).encode())


def numbers(network, call, classes):
    """Two steps in float64 from values that follow from the names: both losses, then, summed over tensors, the norms of trained
    and of frozen parameters and of buffers, and the norm of logits in evaluation.
    """
    network = network.double()
    with torch.no_grad():
        for name, tensor in (*network.named_parameters(), *network.named_buffers()):
            tensor.copy_(official_value(name, tuple(tensor.shape)))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-4)
    found = []
    for k in range(2):
        g = torch.Generator().manual_seed(k)
        x = torch.rand(4, 3, 32, 32, generator=g, dtype=torch.float64)
        y = torch.randint(0, classes, (4,), generator=g)
        network.train()
        optimizer.zero_grad()
        found.append(call(network, x, y).item())
        optimizer.step()
    for kind in (True, False):
        found.append(float(sum(p.detach().norm() for p in network.parameters() if p.requires_grad is kind)))
    found.append(float(sum(b.double().norm() for b in network.buffers())))
    network.eval()
    with torch.no_grad():
        return [*found, float(network(x, y)[0].norm())]


def test_oracle():
    oracle = load("hpff_infopro_resnet32_K16")

    def call(network, x, y):
        logits, same, loss = network(img=x, target=y, **oracle["loss_weights"])
        assert logits is same
        return logits, loss

    worst = check_compat("hpff_infopro_resnet32_K16", lambda: hpff.resnet32(**arguments(oracle)), call)
    assert {"loss", "logits", "gradient", "param norm", "param sum", "bn norm", "eval logits"} <= set(worst)


@pytest.mark.parametrize(
    ("depth", "options", "image", "names", "golden"),
    [
        (
            32,
            {"local_module_num": 4, "class_num": 7, "aux_net_config": "1c3f", "wx": 0.1, "wy": 0.7},
            lambda x: x * 0.9 - 0.5,
            3399156805,
            [1.498090940349646, 1.8791993663003332, 937.0328424464383, 0.0, 548.541862854473, 1.3829881288993942],
        ),
        (
            110,
            {
                **{"local_module_num": 3, "balanced_memory": True, "dataset": "stl10", "aux_net_config": "2c2f"},
                **{"local_loss_mode": "cross_entropy", "aux_net_widen": 2, "aux_net_feature_dim": 32},
            },
            lambda x: (x * 0.98 + 0.01 - 0.5) / 0.5,
            3114057011,
            [3.5002784643969127, 12.44785332363196, 1777.8473265741206, 0.0, 1723.9814186041085, 826.8611794246586],
        ),
    ],
)
def test_other_depths_cuts_classes_and_heads(depth, options, image, names, golden):
    """From the official code, run in float64 on one thread."""
    torch.manual_seed(0)
    network = getattr(hpff, f"resnet{depth}")(batch_size=4, **options)
    assert names_and_shapes(network) == names
    weights = {"ixx_1": 5, "ixy_1": 0.5, "ixx_2": 0.1, "ixy_2": 0.7}
    found = numbers(network, lambda n, x, y: n(image(x), y, **weights)[-1], options.get("class_num", 10))
    assert found == pytest.approx(golden, rel=1e-9)


@pytest.mark.parametrize(("net", "blocks", "names"), [("resnet50", 4, 2785618542), ("resnext101_32x8d", 4, 2636248411)])
def test_names_of_the_imagenet_networks(net, blocks, names):
    with torch.device("meta"):
        network = getattr(hpff, net)(local_module_num=blocks)
    assert names_and_shapes(network) == names


def test_arguments_that_the_official_code_cannot_run_with():
    for make, options, message in (
        (
            hpff.resnet32,
            {"local_module_num": 15},
            "local_module_num: got 15; the repository cuts resnet32 into 1, 2, 3, 4, 8, 16",
        ),
        (hpff.resnet32, {"local_module_num": 2, "balanced_memory": True}, "cuts resnet32 into 1 local modules"),
        (hpff.resnet32, {"local_module_num": 2, "wide_list": (8, 8, 16, 32)}, "wide_list: got"),
        (
            hpff.resnet101,
            {"local_module_num": 2},
            "local_module_num: got 2; the repository cuts resnet101 into 1, 4, 8",
        ),
        (hpff.resnet101, {"local_module_num": 4, "pretrained": True}, "pretrained: weights are not downloaded"),
    ):
        batch_size = {"batch_size": 4} if make is hpff.resnet32 else {}
        with torch.device("meta"), pytest.raises(ArgumentError, match=message):
            make(**batch_size, **options)
