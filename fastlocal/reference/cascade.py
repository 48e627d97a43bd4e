"""Losses that reach over several blocks, as the HPFF and MLAAN papers describe them: the streams run one by one.

`fastlocal.blocks.cascade` gets the same numbers from one forward of each block; this is what it is tested against.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastlocal.blocks.heads import CascadeHead, NoHead
from fastlocal.blocks.types import StepContext
from fastlocal.engine.model import LocalModel
from fastlocal.errors import ArgumentError


def cascade_backwards(model: LocalModel, args: tuple[Any, ...], context: StepContext) -> list[Tensor]:
    """Runs both streams through all blocks and every loss's backward; gradients add up in the parameters.

    With E_i for block i and windows of w blocks, step i runs the independent stream x = E_i(x), and from step w - 1 on the
    cascade stream y = E_{i-w+1}(y), z = E_i(... E_{i-w+2}(y)). The head's own loss of x and its shared loss of z have one
    backward; x and y are detached. The units that the method's ``passes`` count once, at the front, run once for both
    streams, and x and y start with their graph.

    Args:
        model: a `LocalModel` in training mode whose method has a window above 1.
        args: the one input tensor.
        context: of this step.

    Returns:
        The K losses, detached.

    Raises:
        ArgumentError: the network is cut by hooks, so its blocks cannot be run one by one.
    """
    if any(block.fns is None for block in model.blocks):
        raise ArgumentError(
            f"net: {type(model.backbone).__name__} is cut by hooks, but the losses of {model.method.name!r} reach over several "
            "blocks, which must be run one by one; give the network units() and readout()"
        )
    window, last = model.window, len(model.blocks) - 1
    share = model.method.final_share
    encoders = [list(block.fns or ()) for block in model.blocks]
    h: Any = args[0]
    for unit in range(len(encoders[0])):
        if model.method.passes(0, last + 1, unit) > 1:
            break
        h = encoders[0].pop(0)(h)

    def run(i: int, h: Any) -> Any:
        for unit in encoders[i]:
            h = unit(h)
        return h

    def has_own(head: Any) -> bool:
        return head.own is not None if isinstance(head, CascadeHead) else not isinstance(head, NoHead)

    independent = share < 1 or any(has_own(head) for head in model.heads)
    losses = []
    x = y = z = after = h
    for i in range(last + 1):
        if independent or i < window - 1:  # published, it runs there even where nothing reads it
            x = run(i, x)
        head = model.heads[i] if i < last else None
        first = max(0, i - window + 1)
        if i >= window - 1 or (isinstance(head, CascadeHead) and head.shared is not None):
            z = after = run(first, y)
            for j in range(first + 1, i + 1):
                z = run(j, z)
        if head is None:
            loss = model.final_loss(z, context.target) * share
            if share < 1:
                loss = loss + model.final_loss(x, context.target) * (1 - share)
        else:
            loss = (head.parts(x, z, context) if isinstance(head, CascadeHead) else head(x, context)).loss
        losses.append(loss.detach())
        model.blocks[i].fire("between_forward_and_backward")
        if loss.requires_grad:
            loss.backward(retain_graph=i < window - 1)  # the shared front serves later steps
        model.blocks[i].fire("after_backward")
        x = x.detach()
        if i >= window - 1:
            y = after.detach()
    return losses
