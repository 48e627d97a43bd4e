"""The fused operators, with PyTorch-shaped signatures, and the choice of the backend that serves them."""

from fastlocal.ops._dispatch import BACKENDS, Choice, backend, explain
from fastlocal.ops.bn_act import bn_act
from fastlocal.ops.bn_act_conv import bn_act_conv
from fastlocal.ops.bn_act_pool import bn_act_pool
from fastlocal.ops.class_goodness_cross_entropy import (
    class_goodness_cross_entropy,
    class_goodness_cross_entropy_value_and_grad,
)
from fastlocal.ops.ema_update import ema_update_
from fastlocal.ops.fused_adamw import FusedAdamW, fused_adamw_
from fastlocal.ops.fused_sgd import FusedSGD, fused_sgd_
from fastlocal.ops.goodness_loss import goodness_loss, goodness_loss_value_and_grad
from fastlocal.ops.norm_linear_cross_entropy import norm_linear_cross_entropy, norm_linear_cross_entropy_value_and_grad
from fastlocal.ops.pool_linear_cross_entropy import (
    pool_linear_cross_entropy,
    pool_linear_cross_entropy_value_and_grad,
)
from fastlocal.ops.reconstruction_loss import reconstruction_loss, reconstruction_loss_value_and_grad
from fastlocal.ops.similarity_matching_loss import similarity_matching_loss, similarity_matching_loss_value_and_grad
from fastlocal.ops.supervised_contrastive_loss import (
    supervised_contrastive_loss,
    supervised_contrastive_loss_value_and_grad,
)

__all__ = [
    "BACKENDS",
    "Choice",
    "FusedAdamW",
    "FusedSGD",
    "backend",
    "bn_act",
    "bn_act_conv",
    "bn_act_pool",
    "class_goodness_cross_entropy",
    "class_goodness_cross_entropy_value_and_grad",
    "ema_update_",
    "explain",
    "fused_adamw_",
    "fused_sgd_",
    "goodness_loss",
    "goodness_loss_value_and_grad",
    "norm_linear_cross_entropy",
    "norm_linear_cross_entropy_value_and_grad",
    "pool_linear_cross_entropy",
    "pool_linear_cross_entropy_value_and_grad",
    "reconstruction_loss",
    "reconstruction_loss_value_and_grad",
    "similarity_matching_loss",
    "similarity_matching_loss_value_and_grad",
    "supervised_contrastive_loss",
    "supervised_contrastive_loss_value_and_grad",
]
