"""Checkpoints of a `LocalModel`: one safetensors file, tensors with a JSON description in its header. No pickle.

The file is written beside its place, synced, and then renamed, so a reader finds the old one or the new one, never half
of one. The header holds a SHA-256 of itself and of every tensor, which `read` verifies.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fastlocal._version import __version__
from fastlocal.engine.model import LocalModel
from fastlocal.errors import ArgumentError, CheckpointError
from fastlocal.trainer import _files

_KEY, _FORMAT = "fastlocal", 2


@dataclass(frozen=True)
class Checkpoint:
    """What `read` finds in a file.

    Attributes:
        tensors: ``state_dict`` of the LocalModel, ``backbone.*`` and ``heads.{k}.*``, on the CPU.
        about: version, method, mode, options, names of the blocks' last units, number of classes.
        extra: what the caller gave to `save`.
    """

    tensors: dict[str, Tensor]
    about: dict[str, Any]
    extra: dict[str, Any]

    def backbone(self) -> dict[str, Tensor]:
        """The backbone's own ``state_dict``, for the plain network."""
        prefix = "backbone."
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}


def save(path: str | Path, model: LocalModel, extra: dict[str, Any] | None = None) -> None:
    """Writes backbone and heads.

    Args:
        extra: anything that JSON can hold, such as the resolved configuration.

    Raises:
        ArgumentError: ``extra`` is not JSON.
        CheckpointError: the file cannot be written; an older file at ``path`` is still whole then.
    """
    tensors, metadata = pack(model, extra)
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _files.write_tensors(aside, tensors, metadata)
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
        _files.sync(path.parent)
    except OSError as error:
        raise CheckpointError(f"path: {path} cannot be written ({error}); {_files.remedy(error)}") from error


def pack(model: LocalModel, extra: dict[str, Any] | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `save` writes: contiguous copies of the tensors on the CPU, and the metadata of the header.

    Raises:
        ArgumentError: ``extra`` is not JSON.
    """
    tensors: dict[str, Tensor] = {}
    same: dict[str, str] = {}  # the format holds each tensor once, so a tied name points to the first one
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and key in first:
            same[name] = first[key]
        else:
            first[key] = name
            tensors[name] = _files.to_host(tensor)
    header = {
        "format": _FORMAT,
        "version": __version__,
        "about": describe(model),
        "same": same,
        "extra": extra or {},
        "tensors": {name: _files.about(t) for name, t in tensors.items()},
    }
    try:
        return tensors, {_KEY: _files.seal(header).decode()}
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"extra: {error}; give what JSON can hold") from error


def read(path: str | Path) -> Checkpoint:
    """Reads a file that `save` wrote, and verifies its digests.

    Raises:
        CheckpointError: it is missing, truncated, changed, no safetensors file, or not written by this version.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"path: there is no file {str(path)!r}")
    try:
        text = _files.read_metadata(path).get(_KEY, "null")
        header = json.loads(text)
        if not isinstance(header, dict) or header.get("format") != _FORMAT:
            what = f"of format {header.get('format')!r}" if isinstance(header, dict) else "without its header"
            raise CheckpointError(
                f"path: {path} is a safetensors file, but not a checkpoint of this version of fastlocal (it is {what}, not "
                f"{_FORMAT}); load its tensors with safetensors.torch.load_file"
            )
        header = _files.unseal(text.encode())
        tensors = _files.read_tensors(path)
        bad = _files.differing(tensors, header["tensors"])
    except _files.UNREADABLE as error:
        raise CheckpointError(
            f"path: {path} is truncated or no checkpoint of fastlocal ({error}); use an older one, or save it anew"
        ) from error
    if bad:
        more = f" and {len(bad) - 1} more" if bad[1:] else ""
        raise CheckpointError(
            f"path: {path} is damaged in tensor {bad[0]}{more} (its digest differs); use an older one, or save it anew"
        )
    tensors |= {name: tensors[target] for name, target in header["same"].items()}
    return Checkpoint(tensors, header["about"], header["extra"])


def load(path: str | Path, model: LocalModel) -> dict[str, Any]:
    """Copies a checkpoint's backbone and heads into ``model``; returns the ``extra`` it was saved with.

    Raises:
        CheckpointError: see `read`; or it comes from another method, other options, cuts or shapes. Nothing has been
            changed then.
    """
    found = read(path)
    check(path, found, model)
    model.load_state_dict(found.tensors)
    return found.extra


def check(path: str | Path, found: Checkpoint, model: LocalModel) -> None:
    """Raises CheckpointError unless ``found``, read from ``path``, fits ``model``; see `load`."""
    own = describe(model)
    for key, value in own.items():
        if found.about.get(key) != value:
            raise CheckpointError(
                f"path: {path} has {key} {found.about.get(key)!r}, the model {value!r}; localize it as the checkpoint was, or "
                "take the network alone with read(path).backbone()"
            )
    state = model.state_dict()
    for name in sorted(state.keys() | found.tensors.keys()):
        here, there = state.get(name), found.tensors.get(name)
        if here is None or there is None:
            raise CheckpointError(
                f"path: {path} {'lacks' if there is None else 'has'} {name}, the model does not agree"
            )
        if here.shape != there.shape or here.dtype != there.dtype:
            raise CheckpointError(
                f"path: {name} is {there.dtype} {list(there.shape)} in {path}, {here.dtype} {list(here.shape)} in the model; "
                "make the network as the checkpoint's was"
            )


def match(path: Path, found: Checkpoint, model: LocalModel) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """For a checkpoint that was cut elsewhere: the state to load, the units whose heads it brings, what is left out, in words.

    Raises:
        CheckpointError: another method or number of classes, or the backbone does not fit.
    """
    own = describe(model)
    for key in ("method", "num_classes"):
        if found.about.get(key) != own[key]:
            raise CheckpointError(
                f"path: {path} has {key} {found.about.get(key)!r}, the model {own[key]!r}; take the network alone with "
                f"fastlocal.trainer.read({str(path)!r}).backbone()"
            )
    state = model.state_dict()

    def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

    def form(tensors: dict[str, Tensor]) -> dict[str, Any]:
        return {n: (t.dtype, list(t.shape)) for n, t in tensors.items()}

    here, there = form(part(state, "backbone.")), form(part(found.tensors, "backbone."))
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            raise CheckpointError(
                f"path: backbone.{name} is {there.get(name, 'missing')} in {path}, {here.get(name, 'missing')} in the model; make "
                "the network as the checkpoint's was"
            )
    state |= {name: t for name, t in found.tensors.items() if name.startswith("backbone.")}
    before, after = found.about["blocks"], own["blocks"]
    kept, left = [], []
    for k, unit in enumerate(after[:-1]):
        j = before[:-1].index(unit) if unit in before[:-1] else None
        if j is None:
            left.append(f"the head of block {k} ('{unit}') stays as it is: the checkpoint has none there")
            continue
        theirs = part(found.tensors, f"heads.{j}.")
        if form(theirs) != form(part(state, f"heads.{k}.")):
            left.append(f"the head of block {k} ('{unit}') stays as it is: the checkpoint's has other tensors")
            continue
        state |= {f"heads.{k}.{name}": t for name, t in theirs.items()}
        kept.append(unit)
    left += [
        f"the checkpoint's head {j} ('{u}') has no place" for j, u in enumerate(before[:-1]) if u not in after[:-1]
    ]
    left += [
        f"{key}: the checkpoint has {found.about.get(key)!r}, the model {own[key]!r}"
        for key in ("mode", "options")
        if found.about.get(key) != own[key]
    ]
    return state, kept, left


def describe(model: LocalModel) -> dict[str, Any]:
    """What must be equal for a checkpoint to fit: method, mode, options, cuts, number of classes."""
    return {
        "method": model.method.name,
        "mode": model.method.mode,
        "options": json.loads(json.dumps(vars(model.method.options), default=str)),
        "blocks": [block.name for block in model.blocks],
        "num_classes": model.num_classes,
    }
