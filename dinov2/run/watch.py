"""How runs are doing, a line each, from the files in their folders: how far, how fast, how well, and what is wrong.

Only new ends of long files are read, so a look at a run of days costs no more than one at a run of minutes. Nothing is
written and no network made: the command answers at once, beside a training or from another machine.
"""

import argparse
import json
import math
import os
import re
import shutil
import socket
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dinov2.eval.run_records import CONFIG_NAME, METRICS_NAME, RESULTS_NAME, is_run, methods_of

N_NEWEST = 20  # iterations whose median is shown
TAIL_BYTES = 1 << 16  # of training_metrics.json: some sixty iterations
# Without a new line for so long a run is called silent: an evaluation or a checkpoint may well take minutes
SILENT_SECONDS, SILENT_LINES = 300.0, 10.0
LOSSES = {"dino_global_crops": "cls", "dino_local_crops": "local"}  # short names where the log's are long
ENDS = ("done", "failed", "stopped", "killed")

_LOG_LINE = re.compile(r"(?:\d{4}-\d\d-\d\d )?[\d:,]+ ([IWE]) (.*)")
_COLLAPSE = re.compile(r"collapse\? (.+?) is \S+, not (?:above|below) ")
_RECOVERED = re.compile(r"(.+) has recovered: ")
_ROLLBACK = re.compile(r"\(rollback (\d+) of \d+\)")


@dataclass
class LogState:
    """What logs/log.txt tells so far.

    Attributes:
        end: how the newest part of the run ended, one of ENDS, and why where it failed; empty while it goes on.
        before: the same of the part before it.
        trains: whether the newest part came as far as training.
        last_error: text of the newest entry, if that is an error.
        n_errors: of the newest part.
        n_rollbacks: of the run.
        collapsing: signs of a collapse that were warned of and have not gone.
    """

    end: tuple[str, str] = ("", "")
    before: tuple[str, str] = ("", "")
    trains: bool = False
    last_error: str = ""
    n_errors: int = 0
    n_rollbacks: int = 0
    collapsing: set[str] = field(default_factory=set)

    def take(self, line: str) -> None:
        """Take up the next line."""
        match = _LOG_LINE.match(line)
        if not match:
            return  # goes on with the entry before it
        level, text = match.groups()
        self.last_error = text if level == "E" else ""
        self.n_errors += level == "E"
        if text.startswith("seed ") and "; torch " in text:
            self.end, self.before, self.trains, self.n_errors = ("", ""), self.end, False, 0
        elif text.startswith("data  "):
            self.trains = True
        elif text.startswith("done: "):
            self.end = ("done", "")
        elif text.startswith("trained to the end, but"):
            self.end = ("failed", text)
        elif text.startswith("the run stopped: "):
            self.end = ("failed", text.removeprefix("the run stopped: "))
        elif text.startswith(("stopped after iteration ", "stopped while the cache ")):
            self.end = ("stopped", "")
        elif match := _COLLAPSE.match(text):
            self.collapsing.add(match[1])
        elif match := _RECOVERED.match(text):
            self.collapsing.discard(match[1])
        elif match := _ROLLBACK.search(text):
            self.n_rollbacks = int(match[1])


class LogReader:
    """Reads a log that grows: each time only what is new, and from the start where it is another file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = LogState()
        self._position = self._inode = 0

    def read(self) -> LogState:
        try:
            with open(self.path, "rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._inode or status.st_size < self._position:
                    self.state, self._position, self._inode = LogState(), 0, status.st_ino
                file.seek(self._position)
                for line in file:
                    if not line.endswith(b"\n"):
                        break  # is being written
                    self._position += len(line)
                    self.state.take(line.decode(errors="replace").rstrip())
        except OSError:
            self.state, self._position, self._inode = LogState(), 0, 0
        return self.state


@dataclass(frozen=True)
class Status:
    """One run at one moment.

    Attributes:
        name: of its folder.
        state: running, starting, silent <how long>, or one of ENDS; gone where the folder is.
        done, total: iterations; total is None where config.yaml does not tell.
        loss: median of the newest total losses, NaN if none of them is finite, None if there are none.
        losses: the same of its terms, by short names.
        images_per_second, waiting: speed and share of the time that goes into waiting for data.
        seconds_to_go: at the newest speed.
        knn: balanced accuracy of the newest evaluation (largest k, mean over the data sets), with its iteration.
        health: what is wrong, in words; empty if nothing is.
    """

    name: str
    state: str
    done: int = 0
    total: int | None = None
    loss: float | None = None
    losses: dict[str, float] = field(default_factory=dict)
    images_per_second: float | None = None
    waiting: float | None = None
    seconds_to_go: float | None = None
    knn: tuple[float, int] | None = None
    health: list[str] = field(default_factory=list)

    @property
    def has_ended(self) -> bool:
        return self.state in (*ENDS, "gone")


class RunWatch:
    """Looks at one run again and again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._log = LogReader(path / "logs" / "log.txt")

    def look(self) -> Status:
        """How the run is now. What is missing or half written is left out, and never an error."""
        name = self.path.resolve().name
        if not self.path.is_dir():
            return Status(name, "gone")
        log = self._log.read()
        rows = read_tail(self.path / METRICS_NAME)
        config = _read_config(self.path / CONFIG_NAME)
        done, total = (int(rows[-1]["iteration"]) + 1 if rows else 0), _n_iterations(config)
        newest = rows[-N_NEWEST:]
        seconds = _median(newest, "iter_time")
        data_seconds = _median(newest, "data_time")
        state, reason = self._state(log, has_rows=bool(rows), config=config, seconds=seconds)
        is_going = state not in ENDS
        return Status(
            name=name,
            state=state,
            done=done,
            total=total,
            loss=_median(newest, "total_loss"),
            losses=_terms(newest),
            images_per_second=_median(newest, "images_per_second"),
            waiting=data_seconds / seconds if seconds and data_seconds is not None else None,
            seconds_to_go=(total - done) * seconds if is_going and total is not None and seconds else None,
            knn=newest_knn(self.path / "eval"),
            health=_health(log, newest, self.path, reason),
        )

    def _state(
        self, log: LogState, *, has_rows: bool, config: Mapping[str, Any], seconds: float | None
    ) -> tuple[str, str]:
        """The state, and why where it failed."""
        is_alive = _is_alive(self.path / ".lock")
        if log.end[0]:
            return log.end
        if is_alive is False:
            if not log.trains and log.before[0]:
                return log.before  # since then only an evaluation, or a start that came to nothing
            return ("failed", log.last_error) if log.last_error else ("killed", "")
        period = _setting(config, "train", "log_period") or 1
        files = [self.path / METRICS_NAME, self._log.path, self.path / CONFIG_NAME]
        silent = time.time() - max((file.stat().st_mtime for file in files if file.is_file()), default=0.0)
        if silent > max(SILENT_SECONDS, SILENT_LINES * period * (seconds or 0)):
            return f"silent {_short_time(silent)}", log.last_error
        return "running" if has_rows else "starting", ""


def read_tail(path: Path, n_bytes: int = TAIL_BYTES) -> list[dict[str, Any]]:
    """The newest objects of training_metrics.json, which stand in its last `n_bytes` (or more, if these hold none)."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            while True:
                start = max(size - n_bytes, 0)
                file.seek(start)
                lines = file.read(size - start).split(b"\n")
                rows = [row for line in (lines[1:] if start else lines) if (row := _row(line)) is not None]
                if rows or start == 0:
                    return rows
                n_bytes *= 4
    except OSError:
        return []


def _row(line: bytes) -> dict[str, Any] | None:
    """An iteration's object; None of a line that is none, or was cut short."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("iteration"), int) else None


def newest_knn(folder: Path) -> tuple[float, int] | None:
    """Balanced accuracy of kNN with the largest k, as mean over data sets, of the newest evaluation that has any."""
    found = {
        int(match[1]): file
        for file in folder.glob(f"training_*/{RESULTS_NAME}")
        if (match := re.fullmatch(r"training_(\d+)", file.parent.name))
    }
    for iteration in sorted(found, reverse=True):
        try:
            datasets = json.loads(found[iteration].read_text(encoding="utf-8"))["datasets"]
            values = []
            for of_set in datasets.values():
                knn = {name: metrics for name, metrics in methods_of(of_set).items() if name.startswith("knn_")}
                largest = max(knn, key=lambda name: int(name.removeprefix("knn_")))
                values.append(float(knn[largest]["balanced_accuracy"]))
            return statistics.fmean(values), iteration
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # not readable, or of another version
    return None


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """The runs among folders, and in folders of runs.

    Raises:
        FileNotFoundError: a folder is not there, or neither it nor a folder in it is a run.
    """
    runs: list[Path] = []
    for path in paths:
        inside = [path] if is_run(path) else []
        if not inside and path.is_dir():
            inside = [each for each in sorted(path.iterdir()) if each.is_dir() and is_run(each)]
        if not inside:
            what = "holds no run (no training_metrics.json, no config.yaml)" if path.is_dir() else "is no folder"
            raise FileNotFoundError(f"{path} {what}; give <--output-dir>/<--name> of the training, or --output-dir")
        runs += inside
    return runs


# --- the table ------------------------------------------------------------------------------------------------------

_COLUMNS = ("run", "state", "step", "%", "loss", "terms", "img/s", "wait", "eta", "kNN", "of", "health")
# Always there; the others join them in this order as long as there is room
_REQUIRED = ("run", "state", "%", "health")
_WISHED = ("loss", "step", "eta", "kNN", "img/s", "wait", "of", "terms")
_TO_THE_LEFT = {"run", "state", "terms", "health"}
_NARROW_NAME, _NARROW_HEALTH = 14, 16  # characters of a name and of what is wrong that other columns leave room for


def table(statuses: Sequence[Status], width: int) -> list[str]:
    """A heading and a line for each run, none longer than `width` characters."""
    rows = [dict(zip(_COLUMNS, _COLUMNS, strict=True)), *map(_cells, statuses)]
    natural = {name: max(len(row[name]) for row in rows) for name in _COLUMNS}
    widths = natural | {
        "run": min(natural["run"], _NARROW_NAME),
        "health": min(natural["health"], _NARROW_HEALTH),
    }
    columns, room = {*_REQUIRED}, width + 1 - sum(widths[name] + 1 for name in _REQUIRED)
    for name in _WISHED:
        is_empty = not any(row[name] for row in rows[1:])
        if widths[name] + 1 <= room and not is_empty:
            columns.add(name)
            room -= widths[name] + 1
    for name in ("run", "health"):
        widths[name] += (more := max(min(natural[name] - widths[name], room), 0))
        room -= more
    lines = []
    for row in rows:
        cells = [
            _cut(row[name], widths[name]).ljust(widths[name]) if name in _TO_THE_LEFT else row[name].rjust(widths[name])
            for name in _COLUMNS
            if name in columns
        ]
        lines.append(" ".join(cells).rstrip()[:width])
    return lines


def _cells(status: Status) -> dict[str, str]:
    total, knn = status.total, status.knn
    terms = " ".join(f"{name} {value:.3g}" for name, value in status.losses.items())
    return {
        "run": _printable(status.name),
        "state": status.state,
        "step": f"{status.done}/{'?' if total is None else total}",
        "%": f"{100 * min(status.done, total) // total}" if total else "",
        "loss": "" if status.loss is None else f"{status.loss:.4g}",
        "terms": terms,
        "img/s": _of(status.images_per_second, "{:.0f}"),
        "wait": _of(status.waiting, "{:.0%}"),
        "eta": "" if status.seconds_to_go is None else _short_time(status.seconds_to_go),
        "kNN": "" if knn is None else f"{knn[0]:.3f}",
        "of": "" if knn is None else f"@{knn[1]}",
        "health": ", ".join(map(_printable, status.health)) or "ok",
    }


def _of(value: float | None, form: str) -> str:
    return "" if value is None or not math.isfinite(value) else form.format(value)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(width - 2, 0)] + ".."[:width]


def _printable(text: str) -> str:
    """Folders' names and messages must not steer the terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _short_time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02d}h"
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


# --- pieces ---------------------------------------------------------------------------------------------------------


def _health(log: LogState, rows: Sequence[Mapping[str, Any]], path: Path, reason: str) -> list[str]:
    found = [reason] if reason else []
    losses = [row.get("total_loss") for row in rows]
    if losses and not any(isinstance(loss, (int, float)) for loss in losses):
        found.append("loss not finite")
    if log.collapsing:
        found.append("collapse?")
    skipped = rows[-1].get("skipped_steps") if rows else 0
    if isinstance(skipped, (int, float)) and skipped > 0:
        found.append(f"{skipped:.0f} skipped")
    if log.n_rollbacks:
        found.append(f"{log.n_rollbacks} rolled back")
    if n_bad := _n_bad_images(path / "bad_images.csv"):
        found.append(f"{n_bad} bad images")
    if log.n_errors and not reason:
        found.append(f"{log.n_errors} error{'s' * (log.n_errors > 1)} logged")
    return found


def _n_bad_images(path: Path) -> int:
    try:
        with open(path, "rb") as file:
            return max(sum(line.endswith(b"\n") for line in file) - 1, 0)
    except OSError:
        return 0


def _is_alive(lock: Path) -> bool | None:
    """Whether the process that trains in the folder lives; None where that cannot be told from this machine."""
    try:
        match = re.fullmatch(r"process (\d+) of (.+)", lock.read_text(encoding="utf-8").strip())
    except (OSError, UnicodeDecodeError):
        return None
    if match is None or match[2] != socket.gethostname():
        return None
    try:
        os.kill(int(match[1]), 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # somebody else's
    return True


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return config if isinstance(config, dict) else {}


def _setting(config: Mapping[str, Any], section: str, key: str) -> float | None:
    found = config.get(section)
    value = found.get(key) if isinstance(found, dict) else None
    return float(value) if isinstance(value, (int, float)) else None


def _n_iterations(config: Mapping[str, Any]) -> int | None:
    epochs, length = _setting(config, "optim", "epochs"), _setting(config, "train", "OFFICIAL_EPOCH_LENGTH")
    return None if epochs is None or length is None else round(epochs * length)


def _median(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Of the finite values; NaN if there are only others, None if there are none."""
    given = [row[name] for row in rows if name in row]
    values = [float(value) for value in given if isinstance(value, (int, float)) and math.isfinite(value)]
    return statistics.median(values) if values else (math.nan if given else None)


def _terms(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Medians of the terms of the loss."""
    names = [name for name in (rows[-1] if rows else {}) if name.endswith("_loss") and name != "total_loss"]
    medians = {name.removesuffix("_loss"): _median(rows, name) for name in names}
    return {LOSSES.get(name, name): value for name, value in medians.items() if value is not None}


# --- the command ----------------------------------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Say in a line each how training runs are doing.",
        epilog="exit code: 0 said, 2 no run there, 130 stopped by Ctrl-C; COLUMNS=200 shows more where there is room",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run, or a folder of runs")
    parser.add_argument("--follow", action="store_true", help="look again and again, until all runs have ended")
    parser.add_argument(
        "--interval", type=float, default=10.0, metavar="S", help="seconds between looks (default: %(default)g)"
    )
    args = parser.parse_args(argv)
    if not 0 < args.interval < math.inf:
        parser.error(f"--interval: {args.interval:g} is no time to wait; give seconds above 0")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = parse_arguments(argv)
    try:
        watches = [RunWatch(path) for path in find_runs(args.runs)]
    except OSError as error:
        print(error, file=sys.stderr)
        return 2
    is_terminal, n_shown = sys.stdout.isatty(), 0
    try:
        while True:
            statuses = [watch.look() for watch in watches]
            lines = table(statuses, shutil.get_terminal_size().columns)
            if n_shown and is_terminal:
                print(f"\x1b[{n_shown}F\x1b[J", end="")  # over the lines of the last look
            elif args.follow and not is_terminal:
                lines[0] += time.strftime("  %H:%M:%S")
            print("\n".join(lines), flush=True)
            n_shown = len(lines)
            if not args.follow or all(status.has_ended for status in statuses):
                return 0
            time.sleep(args.interval)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the lines, `head` for instance, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed at the exit
        return 0
