import functools

import pytest
import torch
from torch import nn

import fastlocal as fl
from fastlocal import models
from fastlocal.blocks.losses import similarity_matrix
from fastlocal.blocks.types import StepContext
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


@pytest.mark.parametrize("shape", [(8, 16, 16), (3, 5, 5), (6, 8), (8,)])
@pytest.mark.parametrize("losses", ["predsim", "pred", "sim"])
def test_the_bio_form_trains_on_every_kind_of_boundary(losses, shape):
    torch.manual_seed(0)
    at = site(shape)
    head = PredSim(bio=True, losses=losses, dim_in_decoder=64, target_proj_size=16).head(at)
    local = run_head(head, at)
    assert set(local.terms) == ({"pred", "sim"} if losses == "predsim" else {losses})
    assert local.logits is None and local.correct is None
    assert len(list(head.parameters())) == (0 if losses == "sim" else 2)


@pytest.mark.parametrize("probabilities", [False, True])
def test_the_bio_losses_and_their_gradient_are_these(probabilities):
    """The gradient of the readout's input takes the fixed weights, that of its weight is the usual one."""
    torch.manual_seed(0)
    head = PredSim(bio=True, beta=0.25, dim_in_decoder=32, target_proj_size=6).head(site((8, 4, 4))).double()
    nn.init.normal_(head.pred.weight)
    h = torch.randn(5, 8, 4, 4, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 3, 1, 1, 4])
    given = torch.eye(5, dtype=torch.float64)[target] if probabilities else target
    local = head(h, StepContext(given, None, nn.functional.cross_entropy))
    pooled = nn.functional.avg_pool2d(h, 2)
    projected = nn.functional.linear(torch.eye(5, dtype=torch.float64)[target], head.projection)
    assert projected.shape == (5, 6)
    scores = pooled.flatten(1) @ head.pred.weight.t() + head.pred.bias
    pred = nn.functional.binary_cross_entropy_with_logits(scores, (projected > 0).double())
    sim = nn.functional.mse_loss(similarity_matrix(pooled), similarity_matrix(projected))
    assert {name: weight for name, (_, weight) in local.terms.items()} == {"pred": 0.75, "sim": 0.25}
    assert torch.allclose(local.loss, 0.75 * pred + 0.25 * sim, rtol=1e-12)
    weight, bias, at_h = torch.autograd.grad(local.loss, [head.pred.weight, head.pred.bias, h])
    usual = torch.autograd.grad(0.75 * pred, [head.pred.weight, head.pred.bias, scores], retain_graph=True)
    assert torch.allclose(weight, usual[0], rtol=1e-12) and torch.allclose(bias, usual[1], rtol=1e-12)
    replaced = (usual[2].detach() @ head.feedback * pooled.flatten(1)).sum() + 0.25 * sim
    assert torch.allclose(at_h, torch.autograd.grad(replaced, h)[0], rtol=1e-10, atol=1e-14)
    assert head.feedback.shape == head.pred.weight.shape and not torch.equal(head.feedback, head.pred.weight)


def test_the_bio_form_starts_and_saves_as_the_authors_do():
    head = PredSim(bio=True).head(site((64, 32, 32)))
    assert head.pred.in_features == 4096 and head.pred.out_features == 128
    assert head.pred.weight.abs().sum() == 0 and head.pred.bias.abs().sum() == 0
    assert 0.9 / 64 < head.feedback.abs().max() < 1 / 64 and head.feedback.abs().min() < 0.001
    assert set(head.state_dict()) == {"pred.weight", "pred.bias", "feedback", "projection"}
    assert PredSim("official", bio=True, beta=0.01).final_weight == pytest.approx(0.99)
    with pytest.raises(ArgumentError, match="bio: the form of variant='local-loss' only"):
        PredSim(variant="auglocal", bio=True)
    with pytest.raises(ArgumentError, match="target_proj_size: got 0"):
        PredSim(target_proj_size=0)


def test_the_bio_form_trains_by_level_a_and_by_the_engine_alike():
    x, y = torch.randn(8, 3, 16, 16), torch.arange(8) % 5
    models_ = []
    for _ in range(2):
        torch.manual_seed(0)
        net = models.vgg8b(feat_mult=0.0625, img_size=16, num_hidden=8, num_classes=5)
        models_.append(fl.localize(net, "predsim", blocks=7, sample=x, bio=True, beta=0.01, target_proj_size=8))
    a, b = models_
    sgd = functools.partial(torch.optim.SGD, lr=0.1, foreach=False, fused=False)
    optimizer, engine = sgd(a.parameters()), fl.Engine(b, lambda named: sgd([p for _, p in named]))
    for _ in range(2):
        optimizer.zero_grad()
        out = a(x, y)
        out.loss.backward()
        optimizer.step()
        done = engine.step(x, y)
        assert torch.equal(out.losses, done.losses) and done.correct.tolist()[:-1] == [-1] * 6
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
