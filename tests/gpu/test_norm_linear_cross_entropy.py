"""The head on normalised features on the device: the error rule, equal bits, graphs, no host read."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.gpu.device import DEVICE, INTERPRETED, MARKS, ON_CUDA, no_sync
from tests.ops.cases import TARGETS
from tests.ops.test_norm_linear_cross_entropy import BASES, check, make, through_autograd, value_and_grad

pytestmark = MARKS
IMPL = "triton" if ON_CUDA or INTERPRETED else "aten"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FULL = [(128, 4096, 100), (1024, 1024, 1000)] if ON_CUDA else []


def served(dtype: torch.dtype) -> None:
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter computes bfloat16 wrongly")


def on_device(args: Any) -> Any:
    return tuple(t if t is None else t.to(DEVICE) for t in args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("size", [(31, 127, 10), (3, 1000, 100), *FULL], ids=str)
def test_sizes(size: tuple[int, int, int], basis: str, dtype: torch.dtype) -> None:
    served(dtype)
    rows, features, classes = size
    for kind, normalize in itertools.product(TARGETS if ON_CUDA else TARGETS[2:], (False, True)):
        args, options = make(rows, (features,), classes, kind=kind, dtype=dtype, basis=basis)
        for run in (value_and_grad(IMPL), through_autograd(IMPL)):
            check(run, on_device(args), kind, scale=2.0, normalize_weight=normalize, **options)


@pytest.mark.parametrize("basis", BASES)
def test_equal_bits(basis: str) -> None:
    args, options = make(31, (127,), 10, basis=basis)
    args = on_device(args)
    first = value_and_grad(IMPL)(*args, **options)
    for _ in range(20 if ON_CUDA else 1):
        again = value_and_grad(IMPL)(*args, **options)
        assert all(a is b or torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("basis", BASES)
def test_cuda_graph_with_changed_inputs(basis: str) -> None:
    def new() -> Any:
        return on_device(make(37, (127,), 10, basis=basis)[0])

    options = {"basis": basis, "normalize_weight": True, "label_smoothing": 0.1}
    run, static = through_autograd(IMPL), new()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run(*static, **options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured: list[Tensor] = list(run(*static, **options))
    for seed in range(3):
        torch.manual_seed(seed)
        fresh = new()
        with no_sync():
            for into, changed in zip(static, fresh, strict=True):
                if into is not None:
                    into.copy_(changed)
            graph.replay()
        for a, b in zip(captured, run(*fresh, **options), strict=True):
            torch.testing.assert_close(a, b)
        assert captured[0].isfinite()
