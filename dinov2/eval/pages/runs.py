"""Read training runs, also while they go on, and write a report's sections about them."""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dinov2.configs import dinov2_default_config
from dinov2.data.datasets.tables import open_table
from dinov2.eval.pages.charts import line_chart
from dinov2.eval.pages.page import Section, data_value, image_uri, macros, table
from dinov2.eval.pages.results import METRIC_TITLES, NONE, class_tables, count, metric_columns, percent
from dinov2.eval.results import RESULTS_NAME, mapping, number
from dinov2.utils.config import differences
from dinov2.utils.run_status import CONFIG_NAME, METRICS_NAME, RunStatus, read_status

MOST_ROWS = 40  # of the table under a chart
MOST_WARNINGS, MOST_BAD_IMAGES = 30, 20
MOST_VIEW_BYTES = 3_000_000  # of one image
NEWEST = 50  # iterations that the newest speed is the median of
CURVES = {  # heading: columns of training_metrics.json; the first match counts
    "Losses": r".*_loss",
    "Schedules": r"lr|last_layer_lr|wd|mom|teacher_temp",
    "Gradients": r"grad_norm_.*",
    "Speed": r"images_per_second|iter_time|data_time",
    "Features and prototypes": r"effective_rank|feature_spread|.*prototype_use",
    "Skipped steps": r"skipped_steps|longest_skipped_in_row",
    "Other numbers": r".*",
}
TITLES = {
    "total_loss": "All losses together",
    "dino_global_crops_loss": "DINO, global crops",
    "dino_local_crops_loss": "DINO, local crops",
    "ibot_loss": "iBOT, masked patches",
    "koleo_loss": "KoLeo",
    "lr": "Learning rate",
    "last_layer_lr": "Learning rate of the last layers",
    "wd": "Weight decay",
    "mom": "Momentum of the teacher",
    "teacher_temp": "Temperature of the teacher",
    "iter_time": "Seconds per iteration",
    "data_time": "Seconds of waiting for data, per iteration",
    "effective_rank": "Effective rank of the teacher's CLS tokens",
    "feature_spread": "Spread of the teacher's CLS tokens (0 all equal, 1 uniform)",
    "prototype_use": "Share of prototypes in use, images",
    "patch_prototype_use": "Share of prototypes in use, masked patches",
}


@dataclass(frozen=True, eq=False)
class RunRecord:
    """One run.

    Attributes:
        name: for the report.
        path: its folder.
        config: config.yaml; None if it is missing or not readable.
        metrics: training_metrics.json: a row per iteration, a float64 column per number, NaN where there is none.
        evaluations: contents of eval/training_<n>/results.json by n, ascending.
        best: eval/best.json, or empty.
        bad_images: (path, reason) rows of bad_images.csv; None if there is no such file.
        status: status.json, which counts over all parts of the run.
        views: {kind: {iteration: image of crops or masks}}, ascending.
        notes: what could not be read.
    """

    name: str
    path: Path
    config: DictConfig | None
    metrics: pd.DataFrame
    evaluations: dict[int, Mapping[str, Any]]
    best: Mapping[str, Any]
    bad_images: list[tuple[str, str]] | None
    status: RunStatus
    views: dict[str, dict[int, Path]]
    notes: list[str]

    @property
    def n_done(self) -> int:
        """Iterations up to the newest number."""
        return int(self.metrics.index[-1]) + 1 if len(self.metrics) else 0

    def setting(self, key: str) -> Any:
        """Return a value of the configuration; None if there is none."""
        return None if self.config is None else OmegaConf.select(self.config, key)

    @property
    def n_iterations(self) -> int | None:
        """Iterations of the whole run, if the configuration has them."""
        epochs, length = number(self.setting("optim.epochs")), number(self.setting("train.OFFICIAL_EPOCH_LENGTH"))
        return None if epochs is None or length is None else round(epochs * length)

    def newest(self, column: str) -> float | None:
        """Return the newest finite value of a column, if there is one."""
        values = _finite(self.metrics.get(column, pd.Series(dtype=np.float64)))
        return float(values.iloc[-1]) if len(values) else None


def read_run(path: Path, name: str) -> RunRecord:
    """Read a run's folder; what is missing or broken is named in `notes`.

    Args:
        path: the folder.
        name: for the report.
    """
    notes: list[str] = []

    def read(file: Path, reader: Callable[[Path], Any]) -> Any:
        try:
            return reader(file)
        except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
            problem = "is not there" if isinstance(error, FileNotFoundError) else f"is not readable ({error})"
            notes.append(f"{file.relative_to(path)} {problem}")
            return None

    config = read(path / CONFIG_NAME, OmegaConf.load)
    metrics, n_broken = read(path / METRICS_NAME, read_metrics) or (pd.DataFrame(), 0)
    if n_broken:
        notes.append(f"{METRICS_NAME}: {n_broken} lines are no JSON object with an iteration, and left out")
    evaluations = {
        int(match[1]): mapping(read(file, _read_json))
        for file in path.glob(f"eval/training_*/{RESULTS_NAME}")
        if (match := re.fullmatch(r"training_(\d+)", file.parent.name))
    }
    views: dict[str, dict[int, Path]] = {}
    for file in (path / "views").glob("*.png"):
        if match := re.fullmatch(r"([a-z]+)_(\d+)", file.stem):
            views.setdefault(match[1], {})[int(match[2])] = file
    best, bad_images = path / "eval" / "best.json", path / "bad_images.csv"
    return RunRecord(
        name=name,
        path=path,
        config=config if isinstance(config, DictConfig) else None,
        metrics=metrics,
        evaluations={n: evaluations[n] for n in sorted(evaluations) if evaluations[n]},
        best=mapping(read(best, _read_json)) if best.is_file() else {},
        bad_images=read(bad_images, _read_bad_images) if bad_images.is_file() else None,
        status=read_status(path) or RunStatus(),
        views={kind: dict(sorted(files.items())) for kind, files in sorted(views.items())},
        notes=notes,
    )


def read_metrics(file: Path) -> tuple[pd.DataFrame, int]:
    """Read training_metrics.json, one JSON object a line; of a repeated iteration the later line counts.

    Returns:
        float64, a row per iteration, ascending; and the number of broken lines, but for a last one that is still
        being written.
    """
    rows: dict[int, dict[str, float]] = {}
    n_broken, is_last_broken = 0, False
    with open(file, encoding="utf-8", errors="replace") as stream:
        for line in filter(str.strip, stream):
            n_broken += is_last_broken
            try:
                row = json.loads(line)
                iteration = int(row.pop("iteration"))
            except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
                is_last_broken = True
            else:
                is_last_broken = False
                rows[iteration] = row
    metrics = pd.DataFrame.from_dict(rows, orient="index")
    return metrics.apply(pd.to_numeric, errors="coerce").astype(np.float64).sort_index(), n_broken


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _read_bad_images(file: Path) -> list[tuple[str, str]]:
    return [(row.get("path", ""), row.get("reason", "")) for _, row in open_table(file, "bad images").records()]


def curves_section(runs: Sequence[RunRecord]) -> Section:
    """Return a chart for each number of training_metrics.json, with a line for each run."""
    cards: dict[str, list[Markup]] = {heading: [] for heading in CURVES}
    for name in dict.fromkeys(name for run in runs for name in run.metrics):
        heading = next(heading for heading, names in CURVES.items() if re.fullmatch(names, name))
        columns = {run.name: run.metrics[name] for run in runs if name in run.metrics}
        title = TITLES.get(name, name.replace("_", " ").capitalize())
        cards[heading].append(_line_card(columns, title, "iteration", log_y=heading == "Gradients"))
    parts = [macros().heading(3, heading) + macros().cards(charts) for heading, charts in cards.items() if charts]
    nothing = macros().text("No iteration has been written yet.")
    return Section("curves", "Training curves", Markup().join(parts) or nothing)


def teachers_section(runs: Sequence[RunRecord]) -> Section | None:
    """Return kNN and linear probes of the teachers over iterations; None without any."""
    runs = [run for run in runs if run.evaluations]
    if not runs:
        return None
    rows, classes = [], []
    for run in runs:
        marks = {number(run.best.get("iteration")): "best"}
        marks[max(run.evaluations)] = "newest and best" if max(run.evaluations) in marks else "newest"
        for iteration in sorted(run.evaluations.keys() & marks.keys()):
            for dataset, method, metrics in _methods(run.evaluations[iteration]):
                which = f"{iteration:,} ({marks[iteration]})"
                row = {"run": run.name, "iteration": which, "data set": dataset, "method": method}
                rows.append(row | metric_columns(metrics))
                if iteration == max(run.evaluations):
                    name = f"{run.name}, {dataset}: {method}, iteration {iteration}"
                    classes.append(macros().folded(name, class_tables(metrics, name)))
    best = [
        {
            "run": run.name,
            "iterations": count(run.best.get("iteration")),
            "metric": run.best.get("metric", NONE),
            "score, %": percent(run.best.get("score")),
            "weights": str(run.path / "eval" / str(run.best.get("checkpoint", ""))),
        }
        for run in runs
        if run.best
    ]
    caption = "Newest and best teachers (without intervals: those are for evaluations after the training)"
    warning = "Data sets of one name differ between the runs, and their numbers do not compare:"
    parts = [
        table(best, "Best teacher of each run that is kept", numbers_from=5),
        macros().listing(warning, _different_datasets(runs), "warning"),
        table(rows, caption, numbers_from=4),
        macros().heading(3, "Over iterations"),
        macros().cards(_teacher_charts(runs)),
        macros().heading(3, "Classes, newest teachers"),
        *classes,
    ]
    return Section("teachers", "Teachers during training", Markup().join(parts))


def views_section(runs: Sequence[RunRecord]) -> Section | None:
    """Return crops and masks as the network got them, the first and the newest of each run; None without any."""
    parts = [macros().text("Images of a training batch: normalisation is undone, and masked patches are marked.")]
    for run in (run for run in runs if run.views):
        parts.append(macros().heading(3, run.name))
        for kind, files in run.views.items():
            parts += [
                _view(f"{kind.capitalize()}, iteration {n:,}", files[n]) for n in sorted({min(files), max(files)})
            ]
    return Section("views", "Crops and masks", Markup().join(parts)) if len(parts) > 1 else None


def health_section(runs: Sequence[RunRecord]) -> Section:
    """Return how far each run is, and its faults."""
    parts, rows = [], []
    for run in runs:
        skipped, in_row = run.newest("skipped_steps"), run.newest("longest_skipped_in_row")
        bad_images, warnings = run.bad_images, list(run.status.warnings.items())
        rows.append(
            {
                "run": run.name,
                "state": run_state(run),
                "skipped steps": "not recorded" if skipped is None else count(skipped),
                "most in a row": "not recorded" if in_row is None else count(in_row),
                "rollbacks": run.status.rollbacks,
                "resumed": run.status.resumed,
                "unreadable images": "none recorded" if bad_images is None else len(bad_images),
                "warnings": sum(run.status.warnings.values()),
            }
        )
        parts.append(macros().listing(f"{run.name}: not all could be read.", run.notes))
        lines = [{"warning": text, "times": times} for text, times in warnings[-MOST_WARNINGS:]]
        caption = f"{run.name}: warnings of the log, the last {len(lines)} of {len(warnings)} different ones"
        parts.append(table(lines, caption, folded=caption if len(lines) > 5 else ""))
        images = [{"image": path, "reason": reason} for path, reason in (bad_images or [])[:MOST_BAD_IMAGES]]
        caption = f"{run.name}: unreadable images, the first {len(images)} (all are in bad_images.csv)"
        parts.append(table(images, caption, numbers_from=2, folded=caption))
    state = table(rows, "State and faults", numbers_from=2)
    return Section("health", "Health of the runs", Markup().join([state, *parts]))


def config_section(runs: Sequence[RunRecord]) -> Section | None:
    """Return each run's settings that differ from the default, and all settings; None without any configuration."""
    configs = {run.name: run.config for run in runs if run.config is not None}
    if not configs:
        return None
    parts: list[Markup] = []
    changed: dict[str, dict[str, tuple[Any, Any]]] = {}  # {run: {key: (own, default)}}
    for name, config in configs.items():
        try:
            changed[name] = differences(config, dinov2_default_config)
        except OmegaConfBaseException as error:
            parts.append(macros().text(f"{name}: the settings do not compare ({error}).", "note"))
    defaults = {key: default for of_run in changed.values() for key, (_, default) in of_run.items()}
    rows = [
        [key, *map(_setting, [default, *(of_run.get(key, (default,))[0] for of_run in changed.values())])]
        for key, default in sorted(defaults.items())
    ]
    caption = "Settings that differ from the default (null: nothing, or a key that one side does not have)"
    parts.append(macros().table(["key", "default", *changed], rows, caption, len(changed) + 2))
    for name, config in configs.items():
        yaml = Markup("<pre>{}</pre>").format(OmegaConf.to_yaml(config))
        parts.append(macros().folded(f"All settings of {name} (config.yaml)", yaml))
    return Section("config", "Settings", Markup().join(parts))


def run_state(run: RunRecord) -> Markup:
    """Return how far a run is."""
    done, n_all = data_value(run.n_done, f"{run.n_done:,}"), run.n_iterations
    if n_all is None:
        return Markup("{} iterations").format(done)
    progress = Markup("{} of {} iterations").format(done, data_value(n_all, f"{n_all:,}"))
    if run.n_done >= n_all:
        return Markup("finished: {}").format(progress)
    words = f" ({100 * run.n_done / max(n_all, 1):.0f} %)"
    if (file := run.path / METRICS_NAME).is_file():
        written = datetime.fromtimestamp(file.stat().st_mtime, timezone.utc)
        words += f"; newest number of {written:%Y-%m-%d %H:%M} UTC"
    seconds = run.metrics["iter_time"].tail(NEWEST).median() if "iter_time" in run.metrics else math.nan
    if math.isfinite(seconds):
        left = timedelta(seconds=round((n_all - run.n_done) * seconds))
        words += f"; about {left} h to go at its newest speed"
    return Markup("going on, or stopped: {}{}").format(progress, words)


def _finite(values: pd.Series) -> pd.Series:
    return values[np.isfinite(values)]


def _line_card(columns: Mapping[str, pd.Series], title: str, x_label: str, log_y: bool = False) -> Markup:
    """Return a chart with a folded table of its numbers: evenly over the iterations, with each lowest and highest."""
    chart = line_chart(
        {name: (s.index.to_numpy(), s.to_numpy()) for name, s in columns.items()}, title, x_label, "", log_y
    )
    index = pd.DataFrame(columns).index
    chosen = set(index[np.linspace(0, len(index) - 1, min(len(index), MOST_ROWS)).round().astype(np.int64)])
    for values in map(_finite, columns.values()):
        chosen |= {values.idxmin(), values.idxmax()} if len(values) else set()
    rows = [[str(x), *(_number_cell(values.get(x)) for values in columns.values())] for x in sorted(chosen)]
    caption = title
    if len(index) > MOST_ROWS:
        caption += " (some iterations, the lowest and the highest; training_metrics.json has all)"
    return chart + macros().table(["iteration", *columns], rows, caption, folded="Numbers")


def _number_cell(value: float | None) -> str:
    if value is None:
        return ""
    return data_value(float(value), f"{value:.5g}") if math.isfinite(value) else "not a number"


def _methods(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield (data set, method, metrics) of an evaluation during training; methods are knn_<k> and linear."""
    for dataset, content in mapping(evaluation.get("datasets")).items():
        methods = {**mapping(mapping(content).get("knn")), "linear": mapping(content).get("linear")}
        for method, metrics in methods.items():
            if isinstance(metrics, Mapping):
                yield dataset, method, metrics


def _different_datasets(runs: Sequence[RunRecord]) -> list[str]:
    """Return the data sets of one name that are not the same in all runs, in words."""
    described: dict[str, dict[str, str]] = {}
    for run in runs:
        settings = run.setting("evaluation.datasets")
        entries = {entry.get("name"): entry for entry in settings or [] if isinstance(settings, ListConfig)}
        for name, content in mapping(run.evaluations[max(run.evaluations)].get("datasets")).items():
            paths = [
                f"{key} {value}" for key, value in entries.get(name, {}).items() if key in ("data", "train", "test")
            ]
            counts = [f"{key} {value}" for key, value in mapping(content).items() if key in ("n_train", "n_test")]
            described.setdefault(name, {})[run.name] = ", ".join(counts + paths)
    return [
        f"{name}: " + "; ".join(f"{run}: {text}" for run, text in texts.items())
        for name, texts in described.items()
        if len(set(texts.values())) > 1
    ]


def _teacher_charts(runs: Sequence[RunRecord]) -> list[Markup]:
    """Return a chart for each data set and metric, and for each number of the teacher's features."""
    lines: dict[str, dict[str, dict[int, Any]]] = {}  # {title: {line: {iteration: value}}}
    for run in runs:
        prefix = [run.name] if len(runs) > 1 else []
        for done, evaluation in run.evaluations.items():
            for dataset, method, metrics in _methods(evaluation):
                for metric in ("balanced_accuracy", "accuracy", "weighted_f1"):
                    line = lines.setdefault(f"{dataset}: {METRIC_TITLES[metric]}", {})
                    line.setdefault(", ".join([*prefix, method]), {})[done] = metrics.get(metric)
            for name, value in mapping(evaluation.get("teacher")).items():
                title = f"{name.replace('_', ' ')} at evaluations".capitalize()
                lines.setdefault(title, {}).setdefault(run.name, {})[done] = value
    return [
        _line_card(
            {name: pd.Series(values, dtype=np.float64) for name, values in of_title.items()}, title, "iterations done"
        )
        for title, of_title in lines.items()
    ]


def _view(caption: str, file: Path) -> Markup:
    try:
        content = file.read_bytes()
    except OSError as error:
        return macros().text(f"{caption}: not readable ({error.strerror}).", "note")
    if len(content) > MOST_VIEW_BYTES:
        return macros().text(f"{caption}: {len(content):,} bytes are too many for the page; it is in {file}.", "note")
    image = Markup('<img src="{}" alt="{} of a training batch">').format(image_uri(content, "png"), caption)
    return macros().chart(image, caption)


def _setting(value: Any) -> str:
    return "null" if value is None else json.dumps(value, ensure_ascii=False, default=str)
