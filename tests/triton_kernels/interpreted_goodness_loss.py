"""The kernels on the CPU, in Triton's interpreter; run by test_goodness_loss.py with TRITON_INTERPRET=1."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from fastlocal import ops
from fastlocal.errors import BackendError
from fastlocal.ops import goodness_loss
from fastlocal.triton_kernels import goodness_loss as kernels
from tests.ops import test_goodness_loss as cases
from tests.ops.losses import poisoned
from tests.triton_kernels.interpreter import mend

mend()


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Fresh memory is full of nan or of a large number: every output element must be written."""
    with poisoned(monkeypatch):
        yield


SHAPES = [(1, 1), (3, 5), (31, 127), (63, 3), (3, 1000), (3, 16, 7, 7), (2, 3, 32, 32), (1, 2, 56, 56), (2, 9001)]


@pytest.mark.parametrize("dtype, goodness", [(torch.float32, "mean"), (torch.float16, "sum")])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ragged_sizes_and_both_forms(shape, goodness, dtype):
    for last in (False, True) if len(shape) == 4 else (False,):
        h, positive = cases.make(shape, dtype, 1.3, last)
        theta = 2.0 if goodness == "mean" else float(h[0].numel())
        for form in (cases.value_and_grad("triton"), cases.through_autograd("triton")):
            got = cases.check(form, h, positive, theta=theta, goodness=goodness, what=f"{dtype} {last}")
            assert got[2].stride() == torch.empty_like(h).stride()


def test_what_the_operator_promises():
    cases.test_offset("triton")
    cases.test_large_goodness_in_float16("triton")
    cases.test_rows_of_zeros_and_no_row("triton")
    cases.test_goodness_does_not_know_the_scale_of_a_normalised_input("triton")


def test_any_strides():
    cases.test_any_strides_and_the_input_is_left_alone("triton")
    h, _ = cases.make((6, 4))
    positive = torch.tensor([True, False] * 6)[::2]
    offset = torch.randn(12)[::2]
    cases.check(cases.value_and_grad("triton"), h, positive, offset=offset)


def test_loss_scale():
    h, positive = cases.make((5, 300), torch.float16, 1e-2)
    scale = 2.0**16
    truth = cases.plain(h.double(), positive, 2.0, "mean")[2] * scale
    direct = ops.goodness_loss_value_and_grad(h, positive, grad_scale=scale, impl="triton")[2]
    for grad in (cases.through_autograd("triton", scale)(h, positive)[2], direct):
        assert (grad.double() - truth).norm() < 1e-3 * truth.norm()


def test_a_nan_is_never_a_silent_number():
    h, positive = cases.make((4, 70))
    h[1, 69] = float("nan")
    loss, g, grad = cases.value_and_grad("triton")(h, positive)
    assert loss.isnan() and g.isnan().tolist() == [False, True, False, False]
    assert grad[1].isnan().all() and not grad[0].isnan().any()


def test_only_the_loss_and_the_same_bits():
    h, positive = cases.make((7, 33))
    loss, g = goodness_loss(h, positive, impl="triton")
    first, again = (cases.value_and_grad("triton")(h, positive) for _ in range(2))
    assert not loss.requires_grad and torch.equal(loss, first[0]) and torch.equal(g, first[1])
    assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_the_choice_and_reasons():
    h, positive = cases.make((4, 3))
    assert ops.explain(goodness_loss, h, positive).chosen == "triton"
    for bad, why in ((h.double(), "float64"), (h.bfloat16(), "bfloat16")):
        assert ops.explain(goodness_loss, bad, positive).chosen == "aten"
        with pytest.raises(BackendError, match=why):
            goodness_loss(bad, positive, impl="triton")


def test_kernels_are_interpreted():
    assert type(kernels.fl_goodness_loss_fwd_kernel).__name__ == "InterpretedFunction"
