"""`Trainer` and its parts: schedules, optimizers, averages, evaluation, logs, callbacks, checkpoints."""

from fastlocal.trainer import optimizers
from fastlocal.trainer.callbacks import Callback, EarlyStopping, LambdaCallback
from fastlocal.trainer.checkpoint import Checkpoint, describe, load, read, save
from fastlocal.trainer.ema import EMA
from fastlocal.trainer.evaluate import Evaluation, accuracy, early_exit, evaluate, predict_early, recalibrate
from fastlocal.trainer.finetune import freeze, load_pretrained, unfreeze
from fastlocal.trainer.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from fastlocal.trainer.schedule import PerStep, cosine
from fastlocal.trainer.store import CheckpointStore, Loaded, Saved
from fastlocal.trainer.trainer import Trainer

__all__ = [
    "EMA",
    "CSVLogger",
    "Callback",
    "Checkpoint",
    "CheckpointStore",
    "EarlyStopping",
    "Evaluation",
    "LambdaCallback",
    "Loaded",
    "Logger",
    "PerStep",
    "Saved",
    "TensorBoardLogger",
    "Trainer",
    "WandbLogger",
    "accuracy",
    "cosine",
    "describe",
    "early_exit",
    "evaluate",
    "freeze",
    "load",
    "load_pretrained",
    "optimizers",
    "predict_early",
    "read",
    "recalibrate",
    "save",
    "unfreeze",
]
