"""Small cases worked by hand, and the backprop costs of the CIFAR ResNets."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastlocal.blocks import measure
from fastlocal.blocks.measure import (
    BlockPasses,
    LaunchCounter,
    MacCounter,
    SavedBytes,
    StorageTracker,
    count_macs,
    measure_step,
    multi_tensor_launches,
    register_launches,
)
from fastlocal.errors import ArgumentError
from fastlocal.models import resnet32, resnet110

FLOAT = 4  # bytes


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------------------------------- launches


def test_conv_bn_relu_forward_and_backward() -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(inplace=True))
    images, grad = torch.randn(4, 2, 8, 8), torch.randn(4, 3, 6, 6)
    with LaunchCounter() as forward:
        out = net(images)
    assert forward.by_op == {"aten::convolution": 1, "aten::native_batch_norm": 1, "aten::relu_": 1, "aten::add_": 1}
    with LaunchCounter() as backward:
        out.backward(grad)
    assert backward.by_op == {
        "aten::threshold_backward": 1,
        "aten::native_batch_norm_backward": 1,
        "aten::convolution_backward": 1,
    }


def test_gradients_accumulated_into_existing_ones_are_launches() -> None:
    linear, x = nn.Linear(3, 2), torch.randn(5, 3)
    with LaunchCounter() as first:
        linear(x).sum().backward()
    # addmm, sum, the gradient that starts the backward, weight gradient (mm), bias gradient (sum)
    assert first.total == 5
    assert first.by_op == {"aten::addmm": 1, "aten::sum": 2, "aten::ones_like": 1, "aten::mm": 1}
    with LaunchCounter() as second:
        linear(x).sum().backward()
    assert second.total == 7
    assert second.by_op - first.by_op == {"aten::add_": 2}


def test_views_allocations_and_metadata_are_not_launches() -> None:
    x = torch.randn(4, 6)
    with LaunchCounter() as counter, torch.profiler.record_function("label"):
        x.view(6, 4).t().unsqueeze(0).expand(3, 4, 6)[..., 1:].detach()
        x.split(2, dim=1)
        torch.empty(3), torch.empty_like(x), x.new_empty(2), torch.empty_strided((2, 2), (2, 1))
        torch.empty(4, 1).squeeze_(1).resize_(9)
        torch.tensor([1.0])
        x.reshape(24), x.contiguous(), x.to(torch.float32), x.size(0)
    assert counter.total == 0, counter.report()
    with LaunchCounter() as counter:
        x.t().contiguous()  # this one copies
        x.to(torch.float64)
        x.sum().item()
    assert counter.by_op == {"aten::clone": 1, "aten::_to_copy": 1, "aten::sum": 1, "aten::_local_scalar_dense": 1}


def test_composite_operators_of_inference_mode_count_as_their_parts() -> None:
    linear, x = nn.Linear(3, 2), torch.randn(5, 3)
    with torch.inference_mode(), LaunchCounter() as outer, LaunchCounter() as inner:
        linear(x).reshape(10)
    assert outer.by_op == inner.by_op == {"aten::addmm": 1}


def test_multi_tensor_launches() -> None:
    for depth, limit in enumerate((110, 64, 48, 36, 30), 1):
        assert multi_tensor_launches([7] * limit, depth) == 1
        assert multi_tensor_launches([7] * (limit + 1), depth) == 2
    assert multi_tensor_launches([], 1) == 0
    assert multi_tensor_launches([0, 5, 0], 2) == 1
    # 320 blocks fill a launch, inside a tensor or at its end
    assert multi_tensor_launches([320 * 65536], 1) == 1
    assert multi_tensor_launches([320 * 65536 + 1], 1) == 2
    assert multi_tensor_launches([319 * 65536, 65537, 3], 1) == 2
    with pytest.raises(ArgumentError, match=r"depth must be 1 to 5 tensor lists, got 6"):
        multi_tensor_launches([1], 6)


@pytest.mark.parametrize(
    ("call", "launches"),
    [
        (lambda a, b: torch._foreach_mul_(a, 2.0), 1),  # one list, 110 a launch
        (lambda a, b: torch._foreach_mul_(a, [2.0] * 100), 2),  # one list with a list of numbers, 96 a launch
        (lambda a, b: torch._foreach_add_(a, b), 2),  # two lists, 64
        (lambda a, b: torch._foreach_mul(a, 2.0), 2),  # the results are the second list
        (lambda a, b: torch._foreach_add(a, b), 3),  # the results are the third, 48
        (lambda a, b: torch._foreach_maximum_(a, b), 2),
        (lambda a, b: torch._foreach_norm(a), 3),  # one pass, and clearing and joining the partial results
        (lambda a, b: torch._amp_foreach_non_finite_check_and_unscale_(a, torch.zeros(1), torch.ones(1)), 1),
    ],
)
def test_foreach_operators(call, launches: int) -> None:
    a, b = ([torch.randn(3) for _ in range(100)] for _ in range(2))
    with LaunchCounter() as counter:
        call(a, b)
    counted = {name: n for name, n in counter.by_op.items() if "foreach" in name}
    assert list(counted.values()) == [launches]


@pytest.mark.parametrize(
    ("make", "launches"),
    [
        (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True), 3),  # 3 lists, 48
        (lambda p: torch.optim.SGD(p, 0.1, fused=True), 2),  # 2 lists, 64
        (lambda p: torch.optim.AdamW(p, 0.1, fused=True), 3),  # 4 lists, 36; the step counters are no list
        (lambda p: torch.optim.AdamW(p, 0.1, fused=True, amsgrad=True), 4),  # 5 lists, 30
    ],
)
def test_fused_optimizers(make, launches: int) -> None:
    params = [nn.Parameter(torch.randn(3)) for _ in range(100)]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = make(params)
    optimizer.step()
    with LaunchCounter() as counter:
        optimizer.step()
    assert [n for name, n in counter.by_op.items() if "fused" in name] == [launches]
    assert not any("profiler" in name for name in counter.by_op)


def test_registered_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_registered", {})
    x = torch.randn(3)
    register_launches("aten::relu", 3)
    register_launches("aten::stack", lambda args, kwargs: len(args[0]))
    with LaunchCounter() as counter:
        x.relu()
        torch.stack([x, x, x, x])
    assert counter.by_op == {"aten::relu": 3, "aten::stack": 4}
    assert counter.report().splitlines() == ["       4  aten::stack", "       3  aten::relu", "       7  total"]


@pytest.mark.parametrize("bad", [("relu", 1), ("aten::relu.default", 1), ("aten::relu", -1), ("aten::relu", 1.5)])
def test_register_launches_refuses(bad) -> None:
    with pytest.raises(ArgumentError, match=r"op_name must be|launches must be"):
        register_launches(*bad)


def test_launches_by_device() -> None:
    x = torch.randn(3, device="meta")
    with LaunchCounter("meta") as counter:
        torch.randn(3).relu()
        (x + 1).sum()
    assert counter.by_op == {"aten::add": 1, "aten::sum": 1}


# ---------------------------------------------------------------------------------------------------------- saved bytes


def test_saved_bytes_of_relu_pow() -> None:
    x = torch.randn(10, requires_grad=True)
    with SavedBytes(timeline=True) as saved:
        y = x.relu().pow(2)  # relu saves its result, pow saves its input: one storage
        assert saved.current == 10 * FLOAT
        z = x.exp()
        assert saved.current == saved.peak == 20 * FLOAT
        y.sum().backward()
        assert saved.current == 10 * FLOAT
        del z
    assert (saved.current, saved.peak) == (0, 20 * FLOAT)
    assert saved.timeline == [n * FLOAT for n in (10, 20, 10, 0)]


def test_saved_bytes_outlive_the_context_and_give_the_same_gradient() -> None:
    x = torch.randn(10, requires_grad=True)
    with SavedBytes() as saved:
        y = x.sin().exp()
    (expected,) = torch.autograd.grad(x.sin().exp().sum(), x)
    assert saved.current == 20 * FLOAT  # x for the sine, the result for the exponential
    y.sum().backward()
    assert saved.current == 0
    assert torch.equal(x.grad, expected)


def test_saved_bytes_count_whole_storages_without_parameters() -> None:
    linear = nn.Linear(8, 8, bias=False)
    x = torch.randn(5, 16)
    with SavedBytes(linear.parameters()) as saved:
        out = linear(x[:, :8]) + linear(x[:, 8:])  # two views of one storage
        assert saved.current == 5 * 16 * FLOAT
        out = linear(out)  # saves its input, and a view of the weight, which does not count
        assert saved.current == (5 * 16 + 5 * 8) * FLOAT
    with SavedBytes() as everything:
        out = linear(linear(x[:, :8]))
    assert everything.current == (5 * 16 + 5 * 8 + 8 * 8) * FLOAT
    del out
    assert saved.current == everything.current == 0


# ------------------------------------------------------------------------------------------------------------- storages


def test_storages_are_freed_when_python_and_autograd_let_go() -> None:
    outside = torch.randn(10)
    with StorageTracker() as tracker:
        x = torch.ones(10, requires_grad=True)
        y = x.exp()
        view = y[2:].view(2, 4)
        outside.add_(1).t_()  # not created here
        assert tracker.current == 20 * FLOAT
        z = y.sin()
        del y, view
        assert tracker.current == 30 * FLOAT  # autograd holds y
        del z
        assert tracker.current == 10 * FLOAT
        big = torch.zeros(100)
        del big
        assert tracker.peak == 110 * FLOAT
    kept = x.exp()
    assert tracker.current == 10 * FLOAT  # not created inside
    del x, kept
    assert tracker.current == 0
    assert tracker.alive() == []


def test_marks_and_alive() -> None:
    with StorageTracker() as tracker:
        tracker.mark("first")
        a = torch.zeros(5, 2)
        tracker.mark("second")
        b = torch.zeros(30)
        del b
        c = a + 1
        d = torch.tensor([1.0, 2.0])
        assert [(s.op, s.shape, s.nbytes, s.mark) for s in tracker.alive()] == [
            ("aten::zeros", (5, 2), 40, "first"),
            ("aten::add", (5, 2), 40, "second"),
            ("aten::lift_fresh", (2,), 8, "second"),
        ]
        assert [s.op for s in tracker.alive("second")] == ["aten::add", "aten::lift_fresh"]
    assert tracker.peaks == {"first": 40, "second": 160}
    del a, c, d
    assert tracker.current == 0


def test_resized_storage() -> None:
    with StorageTracker() as tracker:
        out = torch.empty(0)
        assert tracker.current == 0
        torch.add(torch.ones(6), 1, out=out)
        assert tracker.current == 6 * FLOAT
    assert out.numel() == 6


def test_gradients_and_activations_of_one_block_only() -> None:
    """The proof that a local step makes: with gradients dropped block by block, two blocks never overlap."""
    blocks = [nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(3)]

    def step(detach: bool) -> StorageTracker:
        with StorageTracker() as tracker:
            h = torch.ones(32, 16)
            for k, block in enumerate(blocks):
                tracker.mark(f"block {k}")
                h = block(h.detach() if detach else h)
                if detach or k == 2:
                    h.sum().backward()
                    block.zero_grad()
        assert sum(s.nbytes for s in tracker.alive()) == tracker.current
        return tracker

    local = step(detach=True)
    assert local.peaks["block 0"] <= local.peaks["block 1"] == local.peaks["block 2"]
    assert local.peak < step(detach=False).peak


def test_storages_of_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), StorageTracker() as tracker, LaunchCounter() as launches:
        x = torch.randn(1000, 1000)
        y = x @ x
        assert tracker.current == 8_000_000
        del x, y
    assert (tracker.current, tracker.peak) == (0, 8_000_000)
    assert launches.by_op == {"aten::randn": 1, "aten::mm": 1}


# ----------------------------------------------------------------------------------------------------------------- MACs


def test_macs_by_hand() -> None:
    x = torch.randn(2, 4, 8, 8)
    assert count_macs(nn.Conv2d(4, 6, 3, padding=1), x) == 2 * 6 * 64 * 4 * 9
    assert count_macs(nn.Conv2d(4, 6, 3, padding=1, groups=2, stride=2), x) == 2 * 6 * 16 * 2 * 9
    assert count_macs(nn.ConvTranspose2d(4, 6, 2, stride=2), x, per_image=True) == 64 * 4 * 6 * 4
    assert count_macs(nn.Linear(8, 5), x) == 2 * 4 * 8 * 8 * 5
    assert count_macs(nn.Linear(8, 5, bias=False), x[0, 0]) == 8 * 8 * 5
    assert count_macs(torch.bmm, torch.randn(3, 2, 4), torch.randn(3, 4, 5)) == 3 * 2 * 4 * 5
    assert count_macs(torch.baddbmm, torch.zeros(1), torch.randn(3, 2, 4), torch.randn(3, 4, 5)) == 3 * 2 * 4 * 5
    assert count_macs(F.relu, x) == 0
    q, kv = torch.randn(2, 3, 5, 16), torch.randn(2, 3, 7, 16)
    for grad in (False, True):
        assert count_macs(F.scaled_dot_product_attention, q.requires_grad_(grad), kv, kv) == 2 * 2 * 3 * 5 * 7 * 16
    with torch.inference_mode():
        assert count_macs(nn.Linear(8, 5), x) == 2 * 4 * 8 * 8 * 5
    with pytest.raises(ArgumentError, match="per_image"):
        count_macs(lambda: None, per_image=True)


def test_macs_of_the_backward_do_not_count() -> None:
    linear, conv = nn.Linear(8, 5), nn.Conv2d(1, 1, 3)
    with MacCounter() as macs:
        linear(torch.randn(3, 8)).square().sum().backward()
        conv(torch.randn(1, 1, 3, 3, requires_grad=True)).sum().backward()
    assert macs.by_op == {"aten::addmm": 3 * 8 * 5, "aten::convolution": 9}


# --------------------------------------------------------------------------------------------------------- block passes


def test_block_passes() -> None:
    first, second = nn.Linear(3, 3), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3))
    pair = nn.LSTM(3, 3)  # several outputs
    x = torch.randn(4, 1, 3)
    with BlockPasses({"first": first, "second": second, "pair": pair}) as passes:
        h = first(x)
        out = second(h)  # changes h in place
        out.sum().backward(retain_graph=True)
        out.sum().backward()
        with torch.no_grad():
            first(x)
        y, (state, _) = pair(second(x.clone()).detach())
        (y.sum() + state.sum()).backward()
    assert passes.forward == {"first": 2, "second": 2, "pair": 1}
    assert passes.backward == {"first": 2, "second": 2, "pair": 1}
    first(x)
    assert passes.forward["first"] == 2
    with BlockPasses([first]) as listed:
        first(x)
    assert listed.forward == {"0": 1}


# ------------------------------------------------------------------------------------------------------------- one step


def test_measure_step() -> None:
    linear = nn.Linear(3, 2)
    x = torch.randn(5, 3)
    result = measure_step(lambda: linear(x).relu().sum().backward(), linear.parameters(), device="cpu")
    assert result.launches == sum(result.launches_by_op.values()) == 7
    assert result.macs == 5 * 3 * 2
    assert result.saved_peak == (5 * 3 + 5 * 2) * FLOAT  # the input, the result of the relu
    # While the relu runs backward: its result and its input's gradient, the loss and its gradient.
    assert result.storage_peak == (5 * 2 + 5 * 2 + 1 + 1) * FLOAT


@pytest.mark.parametrize(
    ("make", "launches", "macs", "saved_mib"), [(resnet32, 268, 69.12, 2.373), (resnet110, 892, 253.15, 8.063)]
)
def test_backprop_on_cifar_resnets(make, launches: int, macs: float, saved_mib: float) -> None:
    net, images, target = make(num_classes=10), torch.randn(8, 3, 32, 32), torch.randint(0, 10, (8,))
    state = [*net.parameters(), *net.buffers()]
    result = measure_step(lambda: F.cross_entropy(net(images), target).backward(), state)
    assert result.launches == launches
    assert result.macs / 8 / 1e6 == pytest.approx(macs, abs=0.005)
    assert result.macs == 8 * count_macs(net, images, per_image=True)
    assert result.saved_peak / 8 / 2**20 == pytest.approx(saved_mib, abs=0.001)
    again = measure_step(lambda: F.cross_entropy(net(images), target).backward(), state)
    assert again.launches == launches + len(list(net.parameters()))  # gradients were there to be added to
    assert (again.macs, again.saved_peak) == (result.macs, result.saved_peak)
