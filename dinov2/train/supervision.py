"""Supervision of the steps of a run: hang detection, requests to stop, and status.json."""

import faulthandler
import logging
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType

from dinov2.distributed import any_rank, get_rank, get_world_size, is_lost_connection, name_missing_ranks
from dinov2.logging import MetricLogger, log_file
from dinov2.train.run_folder import RunFolder
from dinov2.utils.stop_signals import StopSignals

logger = logging.getLogger("dinov2")

HANG_EXIT_CODE = 76  # differs from the 75 of a run that was interrupted after it had written its checkpoint
GROUP_FIRST_SECONDS = 20.0  # the time-outs of the process groups come first: they are raised where a rank waits
TIMER_FIRST_SECONDS = 80.0  # then the timer, then faulthandler, which also ends a process that holds Python's lock


class Supervision:
    """Watches over the steps of a run; a context manager around the loop.

    A process that begins no step for `hang_timeout_seconds` (0: never mind) writes the stacks of its threads into its
    log and ends. Ranks that wait so long for another one name it, and end with HANG_EXIT_CODE: as a rule because their
    process group's time-out is over, or else by a timer. Evaluations and checkpoints may take longer: they go into
    `pause`.
    """

    def __init__(
        self, hang_timeout_seconds: float, folder: RunFolder, metrics: MetricLogger, signals: StopSignals
    ) -> None:
        self.timeout_seconds, self.metrics, self.signals = hang_timeout_seconds, metrics, signals
        self.folder = folder
        self._timer: threading.Timer | None = None
        log_file(folder.path, get_rank()).parent.mkdir(parents=True, exist_ok=True)
        self._stacks = open(log_file(folder.path, get_rank()), "a", encoding="utf-8")  # noqa: SIM115

    def __enter__(self) -> "Supervision":
        self.folder.write_status("running")
        return self

    def begin_step(self) -> None:
        """Start the clock of the hang detection again."""
        self._stop_clock()
        seconds = self.timeout_seconds
        if seconds > 0 and get_world_size() > 1:
            error = TimeoutError(f"no step began in {seconds:g} s")
            self._timer = threading.Timer(seconds + GROUP_FIRST_SECONDS, self._end_hanging_run, [error])
            self._timer.daemon = True
            self._timer.start()
            seconds += TIMER_FIRST_SECONDS
        if seconds > 0:
            faulthandler.dump_traceback_later(seconds, exit=True, file=self._stacks)

    def _stop_clock(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        if self._timer is not None:
            self._timer.cancel()

    @contextmanager
    def pause(self, state: str) -> Iterator[None]:
        """Run something else than a step: it may take long, and its time does not count in speed and ETA."""
        self._stop_clock()
        with self.metrics.interruption():
            self.folder.write_status(state)
            yield
        self.folder.status.evaluation |= self.metrics.newest_evaluation
        self.folder.write_status("running")
        self.begin_step()

    def report(self, rows: Sequence[Mapping[str, float]], collapse: list[str]) -> None:
        """Write the newest rows of training_metrics.json and the present signs of a collapse into status.json."""
        self.folder.status.take_rates(rows[-1], len(rows))
        self.folder.status.collapse = collapse
        self.folder.write_status("running")

    def must_stop(self) -> bool:
        """Return whether a signal asked any rank to stop."""
        return any_rank(self.signals.received is not None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_clock()
        if error is not None and is_lost_connection(error):
            self._end_hanging_run(error)
        if error is not None:
            self.folder.write_status("failed", str(error) or type(error).__name__)
        self._stacks.close()

    def _end_hanging_run(self, error: BaseException) -> None:
        """Name the rank that did not arrive, and end at once: to clean up would hang, too."""
        message = (
            f"training hangs: {name_missing_ranks()} did not arrive, and this rank waited for "
            f"train.hang_timeout_seconds={self.timeout_seconds:g} s or lost the connection. That process is stopped, "
            "dead, or waits for its data: look at its log, its host and its data mount. The run can be resumed from "
            "its last checkpoint: start the same command again"
        )
        logger.error("%s", message, exc_info=error)
        if get_rank() != 0:  # whose log goes to stderr already
            print(message, file=sys.stderr)
        self.folder.write_status("failed", message)
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        os._exit(HANG_EXIT_CODE)
