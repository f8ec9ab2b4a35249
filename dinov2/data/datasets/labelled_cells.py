"""Read labelled cells for evaluation: a folder per class, or a table with the columns `Image Path,Label[,patient]`.

Letters: N cells, C classes.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dinov2.data.datasets.decode import IMAGE_SUFFIXES, find_images, is_image_name
from dinov2.data.datasets.tables import (
    LABEL_COLUMN,
    PATH_COLUMN,
    PATIENT_COLUMN,
    check_files_exist,
    is_folder,
    read_table,
)
from dinov2.utils.files import local_path

logger = logging.getLogger("dinov2")

LAYOUTS = (
    f"a folder with one folder per class, or a table with the columns {PATH_COLUMN},{LABEL_COLUMN}[,{PATIENT_COLUMN}]"
)


@dataclass(frozen=True, eq=False)
class LabelledCells:
    """The image files of N cells, and their labels."""

    paths: list[Path]
    labels: np.ndarray  # int64 [N], positions in `class_names`
    class_names: list[str]  # with the names of another set, a class may have no cell
    patients: list[str] | None = None  # N ids; None if the source names none

    def __len__(self) -> int:
        return len(self.paths)

    @classmethod
    def from_path(cls, path: str | os.PathLike[str], class_names: Sequence[str] | None = None) -> "LabelledCells":
        """Read a folder or a table; hidden files, files with other suffixes and further columns are ignored.

        Args:
            path: a folder with a folder per class, which may have subfolders; or a table, whose relative paths count
                from its folder.
            class_names: the only allowed classes, in the order of their ids; None: all labels that `path` has, sorted.
        """
        path = local_path(path)
        patients = None
        if is_folder(path, "labelled cells", LAYOUTS):
            paths, names = _read_folder(path)
        else:
            rows = read_table(path, "labelled cells", (PATH_COLUMN, LABEL_COLUMN), optional=(PATIENT_COLUMN,))
            paths = [path.parent / row[PATH_COLUMN] for row in rows]
            names = [row[LABEL_COLUMN] for row in rows]
            if PATIENT_COLUMN in rows[0]:
                patients = [row[PATIENT_COLUMN] for row in rows]
            check_files_exist(paths, path, "labelled cells", "images")
        class_names = sorted(set(names)) if class_names is None else list(class_names)
        ids = {name: i for i, name in enumerate(class_names)}
        if len(ids) != len(class_names):
            raise ValueError(f"class_names: a name stands twice in {class_names}; each class needs its own")
        unknown = sorted(set(names).difference(ids))
        if unknown:
            raise ValueError(
                f"labelled cells: {str(path)!r} has the label(s) {', '.join(map(repr, unknown))}, which are not among "
                f"the known classes {', '.join(map(repr, ids))}; drop or rename these cells, or train with them"
            )
        return cls(paths, np.array([ids[name] for name in names], dtype=np.int64), class_names, patients)


def _read_folder(folder: Path) -> tuple[list[Path], list[str]]:
    """Return the images in a folder, and their labels: the names of the folders at the first level."""
    entries = [entry for entry in sorted(folder.iterdir()) if not entry.name.startswith(".")]
    by_class = {entry.name: find_images(entry) for entry in entries if entry.is_dir()}
    if not any(by_class.values()):
        raise ValueError(
            f"labelled cells: no images ({', '.join(IMAGE_SUFFIXES)}) in the folders inside {str(folder)!r}; "
            f"expected one folder per class, with the class's images in it"
        )
    empty = [name for name, images in by_class.items() if not images]
    if empty:
        logger.warning("%s: folders without images are not classes: %s", folder, ", ".join(empty))
    loose = sum(is_image_name(entry.name) and entry.is_file() for entry in entries)
    if loose:
        logger.warning("%s: %d images beside the class folders have no label and are left out", folder, loose)
    paths = [path for images in by_class.values() for path in images]
    return paths, [name for name, images in by_class.items() for _ in images]
