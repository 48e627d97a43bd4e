"""Class goodness on the device: the error rule, equal bits, graphs, no host read."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.gpu.device import DEVICE, INTERPRETED, MARKS, ON_CUDA, no_sync
from tests.ops.cases import TARGETS
from tests.ops.test_class_goodness_cross_entropy import FORMS, check, make, through_autograd, value_and_grad

pytestmark = MARKS
IMPL = "triton" if ON_CUDA or INTERPRETED else "aten"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def served(dtype: torch.dtype) -> None:
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter computes bfloat16 wrongly")


def on_device(args: Any) -> Any:
    return tuple(t if t is None else t.to(DEVICE) for t in args)


# Rows, channels, side, classes: the map, the Gram form, groups of one channel.
SIZES = [(31, 16, 7, 10), (9, 8, 16, 100), (3, 10, 1, 10), (5, 100, 3, 100)]
FULL = [(128, 64, 32, 100), (64, 256, 14, 1000), (128, 200, 16, 100)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", SIZES + (FULL if ON_CUDA else []), ids=str)
def test_sizes(size: tuple[int, int, int, int], form: str, dtype: torch.dtype) -> None:
    served(dtype)
    rows, channels, side, classes = size
    if form == "groups" and channels % classes:
        channels = classes
    for kind, last in itertools.product(TARGETS if ON_CUDA else TARGETS[2:], (False, True)):
        args, options = make(rows, channels, (side, side), classes, form=form, kind=kind, dtype=dtype, last=last)
        for run in (value_and_grad(IMPL), through_autograd(IMPL)):
            check(run, on_device(args), f"{kind} {last}", **options)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("classes", [2, 8])
def test_equal_bits(classes: int, form: str) -> None:
    args, options = make(31, 8, (5, 3), classes, form=form)
    args = on_device(args)
    first = value_and_grad(IMPL)(*args, **options)
    for _ in range(20 if ON_CUDA else 1):
        again = value_and_grad(IMPL)(*args, **options)
        assert all(a is b or torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("classes", [2, 8])
def test_cuda_graph_with_changed_inputs(classes: int, form: str) -> None:
    def new() -> Any:
        return on_device(make(37, 8, (9, 9), classes, form=form)[0])

    options = {"num_classes": classes, "margin": 0.5, "label_smoothing": 0.1}
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
