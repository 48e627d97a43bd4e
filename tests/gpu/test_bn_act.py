"""bn_act on the device: the error rule over ragged and full sizes, unwritten memory, graphs, equal bits, no waiting."""

from __future__ import annotations

import copy
import itertools
import sys
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlocal import ops, reference
from fastlocal.ops import bn_act
from tests.gpu.device import DEVICE, INTERPRETED, MARKS, ON_CUDA, no_sync
from tests.ops.norms import Case, make

pytestmark = MARKS
MODULE: Any = sys.modules["fastlocal.ops.bn_act"]
IMPL = "triton" if ON_CUDA or INTERPRETED else "aten"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
served = partial(bn_act, impl=IMPL)
masked = partial(bn_act, impl=IMPL, save="mask")
OPTIONS: list[dict[str, Any]] = [
    dict(act="relu"),
    dict(act="relu", residual="plain"),
    dict(act="leaky_relu", residual="norm"),
    dict(act="none", residual="plain"),
    dict(act="leaky_relu", residual="plain", slope=-0.5),
    dict(act="none"),
    dict(act="relu", residual="norm"),
]
# A matrix, small maps (one launch), large maps, channels_last (two).
ROUTES = [((128, 256), False), ((16, 24, 8, 8), False), ((40, 6, 30, 30), False), ((40, 24, 8, 8), True)]


def on_device(case: Case) -> Case:
    return case.to(DEVICE)


def skip_bfloat16(dtype: torch.dtype) -> None:
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter computes bfloat16 wrongly")


def test_triton_is_chosen() -> None:
    case = on_device(make((4, 3, 2, 2), residual="norm"))
    choice = ops.explain(bn_act, case.x, case.norm, case.residual, residual_norm=case.second, save="mask")
    assert choice.chosen == (IMPL if IMPL == "triton" else "reference"), str(choice)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", [1, 7, 32, 56])
def test_ragged_sizes(side: int, dtype: torch.dtype) -> None:
    skip_bfloat16(dtype)
    options = itertools.cycle(OPTIONS)
    for rows, channels in [(3, 1), (31, 3), (1, 31), (63, 63), (127, 127), (2, 1000)]:
        if (rows == 1 and side == 1) or (side > 7 and rows * channels > 200) or (INTERPRETED and rows * channels > 99):
            continue
        for last in (False, True):
            make((rows, channels, side, side), dtype, last=last, **next(options)).to(DEVICE).check(served)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(127, 31), (1000, 3), (63, 1000), (4, 6, 5), (3, 5, 2, 3, 4)])
def test_other_dimensions(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    skip_bfloat16(dtype)
    for options in OPTIONS[:4] if not INTERPRETED else OPTIONS[1:2]:
        make(shape, dtype, **options).to(DEVICE).check(served)


@pytest.mark.skipif(not ON_CUDA, reason="too large for one program after the other")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape, last",
    [
        ((128, 16, 32, 32), False),
        ((128, 32, 16, 16), False),
        ((128, 64, 8, 8), False),
        ((1024, 16, 32, 32), False),
        ((64, 256, 56, 56), True),
        ((64, 256, 56, 56), False),
        ((64, 2048, 7, 7), False),
        ((65536, 512), False),
    ],
)
def test_full_size(shape: tuple[int, ...], last: bool, dtype: torch.dtype) -> None:
    for options in OPTIONS[:3]:
        make(shape, dtype, last=last, **options).to(DEVICE).check(served)


@pytest.mark.parametrize("shape, last", ROUTES if not INTERPRETED else ROUTES[1:2])
def test_mask(shape: tuple[int, ...], last: bool) -> None:
    for act in ("relu", "leaky_relu"):
        case = on_device(make(shape, last=last, residual="plain", act=act)).steep_apart()
        got, want = case.run(masked), case.run(served)
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, msg=name)


@pytest.mark.parametrize("shape, last", ROUTES if not INTERPRETED else ROUTES[1:2])
def test_mean_far_from_zero(shape: tuple[int, ...], last: bool) -> None:
    for mean, std in ((1e3, 1.0), (-1e3, 1.0), (1e-3, 1e-4)):
        make(shape, last=last, act="none", mean=mean, std=std).to(DEVICE).check(served)


@pytest.mark.parametrize("shape, last", ROUTES if not INTERPRETED else ROUTES[1:2])
def test_poisoned_memory(shape: tuple[int, ...], last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for options, op in itertools.product(OPTIONS[:3], (served, masked)):
        case = on_device(make(shape, last=last, **options))
        clean = case.run(op)
        with monkeypatch.context() as patched:
            for name in ("empty", "empty_like"):
                original = getattr(torch, name)
                patched.setattr(torch, name, lambda *a, original=original, **k: filled(original(*a, **k)))
            assert torch.empty(1, device=DEVICE).isnan()
            dirty = case.run(op)
        for name, value in clean.items():
            assert torch.equal(value, dirty[name]), name


def filled(t: Tensor) -> Tensor:
    return t.fill_(torch.nan if t.is_floating_point() else 113)


@pytest.mark.parametrize("shape, last", ROUTES if not INTERPRETED else ROUTES[1:2])
def test_evaluation(shape: tuple[int, ...], last: bool) -> None:
    for options in OPTIONS:
        case = on_device(make(shape, last=last, **options))
        for norm in (case.norm, case.second):
            if norm is not None:
                norm.eval()
        with torch.no_grad():
            got, want = (case.call(op, case.x, case.residual) for op in (served, reference.bn_act))
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, last", ROUTES if not INTERPRETED else ROUTES[1:2])
def test_the_same_bits_every_time(shape: tuple[int, ...], last: bool, dtype: torch.dtype) -> None:
    skip_bfloat16(dtype)
    case = on_device(make(shape, dtype, last=last, residual="norm"))
    first = case.run(served)
    for _ in range(20 if ON_CUDA else 2):
        again = case.run(served)
        assert all(torch.equal(value, again[name]) for name, value in first.items())


@pytest.mark.parametrize("shape, last", ROUTES if not INTERPRETED else ROUTES[1:2])
def test_no_waiting(shape: tuple[int, ...], last: bool) -> None:
    for options in OPTIONS[:3]:
        case = on_device(make(shape, last=last, **options))
        x, residual = case.x.requires_grad_(), case.residual
        case.call(served, x, residual).backward(case.dy)
        with no_sync():
            case.call(served, x, residual).backward(case.dy)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, last", ROUTES)
def test_cuda_graph_with_changed_inputs(shape: tuple[int, ...], last: bool, dtype: torch.dtype) -> None:
    static = on_device(make(shape, dtype, last=last, residual="plain"))
    static.x.requires_grad_()
    assert static.residual is not None
    static.residual.requires_grad_()

    def run() -> list[Tensor]:
        leaves = [static.x, static.residual, *static.norm.parameters()]
        y = static.call(masked, static.x, static.residual)
        return [y.detach(), *torch.autograd.grad(y, leaves, static.dy)]

    start = copy.deepcopy(static.norm.state_dict())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for seed in range(3):
        torch.manual_seed(seed)
        fresh = on_device(make(shape, dtype, last=last, residual="plain"))
        static.norm.load_state_dict(start)
        with no_sync(), torch.no_grad():
            for into, new in ((static.x, fresh.x), (static.residual, fresh.residual), (static.dy, fresh.dy)):
                into.copy_(new)
            graph.replay()
        replayed = [t.clone() for t in captured], static.norm.running_var.clone()
        static.norm.load_state_dict(start)
        expected = run()
        for a, b in zip(replayed[0], expected, strict=True):
            assert torch.equal(a, b)
        assert torch.equal(replayed[1], static.norm.running_var)


@pytest.mark.gpu
def test_compiled_by_inductor() -> None:
    case = on_device(make((16, 8, 4, 4), residual="norm"))

    def whole(x: Tensor, norm: Any, residual: Tensor, **options: Any) -> Tensor:
        return torch.compile(lambda x, r: bn_act(x * 1, norm, r, **options) * 1, fullgraph=True)(x, residual)

    want = case.run(served)
    for name, value in case.run(whole).items():
        torch.testing.assert_close(value, want[name], rtol=1e-4, atol=1e-4)
