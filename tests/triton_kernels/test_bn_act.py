import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Triton is not installed")

from fastlocal.blocks.measure import LaunchCounter
from fastlocal.ops import bn_act, bn_act_conv
from fastlocal.triton_kernels import bn_act as kernels
from tests.ops.norms import make
from tests.triton_kernels.ahead import SHARED_LIMIT, Recorder, compile_for, cuobjdump

HERE = Path(__file__).parent
OPERATOR = sys.modules["fastlocal.ops.bn_act"]
KERNELS = [name for name in vars(kernels) if name.startswith("fl_")]
interpreting = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: nothing is compiled"
)


def test_in_the_interpreter():
    """The numerical tests, in a process of their own: Triton reads TRITON_INTERPRET when it is imported."""
    file = HERE / "interpreted_bn_act.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    out = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True)
    assert out.returncode == 0, out.stdout[-8000:] + out.stderr[-2000:]
    passed = re.search(r"(\d+) passed(, \d+ warnings?)? in ", out.stdout)  # and none skipped
    assert passed and int(passed[1]) >= 90, out.stdout


@pytest.fixture
def recorded(monkeypatch):
    recorders = {name: Recorder(getattr(kernels, name)) for name in KERNELS}
    for name, recorder in recorders.items():
        monkeypatch.setattr(kernels, name, recorder)
    monkeypatch.setattr(OPERATOR._dispatch, "choose", lambda *_: "triton")
    return recorders


def launched(recorded):
    return {name: len(r.calls) for name, r in recorded.items() if r.calls}


def step(case, save="residual"):
    """Forward, backward and evaluation."""
    x = case.x.clone().requires_grad_()
    residual = None if case.residual is None else case.residual.clone().requires_grad_()
    y = bn_act(x, case.norm, residual, act=case.act, slope=case.slope, residual_norm=case.second, save=save)
    y.backward(case.dy)
    for norm in (case.norm, case.second):
        if norm is not None:
            norm.eval()
    with torch.no_grad():
        case.call(bn_act, case.x, case.residual)


# Shape, channels_last, options, mask. Small maps (one launch), large ones, channels_last, matrices; every option.
COMPILED = [
    ((128, 64, 8, 8), False, dict(residual="plain"), False),
    ((64, 64, 7, 7), False, dict(residual="norm", act="leaky_relu"), False),
    ((64, 16, 32, 32), False, dict(residual="plain"), True),
    ((128, 256), False, dict(), False),
    ((16, 64, 56, 56), True, dict(residual="norm"), False),
    ((2, 5, 31, 33), False, dict(residual="plain"), True),
]


@interpreting
@pytest.mark.skipif(cuobjdump() is None, reason="neither Triton nor the system has cuobjdump")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("capability", sorted(SHARED_LIMIT))
def test_compiles_without_spills(capability, dtype, recorded, tmp_path):
    seen = set()
    for index, (shape, last, options, mask) in enumerate(COMPILED):
        # Every device and dtype has the first case; every other one each device once, and both dtypes.
        if index > 0 and (index + (capability == 90)) % 2 == (dtype == torch.float32):
            continue
        for recorder in recorded.values():
            recorder.calls.clear()
        step(make(shape, dtype, last=last, **options), "mask" if mask else "residual")
        for name, recorder in recorded.items():
            for call in recorder.calls:
                seen.add(name)
                used = compile_for(capability, recorder.kernel, *call, tmp_path)
                what = f"{shape, last, options, mask} {name}: {used}"
                assert used.spilled == 0, what
                assert used.shared <= SHARED_LIMIT[capability], what
                assert 0 < used.registers <= 128, what
    assert seen >= {"fl_bn_act_fwd_kernel", "fl_bn_act_bwd_kernel", "fl_bn_act_eval_kernel"}


class Trace(TorchDispatchMode):
    """Names of what is dispatched, without views and allocations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and "empty" not in func._schema.name:
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("residual, mask", [(None, False), ("plain", False), ("plain", True), ("norm", False)])
@pytest.mark.parametrize(
    "shape, last, forward",
    [
        ((128, 64, 8, 8), False, 1),
        ((32, 3, 32, 32), False, 1),  # 32,768 values a channel
        ((33, 3, 32, 32), False, 2),
        ((128, 8, 8, 8), True, 2),
        ((16, 8, 8, 8), True, 1),
        ((128, 256), False, 1),
        ((2049, 4), False, 2),
    ],
)
def test_launches(shape, last, forward, residual, mask, recorded):
    """What the registered functions say is what is launched, and nothing else runs."""
    case = make(shape, last=last, residual=residual)
    x = case.x.requires_grad_()
    for name in ("running_mean", "running_var"):
        assert getattr(case.norm, name).is_contiguous()
    save = "mask" if mask else "residual"
    layouts = (case.dy, case.dy.expand_as(case.x), case.dy.flatten(1)[:, :1].view(-1, *[1] * (len(shape) - 1)))
    for i, dy in enumerate(layouts):
        for recorder in recorded.values():
            recorder.calls.clear()
        with LaunchCounter() as counter, Trace() as trace:
            y = bn_act(x, case.norm, case.residual, residual_norm=case.second, save=save)
        ran = [name for name in trace.names if name.startswith("aten")]
        assert set(ran) <= {"aten::add_", "aten::detach"}, ran  # of num_batches_tracked
        assert sum(launched(recorded).values()) == counter.by_op["fastlocal::bn_act_forward"] == forward
        for recorder in recorded.values():
            recorder.calls.clear()
        with LaunchCounter() as counter, Trace() as trace:
            torch.autograd.grad(y, x, dy.expand_as(y))
        assert sum(launched(recorded).values()) == forward
        assert counter.by_op["fastlocal::bn_act_backward"] == forward + (i == 2)
        assert counter.total == forward + (i == 2)
    case.norm.eval()
    if case.second is not None:
        case.second.eval()
    with torch.no_grad(), LaunchCounter() as counter:
        case.call(bn_act, case.x, case.residual)
    assert counter.total == 1


def test_a_copy_of_the_gradient_is_a_launch(recorded):
    """The one that the registered function adds: it happens inside the operator."""
    case = make((4, 3, 5, 5))
    stats = torch.ones(2, 3)
    weight = case.norm.weight.detach()
    dy = torch.ones(()).expand(4, 3, 5, 5)
    with Trace() as trace:
        OPERATOR._run_backward(
            dy, case.x, None, None, None, weight, weight, None, None, stats, "relu", 0.0,
            True, False, "triton",
        )  # fmt: skip
    assert [name for name in trace.names if "clone" in name or "copy" in name] == trace.names and len(
        trace.names
    ) == 1, trace.names


@pytest.mark.parametrize("last", [False, True])
def test_launches_with_a_convolution(last, recorded):
    case = make((128, 16, 8, 8), last=last)
    conv = nn.Conv2d(16, 16, 3, padding=1, bias=False)
    with LaunchCounter() as counter:
        y = bn_act_conv(case.x.requires_grad_(), case.norm, conv)
    each = 2 if last else 1
    assert counter.by_op == {"aten::add_": 1, "fastlocal::bn_act_forward": each, "aten::convolution": 1}
    dy = torch.randn_like(y)
    leaves = [case.x, *case.norm.parameters(), *conv.parameters()]
    with LaunchCounter() as counter:
        torch.autograd.grad(y, leaves, dy)
    assert counter.by_op == {"aten::convolution_backward": 2, "fastlocal::bn_act_backward_": each}
    assert sum(launched(recorded).values()) == 2 * each
    assert recorded["fl_bn_act_bwd_kernel"].calls[0][1]["AGAIN"]


def test_config_is_pure_and_bounded():
    for outer, channels, inner in itertools.product((1, 3, 128, 50000), (1, 3, 64, 127, 2048), (1, 4, 49, 1024, 50000)):
        for single, bits in itertools.product((True, False), repeat=2):
            c = kernels.config(outer, channels, inner, single, bits)
            assert c == kernels.config(outer, channels, inner, single, bits)
            assert c.block_a * c.block_c * c.block_s <= 4096
            assert c.block_a >= (8 if bits else 1) and 1 <= c.parts <= kernels.MAX_PARTS
            assert all(size & (size - 1) == 0 for size in c[:4]) and c.warps <= 16
            assert c.parts == 1 or not single
            if inner > 1 and c.block_c > 1:
                assert c.block_s * c.block_c <= 32
