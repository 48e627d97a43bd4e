"""`find_batch_size`: the largest batch that fits, planned on a CPU, tried out on an accelerator."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastlocal.blocks.batch import first_tensor
from fastlocal.engine.engine import Engine
from fastlocal.engine.localize import parse_bytes
from fastlocal.engine.optimizer import OptimizerFactory
from fastlocal.engine.plan import plan
from fastlocal.engine.rounds import WARM_UP
from fastlocal.errors import ArgumentError, OutOfMemoryError

_SHARE = 0.9  # of the free memory: allocators round up, and the rest of the process wants some too


def find_batch_size(
    engine: Engine, factory: OptimizerFactory, batch: Any, *, budget: str | float | None, largest: int, extra: int
) -> int:
    """See `Trainer.find_batch_size`. ``extra``: bytes besides the step's, such as an average of the weights."""
    if first_tensor(batch) is None:
        raise ArgumentError("batch: holds no tensor; give a batch as engine.step takes it")
    if budget is None and engine.device.type == "cuda":
        return _largest(lambda rows: _runs(engine, batch, rows), largest, "the device")
    limit = parse_bytes(budget) if budget is not None else int(_free_bytes() * _SHARE)
    options: dict[str, Any] = {
        "optimizer": factory,
        "precision": engine.precision,
        "update": engine.update,
        "memory_format": engine.memory_format,
        "device": "cpu-core",
        **_schedule(engine),
    }

    def peak(rows: int) -> int:
        return plan(engine.model, batch, rows=rows, **options).peak_bytes + extra

    return _below(peak, limit, largest)


def _below(peak: Callable[[int], int], limit: int, largest: int) -> int:
    """The most rows with ``peak(rows) <= limit``. Peaks are nearly straight lines, so a few plans find it."""
    good, at_good = 2, peak(2)
    if at_good > limit:
        raise ArgumentError(f"batch: two rows take {at_good:,} bytes, {limit:,} are there; use more blocks")
    bad, at_bad = min(64, largest), 0
    while bad <= largest:
        at_bad = peak(bad)
        if at_bad > limit:
            break
        slope = max(1.0, (at_bad - at_good) / max(1, bad - good))
        good, at_good = bad, at_bad
        if good == largest:
            return largest
        # a little beyond where the line meets the limit, to have a size on either side of it
        bad = min(largest, max(good + 1, int((good + (limit - at_good) / slope) * 17 / 16)))
    while bad - good > max(1, good // 16):
        meets = good + int((limit - at_good) * (bad - good) / (at_bad - at_good))
        middle = min(max(meets, good + 1), bad - 1)
        at_middle = peak(middle)
        if at_middle > limit:
            bad, at_bad = middle, at_middle
            continue
        good, at_good = middle, at_middle
        above = min(bad - 1, good + max(1, good // 16))
        if above > good and (at_above := peak(above)) > limit:
            bad, at_bad = above, at_above
        elif above > good:
            good, at_good = above, at_above
    return good


def _largest(fits: Callable[[int], bool], largest: int, what: str) -> int:
    """Doubles from 2, then halves the gap until it is a sixteenth."""
    good = 0
    bad = 2
    while bad <= largest and fits(bad):
        good, bad = bad, bad * 2
    if not good:
        raise ArgumentError(f"batch: not even two rows fit into {what}; use more blocks, or a smaller network")
    if bad > largest:
        if good == largest or fits(largest):
            return largest
        bad = largest
    while bad - good > max(1, good // 16):
        middle = (good + bad) // 2
        if fits(middle):
            good = middle
        else:
            bad = middle
    return good


def _runs(engine: Engine, batch: Any, rows: int) -> bool:
    """Whether real steps on that many rows fit; the engine and its model are put back."""
    model = engine.model
    weights = {name: t.detach().cpu().clone() for name, t in model.state_dict().items()}
    state = pytree.tree_map(lambda t: t.cpu() if isinstance(t, Tensor) else t, engine.state_dict())
    outside = torch.get_rng_state(), torch.cuda.get_rng_state(engine.device)
    training = model.training
    policy, engine.nonfinite = engine.nonfinite, "skip"
    model.train()
    try:
        wide = pytree.tree_map(lambda t: _rows(t, rows).to(engine.device) if isinstance(t, Tensor) else t, batch)
        for _ in range(_steps(engine)):
            engine.step(wide)
        engine.flush()
        torch.cuda.synchronize(engine.device)
    except OutOfMemoryError:
        return False
    finally:
        wide = None
        torch.cuda.empty_cache()
        engine.nonfinite = policy
        model.load_state_dict(weights)
        engine.load_state_dict(state)
        model.train(training)
        torch.set_rng_state(outside[0])
        torch.cuda.set_rng_state(outside[1], engine.device)
    return True


def _schedule(engine: Engine) -> dict[str, Any]:
    """What `plan` must know of a schedule; of "auto", the one that it may choose."""
    rounds, chooser = engine._rounds, engine._chooser
    if rounds is not None:
        return {"schedule": rounds.kind, "streams": rounds.workers, "in_flight": rounds.in_flight}
    if chooser is not None and chooser.choice is None:
        kind = "pipeline" if chooser._in_flight > 1 else "overlap"
        return {"schedule": kind, "streams": chooser._workers, "in_flight": chooser._in_flight}
    return {}


def _steps(engine: Engine) -> int:
    """The second has the optimizer's state; in a schedule, as many as fill it once costs are known."""
    return 2 if engine._rounds is None else WARM_UP + engine._rounds.in_flight + 1


def _rows(t: Tensor, rows: int) -> Tensor:
    if t.dim() == 0:
        return t
    return t[torch.arange(rows, device=t.device) % len(t)]


def _free_bytes() -> int:
    """Memory that the host can still give without swapping."""
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
