"""Level A in a plain loop, level B (`Engine`) and the reference step give the same parameters."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlocal as fl
from fastlocal import models, reference
from fastlocal.models import ResNetCIFAR
from tests.engine.baseline import NoHostRead, assert_equal, relative_error

METHODS: dict[str, dict[str, Any]] = {
    "dgl": {"blocks": 3},
    "auglocal": {"blocks": 4, "depth": 1},
    "predsim": {"blocks": 3},
    "infopro": {"blocks": 3, "lam": (5.0, 0.5)},
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.01),
}
Batches = list[tuple[Tensor, Tensor]]


def batches(count: int = 20, rows: int = 6, size: int = 12) -> Batches:
    torch.manual_seed(1)
    return [(torch.randn(rows, 3, size, size), torch.randint(10, (rows,))) for _ in range(count)]


def resnet(method: str = "dgl", **options: Any) -> fl.LocalModel:
    net = ResNetCIFAR(1, width=4, **options)
    return fl.localize(net, method, sample=torch.randn(2, 3, 12, 12), **METHODS[method])


def vit_net(dropout: float = 0.1) -> nn.Module:
    return models.create(
        "vit_tiny", num_classes=10, img_size=12, patch_size=6, dim=16, depth=4, heads=2, dropout=dropout
    )


def vit(blocks: int = 3, method: str = "dgl", dropout: float = 0.1) -> fl.LocalModel:
    return fl.localize(vit_net(dropout), method, blocks=blocks, sample=torch.randn(2, 3, 12, 12))


def level_a(
    model: nn.Module, data: Batches, make: Callable[[Any], torch.optim.Optimizer], **autocast: Any
) -> list[Tensor]:
    optimizer, losses = make(model.parameters()), []
    for x, y in data:
        optimizer.zero_grad()
        with torch.autocast("cpu", enabled=bool(autocast), **autocast), fl.backend("reference"):
            out = model(x, y)
        out.loss.backward()
        optimizer.step()
        losses.append(out.losses)
    return losses


def level_b(model: fl.LocalModel, data: Batches, make: Callable[[Any], Any], **options: Any) -> list[Tensor]:
    engine = fl.Engine(model, make, **{"backend": "reference", **options})
    return [engine.step(x, y).losses for x, y in data]


def same_losses(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_twenty_steps_are_equal_bitwise(method: str, optimizer: str) -> None:
    model, data, make = resnet(method), batches(), OPTIMIZERS[optimizer]
    a, b, end, spec = (copy.deepcopy(model) for _ in range(4))
    losses = level_a(a, data, make)
    assert same_losses(losses, level_b(b, data, make))
    assert same_losses(losses, level_b(end, data, make, update="end"))
    plain = make(spec.parameters())
    with fl.backend("reference"):
        assert same_losses(losses, [torch.stack(reference.train_step(spec, batch, plain)) for batch in data])
    assert_equal(b.state_dict(), a.state_dict())
    assert_equal(end.state_dict(), a.state_dict())
    assert_equal(spec.state_dict(), a.state_dict())
    assert relative_error(a.state_dict(), model.state_dict()) > 1e-3, "nothing was trained"
    assert all(p.grad is None for p in b.parameters())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_fused_optimizer_step_differs_by_rounding_only(optimizer: str) -> None:
    model, data, make = vit(dropout=0.0).double(), [(x.double(), y) for x, y in batches()], OPTIMIZERS[optimizer]
    a, b = copy.deepcopy(model), copy.deepcopy(model)
    level_a(a, data, make)
    engine = fl.Engine(b, make)  # backend="auto"
    for x, y in data:
        engine.step(x, y)
    assert "fused step in 3 of 3 blocks" in engine.explain()
    assert 0 <= relative_error(b.state_dict(), a.state_dict()) < 1e-12
    single, other = vit(dropout=0.0), vit(dropout=0.0)
    other.load_state_dict(single.state_dict())
    level_a(single, batches(), make)
    level_b(other, batches(), make, backend="auto")
    assert relative_error(other.state_dict(), single.state_dict()) <= 1e-6


@pytest.mark.parametrize("method", ["bp", "dgl"])
@pytest.mark.parametrize("make_net", [lambda: ResNetCIFAR(1, width=4, dropout=0.2), vit_net])
def test_one_block_is_backprop_bitwise_with_dropout(method: str, make_net: Callable[[], nn.Module]) -> None:
    net, data, make = make_net(), batches(8), OPTIMIZERS["sgd"]
    assert any(isinstance(m, nn.Dropout) and m.p > 0 for m in net.modules())
    plain, start = copy.deepcopy(net), copy.deepcopy(net.state_dict())
    torch.manual_seed(3)
    optimizer, expected = make(plain.parameters()), []
    for x, y in data:
        optimizer.zero_grad()
        loss = F.cross_entropy(plain(x), y)
        loss.backward()
        optimizer.step()
        expected.append(loss.detach().reshape(1))
    for run in (level_a, level_b):
        for options in ({},) if run is level_a else ({}, {"update": "end"}, {"deterministic": True}):
            model = fl.localize(copy.deepcopy(net), method, blocks=1, sample=data[0][0][:2])
            assert len(model.blocks) == 1
            torch.manual_seed(3)
            assert same_losses(run(model, data, make, **options), expected)  # type: ignore[operator]
            assert_equal(model.export().state_dict(), plain.state_dict())  # type: ignore[arg-type]
    assert relative_error(plain.state_dict(), start) > 1e-3


def test_dropout_draws_the_same_numbers_at_both_levels() -> None:
    model, data, make = vit(dropout=0.3), batches(8), OPTIMIZERS["adamw"]
    a, b = copy.deepcopy(model), copy.deepcopy(model)
    torch.manual_seed(2)
    losses = level_a(a, data, make)
    torch.manual_seed(2)
    assert same_losses(level_b(b, data, make), losses)
    assert_equal(b.state_dict(), a.state_dict())


def test_deterministic_runs_repeat_and_leave_the_global_stream_alone() -> None:
    model, data, make = vit(dropout=0.3), batches(6), OPTIMIZERS["sgd"]

    def run(seed: int, noise: int) -> tuple[list[Tensor], dict[str, Tensor]]:
        own = copy.deepcopy(model)
        torch.manual_seed(noise)  # the global stream must not matter
        before = torch.get_rng_state()
        losses = level_b(own, data, make, deterministic=True, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        assert not torch.are_deterministic_algorithms_enabled()
        return losses, own.state_dict()

    losses, state = run(0, 11)
    again, same = run(0, 12)
    assert same_losses(losses, again)
    assert_equal(same, state)
    assert not same_losses(losses, run(1, 11)[0])


def test_deterministic_streams_are_one_per_block() -> None:
    """What an earlier block draws does not move the numbers of a later one: the condition for running them side by side."""

    def states_at_last_block(dropout_in_first: float) -> list[Tensor]:
        torch.manual_seed(0)
        model = vit(dropout=0.3)
        net: Any = model.backbone
        net.pos_drop.p = dropout_in_first
        seen: list[Tensor] = []
        net.blocks[-1].register_forward_pre_hook(lambda m, i: seen.append(torch.get_rng_state()))
        level_b(model, batches(3), OPTIMIZERS["sgd"], deterministic=True)
        return seen

    plain, changed = states_at_last_block(0.3), states_at_last_block(0.0)
    assert len(plain) == 3 and all(torch.equal(a, b) for a, b in zip(plain, changed, strict=True))
    assert not torch.equal(plain[0], plain[1]), "a stream goes on from step to step"


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_resumed_engine_continues_bitwise(deterministic: bool, tmp_path: Any) -> None:
    model, data, make = vit(dropout=0.3), batches(8), OPTIMIZERS["adamw"]
    straight, broken = copy.deepcopy(model), copy.deepcopy(model)
    torch.manual_seed(4)
    expected = level_b(straight, data, make, deterministic=deterministic)
    torch.manual_seed(4)
    first = fl.Engine(broken, make, backend="reference", deterministic=deterministic)
    losses = [first.step(x, y).losses for x, y in data[:4]]
    torch.save((broken.state_dict(), first.state_dict(), torch.get_rng_state()), tmp_path / "run.pt")
    weights, state, rng = torch.load(tmp_path / "run.pt", weights_only=True)
    resumed = vit(dropout=0.3)
    resumed.load_state_dict(weights)
    second = fl.Engine(resumed, make, backend="reference", deterministic=deterministic)
    second.load_state_dict(state)
    assert second.steps == 4
    torch.set_rng_state(rng)
    losses += [second.step(x, y).losses for x, y in data[4:]]
    assert same_losses(losses, expected)
    assert_equal(resumed.state_dict(), straight.state_dict())


@pytest.mark.parametrize("method", ["dgl", "predsim", "infopro"])
@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16)])
def test_mixed_precision_is_equal_bitwise(method: str, precision: str, dtype: torch.dtype) -> None:
    model, data, make = resnet(method), batches(6), OPTIMIZERS["sgd"]
    a, b = copy.deepcopy(model), copy.deepcopy(model)
    if (
        dtype == torch.float16
    ):  # at 2**14 these small nets overflow, and the engine would skip where a plain loop does not
        _start_scales(a, 2.0**8)
    losses = level_a(a, data, make, dtype=dtype)
    engine = fl.Engine(b, make, precision=precision, backend="reference")
    for scale in engine._scales or []:
        scale.fill_(2.0**8)
    assert same_losses([engine.step(x, y).losses for x, y in data], losses)
    assert_equal(b.state_dict(), a.state_dict())
    assert all(p.dtype == torch.float32 for p in b.parameters())
    full = copy.deepcopy(model)
    assert not same_losses(level_a(full, data, make), losses), "autocast did nothing"


def _start_scales(model: fl.LocalModel, value: float) -> None:
    from fastlocal.engine.carrier import LossScale

    model._scales["cpu"] = LossScale(len(model.blocks), torch.device("cpu"), start=value)


def test_channels_last_is_the_same_training() -> None:
    model, data, make = resnet("auglocal"), batches(4), OPTIMIZERS["sgd"]
    a, b, nchw = (copy.deepcopy(model) for _ in range(3))
    layout = torch.channels_last
    losses = level_a(a.to(memory_format=layout), [(x.contiguous(memory_format=layout), y) for x, y in data], make)  # type: ignore[call-overload]
    assert same_losses(level_b(b, data, make, memory_format="channels_last"), losses)
    assert_equal(b.state_dict(), a.state_dict())
    assert b.get_parameter("backbone.layer2.0.conv1.weight").is_contiguous(memory_format=layout)
    level_a(nchw, data, make)
    assert relative_error(b.state_dict(), nchw.state_dict()) < 1e-4


def test_a_scheduler_over_the_engine_acts_as_over_a_plain_optimizer() -> None:
    model, data, make = resnet(), batches(6), OPTIMIZERS["sgd"]
    a, b = copy.deepcopy(model), copy.deepcopy(model)
    plain = make(a.parameters())
    engine = fl.Engine(b, make, backend="reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 6) for o in (plain, engine.optimizer)]
        for x, y in data:
            plain.zero_grad()
            a(x, y).loss.backward()
            plain.step()
            engine.step(x, y)
            for schedule in schedules:
                schedule.step()
    assert_equal(b.state_dict(), a.state_dict())
    assert engine.optimizer.param_groups[-1]["lr"] == plain.param_groups[0]["lr"] < 1e-9


def test_frozen_parameters_stay_at_both_levels() -> None:
    model, data, make = vit(dropout=0.0), batches(4), OPTIMIZERS["adamw"]
    for p in [*model.blocks[0].parameters(), model.get_parameter("backbone.blocks.2.mlp.fc1.bias")]:
        p.requires_grad_(False)
    a, b = copy.deepcopy(model), copy.deepcopy(model)
    losses = level_a(a, data, make)
    assert same_losses(level_b(b, data, make), losses)
    assert_equal(b.state_dict(), a.state_dict())
    moved = {n for n, p in b.named_parameters() if not torch.equal(p, model.get_parameter(n))}
    assert moved == {n for n, p in b.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("tied", ["untie", "link"])
def test_tied_token_model(tied: Any) -> None:
    net = models.create("gpt", vocab_size=17, block_size=8, n_layer=3, n_head=2, n_embd=8)
    model = fl.localize(net, "dgl", blocks=3, sample=torch.randint(17, (2, 8)), tied=tied)
    torch.manual_seed(1)
    data = [(ids, ids) for ids in torch.randint(17, (6, 4, 8))]
    a, b = copy.deepcopy(model), copy.deepcopy(model)
    losses = level_a(a, data, OPTIMIZERS["adamw"])
    assert same_losses(level_b(b, data, OPTIMIZERS["adamw"]), losses)
    assert_equal(a.export().state_dict(), b.export().state_dict())  # type: ignore[arg-type]


# --- no host sync ----------------------------------------------------------------------------------------------------


class SkippingSGD(torch.optim.SGD):
    """SGD that skips on the device, as PyTorch's fused optimizers do; theirs have no form for meta tensors."""

    _step_supports_amp_scaling = True

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.copy_(torch.where(self.found_inf > 0, p, p - group["lr"] * p.grad))  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", METHODS)
def test_a_step_on_an_accelerator_never_waits(method: str) -> None:
    """Meta tensors hold no values, so any read raises; to the engine they are one more device that is no CPU."""
    model = resnet(method).to("meta")
    engine = fl.Engine(model, lambda named: SkippingSGD(named, lr=0.1), backend="reference")
    x, y = (t.to("meta") for t in batches(1)[0])
    with pytest.raises(RuntimeError, match="meta"):  # the first step checks the values of the targets, as documented
        engine.step(x, y)
    engine.steps = 1
    with NoHostRead():
        for _ in range(3):
            out = engine.step(x, y)
        assert out.correct.shape == (len(model.blocks),)
    assert {out.losses.device.type, out.correct.device.type, out.loss.device.type} == {"meta"}
    assert engine.steps == 4
    # Level A: the same blocks and heads, the gradients delivered by the caller's backward.
    with NoHostRead():
        loss = model(x, y).loss
        (loss * 0.5).backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(RuntimeError, match="meta"):  # what a read would have done
        loss.item()
