"""Looks for faster launch configurations on this device and writes them as the table that the kernels read.

    fastlocal bench tune [--only bn_act] [--budget 240] [--out FOLDER]
    fastlocal bench tune --dry-run [--out FOLDER]      every code path in Triton's interpreter, with an invented clock

The cases are those of fastlocal.bench.operators. A case is run once to see which configurations its kernels ask for; then
the fields of each are doubled and halved, one at a time from the best so far, and the whole call is timed as a replayed
graph. A configuration counts only if the results are the default's, from memory that was full of nan before. What is at
least 3 % faster in turns with the default goes into the table. See docs/kernels.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastlocal.bench import operators
from fastlocal.bench.device import Cpu, Cuda, machine
from fastlocal.triton_kernels import configs

GAIN = 0.03
MAX_WARPS = 16
MAX_TILE = 1 << 16  # the product of the block sizes
# Fields that follow from the sizes, and are not a choice.
FIXED = {"pool_linear_cross_entropy": ("block_k",)}
Entry = dict[str, Any]


class Invented(Cpu):
    """A clock for --dry-run: its time depends on the configuration and on nothing else."""

    def seconds(self, fn: Callable[[], Any], times: int) -> tuple[float, float]:
        return 1e-3 * (1 + zlib.crc32(repr(configs._forced).encode()) % 100 / 100), 0.0


def neighbours(kernel: str, config: Any) -> Iterator[Any]:
    """Configurations with one field doubled or halved."""
    for name, value in config._asdict().items():
        if isinstance(value, bool) or name in FIXED.get(kernel, ()):
            continue
        for changed in (value * 2, value // 2):
            if changed < 1 or (name.startswith("warps") and changed > MAX_WARPS):
                continue
            found = config._replace(**{name: changed})
            tile = 1
            for other, size in found._asdict().items():
                tile *= size if other.startswith("block") else 1
            if tile <= MAX_TILE:
                yield found


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """New memory is full of nan, so that what a kernel does not write is seen."""

    def filled(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            made = make(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return call

    with (
        mock.patch.object(torch, "empty", filled(torch.empty)),
        mock.patch.object(torch, "empty_like", filled(torch.empty_like)),
        mock.patch.object(Tensor, "new_empty", filled(Tensor.new_empty)),
    ):
        yield


class Tuner:
    """Tunes case after case until the time is up; `entries` are those of the table."""

    def __init__(self, device: Cuda, budget: float, rounds: int = 3, turns: int = 7) -> None:
        self.device, self.deadline, self.rounds, self.turns = device, time.monotonic() + budget, rounds, turns
        self.entries: dict[tuple[str, Any], Entry] = {}
        self.notes: list[str] = []

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def case(self, case: operators.Case) -> None:
        beginning = case.inputs(self.device.type)
        if case.explain(beginning, "triton") is None:
            return
        inputs = operators.copied(beginning)  # timing an update changes them
        call, asked = case.ours("triton"), []  # type: ignore[var-annotated]
        with configs.forced({}, asked), poisoned():
            wanted = [t.clone() for t in operators.tensors(call(*operators.copied(beginning)))]
        chosen: dict[str, Any] = {}
        for kernel, key, default in asked:
            where = configs.key_of(kernel, key)
            if where in self.entries or kernel in chosen:
                continue
            best = self._search(case, call, beginning, inputs, wanted, kernel, default, chosen)
            chosen[kernel] = best
            pair = self._in_turns(call, inputs, chosen | {kernel: default}, chosen)
            if best == default or pair[1] > (1 - GAIN) * pair[0]:
                chosen[kernel] = best = default
            self.entries[where] = {
                "kernel": kernel,
                "key": key,
                "config": best._asdict(),
                "default": default._asdict(),
                "case": case.name,
                "seconds": {"default": pair[0], "chosen": pair[1] if best != default else pair[0]},
            }
            print(
                f"{case.name}: {kernel}: {pair[0] / self.entries[where]['seconds']['chosen']:.2f}x {best}", flush=True
            )

    def _search(
        self,
        case: operators.Case,
        call: operators.Call,
        beginning: operators.Inputs,
        inputs: operators.Inputs,
        wanted: Sequence[Tensor],
        kernel: str,
        default: Any,
        others: dict[str, Any],
    ) -> Any:
        """The fastest configuration that neighbours lead to, one field at a time."""
        best, least = default, self._time(call, inputs, others | {kernel: default})
        tried = {default}
        for _ in range(self.rounds):
            before = best
            for candidate in neighbours(kernel, best):
                if candidate in tried or self.late:
                    continue
                tried.add(candidate)
                setting = others | {kernel: candidate}
                try:
                    with configs.forced(setting), poisoned():
                        off = operators.disagreement(call(*operators.copied(beginning)), wanted)
                    if not off <= (1e-4 if case.dtype == torch.float32 else 3e-2):
                        self.notes.append(f"{case.name}: {kernel} {candidate}: results differ by {off:.2g}")
                        continue
                    seconds = self._time(call, inputs, setting)
                except Exception as error:  # too large for the device, or not a size that the kernel takes
                    self.notes.append(f"{case.name}: {kernel} {candidate}: {type(error).__name__}")
                    continue
                if seconds < least:
                    best, least = candidate, seconds
            if best == before:
                break
        return best

    def _replay(self, call: operators.Call, inputs: operators.Inputs, setting: dict[str, Any]) -> Callable[[], Any]:
        with configs.forced(setting):
            return self.device.graph(lambda: call(*inputs))[0]

    def _time(self, call: operators.Call, inputs: operators.Inputs, setting: dict[str, Any]) -> float:
        replay = self._replay(call, inputs, setting)
        with configs.forced(setting):
            return statistics.median(self.device.seconds(replay, 10)[0] for _ in range(3))

    def _in_turns(self, call: operators.Call, inputs: operators.Inputs, *settings: dict[str, Any]) -> tuple[float, ...]:
        replays = [self._replay(call, inputs, setting) for setting in settings]
        times: list[list[float]] = [[] for _ in settings]
        for _ in range(self.turns):
            for setting, replay, into in zip(settings, replays, times):
                with configs.forced(setting):
                    into.append(self.device.seconds(replay, 20)[0])
        return tuple(map(statistics.median, times))


def write(folder: Path, entries: Sequence[Entry], where: dict[str, Any]) -> Path:
    """Writes the table of the device; lines of an earlier one for other kernels and sizes stay."""
    path = folder / configs.file_name(where["device"])
    new = {configs.key_of(e["kernel"], e["key"]) for e in entries}
    kept: list[Entry] = []
    if path.exists():
        with contextlib.suppress(ValueError):
            configs.parse(path.read_text())  # else it is written anew
            kept = [
                e for e in json.loads(path.read_text())["entries"] if configs.key_of(e["kernel"], e["key"]) not in new
            ]
    about = {key: where.get(key) for key in ("device", "driver", "torch", "triton", "cuda", "commit", "source", "time")}
    lines = ",\n".join(json.dumps(e) for e in [*kept, *entries])
    text = json.dumps({"format": configs.FORMAT, **about})[:-1] + f', "entries": [\n{lines}\n]}}\n'
    configs.parse(text)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def main(argv: list[str] | None = None) -> int:
    """0, or 2 without a CUDA device."""
    parser = argparse.ArgumentParser(
        prog="fastlocal bench tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder of the table (where the kernels are; a dry run: none)")
    parser.add_argument("--only", default="", metavar="NAME", help="operators with this in their name")
    parser.add_argument("--budget", type=float, default=240, help="seconds (default 240)")
    parser.add_argument("--dry-run", action="store_true", help="every code path on a CPU; nothing is measured")
    args = parser.parse_args(argv)
    if args.dry_run:
        if os.environ.get("TRITON_INTERPRET") != "1":  # Triton reads it when it is imported, which torch does
            command = [sys.executable, "-m", "fastlocal.bench.tune", *(sys.argv[1:] if argv is None else argv)]
            return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode
        from fastlocal.bench.interpreter import mend

        mend()
        torch.set_num_threads(1)
        where = machine() | {"device": "dry run"}
        tuner, cases = Tuner(Invented(), args.budget, rounds=1, turns=1), operators.tiny_cases()
        cases = tuple(case for case in cases if case.dtype != torch.bfloat16)  # which the interpreter computes wrongly
    elif not torch.cuda.is_available():
        print("no CUDA device: nothing to tune (--dry-run runs the code on a CPU)", file=sys.stderr)
        return 2
    else:
        where = machine()
        tuner, cases = Tuner(Cuda(), args.budget), operators.cases()
    for case in sorted(cases, key=lambda case: case.must_move()):
        if args.only in case.operator and not tuner.late:
            try:
                tuner.case(case)
            except Exception as error:
                tuner.notes.append(f"{case.name}: {type(error).__name__}: {error}")
            tuner.device.release()
    print(*tuner.notes, sep="\n")
    entries = list(tuner.entries.values())
    folder = args.out or (None if args.dry_run else configs.HERE / "tables")
    if entries and folder is not None:
        print(f"{len(entries)} entries written to {write(folder, entries, where)}")
    if args.dry_run:
        print("dry run on a CPU: nothing was measured")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
