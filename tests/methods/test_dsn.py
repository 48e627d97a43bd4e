import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastlocal as fl
from fastlocal import models
from fastlocal.blocks.losses import cross_entropy
from fastlocal.errors import ArgumentError
from fastlocal.methods import StepContext
from fastlocal.methods.dsn import DSN, squared_hinge_loss
from tests.methods.sites import run_head, site
from tests.methods.three_ways import in_bf16, never_waits, resumes, sgd, three_ways


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def net():
    return models.ResNetCIFAR(1, width=4)


def data(count=3, rows=6):
    g = torch.Generator().manual_seed(1)
    return [
        (torch.randn(rows, 3, 8, 8, generator=g, dtype=torch.float64), torch.randint(10, (rows,), generator=g))
        for _ in range(count)
    ]


def localize(mode="paper", criterion=None, **options):
    sample = torch.randn(2, 3, 8, 8)
    return fl.localize(net(), "dsn", blocks=3, sample=sample, mode=mode, criterion=criterion, **options).double()


def test_squared_hinge_by_hand():
    scores = torch.tensor([[2.0, -0.5, 0.0], [0.5, 0.5, -3.0]])
    target = torch.tensor([0, 1])
    # row 0: max(0, 1 - 2), max(0, 1 - 0.5), max(0, 1 + 0); row 1: 1.5, 0.5, 0
    expected = (0 + 0.25 + 1 + 2.25 + 0.25 + 0) / 2
    torch.testing.assert_close(squared_hinge_loss(scores, target).item(), expected)
    assert squared_hinge_loss(scores.bfloat16(), target).dtype == torch.float32


def test_squared_hinge_has_the_gradient_of_the_repository_s_layer():
    scores = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 3, 1, 1, 2])
    squared_hinge_loss(scores, target).backward()
    expected = torch.zeros(5, 4, dtype=torch.float64)
    for i in range(5):
        for j in range(4):
            sign = -1 if j == target[i] else 1
            expected[i, j] = 2 / 5 * sign * max(0.0, 1 + sign * scores[i, j].item())
    torch.testing.assert_close(scores.grad, expected)


def test_squared_hinge_refuses_what_it_cannot_read():
    for scores, target in ((torch.zeros(2, 3), torch.zeros(2, 3)), (torch.zeros(2, 4, 3), torch.zeros(2, 4).long())):
        with pytest.raises(ArgumentError, match=r"target: the squared hinge takes scores \[B, classes\]"):
            squared_hinge_loss(scores, target)


@pytest.mark.parametrize("mode", ["paper", "official"])
@pytest.mark.parametrize("shape", [(8, 6, 6), (6, 8), (8,)])
def test_trains_on_every_kind_of_boundary(shape, mode):
    at = site(shape)
    local = run_head(DSN(mode).head(at), at)
    assert set(local.terms) == {"companion"} and local.logits.shape == (4, 5)


def test_the_classifier_is_drawn_as_in_caffe():
    linear = DSN().head(site((16, 4, 4))).linear
    bound = (3 / 256) ** 0.5
    assert 0.98 * bound < linear.weight.abs().max() <= bound and not linear.bias.any()


def losses_of(head, steps=3):
    h, target = torch.randn(4, 8, dtype=torch.float64), torch.randint(5, (4,))
    head = head.double()
    found = []
    for _ in range(steps):
        x = h.clone().requires_grad_()
        head.zero_grad()
        local = head(x, StepContext(target=target, input=h, criterion=cross_entropy))
        local.loss.backward()
        grads = (x.grad, head.linear.weight.grad.clone(), head.linear.bias.grad.clone())
        found.append((local, grads))
    x = h.clone().requires_grad_()
    weight, bias = (p.detach().clone().requires_grad_() for p in (head.linear.weight, head.linear.bias))
    plain = squared_hinge_loss(F.linear(x, weight, bias), target)
    plain.backward()
    return found, plain.detach(), (x.grad, weight.grad, bias.grad)


def test_paper_mode_decays_the_loss():
    found, plain, grads = losses_of(DSN(alpha=0.3, localgamma=0.5, localpower=2).head(site((8,))))
    for t, (local, got) in enumerate(found, 1):
        factor = (1 + 0.5 * t) ** -2
        value, weight = local.terms["companion"]
        assert weight == 0.3
        torch.testing.assert_close(value, plain * factor)
        torch.testing.assert_close(local.loss.detach(), 0.3 * plain * factor)
        for g, expected in zip(got, grads):
            torch.testing.assert_close(g, 0.3 * factor * expected)


def test_official_mode_slows_the_classifier_and_leaves_the_loss():
    found, plain, grads = losses_of(
        DSN("official", alpha=0.3, localgamma=0.5, localpower=2, lr_multiplier=0.1).head(site((8,)))
    )
    for t, (local, got) in enumerate(found, 1):
        rate = 0.1 * (1 + 0.5 * t) ** -2
        torch.testing.assert_close(local.loss.detach(), 0.3 * plain)
        torch.testing.assert_close(got[0], 0.3 * grads[0])
        torch.testing.assert_close(got[1], 0.3 * rate * grads[1])
        torch.testing.assert_close(got[2], 0.3 * 2 * rate * grads[2])


def test_linear_decay_ends_at_zero_and_none_stays():
    found, plain, _ = losses_of(DSN(decay="linear", steps=2).head(site((8,))), 4)
    torch.testing.assert_close([local.loss.item() for local, _ in found], [plain.item() / 2, 0.0, 0.0, 0.0])
    found, plain, _ = losses_of(DSN(decay="none").head(site((8,))))
    assert all(torch.equal(local.loss.detach(), plain) for local, _ in found)


def test_threshold_stops_a_companion_that_is_good_enough():
    head = DSN(decay="none", gamma=1e9).head(site((8,)))
    local = run_head(head, site((8,)))
    assert local.loss == 0 and not head.linear.weight.grad.any()
    torch.manual_seed(3)
    a = losses_of(DSN(decay="none", gamma=0.5).head(site((8,))))
    torch.testing.assert_close(a[0][0][0].loss.detach(), a[1] - 0.5)
    torch.testing.assert_close(a[0][0][1][0], a[2][0])


def test_softmax_companions_are_the_cross_entropy():
    head = DSN(loss="softmax", decay="none").head(site((8,)))
    h, target = torch.randn(4, 8), torch.randint(5, (4,))
    expected = F.cross_entropy(head.linear(h), target)
    torch.testing.assert_close(head(h, StepContext(target, h, squared_hinge_loss)).loss, expected)


def by_hand(model, batches, mode, options):
    """Deep supervision in plain PyTorch: one network, a list of Linears, one backward."""
    net, heads = copy.deepcopy(model.backbone), [copy.deepcopy(head.linear) for head in model.heads]
    cuts = [block.name for block in model.blocks[:-1]]
    optimizer = sgd([*net.parameters(), *(p for head in heads for p in head.parameters())])
    found = []
    for t, (x, y) in enumerate(batches, 1):
        factor = (1 + options["localgamma"] * t) ** -0.75
        h, losses = x, []
        for name, fn in net.units():
            h = fn(h)
            if name in cuts:
                scores = heads[len(losses)](h.flatten(1))
                signs = -torch.ones_like(scores)
                signs[torch.arange(len(y)), y] = 1
                hinge = F.relu(1 - signs * scores).pow(2).sum(1).mean()
                losses.append(options["alpha"] * hinge * (factor if mode == "paper" else 1.0))
        losses.append(F.cross_entropy(net.readout(h), y))
        optimizer.zero_grad()
        sum(losses).backward()
        if mode == "official":
            for head in heads:
                head.weight.grad *= 0.001 * factor
                head.bias.grad *= 0.002 * factor
        optimizer.step()
        found.append(torch.stack([loss.detach() for loss in losses]))
    return net, heads, found


@pytest.mark.parametrize("mode", ["paper", "official"])
def test_every_way_equals_a_loop_written_by_hand(mode):
    options = {"alpha": 0.5, "localgamma": 0.2}
    model, batches = localize(mode, **options), data()
    net, heads, expected = by_hand(model, batches, mode, options)
    spec, losses = three_ways(model, batches)
    torch.testing.assert_close(losses, expected, rtol=1e-11, atol=1e-12)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(spec.backbone.state_dict()[name], value, rtol=1e-11, atol=1e-12)
    for own, head in zip(spec.heads, heads, strict=True):
        torch.testing.assert_close(own.linear.weight, head.weight, rtol=1e-11, atol=1e-12)
        assert own.step == len(batches)


def test_without_decay_it_is_the_hand_written_loop_to_the_last_digits():
    model, batches = localize(decay="none", alpha=0.5), data()
    net, _, expected = by_hand(model, batches, "paper", {"alpha": 0.5, "localgamma": 0.0})
    spec, losses = three_ways(model, batches)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(spec.backbone.state_dict()[name], value, rtol=1e-11, atol=1e-12)


def test_gradients_of_later_losses_reach_the_first_block():
    model, (x, y) = localize(alpha=0.0), data(1)[0]
    assert not model.method.isolated
    model(x, y).loss.backward()
    first = next(p for _, p in model.blocks[0].backbone_parameters())
    assert first.grad.norm() > 0  # of the task loss alone: the companions count nothing


def test_fine_tuning_leaves_the_companions_out_but_loads_their_checkpoint():
    trained, _ = three_ways(localize(), data())
    model = localize(companions=False)
    model.load_state_dict(trained.state_dict())
    spec, losses = three_ways(model, data())
    plain = copy.deepcopy(model.backbone)
    optimizer = sgd(plain.parameters())
    for (x, y), found in zip(data(), losses, strict=True):
        optimizer.zero_grad()
        loss = F.cross_entropy(plain(x), y)
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(found, torch.tensor([0.0, 0.0, loss.item()], dtype=torch.float64))
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(spec.backbone.state_dict()[name], value, rtol=1e-12, atol=1e-12)
    for own, before in zip(spec.heads.parameters(), model.heads.parameters(), strict=True):
        assert torch.equal(own, before)


def test_the_step_counter_resumes_and_counts_micro_batches():
    model = localize(localgamma=0.5)
    resumes(model, data(4))
    engine = fl.Engine(model, sgd)
    (x, y), (x2, y2) = data(2)
    engine.accumulate(x, y)
    engine.step(x2, y2)
    assert [head.step.item() for head in model.heads] == [2, 2]
    model.eval()(x)
    assert model.heads[0].step == 2
    assert "heads.0.step" in model.state_dict() and model.state_dict()["heads.0.step"].dtype == torch.int64


def test_a_step_that_fails_takes_the_counter_back():
    model = localize()
    engine = fl.Engine(model, sgd, update="end", nonfinite="skip")
    x, y = data(1)[0]
    engine.step(x, y)
    engine.step(torch.full_like(x, float("nan")), y)
    assert [head.step.item() for head in model.heads] == [1, 1]


@pytest.mark.parametrize("mode", ["paper", "official"])
def test_compiled_heads_decay_forward_and_backward_alike(mode):
    head = DSN(mode, localgamma=0.5).head(site((8,))).double()
    other = copy.deepcopy(head)
    other.compile(backend="aot_eager", dynamic=False)
    h, target = torch.randn(4, 8, dtype=torch.float64), torch.randint(5, (4,))
    for _ in range(3):
        found = []
        for each in (head, other):
            x = h.clone().requires_grad_()
            each.zero_grad()
            each(x, StepContext(target, h, cross_entropy)).loss.backward()
            found.append([x.grad, each.linear.weight.grad, each.linear.bias.grad, each.step.clone()])
        torch.testing.assert_close(found[1], found[0])


def test_the_repository_s_output_loss():
    model, batches = localize(criterion=squared_hinge_loss), data()
    _, losses = three_ways(model, batches)
    x, y = batches[0]
    torch.testing.assert_close(losses[0][-1], squared_hinge_loss(copy.deepcopy(model.backbone).train()(x), y))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "hinge"}, "loss: got 'hinge'. Valid: 'squared_hinge', 'softmax'"),
        ({"decay": "cosine"}, "decay: got 'cosine'"),
        ({"decay": "linear"}, "steps: got None; give an integer from 1"),
        ({"alpha": -1}, "alpha: got -1; give a number from 0"),
        ({"gamma": -1}, "gamma: got -1"),
        ({"localpower": -1}, "localpower: got -1"),
        ({"lr_multiplier": "a"}, "lr_multiplier: got 'a'"),
        ({"companions": 2}, "companions: got 2"),
    ],
)
def test_bad_values(options, message):
    with pytest.raises(ArgumentError, match=message):
        DSN(**options)
    with pytest.raises(ArgumentError, match="one output per position"):
        DSN().head(site((6, 8), dense=True))


def test_it_says_that_it_is_not_isolated():
    entry = next(m for m in fl.list_methods() if m["name"] == "dsn")
    assert entry["isolated"] is False and "not isolated" in entry["summary"]
    assert isinstance(DSN().head(site((8,))), nn.Module)


@pytest.mark.parametrize("mode", ["paper", "official"])
def test_on_an_accelerator_it_never_waits_and_in_bf16_it_is_much_the_same(mode):
    in_bf16(localize(mode, alpha=0.1), *data(1)[0])
    never_waits(localize(mode).float(), data(1)[0][0].float(), data(1)[0][1])
