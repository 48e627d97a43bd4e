"""Measures a `Device` on the machine at hand: what operators of training steps achieve there.

A few small networks run forward and backward while every operator is timed by itself: convolutions of 3 to 512 channels,
products and attention of 128 to 512 channels, normalisations, activations, pooling, cross-entropy, each in float32 and under
bfloat16 autocast. What an operator achieves is kept over its size: FLOP/s over the narrowest dimension of its matrices, or
bytes per second over the bytes it moves. The time between operators is that of a step of a tiny network by its launches.
"""

from __future__ import annotations

import functools
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from fastlocal.blocks.measure import LaunchCounter, _launches, _OpMode
from fastlocal.engine.engine import Engine
from fastlocal.engine.localize import localize
from fastlocal.engine.plan import _FLOPS, Curve, Device, work_of
from fastlocal.errors import ArgumentError

ROUNDS = 4  # of every network; the median of all but the first counts

Key = tuple[str, torch.dtype]


@functools.cache
def measure_device(kind: str | None = None, threads: int | None = None) -> Device:
    """Measures for some seconds, once per process.

    Args:
        kind: "cpu" or "cuda"; default "cuda" where there is one.
        threads: only for the cache: those of PyTorch at the time of the call.

    Raises:
        ArgumentError: another kind, or one that this machine does not have.
    """
    kind = kind or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise ArgumentError(f"device: cannot measure {kind!r} on this machine; use 'cpu'")
    device = torch.device(kind)
    points: dict[Key, list[tuple[float, float]]] = defaultdict(list)
    with torch.random.fork_rng(devices=[0] if kind == "cuda" else []):
        torch.manual_seed(0)
        for make, x in _networks(device):
            net = make().to(device)
            for dtype in (torch.float32, torch.bfloat16):
                _collect(net, x, dtype, points)
        launch = _between(device)
    rates = {key: _curve(found) for key, found in points.items()}
    adds = [rate for (name, _), curve in rates.items() if name == "aten::add" for _, rate in curve]
    flops = {
        dtype: max(r for (name, kind), c in rates.items() if kind is dtype and _is_product(name) for _, r in c)
        for dtype in (torch.float32, torch.bfloat16)
    }
    return Device(
        f"{_name(device)}, {torch.get_num_threads()} threads" if kind == "cpu" else _name(device),
        flops | {torch.float16: flops[torch.bfloat16], torch.float64: flops[torch.float32] / 2},
        statistics.median(adds),
        launch,
        torch.cuda.get_device_properties(device).total_memory if kind == "cuda" else None,
        rates=rates,
        waits=kind == "cpu",
    )


class _Timer(_OpMode):
    """Seconds of every operator by name, dtype and size."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.found: dict[tuple[Key, float, float], list[float]] = defaultdict(list)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        start = self._now()
        out = func(*args, **kwargs)
        seconds = self._now() - start
        if _launches(func, args, kwargs):
            flops, moved, size, dtype = work_of(func, args, kwargs, out)
            if dtype is not None:
                self.found[(func._schema.name, dtype), size, flops or moved].append(seconds)
        return out

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        raise AssertionError  # every operator is timed whole


def _collect(net: nn.Module, x: Tensor, dtype: torch.dtype, points: dict[Key, list[tuple[float, float]]]) -> None:
    timer = _Timer(x.device)
    cast = torch.autocast(x.device.type, dtype, cache_enabled=False) if dtype is not torch.float32 else nullcontext()
    for turn in range(ROUNDS):
        if turn == 1:
            timer.found.clear()  # the first turn chooses kernels and fills caches
        with timer:
            with cast:
                out = net(x)
            if out.dim() == 3:
                out = out.flatten(0, 1)
            nn.functional.cross_entropy(
                out.float(), torch.zeros(len(out), dtype=torch.int64, device=x.device)
            ).backward()
            out.argmax(1)
        for p in net.parameters():
            p.grad = None
    for (key, size, work), seconds in timer.found.items():
        if work:
            points[key].append((size, work / max(statistics.median(seconds), 1e-9)))


def _curve(points: list[tuple[float, float]]) -> Curve:
    """The median rate at every power of two of the size."""
    octaves: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for size, rate in points:
        octaves[max(int(size), 1).bit_length()].append((size, rate))
    return tuple(
        (statistics.median(s for s, _ in found), statistics.median(r for _, r in found))
        for _, found in sorted(octaves.items())
    )


def _is_product(name: str) -> bool:
    packet = getattr(torch.ops.aten, name.removeprefix("aten::"), None)
    return packet in flop_registry or packet in _FLOPS


class _Stack(nn.Sequential):
    """Convolutions with BatchNorm and ReLU on maps of side x side, a residual addition, pooling and a classifier."""

    def __init__(self, width: int) -> None:
        convolutions = [nn.Conv2d(c, width, 3, padding=1, bias=False) for c in (3, width, width)]
        super().__init__(*(nn.Sequential(conv, nn.BatchNorm2d(width)) for conv in convolutions))
        self.head = nn.Sequential(nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))

    def forward(self, x: Tensor) -> Tensor:
        stem, first, second, head = self
        h = stem(x).relu()
        return head((second(first(h).relu()) + h).relu())


class _Layer(nn.Module):
    """Attention and feed-forward with LayerNorm on tokens, and scores of every token."""

    def __init__(self, width: int, scores: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head = nn.Linear(width, scores)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, tokens, 3, width // 32, 32).permute(2, 0, 3, 1, 4)
        h = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.proj(h)
        return self.head(x + self.down(nn.functional.gelu(self.up(self.norm2(x)))))


def _networks(device: torch.device) -> list[tuple[Callable[[], nn.Module], Tensor]]:
    large = 8 if device.type == "cuda" else 1
    maps = [(16, 32, 32), (32, 16, 32), (64, 8, 32), (128, 32, 4), (256, 16, 8), (512, 4, 32), (16, 32, 4)]
    tokens = [(128, 64, 32, 10), (192, 64, 32, 10), (256, 128, 8, 8192), (384, 64, 16, 10), (512, 128, 4, 1000)]
    return [
        *((functools.partial(_Stack, w), torch.randn(large * n, 3, side, side, device=device)) for w, side, n in maps),
        *(
            (functools.partial(_Layer, w, scores), torch.randn(large * n, t, w, device=device))
            for w, t, n, scores in tokens
        ),
    ]


def _between(device: torch.device) -> float:
    """Seconds per launch of a step in which no operator has work."""
    torch.manual_seed(0)
    layers = (m for _ in range(8) for m in (nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()))
    net = nn.Sequential(*layers, nn.Linear(4, 2)).to(device)
    x, y = torch.randn(4, 4, device=device), torch.zeros(4, dtype=torch.int64, device=device)
    engine = Engine(localize(net, "dgl", blocks=3, sample=x), lambda named: torch.optim.SGD(named, 0.1, momentum=0.9))
    engine.step(x, y)
    with LaunchCounter() as counter:
        engine.step(x, y)
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        float(engine.step(x, y).losses[-1])
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) / counter.total


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
