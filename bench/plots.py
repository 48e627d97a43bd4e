"""Pictures of trainings and measurements. They need matplotlib (``pip install 'fastlocal[demo]'``)."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlocal.errors import BackendError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fastlocal.bench.loop import History

Row = Mapping[str, Any]  # of an epoch: a column's name and its number, or None where there is none
# Okabe and Ito's colours: told apart by colour-blind people too, and by their lightness in print.
COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LAST = COLORS[2]  # the network's output


def figure(width: float, height: float) -> Figure:
    """An empty figure that needs no display. Raises BackendError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BackendError("matplotlib is not installed; pip install 'fastlocal[demo]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def _clean(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)


def _epochs(axes: Axes, count: int) -> None:
    axes.set_xlabel("epoch", fontsize=10)
    step = next(n * 10**k for k in range(9) for n in (1, 2, 5) if count <= 10 * n * 10**k)
    axes.set_xticks(range(step, count + 1, step))
    axes.set_xlim(1 - 0.03 * count, count + 0.03 * count)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)


def training(path: str | Path, rows: Sequence[Row], title: str) -> None:
    """One run: training loss and validation accuracy of each block over the epochs; a PNG at ``path``.

    Blocks have the shades of a colour scale, however many there are; the network's output, the last block, is drawn on
    top in a colour of its own.

    Args:
        path: of the PNG.
        rows: `fastlocal.Trainer.history`, or `read_metrics` of its ``metrics.csv``. A last row without losses is that of
            recalibrated BatchNorm statistics.
        title: stands above.

    Raises:
        BackendError: matplotlib is not installed.
    """
    fig = figure(11, 4.2)
    fig.suptitle(title, fontsize=12)
    blocks = sum(1 for name in rows[0] if name.startswith("loss_"))
    validated = any(row.get("val_accuracy") is not None for row in rows)
    panels = fig.subplots(1, 1 + validated, squeeze=False)[0]
    epochs = [row for row in rows if row.get("loss") is not None]

    _blocks(panels[0], epochs, "loss_{}", blocks)
    _clean(panels[0], "training loss of each block")
    values = [row[f"loss_{k}"] for row in epochs for k in range(blocks)]
    if min(values) > 0 and max(values) > 20 * min(values):
        panels[0].set_yscale("log")
        _clean(panels[0], "training loss of each block (log scale)")
    if validated:
        _accuracies(panels[1], rows, epochs, blocks)
    for axes in panels:
        _epochs(axes, max(1, len(epochs)))
    if blocks > 2:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize
        from matplotlib.ticker import MaxNLocator

        scale = fig.colorbar(
            ScalarMappable(Normalize(0, blocks - 2), _shades()),
            ax=list(panels),
            pad=0.01,
            ticks=MaxNLocator(6, integer=True),
        )
        scale.set_label("block (auxiliary heads)", fontsize=9)
        scale.ax.tick_params(labelsize=8)
        scale.outline.set_visible(False)  # type: ignore[operator]
    fig.savefig(path, dpi=120)


def read_metrics(path: str | Path) -> list[dict[str, float | None]]:
    """The rows of a ``metrics.csv``, for `training`; an empty cell is None."""
    with open(path, newline="") as file:
        return [{name: float(text) if text else None for name, text in row.items()} for row in csv.DictReader(file)]


def _accuracies(axes: Axes, rows: Sequence[Row], epochs: Sequence[Row], blocks: int) -> None:
    """Validation accuracy in percent: blocks, output, moving average, and the output after recalibration."""
    _blocks(axes, epochs, "val_accuracy_{}", blocks, 100)
    final, note = rows[-1], ""
    if any(row.get("ema_accuracy") is not None for row in epochs):
        x, y = _points(epochs, "ema_accuracy", 100)
        axes.plot(x, y, "--", color=COLORS[0], linewidth=1.2, zorder=4, label="output, moving average")
    if final.get("loss") is None and final.get("val_accuracy") is not None:
        note = " (recalibrated)"
        axes.plot([len(epochs)], [100 * final["val_accuracy"]], "*", color=LAST, markersize=9, label="recalibrated")
    x, y = _points(rows if note else epochs, "val_accuracy", 100)
    _clean(axes, f"validation accuracy, %; output at the end: {y[-1]:.2f}{note}")
    if axes.get_legend_handles_labels()[0][1:] or blocks > 1:
        axes.legend(frameon=False, fontsize=9, loc="lower right")


def _shades() -> Any:
    """Block 0 dark blue, the last auxiliary head light green; no shade comes near the output's colour or the paper's."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps["viridis"]([0.85 * i / 255 for i in range(256)]))


def _blocks(axes: Axes, rows: Sequence[Row], column: str, blocks: int, factor: float = 1) -> None:
    """A line per block; fewer epochs than 25 also have dots, so that one epoch is seen at all."""
    shades, dots = _shades(), "o" if len(rows) < 25 else ""
    width = 1.4 if blocks <= 12 else 0.9
    for k in range(blocks):
        last = k == blocks - 1
        x, y = _points(rows, column.format(k), factor)
        if not x:
            continue  # a head without class scores
        look: dict[str, Any] = {"color": shades(k / max(1, blocks - 2)), "linewidth": width, "markersize": 2.5}
        if last:
            look = {"color": LAST, "linewidth": 2.4, "markersize": 4, "label": "output (last block)", "zorder": 3}
        elif blocks == 2:
            look["label"] = "block 0"
        axes.plot(x, y, marker=dots, **look)
    if blocks > 1:
        axes.legend(frameon=False, fontsize=9)


def _points(rows: Sequence[Row], column: str, factor: float = 1) -> tuple[list[int], list[float]]:
    """Epochs from 1 and values, where there are any."""
    found = [(i, factor * row[column]) for i, row in enumerate(rows, start=1) if row.get(column) is not None]
    return [i for i, _ in found], [value for _, value in found]


def comparison(path: str | Path, rows: Sequence[dict[str, Any]], histories: Sequence[History], title: str) -> None:
    """Several methods, each as a plain loop and as fastlocal: curves at the left, three bar charts at the right.

    Args:
        path: of the PNG.
        rows: as `fastlocal.bench.demo.run` returns them, a plain row before its fastlocal row.
        histories: of the same runs, in the same order.
    """
    fig = figure(13.5, 5.8)
    fig.suptitle(title, fontsize=13)
    left, right = fig.subfigures(1, 2, width_ratios=(1, 1.6), squeeze=False)[0]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    color = dict(zip(methods, COLORS))

    top, bottom = left.subplots(2, 1, sharex=True)
    for row, history in zip(rows, histories):
        fast = row["loop"] == "fastlocal"
        style = {"color": color[row["method"]], "linestyle": "-" if fast else ":", "linewidth": 2 if fast else 1.6}
        numbers = range(1, len(history.epochs) + 1)
        top.plot(numbers, [100 * epoch.test_accuracy for epoch in history.epochs], **style)
        bottom.plot(numbers, [epoch.losses[-1] for epoch in history.epochs], **style)
    _clean(top, "test accuracy, %")
    _clean(bottom, "training loss of the network's output (log scale)")
    bottom.set_yscale("log")
    for axes in (top, bottom):
        _epochs(axes, max(len(history.epochs) for history in histories))
    top.set_xlabel("")
    from matplotlib.lines import Line2D

    keys = [Line2D([], [], color=color[m], linewidth=2, label=_label(rows, m)) for m in methods]
    keys += [
        Line2D([], [], color="#555555", linewidth=2, label="fastlocal"),
        Line2D([], [], color="#555555", linewidth=1.6, linestyle=":", label="plain loop"),
    ]
    top.legend(handles=keys, fontsize=9, frameon=False, loc="lower right")

    columns = (
        ("test_accuracy", "test accuracy, %\n(higher is better)", 100.0, "{:.1f}"),
        ("saved_mib", f"peak saved MiB, batch of {rows[0]['batch_size']}\n(lower is better)", 1.0, "{:.1f}"),
        ("steps_per_second", "steps per second\n(higher is better)", 1.0, "{:.1f}"),
    )
    for axes, (key, name, factor, form) in zip(right.subplots(1, 3), columns):
        ticks = []
        for i, method in enumerate(methods):
            for row in rows:
                if row["method"] != method:
                    continue
                fast = row["loop"] == "fastlocal"
                at, value = i + (0.215 if fast else -0.215), factor * row[key]
                look = {"color": color[method]} if fast else {"color": "white", "hatch": "////"}
                axes.bar(at, value, 0.41, edgecolor=color[method], linewidth=1.2, **look)
                axes.annotate(
                    form.format(value), (at, value), textcoords="offset points", xytext=(0, 3), ha="center", fontsize=8
                )
            ticks.append(_label(rows, method).replace(", ", "\n"))
        axes.set_xticks(range(len(methods)), ticks, fontsize=9)
        axes.margins(y=0.08)
        _clean(axes, name)
    from matplotlib.patches import Patch

    bars = [
        Patch(facecolor="white", edgecolor="#555555", hatch="////", label="plain loop of the method"),
        Patch(facecolor="#555555", edgecolor="#555555", label="fastlocal"),
    ]
    right.legend(handles=bars, loc="outside lower center", ncols=2, fontsize=10, frameon=False)
    fig.savefig(path, dpi=140)


def _label(rows: Sequence[dict[str, Any]], method: str) -> str:
    blocks = next(row["blocks"] for row in rows if row["method"] == method)
    return f"{method}, {blocks} block{'s' * (blocks > 1)}"
