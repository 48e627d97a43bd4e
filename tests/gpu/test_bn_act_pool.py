"""bn_act_pool's kernels on the device: the error rule, unwritten memory, equal bits, no host read, and graphs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlocal import ops
from fastlocal.ops import bn_act_pool
from tests.gpu.device import DEVICE, INTERPRETED, MARKS, ON_CUDA, no_sync, peak_bytes
from tests.ops.test_bn_act_pool import ACTS, RESIDUALS, check, make, run, settle
from tests.ops.test_pool_linear_cross_entropy import poisoned

pytestmark = MARKS
IMPL = "triton" if ON_CUDA or INTERPRETED else "aten"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One launch in one tile, in several, and two launches; channels side by side in one launch and in two.
MAPS = [
    ((8, 3, 8, 8), False),
    ((48, 3, 17, 17), False),
    ((2, 3, 130, 130), False),
    ((9, 5, 7, 7), True),
    ((70, 37, 8, 8), True),
]
FULL = [
    ((8, 64, 8, 8), False),
    ((1024, 64, 8, 8), False),
    ((1024, 64, 8, 8), True),
    ((128, 16, 32, 32), False),
    ((128, 16, 32, 32), True),
    ((256, 2048, 7, 7), False),
    ((256, 2048, 7, 7), True),
    ((1024, 512), False),
]


def on_device(args: Any) -> Any:
    return tuple(None if t is None else copy.deepcopy(t).to(DEVICE) for t in args)


def served(dtype: torch.dtype) -> None:
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter computes bfloat16 wrongly")


def operator(*args: Any, **options: Any) -> Tensor:
    return bn_act_pool(*args, impl=IMPL, **options)


def test_triton_is_chosen() -> None:
    x, norm, *_ = on_device(make((4, 3, 2, 2)))
    chosen = ops.explain(bn_act_pool, x, norm).chosen
    assert chosen == (IMPL if IMPL == "triton" else "reference")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", RESIDUALS)
@pytest.mark.parametrize("shape, last", MAPS)
def test_error_rule(shape: tuple[int, ...], last: bool, kind: int, dtype: torch.dtype) -> None:
    served(dtype)
    for training in (True, False):
        act = ACTS[(kind + training) % 3]
        check(on_device(make(shape, dtype, kind, last, training)), IMPL, f"training={training} {act}", act)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [3, 31, 63, 127, 1000])
def test_ragged_sizes(rows: int, dtype: torch.dtype) -> None:
    served(dtype)
    for shape, kind in (((rows, 3, 1, 1), 1), ((rows, 5), 2), ((3, 2, rows), 0), ((2, rows, 3, 3), 2)):
        check(on_device(make(shape, dtype, kind)), IMPL, f"{shape}")


@pytest.mark.parametrize("kind", RESIDUALS)
@pytest.mark.parametrize("shape, last", MAPS)
def test_mean_far_from_zero(shape: tuple[int, ...], last: bool, kind: int) -> None:
    check(on_device(make(shape, kind=kind, last=last, mean=1e3)), IMPL, act="none")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [0, 2])
@pytest.mark.parametrize("shape, last", FULL)
def test_full_sizes(shape: tuple[int, ...], last: bool, kind: int, dtype: torch.dtype) -> None:
    x, norm, residual, residual_norm, dpooled = make(shape, dtype, kind, last)
    args = on_device((x, norm, residual, residual_norm, dpooled))
    check(args, IMPL, act="none")
    if x.numel() < 1 << 23:
        check(args, IMPL)


@pytest.mark.parametrize("kind", RESIDUALS)
@pytest.mark.parametrize("shape, last", MAPS)
def test_poisoned_memory_and_equal_bits(
    shape: tuple[int, ...], last: bool, kind: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = on_device(make(shape, kind=kind, last=last))
    clean = run(operator, args)
    with poisoned(monkeypatch):
        assert torch.empty(1, device=DEVICE).isnan()
        dirty = run(operator, args)
    for name, value in clean.items():
        assert torch.equal(value, dirty[name]), name
    for _ in range(10 if ON_CUDA else 1):
        again = run(operator, args)
        assert all(torch.equal(value, clean[name]) for name, value in again.items())


@pytest.mark.gpu
def test_the_activation_is_never_in_memory() -> None:
    x, norm, _, _, dpooled = on_device(make((64, 8, 32, 32)))
    x.requires_grad_()

    def forward() -> Tensor:
        return operator(x, norm)

    operator(x, norm).backward(dpooled)
    assert peak_bytes(forward) < x.nbytes / 8
    x.grad = None
    assert peak_bytes(lambda: operator(x, norm).backward(dpooled)) < x.nbytes * 1.25  # the gradient alone


@pytest.mark.parametrize("kind", RESIDUALS)
def test_no_host_read(kind: int) -> None:
    x, norm, residual, residual_norm, dpooled = on_device(make((9, 3, 4, 4), kind=kind))
    leaves = x.requires_grad_(), None if residual is None else residual.requires_grad_()
    operator(leaves[0], norm, leaves[1], residual_norm=residual_norm).backward(dpooled)
    with no_sync():
        operator(leaves[0], norm, leaves[1], residual_norm=residual_norm).backward(dpooled)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", RESIDUALS)
@pytest.mark.parametrize("shape, last", MAPS)
def test_cuda_graph_with_changed_inputs(shape: tuple[int, ...], last: bool, kind: int, dtype: torch.dtype) -> None:
    def step(x: Tensor, norm: Any, residual: Any, residual_norm: Any, dpooled: Tensor) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (x, residual) if t is not None]
        pooled = operator(leaves[0], norm, leaves[1] if kind else None, residual_norm=residual_norm)
        parameters = [p for n in (norm, residual_norm) if n is not None for p in n.parameters()]
        return [pooled, *torch.autograd.grad(pooled, leaves + parameters, dpooled)]

    static = on_device(make(shape, dtype, kind, last))
    norms = [n for n in (static[1], static[3]) if n is not None]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*static)
    for seed in range(3):
        torch.manual_seed(seed)
        fresh = on_device(make(shape, dtype, kind, last))
        twins = [copy.deepcopy(n) for n in norms]
        with no_sync():
            for into, new in zip((static[0], static[2], static[4]), (fresh[0], fresh[2], fresh[4]), strict=True):
                if into is not None:
                    into.copy_(new)
            graph.replay()
        expected = step(fresh[0], twins[0], fresh[2], twins[1] if kind == 2 else None, fresh[4])
        for a, b in zip(captured, expected, strict=True):
            assert torch.equal(a, b)
        for n, twin in zip(norms, twins, strict=True):
            for name, value in n.state_dict().items():
                assert torch.equal(value, twin.state_dict()[name]), name


@pytest.mark.gpu
def test_compiled_by_inductor() -> None:
    x, norm, residual, residual_norm, dpooled = settle(make((16, 8, 4, 4), kind=2))
    args = on_device((x, norm, residual, residual_norm, dpooled))
    want = run(operator, args)
    leaf = args[0].clone().requires_grad_()

    def step(x: Tensor) -> Tensor:
        return operator(x * 1, args[1], args[2], residual_norm=args[3]) * 1

    pooled = torch.compile(step, fullgraph=True)(leaf)
    pooled.backward(args[4])
    torch.testing.assert_close(pooled, want["pooled"])
    torch.testing.assert_close(leaf.grad, want["dx"])
    torch.testing.assert_close(args[1].running_var, want["running_var"])
