"""Read training runs, also while they go on, and write a report's sections about them."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dinov2.configs import dinov2_default_config
from dinov2.data.datasets.tables import open_table
from dinov2.eval.compare import different_values
from dinov2.eval.pages.page import NONE, Section, html, line_chart, percent, rounded, section, table
from dinov2.eval.pages.results import METRIC_TITLES, metric_columns
from dinov2.eval.results import RESULTS_NAME, ResultRecord, mapping, number, read_report, read_result
from dinov2.utils.config import differences, read_config
from dinov2.utils.run_status import CONFIG_NAME, METRICS_NAME, RunStatus, read_status

MOST_WARNINGS, MOST_BAD_IMAGES = 30, 20
ONLY_LOGGED = ("patch_prototype_use",)  # numbers that only the iterations of the log have
TITLES = {  # of numbers in training_metrics.json, in the order of their charts; others follow
    "total_loss": "All losses together",
    "dino_global_crops_loss": "DINO, global crops",
    "dino_local_crops_loss": "DINO, local crops",
    "ibot_loss": "iBOT, masked patches",
    "koleo_loss": "KoLeo",
    "invariance_loss": "LeJEPA, distances between views",
    "sigreg_loss": "LeJEPA, SIGReg",
    "distill_cls_loss": "Distillation, CLS tokens",
    "distill_patch_loss": "Distillation, patch tokens",
    "metadata_loss": "Metadata, how well the value can be told",
    "lr": "Learning rate",
    "last_layer_lr": "Learning rate of the last layers",
    "wd": "Weight decay",
    "mom": "Momentum of the teacher",
    "teacher_temp": "Temperature of the teacher",
    "iter_time": "Seconds per iteration",
    "data_time": "Seconds of waiting for data, per iteration",
    "effective_rank": "Effective rank of the CLS tokens",
    "feature_spread": "Spread of the CLS tokens (0 all equal, 1 uniform)",
    "prototype_use": "Share of prototypes in use, images",
    "patch_prototype_use": "Share of prototypes in use, masked patches",
}
TEACHER_METRICS = ("balanced_accuracy", "accuracy", "weighted_f1")  # that have a chart over iterations


@dataclass(frozen=True, eq=False)
class RunRecord:
    """One run."""

    name: str
    path: Path  # its folder
    config: DictConfig  # config.yaml; empty if it cannot be read
    metrics: pd.DataFrame  # training_metrics.json: a row per iteration, a column per number, NaN where there is none
    evaluations: dict[int, ResultRecord]  # eval/training_<n>/results.json by n, ascending
    best: dict[str, Any]  # eval/best.json, or empty
    bad_images: list[dict[str, str]]  # rows of bad_images.csv: path and reason
    status: RunStatus  # status.json, which counts over all parts of the run
    notes: list[str]  # what is missing or could not be read

    def newest(self, column: str) -> float | None:
        """Return the newest finite value of a column, if there is one."""
        values = self.metrics.get(column, pd.Series(dtype=np.float64)).dropna()
        return float(values.iloc[-1]) if len(values) else None

    @property
    def state(self) -> Markup:
        """How far the run is."""
        n_done = int(self.metrics.index[-1]) + 1 if len(self.metrics) else 0
        keys = ("optim.epochs", "train.OFFICIAL_EPOCH_LENGTH")
        epochs, length = (number(OmegaConf.select(self.config, key)) for key in keys)
        if epochs is None or length is None:
            return Markup("{} iterations").format(rounded(n_done))
        n_all = round(epochs * length)
        words = "finished" if n_done >= n_all else "going on, or stopped"
        return Markup("{}: {} of {} iterations").format(words, rounded(n_done), rounded(n_all))


def read_run(path: Path, name: str) -> RunRecord:
    """Read a run's folder; what is missing or broken is named in `notes`."""
    notes: list[str] = [f"{name}: no {file}" for file in (CONFIG_NAME, METRICS_NAME) if not (path / file).is_file()]

    def read(file: Path, reader: Callable[[Path], Any], default: Any) -> Any:
        try:
            return reader(file) if file.is_file() else default
        except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
            notes.append(f"{name}: {file.relative_to(path)} is not readable ({error})")
            return default

    metrics, n_broken = read(path / METRICS_NAME, read_metrics, (pd.DataFrame(), 0))
    if n_broken:
        notes.append(f"{name}: {n_broken} lines of {METRICS_NAME} are no JSON object with an iteration")
    evaluations = {
        int(match[1]): read(file, lambda file: read_result(file, name), None)
        for file in path.glob(f"eval/training_*/{RESULTS_NAME}")
        if (match := re.fullmatch(r"training_(\d+)", file.parent.name))
    }
    return RunRecord(
        name=name,
        path=path,
        config=read(path / CONFIG_NAME, read_config, OmegaConf.create()),
        metrics=metrics,
        evaluations={n: evaluations[n] for n in sorted(evaluations) if evaluations[n]},
        best=read(path / "eval" / "best.json", read_report, {}),
        bad_images=read(
            path / "bad_images.csv", lambda file: [row for _, row in open_table(file, "bad images").records()], []
        ),
        status=read_status(path) or RunStatus(),
        notes=notes,
    )


def read_metrics(file: Path) -> tuple[pd.DataFrame, int]:
    """Return training_metrics.json, a row per iteration, and the number of broken lines, which a killed run may leave.

    Of a repeated iteration the later line counts. The text after the last line's end is still being written.
    """
    rows: dict[int, dict[str, float]] = {}
    n_broken = 0
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
        try:
            row = json.loads(line)
            rows[int(row.pop("iteration"))] = row
        except (AttributeError, KeyError, TypeError, ValueError):
            n_broken += 1
    metrics = pd.DataFrame.from_dict(rows, orient="index").apply(pd.to_numeric, errors="coerce").astype(np.float64)
    return metrics.where(np.isfinite(metrics)).sort_index(), n_broken


def runs_table(runs: Sequence[RunRecord]) -> Markup:
    """Render the runs as a table: state, newest loss and speed, best teacher, and counts of faults."""
    rows = [
        {
            "run": run.name,
            "state": run.state,
            "newest loss": rounded(run.newest("total_loss"), ".4f"),
            "images per second": rounded(run.newest("images_per_second"), ",.1f"),
            "best teacher, %": percent(run.best.get("score")),
            "its metric": run.best.get("metric", NONE),
            "its weights": f"eval/{run.best['checkpoint']}" if "checkpoint" in run.best else NONE,
            "skipped steps": rounded(run.newest("skipped_steps")),
            "most in a row": rounded(run.newest("longest_skipped_in_row")),
            "rollbacks": rounded(run.status.rollbacks),
            "resumed": rounded(run.status.resumed),
            "unreadable images": rounded(len(run.bad_images)),
            "warnings": rounded(sum(run.status.warnings.values())),
        }
        for run in runs
    ]
    return table(rows, "Training runs")


def curves_section(runs: Sequence[RunRecord]) -> Section | None:
    """Return a chart for each number of training_metrics.json with a line for each run, and a table for each run."""
    names = {name for run in runs for name in run.metrics}
    known = {name: title for name, title in TITLES.items() if name in names}
    titles = known | {name: name.replace("_", " ").capitalize() for name in sorted(names - known.keys())}
    charts = []
    rows: dict[str, list[dict[str, str]]] = {run.name: [] for run in runs}
    for name, title in titles.items():
        lines = {run.name: run.metrics[name] for run in runs if name in run.metrics}
        if name in ONLY_LOGGED:
            lines = {run_name: line.dropna() for run_name, line in lines.items()}
        charts.append(line_chart(lines, title, "iteration", log_y=name.startswith("grad_norm")))
        for run_name, values in ((run_name, line.dropna()) for run_name, line in lines.items()):
            if len(values):
                numbers = {"newest": values.iloc[-1], "lowest": values.min(), "highest": values.max()}
                cells = {header: rounded(value, ".5g") for header, value in numbers.items()}
                rows[run_name].append({"number": title, **cells, "iterations that have it": rounded(len(values))})
    tables = [table(of_run, f"{name}: numbers of the training", is_folded=True) for name, of_run in rows.items()]
    return section("curves", "Training curves", [html.cards(charts), *tables])


def teachers_section(runs: Sequence[RunRecord]) -> Section | None:
    """Return the evaluations of teachers during the training; None without any."""
    lines: dict[str, dict[str, dict[int, Any]]] = {}  # {title: {run: {iteration: value}}}
    rows = []
    runs = [run for run in runs if run.evaluations]
    for run in runs:
        for done, record in run.evaluations.items():
            teacher = mapping(record.report.get("teacher"))
            numbers = {f"Teacher, {name.replace('_', ' ')}": value for name, value in teacher.items()}
            for row in record.rows:
                numbers |= {f"{row.method}: {METRIC_TITLES[name]}": row.metrics.get(name) for name in TEACHER_METRICS}
                if done in (max(run.evaluations), run.best.get("iteration")):
                    which = {"run": run.name, "iterations": rounded(done), "method": row.method}
                    rows.append(which | metric_columns(row))
            for title, value in numbers.items():
                lines.setdefault(title, {}).setdefault(run.name, {})[done] = value
    charts = []
    for title, of_runs in lines.items():
        series = {name: pd.Series(values, dtype=np.float64) for name, values in of_runs.items()}
        charts.append(line_chart(series, title, "iterations done"))
    sizes: dict[str, dict[str, str]] = {run.name: {} for run in runs}
    for run in runs:
        for name, of_set in mapping(run.evaluations[max(run.evaluations)].report.get("datasets")).items():
            sizes[run.name][name] = f"{of_set.get('n_train')} to train, {of_set.get('n_test')} to test"
    warning = "Data sets of one name differ between the runs, and their numbers do not compare:"
    parts = [html.listing(warning, different_values(sizes), "warning"), html.cards(charts)]
    return section("teachers", "Teachers during training", [*parts, table(rows, "Newest and best teacher of each run")])


def health_section(runs: Sequence[RunRecord]) -> Section | None:
    """Return the warnings and the unreadable images of runs; None without any."""
    parts = []
    for run in runs:
        warnings = [{"warning": text, "times": rounded(times)} for text, times in run.status.warnings.items()]
        parts.append(table(warnings[-MOST_WARNINGS:], f"{run.name}: newest of {len(warnings)} warnings"))
        caption = f"{run.name}: unreadable images, the first of {len(run.bad_images)} in bad_images.csv"
        parts.append(table(run.bad_images[:MOST_BAD_IMAGES], caption, is_folded=True))
    return section("health", "Health of the runs", parts)


def config_section(runs: Sequence[RunRecord]) -> Section | None:
    """Return each run's settings that differ from the default, and all settings; None without any configuration."""
    runs = [run for run in runs if run.config]
    changed = {run.name: differences(run.config, dinov2_default_config) for run in runs}  # {run: {key: (own, default)}}
    defaults = {key: default for of_run in changed.values() for key, (_, default) in of_run.items()}
    rows = []
    for key, default in sorted(defaults.items()):
        values = [default, *(of_run.get(key, (default,))[0] for of_run in changed.values())]
        rows.append([key, *(json.dumps(value, ensure_ascii=False, default=str) for value in values)])
    caption = "Settings that differ from the default (null: nothing, or a key that one side does not have)"
    parts = [html.table(["key", "default", *changed], rows, caption)] if runs else []
    for run in runs:
        yaml = Markup("<pre>{}</pre>").format(OmegaConf.to_yaml(run.config))
        parts.append(html.folded(f"All settings of {run.name} (config.yaml)", yaml))
    return section("config", "Settings", parts)
