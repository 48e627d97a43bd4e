"""What a failed block leaves behind, in the form that a CPU takes and in the one that never reads from the device."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastlocal as fl
from fastlocal.engine.guard import BatchCounts, Guard
from fastlocal.models import ResNetCIFAR

MOMENTUM = dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)


def batch(rows: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 3, 16, 16), torch.randint(10, (rows,))


def local_model() -> fl.LocalModel:
    return fl.localize(ResNetCIFAR(1, width=4), "dgl", blocks=3, sample=torch.randn(2, 3, 16, 16))


def make(model: fl.LocalModel, waits: bool, **options: Any) -> fl.Engine:
    """``waits=True``: the engine treats the CPU as a device whose values it must not read."""
    engine = fl.Engine(model, lambda named: torch.optim.SGD(named, **MOMENTUM), nonfinite="skip", **options)
    engine._guard.waits = waits
    return engine


def state(engine: fl.Engine) -> dict[str, Tensor]:
    found = dict(engine.model.state_dict())
    for name, p in engine.model.named_parameters():
        momentum = engine.optimizer.state[p].get("momentum_buffer")
        if momentum is not None:
            found[f"momentum of {name}"] = momentum
    return {name: t.clone() for name, t in found.items()}


def block_of(engine: fl.Engine, name: str) -> int:
    name = name.removeprefix("momentum of ")
    for block in engine.model.blocks:
        slots = [s.name for s in (*block.slots, *block.buffers)]
        if name in slots or name.startswith(f"heads.{block.index}."):
            return block.index
    raise AssertionError(name)


class NoHostRead(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "is_nonzero", "nonzero", "equal"), func
        return func(*args, **(kwargs or {}))


def poison(engine: fl.Engine, k: int) -> Any:
    """Makes the gradients of block k's head infinite until the handle is removed."""
    head = engine.model.heads[k]
    return next(head.parameters()).register_hook(lambda grad: torch.full_like(grad, torch.inf))


@pytest.mark.parametrize("waits", [False, True])
def test_good_steps_equal_the_plain_loop(waits: bool) -> None:
    model = local_model()
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(plain.parameters(), **MOMENTUM)
    engine = make(model, waits, backend="reference" if not waits else "auto")
    for _ in range(3):
        x, y = batch()
        fl.reference.train_step(plain, (x, y), optimizer)
        engine.step(x, y)
    for (name, own), (_, other) in zip(model.state_dict().items(), plain.state_dict().items(), strict=True):
        if waits:  # the fused optimizer rounds differently in the last bit
            torch.testing.assert_close(own, other, msg=name)
        else:
            assert torch.equal(own, other), name
    assert all(int(b) == 3 for n, b in model.named_buffers() if n.endswith("num_batches_tracked"))


@pytest.mark.parametrize("bad_step", [0, 1, 3])
def test_a_bad_block_stays_as_it_was_without_a_host_read(bad_step: int) -> None:
    engine = make(local_model(), waits=True)
    for step in range(bad_step):
        with NoHostRead() if step else torch.enable_grad():
            engine.step(*batch())
    before = state(engine)
    handle = poison(engine, 1)
    with NoHostRead() if bad_step else torch.enable_grad():  # the first step looks at the targets
        engine.step(*batch())
    handle.remove()
    after = state(engine)
    same = {name: torch.equal(before[name], after[name]) for name in before if name in after}
    assert not [n for n in same if block_of(engine, n) == 1 and not same[n]]
    assert not any(same[n] for n in same if block_of(engine, n) != 1 and after[n].numel() > 1)
    assert engine._guard.skipped.tolist() == [0, 1, 0] and engine._guard.first_bad.tolist() == [-1, bad_step, -1]
    engine.step(*batch())
    final = state(engine)
    assert all(t.isfinite().all() for t in final.values())
    assert not any(torch.equal(after[n], final[n]) for n in after if final[n].numel() > 1)


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("update", ["immediate", "end"])
def test_both_forms_leave_the_same(waits: bool, update: Any) -> None:
    torch.manual_seed(1)
    engine = make(local_model(), waits, update=update)
    steps = [batch() for _ in range(4)]
    for i, (x, y) in enumerate(steps):
        before = state(engine)
        handle = poison(engine, 0) if i == 2 else None
        engine.step(x, y)
        if handle is not None:
            handle.remove()
            kept = [n for n, t in state(engine).items() if torch.equal(t, before[n])]
            blocks = {0, 1, 2} if update == "end" else {0}
            assert {n for n in before if block_of(engine, n) in blocks} <= set(kept)
    counters = {
        block_of(engine, n): int(b) for n, b in engine.model.named_buffers() if n.endswith("num_batches_tracked")
    }
    assert counters == ({0: 3, 1: 3, 2: 3} if update == "end" else {0: 3, 1: 4, 2: 4})
    assert engine._guard.skipped.tolist() == [1, 0, 0]


@pytest.mark.parametrize("waits", [False, True])
def test_an_exception_gives_back_what_was_not_updated_and_what_was_bad(waits: bool) -> None:
    engine = make(local_model(), waits)
    for _ in range(2):
        engine.step(*batch())
    before = state(engine)
    bad = poison(engine, 0)

    def fail(module: nn.Module, args: Any) -> None:
        raise RuntimeError("from the head")

    stop = engine.model.heads[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="from the head"):
        engine.step(*batch())
    after = state(engine)
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert not any("num_batches_tracked" in m.__dict__ for m in engine.model.modules())
    bad.remove(), stop.remove()
    engine.step(*batch())


class Codebook(nn.Module):
    """A large mask, and a statistic that is replaced, not written to."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.register_buffer("mask", torch.ones(70_000, dtype=torch.bool))
        self.register_buffer("seen", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        self.mask.logical_not_()
        self.seen = self.seen + x.detach().sum(0)
        return self.linear(x).relu()


@pytest.mark.parametrize("waits", [False, True])
def test_large_and_replaced_buffers_come_back(waits: bool) -> None:
    net = nn.Sequential(Codebook(4), Codebook(4), nn.Linear(4, 3))
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    engine = make(fl.localize(net, "dgl", blocks=2, sample=x), waits)
    engine.step(x, y)
    before = [b.clone() for m in net[:2] for b in (m.mask, m.seen)]
    handle = poison(engine, 0)
    engine.step(x, y)
    handle.remove()
    for m, unit in zip(net[:2], ("0", "1")):
        kept = unit in engine.model.blocks[0].units
        for b in (m.mask, m.seen):
            assert torch.equal(b, before.pop(0)) == kept


def test_batch_counts_leaves_alone_what_uses_its_counter() -> None:
    mean, frozen, twice = nn.BatchNorm1d(3, momentum=None), nn.BatchNorm1d(3).eval(), nn.BatchNorm1d(3)
    net, other = nn.Sequential(mean, frozen, twice, twice), nn.BatchNorm1d(3)
    keys = list(net.state_dict())
    counts = BatchCounts(net)
    x = torch.randn(5, 3)
    expected = copy.deepcopy(net)
    for _ in range(2):
        expected(x)
        counts.begin()
        assert list(net.state_dict()) == keys and isinstance(mean.num_batches_tracked, Tensor)
        net(x), other(x)
        counts.end()
    assert [int(m.num_batches_tracked) for m in (mean, frozen, twice, other)] == [2, 0, 4, 2]
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), expected.state_dict().values()))


def test_flags_of_a_guard_without_buffers() -> None:
    model = fl.localize(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), "dgl", blocks=2, sample=torch.randn(2, 4))
    guard = Guard(model.blocks, torch.device("cpu"))
    for step in range(3):
        guard.begin()
        guard.check(
            1, [torch.tensor([1.0, torch.nan if step else 2.0]), torch.ones(2, dtype=torch.float16)], torch.ones(())
        )
        guard.end(step)
    assert guard.skipped.tolist() == [0, 2] and guard.first_bad.tolist() == [-1, 1]
