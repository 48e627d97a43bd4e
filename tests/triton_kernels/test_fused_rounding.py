import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from fastlocal.triton_kernels import fused_adamw, fused_sgd, optimizer_step
from tests.ops.lists import Update
from tests.triton_kernels.ahead import SHARED_LIMIT, Recorder, compile_for, cuobjdump

HERE = Path(__file__).parent
SHAPES = [(5000,), (3,), (16, 3, 3, 3)]
HALF = torch.bfloat16


def test_in_the_interpreter():
    """The numerical tests, in a process of their own: Triton reads TRITON_INTERPRET when it is imported."""
    file = HERE / "interpreted_fused_rounding.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    out = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True)
    assert out.returncode == 0, out.stdout[-8000:] + out.stderr[-2000:]
    passed = re.search(r"(\d+) passed(, \d+ warnings?)? in ", out.stdout)  # and none skipped
    assert passed and int(passed[1]) >= 22, out.stdout


@pytest.fixture
def recorded(monkeypatch):
    recorders = {}
    for rule, module in (("sgd", fused_sgd), ("adamw", fused_adamw)):
        recorders[rule] = Recorder(getattr(module, f"fl_fused_{rule}_kernel"))
        monkeypatch.setattr(module, f"fl_fused_{rule}_kernel", recorders[rule])
    monkeypatch.setattr(optimizer_step, "fl_gradients_kernel", Recorder(optimizer_step.fl_gradients_kernel))
    return recorders


def launch(rule, seed=(7 << 32) + 5, full=False, average_dtype=None, mixed=False):
    case = Update(rule, SHAPES, HALF, average_dtype=average_dtype)
    for row in (case.grads, *case.state[:2], case.averages) if mixed else ():
        row[:1] = [t.half() for t in row[:1]]
    number = torch.tensor(1.0)
    rest = (0.9, 1.0, number, torch.zeros(()), True) if full else (0.9, None, None, None, False)
    rate = number if full else 0.1
    if rule == "sgd":
        steps = [torch.zeros(()) for _ in SHAPES]
        lists = case.params, case.grads, case.state[0], case.averages, []
        fused_sgd.launch(*lists, rate, 0.1, 0.9, 0.0, True, False, False, *rest, steps, seed)
    else:
        lists = case.params, case.grads, *case.state, case.averages, []
        fused_adamw.launch(*lists, rate, 0.9, 0.99, 1e-8, 0.1, False, *rest, seed)


CASES = [
    {},
    {"full": True, "average_dtype": HALF},
    {"full": True, "average_dtype": torch.float32},
    {"full": True, "average_dtype": HALF, "mixed": True},
]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: nothing is compiled")
@pytest.mark.skipif(cuobjdump() is None, reason="neither Triton nor the system has cuobjdump")
@pytest.mark.parametrize("capability", sorted(SHARED_LIMIT))
def test_compiles_without_spills(capability, recorded, tmp_path):
    for rule, recorder in recorded.items():
        for case in CASES:
            launch(rule, **case)
        assert len(recorder.calls) == len(CASES)
        for args, options in recorder.calls:
            used = compile_for(capability, recorder.kernel, args, options, tmp_path)
            what = f"{rule} {options}: {used}"
            assert used.spilled == 0 and used.shared <= SHARED_LIMIT[capability] and 0 < used.registers <= 128, what


def test_seeds_need_no_new_variant(recorded):
    """A seed is two arguments of 32 bits, whatever it is, and no constant."""
    for rule, recorder in recorded.items():
        for seed in (0, 1, 16, 2**31, 2**32 - 1, 2**63 - 1):
            launch(rule, seed)
        assert all(options == recorder.calls[0][1] for _, options in recorder.calls)
        integers = [[a for a in args if type(a) is int] for args, _ in recorder.calls]
        assert len({len(row) for row in integers}) == 1 and all(-(2**31) <= i < 2**31 for row in integers for i in row)
        names = [p.name for p in recorder.kernel.params if p.do_not_specialize]
        assert {"seed_low", "seed_high"} <= set(names)
    assert optimizer_step.halves(2**63 - 1) == (-1, 2**31 - 1) and optimizer_step.halves((3 << 32) + 5) == (5, 3)
    assert optimizer_step.halves(None) == (0, 0)
