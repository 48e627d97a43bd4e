"""The record of plans against measurements, and the page that shows it."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from fastlocal.bench import plan_time

ROOT = Path(__file__).resolve().parents[2]
RECORD = json.loads((ROOT / "bench" / "results" / "plan.json").read_text())


def test_the_page_shows_the_record() -> None:
    page = (ROOT / "docs" / "plan.md").read_text()
    for name, table in plan_time.tables(RECORD).items():
        assert table in page, f"{name}: put the text of plan_time.tables(record) into docs/plan.md"


def test_recorded_peaks_are_within_a_tenth() -> None:
    methods: dict[str, set[str]] = {}
    for r in RECORD["peaks"]:
        assert abs(r["predicted"] / r["tracked"] - 1) < 0.1, r
        methods.setdefault(r["model"], set()).add(f"{r['method']}{r['extra'].get('form', '')}")
    assert methods.keys() == {"resnet110", "vit_small", "vgg11b", "gpt"}
    assert all(len(m) == 4 for name, m in methods.items() if name != "gpt") and len(methods["gpt"]) >= 3


def test_recorded_times_and_processes() -> None:
    errors = [abs(plan_time.error_of(case)) for case in RECORD["times"]]
    assert len(errors) >= 12 and statistics.median(errors) < 0.25
    assert all(r["maxrss"] < 10**9 for r in RECORD["hosts"]) and RECORD["hosts"]


def test_a_gpt_of_billions_is_planned_in_less_than_a_gigabyte() -> None:
    options = "--model-option n_layer=12 --model-option n_embd=8192 --model-option n_head=64"
    found = plan_time.measure_host(f"--model gpt {options} --method bp --batch 2")
    assert found["maxrss"] < 10**9, found
    assert (
        float(found["peak"].split()[1].replace(",", "")) > 8 * 10 * 2**10
    )  # MiB: parameters and momentum of 10 billion
