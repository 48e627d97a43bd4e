"""`Trainer`: its numbers against a loop by hand, what it writes, stops, signals, reports and refusals. Resume: test_resume."""

from __future__ import annotations

import copy
import csv
import json
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import fastlocal as fl
from fastlocal import data, models
from fastlocal.engine.clip import Clip
from fastlocal.errors import ArgumentError, CheckpointError, NonFiniteError, OutOfMemoryError
from fastlocal.trainer import Callback, EarlyStopping, LambdaCallback, Logger, batch_size, optimizers
from tests.engine.untouched import assert_same

MADE = torch.Generator().manual_seed(0)
PIXELS = torch.randint(256, (36, 3, 8, 8), dtype=torch.uint8, generator=MADE)
LABELS = torch.arange(36) % 10
IMAGES = data.Images(
    PIXELS[:26], LABELS[:26], PIXELS[26:], LABELS[26:], 10, torch.full((3,), 0.5), torch.ones(3), "noise"
)


def source(batch_size: int = 6) -> data.Batches:
    return data.Batches(IMAGES, batch_size=batch_size, seed=3)  # 6, 6, 6, 6, 2


def held_out() -> data.Batches:
    return data.Batches(IMAGES, train=False, batch_size=4)


def localized(method: str = "dgl", blocks: int = 3, **options: Any) -> fl.LocalModel:
    torch.manual_seed(0)
    return fl.localize(models.ResNetCIFAR(1, width=4), method, blocks=blocks, sample=torch.zeros(2, 3, 8, 8), **options)


def momentum(named: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(named, lr=0.05, momentum=0.9)


def make(folder: Path | None = None, model: fl.LocalModel | None = None, **options: Any) -> fl.Trainer:
    return fl.Trainer(model or localized(), momentum, **{"folder": folder, "progress": False, **options})


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path) as file:
        return list(csv.DictReader(file))


# -------------------------------------------------------------------------------------------------------------- numbers


def test_equals_a_loop_by_hand() -> None:
    """Same batches, same engine, a cosine by hand: bitwise the same weights, losses and accuracies."""
    trainer = make(None, scheduler=("cosine", {"per_step": True}), log_every=1)
    seen: list[Tensor] = []
    trainer.callbacks = type(trainer.callbacks)([LambdaCallback(on_step_end=lambda _, out: seen.append(out.losses))])
    history = trainer.fit(source(), held_out(), epochs=2)

    model = localized()
    engine = fl.Engine(model, momentum, memory_format="channels_last")
    batches = source()
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(engine.optimizer, 2 * len(batches))
    total, rows = torch.zeros(3), 0
    mine: list[Tensor] = []
    for epoch in range(2):
        total, rows = torch.zeros(3), 0
        for x, y in batches.epoch(epoch):
            losses = engine.step(x, y).losses
            mine.append(losses)
            total += losses * len(y)
            rows += len(y)
            scheduler.step()
    torch.testing.assert_close(torch.stack(seen), torch.stack(mine), rtol=1e-5, atol=1e-6)
    for (name, a), b in zip(trainer.model.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)
    assert rows == 26 and [history[-1][f"loss_{k}"] for k in range(3)] == pytest.approx(
        (total / rows).tolist(), rel=1e-5
    )
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in held_out().epoch(0))
    assert history[-1]["val_accuracy"] == right / 10


def test_without_a_schedule_it_is_the_engine_bitwise() -> None:
    trainer = make(None, ema=0.5)
    trainer.fit(source(), epochs=2)
    model = localized()
    engine = fl.Engine(model, momentum, memory_format="channels_last")
    average: dict[str, Tensor] = {}
    for epoch in range(2):
        for batch in source().epoch(epoch):
            engine.step(batch)
            for name, t in model.state_dict().items():
                if name not in average or not t.is_floating_point():
                    average[name] = t.clone()
                else:
                    average[name] = torch.lerp(average[name], t, 0.5)
    assert_same(dict(model.state_dict()), dict(trainer.model.state_dict()))
    assert trainer.ema is not None
    assert_same(average, dict(trainer.ema.model.state_dict()))


def test_accumulation_ends_with_the_epoch() -> None:
    """Five batches in groups of two: the last group is the fifth alone, and the mean is over samples."""
    trainer = make(None, accumulate=2)
    trainer.fit(source(), epochs=2)
    assert trainer.engine.steps == 6 and trainer.seen == 10
    model = localized()
    engine = fl.Engine(model, momentum, memory_format="channels_last")
    for epoch in range(2):
        batches = list(source().epoch(epoch))
        for group in (batches[:2], batches[2:4], batches[4:]):
            for batch in group[:-1]:
                engine.accumulate(batch)
            engine.step(group[-1])
    assert_same(dict(model.state_dict()), dict(trainer.model.state_dict()))


def test_every_option_at_once_trains() -> None:
    """A DataLoader, mixing, clipping over all blocks, groups, a warm-up, an average, bf16: losses fall on a set learnt by heart."""
    x = PIXELS[:20].float() / 128 - 1
    loader = DataLoader(TensorDataset(x, LABELS[:20] % 2), 10, shuffle=True)
    trainer = fl.Trainer(
        localized(), optimizers.adamw(0.01, layer_decay=0.9), scheduler=("cosine", {"warmup_epochs": 2}),
        precision="bf16-mixed", accumulate=2, clip=Clip(1.0, scope="global"), ema=0.8,
        mixing=data.Mixing(cutmix=0.2, prob=0.2, smoothing=0.05), deterministic=True, folder=None, progress=False,
    )  # fmt: skip
    history = trainer.fit(loader, loader, epochs=25)
    assert history[-1]["loss"] < 0.8 < 1.5 < history[0]["loss"]
    assert history[-1]["val_accuracy"] > 0.9 and history[-1]["ema_accuracy"] > 0.9
    assert trainer.engine.update == "end"


@pytest.mark.parametrize("method", ["bp", "predsim", "auglocal", "infopro"])
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_methods_and_precisions(method: str, precision: str) -> None:
    options = {"infopro": {"lam": (0.1, 0.5)}, "auglocal": {"depth": 1}}.get(method, {})
    model = localized(method, 1 if method == "bp" else 3, **options)
    history = make(None, model, precision=precision).fit(source(), held_out(), epochs=1)
    assert all(torch.isfinite(torch.tensor([v for v in history[0].values() if v is not None])))


def test_a_language_model_of_mappings() -> None:
    torch.manual_seed(0)
    net = models.create("gpt", vocab_size=7, block_size=5, n_layer=2, n_head=2, n_embd=8, tie=False)
    ids = torch.randint(7, (8, 5))
    model = fl.localize(net, "dgl", blocks=2, sample=ids[:2], batch=lambda b: ((b["ids"],), {}, b["ids"]))
    history = make(None, model, accumulate=2).fit([{"ids": ids[:4]}, {"ids": ids[4:]}], epochs=3)
    assert history[-1]["loss"] < history[0]["loss"]


def test_data_without_a_length() -> None:
    class Stream(IterableDataset[tuple[Tensor, Tensor]]):
        def __iter__(self) -> Any:
            return ((PIXELS[i].float(), LABELS[i]) for i in range(20))

    trainer = make(None, accumulate=2)
    trainer.fit(DataLoader(Stream(), 4), epochs=2)
    assert trainer.seen == 10 and trainer.engine.steps == 6 and trainer.epoch == 2
    with pytest.raises(ArgumentError, match=r"limit: .*scheduler"):
        make(None, scheduler="cosine").fit(DataLoader(Stream(), 4), epochs=1)
    assert make(None, scheduler="cosine").fit(DataLoader(Stream(), 4), epochs=1, limit=3)[0]["step"] == 3


def test_frozen_blocks_stay() -> None:
    model = localized()
    fl.trainer.freeze(model, "backbone.conv1", "backbone.bn1")
    before = {k: v.clone() for k, v in model.state_dict().items() if "backbone.conv1" in k or "backbone.bn1" in k}
    assert before
    make(None, model).fit(source(), held_out(), epochs=1)
    assert_same(before, {k: model.state_dict()[k] for k in before})


# ---------------------------------------------------------------------------------------------------------------- files


def test_what_is_written(tmp_path: Path) -> None:
    trainer = make(tmp_path / "run", log_every=2, ema=0.9, validate_every=2, keep_last=1)
    history = trainer.fit(source(), held_out(), epochs=3)
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["optimizer"]["lr"] == 0.05 and config["model"]["method"] == "dgl" and config["train"]["seed"] == 3
    epochs = rows_of(tmp_path / "run/metrics.csv")
    assert [row["epoch"] for row in epochs] == ["0", "1", "2"] and [row["step"] for row in epochs] == ["5", "10", "15"]
    assert epochs[0]["val_accuracy"] == "" and epochs[1]["val_accuracy"] and epochs[2]["ema_accuracy_1"]
    assert float(epochs[2]["loss_1"]) == history[2]["loss_1"] and history[0]["val_loss"] is None
    assert [row["step"] for row in rows_of(tmp_path / "run/steps.csv")] == ["2", "4", "6", "8", "10", "12", "14"]
    timing = rows_of(tmp_path / "run/timing.csv")
    assert [row["part"] for row in timing] == ["train", "train", "val", "ema", "train", "val", "ema"]
    assert all(float(row["samples_per_second"]) > 0 and int(row["peak_bytes"]) > 0 for row in timing)
    names = {path.name for path in (tmp_path / "run/checkpoints").iterdir()}
    best = max((row["val_accuracy"], row["step"]) for row in history if row["val_accuracy"] is not None)[1]
    assert names == {"step-00000015", f"step-{best:08d}"}


def test_the_folder_is_a_new_one_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        trainer = make("auto")  # type: ignore[arg-type]
        trainer.fit(source(), epochs=1)
        assert trainer.folder == Path(f"runs/dgl-{number}") and (trainer.folder / "metrics.csv").exists()


def test_save_to_a_file_and_load(tmp_path: Path) -> None:
    trainer = make()
    trainer.fit(source(), epochs=1)
    path = trainer.save(tmp_path / "model.safetensors")
    other = localized()
    assert fl.trainer.load(path, other) == {"epoch": 1, "step": 5}
    assert_same(dict(trainer.model.state_dict()), dict(other.state_dict()))
    with pytest.raises(ArgumentError, match="path: this trainer has no folder"):
        trainer.save()
    with pytest.raises(ArgumentError, match="path: this trainer has no folder yet"):
        trainer.resume()


def test_best(tmp_path: Path) -> None:
    trainer = make(tmp_path, monitor="val_loss", keep_last=1)
    history = trainer.fit(source(), held_out(), epochs=4)
    losses = [row["val_loss"] for row in history]
    loaded = make(tmp_path, monitor="val_loss").resume(best=True)
    assert loaded.step == 5 * (losses.index(min(losses)) + 1)
    again = make(tmp_path, monitor="val_loss")
    again.resume(tmp_path, best=True)
    assert again.evaluate(held_out()).loss == min(losses)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        make(tmp_path).resume(tmp_path / "elsewhere", best=True)


def test_fast_dev_run_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = fl.Trainer(localized(), momentum, fast_dev_run=2, progress=False)
    history = trainer.fit(source(), held_out(), epochs=90)
    assert trainer.engine.steps == 2 and len(history) == 1 and history[0]["val_accuracy"] is not None
    assert not list(tmp_path.iterdir())


def test_other_loggers_get_the_rows_and_may_fail(tmp_path: Path) -> None:
    class Mine(Logger):
        def __init__(self) -> None:
            self.rows: list[Any] = []

        def start(self, config: dict[str, Any]) -> None:
            self.rows.append(config["precision"])

        def epoch(self, row: Any) -> None:
            self.rows.append(row["epoch"])
            raise OSError("no network")

    mine = Mine()
    with pytest.warns(RuntimeWarning, match=r"Mine.epoch\(\) failed.*no network"):
        make(tmp_path, loggers=[mine]).fit(source(), epochs=3)
    assert mine.rows == ["32-true", 0] and len(rows_of(tmp_path / "metrics.csv")) == 3


def test_a_disk_that_is_full_does_not_end_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise CheckpointError("folder: no space left on device; free some space")

    trainer.fit(source(), epochs=1)
    kept = sorted((tmp_path / "checkpoints").iterdir())
    monkeypatch.setattr(fl.trainer.CheckpointStore, "save", full)
    with pytest.warns(RuntimeWarning, match="training goes on without this checkpoint: .*no space left"):
        trainer.fit(source(), epochs=3)
    assert trainer.epoch == 3 and sorted((tmp_path / "checkpoints").iterdir()) == kept
    with pytest.raises(CheckpointError, match="no space left"):
        trainer.save()


def test_recalibration_is_one_more_row(tmp_path: Path) -> None:
    trainer = make(tmp_path, recalibrate=2, ema=0.9, callbacks=[EarlyStopping("loss", mode="min", patience=9)])
    history = trainer.fit(source(), held_out(), epochs=2)
    assert [row["epoch"] for row in history] == [0, 1, 2] and history[2]["loss"] is None
    assert history[2]["val_loss"] != history[1]["val_loss"] and history[2]["ema_loss"] != history[1]["ema_loss"]
    assert len(rows_of(tmp_path / "metrics.csv")) == 3
    model = localized()
    other = make(tmp_path, model, recalibrate=2, ema=0.9, callbacks=[EarlyStopping("loss", mode="min", patience=9)])
    assert other.fit(source(), held_out(), epochs=2, resume=True) == history  # finished: nothing is done twice
    assert_same(dict(trainer.model.state_dict()), dict(model.state_dict()))


# ------------------------------------------------------------------------------------------------------------- stopping


def test_early_stopping(tmp_path: Path) -> None:
    stop = EarlyStopping("val_loss", mode="min", patience=1, min_delta=100.0)
    history = make(tmp_path, callbacks=[stop]).fit(source(), held_out(), epochs=9)
    assert len(history) == 2 and (tmp_path / "checkpoints/step-00000010").is_dir()


def test_a_callback_stops_within_an_epoch(tmp_path: Path) -> None:
    def stop(trainer: Any, _: Any) -> None:
        trainer.should_stop = trainer.seen == 3

    trainer = make(tmp_path, callbacks=[LambdaCallback(on_step_end=stop)])
    assert trainer.fit(source(), epochs=2) == [] and trainer.seen == 3
    assert (tmp_path / "checkpoints/step-00000003").is_dir()
    assert len(trainer.fit(source(), epochs=2)) == 2 and trainer.seen == 10  # and goes on where it was


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_signals_save_and_leave(tmp_path: Path, number: int, error: type[BaseException]) -> None:
    def kill(trainer: Any, _: Any) -> None:
        if trainer.seen == 7:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    trainer = make(tmp_path, callbacks=[LambdaCallback(on_step_end=kill)])
    with pytest.raises(error) as found:
        trainer.fit(source(), held_out(), epochs=3)
    if error is SystemExit:
        assert found.value.code == 143
    assert signal.getsignal(number) == before
    assert trainer.engine.steps == 7 and (tmp_path / "checkpoints/step-00000007").is_dir()
    other = make(tmp_path)
    other.fit(source(), held_out(), epochs=3, resume=True)
    whole = make(tmp_path / "whole")
    whole.fit(source(), held_out(), epochs=3)
    assert_same(dict(whole.model.state_dict()), dict(other.model.state_dict()))
    assert (tmp_path / "metrics.csv").read_bytes() == (tmp_path / "whole/metrics.csv").read_bytes()


def test_a_signal_during_the_validation(tmp_path: Path) -> None:
    """The validation is left at once; a resumed run does it again."""

    class Killing(data.Source):
        def __init__(self, kill: bool):
            self.kill, self.given = kill, 0

        def epoch(self, number: int, start: int = 0) -> Any:
            for batch in held_out().epoch(0):
                self.given += 1
                if self.kill:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

        def __len__(self) -> int:
            return 3

        def describe(self) -> dict[str, Any]:
            return {}

    trainer, killing = make(tmp_path), Killing(True)
    with pytest.raises(SystemExit):
        trainer.fit(source(), killing, epochs=2)
    assert killing.given == 1 and trainer.history == [] and trainer.batch == 5
    assert not (tmp_path / "metrics.csv").exists()
    history = make(tmp_path).fit(source(), Killing(False), epochs=2, resume=True)
    assert history == make().fit(source(), held_out(), epochs=2)


# -------------------------------------------------------------------------------------------- numbers that are not finite


def poison(block: int, step: int) -> Callback:
    """Plants a NaN in the weights of a block just before a step."""

    def plant(trainer: Any, _: Any) -> None:
        if trainer.engine.steps == step:
            with torch.no_grad():
                p = trainer.model.blocks[block].parameters()[0]
                p[(0,) * p.dim()] = float("nan")

    return LambdaCallback(on_step_end=plant)


@pytest.mark.parametrize("update", ["immediate", "end"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_nan_in_block_3_at_step_7(tmp_path: Path, update: Any, accumulate: int) -> None:
    """Reported as that; blocks before it were updated (immediate) or nothing was (end); the batch is written out."""
    torch.manual_seed(0)
    model = fl.localize(models.ResNetCIFAR(2, width=4), "dgl", blocks=6, sample=torch.zeros(2, 3, 8, 8))
    states: dict[int, dict[str, Tensor]] = {}

    def keep(trainer: Any, _: Any) -> None:
        states[trainer.engine.steps] = copy.deepcopy(trainer.model.state_dict())

    callbacks = [poison(3, 7), LambdaCallback(on_step_end=keep)]
    trainer = make(tmp_path, model, update=update, accumulate=accumulate, callbacks=callbacks)
    train = source(3)  # 9 batches
    with pytest.raises(NonFiniteError, match=r"block 3 .*step 7") as found:
        trainer.fit(train, epochs=20)
    error = found.value
    assert (error.block, error.step, error.name) == (3, 7, model.blocks[3].name)
    assert error.updated == ((0, 1, 2) if update == "immediate" else ())
    after = model.state_dict()
    for k, block in enumerate(model.blocks):
        for slot in (*block.parameter_slots(), *block.buffer_slots()):
            name = slot.name if slot.name in after else f"backbone.{slot.name}"
            same = torch.equal(states[7][name].nan_to_num(), after[name].nan_to_num())
            if k >= 3 or update == "end":
                assert same, f"{name} of block {k} changed"
    changed = [k for k in range(3) if not torch.equal(states[7][_first(model, k)], after[_first(model, k)])]
    assert changed == ([0, 1, 2] if update == "immediate" else [])

    about = json.loads((tmp_path / "nonfinite/step-00000007/about.json").read_text())
    assert about["step"] == 7 and "block 3" in about["reason"]
    written = load_file(tmp_path / "nonfinite/step-00000007/batch.safetensors")
    if accumulate == 1:
        want = [list(train.epoch(0))[7]]
        assert (about["epoch"], about["batch"]) == (0, 7)
    else:  # steps of an epoch: 2, 2, 2, 2, 1 batches
        want = list(train.epoch(1))[4:6]
        assert (about["epoch"], about["batch"]) == (1, 4)
    assert len(written) == 2 * len(want)
    for i, (x, y) in enumerate(want):
        assert torch.equal(written[f"{i}[0]"], x) and torch.equal(written[f"{i}[1]"], y)


def _first(model: fl.LocalModel, k: int) -> str:
    slot = model.blocks[k].parameter_slots()[0]
    return slot.name if slot.name in model.state_dict() else f"backbone.{slot.name}"


def test_skipped_updates_are_counted_and_the_batch_written(tmp_path: Path) -> None:
    bad = list(source().epoch(0))
    bad[2] = (bad[2][0].clone().fill_(float("nan")), bad[2][1])
    trainer = make(tmp_path, nonfinite="skip", log_every=1)
    history = trainer.fit(bad, held_out(), epochs=2)
    assert [row["skipped"] for row in history] == [3, 6] and history[1]["loss"] != history[1]["loss"]
    assert all(torch.isfinite(t).all() for t in trainer.model.state_dict().values())
    assert [row["skipped"] for row in rows_of(tmp_path / "steps.csv")][:4] == ["0", "0", "3", "3"]
    assert (tmp_path / "nonfinite/step-00000002/batch.safetensors").exists()


def test_stop_leaves_with_a_checkpoint(tmp_path: Path) -> None:
    trainer = make(tmp_path, nonfinite="stop", callbacks=[poison(1, 3)])
    trainer.fit(source(), epochs=5)
    assert trainer.engine.should_stop and trainer.seen == 4
    assert (tmp_path / "checkpoints/step-00000004").is_dir()


def test_out_of_memory_passes_with_the_state_kept(tmp_path: Path) -> None:
    model = localized()
    seen: list[BaseException] = []

    def exhaust(trainer: Any, _: Any) -> None:
        if trainer.seen == 6:
            name = model.blocks[1].name

            def fail(*_: Any) -> None:
                raise torch.OutOfMemoryError("CUDA out of memory")

            hooks.append(model.backbone.get_submodule(name).register_forward_hook(fail))

    hooks: list[Any] = []
    callback = LambdaCallback(on_step_end=exhaust, on_exception=lambda _, error: seen.append(error))
    trainer = make(tmp_path, model, update="end", callbacks=[callback])
    with pytest.raises(OutOfMemoryError, match=r"block 1 .*step 6; .*more blocks|block 1 .*step 6; .*smaller batch"):
        trainer.fit(source(), epochs=2)
    assert isinstance(seen[0], OutOfMemoryError) and trainer.batch == 1
    hooks[0].remove()
    trainer.fit(source(), epochs=2)  # goes on with the batch that failed
    assert_same(dict(_plain(2).state_dict()), dict(model.state_dict()))


def _plain(epochs: int) -> fl.LocalModel:
    trainer = make(update="end")
    trainer.fit(source(), epochs=epochs)
    return trainer.model


# ---------------------------------------------------------------------------------------------------------------- sizes


def test_the_batch_size_that_a_budget_allows() -> None:
    trainer = make(ema=0.9, accumulate=2)
    x, y = next(source().epoch(0))
    before = copy.deepcopy(trainer.model.state_dict())
    found = trainer.find_batch_size((x, y), budget="4MiB", largest=512)
    planned = [
        fl.plan(trainer.model, (x, y), rows=n, optimizer=momentum, memory_format="channels_last").peak_bytes
        for n in (found, found * 9 // 8)
    ]
    average = sum(t.numel() * t.element_size() for t in before.values())
    gradients = sum(4 * p.numel() for p in trainer.model.parameters())
    assert planned[0] + average + gradients <= 4 * 2**20 < planned[1] + average + gradients
    assert_same(dict(before), dict(trainer.model.state_dict()))
    assert trainer.find_batch_size((x, y), budget="4GiB", largest=48) == 48
    with pytest.raises(ArgumentError, match="two rows take"):
        trainer.find_batch_size((x, y), budget=1000)


# -------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 0}, "accumulate: got 0"),
        ({"save_every": 0}, "save_every: got 0"),
        ({"log_every": True}, "log_every: got True"),
        ({"update": "later"}, "update: got 'later'"),
        ({"mixing": 0.2}, "mixing: got float"),
        ({"clip": -1.0}, "value: got -1.0"),
        ({"ema": 1.0}, "decay: got 1.0"),
        ({"loggers": ["mlflow"]}, "loggers: got 'mlflow'"),
        ({"callbacks": [print]}, "callbacks: .* is no Callback"),
        ({"precision": "8-bit"}, "precision: got '8-bit'"),
        ({"clip": Clip(1.0, scope="global"), "update": "immediate"}, "clip: .*update='end'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make(None, **options)


def test_bad_calls(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="model: expected a LocalModel"):
        fl.Trainer(nn.Linear(2, 2), momentum)  # type: ignore[arg-type]
    for call, message in (
        (lambda t: t.fit(source(), epochs=0), "epochs: got 0"),
        (lambda t: t.fit([], epochs=1), "train: holds no batch"),
        (lambda t: t.fit(iter([1]), epochs=1), "data: .*iterator"),
        (lambda t: t.evaluate(held_out(), ema=True), "ema: this trainer keeps no average"),
    ):
        with pytest.raises(ArgumentError, match=message):
            call(make(tmp_path / "bad"))
    with pytest.raises(ArgumentError, match=r"monitor: .* no 'val_acc'\. Did you mean"):
        make(None, monitor="val_acc").fit(source(), held_out(), epochs=1)
    with pytest.raises(ArgumentError, match="mixing: needs batches"):
        make(None, mixing=data.Mixing(0.2)).fit([{"x": PIXELS[:4].float(), "labels": LABELS[:4]}], epochs=1)


def test_a_folder_with_a_run_is_not_written_over(tmp_path: Path) -> None:
    make(tmp_path).fit(source(), epochs=1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ArgumentError, match=r"folder: .*holds a run already; pass resume=True"):
        make(tmp_path).fit(source(), epochs=2)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_another_run_is_not_resumed(tmp_path: Path) -> None:
    make(tmp_path, scheduler="cosine").fit(source(), epochs=2)
    for options, train, message in (
        ({"scheduler": "cosine", "accumulate": 2}, source(), "resume: .*accumulate 1, now it is 2"),
        ({"scheduler": "cosine"}, source(4), "resume: .*data"),
        ({"scheduler": "cosine", "seed": 1}, source(), "resume: .*seed 0, now it is 1"),
        ({"scheduler": "cosine", "mixing": data.Mixing(0.1)}, source(), "resume: .*mixing None"),
    ):
        with pytest.raises(ArgumentError, match=message):
            make(tmp_path, **options).fit(train, epochs=2, resume=True)
    with pytest.raises(ArgumentError, match=r"resume: .*epochs 2, now it is 3"):
        make(tmp_path, scheduler="cosine").fit(source(), epochs=3, resume=True)
    with pytest.raises(CheckpointError, match="ema: the checkpoint has no average"):
        make(tmp_path, scheduler="cosine", ema=0.9).fit(source(), epochs=2, resume=True)
    with pytest.raises(CheckpointError, match="method"):
        make(tmp_path, localized("predsim"), scheduler="cosine").fit(source(), epochs=2, resume=True)
    with pytest.raises(CheckpointError, match="precision"):
        make(tmp_path, scheduler="cosine", precision="bf16-mixed").fit(source(), epochs=2, resume=True)


def test_more_epochs_of_a_run_without_a_schedule(tmp_path: Path) -> None:
    make(tmp_path).fit(source(), epochs=1)
    longer = make(tmp_path)
    longer.fit(source(), epochs=2, resume=True)
    whole = make()
    whole.fit(source(), epochs=2)
    assert_same(dict(whole.model.state_dict()), dict(longer.model.state_dict()))


def test_resume_needs_a_folder() -> None:
    for folder in (None, "auto"):
        with pytest.raises(ArgumentError, match="resume: there is no folder"):
            make(folder).fit(source(), epochs=1, resume=True)  # type: ignore[arg-type]


def test_a_run_goes_on_where_it_was_or_branches_off(tmp_path: Path) -> None:
    first = make(tmp_path / "one")
    first.fit(source(), epochs=1)
    same = make("auto")  # type: ignore[arg-type]
    same.resume(tmp_path / "one")
    same.fit(source(), epochs=2)
    assert same.folder == tmp_path / "one" and len(rows_of(tmp_path / "one/metrics.csv")) == 2
    branch = make(tmp_path / "two")
    branch.resume(tmp_path / "one/checkpoints/step-00000005")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        branch.fit(source(), epochs=2)
    assert [row["epoch"] for row in rows_of(tmp_path / "two/metrics.csv")] == ["1"]
    assert_same(dict(same.model.state_dict()), dict(branch.model.state_dict()))


def test_another_number_of_threads_is_said(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        make(tmp_path).fit(source(), epochs=1)
        torch.set_num_threads(2)
        with pytest.warns(RuntimeWarning, match="may differ in the last bits: threads was 1, is 2"):
            make(tmp_path).fit(source(), epochs=2, resume=True)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("limit", [100, 101, 137, 2_000, 54_321, 10**7])
@pytest.mark.parametrize("kink", [0, 40, 1000])
def test_the_search_below_a_limit_is_within_a_sixteenth(limit: int, kink: int) -> None:
    """Peaks that bend, as where another block becomes the largest, and few calls of what takes seconds."""
    calls = []

    def peak(rows: int) -> int:
        calls.append(rows)
        return max(90 + 3 * rows, 9 * (rows - kink))

    found = batch_size._below(peak, limit, 4096)
    exact = max(rows for rows in range(2, 4097) if max(90 + 3 * rows, 9 * (rows - kink)) <= limit)
    assert exact - max(1, exact // 16) <= found <= exact and len(calls) <= 12
