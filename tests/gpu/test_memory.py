"""With update="immediate" only one block's activations and gradients live at a time."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastlocal as fl
from tests.gpu.device import DEVICE, MARKS, ON_CUDA, engine, peak_bytes, sgd

pytestmark = MARKS
ROWS, IMAGE = (128, 32) if ON_CUDA else (8, 32)
METHODS: dict[str, dict[str, Any]] = {"dgl": {}, "auglocal": {"depth": 3}}


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return fl.models.create("resnet110")


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(ROWS, 3, IMAGE, IMAGE).to(DEVICE), torch.randint(10, (ROWS,)).to(DEVICE)


def backprop_peak(net: torch.nn.Module, precision: str) -> int:
    own = copy.deepcopy(net).to(DEVICE)
    optimizer, (x, y) = sgd(own.parameters()), batch()

    def step() -> None:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=precision != "32-true"):
            loss = F.cross_entropy(own(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return peak_bytes(step)


def local_peak(net: torch.nn.Module, method: str, **options: Any) -> int:
    x, y = batch()
    model = fl.localize(copy.deepcopy(net), method, blocks=16, sample=x[:2].cpu(), **METHODS[method])
    run = engine(model, **options)
    run.step(x, y)
    peak = peak_bytes(lambda: run.step(x, y))
    assert all(p.grad is None for p in model.parameters())
    return peak


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("method", METHODS)
def test_resnet110_in_16_blocks(method: str, precision: str, net: torch.nn.Module, record_property: Any) -> None:
    rival = backprop_peak(net, precision)
    peak = local_peak(net, method, precision=precision)
    end = local_peak(net, method, precision=precision, update="end")
    figures = {"bp": rival, "immediate": peak, "end": end, "part of bp": round(peak / rival, 3)}
    for name, value in figures.items():
        record_property(name, value)
    print(f"ResNet-110, {method} K=16, {precision}, batch {ROWS}: {figures}")
    assert peak <= 0.5 * rival
    assert peak <= end, "gradients that live to the end of the step take memory"


def live_bytes() -> int:
    gc.collect()
    if ON_CUDA:
        return torch.cuda.memory_allocated()
    return sum(o.untyped_storage().nbytes() for o in gc.get_objects() if type(o) in (Tensor, torch.nn.Parameter))


def test_nothing_accumulates_over_steps() -> None:
    x, y = batch()
    model = fl.localize(fl.models.create("resnet20"), "dgl", blocks=4, sample=x[:2].cpu())
    run = engine(model)
    peaks = []
    for _ in range(5):
        peaks.append(peak_bytes(lambda: run.step(x, y)))
    assert max(peaks[1:]) <= 1.01 * min(peaks[1:]), peaks
    before = live_bytes()
    for _ in range(5):
        run.step(x, y)
    assert live_bytes() == before
