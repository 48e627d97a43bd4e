"""The progress bar of a training: steps, speed, the loss of each block, updates left out, memory, accuracy."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from fastlocal.engine.memory import peak_bytes

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


def skipped_text(counts: Sequence[float]) -> str:
    """``skipped 3 (block 2)``: updates left out, and of which blocks; nothing where there is none."""
    blocks = [k for k, count in enumerate(counts) if count]
    if not blocks:
        return ""
    shown = ", ".join(map(str, blocks[:4])) + (", ..." if len(blocks) > 4 else "")
    return f"skipped {round(sum(counts))} (block{'s' if len(blocks) > 1 else ''} {shown})"


def _bytes_text(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _count_text(count: float) -> str:
    """Three digits: 7.25, 128, 3.91k, 1.2M."""
    if count >= 999.5e3:
        return f"{count / 1e6:.3g}M"
    return f"{count / 1e3:.3g}k" if count >= 999.5 else f"{count:.3g}"


class Bar:
    """tqdm on stderr with losses, speed, memory and accuracy behind it; nothing where tqdm is missing or ``enabled`` is false.

    A terminal sees several updates a second, a file one every ten seconds.

    Args:
        steps: how many in all; None where that is not known.
        label: stands in front.
        done: steps done before, of a resumed training.
        device: whose peak memory is shown; see `fastlocal.engine.memory.peak_bytes`.
        split: name of the data that ``accuracy`` is of.

    Attributes:
        label: stands in front, from the next step on.
        accuracy: the last test accuracy (0 to 1), stands at the end; ``ema_accuracy``, of the averaged model, behind it.
        skipped: how many updates of each block were left out because something was not finite.
    """

    def __init__(
        self,
        steps: int | None,
        label: str = "",
        *,
        enabled: bool = True,
        done: int = 0,
        device: torch.device | None = None,
        split: str = "test",
    ):
        self.label = label
        self.accuracy: float | None = None
        self.ema_accuracy: float | None = None
        self.skipped: Sequence[float] = ()
        self._device, self._split = device, split
        self._losses: Sequence[float] = ()
        self._samples = self._sampled = 0  # in how many steps
        self._next = 0.0  # when the text is to be made anew
        self._bar: Any = None
        if enabled:
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self._interval = 0.2 if sys.stderr.isatty() else 10.0
            style = "{desc} {percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt} {rate_fmt}{postfix}"
            if steps is None:
                style = "{desc} {n_fmt} steps {rate_fmt}{postfix}"
            self._bar = tqdm(
                total=steps,
                desc=label,
                initial=done,
                mininterval=self._interval,
                bar_format=style,
                dynamic_ncols=True,
            )

    def step(self, losses: Sequence[float] | None, samples: int | None = None) -> None:
        """One step is done; ``losses`` is None where they were not read, ``samples`` where they were not counted."""
        if self._bar is None:
            return
        if samples is not None:
            self._samples += samples
            self._sampled += 1
        if losses is not None:
            self._losses = losses
        now = time.monotonic()
        if now >= self._next:
            self._next = now + self._interval / 2  # twice for each time that tqdm shows it
            self._write()
        self._bar.update()

    def text(self) -> str:
        """What stands behind the bar."""
        parts = [f"loss {losses_text(self._losses)}"] if len(self._losses) else []
        if self._sampled and (rate := self._rate()):
            parts.append(f"{_count_text(rate * self._samples / self._sampled)} samples/s")
        if len(self.skipped) and (skipped := skipped_text(self.skipped)):
            parts.append(skipped)
        peak = peak_bytes(self._device)
        if parts and peak is not None:
            parts.append(f"peak {_bytes_text(peak)}")
        if self.accuracy is not None:
            parts.append(f"{self._split} {self.accuracy:.1%}")
        if self.ema_accuracy is not None:
            parts.append(f"EMA {self.ema_accuracy:.1%}")
        return "  ".join(parts)

    def _rate(self) -> float | None:
        """Steps a second, the number that tqdm shows."""
        if self._bar is None:
            return None
        now = self._bar.format_dict
        steps = now["n"] - now["initial"]
        return now["rate"] or (steps / now["elapsed"] if now["elapsed"] else None)

    def _write(self) -> None:
        self._bar.set_description_str(self.label, refresh=False)
        self._bar.set_postfix_str(self.text(), refresh=False)

    def close(self) -> None:
        """Leaves the last state on the screen."""
        if self._bar is not None:
            self._write()
            self._bar.close()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()
