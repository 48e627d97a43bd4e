"""A step never waits for the device, so the host runs ahead of it and a CUDA graph could hold it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlocal as fl
from fastlocal.engine.carrier import LossScale
from fastlocal.ops import pool_linear_cross_entropy
from tests.gpu.device import (
    DEVICE,
    INTERPRETED,
    MARKS,
    METHODS,
    ON_CUDA,
    OPTIMIZERS,
    batches,
    engine,
    in_fp16,
    no_sync,
    resnet,
    vit,
)

pytestmark = MARKS


def steps_without_sync(model: fl.LocalModel, make: Any, **options: Any) -> None:
    run = engine(model, make, **options)
    first, *rest = batches(4)
    run.step(*first)  # looks at the values of the targets, and makes the optimizer's state
    with no_sync():
        for x, y in rest:
            out = run.step(x, y)
        correct = out.correct
    assert out.losses.isfinite().all() and out.losses.device.type == DEVICE
    assert correct.shape == (len(model.blocks),) and run.steps == 4
    assert not run._guard.skipped.any(), "a skipped step does less"


@pytest.mark.parametrize("update", ["immediate", "end"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_engine(method: str, optimizer: str, update: str) -> None:
    steps_without_sync(resnet(method), OPTIMIZERS[optimizer], update=update)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("method", METHODS)
def test_engine_in_half_precision(method: str, precision: str) -> None:
    model = resnet(method)
    if precision == "16-mixed" and not in_fp16(model):
        return  # refused; tests/gpu/test_levels.py
    run = engine(model, precision=precision, memory_format="channels_last")
    first, *rest = batches(4)
    run.step(*first)
    with no_sync():
        for x, y in rest:
            run.step(x, y)


@pytest.mark.parametrize(
    "options", [{"deterministic": True}, {"nonfinite": "skip"}, {"memory_format": "channels_last"}]
)
@pytest.mark.filterwarnings("ignore:.*deterministic.*:UserWarning")
def test_engine_options(options: dict[str, Any]) -> None:
    steps_without_sync(vit(dropout=0.1), OPTIMIZERS["sgd"], **options)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_level_a_forward_and_backward(method: str, dtype: torch.dtype | None) -> None:
    model = resnet(method).to(DEVICE)
    if dtype == torch.float16 and not in_fp16(model):
        return
    model._check_targets = ON_CUDA  # on a CPU their values are looked at, and nobody waits
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for i, (x, y) in enumerate(batches(3)):
        optimizer.zero_grad()
        if i == 0 and dtype == torch.float16:  # at the first scale such a small network overflows
            device = next(model.parameters()).device
            model._scales[str(device)] = LossScale(len(model.blocks), device, start=2.0**8)
        with no_sync():
            with torch.autocast(DEVICE, dtype or torch.bfloat16, enabled=dtype is not None):
                out = model(x, y)
            out.loss.backward()
            optimizer.step()
            correct = out.correct
    assert out.losses.isfinite().all() and correct.shape == (len(model.blocks),)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_read_is_noticed() -> None:
    """The tests above can fail."""
    loss = engine(vit()).step(*batches(1)[0]).loss
    with pytest.raises((RuntimeError, AssertionError)), no_sync():
        loss.item()
    if ON_CUDA:
        assert torch.cuda.get_sync_debug_mode() == 0
        with pytest.raises(RuntimeError), no_sync():
            torch.zeros(2).to(DEVICE)


@pytest.mark.parametrize("impl", [None, "aten"])
@pytest.mark.parametrize("rows", [8, 5000] if not INTERPRETED else [8])  # beyond 4096 rows the kernel reads a count
def test_operator(rows: int, impl: str | None) -> None:
    x, w, b = (torch.randn(s, device=DEVICE, requires_grad=True) for s in ((rows, 6, 3, 3), (5, 6), (5,)))
    y = torch.randint(5, (rows,)).to(DEVICE)
    pool_linear_cross_entropy(x, w, b, y, impl=impl)[0].backward()  # compiles the kernels
    with no_sync():
        loss, correct = pool_linear_cross_entropy(x, w, b, y, impl=impl)
        loss.backward()
    assert loss.isfinite() and 0 <= correct.item() <= rows


@pytest.mark.gpu
def test_import_starts_no_cuda() -> None:
    """Nor does cutting a model and training it on the CPU."""
    code = """
import torch, fastlocal as fl
from fastlocal import blocks, engine, methods, models, ops, reference
import fastlocal.triton_kernels.pool_linear_cross_entropy
assert not torch.cuda.is_initialized(), "import"
x, y = torch.randn(4, 3, 16, 16), torch.randint(10, (4,))
model = fl.localize(models.ResNetCIFAR(1, width=4), "dgl", blocks=2, sample=x)
fl.Engine(model, lambda named: torch.optim.SGD(named, lr=0.1), deterministic=True).step(x, y)
model(x, y).loss.backward()
ops.pool_linear_cross_entropy(x, torch.randn(10, 3), None, y)
assert not torch.cuda.is_initialized(), "training on the CPU"
"""
    root = Path(fl.__file__).resolve().parents[1]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr[-2000:]
