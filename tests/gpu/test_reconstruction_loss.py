"""The reconstruction loss on the device: the error rule, unwritten memory, equal bits, graphs, no host read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlocal import ops
from fastlocal.ops import reconstruction_loss
from tests.gpu.device import DEVICE, INTERPRETED, MARKS, ON_CUDA, no_sync
from tests.ops.losses import poisoned
from tests.ops.test_reconstruction_loss import SHAPES, check, make, through_autograd, value_and_grad

pytestmark = MARKS
IMPL = "triton" if ON_CUDA or INTERPRETED else "reference"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FULL = [(128, 3, 32, 32), (1024, 3, 32, 32), (64, 3, 224, 224)]


def on_device(args: Any) -> Any:
    return tuple(t.to(DEVICE) for t in args)


def served(dtype: torch.dtype) -> None:
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter computes bfloat16 wrongly")


def test_triton_is_chosen() -> None:
    choice = ops.explain(reconstruction_loss, *on_device(make((4, 3))))
    assert choice.chosen == IMPL, str(choice)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES + (FULL if ON_CUDA else []), ids=str)
def test_sizes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    served(dtype)
    for last in (False, True) if len(shape) == 4 else (False,):
        logits, image = on_device(make(shape, dtype, 2.0, last))
        for form in (value_and_grad(IMPL), through_autograd(IMPL)):
            check(form, logits, image, f"{dtype} {last}")


def test_extremes_and_nothing() -> None:
    logits = torch.tensor([25.0, -25.0, 1e4, -1e4], device=DEVICE)
    loss, grad = value_and_grad(IMPL)(logits, torch.tensor([0.0, 1.0, 0.0, 1.0], device=DEVICE))
    torch.testing.assert_close(loss, torch.tensor((100 + 25 + 100 + 100) / 4, device=DEVICE))
    assert not grad[2:].any() and not grad.isnan().any()
    loss, grad = value_and_grad(IMPL)(logits[:0], logits[:0])
    assert loss.isnan() and grad.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_poisoned_memory_and_equal_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    served(dtype)
    logits, image = on_device(make((31, 5, 7, 3), dtype))
    clean = value_and_grad(IMPL)(logits, image)
    with poisoned(monkeypatch):
        assert torch.empty(1, device=DEVICE).isnan()
        dirty = value_and_grad(IMPL)(logits, image)
    for again in (dirty, *(value_and_grad(IMPL)(logits, image) for _ in range(20 if ON_CUDA else 1))):
        assert all(torch.equal(a, b) for a, b in zip(clean, again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [value_and_grad, through_autograd], ids=["value and gradient", "autograd"])
def test_cuda_graph_with_changed_inputs(form: Callable[[str], Callable[..., Any]], dtype: torch.dtype) -> None:
    run = form("triton")
    static = on_device(make((37, 3, 9, 9), dtype))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured: list[Tensor] = list(run(*static))
    for seed in range(3):
        torch.manual_seed(seed)
        fresh = on_device(make((37, 3, 9, 9), dtype))
        with no_sync():
            for into, new in zip(static, fresh, strict=True):
                into.copy_(new)
            graph.replay()
        for a, b in zip(captured, run(*fresh), strict=True):
            torch.testing.assert_close(a, b)
        assert captured[0].isfinite()
