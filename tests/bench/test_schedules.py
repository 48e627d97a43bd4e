"""The bench of schedules on networks of a second: what it times, what it accounts for, and what it records."""

from __future__ import annotations

import json
import statistics
from typing import Any

import pytest
import torch

from fastlocal.bench import readme, schedules
from fastlocal.bench.schedules import Case, Ran, account, ratio, variants

MLP = Case("dgl", 4, 8, "mlp", {"hidden": [24] * 4, "in_features": 12}, rivals=("BP",))
LOOKS = 2


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # two in an operator would wait for each other where the tests share the machine
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return schedules.run_case(MLP, rounds=3, threads=1, looks=LOOKS)


def test_every_variant_takes_its_turns(record) -> None:
    names = [*schedules.SCHEDULES, "BP"]
    assert [*record["seconds"]] == names and not record["left_out"]
    assert all(len(times) == 6 and min(times) > 0 for times in record["seconds"].values())
    assert [*record["peak_bytes"]] == names and min(record["peak_bytes"].values()) > 0
    assert record["about"]["overlap"].startswith("schedule: overlap;")
    assert record["about"]["pipeline"].startswith("schedule: pipeline;")
    assert "PyTorch has one thread here" in record["about"]["auto"]
    # of a net so small the gradients of all weights are most of BP's peak
    parameters = 12 * 24 + 24 + 3 * (24 * 24 + 24) + 24 * 10 + 10
    assert record["peak_bytes"]["BP"] > 4 * parameters
    assert record["peak_bytes"]["sequential"] <= record["peak_bytes"]["pipeline"]
    json.dumps(record)


def test_the_time_of_a_round_is_accounted_for(record) -> None:
    assert record["profile"].keys() == {"overlap", "pipeline"}
    for found in (record["profile"][name] for name in ("overlap", "pipeline")):
        assert found["lanes"] == 2 and found["promised"] > 0 and found["planned_bytes"] > 0
        for part, lanes in (("side", 2), ("line", 1)):
            assert all(seconds >= 0 for key, seconds in found[part].items() if key != "blocked")
            assert found[part]["run"] < lanes * found[part]["wall"]
        assert found["host"] > 0
        assert found["slower"].keys() >= {"forward", "head", "backward", "update"}


def test_its_text_and_rows_show_the_record(record) -> None:
    text = schedules.text(record)
    for name in record["seconds"]:
        assert f"\n  {name} " in text
    assert "overlap: 2 lanes x" in text and "mlp dgl K=4, batch 8, fp32" in text
    head, row = schedules.rows([record])
    assert len(head) == len(row) and row[0] == record["name"]
    shown = dict(zip(head, row, strict=True))
    assert shown["auto"] == f"{ratio(record, 'auto'):.2f} (sequential)"  # with one thread there is nothing to choose
    assert shown["BP compiled"] == "-" and shown["pipeline"] == f"{ratio(record, 'pipeline'):.2f}"
    assert shown["sequential ms"] == f"{statistics.median(record['seconds']['sequential']) * 1e3:,.1f}"
    hosts = [f"{record['profile'][name]['host'] * 1e6:,.0f}" for name in ("overlap", "pipeline")]
    assert shown["host us: overlap, pipeline"].split(" / ") == hosts
    assert len(shown["peak MiB: sequential, overlap, pipeline, BP"].split(" / ")) == 4


def test_the_schedules_train_the_same() -> None:
    made = {name: make() for name, make in variants(MLP).items()}
    losses = {name: [variant.step() for _ in range(8)] for name, variant in made.items()}
    assert losses["sequential"][0] != losses["sequential"][-1]
    for name in ("overlap", "auto"):
        assert losses[name] == pytest.approx(losses["sequential"], rel=1e-4)
    known = [loss for loss in losses["pipeline"] if loss == loss]  # a pipeline that fills has none yet
    rounds = made["pipeline"].rounds
    assert rounds is not None and rounds.schedule is not None
    assert len(known) == 9 - rounds.schedule.plan.in_flight
    assert known == pytest.approx(losses["sequential"][: len(known)], rel=1e-4)


def test_settled_means_learnt_full_and_chosen() -> None:
    made = variants(MLP)
    for name in schedules.SCHEDULES:
        torch.set_num_threads(1 + (name == "auto"))  # with one there is nothing to choose
        variant = made[name]()
        assert schedules.settle(variant) >= 2 + variant.in_flight
        engine = variant.engine
        assert engine is not None and variant.step() > 0
        assert variant.rounds is None or variant.rounds.schedule is not None
        assert (name == "auto") == (engine._chooser is not None)
        assert engine._chooser is None or engine._chooser.choice is not None
    assert made["pipeline"]().in_flight == 2 and made["sequential"]().in_flight == 0


def test_an_account_adds_up() -> None:
    ran = [
        Ran("forward", 1, 0.0, 2.0, 1.5),
        Ran("backward", 2, 1.0, 4.0, 3.0),
        Ran("update", 1, 3.0, 4.0, 0.5),
    ]
    assert account(5.0, ran, 2) == pytest.approx({"wall": 5.0, "run": 5.0, "blocked": 1.0, "idle": 4.0})


def test_a_look_sees_every_task_once_and_leaves_no_trace() -> None:
    for name in ("overlap", "pipeline"):
        variant = variants(MLP)[name]()
        schedules.settle(variant)
        rounds = variant.rounds
        assert rounds is not None and rounds.schedule is not None
        lanes, kinds = rounds._lanes, sorted(task.kind for task in rounds.schedule.tasks)
        for look, threads in ((schedules.watched_rounds, 2), (schedules.in_line, 1)):
            for wall, ran in look(variant, LOOKS):
                assert sorted(r.kind for r in ran) == kinds and 1 <= len({r.thread for r in ran}) <= threads
                assert 0 < sum(r.end - r.begin for r in ran) < threads * wall
            assert rounds._lanes is lanes and "_do" not in vars(rounds)
        assert len(schedules.lanes_seconds(variant, 3)) == 3
    assert schedules.profile(variants(MLP)["sequential"]()) is None


def test_a_look_that_fails_leaves_no_trace() -> None:
    variant = variants(MLP)["overlap"]()
    schedules.settle(variant)
    rounds = variant.rounds
    assert rounds is not None
    lanes = rounds._lanes
    variant.step = lambda: 1 / 0
    for look in (schedules.watched_rounds, schedules.in_line):
        with pytest.raises(ZeroDivisionError):
            look(variant, 1)
        assert rounds._lanes is lanes and "_do" not in vars(rounds)


def test_a_rival_that_cannot_run_is_left_out_with_the_reason(monkeypatch) -> None:
    def broken(*args, **kwargs):
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(schedules, "backprop", broken)
    monkeypatch.setattr(schedules, "SCHEDULES", ("sequential",))
    record = schedules.run_case(MLP, rounds=1, threads=1, looks=1)
    assert record["left_out"] == {"BP": "RuntimeError: no compiler"} and [*record["seconds"]] == ["sequential"]
    assert "BP left out: RuntimeError: no compiler" in schedules.text(record)
    monkeypatch.setattr(schedules.fl, "Engine", broken)  # but of a schedule that is an error
    with pytest.raises(RuntimeError, match="no compiler"):
        schedules.run_case(MLP, rounds=1, threads=1, looks=1)


def test_no_variant_always_follows_the_same_other() -> None:
    ran: list[str] = []
    steps = {name: lambda name=name: ran.append(name) for name in "abc"}
    times = schedules.measure(steps, 8)
    turns = [ran[i : i + 3] for i in range(0, len(ran), 3)]
    assert len(turns) == 3 * 8 and all(len(set(turn)) == 1 for turn in turns)  # one to come back, two that are timed
    orders = ["".join(turn[0] for turn in turns[i : i + 3]) for i in range(0, len(turns), 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders) and len(set(orders)) > 3
    assert {name: len(found) for name, found in times.items()} == {"a": 16, "b": 16, "c": 16}


def test_speeds_are_of_medians() -> None:
    record = {"seconds": {"sequential": [3.0, 1.0, 2.0], "overlap": [1.0, 9.0, 0.5]}}
    assert ratio(record, "overlap") == 2.0 and ratio(record, "sequential", "overlap") == 0.5


def test_records_are_appended_and_the_newest_of_a_case_is_read(monkeypatch, tmp_path, capsys) -> None:
    file = tmp_path / "results" / "schedules.jsonl"
    other = Case("dgl", 2, 4, "mlp", MLP.options)
    monkeypatch.setattr(schedules, "RESULTS", file)
    monkeypatch.setattr(schedules, "SCHEDULES", ("sequential",))
    monkeypatch.setattr(schedules, "CASES", {"first": MLP, "second": other})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    one = ["--rounds", "1", "--threads", "1"]
    monkeypatch.setattr(schedules.info, "collect", lambda: {"cpu": "some"})
    assert schedules.main([*one, "--only", "second"]) == 0 and not file.exists()
    for _ in range(2):
        assert schedules.main([*one, "--record", "--only", "second,first"]) == 0
    assert len(file.read_text().splitlines()) == 4
    latest = schedules.read(file)
    assert [r["name"] for r in latest] == [MLP.name, other.name] and all("machine" in r for r in latest)
    assert latest[0]["seconds"] == json.loads(file.read_text().splitlines()[-1])["seconds"]
    assert MLP.name in capsys.readouterr().out
    with pytest.raises(SystemExit):
        schedules.main(["--only", "third"])


def test_the_page_shows_the_newest_records(record, tmp_path) -> None:
    page = "<!-- begin: schedules -->\n<!-- end: schedules -->"
    assert "No run is recorded here yet" in readme.fill(page, tmp_path)
    (tmp_path / "bench" / "results").mkdir(parents=True)
    machine = {"cpu": {"name": "some processor"}, "torch": {"version": "9.9"}}
    stale = record | {"machine": machine, "seconds": {"sequential": [7.0]}}
    lines = [json.dumps(r | {"machine": machine}) for r in (stale, record)]
    (tmp_path / "bench" / "results" / "schedules.jsonl").write_text("\n".join(lines))
    text = readme.fill(page, tmp_path)
    assert readme.table(schedules.rows([record])) in text and "7,000.0" not in text
    assert "some processor, 1 threads, torch 9.9" in text


def test_every_case_has_a_name_of_its_own() -> None:
    names = [case.name for case in schedules.CASES.values()]
    assert len(set(names)) == len(names) and "resnet110 dgl K=16, batch 32, channels_last, bf16" in names
    assert "mlp dgl K=4, batch 128, fp32" in names


def test_cases_of_a_gpu_are_those_of_make_gpu() -> None:
    from fastlocal.bench import gpu

    found = gpu.schedule_cases()
    assert {case.blocks for case in found} == {16, 55} and all(case.model == "resnet110" for case in found)
    steps = gpu.Steps(found[0], None, torch.zeros(1), torch.zeros(1), gpu.Cpu())  # type: ignore[arg-type]
    wanted = {
        f"engine {graph}{kind}, bf16 channels_last" for graph in ("", "graph ") for kind in ("overlap", "pipeline")
    }
    assert wanted <= steps.makers().keys()
