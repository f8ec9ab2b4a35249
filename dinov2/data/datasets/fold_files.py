"""Folds of patients in files: a table that `FoldFiles.write` wrote, or GenBloom's folders of CSVs."""

import csv
from collections import Counter
from dataclasses import dataclass
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
    rows = _rows_of_fold_folders(path) if path.is_dir() else _rows_of_fold_table(path)
    names = sorted({row["fold"] for row in rows}, key=_natural)
    folds = [
        {part: [r["patient"] for r in rows if (r["fold"], r["part"]) == (name, part)] for part in PARTS}
        for name in names
    ]
    for name, fold in zip(names, folds, strict=True):
        lacking = [part for part in PARTS if not fold[part]]
        if lacking:
            raise ValueError(
                f"fold files: fold {name!r} of {str(path)!r} has no patient in {' and '.join(lacking)}; add some"
            )
        counts = Counter(patient for part in PARTS for patient in fold[part])
        twice = sorted(patient for patient, count in counts.items() if count > 1)
        if twice:
            raise ValueError(
                f"fold files: in fold {name!r} of {str(path)!r} {list_names(twice)} stand twice among train, val and "
                f"test; a patient may be in only one of them"
            )
    labels = one_label_each(((row["patient"], row["label"]) for row in rows), f"fold files {str(path)!r}")
    return FoldFiles(folds, names, labels)


def _rows_of_fold_table(file: Path) -> list[dict[str, str]]:
    rows = read_table(file, "fold files", ("fold", "part", "patient", "label"), other_names=OTHER_NAMES)
    unknown = sorted({row["part"] for row in rows} - set(PARTS))
    if unknown:
        raise ValueError(f"fold files: {str(file)!r} has the part {list_names(unknown)}; write {', '.join(PARTS)}")
    return rows


def _rows_of_fold_folders(folder: Path) -> list[dict[str, str]]:
    """Read rows with the columns fold, part, patient, label."""
    fold_folders = [
        entry for entry in sorted(folder.iterdir()) if (entry / "train.csv").is_file() and entry.name[0] != "."
    ]
    if not fold_folders:
        raise FileNotFoundError(
            f"fold files: no folder in {str(folder)!r} has a train.csv; expected <fold>/train.csv, val.csv and test.csv"
        )
    names_of_ids = _names_of_ids(folder / CLASS_NAMES_FILE)
    rows = []
    for fold_folder in fold_folders:
        for part in PARTS:
            file = fold_folder / f"{part}.csv"
            if part == "test" and not file.is_file():
                file = folder / file.name
            if not file.is_file():
                raise FileNotFoundError(f"fold files: {str(fold_folder)!r} has no {part}.csv; add it")
            for row in read_table(file, "fold files", ("patient", "label"), other_names=OTHER_NAMES):
                if names_of_ids and row["label"] not in names_of_ids:
                    raise ValueError(
                        f"fold files: {str(file)!r} has the label {row['label']!r}, which {CLASS_NAMES_FILE} does not "
                        f"name; add it there"
                    )
                label = names_of_ids.get(row["label"], row["label"])
                rows.append({"fold": fold_folder.name, "part": part, "patient": row["patient"], "label": label})
    return rows


def _names_of_ids(file: Path) -> dict[str, str]:
    """Read {label id: class}; empty if there is no such file."""
    if not file.is_file():
        return {}
    return {row["label_id"]: row["label_name"] for row in read_table(file, "fold files", ("label_name", "label_id"))}


def _natural(name: str) -> tuple[int, str]:
    """Return a key that sorts fold_2 before fold_10."""
    digits = "".join(filter(str.isdecimal, name))
    return int(digits or -1), name
