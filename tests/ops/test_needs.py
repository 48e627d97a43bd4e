"""A backward that is asked for some gradients only computes no others."""

import pytest
import torch
from torch import nn

from fastlocal.blocks.measure import LaunchCounter
from fastlocal.ops._dispatch import as_on_gpu
from fastlocal.ops._needs import needed
from fastlocal.ops.bn_act_conv import bn_act_conv


class Asks(torch.autograd.Function):
    seen: tuple[bool, ...] = ()

    @staticmethod
    def forward(ctx, x, w, b):
        ctx.save_for_backward(x, w)
        return x * w + b

    @staticmethod
    def backward(ctx, g):
        Asks.seen = needed(ctx, 3)
        x, w = ctx.saved_tensors
        return g * w, g * x, g


def test_what_is_asked_for_is_known():
    x, w = (torch.randn(3, requires_grad=True) for _ in range(2))
    y = Asks.apply(x * 1, w, torch.ones(3))  # x is no leaf, b needs no gradient
    g = torch.ones(3)
    for inputs, wanted in (([x], (True, False, False)), ([w], (False, True, False)), (None, (True, True, False))):
        torch.autograd.backward(y, g, inputs=inputs, retain_graph=True)
        assert Asks.seen == wanted
    torch.autograd.grad(y, [w], g, retain_graph=True)
    assert Asks.seen[1]  # of leaves asked for by grad() nothing is known, so all are computed


@pytest.mark.parametrize(("ask", "launches"), [("x", 2), ("weight", 3), ("all", 3)])
def test_a_backward_to_the_input_leaves_the_weight_gradient_out(ask, launches):
    norm, conv = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1, bias=False)
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    with as_on_gpu():
        y = bn_act_conv(x, norm, conv)
        whole = torch.autograd.grad(y, [x, conv.weight], y.detach(), retain_graph=True)
        inputs = {"x": [x], "weight": [conv.weight], "all": None}[ask]
        with LaunchCounter() as counter:
            torch.autograd.backward(y, y.detach(), inputs=inputs)
    assert counter.total == launches
    for p, grad, name in zip((x, conv.weight), whole, ("x", "weight")):
        assert (p.grad is None) == (ask not in (name, "all"))
        assert p.grad is None or torch.equal(p.grad, grad)
