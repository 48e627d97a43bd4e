"""The fused operators, with PyTorch-shaped signatures, and the choice of the backend that serves them."""

from fastlocal.ops._dispatch import BACKENDS, Choice, backend, explain
from fastlocal.ops.bn_act import bn_act
from fastlocal.ops.pool_linear_cross_entropy import (
    pool_linear_cross_entropy,
    pool_linear_cross_entropy_value_and_grad,
)

__all__ = [
    "BACKENDS",
    "Choice",
    "backend",
    "bn_act",
    "explain",
    "pool_linear_cross_entropy",
    "pool_linear_cross_entropy_value_and_grad",
]
