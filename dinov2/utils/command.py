"""What commands share: types of flags, exit codes, errors in one line, stop signals, progress bars and durations."""

import argparse
import errno
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from types import FrameType
from typing import Any, TypeVar

from tqdm import tqdm

logger = logging.getLogger("dinov2")

T = TypeVar("T", int, float)

# what a user, a file or the machine can cause; anything else is a fault of the program
USER_ERRORS = (OSError, KeyError, ValueError, MemoryError, RecursionError)

MOST_LINES, MOST_LETTERS = 10, 2000  # of an error message

# what to do after an error of the operating system
ADVICE = {
    errno.ENOSPC: "make room on this disk and run the same command again",
    errno.EDQUOT: "your quota on this disk is used up: make room and run the same command again",
    errno.ENOLCK: "this file system has no locks: write to another disk, or mount it with locks",
    errno.EIO: "the disk or the network share fails: copy the file to another disk, or try again",
    errno.ESTALE: "the network share was mounted anew: run the same command again",
    errno.EROFS: "choose a folder on a disk that can be written",
    errno.EACCES: "ask for the right to read or write it, or choose another path",
    errno.EPERM: "ask for the right to read or write it, or choose another path",
    errno.EEXIST: "this is a file, and a folder is needed: choose another path",
    errno.ENOTDIR: "a part of this path is a file: choose another path",
    errno.ENAMETOOLONG: "shorten the name",
    errno.ELOOP: "the link leads back to itself: remove it",
    errno.EMFILE: "raise the number of open files (ulimit -n 4096)",
    errno.ENOMEM: "free memory, or ask for less: smaller batches, fewer workers",
}

WORKER_ENDED = "A worker process was ended, perhaps for lack of memory: use fewer workers"

# exit code of a run that was stopped after a checkpoint: the same command resumes it (EX_TEMPFAIL)
REQUEUE_EXIT_CODE = 75

# signals of batch systems before they stop a job, and of a terminal
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


def error_text(error: BaseException) -> str:
    """Return the message of an error in at most ten lines, with the file's name and what to do where it is known."""
    if isinstance(error, KeyError) and error.args:
        text = str(error.args[0])  # str() of a KeyError would quote it
    elif isinstance(error, MemoryError):
        text = f"not enough memory {error}".rstrip() + "; use smaller batches, fewer workers or fewer images"
    elif isinstance(error, RecursionError):
        text = f"a value or a file is nested too deeply ({error})"
    elif isinstance(error, OSError) and error.strerror:
        names = [os.fsdecode(each) for each in (error.filename, error.filename2) if isinstance(each, str | bytes)]
        text = ": ".join([*names[:1], error.strerror])
        text += f"; {ADVICE[error.errno]}" if error.errno in ADVICE else ""
    else:
        text = str(error) or type(error).__name__
    if "in DataLoader worker process" in text:
        text = text.rstrip().rpartition("\n")[2]  # torch puts the worker's traceback before its error
    return shortened(text.encode(errors="backslashreplace").decode())


def shortened(text: str) -> str:
    """Cut a message to ten lines and 2,000 letters, and say so."""
    lines = text[:MOST_LETTERS].splitlines()
    is_cut = len(text) > MOST_LETTERS or len(lines) > MOST_LINES
    return "\n".join(lines[: MOST_LINES - 1]) + "\n[...]" if is_cut else text


def find_cause(error: BaseException) -> BaseException:
    """Return the error of the machine that torch hides in a RuntimeError: of memory, disk or worker; else `error`."""
    if isinstance(error, RuntimeError):
        text, context = str(error), error.__context__
        if isinstance(context, OSError) and context.errno in ADVICE:
            return context  # torch.save on a full disk
        if "out of memory" in text or "can't allocate memory" in text:
            return MemoryError(f"({text.partition(' See documentation')[0]})")
        if text.startswith("DataLoader worker (pid"):
            return ChildProcessError(f"{text.strip()} {WORKER_ENDED}")
    return error


def log_error(error: Exception) -> None:
    """Log an error in one sentence if a user, a file or the machine caused it; raise any other, which is our fault."""
    cause = find_cause(error)
    if not isinstance(cause, USER_ERRORS):
        logger.error("this is a fault of the program, not of your input: please report it with the text below")
        raise error
    logger.error("%s", error_text(cause))
    logger.debug("where it was noticed", exc_info=error)


def exit_code(command: Callable[[], None]) -> int:
    """Run `command` and return 0, or 2 after an error that a user, a file or the machine caused, which is logged.

    75 after a `StoppedError`. Any other error is a fault of the program: its traceback is shown.
    """
    try:
        command()
    except StoppedError as stopped:
        logger.warning("%s", stopped)
        return REQUEUE_EXIT_CODE
    except Exception as error:
        log_error(error)
        return 2
    return 0


class StoppedError(Exception):
    """A signal stopped the work after its state was written; the same command continues it."""

    def __init__(self, text: str, received: int | None) -> None:
        super().__init__(f"{text}; the same command continues")
        self.received = received  # None: another process got the signal


class StopReceived(BaseException):
    """A stop signal arrived while the program waited."""


class StopSignals:
    """Context in which SIGTERM, SIGUSR1, SIGUSR2 and a first Ctrl-C only set `received`; they end a `wait`.

    Leaving it restores the earlier handlers. It does nothing outside the main thread, where Python handles no signals.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._ends_wait = False
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
        if self._ends_wait:
            self._ends_wait = False
            raise StopReceived

    @contextmanager
    def wait(self, is_interruptible: bool = True) -> Iterator[None]:
        """Raise StopReceived in this block when a signal arrives, or has arrived: stopping here loses nothing."""
        if is_interruptible and self.received is not None:
            raise StopReceived
        self._ends_wait = is_interruptible
        try:
            yield
        finally:
            self._ends_wait = False


def ignore_stop_signals(_: int = 0) -> None:
    """Ignore these signals in a worker process: the run needs it until its last step."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def number_between(least: T, most: T) -> Callable[[str], T]:
    """Return a parser for argparse of numbers from `least` to `most`: whole ones if these two are."""
    kind = type(least)

    def parse(text: str) -> T:
        with suppress(ValueError):
            if least <= (value := kind(text)) <= most:  # false for NaN
                return value
        what = "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a {what} from {least:,} to {most:,}")

    return parse


positive_int = number_between(1, 2**31 - 1)
seed_number = number_between(0, 2**32 - 1)  # as numpy and scikit-learn take it


progress_bar = partial(tqdm, unit=" images", mininterval=2)  # seconds; in a log file each update is a line


def duration_text(seconds: float) -> str:
    """Format a duration: 42s as 0m42s, then 1h05m, then 2d03h."""
    whole = timedelta(seconds=round(seconds))
    hours, minutes = whole.seconds // 3600, whole.seconds // 60 % 60
    if whole.days:
        return f"{whole.days}d{hours:02d}h"
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{whole.seconds % 60:02d}s"
