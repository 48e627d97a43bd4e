"""`Trainer`: epochs of `fastlocal.Engine` with all that a training needs around it. A killed run goes on bitwise."""

from __future__ import annotations

import math
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastlocal.blocks.batch import first_tensor
from fastlocal.data.mixing import Mixing
from fastlocal.data.source import Source, as_source
from fastlocal.engine.clip import Clip
from fastlocal.engine.engine import Engine
from fastlocal.engine.memory import peak_bytes
from fastlocal.engine.model import LocalModel
from fastlocal.engine.optimizer import LocalOptimizer, OptimizerFactory
from fastlocal.engine.output import StepOutput
from fastlocal.errors import ArgumentError, BackendError, CheckpointError, NonFiniteError, did_you_mean
from fastlocal.trainer import checkpoint
from fastlocal.trainer import schedule as schedule_module
from fastlocal.trainer.batch_size import find_batch_size
from fastlocal.trainer.callbacks import Callback, Callbacks
from fastlocal.trainer.config import resolved, write_config
from fastlocal.trainer.dump import dump
from fastlocal.trainer.ema import EMA
from fastlocal.trainer.evaluate import Evaluation, evaluate, recalibrate
from fastlocal.trainer.loggers import CSVLogger, Logger, Loggers, TensorBoardLogger, WandbLogger
from fastlocal.trainer.progress import Bar
from fastlocal.trainer.signals import Leave, Signals
from fastlocal.trainer.store import CheckpointStore, Loaded

_REMEMBER = 64  # steps whose place in the data is kept: a report of non-finite numbers can be 50 steps late
_UNSAVED = ("decoupled_weight_decay",)  # a default of AdamW that its constructor does not take
_DUMPS = 3  # batches written out at most in one run


@dataclass(frozen=True, slots=True)
class _Given:
    """A step that the engine was given and whose output has not come yet."""

    step: int
    rows: int
    lr: float | None  # where steps.csv is due a row


class Trainer:
    """Trains a `LocalModel` block by block, logs, validates, saves and resumes.

    Everything that a run depends on is in its checkpoints: weights, optimizer, schedule, averages, random streams, the
    place in the data and in an accumulation, logs. A run that was killed and resumed ends with the same bytes as one that
    was not (on one machine, with the same number of threads; ``deterministic=True`` on a CUDA device).

    Args:
        model: from `fastlocal.localize`, on the device that it shall be trained on.
        optimizer: called once per block with its ``[(name, parameter)]``, such as ``lambda named: torch.optim.SGD(named,
            lr=0.1)``; one of `fastlocal.trainer.optimizers`; or a `LocalOptimizer`.
        scheduler: learning rates: a name such as ``"cosine"``, ``(name, options)``, a list of (epoch, rate), or a function of the
            optimizer that returns one of PyTorch's schedulers; see `fastlocal.trainer.schedule.make`.
        precision: ``"32-true"``, ``"bf16-mixed"`` or ``"16-mixed"``.
        schedule, workers, in_flight, memory_budget, graph, backend, update, deterministic, seed, nonfinite: see
            `fastlocal.Engine`. ``schedule="auto"`` may choose a pipeline of two steps (or ``in_flight``), unless ``ema``,
            ``accumulate`` or a callback's ``on_step_end`` looks at single steps. ``update="auto"`` is ``"end"`` where ``clip``
            needs all gradients at once, else ``"immediate"``. ``seed`` is also that of the data's order.
        channels_last: convert the model and 4-D inputs; ``"auto"``: if it has 2-d convolutions.
        accumulate: micro-batches an update; see `Engine.accumulate`. The last group of an epoch may be smaller.
        clip: a number (largest norm of one block's gradients) or a `fastlocal.engine.clip.Clip`.
        mixing: `fastlocal.data.Mixing`: mixup, CutMix, label smoothing. For batches (x, y).
        ema: decay of an exponential moving average of backbone and heads, or options of `fastlocal.trainer.EMA`.
        folder: for configuration, logs and checkpoints. ``"auto"`` takes a new one in ``runs/``; None writes nothing.
        save_every: batches between two checkpoints within an epoch, besides the one at its end.
        keep_last, keep_best: see `CheckpointStore`.
        monitor: a column of the epoch's row by which the best are kept and plateaus are found, such as ``"val_loss"``,
            ``"ema_accuracy"``, ``"val_accuracy_3"``; less is better where ``loss`` is in its name. By default ``val_accuracy``.
        callbacks: `fastlocal.trainer.Callback` objects, such as `EarlyStopping`.
        loggers: besides the CSV files, such as ``"tensorboard"``, ``"wandb"`` or `Logger` objects.
        progress: a bar on stderr.
        log_every: optimizer steps between two rows of ``steps.csv``.
        validate_every: epochs between two validations; the last epoch always has one.
        recalibrate: after the last epoch, BatchNorm statistics are averaged anew over this many training batches, and
            validated in one more row.
        fast_dev_run: True or a number: that many batches of training and validation, and no file, to see that all works.

    Attributes:
        engine: the `Engine`.
        ema: the `EMA`, or None.
        history: a dict per epoch, as in ``metrics.csv``.
        epoch, batch: where the run stands: epochs completed, and batches of the one after them.
        seen: batches trained on in all; the numbers of checkpoints.
        should_stop: set it, for example in a callback, to leave after the current step with a checkpoint.

    Raises:
        ArgumentError: a value that is not one of these.
        BackendError: see `fastlocal.Engine`; or ``ema`` with ``schedule="pipeline"``. Nothing has been changed then.
    """

    def __init__(
        self,
        model: LocalModel,
        optimizer: OptimizerFactory | LocalOptimizer,
        *,
        scheduler: Any = None,
        precision: str = "32-true",
        schedule: Literal["auto", "sequential", "overlap", "pipeline"] = "auto",
        workers: int | None = None,
        in_flight: int | None = None,
        memory_budget: str | float | None = None,
        graph: Literal["auto", "on", "off"] = "auto",
        backend: Literal["auto", "reference", "triton", "native"] = "auto",
        update: Literal["auto", "immediate", "end"] = "auto",
        channels_last: bool | Literal["auto"] = "auto",
        accumulate: int = 1,
        clip: Clip | float | None = None,
        mixing: Mixing | None = None,
        ema: float | dict[str, Any] | None = None,
        nonfinite: Literal["raise", "skip", "stop"] = "raise",
        deterministic: bool = False,
        seed: int = 0,
        folder: str | Path | None = "auto",
        save_every: int | None = None,
        keep_last: int = 3,
        keep_best: int = 1,
        monitor: str | None = None,
        callbacks: Sequence[Callback] = (),
        loggers: Sequence[Logger | str] = (),
        progress: bool = True,
        log_every: int = 50,
        validate_every: int = 1,
        recalibrate: int = 0,
        fast_dev_run: bool | int = False,
    ):
        for name, value, low in (
            ("accumulate", accumulate, 1),
            ("save_every", 1 if save_every is None else save_every, 1),
            ("log_every", log_every, 1),
            ("validate_every", validate_every, 1),
            ("recalibrate", recalibrate, 0),
            ("fast_dev_run", int(fast_dev_run), 0),
        ):
            _integer(name, value, low)
        if mixing is not None and not isinstance(mixing, Mixing):
            raise ArgumentError(f"mixing: got {type(mixing).__name__}; give fastlocal.data.Mixing(mixup=0.2)")
        if not isinstance(model, LocalModel):
            raise ArgumentError(f"model: expected a LocalModel from fastlocal.localize, got {type(model).__name__}")
        if update not in ("auto", "immediate", "end"):
            raise ArgumentError(f"update: got {update!r}; valid are 'auto', 'immediate', 'end'")
        if schedule == "pipeline" and ema is not None:
            raise BackendError(
                "ema: the average is of one step's weights, but at no moment of a pipeline is every block at the same step; use "
                "schedule='overlap', or leave ema out"
            )
        limit = Clip.coerce(clip)
        if update == "auto":
            update = "end" if limit is not None and limit.scope == "global" else "immediate"
        if channels_last == "auto":
            channels_last = any(isinstance(module, nn.Conv2d) for module in model.modules())
        self.callbacks = Callbacks(callbacks)
        if schedule == "auto" and in_flight is None:
            in_flight = 2
        if schedule == "auto" and (ema is not None or accumulate > 1 or self.callbacks.watch_steps):
            in_flight = 1
        bind = getattr(optimizer, "bind", None)
        self._factory = optimizer if bind is None else bind(model)
        self.engine = Engine(
            model,
            self._factory,
            schedule=schedule,
            workers=workers,
            in_flight=in_flight,
            memory_budget=memory_budget,
            precision=precision,
            graph=graph,
            backend=backend,
            update=update,
            deterministic=deterministic,
            seed=seed,
            memory_format="channels_last" if channels_last else "preserve",
            nonfinite=nonfinite,
            clip=limit,
        )
        self.model = model
        self.precision, self.channels_last, self.accumulate = precision, bool(channels_last), accumulate
        self.mixing, self.seed = mixing, seed
        options = {} if ema is None else {"decay": ema} if isinstance(ema, int | float) else dict(ema)
        self.ema = None if ema is None else EMA(model, **options)
        self.folder = None if folder is None or fast_dev_run else Path(folder)
        self.save_every, self.keep_last, self.keep_best = save_every, keep_last, keep_best
        self.monitor = monitor
        for logger in loggers:
            if isinstance(logger, str) and logger not in ("tensorboard", "wandb"):
                raise ArgumentError(f"loggers: got {logger!r}; valid are 'tensorboard', 'wandb' and Logger objects")
        self.loggers = list(loggers)
        self.progress, self.log_every, self.validate_every = progress, log_every, validate_every
        self.recalibrate, self.fast_dev_run = recalibrate, int(fast_dev_run)
        self.history: list[dict[str, Any]] = []
        self.epoch = self.batch = self.seen = 0
        self.should_stop = False
        self._scheduler_spec = scheduler
        self._scheduler: schedule_module.Schedule | None = None
        self._total: Tensor | None = None  # sum of this epoch's losses, each times its rows
        self._rows = 0
        self._recalibrated = self._opened = self._own = False
        self._resumed: dict[str, Any] | None = None
        self._store: CheckpointStore | None = None
        self._logs = Loggers()
        self._given: deque[_Given] = deque()
        self._outputs: deque[StepOutput] = deque()  # of completed steps that are not booked
        self._source: Source | None = None  # of the fit that runs
        self._bar: Bar | None = None
        self._places: deque[tuple[int, int, int]] = deque(maxlen=_REMEMBER)  # step, epoch, first batch of its group
        self._dumped = 0
        self._counted = 0.0

    # --- fit ---------------------------------------------------------------------------------------------------------

    def fit(
        self,
        train: Any,
        val: Any = None,
        *,
        epochs: int,
        resume: bool = False,
        limit: int | None = None,
    ) -> list[dict[str, Any]]:
        """Trains until ``epochs`` epochs are done, counted from the run's beginning.

        SIGTERM and SIGINT let the current batch finish, save, and leave by SystemExit(143) and KeyboardInterrupt; a
        second signal leaves at once.

        Args:
            train, val: a `fastlocal.data.Batches`, a DataLoader, a list of batches; see `fastlocal.data.as_source`. Batches
                may have any form that the model takes; they are moved to its device.
            epochs: at least 1.
            resume: go on from the newest whole checkpoint in ``folder``, if there is one.
            limit: most batches of an epoch; needed where ``train`` does not say how many it has.

        Returns:
            ``history``.

        Raises:
            ArgumentError: a bad value; ``folder`` holds a run and ``resume`` is False; or the run that is resumed was
                another one.
            NonFiniteError, OutOfMemoryError: see `Engine.step`. The batch is written to ``folder/nonfinite``.
            CheckpointError: a checkpoint cannot be read. One that cannot be written is a RuntimeWarning: training goes on.
        """
        _integer("epochs", epochs, 1)
        if limit is not None:
            _integer("limit", limit, 1)
        source = as_source(train, seed=self.seed)
        test = None if val is None else as_source(val, seed=self.seed)
        if self.fast_dev_run:
            epochs, limit = 1, min(self.fast_dev_run, limit or self.fast_dev_run)
            self.epoch = self.batch = 0
        length = _least(source.length, limit)
        if length == 0:
            raise ArgumentError("train: holds no batch; give at least one")
        if length is None and not isinstance(self._scheduler_spec, type(None)):
            raise ArgumentError(
                "limit: the data does not say how many batches an epoch has, and the scheduler needs to know; give limit="
            )
        self._open(source, test, epochs, limit, resume)
        self._set_schedule(epochs, length)
        batches = None if length is None else epochs * length
        self.should_stop = self.engine.should_stop = False
        style: dict[str, Any] = {
            "enabled": self.progress,
            "done": self.seen,
            "device": self.engine.device,
            "split": "val",
        }
        with Signals() as signals, Bar(batches, self.model.method.name, **style) as bar:
            self._source, self._bar = source, bar
            try:
                self._logs.start(self._config)
                self.callbacks.on_fit_start(self)
                self._settle()  # a fit that ended by an exception may have left steps in flight
                self._given.clear()  # or dropped them
                while self.epoch < epochs and not self._stopping():
                    bar.label = f"{self.model.method.name} {self.epoch + 1}/{epochs}"
                    self._train_epoch(source, limit, signals)
                    if not self._stopping() or self._at_end(source, limit):
                        self._end_epoch(test, epochs, bar, signals)
                if self.batch:  # stopped within an epoch
                    self._save()
                elif self.recalibrate and not self._recalibrated and self.history:
                    self._recalibrate(source, test, signals)
                self.callbacks.on_fit_end(self)
            except Leave:
                self._save(self._last_metric())
                raise signals.farewell() from None
            except BaseException as error:
                if isinstance(error, NonFiniteError):
                    try:
                        self._dump(error.step, str(error), source)
                    except Exception as problem:  # the error itself matters more
                        warnings.warn(f"its batch cannot be written out: {problem}", RuntimeWarning, stacklevel=2)
                self.callbacks.on_exception(self, error)
                raise
            finally:
                self._logs.close()
                self._source = self._bar = None
        return self.history

    def _train_epoch(self, source: Source, limit: int | None, signals: Signals) -> None:
        """From batch ``self.batch`` of epoch ``self.epoch`` to its end."""
        self.model.train()
        begin, seen = time.perf_counter(), 0
        stream = islice(source.epoch(self.epoch, self.batch), None if limit is None else max(0, limit - self.batch))
        batch = next(stream, None)
        while batch is not None:
            # a group of micro-batches ends with its epoch, so the epoch's last batch must be known
            following = next(stream, None) if self.accumulate > 1 else None
            place = self.batch % self.accumulate
            last = place == self.accumulate - 1 or (self.accumulate > 1 and following is None)
            if place == 0:
                self._places.append((self._next_step(), self.epoch, self.batch))
            seen += self._train_batch(batch, last)
            if signals.got is not None:
                self._settle()
                signals.check()
            if self._stopping():
                self._settle()
                self.should_stop = True  # whatever callbacks say of the steps that were in flight
                break
            batch = next(stream, None) if self.accumulate == 1 else following
            if self.save_every and self.seen % self.save_every == 0 and batch is not None:
                self._save()
        self._settle()
        if self.batch == 0:
            raise ArgumentError("train: holds no batch; give at least one")
        if seen:
            self._time("train", begin, seen)

    def _train_batch(self, batch: Any, last: bool) -> int:
        """Gives the engine a batch. What is complete then is booked: in a pipeline, an earlier one or none."""
        assert self._scheduler is not None
        engine = self.engine
        batch = self._ready(batch, self.epoch, self.batch)
        rows = _rows(batch)
        if not last:
            if self._given:
                self._settle()
            micro = engine.accumulate(batch)
            self.batch += 1
            self.seen += 1
            self._count(micro, rows)
            self._show(micro, rows, engine.steps)
            return rows
        step = self._next_step()
        lr = max(self._scheduler.lrs) if (step + 1) % self.log_every == 0 else None
        out = engine.step(batch)
        self._given.append(_Given(step, rows, lr))
        self.batch += 1
        self.seen += 1
        if self.ema is not None:
            self.ema.update()
        self._scheduler.after_step()
        if out.step is not None:
            self._book(out)
        return rows

    def _next_step(self) -> int:
        """Number of the step that is given next."""
        return self._given[-1].step + 1 if self._given else self.engine.steps

    def _settle(self) -> bool:
        """Completes the steps in flight, and books them; whether there were any."""
        self._outputs.extend(self.engine.flush())
        found = bool(self._outputs)
        while self._outputs:
            self._book(self._outputs.popleft())
        return found

    def _book(self, out: StepOutput) -> None:
        """A step is complete: counts its losses, logs them, tells the callbacks."""
        while self._given and self._given[0].step != out.step:
            self._given.popleft()  # somebody else took its output from the engine
        if not self._given:
            return
        given = self._given.popleft()
        self._count(out, given.rows)
        if given.lr is not None:
            self._logs.step(self._step_row(out, given))
            self._note_skips(given.step, out)
        self.callbacks.on_step_end(self, out)
        self._show(out, given.rows, given.step + 1)

    def _count(self, out: StepOutput, rows: int) -> None:
        losses = out.losses * rows
        self._total = losses if self._total is None else self._total.add_(losses)
        self._rows += rows

    def _show(self, out: StepOutput, rows: int, steps: int) -> None:
        if self._bar is not None:
            waits = self.engine.device.type != "cpu"
            self._bar.step(None if waits and steps % self.log_every else out.losses.tolist(), rows)

    def _end_epoch(self, test: Source | None, epochs: int, bar: Bar, signals: Signals) -> None:
        assert self._total is not None and self._scheduler is not None
        engine = self.engine
        self._note_skips(engine.steps - 1)
        means = (self._total / self._rows).tolist()
        row: dict[str, Any] = {
            "epoch": self.epoch,
            "step": engine.steps,
            "lr": max(self._scheduler.lrs),
            "skipped": int(engine.skipped.sum()),
            "loss": means[-1],
            **{f"loss_{k}": value for k, value in enumerate(means)},
        }
        due = (self.epoch + 1) % self.validate_every == 0 or self.epoch == epochs - 1 or self._stopping()
        row |= self._validate(test, signals, due)
        bar.accuracy, bar.ema_accuracy = row.get("val_accuracy"), row.get("ema_accuracy")
        self.history.append(row)
        metric = self._metric(row)
        self._scheduler.after_epoch(metric)
        self.epoch, self.batch, self._total, self._rows = self.epoch + 1, 0, None, 0
        self.callbacks.on_epoch_end(self, row)
        self._logs.epoch(row)
        self._save(metric)

    def _validate(self, test: Source | None, signals: Signals, due: bool = True) -> dict[str, Any]:
        """Columns ``val_*`` and ``ema_*``; empty ones where no validation is due."""
        row: dict[str, Any] = {}
        if test is None:
            return row
        for prefix, model in self._models():
            row |= {f"{prefix}_{name}": None for name in self._measures()}
            if due:
                begin = time.perf_counter()
                found = self._evaluate(model, _Watched(test, signals), self.fast_dev_run or None)
                row |= found.to_row(prefix)
                self._time(prefix, begin, found.count)
        return row

    def _measures(self) -> list[str]:
        blocks = range(len(self.model.blocks))
        return ["loss", "accuracy", *(f"{name}_{k}" for k in blocks for name in ("loss", "accuracy"))]

    def _columns(self, test: Source | None) -> list[str]:
        """Those of the epochs' rows that are numbers to watch."""
        names = ["loss", *(f"loss_{k}" for k in range(len(self.model.blocks)))]
        prefixes = [prefix for prefix, _ in self._models()] if test is not None else []
        return names + [f"{prefix}_{name}" for prefix in prefixes for name in self._measures()]

    def _models(self) -> list[tuple[str, LocalModel]]:
        return [("val", self.model), *([] if self.ema is None else [("ema", self.ema.model)])]

    def _recalibrate(self, source: Source, test: Source | None, signals: Signals) -> None:
        """After the last epoch; what the validation says then is one more row."""
        for _, model in self._models():
            recalibrate(model, source, self.recalibrate, precision=self.precision, channels_last=self.channels_last)
        row = dict.fromkeys(self.history[-1]) | {"epoch": self.epoch, "step": self.engine.steps}
        row |= self._validate(test, signals)
        self._recalibrated = True
        self.history.append(row)
        self._logs.epoch(row)
        self._save(self._metric(row))

    def _stopping(self) -> bool:
        return self.should_stop or self.engine.should_stop

    def _at_end(self, source: Source, limit: int | None) -> bool:
        return self.batch == _least(source.length, limit)

    # --- evaluate ----------------------------------------------------------------------------------------------------

    def evaluate(self, data: Any, *, ema: bool = False) -> Evaluation:
        """Loss and accuracy of every block in one pass, in the training's precision; ``ema``: of the average.

        Raises:
            ArgumentError: ``ema`` without one, or bad data.
        """
        if ema and self.ema is None:
            raise ArgumentError("ema: this trainer keeps no average; make it with ema=0.999")
        model = self.ema.model if ema and self.ema is not None else self.model
        return self._evaluate(model, as_source(data, seed=self.seed), None)

    def _evaluate(self, model: LocalModel, source: Source, limit: int | None) -> Evaluation:
        return evaluate(model, source, precision=self.precision, channels_last=self.channels_last, limit=limit)

    def find_batch_size(self, batch: Any, *, budget: str | float | None = None, largest: int = 65536) -> int:
        """The largest batch (micro-batch, with ``accumulate``) whose step fits into memory, to a sixteenth.

        On a CUDA device steps are tried out, and everything is put back. With ``budget``, and on a CPU, where a failed
        try would take the machine along, `fastlocal.plan` predicts them; the default is 90 % of the free memory.

        Args:
            batch: any batch, as ``engine.step`` takes it; its rows are repeated.
            budget: bytes, or "4GiB", of a training step all in all, parameters included.
            largest: not more rows than this.

        Raises:
            ArgumentError: not even two rows fit, or a bad argument.
        """
        _integer("largest", largest, 2)
        tensors = {t.data_ptr(): t for t in self.model.state_dict().values()}.values()
        own = sum(t.numel() * t.element_size() for t in tensors)
        extra = own * (self.ema is not None)
        if self.accumulate > 1:  # gradients of all blocks
            extra += sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)
        factory = self._factory
        if isinstance(factory, LocalOptimizer):
            inner = next(o for o in factory.blocks if o is not None)
            kind, options = type(inner), {k: v for k, v in inner.defaults.items() if k not in _UNSAVED}
            factory = lambda named: kind(named, **options)  # noqa: E731
        return find_batch_size(self.engine, factory, batch, budget=budget, largest=largest, extra=extra)

    # --- save and resume ---------------------------------------------------------------------------------------------

    def save(self, path: str | Path | None = None) -> Path:
        """Writes a checkpoint: the whole state of the run into ``folder``, or backbone and heads into the file ``path``.

        Steps in flight are completed first, and callbacks hear of them.

        Raises:
            ArgumentError: there is no ``folder`` and no ``path``.
            CheckpointError: it cannot be written.
            NonFiniteError: of a step in flight.
        """
        if self._settle() and self._bar is None:  # a fit has closed them
            self._logs.close()
        if path is not None:
            checkpoint.save(path, self.model, {"epoch": self.epoch, "step": self.engine.steps})
            return Path(path)
        if self.folder is None:
            raise ArgumentError("path: this trainer has no folder; give the path of a file")
        return self._checkpoints().save(self.seen, self.model, self.engine, self._state(), self._last_metric())

    def resume(self, path: str | Path | None = None, *, best: bool = False) -> Loaded:
        """Loads a checkpoint of a run: its newest whole one, or the best.

        Args:
            path: the run's folder, or one of its checkpoints (``.../step-00000100``); by default this trainer's ``folder``.
                With another ``folder`` of its own, `fit` branches off and begins new logs there.
            best: the one with the best metric. To use it; to go on from it, copy it to a new folder first.

        Raises:
            CheckpointError: there is none, none is whole, or it belongs to another model, method or optimizer.
            ArgumentError: neither ``path`` nor ``folder`` is given.
        """
        if path is None and (self.folder is None or str(self.folder) == "auto"):
            raise ArgumentError("path: this trainer has no folder yet; give the folder of a run")
        where = Path(path) if path is not None else self.folder
        assert where is not None
        step = None
        if where.name.startswith("step-") and where.name[5:].isdigit():
            step, where = int(where.name[5:]), where.parent
        if where.name != "checkpoints":
            where /= "checkpoints"
        if str(self.folder) == "auto":  # the run goes on where it was
            self.folder, self._store = where.parent, None
        store = CheckpointStore(where, better=self._better())
        if best:
            ranked = [s for s in store.list() if s.metric is not None and not math.isnan(s.metric)]
            if not ranked:
                raise CheckpointError(
                    f"best: no checkpoint in {where} has a metric; validate in fit, or take the newest"
                )
            sign = 1 if self._better() == "higher" else -1
            step = max(ranked, key=lambda s: (sign * (s.metric or 0.0), s.step)).step
        loaded = store.load(self.model, self.engine, step)
        self._load(loaded.extra)
        self._own = self.folder is not None and where.resolve() == (self.folder / "checkpoints").resolve()
        return loaded

    def _state(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "seen": self.seen,
            "total": self._total,
            "rows": self._rows,
            "history": self.history,
            "scheduler": None if self._scheduler is None else self._scheduler.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "callbacks": self.callbacks.state_dict(),
            "logs": self._logs.state(),
            "recalibrated": self._recalibrated,
            "run": self._run,
            "where": self._where(),
        }

    def _load(self, state: dict[str, Any]) -> None:
        if (state["ema"] is None) != (self.ema is None):
            have, lack = ("no", "one") if state["ema"] is None else ("an", "none")
            raise CheckpointError(
                f"ema: the checkpoint has {have} average, this trainer {lack}; make it as that one was"
            )
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.callbacks.load_state_dict(state["callbacks"])
        self.epoch, self.batch, self.seen = state["epoch"], state["batch"], state["seen"]
        total = state["total"]
        self._total = None if total is None else total.to(self.engine.device)
        self._rows, self.history = state["rows"], state["history"]
        self._recalibrated = state["recalibrated"]
        self._given.clear()
        self._outputs.clear()
        self._resumed = state

    def _save(self, metric: float | None = None) -> None:
        """Where a run must go on: a full disk is no reason to lose it."""
        if self.folder is None:
            return
        self._settle()
        try:
            self._checkpoints().save(self.seen, self.model, self.engine, self._state(), metric)
        except CheckpointError as error:
            warnings.warn(f"training goes on without this checkpoint: {error}", RuntimeWarning, stacklevel=2)

    def _checkpoints(self) -> CheckpointStore:
        assert self.folder is not None
        if self._store is None:
            self._store = CheckpointStore(
                self.folder / "checkpoints", self.keep_last, self.keep_best, better=self._better()
            )
        return self._store

    # --- beginning ---------------------------------------------------------------------------------------------------

    def _open(self, source: Source, test: Source | None, epochs: int, limit: int | None, resume: bool) -> None:
        """Resumes if asked, compares the run with the resumed one, opens the logs."""
        if resume and (self.folder is None or str(self.folder) == "auto") and self._resumed is None:
            raise ArgumentError("resume: there is no folder to resume from; make the Trainer with folder= of the run")
        if self.folder is not None and str(self.folder) == "auto":
            self.folder = _new_folder(self.model.method.name)
            self._store = None
        self._run = {
            "data": source.describe(),
            "limit": limit,
            "seed": self.seed,
            "accumulate": self.accumulate,
            "mixing": None if self.mixing is None else self.mixing.describe(),
            "epochs": epochs if self._scheduler_spec is not None else None,
        }
        self._config = resolved(self, source, test, epochs, limit)
        if self.monitor is not None and self.monitor not in (names := self._columns(test)):
            raise ArgumentError(
                f"monitor: the epochs' rows have no {self.monitor!r}. {did_you_mean(self.monitor, names)}"
            )
        if self.folder is not None:
            there = self._checkpoints().latest() is not None
            if resume and there and self._resumed is None:
                self.resume()
            elif there and self._resumed is None and not self._opened:
                raise ArgumentError(
                    f"folder: {self.folder} holds a run already; pass resume=True to go on with it, or name another folder"
                )
        if self._resumed is not None:
            for key, value in self._resumed["run"].items():
                if self._run[key] != value:
                    raise ArgumentError(
                        f"resume: the run was trained with {key} {value!r}, now it is {self._run[key]!r}; a resumed run goes on as it "
                        "began. Load the weights alone with fastlocal.trainer.load to begin a new one"
                    )
            changed = {k: (v, self._where()[k]) for k, v in self._resumed["where"].items() if self._where()[k] != v}
            if changed:
                what = ", ".join(f"{key} was {old}, is {new}" for key, (old, new) in changed.items())
                warnings.warn(
                    f"the run goes on, but its numbers may differ in the last bits: {what}",
                    RuntimeWarning,
                    stacklevel=3,
                )
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_config(self.folder, self._config)
        self._logs = Loggers(self._loggers(self._resumed is not None or self._opened, resume))
        if self._resumed is not None and self._own:  # a run that branches off into another folder begins its own logs
            self._logs.rewind(self._resumed["logs"])
        self._opened = True

    def _loggers(self, goes_on: bool, resume: bool) -> list[Any]:
        if self.fast_dev_run:
            return []
        own: list[Any] = []
        if self.folder is not None:  # asked to resume, but killed before the first checkpoint: its rows are void
            own.append(CSVLogger(self.folder, resume=goes_on, overwrite=resume and not goes_on))
        for logger in self.loggers:
            if logger == "tensorboard":
                own.append(TensorBoardLogger((self.folder or Path("runs")) / "tensorboard"))
            elif logger == "wandb":
                own.append(WandbLogger(folder=self.folder))
            else:
                own.append(logger)
        return own

    def _where(self) -> dict[str, Any]:
        """What bitwise equal numbers depend on besides the run itself."""
        device = self.engine.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        threads = torch.get_num_threads()
        with self.engine._threads():  # those of an operator where blocks run side by side
            own = torch.get_num_threads()
        return {"device": name, "threads": threads, "threads of an operator": own, "torch": str(torch.__version__)}

    def _set_schedule(self, epochs: int, length: int | None) -> None:
        if self._scheduler is None:
            steps = math.ceil((length or 1) / self.accumulate)
            self._scheduler = schedule_module.make(
                self._scheduler_spec, self.engine.optimizer, epochs=epochs, steps_per_epoch=steps
            )
            self._planned = epochs
        elif self._scheduler_spec is not None and epochs != self._planned:
            raise ArgumentError(
                f"epochs: the schedule was made for {self._planned}, got {epochs}; use that number, or a new Trainer"
            )
        if self._resumed is not None:
            self._scheduler.load_state_dict(self._resumed["scheduler"])
            self._resumed = None

    # --- pieces ------------------------------------------------------------------------------------------------------

    def _ready(self, batch: Any, epoch: int, index: int) -> Any:
        """On the model's device, and mixed."""
        device = self.engine.device
        batch = pytree.tree_map(lambda t: t.to(device, non_blocking=True) if isinstance(t, Tensor) else t, batch)
        if self.mixing is None:
            return batch
        if not (isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[0], Tensor)):
            raise ArgumentError(f"mixing: needs batches (x, y), got {type(batch).__name__}; leave mixing out")
        return self.mixing(batch[0], batch[1], self.model.num_classes, epoch, index)

    def _step_row(self, out: StepOutput, given: _Given) -> dict[str, Any]:
        losses = out.losses.tolist()
        return {
            "step": given.step + 1,
            "epoch": self.epoch,
            "lr": given.lr,
            "skipped": int(self._skipped(out).sum()),
            **{f"loss_{k}": value for k, value in enumerate(losses)},
        }

    def _skipped(self, out: StepOutput | None) -> Tensor:
        """Per block, the updates left out so far; of a pipeline, as of this step."""
        counts = None if out is None else out.skipped
        return self.engine.skipped if counts is None else counts

    def _note_skips(self, step: int, out: StepOutput | None = None) -> None:
        """Shows them, and under nonfinite="skip" and "stop" writes out the batch of ``step`` where there are new ones."""
        skipped = self._skipped(out).tolist()
        if self._bar is not None:
            self._bar.skipped = skipped
        total = sum(skipped)
        engine, source = self.engine, self._source
        if total > self._counted and engine.nonfinite != "raise" and engine.device.type == "cpu" and source is not None:
            self._dump(step, f"{int(total - self._counted)} block updates were skipped", source)
        self._counted = total

    def _dump(self, step: int, reason: str, source: Source) -> None:
        """The batches of a step, made again from their place in the data."""
        place = next(((e, b) for s, e, b in self._places if s == step), None)
        if self.folder is None or place is None or self._dumped >= _DUMPS:
            return
        epoch, first = place
        self._dumped += 1
        group = islice(source.epoch(epoch, first), self.accumulate)
        batches = [self._ready(batch, epoch, first + i) for i, batch in enumerate(group)]
        dump(
            self.folder / "nonfinite" / f"step-{step:08d}", batches, step=step, epoch=epoch, batch=first, reason=reason
        )

    def _metric(self, row: dict[str, Any]) -> float | None:
        if self.monitor is not None:
            return row[self.monitor]
        return row.get("val_accuracy")

    def _last_metric(self) -> float | None:
        return self._metric(self.history[-1]) if self.history and not self.batch else None

    def _better(self) -> Literal["higher", "lower"]:
        return "lower" if self.monitor is not None and "loss" in self.monitor else "higher"

    def _time(self, what: str, begin: float, rows: int) -> None:
        if self.engine.device.type == "cuda":
            torch.cuda.synchronize(self.engine.device)
        seconds = time.perf_counter() - begin
        self._logs.timing(
            {
                "epoch": self.epoch,
                "part": what,
                "seconds": seconds,
                "samples": rows,
                "samples_per_second": rows / seconds,
                "peak_bytes": peak_bytes(self.engine.device),
            }
        )


class _Watched(Source):
    """A source that gives no further batch once a signal has come."""

    def __init__(self, inner: Source, signals: Signals):
        self.inner, self.signals = inner, signals

    def epoch(self, number: int, start: int = 0) -> Iterator[Any]:
        for batch in self.inner.epoch(number, start):
            self.signals.check()
            yield batch

    def __len__(self) -> int:
        return len(self.inner)

    def describe(self) -> dict[str, Any]:
        return self.inner.describe()


def _rows(batch: Any) -> int:
    x = first_tensor(batch)
    return 0 if x is None else len(x)


def _least(*numbers: int | None) -> int | None:
    return min((n for n in numbers if n is not None), default=None)


def _integer(name: str, value: Any, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ArgumentError(f"{name}: got {value!r}; give an integer from {low}")


def _new_folder(name: str) -> Path:
    base = Path("runs")
    number = 1
    while (base / f"{name}-{number}").exists():
        number += 1
    return base / f"{name}-{number}"
