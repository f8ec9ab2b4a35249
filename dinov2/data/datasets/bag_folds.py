"""Folds of patients into training, validation and test set: drawn, checked, and kept in files.

Letters: P patients, C classes
"""

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from dinov2.data.datasets.bag_layouts import OTHER_NAMES, list_names
from dinov2.data.datasets.bags import PatientBags, one_label_each
from dinov2.data.datasets.tables import read_table
from dinov2.data.splits import make_folds
from dinov2.utils.files import PathLike, atomic_write, local_path

logger = logging.getLogger("dinov2")

PROTOCOLS = {"dinobloom": 4, "crossval": 5, "robust": 5}  # and their default numbers of folds
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
    """P labelled bags and their folds; no two patients have the same cells, and no fold has a patient in two parts.

    A class that a validation or test part lacks is only a warning.
    """

    bags: PatientBags
    folds: list[BagFold]
    fold_names: list[str]

    def __post_init__(self) -> None:
        names, classes = self.bags.class_names, np.unique(self.labels)
        patients = pd.Series(self.bags.patients).groupby(self.bags.bag_hashes(), sort=False).agg(list)
        repeated = patients[patients.map(len) > 1]
        if len(repeated):
            raise ValueError(
                f"bags: {list_names(repeated.iloc[0])} have the same cells, so one patient has several names; keep one"
            )
        if len(classes) < 2:
            raise ValueError(f"labels: all patients are {names[classes[0]]}, one class, so there is nothing to learn")
        for fold_name, fold in zip(self.fold_names, self.folds, strict=True):
            parts = {part: getattr(fold, part) for part in PARTS}
            empty = [part for part in PARTS if not len(parts[part])]
            if empty:
                raise ValueError(f"fold {fold_name}: its part {empty[0]} has no patient; each needs at least one")
            _, counts = np.unique(np.concatenate(list(parts.values())), return_counts=True)
            if (counts > 1).any():
                raise ValueError(
                    f"fold {fold_name}: {(counts > 1).sum()} patients are in it more than once; a patient may be in "
                    f"only one of train, validation and test"
                )
            for part, positions in parts.items():
                lacking = ", ".join(names[i] for i in np.setdiff1d(classes, self.labels[positions]))
                if lacking and part == "train":
                    raise ValueError(
                        f"fold {fold_name}: no patient of {lacking} in its training part, so it cannot be learned; "
                        f"take other folds, another --seed, or leave the class out"
                    )
                if lacking:
                    logger.warning("fold %s: no patient of %s in its part %s", fold_name, lacking, part)

    @property
    def labels(self) -> np.ndarray:
        """Return the classes, int64 [P]."""
        return self.bags.known_labels()

    @property
    def learned(self) -> np.ndarray:
        """Return the positions of all training and validation patients, ascending."""
        return np.unique(np.concatenate([part for fold in self.folds for part in (fold.train, fold.val)]))

    def test_sets(self, learned: Sequence[str] = ("train", "val")) -> list[BagFold]:
        """Return a fold for each different test set, with the patients of its folds' `learned` parts as `train`."""
        parts: dict[tuple[int, ...], list[np.ndarray]] = defaultdict(list)
        for fold in self.folds:
            parts[tuple(fold.test.tolist())] += [getattr(fold, part) for part in learned]
        none = np.empty(0, dtype=np.int64)
        return [
            BagFold(np.unique(np.concatenate(of_set)), none, np.array(test, dtype=np.int64))
            for test, of_set in parts.items()
        ]

    def write(self, file: PathLike) -> None:
        """Write the folds as a CSV that `folds_from_files` reads."""
        labels = list(self.bags.label_of().values())
        with atomic_write(file, "w") as stream:
            table = fold_table(self.folds, self.fold_names, self.bags.patients, labels)
            table.to_csv(stream, index=False, lineterminator="\n")


def fold_table(
    folds: Sequence[BagFold], fold_names: Sequence[str], patients: Sequence[str], labels: Sequence[str]
) -> pd.DataFrame:
    """Return the folds of P patients with their classes as a table with the columns `fold,part,patient,label`."""
    rows = [
        (name, part, patients[i], labels[i])
        for name, fold in zip(fold_names, folds, strict=True)
        for part in PARTS
        for i in getattr(fold, part)
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def draw_folds(
    bags: PatientBags,
    protocol: str = "dinobloom",
    n_folds: int | None = None,
    seed: int = 0,
    test: np.ndarray | None = None,
) -> FoldedBags:
    """Draw the folds of a protocol for labelled bags, as `draw_positions` does; they are named 0, 1, ..."""
    folds = draw_positions(bags.known_labels(), bags.patients, protocol, n_folds, seed, test)
    return FoldedBags(bags, folds, [str(number) for number in range(len(folds))])


def draw_positions(
    labels: np.ndarray,
    patients: Sequence[str],
    protocol: str = "dinobloom",
    n_folds: int | None = None,
    seed: int = 0,
    test: np.ndarray | None = None,
) -> list[BagFold]:
    """Draw the folds of a protocol, stratified by class; `n_folds` None is the protocol's default.

    `dinobloom` has one test set: the patients at the positions `test`, or the first of n_folds + 1 parts. Each of
    `n_folds` parts of the others is the validation set once. `crossval` has `n_folds` parts; each is the test set once,
    and the next part is then the validation set. `robust` is `crossval`, or `dinobloom` where there is a test set.
    `labels` are int64 [P]; the order of the P patients matters.
    """
    n_folds = n_folds or PROTOCOLS[protocol]
    if protocol == "crossval" or (protocol == "robust" and test is None):
        if n_folds < 3:
            raise ValueError(f"--folds {n_folds}: protocol {protocol} needs parts to test, to stop by and to train")
        parts = make_folds(labels, patients, n_folds, seed)
        pairs = zip(parts, parts[1:] + parts[:1], strict=True)
        return [BagFold(np.setdiff1d(rest, val), val, tested) for (rest, tested), (_, val) in pairs]
    if test is None:
        test = make_folds(labels, patients, n_folds + 1, seed)[0][1]
    rest = np.setdiff1d(np.arange(len(labels)), test)
    parts = make_folds(labels[rest], [patients[i] for i in rest], n_folds, seed)
    return [BagFold(rest[train], rest[val], test) for train, val in parts]


def folds_from_files(bags: PatientBags, path: PathLike) -> FoldedBags:
    """Take the folds of files, and their labels if the bags have none; leave out bags that are in no fold.

    `path` is a table with the columns `fold,part,patient,label`, such as the folds.csv of another run, or GenBloom's
    layout: a folder with a folder for each fold, which has `train.csv`, `val.csv` and `test.csv` with the columns
    `patient,label` (or `patient_name` or `patient_files`, and `labels`). A `test.csv` beside the folders serves every
    fold without its own. Where `label_to_diagnose.csv` (columns `label_name,label_id`) lies beside them, the labels are
    ids, and this file has their names. Bags with labels keep them; the files may have other names for the classes.
    """
    path = local_path(path)
    table = _read_fold_folders(path) if path.is_dir() else _read(path, COLUMNS)
    unknown = sorted(set(table["part"]) - set(PARTS))
    if unknown:
        raise ValueError(f"fold files: {str(path)!r} has the part {list_names(unknown)}; write {', '.join(PARTS)}")
    labels = one_label_each(zip(table["patient"], table["label"], strict=True), f"fold files {str(path)!r}")
    chosen = bags.positions(labels, f"--fold-files {path}")
    if len(chosen) < len(bags):
        logger.warning("%d of %d bags are in no fold and left out", len(bags) - len(chosen), len(bags))
    bags = bags.select(chosen)
    if bags.labels is None:
        bags = bags.with_labels(labels)
    elif set(labels.values()) <= set(bags.class_names):
        one_label_each([*bags.label_of().items(), *labels.items()], "bags and --fold-files")
    else:
        _compare_classes(bags.label_of(), labels)
    # fold_2 before fold_10
    names = sorted(sorted(set(table["fold"])), key=lambda name: int("".join(filter(str.isdecimal, name)) or -1))
    patients = table.groupby(["fold", "part"])["patient"].apply(list).to_dict()
    folds = [
        BagFold(*(bags.positions(patients.get((name, part), []), "fold files") for part in PARTS)) for name in names
    ]
    return FoldedBags(bags, folds, names)


def _compare_classes(label_of: Mapping[str, str], other_names: Mapping[str, str]) -> None:
    """Log which class of the bags has which name in the fold files; warn if the two are not the same classes."""
    pairs = sorted({(label, other_names[patient]) for patient, label in label_of.items()})
    text = ", ".join(f"{label} is {other}" for label, other in pairs)
    if all(len(set(names)) == len(pairs) for names in zip(*pairs, strict=True)):
        logger.info("the classes of the bags have other names in the fold files: %s", text)
    else:
        logger.warning("the bags and the fold files have different classes; those of the bags count: %s", text)


def _read(file: Path, columns: Sequence[str]) -> pd.DataFrame:
    return pd.DataFrame(read_table(file, "fold files", columns, other_names=OTHER_NAMES))


def _read_fold_folders(folder: Path) -> pd.DataFrame:
    """Read all files in GenBloom's layout as one table."""
    fold_folders = sorted(file.parent for file in folder.glob("[!.]*/train.csv"))
    if not fold_folders:
        expected = "<fold>/train.csv, val.csv and test.csv"
        raise FileNotFoundError(f"fold files: no folder in {str(folder)!r} has a train.csv; expected {expected}")
    tables = []
    for fold_folder, part in product(fold_folders, PARTS):
        file, shared = fold_folder / f"{part}.csv", folder / "test.csv"
        if part == "test" and shared.is_file() and not file.is_file():
            file = shared
        tables.append(_read(file, ("patient", "label")).assign(fold=fold_folder.name, part=part))
    table = pd.concat(tables)
    names_file = folder / CLASS_NAMES_FILE
    if names_file.is_file():
        name_of_id = _read(names_file, ("label_name", "label_id")).set_index("label_id")["label_name"].to_dict()
        unknown = sorted(set(table["label"]) - set(name_of_id))
        if unknown:
            what = f"the label {list_names(unknown)}, which {CLASS_NAMES_FILE} does not name"
            raise ValueError(f"fold files: {str(folder)!r} has {what}; add it there")
        table["label"] = table["label"].map(name_of_id)
    return table
