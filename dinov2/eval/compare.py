"""Compare two methods on the same cells: paired tests between the predictions of two evaluations."""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from dinov2.data.datasets.tables import open_table
from dinov2.eval.metrics import N_RESAMPLES, compare_paired
from dinov2.eval.metrics.summaries import percent, text_table
from dinov2.eval.results import PredictionTable, ResultRecord, Row, mapping, read_predictions
from dinov2.logging import setup_logging
from dinov2.utils.command import exit_code, positive_int, seed_number
from dinov2.utils.files import atomic_write, file_sha256, user_path

# Settings that may differ between comparable results: sources of cells, features and networks, and speed
_INPUTS = {
    *("checkpoint", "encoder", "encoder_weights", "data", "train", "test", "features", "test_features", "bags"),
    *("test_bags", "labels", "batch_size", "device", "protocols", "patient_labels", "split", "fold_files", "baseline"),
    *("few_shot", "repeats", "top_cells", "kinds", "apply", "review", "neighbours"),
}


def compare_tables(
    a: PredictionTable, b: PredictionTable, n_resamples: int = N_RESAMPLES, seed: int = 0
) -> dict[str, Any]:
    """Run `compare_paired` on the cells of two tables, matched by key; add `n` cells and `n_patients` (or None).

    Raises:
        ValueError: the tables have no labels, are of other cells, or disagree on a cell's label or patient.
    """
    if a.labels is None or b.labels is None:
        raise ValueError("predictions: a table without labels cannot be compared; evaluate on labelled cells")
    first, second = (
        pd.DataFrame({"label": t.labels, "prediction": t.predictions, "patient": t.patients}, index=t.keys)
        for t in (a, b)
    )
    only_a, only_b = (list(x.index.difference(y.index)) for x, y in ((first, second), (second, first)))
    if only_a or only_b:
        raise ValueError(
            f"predictions: {len(only_a)} cells are in the first table only and {len(only_b)} in the second only, for "
            f"instance {(only_a + only_b)[0]!r}; evaluate both on the same cells"
        )
    second = second.loc[first.index]
    for column in ("label", "patient"):
        known = first[column].notna() & second[column].notna()
        if (differ := known & (first[column] != second[column])).any():
            key = differ.idxmax()
            raise ValueError(
                f"predictions: the {column} of {key!r} is {first.at[key, column]!r} in the first table and "
                f"{second.at[key, column]!r} in the second; evaluate both on the same set"
            )
    patients = a.patients if b.patients is None else second["patient"].tolist()
    columns = [first["label"], first["prediction"], second["prediction"]]
    classes, names = pd.factorize(pd.concat(columns), sort=True)
    labels, of_a, of_b = np.split(classes, 3)
    compared = compare_paired(labels, of_a, of_b, len(names), patients, n_resamples, seed)
    return {"n": len(labels), "n_patients": None if patients is None else len(set(patients)), **compared}


def compare_rows(first: Row, second: Row) -> dict[str, Any] | None:
    """Run `compare_tables` on the predictions of two results; None if they have none, or for other cells."""
    if first.table is None or second.table is None:
        return None
    try:
        return compare_tables(first.table, second.table)
    except ValueError:
        return None


def comparable_settings(record: ResultRecord) -> dict[str, Any]:
    """Return the settings that must be equal for results to be comparable."""
    return {name: value for name, value in mapping(record.report.get("settings")).items() if name not in _INPUTS}


def different_values(values: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return each key of {owner: {key: value}} that does not have the same value everywhere, with its values."""
    lines = []
    for key in dict.fromkeys(key for of_owner in values.values() for key in of_owner):
        of_key = {owner: str(of_owner[key]) for owner, of_owner in values.items() if key in of_owner}
        if len(set(of_key.values())) > 1:
            lines.append(f"{key}: " + "; ".join(f"{owner} {value}" for owner, value in of_key.items()))
    return lines


def predictions_belong(record: ResultRecord, row: Row) -> bool:
    """Return True if a row's predictions exist and are those that its results.json was written with."""
    if row.predictions is None or not row.predictions.is_file():
        return False
    owner = record.parts.get(row.predictions.parent.name, record)
    digest = mapping(owner.report.get("files")).get(row.predictions.name)
    return digest is None or digest == file_sha256(row.predictions)


def cells_digest(row: Row) -> str | None:
    """Return a digest of the tested cells and their labels; None if they are not known."""
    if row.table is None or row.table.labels is None:
        return None
    return _digest(zip(row.table.keys, row.table.labels, strict=True))


def split_digest(row: Row) -> str | None:
    """Return a digest of the split; None if it is not known."""
    if row.predictions is None:
        return None
    for name in ("split.csv", "folds.csv"):
        try:
            return _digest(values for _, values in open_table(row.predictions.with_name(name), "split").rows())
        except (FileNotFoundError, ValueError):
            continue
    return None


def _digest(lines: Iterable[Sequence[str]]) -> str:
    """Return a digest of rows in any order; paths in the first column are relative to the folder they share."""
    rows = [tuple(line) for line in lines]
    if len(rows) > 1 and all(os.path.isabs(key) for key, *_ in rows):
        common = os.path.commonpath([key for key, *_ in rows])
        rows = [(os.path.relpath(key, common), *values) for key, *values in rows]
    return hashlib.sha256(repr(sorted(rows)).encode()).hexdigest()


def format_comparison(report: dict[str, Any]) -> str:
    """Format the comparison of two results as a text table, with McNemar's test in its title."""
    test = report["mcnemar"]
    unit = "cells" if report["n_patients"] is None else f"{report['n_patients']} patients"
    rows = [["in percent", "first", "second", f"difference, 95 % interval over {unit}", "p"]]
    for name, row in report["differences"].items():
        difference = "-" if row["difference"] is None else f"{100 * row['difference']:+.1f}"
        if row["interval"] is not None:
            difference += " ({:+.1f} to {:+.1f})".format(*(100 * end for end in row["interval"]))
        p_value = "-" if row["p_value"] is None else f"{row['p_value']:.3g}"
        rows.append([name, percent(row["a"]), percent(row["b"]), difference, p_value])
    title = (
        f"{report['n']} cells; only the first is right on {test['only_a_right']}, only the second on "
        f"{test['only_b_right']}: McNemar's exact p = {test['p_value']:.3g} (assumes independent cells)"
    )
    return "\n".join([title, "", *text_table(rows)])


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Paired tests of two methods on the same cells: McNemar's exact test and a paired bootstrap of "
        "each metric, by patient where the predictions name patients.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("first", type=user_path, help="a predictions.csv, or the folder with one")
    parser.add_argument("second", type=user_path, help="likewise; differences are second - first")
    parser.add_argument("--resamples", type=positive_int, default=N_RESAMPLES, help="of the bootstrap")
    parser.add_argument("--seed", type=seed_number, default=0, help="of the bootstrap")
    parser.add_argument("--output", type=user_path, help="a .json file for the result")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    setup_logging()
    files = [path / "predictions.csv" if path.is_dir() else path for path in (args.first, args.second)]
    first, second = (read_predictions(file) for file in files)
    report = compare_tables(first, second, args.resamples, args.seed)
    if args.output is not None:
        report |= {
            "files": [{"path": str(file), "sha256": file_sha256(file)} for file in files],
            "settings": {"resamples": args.resamples, "seed": args.seed},
        }
        with atomic_write(args.output, "w") as stream:
            json.dump(report, stream, indent=2, allow_nan=False)
    print(format_comparison(report))


if __name__ == "__main__":
    sys.exit(exit_code(main))
