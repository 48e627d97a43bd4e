"""What csrc/bindings.cpp defines. Arrays must be contiguous and of exactly these dtypes; addresses are integers."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

def pipeline(
    cost: NDArray[np.float64],
    bytes_made: NDArray[np.int64],
    bytes_freed: NDArray[np.int64],
    edges: NDArray[np.int64],
    group: NDArray[np.int64],
    pinned: NDArray[np.int64],
    streams: int,
    in_flight: int,
    memory_budget: int | None,
    names: Sequence[str],
) -> tuple[
    list[int], list[int], list[int], list[float], list[list[int]], float, int, int, list[int], int
]: ...  # fields of fastlocal.engine._native.Pipeline
def bn_act_forward(
    x: int,
    residual: int,
    y: int,
    weight: int,
    bias: int,
    running_mean: int,
    running_var: int,
    mean: int,
    rstd: int,
    rows: int,
    channels: int,
    momentum: float,
    eps: float,
    relu: bool,
    bf16: bool,
    threads: int,
    /,
) -> None: ...
def bn_act_backward(
    dy: int,
    x: int,
    y: int,
    dx: int,
    dresidual: int,
    weight: int,
    mean: int,
    rstd: int,
    dweight: int,
    dbias: int,
    rows: int,
    channels: int,
    relu: bool,
    bf16: bool,
    threads: int,
    /,
) -> None: ...
def shares_openmp() -> bool: ...

class CudaRuntime:
    def __init__(self, library: str, loaded: bool) -> None: ...
    @property
    def version(self) -> int: ...

class RoundExecutor:
    def __init__(
        self, runtime: CudaRuntime, segments: Sequence[tuple[str, int, int, Sequence[int]]], composed: bool
    ) -> None: ...
    def upload(self, stream: int) -> None: ...
    def launch(self, stream: int) -> None: ...
    def close(self) -> None: ...
    @property
    def nodes(self) -> int: ...
    @property
    def edges(self) -> int: ...
