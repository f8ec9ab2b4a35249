"""How commands end: after a user's mistake with one line and an exit code, after a stop signal with a finished step."""

import logging
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

logger = logging.getLogger("dinov2")

USER_ERRORS = (FileNotFoundError, KeyError, ValueError, PermissionError, NotADirectoryError, ConnectionError)

# Exit code of a run that was asked to stop and wrote a checkpoint: the same command resumes it (EX_TEMPFAIL)
REQUEUE_EXIT_CODE = 75

# What batch systems send before they take the machine away, and what a terminal sends
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


def text_of(error: BaseException) -> str:
    """Return an error's message; KeyError would put it in quotes."""
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)


def exit_code(command: Callable[[], None]) -> int:
    """Run `command`; 0, or 2 after a mistake that its message explains."""
    try:
        command()
    except USER_ERRORS as error:
        logger.error("%s", text_of(error))
        logger.debug("where it was noticed", exc_info=True)
        return 2
    return 0


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
