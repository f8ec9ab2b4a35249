"""Features of several data sets side by side: read, joined under common class names, and compared pair by pair.

Letters: S data sets, N cells of all of them, D feature dim, C classes
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.data.datasets.tables import open_table
from dinov2.data.splits import Fold, leave_one_dataset_out, make_folds, without_copies
from dinov2.eval.features.store import Features, check_finite, check_labels, check_same_network, read_features
from dinov2.utils.files import local_path

logger = logging.getLogger("dinov2")

ALL_OTHERS = "all others"
MAP_COLUMNS = ("dataset", "label", "common")
WHITE_CELLS = "white-cells"  # in place of the file of a map: the map below
# labels of the data sets that prepare_dataset.py writes; "neutrophil" has all stages from the band on
WHITE_CELLS_FILE = Path(__file__).with_name("white_cells.csv")


def read_sets(files: Mapping[str, Path], kind: str | None) -> dict[str, Features]:
    """Read the features of each data set, {name: file}; `kind` None is the files' first kind."""
    sets: dict[str, Features] = {}
    for name, file in files.items():
        features = read_features(file)
        sets[name] = replace(features.of_kind(kind or features.kind), others={})
        check_labels(sets[name], file)
        check_finite(sets[name], file)
        first = next(iter(sets))
        try:
            check_same_network(sets[first], sets[name])
        except ValueError as error:
            raise ValueError(f"data sets {first!r} and {name!r} do not compare: {error}") from error
    return sets


def read_classes_map(file: Path, labels_of: Mapping[str, Sequence[str]]) -> dict[tuple[str, str], str]:
    """Read a CSV with the columns `dataset,label,common`: {(data set, its label): common name, "" to drop it}.

    Each row must name a data set and a label of `labels_of`, and no two rows the same.
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


def white_cells_map(labels_of: Mapping[str, Sequence[str]]) -> dict[tuple[str, str], str]:
    """Map the labels of prepared data sets to the five white cells of normal blood, as `read_classes_map`.

    A label that the shipped map lacks is dropped, with a warning.
    """
    table = open_table(WHITE_CELLS_FILE, f"--classes-map {WHITE_CELLS}")
    known = {(dataset, label): common for _, (dataset, label, common) in table.rows(*MAP_COLUMNS)}
    datasets = {dataset for dataset, _ in known}
    for dataset, labels in labels_of.items():
        if dataset not in datasets:
            raise ValueError(
                f"--classes-map {WHITE_CELLS}: it has no data set {dataset!r}, only {', '.join(sorted(datasets))}; "
                f"give these names with --names, or a map of your own"
            )
        if unknown := [label for label in labels if (dataset, label) not in known]:
            text = "--classes-map %s: cells of %s with the labels %s are left out; it does not have these labels"
            logger.warning(text, WHITE_CELLS, dataset, ", ".join(unknown))
    return {(dataset, label): known.get((dataset, label), "") for dataset in labels_of for label in labels_of[dataset]}


@dataclass(frozen=True, eq=False)
class Comparison:
    """Which data set is trained on (or `ALL_OTHERS`) and which is tested; folds of training and test positions."""

    train: str
    test: str
    folds: list[Fold]
    n_copies: int = 0  # training images that were dropped because a test image has the same bytes
    reason: str = ""  # why there are no folds


@dataclass(frozen=True, eq=False)
class CrossData:
    """Cells of S data sets, one set after the other, and the comparisons to make."""

    names: list[str]
    features: np.ndarray  # [N, D]
    sets: np.ndarray  # int64 [N], positions in `names`
    labels: np.ndarray  # int64 [N], positions in `class_names`
    class_names: list[str]  # that all sets use
    patients: list[str]  # of each cell, none in two sets; a cell whose patient is unknown has an id of its own
    comparisons: list[Comparison] = field(default_factory=list)  # every pair, then all others against each
    batch: Comparison = field(default_factory=lambda: Comparison("", "", []))  # stratified by data set and class

    def positions(self, name: str) -> np.ndarray:
        """Return the positions of a data set's cells, ascending."""
        return np.flatnonzero(self.sets == self.names.index(name))

    def per_class(self, cells: np.ndarray) -> dict[str, int]:
        """Return {class: number} of the cells at these positions, for classes with any."""
        counts = np.bincount(self.labels[cells], minlength=len(self.class_names)).tolist()
        return {name: n for name, n in zip(self.class_names, counts, strict=True) if n}


def prepare(
    names: Sequence[str],
    sets: Sequence[Features],
    common: Mapping[tuple[str, str], str],
    n_folds: int = 5,
    seed: int = 0,
) -> tuple[CrossData, dict[str, int]]:
    """Join S sets of features as `join_sets`, draw the folds, and drop copies of test images from training.

    The second value has the counts of `without_copies`.
    """
    data, paths = join_sets(names, sets, common)
    strata = data.sets * len(data.class_names) + data.labels
    comparisons = [
        _folds_within(data, train, data.positions(train), data.labels, n_folds, seed)
        if train == test
        else Comparison(train, test, [(data.positions(train), data.positions(test))])
        for train, test in product(names, repeat=2)
    ]
    others = leave_one_dataset_out([names[i] for i in data.sets])
    comparisons += [Comparison(ALL_OTHERS, name, [others[name]]) for name in names]
    comparisons.append(_folds_within(data, "", np.arange(len(strata)), strata, n_folds, seed))
    (*comparisons, batch), counts = _drop_copies(comparisons, paths)
    return replace(data, comparisons=comparisons, batch=batch), counts


def join_sets(
    names: Sequence[str], sets: Sequence[Features], common: Mapping[tuple[str, str], str]
) -> tuple[CrossData, list[str]]:
    """Join S sets of features, without comparisons, and return the paths of their N images too.

    Names of labels are replaced by `common` (of `read_classes_map`).
    """
    kept, texts = [], []
    for name, features in zip(names, sets, strict=True):
        renamed = np.array([common.get((name, label), label) for label in features.class_names], dtype=object)
        is_kept = (renamed != "")[features.labels]
        if not is_kept.any():
            raise ValueError(f"--classes-map: it drops all {len(features)} cells of {name!r}; map some of its labels")
        kept.append(features.select(is_kept))
        texts += renamed[kept[-1].labels].tolist()
    unknown = [name for name, features in zip(names, kept, strict=True) if features.patients is None]
    if 0 < len(unknown) < len(names):
        logger.warning("patients are unknown in %s: its cells count as independent", ", ".join(unknown))
    class_names, labels = np.unique(texts, return_inverse=True)
    data = CrossData(
        names=list(names),
        features=np.concatenate([features.features for features in kept]),
        sets=np.repeat(np.arange(len(kept)), [len(features) for features in kept]),
        labels=labels.astype(np.int64),
        class_names=class_names.tolist(),
        patients=[
            f"{number}/{patient}"
            for number, features in enumerate(kept)
            for patient in (range(len(features)) if features.patients is None else features.patients)
        ],
    )
    return data, [path for features in kept for path in features.paths]


def _folds_within(
    data: CrossData, name: str, cells: np.ndarray, strata: np.ndarray, n_folds: int, seed: int
) -> Comparison:
    """Compare these cells with themselves in folds stratified by `strata` [N], or give the reason why not."""
    try:
        folds = make_folds(strata[cells], [data.patients[i] for i in cells], n_folds, seed)
    except ValueError as error:  # too few cells or patients: other comparisons are still possible
        return Comparison(name, name, [], reason=str(error))
    return Comparison(name, name, [(cells[train], cells[test]) for train, test in folds])


def _drop_copies(comparisons: Sequence[Comparison], paths: Sequence[str]) -> tuple[list[Comparison], dict[str, int]]:
    """Drop training images with the bytes of a test image; return the comparisons and the counts."""
    kept, counts = without_copies(paths, [fold for comparison in comparisons for fold in comparison.folds])
    remaining, without = iter(kept), []
    for comparison in comparisons:
        folds = [next(remaining) for _ in comparison.folds]
        pairs = zip(comparison.folds, folds, strict=True)
        dropped = {int(i) for (before, _), (after, _) in pairs for i in np.setdiff1d(before, after)}
        without.append(replace(comparison, folds=folds, n_copies=len(dropped)))
    return without, counts


def count_cells(data: CrossData, name: str, features: Features) -> dict[str, Any]:
    """Return the numbers of cells and patients of a data set; `features` are as they were read."""
    cells = data.positions(name)
    return {
        "cells": len(cells),
        "patients": None if features.patients is None else len({data.patients[i] for i in cells}),
        "per_class": data.per_class(cells),
        "dropped_by_map": len(features) - len(cells),
        "unreadable": len(features.unreadable),
    }
