"""The CUDA runtime of fake_cuda.cpp: built once, asked what it was told to run, and in which orders that may happen."""

from __future__ import annotations

import ctypes
import functools
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fastlocal.engine import _native

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"


def compiler() -> str:
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if found is None:
        pytest.skip("the fake CUDA runtime needs a C++ compiler")
    return found


def build(*command: str | Path) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@functools.cache
def _library() -> tuple[Path, tempfile.TemporaryDirectory[str]]:
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "libfake_cuda.so"
    build(compiler(), "-std=c++17", "-O0", "-shared", "-fPIC", "-o", path, HERE / "fake_cuda.cpp")
    return path, folder


@dataclass
class Op:
    """Something that happens on the device, after others. ``graph`` is the number of a captured graph, or None."""

    graph: int | None
    after: set[int] = field(default_factory=set)


class FakeCuda:
    """A runtime of its own: a copy of the library, which knows nothing of the others."""

    _copies = 0

    def __init__(self) -> None:
        native: Any = _native._load()[0]
        built = _library()[0]
        FakeCuda._copies += 1
        self.path = built.with_name(f"libfake_cuda_{FakeCuda._copies}.so")
        shutil.copyfile(built, self.path)
        self.lib = ctypes.CDLL(str(self.path))
        for name in ("fake_graph", "fake_stream"):
            getattr(self.lib, name).restype = ctypes.c_size_t
            getattr(self.lib, name).argtypes = [ctypes.POINTER(ctypes.c_int)]
        for name in ("fake_log", "fake_contents"):
            getattr(self.lib, name).restype = ctypes.c_char_p
        for name in ("fake_free_graph", "fake_free_stream"):
            getattr(self.lib, name).argtypes = [ctypes.c_size_t]
        self.runtime = native.CudaRuntime(str(self.path), False)
        self._numbers: dict[int, int] = {}

    def graph(self) -> int:
        """The handle of a captured graph."""
        number = ctypes.c_int()
        handle = self.lib.fake_graph(ctypes.byref(number))
        self._numbers[handle] = number.value
        return handle

    def stream(self) -> int:
        number = ctypes.c_int()
        handle = self.lib.fake_stream(ctypes.byref(number))
        self._numbers[handle] = number.value
        return handle

    def number(self, handle: int) -> int:
        return self._numbers[handle] if handle else 0

    def free(self, handle: int) -> None:
        self.lib.fake_free_graph(handle)

    def fail_at(self, call: int) -> None:
        """The ``call``-th call from now on fails; none does with 0."""
        self.lib.fake_fail_at(call)

    @property
    def calls(self) -> int:
        """Since the last `fail_at`."""
        return self.lib.fake_calls()

    @property
    def alive(self) -> int:
        """Graphs, executable graphs, streams and events that were made and not destroyed."""
        return self.lib.fake_alive()

    @property
    def misuse(self) -> int:
        return self.lib.fake_misuse()

    @property
    def log(self) -> list[list[str]]:
        return [line.split() for line in self.lib.fake_log().decode().splitlines()]

    def clear(self) -> None:
        self.lib.fake_clear_log()

    def contents(self, executable: int) -> list[list[int]]:
        """Of each node, its captured graph, and then the nodes before it."""
        lines = self.lib.fake_contents(executable).decode().splitlines()
        return [list(map(int, line.split())) for line in lines]

    def ops(self) -> list[Op]:
        """What the log puts on the device, and the order that streams, events and the edges of graphs give it."""
        ops: list[Op] = []
        tail: dict[int, int] = {}
        events: dict[int, int] = {}

        def put(graph: int | None, after: Iterable[int]) -> int:
            ops.append(Op(graph, set(after)))
            return len(ops) - 1

        for what, *rest in self.log:
            if what not in ("launch", "record", "wait"):
                continue
            which, stream = map(int, rest)
            before = [tail[stream]] if stream in tail else []
            if what == "record":
                events[which] = tail[stream] = put(None, before)
            elif what == "wait":
                tail[stream] = put(None, [*before, events[which]])
            else:
                start, own = put(None, before), []
                for graph, *after in self.contents(which):
                    own.append(put(graph, [start, *(own[i] for i in after)]))
                tail[stream] = put(None, [start, *own])
        self.tails = tail
        return ops


def reach(ops: Sequence[Op]) -> list[set[int]]:
    """Per op, all ops before it."""
    before: list[set[int]] = []
    for op in ops:
        before.append(set(op.after).union(*(before[i] for i in op.after)))
    return before


def play(ops: Sequence[Op], work: Callable[[int], Sequence[Callable[[], Any]]], seed: int | None) -> list[int]:
    """Carries out the work of all graphs, piece by piece, beside one another where the order allows it.

    Args:
        ops: from `FakeCuda.ops`.
        work: gives the pieces of a captured graph.
        seed: of the order; None takes what came first, -1 what came last.

    Returns:
        The graphs in the order in which they ended.
    """
    rng = random.Random(seed)
    missing = [set(op.after) for op in ops]
    after: list[list[int]] = [[] for _ in ops]
    for i, op in enumerate(ops):
        for j in op.after:
            after[j].append(i)
    active = {i: iter(()) if op.graph is None else iter(work(op.graph)) for i, op in enumerate(ops) if not op.after}
    ended: list[int] = []
    while active:
        i = min(active) if seed is None else max(active) if seed == -1 else rng.choice(list(active))
        piece = next(active[i], None)
        if piece is not None:
            piece()
            continue
        del active[i]
        graph = ops[i].graph
        if graph is not None:
            ended.append(graph)
        for j in after[i]:
            missing[j].discard(i)
            if not missing[j]:
                graph = ops[j].graph
                active[j] = iter(()) if graph is None else iter(work(graph))
    assert len(ended) == sum(op.graph is not None for op in ops), "what was launched waits for what never comes"
    return ended
