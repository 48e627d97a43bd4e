"""The search for launch configurations: in Triton's interpreter with an invented clock, so that every path runs on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import fastlocal as fl
from fastlocal.bench import operators, tune
from fastlocal.triton_kernels import configs

ROOT = Path(fl.__file__).resolve().parents[1]


class Config(NamedTuple):
    block_k: int
    block_c: int
    warps: int
    parts: int
    split: bool = False


DEFAULT = Config(8, 16, 8, 3)


def test_a_dry_run_tunes_the_kernels_and_writes_a_table(tmp_path: Path) -> None:
    """Every neighbour that it tries computes what the default does, in memory full of nan."""
    pytest.importorskip("triton", reason="Triton is not installed")
    command = [sys.executable, "-m", "fastlocal.bench.tune", "--dry-run", "--out", str(tmp_path)]
    run = subprocess.run([*command, "--only", "bn_act_pool"], cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "differ" not in run.stdout and "Error" not in run.stdout, run.stdout
    (path,) = tmp_path.glob("*.json")
    table = json.loads(path.read_text())
    entries = configs.parse(path.read_text())
    assert {kernel for kernel, _ in entries} == {"bn_act_pool", "bn_act_pool_backward"}
    assert table["torch"] == str(torch.__version__) and table["source"] and table["device"] == "dry run"
    assert all(e["seconds"]["chosen"] <= e["seconds"]["default"] and e["case"] for e in table["entries"])
    assert any(e["config"] != e["default"] for e in table["entries"])


def test_neighbours_are_near_and_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tune.FIXED, "k", ("block_k",))
    found = list(tune.neighbours("k", DEFAULT))
    assert len(found) == len(set(found)) == 6 and DEFAULT not in found
    assert all(c.block_k == 8 and not c.split for c in found)
    assert {c.warps for c in found} == {4, 8, 16} and {c.parts for c in found} == {1, 3, 6}
    large = Config(256, 256, 16, 1)
    assert {(c.block_c, c.warps) for c in tune.neighbours("k", large)} == {(128, 16), (256, 8), (256, 16)}


class Fake(operators.Pairs):
    """A case whose kernel is a function of its configuration."""

    times: dict[Any, float] = {}
    broken: Any = None
    refused: Any = None

    def explain(self, inputs: operators.Inputs, impl: str | None = None) -> str | None:
        return impl

    def ours(self, impl: str | None = None) -> operators.Call:
        def call(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            config = configs.tuned("ema_update", x.device, {"rows": len(x)}, DEFAULT)
            if config == self.refused:
                raise RuntimeError("out of resource: shared memory")
            out = torch.empty_like(x, requires_grad=False)
            if config != self.broken:
                out.copy_(x.detach() * 2)
            return out

        return call


class Clock(tune.Invented):
    def seconds(self, fn: Any, times: int) -> tuple[float, float]:
        config = configs._forced["ema_update"]  # type: ignore[index]
        return Fake.times.get(config, 1.0), 0.0


def tuned(**fields: Any) -> dict[str, Any]:
    case = Fake("supervised_contrastive_loss", 6, 5)
    Fake.times = fields.get("times", {})
    Fake.broken, Fake.refused = fields.get("broken"), fields.get("refused")
    tuner = tune.Tuner(Clock(), 60.0)
    tuner.case(case)
    (entry,) = tuner.entries.values()
    assert entry["key"] == {"rows": 6} and entry["default"] == DEFAULT._asdict()
    return entry | {"notes": tuner.notes, "config": Config(**entry["config"])}


def test_the_fastest_configuration_is_found_step_by_step() -> None:
    near, far = DEFAULT._replace(block_c=32), DEFAULT._replace(block_c=32, warps=4)
    found = tuned(times={near: 0.8, far: 0.5})
    assert found["config"] == far and found["seconds"] == {"default": 1.0, "chosen": 0.5}


def test_little_gain_is_no_gain() -> None:
    found = tuned(times={DEFAULT._replace(block_c=32): 0.98})
    assert found["config"] == DEFAULT and found["seconds"]["chosen"] == found["seconds"]["default"]


def test_wrong_results_and_errors_are_never_chosen() -> None:
    """What is not written stays nan: a kernel cannot profit from what an earlier one left in memory."""
    wrong, refused = DEFAULT._replace(block_c=32), DEFAULT._replace(warps=4)
    found = tuned(times={wrong: 0.1, refused: 0.1}, broken=wrong, refused=refused)
    assert found["config"] == DEFAULT
    assert any("differ by nan" in note for note in found["notes"])
    assert any("RuntimeError" in note for note in found["notes"])


def test_the_time_is_kept() -> None:
    tuner = tune.Tuner(Clock(), 0.0)
    Fake.times = {DEFAULT._replace(block_c=32): 0.1}
    tuner.case(Fake("supervised_contrastive_loss", 6, 5))
    assert [e["config"] for e in tuner.entries.values()] == [DEFAULT._asdict()]


def test_a_second_table_keeps_the_lines_of_the_first(tmp_path: Path) -> None:
    def entry(kernel: str, rows: int, block: int) -> dict[str, Any]:
        config = {"block": block}
        return {"kernel": kernel, "key": {"rows": rows}, "config": config, "default": {"block": 2}, "seconds": {}}

    where = {"device": "Some GPU", "driver": "1"}
    tune.write(tmp_path, [entry("ema_update", 1, 2), entry("fused_sgd", 1, 4)], where)
    path = tune.write(tmp_path, [entry("ema_update", 1, 8)], where)
    found = {k: e.config["block"] for (k, _), e in configs.parse(path.read_text()).items()}
    assert path.name == "Some_GPU.json" and found == {"ema_update": 8, "fused_sgd": 4}
    path.write_text("{")
    assert configs.parse(tune.write(tmp_path, [entry("ema_update", 1, 8)], where).read_text())
    with pytest.raises(ValueError, match="no_such_kernel"):
        tune.write(tmp_path, [entry("no_such_kernel", 1, 2)], where)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main([]) == 2 and "no CUDA device" in capsys.readouterr().err
