import sys

import pytest
import torch
import torch.nn.functional as F

from fastlocal import ops, reference
from fastlocal.blocks.measure import LaunchCounter, SavedBytes
from fastlocal.errors import ArgumentError, BackendError
from fastlocal.ops import reconstruction_loss, reconstruction_loss_value_and_grad
from tests.ops.cases import assert_within_error_rule
from tests.ops.losses import DTYPES, SYNCS, Trace, poisoned, with_gradient

IMPLS = ("aten", "reference")
OPERATOR = torch.ops.fastlocal.reconstruction_loss.default
BACKWARD = torch.ops.fastlocal.reconstruction_loss_backward.default
MODULE = sys.modules["fastlocal.ops.reconstruction_loss"]
SHAPES = [(1,), (3,), (31,), (63,), (127, 3), (1000,), (1, 3, 1, 1), (3, 3, 7, 7), (2, 3, 32, 32), (2, 3, 56, 56)]


def plain(logits, image):
    """What a user writes: in float32 at least, for in float16 the gradient is nan where the sigmoid rounds to 1."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.binary_cross_entropy(torch.sigmoid(wide), image.to(wide.dtype))


def make(shape, dtype=torch.float32, size=2.0, channels_last=False):
    logits, image = (torch.randn(shape) * size).to(dtype), torch.rand(shape)
    if channels_last:
        logits, image = (t.to(memory_format=torch.channels_last) for t in (logits, image))
    return logits, image


def through_autograd(impl, scale=1.0):
    def run(logits, image):
        leaf = logits.detach().clone().requires_grad_()
        loss = reconstruction_loss(leaf, image, impl=impl)
        return loss.detach(), torch.autograd.grad(loss * scale, leaf)[0]

    return run


def value_and_grad(impl):
    return lambda logits, image, **options: reconstruction_loss_value_and_grad(logits, image, impl=impl, **options)


def check(run, logits, image, what=""):
    got = run(logits, image)
    same = with_gradient(lambda t: plain(t, image), logits)
    truth = with_gradient(lambda t: plain(t, image), logits.double())
    assert got[0].dtype == torch.promote_types(logits.dtype, torch.float32) and got[1].dtype == logits.dtype
    # The largest term of the gradient is a difference of two numbers in [0, 1].
    for name, g, s, t, size in zip(("loss", "gradient"), got, same, truth, (0.0, 1 / max(1, logits.numel()))):
        assert_within_error_rule(g, s, t, f"{what} {name}", size)
    return got


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ragged_sizes_and_both_forms(shape, impl):
    for dtype in DTYPES:
        for last in (False, True) if len(shape) == 4 else (False,):
            logits, image = make(shape, dtype, 2.0, last)
            for form in (value_and_grad(impl), through_autograd(impl)):
                got = check(form, logits, image, f"{dtype} {last}")
                assert got[1].is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@pytest.mark.parametrize("impl", [None, *IMPLS])
def test_the_weight_of_the_loss_in_a_sum(impl):
    logits, image = make((2, 3, 5, 5), torch.float64)
    leaf = logits.requires_grad_()
    wanted = torch.autograd.grad(plain(leaf, image.double()), leaf)[0]
    for scale in (5.0, 0.0, 0.25):
        loss = reconstruction_loss(leaf, image, grad_scale=scale, impl=impl)
        assert torch.allclose(loss, plain(leaf, image.double()), rtol=1e-14)
        torch.testing.assert_close(torch.autograd.grad(loss * 3, leaf)[0], 3 * scale * wanted, rtol=1e-12, atol=1e-18)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_the_sigmoid_saturates(dtype, impl):
    """The loss has PyTorch's bound of 100, and the gradient vanishes, as plain PyTorch in this dtype has it."""
    logits = torch.tensor([0.3, -2.0, 13.0, -13.0, 25.0, -25.0, 40.0, -40.0, 85.0, -85.0, 1e4, -1e4], dtype=dtype)
    for image in (torch.zeros(12), torch.ones(12), torch.linspace(0, 1, 12)):
        image = image.to(dtype)
        expected = with_gradient(lambda t, image=image: plain(t, image), logits)
        for form in (value_and_grad(impl), through_autograd(impl)):
            loss, grad = form(logits, image)
            torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=0)
            torch.testing.assert_close(grad, expected[1], rtol=1e-5, atol=1e-7 if dtype == torch.float32 else 1e-15)
            assert not grad[-2:].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_targets_of_zero_and_one_and_nothing(impl):
    logits, _ = make((31, 3))
    check(value_and_grad(impl), logits, (torch.rand(31, 3) > 0.5).float())
    loss, grad = value_and_grad(impl)(logits[:0], logits[:0])
    assert loss.isnan() and grad.shape == (0, 3)
    assert through_autograd(impl)(logits[:0], logits[:0])[1].shape == (0, 3)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradcheck(impl):
    logits, image = make((4, 3), torch.float64)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda t: reconstruction_loss(t, image, impl=impl), logits)


def test_the_specification_has_all_orders_and_its_closed_form():
    logits, image = make((4, 3), torch.float64)
    logits.requires_grad_()
    image = image.double()

    def loss(t):
        return reference.reconstruction_loss(t, image)

    assert torch.autograd.gradcheck(loss, logits) and torch.autograd.gradgradcheck(loss, logits)
    value, grad = reference.reconstruction_loss_value_and_grad(logits.detach(), image, grad_scale=8.0)
    assert torch.equal(value, loss(logits).detach())
    torch.testing.assert_close(grad, torch.autograd.grad(loss(logits) * 8, logits)[0], rtol=1e-12, atol=1e-15)


def test_the_reference_backend_gives_the_references_numbers():
    logits, image = make((31, 16))
    expected = with_gradient(lambda t: reference.reconstruction_loss(t, image), logits)
    with ops.backend("reference"):
        for form in (value_and_grad(None), through_autograd(None)):
            assert all(torch.equal(g, e) for g, e in zip(form(logits, image), expected))


def test_second_derivative_is_refused_where_one_operator_serves():
    logits, image = make((4, 3))
    logits.requires_grad_()
    (grad,) = torch.autograd.grad(reconstruction_loss(logits, image, impl="aten") ** 2, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
def test_any_strides_and_the_input_is_left_alone(impl):
    logits, image = make((6, 4, 3, 5))
    expected = value_and_grad(impl)(logits, image)
    others = [
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        lambda t: torch.randn(12, 8, 3, 10)[::2, ::2, :, ::2].copy_(t),
        lambda t: t,
    ]
    for strided in others:
        for also in others:
            a, b = strided(logits), also(image)
            before = a.clone(), b.clone()
            for form in (value_and_grad(impl), through_autograd(impl)):
                for got, want in zip(form(a, b), expected):
                    torch.testing.assert_close(got, want)
            assert torch.equal(a, before[0]) and torch.equal(b, before[1])


@pytest.mark.parametrize("impl", IMPLS)
def test_loss_scale_and_float16(impl):
    """Gradients that float16 cannot hold unscaled come out right under a loss scale, in both forms."""
    logits, image = make((128, 3, 32, 32), torch.float16)
    scale = 2.0**16
    truth = with_gradient(lambda t: plain(t, image), logits.double())[1] * scale
    assert (value_and_grad(impl)(logits, image)[1].double() * scale - truth).norm() > 5e-3 * truth.norm()
    direct = reconstruction_loss_value_and_grad(logits, image, grad_scale=scale, impl=impl)[1]
    for grad in (through_autograd(impl, scale)(logits, image)[1], direct):
        assert (grad.double() - truth).norm() < 1e-3 * truth.norm()


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_changes_nothing(impl):
    logits, image = make((9, 6))
    expected = value_and_grad(impl)(logits, image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = through_autograd(impl)(logits, image)
    assert all(torch.equal(g, e) and g.dtype == e.dtype for g, e in zip(got, expected))


@pytest.mark.parametrize("impl", IMPLS)
def test_poisoned_memory(impl, monkeypatch):
    for dtype in (torch.float32, torch.float16):
        logits, image = make((6, 4, 3, 5), dtype)
        clean = value_and_grad(impl)(logits, image)
        with poisoned(monkeypatch):
            assert torch.empty(1).isnan()
            dirty = value_and_grad(impl)(logits, image)
        assert all(torch.equal(a, b) for a, b in zip(clean, dirty))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(dtype, impl):
    for last in (False, True):
        logits, image = make((4, 3, 2, 5), dtype, 1.0, last)
        torch.library.opcheck(OPERATOR, (logits, image, impl))
        for grad_loss in (None, torch.tensor(3.0, dtype=torch.promote_types(dtype, torch.float32))):
            torch.library.opcheck(BACKWARD, (logits, image, grad_loss, 2.0, impl))


@pytest.mark.parametrize("impl", [None, "aten"])
def test_compile_fullgraph_equals_eager(impl):
    logits, image = make((9, 6))
    logits.requires_grad_()

    def forward(logits, image):
        return reconstruction_loss(logits * 2, image, impl=impl)

    eager = forward(logits, image)
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager_decomp_partition")(logits, image)
    torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=0)
    got, want = (torch.autograd.grad(loss, logits)[0] for loss in (compiled, eager))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8)
    both = torch.compile(reconstruction_loss_value_and_grad, fullgraph=True, backend="aot_eager")
    for got, want in zip(both(logits.detach(), image), reconstruction_loss_value_and_grad(logits.detach(), image)):
        assert torch.equal(got, want)


def test_no_host_sync():
    logits, image = make((6, 4))
    with Trace() as trace:
        MODULE._run(logits, image, "aten")
        MODULE._run_backward(logits, image, torch.ones(()), 1.0, "aten")
        MODULE._run_backward(logits, image, None, 1.0, "aten")
    assert trace.names and not SYNCS & set(trace.names)


def test_what_it_saves():
    """The logits and the image as they are: in half precision half of the sigmoid that plain PyTorch keeps."""
    for dtype, share in ((torch.float32, 1.0), (torch.bfloat16, 0.5)):
        logits, image = make((8, 3, 16, 16), dtype)
        leaf = logits.requires_grad_()
        saved, launches = [], []
        for loss in (reference.reconstruction_loss, lambda *a: reconstruction_loss(*a, impl="aten")):
            leaf.grad = None
            with LaunchCounter() as counter, SavedBytes([image]) as held:
                loss(leaf * 1, image).backward()
            saved.append(held.peak)
            launches.append(counter.total)
        assert saved[1] == share * saved[0] == logits.numel() * logits.element_size()
        assert launches[1] < launches[0]


L, I = torch.zeros(4, 3), torch.zeros(4, 3)  # noqa: E741


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(image=torch.zeros(4, 2)), r"image has shape \[4, 2\] and logits \[4, 3\]"),
        (dict(logits=torch.zeros(4, 3, dtype=torch.int64)), "torch.int64 and torch.float32; give float16"),
        (dict(image=torch.zeros(4, 3, dtype=torch.uint8)), "torch.uint8"),
        (dict(logits=L.double(), image=torch.zeros(4, 3, dtype=torch.uint8)), "image is torch.uint8"),
        (dict(image=I.double()), "torch.float32 and torch.float64"),
        (dict(image=torch.zeros(4, 3, requires_grad=True)), "image requires grad"),
        (dict(image=I.to("meta")), "image is on meta and logits on cpu"),
        (dict(impl="atem"), "impl='atem' is not a backend.*aten"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ArgumentError, match=message):
        reconstruction_loss(**dict(logits=L, image=I) | change)
    with pytest.raises(BackendError, match="no such implementation"):
        reconstruction_loss(L, I, impl="native")
