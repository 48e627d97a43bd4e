"""Every method at both levels against one step in float64 on the CPU.

The rule: the error is at most twice that of plain PyTorch (the sum of detached losses, one optimizer) in the same dtype, layout
and device, plus one rounding of the result.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlocal as fl
from fastlocal.blocks.links import fire
from fastlocal.errors import ArgumentError
from tests.engine.baseline import SumOfLosses
from tests.engine.nets import TorchvisionStyleResNet
from tests.gpu.device import (
    DEVICE,
    MARKS,
    METHODS,
    OF_TOKENS,
    ON_CUDA,
    batches,
    engine,
    gpt,
    in_fp16,
    resnet,
    sgd,
    tokens,
    vit,
)  # fmt: skip

pytestmark = MARKS
PRECISIONS = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
SCALE = 2.0**8  # of fp16; at the engine's first scale such small networks overflow

State = dict[str, Tensor]
# Local losses (or their sum), and how far every parameter and statistic moved; in float64 on the CPU.
Result = tuple[Tensor, State]


def moved(model: torch.nn.Module, start: State) -> State:
    return {n: t.double().cpu() - start[n] for n, t in model.state_dict().items() if t.is_floating_point()}


def start_of(model: fl.LocalModel) -> State:
    return {n: t.double() for n, t in model.state_dict().items()}


def on_device(model: fl.LocalModel, layout: str) -> fl.LocalModel:
    own = copy.deepcopy(model).to(DEVICE)
    return own.to(memory_format=torch.channels_last) if layout == "channels_last" else own  # type: ignore[call-overload]


def inputs(model: fl.LocalModel, layout: str = "") -> tuple[Tensor, Tensor]:
    x, y = (tokens if model.method.name in OF_TOKENS else batches)(1)[0]
    return (x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x), y


def autocast(dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return torch.autocast(DEVICE, dtype or torch.bfloat16, enabled=dtype is not None)


def truth(model: fl.LocalModel) -> Result:
    own = copy.deepcopy(model).double()
    x, y = (t.cpu() for t in inputs(own))
    x = x.double() if x.is_floating_point() else x
    losses = fl.reference.train_step(own, (x, y), sgd(own.parameters()))
    return torch.stack(losses), moved(own, start_of(model))


def plain(model: fl.LocalModel, dtype: torch.dtype | None, layout: str) -> Result:
    own = on_device(model, layout)
    x, y = inputs(own, layout)
    if not in_fp16(own):  # a sum of detached losses is another step
        optimizer = sgd(own.parameters())
        with autocast(dtype):
            losses = fl.reference.train_step(own, (x, y), optimizer)
        return torch.stack(losses).sum().double().cpu(), moved(own, start_of(model))
    net, optimizer = SumOfLosses(own).train(), sgd(own.parameters())
    with autocast(dtype):
        loss = net(x, y)["loss"]
    scale = SCALE if dtype == torch.float16 else 1.0
    (loss * scale).backward()
    for p in own.parameters():
        if p.grad is not None:
            p.grad /= scale
    fire(own.links, "after_backward")
    optimizer.step()
    return loss.detach().double().cpu(), moved(own, start_of(model))


def level_a(model: fl.LocalModel, dtype: torch.dtype | None, layout: str) -> Result:
    from fastlocal.engine.carrier import LossScale

    own = on_device(model, layout)
    x, y = inputs(own, layout)
    if dtype == torch.float16:
        device = next(own.parameters()).device
        own._scales[str(device)] = LossScale(len(own.blocks), device, start=SCALE)
    optimizer = sgd(own.parameters())
    with autocast(dtype):
        out = own(x, y)
    out.loss.backward()
    optimizer.step()
    return out.losses.double().cpu(), moved(own, start_of(model))


def level_b(model: fl.LocalModel, precision: str, layout: str, **options: Any) -> Result:
    run = engine(copy.deepcopy(model), precision=precision, memory_format=layout, **options)
    for scale in run._scales or []:
        scale.fill_(SCALE)
    losses = run.step(*inputs(model)).losses
    assert not run._guard.skipped.any()
    return losses.double().cpu(), moved(run.model, start_of(model))


def error(got: State, true: State) -> float:
    return float(sum((got[n] - t).square().sum() for n, t in true.items())) ** 0.5


def compare(got: Result, rival: Result, true: Result, size: float, dtype: torch.dtype | None, what: str) -> None:
    """``size``: norm of the parameters, for the rounding of the result."""
    losses, state = got
    assert state.keys() == true[1].keys()
    assert all(t.isfinite().all() for t in state.values()), what
    floor = torch.finfo(torch.float32).eps
    off, rivals = error(state, true[1]), error(rival[1], true[1])
    length = error({n: torch.zeros_like(t) for n, t in true[1].items()}, true[1])
    assert length > 100 * floor * size, "nothing was trained"
    assert off <= 2 * rivals + floor * size, f"{what}: error {off:.3g} of {length:.3g}, plain PyTorch's {rivals:.3g}"
    total = float(true[0].sum())
    off, rivals = abs(float(losses.sum()) - total), abs(float(rival[0]) - total)
    floor = torch.finfo(dtype or torch.float32).eps * total * len(losses)  # plain PyTorch's sum may be right by luck
    assert off <= 2 * rivals + floor, f"{what}: loss off by {off:.3g}, plain PyTorch's by {rivals:.3g}"


def check(model: fl.LocalModel, precision: str, layout: str) -> None:
    dtype = PRECISIONS[precision]
    true, rival = truth(model), plain(model, dtype, layout)
    size = float(sum(t.detach().double().square().sum() for t in model.parameters())) ** 0.5
    compare(level_a(model, dtype, layout), rival, true, size, dtype, "level A")
    for update in ("immediate", "end"):
        compare(level_b(model, precision, layout, update=update), rival, true, size, dtype, f"level B, {update}")
    compare(level_b(model, precision, layout, backend="reference"), rival, true, size, dtype, "level B, reference")


@pytest.mark.parametrize("layout", ["preserve", "channels_last"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", METHODS)
def test_resnet(method: str, precision: str, layout: str) -> None:
    model = resnet(method)
    if precision == "16-mixed" and not in_fp16(model):
        with pytest.raises(ArgumentError, match="bf16"):
            engine(model, precision=precision)
        return
    check(model, precision, layout)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", ["dgl", "predsim"])
def test_vit(method: str, precision: str) -> None:
    check(vit(method), precision, "preserve")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", OF_TOKENS)
def test_gpt(method: str, precision: str) -> None:
    check(gpt(method), precision, "preserve")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_network_cut_by_hooks(precision: str) -> None:
    torch.manual_seed(0)
    net = TorchvisionStyleResNet(num_classes=10, width=8)
    model = fl.localize(net, "dgl", blocks=["layer1", "layer2.0"], sample=torch.randn(2, 3, 16, 16))
    check(model, precision, "preserve")


def test_tf32_convolutions_stay_within_the_rule() -> None:
    """PyTorch's default on CUDA; everywhere else in this folder it is off."""
    torch.backends.cudnn.allow_tf32 = True
    check(resnet("dgl"), "32-true", "channels_last")


def test_several_steps_go_on_as_plain_pytorch_does() -> None:
    """Momentum, statistics and the second update: the losses of ten steps, fused step and all."""
    model, data = vit(), batches(10)
    own, run = on_device(model, "preserve"), engine(copy.deepcopy(model))
    net, optimizer = SumOfLosses(own).train(), sgd(own.parameters())
    for x, y in data:
        optimizer.zero_grad()
        loss = net(x, y)["loss"]
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(run.step(x, y).loss, loss.detach(), rtol=1e-3, atol=0)
    assert run.explain().count("fused step in 3 of 3 blocks") == 1
    assert next(run.model.parameters()).device.type == DEVICE and next(own.parameters()).is_cuda == ON_CUDA
