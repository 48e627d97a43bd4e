"""The GPU benchmark on a CPU: every code path with tiny sizes, and what its table may say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastlocal as fl
from fastlocal.bench import gpu

ROOT = Path(fl.__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("bench") / "bench.jsonl"
    command = [sys.executable, "-m", "fastlocal.bench.gpu", "--dry-run", "--out", str(out), "--budget", "600"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return run.stdout, [json.loads(line) for line in out.read_text().splitlines()]


def test_every_variant_of_every_case_was_timed(dry: tuple[str, list[dict[str, Any]]]) -> None:
    records = dry[1]
    assert not [r for r in records if "error" in r or r["kind"] == "skipped"]
    for case in gpu.TINY.cases:
        got = {r["variant"] for r in records if r["case"] == case.name}
        model = fl.localize(fl.models.create("resnet20"), "dgl", blocks=3, sample=torch.randn(2, 3, 8, 8))
        assert got == set(gpu.Steps(case, model, torch.zeros(0), torch.zeros(0), gpu.Cpu()).makers())
    steps = [r for r in records if r["kind"] == "step"]
    assert len({r["variant"] for r in steps}) == 15 and len(steps) == 27
    assert all(r["finite"] and r["seconds"] and r["steps_per_second"] > 0 and r["peak_bytes"] > 0 for r in steps)
    assert all(r["first_loss_agrees"] for r in steps if not r["variant"].startswith("BP"))
    kernels = [r for r in records if r["kind"] == "kernel"]
    rivals = 5 + hasattr(F, "linear_cross_entropy")
    assert len(kernels) == 2 * rivals * len(gpu.TINY.shapes) and {r["mode"] for r in kernels} == {"eager", "graph"}
    assert records[0]["kind"] == "copy"
    for r in records:
        assert r["dry_run"] and not r["verified"]
        assert r["machine"]["torch"] == str(torch.__version__) and len(r["machine"]["source"]) == 16


def test_a_dry_run_says_so_and_shows_no_ratio(dry: tuple[str, list[dict[str, Any]]]) -> None:
    text = dry[0]
    assert text.rstrip().endswith("dry run on a CPU: no number above is a measurement")
    assert "no ratios for kernel and step" in text
    assert not [line for line in text.splitlines() if line.endswith("x") and "MiB" in line]


def test_the_plain_loop_and_the_engine_do_the_same_step() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(4, 3, 16, 16), torch.randint(10, (4,))
    model = fl.localize(fl.models.create("resnet20"), "auglocal", blocks=4, sample=x, depth=1)
    steps = gpu.Steps(gpu.Case("auglocal", 4, 4), model, x, y, gpu.Cpu())
    makers = steps.makers()
    losses = [[float(variant.step()) for _ in range(3)] for variant in (makers[n]() for n in makers if "fp32" in n)]
    assert len(losses) == 3
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-3)
    assert losses[0][0] != losses[0][1], "nothing was trained"


@pytest.mark.parametrize("options", [{"segments": 0}, {"segments": 3}, {"compiled": "units"}])
def test_the_rivals_are_backpropagation(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(4, 3, 16, 16), torch.randint(10, (4,))
    model = fl.localize(fl.models.create("resnet20"), "bp", blocks=1, sample=x)
    steps = gpu.Steps(gpu.Case("bp", 1, 4), model, x, y, gpu.Cpu())
    plain, rival = steps.bp("fp32", ""), steps.bp("fp32", "", **options)
    # Statistics are updated twice where a forward runs twice; training does not read them.
    for _ in range(3):
        assert float(rival.step()) == pytest.approx(float(plain.step()), rel=1e-4)


def test_checkpoints_keep_less() -> None:
    x, y = torch.randn(16, 3, 32, 32), torch.randint(10, (16,))
    model = fl.localize(fl.models.create("resnet20"), "bp", blocks=1, sample=x[:2])
    steps = gpu.Steps(gpu.Case("bp", 1, 16), model, x, y, gpu.Cpu())
    peaks = []
    for segments in (None, 0, 3):
        variant = steps.bp("fp32", "", segments=segments)
        variant.step()
        variant.forget_gradients()
        peaks.append(gpu.Cpu().peak(variant.step))
    assert max(peaks[1:]) < 0.75 * peaks[0], peaks


@pytest.mark.parametrize("shape", gpu.TINY.shapes)
def test_the_rivals_of_the_operator_compute_the_same(shape: gpu.Shape) -> None:
    torch.manual_seed(0)
    calls = gpu.Calls(shape, gpu.Cpu(), 1)
    makers = calls.makers()
    del makers["compiled"]  # the same function
    truth = makers[gpu.EAGER]()(*[t.detach().double().requires_grad_() for t in calls.sets[0][:3]], calls.sets[0][3])
    for name, make in makers.items():
        got = make()(*calls.sets[0])
        loss, grads = (got[0], got[2:]) if name.startswith("fastlocal") else got
        close = dict(rtol=1e-5, atol=1e-6) if shape.dtype == torch.float32 else dict(rtol=5e-2, atol=2e-2)
        torch.testing.assert_close(loss.double(), truth[0], **close)
        for a, b in zip(grads, truth[1], strict=True):
            torch.testing.assert_close(a.double(), b, **close)


def test_bytes_that_must_move() -> None:
    x, w, b, y = (torch.empty(s) for s in ((3, 4, 5, 5), (6, 4), (6,), (3,)))
    gradients = x[:, :, 0, 0].numel() + w.numel() + b.numel()  # that of the features is one number per pooled value
    assert gpu.Shape(3, 4, 5, 6).must_move() == 4 * (x.numel() + w.numel() + b.numel() + gradients) + 8 * y.numel()


def test_no_ratio_without_green_tests(tmp_path: Path) -> None:
    report = tmp_path / "tests.jsonl"
    assert not gpu.verified(None, "step") and not gpu.verified(report, "step")
    kernel, step = "tests/gpu/test_pool_linear_cross_entropy.py::test_x", "tests/gpu/test_levels.py::test_y"

    def write(*lines: dict[str, Any]) -> None:
        report.write_text("\n".join(json.dumps(line) for line in lines))

    write({"collected": 2}, {"test": kernel, "outcome": "passed"}, {"test": step, "outcome": "failed"})
    assert gpu.verified(report, "kernel") and not gpu.verified(report, "step")
    write({"test": step, "outcome": "skipped"})
    assert not gpu.verified(report, "step") and not gpu.verified(report, "kernel")

    def record(variant: str, median: float, verified: bool) -> dict[str, Any]:
        found = {"kind": "step", "case": "c", "variant": variant, "median": median, "steps_per_second": 1 / median}
        return found | {"peak_bytes": 2**20, "finite": True, "verified": verified, "dry_run": False}

    pair = (("plain loop, fp32", 0.4), ("engine, fp32", 0.1))
    assert "   4.00x" in gpu.table([record(name, t, True) for name, t in pair])
    assert "4.00x" not in gpu.table([record(name, t, False) for name, t in pair])


def test_a_variant_that_fails_is_a_record_and_stops_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(self: gpu.Steps, precision: str, layout: str) -> gpu.Variant:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB\nand more lines")

    monkeypatch.setattr(gpu.Steps, "engine", fail)
    sizes = gpu.Sizes(cases=gpu.TINY.cases[1:2], shapes=(), image=8, rounds=1, copy_bytes=1 << 10)
    records = gpu.Bench(sizes, gpu.Cpu(), tmp_path / "out" / "b.jsonl", budget=100).run()
    failed = [r for r in records if "error" in r]
    assert (
        len(failed) == 4 and failed[0]["error"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB"
    )
    assert [r["variant"] for r in records if "median" in r] == ["plain loop, fp32", "plain loop, bf16 channels_last"]
    assert "OutOfMemoryError" in gpu.table(records)
    assert len((tmp_path / "out" / "b.jsonl").read_text().splitlines()) == len(records)


def test_the_budget_is_kept() -> None:
    records = gpu.Bench(gpu.TINY, gpu.Cpu(), None, budget=2).run()
    assert {r["kind"] for r in records} == {"skipped"} and "no time left" in gpu.table(records)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err
