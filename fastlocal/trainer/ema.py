"""`EMA`: an exponential moving average of backbone and heads, so that every block of the average can be evaluated."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from fastlocal.blocks.links import fire
from fastlocal.engine.model import LocalModel
from fastlocal.errors import ArgumentError


class EMA:
    """A copy of the model whose weights follow it: ``average = decay * average + (1 - decay) * model`` at every `update`.

    Parameters and floating-point buffers (BatchNorm statistics) are averaged, other buffers copied; the first update copies
    everything, as ``torch.optim.swa_utils.AveragedModel`` does. An update takes a few multi-tensor launches and does not make
    the host wait for the device (`AveragedModel.update_parameters` moves its counter there at each call, and truncates
    averages of integers).

    Args:
        model: what to follow. Make the EMA when it is on its device.
        decay: weight of the past, from 0 to below 1.
        warmup: let the decay rise as in timm: ``min(decay, 1 - (1 + n / warmup_gamma) ** -warmup_power)`` at the update
            that n others went before.

    Attributes:
        model: the average, a `LocalModel` in eval mode, whose parameters require no gradient.
        updates: calls of `update`.

    Raises:
        ArgumentError: a value that is not one of these.
    """

    def __init__(
        self,
        model: LocalModel,
        decay: float = 0.9999,
        *,
        warmup: bool = False,
        warmup_gamma: float = 1.0,
        warmup_power: float = 2 / 3,
    ):
        if not isinstance(model, LocalModel):
            raise ArgumentError(f"model: expected a LocalModel from fastlocal.localize, got {type(model).__name__}")
        if not _is_number(decay) or not 0 <= decay < 1:
            raise ArgumentError(f"decay: got {decay!r}; give a number from 0 to below 1, such as 0.9999")
        if not isinstance(warmup, bool):
            raise ArgumentError(f"warmup: got {warmup!r}; give True or False")
        for name, value in (("warmup_gamma", warmup_gamma), ("warmup_power", warmup_power)):
            if not _is_number(value) or value <= 0:
                raise ArgumentError(f"{name}: got {value!r}; give a number above 0")
        self.decay, self.warmup, self.warmup_gamma, self.warmup_power = decay, warmup, warmup_gamma, warmup_power
        self.updates = 0
        self.model: LocalModel = deepcopy(model).requires_grad_(False).eval()
        self._followed = _places(model)
        self._own = _places(self.model)

    def next_decay(self) -> float:
        """What the next update will use."""
        if self.updates == 0:
            return 0.0
        if not self.warmup:
            return self.decay
        return min(self.decay, 1 - (1 + self.updates / self.warmup_gamma) ** -self.warmup_power)

    @torch.no_grad()
    def update(self) -> None:
        """Follows the model. Call it after every optimizer step."""
        decay = self.next_decay()
        averaged: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
        copied: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
        for (own_table, key), (table, _) in zip(self._own.values(), self._followed.values(), strict=True):
            own, now = own_table[key], table[key]
            if now.dtype != own.dtype or now.device != own.device:  # the model was moved or converted since
                now = now.to(own)
            into = averaged if decay and own.is_floating_point() else copied
            mine, theirs = into.setdefault((own.dtype, own.device), ([], []))
            mine.append(own)
            theirs.append(now)
        for mine, theirs in averaged.values():
            torch._foreach_lerp_(mine, theirs, 1 - decay)
        for mine, theirs in copied.values():
            torch._foreach_copy_(mine, theirs)
        fire(
            self.model.links, "before_forward"
        )  # else they would depend on whether the average was evaluated in between
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        """``updates`` and ``tensors``, the average's parameters and buffers by name (not copied)."""
        return {"updates": self.updates, "tensors": {name: t[key].detach() for name, (t, key) in self._own.items()}}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copies what `state_dict` returned.

        Raises:
            ArgumentError: it comes from another model; nothing has been changed then.
        """
        tensors = state["tensors"]
        for name in self._own.keys() ^ tensors.keys():
            side = "lacks" if name in self._own else "has"
            raise ArgumentError(
                f"state_dict: {side} {name}, the model does not agree; it comes from another model or method"
            )
        for name, (table, key) in self._own.items():
            if table[key].shape != tensors[name].shape:
                raise ArgumentError(
                    f"state_dict: {name} is {list(tensors[name].shape)}, the model's {list(table[key].shape)}; it comes from another model"
                )
        for name, (table, key) in self._own.items():
            table[key].copy_(tensors[name])
        self.updates = state["updates"]

    def __repr__(self) -> str:
        return f"EMA(decay={self.decay}, warmup={self.warmup}, updates={self.updates})"


def _places(model: nn.Module) -> dict[str, tuple[dict[str, Any], str]]:
    """Where each parameter and buffer of ``model`` stands, by name; shared ones once. Found once, for walking costs time."""
    found: dict[str, tuple[dict[str, Any], str]] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        for table in (module._parameters, module._buffers):
            for key, value in table.items():
                if value is not None and id(value) not in seen:
                    seen.add(id(value))
                    found[f"{path}.{key}" if path else key] = (table, key)
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
