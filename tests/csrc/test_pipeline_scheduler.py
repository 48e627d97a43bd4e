"""Pipelines against their definition, written out here: legality, memory, waits and pools, and exhaustive search."""

from __future__ import annotations

import itertools
import math
import random
from collections import defaultdict
from typing import Any, NamedTuple

import pytest

from fastlocal.engine._native import Pipeline, pipeline

Edges = list[tuple[int, int, int]]


class Case(NamedTuple):
    cost: list[float]
    edges: Edges
    made: list[int]
    freed: list[int]
    group: list[int]
    pinned: list[int]

    def run(self, **arguments: Any) -> Pipeline:
        given = {"bytes_made": self.made, "bytes_freed": self.freed, "group": self.group, "pinned": self.pinned}
        return pipeline(self.cost, self.edges, **{**given, **arguments})


def random_case(
    rng: random.Random, size: int, density: float = 0.3, *, groups: bool = True, streams: int = 1, pins: float = 0.0
) -> Case:
    """A random step. What it makes is freed by the maker or by something that comes after it in the step."""
    within = [(u, v, 0) for v in range(size) for u in range(v) if rng.random() < density]
    after = [{i} for i in range(size)]
    for u, v, _ in sorted(within, reverse=True):
        after[u] |= after[v]
    across = [
        (rng.randrange(size), rng.randrange(size), rng.choice([1, 1, 1, 2, 3]))
        for _ in range(rng.randint(0, size // 2))
    ]
    made, freed = [rng.randint(0, 9) for _ in range(size)], [0] * size
    for i in range(size):
        freed[rng.choice(sorted(after[i]))] += made[i]
    names = rng.sample(range(size), size)  # so that the order of indices is not already topological
    edges = [(names[u], names[v], d) for u, v, d in within + across]

    def rename(values: list[int]) -> list[int]:
        return [value for _, value in sorted(zip(names, values))]

    cost = [float(rng.choice([0, 1, 1, 2, 3, 0.5, 0.1])) for _ in range(size)]
    group = [rng.randint(-1, max(0, size // 3)) if groups else -1 for _ in range(size)]
    of_group = {g: rng.randrange(streams) if rng.random() < pins else -1 for g in range(size)}
    pinned = [
        of_group[g]
        if g >= 0 and rng.random() < 0.7
        else rng.randrange(streams)
        if g < 0 and rng.random() < pins
        else -1
        for g in group
    ]
    return Case(cost, rng.sample(edges, len(edges)), rename(made), rename(freed), group, pinned)


def blocks_case(blocks: int, cost: list[list[float]], boundary: int = 10, inside: int = 100) -> Case:
    """K blocks: forward, head, backward, update and free of each, on one stream."""
    edges: Edges = []
    for k in range(blocks):
        f, h, b, u, e = range(5 * k, 5 * k + 5)
        edges += [(f, h, 0), (h, b, 0), (b, u, 0), (u, f, 1), (b, e, 0)]
        if k:
            edges += [(f - 5, f, 0), (b, e - 5, 0)]
    freed = [0, 3, inside, 0, boundary]
    return Case(
        [c for row in cost for c in row],
        edges,
        [boundary + inside, 3, 0, 0, 0] * blocks,
        freed * blocks,
        [i // 5 for i in range(5 * blocks)],
        [-1] * (5 * blocks),
    )


def active(plan: Pipeline, round_: int, steps: int) -> list[int]:
    return [i for i in plan.order if 0 <= round_ - plan.stage[i] < steps]


def replayed_peak(case: Case, plan: Pipeline, steps: int) -> int:
    """Round by round, dispatch by dispatch: all that was made so far less what the tasks that have ended freed."""
    before = peak = 0
    for round_ in range(steps + plan.in_flight - 1):
        now = active(plan, round_, steps)
        for at, task in enumerate(now):
            ended = [i for i in now[:at] if plan.start[i] + case.cost[i] <= plan.start[task]]
            alive = before + sum(case.made[i] for i in now[: at + 1]) - sum(case.freed[i] for i in ended)
            peak = max(peak, alive)
        before += sum(case.made[i] - case.freed[i] for i in now)
    assert before == 0
    return peak


Span = tuple[float, float]


def play(case: Case, plan: Pipeline, steps: int, rng: random.Random) -> dict[tuple[int, int], Span]:
    """(task, step) -> when it ran, with random durations, knowing only the order of every stream and the waits. Tasks of
    steps that do not exist are not there at all."""
    spans: dict[tuple[int, int], Span] = {}
    barrier = 0.0
    for round_ in range(steps + plan.in_flight - 1):
        ends: dict[int, float] = {}
        free: dict[int, float] = defaultdict(lambda barrier=barrier: barrier)
        for task in active(plan, round_, steps):
            start = max([free[plan.stream[task]], *(ends[w] for w in plan.waits[task] if w in ends)])
            start += rng.choice([0.0, rng.random()])  # a stream may dawdle
            ends[task] = free[plan.stream[task]] = start + rng.choice([0.0, rng.random(), 10 * rng.random()])
            spans[task, round_ - plan.stage[task]] = start, ends[task]
        barrier = max(ends.values(), default=barrier)
    return spans


def check_pools(case: Case, plan: Pipeline, spans: dict[tuple[int, int], Span], steps: int) -> None:
    groups = 1 + max(case.group, default=-1)
    assert len(plan.pools) == groups
    lives = defaultdict(list)
    for g in range(groups):
        mine = [i for i in range(len(case.cost)) if case.group[i] == g]
        for step in range(steps if mine else 0):
            times = [spans[i, step] for i in mine]
            lives[plan.pools[g]].append((min(t[0] for t in times), max(t[1] for t in times), g))
    for pool in lives.values():
        for a, b in itertools.combinations(pool, 2):
            assert a[2] == b[2] or a[1] <= b[0] or b[1] <= a[0]


def implied(plan: Pipeline, u: int, v: int) -> bool:
    """Whether v waits for u without being told so, in the round that has the fewest tasks beside them."""
    low, high = sorted((plan.stage[u], plan.stage[v]))
    there = [i for i in plan.order if low <= plan.stage[i] <= high]
    known = {u}
    for i in there[there.index(u) + 1 :]:
        earlier = [j for j in known if plan.stream[j] == plan.stream[i] or (j in plan.waits[i] and (j, i) != (u, v))]
        if earlier:
            known.add(i)
    return v in known


def check(case: Case, plan: Pipeline, streams: int, in_flight: int, budget: int | None = None, seed: int = 0) -> None:
    size = len(case.cost)
    assert sorted(plan.order) == list(range(size))
    assert {len(plan.stage), len(plan.stream), len(plan.start), len(plan.waits)} == {size}
    assert plan.in_flight == 1 + max(plan.stage, default=0) <= in_flight
    assert set(plan.stage) == set(range(plan.in_flight)) if size else True
    assert set(plan.stream) <= set(range(streams))
    assert all(p in (-1, s) for p, s in zip(case.pinned, plan.stream))
    assert len({(g, s) for g, s in zip(case.group, plan.stream) if g >= 0}) == len({g for g in case.group if g >= 0})
    end = [s + c for s, c in zip(plan.start, case.cost)]
    place = {task: at for at, task in enumerate(plan.order)}
    assert all(plan.start[a] <= plan.start[b] for a, b in itertools.pairwise(plan.order))
    assert plan.period == max(end, default=0.0)
    for u, v, d in case.edges:
        assert plan.stage[u] <= plan.stage[v] + d
        if plan.stage[u] == plan.stage[v] + d and (u, d) != (v, d):
            assert place[u] < place[v] and end[u] <= plan.start[v]
    for s in set(plan.stream):
        mine = [i for i in plan.order if plan.stream[i] == s]
        assert all(end[a] <= plan.start[b] for a, b in itertools.pairwise(mine))
    for v, waits in enumerate(plan.waits):
        assert len(set(waits)) == len(waits)
        for u in waits:
            assert place[u] < place[v] and plan.stream[u] != plan.stream[v]
            assert end[u] <= plan.start[v] and not implied(plan, u, v)
    steps = plan.in_flight + 2
    assert plan.peak_bytes == replayed_peak(case, plan, steps)
    if budget is not None:
        assert plan.peak_bytes <= budget
    rng = random.Random(seed)
    for steps in (1, 2, steps):
        assert replayed_peak(case, plan, steps) <= plan.peak_bytes
        for _ in range(3):
            spans = play(case, plan, steps, rng)
            assert len(spans) == steps * size
            for (v, step), (start, _) in spans.items():
                for u, w, d in case.edges:
                    if w == v and step >= d:
                        assert spans[u, step - d][1] <= start
            check_pools(case, plan, spans, steps)


@pytest.mark.parametrize("in_flight", [1, 2, 4])
@pytest.mark.parametrize("streams", [1, 2, 4])
def test_random_steps(streams: int, in_flight: int) -> None:
    rng = random.Random(10 * streams + in_flight)
    for n in range(15):
        case = random_case(
            rng, rng.randint(1, 14), rng.choice([0.1, 0.3, 0.6]), streams=streams, pins=rng.choice([0, 0.4])
        )
        check(case, case.run(streams=streams, in_flight=in_flight), streams, in_flight, seed=n)
