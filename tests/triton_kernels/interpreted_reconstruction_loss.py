"""The kernels on the CPU, in Triton's interpreter; run by test_reconstruction_loss.py with TRITON_INTERPRET=1."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from fastlocal import ops
from fastlocal.errors import BackendError
from fastlocal.ops import reconstruction_loss
from fastlocal.triton_kernels import configs
from fastlocal.triton_kernels import reconstruction_loss as kernels
from tests.ops import test_reconstruction_loss as cases
from tests.ops.losses import poisoned, with_gradient
from tests.triton_kernels.interpreter import mend

mend()


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Fresh memory is full of nan or of a large number: every output element must be written."""
    with poisoned(monkeypatch):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [s for s in cases.SHAPES if s != (2, 3, 56, 56)], ids=str)
def test_ragged_sizes_and_both_forms(shape, dtype):
    for last in (False, True) if len(shape) == 4 else (False,):
        logits, image = cases.make(shape, dtype, 2.0, last)
        for form in (cases.value_and_grad("triton"), cases.through_autograd("triton")):
            got = cases.check(form, logits, image, f"{dtype} {last}")
            assert got[1].is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@pytest.mark.parametrize("elements", [1, 128, 129, 1100])
def test_more_tiles_than_programs(elements):
    logits, image = cases.make((elements,))
    with configs.forced({"reconstruction_loss": kernels.Config(128, 3, 4)}):
        cases.check(cases.value_and_grad("triton"), logits, image)


def test_more_partial_sums_than_a_tile():
    partial, loss = torch.rand(2500), torch.empty(())
    kernels.fl_reconstruction_loss_reduce_kernel[(1,)](partial, loss, 2500, 77, BLOCK=1024)
    torch.testing.assert_close(loss, partial.sum() / 77)


def test_what_the_operator_promises():
    cases.test_targets_of_zero_and_one_and_nothing("triton")
    cases.test_any_strides_and_the_input_is_left_alone("triton")


def test_where_the_sigmoid_saturates():
    cases.test_where_the_sigmoid_saturates(torch.float32, "triton")
    ends = torch.tensor([float("inf"), -float("inf")])
    for image in (torch.zeros(2), torch.ones(2), torch.tensor([1.0, 0.0])):
        expected = with_gradient(lambda t, image=image: cases.plain(t, image), ends)
        got = cases.value_and_grad("triton")(ends, image)
        torch.testing.assert_close(got[0], expected[0])
        assert torch.equal(got[1], torch.zeros(2))


@pytest.mark.parametrize("bound", [-8.0, -3.0, 3.0, 8.0])
def test_one_sided_logits(bound):
    """Where the loss is small, it is not the difference of large numbers."""
    logits, _ = cases.make((500,))
    for image in (torch.zeros(500), torch.ones(500)):
        cases.check(cases.value_and_grad("triton"), logits * 0.1 + bound, image, f"{bound}")


def test_loss_scale():
    logits, image = cases.make((6000,), torch.float16)
    scale = 2.0**12
    truth = with_gradient(lambda t: cases.plain(t, image), logits.double())[1] * scale
    direct = ops.reconstruction_loss_value_and_grad(logits, image, grad_scale=scale, impl="triton")[1]
    for grad in (cases.through_autograd("triton", scale)(logits, image)[1], direct):
        assert (grad.double() - truth).norm() < 1e-3 * truth.norm()


def test_a_nan_is_never_a_silent_number():
    logits, image = cases.make((70,))
    logits[69] = float("nan")
    loss, grad = cases.value_and_grad("triton")(logits, image)
    assert loss.isnan() and grad[69].isnan() and not grad[:69].isnan().any()


def test_only_the_loss_and_the_same_bits():
    logits, image = cases.make((3000,))
    loss = reconstruction_loss(logits, image, impl="triton")
    first, again = (cases.value_and_grad("triton")(logits, image) for _ in range(2))
    assert not loss.requires_grad and torch.equal(loss, first[0])
    assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_the_choice_and_reasons():
    logits, image = cases.make((4, 3))
    assert ops.explain(reconstruction_loss, logits, image).chosen == "triton"
    for bad, why in ((logits.double(), "float64"), (logits.bfloat16(), "bfloat16")):
        assert ops.explain(reconstruction_loss, bad, image).chosen == "reference"
        with pytest.raises(BackendError, match=why):
            reconstruction_loss(bad, image, impl="triton")


def test_kernels_are_interpreted():
    assert type(kernels.fl_reconstruction_loss_fwd_kernel).__name__ == "InterpretedFunction"
