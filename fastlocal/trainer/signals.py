"""SIGTERM and SIGINT end a training at a place where it can be resumed."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Leave(Exception):
    """A signal has come: save, and leave."""


class Signals:
    """While it is entered, the first SIGTERM or SIGINT only leaves a note; a second one acts as it always would.

    Outside the main thread, where Python allows no handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.got: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc: Any) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.got = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def check(self) -> None:
        """Raises `Leave` if a signal has come."""
        if self.got is not None:
            raise Leave

    def farewell(self) -> BaseException:
        """What to raise once everything is saved: KeyboardInterrupt, or SystemExit with the signal's exit code, 143."""
        return KeyboardInterrupt() if self.got == signal.SIGINT else SystemExit(128 + int(signal.SIGTERM))
