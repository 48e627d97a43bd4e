"""Composed graphs against steps in sequence, bit for bit, on graphs and a CUDA runtime that stand in for a device's."""

from __future__ import annotations

import copy
import gc
import itertools
import random
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import fastlocal as fl
from fastlocal import models
from fastlocal.engine import _native
from fastlocal.engine._native import Pipeline
from fastlocal.engine.composed import (
    CapturedStep,
    Composition,
    CudaComposer,
    _Draws,
    check_order,
    check_pools,
    pieces_of,
    variants_of,
)
from fastlocal.engine.schedule import best_schedule
from fastlocal.errors import ArgumentError, BackendError
from tests.csrc.fake_cuda import FakeCuda
from tests.engine import recorder
from tests.engine.composed_recorder import Composer
from tests.engine.test_graph import adamw, batch, fused_adamw, fused_sgd, localized, sgd
from tests.engine.untouched import assert_same, state_of

pytestmark = pytest.mark.skipif(not _native.available(), reason="the native extension is not built")

KINDS = ("forward", "head", "backward", "update")


class Net:
    """Blocks that train themselves, in plain PyTorch: the tasks of a step, and what passes between them."""

    def __init__(self, blocks: int, width: int = 6, classes: int = 3):
        g = torch.Generator().manual_seed(0)
        self.weights = [torch.randn(width, width, generator=g) / 2 for _ in range(blocks)]
        self.heads = [torch.randn(width, classes, generator=g) / 2 for _ in range(blocks)]
        self.momenta = [[torch.zeros_like(w), torch.zeros_like(v)] for w, v in zip(self.weights, self.heads)]
        for p in self.parameters():
            p.requires_grad_()

    def parameters(self) -> list[Tensor]:
        return [*self.weights, *self.heads]

    def state(self) -> list[Tensor]:
        return [t.detach().clone() for t in (*self.parameters(), *(m for pair in self.momenta for m in pair))]

    def begin(self, x: Tensor, y: Tensor, rate: Tensor) -> dict[str, Any]:
        return {"x": [x], "y": y, "rate": rate, "loss": {}}

    def run(self, step: dict[str, Any], kind: str, k: int) -> None:
        if kind == "forward":
            h = torch.relu(step["x"][k] @ self.weights[k])
            step["x"][k] = None if k else step["x"][0]  # nobody needs it any more, but who holds it
            step["x"].append(h.detach())
            step["h", k] = h
        elif kind == "head":
            z = step["h", k].detach().requires_grad_()
            loss = nn.functional.cross_entropy(z @ self.heads[k], step["y"])
            loss.backward()
            step["loss"][k] = loss.detach()
            step["owed", k] = z.grad
        elif kind == "backward":
            step.pop(("h", k)).backward(step.pop(("owed", k)))
        else:
            with torch.no_grad():
                for p, m in zip((self.weights[k], self.heads[k]), self.momenta[k]):
                    m.mul_(0.9).add_(p.grad)
                    p.sub_(m * step["rate"])
                    p.grad = None

    @staticmethod
    def alive(step: dict[str, Any]) -> list[Tensor]:
        return [*(x for x in step["x"] if x is not None), *step["loss"].values()]


def tasks_of(blocks: int) -> list[tuple[str, int]]:
    return [(kind, k) for k in range(blocks) for kind in KINDS]


def edges_of(blocks: int) -> list[tuple[int, int, int]]:
    edges = []
    for k in range(blocks):
        edges += [(4 * k + i, 4 * k + i + 1, 0) for i in range(3)]
        edges += [(4 * k + 3, 4 * k + i, 1) for i in range(4)]
        edges += [(4 * k, 4 * k + 4, 0)] if k + 1 < blocks else []
    return edges


GROUPS = [k for _, k in tasks_of(4)]


def plan_of(blocks: int, streams: int, in_flight: int, seed: int = 0) -> Pipeline:
    rng = random.Random(seed)
    cost = [rng.choice([1.0, 2.0, 3.0]) for _ in range(4 * blocks)]
    group = [k for _, k in tasks_of(blocks)]
    return _native.pipeline(cost, edges_of(blocks), group=group, streams=streams, in_flight=in_flight)


def data(steps: int) -> list[tuple[Tensor, Tensor, float]]:
    g = torch.Generator().manual_seed(1)
    batches = [(torch.randn(5, 6, generator=g), torch.randint(3, (5,), generator=g)) for _ in range(steps)]
    return [(x, y, 0.1 / (1 + i)) for i, (x, y) in enumerate(batches)]


def in_sequence(blocks: int, steps: int) -> tuple[list[Tensor], list[Tensor]]:
    net, losses = Net(blocks), []
    for x, y, rate in data(steps):
        step = net.begin(x, y, torch.tensor(rate))
        for kind, k in tasks_of(blocks):
            net.run(step, kind, k)
        losses.append(torch.stack(list(step["loss"].values())))
    return net.state(), losses


class Composed:
    """The same by composed rounds."""

    def __init__(self, blocks: int, plan: Pipeline, composer: Any, variants: int | None = None):
        self.net, self.plan, self.composer = Net(blocks), plan, composer
        tasks = tasks_of(blocks)
        names = [f"{kind} {k}" for kind, k in tasks]
        self.rounds = Composition(plan, edges_of(blocks), [k for _, k in tasks], names, composer)
        self.variants = variants or self.rounds.variants
        self.inputs = [
            (torch.zeros(5, 6), torch.zeros(5, dtype=torch.int64), torch.zeros(())) for _ in range(self.variants)
        ]
        self.steps: list[CapturedStep] = []
        self.results: list[Tensor] = []
        for i in range(self.variants):
            step = self.net.begin(*self.inputs[i])
            made: list[Tensor] = []

            def results(step: Any = step, made: list[Tensor] = made) -> None:
                made.append(torch.stack([step["loss"][k] for k in range(blocks)]))

            def run(v: int, step: Any = step) -> None:
                self.net.run(step, *tasks[v])

            self.steps.append(self.rounds.capture(i, run, lambda s=step: self.net.alive(s), results))
            self.results += made

    def train(self, steps: int) -> tuple[list[Tensor], list[Tensor]]:
        losses: list[Tensor] = []
        stages = self.rounds.stages
        for r in range(steps + stages - 1):
            if r < steps:
                x, y, rate = data(steps)[r]
                mine = self.inputs[r % self.variants]
                for own, new in zip(mine, (x, y, torch.tensor(rate))):
                    own.copy_(new)
            now = [r - s for s in range(stages)]
            self.rounds.launch([self.steps[t % self.variants] if 0 <= t < steps else None for t in now])
            if now[-1] >= 0:
                losses.append(self.results[now[-1] % self.variants].clone())
        return self.net.state(), losses


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


SHAPES = [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (2, 3), (3, 3), (4, 4)]


@pytest.mark.parametrize("streams, in_flight", SHAPES)
def test_rounds_are_steps_in_sequence(streams: int, in_flight: int) -> None:
    expected = in_sequence(4, 6)
    for plan, order, composed in ((0, 5, True), (1, -1, True), (2, 6, False)):
        composer = Composer(composed=composed, seed=order)
        run = Composed(4, plan_of(4, streams, in_flight, plan), composer)
        state, losses = run.train(6)
        assert same(losses, expected[1]) and same(state, expected[0])
        run.rounds.close()
        assert (composer.cuda.alive, composer.cuda.misuse) == (0, 0)


# ---------------------------------------------------------------------------------------------------------------- traps


def differs(plan: Pipeline, change: Any, **options: Any) -> bool:
    """Whether one of some orders shows another result than steps in sequence."""
    expected = in_sequence(4, 6)
    for seed in (-1, 1, 2, 3):
        composer = Composer(seed=seed)
        change(composer)
        state, losses = Composed(4, plan, composer, **options).train(6)
        if not (same(losses, expected[1]) and same(state, expected[0])):
            return True
    return False


def test_the_traps_are_there_and_are_avoided() -> None:
    overlap, pipeline = plan_of(4, 3, 1), plan_of(4, 2, 2)
    assert variants_of(pieces_of(pipeline, GROUPS)) == 2
    for plan in (overlap, pipeline):
        assert not differs(plan, lambda c: None)

        def one_workspace(c: Composer) -> None:
            c.one_workspace = True

        assert differs(plan, one_workspace), "workspaces of a stream that captured all pieces"

        def one_pool(c: Composer) -> None:
            pool = c.new_pool()
            c.new_pool = lambda: pool  # type: ignore[method-assign]

        assert differs(plan, one_pool), "one pool for blocks that run side by side"
    assert differs(pipeline, lambda c: None, variants=1), "one buffer between a block and the next one's earlier step"


def test_what_other_pieces_read_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks 0 and 2 share a pool. Block 2 runs beside the backward of block 1, which still reads the output of block 0."""
    order = [0, 4, 1, 2, 3, 5, 6, 8, 7, 12, 9, 10, 11, 13, 14, 15]
    waits: list[list[int]] = [[] for _ in order]
    waits[4], waits[8], waits[12] = [0], [4], [8]
    plan = plan_of(4, 2, 1)._replace(order=order, stream=[k % 2 for k in GROUPS], waits=waits, pools=[0, 1, 0, 1])
    assert not differs(plan, lambda c: None)
    monkeypatch.setattr(Net, "alive", staticmethod(lambda step: []))
    assert differs(plan, lambda c: None)


def test_captured_graphs_and_buffers_live_as_long_as_rounds_of_them() -> None:
    composer = Composer()
    run = Composed(4, plan_of(4, 2, 2), composer)
    refs = [weakref.ref(g) for step in run.steps for g in step.graphs]
    pool = weakref.ref(run.steps[0].graphs[0]._pool)
    run.train(3)
    run.steps.clear()
    gc.collect()
    assert all(ref() is not None for ref in refs) and pool() is not None, "the composed rounds need them"
    assert composer.cuda.alive > 0
    run.rounds.close()
    del run
    gc.collect()
    assert all(ref() is None for ref in refs) and pool() is None and composer.cuda.alive == 0


def test_memory_that_is_gone_is_noticed() -> None:
    """The recorder itself: what the executor fails to hold does not stay by chance."""
    composer = Composer()
    run = Composed(4, plan_of(4, 2, 2), composer)
    run.inputs = [tuple(t.clone() for t in mine) for mine in run.inputs]  # type: ignore[misc]
    gc.collect()
    with pytest.raises(AssertionError, match="reads memory that was freed"):
        run.train(3)
    graph = composer.capture(lambda: torch.ones(2), 0, composer.new_pool())
    made = composer.compose([("task", graph.raw_cuda_graph(), 0, [])])
    composer.launch(made)
    del graph
    gc.collect()
    with pytest.raises(AssertionError, match="a captured graph is gone"):
        composer.launch(made)


def test_a_few_rounds_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastlocal.engine.composed._MAX_ROUNDS", 2)
    composer = Composer()
    run = Composed(4, plan_of(4, 2, 2), composer)
    expected = in_sequence(4, 6)
    assert same(run.train(6)[0], expected[0])
    assert run.rounds.composed == 4 and composer.cuda.alive == 2, "fill, two variants, drain"


# ----------------------------------------------------------------------------------------------------- pieces and checks


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("streams, in_flight", SHAPES)
def test_pieces(streams: int, in_flight: int, seed: int) -> None:
    plan = plan_of(4, streams, in_flight, seed)
    pieces = pieces_of(plan, GROUPS)
    assert sorted(v for piece in pieces for v in piece.tasks) == list(range(16))
    place = {v: i for i, v in enumerate(plan.order)}
    awaited = {u for waits in plan.waits for u in waits}
    for i, (tasks, stream, stage, pool, waits) in enumerate(pieces):
        assert {plan.stream[v] for v in tasks} == {stream} and {plan.stage[v] for v in tasks} == {stage}
        assert {plan.pools[GROUPS[v]] for v in tasks} == {pool}
        assert [place[v] for v in tasks] == sorted(place[v] for v in tasks)
        assert not any(plan.waits[v] for v in tasks[1:]) and not awaited & set(tasks[:-1])
        ends = {pieces[j].tasks[-1] for j in waits}
        assert set(plan.waits[tasks[0]]) == ends and all(j < i for j in waits)
    for stream in range(streams):
        own = [piece for piece in pieces if piece.stream == stream]
        for a, b in itertools.pairwise(own):  # no cut without a reason
            reasons = a.stage != b.stage, a.pool != b.pool, bool(b.waits), a.tasks[-1] in awaited
            assert any(reasons)
    check_order(plan, edges_of(4), pieces)
    check_pools(plan, GROUPS)
    assert variants_of(pieces) == plan.in_flight


def test_one_stream_and_one_pool_are_one_piece() -> None:
    plan = plan_of(4, 1, 1)
    assert len(pieces_of(plan._replace(pools=[0] * 4), GROUPS)) == 1


@pytest.mark.parametrize("streams, in_flight", [(2, 1), (4, 2), (3, 3)])
def test_a_wait_that_is_left_out_is_noticed(streams: int, in_flight: int) -> None:
    gone = 0
    for plan in (plan_of(4, streams, in_flight, seed) for seed in range(5)):
        for v, waits in enumerate(plan.waits):
            for u in waits:
                less = [[w for w in own if (i, w) != (v, u)] for i, own in enumerate(plan.waits)]
                pieces = pieces_of(plan._replace(waits=less), GROUPS)
                with pytest.raises(
                    ArgumentError, match=r"plan: task \d+ needs task \d+, and may start before it has en"
                ):
                    check_order(plan, edges_of(4), pieces)
                gone += 1
    assert gone >= 5


def test_a_wait_that_runs_through_a_step_that_is_left_out_is_noticed() -> None:
    """Task 3 needs task 0 and has it by way of 1 and 2, which belong to another step: not in the first round."""
    plan = Pipeline([0, 1, 2, 3], [0, 1, 1, 0], [0, 0, 1, 1], [0.0] * 4, [[], [], [1], []], 1.0, 2, 0, [0, 1, 2, 3], 0)
    edges = [(0, 3, 0)]
    with pytest.raises(ArgumentError, match="task 3 needs task 0, and may start before"):
        check_order(plan, edges, pieces_of(plan, [0, 1, 2, 3]))
    good = plan._replace(waits=[[], [], [1], [0]])
    check_order(good, edges, pieces_of(good, [0, 1, 2, 3]))


def test_a_stage_that_comes_too_late() -> None:
    plan = plan_of(4, 2, 2)
    stage = list(plan.stage)
    stage[0] = 1 + max(stage)
    with pytest.raises(ArgumentError, match=r"needs task 0, 0 step\(s\) before, which runs in a later round"):
        check_order(plan._replace(stage=stage), edges_of(4), pieces_of(plan, GROUPS))


def test_pools_of_groups_that_live_together() -> None:
    for streams, in_flight in ((2, 1), (2, 2), (3, 3)):
        plan = plan_of(4, streams, in_flight)
        with pytest.raises(ArgumentError, match=r"plan: groups \d and \d share pool 0 and can be alive together"):
            check_pools(plan._replace(pools=[0] * 4), GROUPS)
    plan = plan_of(4, 2, 1)
    stream = list(plan.stream)
    stream[1] = 1 - stream[1]
    with pytest.raises(ArgumentError, match=r"group 0 runs on streams \[0, 1\]; a captured block needs one"):
        check_pools(plan._replace(stream=stream), GROUPS)
    # Two groups on one stream: one at both ends of the round, one in the middle; in one step, or in two.
    shape: dict[str, Any] = dict(
        start=[0.0] * 4, waits=[[]] * 4, period=1.0, peak_bytes=0, operations=0, stream=[0] * 4
    )
    plan = Pipeline(order=[1, 2, 3, 0], stage=[0, 1, 0, 0], in_flight=2, pools=[0, 0], **shape)
    check_pools(plan._replace(stage=[0, 1, 1, 1]), [0, 0, 1, 1])
    with pytest.raises(ArgumentError, match="can be alive together"):
        check_pools(plan._replace(stage=[0, 0, 0, 0]), [0, 0, 1, 1])
    with pytest.raises(ArgumentError, match="can be alive together"):  # the other way round
        check_pools(plan._replace(order=[2, 0, 1, 3], stage=[0, 0, 0, 0]), [0, 0, 1, 1])
    # A group that lives for longer than a round is there at any moment.
    with pytest.raises(ArgumentError, match="can be alive together"):
        check_pools(plan._replace(order=[0, 1, 2, 3], stage=[0, 1, 0, 0]), [0, 0, 1, 1])


def test_idle_tasks_leave_their_waits_to_the_next() -> None:
    shape: dict[str, Any] = dict(start=[0.0] * 4, period=1.0, in_flight=1, peak_bytes=0, pools=[0, 1], operations=0)
    plan = Pipeline(order=[0, 1, 2, 3], stage=[0] * 4, stream=[0, 1, 1, 1], waits=[[], [], [0], []], **shape)
    assert [(p.tasks, p.waits) for p in pieces_of(plan, [0, 1, 1, 1])] == [((0,), ()), ((1,), ()), ((2, 3), (0,))]
    pieces = pieces_of(plan, [0, 1, 1, 1], idle={2})
    assert [(p.tasks, p.waits) for p in pieces] == [((0,), ()), ((1,), ()), ((3,), (0,))]
    check_order(plan, [(0, 2, 0), (0, 3, 0)], pieces)
    last = plan._replace(stage=[0, 0, 1, 0])
    assert variants_of(pieces_of(last, [0, 1, 1, 1], idle={2})) == 1, "nothing is left to do at the last stage"


def test_attention_without_dropout_draws_nothing() -> None:
    q = torch.randn(1, 2, 4, 8)
    with _Draws("head 0"):
        nn.functional.scaled_dot_product_attention(q, q, q)
        nn.functional.dropout(q, 0.5, training=False)
        for draw in (lambda: nn.functional.dropout(q, 0.5), lambda: torch.rand(2), lambda: torch.rand_like(q)):
            with pytest.raises(BackendError, match=r"task 'head 0' draws random numbers \(\w+\), and a composed graph"):
                draw()


# --------------------------------------------------------------------------------------------------------------- engine


def costs(seed: int) -> Any:
    """Plans do not depend on how long things took."""

    def make(kind: str, step: Any, cost: Any, **options: Any) -> Any:
        rng = random.Random(seed)
        return best_schedule(kind, step, [rng.choice([1.0, 2.0, 3.0]) for _ in cost], **options | {"host": False})

    return make


Make = Callable[[Any], torch.optim.Optimizer]


class Pair:
    """An eager engine in sequence, and one with composed rounds, which get the same batches."""

    def __init__(
        self, model: fl.LocalModel, make: Make = sgd, schedule: str = "pipeline", *, seed: int = 1, composed: bool = True,
        plan: int = 1, **options: Any,
    ):  # fmt: skip
        self.composer = Composer(seed=seed, composed=composed)
        size = {"workers": options.pop("workers", 2), "in_flight": options.pop("in_flight", 2)}
        self.eager = recorder.eager(copy.deepcopy(model), make, **options)
        with mock.patch("fastlocal.engine.composed.composer", lambda device: self.composer):
            self.graph = fl.Engine(copy.deepcopy(model), make, schedule=schedule, graph="on", **size, **options)
        self.graph._guard.waits = True
        self.rounds: Any = self.graph._rounds
        for guard in self.rounds._guards:
            guard.waits = True
        self.both = (self.eager, self.graph)
        self.expected: list[Any] = []
        self.got: list[Any] = []
        self._plan = plan

    def step(self, *data: Any) -> None:
        self.run(*data)
        self.expected.append(self.eager.step(*data))

    def run(self, *data: Any) -> None:
        """With composed rounds only."""
        with mock.patch("fastlocal.engine.rounds.best_schedule", costs(self._plan)):
            self.got.append(self.graph.step(*data))

    def check(self) -> None:
        self.graph._settle()
        assert torch.equal(self.eager._guard.first_bad, self.graph._guard.first_bad)
        self.eager.flush()
        outputs = [out for out in (*self.got, *self.graph.flush()) if out.step is not None]
        self.got = list(outputs)
        assert [out.step for out in outputs] == [out.step for out in self.expected]
        for a, b in zip(self.expected, outputs):
            torch.testing.assert_close(b.losses, a.losses, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(a.correct, b.correct) and (a.logits is None) == (b.logits is None)
            if a.logits is not None:
                torch.testing.assert_close(a.logits, b.logits, rtol=0, atol=0, equal_nan=True)
        assert_same(dict(self.eager.model.state_dict()), dict(self.graph.model.state_dict()))
        for key in ("steps", "optimizer", "scales", "good", "skipped"):
            assert_same(self.eager.state_dict()[key], self.graph.state_dict()[key])
        assert all(p.grad is None for p in self.graph.model.parameters())
        assert self.composer.cuda.misuse == 0

    def each(self, change: Callable[[fl.Engine], Any]) -> None:
        for engine in self.both:
            change(engine)


CASES = [
    ("dgl", sgd, "overlap", {"seed": 3}),
    ("auglocal", fused_sgd, "pipeline", {"workers": 3, "in_flight": 3, "seed": 4, "plan": 4}),
    ("infopro", adamw, "pipeline", {"composed": False, "seed": -1}),
    ("predsim", fused_adamw, "pipeline", {"plan": 6}),
]


@pytest.mark.parametrize("method, make, schedule, options", CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_engine(method: str, make: Make, schedule: str, options: dict[str, Any]) -> None:
    """With rates that change at every step, and two shapes of a batch, in flight together."""
    pair = Pair(localized(method), make, schedule, **options)
    for i in range(11):
        for engine in pair.both:
            for k, g in enumerate(engine.optimizer.param_groups):
                g["lr"] = 0.01 * (1 + (k == 1)) / (i + 1)
        pair.step(*batch(i, 3 if i % 3 == 2 else 6))
    pair.check()
    assert pair.rounds.captures == 2 and pair.rounds.launches >= 5
    assert "graph: on, composed; 2 shapes captured" in pair.graph.explain()
    if schedule == "pipeline":
        assert pair.rounds._composition.variants >= 2, "nothing was in flight"
        keys = pair.rounds._composition._rounds
        assert any(len({id(v.inputs[0].shape[0]) for v in key if v is not None}) > 1 for key in keys), (
            "shapes were not mixed"
        )


def test_half_precision_with_clipping_and_batches_that_are_not_finite() -> None:
    pair = Pair(localized("dgl"), precision="16-mixed", clip=0.05, nonfinite="skip", seed=2)
    for i in range(10):
        x, y = batch(i)
        if i in (6, 8):
            x[0] = float("nan")
        if i == 5:  # the first overflows are over
            pair.graph._settle()
            pair.each(lambda e: e._guard.first_bad.fill_(-1))
        pair.step(x, y)
    pair.graph._settle()
    assert pair.graph._guard.first_bad.tolist() == [6.0] * 3, (
        "the number of the step is that of a capture, or another's"
    )
    pair.check()
    assert pair.rounds.launches >= 5
    counts = [out.skipped.tolist() for out in pair.got[5:]]
    assert [[n - counts[0][k] for k, n in enumerate(c)] for c in counts] == [[n] * 3 for n in (0, 1, 1, 2, 2)]


def test_what_changes_between_steps() -> None:
    pair = Pair(localized("dgl"))

    def decay(engine: fl.Engine) -> None:
        for g in engine.optimizer.param_groups:
            g["weight_decay"] = 0.2

    for i in range(11):
        if i == 5:
            assert pair.graph._rounds.busy
            pair.each(decay)
        pair.step(*batch(i))
    state, expected = (
        pair.graph.state_dict(),
        pair.eager.state_dict(),
    )  # with steps in flight, which are completed first
    assert_same(expected["optimizer"], state["optimizer"])
    pair.check()
    assert pair.rounds.captures == 2 and pair.rounds.launches >= 5


def test_memory_that_is_replaced_with_steps_in_flight_is_refused() -> None:
    pair = Pair(localized("dgl"))
    for i in range(5):
        pair.step(*batch(i))

    def move(engine: fl.Engine) -> None:
        for p in engine.model.parameters():
            p.data = p.data.clone()

    kept = [p.data for p in pair.graph.model.parameters()]
    move(pair.graph)
    with pytest.raises(
        BackendError, match=r"addresses of parameters .* while steps 4 are in flight.*call engine.flush\(\) before"
    ):
        pair.graph.step(*batch(5))
    for p, data in zip(pair.graph.model.parameters(), kept):
        p.data = data
    pair.check()
    pair.expected, pair.got = [], []
    pair.each(move)
    for i in range(5, 10):
        pair.step(*batch(i))
    pair.check()
    assert pair.rounds.captures == 2


def test_accumulation_and_a_state_that_is_loaded_between_rounds() -> None:
    pair = Pair(localized("dgl"))
    for i in range(7):
        pair.step(*batch(i))
        if i == 4:
            pair.each(lambda e: e.accumulate(*batch(50, 4)))
    pair.check()
    assert pair.rounds.captures == 1
    saved = copy.deepcopy((pair.graph.model.state_dict(), pair.graph.state_dict()))
    for again in range(2):
        pair.expected, pair.got = [], []
        for i in range(7, 11):
            pair.step(*batch(i))
        pair.check()
        assert [out.step for out in pair.got] == [7, 8, 9, 10] and pair.rounds.captures == 1 + again
        for engine in pair.both:
            engine.model.load_state_dict(saved[0])
            engine.load_state_dict(copy.deepcopy(saved[1]))


def test_a_failed_capture_changes_nothing() -> None:
    pair = Pair(localized("dgl"))
    for i in range(3):
        pair.step(*batch(i))
    assert pair.rounds.captures == 0
    pair.check()
    before = state_of(pair.graph.model, optimizer=pair.graph.optimizer)
    for operator in ("_fused_sgd_", "convolution_backward", "stack"):
        pair.composer.fail_at = operator
        with pytest.raises(BackendError, match=rf"could not be captured, at its .*{operator}.*Nothing was changed"):
            pair.graph.step(*batch(3))
        assert_same(before, state_of(pair.graph.model, optimizer=pair.graph.optimizer))
        assert all(type(g["lr"]) is float for g in pair.graph.optimizer.param_groups)
        assert not pair.rounds.busy and pair.rounds._composition is None
    pair.composer.fail_at = None
    pair.expected, pair.got = [], []
    for i in range(3, 8):
        pair.step(*batch(i))
    pair.check()
    assert pair.rounds.captures == 1


def test_a_launch_that_fails_is_named_and_drops_what_was_in_flight() -> None:
    pair = Pair(localized("dgl"))
    for i in range(6):
        pair.step(*batch(i))
    assert pair.rounds.busy
    pair.composer.cuda.fail_at(1)
    with pytest.raises(
        BackendError, match=r"graph: a round could not be launched.*cudaGraphLaunch failed for a round of \d+ tasks"
    ) as failure:
        pair.graph.step(*batch(6))
    pair.composer.cuda.fail_at(0)
    assert not pair.rounds.busy and set(pair.rounds._hold) == {-1}
    assert failure.value.__notes__ == ["Dropped: steps 5, 6, of which some blocks may have had their update."]
    pair.rounds._composition.close()
    pair.composer.cuda.fail_at(2)
    with pytest.raises(
        BackendError, match=r"graph: a round could not be composed: cudaGraphAddChildGraphNode failed for task 'for"
    ):
        pair.graph.step(*batch(6))
    assert pair.composer.cuda.alive == 0


def test_graphs_and_their_memory_go() -> None:
    pair = Pair(localized("dgl"))
    for i in range(5):
        pair.step(*batch(i))
    pair.check()
    shape = next(iter(pair.rounds._shapes.values()))
    refs = [weakref.ref(g) for variant in shape.variants for g in (*variant.graphs, variant.results)]
    flats = weakref.ref(shape.variants[0].flats.flats[0])
    assert flats() is not None and pair.composer.cuda.alive > 0
    del shape
    pair.rounds.forget("a test")
    gc.collect()
    assert all(ref() is None for ref in refs) and flats() is None and pair.composer.cuda.alive == 0


# --------------------------------------------------------------------------------------------------------------- refuse


def make_engine(model: fl.LocalModel, make: Make = sgd, **options: Any) -> fl.Engine:
    with mock.patch("fastlocal.engine.composed.composer", lambda device: Composer()):
        return fl.Engine(model, make, graph="on", **{"schedule": "overlap", **options})


def test_what_cannot_be_composed_is_refused_with_the_reason() -> None:
    model = localized("dgl")
    before = state_of(model)
    with pytest.raises(BackendError, match=r"^graph: 'on' needs a CUDA device, the model is on cpu"):
        fl.Engine(model, sgd, graph="on", schedule="overlap", memory_format="channels_last")
    with pytest.raises(BackendError, match=r"blocks draw random numbers.*the same numbers at every step"):
        make_engine(localized("dgl", dropout=0.5), memory_format="channels_last")
    with pytest.raises(BackendError, match=r"update='end' takes all blocks together; use 'immediate'"):
        make_engine(model, update="end", memory_format="channels_last")
    with pytest.raises(BackendError, match=r"the optimizer of block 0, RMSprop, cannot leave out a step"):
        make_engine(model, lambda named: torch.optim.RMSprop(named, lr=0.1), memory_format="channels_last")

    class Own(torch.optim.SGD):
        pass

    with pytest.raises(BackendError, match=r"is not known to keep all that changes on the device.*capturable=True"):
        make_engine(model, lambda named: Own(named, lr=0.1, fused=True), memory_format="channels_last")
    assert_same(before, state_of(model))
    torch.manual_seed(0)
    cascade = fl.localize(models.ResNetCIFAR(1, width=4), "hpff", blocks=4, sample=torch.randn(2, 3, 8, 8))
    if cascade.window > 1:
        with pytest.raises(BackendError, match=r"losses of 'hpff' reach several blocks"):
            make_engine(cascade)


def test_random_numbers_that_the_audit_does_not_know_are_refused_at_the_capture() -> None:
    model = localized("dgl", dropout=0.5)
    for block in model.blocks:
        block.random = False
    pair = Pair(model)
    for i in range(3):
        pair.run(*batch(i))
    pair.graph.flush()
    before = state_of(pair.graph.model, optimizer=pair.graph.optimizer)
    with pytest.raises(
        BackendError, match=r"block 0 .* at its forward: BackendError: task 'forward 0' draws random numbers"
    ):
        pair.graph.step(*batch(4))
    assert_same(before, state_of(pair.graph.model, optimizer=pair.graph.optimizer))


def test_what_composition_needs_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    with pytest.raises(BackendError, match=r"graphs that allocate memory \(cudaMallocAsync\) cannot be composed"):
        CudaComposer(device)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    if torch.version.cuda is None:
        with pytest.raises(
            BackendError, match=r"the CUDA runtime of PyTorch was not found: this process has not loaded libc10_cu"
        ):
            CudaComposer(device)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", type("CUDAGraph", (), {}))
    with pytest.raises(BackendError, match=r"PyTorch .* does not give out the graphs that it captures"):
        CudaComposer(device)
    monkeypatch.setattr(_native, "_load", lambda: (None, "it was not built"))
    with pytest.raises(BackendError, match=r"composed graphs need the native extension: it was not built"):
        CudaComposer(device)


def test_what_is_asked_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream for each stream of the plan, the pool that is named, a launch on the stream that is current."""
    cuda = FakeCuda()
    calls: list[Any] = []
    current: list[Any] = []

    class Stream:
        count = 0

        def __init__(self, where: Any) -> None:
            Stream.count += 1
            self.number = Stream.count
            self.cuda_stream = cuda.stream()

    class Graph:
        def __init__(self, keep_graph: bool = False) -> None:
            assert keep_graph
            self.handle = cuda.graph()

        def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
            assert capture_error_mode == "thread_local" and not gc.isenabled()
            calls.append(("begin", pool, current[-1].number))

        def capture_end(self) -> None:
            calls.append(("end", current[-1].number))
            if "broken" in calls:
                raise RuntimeError("capture invalidated")

        def raw_cuda_graph(self) -> int:
            return self.handle

    @contextmanager
    def stream(s: Any) -> Iterator[None]:
        current.append(s)
        yield
        current.pop()

    main = Stream(None)
    fakes: dict[str, Any] = dict(Stream=Stream, CUDAGraph=Graph, stream=stream, get_rng_state=lambda d: "state")
    fakes |= dict(current_stream=lambda d: main, device=lambda d: nullcontext(), get_allocator_backend=lambda: "native")
    fakes |= dict(
        set_rng_state=lambda s, d: calls.append(("random", s)), graph_pool_handle=lambda: ("pool", len(calls))
    )
    fakes |= dict(synchronize=lambda d: calls.append("synchronize"), empty_cache=lambda: calls.append("empty"))
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    native: Any = _native._load()[0]
    asked: list[Any] = []

    def runtime(library: str, loaded: bool) -> Any:
        asked.append((library, loaded))
        return cuda.runtime

    stand_in = SimpleNamespace(CudaRuntime=runtime, RoundExecutor=native.RoundExecutor)
    monkeypatch.setattr(_native, "_load", lambda: (stand_in, ""))
    composer = CudaComposer(torch.device("cuda", 0))
    assert asked == [("libc10_cuda.so", True)] and composer.rate_dtype == torch.float32
    composer.begin()
    assert calls == ["synchronize", "empty"]
    calls.clear()
    assert gc.isenabled()
    graphs = [composer.capture(lambda: calls.append("work"), s, p) for s, p in ((0, "a"), (1, "b"), (0, "b"))]
    assert gc.isenabled()
    assert [c[1:] for c in calls if c[0] == "begin"] == [("a", 2), ("b", 3), ("b", 2)], (
        "a capture stream for each stream"
    )
    assert calls[:3] == [("begin", "a", 2), "work", ("end", 2)] and not current
    made = composer.compose(
        [(f"task {i}", g.raw_cuda_graph(), i % 2, [0] if i == 1 else []) for i, g in enumerate(graphs)]
    )
    cuda.clear()
    composer.launch(made)
    assert [line[2] for line in cuda.log] == [str(cuda.number(main.cuda_stream))] and made.nodes == 3
    loop = CudaComposer(torch.device("cuda", 0), composed=False).compose(
        [("task 0", graphs[0].raw_cuda_graph(), 0, [])]
    )
    loop.close()
    made.close()
    assert cuda.alive == 0

    def breaks() -> None:
        calls.append("broken")
        raise ValueError("an operator")

    with pytest.raises(ValueError, match="an operator"):
        composer.capture(breaks, 0, "a")
    assert calls[-2:] == [("end", 2), ("random", "state")] and gc.isenabled()
