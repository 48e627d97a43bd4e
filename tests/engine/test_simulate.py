"""The simulator of many ranks against cases computed by hand, the formulae of the papers, and a checker of its spans."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from fastlocal.engine.simulate import Comparison, Cost, assign, compare, simulate
from fastlocal.errors import ArgumentError

# forward 1 s, backward 2 s, a message of 10 bytes
UNIT = Cost(1.0, 2.0, output_bytes=10, saved_bytes=100)
EVEN = Cost(1.0, 1.0, output_bytes=10)


def _seconds(cost, schedule, ranks, microbatches=1, **how):
    return simulate([cost] * ranks, schedule, ranks=ranks, microbatches=microbatches, **how).seconds


@pytest.mark.parametrize(
    ("schedule", "ranks", "microbatches", "how", "seconds"),
    [
        # one rank: everything in a row
        ("sequential", 1, 1, {}, 3),
        ("local", 1, 1, {"bandwidth": 1.0, "latency": 9.0}, 3),
        ("gpipe", 1, 4, {}, 12),
        ("1f1b", 1, 4, {}, 12),
        # a local pipeline: the slowest of ranks and links
        ("local", 2, 1, {}, 3),
        ("local", 4, 1, {}, 3),
        ("local", 4, 1, {"latency": 0.5}, 3),
        ("local", 4, 1, {"bandwidth": 10.0}, 3),  # 1 s a message, beside the head and backward
        ("local", 4, 1, {"bandwidth": 2.0, "buffers": 4}, 5),  # 5 s a message
        ("local", 4, 1, {"bandwidth": 10.0, "overlap": False}, 4),
        ("local", 4, 1, {"straggler": {2: 2.0}}, 6),
        ("local", 3, 1, {"straggler": [1.0, 1.0, 1.5]}, 4.5),
        # with one place on the link, rank 0 begins when rank 1 is done with its last input: at 4, 8, ...
        ("local", 2, 1, {"buffers": 1}, 4),
        ("local", 2, 1, {"buffers": 1, "latency": 0.5}, 4.5),
        # two places and 10 s on the way: rank 1 ends at 14, 17, 28, 31, 42, ..., two steps in 14 s
        ("local", 2, 1, {"latency": 10.0}, 7),
        ("local", 2, 1, {"latency": 10.0, "buffers": 5}, 3),
        # one micro-batch: forward through all ranks, and back; every message waits
        ("gpipe", 2, 1, {}, 6),
        ("1f1b", 2, 1, {}, 6),
        ("gpipe", 2, 1, {"latency": 0.5}, 7),
        ("gpipe", 2, 1, {"bandwidth": 10.0}, 8),
        ("1f1b", 2, 1, {"bandwidth": 10.0, "latency": 0.5}, 9),
        ("gpipe", 2, 1, {"bandwidth": 10.0, "latency": 0.5, "overlap": False}, 9),
        ("gpipe", 2, 1, {"straggler": {1: 2.0}}, 9),
        ("1f1b", 3, 1, {"straggler": {0: 2.0}}, 12),
        ("gpipe", 2, 1, {"recompute": True}, 8),
        # four: 1 rank of 2 waits for one forward and one backward
        ("gpipe", 2, 4, {}, 15),
        ("1f1b", 2, 4, {}, 15),
        ("gpipe", 4, 4, {}, 21),
        ("1f1b", 4, 4, {}, 21),
        ("1f1b", 4, 4, {"recompute": True}, 28),
        # rank 1 takes 2 + 4 s for each: it begins at 1, ends at 25, and rank 0 does one more backward
        ("gpipe", 2, 4, {"straggler": {1: 2.0}}, 27),
        ("1f1b", 2, 4, {"straggler": {1: 2.0}}, 27),
    ],
)
def test_seconds_of_a_step_by_hand(schedule, ranks, microbatches, how, seconds) -> None:
    assert _seconds(UNIT, schedule, ranks, microbatches, **how) == pytest.approx(seconds)


def test_latency_hurts_1f1b_more_than_gpipe_by_hand() -> None:
    # F and B of 1 s, 1 s until a message arrives, 2 ranks.
    # Rank 0 of GPipe: F 0-4, the first backward at 8, the last ends at 12.
    # Rank 0 of 1F1B: F0 F1 0-2, B0 5-6, F2 6-7, B1 7-8, F3 8-9, B2 11-12, B3 13-14.
    assert _seconds(EVEN, "gpipe", 2, 4, latency=1.0) == pytest.approx(12)
    run = simulate([EVEN] * 2, "1f1b", ranks=2, microbatches=4, latency=1.0)
    assert run.seconds == pytest.approx(14)
    first = [(s.name, s.start) for s in run.spans if s.step == 0 and s.row == 0 and not s.kind.startswith("send")]
    assert [start for _, start in first] == pytest.approx([0, 1, 5, 6, 7, 8, 11, 13])
    kinds = "".join(name[0] + name[-1] for name, _ in first)
    assert kinds == "f0f1b0f2b1f3b2b3"


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("microbatches", [1, 4, 9])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_the_bubble_of_the_papers(schedule, ranks, microbatches) -> None:
    run = simulate([UNIT] * ranks, schedule, ranks=ranks, microbatches=microbatches)
    assert run.seconds == pytest.approx((microbatches + ranks - 1) * 3)
    assert run.bubble == pytest.approx((ranks - 1) / (microbatches + ranks - 1))
    assert run.fill == pytest.approx(0)  # paid in every step, not once
    updating = simulate([Cost(1.0, 2.0, update=0.5)] * ranks, schedule, ranks=ranks, microbatches=microbatches)
    assert updating.seconds == pytest.approx((microbatches + ranks - 1) * 3 + 0.5)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_a_local_pipeline_fills_once(ranks) -> None:
    full = Cost(1.0, 2.0, head=0.5, update=0.25, output_bytes=10)
    run = simulate([full] * ranks, ranks=ranks, latency=0.25, bandwidth=20.0)
    assert run.seconds == pytest.approx(3.75) and run.bubble == pytest.approx(0)
    # a hop: forward, half a second on the link, a quarter until it is there
    assert run.fill == pytest.approx((ranks - 1) * 1.75)
    assert simulate([full] * ranks, ranks=ranks, steps=100).fill == pytest.approx(ranks - 1)


def test_blocks_of_one_rank_run_one_after_another() -> None:
    run = simulate([UNIT] * 4, ranks=2)
    assert run.blocks == ((0, 2), (2, 4)) and run.seconds == pytest.approx(6)
    assert run.fill == pytest.approx(4)  # the second block's forward ends at 4
    assert [s.name for s in run.spans if s.row == 0 and s.step == 0] == [
        "forward 0", "backward 0", "forward 1", "send 1", "backward 1",
    ]  # fmt: skip


def test_bytes_on_the_links() -> None:
    costs = [Cost(1.0, 1.0, output_bytes=n) for n in (10, 20, 40)]
    assert simulate(costs, ranks=3).link_bytes == {(0, 1): 10, (1, 2): 20}
    for schedule in ("gpipe", "1f1b"):
        run = simulate(costs, schedule, ranks=3, microbatches=4)
        assert run.link_bytes == {(0, 1): 40, (1, 0): 40, (1, 2): 80, (2, 1): 80} and run.bytes_sent == 240


@pytest.mark.parametrize(
    ("schedule", "microbatches", "how", "peaks"),
    [
        # Saved 100 and output 10; rank 1 its input, too. The next one comes at the moment at which that is done with.
        ("local", 1, {}, (110, 120)),
        # A slow rank 1 has as many inputs waiting as there are places.
        ("local", 1, {"straggler": {1: 2.0}}, (110, 130)),
        ("local", 1, {"straggler": {1: 2.0}, "buffers": 3}, (110, 140)),
        ("local", 1, {"straggler": {1: 2.0}, "buffers": 1}, (110, 120)),
        # Rank 0 keeps four times 100; its last output, or the gradient that came for it, 10.
        # Rank 1 keeps four times 100 + 10 + 10, and makes the gradient of an input.
        ("gpipe", 4, {}, (410, 490)),
        # Rank 0 keeps R - 0 = 2 micro-batches, rank 1 one, its input, the next one's, and the gradient of its input.
        ("1f1b", 4, {}, (210, 140)),
        # The inputs alone, and what one micro-batch saves; rank 1 keeps four outputs for the loss.
        ("gpipe", 4, {"recompute": True}, (110, 190)),
    ],
)
def test_peaks_by_hand(schedule, microbatches, how, peaks) -> None:
    assert simulate([UNIT] * 2, schedule, ranks=2, microbatches=microbatches, **how).peak_bytes == peaks


def test_peaks_of_one_rank_by_hand() -> None:
    costs = [Cost(1.0, 1.0, output_bytes=10, saved_bytes=100), Cost(1.0, 1.0, output_bytes=5, saved_bytes=200)]
    assert simulate(costs, "sequential").peak_bytes == (215,)  # the second block: its input, 200, its output
    assert simulate(costs, "gpipe").peak_bytes == (315,)  # everything
    assert simulate(costs, "1f1b", microbatches=3).peak_bytes == (315,)
    assert simulate(costs, "gpipe", microbatches=3).peak_bytes == (945,)


@pytest.mark.parametrize("ranks", [2, 4])
def test_1f1b_holds_one_micro_batch_a_rank_behind(ranks) -> None:
    """R - r micro-batches, whatever their number; GPipe all of them."""
    costs = [Cost(1.0, 2.0, saved_bytes=1)] * ranks
    run = simulate(costs, "1f1b", ranks=ranks, microbatches=8)
    assert run.peak_bytes == tuple(ranks - r for r in range(ranks))
    assert simulate(costs, "gpipe", ranks=ranks, microbatches=8).peak_bytes == (8,) * ranks
    assert simulate(costs, "local", ranks=ranks).peak_bytes == (1,) * ranks


def _case(seed):
    rng = random.Random(seed)
    blocks = [
        Cost(
            rng.random(), rng.random(), head=rng.choice([0.0, rng.random()]), update=rng.choice([0.0, rng.random()]),
            output_bytes=rng.randint(0, 50), saved_bytes=rng.randint(0, 50),
        )
        for _ in range(rng.randint(1, 7))
    ]  # fmt: skip
    how = {
        "ranks": rng.randint(1, len(blocks)),
        "bandwidth": rng.choice([math.inf, 100.0, 10.0]),
        "latency": rng.choice([0.0, rng.random()]),
        "overlap": rng.random() < 0.7,
        "jitter": rng.choice([0.0, 0.5]),
        "seed": seed,
        "steps": 12,
    }
    return rng, blocks, how


@pytest.mark.parametrize("seed", range(40))
def test_a_local_pipeline_keeps_every_rule(seed) -> None:
    rng, blocks, how = _case(seed)
    buffers = rng.randint(1, 3)
    run = simulate(blocks, "local", buffers=buffers, **how)
    _nothing_overlaps(run, how["overlap"])
    at = {(s.kind, s.block, s.step): s for s in run.spans}
    rank_of = {k: r for r, (a, b) in enumerate(run.blocks) for k in range(a, b)}
    for k, step in itertools.product(range(len(blocks)), range(run.steps)):
        forward, backward = at["forward", k, step], at["backward", k, step]
        assert forward.end <= backward.start and forward.row == backward.row == rank_of[k]
        assert ("head", k, step) in at or not blocks[k].head
        if step:
            last = at.get(("update", k, step - 1), at["backward", k, step - 1])
            assert last.end <= forward.start
        if k and rank_of[k] != rank_of[k - 1]:
            sent = at["send", k - 1, step]
            assert sent.start >= at["forward", k - 1, step].end and forward.start >= sent.end + how["latency"] - 1e-9
            if step >= buffers:
                assert at["forward", k - 1, step].start >= at["backward", k, step - buffers].end
    assert not any(s.kind == "send back" for s in run.spans)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_a_pipeline_of_back_propagation_keeps_every_rule(schedule, seed) -> None:
    rng, blocks, how = _case(seed)
    micro = rng.randint(1, 6)
    run = simulate(blocks, schedule, microbatches=micro, recompute=rng.random() < 0.3, **how)
    _nothing_overlaps(run, how["overlap"])
    at = {(s.kind, s.row, s.name.partition("batch ")[2] or "0", s.step): s for s in run.spans}
    updates = {(s.row, s.step): s for s in run.spans if s.kind == "update"}
    last = run.ranks - 1
    for r, m, step in itertools.product(range(run.ranks), map(str, range(micro)), range(run.steps)):
        forward, backward = at["forward", r, m, step], at["backward", r, m, step]
        assert forward.end <= backward.start
        if r:
            sent = at["send", r - 1, m, step]
            assert at["forward", r - 1, m, step].end <= sent.start
            assert forward.start >= sent.end + how["latency"] - 1e-9
        if r < last:
            back = at["send back", r + 1, m, step]
            assert at["backward", r + 1, m, step].end <= back.start
            assert backward.start >= back.end + how["latency"] - 1e-9
        if (r, step) in updates:
            assert updates[r, step].start >= backward.end
            if (follow := at.get(("forward", r, m, step + 1))) is not None:
                assert follow.start >= updates[r, step].end
    assert len([s for s in run.spans if s.kind in ("forward", "backward")]) == 2 * run.ranks * micro * run.steps


def _nothing_overlaps(run, beside) -> None:
    """On a rank, on a link, and between them where a rank does not compute while it sends."""
    rows: dict = {}
    for s in run.spans:
        message = s.kind.startswith("send")
        rows.setdefault((s.row, s.kind if message and beside else ""), []).append(s)
    for spans in rows.values():
        spans.sort(key=lambda s: (s.start, s.end))
        assert all(a.end <= b.start + 1e-9 for a, b in itertools.pairwise(spans))


def test_the_same_seed_gives_the_same_run_and_jitter_its_mean() -> None:
    runs = [simulate([UNIT] * 3, ranks=3, jitter=0.4, seed=seed) for seed in (1, 1, 2)]
    assert runs[0].spans == runs[1].spans and runs[0].seconds != runs[2].seconds
    alone = simulate([UNIT], "sequential", jitter=0.4, steps=2000)
    assert alone.seconds == pytest.approx(3 * 1.4, rel=0.03)
    assert runs[0].seconds > alone.seconds  # the slowest rank of each moment holds the others up


@pytest.mark.parametrize("seed", range(30))
def test_ranks_are_balanced(seed) -> None:
    rng = random.Random(seed)
    seconds = [rng.choice([0.0, 1.0, rng.random() * 5]) for _ in range(rng.randint(1, 8))]
    ranks = rng.randint(1, len(seconds))
    best = min(
        max(sum(seconds[a:b]) for a, b in itertools.pairwise((0, *cuts, len(seconds))))
        for cuts in itertools.combinations(range(1, len(seconds)), ranks - 1)
    )
    found = assign(seconds, ranks)
    assert len(found) == ranks and found[0][0] == 0 and found[-1][1] == len(seconds)
    assert all(a < b for a, b in found) and all(a[1] == b[0] for a, b in itertools.pairwise(found))
    assert max(sum(seconds[a:b]) for a, b in found) == pytest.approx(best)


def test_a_comparison_is_against_the_same_work_on_one_rank() -> None:
    local = [Cost(1.0, 2.0, head=1.0, output_bytes=2**20, saved_bytes=2**21)] * 4
    whole, micro = [Cost(1.0, 2.0)] * 4, [Cost(0.25, 0.5)] * 4
    found = compare(local, whole, micro, title="a title", ranks=4, microbatches=4)
    assert found["local, one rank"].seconds == pytest.approx(16) and found["local"].seconds == pytest.approx(4)
    assert found["bp, one rank"].seconds == pytest.approx(12)
    assert found["gpipe"].seconds == found["1f1b"].seconds == pytest.approx(7 * 0.75)
    assert found["1f1b, recompute"].seconds == pytest.approx(7 * 1.0)
    lines = found.to_text().splitlines()
    assert lines[0] == "a title" and len(lines) == 2 + 7
    row = next(line for line in lines if line.startswith("local  "))
    assert row.split() == ["local", "4", "4,000.000", "4.00", "0.0", "%", "3.00", "4.00", "3,000.000"]
    assert "local" not in compare(None, whole, micro, title="", ranks=2, microbatches=1).runs
    # stragglers and links are those of the ranks, not of the one rank that they are compared with
    slow = compare(local, whole, micro, title="", ranks=4, microbatches=4, straggler={1: 3.0}, bandwidth=1e9)
    assert slow["local, one rank"].seconds == pytest.approx(16) and slow["local"].seconds == pytest.approx(12)
    with pytest.raises(ArgumentError, match="1f1b"):
        Comparison("", found.runs)["1f2b"]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"schedule": "1b1f"}, "schedule: got '1b1f'"),
        ({"ranks": 0}, "ranks: expected an integer of at least 1, got 0"),
        ({"ranks": True}, "ranks"),
        ({"ranks": 3}, "3 ranks for 2 blocks"),
        ({"bandwidth": 0}, "bandwidth: expected bytes per second above 0"),
        ({"latency": -1.0}, "latency: expected a number from 0"),
        ({"latency": math.nan}, "latency"),
        ({"jitter": -0.1}, "jitter"),
        ({"microbatches": 2}, "microbatches: go with 'gpipe' and '1f1b'"),
        ({"recompute": True}, "recompute: goes with"),
        ({"buffers": 0}, "buffers"),
        ({"steps": 1}, "steps: give at least 2"),
        ({"schedule": "sequential", "ranks": 2}, "'sequential' is one rank"),
        ({"straggler": {2: 2.0}, "ranks": 2}, "there is no rank 2; ranks are 0 to 1"),
        ({"straggler": [2.0], "ranks": 2}, "1 factors for 2 ranks"),
        ({"straggler": {0: 0.0}}, "expected factors above 0, got 0.0"),
        ({"straggler": {0: "2"}}, "expected factors above 0, got '2'"),
    ],
)
def test_bad_arguments(how, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        simulate([UNIT] * 2, **how)


def test_bad_costs() -> None:
    with pytest.raises(ArgumentError, match="forward: expected a number from 0, got -1"):
        Cost(-1.0, 1.0)
    with pytest.raises(ArgumentError, match="blocks: there are none"):
        simulate([])
