"""What a method that judges features leaves behind: few-shot rows, results.json, predictions, split, picture, tables.

Letters: N cells, C classes
"""

import argparse
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dinov2.data.splits import Fold, write_split
from dinov2.eval.cell_sets import input_hashes
from dinov2.eval.few_shot import Predict, evaluate_few_shot, size_of_draw
from dinov2.eval.judged_set import JudgedSet
from dinov2.eval.metrics.figures import draw_confusion, draw_curves
from dinov2.eval.metrics.tables import class_table, metrics_table, scores_table
from dinov2.eval.results import (
    FoldPredictions,
    provenance,
    settings_of,
    summarize,
    write_predictions,
    write_report,
)
from dinov2.hub.backbones import file_sha256

logger = logging.getLogger("dinov2")


@dataclass(frozen=True)
class ReportStyle:
    """How a method's results are named.

    Attributes:
        protocol: of the report; its rows are called <protocol>_<value of the setting>.
        setting: what differs between rows, for the tables.
        title: over the tables and the picture.
        has_file_per_row: whether predictions of each row have a file, predictions_<row>.csv; else predictions.csv.
    """

    protocol: str
    setting: str
    title: str
    has_file_per_row: bool = False

    def value(self, row: str) -> str:
        """The setting of a row."""
        return row.removeprefix(f"{self.protocol}_")


@dataclass(frozen=True)
class FewShotMethod:
    """A method to try with a few cells a class.

    Attributes:
        predict: as `evaluate_few_shot` takes it.
        least_cells: how many training cells it needs.
    """

    predict: Predict
    least_cells: int = 1


def few_shot_rows(
    args: argparse.Namespace, judged: JudgedSet, methods: Mapping[str, FewShotMethod]
) -> dict[str, dict[str, Any]]:
    """{source: {row: `evaluate_few_shot`}} of the numbers of --few-shot for which a method has enough cells.

    Args:
        args: with `few_shot`, `repeats` and `seed`.
        judged: the cells; of several kinds of features the first is taken.
        methods: {row: method}.

    Raises:
        ValueError: as `evaluate_few_shot`.
    """
    labels, class_names = judged.cells.labels, judged.cells.class_names
    numbers: dict[str, list[int]] = {row: [] for row in methods}
    for number in sorted(set(args.few_shot)):
        n_drawn = min(size_of_draw(labels[train], number) for train, _ in judged.folds)
        for row, method in methods.items():
            if n_drawn >= method.least_cells:
                numbers[row].append(number)
            else:
                logger.info("few-shot, %d a class: %s left out, %d cells are too few", number, row, n_drawn)
    return {
        name: {
            row: evaluate_few_shot(
                features, labels, class_names, judged.folds, method.predict, numbers[row], args.repeats, args.seed
            )
            for row, method in methods.items()
            if numbers[row]
        }
        for name, features in judged.main_features.items()
        if args.few_shot
    }


def write_results(
    args: argparse.Namespace,
    judged: JudgedSet,
    predicted: Mapping[str, Mapping[str, FoldPredictions]],
    few_shot: Mapping[str, Any],
    style: ReportStyle,
) -> dict[str, Any]:
    """Write everything to `args.output_dir`, results.json last.

    Args:
        args: flags of the command.
        judged: the cells.
        predicted: {source: {row: what was predicted}}.
        few_shot: `few_shot_rows`.
        style: names.

    Returns:
        the content of results.json.
    """
    cells, seed = judged.cells, args.seed
    results = {
        name: {
            row: summarize(cells.labels, found, cells.class_names, cells.patients, seed) for row, found in rows.items()
        }
        for name, rows in predicted.items()
    }
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_split(args.output_dir / "split.csv", cells.paths, judged.split)
    files = {}
    for name, rows in predicted.items():
        for row, found in rows.items():
            words = ["predictions", *([] if name == "model" else [name]), *([row] if style.has_file_per_row else [])]
            file = args.output_dir / f"{'_'.join(words)}.csv"
            write_predictions(file, cells.paths, cells.labels, found, cells.class_names, cells.patients)
            files[file.name] = file_sha256(file)
    row = list(results["model"])[-1]
    title = f"{style.title}, {style.setting} = {style.value(row)}" if style.has_file_per_row else style.title
    draw_confusion(args.output_dir / "confusion.png", results["model"][row]["confusion"], cells.class_names, title)
    shown = predicted["model"][row]
    if shown.probabilities is not None:
        tested = shown.tested
        file = args.output_dir / "curves.png"
        draw_curves(file, cells.labels[tested], shown.probabilities[tested], cells.class_names, title)
    report = {
        "protocol": style.protocol,
        "results": results,
        "few_shot": few_shot,
        "class_names": cells.class_names,
        "counts": {
            "cells": len(cells),
            "tested": len(predicted["model"][row].tested),
            "train_per_class": _mean_per_class(cells.labels, cells.class_names, judged.folds),
            "unreadable": len(cells.unreadable),
            **judged.copies,
        },
        "split": judged.description,
        "patients_kept_apart": judged.patients_kept_apart,
        "kinds": list(judged.sources["model"]),
        "files": files,
        **provenance(cells.attributes, settings_of(args), input_hashes(args)),
    }
    write_report(args.output_dir, report)
    return report


def format_report(report: Mapping[str, Any], style: ReportStyle) -> str:
    """results.json as tables: all rows, the classes of the model's last row, and the few-shot rows if there are any."""
    counts = report["counts"]
    rows = [(name, row, metrics) for name, of_source in report["results"].items() for row, metrics in of_source.items()]
    is_single = len(report["results"]["model"]) == 1

    def label(name: str, row: str) -> str:
        return name if is_single else f"{name}, {style.setting} = {style.value(row)}"

    last, of_last = list(report["results"]["model"].items())[-1]
    unit = "cells" if report["patients_kept_apart"] is None else "patients"
    lines = [
        f"{style.title}, {counts['tested']} of {counts['cells']} cells tested, {len(of_last['folds'])} fold(s), "
        f"{len(report['class_names'])} classes (in percent; 95 % intervals over {unit})",
        "",
        *metrics_table([(name, style.value(row), metrics) for name, row, metrics in rows], style.setting),
        "",
        *scores_table([(label(name, row), metrics) for name, row, metrics in rows]),
        "",
        *class_table(label("model", last), of_last, counts["train_per_class"]),
    ]
    for name, of_source in report["few_shot"].items():
        for row, by_number in of_source.items():
            for number, found in by_number.items():
                accuracy, n_draws = found["balanced_accuracy"], found["n_draws"]
                spread = "" if accuracy["sd"] is None else f" +- {100 * accuracy['sd']:.1f}"
                mean = f"{100 * accuracy['mean']:.1f}{spread}"
                lines.append(f"{label(name, row)}, {number} cells a class: balanced accuracy {mean} ({n_draws} draws)")
    return "\n".join(lines)


def _mean_per_class(labels: np.ndarray, class_names: Sequence[str], folds: Sequence[Fold]) -> dict[str, int]:
    """Training cells of each class in the mean over folds, rounded down."""
    counts = np.mean([np.bincount(labels[train], minlength=len(class_names)) for train, _ in folds], axis=0)
    return {name: int(count) for name, count in zip(class_names, counts, strict=True)}
