"""Networks and heads written with the operators compute what their modules compute."""

import copy

import pytest
import torch
from torch import nn

from fastlocal import models
from fastlocal.models.residual import BasicBlock, Bottleneck
from fastlocal.ops import modules
from fastlocal.ops._dispatch import as_on_gpu
from fastlocal.ops.modules import AvgPool, FusedSequential, global_mean


class Plain(nn.Module):
    """A residual block's own modules, called one by one."""

    def __init__(self, unit):
        super().__init__()
        self.unit = unit

    def forward(self, x):
        u = self.unit
        out = u.relu(u.bn1(u.conv1(x)))
        if isinstance(u, Bottleneck):
            out = u.bn3(u.conv3(u.relu(u.bn2(u.conv2(out)))))
        else:
            out = u.bn2(u.conv2(out))
        return u.relu(out + (x if u.downsample is None else u.downsample(x)))


def conv(channels_in, channels_out, **options):
    return nn.Conv2d(channels_in, channels_out, 3, padding=1, **options)


CHAINS = {
    "conv bn relu": lambda: [conv(3, 6), nn.BatchNorm2d(6), nn.ReLU()],
    "bn relu conv": lambda: [nn.BatchNorm2d(3), nn.ReLU(inplace=True), conv(3, 4)],
    "bn relu pool": lambda: [conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(), AvgPool(), nn.Linear(6, 4)],
    "leaky": lambda: [conv(3, 6), nn.BatchNorm2d(6), nn.LeakyReLU(0.2), conv(6, 4), nn.BatchNorm2d(4), nn.LeakyReLU()],
    "unknown activation": lambda: [conv(3, 6), nn.BatchNorm2d(6), nn.SiLU(), conv(6, 4)],
    "vectors": lambda: [nn.Flatten(), nn.Linear(108, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Linear(8, 4)],
    "unit and pool": lambda: [BasicBlock(3, 4, 2), BasicBlock(4, 4), AvgPool(), nn.Linear(4, 2)],
    "bottleneck and pool": lambda: [Bottleneck(3, 2), AvgPool(), nn.BatchNorm1d(8), nn.Linear(8, 2)],
    "bn alone": lambda: [nn.BatchNorm2d(3), conv(3, 4)],
}


def run(net, x):
    x = x.clone().requires_grad_()
    out = net(x)
    (out.square().sum() + out.sum()).backward()
    state = [b.clone() for b in net.buffers()]
    return [out.detach(), x.grad, *(p.grad for p in net.parameters()), *state]


def same(got, wanted):
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gpu", [False, True], ids=["auto", "as on a gpu"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("chain", CHAINS)
def test_a_chain_is_its_members_in_order(chain, training, gpu):
    torch.manual_seed(0)
    fused = FusedSequential(*CHAINS[chain]()).double().train(training)
    plain = nn.Sequential(*copy.deepcopy(list(fused)))
    for i, member in enumerate(plain):
        if isinstance(member, (BasicBlock, Bottleneck)):
            plain[i] = Plain(member)
    assert [p.shape for p in fused.parameters()] == [p.shape for p in plain.parameters()]
    x = torch.randn(5, 3, 6, 6, dtype=torch.float64)
    wanted = run(plain, x)
    if gpu:
        with as_on_gpu():
            got = run(fused, x)
    else:
        got = run(fused, x)
    same(got, wanted)


@pytest.mark.parametrize(
    "unit", [BasicBlock(4, 4), BasicBlock(4, 8, 2), BasicBlock(4, 4, dropout=0.3), Bottleneck(4, 2)]
)
def test_pooled_is_the_mean_of_the_map(unit):
    unit = copy.deepcopy(unit).double()
    x = torch.randn(4, 4, 8, 8, dtype=torch.float64)
    for context in (torch.no_grad, as_on_gpu):
        with context():
            torch.manual_seed(1)
            wanted = global_mean(copy.deepcopy(unit)(x))
            torch.manual_seed(1)
            assert torch.allclose(copy.deepcopy(unit).pooled(x), wanted)


@pytest.mark.parametrize("at", range(6))
def test_members_with_hooks_are_called(at):
    """Every member is seen, whichever one is watched."""
    net = FusedSequential(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 4), nn.BatchNorm2d(4), nn.ReLU(), AvgPool())
    seen = []
    net[at].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    with as_on_gpu():
        net(torch.randn(2, 3, 8, 8))
    assert seen == [(2, 4, 8, 8)]


def test_hooks_on_all_modules_see_every_member():
    net = FusedSequential(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 4), nn.BatchNorm2d(4), nn.ReLU(), AvgPool())
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(type(module)))
    try:
        with as_on_gpu():
            net(torch.randn(2, 3, 8, 8))
            unit, calls = BasicBlock(3, 4, 2), len(seen)
            unit(torch.randn(2, 3, 8, 8))
    finally:
        handle.remove()
    assert seen[:calls] == [*map(type, net), FusedSequential]
    assert seen[calls:].count(nn.ReLU) == 2 and seen[calls:].count(nn.BatchNorm2d) == 3


def test_hooks_inside_residual_blocks_are_called():
    for name in ("conv1", "bn1", "relu", "conv2", "bn2", "downsample", "downsample.0", "downsample.1"):
        unit, calls = BasicBlock(3, 4, 2), []
        unit.get_submodule(name).register_forward_hook(lambda module, args, out, calls=calls: calls.append(1))
        with as_on_gpu():
            unit(torch.randn(2, 3, 8, 8))
        assert len(calls) == (2 if name == "relu" else 1), name


def test_a_replaced_activation_is_the_one_that_runs():
    torch.manual_seed(0)
    unit = BasicBlock(3, 4, 2).double()
    unit.relu = nn.SiLU()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    with as_on_gpu():
        got = run(copy.deepcopy(unit), x)
        pooled = copy.deepcopy(unit).pooled(x)
    same(got, run(Plain(copy.deepcopy(unit)), x))
    assert torch.allclose(pooled, global_mean(Plain(unit)(x)))


def test_statistics_move_once_a_forward():
    for net in (models.resnet20(), models.vgg8b(img_size=32, feat_mult=0.1), models.dgl_cnn(feature_size=8)):
        with as_on_gpu():
            net(torch.randn(4, 3, 32, 32)).sum().backward()
        counts = {int(m.num_batches_tracked) for m in net.modules() if hasattr(m, "num_batches_tracked")}
        assert counts == {1}


def test_readout_of_a_chain():
    relu, linear = nn.ReLU(), nn.Linear(4, 2)
    assert FusedSequential(conv(3, 4), AvgPool(), linear).readout() == (1, linear, True)
    assert FusedSequential(AvgPool(), linear).readout() == (0, linear, True)
    assert FusedSequential(nn.BatchNorm2d(4), relu, AvgPool(), linear).readout() == (3, linear, False)
    assert FusedSequential(relu, linear).readout() == (1, linear, False)
    assert FusedSequential(conv(3, 4), relu).readout() is None
    assert FusedSequential(linear).readout() == (0, linear, False)
    assert FusedSequential().readout() is None
    hooked = FusedSequential(conv(3, 4), AvgPool(), nn.Linear(4, 2))
    hooked[2].register_forward_hook(lambda *_: None)
    assert hooked.readout() is None
    watched = FusedSequential(nn.BatchNorm2d(4), relu, AvgPool(), linear)
    watched[2].register_forward_hook(lambda *_: None)
    assert watched.readout() is not None and watched.readout()[0] == 3


def test_groups_are_found_once_for_each_chain_of_types():
    before = modules._groups.cache_info().misses
    for _ in range(3):
        FusedSequential(nn.BatchNorm2d(4), nn.LeakyReLU(), conv(4, 4), nn.Tanh())(torch.randn(2, 4, 8, 8))
    assert modules._groups.cache_info().misses == before + 1
