"""GenBloom's layout: a features file for each patient, `<folder>/<class>/<patient>.h5`, which `PatientBags` reads.

Each is a whole features file (`features`), with its patient's cells only.
"""

import logging
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from dinov2.data.datasets.bags import SUFFIX, one_label_each
from dinov2.data.datasets.labelled_cells import LabelledCells
from dinov2.distributed import on_main_process
from dinov2.eval.features.extract import Embedder, cells_of
from dinov2.eval.features.parts import FeatureParts
from dinov2.eval.features.store import PATCHES, write_features

logger = logging.getLogger("dinov2")

PARTS_FOLDER = ".patients.parts"
N_EXAMPLES = 3


def extract_patient_files(embedder: Embedder, cells: LabelledCells, folder: Path, overwrite: bool = False) -> int:
    """Write the features of labelled cells with a file for each patient; returns the number of patients.

    Files that hold just what is asked for are kept. Where there is a process group, all its processes call this and
    share the work; it goes on from finished parts as `Embedder.features_of` does.

    Args:
        embedder: of vectors, not of patch grids.
        cells: with their patients; a cell's class is its patient's.
        folder: where the class folders go.
        overwrite: replace these patients' files.

    Raises:
        ValueError: if there are no patients, one has two classes, a name cannot be one of a file, a patient has no
            readable picture, or the folder has other .h5 files, or other content in these and `overwrite` is False.
    """
    if PATCHES in embedder.kinds:
        raise ValueError("--layout genbloom: it has no place for patch grids; drop patches from --kinds")
    files, positions = _plan(cells, folder)
    if not on_main_process(lambda: _are_done(embedder, cells, files, positions, folder, overwrite)):
        parts = embedder.make_parts(folder / PARTS_FOLDER, cells.paths)
        on_main_process(lambda: _write(embedder, cells, files, positions, parts))
    return len(files)


def _plan(cells: LabelledCells, folder: Path) -> tuple[dict[str, Path], dict[str, list[int]]]:
    """{patient: file} and {patient: positions of the cells}."""
    if cells.patients is None:
        raise ValueError(
            "--layout genbloom: the cells name no patients; give --data as a CSV with the columns "
            "Image Path,Label,patient"
        )
    names = [cells.class_names[i] for i in cells.labels]
    labels = one_label_each(zip(cells.patients, names, strict=True), "--layout genbloom")
    wrong = sorted(
        {name for name in {*labels, *labels.values()} if name.startswith(".") or "/" in name or "\\" in name}
    )
    if wrong:
        raise ValueError(
            f"--layout genbloom: {', '.join(map(repr, wrong[:N_EXAMPLES]))} cannot be names of files: a patient or a "
            f"class must not begin with a dot or have a slash; rename them"
        )
    positions: dict[str, list[int]] = defaultdict(list)
    for i, patient in enumerate(cells.patients):
        positions[patient].append(i)
    return {patient: folder / label / f"{patient}{SUFFIX}" for patient, label in labels.items()}, dict(positions)


def _are_done(
    embedder: Embedder,
    cells: LabelledCells,
    files: Mapping[str, Path],
    positions: Mapping[str, Sequence[int]],
    folder: Path,
    overwrite: bool,
) -> bool:
    """Whether all files are there; refuses what must not be mixed with them."""
    there = {
        path for pattern in (f"*{SUFFIX}", f"[!.]*/*{SUFFIX}", f"[!.]*/*/*{SUFFIX}") for path in folder.glob(pattern)
    }
    foreign = sorted(str(path) for path in there - set(files.values()))
    if foreign:
        raise ValueError(
            f"--layout genbloom: {len(foreign)} files in {str(folder)!r} are of no patient in --data, for instance "
            f"{', '.join(foreign[:N_EXAMPLES])}; they would be taken for patients: give another --output-dir"
        )
    if overwrite:
        return False
    for patient, file in files.items():
        differences = list(embedder.differences(file, cells_of(cells, positions[patient]))) if file in there else []
        if differences:
            raise ValueError(
                f"features: {str(file)!r} holds other features than asked for ({'; '.join(differences)}); pass "
                f"--overwrite to replace these patients' files, or another --output-dir"
            )
    if there == set(files.values()):
        logger.info("the features of %d patients are in %s already", len(files), folder)
        return True
    return False


def _write(
    embedder: Embedder,
    cells: LabelledCells,
    files: Mapping[str, Path],
    positions: Mapping[str, Sequence[int]],
    parts: FeatureParts,
) -> None:
    features = embedder.collect(cells, parts)
    assert features.patients is not None and cells.patients is not None, "_plan refuses cells without patients"
    rows: dict[str, list[int]] = defaultdict(list)
    for row, patient in enumerate(features.patients):
        rows[patient].append(row)
    without = [patient for patient in files if patient not in rows]
    if without:
        raise ValueError(
            f"--layout genbloom: {len(without)} patients have no readable picture "
            f"({', '.join(map(repr, without[:N_EXAMPLES]))}), so bags without cells; repair their pictures or drop "
            f"these patients, and start again: what is embedded already is kept"
        )
    unreadable = set(features.unreadable)
    for patient, file in files.items():
        own = [os.path.abspath(cells.paths[i]) for i in positions[patient]]
        write_features(
            file,
            replace(features.select(np.array(rows[patient])), unreadable=[path for path in own if path in unreadable]),
        )
    parts.remove()
    logger.info("wrote features of %d cells of %d patients to %s", len(features), len(files), parts.folder.parent)
