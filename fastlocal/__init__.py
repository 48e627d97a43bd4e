"""fastlocal: train a network as gradient-isolated blocks, at the memory of one block.

model = fastlocal.localize(net, method="auglocal", blocks=16, sample=x[:2], depth=2)
engine = fastlocal.Engine(model, optimizer=lambda named: torch.optim.SGD(named, lr=0.1))
out = engine.step(x, y)
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlocal._version import __version__

_ROOT = Path(__file__).resolve().parents[1]
if (_ROOT / "csrc").is_dir():  # a source tree: bench/ and triton_kernels/ stand beside this package, not in it
    __path__.append(str(_ROOT))

_PUBLIC = {
    "localize": "fastlocal.engine.localize",
    "LocalModel": "fastlocal.engine.model",
    "LocalOutput": "fastlocal.engine.output",
    "StepOutput": "fastlocal.engine.output",
    "Engine": "fastlocal.engine.engine",
    "LocalOptimizer": "fastlocal.engine.optimizer",
    "Trainer": "fastlocal.trainer.trainer",
    "plan": "fastlocal.engine.plan",
    "Plan": "fastlocal.engine.plan",
    "list_methods": "fastlocal.methods",
    "Method": "fastlocal.methods",
    "backend": "fastlocal.ops",
    "explain": "fastlocal._explain",
}
_SUBMODULES = (
    "blocks",
    "compat",
    "data",
    "engine",
    "errors",
    "info",
    "methods",
    "models",
    "ops",
    "reference",
    "trainer",
)

__all__ = ["__version__", *_PUBLIC, *_SUBMODULES]

if TYPE_CHECKING:
    from fastlocal import blocks, compat, data, engine, errors, info, methods, models, ops, reference, trainer
    from fastlocal._explain import explain
    from fastlocal.engine.engine import Engine
    from fastlocal.engine.localize import localize
    from fastlocal.engine.model import LocalModel
    from fastlocal.engine.optimizer import LocalOptimizer
    from fastlocal.engine.output import LocalOutput, StepOutput
    from fastlocal.engine.plan import Plan, plan
    from fastlocal.methods import Method, list_methods
    from fastlocal.ops import backend
    from fastlocal.trainer.trainer import Trainer


def __getattr__(name: str) -> Any:
    # Loaded at first use: `import fastlocal` stays quick and starts nothing.
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
    elif name in _SUBMODULES:
        value = importlib.import_module(f"fastlocal.{name}")
    else:
        raise AttributeError(f"module 'fastlocal' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
