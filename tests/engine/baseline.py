"""The sum of detached local losses, written by hand: what level A and the engine are compared with.

It uses none of fastlocal's adapters, blocks or carriers, only the backbone, the heads and the names of the cuts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastlocal.blocks.adapters import logits_of
from fastlocal.engine.model import LocalModel
from fastlocal.methods import StepContext


def losses_by_units(model: LocalModel, x: Tensor, y: Tensor) -> list[Tensor]:
    """The K local losses of a network with ``units()``: detach after every cut, and nothing else."""
    net: Any = model.backbone
    cuts = {block.name: k for k, block in enumerate(model.blocks[:-1])}
    ctx, h, losses = StepContext(y, x, model.criterion), x, []
    for name, unit in net.units():
        h = unit(h)
        if name in cuts:
            losses.append(model.heads[cuts[name]](h, ctx).loss)
            h = ctx.boundary = h.detach()
    return [*losses, model.criterion(net.readout(h), y) * model.method.final_weight]


class SumOfLosses(nn.Module):
    """The same for any network, by forward hooks; as a module, so that trainers can run it. Returns ``{"loss": sum}``."""

    def __init__(self, model: LocalModel):
        super().__init__()
        self.backbone, self.heads = model.backbone, model.heads
        self.criterion, self.weight = model.criterion, model.method.final_weight
        for k, block in enumerate(model.blocks[:-1]):
            self.backbone.get_submodule(block.name).register_forward_hook(self._hook(k))

    def _hook(self, k: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
            if not self.training:
                return None
            h = output if isinstance(output, Tensor) else output[0]
            self.losses.append(self.heads[k](h, self.ctx).loss)
            self.ctx.boundary = h.detach()
            return h.detach() if isinstance(output, Tensor) else (h.detach(), *output[1:])

        return hook

    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if labels is None:
            *args, labels = args
        x = args[0] if args else kwargs["input_ids"]
        self.losses: list[Tensor] = []
        self.ctx = StepContext(labels, x, self.criterion)
        output = self.backbone(*args, **kwargs)
        final = self.criterion(logits_of(output), labels) * self.weight
        return {"loss": torch.stack([*self.losses, final]).sum()}


class NoHostRead(TorchDispatchMode):
    """Fails at any operator that brings a tensor's value to the host, or a host tensor to another device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "is_nonzero", "nonzero", "equal"), f"{name} reads from the device"
        out = func(*args, **(kwargs or {}))
        if name in ("copy_", "_to_copy"):
            source = args[1] if name == "copy_" else args[0]
            assert source.device == out.device, f"{name} crosses from {source.device} to {out.device}"
        return out


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every gradient by name; parameters without one are left out."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bitwise, and the same names."""
    assert got.keys() == expected.keys()
    differ = {n: (got[n] - expected[n]).abs().max().item() for n in got if not torch.equal(got[n], expected[n])}
    assert not differ, differ


@torch.no_grad()
def relative_error(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Norm of the difference over all tensors, over the norm of ``expected``."""
    assert got.keys() == expected.keys()
    error = sum((got[n].double() - expected[n].double()).square().sum() for n in got)
    size = sum(expected[n].double().square().sum() for n in got)
    return float((error / size).sqrt())
