"""Write a report's sections about evaluations: results, comparison, data sets against each other, origins.

A comparison puts side by side only what was evaluated on the same cells, by the same split and in the same way. What
differs stands in a table of its own, and a warning says so.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from dinov2.eval.compare import (
    cells_digest,
    comparable_settings,
    compare_rows,
    different_values,
    predictions_belong,
    split_digest,
)
from dinov2.eval.metrics.summaries import SCORES, TABLE_METRICS
from dinov2.eval.pages.page import NONE, Section, html, interval_chart, line_chart, percent, rounded, section, table
from dinov2.eval.results import MODEL, ResultRecord, Row, interval_ends, mapping, mappings, number, sequence

COMPARED = "balanced_accuracy"  # the metric of interval charts, paired tests and the matrix of data sets
MOST_PAIRED = 50_000  # predictions of one file in a paired test, which resamples them a thousand times
METRIC_TITLES = TABLE_METRICS | SCORES
CLASS_TITLES = {"recall": "recall, %", "precision": "precision, %", "f1": "F1, %", "auroc": "AUROC, %"}

TRANSFER_METRICS = ("macro_f1", "accuracy", "balanced_accuracy", "calibration_error", "log_loss")
UNCORRECTED = "uncorrected"
DRAWN_TEMPERATURE = "target-temperature-32"  # the one of several that is drawn

Corrected = Mapping[tuple[str, str], Mapping[str, Mapping[str, Any]]]  # {(trained on, tested on): {correction: entry}}
Members = list[tuple[ResultRecord, Row]]
Evaluated = tuple[str | None, ...]  # digests of tested cells and split; (None, name of the result) if not known


def metric_columns(row: Row, names: Iterable[str] = METRIC_TITLES) -> dict[str, str]:
    """Return {header: metric with its interval}."""
    columns = {}
    for name in names:
        unit, form, scale = ("", ".3f", 1) if name == "log_loss" else (", %", ".1f", 100)
        columns[METRIC_TITLES[name] + unit] = _with_interval(row.metrics.get(name), row.interval(name), form, scale)
    return columns


def _with_interval(value: Any, ends: Sequence[float] | None, form: str = ".1f", scale: float = 100) -> str:
    """Return a number with its interval behind it, in percent unless `scale` says otherwise."""
    text = rounded(value, form, scale)
    if ends is None or text == NONE:
        return text
    return Markup("{} ({} to {})").format(text, *(rounded(end, form, scale) for end in ends))


def _with_spread(mean: Any, spread: Any) -> str:
    return percent(mean) if number(spread) is None else Markup("{} ± {}").format(percent(mean), percent(spread))


def results_table(records: Sequence[ResultRecord]) -> Markup:
    """Return what each result is of, and its highest balanced accuracy."""
    rows = []
    for record in records:
        settings, kept_apart = mapping(record.report.get("settings")), record.report.get("patients_kept_apart")
        data = [str(settings[key]) for key in ("data", "test", "features", "bags") if settings.get(key)]
        numbers = {row.method: number(row.metrics.get(COMPARED)) for row in record.rows if row.source == MODEL}
        scores = {method: score for method, score in numbers.items() if score is not None}
        method = max(scores, key=lambda name: scores[name], default="")
        rows.append(
            {
                "result": record.name,
                "protocol": record.protocol,
                "features of": record.encoder,
                "data": data[0] if data else NONE,
                "tested": rounded(record.rows[-1].n_tested if record.rows else None),
                "patients kept apart": NONE if kept_apart is None else str(kept_apart),
                f"highest {METRIC_TITLES[COMPARED]}, %": percent(scores.get(method)),
                "by": method,
                "date": str(record.report.get("date", NONE)),
            }
        )
    return table(rows, "Results")


def results_section(records: Sequence[ResultRecord]) -> Section | None:
    """Return all rows of all results with their intervals, few-shot numbers and classes; None without results."""
    parts = []
    for record in (record for record in records if record.protocol != "cross"):
        rows = [{"method": row.method, "features": row.source, **metric_columns(row)} for row in record.rows]
        left_out = [f"{name}: {reason}" for name, reason in mapping(record.report.get("left_out")).items()]
        parts += [
            Markup("<h3>{}</h3>").format(record.name),
            html.listing("Left out:", left_out),
            table(rows, f"{record.name}: all protocols, with 95 % intervals where results.json has them"),
            _intervals(record.name, {f"{row.method}, {row.source}": row for row in record.rows}),
            table(_fold_rows(record), f"{record.name}: mean ± standard deviation over folds", is_folded=True),
            table(_few_shot_rows(record), f"{record.name}: trained on a few cells a class (mean ± standard deviation)"),
        ]
        for row in record.rows:
            owner = record if row.predictions is None else record.parts.get(row.predictions.parent.name, record)
            counts = mapping(owner.report.get("counts"))
            n_train = mapping(counts.get("train_per_class") or counts.get("learned_per_class"))
            name = f"{record.name}: {row.method}, {row.source}"
            classes = class_tables(row, name, n_train)
            parts.append(html.folded(f"Classes, {name}", classes, row is record.rows[-1]))
    return section("results", "Results", parts)


def class_tables(row: Row, name: str, n_train: Mapping[str, Any]) -> Markup:
    """Return the numbers of each class, with those of its training cells, and the confusion matrix."""
    rows = []
    for of_class, metrics in row.classes.items():
        counts = {"training cells": rounded(n_train.get(of_class))} if n_train else {}
        scores = {title: percent(metrics.get(key)) for key, title in CLASS_TITLES.items()}
        rows.append({"class": of_class, **counts, "support": rounded(metrics.get("support")), **scores})
    confusion = []
    for of_class, values in zip(row.classes, sequence(row.metrics.get("confusion")), strict=False):
        numbers = [number(value) or 0 for value in sequence(values)]
        confusion.append([of_class, *((rounded(n), n / max(sum(numbers), 1)) for n in numbers)])
    caption = f"Confusion, {name} (rows: labels; columns: predictions)"
    return table(rows, f"Classes, {name}") + html.table(["label", *row.classes], confusion, caption, is_matrix=True)


def _intervals(title: str, rows: Mapping[str, Row]) -> Markup:
    """Return a chart of the compared metric of named rows, and its intervals."""
    ends = {name: row.interval(COMPARED) or (None, None) for name, row in rows.items()}
    numbers = {name: (number(row.metrics.get(COMPARED)), *ends[name]) for name, row in rows.items()}
    chart = interval_chart(numbers, f"{title}: {METRIC_TITLES[COMPARED]} and 95 % interval")
    return html.cards([chart] if rows else [])


def _fold_rows(record: ResultRecord) -> list[dict[str, str]]:
    rows = []
    for row in record.rows:
        means, spreads = (mapping(row.metrics.get(f"{key}_over_folds")) for key in ("mean", "sd"))
        cells = {f"{title}, %": _with_spread(means.get(key), spreads.get(key)) for key, title in TABLE_METRICS.items()}
        if means:
            n_folds = rounded(len(sequence(row.metrics.get("folds"))))
            rows.append({"method, features": f"{row.method}, {row.source}", "folds": n_folds, **cells})
    return rows


def _few_shot_rows(record: ResultRecord) -> list[dict[str, str]]:
    return [
        {
            "method, features": f"{method}, {source}",
            "cells a class": str(n_cells),
            f"{METRIC_TITLES[COMPARED]}, %": _with_spread(*map(mapping(entry.get(COMPARED)).get, ("mean", "sd"))),
            "draws": rounded(entry.get("n_draws")),
        }
        for owner in (record, *record.parts.values())
        for source, methods in mapping(owner.report.get("few_shot")).items()
        for method, numbers in mapping(methods).items()
        for n_cells, entry in mappings(numbers).items()
    ]


def comparison_section(records: Sequence[ResultRecord]) -> Section | None:
    """Return each method's results side by side; None for fewer than two results."""
    parts = []
    for method in dict.fromkeys(row.method for record in records for row in record.rows):
        groups = _groups(records, method)
        if len({record.name for members in groups.values() for record, _ in members}) < 2:
            continue
        text = "Not all of these compare. They were evaluated on other cells or by another split, so they stand apart:"
        different = []
        for members in groups.values() if len(groups) > 1 else []:
            names, row = ", ".join(dict.fromkeys(record.name for record, _ in members)), members[0][1]
            n_tested = row.n_tested or "an unknown number"
            different.append(f"{names}: {n_tested} tested, {len(row.classes)} classes")
        parts += [Markup("<h3>{}</h3>").format(method), html.listing(text, different, "warning")]
        for place, ((cells, _), members) in enumerate(groups.items(), start=1):
            title = method + (f" ({place} of {len(groups)})" if len(groups) > 1 else "")
            parts += _side_by_side(title, members, is_paired=cells is not None)
    return section("comparison", "Comparison", parts)


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


def _side_by_side(title: str, members: Members, is_paired: bool) -> list[Markup]:
    """Compare a group's results: settings that differ, table, chart and, if `is_paired`, differences to the first."""
    settings = {record.name: comparable_settings(record) for record, row in members if row.source == MODEL}
    rows, named = [], []
    for record, row in members:
        is_model = row.source == MODEL
        name, features = (record.name, record.encoder) if is_model else (f"{record.name}, {row.source}", row.source)
        rows.append({"result": name, "features of": features, "tested": rounded(row.n_tested), **metric_columns(row)})
        named.append((name, row))
    caption = f"{title}: difference to {named[0][0]} on the same cells (paired bootstrap, 95 % interval)"
    return [
        html.listing("Settings differ between these results:", different_values(settings), "warning"),
        table(rows, f"{title}: side by side, with 95 % intervals"),
        _intervals(title, dict(named)),
        table(_paired_rows(named) if is_paired else [], caption),
    ]


def _paired_rows(named: Sequence[tuple[str, Row]]) -> list[dict[str, str]]:
    """Return tests of each row against the first on the same cells."""
    (_, first), *others = named
    rows = []
    for name, row in others if (first.n_tested or 0) <= MOST_PAIRED else []:
        if compared := compare_rows(first, row):
            difference = compared["differences"][COMPARED]
            points = _with_interval(difference["difference"], difference["interval"])
            p_bootstrap, p_mcnemar = (rounded(test["p_value"], ".3g") for test in (difference, compared["mcnemar"]))
            tests = {"p": p_bootstrap, "McNemar's p (cells taken for independent)": p_mcnemar}
            rows.append({"result": name, f"{METRIC_TITLES[COMPARED]}, points": points, **tests})
    return rows


def cross_section(records: Sequence[ResultRecord]) -> Section | None:
    """Return results of training on one data set and testing on another; None without any."""
    parts = []
    for record in (record for record in records if record.protocol == "cross"):
        results = mapping(record.report.get("results"))
        is_transfer = mapping(record.report.get("settings")).get("protocol") == "transfer"
        pairs = {name: mappings(row) for name, row in mapping(results.get("matrix")).items()}
        if others := mappings(results.get("leave_one_out")):
            pairs["all others"] = others
        corrected = {
            (train, test): {UNCORRECTED: entry, **mappings(entry.get("corrections"))}
            for train, row in pairs.items()
            for test, entry in row.items()
        }
        rows = [
            {
                "trained on → tested on": f"{train} → {test}",
                **({"correction": name} if is_transfer else {}),
                "training cells": rounded(entries[UNCORRECTED].get("n_train")),
                "tested cells": rounded(entries[UNCORRECTED].get("n_test")),
                **metric_columns(Row("", "", entry), TRANSFER_METRICS if is_transfer else TABLE_METRICS),
                "why there is no number": entries[UNCORRECTED].get("reason") or "",
            }
            for (train, test), entries in corrected.items()
            for name, entry in entries.items()
        ]
        parts += [
            Markup("<h3>{}</h3>").format(record.name),
            html.cards(_heat_maps(record.name, corrected, "macro_f1" if is_transfer else COMPARED)),
            html.cards([*filter(None, (_calibration_chart(*pair, of_pair) for pair, of_pair in corrected.items()))]),
            table(rows, f"{record.name}: every pair of data sets"),
            _batch_effect(record.name, results),
        ]
    return section("cross", "Data sets against each other", parts)


def _heat_maps(title: str, corrected: Corrected, metric: str) -> list[Markup]:
    """Return the matrix of a metric, coloured by value, without and with each correction that has this metric."""
    trained, columns = (list(dict.fromkeys(names)) for names in zip(*corrected, strict=True)) if corrected else ([], [])
    maps = []
    for name in dict.fromkeys(name for entries in corrected.values() for name in entries):
        shares = {pair: number(entries.get(name, {}).get(metric)) for pair, entries in corrected.items()}
        if name != UNCORRECTED and ("temperature" in name or not any(shares.values())):
            continue  # temperatures change no prediction
        fields = [[train, *((percent(s), s) for s in (shares.get((train, c)) for c in columns))] for train in trained]
        named = title if name == UNCORRECTED else f"{title}, {name}"
        caption = f"{named}: {METRIC_TITLES[metric]} in percent (rows: trained on; columns: tested on)"
        maps.append(html.table(["trained on", *columns], fields, caption, is_matrix=True))
    return maps


def _calibration_chart(train: str, test: str, entries: Mapping[str, Mapping[str, Any]]) -> Markup | None:
    """Draw accuracy over confidence, before and after corrections; None if no entry has these numbers."""
    lines = {"calibrated": pd.Series([0.0, 1.0], [0.0, 1.0])}
    for name, entry in entries.items():
        curve = mapping(entry.get("reliability"))
        values = [[number(value) for value in sequence(curve.get(key))] for key in ("confidence", "accuracy")]
        confidences, accuracies = (np.array(of_key, dtype=np.float64) for of_key in values)
        is_other_draw = name.startswith("target-temperature-") and name != DRAWN_TEMPERATURE
        if 0 < len(confidences) == len(accuracies) and not is_other_draw:
            lines[name] = pd.Series(accuracies, confidences)
    title = f"{train} → {test}: accuracy over confidence (bins with few cells vary by chance)"
    return line_chart(lines, title, "confidence") if len(lines) > 1 else None


def _batch_effect(name: str, results: Mapping[str, Any]) -> Markup:
    """Return how well a classifier tells the data sets apart, over all cells and within classes."""
    effect = mapping(results.get("batch_effect"))
    if not effect:
        return html.listing("Batch effect:", [results.get("batch_effect_reason") or "not measured"])
    means = mapping(effect.get("mean_over_classes"))
    rows = []
    entries = {"mean over classes": means, "all cells": mapping(effect.get("overall"))}
    for cells, entry in {**entries, **mappings(effect.get("per_class"))}.items():
        chance = entry.get("chance", mapping(next(iter(means.values()), None)).get("chance"))
        row = {"cells": cells, "chance, %": percent(chance)}
        for method in means or ["linear"]:
            of_method = mapping(entry.get(method))
            row[f"{method}, %"] = _with_interval(of_method.get(COMPARED), interval_ends(of_method.get("interval")))
        rows.append(row)
    return table(rows, f"{name}: how well features tell the data sets apart (balanced accuracy; look within classes)")


def trust_tables(trust: Mapping[str, Any], form: Callable[..., str]) -> dict[str, list[list[str]]]:
    """Return the numbers of trust.py as tables {caption: rows, the header first}, for the terminal and for a page.

    `form(share, interval)` formats a share in percent; the interval may be left out.
    """
    risk, labels, corruptions = (mapping(trust.get(key)) for key in ("risk_coverage", "label_errors", "corruptions"))
    threshold, tables = mapping(risk.get("threshold")), {}
    ends, of_half = mapping(risk.get("intervals")), mapping(threshold.get("intervals"))
    tables["Errors of the linear probe, the least confident cells rejected"] = [
        ["", "%"],
        ["error of all cells", form(risk.get("error"), ends.get("error"))],
        ["mean error over all coverages (AURC)", form(risk.get("area"), ends.get("area"))],
        ["lowest AURC with as many errors", form(risk.get("lowest_area"))],
        ["wanted error", form(threshold.get("wanted_error"))],
        ["confidence that reaches it on one half of the cells", form(threshold.get("confidence"))],
        ["error above this confidence, on the other half", form(threshold.get("error"), of_half.get("error"))],
        ["coverage, on the other half", form(threshold.get("coverage"), of_half.get("coverage"))],
    ]
    scores = mappings(trust.get("out_of_distribution"))
    classes = {score: mappings(of_score.get("per_class")) for score, of_score in scores.items()}
    rows = [["left out of training", *(f"{score}, {title}" for score in scores for title in ("AUROC", "FPR95"))]]
    for name in (None, *dict.fromkeys(name for of_score in classes.values() for name in of_score)):
        of_row = [scores[score] if name is None else classes[score].get(name, {}) for score in scores]
        title = "mean over classes" if name is None else name
        rows.append([title, *(form(of_score.get(key)) for of_score in of_row for key in ("auroc", "fpr95"))])
    tables["Cells of a class that training did not have, by their features, %"] = rows
    retrieval = mapping(trust.get("retrieval"))
    ends = mapping(retrieval.get("intervals"))
    values = [[key.replace("_", " "), form(retrieval[key], ends.get(key))] for key in retrieval if key != "intervals"]
    tables["Retrieval of the class among the training cells, by cosine"] = [["", "%"], *values]
    of_labels = mappings(labels.get("per_class"))
    rows = [[name, form(row.get("suspected")), form(row.get("threshold"))] for name, row in of_labels.items()]
    tables["Labels that the probe doubts (label_errors.csv)"] = [["label", "doubted, %", "threshold, %"], *rows]
    for metric in ("accuracy", "balanced_accuracy"):
        rows = []
        for name, row in mappings(corruptions.get("per_corruption")).items():
            loss = form(mapping(row.get("mean_relative_loss")).get(metric))
            rows.append([name, *(form(value) for value in sequence(row.get(metric))), loss])
        mean = form(mapping(corruptions.get("mean_relative_loss")).get(metric))
        n = max(map(len, rows), default=2) - 2
        header = ["severity", *map(str, range(1, n + 1)), "mean relative loss"]
        caption = f"{TABLE_METRICS[metric]} on corrupted images, %"
        tables[caption] = [header, *rows, ["mean", *[""] * n, mean]] if rows else []
    return {caption: rows for caption, rows in tables.items() if len(rows) > 1}


def trust_section(records: Sequence[ResultRecord]) -> Section | None:
    """Return how far predictions and labels can be trusted, of each result of trust.py; None without any."""
    parts = []
    for record in records:
        if trust := mapping(record.report.get("trust")):
            tables = trust_tables(trust, lambda value, ends=None: _with_interval(value, interval_ends(ends)))
            parts.append(Markup("<h3>{}</h3>").format(record.name))
            parts += [html.table(rows[0], rows[1:], f"{record.name}: {text}") for text, rows in tables.items()]
    return section("trust", "Trust", parts)


def origins_section(runs: Mapping[str, Sequence[dict[str, Any]]], records: Sequence[ResultRecord]) -> Section | None:
    """Return the versions, seeds, hashes and settings of each run, {name: its starts}, and of each result."""
    kinds = ("checkpoint", "features", "settings", "versions", "hashes", "files")
    origins: list[tuple[str, str, Any]] = []
    origins += [(name, f"start {n}", start) for name, starts in runs.items() for n, start in enumerate(starts, 1)]
    origins += [(record.name, kind, record.report.get(kind)) for record in records for kind in kinds]
    rows = [
        {"run or result": name, "part": part, "name": key, "value": str(value)}
        for name, part, values in origins
        for key, value in mapping(values).items()
    ]
    return section("origins", "Versions, seeds and hashes", [table(rows, "What each was made from and with")])
