import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Triton is not installed")

from fastlocal.ops.pool_linear_cross_entropy import triton_launches
from fastlocal.triton_kernels import pool_linear_cross_entropy as kernels
from tests.ops.cases import make
from tests.triton_kernels.ahead import SHARED_LIMIT, Recorder, compile_for, cuobjdump

operator = sys.modules["fastlocal.ops.pool_linear_cross_entropy"]

HERE = Path(__file__).parent
interpreting = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: nothing is compiled"
)


def test_in_the_interpreter():
    """The numerical tests, in a process of their own: Triton reads TRITON_INTERPRET when it is imported."""
    file = HERE / "interpreted_pool_linear_cross_entropy.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    out = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True)
    assert out.returncode == 0, out.stdout[-8000:] + out.stderr[-2000:]
    passed = re.search(r"(\d+) passed(, \d+ warnings?)? in ", out.stdout)  # and none skipped
    assert passed and int(passed[1]) >= 30, out.stdout


@pytest.fixture
def recorded(monkeypatch):
    """Every kernel of the module, by the last part of its name."""
    prefix = "fl_pool_linear_cross_entropy_"
    recorders = {}
    for name in dir(kernels):
        if name.startswith("fl_"):
            recorders[name.removeprefix(prefix).removesuffix("_kernel")] = Recorder(getattr(kernels, name))
            monkeypatch.setattr(kernels, name, recorders[name.removeprefix(prefix).removesuffix("_kernel")])
    return recorders


def launch(args, options=None, *, pool="mean", needs=(True, True, True), fused=True, count=True):
    options = options or {}
    if args[1].shape[0] > operator.MAX_CLASSES:
        call = (options.get("class_weight"), pool, options.get("label_smoothing", 0.0), -100, 1.0, needs)
        return operator._by_chunks(kernels.Online, *args, *call)
    smoothing, ignore = options.get("label_smoothing", 0.0), options.get("ignore_index", -100)
    return kernels.launch(*args, options.get("class_weight"), pool, smoothing, ignore, 1.0, needs, fused, count)


# Channels, spatial, classes, channels_last, kind of target, fused.
SHAPES = [
    (16, (32, 32), 10, True, "index", True),
    (16, (32, 32), 10, False, "weighted", True),
    (64, (8, 8), 100, True, "probabilities", True),
    (64, (7, 7), 1000, False, "weighted probabilities", True),
    (127, (56, 56), 100, True, "index", True),
    (2048, (1, 1), 10, False, "smoothed", True),
    (128, (7, 7), 1000, False, "index", False),
    (16, (1, 1), 1300, False, "index", False),
    (16, (1, 1), 20_000, False, "weighted probabilities", False),
]


@interpreting
@pytest.mark.skipif(cuobjdump() is None, reason="neither Triton nor the system has cuobjdump")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("capability", sorted(SHARED_LIMIT))
def test_compiles_without_spills(capability, dtype, recorded, tmp_path):
    for channels, spatial, classes, channels_last, kind, fused in SHAPES:
        args, options = make(4, channels, spatial, classes, kind=kind, dtype=dtype, channels_last=channels_last)
        for recorder in recorded.values():
            recorder.calls.clear()
        launch(args, options, fused=fused, count=kind != "weighted")
        for recorder in recorded.values():
            for call in recorder.calls:
                used = compile_for(capability, recorder.kernel, *call, tmp_path)
                what = f"{channels, spatial, classes, channels_last, kind} {recorder.kernel.__name__}: {used}"
                assert used.spilled == 0, what
                assert used.shared <= SHARED_LIMIT[capability], what
                assert 0 < used.registers <= 128, what


class Trace(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if not view and name not in ("empty", "new_empty"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("wide_grads", [True, False])
@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, False, False)])
@pytest.mark.parametrize(
    "rows, channels, classes, kind, dtype",
    [
        (8, 16, 10, "index", torch.float32),
        (8, 16, 10, "probabilities", torch.bfloat16),
        (8, 16, 10, "weighted", torch.float32),
        (5000, 4, 3, "ignored", torch.float32),
        (5000, 4, 3, "weighted", torch.float32),
        (8, 100, 1000, "smoothed", torch.float32),
        (8, 100, 1000, "index", torch.bfloat16),
        (8, 4, 1300, "index", torch.float32),
        (5000, 4, 4000, "weighted", torch.bfloat16),
        (8, 4, 1300, "probabilities", torch.float32),
    ],
)
def test_launches(rows, channels, classes, kind, dtype, needs, wide_grads, recorded, monkeypatch):
    """What triton_launches says is what the operator launches."""
    monkeypatch.setattr(operator._dispatch, "choose", lambda *_: "triton")
    args, options = make(rows, channels, (2, 2), classes, kind=kind, dtype=dtype)
    smoothing, ignore = options.get("label_smoothing", 0.0), options.get("ignore_index", -100)
    call = (*args, options.get("class_weight"), "mean", smoothing, ignore, 1.0, list(needs), wide_grads, "triton")
    with Trace() as trace:
        operator._run(*call)
    count = len(trace.names) + sum(len(r.calls) for r in recorded.values())
    assert triton_launches(call, {}) == count, trace.names
    if rows == 8 and classes == 10 and wide_grads and all(needs):
        assert count == 3  # rows, sums, weight gradient


def test_empty_batch_launches_no_empty_grid(recorded):
    args, _ = make(0, 3, (2, 2), 4)
    launch(args)
    assert {name: len(r.calls) for name, r in recorded.items() if r.calls} == {"reduce": 1}


def test_config_is_pure_and_bounded():
    for channels in (1, 3, 16, 127, 2048):
        for positions in (1, 49, 1024, 50000):
            for classes in (1, 2, 10, 1000, 1024):
                for channels_last in (True, False):
                    c = kernels.config(channels, positions, classes, channels_last)
                    assert c == kernels.config(channels, positions, classes, channels_last)
                    assert c.block_k >= classes
                    assert max(c.block_k, c.block_s) * c.block_c <= 4096 and min(c[:3]) >= 1
                    assert all(size & (size - 1) == 0 for size in c)
