"""The Triton kernels on the device: the error rule over ragged sizes, unwritten memory, graphs, and equal bits."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlocal import ops
from fastlocal.ops import pool_linear_cross_entropy, pool_linear_cross_entropy_value_and_grad
from fastlocal.ops.pool_linear_cross_entropy import COUNT_ROWS, FUSED_WEIGHT, MAX_CLASSES, chunk_classes
from tests.gpu.device import DEVICE, INTERPRETED, MARKS, ON_CUDA, no_sync, peak_bytes
from tests.ops.cases import ALL, check, make, rival, to_double
from tests.ops.test_pool_linear_cross_entropy import poisoned, through_autograd, value_and_grad

pytestmark = MARKS
IMPL = "triton" if ON_CUDA or INTERPRETED else "aten"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FUSED, FROM_LOGITS, CHUNKS = (16, 10), (70, 1000), (6, 1300)  # channels and classes of the three routes
ROUTES = [FUSED, FROM_LOGITS, CHUNKS]


def on_device(args: Any) -> Any:
    return tuple(t if t is None else t.to(DEVICE) for t in args)


def made(*sizes: Any, **options: Any) -> Any:
    """Arguments and options, on the device."""
    args, found = make(*sizes, **options)
    return on_device(args), {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in found.items()}


def served(dtype: torch.dtype) -> None:
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter computes bfloat16 wrongly")


def test_triton_is_chosen() -> None:
    args = on_device(make(4, 3, (2, 2), 5)[0])
    choice = ops.explain(pool_linear_cross_entropy, *args)
    assert choice.chosen == IMPL, str(choice)
    assert FUSED[0] * FUSED[1] <= FUSED_WEIGHT < FROM_LOGITS[0] * FROM_LOGITS[1] and CHUNKS[1] > MAX_CLASSES


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [2, 10, 100, 1000])
@pytest.mark.parametrize("side", [1, 7, 32])
def test_ragged_sizes(side: int, classes: int, dtype: torch.dtype) -> None:
    served(dtype)
    channels = {1: 127, 7: 31, 32: 3}[side]
    kinds = ALL if dtype == torch.float32 else ("smoothed", "probabilities")
    for rows, kind in itertools.product([1, 31, 127] if not INTERPRETED else [3], kinds):
        last = rows == 31 and side > 1
        args, options = made(rows, channels, (side, side), classes, kind=kind, dtype=dtype, channels_last=last)
        check(value_and_grad(IMPL), args, f"{rows} rows, {kind}, channels_last={last}", **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels, classes", ROUTES)
def test_channels_last(channels: int, classes: int, dtype: torch.dtype) -> None:
    served(dtype)
    args, options = made(9, channels, (8, 8), classes, kind="smoothed", dtype=dtype, channels_last=True)
    assert args[0].is_contiguous(memory_format=torch.channels_last)
    for form in (value_and_grad(IMPL), through_autograd(IMPL)):
        check(form, args, **options)


@pytest.mark.parametrize("pool", ["tokens", "cls", "none"])
@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("bias", [True, False])
def test_pools(pool: str, kind: str, bias: bool) -> None:
    args, options = made(9, 7, (), 5, kind=kind, bias=bias)
    if pool in ("tokens", "cls"):
        args = (torch.randn(9, 6, 7, device=DEVICE), *args[1:])
    check(value_and_grad(IMPL), args, pool=pool, **options)


def test_float32_parameters_with_half_precision_features() -> None:
    dtype = torch.bfloat16 if ON_CUDA else torch.float16  # a CPU rounds the sum of bfloat16 features
    args, _ = make(8, 6, (4, 4), 5, dtype=dtype)
    x, weight, bias, target = on_device((args[0], args[1].float(), args[2].float(), args[3]))
    got = pool_linear_cross_entropy_value_and_grad(x, weight, bias, target, impl=IMPL)
    assert [t.dtype for t in got] == [torch.float32, torch.int64, dtype, torch.float32, torch.float32]
    for g, t in zip(got[2:], rival(to_double((x, weight, bias, target)))[2:], strict=True):
        torch.testing.assert_close(g.double(), t, rtol=1e-2 if g.dtype == dtype else 1e-5, atol=1e-7)


@pytest.mark.parametrize("channels, classes", ROUTES)
@pytest.mark.parametrize("kind", ALL)
def test_poisoned_memory(kind: str, channels: int, classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    args, options = made(7, channels, (3, 3), classes, kind=kind)
    clean = pool_linear_cross_entropy_value_and_grad(*args, impl=IMPL, **options)
    with poisoned(monkeypatch):
        assert torch.empty(1, device=DEVICE).isnan()
        dirty = pool_linear_cross_entropy_value_and_grad(*args, impl=IMPL, **options)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("channels, classes", ROUTES)
def test_no_row_counts(rows: int, channels: int, classes: int) -> None:
    args = on_device(make(rows, channels, (2, 2), classes)[0])
    args[3].fill_(-100)
    loss, correct, *grads = pool_linear_cross_entropy_value_and_grad(*args, impl=IMPL)
    assert loss.isnan() and correct.item() == 0
    assert all(g.shape == t.shape and not g.any() for g, t in zip(grads, args[:3], strict=True))


@pytest.mark.skipif(
    IMPL == "aten", reason="an index out of range raises there; on a device it is the kernel's to notice"
)
def test_a_class_that_does_not_exist_gives_nan() -> None:
    args = on_device(make(4, 3, (2, 2), 5)[0])
    for bad in (5, -1):
        args[3][1] = bad
        assert pool_linear_cross_entropy(*args, impl=IMPL)[0].isnan()


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs one program after the other, for minutes")
@pytest.mark.parametrize("kind", ["ignored", "weighted"])
def test_more_rows_than_a_program_counts(kind: str) -> None:
    args, options = made(COUNT_ROWS + 1, 3, (1, 1), 4, kind=kind)
    check(value_and_grad(IMPL), args, **options)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs one program after the other, for minutes")
@pytest.mark.parametrize("kind", ["smoothed", "weighted probabilities"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_classes(dtype: torch.dtype, kind: str) -> None:
    """As many chunks as a large head has, and no more memory than they need."""
    rows, channels, classes = (512, 256, 50_000) if ON_CUDA else (64, 8, 9000)
    args, options = made(rows, channels, (), classes, kind=kind, dtype=dtype)
    check(value_and_grad(IMPL), args, pool="none", **options)
    chunk = chunk_classes(rows, classes)

    def run() -> Any:
        return pool_linear_cross_entropy_value_and_grad(*args, pool="none", impl=IMPL, **options)

    run()
    weight = 4 * classes * channels  # in float32: its gradient, and one chunk's part of it and of the weight
    assert peak_bytes(run) < 2 * weight + 4 * rows * chunk * 4 + (64 << 20 if ON_CUDA else 1 << 20)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm(dtype: torch.dtype, training: bool) -> None:
    served(dtype)
    args, options = made(31, 16, (5, 5), 10, kind="weighted", dtype=dtype)
    norm = torch.nn.BatchNorm1d(16).to(DEVICE).train(training)
    twin = copy.deepcopy(norm)
    x, *rest = args
    got = pool_linear_cross_entropy_value_and_grad(x, *rest, norm=norm, **options)
    want = pool_linear_cross_entropy_value_and_grad(x, *rest, norm=twin, impl="reference", **options)
    for a, b in zip((*got, *norm.buffers()), (*want, *twin.buffers()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4 if a.dtype != torch.bfloat16 else 2e-2, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels, classes", ROUTES)
def test_the_same_bits_every_time(channels: int, classes: int, dtype: torch.dtype) -> None:
    served(dtype)
    args = on_device(make(128 if ON_CUDA else 9, channels, (16, 16), classes, dtype=dtype)[0])
    first = pool_linear_cross_entropy_value_and_grad(*args, impl=IMPL)
    for _ in range(20 if ON_CUDA else 2):
        again = pool_linear_cross_entropy_value_and_grad(*args, impl=IMPL)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_no_gradient_of_the_features_in_memory() -> None:
    """The gradient of the pool is a view: backward allocates nothing of the size of the features."""
    args = on_device(make(64, 16, (64, 64), 10)[0])
    leaves = [t.requires_grad_() for t in args[:3]]

    def step() -> tuple[Tensor, ...]:
        loss, _ = pool_linear_cross_entropy(*leaves, args[3], impl=IMPL if not INTERPRETED else "aten")
        return torch.autograd.grad(loss, leaves)

    step()
    assert peak_bytes(step) < args[0].numel() * 4 / 20


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels, classes", ROUTES)
@pytest.mark.parametrize("form", ["value and gradients", "autograd"])
def test_cuda_graph_with_changed_inputs(form: str, channels: int, classes: int, dtype: torch.dtype) -> None:
    def run(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> list[Tensor]:
        if form == "autograd":
            return list(through_autograd("triton")(x, weight, bias, target))
        return list(pool_linear_cross_entropy_value_and_grad(x, weight, bias, target, impl="triton"))

    static = on_device(make(37, channels, (9, 9), classes, dtype=dtype)[0])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(*static)
    for seed in range(3):
        torch.manual_seed(seed)
        fresh = on_device(make(37, channels, (9, 9), classes, dtype=dtype)[0])
        with no_sync():
            for into, new in zip(static, fresh, strict=True):
                into.copy_(new)
            graph.replay()
        expected = run(*fresh)
        for a, b in zip(captured, expected, strict=True):
            torch.testing.assert_close(a, b)
        assert captured[0].isfinite()


@pytest.mark.gpu
def test_compiled_by_inductor() -> None:
    args = on_device(make(16, 8, (4, 4), 10)[0])
    leaves = [t.requires_grad_() for t in args[:3]]

    def loss_of(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return pool_linear_cross_entropy(x.relu(), weight, bias, args[3], impl="triton")[0]

    expected = torch.autograd.grad(loss_of(*leaves), leaves)
    got = torch.autograd.grad(torch.compile(loss_of, fullgraph=True)(*leaves), leaves)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
