"""Pictures of trainings and measurements. They need matplotlib (``pip install 'fastlocal[demo]'``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlocal.errors import BackendError
from fastlocal.trainer import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours: told apart by colour-blind people too, and by their lightness in print.
COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


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
    step = max(1, -(-count // 10))
    axes.set_xticks(range(step if step > 1 else 1, count + 1, step))
    axes.set_xlim(1 - 0.03 * count, count + 0.03 * count)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)


def training(path: str | Path, history: History, title: str) -> None:
    """One run: the training loss of each block and the test accuracy, over the epochs; a PNG at ``path``."""
    fig = figure(10, 4)
    fig.suptitle(title, fontsize=12)
    left, right = fig.subplots(1, 2)
    numbers = range(1, len(history.epochs) + 1)
    blocks = len(history.epochs[0].losses)
    from matplotlib import colormaps

    shades = colormaps["cividis"]
    for k in range(blocks):
        named = k in (0, blocks - 1) or blocks <= 5
        label = f"block {k}" + (" (output)" if k == blocks - 1 else "") if named else None
        losses = [epoch.losses[k] for epoch in history.epochs]
        left.plot(numbers, losses, "o-", markersize=3, color=shades(0.9 * k / max(1, blocks - 1)), label=label)
    left.legend(frameon=False, fontsize=9)
    _clean(left, "training loss of each block")
    right.plot(numbers, [100 * epoch.test_accuracy for epoch in history.epochs], "o-", markersize=4, color=COLORS[1])
    right.annotate(
        f"{100 * history.test_accuracy:.1f} %",
        (numbers[-1], 100 * history.test_accuracy),
        textcoords="offset points",
        xytext=(0, -14),
        ha="center",
        fontsize=9,
    )
    _clean(right, "test accuracy, %")
    for axes in (left, right):
        _epochs(axes, len(history.epochs))
    fig.savefig(path, dpi=120)


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
