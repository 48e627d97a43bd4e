"""The Trainer on a device: resume, clipping and accumulation without a wait, averages, the size of a batch, exhausted memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fastlocal as fl
from fastlocal import data
from fastlocal.engine.clip import Clip
from fastlocal.errors import OutOfMemoryError
from fastlocal.trainer import EMA
from tests.engine.untouched import assert_same
from tests.gpu.device import DEVICE, MARKS, ON_CUDA, batches, engine, no_sync, resnet, sgd, snapshot, vit

pytestmark = MARKS


def images() -> data.Images:
    made = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (44, 3, 16, 16), dtype=torch.uint8, generator=made)
    labels = torch.arange(44) % 10
    both = data.Images(
        pixels[:34], labels[:34], pixels[34:], labels[34:], 10, torch.full((3,), 0.5), torch.ones(3), "n"
    )
    return both.to(DEVICE)


def sources() -> tuple[data.Batches, data.Batches]:
    own = images()
    return data.Batches(own, batch_size=8, crop=2, flip=True), data.Batches(own, train=False, batch_size=8)


def trainer(folder: Path, model: fl.LocalModel, **options: Any) -> fl.Trainer:
    return fl.Trainer(
        model.to(DEVICE), sgd, scheduler="cosine", folder=folder, save_every=2, progress=False, deterministic=True,
        ema=0.9, clip=1.0, accumulate=2, log_every=1, **options,
    )  # fmt: skip


class Halt(Exception):
    pass


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("make", [resnet, vit])
def test_a_run_that_was_interrupted_ends_with_the_same_numbers(tmp_path: Path, make: Any, precision: str) -> None:
    def halt(t: Any, _: Any) -> None:
        if t.seen == 7:  # the newest checkpoint is that of batch 6, in the middle of a group
            raise Halt

    whole = trainer(tmp_path / "whole", make(), precision=precision)
    history = whole.fit(*sources(), epochs=2)
    first = trainer(tmp_path / "run", make(), precision=precision)
    first.callbacks = type(first.callbacks)([fl.trainer.LambdaCallback(on_step_end=halt)])
    with pytest.raises(Halt):
        first.fit(*sources(), epochs=2)
    second = trainer(tmp_path / "run", make(), precision=precision)
    assert second.fit(*sources(), epochs=2, resume=True) == history
    assert_same(snapshot(whole.engine), snapshot(second.engine))
    for name in ("metrics.csv", "steps.csv"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


@pytest.mark.parametrize("clip", [Clip(0.1), Clip(0.1, "value"), Clip(0.01, "agc")], ids=str)
def test_a_group_with_clipping_and_an_average_never_waits(clip: Clip) -> None:
    run = engine(resnet(), clip=clip)
    average = EMA(run.model, 0.9)
    (a, b, c) = batches(3)
    for _ in range(2):  # the first group allocates
        run.accumulate(*a)
        run.accumulate(*b)
        run.step(*c)
        average.update()
    with no_sync():
        run.accumulate(*a)
        run.accumulate(*b)
        run.step(*c)
        average.update()
    assert run.steps == 3 and average.updates == 3


def test_batches_and_mixing_never_wait() -> None:
    own = images()
    source = data.Batches(own, batch_size=8, crop=2, flip=True, cutout=4)
    mixing = data.Mixing(mixup=0.5, cutmix=0.5, smoothing=0.1)
    for x, y in source.epoch(0):
        mixing(x, y, 10, 0, 0)
    with no_sync():
        for index, (x, y) in enumerate(source.epoch(1)):
            target = y if ON_CUDA else torch.full((len(y), 10), 0.1)  # on a CPU labels are looked at
            mixing(x, target, 10, 1, index)


@pytest.mark.gpu
def test_the_batch_size_that_fits(tmp_path: Path) -> None:
    """Tried out under a limit of 2 % of the memory; everything is put back, and twice the size does not fit."""
    own = trainer(tmp_path, resnet())
    x, y = batches(1)[0]
    own.engine.step(x, y)
    before = snapshot(own.engine)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 0.02 * total) / total)
    try:
        rows = own.find_batch_size((x, y))
        assert_same(before, snapshot(own.engine))
        wide = (x.repeat(2 * rows // 8 + 8, 1, 1, 1), y.repeat(2 * rows // 8 + 8))
        with pytest.raises(OutOfMemoryError, match="block"):
            for _ in range(2):
                own.engine.step(*wide)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert rows >= 8 and ON_CUDA
