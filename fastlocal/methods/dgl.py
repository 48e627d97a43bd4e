"""DGL, decoupled greedy learning: every block is trained by the cross-entropy of a small pooled MLP head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fastlocal.blocks.heads import ClassifierHead, dgl_net, init_convs, man_plus_plus_net, token_mlp
from fastlocal.methods.base import Method, Site, check_choice, refuse_dense_images, register

HEADS = ("dgl", "dgl_mlp", "dgl_cnn", "auglocal", "man++")


@dataclass
class DGLOptions:
    """``head`` names which of the published, unequal "DGL heads" is meant.

    "dgl" (the DGL repository's MLP-SR), "dgl_mlp" and "dgl_cnn" (its study of other heads), "auglocal" (the AugLocal
    repository's: two hidden layers without bias), "man++" (the MAN++ repository's: 128 channels at 8x8, hidden width
    512).
    """

    head: str = "dgl"


@register
class DGL(Method):
    """Cross-entropy heads on every block but the last. Both modes are the same.

    An image boundary gets the head that ``head`` names; tokens [T, D] and vectors [D] get a form of our own, three
    times Linear + LayerNorm + ReLU on the pooled tokens (on every token where there is a target per token), whatever
    ``head`` says.
    """

    name: ClassVar[str] = "dgl"
    summary: ClassVar[str] = "cross-entropy of a pooled MLP head per block"
    paper: ClassVar[str] = (
        "Belilovsky, Eickenberg, Oyallon: Decoupled Greedy Learning of CNNs, ICML 2020, arXiv 1901.08164"
    )
    repository: ClassVar[str] = "eugenium/DGL"
    Options: ClassVar[type] = DGLOptions

    def validate(self) -> None:
        check_choice("head", self.options.head, HEADS)

    def head(self, site: Site) -> nn.Module:
        refuse_dense_images(self.name, site)
        if not site.is_image:
            return ClassifierHead(token_mlp(site.shape, site.num_classes, dense=site.dense))
        variant = self.options.head
        if variant == "man++":
            return ClassifierHead(init_convs(man_plus_plus_net(site.shape, site.num_classes)))
        if variant == "auglocal":
            return ClassifierHead(init_convs(dgl_net(site.shape, site.num_classes, hidden=2, bias=False)))
        if variant == "dgl_cnn":
            return ClassifierHead(dgl_net(site.shape, site.num_classes, convs=2, kernel_size=3, hidden=0))
        return ClassifierHead(dgl_net(site.shape, site.num_classes, convs=0 if variant == "dgl_mlp" else 3))
