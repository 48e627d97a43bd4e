"""Full float32 by default, and a report that grows with every test, so that a run cut short still says what it did."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

REPORT = os.environ.get("FASTLOCAL_GPU_REPORT")  # a .jsonl file
if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.triton_kernels.interpreter import mend

    mend()


@pytest.fixture(autouse=True)
def _full_float32() -> Iterator[None]:
    """PyTorch's convolutions use TF32 unless told otherwise; its rounding would hide errors of float32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def _write(line: dict[str, Any]) -> None:
    if REPORT:
        with open(REPORT, "a") as file:
            file.write(json.dumps(line) + "\n")


def pytest_collection_finish(session: pytest.Session) -> None:
    here = [item for item in session.items if item.path.parent == Path(__file__).parent]  # as for the reports below
    if os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0" and here:
        _write({"collected": len(here), "by_file": dict(Counter(item.path.name for item in here))})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if os.environ.get("PYTEST_XDIST_WORKER"):  # its reports come to the first process
        return
    if report.when == "call" or report.outcome != "passed":
        line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
        line |= {"figures": {k: v for k, v in report.user_properties if k != "gpu"}}
        if report.outcome == "failed":
            line["why"] = report.longreprtext.strip().splitlines()[-1][:300]
        if report.outcome == "skipped":
            line["why"] = str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr)[:300]
        _write(line)
