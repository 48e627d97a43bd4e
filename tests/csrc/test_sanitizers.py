"""The scheduler under AddressSanitizer and UndefinedBehaviorSanitizer, fed with random steps and bad arguments."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SANITIZERS = ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-D_GLIBCXX_ASSERTIONS")


def build(compiler: str, source: Path, out: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [compiler, "-std=c++17", *flags, str(source), "-o", str(out)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Sanitizers must come first among the libraries, so nothing else may be preloaded; ptrace and LeakSanitizer clash.
    environment = {key: value for key, value in os.environ.items() if key not in ("LD_PRELOAD", "ASAN_OPTIONS")}
    environment["ASAN_OPTIONS"] = "detect_leaks=0"
    return subprocess.run([str(program), *arguments], capture_output=True, text=True, timeout=100, env=environment)


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A compiler with which a sanitizer finds an error; skips where there is none."""
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if found is None:
        pytest.skip("no C++ compiler was found (c++, g++, clang++)")
    folder = tmp_path_factory.mktemp("sanitizers")
    source = folder / "wrong.cpp"
    source.write_text(
        "#include <cstdlib>\n#include <limits>\n"
        "int main(int count, char** values) {\n"
        "  int* two = new int[2]();\n"
        "  const int given = std::atoi(values[1]);\n"
        "  return given == 2 ? two[given] : given + std::numeric_limits<int>::max() > 0;\n}\n"
    )
    if (built := build(found, source, folder / "wrong", *SANITIZERS)).returncode:
        pytest.skip(f"{found} has no sanitizers: {built.stderr.strip()[-300:]}")
    for argument, report in (("2", "heap-buffer-overflow"), ("1", "signed integer overflow")):
        failed = run(folder / "wrong", argument)
        assert failed.returncode and report in failed.stderr
    return found


def test_scheduler_under_sanitizers(compiler: str, tmp_path: Path) -> None:
    fuzz, scheduler = HERE / "scheduler_fuzz.cpp", HERE.parents[1] / "csrc" / "scheduler.cpp"
    flags = ("-Wall", "-Wextra", "-Werror", "-DFASTLOCAL_LOCAL_EFFORT=5000", str(scheduler))
    built = build(compiler, fuzz, tmp_path / "fuzz", *SANITIZERS, *flags)
    assert built.returncode == 0, built.stderr
    done = run(tmp_path / "fuzz", "200", "1")
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    plans, refused = map(int, re.findall(r"plans (\d+) refused (\d+)", done.stdout)[0])
    assert plans > 50 and refused > 50
