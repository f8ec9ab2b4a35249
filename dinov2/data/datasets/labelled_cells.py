"""Read cells for evaluation: from folders, tables, or files that hold the images.

Letters: N cells, C classes.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dinov2.data.datasets.decode import KNOWN_SUFFIXES, find_images
from dinov2.data.datasets.packed import unpacked_table
from dinov2.data.datasets.tables import (
    LABEL_COLUMN,
    MAX_LINE,
    PATH_COLUMN,
    PATIENT_COLUMN,
    SET_COLUMN,
    check_files_exist,
    is_folder,
    read_table,
)
from dinov2.utils.files import local_path

logger = logging.getLogger("dinov2")

UNLABELLED = "unlabelled"  # the only class of cells without labels
SETTING = "labelled cells"  # the first words of errors
METADATA_FILE = "metadata.csv"  # of Hugging Face's imagefolder
METADATA_NAMES = {PATH_COLUMN: ("file_name",), LABEL_COLUMN: ("label",)}
LAYOUTS = (
    f"a folder with one folder per class or with {METADATA_FILE} (file_name,label[,patient]), a table with the columns "
    f"{PATH_COLUMN},{LABEL_COLUMN}[,{PATIENT_COLUMN}], a MedMNIST .npz, or parquet or Arrow with columns image,label"
)


@dataclass(frozen=True, eq=False)
class LabelledCells:
    """The image files of N cells, and their labels; cells without labels are all of the class `UNLABELLED`."""

    paths: list[Path]
    labels: np.ndarray  # int64 [N], positions in `class_names`
    class_names: list[str]  # with the names of another set, a class may have no cell
    patients: list[str] | None = None  # N ids; None if the source names none
    datasets: tuple[str, ...] = ()  # names in the column `dataset`, which prepare_dataset.py writes; sorted

    def __len__(self) -> int:
        return len(self.paths)

    @classmethod
    def from_path(
        cls,
        path: str | os.PathLike[str],
        class_names: Sequence[str] | None = None,
        needs_labels: bool = True,
    ) -> "LabelledCells":
        """Read a folder, a table or a packed file; hidden files, other suffixes and further columns are ignored.

        Args:
            path: a folder with a folder per class, which may have subfolders, or with `metadata.csv`, as Hugging Face's
                imagefolder; a table, whose relative paths count from its folder; or a file that holds images, or a
                folder with such files, which are unpacked once (see `packed`).
            class_names: the only allowed classes, in the order of their ids; None: all labels that `path` has, sorted.
            needs_labels: if False, also read a folder without class folders, and a table without labels.
        """
        path = local_path(path)
        patients = None
        datasets: set[str] = set()
        table = _table_of(path)
        if table is None:
            paths, names = _read_folder(path, needs_labels)
        else:
            required = (PATH_COLUMN, LABEL_COLUMN) if needs_labels else (PATH_COLUMN,)
            optional = (PATIENT_COLUMN,) if needs_labels else (LABEL_COLUMN, PATIENT_COLUMN)
            setting = SETTING if table.parent in (path, path.parent) else f"{SETTING}: of {str(path)!r}"
            other_names = METADATA_NAMES if table.parent == path else None
            rows = read_table(table, setting, required, (*optional, SET_COLUMN), other_names, (SET_COLUMN,))
            datasets = {row[SET_COLUMN] for row in rows if row.get(SET_COLUMN)}
            paths = [table.parent / row[PATH_COLUMN] for row in rows]
            names = [row.get(LABEL_COLUMN, UNLABELLED) for row in rows]
            if PATIENT_COLUMN in rows[0]:
                patients = [row[PATIENT_COLUMN] for row in rows]
            check_files_exist(paths, table, SETTING, "images")
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
        labels = np.array([ids[name] for name in names], dtype=np.int64)
        return cls(paths, labels, class_names, patients, tuple(sorted(datasets)))


def _table_of(path: Path) -> Path | None:
    """Return the table that names the cells of `path`, which is unpacked if it must be; None for class folders."""
    if (table := unpacked_table(path, SETTING)) is not None:
        return table
    if not is_folder(path, SETTING, LAYOUTS):
        return path
    metadata = path / METADATA_FILE
    if not metadata.is_file():
        return None
    with open(metadata, "rb") as file:  # another metadata.csv, beside class folders, may have any encoding
        return metadata if b"file_name" in file.readline(MAX_LINE) else None


def _read_folder(folder: Path, needs_labels: bool) -> tuple[list[Path], list[str]]:
    """Return the images in a folder, and their labels: the names of the folders at the first level."""
    images = find_images(folder)
    in_class = [len(image.relative_to(folder).parts) > 1 for image in images]
    if images and not any(in_class) and not needs_labels:
        return images, [UNLABELLED] * len(images)
    if not any(in_class):
        raise ValueError(
            f"labelled cells: no images ({KNOWN_SUFFIXES}) in the folders inside {str(folder)!r}; "
            f"expected one folder per class, with the class's images in it"
        )
    paths = [image for image, is_in_class in zip(images, in_class, strict=True) if is_in_class]
    if len(paths) < len(images):
        n_loose = len(images) - len(paths)
        logger.warning("%s: %d images beside the class folders have no label and are left out", folder, n_loose)
    names = [path.relative_to(folder).parts[0] for path in paths]
    folders = {entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    if empty := sorted(folders - set(names)):
        logger.warning("%s: folders without images are not classes: %s", folder, ", ".join(empty))
    return paths, names
