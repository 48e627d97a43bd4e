import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from fastlocal.ops.fused_sgd import triton_launches
from fastlocal.triton_kernels import fused_sgd as kernels
from fastlocal.triton_kernels import optimizer_step
from tests.ops.test_fused_sgd import call, make, options_of
from tests.triton_kernels.ahead import SHARED_LIMIT, Recorder, compile_for, cuobjdump

HERE = Path(__file__).parent
SHAPES = [(5000,), (3,), (16, 3, 3, 3)]


def test_in_the_interpreter():
    """The numerical tests, in a process of their own: Triton reads TRITON_INTERPRET when it is imported."""
    file = HERE / "interpreted_fused_sgd.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    out = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True)
    assert out.returncode == 0, out.stdout[-8000:] + out.stderr[-2000:]
    passed = re.search(r"(\d+) passed(, \d+ warnings?)? in ", out.stdout)  # and none skipped
    assert passed and int(passed[1]) >= 40, out.stdout


@pytest.fixture
def recorded(monkeypatch):
    recorders = [Recorder(kernels.fl_fused_sgd_kernel), Recorder(optimizer_step.fl_gradients_kernel)]
    monkeypatch.setattr(kernels, "fl_fused_sgd_kernel", recorders[0])
    monkeypatch.setattr(optimizer_step, "fl_gradients_kernel", recorders[1])
    return recorders


def launch(case, options):
    kernels.launch(
        case.params, case.grads, case.state[0] if case.state else [], case.averages, case.copies, options["lr"],
        options.get("weight_decay", 0.0), options.get("momentum", 0.0), options.get("dampening", 0.0),
        options.get("nesterov", False), options.get("maximize", False), options.get("first", False),
        options.get("ema_decay"), options.get("max_norm"), options.get("grad_scale"), options.get("found_inf"),
        options.get("check", False),
    )  # fmt: skip


CASES = [
    ("all", torch.float32, {"copy_dtype": torch.bfloat16, "grad_dtype": torch.bfloat16}),
    ("all", torch.bfloat16, {}),
    ("plain", torch.float32, {}),
    ("average by a tensor", torch.float16, {"copy_dtype": torch.float32}),
    ("nesterov", torch.float32, {}),
]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: nothing is compiled")
@pytest.mark.skipif(cuobjdump() is None, reason="neither Triton nor the system has cuobjdump")
@pytest.mark.parametrize("capability", sorted(SHARED_LIMIT))
def test_compiles_without_spills(capability, recorded, tmp_path):
    for name, dtype, dtypes in CASES:
        launch(make(name, SHAPES, dtype, **dtypes), options_of(name))
    mixed = make("all", SHAPES, copy_dtype=torch.bfloat16)
    for row, dtype in (
        (mixed.grads, torch.bfloat16),
        (mixed.state[0], torch.float16),
        (mixed.averages, torch.bfloat16),
    ):
        row[0] = row[0].to(dtype)
    mixed.copies[1] = mixed.copies[1].float()
    launch(mixed, options_of("all"))
    odd = make("all", SHAPES)
    odd.params[0] = torch.zeros(5001)[1:]  # not on 16 bytes
    launch(odd, options_of("all"))
    assert len(recorded[0].calls) == len(CASES) + 2 and len(recorded[1].calls) >= 4
    for recorder in recorded:
        for args, options in recorder.calls:
            used = compile_for(capability, recorder.kernel, args, options, tmp_path)
            what = f"{recorder.kernel.__name__} {options}: {used}"
            assert used.spilled == 0 and used.shared <= SHARED_LIMIT[capability] and 0 < used.registers <= 128, what


def test_launches(recorded):
    """One, and one before it where something must be known of all gradients."""
    for name, before in (("plain", 0), ("average", 0), ("scaled", 0), ("clipped", 1), ("all", 1)):
        for recorder in recorded:
            recorder.calls.clear()
        launch(make(name, SHAPES), options_of(name))
        assert [len(r.calls) for r in recorded] == [1, before], name
        assert triton_launches(call(name, "triton"), {}) == 1 + before


def test_numbers_and_tensors_need_no_new_variant(recorded):
    """Rates, norms and counts are arguments: only what is a tensor, what is there and the dtypes are constants."""
    for lr in (0.1, 0.2):
        launch(make("plain", SHAPES), options_of("plain") | {"lr": lr})
    constants = [options for _, options in recorded[0].calls]
    assert constants[0] == constants[1] and all(isinstance(v, (bool, int)) for v in constants[0].values())
