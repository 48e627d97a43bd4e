"""The progress bar of a training: steps, speed, and the loss of each block."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

_SHOWN = 12  # losses; of more blocks, evenly spaced ones are shown


def losses_text(losses: Sequence[float]) -> str:
    """``1.9 .31 .22 | last .12``; of more than 12 blocks, evenly spaced ones with their numbers (``0:1.9 5:.31``)."""
    *heads, last = losses
    if not heads:
        return _short(last)
    if len(heads) < _SHOWN:
        shown = [_short(loss) for loss in heads]
    else:
        picked = [round(i * (len(heads) - 1) / (_SHOWN - 2)) for i in range(_SHOWN - 1)]
        shown = [f"{k}:{_short(heads[k])}" for k in picked]
    return f"{' '.join(shown)} | last {_short(last)}"


def _short(loss: float) -> str:
    """Two digits: 12, 1.9, .31."""
    text = f"{loss:.2f}"
    return text[1:] if text.startswith("0.") else f"{loss:.{0 if loss >= 9.95 else 1}f}"


class Bar:
    """tqdm on stderr with the losses behind it; nothing where tqdm is missing or ``enabled`` is false.

    A terminal sees several updates a second, a file one every ten seconds.

    Attributes:
        label: stands in front, from the next step on.
        accuracy: the last test accuracy (0 to 1), stands at the end.
    """

    def __init__(self, steps: int, label: str = "", *, enabled: bool = True):
        self.label = label
        self.accuracy: float | None = None
        self._losses: Sequence[float] = ()
        self._bar: Any = None
        if enabled:
            try:
                from tqdm import tqdm
            except ImportError:
                return
            interval = 0.2 if sys.stderr.isatty() else 10.0
            style = "{desc} {percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt} {rate_fmt}{postfix}"
            self._bar = tqdm(total=steps, desc=label, mininterval=interval, bar_format=style, dynamic_ncols=True)

    def step(self, losses: Sequence[float] | None) -> None:
        """One step is done; ``losses`` is None where they were not read."""
        if self._bar is None:
            return
        if losses is not None:
            self._losses = losses
            self._write()
        self._bar.update()

    def _write(self) -> None:
        tested = "" if self.accuracy is None else f"  test {self.accuracy:.1%}"
        self._bar.set_description_str(self.label, refresh=False)
        self._bar.set_postfix_str(f"loss {losses_text(self._losses)}{tested}" if self._losses else "", refresh=False)

    def close(self) -> None:
        """Leaves the last state on the screen."""
        if self._bar is not None:
            self._write()
            self._bar.close()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()
