"""A training loop over `fastlocal.Engine` (or any step), its log, learning-rate schedule and checkpoints."""

from fastlocal.trainer.checkpoint import Checkpoint, describe, load, read, save
from fastlocal.trainer.history import Epoch, History
from fastlocal.trainer.loop import Loop, accuracy, fit
from fastlocal.trainer.schedule import cosine
from fastlocal.trainer.store import CheckpointStore, Loaded, Saved

__all__ = [
    "Checkpoint",
    "CheckpointStore",
    "Epoch",
    "History",
    "Loaded",
    "Loop",
    "Saved",
    "accuracy",
    "cosine",
    "describe",
    "fit",
    "load",
    "read",
    "save",
]
