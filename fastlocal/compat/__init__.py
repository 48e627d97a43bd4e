"""The networks of official repositories, with their constructors, ``forward``, parameter names and return values.

One module per repository; an official training script runs on it after a change of its import. See ``docs/compat.md``.
"""

import importlib
from typing import Any

_MODULES = (
    "auglocal",
    "hpff",
    "infopro",
    "man",
    "man_plus_plus",
    "mlaan",
)

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"fastlocal.compat.{name}")
    raise AttributeError(f"module 'fastlocal.compat' has no attribute {name!r}")
