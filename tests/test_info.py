from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import fastlocal
from fastlocal import info
from fastlocal.engine import _native


def test_collect_says_what_is_true_here() -> None:
    found = info.collect()
    assert found["fastlocal"] == fastlocal.__version__
    assert found["torch"]["version"] == torch.__version__
    assert found["native"]["built"] == _native.available()
    assert found["native"]["built"] == (found["native"]["why_not"] == "")
    assert found["cpu"]["threads"] == torch.get_num_threads()
    assert found["cuda"]["available"] == torch.cuda.is_available()
    assert len(found["cuda"]["devices"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert json.loads(json.dumps(found)) == found


def test_text_names_what_is_missing_and_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "_version", lambda name: None if name == "triton" else "1.2.3")
    monkeypatch.setattr(_native, "available", lambda: False)
    monkeypatch.setattr(_native, "why_not", lambda: "no compiler, do this")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    text = info.to_text(info.collect())
    assert "native part   missing: no compiler, do this\n" in text
    assert "C++ compiler  none found\n" in text
    assert "triton        not installed (pip install 'fastlocal[triton]')\n" in text
    assert "matplotlib    1.2.3\n" in text


def test_devices_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = info.collect()
    device = {"name": "A GPU", "capability": "9.0", "memory_gib": 79.2, "multiprocessors": 132}
    found["cuda"] = {"available": True, "why_not": "", "devices": [device]}
    assert "gpu 0         A GPU, compute capability 9.0, 79.2 GiB, 132 multiprocessors" in info.to_text(found)


def test_command_line_without_a_device_starts_no_cuda() -> None:
    code = (
        "import json, sys, torch; from fastlocal import info; info.main(['--json']);"
        "assert torch.cuda.is_available() or not torch.cuda.is_initialized()"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout)["python"] == sys.version.split()[0]
    run = subprocess.run([sys.executable, "-m", "fastlocal.info"], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("fastlocal ") and run.stderr == ""
