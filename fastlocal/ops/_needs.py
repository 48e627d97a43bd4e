"""Which gradients a backward that runs now is asked for.

``ctx.needs_input_grad`` was fixed in forward. A backward that is asked for some leaves only (``inputs=``) need not compute
weight gradients on its way; PyTorch's own nodes leave them out, and so can an operator that asks here.
"""

from __future__ import annotations

from typing import Any

import torch


def needed(ctx: Any, count: int) -> tuple[bool, ...]:
    """For the first ``count`` inputs: whether the backward that runs now wants their gradient, True where it cannot be known."""
    flags = tuple(ctx.needs_input_grad[:count])
    if torch.compiler.is_compiling():
        return flags
    try:
        return tuple(
            flag and (node is None or torch._C._will_engine_execute_node(node))
            for flag, (node, _) in zip(flags, ctx.next_functions)
        )
    except (RuntimeError, AttributeError):  # torch.autograd.grad of leaves is not told apart
        return flags
