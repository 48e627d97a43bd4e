import itertools
import sys

import pytest
import torch

from fastlocal import reference
from fastlocal.blocks.measure import LaunchCounter, SavedBytes, StorageTracker
from fastlocal.errors import ArgumentError, BackendError
from fastlocal.ops import class_goodness_cross_entropy, class_goodness_cross_entropy_value_and_grad
from tests.ops.cases import TARGETS
from tests.ops.classes import compare, correct_rows, loss_of, make_target, share
from tests.ops.losses import DTYPES, SYNCS, Trace, poisoned

IMPLS = ("aten", "reference")
OPERATOR = torch.ops.fastlocal.class_goodness_cross_entropy.default
BACKWARD = torch.ops.fastlocal.class_goodness_cross_entropy_backward.default
MODULE = sys.modules["fastlocal.ops.class_goodness_cross_entropy"]
FORMS = ("groups", "weight", "weight and bias")


def make(rows, channels, spatial, classes, *, form="weight and bias", kind="index", dtype=torch.float32, last=False):
    """Features, weight, bias and target, and the options for them."""
    x = torch.randn(rows, channels, *spatial).to(dtype)
    if last:
        x = x.to(memory_format=torch.channels_last)
    target, options = make_target(rows, classes, kind, dtype)
    if form == "groups":
        return (x, None, None, target), options | {"num_classes": classes}
    weight = (torch.randn(classes, channels) / channels**0.5).to(dtype)
    return (x, weight, torch.randn(classes).to(dtype) if form != "weight" else None, target), options


def scores_of(x, weight, bias, classes):
    """The goodness of each class by the map of a 1x1 convolution, in the dtype of x."""
    x = x.flatten(2) if x.dim() > 2 else x[..., None]
    if weight is None:
        return x.unflatten(1, (classes, -1)).square().mean((2, 3))
    return torch.nn.functional.conv1d(x, weight[..., None], bias).square().mean(2)


def plain(args, *, num_classes=None, scale=1.0, margin=0.0, **options):
    """What a user writes, in the dtype of x: loss, correct, and gradients by autograd."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in args[:3]]
    target = args[3]
    g = scores_of(*leaves, num_classes)
    logits = g * scale
    if margin:
        rows = torch.arange(len(target), device=target.device)[target != options.get("ignore_index", -100)]
        logits = logits.index_put((rows, target[rows]), logits.new_tensor(-margin), accumulate=True)
    loss = loss_of(logits, target, **options)
    correct = correct_rows(g, target, options.get("ignore_index", -100))
    return [loss.detach(), correct, *torch.autograd.grad(loss, [t for t in leaves if t is not None])]


def to_double(args):
    return tuple(t.double() if t is not None and t.is_floating_point() else t for t in args)


def value_and_grad(impl):
    return lambda *args, **options: class_goodness_cross_entropy_value_and_grad(*args, impl=impl, **options)


def through_autograd(impl, factor=1.0):
    def run(*args, **options):
        leaves = [None if t is None else t.detach().clone().requires_grad_() for t in args[:3]]
        loss, correct = class_goodness_cross_entropy(*leaves, args[3], impl=impl, **options)
        assert not correct.requires_grad
        return loss.detach(), correct, *torch.autograd.grad(loss * factor, [t for t in leaves if t is not None])

    return run


def check(run, args, what="", **options):
    got = [t for t in run(*args, **options) if t is not None]
    same, truth = plain(args, **options), plain(to_double(args), **options)
    x, weight, bias, target = to_double(args)
    # What is summed. A probability is off by a rounding of its logit; that of a Gram form is a sum of larger terms.
    flat = x.flatten(2) if x.dim() > 2 else x[..., None]
    scale = options.get("scale", 1.0)
    part = 2 * scale * share(target, options.get("ignore_index", -100))
    size = lambda t: t.abs().max().item() if t is not None and t.numel() else 0.0  # noqa: E731
    if weight is None:
        largest = size(scores_of(x, None, None, options["num_classes"])) if len(x) else 0.0
        groups = flat[:1].numel() / options["num_classes"] if len(x) else 1.0
        terms = [scale * largest, 0.0, part * 2 * size(x) / groups]
    else:
        rms = flat.square().mean(2).sum(1).sqrt() if len(x) else flat.new_zeros(1)  # of a whole position
        mapped = (rms.max() * weight.norm(dim=1).max()).item() + size(bias)
        largest = mapped**2
        terms = [scale * largest, 0.0, part * 4 * mapped * weight.norm(dim=1).max().item() / flat.shape[2]]
        terms += [2 * scale * 2 * mapped * rms.max().item(), 2 * scale * 2 * mapped]
    terms = [2 * terms[0], 0.0, *((1 + scale * largest) * t for t in terms[2:])][: len(got)]
    compare(got, same, truth, terms, what, x.dtype in (torch.float32, torch.float64) and args[0].dtype == torch.float32)
    for g, t in zip(got[2:], [t for t in args[:3] if t is not None]):
        assert g.dtype == t.dtype and g.shape == t.shape
    return got


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [1, 3, 31, 63])
def test_ragged_sizes(rows, form, impl):
    for (side, channels), classes, dtype in itertools.product(
        [(1, 31), (7, 16), (7, 127), (32, 3)], (2, 10, 100), DTYPES
    ):
        if rows * side > 31 * 7:
            continue
        if form == "groups":
            channels = classes * {1: 3, 7: 1, 32: 1}[side]
        kind = TARGETS[(rows + classes + side) % 4]
        last = rows in (3, 63)
        args, options = make(rows, channels, (side, side), classes, form=form, kind=kind, dtype=dtype, last=last)
        got = check(value_and_grad(impl), args, f"{side} {channels} {classes} {dtype} {kind}", **options)
        assert got[2].stride() == torch.empty_like(args[0]).stride()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_thousand_classes_and_many_positions(impl):
    for rows, channels, side, classes in ((3, 16, 7, 1000), (2, 8, 56, 10), (2, 1000, 1, 1000)):
        form = "groups" if channels == classes else "weight and bias"
        args, options = make(rows, channels, (side, side), classes, form=form)
        check(value_and_grad(impl), args, f"{classes}", **options)


def test_the_smaller_form_is_taken():
    assert MODULE.uses_gram(16, 1024, 100) and MODULE.uses_gram(64, 3136, 1000)
    assert not MODULE.uses_gram(512, 16, 10) and not MODULE.uses_gram(64, 1, 1000)


@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("last", [False, True])
def test_gram_and_map(last, kind, gram, monkeypatch):
    """Both forms give the same, whichever would be taken."""
    monkeypatch.setattr(MODULE, "uses_gram", lambda *_: gram)
    for form in FORMS[1:]:
        args, options = make(9, 8, (5, 3), 6, form=form, kind=kind, last=last)
        for run in (value_and_grad("aten"), through_autograd("aten")):
            check(run, args, form, scale=2.0, **options)
        wide = to_double(args)
        for got, want in zip(
            value_and_grad("aten")(*wide, **options),
            reference.class_goodness_cross_entropy_value_and_grad(*wide, **options),
        ):
            assert got is want or torch.allclose(got, want, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("spatial", [(), (6,), (2, 3), (2, 3, 2)])
def test_options_and_both_forms(spatial, form, impl):
    for dtype, kind in itertools.product(DTYPES, TARGETS):
        args, options = make(9, 8, spatial, 4, form=form, kind=kind, dtype=dtype)
        margin = 0.0 if kind == "probabilities" else 0.5
        for run in (value_and_grad(impl), through_autograd(impl)):
            check(run, args, f"{dtype} {kind}", scale=2.0, margin=margin, **options)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3)))
def test_partial_gradients(needs, form, impl):
    args, options = make(6, 8, (3, 3), 4, form=form)
    expected = dict(zip([i for i in range(3) if args[i] is not None], plain(args, **options)[2:]))
    leaves = [None if t is None else t.clone().requires_grad_(need) for t, need in zip(args[:3], needs)]
    loss, _ = class_goodness_cross_entropy(*leaves, args[3], impl=impl, **options)
    wanted = [need and t is not None for need, t in zip(needs, leaves)]
    assert loss.requires_grad == any(wanted)
    if any(wanted):
        loss.backward()
    for i, (leaf, need) in enumerate(zip(leaves, wanted)):
        assert (leaf is not None and leaf.grad is not None) == need
        if need:
            torch.testing.assert_close(leaf.grad, expected[i])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form, kind, impl):
    for classes, channels in ((2, 2), (6, 2)) if form != "groups" else ((2, 4),):  # the map, the Gram form
        args, options = make(3, channels, (4, 2), classes, form=form, kind=kind, dtype=torch.float64)
        leaves = [t.requires_grad_() for t in args[:3] if t is not None]

        def loss(*leaves, args=args, options=options):
            return class_goodness_cross_entropy(*(*leaves, None, None)[:3], args[3], impl=impl, scale=2.0, **options)[0]

        assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("form", FORMS)
def test_the_specification_has_all_orders_and_its_closed_form(form, kind):
    args, options = make(3, 4, (2, 2), 2, form=form, kind=kind, dtype=torch.float64)
    options |= dict(scale=3.0, margin=0.0 if kind == "probabilities" else 0.5)
    leaves = [t.requires_grad_() for t in args[:3] if t is not None]

    def loss(*leaves):
        return reference.class_goodness_cross_entropy(*(*leaves, None, None)[:3], args[3], **options)[0]

    assert torch.autograd.gradcheck(loss, leaves) and torch.autograd.gradgradcheck(loss, leaves)
    closed = reference.class_goodness_cross_entropy_value_and_grad(*args, grad_scale=8.0, **options)
    torch.testing.assert_close(closed[0], loss(*leaves), rtol=1e-14, atol=0)
    for got, grad in zip(closed[2:], torch.autograd.grad(loss(*leaves) * 8, leaves)):
        torch.testing.assert_close(got, grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("impl", IMPLS)
def test_margin_is_taken_off_the_targets_logit(impl):
    """With equal goodness the loss is log(1 + (K - 1) e^margin), and no class is right but the first."""
    x, target = torch.ones(4, 6), torch.tensor([0, 1, 2, -100])
    loss, correct = class_goodness_cross_entropy(x, None, None, target, num_classes=3, margin=0.7, impl=impl)
    torch.testing.assert_close(loss, torch.log1p(2 * torch.tensor(0.7).exp()))
    assert correct == 1


def test_second_derivative_is_refused():
    args, options = make(4, 4, (2, 2), 2)
    args[0].requires_grad_()
    loss = class_goodness_cross_entropy(*args, **options)[0]
    (grad,) = torch.autograd.grad(loss**2, args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows, smoothing", [(0, 0.0), (5, 0.0), (5, 0.1)])
def test_no_row_counts(rows, smoothing, form, impl):
    """Empty batch, or every target ignored: loss nan, gradients zero, as F.cross_entropy has them."""
    for classes, channels in ((2, 4), (8, 8)):
        args, options = make(rows, channels, (2, 2), classes, form=form)
        args[3].fill_(-100)
        for run in (value_and_grad(impl), through_autograd(impl)):
            loss, correct, *grads = run(*args, label_smoothing=smoothing, margin=0.5, **options)
            assert loss.isnan() and correct.item() == 0
            for grad, like in zip([g for g in grads if g is not None], args):
                assert grad.shape == like.shape and not grad.any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("form", FORMS)
def test_huge_logits(form, kind, impl):
    args, options = make(31, 10, (4, 4), 10, form=form, kind=kind)
    # Whole numbers: the goodness is exact in every order of summation, near 1e4 and far apart.
    whole = [torch.randint(-9, 9, t.shape).float() if t is not None else None for t in args[:3]]
    whole[0] *= 32 if form == "groups" else 4
    assert scores_of(*whole, 10).max() > 1e4
    check(value_and_grad(impl), (*whole, args[3]), **options)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("classes", [2, 8])
def test_any_strides_and_the_input_is_left_alone(classes, form, impl):
    (x, weight, bias, target), options = make(6, 8, (4, 6), classes, form=form)
    expected = value_and_grad(impl)(x, weight, bias, target, **options)

    def strided(t):
        if t is None:
            return None
        out = torch.full([2 * s for s in t.shape], 77, dtype=t.dtype)[tuple(slice(None, None, 2) for _ in t.shape)]
        return out.copy_(t)

    for args in (
        [strided(t) for t in (x, weight, bias, target)],
        [
            x.to(memory_format=torch.channels_last),
            None if weight is None else weight.t().contiguous().t(),
            bias,
            target,
        ],
        [x.transpose(2, 3).contiguous().transpose(2, 3), weight, bias, target],
        [x.transpose(0, 1).contiguous().transpose(0, 1), weight, bias, target],
    ):
        before = [None if t is None else t.clone() for t in args]
        for run in (value_and_grad(impl), through_autograd(impl)):
            got = [t for t in run(*args, **options) if t is not None]
            for g, want in zip(got, [t for t in expected if t is not None]):
                torch.testing.assert_close(g, want, rtol=1e-4, atol=1e-6)
        assert all(a is b or torch.equal(a, b) for a, b in zip(args, before))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", FORMS)
def test_loss_scale_and_float16(form, impl):
    """Gradients that float16 cannot hold unscaled come out right under a loss scale, in both forms."""
    args, options = make(64, 10, (32, 32), 10, form=form, dtype=torch.float16)
    args = (args[0] / 64, args[1], None if args[2] is None else args[2] / 64, args[3])
    factor = 2.0**16
    truth = plain(to_double(args), **options)[2] * factor
    assert (value_and_grad(impl)(*args, **options)[2].double() * factor - truth).norm() > 5e-3 * truth.norm()
    direct = class_goodness_cross_entropy_value_and_grad(*args, grad_scale=factor, impl=impl, **options)
    for grads in (through_autograd(impl, factor)(*args, **options), direct):
        assert (grads[2].double() - truth).norm() < 1e-3 * truth.norm()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", FORMS)
def test_mixed_dtypes_and_autocast(form, impl):
    """Half precision features with float32 parameters, as under autocast, which changes nothing."""
    for classes in (2, 8):
        args, options = make(8, 8, (4, 4), classes, form=form)
        args = (args[0].bfloat16(), *args[1:])
        expected = [t for t in value_and_grad(impl)(*args, **options) if t is not None]
        assert [t.dtype for t in expected[2:]] == [t.dtype for t in args[:3] if t is not None]
        for got, want in zip(expected[3:], plain(to_double(args), **options)[3:]):
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = through_autograd(impl)(*args, **options)
            specified = reference.class_goodness_cross_entropy(*args, **options)[0]
        assert all(torch.equal(g, e) and g.dtype == e.dtype for g, e in zip(got, expected))
        assert torch.equal(specified, reference.class_goodness_cross_entropy(*args, **options)[0])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("form", FORMS)
def test_poisoned_memory(form, kind, impl, monkeypatch):
    for classes in (2, 8):
        args, options = make(6, 8, (3, 3), classes, form=form, kind=kind)
        clean = value_and_grad(impl)(*args, **options)
        with poisoned(monkeypatch):
            assert torch.empty(1).isnan()
            dirty = value_and_grad(impl)(*args, **options)
        assert all(a is b or torch.equal(a, b) for a, b in zip(clean, dirty))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "form, classes, kind, dtype, needs, wide, last",
    [
        ("groups", 4, "index", torch.float32, (True, False, False), True, False),
        ("groups", 4, "probabilities", torch.bfloat16, (True, False, False), False, True),
        ("weight", 2, "ignored", torch.bfloat16, (True, True, False), False, True),
        ("weight and bias", 8, "smoothed", torch.float64, (True, True, True), True, True),
        ("weight and bias", 2, "smoothed", torch.float32, (False, False, True), False, False),
        ("weight", 8, "index", torch.float32, (False, False, False), True, False),
    ],
)
def test_opcheck(form, classes, kind, dtype, needs, wide, last, impl):
    args, options = make(6, 8, (3, 3), classes, form=form, kind=kind, dtype=dtype, last=last)
    smoothing, ignore = options.get("label_smoothing", 0.0), options.get("ignore_index", -100)
    call = (*args, classes, 2.0, 0.0, smoothing, ignore, 1.0, list(needs), wide, impl)
    torch.library.opcheck(OPERATOR, call)
    factor = torch.randn(6, classes, dtype=torch.promote_types(dtype, torch.float32))
    for grad_loss in (None, factor[0, 0].clone()):
        torch.library.opcheck(BACKWARD, (*args[:3], factor, grad_loss, impl))


@pytest.mark.parametrize("form", FORMS)
def test_compile_fullgraph_equals_eager(form):
    args, options = make(6, 8, (3, 3), 4, form=form, kind="smoothed")

    def forward(x, weight, bias, target):
        return class_goodness_cross_entropy(x.relu(), weight, bias, target, margin=0.1, **options)

    leaves = [t.requires_grad_() for t in args[:3] if t is not None]
    eager = forward(*args)
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager_decomp_partition")(*args)
    assert all(torch.equal(a, b) for a, b in zip(compiled, eager))
    for got, want in zip(torch.autograd.grad(compiled[0], leaves), torch.autograd.grad(eager[0], leaves)):
        assert torch.equal(got, want)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("form", FORMS)
def test_no_host_sync(form, kind, impl):
    args, options = make(6, 8, (3, 3), 4, form=form, kind=kind)
    smoothing, ignore = options.get("label_smoothing", 0.0), options.get("ignore_index", -100)
    margin = 0.0 if kind == "probabilities" else 0.5
    needs = [True, *(t is not None for t in args[1:3])]
    with Trace() as trace:
        factor = MODULE._run(*args, 4, 1.0, margin, smoothing, ignore, 1.0, needs, True, impl)[2]
        MODULE._run_backward(*args[:3], factor, torch.ones(()), impl)
    assert trace.names and not SYNCS & set(trace.names)


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("classes", [2, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_launches_are_those_that_the_counter_is_told(dtype, classes, form, kind):
    args, options = make(6, 8, (3, 3), classes, form=form, kind=kind, dtype=dtype)
    smoothing, ignore = options.get("label_smoothing", 0.0), options.get("ignore_index", -100)
    for needs in ([True, *(t is not None for t in args[1:3])], [False] * 3):
        call = (*args, classes, 1.0, 0.0, smoothing, ignore, 1.0, needs, True, "aten")
        with LaunchCounter() as inside:
            MODULE._run(*call)
        with LaunchCounter() as outside:
            OPERATOR(*call)
        # What Triton launches, whichever backend serves.
        assert outside.total == MODULE.triton_launches(call, {}) <= inside.total - 4
    factor = torch.randn(6, classes)
    for grad_loss in (None, torch.ones(())):
        call = (*args[:3], factor, grad_loss, "aten")
        with LaunchCounter() as inside:
            MODULE._run_backward(*call)
        with LaunchCounter() as outside:
            BACKWARD(*call)
        assert outside.total == inside.total == MODULE.triton_backward_launches(call, {}) > 0


@pytest.mark.parametrize("form", FORMS)
def test_what_it_saves(form):
    """The features and one number for each sample and class: no map, neither kept nor, by the Gram form, made."""
    (x, weight, bias, target), options = make(8, 20, (32, 32), 100 if form != "groups" else 20, form=form)
    leaves = [t.requires_grad_() for t in (x, weight, bias) if t is not None]
    classes = options.get("num_classes", 100)
    saved, launches, peaks = [], [], []
    for run in (
        reference.class_goodness_cross_entropy,
        lambda *a, **o: class_goodness_cross_entropy(*a, impl="aten", **o),
    ):
        with LaunchCounter() as counter, SavedBytes([*leaves, target]) as held, StorageTracker() as storage:
            torch.autograd.grad(run(x, weight, bias, target, **options)[0], leaves)
        saved.append(held.peak)
        launches.append(counter.total)
        peaks.append(storage.peak)
    own = (8 * classes + (classes * 20 if weight is not None else 0) + (classes if bias is not None else 0)) * 4
    assert saved[1] == own < saved[0] / 2 or (form == "groups" and saved[1] == own <= saved[0])
    if form != "groups":
        assert peaks[1] < 8 * 100 * 32 * 32 * 4 < peaks[0]
    else:
        assert launches[1] < launches[0]


X, W, T = torch.zeros(4, 6, 2, 2), torch.zeros(5, 6), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(4)), r"x has shape \[4\]"),
        (dict(x=torch.zeros(4, 6, 0)), "with a channel and a position"),
        (dict(weight=torch.zeros(5, 4)), r"weight has shape \[5, 4\]; x \[4, 6, 2, 2\] takes \[K, 6\]"),
        (dict(weight=None), "num_classes=None: without a weight the 6 channels"),
        (dict(weight=None, num_classes=4), "num_classes=4"),
        (dict(weight=None, bias=torch.zeros(3), num_classes=3), "bias without a weight"),
        (dict(num_classes=3), "num_classes=3, but weight"),
        (dict(bias=torch.zeros(4)), r"bias has shape \[4\]"),
        (dict(weight=W.double()), "float16, bfloat16 or float32 throughout, or float64"),
        (dict(target=torch.zeros(3, dtype=torch.int64)), r"target has shape \[3\]; class indices .* are \[4\]"),
        (dict(target=T.int()), "target is torch.int32; give int64"),
        (dict(target=torch.zeros(4, 4)), r"probabilities for these features are \[4, 5\]"),
        (dict(target=torch.zeros(4, 5), ignore_index=1), "needs class indices"),
        (dict(target=torch.zeros(4, 5), margin=0.5), "margin=0.5 needs class indices"),
        (dict(target=T.to("meta")), "target is on meta"),
        (dict(weight=W.to("meta")), "weight is on meta and x on cpu"),
        (dict(label_smoothing=1.5), "label_smoothing=1.5"),
        (dict(scale=0.0), "scale=0.0 is not above 0"),
        (dict(impl="atem"), "impl='atem' is not a backend.*aten"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ArgumentError, match=message):
        class_goodness_cross_entropy(**dict(x=X, weight=W, bias=None, target=T) | change)
    with pytest.raises(BackendError, match="no such implementation"):
        class_goodness_cross_entropy(X, W, None, T, impl="native")
