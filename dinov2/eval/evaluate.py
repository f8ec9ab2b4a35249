"""All protocols for one network and one set of labelled cells: features once, one split, one table.

    python dinov2/eval/evaluate.py --checkpoint DinoBloom-S.pth --data cells/ --output-dir results/

Each protocol leaves in `<output-dir>/<protocol>/` what its own command leaves there; `results.json` beside these
folders has the metrics of all. ABMIL classifies patients, so it needs cells with patients, and one label for each
patient: the label that all cells of the patient have, or one from a CSV (`--patient-labels`). Otherwise it is left out
by default, and the log says why.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import pandas as pd

from dinov2.data.datasets.bag_folds import draw_folds
from dinov2.data.datasets.bags import read_patient_labels
from dinov2.eval import abmil, knn, linear
from dinov2.eval.features import Features, read_features
from dinov2.eval.knn import KnnOptions
from dinov2.eval.linear import LinearOptions
from dinov2.eval.metrics.summaries import metrics_table
from dinov2.eval.protocol import (
    EvaluationSet,
    add_evaluation_arguments,
    check_evaluation_arguments,
    load_evaluation_set,
    runner,
)
from dinov2.eval.results import provenance, settings_of, write_report
from dinov2.logging import setup_logging
from dinov2.utils.command import exit_code
from dinov2.utils.files import file_sha256, user_path

logger = logging.getLogger("dinov2")

# A new protocol on cells is one file and one line here
PROTOCOLS = {
    "knn": knn.protocol(KnnOptions("dinobloom")),
    "knn-dino": knn.protocol(KnnOptions("dino")),
    "linear": linear.protocol(LinearOptions("dinobloom")),
    "linear-sweep": linear.protocol(LinearOptions("sweep")),
    "linear-sgd": linear.protocol(LinearOptions("sgd")),
}
DEFAULT_PROTOCOLS = ("knn", "knn-dino", "linear", "linear-sweep")
ABMIL = "abmil"
OWN_FLAGS = ("protocols", "patient_labels")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Evaluate a network by all protocols on the same cells and the same split.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    default = f"(default: {' '.join(DEFAULT_PROTOCOLS)}, and abmil where patients have one label each)"
    parser.add_argument("--protocols", choices=(*PROTOCOLS, ABMIL), nargs="+", help=default)
    parser.add_argument("--patient-labels", type=user_path, help="CSV with the columns patient,label, for abmil")
    add_evaluation_arguments(parser)
    args = parser.parse_args(argv)
    names = list(dict.fromkeys(args.protocols or DEFAULT_PROTOCOLS))
    kinds = [PROTOCOLS[name].kinds for name in names if name != ABMIL] or [PROTOCOLS["knn"].kinds]
    check_evaluation_arguments(parser, args, max(kinds, key=len))
    setup_logging()
    evaluation = load_evaluation_set(args, any(len(of_protocol) > 1 for of_protocol in kinds))
    left_out = {}
    reason = "" if args.patient_labels is not None else why_not_patients(evaluation.cells)
    if ABMIL in names and reason:
        raise ValueError(f"--protocols abmil: {reason}")
    if args.protocols is None and reason:
        left_out[ABMIL] = reason
        logger.info("abmil is left out: %s", reason)
    elif args.protocols is None:
        names.append(ABMIL)

    results: dict[str, dict[str, Any]] = {}
    for number, name in enumerate(names, start=1):
        logger.info("protocol %d of %d: %s", number, len(names), name)
        results |= evaluate_patients(args, evaluation) if name == ABMIL else evaluate_cells(args, name, evaluation)
    hashes = dict(evaluation.hashes)
    if args.patient_labels is not None:
        hashes["patient_labels"] = file_sha256(args.patient_labels)
    report = {
        "protocol": "all",
        "results": results,
        "left_out": left_out,
        "class_names": evaluation.cells.class_names,
        "split": evaluation.description,
        **provenance(evaluation.cells.attributes, settings_of(args), hashes),
    }
    write_report(args.output_dir, report)
    print(format_report(report))


def evaluate_cells(args: argparse.Namespace, name: str, evaluation: EvaluationSet) -> dict[str, dict[str, Any]]:
    """Run a protocol on cells and return {row among those of all protocols: {source: metrics}}."""
    protocol = PROTOCOLS[name]
    settings = {flag: value for flag, value in settings_of(args).items() if flag not in OWN_FLAGS}
    report = runner.run(protocol, evaluation, args.output_dir / name, args.few_shot, args.repeats, settings)
    results: dict[str, dict[str, Any]] = {}
    for source, rows in report["results"].items():
        for row, metrics in rows.items():
            row_name = f"{name}_{protocol.value(row)}" if protocol.has_many_rows else name
            results.setdefault(row_name, {})[source] = metrics
    return results


def evaluate_patients(args: argparse.Namespace, evaluation: EvaluationSet) -> dict[str, dict[str, Any]]:
    """Run ABMIL on the features of the cells, and return its row among those of all protocols."""
    sets = [abmil.bags_of(read_features(file), args.patient_labels is None) for file in evaluation.files]
    bags, test = sets[0].joined(sets[1]) if len(sets) == 2 else (sets[0], None)
    if args.patient_labels is not None:
        bags = bags.with_labels(read_patient_labels(args.patient_labels))
    protocol = "crossval" if test is None else "dinobloom"
    options = replace(abmil.DEFAULTS, seed=args.seed)
    files = {"features": evaluation.files[0], "test_features": None, "labels": args.patient_labels}
    if test is not None:
        files["test_features"] = evaluation.files[1]
    settings: dict[str, Any] = {name: None if file is None else str(file) for name, file in files.items()}
    hashes = {name: file_sha256(file) for name, file in files.items() if file is not None}
    data = draw_folds(bags, protocol, seed=args.seed, test=test)
    settings |= {"protocol": protocol, **asdict(options)}
    report = abmil.run(data, options, args.output_dir / ABMIL, settings, hashes)
    return {ABMIL: {"model": report["results"][options.model]["together"]}}


def why_not_patients(cells: Features) -> str:
    """Return why patients cannot be classified by the labels of their cells, or ""."""
    if cells.patients is None:
        return "the cells have no patients; give them in a CSV with the columns Image Path,Label,patient"
    n_labels = pd.Series(cells.labels).groupby(cells.patients).nunique()  # of each patient
    if (n_labels > 1).any():
        patient = n_labels.idxmax()
        return f"cells of patient {patient!r} have several labels; give the patients' own with --patient-labels"
    if len(n_labels) == len(cells):
        return "every patient has a single cell"
    return ""


def format_report(report: dict[str, Any]) -> str:
    """Format results.json as a table."""
    rows = [
        (source, name, {key: value for key, value in metrics.items() if key != "mean_over_folds"})
        for name, by_source in report["results"].items()
        for source, metrics in by_source.items()
    ]
    lines = ["All protocols (in percent; 95 % intervals)", "", *metrics_table(rows, "protocol")]
    return "\n".join([*lines, *(f"{name} is left out: {reason}" for name, reason in report["left_out"].items())])


if __name__ == "__main__":
    sys.exit(exit_code(main))
