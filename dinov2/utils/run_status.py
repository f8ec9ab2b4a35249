"""Write and read status.json, the progress of a run."""

import json
import logging
import math
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from dinov2.utils.files import check_regular_file

logger = logging.getLogger("dinov2")

STATUS_NAME, METRICS_NAME, CONFIG_NAME = "status.json", "training_metrics.json", "config.yaml"
ENDED = ("finished", "stopped", "failed")  # states; the others are starting, running, evaluating and saving
MOST_WARNINGS = 200  # different warnings that are kept


@dataclass
class RunStatus:
    """Progress of a run."""

    state: str = "starting"  # or running, evaluating, saving, or one of ENDED
    reason: str = ""  # why it failed or stopped
    iteration: int = 0  # done
    n_iterations: int = 0
    losses: dict[str, float | None] = field(default_factory=dict)  # of the newest logged iteration; None: not finite
    images_per_second: float | None = None  # this and the next two: the newest rates
    seconds_per_iteration: float | None = None
    data_share: float | None = None  # share of the time spent waiting for data
    eta_seconds: float | None = None  # to the end of the run, without evaluations and checkpoints
    evaluation: dict[str, float] = field(default_factory=dict)  # {"iteration": n, name: value} of the newest one
    skipped_steps: int = 0
    rollbacks: int = 0
    resumed: int = 0
    errors: int = 0
    collapse: list[str] = field(default_factory=list)  # signs of a collapse that hold now
    warnings: dict[str, int] = field(default_factory=dict)  # {text: count} of warnings and errors
    starts: list[dict[str, Any]] = field(default_factory=list)  # seed and versions of each start or resume
    host: str = ""  # this and the next: of the main process
    pid: int = 0
    time: float = 0.0  # of writing, in seconds since 1970
    seconds_between_reports: float = 0.0  # of the newest rates

    def take_rates(self, row: Mapping[str, float], n_rows: int) -> None:
        """Set losses and rates from the newest of `n_rows` rows of training_metrics.json."""
        self.iteration, seconds = int(row["iteration"]) + 1, row["iter_time"]
        self.seconds_between_reports = n_rows * seconds
        self.losses = {k: v if math.isfinite(v) else None for k, v in row.items() if k.endswith("_loss")}
        self.images_per_second, self.seconds_per_iteration = row["images_per_second"], seconds
        self.data_share = row["data_time"] / seconds if seconds else None
        self.eta_seconds = (self.n_iterations - self.iteration) * seconds
        self.skipped_steps = int(row.get("skipped_steps", 0))


def is_run(folder: Path) -> bool:
    """Return whether a training run wrote this folder."""
    return (folder / METRICS_NAME).is_file() or (
        (folder / CONFIG_NAME).is_file() and any((folder / part).is_dir() for part in ("checkpoints", "logs", "eval"))
    )


def read_status(run_folder: Path) -> RunStatus | None:
    """Read a run's status.json; None if it is missing or not readable."""
    try:
        content = json.loads(check_regular_file(run_folder / STATUS_NAME).read_text(encoding="utf-8"))
        known = {each.name for each in fields(RunStatus)}
        return RunStatus(**{name: value for name, value in content.items() if name in known})
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


class StatusFile(logging.Handler):
    """Writes status.json, with counts of the warnings and errors of the package's log.

    On a full disk the file does not change, and the run continues. A resumed run keeps its counts.
    """

    def __init__(self, run_folder: Path, n_iterations: int, *, resumed: bool) -> None:
        super().__init__(logging.WARNING)
        before = (read_status(run_folder) if resumed else None) or RunStatus()
        self.path = run_folder / STATUS_NAME
        self.status = RunStatus(
            iteration=before.iteration,
            n_iterations=n_iterations,
            evaluation=before.evaluation,
            rollbacks=before.rollbacks,
            resumed=before.resumed + resumed,
            warnings=before.warnings,
            starts=before.starts,
            host=socket.gethostname(),
            pid=os.getpid(),
        )
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        text, warnings = record.getMessage(), self.status.warnings
        warnings[text] = warnings.get(text, 0) + 1
        if len(warnings) > MOST_WARNINGS:
            del warnings[next(iter(warnings))]  # the oldest
        self.status.errors += record.levelno >= logging.ERROR

    def write(self, state: str, reason: str = "") -> None:
        """Write the status with a new state."""
        self.status.state, self.status.reason, self.status.time = state, reason, time.time()
        try:
            temporary = self.path.with_name(f".{STATUS_NAME}.tmp")
            temporary.write_text(json.dumps(asdict(self.status), indent=1), encoding="utf-8")
            os.replace(temporary, self.path)  # without a sync, which would be slow on a network file system
        except OSError as error:
            logger.debug("%s could not be written: %s", self.path, error)

    def close(self) -> None:
        logger.removeHandler(self)
        super().close()
