"""graph="on" on the device: the numbers of eager steps, bit for bit with deterministic kernels, and no waiting."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlocal as fl
from fastlocal import ops
from fastlocal.errors import BackendError
from tests.engine import recorder
from tests.engine.baseline import assert_equal
from tests.gpu.device import DEVICE, MARKS, METHODS, ON_CUDA, Make, batches, engine, no_sync, resnet, snapshot, vit

pytestmark = [*MARKS, pytest.mark.filterwarnings("ignore:.*deterministic.*:UserWarning")]

# Rates that float32 holds exactly: eager steps of PyTorch's fused optimizers compute with float64 ones.
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda named: torch.optim.SGD(named, lr=2**-3, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adamw": lambda named: torch.optim.AdamW(named, lr=2**-10, weight_decay=0.01),
    "fused_sgd": lambda named: ops.FusedSGD(named, lr=2**-3, momentum=0.9, weight_decay=1e-3),
    "fused_adamw": lambda named: ops.FusedAdamW(named, lr=2**-10, max_norm=1.0),
}


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def graphed(model: fl.LocalModel, make: Make, **options: Any) -> fl.Engine:
    if ON_CUDA:
        return engine(model, make, graph="on", **options)
    return recorder.engine(model, make, **options)


def pair(model: fl.LocalModel, make: Make, **options: Any) -> tuple[fl.Engine, fl.Engine]:
    return engine(copy.deepcopy(model), make, **options), graphed(copy.deepcopy(model), make, **options)


def replays(run: fl.Engine) -> int:
    assert run._graphs is not None
    return run._graphs.replays


def train_both(eager: fl.Engine, graph: fl.Engine, data: list[tuple[Tensor, Tensor]], *, rates: bool = True) -> None:
    for i, (x, y) in enumerate(data):
        seeds = i + 7 * eager.steps
        outs = []
        for run in (eager, graph):
            if rates:
                for g in run.optimizer.param_groups:
                    g["lr"] = 2.0 ** -(4 + i % 3)
            torch.manual_seed(seeds)
            outs.append(run.step(x, y))
        a, b = outs
        torch.testing.assert_close(b.losses, a.losses, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(b.correct, a.correct) and b.step == a.step
    assert_equal(snapshot(graph), snapshot(eager))
    assert torch.equal(eager.skipped, graph.skipped)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_a_graph_is_the_eager_step(method: str, optimizer: str) -> None:
    eager, graph = pair(resnet(method), OPTIMIZERS[optimizer])
    full, odd = batches(9), batches(9, rows=5)
    train_both(eager, graph, [odd[i] if i % 3 == 2 else full[i] for i in range(9)])
    assert replays(graph) >= 3


@pytest.mark.parametrize("update", ["immediate", "end"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_half_precision(precision: str, update: str) -> None:
    options = {"precision": precision, "update": update, "memory_format": "channels_last", "clip": 1.0}
    eager, graph = pair(resnet("auglocal"), OPTIMIZERS["sgd"], **options)
    train_both(eager, graph, batches(8))
    assert replays(graph) >= 3


@pytest.mark.parametrize("update", ["immediate", "end"])
def test_batches_that_are_not_finite(update: str) -> None:
    eager, graph = pair(resnet(), OPTIMIZERS["fused_sgd"], update=update, nonfinite="skip")
    data = batches(9)
    for i in (1, 5, 7):
        data[i][0][0, 0, 0, 0] = float("nan")
    train_both(eager, graph, data)
    assert graph.skipped.min() == 3 and torch.equal(graph._guard.first_bad, eager._guard.first_bad)
    for run in (eager, graph):
        run._guard.first_bad.fill_(-1)
    bad = batches(1)
    bad[0][0].fill_(float("inf"))
    train_both(eager, graph, bad)
    assert graph._guard.first_bad.tolist() == [9.0] * 3


def test_dropout_changes_between_replays_and_follows_the_eager_stream() -> None:
    eager, graph = pair(vit(dropout=0.3), OPTIMIZERS["adamw"])
    (x, y), *_ = batches(1)
    losses: list[list[Tensor]] = []
    for run in (eager, graph):
        torch.manual_seed(3)
        losses.append([run.step(x, y).losses for _ in range(8)])
    assert all(torch.equal(a, b) for a, b in zip(*losses))
    assert replays(graph) == 5
    for g in graph.optimizer.param_groups:
        g["lr"] = 0.0
    first, second = graph.step(x, y).losses, graph.step(x, y).losses
    assert not torch.equal(first, second), "the same weights and batch, other masks"


def test_no_replay_waits() -> None:
    graph = graphed(resnet("auglocal"), OPTIMIZERS["sgd"], precision="16-mixed")
    first, *rest = batches(12)
    for _ in range(5):
        graph.step(*first)
    before = replays(graph)
    with no_sync():
        outs = []
        for i, (x, y) in enumerate(rest):
            for k, g in enumerate(graph.optimizer.param_groups):
                g["lr"] = 0.1 / (1 + i + k)  # through the host's pinned memory; and one for all, by a launch
                if i % 2:
                    g["lr"] = 0.05
            outs.append(graph.step(x, y))
        correct = [out.correct for out in outs]
    assert replays(graph) == before + len(rest)
    assert all(out.losses.isfinite().all() for out in outs) and all(c.min() >= 0 for c in correct)
    values = [tuple(out.losses.tolist()) for out in outs]
    assert len(set(values)) == len(values), "results are those of their own step"


def test_moved_parameters_and_frozen_ones_are_captured_anew() -> None:
    eager, graph = pair(resnet(), OPTIMIZERS["sgd"])
    data = batches(18)
    train_both(eager, graph, data[:5])
    for run in (eager, graph):
        for p in run.model.parameters():
            p.data = p.data.clone()
    train_both(eager, graph, data[5:10])
    for run in (eager, graph):
        for p in list(run.model.backbone.parameters())[:4]:
            p.requires_grad_(False)
    train_both(eager, graph, data[10:15])
    assert graph._graphs is not None and graph._graphs.captures == 3


def test_a_resumed_run_goes_on_bitwise() -> None:
    model, data = resnet("auglocal"), batches(10)
    straight = graphed(copy.deepcopy(model), OPTIMIZERS["fused_adamw"])
    for x, y in data[:5]:
        straight.step(x, y)
    saved = copy.deepcopy((straight.model.state_dict(), straight.state_dict()))
    resumed = graphed(copy.deepcopy(model), OPTIMIZERS["fused_adamw"])
    resumed.model.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for x, y in data[5:]:
        assert torch.equal(straight.step(x, y).losses, resumed.step(x, y).losses)
    assert_equal(snapshot(resumed), snapshot(straight))
    assert replays(resumed) >= 2


def test_a_read_in_the_step_is_refused_and_nothing_breaks() -> None:
    model = resnet()
    graph = graphed(model, OPTIMIZERS["sgd"])
    data = batches(8)
    criterion = model.criterion
    model.criterion = lambda logits, target: criterion(logits, target) * (2.0 if bool(logits.sum() > 0) else 1.0)
    for x, y in data[:3]:
        graph.step(x, y)
    before = snapshot(graph)
    for _ in range(2):
        with pytest.raises(BackendError, match=r"block 0 .* could not be captured, at its head and backward"):
            graph.step(*data[3])
        assert_equal(snapshot(graph), before)
    assert graph.steps == 3
    model.criterion = criterion
    for x, y in data:
        assert graph.step(x, y).losses.isfinite().all()
    assert replays(graph) >= 3


@pytest.mark.gpu
def test_replays_take_no_memory() -> None:
    graph = graphed(resnet("auglocal"), OPTIMIZERS["sgd"])
    data = [*batches(4), *batches(4, rows=5)]
    for x, y in data:
        graph.step(x, y)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(DEVICE), torch.cuda.memory_reserved(DEVICE)
    assert graph._graphs is not None and graph._graphs.captures == 2
    pools = {s.graph.pool() for s in graph._graphs._shapes.values()}
    assert len(pools) == 1
    for _ in range(5):
        for x, y in data:
            graph.step(x, y)
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(DEVICE), torch.cuda.memory_reserved(DEVICE)) == before
