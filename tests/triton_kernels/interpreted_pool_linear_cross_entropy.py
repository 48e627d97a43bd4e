"""The kernels on the CPU, in Triton's interpreter; run by test_pool_linear_cross_entropy.py with TRITON_INTERPRET=1."""

import copy
import os
import sys

import pytest
import torch
import torch.nn.functional as F

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from fastlocal import ops
from fastlocal.errors import BackendError
from fastlocal.ops import pool_linear_cross_entropy, pool_linear_cross_entropy_value_and_grad
from fastlocal.triton_kernels import pool_linear_cross_entropy as kernels
from tests.ops.cases import ALL, check, make, rival
from tests.triton_kernels.interpreter import mend

mend()
OPERATOR = sys.modules["fastlocal.ops.pool_linear_cross_entropy"]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fresh memory is full of nan or of a large number: every output element must be written."""
    original = torch.empty

    def fill(*args, **kwargs):
        out = original(*args, **kwargs)
        return out.fill_(float("nan") if out.is_floating_point() else 113)

    monkeypatch.setattr(torch, "empty", fill)


@pytest.fixture(params=["fused", "from logits"])
def route(request, monkeypatch):
    if request.param == "from logits":
        monkeypatch.setattr(OPERATOR, "FUSED_WEIGHT", 0)


def triton(*args, **options):
    return pool_linear_cross_entropy_value_and_grad(*args, impl="triton", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "rows, channels, spatial, classes, kind, channels_last",
    [
        (1, 3, (32, 32), 10, "index", False),
        (3, 31, (7, 7), 1000, "smoothed", False),
        (3, 70, (7, 7), 1000, "probabilities", True),  # 70,000 weights: from logits
        (31, 16, (1, 1), 2, "ignored", False),
        (3, 127, (7, 7), 100, "ignored", True),
        (3, 3, (32, 32), 100, "probabilities", True),
        (5, 65, (3, 11), 127, "smoothed", False),
        (31, 5, (3, 2), 10, "weighted", True),
        (3, 31, (7, 7), 1000, "weighted probabilities", False),
    ],
)
def test_ragged_sizes(rows, channels, spatial, classes, kind, channels_last, dtype):
    args, options = make(rows, channels, spatial, classes, kind=kind, dtype=dtype, channels_last=channels_last)
    check(triton, args, **options)


@pytest.mark.parametrize("rows, classes", [(63, 3), (127, 100)])
def test_many_rows(rows, classes):
    """More than the sums take at a time, with hits in every part."""
    args, options = make(rows, 4, (2, 2), classes, kind="ignored")
    x, weight, bias, target = args
    target[1::2] = F.linear(x.mean((2, 3)), weight, bias).argmax(1)[1::2]
    check(triton, args, **options)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("pool", ["mean", "tokens", "cls", "none"])
def test_pools(pool, kind, route):
    args, options = make(4, 6, (3, 2) if pool == "mean" else (), 5, kind=kind, bias=pool != "tokens")
    if pool in ("tokens", "cls"):
        args = (torch.randn(4, 7, 6), *args[1:])
    check(triton, args, pool=pool, **options)


@pytest.mark.parametrize("kind", ["ignored", "probabilities", "weighted"])
def test_the_divisor_of_many_rows(kind, monkeypatch, route):
    args, options = make(7, 6, (3, 2), 5, kind=kind)
    monkeypatch.setattr(OPERATOR, "COUNT_ROWS", 4)
    check(triton, args, **options)


def test_weights_of_rows_that_are_ignored(route):
    """Where the ignored class exists and weighs something."""
    args, options = make(7, 6, (3, 2), 5, kind="ignored")
    check(triton, args, class_weight=torch.rand(5), **options)
    spaced = torch.full((14,), options["ignore_index"])[::2].copy_(args[3])  # what lies between does not count
    check(triton, (*args[:3], spaced), **options)


@pytest.mark.parametrize("rows, smoothing", [(0, 0.0), (3, 0.0), (3, 0.1)])
def test_no_row_counts(rows, smoothing, route):
    args, _ = make(rows, 3, (2, 2), 4)
    args[3].fill_(-100)
    loss, correct, *grads = triton(*args, label_smoothing=smoothing)
    assert loss.isnan() and correct.item() == 0
    for grad, like in zip(grads, args):
        assert torch.equal(grad, torch.zeros_like(like))


def test_huge_logits(route):
    for kind in ALL:
        (_, _, _, target), options = make(9, 16, (4, 4), 10, kind=kind)
        x = torch.randint(-40, 40, (9, 16, 4, 4)).float()
        weight, bias = torch.randint(-100, 100, (10, 16)).float() * 16, torch.randint(-9, 9, (10,)).float()
        assert F.linear(x.mean((2, 3)), weight, bias).abs().max() > 1e4
        check(triton, (x, weight, bias, target), kind, **options)


def test_class_switched_off_by_an_infinite_bias(route):
    args, _ = make(6, 5, (3, 3), 4)
    args[2][3] = -torch.inf
    args[3].clamp_(max=2)
    for got, want in zip(triton(*args), rival(args)):
        torch.testing.assert_close(got, want)


def test_any_strides(route):
    (x, weight, bias, target), _ = make(4, 5, (4, 6), 7)
    dense = triton(x, weight, bias, target)

    def strided(t):
        out = torch.full([2 * s for s in t.shape], 77, dtype=t.dtype)[tuple(slice(None, None, 2) for _ in t.shape)]
        return out.copy_(t)

    for args in (
        [strided(t) for t in (x, weight, bias, target)],
        [x.to(memory_format=torch.channels_last), weight.t().contiguous().t(), bias, target],
        [x.transpose(2, 3).contiguous().transpose(2, 3), weight, bias, target],
    ):
        for got, want in zip(triton(*args), dense):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    check(triton, (x, weight, bias, strided(torch.rand(4, 7))))
    check(triton, (x, weight, bias, target), class_weight=strided(torch.rand(7)))


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_partial_gradients_through_autograd(needs, route):
    args, _ = make(4, 5, (3, 3), 4)
    leaves = [t.clone().requires_grad_(need) for t, need in zip(args, needs)]
    loss, correct = pool_linear_cross_entropy(*leaves, args[3], impl="triton")
    (loss * 4).backward()
    expected = rival(args)
    assert correct.item() == expected[1].item()
    for leaf, need, grad in zip(leaves, needs, expected[2:]):
        assert (leaf.grad is not None) == need
        if need:
            torch.testing.assert_close(leaf.grad, grad * 4)


def test_only_the_loss(route):
    args, _ = make(4, 5, (3, 3), 4)
    loss, correct = pool_linear_cross_entropy(*args, impl="triton")
    expected = rival(args)
    torch.testing.assert_close(loss, expected[0])
    assert correct.item() == expected[1].item() and not loss.requires_grad


def test_scale_of_the_gradients_and_bit_reproducibility(route):
    args, _ = make(4, 5, (3, 3), 4)
    one, again, scaled = triton(*args), triton(*args), triton(*args, grad_scale=1024.0)
    for a, b in zip(one, again):
        assert torch.equal(a, b)
    assert torch.equal(one[0], scaled[0])
    for a, b in zip(one[2:], scaled[2:]):
        torch.testing.assert_close(a * 1024, b)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bad", [4, -1])
def test_class_that_does_not_exist_is_never_a_silent_number(bad, weighted, route):
    args, _ = make(3, 5, (3, 3), 4)
    args[3][1] = bad
    loss, _, grad_x, grad_weight, _ = triton(*args, class_weight=torch.ones(4) if weighted else None)
    assert loss.isnan() and grad_x[1].isnan().all() and grad_weight.isnan().all()
    assert not grad_x[0].isnan().any()


def test_the_context_manager_and_reasons():
    args, _ = make(2, 3, (2, 2), 4)
    assert ops.explain(pool_linear_cross_entropy, *args).chosen == "triton"
    with ops.backend("aten"):
        assert ops.explain(pool_linear_cross_entropy, *args).chosen == "aten"
    many = (args[0], torch.zeros(200_000, 3), None, args[3])
    assert ops.explain(pool_linear_cross_entropy, *many).chosen == "triton"
    with pytest.raises(BackendError, match="bfloat16"):
        triton(args[0].bfloat16(), *args[1:])


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 512 classes or less, so that there are a last one, first ones and some between."""
    monkeypatch.setattr(OPERATOR, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(OPERATOR, "MAX_CLASSES", 512)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(
    "rows, classes, dtype", [(3, 1300, torch.float32), (5, 1025, torch.float16), (1, 1536, torch.float32)]
)
def test_by_chunks(rows, classes, dtype, kind, small_chunks):
    args, options = make(rows, 5, (3, 2), classes, kind=kind, dtype=dtype)
    check(triton, args, **options)


@pytest.mark.parametrize("kind", ["weighted", "weighted probabilities"])
def test_a_chunk_of_many_blocks(kind):
    args, options = make(2, 3, (), 9000, kind=kind, bias=False)
    assert OPERATOR.chunk_classes(2, 9000) > 4096
    check(triton, args, pool="none", **options)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3])
def test_partial_gradients_by_chunks(needs, small_chunks):
    args, _ = make(3, 5, (3, 3), 1100)
    leaves = [t.clone().requires_grad_(need) for t, need in zip(args, needs)]
    loss, correct = pool_linear_cross_entropy(*leaves, args[3], impl="triton")
    expected = rival(args)
    torch.testing.assert_close(loss, expected[0])
    assert correct.item() == expected[1].item()
    if any(needs):
        (loss * 4).backward()
    for leaf, need, grad in zip(leaves, needs, expected[2:]):
        assert (leaf.grad is not None) == need
        if need:
            torch.testing.assert_close(leaf.grad, grad * 4)


def test_guesses_by_chunks():
    """The largest logit and the likeliest class in each part of each chunk, all of them right."""
    classes = torch.tensor([10, 4300, 5000, 8990])
    weight = 0.1 * torch.randn(9000, 4)
    weight[classes, torch.arange(4)] = 5
    wanted = torch.rand(4, 9000) / 9000
    wanted[torch.arange(4), classes] = 0.5
    for target in (classes, wanted):
        args = (torch.eye(4), weight, None, target)
        assert triton(*args, pool="none")[1] == 4
        check(triton, args, pool="none")


def test_edges_by_chunks(small_chunks):
    """No row that counts; a chunk that is switched off; huge logits; a class that does not exist; any strides."""
    for rows in (0, 3):
        args, _ = make(rows, 3, (2, 2), 1300)
        args[3].fill_(-100)
        loss, correct, *grads = triton(*args)
        assert loss.isnan() and correct.item() == 0
        for grad, like in zip(grads, args):
            assert torch.equal(grad, torch.zeros_like(like))

    args, _ = make(4, 5, (3, 3), 1300)
    args[2][:600] = -torch.inf
    args[2][1100:] = -torch.inf
    args[3].copy_(torch.randint(600, 1100, (4,)))
    for got, want in zip(triton(*args), rival(args)):
        torch.testing.assert_close(got, want)

    for kind in ALL:
        (_, _, _, target), options = make(4, 16, (), 1300, kind=kind)
        x, weight = torch.randint(-40, 40, (4, 16)).float(), torch.randint(-100, 100, (1300, 16)).float()
        check(triton, (x, weight, torch.zeros(1300), target), kind, pool="none", **options)

    args, _ = make(3, 5, (3, 3), 1300)
    for bad in (1300, -1):
        args[3][1] = bad
        loss, _, grad_x, grad_weight, _ = triton(*args)
        assert loss.isnan() and grad_x[1].isnan().all() and grad_weight.isnan().all()
        assert not grad_x[0].isnan().any()

    for pool, shape in (("tokens", (3, 1, 5)), ("tokens", (3, 2, 5)), ("cls", (3, 2, 5)), ("none", (3, 5))):
        check(triton, (torch.randn(shape), *make(3, 5, (), 1300)[0][1:]), pool=pool)

    each = torch.rand(1300, 2)[:, 0]
    weight, target = torch.randn(5, 1300).t(), torch.rand(1300, 3).t()
    for wanted in (target, torch.randint(1300, (6,))[::2]):
        check(triton, (args[0], weight, torch.randn(1300), wanted), class_weight=each)


@pytest.mark.parametrize("kind", ["smoothed", "weighted probabilities"])
def test_norm(kind, route):
    """The norm's kernels and these, one after the other."""
    args, options = make(7, 6, (3, 3), 5, kind=kind)
    norm = torch.nn.BatchNorm1d(6)
    twin = copy.deepcopy(norm)
    got = triton(*args, norm=norm, **options)
    want = pool_linear_cross_entropy_value_and_grad(*args, norm=twin, impl="reference", **options)
    for a, b in zip((*got, *norm.buffers()), (*want, *twin.buffers()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_one_class():
    args, _ = make(3, 5, (2, 2), 1)
    check(triton, args)


def test_kernels_are_interpreted():
    assert type(kernels.fl_pool_linear_cross_entropy_fwd_kernel).__name__ == "InterpretedFunction"
