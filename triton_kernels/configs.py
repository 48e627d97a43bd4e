"""Launch configurations found by measurement: a JSON table for each device name, written by fastlocal.bench.tune.

A launcher asks `tuned` with the result of its own pure config function as the default, and gets the table's entry for
this device and these sizes, or the default back. Tables are read once. One that is malformed, or older than the kernels,
is left out with one warning: a step never fails for it. FASTLOCAL_TABLES=0 (before the first launch) leaves all out;
another value is a folder whose tables come first.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

HERE = Path(__file__).resolve().parent
FORMAT = 1

_log = logging.getLogger("fastlocal")
_Config = TypeVar("_Config", bound=tuple)  # a NamedTuple of numbers
_Key = tuple[tuple[str, int | str | bool], ...]
Question = tuple[str, dict[str, int | str | bool], Any]  # kernel, key and default of a call of `tuned`
# Not a context variable: autograd runs backward launches in threads of its own.
_forced: Mapping[str, Any] | None = None
_asked: list[Question] | None = None


class Entry(NamedTuple):
    """A line of a table: the configuration of a kernel at some sizes, and the default that it was measured against."""

    config: dict[str, Any]
    default: dict[str, Any]


def tuned(kernel: str, device: torch.device, key: Mapping[str, int | str | bool], default: _Config) -> _Config:
    """The table's configuration for this kernel, device and key; `default` where there is none.

    Constant for equal arguments, so also while a CUDA graph is captured. Touches no device unless `device` is one.

    Args:
        kernel: name of a module of this package, or of a part of it (such as "bn_act_backward").
        device: of the tensors.
        key: what the choice depends on, numbers and names.
        default: the launcher's own choice, a NamedTuple of whole numbers and booleans.
    """
    if _forced is not None:
        if _asked is not None:
            _asked.append((kernel, dict(key), default))
        return _forced.get(kernel, default)
    if device.type != "cuda":
        return default
    return _tuned(kernel, device, tuple(key.items()), default)


@contextlib.contextmanager
def forced(configs: Mapping[str, Any] | None = None, asked: list[Question] | None = None) -> Iterator[None]:
    """Inside, in all threads, tables are left out; a kernel named in `configs` takes that configuration; `asked` grows by
    what the launchers ask for. For measurements and tests: a captured graph keeps what it was captured with."""
    global _forced, _asked
    before, _forced, _asked = (_forced, _asked), configs or {}, asked
    try:
        yield
    finally:
        _forced, _asked = before


def forced_for(kernel: str) -> Any:
    """What `forced` asks of a kernel, for caches that must not mix configurations; None outside."""
    return None if _forced is None else _forced.get(kernel, ())


def file_name(device_name: str) -> str:
    """The table's file for a device name, as torch.cuda.get_device_name returns it."""
    return "".join(c if c.isalnum() or c in "-." else "_" for c in device_name.strip()) + ".json"


def key_of(kernel: str, key: Mapping[str, int | str | bool]) -> tuple[str, _Key]:
    """How a table is looked up: the order of the key does not matter."""
    return kernel, tuple(sorted(key.items()))


@functools.lru_cache(maxsize=4096)
def _tuned(kernel: str, device: torch.device, key: _Key, default: Any) -> Any:
    entry = _table(torch.cuda.get_device_name(device)).get(key_of(kernel, dict(key)))
    if entry is None:
        return default
    why = mismatch(entry, default)
    if why is not None:
        _warn(f"the table's configuration of {kernel} at {dict(key)} is not used: {why}")
        return default
    return type(default)(**entry.config)


def mismatch(entry: Entry, default: Any) -> str | None:
    """Why an entry cannot stand for `default`, or None."""
    own = default._asdict()
    if entry.config.keys() != own.keys():
        return f"it has the fields {sorted(entry.config)} and the kernel {sorted(own)}"
    if entry.default != own:  # sizes that the kernel relies on may follow from its default
        return f"the kernel's default has changed since, from {entry.default} to {own}; tune again"
    for name, value in entry.config.items():
        if type(value) is not type(own[name]):
            return f"{name} is {value!r}"
        if type(value) is int and not _allowed(name, value):
            return f"{name} is {value}, which cannot be"
    return None


def _allowed(name: str, value: int) -> bool:
    power = value > 0 and value & (value - 1) == 0
    return power if name.startswith(("block", "warps")) else value > 0


@functools.lru_cache(maxsize=64)
def _table(device_name: str) -> dict[tuple[str, _Key], Entry]:
    """The table of a device by `key_of`; empty without one, and without one that can be used."""
    where = os.environ.get("FASTLOCAL_TABLES", "")
    if where == "0":
        return {}
    for folder in ([Path(where)] if where else []) + [HERE / "tables"]:
        path = folder / file_name(device_name)
        try:
            text = path.read_text()
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            _warn(f"{path} is not used: {error}")
            continue
        try:
            return parse(text)
        except ValueError as error:
            _warn(f"{path} is not used: {error}")
    return {}


def parse(text: str) -> dict[tuple[str, _Key], Entry]:
    """The entries of a table.

    Raises:
        ValueError: it is no table of this version, or names a kernel that this package does not have.
    """
    table = json.loads(text)
    if not isinstance(table, dict) or table.get("format") != FORMAT or not isinstance(table.get("entries"), list):
        raise ValueError(f"not a table of format {FORMAT}")
    modules = tuple(path.stem for path in HERE.glob("*.py") if path.stem != "__init__")
    found = {}
    for line in table["entries"]:
        try:
            kernel, key = line["kernel"], dict(line["key"])
            entry = Entry(dict(line["config"]), dict(line["default"]))
            where = key_of(kernel, key)
            hash(where)
        except (KeyError, TypeError) as error:
            raise ValueError(f"a malformed entry ({type(error).__name__}: {error})") from None
        if not isinstance(kernel, str) or not kernel.startswith(modules):
            raise ValueError(f"there is no kernel {kernel!r}; tune again")
        for name, value in entry.config.items():
            if not isinstance(value, int) or not (isinstance(value, bool) or _allowed(name, value)):
                raise ValueError(f"{kernel}: {name} is {value!r}")
        found[where] = entry
    return found


@functools.lru_cache(maxsize=256)
def _warn(text: str) -> None:
    """Each text once."""
    _log.warning("%s", text)
