"""`LocalOptimizer`: to schedulers, scalers and checkpoints one optimizer; within, one per block."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import fastlocal as fl
from fastlocal.errors import ArgumentError
from fastlocal.models import ResNetCIFAR
from tests.engine.baseline import assert_equal

MAKERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda named: torch.optim.SGD(named, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda named: torch.optim.AdamW(named, lr=1e-3),
    "rmsprop": lambda named: torch.optim.RMSprop(named, lr=1e-3, momentum=0.5),
}


def no_decay_on_norms(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    """Two groups a block, as people write them; a block without matrices gets one."""
    groups = [{"params": [(n, p) for n, p in named if p.dim() > 1], "weight_decay": 0.1}]
    groups.append({"params": [(n, p) for n, p in named if p.dim() <= 1], "weight_decay": 0.0})
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=1e-3)


def localized(blocks: int = 3) -> fl.LocalModel:
    return fl.localize(ResNetCIFAR(1, width=4), "dgl", blocks=blocks, sample=torch.randn(2, 3, 8, 8))


def train(
    model: fl.LocalModel, optimizer: torch.optim.Optimizer, steps: int, seed: int = 1, schedule: Any = None
) -> None:
    torch.manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8), torch.randint(10, (4,))).loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("name", MAKERS)
def test_equals_the_plain_optimizer_bitwise(name: str) -> None:
    model = localized()
    other = copy.deepcopy(model)
    optimizer = fl.LocalOptimizer(model, MAKERS[name])
    assert isinstance(optimizer, torch.optim.Optimizer)
    train(model, optimizer, 5)
    train(other, MAKERS[name](other.parameters()), 5)
    assert_equal(state(model), state(other))
    assert set(optimizer.state) == set(model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_groups_are_the_inner_optimizers_own_and_named() -> None:
    model = localized()
    optimizer = fl.LocalOptimizer(model, no_decay_on_norms)
    inner = [g for o in optimizer.blocks if o is not None for g in o.param_groups]
    assert len(inner) == 6 and all(a is b for a, b in zip(optimizer.param_groups, inner, strict=True))
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    assert all(g["lr"] == 0.5 for o in optimizer.blocks for g in o.param_groups)  # type: ignore[union-attr]
    names = [name for g in optimizer.param_groups for name in g["param_names"]]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())
    assert repr(optimizer) == "LocalOptimizer(3 blocks of AdamW, 6 groups)"


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "step": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "onecycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=8),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "warmup": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("optimizer_name", ["sgd", "adamw"])
def test_schedulers_act_as_on_a_plain_optimizer_without_a_warning(name: str, optimizer_name: str) -> None:
    model = localized()
    other = copy.deepcopy(model)
    local, plain = fl.LocalOptimizer(model, MAKERS[optimizer_name]), MAKERS[optimizer_name](other.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, local, 7, schedule=SCHEDULES[name](local))
        train(other, plain, 7, schedule=SCHEDULES[name](plain))
    assert_equal(state(model), state(other))
    for group in local.param_groups:
        for key in ("lr", "momentum", "betas", "initial_lr"):
            assert group.get(key) == plain.param_groups[0].get(key)
    assert local.param_groups[0]["lr"] != local.param_groups[0]["initial_lr"]


@pytest.mark.parametrize("make", [*MAKERS.values(), no_decay_on_norms])
def test_state_dict_round_trip_continues_bitwise(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    model = localized()
    optimizer = fl.LocalOptimizer(model, make)
    schedule = lr_scheduler.StepLR(optimizer, 2, 0.5)
    train(model, optimizer, 3, schedule=schedule)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), schedule.state_dict()], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = localized()
    resumed = fl.LocalOptimizer(other, make)
    again = lr_scheduler.StepLR(resumed, 2, 0.5)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    again.load_state_dict(saved[2])
    inner = [g for o in resumed.blocks if o is not None for g in o.param_groups]
    assert all(a is b for a, b in zip(resumed.param_groups, inner, strict=True)), "linked again after a load"
    assert resumed.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    train(model, optimizer, 3, seed=2, schedule=schedule)
    train(other, resumed, 3, seed=2, schedule=again)
    assert_equal(state(other), state(model))


def test_state_dict_has_the_form_of_a_plain_optimizers() -> None:
    model = localized()
    optimizer = fl.LocalOptimizer(model, MAKERS["adamw"])
    train(model, optimizer, 1)
    saved = optimizer.state_dict()
    assert set(saved) == {"state", "param_groups"}
    count = len(list(model.parameters()))
    assert sorted(saved["state"]) == sorted(i for g in saved["param_groups"] for i in g["params"]) == list(range(count))
    # loaded into one plain optimizer over the same order of parameters
    plain = torch.optim.AdamW([{"params": list(g["params"])} for g in optimizer.param_groups], lr=1e-3)
    plain.load_state_dict(saved)
    first = optimizer.param_groups[0]["params"][0]
    assert torch.equal(plain.state[first]["exp_avg"], optimizer.state[first]["exp_avg"])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("fused", [False, True])
def test_copy_and_pickle_with_the_model(duplicate: Callable[[Any], Any], fused: bool) -> None:
    model = localized()
    optimizer = fl.LocalOptimizer(model, MAKERS["sgd"], fused=fused)
    lr_scheduler.StepLR(optimizer, 5)  # wraps optimizer.step
    train(model, optimizer, 2)
    twin, other = duplicate((model, optimizer))
    assert {id(p) for g in other.param_groups for p in g["params"]} == {id(p) for p in twin.parameters()}
    assert other.param_groups[0] is other.blocks[0].param_groups[0]
    before = state(model)
    train(twin, other, 2, seed=3)
    assert_equal(state(model), before)
    train(model, optimizer, 2, seed=3)
    assert_equal(state(twin), state(model))


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler(fused: bool) -> None:
    model = localized()
    optimizer = fl.LocalOptimizer(model, MAKERS["adamw"], fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    x, y = torch.randn(6, 3, 8, 8), torch.randint(10, (6,))
    for step in range(4):
        optimizer.zero_grad()
        before = state(model)
        scaler.scale(model(x, y).loss).backward()
        if step == 2:
            next(model.parameters()).grad.fill_(float("inf"))  # type: ignore[union-attr]
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        moved = any(not torch.equal(p, before[n]) for n, p in model.named_parameters())
        assert moved == (step != 2)
    assert scaler.get_scale() == 2.0**10  # doubled after two good steps, halved by the overflow
    assert all(p.isfinite().all() for p in model.parameters())


def test_closure_and_step_hooks() -> None:
    model = localized()
    optimizer = fl.LocalOptimizer(model, MAKERS["sgd"])
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda o, a, k: calls.append("pre"))
    optimizer.register_step_post_hook(lambda o, a, k: calls.append("post"))
    x, y = torch.randn(4, 3, 8, 8), torch.randint(10, (4,))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x, y).loss
        loss.backward()
        calls.append("closure")
        return loss

    before = state(model)
    loss = optimizer.step(closure)
    assert sorted(calls) == ["closure", "post", "pre"] and calls[-1] == "post"
    assert loss.requires_grad and any(not torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_frozen_block_has_no_optimizer() -> None:
    model = localized()
    for p in model.blocks[1].parameters():
        p.requires_grad_(False)
    optimizer = fl.LocalOptimizer(model, MAKERS["sgd"])
    assert [o is None for o in optimizer.blocks] == [False, True, False]
    before = state(model)
    train(model, optimizer, 2)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and not moved & {n for n, _ in model.blocks[1].named_parameters()}
    optimizer.load_state_dict(optimizer.state_dict())


def test_optimizers_of_different_kinds_per_block() -> None:
    model = localized()
    makers = iter([MAKERS["sgd"], MAKERS["adamw"], MAKERS["rmsprop"]])
    optimizer = fl.LocalOptimizer(model, lambda named: next(makers)(named))
    train(model, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())  # as ever, a state_dict refers to the live tensors
    makers = iter([MAKERS["sgd"], MAKERS["adamw"], MAKERS["rmsprop"]])
    other = copy.deepcopy(model)
    resumed = fl.LocalOptimizer(other, lambda named: next(makers)(named))
    resumed.load_state_dict(saved)
    train(model, optimizer, 2, seed=5)
    train(other, resumed, 2, seed=5)
    assert_equal(state(other), state(model))


# --- refusals: the message names what was given and what would do, and nothing has changed ---------------------------


def test_refuses_an_optimizer_in_place_of_a_function() -> None:
    model = localized()
    with pytest.raises(ArgumentError, match=r"optimizer: expected a function .* got SGD; write lambda named"):
        fl.LocalOptimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))  # type: ignore[arg-type]


def test_refuses_a_function_that_returns_no_optimizer() -> None:
    with pytest.raises(ArgumentError, match=r"optimizer: returned list for block 0; return a torch\.optim\.Optimizer"):
        fl.LocalOptimizer(localized(), lambda named: named)  # type: ignore[arg-type, return-value]


def test_refuses_missing_or_foreign_parameters() -> None:
    model = localized()
    with pytest.raises(
        ArgumentError, match=r"optimizer: the optimizer of block 0 holds 1 parameters, but the block has \d+"
    ):
        fl.LocalOptimizer(model, lambda named: torch.optim.SGD(named[:1], lr=0.1))
    with pytest.raises(ArgumentError, match="build it from exactly the named parameters it is given"):
        fl.LocalOptimizer(model, lambda named: torch.optim.SGD(model.parameters(), lr=0.1))


def test_refuses_a_model_with_nothing_to_train() -> None:
    with pytest.raises(ArgumentError, match="optimizer: no parameter of the model requires a gradient"):
        fl.LocalOptimizer(localized().requires_grad_(False), MAKERS["sgd"])


def test_refuses_more_groups() -> None:
    optimizer = fl.LocalOptimizer(localized(), MAKERS["sgd"])
    with pytest.raises(ArgumentError, match=r"add_param_group: which block .* \.blocks\[k\] instead"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


def test_refuses_the_state_of_another_optimizer_and_keeps_its_own() -> None:
    model = localized()
    optimizer = fl.LocalOptimizer(model, MAKERS["sgd"])
    train(model, optimizer, 1)
    before = copy.deepcopy(optimizer.state_dict())
    fewer = fl.LocalOptimizer(localized(2), MAKERS["sgd"]).state_dict()
    with pytest.raises(
        ArgumentError, match="state_dict: has 2 parameter groups, this optimizer 3; it comes from another number"
    ):
        optimizer.load_state_dict(fewer)
    short = copy.deepcopy(before)
    short["param_groups"][1]["params"].pop()
    with pytest.raises(ArgumentError, match=r"state_dict: group 1 has \d+ parameters, this optimizer's \d+"):
        optimizer.load_state_dict(short)
    other_kind = fl.LocalOptimizer(localized(), MAKERS["adamw"]).state_dict()
    with pytest.raises(ArgumentError, match=r"state_dict: .* which SGD needs; it comes from another optimizer"):
        optimizer.load_state_dict(other_kind)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for i, entry in before["state"].items():
        assert torch.equal(after["state"][i]["momentum_buffer"], entry["momentum_buffer"])


def test_an_engine_step_leaves_no_gradient() -> None:
    model = localized()
    engine = fl.Engine(model, MAKERS["sgd"])
    engine.step(torch.randn(4, 3, 8, 8), torch.randint(10, (4,)))
    assert all(p.grad is None for p in model.parameters())
    assert isinstance(engine.optimizer, fl.LocalOptimizer) and set(engine.optimizer.state) == set(model.parameters())


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_half_precision_parameters_move(kind: type[torch.optim.Optimizer]) -> None:
    """PyTorch 2.13's fused SGD leaves whole vectors of half-precision parameters on a CPU as they are."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    model = fl.localize(fl.models.ResNetCIFAR(1, width=8), "dgl", blocks=2, sample=x).bfloat16()
    optimizer = fl.LocalOptimizer(model, lambda named: kind(named, lr=1.0), fused=True)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for p, old in zip(model.parameters(), before):
        assert not (p == old).any()
