"""Folds of patients into training, validation and test set: drawn, checked, and kept in files.

Letters: P patients, C classes.
"""

import csv
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path

import numpy as np

from dinov2.data.datasets.bags import (
    OTHER_NAMES,
    PathLike,
    PatientBags,
    check_no_bag_twice,
    list_names,
    one_label_each,
)
from dinov2.data.datasets.tables import read_table
from dinov2.data.splits import make_folds
from dinov2.utils.files import atomic_write
from dinov2.utils.paths import local_path

logger = logging.getLogger("dinov2")

PROTOCOLS = {"dinobloom": 4, "crossval": 5}  # and their default numbers of folds
PARTS = ("train", "val", "test")
COLUMNS = ("fold", "part", "patient", "label")
CLASS_NAMES_FILE = "label_to_diagnose.csv"


@dataclass(frozen=True, eq=False)
class BagFold:
    """Positions of training, validation and test patients, each int64 and ascending."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


def dinobloom_folds(
    labels: np.ndarray, patients: Sequence[str], n_folds: int = 4, seed: int = 0, test: np.ndarray | None = None
) -> list[BagFold]:
    """Draw one test set, and `n_folds` stratified parts of the other patients, each the validation set once.

    Args:
        labels: int64 [P].
        patients: P ids.
        n_folds: 2 or more.
        seed: of the draws.
        test: positions of the test patients; None takes the first of n_folds + 1 stratified parts.

    Raises:
        ValueError: if there are too few patients.
    """
    if test is None:
        rest, test = make_folds(labels, patients, n_folds + 1, seed)[0]
    else:
        rest = np.setdiff1d(np.arange(len(labels)), test)
    parts = make_folds(labels[rest], [patients[i] for i in rest], n_folds, seed)
    return [BagFold(rest[train], rest[val], test) for train, val in parts]


def crossval_folds(labels: np.ndarray, patients: Sequence[str], n_folds: int = 5, seed: int = 0) -> list[BagFold]:
    """Draw `n_folds` stratified parts, each the test set once; the next part is then the validation set.

    Args: as for `dinobloom_folds`, but n_folds is 3 or more.

    Raises:
        ValueError: if there are too few patients or parts.
    """
    if n_folds < 3:
        raise ValueError(f"--folds {n_folds}: protocol crossval needs a part to test, one to stop by and one to train")
    parts = make_folds(labels, patients, n_folds, seed)
    following = [test for _, test in parts[1:] + parts[:1]]
    return [BagFold(np.setdiff1d(rest, val), val, test) for (rest, test), val in zip(parts, following, strict=True)]


def check_folds(folds: Sequence[BagFold], labels: np.ndarray, class_names: Sequence[str]) -> None:
    """Check that every fold can be trained on and keeps its parts apart.

    A class that a validation or test part lacks is only a warning.

    Raises:
        ValueError: if all patients are of one class, a part is empty, a patient is in two parts of a fold, or a
            training part lacks a class.
    """
    classes = np.unique(labels)
    if len(classes) < 2:
        names = ", ".join(class_names[i] for i in classes)
        raise ValueError(f"labels: all patients are {names or 'missing'}, one class, so there is nothing to learn")
    for number, fold in enumerate(folds):
        parts = {part: getattr(fold, part) for part in PARTS}
        empty = [name for name, part in parts.items() if not len(part)]
        if empty:
            raise ValueError(f"fold {number}: its part {' and '.join(empty)} has no patient; each needs at least one")
        n_repeated = sum(count > 1 for count in Counter(chain(*parts.values())).values())
        if n_repeated:
            raise ValueError(
                f"fold {number}: {n_repeated} patients are in it more than once; a patient may be in only one of "
                f"train, validation and test"
            )
        for name, part in parts.items():
            lacking = ", ".join(class_names[i] for i in np.setdiff1d(classes, labels[part]))
            if lacking and name == "train":
                raise ValueError(
                    f"fold {number}: no patient of {lacking} in its training part, so it cannot be learned; take other "
                    f"folds, another --seed, or leave the class out"
                )
            if lacking:
                logger.warning("fold %d: no patient of %s in its part %s", number, lacking, name)


@dataclass(frozen=True, eq=False)
class FoldedBags:
    """P labelled bags and their folds.

    Attributes:
        bags: with labels; no two patients have the same cells.
        folds: positions of bags.
        fold_names: a name for each fold.
    """

    bags: PatientBags
    folds: list[BagFold]
    fold_names: list[str]

    def __post_init__(self) -> None:
        check_no_bag_twice(self.bags)
        check_folds(self.folds, self.labels, self.bags.class_names)

    @property
    def labels(self) -> np.ndarray:
        """Return the classes, int64 [P]."""
        return self.bags.known_labels()

    @property
    def learned(self) -> np.ndarray:
        """Return the positions of all training and validation patients, ascending."""
        return np.unique(np.concatenate([part for fold in self.folds for part in (fold.train, fold.val)]))

    def names_of(self, fold: BagFold) -> dict[str, list[str]]:
        """Return {"train" | "val" | "test": patients} of a fold."""
        return {part: [self.bags.patients[i] for i in getattr(fold, part)] for part in PARTS}


def draw_folds(
    bags: PatientBags,
    protocol: str = "dinobloom",
    n_folds: int | None = None,
    seed: int = 0,
    test: np.ndarray | None = None,
) -> FoldedBags:
    """Draw the folds of a protocol.

    Args:
        bags: with labels.
        protocol: a key of `PROTOCOLS`.
        n_folds: None for the protocol's default.
        seed: of the draws.
        test: positions of the test patients, for `dinobloom`; None draws them.

    Raises:
        ValueError: if the bags have no labels, there are too few patients, or as `check_folds`.
    """
    labels, n_folds = bags.known_labels(), n_folds or PROTOCOLS[protocol]
    if protocol == "crossval":
        folds = crossval_folds(labels, bags.patients, n_folds, seed)
    else:
        folds = dinobloom_folds(labels, bags.patients, n_folds, seed, test)
    return FoldedBags(bags, folds, [str(number) for number in range(len(folds))])


@dataclass(frozen=True)
class FoldFiles:
    """Folds of patients as files hold them.

    Attributes:
        folds: for each, {"train" | "val" | "test": patients}; a patient is in only one part of a fold.
        names: of the folds.
        labels: {patient: class}, of all patients in the files.
    """

    folds: list[dict[str, list[str]]]
    names: list[str]
    labels: dict[str, str]

    def write(self, file: PathLike) -> None:
        """Write one CSV with the columns `fold,part,patient,label`, which `read_fold_files` reads."""
        with atomic_write(file, "w") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(COLUMNS)
            for name, fold in zip(self.names, self.folds, strict=True):
                writer.writerows(
                    (name, part, patient, self.labels[patient]) for part in PARTS for patient in fold[part]
                )


def read_fold_files(path: PathLike) -> FoldFiles:
    """Read official folds, or the folds.csv of another run.

    Args:
        path: a CSV with the columns `fold,part,patient,label`, or GenBloom's layout: a folder with a folder for each
            fold, which has `train.csv`, `val.csv` and `test.csv` with the columns `patient,label`. A `test.csv` beside
            the folders serves every fold without its own. Where `label_to_diagnose.csv` (columns
            `label_name,label_id`) lies beside them, the labels are ids, and this file has their names.

    Raises:
        FileNotFoundError: if there is nothing at `path`, or a file is missing.
        ValueError: if a file is malformed, a fold lacks a part, a patient has two labels or is in two parts of a fold.
    """
    path = local_path(path)
    rows = _rows_of_fold_folders(path) if path.is_dir() else _read(path, COLUMNS)
    unknown = sorted({row["part"] for row in rows} - set(PARTS))
    if unknown:
        raise ValueError(f"fold files: {str(path)!r} has the part {list_names(unknown)}; write {', '.join(PARTS)}")
    folds: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        folds.setdefault(row["fold"], {part: [] for part in PARTS})[row["part"]].append(row["patient"])
    for name, fold in folds.items():
        empty = [part for part in PARTS if not fold[part]]
        if empty:
            raise ValueError(
                f"fold files: fold {name!r} of {str(path)!r} has no patient in {' and '.join(empty)}; add some"
            )
        repeated = sorted(patient for patient, count in Counter(chain(*fold.values())).items() if count > 1)
        if repeated:
            raise ValueError(
                f"fold files: in fold {name!r} of {str(path)!r} {list_names(repeated)} stand twice among train, val "
                f"and test; a patient may be in only one of them"
            )
    names = sorted(folds, key=_natural_order)
    labels = one_label_each(((row["patient"], row["label"]) for row in rows), f"fold files {str(path)!r}")
    return FoldFiles([folds[name] for name in names], names, labels)


def folds_from_files(bags: PatientBags, files: FoldFiles, source: str) -> FoldedBags:
    """Take the folds of files, and their labels if the bags have none; leave out bags that are in no fold.

    Raises:
        ValueError: if a patient of the files has no bag or another label than its bag, or as `check_folds`.
    """
    chosen = bags.positions(files.labels, source)
    if len(chosen) < len(bags):
        logger.warning("%d of %d bags are in no fold and left out", len(bags) - len(chosen), len(bags))
    bags = bags.select(chosen)
    if bags.labels is None:
        bags = bags.with_labels(files.labels)
    elif set(files.labels.values()) <= set(bags.class_names):  # other names, such as numbers, cannot be compared
        one_label_each([*bags.label_of().items(), *files.labels.items()], "bags and --fold-files")
    folds = [BagFold(*(bags.positions(fold[part], "fold files") for part in PARTS)) for fold in files.folds]
    return FoldedBags(bags, folds, files.names)


def _read(file: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    return read_table(file, "fold files", columns, other_names=OTHER_NAMES)


def _rows_of_fold_folders(folder: Path) -> list[dict[str, str]]:
    """Read the rows of all files in GenBloom's layout, with the columns fold, part, patient, label."""
    fold_folders = sorted(file.parent for file in folder.glob("[!.]*/train.csv"))
    if not fold_folders:
        raise FileNotFoundError(
            f"fold files: no folder in {str(folder)!r} has a train.csv; expected <fold>/train.csv, val.csv and test.csv"
        )
    names_file = folder / CLASS_NAMES_FILE
    class_names = _read(names_file, ("label_name", "label_id")) if names_file.is_file() else []
    name_of_id = {row["label_id"]: row["label_name"] for row in class_names}
    rows = []
    for fold_folder, part in product(fold_folders, PARTS):
        file = fold_folder / f"{part}.csv"
        if part == "test" and not file.is_file():
            file = folder / file.name
        if not file.is_file():
            raise FileNotFoundError(f"fold files: {str(fold_folder)!r} has no {part}.csv; add it")
        for row in _read(file, ("patient", "label")):
            if name_of_id and row["label"] not in name_of_id:
                raise ValueError(
                    f"fold files: {str(file)!r} has the label {row['label']!r}, which {CLASS_NAMES_FILE} does not "
                    f"name; add it there"
                )
            label = name_of_id.get(row["label"], row["label"])
            rows.append(dict(zip(COLUMNS, (fold_folder.name, part, row["patient"], label), strict=True)))
    return rows


def _natural_order(name: str) -> tuple[int, str]:
    """Return a key that sorts fold_2 before fold_10."""
    digits = "".join(filter(str.isdecimal, name))
    return int(digits or -1), name
