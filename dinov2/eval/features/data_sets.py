"""Features of several data sets side by side: read, joined under common class names, and compared pair by pair.

Letters: S data sets, N cells of all of them, D feature dim, C classes
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.data.copies import without_copies
from dinov2.data.datasets.tables import open_table
from dinov2.data.splits import Fold, leave_one_dataset_out, make_folds
from dinov2.eval.features.join import check_finite, check_same_network
from dinov2.eval.features.store import Features, read_features
from dinov2.utils.paths import local_path

logger = logging.getLogger("dinov2")

ALL_OTHERS = "all others"
MAP_COLUMNS = ("dataset", "label", "common")


def read_sets(files: Mapping[str, Path], kind: str | None) -> dict[str, Features]:
    """Read the features of each data set, of the files' first kind where `kind` is None.

    Raises:
        FileNotFoundError, ValueError: as `read_features` and `Features.of_kind`; if features are infinite or NaN; and
            if files are of two networks.
    """
    sets: dict[str, Features] = {}
    for name, file in files.items():
        features = read_features(file)
        features = features if kind is None else features.of_kind(kind)
        sets[name] = replace(features, others={})
        check_finite(sets[name], file)
        first = next(iter(sets))
        try:
            check_same_network(sets[first], sets[name])
        except ValueError as error:
            raise ValueError(f"data sets {first!r} and {name!r} do not compare: {error}") from error
    return sets


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


@dataclass(frozen=True, eq=False)
class Comparison:
    """Which data set is trained on and which is tested.

    Attributes:
        train, test: names of data sets; `train` may be `ALL_OTHERS`.
        folds: training and test positions each.
        n_copies: training images dropped because a test image has the same bytes.
        reason: why there are no folds, or "".
    """

    train: str
    test: str
    folds: list[Fold]
    n_copies: int = 0
    reason: str = ""


@dataclass(frozen=True, eq=False)
class CrossData:
    """Cells of S data sets, one set after the other, and the comparisons to make.

    Attributes:
        names: S names.
        features: [N, D].
        sets: int64 [N], positions in `names`.
        labels: int64 [N], positions in `class_names`.
        class_names: C names that all sets use.
        patients: N ids, none in two sets; a cell whose patient is unknown has an id of its own.
        comparisons: every pair of data sets, then all others against each.
        batch: folds of all cells, stratified by data set and class together.
    """

    names: list[str]
    features: np.ndarray
    sets: np.ndarray
    labels: np.ndarray
    class_names: list[str]
    patients: list[str]
    comparisons: list[Comparison] = field(default_factory=list)
    batch: Comparison = field(default_factory=lambda: Comparison("", "", []))

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
    """Join features of data sets, draw the folds, and drop copies of test images from training.

    Args:
        names: S names, all different.
        sets: the features of each.
        common: {(data set, its label): common name, or "" to leave its cells out}; other labels keep their names.
        n_folds: within a data set, and of the batch effect.
        seed: of the folds.

    Returns:
        the data, and the counts of `without_copies`.

    Raises:
        ValueError: if no cell of a set is left, or as `without_copies`.
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
    others = leave_one_dataset_out([data.names[i] for i in data.sets])
    comparisons = [_compare(data, train, test, n_folds, seed) for train in data.names for test in data.names]
    comparisons += [Comparison(ALL_OTHERS, name, [others[name]]) for name in data.names]
    strata = data.sets * len(data.class_names) + data.labels
    comparisons.append(Comparison("", "", *_folds_or_reason(data, np.arange(len(strata)), strata, n_folds, seed)))
    (*comparisons, batch), counts = _drop_copies(comparisons, [path for features in kept for path in features.paths])
    return replace(data, comparisons=comparisons, batch=batch), counts


def _compare(data: CrossData, train: str, test: str, n_folds: int, seed: int) -> Comparison:
    if train != test:
        return Comparison(train, test, [(data.positions(train), data.positions(test))])
    cells = data.positions(test)
    folds, n_copies, reason = _folds_or_reason(data, cells, data.labels[cells], n_folds, seed)
    return Comparison(train, test, folds, n_copies, reason)


def _folds_or_reason(
    data: CrossData, cells: np.ndarray, strata: np.ndarray, n_folds: int, seed: int
) -> tuple[list[Fold], int, str]:
    """Return the folds of some cells, 0 copies, and ""; or no folds and the reason."""
    try:
        folds = make_folds(strata, [data.patients[i] for i in cells], n_folds, seed)
    except ValueError as error:  # too few cells or patients: other comparisons are still possible
        return [], 0, str(error)
    return [(cells[train], cells[test]) for train, test in folds], 0, ""


def _drop_copies(comparisons: Sequence[Comparison], paths: Sequence[str]) -> tuple[list[Comparison], dict[str, int]]:
    """Drop training images with the bytes of a test image; return the comparisons and the counts."""
    kept, counts = without_copies(paths, [fold for comparison in comparisons for fold in comparison.folds])
    remaining = iter(kept)
    without = []
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
