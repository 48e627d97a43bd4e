"""What every test starts from: one thread, a fixed seed, torch's global settings restored; and the `gpu` marker."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

# Several workers share few cores, and sums split over threads need not be equal bit for bit.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    for item in marked:
        item.user_properties.append(("gpu", True))  # reports carry these, also from the workers of xdist
    if marked and not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    count = {}
    for outcome in ("passed", "failed", "skipped"):
        reports = terminalreporter.stats.get(outcome, [])
        count[outcome] = sum(("gpu", True) in map(tuple, getattr(report, "user_properties", ())) for report in reports)
    terminalreporter.write_line(
        f"tests that need a GPU: {count['passed']} passed, {count['failed']} failed, {count['skipped']} skipped"
    )


@pytest.fixture(autouse=True)
def _global_settings() -> Iterator[None]:
    def now() -> tuple:
        warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        return torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(), warn_only

    dtype, deterministic, warn_only = before = now()
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
    random.seed(0)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.set_grad_enabled(grad)
    if now() != before:  # asking first: use_deterministic_algorithms loads the compiler stack, which takes seconds
        torch.set_default_dtype(dtype)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
