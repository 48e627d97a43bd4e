import torch
from torch import nn

from fastlocal.blocks.block import start_backward
from fastlocal.blocks.types import StepContext
from fastlocal.ops._seed import is_one, ones


class Watch(torch.autograd.Function):
    """A loss that keeps the gradients it is given, as seen."""

    seen: list = []

    @staticmethod
    def forward(ctx, x):
        return x.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        Watch.seen.append((grad, is_one(grad)))
        return grad.expand(3)


def seen(backward):
    Watch.seen.clear()
    backward(Watch.apply(torch.zeros(3, requires_grad=True)))
    ((grad, one),) = Watch.seen
    return grad, one


def context():
    return StepContext(torch.zeros(3, dtype=torch.int64), None, nn.functional.cross_entropy)


def test_only_what_was_marked_is_one():
    assert is_one(ones(torch.tensor(5.0))) and ones(torch.tensor(5.0)) == 1
    assert not is_one(torch.ones(()))
    assert not is_one(ones(torch.tensor(5.0)) * 1) and not is_one(ones(torch.tensor(5.0)).clone())


def test_autograd_hands_the_mark_to_the_root_and_to_nothing_else():
    assert seen(lambda loss: loss.backward(ones(loss)))[1]
    assert not seen(lambda loss: loss.backward())[1]
    assert not seen(lambda loss: (loss * 2).backward(ones(loss)))[1]

    def hooked(loss):
        loss.register_hook(lambda grad: grad * 3)
        loss.backward(ones(loss))

    grad, one = seen(hooked)
    assert grad == 3 and not one

    def twice(loss):  # the gradients of two roots are added
        torch.autograd.backward([loss, loss.clone()], [ones(loss), ones(loss)])

    grad, one = seen(twice)
    assert grad == 2 and not one


def test_a_block_starts_from_a_marked_one_and_a_scaled_block_does_not():
    ctx = context()
    first, one = seen(lambda loss: start_backward(loss, ctx))
    assert one and first == 1
    assert seen(lambda loss: start_backward(loss, ctx))[0] is first
    assert not seen(lambda loss: start_backward(loss, ctx, torch.tensor(8.0)))[1]


def test_under_saved_tensor_hooks_and_in_a_module():
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert seen(lambda loss: loss.backward(ones(loss)))[1]
    layer = nn.Linear(2, 3)
    Watch.seen.clear()
    loss = Watch.apply(layer(torch.ones(2)))
    loss.backward(ones(loss))
    assert Watch.seen[0][1] and layer.bias.grad.eq(1).all()


def test_nothing_is_one_while_a_graph_is_traced():
    seed = ones(torch.tensor(5.0))
    flags = torch.compile(lambda t: t + (2 if is_one(t) else 1), fullgraph=True, backend="eager")
    assert flags(seed) == 2
