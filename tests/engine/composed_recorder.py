"""Captured and composed CUDA graphs on a CPU: pieces are recorded, composed by the native executor on the fake runtime, and
played operator by operator in an order that the runtime was told to allow, beside one another where it does.

What bites on a device bites here. Memory that a captured tensor leaves goes to the next one in its pool, also in later
captures; a product writes to the workspace of the stream that it was captured on before it writes its result; memory that
nobody holds is gone; what was only captured has computed nothing, and its memory holds garbage.
"""

from __future__ import annotations

import functools
import random
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastlocal.engine import _native
from tests.csrc.fake_cuda import FakeCuda, play
from tests.engine.recorder import READS, _one_hot

PRODUCTS = ("mm", "addmm", "bmm", "convolution", "convolution_backward")


def _map(kind: type, f: Callable[[Any], Any], x: Any) -> Any:
    """``f`` of everything of a type in the arguments or results of an operator."""
    if isinstance(x, kind):
        return f(x)
    if isinstance(x, (list, tuple)):
        return type(x)(_map(kind, f, v) for v in x)
    return {k: _map(kind, f, v) for k, v in x.items()} if isinstance(x, dict) else x


def _leaves(x: Any) -> list[Any]:
    if isinstance(x, (list, tuple)):
        return [leaf for v in x for leaf in _leaves(v)]
    return [leaf for v in x.values() for leaf in _leaves(v)] if isinstance(x, dict) else [x]


class Block:
    """Memory of a pool, for one tensor at a time."""

    def __init__(self, nbytes: int):
        self.memory = torch.empty(nbytes, dtype=torch.uint8)
        self.address = self.memory.data_ptr()
        self.launched = False

    def fresh(self) -> torch.UntypedStorage:
        """A storage over this memory that can die while the memory stays."""
        return torch.from_numpy(self.memory.numpy()).untyped_storage()


class Pool:
    def __init__(self) -> None:
        self.free: dict[int, list[Block]] = {}
        self.blocks: dict[int, Block] = {}  # by address
        self._watched: dict[int, Any] = {}

    def take(self, t: Tensor, touch: Callable[[Block], None]) -> Block:
        """Moves a new tensor here."""
        nbytes = t.untyped_storage().nbytes()
        free = self.free.get(nbytes)
        block = free.pop() if free else Block(nbytes)
        touch(block)
        self.blocks[block.address] = block
        storage = block.fresh()
        moved = torch.empty(0, dtype=t.dtype).set_(storage, t.storage_offset(), t.shape, t.stride())  # type: ignore[call-overload]
        moved.copy_(t)
        t.set_(storage, t.storage_offset(), t.shape, t.stride())  # type: ignore[call-overload]
        self._watched[block.address] = weakref.ref(storage, lambda _, b=block, n=nbytes: self._leave(b, n))
        return block

    def _leave(self, block: Block, nbytes: int) -> None:
        self._watched.pop(block.address, None)
        self.free.setdefault(nbytes, []).append(block)


@dataclass(frozen=True)
class Place:
    """Where a tensor was when it was recorded: a block of a pool, or memory of somebody else, which is not held."""

    memory: Any
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def tensor(self) -> Tensor:
        if isinstance(self.memory, Block):
            storage = self.memory.fresh()
        else:
            storage = self.memory()
            assert storage is not None, "a graph reads memory that was freed"
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.shape, self.stride)  # type: ignore[call-overload]


class Call(NamedTuple):
    func: Any
    args: Any
    kwargs: Any
    out: Any
    product: bool


class Recorded:
    """A captured graph, with its own pool and those that it reads."""

    def __init__(self, cuda: FakeCuda, calls: list[Call], pool: Pool, stream: int, blocks: list[Block]):
        self.calls, self._pool, self.stream, self.blocks = calls, pool, stream, blocks
        self._handle = cuda.graph()
        self.number = cuda.number(self._handle)
        weakref.finalize(self, cuda.free, self._handle)

    def raw_cuda_graph(self) -> int:
        return self._handle


class _Recording(TorchDispatchMode):
    def __init__(self, pool: Pool, blocks: Any, touched: dict[Block, Tensor]):
        super().__init__()
        self._touched = touched
        self.calls: list[Call] = []
        self.before: dict[int, tuple[Any, Tensor]] = {}  # memory of others, as it was
        self.blocks: list[Block] = []
        self._known = blocks
        self.fail_at: str | None = None
        self._pool = pool

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in READS or name == self.fail_at:
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        known = set()
        for t in _leaves((args, kwargs)):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                at = storage.data_ptr()
                known.add(at)
                self._touch(self._block(at))
                if self._block(at) is None and at not in self.before:
                    self.before[at] = (storage, torch.empty(0, dtype=torch.uint8).set_(storage).clone())  # type: ignore[call-overload]
        given = _map(Tensor, self._place, (args, kwargs))
        out = func(*args, **kwargs)
        for t in _leaves(out):
            at = t.untyped_storage().data_ptr() if isinstance(t, Tensor) else 0
            if at and at not in known and self._block(at) is None and at not in self.before:
                block = self._pool.take(t, self._touch)
                self._known[block.address] = block
                self.blocks.append(block)
        self.calls.append(Call(func, *given, _map(Tensor, self._place, out), name in PRODUCTS))
        return out

    def _touch(self, block: Block | None) -> None:
        """A capture computes nothing: what a step in flight has in this memory is put back before it goes on."""
        if block is not None and block.launched and block not in self._touched:
            self._touched[block] = block.memory.clone()

    def _block(self, at: int) -> Block | None:
        return self._known.get(at)

    def _place(self, t: Tensor) -> Place:
        storage = t.untyped_storage()
        memory: Any = self._block(storage.data_ptr()) or weakref.ref(storage)
        if not storage.nbytes():
            memory = functools.partial(torch.UntypedStorage, 0)
        return Place(memory, t.dtype, t.shape, t.stride(), t.storage_offset())


class Composer:
    """The place of `fastlocal.engine.composed.CudaComposer` in tests.

    Args:
        composed: as there.
        seed: of the orders in which rounds are played; None is the first in line, -1 the last.

    Attributes:
        one_workspace: all streams share one, as if all had been captured on one stream.
    """

    rate_dtype = torch.float64

    def __init__(self, device: torch.device | None = None, *, composed: bool = True, seed: int | None = 0):
        self.cuda = FakeCuda()
        self._composed, self._seed = composed, seed
        self._rng = random.Random(seed)
        self._main = self.cuda.stream()
        self._graphs: weakref.WeakValueDictionary[int, Recorded] = weakref.WeakValueDictionary()
        self._blocks: weakref.WeakValueDictionary[int, Block] = weakref.WeakValueDictionary()
        self._touched: dict[Block, Tensor] = {}
        self._workspaces: dict[int, Tensor] = {}
        self.one_workspace = False
        self.captures = self.launches = self.warm = 0
        self.fail_at: str | None = None
        self.capturing = False

    @contextmanager
    def warm_up(self) -> Iterator[None]:
        self.warm += 1
        yield

    def new_pool(self) -> Pool:
        return Pool()

    def begin(self) -> None:
        pass

    def capture(self, run: Callable[[], None], stream: int, pool: Pool) -> Recorded:
        recording = _Recording(pool, self._blocks, self._touched)
        recording.fail_at = self.fail_at
        state = torch.get_rng_state()
        self.capturing = True
        try:
            with recording, mock.patch("torch.nn.functional.one_hot", _one_hot):
                run()
        finally:
            self.capturing = False
            for storage, content in recording.before.values():
                torch.empty(0, dtype=torch.uint8).set_(storage).copy_(content)  # type: ignore[call-overload]
            torch.set_rng_state(state)
        self.captures += 1
        made = Recorded(self.cuda, recording.calls, pool, stream, recording.blocks)
        self._graphs[made.number] = made
        return made

    def compose(self, segments: list[tuple[str, int, int, list[int]]]) -> Any:
        native: Any = _native._load()[0]
        made = native.RoundExecutor(self.cuda.runtime, segments, self._composed)
        made.upload(self._main)
        return made

    def launch(self, round_: Any) -> None:
        for block, content in self._touched.items():
            block.memory.copy_(content)
        self._touched.clear()
        self.cuda.clear()
        round_.launch(self._main)
        self.launches += 1
        self.played = play(self.cuda.ops(), self._work, self._seed if self._seed in (None, -1) else self._rng.random())

    def _work(self, graph: int) -> list[Callable[[], Any]]:
        recorded = self._graphs.get(graph)
        assert recorded is not None, "a captured graph is gone, and its memory with it"
        for block in recorded.blocks:
            if not block.launched:
                block.launched = True
                block.memory.fill_(255)  # NaN, -1
        work: list[Callable[[], Any]] = []
        for call in recorded.calls:
            if call.product:
                work.append(lambda c=call: self._begin_product(c, recorded.stream))
                work.append(lambda c=call: self._end_product(c, recorded.stream))
            else:
                work.append(lambda c=call: _again(c))
        return work

    def _begin_product(self, call: Call, stream: int) -> None:
        args, kwargs = _map(Place, Place.tensor, (call.args, call.kwargs))
        self._workspaces[0 if self.one_workspace else stream] = call.func(*args, **kwargs)

    def _end_product(self, call: Call, stream: int) -> None:
        _deliver(call.out, self._workspaces[0 if self.one_workspace else stream])


def _again(call: Call) -> None:
    args, kwargs = _map(Place, Place.tensor, (call.args, call.kwargs))
    _deliver(call.out, call.func(*args, **kwargs))


def _deliver(places: Any, out: Any) -> None:
    for place, new in zip(_leaves(places), _leaves(out), strict=True):
        if isinstance(place, Place):
            old = place.tensor()
            if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                if old.shape != new.shape:  # another product's result was left in the workspace
                    new = torch.full_like(old, -1)
                old.copy_(new)
