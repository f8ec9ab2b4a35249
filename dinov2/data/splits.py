"""Who is learned from and who is judged: stratified folds, whole patients, whole data sets, files that keep a split.

A fold is (training positions, test positions), both ascending. A patient's cells never stand on two sides.

Letters: N cells (or bags: whatever has one label each)
"""

import csv
import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from dinov2.data.datasets.tables import open_table
from dinov2.utils.files import atomic_write
from dinov2.utils.paths import local_path

logger = logging.getLogger("dinov2")

PathLike: TypeAlias = str | os.PathLike[str]
Fold: TypeAlias = tuple[np.ndarray, np.ndarray]

PATH_COLUMNS = ("path", "Image Path")
FOLD_COLUMN, PART_COLUMN = "fold", "part"
ALWAYS_TRAINING = "train"  # in the column `fold`: never tested
PARTS = ("train", "val", "test", "unused")
N_EXAMPLES = 3


def make_folds(
    labels: np.ndarray, patients: Sequence[str] | None = None, n_folds: int = 5, seed: int = 0
) -> list[Fold]:
    """Stratified folds, drawn from `seed`; each cell is tested in one of them, but for classes with a single cell.

    Without patients (or with one cell each) a class with a single cell is in the training side of every fold: tested,
    it would be a class that nothing learned. Other classes smaller than `n_folds` are missing from the test side of
    some folds. With patients, a class that one patient alone has is missing from training where it is tested.
    `describe_folds` tells all of these.

    Args:
        labels: int64 [N], 0 or more.
        patients: N patient ids; a patient's cells are tested together. None to split by cell.
        n_folds: 2 or more.
        seed: of the draw.

    Returns:
        (training positions, test positions) per fold; training is all that is not tested.

    Raises:
        ValueError: if there are fewer than two folds, or too few cells or patients for them.
    """
    labels = np.asarray(labels)
    if n_folds < 2:
        raise ValueError(f"folds: {n_folds}; choose 2 or more")
    if patients is not None and len(patients) != len(labels):
        raise ValueError(f"folds: {len(patients)} patients for {len(labels)} labels; expected one each")
    is_grouped = patients is not None and len(set(patients)) < len(labels)
    _check_enough(labels, patients, n_folds, f"folds: {n_folds}", "choose fewer folds")
    everyone = np.arange(len(labels))
    if is_grouped:
        candidates, groups = everyone, np.asarray(patients, dtype=str)
        splitter: Any = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    else:
        candidates, groups = np.flatnonzero(np.bincount(labels)[labels] > 1), None
        splitter = StratifiedKFold(n_folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # describe_folds says which classes and folds that concerns
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        tested = [candidates[test] for _, test in splitter.split(candidates, labels[candidates], groups)]
    folds = [(np.setdiff1d(everyone, test), np.sort(test)) for test in tested]
    if patients is not None:
        for train, test in folds:
            check_no_patient_on_two_sides(patients, train, test)
    return folds


def split_cells(
    labels: np.ndarray, patients: Sequence[str] | None, test_fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """One stratified split: positions of the training and of the test cells, both ascending.

    Args:
        labels: int64 [N].
        patients: N patient ids; a patient's cells all go to one side. None to split by cell.
        test_fraction: share of the test set: of round(1 / test_fraction) parts it is the one of the most even size.
        seed: of the draw.

    Raises:
        ValueError: if the fraction is not in (0, 0.5], or there are too few patients or cells for it.
    """
    if not 0 < test_fraction <= 0.5:
        raise ValueError(f"--test-fraction {test_fraction}: choose a share above 0 and up to 0.5")
    n_parts = round(1 / test_fraction)
    _check_enough(
        labels,
        patients,
        n_parts,
        f"--test-fraction {test_fraction}",
        "choose a larger share, or give --train and --test",
    )
    folds = StratifiedKFold if patients is None else StratifiedGroupKFold
    with warnings.catch_warnings():
        # classes smaller than the number of parts may miss in the test set: the table's support column shows it
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        splits = list(folds(n_parts, shuffle=True, random_state=seed).split(labels, labels, patients))
    # parts of whole patients differ in size
    return min(splits, key=lambda split: abs(len(split[1]) * n_parts - len(labels)))


def _check_enough(
    labels: np.ndarray, patients: Sequence[str] | None, n_parts: int, setting: str, what_to_do: str
) -> None:
    available = {"cells in its largest class": int(np.bincount(labels).max(initial=0))}
    if patients is not None:
        available["patients"] = len(set(patients))
    for what, n_available in available.items():
        if n_available < n_parts:
            raise ValueError(
                f"{setting}: the set has {n_available} {what}, fewer than the {n_parts} parts to make; {what_to_do}"
            )


def leave_one_dataset_out(datasets: Sequence[str]) -> dict[str, Fold]:
    """{data set: its cells are the test side, those of all others the training side}, in sorted order.

    Args:
        datasets: N names, the data set of each cell.

    Raises:
        ValueError: if all cells are of one data set.
    """
    of_cell = np.asarray(datasets, dtype=str)
    names = np.unique(of_cell).tolist()
    if len(names) < 2:
        raise ValueError(
            f"leave one data set out: all {len(of_cell)} cells are of {', '.join(map(repr, names)) or 'none'}; "
            f"at least two data sets are needed"
        )
    return {name: (np.flatnonzero(of_cell != name), np.flatnonzero(of_cell == name)) for name in names}


def few_shot_draws(labels: np.ndarray, n_per_class: int, n_repeats: int, seed: int = 0) -> list[np.ndarray]:
    """Positions of `n_per_class` cells a class, ascending, drawn without replacement, `n_repeats` times.

    A class with fewer cells gives all it has. A draw depends on (seed, number of the draw, class) alone, so that the
    draw for 5 a class holds that for 1 a class, and more repeats leave the first ones as they are.

    Args:
        labels: int64 [N].
        n_per_class: 1 or more.
        n_repeats: 1 or more.
        seed: of the draws.

    Raises:
        ValueError: if `n_per_class` is more than even the largest class has, or a number is below 1.
    """
    labels = np.asarray(labels)
    counts = np.bincount(labels)
    if n_per_class < 1 or n_repeats < 1:
        raise ValueError(f"few-shot: {n_per_class} a class, {n_repeats} repeats; both must be at least 1")
    if n_per_class > counts.max(initial=0):
        raise ValueError(
            f"few-shot: {n_per_class} cells a class asked, but the largest class has {counts.max(initial=0)} training "
            f"cells; choose at most that"
        )
    return [
        np.sort(
            np.concatenate(
                [
                    np.random.default_rng([seed, repeat, int(label)]).permutation(np.flatnonzero(labels == label))[
                        :n_per_class
                    ]
                    for label in np.flatnonzero(counts)
                ]
            )
        )
        for repeat in range(n_repeats)
    ]


def check_no_patient_on_two_sides(patients: Sequence[str], *sides: np.ndarray) -> None:
    """Refuse a split that learns from a patient it is judged by.

    Args:
        patients: N patient ids.
        sides: positions of the cells of each side: training, test and, where there is one, validation.

    Raises:
        ValueError: names patients that stand on more than one side.
    """
    seen: set[str] = set()
    shared: set[str] = set()
    for side in sides:
        here = {patients[int(i)] for i in side}
        shared |= here & seen
        seen |= here
    if shared:
        raise ValueError(
            f"split: {len(shared)} of {len(seen)} patients have cells on two sides, for instance "
            f"{', '.join(map(repr, sorted(shared)[:N_EXAMPLES]))}; put each patient's cells on one side"
        )


def describe_folds(labels: np.ndarray, folds: Sequence[Fold], class_names: Sequence[str]) -> dict[str, Any]:
    """Sizes of folds and what they lack, in plain Python, ready for JSON.

    Args:
        labels: int64 [N], positions in `class_names`.
        folds: training and test positions each.
        class_names: C names.

    Returns:
        `train_sizes`, `test_sizes` (one number a fold), `never_tested` ({class: its cells, all of them in training
        only}), `not_tested_in` ({class: numbers of the folds without a test cell of it}) and `not_learned_in` ({class:
        numbers of the folds that test it and have no training cell of it}). Folds count from 0.
    """
    labels = np.asarray(labels)
    n_classes = len(class_names)
    in_train, in_test = (
        np.array([np.bincount(labels[fold[side]], minlength=n_classes) for fold in folds]) for side in (0, 1)
    )  # [folds, C]
    in_all = np.bincount(labels, minlength=n_classes)
    tested: np.ndarray = in_test.sum(axis=0) > 0
    lacks_test = (in_test == 0) & tested
    lacks_training = (in_train == 0) & (in_test > 0)
    return {
        "train_sizes": [len(train) for train, _ in folds],
        "test_sizes": [len(test) for _, test in folds],
        "never_tested": {class_names[c]: int(in_all[c]) for c in range(n_classes) if in_all[c] and not tested[c]},
        "not_tested_in": _folds_by_class(lacks_test, class_names),
        "not_learned_in": _folds_by_class(lacks_training, class_names),
    }


def _folds_by_class(is_so: np.ndarray, class_names: Sequence[str]) -> dict[str, list[int]]:
    """{class: the folds}, of bool [folds, C], for classes with any."""
    return {
        name: np.flatnonzero(of_class).tolist()
        for name, of_class in zip(class_names, is_so.T, strict=True)
        if of_class.any()
    }


def log_fold_problems(description: Mapping[str, Any]) -> None:
    """Say in the log what `describe_folds` found missing."""

    def listed(found: Mapping[str, Any], unit: str) -> str:
        return "; ".join(
            f"{name} ({unit} {value if isinstance(value, int) else ', '.join(map(str, value))})"
            for name, value in found.items()
        )

    if found := description["never_tested"]:
        logger.warning("classes too small to test, used in training only: %s", listed(found, "cells:"))
    if found := description["not_tested_in"]:
        logger.warning("folds without a test cell of a class: %s", listed(found, "folds"))
    if found := description["not_learned_in"]:
        logger.warning(
            "classes tested without a training cell, which nothing can get right: %s", listed(found, "folds")
        )


@dataclass(frozen=True)
class Split:
    """A split as a file tells it.

    Attributes:
        folds: training and test positions each; one fold if the file names parts.
        validation: positions of the part `val`; None if the file has none.
    """

    folds: list[Fold]
    validation: np.ndarray | None = None


def write_split(file: PathLike, paths: Sequence[str], split: Split) -> None:
    """Write a CSV that `read_split` reads.

    One fold is written as `path,part` (train, val, test or unused); several as `path,fold`, where `fold` is the number
    of the fold that tests the cell, or `train` for a cell that none does.

    Args:
        file: the CSV.
        paths: N pictures (or patients), none twice.
        split: positions in `paths`.

    Raises:
        ValueError: if a path stands twice, or the folds are not such that each trains on all it does not test and no
            cell is tested twice.
    """
    _positions(paths, file)
    column, values = _as_column(len(paths), split)
    with atomic_write(file, "w") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow((PATH_COLUMNS[0], column))
        writer.writerows(zip(map(str, paths), values, strict=True))


def read_split(file: PathLike, paths: Sequence[str]) -> Split:
    """Read a CSV with the columns `path,fold` or `path,part`, as `write_split` describes them.

    Args:
        file: the CSV; `Image Path` is another name for the column `path`. Relative paths count from its folder.
        paths: N pictures (or patients) that the positions count in. Each needs a row; rows of others are ignored.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if columns are missing, a value is none of the known, a path stands twice or lacks a row, or a side
            is empty.
    """
    file = local_path(file)
    if not file.is_file():
        raise FileNotFoundError(f"split: no file {str(file)!r}; give a CSV with the columns path,fold or path,part")
    positions = _positions(paths, file)
    values: dict[int, str] = {}
    n_others = 0
    column, rows = _read_rows(file)
    for line, path, value in rows:
        position = positions.get(path, positions.get(os.path.abspath(file.parent / path)))
        if position is None:
            n_others += 1
        elif position in values:
            raise ValueError(f"split: {str(file)!r}, line {line}: {path!r} has a row already; keep one of the two")
        elif column == PART_COLUMN and value not in PARTS:
            raise ValueError(
                f"split: {str(file)!r}, line {line}: part {value!r} is unknown; write {', '.join(PARTS[:-1])} or "
                f"{PARTS[-1]}"
            )
        elif column == FOLD_COLUMN and value != ALWAYS_TRAINING and not value.isdecimal():
            raise ValueError(
                f"split: {str(file)!r}, line {line}: fold {value!r} is no number; write the number of the fold that "
                f"tests the cell, or {ALWAYS_TRAINING}"
            )
        else:
            values[position] = value
    missing = [str(paths[i]) for i in range(len(paths)) if i not in values]
    if missing:
        raise ValueError(
            f"split: {str(file)!r} has no row for {len(missing)} of {len(paths)} cells, for instance "
            f"{', '.join(map(repr, missing[:N_EXAMPLES]))}; give each a row (part `unused` leaves a cell out)"
        )
    if n_others:
        logger.warning("%s: %d rows are of other cells than the %d at hand", file, n_others, len(paths))
    return _from_column(file, column, np.array([values[i] for i in range(len(paths))], dtype=str))


def _positions(paths: Sequence[str], file: PathLike) -> dict[str, int]:
    positions = {str(path): i for i, path in enumerate(paths)}
    if len(positions) < len(paths):
        twice = next(path for i, path in enumerate(map(str, paths)) if positions[path] != i)
        raise ValueError(f"split: {twice!r} stands twice among the cells, so {str(file)!r} cannot tell which is meant")
    return positions


def _as_column(n_cells: int, split: Split) -> tuple[str, list[str]]:
    values = np.full(n_cells, "", dtype="<U20")
    if len(split.folds) == 1:
        train, test = split.folds[0]
        sides = {
            "train": train,
            "test": test,
            "val": np.empty(0, np.int64) if split.validation is None else split.validation,
        }
        for part, side in sides.items():
            if (values[side] != "").any():
                raise ValueError(f"split: cells of the part {part} are in another part too; put each into one")
            values[side] = part
        values[values == ""] = "unused"
        return PART_COLUMN, values.tolist()
    for number, (train, test) in enumerate(split.folds):
        if (values[test] != "").any() or len(np.intersect1d(train, test)) or len(train) + len(test) != n_cells:
            raise ValueError(
                f"split: fold {number} tests cells that another one tests, or does not train on all other cells; "
                f"write one file a fold"
            )
        values[test] = str(number)
    values[values == ""] = ALWAYS_TRAINING
    return FOLD_COLUMN, values.tolist()


def _from_column(file: Path, column: str, values: np.ndarray) -> Split:
    if column == PART_COLUMN:
        validation = np.flatnonzero(values == "val")
        folds = [(np.flatnonzero(values == "train"), np.flatnonzero(values == "test"))]
    else:
        validation = np.empty(0, dtype=np.int64)
        numbers = sorted({int(value) for value in values[values != ALWAYS_TRAINING]})
        of_cell = np.array([-1 if value == ALWAYS_TRAINING else int(value) for value in values])
        folds = [(np.flatnonzero(of_cell != number), np.flatnonzero(of_cell == number)) for number in numbers]
    if not folds or any(not len(side) for fold in folds for side in fold):
        raise ValueError(f"split: {str(file)!r} leaves nothing to train on or nothing to test; each fold needs both")
    return Split(folds, validation if len(validation) else None)


def _read_rows(file: Path) -> tuple[str, list[tuple[int, str, str]]]:
    """Which of our two columns the file has, and (line, path, value) of its rows."""
    table = open_table(file, "split")
    path_column = next((column for column in PATH_COLUMNS if column in table.columns), None)
    columns = [column for column in (FOLD_COLUMN, PART_COLUMN) if column in table.columns]
    if path_column is None or len(columns) != 1:
        raise ValueError(
            f"split: {str(file)!r} has the columns {table.columns or 'none'}; expected path,{FOLD_COLUMN} or "
            f"path,{PART_COLUMN}"
        )
    rows = table.rows(path_column, columns[0])
    return columns[0], [(line, path, value) for line, (path, value) in rows if path or value]
