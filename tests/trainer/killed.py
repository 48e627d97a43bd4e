"""Runs that are killed at arbitrary points and resumed, until they end: what `make soak` does in full, and a test in short.

Every case trains once without interruption, and once more with SIGKILL at ten points: a number of batches, then a random
fraction of a step later, which may be in a forward, an update, a validation, a row of a log or a half-written checkpoint.
Both must leave the same bytes: the last checkpoint's files, metrics.csv and steps.csv.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

METHODS: dict[str, dict[str, Any]] = {
    "bp": {},
    "dgl": {},
    "predsim": {},
    "auglocal": {"depth": 2},
    "infopro": {"lam": (0.1, 0.5)},
    "infopro-ce": {"loss": "cross_entropy", "lam": (0.1, 0.5)},
}
EPOCHS, BATCH, SAMPLES = 3, 8, 92  # 12 batches an epoch, the last of four samples


class Halt(Exception):
    pass


class Progress:
    """Raises in a callback once that many batches were given."""

    def __init__(self, at: int):
        self.at, self.reached = at, -1

    @property
    def value(self) -> int:
        return self.reached

    @value.setter
    def value(self, seen: int) -> None:
        self.reached = seen
        if seen >= self.at:
            raise Halt


@dataclass(frozen=True)
class Case:
    """One run: a method, a precision, and micro-batches an update.

    ``extras`` turns on what keeps state of its own: average (not with a pipeline), mixing, dropout, clipping, a DataLoader
    with random augmentation, and one random stream per block. ``schedules`` are those of the killed run, another one after
    each kill; the run that it is compared with is sequential.
    """

    method: str
    precision: str = "32-true"
    accumulate: int = 1
    extras: bool = False
    optimizer: str = "sgd"
    options: dict[str, Any] = field(default_factory=dict)
    schedules: tuple[str, ...] = ("auto",)

    def __str__(self) -> str:
        words = [self.method, self.precision, f"accumulate={self.accumulate}", self.optimizer]
        words += ["extras"] if self.extras else []
        return " ".join([*words, *(["-".join(self.schedules)] if self.schedules != ("auto",) else [])])


def everything() -> list[Case]:
    """Every method with both precisions and with accumulation, plus the extras; and again by other schedules."""
    plain = itertools.product(METHODS, ("32-true", "bf16-mixed"), (1, 5))
    cases = [Case(m, p, a) for m, p, a in plain]
    cases += [Case(m, p, 5, True, "adamw") for m in ("dgl", "auglocal") for p in ("32-true", "bf16-mixed")]
    for precision in ("32-true", "bf16-mixed"):
        cases += [Case(m, precision, schedules=("pipeline",)) for m in METHODS if m != "bp"]  # which has one block
        cases += [Case("dgl", precision, 5, schedules=("pipeline", "overlap"))]
        cases += [Case("auglocal", precision, 1, True, "adamw", schedules=("overlap", "sequential"))]
        cases += [Case(m, precision, 1, True, "adamw", schedules=MIXED) for m in ("dgl", "infopro")]
    return cases


MIXED = ("pipeline", "sequential", "pipeline", "overlap")


def train(case: Case, folder: str, progress: Any, schedule: str = "auto") -> None:
    """One process's part: goes on with the run in ``folder`` to its end."""
    import numpy as np
    import torch

    import fastlocal as fl
    from fastlocal import data, models
    from fastlocal.trainer import Callback, EarlyStopping, optimizers

    torch.set_num_threads(1)
    torch.manual_seed(0)  # the three states are in the checkpoints, so they must begin alike
    random.seed(0)
    np.random.seed(0)
    made = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (SAMPLES + 16, 3, 8, 8), dtype=torch.uint8, generator=made)
    labels = torch.arange(SAMPLES + 16) % 10
    images = data.Images(
        pixels[:SAMPLES],
        labels[:SAMPLES],
        pixels[SAMPLES:],
        labels[SAMPLES:],
        10,
        torch.full((3,), 0.5),
        torch.ones(3),
        "noise",
    )
    if case.extras:
        source: Any = torch.utils.data.DataLoader(_Jittered(pixels[:SAMPLES], labels[:SAMPLES]), BATCH, shuffle=True)
    else:
        source = data.Batches(images, batch_size=BATCH, crop=1, flip=True)
    name = case.method.removesuffix("-ce")
    net = models.ResNetCIFAR(2, width=4, dropout=0.1 if case.extras else 0.0)
    blocks = 1 if name == "bp" else 5
    model = fl.localize(net, name, blocks=blocks, sample=torch.zeros(2, 3, 8, 8), **METHODS[case.method])
    assert (len(model.blocks) == 1) == (name == "bp")

    class Report(Callback):
        def on_step_end(self, trainer: Any, output: Any) -> None:
            progress.value = trainer.seen

    make = optimizers.sgd(0.05) if case.optimizer == "sgd" else optimizers.adamw(1e-3)
    extras: dict[str, Any] = {}
    if case.extras:
        extras = {
            "ema": None if "pipeline" in case.schedules else 0.9,
            "clip": 1.0,
            "recalibrate": 4,
            "deterministic": True,
            "mixing": data.Mixing(mixup=0.3, cutmix=1.0, smoothing=0.1),
        }
    trainer = fl.Trainer(
        model, make, scheduler=("cosine", {"warmup_epochs": 1}), precision=case.precision, accumulate=case.accumulate,
        schedule=schedule, folder=folder, save_every=3, log_every=2, progress=False, keep_last=2,
        callbacks=[Report(), EarlyStopping("val_loss", mode="min", patience=50)], **extras,
    )  # fmt: skip
    trainer.fit(source, data.Batches(images, train=False, batch_size=BATCH), epochs=EPOCHS, resume=True)


class _Jittered:
    """A data set whose transform draws from Python's, NumPy's and torch's global generators, as people's do."""

    def __init__(self, pixels: Any, labels: Any):
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> Any:
        import numpy as np
        import torch

        noise = random.random() + np.random.rand() + float(torch.rand(()))
        return self.pixels[i].float() / 255 + 0.1 * noise, int(self.labels[i])


def digest(folder: Path) -> dict[str, str]:
    """What must be equal: the newest checkpoint's files and the reproducible logs."""
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    files = [*sorted(newest.iterdir()), folder / "metrics.csv", folder / "steps.csv"]
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def soak(case: Case, seed: int, kills: int, root: Path) -> int:
    """Returns how often the run was really killed. Raises AssertionError if the two runs differ."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "fastlocal.trainer.trainer", "fastlocal.models", "numpy"])
    whole, killed = root / "whole", root / "killed"
    draw = random.Random(seed)
    batches = EPOCHS * -(-SAMPLES // BATCH)
    _, seconds = _run(context, case, whole, None, draw, "sequential")
    span = (
        (case.accumulate + 1) * seconds / batches
    )  # progress is told after updates: as far as the next one and beyond
    points = sorted(draw.randrange(batches - case.accumulate) for _ in range(kills))
    schedules = itertools.cycle(case.schedules)
    count = sum(_run(context, case, killed, point, draw, next(schedules), span)[0] for point in points)
    _run(context, case, killed, None, draw, next(schedules))
    want, got = digest(whole), digest(killed)
    assert want == got, f"{case}: differ in {[name for name in want if got.get(name) != want[name]]}"
    return count


def _run(
    context: Any,
    case: Case,
    folder: Path,
    point: int | None,
    draw: random.Random,
    schedule: str,
    span: float = 0.0,
) -> tuple[bool, float]:
    """Starts or resumes the run; with ``point``, kills it up to ``span`` seconds after that many batches are done.

    Returns whether it was killed, and the seconds after its first batch, or that one.
    """
    progress = context.Value("i", -1, lock=False)
    process = context.Process(target=train, args=(case, str(folder), progress, schedule))
    process.start()
    while progress.value < (1 if point is None else point) and process.is_alive():
        time.sleep(0.0005)
    began = time.perf_counter()
    if point is not None:
        time.sleep(draw.uniform(0, span))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
    process.join(300)
    killed = process.exitcode == -signal.SIGKILL
    assert killed or process.exitcode == 0, f"{case}: ended with {process.exitcode}"
    assert killed or point is not None or process.exitcode == 0
    return killed, time.perf_counter() - began


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument(
        "--seed", type=int, default=int(time.time()), help="of the points; printed, so that a failure can be repeated"
    )
    parser.add_argument("--only", default="", metavar="WORD", help="cases whose description has it, such as pipeline")
    options = parser.parse_args(arguments)
    failed = 0
    print(f"seed {options.seed}, {options.kills} kills a case", flush=True)
    for case in everything():
        if options.only not in str(case):
            continue
        with _folder() as root:
            began = time.perf_counter()
            try:
                count = soak(case, options.seed, options.kills, root)
                result = f"equal after {count} kills"
            except AssertionError as error:
                failed += 1
                result = f"FAILED: {error}"
        print(f"{case!s:50} {result}, {time.perf_counter() - began:.0f} s", flush=True)
    print("all equal" if not failed else f"{failed} cases differ")
    return int(failed > 0)


def _folder() -> Any:
    from contextlib import contextmanager

    @contextmanager
    def made() -> Iterator[Path]:
        path = Path(tempfile.mkdtemp(prefix="soak-"))
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    return made()


if __name__ == "__main__":
    sys.exit(main())
