"""The native extension, loaded when first needed. fastlocal works without it; what needs it says how to build it."""

from __future__ import annotations

import functools
import importlib
import shutil
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from fastlocal.errors import ArgumentError, BackendError

if TYPE_CHECKING:
    import numpy as np

HOW_TO_BUILD = (
    "to build it, install a C++17 compiler and pybind11, then run "
    "`FASTLOCAL_BUILD_EXT=1 pip install --no-build-isolation --no-deps -e .` in the source tree of fastlocal"
)


class Pipeline(NamedTuple):
    """A stage, a stream and a place in the round for every task of a training step.

    In round r a task of stage s works on step r - s; a round ends when all its tasks have ended. `order` lists the
    tasks of a round as they are dispatched, `stage`, `stream`, `start` (within the round) and `waits` have one entry
    per task. `waits` lists the tasks of the same round on other streams that a task must wait for; with the order of
    its own stream they imply every dependency, also in rounds that leave out the tasks of steps that do not exist, and
    none is implied by the others. `period` is the duration of a round, `in_flight` 1 + the largest stage. `peak_bytes`
    is the most that is alive at any dispatch of any round. `pools` has one entry per group: groups of one pool are
    never alive at the same time, whatever the durations; a group lives from the start of its first task of a step to
    the end of its last. A group that lives longer than a round overlaps itself in the next step; its pool is its own.
    `operations` counts the scheduler's own steps.
    """

    order: list[int]
    stage: list[int]
    stream: list[int]
    start: list[float]
    waits: list[list[int]]
    period: float
    in_flight: int
    peak_bytes: int
    pools: list[int]
    operations: int


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("fastlocal._native"), ""
    except ModuleNotFoundError as error:
        if error.name != "fastlocal._native":
            return None, f"fastlocal._native needs {error.name}, which is not installed; {HOW_TO_BUILD}"
        found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
        compiler = "a C++ compiler is installed" if found else "no C++ compiler was found"
        return None, f"fastlocal._native was not built ({compiler}); {HOW_TO_BUILD}"
    except ImportError as error:
        return None, f"fastlocal._native was built but does not load: {error}; {HOW_TO_BUILD}"


def available() -> bool:
    """Whether the native extension is built and loads."""
    return _load()[0] is not None


def why_not() -> str:
    """Why `available()` is False and what to do about it; empty if it is True."""
    return _load()[1]


def _integers(name: str, values: Any, shape: tuple[int, ...]) -> np.ndarray:
    import numpy as np

    array = np.asarray(values)
    if array.size == 0:
        array = np.zeros((0, *shape[1:]), np.int64)
    if array.dtype.kind not in "iu" or array.dtype == np.uint64:
        raise ArgumentError(f"{name} must hold 64-bit integers, got {array.dtype}")
    if array.ndim != len(shape) or any(n not in (-1, m) for n, m in zip(shape, array.shape, strict=True)):
        wanted = str(tuple("any" if n < 0 else n for n in shape)).replace("'", "")
        raise ArgumentError(f"{name} has shape {array.shape}; it must be {wanted}")
    return np.ascontiguousarray(array, np.int64)


def pipeline(
    cost: Sequence[float] | np.ndarray,
    edges: Sequence[tuple[int, int, int]] | np.ndarray,
    *,
    bytes_made: Sequence[int] | np.ndarray | None = None,
    bytes_freed: Sequence[int] | np.ndarray | None = None,
    group: Sequence[int] | np.ndarray | None = None,
    pinned: Sequence[int] | np.ndarray | None = None,
    streams: int = 1,
    in_flight: int = 1,
    memory_budget: int | None = None,
    names: Sequence[str] | None = None,
) -> Pipeline:
    """Software pipelining of a training step: rounds as short as can be found, with as few bytes alive as can be.

    Of the rounds found that are at most 2 % longer than the shortest of them, that with the lowest peak of bytes is
    taken, then with the fewest steps in flight. One step in flight is list scheduling inside a step. One stream and one
    step in flight give the tasks in the order of their indices, where that is topological and keeps the budget. The
    same result on every machine, whatever the order of `edges`. Finding the very best is NP-hard.

    Memory is counted along `order`: a task's `bytes_made` are alive from its start; its `bytes_freed` (its workspace,
    or what its predecessors made) are gone at every later dispatch that starts no earlier than it ends. Steps in
    flight add up. With a budget the peak holds whatever the durations: where it could be exceeded, `waits` also make a
    task wait for all that has ended when it starts. Without one it holds as far as the costs do.

    Args:
        cost: [N] duration of each task, in any unit; finite, not negative.
        edges: [E, 3] integers (u, v, distance): v of step t needs u of step t - distance. May be repeated.
        bytes_made, bytes_freed: [N] integers, not negative, of equal sums; default 0.
        group: [N] integers: tasks of one group run on one stream; -1 (default) for none. Number them from 0.
        pinned: [N] integers: the stream that a task must run on; -1 (default) for any.
        streams: how many tasks may run at once, at least 1.
        in_flight: how many steps may be under way in a round, at least 1.
        memory_budget: most bytes alive at any time; None for no limit.
        names: one per task, for error messages.

    Raises:
        ArgumentError: bad arguments; a cycle of distance 0 (its tasks are named); a step that frees more or less than
            it makes, or what is not alive; a budget that no order found keeps even with one step in flight (says by how
            much).
        BackendError: the native extension is not there; the message says why and how to build it.
    """
    import numpy as np

    if TYPE_CHECKING:
        from fastlocal import _native as native
    else:
        native = _load()[0]
    if native is None:
        raise BackendError(f"the scheduler needs the native extension: {why_not()}")
    costs = np.asarray(cost)
    if costs.ndim != 1 or (costs.size and costs.dtype.kind not in "iuf"):
        raise ArgumentError(f"cost must be a flat sequence of numbers, got shape {costs.shape} of {costs.dtype}")
    size = (len(costs),)
    for name, value in (
        ("streams", streams),
        ("in_flight", in_flight),
        ("memory_budget", 0 if memory_budget is None else memory_budget),
    ):
        if isinstance(value, bool) or not hasattr(value, "__index__") or not -(2**63) <= int(value) < 2**63:
            raise ArgumentError(f"{name} must be a 64-bit integer, got {value!r}")
    zero, none = np.zeros(size, np.int64), np.full(size, -1)
    try:
        return Pipeline(
            *native.pipeline(
                np.ascontiguousarray(costs, np.float64),
                _integers("bytes_made", zero if bytes_made is None else bytes_made, size),
                _integers("bytes_freed", zero if bytes_freed is None else bytes_freed, size),
                _integers("edges", edges, (-1, 3)),
                _integers("group", none if group is None else group, size),
                _integers("pinned", none if pinned is None else pinned, size),
                int(streams),
                int(in_flight),
                None if memory_budget is None else int(memory_budget),
                [str(name) for name in names] if names is not None else [],
            )
        )
    except ValueError as error:
        if isinstance(error, ArgumentError):
            raise
        raise ArgumentError(str(error)) from None
