import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from fastlocal.triton_kernels import ema_update as kernels
from fastlocal.triton_kernels import multi_tensor
from tests.ops.lists import MANY, draw
from tests.triton_kernels.ahead import SHARED_LIMIT, Recorder, compile_for, cuobjdump

HERE = Path(__file__).parent


def test_in_the_interpreter():
    """The numerical tests, in a process of their own: Triton reads TRITON_INTERPRET when it is imported."""
    file = HERE / "interpreted_ema_update.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    out = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True)
    assert out.returncode == 0, out.stdout[-8000:] + out.stderr[-2000:]
    passed = re.search(r"(\d+) passed(, \d+ warnings?)? in ", out.stdout)  # and none skipped
    assert passed and int(passed[1]) >= 35, out.stdout


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: nothing is compiled")
@pytest.mark.skipif(cuobjdump() is None, reason="neither Triton nor the system has cuobjdump")
@pytest.mark.parametrize("capability", sorted(SHARED_LIMIT))
def test_compiles_without_spills(capability, tmp_path, monkeypatch):
    recorder = Recorder(kernels.fl_ema_update_kernel)
    monkeypatch.setattr(kernels, "fl_ema_update_kernel", recorder)
    one, wide, half = draw([(5000,), (3,)]), torch.tensor(0.9, dtype=torch.float64), torch.bfloat16
    mixed = [draw([(5000,)])[0], draw([(5,)], half)[0], draw([(5,)], torch.float16)[0], torch.tensor(1)]
    for averages, sources, decay in (
        (one, one, 0.9),
        (one, [t.to(half) for t in one], wide),
        ([t.to(half) for t in one], [t.to(half) for t in one], torch.tensor(0.9)),
        (mixed, [mixed[0].half(), *mixed[1:]], 0.9),
        ([torch.zeros(9001)[1:]], [torch.zeros(9000)], 0.9),
        ([torch.arange(9)], [torch.arange(9)], 0.9),
    ):
        kernels.launch(averages, sources, decay)
    assert len(recorder.calls) == 6
    for args, options in recorder.calls:
        used = compile_for(capability, recorder.kernel, args, options, tmp_path)
        assert used.spilled == 0 and used.shared <= SHARED_LIMIT[capability] and 0 < used.registers <= 128, used


def test_vector_loads_where_all_is_aligned():
    """Whole chunks of tensors on 16-byte addresses; a view that is not makes the launch take single elements."""
    a, b = torch.zeros(5000), torch.zeros(5003)
    assert multi_tensor.plan([[a], [b[:5000]]]).aligned
    assert not multi_tensor.plan([[a], [b[1:5001]]]).aligned
    assert multi_tensor.plan([[a], [b[1:2]]], scalars=1).aligned


def test_the_plan_covers_every_element_once():
    tensors = draw([*MANY, (), (0,)])
    plan = multi_tensor.plan([tensors])
    seen = {i: [] for i in range(len(tensors))}
    for t, c in plan.chunks.tolist():
        seen[t].append(c)
    for i, t in enumerate(tensors):
        assert seen[i] == list(range(max(1, -(-t.numel() // multi_tensor.BLOCK))))
        assert plan.sizes[i] == t.numel() and plan.addresses[i] == t.data_ptr()
    assert plan.addresses[-1] == 0 and plan.programs == len(plan.chunks) and plan.tensors == len(tensors)


def test_a_table_filled_by_launches_is_the_same():
    """What a captured graph does instead of a copy from the host."""
    pointers = [2**47 - 16, 0, 7, torch.zeros(3).data_ptr()]
    assert multi_tensor.fill_in_graph(pointers, torch.device("cpu")).tolist() == [*pointers, 0]


def test_entries_that_a_graph_may_read_are_never_dropped():
    cache = multi_tensor._Cache(2)
    for key in "abc":
        cache.put(key, key.upper())
    assert cache.get("a", False) is None and cache.get("b", True) == "B"
    for key in "defg":
        cache.put(key, key)
    assert cache.get("b", False) == "B" and cache.get("c", False) is None and len(cache.entries) == 2
