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
from dinov2.distributed import is_main_process
from dinov2.eval.metrics.summaries import class_table, draw_confusion, draw_curves, metrics_table, scores_table
from dinov2.eval.protocol import (
    EvaluationSet,
    Predictions,
    Protocol,
    add_evaluation_arguments,
    check_evaluation_arguments,
    few_shot,
    load_evaluation_set,
)
from dinov2.eval.protocol.few_shot import FewShotOptions
from dinov2.eval.results import (
    predictions_file,
    provenance,
    settings_of,
    summarize,
    write_predictions,
    write_report,
)
from dinov2.logging import setup_logging
from dinov2.utils.files import file_sha256

HOW_TO = (
    "Give --checkpoint or --encoder with --train and --test or with --data, or else --features, with or without "
    "--test-features."
)


def parse_arguments(
    description: str,
    protocol_of: Callable[[argparse.Namespace], Protocol],
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None,
    argv: Sequence[str] | None = None,
) -> argparse.Namespace:
    """Parse the flags of a protocol's command and check them for the protocol that `protocol_of` makes of them.

    `add_arguments` adds the protocol's own flags before the common ones.
    """
    parser = argparse.ArgumentParser(
        description=f"{description} {HOW_TO}", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    if add_arguments is not None:
        add_arguments(parser)
    add_evaluation_arguments(parser)
    args = parser.parse_args(argv)
    check_evaluation_arguments(parser, args, protocol_of(args).kinds)
    return args


def run_command(
    description: str,
    protocol_of: Callable[[argparse.Namespace], Protocol],
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None,
    argv: Sequence[str] | None = None,
) -> None:
    """Run the command of a protocol: read the flags, evaluate, write the results and print tables.

    `protocol_of` returns the protocol with the options of the flags; `add_arguments` adds the protocol's own flags.
    """
    setup_logging()
    args = parse_arguments(description, protocol_of, add_arguments, argv)
    protocol = protocol_of(args)
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
    """Evaluate all sources of features, also few-shot; write the files, results.json last, and return its content.

    In a group of processes all call it; only the main one writes, the others return an empty report.
    """
    cells = evaluation.cells
    predicted: dict[str, Predictions] = {}
    results, few_shot_rows = {}, {}
    for source in evaluation.sources:
        data = evaluation.data(source, protocol.takes_all_kinds)
        predicted[source] = protocol.evaluate(data, protocol.options)
        if few_shot_numbers:
            few_shot_options = FewShotOptions(protocol, few_shot_numbers, repeats)
            few_shot_rows[source] = few_shot.evaluate(data, few_shot_options)
        if not is_main_process():
            continue
        results[source] = {
            row: summarize(cells.labels, predictions, cells.class_names, cells.patients, evaluation.seed)
            for row, predictions in predicted[source].items()
        }
    if not is_main_process():
        return {}
    output_dir.mkdir(parents=True, exist_ok=True)
    write_split(output_dir / "split.csv", cells.paths, evaluation.split)
    files = {}
    for source, rows in predicted.items():
        for row, predictions in rows.items():
            file = predictions_file(output_dir, source, row if protocol.has_many_rows else "")
            write_predictions(file, cells.paths, cells.labels, predictions, cells.class_names, cells.patients)
            files[file.name] = file_sha256(file)
    last, predictions = list(predicted["model"].items())[-1]
    title = protocol.title + (f", {protocol.setting} = {protocol.value(last)}" if protocol.has_many_rows else "")
    draw_confusion(output_dir / "confusion.png", results["model"][last]["confusion"], cells.class_names, title)
    tested = predictions.tested
    if predictions.probabilities is not None:
        probabilities = predictions.probabilities[tested]
        draw_curves(output_dir / "curves.png", cells.labels[tested], probabilities, cells.class_names, title)
    report = {
        "protocol": protocol.name,
        "results": results,
        "few_shot": few_shot_rows,
        **describe_evaluation(
            evaluation, len(tested), list(evaluation.data("model", protocol.takes_all_kinds).features)
        ),
        "files": files,
        **provenance(cells.attributes, {**(settings or {}), **asdict(protocol.options)}, evaluation.hashes),
    }
    write_report(output_dir, report)
    return report


def describe_evaluation(evaluation: EvaluationSet, n_tested: int, kinds: Sequence[str]) -> dict[str, Any]:
    """Return the entries of results.json about cells, split and features."""
    cells = evaluation.cells
    in_train = [np.bincount(cells.labels[train], minlength=len(cells.class_names)) for train, _ in evaluation.folds]
    mean_in_train = np.mean(in_train, axis=0).astype(int).tolist()  # [C], rounded down
    return {
        "class_names": cells.class_names,
        "counts": {
            "cells": len(cells),
            "tested": n_tested,
            "train_per_class": dict(zip(cells.class_names, mean_in_train, strict=True)),
            "unreadable": len(cells.unreadable),
            **evaluation.copies,
        },
        "split": evaluation.description,
        "patients_kept_apart": evaluation.patients_kept_apart,
        "kinds": list(kinds),
    }


def format_report(report: Mapping[str, Any], protocol: Protocol) -> str:
    """Format results.json as tables: all rows, the classes of the model's last row, and few-shot rows."""
    counts, results = report["counts"], report["results"]
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
                accuracy = scores["balanced_accuracy"]
                spread = "" if accuracy["sd"] is None else f" +- {100 * accuracy['sd']:.1f}"
                mean = f"balanced accuracy {100 * accuracy['mean']:.1f}{spread} ({scores['n_draws']} draws)"
                lines.append(f"{label(source, row)}, {number} cells a class: {mean}")
    return "\n".join(lines)
