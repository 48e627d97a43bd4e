"""Random numbers that depend on nothing but a key, such as (seed, epoch, index)."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def key(*parts: int | str) -> int:
    """A number below 2**63 that the parts decide; neighbouring parts give unrelated numbers."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by ``key(*parts)``."""
    return torch.Generator().manual_seed(key(*parts))


def permutation(seed: int, epoch: int, count: int) -> Tensor:
    """The order of an epoch's samples, int64 [count] on the CPU."""
    # Not key(): recorded runs have this order.
    return torch.randperm(count, generator=torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63))


def upload(x: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on another device, without the host waiting for it."""
    if device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
