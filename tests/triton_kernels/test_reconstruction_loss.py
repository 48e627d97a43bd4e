import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from fastlocal.blocks.measure import LaunchCounter
from fastlocal.triton_kernels import reconstruction_loss as kernels
from tests.ops.test_reconstruction_loss import make
from tests.triton_kernels.ahead import SHARED_LIMIT, Recorder, compile_for, cuobjdump

HERE = Path(__file__).parent
OPERATOR = sys.modules["fastlocal.ops.reconstruction_loss"]
NAMES = [f"fl_reconstruction_loss_{part}_kernel" for part in ("fwd", "reduce", "bwd")]
interpreting = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: nothing is compiled"
)


def test_in_the_interpreter():
    """The numerical tests, in a process of their own: Triton reads TRITON_INTERPRET when it is imported."""
    file = HERE / "interpreted_reconstruction_loss.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    out = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True)
    assert out.returncode == 0, out.stdout[-8000:] + out.stderr[-2000:]
    passed = re.search(r"(\d+) passed(, \d+ warnings?)? in ", out.stdout)  # and none skipped
    assert passed and int(passed[1]) >= 30, out.stdout


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
    for shape in [(8, 3, 32, 32), (3, 5)]:
        logits, image = make(shape, dtype)
        kernels.launch(logits, image)
        for grad_loss in (None, torch.ones(())):
            kernels.launch_backward(logits, image, grad_loss, 1.0, torch.empty_like(logits))
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
        lambda t: t,
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: t[::2],
        lambda t: t[:, ::2],
        lambda t: t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        lambda t: t[:0],
    ],
)
@pytest.mark.parametrize("same", [True, False])
def test_launches(same, change, recorded, monkeypatch):
    """What the counter is told is what the operators launch."""
    monkeypatch.setattr(OPERATOR._dispatch, "choose", lambda *_: "triton")
    logits, image = (change(torch.randn(6, 4, 3, 5)) for _ in range(2))
    if not same:
        image = image.contiguous()
    for run, count, call in (
        (OPERATOR._run, OPERATOR.triton_launches, (logits, image, "triton")),
        (OPERATOR._run_backward, OPERATOR.triton_backward_launches, (logits, image, torch.ones(()), 1.0, "triton")),
    ):
        with LaunchCounter() as inside:
            run(*call)
        assert count(call, {}) == inside.total + sum(len(r.calls) for r in recorded), inside.by_op
        for recorder in recorded:
            recorder.calls.clear()
    with LaunchCounter() as outside:
        OPERATOR._operator(logits, image, "aten")
        OPERATOR._backward(logits, image, None, 1.0, "aten")
    call = (logits, image)
    assert outside.total == OPERATOR.triton_launches(call, {}) + OPERATOR.triton_backward_launches(call, {})


def test_config_is_pure_and_bounded():
    for elements in (0, 1, 3, 1000, 1024, 10**9):
        c = kernels.config(elements)
        assert c == kernels.config(elements) and c.block & (c.block - 1) == 0
        assert 128 <= c.block <= 1024 and c.programs == 1024
