"""Write features of labelled cells in the layouts of this project and of other tools.

`dinov2.data.datasets.bag_layouts.LAYOUTS` is the table of layouts: to add one is an entry there.
`PatientBags.from_path` reads them.

Dimension key:  N cells of a patient, D embedding dim
"""

import csv
import logging
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import torch

from dinov2.data.datasets.bag_layouts import (
    BAG_SUFFIXES,
    CELLS_FILE,
    LAYOUTS,
    TABLES,
    Layout,
    file_name,
    list_names,
    table_row,
)
from dinov2.data.datasets.bags import one_label_each, rows_by_patient
from dinov2.data.datasets.labelled_cells import UNLABELLED, LabelledCells
from dinov2.data.datasets.tables import check_pyarrow, is_parquet
from dinov2.distributed import on_main_process
from dinov2.eval.features.extract import Embedder
from dinov2.eval.features.loop import Parts
from dinov2.eval.features.store import PATCHES, Features, write_features
from dinov2.utils.files import atomic_write

logger = logging.getLogger("dinov2")

PARTS_FOLDER = ".patients.parts"


def extract_one_file(
    embedder: Embedder, cells: LabelledCells, folder: Path, overwrite: bool = False, layout: str = "file"
) -> tuple[Path, Features]:
    """Write all cells into the one file of a layout, see `Embedder.features_of`; return the file and the features."""
    file = folder / LAYOUTS[layout].file
    if is_parquet(file):
        check_pyarrow(f"--layout {layout}", "choose another layout")  # before the hours of an extraction
        _check_kinds(embedder, layout)
    return file, embedder.features_of(cells, file, overwrite=overwrite)


def extract_patient_files(
    embedder: Embedder, cells: LabelledCells, folder: Path, overwrite: bool = False, layout: str = "genbloom"
) -> int:
    """Write the files of each patient in a layout, and its table; return how many patients there are.

    A .h5 file is a complete features file (`store`) with the cells of one patient; beside others, `CELLS_FILE` says
    which cells they have. Files that hold these features are kept. Several processes share the work, and a killed
    extraction continues, as in `Embedder.features_of`.
    """
    _check_kinds(embedder, layout)
    bags = _PatientFiles(layout, cells, folder)
    embedder.warn_of_pretraining(cells)
    if on_main_process(lambda: bags.are_complete(embedder, overwrite)):
        logger.info("the features of %d patients are already in %s", len(bags.labels), folder)
    else:
        parts = embedder.make_parts(folder / PARTS_FOLDER, cells.paths)
        on_main_process(lambda: bags.write(embedder.collect(cells, parts), parts))
    return len(bags.labels)


def _check_kinds(embedder: Embedder, name: str) -> None:
    if PATCHES in embedder.kinds:
        raise ValueError(f"--layout {name}: it has no place for patch grids; drop patches from --kinds")
    if len(embedder.kinds) > 1 and not LAYOUTS[name].file.endswith((".h5", ".parquet")):
        raise ValueError(f"--layout {name}: it has place for one kind of features; give one as --kinds")


class _PatientFiles:
    """The files of the patients of some cells, in a folder."""

    def __init__(self, name: str, cells: LabelledCells, folder: Path) -> None:
        if cells.patients is None:
            raise ValueError(
                f"--layout {name}: the cells name no patients; give --data as a CSV with the columns "
                f"Image Path,Label,patient"
            )
        self.name, self.layout, self.folder = name, LAYOUTS[name], folder
        labels = [cells.class_names[label] for label in cells.labels]
        self.labels = one_label_each(zip(cells.patients, labels, strict=True), f"--layout {name}")
        self.has_labels = cells.class_names != [UNLABELLED]
        self.has_cells_file = not self.layout.file.endswith(".h5")
        # {features file: its cells}: what is compared with what is asked for
        self.described = {folder / CELLS_FILE: cells}
        if not self.has_cells_file:
            rows_of = rows_by_patient(cells.patients)
            self.described = {
                self.path(self.layout.file, patient): replace(
                    cells,
                    paths=[cells.paths[i] for i in rows_of[patient]],
                    labels=cells.labels[rows_of[patient]],
                    patients=[patient] * len(rows_of[patient]),
                )
                for patient in self.labels
            }

    def path(self, template: str, patient: str) -> Path:
        """Return the path of a patient's file; a class without a name gives no folder."""
        label = file_name(self.labels[patient]) if self.has_labels else ""
        return self.folder / template.format(patient=file_name(patient), label=label).lstrip("/")

    @property
    def templates(self) -> list[str]:
        """Return the templates of a patient's files."""
        return [template for template in self.layout.files if self.has_labels or template != self.layout.label_file]

    def are_complete(self, embedder: Embedder, overwrite: bool) -> bool:
        """Return whether all files hold these features; ValueError if others there might be taken for them."""
        wanted = {self.path(template, patient) for patient in self.labels for template in self.templates}
        wanted |= {*self.described, *([self.folder / self.layout.table] if self.layout.table else [])}
        names = [*(f"[!.]*{suffix}" for suffix in BAG_SUFFIXES), *TABLES]
        there = {path for name in names for depth in range(3) for path in self.folder.glob("[!.]*/" * depth + name)}
        if others := sorted(map(str, there - wanted)):
            raise ValueError(
                f"--layout {self.name}: {len(others)} files in {str(self.folder)!r} are of no patient in --data, for "
                f"instance {list_names(others)}; they would be taken for patients: give another --output-dir"
            )
        if overwrite:
            return False
        are_stored = [embedder.is_stored(file, cells) for file, cells in self.described.items()]  # each is checked
        if there and not any(are_stored) and not (self.folder / PARTS_FOLDER).exists():
            raise ValueError(
                f"--layout {self.name}: nothing says of which cells the {len(there)} files in {str(self.folder)!r} are "
                f"({list_names(sorted(map(str, there)))}); pass --overwrite to replace them, or another --output-dir"
            )
        return all(are_stored) and there == wanted

    def write(self, features: Features, parts: Parts) -> None:
        """Write all files; `CELLS_FILE` is removed first and written last."""
        rows = rows_by_patient(features.patients or ())
        if without := [patient for patient in self.labels if patient not in rows]:
            raise ValueError(
                f"--layout {self.name}: {len(without)} patients have no readable image ({list_names(without)}), so "
                f"bags without cells; repair their images or drop these patients, and start again: finished features "
                f"are kept"
            )
        if self.has_cells_file:
            (self.folder / CELLS_FILE).unlink(missing_ok=True)
        for patient in self.labels:
            of_patient = features.select(rows[patient])
            for template in self.templates:
                self._write_file(self.path(template, patient), template, of_patient)
        if self.layout.table:
            self._write_table(features.class_names)
        if self.has_cells_file:
            write_features(self.folder / CELLS_FILE, replace(features, features=np.zeros((len(features), 0))))
        parts.remove()
        logger.info("wrote features of %d cells of %d patients to %s", len(features), len(self.labels), self.folder)

    def _write_file(self, file: Path, template: str, features: Features) -> None:
        if file.suffix == ".h5":
            paths = {os.path.abspath(path) for path in self.described[file].paths}
            unreadable = [path for path in features.unreadable if path in paths]
            write_features(file, replace(features, unreadable=unreadable), add=partial(_add, self.layout, features))
            return
        values = features.labels[:1] if template == self.layout.label_file else features.features
        with atomic_write(file) as stream:
            if file.suffix == ".npy":
                np.save(stream, values)
            else:
                torch.save(torch.from_numpy(values), stream)

    def _write_table(self, class_names: list[str]) -> None:
        columns = {name: key for name, key in self.layout.columns.items() if self.has_labels or "label" not in key}
        with atomic_write(self.folder / self.layout.table, "w") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(columns)
            for patient, label in self.labels.items():
                file = self.path(self.layout.file, patient).relative_to(self.folder).as_posix()
                row = table_row(patient, label, class_names.index(label), file)
                writer.writerow([row[key] for key in columns.values()])


def _add(layout: Layout, features: Features, file: h5py.File) -> None:
    """Add to a features file what other tools read."""
    if layout.dataset not in file:
        file[layout.dataset] = file["features"]  # a second name, which takes no space
    if layout.coords:
        file["coords"] = np.zeros((len(features), 2), dtype=layout.coords)
    file.attrs.update(layout.attributes(features.attributes))
