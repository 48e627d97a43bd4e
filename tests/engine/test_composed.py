"""Composed graphs against steps in sequence, bit for bit, on graphs and a CUDA runtime that stand in for a device's."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastlocal.engine import _native
from fastlocal.engine._native import Pipeline
from fastlocal.engine.composed import CapturedStep, Composition, check_order, check_pools, pieces_of, variants_of
from fastlocal.errors import ArgumentError, BackendError
from tests.engine.composed_recorder import Composer

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
        self.inputs = [(torch.zeros(5, 6), torch.zeros(5, dtype=torch.int64), torch.zeros(())) for _ in range(self.variants)]
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


@pytest.mark.parametrize("composed", [True, False], ids=["composed", "loop"])
@pytest.mark.parametrize("streams, in_flight", SHAPES)
def test_rounds_are_steps_in_sequence(streams: int, in_flight: int, composed: bool) -> None:
    expected = in_sequence(5, 7)
    for seed in (0, 1, 2):
        plan = plan_of(5, streams, in_flight, seed)
        for order in (None, -1, seed):
            composer = Composer(composed=composed, seed=order)
            run = Composed(5, plan, composer)
            state, losses = run.train(7)
            assert same(losses, expected[1]) and same(state, expected[0])
            run.rounds.close()
            assert (composer.cuda.alive, composer.cuda.misuse) == (0, 0)
