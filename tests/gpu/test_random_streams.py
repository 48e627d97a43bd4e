"""deterministic=True: one random stream per block, of the host and of the device, that leaves the global one alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlocal as fl
from tests.engine.baseline import assert_equal
from tests.gpu.device import DEVICE, MARKS, OPTIMIZERS, batches, engine, random_state, vit

# cuBLAS repeats itself on one stream; its warning about CUBLAS_WORKSPACE_CONFIG is for several.
pytestmark = [*MARKS, pytest.mark.filterwarnings("ignore:.*deterministic.*:UserWarning")]


@pytest.fixture(autouse=True)
def _deterministic_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where deterministic=True is not asked for: two runs are compared bit for bit."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def train(model: fl.LocalModel, steps: int = 4, **options: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
    run = engine(copy.deepcopy(model), OPTIMIZERS["adamw"], **options)
    losses = [run.step(x, y).losses for x, y in batches(steps)]
    return losses, run.model.state_dict()


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_runs_repeat_and_leave_the_global_streams_alone() -> None:
    model = vit(dropout=0.3)

    def run(seed: int, noise: int) -> tuple[list[Tensor], dict[str, Tensor]]:
        own, data = engine(copy.deepcopy(model), OPTIMIZERS["adamw"], deterministic=True, seed=seed), batches(4)
        torch.manual_seed(noise)
        torch.rand(noise, device=DEVICE)
        before = random_state()
        losses = [own.step(x, y).losses for x, y in data]
        assert all(torch.equal(a, b) for a, b in zip(before, random_state(), strict=True))
        assert not torch.are_deterministic_algorithms_enabled()
        return losses, own.model.state_dict()

    losses, state = run(0, 11)
    again, repeated = run(0, 12)
    assert same(losses, again)
    assert_equal(state, repeated)
    assert not same(losses, run(1, 11)[0])


def test_dropout_of_the_first_block_does_not_move_a_later_blocks_numbers() -> None:
    def states_at_last_block(dropout_in_first: float) -> list[Tensor]:
        model = vit(dropout=0.3)
        net: Any = model.backbone
        net.pos_drop.p = dropout_in_first
        seen: list[Tensor] = []
        net.blocks[-1].register_forward_pre_hook(lambda m, i: seen.append(random_state()[-1]))
        train(model, deterministic=True)  # a copy shares the hook
        return seen

    plain, changed = states_at_last_block(0.3), states_at_last_block(0.0)
    assert len(plain) == 4 and same(plain, changed)
    assert not torch.equal(plain[0], plain[1]), "a stream goes on from step to step"


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_resumed_engine_continues_bitwise(deterministic: bool, tmp_path: Path) -> None:
    model, data = vit(dropout=0.3), batches(6)

    def start() -> fl.Engine:
        return engine(copy.deepcopy(model), OPTIMIZERS["adamw"], deterministic=deterministic)

    straight = start()
    torch.manual_seed(4)
    expected = [straight.step(x, y).losses for x, y in data]
    broken = start()
    torch.manual_seed(4)
    losses = [broken.step(x, y).losses for x, y in data[:3]]
    torch.save((broken.model.state_dict(), broken.state_dict(), random_state()), tmp_path / "run.pt")
    weights, state, streams = torch.load(tmp_path / "run.pt", weights_only=True)
    resumed = start()
    resumed.model.load_state_dict(weights)
    resumed.load_state_dict(state)
    torch.manual_seed(99)
    torch.set_rng_state(streams[0])
    if len(streams) > 1:
        torch.cuda.set_rng_state(streams[1])
    losses += [resumed.step(x, y).losses for x, y in data[3:]]
    assert same(losses, expected)
    assert_equal(resumed.model.state_dict(), straight.model.state_dict())
