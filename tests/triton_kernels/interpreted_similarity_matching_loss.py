"""The kernels on the CPU, in Triton's interpreter; run by test_similarity_matching_loss.py with TRITON_INTERPRET=1."""

import os
import sys

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from fastlocal import ops, reference
from fastlocal.errors import BackendError
from fastlocal.ops import similarity_matching_loss, similarity_matching_loss_value_and_grad
from fastlocal.triton_kernels import similarity_matching_loss as kernels
from tests.ops import test_similarity_matching_loss as cases
from tests.ops.losses import poisoned, with_gradient
from tests.triton_kernels.interpreter import mend

mend()
OPERATOR = sys.modules["fastlocal.ops.similarity_matching_loss"]


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Fresh memory is full of nan or of a large number: every output element must be written."""
    torch.manual_seed(0)
    with poisoned(monkeypatch):
        yield


def run(x, target, matched=None, **options):
    return similarity_matching_loss_value_and_grad(x, target, cases.classes(target), matched, impl="triton", **options)


def through_autograd(x, target, matched=None):
    def loss(t):
        return similarity_matching_loss(t, target, cases.classes(target), matched, impl="triton")

    return with_gradient(loss, x)


# One tile and several of rows, others, channels and positions; a program's part of the gradient and more.
SIZES = [(1, (1,)), (2, (1,)), (3, (16,)), (33, (5,)), (17, (300,)), (3, (1000,)), (3, (3, 5, 5)), (2, (1, 7))]
SIZES += [(1, (16, 8, 8)), (17, (8, 7, 9)), (3, (70, 7, 7)), (2, (5, 56, 56)), (18, (6, 16)), (3, (40, 70))]


@pytest.mark.parametrize("rows, shape", SIZES, ids=str)
def test_ragged_sizes_and_both_forms(rows, shape):
    for dtype, kind in [(torch.float32, "few"), (torch.float16, "probabilities")][: 1 if rows > 16 else 2]:
        x, target = torch.randn(rows, *shape).to(dtype), cases.labels(kind, rows)
        cases.check(run(x, target), x, target, f"at once {dtype}")
        cases.check(through_autograd(x, target), x, target, f"autograd {dtype}")
        if rows < 17:
            cases.check(run(x, target, cases.wanted(x, target)), x, target, f"matrix {dtype}")


@pytest.mark.parametrize("kind", cases.LABELS)
def test_targets(kind):
    x, target = torch.randn(19, 3), cases.labels(kind, 19)
    cases.check(run(x, target), x, target, kind)
    if kind == "few":
        cases.check(run(x, target.int()), x, target, "int32")
        cases.check(run(x, target > 1), x, (target > 1).long(), "bool")
    if kind == "probabilities":
        cases.check(run(x, target.double()), x, target, "float64")
        many = torch.rand(5, 1500).softmax(1).half()  # several steps, more of them than of the features
        for got, want in zip(run(x[:5], many), reference_of(x[:5], many)):
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def reference_of(x, target):
    return reference.similarity_matching_loss_value_and_grad(x.double(), target.double(), 0)


@pytest.mark.parametrize("num_classes", [1, 2, 3])
def test_few_classes(num_classes):
    x, target = torch.randn(5, 4, 3, 3), torch.randint(num_classes, (5,))
    got = similarity_matching_loss_value_and_grad(x, target, num_classes, impl="triton")
    for g, want in zip(got, reference.similarity_matching_loss_value_and_grad(x.double(), target, num_classes)):
        torch.testing.assert_close(g.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(37,), (16, 6, 6), (6, 21)], ids=str)
def test_one_launch_of_a_map_or_two(shape, monkeypatch):
    """And several programs for a sample."""
    for rows, kind in ((3, "few"), (2, "probabilities")):
        x, target = torch.randn(rows, *shape), cases.labels(kind, rows)
        monkeypatch.setattr(OPERATOR, "ONE_LAUNCH", 1 << 15)
        expected = run(x, target), through_autograd(x, target)
        monkeypatch.setattr(OPERATOR, "ONE_LAUNCH", 0)
        monkeypatch.setattr(kernels, "TILE", 32)
        for want, got in zip(expected, (run(x, target), through_autograd(x, target))):
            cases.check(got, x, target, f"{kind}, two")
            for a, b in zip(want, got):
                torch.testing.assert_close(a, b)
        monkeypatch.setattr(kernels, "TILE", 2048)


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_any_split_of_the_pairs(parts, monkeypatch):
    monkeypatch.setattr(kernels, "SPLITS", parts)
    x, target = torch.randn(70, 5), cases.labels("few", 70)
    cases.check(run(x, target), x, target, str(parts))


@pytest.mark.parametrize("config", [kernels.Config(32, 16, 4), kernels.Config(16, 64, 4)])
def test_any_configuration(config, monkeypatch):
    monkeypatch.setattr(kernels, "config", lambda rows: config)
    x, target = torch.randn(50, 20), cases.labels("few", 50)
    cases.check(run(x, target), x, target, str(config))


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "every other"])
def test_layouts(layout):
    x, target = torch.randn(5, 8, 4, 6), cases.labels("few", 5)
    expected = run(x, target)
    if layout == "channels_last":
        other = x.to(memory_format=torch.channels_last)
    elif layout == "transposed":  # no one stride leads through the positions
        other = x.transpose(2, 3).contiguous().transpose(2, 3)
    else:
        other = torch.randn(10, 16, 4, 12)[::2, 1::2, :, ::2].copy_(x)
    for form in (run, through_autograd):
        got = form(other, target)
        cases.check(got, x, target, layout)
        for a, b in zip(got, expected):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
        assert got[1].is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")


def test_results_are_laid_out_as_the_operator_says():
    """What a compiler is told before the kernels run."""
    for shape in ((4, 6), (4, 6, 5, 3), (4, 7, 6), (4, 3, 5, 5)):
        whole = torch.randn(*shape)
        variants = [whole, whole.transpose(-1, -2).contiguous().transpose(-1, -2), torch.stack([whole] * 2, -1)[..., 0]]
        variants += [whole.to(memory_format=torch.channels_last)] if len(shape) == 4 else []
        for x in variants:
            for form in ("value", "grad", "parts"):
                call = (x, torch.arange(4), None, 4, 1.0, form, "triton")
                for got, said in zip(OPERATOR._run(*call), OPERATOR._fake(*call)):
                    assert (got.shape, got.stride(), got.dtype) == (said.shape, said.stride(), said.dtype), (
                        shape,
                        form,
                    )


def test_what_the_operator_promises():
    for shape in ((3,), (8, 4, 4), (4, 6)):
        cases.test_empty_batch(shape, "triton")
    cases.test_any_strides_and_the_input_is_left_alone((6, 4), "triton")
    cases.test_any_strides_and_the_input_is_left_alone((8, 4, 6), "triton")
    cases.test_autocast_changes_nothing((8, 3, 3), "triton")


@pytest.mark.parametrize("scale, shift", [(1e-3, 0.0), (1e4, 0.0), (1.0, 30.0)])
@pytest.mark.parametrize("shape", [(16,), (16, 8, 8), (16, 8)], ids=str)
def test_large_small_and_shifted_features(shape, scale, shift):
    for dtype in (torch.float32, torch.float16):
        x, target = (torch.randn(9, *shape) * scale + shift).to(dtype), cases.labels("few", 9)
        for form in (run, through_autograd):
            cases.check(form(x, target), x, target, f"{dtype} {scale} {shift}")


@pytest.mark.parametrize("value", [0.0, 0.1, 1e3])
@pytest.mark.parametrize("shape", [(5,), (5, 3, 3), (7, 6)], ids=str)
def test_dead_rows_and_channels(shape, value):
    """No variance over positions, or over channels, whatever the value: no gradient there, and finite ones elsewhere."""
    x, target = torch.randn(5, *shape), torch.tensor([0, 1, 0, 1, 2])
    x[1] = value
    if len(shape) > 1:
        x[2].select(0 if len(shape) == 3 else 1, 1).fill_(value)
    expected = with_gradient(lambda t: cases.plain(t, target), x.double())
    for form in (run, through_autograd):
        got = form(x, target)
        alive = [0, 2, 3, 4] if len(shape) == 1 else slice(None)
        torch.testing.assert_close(got[0].double(), expected[0], rtol=1e-5, atol=0)
        torch.testing.assert_close(got[1][alive].double(), expected[1][alive], rtol=2e-4, atol=1e-6)
        if len(shape) == 1:  # PyTorch divides what is rounded off by 1e-8 here
            assert got[1][1].isfinite().all()


def test_parallel_rows_are_clamped():
    x, target = torch.randn(4, 6) * torch.tensor([[1.0], [1.0], [1.0], [0.0]]), torch.tensor([0, 0, 1, 2])
    x[1], x[3] = 3 * x[0], -x[0]
    got, want = run(x, target), reference.similarity_matching_loss_value_and_grad(x.double(), target, 5)
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(got[1].double(), want[1], rtol=1e-4, atol=1e-6)
    for row in torch.randn(20, 1, 50):  # some of their products with themselves are rounded up
        assert run(row, target[:1], torch.full((1, 1), 2.0))[0] >= 1


def test_any_strides_of_targets_and_matrices():
    x, target = torch.randn(9, 4), cases.labels("few", 9)
    expected = run(x, target)
    for got, want in zip(run(x, torch.stack([target, target + 9], 1)[:, 0]), expected):
        assert torch.equal(got, want)
    probabilities = cases.labels("probabilities", 9)
    other = torch.rand(18, 15)[::2, ::3].copy_(probabilities)
    for features in (x, torch.randn(9, 4, 2, 2)):
        for got, want in zip(run(features, other), run(features, probabilities)):
            assert torch.equal(got, want)
    matched = torch.rand(9, 9)
    matched += matched.t().clone()  # no similarity of any targets
    given = run(x, target, matched)
    again = run(x, target, torch.rand(18, 27)[::2, ::3].copy_(matched))
    assert all(torch.equal(a, b) for a, b in zip(given, again))
    wide = reference.similarity_matching_loss_value_and_grad(x.double(), target, 5, matched.double())
    for got, want in zip(given, wide):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(16,), (6, 4, 4)], ids=str)
def test_loss_scale(shape):
    x, target, scale = (torch.randn(20, *shape) * 2e3).half(), cases.labels("few", 20), 2.0**16
    truth = with_gradient(lambda t: cases.plain(t, target), x.double())[1] * scale

    def scaled(t):
        return similarity_matching_loss(t, target, 20, impl="triton") * scale

    for grad in (with_gradient(scaled, x)[1], run(x, target, grad_scale=scale)[1]):
        assert (grad.double() - truth).norm() < 1e-3 * truth.norm()


@pytest.mark.parametrize("shape", [(3,), (5, 3, 3)], ids=str)
def test_a_nan_is_never_a_silent_number(shape):
    for bad in ("nan", "inf"):
        x, target = torch.randn(17, *shape), torch.arange(17) % 10
        x.view(17, -1)[16, 2] = float(bad)
        loss, grad = run(x, target)
        assert loss.isnan() and grad.isnan().all()


def test_only_the_loss_and_the_same_bits():
    for shape in ((5,), (5, 3, 3)):
        x, target = torch.randn(17, *shape), cases.labels("few", 17)
        loss = similarity_matching_loss(x, target, 17, impl="triton")
        first, again = run(x, target), run(x, target)
        assert not loss.requires_grad and torch.equal(loss, first[0])
        assert all(torch.equal(a, b) for a, b in zip(first, again))
        assert first[1].isfinite().all()


def test_the_choice_and_reasons():
    x, target = torch.randn(4, 3), torch.arange(4)
    assert ops.explain(similarity_matching_loss, x, target, 4).chosen == "triton"
    for bad, why in ((x.double(), "float64"), (x.bfloat16(), "bfloat16"), (torch.randn(4, 5000), "5000 numbers")):
        assert ops.explain(similarity_matching_loss, bad, target, 4).chosen == "aten"
        with pytest.raises(BackendError, match=why):
            similarity_matching_loss(bad, target, 4, impl="triton")


def test_kernels_are_interpreted():
    assert type(kernels.fl_similarity_matching_loss_pairs_kernel).__name__ == "InterpretedFunction"
