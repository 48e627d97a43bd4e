"""bn_act_conv on the device: the error rule, autocast, memory, graphs."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastlocal import ops, reference
from fastlocal.ops import bn_act_conv
from tests.gpu.device import DEVICE, INTERPRETED, MARKS, ON_CUDA, no_sync, peak_bytes
from tests.ops.norms import check_conv, make

pytestmark = MARKS
IMPL = "triton" if ON_CUDA or INTERPRETED else "aten"
served = partial(bn_act_conv, impl=IMPL)
CASES: list[tuple[tuple[int, ...], bool, Any]] = [
    ((16, 12, 8, 8), False, lambda: nn.Conv2d(12, 8, 3, padding=1)),
    ((33, 6, 7, 9), True, lambda: nn.Conv2d(6, 9, 3, stride=2, groups=3, bias=False)),
    ((37, 6, 31, 31), False, lambda: nn.Conv2d(6, 6, 1)),
    ((127, 33), False, lambda: nn.Linear(33, 10)),
]
SOME = CASES if not INTERPRETED else CASES[:1]


def setting(shape: tuple[int, ...], last: bool, build: Any, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, Any]:
    case = make(shape, dtype, last=last).to(DEVICE)
    return case.x, case.norm, build().to(DEVICE, dtype)


def test_triton_is_chosen() -> None:
    choice = ops.explain(bn_act_conv, *setting(*CASES[0]))
    assert choice.chosen == (IMPL if IMPL == "triton" else "reference"), str(choice)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape, last, build", SOME)
def test_error_rule(shape: tuple[int, ...], last: bool, build: Any, dtype: torch.dtype) -> None:
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter computes bfloat16 wrongly")
    if not ON_CUDA and dtype == torch.float16 and len(shape) == 4:
        pytest.skip("float16 convolutions are not PyTorch's on every CPU")
    for act in ("relu", "leaky_relu", "none"):
        check_conv(served, *setting(shape, last, build, dtype), act=act)


@pytest.mark.skipif(not ON_CUDA, reason="too large for one program after the other")
@pytest.mark.parametrize(
    "shape, last", [((128, 16, 32, 32), False), ((128, 64, 8, 8), False), ((32, 256, 28, 28), True)]
)
def test_full_size(shape: tuple[int, ...], last: bool) -> None:
    channels = shape[1]
    check_conv(served, *setting(shape, last, lambda: nn.Conv2d(channels, channels, 3, padding=1, bias=False)))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter computes bfloat16 wrongly")
def test_autocast() -> None:
    x, norm, conv = setting(*CASES[0])
    before = nn.Conv2d(12, 12, 1).to(DEVICE)

    def whole(op: Any) -> list[Tensor]:
        own = [copy.deepcopy(m) for m in (before, norm, conv)]
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            y = op(own[0](x), own[1], own[2])
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        return [y.detach(), *(p.grad for m in own for p in m.parameters())]

    for got, want in zip(whole(served), whole(reference.bn_act_conv), strict=True):
        assert got.dtype == want.dtype and (got.double() - want.double()).norm() <= 0.02 * want.double().norm()


def test_memory() -> None:
    """Nothing of the map's size is kept, and a step holds two maps beside the input at the most."""
    x, norm, conv = setting((32, 16, 32, 32), False, lambda: nn.Conv2d(16, 16, 1, bias=False))
    impl = IMPL if not INTERPRETED else "aten"

    def step() -> None:
        bn_act_conv(x.requires_grad_(), norm, conv, impl=impl).sum().backward()
        x.grad = norm.weight.grad = norm.bias.grad = conv.weight.grad = None

    step()
    # Forward: activation, y. Backward: activation, gradient (which dx overwrites); the gradient of y is a view.
    workspace = 8 << 20 if ON_CUDA else 100_000  # cuDNN's
    assert peak_bytes(step) <= 3 * x.numel() * 4 + workspace


@pytest.mark.parametrize("shape, last, build", SOME)
def test_no_waiting(shape: tuple[int, ...], last: bool, build: Any) -> None:
    x, norm, conv = setting(shape, last, build)
    y = served(x.requires_grad_(), norm, conv)
    dy = torch.randn_like(y)
    y.backward(dy)
    with no_sync():
        served(x, norm, conv).backward(dy)


@pytest.mark.gpu
@pytest.mark.parametrize("shape, last, build", CASES)
def test_cuda_graph_with_changed_inputs(shape: tuple[int, ...], last: bool, build: Any) -> None:
    static, norm, conv = setting(shape, last, build)
    static.requires_grad_()
    leaves = [static, *norm.parameters(), *conv.parameters()]
    dy = torch.randn_like(conv(static))

    def run() -> list[Tensor]:
        y = served(static, norm, conv)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

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
        new = torch.randn_like(static)
        with no_sync(), torch.no_grad():
            static.copy_(new)
            graph.replay()
        replayed = [t.clone() for t in captured]
        for a, b in zip(replayed, run(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
