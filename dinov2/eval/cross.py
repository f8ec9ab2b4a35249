"""Compare data sets: train on one and test on another, leave one out, and tell by the features which set a cell is of.

Matrix. Entry A -> B trains on all cells of A and tests on all cells of B; A -> A takes stratified folds of A, by whole
patients where they are known. Classes are matched by name. Test cells of a class that the training side lacks are
counted and left out; predicting a class that the test set lacks is a mistake. Nothing is tuned: kNN is DinoBloom's
(plain vote, Euclidean), the linear probe has lambda = 100 / (D C). An image whose bytes are on both sides is dropped
from the training side. Equal patient ids in two data sets are two patients.

Batch effect. A linear probe and kNN predict the data set itself, from equally many training cells of each; chance is
1 / S. Look at the numbers within each class and at their mean: data sets differ in their mixture of classes.

Both are of the protocol `matrix`, the default. `protocol.transfer` states the protocol `transfer`.

Letters: S data sets, N cells of all of them, M test cells, D feature dim, C classes
"""

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import dinov2  # noqa: F401  # before torch loads: it limits how OpenMP threads spin

# isort: split
import numpy as np
import torch

from dinov2.data.splits import Fold, few_shot_draws
from dinov2.eval.extract_features import device_of
from dinov2.eval.features.data_sets import (
    ALL_OTHERS,
    WHITE_CELLS,
    WHITE_CELLS_FILE,
    Comparison,
    CrossData,
    count_cells,
    join_sets,
    prepare,
    read_classes_map,
    read_sets,
    white_cells_map,
)
from dinov2.eval.knn import knn_predict
from dinov2.eval.linear import fit_linear_probe
from dinov2.eval.metrics import bootstrap_intervals, classification_metrics
from dinov2.eval.metrics.summaries import TABLE_METRICS, draw_matrix, percent, text_table
from dinov2.eval.protocol import transfer, transfer_report
from dinov2.eval.results import (
    FoldPredictions,
    provenance,
    settings_of,
    summarize,
    write_csv,
    write_report,
)
from dinov2.logging import setup_logging
from dinov2.utils.command import exit_code, positive_int, seed_number
from dinov2.utils.files import file_sha256, user_path

logger = logging.getLogger("dinov2")

ProtocolName = Literal["matrix", "transfer"]
MethodName = Literal["knn", "linear"]
# flags that one protocol alone has
OWN_FLAGS = {"matrix": ("method", "k", "folds"), "transfer": ("splits", "correct")}
DEFAULT_STEM = "features"  # extract_features.py gives its file this name in every output folder


@dataclass(frozen=True)
class CrossOptions:
    """How cells are classified; the seed is that of the intervals, and of the training cells of the batch effect."""

    method: MethodName = "knn"
    k: int = 20
    seed: int = 0
    device: str = "cpu"

    def __str__(self) -> str:
        return f"kNN, k = {self.k}" if self.method == "knn" else "linear probe"

    def predict(
        self, train_features: np.ndarray, train_labels: np.ndarray, test_features: np.ndarray, n_classes: int
    ) -> np.ndarray:
        """Fit a linear probe or kNN to features [N, D], and predict the classes of [M, D]: int64 [M].

        `train_labels` are 0 to `n_classes` - 1.
        """
        if self.method == "linear":
            probe = fit_linear_probe(train_features, train_labels, n_classes, device=self.device)
            return probe.predict_proba(test_features).argmax(axis=1)
        on_device = torch.as_tensor(train_features, device=self.device)
        return knn_predict(on_device, train_labels, test_features, self.k, n_classes)


# predictors of the data set, with the training cells of each set that they need as k
BATCH_METHODS = {
    "linear": CrossOptions("linear", 0),
    "knn_1": CrossOptions("knn", 1),
    "knn_20": CrossOptions("knn", 20),
}


# --- train on one, test on another ----------------------------------------------------------------------------------


def evaluate(data: CrossData, options: CrossOptions) -> dict[str, Any]:
    """Make all comparisons.

    Returns:
        `matrix` {train: {test: entry}}, `leave_one_out` {test: entry} (entries as of `evaluate_comparison`),
        `batch_effect` (as the function of this name, or None) and `batch_effect_reason` (why it is None, or None).
    """
    entries: dict[str, dict[str, Any]] = {name: {} for name in (*data.names, ALL_OTHERS)}
    for comparison in data.comparisons:
        entries[comparison.train][comparison.test] = evaluate_comparison(data, comparison, options)
        logger.info("%s -> %s is done", comparison.train, comparison.test)
    others = entries.pop(ALL_OTHERS)
    return {
        "matrix": entries,
        "leave_one_out": others,
        "batch_effect": None if data.batch.reason else batch_effect(data, options),
        "batch_effect_reason": data.batch.reason or None,
    }


def evaluate_comparison(data: CrossData, comparison: Comparison, options: CrossOptions) -> dict[str, Any]:
    """Evaluate one entry of the matrix.

    Returns:
        `n_train` and `n_test` (cells that some fold trains on and tests), `classes` (names of the tested ones),
        `left_out` ({class: cells of the test set that no fold tests}), `dropped_identical_bytes`, the `TABLE_METRICS`
        with `intervals` (95 %, by patient where known), `per_class` (of the tested classes), and `reason`: why there
        are no metrics (fewer than two classes to test, too few cells), or None.
    """
    # without test cells of classes that the training side lacks, and folds that then test nothing
    labels = data.labels
    testable = [(train, test[np.isin(labels[test], labels[train])]) for train, test in comparison.folds]
    folds = [(train, test) for train, test in testable if len(test) and len(np.unique(labels[train])) > 1]
    none = np.empty(0, dtype=np.int64)
    trained, tested = (np.unique(np.concatenate([none, *(fold[side] for fold in folds)])) for side in (0, 1))
    classes = list(data.per_class(tested))
    entry: dict[str, Any] = {
        "n_train": len(trained),
        "n_test": len(tested),
        "classes": classes,
        "left_out": data.per_class(np.setdiff1d(data.positions(comparison.test), tested)),
        "dropped_identical_bytes": comparison.n_copies,
    }
    n_smallest = min((len(train) for train, _ in folds), default=0)
    reason = comparison.reason
    if not reason and len(classes) < 2:
        common = ", ".join(classes) or "none"
        reason = f"{len(classes)} classes to test ({common} on both sides); two or more are needed"
    if not reason and options.method == "knn" and n_smallest < options.k:
        reason = f"{n_smallest} training cells, fewer than the k = {options.k} neighbours asked for"
    if reason:
        return {**entry, **dict.fromkeys(TABLE_METRICS), "intervals": {}, "per_class": {}, "reason": reason}

    known = np.unique(labels[trained])  # lambda and votes count these classes, not those of all data sets
    labels = np.searchsorted(known, labels)
    predictions = np.full(len(labels), -1, dtype=np.int64)
    for train, test in folds:
        predictions[test] = options.predict(data.features[train], labels[train], data.features[test], len(known))
    names = [data.class_names[i] for i in known]
    by_fold = FoldPredictions(folds, predictions, None, [{} for _ in folds])
    summary = summarize(labels, by_fold, names, data.patients, options.seed)
    return {
        **entry,
        **{name: summary[name] for name in TABLE_METRICS},
        "intervals": {name: ends for name, ends in summary["intervals"].items() if name in TABLE_METRICS},
        "per_class": {name: summary["per_class"][name] for name in classes},
        "reason": None,
    }


# --- batch effect ---------------------------------------------------------------------------------------------------


def batch_effect(data: CrossData, options: CrossOptions) -> dict[str, Any]:
    """Measure how well features tell the data sets apart.

    A data set takes part (over all cells, or in a class) if it has at least as many cells there as there are folds, and
    some fold both trains on it and tests it, which needs two patients where patients are known.

    Returns:
        `overall` and `per_class` ({class: ...}): `data_sets` (that take part), `chance`, and for each of
        `BATCH_METHODS` `balanced_accuracy` and `interval` (95 %, by patient where known; both None where there are too
        few cells); a class that fewer than two sets have is not among them. `mean_over_classes`: `balanced_accuracy`,
        `chance` and `n_classes` of each method, means over the classes for which it has a number.
    """
    overall = _tell_sets_apart(data, options, np.ones(len(data.labels), dtype=bool))
    by_class = {name: _tell_sets_apart(data, options, data.labels == i) for i, name in enumerate(data.class_names)}
    per_class = {name: row for name, row in by_class.items() if row is not None}
    means: dict[str, Any] = {}
    for method in BATCH_METHODS:
        values = [(row[method]["balanced_accuracy"], row["chance"]) for row in per_class.values()]
        values = [pair for pair in values if pair[0] is not None]
        accuracy, chance = np.mean(values, axis=0).tolist() if values else (None, None)
        means[method] = {"balanced_accuracy": accuracy, "chance": chance, "n_classes": len(values)}
    return {"overall": overall, "mean_over_classes": means, "per_class": per_class}


def _tell_sets_apart(data: CrossData, options: CrossOptions, is_used: np.ndarray) -> dict[str, Any] | None:
    """Measure the batch effect among the cells `is_used` [N]; None with fewer than two data sets that take part."""
    folds = _select_cells(data.batch.folds, is_used)
    n_cells = np.bincount(data.sets[is_used], minlength=len(data.names))
    tested = {i for train, test in folds for i in np.intersect1d(data.sets[train], data.sets[test]).tolist()}
    members = np.array([i for i in sorted(tested) if n_cells[i] >= len(folds)], dtype=np.int64)
    if len(members) < 2:
        return None
    names = [data.names[i] for i in members]
    ids = np.searchsorted(members, data.sets)  # positions in `members`
    predictions = {name: np.full(len(ids), -1, dtype=np.int64) for name in BATCH_METHODS}
    n_smallest = len(ids)
    for train, test in _select_cells(folds, np.isin(data.sets, members)):
        counts = np.bincount(ids[train], minlength=len(members))
        known = test[counts[ids[test]] > 0]  # other folds test a set that this fold cannot train on
        if not len(known) or (counts > 0).sum() < 2:
            continue
        n_each = int(counts[counts > 0].min())
        n_smallest = min(n_smallest, n_each)
        (drawn,) = few_shot_draws(ids[train], n_each, 1, options.seed)
        cells = train[drawn]
        for name, method in BATCH_METHODS.items():
            if method.k <= n_each:
                predict = replace(method, device=options.device).predict
                predictions[name][known] = predict(data.features[cells], ids[cells], data.features[known], len(names))
    row: dict[str, Any] = {"data_sets": names, "chance": 1 / len(members)}
    for name, method in BATCH_METHODS.items():
        cells = np.flatnonzero(predictions[name] >= 0)
        row[name] = {"balanced_accuracy": None, "interval": None}
        if len(cells) and method.k <= n_smallest:  # kNN needs k training cells of each set in every fold
            labels, predicted = ids[cells], predictions[name][cells]
            patients = [data.patients[i] for i in cells]
            intervals = bootstrap_intervals(labels, predicted, len(names), patients=patients, seed=options.seed)
            accuracy = classification_metrics(labels, predicted, names)["balanced_accuracy"]
            row[name] = {"balanced_accuracy": accuracy, "interval": intervals.get("balanced_accuracy")}
    return row


def _select_cells(folds: Sequence[Fold], is_used: np.ndarray) -> list[Fold]:
    return [(train[is_used[train]], test[is_used[test]]) for train, test in folds]


# --- files and tables -----------------------------------------------------------------------------------------------


def _write_entries(file: Path, rows: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """Write a row for each entry {train: {test: entry}}: names, counts, metrics with ends of intervals, the reason."""
    header = ["train", "test", "n_train", "n_test", "n_classes", "n_left_out", "n_dropped_identical_bytes"]
    header += [f"{name}{end}" for name in TABLE_METRICS for end in ("", "_low", "_high")]
    lines = []
    for train, test, entry in ((train, test, entry) for train, row in rows.items() for test, entry in row.items()):
        counts = entry["n_train"], entry["n_test"], len(entry["classes"]), sum(entry["left_out"].values())
        values = [v for name in TABLE_METRICS for v in (entry[name], *entry["intervals"].get(name, (None, None)))]
        lines.append([train, test, *counts, entry["dropped_identical_bytes"], *values, entry["reason"]])
    write_csv(file, [*header, "reason"], lines)


def _write_effect(file: Path, effect: Mapping[str, Any] | None) -> None:
    """Write a row for each method and each of: the mean over classes, all cells, each class."""
    lines: list[list[Any]] = []
    if effect is not None:
        for method, mean in effect["mean_over_classes"].items():
            lines.append(["mean over classes", "", method, mean["balanced_accuracy"], None, None, mean["chance"]])
        rows = {"all": effect["overall"], **{f"class {name}": row for name, row in effect["per_class"].items()}}
        for cells, row in rows.items():
            for method in BATCH_METHODS if row is not None else ():
                value, interval = row[method]["balanced_accuracy"], row[method]["interval"] or (None, None)
                lines.append([cells, " ".join(row["data_sets"]), method, value, *interval, row["chance"]])
    header = ["cells", "data_sets", "method", "balanced_accuracy", "balanced_accuracy_low", "balanced_accuracy_high"]
    write_csv(file, [*header, "chance"], lines)


def _write_files(output_dir: Path, report: Mapping[str, Any], options: CrossOptions) -> None:
    """Write results.json, matrix.csv, leave_one_out.csv, batch_effect.csv and matrix.png."""
    results = report["results"]
    rows = {**results["matrix"], ALL_OTHERS: results["leave_one_out"]}
    _write_entries(output_dir / "matrix.csv", results["matrix"])
    _write_entries(output_dir / "leave_one_out.csv", {ALL_OTHERS: results["leave_one_out"]})
    _write_effect(output_dir / "batch_effect.csv", results["batch_effect"])
    values = [[entry["balanced_accuracy"] for entry in row.values()] for row in rows.values()]  # [S + 1, S]
    draw_matrix(
        output_dir / "matrix.png",
        np.array(values, dtype=np.float64),
        [[percent(value) for value in row] for row in values],
        list(rows),
        list(results["matrix"]),
        xlabel="tested",
        ylabel="trained on",
        title=f"balanced accuracy in percent, {options}",
        scale="balanced accuracy",
    )
    write_report(output_dir, report)


def format_report(results: Mapping[str, Any], options: CrossOptions, n_folds: int) -> str:
    """Return tables of the matrix with a row for all others and of the batch effect, and reasons for gaps."""
    rows, gaps = [["", *results["matrix"]]], []
    for train, row in {**results["matrix"], ALL_OTHERS: results["leave_one_out"]}.items():
        for test, entry in row.items():
            left_out = entry["left_out"]
            if entry["reason"]:
                gaps.append(f"{train} -> {test}: {entry['reason']}")
            elif left_out:
                text = f"{sum(left_out.values())} cells are not tested, their classes are not trained"
                gaps.append(f"{train} -> {test}: {text}: {', '.join(left_out)}")
        intervals = [entry["intervals"].get("balanced_accuracy") for entry in row.values()]
        accuracies = [entry["balanced_accuracy"] for entry in row.values()]
        rows.append([train, *map(percent, accuracies, intervals)])
    title = f"{options}: balanced accuracy in percent (95 % interval), trained on rows, tested on columns;"
    lines = [title, f"a data set by itself in {n_folds} folds", "", *text_table(rows), ""]
    return "\n".join([*lines, *gaps, *([""] if gaps else []), *_effect_table(results)])


def _effect_table(results: Mapping[str, Any]) -> list[str]:
    effect = results["batch_effect"]
    if effect is None:
        return [f"batch effect: {results['batch_effect_reason']}"]
    means = effect["mean_over_classes"]
    rows = [["", *(method.replace("_", "-") for method in BATCH_METHODS), "chance"]]
    of_means = [*(mean["balanced_accuracy"] for mean in means.values()), means["linear"]["chance"]]
    rows.append([f"within a class, mean of {len(effect['per_class'])}", *map(percent, of_means)])
    for name, row in {"all cells": effect["overall"], **effect["per_class"]}.items():
        if row is not None:
            cells = [percent(row[method]["balanced_accuracy"], row[method]["interval"]) for method in BATCH_METHODS]
            rows.append([name, *cells, percent(row["chance"])])
    title = "which data set is it? balanced accuracy in percent (within a class no difference in class mixture helps)"
    return [title, "", *text_table(rows)]


# --- the command ----------------------------------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train on each data set and test on each, leave each out in turn, and tell by the features which "
        "data set a cell is of; print tables and write results.json, matrix.csv, leave_one_out.csv, batch_effect.csv "
        "and matrix.png to <output-dir>. --protocol transfer trains on 70 % of each set and tests the probe and its "
        "corrections on the others.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    files = "a file of extract_features.py for each data set, all of one network"
    inputs = parser.add_mutually_exclusive_group(required=True)
    inputs.add_argument("--features", type=user_path, nargs="+", help=files)
    compared = "results of this command, one of each encoder: rank correlation of the encoders between tested sets"
    inputs.add_argument("--compare", type=user_path, nargs="+", metavar="RESULTS", help=compared)
    protocols = "transfer: logistic regression on 70 %% of a set, tested on the others, as in other hospitals"
    add("--protocol", choices=get_args(ProtocolName), default="matrix", help=protocols)
    add("--names", nargs="+", help="of the data sets, in the same order; default: the files' names, or their folders'")
    common = (
        "CSV with the columns dataset,label,common that gives labels a common name; an empty one drops its cells; "
        f"{WHITE_CELLS}: the five white cells in the sets of prepare_dataset.py, under its names"
    )
    add("--classes-map", type=user_path, help=common)
    add("--kind", help="of the features; without it the files' first one")
    add("--method", choices=get_args(MethodName), default="knn", help="how cells are classified")
    add("--k", type=positive_int, default=CrossOptions.k, help="neighbours of kNN")
    add("--folds", type=positive_int, default=5, help="within a data set, and of the batch effect")
    add("--splits", type=positive_int, default=5, help="of --protocol transfer")
    corrections = "corrections for other sets, of --protocol transfer, and a stress test of them"
    add("--correct", nargs="+", choices=transfer.CORRECTIONS, default=[], help=corrections)
    add("--seed", type=seed_number, default=0, help="of folds, splits, draws and intervals")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where there is one")
    add("--output-dir", type=user_path, required=True, help="folder of all files; made if missing")
    args = parser.parse_args(argv)
    if args.compare:
        if len(args.compare) < 3:
            parser.error(
                f"--compare: {len(args.compare)} results; a rank correlation needs those of 3 or more encoders"
            )
        return args
    if args.correct and args.protocol != "transfer":
        parser.error("--correct belongs to --protocol transfer; add it, or leave --correct out")
    args.names = args.names or [
        file.absolute().parent.name if file.stem == DEFAULT_STEM else file.stem for file in args.features
    ]
    names, n_files = args.names, len(args.features)
    repeated = [name for name, n in Counter(names).items() if n > 1]
    if n_files < 2:
        parser.error("--features: one file; give those of two or more data sets")
    if args.folds < 2:
        parser.error(f"--folds {args.folds}: choose 2 or more")
    if len(names) != n_files:
        parser.error(f"--names: {len(names)} names for {n_files} files; give one each")
    if repeated:
        parser.error(f"--names: {repeated[0]!r} stands twice; name each data set differently")
    if ALL_OTHERS in names or "" in names:
        parser.error(f"--names: '' and {ALL_OTHERS!r} are not names; choose others")
    return args


def _read_map(classes_map: Path | None, labels_of: Mapping[str, Sequence[str]]) -> dict[tuple[str, str], str]:
    if classes_map is None:
        return {}
    return white_cells_map(labels_of) if str(classes_map) == WHITE_CELLS else read_classes_map(classes_map, labels_of)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    setup_logging()
    if args.compare:
        correlations = transfer_report.compare_encoders(args.compare)
        transfer_report.write_correlations(args.output_dir, correlations)
        print(transfer_report.format_correlations(correlations))
        return
    device = device_of(args)
    files = dict(zip(args.names, args.features, strict=True))
    sets = read_sets(files, args.kind)
    common = _read_map(args.classes_map, {name: features.class_names for name, features in sets.items()})
    is_transfer, first = args.protocol == "transfer", sets[args.names[0]]
    options = CrossOptions(args.method, args.k, args.seed, device)
    if is_transfer:
        settings = transfer.TransferOptions(tuple(dict.fromkeys(args.correct)), args.splits, args.seed, device)
        data, paths = join_sets(args.names, list(sets.values()), common)
        splits, reasons, copies = transfer.source_splits(data, paths, settings)
        results = transfer.evaluate(data, splits, reasons, settings)
        results |= {"published": transfer_report.published_rows(first.attributes, args.names)}
        results |= {"batch_effect": None, "batch_effect_reason": "the protocol transfer does not measure it"}
    else:
        data, copies = prepare(args.names, list(sets.values()), common, args.folds, args.seed)
        results = evaluate(data, options)
    map_file = WHITE_CELLS_FILE if str(args.classes_map) == WHITE_CELLS else args.classes_map
    inputs = {f"features:{name}": file for name, file in files.items()} | {"classes_map": map_file}
    hashes = {name: file_sha256(file) for name, file in inputs.items() if file is not None}
    of_others = {flag for protocol, flags in OWN_FLAGS.items() if protocol != args.protocol for flag in flags}
    flags = {name: value for name, value in settings_of(args).items() if name not in {*of_others, "compare"}}
    report = {
        "protocol": "cross",
        "results": results,
        "kind": first.kind,
        "class_names": data.class_names,
        "counts": {"data_sets": {name: count_cells(data, name, sets[name]) for name in sets}, **copies},
        **provenance(first.attributes, flags | {"features": [str(file) for file in args.features]}, hashes),
    }
    if is_transfer:
        transfer_report.write_files(args.output_dir, report, f"macro F1 in percent, mean of {args.splits} splits")
        print(transfer_report.format_report(results, args.splits))
    else:
        _write_files(args.output_dir, report, options)
        print(format_report(results, options, args.folds))


if __name__ == "__main__":
    sys.exit(exit_code(main))
