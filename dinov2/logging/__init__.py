"""Log of a run: text for people, JSON lines for programs, trackers on request."""

import logging
import sys
from pathlib import Path

from dinov2.distributed import get_rank
from dinov2.logging.metrics import MetricLogger, open_trackers

__all__ = ["MetricLogger", "log_file", "open_trackers", "setup_logging"]

_FORMAT = "%(asctime)s %(levelname).1s %(message)s"


class _LogFile(logging.FileHandler):
    """File handler that reports a full disk once on stderr; logging's own prints a traceback for each line."""

    _is_failing = False

    def emit(self, record: logging.LogRecord) -> None:
        self._has_failed = False
        super().emit(record)
        self._is_failing = self._has_failed

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        self._has_failed = True
        if not self._is_failing:
            print(f"{self.baseFilename}: lines are missing from here on ({error.strerror})", file=sys.stderr)


def log_file(run_folder: Path, rank: int) -> Path:
    """Return the path of a rank's log."""
    return run_folder / "logs" / ("log.txt" if rank == 0 else f"log.txt.rank{rank}")


def setup_logging(
    output_dir: str | Path | None = None, name: str = "dinov2", level: int = logging.INFO, rank: int | None = None
) -> None:
    """Send the package's log to stderr (main process only) and, with `output_dir`, to its `logs/log.txt`.

    Other ranks write `logs/log.txt.rank<r>`. A second call replaces the handlers of the first. The default of `rank` is
    that of the process group.
    """
    rank = get_rank() if rank is None else rank
    logger = logging.getLogger(name)
    logger.setLevel(level)
    logger.propagate = False
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    formatter = logging.Formatter(_FORMAT, datefmt="%H:%M:%S")
    handlers: list[logging.Handler] = []
    if rank == 0:
        handlers.append(logging.StreamHandler(sys.stderr))
    if output_dir is not None:
        file = log_file(Path(output_dir), rank)
        file.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(_LogFile(file, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(formatter)
        logger.addHandler(handler)
