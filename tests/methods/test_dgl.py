import itertools

import pytest
import torch
from torch import nn

import fastlocal as fl
from fastlocal import models
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


def test_heads_on_imagenet_are_initialised_as_the_repository_does():
    torch.manual_seed(0)
    at = site((128, 32, 32))
    for init, conv, linear in (("resnet", (2 / 128) ** 0.5, (1 / (3 * 512)) ** 0.5), ("vgg", (2 / 128) ** 0.5, 0.01)):
        net = DGL(init=init).head(at).net
        convs, linears = ([m for m in net if isinstance(m, kind)] for kind in (nn.Conv2d, nn.Linear))
        assert [m.weight.std().item() for m in convs] == pytest.approx([conv] * 3, rel=0.05)
        assert [m.weight.std().item() for m in linears] == pytest.approx([linear] * 4, rel=0.05)
        assert all((m.bias == 0).all() == (init == "vgg") for m in linears)
    auglocal = DGL(head="auglocal", init="vgg").head(at).net
    assert auglocal[-1].weight.std().item() == pytest.approx((1 / (3 * 512)) ** 0.5, rel=0.05)
    with pytest.raises(ArgumentError, match="init: got 'kaiming'"):
        DGL(init="kaiming")


def test_the_official_resnets_pool_to_an_eighth():
    at = site((8, 14, 14))
    sizes = [DGL(mode, init=i).head(at).net[0].output_size for mode in ("paper", "official") for i in ("resnet", "vgg")]
    assert sizes == [(4, 4), (4, 4), (2, 2), (4, 4)]


@pytest.mark.parametrize(
    ("net", "blocks", "sizes"),
    [("vgg13", 4, [3, 3, 3, 1]), ("vgg19", 4, [4, 4, 4, 4]), ("vgg19", 2, [8, 8]), ("resnet152", 2, [26, 25])],
)
def test_published_cuts(net, blocks, sizes):
    """Blocks of equally many layers, the last one shorter."""
    with torch.device("meta"):
        names = [name for name, _ in models.create(net).units()]
    cuts = DGL().cuts(blocks, names, None)
    ends = [-1, *cuts, len(names) - 1]
    assert [b - a for a, b in itertools.pairwise(ends)] == sizes
    assert DGL().cuts(blocks + 3, names, None) is None and DGL().cuts(blocks, ["0", *names[1:]][:3], None) is None
    assert DGL().cuts(4, [name for name, _ in models.resnet32().units()], None) is None  # 16 units, of other names


def test_a_vgg_layer_by_layer_and_its_last_block():
    """Ten blocks of VGG-13; the last has the published readout: max-pool, and three Linear layers without dropout."""
    x = torch.zeros(2, 3, 32, 32)
    net = models.vgg13(width=4, hidden=8, num_classes=5, dropout=0.0)
    model = fl.localize(net, "dgl", blocks=10, sample=x, init="vgg")
    assert [len(block.units) for block in model.blocks] == [1] * 10 and len(model.heads) == 9
    assert [type(m) for m in net.fc if not isinstance(m, nn.Dropout)] == [
        nn.Linear,
        nn.ReLU,
        nn.Linear,
        nn.ReLU,
        nn.Linear,
    ]
    pools = [head.net[0].output_size for head in model.heads]
    assert pools == [(8, 8)] * 2 + [(4, 4)] * 2 + [(2, 2)] * 2 + [(1, 1)] * 3
    assert model(x, torch.tensor([0, 4])).loss.isfinite()


@pytest.mark.parametrize("variant", HEADS)
def test_tokens_and_vectors_get_our_mlp(variant):
    for at, shape in ((site((6, 8)), (4, 5)), (site((6, 8), dense=True), (4, 6, 5)), (site((8,)), (4, 5))):
        head = DGL(head=variant).head(at)
        assert run_head(head, at).logits.shape == shape
        assert sum(isinstance(m, nn.LayerNorm) for m in head.modules()) == 3


def test_one_output_per_pixel_is_refused():
    with pytest.raises(ArgumentError, match="'dgl' classify whole images"):
        DGL().head(site((8, 4, 4), dense=True))
