"""How many kernels an operator without kernels of its own launches: those of its ATen calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def aten_launches(operator: Any, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Kernels that `run`, the body of `operator`, launches by "aten" in a call with these arguments.

    It runs on tensors without data, so the count is exact and nothing is computed.
    """
    from fastlocal.blocks.measure import LaunchCounter  # above the operators

    call = dict(zip((argument.name for argument in operator._schema.arguments), args)) | kwargs | {"impl": "aten"}
    with LaunchCounter() as counter:
        run(**{name: _without_data(value) for name, value in call.items()})
    return counter.total


def _without_data(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
