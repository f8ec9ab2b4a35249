"""All protocols for one network and one set of labelled cells: features once, one split, one table.

    python dinov2/eval/evaluate.py --checkpoint DinoBloom-S.pth --data cells/ --output-dir results/

Each protocol leaves in `<output-dir>/<protocol>/` what its own command leaves there; `results.json` beside these
folders has the metrics of all. ABMIL judges patients, so it needs cells with patients, and one label for each patient:
that of its cells where they agree, or a CSV (`--patient-labels`). Else it is left out by default, and the log says why.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dinov2.eval import abmil, knn, linear
from dinov2.eval.cell_sets import input_hashes
from dinov2.eval.features import DEFAULT_KIND, Features
from dinov2.eval.judged_set import JudgedSet, add_judging_arguments, complete_arguments, load_judged_set
from dinov2.eval.linear import SGD_KINDS
from dinov2.eval.metrics.tables import metrics_table
from dinov2.eval.results import provenance, settings_of, write_report
from dinov2.logging import setup_logging
from dinov2.utils.command import exit_code

logger = logging.getLogger("dinov2")

ABMIL, LINEAR_SGD = "abmil", "linear-sgd"


@dataclass(frozen=True)
class CellProtocol:
    """A protocol that judges cells: the command it is one of, and its name there."""

    parse_arguments: Callable[[Sequence[str]], argparse.Namespace]
    judge: Callable[[argparse.Namespace, JudgedSet], dict[str, Any]]
    name: str


CELL_PROTOCOLS = {
    "knn": CellProtocol(knn.parse_arguments, knn.judge, "dinobloom"),
    "knn-dino": CellProtocol(knn.parse_arguments, knn.judge, "dino"),
    "linear": CellProtocol(linear.parse_arguments, linear.judge, "dinobloom"),
    "linear-sweep": CellProtocol(linear.parse_arguments, linear.judge, "sweep"),
    LINEAR_SGD: CellProtocol(linear.parse_arguments, linear.judge, "sgd"),
}
DEFAULT_PROTOCOLS = ("knn", "knn-dino", "linear", "linear-sweep")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags; `cell_argv` has those among them that each protocol on cells takes too."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument(
        "--protocols",
        choices=(*CELL_PROTOCOLS, ABMIL),
        nargs="+",
        help=f"(default: {' '.join(DEFAULT_PROTOCOLS)}, and abmil where patients have one label each)",
    )
    own.add_argument("--patient-labels", type=Path, help="CSV with the columns patient,label, for abmil")
    parser = argparse.ArgumentParser(
        description="Judge a network by all protocols on the same cells and the same split.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        parents=[own],
        allow_abbrev=False,
    )
    add_judging_arguments(parser)
    args = parser.parse_args(argv)
    complete_arguments(parser, args, SGD_KINDS if LINEAR_SGD in (args.protocols or ()) else (DEFAULT_KIND,))
    args.cell_argv = own.parse_known_args(argv)[1]
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    setup_logging()
    judged = load_judged_set(args, with_all_kinds=LINEAR_SGD in (args.protocols or ()))
    wanted = list(dict.fromkeys(args.protocols or DEFAULT_PROTOCOLS))
    left_out = {}
    reason = "" if args.patient_labels is not None else why_not_patients(judged.cells)
    if ABMIL in wanted and reason:
        raise ValueError(f"--protocols abmil: {reason}")
    if args.protocols is None and reason:
        left_out[ABMIL] = reason
        logger.info("abmil is left out: %s", reason)
    elif args.protocols is None:
        wanted.append(ABMIL)

    results: dict[str, dict[str, Any]] = {}
    for number, name in enumerate(wanted, start=1):
        logger.info("protocol %d of %d: %s", number, len(wanted), name)
        if name == ABMIL:
            results[name] = {"model": judge_patients(args)}
        else:
            for source, of_source in judge_cells(args, name, judged).items():
                for row, metrics in of_source.items():
                    results.setdefault(row_name(name, row), {})[source] = metrics
    report = {
        "protocol": "all",
        "results": results,
        "left_out": left_out,
        "class_names": judged.cells.class_names,
        "split": judged.description,
        **provenance(judged.cells.attributes, shown_settings(args), input_hashes(args)),
    }
    write_report(args.output_dir, report)
    print(format_report(report))


def judge_cells(args: argparse.Namespace, name: str, judged: JudgedSet) -> dict[str, dict[str, Any]]:
    """{source: {row: metrics}} of a protocol on cells."""
    protocol = CELL_PROTOCOLS[name]
    folder = ["--output-dir", str(args.output_dir / name)]
    own = protocol.parse_arguments([*args.cell_argv, "--protocol", protocol.name, *folder])
    if name != LINEAR_SGD:  # which alone chooses among kinds of features
        judged = replace(judged, sources={source: {DEFAULT_KIND: of} for source, of in judged.main_features.items()})
    return dict(protocol.judge(own, judged)["results"])


def judge_patients(args: argparse.Namespace) -> dict[str, Any]:
    """ABMIL on the features that the cells were judged by; its metrics."""
    if args.features is not None:
        sides = [args.features, args.test_features]
    elif args.data is not None:
        sides = [args.output_dir / "features.h5", None]
    else:
        sides = [args.output_dir / f"features_{side}.h5" for side in ("train", "test")]
    flags = ["--features", sides[0], "--output-dir", args.output_dir / ABMIL, "--seed", args.seed]
    flags += ["--test-features", sides[1]] if sides[1] is not None else ["--protocol", "crossval"]
    flags += ["--labels", args.patient_labels] if args.patient_labels is not None else []
    (of_model,) = abmil.judge(abmil.parse_arguments([str(flag) for flag in flags]))["results"].values()
    return dict(of_model["together"])


def why_not_patients(cells: Features) -> str:
    """Why patients cannot be judged by the labels of their cells, or ""."""
    if cells.patients is None:
        return "the cells have no patients; give them in a CSV with the columns Image Path,Label,patient"
    label_of: dict[str, int] = {}
    for patient, label in zip(cells.patients, cells.labels.tolist(), strict=True):
        if label_of.setdefault(patient, label) != label:
            return f"cells of patient {patient!r} have several labels; give the patients' own with --patient-labels"
    if len(label_of) == len(cells):
        return "every patient has a single cell"
    return ""


def row_name(protocol: str, row: str) -> str:
    """What a row of a protocol is called among those of all."""
    command, value = row.split("_", 1)
    return f"{protocol}_{value}" if command == "knn" else protocol


def shown_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that results depend on."""
    return {name: value for name, value in settings_of(args).items() if name != "cell_argv"}


def format_report(report: dict[str, Any]) -> str:
    """results.json as a table."""
    rows = [
        (source, name, {key: value for key, value in metrics.items() if key != "mean_over_folds"})
        for name, by_source in report["results"].items()
        for source, metrics in by_source.items()
    ]
    lines = ["All protocols (in percent; 95 % intervals)", "", *metrics_table(rows, "protocol")]
    return "\n".join([*lines, *(f"{name} is left out: {reason}" for name, reason in report["left_out"].items())])


if __name__ == "__main__":
    sys.exit(exit_code(main))
