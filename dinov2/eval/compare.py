"""Do two methods differ on the same cells? Paired tests between the predictions that two evaluations left behind."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.eval.extract_features import positive_int
from dinov2.eval.results import PredictionTable, read_predictions
from dinov2.eval.uncertainty import N_RESAMPLES, compare_paired
from dinov2.hub.backbones import file_sha256
from dinov2.logging import setup_logging
from dinov2.utils.command import exit_code
from dinov2.utils.files import atomic_write


def compare_tables(
    a: PredictionTable, b: PredictionTable, n_resamples: int = N_RESAMPLES, seed: int = 0
) -> dict[str, Any]:
    """`compare_paired` on the cells of two tables, matched by key.

    Args:
        a, b: predictions for the same cells, in any order.
        n_resamples, seed: as for `compare_paired`.

    Returns:
        what `compare_paired` gives, and `n` cells and `n_patients` (None where neither table names them).

    Raises:
        ValueError: if the tables are of other cells, or disagree on a cell's label or patient.
    """
    rows = {key: i for i, key in enumerate(b.keys)}
    only_a, only_b = sorted(set(a.keys) - set(rows)), sorted(set(rows) - set(a.keys))
    if only_a or only_b:
        raise ValueError(
            f"predictions: {len(only_a)} cells are in the first table only and {len(only_b)} in the second only, for "
            f"instance {(only_a + only_b)[0]!r}; evaluate both on the same cells"
        )
    b = b.select([rows[key] for key in a.keys])
    for what, of_a, of_b in (("label", a.labels, b.labels), ("patient", a.patients, b.patients)):
        if of_a is not None and of_b is not None and of_a != of_b:
            i = next(i for i, pair in enumerate(zip(of_a, of_b, strict=True)) if pair[0] != pair[1])
            raise ValueError(
                f"predictions: the {what} of {a.keys[i]!r} is {of_a[i]!r} in the first table and {of_b[i]!r} in the "
                f"second; evaluate both on the same set"
            )
    patients = b.patients if a.patients is None else a.patients
    names = sorted({*a.labels, *a.predictions, *b.predictions})
    ids = {name: i for i, name in enumerate(names)}
    labels, of_first, of_second = (
        np.array([ids[name] for name in column]) for column in (a.labels, a.predictions, b.predictions)
    )
    found = compare_paired(labels, of_first, of_second, len(names), patients, n_resamples, seed)
    return {"n": len(labels), "n_patients": None if patients is None else len(set(patients)), **found}


def format_comparison(report: dict[str, Any]) -> str:
    """A comparison as a table."""
    test = report["mcnemar"]
    unit = "cells" if report["n_patients"] is None else f"{report['n_patients']} patients"
    lines = [
        f"{report['n']} cells; the first alone is right on {test['only_a_right']}, the second alone on "
        f"{test['only_b_right']}: McNemar's exact p = {test['p_value']:.3g} (cells taken for independent)",
        "",
        f"{'in percent':18}{'first':>8}{'second':>8}{'difference, 95 % interval over ' + unit:>48}{'p':>9}",
    ]
    for name, row in report["differences"].items():
        values = "".join(f"{'-' if row[side] is None else f'{100 * row[side]:.1f}':>8}" for side in ("a", "b"))
        difference = "-" if row["difference"] is None else f"{100 * row['difference']:+.1f}"
        if row["interval"] is not None:
            difference += " ({:+.1f} to {:+.1f})".format(*(100 * end for end in row["interval"]))
        p_value = "-" if row["p_value"] is None else f"{row['p_value']:.3g}"
        lines.append(f"{name:18}{values}{difference:>48}{p_value:>9}")
    return "\n".join(lines)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Paired tests of two methods on the same cells: McNemar's exact test and a paired bootstrap of "
        "each metric, by patient where the predictions name patients.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    help_text = "a predictions.csv, or the folder with one"
    parser.add_argument("first", type=Path, help=help_text)
    parser.add_argument("second", type=Path, help="likewise; differences are second - first")
    parser.add_argument("--resamples", type=positive_int, default=N_RESAMPLES, help="of the bootstrap")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--output", type=Path, help="a .json file for the result")
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
