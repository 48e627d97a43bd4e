"""What to say when the memory of a device does not suffice: which block, how much, and what helps."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection

import torch

from fastlocal.engine.model import LocalModel
from fastlocal.errors import OutOfMemoryError

_CPU = re.compile(r"not enough memory|can't allocate memory|std::bad_alloc", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that a device or the host has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_CPU.search(str(error)))


def peak_bytes(device: torch.device | None = None) -> int | None:
    """Bytes: the most that torch has had allocated on a CUDA device, or the largest resident size of this process.

    Args:
        device: None is the current CUDA device where CUDA is in use, else the CPU. None is returned where there is no such
            number (another kind of device, no ``getrusage``).
    """
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_initialized() else "cpu")
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu":
        return None
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere


def out_of_memory(
    error: BaseException,
    model: LocalModel,
    k: int,
    phase: str,
    step: int,
    device: torch.device,
    updated: Collection[int],
) -> OutOfMemoryError:
    """The error to raise instead of ``error``, which came up in ``phase`` of block k."""
    block = model.blocks[k]
    advice = ["a smaller batch with more accumulation"]
    if len(block.units) > 1:
        advice.append(f"more blocks (this one has {len(block.units)} units)")
    advice += ["precision='bf16-mixed'", "a smaller auxiliary head"]
    peak = peak_bytes(device)
    so_far = "" if peak is None else f"peak so far {peak / 2**30:.2f} GiB on {device}, and "
    done = sorted(updated)
    prefix = done and done == [*range(len(done))]
    which = f"0 to {done[-1]}" if prefix else ", ".join(map(str, done))
    kept = f"blocks {which} were updated" if done else "no block was updated"
    return OutOfMemoryError(
        f"out of memory in block {k} ('{block.name}'), {phase}, at step {step}; {so_far}"
        f"this block saves {block.cost.saved_bytes / 2**20:.2f} MiB a sample. {kept[0].upper()}{kept[1:]} in this step; "
        f"gradients are freed and training can go on. Try {', '.join(advice)}. fastlocal.plan predicts the peak. ({error})",
        block=k,
        name=block.name,
        step=step,
        phase=phase,
    )
