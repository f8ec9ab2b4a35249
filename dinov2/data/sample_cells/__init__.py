"""Draw blood cells for demonstrations and tests: without images of patients or downloads, and with known labels.

A set has images to train on, labelled cells, and patients. Each image has its own random generator, so it does not
depend on the order or the process that draws it.
"""

import json
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw

from dinov2.data.datasets.tables import LABEL_COLUMN, PATH_COLUMN, PATIENT_COLUMN
from dinov2.data.sample_cells.drawing import DEFAULT_SIZE_PX, draw_cell
from dinov2.data.sample_cells.forms import CELL_CLASSES, Slide
from dinov2.utils.command import progress_bar
from dinov2.utils.files import atomic_write
from dinov2.utils.resources import parallel_map

__all__ = ["CELL_CLASSES", "DEFAULT_SIZE_PX", "SUBTYPES", "Slide", "contact_sheet", "draw_cell", "write_sample_cells"]

logger = logging.getLogger("dinov2")

SET_VERSION = 1  # raise it whenever the same settings would give other files
SUMMARY, UNFINISHED = "summary.json", ".unfinished.json"
# number of slides of each split, for any number of images; no slide is in two splits
N_SLIDES = {"train": 16, "probe_train": 10, "probe_test": 8}
# the position is the first number of a generator's key after the seed: append only, do not reorder
STREAMS = ("train", "probe_train", "probe_test", "patients", "mixtures", "contact_sheet")
MOST = 10_000_000  # of each number that a user sets
MIXTURE_CONCENTRATION = 25.0  # of the Dirichlet distribution of a patient's mixture

# the mean mixture of a patient's cells: every subtype has every class, and the cells that mark it are a minority
USUAL = {
    **{"neutrophil_segmented": 0.26, "neutrophil_band": 0.12, "eosinophil": 0.05, "basophil": 0.03},
    **{"lymphocyte": 0.18, "monocyte": 0.08, "erythroblast": 0.12, "myeloblast": 0.04},
    **{"promyelocyte": 0.04, "platelet": 0.08},
}
MARKS: dict[str, dict[str, float]] = {
    "control": {},
    "PML::RARA": {"promyelocyte": 0.30},
    "NPM1": {"myeloblast": 0.14, "monocyte": 0.18},
    "CBFB::MYH11": {"eosinophil": 0.18, "monocyte": 0.10, "myeloblast": 0.04},
    "RUNX1::RUNX1T1": {"myeloblast": 0.26, "neutrophil_band": 0.06},
}
SUBTYPES: dict[str, dict[str, float]] = {
    subtype: {name: share * (1 - sum(mark.values())) + mark.get(name, 0.0) for name, share in USUAL.items()}
    for subtype, mark in MARKS.items()
}


class PlannedCell(NamedTuple):
    """A cell to draw."""

    path: str  # relative to the set's folder
    cell_class: str
    stream: str  # one of STREAMS
    slide: int
    number: int  # on its slide
    patient: str
    label: str


def write_sample_cells(
    output: str | os.PathLike[str],
    n_train: int = 1600,
    n_probe_train: int = 400,
    n_probe_test: int = 400,
    n_patients: int = 30,
    seed: int = 0,
    *,
    size: int = DEFAULT_SIZE_PX,
    cells_per_patient: tuple[int, int] = (24, 40),
    n_workers: int = 1,
) -> dict[str, Any]:
    """Draw a set of images into a folder, unless it is there already; return its summary.

    Equal arguments give equal bytes, for any `n_workers`. The files are:

    - `train/<slide>/*.png` and `lists/<slide>.txt`, unlabelled, for `HemaStandardDataset:root=<output>/lists`;
    - `probe/{train,test}/<class>/*.png` and `probe/{train,test}.csv`, labelled with the cell's class; each slide is a
      patient, and train and test share none;
    - `patients/<patient>/*.png` and `patients.csv`, labelled with the patient's subtype (`SUBTYPES`); the classes of
      these cells are in `patients_cell_classes.csv`, to compare attention with;
    - `summary.json`, written last: the next call draws a set without it again.

    The numbers of classes, and of subtypes, differ by one at most. Paths count from the folder of the CSV or list.
    """
    output = Path(output)
    settings: dict[str, Any] = {
        **{"n_train": n_train, "n_probe_train": n_probe_train, "n_probe_test": n_probe_test, "n_patients": n_patients},
        **{"cells_per_patient": list(cells_per_patient), "size": size, "seed": seed},
    }
    _check_settings(settings)
    cells = [*_plan_slides(settings), *_plan_patients(settings)]
    plan = pd.DataFrame(cells, columns=PlannedCell._fields)
    summary = _summary(settings, plan)
    if _is_finished(output, plan, summary):
        logger.info("sample cells: %s already holds this set of %d images", output, len(plan))
        return summary

    with atomic_write(output / UNFINISHED, "w") as file:
        json.dump(summary, file, indent=2)
        file.write("\n")
    logger.info("sample cells: drawing %d images into %s", len(plan), output)
    for folder in {os.path.dirname(path) for path in plan["path"]}:
        (output / folder).mkdir(parents=True, exist_ok=True)
    jobs = [(output, cell, size, seed) for cell in cells]
    for _ in progress_bar(parallel_map(draw_file, jobs, min(n_workers, len(jobs))), "drawing", len(jobs)):
        pass
    _write_tables(output, plan)
    (output / UNFINISHED).replace(output / SUMMARY)
    return summary


def _check_settings(settings: dict[str, Any]) -> None:
    for name in ("n_train", "n_probe_train", "n_probe_test", "n_patients", "seed"):
        if not 0 <= settings[name] <= MOST:
            raise ValueError(f"{name}: {settings[name]}; give a number from 0 to {MOST:,}")
    if not 16 <= settings["size"] <= 4096:
        raise ValueError(f"size: {settings['size']} px; give 16, in which a cell can be seen, to 4096")
    fewest, most = settings["cells_per_patient"]
    if not 1 <= fewest <= most <= MOST:
        raise ValueError(f"cells_per_patient: {fewest} to {most}; give two ascending numbers from 1 to {MOST:,}")


def _plan_slides(settings: dict[str, Any]) -> Iterator[PlannedCell]:
    """Yield the training and probe images in the order of the tables."""
    for stream, n_slides in N_SLIDES.items():
        for slide in range(n_slides):
            # the classes follow each other, and the next slide begins after the last class: no slide lacks a class
            numbers = (n for n in range(settings[f"n_{stream}"]) if n // len(CELL_CLASSES) % n_slides == slide)
            for i, number in enumerate(numbers):
                name = CELL_CLASSES[number % len(CELL_CLASSES)]
                folder = f"train/slide_{slide:02d}" if stream == "train" else f"{stream.replace('_', '/')}/{name}"
                path = f"{folder}/{stream}_{slide:02d}_{i:04d}.png"
                yield PlannedCell(path, name, stream, slide, i, f"{stream}_slide_{slide:02d}", name)


def _plan_patients(settings: dict[str, Any]) -> Iterator[PlannedCell]:
    """Yield the patients' cells; each patient's mixture varies around that of the subtype."""
    fewest, most = settings["cells_per_patient"]
    for index in range(settings["n_patients"]):
        subtype = list(SUBTYPES)[index % len(SUBTYPES)]
        patient = f"patient_{index:03d}"
        rng = _rng(settings["seed"], "mixtures", index)
        n_cells = int(rng.integers(fewest, most + 1))
        mixture = rng.dirichlet(MIXTURE_CONCENTRATION * np.array(list(SUBTYPES[subtype].values())))
        for i, name in enumerate(rng.choice(CELL_CLASSES, n_cells, p=mixture).tolist()):
            path = f"patients/{patient}/{patient}_{i:03d}.png"
            yield PlannedCell(path, name, "patients", index, i, patient, subtype)


def _summary(settings: dict[str, Any], plan: pd.DataFrame) -> dict[str, Any]:
    def counts(values: pd.Series, names: Iterable[str]) -> dict[str, int]:
        return values.value_counts().reindex(list(names), fill_value=0).to_dict()

    of_stream = {stream: plan[plan["stream"] == stream] for stream in (*N_SLIDES, "patients")}
    return {
        "version": SET_VERSION,
        "settings": settings,
        "pictures": len(plan),
        "slides": {stream: int(cells["slide"].nunique()) for stream, cells in of_stream.items()},
        "classes": {stream: counts(cells["cell_class"], CELL_CLASSES) for stream, cells in of_stream.items()},
        "subtypes": counts(of_stream["patients"].drop_duplicates("patient")["label"], SUBTYPES),
    }


def _is_finished(output: Path, plan: pd.DataFrame, summary: dict[str, Any]) -> bool:
    """Return True if `output` holds the whole set, False if it is empty or holds a part of the set."""
    if not output.exists() or (output.is_dir() and all(entry.name.startswith(".") for entry in output.iterdir())):
        return False
    wanted = {"version": SET_VERSION, **summary["settings"]}
    for name in (UNFINISHED, SUMMARY):
        try:
            stored = json.loads((output / name).read_text(encoding="utf-8"))
            stored = {"version": stored["version"], **stored["settings"]}
        except (OSError, ValueError, KeyError, TypeError):
            continue  # missing, or another program's file
        if stored == wanted:
            return name == SUMMARY and all((output / path).is_file() for path in plan["path"])
        differences = [f"{k} {stored.get(k)} where {v} is asked for" for k, v in wanted.items() if stored.get(k) != v]
        raise FileExistsError(
            f"output: {str(output)!r} holds another set of sample cells, {', '.join(differences)}; give another "
            f"folder, or delete this one to have it drawn anew"
        )
    raise FileExistsError(
        f"output: {str(output)!r} is not empty and holds no sample cells ({SUMMARY}); give an empty or new folder"
    )


def draw_file(job: tuple[Path, PlannedCell, int, int]) -> None:
    """Draw and write one cell, given (output folder, cell, size, seed)."""
    output, cell, size, seed = job
    image = _draw(cell.cell_class, seed, cell.stream, cell.slide, cell.number, size)
    # neither atomic nor synced, which takes longer than drawing: without a summary the whole set is drawn again
    Image.fromarray(image).save(output / cell.path, compress_level=2)


def _write_tables(output: Path, plan: pd.DataFrame) -> None:
    """Write the path lists of the unlabelled images, and the CSVs."""
    for slide, cells in plan[plan["stream"] == "train"].groupby("slide"):
        with atomic_write(output / "lists" / f"slide_{slide:02d}.txt", "w") as file:
            file.writelines(f"../{path}\n" for path in cells["path"])
    for name, stream, label in (
        ("probe/train.csv", "probe_train", "label"),
        ("probe/test.csv", "probe_test", "label"),
        ("patients.csv", "patients", "label"),
        ("patients_cell_classes.csv", "patients", "cell_class"),
    ):
        cells = plan.loc[plan["stream"] == stream, ["path", label, "patient"]]
        if len(cells):
            cells.columns = [PATH_COLUMN, LABEL_COLUMN, PATIENT_COLUMN]
            # the probe's tables are in the folder probe/, and paths count from there
            cells[PATH_COLUMN] = cells[PATH_COLUMN].str.removeprefix("probe/")
            with atomic_write(output / name, "w") as file:
                cells.to_csv(file, index=False, lineterminator="\n")


def contact_sheet(n_slides: int = 5, seed: int = 0, size: int = 96) -> np.ndarray:
    """Draw a column for each class, with its name above, and a row for each slide: uint8 [height, width, 3]."""
    header = 30
    sheet = Image.new("RGB", (len(CELL_CLASSES) * size, header + n_slides * size), "white")
    pen = ImageDraw.Draw(sheet)
    for column, name in enumerate(CELL_CLASSES):
        middle = (column + 0.5) * size
        pen.multiline_text((middle, 2), name.replace("_", "\n"), "black", anchor="ma", align="center")
        for row in range(n_slides):
            image = _draw(name, seed, "contact_sheet", row, column, size)
            sheet.paste(Image.fromarray(image), (column * size, header + row * size))
    return np.asarray(sheet)


def _rng(seed: int, stream: str, *key: int) -> np.random.Generator:
    return np.random.default_rng([seed, STREAMS.index(stream), *key])


def _draw(cell_class: str, seed: int, stream: str, slide: int, number: int, size: int) -> np.ndarray:
    # count from 1: NumPy pads a key with zeros, so image 0 would have the slide's key
    image_rng = _rng(seed, stream, slide, number + 1)
    return draw_cell(cell_class, Slide(_rng(seed, stream, slide)), image_rng, size)
