import csv

import pytest

pytest.importorskip("matplotlib")

from fastlocal.bench import plots


def rows(blocks: int, epochs: int, **more):
    found = []
    for epoch in range(epochs):
        row = {"epoch": epoch, "loss": 1.0 / (epoch + 1)}
        row |= {f"loss_{k}": (blocks - k) / (epoch + 1) for k in range(blocks)}
        row |= {f"val_accuracy_{k}": (k + 1) / blocks * epoch / epochs for k in range(blocks)}
        found.append(row | {"val_accuracy": epoch / epochs} | more)
    return found


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """`plots.training`, returning the panels that it drew."""
    kept = []
    real = plots.figure
    monkeypatch.setattr(plots, "figure", lambda *size: kept.append(real(*size)) or kept[-1])

    def draw(rows):
        plots.training(tmp_path / "curves.png", rows, "title")
        data = (tmp_path / "curves.png").read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 5_000
        return kept[-1].axes

    return draw


def named(axes):
    return {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")}


def test_many_blocks_have_a_scale_and_one_legend_entry(drawn):
    losses, accuracies, scale = drawn(rows(55, 30))
    assert len(losses.get_lines()) == len(accuracies.get_lines()) == 55
    assert list(named(losses)) == ["output (last block)"] and scale.get_ylabel() == "block (auxiliary heads)"
    assert scale.get_ylim() == (0, 53)
    assert len({line.get_color() for line in losses.get_lines()}) == 55
    assert list(named(losses)["output (last block)"].get_ydata()) == [1 / (e + 1) for e in range(30)]
    assert losses.get_yscale() == "log" and accuracies.get_title(loc="left").endswith("output at the end: 96.67")


@pytest.mark.parametrize(("blocks", "panels"), [(1, 2), (2, 2), (3, 3)])
def test_few_blocks(drawn, blocks, panels):
    axes = drawn(rows(blocks, 1))
    assert len(axes) == panels and len(axes[0].get_lines()) == blocks


def test_what_is_missing_is_left_out(drawn):
    axes = drawn([{name: value for name, value in row.items() if "val" not in name} for row in rows(2, 3)])
    assert len(axes) == 1
    found = rows(3, 4, val_accuracy_0=None)  # a head without class scores
    for row in found[::2]:
        row |= {name: None for name in row if name.startswith("val_")}  # validated every second epoch
    _, accuracies, _ = drawn(found)
    assert len(accuracies.get_lines()) == 2
    assert list(named(accuracies)["output (last block)"].get_xdata()) == [2, 4]


def test_average_and_recalibration_are_drawn(drawn):
    found = rows(2, 3, ema_accuracy=0.9)
    found.append(dict.fromkeys(found[0]) | {"epoch": 3, "val_accuracy": 0.95})
    _, accuracies = drawn(found)
    assert list(named(accuracies)["output, moving average"].get_ydata()) == [90, 90, 90]
    assert named(accuracies)["recalibrated"].get_xydata().tolist() == [[3, 95]]
    assert "95.00 (recalibrated)" in accuracies.get_title(loc="left")


def test_rows_are_read_from_the_file(tmp_path):
    found = rows(2, 2, val_accuracy=None)
    with open(tmp_path / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]))
        writer.writeheader()
        writer.writerows(found)
    assert plots.read_metrics(tmp_path / "metrics.csv") == found
