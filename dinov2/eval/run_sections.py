"""Sections of a report about training runs: curves, teachers judged on the way, crops and masks, health, settings.

Every number that is shown is rounded from one that stands in the section's data as the run wrote it.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import numpy as np
from omegaconf import ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dinov2.configs import dinov2_default_config
from dinov2.eval.charts import line_chart, thinned
from dinov2.eval.metric_tables import NONE, class_table, confusion_figure, metric_cells, metric_headers, shown
from dinov2.eval.pages import Markup, Section, escape, image_uri, table, valued
from dinov2.eval.results import AVERAGED_METRICS, TABLE_METRICS, mapping, number
from dinov2.eval.run_records import Metrics, RunRecord, View, methods_of
from dinov2.utils.config import differences

MOST_ROWS = 40  # of the table under a curve
MOST_WARNINGS = 30
MOST_BAD_IMAGES = 20
MOST_VIEWS = 2  # of a kind and a run: the first and the newest
MOST_VIEW_BYTES = 3_000_000  # of one picture
NEWEST = 50  # iterations that "newest speed" is the median of

# (heading, [(column, title, unit, logarithmic)]); what a run has besides comes under "Other numbers"
_CURVES: list[tuple[str, list[tuple[str, str, str, bool]]]] = [
    (
        "Losses",
        [
            ("total_loss", "All losses together", "loss", False),
            ("dino_global_crops_loss", "DINO, global crops", "loss", False),
            ("dino_local_crops_loss", "DINO, local crops", "loss", False),
            ("ibot_loss", "iBOT, masked patches", "loss", False),
            ("koleo_loss", "KoLeo", "loss", False),
            ("smooth_rank_loss", "Smooth rank", "loss", False),
        ],
    ),
    (
        "Schedules",
        [
            ("lr", "Learning rate", "", False),
            ("last_layer_lr", "Learning rate of the last layers", "", False),
            ("wd", "Weight decay", "", False),
            ("mom", "Momentum of the teacher", "", False),
            ("teacher_temp", "Temperature of the teacher", "", False),
        ],
    ),
    ("Gradients", []),  # grad_norm_*
    (
        "Speed",
        [
            ("images_per_second", "Pictures a second", "pictures / s", False),
            ("iter_time", "Time of an iteration", "s", False),
            ("data_time", "Waiting for data, of each iteration", "s", False),
        ],
    ),
    (
        "Features and prototypes",
        [
            ("effective_rank", "Effective rank of the teacher's CLS tokens", "directions", False),
            ("feature_spread", "Spread of the teacher's CLS tokens (0 all equal, 1 uniform)", "", False),
            ("prototype_use", "Prototypes in use, pictures", "share", False),
            ("patch_prototype_use", "Prototypes in use, masked patches", "share", False),
        ],
    ),
    (
        "Skipped steps",
        [
            ("skipped_steps", "Skipped so far", "steps", False),
            ("longest_skipped_in_row", "Longest row of skipped steps", "steps", False),
        ],
    ),
]
_GRADIENT_PREFIX = "grad_norm_"


def curves_section(runs: Sequence[RunRecord]) -> Section:
    """A chart for each number of training_metrics.json, with a line for each run; thinned where runs are long."""
    parts: list[str] = []
    data: dict[str, Any] = {}
    for run in runs:
        data[run.name] = {
            "iterations": len(run.metrics.iterations),
            "columns": {name: _thinned_column(run.metrics, name) for name in run.metrics.columns},
        }
    if not any(len(run.metrics.iterations) for run in runs):
        return Section("curves", "Training curves", "<p>No iteration has been written yet.</p>", {"runs": data})
    for heading, charts in _curves_of(runs):
        figures = []
        for column, title, unit, log_y in charts:
            columns = {
                run.name: (run.metrics.iterations, run.metrics.columns[column])
                for run in runs
                if len(run.metrics.iterations) and column in run.metrics.columns
            }
            chart = line_chart(columns, title, "iteration", unit, log_y)
            figures.append(f'<div class="card">{chart}{_numbers_table(columns, title)}</div>')
        parts.append(f'<h3>{escape(heading)}</h3><div class="grid">{"".join(figures)}</div>')
    return Section("curves", "Training curves", "".join(parts), {"runs": data})


def teachers_section(runs: Sequence[RunRecord]) -> Section | None:
    """What the teachers could do as they were trained: kNN and linear probe over iterations; None without any."""
    judged = [run for run in runs if run.evaluations]
    if not judged:
        return None
    parts, rows, details = [_best_teachers(judged), _different_sets(judged)], [], []
    for run in judged:
        newest, best = max(run.evaluations), number(mapping(run.best).get("iteration"))
        for iteration in sorted({newest, *([round(best)] if best in run.evaluations else [])}):
            marks = [mark for mark, is_it in (("newest", iteration == newest), ("best", iteration == best)) if is_it]
            for dataset, method, metrics in _judgements(run.evaluations[iteration]):
                which = f"{iteration:,} ({' and '.join(marks)})"
                rows.append([run.name, which, dataset, method, *metric_cells(metrics)])
                if iteration == newest:
                    details.append(_class_details(f"{run.name}, {dataset}: {method}, iteration {iteration}", metrics))
    caption = "Newest and best teachers (without intervals: those are for evaluations after the training)"
    headers = ["run", "iteration", "data set", "method", *metric_headers()]
    parts.append(table(headers, rows, caption, numbers_from=4))
    parts.append(f'<h3>Over iterations</h3><div class="grid">{"".join(_teacher_charts(judged))}</div>')
    parts.append("<h3>Classes, newest teachers</h3>" + "".join(details))
    data = {run.name: {str(done): _scalars(found) for done, found in run.evaluations.items()} for run in judged}
    return Section("teachers", "Teachers during training", "".join(parts), {"runs": data})


def views_section(runs: Sequence[RunRecord]) -> Section | None:
    """Crops and masks as the network got them: the first and the newest of each run; None without any."""
    parts = []
    for run in runs:
        by_kind: dict[str, list[View]] = {}
        for view in run.views:
            by_kind.setdefault(view.kind, []).append(view)
        if not by_kind:
            continue
        parts.append(f"<h3>{escape(run.name)}</h3>")
        for kind, views in by_kind.items():
            chosen = [views[0], views[-1]][-MOST_VIEWS:] if len(views) > 1 else views
            parts += [_view_figure(view, kind) for view in chosen]
    if not parts:
        return None
    words = (
        "<p>Pictures of a batch as student and teacher were given them: cropped, augmented and normalised (undone here "
        "to show them), and the patches that were masked for the student.</p>"
    )
    return Section("views", "Crops and masks", words + "".join(parts))


def health_section(runs: Sequence[RunRecord]) -> Section:
    """How far each run is, and what went wrong on the way."""
    rows = [
        [
            run.name,
            run_state(run),
            _count(run.metrics.last("skipped_steps")),
            _count(run.metrics.last("longest_skipped_in_row")),
            str(run.status.rollbacks),
            str(run.status.resumed),
            "none recorded" if run.bad_images is None else str(len(run.bad_images)),
            str(sum(run.status.warnings.values())),
        ]
        for run in runs
    ]
    headers = ["run", "state", "skipped steps", "most in a row", "rollbacks", "resumed", "unreadable pictures"]
    parts: list[str] = [table([*headers, "warnings"], rows, "State and faults", numbers_from=2)]
    for run in runs:
        if run.notes:
            items = "".join(f"<li>{escape(note)}</li>" for note in run.notes)
            parts.append(f'<div class="note"><p>{escape(run.name)}: not all could be read.</p><ul>{items}</ul></div>')
        if run.status.warnings:
            found = list(run.status.warnings.items())
            is_cut = len(found) > MOST_WARNINGS
            caption = f"{run.name}: warnings of the log" + (
                f", the last {MOST_WARNINGS} of {len(found)} different ones" if is_cut else ""
            )
            lines = [[text, str(times)] for text, times in found[-MOST_WARNINGS:]]
            parts.append(table(["warning", "times"], lines, caption, folded_under=None if len(lines) <= 5 else caption))
        if run.bad_images:
            is_cut = len(run.bad_images) > MOST_BAD_IMAGES
            caption = f"{run.name}: unreadable pictures" + (
                f", the first {MOST_BAD_IMAGES} of {len(run.bad_images)} (all are in bad_images.csv)" if is_cut else ""
            )
            lines = [list(row) for row in run.bad_images[:MOST_BAD_IMAGES]]
            parts.append(table(["picture", "reason"], lines, caption, numbers_from=2, folded_under=caption))
    data = {
        run.name: {
            "iterations_done": run.metrics.done,
            "iterations": run.n_iterations,
            "skipped_steps": run.metrics.last("skipped_steps"),
            "rollbacks": run.status.rollbacks,
            "resumed": run.status.resumed,
            "bad_images": None if run.bad_images is None else len(run.bad_images),
        }
        for run in runs
    }
    return Section("health", "Health of the runs", "".join(parts), {"runs": data})


def config_section(runs: Sequence[RunRecord]) -> Section | None:
    """What each run has set otherwise than the default, and all of its settings; None without any configuration."""
    known = [run for run in runs if run.config is not None]
    if not known:
        return None
    parts: list[str] = []
    changed: dict[str, dict[str, tuple[Any, Any]]] = {}
    for run in known:
        assert run.config is not None, "those without are not among them"
        try:
            changed[run.name] = differences(run.config, dinov2_default_config)
        except OmegaConfBaseException as error:
            parts.append(f'<p class="note">{escape(run.name)}: the settings do not compare ({escape(error)}).</p>')
    keys = sorted({key for found in changed.values() for key in found})
    names = list(changed)
    rows = []
    for key in keys:
        default = next(found[key][1] for found in changed.values() if key in found)
        values = [_setting_text(found[key][0] if key in found else default) for found in changed.values()]
        rows.append([key, _setting_text(default), *values])
    if names:
        caption = "Settings that differ from the default (null: nothing, or a key that one side does not have)"
        parts.append(table(["key", "default", *names], rows, caption, numbers_from=2 + len(names)))
    for run in known:
        assert run.config is not None, "those without are not among them"
        text = escape(OmegaConf.to_yaml(run.config))
        parts.append(
            f"<details><summary>All settings of {escape(run.name)} (config.yaml)</summary><pre>{text}</pre></details>"
        )
    data = {name: {key: found[key][0] for key in found} for name, found in changed.items()}
    return Section("config", "Settings", "".join(parts), {"changed": data})


def run_state(run: RunRecord) -> Markup:
    """How far a run is, in words."""
    done, n = run.metrics.done, run.n_iterations
    counted = Markup(f"{valued(done, f'{done:,}')} iterations")
    if n is None:
        return counted
    of_all = Markup(f"{valued(done, f'{done:,}')} of {valued(n, f'{n:,}')} iterations")
    if done >= n:
        return Markup(f"finished: {of_all}")
    seconds = run.metrics.columns.get("iter_time", np.empty(0))[-NEWEST:]
    finite = seconds[np.isfinite(seconds)]
    to_go = (
        f"; about {_duration((n - done) * float(np.median(finite)))} to go at its newest speed" if len(finite) else ""
    )
    when = ""
    if run.written_at is not None:
        stamp = datetime.fromtimestamp(run.written_at, timezone.utc)
        when = f"; newest number of {stamp:%Y-%m-%d %H:%M} UTC"
    return Markup(f"going on, or stopped: {of_all} ({100 * done / max(n, 1):.0f} %){escape(when)}{escape(to_go)}")


# --- pieces ---------------------------------------------------------------------------------------------------------


def _curves_of(runs: Sequence[RunRecord]) -> Iterable[tuple[str, list[tuple[str, str, str, bool]]]]:
    """The charts there are numbers for, by heading."""
    columns = list(dict.fromkeys(name for run in runs for name in run.metrics.columns))
    gradients = [name for name in columns if name.startswith(_GRADIENT_PREFIX)]
    planned = {column for _, charts in _CURVES for column, *_ in charts}
    for heading, charts in _CURVES:
        if heading == "Gradients":
            charts = [
                (name, f"Gradient norm, {name.removeprefix(_GRADIENT_PREFIX).replace('_', ' ')}", "", True)
                for name in gradients
            ]
        found = [chart for chart in charts if chart[0] in columns]
        if found:
            yield heading, found
    others = [name for name in columns if name not in planned and name not in gradients]
    if others:
        yield "Other numbers", [(name, name, "", False) for name in others]


def _thinned_column(metrics: Metrics, name: str) -> dict[str, Any]:
    kept = thinned(metrics.iterations, metrics.columns[name])
    return {"iteration": metrics.iterations[kept], "value": metrics.columns[name][kept]}


def _numbers_table(columns: Mapping[str, tuple[np.ndarray, np.ndarray]], caption: str) -> Markup:
    """A folded table of a chart's numbers: evenly over the iterations, with the lowest and the highest."""
    chosen: set[int] = set()
    n_all = len({int(x) for xs, _ in columns.values() for x in xs[: MOST_ROWS + 1]})
    for xs, ys in columns.values():
        positions = np.unique(np.linspace(0, len(xs) - 1, min(len(xs), MOST_ROWS)).round().astype(np.int64))
        finite = np.flatnonzero(np.isfinite(ys))
        extremes = [finite[ys[finite].argmin()], finite[ys[finite].argmax()]] if len(finite) else []
        chosen |= {int(xs[i]) for i in [*positions, *extremes]}
    lookup: list[tuple[np.ndarray, np.ndarray]] = list(columns.values())
    rows = [[str(x), *(_value_at(xs, ys, x) for xs, ys in lookup)] for x in sorted(chosen)]
    if n_all > MOST_ROWS:
        caption += " (some iterations, the lowest and the highest; training_metrics.json has all)"
    return table(["iteration", *columns], rows, caption, folded_under="Numbers")


def _value_at(xs: np.ndarray, ys: np.ndarray, x: int) -> str:
    i = int(np.searchsorted(xs, x))
    if i >= len(xs) or xs[i] != x:
        return ""
    return valued(float(ys[i]), f"{ys[i]:.5g}") if math.isfinite(ys[i]) else "not a number"


def _judgements(found: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """(data set, method, metrics) of an evaluation."""
    return [
        (name, method, metrics)
        for name, of_set in mapping(found.get("datasets")).items()
        for method, metrics in methods_of(mapping(of_set)).items()
    ]


def _scalars(found: Mapping[str, Any]) -> dict[str, Any]:
    """An evaluation without its classes."""
    datasets: dict[str, dict[str, Any]] = {}
    for name, method, metrics in _judgements(found):
        datasets.setdefault(name, {})[method] = {key: metrics[key] for key in AVERAGED_METRICS if key in metrics}
    return {"datasets": datasets, "teacher": dict(mapping(found.get("teacher")))}


def _best_teachers(runs: Sequence[RunRecord]) -> str:
    items = []
    for run in runs:
        best = mapping(run.best)
        score, iteration = number(best.get("score")), number(best.get("iteration"))
        if score is None or iteration is None:
            text = Markup("no teacher of this run is kept and judged yet")
        else:
            text = Markup(
                f"the best teacher is that after {valued(best['iteration'], f'{iteration:.0f}')} iterations: "
                f"{escape(best.get('metric', 'score'))} {shown(best['score'])} % "
                f"(<code>{escape(run.path / 'eval' / str(best.get('checkpoint', '')))}</code>)"
            )
        items.append(f"<li>{escape(run.name)}: {text}</li>")
    return f"<ul>{''.join(items)}</ul>"


def _different_sets(runs: Sequence[RunRecord]) -> str:
    """A warning if data sets of one name are not the same in all runs; "" otherwise."""
    described: dict[str, dict[str, str]] = {}
    for run in runs:
        settings = run.setting("evaluation.datasets")
        given = OmegaConf.to_container(settings) if isinstance(settings, ListConfig) else []
        assert isinstance(given, list), "a list becomes a list"
        entries = {str(entry.get("name")): entry for entry in given if isinstance(entry, dict)}
        for name, of_set in mapping(run.evaluations[max(run.evaluations)].get("datasets")).items():
            found = mapping(of_set)
            sides = {key: entries.get(name, {}).get(key) for key in ("data", "train", "test") if name in entries}
            where = ", ".join(f"{key} {value}" for key, value in sides.items() if value)
            text = f"{found.get('n_train', NONE)} cells to learn from, {found.get('n_test', NONE)} judged"
            described.setdefault(name, {})[run.name] = text + (f" ({where})" if where else "")
    items = [
        f"<li>{escape(name)}: {escape('; '.join(f'{run}: {text}' for run, text in of_runs.items()))}</li>"
        for name, of_runs in described.items()
        if len(set(of_runs.values())) > 1
    ]
    if not items:
        return ""
    words = "Data sets of one name differ between the runs, and their numbers do not compare:"
    return f'<div class="warning"><p>{words}</p><ul>{"".join(items)}</ul></div>'


def _teacher_charts(runs: Sequence[RunRecord]) -> list[str]:
    """A chart for each data set and metric, and one for each number of the teacher's features."""
    lines: dict[str, dict[str, list[tuple[int, float]]]] = {}

    def add(title: str, run: RunRecord, what: str, done: int, value: Any) -> None:
        found = number(value)
        name = ", ".join(word for word in (run.name if len(runs) > 1 else "", what) if word) or run.name
        lines.setdefault(title, {}).setdefault(name, []).append((done, math.nan if found is None else found))

    for run in runs:
        for done, evaluation in run.evaluations.items():
            for dataset, method, metrics in _judgements(evaluation):
                for metric in ("balanced_accuracy", "accuracy", "weighted_f1"):
                    add(f"{dataset}: {TABLE_METRICS[metric]}", run, method, done, metrics.get(metric))
            for name, value in mapping(evaluation.get("teacher")).items():
                add(f"{name.replace('_', ' ')} at evaluations".capitalize(), run, "", done, value)
    charts = []
    for title, of_title in lines.items():
        series = {name: tuple(np.array(values).T) for name, values in of_title.items()}
        chart = line_chart(series, title, "iterations done", "")
        numbers = _numbers_table({name: (xs.astype(np.int64), ys) for name, (xs, ys) in series.items()}, title)
        charts.append(f'<div class="card">{chart}{numbers}</div>')
    return charts


def _class_details(caption: str, metrics: Mapping[str, Any]) -> str:
    names = list(mapping(metrics.get("per_class")))
    inner = class_table(metrics, f"Classes: {caption}") + confusion_figure(
        metrics.get("confusion"), names, f"Confusion: {caption}"
    )
    return f"<details><summary>{escape(caption)}</summary>{inner}</details>"


def _view_figure(view: View, kind: str) -> str:
    caption = f"{kind.capitalize()}, iteration {view.iteration:,}"
    try:
        content = view.file.read_bytes()
    except OSError as error:
        return f'<p class="note">{escape(caption)}: not readable ({escape(error.strerror)}).</p>'
    if len(content) > MOST_VIEW_BYTES:
        text = f"{caption}: {len(content):,} bytes are too many for the page; it is in {view.file}"
        return f'<p class="note">{escape(text)}</p>'
    return (
        f'<figure><img src="{image_uri(content, "png")}" alt="{escape(caption)} of a training batch">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _setting_text(value: Any) -> str:
    return "null" if value is None else json.dumps(value, ensure_ascii=False, default=str)


def _count(value: float | None) -> str:
    return "not recorded" if value is None else valued(value, f"{value:.0f}")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d} h"
