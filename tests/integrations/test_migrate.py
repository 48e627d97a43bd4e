"""The programs of docs/migrate.md: those before run, those after keep the numbers that the page says they keep."""

from __future__ import annotations

import logging
import re
import runpy
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlocal as fl
from fastlocal.engine.clip import Clip

ROOT = Path(__file__).parents[2]
PROGRAMS = ROOT / "examples" / "migrate"
PAGE = (ROOT / "docs" / "migrate.md").read_text()
pytest.importorskip("sklearn")


def program(name: str) -> dict[str, Any]:
    return runpy.run_path(str(PROGRAMS / f"{name}.py"))


def lines(name: str) -> Counter[str]:
    return Counter(line.strip() for line in (PROGRAMS / f"{name}.py").read_text().splitlines())


def test_every_program_is_on_the_page() -> None:
    names = {path.name for path in PROGRAMS.glob("*.py")}
    assert names == set(re.findall(r"`examples/migrate/(\w+\.py)`", PAGE))


@pytest.mark.parametrize(
    "before, after",
    [
        ("detach_before", "detach_after"),
        ("checkpointing_before", "checkpointing_after"),
        ("lightning_before", "lightning_level_a"),
    ],
)
def test_the_diffs_of_the_page_are_lines_of_the_programs(before: str, after: str) -> None:
    """What a route's diff takes away stands more often in the program before, what it adds in the one after."""
    gone, come = lines(before) - lines(after), lines(after) - lines(before)
    part = PAGE.partition(f"`examples/migrate/{after}.py`")[2].partition("\n## ")[0]
    diff = part.partition("```diff\n")[2].partition("```")[0].splitlines()
    assert len(diff) >= 4
    for line in diff:
        assert line[1:].strip() in (gone if line[0] == "-" else come), line


def test_the_detach_loop_keeps_its_losses_to_the_last_bit() -> None:
    before = program("detach_before")["main"](epochs=1, steps=12)
    assert program("detach_after")["main"](epochs=1, steps=12) == before
    assert len(before) == 12 and len(before[0]) == 4 and before[-1] < before[0]


def test_one_block_is_the_training_with_checkpointing_to_the_last_bit() -> None:
    before, _ = program("checkpointing_before")["main"](epochs=1, steps=4)
    for recompute in (False, True):
        after, _ = program("checkpointing_after")["main"](
            epochs=1, steps=4, blocks=1, recompute=recompute, backend="reference"
        )
        assert [row[0] for row in after] == before


def test_recomputing_inside_the_blocks_changes_no_loss() -> None:
    plain, again = (
        program("checkpointing_after")["main"](epochs=1, steps=3, blocks=4, recompute=recompute)[0]
        for recompute in (False, True)
    )
    assert plain == again and len(plain[0]) == 4


def test_the_memory_table_is_what_plan_says() -> None:
    table = PAGE.partition("| blocks |")[2].partition("\n\n")[0].splitlines()[2:]
    rows = {
        int(cells[0].split()[-1]): cells[1:] for cells in ([c.strip() for c in r.strip("| ").split("|")] for r in table)
    }
    assert set(rows) == {1, 2, 4, 6, 12}
    after = program("checkpointing_after")
    for blocks in (1, 12):  # the others take as long and say the same
        for column, recompute in enumerate((False, True)):
            after["Block"].recompute = recompute
            method = "dgl" if blocks > 1 else "bp"
            x, host = torch.empty(256, 1, 8, 8), "cpu-core"
            plan = fl.plan(after["ViT"], x, method=method, blocks=blocks, optimizer="adam", device=host)
            assert f"{plan.peak_bytes / 2**20:.1f}" == rows[blocks][2 * column], (blocks, recompute)
            assert f"{plan.flops / 1e9:.1f}" == rows[blocks][2 * column + 1], (blocks, recompute)


@pytest.mark.parametrize("name", ["lightning_before", "lightning_level_a"])
def test_lightning_runs(name: str, tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert 0 < program(name)["main"](epochs=1, folder=str(tmp_path), steps=2) < 1
    assert list(tmp_path.rglob("*.ckpt")) and list(tmp_path.rglob("metrics.csv"))


def test_the_trainer_that_replaces_lightning_runs(tmp_path: Path) -> None:
    assert 0 < program("lightning_after")["main"](epochs=1, folder=str(tmp_path / "run"), steps=2) < 1
    assert {"config.json", "metrics.csv", "timing.csv", "checkpoints"} <= {p.name for p in (tmp_path / "run").iterdir()}


@pytest.mark.parametrize("clip", [None, 0.5])
def test_both_trainers_give_the_same_weights(clip: float | None, tmp_path: Path) -> None:
    """fp32, no shuffling: bit for bit; clipped over all blocks up to the order in which the norm is added up."""
    L = pytest.importorskip("lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    parts = program("lightning_level_a")
    x, y = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(64) % 10
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 16)

    torch.manual_seed(0)
    module = parts["Classifier"](epochs=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = L.Trainer(
            max_epochs=2, accumulate_grad_batches=2, gradient_clip_val=clip, accelerator="cpu", devices=1, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, loader)

    torch.manual_seed(0)
    model = fl.localize(parts["Net"](), "dgl", blocks=4, sample=torch.zeros(2, 1, 8, 8))
    fl.Trainer(
        model, lambda named: torch.optim.SGD(named, lr=0.05, momentum=0.9, weight_decay=5e-4), accumulate=2,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2),
        clip=None if clip is None else Clip(clip, scope="global"), channels_last=False, backend="reference", folder=None,
        progress=False,
    ).fit(loader, epochs=2)  # fmt: skip
    ours, theirs = model.state_dict(), module.net.state_dict()
    assert ours.keys() == theirs.keys()
    if clip is None:
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    else:
        assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 1e-5
