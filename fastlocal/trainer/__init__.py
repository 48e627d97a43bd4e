"""A training loop over `fastlocal.Engine` (or any step), its log, learning-rate schedule and checkpoints."""

from fastlocal.trainer.checkpoint import Checkpoint, describe, load, read, save
from fastlocal.trainer.history import Epoch, History
from fastlocal.trainer.loop import Loop, accuracy, fit
from fastlocal.trainer.schedule import cosine

__all__ = ["Checkpoint", "Epoch", "History", "Loop", "accuracy", "cosine", "describe", "fit", "load", "read", "save"]
