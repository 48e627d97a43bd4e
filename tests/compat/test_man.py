"""MAN's networks against numbers of the official code: its oracles, and other depths, blocks, classes and arguments."""

import copy
import pickle
import zlib

import pytest
import torch
from torch import nn

from fastlocal.compat import man
from fastlocal.errors import ArgumentError
from tests.compat.official import arguments, check_compat
from tests.methods.oracles import load, official_value

WEIGHTS = {"ixx_1": 5, "ixy_1": 0.5, "ixx_2": 0, "ixy_2": 0}


def cifar(network, x, y):
    _, loss = network(img=x * 2 - 1, target=y, **WEIGHTS)
    return [loss]


def imagenet(network, x, y):
    normalised = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / 0.226
    _, loss = network(x=normalised, initial_image=x, target=y, criterion=nn.CrossEntropyLoss(), ixx_r=1, ixy_r=1)
    return [loss]


def numbers(network, call, *, rows, size, classes, steps):
    """What is compared: a sum over the names in the state_dict, every loss that the network returns, the norms of trained and
    of frozen parameters after all steps, summed, and an evaluation. In float64, from values that follow from the names.
    """
    network = network.double()
    with torch.no_grad():
        for name, p in network.named_parameters():
            p.copy_(official_value(name, tuple(p.shape)))
    names = zlib.crc32("\n".join(network.state_dict()).encode())
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4)
    losses = []
    for k in range(steps):
        g = torch.Generator().manual_seed(k)
        x = torch.rand(rows, 3, size, size, generator=g, dtype=torch.float64)
        y = torch.randint(0, classes, (rows,), generator=g)
        network.train()
        optimizer.zero_grad()
        losses += [float(loss.detach()) for loss in call(network, x, y)]
        optimizer.step()
    network.eval()
    with torch.no_grad():
        logits = network(x, y)[0] if call is cifar else network(x)
    norms = [float(sum(p.detach().norm() for p in network.parameters() if p.requires_grad is k)) for k in (True, False)]
    return [names, *losses, *norms, float(logits[0].norm())]


def agree(ours, golden):
    assert ours[0] == golden[0]
    assert ours[1:] == pytest.approx(golden[1:], rel=1e-9)


CIFAR = {
    "R110 K32": (man.resnet110, {"local_module_num": 32, "class_num": 100, "dataset": "svhn"}, {"rows": 4, "steps": 1}),
    "R32 K3": (
        man.resnet32,
        {"local_module_num": 3, "aux_net_config": "0c2f", "local_loss_mode": "cross_entropy", "momentum": 0.5},
        {"rows": 4, "steps": 2},
    ),
    "R32 K2 48": (
        man.resnet32,
        {"local_module_num": 2, "aux_net_widen": 2, "aux_net_feature_dim": 32, "image_size": 48, "dataset": "stl10"},
        {"rows": 4, "steps": 2, "size": 48},
    ),
}
IMAGENET = {"local_module_num": 2, "momentum": 0.5, "num_classes": 7}

# From the official networks.
GOLDEN: dict[str, list[float]] = {
    "R110 K32": [1150201274, 7.569323740867936, 4011.310643780807, 684.7644883559872, 3.428143201052965],
    "R32 K3": [
        3902235982,
        2.5337359510055704,
        2.5243162302985747,
        725.9690970883461,
        67.0574244088199,
        0.5156009572353359,
    ],
    "R32 K2 48": [
        2639436503,
        2.1805427548579286,
        2.3434509111489956,
        980.9651600718257,
        20.105115409800575,
        0.5131544101025168,
    ],
    "ImageNet K2": [587164148, 1.9308668183322895, 1375.295675102441, 71.25935270876371, 5.083985476192274],
}


@pytest.mark.parametrize("name", ["man_infopro_resnet32_K8", "man_infopro_resnet32_K16"])
def test_oracles(name):
    oracle = load(name)
    worst = check_compat(name, lambda: man.resnet32(**arguments(oracle)))
    assert {"loss", "logits", "gradient", "param norm", "param sum", "bn norm", "eval logits"} <= set(worst)


@pytest.mark.parametrize("case", CIFAR)
def test_other_arguments(case):
    build, options, run = CIFAR[case]
    torch.manual_seed(0)
    network = build(batch_size=8, **options)
    classes = options.get("class_num", 10)
    agree(numbers(network, cifar, classes=classes, **{"size": 32, **run}), GOLDEN[case])


def test_imagenet():
    """Fewer blocks in a stage than a ResNet-101 has, at the same cut."""
    torch.manual_seed(0)
    network = man.ResNet(man.Bottleneck, [1, 2, 1, 3], arch="resnet101", **IMAGENET)
    agree(numbers(network, imagenet, rows=2, size=224, classes=7, steps=1), GOLDEN["ImageNet K2"])


def test_one_block_is_backprop_with_all_that_is_allocated():
    torch.manual_seed(0)
    network = man.resnet32(batch_size=4, local_module_num=1)
    assert hasattr(network, "decoder_3_4") and len(network.LB) == 0 and len(network.Encoder_Net) == 1
    logits, loss = network(torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]))
    assert logits.shape == (4, 10) and not loss.requires_grad
    with_grad = {name.split(".")[0] for name, p in network.named_parameters() if p.grad is not None}
    assert with_grad == {"conv1", "bn1", "layer1", "layer2", "layer3", "fc64"}
    logits, loss = network.eval()(torch.rand(4, 3, 32, 32))
    assert loss is None
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(network.forward_original(x), network(x)[0])


def test_copies_share_nothing_and_go_on_together():
    """A deep copy and a pickle train as the network does: averages read the copy's own units."""
    torch.manual_seed(0)
    network = man.resnet32(batch_size=4, local_module_num=4, local_loss_mode="cross_entropy", momentum=0.5)
    x, y = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    others = [copy.deepcopy(network), pickle.loads(pickle.dumps(network))]
    before = network.EMA_Net[0].conv1.weight.clone()
    network(x, y, **WEIGHTS)
    moved = network.EMA_Net[0].conv1.weight
    assert torch.equal(moved, torch.lerp(before, network.layer1[3].conv1.weight.detach(), 0.5)) and not torch.equal(
        moved, before
    )
    for other in others:
        assert torch.equal(other.EMA_Net[0].conv1.weight, before)
        other(x, y, **WEIGHTS)
        assert torch.equal(other.EMA_Net[0].conv1.weight, moved)
        for p, q in zip(network.parameters(), other.parameters()):
            assert (p.grad is None) == (q.grad is None) and (p.grad is None or torch.equal(p.grad, q.grad))


def test_the_three_draws_of_a_unit_are_independent():
    network = man.resnet32(batch_size=4, local_module_num=4)
    unit, lb, ema = (m.conv2.weight.detach().flatten() for m in (network.layer2[2], network.LB[1], network.EMA_Net[1]))
    for a, b in ((unit, lb), (unit, ema), (lb, ema)):
        assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.1
    assert ema.std() == pytest.approx((2 / (9 * 32)) ** 0.5, rel=0.05)
    assert not any(p.requires_grad for p in network.EMA_Net.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local_module_num": 5}, "local_module_num: got 5; there are cuts of resnet32 on cifar10.*1, 2, 3, 4, 8, 16"),
        ({"local_module_num": 4, "balanced_memory": True}, "local_module_num: got 4"),
        ({"local_module_num": 2, "wide_list": (8, 8, 16, 32)}, "wide_list"),
        ({"local_module_num": 2, "aux_net_config": "3c1f"}, "config: got '3c1f'"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        man.resnet32(batch_size=4, **options)


def test_refused_on_imagenet():
    for options, message in (
        ({"block": nn.Linear, "local_module_num": 2}, "block: the heads read"),
        ({"local_module_num": 4}, "local_module_num: got 4; resnet101 is cut into 2 of blocks"),
        ({"local_module_num": 1}, "local_module_num: got 1"),
    ):
        arguments_ = {"block": man.Bottleneck, "layers": [1, 2, 1, 3], "arch": "resnet101", **options}
        with pytest.raises(ArgumentError, match=message), torch.device("meta"):
            man.ResNet(**arguments_)
    with pytest.raises(ArgumentError, match="pretrained"):
        man.resnet152(pretrained=True, local_module_num=2)


def test_a_missing_target_or_image_is_named():
    network = man.resnet32(batch_size=4, local_module_num=2)
    with pytest.raises(ArgumentError, match="target"):
        network(torch.rand(4, 3, 32, 32))
