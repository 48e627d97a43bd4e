"""The resolved configuration of a run: what was asked for and what it became, as JSON beside the results."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastlocal._version import __version__
from fastlocal.data.source import Source
from fastlocal.trainer.checkpoint import describe

if TYPE_CHECKING:
    from fastlocal.trainer.trainer import Trainer


def resolved(trainer: Trainer, train: Source, val: Source | None, epochs: int, limit: int | None) -> dict[str, Any]:
    """Everything that decides a run, and where it runs."""
    engine = trainer.engine
    inner = next(o for o in engine.optimizer.blocks if o is not None)
    device = engine.device
    return {
        "model": {"class": type(trainer.model.backbone).__name__, **describe(trainer.model)},
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "trainable": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "optimizer": {"class": type(inner).__name__, **{k: v for k, v in inner.defaults.items() if _plain(v)}},
        "scheduler": repr(trainer._scheduler_spec),
        "epochs": epochs,
        "limit": limit,
        "train": train.describe(),
        "val": None if val is None else val.describe(),
        "precision": trainer.precision,
        "channels_last": trainer.channels_last,
        "accumulate": trainer.accumulate,
        "clip": None if engine.clip is None else repr(engine.clip),
        "mixing": None if trainer.mixing is None else trainer.mixing.describe(),
        "ema": None if trainer.ema is None else repr(trainer.ema),
        "schedule": engine.schedule,
        "update": engine.update,
        "nonfinite": engine.nonfinite,
        "deterministic": engine.deterministic,
        "seed": trainer.seed,
        "recalibrate": trainer.recalibrate,
        "validate_every": trainer.validate_every,
        "save_every": trainer.save_every,
        "monitor": trainer.monitor,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "fastlocal": __version__,
    }


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """``config.json``, whole or not at all."""
    path = folder / "config.json"
    aside = folder / f".config.json.{os.getpid()}"
    aside.write_text(json.dumps(config, indent=2, default=repr) + "\n")
    os.replace(aside, path)


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | tuple | list)
