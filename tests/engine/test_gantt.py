"""A schedule as text, picture and trace."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest

from fastlocal.engine import gantt
from fastlocal.engine._native import Pipeline
from fastlocal.engine.schedule import StepSchedule
from fastlocal.engine.simulate import Cost, simulate
from fastlocal.engine.tasks import Task
from fastlocal.errors import ArgumentError

MIB = 2**20


def _made(kind, tasks, cost, made, freed, streams, plan) -> StepSchedule:
    return StepSchedule(kind, tasks, [], cost, made, freed, streams, plan)


def _schedule() -> StepSchedule:
    """Two blocks on two streams, two steps in flight.

    stream 0, step t:    forward 0 (0-1 ms), update 0 (1-4 ms)
    stream 1, step t-1:  forward 1 (1-3 ms, after forward 0 of step t), update 1 (3-5 ms)
    """
    tasks = [Task("forward", 0, False), Task("update", 0, False), Task("forward", 1, False), Task("update", 1, False)]
    plan = Pipeline(
        order=[0, 1, 2, 3],
        stage=[0, 0, 1, 1],
        stream=[0, 0, 1, 1],
        start=[0.0, 0.001, 0.001, 0.003],
        waits=[[], [], [0], []],
        period=0.005,
        in_flight=2,
        peak_bytes=5 * MIB,
        pools=[0, 1],
        operations=0,
    )
    return _made(
        "pipeline", tasks, [0.001, 0.003, 0.002, 0.002], [3 * MIB, 0, 2 * MIB, 0], [0, 2 * MIB, 0, 3 * MIB], 2, plan
    )


def _at(found, kind, block, step):
    (span,) = [s for s in found.spans if (s.kind, s.block, s.step) == (kind, block, step)]
    return span.row, span.round, pytest.approx(span.start), pytest.approx(span.end)


def test_the_rounds_from_prologue_to_epilogue() -> None:
    found = gantt.timeline(_schedule(), steps=3)
    assert len(found.spans) == 3 * 4 and found.rows == ("stream 0", "stream 1")
    # The first round has step 0 on stream 0 alone and is done with it; the last has step 2 on stream 1 alone, which
    # waits for nothing there.
    assert found.rounds == pytest.approx([0, 0.004, 0.009, 0.014, 0.018])
    assert found.seconds == pytest.approx(0.018) and found.zoom == pytest.approx((0.004, 0.009))
    assert _at(found, "update", 0, 0) == (0, 0, 0.001, 0.004)
    assert _at(found, "forward", 0, 1) == (0, 1, 0.004, 0.005)
    assert _at(found, "forward", 1, 0) == (1, 1, 0.005, 0.007)
    assert _at(found, "update", 1, 1) == (1, 2, 0.012, 0.014)
    assert _at(found, "forward", 1, 2) == (1, 3, 0.014, 0.016)
    assert [s.start for s in found.spans] == sorted(s.start for s in found.spans)


def test_what_is_left_out_keeps_the_order_of_the_others() -> None:
    """A wait may be left out because it follows from another, by way of a task that this round leaves out."""
    task = [Task("forward", k, False) for k in range(3)]
    # c (stage 0) waits for b (stage 1), which waits for a (stage 0); on three streams
    plan = Pipeline([0, 1, 2], [0, 1, 0], [0, 1, 2], [0.0, 2.0, 3.0], [[], [0], [1]], 4.0, 2, 0, [0, 1, 2], 0)
    schedule = _made("pipeline", task, [2.0, 1.0, 1.0], [0] * 3, [0] * 3, 3, plan)
    found = gantt.timeline(schedule, steps=1)
    assert _at(found, "forward", 2, 0) == (2, 0, 2.0, 3.0) and found.rounds == pytest.approx([0, 3, 4])
    assert found.zoom is None  # no round is full


def test_a_sequential_schedule_is_one_round_a_step() -> None:
    plan = Pipeline([0, 1], [0, 0], [0, 0], [0.0, 1.0], [[], []], 3.0, 1, 0, [0], 0)
    schedule = _made(
        "sequential", [Task("forward", 0, False), Task("update", 0, False)], [1.0, 2.0], [0, 0], [0, 0], 1, plan
    )
    found = gantt.timeline(schedule)
    assert found.rounds == pytest.approx([0, 3, 6, 9]) and {s.step for s in found.spans} == {0, 1, 2}
    assert gantt.summary(schedule)[0] == "sequential: 1 block on 1 stream, 1 step in flight"
    with pytest.raises(ArgumentError, match="steps: expected at least 1, got 0"):
        gantt.timeline(schedule, steps=0)


def test_text() -> None:
    schedule = _schedule()
    schedule.reasons = {"overlap": "as asked for"}
    lines = gantt.to_text(schedule).splitlines()
    assert lines[:5] == [
        "pipeline: 2 blocks on 2 streams, 2 steps in flight",
        "a round takes 5.000 ms, its tasks one after another 8.000 ms: 1.60 x",
        "idle share of stream 0: 20.0 %, 1: 20.0 %",
        "tasks hold 5.00 MiB at most",
        "not overlap: as asked for",
    ]
    one, two = lines.index("stream 0"), lines.index("stream 1")
    assert [line.split() for line in lines[one + 2 : two - 1]] == [
        ["0.000", "1.000", "forward", "0", "t", "3.00", "0.00"],
        ["1.000", "3.000", "update", "0", "t", "0.00", "2.00"],
    ]
    assert lines[two + 2].split() == [
        "1.000",
        "2.000",
        "forward",
        "1",
        "t-1",
        "2.00",
        "0.00",
        "forward",
        "0",
        "of",
        "t",
    ]
    assert len(lines) == two + 4


def test_the_trace_has_the_form_that_viewers_read(tmp_path) -> None:
    found = gantt.timeline(_schedule(), steps=3)
    gantt.trace(found, tmp_path / "trace.json")
    read = json.loads((tmp_path / "trace.json").read_text())
    assert read["displayTimeUnit"] == "ms"
    events = read["traceEvents"]
    assert {e["ph"] for e in events} == {"M", "X", "C"}
    names = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    assert sorted(names.values()) == ["stream 0", "stream 1"]
    (process,) = [e for e in events if e["ph"] == "M" and e["name"] == "process_name"]
    assert process["args"]["name"] == "pipeline: 2 blocks on 2 streams, 2 steps in flight"
    work = [e for e in events if e["ph"] == "X"]
    assert len(work) == 12 and all(e["pid"] == 0 and e["tid"] in names for e in work)
    first = next(e for e in work if e["name"] == "forward 1, step 0")
    assert names[first["tid"]] == "stream 1" and first["cat"] == "forward"
    assert (first["ts"], first["dur"]) == pytest.approx((5000, 2000))  # microseconds
    assert first["args"] == {"block": 1, "step": 0, "round": 1}
    _no_two_overlap(work)


def test_the_trace_counts_the_bytes_alive() -> None:
    counts = [e for e in gantt.chrome_trace(gantt.timeline(_schedule(), steps=2))["traceEvents"] if e["ph"] == "C"]
    # rounds begin at 0, 4 and 9 ms
    points = {round(e["ts"] / 1000, 6): e["args"]["bytes"] / MIB for e in counts}
    assert points == {0: 3, 1: 3, 4: 4, 5: 6, 7: 6, 8: 4, 9: 3, 11: 3, 13: 0}


def _no_two_overlap(events) -> None:
    """Complete events of one thread must nest, or a viewer drops them."""
    for tid in {e["tid"] for e in events}:
        own = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e["tid"] == tid)
        assert all(a[1] <= b[0] + 1e-6 for a, b in pairwise(own))


def test_messages_have_threads_of_their_own() -> None:
    cost = Cost(1.0, 2.0, head=0.5, output_bytes=10)
    run = simulate([cost] * 3, "1f1b", ranks=3, microbatches=3, bandwidth=10.0)
    events = gantt.chrome_trace(run.timeline())["traceEvents"]
    names = {e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert names == {
        "rank 0", "rank 0: send", "rank 1", "rank 1: send", "rank 1: send back", "rank 2", "rank 2: send back",
    }  # fmt: skip
    _no_two_overlap([e for e in events if e["ph"] == "X"])
    assert sum(e["ph"] == "X" for e in events) == 3 * (3 * 3 * 2 + 3 * 4)


def _figure(monkeypatch, tmp_path, found):
    """The figure that is drawn."""
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    save = figure.Figure.savefig
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k)))
    gantt.draw(found, tmp_path / "a.png")
    return drawn[0]


def test_the_picture_shows_every_task_twice(monkeypatch, tmp_path) -> None:
    fig = _figure(monkeypatch, tmp_path, gantt.timeline(_schedule(), steps=3))
    whole, zoom = fig.axes
    bars = [sum(len(c.get_paths()) for c in axes.collections) for axes in (whole, zoom)]
    assert bars == [12, 4]
    assert whole.get_xlim() == pytest.approx((0, 18)) and zoom.get_xlim() == pytest.approx((4, 9))
    assert [label.get_text() for label in whole.get_yticklabels()] == ["stream 0", "stream 1"]
    assert {"round 0", "1", "2", "3"} <= {text.get_text() for text in whole.texts}
    assert sorted(text.get_text() for text in zoom.texts) == ["0", "1"]  # one number for a block's tasks
    keys = {text.get_text() for text in fig.legends[0].get_texts()}
    assert keys == {"forward", "update", "step 0", "step 1", "step 2"}
    colors = {tuple(c.get_facecolor()[0][:3]) for c in whole.collections}
    assert len(colors) == 3 * 2  # a hue for each step, a shade for each kind


def _long(blocks: int) -> StepSchedule:
    tasks = [Task(kind, k, False) for k in range(blocks) for kind in ("forward", "head", "backward", "update")]
    cost = [{"forward": 1.0, "head": 0.3, "backward": 2.0, "update": 0.1}[task.kind] for task in tasks]
    start = [sum(cost[:u]) for u in range(len(tasks))]
    n = len(tasks)
    plan = Pipeline(list(range(n)), [0] * n, [0] * n, start, [[]] * n, sum(cost), 1, 0, list(range(blocks)), 0)
    return _made("sequential", tasks, cost, [0] * n, [0] * n, 1, plan)


def test_a_long_round_is_cut_into_lines_and_numbers_stay_legible(monkeypatch, tmp_path) -> None:
    fig = _figure(monkeypatch, tmp_path, gantt.timeline(_long(55)))
    whole, *lines = fig.axes
    assert len(lines) == 2
    assert [text.get_text() for text in whole.texts if "-" in text.get_text()] == ["0-54"] * 3
    shown = {int(text.get_text()) for axes in lines for text in axes.texts}
    assert len(shown) >= 54  # a block at the end of a line may be cut too narrow for a number
    for axes in fig.axes:
        boxes = sorted((text.get_window_extent() for text in axes.texts if text.get_clip_on()), key=lambda box: box.x0)
        assert all(a.x1 <= b.x0 + 1 for a, b in pairwise(boxes))


def test_files(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    found = gantt.timeline(_schedule())
    gantt.draw(found, tmp_path / "a.svg")
    root = ElementTree.parse(tmp_path / "a.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    gantt.draw(found, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    run = simulate([Cost(1.0, 2.0, output_bytes=1)] * 2, ranks=2, bandwidth=1.0)
    run.draw(tmp_path / "b.png")
    run.trace(tmp_path / "b.json", steps=1)
    assert (tmp_path / "b.png").exists()
    spans = [e for e in json.loads((tmp_path / "b.json").read_text())["traceEvents"] if e["ph"] == "X"]
    assert len(spans) == 5
