import sys

import pytest
import torch
import torch.nn.functional as F

from fastlocal import ops, reference
from fastlocal.blocks.measure import LaunchCounter, SavedBytes
from fastlocal.errors import ArgumentError, BackendError
from fastlocal.ops import supervised_contrastive_loss, supervised_contrastive_loss_value_and_grad
from fastlocal.ops._seed import ones
from tests.ops.cases import assert_within_error_rule
from tests.ops.losses import DTYPES, SYNCS, Trace, poisoned, with_gradient

IMPLS = ("aten", "reference")
OPERATOR = torch.ops.fastlocal.supervised_contrastive_loss.default
MODULE = sys.modules["fastlocal.ops.supervised_contrastive_loss"]
LABELS = ("few", "one", "different", "probabilities")


def plain(x, target, temperature=0.07):
    """What a user writes, in the dtype of x but for the softmax: Khosla et al.'s formula with masks and autograd."""
    labels = target.argmax(1) if target.is_floating_point() else target
    x = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1)
    logits = x @ x.T / temperature
    itself = torch.eye(len(x), dtype=torch.bool)
    log_prob = logits - torch.logsumexp(logits.masked_fill(itself, torch.finfo(x.dtype).min), 1, keepdim=True)
    positive = (labels[:, None] == labels[None]) & ~itself
    return -((log_prob * positive).sum(1) / positive.sum(1).clamp(min=1)).mean()


def labels(kind, rows):
    if kind == "probabilities":
        return torch.rand(rows, 5).softmax(1)
    return {"few": torch.randint(4, (rows,)), "one": torch.full((rows,), 3), "different": torch.arange(rows)}[kind]


def check(got, x, target, what, temperature=0.07):
    same = with_gradient(lambda t: plain(t, target, temperature), x)
    truth = with_gradient(lambda t: plain(t, target, temperature), x.double())
    # The largest term of the loss is a difference of log_prob from 0, that of the gradient one of 2 / (B T |x|).
    norm = x.double().norm(dim=1).clamp(min=1e-12).min().item()
    terms = (2 / temperature, 2 / (temperature * len(x) * norm))
    assert got[1].shape == x.shape and got[1].dtype == x.dtype
    assert got[0].dtype == torch.promote_types(x.dtype, torch.float32)
    for name, g, s, t, size in zip(("loss", "gradient"), got, same, truth, terms):
        assert_within_error_rule(g, s, t, f"{what} {name}", size)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("width", [1, 16, 127, 2048])
@pytest.mark.parametrize("rows", [1, 2, 3, 31, 63, 127])
def test_ragged_sizes_and_both_forms(rows, width, impl):
    torch.manual_seed(rows + width)
    for dtype in DTYPES:
        for kind in LABELS:
            x, target = torch.randn(rows, width).to(dtype), labels(kind, rows)
            what = f"{dtype} {kind}"
            check(with_gradient(lambda t, y=target: supervised_contrastive_loss(t, y, impl=impl), x), x, target, what)
            check(supervised_contrastive_loss_value_and_grad(x, target, impl=impl), x, target, what)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_weight_of_the_loss_in_a_sum(impl):
    x, target = torch.randn(9, 7, dtype=torch.float64, requires_grad=True), labels("few", 9)
    wanted = torch.autograd.grad(plain(x, target), x)[0]
    for scale in (5.0, 0.0, 0.25):
        loss = supervised_contrastive_loss(x, target, grad_scale=scale, impl=impl)
        assert torch.allclose(loss, plain(x, target), rtol=1e-12)
        for factor, seed in ((1, ones(loss)), (3, torch.tensor(3.0, dtype=torch.float64))):
            loss = supervised_contrastive_loss(x, target, grad_scale=scale, impl=impl)
            grad = torch.autograd.grad(loss, x, seed)[0]
            torch.testing.assert_close(grad, factor * scale * wanted, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_thousand_rows(dtype, impl):
    torch.manual_seed(0)
    x, target = torch.randn(1000, 127).to(dtype), labels("few", 1000)
    check(supervised_contrastive_loss_value_and_grad(x, target, impl=impl), x, target, str(dtype))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scale", [1e-3, 1e4])
@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
def test_large_and_small_features(scale, temperature, impl):
    torch.manual_seed(0)
    for dtype in DTYPES:
        x, target = (torch.randn(31, 16) * scale).to(dtype), labels("few", 31)
        got = supervised_contrastive_loss_value_and_grad(x, target, temperature, impl=impl)
        check(got, x, target, f"{dtype} {scale}", temperature)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_of_zeros_and_tiny_rows(impl):
    """F.normalize divides by 1e-12 where the norm is smaller, and the norm is a constant there."""
    torch.manual_seed(0)
    x, target = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 0, 2])
    x[1] = 0
    x[2] *= 1e-13
    expected = with_gradient(lambda t: plain(t, target), x)
    for got, want in zip(supervised_contrastive_loss_value_and_grad(x, target, impl=impl), expected):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_positive_and_no_row(impl):
    x = torch.randn(5, 3)
    loss, grad = supervised_contrastive_loss_value_and_grad(x, torch.arange(5), impl=impl)
    assert loss == 0 and torch.equal(grad, torch.zeros_like(x))
    loss, grad = supervised_contrastive_loss_value_and_grad(x[:1], torch.tensor([3]), impl=impl)
    assert loss == 0 and torch.equal(grad, torch.zeros_like(grad))
    loss, grad = supervised_contrastive_loss_value_and_grad(x[:0], torch.arange(0), impl=impl)
    assert loss.isnan() and grad.shape == (0, 3)


@pytest.mark.parametrize("impl", IMPLS)
def test_shared_positives(impl):
    torch.manual_seed(0)
    x, target = torch.randn(9, 4), labels("few", 9)
    shared = reference.positive_weights(target)
    expected = supervised_contrastive_loss_value_and_grad(x, target, impl=impl)
    for got, want in zip(supervised_contrastive_loss_value_and_grad(x, target, 0.07, shared, impl=impl), expected):
        assert torch.equal(got, want)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", LABELS)
def test_gradcheck(kind, impl):
    torch.manual_seed(0)
    x, target = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), labels(kind, 5)
    assert torch.autograd.gradcheck(lambda t: supervised_contrastive_loss(t, target, 0.5, impl=impl), x)


def test_the_specification_has_all_orders_and_its_closed_form():
    torch.manual_seed(0)
    x, target = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), labels("few", 5)

    def loss(t):
        return reference.supervised_contrastive_loss(t, target, 0.5)

    assert torch.autograd.gradcheck(loss, x) and torch.autograd.gradgradcheck(loss, x)
    value, grad = reference.supervised_contrastive_loss_value_and_grad(x.detach(), target, 0.5, grad_scale=8.0)
    torch.testing.assert_close(value, loss(x).detach(), rtol=1e-14, atol=0)
    torch.testing.assert_close(grad, torch.autograd.grad(loss(x) * 8, x)[0], rtol=1e-12, atol=1e-15)


def test_the_reference_backend_gives_the_references_numbers():
    torch.manual_seed(0)
    x, target = torch.randn(31, 16), labels("few", 31)
    expected = reference.supervised_contrastive_loss_value_and_grad(x, target)
    with ops.backend("reference"):
        got = with_gradient(lambda t: supervised_contrastive_loss(t, target), x)
    assert all(torch.equal(g, e) for g, e in zip(got, expected))
    assert torch.equal(got[0], reference.supervised_contrastive_loss(x, target))
    assert ops.explain(supervised_contrastive_loss, x, target).chosen == "aten"


def test_second_derivative_is_refused():
    x = torch.randn(4, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(supervised_contrastive_loss(x, torch.tensor([0, 1, 0, 1])) ** 2, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
def test_any_strides_and_the_input_is_left_alone(impl):
    torch.manual_seed(0)
    x, target = torch.randn(9, 6), labels("few", 9)
    expected = supervised_contrastive_loss_value_and_grad(x, target, impl=impl)
    for other in (x.t().contiguous().t(), torch.randn(9, 12)[:, ::2].copy_(x), torch.randn(18, 6)[::2].copy_(x)):
        before = other.clone()
        for got, want in zip(supervised_contrastive_loss_value_and_grad(other, target, impl=impl), expected):
            torch.testing.assert_close(got, want)
        assert torch.equal(other, before)


@pytest.mark.parametrize("impl", IMPLS)
def test_loss_scale_and_float16(impl):
    """Gradients that float16 cannot hold unscaled come out right under a loss scale, in both forms."""
    torch.manual_seed(0)
    x, target, scale = (torch.randn(512, 16) * 1e3).half(), labels("few", 512), 2.0**16
    truth = with_gradient(lambda t: plain(t, target), x.double())[1] * scale
    assert (supervised_contrastive_loss_value_and_grad(x, target, impl=impl)[1].double() * scale - truth).norm() > (
        5e-3 * truth.norm()
    )
    scaled = with_gradient(lambda t: supervised_contrastive_loss(t, target, impl=impl) * scale, x)[1]
    direct = supervised_contrastive_loss_value_and_grad(x, target, grad_scale=scale, impl=impl)[1]
    for grad in (scaled, direct):
        assert (grad.double() - truth).norm() < 1e-3 * truth.norm()


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_changes_nothing(impl):
    torch.manual_seed(0)
    x, target = torch.randn(9, 6), labels("few", 9)
    expected = supervised_contrastive_loss_value_and_grad(x, target, impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = supervised_contrastive_loss_value_and_grad(x, target, impl=impl)
        assert torch.equal(supervised_contrastive_loss(x, target, impl=impl), expected[0])
        plain_loss = reference.supervised_contrastive_loss(x, target)
    assert torch.equal(plain_loss, reference.supervised_contrastive_loss(x, target))
    assert all(torch.equal(g, e) for g, e in zip(got, expected))


@pytest.mark.parametrize("impl", IMPLS)
def test_poisoned_memory(impl, monkeypatch):
    torch.manual_seed(0)
    for rows in (1, 9):
        x, target = torch.randn(rows, 6), labels("few", rows)
        clean = supervised_contrastive_loss_value_and_grad(x, target, impl=impl)
        with poisoned(monkeypatch):
            assert torch.empty(1).isnan()
            dirty = supervised_contrastive_loss_value_and_grad(x, target, impl=impl)
        assert all(torch.equal(a, b) for a, b in zip(clean, dirty))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("needs, wide", [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(dtype, needs, wide, impl):
    torch.manual_seed(0)
    target, x = labels("few", 6), torch.randn(6, 3).to(dtype)
    weights = reference.positive_weights(target, torch.promote_types(dtype, torch.float32))[0]
    for pairs in ((target, None), (None, weights)):
        torch.library.opcheck(OPERATOR, (x, *pairs, 0.07, 2.0, needs, wide, impl))


def test_compile_fullgraph_equals_eager():
    torch.manual_seed(0)
    x, target = torch.randn(9, 6, requires_grad=True), labels("few", 9)

    def forward(x, target):
        return supervised_contrastive_loss(x.relu() + 0.1, target)

    eager = forward(x, target)
    loss = torch.compile(forward, fullgraph=True, backend="aot_eager_decomp_partition")(x, target)
    assert torch.equal(loss, eager)
    assert torch.equal(torch.autograd.grad(loss, x)[0], torch.autograd.grad(eager, x)[0])
    compiled = torch.compile(supervised_contrastive_loss_value_and_grad, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(x.detach(), target), supervised_contrastive_loss_value_and_grad(x.detach(), target)):
        assert torch.equal(got, want)
    with ops.backend("native"), pytest.raises(BackendError, match="native"):
        compiled(x.detach(), target)


def test_launches_are_those_that_the_counter_is_told():
    """Those of Triton, whoever serves; and "aten" reads nothing back."""
    for rows, count in ((6, 3), (0, 1)):
        args = (torch.randn(rows, 3), labels("few", rows), None, 0.07, 1.0, True, False, "aten")
        with LaunchCounter() as outside:
            OPERATOR(*args)
        assert outside.total == MODULE.triton_launches(args, {}) == count
        with Trace() as trace:
            MODULE._run(*args)
        assert not SYNCS & set(trace.names)


def test_what_it_saves_in_launches_and_bytes():
    torch.manual_seed(0)
    x, target = torch.randn(64, 16, requires_grad=True), labels("few", 64)
    positives = reference.positive_weights(target)
    counts = []
    for loss in (reference.supervised_contrastive_loss, supervised_contrastive_loss):
        x.grad = None
        with LaunchCounter() as launches, SavedBytes([x, *positives]) as saved:
            loss(x, target, 0.07, positives).backward()
        counts.append((launches.total, saved.peak))
    assert counts[1] == (5, 64 * 16 * 4)  # one [B, D], no [B, B]
    assert counts[0][0] >= 2 * counts[1][0] and counts[0][1] > 64 * 64 * 4 + counts[1][1]


@pytest.mark.parametrize("dtype, launches", [(torch.float32, 0), (torch.bfloat16, 1)])
def test_a_seed_known_to_be_one_is_not_multiplied(dtype, launches):
    x, target = torch.randn(8, 5).to(dtype).requires_grad_(), labels("few", 8)
    supervised_contrastive_loss(x, target).backward(torch.ones(()))
    expected, x.grad = x.grad, None
    loss = supervised_contrastive_loss(x, target)
    seed = ones(loss)
    with LaunchCounter() as counter:
        loss.backward(seed)
    assert counter.total == launches and torch.equal(x.grad, expected)  # only the cast


X, T = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(features=torch.zeros(4)), r"features has shape \[4\]"),
        (dict(features=torch.zeros(4, 3, dtype=torch.int64)), "torch.int64; give a floating-point"),
        (dict(target=torch.zeros(3, dtype=torch.int64)), r"target has shape \[3\]"),
        (dict(target=torch.zeros(4)), r"target has shape \[4\] and torch.float32"),
        (dict(temperature=0.0), "temperature=0.0 is not above 0"),
        (dict(positives=(torch.zeros(3, 3), torch.zeros(3))), r"shape \[3, 3\].*take \[4, 4\] in torch.float32"),
        (dict(positives=(torch.zeros(4, 4).double(), torch.zeros(4))), "torch.float64; .*positive_weights"),
        (dict(positives=(torch.zeros(4, 4, device="meta"), torch.zeros(4))), "is on meta and features on cpu"),
        (dict(impl="atem"), "impl='atem' is not a backend.*aten"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ArgumentError, match=message):
        supervised_contrastive_loss(**dict(features=X, target=T) | change)
    with pytest.raises(BackendError, match="no such implementation"):
        supervised_contrastive_loss(X, T, impl="native")
