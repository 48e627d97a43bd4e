"""The deep bench on shallow networks, its record of ResNet-1202, and a network of hundreds of layers held to its plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import fastlocal as fl
from fastlocal import models
from fastlocal.bench import deep
from fastlocal.blocks.measure import StorageTracker
from fastlocal.engine.localize import parse_bytes

ROOT = Path(__file__).resolve().parents[2]
SMALL = "--model resnet20 --batch 32 --rows 2 --steps 2 --threads 1"


@pytest.fixture
def few(monkeypatch, tmp_path) -> Path:
    file = tmp_path / "deep.jsonl"
    monkeypatch.setattr(deep, "CASES", [("bp", 1), ("dgl", "auto")])
    monkeypatch.setattr(deep, "RESULTS", file)
    return file


def test_it_plans_trains_and_records(few, capsys) -> None:
    assert deep.main([*SMALL.split(), "--budget", "26MiB", "--record"]) == 0
    record = json.loads(few.read_text())
    bp, dgl = record["cases"]
    assert bp["planned"] > 26 * 2**20 >= dgl["planned"] and 1 < dgl["blocks"] == dgl["planned_blocks"]
    model = fl.localize(models.create("resnet20"), "dgl", blocks=dgl["blocks"] - 1, sample=torch.randn(2, 3, 32, 32))
    fewer = fl.plan(model, torch.empty(32, 3, 32, 32), device="cpu-core")
    assert fewer.peak_bytes > 26 * 2**20
    assert all(len(r["losses"]) == 2 and min(r["cut_seconds"], r["plan_seconds"]) > 0 for r in record["cases"])
    assert record["case"]["rows"] == 2 and "machine" in record
    printed = capsys.readouterr().out
    assert deep.table(record) in printed and "over 26MiB" in printed and "within 26MiB" in printed


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({}, 0),
        ({"planned": 31 * 2**20}, 1),
        ({"tracked_small": 889}, 1),
        ({"tracked_small": 1112}, 1),
        ({"losses": [1.0, float("inf")]}, 1),
        ({"planned": 31 * 2**20, "method": "bp"}, 0),
    ],
    ids=["well", "over the budget", "too much planned", "too little planned", "not finite", "bp may be over"],
)
def test_its_exit_says_whether_all_held(few, monkeypatch, changed, code) -> None:
    well = {
        "method": "dgl", "asked": 4, "blocks": 4, "parameters": 10, "planned": 30 * 2**20, "planned_small": 1000,
        "tracked_small": 1000, "losses": [1.0, 1.0], "cut_seconds": 1.0, "plan_seconds": 1.0, "step_seconds": 1.0,
    }  # fmt: skip
    monkeypatch.setattr(deep, "measure", lambda *args, **kwargs: well | changed)
    assert deep.main([*SMALL.split(), "--budget", "30MiB"]) == code
    assert not few.exists()


def test_one_step_is_too_few() -> None:
    with pytest.raises(SystemExit):
        deep.main(["--steps", "1"])


def test_resnet1202_fits_where_backprop_does_not_and_holds_its_plan() -> None:
    latest = json.loads((ROOT / "bench" / "results" / "deep.jsonl").read_text().splitlines()[-1])
    assert latest["case"]["model"] == "resnet1202" and latest["case"]["batch"] == 128
    budget = parse_bytes("4GiB")
    assert parse_bytes(latest["case"]["budget"]) == budget
    methods = set()
    for r in latest["cases"]:
        assert (r["planned"] > budget) if r["method"] == "bp" else (r["planned"] <= budget), r
        assert abs(r["planned_small"] / r["tracked_small"] - 1) < 0.1, r
        assert len(r["losses"]) >= 3 and r["parameters"] > 19.4e6
        methods.add((r["method"], r["asked"]))
    assert methods == set(deep.CASES)
    assert deep.table(latest) in (ROOT / "docs" / "plan.md").read_text(), "put deep.table(record) into docs/plan.md"


def test_hundreds_of_layers_hold_their_plan() -> None:
    x, y = torch.randn(2, 3, 32, 32), torch.tensor([3, 7])
    storages = StorageTracker()
    with storages:
        model = fl.localize(models.ResNetCIFAR(40, width=8), "dgl", blocks=16, sample=x)  # 242 layers
        engine = fl.Engine(model, deep.sgd)
        engine.step(x.clone(), y.clone())
        batch = x.clone(), y.clone()
        storages.mark("step")
        assert engine.step(*batch).losses.isfinite().all()
    plan = fl.plan(model, batch, device="cpu-core")
    assert plan.peak_bytes == pytest.approx(storages.peaks["step"], rel=0.1) and len(plan.blocks) == 16
