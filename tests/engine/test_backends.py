"""Engine(backend=...): which implementation of the operators a step runs, and the block optimizers of fastlocal.ops in it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlocal as fl
from fastlocal import models, ops
from fastlocal.engine.clip import Clip
from fastlocal.errors import ArgumentError, BackendError
from fastlocal.ops import _dispatch
from tests.engine import recorder
from tests.engine.baseline import NoHostRead, relative_error
from tests.engine.nets import TorchvisionStyleResNet
from tests.engine.untouched import assert_same

OPTIONS: dict[str, dict[str, Any]] = {"auglocal": {"depth": 1}, "infopro": {"lam": (5.0, 0.5)}}
METHODS = ["dgl", "auglocal", "predsim", "infopro"]


def fused_sgd(named: Any) -> torch.optim.Optimizer:
    return ops.FusedSGD(named, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)


def fused_adamw(named: Any) -> torch.optim.Optimizer:
    return ops.FusedAdamW(named, lr=1e-3, weight_decay=0.01)


def localized(method: str = "dgl") -> fl.LocalModel:
    torch.manual_seed(0)
    return fl.localize(
        models.ResNetCIFAR(1, width=4), method, blocks=3, sample=torch.randn(2, 3, 8, 8), **OPTIONS.get(method, {})
    )


def batch(seed: int, rows: int = 8) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(rows, 3, 8, 8, generator=g), torch.randint(10, (rows,), generator=g)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """The backends that served while the test ran."""
    found: set[str] = set()
    choose = _dispatch.choose

    def spy(*args: Any) -> str:
        found.add(choose(*args))
        return choose(*args)

    monkeypatch.setattr(_dispatch, "choose", spy)
    yield found


@pytest.mark.parametrize("method", METHODS)
def test_reference_runs_the_specifications_and_gives_the_same_numbers(method: str, chosen: set[str]) -> None:
    model = localized(method)

    def run(dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
        chosen.clear()
        own = copy.deepcopy(model).to(dtype)
        with _dispatch.as_on_gpu():  # "auto" then takes what the operators have, on a CPU, too
            engine = fl.Engine(own, fused_sgd, backend=backend)  # type: ignore[arg-type]
            for i in range(3):
                x, y = batch(i)
                losses = engine.step(x.to(dtype), y).losses
        assert losses.isfinite().all()
        return {n: t for n, t in own.state_dict().items() if t.is_floating_point()} | {"losses": losses}

    truth = run(torch.float64, "reference")
    assert chosen == {"reference"}
    reference = run(torch.float32, "reference")
    assert chosen == {"reference"}
    auto = run(torch.float32, "auto")
    assert "aten" in chosen
    assert relative_error(auto, truth) <= 2 * relative_error(reference, truth) + 1e-7


def test_an_accumulation_runs_the_specifications_too(chosen: set[str]) -> None:
    engine = fl.Engine(localized("predsim"), fused_sgd, backend="reference")
    chosen.clear()
    with _dispatch.as_on_gpu():
        engine.accumulate(*batch(0))
        assert chosen <= {"reference"}
        engine.step(*batch(1))
    assert chosen == {"reference"} and _dispatch.requested() == ("auto", False)


def test_an_own_request_holds_inside_auto_and_ends_with_the_step(chosen: set[str]) -> None:
    engine = fl.Engine(localized(), fused_sgd)
    chosen.clear()
    with ops.backend("reference"):
        engine.step(*batch(0))
    assert chosen == {"reference"}
    assert "backend: auto" in engine.explain()


def test_a_form_asked_for_by_name() -> None:
    model = localized()
    with pytest.raises(BackendError, match=r"^backend: 'triton' cannot serve this model: .*Or use 'auto'$"):
        fl.Engine(model, fused_sgd, backend="triton")
    with pytest.raises(
        BackendError, match=r"^backend: 'native' serves on a CPU, the model is on meta; use 'auto' or 'triton'$"
    ):
        fl.Engine(copy.deepcopy(model).to("meta"), fused_sgd, backend="native")


def test_operators_without_that_form_choose_by_themselves(chosen: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "_operators", dict(_dispatch._operators))
    forms = [_dispatch.Candidate(name, lambda s: None) for name in ("aten", "reference")]
    _dispatch.register("without_triton", lambda: (), forms)
    x, y = torch.randn(4, 5), torch.randint(3, (4,))
    maps, w = torch.randn(4, 5, 2, 2), torch.randn(3, 5)
    with _dispatch.where_it_exists("triton"):
        assert ops.explain("without_triton").chosen == "aten"
        assert _dispatch.choose("without_triton", (), "auto") == "aten"
        chosen.clear()
        choice = ops.explain("pool_linear_cross_entropy", maps, w, None, y)
        assert choice.chosen is None and choice.requested == "triton"
        with pytest.raises(BackendError, match='backend "triton" cannot serve'):
            ops.pool_linear_cross_entropy(maps, w, None, y)
        with ops.backend("reference"):
            ops.pool_linear_cross_entropy(maps, w, None, y)
    assert chosen == {"reference"}
    net = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3))
    model = fl.localize(net, "dgl", blocks=2, sample=x)
    same = copy.deepcopy(model)
    expected = fl.Engine(same, fused_sgd).step(x, y).losses
    assert torch.equal(fl.Engine(model, fused_sgd, backend="native").step(x, y).losses, expected)
    assert_same(dict(same.state_dict()), dict(model.state_dict()))


# --------------------------------------------------------------------------------------------------------------- compile


@pytest.mark.parametrize("graph, precision", [(True, "32-true"), (False, "bf16-mixed")])
@pytest.mark.filterwarnings("ignore::UserWarning:torch._dynamo")
def test_compiled_blocks(graph: bool, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no code generator: the same bits, under the same names."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled: list[nn.Module] = []
    plain = nn.Module.compile

    def compile_(self: nn.Module, **options: Any) -> None:
        compiled.append(self)
        plain(self, backend="eager", **options)

    monkeypatch.setattr(nn.Module, "compile", compile_)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3))
    model = fl.localize(net, "dgl", blocks=2, sample=torch.randn(4, 5))
    twin = copy.deepcopy(model)
    names = list(model.state_dict())
    make = recorder.engine if graph else recorder.eager
    engine = make(model, fused_sgd, compile="blocks", precision=precision)
    other = recorder.eager(twin, fused_sgd, precision=precision)
    assert len(compiled) >= 5 and all(block.head in compiled for block in model.blocks[:-1])
    for _ in range(6):
        x, y = torch.randn(8, 5), torch.randint(3, (8,))
        assert torch.equal(engine.step(x, y).losses, other.step(x, y).losses)
    assert_same(dict(twin.state_dict()), dict(model.state_dict()))
    assert list(model.state_dict()) == names and list(copy.deepcopy(model).state_dict()) == names
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    torch._dynamo.reset()


def test_what_cannot_be_compiled() -> None:
    net = TorchvisionStyleResNet()
    model = fl.localize(net, "dgl", blocks=3, sample=torch.randn(2, 3, 8, 8))
    with pytest.raises(
        BackendError, match=r"^compile: TorchvisionStyleResNet is cut by hooks.*units\(\) and readout\(\)"
    ):
        fl.Engine(model, fused_sgd, compile="blocks")
    with pytest.raises(ArgumentError, match=r"^compile: got 'all'; valid are 'blocks'"):
        fl.Engine(localized(), fused_sgd, compile="all")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------ optimizers

TWINS: dict[str, Any] = {
    "sgd": (fused_sgd, lambda n: torch.optim.SGD(n, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)),
    "adamw": (fused_adamw, lambda n: torch.optim.AdamW(n, lr=1e-3, weight_decay=0.01)),
}


@pytest.mark.parametrize(
    "options",
    [
        {}, {"update": "end"}, {"clip": 0.05}, {"clip": Clip(0.05, scope="global"), "update": "end"},
        {"precision": "bf16-mixed"}, {"precision": "16-mixed"},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("rule", TWINS)
def test_fused_optimizers_are_those_of_torch(rule: str, options: dict[str, Any]) -> None:
    """Bit for bit on a CPU, where both run PyTorch's fused step; one batch is not finite, and nothing is read back."""
    model = localized()
    engines = [fl.Engine(copy.deepcopy(model), make, nonfinite="skip", **options) for make in TWINS[rule]]
    for i in range(5):
        x, y = batch(i)
        if i in (0, 3):  # also the first one, before there is any state
            x[0] = float("nan")
        outs = []
        for engine in engines:
            engine._guard.waits = True
            with NoHostRead() if i else nullcontext():
                outs.append(engine.step(x, y).losses)
            assert all(p.grad is None for p in engine.model.parameters())
        torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=0, equal_nan=True)
    assert_same(dict(engines[0].model.state_dict()), dict(engines[1].model.state_dict()))
    assert torch.equal(engines[0].skipped, engines[1].skipped) and engines[0].skipped.min() >= 2
    a, b = (e.optimizer.state_dict()["state"] for e in engines)
    assert_same(a, b)


@pytest.mark.parametrize("make", [fused_sgd, fused_adamw])
def test_a_blocks_gradients_are_gone_before_the_next_update(make: Callable[[Any], Any]) -> None:
    model = localized()
    engine = fl.Engine(model, make)
    alive: list[list[int]] = []
    for inner in engine.optimizer.blocks:
        assert inner is not None
        inner.register_step_pre_hook(
            lambda *a: alive.append([b.index for b in model.blocks if any(p.grad is not None for p in b.parameters())])
        )
    engine.step(*batch(0))
    assert alive == [[0], [1], [2]]


@pytest.mark.parametrize("make", [fused_sgd, fused_adamw])
def test_a_resumed_run(make: Callable[[Any], Any]) -> None:
    model = localized()
    engine = fl.Engine(model, make)
    for i in range(3):
        engine.step(*batch(i))
    saved = copy.deepcopy((model.state_dict(), engine.state_dict()))
    expected = [engine.step(*batch(i)).losses for i in range(3, 6)]
    fresh = localized()
    resumed = fl.Engine(fresh, make)
    fresh.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for i, losses in zip(range(3, 6), expected):
        assert torch.equal(resumed.step(*batch(i)).losses, losses)
    assert_same(dict(model.state_dict()), dict(fresh.state_dict()))
