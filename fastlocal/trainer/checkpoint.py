"""Checkpoints of a `LocalModel`: one safetensors file, tensors with a JSON description in its header. No pickle.

The file is written beside its place and then renamed, so a reader finds the old one or the new one, never half of one.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlocal._version import __version__
from fastlocal.engine.model import LocalModel
from fastlocal.errors import ArgumentError, CheckpointError

KEY, _FORMAT = "fastlocal", 1


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
        OSError: the file cannot be written; an older file at ``path`` is still whole then.
    """
    from safetensors.torch import save_file

    tensors, text = pack(model, extra)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, aside, metadata={KEY: text})
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def pack(model: LocalModel, extra: dict[str, Any] | None = None) -> tuple[dict[str, Tensor], str]:
    """What `save` writes: contiguous copies of the tensors on the CPU, and the text of the header.

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
            tensors[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    header = {"format": _FORMAT, "version": __version__, "about": describe(model), "same": same, "extra": extra or {}}
    try:
        return tensors, json.dumps(header)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"extra: {error}; give what JSON can hold") from error


def read(path: str | Path) -> Checkpoint:
    """Reads a file that `save` wrote.

    Raises:
        CheckpointError: it is missing, truncated, no safetensors file, or not written by fastlocal.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise CheckpointError(f"path: there is no file {str(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(KEY, "null"))
            if not isinstance(header, dict) or header.get("format") != _FORMAT:
                raise CheckpointError(
                    f"path: {path} is a safetensors file, but not a checkpoint of this version of fastlocal; load its "
                    "tensors with safetensors.torch.load_file"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"path: {path} is truncated or no checkpoint of fastlocal ({error}); use an older one, or save it anew"
        ) from error
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


def describe(model: LocalModel) -> dict[str, Any]:
    """What must be equal for a checkpoint to fit: method, mode, options, cuts, number of classes."""
    return {
        "method": model.method.name,
        "mode": model.method.mode,
        "options": json.loads(json.dumps(vars(model.method.options), default=str)),
        "blocks": [block.name for block in model.blocks],
        "num_classes": model.num_classes,
    }
