"""Log of a run: text for people, and a JSON object per iteration for programs; `trackers` has the others."""

import io
import json
import logging
import math
import os
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov2.distributed import get_rank, is_main_process
from dinov2.logging.trackers import DROPPED, Tracker
from dinov2.utils.command import duration_text
from dinov2.utils.files import atomic_write

logger = logging.getLogger("dinov2")

_FORMAT = "%(asctime)s %(levelname).1s %(message)s"
LAP_PREFIX = "seconds_"  # of the columns with the seconds of each stage of a step
MAX_MARKS = 100_000  # that are kept if `means` is never called


class _LogFile(logging.FileHandler):
    """File handler that reports a full disk once on stderr; logging's own prints a traceback for each line."""

    _has_failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._has_failed:
            self._has_failed = True
            print(f"{self.baseFilename}: lines may be missing from here on ({error.strerror})", file=sys.stderr)


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
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files that are not UTF-8, as stderr writes them
    named_logger = logging.getLogger(name)
    named_logger.setLevel(level)
    named_logger.propagate = False
    for handler in list(named_logger.handlers):
        named_logger.removeHandler(handler)
        handler.close()
    formatter = logging.Formatter(_FORMAT, datefmt="%H:%M:%S")
    handlers: list[logging.Handler] = []
    if rank == 0:
        handlers.append(logging.StreamHandler(sys.stderr))
    if output_dir is not None:
        file = log_file(Path(output_dir), rank)
        file.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(_LogFile(file, encoding="utf-8", errors="backslashreplace"))
    for handler in handlers:
        handler.setFormatter(formatter)
        named_logger.addHandler(handler)


# --- numbers of steps -------------------------------------------------------------------------------------------------


class StepClock:
    """Measures the stages of a loop's steps without waiting for the device.

    On a CPU it is the host's time. On CUDA each stage ends with an event in the current stream, so its time is that of
    the device for the work queued in it, waiting included. The stages of a step add up to its duration.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._is_cuda = torch.device(device).type == "cuda"
        self._marks: deque[tuple[str | None, Any]] = deque(maxlen=MAX_MARKS)  # seconds or CUDA events
        self.restart()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time since the last stage for `name`; in a profiler's trace the block has this name."""
        with torch.profiler.record_function(name):
            yield
        self._mark(name)

    def restart(self) -> None:
        """Discard the time since the last stage, for instance of an evaluation or a checkpoint."""
        self._mark(None)

    def means(self) -> dict[str, float]:
        """Return each stage's seconds per step (the rarest stage) since the last call; CUDA waits for the last one."""
        marks, seconds, counts = list(self._marks), defaultdict[str, float](float), Counter[str]()
        self._marks.clear()
        self._marks.append(marks[-1])
        for (_, start), (name, end) in pairwise(marks):
            if name is not None:
                seconds[name] += self._between(start, end)
                counts[name] += 1
        return {name: total / min(counts.values()) for name, total in seconds.items()}

    def _mark(self, name: str | None) -> None:
        if not self._is_cuda:
            self._marks.append((name, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((name, event))

    def _between(self, start: Any, end: Any) -> float:
        if not self._is_cuda:
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000


class MetricLogger:
    """Writes `training_metrics.json`, one object a line and iteration, and logs progress with an ETA.

    Values on a device stay there and are fetched together every `period` iterations, so the loop does not wait for
    them. They are the same on every process; the main one writes and logs.

    Attributes:
        clock: its stages become `seconds_<name>` of each row; the loop replaces it by a clock of its device.
        matmul_rate: measured FLOP/s of the device's matrix products; None if not measured.
        newest: the newest row that was written.
        newest_evaluation: the numbers of the newest evaluation, with its `iteration`.
    """

    matmul_rate: float | None = None

    def __init__(
        self, path: Path, start: int, stop: int, batch_size: int, period: int, trackers: Sequence[Tracker] = ()
    ) -> None:
        self.path, self.stop, self.batch_size, self.period = path, stop, batch_size, period
        self.trackers = list(trackers)
        self.clock = StepClock("cpu")
        self.newest: dict[str, float] = {}
        self.newest_evaluation: dict[str, float] = {}
        self._pending: list[tuple[dict[str, float], dict[str, Tensor]]] = []
        self._unwritten = ""
        self._flops = 0.0
        self._start, self._started = start, time.perf_counter()
        self._flushed_at = self._started
        if is_main_process():
            _keep_lines_before(path, start)

    def update(
        self, iteration: int, values: dict[str, float], device_values: dict[str, Tensor], flops: float = 0.0
    ) -> list[dict[str, float]]:
        """Add one iteration's numbers; in a logged iteration, fetch, write and return those so far.

        `flops` are the operations of this process in the iteration, for the share of `matmul_rate`.
        """
        self._flops += flops
        self._pending.append(({"iteration": iteration, **values}, device_values))
        return self.flush() if self.is_logged(iteration) else []

    def is_logged(self, iteration: int) -> bool:
        """Return True for every `period`-th iteration and the last one."""
        return (iteration + 1) % self.period == 0 or iteration + 1 == self.stop

    def flush(self) -> list[dict[str, float]]:
        """Fetch, write, log and return the pending rows, one per iteration."""
        if not self._pending:
            return []
        on_device = torch.stack([value.float() for _, values in self._pending for value in values.values()])
        fetched = iter(on_device.tolist())  # the only wait for the device
        now = time.perf_counter()
        rates = self._rates(now)
        rows = [
            {**host, **{name: next(fetched) for name in device_values}, **rates}
            for host, device_values in self._pending
        ]
        if is_main_process():
            self._append("".join(json.dumps({k: _json_number(v) for k, v in row.items()}) + "\n" for row in rows))
            self._report(rows[-1], now)

        values = [(int(row["iteration"]), {k: v for k, v in row.items() if k != "iteration"}) for row in rows]
        self._track(lambda tracker: tracker.log_rows(values))
        self._pending.clear()
        self._flops = 0.0
        self._flushed_at, self.newest = now, rows[-1]
        self.clock.restart()  # writing and logging them is no part of a step
        return rows

    def _rates(self, now: float) -> dict[str, float]:
        n = len(self._pending)
        seconds = (now - self._flushed_at) / n
        rates = {"iter_time": seconds, "images_per_second": self.batch_size / seconds}
        if self.matmul_rate is not None:
            rates["matmul_share"] = self._flops / n / seconds / self.matmul_rate
        laps = self.clock.means()  # the wait for the device is over after flush
        rates["data_time"] = laps.get("data", 0.0)
        rates |= {f"{LAP_PREFIX}{name.replace(' ', '_')}": seconds for name, seconds in laps.items()}
        return rates

    def log_evaluation(self, done: int, values: Mapping[str, float]) -> None:
        """Send an evaluation to the trackers, at iteration `done` - 1: a run that resumes then drops later entries."""
        self.newest_evaluation = {"iteration": done, **values}
        self._track(lambda tracker: tracker.log(values, max(done - 1, 0)))

    def log_images(self, done: int, images: Mapping[str, np.ndarray]) -> None:
        """Send images, uint8 [height, width, 3] by name, of the run after `done` iterations to the trackers."""
        self._track(lambda tracker: tracker.log_images(images, max(done - 1, 0)))

    def _track(self, action: Callable[[Tracker], None]) -> None:
        """Run `action` for each tracker. One that cannot write, for instance on a full disk, is dropped."""
        for tracker in list(self.trackers):
            try:
                action(tracker)
            except OSError as error:
                self.trackers.remove(tracker)
                logger.error(DROPPED, type(tracker).__name__, error)

    def _append(self, lines: str) -> None:
        """Write whole lines; on a full disk they wait for the next call, and the training continues."""
        self._unwritten += lines
        size = self.path.stat().st_size if self.path.is_file() else 0
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(self._unwritten)
        except OSError as error:
            n_lines = self._unwritten.count("\n")
            logger.error("%s: %d lines wait to be written (%s); make room", self.path, n_lines, error.strerror)
            if self.path.is_file():
                os.truncate(self.path, size)  # a part of them may have been written
            return
        self._unwritten = ""

    def roll_back(self, iteration: int) -> None:
        """Drop the rows of `iteration` and later ones, which the run repeats."""
        self.flush()
        if is_main_process():
            _keep_lines_before(self.path, iteration)

    @contextmanager
    def interruption(self) -> Iterator[None]:
        """Write all pending numbers, and leave the time of the block (an evaluation, say) out of speed and ETA."""
        self.flush()
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self._flushed_at += seconds
        self._started += seconds
        self.clock.restart()

    def close(self) -> None:
        """Write pending numbers, and close the trackers."""
        self.flush()
        self._track(lambda tracker: tracker.close())

    def _report(self, row: dict[str, float], now: float) -> None:
        done = int(row["iteration"]) + 1
        per_iteration = (now - self._started) / (done - self._start)
        losses = "  ".join(f"{name.removesuffix('_loss')} {row[name]:.4f}" for name in row if name.endswith("_loss"))
        logger.info(
            "iteration %d/%d  eta %s  %.1f images/s (%s)  lr %.2e  %s",
            *(done, self.stop, duration_text((self.stop - done) * per_iteration), row["images_per_second"]),
            *(_split(row), row.get("lr", math.nan), losses),
        )


def _split(row: Mapping[str, float]) -> str:
    """Describe the stages' times: "62 % of matmul rate; data 1 %, teacher 27 %, student 28 %, backward 43 %, ..."."""
    laps = {name.removeprefix(LAP_PREFIX): row[name] for name in row if name.startswith(LAP_PREFIX)}
    parts = ", ".join(f"{name.replace('_', ' ')} {100 * lap / row['iter_time']:.0f} %" for name, lap in laps.items())
    return f"{100 * row['matmul_share']:.0f} % of matmul rate; {parts}" if "matmul_share" in row else parts


def _json_number(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN


def _keep_lines_before(path: Path, iteration: int) -> None:
    """Drop lines that a resumed run will write again, and a last line that a kill cut short."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["iteration"] < iteration:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            logger.warning("%s: dropping a line that was cut short", path)
    with atomic_write(path, "w") as file:
        file.writelines(kept)
