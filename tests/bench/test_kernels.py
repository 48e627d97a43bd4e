"""Every Triton kernel compiles for GPUs that are not there, without spills, and is in the record."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from fastlocal.bench import ahead, kernels, operators
from fastlocal.bench.device import Cpu
from fastlocal.ops import _dispatch

ROOT = Path(__file__).resolve().parents[2]
compiling = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1" or ahead.cuobjdump() is None,
    reason="TRITON_INTERPRET=1, or no cuobjdump to read registers with",
)


@compiling
def test_every_kernel_compiles_without_spills(tmp_path: Path) -> None:
    """The first launch of each kernel and dtype, for sm_90; `fastlocal bench kernels` compiles all of them for all."""
    seen, bad = set(), []
    for launch in kernels.launches():
        if (launch.kernel, launch.case.dtype) not in seen:
            seen.add((launch.kernel, launch.case.dtype))
            bad.append(kernels.wrong(kernels.compiled(launch, 90, tmp_path)))
    assert not [text for text in bad if text], bad
    assert {name for name, _ in seen} == set(ahead.kernels()), "a kernel that no case of bench/kernels.py launches"


def test_the_record_holds_every_kernel_and_no_spill() -> None:
    record = json.loads(kernels.RECORD.read_text())
    names = re.findall(r"^def (fl_\w+)\(", "".join(p.read_text() for p in (ROOT / "triton_kernels").glob("*.py")), re.M)
    assert sorted(names) == sorted(ahead.kernels())
    again = "compile them anew: fastlocal bench kernels --record bench/results/kernels.json"
    assert {row["kernel"] for row in record["rows"]} == set(names), again
    for name in names:
        rows = [row for row in record["rows"] if row["kernel"] == name]
        assert {row["capability"] for row in rows} == set(kernels.CAPABILITIES), name
    assert not [text for text in map(kernels.wrong, record["rows"]) if text]


def test_what_is_wrong_is_said() -> None:
    row = {"kernel": "k", "operator": "o", "size": "s", "dtype": "d", "capability": 90}
    row |= {"registers": 255, "shared": 227 << 10, "spilled": 0}
    assert kernels.wrong(row) is None
    for key, value in (("registers", 256), ("registers", 0), ("shared", (227 << 10) + 1), ("spilled", 8)):
        assert str(value) in str(kernels.wrong(row | {key: value}))


def test_recording_runs_nothing_and_leaves_nothing_behind() -> None:
    before = {name: id(kernel) for name, kernel in ahead.kernels().items()}
    case = operators.Head(3, 4, 5, 6)
    inputs = case.inputs("cpu")
    with ahead.recording() as recorders, pytest.raises(ZeroDivisionError):
        assert case.explain(inputs) == "triton"
        case.ours()(*inputs)
        assert len(recorders["fl_pool_linear_cross_entropy_fwd_kernel"].calls) == 1
        raise ZeroDivisionError
    assert {name: id(kernel) for name, kernel in ahead.kernels().items()} == before
    assert case.explain(inputs) != "triton" and _dispatch.platform(torch.device("cpu")).device == "cpu"
    variants = case.variants(inputs, Cpu().compiled)
    assert operators.disagreement(case.ours()(*inputs), variants["eager"].make()(*inputs)) < 1e-5
