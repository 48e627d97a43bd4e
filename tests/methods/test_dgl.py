import pytest
import torch
from torch import nn

from fastlocal.errors import ArgumentError
from fastlocal.methods.dgl import DGL, HEADS
from tests.methods.sites import count, run_head, site


@pytest.mark.parametrize("variant", HEADS)
@pytest.mark.parametrize("shape", [(8, 32, 32), (6, 7, 9), (4, 8, 8)])
def test_every_variant_trains_on_every_map(variant, shape):
    torch.manual_seed(0)
    at = site(shape)
    local = run_head(DGL(head=variant).head(at), at)
    assert list(local.terms) == ["task"] and local.logits.shape == (4, 5)


def test_the_published_variants_differ():
    sizes = {variant: count(DGL(head=variant).head(site((16, 32, 32)))) for variant in HEADS}
    assert len(set(sizes.values())) == len(HEADS)
    hidden = 3 * (64 * 64 + 64 + 128) + 64 * 5 + 5
    assert sizes["dgl_mlp"] == hidden
    assert sizes["dgl"] == hidden + 3 * (256 + 32)
    assert sizes["dgl_cnn"] == 2 * (256 * 9 + 32) + 32 + 64 * 5 + 5


@pytest.mark.parametrize(("variant", "drawn"), [("dgl", False), ("auglocal", True), ("man++", True)])
def test_convolutions_are_initialised_as_their_repository_does(variant, drawn):
    torch.manual_seed(0)
    head = DGL(head=variant).head(site((128, 32, 32)))
    weight = next(m for m in head.modules() if isinstance(m, nn.Conv2d)).weight
    # torch's default for a 1x1 convolution of 128 channels is uniform with deviation sqrt(1 / (3 * 128)).
    expected = (2 / 128) ** 0.5 if drawn else (1 / (3 * 128)) ** 0.5
    assert weight.std().item() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("variant", HEADS)
def test_tokens_and_vectors_get_our_mlp(variant):
    for at, shape in ((site((6, 8)), (4, 5)), (site((6, 8), dense=True), (4, 6, 5)), (site((8,)), (4, 5))):
        head = DGL(head=variant).head(at)
        assert run_head(head, at).logits.shape == shape
        assert sum(isinstance(m, nn.LayerNorm) for m in head.modules()) == 3


def test_one_output_per_pixel_is_refused():
    with pytest.raises(ArgumentError, match="'dgl' classify whole images"):
        DGL().head(site((8, 4, 4), dense=True))
