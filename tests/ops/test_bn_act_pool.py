import copy
import itertools
import math
import sys

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.module import register_module_forward_hook

import fastlocal as fl
from fastlocal import ops, reference
from fastlocal.blocks.measure import LaunchCounter, SavedBytes
from fastlocal.errors import ArgumentError, BackendError
from fastlocal.ops import bn_act, bn_act_pool
from fastlocal.ops._dispatch import as_on_gpu
from tests.ops.cases import assert_within_error_rule

MODULE = sys.modules["fastlocal.ops.bn_act_pool"]
ACTS = ("relu", "leaky_relu", "none")
RESIDUALS = (0, 1, 2)  # none, added, normalised and added
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


# --- shared with the tests of the kernels -----------------------------------------------------------------------------


def norm_for(x, training=True):
    norm = NORMS[x.dim()](x.shape[1])
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2).mul_(torch.where(torch.arange(x.shape[1]) % 3 == 1, -1, 1))
        norm.bias.normal_()
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return norm.train(training)


def make(shape, dtype=torch.float32, kind=0, last=False, training=True, mean=0.0, std=1.0):
    """x, norm, residual, residual_norm, dpooled; `kind` is one of RESIDUALS."""

    def features():
        x = (torch.randn(shape) * std + mean).to(dtype)
        return x.to(memory_format=LAST[len(shape)]) if last else x

    x = features()
    residual = features() if kind else None
    residual_norm = norm_for(x, training) if kind == 2 else None
    if residual_norm is not None:
        residual_norm.eps, residual_norm.momentum = 1e-2, 0.3  # unlike the other's
    return x, norm_for(x, training), residual, residual_norm, torch.randn(shape[:2]).to(dtype)


def to_double(args):
    return [None if t is None else copy.deepcopy(t).double() for t in args]


def activation_input(args):
    """z, its distance from zero that rounding in float32 may bridge, and the largest weight / deviation; in float64."""
    x, norm, residual, residual_norm, _ = to_double(args)
    size, scale = x.new_zeros(()), x.new_zeros(())
    with torch.no_grad():
        z = norm(x)
        parts = [(x, norm)] if residual_norm is None else [(x, norm), (residual, residual_norm)]
        for t, n in parts:
            var = t.var((0, *range(2, t.dim())), correction=0) if n.training else n.running_var
            steep = (n.weight.abs() * (var + n.eps).rsqrt()).amax()
            size, scale = size + steep * t.abs().amax(), torch.maximum(scale, steep)
        if residual is not None:
            z = z + (residual if residual_norm is None else residual_norm(residual))
        size = size + z.abs().amax()
    return z, 16 * torch.finfo(torch.float32).eps * size.item(), scale.item()


def settle(args):
    """Moves values of x so that no activation's sign is a matter of rounding, which would decide a gradient."""
    x = args[0]
    for _ in range(50):
        z, near, _ = activation_input((x, *args[1:]))
        close = z.abs() < near
        if not close.any():
            return (x, *args[1:])
        x = torch.where(close, (x + 0.1 * x.float().std()).to(x.dtype), x)
        x = x.to(memory_format=LAST[x.dim()]) if args[0].dim() in LAST and _last(args[0]) else x.contiguous()
    raise AssertionError("does not settle")


def _last(x):
    return x.is_contiguous(memory_format=LAST[x.dim()]) and not x.is_contiguous()


def run(op, args, act="relu", **options):
    """Results by name; the arguments are not changed."""
    x, norm, residual, residual_norm, dpooled = args
    norm, residual_norm = copy.deepcopy(norm), copy.deepcopy(residual_norm)
    leaves = [
        x.detach().clone().requires_grad_(),
        None if residual is None else residual.detach().clone().requires_grad_(),
    ]
    pooled = op(leaves[0], norm, leaves[1], act=act, residual_norm=residual_norm, **options)
    pooled.backward(dpooled)
    result = dict(pooled=pooled.detach(), dx=leaves[0].grad)
    if residual is not None:
        result["dresidual"] = leaves[1].grad
    for name, n in (("", norm), ("residual_", residual_norm)):
        if n is not None:
            result |= {f"d{name}weight": n.weight.grad, f"d{name}bias": n.bias.grad}
            result |= {f"{name}running_mean": n.running_mean, f"{name}running_var": n.running_var}
            result[f"{name}batches"] = n.num_batches_tracked
    return result


def check(args, impl, what="", act="relu", **options):
    """The error rule for every result of `impl`."""
    x, norm, residual, _, dpooled = args = args if act == "none" else settle(args)
    got = run(bn_act_pool, args, act, impl=impl, **options)
    same = run(reference.bn_act_pool, args, act, **options)
    truth = run(reference.bn_act_pool, to_double(args), act, **options)
    z, _, scale = activation_input(args)
    values, positions = x.numel() // x.shape[1], math.prod(x.shape[2:])
    largest = max(t.abs().max().item() for t in (x.float(), residual.float() if residual is not None else x.float()))
    share = dpooled.abs().max().item() / positions
    hat = (scale * largest + 1) / 0.5  # weights are at least 0.5
    terms = dict(pooled=scale * largest + z.abs().max().item(), dx=scale * share * hat, dresidual=scale * share * hat)
    # A sample's positions share a gradient: partial sums grow as samples' do, and equal terms round in one direction.
    sums = 4 * len(x) ** 0.5 * share * positions
    terms |= dict(dweight=sums + values**0.5 * share * hat, dbias=sums)
    terms |= dict(running_mean=largest, running_var=(2 * largest) ** 2 if norm.training else 0.0)
    assert got.keys() == truth.keys()
    assert got["pooled"].dtype == got["dx"].dtype == x.dtype
    for name, value in got.items():
        if name.endswith("batches"):
            assert value.item() == truth[name].item() == int(norm.training), f"{what} {name}"
            continue
        term = terms.get(name.replace("residual_", ""), 0.0)
        assert_within_error_rule(value, same[name], truth[name], f"{what} {name}", term)


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [2, 3, 31, 63, 127])
def test_error_rule(rows, dtype):
    spatials = {(1, 1): 127, (7, 7): 31, (): 63, (5,): 3, (2, 3, 2): 5, (32, 32): 3}
    for (spatial, channels), kind, training in itertools.product(spatials.items(), RESIDUALS, [True, False]):
        if spatial == (32, 32) and rows > 3:
            continue
        for act in ACTS if spatial == (7, 7) and rows == 3 else [ACTS[(rows + kind) % 3]]:
            last = len(spatial) > 1 and rows in (3, 63)
            args = make((rows, channels, *spatial), dtype, kind, last, training)
            check(args, "aten", f"{spatial} residual={kind} training={training} {act}", act)


@pytest.mark.parametrize("mean, std", [(1e3, 1.0), (-1e3, 1.0), (1e-3, 1e-4)])
@pytest.mark.parametrize("kind", RESIDUALS)
def test_mean_far_from_zero(kind, mean, std):
    for act in ACTS:
        check(make((8, 19, 16, 16), kind=kind, mean=mean, std=std), "aten", act, act)
    check(make((8, 19, 16, 16), torch.bfloat16, kind, mean=mean, std=abs(mean) / 20), "aten", "bfloat16")


def test_float16_sums_do_not_overflow():
    x, norm, _, _, dpooled = make((2, 3, 128, 128), torch.float16)
    nn.init.constant_(norm.bias, 100.0)  # the sum of 16,384 activations of 100 is beyond 65,504
    for impl in ("aten", "reference"):
        pooled = bn_act_pool(x, copy.deepcopy(norm), impl=impl)
        torch.testing.assert_close(pooled, torch.full_like(pooled, 100.0), rtol=1e-2, atol=0)
    check((x, norm, None, None, dpooled), "aten")


def test_is_bn_act_and_a_mean():
    for kind, act in itertools.product(RESIDUALS, ACTS):
        args = to_double(make((6, 5, 4, 3), kind=kind))
        got = run(bn_act_pool, args, act, impl="aten")

        def separate(*args, **options):
            return bn_act(*args, impl="aten", **options).mean((2, 3))

        want = run(separate, args, act)
        for name, value in got.items():
            torch.testing.assert_close(value, want[name])


def test_slope():
    args = to_double(make((4, 5, 3, 3)))
    for slope in (0.0, 0.3, 1.0, -0.5):
        got, want = (run(f, args, "leaky_relu", slope=slope) for f in (aten, reference.bn_act_pool))
        for name, value in got.items():
            torch.testing.assert_close(value, want[name])
    assert not torch.equal(run(aten, args, "leaky_relu", slope=0.3)["dx"], got["dx"])


def aten(*args, **options):
    return bn_act_pool(*args, impl="aten", **options)


@pytest.mark.parametrize("impl", ["aten", "reference"])
def test_running_statistics_over_steps(impl):
    x, norm, residual, residual_norm, _ = make((9, 4, 6, 6), kind=2)
    twins = [copy.deepcopy(n).double() for n in (norm, residual_norm)]
    for momentum in (0.1, 0.0, 1.0, 0.3):
        norm.momentum = twins[0].momentum = momentum
        residual_norm.momentum = twins[1].momentum = momentum / 2
        x, residual = torch.randn_like(x) * 3 + 1, torch.randn_like(x) - 2
        with torch.no_grad():
            assert not bn_act_pool(x, norm, residual, residual_norm=residual_norm, impl=impl).requires_grad
        twins[0](x.double()), twins[1](residual.double())
        for n, twin in zip((norm, residual_norm), twins):
            for name in ("running_mean", "running_var"):
                torch.testing.assert_close(getattr(n, name).double(), getattr(twin, name), rtol=1e-5, atol=1e-6)
    assert norm.num_batches_tracked.item() == residual_norm.num_batches_tracked.item() == 4
    norm.num_batches_tracked = None  # as a loaded old checkpoint may have it
    bn_act_pool(x, norm, impl=impl)


def test_evaluation_changes_nothing():
    args = make((4, 5, 3, 3), kind=2, training=False)
    before = copy.deepcopy([n.state_dict() for n in (args[1], args[3])])
    bn_act_pool(args[0], args[1], args[2], residual_norm=args[3], impl="aten")
    for n, state in zip((args[1], args[3]), before):
        assert all(torch.equal(value, state[name]) for name, value in n.state_dict().items())


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("where", ["x", "residual", "dpooled"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nonfinite_values_stay_where_pytorch_has_them(bad, where, act):
    args = make((6, 5, 4, 4), kind=1)
    victim = dict(x=args[0], residual=args[2], dpooled=args[4])[where]
    victim[(3, 2) + (1, 2) * (victim.dim() == 4)] = bad
    got, want = run(aten, args, act), run(reference.bn_act_pool, args, act)
    assert not got["dbias" if where == "dpooled" else "pooled"].isfinite().all()
    for name, value in got.items():
        assert torch.equal(value.isfinite(), want[name].isfinite()), name
    # A ReLU lets the gradient of a nan pass, a leaky one its share.
    torch.testing.assert_close(got["dresidual"], want["dresidual"], equal_nan=True)


def test_channel_without_variance():
    args = make((8, 6, 5, 5))
    args[0][:, 2] = -7.3
    got, want = run(aten, args, "none"), run(reference.bn_act_pool, args, "none")
    for name, value in got.items():
        assert value.isfinite().all()
        if name != "dx":
            torch.testing.assert_close(value, want[name], rtol=1e-2, atol=1e-2)


def test_half_precision_parameters():
    for dtype, kind in itertools.product((torch.bfloat16, torch.float16), RESIDUALS):
        x, norm, residual, residual_norm, dpooled = make((16, 5, 4, 4), dtype, kind)
        norm = norm.to(dtype)
        residual_norm = None if residual_norm is None else residual_norm.to(dtype)
        args = settle((x, norm, residual, residual_norm, dpooled))
        got, truth = run(aten, args), run(reference.bn_act_pool, to_double(args))
        for name, value in got.items():
            if not name.endswith("batches"):
                assert value.dtype == dtype
                torch.testing.assert_close(value.double(), truth[name], rtol=4e-2, atol=4e-2)


# --- autograd ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", RESIDUALS)
@pytest.mark.parametrize("act", ACTS)
def test_gradcheck(act, kind, training):
    x, norm, residual, residual_norm, _ = to_double(settle(make((3, 2, 2, 2), kind=kind, training=training)))
    norms = [n for n in (norm, residual_norm) if n is not None]
    leaves = [t for t in (x, residual, *(p for n in norms for p in n.parameters())) if t is not None]
    leaves = [t.requires_grad_() for t in leaves]

    def pooled(*_):
        return bn_act_pool(x, norm, residual, act=act, slope=0.2, residual_norm=residual_norm, impl="aten")

    assert torch.autograd.gradcheck(pooled, leaves)


def test_second_derivative():
    x, norm, residual, _, _ = to_double(make((3, 2, 2, 2), kind=1))
    assert torch.autograd.gradgradcheck(
        lambda x: reference.bn_act_pool(x, norm, residual, act="none"), x.requires_grad_()
    )
    (grad,) = torch.autograd.grad(bn_act_pool(x, norm, impl="aten").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("act", ["relu", "none"])
@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=4)))
def test_partial_gradients(needs, act):
    for kind in RESIDUALS:
        x, norm, residual, residual_norm, dpooled = args = make((6, 5, 3, 3), kind=kind)
        full = run(aten, args, act)
        parts = dict(dx=x, dweight=norm.weight, dbias=norm.bias, dresidual=residual)
        if kind == 2:
            parts |= dict(dresidual_weight=residual_norm.weight, dresidual_bias=residual_norm.bias)
        wanted = dict(zip(("dx", "dweight", "dbias", "dresidual"), needs))
        wanted |= dict(dresidual_weight=needs[2], dresidual_bias=needs[1])
        parts = {name: t for name, t in parts.items() if t is not None}
        for name, t in parts.items():
            t.requires_grad_(wanted[name])
        pooled = bn_act_pool(x, norm, residual, act=act, residual_norm=residual_norm, impl="aten")
        assert pooled.requires_grad == any(wanted[name] for name in parts)
        if pooled.requires_grad:
            pooled.backward(dpooled)
        for name, t in parts.items():
            assert (t.grad is not None) == wanted[name], name
            assert t.grad is None or torch.equal(t.grad, full[name]), name


def test_gradients_have_the_layout_of_what_they_belong_to():
    x, norm, residual, _, dpooled = make((4, 6, 5, 5), kind=1)
    x = x.to(memory_format=torch.channels_last)
    leaves = x.requires_grad_(), residual.requires_grad_()
    bn_act_pool(leaves[0], norm, leaves[1], impl="aten").backward(dpooled)
    assert x.grad.stride() == x.stride() and residual.grad.stride() == residual.stride()


@pytest.mark.parametrize("kind", RESIDUALS)
def test_any_strides(kind):
    args = make((4, 6, 5, 8), kind=kind)
    want = run(aten, args)
    wide = torch.full((4, 6, 5, 16), 7.0)
    wide[..., ::2] = args[0]
    for x in (
        args[0].to(memory_format=torch.channels_last),
        args[0].transpose(2, 3).contiguous().transpose(2, 3),
        args[0].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        wide[..., ::2],
    ):
        for dpooled in (args[4], args[4].t().contiguous().t()):
            got = run(aten, (x, *args[1:4], dpooled))
            for name, value in got.items():
                torch.testing.assert_close(value, want[name], rtol=1e-4, atol=1e-5)


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("kind", RESIDUALS)
def test_what_is_saved(kind, act):
    x, norm, residual, residual_norm, dpooled = make((16, 5, 8, 8), kind=kind)
    x.requires_grad_()
    saved = []
    held = SavedBytes(exclude=[*norm.parameters(), *(residual_norm.parameters() if kind == 2 else ())])
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        bn_act_pool(x, norm, residual, act=act, residual_norm=residual_norm, impl="aten")
    with held:
        pooled = bn_act_pool(x, norm, residual, act=act, residual_norm=residual_norm, impl="aten")
    large = {t.data_ptr() for t in saved if t.numel() > 5}
    keeps = kind == 2 or (kind == 1 and act != "none")
    assert large == {x.data_ptr()} | ({residual.data_ptr()} if keeps else set())  # by alias
    assert held.current == x.nbytes * (1 + keeps) + 2 * 5 * 4 * (1 + (kind == 2))
    with SavedBytes() as plain:
        other = bn_act_pool(x, norm, residual, act=act, residual_norm=residual_norm, impl="reference")
    more = x.nbytes if act != "none" and kind != 1 else 0  # an added residual lives anyway, the activation would not
    assert plain.current >= held.current + more
    for result in (pooled, other):
        result.backward(dpooled)


def test_inputs_are_left_alone():
    x, norm, residual, residual_norm, dpooled = make((5, 6, 4, 4), kind=2)
    tensors = x, residual, dpooled
    copies = [t.clone() for t in tensors]
    leaves = x.requires_grad_(), residual.requires_grad_()
    bn_act_pool(leaves[0], norm, leaves[1], residual_norm=residual_norm, impl="aten").backward(dpooled)
    for t, before in zip(tensors, copies):
        assert torch.equal(t.detach(), before)
    shared = bn_act_pool(x.detach(), norm.eval(), x.detach(), impl="aten")  # the residual may be x itself
    torch.testing.assert_close(shared, reference.bn_act_pool(x.detach(), norm, x.detach()))
    x, norm = torch.randn(4, 6, 1, 1, requires_grad=True), nn.BatchNorm2d(6)
    assert bn_act_pool(x, norm, act="none", impl="aten").data_ptr() != x.data_ptr()


@pytest.mark.parametrize("name", ["x", "residual", "weight", "bias"])
def test_a_change_before_backward_is_noticed(name):
    x, norm, residual, _, dpooled = make((5, 6, 4, 4), kind=1)
    pooled = bn_act_pool(x.requires_grad_(), norm, residual, impl="aten")
    with torch.no_grad():
        dict(x=x, residual=residual, weight=norm.weight, bias=norm.bias)[name].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        pooled.backward(dpooled)


def test_moved_statistics_are_noticed():
    x, norm, _, _, _ = make((5, 6, 4, 4))
    before = norm.running_mean._version, norm.running_var._version
    bn_act_pool(x, norm, impl="aten")
    assert (norm.running_mean._version, norm.running_var._version) > before


# --- the choice -------------------------------------------------------------------------------------------------------


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
    "GroupNorm is not a plain": lambda x, n, r, m: (x, nn.GroupNorm(2, 6), r, m),
    "Own is not a plain": lambda x, n, r, m: (x, Own(6), r, m),
    "residual_norm: Identity is not": lambda x, n, r, m: (x, n, r, nn.Identity()),
    "without running statistics": lambda x, n, r, m: (x, nn.BatchNorm2d(6, track_running_stats=False), r, m),
    "without running statistics ": lambda x, n, r, m: (x, nn.BatchNorm2d(6, affine=False), r, m),
    "without running statistics  ": lambda x, n, r, m: (x, edited(n, momentum=None), r, m),
    "without running statistics   ": lambda x, n, r, m: (x, n, r, edited(m, momentum=None)),
    "hooks": lambda x, n, r, m: (x, with_hook(n, "register_forward_hook"), r, m),
    "hooks ": lambda x, n, r, m: (x, n, r, with_hook(m, "register_forward_pre_hook")),
    "forward of its own": lambda x, n, r, m: (x, edited(n, forward=lambda x: x * 2), r, m),
    "another shape": lambda x, n, r, m: (x, n, r[:1], None),
    "another shape, dtype": lambda x, n, r, m: (x, n, r.double(), None),
    "one norm is used twice": lambda x, n, r, m: (x, n, r, n),
    "one norm is in training": lambda x, n, r, m: (x, n, r, m.eval()),
    "there is no value": lambda x, n, r, m: (x[:0], n, r[:0], m),
    "neither all torch.float32": lambda x, n, r, m: (
        x.half(),
        edited(n, weight=nn.Parameter(n.weight.half())),
        r.half(),
        m,
    ),
}


@pytest.mark.parametrize("reason", MISFITS)
def test_a_misfit_is_the_plain_modules(reason):
    x, norm, residual, residual_norm, _ = make((4, 6, 5, 5), kind=2)
    x, norm, residual, residual_norm = MISFITS[reason](x, norm, residual, residual_norm)
    choice = ops.explain(bn_act_pool, x, norm, residual, residual_norm=residual_norm)
    for backend in ("aten", "triton"):
        assert choice.chosen == "reference" and reason.strip() in dict(choice.rejected)[backend]
    with pytest.raises(BackendError, match=f'bn_act_pool: backend "aten" cannot serve.*{reason.strip()}'):
        bn_act_pool(x, norm, residual, residual_norm=residual_norm, impl="aten")
    if reason.startswith("neither"):
        return  # the module cannot take it either
    twins = copy.deepcopy([norm, residual_norm]) if norm is not residual_norm else [copy.deepcopy(norm)] * 2
    for act in ("relu", "none"):
        want = twins[0](x) + (residual if residual_norm is None else twins[1](residual))
        want = (want.relu() if act == "relu" else want).mean((2, 3))
        got = bn_act_pool(x, norm, residual, act=act, residual_norm=residual_norm)
        torch.testing.assert_close(got, want)
    for n, twin in zip((norm, residual_norm), twins):
        if n is not None:
            assert all(torch.equal(value, twin.state_dict()[name]) for name, value in n.state_dict().items())


def test_global_hooks_see_the_norm():
    x, norm, _, _, _ = make((4, 6, 5, 5))
    seen = []
    handle = register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        with as_on_gpu():
            bn_act_pool(x, norm)
    finally:
        handle.remove()
    assert seen == [norm]


def test_errors():
    for x, norm in ((torch.randn(1, 6), nn.BatchNorm1d(6)), (torch.randn(1, 6, 1, 1), nn.BatchNorm2d(6))):
        for op in (bn_act_pool, reference.bn_act_pool):
            with pytest.raises(ValueError, match="more than 1 value per channel"):
                op(x, norm)
        bn_act_pool(x, norm.eval(), impl="aten")
    with pytest.raises(ValueError, match="expected"):
        bn_act_pool(torch.randn(4, 6, 5), nn.BatchNorm2d(6))
    with pytest.raises((RuntimeError, ValueError)):
        bn_act_pool(torch.randn(4, 6, 5, 5), nn.BatchNorm2d(7))
    x, norm, _, residual_norm, _ = make((4, 6, 5, 5), kind=2)
    with pytest.raises(ArgumentError, match=r"act='rleu' is not an activation.*relu"):
        bn_act_pool(x, norm, act="rleu")
    with pytest.raises(ArgumentError, match="residual is None"):
        bn_act_pool(x, norm, residual_norm=residual_norm)
    with pytest.raises(ArgumentError, match="impl='atne' is not a backend"):
        bn_act_pool(x, norm, impl="atne")
    with pytest.raises(BackendError, match="no such implementation"):
        bn_act_pool(x, norm, impl="native")


def test_requests():
    x, norm, residual, _, _ = make((4, 6, 5, 5), kind=1)
    if ops.explain(bn_act_pool, x, norm).chosen == "triton":
        pytest.skip("the Triton interpreter is on")
    assert ops.explain(bn_act_pool, x, norm, residual).chosen == "reference"
    with LaunchCounter() as counter:
        bn_act_pool(x, norm, residual)
        assert "fastlocal::bn_act_pool_forward" not in counter.by_op
        with as_on_gpu():
            bn_act_pool(x, norm, residual)
        assert counter.by_op["fastlocal::bn_act_pool_forward"] == 1
        with fl.backend("aten"):
            bn_act_pool(x, norm, residual)
    assert counter.by_op["fastlocal::bn_act_pool_forward"] == 2
    with pytest.raises(BackendError, match=r"CUDA device|pip install"):
        bn_act_pool(x, norm, impl="triton")
    good = MODULE.Signature("cuda", None, torch.bfloat16, None)
    reject = MODULE._reject_triton
    assert reject(good) is None and reject(good._replace(fits="why")) == "why" == reject(good._replace(triton="why"))
    assert "float64" in reject(good._replace(dtype=torch.float64))
    assert "interpreter" in reject(good._replace(device="cpu"))


def test_launches():
    """By shape, as the kernel's tests find them."""
    for shape, last, forward, backward in (
        ((512, 64, 8, 8), False, 1, 1),  # 32,768 values for each channel
        ((513, 64, 8, 8), False, 2, 2),
        ((256, 2048, 7, 7), False, 1, 1),
        ((32, 64, 8, 8), True, 1, 1),
        ((33, 64, 8, 8), True, 2, 2),
    ):
        with FakeTensorMode():
            x, norm = torch.empty(shape), nn.BatchNorm2d(shape[1])
            x = x.to(memory_format=torch.channels_last) if last else x
            with LaunchCounter() as counter:
                bn_act_pool(x.requires_grad_(), norm, impl="aten").backward(torch.empty(shape[:2]))
        names = ("fastlocal::bn_act_pool_forward", "fastlocal::bn_act_pool_backward")
        assert [counter.by_op[name] for name in names] == [forward, backward], shape
    x, norm, _, _, _ = make((513, 8, 8, 8), training=False)
    with LaunchCounter() as counter:
        bn_act_pool(x, norm, impl="aten")  # evaluation has no statistics to merge
        bn_act_pool(x[:4].transpose(2, 3)[..., :7], norm, impl="aten")  # and a copy, which no one stride leads through
    assert counter.by_op["fastlocal::bn_act_pool_forward"] == 1 + 2


# --- PyTorch's own machinery ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, training, dtype",
    [(0, True, torch.float32), (1, False, torch.bfloat16), (2, True, torch.bfloat16), (2, False, torch.float32)],
)
def test_opcheck(kind, training, dtype):
    x, norm, residual, residual_norm, dpooled = make((4, 6, 3, 3), dtype, kind, training=training)
    own = norm.weight.detach(), norm.bias.detach(), norm.running_mean, norm.running_var, norm.num_batches_tracked
    other = MODULE._parts(residual_norm)
    if residual_norm is not None:
        other = tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in other)
    args = (x, *own, 0.1, 1e-5, residual, *other, training, "relu", 0.01, "aten")
    torch.library.opcheck(MODULE._forward, args)
    _, *statistics = MODULE._forward(*args)
    extra = (*other[:2], *statistics[2:]) if kind == 2 else (None,) * 4
    needs = [True, kind > 0]
    args = (dpooled, x, *own[:2], *statistics[:2], residual, *extra, training, "relu", 0.01, needs, "aten")
    torch.library.opcheck(MODULE._backward, args)


def test_fake_tensors():
    with FakeTensorMode():
        x = torch.randn(4, 6, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
        norm = nn.BatchNorm2d(6)
        pooled = bn_act_pool(x, norm, impl="aten")
        pooled.sum().backward()
    assert pooled.shape == (4, 6) and x.grad.stride() == x.stride() and norm.weight.grad.shape == (6,)


@pytest.mark.parametrize("backend, impl, kind", [("eager", None, 1), ("aot_eager", "aten", 2)])
def test_compile_fullgraph_equals_eager(backend, impl, kind):
    x, norm, residual, residual_norm, dpooled = args = make((4, 6, 5, 5), kind=kind)
    want = run(bn_act_pool, args, impl=impl)
    leaves = x.clone().requires_grad_(), residual.clone().requires_grad_()

    def step(x, r):
        return bn_act_pool(x * 1, norm, r, residual_norm=residual_norm, impl=impl) * 1

    pooled = torch.compile(step, fullgraph=True, backend=backend)(*leaves)
    pooled.backward(dpooled)
    assert torch.equal(pooled, want["pooled"]) and torch.equal(leaves[0].grad, want["dx"])
    assert torch.equal(leaves[1].grad, want["dresidual"]) and torch.equal(norm.weight.grad, want["dweight"])
    assert torch.equal(norm.running_var, want["running_var"]) and norm.num_batches_tracked.item() == 1


def test_autocast():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
    x = torch.randn(6, 3, 10, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled = bn_act_pool(net[0](x), net[1], impl="aten")
        want = net(x).relu().mean((2, 3))
    assert pooled.dtype == torch.bfloat16
    torch.testing.assert_close(pooled, want, rtol=2e-2, atol=2e-2)
    pooled.float().sum().backward()
    assert net[1].weight.grad.dtype == torch.float32 and net[0].weight.grad.isfinite().all()


def test_fake_batch_counters():
    """What counts batches in a tensor's place counts once a call, in training only."""

    class Counter:
        calls = 0

        def add_(self, n):
            self.calls += n

    x, norm, _, _, _ = make((4, 6, 5, 5))
    for impl in ("aten", "reference"):
        counter = norm.__dict__["num_batches_tracked"] = Counter()
        bn_act_pool(x, norm.train(), impl=impl)
        bn_act_pool(x, norm.eval(), impl=impl)
        assert counter.calls == 1, impl
