import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from fastlocal.blocks.measure import LaunchCounter
from fastlocal.triton_kernels import class_cross_entropy as kernels
from tests.ops import test_class_goodness_cross_entropy as goodness
from tests.ops import test_norm_linear_cross_entropy as cosine
from tests.triton_kernels.ahead import SHARED_LIMIT, Recorder, compile_for, cuobjdump

HERE = Path(__file__).parent
SHARED = sys.modules["fastlocal.ops._cross_entropy"]
NAMES = [f"fl_class_cross_entropy_{part}_kernel" for part in ("length", "row", "reduce")]
DIVISOR = "fl_pool_linear_cross_entropy_divisor_kernel"
interpreting = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: nothing is compiled"
)


def test_in_the_interpreter():
    """The numerical tests, in a process of their own: Triton reads TRITON_INTERPRET when it is imported."""
    file = HERE / "interpreted_class_cross_entropy.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    out = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True)
    assert out.returncode == 0, out.stdout[-8000:] + out.stderr[-2000:]
    passed = re.search(r"(\d+) passed(, \d+ warnings?)? in ", out.stdout)  # and none skipped
    assert passed and int(passed[1]) >= 20, out.stdout


@pytest.fixture
def recorded(monkeypatch):
    recorders = [Recorder(getattr(kernels, name)) for name in (*NAMES, DIVISOR)]
    for name, recorder in zip((*NAMES, DIVISOR), recorders):
        monkeypatch.setattr(kernels, name, recorder)
    return recorders


@interpreting
@pytest.mark.skipif(cuobjdump() is None, reason="neither Triton nor the system has cuobjdump")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("capability", sorted(SHARED_LIMIT))
def test_compiles_without_spills(capability, dtype, recorded, tmp_path):
    options = (2.0, 0.5, 0.1, -100, 1.0)
    labels, chances = torch.zeros(8, dtype=torch.int64), torch.rand(8, 4096)
    for shape, classes, last in [((8, 160, 8, 8), 10, False), ((8, 100, 4, 4), 100, True), ((8, 4096, 1), 4096, False)]:
        x = torch.randn(shape).to(dtype)
        if last:
            x = x.to(memory_format=torch.channels_last)
        kernels.launch(x.flatten(2), labels, classes, *options, True, True)
    kernels.launch(x.flatten(2), chances, 4096, 2.0, 0.0, 0.1, -100, 1.0, True, True)
    if dtype == torch.float32:
        scores = torch.randn(8, 4096)
        for needs in (True, False):
            kernels.launch(scores, labels, 4096, *options, needs, True)
        kernels.launch(scores, labels, 4096, *options, True, False)
        lengths, class_lengths = kernels.lengths(torch.randn(8, 9000)), torch.randn(4096)
        kernels.launch(scores, labels, 4096, *options, True, True, lengths, class_lengths, True, 1e-12)
        kernels.launch(scores, chances, 4096, 2.0, 0.0, 0.1, -100, 1.0, True, True, lengths, None, False, 1e-12)
    for recorder in recorded[:3] if dtype == torch.float32 else recorded[1:2]:
        assert recorder.calls
        for call in recorder.calls:
            used = compile_for(capability, recorder.kernel, *call, tmp_path)
            what = f"{recorder.kernel.__name__}: {used}"
            assert used.spilled == 0, what
            assert used.shared <= SHARED_LIMIT[capability], what
            assert 0 < used.registers <= 128, what


def launched(run, call, recorded):
    """Launches of a call by Triton: those of ATen and of the kernels."""
    for recorder in recorded:
        recorder.calls.clear()
    with LaunchCounter() as inside:
        out = run(*call)
    return inside.total + sum(len(r.calls) for r in recorded), out, inside.by_op


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x,
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x[:, :, ::2],
        lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
        lambda x: x[:0],
        lambda x: x.bfloat16(),
    ],
)
def test_launches_of_class_goodness(change, recorded, monkeypatch):
    """What the counter is told is what the operators launch."""
    module = sys.modules["fastlocal.ops.class_goodness_cross_entropy"]
    monkeypatch.setattr(module._dispatch, "choose", lambda *_: "triton")
    for form, classes, kind, count in (
        ("groups", 4, "index", 4096),
        ("weight", 2, "probabilities", 4),
        ("weight", 8, "smoothed", 4096),
        ("weight and bias", 2, "index", 4096),
        ("weight and bias", 8, "ignored", 4),
    ):
        monkeypatch.setattr(SHARED, "COUNT_ROWS", count)
        (x, weight, bias, target), options = goodness.make(6, 8, (4, 3), classes, form=form, kind=kind)
        x = change(x)
        args = (x, weight, None if bias is None else bias.half(), target[: len(x)])
        smoothing, ignore = options.get("label_smoothing", 0.0), options.get("ignore_index", -100)
        for needs, wide in (([True, weight is not None, bias is not None], False), ([False] * 3, True)):
            call = (*args, classes, 2.0, 0.0, smoothing, ignore, 1.0, needs, wide, "triton")
            count, _, by_op = launched(module._run, call, recorded)
            assert module.triton_launches(call, {}) == count, by_op
        for grad_loss in (None, torch.ones(())):
            call = (*args[:3], torch.randn(len(x), classes), grad_loss, "triton")
            count, _, by_op = launched(module._run_backward, call, recorded)
            assert module.triton_backward_launches(call, {}) == count, by_op


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x,
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x[:, :, ::2],
        lambda x: x[:0],
        lambda x: x.bfloat16(),
    ],
)
def test_launches_of_cosines(change, recorded, monkeypatch):
    module = sys.modules["fastlocal.ops.norm_linear_cross_entropy"]
    monkeypatch.setattr(module._dispatch, "choose", lambda *_: "triton")
    x = change(torch.randn(6, 8, 4, 3))
    for basis, kind, rows in (
        ("weight", "index", 4096),
        ("weight", "probabilities", 4),
        ("sine", "smoothed", 4096),
        ("square", "ignored", 4),
    ):
        monkeypatch.setattr(SHARED, "COUNT_ROWS", rows)
        (_, weight, target), options = cosine.make(6, x.shape[1:], 5, kind=kind, basis=basis)
        smoothing, ignore = options.get("label_smoothing", 0.0), options.get("ignore_index", -100)
        if basis == "weight":
            weight = weight.half()
        for normalize in (False, True):
            for needs, wide in (([True, basis == "weight"], False), ([False] * 2, True)):
                args = (x, weight, target[: len(x)], basis, 2.0, normalize)
                call = (*args, smoothing, ignore, 1.0, needs, wide, "triton")
                count, _, by_op = launched(module._run, call, recorded)
                assert module.triton_launches(call, {}) == count, by_op


def test_config_is_pure_and_bounded():
    for classes in (1, 2, 10, 100, 1000, 4096):
        for group in (0, 1, 7, 49, 3136, 100000):
            c = kernels.config(classes, group)
            assert c == kernels.config(classes, group)
            assert c.block_k & (c.block_k - 1) == 0 and c.block_m & (c.block_m - 1) == 0
            assert c.block_k >= classes and c.block_k * c.block_m <= 4096
            assert c.block_k * c.block_m <= 16 * 32 * c.warps
