"""Maps any training batch to ``(args, kwargs, target)``: what the backbone is called with, and what the losses compare with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastlocal.errors import ArgumentError

Unpacked = tuple[tuple[Any, ...], dict[str, Any], Any]
BatchFn = Callable[[Any], Unpacked]

TARGET_KEYS = ("labels", "label", "target", "targets")


def unpack_batch(batch: Any) -> Unpacked:
    """``(x, y)``, ``(x1, x2, y)``, a mapping with ``labels`` (Hugging Face), or the input alone (its own target: language models).

    Returns ``(args, kwargs, target)``. Raises ArgumentError for anything else; pass ``batch=`` to ``fl.localize`` then.
    """
    if isinstance(batch, Tensor):
        return (batch,), {}, batch
    if isinstance(batch, Mapping):
        kwargs = dict(batch)
        for key in TARGET_KEYS:
            if kwargs.get(key) is not None:
                return (), kwargs, kwargs.pop(key)
        if "input_ids" in kwargs:
            return (), kwargs, kwargs["input_ids"]
        raise ArgumentError(
            f"batch: the mapping has keys {sorted(kwargs)} but none of {', '.join(TARGET_KEYS)}; "
            "name the target so, or pass batch=lambda b: (args, kwargs, target) to fl.localize"
        )
    if isinstance(batch, tuple | list) and len(batch) >= 2:
        return tuple(batch[:-1]), {}, batch[-1]
    raise ArgumentError(
        f"batch: cannot tell input from target in a {type(batch).__name__}; give (x, y), a mapping with 'labels', "
        "a tensor, or pass batch=lambda b: (args, kwargs, target) to fl.localize"
    )


def split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Unpacked | None:
    """The same for a module call ``model(x, y)`` or ``model(**batch)``; None where the call carries no target."""
    for key in TARGET_KEYS:
        if kwargs.get(key) is not None:
            rest = {name: value for name, value in kwargs.items() if name != key}
            return args, rest, kwargs[key]
    if len(args) >= 2 and isinstance(args[-1], Tensor):
        return args[:-1], kwargs, args[-1]
    return None


# What Hugging Face calls the input of a network, beside which masks and positions may stand in any order.
_MAIN = ("input_ids", "pixel_values", "inputs_embeds", "input_values", "input_features")


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor in a nest of tuples, lists and mappings, depth first; in a mapping, the network's main input."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        items: Any = sorted(value, key=lambda key: _MAIN.index(key) if key in _MAIN else len(_MAIN))
        items = [value[key] for key in items]
    else:
        items = value if isinstance(value, tuple | list) else ()
    for item in items:
        found = first_tensor(item)
        if found is not None:
            return found
    return None


def check_target(
    target: Any,
    num_classes: int,
    batch_size: int | None,
    *,
    dims: int | None = None,
    ignore_index: int = -100,
    read: bool = True,
) -> None:
    """Refuses a target of a wrong dtype, shape or range before any block has run.

    ``dims``: dimensions of a tensor of class indices (1, or 2 for one target per token), where they are known.
    ``read=False`` leaves out the range check, which on an accelerator would wait for the device.
    """
    if not isinstance(target, Tensor):
        raise ArgumentError(f"target: expected a tensor of class indices or probabilities, got {type(target).__name__}")
    if batch_size is not None and target.dim() > 0 and target.shape[0] != batch_size:
        raise ArgumentError(
            f"target: holds {target.shape[0]} rows but the input holds {batch_size}; give one target per input"
        )
    probabilities = target.dtype.is_floating_point
    if dims is not None and target.dim() != dims + probabilities and not (probabilities and target.dim() < 2):
        shape = ", ".join(["N", "T"][:dims] + [str(num_classes)] * probabilities)
        raise ArgumentError(f"target: expected shape [{shape}] for this network, got {list(target.shape)}")
    if probabilities:
        if target.dim() < 2 or target.shape[-1] != num_classes:
            raise ArgumentError(
                f"target: floating-point targets are class probabilities [N, {num_classes}], got {list(target.shape)} of "
                f"{target.dtype}; for class indices use target.long()"
            )
        return
    if target.dtype != torch.int64:
        raise ArgumentError(f"target: class indices must be int64, got {target.dtype}; use target.long()")
    if read and target.numel():
        low, high = (int(v) for v in torch.aminmax(target))
        if (
            (low < 0 and low != ignore_index)
            or high >= num_classes
            or (low == ignore_index and bool(((target < 0) & (target != ignore_index)).any()))
        ):
            raise ArgumentError(
                f"target: class indices run from {low} to {high} but the model has {num_classes} classes "
                f"(0 to {num_classes - 1}; {ignore_index} is ignored); check the labels or the size of the last layer"
            )
