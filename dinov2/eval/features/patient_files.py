"""GenBloom's layout: a features file for each patient, `<folder>/<class>/<patient>.h5`, which `PatientBags` reads.

Each is a complete features file (`store`) with the cells of one patient.
"""

import logging
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from dinov2.data.datasets.bags import SUFFIX, one_label_each
from dinov2.data.datasets.labelled_cells import LabelledCells
from dinov2.distributed import on_main_process
from dinov2.eval.features.extract import Embedder
from dinov2.eval.features.parts import Parts
from dinov2.eval.features.store import PATCHES, write_features

logger = logging.getLogger("dinov2")

PARTS_FOLDER = ".patients.parts"
N_EXAMPLES = 3


def extract_patient_files(embedder: Embedder, cells: LabelledCells, folder: Path, overwrite: bool = False) -> int:
    """Write the features of labelled cells to a file for each patient; return the number of patients.

    Files that hold these features are kept. Several processes share the work, and a killed extraction continues, as in
    `Embedder.features_of`.

    Args:
        embedder: without patch grids.
        cells: with their patients; the class of a cell is that of its patient.
        folder: of the class folders.
        overwrite: replace the files of these patients.

    Raises:
        ValueError: if there are no patients, a patient has two classes, no file name or no readable image; or if the
            folder has other .h5 files, or these with other content and `overwrite` is False.
    """
    if PATCHES in embedder.kinds:
        raise ValueError("--layout genbloom: it has no place for patch grids; drop patches from --kinds")
    patients = _cells_by_patient(cells)
    files = _patient_files(cells, folder)
    if on_main_process(lambda: _are_stored(embedder, patients, files, folder, overwrite)):
        logger.info("the features of %d patients are already in %s", len(files), folder)
    else:
        parts = embedder.make_parts(folder / PARTS_FOLDER, cells.paths)
        on_main_process(lambda: _write(embedder, cells, patients, files, parts))
    return len(files)


def _cells_by_patient(cells: LabelledCells) -> dict[str, LabelledCells]:
    if cells.patients is None:
        raise ValueError(
            "--layout genbloom: the cells name no patients; give --data as a CSV with the columns "
            "Image Path,Label,patient"
        )
    positions: dict[str, list[int]] = defaultdict(list)
    for i, patient in enumerate(cells.patients):
        positions[patient].append(i)
    return {
        patient: replace(
            cells, paths=[cells.paths[i] for i in rows], labels=cells.labels[rows], patients=[patient] * len(rows)
        )
        for patient, rows in positions.items()
    }


def _patient_files(cells: LabelledCells, folder: Path) -> dict[str, Path]:
    """Return {patient: file}; ValueError for a patient of two classes or a name that no file can have."""
    names = [cells.class_names[label] for label in cells.labels]
    labels = one_label_each(zip(cells.patients or (), names, strict=True), "--layout genbloom")
    wrong = sorted(name for name in {*labels, *labels.values()} if name.startswith(".") or "/" in name or "\\" in name)
    if wrong:
        raise ValueError(
            f"--layout genbloom: {', '.join(map(repr, wrong[:N_EXAMPLES]))} cannot be file names: a patient or a class "
            f"must not begin with a dot or contain a slash; rename them"
        )
    return {patient: folder / label / f"{patient}{SUFFIX}" for patient, label in labels.items()}


def _are_stored(
    embedder: Embedder,
    patients: Mapping[str, LabelledCells],
    files: Mapping[str, Path],
    folder: Path,
    overwrite: bool,
) -> bool:
    """Return whether all files hold these features; ValueError if a file does not belong to them."""
    patterns = (f"*{SUFFIX}", f"[!.]*/*{SUFFIX}", f"[!.]*/*/*{SUFFIX}")
    existing = {path for pattern in patterns for path in folder.glob(pattern)}
    foreign = sorted(map(str, existing.difference(files.values())))
    if foreign:
        raise ValueError(
            f"--layout genbloom: {len(foreign)} files in {str(folder)!r} are of no patient in --data, for instance "
            f"{', '.join(foreign[:N_EXAMPLES])}; they would be taken for patients: give another --output-dir"
        )
    if overwrite:
        return False
    are_stored = [embedder.is_stored(file, patients[patient]) for patient, file in files.items()]
    return all(are_stored)


def _write(
    embedder: Embedder,
    cells: LabelledCells,
    patients: Mapping[str, LabelledCells],
    files: Mapping[str, Path],
    parts: Parts,
) -> None:
    features = embedder.collect(cells, parts)
    rows: dict[str, list[int]] = defaultdict(list)
    for row, patient in enumerate(features.patients or ()):
        rows[patient].append(row)
    without = [patient for patient in files if patient not in rows]
    if without:
        raise ValueError(
            f"--layout genbloom: {len(without)} patients have no readable image "
            f"({', '.join(map(repr, without[:N_EXAMPLES]))}), so bags without cells; repair their images or drop these "
            f"patients, and start again: finished features are kept"
        )
    for patient, file in files.items():
        paths = {os.path.abspath(path) for path in patients[patient].paths}
        unreadable = [path for path in features.unreadable if path in paths]
        write_features(file, replace(features.select(np.array(rows[patient])), unreadable=unreadable))
    parts.remove()
    logger.info("wrote features of %d cells of %d patients to %s", len(features), len(files), parts.folder.parent)
