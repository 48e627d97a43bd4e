"""Eager schedules on CUDA streams: the numbers of the sequence, bit for bit with deterministic kernels, by the same launches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlocal as fl
from fastlocal.blocks.measure import LaunchCounter
from fastlocal.engine.clip import Clip
from tests.engine.baseline import assert_equal
from tests.gpu.device import (
    DEVICE,
    MARKS,
    METHODS,
    OF_TOKENS,
    ON_CUDA,
    OPTIMIZERS,
    batches,
    engine,
    gpt,
    no_sync,
    resnet,
    snapshot,
    tokens,
    vit,
)

# cuBLAS repeats itself on one stream; on several it needs CUBLAS_WORKSPACE_CONFIG, of which PyTorch warns.
pytestmark = [*MARKS, pytest.mark.filterwarnings("ignore:.*deterministic.*:UserWarning")]

SCHEDULES: dict[str, dict[str, Any]] = {
    "overlap": {"schedule": "overlap"},
    "pipeline of 2": {"schedule": "pipeline", "in_flight": 2},
    "pipeline of 3": {"schedule": "pipeline", "in_flight": 3, "workers": 3},
}
ISOLATED = [m["name"] for m in fl.list_methods() if m["isolated"] and m["name"] in (*METHODS, *OF_TOKENS)]


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def scheduled(model: fl.LocalModel, name: str, optimizer: str = "sgd", **options: Any) -> fl.Engine:
    how = {"workers": 2} | SCHEDULES[name] | {"deterministic": True} | options
    run = engine(copy.deepcopy(model), OPTIMIZERS[optimizer], **how)
    assert run._rounds is not None
    for guard in run._rounds._guards:
        guard.waits = True  # as `engine` does
    return run


def sequence(model: fl.LocalModel, optimizer: str = "sgd", **options: Any) -> fl.Engine:
    return engine(
        copy.deepcopy(model), OPTIMIZERS[optimizer], **{"schedule": "sequential", "deterministic": True} | options
    )


def run_of(run: fl.Engine, data: list[tuple[Tensor, Tensor]]) -> tuple[dict[int, Tensor], dict[str, Tensor]]:
    losses: dict[int, Tensor] = {}
    for i, (x, y) in enumerate(data):
        for group in run.optimizer.param_groups:
            group["lr"] = 2.0 ** -(4 + i % 3)
        out = run.step(x, y)
        if out.step is not None:
            losses[out.step] = out.losses
    losses |= {out.step: out.losses for out in run.flush() if out.step is not None}
    return losses, snapshot(run)


def compare(a: fl.Engine, b: fl.Engine, data: list[tuple[Tensor, Tensor]]) -> None:
    (one, first), (two, second) = run_of(a, data), run_of(b, data)
    assert one.keys() == two.keys() == set(range(len(data)))
    for step in one:
        torch.testing.assert_close(two[step], one[step], rtol=0, atol=0, equal_nan=True)
    assert_equal(second, first)
    assert torch.equal(a.skipped, b.skipped)


def mixed(count: int, method: str) -> list[tuple[Tensor, Tensor]]:
    if method in OF_TOKENS:
        return tokens(count)
    full, odd = batches(count), batches(count, rows=5)
    return [odd[i] if i % 3 == 2 else full[i] for i in range(count)]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("method", ISOLATED)
def test_every_method_is_the_sequence(method: str, name: str) -> None:
    model = gpt(method) if method in OF_TOKENS else resnet(method)
    run = scheduled(model, name)
    compare(sequence(model), run, mixed(12, method))
    assert run._rounds is not None and run._rounds.schedule is not None
    assert f"schedule: {SCHEDULES[name]['schedule']}; " in run.explain()
    assert ("stream" if ON_CUDA else "thread") in run.explain()


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_half_precision(precision: str) -> None:
    options = {"precision": precision, "memory_format": "channels_last", "clip": 1.0}
    compare(
        sequence(resnet("auglocal"), **options), scheduled(resnet("auglocal"), "pipeline of 2", **options), batches(10)
    )


def test_dropout_and_other_optimizers() -> None:
    compare(sequence(vit(dropout=0.3), "adamw"), scheduled(vit(dropout=0.3), "pipeline of 3", "adamw"), batches(10))
    compare(sequence(resnet(), "capturable"), scheduled(resnet(), "overlap", "capturable"), batches(8))


def test_blocks_that_are_not_finite() -> None:
    data = batches(10)
    for i in (3, 4, 7):
        data[i][0][0, 0, 0, 0] = float("nan")
    one, two = sequence(resnet(), nonfinite="skip"), scheduled(resnet(), "pipeline of 2", nonfinite="skip")
    compare(one, two, data)
    assert one.skipped.min() == 3


def test_update_at_the_end() -> None:
    options = {"update": "end", "clip": Clip(1.0, scope="global")}
    compare(sequence(resnet("man"), **options), scheduled(resnet("man"), "overlap", **options), batches(8))


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_round_launches_what_a_step_does_and_waits_for_nothing(name: str) -> None:
    """But for the guards, which look after each block by itself, and BatchNorm's counters, which count one by one."""
    model, data = resnet("dgl"), batches(8)
    counts = []
    for run in (sequence(model), scheduled(model, name)):
        for x, y in data[:5]:
            run.step(x, y)
        with no_sync():
            run.step(*data[5])
        with LaunchCounter() as counted:
            run.step(*data[6])
        counts.append(counted.total)
        run.flush()
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert 0 <= counts[1] - counts[0] <= norms + 20 * len(model.blocks)


@pytest.mark.gpu
def test_memory_of_streams_is_not_reused_too_early() -> None:
    """Many rounds of a cascade, whose gradients are made on one block's stream and read on another's."""
    model = resnet("mlaan")
    compare(sequence(model), scheduled(model, "pipeline of 3"), [batches(1)[0]] * 60)


@pytest.mark.gpu
def test_blocks_run_side_by_side() -> None:
    """Tasks of a round are on several streams, and the next round begins when all have ended."""
    run = scheduled(resnet("dgl"), "overlap")
    seen: set[int] = set()
    for block in run.model.blocks[:-1]:
        assert block.head is not None
        block.head.register_forward_hook(lambda *_: seen.add(torch.cuda.current_stream(DEVICE).cuda_stream))
    for x, y in batches(4):
        run.step(x, y)
    assert len(seen) >= 2


def test_copies_of_the_model_complete_the_steps_in_flight() -> None:
    model, data = resnet("dgl"), batches(7)
    one, two = sequence(model), scheduled(model, "pipeline of 2")
    for x, y in data:
        one.step(x, y)
        two.step(x, y)
    assert two.model.in_flight is two
    assert_equal(two.model.state_dict(), one.model.state_dict())
    assert two.model.in_flight is None and two.steps == 7
