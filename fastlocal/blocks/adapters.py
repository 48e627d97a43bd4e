"""Two ways to run a backbone block by block: as slices, or by hooks at named boundary modules.

Both call ``on_block(k, h)`` with the output of every block but the last and go on with what it returns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastlocal.blocks.batch import first_tensor
from fastlocal.errors import ArgumentError, PartitionError

OnBlock = Callable[[int, Tensor], Tensor]


class SliceAdapter:
    """Runs ``slices`` (one callable sequence a block) one after another. The block's input is a single tensor."""

    kind = "slices"

    def __init__(self, slices: list[tuple[Callable[[Any], Any], ...]]):
        self.slices = slices

    def run(self, net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], on_block: OnBlock) -> Any:
        if len(args) != 1 or kwargs:
            raise ArgumentError(
                f"batch: {type(net).__name__} is cut into slices and takes one tensor, got {len(args)} inputs and keywords "
                f"{sorted(kwargs)}; give (x, y), or say which is the input with batch=lambda b: ((x,), {{}}, y) in fl.localize"
            )
        x = args[0]
        last = len(self.slices) - 1
        for k, fns in enumerate(self.slices):
            for fn in fns:
                x = fn(x)
            if k < last:
                x = on_block(k, x)
        return x


class HookAdapter:
    """Runs the backbone's own forward, with a hook on each boundary module only while it runs.

    Hooks that stay installed would be shared by deep copies (EMA, AveragedModel); these never outlive a call.
    """

    kind = "hooks"

    def __init__(self, boundaries: list[str]):
        self.boundaries = boundaries

    def run(self, net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], on_block: OnBlock) -> Any:
        fired: list[int] = []
        training: list[int] = []  # the block whose on_block runs

        def hook_of(k: int) -> Callable[[nn.Module, Any, Any], Any]:
            def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
                if training:
                    raise PartitionError(
                        f"blocks: module '{self.boundaries[k]}' ran anew in the backward of block {training[0]}, so it is called under "
                        "activation checkpointing; call it without, or put the checkpoint into its own forward, where it does no harm"
                    )
                if k in fired:
                    raise PartitionError(
                        f"blocks: module '{self.boundaries[k]}' runs more than once in a forward, so a cut after it is not one "
                        "place; cut after another module"
                    )
                if fired and k < fired[-1]:
                    raise PartitionError(
                        f"blocks: module '{self.boundaries[k]}' runs after '{self.boundaries[fired[-1]]}'; list the cuts in the "
                        "order in which the modules run"
                    )
                fired.append(k)
                h = first_tensor(output)
                if h is None:
                    raise PartitionError(
                        f"blocks: module '{self.boundaries[k]}' returns no tensor; cut after another module"
                    )
                training.append(k)
                new = on_block(k, h)
                training.pop()
                # every other tensor it returns is cut off too: no gradient may cross the border
                return pytree.tree_map_only(Tensor, lambda t: new if t is h else t.detach(), output)

            return hook

        handles = [net.get_submodule(name).register_forward_hook(hook_of(k)) for k, name in enumerate(self.boundaries)]
        if "use_cache" not in kwargs and getattr(getattr(net, "config", None), "use_cache", False):
            kwargs = {**kwargs, "use_cache": False}  # a key-value cache would keep every block's activations alive
        try:
            output = net(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        if len(fired) != len(self.boundaries):
            missing = [name for k, name in enumerate(self.boundaries) if k not in fired]
            raise PartitionError(
                f"blocks: {', '.join(missing)} did not run in this forward; cut after modules that always run"
            )
        return output


Adapter = SliceAdapter | HookAdapter


def logits_of(output: Any) -> Tensor:
    """The class scores in a backbone's output: the tensor itself, ``.logits``, ``['logits']``, or the first tensor."""
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    if logits is None:
        logits = first_tensor(output)
    if not isinstance(logits, torch.Tensor):
        raise TypeError(f"the backbone returns {type(output).__name__}, in which no logits were found")
    return logits
