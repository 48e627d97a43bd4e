"""The specification in plain PyTorch: every operator, and one whole training step of any method."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastlocal.reference.bn_act import bn_act
from fastlocal.reference.bn_act_conv import bn_act_conv
from fastlocal.reference.bn_act_pool import bn_act_pool
from fastlocal.reference.class_goodness_cross_entropy import (
    class_goodness_cross_entropy,
    class_goodness_cross_entropy_value_and_grad,
)
from fastlocal.reference.ema_update import ema_update_
from fastlocal.reference.fused_adamw import fused_adamw_
from fastlocal.reference.fused_sgd import fused_sgd_
from fastlocal.reference.goodness_loss import goodness_loss, goodness_loss_value_and_grad
from fastlocal.reference.norm_linear_cross_entropy import (
    frequencies,
    norm_linear_cross_entropy,
    norm_linear_cross_entropy_value_and_grad,
)
from fastlocal.reference.pool_linear_cross_entropy import (
    pool_linear_cross_entropy,
    pool_linear_cross_entropy_value_and_grad,
)
from fastlocal.reference.reconstruction_loss import reconstruction_loss, reconstruction_loss_value_and_grad
from fastlocal.reference.similarity_matching_loss import (
    similarity_matching_loss,
    similarity_matching_loss_value_and_grad,
    similarity_matrix,
    target_similarity,
)
from fastlocal.reference.supervised_contrastive_loss import (
    positive_weights,
    supervised_contrastive_loss,
    supervised_contrastive_loss_value_and_grad,
)

if TYPE_CHECKING:
    from fastlocal.reference.step import train_step

__all__ = [
    "bn_act",
    "bn_act_conv",
    "bn_act_pool",
    "class_goodness_cross_entropy",
    "class_goodness_cross_entropy_value_and_grad",
    "ema_update_",
    "frequencies",
    "fused_adamw_",
    "fused_sgd_",
    "goodness_loss",
    "goodness_loss_value_and_grad",
    "norm_linear_cross_entropy",
    "norm_linear_cross_entropy_value_and_grad",
    "pool_linear_cross_entropy",
    "pool_linear_cross_entropy_value_and_grad",
    "positive_weights",
    "reconstruction_loss",
    "reconstruction_loss_value_and_grad",
    "similarity_matching_loss",
    "similarity_matching_loss_value_and_grad",
    "similarity_matrix",
    "supervised_contrastive_loss",
    "supervised_contrastive_loss_value_and_grad",
    "target_similarity",
    "train_step",
]


def __getattr__(name: str) -> Any:
    # The operators lie below ops and engine, the step above them: it is imported only when asked for.
    if name == "train_step":
        from fastlocal.reference.step import train_step

        return train_step
    raise AttributeError(f"module 'fastlocal.reference' has no attribute {name!r}")
