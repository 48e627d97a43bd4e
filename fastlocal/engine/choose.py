"""`Chooser`: ``schedule="auto"`` on a CPU. Measures steps of both kinds and stays with the faster."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastlocal.engine import _native
from fastlocal.engine.rounds import Rounds

if TYPE_CHECKING:
    from fastlocal.engine.engine import Engine

_SETTLING = 3  # steps that are not timed, first of all
_TIMED = 5
_GAIN = 0.95  # of the time of a sequential step: what another schedule must stay below to be worth it


class Chooser:
    """Times sequential steps, then, where the costs of its tasks promise a gain, steps of a schedule with several workers.

    All of these are steps of the training. A batch of another size is not timed; several in a row begin anew. The choice is
    made once, and is part of the engine's state, so that a resumed run goes on with it.

    Args:
        engine: complete but for this.
        workers, in_flight, memory_budget: see `Engine`.

    Attributes:
        choice: ``"sequential"``, ``"overlap"`` or ``"pipeline"``; None while it is open.
    """

    def __init__(self, engine: Engine, workers: int, in_flight: int, memory_budget: int | None):
        self._engine, self._workers, self._in_flight, self._budget = engine, workers, in_flight, memory_budget
        self.choice: str | None = None
        self._why = ""
        self._size: torch.Size | None = None
        self._others = 0  # batches of another size in a row
        self._skip, self._before, self._planned = _SETTLING, 0.0, False
        self._times: list[float] = []

    @staticmethod
    def refusal(engine: Engine) -> str | None:
        """Why there is nothing to choose from."""
        if engine.device.type != "cpu":
            return "'auto' is sequential on a GPU, where other schedules have not been measured; ask for them by name"
        if not _native.available():
            return f"others need the native scheduler: {_native.why_not()}"
        if torch.get_num_threads() < 2:
            return "PyTorch has one thread here, which leaves none for a second worker"
        if engine.deterministic:
            return "with deterministic=True nothing may depend on how fast a step was; ask for other schedules by name"
        if any(block.random for block in engine.model.blocks):
            return "blocks draw random numbers, which only the calling thread may do"
        if engine.update != "immediate" or engine.graph == "on" or engine.compile is not None:
            return "with update='end', graph='on' or compile= other schedules must be asked for by name"
        return None

    def note(self, seconds: float, x: Tensor | None) -> None:
        """A step took so long."""
        if self.choice is not None:
            return
        engine, rounds = self._engine, self._engine._rounds
        if x is None or x.shape == self._size:
            self._others = 0
        elif self._size is not None and self._others + 1 < _TIMED:  # such as the last batch of an epoch
            self._others += 1
            self._skip = max(self._skip, 1 if rounds is None else rounds.in_flight)
            return
        else:
            if self._size is not None:
                self._sequential("")
                self._restart()
            self._size = x.shape
        if rounds is not None and rounds.refused:
            self._sequential(rounds.refused)
            return
        if self._skip:
            self._skip -= 1
            return
        if rounds is not None and rounds.schedule is not None and not self._planned:
            self._planned = True
            period = rounds.schedule.plan.period
            if period > _GAIN * self._before:
                self._sequential(f"a round would take {period * 1e3:.1f} ms by the costs of its tasks")
            self._skip = rounds.in_flight
            return
        if rounds is not None and rounds.schedule is None:
            return
        self._times.append(seconds)
        if len(self._times) < _TIMED:
            return
        found = statistics.median(self._times)
        self._times.clear()
        if rounds is None:
            self._before = found
            self._start("pipeline" if self._in_flight > 1 else "overlap")
        elif found <= _GAIN * self._before:
            self.choice = rounds.kind
            self._why = f"{found * 1e3:.1f} ms a step, in sequence {self._before * 1e3:.1f}"
        else:
            self._sequential(f"{rounds.kind} took {found * 1e3:.1f} ms a step")
        assert engine._rounds is None or self.choice != "sequential"

    def choose(self, choice: str) -> None:
        """What a run that was saved had chosen."""
        if choice == "pipeline" and self._in_flight == 1:  # which this run does not want
            choice = "overlap"
        self.choice, self._why = choice, "as in the run that was resumed"
        if choice == "sequential":
            self._sequential(self._why)
        elif self._engine._rounds is None:
            self._start(choice)

    def overlap_only(self) -> Rounds:
        """Hooks on the optimizer's steps have come, which a pipeline has no moment for."""
        engine = self._engine
        engine._settle()
        self._in_flight = 1
        self._start("overlap")
        if self.choice is None:  # times of an overlap are still to be taken
            self._planned = False
            self._times.clear()
        else:
            self.choice, self._why = "overlap", "hooks are registered on the steps of the optimizer"
        assert engine._rounds is not None
        return engine._rounds

    def accumulating(self) -> None:
        """Micro-batches run in sequence, and with all threads where nothing else is worth it any more."""
        if self.choice != "sequential":
            self._before = 0.0
            self._sequential("micro-batches are accumulated, which run in sequence")

    def explain(self) -> str:
        if self.choice is None:
            return "'auto' is still measuring"
        return f"'auto' chose {self.choice}: {self._why}"

    def _start(self, kind: str) -> None:
        engine = self._engine
        engine._rounds = Rounds(
            engine, kind, self._workers, 1 if kind == "overlap" else max(2, self._in_flight), self._budget
        )

    def _sequential(self, why: str) -> None:
        engine = self._engine
        engine._settle()
        if engine._rounds is not None and engine._cast:
            engine._cast.let_live(engine.model.window)
        engine._rounds = None
        self.choice = "sequential"
        self._why = f"{why}, in sequence {self._before * 1e3:.1f}" if self._before else why

    def _restart(self) -> None:
        self.choice, self._others = None, 0
        self._skip, self._before, self._planned = _SETTLING, 0.0, False
        self._times.clear()
