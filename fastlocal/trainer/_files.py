"""What checkpoints are made of: values as JSON, tensors as safetensors, digests, and writes that reach the disk."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import re
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastlocal.errors import ArgumentError

_DTYPES = (
    *(
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.complex64,
    ),
    *(
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint64,
        torch.uint32,
        torch.uint16,
        torch.uint8,
        torch.bool,
    ),
)  # those that safetensors holds
_MARK = "~"  # the key that tells what is no plain JSON

UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""What reading a file that is not as it should be may raise."""


# --- values ----------------------------------------------------------------------------------------------------------


def encode(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """Strict JSON for ``value``; its tensors go to ``tensors``, copied. `decode` gives the same types back.

    Raises:
        ArgumentError: names the part that is not made of numbers, strings, None, tensors, dicts, lists and tuples.
    """
    if isinstance(value, (np.bool_, np.integer, np.floating)):
        value = value.item()
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {_MARK: "float", "value": str(float(value))}
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_meta or value.dtype not in _DTYPES:
            raise ArgumentError(
                f"{where}: cannot be saved, for it is a tensor of {value.layout} and {value.dtype} on {value.device.type}; give a "
                "dense one of an ordinary dtype"
            )
        name = where
        while name in tensors:
            name += "_"
        tensors[name] = to_host(value)
        return {_MARK: "tensor", "name": name}
    if type(value) is list:
        return [encode(v, f"{where}.{i}", tensors) for i, v in enumerate(value)]
    if type(value) is tuple:
        return {_MARK: "tuple", "items": [encode(v, f"{where}.{i}", tensors) for i, v in enumerate(value)]}
    if type(value) in (dict, OrderedDict, Counter):
        kind = "counter" if type(value) is Counter else "dict"
        if kind == "dict" and _MARK not in value and all(type(k) is str for k in value):
            return {k: encode(v, f"{where}.{k}", tensors) for k, v in value.items()}
        if all(isinstance(k, (str, int, float, type(None))) for k in value):
            items = [[encode(k, where, tensors), encode(v, f"{where}.{k}", tensors)] for k, v in value.items()]
            return {_MARK: kind, "items": items}
    raise ArgumentError(
        f"{where}: cannot be saved, for it is {type(value).__name__}; give numbers, strings, None, tensors, and dicts, lists "
        "and tuples of these"
    )


def decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """What `encode` was given. Tensors are those of ``tensors``, contiguous."""
    if isinstance(value, list):
        return [decode(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(_MARK)
    if kind is None:
        return {k: decode(v, tensors) for k, v in value.items()}
    if kind == "tensor":
        return tensors[value["name"]]
    if kind == "float":
        return float(value["value"])
    if kind == "tuple":
        return tuple(decode(v, tensors) for v in value["items"])
    items = {decode(k, tensors): decode(v, tensors) for k, v in value["items"]}
    return Counter(items) if kind == "counter" else items


def to_host(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU that shares memory with nothing."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    return plain.to("cpu", copy=True, memory_format=torch.contiguous_format)


# --- digests ---------------------------------------------------------------------------------------------------------


def about(tensor: Tensor) -> dict[str, Any]:
    """Dtype, shape and SHA-256 of a tensor's values."""
    digest = hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"dtype": dtype, "shape": list(tensor.shape), "sha256": digest.hexdigest()}


def differing(tensors: dict[str, Tensor], wanted: dict[str, Any]) -> list[str]:
    """Names of the tensors that are missing, not wanted, or not as ``wanted`` describes them."""
    changed = [name for name, want in wanted.items() if name not in tensors or about(tensors[name]) != want]
    return changed + [name for name in tensors if name not in wanted]


def measure(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def seal(content: dict[str, Any]) -> bytes:
    """JSON that holds its own SHA-256."""
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}).encode()


def unseal(raw: bytes) -> dict[str, Any]:
    """What `seal` was given. Raises one of `UNREADABLE`."""
    content = json.loads(raw)
    content.pop("sha256")
    if raw != seal(content):
        raise ValueError("it is not as it was written, its digest differs")
    return content


# --- the disk --------------------------------------------------------------------------------------------------------


def write_bytes(path: Path, content: bytes) -> dict[str, Any]:
    """Writes and syncs; returns what `measure` would."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes and syncs a safetensors file.

    Raises:
        OSError: with the operating system's number where the library tells it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error)) from error
    sync(path)


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file. Raises one of `UNREADABLE`."""
    with _opened(path) as file:
        return file.metadata() or {}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in memory of their own: what happens to the file later does not reach them.

    Raises one of `UNREADABLE`.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  (no mapping)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path.name}: {error}") from error


def sync(path: Path) -> None:
    """Makes a file, or the names in a folder, survive a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flock(handle: int, how: int) -> bool:
    """Whether the lock was got. A file system without locks (some network ones) has one writer, by the user's care."""
    try:
        fcntl.flock(handle, how)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN)
    return True


def remedy(error: OSError) -> str:
    """What to do about a write that failed."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space, keep fewer checkpoints, or write to another disk"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return "choose a folder that this process may write to"
    if error.errno == errno.EFBIG:
        return "raise the limit on the size of files (ulimit -f), or write to a file system that holds larger ones"
    return "look at the disk, or choose another folder"
