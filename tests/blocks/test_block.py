"""One block on its own: its parameters, its head's gradient, its own backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlocal as fl
from fastlocal.blocks.block import Block, Slot, exclusive, owned_slots, runs_batch_norm
from fastlocal.blocks.types import LocalLoss, StepContext


class Head(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, h: Tensor, ctx: StepContext) -> LocalLoss:
        logits = self.linear(h)
        return LocalLoss.of(("task", ctx.criterion(logits, ctx.target), 0.5), logits=logits)


@pytest.fixture
def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 3))


@pytest.fixture
def block(net: nn.Sequential) -> Block:
    own = {id(p) for p in net[:2].parameters()}
    buffers = {id(b) for b in net[:2].buffers()}
    return Block(
        index=0,
        name="2",
        units=("2",),
        fns=(net[0], net[1], net[2]),
        head=Head(),
        slots=tuple(owned_slots(net, own, "backbone.")),
        buffers=tuple(owned_slots(net, buffers, "backbone.", buffers=True)),
    )


X, Y = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2, 1, 1, 0])
CTX = StepContext(Y, X, F.cross_entropy)


def test_names_parameters_and_buffers(block: Block, net: nn.Sequential) -> None:
    named = dict(block.named_parameters())
    backbone = ["backbone.0.weight", "backbone.0.bias", "backbone.1.weight", "backbone.1.bias"]
    assert list(named) == [*backbone, "heads.0.linear.weight", "heads.0.linear.bias"]
    assert [n for n, _ in block.backbone_parameters()] == backbone
    assert named["backbone.1.weight"] is net[1].weight
    assert [id(b) for b in block.all_buffers()] == [id(b) for b in (*net[1].buffers(), block.head.calls)]  # type: ignore[union-attr]


def test_slots_are_read_live(block: Block, net: nn.Sequential) -> None:
    net[0].weight = nn.Parameter(torch.zeros(6, 4))
    net[1].running_mean = torch.ones(6)
    assert dict(block.named_parameters())["backbone.0.weight"] is net[0].weight
    assert block.all_buffers()[0] is net[1].running_mean
    assert Slot("x", net[1], "running_var").value is net[1].running_var


def test_call_runs_the_slice_and_hooked_blocks_refuse(block: Block, net: nn.Sequential) -> None:
    net.eval()
    assert torch.equal(block(X), net[:3](X))
    with pytest.raises(TypeError, match=r"block 3 \(layer\) was cut by hooks and runs only inside"):
        Block(index=3, name="layer", units=("layer",))(X)


def test_the_last_block_has_no_local_loss() -> None:
    with pytest.raises(TypeError, match=r"block 2 \(fc\) is the last one: its loss is the task loss"):
        Block(index=2, name="fc", units=("fc",)).local_loss(X, CTX)


@pytest.mark.parametrize("scale", [None, 8.0])
def test_local_gradient_and_backward_are_autograd_in_two_pieces(block: Block, scale: float | None) -> None:
    h = block(X)
    whole = block.head(h, CTX).loss * (scale or 1.0)  # type: ignore[misc]
    params = block.parameters()
    expected = torch.autograd.grad(whole, params)
    h = block(X)
    local, grad_out = block.local_gradient(h, CTX, None if scale is None else torch.tensor(scale))
    assert local.terms["task"][1] == 0.5 and local.logits is not None and not local.logits.requires_grad
    assert all(p.grad is None for _, p in block.backbone_parameters())  # the border: only the head has gradients yet
    assert all(p.grad is not None for p in block.head.parameters())  # type: ignore[union-attr]
    assert h.grad_fn is not None
    block.backward(h, grad_out)
    for p, g in zip(params, expected, strict=True):
        torch.testing.assert_close(p.grad, g)
    with pytest.raises(RuntimeError, match="second time"):  # its graph is gone
        block.backward(h, grad_out)


def test_take_gradients_accumulates_nowhere(block: Block) -> None:
    h = block(X)
    expected = torch.autograd.grad(block.head(h, CTX).loss, block.parameters())  # type: ignore[misc]
    local, params, grads = block.take_gradients(block(X), CTX)
    assert [id(p) for p in params] == [id(p) for p in block.parameters()]
    for g, e in zip(grads, expected, strict=True):
        torch.testing.assert_close(g, e)
    assert all(p.grad is None for p in params) and local.loss.shape == ()


def test_nothing_to_train_below_the_head(block: Block, net: nn.Sequential) -> None:
    net.requires_grad_(False)
    h = block(X)
    local, grad_out = block.local_gradient(h, CTX)
    assert grad_out is None and local.loss.requires_grad
    block.backward(h, grad_out)  # nothing to do, and no error
    _, params, grads = block.take_gradients(block(X), CTX)
    assert len(params) == len(grads) == 2  # the head's
    block.head.requires_grad_(False)  # type: ignore[union-attr]
    assert block.local_gradient(block(X), CTX)[1] is None
    assert block.take_gradients(block(X), CTX)[1:] == ([], [])


def test_any_grad_out_can_be_sent_through_a_block(block: Block, net: nn.Sequential) -> None:
    """What a broadcast of the label or of the error does: no head, a gradient from elsewhere."""
    grad_out = torch.randn(5, 6)
    h = block(X)
    expected = torch.autograd.grad((h * grad_out).sum(), net[0].weight)[0]
    Block.backward(block(X), grad_out)
    torch.testing.assert_close(net[0].weight.grad, expected)


def test_exclusive_copies_what_must_not_be_written_to() -> None:
    a, expanded = torch.randn(3), torch.ones(()).expand(4)
    result: list[Any] = exclusive([a, None, a, expanded])
    assert result[0] is a and result[1] is None
    assert result[2] is not a and torch.equal(result[2], a)
    assert result[3].is_contiguous() and torch.equal(result[3], expanded)


def test_owned_slots_name_each_tensor_once() -> None:
    net = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    net["b"].weight = net["a"].weight
    wanted = {id(p) for p in net.parameters()}
    assert [s.name for s in owned_slots(net, wanted, "net.")] == ["net.a.weight", "net.a.bias", "net.b.bias"]
    assert owned_slots(net, set(), "net.") == []


def test_runs_batch_norm() -> None:
    assert runs_batch_norm([nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))]) is None
    net = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
    assert runs_batch_norm([nn.Linear(2, 2), net]) == "BatchNorm2d"
    net[1].eval()
    assert runs_batch_norm([net]) is None


@pytest.mark.parametrize("method", ["dgl", "predsim"])
def test_blocks_of_a_model_carry_their_cost(method: str) -> None:
    model = fl.localize(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)), method, blocks=3, sample=X)
    assert [b.cost.boundary for b in model.blocks] == [(6,), (6,), (3,)]
    assert [b.cost.macs for b in model.blocks] == [24, 36, 18]
    assert [b.cost.head_macs > 0 for b in model.blocks] == [True, True, False]
    # a Linear saves its input of 4 bytes a number; the head may save more
    assert [b.cost.saved_bytes >= n for b, n in zip(model.blocks, (16, 24, 24), strict=True)] == [True] * 3
