"""Labelled cells for evaluation: a folder per class, or a CSV with the columns `Image Path,Label[,patient]`.

Letters: N cells, C classes.
"""

import csv
import io
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dinov2.utils.paths import local_path

logger = logging.getLogger("dinov2")

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
PATH_COLUMN, LABEL_COLUMN, PATIENT_COLUMN = "Image Path", "Label", "patient"


@dataclass(frozen=True, eq=False)
class LabelledCells:
    """Where N cells lie on disk, and what they are.

    Attributes:
        paths: N picture files.
        labels: int64 [N], positions in `class_names`.
        class_names: C names; some may have no cell here when the order was given by another set.
        patients: N patient ids, or None if the source names none.
    """

    paths: list[Path]
    labels: np.ndarray
    class_names: list[str]
    patients: list[str] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    @classmethod
    def from_path(cls, path: str | os.PathLike[str], class_names: Sequence[str] | None = None) -> "LabelledCells":
        """Read a folder (`from_folder`) or a CSV file (`from_csv`).

        Args:
            path: the folder or the .csv file.
            class_names: the classes in the order of their ids. A test set takes its training set's; without it, the
                names found here in sorted order.

        Raises:
            FileNotFoundError: nothing is at `path`, or the CSV names pictures that do not exist.
            ValueError: no labelled cell was found, the CSV is malformed, or a label is not in `class_names`.
        """
        path = local_path(path)
        if path.is_dir():
            return cls.from_folder(path, class_names)
        if not path.exists():
            raise FileNotFoundError(f"labelled cells: {str(path)!r} does not exist; give a folder per class or a CSV")
        if path.suffix.lower() != ".csv":
            raise ValueError(
                f"labelled cells: {str(path)!r} is neither a folder nor a .csv file; give a folder with one folder per "
                f"class, or a CSV with the columns {PATH_COLUMN},{LABEL_COLUMN}[,{PATIENT_COLUMN}]"
            )
        return cls.from_csv(path, class_names)

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str], class_names: Sequence[str] | None = None) -> "LabelledCells":
        """One folder per class; the pictures may lie deeper inside it. Hidden files and other suffixes are ignored."""
        folder = Path(folder)
        entries = [entry for entry in sorted(folder.iterdir()) if not entry.name.startswith(".")]
        by_class = {entry.name: find_pictures(entry) for entry in entries if entry.is_dir()}
        empty = [name for name, pictures in by_class.items() if not pictures]
        loose = sum(is_picture_name(entry.name) and entry.is_file() for entry in entries)
        paths = [path for pictures in by_class.values() for path in pictures]
        names = [name for name, pictures in by_class.items() for _ in pictures]
        if not paths:
            raise ValueError(
                f"labelled cells: no pictures ({', '.join(PICTURE_SUFFIXES)}) in the folders inside {str(folder)!r}; "
                f"expected one folder per class, with the class's pictures in it"
            )
        if empty:
            logger.warning("%s: folders without pictures are not classes: %s", folder, ", ".join(empty))
        if loose:
            logger.warning("%s: %d pictures beside the class folders have no label and are left out", folder, loose)
        class_names = _checked_class_names(class_names, names, source=str(folder))
        return cls(paths, _to_ids(names, class_names), class_names)

    @classmethod
    def from_csv(cls, file: str | os.PathLike[str], class_names: Sequence[str] | None = None) -> "LabelledCells":
        """A row per cell; relative paths count from the CSV's own folder, and further columns are ignored."""
        file = Path(file)
        columns, rows = _read_csv(file)
        paths = [file.parent / row[PATH_COLUMN] for row in rows]
        names = [row[LABEL_COLUMN] for row in rows]
        patients = [row[PATIENT_COLUMN] for row in rows] if PATIENT_COLUMN in columns else None
        _check_files_exist(paths, file)
        class_names = _checked_class_names(class_names, names, source=str(file))
        return cls(paths, _to_ids(names, class_names), class_names, patients)


def find_pictures(folder: str | os.PathLike[str]) -> list[Path]:
    """All picture files in `folder` and the folders inside it, sorted; names that begin with a dot are left out."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in files if is_picture_name(name)]
    return sorted(found)


def is_picture_name(name: str) -> bool:
    """Whether a file of this name counts as a picture: a known suffix, in any case, and not hidden."""
    return not name.startswith(".") and name.lower().endswith(PICTURE_SUFFIXES)


def _read_csv(file: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Those of our columns that the file has, and its rows with a value in each of them."""
    try:
        text = file.read_text(encoding="utf-8-sig")  # -sig: Excel writes a byte-order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"labelled cells: {str(file)!r} is not UTF-8 text ({error}); save it as CSV UTF-8") from error
    reader = csv.DictReader(io.StringIO(text), skipinitialspace=True)
    header = [column.strip() for column in reader.fieldnames or []]
    reader.fieldnames = header
    missing = [column for column in (PATH_COLUMN, LABEL_COLUMN) if column not in header]
    if missing:
        raise ValueError(
            f"labelled cells: {str(file)!r} lacks the column(s) {', '.join(map(repr, missing))}; its first line has "
            f"{header or 'nothing'}, expected {PATH_COLUMN},{LABEL_COLUMN}[,{PATIENT_COLUMN}] separated by commas"
        )
    columns = [column for column in (PATH_COLUMN, LABEL_COLUMN, PATIENT_COLUMN) if column in header]
    rows = []
    for row in reader:
        values = {column: (row[column] or "").strip() for column in columns}
        gaps = [column for column, value in values.items() if not value]
        if len(gaps) == len(columns):
            continue  # a line of commas, as spreadsheets leave at the end
        if gaps:
            raise ValueError(
                f"labelled cells: {str(file)!r}, line {reader.line_num}: no value for {', '.join(map(repr, gaps))}; "
                f"fill it in or drop the row"
            )
        rows.append(values)
    if not rows:
        raise ValueError(f"labelled cells: {str(file)!r} has no rows under its first line; add one row per cell")
    return columns, rows


def _check_files_exist(paths: Sequence[Path], source: Path) -> None:
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"labelled cells: {len(missing)} of the {len(paths)} pictures in {str(source)!r} do not exist, for "
            f"instance {', '.join(missing[:3])}; relative paths count from {str(source.parent.absolute())!r}"
        )


def _checked_class_names(given: Sequence[str] | None, found: Iterable[str], source: str) -> list[str]:
    found = set(found)
    if given is None:
        return sorted(found)
    if len(set(given)) != len(given):
        raise ValueError(f"class_names: a name stands twice in {list(given)}; each class needs its own")
    unknown = sorted(found.difference(given))
    if unknown:
        raise ValueError(
            f"labelled cells: {source!r} has the label(s) {', '.join(map(repr, unknown))}, which are not among the "
            f"known classes {', '.join(map(repr, given))}; drop or rename these cells, or train with them"
        )
    return list(given)


def _to_ids(names: Sequence[str], class_names: Sequence[str]) -> np.ndarray:
    ids = {name: i for i, name in enumerate(class_names)}
    return np.array([ids[name] for name in names], dtype=np.int64)  # [N]
