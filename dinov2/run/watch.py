"""Show the progress of runs, one line each, from their status.json: steps, rates, losses, kNN and health.

It writes nothing and builds no network, so it answers at once, on any machine that sees the folders.
"""

import argparse
import math
import os
import re
import shutil
import socket
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from dinov2.utils.command import duration_text
from dinov2.utils.files import user_path
from dinov2.utils.run_status import ENDED, RunStatus, is_run, read_status

SILENT_SECONDS = 300.0  # a run without a new status for this long is called silent: a checkpoint may take minutes
SHORT_NAMES = {"dino_global_crops_loss": "cls", "dino_local_crops_loss": "local"}
COLUMNS = ("run", "state", "step", "%", "loss", "terms", "img/s", "wait", "eta", "kNN", "of", "health")
DROPPED_FIRST = ("terms", "of", "wait", "img/s", "kNN", "eta", "step", "loss")  # where the terminal is narrow
LEFT_ALIGNED = ("run", "state", "terms", "health")
HEALTH_WIDTH, NAME_WIDTH = 12, 20


def describe_state(run_folder: Path, status: RunStatus | None) -> str:
    """Return the state of a run: that of its status.json, or killed, silent <duration>, unknown or gone."""
    if status is None:
        return "unknown" if run_folder.is_dir() else "gone"
    if status.state in ENDED:
        return status.state
    if status.host == socket.gethostname() and not _is_alive(status.pid):
        return "killed"
    age = time.time() - status.time
    if age > max(SILENT_SECONDS, 10 * status.seconds_between_reports):
        return f"silent {duration_text(age)}"
    return status.state


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # sends nothing
    except OSError as error:
        return isinstance(error, PermissionError)  # another user's process
    return True


def list_problems(run_folder: Path, status: RunStatus) -> list[str]:
    """Return the problems of a run in words; empty if it has none."""
    n_bad = _count_bad_images(run_folder / "bad_images.csv")
    problems = [
        (status.reason, status.reason),
        (status.losses and status.losses.get("total_loss") is None, "loss not finite"),
        (status.collapse, "collapse?"),
        (status.skipped_steps, f"{status.skipped_steps} skipped"),
        (status.rollbacks, f"{status.rollbacks} rolled back"),
        (n_bad, f"{n_bad} bad images"),
        (status.errors and not status.reason, f"{status.errors} error{'s' * (status.errors > 1)} logged"),
    ]
    return [text for is_present, text in problems if is_present]


def _count_bad_images(path: Path) -> int:
    try:
        with open(path, "rb") as file:
            return max(sum(line.endswith(b"\n") for line in file) - 1, 0)
    except OSError:
        return 0


def mean_knn(evaluation: Mapping[str, float]) -> float | None:
    """Return the balanced accuracy of kNN with the largest k, as mean over the data sets of an evaluation."""
    by_dataset: dict[str, dict[int, float]] = {}
    for name, value in evaluation.items():
        if match := re.fullmatch(r"evaluation/(.+)/knn_(\d+)_balanced_accuracy", name):
            by_dataset.setdefault(match[1], {})[int(match[2])] = value
    return statistics.fmean(by_k[max(by_k)] for by_k in by_dataset.values()) if by_dataset else None


def table_row(run_folder: Path) -> dict[str, str]:
    """Return a run's cells of the table, by column."""
    status = read_status(run_folder)
    row = dict.fromkeys(COLUMNS, "")
    row |= {"run": _make_printable(run_folder.resolve().name)[:NAME_WIDTH], "state": describe_state(run_folder, status)}
    if status is None:
        return row
    done, total, losses = status.iteration, status.n_iterations, dict(status.losses)
    loss, knn = losses.pop("total_loss", None), mean_knn(status.evaluation)
    terms = [f"{SHORT_NAMES.get(n, n.removesuffix('_loss'))} {v:.3g}" for n, v in losses.items() if v is not None]
    return row | {
        "step": f"{done}/{total}",
        "%": f"{100 * min(done, total) // total}" if total else "",
        "loss": "" if not status.losses else "nan" if loss is None else f"{loss:.4g}",
        "terms": " ".join(terms),
        "img/s": _format_number(status.images_per_second, ".0f"),
        "wait": _format_number(status.data_share, ".0%"),
        "eta": "" if status.eta_seconds is None or status.state in ENDED else duration_text(status.eta_seconds),
        "kNN": _format_number(knn, ".3f"),
        "of": "" if knn is None else f"@{status.evaluation['iteration']:.0f}",
        "health": _make_printable(", ".join(list_problems(run_folder, status))) or "ok",
    }


def _format_number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _make_printable(text: str) -> str:
    """Replace control characters of folder names and messages."""
    return "".join(c if c.isprintable() else "?" for c in text)


def table(rows: Sequence[Mapping[str, str]], width: int) -> list[str]:
    """Format a heading and a line for each run, at most `width` characters long."""
    lines = [dict(zip(COLUMNS, COLUMNS, strict=True)), *rows]
    widths = {name: max(len(line[name]) for line in lines) for name in COLUMNS if any(row[name] for row in rows)}
    widths["health"] = HEALTH_WIDTH  # the minimum of the last column
    for name in DROPPED_FIRST:
        if sum(widths.values()) + len(widths) - 1 > width:
            widths.pop(name, None)

    def text(line: Mapping[str, str]) -> str:
        cells = (line[k].ljust(n) if k in LEFT_ALIGNED else line[k].rjust(n) for k, n in widths.items())
        return " ".join(cells).rstrip()[:width]

    return [text(line) for line in lines]


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Return the given runs, and the runs in given folders of runs."""
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


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Show the progress of training runs, one line each.",
        epilog="exit code: 0 shown, 2 no such run, 130 stopped by Ctrl-C; COLUMNS=200 shows more columns",
    )
    parser.add_argument("runs", type=user_path, nargs="+", metavar="RUN", help="folder of a run, or a folder of runs")
    parser.add_argument("--follow", action="store_true", help="repeat until all runs have ended")
    interval_help = "seconds between repetitions (default: %(default)g)"
    parser.add_argument("--interval", type=float, default=10.0, metavar="S", help=interval_help)
    args = parser.parse_args(argv)
    if not 0 < args.interval < math.inf:
        parser.error(f"--interval: {args.interval:g} is no time to wait; give seconds above 0")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    args = parse_arguments(argv)
    try:
        runs = find_runs(args.runs)
    except OSError as error:
        print(error, file=sys.stderr)
        return 2
    is_terminal, n_shown = sys.stdout.isatty(), 0
    try:
        while True:
            rows = [table_row(run) for run in runs]
            lines = table(rows, shutil.get_terminal_size().columns)
            if n_shown and is_terminal:
                print(f"\x1b[{n_shown}F\x1b[J", end="")  # removes the lines of the last repetition
            elif args.follow and not is_terminal:
                lines[0] += time.strftime("  %H:%M:%S")
            print("\n".join(lines), flush=True)
            n_shown = len(lines)
            if not args.follow or all(row["state"] in (*ENDED, "killed", "gone") for row in rows):
                return 0
            time.sleep(args.interval)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # a reader like `head` has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes the rest at the exit
        return 0
