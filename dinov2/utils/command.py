"""Exit codes and one-line errors of commands, stop signals, progress bars and durations."""

import logging
import signal
import threading
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from types import FrameType
from typing import Any

from tqdm import tqdm

logger = logging.getLogger("dinov2")

USER_ERRORS = (FileNotFoundError, KeyError, ValueError, PermissionError, NotADirectoryError, ConnectionError)

# exit code of a run that was stopped after a checkpoint: the same command resumes it (EX_TEMPFAIL)
REQUEUE_EXIT_CODE = 75

# signals of batch systems before they stop a job, and of a terminal
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


def error_text(error: BaseException) -> str:
    """Return an error's message; str() of a KeyError would quote it."""
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)


def exit_code(command: Callable[[], None]) -> int:
    """Run `command` and return 0, or 2 after a user's mistake, whose message is logged."""
    try:
        command()
    except USER_ERRORS as error:
        logger.error("%s", error_text(error))
        logger.debug("where it was noticed", exc_info=True)
        return 2
    return 0


class StopSignals:
    """Context in which SIGTERM, SIGUSR1, SIGUSR2 and a first Ctrl-C only set `received`.

    Leaving it restores the earlier handlers. It does nothing outside the main thread, where Python handles no signals.
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
    """Ignore these signals in a worker process: the run needs it until its last step."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


progress_bar = partial(tqdm, unit=" images", mininterval=2)  # seconds; in a log file each update is a line


def duration_text(seconds: float) -> str:
    """Format a duration: 42s as 0m42s, then 1h05m, then 2d03h."""
    whole = timedelta(seconds=round(seconds))
    hours, minutes = whole.seconds // 3600, whole.seconds // 60 % 60
    if whole.days:
        return f"{whole.days}d{hours:02d}h"
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{whole.seconds % 60:02d}s"
