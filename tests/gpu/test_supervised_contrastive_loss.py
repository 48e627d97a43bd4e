"""The supervised contrastive loss on the device: the error rule, unwritten memory, equal bits, graphs, no host read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlocal import ops, reference
from fastlocal.ops import supervised_contrastive_loss, supervised_contrastive_loss_value_and_grad
from tests.gpu.device import DEVICE, INTERPRETED, MARKS, ON_CUDA, no_sync, peak_bytes
from tests.ops.losses import poisoned, with_gradient
from tests.ops.test_supervised_contrastive_loss import LABELS, check, labels

pytestmark = MARKS
IMPL = "triton" if ON_CUDA or INTERPRETED else "aten"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 1), (2, 16), (31, 5), (63, 127)]
FULL = [(128, 128), (1000, 127), (1024, 128), (4096, 128), (256, 2048)]


def value_and_grad(x: Tensor, target: Tensor) -> list[Tensor]:
    return list(supervised_contrastive_loss_value_and_grad(x, target, impl=IMPL))


def through_autograd(x: Tensor, target: Tensor) -> list[Tensor]:
    return with_gradient(lambda t: supervised_contrastive_loss(t, target, impl=IMPL), x)


FORMS = [value_and_grad, through_autograd]


def make(rows: int, width: int, dtype: torch.dtype, kind: str = "few") -> tuple[Tensor, Tensor]:
    return torch.randn(rows, width).to(DEVICE, dtype), labels(kind, rows).to(DEVICE)


def served(dtype: torch.dtype) -> None:
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter computes bfloat16 wrongly")


def test_triton_is_chosen() -> None:
    choice = ops.explain(supervised_contrastive_loss, *make(4, 3, torch.float32))
    assert choice.chosen == IMPL, str(choice)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("size", SIZES + (FULL if ON_CUDA else []), ids=str)
def test_sizes(size: tuple[int, int], kind: str, dtype: torch.dtype) -> None:
    served(dtype)
    torch.manual_seed(0)
    x, target = make(*size, dtype, kind)
    shared = reference.positive_weights(target)
    found = [form(x, target) for form in FORMS]
    found.append(list(supervised_contrastive_loss_value_and_grad(x, target, 0.07, shared, impl=IMPL)))
    for got in found:  # compared on the CPU, whose float64 and masks the test has
        check([t.cpu() for t in got], x.cpu(), target.cpu(), f"{dtype} {kind}")


def test_no_positive_and_no_row() -> None:
    x, target = make(5, 3, torch.float32, "different")
    loss, grad = value_and_grad(x, target)
    assert loss == 0 and torch.equal(grad, torch.zeros_like(x))
    loss, grad = value_and_grad(x[:0], target[:0])
    assert loss.isnan() and grad.shape == (0, 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_poisoned_memory_and_equal_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    served(dtype)
    x, target = make(63, 31, dtype)
    clean = value_and_grad(x, target)
    with poisoned(monkeypatch):
        assert torch.empty(1, device=DEVICE).isnan()
        dirty = value_and_grad(x, target)
    for again in (dirty, *(value_and_grad(x, target) for _ in range(20 if ON_CUDA else 1))):
        assert all(torch.equal(a, b) for a, b in zip(clean, again, strict=True))


@pytest.mark.gpu
def test_no_matrix_of_all_pairs() -> None:
    x, target = make(4096, 16, torch.float32)
    value_and_grad(x, target)
    assert peak_bytes(lambda: value_and_grad(x, target)) < 4096 * 4096


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_cuda_graph_with_changed_inputs(form: Callable[..., list[Tensor]], dtype: torch.dtype) -> None:
    static: Any = make(130, 40, dtype)
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
        fresh = make(130, 40, dtype)
        with no_sync():
            for into, new in zip(static, fresh, strict=True):
                into.copy_(new)
            graph.replay()
        for a, b in zip(captured, form(*fresh), strict=True):
            assert torch.equal(a, b)
        assert captured[0].isfinite()
