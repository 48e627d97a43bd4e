"""What is not finite is skipped on the device, without the host knowing, and leaves no trace."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import fastlocal as fl
from fastlocal.errors import NonFiniteError
from tests.gpu.device import DEVICE, MARKS, OPTIMIZERS, batches, engine, no_sync, resnet, snapshot

pytestmark = MARKS


def owner(run: fl.Engine, name: str) -> int:
    """The block that a name of `snapshot` belongs to."""
    name = name.rpartition(" of ")[2]
    for block in run.model.blocks:
        if name in [slot.name for slot in block.buffers] or name in dict(block.named_parameters()):
            return block.index
        if name.startswith(f"heads.{block.index}."):
            return block.index
        if name in [f"backbone.{slot.name}" for slot in block.buffers]:
            return block.index
    raise AssertionError(name)


def poison(run: fl.Engine, k: int) -> Any:
    """Makes the gradients of block k's head infinite until the handle is removed."""
    head: Any = run.model.heads[k]
    return next(head.parameters()).register_hook(lambda grad: torch.full_like(grad, math.inf))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("update", ["immediate", "end"])
@pytest.mark.parametrize("bad_step", [0, 2])
def test_a_bad_block_stays_as_it_was(optimizer: str, update: str, bad_step: int) -> None:
    run = engine(resnet(), OPTIMIZERS[optimizer], update=update, nonfinite="skip")
    data = batches(4)
    if bad_step == 0:
        run.steps = 1  # the first step would look at the targets
    for x, y in data[:bad_step]:
        run.step(x, y)
    before = snapshot(run)
    assert [n for n in before if "running_mean" in n and owner(run, n) == 1], "block 1 has no BatchNorm"
    handle = poison(run, 1)
    with no_sync():
        run.step(*data[2])
    handle.remove()
    after = snapshot(run)
    kept = {n for n in before if torch.equal(before[n], after[n])}
    bad = {0, 1, 2} if update == "end" else {1}
    assert {n for n in before if owner(run, n) in bad} <= kept
    assert not {n for n in kept if owner(run, n) not in bad and before[n].dim()}
    assert run._guard.skipped.tolist() == [0, 1, 0]
    run.step(*data[3])
    final = snapshot(run)
    assert all(t.isfinite().all() for t in final.values())
    assert not [n for n in final if final[n].dim() and torch.equal(final[n], after[n])], "training goes on"
    if bad_step:  # momentum and moments are where they were, not begun anew
        assert {n for n in before if " of " in n} == {n for n in final if " of " in n}


def test_a_poisoned_image_stops_every_block() -> None:
    run = engine(resnet(), nonfinite="skip")
    (x, y), *rest = batches(3)
    run.step(x, y)
    before = snapshot(run)
    bad = x.clone()
    bad[0, 0, 0, 0] = math.nan
    with no_sync():
        run.step(bad, y)
    after = snapshot(run)
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert run._guard.skipped.tolist() == [1, 1, 1]
    assert run.step(*rest[0]).losses.isfinite().all()


def test_the_error_names_block_and_step() -> None:
    run = engine(resnet())
    data = batches(3)
    run.step(*data[0])
    handle = poison(run, 1)
    run.step(*data[1])
    handle.remove()
    run.step(*data[2])
    with pytest.raises(NonFiniteError, match=r"block 1 .*not finite at step 1"):
        run.flush()


def test_fp16_overflow_is_handled_on_the_device() -> None:
    """A loss scale that is far too large halves until gradients fit; until then nothing of the block moves."""
    run = engine(resnet(), precision="16-mixed", nonfinite="raise")
    data = batches(2)
    run.step(*data[0])
    assert run._scales is not None
    for scale in run._scales:
        scale.fill_(2.0**40)
    before, skipped = snapshot(run), run._guard.skipped.tolist()
    with no_sync():
        for _ in range(3):
            run.step(*data[1])
    after = snapshot(run)
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert [float(s) for s in run._scales] == [2.0**37] * 3
    assert [b - a for a, b in zip(skipped, run._guard.skipped.tolist(), strict=True)] == [3, 3, 3]
    with no_sync():
        for _ in range(40):
            out = run.step(*data[1])
    run.flush()  # an overflow on the way is no error
    moved = snapshot(run)
    assert not [n for n in moved if moved[n].dim() and torch.equal(moved[n], after[n])]
    assert out.losses.isfinite().all() and all(1 <= float(s) < 2.0**37 for s in run._scales)
    assert all(t.isfinite().all() for t in moved.values()) and out.losses.device.type == DEVICE
