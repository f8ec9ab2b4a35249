"""Write a report's sections about evaluations: results, comparison, data sets against each other, origins.

A comparison puts side by side only what was evaluated on the same cells, by the same split and in the same way. What
differs stands in a table of its own, and a warning says so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from dinov2.eval.pages.charts import interval_chart
from dinov2.eval.pages.page import Section, data_value, macros, table
from dinov2.eval.result_records import MODEL, ResultRecord, Row, compare_rows, mapping, number, predictions_belong
from dinov2.eval.results import SCORES, TABLE_METRICS

COMPARED = "balanced_accuracy"  # the metric of interval charts, paired tests and the matrix of data sets
MOST_PAIRED = 50_000  # predictions of one file in a paired test, which resamples them a thousand times
NONE, MISSING = "–", "missing"
NOT_IN_PERCENT = ("log_loss",)
METRIC_TITLES = TABLE_METRICS | SCORES
METRIC_HEADERS = [title + ("" if name in NOT_IN_PERCENT else ", %") for name, title in METRIC_TITLES.items()]
_CLASS_COLUMNS = {"recall": "recall", "precision": "precision", "f1": "F1", "auroc": "AUROC"}


def percent(value: Any) -> str:
    """Return a number in percent with one decimal, or `NONE`."""
    return NONE if number(value) is None else data_value(value, f"{100 * value:.1f}")


def count(value: Any) -> str:
    """Return a whole number, or `MISSING`."""
    return MISSING if number(value) is None else data_value(value, f"{value:,.0f}")


def metric_cells(metrics: Mapping[str, Any]) -> list[str]:
    """Return all metrics with their intervals; `MISSING` for a metric that every result has."""
    return [_metric_cell(metrics, name) for name in METRIC_TITLES]


def class_table(metrics: Mapping[str, Any], name: str, n_train: Mapping[str, Any] | None = None) -> Markup:
    """Return the numbers of each class and the confusion matrix.

    Args:
        metrics: with `per_class` and `confusion`.
        name: what the metrics are of.
        n_train: {class: training cells}; a column if it is given.
    """
    per_class = {class_name: mapping(row) for class_name, row in mapping(metrics.get("per_class")).items()}
    if not per_class:
        return macros().text(f"Classes, {name}: the numbers of the classes are missing.", "note")
    columns = [key for key in _CLASS_COLUMNS if key != "auroc" or any(key in row for row in per_class.values())]
    rows = [
        [
            class_name,
            *([count(n_train[class_name]) if class_name in n_train else NONE] if n_train else []),
            count(row.get("support")),
            *(percent(row[key]) if key in row else MISSING for key in columns),
        ]
        for class_name, row in per_class.items()
    ]
    headers = ["class", *(["training cells"] if n_train else []), "support"]
    headers += [f"{_CLASS_COLUMNS[key]}, %" for key in columns]
    return table(headers, rows, f"Classes, {name}") + _confusion(metrics.get("confusion"), list(per_class), name)


def results_section(records: Sequence[ResultRecord]) -> Section | None:
    """Return all rows of all results with their intervals, few-shot numbers and classes; None without results."""
    records = [record for record in records if record.protocol != "cross"]
    if not records:
        return None
    html = macros()
    parts = [html.data("results", [_content(record) for record in records])]
    for record in records:
        parts += _introduction(record)
        for name, reason in mapping(record.report.get("left_out")).items():
            parts.append(html.text(f"{name} is left out: {reason}."))
        if not record.rows:
            parts.append(html.text("It has no metrics (patients without labels are only predicted)."))
            continue
        caption = f"{record.name}: all protocols, with 95 % intervals where results.json has them"
        rows = [[row.method, row.source, *metric_cells(row.metrics)] for row in record.rows]
        parts.append(table(["method", "features", *METRIC_HEADERS], rows, caption, numbers_from=2))
        parts.append(_intervals(record.name, [(_row_name(row), row) for row in record.rows]))
        parts += [_folds_table(record), _few_shot_table(record), html.heading(4, "Classes")]
        main = [row for row in record.rows if row.source == MODEL] or record.rows
        for row in record.rows:
            owner = record if row.predictions is None else record.parts.get(row.predictions.parent.name, record)
            counts = mapping(owner.report.get("counts"))
            n_train = mapping(counts.get("train_per_class") or counts.get("learned_per_class"))
            classes = class_table(row.metrics, f"{record.name}: {_row_name(row)}", n_train)
            parts.append(html.folded(_row_name(row), classes, row is main[-1]))
    return Section("results", "Results", Markup().join(parts))


def comparison_section(records: Sequence[ResultRecord]) -> Section | None:
    """Return each method's results side by side; None for fewer than two results."""
    records = [record for record in records if record.rows]
    if len(records) < 2:
        return None
    parts: list[Markup] = []
    alone = []
    for method in dict.fromkeys(row.method for record in records for row in record.rows):
        groups = _groups(records, method)
        if sum(len(group.names) for group in groups) < 2:
            alone.append(method)
            continue
        parts.append(macros().heading(3, method))
        if len(groups) > 1:
            text = (
                "Not all of these compare. They were evaluated on other cells or by another split, so they stand in "
                f"{len(groups)} tables:"
            )
            parts.append(macros().listing(text, [group.description for group in groups], "warning"))
        for place, group in enumerate(groups, start=1):
            parts += _side_by_side(method + (f" ({place} of {len(groups)})" if len(groups) > 1 else ""), group)
    if alone:
        parts.append(macros().text(f"Only one of the results has {', '.join(alone)}.", "muted"))
    return Section("comparison", "Comparison", Markup().join(parts))


def cross_section(records: Sequence[ResultRecord]) -> Section | None:
    """Return results of training on one data set and testing on another; None without any."""
    records = [record for record in records if record.protocol == "cross"]
    if not records:
        return None
    parts = [macros().data("cross", [_content(record) for record in records])]
    for record in records:
        parts += _introduction(record)
        results = mapping(record.report.get("results"))
        pairs = {name: mapping(row) for name, row in mapping(results.get("matrix")).items()}
        columns = list(dict.fromkeys(name for row in pairs.values() for name in row))
        if others := mapping(results.get("leave_one_out")):
            pairs["all others"] = others
        if columns:
            shares = [[number(mapping(row.get(name)).get(COMPARED)) for name in columns] for row in pairs.values()]
            title = f"{record.name}: {METRIC_TITLES[COMPARED]} in percent (rows: trained on; columns: tested on)"
            cells = [[percent(share) for share in row] for row in shares]
            parts.append(macros().matrix(list(pairs), columns, cells, shares, title))
        rows = [
            [f"{train} → {test}", count(entry.get("n_train")), count(entry.get("n_test"))]
            + [_metric_cell(entry, metric) for metric in TABLE_METRICS]
            + [entry.get("reason") or ""]
            for train, row in pairs.items()
            for test, entry in ((test, mapping(entry)) for test, entry in row.items())
        ]
        headers = ["trained on → tested on", "training cells", "tested cells"]
        headers += [*(f"{title}, %" for title in TABLE_METRICS.values()), "why there is no number"]
        parts.append(table(headers, rows, f"{record.name}: every pair of data sets"))
        parts.append(_batch_effect(record.name, results))
    return Section("cross", "Data sets against each other", Markup().join(parts))


def origins_section(records: Sequence[ResultRecord], starts: Mapping[str, Sequence[Mapping[str, Any]]]) -> Section:
    """Return versions, seeds, hashes and settings.

    Args:
        records: of evaluations.
        starts: {run: its starts}, as status.json has them.
    """
    keys = ("seed", "dinov2", "commit", "torch")
    rows = [
        [name, str(part), *(str(start.get(key) or "not stated") for key in keys)]
        for name, of_run in starts.items()
        for part, start in enumerate(of_run, start=1)
    ]
    headers = ["run", "start or resume", *keys]
    parts = [table(headers, rows, "Training runs: what each part ran with", numbers_from=6)] if rows else []
    rows = []
    for record in records:
        report, checkpoint = record.report, mapping(record.report.get("checkpoint"))
        versions = ", ".join(f"{name} {version}" for name, version in mapping(report.get("versions")).items())
        seed = mapping(report.get("settings")).get("seed", MISSING)
        digest = checkpoint.get("checkpoint_sha256") or NONE
        rows.append([record.name, report.get("date", MISSING), seed, versions or MISSING, digest])
    if rows:
        headers = ["result", "date", "seed", "versions", "sha256 of the weights"]
        parts.append(table(headers, rows, "Results: date, seed, versions, weights", numbers_from=5))
    for record in records:
        rows = [
            [kind, key, str(value)]
            for kind in ("hashes", "files", "features", "settings")
            for key, value in mapping(record.report.get(kind)).items()
        ]
        if rows:
            caption = f"{record.name}: hashes of inputs and files, features, settings"
            parts.append(table(["part", "name", "value"], rows, caption, numbers_from=3, folded=caption))
    nothing = macros().text("No version, seed or hash is recorded.")
    return Section("origins", "Versions, seeds and hashes", Markup().join(parts) or nothing)


@dataclass
class _Group:
    """Rows that were evaluated on the same cells and by the same split; digests of both, or None if unknown."""

    cells: str | None
    split: str | None
    members: list[tuple[ResultRecord, Row]] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(record.name for record, _ in self.members))

    @property
    def description(self) -> str:
        row = self.members[0][1]
        n_tested = "an unknown number" if row.n_tested is None else f"{row.n_tested:,}"
        cells = "which ones is not known without its predictions and split"
        if self.cells is not None:
            cells = f"cells {self.cells[:8]}, split {'not known' if self.split is None else self.split[:8]}"
        return f"{', '.join(self.names)}: {n_tested} tested, {len(row.classes)} classes; {cells}"


def _groups(records: Sequence[ResultRecord], method: str) -> list[_Group]:
    """Group a method's rows by what they were evaluated on; a baseline that several results repeat stands once."""
    groups: dict[tuple[str | None, ...], _Group] = {}
    for record in records:
        for row in (row for row in record.rows if row.method == method):
            cells, split = (row.cells, row.split) if predictions_belong(record, row) else (None, None)
            key = (record.name,) if cells is None else (cells, split)
            group = groups.setdefault(key, _Group(cells, split))
            is_repeated = row.source != MODEL and any(
                other.source == row.source and _numbers(other) == _numbers(row) for _, other in group.members
            )
            if not is_repeated:
                group.members.append((record, row))
    return list(groups.values())


def _side_by_side(title: str, group: _Group) -> list[Markup]:
    """Return a group's settings that differ, its table, its chart and its paired tests."""
    parts = []
    models = [record for record, row in group.members if row.source == MODEL]
    different = []
    for key in dict.fromkeys(key for record in models for key in record.settings):
        values = {record.name: str(record.settings[key]) for record in models if key in record.settings}
        if len(set(values.values())) > 1:
            different.append(f"{key}: " + "; ".join(f"{name} {value}" for name, value in values.items()))
    if different:
        parts.append(macros().listing("Settings differ between these results:", different, "warning"))
    named = [
        (record.name if row.source == MODEL else f"{record.name}, {row.source}", row) for record, row in group.members
    ]
    rows = [
        [name, record.encoder if row.source == MODEL else row.source, *metric_cells(row.metrics)]
        for (name, row), (record, _) in zip(named, group.members, strict=True)
    ]
    n_tested = named[0][1].n_tested
    caption = f"{title}: side by side, with 95 % intervals" + ("" if n_tested is None else f", {n_tested:,} tested")
    parts.append(table(["result", "features of", *METRIC_HEADERS], rows, caption, numbers_from=2))
    return [*parts, _intervals(title, named), _paired_table(title, group, named)]


def _paired_table(title: str, group: _Group, named: Sequence[tuple[str, Row]]) -> Markup:
    """Return tests of each row against the first, where predictions of the same cells are there."""
    (first_name, first), *others = named
    rows = []
    if group.cells is not None and (first.n_tested or 0) <= MOST_PAIRED:
        for name, row in others:
            if compared := compare_rows(first, row):
                difference, p_mcnemar = compared["differences"][COMPARED], compared["mcnemar"]["p_value"]
                p_value = difference["p_value"]
                points = _with_interval(percent(difference["difference"]), difference["interval"])
                p_bootstrap = NONE if p_value is None else data_value(p_value, f"{p_value:.3g}")
                rows.append([name, points, p_bootstrap, data_value(p_mcnemar, f"{p_mcnemar:.3g}")])
    caption = f"{title}: difference to {first_name} on the same cells (paired bootstrap, 95 % interval)"
    headers = ["result", f"{METRIC_TITLES[COMPARED]}, points", "p", "McNemar's p (cells taken for independent)"]
    return table(headers, rows, caption) if rows else Markup()


def _numbers(row: Row) -> dict[str, Any]:
    return {name: value for name, value in row.metrics.items() if number(value) is not None}


def _introduction(record: ResultRecord) -> list[Markup]:
    """Return a heading, and protocol, encoder, data and date in a sentence, with notes."""
    report, settings = record.report, mapping(record.report.get("settings"))
    words = [f"protocol {record.protocol}", f"features of {record.encoder}"]
    data = [str(settings[key]) for key in ("data", "test", "features", "bags") if settings.get(key)]
    words += [f"data {data[0]}"] if data else []
    tested = number(mapping(report.get("counts")).get("tested"))
    words += [] if tested is None else [f"{tested:,.0f} tested"]
    if isinstance(kept_apart := report.get("patients_kept_apart"), bool):
        words.append("patients are kept apart" if kept_apart else "patients are NOT kept apart")
    words += [f"made {report['date']}"] if "date" in report else []
    parts = [macros().heading(3, record.name), macros().text("; ".join(words) + ".")]
    return parts + [macros().text(f"{note}.", "note") for note in record.notes]


def _metric_cell(metrics: Mapping[str, Any], name: str) -> str:
    if name not in metrics:
        return MISSING if name in TABLE_METRICS else NONE
    value, ends = metrics[name], Row("", "", metrics).interval(name)
    if name in NOT_IN_PERCENT and number(value) is not None:
        low_high = ends and Markup(" ({} to {})").format(*(data_value(end, f"{end:.3f}") for end in ends))
        return data_value(value, f"{value:.3f}") + (low_high or "")
    return _with_interval(percent(value), ends)


def _with_interval(text: str, ends: Sequence[float] | None) -> str:
    """Return a number in percent with its interval behind it."""
    return text if ends is None or text == NONE else Markup("{} ({} to {})").format(text, *map(percent, ends))


def _with_spread(mean: Any, spread: Any) -> str:
    """Return a mean and a standard deviation in percent."""
    return percent(mean) if number(spread) is None else Markup("{} ± {}").format(percent(mean), percent(spread))


def _confusion(confusion: Any, class_names: Sequence[str], name: str) -> Markup:
    """Return counts [C, C], each field as strong as its share of the label."""
    is_matrix = isinstance(confusion, list) and len(confusion) == len(class_names)
    if not is_matrix or any(not isinstance(row, list) or len(row) != len(class_names) for row in confusion):
        return macros().text(f"Confusion, {name}: the matrix is missing, or does not fit the classes.", "note")
    shares = [[(number(n) or 0) / max(sum(number(n) or 0 for n in row), 1) for n in row] for row in confusion]
    caption = f"Confusion, {name} (rows: labels; columns: predictions)"
    return macros().matrix(class_names, class_names, [[count(n) for n in row] for row in confusion], shares, caption)


def _intervals(title: str, named: Sequence[tuple[str, Row]]) -> Markup:
    """Return a chart of the compared metric and its intervals."""
    rows = []
    for name, row in named:
        numbers = (number(row.metrics.get(COMPARED)), *(row.interval(COMPARED) or (None, None)))
        value, low, high = (None if number is None else 100 * number for number in numbers)
        rows.append((name, value, low, high))
    return macros().cards([interval_chart(rows, f"{title}: {METRIC_TITLES[COMPARED]} and 95 % interval", "%")])


def _row_name(row: Row) -> str:
    return f"{row.method}, {row.source}"


def _folds_table(record: ResultRecord) -> Markup:
    """Return mean and spread over folds of the rows that have them."""
    rows = []
    for row in record.rows:
        means, spreads = mapping(row.metrics.get("mean_over_folds")), mapping(row.metrics.get("sd_over_folds"))
        if means:
            folds = row.metrics.get("folds")
            cells = [_with_spread(means.get(metric), spreads.get(metric)) for metric in TABLE_METRICS]
            rows.append([_row_name(row), str(len(folds)) if isinstance(folds, list) else NONE, *cells])
    headers = ["method, features", "folds", *(f"{title}, %" for title in TABLE_METRICS.values())]
    caption = f"{record.name}: mean ± standard deviation over folds"
    return table(headers, rows, caption, folded="Mean and spread over folds") if rows else Markup()


def _few_shot_table(record: ResultRecord) -> Markup:
    rows = []
    for owner in (record, *record.parts.values()):
        prefix = "" if owner is record else f"{owner.path.parent.name}: "
        for source, methods in mapping(owner.report.get("few_shot")).items():
            for method, numbers in mapping(methods).items():
                for n_cells, entry in mapping(numbers).items():
                    accuracy, n_draws = mapping(mapping(entry).get(COMPARED)), mapping(entry).get("n_draws")
                    mean = _with_spread(accuracy.get("mean"), accuracy.get("sd"))
                    rows.append([f"{prefix}{method}, {source}", str(n_cells), mean, count(n_draws)])
    headers = ["method, features", "cells a class", f"{METRIC_TITLES[COMPARED]}, %", "draws"]
    caption = f"{record.name}: trained on a few cells a class (mean ± standard deviation)"
    return table(headers, rows, caption) if rows else Markup()


def _batch_effect(name: str, results: Mapping[str, Any]) -> Markup:
    """Return how well a classifier tells the data sets apart, over all cells and within classes."""
    effect = mapping(results.get("batch_effect"))
    if not effect:
        return macros().text(f"Batch effect: {results.get('batch_effect_reason') or 'not measured'}.")
    means = mapping(effect.get("mean_over_classes"))
    methods = list(means) or ["linear"]
    chance = mapping(means.get(methods[0])).get("chance")
    rows = [
        ["mean over classes", *(percent(mapping(means.get(key)).get(COMPARED)) for key in methods), percent(chance)]
    ]
    for cells, entry in {"all cells": effect.get("overall"), **mapping(effect.get("per_class"))}.items():
        entries = [mapping(mapping(entry).get(method)) for method in methods]
        values = [_with_interval(percent(each.get(COMPARED)), each.get("interval")) for each in entries]
        rows.append([cells, *values, percent(mapping(entry).get("chance"))])
    caption = f"{name}: how well features tell the data sets apart (balanced accuracy; look within classes)"
    return table(["cells", *(f"{method}, %" for method in methods), "chance, %"], rows, caption)


def _content(record: ResultRecord) -> dict[str, Any]:
    return {"name": record.name, "file": str(record.path), "report": record.report}
