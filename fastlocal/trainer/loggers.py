"""Where a training's numbers go: CSV files that survive a kill and can be rewound; TensorBoard and W&B where installed."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastlocal.errors import ArgumentError, BackendError

METRICS, STEPS, TIMING = "metrics.csv", "steps.csv", "timing.csv"
Row = Mapping[str, Any]
"""Column to number, text or None."""


class Logger:
    """Base of loggers: every method may be overridden, none must. `Loggers` calls them; any object with them will do."""

    def start(self, config: dict[str, Any]) -> None:
        """Before the first row, with the resolved configuration."""

    def epoch(self, row: Row) -> None:
        """After an epoch."""

    def step(self, row: Row) -> None:
        """After a step, every so many."""

    def timing(self, row: Row) -> None:
        """Wall times, memory: what is another number in another run."""

    def close(self) -> None:
        """After the last row."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must remember, JSON-able; `rewind` takes it."""
        return {}

    def rewind(self, state: dict[str, Any]) -> None:
        """Forgets what was logged after ``state`` was taken."""


class CSVLogger(Logger):
    """``metrics.csv`` (a row an epoch), ``steps.csv`` and ``timing.csv`` in a folder, which is made at the first row.

    The first row of a file decides its columns; a later row may leave some empty, but not bring new ones. Floats are
    written with as many digits as bring them back exactly. A row is one write, so that a killed training leaves whole
    lines, or a torn last one, which `rewind` (and opening with ``resume``) repairs.

    Args:
        folder: of the files.
        resume: go on with the files that are there.
        overwrite: delete them.

    Raises:
        ArgumentError: the folder holds logs, and neither was asked for.
        OSError: a row cannot be written (disk full, read-only); the file keeps its whole lines.
    """

    def __init__(self, folder: str | Path, *, resume: bool = False, overwrite: bool = False):
        self.folder = Path(folder)
        self._columns: dict[str, list[str]] = {}
        for name in (METRICS, STEPS, TIMING):
            path = self.folder / name
            if not path.exists() or (not path.stat().st_size and not overwrite):
                continue
            if resume:
                _cut_torn_line(path)
            elif overwrite:
                path.unlink()
            else:
                raise ArgumentError(
                    f"folder: {self.folder} holds {name} of another training; resume it (CSVLogger(..., resume=True)), "
                    "overwrite it (overwrite=True), or take another folder"
                )

    def epoch(self, row: Row) -> None:
        self._write(METRICS, row)

    def step(self, row: Row) -> None:
        self._write(STEPS, row)

    def timing(self, row: Row) -> None:
        self._write(TIMING, row)

    def state(self) -> dict[str, int]:
        """Length in bytes of ``metrics.csv`` and ``steps.csv``, which are on the disk then. ``timing.csv`` is no part."""
        return {name: _synced_size(self.folder / name) for name in (METRICS, STEPS)}

    def rewind(self, state: dict[str, Any]) -> None:
        """Cuts ``metrics.csv`` and ``steps.csv`` to what `state` returned (0 for one that it does not name).

        Warns:
            RuntimeWarning: a file is shorter than that, or no line ends there; its whole lines are kept.
        """
        for name in (METRICS, STEPS, TIMING):
            path = self.folder / name
            self._columns.pop(name, None)
            if path.exists():
                _cut_torn_line(path)
            if name == TIMING:
                continue
            length, found = int(state.get(name, 0)), path.stat().st_size if path.exists() else 0
            if found < length:
                warnings.warn(
                    f"{path} has {found} bytes, but had {length} when the checkpoint was saved: rows are missing; "
                    "the rest is kept",
                    RuntimeWarning,
                    stacklevel=2,
                )
            elif found > length:
                os.truncate(path, length)
                if _cut_torn_line(path):
                    warnings.warn(
                        f"{path}: no line ends at byte {length}, where the checkpoint was saved, so it was changed since; "
                        "the row that was cut is gone",
                        RuntimeWarning,
                        stacklevel=2,
                    )

    def _write(self, name: str, row: Row) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        # Opened for each row: nothing to lose at a kill or a fork, and a file that was deleted gets its header again.
        with open(self.folder / name, "a+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            columns = self._columns.get(name) or (_header(self.folder / name) if size else list(row))
            new = [key for key in row if key not in columns]
            if new:
                raise ArgumentError(
                    f"row: {name} has no column {new[0]!r}; its first row decides the columns ({', '.join(columns)}), so give "
                    "this one a value there, or None"
                )
            text = "" if size else _line(columns)
            data = (text + _line([_cell(row.get(key)) for key in columns])).encode()
            try:
                if file.write(data) != len(data):
                    raise OSError(28, f"no space left for a row of {self.folder / name}")
            except OSError:
                with suppress(OSError):
                    file.truncate(size)
                raise
            self._columns[name] = columns


def _cell(value: Any) -> str:
    if hasattr(value, "item"):  # a tensor or NumPy number
        value = value.item()
    if value is None:
        return ""
    return repr(value) if isinstance(value, float) else str(value).replace("\n", " ")  # a row is a line


def _line(cells: list[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def _header(path: Path) -> list[str]:
    with open(path, newline="") as file:
        return next(csv.reader(file), [])


def _synced_size(path: Path) -> int:
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return file.seek(0, os.SEEK_END)


def _cut_torn_line(path: Path) -> bool:
    """Truncates to the last line that is whole; whether there was something to cut."""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
    return whole < len(data)


# --- optional packages -----------------------------------------------------------------------------------------------


def scalars(row: Row) -> dict[str, float]:
    """The numbers of a row under the names that dashboards show: ``val_loss_3`` becomes ``block/3/val_loss``."""
    named: dict[str, float] = {}
    for key, value in row.items():
        if hasattr(value, "item"):
            value = value.item()
        if isinstance(value, int | float):
            block = re.fullmatch(r"(.+)_(\d+)", key)
            named[f"block/{block[2]}/{block[1]}" if block else key] = float(value)
    return named


class TensorBoardLogger(Logger):
    """Scalars for TensorBoard: ``block/{k}/loss`` of steps, ``epoch/block/{k}/val_loss`` of epochs, ``timing/...``.

    The horizontal axis is the row's ``step``; rows without one stand at the last step that was seen. A rewound training
    hides what was logged after the checkpoint.

    Args:
        folder: of the event files.

    Raises:
        BackendError: the package tensorboard is missing.
    """

    def __init__(self, folder: str | Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise BackendError(
                f"TensorBoardLogger: needs the package tensorboard ({error}); pip install tensorboard, or leave the logger out"
            ) from error
        self.folder = Path(folder)
        self._make = SummaryWriter
        self._writer: Any = None
        self._at = 0
        self._purge: int | None = None

    def start(self, config: dict[str, Any]) -> None:
        text = json.dumps(config, indent=2, default=str)
        self._open().add_text("config", f"```\n{text}\n```", self._at)

    def epoch(self, row: Row) -> None:
        self._write("epoch/", row)
        self._open().flush()

    def step(self, row: Row) -> None:
        self._write("", row)

    def timing(self, row: Row) -> None:
        self._write("timing/", row)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def state(self) -> dict[str, int]:
        """The last step that was logged."""
        return {"step": self._at}

    def rewind(self, state: dict[str, Any]) -> None:
        self.close()
        self._at = int(state.get("step", 0))
        self._purge = self._at + 1

    def _open(self) -> Any:
        if self._writer is None:
            self._writer = self._make(str(self.folder), purge_step=self._purge)
            self._purge = None
        return self._writer

    def _write(self, prefix: str, row: Row) -> None:
        values = scalars(row)
        self._at = max(self._at, int(values.pop("step", self._at)))
        for name, value in values.items():
            self._open().add_scalar(prefix + name, value, self._at)


class WandbLogger(Logger):
    """A run of Weights & Biases, with the names of `TensorBoardLogger`. The horizontal axis is the row's ``step``.

    A resumed training goes on with the same run: by ``run_id``, or by the one that is kept in ``folder/wandb-run.txt``.
    W&B cannot take rows back, so those between checkpoint and kill are there twice.

    Args:
        project: of W&B.
        folder: for W&B's files and the run's id.
        run_id: of the run to start or to go on with.
        options: of ``wandb.init``, such as ``name`` or ``mode="offline"``.

    Raises:
        BackendError: the package wandb is missing.
    """

    def __init__(
        self, project: str | None = None, *, folder: str | Path | None = None, run_id: str | None = None, **options: Any
    ):
        try:
            import wandb
        except ImportError as error:
            raise BackendError(
                f"WandbLogger: needs the package wandb ({error}); pip install wandb, or leave the logger out"
            ) from error
        self._init = wandb.init
        self.project, self.run_id, self.options = project, run_id, options
        self.folder = None if folder is None else Path(folder)
        self._run: Any = None

    def start(self, config: dict[str, Any]) -> None:
        note = None if self.folder is None else self.folder / "wandb-run.txt"
        if self.run_id is None and note is not None and note.exists():
            self.run_id = note.read_text().strip() or None
        options = dict(self.options)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            options.setdefault("dir", str(self.folder))
        self._run = self._init(project=self.project, id=self.run_id, resume="allow", config=config, **options)
        self._run.define_metric("*", step_metric="step")  # W&B's own counter refuses to go back
        self.run_id = self._run.id
        if note is not None:
            note.write_text(f"{self.run_id}\n")

    def epoch(self, row: Row) -> None:
        self._log("epoch/", row)

    def step(self, row: Row) -> None:
        self._log("", row)

    def timing(self, row: Row) -> None:
        self._log("timing/", row)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None

    def _log(self, prefix: str, row: Row) -> None:
        if self._run is None:
            self.start({})
        self._run.log({name if name == "step" else prefix + name: value for name, value in scalars(row).items()})


# --- all of them -----------------------------------------------------------------------------------------------------


class Loggers:
    """Hands every call to every logger. One that raises is closed, warned about once and left out: training goes on.

    Raises:
        ArgumentError: something that is no logger.

    Warns:
        RuntimeWarning: a logger failed.
    """

    def __init__(self, loggers: Iterable[Any] = ()):
        self._all = list(loggers)
        for logger in self._all:
            lacking = [n for n in ("start", "epoch", "step", "close") if not callable(getattr(logger, n, None))]
            if lacking or isinstance(logger, type):
                raise ArgumentError(
                    f"loggers: {logger!r} is no logger{f', it has no {lacking[0]}()' if lacking else ''}; give CSVLogger(folder), "
                    "or an object with start, epoch, step and close"
                )
        self._alive = list(self._all)

    def start(self, config: dict[str, Any]) -> None:
        self._call("start", config)

    def epoch(self, row: Row) -> None:
        self._call("epoch", row)

    def step(self, row: Row) -> None:
        self._call("step", row)

    def timing(self, row: Row) -> None:
        self._call("timing", row)

    def close(self) -> None:
        self._call("close")

    def state(self) -> dict[str, dict[str, Any]]:
        """States by class name, JSON-able. Also of a logger that was left out: what it has written is still there."""
        found: dict[str, dict[str, Any]] = {}
        for name, logger in self._named():
            if hasattr(logger, "state"):
                with self._guarded(logger, "state"):
                    state = logger.state()
                    if state:
                        found[name] = state
        return found

    def rewind(self, state: dict[str, dict[str, Any]]) -> None:
        """Gives every logger back its own state; one that ``state`` does not know is left as it is."""
        for name, logger in self._named():
            if name in state and hasattr(logger, "rewind"):
                with self._guarded(logger, "rewind"):
                    logger.rewind(state[name])

    def __iter__(self) -> Iterator[Any]:
        """Those that still work."""
        return iter(self._alive)

    def __len__(self) -> int:
        return len(self._alive)

    def _named(self) -> list[tuple[str, Any]]:
        """``CSVLogger``, and ``CSVLogger#2`` for a second one of a class."""
        seen: dict[str, int] = {}
        named = []
        for logger in self._all:
            kind = type(logger).__name__
            seen[kind] = seen.get(kind, 0) + 1
            named.append((kind if seen[kind] == 1 else f"{kind}#{seen[kind]}", logger))
        return named

    def _call(self, method: str, *args: Any) -> None:
        for logger in list(self._alive):
            function = getattr(logger, method, None)  # timing() is not asked of a logger
            if function is not None:
                with self._guarded(logger, method):
                    function(*args)

    @contextmanager
    def _guarded(self, logger: Any, method: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # an interruption passes
            self._drop(logger, method, error)

    def _drop(self, logger: Any, method: str, error: Exception) -> None:
        if not any(logger is other for other in self._alive):
            return
        self._alive = [other for other in self._alive if other is not logger]
        if method != "close":
            with suppress(Exception):
                logger.close()
        warnings.warn(
            f"{type(logger).__name__}.{method}() failed ({type(error).__name__}: {error}); it is left out from here on, "
            "training goes on",
            RuntimeWarning,
            stacklevel=2,
        )
