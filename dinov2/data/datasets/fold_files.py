"""Folds of patients in files: a table that `FoldFiles.write` wrote, or GenBloom's folders of CSVs."""

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path

from dinov2.data.datasets.bags import OTHER_NAMES, PathLike, list_names, one_label_each
from dinov2.data.datasets.tables import read_table
from dinov2.utils.files import atomic_write
from dinov2.utils.paths import local_path

PARTS = ("train", "val", "test")
CLASS_NAMES_FILE = "label_to_diagnose.csv"


@dataclass(frozen=True)
class FoldFiles:
    """Folds of patients.

    Attributes:
        folds: for each, {"train" | "val" | "test": patients}; no patient is on two sides of a fold.
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
            writer.writerow(("fold", "part", "patient", "label"))
            for name, fold in zip(self.names, self.folds, strict=True):
                writer.writerows(
                    (name, part, patient, self.labels[patient]) for part in PARTS for patient in fold[part]
                )


def read_fold_files(path: PathLike) -> FoldFiles:
    """Read official folds, or those that `FoldFiles.write` wrote.

    Args:
        path: a CSV with the columns `fold,part,patient,label`, or a folder of folders with `train.csv`, `val.csv` and
            `test.csv` each, with the columns `patient,label`, as GenBloom has them. A `test.csv` beside the folders is
            that of every fold without its own. Where `label_to_diagnose.csv` (columns `label_name,label_id`) lies
            beside them, labels are ids and get their names from there.

    Raises:
        FileNotFoundError: if there is nothing at `path`, or a file is missing.
        ValueError: if a file is malformed, a fold lacks a part, a patient has two labels or is on two sides of a fold.
    """
    path = local_path(path)
    rows = _rows_of_fold_folders(path) if path.is_dir() else _read(path, ("fold", "part", "patient", "label"))
    unknown = sorted({row["part"] for row in rows} - set(PARTS))
    if unknown:
        raise ValueError(f"fold files: {str(path)!r} has the part {list_names(unknown)}; write {', '.join(PARTS)}")
    found: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        found.setdefault(row["fold"], {part: [] for part in PARTS})[row["part"]].append(row["patient"])
    for name, fold in found.items():
        lacking = [part for part in PARTS if not fold[part]]
        if lacking:
            raise ValueError(
                f"fold files: fold {name!r} of {str(path)!r} has no patient in {' and '.join(lacking)}; add some"
            )
        counts = Counter(chain.from_iterable(fold.values()))
        twice = sorted(patient for patient, count in counts.items() if count > 1)
        if twice:
            raise ValueError(
                f"fold files: in fold {name!r} of {str(path)!r} {list_names(twice)} stand twice among train, val and "
                f"test; a patient may be in only one of them"
            )
    names = sorted(found, key=_natural)
    labels = one_label_each(((row["patient"], row["label"]) for row in rows), f"fold files {str(path)!r}")
    return FoldFiles([found[name] for name in names], names, labels)


def _read(file: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    return read_table(file, "fold files", columns, other_names=OTHER_NAMES)


def _rows_of_fold_folders(folder: Path) -> list[dict[str, str]]:
    """Read rows with the columns fold, part, patient, label."""
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
            rows.append({"fold": fold_folder.name, "part": part, "patient": row["patient"], "label": label})
    return rows


def _natural(name: str) -> tuple[int, str]:
    """Return a key that sorts fold_2 before fold_10."""
    digits = "".join(filter(str.isdecimal, name))
    return int(digits or -1), name
