import sys

import pytest
import torch
import torch.nn.functional as F

from fastlocal import ops, reference
from fastlocal.blocks.measure import LaunchCounter, SavedBytes
from fastlocal.errors import ArgumentError, BackendError
from fastlocal.ops import goodness_loss, goodness_loss_value_and_grad
from tests.ops.cases import assert_within_error_rule
from tests.ops.losses import DTYPES, SYNCS, Trace, poisoned

IMPLS = ("aten", "reference")
OPERATOR = torch.ops.fastlocal.goodness_loss.default
BACKWARD = torch.ops.fastlocal.goodness_loss_backward.default
MODULE = sys.modules["fastlocal.ops.goodness_loss"]
SHAPES = [
    (1, 1),
    (3, 5),
    (31, 127),
    (63, 1000),
    (127, 3),
    (3, 16, 7, 7),
    (2, 3, 32, 32),
    (5, 1, 2, 3, 4),
    (2, 3, 56, 56),
]


def plain(h, positive, theta, goodness, offset=None):
    """What a user writes, in the dtype of h: loss, goodness and, by autograd, the gradient."""
    h = h.detach().clone().requires_grad_()
    squares = h.square().flatten(1)
    g = squares.mean(1) if goodness == "mean" else squares.sum(1)
    total = g if offset is None else g + offset.to(g.dtype)
    loss = F.softplus(torch.where(positive, theta - total, total - theta)).mean()
    return [loss.detach(), g.detach(), torch.autograd.grad(loss, h)[0]]


def through_autograd(impl, scale=1.0):
    def run(h, positive, **options):
        leaf = h.detach().clone().requires_grad_()
        loss, g = goodness_loss(leaf, positive, impl=impl, **options)
        assert not g.requires_grad
        return loss.detach(), g, torch.autograd.grad(loss * scale, leaf)[0]

    return run


def value_and_grad(impl):
    return lambda *args, **options: goodness_loss_value_and_grad(*args, impl=impl, **options)


def make(shape, dtype=torch.float32, size=1.0, channels_last=False):
    h = (torch.randn(shape) * size).to(dtype)
    if channels_last:
        h = h.to(memory_format=torch.channels_last)
    return h, torch.arange(shape[0]) % 3 == 0


def check(run, h, positive, *, theta=2.0, goodness="mean", offset=None, what=""):
    got = run(h, positive, theta=theta, goodness=goodness, offset=offset)
    same = plain(h, positive, theta, goodness, offset)
    truth = plain(h.double(), positive, theta, goodness, None if offset is None else offset.double())
    terms = (truth[1].abs().max().item() + abs(theta) if len(h) else 0.0, 0.0, 0.0)
    wide = torch.promote_types(h.dtype, torch.float32)
    assert got[0].dtype == got[1].dtype == wide and got[2].dtype == h.dtype
    for name, g, s, t, size in zip(("loss", "goodness", "gradient"), got, same, truth, terms):
        assert_within_error_rule(g, s, t, f"{what} {name}", size)
    return got


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("goodness", ["mean", "sum"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ragged_sizes_and_both_forms(shape, goodness, impl):
    for dtype in DTYPES:
        for last in (False, True) if len(shape) == 4 else (False,):
            h, positive = make(shape, dtype, 1.3, last)
            theta = 2.0 if goodness == "mean" else float(h[0].numel())
            for form in (value_and_grad(impl), through_autograd(impl)):
                got = check(form, h, positive, theta=theta, goodness=goodness, what=f"{dtype} {last}")
                assert got[2].stride() == torch.empty_like(h).stride()


@pytest.mark.parametrize("impl", IMPLS)
def test_offset(impl):
    h, positive = make((9, 6))
    for dtype in (torch.float32, torch.float16):
        offset = torch.randn(9).to(dtype)
        for form in (value_and_grad(impl), through_autograd(impl)):
            check(form, h, positive, offset=offset)
    for got, want in zip(
        value_and_grad(impl)(h, positive, theta=1.0, offset=torch.full((9,), -0.5)),
        value_and_grad(impl)(h, positive, theta=1.5),
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_perceptrons_layer_by_hand(impl):
    """Two samples of two features: softplus(-(g - theta)) and softplus(g - theta)."""
    h = torch.tensor([[1.0, 2.0], [3.0, 0.0]], dtype=torch.float64)
    loss, g, grad = value_and_grad(impl)(h, torch.tensor([True, False]), theta=4.0, goodness="sum")
    torch.testing.assert_close(g, torch.tensor([5.0, 9.0], dtype=torch.float64))
    x = torch.tensor([-1.0, 5.0], dtype=torch.float64)
    torch.testing.assert_close(loss, x.exp().log1p().mean())
    torch.testing.assert_close(grad, h * (torch.tensor([[-1.0], [1.0]]) * x.sigmoid()[:, None]))


@pytest.mark.parametrize("impl", IMPLS)
def test_large_goodness_in_float16(impl):
    """The sum of squares leaves float16 long before the loss does; and far from the threshold nothing overflows."""
    h, positive = make((8, 4000), torch.float16, 10.0)
    assert plain(h, positive, 4e5, "sum")[1].isinf().any()
    loss, g, grad = value_and_grad(impl)(h, positive, theta=4e5, goodness="sum")
    truth = plain(h.double(), positive, 4e5, "sum")
    for got, want, tolerance in zip((loss, g, grad), truth, (1e-3, 1e-6, 1e-3)):
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=1e-4)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_of_zeros_and_no_row(impl):
    h = torch.zeros(3, 4)
    loss, g, grad = value_and_grad(impl)(h, torch.tensor([True, True, False]))
    assert not g.any() and not grad.any()
    torch.testing.assert_close(loss, (2 * F.softplus(torch.tensor(2.0)) + F.softplus(torch.tensor(-2.0))) / 3)
    loss, g, grad = value_and_grad(impl)(h[:0], torch.zeros(0, dtype=torch.bool))
    assert loss.isnan() and g.shape == (0,) and grad.shape == (0, 4)


@pytest.mark.parametrize("impl", IMPLS)
def test_goodness_does_not_know_the_scale_of_a_normalised_input(impl):
    h, positive = make((9, 6))
    unit = F.normalize(h)
    for scale in (0.01, 100.0):
        torch.testing.assert_close(
            value_and_grad(impl)(F.normalize(h * scale), positive)[0], value_and_grad(impl)(unit, positive)[0]
        )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("goodness", ["mean", "sum"])
@pytest.mark.parametrize("offset", [None, torch.linspace(-1, 1, 4, dtype=torch.float64)])
def test_gradcheck(offset, goodness, impl):
    h, positive = make((4, 3, 2), torch.float64)
    h.requires_grad_()
    options = dict(goodness=goodness, offset=offset, impl=impl)
    assert torch.autograd.gradcheck(lambda t: goodness_loss(t, positive, **options)[0], h)


def test_the_specification_has_all_orders_and_its_closed_form():
    h, positive = make((4, 3), torch.float64)
    h.requires_grad_()

    def loss(t):
        return reference.goodness_loss(t, positive)[0]

    assert torch.autograd.gradcheck(loss, h) and torch.autograd.gradgradcheck(loss, h)
    value, _, grad = reference.goodness_loss_value_and_grad(h.detach(), positive, grad_scale=8.0)
    torch.testing.assert_close(value, loss(h).detach(), rtol=1e-14, atol=0)
    torch.testing.assert_close(grad, torch.autograd.grad(loss(h) * 8, h)[0], rtol=1e-12, atol=1e-15)


def test_second_derivative_is_refused():
    h, positive = make((4, 3))
    h.requires_grad_()
    (grad,) = torch.autograd.grad(goodness_loss(h, positive)[0] ** 2, h, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
def test_any_strides_and_the_input_is_left_alone(impl):
    h, positive = make((6, 4, 3, 5))
    expected = value_and_grad(impl)(h, positive)
    for other in (
        h.to(memory_format=torch.channels_last),
        h.transpose(2, 3).contiguous().transpose(2, 3),
        h.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        torch.randn(12, 8, 3, 10)[::2, ::2, :, ::2].copy_(h),
    ):
        before = other.clone()
        for form in (value_and_grad(impl), through_autograd(impl)):
            for got, want in zip(form(other, positive), expected):
                torch.testing.assert_close(got, want)
        assert torch.equal(other, before)
    row = torch.randn(1, 4).expand(6, 4)
    check(value_and_grad(impl), row, positive)


@pytest.mark.parametrize("impl", IMPLS)
def test_loss_scale_and_float16(impl):
    """Gradients that float16 cannot hold unscaled come out right under a loss scale, in both forms."""
    h, positive = make((512, 64, 8, 8), torch.float16)
    scale = 2.0**16
    truth = plain(h.double(), positive, 2.0, "mean")[2] * scale
    assert (value_and_grad(impl)(h, positive)[2].double() * scale - truth).norm() > 5e-3 * truth.norm()
    direct = goodness_loss_value_and_grad(h, positive, grad_scale=scale, impl=impl)[2]
    for grad in (through_autograd(impl, scale)(h, positive)[2], direct):
        assert (grad.double() - truth).norm() < 1e-3 * truth.norm()


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_changes_nothing(impl):
    h, positive = make((9, 6))
    expected = value_and_grad(impl)(h, positive)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = through_autograd(impl)(h, positive)
    assert all(torch.equal(g, e) and g.dtype == e.dtype for g, e in zip(got, expected))


@pytest.mark.parametrize("impl", IMPLS)
def test_poisoned_memory(impl, monkeypatch):
    for shape in ((1, 3), (6, 4, 3, 5)):
        h, positive = make(shape)
        clean = value_and_grad(impl)(h, positive)
        with poisoned(monkeypatch):
            assert torch.empty(1).isnan()
            dirty = value_and_grad(impl)(h, positive)
        assert all(torch.equal(a, b) for a, b in zip(clean, dirty))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(dtype, impl):
    for shape, last, needs in [((6, 3), False, True), ((4, 3, 2, 5), True, True), ((4, 3), False, False)]:
        h, positive = make(shape, dtype, 1.0, last)
        offset = torch.randn(shape[0]) if needs else None
        torch.library.opcheck(OPERATOR, (h, positive, offset, 2.0, "sum", 2.0, needs, impl))
        factor = torch.randn(shape[0], dtype=torch.promote_types(dtype, torch.float32))
        for grad_loss in (None, torch.tensor(3.0, dtype=factor.dtype)):
            torch.library.opcheck(BACKWARD, (h, factor, grad_loss, impl))


def test_compile_fullgraph_equals_eager():
    h, positive = make((9, 6))
    h.requires_grad_()

    def forward(h, positive):
        return goodness_loss(h.relu(), positive, theta=1.0)

    eager = forward(h, positive)
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager_decomp_partition")(h, positive)
    assert all(torch.equal(a, b) for a, b in zip(compiled, eager))
    assert torch.equal(torch.autograd.grad(compiled[0], h)[0], torch.autograd.grad(eager[0], h)[0])
    both = torch.compile(goodness_loss_value_and_grad, fullgraph=True, backend="aot_eager")
    for got, want in zip(both(h.detach(), positive), goodness_loss_value_and_grad(h.detach(), positive)):
        assert torch.equal(got, want)
    with ops.backend("native"), pytest.raises(BackendError, match="native"):
        both(h.detach(), positive)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_host_sync(impl):
    h, positive = make((6, 4))
    with Trace() as trace:
        _, _, factor = MODULE._run(h, positive, torch.zeros(6), 2.0, "mean", 1.0, True, impl)
        MODULE._run_backward(h, factor, torch.ones(()), impl)
    assert trace.names and not SYNCS & set(trace.names)


def test_no_gradient_without_need():
    h, positive = make((6, 4))
    assert OPERATOR(h, positive, None, 2.0, "mean", 1.0, False, "auto")[2].numel() == 0
    h.requires_grad_()
    with torch.no_grad():
        assert not goodness_loss(h, positive)[0].requires_grad


def test_it_saves_the_features_and_one_number_for_each_sample():
    h = torch.randn(64, 16, 8, 8, requires_grad=True)
    positive = torch.arange(64) % 2 == 0
    saved, launches = [], []
    for loss in (reference.goodness_loss, lambda *a: goodness_loss(*a, impl="aten")):
        h.grad = None
        with LaunchCounter() as counter, SavedBytes([positive]) as held:
            loss(h * 1, positive)[0].backward()
        saved.append(held.peak)
        launches.append(counter.total)
    assert saved[1] == h.numel() * 4 + 64 * 4 <= saved[0]
    assert launches[1] <= launches[0] - 4, launches


H, P = torch.zeros(4, 3), torch.zeros(4, dtype=torch.bool)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(h=torch.zeros(4)), r"h has shape \[4\]"),
        (dict(h=torch.zeros(4, 3, dtype=torch.int64)), "torch.int64; give a floating-point"),
        (dict(h=torch.zeros(4, 0)), "a sample is empty"),
        (dict(positive=torch.zeros(3, dtype=torch.bool)), r"positive has shape \[3\]"),
        (dict(positive=torch.zeros(4)), r"torch.float32; h \[4, 3\] takes bool \[4\]"),
        (dict(goodness="max"), "goodness='max' is not one of 'mean', 'sum'"),
        (dict(offset=torch.zeros(3)), r"offset has shape \[3\]"),
        (dict(offset=torch.zeros(4, requires_grad=True)), "offset requires grad"),
        (dict(positive=P.to("meta")), "positive is on meta and h on cpu"),
        (dict(impl="atem"), "impl='atem' is not a backend.*aten"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ArgumentError, match=message):
        goodness_loss(**dict(h=H, positive=P) | change)
    with pytest.raises(BackendError, match="no such implementation"):
        goodness_loss(H, P, impl="native")
