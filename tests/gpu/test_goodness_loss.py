"""The Forward-Forward loss on the device: the error rule, unwritten memory, equal bits, graphs, no host read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlocal import ops
from fastlocal.ops import goodness_loss
from tests.gpu.device import DEVICE, INTERPRETED, MARKS, ON_CUDA, no_sync
from tests.ops.losses import poisoned
from tests.ops.test_goodness_loss import SHAPES, check, make, through_autograd, value_and_grad

pytestmark = MARKS
IMPL = "triton" if ON_CUDA or INTERPRETED else "aten"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FULL = [(128, 16, 32, 32), (256, 2000), (32, 256, 56, 56)]


def on_device(args: Any) -> Any:
    return tuple(t.to(DEVICE) for t in args)


def served(dtype: torch.dtype) -> None:
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter computes bfloat16 wrongly")


def test_triton_is_chosen() -> None:
    choice = ops.explain(goodness_loss, *on_device(make((4, 3))))
    assert choice.chosen == IMPL, str(choice)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("goodness", ["mean", "sum"])
@pytest.mark.parametrize("shape", SHAPES + (FULL if ON_CUDA else []), ids=str)
def test_sizes(shape: tuple[int, ...], goodness: str, dtype: torch.dtype) -> None:
    served(dtype)
    for last in (False, True) if len(shape) == 4 else (False,):
        h, positive = on_device(make(shape, dtype, 1.3, last))
        theta = 2.0 if goodness == "mean" else float(h[0].numel())
        for form in (value_and_grad(IMPL), through_autograd(IMPL)):
            check(form, h, positive, theta=theta, goodness=goodness, what=f"{dtype} {last}")


def test_offset_and_no_row() -> None:
    h, positive = on_device(make((9, 6)))
    check(value_and_grad(IMPL), h, positive, offset=torch.randn(9, device=DEVICE))
    loss, g, grad = value_and_grad(IMPL)(h[:0], positive[:0])
    assert loss.isnan() and g.shape == (0,) and grad.shape == (0, 6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_poisoned_memory_and_equal_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    served(dtype)
    h, positive = on_device(make((31, 5, 7, 3), dtype))
    clean = value_and_grad(IMPL)(h, positive)
    with poisoned(monkeypatch):
        assert torch.empty(1, device=DEVICE).isnan()
        dirty = value_and_grad(IMPL)(h, positive)
    for again in (dirty, *(value_and_grad(IMPL)(h, positive) for _ in range(20 if ON_CUDA else 1))):
        assert all(torch.equal(a, b) for a, b in zip(clean, again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [value_and_grad, through_autograd], ids=["value and gradient", "autograd"])
def test_cuda_graph_with_changed_inputs(form: Callable[[str], Callable[..., Any]], dtype: torch.dtype) -> None:
    run = form("triton")
    static = on_device(make((37, 6, 9, 9), dtype))
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
        fresh = on_device((make((37, 6, 9, 9), dtype)[0], torch.rand(37) > 0.5))
        with no_sync():
            for into, new in zip(static, fresh, strict=True):
                into.copy_(new)
            graph.replay()
        for a, b in zip(captured, run(*fresh), strict=True):
            torch.testing.assert_close(a, b)
        assert captured[0].isfinite()
