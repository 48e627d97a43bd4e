"""The examples run, and say how few lines local learning changes."""

from __future__ import annotations

import math
import os
import runpy
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest

import fastlocal as fl

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS: dict[str, tuple[str, ...]] = {
    "trainer_example.py": ("sklearn",),
    "raw_loop.py": ("sklearn",),
    "lightning_example.py": ("sklearn", "lightning"),
    "huggingface_example.py": ("transformers", "accelerate"),
}


def run(name: str, **options: Any) -> float:
    for package in NEEDS[name]:
        pytest.importorskip(package)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return runpy.run_path(str(EXAMPLES / name))["main"](**options)


def test_every_example_is_tested() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(NEEDS)


@pytest.mark.parametrize("name", [name for name in NEEDS if name != "trainer_example.py"])
def test_at_most_ten_lines_change(name: str) -> None:
    assert 2 <= (EXAMPLES / name).read_text().count("# changed") <= 10


@pytest.mark.parametrize("level", ["a", "b"])
def test_raw_loop(level: str, capsys: Any) -> None:
    accuracy = run("raw_loop.py", epochs=1, steps=8, level=level)
    assert 0.15 < accuracy <= 1
    assert "AugLocal" in capsys.readouterr().out


def test_both_levels_of_the_raw_loop_start_from_the_same_losses(capsys: Any) -> None:
    printed = []
    for level in ("a", "b"):
        run("raw_loop.py", epochs=1, steps=1, level=level)
        printed.append(capsys.readouterr().out.split("loss of each block")[1].split("test")[0])
    assert printed[0] == printed[1] and "[" in printed[0]


def test_the_trainer_goes_on_bitwise(tmp_path: Path, capsys: Any) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    accuracy = run("trainer_example.py", epochs=2, limit=4, folder=str(whole))
    with pytest.MonkeyPatch.context() as patch:
        step = fl.Engine.step
        seen: list[int] = []

        def killed(self: Any, *batch: Any) -> Any:
            seen.append(1)
            if len(seen) == 6:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(self, *batch)

        patch.setattr(fl.Engine, "step", killed)
        with pytest.raises(SystemExit):
            run("trainer_example.py", epochs=2, limit=4, folder=str(parts))
    assert run("trainer_example.py", epochs=2, limit=4, folder=str(parts), resume=True) == accuracy
    assert len(seen) == 6 and "leaving at confidence 0.9" in capsys.readouterr().out
    for name in ("metrics.csv", "steps.csv", "checkpoints/step-00000008/model.safetensors"):
        one, two = whole / name, parts / name
        assert one.exists() == two.exists() and (not one.exists() or one.read_bytes() == two.read_bytes()), name
    assert (whole / "checkpoints" / "step-00000008").is_dir()


def test_lightning() -> None:
    assert 0 <= run("lightning_example.py", epochs=1, steps=4) <= 1


def test_huggingface() -> None:
    loss = run("huggingface_example.py", steps=3)
    assert 3 < loss < math.log(256)
