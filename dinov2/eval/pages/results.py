"""Write a report's sections about evaluations: results, comparison, data sets against each other, origins.

A comparison puts side by side only what was evaluated on the same cells, by the same split and in the same way. What
differs stands in a table of its own, and a warning says so.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from dinov2.eval.compare import cells_digest, comparable_settings, compare_rows, predictions_belong, split_digest
from dinov2.eval.metrics.tables import SCORES, TABLE_METRICS
from dinov2.eval.pages.charts import interval_chart
from dinov2.eval.pages.page import Section, data_value, macros, table
from dinov2.eval.results import MODEL, ResultRecord, Row, mapping, number

COMPARED = "balanced_accuracy"  # the metric of interval charts, paired tests and the matrix of data sets
MOST_PAIRED = 50_000  # predictions of one file in a paired test, which resamples them a thousand times
NONE, MISSING = "–", "missing"
METRIC_TITLES = TABLE_METRICS | SCORES
METRIC_HEADERS = {name: title + ("" if name == "log_loss" else ", %") for name, title in METRIC_TITLES.items()}
CLASS_TITLES = {"recall": "recall, %", "precision": "precision, %", "f1": "F1, %", "auroc": "AUROC, %"}


def percent(value: Any, in_percent: bool = True) -> str:
    """Return a number in percent with one decimal, or as it is with three; `NONE` for none."""
    if number(value) is None:
        return NONE
    return data_value(value, f"{100 * value:.1f}" if in_percent else f"{value:.3f}")


def count(value: Any) -> str:
    """Return a whole number, or `MISSING`."""
    return MISSING if number(value) is None else data_value(value, f"{value:,.0f}")


def metric_columns(metrics: Mapping[str, Any], names: Iterable[str] = METRIC_TITLES) -> dict[str, str]:
    """Return {header: metric with its interval}; `MISSING` for a metric that every result has."""
    columns = {}
    for name in names:
        ends = Row("", "", metrics).interval(name)
        if name not in metrics:
            columns[METRIC_HEADERS[name]] = MISSING if name in TABLE_METRICS else NONE
        else:
            columns[METRIC_HEADERS[name]] = _with_interval(metrics[name], ends, in_percent=name != "log_loss")
    return columns


def class_tables(metrics: Mapping[str, Any], name: str, n_train: Mapping[str, Any] | None = None) -> Markup:
    """Return the numbers of each class and the confusion matrix, its fields as strong as their share of the label.

    Args:
        metrics: with `per_class` and `confusion`.
        name: what the metrics are of.
        n_train: {class: training cells}; a column if it is given.
    """
    per_class = {class_name: mapping(row) for class_name, row in mapping(metrics.get("per_class")).items()}
    rows = []
    for class_name, row in per_class.items():
        trained = {"training cells": count(n_train[class_name]) if class_name in n_train else NONE} if n_train else {}
        shown = {key: title for key, title in CLASS_TITLES.items() if key in row or key != "auroc"}
        scores = {title: percent(row[key]) if key in row else MISSING for key, title in shown.items()}
        rows.append({"class": class_name, **trained, "support": count(row.get("support")), **scores})
    parts = table(rows, f"Classes, {name}")
    confusion = metrics.get("confusion")
    confusion = confusion if isinstance(confusion, list) else []
    if not len(confusion) == len(rows) > 0 or any(
        [number(n) is None for n in row] != [False] * len(rows) for row in confusion
    ):
        return parts + macros().text(f"{name}: numbers of classes are missing, or do not fit each other.", "note")
    shares = [[n / max(sum(row), 1) for n in row] for row in confusion]
    cells = [[count(n) for n in row] for row in confusion]
    caption = f"Confusion, {name} (rows: labels; columns: predictions)"
    return parts + macros().matrix(list(per_class), list(per_class), cells, shares, caption)


def results_section(records: Sequence[ResultRecord]) -> Section | None:
    """Return all rows of all results with their intervals, few-shot numbers and classes; None without results."""
    records = [record for record in records if record.protocol != "cross"]
    if not records:
        return None
    html = macros()
    parts = [html.data("results", {"results": [_content(record) for record in records]})]
    for record in records:
        parts += _introduction(record)
        for name, reason in mapping(record.report.get("left_out")).items():
            parts.append(html.text(f"{name} is left out: {reason}."))
        if not record.rows:
            parts.append(html.text("It has no metrics (patients without labels are only predicted)."))
            continue
        rows = [{"method": row.method, "features": row.source, **metric_columns(row.metrics)} for row in record.rows]
        caption = f"{record.name}: all protocols, with 95 % intervals where results.json has them"
        parts.append(table(rows, caption, numbers_from=2))
        parts.append(_intervals(record.name, [(_row_name(row), row) for row in record.rows]))
        parts += [_folds_table(record), _few_shot_table(record), html.heading(4, "Classes")]
        main = [row for row in record.rows if row.source == MODEL] or record.rows
        for row in record.rows:
            owner = record if row.predictions is None else record.parts.get(row.predictions.parent.name, record)
            counts = mapping(owner.report.get("counts"))
            n_train = mapping(counts.get("train_per_class") or counts.get("learned_per_class"))
            classes = class_tables(row.metrics, f"{record.name}: {_row_name(row)}", n_train)
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
        if len({record.name for members in groups.values() for record, _ in members}) < 2:
            alone.append(method)
            continue
        parts.append(macros().heading(3, method))
        text = "Not all of these compare. They were evaluated on other cells or by another split, so they stand apart:"
        different = [_describe(*group) for group in groups.items()] if len(groups) > 1 else []
        parts.append(macros().listing(text, different, "warning"))
        for place, ((cells, _), members) in enumerate(groups.items(), start=1):
            title = method + (f" ({place} of {len(groups)})" if len(groups) > 1 else "")
            parts += _side_by_side(title, members, is_paired=cells is not None)
    if alone:
        parts.append(macros().text(f"Only one of the results has {', '.join(alone)}.", "muted"))
    return Section("comparison", "Comparison", Markup().join(parts))


def cross_section(records: Sequence[ResultRecord]) -> Section | None:
    """Return results of training on one data set and testing on another; None without any."""
    records = [record for record in records if record.protocol == "cross"]
    if not records:
        return None
    parts = [macros().data("cross", {"results": [_content(record) for record in records]})]
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
            {
                "trained on → tested on": f"{train} → {test}",
                "training cells": count(entry.get("n_train")),
                "tested cells": count(entry.get("n_test")),
                **metric_columns(entry, TABLE_METRICS),
                "why there is no number": entry.get("reason") or "",
            }
            for train, row in pairs.items()
            for test, entry in ((test, mapping(entry)) for test, entry in row.items())
        ]
        parts.append(table(rows, f"{record.name}: every pair of data sets"))
        parts.append(_batch_effect(record.name, results))
    return Section("cross", "Data sets against each other", Markup().join(parts))


def origins_section(records: Sequence[ResultRecord], starts: Mapping[str, Sequence[Mapping[str, Any]]]) -> Section:
    """Return versions, seeds, hashes and settings.

    Args:
        records: of evaluations.
        starts: {run: its starts}, as status.json has them.
    """
    keys = ("seed", "dinov2", "commit", "torch")
    rows: list[dict[str, Any]] = [
        {"run": name, "start or resume": part, **{key: str(start.get(key) or "not stated") for key in keys}}
        for name, of_run in starts.items()
        for part, start in enumerate(of_run, start=1)
    ]
    parts = [table(rows, "Training runs: what each part ran with", numbers_from=6)]
    rows = [
        {
            "result": record.name,
            "date": record.report.get("date", MISSING),
            "seed": mapping(record.report.get("settings")).get("seed", MISSING),
            "versions": ", ".join(f"{name} {version}" for name, version in versions.items()) or MISSING,
            "sha256 of the weights": mapping(record.report.get("checkpoint")).get("checkpoint_sha256") or NONE,
        }
        for record in records
        for versions in [mapping(record.report.get("versions"))]
    ]
    parts.append(table(rows, "Results: date, seed, versions, weights", numbers_from=5))
    for record in records:
        rows = [
            {"part": kind, "name": key, "value": str(value)}
            for kind in ("hashes", "files", "features", "settings")
            for key, value in mapping(record.report.get(kind)).items()
        ]
        caption = f"{record.name}: hashes of inputs and files, features, settings"
        parts.append(table(rows, caption, numbers_from=3, folded=caption))
    nothing = macros().text("No version, seed or hash is recorded.")
    return Section("origins", "Versions, seeds and hashes", Markup().join(parts) or nothing)


Members = list[tuple[ResultRecord, Row]]
Evaluated = tuple[str | None, ...]  # digests of tested cells and split; (None, name of the result) if not known


def _groups(records: Sequence[ResultRecord], method: str) -> dict[Evaluated, Members]:
    """Group a method's rows by what they were evaluated on; a baseline that several results repeat stands once."""
    groups: dict[Evaluated, Members] = {}
    for record in records:
        for row in (row for row in record.rows if row.method == method):
            cells = cells_digest(row) if predictions_belong(record, row) else None
            members = groups.setdefault((None, record.name) if cells is None else (cells, split_digest(row)), [])
            if row.source == MODEL or (row.source, row.metrics) not in [(r.source, r.metrics) for _, r in members]:
                members.append((record, row))
    return groups


def _describe(evaluated: Evaluated, members: Members) -> str:
    row, (cells, split) = members[0][1], evaluated
    names = ", ".join(dict.fromkeys(record.name for record, _ in members))
    n_tested = "an unknown number" if row.n_tested is None else f"{row.n_tested:,}"
    which = "which ones is not known without its predictions and split"
    if cells is not None:
        which = f"cells {cells[:8]}, split {'not known' if split is None else split[:8]}"
    return f"{names}: {n_tested} tested, {len(row.classes)} classes; {which}"


def _side_by_side(title: str, members: Members, is_paired: bool) -> list[Markup]:
    """Return a group's settings that differ, its table, its chart and its paired tests."""
    settings = {record.name: comparable_settings(record) for record, row in members if row.source == MODEL}
    different = []
    for key in dict.fromkeys(key for of_record in settings.values() for key in of_record):
        values = {name: str(of_record[key]) for name, of_record in settings.items() if key in of_record}
        if len(set(values.values())) > 1:
            different.append(f"{key}: " + "; ".join(f"{name} {value}" for name, value in values.items()))
    rows, named = [], []
    for record, row in members:
        is_model = row.source == MODEL
        name = record.name if is_model else f"{record.name}, {row.source}"
        features = record.encoder if is_model else row.source
        rows.append({"result": name, "features of": features, **metric_columns(row.metrics)})
        named.append((name, row))
    n_tested = named[0][1].n_tested
    caption = f"{title}: side by side, with 95 % intervals" + ("" if n_tested is None else f", {n_tested:,} tested")
    return [
        macros().listing("Settings differ between these results:", different, "warning"),
        table(rows, caption, numbers_from=2),
        _intervals(title, named),
        _paired_table(title, named) if is_paired else Markup(),
    ]


def _paired_table(title: str, named: Sequence[tuple[str, Row]]) -> Markup:
    """Return tests of each row against the first on the same cells."""
    (first_name, first), *others = named
    rows = []
    for name, row in others if (first.n_tested or 0) <= MOST_PAIRED else []:
        if compared := compare_rows(first, row):
            difference, p_mcnemar = compared["differences"][COMPARED], compared["mcnemar"]["p_value"]
            p_value, points = difference["p_value"], _with_interval(difference["difference"], difference["interval"])
            p_bootstrap = NONE if p_value is None else data_value(p_value, f"{p_value:.3g}")
            rows.append(
                {
                    "result": name,
                    f"{METRIC_TITLES[COMPARED]}, points": points,
                    "p": p_bootstrap,
                    "McNemar's p (cells taken for independent)": data_value(p_mcnemar, f"{p_mcnemar:.3g}"),
                }
            )
    return table(rows, f"{title}: difference to {first_name} on the same cells (paired bootstrap, 95 % interval)")


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


def _with_interval(value: Any, ends: Sequence[float] | None, in_percent: bool = True) -> str:
    """Return a number with its interval behind it."""
    text = percent(value, in_percent)
    if ends is None or text == NONE:
        return text
    return Markup("{} ({} to {})").format(text, *(percent(end, in_percent) for end in ends))


def _with_spread(mean: Any, spread: Any) -> str:
    """Return a mean and a standard deviation in percent."""
    return percent(mean) if number(spread) is None else Markup("{} ± {}").format(percent(mean), percent(spread))


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
        folds, spreads = row.metrics.get("folds"), mapping(row.metrics.get("sd_over_folds"))
        if means := mapping(row.metrics.get("mean_over_folds")):
            n_folds = str(len(folds)) if isinstance(folds, list) else NONE
            cells = {
                f"{TABLE_METRICS[key]}, %": _with_spread(means.get(key), spreads.get(key)) for key in TABLE_METRICS
            }
            rows.append({"method, features": _row_name(row), "folds": n_folds, **cells})
    return table(rows, f"{record.name}: mean ± standard deviation over folds", folded="Mean and spread over folds")


def _few_shot_table(record: ResultRecord) -> Markup:
    rows = []
    for owner in (record, *record.parts.values()):
        prefix = "" if owner is record else f"{owner.path.parent.name}: "
        for source, methods in mapping(owner.report.get("few_shot")).items():
            for method, numbers in mapping(methods).items():
                for n_cells, entry in mapping(numbers).items():
                    accuracy = mapping(mapping(entry).get(COMPARED))
                    rows.append(
                        {
                            "method, features": f"{prefix}{method}, {source}",
                            "cells a class": str(n_cells),
                            f"{METRIC_TITLES[COMPARED]}, %": _with_spread(accuracy.get("mean"), accuracy.get("sd")),
                            "draws": count(mapping(entry).get("n_draws")),
                        }
                    )
    return table(rows, f"{record.name}: trained on a few cells a class (mean ± standard deviation)")


def _batch_effect(name: str, results: Mapping[str, Any]) -> Markup:
    """Return how well a classifier tells the data sets apart, over all cells and within classes."""
    effect = mapping(results.get("batch_effect"))
    if not effect:
        return macros().text(f"Batch effect: {results.get('batch_effect_reason') or 'not measured'}.")
    means = mapping(effect.get("mean_over_classes"))
    methods = list(means) or ["linear"]
    chance = mapping(means.get(methods[0])).get("chance")
    entries = {"mean over classes": {**means, "chance": chance}, "all cells": effect.get("overall")}
    rows = []
    for cells, entry in {**entries, **mapping(effect.get("per_class"))}.items():
        row = {"cells": cells}
        for method in methods:
            of_method = mapping(mapping(entry).get(method))
            row[f"{method}, %"] = _with_interval(of_method.get(COMPARED), of_method.get("interval"))
        rows.append(row | {"chance, %": percent(mapping(entry).get("chance"))})
    return table(rows, f"{name}: how well features tell the data sets apart (balanced accuracy; look within classes)")


def _content(record: ResultRecord) -> dict[str, Any]:
    return {"name": record.name, "file": str(record.path), "report": record.report}
