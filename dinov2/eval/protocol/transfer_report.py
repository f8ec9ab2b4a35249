"""Files and tables of cross.py's protocol `transfer`, published numbers beside ours, and encoders compared.

Letters: E encoders, T targets
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dinov2.data.datasets.tables import open_table
from dinov2.eval.metrics.summaries import SCORES, TABLE_METRICS, draw_matrix, percent, text_table
from dinov2.eval.protocol.transfer import METRICS
from dinov2.eval.results import (
    RESULTS_NAME,
    interval_ends,
    mapping,
    mappings,
    number,
    read_report,
    write_csv,
    write_report,
)

PUBLISHED_FILE = Path(__file__).with_name("published.csv")


def published_rows(attributes: Mapping[str, str], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the published numbers of the features' encoder between sets of these names; they are others' numbers.

    The encoder is the features' `model`, or the name of the `checkpoint` file without its suffix, in any case.
    """
    checkpoint = attributes.get("checkpoint", "").replace("\\", "/")
    own = {attributes.get("model", "").lower(), Path(checkpoint).stem.lower()} - {""}
    rows = [row for _, row in open_table(PUBLISHED_FILE, "published numbers").records()]
    return [
        {**{key: text for key, text in row.items() if key != "known_as"}, "value": float(row["value"])}
        for row in rows
        if own & {row["encoder"].lower(), *row["known_as"].split()} and {row["source"], row["target"]} <= set(names)
    ]


# --- tables ---------------------------------------------------------------------------------------------------------


def format_report(results: Mapping[str, Any], n_splits: int) -> str:
    """Return tables of the matrix, of the corrections' means over pairs of different sets, and of published numbers."""
    matrix = results["matrix"]
    lines = [
        f"logistic regression (lambda = 1), mean of {n_splits} splits: macro F1 in percent (95 % interval), trained on "
        "rows, tested on columns",
        "",
    ]
    rows = [["", *matrix]]
    for source, row in matrix.items():
        fields = [percent(entry["macro_f1"], entry["intervals"].get("macro_f1")) for entry in row.values()]
        rows.append([source, *fields])
    lines += [*text_table(rows), ""]
    reasons = [f"{s} -> {t}: {e['reason']}" for s, row in matrix.items() for t, e in row.items() if e["reason"]]
    lines += [*reasons, ""] if reasons else []
    others = [e for s, row in matrix.items() for t, e in row.items() if s != t and not e["reason"]]
    if others:
        lines += [*_means_table(others), ""]
    if results["stress_test"]:
        lines += [*_stress_table(results["stress_test"]), ""]
    if results["published"]:
        lines += _published_table(results["published"], matrix)
    return "\n".join(lines).rstrip("\n")


def _means_table(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    titles = {name: TABLE_METRICS[name] for name in ("macro_f1", "accuracy", "balanced_accuracy")}
    rows = [["", *titles.values(), SCORES["calibration_error"], SCORES["log_loss"]]]
    for name in ("uncorrected", *dict.fromkeys(name for entry in entries for name in entry["corrections"])):
        known = [e if name == "uncorrected" else e["corrections"].get(name) for e in entries]
        table = pd.DataFrame([row for row in known if row is not None])

        def mean(metric: str, table: pd.DataFrame = table) -> float | None:
            return float(table[metric].mean()) if metric in table else None

        scores = [mean("calibration_error"), mean("log_loss")]
        texts = ["-" if score is None else f"{score:.3f}" for score in scores]
        rows.append([name, *(percent(mean(metric)) for metric in titles), *texts])
    return [
        f"mean over {len(entries)} pairs of different sets; percent, calibration error and log loss as they are",
        "",
        *text_table(rows),
    ]


def _stress_table(stress_test: Mapping[str, Any]) -> list[str]:
    rows = [["", "macro F1 helped", "difference", "calibration helped", "difference"]]
    for name, row in stress_test["corrections"].items():
        texts = []
        for metric in ("macro_f1", "calibration_error"):
            texts += [percent(row[metric]["share_helped"]), f"{row[metric]['mean_difference']:+.3f}"]
        rows.append([name, *texts])
    title = (
        f"other mixtures of classes, {len(stress_test['scenarios'])} scenarios: share of them that a correction helps"
    )
    return [f"{title}, in percent, and mean difference", "", *text_table(rows)]


def _published_table(rows: Sequence[Mapping[str, Any]], matrix: Mapping[str, Any]) -> list[str]:
    lines = [["encoder", "trained on", "tested on", "metric", "published", "here", "source"]]
    for row in rows:
        ours = matrix[row["source"]][row["target"]][row["metric"]]
        named = [row[key] for key in ("encoder", "source", "target", "metric")]
        lines.append([*named, f"{row['value']:.3f}", "-" if ours is None else f"{ours:.3f}", row["paper"]])
    return ["numbers that others published for this encoder and these sets", "", *text_table(lines)]


def write_files(output_dir: Path, report: Mapping[str, Any], title: str) -> None:
    """Write results.json, matrix.csv (a row for each pair and correction) and matrix.png."""
    matrix = report["results"]["matrix"]
    header = ["train", "test", "correction", "n_train", "n_test", "n_classes", "n_left_out"]
    header += [f"{name}{end}" for name in METRICS for end in ("", "_sd", "_low", "_high")]
    lines = []
    for train, test, entry in ((train, test, entry) for train, row in matrix.items() for test, entry in row.items()):
        counts = entry["n_train"], entry["n_test"], len(entry["classes"]), sum(entry["left_out"].values())
        for correction, row in {"": entry, **entry["corrections"]}.items():
            spreads = row.get("sd_over_splits", row.get("sd_over_draws", {}))
            ends = {name: interval_ends(row.get("intervals", {}).get(name)) or (None, None) for name in METRICS}
            values = [v for name in METRICS for v in (row.get(name), spreads.get(name), *ends[name])]
            lines.append([train, test, correction, *counts, *values, entry["reason"]])
    write_csv(output_dir / "matrix.csv", [*header, "reason"], lines)
    scores = [[entry["macro_f1"] for entry in row.values()] for row in matrix.values()]
    draw_matrix(
        output_dir / "matrix.png",
        np.array(scores, dtype=np.float64),
        [[percent(score) for score in row] for row in scores],
        list(matrix),
        list(matrix),
        xlabel="tested",
        ylabel="trained on",
        title=title,
        scale="macro F1",
    )
    write_report(output_dir, report)


# --- encoders beside each other -------------------------------------------------------------------------------------


def rank_correlations(scores: pd.DataFrame) -> pd.DataFrame:
    """Return Spearman's rank correlation [T, T] between targets of scores [E, T], an encoder a row.

    NaN for targets that fewer than three encoders have a number for both of, or where all numbers are equal.
    """
    return scores.corr(method="spearman", min_periods=3)


def compare_encoders(results: Sequence[Path]) -> dict[str, pd.DataFrame]:
    """Return {source: rank correlations [T, T]} of the macro F1 of cross.py's results, one file or folder an encoder.

    Raises:
        ValueError: a file is not of cross.py, or two are of different protocols or methods.
    """
    scores: dict[str, dict[int, dict[str, float | None]]] = {}
    kinds = set()
    for encoder, path in enumerate(results):
        file = path / RESULTS_NAME if path.is_dir() else path
        report = read_report(file)
        if report.get("protocol") != "cross":
            raise ValueError(f"--compare: {str(file)!r} is of {report.get('protocol')}; give results.json of cross.py")
        settings = mapping(report.get("settings"))
        kinds.add(" ".join(str(settings[key]) for key in ("protocol", "method", "k") if key in settings))
        for source, row in mapping(mapping(report.get("results")).get("matrix")).items():
            of_targets = {target: number(entry.get("macro_f1")) for target, entry in mappings(row).items()}
            scores.setdefault(source, {})[encoder] = of_targets
    if len(kinds) > 1:
        raise ValueError(f"--compare: results are of {' and '.join(sorted(kinds))}; give those of one protocol")
    return {
        source: rank_correlations(pd.DataFrame.from_dict(rows, orient="index", dtype=np.float64))
        for source, rows in scores.items()
    }


def write_correlations(output_dir: Path, correlations: Mapping[str, pd.DataFrame]) -> None:
    """Write rank_correlations.csv, a row for each source and pair of targets; empty where undefined."""
    lines = [
        [source, first, second, None if np.isnan(value) else float(value)]
        for source, table in correlations.items()
        for first, row in table.iterrows()
        for second, value in row.items()
    ]
    write_csv(output_dir / "rank_correlations.csv", ["train", "first_test", "second_test", "spearman"], lines)


def format_correlations(correlations: Mapping[str, pd.DataFrame]) -> str:
    """Return a table for each source."""
    lines: list[str] = []
    for source, table in correlations.items():
        rows = [["", *map(str, table.columns)]]
        for target, row in table.iterrows():
            rows.append([str(target), *("-" if np.isnan(value) else f"{value:+.2f}" for value in row)])
        title = f"Spearman's rank correlation of the encoders' macro F1 between tested sets, trained on {source}"
        lines += [title, "", *text_table(rows), ""]
    return "\n".join(lines).rstrip("\n")
