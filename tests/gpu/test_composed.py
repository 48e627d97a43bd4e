"""graph="on" with schedules of several streams on the device: composed rounds are steps in sequence, bit for bit."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import fastlocal as fl
from fastlocal import ops
from fastlocal.engine import _native, composed
from fastlocal.engine.schedule import best_schedule
from fastlocal.errors import BackendError
from tests.engine.baseline import assert_equal
from tests.gpu.device import DEVICE, MARKS, ON_CUDA, Make, batches, engine, no_sync, resnet, snapshot, vit

pytestmark = [
    *MARKS,
    pytest.mark.filterwarnings("ignore:.*deterministic.*:UserWarning"),
    pytest.mark.skipif(not _native.available(), reason="the native extension is not built"),
]

# Rates that float32 holds exactly: eager steps of PyTorch's fused optimizers compute with float64 ones.
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda named: torch.optim.SGD(named, lr=2**-3, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adamw": lambda named: torch.optim.AdamW(named, lr=2**-10, weight_decay=0.01),
    "fused_sgd": lambda named: ops.FusedSGD(named, lr=2**-3, momentum=0.9, weight_decay=1e-3),
    "fused_adamw": lambda named: ops.FusedAdamW(named, lr=2**-10, max_norm=1.0),
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "overlap": {"schedule": "overlap", "workers": 2},
    "pipeline": {"schedule": "pipeline", "workers": 2, "in_flight": 2},
    "deep": {"schedule": "pipeline", "workers": 3, "in_flight": 3},
}


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def rounds(model: fl.LocalModel, make: Make, schedule: str, *, one_graph: bool = True, **options: Any) -> fl.Engine:
    def composer(device: torch.device) -> Any:
        if ON_CUDA:
            return composed.CudaComposer(device, composed=one_graph)
        from tests.engine.composed_recorder import Composer

        return Composer(composed=one_graph)

    with mock.patch.object(composed, "composer", composer):
        made = engine(model, make, graph="on", **SCHEDULES[schedule], **options)
    inner: Any = made._rounds
    for guard in inner._guards:
        guard.waits = True
    return made


def launches(run: fl.Engine) -> int:
    inner: Any = run._rounds
    return inner.launches


def _by_block(*args: Any, **named: Any) -> Any:
    return best_schedule(*args, **named | {"host": False})


def train_both(
    model: fl.LocalModel,
    make: Make,
    schedule: str,
    data: list[tuple[Tensor, Tensor]],
    between: Callable[[], Any] = lambda: None,
    **options: Any,
) -> fl.Engine:
    one_graph = options.pop("one_graph", True)
    expected = engine(copy.deepcopy(model), make, **options)
    run = rounds(copy.deepcopy(model), make, schedule, one_graph=one_graph, **options)
    wanted, got = [], []
    patch: Any = nullcontext()
    if not ON_CUDA:  # a block stays on one stream, as on a device
        patch = mock.patch("fastlocal.engine.rounds.best_schedule", _by_block)
    with patch:
        for i, (x, y) in enumerate(data):
            for one, outs in ((expected, wanted), (run, got)):
                for g in one.optimizer.param_groups:
                    g["lr"] = 2.0 ** -(4 + i % 3)
                outs.append(one.step(x, y))
                between()
    got = [out for out in (*got, *run.flush()) if out.step is not None]
    assert [out.step for out in got] == [out.step for out in wanted]
    for a, b in zip(wanted, got):
        torch.testing.assert_close(b.losses, a.losses, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(a.correct, b.correct)
    assert_equal(snapshot(run), snapshot(expected))
    assert torch.equal(expected.skipped, run.skipped) and launches(run) >= 4
    return run


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", ["dgl", "auglocal"])
def test_composed_rounds_are_steps_in_sequence(method: str, optimizer: str, schedule: str) -> None:
    full, odd = batches(14), batches(14, rows=5)
    data = [odd[i] if i % 3 == 2 else full[i] for i in range(14)]
    train_both(resnet(method), OPTIMIZERS[optimizer], schedule, data)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("method", ["infopro", "predsim", "man"])
def test_other_methods(method: str, schedule: str) -> None:
    train_both(resnet(method), OPTIMIZERS["fused_sgd"], schedule, batches(10))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_pieces_launched_on_streams(schedule: str) -> None:
    """Without composition: one graph after the other, with events."""
    train_both(resnet("auglocal"), OPTIMIZERS["sgd"], schedule, batches(10), one_graph=False)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_half_precision(precision: str) -> None:
    options = {"precision": precision, "memory_format": "channels_last", "clip": 1.0, "nonfinite": "skip"}
    data = batches(12)
    data[9][0][0, 0, 0, 0] = float("nan")
    run = train_both(resnet("auglocal"), OPTIMIZERS["sgd"], "pipeline", data, **options)
    assert run.skipped.min() >= 1


def test_a_transformer() -> None:
    train_both(vit(), OPTIMIZERS["adamw"], "pipeline", batches(10))


def test_memory_that_others_take_between_rounds_is_not_that_of_graphs() -> None:
    """Whatever a round reads in the next one is held: other allocations, filled with NaN, take all that is free."""
    junk: list[Tensor] = []

    def between() -> None:
        gc.collect()
        junk.append(torch.full((1 << 20,), float("nan"), device=DEVICE))
        junk.extend(torch.full((n,), float("nan"), device=DEVICE) for n in (64, 4096, 16384))
        if len(junk) > 16:
            junk.clear()
            if ON_CUDA:
                torch.cuda.empty_cache()

    train_both(resnet("auglocal"), OPTIMIZERS["sgd"], "pipeline", batches(16), between)


def test_no_round_waits() -> None:
    run = train_both(resnet("auglocal"), OPTIMIZERS["sgd"], "pipeline", batches(8))
    before = launches(run)
    data = batches(6)
    with no_sync():
        outs = [run.step(x, y) for x, y in data]
    assert launches(run) == before + 6
    assert all(out.losses.isfinite().all() for out in outs if out.step is not None)


def test_dropout_is_refused() -> None:
    with pytest.raises(BackendError, match="draw random numbers"):
        rounds(vit(dropout=0.1), OPTIMIZERS["adamw"], "overlap")


def test_the_runtime_is_that_of_pytorch(record_property: Any) -> None:
    if not ON_CUDA:
        return
    native: Any = _native._load()[0]
    runtime = native.CudaRuntime("libc10_cuda.so", True)
    assert torch.version.cuda is not None
    assert runtime.version // 1000 == int(torch.version.cuda.split(".")[0])
    record_property("cuda_runtime", runtime.version)


@pytest.mark.gpu
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rounds_take_no_memory(schedule: str, record_property: Any) -> None:
    data = batches(10)
    run = train_both(resnet("auglocal"), OPTIMIZERS["sgd"], schedule, data)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(DEVICE), torch.cuda.memory_reserved(DEVICE)
    for _ in range(3):
        for x, y in data:
            run.step(x, y)
        run.flush()
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(DEVICE), torch.cuda.memory_reserved(DEVICE)) == before
    inner: Any = run._rounds
    record_property("pieces", len(inner._composition.pieces))
    record_property("variants", inner._composition.variants)
    record_property("reserved_bytes", before[1])
