import contextlib
import copy
import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastlocal import ops, reference
from fastlocal.blocks.measure import LaunchCounter
from fastlocal.errors import ArgumentError, BackendError
from fastlocal.ops import pool_linear_cross_entropy, pool_linear_cross_entropy_value_and_grad
from fastlocal.ops._seed import ones
from fastlocal.reference.pool_linear_cross_entropy import pooled_dims
from tests.ops.cases import ALL, assert_within_error_rule, check, make, rival, to_double

IMPLS = ("aten", "reference")
OPERATOR = torch.ops.fastlocal.pool_linear_cross_entropy.default
MODULE = sys.modules["fastlocal.ops.pool_linear_cross_entropy"]


def value_and_grad(impl):
    return lambda *args, **options: pool_linear_cross_entropy_value_and_grad(*args, impl=impl, **options)


def through_autograd(impl):
    def run(x, weight, bias, target, **options):
        leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias) if t is not None]
        loss, correct = pool_linear_cross_entropy(*(*leaves, None)[:3], target, impl=impl, **options)
        return loss, correct, *torch.autograd.grad(loss, leaves)

    return run


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("classes", [2, 10, 100, 1000])
@pytest.mark.parametrize("rows", [1, 3, 31, 63, 127])
def test_ragged_sizes(rows, classes, impl):
    for spatial, dtype, kind in itertools.product(
        [(1, 1), (7, 7), (32, 32)], [torch.float32, torch.bfloat16, torch.float16], ALL
    ):
        channels = {1: 127, 7: 31, 32: 3}[spatial[0]]
        args, options = make(rows, channels, spatial, classes, kind=kind, dtype=dtype, channels_last=rows in (3, 63))
        check(value_and_grad(impl), args, f"{spatial} {dtype} {kind}", **options)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(
    "pool, shape", [("mean", (4, 5, 6)), ("mean", (2, 3, 4, 5)), ("tokens", ()), ("cls", ()), ("none", ())]
)
@pytest.mark.parametrize("bias", [True, False])
def test_pools_and_both_forms(pool, shape, kind, impl, bias):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        args, options = make(9, 7, shape, 5, kind=kind, dtype=dtype, bias=bias)
        if pool in ("tokens", "cls"):
            args = (torch.randn(9, 6, 7).to(dtype), *args[1:])
        for form in (value_and_grad(impl), through_autograd(impl)):
            check(form, args, f"{dtype}", pool=pool, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loss_dtype_and_gradient_view(dtype):
    args, _ = make(4, 3, (8, 8), 5, dtype=dtype)
    loss, correct, grad_x, grad_weight, grad_bias = pool_linear_cross_entropy_value_and_grad(*args)
    assert loss.dtype == torch.float32 and correct.dtype == torch.int64
    assert grad_x.shape == args[0].shape and grad_x.stride()[2:] == (0, 0)
    assert {t.dtype for t in (grad_x, grad_weight, grad_bias)} == {dtype}
    x = args[0].requires_grad_()
    seen = []
    (x * 1).register_hook(seen.append)
    hooked = x * 1
    hooked.register_hook(seen.append)
    pool_linear_cross_entropy(hooked, *args[1:])[0].backward()
    assert seen[0].stride()[2:] == (0, 0) and seen[0].dtype == dtype
    assert not pool_linear_cross_entropy(hooked, *args[1:])[1].requires_grad


@pytest.mark.parametrize("impl", IMPLS)
def test_mixed_dtypes(impl):
    """Half precision features with float32 parameters, as under autocast."""
    args, _ = make(8, 6, (4, 4), 5, dtype=torch.bfloat16)
    wide = (args[0], args[1].float(), args[2].float(), args[3])
    truth = rival(to_double(wide))
    got = pool_linear_cross_entropy_value_and_grad(*wide, impl=impl)
    assert [t.dtype for t in got] == [torch.float32, torch.int64, torch.bfloat16, torch.float32, torch.float32]
    for g, s, t in zip(got, rival(args), truth):
        if g.dtype != torch.int64:
            assert_within_error_rule(g, s, t, str(g.shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype):
    x, weight, bias, target = make(8, 6, (4, 4), 5)[0]
    x = x.to(dtype)
    plain = pool_linear_cross_entropy_value_and_grad(x, weight, bias, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = pool_linear_cross_entropy_value_and_grad(x, weight, bias, target)
    for a, b in zip(plain, inside):
        assert torch.equal(a, b) and a.dtype == b.dtype


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3)))
def test_partial_gradients(needs, impl):
    args, _ = make(6, 5, (3, 3), 4)
    expected = rival(args)
    leaves = [t.clone().requires_grad_(need) for t, need in zip(args[:3], needs)]
    loss, correct = pool_linear_cross_entropy(*leaves, args[3], impl=impl)
    assert correct.item() == expected[1].item()
    assert loss.requires_grad == any(needs)
    if any(needs):
        loss.backward()
    for leaf, need, grad in zip(leaves, needs, expected[2:]):
        assert (leaf.grad is not None) == need
        if need:
            torch.testing.assert_close(leaf.grad, grad)


def test_no_gradient_is_computed_without_need():
    args, _ = make(6, 5, (3, 3), 4)
    none = OPERATOR(*args, None, "mean", 0.0, -100, 1.0, [False] * 3, True, "auto")
    assert [t.numel() for t in none[2:]] == [0, 0, 0]
    args[0].requires_grad_()
    with torch.no_grad():
        assert not pool_linear_cross_entropy(*args)[0].requires_grad


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("pool, spatial", [("mean", (2, 3)), ("none", ()), ("cls", ())])
def test_gradcheck(pool, spatial, kind, impl):
    args, options = make(4, 3, spatial, 5, kind=kind, dtype=torch.float64)
    if pool == "cls":
        args = (torch.randn(4, 2, 3, dtype=torch.float64), *args[1:])
    leaves = [t.requires_grad_() for t in args[:3]]

    def loss(x, weight, bias):
        return pool_linear_cross_entropy(x, weight, bias, args[3], pool=pool, impl=impl, **options)[0]

    assert torch.autograd.gradcheck(loss, leaves)


def test_gradcheck_of_the_specification_to_second_order():
    args, options = make(3, 2, (2, 2), 4, kind="smoothed", dtype=torch.float64)
    leaves = [t.requires_grad_() for t in args[:3]]

    def loss(*leaves):
        return reference.pool_linear_cross_entropy(*leaves, args[3], **options)[0]

    assert torch.autograd.gradcheck(loss, leaves) and torch.autograd.gradgradcheck(loss, leaves)


@pytest.mark.parametrize("kind", ALL)
def test_closed_form_of_the_specification(kind):
    args, options = make(7, 5, (3, 2), 6, kind=kind, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in args[:3]]
    loss, correct = reference.pool_linear_cross_entropy(*args, **options)
    closed = reference.pool_linear_cross_entropy_value_and_grad(*args, grad_scale=8.0, **options)
    assert torch.equal(closed[0], loss) and torch.equal(closed[1], correct)
    for got, grad in zip(closed[2:], torch.autograd.grad(loss * 8, leaves)):
        torch.testing.assert_close(got, grad, rtol=1e-12, atol=1e-15)


MANY = [(1025, "index"), (1025, "weighted"), (2500, "smoothed"), (2500, "probabilities"), (3001, "ignored")]
MANY += [(3001, "weighted probabilities")]


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 512 classes or less, so that there are a last one, first ones and some between."""
    monkeypatch.setattr(MODULE, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(MODULE, "MAX_CLASSES", 512)


@pytest.mark.parametrize("classes, kind", MANY)
def test_more_classes_than_registers(classes, kind, small_chunks):
    assert MODULE.chunk_classes(7, classes) == 512
    for rows, dtype in ((1, torch.float32), (31, torch.float32), (7, torch.bfloat16), (7, torch.float16)):
        args, options = make(rows, 13, (3, 2), classes, kind=kind, dtype=dtype)
        for form in (value_and_grad("aten"), through_autograd("aten")):
            check(form, args, f"{rows} {dtype}", **options)
    args, options = make(7, 13, (), classes, kind=kind, dtype=torch.float64)
    got = value_and_grad("aten")(*args, pool="none", **options)
    for a, b in zip(got, rival(args, pool="none", **options)):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize(
    "pool, shape", [("mean", (6, 5, 1, 1)), ("tokens", (6, 1, 5)), ("tokens", (6, 2, 5)), ("cls", (6, 2, 5))]
)
def test_pools_by_chunks(pool, shape, small_chunks):
    args = (torch.randn(shape), *make(6, 5, (), 1300)[0][1:])
    for dense in (False, True):
        check(through_autograd("aten"), args, pool=pool)
        got = pool_linear_cross_entropy_value_and_grad(*args, pool=pool, dense_grad=dense, impl="aten")
        assert got[2].shape == shape and (got[2].is_contiguous() or not dense)


@pytest.mark.parametrize("kind", ALL)
def test_gradcheck_by_chunks(kind, monkeypatch):
    monkeypatch.setattr(MODULE, "MAX_CLASSES", 2)
    monkeypatch.setattr(MODULE, "chunk_classes", lambda rows, classes: 3)
    args, options = make(4, 3, (2, 1), 7, kind=kind, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in args[:3]]
    assert torch.autograd.gradcheck(
        lambda x, w, b: pool_linear_cross_entropy(x, w, b, args[3], impl="aten", **options)[0], leaves
    )


def test_guesses_by_chunks():
    """The largest logit and the likeliest class in each part of each chunk, all of them right."""
    classes = torch.tensor([10, 4300, 5000, 8990])
    weight = 0.1 * torch.randn(9000, 4)
    weight[classes, torch.arange(4)] = 5
    wanted = torch.rand(4, 9000) / 9000
    wanted[torch.arange(4), classes] = 0.5
    for target in (classes, wanted):
        args = (torch.eye(4), weight, None, target)
        assert value_and_grad("aten")(*args, pool="none")[1] == 4
        check(value_and_grad("aten"), args, pool="none")


def test_chunks_by_size():
    assert MODULE.chunk_classes(128, 1025) == 640 and MODULE.chunk_classes(128, 50_000) == 25_088
    assert MODULE.chunk_classes(1024, 200_000) == 4096 and MODULE.chunk_classes(1 << 20, 200_000) == 1024
    assert all(0 < MODULE.chunk_classes(rows, k) < k for rows in (0, 1, 9999) for k in range(1025, 5000, 7))


class Largest(TorchDispatchMode):
    """The most bytes of a storage that an operator made."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("kind", ALL)
def test_no_logits_of_all_classes_in_memory(kind):
    rows, classes = 512, 20_000
    args, options = make(rows, 4, (), classes, kind=kind)
    chunk = MODULE.chunk_classes(rows, classes)
    with Largest() as largest:
        MODULE._run(
            *args, options.get("class_weight"), "none", options.get("label_smoothing", 0.0),
            options.get("ignore_index", -100), 1.0, [True] * 3, True, "aten",
        )  # fmt: skip
    limit = rows * classes if kind.endswith("probabilities") else rows * chunk  # a view of the target has its storage
    assert rows * chunk < 0.5 * rows * classes and largest.bytes == 4 * limit


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rows", [0, 5])
def test_no_row_counts_by_chunks(rows, smoothing, small_chunks):
    args, _ = make(rows, 3, (2, 2), 1300)
    args[3].fill_(-100)
    loss, correct, *grads = value_and_grad("aten")(*args, label_smoothing=smoothing)
    assert loss.isnan() and correct.item() == 0
    for got, like in zip(grads, args):
        assert torch.equal(got, torch.zeros_like(like))


def test_a_chunk_switched_off_by_an_infinite_bias(small_chunks):
    args, _ = make(6, 5, (3, 3), 1300)
    args[2][:600] = -torch.inf
    args[2][1100:] = -torch.inf
    args[3].copy_(torch.randint(600, 1100, (6,)))
    for got, want in zip(value_and_grad("aten")(*args), rival(args)):
        torch.testing.assert_close(got, want)


def test_huge_logits_by_chunks(small_chunks):
    for kind in ALL:
        target, options = make(9, 16, (), 1300, kind=kind)[0][3], make(9, 16, (), 1300, kind=kind)[1]
        x, weight = torch.randint(-40, 40, (9, 16)).float(), torch.randint(-100, 100, (1300, 16)).float()
        assert F.linear(x, weight).abs().max() > 1e4
        check(value_and_grad("aten"), (x, weight, torch.zeros(1300), target), kind, pool="none", **options)


def test_class_that_does_not_exist_among_many(small_chunks):
    args, _ = make(4, 3, (2, 2), 1300)
    for bad in (1300, -1):
        args[3][1] = bad
        with pytest.raises(IndexError, match="out of bounds"):
            pool_linear_cross_entropy(*args, impl="aten")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("classes", [5, 700])
def test_weights_of_rows_that_are_ignored(classes, impl, small_chunks):
    """Where the ignored class exists and weighs something."""
    args, options = make(7, 6, (3, 2), classes, kind="ignored")
    for smoothing in (0.0, 0.1):
        check(value_and_grad(impl), args, class_weight=torch.rand(classes), label_smoothing=smoothing, **options)


def normed(norm, args, pool, options):
    """What a user writes with a norm: loss, and the gradients of x, weight, bias and the norm's parameters."""
    x, weight, bias = (t.detach().clone().requires_grad_() for t in args[:3])
    pooled = x[:, 0] if pool == "cls" else x.mean(pooled_dims(x, pool)) if pool != "none" else x
    each = options.get("class_weight")
    rest = {k: v for k, v in options.items() if k != "class_weight"}
    loss = F.cross_entropy(
        F.linear(norm(pooled), weight, bias), args[3], None if each is None else each.to(x.dtype), **rest
    )
    return loss.detach(), *torch.autograd.grad(loss, [x, weight, bias, *norm.parameters()])


def batch_norm(channels, dtype=torch.float32):
    norm = nn.BatchNorm1d(channels).to(dtype)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.uniform_(-1, 1)
    return norm


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize(
    "pool, shape", [("mean", (31, 7, 3, 3)), ("tokens", (31, 4, 7)), ("cls", (31, 4, 7)), ("none", (31, 7))]
)
def test_norm(pool, shape, impl):
    for dtype, kind, training in itertools.product(
        [torch.float32, torch.bfloat16], ["smoothed", "weighted"], [True, False]
    ):
        args, options = make(31, 7, (), 5, kind=kind, dtype=dtype)
        args = (torch.randn(shape).to(dtype), *args[1:])
        norms = [batch_norm(7, dtype).train(training)]
        norms += [copy.deepcopy(norms[0]) for _ in range(3)]
        truth = normed(norms[1].double(), to_double(args), pool, options)
        same = normed(norms[2], args, pool, options)
        leaves = [t.clone().requires_grad_() for t in args[:3]]
        loss, correct = pool_linear_cross_entropy(*leaves, args[3], pool=pool, norm=norms[0], impl=impl, **options)
        grads = torch.autograd.grad(loss, [*leaves, *norms[0].parameters()])
        value = pool_linear_cross_entropy_value_and_grad(*args, pool=pool, norm=norms[3], impl=impl, **options)
        assert torch.equal(value[0], loss) and torch.equal(value[1], correct) and len(value) == 7
        for got in (grads, value[2:]):
            for i, (g, s, t) in enumerate(zip((loss.detach(), *got), same, truth)):
                assert_within_error_rule(g, s, t, f"{pool} {dtype} {kind} {i}", terms=t.abs().max().item() + 1)
        assert grads[0].dtype == dtype and (pool not in ("mean", "tokens") or 0 in grads[0].stride())
        tolerance = dict(rtol=2e-2, atol=1e-3) if dtype == torch.bfloat16 else dict(rtol=1e-5, atol=1e-6)
        for buffers in zip(*(n.buffers() for n in norms)):
            for buffer in (buffers[0], buffers[3]):
                assert buffer.dtype == buffers[2].dtype
                torch.testing.assert_close(buffer, buffers[2], **tolerance)


def test_norm_in_the_specification_and_gradcheck():
    args, options = make(6, 3, (2, 2), 4, kind="weighted", dtype=torch.float64)
    norm = batch_norm(3, torch.float64)
    leaves = [t.requires_grad_() for t in (*args[:3], *norm.parameters())]

    def loss(*leaves):
        return pool_linear_cross_entropy(*leaves[:3], args[3], norm=norm, **options)[0]

    assert torch.autograd.gradcheck(loss, leaves)
    theirs = reference.pool_linear_cross_entropy(*args, norm=norm, **options)
    for got, want in zip(pool_linear_cross_entropy(*args, norm=norm, **options), theirs):
        torch.testing.assert_close(got, want)
    got = pool_linear_cross_entropy_value_and_grad(*args, norm=norm, grad_scale=8.0, **options)[2:]
    for a, b in zip(got, torch.autograd.grad(theirs[0] * 8, leaves)):
        torch.testing.assert_close(a, b)


def test_any_module_is_a_norm():
    """Hooks are called, a norm without parameters or that is frozen has no gradients, and another module is called."""
    args, _ = make(6, 5, (3, 3), 4)
    seen = []
    norm = nn.BatchNorm1d(5, affine=False, momentum=None)
    norm.register_forward_hook(lambda *_: seen.append(1))
    frozen = nn.BatchNorm1d(5).requires_grad_(False)
    for module in (norm, frozen, nn.LayerNorm(5)):
        twin = copy.deepcopy(module)
        got = pool_linear_cross_entropy_value_and_grad(*args, norm=module, dense_grad=True)
        assert len(got) == (7 if isinstance(module, nn.LayerNorm) else 5) and got[2].is_contiguous()
        x, weight, bias = (t.clone().requires_grad_() for t in args[:3])
        want = F.cross_entropy(F.linear(twin(x.mean((2, 3))), weight, bias), args[3])
        inputs = [x, weight, bias, *(p for p in twin.parameters() if p.requires_grad)]
        for a, b in zip((got[0], *got[2:]), (want, *torch.autograd.grad(want, inputs))):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert seen and norm.num_batches_tracked == 1


def test_launches_with_a_norm():
    """On a device: mean, norm and its counter, rows, sums; back, weight gradient in front, norm and the division."""
    args, norm = make(6, 5, (3, 3), 4)[0], batch_norm(5)
    leaves = [t.requires_grad_() for t in args[:3]]
    with ops._dispatch.as_on_gpu(), LaunchCounter() as counter:
        x = leaves[0].view(6, 5, 3, 3)
        loss, _ = pool_linear_cross_entropy(x, *leaves[1:], args[3], norm=norm)
        seed = ones(loss)
        grads = torch.autograd.grad(loss, [x, *leaves[1:], *norm.parameters()], seed)
    assert 0 in grads[0].stride()
    assert counter.by_op == {
        "aten::mean": 1, "fastlocal::bn_act_forward": 1, "aten::add_": 1, "fastlocal::pool_linear_cross_entropy": 3,
        "aten::ones_like": 1, "fastlocal::bn_act_backward": 1, "aten::div": 1,
    }  # fmt: skip


def test_norm_compiles():
    args, norm = make(6, 5, (3, 3), 4)[0], batch_norm(5)
    leaves = [t.requires_grad_() for t in args[:3]]

    def loss_of(x, weight, bias, target):
        return pool_linear_cross_entropy(x.relu(), weight, bias, target, norm=norm)[0]

    want = torch.autograd.grad(loss_of(*args), [*leaves, *norm.parameters()])
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*args), [*leaves, *norm.parameters()]), want):
        torch.testing.assert_close(a, b)
    assert norm.num_batches_tracked == 2


def test_class_weights_are_those_of_cross_entropy():
    """Where they do not sum to the number of rows: the mean over indices is weighted, that over probabilities is not."""
    args, _ = make(6, 5, (3, 3), 4)
    each = torch.tensor([4.0, 1.0, 0.5, 0.0])
    args[3].copy_(torch.tensor([0, 1, 2, 3, 0, -100]))
    logits = F.linear(args[0].mean((2, 3)), *args[1:3])
    for target in (args[3], torch.rand(6, 4)):
        for smoothing in (0.0, 0.3):
            expected = F.cross_entropy(logits, target, each, label_smoothing=smoothing)
            for impl in IMPLS:
                options = dict(class_weight=each, label_smoothing=smoothing, impl=impl)
                torch.testing.assert_close(pool_linear_cross_entropy(*args[:3], target, **options)[0], expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_whose_classes_weigh_nothing(impl):
    """No weight to divide by: nan, as F.cross_entropy has it, and zero for the rows that are ignored anyway."""
    args, _ = make(3, 5, (3, 3), 4)
    args[3].copy_(torch.tensor([1, -100, 1]))
    each = torch.tensor([1.0, 0.0, 1.0, 1.0])
    expected = rival(args, class_weight=each)
    loss, _, grad_x, *_ = value_and_grad(impl)(*args, class_weight=each)
    assert loss.isnan() and expected[0].isnan()
    assert torch.equal(grad_x.isnan(), expected[2].isnan()) and not grad_x[1].any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_class_token(impl, dtype):
    args, _ = make(4, 3, (), 5, dtype=dtype)
    tokens = torch.randn(4, 6, 3).to(dtype)
    first = (tokens[:, 0].clone(), *args[1:])
    for form in (value_and_grad(impl), through_autograd(impl)):
        got, want = form(tokens, *args[1:], pool="cls"), form(*first, pool="none")
        assert got[2].shape == tokens.shape and got[2].dtype == dtype and not got[2][:, 1:].any()
        for a, b in zip((*got[:2], got[2][:, 0], *got[3:]), want):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "pool, shape", [("mean", (4, 3, 5, 6)), ("mean", (4, 3, 2, 2, 2)), ("tokens", (4, 6, 3)), ("none", (4, 3))]
)
def test_dense_gradient(pool, shape):
    args, _ = make(4, 3, (), 5, dtype=torch.bfloat16)
    x = torch.randn(shape).to(torch.bfloat16)
    layouts = [x, x.to(memory_format=torch.channels_last)] if len(shape) == 4 else [x]
    for x in layouts:
        for form in (value_and_grad(None), through_autograd(None)):
            view = form(x, *args[1:], pool=pool)[2]
            dense = form(x, *args[1:], pool=pool, dense_grad=True)[2]
            assert torch.equal(dense, view) and dense.stride() == x.stride()
            assert pool == "none" or 0 in view.stride()


def test_second_derivative_is_refused():
    args, _ = make(4, 3, (2, 2), 5)
    x = args[0].requires_grad_()
    (grad,) = torch.autograd.grad(pool_linear_cross_entropy(*args)[0] ** 2, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rows", [0, 5])
def test_no_row_counts(rows, smoothing, impl):
    """Empty batch, or every target ignored: loss nan, gradients zero, as F.cross_entropy has them."""
    args, _ = make(rows, 3, (2, 2), 4)
    args[3].fill_(-100)
    expected = rival(args, label_smoothing=smoothing)
    assert expected[0].isnan() and not expected[3].any()
    for form in (value_and_grad(impl), through_autograd(impl)):
        loss, correct, *grads = form(*args, label_smoothing=smoothing)
        assert loss.isnan() and correct.item() == 0
        for got, grad in zip(grads, expected[2:]):
            assert got.shape == grad.shape and torch.equal(got, torch.zeros_like(grad))


@pytest.mark.parametrize("impl", IMPLS)
def test_empty_batch_of_probabilities(impl):
    args, options = make(0, 3, (2, 2), 4, kind="probabilities")
    loss, correct, *grads = value_and_grad(impl)(*args, **options)
    assert loss.isnan() and correct.item() == 0
    assert [g.shape for g in grads] == [t.shape for t in args[:3]] and not grads[1].any() and not grads[2].any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ALL)
def test_huge_logits(kind, impl):
    (_, _, _, target), options = make(31, 16, (4, 4), 10, kind=kind)
    # Whole numbers: the logits are exact in every order of summation, near 1e4 and far apart.
    x = torch.randint(-40, 40, (31, 16, 4, 4)).float()
    weight, bias = torch.randint(-100, 100, (10, 16)).float() * 16, torch.randint(-9, 9, (10,)).float()
    logits = F.linear(x.mean((2, 3)), weight, bias)
    assert logits.abs().max() > 1e4
    check(value_and_grad(impl), (x, weight, bias, target), **options)


@pytest.mark.parametrize("impl", IMPLS)
def test_class_switched_off_by_an_infinite_bias(impl):
    args, _ = make(6, 5, (3, 3), 4)
    args[2][3] = -torch.inf
    args[3].clamp_(max=2)
    expected = rival(args)
    assert expected[0].isfinite()
    for got, want in zip(value_and_grad(impl)(*args), expected):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("impl", IMPLS)
def test_any_strides(impl):
    (x, weight, bias, target), _ = make(6, 5, (4, 6), 7)
    dense = [t.clone() for t in pool_linear_cross_entropy_value_and_grad(x, weight, bias, target, impl=impl)]

    def strided(t):
        out = torch.full([2 * s for s in t.shape], 77, dtype=t.dtype)[tuple(slice(None, None, 2) for _ in t.shape)]
        return out.copy_(t)

    variants = [
        [strided(t) for t in (x, weight, bias, target)],
        [x.to(memory_format=torch.channels_last), weight.t().contiguous().t(), bias, target],
        [x.transpose(2, 3).contiguous().transpose(2, 3), weight, bias, target],
        [x.flip(0).flip(0).transpose(0, 1).contiguous().transpose(0, 1), weight, bias, target],
    ]
    for args in variants:
        for got, want in zip(pool_linear_cross_entropy_value_and_grad(*args, impl=impl), dense):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    expanded = x[:, :, :1, :1].expand(-1, -1, 4, 6)
    check(value_and_grad(impl), (expanded, weight, bias, target))
    check(value_and_grad(impl), (x, weight, bias, strided(torch.rand(6, 7))))


@pytest.mark.parametrize("impl", IMPLS)
def test_loss_scale_and_float16(impl):
    """Gradients that float16 cannot hold unscaled come out right under a loss scale, in both forms."""
    args, _ = make(64, 4, (64, 64), 1000, dtype=torch.float16)
    scale = 2.0**16
    truth = rival(to_double(args))[2] * scale
    unscaled = pool_linear_cross_entropy_value_and_grad(*args, impl=impl)[2]
    assert (unscaled.double() * scale - truth).norm() > 5e-3 * truth.norm()
    leaf = args[0].clone().requires_grad_()
    (pool_linear_cross_entropy(leaf, *args[1:], impl=impl)[0] * scale).backward()
    direct = pool_linear_cross_entropy_value_and_grad(*args, grad_scale=scale, impl=impl)[2]
    for grad in (leaf.grad, direct):
        assert (grad.double() - truth).norm() < 1e-3 * truth.norm()


def test_float16_features_whose_sum_overflows():
    args, _ = make(2, 3, (32, 32), 4, dtype=torch.float16)
    args = (args[0].abs() + 100, *args[1:])  # the sum is about 100 * 1024, above 65504
    loss, *_ = pool_linear_cross_entropy_value_and_grad(*args)
    torch.testing.assert_close(loss.double(), rival(to_double(args))[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "impl, kind, pool, dtype, needs, wide",
    [
        ("aten", "index", "mean", torch.float32, (True, True, True), True),
        ("aten", "weighted", "cls", torch.float32, (True, True, True), False),
        ("aten", "probabilities", "none", torch.bfloat16, (True, True, True), False),
        ("aten", "ignored", "mean", torch.bfloat16, (True, False, False), True),
        ("aten", "smoothed", "none", torch.float32, (False, False, False), True),
        ("reference", "smoothed", "mean", torch.float32, (True, True, True), True),
        ("reference", "probabilities", "none", torch.bfloat16, (False, True, False), False),
    ],
)
def test_opcheck(impl, kind, pool, dtype, needs, wide):
    args, options = make(6, 5, (3, 3) if pool == "mean" else (), 4, kind=kind, dtype=dtype)
    if pool == "cls":
        args = (torch.randn(6, 2, 5), *args[1:])
    smoothing, ignore = options.get("label_smoothing", 0.0), options.get("ignore_index", -100)
    each = options.get("class_weight")
    torch.library.opcheck(OPERATOR, (*args, each, pool, smoothing, ignore, 1.0, list(needs), wide, impl))


def test_compile_fullgraph_equals_eager():
    args, options = make(6, 5, (3, 3), 4, kind="smoothed")

    def step(x, weight, bias, target):
        loss, correct = pool_linear_cross_entropy(x.relu(), weight, bias, target, **options)
        return loss, correct, *torch.autograd.grad(loss, (x, weight, bias))

    def forward(*args):
        return pool_linear_cross_entropy(args[0].relu(), *args[1:], **options)

    leaves = [t.requires_grad_() for t in args[:3]]
    eager = step(*args)
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager_decomp_partition")
    loss, correct = compiled(*args)
    assert torch.equal(loss, eager[0]) and torch.equal(correct, eager[1])
    for got, want in zip(torch.autograd.grad(loss, leaves), eager[2:]):
        assert torch.equal(got, want)

    with torch.no_grad():
        compiled = torch.compile(
            lambda *a: pool_linear_cross_entropy_value_and_grad(*a, **options), fullgraph=True, backend="aot_eager"
        )
        for got, want in zip(compiled(*args), pool_linear_cross_entropy_value_and_grad(*args, **options)):
            assert torch.equal(got, want) and got.stride() == want.stride()


def test_compiled_once_and_the_backend_is_chosen_at_run_time():
    from torch._dynamo.testing import CompileCounterWithBackend

    args, _ = make(6, 5, (3, 3), 4)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(pool_linear_cross_entropy, fullgraph=True, backend=counter)
    first = compiled(*args)
    for _ in range(2):
        assert torch.equal(compiled(*args)[0], first[0])
    with ops.backend("reference"):
        torch.testing.assert_close(compiled(*args)[0], first[0])
    with ops.backend("native"), pytest.raises(BackendError, match="native"):
        compiled(*args)
    assert counter.frame_count == 1


@contextlib.contextmanager
def poisoned(monkeypatch):
    """Fresh memory is full of nan or of a large number, as it may be in a long run."""
    with monkeypatch.context() as m:
        for owner, name in [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]:
            original = getattr(owner, name)

            def fill(*args, original=original, **kwargs):
                out = original(*args, **kwargs)
                return out.fill_(float("nan") if out.is_floating_point() else 113)

            m.setattr(owner, name, fill)
        yield


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ALL)
def test_poisoned_memory(kind, impl, monkeypatch):
    args, options = make(6, 5, (3, 3), 4, kind=kind)
    clean = pool_linear_cross_entropy_value_and_grad(*args, impl=impl, **options)
    with poisoned(monkeypatch):
        assert torch.empty(1).isnan()
        dirty = pool_linear_cross_entropy_value_and_grad(*args, impl=impl, **options)
    for a, b in zip(clean, dirty):
        assert torch.equal(a, b)


class Trace(TorchDispatchMode):
    """The ATen operators that compute something; views and empties launch nothing."""

    FREE = {"empty", "new_empty", "empty_like", "detach", "lift_fresh"}

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        is_view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view and name not in self.FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def run_inside(impl, args, needs=(True, True, True), options=None, wide=False):
    """The operator's body, so that a dispatch mode sees what is inside."""
    options = options or {}
    smoothing, ignore = options.get("label_smoothing", 0.0), options.get("ignore_index", -100)
    return MODULE._run(*args, options.get("class_weight"), "mean", smoothing, ignore, 1.0, list(needs), wide, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ALL)
def test_no_host_sync(kind, impl):
    args, options = make(6, 5, (3, 3), 4, kind=kind)
    with Trace() as trace:
        run_inside(impl, args, options=options)
    syncs = {"_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "masked_select", "unique", "_to_cpu"}
    assert trace.names and not syncs & set(trace.names)


def test_launches_on_the_cpu():
    args, _ = make(6, 5, (3, 3), 4)
    with Trace() as ours:
        run_inside("aten", args)
    assert len(ours.names) == 13, ours.names
    assert sum(name in ("expand", "div", "clone", "copy_", "_to_copy") for name in ours.names) == 0
    leaves = [t.requires_grad_() for t in args[:3]]
    with Trace() as eager:
        logits = F.linear(leaves[0].mean((2, 3)), *leaves[1:])
        (logits.argmax(1) == args[3]).sum()
        F.cross_entropy(logits, args[3]).backward()
    assert len(ours.names) < len(eager.names), eager.names


def test_autograd_adds_one_launch():
    args, _ = make(6, 5, (3, 3), 4)
    leaves = [t.requires_grad_() for t in args[:3]]
    loss, _ = pool_linear_cross_entropy(*args)
    with Trace() as trace:
        torch.autograd.grad(loss, leaves, torch.ones(()))
    assert trace.names == ["ones", "_foreach_mul"], trace.names


@pytest.mark.parametrize("dtype, launches", [(torch.float32, 0), (torch.bfloat16, 3)])
def test_a_seed_known_to_be_one_is_not_multiplied(dtype, launches):
    """Nor copied: a parameter takes the very memory that was saved."""
    leaves = [t.requires_grad_() for t in make(6, 5, (3, 3), 4, dtype=dtype)[0][:3]]
    target = torch.tensor([0, 1, 2, 3, 0, 1])
    expected = torch.autograd.grad(pool_linear_cross_entropy(*leaves, target)[0], leaves, torch.ones(()))
    x = leaves[0] * 1  # a leaf would make its stride-0 gradient dense
    loss, _ = pool_linear_cross_entropy(x, *leaves[1:], target)
    seed = ones(loss)
    with Trace() as trace:
        loss.backward(seed, inputs=[*leaves[1:]])
    assert len(trace.names) == launches, trace.names
    for leaf, grad in zip(leaves[1:], expected[1:]):
        assert torch.equal(leaf.grad, grad)
    loss, _ = pool_linear_cross_entropy(x, *leaves[1:], target)
    with Trace() as trace:
        got = torch.autograd.grad(loss, [x, *leaves[1:]], seed)
    assert len(trace.names) == launches, trace.names
    for a, b in zip(got, expected):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("norm", [False, True])
def test_the_weight_of_the_loss_in_a_sum(impl, norm):
    args, _ = make(6, 5, (3, 3), 4, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in args[:3]]
    options = {"norm": nn.BatchNorm1d(5).double()} if norm else {}
    first, _ = pool_linear_cross_entropy(*args, impl=impl, **options)
    wanted = torch.autograd.grad(first, leaves)
    for scale in (5.0, 0.0, 0.25):
        for factor, seed in ((1, ones(first)), (3, torch.tensor(3.0, dtype=torch.float64))):
            loss, _ = pool_linear_cross_entropy(*args, grad_scale=scale, impl=impl, **options)
            assert torch.equal(loss, first)
            for grad, want in zip(torch.autograd.grad(loss, leaves, seed), wanted):
                torch.testing.assert_close(grad, factor * scale * want, rtol=1e-10, atol=1e-15)


def test_a_gradient_taken_twice_is_not_shared_with_what_is_accumulated():
    x, weight, bias, target = make(6, 5, (3, 3), 4)[0]
    weight.requires_grad_()
    loss, _ = pool_linear_cross_entropy(x, weight, bias, target)
    seed = ones(loss)
    loss.backward(seed, retain_graph=True)
    once = weight.grad.clone()
    loss.backward(seed)
    assert torch.equal(weight.grad, 2 * once)


def test_class_that_does_not_exist():
    args, _ = make(4, 3, (2, 2), 5)
    for bad in (5, -1):
        args[3][1] = bad
        for impl in IMPLS:
            for each in (None, torch.ones(5)):
                with pytest.raises(IndexError, match="out of bounds"):
                    pool_linear_cross_entropy(*args, class_weight=each, impl=impl)


def test_signature_and_reasons():
    args, _ = make(4, 3, (2, 2), 5)
    reject = MODULE._reject_triton
    good = MODULE.Signature("cuda", None, (torch.float32, torch.bfloat16, torch.int64), 1000)
    assert reject(good) is None
    assert reject(good._replace(classes=200_000)) is None
    assert "float64" in reject(good._replace(dtypes=(torch.float64,) * 3))
    assert "interpreter" in reject(good._replace(device="cpu"))
    assert reject(good._replace(triton="why")) == "why"
    if ops.explain(pool_linear_cross_entropy, *args).chosen == "triton":
        pytest.skip("the Triton interpreter is on")
    with pytest.raises(
        BackendError, match=r'backend "triton" cannot serve this call: .*(pip install|CUDA device).*auto'
    ):
        pool_linear_cross_entropy(*args, impl="triton")
    with ops.backend("native"), pytest.raises(BackendError, match=r'"native".*no such implementation.*"aten"'):
        pool_linear_cross_entropy_value_and_grad(*args)


X, W, B, T = (4, 3, 2, 2), (5, 3), (5,), (4,)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(pool="max"), "pool='max' is not one of 'mean', 'tokens', 'cls', 'none'"),
        (dict(x=torch.zeros(4, 3)), r"x has shape \[4, 3\]; pool='mean' takes \[N, C, \*spatial\]"),
        (dict(pool="cls"), r"x has shape .* pool='cls' takes \[N, T, C\]"),
        (dict(pool="cls", x=torch.zeros(4, 0, 3)), "no position to pool"),
        (dict(class_weight=torch.ones(4)), r"class_weight has shape \[4\]; 5 classes take \[5\]"),
        (dict(class_weight=torch.ones(5, dtype=torch.float64)), "class_weight are .*float64"),
        (dict(class_weight=torch.ones(5, requires_grad=True)), "class_weight requires grad.*detach"),
        (dict(class_weight=torch.ones(5, device="meta")), "class_weight is on meta"),
        (dict(pool="tokens"), r"x has shape .* pool='tokens' takes \[N, T, C\]"),
        (dict(pool="none"), r"x has shape .* pool='none' takes \[N, C\]"),
        (dict(x=torch.zeros(4, 3, 0, 2)), "no position to pool"),
        (dict(weight=torch.zeros(5, 4)), r"weight has shape \[5, 4\]; .* takes \[K, 3\]"),
        (dict(weight=torch.zeros(0, 3)), "K >= 1"),
        (dict(bias=torch.zeros(4)), r"bias has shape \[4\]; .* takes \[5\] or None"),
        (dict(weight=torch.zeros(W, dtype=torch.float64)), "x, weight, bias, class_weight are .*float64"),
        (dict(x=torch.zeros(X, dtype=torch.int64)), "x, weight, bias, class_weight are .*int64"),
        (dict(target=torch.zeros(T, dtype=torch.int32)), r"target is torch.int32; give int64 .*target.long\(\)"),
        (dict(target=torch.zeros(3, dtype=torch.int64)), r"target has shape \[3\]; class indices for .* are \[4\]"),
        (dict(target=torch.zeros(4, 1, dtype=torch.int64)), r"target has shape \[4, 1\]"),
        (dict(target=torch.zeros(4, 6)), r"target has shape \[4, 6\]; probabilities for .* are \[4, 5\]"),
        (dict(target=torch.zeros(4, 5), ignore_index=0), "ignore_index=0 needs class indices"),
        (dict(target=torch.zeros(4, 5, requires_grad=True)), "target requires grad.*detach"),
        (dict(label_smoothing=1.5), r"label_smoothing=1.5 is outside \[0, 1\]"),
        (dict(weight=torch.zeros(W, device="meta")), "weight is on meta and x on cpu"),
        (dict(impl="tritom"), "impl='tritom' is not a backend.*triton"),
    ],
)
def test_refusals(change, message):
    call = dict(x=torch.zeros(X), weight=torch.zeros(W), bias=torch.zeros(B), target=torch.zeros(T, dtype=torch.int64))
    call |= change
    args = [call.pop(name) for name in ("x", "weight", "bias", "target")]
    for form in (pool_linear_cross_entropy, pool_linear_cross_entropy_value_and_grad):
        with pytest.raises(ArgumentError, match=message):
            form(*args, **call)
