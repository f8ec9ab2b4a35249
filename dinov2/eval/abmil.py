"""AML subtyping and its like: a patient's label from the bag of their cells, by multiple-instance learning.

Protocol `dinobloom`. A part of the patients is the test set, the same for all: a set of its own (`--test-features`,
`--test-bags`), or the first of folds + 1 stratified parts. The others make 4 stratified folds, each in turn the
validation set of a training on the rest, and each fold is trained 5 times from other random weights: cross-entropy, SGD
with learning rate 1e-3 (cosine over 150 epochs, one step an epoch) and Nesterov momentum 0.9, a bag a step, at most 20
epochs without a lower validation loss; the weights of the best epoch are the result (`mil_training`). Protocol
`crossval` differs in the split: of 5 stratified parts each is the test set once and the next one the validation set, so
that every patient is tested. Official folds are read with `--fold-files`.

Reported are the metrics of each network on its test patients with mean and spread, and those of each patient's mean
probability over the networks that did not see them, with bootstrap intervals. The networks together are the aggregator
that is written; applied to new patients, it gives the mean of their probabilities and of their attention.

Patients are the unit throughout: no patient's cells are on two sides. Equal inputs give equal results.json, but for the
date, on one machine and device.

Dimension key:  P patients, N cells of one, D feature dim, C classes, T judged patients, A attention columns (C or 1)
"""

import argparse
import csv
import logging
import pickle
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, fields
from pathlib import Path
from typing import Any

import dinov2  # noqa: F401  # before torch loads: it limits how OpenMP threads spin

# isort: split
import numpy as np
import torch
from torch import Tensor

from dinov2.data.datasets.bags import (
    PatientBags,
    check_no_bag_twice,
    check_same_network,
    one_label_each,
    read_patient_labels,
)
from dinov2.data.datasets.fold_files import PARTS, FoldFiles, read_fold_files
from dinov2.data.datasets.labelled_cells import LabelledCells
from dinov2.eval.extract_features import (
    CELLS_HELP,
    add_embedder_arguments,
    device_of,
    embedder_from,
    has_embedder,
    positive_int,
)
from dinov2.eval.features import read_features
from dinov2.eval.metrics.figures import draw_confusion, draw_curves, draw_losses
from dinov2.eval.metrics.tables import class_table, metrics_table
from dinov2.eval.mil_training import (
    Epoch,
    Fold,
    Predictions,
    PredictionSums,
    Run,
    TrainingSettings,
    apply_aggregator,
    cross_validate,
    crossval_folds,
    describe_networks,
    dinobloom_folds,
)
from dinov2.eval.results import (
    PROBABILITY_PREFIX,
    FoldPredictions,
    provenance,
    settings_of,
    summarize,
    write_predictions,
    write_report,
)
from dinov2.hub.backbones import file_sha256
from dinov2.logging import setup_logging
from dinov2.models.abmil import MODELS, build_aggregator
from dinov2.utils.command import exit_code
from dinov2.utils.files import atomic_write

logger = logging.getLogger("dinov2")

PROTOCOLS = ("dinobloom", "crossval")
DEFAULT_FOLDS = {"dinobloom": 4, "crossval": 5}
FILE_FORMAT = "dinov2 aggregator 1"
FILE_KEYS = ("format", "architecture", "class_names", "members", "features", "seen")


# --- a trained aggregator on disk -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TrainedAggregator:
    """One or more networks of one architecture that judge together, and what they were trained on.

    Attributes:
        architecture: of all of them, as `Aggregator.architecture`.
        members: a state dict each.
        class_names: C names, in the order of the logits.
        features: attributes of the features they were trained on: `checkpoint_sha256`, `transform`, ...
        seen: `PatientBags.bag_hashes` of the patients that some member learned from or stopped by.
    """

    architecture: dict[str, Any]
    members: list[dict[str, Tensor]]
    class_names: list[str]
    features: dict[str, str] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)

    def predict(self, bags: Sequence[np.ndarray], device: str | torch.device = "cpu") -> Predictions:
        """The mean over the members.

        Args:
            bags: T arrays, float32 [N, D].
            device: where the networks run.

        Raises:
            ValueError: if the bags have another feature dimension than the networks.
        """
        dim = self.architecture["dim"]
        if bags[0].shape[1] != dim:
            raise ValueError(
                f"aggregator: it was trained on features of {dim} dimensions, these have {bags[0].shape[1]}; extract "
                f"them with the checkpoint it was trained with"
            )
        on_device = [torch.from_numpy(bag).to(device) for bag in bags]
        positions, sums = np.arange(len(bags)), PredictionSums()
        network = build_aggregator(**self.architecture).to(device)
        for weights in self.members:
            network.load_state_dict(weights)
            sums.add(positions, *apply_aggregator(network, on_device))
        return sums.mean()

    def save(self, path: Path) -> None:
        """Write a file that `load` reads."""
        content = {"format": FILE_FORMAT, **{key: getattr(self, key) for key in FILE_KEYS[1:]}}
        with atomic_write(path) as file:
            torch.save(content, file)

    @classmethod
    def load(cls, path: Path) -> "TrainedAggregator":
        """Read what `save` wrote; nothing in the file is executed.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is something else or damaged.
        """
        if not path.is_file():
            raise FileNotFoundError(f"--apply: no file {str(path)!r}; a training writes <output-dir>/aggregator.pth")
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"--apply: {str(path)!r} is no aggregator or is damaged; train it again") from error
        if not isinstance(content, dict) or content.get("format") != FILE_FORMAT or set(content) != set(FILE_KEYS):
            raise ValueError(
                f"--apply: {str(path)!r} is no aggregator, or one of another version; give the aggregator.pth that "
                f"this command wrote"
            )
        return cls(**{key: content[key] for key in FILE_KEYS[1:]})


# --- the command ----------------------------------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Learn patients' labels from bags of their cells' features, judge it on held-out patients, print a "
        "table and write <output-dir>/results.json, predictions, attention and the trained aggregator. Give "
        "--features, or --bags, or --checkpoint (or --encoder) with --data. With --apply a trained aggregator judges "
        "these patients.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_embedder_arguments(parser, checkpoint_required=False)
    parser.set_defaults(device="cpu")  # bags are small, and equal bytes matter more
    parser.add_argument("--data", type=Path, help=f"cells to embed, with their patients: {CELLS_HELP}")
    parser.add_argument("--features", type=Path, help="a features.h5 of cells with their patients")
    parser.add_argument("--test-features", type=Path, help="another one, of the test patients")
    parser.add_argument(
        "--bags",
        type=Path,
        help="<patient>.h5 (with --labels or --fold-files), <class>/<patient>.h5 or <class>/<patient>/*.h5 in this "
        "folder, or a CSV with the columns patient,label,file",
    )
    parser.add_argument("--test-bags", type=Path, help="likewise, the test patients")
    parser.add_argument(
        "--labels", type=Path, help="CSV with the columns patient,label; its labels go before all others"
    )
    parser.add_argument("--output-dir", type=Path, required=True, help="where all files go; made if missing")
    parser.add_argument("--model", choices=tuple(MODELS), default="classwise", help="the aggregator")
    parser.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        default="dinobloom",
        help="dinobloom: one test set, folds of training and validation; crossval: every patient is tested once",
    )
    parser.add_argument("--folds", type=positive_int, help="how many; default 4 for dinobloom, 5 for crossval")
    parser.add_argument(
        "--fold-files", type=Path, help="official folds: <fold>/{train,val,test}.csv, or the folds.csv of another run"
    )
    parser.add_argument("--runs", type=positive_int, default=5, help="trainings of each fold")
    parser.add_argument("--seed", type=int, default=0, help="decides all that is random")
    parser.add_argument("--epochs", type=positive_int, default=TrainingSettings.epochs, help="at most")
    parser.add_argument("--learning-rate", type=float, default=TrainingSettings.learning_rate, help="at the start")
    parser.add_argument(
        "--patience",
        type=positive_int,
        default=TrainingSettings.patience,
        help="epochs without a lower validation loss",
    )
    parser.add_argument("--class-weights", action="store_true", help="rare classes weigh more in the loss")
    parser.add_argument("--top-cells", type=positive_int, default=10, help="cells of a patient in top_cells.csv")
    parser.add_argument("--apply", type=Path, help="an aggregator.pth that judges these patients; nothing is trained")
    args = parser.parse_args(argv)
    if problem := _wrong_combination(args):
        parser.error(problem)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    setup_logging()
    print(format_report(apply(args) if args.apply else judge(args)))


def judge(args: argparse.Namespace) -> dict[str, Any]:
    """Train on folds, judge, and write the results; returns the content of results.json."""
    settings = TrainingSettings(
        args.epochs, args.learning_rate, patience=args.patience, class_weights=args.class_weights
    )
    bags, folds, fold_names = _load_folds(args)
    assert bags.labels is not None, "_load_folds gives labelled bags"
    names, output = bags.class_names, args.output_dir
    logger.info("%d patients, %d folds x %d runs of %s", len(bags), len(folds), args.runs, args.model)
    runs, predictions = cross_validate(
        bags.features, bags.labels, names, folds, args.runs, args.model, settings, args.seed, device_of(args)
    )
    architecture = {"model": args.model, "dim": bags.dim, "n_classes": len(names)}
    learned = np.unique(np.concatenate([part for fold in folds for part in (fold.train, fold.val)]))
    seen = bags.select(learned).bag_hashes()
    aggregator = TrainedAggregator(architecture, [run.weights for run in runs], names, bags.attributes, seen)
    together = as_fold_predictions(predictions, folds, len(bags))
    results = {
        "together": summarize(bags.labels, together, names, seed=args.seed),
        **describe_networks(runs, bags.labels, names),
    }
    report = {
        "protocol": "abmil",
        "results": {args.model: results},
        "class_names": names,
        "counts": {
            **_counts(bags),
            "learned_per_class": _per_class(bags.labels[learned], names),
            "tested": len(predictions.positions),
            "folds": [{part: len(getattr(fold, part)) for part in PARTS} for fold in folds],
        },
        "training": asdict(settings),
        **_provenance(args, bags),
    }
    of_folds = [{part: [bags.patients[i] for i in getattr(fold, part)] for part in PARTS} for fold in folds]
    FoldFiles(of_folds, fold_names, bags.label_of()).write(output / "folds.csv")
    _write_networks(output, bags, runs, fold_names)
    write_predictions(output / "predictions.csv", bags.patients, bags.labels, together, names, key_column="patient")
    _write_attention(output, bags, predictions, names, args.top_cells)
    draw_confusion(output / "confusion.png", results["together"]["confusion"], names, f"ABMIL, {args.model}")
    assert together.probabilities is not None, "aggregators give probabilities"
    tested = together.tested
    draw_curves(
        output / "curves.png", bags.labels[tested], together.probabilities[tested], names, f"ABMIL, {args.model}"
    )
    histories = {
        f"fold {fold_names[run.fold]}, run {run.run}": [(epoch.train_loss, epoch.val_loss) for epoch in run.history]
        for run in runs
    }
    draw_losses(output / "losses.png", histories, f"ABMIL, {args.model}")
    aggregator.save(output / "aggregator.pth")
    write_report(output, report)
    return report


def apply(args: argparse.Namespace) -> dict[str, Any]:
    """Judge patients by a trained aggregator, and write the results; returns the content of results.json."""
    aggregator = TrainedAggregator.load(args.apply)
    names, output = aggregator.class_names, args.output_dir
    bags = _load_bags(args, args.features, args.bags, names)
    if args.labels:
        bags = bags.with_labels(read_patient_labels(args.labels))
    check_same_network(aggregator.features, bags.attributes, "the aggregator", "these bags")
    n_seen = sum(digest in set(aggregator.seen) for digest in bags.bag_hashes())
    if n_seen:
        logger.warning(
            "the aggregator was trained with %d of these %d patients: numbers with them say nothing about new ones",
            n_seen,
            len(bags),
        )
    predictions = aggregator.predict(bags.features, device_of(args))
    report: dict[str, Any] = {
        "protocol": "abmil, applied",
        "results": {},
        "class_names": names,
        "counts": {**_counts(bags), "seen_in_training": n_seen},
        "aggregator": {**aggregator.architecture, "networks": len(aggregator.members)},
        **_provenance(args, bags),
    }
    if bags.labels is not None and set(bags.class_names) <= set(names):
        labels = np.array([names.index(name) for name in bags.label_of().values()], dtype=np.int64)
        none = np.empty(0, dtype=np.int64)
        together = as_fold_predictions(predictions, [Fold(none, none, np.arange(len(bags)))], len(bags))
        report["results"] = {
            aggregator.architecture["model"]: {"together": summarize(labels, together, names, seed=args.seed)}
        }
        write_predictions(output / "predictions.csv", bags.patients, labels, together, names, key_column="patient")
    else:
        logger.warning("no metrics: the patients have no labels, or others than the aggregator's %s", ", ".join(names))
        rows = zip(bags.patients, predictions.classes, predictions.probabilities, strict=True)
        _write_csv(
            output / "predictions.csv",
            ("patient", "prediction", *_probability_columns(names)),
            ([patient, names[i], *(f"{p:.8g}" for p in of_classes)] for patient, i, of_classes in rows),
        )
    rows_of_networks = [
        [number, patient, names[of_classes.argmax()], *(f"{p:.8g}" for p in of_classes)]
        for patient, of_networks in zip(bags.patients, predictions.of_networks, strict=True)
        for number, of_classes in enumerate(of_networks)
    ]
    header = ("network", "patient", "prediction", *_probability_columns(names))
    _write_csv(output / "predictions_of_networks.csv", header, rows_of_networks)
    _write_attention(output, bags, predictions, names, args.top_cells)
    write_report(output, report)
    return report


def as_fold_predictions(predictions: Predictions, folds: Sequence[Fold], n_patients: int) -> FoldPredictions:
    """What the networks together say, in the form that all protocols report: every tested patient once.

    Folds with one test set between them count as one, whose training side is all other patients of theirs.
    """
    sides: dict[tuple[int, ...], np.ndarray] = {}
    for fold in folds:
        learned = np.union1d(fold.train, fold.val)
        key = tuple(fold.test.tolist())
        sides[key] = np.union1d(sides.get(key, learned), learned)
    classes = np.full(n_patients, -1, dtype=np.int64)
    classes[predictions.positions] = predictions.classes
    probabilities = np.full((n_patients, predictions.probabilities.shape[1]), np.nan)
    probabilities[predictions.positions] = predictions.probabilities
    as_folds = [(train, np.array(test, dtype=np.int64)) for test, train in sides.items()]
    return FoldPredictions(as_folds, classes, probabilities, [{} for _ in as_folds])


def _load_folds(args: argparse.Namespace) -> tuple[PatientBags, list[Fold], list[str]]:
    """Labelled bags, folds of them, and the folds' names."""
    official = read_fold_files(args.fold_files) if args.fold_files else None
    bags, test = _load_bags(args, args.features, args.bags), None
    if args.test_features or args.test_bags:
        bags, test = bags.joined(_load_bags(args, args.test_features, args.test_bags))
    if args.labels:
        bags = bags.with_labels(read_patient_labels(args.labels))
    if official is not None:
        chosen = bags.positions(official.labels, f"--fold-files {args.fold_files}")
        if len(chosen) < len(bags):
            logger.warning("%d of %d bags are in no fold and left out", len(bags) - len(chosen), len(bags))
        bags = bags.select(chosen)
        if bags.labels is None:
            bags = bags.with_labels(official.labels)
        elif set(official.labels.values()) <= set(bags.class_names):  # other names, such as numbers, cannot be compared
            one_label_each([*bags.label_of().items(), *official.labels.items()], "bags and --fold-files")
    check_no_bag_twice(bags)
    if bags.labels is None:
        raise ValueError("--bags: the bags have no labels; give a CSV with the columns patient,label as --labels")
    if official is not None:
        folds = [Fold(*(bags.positions(fold[part], "fold files") for part in PARTS)) for fold in official.folds]
        return bags, folds, official.names
    n_folds = args.folds or DEFAULT_FOLDS[args.protocol]
    if args.protocol == "crossval":
        folds = crossval_folds(bags.labels, bags.patients, n_folds, args.seed)
    else:
        folds = dinobloom_folds(bags.labels, bags.patients, n_folds, args.seed, test)
    return bags, folds, [str(number) for number in range(len(folds))]


def _load_bags(
    args: argparse.Namespace,
    features_file: Path | None,
    folder: Path | None,
    known_classes: Sequence[str] | None = None,
) -> PatientBags:
    """Bags from one of the sources; without a features file or a folder, --data is embedded.

    The labels of cells are those of their patients, unless there is --labels, or they are not among `known_classes`:
    then they may be the cells' own classes, and the bags come without labels.
    """
    if folder is not None:
        return PatientBags.from_path(folder)
    if features_file is not None:
        features = read_features(features_file)
    else:
        cells = LabelledCells.from_path(args.data)
        features = embedder_from(args).features_of(cells, args.output_dir / "features.h5", args.overwrite)
    is_of_patients = not args.labels and (known_classes is None or set(features.class_names) <= set(known_classes))
    labels = [features.class_names[i] for i in features.labels] if is_of_patients else None
    attributes = {**features.attributes, "kind": features.kind}
    return PatientBags.from_cells(features.features, features.patients, features.paths, labels, attributes)


def _wrong_combination(args: argparse.Namespace) -> str:
    """What is wrong with the flags that were given together, or ""."""
    sources = ("data", "features", "test_features", "bags", "test_bags")
    given = {name for name in sources if getattr(args, name)}
    network = {"encoder" if args.encoder else "checkpoint"} if has_embedder(args) else set()
    given |= network
    allowed = (
        {"data", *(network or {"checkpoint"})},
        {"features"},
        {"features", "test_features"},
        {"bags"},
        {"bags", "test_bags"},
    )
    if given not in allowed:
        flags = ["--" + name.replace("_", "-") for name in sorted(given)]
        return (
            f"got {' '.join(flags) or 'no cells'}; give --features [--test-features], or --bags [--test-bags], "
            f"or --checkpoint (or --encoder) --data"
        )
    has_test_set = bool(given & {"test_features", "test_bags"})
    if args.apply and (has_test_set or args.fold_files):
        return "--apply judges the patients of --features, --bags or --data; it takes no test set and no fold files"
    if args.fold_files and (has_test_set or args.folds):
        return "--fold-files say who is tested, and how many folds there are; drop --folds and the test set"
    if has_test_set and args.protocol == "crossval":
        return "--protocol crossval tests every patient; a test set of its own goes with --protocol dinobloom"
    return ""


def _counts(bags: PatientBags) -> dict[str, Any]:
    sizes = [len(cells) for cells in bags.features]
    counts: dict[str, Any] = {
        "patients": len(bags),
        "cells": sum(sizes),
        "cells_of_a_patient": {"min": min(sizes), "median": float(np.median(sizes)), "max": max(sizes)},
    }
    if bags.labels is not None:
        counts["patients_per_class"] = _per_class(bags.labels, bags.class_names)
    return counts


def _per_class(labels: np.ndarray, class_names: Sequence[str]) -> dict[str, int]:
    return dict(zip(class_names, np.bincount(labels, minlength=len(class_names)).tolist(), strict=True))


def _provenance(args: argparse.Namespace, bags: PatientBags) -> dict[str, Any]:
    files = {name: getattr(args, name) for name in ("features", "test_features", "labels", "apply")}
    hashes = {name: file_sha256(path) for name, path in files.items() if path is not None}
    return provenance(bags.attributes, settings_of(args), {"bags": bags.sha256(), **hashes})


def _probability_columns(class_names: Sequence[str]) -> list[str]:
    return [f"{PROBABILITY_PREFIX}{name}" for name in class_names]


def _write_csv(file: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with atomic_write(file, "w") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def _write_networks(output: Path, bags: PatientBags, runs: Sequence[Run], fold_names: Sequence[str]) -> None:
    """predictions_of_networks.csv, a row for each network and test patient, and history.csv, one for each epoch."""
    labels, names = bags.label_of(), bags.class_names
    predictions, epochs = [], []
    for run in runs:
        network = (fold_names[run.fold], run.run)
        for i, of_classes in zip(run.test.tolist(), run.probabilities, strict=True):
            patient = bags.patients[i]
            numbers = [f"{p:.8g}" for p in of_classes]
            predictions.append([*network, patient, labels[patient], names[of_classes.argmax()], *numbers])
        epochs += [[*network, number, *astuple(epoch)] for number, epoch in enumerate(run.history)]
    header = ("fold", "run", "patient", "label", "prediction", *_probability_columns(names))
    _write_csv(output / "predictions_of_networks.csv", header, predictions)
    header = ("fold", "run", "epoch", *(column.name for column in fields(Epoch)))
    _write_csv(output / "history.csv", header, epochs)


def _write_attention(
    output: Path, bags: PatientBags, predictions: Predictions, class_names: Sequence[str], n_top: int
) -> None:
    """attention.csv, a row for each cell of the judged patients, and top_cells.csv, the first few of each.

    The column `attention` is that of the predicted class; where each class has its own, `attention_<class>` follow.
    """
    has_columns = len(predictions.attention[0]) > 1
    all_cells, top_cells = [], []
    for i, position in enumerate(predictions.positions.tolist()):
        patient, sources = bags.patients[position], bags.cells[position]
        attention = predictions.attention_of_prediction(i)  # [N]
        shown = np.stack([attention, *(predictions.attention[i] if has_columns else ())], axis=1)  # [N, 1 or 1 + C]
        for cell, values in enumerate(shown):
            all_cells.append([patient, cell, sources[cell], *(f"{value:.6g}" for value in values)])
        for rank, cell in enumerate(np.argsort(-attention, kind="stable")[:n_top].tolist()):
            prediction = class_names[predictions.classes[i]]
            top_cells.append([patient, prediction, rank + 1, cell, sources[cell], f"{attention[cell]:.6g}"])
    columns = [f"attention_{name}" for name in class_names] if has_columns else []
    _write_csv(output / "attention.csv", ("patient", "cell", "source", "attention", *columns), all_cells)
    _write_csv(output / "top_cells.csv", ("patient", "prediction", "rank", "cell", "source", "attention"), top_cells)


def format_report(report: Mapping[str, Any]) -> str:
    """results.json as tables, in percent; where there are no metrics, only how many patients were judged."""
    counts, n_classes = report["counts"], len(report["class_names"])
    if not report["results"]:
        return f"ABMIL: {counts['patients']} patients judged; see predictions.csv"
    ((model, results),) = report["results"].items()
    together = results["together"]
    n_tested = sum(row["support"] for row in together["per_class"].values())
    rows = [(model, "mean probability", together)]
    if "networks" in results:
        n_networks = len(results["networks"])
        rows.append((model, f"mean of {n_networks} networks", results["mean"]))
        if n_networks > 1:
            rows += [
                (model, title, results[key]) for key, title in (("sd", "SD"), ("min", "lowest"), ("max", "highest"))
            ]
    lines = [f"ABMIL, {n_tested} test patients of {counts['patients']}, {n_classes} classes (in percent)", ""]
    lines += [*metrics_table(rows, "of"), ""]
    n_learned = counts.get("learned_per_class", dict.fromkeys(report["class_names"], 0))
    return "\n".join(lines + class_table("mean probability", together, n_learned))


if __name__ == "__main__":
    sys.exit(exit_code(main))
