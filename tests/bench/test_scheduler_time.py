"""The scheduler's benchmark: that its table and its record hold what was scheduled. No time is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastlocal.bench import scheduler_time
from fastlocal.engine import _native

pytestmark = pytest.mark.skipif(not _native.available(), reason=_native.why_not())


def test_table_and_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(scheduler_time, "RECORDS", tmp_path / "results" / "times.jsonl")
    arguments = ["--tasks", "20", "--streams", "1", "2", "--in-flight", "1", "2", "--repeat", "2", "--record"]
    assert scheduler_time.main(arguments) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5
    (record,) = map(json.loads, scheduler_time.RECORDS.read_text().splitlines())
    alone, two = record["rows"][0], record["rows"][-1]
    assert alone["tasks"] == 20 and len(alone["seconds"]) == 2 and record["machine"]["native"]["built"]
    assert alone["period"] == pytest.approx(1) and alone["taken"] == 1 and alone["peak"] < 1.2
    assert 1 <= two["period"] < 1.3 and two["taken"] <= 2
