"""A folder of training states, to resume from: safetensors and JSON, a digest for every tensor and file. No pickle.

Each checkpoint is a folder ``step-00000012``. It is written under another name, synced to the disk and then renamed, so
one that bears this name is whole; its ``manifest.json``, written last, says what must be in it.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import random
import re
import secrets
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fastlocal._version import __version__
from fastlocal.engine.engine import Engine
from fastlocal.engine.model import LocalModel
from fastlocal.errors import ArgumentError, CheckpointError
from fastlocal.trainer import _files
from fastlocal.trainer import checkpoint as model_file

_FORMAT = 2
_MODEL, _STATE, _TREE, _MANIFEST = "model.safetensors", "state.safetensors", "state.json", "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")
_ASIDE = re.compile(r"\.(step-\d{8,})\.(new|old)-[0-9a-f]{8}")
_Folders = list[tuple[int, Path]]  # step and path; within the class, `list` is its method


@dataclass(frozen=True)
class Saved:
    """A checkpoint of a store: its step, its folder, and the metric it was saved with."""

    step: int
    path: Path
    metric: float | None


_Saved = list[Saved]


@dataclass(frozen=True)
class Loaded:
    """What `CheckpointStore.load` did.

    Attributes:
        step: of the checkpoint.
        extra: what it was saved with.
        path: its folder.
        skipped: newer checkpoints that are damaged, each with the reason, newest first.
        heads: names of the units whose auxiliary heads were loaded.
        left: with ``heads="match"``: what was not loaded, in words.
    """

    step: int
    extra: Any
    path: Path
    skipped: list[tuple[Path, str]] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


class _Damaged(Exception):
    """The reason why a checkpoint cannot be used; the loader goes on to an older one."""


@dataclass(frozen=True)
class _Content:
    """A checkpoint, read and verified."""

    model: model_file.Checkpoint
    tree: dict[str, Any]
    about: dict[str, Any] | None  # of the engine


class CheckpointStore:
    """Saves and loads whole training states in a folder.

    Several processes may save into one folder: writers take turns at its file lock, and what a killed one has left is
    removed at the next save.

    Args:
        folder: made at the first save.
        keep_last: how many of the newest to keep.
        keep_best: how many of those with the best metric to keep as well.
        better: ``"higher"`` or ``"lower"`` metrics are better. NaN is never among the best.

    Raises:
        ArgumentError: a value that is not one of these.
    """

    def __init__(
        self,
        folder: str | Path,
        keep_last: int = 3,
        keep_best: int = 1,
        *,
        better: Literal["higher", "lower"] = "higher",
    ):
        for name, value, low in (("keep_last", keep_last, 1), ("keep_best", keep_best, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ArgumentError(f"{name}: got {value!r}; give an integer from {low}")
        if better not in ("higher", "lower"):
            raise ArgumentError(f"better: got {better!r}; valid are 'higher', 'lower'")
        self.folder, self.keep_last, self.keep_best, self.better = Path(folder), keep_last, keep_best, better
        self._damaged: set[Path] = set()  # found so by load; they do not count as kept

    # --- what is there -----------------------------------------------------------------------------------------------

    def list(self) -> _Saved:
        """The checkpoints whose manifest is whole and whose files have the right sizes, oldest first. Reads no tensor."""
        self._recover()
        return self._whole()

    def latest(self) -> Saved | None:
        """The last of `list`, or None. Whether its tensors are whole is known once `load` has read them."""
        found = self.list()
        return found[-1] if found else None

    def _whole(self) -> _Saved:
        found = []
        for step, path in self._folders():
            with suppress(_Damaged):
                found.append(Saved(step, path, _read_manifest(path, step)["metric"]))
        return found

    def _folders(self) -> _Folders:
        if not self.folder.is_dir():
            return []
        matches = [(_NAME.fullmatch(path.name), path) for path in self.folder.iterdir()]
        return sorted((int(match[1]), path) for match, path in matches if match)

    # --- save --------------------------------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        model: LocalModel,
        engine: Engine | None = None,
        extra: Any = None,
        metric: float | None = None,
    ) -> Path:
        """Writes a checkpoint, then removes those that need not be kept. One of the same step is replaced.

        Args:
            step: orders the checkpoints. Those above ``step`` are left alone.
            model: backbone, heads and buffers are saved.
            engine: its step count, optimizer, loss scales, random streams and counters are saved. Steps in flight are
                completed first; ``engine.step`` or ``flush`` still return their outputs.
                The states of torch's, Python's and NumPy's global random generators are saved in any case.
            extra: position in the data, epoch, scheduler state: numbers, strings, None, tensors, and dicts, lists and
                tuples of these.
            metric: by which the best are kept.

        Returns:
            The folder of the checkpoint.

        Raises:
            ArgumentError: ``extra`` or an optimizer's state holds anything else, or ``engine`` trains another model.
            NonFiniteError: as ``engine.flush()``.
            CheckpointError: the disk is full, the folder cannot be written, or similar. What was written is removed, and
                the checkpoints that were there are untouched.
        """
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise ArgumentError(f"step: got {step!r}; give an integer from 0")
        if metric is not None and not isinstance(metric, (int, float)):
            raise ArgumentError(f"metric: got {type(metric).__name__}; give a number, such as tensor.item()")
        _check_engine(model, engine)
        if engine is not None:
            engine._settle()  # not flush: their outputs are not for this one
            engine._report()
        weights, metadata = model_file.pack(model)
        tensors: dict[str, Tensor] = {}
        tree: dict[str, Any] = {
            "extra": _files.encode(extra, "extra", tensors),
            "random": _files.encode(_random(), "random", tensors),
        }
        if engine is not None:
            tree["engine"] = _files.encode(engine.state_dict(), "engine", tensors)
        about = {"model": model_file.describe(model), "engine": None if engine is None else _describe(engine)}

        final = self.folder / f"step-{step:08d}"
        aside, hold = None, None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked():
                self._clean()
                aside = self._aside(final.name, "new")
                os.mkdir(aside)
                hold = os.open(aside, os.O_RDONLY)
                _files.flock(hold, fcntl.LOCK_EX)  # until it is renamed: a folder that nobody holds is a leftover
            files = {
                _MODEL: _write_tensors(aside / _MODEL, weights, metadata),
                _STATE: _write_tensors(aside / _STATE, tensors, {}),
                _TREE: _files.write_bytes(aside / _TREE, json.dumps(tree, allow_nan=False).encode()),
            }
            manifest = {
                "format": _FORMAT,
                "version": __version__,
                "step": step,
                "metric": _files.encode(None if metric is None else float(metric), "metric", {}),
                **about,
                "files": files,
            }
            _files.write_bytes(aside / _MANIFEST, _files.seal(manifest))
            os.fsync(hold)
            with self._locked():
                self._publish(aside, final)
        except OSError as error:
            raise CheckpointError(
                f"folder: the checkpoint of step {step} cannot be written to {self.folder} ({error}); {_files.remedy(error)}. The "
                "checkpoints that were there are untouched"
            ) from error
        finally:
            if aside is not None:
                shutil.rmtree(aside, ignore_errors=True)
            if hold is not None:
                os.close(hold)
        self._damaged.discard(final)
        try:
            with self._locked():
                self._retain(step)
        except OSError as error:
            warnings.warn(f"old checkpoints in {self.folder} cannot be removed: {error}", RuntimeWarning, stacklevel=2)
        return final

    @contextmanager
    def _locked(self) -> Iterator[None]:
        handle = os.open(self.folder, os.O_RDONLY)
        try:
            _files.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _aside(self, name: str, kind: str) -> Path:
        return self.folder / f".{name}.{kind}-{secrets.token_hex(4)}"

    def _recover(self) -> None:
        if self.folder.is_dir():
            with suppress(OSError), self._locked():  # a folder that may only be read is read as it is
                self._clean()

    def _clean(self) -> None:
        """Removes what a killed process has left; gives back a checkpoint that was about to be replaced."""
        for path in sorted(self.folder.iterdir()):
            match = _ASIDE.fullmatch(path.name)
            if match is None:
                continue
            with suppress(OSError):  # another user's stays
                self._clean_one(path, self.folder / match[1], match[2])

    def _clean_one(self, path: Path, final: Path, kind: str) -> None:
        handle = os.open(path, os.O_RDONLY)
        try:
            if not _files.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB):
                return
            if kind == "old" and not final.exists():
                os.rename(path, final)
            else:
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(handle)

    def _publish(self, aside: Path, final: Path) -> None:
        old = None
        if final.exists():
            old = self._aside(final.name, "old")
            os.rename(final, old)
        try:
            os.rename(aside, final)
            _files.sync(self.folder)
        except BaseException:
            with suppress(OSError):
                os.rename(final, aside)
            if old is not None:
                os.rename(old, final)
            raise
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)

    def _retain(self, step: int) -> None:
        whole = [saved for saved in self._whole() if saved.step <= step and saved.path not in self._damaged]
        last = whole[-self.keep_last :]
        if not last:  # another process has removed it already
            return
        sign = 1 if self.better == "higher" else -1
        ranked = sorted(
            (s for s in whole if s.metric is not None and not math.isnan(s.metric)),
            key=lambda s: (sign * s.metric, s.step),  # type: ignore[operator]
            reverse=True,
        )
        keep = {saved.path for saved in (*last, *ranked[: self.keep_best])}
        for number, path in self._folders():
            if path not in keep and number < last[0].step:
                gone = self._aside(path.name, "old")
                os.rename(path, gone)  # at once, so that no half of it is ever found under its name
                shutil.rmtree(gone, ignore_errors=True)

    # --- load --------------------------------------------------------------------------------------------------------

    def load(
        self,
        model: LocalModel,
        engine: Engine | None = None,
        step: int | None = None,
        *,
        heads: Literal["exact", "match"] = "exact",
    ) -> Loaded:
        """Loads the newest checkpoint that is whole, or that of ``step``. Everything is read and checked before anything changes.

        Args:
            model: gets backbone, heads and buffers.
            engine: gets its state; the global random generators are set as well. Without it they stay as they are.
            step: a certain checkpoint; then none other takes its place.
            heads: ``"exact"`` wants the same method, options, cuts and tensors. ``"match"`` takes a checkpoint that was
                cut elsewhere: the backbone must fit; a head is loaded where the checkpoint has one of the same shapes behind
                the same unit; the engine is loaded only if everything fits. ``Loaded.left`` names the rest.

        Returns:
            `Loaded`. If newer checkpoints are damaged, ``skipped`` lists them and a RuntimeWarning is given.

        Raises:
            ArgumentError: ``engine`` trains another model, or ``heads`` is neither.
            CheckpointError: no checkpoint is whole, or that of ``step`` is damaged: names file and, where known, tensor. Or
                it belongs to another method, model, engine or optimizer. Nothing has been changed then.
        """
        if heads not in ("exact", "match"):
            raise ArgumentError(f"heads: got {heads!r}; valid are 'exact', 'match'")
        _check_engine(model, engine)
        self._recover()
        folders = self._folders()[::-1]
        if step is not None:
            have = [number for number, _ in folders]
            folders = [entry for entry in folders if entry[0] == step]
            if not folders:
                raise CheckpointError(f"step: {self.folder} has no checkpoint of step {step!r}; it has {have[::-1]}")
        skipped: list[tuple[Path, str]] = []
        for number, path in folders:
            try:
                content = _read(path, number)
            except _Damaged as reason:
                if step is not None:
                    raise CheckpointError(
                        f"step: the checkpoint {path} is damaged: {reason}; load another step, or leave step out for the "
                        "newest that is whole"
                    ) from reason
                skipped.append((path, str(reason)))
                self._damaged.add(path)
                continue
            loaded = _apply(Loaded(number, None, path, skipped), content, model, engine, heads)
            if skipped:
                reasons = "; ".join(f"{p.name}: {reason}" for p, reason in skipped)
                warnings.warn(f"loaded {path}, for newer ones are damaged: {reasons}", RuntimeWarning, stacklevel=2)
            return loaded
        why = "; ".join(f"{p.name}: {reason}" for p, reason in skipped) or "it has none"
        raise CheckpointError(
            f"folder: no whole checkpoint in {self.folder}: {why}; restore one from a copy, or start from the beginning"
        )


# --- applying a checkpoint -------------------------------------------------------------------------------------------


def _apply(
    loaded: Loaded, content: _Content, model: LocalModel, engine: Engine | None, heads: Literal["exact", "match"]
) -> Loaded:
    path = loaded.path / _MODEL
    names = [block.name for block in model.blocks]
    state, kept = content.model.tensors, names[:-1]
    left: list[str] = []
    if heads == "exact":
        model_file.check(path, content.model, model)
    else:
        state, kept, left = model_file.match(path, content.model, model)
    engine_state = None
    if engine is not None and left:
        left.append("the engine's state, which belongs to all heads together")
    elif engine is not None:
        if content.about is None:
            raise CheckpointError(
                f"engine: {loaded.path} holds no engine's state; load the model alone, without engine="
            )
        for key, value in _describe(engine).items():
            if content.about.get(key) != value:
                raise CheckpointError(
                    f"engine: {loaded.path} has {key} {content.about.get(key)!r}, the engine {value!r}; make it as that one was, or "
                    "load the model alone, without engine="
                )
        engine_state = content.tree["engine"]
        _lay_out(engine_state["optimizer"], engine)
        try:
            engine.load_state_dict(engine_state)  # checks before it changes anything
        except ArgumentError as error:
            raise CheckpointError(f"engine: {loaded.path} does not fit: {error}") from error
    model.load_state_dict(state)
    if engine_state is not None:
        _set_random(content.tree["random"])
    return replace(loaded, extra=content.tree["extra"], heads=kept, left=left)


def _check_engine(model: LocalModel, engine: Engine | None) -> None:
    if engine is not None and engine.model is not model:
        raise ArgumentError("engine: trains another model than the one given; pass engine.model")


def _describe(engine: Engine) -> dict[str, Any]:
    """What must be equal for an engine's state to fit, besides what `Engine.load_state_dict` checks."""
    kinds = [None if o is None else type(o).__name__ for o in engine.optimizer.blocks]
    return {"deterministic": engine.deterministic, "optimizers": kinds}


def _lay_out(optimizer: dict[str, Any], engine: Engine) -> None:
    """Gives state tensors of a parameter's shape its strides too, which fused steps rely on and no file keeps."""
    params = [p for group in engine.optimizer.param_groups for p in group["params"]]
    numbers = [i for group in optimizer["param_groups"] for i in group["params"]]
    for number, param in zip(numbers, params):
        for key, value in optimizer["state"].get(number, {}).items():
            if isinstance(value, Tensor) and value.shape == param.shape and key != "step":
                optimizer["state"][number][key] = torch.empty_like(param, dtype=value.dtype).copy_(value).detach()


def _random() -> dict[str, Any]:
    """The global random generators' states."""
    numpy: dict[str, Any] = np.random.get_state(legacy=False)  # type: ignore[assignment]
    inner = {key: v.tolist() if isinstance(v, np.ndarray) else v for key, v in numpy["state"].items()}
    state = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": {**numpy, "state": inner}}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _set_random(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    if "cuda" in state and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


# --- files -----------------------------------------------------------------------------------------------------------


def _write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, Any]:
    """Writes and syncs; returns the manifest's entry."""
    _files.write_tensors(path, tensors, metadata)
    return {**_files.measure(path), "tensors": {name: _files.about(t) for name, t in sorted(tensors.items())}}


def _read_manifest(path: Path, step: int) -> dict[str, Any]:
    """The manifest, its own digest checked, of files that exist and have the right sizes."""
    try:
        manifest = _files.unseal((path / _MANIFEST).read_bytes())
        if manifest["format"] != _FORMAT:
            raise _Damaged(
                f"{_MANIFEST} is of format {manifest['format']!r}; this version of fastlocal reads {_FORMAT}"
            )
        if manifest["step"] != step:
            raise _Damaged(f"{_MANIFEST} is that of step {manifest['step']!r}; the folder was renamed")
        for name in (_MODEL, _STATE, _TREE):
            want, have = manifest["files"][name]["bytes"], (path / name).stat().st_size
            if want != have:
                raise _Damaged(f"{name} has {have} bytes instead of {want}")
        manifest["metric"] = _files.decode(manifest["metric"], {})
    except FileNotFoundError as error:
        raise _Damaged(f"{Path(error.filename).name} is missing") from error
    except OSError as error:
        raise _Damaged(f"it cannot be read ({error})") from error
    except _files.UNREADABLE as error:
        raise _Damaged(f"{_MANIFEST} is damaged or no manifest ({type(error).__name__}: {error})") from error
    return manifest


def _read(path: Path, step: int) -> _Content:
    """Reads a checkpoint and verifies every digest. Raises _Damaged."""
    manifest = _read_manifest(path, step)
    files = manifest["files"]
    try:
        for name in (_MODEL, _STATE, _TREE):
            if _files.measure(path / name)["sha256"] != files[name]["sha256"]:
                which = _where(path / name, files[name].get("tensors", {}))
                raise _Damaged(f"{name} is not as it was written (its digest differs){which}")
        # Once more, of what stands in memory now: a write that went wrong has a file's digest that fits.
        model = model_file.read(path / _MODEL)  # which has digests of its own
        tensors = _files.read_tensors(path / _STATE)
        if bad := _files.differing(tensors, files[_STATE]["tensors"]):
            raise _Damaged(f"{_STATE}: tensor {bad[0]} is not as it was saved (its digest differs)")
        tree = _files.decode(json.loads((path / _TREE).read_bytes()), tensors)
        return _Content(model, tree, manifest["engine"])
    except (CheckpointError, *_files.UNREADABLE) as error:
        raise _Damaged(f"it cannot be read ({error})") from error


def _where(path: Path, tensors: dict[str, Any]) -> str:
    """Which tensor of a damaged file differs, in words; empty for a file without tensors."""
    if not tensors:
        return ""
    try:
        bad = _files.differing(_files.read_tensors(path), tensors)
    except _files.UNREADABLE:
        return "; its header is unreadable, so all of its tensors are lost"
    if not bad:
        return "; in its header"
    return f", in tensor {bad[0]}" + (f" and {len(bad) - 1} more" if bad[1:] else "")
