"""The numbers of a run: one JSON object an iteration, a line for people now and then, and trackers on request."""

import json
import logging
import math
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from dinov2.distributed import is_main_process
from dinov2.logging.projector import EmbeddedCells, write_projector
from dinov2.logging.step_clock import StepClock
from dinov2.utils.files import atomic_write

logger = logging.getLogger("dinov2")


class Tracker(Protocol):
    """A place outside the run's folder that follows its numbers."""

    def log(self, values: Mapping[str, float], iteration: int) -> None: ...

    def close(self) -> None: ...


@runtime_checkable
class PictureTracker(Tracker, Protocol):
    """One that shows pictures and embedded cells, too."""

    def show_pictures(self, pictures: Mapping[str, np.ndarray], iteration: int) -> None: ...

    def show_cells(self, sets: Sequence[EmbeddedCells], iteration: int) -> None: ...


LAP_PREFIX = "seconds_"  # of a step, in each part of it
TIMES = ("iter_time", "data_time", "images_per_second", "matmul_share")


class MetricLogger:
    """Writes `training_metrics.json`, one object a line and iteration, and reports progress with an ETA.

    Values on a device stay there and are fetched together every `period` iterations: the loop does not wait for them.
    They are the same on every process; the main one writes and reports.

    Attributes:
        clock: whose laps become `seconds_<name>` of each row; None for none.
        matmul_rate: FLOP/s of matrix products that the device can do; None if nobody measured it.
    """

    clock: StepClock | None = None
    matmul_rate: float | None = None

    def __init__(
        self, path: Path, start: int, stop: int, batch_size: int, period: int, trackers: Sequence[Tracker] = ()
    ) -> None:
        self.path, self.stop, self.batch_size, self.period = path, stop, batch_size, period
        self.trackers = list(trackers)
        self._start = start
        self.newest: dict[str, float] = {}  # row that was written
        self._pending: list[tuple[dict[str, float], dict[str, Tensor]]] = []
        self._unwritten = ""
        self._data_seconds = self._flops = 0.0
        self._started = self._flushed_at = time.perf_counter()
        if is_main_process():
            _keep_lines_before(path, start)

    def add_data_time(self, seconds: float) -> None:
        """Count time for which the loop waited for its next batch."""
        self._data_seconds += seconds

    def update(
        self, iteration: int, values: dict[str, float], device_values: dict[str, Tensor], flops: float = 0.0
    ) -> list[dict[str, float]]:
        """Take up one iteration's numbers; every `period` iterations return those so far, fetched and written.

        `flops` are the operations that this process owed to the iteration: see `matmul_rate`.
        """
        self._flops += flops
        self._pending.append(({"iteration": iteration, **values}, device_values))
        if (iteration + 1) % self.period and iteration + 1 != self.stop:
            return []
        return self.flush()

    def flush(self) -> list[dict[str, float]]:
        """Fetch, write and report what is pending; returns it, an object an iteration."""
        if not self._pending:
            return []
        names = list(self._pending[0][1])
        stacked = torch.stack([torch.stack([v[name].float() for name in names]) for _, v in self._pending])
        fetched = stacked.tolist()  # the one wait for the device
        now = time.perf_counter()
        n = len(self._pending)
        seconds = (now - self._flushed_at) / n
        timing = {
            "iter_time": seconds,
            "data_time": self._data_seconds / n,
            "images_per_second": self.batch_size / seconds,
        }
        if self.matmul_rate is not None:
            timing["matmul_share"] = self._flops / n / seconds / self.matmul_rate
        if self.clock is not None:  # after the wait for the device: these need none of their own
            timing |= {f"{LAP_PREFIX}{name.replace(' ', '_')}": lap for name, lap in self.clock.means().items()}
        rows = [
            {**host, **dict(zip(names, row, strict=True)), **timing}
            for (host, _), row in zip(self._pending, fetched, strict=True)
        ]
        if is_main_process():
            self._append("".join(json.dumps({k: _json_number(v) for k, v in row.items()}) + "\n" for row in rows))
            self._report(rows[-1], now)
        self._track([({k: v for k, v in row.items() if k != "iteration"}, int(row["iteration"])) for row in rows])
        self._pending.clear()
        self._data_seconds = self._flops = 0.0
        self._flushed_at, self.newest = now, rows[-1]
        if self.clock is not None:
            self.clock.restart()  # writing and showing them is no part of a step
        return rows

    def log_evaluation(self, done: int, values: Mapping[str, float]) -> None:
        """Pass on to the trackers what an evaluation after `done` iterations found: with the newest of these, since a
        run that goes on after `done` iterations drops what stands at later ones."""
        self._track([(values, max(done - 1, 0))])

    @property
    def takes_pictures(self) -> bool:
        """Whether any tracker shows what `log_pictures` and `log_cells` pass on."""
        return any(isinstance(tracker, PictureTracker) for tracker in self.trackers)

    def log_pictures(self, done: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Pass pictures uint8 [height, width, 3] by name on, which show the run after `done` iterations."""
        self._show(lambda tracker: tracker.show_pictures(pictures, max(done - 1, 0)))

    def log_cells(self, done: int, sets: Sequence[EmbeddedCells]) -> None:
        """Pass on cells with the features that they have after `done` iterations."""
        self._show(lambda tracker: tracker.show_cells(sets, done))

    def _show(self, action: Callable[[PictureTracker], None]) -> None:
        for tracker in list(self.trackers):
            if isinstance(tracker, PictureTracker):
                try:
                    action(tracker)
                except OSError as error:
                    self._give_up(tracker, error)

    def _track(self, rows: Sequence[tuple[Mapping[str, float], int]]) -> None:
        for tracker in list(self.trackers):
            try:
                for values, iteration in rows:
                    tracker.log(values, iteration)
            except OSError as error:
                self._give_up(tracker, error)

    def _append(self, lines: str) -> None:
        """Write whole lines; where the disk is full they wait for the next time, since training can go on."""
        self._unwritten += lines
        size = self.path.stat().st_size if self.path.is_file() else 0
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(self._unwritten)
        except OSError as error:
            n_lines = self._unwritten.count("\n")
            logger.error("%s: %d lines wait to be written (%s); make room", self.path, n_lines, error.strerror)
            if self.path.is_file():
                os.truncate(self.path, size)  # part of them may have been written
            return
        self._unwritten = ""

    def go_back_to(self, iteration: int) -> None:
        """Take back what was written of `iteration` and later: the run takes them up again."""
        self.flush()
        if is_main_process():
            _keep_lines_before(self.path, iteration)

    @contextmanager
    def interruption(self) -> Iterator[None]:
        """Around something else (a checkpoint, an evaluation): all numbers so far are written first, and the time that
        it takes does not count in speed and ETA."""
        self.flush()
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self._flushed_at += seconds
        self._started += seconds
        if self.clock is not None:
            self.clock.restart()

    def close(self) -> None:
        self.flush()
        for tracker in list(self.trackers):
            try:
                tracker.close()
            except OSError as error:
                self._give_up(tracker, error)

    def _give_up(self, tracker: Tracker, error: OSError) -> None:
        """A tracker that cannot write, on a full disk say, does not end the run: the file has its numbers as well."""
        self.trackers.remove(tracker)
        logger.error(
            "%s gets no more numbers of this part of the run (%s); training_metrics.json has them",
            *(type(tracker).__name__.lstrip("_"), error),
        )

    def _report(self, row: dict[str, float], now: float) -> None:
        done = int(row["iteration"]) + 1
        per_iteration = (now - self._started) / (done - self._start)
        losses = "  ".join(f"{name.removesuffix('_loss')} {row[name]:.4f}" for name in row if name.endswith("_loss"))
        logger.info(
            "iteration %d/%d  eta %s  %.1f images/s (%s)  lr %.2e  %s",
            *(done, self.stop, _duration((self.stop - done) * per_iteration), row["images_per_second"]),
            *(_split(row), row.get("lr", math.nan), losses),
        )


def is_time(column: str) -> bool:
    """Whether a column of training_metrics.json says how fast a step was, and so differs between equal runs."""
    return column in TIMES or column.startswith(LAP_PREFIX)


def _split(row: Mapping[str, float]) -> str:
    """Where the time went: "62 % of matmul rate; data 1 %, teacher 27 %, student 28 %, backward 43 %, ..."."""
    laps = {name.removeprefix(LAP_PREFIX): row[name] for name in row if name.startswith(LAP_PREFIX)}
    shares = {name: 100 * value / row["iter_time"] for name, value in (laps or {"data": row["data_time"]}).items()}
    parts = ", ".join(f"{name.replace('_', ' ')} {share:.0f} %" for name, share in shares.items())
    return f"{100 * row['matmul_share']:.0f} % of matmul rate; {parts}" if "matmul_share" in row else parts


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{hours}:{minutes:02d}:{seconds:02d}"


def _json_number(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN


def _keep_lines_before(path: Path, iteration: int) -> None:
    """Drop lines that a resumed run is about to write again, and a last line that a kill cut short."""
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


class _TensorBoard:
    def __init__(self, folder: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=start)

    def log(self, values: Mapping[str, float], iteration: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, iteration)

    def show_pictures(self, pictures: Mapping[str, np.ndarray], iteration: int) -> None:
        for name, picture in pictures.items():
            self._writer.add_image(f"views/{name}", picture, iteration, dataformats="HWC")

    def show_cells(self, sets: Sequence[EmbeddedCells], iteration: int) -> None:
        write_projector(self._writer, sets, iteration)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, settings: Any, run_folder: Path, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError("train.wandb.enabled is true but wandb is not installed: pip install wandb") from error
        # one id for all parts of a resumed run, and another one for every other run, whatever its name
        id_file = run_folder / "wandb_id.txt"
        if not id_file.is_file():
            with atomic_write(id_file, "w") as file:
                file.write(uuid.uuid4().hex)
        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            mode=settings.mode,
            name=run_folder.name,
            id=id_file.read_text(encoding="utf-8"),
            dir=str(run_folder),
            config=config,
            resume="allow",
        )

    def log(self, values: Mapping[str, float], iteration: int) -> None:
        self._run.log(dict(values), step=iteration)

    def close(self) -> None:
        self._run.finish()


def open_trackers(train: Any, run_folder: Path, start: int, config: dict[str, Any]) -> list[Tracker]:
    """The trackers that the `train` section asks for, on the main process. TensorBoard is skipped where it is not
    installed."""
    trackers: list[Tracker] = []
    if not is_main_process():
        return trackers
    if train.tensorboard:
        try:
            trackers.append(_TensorBoard(run_folder / "tensorboard", start))
        except ImportError:
            logger.info("TensorBoard is not installed; training_metrics.json has the same numbers")
    if train.wandb.enabled:
        trackers.append(_WeightsAndBiases(train.wandb, run_folder, config))
    return trackers
