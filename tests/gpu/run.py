"""Everything that a CUDA device has to show, in one command: build, tests, compute-sanitizer, benchmarks, one short table.

    python tests/gpu/run.py --out runs/gpu [--budget 540]          (or: make gpu OUT=runs/gpu)

Needs no environment of its own, no network and no installation: it runs from the source tree with the Python that it is
started with. Every stage has its share of the time; one that fails or is cut short is recorded, and the next one runs.
Without a device the same stages run on the CPU, as far as they can, and the exit status is 2. See docs/gpu.md.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
KERNELS = "fl_"  # the names of all Triton kernels begin so
RESERVE = 10.0  # seconds kept for the table

# Seconds: the most that a stage may take, and the least that is kept for it while earlier ones run.
STAGES = {
    "machine": (90, 10),
    "build": (60, 15),
    "tests": (210, 90),
    "memcheck": (70, 25),
    "racecheck": (70, 25),
    "bench": (1e9, 120),
    "tune": (1e9, 0),  # only on request, with TUNE seconds kept for it
}
TUNE = 120.0


class Run:
    """One run: its folder, its clock, and what the stages found."""

    def __init__(self, out: Path, budget: float) -> None:
        self.out, self.deadline = out, time.monotonic() + budget - RESERVE
        out.mkdir(parents=True, exist_ok=True)
        for old in ("summary.jsonl", "tests.jsonl", "bench.jsonl", "table.txt", "log.txt"):
            (out / old).unlink(missing_ok=True)
        self.log = (out / "log.txt").open("ab")
        self.machine: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []
        self.environment = {"PYTHONUNBUFFERED": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        self.environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))

    def allowance(self, stage: str) -> float:
        """Seconds for a stage, so that those behind it keep their least; with too little for all, the first get theirs."""
        names = list(STAGES)
        later = sum(STAGES[name][1] for name in names[names.index(stage) + 1 :])
        (most, least), left = STAGES[stage], self.deadline - time.monotonic()
        return max(1.0, min(most, left - later), min(least, left))

    def command(self, stage: str, command: list[Any], **environment: str) -> tuple[int | None, str]:
        """Exit status (None: ran out of time) and output, which also goes to the log."""
        allowed = self.allowance(stage)
        words = [str(word) for word in command]
        self.log.write(f"\n=== {stage}, up to {allowed:.0f} s: {' '.join(words)}\n".encode())
        self.log.flush()
        begin = self.log.tell()
        # A group of its own in the same session: ended as one, and never outlives whoever started this.
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            env={**os.environ, **self.environment, **environment},
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        status: int | None = None
        try:
            status = process.wait(allowed)
        except subprocess.TimeoutExpired:
            _signal(process, signal.SIGINT)  # pytest still prints its summary, the benchmark's records are written
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(8)
        finally:
            _signal(process, signal.SIGKILL)
            process.wait()
        text = (self.out / "log.txt").read_bytes()[begin:].decode(errors="replace")
        return status, text

    def stage(self, name: str, work: Callable[[], tuple[str, str]]) -> None:
        """Runs one stage; ``work`` returns "ok", "failed" or "not run", and a sentence."""
        begun = time.monotonic()
        try:
            status, detail = work()
        except Exception as error:
            status, detail = "failed", f"{type(error).__name__}: {error}"
        row = {"stage": name, "status": status, "seconds": round(time.monotonic() - begun, 1), "detail": detail}
        self.rows.append(row)
        print(f"{name:<10} {status:<8} {row['seconds']:6.1f} s  {detail}", flush=True)
        with (self.out / "summary.jsonl").open("a") as file:
            file.write(json.dumps(row | {"machine": self.machine}) + "\n")

    @property
    def device(self) -> str | None:
        return self.machine.get("device")

    # --- the stages ---------------------------------------------------------------------------------------------------

    def find_machine(self) -> tuple[str, str]:
        status, text = self.command("machine", [sys.executable, "-m", "fastlocal.bench.gpu", "--machine"])
        if status != 0:
            return "failed", _cut(status) or f"this Python has no working torch: {_last_line(text)}"
        self.machine = json.loads(_last_line(text))
        m = self.machine
        where = (
            f"{m['device']}, driver {m['driver']}" if m["device"] else "no CUDA device: what follows runs on the CPU"
        )
        return "ok", f"{where}; torch {m['torch']}, triton {m['triton']}, commit {str(m['commit'])[:12]}"

    def build(self) -> tuple[str, str]:
        """In place, beside the sources; nothing is installed. fastlocal works without it."""
        if importlib.util.find_spec("setuptools") is None:
            return "not run", "setuptools is not installed, so fastlocal runs without its native part"
        with tempfile.TemporaryDirectory() as work:
            script = [sys.executable, "setup.py", "build_ext", "--inplace", "--build-temp", work]
            status, text = self.command("build", script, FASTLOCAL_BUILD_EXT="auto")
        why = "import sys; from fastlocal.engine import _native as n; print(n.why_not()); sys.exit(not n.available())"
        loads, answer = self.command("build", [sys.executable, "-c", why])
        if loads == 0 and status == 0:
            return "ok", "the native part is built and loads"
        said = [line for line in text.splitlines() if line.startswith("fastlocal:")]
        return "failed", _cut(status) or (said[-1] if said else _last_line(answer if status == 0 else text))

    def tests(self) -> tuple[str, str]:
        report = self.out / "tests.jsonl"
        # The benchmark shows no figure without tests of the same sources on the same device.
        about = {key: self.machine.get(key) for key in ("source", "device", "commit", "torch", "triton", "driver")}
        report.write_text(json.dumps(about) + "\n")
        command = [sys.executable, "-m", "pytest", "tests/gpu", "tests/csrc", "-v", "-p", "no:cacheprovider"]
        workers = min(6, (os.cpu_count() or 1) // 2)
        if importlib.util.find_spec("xdist") is not None and workers > 1:
            command += ["-n", str(workers), "-p", "no:benchmark"]
        if importlib.util.find_spec("pytest_timeout") is not None:
            command += ["--timeout=120"]
        built = self.rows[-1]["status"] == "ok"
        environment = {"FASTLOCAL_GPU_REPORT": str(report), "FASTLOCAL_BUILD_EXT": "auto" if built else "0"}
        environment |= {"FASTLOCAL_GPU_TESTS_DEVICE": "cuda" if self.device else "cpu", "OMP_NUM_THREADS": "1"}
        status, text = self.command("tests", command, **environment)
        lines = [json.loads(line) for line in report.read_text().splitlines()[1:]]
        if not lines:
            return "failed", _cut(status) or f"pytest did not start: {_last_line(text)}"
        seen = [line for line in lines if "test" in line]
        counts = Counter(line["outcome"] for line in seen)
        collected = next((line["collected"] for line in lines if "collected" in line), 0)
        detail = ", ".join(f"{counts[key]} {key}" for key in ("passed", "failed", "skipped"))
        missing = collected - len({line["test"] for line in seen})
        if missing > 0:
            detail += f", {missing} not run"
        failed = [line for line in seen if line["outcome"] == "failed"]
        if status not in (0, None) and not failed:
            detail += f"; {_last_line(text)}"
        if failed:
            detail += "; " + "; ".join(f"{line['test'].rpartition('/')[2]}: {line['why']}" for line in failed[:8])
        return "ok" if status == 0 and counts["passed"] and missing <= 0 else "failed", _cut(status) + detail

    def sanitize(self, tool: str) -> tuple[str, str]:
        """compute-sanitizer's tool on the Triton kernels; without it, the driver alone."""
        driver = [sys.executable, "tests/gpu/sanitize.py"]
        if not self.device:
            if tool != "memcheck":
                return "not run", "no CUDA device"
            status, text = self.command(tool, driver, TRITON_INTERPRET="1")
            return "not run" if status == 0 else "failed", f"no CUDA device; in the interpreter: {_last_line(text)}"
        program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
        if program is None:
            status, text = self.command(tool, driver)
            return "not run" if status == 0 else "failed", f"compute-sanitizer is not here; alone: {_last_line(text)}"
        watch = [program, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
        # PyTorch's own kernels are not ours to check, and take minutes. Not every version knows how to leave them out.
        for only in (["--kernel-name", f"kns={KERNELS}"], []):
            status, text = self.command(tool, [*watch, *only, *driver], PYTORCH_NO_CUDA_MEMORY_CACHING="1")
            if status is None or " calls on " in text:
                break
        found = re.findall(r"=+ (?:ERROR|RACECHECK) SUMMARY: (.*)", text)
        ran = next((line for line in text.splitlines() if " calls on " in line), "the driver did not finish")
        good = status == 0 and bool(found) and " 0 wrong" in ran
        return "ok" if good else "failed", f"{_cut(status)}{found[-1] if found else _last_line(text)}; {ran}"

    def bench(self) -> tuple[str, str]:
        command = [sys.executable, "-m", "fastlocal.bench.gpu", "--out", self.out / "bench.jsonl"]
        if self.device:
            # Its own clock, which starts when torch is loaded, ends it before this one does.
            command += ["--tests", self.out / "tests.jsonl", "--budget", f"{self.allowance('bench') - 30:.0f}"]
        else:
            command += ["--dry-run", "--budget", f"{min(240.0, self.allowance('bench') - 30):.0f}"]
        status, text = self.command("bench", command)
        path = self.out / "bench.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        count = sum("median" in r for r in records)
        errors, left_out = sum("error" in r for r in records), sum(r["kind"] == "skipped" for r in records)
        detail = f"{_cut(status)}{count} timings, {errors} errors, {left_out} left out for want of time"
        if not records:
            detail += f": {_last_line(text)}"
        return "ok" if status == 0 and count else "failed", detail + (" (dry run)" if not self.device else "")

    def tune(self) -> tuple[str, str]:
        """Launch configurations for this device, as a table in the folder; docs/kernels.md says what to do with it."""
        command = [sys.executable, "-m", "fastlocal.bench.tune", "--out", self.out / "tables"]
        command += ["--budget", f"{max(5.0, self.allowance('tune') - 25):.0f}", *([] if self.device else ["--dry-run"])]
        status, text = self.command("tune", command)
        written = next((line for line in text.splitlines() if " entries written to " in line), _last_line(text))
        return "ok" if status == 0 else "failed", _cut(status) + written + ("" if self.device else " (dry run)")

    def table(self) -> str:
        """The stages, the memory that the tests saw, and the benchmark's short table; its full one is in the log."""
        lines = [f"{r['stage']:<10} {r['status']:<8} {r['seconds']:6.1f} s  {r['detail'][:300]}" for r in self.rows]
        lines += _memory(self.out / "tests.jsonl")
        path = self.out / "bench.jsonl"
        if path.exists():
            script = (
                "import json, sys; from fastlocal.bench.gpu import short; "
                "print(short([json.loads(line) for line in open(sys.argv[1])]))"
            )
            run = subprocess.run(
                [sys.executable, "-c", script, str(path)],
                cwd=ROOT,
                env={**os.environ, **self.environment},
                capture_output=True,
                text=True,
                timeout=60,
            )
            lines.append(run.stdout.rstrip() or _last_line(run.stderr))
        return "\n".join(lines)


def _memory(report: Path) -> list[str]:
    """Peak bytes of a step beyond what lives between steps, as the memory tests saw them."""
    lines = []
    for text in report.read_text().splitlines() if report.exists() else []:
        entry = json.loads(text)
        figures = entry.get("figures") or {}
        if "part of bp" in figures:
            name = entry["test"].rpartition("::")[2]
            mib = {key: f"{figures[key] / 2**20:.1f}" for key in ("immediate", "end", "bp")}
            lines.append(
                f"peak MiB  {name}: {mib['immediate']} (update='end' {mib['end']}), BP {mib['bp']}: {figures['part of bp']}x"
            )
    return sorted(lines)


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _cut(status: int | None) -> str:
    return "cut short by the clock; " if status is None else ""


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it printed nothing"


def _ended(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


def main(argv: list[str] | None = None) -> int:
    """0: every stage did its work. 1: one did not. 2: there is no CUDA device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="folder for what is written")
    parser.add_argument("--budget", type=float, default=540, help="seconds for everything (default 540)")
    parser.add_argument(
        "--tune", action="store_true", help="then look for launch configurations; the benchmark has less time"
    )
    args = parser.parse_args(argv)
    if args.tune:
        STAGES["tune"] = (1e9, TUNE)
    signal.signal(signal.SIGTERM, _ended)  # the stage at work ends with this process
    run = Run(args.out.resolve(), args.budget)
    run.stage("machine", run.find_machine)
    if run.machine:
        run.stage("build", run.build)
        run.stage("tests", run.tests)
        run.stage("memcheck", lambda: run.sanitize("memcheck"))
        run.stage("racecheck", lambda: run.sanitize("racecheck"))
        run.stage("bench", run.bench)
        if args.tune:
            run.stage("tune", run.tune)
    text = run.table()
    (run.out / "table.txt").write_text(text + "\n")
    print(f"\n{text}\n\nwritten to {run.out}: summary, tests and bench (.jsonl), table.txt, log.txt")
    if run.machine and not run.device:
        print("no CUDA device was found: nothing was measured, and no test of the device itself has run")
        return 2
    return int(any(row["status"] != "ok" for row in run.rows))


if __name__ == "__main__":
    sys.exit(main())
