import pytest
import torch
from torch import nn

from fastlocal.errors import ArgumentError
from fastlocal.methods.predsim import PredSim
from tests.methods.sites import run_head, site


@pytest.mark.parametrize("shape", [(8, 16, 16), (3, 5, 5), (6, 8), (8,)])
@pytest.mark.parametrize("losses", ["predsim", "pred", "sim"])
@pytest.mark.parametrize("variant", ["local-loss", "auglocal"])
def test_trains_on_every_kind_of_boundary(shape, losses, variant):
    torch.manual_seed(0)
    at = site(shape)
    local = run_head(PredSim(variant=variant, losses=losses).head(at), at)
    assert set(local.terms) == ({"pred", "sim"} if losses == "predsim" else {losses})


def test_readout_starts_at_zero_in_the_authors_form_only():
    at = site((64, 32, 32))
    authors, repository = PredSim().head(at), PredSim(variant="auglocal").head(at)
    assert authors.pred[-1].in_features == 4096 and repository.pred[-1].in_features == 512
    assert authors.pred[-1].weight.abs().sum() == 0 and authors.pred[-1].bias.abs().sum() > 0
    assert repository.pred[-1].weight.abs().sum() > 0
    assert repository.sim.weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)
    assert PredSim(dim_in_decoder=1024).head(at).pred[-1].in_features == 1024


def test_a_zero_readout_gives_the_boundary_the_similarity_gradient_alone():
    at = site((8, 8, 8))
    torch.manual_seed(0)
    head = PredSim(beta=0.5).head(at)
    local = run_head(head, at)
    assert local.terms["pred"][0].item() == pytest.approx(torch.log(torch.tensor(5.0)).item(), abs=0.1)
    assert local.logits.std(0).abs().max() == 0


@pytest.mark.parametrize(
    ("mode", "options", "weight"),
    [
        ("official", {}, 0.01),
        ("official", {"beta": 0.9}, 0.1),
        ("official", {"losses": "pred"}, 1.0),
        ("official", {"variant": "auglocal"}, 1.0),
        ("paper", {}, 1.0),
    ],
)
def test_weight_of_the_output_layer(mode, options, weight):
    assert PredSim(mode, **options).final_weight == pytest.approx(weight)


def test_one_target_per_token_is_refused():
    with pytest.raises(ArgumentError, match=r"'predsim' compares whole samples.*use method='dgl'"):
        PredSim().head(site((6, 8), dense=True))


def test_similarity_layer_of_maps_is_a_convolution():
    assert isinstance(PredSim().head(site((8, 4, 4))).sim, nn.Conv2d)
    assert isinstance(PredSim().head(site((8,))).sim, nn.Linear)
