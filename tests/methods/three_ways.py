"""The same steps through `reference.train_step`, level A and the engine, which have to agree to the last bits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastlocal as fl
from fastlocal import reference
from tests.engine.baseline import NoHostRead
from tests.engine.test_levels_equal import SkippingSGD

Batches = list[Any]


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-3)


def three_ways(
    model: fl.LocalModel,
    batches: Batches,
    make: Callable[[Any], torch.optim.Optimizer] = sgd,
    seed: int = 5,
    **engine_options: Any,
) -> tuple[fl.LocalModel, list[Tensor]]:
    """Trains copies of the model and asserts that all are equal; returns the reference's and its losses, one [K] a step."""
    spec, level_a, one, end = (copy.deepcopy(model) for _ in range(4))
    losses: dict[str, list[Tensor]] = {"spec": [], "a": [], "immediate": [], "end": []}
    with fl.backend("reference"):
        torch.manual_seed(seed)
        optimizer = make(spec.parameters())
        for batch in batches:
            losses["spec"].append(torch.stack(reference.train_step(spec, batch, optimizer)))
        torch.manual_seed(seed)
        optimizer = make(level_a.parameters())
        for batch in batches:
            optimizer.zero_grad()
            out = level_a(*batch) if isinstance(batch, tuple) else level_a(batch, batch)
            out.loss.backward()
            optimizer.step()
            losses["a"].append(out.losses)
    for update, net in (("immediate", one), ("end", end)):
        torch.manual_seed(seed)
        engine = fl.Engine(net, make, backend="reference", update=update, **engine_options)
        for batch in batches:
            out = engine.step(*batch) if isinstance(batch, tuple) else engine.step(batch)
            losses[update].append(out.losses)
    expected, start = spec.state_dict(), model.state_dict()
    assert any(not torch.equal(start[name], value) for name, value in expected.items()), "nothing was trained"
    for way, net in (("a", level_a), ("immediate", one), ("end", end)):
        for name, value in net.state_dict().items():
            torch.testing.assert_close(
                value, expected[name], rtol=1e-12, atol=1e-12, msg=lambda m, n=name, w=way: f"{w}: {n}: {m}"
            )
        for got, wanted in zip(losses[way], losses["spec"], strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    return spec, losses["spec"]


def resumes(
    model: fl.LocalModel, batches: Batches, make: Callable[[Any], torch.optim.Optimizer] = sgd, **options: Any
) -> None:
    """Asserts that a run of all batches equals one that was saved, loaded into a new copy and continued half-way."""
    whole, first, second = (copy.deepcopy(model) for _ in range(3))
    engine = fl.Engine(whole, make, deterministic=True, seed=3, **options)
    for batch in batches:
        expected = engine.step(*batch) if isinstance(batch, tuple) else engine.step(batch)
    half = len(batches) // 2
    engine = fl.Engine(first, make, deterministic=True, seed=3, **options)
    for batch in batches[:half]:
        engine.step(*batch) if isinstance(batch, tuple) else engine.step(batch)
    saved = copy.deepcopy((first.state_dict(), engine.state_dict()))
    second.load_state_dict(saved[0])
    engine = fl.Engine(second, make, deterministic=True, seed=99, **options)
    engine.load_state_dict(saved[1])
    torch.manual_seed(1234)  # the random stream of the caller is no part of it
    for batch in batches[half:]:
        got = engine.step(*batch) if isinstance(batch, tuple) else engine.step(batch)
    assert torch.equal(got.losses, expected.losses)
    for name, value in second.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name


def never_waits(model: fl.LocalModel, *batch: Tensor) -> None:
    """Asserts that no step reads a value back: meta tensors have none. ``model`` moves to them."""
    model = model.to("meta")
    batch = tuple(t.to("meta") for t in batch)
    engine = fl.Engine(model, lambda named: SkippingSGD(named, lr=0.1), backend="reference")
    engine.steps = 1  # the first step checks the targets' values
    with NoHostRead():
        for _ in range(2):
            out = engine.step(*batch)
        assert out.correct.shape == (len(model.blocks),)
        model(batch[0], batch[-1]).loss.backward()


def in_bf16(model: fl.LocalModel, *batch: Tensor) -> None:
    """Asserts that losses and updates under autocast are those of float32, roughly."""
    found = []
    for precision in ("32-true", "bf16-mixed"):
        net = copy.deepcopy(model).float()
        torch.manual_seed(0)
        engine = fl.Engine(net, sgd, precision=precision)
        losses = [engine.step(*(t.float() if t.is_floating_point() else t for t in batch)).losses for _ in range(2)]
        found.append(torch.cat(losses))
        assert all(p.isfinite().all() and p.dtype == torch.float32 for p in net.parameters())
    torch.testing.assert_close(found[1], found[0], rtol=0.05, atol=0.02)
    assert not torch.equal(*found)
