"""The training methods, one short file each; importing this package registers them."""

from fastlocal.methods import (
    auglocal,
    bp,
    dgl,
    feature_reconstruction,
    hpff,
    infopro,
    lopt,
    man,
    man_plus_plus,
    mlaan,
    predsim,
    solo,
)
from fastlocal.methods.base import LocalLoss, Method, Site, StepContext, get_method, list_methods, register

__all__ = [
    "LocalLoss",
    "Method",
    "Site",
    "StepContext",
    "auglocal",
    "bp",
    "dgl",
    "feature_reconstruction",
    "get_method",
    "hpff",
    "infopro",
    "list_methods",
    "lopt",
    "man",
    "man_plus_plus",
    "mlaan",
    "predsim",
    "register",
    "solo",
]
