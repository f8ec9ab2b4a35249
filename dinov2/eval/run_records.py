"""What a training run left in its folder, read for a report: while the run is still going, too.

Letters: n iterations
"""

import json
import logging
import math
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dinov2.data.datasets.tables import open_table

logger = logging.getLogger("dinov2")

METRICS_NAME, CONFIG_NAME, RESULTS_NAME = "training_metrics.json", "config.yaml", "results.json"
_LOG_LINE = re.compile(r"(?:\d{4}-\d\d-\d\d )?[\d:,]+ ([IWE]) (.*)")
_ROLLBACK = re.compile(r"\(rollback \d+ of \d+\)")
_ENVIRONMENT = re.compile(
    r"seed (?P<seed>-?\d+); dinov2 (?P<dinov2>\S+)(?: at (?P<commit>\w+))?; torch (?P<torch>[^;\s]+)"
)


@dataclass(frozen=True)
class Metrics:
    """Columns of training_metrics.json.

    Attributes:
        iterations: int64 [n], ascending.
        columns: {name: float64 [n]}, NaN where a line has no number.
        n_broken: lines that could not be read, but for a last one that is still being written.
    """

    iterations: np.ndarray
    columns: dict[str, np.ndarray]
    n_broken: int = 0

    @property
    def done(self) -> int:
        """Iterations that the newest line tells of."""
        return int(self.iterations[-1]) + 1 if len(self.iterations) else 0

    def last(self, name: str) -> float | None:
        """The newest finite value of a column, if there is one."""
        values = self.columns.get(name, np.empty(0))
        finite = values[np.isfinite(values)]
        return float(finite[-1]) if len(finite) else None


@dataclass(frozen=True)
class Log:
    """What logs/log.txt tells besides progress.

    Attributes:
        environments: of each start or resume, in order: `seed`, `dinov2`, `commit` (None if unknown), `torch`.
        warnings: {text: how often} of warnings and errors, in order of their first time.
        n_rollbacks: how often the run went back to a checkpoint.
        n_resumed: how often it was taken up again.
    """

    environments: list[dict[str, str | None]] = field(default_factory=list)
    warnings: dict[str, int] = field(default_factory=dict)
    n_rollbacks: int = 0
    n_resumed: int = 0


@dataclass(frozen=True)
class View:
    """A picture of crops or masks as the network got them: the file, of which kind, after how many iterations."""

    file: Path
    kind: str
    iteration: int


@dataclass(frozen=True)
class RunRecord:
    """One run.

    Attributes:
        name: for the report.
        path: its folder.
        config: config.yaml; None if it is not there or not readable.
        metrics: of its iterations.
        evaluations: contents of eval/training_<n>/results.json by n, ascending.
        best: eval/best.json.
        bad_images: (path, reason) rows of bad_images.csv; None if there is no such file.
        log: of all its parts.
        views: pictures in views/, by kind and iteration.
        written_at: when the newest number was written, in seconds since 1970; None if there is none.
        notes: what could not be read, in words.
    """

    name: str
    path: Path
    config: DictConfig | None
    metrics: Metrics
    evaluations: dict[int, dict[str, Any]]
    best: dict[str, Any] | None
    bad_images: list[tuple[str, str]] | None
    log: Log
    views: list[View]
    written_at: float | None
    notes: list[str]

    def setting(self, key: str) -> Any:
        """A value of the configuration; None if there is none."""
        return None if self.config is None else OmegaConf.select(self.config, key)

    @property
    def n_iterations(self) -> int | None:
        """How many the run has in all, if the configuration tells."""
        epochs, length = self.setting("optim.epochs"), self.setting("train.OFFICIAL_EPOCH_LENGTH")
        is_known = all(isinstance(value, (int, float)) for value in (epochs, length))
        return round(epochs * length) if is_known else None


def is_run(folder: Path) -> bool:
    """Whether a training run wrote this folder."""
    return (folder / METRICS_NAME).is_file() or (
        (folder / CONFIG_NAME).is_file() and any((folder / part).is_dir() for part in ("checkpoints", "logs", "eval"))
    )


def read_run(path: Path, name: str) -> RunRecord:
    """Read a run's folder; whatever of it is missing or broken is said in `notes`.

    Args:
        path: the folder.
        name: for the report.
    """
    notes: list[str] = []
    config = _read_config(path / CONFIG_NAME, notes)
    evaluations = {}
    for file in path.glob(f"eval/training_*/{RESULTS_NAME}"):
        match = re.fullmatch(r"training_(\d+)", file.parent.name)
        found = _read_json(file, notes)
        if match and found is not None:
            evaluations[int(match[1])] = found
    best = path / "eval" / "best.json"
    return RunRecord(
        name=name,
        path=path,
        config=config,
        metrics=_metrics_of(path / METRICS_NAME, notes),
        evaluations=dict(sorted(evaluations.items())),
        best=_read_json(best, notes) if best.is_file() else None,
        bad_images=_read_bad_images(path / "bad_images.csv", notes),
        log=read_log(path / "logs" / "log.txt"),
        views=_find_views(path / "views"),
        written_at=(path / METRICS_NAME).stat().st_mtime if (path / METRICS_NAME).is_file() else None,
        notes=notes,
    )


def read_metrics(file: Path) -> Metrics:
    """Read training_metrics.json, a JSON object a line.

    Of an iteration that stands twice the later line counts. A column that begins late is NaN before.
    """
    iterations, n_broken, is_last_broken = array("q"), 0, False
    columns: dict[str, array[float]] = {}
    with open(file, encoding="utf-8", errors="replace") as stream:
        for line in stream:
            if not line.strip():
                continue
            n_broken += is_last_broken
            is_last_broken = False
            try:
                row = json.loads(line)
                iteration = int(row["iteration"])
            except (json.JSONDecodeError, KeyError, TypeError, ValueError, OverflowError):
                is_last_broken = True  # of the very last line that only means that it is being written
                continue
            for key in row:
                if key != "iteration" and key not in columns:
                    columns[key] = array("d", [math.nan]) * len(iterations)
            iterations.append(iteration)
            for key, column in columns.items():
                column.append(_as_number(row.get(key)))
    numbers = np.array(iterations, dtype=np.int64)
    # From the end: np.unique keeps the first of those that are equal
    kept = len(numbers) - 1 - np.unique(numbers[::-1], return_index=True)[1]
    return Metrics(numbers[kept], {key: np.frombuffer(column)[kept] for key, column in columns.items()}, n_broken)


def read_log(file: Path) -> Log:
    """Read logs/log.txt; an empty `Log` if it is not there."""
    environments: list[dict[str, str | None]] = []
    warnings: Counter[str] = Counter()
    n_rollbacks = n_resumed = 0
    for level, text in _log_lines(file):
        if level == "I":
            if match := _ENVIRONMENT.match(text):
                environments.append(dict(match.groupdict()))
            n_resumed += text.startswith("resuming ") and " after iteration " in text
        else:
            warnings[text] += 1
            n_rollbacks += bool(_ROLLBACK.search(text))
    return Log(environments, dict(warnings), n_rollbacks, n_resumed)


def _log_lines(file: Path) -> Iterator[tuple[str, str]]:
    """(level, text) of the lines that begin an entry."""
    if not file.is_file():
        return
    with open(file, encoding="utf-8", errors="replace") as stream:
        for line in stream:
            if match := _LOG_LINE.match(line.rstrip("\n")):
                yield match[1], match[2]


def _metrics_of(file: Path, notes: list[str]) -> Metrics:
    if not file.is_file():
        notes.append(f"{METRICS_NAME} is not there: the run has not written a number yet, or it was removed")
        return Metrics(np.empty(0, dtype=np.int64), {})
    metrics = read_metrics(file)
    if metrics.n_broken:
        notes.append(f"{METRICS_NAME}: {metrics.n_broken} lines are no JSON object with an iteration, and left out")
    return metrics


def _as_number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def _read_json(file: Path, notes: list[str]) -> dict[str, Any] | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        notes.append(f"{file.parent.name}/{file.name} is not readable ({error})")
        return None
    if not isinstance(content, dict):
        notes.append(f"{file.parent.name}/{file.name} holds no JSON object")
        return None
    return content


def _read_config(file: Path, notes: list[str]) -> DictConfig | None:
    if not file.is_file():
        notes.append(f"{CONFIG_NAME} is not there")
        return None
    try:
        config = OmegaConf.load(file)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        notes.append(f"{CONFIG_NAME} is not readable ({error})")
        return None
    if not isinstance(config, DictConfig):
        notes.append(f"{CONFIG_NAME} holds no mapping")
        return None
    return config


def _read_bad_images(file: Path, notes: list[str]) -> list[tuple[str, str]] | None:
    if not file.is_file():
        return None
    try:
        return [(row.get("path", ""), row.get("reason", "")) for _, row in open_table(file, "bad images").records()]
    except ValueError as error:
        notes.append(f"{file.name} is not readable ({error})")
        return None


def _find_views(folder: Path) -> list[View]:
    found = []
    for file in folder.glob("*.png"):
        if match := re.fullmatch(r"([a-z]+)_(\d+)", file.stem):
            found.append(View(file, match[1], int(match[2])))
    return sorted(found, key=lambda view: (view.kind, view.iteration))


def methods_of(found: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """{knn_<k> or linear: metrics} of one data set in an evaluation during training."""
    knn = found.get("knn")
    methods = dict(knn) if isinstance(knn, Mapping) else {}
    if isinstance(found.get("linear"), Mapping):
        methods["linear"] = found["linear"]
    return {name: metrics for name, metrics in methods.items() if isinstance(metrics, Mapping)}
