"""DGL, decoupled greedy learning: every block is trained by the cross-entropy of a small pooled MLP head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fastlocal.blocks.heads import ClassifierHead, dgl_net, init_convs, man_plus_plus_net, token_mlp
from fastlocal.methods.base import Method, Site, check_choice, refuse_dense_images, register

HEADS = ("dgl", "dgl_mlp", "dgl_cnn", "auglocal", "man++")

# Names of the units after which the paper cuts on ImageNet, by number of units (VGG-13, VGG-19, ResNet-152) and blocks.
CUTS = {
    10: {4: "features.3 features.7 features.12"},
    16: {4: "features.4 features.9 features.14", 2: "features.9"},
    51: {2: "layer3.13"},
}


@dataclass
class DGLOptions:
    """``head`` names which of the published, unequal "DGL heads" is meant.

    "dgl" (the DGL repository's MLP-SR), "dgl_mlp" and "dgl_cnn" (its study of other heads), "auglocal" (the AugLocal
    repository's: two hidden layers without bias), "man++" (the MAN++ repository's: 128 channels at 8x8, hidden width
    512).

    ``init`` draws the first three: "torch" (the DGL repository on CIFAR-10), "resnet" (convolutions as in ResNets: on
    ResNet-152) or "vgg" (the same, linear layers from N(0, 0.01), biases 0: on VGGs).
    """

    head: str = "dgl"
    init: str = "torch"


@register
class DGL(Method):
    """Cross-entropy heads on every block but the last.

    ``mode="official"`` with ``init="resnet"`` pools the map to an eighth, not to a quarter: the repository's ResNets count one
    halving of the map too many.

    VGG-13, VGG-19 and ResNet-152 are cut as published where there is a cut for the number of blocks; elsewhere blocks are
    balanced by cost. The published VGGs have no dropout (``models.vgg13(dropout=0.0)``).

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
        check_choice("init", self.options.init, ("torch", "resnet", "vgg"))

    def cuts(self, blocks: int, unit_names: list[str], net: nn.Module) -> list[int] | None:
        names = CUTS.get(len(unit_names), {}).get(blocks, "").split()
        known = names and all(name in unit_names for name in names)
        return [unit_names.index(name) for name in names] if known else None

    def head(self, site: Site) -> nn.Module:
        refuse_dense_images(self.name, site)
        if not site.is_image:
            return ClassifierHead(token_mlp(site.shape, site.num_classes, dense=site.dense))
        head = self._image_head(site)
        if self.options.init != "torch" and self.options.head.startswith("dgl"):
            init_convs(head)
            linears = [m for m in head.modules() if isinstance(m, nn.Linear)] if self.options.init == "vgg" else []
            for linear in linears:
                nn.init.normal_(linear.weight, 0.0, 0.01)
                nn.init.zeros_(linear.bias)
        return head

    def _image_head(self, site: Site) -> nn.Module:
        variant = self.options.head
        if variant == "man++":
            return ClassifierHead(init_convs(man_plus_plus_net(site.shape, site.num_classes)))
        if variant == "auglocal":
            return ClassifierHead(init_convs(dgl_net(site.shape, site.num_classes, hidden=2, bias=False)))
        if variant == "dgl_cnn":
            return ClassifierHead(dgl_net(site.shape, site.num_classes, convs=2, kernel_size=3, hidden=0))
        part = 8 if self.mode == "official" and self.options.init == "resnet" else 4
        return ClassifierHead(dgl_net(site.shape, site.num_classes, convs=0 if variant == "dgl_mlp" else 3, part=part))
