import copy
import itertools
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook

import fastlocal as fl
from fastlocal import ops, reference
from fastlocal.blocks.measure import LaunchCounter, SavedBytes
from fastlocal.errors import ArgumentError, BackendError
from fastlocal.ops import bn_act
from fastlocal.ops._dispatch import as_on_gpu
from tests.ops import norms
from tests.ops.cases import assert_within_error_rule

MODULE = sys.modules["fastlocal.ops.bn_act"]
NATIVE = MODULE._native()[0]
needs_native = pytest.mark.skipif(NATIVE is None, reason=MODULE._native()[1])
DTYPES = (torch.float32, torch.bfloat16)
NAMES = ("y", "dx", "dresidual", "dweight", "dbias", "running_mean", "running_var")


@pytest.fixture(autouse=True)
def _any_size(monkeypatch):
    monkeypatch.setattr(MODULE, "MIN_ELEMENTS", 1)


def layout(x):
    return x.to(memory_format=torch.channels_last) if x.dim() == 4 else x.contiguous()


def norm_for(x):
    norm = (nn.BatchNorm2d if x.dim() == 4 else nn.BatchNorm1d)(x.shape[1])
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.normal_()
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return norm


def make(shape, dtype=torch.float32, mean=0.0, std=1.0):
    """x, norm, residual, dy."""
    x = layout((torch.randn(shape) * std + mean).to(dtype))
    return x, norm_for(x), layout(torch.randn(shape).to(dtype)), layout(torch.randn(shape).to(dtype))


def run(op, x, norm, residual, dy, relu=True, **options):
    """Results under NAMES; norm is not changed."""
    norm = copy.deepcopy(norm)
    leaves = [x.detach().clone().requires_grad_(), residual and residual[0].detach().clone().requires_grad_()]
    y = op(leaves[0], norm, leaves[1], act="relu" if relu else "none", **options)
    y.backward(dy)
    result = dict(y=y.detach(), dx=leaves[0].grad, dweight=norm.weight.grad, dbias=norm.bias.grad)
    if residual:
        result["dresidual"] = leaves[1].grad
    return result | dict(running_mean=norm.running_mean, running_var=norm.running_var)


def double(x, norm, residual, dy):
    return x.double(), copy.deepcopy(norm).double(), residual and [residual[0].double()], dy.double()


def check(x, norm, residual, dy, what="", relu=True):
    residual = [residual] if residual is not None else None
    if relu:  # where the sign of the activation's input is a matter of rounding, no gradient comes in
        with torch.no_grad():
            args = double(x, norm, residual, dy)
            z = reference.bn_act(args[0], args[1], residual and args[2][0], act="none")
            deviation = args[0].std((0, *range(2, x.dim())), correction=0).clamp_min(1e-30)
            steep = (torch.finfo(torch.float32).eps * x.double().abs().amax() / deviation * norm.weight).amax()
            near = 2 * steep + 4 * torch.finfo(x.dtype).eps * z.abs().amax()
            dy = layout(torch.where(z.abs() < near, 0, dy))
    got = run(bn_act, x, norm, residual, dy, relu, impl="native")
    same = run(reference.bn_act, x, norm, residual, dy, relu)
    truth = run(reference.bn_act, *double(x, norm, residual, dy), relu)
    assert got["y"].dtype == got["dx"].dtype == x.dtype and got["y"].stride() == x.stride()
    rows = x.numel() // x.shape[1]
    rstd = (x.double().var((0, *range(2, x.dim())), correction=0) + norm.eps).rsqrt()
    scale, size = (rstd * norm.weight).amax().item(), dy.abs().max().item()
    terms = dict(
        y=scale * x.abs().max().item(),
        dx=scale * size * rows**0.5,
        # up to 128 terms are summed in float32, then in float64
        dweight=min(rows, 128) ** 0.5 * size * (rstd * x.double().abs().amax((0, *range(2, x.dim())))).amax().item(),
        running_mean=norm.momentum * x.abs().max().item(),
        running_var=norm.momentum * (x.double() - x.double().mean()).square().max().item(),
        dbias=min(rows, 128) ** 0.5 * size,
    )
    for name, value in got.items():
        assert value.shape == truth[name].shape
        assert_within_error_rule(value, same[name], truth[name], f"{what} {name}", terms.get(name, 0.0))


# --- numbers ----------------------------------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3, 10, 16, 17, 32, 48, 64, 80, 130])
def test_error_rule(channels, dtype):
    for spatial, batch, with_residual, relu in itertools.product(
        [(), (1, 1), (7, 7), (32, 32)], [2, 3, 31], [True, False], [True, False]
    ):
        if spatial == (32, 32) and (batch > 3 or channels > 20) and (batch != 2 or not (with_residual and relu)):
            continue  # seconds
        x, norm, residual, dy = make((batch, channels, *spatial), dtype)
        what = f"{batch} {channels} {spatial} residual={with_residual} relu={relu}"
        check(x, norm, residual if with_residual else None, dy, what, relu)


@needs_native
@pytest.mark.parametrize("mean, std", [(1e3, 1e-2), (-1e3, 1.0), (1e-3, 1e-4)])
@pytest.mark.parametrize("shape", [(8, 19, 16, 16), (200, 5), (4, 64, 9, 9)])
def test_mean_far_from_zero(shape, mean, std):
    x, norm, residual, dy = make(shape, mean=mean, std=std)
    check(x, norm, None, dy, "plain", relu=False)
    check(x, norm, residual, dy, "residual")
    if std == 1.0:
        check(x.bfloat16().float(), norm, residual, dy, "few distinct values")
        check(*(t if isinstance(t, nn.Module) else t.bfloat16() for t in make(shape, mean=mean, std=50.0)), "bfloat16")


@needs_native
@pytest.mark.parametrize("outlier", [10.0, 1e3])
@pytest.mark.parametrize("channels", [5, 32])
def test_first_row_is_no_like_the_others(channels, outlier):
    """The corner of the first image, which padding makes different, is where the statistics start from."""
    x, norm, residual, dy = make((16, channels, 32, 32))
    x[0, :, 0, 0] = outlier
    check(x, norm, residual, dy, f"first {outlier}", relu=False)
    x[...] += 1e3
    x[0, :, 0, 0] = 0
    check(x, norm, residual, dy, "zero before 1000", relu=False)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 0.1, 1e3, -7.3])
def test_channel_without_variance(dtype, value):
    x, norm, residual, dy = make((8, 21, 5, 5), dtype)
    x[:, 2], x[:, 20] = value, value
    got, same = (run(f, x, norm, [residual], dy, False) for f in (bn_act, reference.bn_act))
    bias = norm.bias.detach()[[2, 20]].view(1, 2, 1, 1)
    expected = (bias + residual[:, [2, 20]].float()).to(dtype)
    torch.testing.assert_close(got["y"][:, [2, 20]], expected, rtol=1e-2, atol=abs(value) * 1e-3 + 1e-6)
    assert all(t.isfinite().all() for t in got.values())
    moved = norm.running_var * (1 - norm.momentum)
    torch.testing.assert_close(got["running_var"][[2, 20]], moved[[2, 20]], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(got["running_mean"], same["running_mean"], rtol=1e-5, atol=1e-6)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["x", "x first", "residual", "dy"])
@pytest.mark.parametrize("channel", [3, 18])
def test_nonfinite_values_stay_in_their_channel(channel, where, bad, relu, dtype):
    x, norm, residual, dy = make((6, 20, 8, 8), dtype)
    clean = run(bn_act, x, norm, [residual], dy, relu, impl="native")
    victim = dict(x=x, residual=residual, dy=dy).get(where, x)
    position = (0, channel, 0, 0) if "first" in where else (3, channel, 2, 5)
    victim[position] = bad
    if where == "dy" and relu:
        residual[position] = 50.0  # the unit is on
        clean = run(bn_act, x, norm, [residual], layout(torch.where(dy.isfinite(), dy, 0)), relu, impl="native")
    got = run(bn_act, x, norm, [residual], dy, relu, impl="native")
    want = run(reference.bn_act, x, norm, [residual], dy, relu)
    others = [c for c in range(20) if c != channel]
    for name, value in got.items():
        at = (slice(None), others) if value.dim() == 4 else (others,)
        if where != "dy" or name in ("y", "running_mean", "running_var"):
            assert torch.equal(value[at], clean[name][at]), name
        assert value[at].isfinite().all(), name
        assert torch.equal(value.isfinite(), want[name].isfinite()), f"{name}: finite elsewhere than in PyTorch"
    if where.startswith("x"):
        for name in ("dx", "dweight", "running_mean", "running_var"):
            bad_part = got[name][:, channel] if got[name].dim() == 4 else got[name][channel]
            assert not bad_part.isfinite().any(), name
        assert not got["y"][:, channel].isfinite().any()
    if where != "dy" and got["y"][position].isnan():  # a ReLU lets the gradient of a NaN pass
        assert torch.equal(got["dresidual"][position], dy[position]) and dy[position] != 0


@needs_native
@pytest.mark.parametrize("channels", [3, 16, 50])
def test_running_statistics_over_steps(channels):
    x, norm, _, _ = make((9, channels, 6, 6))
    twin = copy.deepcopy(norm).double()
    for momentum in (0.1, 0.0, 1.0, 0.3):
        norm.momentum = twin.momentum = momentum
        x = layout(torch.randn_like(x) * 3 + 1)
        bn_act(x, norm, impl="native")
        twin(x.double())
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(getattr(norm, name).double(), getattr(twin, name), rtol=1e-5, atol=1e-6)
    assert norm.num_batches_tracked.item() == twin.num_batches_tracked.item() == 4
    with torch.no_grad():
        assert not bn_act(x, norm, impl="native").requires_grad
    assert norm.num_batches_tracked.item() == 5


# --- memory -----------------------------------------------------------------------------------------------------------


def filled(t):
    return t.detach().fill_(torch.nan) if t.is_floating_point() else t


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 15, 16, 33, 130])
def test_poisoned_memory(channels, dtype, monkeypatch):
    for spatial, relu, with_residual in itertools.product([(), (5, 7)], [True, False], [True, False]):
        x, norm, residual, dy = make((7, channels, *spatial), dtype)
        residual = [residual] if with_residual else None
        clean = run(bn_act, x, norm, residual, dy, relu, impl="native")
        with monkeypatch.context() as m:
            for owner, name in [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]:
                original = getattr(owner, name)
                m.setattr(owner, name, lambda *a, original=original, **k: filled(original(*a, **k)))
            assert torch.empty_like(x).isnan().all()
            dirty = run(bn_act, x, norm, residual, dy, relu, impl="native")
        for name, value in clean.items():
            assert torch.equal(value, dirty[name]), name


@needs_native
def test_inputs_are_left_alone():
    x, norm, residual, dy = make((5, 19, 4, 4))
    copies = [t.clone() for t in (x, residual, dy)]
    versions = [t._version for t in (x, residual, dy)]
    for relu in (True, False):
        x_, residual_ = x.requires_grad_(), residual.requires_grad_()
        y = bn_act(x_, norm, residual_, act="relu" if relu else "none", impl="native")
        assert y.data_ptr() not in (x.data_ptr(), residual.data_ptr())
        y.backward(dy)
    for t, before, version in zip((x, residual, dy), copies, versions):
        assert torch.equal(t.detach(), before) and t._version == version
    shared = bn_act(x.detach(), norm, x.detach(), impl="native")  # the residual may be x itself
    torch.testing.assert_close(shared, reference.bn_act(x.detach(), copy.deepcopy(norm), x.detach()))


@needs_native
def test_a_changed_output_or_statistic_is_noticed():
    x, norm, _, dy = make((5, 19, 4, 4))
    y = bn_act(x.requires_grad_(), norm, impl="native")
    with torch.no_grad():
        y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(dy)
    before = norm.running_mean._version, norm.running_var._version
    evaluated = copy.deepcopy(norm).eval()
    evaluated.running_mean, evaluated.running_var = norm.running_mean, norm.running_var
    out = evaluated(x)
    bn_act(x, norm, impl="native")
    assert (norm.running_mean._version, norm.running_var._version) > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# --- autograd ---------------------------------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=4)))
def test_partial_gradients(needs):
    x, norm, residual, dy = make((6, 18, 3, 3))
    full = run(bn_act, x, norm, [residual], dy)
    for t, need in zip((x, residual, norm.weight, norm.bias), needs):
        t.requires_grad_(need)
    y = bn_act(x, norm, residual, impl="native")
    assert y.requires_grad == any(needs)
    if any(needs):
        y.backward(dy)
    for name, t, need in zip(("dx", "dresidual", "dweight", "dbias"), (x, residual, norm.weight, norm.bias), needs):
        assert (t.grad is not None) == need, name
        if need:
            assert torch.equal(t.grad, full[name]), name


@needs_native
def test_second_backward_and_second_derivative_are_refused():
    x, norm, _, dy = make((6, 18, 3, 3))
    y = bn_act(x.requires_grad_(), norm, impl="native")
    y.backward(dy)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward(dy)
    (grad,) = torch.autograd.grad(bn_act(x, norm, impl="native").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    with fl.backend("reference"):
        (grad,) = torch.autograd.grad(bn_act(x, norm).square().sum(), x, create_graph=True)
        grad.sum().backward()


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_incoming_gradient(dtype):
    x, norm, residual, dy = make((6, 18, 4, 4), dtype)
    want = run(bn_act, x, norm, [residual], dy)
    wide = torch.full((6, 18, 4, 8), 7.0, dtype=dtype)
    wide[..., ::2] = dy
    for variant in (dy.contiguous(), wide[..., ::2], dy.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)):
        got = run(bn_act, x, norm, [residual], variant)
        assert all(torch.equal(got[name], value) for name, value in want.items())
    one = torch.ones((), dtype=dtype)
    expanded, dense = (
        run(bn_act, x, norm, None, t) for t in (one.expand(6, 18, 4, 4), layout(one.repeat(6, 18, 4, 4)))
    )
    assert all(torch.equal(expanded[name], value) for name, value in dense.items())


# --- threads ----------------------------------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(16, 70, 16, 16), (16, 3, 75, 75), (3, 50000), (5000, 17)])
def test_threads(shape, dtype):
    x, norm, residual, dy = make(shape, dtype)
    results = {}
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results[threads] = run(bn_act, x, norm, [residual], dy, False, impl="native")
        for _ in range(2):
            again = run(bn_act, x, norm, [residual], dy, False, impl="native")
            assert all(torch.equal(again[name], value) for name, value in results[threads].items()), threads
    tolerance = dict(rtol=1e-4, atol=1e-3) if dtype == torch.float32 else dict(rtol=2e-2, atol=2e-2)
    for threads, (name, value) in itertools.product((2, 3), results[1].items()):
        torch.testing.assert_close(results[threads][name], value, **tolerance)


@needs_native
@pytest.mark.skipif(sys.platform != "linux", reason="threads are shared with PyTorch on Linux only")
def test_threads_are_pytorchs():
    assert NATIVE.shares_openmp()


# --- the choice -------------------------------------------------------------------------------------------------------


def fit(change):
    x, norm, residual, _ = make((4, 6, 5, 5))
    return change(x, norm, residual)


def with_hook(norm, name):
    getattr(norm, name)(lambda *a: None)
    return norm


def edited(norm, **attributes):
    for name, value in attributes.items():
        setattr(norm, name, value)
    return norm


class Own(nn.BatchNorm2d):
    pass


MISFITS = {
    "channels_last map": lambda x, n, r: (x.contiguous(), n, r.contiguous()),
    "contiguous matrix": lambda x, n, r: (torch.randn(6, 8).t(), nn.BatchNorm1d(6)),
    "contiguous matrix ": lambda x, n, r: (torch.randn(8, 6, 4), nn.BatchNorm1d(6)),
    "float64 is neither": lambda x, n, r: (x.double(), n.double(), r.double()),
    "float16 is neither": lambda x, n, r: (x.half(), n, r.half()),
    "not in training": lambda x, n, r: (x, n.eval(), r),
    "without running statistics": lambda x, n, r: (x, nn.BatchNorm2d(6, track_running_stats=False), r),
    "without running statistics ": lambda x, n, r: (x, nn.BatchNorm2d(6, affine=False), r),
    "or a momentum": lambda x, n, r: (x, edited(n, momentum=None), r),
    "hooks": lambda x, n, r: (x, with_hook(n, "register_forward_hook"), r),
    "hooks ": lambda x, n, r: (x, with_hook(n, "register_forward_pre_hook"), r),
    "forward of its own": lambda x, n, r: (x, edited(n, forward=lambda x: x * 2), r),
    "Own is not a plain": lambda x, n, r: (x, Own(6), r),
    "GroupNorm is not a plain": lambda x, n, r: (x, nn.GroupNorm(2, 6), r),
    "Identity is not a plain": lambda x, n, r: (x, nn.Identity(), r),
    "residual has another": lambda x, n, r: (x, n, r.bfloat16()),
    "residual has another ": lambda x, n, r: (x, n, r.contiguous()),
    "residual has another  ": lambda x, n, r: (x, n, r[:1]),
    "tensors are not float32": lambda x, n, r: (x.bfloat16(), n.bfloat16(), r.bfloat16()),
}


@pytest.mark.parametrize("reason", MISFITS)
def test_a_misfit_is_the_plain_module(reason):
    args = fit(MISFITS[reason])
    choice = ops.explain(bn_act, *args)
    assert choice.chosen == "reference" and reason.strip() in dict(choice.rejected)["native"]
    with pytest.raises(BackendError, match=rf"bn_act: backend \"native\" cannot serve.*{reason.strip()}"):
        bn_act(*args, impl="native")
    x, norm, *residual = args
    twin, x = copy.deepcopy(norm), x.clone() if x.requires_grad else x
    for relu in (True, False):
        want = twin(x)
        want = want + residual[0] if residual else want
        want = (want.relu() if relu else want).to(x.dtype)
        assert torch.equal(bn_act(x, norm, *residual, act="relu" if relu else "none"), want)
    for (name, a), (_, b) in zip(norm.state_dict().items(), twin.state_dict().items()):
        assert torch.equal(a, b), name


def test_backward_hooks_are_a_misfit():
    x, norm, residual, _ = make((4, 6, 5, 5))
    norm.register_full_backward_hook(lambda *a: None)
    assert "hooks" in dict(ops.explain(bn_act, x, norm, residual).rejected)["native"]


def test_sync_batch_norm_is_a_misfit():
    x, norm, residual, _ = make((4, 6, 5, 5))
    sync = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(norm))
    assert "SyncBatchNorm" in dict(ops.explain(bn_act, x, sync, residual).rejected)["native"]
    norm, sync = norm.eval(), sync.eval()
    assert torch.equal(bn_act(x, sync, residual), bn_act(x, norm, residual))


@pytest.mark.parametrize("kind, shape", [(nn.BatchNorm1d, (4, 6, 5, 5)), (nn.BatchNorm2d, (64, 6))])
def test_errors_are_those_of_the_module(kind, shape):
    x = layout(torch.randn(shape))
    for op in (bn_act, reference.bn_act):
        with pytest.raises(ValueError, match="expected"):
            op(x, kind(6))


def test_one_value_per_channel_is_refused_as_by_the_module():
    for x, norm in ((torch.randn(1, 6), nn.BatchNorm1d(6)), (torch.randn(1, 6, 1, 1), nn.BatchNorm2d(6))):
        for op in (bn_act, reference.bn_act):
            with pytest.raises(ValueError, match="more than 1 value per channel"):
                op(x, norm)


def test_wrong_width_is_an_error():
    with pytest.raises((RuntimeError, ValueError)):
        bn_act(layout(torch.randn(4, 6, 5, 5)), nn.BatchNorm2d(7))


def test_global_hooks_see_the_norm():
    x, norm, _, _ = make((4, 6, 5, 5))
    seen = []
    handle = register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        bn_act(x, norm)
    finally:
        handle.remove()
    assert seen == [norm]


@needs_native
def test_small_inputs_are_left_to_pytorch(monkeypatch):
    monkeypatch.undo()
    side = 32
    enough = MODULE.MIN_ELEMENTS // side**2
    for channels, chosen in ((enough - 1, "reference"), (enough, "native")):
        x, norm, _, _ = make((1, channels, side, side))
        choice = ops.explain(bn_act, x, norm)
        assert choice.chosen == chosen
    assert "fewer than" in dict(ops.explain(bn_act, x[:, :3], nn.BatchNorm2d(3)).rejected)["native"]


@needs_native
def test_requests():
    x, norm, residual, _ = make((4, 6, 5, 5))
    assert ops.explain(bn_act, x, norm, residual).chosen == "native"
    with fl.backend("reference"):
        assert ops.explain(bn_act, x, norm, residual).chosen == "reference"
        got = bn_act(x, copy.deepcopy(norm), residual)
    assert torch.equal(got, reference.bn_act(x, copy.deepcopy(norm), residual))
    assert torch.equal(got, bn_act(x, copy.deepcopy(norm), residual, impl="reference"))
    with pytest.raises(BackendError, match="the tensors are on cpu"):
        bn_act(x, norm, impl="triton")
    with pytest.raises(ArgumentError, match="impl='natve' is not a backend"):
        bn_act(x, norm, impl="natve")


def test_without_the_extension(monkeypatch):
    monkeypatch.setattr(MODULE, "_native", lambda: (None, "the native extension is not built (why)"))
    ops._dispatch.select.cache_clear()
    ops._dispatch._choose.cache_clear()
    try:
        x, norm, residual, _ = make((4, 6, 5, 5))
        choice = ops.explain(bn_act, x, norm, residual)
        assert choice.chosen == "reference" and "not built (why)" in dict(choice.rejected)["native"]
        want = reference.bn_act(x, copy.deepcopy(norm), residual)
        with pytest.raises(BackendError, match="not built"):
            bn_act(x, norm, residual, impl="native")
        assert torch.equal(bn_act(x, norm, residual), want)
    finally:
        ops._dispatch.select.cache_clear()
        ops._dispatch._choose.cache_clear()


# --- PyTorch's own machinery ------------------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_residual, relu", itertools.product([True, False], repeat=2))
def test_opcheck(with_residual, relu, dtype):
    x, norm, residual, dy = make((4, 18, 3, 3), dtype)
    weight, bias = norm.weight.detach(), norm.bias.detach()
    forward, backward = MODULE._forward, MODULE._backward
    statistics = norm.running_mean, norm.running_var
    rest = (None, None, None, None, 0.0, 0.0, "relu" if relu else "none", 0.0, False, "native")
    added = residual if with_residual else None
    torch.library.opcheck(forward, (x, added, weight, bias, *statistics, 0.1, 1e-5, *rest))
    y, saved, _ = forward(x, residual, weight, bias, *statistics, 0.1, 1e-5, *rest)
    args = (dy, x, None, y if relu else None, None, weight, bias, None, None, saved, *rest[6:8], True, with_residual)
    torch.library.opcheck(backward, (*args, "native"))


@needs_native
def test_fake_tensors():
    with FakeTensorMode():
        x, norm, residual = torch.randn(4, 6, 5, 5), nn.BatchNorm2d(6), torch.randn(4, 6, 5, 5)
        x = x.to(memory_format=torch.channels_last).requires_grad_()
        residual = residual.to(memory_format=torch.channels_last)
        y = bn_act(x, norm, residual, impl="native")
        y.sum().backward()
    assert y.shape == x.shape and y.stride() == x.stride() and x.grad.stride() == x.stride()
    assert norm.weight.grad.shape == (6,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast(dtype):
    net = nn.Sequential(nn.Conv2d(3, 18, 3, bias=False), nn.BatchNorm2d(18)).to(memory_format=torch.channels_last)
    x = layout(torch.randn(6, 3, 10, 10)).requires_grad_()
    twin = copy.deepcopy(net)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = bn_act(net[0](x), net[1])
        want = twin(x).relu()
    assert y.dtype == want.dtype == dtype
    tolerance = dict(rtol=2e-2, atol=2e-2) if dtype == torch.bfloat16 else dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y, want, **tolerance)
    y.float().sum().backward()
    assert x.grad.isfinite().all() and net[1].weight.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile(backend):
    x, norm, residual, dy = make((4, 18, 5, 5))
    leaves = x.clone().requires_grad_(), residual.clone().requires_grad_()
    twin = copy.deepcopy(norm)
    want = run(bn_act, x, twin, [residual], dy)
    compiled = torch.compile(lambda x, r: bn_act(x * 1, norm, r) * 1, backend=backend)
    y = compiled(*leaves)
    y.backward(dy)
    got = dict(y=y.detach(), dx=leaves[0].grad, dresidual=leaves[1].grad, dweight=norm.weight.grad)
    for name, value in got.items():
        torch.testing.assert_close(value, want[name], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norm.running_var, want["running_var"])
    assert norm.num_batches_tracked.item() == 1


# --- whole networks ---------------------------------------------------------------------------------------------------


def gradients(net, x, target):
    loss = nn.functional.cross_entropy(net(x), target)
    loss.backward()
    return {name: p.grad.double() for name, p in net.named_parameters()}


class Residual(nn.Module):
    """A stem, a residual block and a classifier that call the operator."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(c, 24, 3, padding=1, bias=False) for c in (3, 24, 24))
        self.norms = nn.ModuleList(nn.BatchNorm2d(24) for _ in self.convs)
        self.fc = nn.Linear(24, 10)

    def forward(self, x):
        stem = bn_act(self.convs[0](x), self.norms[0])
        h = bn_act(self.convs[1](stem), self.norms[1])
        h = bn_act(self.convs[2](h), self.norms[2], stem)
        return self.fc(h.mean((2, 3)))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_network(dtype):
    torch.manual_seed(0)
    net = Residual().to(memory_format=torch.channels_last)
    x, target = layout(torch.randn(6, 3, 32, 32)), torch.arange(6)
    truth = gradients(copy.deepcopy(net).double(), x.double(), target)
    calls = []
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        with fl.backend("reference"):
            rival = gradients(copy.deepcopy(net), x, target)
        original = NATIVE.bn_act_forward
        with pytest.MonkeyPatch.context() as m:
            m.setattr(NATIVE, "bn_act_forward", lambda *a: (calls.append(a), original(*a)))
            got = gradients(net, x, target)
    assert len(calls) == 3
    errors, rivals = (
        {n: (g[n] - truth[n]).norm() / truth[n].norm().clamp_min(1e-6) for n in truth} for g in (got, rival)
    )
    eps = torch.finfo(dtype).eps
    for n in truth:
        assert errors[n] <= 2 * rivals[n] + 8 * eps, f"{n}: {errors[n]:.3g}, PyTorch's {rivals[n]:.3g}"


def test_hooks_on_norms_of_a_network_fire():
    net = Residual().to(memory_format=torch.channels_last)
    seen = []
    for i, norm in enumerate(net.norms):
        norm.register_forward_hook(lambda module, args, out, i=i: seen.append(i))
    net(layout(torch.randn(2, 3, 32, 32)))
    assert seen == [0, 1, 2]


# --- the operators in ATen's arithmetic -------------------------------------------------------------------------------

OPTIONS = [
    dict(act=act, residual=residual, slope=slope)
    for (act, slope), residual in itertools.product(
        [("relu", 0.0), ("leaky_relu", 0.2), ("leaky_relu", -0.5), ("none", 0.0)], [None, "plain", "norm"]
    )
]
aten = partial(bn_act, impl="aten")
masked = partial(bn_act, impl="aten", save="mask")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape, last",
    [
        ((31, 17), False),
        ((5, 7, 6, 6), False),
        ((5, 7, 6, 6), True),
        ((4, 6, 5), False),
        ((3, 4, 2, 3, 4), True),
        ((2, 3, 1, 1), True),
    ],
)
def test_aten_error_rule(shape, last, dtype):
    for options in OPTIONS:
        case = norms.make(shape, dtype, last=last, **options)
        got = case.check(aten)
        for name, value in case.steep_apart().run(masked).items():
            torch.testing.assert_close(value, got[name], msg=f"{name} with a mask")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_in_half_precision(dtype):
    norms.make((5, 7, 6, 6), dtype, residual="norm", norm_dtype=dtype).check(aten)


@pytest.mark.parametrize("save", ["residual", "mask"])
@pytest.mark.parametrize("options", OPTIONS[:6] + OPTIONS[9:], ids=str)
def test_gradcheck(options, save):
    for shape, last in (((3, 2, 2, 3), False), ((3, 2, 2, 3), True), ((11, 2), False)):
        case = norms.make(shape, torch.float64, last=last, norm_dtype=torch.float64, **options)
        leaves = [case.x, case.norm.weight, case.norm.bias]
        leaves += [case.residual] if case.residual is not None else []
        leaves += [case.second.weight, case.second.bias] if case.second is not None else []

        def call(x, weight, bias, residual=None, weight2=None, bias2=None, case=case):
            case.norm._parameters |= dict(weight=weight, bias=bias)
            if case.second is not None:
                case.second._parameters |= dict(weight=weight2, bias=bias2)
            return case.call(partial(bn_act, impl="aten", save=save), x, residual)

        assert torch.autograd.gradcheck(call, [t.detach().clone().requires_grad_() for t in leaves])


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=4)))
def test_aten_partial_gradients(needs):
    for residual, act in (("norm", "relu"), ("plain", "none"), ("norm", "none")):
        case = norms.make((6, 5, 3, 3), residual=residual, act=act)
        full = case.run(aten)
        flags = (*needs, needs[0], needs[1])
        names = ("dx", "dresidual", "dweight", "dbias", "dweight2", "dbias2")
        wanted = {name for name, need in zip(names, flags) if need and name in full}
        got = case.run(aten, flags)
        assert {name for name in got if name.startswith("d")} == wanted
        for name, value in got.items():
            torch.testing.assert_close(value, full[name], rtol=1e-6, atol=1e-6, msg=name)


def kept(case, **options):
    """Bytes kept for backward besides parameters and what comes in."""
    state = [p for norm in (case.norm, case.second) if norm is not None for p in norm.parameters()]
    with as_on_gpu(), SavedBytes([*state, case.x, *([] if case.residual is None else [case.residual])]) as saved:
        y = case.call(partial(bn_act, **options), case.x.requires_grad_(), case.residual)
    assert y.grad_fn.name().startswith("_Function")
    return saved.current


def test_saved_bytes():
    """Statistics only: input and residual live anyway. With a mask a bit for each element, and not the residual."""
    for options in OPTIONS:
        case = norms.make((17, 5, 3, 4), **options)
        assert kept(case) == 4 * 5 * (4 if options["residual"] == "norm" else 2)
    case = norms.make((17, 5, 3, 4), residual="plain")
    assert kept(case, save="mask") == 4 * 5 * 2 + 3 * 5 * 12
    with as_on_gpu(), SavedBytes([*case.norm.parameters(), case.x]) as saved:
        y = bn_act(case.x, case.norm, case.residual + 0, save="mask")  # a residual that nobody else keeps
    assert saved.current == 4 * 5 * 2 + 3 * 5 * 12 and y.requires_grad
    with as_on_gpu(), SavedBytes([*case.norm.parameters(), case.x]) as saved:
        y = bn_act(case.x, case.norm, case.residual + 0, act="none", save="mask")  # no activation, nothing to tell
    assert saved.current == 4 * 5 * 2


def test_changed_statistics_are_noticed():
    case = norms.make((6, 5, 3, 3), residual="norm")
    evaluated = copy.deepcopy(case.norm).eval()
    evaluated.running_mean, evaluated.running_var = case.norm.running_mean, case.norm.running_var
    out = evaluated(case.x)
    case.call(aten, case.x, case.residual)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    assert case.second.running_var._version > 0


def test_the_gradient_that_comes_in_is_left_alone():
    """An addition hands the same tensor to both of its operands."""
    for residual, act in ((None, "none"), ("plain", "none"), ("plain", "relu"), ("norm", "none")):
        case = norms.make((6, 5, 3, 3), residual=residual, act=act)
        before = case.dy.clone()
        case.run(aten)
        assert torch.equal(case.dy, before)
        x, other = case.x.clone().requires_grad_(), torch.zeros_like(case.x, requires_grad=True)
        (case.call(aten, x, case.residual) + other).backward(case.dy)
        assert torch.equal(other.grad, before)


@pytest.mark.parametrize("shape, last", [((5, 7, 6, 6), False), ((5, 7, 6, 6), True), ((31, 17), False)])
def test_evaluation(shape, last):
    for options in OPTIONS:
        case = norms.make(shape, last=last, **options)
        for norm in (case.norm, case.second):
            if norm is not None:
                norm.eval()
        assert ops.explain(bn_act, case.x, case.norm).chosen == "reference"
        with pytest.raises(BackendError, match="gradients are recorded"):
            case.call(aten, case.x, case.residual)
        before = copy.deepcopy(case.norm.state_dict())
        with torch.no_grad(), as_on_gpu(), LaunchCounter() as counter:
            got = case.call(bn_act, case.x, case.residual)
        torch.testing.assert_close(got, case.call(reference.bn_act, case.x, case.residual).detach())
        assert counter.by_op == {"fastlocal::bn_act_eval": 1} and got.stride() == case.x.stride()
        assert all(torch.equal(value, case.norm.state_dict()[name]) for name, value in before.items())
    if len(shape) == 4:
        case.second = nn.BatchNorm2d(7)
        with torch.no_grad():
            misfit = ops.explain(bn_act, case.x, case.norm, case.x, residual_norm=case.second)
        assert "one norm is in training" in dict(misfit.rejected)["aten"]


@pytest.mark.parametrize(
    "shape, last, dtype, act, residual, mask",
    [
        ((4, 5, 3, 3), False, torch.float32, "relu", None, False),
        ((9, 5, 3, 3), True, torch.bfloat16, "leaky_relu", "plain", True),
        ((4, 5, 3, 3), False, torch.float32, "none", "norm", False),
    ],
)
def test_aten_opcheck(shape, last, dtype, act, residual, mask):
    case = norms.make(shape, dtype, last=last, residual=residual)
    weight, bias = (p.detach().clone() for p in case.norm.parameters())
    second = [None] * 4
    if case.second is not None:
        second = [p.detach() for p in case.second.parameters()] + [case.second.running_mean, case.second.running_var]
    statistics = [case.norm.running_mean, case.norm.running_var]
    inputs = (case.x, case.residual, weight, bias, *statistics, 0.1, 1e-5, *second, 0.1, 1e-5, act, 0.1, mask, "aten")
    torch.library.opcheck(MODULE._forward, inputs)
    _, stats, bits = MODULE._forward(*inputs)
    saved = (None if mask else case.residual, None, bits if mask else None)
    for need_x, need_residual in ((True, residual is not None), (False, False)):
        flags = (act, 0.1, need_x, need_residual, "aten")
        torch.library.opcheck(MODULE._backward, (case.dy, case.x, *saved, weight, bias, *second[:2], stats, *flags))
    for again in (True, False):
        arguments = (case.dy.clone(), case.x, weight, bias, stats[:2].clone(), act, 0.1, again, "aten")
        torch.library.opcheck(MODULE._backward_, arguments)
    folded = (case.x, case.residual, weight, bias, *statistics, 1e-5, *second, 1e-5, act, 0.1, "aten")
    torch.library.opcheck(MODULE._eval, folded)


def test_compiled_misfits():
    """What only the modules can do is not compiled into an operator, and a request that cannot be served is refused."""
    x, norm = torch.randn(4, 6, 5, 5), nn.BatchNorm2d(6)
    hooked = with_hook(copy.deepcopy(norm), "register_forward_hook")
    for impl in (None, "auto"):
        twin = copy.deepcopy(hooked)
        got = torch.compile(lambda x, n=twin, impl=impl: bn_act(x, n, impl=impl), backend="eager")(x)
        torch.testing.assert_close(got, copy.deepcopy(norm)(x).relu())
    with pytest.raises(BackendError, match="hooks"):
        torch.compile(lambda x: bn_act(x, hooked, impl="aten"), backend="eager")(x)


@pytest.mark.parametrize("residual, save", [("plain", "residual"), ("plain", "mask"), ("norm", "residual")])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_whole(backend, residual, save):
    case = norms.make((9, 5, 3, 3), residual=residual)
    want = case.run(partial(bn_act, impl="aten", save=save))

    def whole(x, norm, residual, **options):
        function = torch.compile(
            lambda x, r: bn_act(x * 1, norm, r, save=save, **options) * 1, backend=backend, fullgraph=True
        )
        return function(x, residual)

    for name, value in case.run(whole).items():
        torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-5, msg=name)


def test_arguments():
    x, norm, residual, _ = make((4, 6, 5, 5))
    with pytest.raises(ArgumentError, match=r"act='rellu' is not an activation.*relu"):
        bn_act(x, norm, act="rellu")
    with pytest.raises(ArgumentError, match="save='bits' is not one of"):
        bn_act(x, norm, residual, save="bits")
    with pytest.raises(ArgumentError, match="residual_norm normalises the residual"):
        bn_act(x, norm, residual_norm=norm)


@needs_native
def test_what_native_does_not_do_is_left_to_the_modules():
    x, norm, residual, _ = make((4, 6, 5, 5))
    for options in (dict(act="leaky_relu"), dict(residual_norm=copy.deepcopy(norm)), dict(save="mask")):
        choice = ops.explain(bn_act, x, norm, residual, **options)
        assert choice.chosen == "reference" and "it has no" in dict(choice.rejected)["native"]
    own, twin = copy.deepcopy(norm), copy.deepcopy(norm)
    got = bn_act(x, copy.deepcopy(norm), residual, residual_norm=own)
    torch.testing.assert_close(got, (copy.deepcopy(norm)(x) + twin(residual)).relu())
    assert torch.equal(own.running_mean, twin.running_mean)


def test_a_misfit_of_the_second_norm():
    x, norm, residual, _ = make((4, 6, 5, 5))
    second = with_hook(copy.deepcopy(norm), "register_forward_hook")
    assert "hooks" in dict(ops.explain(bn_act, x, norm, residual, residual_norm=second).rejected)["aten"]
    with as_on_gpu():
        got = bn_act(x, copy.deepcopy(norm), residual, residual_norm=copy.deepcopy(second))
    torch.testing.assert_close(got, (copy.deepcopy(norm)(x) + copy.deepcopy(norm)(residual)).relu())


def test_the_input_is_not_changed_by_modules_that_return_it():
    x = torch.randn(4, 6)
    before = x.clone()
    assert torch.equal(bn_act(x, nn.Identity()), x.relu()) and torch.equal(x, before)
    assert torch.equal(bn_act(x, nn.Identity(), x), (x + x).relu()) and torch.equal(x, before)
