import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from fastlocal.blocks.measure import LaunchCounter
from fastlocal.triton_kernels import goodness_loss as kernels
from tests.ops.test_goodness_loss import make
from tests.triton_kernels.ahead import SHARED_LIMIT, Recorder, compile_for, cuobjdump

HERE = Path(__file__).parent
OPERATOR = sys.modules["fastlocal.ops.goodness_loss"]
NAMES = [f"fl_goodness_loss_{part}_kernel" for part in ("fwd", "reduce", "bwd")]
interpreting = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: nothing is compiled"
)


def test_in_the_interpreter():
    """The numerical tests, in a process of their own: Triton reads TRITON_INTERPRET when it is imported."""
    file = HERE / "interpreted_goodness_loss.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    out = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True)
    assert out.returncode == 0, out.stdout[-8000:] + out.stderr[-2000:]
    passed = re.search(r"(\d+) passed(, \d+ warnings?)? in ", out.stdout)  # and none skipped
    assert passed and int(passed[1]) >= 20, out.stdout


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
    for shape, offset, mean in [
        ((8, 16, 32, 32), None, True),
        ((8, 1000), torch.randn(8), False),
        ((8, 3), None, True),
    ]:
        h, positive = make(shape, dtype)
        factor = kernels.launch(h, positive, offset, 2.0, mean, 1.0, True)[2]
        for grad_loss in (None, torch.ones(())):
            kernels.launch_backward(h, factor, grad_loss, torch.empty_like(h))
    for recorder in recorded:
        assert recorder.calls
        for call in recorder.calls:
            used = compile_for(capability, recorder.kernel, *call, tmp_path)
            what = f"{recorder.kernel.__name__}: {used}"
            assert used.spilled == 0, what
            assert used.shared <= SHARED_LIMIT[capability], what
            assert 0 < used.registers <= 64, what


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h,
        lambda h: h.to(memory_format=torch.channels_last),
        lambda h: h[::2],
        lambda h: h[:, ::2],
        lambda h: h.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        lambda h: h[:1].expand(6, -1, -1, -1),
        lambda h: h[:0],
    ],
)
def test_launches(change, recorded, monkeypatch):
    """What the counter is told is what the operators launch."""
    monkeypatch.setattr(OPERATOR._dispatch, "choose", lambda *_: "triton")
    h = change(torch.randn(6, 4, 3, 5))
    positive = torch.ones(len(h), dtype=torch.bool)
    for offset in (None, torch.zeros(len(h))):
        call = (h, positive, offset, 2.0, "sum", 1.0, True, "triton")
        with LaunchCounter() as inside:
            factor = OPERATOR._run(*call)[2]
        assert OPERATOR.triton_launches(call, {}) == inside.total + sum(len(r.calls) for r in recorded), inside.by_op
        for recorder in recorded:
            recorder.calls.clear()
        call = (h, factor, torch.ones(()), "triton")
        with LaunchCounter() as inside:
            OPERATOR._run_backward(*call)
        count = inside.total + sum(len(r.calls) for r in recorded)
        assert OPERATOR.triton_backward_launches(call, {}) == count, inside.by_op
        for recorder in recorded:
            recorder.calls.clear()
    factor = torch.ones(len(h))
    with LaunchCounter() as outside:
        OPERATOR._operator(h, positive, None, 2.0, "sum", 1.0, True, "aten")
        OPERATOR._backward(h, factor, None, "aten")
    assert outside.total == OPERATOR.triton_launches((h,), {}) + OPERATOR.triton_backward_launches((h,), {})


def test_config_is_pure_and_bounded():
    for features in (1, 3, 127, 128, 1000, 4096, 100000):
        c = kernels.config(features)
        assert c == kernels.config(features) and c.block & (c.block - 1) == 0
        assert 128 <= c.block <= 4096 and c.block >= min(features, 4096) and c.block / (32 * c.warps) <= 16
