"""MAN++'s networks against numbers of the official code: its oracles, and other depths, blocks, classes and arguments."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fastlocal.compat import man_plus_plus
from fastlocal.errors import ArgumentError
from tests.compat.official import arguments, check_compat
from tests.compat.test_man import agree, cifar, imagenet, numbers
from tests.methods.oracles import load


def block_by_block(network, x, y):
    """The official ImageNet script with ``resnetInfoPro_MANPP_ddp``."""
    h, losses = (x - 0.45) / 0.226, []
    for _ in range(network.local_module_num):
        h, loss = network(x=h, initial_image=x, target=y, criterion=nn.CrossEntropyLoss(), ixx_r=1, ixy_r=1)
        loss.backward()
        losses.append(loss)
    return losses


def vit(network, x, y):
    """The official ViT script."""
    h, losses = x, []
    model = getattr(network, "module", network)
    for k in range(model.num_aux_stages):
        h, loss, following = network(h, y)
        assert int(following) == model.gidx == k + 1 and not h.requires_grad
        loss.backward()
        losses.append(loss)
    _, loss = network(h, y)
    loss.backward()
    return [*losses, loss]


SVHN = {"local_module_num": 8, "class_num": 100, "dataset": "svhn", "aux_net_config": "1c3f", "momentum": 0.5}
CIFAR = {
    "R32 K8": ("resnetInfoPro_MANPP", "resnet32", SVHN, {"classes": 100, "steps": 2}),
    "DGL R32 K8": (
        "resnetDGL_MANPP",
        "resnet32",
        {"local_module_num": 8, "aux_net_feature_dim": 32, "momentum": 0.5},
        {"classes": 10, "steps": 2},
    ),
}
IMAGENET = {"local_module_num": 2, "momentum": 0.5, "num_classes": 7}
VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "num_heads": 3, "num_classes": 7, "momentum": 0.5}

# From the official networks.
GOLDEN: dict[str, list[float]] = {
    "R32 K8": [
        4101277269,
        5.557947996036768,
        5.870937935435384,
        1312.940635400138,
        156.72030399180835,
        1.4373440578622012,
    ],
    "DGL R32 K8": [
        3010065092,
        2.5337359510055704,
        2.4296538661476763,
        2114.1903597662026,
        157.07850186493022,
        0.5139477063213087,
    ],
    "ImageNet one call": [1958107667, 1.9308668183322895, 1376.295162741701, 71.25935270876371, 5.083985476192274],
    "ImageNet block by block": [
        1958107667,
        8.902565612869118,
        1.9210026795810988,
        1376.2945058021776,
        71.25935270876371,
        5.079216793386176,
    ],
    "ViT 8": [
        3008637334,
        1.7613512625695844,
        2.3369673426948343,
        2.569340859811397,
        3.162290674554717,
        1.7900543509935736,
        2.53494659094519,
        1.4952329527143216,
        1.5056839661423995,
        512.8082472858988,
        85.21188995445165,
        2.502917338864202,
    ],
    "ViT 12": [
        2794902424,
        2.0285078492615196,
        2.005649139457092,
        2.3879496312856117,
        2.1731331098533393,
        1.7954442872759373,
        2.512923337055745,
        1.74841184898857,
        1.5920550183118027,
        646.2830814597294,
        84.75979094417303,
        2.020173019340041,
    ],
}


@pytest.mark.parametrize("kind", ["infopro", "dgl"])
def test_oracles(kind):
    name = f"manpp_{kind}_resnet32_K16"
    oracle = load(name)
    build = man_plus_plus.resnet32 if kind == "infopro" else man_plus_plus.resnet32_dgl
    worst = check_compat(name, lambda: build(**arguments(oracle)))
    assert {"loss", "logits", "gradient", "param norm", "param sum", "bn norm", "eval logits"} <= set(worst)


@pytest.mark.parametrize("case", CIFAR)
def test_other_arguments(case):
    module, factory, options, run = CIFAR[case]
    torch.manual_seed(0)
    network = getattr(getattr(man_plus_plus, module), factory)(batch_size=8, **options)
    agree(numbers(network, cifar, rows=4, size=32, **run), GOLDEN[case])


@pytest.mark.parametrize("form", ["one call", "block by block"])
def test_imagenet(form):
    """Fewer blocks in a stage than a ResNet-101 has, at the same cut. With a momentum of 0.5 it shows whether the gradient
    goes through the average of before or of after its move.
    """
    kind, call = {
        "one call": (man_plus_plus.ResNet, imagenet),
        "block by block": (man_plus_plus.ResNetDDP, block_by_block),
    }[form]
    torch.manual_seed(0)
    network = kind(man_plus_plus.man.Bottleneck, [1, 2, 1, 3], arch="resnet101", **IMAGENET)
    agree(numbers(network, call, rows=2, size=224, classes=7, steps=1), GOLDEN[f"ImageNet {form}"])


@pytest.mark.parametrize("depth", [8, 12])
def test_vit(depth):
    torch.manual_seed(0)
    network = man_plus_plus.MANPPVisionTransformer(depth=depth, **VIT)
    agree(numbers(network, vit, rows=3, size=16, classes=7, steps=2), GOLDEN[f"ViT {depth}"])


def test_vit_under_ddp(tmp_path):
    """One process, as the script wraps it: the calls of one step find their own parameters."""
    torch.manual_seed(0)
    network = man_plus_plus.MANPPVisionTransformer(depth=8, **VIT)
    x, y = torch.rand(3, 3, 16, 16), torch.tensor([0, 3, 6])
    losses = vit(network, x, y)
    grads = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    torch.manual_seed(0)
    network = man_plus_plus.MANPPVisionTransformer(depth=8, **VIT)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        again = vit(nn.parallel.DistributedDataParallel(network, find_unused_parameters=True), x, y)
    finally:
        dist.destroy_process_group()
    assert torch.equal(torch.stack(losses), torch.stack(again))
    assert grads and all(torch.equal(p.grad, grads[name]) for name, p in network.named_parameters() if name in grads)
    assert {name for name, p in network.named_parameters() if p.requires_grad} == set(grads)


def test_scales_are_trained_and_evaluation_keeps_its_place():
    torch.manual_seed(0)
    network = man_plus_plus.resnet32_dgl(batch_size=4, local_module_num=4)
    x, y = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    network(x, y)
    assert network.ema_s_first.grad is not None and all(s.grad is not None for s in network.ema_s)
    assert network.ema_s_first.item() == 1 and len(network.ema_s) == 3
    transformer = man_plus_plus.manpp_vit_tiny_patch16_224(num_classes=5, depth=8, img_size=16, patch_size=8)
    h, _, _ = transformer(torch.rand(2, 3, 16, 16), torch.tensor([0, 1]))
    transformer.eval()(torch.rand(2, 3, 16, 16))
    assert transformer.gidx == 1
    transformer.train()(h, torch.tensor([0, 1]))
    assert transformer.gidx == 2


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        ("resnet32", {"batch_size": 4, "local_module_num": 5}, "local_module_num: got 5"),
        ("resnet101", {"local_module_num": 3}, "local_module_num: got 3; resnet101 is cut into 2, 4 of blocks"),
        ("manpp_vit_tiny_patch16_224", {"groups": 2}, "groups: got 2; this network has 4"),
        ("manpp_vit_tiny_patch16_224", {"drop_path_ratio": 0.1}, "drop_path_ratio: got 0.1"),
        ("manpp_vit_tiny_patch16_224", {"depth": 6}, "depth: got 6; give a multiple of 4"),
        ("manpp_vit_tiny_patch16_224", {"depth": 4}, "depth: got 4.*at least 8"),
    ],
)
def test_refused(build, options, message):
    with pytest.raises(ArgumentError, match=message), torch.device("meta"):
        getattr(man_plus_plus, build)(**options)


def test_a_step_without_labels_is_refused():
    network = man_plus_plus.MANPPVisionTransformer(depth=8, **VIT)
    with pytest.raises(ArgumentError, match="target: a training step"):
        network(torch.rand(2, 3, 16, 16))
