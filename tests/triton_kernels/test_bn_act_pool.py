import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Triton is not installed")

from fastlocal.ops.bn_act_pool import backward_launches, forward_launches
from fastlocal.triton_kernels import bn_act_pool as kernels
from tests.ops.test_bn_act_pool import make
from tests.triton_kernels.ahead import SHARED_LIMIT, Recorder, compile_for, cuobjdump

HERE = Path(__file__).parent
OPERATOR = sys.modules["fastlocal.ops.bn_act_pool"]
KERNELS = ("moments", "fwd", "sums", "bwd")
interpreting = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: nothing is compiled"
)


def test_in_the_interpreter():
    """The numerical tests, in a process of their own: Triton reads TRITON_INTERPRET when it is imported."""
    file = HERE / "interpreted_bn_act_pool.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    out = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True)
    assert out.returncode == 0, out.stdout[-8000:] + out.stderr[-2000:]
    passed = re.search(r"(\d+) passed(, \d+ warnings?)? in ", out.stdout)  # and none skipped
    assert passed and int(passed[1]) >= 55, out.stdout


@pytest.fixture
def recorded(monkeypatch):
    recorders = {}
    for name in KERNELS:
        full = f"fl_bn_act_pool_{name}_kernel"
        recorders[name] = Recorder(getattr(kernels, full))
        monkeypatch.setattr(kernels, full, recorders[name])
    monkeypatch.setattr(OPERATOR, "increment_version", lambda tensors: None)  # nothing is written
    return recorders


def operate(shape, dtype=torch.float32, last=False, kind=0, training=True, act="relu", needs=(True, True), change=None):
    """Calls both operators where Triton would serve them; returns the arguments of each."""
    x, norm, residual, residual_norm, dpooled = make(shape, dtype, kind, last, training)
    x = x if change is None else change(x)
    tensors = [t.detach() for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var)]
    other = OPERATOR._parts(residual_norm)
    if kind == 2:
        other = tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in other)
    args = (
        x, *tensors, norm.num_batches_tracked, 0.1, 1e-5, residual, *other, training, act, 0.01, "triton"
    )  # fmt: skip
    _, mean, rstd, mean2, rstd2 = OPERATOR._run_forward(*args)
    extra = (*other[:2], mean2, rstd2) if kind == 2 else (None,) * 4
    needed = [needs[0], needs[1] and kind > 0]
    backward = (dpooled, x, *tensors[:2], mean, rstd, residual, *extra, training, act, 0.01, needed, "triton")
    OPERATOR._run_backward(*backward)
    return args, backward


# Shape, channels_last, residual: a channel in one tile, in several, in several programs; the same with channels side by side.
SHAPES = [
    ((64, 64, 8, 8), False, 0),
    ((8, 16, 32, 32), False, 2),
    ((256, 2048, 7, 7), False, 1),
    ((1024, 64, 8, 8), False, 2),
    ((8, 64, 8, 8), True, 2),
    ((256, 2048, 7, 7), True, 2),
]


@interpreting
@pytest.mark.skipif(cuobjdump() is None, reason="neither Triton nor the system has cuobjdump")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("capability", sorted(SHARED_LIMIT))
def test_compiles_without_spills(capability, dtype, recorded, tmp_path):
    # For one device every shape in one of the dtypes; for the others, what needs most registers.
    shapes = SHAPES[3:4] if capability != 90 else SHAPES[:4] if dtype == torch.float32 else SHAPES[3:]
    for shape, last, kind in shapes:
        for recorder in recorded.values():
            recorder.calls.clear()
        with torch.device("meta"):
            operate(shape, dtype, last, kind)
        for name, recorder in recorded.items():
            for call in recorder.calls:
                used = compile_for(capability, recorder.kernel, *call, tmp_path)
                what = f"{shape} channels_last={last} residual={kind} {name}: {used}"
                assert used.spilled == 0, what
                assert used.shared <= SHARED_LIMIT[capability], what
                assert 0 < used.registers <= (128 if call[1]["num_warps"] > 8 else 200), what


class Trace(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if not view and name not in ("empty", "new_empty", "empty_like"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "shape, last, change, forward, backward",
    [
        ((8, 4, 8, 8), False, None, 1, 1),
        ((520, 2, 8, 8), False, None, 2, 2),
        ((32, 4, 8, 8), True, None, 1, 1),
        ((40, 4, 8, 8), True, None, 2, 2),
        ((8, 4, 8, 8), False, lambda x: x.transpose(2, 3), 2, 2),  # a copy: no one stride leads through the positions
        ((300, 7), False, None, 1, 1),
    ],
)
def test_launches(shape, last, change, forward, backward, training, kind, recorded, monkeypatch):
    """What the registered functions say is what the operators launch."""
    counts = []
    for run in ("_run_forward", "_run_backward"):
        original = getattr(OPERATOR, run)

        def counted(*args, original=original):
            before = sum(len(r.calls) for r in recorded.values())
            with Trace() as trace:
                out = original(*args)
            counts.append(sum(len(r.calls) for r in recorded.values()) - before + len(trace.names))
            return out

        monkeypatch.setattr(OPERATOR, run, counted)
    calls = operate(shape, last=last, kind=kind, training=training, change=change)
    assert counts == [forward_launches(calls[0], {}), backward_launches(calls[1], {})]
    assert counts == [forward if training or change else 1, backward]


def test_sums_of_parts_are_all_where_no_map_is_needed(recorded):
    operate((2048, 2, 8, 8), kind=1, needs=(False, False))
    assert [len(recorded[name].calls) for name in KERNELS] == [1, 1, 1, 1]
    kernel, grids = kernels.fl_bn_act_pool_bwd_kernel, []
    kernels.fl_bn_act_pool_bwd_kernel = type(
        "Grids", (), {"__getitem__": lambda _, grid: grids.append(grid) or kernel[grid]}
    )()
    operate((2048, 2, 8, 8), kind=1, needs=(False, False))
    operate((2048, 2, 8, 8), kind=1)
    assert grids == [(2, 1), (2, 64)]


def test_config_is_pure_and_bounded():
    for rows in (1, 8, 127, 1024, 100_000):
        for channels in (1, 3, 64, 2048):
            for positions in (1, 4, 49, 1024, 50_176):
                for last in (True, False):
                    for whole in (True, False):
                        c = kernels.config(rows, channels, positions, last, whole)
                        assert c == kernels.config(rows, channels, positions, last, whole)
                        sizes = c.block_n, c.block_s, c.block_c, c.warps
                        assert all(size > 0 and size & (size - 1) == 0 for size in sizes)
                        assert c.block_n * c.block_s * c.block_c <= kernels.TILE
                        assert c.rows == rows if whole else -(-rows // c.rows) <= kernels.MAX_PARTS
