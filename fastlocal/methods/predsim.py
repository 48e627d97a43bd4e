"""PredSim: every layer is trained to predict the label and to make samples of one class similar."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fastlocal.blocks.heads import BioPredSimHead, PredSimHead, init_convs
from fastlocal.errors import ArgumentError
from fastlocal.methods.base import Method, Site, check_choice, check_number, register


@dataclass
class PredSimOptions:
    """Options by the names of the local-loss repository.

    variant: "local-loss" (the authors') or "auglocal" (the form that the AugLocal repository compares with: at most 512
        pooled features, convolutions drawn as in ResNets, readout not zero, last layer at weight 1).
    losses: "predsim", or "pred" or "sim" alone.
    beta: weight of the similarity loss; the prediction loss has 1 - beta.
    dim_in_decoder: most features that the prediction loss reads; None is the variant's own, 4096 or 512.
    bio: the authors' more biologically plausible losses: feedback alignment in the readouts, random projections of the
        classes to ``target_proj_size`` numbers as targets, no convolution before the similarity.
    """

    variant: str = "local-loss"
    losses: str = "predsim"
    beta: float = 0.99
    dim_in_decoder: int | None = None
    bio: bool = False
    target_proj_size: int = 128


@register
class PredSim(Method):
    """Prediction and similarity-matching heads on every block but the last.

    In the authors' code the output layer's cross-entropy is scaled by 1 - beta too, as the prediction losses of the
    hidden layers are; ``mode="official"`` does so for ``variant="local-loss"`` with both losses. ``mode="paper"``
    leaves the task loss as it is: under Adam, which they train with, the scale makes no difference but for its epsilon.
    """

    name: ClassVar[str] = "predsim"
    summary: ClassVar[str] = "prediction and similarity-matching losses per block"
    paper: ClassVar[str] = (
        "Nøkland, Eidnes: Training Neural Networks with Local Error Signals, ICML 2019, arXiv 1901.06656"
    )
    repository: ClassVar[str] = "anokland/local-loss"
    Options: ClassVar[type] = PredSimOptions

    def validate(self) -> None:
        o = self.options
        check_choice("variant", o.variant, ("local-loss", "auglocal"))
        check_choice("losses", o.losses, ("predsim", "pred", "sim"))
        check_number("beta", o.beta, low=0, high=1)
        if o.dim_in_decoder is not None:
            check_number("dim_in_decoder", o.dim_in_decoder, low=1, integer=True)
        check_choice("bio", o.bio, (False, True))
        check_number("target_proj_size", o.target_proj_size, low=1, integer=True)
        if o.bio and o.variant != "local-loss":
            raise ArgumentError(f"bio: the form of variant='local-loss' only, got variant={o.variant!r}")

    def head(self, site: Site) -> nn.Module:
        o = self.options
        if site.dense:
            raise ArgumentError(
                "method: 'predsim' compares whole samples and needs one target per sample, but this task has one per "
                "token; use method='dgl' or 'auglocal'"
            )
        limit = o.dim_in_decoder or (4096 if o.variant == "local-loss" else 512)
        if o.bio:
            options = {"losses": o.losses, "beta": o.beta, "dim_in_decoder": limit}
            return BioPredSimHead(site.shape, site.num_classes, **options, target_proj_size=o.target_proj_size)
        head = PredSimHead(site.shape, site.num_classes, losses=o.losses, beta=o.beta, dim_in_decoder=limit)
        if o.variant == "auglocal":
            return init_convs(head)
        if head.pred is not None:
            nn.init.zeros_(head.pred[-1].get_parameter("weight"))
        return head

    @property
    def final_weight(self) -> float:
        o = self.options
        scaled = self.mode == "official" and o.variant == "local-loss" and o.losses == "predsim"
        return 1 - o.beta if scaled else 1.0
