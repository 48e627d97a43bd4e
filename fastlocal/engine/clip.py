"""`Clip`: gradients of a block (or of all blocks together) kept small, in place, without the host waiting for the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastlocal.engine.model import LocalModel
from fastlocal.errors import ArgumentError, did_you_mean

_MODES, _SCOPES = ("norm", "value", "agc"), ("block", "global")
_EPS = 1e-3  # a unit whose weights are smaller counts as this large, so that one at zero can leave it


@dataclass(frozen=True)
class Clip:
    """Gradient clipping.

    Args:
        value: the largest norm (``"norm"``), the largest magnitude of an element (``"value"``), or the largest ratio of a
            unit's gradient norm to its weight norm (``"agc"``; 0.01 to 0.16 in the paper).
        mode: ``"norm"`` is ``torch.nn.utils.clip_grad_norm_``, ``"value"`` ``clip_grad_value_``. ``"agc"`` is adaptive
            gradient clipping (Brock, De, Smith, Simonyan: High-Performance Large-Scale Image Recognition Without
            Normalization, 2021): every output unit of a weight has a norm of its own, a vector or scalar one together.
            Last linear layers are left alone, as in the paper; `bind` finds them.
        scope: ``"block"`` looks at one block at a time, ``"global"`` at the gradients of all blocks together, which needs
            them all at once. For ``"value"`` and ``"agc"`` both give the same numbers.

    Raises:
        ArgumentError: ``value`` is not a positive finite number, or ``mode`` or ``scope`` is none of these.
    """

    value: float
    mode: Literal["norm", "value", "agc"] = "norm"
    scope: Literal["block", "global"] = "block"
    _left_out: dict[int, nn.Parameter] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        number = isinstance(self.value, (int, float)) and not isinstance(self.value, bool)
        if not number or not math.isfinite(self.value) or self.value <= 0:
            raise ArgumentError(f"value: got {self.value!r}; give a positive number, such as 1.0")
        for name, given, valid in (("mode", self.mode, _MODES), ("scope", self.scope, _SCOPES)):
            if given not in valid:
                raise ArgumentError(f"{name}: got {given!r}. {did_you_mean(str(given), valid)}")

    @classmethod
    def coerce(cls, clip: Any) -> Clip | None:
        """None, a number (the norm of each block's gradients) or a Clip, as a Clip or None.

        Raises:
            ArgumentError: anything else.
        """
        if clip is None or isinstance(clip, Clip):
            return clip
        if isinstance(clip, (int, float)) and not isinstance(clip, bool):
            return cls(clip)
        raise ArgumentError(f"clip: got {clip!r}; give None, a number such as 1.0, or Clip(0.01, mode='agc')")

    def bind(self, model: LocalModel) -> Clip:
        """This Clip, knowing the last linear layers of ``model``'s heads and readout, which ``"agc"`` leaves alone.

        They are, in each block, the last 2-D weight with one row per class and a vector of that length right after it.
        """
        if self.mode != "agc":
            return self
        found = [p for block in model.blocks for p in readout(block.parameters(), model.num_classes)]
        return replace(self, _left_out={id(p): p for p in found})

    @torch.no_grad()
    def __call__(self, params: Sequence[nn.Parameter]) -> Tensor | None:
        """Clips the gradients of ``params`` in place. Those without one are left out.

        Returns:
            ``"norm"``: the total norm before clipping, 0-dim, on the device. Else, or without any gradient, None.
        """
        params = [p for p in params if p.grad is not None]
        if not params:
            return None
        if self.mode == "norm":
            return nn.utils.clip_grad_norm_(params, self.value)
        if self.mode == "value":
            nn.utils.clip_grad_value_(params, self.value)
        else:
            _adaptive([p for p in params if id(p) not in self._left_out], self.value)
        return None


def readout(params: Sequence[nn.Parameter], num_classes: int) -> list[nn.Parameter]:
    """Weight and bias of the last linear layer with ``num_classes`` rows among a block's parameters; empty if there is none."""
    for i in range(len(params) - 1, -1, -1):
        if params[i].dim() == 2 and params[i].shape[0] == num_classes:
            bias = [p for p in params[i + 1 : i + 2] if p.shape == (num_classes,)]
            return [params[i], *bias]
    return []


def _adaptive(params: list[nn.Parameter], factor: float) -> None:
    alike: dict[Any, list[nn.Parameter]] = {}
    for p in params:
        alike.setdefault((p.device, p.dtype, p.grad.dtype), []).append(p)  # type: ignore[union-attr]
    for group in alike.values():
        group.sort(key=lambda p: p.dim() > 1)  # vectors first: `_unit_norms` takes their norms together
        grads: list[Tensor] = [p.grad for p in group]  # type: ignore[misc]
        norms = _unit_norms(grads)
        have = torch.cat([n.reshape(-1) for n in norms])
        most = torch.cat([n.reshape(-1) for n in _unit_norms(group)]).clamp_(min=_EPS).mul_(factor)
        scale = (most / have.clamp(min=1e-6)).masked_fill_(have < most, 1.0).to(have.dtype)
        scales = scale.split([n.numel() for n in norms])
        torch._foreach_mul_(grads, [s.view(n.shape) for s, n in zip(scales, norms)])


def _unit_norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Norms of the rows of each tensor, broadcastable to it; of vectors and scalars, which come first, one each."""
    vectors = [t for t in tensors if t.dim() <= 1]
    rows = [torch.linalg.vector_norm(t, dim=tuple(range(1, t.dim())), keepdim=True) for t in tensors[len(vectors) :]]
    return [*(torch._foreach_norm(vectors) if vectors else ()), *rows]
