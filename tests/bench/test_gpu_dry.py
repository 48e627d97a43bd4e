"""The GPU benchmark on a CPU: every code path with tiny sizes, and what its table may say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlocal as fl
from fastlocal.bench import gpu
from fastlocal.bench.operators import EAGER, OURS, tiny_cases

ROOT = Path(fl.__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("bench") / "bench.jsonl"
    command = [sys.executable, "-m", "fastlocal.bench.gpu", "--dry-run", "--out", str(out), "--budget", "600"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return run.stdout, [json.loads(line) for line in out.read_text().splitlines()]


def test_every_variant_of_every_case_was_timed(dry: tuple[str, list[dict[str, Any]]]) -> None:
    records = dry[1]
    assert not [r for r in records if "error" in r or r["kind"] == "skipped"]
    for case in gpu.tiny().cases:
        got = {r["variant"] for r in records if r["case"] == case.name}
        model = fl.localize(fl.models.create("resnet20"), "dgl", blocks=3, sample=torch.randn(2, 3, 8, 8))
        assert got == set(gpu.Steps(case, model, torch.zeros(0), torch.zeros(0), gpu.Cpu()).makers())
    steps = [r for r in records if r["kind"] in ("step", "refused")]
    assert len({r["variant"] for r in steps}) == 21 and len(steps) == 57
    # Without a device the engine says that it captures nothing, and that is a record of its own.
    assert all(r["variant"].startswith("engine graph") and r["why"] for r in steps if r["kind"] == "refused")
    steps = [r for r in steps if r["kind"] == "step"]
    assert len(steps) >= 43
    assert all(r["finite"] and r["seconds"] and r["steps_per_second"] > 0 and r["peak_bytes"] > 0 for r in steps)
    assert all(r["first_loss_agrees"] for r in steps if not r["variant"].startswith("BP"))
    for schedule in ("overlap", "pipeline"):
        found = [r["about"] for r in steps if r["variant"] == f"engine {schedule}, bf16 channels_last"]
        assert len(found) == 2 and all(about.startswith(f"schedule: {schedule}") for about in found)
    timed = [r for r in records if r["kind"] == "operator"]
    for case in tiny_cases():
        got = {(r["variant"], r["mode"]) for r in timed if r["case"] == case.name}
        variants = case.variants(case.inputs("cpu"), gpu.Cpu().compiled)
        assert got == {
            (n, mode) for n, v in variants.items() for mode in (["eager", "graph"] if v.graph else ["eager"])
        }
        assert {EAGER, OURS} <= variants.keys()
    assert all(gpu._agrees(r) and r["bytes_per_second"] > 0 for r in timed)
    assert records[0]["kind"] == "copy"
    for r in records:
        assert r["dry_run"] and not r["verified"]
        assert r["machine"]["torch"] == str(torch.__version__) and len(r["machine"]["source"]) == 16


def test_a_dry_run_says_so_and_shows_no_ratio(dry: tuple[str, list[dict[str, Any]]]) -> None:
    text = dry[0]
    assert text.rstrip().endswith("dry run on a CPU: no number above is a measurement")
    assert not [line for line in text.splitlines() if line.endswith("x")] and "a rival is faster" not in text
    assert "WRONG" not in text
    short = gpu.short(dry[1])
    assert len(short.splitlines()) < 0.6 * len(text.splitlines()) and "WRONG" not in short
    for case in tiny_cases():
        assert sum(line.startswith(case.name + " ") for line in short.splitlines()) == 1


def test_the_plain_loop_and_the_engine_do_the_same_step() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(4, 3, 16, 16), torch.randint(10, (4,))
    model = fl.localize(fl.models.create("resnet20"), "auglocal", blocks=4, sample=x, depth=1)
    steps = gpu.Steps(gpu.Case("auglocal", 4, 4), model, x, y, gpu.Cpu())
    makers = steps.makers()
    losses = [
        [float(variant.step()) for _ in range(3)]
        for variant in (makers[n]() for n in makers if "fp32" in n and "graph" not in n)
    ]
    assert len(losses) == 3
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-3)
    assert losses[0][0] != losses[0][1], "nothing was trained"


@pytest.mark.parametrize("options", [{"segments": 0}, {"segments": 3}, {"compiled": "units"}])
def test_the_rivals_are_backpropagation(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(4, 3, 16, 16), torch.randint(10, (4,))
    model = fl.localize(fl.models.create("resnet20"), "bp", blocks=1, sample=x)
    steps = gpu.Steps(gpu.Case("bp", 1, 4), model, x, y, gpu.Cpu())
    plain, rival = steps.bp("fp32", ""), steps.bp("fp32", "", **options)
    # Statistics are updated twice where a forward runs twice; training does not read them.
    for _ in range(3):
        assert float(rival.step()) == pytest.approx(float(plain.step()), rel=1e-4)


def test_checkpoints_keep_less() -> None:
    x, y = torch.randn(16, 3, 32, 32), torch.randint(10, (16,))
    model = fl.localize(fl.models.create("resnet20"), "bp", blocks=1, sample=x[:2])
    steps = gpu.Steps(gpu.Case("bp", 1, 16), model, x, y, gpu.Cpu())
    peaks = []
    for segments in (None, 0, 3):
        variant = steps.bp("fp32", "", segments=segments)
        variant.step()
        variant.forget_gradients()
        peaks.append(gpu.Cpu().peak(variant.step))
    assert max(peaks[1:]) < 0.75 * peaks[0], peaks


def test_no_figure_without_green_tests(tmp_path: Path) -> None:
    report = tmp_path / "tests.jsonl"
    here = {"source": "0123", "device": "some device"}
    head, step = "tests/gpu/test_pool_linear_cross_entropy.py::test_x", "tests/gpu/test_levels.py::test_y"
    files = {"collected": 2, "by_file": {"test_pool_linear_cross_entropy.py": 1, "test_levels.py": 1}}

    def green(operator: str | None) -> bool:
        return gpu.verified(report, operator, here)

    def write(*lines: dict[str, Any]) -> None:
        report.write_text("\n".join(json.dumps(line) for line in lines))

    def outcome(test: str, what: str) -> dict[str, str]:
        return {"test": test, "outcome": what}

    name = "pool_linear_cross_entropy"
    assert not gpu.verified(None, None, here) and not green(None)
    write(here, files, outcome(head, "passed"), outcome(step, "failed"))
    assert green(name) and not green(None) and not green("bn_act")
    write(here, files, outcome(step, "skipped"))
    assert not green(None) and not green(name)
    write(here, files, outcome(step, "passed"))
    assert green(None) and not green(name)
    two = files | {"by_file": files["by_file"] | {"test_pool_linear_cross_entropy.py": 2}}  # one of them never ran
    write(here, two, outcome(head, "passed"), outcome(step, "passed"))
    assert green(None) and not green(name)
    for other in ({"source": "4567"}, {"device": "another"}):
        write(here | other, files, outcome(head, "passed"), outcome(step, "passed"))
        assert not green(None) and not green(name)
    write(files, outcome(head, "passed"), outcome(step, "passed"))  # who knows where
    assert not green(None) and not green(name)

    def record(variant: str, median: float, verified: bool) -> dict[str, Any]:
        found = {"kind": "step", "case": "c", "variant": variant, "median": median, "steps_per_second": 1 / median}
        return found | {"peak_bytes": 2**20, "finite": True, "verified": verified, "dry_run": False}

    pair = (("plain loop, fp32", 0.4), ("engine, fp32", 0.1))
    for text in (gpu.table, gpu.short):
        assert "   4.00x" in text([record(name, t, True) for name, t in pair])
    unverified = [record(name, t, False) for name, t in pair]
    assert gpu.table(unverified) == f"c\n  {gpu.NOT_GREEN}" and gpu.short(unverified) == f"c: {gpu.NOT_GREEN}"


def test_the_table_says_where_a_rival_is_faster_and_where_bandwidth_is_lost() -> None:
    def record(variant: str, mode: str, median: float, backend: str | None = None) -> dict[str, Any]:
        about = {"kind": "operator", "case": "c", "variant": variant, "mode": mode, "backend": backend}
        about |= {"verified": True, "dry_run": False, "dtype": "torch.float32", "disagreement": 0.0}
        return about | {"median": median, "host_median": 1e-6, "peak_bytes": 0, "part_of_bandwidth": 1e-6 / median}

    rows = [record(EAGER, "graph", 8e-6), record("compiled", "graph", 2e-6), record(OURS, "graph", 4e-6, "triton")]
    text = gpu.table(rows + [record(r["variant"], "eager", r["median"]) for r in rows])
    assert "a rival is faster (graph): c: compiled, 2.00x" in text and "below 85 % of the copy: c: 25%" in text
    assert "2.00x" in next(line for line in text.splitlines() if line.startswith(f"  {OURS} "))
    both = rows + [record(r["variant"], "eager", r["median"]) for r in rows]
    line = next(line for line in gpu.short(both).splitlines() if line.startswith("c "))
    assert "2.00x  compiled 0.50x" in line and "25.0%" in line
    assert gpu.short([r | {"verified": False} for r in both]) == f"c: {gpu.NOT_GREEN}"
    rows[-1]["disagreement"] = float("nan")
    rows.append(record(OURS, "eager", 1e-6) | {"disagreement": float("nan")})
    assert "WRONG RESULT" in gpu.table(rows)


def test_a_variant_that_fails_is_a_record_and_stops_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(self: gpu.Steps, precision: str, layout: str, graph: str = "off", schedule: str = "") -> gpu.Variant:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB\nand more lines")

    monkeypatch.setattr(gpu.Steps, "engine", fail)
    sizes = gpu.Sizes(cases=gpu.tiny().cases[1:2], operators=(), image=8, rounds=1, copy_bytes=1 << 10)
    records = gpu.Bench(sizes, gpu.Cpu(), tmp_path / "out" / "b.jsonl", budget=100).run()
    failed = [r for r in records if "error" in r]
    assert (
        len(failed) == 10 and failed[0]["error"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB"
    )
    assert [r["variant"] for r in records if "median" in r] == ["plain loop, fp32", "plain loop, bf16 channels_last"]
    assert "OutOfMemoryError" in gpu.table(records)
    assert len((tmp_path / "out" / "b.jsonl").read_text().splitlines()) == len(records)


def test_the_budget_is_kept() -> None:
    records = gpu.Bench(gpu.tiny(), gpu.Cpu(), None, budget=2).run()
    assert {r["kind"] for r in records} == {"skipped"} and "no time left" in gpu.table(records)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err
