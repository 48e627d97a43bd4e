"""What a training has measured so far, epoch by epoch, and its CSV file."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median


@dataclass(frozen=True)
class Epoch:
    """One epoch: its number from 0, each block's mean training loss, test accuracy (0 to 1), and times.

    ``step_seconds`` is the wall time of each step; empty on an accelerator, where a step returns before it is done.
    """

    number: int
    losses: list[float]
    test_accuracy: float
    lr: float
    seconds: float
    steps: int
    step_seconds: list[float] = field(default_factory=list, repr=False)


@dataclass
class History:
    """The epochs of a training, in order."""

    epochs: list[Epoch] = field(default_factory=list)

    @property
    def test_accuracy(self) -> float:
        """After the last epoch."""
        return self.epochs[-1].test_accuracy

    @property
    def steps_per_second(self) -> float:
        """One over the median step time, or steps over seconds where single steps were not timed.

        The very first steps, which also allocate and choose kernels, weigh no more than any other in a median.
        """
        steps = [seconds for epoch in self.epochs for seconds in epoch.step_seconds]
        if steps:
            return 1 / median(steps)
        return sum(epoch.steps for epoch in self.epochs) / sum(epoch.seconds for epoch in self.epochs)

    def write(self, path: str | Path) -> None:
        """Writes a CSV file: a line per epoch, a column per block's loss."""
        names = ["epoch", "steps", "seconds", "lr", "test_accuracy"]
        blocks = len(self.epochs[0].losses) if self.epochs else 0
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*names, *(f"loss_{k}" for k in range(blocks))])
            for e in self.epochs:
                row = [e.number, e.steps, f"{e.seconds:.3f}", f"{e.lr:.6g}", f"{e.test_accuracy:.5f}"]
                writer.writerow([*row, *(f"{loss:.5f}" for loss in e.losses)])
