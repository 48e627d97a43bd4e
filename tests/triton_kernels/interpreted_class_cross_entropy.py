"""The kernels on the CPU, in Triton's interpreter; run by test_class_cross_entropy.py with TRITON_INTERPRET=1."""

import itertools
import os
import sys

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from fastlocal import ops
from fastlocal.errors import BackendError
from fastlocal.ops import class_goodness_cross_entropy
from fastlocal.triton_kernels import class_cross_entropy as kernels
from tests.ops import test_class_goodness_cross_entropy as goodness
from tests.ops import test_norm_linear_cross_entropy as cosine
from tests.ops.cases import TARGETS
from tests.ops.losses import poisoned
from tests.triton_kernels.interpreter import mend

mend()
SHARED = sys.modules["fastlocal.ops._cross_entropy"]
HALVES = (torch.float32, torch.float16)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Fresh memory is full of nan or of a large number: every output element must be written."""
    with poisoned(monkeypatch):
        yield


# Rows, channels, spatial, classes: groups of one element, of one channel, of several; many positions, many classes.
GROUPS = [
    (1, 10, (), 10),
    (3, 31, (1, 1), 31),
    (31, 12, (7, 7), 3),
    (63, 20, (2, 3), 10),
    (127, 6, (), 2),
    (3, 1000, (2, 2), 1000),
    (2, 9, (56, 56), 3),
    (2, 8, (32, 32), 1),
]


@pytest.mark.parametrize("size", GROUPS, ids=str)
def test_groups_of_channels(size):
    rows, channels, spatial, classes = size
    lasts = (False, True) if len(spatial) == 2 else (False,)
    for i, (kind, last) in enumerate(itertools.product(TARGETS if rows < 31 else TARGETS[1::2], lasts)):
        dtype = HALVES[(i + i // 2) % 2]
        args, options = goodness.make(
            rows, channels, spatial, classes, form="groups", kind=kind, dtype=dtype, last=last
        )
        margin = 0.0 if kind == "probabilities" else 0.5
        form = (goodness.value_and_grad, goodness.through_autograd)[i % 2]("triton")
        got = goodness.check(form, args, f"{kind} {dtype} {last}", scale=2.0, margin=margin, **options)
        if i % 2 == 0:
            assert got[2].stride() == torch.empty_like(args[0]).stride()


# The map and the Gram form.
@pytest.mark.parametrize(
    "size", [(1, 3, 1, 2), (31, 16, 7, 10), (63, 8, 2, 100), (3, 4, 32, 1000), (2, 127, 2, 3)], ids=str
)
def test_scores_of_a_weight(size):
    rows, channels, side, classes = size
    for i, kind in enumerate(TARGETS):
        args, options = goodness.make(
            rows, channels, (side, side), classes, form=goodness.FORMS[1 + i % 2], kind=kind, dtype=HALVES[i // 2]
        )
        margin = 0.0 if kind == "probabilities" else 0.5
        goodness.check(goodness.value_and_grad("triton"), args, kind, scale=2.0, margin=margin, **options)


@pytest.mark.parametrize("form", goodness.FORMS[::2])
def test_what_class_goodness_promises(form):
    goodness.test_margin_is_taken_off_the_targets_logit("triton")
    for rows, smoothing in ((0, 0.0), (5, 0.1)):
        goodness.test_no_row_counts(rows, smoothing, form, "triton")
    for kind in TARGETS:
        goodness.test_huge_logits(form, kind, "triton")
    for needs in ((True, False, True), (False, True, False), (False, False, False)):
        goodness.test_partial_gradients(needs, form, "triton")
    for classes in (2, 8):
        goodness.test_any_strides_and_the_input_is_left_alone(classes, form, "triton")


def test_loss_scale():
    for form in goodness.FORMS[::2]:
        goodness.test_loss_scale_and_float16(form, "triton")


def test_more_rows_than_a_program_counts(monkeypatch):
    monkeypatch.setattr(SHARED, "COUNT_ROWS", 4)
    for kind in TARGETS:
        args, options = goodness.make(9, 6, (2,), 3, form="groups", kind=kind)
        goodness.check(goodness.value_and_grad("triton"), args, kind, **options)


def test_a_row_of_the_sums_beyond_the_first_step(monkeypatch):
    """The last alone in its step."""
    monkeypatch.setattr(kernels, "BLOCK_N", 16)
    for count in (4096, 4):
        monkeypatch.setattr(SHARED, "COUNT_ROWS", count)
        args, options = goodness.make(17, 2, (), 2, form="groups", kind="ignored")
        args[3][-1] = 0
        goodness.check(goodness.value_and_grad("triton"), args, **options)


def test_a_nan_or_a_class_that_does_not_exist_is_never_a_silent_number():
    (x, _, _, target), options = goodness.make(4, 6, (3,), 3, form="groups")
    for change in ("nan", 3, -1):
        features, classes = x.clone(), target.clone()
        if change == "nan":
            features[1, 5, 2] = float("nan")
        else:
            classes[1] = change
        loss, _, grad, *_ = goodness.value_and_grad("triton")(features, None, None, classes, **options)
        assert loss.isnan() and grad[1].isnan().any() and not grad[0].isnan().any()


def test_the_same_bits_and_strided_targets():
    for kind in TARGETS[2:]:
        args, options = goodness.make(9, 6, (5,), 3, form="groups", kind=kind)
        first, again = (goodness.value_and_grad("triton")(*args, **options) for _ in range(2))
        strided = torch.stack([args[3], args[3].flip(0)], -1)[..., 0]
        third = goodness.value_and_grad("triton")(*args[:3], strided, **options)
        for other in (again, third):
            assert all(a is b or torch.equal(a, b) for a, b in zip(first, other))


@pytest.mark.parametrize(
    "size", [(1, 1, 2), (31, 127, 10), (63, 63, 3), (127, 5, 10), (3, 1000, 31), (2, 9001, 3), (2, 5, 300)], ids=str
)
def test_cosines(size):
    rows, features, classes = size
    for i, kind in enumerate(TARGETS if rows < 31 else TARGETS[1::2]):
        dtype, basis = HALVES[i // 2 % 2], cosine.BASES[i % 3 if features > 1 else 0]
        args, options = cosine.make(rows, (features,), classes, kind=kind, dtype=dtype, basis=basis)
        form = (cosine.value_and_grad, cosine.through_autograd)[i % 2]("triton")
        for normalize in (False, True):
            cosine.check(form, args, f"{kind} {dtype}", scale=5.0, normalize_weight=normalize, **options)


def test_what_cosines_promise():
    cosine.test_the_loss_does_not_know_the_length_of_the_features("triton")
    for rows, smoothing in ((0, 0.0), (5, 0.1)):
        cosine.test_no_row_counts(rows, smoothing, "triton")
    for needs in itertools.product([True, False], repeat=2):
        cosine.test_partial_gradients(needs, "triton")
    cosine.test_any_strides_and_the_input_is_left_alone("triton")
    for kind in TARGETS[2:]:
        cosine.test_huge_logits(kind, "triton")


def test_rows_of_zeros_and_tiny_rows_of_cosines():
    (x, weight, target), _ = cosine.make(6, (4,), 70)
    x[1] = 0
    x[2] *= 1e-14
    weight[1] = 0
    weight[66] *= 1e-14
    for needs in ([True, True], [True, False]):
        call = ("weight", 2.0, True, 0.1, -100, 1.0, needs, True)
        got = cosine.OPERATOR(x, weight, target, *call, "triton")
        want = cosine.OPERATOR(x.double(), weight.double(), target, *call, "reference")
        for g, w in zip(got, want):
            torch.testing.assert_close(g.to(w.dtype), w, rtol=2e-5, atol=1e-6)


def test_the_choice_and_reasons():
    args, options = goodness.make(4, 6, (3,), 3, form="groups")
    assert ops.explain(class_goodness_cross_entropy, *args, **options).chosen == "triton"
    many = goodness.make(2, 5000, (), 5000, form="groups")
    for bad, other, why in (
        (goodness.to_double(args), options, "float64"),
        ((args[0].bfloat16(), *args[1:]), options, "bfloat16"),
        (*many, "5000 classes"),
    ):
        assert ops.explain(class_goodness_cross_entropy, *bad, **other).chosen == "aten"
        with pytest.raises(BackendError, match=why):
            class_goodness_cross_entropy(*bad, impl="triton", **other)


def test_kernels_are_interpreted():
    assert type(kernels.fl_class_cross_entropy_row_kernel).__name__ == "InterpretedFunction"


def test_lengths_of_strided_rows():
    x = torch.randn(6, 4200, generator=torch.Generator().manual_seed(0))
    for rows in (x, x[::2, ::2], x[:, :37].t()):
        want = rows.double().square().sum(1).sqrt()
        torch.testing.assert_close(kernels.lengths(rows).double(), want, rtol=1e-6, atol=0)
