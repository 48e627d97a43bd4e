import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from fastlocal import reference
from fastlocal.bench.ahead import specialized
from fastlocal.blocks.measure import LaunchCounter, StorageTracker
from fastlocal.ops import similarity_matching_loss, similarity_matching_loss_value_and_grad
from fastlocal.triton_kernels import similarity_matching_loss as kernels
from tests.triton_kernels.ahead import SHARED_LIMIT, Recorder, compile_for, cuobjdump

HERE = Path(__file__).parent
OPERATOR = sys.modules["fastlocal.ops.similarity_matching_loss"]
NAMES = [f"fl_similarity_matching_loss_{part}_kernel" for part in ("deviation", "unit", "pairs", "finish")]
interpreting = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: nothing is compiled"
)


def test_in_the_interpreter():
    """The numerical tests, in a process of their own: Triton reads TRITON_INTERPRET when it is imported."""
    file = HERE / "interpreted_similarity_matching_loss.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    out = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True)
    assert out.returncode == 0, out.stdout[-8000:] + out.stderr[-2000:]
    passed = re.search(r"(\d+) passed(, \d+ warnings?)? in ", out.stdout)  # and none skipped
    assert passed and int(passed[1]) >= 61, out.stdout


@pytest.fixture
def recorded(monkeypatch):
    recorders = [Recorder(getattr(kernels, name)) for name in NAMES]
    for name, recorder in zip(NAMES, recorders):
        monkeypatch.setattr(kernels, name, recorder)
    monkeypatch.setattr(OPERATOR._dispatch, "choose", lambda *_: "triton")
    return recorders


@interpreting
@pytest.mark.skipif(cuobjdump() is None, reason="neither Triton nor the system has cuobjdump")
@pytest.mark.parametrize("capability", sorted(SHARED_LIMIT))
def test_compiles_without_spills(capability, recorded, tmp_path):
    shapes = [
        ((128, 64, 8, 8), "labels", False),
        ((16, 256, 14, 14), "probabilities", True),
        ((16, 65, 192), "labels", False),
        ((1024, 64), "matrix", False),
        ((63, 31), "probabilities", False),
    ]
    for (shape, kind, last), dtype in itertools.product(shapes, (torch.float32, torch.bfloat16)):
        x, target = torch.randn(*shape).to(dtype), torch.arange(shape[0]) % 10
        x = x.to(memory_format=torch.channels_last) if last else x
        matched = torch.zeros(1, 1).expand(len(x), len(x)) if kind == "matrix" else None
        target = torch.rand(len(x), 10) if kind == "probabilities" else target
        if shape[1] != 65:
            similarity_matching_loss_value_and_grad(x, target, 10, matched)
        if len(shape) > 2:
            similarity_matching_loss(x.requires_grad_(), target, 10, matched)
    similarity_matching_loss(x.detach(), target, 10)
    done, seen = set(), set()
    for recorder in recorded:
        for call in recorder.calls:
            key = repr((recorder.kernel.__name__, specialized(recorder.kernel, *call)))
            if key in seen:
                continue
            seen.add(key)
            used = compile_for(capability, recorder.kernel, *call, tmp_path)
            what = f"{recorder.kernel.__name__}: {used}"
            assert used.spilled == 0, what
            assert used.shared <= SHARED_LIMIT[capability], what
            assert 0 < used.registers <= 255, what
            done.add(recorder.kernel.__name__)
    assert done == set(NAMES)


@pytest.mark.parametrize("form", ["value", "grad", "parts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_launches(form, dtype, recorded):
    """What the counter is told is what the operator launches; and nothing of the size of all pairs is made."""
    shapes = [(6,), (5, 2), (4, 7), (32, 32, 32), (33, 32, 32), (3, 4, 4), (8, 1, 5), (1024, 33)]
    for shape in shapes:
        for rows in (300 if len(shape) == 1 else 2, 1, 0):
            whole, labels = torch.randn(2, rows, *shape)[0].to(dtype), torch.arange(rows) % 10
            others = [whole.transpose(-1, -2).contiguous().transpose(-1, -2)] if len(shape) > 1 else []
            matrix = reference.target_similarity(labels, 10)
            for x in (whole, *others):
                for given in ((labels, None), (torch.rand(rows, 10), None), (None, matrix)):
                    call = (x, *given, 10, 1.0, form, "triton")
                    with LaunchCounter() as inside, StorageTracker() as made:
                        OPERATOR._run(*call)
                    launched = inside.total + sum(len(r.calls) for r in recorded)
                    assert OPERATOR.launches(call, {}) == launched, (shape, rows, x.stride())
                    if len(shape) == 1:
                        # Unit vectors of both, the gradient and its shares, norms, sums of the pairs.
                        numbers = rows * (6 + 10 + 6 + kernels.SPLITS * 6 + 1) + kernels.SPLITS * 64 + 1
                        assert made.peak <= 4 * numbers < 4 * max(rows**2, numbers + 1)
                    for recorder in recorded:
                        recorder.calls.clear()


def test_the_programs_have_all_numbers(recorded):
    """Rows, channels and pairs that no program has would stay as they were."""
    for shape in [(300, 5), (37, 300), (3, 70, 40, 40), (2, 600, 8, 8), (3, 65, 1000), (2, 4096, 3, 3)]:
        for layout in (torch.contiguous_format, torch.channels_last)[: max(1, len(shape) - 2)]:
            x = torch.randn(*shape).to(memory_format=layout)
            width = OPERATOR._width(x)
            similarity_matching_loss_value_and_grad(x, torch.arange(len(x)), 300)
            pairs, finish = recorded[2:]
            span = finish.calls[0][0][finish.kernel.arg_names.index("span")]
            block = finish.calls[0][1]["BLOCK_C"]
            assert span == width or (span % block == 0 and x.numel() > len(x) * OPERATOR.ONE_LAUNCH)
            options = pairs.calls[0][1]
            share = pairs.calls[0][0][pairs.kernel.arg_names.index("span")]
            assert share % options["BLOCK_N"] == 0
            parts, span = kernels.splits(len(x), width, kernels.config(len(x)))
            assert span == share and (parts - 1) * span < len(x) <= parts * span and parts <= kernels.SPLITS
            for recorder in recorded:
                recorder.calls.clear()


def test_config_is_pure_and_bounded():
    for rows in (1, 128, 1024, 4096, 100000):
        c = kernels.config(rows)
        assert c == kernels.config(rows) and all(b >= 16 and b & (b - 1) == 0 for b in c[:2])
    for width in (1, 16, 31, 128, 4096):
        assert all(b >= 16 and b & (b - 1) == 0 for b in kernels.blocks(width))
    for channels, positions in [(4, 4), (1, 3136), (2048, 49), (5, 100_000), (4096, 2)]:
        for last in (False, True):
            block_c, block_s = kernels.map_blocks(channels, positions, last)
            assert block_c * block_s <= kernels.TILE and block_c & (block_c - 1) == block_s & (block_s - 1) == 0


def test_the_smallest_norm_is_the_specification_s():
    assert kernels.EPS.value == sys.modules[reference.target_similarity.__module__].EPS
