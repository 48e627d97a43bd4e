import itertools
import sys

import pytest
import torch
import torch.nn.functional as F

from fastlocal import ops, reference
from fastlocal.blocks.measure import LaunchCounter, SavedBytes
from fastlocal.errors import ArgumentError, BackendError
from fastlocal.ops import norm_linear_cross_entropy, norm_linear_cross_entropy_value_and_grad
from tests.ops.cases import TARGETS
from tests.ops.classes import compare, correct_rows, loss_of, make_target, share
from tests.ops.losses import DTYPES, SYNCS, Trace, poisoned

IMPLS = ("aten", "reference")
OPERATOR = torch.ops.fastlocal.norm_linear_cross_entropy.default
MODULE = sys.modules["fastlocal.ops.norm_linear_cross_entropy"]
MATRIX = sys.modules["fastlocal.reference.norm_linear_cross_entropy"].matrix
BASES = ("weight", "sine", "square")


def make(rows, shape, classes, *, kind="index", dtype=torch.float32, basis="weight"):
    """Features, weight or frequencies, target, and the options for them."""
    x = torch.randn(rows, *shape).to(dtype)
    target, options = make_target(rows, classes, kind, dtype)
    if basis != "weight":
        return (x, reference.frequencies(classes), target), options | {"basis": basis}
    features = x.flatten(1).shape[1]
    return (x, (torch.randn(classes, features) / features**0.5).to(dtype), target), options


def plain(args, *, basis="weight", scale=1.0, normalize_weight=False, **options):
    """What a user writes, in the dtype of x: loss, correct, gradients of x and of the weight by autograd."""
    x, weight, target = args
    leaves = [x.detach().clone().requires_grad_()]
    flat = leaves[0].flatten(1)
    if basis == "weight":
        leaves.append(weight.detach().clone().requires_grad_())
        w = leaves[1]
    else:
        w = torch.sin((weight[:, None] * torch.arange(flat.shape[1], device=weight.device)).double())
        w = (w if basis == "sine" else w.sign()).to(x.dtype)
    unit = flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-12)
    if normalize_weight:
        w = w / w.norm(dim=1, keepdim=True).clamp(min=1e-12)
    logits = unit @ w.T * scale
    loss = loss_of(logits, target, **options)
    correct = correct_rows(logits, target, options.get("ignore_index", -100))
    return [loss.detach(), correct, *torch.autograd.grad(loss, leaves)]


def to_double(args, basis):
    x, weight, target = args
    return x.double(), weight.double() if basis == "weight" else weight, target


def value_and_grad(impl):
    return lambda *args, **options: norm_linear_cross_entropy_value_and_grad(*args, impl=impl, **options)


def through_autograd(impl, factor=1.0):
    def run(x, weight, target, **options):
        leaves = [x.detach().clone().requires_grad_()]
        if options.get("basis", "weight") == "weight":
            leaves.append(weight.detach().clone().requires_grad_())
        loss, correct = norm_linear_cross_entropy(*(*leaves, weight)[:2], target, impl=impl, **options)
        assert not correct.requires_grad
        return loss.detach(), correct, *torch.autograd.grad(loss * factor, leaves)

    return run


def check(run, args, what="", **options):
    basis = options.get("basis", "weight")
    x, weight, target = args
    got = [t for t in run(*args, **options) if t is not None]
    same, truth = plain(args, **options), plain(to_double(args, basis), **options)
    # What is summed. A probability is off by a rounding of its logit, and rows of equal features all alike.
    scale = options.get("scale", 1.0)
    flat = x.double().flatten(1)
    w = MATRIX(weight, basis, flat.shape[1], torch.float64)
    of_weight = 1.0
    if options.get("normalize_weight"):
        of_weight = 1 / w.norm(dim=1).clamp(min=1e-12).min().item()
        w = F.normalize(w, dim=1)
    length = flat.norm(dim=1).clamp(min=1e-12).min().item() if len(flat) else 1.0
    largest = scale * (F.normalize(flat, dim=1) @ w.T).abs().max().item() if len(flat) else 0.0
    part = 2 * scale * share(target, options.get("ignore_index", -100))
    terms = [largest, 0.0, (1 + largest) * part * w.abs().max().item() / length, (1 + largest) * scale * of_weight]
    terms = terms[: len(got)]
    exact = x.dtype in (torch.float32, torch.float64)
    compare(got, same, truth, terms, what, exact)
    assert got[2].dtype == x.dtype and got[2].shape == x.shape
    assert len(got) == 3 or got[3].dtype == weight.dtype
    return got


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("classes", [2, 10, 100, 1000])
@pytest.mark.parametrize("rows", [1, 3, 31, 63, 127])
def test_ragged_sizes(rows, classes, impl):
    shapes = [(1,), (63,), (7, 3, 3)] if classes < 1000 else [(31,)]
    for shape, dtype, kind in itertools.product(shapes, DTYPES, TARGETS):
        args, options = make(rows, shape, classes, kind=kind, dtype=dtype)
        check(value_and_grad(impl), args, f"{shape} {dtype} {kind}", scale=5.0, **options)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("normalize", [False, True])
def test_options_and_both_forms(normalize, basis, impl):
    for dtype, kind in itertools.product(DTYPES, TARGETS):
        args, options = make(9, (4, 4, 4), 7, kind=kind, dtype=dtype, basis=basis)
        for form in (value_and_grad(impl), through_autograd(impl)):
            check(form, args, f"{dtype} {kind}", scale=2.0, normalize_weight=normalize, **options)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_thousand_features_and_the_basis_of_lls(impl):
    args, options = make(31, (64, 4, 4), 100, basis="sine")
    assert torch.equal(args[1][[0, -1]], torch.tensor([50.0, 512.0]))
    basis = torch.sin(args[1][:, None] * torch.arange(1024.0))
    given = (args[0], basis, args[2])
    got, want = (value_and_grad(impl)(*a, scale=2.0, **o) for a, o in ((args, options), (given, {})))
    assert got[3] is None
    for g, w in zip(got[:3], want):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-8)
    check(value_and_grad(impl), args, scale=2.0, **options)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_loss_does_not_know_the_length_of_the_features(impl):
    args, _ = make(9, (6,), 5)
    loss = value_and_grad(impl)(*args)[0]
    for length in (1e-3, 1e3):
        torch.testing.assert_close(value_and_grad(impl)(args[0] * length, *args[1:])[0], loss)
    _, _, grad_x, _ = value_and_grad(impl)(*args)
    assert (grad_x * args[0]).sum(1).abs().max() < 1e-6  # so its gradient has no part along them


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("normalize", [False, True])
def test_rows_of_zeros_and_tiny_rows(normalize, impl):
    """F.normalize divides by 1e-12 where the norm is smaller, and the norm is a constant there."""
    args, _ = make(6, (4,), 3, dtype=torch.float64)
    args[0][1] = 0
    args[0][2] *= 1e-13
    args[1][1] = 0
    expected = reference.norm_linear_cross_entropy_value_and_grad(*args, normalize_weight=normalize)
    for got, want, also in zip(
        value_and_grad(impl)(*args, normalize_weight=normalize), expected, plain(args, normalize_weight=normalize)
    ):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(got, also.nan_to_num(), rtol=1e-9, atol=1e-12) if got.dim() < 2 else None


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=2)))
def test_partial_gradients(needs, impl):
    args, _ = make(6, (5,), 4)
    expected = plain(args)
    leaves = [t.clone().requires_grad_(need) for t, need in zip(args[:2], needs)]
    loss, correct = norm_linear_cross_entropy(*leaves, args[2], impl=impl)
    assert correct.item() == expected[1].item() and loss.requires_grad == any(needs)
    if any(needs):
        loss.backward()
    for leaf, need, grad in zip(leaves, needs, expected[2:]):
        assert (leaf.grad is not None) == need
        if need:
            torch.testing.assert_close(leaf.grad, grad)


def test_no_gradient_is_computed_without_need():
    args, _ = make(6, (5,), 4)
    none = OPERATOR(*args, "weight", 1.0, False, 0.0, -100, 1.0, [False] * 2, True, "auto")
    assert [t.numel() for t in none[2:]] == [0, 0]
    args[0].requires_grad_()
    with torch.no_grad():
        assert not norm_linear_cross_entropy(*args)[0].requires_grad


@pytest.mark.parametrize("impl", IMPLS)
def test_mixtures_are_weights(impl):
    """LLS-M and LLS-MxM: the gradient flows on through the weight."""
    args, _ = make(6, (5,), 4, basis="sine", dtype=torch.float64)
    basis = torch.sin(args[1][:, None] * torch.arange(5)).double()
    for shape in ((4,), (4, 4)):
        mix = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        weight = mix[:, None] * basis if mix.dim() == 1 else mix.T @ basis
        loss, _ = norm_linear_cross_entropy(args[0], weight, args[2], scale=2.0, impl=impl)
        projected = F.normalize(args[0], dim=1) @ basis.T
        expected = F.cross_entropy(2 * (projected * mix if mix.dim() == 1 else projected @ mix), args[2])
        torch.testing.assert_close(loss, expected)
        got, want = (torch.autograd.grad(t, mix)[0] for t in (loss, expected))
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("basis, normalize", [("weight", False), ("weight", True), ("sine", False)])
def test_gradcheck(basis, normalize, kind, impl):
    args, options = make(4, (3, 2), 5, kind=kind, dtype=torch.float64, basis=basis)
    leaves = [t.requires_grad_() for t in args[: 1 + (basis == "weight")]]

    def loss(x, weight=args[1]):
        return norm_linear_cross_entropy(
            x, weight, args[2], impl=impl, scale=2.0, normalize_weight=normalize, **options
        )[0]

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("normalize", [False, True])
def test_the_specification_has_all_orders_and_its_closed_form(normalize, kind):
    args, options = make(4, (3,), 5, kind=kind, dtype=torch.float64)
    options |= dict(normalize_weight=normalize, scale=3.0)
    leaves = [t.requires_grad_() for t in args[:2]]

    def loss(*leaves):
        return reference.norm_linear_cross_entropy(*leaves, args[2], **options)[0]

    assert torch.autograd.gradcheck(loss, leaves) and torch.autograd.gradgradcheck(loss, leaves)
    closed = reference.norm_linear_cross_entropy_value_and_grad(*args, grad_scale=8.0, **options)
    torch.testing.assert_close(closed[0], loss(*leaves), rtol=1e-14, atol=0)
    for got, grad in zip(closed[2:], torch.autograd.grad(loss(*leaves) * 8, leaves)):
        torch.testing.assert_close(got, grad, rtol=1e-12, atol=1e-15)


def test_second_derivative_is_refused():
    args, _ = make(4, (3,), 5)
    args[0].requires_grad_()
    (grad,) = torch.autograd.grad(norm_linear_cross_entropy(*args)[0] ** 2, args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rows", [0, 5])
def test_no_row_counts(rows, smoothing, impl):
    """Empty batch, or every target ignored: loss nan, gradients zero, as F.cross_entropy has them."""
    args, _ = make(rows, (3, 2), 4)
    args[2].fill_(-100)
    for form in (value_and_grad(impl), through_autograd(impl)):
        for normalize in (False, True):
            loss, correct, *grads = form(*args, label_smoothing=smoothing, normalize_weight=normalize)
            assert loss.isnan() and correct.item() == 0
            assert all(g.shape == t.shape and not g.any() for g, t in zip(grads, args))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", TARGETS)
def test_huge_logits(kind, impl):
    args, options = make(31, (4,), 10, kind=kind)
    # Unit vectors along an axis and whole numbers: the logits are exact, near 1e4 and far apart.
    x = torch.zeros(31, 4)
    x[torch.arange(31), torch.arange(31) % 4] = 2.0
    weight = torch.randint(-100, 100, (10, 4)).float() * 128
    check(value_and_grad(impl), (x, weight, args[2]), **options)


@pytest.mark.parametrize("impl", IMPLS)
def test_any_strides_and_the_input_is_left_alone(impl):
    (x, weight, target), _ = make(6, (4, 2, 3), 7)
    expected = value_and_grad(impl)(x, weight, target)

    def strided(t):
        out = torch.full([2 * s for s in t.shape], 77, dtype=t.dtype)[tuple(slice(None, None, 2) for _ in t.shape)]
        return out.copy_(t)

    for args in (
        [strided(t) for t in (x, weight, target)],
        [x.to(memory_format=torch.channels_last), weight.t().contiguous().t(), target],
        [x.transpose(0, 1).contiguous().transpose(0, 1), weight, target],
    ):
        before = [t.clone() for t in args]
        for form in (value_and_grad(impl), through_autograd(impl)):
            for got, want in zip(form(*args), expected):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
        assert all(torch.equal(a, b) for a, b in zip(args, before))


@pytest.mark.parametrize("impl", IMPLS)
def test_loss_scale_and_float16(impl):
    """Gradients that float16 cannot hold unscaled come out right under a loss scale, in both forms."""
    args, options = make(512, (64,), 1000, dtype=torch.float16)
    args = (args[0] * 16, *args[1:])
    factor = 2.0**16
    truth = plain(to_double(args, "weight"), **options)[2] * factor
    assert (value_and_grad(impl)(*args)[2].double() * factor - truth).norm() > 5e-3 * truth.norm()
    direct = norm_linear_cross_entropy_value_and_grad(*args, grad_scale=factor, impl=impl)[2]
    for grad in (through_autograd(impl, factor)(*args)[2], direct):
        assert (grad.double() - truth).norm() < 1e-3 * truth.norm()


@pytest.mark.parametrize("impl", IMPLS)
def test_mixed_dtypes_and_autocast(impl):
    """Half precision features with float32 parameters, as under autocast, which changes nothing."""
    args, _ = make(8, (6,), 5)
    args = (args[0].bfloat16(), *args[1:])
    expected = value_and_grad(impl)(*args)
    assert [t.dtype for t in expected] == [torch.float32, torch.int64, torch.bfloat16, torch.float32]
    truth = plain(to_double(args, "weight"))
    torch.testing.assert_close(expected[3].double(), truth[3], rtol=1e-4, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = through_autograd(impl)(*args)
        specified = reference.norm_linear_cross_entropy(*args)[0]
    assert all(torch.equal(g, e) and g.dtype == e.dtype for g, e in zip(got, expected))
    assert torch.equal(specified, reference.norm_linear_cross_entropy(*args)[0])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("basis", BASES)
def test_poisoned_memory(basis, kind, impl, monkeypatch):
    args, options = make(6, (5,), 4, kind=kind, basis=basis)
    clean = value_and_grad(impl)(*args, **options)
    with poisoned(monkeypatch):
        assert torch.empty(1).isnan()
        dirty = value_and_grad(impl)(*args, **options)
    assert all(a is b or torch.equal(a, b) for a, b in zip(clean, dirty))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "basis, kind, dtype, needs, wide",
    [
        ("weight", "index", torch.float32, (True, True), True),
        ("weight", "probabilities", torch.bfloat16, (True, True), False),
        ("sine", "ignored", torch.bfloat16, (True, False), False),
        ("square", "smoothed", torch.float64, (False, False), True),
        ("weight", "smoothed", torch.float64, (False, True), True),
    ],
)
def test_opcheck(basis, kind, dtype, needs, wide, impl):
    args, options = make(6, (3, 3), 4, kind=kind, dtype=dtype, basis=basis)
    smoothing, ignore = options.get("label_smoothing", 0.0), options.get("ignore_index", -100)
    call = (*args, basis, 2.0, wide, smoothing, ignore, 1.0, list(needs), wide, impl)
    torch.library.opcheck(OPERATOR, call)


def test_compile_fullgraph_equals_eager():
    args, options = make(6, (5,), 4, kind="smoothed")

    def forward(x, weight, target):
        return norm_linear_cross_entropy(x.relu() + 0.1, weight, target, normalize_weight=True, **options)

    leaves = [t.requires_grad_() for t in args[:2]]
    eager = forward(*args)
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager_decomp_partition")(*args)
    assert all(torch.equal(a, b) for a, b in zip(compiled, eager))
    for got, want in zip(torch.autograd.grad(compiled[0], leaves), torch.autograd.grad(eager[0], leaves)):
        assert torch.equal(got, want)
    with torch.no_grad():
        both = torch.compile(norm_linear_cross_entropy_value_and_grad, fullgraph=True, backend="aot_eager")
        for got, want in zip(both(*args), norm_linear_cross_entropy_value_and_grad(*args)):
            assert torch.equal(got, want)
    with ops.backend("native"), pytest.raises(BackendError, match="native"):
        both(*args)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", TARGETS)
def test_no_host_sync(kind, impl):
    args, options = make(6, (5,), 4, kind=kind)
    smoothing, ignore = options.get("label_smoothing", 0.0), options.get("ignore_index", -100)
    with Trace() as trace:
        MODULE._run(*args, "weight", 1.0, True, smoothing, ignore, 1.0, [True, True], True, impl)
    assert trace.names and not SYNCS & set(trace.names)


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_launches_are_those_that_the_counter_is_told(dtype, basis, kind):
    args, options = make(6, (5,), 4, kind=kind, dtype=dtype, basis=basis)
    smoothing, ignore = options.get("label_smoothing", 0.0), options.get("ignore_index", -100)
    for needs in ([True, basis == "weight"], [False, False]):
        call = (*args, basis, 2.0, True, smoothing, ignore, 1.0, needs, True, "aten")
        with LaunchCounter() as inside:
            MODULE._run(*call)
        with LaunchCounter() as outside:
            OPERATOR(*call)
        assert outside.total == MODULE.triton_launches(call, {}) <= inside.total - 4  # what Triton launches


def test_what_it_saves():
    """Neither the unit vectors nor the logits: one gradient of the features' size, and one of the weight's."""
    (x, weight, target), _ = make(64, (256,), 10)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    saved, launches = [], []
    for loss in (reference.norm_linear_cross_entropy, lambda *a: norm_linear_cross_entropy(*a, impl="aten")):
        with LaunchCounter() as counter, SavedBytes([*leaves, target]) as held:
            torch.autograd.grad(loss(*leaves, target)[0], leaves)
        saved.append(held.peak)
        launches.append(counter.total)
    assert saved[1] == (64 + 10) * 256 * 4
    assert launches[1] < launches[0]


X, W, T = torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(4)), r"x has shape \[4\]"),
        (dict(x=torch.zeros(4, 0)), "at least one feature"),
        (dict(weight=torch.zeros(5, 4)), r"weight has shape \[5, 4\]; x \[4, 3\] takes \[K, 3\]"),
        (dict(weight=W.double()), "float16, bfloat16 or float32 throughout, or float64"),
        (dict(basis="cosine"), "basis='cosine' is not one of 'weight', 'sine', 'square'"),
        (dict(basis="sine"), r"basis='sine' takes float32 frequencies \[K\]"),
        (dict(basis="sine", weight=torch.zeros(5, requires_grad=True)), "requires grad; there is none"),
        (dict(target=torch.zeros(3, dtype=torch.int64)), r"target has shape \[3\]; class indices .* are \[4\]"),
        (dict(target=T.int()), "target is torch.int32; give int64"),
        (dict(target=torch.zeros(4, 4)), r"probabilities for these features are \[4, 5\]"),
        (dict(target=torch.zeros(4, 5), ignore_index=1), "needs class indices"),
        (dict(target=torch.zeros(4, 5, requires_grad=True)), "target requires grad"),
        (dict(target=T.to("meta")), "target is on meta"),
        (dict(weight=W.to("meta")), "weight is on meta and x on cpu"),
        (dict(label_smoothing=1.5), "label_smoothing=1.5"),
        (dict(scale=0.0), "scale=0.0 is not above 0"),
        (dict(impl="atem"), "impl='atem' is not a backend.*aten"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ArgumentError, match=message):
        norm_linear_cross_entropy(**dict(x=X, weight=W, target=T) | change)
    with pytest.raises(BackendError, match="no such implementation"):
        norm_linear_cross_entropy(X, W, T, impl="native")
