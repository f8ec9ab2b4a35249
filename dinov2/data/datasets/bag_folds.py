"""Folds of patients into training, validation and test set: drawn, checked, and kept in files.

Letters: P patients, C classes.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path

import numpy as np
import pandas as pd

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
        check_folds(self.folds, self.labels, self.bags.class_names, self.fold_names)

    @property
    def labels(self) -> np.ndarray:
        """Return the classes, int64 [P]."""
        return self.bags.known_labels()

    @property
    def learned(self) -> np.ndarray:
        """Return the positions of all training and validation patients, ascending."""
        return np.unique(np.concatenate([part for fold in self.folds for part in (fold.train, fold.val)]))

    def write(self, file: PathLike) -> None:
        """Write the folds as a CSV that `read_fold_files` reads."""
        label_of, patients = self.bags.label_of(), self.bags.patients
        rows = [
            (name, part, patients[i], label_of[patients[i]])
            for name, fold in zip(self.fold_names, self.folds, strict=True)
            for part in PARTS
            for i in getattr(fold, part)
        ]
        with atomic_write(file, "w") as stream:
            pd.DataFrame(rows, columns=COLUMNS).to_csv(stream, index=False, lineterminator="\n")


def check_folds(
    folds: Sequence[BagFold], labels: np.ndarray, class_names: Sequence[str], fold_names: Sequence[str]
) -> None:
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
    for name, fold in zip(fold_names, folds, strict=True):
        parts = {part: getattr(fold, part) for part in PARTS}
        empty = [part for part in PARTS if not len(parts[part])]
        if empty:
            raise ValueError(f"fold {name}: its part {' and '.join(empty)} has no patient; each needs at least one")
        n_repeated = sum(count > 1 for count in Counter(chain(*parts.values())).values())
        if n_repeated:
            raise ValueError(
                f"fold {name}: {n_repeated} patients are in it more than once; a patient may be in only one of train, "
                f"validation and test"
            )
        for part, positions in parts.items():
            lacking = ", ".join(class_names[i] for i in np.setdiff1d(classes, labels[positions]))
            if lacking and part == "train":
                raise ValueError(
                    f"fold {name}: no patient of {lacking} in its training part, so it cannot be learned; take other "
                    f"folds, another --seed, or leave the class out"
                )
            if lacking:
                logger.warning("fold %s: no patient of %s in its part %s", name, lacking, part)


def draw_folds(
    bags: PatientBags,
    protocol: str = "dinobloom",
    n_folds: int | None = None,
    seed: int = 0,
    test: np.ndarray | None = None,
) -> FoldedBags:
    """Draw the folds of a protocol, stratified by class.

    `dinobloom` has one test set; each of `n_folds` parts of the other patients is the validation set once. `crossval`
    has `n_folds` parts; each is the test set once, and the next part is then the validation set.

    Args:
        bags: with labels.
        protocol: a key of `PROTOCOLS`.
        n_folds: None for the protocol's default.
        seed: of the draws.
        test: for `dinobloom`, positions of the test patients; None takes the first of n_folds + 1 parts.

    Raises:
        ValueError: if the bags have no labels, there are too few patients, or as `check_folds`.
    """
    labels, patients, n_folds = bags.known_labels(), bags.patients, n_folds or PROTOCOLS[protocol]
    if protocol == "crossval":
        if n_folds < 3:
            raise ValueError(
                f"--folds {n_folds}: protocol crossval needs a part to test, one to stop by and one to train"
            )
        parts = make_folds(labels, patients, n_folds, seed)
        following = [part for _, part in parts[1:] + parts[:1]]
        folds = [
            BagFold(np.setdiff1d(rest, val), val, tested) for (rest, tested), val in zip(parts, following, strict=True)
        ]
    else:
        if test is None:
            test = make_folds(labels, patients, n_folds + 1, seed)[0][1]
        rest = np.setdiff1d(np.arange(len(labels)), test)
        parts = make_folds(labels[rest], [patients[i] for i in rest], n_folds, seed)
        folds = [BagFold(rest[train], rest[val], test) for train, val in parts]
    return FoldedBags(bags, folds, [str(number) for number in range(len(folds))])


def folds_from_files(bags: PatientBags, path: PathLike) -> FoldedBags:
    """Take the folds of files, and their labels if the bags have none; leave out bags that are in no fold.

    Raises:
        FileNotFoundError, ValueError: as `read_fold_files` and `check_folds`; if a patient of the files has two labels,
            no bag, or another label than its bag.
    """
    table = read_fold_files(path)
    labels = one_label_each(zip(table["patient"], table["label"], strict=True), f"fold files {str(path)!r}")
    chosen = bags.positions(labels, f"--fold-files {path}")
    if len(chosen) < len(bags):
        logger.warning("%d of %d bags are in no fold and left out", len(bags) - len(chosen), len(bags))
    bags = bags.select(chosen)
    if bags.labels is None:
        bags = bags.with_labels(labels)
    elif set(labels.values()) <= set(bags.class_names):  # other names, such as numbers, cannot be compared
        one_label_each([*bags.label_of().items(), *labels.items()], "bags and --fold-files")
    names = sorted(table["fold"].unique(), key=_natural_order)
    patients = table.groupby(["fold", "part"])["patient"].apply(list).to_dict()
    folds = [
        BagFold(*(bags.positions(patients.get((name, part), []), "fold files") for part in PARTS)) for name in names
    ]
    return FoldedBags(bags, folds, names)


def read_fold_files(path: PathLike) -> pd.DataFrame:
    """Read official folds, or the folds.csv of another run: a table with the columns `fold,part,patient,label`.

    Args:
        path: a CSV with these columns, or GenBloom's layout: a folder with a folder for each fold, which has
            `train.csv`, `val.csv` and `test.csv` with the columns `patient,label`. A `test.csv` beside the folders
            serves every fold without its own. Where `label_to_diagnose.csv` (columns `label_name,label_id`) lies
            beside them, the labels are ids, and this file has their names.

    Raises:
        FileNotFoundError: if there is nothing at `path`, or a file is missing.
        ValueError: if a file is malformed or names an unknown part.
    """
    path = local_path(path)
    table = _read_fold_folders(path) if path.is_dir() else _read(path, COLUMNS)
    unknown = sorted(set(table["part"]) - set(PARTS))
    if unknown:
        raise ValueError(f"fold files: {str(path)!r} has the part {list_names(unknown)}; write {', '.join(PARTS)}")
    return table


def _read(file: Path, columns: Sequence[str]) -> pd.DataFrame:
    return pd.DataFrame(read_table(file, "fold files", columns, other_names=OTHER_NAMES))


def _read_fold_folders(folder: Path) -> pd.DataFrame:
    """Read all files in GenBloom's layout as one table."""
    fold_folders = sorted(file.parent for file in folder.glob("[!.]*/train.csv"))
    if not fold_folders:
        raise FileNotFoundError(
            f"fold files: no folder in {str(folder)!r} has a train.csv; expected <fold>/train.csv, val.csv and test.csv"
        )
    tables = []
    for fold_folder, part in product(fold_folders, PARTS):
        file = fold_folder / f"{part}.csv"
        if part == "test" and not file.is_file():
            file = folder / file.name
        if not file.is_file():
            raise FileNotFoundError(f"fold files: {str(fold_folder)!r} has no {part}.csv; add it")
        tables.append(_read(file, ("patient", "label")).assign(fold=fold_folder.name, part=part))
    table = pd.concat(tables)
    names_file = folder / CLASS_NAMES_FILE
    if names_file.is_file():
        name_of_id = _read(names_file, ("label_name", "label_id")).set_index("label_id")["label_name"].to_dict()
        unknown = sorted(set(table["label"]) - set(name_of_id))
        if unknown:
            raise ValueError(
                f"fold files: {str(folder)!r} has the label {list_names(unknown)}, which {CLASS_NAMES_FILE} does not "
                f"name; add it there"
            )
        table["label"] = table["label"].map(name_of_id)
    return table


def _natural_order(name: str) -> tuple[int, str]:
    """Return a key that sorts fold_2 before fold_10."""
    digits = "".join(filter(str.isdecimal, name))
    return int(digits or -1), name
