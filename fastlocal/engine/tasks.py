"""One training step as tasks and dependencies: what a method and a model compile to.

The tasks stand in their sequential order. What may run before or beside what follows from the things that they read and
write, and from nothing else: a task comes after the last writer of what it reads, and after all earlier users of what it
writes. Things that live on from step to step (a block's weights, BatchNorm statistics, averages) tie a task to tasks of
the step before; activations and gradients of a step are its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from fastlocal.blocks.block import Slot
from fastlocal.engine.model import LocalModel

Edge = tuple[int, int, int]  # u, v, distance: v of step t needs u of step t - distance
_SINGLE = {"forward", "head", "backward", "update"}


@dataclass(frozen=True)
class Task:
    """A piece of a step that runs as a whole.

    Attributes:
        kind: ``"forward"`` of a block; ``"head"``: its local loss and the gradient at its output (of the last block: the
            task loss); ``"backward"``: its own backward, and of the last block the loss's too; ``"link"``: rules by which
            weights feed other weights; ``"update"``; ``"free"``: its output is no longer needed.
        block: index of the block; -1 for the update of all blocks together (``update="end"``).
        random: whether it belongs to a block that draws random numbers.
        links: the links that a link task fires.
    """

    kind: str
    block: int
    random: bool = False
    links: tuple[Any, ...] = field(default=(), compare=False, repr=False)

    @property
    def name(self) -> str:
        """Such as ``"forward 3"``."""
        return self.kind if self.block < 0 else f"{self.kind} {self.block}"


@dataclass
class StepTasks:
    """The tasks of a step in sequential order, and their dependencies inside a step (distance 0) and on the one before (1)."""

    tasks: list[Task]
    edges: list[Edge]

    def after(self) -> list[list[Task]]:
        """Per block, the tasks from its forward to the next block's, in order; those before block 0 are left out."""
        runs: list[list[Task]] = []
        for task in self.tasks:
            if task.kind == "forward":
                runs.append([])
            elif runs:
                runs[-1].append(task)
        return runs


def sequence(model: LocalModel, update: str = "immediate") -> list[Task]:
    """The tasks of a step in the order in which ``schedule="sequential"`` runs them."""
    return list(_sequence(model, update))


def compile_step(
    model: LocalModel, update: str = "immediate", *, casts: bool = False, writes_input: Collection[int] = ()
) -> StepTasks:
    """Tasks and dependencies of a step.

    Args:
        model: cut into slices.
        update: as of `fastlocal.Engine`.
        casts: a block's weights are replaced by low-precision copies while it runs, so that no link may look at them then.
        writes_input: blocks whose first operator changes their input in place: they wait for all other readers of it.
    """
    tasks = sequence(model, update)
    access = _Access(model, update, casts, frozenset(writes_input))
    used = [access.of(task) for task in tasks]
    last_writer: dict[Any, tuple[int, int]] = {}
    readers: dict[Any, list[tuple[int, int]]] = defaultdict(list)
    edges: dict[Edge, None] = {}
    count = len(tasks)
    for step in (0, 1):
        for v, (reads, writes) in enumerate(used):
            before: set[tuple[int, int]] = set()
            own = [(name if name[0] in _LASTING else (*name, step), True) for name in writes]
            own += [(name if name[0] in _LASTING else (*name, step), False) for name in reads - writes]
            for key, written in own:
                if key in last_writer:
                    before.add(last_writer[key])
                if written:
                    before.update(readers[key])
            for key, written in own:
                if written:
                    last_writer[key], readers[key] = (step, v), []
                else:
                    readers[key].append((step, v))
            for at, u in before:
                if step == 1 and (at, u) != (1, v):
                    edges[(u, v, 1 - at)] = None
                elif step == 0 and u != v:
                    edges[(u, v, 0)] = None
    assert all(0 <= u < count and 0 <= v < count for u, v, _ in edges)
    return StepTasks(tasks, sorted(edges, key=lambda e: (e[1], e[0], e[2])))


def _sequence(model: LocalModel, update: str) -> Iterator[Task]:
    blocks, last, window = model.blocks, len(model.blocks) - 1, model.window
    own = _links_by_block(model)

    def task(kind: str, k: int, links: Iterable[Any] = ()) -> Task:
        return Task(kind, k, k >= 0 and blocks[k].random, tuple(links))

    def links(k: int) -> Iterator[Task]:
        if update == "immediate" and own.get(k):
            yield task("link", k, own[k])

    def close(k: int, fires: bool) -> Iterator[Task]:
        if fires:
            yield from links(k)
        yield task("update", k)

    def freed(ks: Iterable[int]) -> Iterator[Task]:
        return (task("free", k) for k in ks)

    for when in ("before_step", "before_forward"):
        for link in model.links:
            if link.when == when:
                yield Task("link", _home(model, link), False, (link,))
    for k in range(last):
        yield task("forward", k)
        yield task("head", k)
        if model.summed:
            continue
        done = k - window + 1
        if done >= 0:
            yield task("backward", done)
            yield from close(done, window == 1)
            yield from freed([done - 1] if done else [])
        if window > 1:
            yield from links(k)
    yield task("forward", last)
    yield task("head", last)
    yield task("backward", last)
    if model.summed:
        for k in range(last + 1):
            yield from close(k, True)
        yield from freed(range(last))
    else:
        for k in range(max(0, last - window + 1), last):
            if window > 1:
                yield task("backward", k)
                yield from close(k, False)
                yield from freed([k - 1] if k else [])
        yield from close(last, True)
        yield from freed([last - 1] if last else [])
    if update == "end":
        yield Task("update", -1, links=tuple(link for k in range(last + 1) for link in own.get(k, ())))


def _links_by_block(model: LocalModel) -> dict[int, list[Any]]:
    found: dict[int, list[Any]] = {}
    for block in model.blocks:
        mine = [link for link in block.links if link.when == "after_backward"]
        if mine:
            found[block.index] = mine
    return found


def _home(model: LocalModel, link: Any) -> int:
    """The block in which a link that belongs to none writes, for the name of its task."""
    if link.block >= 0:
        return link.block
    owner = _owners(model)
    return next((owner[key] for key in map(_key, link.frozen) if key in owner), 0)


def _key(slot: Slot) -> tuple[int, str]:
    return id(slot.module), slot.key


def _owners(model: LocalModel) -> dict[tuple[int, str], int]:
    """Which block a parameter or buffer belongs to."""
    return {
        _key(slot): block.index for block in model.blocks for slot in (*block.parameter_slots(), *block.buffer_slots())
    }


# Things that live from step to step: weights, statistics (with every other buffer), averages that links write, the place
# that low-precision copies take. Of one step: the boundary activation behind a block, what its head leaves, its gradients.
_LASTING = ("weights", "statistics", "averages", "place")


class _Access:
    """What every task reads and writes."""

    def __init__(self, model: LocalModel, update: str, casts: bool, writes_input: frozenset[int]):
        self.model, self.update, self.casts, self.writes_input = model, update, casts, writes_input
        self.count = len(model.blocks)
        self.owner = _owners(model)
        self.frozen = {_key(slot) for link in model.links for slot in link.frozen}
        # What a link writes is read by the block that owns it, or by nobody knows whom; in a head, by heads alone.
        heads = {_key(slot) for block in model.blocks for slot in block.head_slots()}
        outside = [_key(s) for link in model.links for s in link.frozen if _key(s) not in heads]
        loose = [_key(s) for link in model.links if not getattr(link, "private", False) for s in link.frozen]
        self.in_slices = {j for key in outside for j in ([self.owner[key]] if key in self.owner else range(self.count))}
        self.by_all = any(key not in heads for key in loose)
        self.by_heads = {self.owner[key] for key in loose if key in heads}

    def of(self, task: Task) -> tuple[set[Any], set[Any]]:
        k, model = task.block, self.model
        reads: set[Any] = set()
        writes: set[Any] = set()
        if task.kind in _SINGLE and k >= 0:
            reads.add(("weights", k))
        if task.kind in ("forward", "head", "backward"):
            own = {k} if task.kind == "head" or k in self.in_slices else set()
            shared = range(self.count) if self.by_all or model.summed else self.by_heads if task.kind == "head" else ()
            reads |= {("averages", j) for j in own.union(shared)}
        if task.kind == "forward":
            reads.add(("boundary", k - 1))
            writes |= {("statistics", k), ("boundary", k), ("graph", k)}
            if self.casts:
                writes.add(("place", k))
            if k in self.writes_input:
                writes.add(("boundary", k - 1))
        elif task.kind == "head":
            reads.add(("boundary", k))
            if model.method.reads_boundary:
                reads.add(("boundary", k - 1))
            # heads share what they compute once a step, so they run in order
            writes |= {("context",), ("statistics", k), ("owed", k)}
            for j in range(max(0, k - model.window + 1), k):  # the gradient is handed down through their graphs
                reads |= {("weights", j), ("boundary", j)}
                writes |= {("owed", j), ("graph", j)}
            for link in model.blocks[k].links:
                if link.when == "between_forward_and_backward":
                    self._link(link, reads, writes)
        elif task.kind == "backward":
            reads |= {("boundary", k), ("boundary", k - 1)}
            writes |= {("graph", k), ("owed", k), ("gradients", k)}
            if self.casts:
                writes.add(("place", k))
            if model.summed:
                every = range(self.count)
                reads |= {("weights", j) for j in every}
                writes |= {(name, j) for j in every for name in ("graph", "owed", "gradients")}
            elif k == self.count - 1:
                for j in range(max(0, k - model.window + 1), k):
                    reads.add(("weights", j))
                    writes |= {("owed", j), ("graph", j)}
        elif task.kind == "link":
            for link in task.links:
                self._link(link, reads, writes)
        elif task.kind == "update":
            for j in (k,) if k >= 0 else range(self.count):
                reads.add(("gradients", j))
                writes.add(("gradients", j))
                writes.add(("statistics", j))
                if self.update == "immediate" or k < 0:
                    writes.add(("weights", j))
            for link in task.links:
                self._link(link, reads, writes)
        elif task.kind == "free":
            writes.add(("boundary", k))
        return reads, writes

    def _link(self, link: Any, reads: set[Any], writes: set[Any]) -> None:
        every = range(self.count)
        source = getattr(link, "reads", None)
        if source is not None and all(_key(slot) in self.owner for slot in source):
            names = [self._name(slot) for slot in source]
        else:  # it may read anything
            names = [(name, j) for j in every for name in ("weights", "statistics", "averages")]
        reads.update(names)
        written = [self._name(slot) for slot in link.frozen if _key(slot) in self.owner]
        if len(written) < len(link.frozen):
            written = [("averages", j) for j in every]
        writes.update(("averages", j) for _, j in written)
        if self.casts:
            writes.update(("place", j) for _, j in (*names, *written))

    def _name(self, slot: Slot) -> tuple[str, int]:
        key = _key(slot)
        kind = "averages" if key in self.frozen else "weights" if slot.key in slot.module._parameters else "statistics"
        return kind, self.owner[key]
