"""Run a protocol: predictions, few-shot rows, metrics with intervals, and the files and tables of a command.

Letters: N cells, C classes
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.data.splits import write_split
from dinov2.eval import few_shot
from dinov2.eval.few_shot import FewShotOptions
from dinov2.eval.metrics.figures import draw_confusion, draw_curves
from dinov2.eval.metrics.tables import class_table, metrics_table, scores_table
from dinov2.eval.protocol import (
    EvaluationSet,
    Predictions,
    Protocol,
    add_evaluation_arguments,
    check_evaluation_arguments,
    load_evaluation_set,
)
from dinov2.eval.results import provenance, settings_of, summarize, write_predictions, write_report
from dinov2.logging import setup_logging
from dinov2.utils.files import file_sha256

HOW_TO = (
    "Give --checkpoint or --encoder with --train and --test or with --data, or else --features, with or without "
    "--test-features."
)


def run_command(
    description: str,
    protocol_of: Callable[[argparse.Namespace], Protocol],
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None,
    argv: Sequence[str] | None = None,
) -> None:
    """Run the command of a protocol: read the flags, evaluate, write the results and print tables.

    Args:
        description: of the command, for --help.
        protocol_of: return the protocol with the options of the flags.
        add_arguments: add the protocol's own flags.
        argv: flags; None for those of the command line.
    """
    parser = argparse.ArgumentParser(
        description=f"{description} {HOW_TO}", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    if add_arguments is not None:
        add_arguments(parser)
    add_evaluation_arguments(parser)
    args = parser.parse_args(argv)
    setup_logging()
    protocol = protocol_of(args)
    check_evaluation_arguments(parser, args, protocol.kinds)
    cells = load_evaluation_set(args, protocol.takes_all_kinds)
    report = run(protocol, cells, args.output_dir, args.few_shot, args.repeats, settings_of(args))
    print(format_report(report, protocol))


def run(
    protocol: Protocol,
    evaluation: EvaluationSet,
    output_dir: Path,
    few_shot_numbers: Sequence[int] = (),
    repeats: int = 10,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Evaluate all sources of features, and write the results to `output_dir`, results.json last.

    Args:
        protocol: with its options.
        evaluation: cells, split and features.
        output_dir: made if missing.
        few_shot_numbers: cells per class to train on in addition.
        repeats: draws for each of them.
        settings: further settings for results.json.

    Returns:
        the content of results.json.
    """
    predicted, few_shot_rows = {}, {}
    for source in evaluation.sources:
        data = evaluation.data(source, protocol.takes_all_kinds)
        predicted[source] = protocol.evaluate(data, protocol.options)
        if few_shot_numbers:
            few_shot_options = FewShotOptions(protocol, few_shot_numbers, repeats)
            few_shot_rows[source] = few_shot.evaluate(data, few_shot_options)
    cells = evaluation.cells
    results = {
        source: {
            row: summarize(cells.labels, predictions, cells.class_names, cells.patients, evaluation.seed)
            for row, predictions in rows.items()
        }
        for source, rows in predicted.items()
    }
    output_dir.mkdir(parents=True, exist_ok=True)
    write_split(output_dir / "split.csv", cells.paths, evaluation.split)
    files = _write_predictions(protocol, evaluation, predicted, output_dir)
    last = list(predicted["model"])[-1]
    _draw_figures(protocol, evaluation, predicted["model"], results["model"][last]["confusion"], output_dir)
    report = {
        "protocol": protocol.name,
        "results": results,
        "few_shot": few_shot_rows,
        "class_names": cells.class_names,
        "counts": {
            "cells": len(cells),
            "tested": len(predicted["model"][last].tested),
            "train_per_class": _mean_per_class(evaluation),
            "unreadable": len(cells.unreadable),
            **evaluation.copies,
        },
        "split": evaluation.description,
        "patients_kept_apart": evaluation.patients_kept_apart,
        "kinds": list(evaluation.data("model", protocol.takes_all_kinds).features),
        "files": files,
        **provenance(cells.attributes, {**(settings or {}), **asdict(protocol.options)}, evaluation.hashes),
    }
    write_report(output_dir, report)
    return report


def _write_predictions(
    protocol: Protocol, evaluation: EvaluationSet, predicted: Mapping[str, Predictions], output_dir: Path
) -> dict[str, str]:
    """Write the predictions of each source, and return {file: sha256}."""
    cells, files = evaluation.cells, {}
    for source, rows in predicted.items():
        for row, predictions in rows.items():
            parts = ["predictions"]
            parts += [] if source == "model" else [source]
            parts += [row] if protocol.has_many_rows else []
            file = output_dir / f"{'_'.join(parts)}.csv"
            write_predictions(file, cells.paths, cells.labels, predictions, cells.class_names, cells.patients)
            files[file.name] = file_sha256(file)
    return files


def _draw_figures(
    protocol: Protocol, evaluation: EvaluationSet, predicted: Predictions, confusion: Any, output_dir: Path
) -> None:
    """Draw the confusion matrix and the curves of the model's last row."""
    labels, class_names = evaluation.cells.labels, evaluation.cells.class_names
    row, predictions = list(predicted.items())[-1]
    title = (
        f"{protocol.title}, {protocol.setting} = {protocol.value(row)}" if protocol.has_many_rows else protocol.title
    )
    draw_confusion(output_dir / "confusion.png", confusion, class_names, title)
    if predictions.probabilities is not None:
        tested = predictions.tested
        probabilities = predictions.probabilities[tested]
        draw_curves(output_dir / "curves.png", labels[tested], probabilities, class_names, title)


def _mean_per_class(evaluation: EvaluationSet) -> dict[str, int]:
    """Return the mean number of training cells of each class over the folds, rounded down."""
    labels, class_names = evaluation.cells.labels, evaluation.cells.class_names
    counts = np.mean([np.bincount(labels[train], minlength=len(class_names)) for train, _ in evaluation.folds], axis=0)
    return {name: int(count) for name, count in zip(class_names, counts, strict=True)}


def format_report(report: Mapping[str, Any], protocol: Protocol) -> str:
    """Format results.json as tables: all rows, the classes of the model's last row, and few-shot rows."""
    counts = report["counts"]
    results = report["results"]
    rows = [(source, row, metrics) for source in results for row, metrics in results[source].items()]
    is_single = len(results["model"]) == 1

    def label(source: str, row: str) -> str:
        return source if is_single else f"{source}, {protocol.setting} = {protocol.value(row)}"

    last, metrics_of_last = list(results["model"].items())[-1]
    unit = "cells" if report["patients_kept_apart"] is None else "patients"
    lines = [
        f"{protocol.title}, {counts['tested']} of {counts['cells']} cells tested, "
        f"{len(metrics_of_last['folds'])} fold(s), "
        f"{len(report['class_names'])} classes (in percent; 95 % intervals over {unit})",
        "",
        *metrics_table([(source, protocol.value(row), metrics) for source, row, metrics in rows], protocol.setting),
        "",
        *scores_table([(label(source, row), metrics) for source, row, metrics in rows]),
        "",
        *class_table(label("model", last), metrics_of_last, counts["train_per_class"]),
    ]
    for source, few_shot_rows in report["few_shot"].items():
        for row, numbers in few_shot_rows.items():
            for number, scores in numbers.items():
                accuracy, n_draws = scores["balanced_accuracy"], scores["n_draws"]
                spread = "" if accuracy["sd"] is None else f" +- {100 * accuracy['sd']:.1f}"
                mean = f"{100 * accuracy['mean']:.1f}{spread}"
                lines.append(
                    f"{label(source, row)}, {number} cells a class: balanced accuracy {mean} ({n_draws} draws)"
                )
    return "\n".join(lines)
