"""Draw folds and splits: stratified, by whole patients, by whole data sets; write and read them as files; drop copies.

A fold is (training positions, test positions), both ascending. A patient may be in only one of train, validation and
test.

Letters: N cells (or bags), with a label each. Labels are int64 [N], positions in the class names; patients are N ids,
None to split by cell.
"""

import logging
import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from dinov2.data.datasets.packed import unpacked_table
from dinov2.data.datasets.tables import PART_COLUMN, PATH_COLUMNS, open_table
from dinov2.utils.files import PathLike, atomic_write, file_sha256, local_path

logger = logging.getLogger("dinov2")

Fold: TypeAlias = tuple[np.ndarray, np.ndarray]

FOLD_COLUMN = "fold"
ALWAYS_TRAINING = "train"  # in the column `fold`: never tested
PARTS = ("train", "val", "test", "unused")
N_EXAMPLES = 3


def make_folds(
    labels: np.ndarray, patients: Sequence[str] | None = None, n_folds: int = 5, seed: int = 0
) -> list[Fold]:
    """Draw stratified folds; each cell is in the test side of one fold, except for classes with a single cell.

    Without patients (or with one cell each) a class with a single cell is in the training side of every fold, since its
    test could only fail. With patients, all cells of a patient are tested in one fold.
    """
    labels = np.asarray(labels)
    if n_folds < 2:
        raise ValueError(f"folds: {n_folds}; choose 2 or more")
    if patients is not None and len(patients) != len(labels):
        raise ValueError(f"folds: {len(patients)} patients for {len(labels)} labels; expected one each")
    _check_enough(labels, patients, n_folds, f"folds: {n_folds}", "choose fewer folds")
    candidates, groups = np.arange(len(labels)), patients
    if patients is None or len(set(patients)) == len(labels):
        candidates, groups = np.flatnonzero(np.bincount(labels)[labels] > 1), None
    test_sides = [candidates[test] for test in stratified_parts(labels[candidates], groups, n_folds, seed)]
    if n_empty := sum(not len(test) for test in test_sides):  # some patients have many more cells than others
        raise ValueError(f"folds: {n_empty} of {n_folds} folds have no test cell; choose fewer folds")
    return [(np.setdiff1d(np.arange(len(labels)), test), np.sort(test)) for test in test_sides]


def split_cells(
    labels: np.ndarray, patients: Sequence[str] | None, test_fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one stratified split; all cells of a patient are on one side.

    The cells are divided into round(1 / test_fraction) parts; the part closest to the wanted size is the test set.
    """
    if not 0 < test_fraction <= 0.5:
        raise ValueError(f"--test-fraction {test_fraction}: choose a share above 0 and up to 0.5")
    n_parts = round(1 / test_fraction)
    advice = "choose a larger share, or give --train and --test"
    _check_enough(labels, patients, n_parts, f"--test-fraction {test_fraction}", advice)
    parts = stratified_parts(labels, patients, n_parts, seed)
    test = min(parts, key=lambda part: abs(len(part) * n_parts - len(labels)))  # whole patients: parts differ in size
    return np.setdiff1d(np.arange(len(labels)), test), test


def stratified_parts(labels: np.ndarray, patients: Sequence[str] | None, n_parts: int, seed: int) -> list[np.ndarray]:
    """Divide N cells into parts with similar shares of each label; a patient's cells stay together."""
    folds = StratifiedKFold if patients is None else StratifiedGroupKFold
    with warnings.catch_warnings():
        # describe_folds and the support column of the results show classes with fewer cells than parts
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        return [test for _, test in folds(n_parts, shuffle=True, random_state=seed).split(labels, labels, patients)]


def _check_enough(labels: np.ndarray, patients: Sequence[str] | None, n_parts: int, setting: str, advice: str) -> None:
    """Raise ValueError if `n_parts` exceeds the number of patients, if given, or of cells in the largest class."""
    available = {"cells in its largest class": int(np.bincount(labels).max(initial=0))}
    if patients is not None:
        available["patients"] = len(set(patients))
    for what, n_available in available.items():
        if n_available < n_parts:
            raise ValueError(
                f"{setting}: the set has {n_available} {what}, fewer than the {n_parts} parts to make; {advice}"
            )


def leave_one_dataset_out(datasets: Sequence[str]) -> dict[str, Fold]:
    """Return a fold for each data set, {name: fold}: its cells are the test side, all others the training side."""
    of_cell = np.asarray(datasets, dtype=str)
    names = np.unique(of_cell).tolist()
    if len(names) < 2:
        raise ValueError(
            f"leave one data set out: all {len(of_cell)} cells are of {', '.join(map(repr, names)) or 'none'}; "
            f"at least two data sets are needed"
        )
    return {name: (np.flatnonzero(of_cell != name), np.flatnonzero(of_cell == name)) for name in names}


def few_shot_draws(labels: np.ndarray, n_per_class: int, n_repeats: int, seed: int = 0) -> list[np.ndarray]:
    """Draw positions of `n_per_class` cells a class, ascending, without replacement, `n_repeats` times.

    All cells of a smaller class are drawn. A draw depends on (seed, number of the draw, class) alone: the draw for 5 a
    class contains the draw for 1 a class, and more repeats do not change the first ones.
    """
    labels = np.asarray(labels)
    largest = np.bincount(labels).max(initial=0)
    if n_per_class < 1 or n_repeats < 1:
        raise ValueError(f"few-shot: {n_per_class} a class, {n_repeats} repeats; both must be at least 1")
    if n_per_class > largest:
        raise ValueError(
            f"few-shot: {n_per_class} cells a class asked, but the largest class has {largest} training cells; choose "
            f"at most that"
        )

    def draw(repeat: int, label: int) -> np.ndarray:
        rng = np.random.default_rng([seed, repeat, label])
        return rng.permutation(np.flatnonzero(labels == label))[:n_per_class]

    classes = np.unique(labels).tolist()
    return [np.sort(np.concatenate([draw(repeat, label) for label in classes])) for repeat in range(n_repeats)]


def check_no_patient_on_two_sides(patients: Sequence[str], *sides: np.ndarray) -> None:
    """Raise a ValueError if a patient has cells in more than one of the sides (positions in `patients`)."""
    counts = Counter(patient for side in sides for patient in {patients[int(i)] for i in side})
    shared = sorted(patient for patient, n_sides in counts.items() if n_sides > 1)
    if shared:
        raise ValueError(
            f"split: {len(shared)} of {len(counts)} patients have cells on two sides, for instance "
            f"{', '.join(map(repr, shared[:N_EXAMPLES]))}; put each patient's cells on one side"
        )


def without_copies(
    paths: Sequence[str], folds: Sequence[Fold], sides: tuple[str, str] = ("train", "test")
) -> tuple[list[Fold], dict[str, int]]:
    """Drop the training images of each fold that have the bytes of one of its test images.

    Return the folds, and two counts: `dropped_identical_bytes` (images dropped from at least one fold) and
    `not_checked` (images that are not on this disk). `folds` are positions in `paths`, N image files; `sides`
    names the two parts of a fold in messages.
    """
    files = [os.path.realpath(path) for path in paths]
    for train, test in folds:
        shared = {files[i] for i in train} & {files[i] for i in test}
        if shared:
            examples = ", ".join(sorted(shared)[:N_EXAMPLES])
            raise ValueError(
                f"{sides[0]} and {sides[1]} share {len(shared)} image files, for instance {examples}; "
                f"remove them from one of the two (an image listed twice can also fall on both sides of a split)"
            )
    sizes = pd.Series([os.path.getsize(path) if os.path.isfile(path) else None for path in paths], dtype=float)
    n_unchecked = int(sizes.isna().sum())
    contents = np.arange(len(paths)).astype(object)  # equal for images with equal bytes
    for i in np.flatnonzero(sizes.duplicated(keep=False) & sizes.notna()).tolist():  # no other file has to be read
        contents[i] = file_sha256(paths[i])
    contents = pd.factorize(contents)[0]
    dropped: set[int] = set()
    kept_folds = []
    for train, test in folds:
        is_copy = np.isin(contents[train], contents[test])
        dropped |= set(train[is_copy].tolist())
        if is_copy.all():
            raise ValueError(f"{sides[0]}: every image is a copy of a {sides[1]} image; give other cells")
        kept_folds.append((train[~is_copy], test))
    if dropped:
        examples = ", ".join(paths[i] for i in sorted(dropped)[:N_EXAMPLES])
        text = "%s: %d images are byte-equal to %s images and dropped, for instance %s"
        logger.warning(text, sides[0], len(dropped), sides[1], examples)
    if n_unchecked:
        logger.warning("%d images are not on this disk: whether %s and %s share copies is unknown", n_unchecked, *sides)
    return kept_folds, {"dropped_identical_bytes": len(dropped), "not_checked": n_unchecked}


def describe_folds(labels: np.ndarray, folds: Sequence[Fold], class_names: Sequence[str]) -> dict[str, Any]:
    """Return the sizes of folds and the classes that they lack, ready for JSON; folds count from 0.

    The keys: `train_sizes`, `test_sizes` (one number a fold), `never_tested` ({class: number of its cells, all in
    training}), `not_tested_in` ({class: folds without a test cell of it}) and `not_learned_in` ({class: folds that test
    it and have no training cell of it}).
    """
    labels, n_classes = np.asarray(labels), len(class_names)
    in_train, in_test = (
        np.array([np.bincount(labels[fold[side]], minlength=n_classes) for fold in folds]) for side in (0, 1)
    )  # [folds, C]
    is_tested: np.ndarray = in_test.sum(axis=0) > 0
    in_all = np.bincount(labels, minlength=n_classes)

    def by_class(lacks: np.ndarray) -> dict[str, list[int]]:
        return {class_names[c]: np.flatnonzero(lacks[:, c]).tolist() for c in range(n_classes) if lacks[:, c].any()}

    return {
        "train_sizes": [len(train) for train, _ in folds],
        "test_sizes": [len(test) for _, test in folds],
        "never_tested": {class_names[c]: int(in_all[c]) for c in range(n_classes) if in_all[c] and not is_tested[c]},
        "not_tested_in": by_class((in_test == 0) & is_tested),
        "not_learned_in": by_class((in_train == 0) & (in_test > 0)),
    }


def log_fold_problems(description: Mapping[str, Any]) -> None:
    """Log a warning for each problem in the result of `describe_folds`."""
    never_tested = [f"{name} (cells: {count})" for name, count in description["never_tested"].items()]
    if never_tested:
        logger.warning("classes too small to test, used in training only: %s", "; ".join(never_tested))
    for key, problem in (
        ("not_tested_in", "folds without a test cell of a class"),
        ("not_learned_in", "classes tested without a training cell, so every prediction of them is wrong"),
    ):
        classes = [f"{name} (folds {', '.join(map(str, folds))})" for name, folds in description[key].items()]
        if classes:
            logger.warning("%s: %s", problem, "; ".join(classes))


@dataclass(frozen=True)
class Split:
    """The content of a split file; all sides are positions."""

    folds: list[Fold]  # one fold if the file has a column `part`
    validation: np.ndarray | None = None  # the part `val`; None if the file has none


def write_split(file: PathLike, paths: Sequence[str], split: Split) -> None:
    """Write a CSV that `read_split` reads.

    One fold is written as `path,part` (train, val, test or unused); several as `path,fold`, where `fold` is the number
    of the fold that tests the cell, or `train` for a cell that no fold tests. Each of several folds must train on all
    cells that it does not test. `paths` are N images (or patients).
    """
    _positions(paths, file)
    values = np.full(len(paths), "", dtype="<U20")
    if len(split.folds) == 1:
        column, rest = PART_COLUMN, "unused"
        validation = np.empty(0, np.int64) if split.validation is None else split.validation
        for part, side in zip(("train", "test", "val"), (*split.folds[0], validation), strict=True):
            if (values[side] != "").any():
                raise ValueError(f"split: cells of the part {part} are in another part too; put each into one")
            values[side] = part
    else:
        column, rest = FOLD_COLUMN, ALWAYS_TRAINING
        for number, (train, test) in enumerate(split.folds):
            if (values[test] != "").any() or not np.array_equal(np.sort([*train, *test]), np.arange(len(paths))):
                raise ValueError(
                    f"split: fold {number} tests cells that another one tests, or does not train on all other cells; "
                    f"write one file a fold"
                )
            values[test] = str(number)
    values[values == ""] = rest
    with atomic_write(file, "w") as stream:
        table = pd.DataFrame({"path": list(map(str, paths)), column: values}, dtype=object)
        table.to_csv(stream, index=False, lineterminator="\n")


def read_split(file: PathLike, paths: Sequence[str]) -> Split:
    """Read a CSV with the columns `path,fold` or `path,part`, as `write_split` writes it.

    The column `path` may be called `Image Path`. Relative paths count from the file's folder. Each of `paths`, N images
    (or patients), needs a row; rows of other images are ignored. A file that holds images, such as MedMNIST's, is read
    as the split that it has (see `dinov2.data.datasets.packed`).
    """
    file = local_path(file)
    file = unpacked_table(file, "split") or file
    table = open_table(file, "split")
    path_column, column = table.first_of(PATH_COLUMNS), table.first_of((FOLD_COLUMN, PART_COLUMN))
    if path_column is None or column is None or {FOLD_COLUMN, PART_COLUMN} <= set(table.columns):
        raise ValueError(
            f"split: {str(file)!r} has the columns {table.columns or 'none'}; expected path,{FOLD_COLUMN} or "
            f"path,{PART_COLUMN}"
        )
    positions = _positions(paths, file)
    values: dict[int, str] = {}
    n_rows = 0
    for line, (path, value) in table.rows(path_column, column):
        n_rows += bool(path or value)
        where = f"split: {str(file)!r}, line {line}"
        position = positions.get(path, positions.get(os.path.abspath(file.parent / path)))
        if position is None:
            continue
        if position in values:
            raise ValueError(f"{where}: {path!r} has a row already; keep one of the two")
        if column == PART_COLUMN and value not in PARTS:
            raise ValueError(f"{where}: part {value!r} is unknown; write {', '.join(PARTS[:-1])} or {PARTS[-1]}")
        if column == FOLD_COLUMN and value != ALWAYS_TRAINING and not value.isdecimal():
            raise ValueError(f"{where}: fold {value!r} is no number; write the fold that tests the cell, or train")
        values[position] = value
    missing = [str(path) for i, path in enumerate(paths) if i not in values]
    if missing:
        raise ValueError(
            f"split: {str(file)!r} has no row for {len(missing)} of {len(paths)} cells, for instance "
            f"{', '.join(map(repr, missing[:N_EXAMPLES]))}; give each a row (part `unused` leaves a cell out)"
        )
    if n_rows > len(values):
        logger.warning("%s: %d rows are of other cells than the %d given", file, n_rows - len(values), len(paths))
    texts, validation = np.array([values[i] for i in range(len(paths))], dtype=str), None
    if column == PART_COLUMN:
        folds = [(np.flatnonzero(texts == "train"), np.flatnonzero(texts == "test"))]
        validation = np.flatnonzero(texts == "val") if "val" in texts else None
    else:
        fold_of = np.where(texts == ALWAYS_TRAINING, "-1", texts).astype(np.int64)
        numbers = np.unique(fold_of[fold_of >= 0])
        folds = [(np.flatnonzero(fold_of != number), np.flatnonzero(fold_of == number)) for number in numbers]
    if not folds or any(not len(side) for fold in folds for side in fold):
        raise ValueError(f"split: {str(file)!r} leaves nothing to train on or nothing to test; each fold needs both")
    return Split(folds, validation)


def _positions(paths: Sequence[str], file: PathLike) -> dict[str, int]:
    """Return {path: position}; raise a ValueError if a path stands twice."""
    positions = {str(path): i for i, path in enumerate(paths)}
    if len(positions) < len(paths):
        twice = next(path for path, n in Counter(map(str, paths)).items() if n > 1)
        raise ValueError(f"split: {twice!r} stands twice among the cells, so {str(file)!r} cannot tell which is meant")
    return positions
