"""Reads the pickles of CIFAR's Python version, in which nothing but containers, numbers, text and uint8 arrays may stand."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from fastlocal.errors import ArgumentError


def load(path: Path) -> Any:
    """The content of a pickle of bytes, str, numbers, lists, dicts and uint8 arrays; NumPy's own code is not run.

    Raises:
        ArgumentError: it asks for anything else by name, which is then not even imported; or it is damaged.
    """
    try:
        with open(path, "rb") as file:
            return _plain(_Unpickler(file, encoding="bytes").load())
    except _Refused as error:
        raise ArgumentError(
            f"root: {path} is a pickle that asks for {error}, which no file of CIFAR does and which could run code; it was not "
            "loaded. Get the file again from its home page, or use the binary version"
        ) from error
    except Exception as error:  # a damaged pickle fails in any way whatever
        raise ArgumentError(
            f"root: {path} is not what its name says: it cannot be read as a pickle ({type(error).__name__}: {error}); it may be "
            "cut short, get it again"
        ) from error


class _Refused(Exception):
    pass


class _DType:
    """Stands for numpy.dtype: knows its code alone."""

    def __init__(self, code: Any, *_: Any):
        if code not in ("u1", b"u1"):
            raise _Refused(f"arrays of dtype {code!r}")

    def __setstate__(self, state: Any) -> None:
        pass  # byte order and the like, which a byte has not


class _Array:
    """Stands for numpy.ndarray until its bytes are there."""

    value: Any = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        if type(dtype) is not _DType or type(raw) is not bytes:
            raise _Refused("arrays that do not hold bytes")
        self.value = np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran else "C")


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _encode(text: str, encoding: Any) -> bytes:
    if encoding not in ("latin1", b"latin1"):
        raise _Refused(f"the codec {encoding!r}")
    return text.encode("latin1")


_ALLOWED = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("_codecs", "encode"): _encode,  # how Python 3 writes bytes for Python 2
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise _Refused(f"{module}.{name}")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused("objects outside itself")


def _plain(found: Any) -> Any:
    if type(found) is not dict:
        return found
    return {key: value.value if type(value) is _Array else value for key, value in found.items()}
