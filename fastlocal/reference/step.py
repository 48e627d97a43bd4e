"""One whole step of any method in plain PyTorch: the specification that the engine is tested against, number for number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlocal.blocks.links import fire
from fastlocal.engine.model import LocalModel
from fastlocal.reference.cascade import cascade_backwards


def train_step(model: LocalModel, batch: Any, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Trains every block by its own loss, then steps the optimizer once.

    Args:
        model: a `LocalModel` in training mode.
        batch: ``(x, y)``, a mapping with labels, or whatever the model's ``batch`` function maps.
        optimizer: over ``model.parameters()``.

    Returns:
        The K local losses, detached, in block order.
    """
    args, kwargs, target = model.unpack(batch)
    fire(model.links, "before_step")
    context = model.context(args, kwargs, target)
    optimizer.zero_grad()
    if model.window > 1:
        losses = cascade_backwards(model, args, context)
        optimizer.step()
        return losses
    losses = []

    def train_block(k: int, h: Tensor) -> Tensor:
        loss = model.heads[k](h, context).loss
        losses.append(loss)
        if model.summed:
            return h
        backward(k, loss)  # reaches this block and its head only: the input was detached
        context.boundary = h.detach()
        return h.detach()  # the gradient border

    def backward(k: int, loss: Tensor) -> None:
        model.blocks[k].fire("between_forward_and_backward")
        loss.backward()
        model.blocks[k].fire("after_backward")

    output = model.run(args, kwargs, train_block)
    losses.append(model.final_loss(output, target))
    backward(len(losses) - 1, torch.stack(losses).sum() if model.summed else losses[-1])
    optimizer.step()
    return [loss.detach() for loss in losses]
