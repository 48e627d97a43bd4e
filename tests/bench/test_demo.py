import json

import pytest
import torch

from fastlocal.bench import demo
from fastlocal.data import Batches, Images


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(16) % 4
    x = (torch.randint(0, 60, (16, 1, 8, 8), generator=generator) + 60 * y.view(-1, 1, 1, 1)).to(torch.uint8)
    return Images(x, y, x[:8], y[:8], 4, torch.tensor([0.5]), torch.tensor([0.3]), "tiny")


def test_both_loops_start_equal_and_take_nearly_the_same_steps(images):
    for method in demo.METHODS:
        plain, fast = demo.sides(method, images, seed=0)
        start = [p.clone() for p in plain.model.parameters()]
        assert all(torch.equal(p, q) for p, q in zip(start, fast.model.parameters(), strict=True))
        for x, y in list(Batches(images, batch_size=8).epoch(0)):
            losses = torch.stack(plain.step(x, y))
            torch.testing.assert_close(fast.step.step(x, y).losses, losses, rtol=1e-3, atol=1e-3)
        assert any(not torch.equal(p, q) for p, q in zip(start, plain.model.parameters(), strict=True))


def test_counting_repeats_and_leaves_the_model_alone(images):
    plain, fast = demo.sides("dgl", images, seed=0)
    batch = next(Batches(images, batch_size=8).epoch(0))
    before = [t.clone() for side in (plain, fast) for t in side.model.state_dict().values()]
    first = [demo.count(side, batch) for side in (plain, fast)]
    assert first == [demo.count(side, batch) for side in (plain, fast)]
    after = [t for side in (plain, fast) for t in side.model.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert first[1]["launches"] < first[0]["launches"]
    bp = demo.count(demo.sides("bp", images, seed=0)[1], batch)
    assert first[1]["saved_mib"] < 0.5 * bp["saved_mib"]


def test_run_and_what_it_writes(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "load", lambda name: images)
    out = tmp_path / "demo"
    arguments = ["--epochs", "1", "--batch-size", "8", "--methods", "bp", "dgl", "--out", str(out)]
    assert demo.main(arguments) == 0
    printed = capsys.readouterr().out
    record = json.loads((out / "table.json").read_text())
    rows = record["rows"]
    assert [(r["method"], r["loop"], r["blocks"]) for r in rows] == [
        ("BP", "plain", 1), ("BP", "fastlocal", 1), ("DGL", "plain", 10), ("DGL", "fastlocal", 10),
    ]  # fmt: skip
    for row in rows:
        assert 0 <= row["test_accuracy"] <= 1 and row["steps_per_second"] > 0 and row["saved_mib"] > 0
        assert "  ".join(demo.cells(row)[3:5]).split()[0] in printed
    assert record["command"].endswith("--epochs 1 --batch-size 8 --threads 1 --seed 0 --methods bp dgl")
    assert "| DGL | 10 | fastlocal |" in (out / "table.md").read_text()
    assert (out / "dgl-fastlocal.csv").read_text().count("\n") == 2
    assert (out / "dgl.safetensors").exists() and (out / "bp.safetensors").exists()
    assert (
        printed.rstrip()
        .splitlines()[-1]
        .endswith("fastlocal train --model resnet32 --data digits --method auglocal --blocks 16 --epochs 2")
    )


def test_the_picture(images, tmp_path):
    pytest.importorskip("matplotlib")
    rows, histories, _ = demo.run(images, ["bp", "dgl"], epochs=2, batch_size=8, seed=0)
    demo.plots.comparison(tmp_path / "a.png", rows, histories, "title")
    data = (tmp_path / "a.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 10_000
