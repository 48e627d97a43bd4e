"""The kernels on the CPU, in Triton's interpreter; run by test_supervised_contrastive_loss.py with TRITON_INTERPRET=1."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from fastlocal import ops, reference
from fastlocal.errors import BackendError
from fastlocal.ops import supervised_contrastive_loss, supervised_contrastive_loss_value_and_grad
from fastlocal.triton_kernels import supervised_contrastive_loss as kernels
from tests.ops import test_supervised_contrastive_loss as cases
from tests.ops.losses import poisoned, with_gradient
from tests.triton_kernels.interpreter import mend

mend()


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Fresh memory is full of nan or of a large number: every output element must be written."""
    torch.manual_seed(0)
    with poisoned(monkeypatch):
        yield


def run(x, target, temperature=0.07, positives=None, **options):
    return supervised_contrastive_loss_value_and_grad(x, target, temperature, positives, impl="triton", **options)


# One tile and several of rows, others and features; a program's part of the gradient and more.
@pytest.mark.parametrize("dtype, kind", [(torch.float32, "few"), (torch.float16, "probabilities")])
@pytest.mark.parametrize("rows, width", [(1, 1), (2, 1), (3, 16), (33, 5), (35, 130), (3, 1000)])
def test_ragged_sizes_and_both_forms(rows, width, dtype, kind):
    x, target = torch.randn(rows, width).to(dtype), cases.labels(kind, rows)
    cases.check(run(x, target), x, target, "labels")
    got = with_gradient(lambda t: supervised_contrastive_loss(t, target, impl="triton"), x)
    cases.check(got, x, target, "autograd")
    cases.check(run(x, target, 0.07, reference.positive_weights(target)), x, target, "weights")


@pytest.mark.parametrize("kind", cases.LABELS)
def test_labels(kind):
    x, target = torch.randn(37, 3), cases.labels(kind, 37)
    cases.check(run(x, target), x, target, kind)
    if kind == "few":
        cases.check(run(x, target.int()), x, target, "int32")
        cases.check(run(x, target > 1), x, (target > 1).long(), "bool")


@pytest.mark.parametrize("temperature, scale", [(0.01, 1e3), (1.0, 1e-3)])
def test_temperatures(temperature, scale):
    x, target = torch.randn(19, 7) * scale, cases.labels("few", 19)
    cases.check(run(x, target, temperature), x, target, str(temperature), temperature)


def test_what_the_operator_promises():
    cases.test_no_positive_and_no_row("triton")
    cases.test_any_strides_and_the_input_is_left_alone("triton")
    cases.test_autocast_changes_nothing("triton")


def test_rows_of_zeros_and_tiny_rows():
    x, target = torch.randn(6, 4), torch.tensor([0, 1, 0, 1, 0, 2])
    x[1] = 0
    x[2] *= 1e-13
    expected = with_gradient(lambda t: cases.plain(t, target), x.double())
    for got, want in zip(run(x, target), expected):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_any_strides_of_labels_and_weights():
    x, target = torch.randn(9, 4), cases.labels("few", 9)
    cases.check(run(x, torch.stack([target, target + 9], 1)[:, 0]), x, target, "labels")
    # Not the same for both of a pair, and no row sums to one.
    weights = torch.rand(9, 9).fill_diagonal_(0)
    expected = run(x, target, 0.5, (weights, None))
    other = torch.rand(18, 27)[::2, ::3].copy_(weights)
    for got, again in zip(expected, run(x, target, 0.5, (other, None))):
        assert torch.equal(got, again)
    torch.testing.assert_close(expected[1].double(), gradient(x, weights), rtol=1e-4, atol=1e-6)


def gradient(x, weights):
    """Of the loss with these weights, by autograd in float64."""
    leaf = x.double().requires_grad_()
    unit = leaf / leaf.norm(dim=1, keepdim=True)
    s = (unit @ unit.T / 0.5).fill_diagonal_(-1e300)
    loss = -(weights * s.log_softmax(1)).sum() / len(x)
    return torch.autograd.grad(loss, leaf)[0]


def test_loss_scale():
    x, target, scale = (torch.randn(40, 6) * 1e3).half(), cases.labels("few", 40), 2.0**16
    truth = with_gradient(lambda t: cases.plain(t, target), x.double())[1] * scale
    scaled = with_gradient(lambda t: supervised_contrastive_loss(t, target, impl="triton") * scale, x)[1]
    for grad in (scaled, run(x, target, grad_scale=scale)[1]):
        assert (grad.double() - truth).norm() < 1e-3 * truth.norm()


def test_a_nan_is_never_a_silent_number():
    x, target = torch.randn(20, 3), torch.arange(20) % 10
    x[19, 2] = float("nan")
    loss, grad = run(x, target)
    assert loss.isnan() and grad.isnan().all()


def test_only_the_loss_and_the_same_bits():
    x, target = torch.randn(21, 5), cases.labels("few", 21)
    loss = supervised_contrastive_loss(x, target, impl="triton")
    first, again = run(x, target), run(x, target)
    assert not loss.requires_grad and torch.equal(loss, first[0])
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert first[1].isfinite().all()


def test_the_choice_and_reasons():
    x, target = torch.randn(4, 3), torch.arange(4)
    assert ops.explain(supervised_contrastive_loss, x, target).chosen == "triton"
    for bad, why in ((x.double(), "float64"), (x.bfloat16(), "bfloat16")):
        assert ops.explain(supervised_contrastive_loss, bad, target).chosen == "aten"
        with pytest.raises(BackendError, match=why):
            supervised_contrastive_loss(bad, target, impl="triton")


def test_kernels_are_interpreted():
    assert type(kernels.fl_supervised_contrastive_loss_fwd_kernel).__name__ == "InterpretedFunction"
