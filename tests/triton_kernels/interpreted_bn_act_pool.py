"""The kernels on the CPU, in Triton's interpreter; run by test_bn_act_pool.py with TRITON_INTERPRET=1."""

import copy
import os
import sys

import pytest
import torch
from torch import nn

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from fastlocal import ops
from fastlocal.errors import BackendError
from fastlocal.ops import bn_act_pool
from fastlocal.triton_kernels import bn_act_pool as kernels
from fastlocal.triton_kernels.configs import forced
from tests.ops.test_bn_act_pool import check, make, run, settle
from tests.triton_kernels.interpreter import mend

mend()
OPERATOR = sys.modules["fastlocal.ops.bn_act_pool"]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fresh memory is full of nan or of a large number: every output element must be written."""
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)

        def fill(*args, original=original, **kwargs):
            out = original(*args, **kwargs)
            return out.fill_(float("nan") if out.is_floating_point() else 113)

        monkeypatch.setattr(torch, name, fill)


@pytest.fixture(params=["one launch", "two launches"])
def route(request, monkeypatch):
    limit = 1 << 30 if request.param == "one launch" else 0
    monkeypatch.setattr(OPERATOR, "ONE_LAUNCH", limit)
    monkeypatch.setattr(OPERATOR, "ONE_LAUNCH_LAST", limit)
    monkeypatch.setattr(kernels, "PROGRAMS", 8)  # the interpreter runs one after the other


def triton(*args, **options):
    return bn_act_pool(*args, impl="triton", **options)


@pytest.mark.parametrize(
    "shape, last, kind, act, dtype",
    [
        ((2, 3, 7, 7), False, 2, "relu", torch.float32),
        ((31, 2, 3, 11), True, 1, "leaky_relu", torch.float32),
        ((3, 127), False, 0, "relu", torch.float32),  # a matrix: channels side by side
        ((63, 2, 2, 2), False, 1, "none", torch.float16),  # short runs: several channels to a program
        ((127, 2, 1, 1), False, 2, "leaky_relu", torch.float16),
        ((2, 1, 1000), False, 1, "relu", torch.float16),
        ((3, 2, 2, 3, 2), True, 2, "relu", torch.float32),
        ((1, 2, 56, 56), False, 2, "relu", torch.float32),  # a tile does not hold a sample
        ((3, 35, 9, 9), True, 0, "none", torch.float32),
    ],
)
def test_ragged_sizes(shape, last, kind, act, dtype, route):
    check(make(shape, dtype, kind, last), "triton", act=act)


@pytest.mark.parametrize("kind, act, last", [(0, "relu", True), (1, "leaky_relu", False), (2, "none", True)])
def test_evaluation(kind, act, last, route):
    check(make((5, 3, 4, 5), kind=kind, last=last, training=False), "triton", act=act)


@pytest.mark.parametrize("kind, last", [(0, False), (1, True), (2, False)])
def test_many_tiles(kind, last, route):
    """Every loop takes several rounds, and the last parts, samples, positions and channels are ragged."""
    small = kernels.Config(block_n=2, block_s=4, block_c=2, rows=3, warps=1)
    with forced({"bn_act_pool": small, "bn_act_pool_backward": small._replace(rows=2, block_s=2)}):
        check(make((7, 3, 2, 3), kind=kind, last=last), "triton", act="leaky_relu" if kind else "relu")


@pytest.mark.parametrize("mean, kind", [(1e3, 2), (-1e3, 0)])
def test_mean_far_from_zero(mean, kind, route):
    check(make((12, 2, 19, 19), kind=kind, mean=mean), "triton", act="none")
    check(make((6, 1, 9, 9), kind=kind, mean=mean), "triton")


def test_mean_far_from_zero_over_many_tiles(route):
    small = kernels.Config(block_n=2, block_s=16, block_c=1, rows=20, warps=1)
    with forced({"bn_act_pool": small, "bn_act_pool_backward": small}):
        x, *rest = make((40, 1, 4, 9), mean=1e3)
        x[0, :, 0, 0] = 0.0  # the first value is like no other
        check((x, *rest), "triton", act="none")


def test_float16_sums_do_not_overflow(route):
    x, norm, _, _, dpooled = make((2, 2, 32, 32), torch.float16)
    nn.init.constant_(norm.bias, 100.0)  # the sum of 1,024 activations of 100 is beyond 65,504
    check((x, norm, None, None, dpooled), "triton")


@pytest.mark.parametrize("kind", [0, 2])
def test_strides_and_repeatability(kind, route):
    args = settle(make((4, 3, 5, 8), kind=kind))
    want = run(triton, args)
    again = run(triton, args)
    assert all(torch.equal(value, want[name]) for name, value in again.items())
    wide = torch.full((4, 3, 5, 16), 7.0)
    wide[..., ::2] = args[0]
    for x in (
        args[0].to(memory_format=torch.channels_last),
        args[0].transpose(2, 3).contiguous().transpose(2, 3),  # no one stride leads through the positions
        wide[..., ::2],
    ):
        got = run(triton, (x, *args[1:4], args[4].t().contiguous().t()))
        for name, value in got.items():
            torch.testing.assert_close(value, want[name], rtol=1e-4, atol=1e-5)
    leaf = args[0].to(memory_format=torch.channels_last).requires_grad_()
    triton(leaf, args[1], args[2], residual_norm=args[3]).backward(args[4].sum().expand(4, 3))
    assert leaf.grad.stride() == leaf.stride()


@pytest.mark.parametrize("kind, needs", [(2, (1, 0, 0)), (1, (0, 1, 0)), (2, (0, 0, 1)), (2, (0, 1, 1))])
def test_partial_gradients(kind, needs, route):
    x, norm, residual, residual_norm, dpooled = args = settle(make((4, 2, 3, 3), kind=kind))
    full = run(triton, args)
    for t, need in zip((x, residual, norm.weight), needs):
        t.requires_grad_(bool(need))
    norm.bias.requires_grad_(False)
    triton(x, norm, residual, residual_norm=residual_norm).backward(dpooled)
    for name, t, need in zip(("dx", "dresidual", "dweight"), (x, residual, norm.weight), needs):
        assert (t.grad is not None) == bool(need)
        assert t.grad is None or torch.equal(t.grad, full[name]), name


def test_half_precision_parameters(route):
    x, norm, residual, residual_norm, dpooled = make((8, 2, 4, 4), torch.float16, 2)
    args = settle((x, norm.half(), residual, residual_norm.half(), dpooled))
    want = run(lambda *a, **o: bn_act_pool(*a, impl="aten", **o), args)
    for name, value in run(triton, args).items():
        assert value.dtype == want[name].dtype
        torch.testing.assert_close(value, want[name], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    "where, act", [("x", "relu"), ("residual", "leaky_relu"), ("residual", "relu"), ("dpooled", "relu")]
)
def test_nonfinite_values_stay_where_pytorch_has_them(where, act, route):
    args = make((4, 3, 2, 4), kind=1)
    victim = dict(x=args[0], residual=args[2], dpooled=args[4])[where]
    victim[(3, 2) + (1, 2) * (victim.dim() == 4)] = torch.nan
    got, want = run(triton, args, act), run(lambda *a, **o: bn_act_pool(*a, impl="reference", **o), args, act)
    for name, value in got.items():
        assert torch.equal(value.isfinite(), want[name].isfinite()), name
    # A ReLU lets the gradient of a nan pass, a leaky one its share.
    torch.testing.assert_close(got["dresidual"], want["dresidual"], equal_nan=True)


def test_statistics_move_and_are_seen_to(route):
    x, norm, residual, residual_norm, _ = make((5, 3, 2, 4), kind=2)
    statistics = [t for n in (norm, residual_norm) for t in n.buffers()]
    versions = [t._version for t in statistics]
    expected = copy.deepcopy([norm, residual_norm])
    for step in range(2):
        with torch.no_grad():
            triton(x + step, norm, residual, residual_norm=residual_norm)
            expected[0](x + step), expected[1](residual)
    assert all(t._version > before for t, before in zip(statistics, versions))
    for n, twin in zip((norm, residual_norm), expected):
        for name, value in n.state_dict().items():
            torch.testing.assert_close(value, twin.state_dict()[name])
    norm.eval()
    versions = [t._version for t in norm.buffers()]
    triton(x, norm)
    assert [t._version for t in norm.buffers()] == versions
    norm.train().num_batches_tracked = None
    triton(x, norm)


def test_the_choice():
    x, norm, residual, _, _ = make((4, 3, 2, 2), kind=1)
    assert ops.explain(bn_act_pool, x, norm, residual).chosen == "triton"
    with ops.backend("aten"):
        assert ops.explain(bn_act_pool, x, norm).chosen == "aten"
    with pytest.raises(BackendError, match="bfloat16"):
        triton(x.bfloat16(), norm)
    with pytest.raises(BackendError, match="float64"):
        triton(x.double(), norm.double())
    norm.float()
    assert ops.explain(bn_act_pool, x[:0], norm).chosen == "reference"
    assert bn_act_pool(x[:0], norm).shape == (0, 3)


def test_kernels_are_interpreted():
    assert type(kernels.fl_bn_act_pool_fwd_kernel).__name__ == "InterpretedFunction"
