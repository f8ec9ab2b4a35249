"""Across data sets: learn on one and judge by another, leave one out, and how well features tell the data sets apart.

Matrix. Entry A -> B learns on all cells of A and is judged by all cells of B; A -> A by stratified folds of A (by whole
patients where they are known), so that no cell judges what it taught. Leave one out learns on all other data sets.
Classes are matched by name, after an optional mapping. Cells to judge whose class the training side lacks cannot be
right: they are counted and left out. Training cells of classes that the judged set lacks stay, as they do where a
classifier is put to use, so that answering such a class is a mistake. An entry with fewer than two classes to judge has
no metrics but a reason. Nothing is tuned: kNN is DinoBloom's (plain vote, Euclidean), the linear probe has lambda =
100 / (D C).

Batch effect. A linear probe and kNN predict the data set itself, over folds stratified by data set and class (by whole
patients), from equally many training cells of each data set; a balanced accuracy of 1 / S is chance. Look at the
numbers within each class and their mean, not at the one over all cells: data sets differ in the mixture of their
classes, and features that know nothing of scanner and stain but all of cells still tell a set of blasts from a set of
lymphocytes. Within a class what is left is how each place stains, photographs and labels, and whom it sampled.

A picture whose bytes stand on both sides of a comparison is dropped from its training side and counted. Patient ids
count within their data set: equal ids in two of them are two patients.

Dimension key:  S data sets, N cells of all of them, D feature dim, C classes
"""

import argparse
import csv
import logging
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import dinov2  # noqa: F401  # before torch loads: it limits how OpenMP threads spin

# isort: split
import numpy as np
import torch

from dinov2.data.datasets.tables import open_table
from dinov2.data.splits import Fold, few_shot_draws, leave_one_dataset_out, make_folds
from dinov2.eval.cell_sets import check_finite, check_same_network, without_copies
from dinov2.eval.extract_features import device_of, positive_int
from dinov2.eval.features import Features, read_features
from dinov2.eval.knn import knn_predict
from dinov2.eval.linear import fit_linear_probe
from dinov2.eval.metrics import bootstrap_intervals, classification_metrics
from dinov2.eval.metrics.figures import draw_matrix
from dinov2.eval.results import (
    TABLE_METRICS,
    FoldPredictions,
    provenance,
    settings_of,
    summarize,
    write_report,
)
from dinov2.hub.backbones import file_sha256
from dinov2.logging import setup_logging
from dinov2.utils.command import exit_code
from dinov2.utils.files import atomic_write
from dinov2.utils.paths import local_path

logger = logging.getLogger("dinov2")

MethodName = Literal["knn", "linear"]
N_FOLDS = 5
DEFAULT_K = 20
ALL_OTHERS = "all others"
MAP_COLUMNS = ("dataset", "label", "common")
DEFAULT_STEM = "features"  # extract_features.py's file is called so in every output folder


@dataclass(frozen=True)
class Method:
    """How cells are classified.

    Attributes:
        name: "knn" or "linear".
        k: neighbours of kNN.
        device: where it computes.
    """

    name: MethodName = "knn"
    k: int = DEFAULT_K
    device: str = "cpu"

    def predict(
        self, train_features: np.ndarray, train_labels: np.ndarray, test_features: np.ndarray, n_classes: int
    ) -> np.ndarray:
        """Classes int64 [M] of cells [M, D], learned from cells [n, D] with labels [n], 0 to `n_classes` - 1."""
        if self.name == "linear":
            probe = fit_linear_probe(train_features, train_labels, n_classes, device=self.device)
            return probe.predict_proba(test_features).argmax(axis=1)
        on_device = torch.as_tensor(train_features, device=self.device)
        return knn_predict(on_device, train_labels, test_features, self.k, n_classes)


# predictors of the data set; kNN is asked only where each data set has as many training cells as there are neighbours
BATCH_METHODS = {"linear": Method("linear"), "knn_1": Method("knn", 1), "knn_20": Method("knn", 20)}


@dataclass(frozen=True, eq=False)
class DataSets:
    """Cells of S data sets, one set after the other.

    Attributes:
        names: S names.
        features: [N, D].
        sets: int64 [N], positions in `names`.
        labels: int64 [N], positions in `class_names`.
        class_names: C names that all sets use.
        patients: N ids, none in two sets; a cell whose patient is unknown has one of its own.
        paths: N picture files.
    """

    names: list[str]
    features: np.ndarray
    sets: np.ndarray
    labels: np.ndarray
    class_names: list[str]
    patients: list[str]
    paths: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    def of_set(self, name: str) -> np.ndarray:
        """Positions of a data set's cells, ascending."""
        return np.flatnonzero(self.sets == self.names.index(name))

    def per_class(self, cells: np.ndarray) -> dict[str, int]:
        """{class: number} of the cells at these positions, for classes with any."""
        counts = np.bincount(self.labels[cells], minlength=len(self.class_names)).tolist()
        return {name: n for name, n in zip(self.class_names, counts, strict=True) if n}


def gather(names: Sequence[str], sets: Sequence[Features], common: Mapping[tuple[str, str], str]) -> DataSets:
    """Several features files as one, with classes under their common names.

    Args:
        names: S names, all different.
        sets: of each.
        common: {(data set, its label): common name, or "" to leave the label's cells out}; other labels keep theirs.

    Raises:
        ValueError: if no cell of a set is left.
    """
    kept: list[Features] = []
    of_cells: list[list[str]] = []
    for name, features in zip(names, sets, strict=True):
        renamed = [common.get((name, label), label) for label in features.class_names]
        is_kept = np.array([bool(text) for text in renamed])[features.labels]
        if not is_kept.any():
            raise ValueError(f"--classes-map: it drops all {len(features)} cells of {name!r}; map some of its labels")
        kept.append(features.select(is_kept))
        of_cells.append([renamed[i] for i in kept[-1].labels])
    if len({features.patients is None for features in kept}) > 1:
        unknown = [name for name, features in zip(names, kept, strict=True) if features.patients is None]
        logger.warning("patients are unknown in %s: its cells count as independent", ", ".join(unknown))
    class_names = sorted({text for texts in of_cells for text in texts})
    ids = {text: i for i, text in enumerate(class_names)}
    patients = [
        f"{number}/{i if features.patients is None else features.patients[i]}"
        for number, features in enumerate(kept)
        for i in range(len(features))
    ]
    return DataSets(
        names=list(names),
        features=np.concatenate([features.features for features in kept]),
        sets=np.repeat(np.arange(len(kept)), [len(features) for features in kept]),
        labels=np.array([ids[text] for texts in of_cells for text in texts], dtype=np.int64),
        class_names=class_names,
        patients=patients,
        paths=[path for features in kept for path in features.paths],
    )


# --- learning on some, judging by others ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Comparison:
    """Who teaches and who judges.

    Attributes:
        train, test: names of data sets; `train` may be `ALL_OTHERS`.
        folds: training and test positions each.
        n_copies: pictures that `drop_copies` took from training.
        reason: why there are no folds, or "".
    """

    train: str
    test: str
    folds: list[Fold]
    n_copies: int = 0
    reason: str = ""


def pairs(data: DataSets, n_folds: int = N_FOLDS, seed: int = 0) -> list[Comparison]:
    """Each data set as teacher of each, itself included, which takes folds drawn from `seed`."""
    found = []
    for train in data.names:
        for test in data.names:
            if train == test:
                found.append(_within(data, train, n_folds, seed))
            else:
                found.append(Comparison(train, test, [(data.of_set(train), data.of_set(test))]))
    return found


def left_out(data: DataSets) -> list[Comparison]:
    """All other data sets as teachers of each."""
    folds = leave_one_dataset_out([data.names[i] for i in data.sets])
    return [Comparison(ALL_OTHERS, name, [folds[name]]) for name in data.names]


def batch_folds(data: DataSets, n_folds: int = N_FOLDS, seed: int = 0) -> tuple[list[Fold], str]:
    """Folds of all cells, stratified by data set and class together; or none, and the reason."""
    strata = data.sets * len(data.class_names) + data.labels
    return _folds_or_reason(strata, data.patients, n_folds, seed)


def _within(data: DataSets, name: str, n_folds: int, seed: int) -> Comparison:
    cells = data.of_set(name)
    folds, reason = _folds_or_reason(data.labels[cells], [data.patients[i] for i in cells], n_folds, seed)
    return Comparison(name, name, [(cells[train], cells[test]) for train, test in folds], reason=reason)


def _folds_or_reason(strata: np.ndarray, patients: Sequence[str], n_folds: int, seed: int) -> tuple[list[Fold], str]:
    try:
        return make_folds(strata, patients, n_folds, seed), ""
    except ValueError as error:  # too few cells or patients: no fault of the other comparisons
        return [], str(error)


def drop_copies(comparisons: Sequence[Comparison], paths: Sequence[str]) -> tuple[list[Comparison], dict[str, int]]:
    """Take from each training side the pictures whose bytes its test side has.

    Returns:
        the comparisons, and counts as `without_copies` gives them.

    Raises:
        ValueError: as `without_copies`.
    """
    kept, counts = without_copies(paths, [fold for comparison in comparisons for fold in comparison.folds])
    rest = iter(kept)
    found = []
    for comparison in comparisons:
        folds = list(islice(rest, len(comparison.folds)))
        dropped = {
            int(i)
            for (before, _), (after, _) in zip(comparison.folds, folds, strict=True)
            for i in np.setdiff1d(before, after)
        }
        found.append(replace(comparison, folds=folds, n_copies=len(dropped)))
    return found, counts


def judge(data: DataSets, comparison: Comparison, method: Method, seed: int = 0) -> dict[str, Any]:
    """One entry of the matrix.

    Args:
        data: the cells.
        comparison: who teaches and who judges.
        method: how.
        seed: of the intervals.

    Returns:
        `n_train` and `n_test` (cells that some fold learns and tests), `classes` (names of those judged), `left_out`
        ({class: cells of the judged set that no fold tests}), `dropped_identical_bytes`, then `accuracy`,
        `balanced_accuracy`, `weighted_f1` and `macro_f1`, their `intervals` (95 %, by patient where known), `per_class`
        (of the classes judged), and `reason`, which is None unless all of the metrics are.
    """
    folds = _answerable(data.labels, comparison.folds)
    trained, tested = (
        np.unique(np.concatenate([fold[side] for fold in folds])) if folds else np.empty(0, dtype=np.int64)
        for side in (0, 1)
    )
    counts: dict[str, Any] = {
        "n_train": len(trained),
        "n_test": len(tested),
        "classes": list(data.per_class(tested)),
        "left_out": data.per_class(np.setdiff1d(data.of_set(comparison.test), tested)),
        "dropped_identical_bytes": comparison.n_copies,
    }
    reason = comparison.reason or _why_not(counts["classes"], [len(train) for train, _ in folds], method)
    if reason:
        return {**counts, **dict.fromkeys(TABLE_METRICS), "intervals": {}, "per_class": {}, "reason": reason}

    learned = np.unique(data.labels[trained])  # lambda and votes count these classes, not those of all data sets
    labels = np.searchsorted(learned, data.labels)
    predictions = np.full(len(data), -1, dtype=np.int64)
    for train, test in folds:
        predictions[test] = method.predict(data.features[train], labels[train], data.features[test], len(learned))
    names = [data.class_names[i] for i in learned]
    found = summarize(
        labels, FoldPredictions(folds, predictions, None, [{} for _ in folds]), names, data.patients, seed
    )
    return {
        **counts,
        **{name: found[name] for name in TABLE_METRICS},
        "intervals": {name: found["intervals"][name] for name in TABLE_METRICS if name in found["intervals"]},
        "per_class": {name: found["per_class"][name] for name in counts["classes"]},
        "reason": None,
    }


def _answerable(labels: np.ndarray, folds: Sequence[Fold]) -> list[Fold]:
    """The folds without test cells of classes that their training side lacks; without folds that then test nothing."""
    found = []
    for train, test in folds:
        learned = np.unique(labels[train])
        known = test[np.isin(labels[test], learned)]
        if len(learned) > 1 and len(known):
            found.append((train, known))
    return found


def _why_not(classes: Sequence[str], train_sizes: Sequence[int], method: Method) -> str:
    """Why an entry has no metrics, or ""."""
    if len(classes) < 2:
        return f"{len(classes)} classes to judge ({', '.join(classes) or 'none'} on both sides); two or more are needed"
    if method.name == "knn" and min(train_sizes) < method.k:
        return f"{min(train_sizes)} training cells, fewer than the k = {method.k} neighbours asked for"
    return ""


# --- which data set is it? ------------------------------------------------------------------------------------------


def batch_effect(data: DataSets, folds: Sequence[Fold], seed: int = 0, device: str = "cpu") -> dict[str, Any]:
    """How well features tell the data sets apart; see the module docstring for which number to look at.

    A data set takes part (over all cells, or in a class) if it has at least as many cells there as there are folds, and
    some fold both learns and tests it, which needs two patients where patients are known.

    Args:
        data: the cells.
        folds: as `batch_folds` makes them.
        seed: of the draws of training cells and of the intervals.
        device: where the predictors compute.

    Returns:
        `overall` and `per_class` ({class: ...}): `data_sets` (that take part), `chance`, and for each of
        `BATCH_METHODS` `balanced_accuracy` and `interval` (95 %, by patient where known; both None where there are too
        few cells); a class that fewer than two sets have is not among them. `mean_over_classes`: `balanced_accuracy`,
        `chance` and `n_classes` of each method, means over the classes that it has a number for, all alike.
    """
    everyone = np.ones(len(data), dtype=bool)
    overall = _tell_apart(data, folds, everyone, seed, device)
    per_class = {}
    for i, name in enumerate(data.class_names):
        if (found := _tell_apart(data, folds, data.labels == i, seed, device)) is not None:
            per_class[name] = found
    means: dict[str, Any] = {}
    for method in BATCH_METHODS:
        rows = [found for found in per_class.values() if found[method]["balanced_accuracy"] is not None]
        means[method] = {
            "balanced_accuracy": float(np.mean([row[method]["balanced_accuracy"] for row in rows])) if rows else None,
            "chance": float(np.mean([row["chance"] for row in rows])) if rows else None,
            "n_classes": len(rows),
        }
    return {"overall": overall, "mean_over_classes": means, "per_class": per_class}


def _tell_apart(
    data: DataSets, folds: Sequence[Fold], is_asked: np.ndarray, seed: int, device: str
) -> dict[str, Any] | None:
    """The batch effect among the cells `is_asked` [N]; None with fewer than two data sets that take part."""
    folds = [(train[is_asked[train]], test[is_asked[test]]) for train, test in folds]
    members = _taking_part(data.sets, folds, len(data.names), is_asked)
    if len(members) < 2:
        return None
    is_member = np.isin(data.sets, members)
    folds = [(train[is_member[train]], test[is_member[test]]) for train, test in folds]
    ids = np.searchsorted(members, data.sets)  # positions in `members`
    names = [data.names[i] for i in members]
    predictions = {name: np.full(len(data), -1, dtype=np.int64) for name in BATCH_METHODS}
    n_smallest = len(data)
    for train, test in folds:
        counts = np.bincount(ids[train], minlength=len(members))
        known = test[counts[ids[test]] > 0]  # a set that this fold cannot learn is tested by the others
        if not len(known) or (counts > 0).sum() < 2:
            continue
        n_each = int(counts[counts > 0].min())
        n_smallest = min(n_smallest, n_each)
        (drawn,) = few_shot_draws(ids[train], n_each, 1, seed)
        taught = train[drawn]
        for name, method in BATCH_METHODS.items():
            if method.name == "linear" or method.k <= n_each:
                predict = replace(method, device=device).predict
                predictions[name][known] = predict(data.features[taught], ids[taught], data.features[known], len(names))
    found: dict[str, Any] = {"data_sets": names, "chance": 1 / len(members)}
    for name, method in BATCH_METHODS.items():
        tested = np.flatnonzero(predictions[name] >= 0)
        if not len(tested) or (method.name == "knn" and method.k > n_smallest):
            found[name] = {"balanced_accuracy": None, "interval": None}
            continue
        labels, answers = ids[tested], predictions[name][tested]
        patients = [data.patients[i] for i in tested]
        found[name] = {
            "balanced_accuracy": classification_metrics(labels, answers, names)["balanced_accuracy"],
            "interval": bootstrap_intervals(labels, answers, len(names), patients=patients, seed=seed).get(
                "balanced_accuracy"
            ),
        }
    return found


def _taking_part(sets: np.ndarray, folds: Sequence[Fold], n_sets: int, is_asked: np.ndarray) -> np.ndarray:
    """Positions of the data sets with a cell or more in each fold, which some fold learns and tests."""
    is_judged = np.zeros(n_sets, dtype=bool)
    for train, test in folds:
        is_judged |= np.isin(np.arange(n_sets), sets[train]) & np.isin(np.arange(n_sets), sets[test])
    return np.flatnonzero(is_judged & (np.bincount(sets[is_asked], minlength=n_sets) >= len(folds)))


# --- the command ----------------------------------------------------------------------------------------------------


def read_classes_map(file: Path, labels_of: Mapping[str, Sequence[str]]) -> dict[tuple[str, str], str]:
    """Read a CSV with the columns `dataset,label,common`: {(data set, its label): common name, "" to drop it}.

    Args:
        file: the CSV.
        labels_of: {data set: its labels}.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it lacks a column, names a data set or a label that is not there, or names one twice.
    """
    table = open_table(local_path(file), "--classes-map")
    if not set(MAP_COLUMNS) <= set(table.columns):
        raise ValueError(
            f"--classes-map: {str(file)!r} has the columns {table.columns or 'none'}; expected {','.join(MAP_COLUMNS)}"
        )
    common: dict[tuple[str, str], str] = {}
    for line, (dataset, label, name) in table.rows(*MAP_COLUMNS):
        where = f"--classes-map: {str(file)!r}, line {line}"
        if dataset not in labels_of:
            raise ValueError(f"{where}: no data set is called {dataset!r}; there are {', '.join(labels_of)}")
        if label not in labels_of[dataset]:
            raise ValueError(f"{where}: {dataset} has no label {label!r}; it has {', '.join(labels_of[dataset])}")
        if (dataset, label) in common:
            raise ValueError(f"{where}: {label!r} of {dataset} has a row already; keep one of the two")
        common[dataset, label] = name
    return common


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Learn on each data set and judge by each, leave each out in turn, and tell by the features which "
        "data set a cell is of; print tables and write results.json, matrix.csv, leave_one_out.csv, batch_effect.csv "
        "and matrix.png to <output-dir>.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--features",
        type=Path,
        nargs="+",
        required=True,
        help="a file of extract_features.py for each data set, all of one network",
    )
    parser.add_argument(
        "--names", nargs="+", help="of the data sets, in the same order; default: the files' names, or their folders'"
    )
    parser.add_argument(
        "--classes-map",
        type=Path,
        help="CSV with the columns dataset,label,common that gives labels a common name; an empty one drops its cells",
    )
    parser.add_argument("--kind", help="of the features; without it the files' first one")
    parser.add_argument("--method", choices=get_args(MethodName), default="knn", help="how cells are classified")
    parser.add_argument("--k", type=positive_int, default=DEFAULT_K, help="neighbours of kNN")
    parser.add_argument(
        "--folds", type=positive_int, default=N_FOLDS, help="within a data set, and of the batch effect"
    )
    parser.add_argument("--seed", type=int, default=0, help="of folds, draws and intervals")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where there is one"
    )
    parser.add_argument("--output-dir", type=Path, required=True, help="where all files go; made if missing")
    args = parser.parse_args(argv)
    if problem := _wrong_combination(args):
        parser.error(problem)
    args.names = args.names or _default_names(args.features)
    return args


def _wrong_combination(args: argparse.Namespace) -> str:
    """What is wrong with the flags together, or ""."""
    n_files = len(args.features)
    if n_files < 2:
        return "--features: one file; give those of two or more data sets"
    if args.folds < 2:
        return f"--folds {args.folds}: choose 2 or more"
    names = args.names or _default_names(args.features)
    if len(names) != n_files:
        return f"--names: {len(names)} names for {n_files} files; give one each"
    twice = [name for name, n in Counter(names).items() if n > 1]
    if twice or ALL_OTHERS in names or "" in names:
        what = f"{twice[0]!r} stands twice" if twice else f"'' and {ALL_OTHERS!r} are not names"
        return f"--names: {what}; name each data set differently"
    return ""


def _default_names(files: Sequence[Path]) -> list[str]:
    """The files' names; those of their folders where files are called as extract_features.py calls them."""
    return [file.absolute().parent.name if file.stem == DEFAULT_STEM else file.stem for file in files]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    setup_logging()

    device = device_of(args)
    sets = _read_sets(args)
    labels_of = {name: features.class_names for name, features in sets.items()}
    data = gather(
        args.names, list(sets.values()), read_classes_map(args.classes_map, labels_of) if args.classes_map else {}
    )
    folds, reason = batch_folds(data, args.folds, args.seed)
    wanted = [*pairs(data, args.folds, args.seed), *left_out(data), Comparison("", "", folds, reason=reason)]
    (*comparisons, of_sets), copies = drop_copies(wanted, data.paths)
    method = Method(args.method, args.k, device)
    entries: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in (*args.names, ALL_OTHERS)}
    for comparison in comparisons:
        entries[comparison.train][comparison.test] = judge(data, comparison, method, args.seed)
        logger.info("%s -> %s is done", comparison.train, comparison.test)
    effect = None if reason else batch_effect(data, of_sets.folds, args.seed, device)
    others = entries.pop(ALL_OTHERS)
    report: dict[str, Any] = {
        "protocol": "cross",
        "results": {
            "matrix": entries,
            "leave_one_out": others,
            "batch_effect": effect,
            "batch_effect_reason": reason or None,
        },
        "kind": next(iter(sets.values())).kind,
        "class_names": data.class_names,
        "counts": {
            "data_sets": {name: _counts(data, name, features) for name, features in sets.items()},
            **copies,
        },
    }
    settings = settings_of(args) | {"features": [str(file) for file in args.features]}
    hashes = {f"features:{name}": file_sha256(file) for name, file in zip(args.names, args.features, strict=True)}
    if args.classes_map:
        hashes["classes_map"] = file_sha256(args.classes_map)
    attributes = next(iter(sets.values())).attributes
    output = args.output_dir
    _write_entries(output / "matrix.csv", [(a, b, entry) for a, row in entries.items() for b, entry in row.items()])
    _write_entries(output / "leave_one_out.csv", [(ALL_OTHERS, name, entry) for name, entry in others.items()])
    _write_effect(output / "batch_effect.csv", effect)
    _draw(output / "matrix.png", entries, others, method)
    write_report(output, report | provenance(attributes, settings, hashes))
    print(format_report(report, method, args.folds))


def _read_sets(args: argparse.Namespace) -> dict[str, Features]:
    """{data set: its features}.

    Raises:
        FileNotFoundError, ValueError: as `read_features` and `Features.of_kind`; if features are infinite or NaN; and
            if files are of two networks.
    """
    sets: dict[str, Features] = {}
    for name, file in zip(args.names, args.features, strict=True):
        found = read_features(file)
        found = found if args.kind is None else found.of_kind(args.kind)
        sets[name] = replace(found, others={})
        check_finite(sets[name], file)
        try:
            check_same_network(sets[args.names[0]], sets[name])
        except ValueError as error:
            raise ValueError(f"data sets {args.names[0]!r} and {name!r} do not compare: {error}") from error
    return sets


def _counts(data: DataSets, name: str, features: Features) -> dict[str, Any]:
    cells = data.of_set(name)
    return {
        "cells": len(cells),
        "patients": None if features.patients is None else len({data.patients[i] for i in cells}),
        "per_class": data.per_class(cells),
        "dropped_by_map": len(features) - len(cells),
        "unreadable": len(features.unreadable),
    }


def _write_entries(file: Path, rows: Iterable[tuple[str, str, Mapping[str, Any]]]) -> None:
    """A row for each entry: names, counts, each metric with the ends of its interval, and the reason if it has none."""
    header = ["train", "test", "n_train", "n_test", "n_classes", "n_left_out", "n_dropped_identical_bytes"]
    header += [f"{name}{end}" for name in TABLE_METRICS for end in ("", "_low", "_high")]
    lines = []
    for train, test, entry in rows:
        counts = entry["n_train"], entry["n_test"], len(entry["classes"]), sum(entry["left_out"].values())
        values = [v for name in TABLE_METRICS for v in (entry[name], *entry["intervals"].get(name, (None, None)))]
        lines.append([train, test, *counts, entry["dropped_identical_bytes"], *values, entry["reason"]])
    _write_csv(file, [*header, "reason"], lines)


def _write_effect(file: Path, effect: Mapping[str, Any] | None) -> None:
    """A row for each method and each of: all cells, the mean over classes, each class."""
    lines: list[list[Any]] = []
    if effect is not None:
        for method, mean in effect["mean_over_classes"].items():
            lines.append(["mean over classes", "", method, mean["balanced_accuracy"], None, None, mean["chance"]])
        rows = {f"class {name}": row for name, row in effect["per_class"].items()}
        for cells, row in {"all": effect["overall"], **rows}.items():
            for method in BATCH_METHODS if row is not None else ():
                low, high = row[method]["interval"] or (None, None)
                of_row = row[method]["balanced_accuracy"], low, high, row["chance"]
                lines.append([cells, " ".join(row["data_sets"]), method, *of_row])
    header = ["cells", "data_sets", "method", "balanced_accuracy", "balanced_accuracy_low", "balanced_accuracy_high"]
    _write_csv(file, [*header, "chance"], lines)


def _write_csv(file: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with atomic_write(file, "w") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([f"{v:.8g}" if isinstance(v, float) else v for v in row] for row in rows)


def _draw(
    file: Path, entries: Mapping[str, Mapping[str, Any]], others: Mapping[str, Mapping[str, Any]], method: Method
) -> None:
    """The balanced accuracies as a picture."""
    rows = {**entries, ALL_OTHERS: others}
    values = np.array([[_number(entry) for entry in row.values()] for row in rows.values()])  # [S + 1, S]
    texts = [[_percent(entry["balanced_accuracy"]) for entry in row.values()] for row in rows.values()]
    draw_matrix(
        file,
        values,
        texts,
        list(rows),
        list(entries),
        xlabel="judged by",
        ylabel="learned on",
        title=f"balanced accuracy in percent, {_describe(method)}",
        scale="balanced accuracy",
    )


def _number(entry: Mapping[str, Any]) -> float:
    return float("nan") if entry["balanced_accuracy"] is None else entry["balanced_accuracy"]


def _describe(method: Method) -> str:
    return f"kNN, k = {method.k}" if method.name == "knn" else "linear probe"


def _percent(value: float | None, interval: Sequence[float] | None = None) -> str:
    if value is None:
        return "-"
    text = f"{100 * value:.1f}"
    return text + " ({:.1f}-{:.1f})".format(*(100 * end for end in interval)) if interval else text


def format_report(report: Mapping[str, Any], method: Method, n_folds: int = N_FOLDS) -> str:
    """results.json as tables: the matrix with a row for all others, the batch effect, and reasons for gaps."""
    results = report["results"]
    rows = {**results["matrix"], ALL_OTHERS: results["leave_one_out"]}
    names = list(results["matrix"])
    first, column = max(map(len, rows)), max(19, *map(len, names)) + 2
    lines = [
        f"{_describe(method)}: balanced accuracy in percent (95 % interval), learned on rows, judged by columns;",
        f"a data set by itself in {n_folds} folds",
        "",
        f"{'':{first}}" + "".join(f"{name:>{column}}" for name in names),
    ]
    gaps = []
    for train, row in rows.items():
        line = f"{train:{first}}"
        for test, entry in row.items():
            text = _percent(entry["balanced_accuracy"], entry["intervals"].get("balanced_accuracy"))
            line += f"{text:>{column}}"
            n_left_out = sum(entry["left_out"].values())
            if entry["reason"]:
                gaps.append(f"{train} -> {test}: {entry['reason']}")
            elif n_left_out:
                classes = ", ".join(entry["left_out"])
                gaps.append(f"{train} -> {test}: {n_left_out} cells are not judged, of classes not learned: {classes}")
        lines.append(line)
    return "\n".join([*lines, *(["", *gaps] if gaps else []), "", *_effect_table(results)])


def _effect_table(results: Mapping[str, Any]) -> list[str]:
    effect = results["batch_effect"]
    if effect is None:
        return [f"batch effect: {results['batch_effect_reason']}"]
    n_classes = len(effect["per_class"])
    means = effect["mean_over_classes"]
    rows = {
        f"within a class, mean of {n_classes}": [
            *(_percent(mean["balanced_accuracy"]) for mean in means.values()),
            _percent(means["linear"]["chance"]),
        ]
    }
    for name, row in {"all cells": effect["overall"], **effect["per_class"]}.items():
        if row is not None:
            found = [_percent(row[method]["balanced_accuracy"], row[method]["interval"]) for method in BATCH_METHODS]
            rows[name] = [*found, _percent(row["chance"])]
    width = max(map(len, rows))
    titles = [*(method.replace("_", "-") for method in BATCH_METHODS), "chance"]
    lines = [
        "which data set is it? balanced accuracy in percent (within a class no difference in class mixture helps)",
        "",
        f"{'':{width}}" + "".join(f"{title:>21}" for title in titles),
    ]
    return lines + [f"{name:{width}}" + "".join(f"{text:>21}" for text in texts) for name, texts in rows.items()]


if __name__ == "__main__":
    sys.exit(exit_code(main))
