"""The command that runs everything on a device keeps its time, and one stage's failure stops no other."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import pytest

from tests.gpu import run as command
from tests.gpu.run import STAGES, Run


def sleeper(seconds: float) -> list[str]:
    # Its child must end with it.
    code = "import subprocess, sys, time; print('begun', flush=True); "
    code += f"subprocess.run([sys.executable, '-c', 'import time; time.sleep({seconds})'])"
    return [sys.executable, "-c", code]


def test_a_stage_that_hangs_is_ended_and_the_next_one_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STAGES, "build", (1.5, 0))
    run = Run(tmp_path, 100)
    begun = time.monotonic()
    status, text = run.command("build", sleeper(60))
    assert status is None and text.startswith("begun") and time.monotonic() - begun < 12
    status, text = run.command("tests", [sys.executable, "-c", "print('next'); raise SystemExit(3)"])
    assert (status, text) == (3, "next\n")
    assert "begun" in (tmp_path / "log.txt").read_text() and "next" in (tmp_path / "log.txt").read_text()


def test_every_stage_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> tuple[str, str]:
        raise ZeroDivisionError("of the stage")

    run = Run(tmp_path, 100)
    run.stage("build", broken)
    run.stage("tests", lambda: ("ok", "3 passed"))
    rows = [json.loads(line) for line in (tmp_path / "summary.jsonl").read_text().splitlines()]
    assert [(r["stage"], r["status"]) for r in rows] == [("build", "failed"), ("tests", "ok")]
    assert "ZeroDivisionError: of the stage" in rows[0]["detail"]
    assert "3 passed" in capsys.readouterr().out and "3 passed" in run.table()


def test_early_stages_leave_time_for_later_ones(tmp_path: Path) -> None:
    names = list(STAGES)
    for budget in (540, 300):
        run = Run(tmp_path, budget + command.RESERVE)
        for i, name in enumerate(names):
            later = sum(STAGES[n][1] for n in names[i + 1 :])
            assert STAGES[name][1] - 1 < run.allowance(name) <= budget - later
    short = Run(tmp_path, 40 + command.RESERVE)  # too little for all: the first stages still get their least
    assert [round(short.allowance(name)) for name in names[:3]] == [10, 15, 40]
    assert Run(tmp_path, 540).allowance("tests") == STAGES["tests"][0]
    assert sum(least for _, least in STAGES.values()) <= 300
    assert Run(tmp_path, 540).allowance("bench") > 500


def test_a_python_without_torch_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'torch'\"; exit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    monkeypatch.setattr("signal.signal", lambda *args: None)  # pytest's own stays
    assert command.main(["--out", str(tmp_path / "out")]) == 1
    rows = [json.loads(line) for line in (tmp_path / "out" / "summary.jsonl").read_text().splitlines()]
    assert [r["stage"] for r in rows] == ["machine"]
    assert "no working torch: ModuleNotFoundError" in rows[0]["detail"]


@pytest.mark.parametrize(
    "answer, status, words",
    [
        ("echo '========= ERROR SUMMARY: 0 errors'", "ok", "0 errors; 6 of 6 calls on cuda, 0 wrong"),
        ("echo '========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)'", "ok", "0 hazards displayed"),
        ("echo '========= ERROR SUMMARY: 7 errors'; exit 9", "failed", "7 errors; 6 of 6"),
        ("exit 0", "failed", "6 of 6 calls"),
    ],
)
@pytest.mark.parametrize("knows_filters", [True, False])
def test_what_the_sanitizer_says(
    answer: str, status: str, words: str, knows_filters: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "compute-sanitizer"
    refuse = "" if knows_filters else "case \"$*\" in *--kernel-name*) echo 'unknown option'; exit 1;; esac\n"
    program.write_text(f"#!/bin/sh\n{refuse}echo '6 of 6 calls on cuda, 0 wrong results'\n{answer}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    run = Run(tmp_path / "out", 500)
    run.machine = {"device": "a device"}
    got, detail = run.sanitize("memcheck")
    assert got == status and words in detail
    log = (tmp_path / "out" / "log.txt").read_text()
    assert log.count("=== memcheck") == (1 if knows_filters else 2) and "kns=fl_" in log


def test_without_the_sanitizer_the_driver_runs_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    run = Run(tmp_path, 500)
    run.machine = {"device": "a device"}
    monkeypatch.setattr(run, "command", lambda *args, **kwargs: (0, "6 of 6 calls on cuda, 0 wrong results\n"))
    assert run.sanitize("racecheck") == (
        "not run",
        "compute-sanitizer is not here; alone: 6 of 6 calls on cuda, 0 wrong results",
    )


def test_memory_figures_are_shown(tmp_path: Path) -> None:
    figures = {"immediate": 2 << 20, "end": 3 << 20, "bp": 8 << 20, "part of bp": 0.25}
    report = tmp_path / "tests.jsonl"
    report.write_text(json.dumps({"test": "a.py::test_x[dgl]", "outcome": "passed", "figures": figures}) + "\n")
    assert command._memory(report) == ["peak MiB  test_x[dgl]: 2.0 (update='end' 3.0), BP 8.0: 0.25x"]


def test_the_sanitizer_finds_every_kernel() -> None:
    """It is told to watch kernels by a part of their names."""
    source = "\n".join(path.read_text() for path in (command.ROOT / "triton_kernels").glob("*.py"))
    names = re.findall(r"^def (\w+_kernel)\(", source, re.MULTILINE)
    assert len(names) >= 6 and all(name.startswith(command.KERNELS) for name in names)


def test_tuning_keeps_its_time_and_writes_into_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STAGES, "tune", (1e9, command.TUNE))
    run = Run(tmp_path, 540)
    assert run.allowance("bench") < 540 - command.RESERVE - command.TUNE + 1
    run.machine = {"device": "a device"}
    calls: list[list[str]] = []

    def answer(stage: str, words: list[object], **environment: str) -> tuple[int, str]:
        calls.append([str(word) for word in words])
        return 0, "noise\n7 entries written to somewhere\nmore\n"

    monkeypatch.setattr(run, "command", answer)
    assert run.tune() == ("ok", "7 entries written to somewhere")
    assert str(tmp_path / "tables") in calls[0] and "--dry-run" not in calls[0]


def test_the_report_begins_with_the_sources_and_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without them the benchmark shows no figure."""
    from fastlocal.bench import gpu

    run = Run(tmp_path, 100)
    run.machine = {"device": "a device", "source": "0123", "commit": "c"}
    run.rows = [{"status": "failed"}]
    file = "test_levels.py"

    def answer(stage: str, words: list[object], **environment: str) -> tuple[int, str]:
        with open(environment["FASTLOCAL_GPU_REPORT"], "a") as report:
            report.write(json.dumps({"collected": 1, "by_file": {file: 1}}) + "\n")
            report.write(json.dumps({"test": f"tests/gpu/{file}::test_x", "outcome": "passed"}) + "\n")
        return 0, ""

    monkeypatch.setattr(run, "command", answer)
    assert run.tests() == ("ok", "1 passed, 0 failed, 0 skipped")
    assert gpu.verified(tmp_path / "tests.jsonl", None, run.machine)
    assert not gpu.verified(tmp_path / "tests.jsonl", None, run.machine | {"source": "4567"})
    monkeypatch.setattr(run, "command", lambda *args, **kwargs: (1, "ImportError: x"))
    assert run.tests() == ("failed", "pytest did not start: ImportError: x")
