"""Labelled cells for evaluation: a folder per class, or a CSV with the columns `Image Path,Label[,patient]`.

Letters: N cells, C classes.
"""

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dinov2.data.datasets.image_paths import IMAGE_SUFFIXES, find_images, is_image_name
from dinov2.data.datasets.tables import (
    LABEL_COLUMN,
    PATH_COLUMN,
    PATIENT_COLUMN,
    check_files_exist,
    is_folder,
    read_table,
)
from dinov2.utils.paths import local_path

logger = logging.getLogger("dinov2")


@dataclass(frozen=True, eq=False)
class LabelledCells:
    """Where N cells lie on disk, and what they are.

    Attributes:
        paths: N image files.
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
        """Read a folder (`from_folder`) or a table (`from_table`).

        Args:
            path: the folder or the .csv file.
            class_names: the classes in the order of their ids. A test set takes its training set's; without it, the
                names found here in sorted order.

        Raises:
            FileNotFoundError: nothing is at `path`, or the CSV names images that do not exist.
            ValueError: no labelled cell was found, the CSV is malformed, or a label is not in `class_names`.
        """
        path = local_path(path)
        layouts = (
            f"a folder with one folder per class, or a table with the columns "
            f"{PATH_COLUMN},{LABEL_COLUMN}[,{PATIENT_COLUMN}]"
        )
        if is_folder(path, "labelled cells", layouts):
            return cls.from_folder(path, class_names)
        return cls.from_table(path, class_names)

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str], class_names: Sequence[str] | None = None) -> "LabelledCells":
        """One folder per class; the images may lie deeper inside it. Hidden files and other suffixes are ignored."""
        folder = Path(folder)
        entries = [entry for entry in sorted(folder.iterdir()) if not entry.name.startswith(".")]
        by_class = {entry.name: find_images(entry) for entry in entries if entry.is_dir()}
        empty = [name for name, images in by_class.items() if not images]
        loose = sum(is_image_name(entry.name) and entry.is_file() for entry in entries)
        paths = [path for images in by_class.values() for path in images]
        names = [name for name, images in by_class.items() for _ in images]
        if not paths:
            raise ValueError(
                f"labelled cells: no images ({', '.join(IMAGE_SUFFIXES)}) in the folders inside {str(folder)!r}; "
                f"expected one folder per class, with the class's images in it"
            )
        if empty:
            logger.warning("%s: folders without images are not classes: %s", folder, ", ".join(empty))
        if loose:
            logger.warning("%s: %d images beside the class folders have no label and are left out", folder, loose)
        class_names = _checked_class_names(class_names, names, source=str(folder))
        return cls(paths, _to_ids(names, class_names), class_names)

    @classmethod
    def from_table(cls, file: str | os.PathLike[str], class_names: Sequence[str] | None = None) -> "LabelledCells":
        """A row per cell; relative paths count from the CSV's own folder, and further columns are ignored."""
        file = Path(file)
        rows = read_table(file, "labelled cells", (PATH_COLUMN, LABEL_COLUMN), optional=(PATIENT_COLUMN,))
        paths = [file.parent / row[PATH_COLUMN] for row in rows]
        names = [row[LABEL_COLUMN] for row in rows]
        patients = [row[PATIENT_COLUMN] for row in rows] if PATIENT_COLUMN in rows[0] else None
        check_files_exist(paths, file, "labelled cells", "images")
        class_names = _checked_class_names(class_names, names, source=str(file))
        return cls(paths, _to_ids(names, class_names), class_names, patients)


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
