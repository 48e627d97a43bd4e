"""The Trainer by other schedules: the bytes of a sequential run, whatever is killed, skipped, stopped or resumed in between."""

from __future__ import annotations

import csv
import itertools
import json
import multiprocessing
import os
import signal
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlocal as fl
from fastlocal import data
from fastlocal.cli import main
from fastlocal.engine.choose import Chooser
from fastlocal.engine.rounds import Rounds
from fastlocal.errors import ArgumentError, BackendError, NonFiniteError
from fastlocal.trainer import Callback, CheckpointStore, LambdaCallback, Logger, PerStep, batch_size
from fastlocal.trainer import trainer as trainer_module
from tests.trainer.killed import MIXED, Case, Halt, Progress, digest, soak, train

MADE = torch.Generator().manual_seed(0)
PIXELS = torch.randint(256, (46, 3, 4, 4), dtype=torch.uint8, generator=MADE)
LABELS = torch.arange(46) % 5
IMAGES = data.Images(
    PIXELS[:38], LABELS[:38], PIXELS[38:], LABELS[38:], 5, torch.full((3,), 0.5), torch.ones(3), "noise"
)
BATCHES = 8  # an epoch: seven of 5 rows and one of 3
WHOLE: dict[str, Any] = {"schedule": "pipeline", "workers": 3, "in_flight": 4}
OTHERS: list[dict[str, Any]] = [{"schedule": "overlap"}, WHOLE]


@pytest.fixture(autouse=True)
def every_task_costs_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Schedules follow from measured times; here they shall be the same in every run."""
    clock = itertools.count()
    monkeypatch.setattr(Rounds, "_now", lambda self: float(next(clock)))


def source() -> data.Batches:
    return data.Batches(IMAGES, batch_size=5, seed=3, flip=True)


def held_out() -> data.Batches:
    return data.Batches(IMAGES, train=False, batch_size=4)


def momentum(named: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(named, lr=0.05, momentum=0.9)


def localized(dropout: float = 0.0, norm: bool = True, method: str = "dgl", blocks: int = 4) -> fl.LocalModel:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Flatten()]
    for width in (48, 16, 16):
        layers += [nn.Linear(width, 16), nn.BatchNorm1d(16) if norm else nn.Identity(), nn.ReLU(), nn.Dropout(dropout)]
    units = [nn.Sequential(*layers[:5]), nn.Sequential(*layers[5:9]), nn.Sequential(*layers[9:]), nn.Linear(16, 5)]
    return fl.localize(nn.Sequential(*units), method, blocks=blocks, sample=torch.zeros(2, 3, 4, 4))


def make(folder: Path | None = None, **options: Any) -> fl.Trainer:
    given: dict[str, Any] = {
        "folder": folder, "progress": False, "scheduler": "cosine", "deterministic": True, "log_every": 1,
    }  # fmt: skip
    given |= options
    optimizer = given.pop("optimizer", momentum)
    return fl.Trainer(given.pop("model", None) or localized(), optimizer, **given)


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path) as file:
        return list(csv.DictReader(file))


def ahead(trainer: fl.Trainer) -> int:
    """How many batches a pipeline is given beyond the step that is complete."""
    rounds = trainer.engine._rounds
    assert rounds is not None and rounds.schedule is not None and rounds.schedule.plan.in_flight > 1
    return rounds.schedule.plan.in_flight - 1


def assert_same(a: fl.Trainer, b: fl.Trainer) -> None:
    theirs = b.model.state_dict()
    assert [name for name, t in a.model.state_dict().items() if not torch.equal(t, theirs[name])] == []


class Told(Callback):
    """Steps in the order in which they are told, with the losses; and a state that a checkpoint keeps."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.losses: list[Tensor] = []
        self.given: list[int] = []

    def on_step_end(self, trainer: Any, output: Any) -> None:
        self.steps.append(output.step)
        self.losses.append(output.losses)
        self.given.append(trainer.seen)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": list(self.steps)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = list(state["steps"])


# ------------------------------------------------------------------------------------------------------- the same bytes


@pytest.mark.parametrize(
    ("form", "norm"),
    [("per step", True), ("per step", False), ("per epoch", True), ("one cycle", True), ("tensor", True)],
)
def test_a_run_leaves_the_same_bytes(tmp_path: Path, form: str, norm: bool) -> None:
    """Losses of every step, means of the epochs, rates, weights; batches of different sizes; checkpoints within epochs."""
    options: dict[str, Any] = {"save_every": 3, "log_every": 2, "clip": 0.5, "keep_last": 9}
    if form == "per epoch":
        options["scheduler"] = [(0, 0.05), (1, 0.01)]
    if form == "one cycle":  # changes the momentum too
        cycle = lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=99)  # noqa: E731
        options["scheduler"] = PerStep(cycle)
    if form == "tensor":  # the schedule fills the group's own tensor
        options["optimizer"] = lambda named: torch.optim.Adam(named, lr=torch.tensor(0.01), capturable=False)
    digests = []
    for i, schedule in enumerate([{"schedule": "sequential"}, *OTHERS]):
        folder = tmp_path / str(i)
        trainer = make(folder, model=localized(norm=norm), **options, **schedule)
        trainer.fit(source(), held_out(), epochs=2)
        assert len(trainer.history) == 2 and trainer.engine.steps == trainer.seen == 2 * BATCHES
        steps = [row["step"] for row in rows_of(folder / "steps.csv")]
        assert steps == [str(n) for n in range(2, 2 * BATCHES + 1, 2)]
        every = sorted((folder / "checkpoints").iterdir())
        assert [int(p.name[5:]) for p in every] == [3, 6, 8, 9, 12, 15, 16]
        digests.append({**digest(folder), "all": [(p.name, (p / "state.json").read_text()) for p in every]})
    assert digests[0] == digests[1] == digests[2]


def test_the_epochs_means_count_every_row_once() -> None:
    told = Told()
    trainer = make(callbacks=[told], **WHOLE)
    history = trainer.fit(source(), epochs=2)
    for epoch, row in enumerate(history):
        sizes = [len(y) for _, y in source().epoch(epoch)]
        assert sizes == [5] * 7 + [3]
        each = torch.stack(told.losses[epoch * BATCHES :][:BATCHES])
        mean = (each * torch.tensor(sizes)[:, None]).sum(0) / 38
        assert [row[f"loss_{k}"] for k in range(4)] == pytest.approx(mean.tolist(), rel=1e-6)


def test_rows_of_steps_have_their_own_losses_and_rates(tmp_path: Path) -> None:
    """Against the callbacks' outputs and the schedule's formula, not against another run."""
    told = Told()
    make(tmp_path, callbacks=[told], **WHOLE).fit(source(), epochs=2)
    rows = rows_of(tmp_path / "steps.csv")
    whole = 2 * BATCHES
    assert [int(row["step"]) for row in rows] == list(range(1, whole + 1))
    assert [int(row["epoch"]) for row in rows] == [0] * BATCHES + [1] * BATCHES
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(momentum([torch.zeros(1, requires_grad=True)]), whole)
    for row, losses in zip(rows, told.losses, strict=True):
        assert [float(row[f"loss_{k}"]) for k in range(4)] == losses.tolist()
        assert float(row["lr"]) == pytest.approx(cosine.get_last_lr()[0])
        cosine.optimizer.step()
        cosine.step()


@pytest.mark.parametrize("accumulate", [2, 3])
def test_micro_batches(tmp_path: Path, accumulate: int) -> None:
    """Eight batches in groups of three: the last is one of two. Groups of two, of which the limit leaves one alone."""
    limit = 7 if accumulate == 2 else None
    found = []
    for i, schedule in enumerate([{"schedule": "sequential"}, *OTHERS]):
        trainer = make(tmp_path / str(i), accumulate=accumulate, save_every=3, **schedule)
        trainer.fit(source(), held_out(), epochs=2, limit=limit)
        found.append(digest(tmp_path / str(i)))
    assert found[0] == found[1] == found[2]


def test_an_average_beside_overlapping_blocks(tmp_path: Path) -> None:
    for name in ("sequential", "overlap"):
        make(tmp_path / name, ema=0.7, save_every=3, schedule=name).fit(source(), held_out(), epochs=2)
    assert digest(tmp_path / "sequential") == digest(tmp_path / "overlap")


# ------------------------------------------------------------------------------------------------------- killed, resumed


@pytest.mark.parametrize(
    "case",
    [
        Case("dgl", "bf16-mixed", extras=True, optimizer="adamw", schedules=MIXED),
        Case("infopro", extras=True, optimizer="adamw", schedules=("overlap", "pipeline")),
    ],
    ids=str,
)
def test_interrupted_and_resumed_by_another_schedule(tmp_path: Path, case: Case) -> None:
    """Dropout, mixing, a loader that draws from the global generators; before the first checkpoint and in two epochs."""
    never: Any = multiprocessing.Value("i", 0, lock=False)
    train(case, str(tmp_path / "whole"), never, "sequential")
    schedules = itertools.cycle(case.schedules)
    for at in (2, 10, 29):
        with pytest.raises(Halt):
            train(case, str(tmp_path / "halted"), Progress(at), next(schedules))
    train(case, str(tmp_path / "halted"), never, next(schedules))
    assert digest(tmp_path / "whole") == digest(tmp_path / "halted")


def test_killed_and_resumed(tmp_path: Path) -> None:
    assert soak(Case("auglocal", schedules=("pipeline", "overlap")), seed=1, kills=2, root=tmp_path) >= 1


def test_a_pipelines_own_random_streams_are_resumed(tmp_path: Path) -> None:
    """Without deterministic=True a schedule still gives every block a stream of its own: it must not begin anew."""
    runs: list[dict[str, Any]] = [{"epochs": 2}, {"epochs": 1}, {"epochs": 2, "resume": True}]
    for name, run in zip(("whole", "cut", "cut"), runs, strict=True):
        trainer = make(tmp_path / name, model=localized(0.5), scheduler=None, deterministic=False, **WHOLE)
        trainer.fit(source(), **run)
    assert digest(tmp_path / "whole") == digest(tmp_path / "cut")


@pytest.mark.parametrize("then", ["sequential", "pipeline"])
def test_a_signal_completes_what_is_in_flight_and_saves(tmp_path: Path, then: str) -> None:
    make(tmp_path / "whole", schedule="sequential").fit(source(), held_out(), epochs=2)

    def kill(trainer: fl.Trainer, output: Any) -> None:
        if output.step == 10:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer = make(tmp_path / "cut", callbacks=[LambdaCallback(on_step_end=kill)], **WHOLE)
    with pytest.raises(SystemExit) as left:
        trainer.fit(source(), held_out(), epochs=2)
    assert left.value.code == 143 and not trainer.engine._rounds.busy  # type: ignore[union-attr]
    saved = CheckpointStore(tmp_path / "cut" / "checkpoints").latest()
    assert saved is not None and saved.step == trainer.engine.steps == 11 + ahead(trainer)
    make(tmp_path / "cut", schedule=then, workers=2).fit(source(), held_out(), epochs=2, resume=True)
    assert digest(tmp_path / "whole") == digest(tmp_path / "cut")


def test_stopped_by_a_callback_and_by_a_limit(tmp_path: Path) -> None:
    """The steps in flight belong to the run; so does the end of a shortened epoch."""
    make(tmp_path / "whole", schedule="sequential").fit(source(), held_out(), epochs=2, limit=6)

    def stop(trainer: fl.Trainer, output: Any) -> None:
        trainer.should_stop = output.step == 7

    trainer = make(tmp_path / "cut", callbacks=[LambdaCallback(on_step_end=stop)], **WHOLE)
    trainer.fit(source(), held_out(), epochs=2, limit=6)
    steps = 8 + ahead(trainer)
    assert (trainer.epoch, trainer.batch, trainer.engine.steps) == (1, steps - 6, steps)
    assert [row["step"] for row in rows_of(tmp_path / "cut" / "steps.csv")] == [str(n) for n in range(1, steps + 1)]
    make(tmp_path / "cut", **WHOLE).fit(source(), held_out(), epochs=2, limit=6, resume=True)
    assert digest(tmp_path / "whole") == digest(tmp_path / "cut")


# ---------------------------------------------------------------------------------------------------------- what is told


def test_callbacks_hear_of_every_step_once_and_in_order() -> None:
    told = Told()
    trainer = make(callbacks=[told], **WHOLE)
    trainer.fit(source(), epochs=1)
    assert told.steps == list(range(BATCHES))
    later = [min(step + 1 + ahead(trainer), BATCHES) for step in range(2, BATCHES)]
    assert told.given == [1, 2, *later]  # two to learn the costs; the last at the end


def test_the_bar_shows_what_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[int, list[float], int]] = []

    class Bar(trainer_module.Bar):
        def step(self, losses: Any, samples: int | None = None) -> None:
            shown.append((trainer.seen, losses, samples))  # type: ignore[arg-type]

    monkeypatch.setattr(trainer_module, "Bar", Bar)
    told = Told()
    trainer = make(callbacks=[told], **WHOLE)
    trainer.fit(source(), epochs=1)
    assert [n for n, _, _ in shown] == told.given and [rows for _, _, rows in shown] == [5] * 7 + [3]
    assert [losses for _, losses, _ in shown] == [losses.tolist() for losses in told.losses]


def test_a_save_from_within_a_callback_holds_the_steps_in_flight(tmp_path: Path) -> None:
    """Both callbacks hear of every step in order; what is saved says so, and goes on to the same bytes."""

    class Saves(Told):
        def on_step_end(self, trainer: Any, output: Any) -> None:
            super().on_step_end(trainer, output)
            if output.step in (4, 10) and trainer.folder is not None:
                trainer.save()

    first, second = Saves(), Told()
    whole = make(tmp_path / "whole", callbacks=[first, second], keep_last=20, **WHOLE)
    whole.fit(source(), held_out(), epochs=2)
    assert first.steps == second.steps == list(range(2 * BATCHES))
    given = 5 + ahead(whole)
    saved = tmp_path / f"whole/checkpoints/step-{given:08d}"
    state = json.loads((saved / "state.json").read_text())["extra"]
    assert state["seen"] == given and state["callbacks"]["0:Saves"]["steps"] == list(range(given))
    assert state["callbacks"]["1:Told"]["steps"] == list(range(given)) and state["rows"] == 5 * given

    third = Told()
    branch = make(tmp_path / "branch", callbacks=[Saves(), third], schedule="sequential")
    branch.resume(saved)
    branch.fit(source(), held_out(), epochs=2)
    assert third.steps == list(range(2 * BATCHES))
    plain = make(schedule="sequential")
    assert branch.history == plain.fit(source(), held_out(), epochs=2)
    assert_same(plain, branch)


def test_somebody_elses_checkpoint_takes_no_output_away(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "own")

    def save(trainer: fl.Trainer, output: Any) -> None:
        if output.step == 4:
            store.save(output.step, trainer.model, trainer.engine)

    told = Told()
    trainer = make(callbacks=[told, LambdaCallback(on_step_end=save)], **WHOLE)
    history = trainer.fit(source(), epochs=1)
    assert told.steps == list(range(BATCHES))
    assert history == make(schedule="sequential").fit(source(), epochs=1)


def test_outputs_that_somebody_else_took_are_left_out() -> None:
    told = Told()

    def take(trainer: fl.Trainer, output: Any) -> None:
        if output.step == 4:
            taken.extend(out.step for out in trainer.engine.flush())

    taken: list[int | None] = []
    trainer = make(callbacks=[told, LambdaCallback(on_step_end=take)], **WHOLE)
    (row,) = trainer.fit(source(), epochs=1)
    assert taken == [5, 6, 7][: ahead(trainer)] and trainer.engine.steps == BATCHES
    assert told.steps == [step for step in range(BATCHES) if step not in taken]
    sizes = torch.tensor([len(y) for step, (_, y) in enumerate(source().epoch(0)) if step not in taken])
    mean = (torch.stack(told.losses) * sizes[:, None]).sum(0) / sizes.sum()  # each with the rows of its own step
    assert [row[f"loss_{k}"] for k in range(4)] == pytest.approx(mean.tolist(), rel=1e-6)


# ------------------------------------------------------------------------------------------------------------ what fails


class Bad(data.Source):
    """One batch of the second epoch is not finite."""

    def epoch(self, number: int, start: int = 0) -> Any:
        for i, (x, y) in enumerate(source().epoch(number, start), start):
            yield (x * float("inf") if (number, i) == (1, 3) else x), y

    def __len__(self) -> int:
        return BATCHES

    def describe(self) -> dict[str, Any]:
        return {"kind": "Bad"}


def test_skipped_updates_stand_in_the_row_of_their_step(tmp_path: Path) -> None:
    found = []
    for i, schedule in enumerate([{"schedule": "sequential"}, *OTHERS]):
        folder = tmp_path / str(i)
        make(folder, nonfinite="skip", **schedule).fit(Bad(), held_out(), epochs=2)
        rows = rows_of(folder / "steps.csv")
        before, after = int(rows[BATCHES + 2]["skipped"]), int(rows[BATCHES + 3]["skipped"])
        assert before == 0 and after > 0
        found.append((digest(folder), [row["skipped"] for row in rows], contents(folder / "nonfinite")))
    assert found[0] == found[1] == found[2]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("policy", ["raise", "stop"])
def test_a_report_names_the_step_and_its_batch(tmp_path: Path, policy: str) -> None:
    trainer = make(tmp_path, nonfinite=policy, **WHOLE)
    if policy == "raise":
        with pytest.raises(NonFiniteError) as caught:
            trainer.fit(Bad(), epochs=2)
        assert caught.value.step == BATCHES + 3
    else:
        trainer.fit(Bad(), epochs=2)
        assert BATCHES + 4 <= trainer.engine.steps == trainer.seen < 2 * BATCHES
    (folder,) = (tmp_path / "nonfinite").iterdir()
    about = json.loads((folder / "about.json").read_text())
    assert (about["step"], about["epoch"], about["batch"]) == (BATCHES + 3, 1, 3) and folder.name == "step-00000011"


@pytest.mark.parametrize("where", ["callback", "data"])
def test_a_fit_after_an_exception_goes_on_with_what_was_in_flight(where: str) -> None:
    """As in sequence, where nothing is in flight: the same history and weights."""
    told = Told()
    armed = [True]

    def fail(trainer: fl.Trainer, output: Any) -> None:
        if where == "callback" and output.step == 4 and armed and armed.pop():
            raise Halt

    class Fails(data.Source):
        def epoch(self, number: int, start: int = 0) -> Any:
            for i, batch in enumerate(source().epoch(number, start), start):
                if where == "data" and i == 5 and armed and armed.pop():
                    raise Halt
                yield batch

        def __len__(self) -> int:
            return BATCHES

        def describe(self) -> dict[str, Any]:
            return source().describe()

    trainer = make(callbacks=[told, LambdaCallback(on_step_end=fail)], **WHOLE)
    with pytest.raises(Halt):
        trainer.fit(Fails(), epochs=2)
    assert trainer.engine._rounds.busy  # type: ignore[union-attr]
    history = trainer.fit(Fails(), epochs=2)
    assert told.steps == list(range(2 * BATCHES))
    plain = make(schedule="sequential")
    assert history == plain.fit(source(), epochs=2)
    assert_same(plain, trainer)


def test_steps_that_an_error_dropped_are_not_counted() -> None:
    """An error within a task drops what is in flight; the run goes on behind it, and means are those of complete steps."""
    told, sizes = Told(), []

    class Noted(data.Source):
        def epoch(self, number: int, start: int = 0) -> Any:
            for i, batch in enumerate(source().epoch(number, start), start):
                sizes.append((i, len(batch[1])))
                yield batch

        def __len__(self) -> int:
            return BATCHES

        def describe(self) -> dict[str, Any]:
            return {}

    def fail(module: Any, args: Any) -> None:
        if len(sizes) == 6:
            raise Halt

    trainer = make(scheduler=None, callbacks=[told], **WHOLE)
    handle = trainer.model.backbone[2].register_forward_pre_hook(fail)  # type: ignore[index]
    with pytest.raises(Halt) as caught:
        trainer.fit(Noted(), epochs=1)
    handle.remove()
    assert "Steps in flight were dropped" in str(caught.value.__notes__)
    before, complete = list(told.steps), trainer.engine.steps
    assert trainer.seen == 5 and before == list(range(complete)) and complete < 5  # the sixth was never taken
    history = trainer.fit(Noted(), epochs=1)
    assert told.steps == list(range(complete + 3)) and trainer.seen == BATCHES  # batches 5, 6, 7
    assert [i for i, _ in sizes] == [0, 1, 2, 3, 4, 5, 5, 6, 7]
    rows = [n for i, n in sizes[:complete] + sizes[6:]]
    mean = (torch.stack(told.losses) * torch.tensor(rows)[:, None]).sum(0) / sum(rows)
    assert [history[-1][f"loss_{k}"] for k in range(4)] == pytest.approx(mean.tolist(), rel=1e-6)


def test_a_save_after_an_exception_books_and_closes(tmp_path: Path) -> None:
    class Closing(Logger):
        closed, rows = 0, 0

        def step(self, row: Any) -> None:
            self.rows += 1

        def close(self) -> None:
            self.closed += 1

    def fail(trainer: fl.Trainer, output: Any) -> None:
        if output.step == 4:
            raise Halt

    logger = Closing()
    trainer = make(tmp_path / "cut", callbacks=[LambdaCallback(on_step_end=fail)], loggers=[logger], **WHOLE)
    with pytest.raises(Halt):
        trainer.fit(source(), held_out(), epochs=2)
    assert logger.rows == 5 and logger.closed == 1
    trainer.save()
    assert trainer.engine.steps == logger.rows == 5 + ahead(trainer) and logger.closed == 2
    trainer.save()
    assert logger.closed == 2  # nothing was left
    make(tmp_path / "cut", loggers=[Closing()], **WHOLE).fit(source(), held_out(), epochs=2, resume=True)
    make(tmp_path / "whole", loggers=[Closing()], schedule="sequential").fit(source(), held_out(), epochs=2)
    assert (tmp_path / "cut/steps.csv").read_bytes() == (tmp_path / "whole/steps.csv").read_bytes()
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")


def test_a_resumed_checkpoint_forgets_what_was_in_flight(tmp_path: Path) -> None:
    def fail(trainer: fl.Trainer, output: Any) -> None:
        if output.step == 11 and armed and armed.pop():
            raise Halt

    armed = [True]
    trainer = make(tmp_path / "cut", callbacks=[LambdaCallback(on_step_end=fail)], **WHOLE)
    with pytest.raises(Halt):
        trainer.fit(source(), held_out(), epochs=2)
    trainer.resume()  # the end of the first epoch
    assert trainer.engine.steps == BATCHES and trainer.seen == BATCHES
    trainer.fit(source(), held_out(), epochs=2)
    make(tmp_path / "whole", schedule="sequential").fit(source(), held_out(), epochs=2)
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")


# ------------------------------------------------------------------------------------------------------------- refusals


def test_an_average_is_refused_beside_a_pipeline(tmp_path: Path) -> None:
    model = fl.localize(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 5)),
        "dgl",
        blocks=2,
        sample=torch.zeros(2, 3, 4, 4),
    )
    strides = [p.stride() for p in model.parameters()]
    with pytest.raises(BackendError, match=r"^ema: .* use schedule='overlap', or leave ema out"):
        make(tmp_path / "run", model=model, ema=0.9, channels_last=True, schedule="pipeline")
    assert [p.stride() for p in model.parameters()] == strides and not (tmp_path / "run").exists()


def test_what_the_engine_refuses_is_refused_here() -> None:
    with pytest.raises(BackendError, match="update='immediate'"):
        make(schedule="pipeline", clip=fl.engine.clip.Clip(1.0, scope="global"))
    for name in ("workers", "in_flight"):
        with pytest.raises(ArgumentError, match=f"^{name}: "):
            make(schedule="pipeline", **{name: 0})
    trainer = make(**WHOLE)
    trainer.engine.optimizer.register_step_post_hook(lambda *_: None)
    with pytest.raises(BackendError, match="schedule='overlap'"):
        trainer.fit(source(), epochs=1)
    assert trainer.engine.steps == trainer.seen == 0


def test_a_model_with_one_order_trains_in_that(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="one block leaves nothing"):
        trainer = make(tmp_path / "a", model=localized(method="bp", blocks=1), **WHOLE)
    trainer.fit(source(), epochs=1)
    make(tmp_path / "b", model=localized(method="bp", blocks=1), schedule="sequential").fit(source(), epochs=1)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


# ----------------------------------------------------------------------------------------------------------------- auto


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as anyone can tell: real ones would make these tests slow, and are not what they are about."""
    count = threading.local()  # as the real number is
    monkeypatch.setattr(torch, "get_num_threads", lambda: getattr(count, "n", 2))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: setattr(count, "n", n))


def test_with_one_thread_auto_is_sequential(tmp_path: Path) -> None:
    trainer = make(tmp_path, deterministic=False)
    assert trainer.engine.schedule == "sequential" and trainer.engine._rounds is trainer.engine._chooser is None
    trainer.fit(source(), epochs=1)
    assert trainer.engine.state_dict()["schedule"] is None


def test_auto_pipelines_only_where_nothing_looks_at_single_steps(two_threads: None) -> None:
    def depth(**options: Any) -> int | None:
        chooser = make(deterministic=False, **options).engine._chooser
        return None if chooser is None else chooser._in_flight

    epochs_only = LambdaCallback(on_epoch_end=lambda trainer, row: None)
    assert depth() == depth(callbacks=[epochs_only]) == 2 and depth(in_flight=3) == 3 and depth(in_flight=1) == 1
    assert depth(ema=0.9) == depth(ema=0.9, in_flight=3) == depth(accumulate=2) == 1
    assert depth(callbacks=[Told()]) == depth(callbacks=[LambdaCallback(on_step_end=lambda trainer, out: None)]) == 1
    assert make().engine._chooser is None  # deterministic=True: nothing may depend on times


@pytest.mark.parametrize("choice", ["overlap", "pipeline", "sequential"])
def test_a_resumed_run_keeps_what_auto_chose(
    tmp_path: Path, choice: str, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By times that are made up: a step in sequence takes a second, another one less or more."""
    seconds = {"sequential": 1.5, "overlap": 0.5, "pipeline": 0.5}[choice]
    options: dict[str, Any] = {"deterministic": False, "in_flight": 1 if choice == "overlap" else 2, "save_every": 4}
    note = Chooser.note

    def timed(self: Chooser, _: float, x: Any) -> None:
        if self._engine._rounds is not None and self._engine._rounds.schedule is not None:
            self._before = 1e9  # whatever the costs of the tasks add up to
        note(self, 1.0 if self._engine._rounds is None else seconds * 1e9 * (1 if choice == "sequential" else 0), x)

    monkeypatch.setattr(Chooser, "note", timed)
    batches = [batch for batch in source().epoch(0) if len(batch[1]) == 5]
    make(tmp_path / "whole", scheduler=None, **options).fit(batches, epochs=4)
    cut = make(tmp_path / "cut", scheduler=None, **options)
    cut.fit(batches, epochs=3)
    assert cut.engine._chooser is not None and cut.engine._chooser.choice == choice
    again = make(tmp_path / "cut", scheduler=None, **options)
    again.fit(batches, epochs=4, resume=True)
    assert f"'auto' chose {choice}: as in the run that was resumed" in again.engine.explain()
    assert again.engine.explain().startswith(f"schedule: {choice}")
    assert (tmp_path / "whole/steps.csv").read_bytes() == (tmp_path / "cut/steps.csv").read_bytes()
    assert digest(tmp_path / "whole") == digest(tmp_path / "cut")
    with_average = make(tmp_path / "other", scheduler=None, **options | {"in_flight": 1})
    with_average.resume(tmp_path / "cut")
    rounds = with_average.engine._rounds
    assert rounds is None or rounds.in_flight == 1  # what this one can do


def test_hooks_on_the_optimizer_end_a_pipeline_that_auto_chose(two_threads: None) -> None:
    """By name it is refused; what auto chose must not fail because something is registered later."""
    trainer = make(deterministic=False, scheduler=None)
    chooser = trainer.engine._chooser
    assert chooser is not None
    chooser.choose("pipeline")
    trainer.fit(source(), epochs=1)
    steps: list[int] = []
    trainer.engine.optimizer.register_step_post_hook(lambda *_: steps.append(trainer.engine.steps))
    trainer.fit(source(), epochs=2)
    assert steps == list(range(BATCHES, 2 * BATCHES))
    assert trainer.engine._rounds is not None and trainer.engine._rounds.kind == "overlap"
    assert chooser.choice == "overlap" and "hooks are registered" in trainer.engine.explain()


def test_other_threads_in_an_operator_are_said(tmp_path: Path, two_threads: None) -> None:
    make(tmp_path, schedule="sequential").fit(source(), epochs=2, limit=2)
    trainer = make(tmp_path, schedule="overlap", workers=2)
    with pytest.warns(RuntimeWarning, match="threads of an operator was 2, is 1"):
        trainer.fit(source(), epochs=2, limit=2, resume=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(tmp_path, schedule="sequential", accumulate=1).resume()


# --------------------------------------------------------------------------------------------------------- everything else


def test_the_batch_size_is_planned_for_the_schedule(monkeypatch: pytest.MonkeyPatch, two_threads: None) -> None:
    asked: list[dict[str, Any]] = []

    def plan(model: Any, batch: Any, **options: Any) -> Any:
        asked.append(options)
        return SimpleNamespace(peak_bytes=1000 * options["rows"])

    monkeypatch.setattr(batch_size, "plan", plan)
    batch = next(source().epoch(0))
    keys = ("schedule", "streams", "in_flight")

    def options_of(**options: Any) -> list[Any]:
        assert make(**options).find_batch_size(batch, budget=10**6) > 500
        return [asked[-1].get(key) for key in keys]

    assert options_of(schedule="sequential") == options_of() == [None, None, None]
    assert options_of(schedule="overlap", workers=3) == ["overlap", 3, 1]
    assert options_of(**WHOLE) == ["pipeline", 3, 4]
    assert options_of(deterministic=False) == ["pipeline", 2, 2]  # which auto may choose
    assert options_of(deterministic=False, ema=0.9) == ["overlap", 2, 1]


def test_configuration_and_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import numpy as np

    pixels = np.random.default_rng(0).integers(0, 255, (40, 8, 8)).astype(np.uint8)
    file = tmp_path / "tiny.npz"
    np.savez(file, x_train=pixels[:32], y_train=np.arange(32) % 3, x_test=pixels[32:], y_test=np.arange(8) % 3)
    begin = ["train", "--quiet", "--threads", "1", "--data", str(file), "--model", "mlp", "--method", "dgl"]
    begin += ["--batch-size", "8", "--epochs", "2", "--log-every", "1", "--scheduler", "none"]
    flags = ["--schedule", "pipeline", "--schedule-workers", "2", "--in-flight", "3", "--schedule-budget", "1GiB"]
    assert main([*begin, *flags, "--out", str(tmp_path / "a")]) == 0
    assert json.loads((tmp_path / "a/config.json").read_text())["schedule"] == "pipeline"
    command = json.loads((tmp_path / "a/command.json").read_text())
    assert (command["schedule_workers"], command["in_flight"], command["schedule_budget"]) == (2, 3, "1GiB")
    assert main([*begin, "--out", str(tmp_path / "b")]) == 0
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    capsys.readouterr()
    assert main(["train", "--resume", str(tmp_path / "b"), "--epochs", "3", "--quiet", "--schedule", "overlap"]) == 0
    assert "schedule: overlap" in capsys.readouterr().out
    assert json.loads((tmp_path / "b/command.json").read_text())["schedule"] == "overlap"
    assert main([*begin, "--schedule", "pipeline", "--ema", "0.9", "--out", str(tmp_path / "c")]) == 2
    assert capsys.readouterr().err.startswith("fastlocal: ema: ") and not (tmp_path / "c").exists()
