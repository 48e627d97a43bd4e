"""The device that these tests run on: CUDA, or the CPU with FASTLOCAL_GPU_TESTS_DEVICE=cpu, which checks the tests themselves.

A test body is written once. What only CUDA has stands behind the functions here; a test that makes no sense without a device
is marked ``gpu`` itself and stays skipped.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import fastlocal as fl
from fastlocal.blocks.measure import StorageTracker
from tests.engine.baseline import NoHostRead

DEVICE = os.environ.get("FASTLOCAL_GPU_TESTS_DEVICE", "cuda")
if DEVICE not in ("cuda", "cpu"):
    raise ValueError(f"FASTLOCAL_GPU_TESTS_DEVICE={DEVICE!r} is neither 'cuda' nor 'cpu'")
ON_CUDA = DEVICE == "cuda"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's kernels run on a CPU then
MARKS = [pytest.mark.gpu] if ON_CUDA else []

METHOD_OPTIONS: dict[str, dict[str, Any]] = {
    "bp": {"blocks": 1},
    "auglocal": {"blocks": 4, "depth": 1},
    "infopro": {"blocks": 3, "lam": (5.0, 0.5)},
    "dsn": {"loss": "softmax", "alpha": 0.1},
    "hpff": {"blocks": 4},
    "mlaan": {"blocks": 4},
    "man_plus_plus": {"blocks": 4, "head": "dgl"},
    "feature_reconstruction": {"first": "image"},
}
OF_TOKENS = ["lopt", "solo"]  # on the decoder of `gpt`
OTHERS = [*OF_TOKENS, "localmim"]  # what needs a network of its own is left to its CPU tests
METHODS = [method["name"] for method in fl.list_methods() if method["name"] not in OTHERS]
Make = Callable[[Any], torch.optim.Optimizer]


def sgd(named: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(named, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3)


def adamw(named: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(named, lr=1e-3, weight_decay=0.01)


def capturable(named: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(named, lr=1e-3, capturable=ON_CUDA)  # PyTorch refuses it on a CPU


OPTIMIZERS: dict[str, Make] = {"sgd": sgd, "adamw": adamw, "capturable": capturable}


def resnet(method: str = "dgl", **options: Any) -> fl.LocalModel:
    """A small CIFAR ResNet, on the CPU."""
    torch.manual_seed(0)
    net = fl.models.ResNetCIFAR(2, width=8, **options)
    how = {"blocks": 3} | METHOD_OPTIONS.get(method, {})
    if method == "lakd":
        how["teacher"] = fl.models.ResNetCIFAR(2, width=8)
    return fl.localize(net, method, sample=torch.randn(2, 3, 16, 16), **how)


def in_fp16(model: fl.LocalModel) -> bool:
    """Whether every block's loss reaches that block alone, so that it can have a loss scale of its own."""
    return model.window == 1 and not model.summed


def gpt(method: str = "dgl") -> fl.LocalModel:
    """A small decoder, on the CPU."""
    torch.manual_seed(0)
    net = fl.models.create("gpt", vocab_size=61, block_size=16, n_embd=32, n_layer=4, n_head=2)
    return fl.localize(net, method, blocks=2, sample=torch.randint(61, (2, 12)), tied="untie")


def tokens(count: int, rows: int = 8) -> list[tuple[Tensor, Tensor]]:
    """Ids and the same as targets, on the device."""
    torch.manual_seed(1)
    made = [torch.randint(61, (rows, 12)).to(DEVICE) for _ in range(count)]
    return [(ids, ids.clone()) for ids in made]


def vit(method: str = "dgl", dropout: float = 0.0) -> fl.LocalModel:
    """A small Vision Transformer, on the CPU."""
    torch.manual_seed(0)
    size = dict(img_size=16, patch_size=4, dim=32, depth=4, heads=2)
    net = fl.models.create("vit_tiny", num_classes=10, dropout=dropout, **size)
    return fl.localize(net, method, blocks=3, sample=torch.randn(2, 3, 16, 16))


def batches(count: int, rows: int = 8) -> list[tuple[Tensor, Tensor]]:
    """On the device."""
    torch.manual_seed(1)
    made = [(torch.randn(rows, 3, 16, 16), torch.randint(10, (rows,))) for _ in range(count)]
    return [(x.to(DEVICE), y.to(DEVICE)) for x, y in made]


def engine(model: fl.LocalModel, make: Make = sgd, **options: Any) -> fl.Engine:
    """An engine that reads nothing back, as on a device, also on the CPU."""
    made = fl.Engine(model.to(DEVICE), make, **options)
    assert made._guard.waits == ON_CUDA
    made._guard.waits = True
    return made


@contextlib.contextmanager
def no_sync() -> Iterator[None]:
    """Fails where the host waits for the device."""
    if not ON_CUDA:
        with mock.patch("torch.nn.functional.one_hot", _one_hot), NoHostRead():
            yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _one_hot(target: Tensor, num_classes: int) -> Tensor:
    """PyTorch's reads the targets, on a CPU only."""
    return torch.zeros(*target.shape, num_classes, dtype=torch.int64).scatter(-1, target[..., None], 1)


def peak_bytes(fn: Callable[[], Any]) -> int:
    """Most bytes allocated at any time of a call beyond what lived before it."""
    gc.collect()
    if not ON_CUDA:
        with StorageTracker() as tracker:
            fn()
        return tracker.peak
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fn()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def random_state() -> list[Tensor]:
    """Of the host, and of the device."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if ON_CUDA else [])]


def snapshot(run: fl.Engine) -> dict[str, Tensor]:
    """Parameters, buffers and optimizer state, copied."""
    found = dict(run.model.state_dict())
    for name, p in run.model.named_parameters():
        state = run.optimizer.state.get(p, {})
        found |= {f"{key} of {name}": t for key, t in state.items() if isinstance(t, Tensor)}
    return {name: t.clone() for name, t in found.items()}
