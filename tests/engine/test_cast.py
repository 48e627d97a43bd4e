"""A block's weights cast together: autocast's numbers, and the float32 weights always back."""

import copy

import pytest
import torch
from torch import nn

import fastlocal as fl


def sgd(named):
    return torch.optim.SGD(named, lr=0.05, momentum=0.9, foreach=False)


def localized(method="dgl", **options):
    torch.manual_seed(0)
    x, y = torch.randn(4, 3, 16, 16), torch.randint(0, 10, (4,))
    net = fl.models.create("resnet20")
    return fl.localize(net, method, sample=x[:2], **options), x, y


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_the_numbers_are_autocasts(precision):
    together, x, y = localized(blocks=4)
    alone = copy.deepcopy(together)
    a = fl.Engine(together, sgd, precision=precision)
    b = fl.Engine(alone, sgd, precision=precision, backend="reference")
    assert a._cast is not None and b._cast is None
    for _ in range(3):
        assert torch.equal(a.step(x, y).losses, b.step(x, y).losses)
    for (name, p), q in zip(together.state_dict().items(), alone.state_dict().values()):
        assert torch.equal(p, q), name


def test_weights_are_low_precision_inside_and_back_afterwards():
    model, x, y = localized(blocks=4)
    before = {n: id(p) for n, p in model.named_parameters()}
    seen = set()
    for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
        conv.register_forward_pre_hook(lambda m, i: seen.add(m.weight.dtype))
    fl.Engine(model, sgd, precision="bf16-mixed").step(x, y)
    assert seen == {torch.bfloat16}
    assert {n: id(p) for n, p in model.named_parameters()} == before
    assert all(p.dtype == torch.float32 and p.grad is None for p in model.parameters())


def test_weights_are_back_after_an_error():
    model, x, y = localized(blocks=4)
    before = {n: id(p) for n, p in model.named_parameters()}
    engine = fl.Engine(model, sgd, precision="bf16-mixed")

    def fail(module, inputs, output):
        raise RuntimeError("planted")

    handle = model.heads[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="planted"):
        engine.step(x, y)
    assert {n: id(p) for n, p in model.named_parameters()} == before
    handle.remove()
    assert engine.step(x, y).losses.isfinite().all()


def test_frozen_weights_stay():
    model, x, y = localized(blocks=4)
    weight = model.backbone.layer1[0].conv1.weight.requires_grad_(False)
    kept = weight.clone()
    fl.Engine(model, sgd, precision="bf16-mixed").step(x, y)
    assert torch.equal(weight, kept) and not weight.requires_grad
