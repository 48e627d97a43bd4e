"""`StepSchedule`: the tasks of a step with a stage, a stream and a place in the round; and why some models have but one.

The engine works in rounds, one for each call of ``engine.step``. A task of stage s works in round r on step r - s.
``"sequential"``: one stream, all stages 0, the tasks in their order. ``"overlap"``: several streams, all stages 0.
``"pipeline"``: several streams, stages up to ``in_flight - 1``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastlocal.engine import _native
from fastlocal.engine._native import Pipeline
from fastlocal.engine.model import LocalModel
from fastlocal.engine.tasks import Edge, StepTasks, Task

_NEAR = 1.03  # rounds that are longer by less count as equal
SCHEDULES = ("sequential", "overlap", "pipeline")


@dataclass
class StepSchedule:
    """A schedule of one step's tasks.

    Attributes:
        kind: ``"sequential"``, ``"overlap"`` or ``"pipeline"``.
        tasks: in sequential order.
        edges: dependencies ``(u, v, distance)``: v of step t needs u of step t - distance.
        cost: seconds of each task.
        bytes_made, bytes_freed: per task.
        streams: how many tasks may run at once.
        plan: stage, stream and order.
        reasons: why other schedules do not serve, by their name.
        budgeted: whether a memory budget is kept, by the order of the plan's streams and its waits.
    """

    kind: str
    tasks: list[Task]
    edges: list[Edge]
    cost: list[float]
    bytes_made: list[int]
    bytes_freed: list[int]
    streams: int
    plan: Pipeline
    reasons: dict[str, str] = field(default_factory=dict)
    budgeted: bool = False

    def within_a_round(self) -> tuple[list[list[int]], list[int]]:
        """Per task, which tasks of the same round wait for it, and for how many it waits itself."""
        after: list[list[int]] = [[] for _ in self.tasks]
        waits = [0] * len(self.tasks)
        plan, stage = self.plan, self.plan.stage
        pairs = {(u, v) for u, v, distance in self.edges if stage[u] == stage[v] + distance}
        if self.budgeted:
            pairs |= {(u, v) for v, before in enumerate(plan.waits) for u in before}
            last: dict[int, int] = {}
            for v in plan.order:
                if plan.stream[v] in last:
                    pairs.add((last[plan.stream[v]], v))
                last[plan.stream[v]] = v
        for u, v in pairs:
            after[u].append(v)
            waits[v] += 1
        return after, waits


def make_schedule(
    kind: str,
    step: StepTasks,
    cost: Sequence[float],
    *,
    bytes_made: Sequence[int] | None = None,
    bytes_freed: Sequence[int] | None = None,
    streams: int = 2,
    in_flight: int = 2,
    memory_budget: int | None = None,
    by_block: bool = False,
    reasons: dict[str, str] | None = None,
) -> StepSchedule:
    """Schedules the tasks of a step.

    Args:
        kind: ``"sequential"``, ``"overlap"`` or ``"pipeline"``.
        step: tasks and dependencies.
        cost: seconds of each task.
        bytes_made, bytes_freed: per task; default 0.
        streams: how many tasks may run at once; of ``"sequential"`` always 1.
        in_flight: the most steps that may be on their way at once; counts for ``"pipeline"`` only.
        memory_budget: most bytes that the tasks may have alive.
        by_block: all tasks of a block on one stream, as on a GPU, where a backward runs on its forward's stream.

    Raises:
        ArgumentError: a budget that no order meets; it says by how much.
        BackendError: without the native extension, for all but ``"sequential"``.
    """
    tasks = step.tasks
    made, freed = (list(b) if b is not None else [0] * len(tasks) for b in (bytes_made, bytes_freed))
    streams, in_flight = (1, 1) if kind == "sequential" else (streams, in_flight if kind == "pipeline" else 1)
    if kind == "sequential" and memory_budget is None:
        plan = _in_order(step, list(cost), made, freed)
    else:
        plan = _native.pipeline(
            cost,
            step.edges,
            bytes_made=made,
            bytes_freed=freed,
            group=[task.block for task in tasks] if by_block else None,
            streams=streams,
            in_flight=in_flight,
            memory_budget=memory_budget,
            names=[task.name for task in tasks],
        )
    return StepSchedule(
        kind, tasks, step.edges, list(cost), made, freed, streams, plan, dict(reasons or {}), memory_budget is not None
    )


def best_schedule(kind: str, step: StepTasks, cost: Sequence[float], *, host: bool, **options: Any) -> StepSchedule:
    """`make_schedule` for a kind of device: a host's threads take any task, a GPU's streams all of a block.

    Of schedules that are as long as each other, within what costs are known to, the one that holds less.
    """
    tried = [
        make_schedule(kind, step, cost, by_block=by_block, **options)
        for by_block in ((True, False) if host else (True,))
    ]
    shortest = min(found.plan.period for found in tried)
    return min((found for found in tried if found.plan.period <= _NEAR * shortest), key=lambda f: f.plan.peak_bytes)


def _in_order(step: StepTasks, cost: list[float], made: list[int], freed: list[int]) -> Pipeline:
    """What needs no scheduler."""
    start, alive, peak, now = [], 0, 0, 0.0
    for seconds, more, less in zip(cost, made, freed, strict=True):
        start.append(now)
        now += seconds
        alive += more
        peak = max(peak, alive)
        alive -= less
    count = len(cost)
    blocks = 1 + max((task.block for task in step.tasks), default=-1)
    return Pipeline(
        order=list(range(count)), stage=[0] * count, stream=[0] * count, start=start, waits=[[] for _ in range(count)],
        period=now, in_flight=1, peak_bytes=peak, pools=[0] * blocks, operations=count,
    )  # fmt: skip


def refusal(model: LocalModel, *, casts: bool) -> str | None:
    """Why the steps of a model have but one order, with the remedy where there is one; None where they have more."""
    if len(model.blocks) == 1:
        return "one block leaves nothing to run beside it; use more blocks"
    if any(block.fns is None for block in model.blocks):
        return (
            f"{type(model.backbone).__name__} is cut by hooks, so the order of its units is known only to its own forward; "
            "give it units() and readout()"
        )
    if model.summed:
        return f"{model.method.name!r} has no gradient border: one backward takes the sum of all losses"
    if casts and model.window > 1 and model.links:
        return (
            f"links of {model.method.name!r} read float32 weights of blocks whose low-precision copies are in their place "
            "while its window is open; use precision='32-true'"
        )
    return None


def byte_counts(
    model: LocalModel, tasks: Sequence[Task], rows: int, batch_bytes: int, itemsize: int
) -> tuple[list[int], list[int]]:
    """Bytes that each task makes and frees, by what `fastlocal.localize` measured on its sample.

    A forward makes what its block and head save and the boundary activation, a backward the gradients.

    Args:
        rows: batch size.
        batch_bytes: of the batch, which lives from the first forward to the last backward.
        itemsize: bytes of one number of an activation.
    """
    made, freed = [0] * len(tasks), [0] * len(tasks)
    last = len(model.blocks) - 1
    at_end = tasks[-1].block < 0  # the update of all blocks together
    for i, task in enumerate(tasks):
        if task.block < 0:
            freed[i] = sum(made[j] for j in range(i) if tasks[j].kind == "backward")
            continue
        block = model.blocks[task.block]
        saved = block.cost.saved_bytes * rows * itemsize // 4
        boundary = rows * itemsize * _count(block.cost.boundary)
        grads = sum(p.numel() * p.element_size() for p in block.parameters() if p.requires_grad)
        if task.kind == "forward":
            made[i] = saved + boundary + (batch_bytes if task.block == 0 else 0)
        elif task.kind == "backward":
            made[i] = grads
            freed[i] = saved + (boundary + batch_bytes if task.block == last else 0)
        elif task.kind == "update" and not at_end:
            freed[i] = grads
        elif task.kind == "free":
            freed[i] = boundary
    return made, freed


def _count(shape: tuple[int, ...]) -> int:
    result = 1
    for n in shape:
        result *= n
    return result
