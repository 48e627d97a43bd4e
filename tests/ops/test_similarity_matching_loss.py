import sys

import pytest
import torch
import torch.nn.functional as F

from fastlocal import ops, reference
from fastlocal.blocks.measure import LaunchCounter, SavedBytes
from fastlocal.errors import ArgumentError, BackendError
from fastlocal.ops import similarity_matching_loss, similarity_matching_loss_value_and_grad
from fastlocal.ops._seed import ones
from tests.ops.cases import assert_within_error_rule
from tests.ops.losses import DTYPES, SYNCS, Trace, poisoned, with_gradient

IMPLS = ("aten", "reference")
OPERATOR = torch.ops.fastlocal.similarity_matching_loss.default
MODULE = sys.modules["fastlocal.ops.similarity_matching_loss"]
CLASSES = 5
LABELS = ("few", "one", "different", "probabilities")
# Vectors, maps, maps and tokens that are taken flat, tokens.
SHAPES = [(1,), (16,), (127,), (2048,), (16, 8, 8), (8, 7, 9), (3, 5, 5), (8, 1, 5), (6, 16), (1, 7), (5, 3)]


def over_positions(x):
    """The deviation of every channel, or the flat features; and whether there are positions."""
    if x.dim() == 4 and x.shape[1] > 3 and x.shape[2] > 1:
        return x.flatten(2).std(2), True
    if x.dim() == 3 and x.shape[2] > 3 and x.shape[1] > 1:
        return x.std(1), True
    return x.flatten(1), False


def similarity(x):
    x = over_positions(x)[0]
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    x = x - x.mean(1, keepdim=True)
    x = x / (x.norm(dim=1, keepdim=True) + 1e-8)
    return (x @ x.T).clamp(-1, 1)


def wanted(x, target):
    """The targets' matrix, rounded once: its error, which is the same for every pair, is not the operator's."""
    onehot = target if target.is_floating_point() else F.one_hot(target, classes(target))
    return similarity(onehot.double()).to(torch.promote_types(x.dtype, torch.float32))


def plain(x, target):
    """What a user writes: the deviation in the dtype of x, the matrices in float32, autograd."""
    return F.mse_loss(similarity(x), wanted(x, target))


def labels(kind, rows):
    if kind == "probabilities":
        return torch.rand(rows, CLASSES).softmax(1)
    return {"few": torch.randint(4, (rows,)), "one": torch.full((rows,), 3), "different": torch.arange(rows)}[kind]


def classes(target):
    return max(CLASSES, len(target))


def check(got, x, target, what):
    same, truth = (with_gradient(lambda t: plain(t, target), t) for t in (x, x.double()))
    # What cancels: the mean is taken from numbers that may be close to each other, so one rounding of the largest of them
    # grows by the ratio; then S - T, of numbers up to 1, over the rows.
    z, _ = over_positions(x.double())
    norm = (z - z.mean(1, keepdim=True)).norm(dim=1) + 1e-8
    spread = (1 + z.abs().amax(1) / norm).max().item()
    terms = (2 * spread * truth[0].sqrt().item() + spread**2 * torch.finfo(got[0].dtype).eps,)
    # Of many samples the largest error of the gradient is no luck.
    terms += (4 * spread / (norm.min().item() * len(x)) if len(x) < 31 else 0.0,)
    assert got[1].shape == x.shape and got[1].dtype == x.dtype
    assert got[0].dtype == torch.promote_types(x.dtype, torch.float32)
    for name, g, s, t, size in zip(("loss", "gradient"), got, same, truth, terms):
        assert g.isfinite().all(), f"{what} {name}"
        if s.isfinite().all():  # the deviation of large float16 features overflows there, not here
            assert_within_error_rule(g, s, t, f"{what} {name}", size)


def both_forms(x, target, impl):
    matched = wanted(x, target)
    yield with_gradient(lambda t: similarity_matching_loss(t, target, 0, matched, impl=impl), x)
    yield similarity_matching_loss_value_and_grad(x, target, 0, matched, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(7,), (6, 4, 4)])
def test_the_weight_of_the_loss_in_a_sum(shape, impl):
    x, target = torch.randn(9, *shape, dtype=torch.float64, requires_grad=True), labels("few", 9)
    expected = plain(x, target)
    gradient = torch.autograd.grad(expected, x)[0]
    for scale in (5.0, 0.0, 0.25):
        for factor, seed in ((1, ones(expected)), (3, torch.tensor(3.0, dtype=torch.float64))):
            loss = similarity_matching_loss(x, target, classes(target), grad_scale=scale, impl=impl)
            assert torch.allclose(loss, expected, rtol=1e-10)
            grad = torch.autograd.grad(loss, x, seed)[0]
            torch.testing.assert_close(grad, factor * scale * gradient, rtol=1e-8, atol=1e-13)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 31, 63, 127])
def test_ragged_sizes_and_both_forms(rows, shape, impl):
    torch.manual_seed(rows + shape[0])
    for dtype in DTYPES:
        for kind in LABELS:
            x, target = torch.randn(rows, *shape).to(dtype), labels(kind, rows)
            for got in both_forms(x, target, impl):
                check(got, x, target, f"{dtype} {kind}")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(127,), (16, 8, 8)])
def test_a_thousand_rows(shape, dtype, impl):
    torch.manual_seed(0)
    x, target = torch.randn(1000, *shape).to(dtype), labels("few", 1000)
    for got in both_forms(x, target, impl):
        check(got, x, target, str(dtype))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scale, shift", [(1e-3, 0.0), (1e4, 0.0), (1.0, 30.0)])
@pytest.mark.parametrize("shape", [(16,), (16, 8, 8), (16, 8)])
def test_large_small_and_shifted_features(shape, scale, shift, impl):
    torch.manual_seed(0)
    for dtype in DTYPES:
        x, target = (torch.randn(31, *shape) * scale + shift).to(dtype), labels("few", 31)
        for got in both_forms(x, target, impl):
            check(got, x, target, f"{dtype} {scale} {shift}")


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_both_ways_to_the_deviation(layout, on_cpu, monkeypatch):
    """The CPU has its own; the other devices' runs here too."""
    if not on_cpu:
        monkeypatch.setattr(MODULE, "_deviation_on_the_cpu", MODULE._deviation)
    torch.manual_seed(0)
    for rows in (3, 63):
        x, target = torch.randn(rows, 16, 9, 7).to(memory_format=layout), labels("few", rows)
        for got in both_forms(x, target, "aten"):
            check(got, x, target, f"{layout}")


@pytest.mark.parametrize("impl", IMPLS)
def test_gradient_keeps_the_layout(impl):
    x, target = torch.randn(5, 8, 4, 6).to(memory_format=torch.channels_last), labels("few", 5)
    for _, grad in both_forms(x, target, impl):
        assert grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(5,), (5, 3, 3), (4, 6)])
def test_dead_rows_and_channels(shape, impl):
    """No variance over positions, or over channels: the gradient is PyTorch's, and finite."""
    torch.manual_seed(0)
    x, target = torch.randn(5, *shape, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 2])
    x[1] = 0
    if len(shape) > 1:
        x[2].select(0 if len(shape) == 3 else 1, 1).fill_(0.25)
    expected = with_gradient(lambda t: plain(t, target), x)
    assert expected[1].isfinite().all()
    for got in both_forms(x, target, impl):
        for g, want in zip(got, expected):
            torch.testing.assert_close(g, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(3,), (8, 4, 4), (4, 6)])
def test_empty_batch(shape, impl):
    loss, grad = similarity_matching_loss_value_and_grad(torch.randn(0, *shape), torch.arange(0), 3, impl=impl)
    assert loss.isnan() and grad.shape == (0, *shape)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("shape", [(9,), (8, 3, 3), (3, 5)])
def test_shared_target_matrix(shape, kind, impl):
    torch.manual_seed(0)
    x, target = torch.randn(9, *shape), labels(kind, 9)
    shared = reference.target_similarity(target, 9)
    for form in (similarity_matching_loss_value_and_grad, value_and_gradient):
        expected = form(x, target, 9, impl=impl)
        for got, want in zip(form(x, target, 9, shared, impl=impl), expected):
            assert torch.equal(got, want)


def value_and_gradient(x, *args, **options):
    return with_gradient(lambda t: similarity_matching_loss(t, *args, **options), x)


@pytest.mark.parametrize("num_classes", [1, 2, 3, 10, 1000])
def test_similarity_of_two_classes(num_classes):
    """Of indices there are two numbers in the matrix."""
    target = torch.tensor([0, num_classes - 1, 0, num_classes - 1])
    expected = reference.target_similarity(target, num_classes, torch.float64)
    same, different = reference_module().class_similarity(num_classes)
    got = torch.where(target[:, None] == target[None], same, different)
    torch.testing.assert_close(got, expected.to(got.dtype), rtol=1e-6, atol=1e-9)
    for kind in (torch.int32, torch.uint8, torch.bool):
        if num_classes <= 2 or (kind != torch.bool and num_classes < 256):
            assert torch.equal(reference.target_similarity(target.to(kind), num_classes, torch.float64), expected)
            assert torch.equal(MODULE._matched(target.to(kind), num_classes, torch.float64), expected)


def reference_module():
    return sys.modules[reference.target_similarity.__module__]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("shape", [(6,), (4, 3, 2), (3, 5)])
def test_gradcheck(shape, kind, impl):
    torch.manual_seed(0)
    x, target = torch.randn(4, *shape, dtype=torch.float64, requires_grad=True), labels(kind, 4)
    assert torch.autograd.gradcheck(lambda t: similarity_matching_loss(t, target, CLASSES, impl=impl), x)


@pytest.mark.parametrize("shape", [(6,), (4, 3, 2), (3, 5)])
def test_the_specification_has_all_orders_and_its_closed_form(shape):
    torch.manual_seed(0)
    x, target = torch.randn(4, *shape, dtype=torch.float64, requires_grad=True), labels("few", 4)

    def loss(t):
        return reference.similarity_matching_loss(t, target, CLASSES)

    assert torch.autograd.gradcheck(loss, x) and torch.autograd.gradgradcheck(loss, x)
    value, grad = reference.similarity_matching_loss_value_and_grad(x.detach(), target, CLASSES, grad_scale=8.0)
    assert torch.equal(value, loss(x))
    torch.testing.assert_close(grad, torch.autograd.grad(loss(x) * 8, x)[0], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("shape", [(16,), (16, 8, 8)])
def test_the_reference_backend_gives_the_references_numbers(shape):
    torch.manual_seed(0)
    x, target = torch.randn(31, *shape), labels("few", 31)
    expected = reference.similarity_matching_loss_value_and_grad(x, target, CLASSES)
    with ops.backend("reference"):
        got = with_gradient(lambda t: similarity_matching_loss(t, target, CLASSES), x)
    assert all(torch.equal(g, e) for g, e in zip(got, expected))
    assert torch.equal(got[0], reference.similarity_matching_loss(x, target, CLASSES))
    assert ops.explain(similarity_matching_loss, x, target, CLASSES).chosen == "aten"


def test_second_derivative_is_refused():
    x = torch.randn(4, 3, requires_grad=True)
    loss = similarity_matching_loss(x, torch.tensor([0, 1, 0, 1]), 2)
    (grad,) = torch.autograd.grad(loss**2, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(6, 4), (8, 4, 6)])
def test_any_strides_and_the_input_is_left_alone(shape, impl):
    torch.manual_seed(0)
    x, target = torch.randn(9, *shape), labels("few", 9)
    expected = similarity_matching_loss_value_and_grad(x, target, CLASSES, impl=impl)
    others = [x.transpose(1, 2).contiguous().transpose(1, 2), torch.randn(18, *shape)[::2].copy_(x)]
    others.append(torch.stack([x, x], -1)[..., 0])
    for other in others:
        before = other.clone()
        for got, want in zip(similarity_matching_loss_value_and_grad(other, target, CLASSES, impl=impl), expected):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
        assert torch.equal(other, before)


@pytest.mark.parametrize("impl", IMPLS)
def test_loss_scale_and_float16(impl):
    """Gradients that float16 cannot hold unscaled come out right under a loss scale, in both forms."""
    torch.manual_seed(0)
    x, target, scale = (torch.randn(128, 16, 16, 16) * 100).half(), labels("few", 128), 2.0**16
    truth = with_gradient(lambda t: plain(t, target), x.double())[1] * scale
    unscaled = similarity_matching_loss_value_and_grad(x, target, 128, impl=impl)[1]
    assert (unscaled.double() * scale - truth).norm() > 5e-3 * truth.norm()
    scaled = with_gradient(lambda t: similarity_matching_loss(t, target, 128, impl=impl) * scale, x)[1]
    direct = similarity_matching_loss_value_and_grad(x, target, 128, grad_scale=scale, impl=impl)[1]
    for grad in (scaled, direct):
        assert (grad.double() - truth).norm() < 1e-3 * truth.norm()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(6,), (8, 3, 3)])
def test_autocast_changes_nothing(shape, impl):
    torch.manual_seed(0)
    x, target = torch.randn(9, *shape), labels("few", 9)
    expected = similarity_matching_loss_value_and_grad(x, target, CLASSES, impl=impl)
    specified = reference.similarity_matching_loss(x, target, CLASSES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = similarity_matching_loss_value_and_grad(x, target, CLASSES, impl=impl)
        assert torch.equal(reference.similarity_matching_loss(x, target, CLASSES), specified)
    assert all(torch.equal(g, e) for g, e in zip(got, expected))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(6,), (8, 3, 3), (3, 5)])
def test_poisoned_memory(shape, impl, monkeypatch):
    torch.manual_seed(0)
    for rows in (1, 9):
        x, target = torch.randn(rows, *shape), labels("few", rows)
        clean = list(both_forms(x, target, impl))
        with poisoned(monkeypatch):
            assert torch.empty(1).isnan()
            dirty = list(both_forms(x, target, impl))
        assert all(torch.equal(a, b) for c, d in zip(clean, dirty) for a, b in zip(c, d))


def call(shape, dtype, form, impl="aten", kind="matrix", rows=6):
    torch.manual_seed(0)
    target = labels("few" if kind == "matrix" else kind, rows)
    matched = reference.target_similarity(target, CLASSES, torch.promote_types(dtype, torch.float32))
    given = (None, matched) if kind == "matrix" else (target, None)
    return torch.randn(rows, *shape).to(dtype), *given, CLASSES, 2.0, form, impl


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", ["value", "grad", "parts"])
@pytest.mark.parametrize("shape", [(6,), (8, 3, 3), (3, 5)])
def test_opcheck(shape, form, impl):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        torch.library.opcheck(OPERATOR, call(shape, dtype, form, impl))
    if impl == "aten":
        torch.library.opcheck(OPERATOR, call(shape, torch.float32, form, impl, "few"))
        torch.library.opcheck(OPERATOR, call(shape, torch.float32, form, impl, "probabilities"))
    if len(shape) == 3:
        x, *rest = call(shape, torch.float32, form, impl)
        torch.library.opcheck(OPERATOR, (x.to(memory_format=torch.channels_last), *rest))


@pytest.mark.parametrize("shape", [(6,), (8, 3, 3), (3, 5)])
def test_compile_fullgraph_equals_eager(shape):
    torch.manual_seed(0)
    x, target = torch.randn(9, *shape, requires_grad=True), labels("few", 9)

    def forward(x, target):
        return similarity_matching_loss(x * 1.5, target, CLASSES)

    eager = forward(x, target)
    loss = torch.compile(forward, fullgraph=True, backend="aot_eager_decomp_partition")(x, target)
    assert torch.equal(loss, eager)
    assert torch.equal(torch.autograd.grad(loss, x)[0], torch.autograd.grad(eager, x)[0])
    compiled = torch.compile(similarity_matching_loss_value_and_grad, fullgraph=True, backend="aot_eager")
    args = (x.detach(), target, CLASSES)
    for got, want in zip(compiled(*args), similarity_matching_loss_value_and_grad(*args)):
        assert torch.equal(got, want)
    with ops.backend("native"), pytest.raises(BackendError, match="native"):
        compiled(*args)


@pytest.mark.parametrize("kind", ["matrix", "few", "probabilities"])
@pytest.mark.parametrize("form", ["value", "grad", "parts"])
@pytest.mark.parametrize("shape", [(6,), (8, 3, 3), (3, 5)])
def test_launches_where_triton_does_not_serve(shape, form, kind, monkeypatch):
    """Those of ATen on an accelerator, whose deviation is one kernel; and "aten" reads nothing back."""
    monkeypatch.setattr(MODULE, "_deviation_on_the_cpu", MODULE._deviation)
    wide = ((MODULE.WIDEST + 1,), (MODULE.WIDEST + 1, 2, 2), (2, MODULE.WIDEST + 1))[len(shape) % 3 - 1]
    for dtype, size in [(torch.float64, shape), (torch.float32, wide), (torch.bfloat16, wide)]:
        args = call(size, dtype, form, kind=kind)
        with LaunchCounter() as inside, Trace() as trace:
            MODULE._run(*args)
        assert not SYNCS & set(trace.names)
        with LaunchCounter() as outside:
            OPERATOR(*args)
        assert outside.total == inside.total == MODULE.launches(args, {}), (dtype, size)


@pytest.mark.parametrize("kind", ["matrix", "few", "probabilities"])
def test_launches_are_those_of_triton(kind):
    """Whoever serves. What tests/triton_kernels counts with the kernels; here that the counter is told."""
    small, large = (32, 32, 32), (33, 32, 32)
    for shape, count in [((6,), 3), ((2, 5), 3), (small, 3), (large, 4), ((1024, 32), 3), ((1025, 32), 4)]:
        for dtype in DTYPES:
            args = call(shape, dtype, "parts", kind=kind, rows=2)
            with LaunchCounter() as outside:
                OPERATOR(*args)
            assert outside.total == count
    for shape in ((6,), small, large):
        assert MODULE.launches(call(shape, torch.float32, "parts", kind=kind, rows=0), {}) == 1
    # No one stride leads through the positions, or through all of a sample.
    x, *rest = call((8, 6, 4), torch.float32, "parts", kind=kind)
    assert MODULE.launches((x.transpose(2, 3), *rest), {}) == 4 and MODULE.launches((x, *rest), {}) == 3
    assert MODULE.launches((x[:, :3].transpose(1, 2), *rest), {}) == 4


def test_what_it_saves_in_launches_and_bytes():
    torch.manual_seed(0)
    x, target = torch.randn(64, 16, requires_grad=True), labels("few", 64)
    matched = reference.target_similarity(target, CLASSES)
    counts = []
    for loss in (reference.similarity_matching_loss, similarity_matching_loss):
        x.grad = None
        with LaunchCounter() as launches, SavedBytes([x, matched]) as saved:
            loss(x, target, CLASSES, matched).backward()
        counts.append((launches.total, saved.peak))
    assert counts[1] == (5, 64 * 16 * 4)  # one [B, D], no [B, B]
    assert counts[0][0] >= 4 * counts[1][0] and counts[0][1] > 64 * 64 * 4 + counts[1][1]


@pytest.mark.parametrize("shape, launches", [((8, 5), 0), ((8, 5, 3, 3), 1)])
def test_a_seed_known_to_be_one_is_not_multiplied(shape, launches):
    x, target = torch.randn(shape, requires_grad=True), labels("few", 8)
    similarity_matching_loss(x, target, CLASSES).backward(torch.ones(()))
    expected, x.grad = x.grad, None
    loss = similarity_matching_loss(x, target, CLASSES)
    seed = ones(loss)
    with LaunchCounter() as counter:
        loss.backward(seed)
    assert counter.total == launches and torch.equal(x.grad, expected)


def test_of_a_map_the_centred_positions_and_a_factor_are_saved():
    for dtype in (torch.float32, torch.bfloat16):
        x, target = torch.randn(64, 8, 4, 4).to(dtype).requires_grad_(), labels("few", 64)
        with SavedBytes() as saved:
            loss = similarity_matching_loss(x, target, CLASSES)
        assert saved.peak == x.nbytes + 64 * 8 * 4 and loss.requires_grad


X, T = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(features=torch.zeros(4)), r"features has shape \[4\]"),
        (dict(features=torch.zeros(4, 3, dtype=torch.int64)), "torch.int64; give a floating-point"),
        (dict(features=torch.zeros(4, 3, 0, 2)), "a sample is empty"),
        (dict(target=torch.zeros(3, dtype=torch.int64)), r"target has shape \[3\]"),
        (dict(target=torch.zeros(4)), r"target has shape \[4\] and torch.float32"),
        (dict(target=torch.zeros(4, 2, device="meta")), "is on meta and features on cpu"),
        (dict(num_classes=0), "num_classes=0; give the number of classes"),
        (dict(matched=torch.zeros(3, 3)), r"shape \[3, 3\].*take \[4, 4\] in torch.float32"),
        (dict(matched=torch.zeros(4, 4).double()), "torch.float64; .*target_similarity"),
        (dict(matched=torch.zeros(4, 4, device="meta")), "is on meta and features on cpu"),
        (dict(impl="atem"), "impl='atem' is not a backend.*aten"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ArgumentError, match=message):
        similarity_matching_loss(**dict(features=X, target=T, num_classes=3) | change)
    with pytest.raises(BackendError, match="no such implementation"):
        similarity_matching_loss(X, T, 3, impl="native")


def test_why_triton_does_not_serve(monkeypatch):
    monkeypatch.setattr(MODULE._dispatch, "platform", lambda device: MODULE._dispatch.Platform("cuda", None))
    for shape in ((4096,), (4096, 2, 2), (2, 4096), (4096, 1, 1)):
        assert ops.explain(similarity_matching_loss, torch.zeros(4, *shape), T, 3).chosen == "triton"
    for x, why in (
        (X.double(), "float64"),
        (torch.zeros(4, 4097), "samples of 4097 numbers; beyond 4096"),
        (torch.zeros(4, 4097, 2, 2), "samples of 4097 numbers"),
        (torch.zeros(4, 64, 1, 65), "samples of 4160 numbers"),
    ):
        choice = ops.explain(similarity_matching_loss, x, T, 3)
        assert choice.chosen == "aten" and why in dict(choice.rejected)["triton"]
