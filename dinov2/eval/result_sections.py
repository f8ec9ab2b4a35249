"""Sections of a report about evaluations: results of all protocols, comparison, data sets against each other, origins.

A comparison holds side by side only what was judged on the same cells, by the same split and in the same way; what
differs stands in a table of its own, and a warning says so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dinov2.eval.charts import interval_chart, matrix_chart
from dinov2.eval.compare import cells_digest, comparable_settings, compare_rows, predictions_belong, split_digest
from dinov2.eval.metric_tables import (
    MISSING,
    NONE,
    class_table,
    confusion_figure,
    metric_cell,
    metric_cells,
    metric_headers,
    shown,
)
from dinov2.eval.pages import Markup, Section, escape, table, valued
from dinov2.eval.results import MODEL, TABLE_METRICS, ResultRecord, Row, mapping, number

COMPARED = "balanced_accuracy"  # the metric of interval charts and of the matrix of data sets
MOST_PAIRED = 50_000  # predictions of one file, for the paired test, which draws them a thousand times
ALL_OTHERS = "all others"


def results_section(records: Sequence[ResultRecord]) -> Section | None:
    """All rows of all results with their intervals, few-shot numbers, classes and confusion; None without any."""
    judged = [record for record in records if record.protocol != "cross"]
    if not judged:
        return None
    parts: list[str] = []
    for record in judged:
        parts.append(f"<h3>{escape(record.name)}</h3><p>{_about(record)}</p>")
        parts += [f'<p class="note">{escape(note)}.</p>' for note in record.notes]
        left_out = mapping(record.report.get("left_out"))
        parts += [f"<p>{escape(name)} is left out: {escape(reason)}.</p>" for name, reason in left_out.items()]
        if not record.rows:
            parts.append("<p>It has no metrics (patients without labels are only predicted).</p>")
            continue
        caption = f"{record.name}: all protocols, with 95 % intervals where results.json has them"
        rows = [[row.method, row.source, *metric_cells(row.metrics)] for row in record.rows]
        parts.append(table(["method", "features", *metric_headers()], rows, caption, numbers_from=2))
        chart = interval_chart(
            [(_row_name(row), *_scaled(row, COMPARED)) for row in record.rows],
            f"{record.name}: {TABLE_METRICS[COMPARED]} and 95 % interval",
            "%",
        )
        parts.append(f'<div class="grid"><div class="card">{chart}</div></div>')
        parts += _folds_table(record) + _few_shot_tables(record)
        parts.append("<h4>Classes</h4>")
        main = [row for row in record.rows if row.source == MODEL] or record.rows
        parts += [_row_details(record, row, is_open=row is main[-1]) for row in record.rows]
    data = [_embedded(record) for record in judged]
    return Section("results", "Results", "".join(parts), {"results": data})


def comparison_section(records: Sequence[ResultRecord]) -> Section | None:
    """Methods of several results side by side; None if there are not two results."""
    judged = [record for record in records if record.rows]
    if len(judged) < 2:
        return None
    parts: list[str] = []
    data: list[dict[str, Any]] = []
    methods = list(dict.fromkeys(row.method for record in judged for row in record.rows))
    alone = []
    for method in methods:
        groups = _groups(judged, method)
        if sum(len(group.records) for group in groups) < 2:
            alone.append(method)
            continue
        parts.append(f"<h3>{escape(method)}</h3>")
        if len(groups) > 1:
            items = "".join(f"<li>{escape(group.described)}</li>" for group in groups)
            parts.append(
                f'<div class="warning"><p><strong>Not all of these compare.</strong> They were judged on other cells '
                f"or by another split, so they stand in {len(groups)} tables:</p><ul>{items}</ul></div>"
            )
        for place, group in enumerate(groups, start=1):
            parts += _group_parts(method, group, f" ({place} of {len(groups)})" if len(groups) > 1 else "")
            data.append(
                {
                    "method": method,
                    "cells": group.cells,
                    "split": group.split,
                    "rows": [{"result": record.name, "source": row.source} for record, row in group.members],
                }
            )
    if alone:
        parts.append(f'<p class="muted">Only one of the results has {escape(", ".join(alone))}.</p>')
    return Section("comparison", "Comparison", "".join(parts), {"groups": data})


def cross_section(records: Sequence[ResultRecord]) -> Section | None:
    """Learned on one data set, judged by another, and how well features tell the sets apart; None without any."""
    crossed = [record for record in records if record.protocol == "cross"]
    if not crossed:
        return None
    parts: list[str] = []
    for record in crossed:
        results = mapping(record.report.get("results"))
        parts.append(f"<h3>{escape(record.name)}</h3><p>{_about(record)}</p>")
        parts += [f'<p class="note">{escape(note)}.</p>' for note in record.notes]
        rows = {name: mapping(row) for name, row in mapping(results.get("matrix")).items()}
        columns = list(dict.fromkeys(name for row in rows.values() for name in row))
        if others := mapping(results.get("leave_one_out")):
            rows[ALL_OTHERS] = others
        values = [[number(mapping(row.get(name)).get(COMPARED)) for name in columns] for row in rows.values()]
        texts = [["" if value is None else f"{100 * value:.1f}" for value in row] for row in values]
        title = f"{record.name}: {TABLE_METRICS[COMPARED]} in percent, learned on rows, judged by columns"
        if rows and columns:
            parts.append(matrix_chart(values, texts, list(rows), columns, title, "judged by", "learned on"))
        lines = [
            [
                f"{learned} → {judged}",
                *(_count(entry, key) for key in ("n_train", "n_test")),
                *(metric_cell(entry, metric) for metric in TABLE_METRICS),
                entry.get("reason") or "",
            ]
            for learned, row in rows.items()
            for judged, entry in ((name, mapping(row.get(name))) for name in row)
        ]
        headers = ["learned on → judged by", "cells to learn from", "cells judged"]
        headers += [f"{title}, %" for title in TABLE_METRICS.values()]
        parts.append(table([*headers, "why there is no number"], lines, f"{record.name}: every pair of data sets"))
        parts.append(_batch_effect(record.name, results))
    data = [_embedded(record) for record in crossed]
    return Section("cross", "Data sets against each other", "".join(parts), {"results": data})


def origins_section(records: Sequence[ResultRecord], runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Section:
    """Versions, seeds, hashes and settings that the numbers come from.

    Args:
        records: of evaluations.
        runs: {run: its starts}, as status.json has them.
    """
    parts: list[str] = []
    lines = [
        [name, str(part), *(str(found.get(key) or "not stated") for key in ("seed", "dinov2", "commit", "torch"))]
        for name, environments in runs.items()
        for part, found in enumerate(environments, start=1)
    ]
    if lines:
        headers = ["run", "start or resume", "seed", "dinov2", "commit", "torch"]
        parts.append(table(headers, lines, "Training runs: what each part ran with", numbers_from=6))
    if records:
        rows = []
        for record in records:
            settings, checkpoint = mapping(record.report.get("settings")), mapping(record.report.get("checkpoint"))
            versions = mapping(record.report.get("versions"))
            seed = settings.get("seed", MISSING)
            told = ", ".join(f"{name} {version}" for name, version in versions.items()) or MISSING
            digest = str(checkpoint.get("checkpoint_sha256") or NONE)
            rows.append([record.name, str(record.report.get("date", MISSING)), str(seed), told, digest])
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
                parts.append(table(["part", "name", "value"], rows, caption, numbers_from=3, folded_under=caption))
    if not parts:
        parts.append("<p>Nothing here says what it was made with.</p>")
    return Section("origins", "Versions, seeds and hashes", "".join(parts))


# --- comparison -----------------------------------------------------------------------------------------------------


@dataclass
class _Group:
    """Rows that were judged on the same cells and by the same split."""

    cells: str | None
    split: str | None
    members: list[tuple[ResultRecord, Row]] = field(default_factory=list)

    @property
    def records(self) -> list[str]:
        return list(dict.fromkeys(record.name for record, _ in self.members))

    @property
    def described(self) -> str:
        n, n_classes = self.members[0][1].n_tested, len(self.members[0][1].classes)
        what = f"{'an unknown number' if n is None else f'{n:,}'} judged, {n_classes} classes"
        if self.cells is None:
            what += "; which ones is not known without its predictions and split"
        else:
            what += f"; cells {self.cells[:8]}, split {'not known' if self.split is None else self.split[:8]}"
        return f"{', '.join(self.records)}: {what}"


def _groups(records: Sequence[ResultRecord], method: str) -> list[_Group]:
    """Rows of a method by what they were judged on; a baseline with the same numbers in several results stands once."""
    found: dict[tuple[str, ...], _Group] = {}
    for record in records:
        for row in record.rows:
            if row.method != method:
                continue
            belongs = predictions_belong(record, row)
            cells, split = (cells_digest(row), split_digest(row)) if belongs else (None, None)
            key = ("known", cells, split or "") if cells is not None else ("unknown", record.name)
            group = found.setdefault(key, _Group(cells, split))
            is_repeated = row.source != MODEL and any(
                other.source == row.source and _scalars(other) == _scalars(row) for _, other in group.members
            )
            if not is_repeated:
                group.members.append((record, row))
    return list(found.values())


def _group_parts(method: str, group: _Group, place: str) -> list[str]:
    names = [_member_name(record, row) for record, row in group.members]
    encoders = [record.encoder if row.source == MODEL else row.source for record, row in group.members]
    rows = [
        [name, encoder, *metric_cells(row.metrics)]
        for name, encoder, (_, row) in zip(names, encoders, group.members, strict=True)
    ]
    title = f"{method}{place}"
    n_tested = group.members[0][1].n_tested
    caption = f"{title}: side by side, with 95 % intervals" + ("" if n_tested is None else f", {n_tested:,} judged")
    parts: list[str] = []
    different = _different_settings([record for record, row in group.members if row.source == MODEL])
    if different:
        items = "".join(f"<li>{escape(text)}</li>" for text in different)
        parts.append(f'<div class="warning"><p>Settings differ between these results:</p><ul>{items}</ul></div>')
    parts.append(table(["result", "features of", *metric_headers()], rows, caption, numbers_from=2))
    chart = interval_chart(
        [(name, *_scaled(row, COMPARED)) for name, (_, row) in zip(names, group.members, strict=True)],
        f"{title}: {TABLE_METRICS[COMPARED]} and 95 % interval",
        "%",
    )
    parts.append(f'<div class="grid"><div class="card">{chart}</div></div>')
    return parts + _paired_table(title, group, names)


def _paired_table(title: str, group: _Group, names: Sequence[str]) -> list[str]:
    """Whether each differs from the first by more than chance, where predictions of the same cells are there."""
    first, *others = [row for _, row in group.members]
    if group.cells is None or (first.n_tested or 0) > MOST_PAIRED:
        return []
    rows = []
    for name, row in zip(names[1:], others, strict=True):
        found = compare_rows(first, row)
        if found is None:
            continue
        difference = found["differences"][COMPARED]
        ends = difference["interval"]
        text = shown(difference["difference"])
        if ends is not None and text != NONE:
            text = Markup(f"{text} ({shown(ends[0])} to {shown(ends[1])})")
        p_value = difference["p_value"]
        chance = NONE if p_value is None else valued(p_value, f"{p_value:.3g}")
        mcnemar = found["mcnemar"]["p_value"]
        rows.append([name, text, chance, valued(mcnemar, f"{mcnemar:.3g}")])
    if not rows:
        return []
    caption = f"{title}: difference to {names[0]} on the same cells (paired bootstrap, 95 % interval)"
    headers = ["result", f"{TABLE_METRICS[COMPARED]}, points", "p", "McNemar's p (cells taken for independent)"]
    return [table(headers, rows, caption)]


def _different_settings(records: Sequence[ResultRecord]) -> list[str]:
    """In words, the settings that decide how cells are judged and that not all records share."""
    texts = []
    settings = {record.name: comparable_settings(record) for record in records}
    keys = dict.fromkeys(key for of_record in settings.values() for key in of_record)
    for key in keys:
        values = {name: str(of_record[key]) for name, of_record in settings.items() if key in of_record}
        if len(set(values.values())) > 1:
            texts.append(f"{key}: " + "; ".join(f"{name} {value}" for name, value in values.items()))
    return texts


def _member_name(record: ResultRecord, row: Row) -> str:
    return record.name if row.source == MODEL else f"{record.name}, {row.source}"


def _scalars(row: Row) -> dict[str, Any]:
    return {name: value for name, value in row.metrics.items() if number(value) is not None}


# --- pieces ---------------------------------------------------------------------------------------------------------


def _about(record: ResultRecord) -> str:
    """Protocol, encoder, cells and date."""
    report, counts = record.report, mapping(record.report.get("counts"))
    words = [f"protocol {record.protocol}", f"features of {record.encoder}"]
    data = next(
        (
            str(value)
            for key in ("data", "test", "features", "bags")
            if (value := mapping(report.get("settings")).get(key))
        ),
        None,
    )
    words += [f"data {data}"] if data else []
    tested = number(counts.get("tested"))
    words += [] if tested is None else [f"{tested:,.0f} judged"]
    kept_apart = report.get("patients_kept_apart")
    if isinstance(kept_apart, bool):
        words.append("patients are kept apart" if kept_apart else "patients are NOT kept apart")
    words += [f"made {report['date']}"] if "date" in report else []
    return escape("; ".join(words) + ".")


def _row_name(row: Row) -> str:
    return f"{row.method}, {row.source}"


def _scaled(row: Row, metric: str) -> tuple[float | None, float | None, float | None]:
    """A metric and its interval in percent."""
    value, ends = number(row.metrics.get(metric)), row.interval(metric)
    low, high = (None, None) if ends is None else (100 * ends[0], 100 * ends[1])
    return None if value is None else 100 * value, low, high


def _row_details(record: ResultRecord, row: Row, is_open: bool) -> str:
    name = f"{record.name}: {_row_name(row)}"
    owner = record
    if row.predictions is not None:
        owner = record.parts.get(row.predictions.parent.name, record)
    counts = mapping(owner.report.get("counts"))
    n_train = mapping(counts.get("train_per_class") or counts.get("learned_per_class"))
    inner = class_table(row.metrics, f"Classes, {name}", n_train) + confusion_figure(
        row.metrics.get("confusion"), list(row.classes), f"Confusion, {name}"
    )
    return f"<details{' open' if is_open else ''}><summary>{escape(_row_name(row))}</summary>{inner}</details>"


def _folds_table(record: ResultRecord) -> list[str]:
    """Mean and spread over folds, of rows that have them."""
    rows = []
    for row in record.rows:
        means, spreads = mapping(row.metrics.get("mean_over_folds")), mapping(row.metrics.get("sd_over_folds"))
        if not means:
            continue
        cells = []
        for metric in TABLE_METRICS:
            mean, spread = shown(means.get(metric)), shown(spreads.get(metric))
            cells.append(mean if spread == NONE else Markup(f"{mean} ± {spread}"))
        folds = row.metrics.get("folds")
        rows.append([_row_name(row), str(len(folds)) if isinstance(folds, list) else NONE, *cells])
    if not rows:
        return []
    headers = ["method, features", "folds", *(f"{title}, %" for title in TABLE_METRICS.values())]
    caption = f"{record.name}: mean ± standard deviation over folds"
    return [table(headers, rows, caption, folded_under="Mean and spread over folds")]


def _few_shot_tables(record: ResultRecord) -> list[str]:
    rows = []
    for owner in (record, *record.parts.values()):
        for source, of_source in mapping(owner.report.get("few_shot")).items():
            for method, by_number in mapping(of_source).items():
                for n_cells, found in mapping(by_number).items():
                    accuracy = mapping(mapping(found).get(COMPARED))
                    spread = shown(accuracy.get("sd"))
                    mean = shown(accuracy.get("mean"))
                    value = mean if spread == NONE else Markup(f"{mean} ± {spread}")
                    prefix = "" if owner is record else f"{owner.path.parent.name}: "
                    rows.append([f"{prefix}{method}, {source}", str(n_cells), value, _count(mapping(found), "n_draws")])
    if not rows:
        return []
    headers = ["method, features", "cells a class", f"{TABLE_METRICS[COMPARED]}, %", "draws"]
    return [table(headers, rows, f"{record.name}: learned from a few cells a class (mean ± standard deviation)")]


def _batch_effect(name: str, results: Mapping[str, Any]) -> str:
    effect = mapping(results.get("batch_effect"))
    if not effect:
        return f"<p>Batch effect: {escape(results.get('batch_effect_reason') or 'not measured')}.</p>"
    rows = []
    means = mapping(effect.get("mean_over_classes"))
    methods = list(means) or ["linear"]
    mean_chance = mapping(means.get(methods[0])).get("chance")
    rows.append(
        [
            "mean over classes",
            *(shown(mapping(means.get(method)).get(COMPARED)) for method in methods),
            shown(mean_chance),
        ]
    )
    entries = {"all cells": effect.get("overall"), **mapping(effect.get("per_class"))}
    for cells, entry in entries.items():
        of_cells = mapping(entry)
        found = []
        for method in methods:
            row = mapping(of_cells.get(method))
            ends, text = row.get("interval"), shown(row.get(COMPARED))
            if isinstance(ends, list) and len(ends) == 2 and text != NONE:
                text = Markup(f"{text} ({shown(ends[0])} to {shown(ends[1])})")
            found.append(text)
        rows.append([cells, *found, shown(of_cells.get("chance"))])
    headers = ["cells", *(f"{method}, %" for method in methods), "chance, %"]
    caption = f"{name}: how well features tell the data sets apart (balanced accuracy; look within classes)"
    return table(headers, rows, caption)


def _count(entry: Mapping[str, Any], key: str) -> str:
    value = number(entry.get(key))
    return MISSING if value is None else valued(entry[key], f"{value:,.0f}")


def _embedded(record: ResultRecord) -> dict[str, Any]:
    """What stands in the page for programs: name, file and the content of results.json."""
    return {"name": record.name, "file": str(record.path), "report": record.report}
