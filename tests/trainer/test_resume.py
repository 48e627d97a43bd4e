"""Killed runs go on with the same bytes: a short part of `make soak`, and the same without a kill, for every method."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.killed import METHODS, Case, Halt, Progress, digest, everything, soak, train


@pytest.mark.parametrize(
    "case", [Case("predsim", accumulate=5), Case("auglocal", "bf16-mixed", 5, True, "adamw")], ids=str
)
def test_killed_and_resumed(tmp_path: Path, case: Case) -> None:
    assert soak(case, seed=0, kills=3, root=tmp_path) >= 2  # a run may end before its last kill


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("method", METHODS)
def test_interrupted_and_resumed(tmp_path: Path, method: str, precision: str) -> None:
    """As the killed ones, by exceptions: before the first checkpoint, in a group of micro-batches, in another epoch."""
    case = Case(method, precision, accumulate=5)
    never: Any = multiprocessing.Value("i", 0, lock=False)
    train(case, str(tmp_path / "whole"), never)
    for at in (1, 10, 29):
        with pytest.raises(Halt):
            train(case, str(tmp_path / "halted"), Progress(at))
    train(case, str(tmp_path / "halted"), never)
    assert digest(tmp_path / "whole") == digest(tmp_path / "halted")


def test_a_finished_run_that_is_resumed_does_nothing(tmp_path: Path) -> None:
    case = Case("dgl", accumulate=5, extras=True)
    never: Any = multiprocessing.Value("i", 0, lock=False)
    train(case, str(tmp_path / "run"), never)
    before = digest(tmp_path / "run")
    train(case, str(tmp_path / "run"), never)
    assert digest(tmp_path / "run") == before


def test_the_soak_covers_every_method_and_precision() -> None:
    cases = everything()
    assert {(c.method, c.precision, c.accumulate) for c in cases} >= {
        (m, p, a) for m in METHODS for p in ("32-true", "bf16-mixed") for a in (1, 5)
    }
    assert any(c.extras for c in cases)
    scheduled = {(c.method, c.precision) for c in cases if "pipeline" in c.schedules}
    assert scheduled == {(m, p) for m in METHODS if m != "bp" for p in ("32-true", "bf16-mixed")}
    assert {s for c in cases for s in c.schedules} == {"auto", "sequential", "overlap", "pipeline"}
