"""The examples run, and say how few lines local learning changes."""

from __future__ import annotations

import math
import runpy
import warnings
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS = {
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


@pytest.mark.parametrize("name", NEEDS)
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


def test_lightning() -> None:
    assert 0 <= run("lightning_example.py", epochs=1, steps=4) <= 1


def test_huggingface() -> None:
    loss = run("huggingface_example.py", steps=3)
    assert 3 < loss < math.log(256)
