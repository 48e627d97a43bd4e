"""The native scheduler inside one step: list scheduling, budgets against brute force, arguments, work and threads."""

from __future__ import annotations

import itertools
import math
import random
import re
import threading
import time
from typing import Any

import numpy as np
import pytest

from fastlocal.engine._native import Pipeline, pipeline
from fastlocal.errors import ArgumentError

Edges = list[tuple[int, int]]


def schedule(cost: list[float], edges: Edges, **arguments: Any) -> Pipeline:
    return pipeline(cost, [(u, v, 0) for u, v in edges], **arguments)


def random_plan(rng: random.Random, size: int, density: float) -> tuple[list[float], Edges, list[int], list[int]]:
    """A random acyclic plan in which every buffer is freed by its maker or by something that comes after it."""
    edges = [(u, v) for v in range(size) for u in range(v) if rng.random() < density]
    after = [{i} for i in range(size)]
    for u, v in sorted(edges, reverse=True):
        after[u] |= after[v]
    made, freed = [rng.randint(0, 9) for _ in range(size)], [0] * size
    for i in range(size):
        freed[rng.choice(sorted(after[i]))] += made[i]
    names = rng.sample(range(size), size)  # so that the order of indices is not already topological

    def rename(values: list[int]) -> list[int]:
        return [value for _, value in sorted(zip(names, values, strict=True))]

    cost = [float(rng.choice([0, 0, 1, 2, 3, 0.5, 0.1])) for _ in range(size)]
    edges = [(names[u], names[v]) for u, v in edges]
    return cost, rng.sample(edges, len(edges)), rename(made), rename(freed)


def check(
    plan: Pipeline, cost: list[float], edges: Edges, made: list[int], freed: list[int], streams: int, budget: int | None
) -> None:
    size = len(cost)
    assert sorted(plan.order) == list(range(size)) and len(plan.stream) == len(plan.start) == size
    end = [plan.start[i] + cost[i] for i in range(size)]
    place = {task: at for at, task in enumerate(plan.order)}
    for u, v in edges:
        assert place[u] < place[v] and end[u] <= plan.start[v]
    assert all(plan.start[a] <= plan.start[b] for a, b in itertools.pairwise(plan.order))
    assert set(plan.stream) <= set(range(streams))
    for s in set(plan.stream):
        mine = [i for i in plan.order if plan.stream[i] == s]
        assert all(end[a] <= plan.start[b] for a, b in itertools.pairwise(mine))
    assert plan.period == max(end, default=0.0)
    # Memory, as documented: at each dispatch, all that was made so far less what the tasks that have ended freed.
    peak = 0
    for at, task in enumerate(plan.order):
        alive = sum(made[i] for i in plan.order[: at + 1])
        alive -= sum(freed[i] for i in plan.order[:at] if end[i] <= plan.start[task])
        peak = max(peak, alive)
    assert plan.peak_bytes == peak
    if budget is not None:
        assert peak <= budget


def least_peak(edges: Edges, made: list[int], freed: list[int]) -> int:
    """The lowest peak of any sequential order, over all sets of tasks done so far."""
    size = len(made)
    needs = [0] * size
    for u, v in edges:
        needs[v] |= 1 << u
    best = {0: 0}
    for done in range(1 << size):
        if done not in best:
            continue
        alive = sum(made[i] - freed[i] for i in range(size) if done >> i & 1)
        for i in range(size):
            if not done >> i & 1 and not needs[i] & ~done:
                then = done | 1 << i
                best[then] = min(best.get(then, math.inf), max(best[done], alive + made[i]))
    return best[(1 << size) - 1]


def longest_path(cost: list[float], edges: Edges) -> float:
    ahead = list(cost)
    for _ in cost:  # relax as often as a path can be long
        for u, v in edges:
            ahead[u] = max(ahead[u], cost[u] + ahead[v])
    return max(ahead)


@pytest.mark.parametrize("streams", [1, 2, 5])
def test_random_plans_are_legal_and_within_grahams_bound(streams: int) -> None:
    rng = random.Random(streams)
    for _ in range(150):
        cost, edges, made, freed = random_plan(rng, rng.randint(1, 14), rng.choice([0.1, 0.3, 0.6]))
        plan = schedule(cost, edges, bytes_made=made, bytes_freed=freed, streams=streams)
        check(plan, cost, edges, made, freed, streams, None)
        path = longest_path(cost, edges)
        assert plan.period >= max(path, sum(cost) / streams) - 1e-9
        assert plan.period <= 1.02 * (sum(cost) / streams + (1 - 1 / streams) * path)


@pytest.mark.parametrize("streams", [1, 3])
def test_budget_is_kept_and_refusals_are_honest(streams: int) -> None:
    rng = random.Random(10 + streams)
    met_exactly = tight = 0
    for _ in range(60):
        cost, edges, made, freed = random_plan(rng, rng.randint(2, 10), rng.choice([0.15, 0.3, 0.6]))
        least = least_peak(edges, made, freed)
        free = schedule(cost, edges, bytes_made=made, bytes_freed=freed, streams=streams)
        for budget in {least - 1, least, least + 3, free.peak_bytes}:
            if budget < 0:
                continue
            try:
                plan = schedule(cost, edges, bytes_made=made, bytes_freed=freed, streams=streams, memory_budget=budget)
            except ArgumentError as error:
                needs, short = map(int, re.findall(r"needs is (\d+).*give (\d+) bytes more", str(error))[0])
                assert needs >= least and short == needs - budget > 0
                # What the message asks for must do.
                plan = schedule(cost, edges, bytes_made=made, bytes_freed=freed, streams=streams, memory_budget=needs)
                check(plan, cost, edges, made, freed, streams, needs)
                tight += budget == least
            else:
                assert budget >= least
                check(plan, cost, edges, made, freed, streams, budget)
                met_exactly += budget == least
    assert met_exactly >= 9 * tight  # the least of all orders is NP-hard to find, but it is found nearly always


@pytest.mark.parametrize(
    ("edges", "made", "freed"),
    [
        ([(4, 1), (2, 5), (0, 5), (4, 3), (5, 3)], [6, 7, 4, 6, 2, 8], [6, 9, 0, 14, 0, 4]),  # by index
        ([(0, 4), (4, 3), (4, 2), (1, 2)], [0, 6, 4, 8, 1], [0, 0, 10, 9, 0]),  # depth first
        ([(2, 0), (2, 1), (0, 3)], [7, 8, 3, 4], [0, 11, 0, 11]),  # what leaves least behind first
        ([(2, 1), (0, 3), (1, 3)], [3, 4, 9, 6], [0, 13, 0, 9]),  # the same from the end
    ],
)
def test_plans_whose_least_peak_only_one_of_the_orders_tried_finds(edges: Edges, made: list, freed: list) -> None:
    cost, least = [1.0] * len(made), least_peak(edges, made, freed)
    plan = schedule(cost, edges, bytes_made=made, bytes_freed=freed, streams=2, memory_budget=least)
    check(plan, cost, edges, made, freed, 2, least)


def producers_and_consumers(pairs: int) -> tuple[list[float], Edges, list[int], list[int]]:
    """The hardest case for a budget of 1010: many ready producers of high priority that may not run yet."""
    rng = random.Random(7)
    cost = [5 + rng.random() for _ in range(pairs)] + [1.0] * pairs
    made, freed = [3] * pairs + [1000] * pairs, [2] * pairs + [1001] * pairs
    return cost, [(i, pairs + i) for i in range(pairs)], made, freed


@pytest.mark.parametrize("streams", [1, 4])
def test_budget_with_many_ready_tasks_that_may_not_run(streams: int) -> None:
    cost, edges, made, freed = producers_and_consumers(60)
    plan = schedule(cost, edges, bytes_made=made, bytes_freed=freed, streams=streams, memory_budget=1010)
    check(plan, cost, edges, made, freed, streams, 1010)


def test_budget_costs_little_speed_when_it_is_ample() -> None:
    # 40 steps of 10 blocks: forward, head, backward, update; block k of step t+1 may run beside block k+1 of step t.
    cost, made, freed, edges, forward, update = [], [], [], [], {}, {}
    for step, block in itertools.product(range(40), range(10)):
        at = len(cost)
        cost += [3.0, 1.0, 6.0, 1.0]
        made += [110, 5, 3, 0]
        freed += [0, 0, 108 + (10 if block else 0) + (10 if block == 9 else 0), 0]
        edges += [(at, at + 1), (at + 1, at + 2), (at + 2, at + 3)]
        if block:
            edges.append((forward[step, block - 1], at))
        if step:
            edges.append((update[step - 1, block], at))
        forward[step, block], update[step, block] = at, at + 3
    arguments = {"bytes_made": made, "bytes_freed": freed, "streams": 4}
    free = schedule(cost, edges, **arguments)
    assert free.period <= 1.05 * sum(cost) / 4
    # A block needs 118 bytes and the boundaries of those in flight: three quarters of the memory hold three of four.
    for budget, slower in ((free.peak_bytes, 1.0), (free.peak_bytes - 1, 1.1), (free.peak_bytes * 3 // 4, 4 / 3)):
        plan = schedule(cost, edges, **arguments, memory_budget=budget)
        check(plan, cost, edges, made, freed, 4, budget)
        assert plan.period <= 1.1 * slower * free.period


def test_one_stream_takes_the_order_of_indices_where_it_is_topological() -> None:
    rng = random.Random(5)
    for _ in range(50):
        size = rng.randint(1, 40)
        edges = [(u, v, rng.choice([0, 0, 1])) for v in range(size) for u in range(v) if rng.random() < 0.2]
        plan = pipeline([rng.random() for _ in range(size)], edges, in_flight=rng.choice([1, 3]))
        assert plan.order == list(range(size)) and plan.stage == [0] * size and plan.waits == [[]] * size
    assert schedule([1, 1, 1], [(2, 0)]).order == [1, 2, 0]


def test_critical_path_first() -> None:
    # 3 -> 4 is the longest path although 0, 1 and 2 come before it.
    plan = schedule([1, 1, 1, 1, 5], [(3, 4)], streams=2)
    assert plan.period == 6 and plan.start[3] == 0


def test_repeats_bit_for_bit() -> None:
    cost, edges, made, freed = random_plan(random.Random(4), 200, 0.05)
    plans = [schedule(cost, edges, bytes_made=made, bytes_freed=freed, streams=4) for _ in range(3)]
    assert plans[0] == plans[1] == plans[2]


def test_empty_plan_and_numpy_arguments() -> None:
    assert pipeline([], [], streams=3, in_flight=2)[:-1] == ([], [], [], [], [], 0.0, 1, 0, [])
    edges = np.array([[0, 1, 0]], np.int32)
    made, freed = np.array([4, 4], np.int32), np.array([0, 8], np.uint8)
    plan = pipeline(
        np.array([1, 2]), edges, bytes_made=made, bytes_freed=freed, streams=np.int64(2), group=np.array([0, 0])
    )
    assert plan.order == [0, 1] and plan.peak_bytes == 8 and plan.pools == [0]
    assert pipeline([0, 0], [(0, 1, 1)], streams=2**40, in_flight=2**40, memory_budget=0).period == 0
    assert pipeline([1, 1], [], streams=2**40, pinned=[-1, 2**40 - 1]).stream == [0, 2**40 - 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cost": [1, -2]}, r'cost of task 1 "b" is -2; it must be finite and not negative'),
        ({"cost": [1, math.nan]}, "cost of task 1 .* finite"),
        ({"cost": [math.inf, 1]}, "cost of task 0 .* finite"),
        ({"cost": [[1.0, 2.0]]}, "cost must be a flat sequence"),
        ({"cost": ["x", "y"]}, "cost must be a flat sequence of numbers"),
        ({"cost": [1e308, 1e308]}, "cost adds up to inf; give it in a larger unit"),
        ({"edges": [(0, 1, 0), (0, 2, 1)]}, r"edges\[1\] = \(0, 2, 1\) is out of range; there are 2 tasks"),
        ({"edges": [(-1, 1, 0)]}, r"edges\[0\] = \(-1, 1, 0\) is out of range"),
        ({"edges": [(0, 1, -1)]}, r"edges\[0\] = \(0, 1, -1\) has a negative distance; a task can need only"),
        ({"edges": [0, 1]}, r"edges has shape \(2,\); it must be \(any, 3\)"),
        ({"edges": [(0, 1)]}, r"edges has shape \(1, 2\); it must be \(any, 3\)"),
        ({"edges": [(0.0, 1.0, 0.0)]}, "edges must hold 64-bit integers, got float64"),
        ({"bytes_made": [1]}, r"bytes_made has shape \(1,\); it must be \(2,\)"),
        ({"bytes_freed": []}, r"bytes_freed has shape \(0,\); it must be \(2,\)"),
        ({"bytes_made": [1, -1]}, r'bytes_made of task 1 "b" is -1; it must not be negative'),
        ({"bytes_freed": [-7, 1]}, r'bytes_freed of task 0 "a" is -7'),
        ({"bytes_made": [2**62, 2**62]}, "bytes_made adds up to more than"),
        ({"bytes_freed": [2**62, 2**62]}, "bytes_freed adds up to more than"),
        (
            {"bytes_made": [2**60, 2**59], "bytes_freed": [0, 2**60 + 2**59], "in_flight": 2},
            "more than .* for in_flight=2",
        ),
        ({"bytes_freed": [0, 1]}, "bytes_made adds up to 2 and bytes_freed to 1; a step must free all that it makes"),
        (
            {"bytes_freed": [2, 0]},
            r'bytes_freed of task 0 "a" is 2, but only 1 bytes of its step are alive when it ends',
        ),
        ({"group": [0, 2]}, r'group of task 1 "b" is 2; give -1 \(none\) or a number below that of the tasks, 2'),
        ({"group": [-2, 0]}, r'group of task 0 "a" is -2'),
        ({"group": [0]}, r"group has shape \(1,\); it must be \(2,\)"),
        ({"pinned": [1, 0]}, r'pinned of task 0 "a" is 1; give -1 \(any stream\) or a stream below streams=1'),
        ({"pinned": [0, -2]}, r'pinned of task 1 "b" is -2'),
        ({"pinned": [0.5, 0]}, "pinned must hold 64-bit integers"),
        (
            {"pinned": [0, 3], "group": [1, 1], "streams": 4},
            'pinned of task 1 "b" is 3, but another task of its group 1 is pinned to 0; a group runs on one stream',
        ),
        ({"in_flight": 0}, "in_flight is 0; give at least 1"),
        ({"in_flight": True}, "in_flight must be a 64-bit integer, got True"),
        ({"streams": 0}, "streams is 0; give at least 1"),
        ({"streams": None}, "streams must be a 64-bit integer, got None"),
        ({"streams": 1.5}, "streams must be a 64-bit integer"),
        ({"memory_budget": -1}, "memory_budget is -1; it must not be negative"),
        ({"memory_budget": 2**63}, "memory_budget must be a 64-bit integer"),
        ({"names": ["a"]}, "names has 1 entries for 2 tasks"),
        ({"memory_budget": 1}, r'memory_budget of 1 bytes .* needs is 2, at task 1 "b"; give 1 bytes more'),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    good = {"cost": [1, 1], "edges": [(0, 1, 0)], "bytes_made": [1, 1], "bytes_freed": [0, 2], "names": ["a", "b"]}
    assert pipeline(**good).order == [0, 1]
    with pytest.raises(ArgumentError, match=message):
        pipeline(**{**good, **arguments})


def test_cycle_is_named() -> None:
    edges = [(0, 1), (1, 2), (2, 3), (3, 1), (3, 4)]  # 4 only hangs off the cycle, 0 only leads into it
    with pytest.raises(ArgumentError) as error:
        schedule([1] * 5, edges, names=list("abcde"))
    assert 'cycle of 3: task 1 "b" -> task 2 "c" -> task 3 "d" -> task 1 "b"' in str(error.value)
    with pytest.raises(ArgumentError, match="cycle of 1: task 0 -> task 0"):
        schedule([1], [(0, 0)])
    with pytest.raises(ArgumentError, match=r"cycle of 500: task 0 -> task 1 -> .* \.\.\. -> task 0;"):
        schedule([1] * 500, [(i, (i + 1) % 500) for i in range(500)])


def test_every_cycle_named_is_one() -> None:
    rng = random.Random(6)
    for _ in range(50):
        size = rng.randint(2, 12)
        edges = [(rng.randrange(size), rng.randrange(size)) for _ in range(2 * size)]
        try:
            schedule([1] * size, edges)
        except ArgumentError as error:
            cycle = [int(task) for task in re.findall(r"task (\d+)", str(error))]
            assert cycle[0] == cycle[-1] and len(set(cycle)) == len(cycle) - 1
            assert set(itertools.pairwise(cycle)) <= set(edges)
        else:
            assert all(u != v for u, v in edges)


@pytest.mark.parametrize("budget", [None, 1010])
def test_work_grows_nearly_linearly(budget: int | None) -> None:
    """Counts the scheduler's own operations, which no other load on the machine can change."""

    def operations(pairs: int) -> int:
        cost, edges, made, freed = producers_and_consumers(pairs)
        return schedule(cost, edges, bytes_made=made, bytes_freed=freed, streams=4, memory_budget=budget).operations

    small, large = operations(1000), operations(10_000)
    assert large <= 10 * small * math.log2(20_000) / math.log2(2_000) * 1.1
    assert large <= (20 if budget is None else 150) * 20_000 * math.log2(20_000)


def test_other_threads_run_meanwhile() -> None:
    """A tick in the middle fifth of the call, where it is inside the scheduler, shows that the GIL is free."""
    size = 60_000
    rng = np.random.default_rng(0)
    cost = rng.random(size)
    after = rng.integers(1, size, 3 * size)
    edges = np.stack([(rng.random(3 * size) * after).astype(np.int64), after], 1)
    span = [0.0, 0.0]

    def call() -> None:
        span[0] = time.perf_counter()
        schedule(cost, edges, streams=8)
        span[1] = time.perf_counter()

    for _ in range(5):  # a busy machine may leave the ticking thread waiting
        thread, ticks = threading.Thread(target=call), []
        thread.start()
        while thread.is_alive():
            ticks.append(time.perf_counter())
            time.sleep(0.0005)
        begin, end = span
        if any(begin + 0.4 * (end - begin) < tick < begin + 0.6 * (end - begin) for tick in ticks):
            return
    pytest.fail("no other thread ran while the scheduler did")
