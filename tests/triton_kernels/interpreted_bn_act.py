"""The kernels on the CPU, in Triton's interpreter; run by test_bn_act.py with TRITON_INTERPRET=1."""

import itertools
import os
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from fastlocal import ops, reference
from fastlocal.errors import BackendError
from fastlocal.ops import bn_act, bn_act_conv
from fastlocal.triton_kernels import bn_act as kernels
from tests.ops.norms import Case, check_conv, make, norm_for
from tests.triton_kernels.interpreter import mend

mend()
OPERATOR = sys.modules["fastlocal.ops.bn_act"]
triton = partial(bn_act, impl="triton")
with_mask = partial(bn_act, impl="triton", save="mask")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fresh memory is full of nan or of a large number: every output element must be written."""
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)

        def fill(*args, original=original, **kwargs):
            out = original(*args, **kwargs)
            return out.fill_(float("nan") if out.is_floating_point() else 113)

        monkeypatch.setattr(torch, name, fill)
    assert torch.empty(1).isnan() and torch.empty_like(torch.ones(1)).isnan()


ROUTES = ("one launch", "two launches")


@pytest.fixture(params=ROUTES)
def route(request, monkeypatch):
    take(request.param, monkeypatch)
    return request.param


def take(route, monkeypatch):
    """Two launches also for small maps, of a few programs that have several tiles each."""
    monkeypatch.setattr(OPERATOR, "ONE_LAUNCH", 1 << 15 if route == "one launch" else 0)
    monkeypatch.setattr(kernels, "PROGRAMS", 6)


OPTIONS = [
    dict(act="relu"),
    dict(act="relu", residual="plain"),
    dict(act="leaky_relu", residual="norm"),
    dict(act="none", residual="plain"),
    dict(act="none", residual="norm"),
    dict(act="leaky_relu", residual="plain"),
    dict(act="leaky_relu", slope=-0.5),
    dict(act="relu", residual="norm"),
    dict(act="none"),
]
ONE, TWO = ROUTES
SINGLE, HALF = torch.float32, torch.float16
RAGGED = [  # and which options
    ((31, 3), False, 0, ONE, SINGLE),
    ((31, 3), False, 2, TWO, HALF),
    ((127, 31), False, 1, TWO, SINGLE),
    ((127, 31), False, 5, ONE, HALF),
    ((3, 1000), False, 2, TWO, SINGLE),
    ((1000, 1), False, 3, ONE, HALF),
    ((63, 130), False, 5, TWO, HALF),
    ((3, 9, 7, 7), False, 1, ONE, HALF),
    ((3, 31, 7, 7), False, 1, TWO, SINGLE),
    ((9, 5, 7, 7), True, 2, TWO, SINGLE),
    ((9, 5, 7, 7), True, 7, ONE, HALF),
    ((1, 3, 32, 32), False, 5, TWO, SINGLE),
    ((17, 2, 32, 32), False, 2, ONE, SINGLE),
    ((2, 17, 32, 32), True, 1, TWO, HALF),
    ((2, 2, 56, 56), False, 7, TWO, HALF),
    ((2, 2, 56, 56), False, 1, ONE, SINGLE),
    ((1, 2, 56, 56), True, 0, TWO, SINGLE),
    ((10, 63, 2, 2), False, 2, ONE, SINGLE),
    ((10, 63, 2, 2), False, 4, TWO, HALF),
    ((1, 127, 1, 3), False, 6, ONE, HALF),
    ((65, 3, 1, 1), False, 4, TWO, SINGLE),
    ((4, 6, 5), False, 1, ONE, SINGLE),
    ((3, 5, 2, 3, 4), True, 8, TWO, HALF),
    ((3, 5, 2, 3, 4), False, 3, TWO, SINGLE),
]


@pytest.mark.parametrize("shape, last, option, way, dtype", RAGGED, ids=str)
def test_ragged_sizes(shape, last, option, way, dtype, monkeypatch):
    take(way, monkeypatch)
    make(shape, dtype, last=last, **OPTIONS[option]).check(triton)


@pytest.mark.parametrize("act", ["relu", "leaky_relu", "none"])
@pytest.mark.parametrize("shape, last", [((19, 4, 3, 5), False), ((9, 3, 3, 3), True), ((300, 20), False)])
def test_mask(shape, last, act, route):
    case = make(shape, last=last, residual="plain", act=act)
    got = case.check(with_mask)
    for name, value in case.steep_apart().run(triton).items():
        assert torch.equal(got[name], value), name


def saved(case, **options):
    """What is kept for backward besides parameters."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        x = case.x.clone().requires_grad_()
        case.call(partial(triton, **options), x, case.residual)
    return [t for t in kept if t is not None and t.data_ptr() not in {p.data_ptr() for p in case.norm.parameters()}]


def test_saved_mask_has_one_bit_for_each_element():
    case = make((17, 5, 3, 3), residual="plain")
    assert [(t.dtype, t.numel()) for t in saved(case)] == [
        (torch.float32, case.x.numel()), (torch.float32, case.x.numel()), (torch.float32, 10),
    ]  # fmt: skip
    masked = saved(case, save="mask")
    assert [t.dtype for t in masked] == [torch.float32, torch.uint8, torch.float32]
    bits = masked[1]
    assert bits.shape == (3, 5, 9)
    z = reference.bn_act(case.x, norm_copy(case), case.residual, act="none")
    want = torch.zeros(24, 5, 9, dtype=torch.bool)
    want[:17] = z.flatten(2) > 0
    got = (bits[:, None] >> torch.arange(8, dtype=torch.uint8).view(1, 8, 1, 1) & 1).view(24, 5, 9)
    assert torch.equal(got == 1, want)


def norm_copy(case):
    made = norm_for(tuple(case.x.shape))
    made.load_state_dict(case.norm.state_dict())
    return made


@pytest.mark.parametrize("mean, std", [(1e3, 1.0), (1e-3, 1e-4)])
@pytest.mark.parametrize("shape, last", [((8, 3, 9, 9), False), ((5, 3, 9, 9), True), ((200, 5), False)])
def test_mean_far_from_zero(shape, last, mean, std, route):
    make(shape, last=last, act="none", mean=mean, std=std).check(triton)
    make(shape, last=last, residual="norm", mean=mean, std=std).check(triton)


def test_first_value_is_no_like_the_others(route):
    case = make((16, 3, 12, 12), act="none", mean=1e3)
    case.x[0, :, 0, 0] = 0
    case.check(triton)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e3])
def test_channel_without_variance(value, route):
    case = make((8, 3, 5, 5), act="none", residual="plain")
    case.x[:, 1] = value
    got = case.run(triton)
    expected = case.norm.bias[1].detach() + case.residual[:, 1]
    torch.testing.assert_close(got["y"][:, 1], expected, rtol=1e-2, atol=value * 1e-3 + 1e-6)
    torch.testing.assert_close(got["running_var"][1], case.norm.running_var[1] * 0.9, rtol=1e-6, atol=1e-9)
    assert all(t.isfinite().all() for t in got.values())


@pytest.mark.parametrize(
    "where, bad", [("x", torch.inf), ("residual", torch.nan), ("dy", torch.nan), ("dy", torch.inf)]
)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_nonfinite_values_stay_in_their_channel(where, bad, route):
    case = make((6, 9, 4, 4), last=True, residual="plain")
    clean = case.run(triton)
    (case.residual if where == "residual" else case.x if where == "x" else case.dy)[3, 7, 2, 1] = bad
    if where == "dy":
        case.residual[3, 7, 2, 1] = 50.0  # the unit is on
        clean = replace(case, dy=torch.where(case.dy.isfinite(), case.dy, 0)).run(triton)
    for save in (triton, with_mask):
        got, want = case.run(save), case.run(reference.bn_act)
        others = [c for c in range(9) if c != 7]
        for name, value in got.items():
            at = (slice(None), others) if value.dim() == 4 else (others,)
            assert torch.equal(value[at], clean[name][at]), name
            assert torch.equal(value.isfinite(), want[name].isfinite()), f"{name}: finite elsewhere than in PyTorch"
        if where == "residual":  # a ReLU lets the gradient of a nan pass
            assert torch.equal(got["dresidual"][3, 7, 2, 1], case.dy[3, 7, 2, 1]) and case.dy[3, 7, 2, 1] != 0


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_partial_gradients(needs, route):
    case = make((6, 3, 3, 3), residual="norm" if route == TWO else "plain")
    full = case.run(triton)
    flags = (needs[0], needs[1], needs[2], not needs[2], needs[1], needs[0])
    got = case.run(triton, flags)
    wanted = [n for n, need in zip(("dx", "dresidual", "dweight", "dbias", "dweight2", "dbias2"), flags) if need]
    assert {name for name in got if name.startswith("d")} == {name for name in wanted if name in full}
    for name, value in got.items():
        assert torch.equal(value, full[name]), name


def test_any_strides(route):
    case = make((6, 2, 4, 4), residual="plain")
    want = case.run(triton)
    wide = torch.full((6, 2, 4, 8), 7.0)
    wide[..., ::2] = case.dy
    last = case.dy.to(memory_format=torch.channels_last)
    for dy in (wide[..., ::2], last, case.dy.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)):
        for name, value in replace(case, dy=dy).run(triton).items():
            assert torch.equal(value, want[name]), name
    one = torch.full((), 0.5)
    expanded, dense = (replace(case, dy=t).run(triton) for t in (one.expand(6, 2, 4, 4), one.repeat(6, 2, 4, 4)))
    assert all(torch.equal(expanded[name], value) for name, value in dense.items())
    x = torch.randn(6, 2, 8, 4)[:, :, ::2]  # neither contiguous nor channels_last
    residual = case.residual.to(memory_format=torch.channels_last)
    odd = Case(x[..., :4], case.norm, residual, None, case.dy, "relu", 0.0)
    odd.check(triton)


def test_running_statistics_over_steps(route):
    norm = norm_for((9, 3, 4, 4))
    twin = norm_for((9, 3, 4, 4))
    twin.load_state_dict(norm.state_dict())
    twin.double()
    for momentum in (0.1, 0.0, 1.0, 0.3):
        norm.momentum = twin.momentum = momentum
        x = torch.randn(9, 3, 4, 4) * 3 + 1
        triton(x, norm)
        twin(x.double())
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(getattr(norm, name).double(), getattr(twin, name), rtol=1e-6, atol=1e-7)
    assert norm.num_batches_tracked.item() == twin.num_batches_tracked.item() == 4
    before = norm.running_mean.clone()
    y = triton(x.requires_grad_(), norm)
    after = norm.running_mean.clone()
    y.sum().backward()
    assert torch.equal(norm.running_mean, after) and not torch.equal(before, after)


def test_parameters_in_half_precision(route):
    case = make((8, 5, 4, 4), torch.float16, residual="norm", norm_dtype=torch.float16)
    case.check(triton)


@pytest.mark.parametrize("shape, last", [((5, 3, 6, 6), False), ((5, 7, 6, 6), True), ((31, 33), False)])
def test_evaluation(shape, last):
    for dtype, options in zip(itertools.cycle((torch.float32, torch.float16)), OPTIONS):
        case = make(shape, dtype, last=last, **options)
        for norm in (case.norm, case.second):
            if norm is not None:
                norm.eval()
        truth, same, got = (
            c.call(op, c.x, c.residual).detach()
            for c, op in ((case.to(torch.float64), reference.bn_act), (case, reference.bn_act), (case, no_grad))
        )
        terms = sum(
            ((n.running_var + n.eps).rsqrt() * n.weight).max().item() * 8 for n in (case.norm, case.second) if n
        )
        error = (got.double() - truth).abs().max()
        floor = torch.finfo(dtype).eps * truth.abs().max() + 1.2e-7 * terms
        assert got.dtype == dtype and error <= 2 * (same.double() - truth).abs().max() + floor


def no_grad(*args, **options):
    with torch.no_grad():
        return triton(*args, **options)


def test_the_same_bits_every_time(route):
    case = make((5, 3, 6, 6), residual="norm")
    first, again = case.run(triton), case.run(triton)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_inputs_are_left_alone(route):
    case = make((5, 3, 6, 6), residual="plain")
    before = [t.clone() for t in (case.x, case.residual, case.dy)]
    case.x.requires_grad_(), case.residual.requires_grad_()
    case.call(triton, case.x, case.residual).backward(case.dy)
    case.call(with_mask, case.x, case.residual).backward(case.dy)
    assert all(torch.equal(a, b) for a, b in zip(before, (case.x, case.residual, case.dy)))


# --- with a convolution -----------------------------------------------------------------------------------------------

CONVS = [
    (nn.Conv2d(3, 4, 3, padding=1), (4, 3, 6, 6), False),
    (nn.Conv2d(6, 9, 3, stride=2, padding=1, groups=3, bias=False), (5, 6, 7, 9), True),
    (nn.Linear(33, 5), (31, 33), False),
]


@pytest.mark.parametrize("conv, shape, last", CONVS)
def test_conv(conv, shape, last, route):
    case = make(shape, last=last)
    for act in ("relu", "none") if route == TWO else ("leaky_relu",):
        check_conv(partial(bn_act_conv, impl="triton"), case.x, case.norm, conv, act=act)


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_conv_partial_gradients(needs, route):
    case = make((4, 3, 6, 6))
    full, part = (nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3))
    part.load_state_dict(full.state_dict())
    part.weight.requires_grad_(needs[0]), part.bias.requires_grad_(needs[1])
    grads = []
    for conv in (full, part):
        x, norm = case.x.clone().requires_grad_(), norm_copy(case)
        bn_act_conv(x, norm, conv, impl="triton").square().sum().backward()
        grads.append([x.grad, norm.weight.grad, norm.bias.grad, conv.weight.grad, conv.bias.grad])
    for a, b, need in zip(*grads, (True, True, True, *needs)):
        assert (b is not None) == need and (b is None or torch.equal(a, b))


def test_the_gradient_is_overwritten_in_place():
    """dx stands where the gradient of the activation stood, with the same numbers as elsewhere."""
    for case in (make((4, 7, 6, 6)), make((40, 7, 6, 6), last=True), make((31, 33))):
        weight, bias = case.norm.weight.detach(), case.norm.bias.detach()
        y, stats, _ = torch.ops.fastlocal.bn_act_forward(
            case.x, None, weight, bias, case.norm.running_mean, case.norm.running_var, 0.1, 1e-5, None, None, None, None,
            0.0, 0.0, "relu", 0.0, False, "triton",
        )  # fmt: skip
        dweight, dbias, dx = torch.ops.fastlocal.bn_act_backward(
            case.dy, case.x, None, None, None, weight, bias, None, None, stats, "relu", 0.0, True, False, "triton"
        )
        dy = case.dy.clone()
        own = torch.ops.fastlocal.bn_act_backward_(dy, case.x, weight, bias, stats, "relu", 0.0, True, "triton")
        for a, b in zip((dy, *own), (dx, dweight, dbias, y), strict=True):
            assert torch.equal(a, b)


# --- the choice -------------------------------------------------------------------------------------------------------


def test_reasons():
    case = make((4, 3, 2, 2))
    assert ops.explain(bn_act, case.x, case.norm).chosen == "triton"
    assert ops.explain(bn_act_conv, case.x, case.norm, nn.Conv2d(3, 2, 1)).chosen == "triton"
    with pytest.raises(BackendError, match="bfloat16"):
        triton(case.x.bfloat16(), case.norm)
    with pytest.raises(BackendError, match="float64"):
        triton(case.x.double(), case.norm.double())


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1, 1)])
def test_one_value_per_channel_is_refused_as_by_the_module(shape):
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        bn_act(torch.randn(shape), norm_for(shape))


def test_empty_batch():
    norm = norm_for((0, 3, 4, 4))
    assert bn_act(torch.randn(0, 3, 4, 4), norm).shape == (0, 3, 4, 4)


def test_kernels_are_interpreted():
    assert type(kernels.fl_bn_act_fwd_kernel).__name__ == "InterpretedFunction"
