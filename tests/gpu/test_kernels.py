"""Every Triton kernel is run where a device is, and watched by compute-sanitizer. Needs none: launches are only recorded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from fastlocal.bench import ahead, gpu
from tests.gpu import sanitize

HERE = Path(__file__).parent


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter runs the kernels")
def test_the_sanitizers_driver_launches_every_kernel(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sanitize, "DEVICE", "cpu")
    with ahead.recording() as recorders:
        sanitize.main()  # what it compares is what was in memory
    assert "not run" not in capsys.readouterr().out
    missing = [name for name, recorder in recorders.items() if not recorder.calls]
    assert not missing, "add a small call of these to tests/gpu/sanitize.py"


def test_every_operator_with_a_kernel_has_tests_for_a_device() -> None:
    """By the benchmark's rule: without them it would show no figure of the operator."""
    for case in sanitize.OTHERS:
        inputs = case.inputs("cpu")
        with ahead.recording():
            served = case.explain(inputs, "triton")
        for file in gpu.tests_of(case.operator) if served else ():
            assert (HERE / file).is_file(), f"{case.operator}: write tests/gpu/{file}"
