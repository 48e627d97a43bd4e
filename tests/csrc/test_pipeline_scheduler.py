"""Pipelines against their definition, written out here: legality, memory, waits and pools, and exhaustive search."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections import defaultdict
from typing import Any, NamedTuple

import pytest

from fastlocal.engine._native import Pipeline, pipeline
from fastlocal.errors import ArgumentError

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


def alive_in_time(case: Case, spans: dict[tuple[int, int], Span]) -> int:
    """Most bytes alive at the start of any task, when the tasks ran as `spans` says."""
    starts = sorted((start, case.made[i]) for (i, _), (start, _) in spans.items())
    ends = sorted((end, case.freed[i]) for (i, _), (_, end) in spans.items())
    alive = peak = done = 0
    for start, made in starts:
        while done < len(ends) and ends[done][0] <= start:
            alive -= ends[done][1]
            done += 1
        alive += made
        peak = max(peak, alive)
    return peak


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
    assert plan.peak_bytes == replayed_peak(case, plan, plan.in_flight + 2)
    if budget is not None:
        assert plan.peak_bytes <= budget
    rng = random.Random(seed)
    for steps in (1, 2, plan.in_flight + 2):
        assert replayed_peak(case, plan, steps) <= plan.peak_bytes
        for _ in range(3):
            spans = play(case, plan, steps, rng)
            assert len(spans) == steps * size
            for (v, step), (start, _) in spans.items():
                for u, w, d in case.edges:
                    if w == v and step >= d:
                        assert spans[u, step - d][1] <= start
            check_pools(case, plan, spans, steps)
            if budget is not None:  # it holds whatever the durations
                assert alive_in_time(case, spans) <= budget


@pytest.mark.parametrize("in_flight", [1, 2, 4])
@pytest.mark.parametrize("streams", [1, 2, 4])
def test_random_steps(streams: int, in_flight: int) -> None:
    rng = random.Random(10 * streams + in_flight)
    for n in range(15):
        case = random_case(
            rng, rng.randint(1, 14), rng.choice([0.1, 0.3, 0.6]), streams=streams, pins=rng.choice([0, 0.4])
        )
        check(case, case.run(streams=streams, in_flight=in_flight), streams, in_flight, seed=n)


def exhaustive(case: Case, streams: int, in_flight: int, below: float) -> float | None:
    """The shortest period under `below` of any stages, streams and orders; None if there is none."""
    size = len(case.cost)
    units: dict[Any, list[int]] = defaultdict(list)
    for i, g in enumerate(case.group):
        units[("group", g) if g >= 0 else ("alone", i)].append(i)
    best = below
    for stage in itertools.product(range(in_flight), repeat=size):
        if min(stage) or any(stage[u] > stage[v] + d for u, v, d in case.edges):
            continue
        before = [{u for u, v, d in case.edges if v == i and stage[u] == stage[i] + d and u != i} for i in range(size)]
        after = [{v for v in range(size) if i in before[v]} for i in range(size)]
        left: dict[int, float] = {}

        def ahead(i: int, after: list[set[int]] = after, left: dict[int, float] = left) -> float:
            if i not in left:
                left[i] = case.cost[i] + max((ahead(j) for j in after[i]), default=0.0)
            return left[i]

        if max(map(ahead, range(size))) >= best - 1e-9:
            continue
        for choice in itertools.product(range(streams), repeat=len(units)):
            stream = {i: s for s, tasks in zip(choice, units.values()) for i in tasks}
            if any(p not in (-1, stream[i]) for i, p in enumerate(case.pinned)):
                continue
            if max(sum(case.cost[i] for i in stream if stream[i] == s) for s in range(streams)) >= best - 1e-9:
                continue
            best = in_line(case.cost, before, left, stream, {}, dict.fromkeys(range(streams), 0.0), best)
    return best if best < below else None


def in_line(
    cost: list[float], before: list[set[int]], left: dict[int, float], stream: dict[int, int], ends: dict[int, float],
    free: dict[int, float], best: float,
) -> float:  # fmt: skip
    """Every order of the tasks that are left, each started as soon as what stands before it has ended."""
    if len(ends) == len(cost):
        return min(best, max(ends.values()))
    for i in range(len(cost)):
        if i in ends or not before[i] <= ends.keys():
            continue
        start = max([free[stream[i]], *(ends[u] for u in before[i])])
        if start + left[i] < best - 1e-9:
            end = start + cost[i]
            best = in_line(cost, before, left, stream, {**ends, i: end}, {**free, stream[i]: end}, best)
    return best


@pytest.mark.parametrize("groups", [False, True])
def test_period_is_within_a_fifth_of_exhaustive_search(groups: bool) -> None:
    rng = random.Random(20 + groups)
    for _ in range(60):
        streams, in_flight = rng.choice([2, 3]), rng.choice([1, 2, 3])
        case = random_case(rng, rng.randint(2, 6), rng.choice([0.1, 0.3, 0.6]), groups=groups, streams=streams)
        plan = case.run(streams=streams, in_flight=in_flight)
        assert exhaustive(case, streams, in_flight, plan.period / 1.2) is None
        assert exhaustive(case, streams, in_flight, plan.period + 1e-6) is not None  # it does find what there is


@pytest.mark.parametrize("streams", [1, 2, 3])
def test_budget_is_kept_whatever_the_durations(streams: int) -> None:
    rng = random.Random(30 + streams)
    refused = deeper = bound = 0
    for n in range(40):
        in_flight = rng.choice([1, 2, 3])
        case = random_case(rng, rng.randint(2, 12), rng.choice([0.15, 0.3]), streams=streams, pins=rng.choice([0, 0.3]))
        free = case.run(streams=streams, in_flight=in_flight)
        for budget in {free.peak_bytes, free.peak_bytes * 2 // 3, free.peak_bytes // 3}:
            arguments = {"streams": streams, "in_flight": in_flight, "memory_budget": budget}
            try:
                plan = case.run(**arguments)
            except ArgumentError as error:
                needs, short = map(int, re.findall(r"needs is (\d+).*give (\d+) bytes more", str(error))[0])
                assert short == needs - budget > 0
                plan = case.run(**{**arguments, "memory_budget": needs})  # what the message asks for must do
                budget, refused = needs, refused + 1
            check(case, plan, streams, in_flight, budget, seed=n)
            bound += plan.period > free.period
            deeper += plan.in_flight > 1 and budget < free.peak_bytes
    assert refused > 5 and (streams == 1 or (deeper > 5 and bound > 10))


def random_blocks(blocks: int, seed: int = 0, **arguments: Any) -> Case:
    rng = random.Random(seed)
    cost = [[c * rng.uniform(0.5, 1.5) for c in (1, 0.3, 2, 0.2, 0)] for _ in range(blocks)]
    return blocks_case(blocks, cost, **arguments)


@pytest.mark.parametrize("blocks", [2, 3, 16, 55, 300])
def test_two_streams_are_busy_all_the_time(blocks: int) -> None:
    case = random_blocks(blocks)
    largest = max(sum(case.cost[5 * k : 5 * k + 5]) for k in range(blocks))
    bound = max(sum(case.cost) / 2, largest)
    for in_flight in (2, 4):
        plan = case.run(streams=2, in_flight=in_flight)
        if blocks < 100:
            check(case, plan, 2, in_flight)
        # A set of few blocks cannot always be halved; what can be halved is, in time.
        halves = min(
            max(sum(part), sum(case.cost) - sum(part))
            for n in range(blocks + 1)
            for part in itertools.combinations([sum(case.cost[5 * k : 5 * k + 5]) for k in range(blocks)], n)
        ) if blocks < 4 else bound  # fmt: skip
        assert plan.period <= 1.025 * max(bound, halves)


def test_a_pipeline_of_equal_blocks_keeps_few_of_them_alive() -> None:
    case = blocks_case(32, [[1.0, 0.5, 2.0, 0.5, 0.0]] * 32)
    one, two = case.run(), case.run(streams=2, in_flight=2)
    check(case, two, 2, 2)
    assert one.period == 128 and 64 <= two.period <= 1.02 * 64  # what is 2 % longer counts as equal
    assert one.peak_bytes == 123 and two.peak_bytes <= 2.5 * one.peak_bytes
    assert len(set(one.pools)) == 2 and len(set(two.pools)) <= 5  # FREE comes after the next block's backward


def test_what_a_budget_costs_in_depth() -> None:
    case = blocks_case(16, [[1.0, 0.5, 2.0, 0.5, 0.0]] * 16)
    free, alone = case.run(streams=2, in_flight=2), case.run()
    check(case, free, 2, 2)
    assert free.in_flight == 2 and free.period == alone.period / 2
    tight = case.run(streams=2, in_flight=2, memory_budget=alone.peak_bytes)
    check(case, tight, 2, 2, alone.peak_bytes)
    assert free.period < tight.period <= alone.period
    with pytest.raises(ArgumentError, match=r"memory_budget of 122 bytes .* needs is 123, .*; give 1 bytes more"):
        case.run(streams=2, in_flight=2, memory_budget=122)


def test_ties_go_to_fewer_steps_in_flight() -> None:
    assert pipeline([1.0, 1.0], [], streams=2, in_flight=5).in_flight == 1
    chain = pipeline([1.0, 1.0], [(0, 1, 0)], streams=2, in_flight=5)
    assert (chain.in_flight, chain.period, chain.stage) == (2, 1.0, [0, 1])
    assert pipeline([1.0] * 6, [(i, i + 1, 0) for i in range(5)], streams=3, in_flight=6).period == 2.0
    assert pipeline([1.0] * 6, [(i, i + 1, 0) for i in range(5)], in_flight=6).in_flight == 1


def test_a_wait_that_only_a_task_of_another_step_would_imply_is_kept() -> None:
    """0 -> 2 in one step, 0 before 1 on stream 0, and 1 of the step before -> 2: in the first round 1 is not there."""
    rng, kept = random.Random(0), 0
    for _ in range(300):
        case = random_case(rng, 6, 0.4, streams=2, pins=0.5)
        plan = case.run(streams=2, in_flight=2)
        for waits in plan.waits:
            on = defaultdict(list)
            for u in waits:
                on[plan.stream[u]].append(plan.stage[u])
            kept += any(len(stages) > 1 for stages in on.values())
        check(case, plan, 2, 2)
    assert kept > 0


def lives(case: Case, plan: Pipeline, stream: int) -> dict[int, range]:
    """Per group of a stream: the places that a life takes, counted on into the next rounds."""
    line = [i for i in plan.order if plan.stream[i] == stream]
    when = {i: plan.stage[i] * len(line) + at for at, i in enumerate(line)}
    groups = {case.group[i] for i in line} - {-1}
    members = {g: [when[i] for i in line if case.group[i] == g] for g in groups}
    return {g: range(min(times), max(times) + 1) for g, times in members.items()}


def test_pools_are_few() -> None:
    rng = random.Random(5)
    fewest = shared = 0
    for _ in range(200):
        streams, in_flight = rng.choice([1, 2]), rng.choice([1, 2, 3])
        case = random_case(rng, rng.randint(3, 14), rng.choice([0.1, 0.3]), streams=streams)
        plan = case.run(streams=streams, in_flight=in_flight)
        for stream in set(plan.stream):
            size = plan.stream.count(stream)
            spans = lives(case, plan, stream)
            always = [g for g, life in spans.items() if len(life) > size]
            arcs = [life for g, life in spans.items() if g not in always]
            at_once = [sum(any(t % size == place for t in life) for life in arcs) for place in range(size)]
            across = [sum(any(t % size == place for t in life[1:]) for life in arcs) for place in range(size)]
            used = len({plan.pools[g] for g in spans})
            assert max(at_once) <= used - len(always) <= max(at_once) + min(across)
            fewest += min(across) == 0 and used - len(always) == max(at_once)
            shared += used < len(spans)
    assert fewest > 50 and shared > 20


def test_the_order_of_edges_does_not_matter_and_runs_repeat() -> None:
    rng = random.Random(6)
    for budgeted in (False, True):
        case = random_case(rng, 60, 0.08, streams=3)
        budget = case.run(streams=3, in_flight=3).peak_bytes * 3 // 4 if budgeted else None
        arguments = {"streams": 3, "in_flight": 3, "memory_budget": budget}
        first = case.run(**arguments)
        assert case.run(**arguments) == first
        for _ in range(3):
            again = case._replace(edges=rng.sample(case.edges, len(case.edges)))
            assert again.run(**arguments) == first
        twice = case._replace(edges=case.edges + rng.sample(case.edges, 20))
        assert twice.run(**arguments)[:-1] == first[:-1]  # all but the count of operations, which counts every edge


@pytest.mark.parametrize(("streams", "in_flight"), [(1, 1), (2, 2), (8, 4)])
@pytest.mark.parametrize("budget", [None, 2000])
def test_work_grows_nearly_linearly(streams: int, in_flight: int, budget: int | None) -> None:
    """Counts the scheduler's own operations, which no other load on the machine can change."""

    def operations(blocks: int) -> int:
        case = random_blocks(blocks, boundary=0)
        return case.run(streams=streams, in_flight=in_flight, memory_budget=budget).operations

    small, large = operations(400), operations(4000)
    assert large <= 2 * 10 * small * math.log2(20_000) / math.log2(2_000)
    assert large <= (100 if budget is None else 400) * 20_000 * math.log2(20_000)


def test_large_random_steps_are_legal() -> None:
    rng = random.Random(8)
    size = 1500
    edges = [(max(0, v - rng.randint(1, 40)), v, 0) for v in range(1, size) for _ in range(2)]
    edges += [(rng.randrange(size), rng.randrange(size), 1) for _ in range(200)]
    cost = [rng.random() for _ in range(size)]
    plan = pipeline(cost, edges, group=[i // 3 for i in range(size)], streams=4, in_flight=3)
    place = {task: at for at, task in enumerate(plan.order)}
    for u, v, d in edges:
        assert plan.stage[u] <= plan.stage[v] + d
        if plan.stage[u] == plan.stage[v] + d and u != v:
            assert place[u] < place[v] and plan.start[u] + cost[u] <= plan.start[v]
    assert plan.period <= 1.1 * sum(cost) / 4
