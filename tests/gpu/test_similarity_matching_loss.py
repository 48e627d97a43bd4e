"""The similarity matching loss on the device: the error rule, unwritten memory, equal bits, graphs, no host read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlocal import ops, reference
from fastlocal.ops import similarity_matching_loss, similarity_matching_loss_value_and_grad
from tests.gpu.device import DEVICE, INTERPRETED, MARKS, ON_CUDA, no_sync, peak_bytes
from tests.ops.losses import poisoned, with_gradient
from tests.ops.test_similarity_matching_loss import LABELS, check, classes, labels, wanted

pytestmark = MARKS
IMPL = "triton" if ON_CUDA or INTERPRETED else "aten"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 1), (3, 127), (17, 6, 16), (1, 16, 7, 9), (17, 5, 3, 3)]
FULL = [(1000, 127), (1024, 512), (128, 2048), (4096, 64), (128, 16, 32, 32), (128, 256, 8, 8), (31, 256, 56, 56)]
FULL += [(63, 197, 192), (7, 2048, 7, 7)]


def value_and_grad(x: Tensor, target: Tensor, matched: Tensor | None = None) -> list[Tensor]:
    return list(similarity_matching_loss_value_and_grad(x, target, classes(target), matched, impl=IMPL))


def through_autograd(x: Tensor, target: Tensor) -> list[Tensor]:
    return with_gradient(lambda t: similarity_matching_loss(t, target, classes(target), impl=IMPL), x)


FORMS = [value_and_grad, through_autograd]


def make(shape: tuple[int, ...], dtype: torch.dtype, kind: str = "few") -> tuple[Tensor, Tensor]:
    return torch.randn(*shape).to(DEVICE, dtype), labels(kind, shape[0]).to(DEVICE)


def served(dtype: torch.dtype) -> None:
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter computes bfloat16 wrongly")


def test_triton_is_chosen() -> None:
    choice = ops.explain(similarity_matching_loss, *make((4, 3), torch.float32), 5)
    assert choice.chosen == IMPL, str(choice)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("size", SIZES + (FULL if ON_CUDA else []), ids=str)
def test_sizes(size: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    served(dtype)
    torch.manual_seed(0)
    x, target = make(size, dtype, kind)
    # Compared on the CPU, whose float64 the test has.
    found = [value_and_grad(x, target, wanted(x.cpu(), target.cpu()).to(DEVICE))]
    if IMPL == "triton":  # whose matrix has no rounding of its own
        found += [form(x, target) for form in FORMS]
    for got in found:
        check([t.cpu() for t in got], x.cpu(), target.cpu(), f"{dtype} {kind}")


@pytest.mark.parametrize("count", [1, 2, 10, 1000])
@pytest.mark.parametrize("form", ["at once", "autograd"])
@pytest.mark.parametrize("size", [(33, 16), (33, 16, 8, 8)], ids=str)
def test_labels_are_their_matrix(size: tuple[int, ...], form: str, count: int) -> None:
    """What the kernel makes of labels, and of their one-hot rows, is what it makes of the rounded matrix."""
    torch.manual_seed(0)
    x, target = torch.randn(*size, device=DEVICE), torch.randint(count, (size[0],), device=DEVICE)
    onehot = (target[:, None] == torch.arange(count, device=DEVICE)).float()
    matched = reference.target_similarity(onehot.double(), count, torch.float32)

    def call(target: Tensor, matched: Tensor | None) -> list[Tensor]:
        if form == "at once":
            return list(similarity_matching_loss_value_and_grad(x, target, count, matched, impl=IMPL))
        return with_gradient(lambda t: similarity_matching_loss(t, target, count, matched, impl=IMPL), x)

    expected = call(target, matched)
    for given in (target, onehot, target.int()):
        for got, want in zip(call(given, None), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_no_row_and_layouts(layout: torch.memory_format) -> None:
    x, target = make((9, 16, 8, 8), torch.float32)
    expected = value_and_grad(x, target)
    got = value_and_grad(x.to(memory_format=layout), target)
    assert got[1].is_contiguous(memory_format=layout)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    loss, grad = value_and_grad(x[:0], target[:0])
    assert loss.isnan() and grad.shape == (0, 16, 8, 8)


@pytest.mark.parametrize("size", [(63, 31), (33, 16, 8, 8), (5, 40, 32, 32)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_poisoned_memory_and_equal_bits(
    dtype: torch.dtype, size: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third is large: the deviation and the unit vector are two launches."""
    served(dtype)
    x, target = make(size, dtype)
    for form in FORMS:
        clean = form(x, target)
        with poisoned(monkeypatch):
            assert torch.empty(1, device=DEVICE).isnan()
            dirty = form(x, target)
        for again in (dirty, *(form(x, target) for _ in range(20 if ON_CUDA else 1))):
            assert all(torch.equal(a, b) for a, b in zip(clean, again, strict=True))


@pytest.mark.gpu
def test_no_matrix_of_all_pairs() -> None:
    x, target = make((4096, 16), torch.float32)
    value_and_grad(x, target)
    assert peak_bytes(lambda: value_and_grad(x, target)) < 4096 * 4096


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(130, 40), (130, 16, 8, 8), (5, 40, 32, 32)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_cuda_graph_with_changed_inputs(
    form: Callable[..., list[Tensor]], size: tuple[int, ...], dtype: torch.dtype
) -> None:
    static: Any = make(size, dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            form(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = form(*static)
    for seed in range(3):
        torch.manual_seed(seed)
        fresh = make(size, dtype)
        with no_sync():
            for into, new in zip(static, fresh, strict=True):
                into.copy_(new)
            graph.replay()
        for a, b in zip(captured, form(*fresh), strict=True):
            assert torch.equal(a, b)
        assert captured[0].isfinite()
