"""Signals that ask a run to stop: noted at once, obeyed after the step."""

import signal
import threading
from types import FrameType
from typing import Any

# What batch systems send before they take the machine away, and what a terminal sends
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class StopSignals:
    """While active, SIGTERM, SIGUSR1, SIGUSR2 and a first Ctrl-C only set `received`.

    Leaving the context restores the earlier handlers. Outside the main thread, where Python cannot handle signals, it
    does nothing.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before.clear()

    def _take(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number


def ignore_stop_signals(_: int = 0) -> None:
    """Ignore these signals in a worker process: the run still needs it for its last step."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
