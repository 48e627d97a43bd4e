"""Whole steps with the operators of a GPU's step against the same steps of plain modules."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlocal as fl
from fastlocal import models
from fastlocal.blocks.heads import AvgPool, ClassifierHead, FusedSequential
from fastlocal.blocks.losses import cross_entropy
from fastlocal.blocks.measure import LaunchCounter, SavedBytes
from fastlocal.blocks.types import StepContext
from fastlocal.models.residual import BasicBlock
from fastlocal.ops._dispatch import as_on_gpu

OPTIONS: dict[str, dict[str, Any]] = {"auglocal": {"depth": 2}, "infopro": {"loss": "cross_entropy", "lam": (5.0, 0.5)}}
METHODS = ["bp", "dgl", "auglocal", "predsim", "infopro"]
NETS: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: models.ResNetCIFAR(2, width=4),
    "bottlenecks": lambda: models.ResNet(models.resnet.Bottleneck, (1, 1, 1, 1), width=4, num_classes=10),
    "vgg": lambda: models.vgg8b(feat_mult=0.05, num_hidden=16, nonlin="leakyrelu"),
    "dgl_cnn": lambda: models.dgl_cnn(feature_size=4),
}


def localized(net: str, method: str, **options: Any) -> fl.LocalModel:
    torch.manual_seed(0)
    blocks = 1 if method == "bp" else 4
    sample = torch.randn(2, 3, 32, 32)
    return fl.localize(NETS[net](), method, blocks=blocks, sample=sample, **OPTIONS.get(method, {}), **options)


def batches(count: int, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [
        (torch.randn(6, 3, 32, 32, generator=g, dtype=torch.float64).to(dtype), torch.randint(10, (6,), generator=g))
        for _ in range(count)
    ]


def sgd(named: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(named, lr=0.05, momentum=0.9, weight_decay=1e-3)


def train(model: fl.LocalModel, data: list[tuple[Tensor, Tensor]], backend: str = "auto", **options: Any) -> Tensor:
    engine = fl.Engine(model, sgd, backend=backend, **options)
    outs = [engine.step(x, y) for x, y in data]
    return torch.stack([torch.cat([out.losses.double(), out.correct.double()]) for out in outs])


@contextmanager
def gpu() -> Iterator[LaunchCounter]:
    with as_on_gpu(), LaunchCounter() as counter:
        yield counter


def states(model: nn.Module) -> Tensor:
    return torch.cat([t.detach().double().flatten() for t in model.state_dict().values() if t.is_floating_point()])


# AugLocal has no convolution to put on the vectors of the VGG's Linear layers.
PAIRS = [(net, method) for net in NETS for method in METHODS if (net, method) != ("vgg", "auglocal")]


@pytest.mark.parametrize(("net", "method"), PAIRS)
def test_float64(net: str, method: str) -> None:
    plain = localized(net, method).double()
    fused = copy.deepcopy(plain)
    before = states(plain)
    wanted = train(plain, batches(4), backend="reference")
    with gpu() as counter:
        got = train(fused, batches(4))
    assert any(name.startswith("fastlocal::bn_act") for name in counter.by_op)
    assert torch.allclose(got, wanted, rtol=1e-9, atol=1e-9)
    assert torch.allclose(states(fused), states(plain), rtol=1e-8, atol=1e-8)
    assert (states(plain) - before).norm() > 1e-3 * before.norm()
    for name, count in plain.state_dict().items():
        if name.endswith("num_batches_tracked"):
            assert count == 4 and fused.state_dict()[name] == 4


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("precision", "memory_format"),
    [("32-true", "preserve"), ("32-true", "channels_last"), ("bf16-mixed", "preserve"), ("16-mixed", "channels_last")],
)
def test_low_precision_errs_as_plain_modules_do(precision: str, memory_format: str, method: str) -> None:
    """One step's update against float64: at most twice the error of the same step of plain modules."""
    exact = localized("resnet", method).double()
    start = states(exact)
    plain, fused = copy.deepcopy(exact).float(), copy.deepcopy(exact).float()
    options = {"precision": precision, "memory_format": memory_format}
    train(exact, batches(1), backend="reference")
    train(plain, batches(1, torch.float32), backend="reference", **options)
    with as_on_gpu():
        train(fused, batches(1, torch.float32), **options)
    truth = states(exact) - start
    errors = [float((states(m) - start - truth).norm() / truth.norm()) for m in (fused, plain)]
    assert errors[0] <= 2 * errors[1] + 1e-6, errors
    assert errors[1] < 0.5, "nothing is compared"


@pytest.mark.parametrize("method", METHODS)
def test_level_a_is_level_b(method: str) -> None:
    a = localized("resnet", method)
    b = copy.deepcopy(a)
    data = batches(3, torch.float32)
    optimizer = sgd([p for p in a.parameters()])
    with as_on_gpu():
        engine = fl.Engine(
            b, lambda named: torch.optim.SGD(named, lr=0.05, momentum=0.9, weight_decay=1e-3, foreach=True)
        )
        for x, y in data:
            optimizer.zero_grad()
            out = a(x, y)
            out.loss.backward()
            optimizer.step()
            step = engine.step(x, y)
            assert torch.equal(out.losses, step.losses) and torch.equal(out.correct, step.correct)
    assert torch.equal(states(a), states(b))


def test_saved_bytes_of_a_basic_block_with_head() -> None:
    """16 channels of 32x32: the input, both convolutions' outputs and what the head needs, of 320 KiB an image."""
    torch.manual_seed(0)
    rows = 16
    x, y = torch.randn(rows, 16, 32, 32), torch.randint(10, (rows,))
    peaks = []
    for context in (nullcontext, as_on_gpu):
        unit, head = BasicBlock(16, 16), ClassifierHead(FusedSequential(AvgPool(), nn.Linear(16, 10)))
        with context(), SavedBytes([*unit.parameters(), *unit.buffers(), *head.parameters()]) as saved:
            head(unit(x), StepContext(y, None, cross_entropy)).loss.backward()
        peaks.append(saved.peak / rows / 1024)
    assert peaks[0] >= 320
    assert peaks[1] <= 0.62 * peaks[0], peaks


def test_nothing_is_multiplied_by_one() -> None:
    """At both levels a backward starts from a one that the operators know."""
    model = localized("resnet", "auglocal")
    x, y = batches(1, torch.float32)[0]
    with gpu() as counter:
        loss = model(x, y).loss
    # one for all heads, and the task loss's own
    assert counter.by_op["aten::ones_like"] == 2 and counter.by_op["aten::_foreach_mul"] == 0
    with gpu() as counter:
        (loss * 2).backward()
    assert all(p.grad is not None for p in model.parameters())
    with gpu() as counter:
        fl.Engine(model, sgd).step(x, y)
    assert counter.by_op["aten::ones_like"] == 1 and counter.by_op["aten::_foreach_mul"] == 0
