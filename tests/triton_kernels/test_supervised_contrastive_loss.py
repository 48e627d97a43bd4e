import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from fastlocal import reference
from fastlocal.blocks.measure import LaunchCounter, StorageTracker
from fastlocal.triton_kernels import supervised_contrastive_loss as kernels
from tests.triton_kernels.ahead import SHARED_LIMIT, Recorder, compile_for, cuobjdump

HERE = Path(__file__).parent
OPERATOR = sys.modules["fastlocal.ops.supervised_contrastive_loss"]
NAMES = [f"fl_supervised_contrastive_loss_{part}_kernel" for part in ("unit", "fwd", "bwd")]
interpreting = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: nothing is compiled"
)


def test_in_the_interpreter():
    """The numerical tests, in a process of their own: Triton reads TRITON_INTERPRET when it is imported."""
    file = HERE / "interpreted_supervised_contrastive_loss.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    out = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True)
    assert out.returncode == 0, out.stdout[-8000:] + out.stderr[-2000:]
    passed = re.search(r"(\d+) passed(, \d+ warnings?)? in ", out.stdout)  # and none skipped
    assert passed and int(passed[1]) >= 26, out.stdout


@pytest.fixture
def recorded(monkeypatch):
    recorders = [Recorder(getattr(kernels, name)) for name in NAMES]
    for name, recorder in zip(NAMES, recorders):
        monkeypatch.setattr(kernels, name, recorder)
    return recorders


@interpreting
@pytest.mark.skipif(cuobjdump() is None, reason="neither Triton nor the system has cuobjdump")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("capability", sorted(SHARED_LIMIT))
def test_compiles_without_spills(capability, dtype, recorded, tmp_path):
    for rows, width, shared in [
        (128, 128, False),
        (1024, 128, True),
        (4096, 128, False),
        (63, 31, False),
        (64, 300, True),
    ]:
        x, target = torch.randn(rows, width).to(dtype), torch.arange(rows) % 10
        pairs = (None, torch.zeros(1, 1).expand(rows, rows)) if shared else (target, None)
        kernels.launch(x, *pairs, 0.07, 1.0, dtype)
    kernels.launch(x, target, None, 0.07, 1.0, None)
    for recorder in recorded:
        assert recorder.calls
        for call in recorder.calls:
            used = compile_for(capability, recorder.kernel, *call, tmp_path)
            what = f"{recorder.kernel.__name__}: {used}"
            assert used.spilled == 0, what
            assert used.shared <= SHARED_LIMIT[capability], what
            assert 0 < used.registers <= 255, what


@pytest.mark.parametrize("needs, wide", [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_launches(needs, wide, dtype, recorded, monkeypatch):
    """What the counter is told is what the operator launches; and nothing of the size of all pairs is made."""
    monkeypatch.setattr(OPERATOR._dispatch, "choose", lambda *_: "triton")
    x = torch.randn(140, 12).to(dtype)[:, ::2]
    for rows in (140, 1, 0):
        target = torch.arange(rows) % 10
        for pairs in ((target, None), (None, reference.positive_weights(target)[0])):
            call = (x[:rows], *pairs, 0.07, 1.0, needs, wide, "triton")
            with LaunchCounter() as inside, StorageTracker() as made:
                OPERATOR._run(*call)
            assert OPERATOR.triton_launches(call, {}) == inside.total + sum(len(r.calls) for r in recorded)
            assert made.peak <= rows * (2 * 6 * 4 + 4 * 4) + 4
            for recorder in recorded:
                recorder.calls.clear()


def test_config_is_pure_and_bounded():
    for rows in (1, 128, 1024, 4096, 100000):
        c = kernels.config(rows)
        assert c == kernels.config(rows) and all(b >= 16 and b & (b - 1) == 0 for b in c[:2])
    for width in (1, 16, 31, 128, 2048):
        assert all(b >= 16 and b & (b - 1) == 0 for b in kernels.blocks(width))


def test_the_smallest_norm_is_the_specification_s():
    from fastlocal.reference import supervised_contrastive_loss as name  # the function hides its module

    assert kernels.EPS.value == sys.modules[name.__module__].EPS
