import copy
import itertools
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations

import fastlocal as fl
from fastlocal import ops, reference
from fastlocal.blocks.measure import SavedBytes, StorageTracker
from fastlocal.errors import ArgumentError, BackendError
from fastlocal.ops import bn_act_conv
from fastlocal.ops._dispatch import as_on_gpu
from tests.ops.cases import assert_within_error_rule
from tests.ops.norms import check_conv, make, norm_for, run_conv

aten = partial(bn_act_conv, impl="aten")
CONVS = {
    "3x3": (lambda: nn.Conv2d(6, 4, 3, padding=1), (5, 6, 7, 9)),
    "1x1": (lambda: nn.Conv2d(6, 8, 1, bias=False), (5, 6, 7, 9)),
    "strided": (lambda: nn.Conv2d(6, 9, (3, 2), stride=(2, 1), padding=(1, 0), groups=3), (5, 6, 7, 9)),
    "dilated": (lambda: nn.Conv2d(6, 6, 3, dilation=2, padding=2, groups=6, bias=False), (5, 6, 7, 9)),
    "linear": (lambda: nn.Linear(6, 4), (31, 6)),
    "linear without bias": (lambda: nn.Linear(6, 4, bias=False), (31, 6)),
}


def setting(kind="3x3", dtype=torch.float32, last=False):
    """x, norm, conv."""
    build, shape = CONVS[kind]
    case = make(shape, dtype, last=last and len(shape) == 4)
    return case.x, case.norm, build()


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("act", ["relu", "leaky_relu", "none"])
@pytest.mark.parametrize("kind", CONVS)
def test_error_rule(kind, act, last):
    x, norm, conv = setting(kind, last=last)
    check_conv(aten, x, norm, conv, kind, act=act, slope=0.2)
    check_conv(bn_act_conv, x, norm, conv, kind, act=act, slope=0.2)


@pytest.mark.parametrize("kind", ["3x3", "linear"])
def test_weights_in_half_precision(kind):
    x, norm, conv = setting(kind, torch.bfloat16)
    check_conv(aten, x, norm, conv.bfloat16(), kind)


@pytest.mark.parametrize("kind", ["3x3", "linear"])
def test_autocast(kind):
    """The weight stays float32 and so does its gradient; what is computed is what autocast computes."""
    x, norm, conv = setting(kind)
    before = nn.Conv2d(6, 6, 1) if x.dim() == 4 else nn.Linear(6, 6)

    def whole(op):
        own = [copy.deepcopy(m) for m in (before, norm, conv)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = own[0](x)
            y = op(h, own[1], own[2])
        assert h.dtype == y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        grads = [p.grad for m in own for p in m.parameters()]
        assert all(g.dtype == torch.float32 for g in grads)
        return [y.detach(), *grads]

    with torch.random.fork_rng():
        got, same = whole(aten), whole(reference.bn_act_conv)
    for i, (g, s) in enumerate(zip(got, same, strict=True)):
        assert (g.double() - s.double()).norm() <= 0.02 * s.double().norm(), i
    assert ops.explain(bn_act_conv, x, norm, conv, impl="aten").chosen == "aten"
    with torch.autocast("cpu", dtype=torch.bfloat16):  # a float32 map would be converted before the convolution
        assert "autocast" in dict(ops.explain(bn_act_conv, x, norm, conv).rejected)["aten"]
        y = bn_act_conv(x, norm, conv)
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["3x3", "linear"])
@pytest.mark.parametrize("act", ["relu", "leaky_relu", "none"])
def test_gradcheck(kind, act):
    build, shape = CONVS[kind]
    x = torch.randn((3, 6, 3, 2) if len(shape) == 4 else (5, 6), dtype=torch.float64, requires_grad=True)
    norm, conv = norm_for(shape).double(), build().double()
    parameters = [p for m in (norm, conv) for p in m.parameters()]

    def call(x, *leaves):
        for parameter, leaf in zip(("weight", "bias"), leaves):
            norm._parameters[parameter] = leaf
        for parameter, leaf in zip(("weight", "bias"), leaves[2:]):
            conv._parameters[parameter] = leaf
        return aten(x, norm, conv, act=act)

    assert torch.autograd.gradcheck(call, (x, *parameters))


def test_needs():
    """Every subset of gradients; those of the full call."""
    x, norm, conv = setting()
    dy = torch.randn_like(conv(x))
    full = run_conv(aten, x, norm, conv, dy)
    names = ("dx", "norm weight", "norm bias", "conv weight", "conv bias")
    for needs in itertools.product([True, False], repeat=5):
        if not any(needs):
            continue
        own, twin, leaf = copy.deepcopy(norm), copy.deepcopy(conv), x.clone()
        leaves = [leaf, own.weight, own.bias, twin.weight, twin.bias]
        for t, need in zip(leaves, needs):
            t.requires_grad_(need)
        aten(leaf, own, twin).backward(dy)
        for name, t, need in zip(names, leaves, needs):
            assert (t.grad is not None) == need, name
            if need:
                torch.testing.assert_close(t.grad, full[name], rtol=1e-6, atol=1e-6, msg=name)


def test_statistics_move_once():
    x, norm, conv = setting()
    twin = copy.deepcopy(norm)
    y = aten(x.requires_grad_(), norm, conv)
    twin(x)
    moved = {name: value.clone() for name, value in norm.named_buffers()}
    y.sum().backward()
    for name, value in twin.named_buffers():
        torch.testing.assert_close(moved[name], value)
        assert torch.equal(dict(norm.named_buffers())[name], moved[name]), name
    assert norm.num_batches_tracked.item() == 1


class Counter:
    calls = 0

    def add_(self, n):
        self.calls += n


def test_a_counter_in_the_place_of_the_number_of_batches():
    x, norm, conv = setting()
    norm.__dict__["num_batches_tracked"] = counter = Counter()
    aten(x.requires_grad_(), norm, conv).sum().backward()
    ops.bn_act(x, norm, impl="aten")
    assert counter.calls == 2


# --- memory -----------------------------------------------------------------------------------------------------------


def chain(op, depth=3):
    """Convolutions with norms between them, and the input."""
    torch.manual_seed(0)
    layers = [(norm_for((8, 16, 16, 16)), nn.Conv2d(16, 16, 3, padding=1, bias=False)) for _ in range(depth)]
    state = [t for pair in layers for m in pair for t in (*m.parameters(), *m.buffers())]
    x = torch.randn(8, 16, 16, 16)

    def forward():
        h = x
        for norm, conv in layers:
            h = op(h, norm, conv)
        return h

    return forward, [*state, x]


def test_saved_bytes():
    """Of each step its input and 2 x 16 statistics, where the modules save the input, the activation and statistics."""
    bytes_of_map = 8 * 16 * 16 * 16 * 4
    forward, state = chain(bn_act_conv)
    with as_on_gpu(), SavedBytes(state) as saved:
        forward()
    assert saved.peak == 2 * bytes_of_map + 3 * 2 * 16 * 4
    forward, state = chain(reference.bn_act_conv)
    with SavedBytes(state) as plain:
        forward()
    assert plain.peak >= (2 + 3) * bytes_of_map


def test_live_bytes():
    """The activation is a temporary forward and backward, and the gradient of the input stands where its gradient stood."""
    bytes_of_map = 8 * 16 * 16 * 16 * 4
    forward, _ = chain(bn_act_conv, depth=1)
    small = 40_000
    with as_on_gpu(), StorageTracker() as tracker:
        tracker.mark("forward")
        y = forward()
        assert tracker.current <= bytes_of_map + small  # y
        dy = torch.ones_like(y)
        before = tracker.current
        tracker.mark("backward")
        y.backward(dy)
    assert tracker.peaks["forward"] <= 2 * bytes_of_map + small  # the activation, y
    assert tracker.peaks["backward"] - before <= 2 * bytes_of_map + small  # the gradient, the activation


def test_activation_is_written_again_only_for_the_weight():
    forward, state = chain(bn_act_conv, depth=1)
    conv_weight = next(t for t in state if t.dim() == 4)
    conv_weight.requires_grad_(False)
    with as_on_gpu(), StorageTracker() as tracker:
        y = forward()
        dy = torch.ones_like(y)
        before = tracker.current
        tracker.mark("backward")
        y.backward(dy)
    assert tracker.peaks["backward"] - before <= 8 * 16 * 16 * 16 * 4 + 40_000


def test_a_changed_input_is_noticed():
    x, norm, conv = setting()
    h = x.requires_grad_() * 1
    y = aten(h, norm, conv)
    with torch.no_grad():
        h.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_second_backward_and_second_derivative_are_refused():
    x, norm, conv = setting()
    y = aten(x.requires_grad_(), norm, conv)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()
    (grad,) = torch.autograd.grad(aten(x, norm, conv).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# --- the choice -------------------------------------------------------------------------------------------------------


def hooked(module):
    module.register_forward_hook(lambda *a: None)
    return module


class Own(nn.Conv2d):
    pass


def parametrized():
    return parametrizations.weight_norm(nn.Conv2d(6, 4, 3))


MISFITS = {
    "Conv2d has hooks": lambda x, n, c: (x, n, hooked(c)),
    "BatchNorm2d has hooks": lambda x, n, c: (x, hooked(n), c),
    "Own is neither": lambda x, n, c: (x, n, Own(6, 4, 3)),
    "ParametrizedConv2d is neither": lambda x, n, c: (x, n, parametrized()),
    "Sequential is neither": lambda x, n, c: (x, n, nn.Sequential(c)),
    "padding 'same'": lambda x, n, c: (x, n, nn.Conv2d(6, 4, 3, padding="same")),
    "mode 'circular'": lambda x, n, c: (x, n, nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular")),
    "not in training": lambda x, n, c: (x, n.eval(), c),
    "GroupNorm is not a plain": lambda x, n, c: (x, nn.GroupNorm(2, 6), c),
    "or a momentum": lambda x, n, c: (x, nn.BatchNorm2d(6, momentum=None), c),
    "without running statistics": lambda x, n, c: (x, nn.BatchNorm2d(6, track_running_stats=False), c),
    "no matrix": lambda x, n, c: (x, n, nn.Linear(9, 4)),
}


@pytest.mark.parametrize("reason", MISFITS)
def test_a_misfit_is_the_plain_modules(reason):
    x, norm, conv = MISFITS[reason](*setting())
    choice = ops.explain(bn_act_conv, x, norm, conv)
    assert choice.chosen == "reference" and reason in dict(choice.rejected)["aten"], str(choice)
    with as_on_gpu():
        twins = copy.deepcopy(norm), copy.deepcopy(conv)
        got, want = bn_act_conv(x, norm, conv), twins[1](twins[0](x).relu())
    assert torch.equal(got, want)
    for (name, a), (_, b) in zip(norm.state_dict().items(), twins[0].state_dict().items()):
        assert torch.equal(a, b), name
    with pytest.raises(BackendError, match="cannot serve"):
        aten(x, norm, conv)


def test_global_hooks_see_both():
    x, norm, conv = setting()
    seen = []
    handle = register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        bn_act_conv(x, norm, conv)
    finally:
        handle.remove()
    assert seen == [norm, conv]


def test_without_gradients():
    x, norm, conv = setting()
    twin = copy.deepcopy(norm)
    with torch.no_grad():
        got, want = aten(x, norm, conv), conv(twin(x).relu())
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(norm.running_var, twin.running_var)
    assert norm.num_batches_tracked.item() == 1


def test_requests():
    x, norm, conv = setting()
    assert ops.explain(bn_act_conv, x, norm, conv).chosen == "reference"
    with as_on_gpu():
        assert bn_act_conv(x, norm, conv).grad_fn.name().startswith("_Function")
    with fl.backend("aten"):
        assert ops.explain(bn_act_conv, x, norm, conv).chosen == "aten"
    with pytest.raises(BackendError, match="the tensors are on cpu"):
        bn_act_conv(x, norm, conv, impl="triton")
    with pytest.raises(BackendError, match="no such implementation"):
        bn_act_conv(x, norm, conv, impl="native")
    with pytest.raises(ArgumentError, match="impl='natve' is not a backend"):
        bn_act_conv(x, norm, conv, impl="natve")
    with pytest.raises(ArgumentError, match="act='gelu' is not an activation"):
        bn_act_conv(x, norm, conv, act="gelu")


@pytest.mark.parametrize("impl", [None, "aten"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile(backend, impl):
    x, norm, conv = setting()
    dy = torch.randn_like(conv(x))
    want = run_conv(aten, x, norm, conv, dy)

    def whole(x, norm, conv):
        return torch.compile(lambda x: bn_act_conv(x * 1, norm, conv, impl=impl) * 1, backend=backend, fullgraph=True)(
            x
        )

    got = run_conv(whole, x, norm, conv, dy)
    for name, value in got.items():
        torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-5, msg=name)


def test_a_network_within_the_error_rule():
    """Three steps in a row and a shortcut, gradients of every parameter."""
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 12, 3, padding=1, bias=False)
    layers = nn.ModuleList(
        [norm_for((4, 12, 9, 9)) if i % 2 == 0 else nn.Conv2d(12, 12, 3, padding=1) for i in range(6)]
    )
    x = torch.randn(4, 3, 9, 9)

    def run(op, dtype):
        net = copy.deepcopy(nn.ModuleList([stem, *layers])).to(dtype)
        h = net[0](x.to(dtype))
        first = h
        for i in (1, 3, 5):
            h = op(h, net[i], net[i + 1], act="leaky_relu", slope=0.3)
        (h + first).square().mean().backward()
        return {name: p.grad for name, p in net.named_parameters()}

    got, same = (run(op, torch.float32) for op in (aten, reference.bn_act_conv))
    truth = run(reference.bn_act_conv, torch.float64)
    for name, value in got.items():
        assert_within_error_rule(value, same[name], truth[name], name, 4.0)
