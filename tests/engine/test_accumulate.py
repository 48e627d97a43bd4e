"""Accumulation over micro-batches, clipping inside a step, and what an exhausted memory leaves behind."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastlocal as fl
from fastlocal import models
from fastlocal.blocks.losses import CausalLMLoss
from fastlocal.engine.clip import Clip
from fastlocal.errors import ArgumentError, NonFiniteError, OutOfMemoryError
from tests.engine.untouched import assert_same

X = torch.randn(10, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(10)


def localized(method: str = "dgl", norm: bool = True, **options: Any) -> fl.LocalModel:
    torch.manual_seed(0)
    net: nn.Module = models.ResNetCIFAR(1, width=4)
    if not norm:
        net = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 10))
    return fl.localize(net, method, blocks=3, sample=X[:2], **options)


def momentum(named: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(named, lr=0.1, momentum=0.9)


def grouped(engine: fl.Engine, parts: list[slice]) -> None:
    for part in parts[:-1]:
        engine.accumulate(X[part], Y[part])
    engine.step(X[parts[-1]], Y[parts[-1]])


RAGGED = [slice(0, 4), slice(4, 8), slice(8, 10)]


def test_ragged_micro_batches_equal_the_whole_batch() -> None:
    """Without batch statistics the mean over targets is the whole batch's gradient: rounding apart, nothing else differs."""
    model = localized(norm=False)
    whole = copy.deepcopy(model)
    grouped(fl.Engine(model, momentum), [slice(0, 4), slice(4, 9), slice(9, 10)])
    fl.Engine(whole, momentum).step(X, Y)
    for (name, a), b in zip(model.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("update", ["immediate", "end"])
def test_equal_micro_batches_are_the_plain_loop_bitwise(update: Any) -> None:
    model = localized()
    plain = copy.deepcopy(model)
    parts = [slice(0, 5), slice(5, 10)]
    engine = fl.Engine(model, momentum, update=update, backend="reference")
    optimizer = momentum(plain.parameters())
    for _ in range(3):
        grouped(engine, parts)
        optimizer.zero_grad()
        for part in parts:
            plain(X[part], Y[part]).loss.backward()
        for p in plain.parameters():
            p.grad = None if p.grad is None else p.grad.mul_(0.5)
        optimizer.step()
    assert engine.steps == 3 and engine.pending == 0
    assert_same(dict(plain.state_dict()), dict(model.state_dict()))
    assert all(p.grad is None for p in model.parameters())


def test_ignored_tokens_do_not_count() -> None:
    torch.manual_seed(0)
    net = models.create("gpt", vocab_size=11, block_size=6, n_layer=2, n_head=2, n_embd=8, tie=False)
    model = fl.localize(net, "dgl", blocks=2, sample=torch.randint(11, (2, 6)), criterion=CausalLMLoss())
    engine = fl.Engine(model, lambda named: torch.optim.SGD(named, lr=0.0))
    first, second = torch.randint(11, (2, 6)), torch.randint(11, (2, 6))
    target = second.clone()
    target[:, 2:] = -100
    engine.accumulate(first)
    engine.accumulate(second, labels=target)
    assert engine._pending is not None
    seen = float(engine._pending.total)
    assert seen == pytest.approx(1 + 1 / 5)  # the first predicts 5 tokens a row, the second 1


def test_probabilities_count_by_rows() -> None:
    model = localized()
    engine = fl.Engine(model, momentum)
    engine.accumulate(X[:4], F.one_hot(Y[:4], 10).float())
    engine.accumulate(X[4:6], F.one_hot(Y[4:6], 10).float())
    assert engine._pending is not None and float(engine._pending.total) == 1.5


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_resumed_in_the_middle_of_a_group(precision: str, deterministic: bool) -> None:
    """State taken between micro-batches goes on bitwise, and a group that then fails still gives everything back."""
    one = localized()
    engine = fl.Engine(one, momentum, precision=precision, deterministic=deterministic, clip=0.5, nonfinite="skip")
    grouped(engine, RAGGED)
    engine.accumulate(X[:4], Y[:4])
    engine.accumulate(X[4:8], Y[4:8])
    two = localized()
    other = fl.Engine(two, momentum, precision=precision, deterministic=deterministic, clip=0.5, nonfinite="skip")
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    other.load_state_dict(copy.deepcopy(engine.state_dict()))
    assert other.pending == 2
    broken = X[8:].clone()
    broken[0, 0, 0, 0] = float("nan")
    for e in (engine, other):
        e.step(X[8:], Y[8:])
        grouped(e, RAGGED)
    assert_same(dict(one.state_dict()), dict(two.state_dict()))
    assert_same(engine.state_dict(), other.state_dict())
    before = {k: v.clone() for k, v in two.state_dict().items()}
    other.accumulate(X[:4], Y[:4])
    third = localized()
    last = fl.Engine(third, momentum, precision=precision, deterministic=deterministic, clip=0.5, nonfinite="skip")
    third.load_state_dict(two.state_dict())
    last.load_state_dict(copy.deepcopy(other.state_dict()))
    last.step(broken, Y[8:])
    assert_same(before, dict(third.state_dict()))  # weights and statistics as before the group's first micro-batch
    assert last.skipped.tolist() == (other.skipped + 1).tolist()


def test_a_bad_micro_batch_is_found_at_the_update() -> None:
    model = localized()
    engine = fl.Engine(model, momentum)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    broken = X[:4].clone()
    broken[0] = float("inf")
    engine.accumulate(broken, Y[:4])
    with pytest.raises(NonFiniteError, match=r"block 0 .*step 0"):
        engine.step(X[4:8], Y[4:8])
    assert_same(before, dict(model.state_dict()))
    assert engine.pending == 0


def test_a_micro_batch_that_fails_drops_the_group() -> None:
    model = localized()
    engine = fl.Engine(model, momentum)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    engine.accumulate(X[:4], Y[:4])

    def fail(*_: Any) -> None:
        raise KeyError("planted")

    hook = model.backbone.get_submodule(model.blocks[1].name).register_forward_hook(fail)
    with pytest.raises(KeyError):
        engine.accumulate(X[4:8], Y[4:8])
    hook.remove()
    assert engine.pending == 0 and all(p.grad is None for p in model.parameters())
    assert_same(before, dict(model.state_dict()))


# ------------------------------------------------------------------------------------------------------------- clipping


@pytest.mark.parametrize("update", ["immediate", "end"])
def test_clipped_per_block(update: Any) -> None:
    model = localized()
    plain = copy.deepcopy(model)
    fl.Engine(model, momentum, clip=0.05, update=update, backend="reference").step(X, Y)
    optimizer = momentum(plain.parameters())
    plain(X, Y).loss.backward()
    norms = [float(nn.utils.clip_grad_norm_(block.parameters(), 0.05)) for block in plain.blocks]
    assert all(norm > 0.05 for norm in norms)
    optimizer.step()
    assert_same(dict(plain.state_dict()), dict(model.state_dict()))


def test_clipped_over_all_blocks() -> None:
    model = localized()
    plain = copy.deepcopy(model)
    fl.Engine(model, momentum, clip=Clip(0.05, scope="global"), update="end", backend="reference").step(X, Y)
    optimizer = momentum(plain.parameters())
    plain(X, Y).loss.backward()
    nn.utils.clip_grad_norm_([p for block in plain.blocks for p in block.parameters()], 0.05)
    optimizer.step()
    assert_same(dict(plain.state_dict()), dict(model.state_dict()))


def test_global_clipping_needs_the_end() -> None:
    with pytest.raises(ArgumentError, match=r"clip: .*update='end'"):
        fl.Engine(localized(), momentum, clip=Clip(1.0, scope="global"))


# --------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("update", ["immediate", "end"])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: can't allocate memory: you tried ..."
        ),
        MemoryError(),
    ],
)
def test_out_of_memory_names_the_block(update: Any, error: Exception) -> None:
    model = localized()
    engine = fl.Engine(model, momentum, update=update)
    engine.step(X, Y)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    name = model.blocks[1].name

    def fail(*_: Any) -> None:
        raise error

    hook = model.backbone.get_submodule(name).register_forward_hook(fail)
    with pytest.raises(
        OutOfMemoryError, match=rf"block 1 \('{name}'\), forward, at step 1; peak .*smaller batch"
    ) as found:
        engine.step(X, Y)
    hook.remove()
    assert (found.value.block, found.value.name, found.value.step, found.value.phase) == (1, name, 1, "forward")
    assert isinstance(found.value, torch.OutOfMemoryError) and found.value.__cause__ is error
    assert pickle.loads(pickle.dumps(found.value)).block == 1
    first = 0 if update == "end" else 1  # blocks below it were updated
    after = model.state_dict()
    kept = {slot.name for block in model.blocks[first:] for slot in (*block.parameter_slots(), *block.buffer_slots())}
    kept = {n if n.startswith("heads.") else n if n.startswith("backbone.") else f"backbone.{n}" for n in kept}
    assert kept <= after.keys()
    assert_same({n: before[n] for n in kept}, {n: after[n] for n in kept})
    assert all(p.grad is None for p in model.parameters())
    engine.step(X, Y)
    assert engine.steps == 2


def test_a_real_allocation_that_is_too_large() -> None:
    model = localized()

    def greedy(*_: Any) -> None:
        torch.empty(1 << 60, dtype=torch.uint8)

    model.backbone.get_submodule(model.blocks[1].name).register_forward_hook(greedy)
    with pytest.raises(OutOfMemoryError, match="block 1"):
        fl.Engine(model, momentum).step(X, Y)
