"""The gradient that a loss's backward starts from, where it is known to be one.

A gradient that was taken with its loss need not be multiplied then. Reading the number back would make the host wait, so
whoever makes the tensor says it, with `ones`; autograd hands the same Python object to the backward of the root.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ones(loss: Tensor) -> Tensor:
    """Ones like `loss`, known as such to the operators. Nobody may write to them."""
    seed = torch.ones_like(loss)
    seed._fastlocal_one = True  # type: ignore[attr-defined]
    return seed


def is_one(grad: Tensor) -> bool:
    """Whether `grad` is known to be all ones; False where nobody said so, and always while a graph is traced."""
    return not torch.compiler.is_compiling() and getattr(grad, "_fastlocal_one", False) is True
