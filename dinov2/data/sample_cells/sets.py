"""Whole sets of drawn cells on disk: images to train on, labelled cells, and patients; and an overview of the classes.

Each image has its own random generator, so the images do not depend on the order or the process that draws them.
"""

import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from dinov2.data.datasets.tables import LABEL_COLUMN, PATH_COLUMN, PATIENT_COLUMN
from dinov2.data.sample_cells.drawing import DEFAULT_SIZE_PX, draw_cell
from dinov2.data.sample_cells.forms import CELL_CLASSES, Slide
from dinov2.utils.files import atomic_write
from dinov2.utils.parallel import parallel_map

logger = logging.getLogger("dinov2")

SET_VERSION = 1  # raise it whenever the same settings would give other files
SUMMARY, UNFINISHED = "summary.json", ".unfinished.json"
# slides of each split; how many images there are doesn't change them, and no slide is in two splits
N_SLIDES = {"train": 16, "probe_train": 10, "probe_test": 8}
# position = first number of a generator's key after the seed, so appending is safe and reordering is not
STREAMS = ("train", "probe_train", "probe_test", "patients", "mixtures", "contact_sheet")
MIXTURE_CONCENTRATION = 25.0  # patients of a subtype scatter around its mixture as if it were known from 25 cells

# The mean mixture of a patient's cells. Every subtype has every class, and what marks it is a minority of the bag.
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
    """A cell to draw: its file (relative to the set's folder), class, place in a random stream, patient and label."""

    path: str
    cell_class: str
    stream: str
    slide: int
    number: int  # on its slide
    patient: str
    label: str


@dataclass(frozen=True)
class Settings:
    """What decides every byte of a set."""

    n_train: int
    n_probe_train: int
    n_probe_test: int
    n_patients: int
    cells_per_patient: tuple[int, int]
    size: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("n_train", "n_probe_train", "n_probe_test", "n_patients", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)} is negative; give 0 or more")
        if self.size < 16:
            raise ValueError(f"size: {self.size} px is too small to show a cell; give at least 16")
        fewest, most = self.cells_per_patient
        if not 1 <= fewest <= most:
            raise ValueError(f"cells_per_patient: {fewest} to {most} is no range; give two ascending numbers from 1 up")


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
    """Draw a set of images into a folder, unless that very set is there already.

    Equal arguments give equal bytes, whatever `n_workers` is. Written are

    - `train/<slide>/*.png` and `lists/<slide>.txt`, unlabelled, for `HemaStandardDataset:root=<output>/lists`;
    - `probe/{train,test}/<class>/*.png` and `probe/{train,test}.csv`, labelled with the cell's class. A slide stands
      for a patient there, and train and test share none;
    - `patients/<patient>/*.png` and `patients.csv`, labelled with the patient's subtype (`SUBTYPES`); the class of each
      of these cells, which no clinic would know, is in `patients_cell_classes.csv`, to compare attention with;
    - `summary.json`, last: without it the set is unfinished, and the next call draws it again.

    All CSVs have the columns `Image Path,Label,patient`; paths count from the CSV's (or list's) own folder.

    Args:
        output: an empty or missing folder, or one that an earlier call wrote.
        n_train: unlabelled images; classes are balanced up to one image, here and in the two probe splits.
        n_probe_train: labelled images to fit probes on.
        n_probe_test: labelled images to test probes on.
        n_patients: bags of cells; subtypes are balanced up to one patient.
        seed: decides all that is random.
        size: side of the images in pixels.
        cells_per_patient: fewest and most cells of a patient.
        n_workers: processes. With more than one, call this under `if __name__ == "__main__":`.

    Returns:
        what `summary.json` holds: version, settings, and counts of images, slides, classes and subtypes.

    Raises:
        FileExistsError: `output` holds something else, or a set of other settings.
        ValueError: for a negative count or an empty range.
    """
    output = Path(output)
    settings = Settings(n_train, n_probe_train, n_probe_test, n_patients, cells_per_patient, size, seed)
    plan = pd.DataFrame(_plan(settings), columns=PlannedCell._fields)
    summary = _summary(settings, plan)
    if _is_finished(output, plan, summary):
        logger.info("sample cells: %s already holds this set of %d images", output, len(plan))
        return summary

    with atomic_write(output / UNFINISHED, "w") as file:
        json.dump(_identity(summary), file)
    logger.info("sample cells: drawing %d images into %s", len(plan), output)
    for folder in {os.path.dirname(path) for path in plan["path"]}:
        (output / folder).mkdir(parents=True, exist_ok=True)
    jobs = [(output, PlannedCell(*cell), size, seed) for cell in plan.itertuples(index=False)]
    for _ in tqdm(parallel_map(draw_file, jobs, min(n_workers, len(jobs))), "drawing", len(jobs), unit=" images"):
        pass
    _write_tables(output, plan)
    with atomic_write(output / SUMMARY, "w") as file:
        json.dump(summary, file, indent=2)
        file.write("\n")
    (output / UNFINISHED).unlink()
    return summary


def _plan(settings: Settings) -> Iterator[PlannedCell]:
    """Yield every cell of the set in the order of the tables."""
    counts = {"train": settings.n_train, "probe_train": settings.n_probe_train, "probe_test": settings.n_probe_test}
    for stream, count in counts.items():
        for slide in range(N_SLIDES[stream]):
            # a class after the other, and the next slide after a round of them: no slide lacks a class
            rounds = range(slide, -(-count // len(CELL_CLASSES)), N_SLIDES[stream])
            numbers = (turn * len(CELL_CLASSES) + i for turn in rounds for i in range(len(CELL_CLASSES)))
            for i, number in enumerate(number for number in numbers if number < count):
                name = CELL_CLASSES[number % len(CELL_CLASSES)]
                folder = f"train/slide_{slide:02d}" if stream == "train" else f"{stream.replace('_', '/')}/{name}"
                path = f"{folder}/{stream}_{slide:02d}_{i:04d}.png"
                yield PlannedCell(path, name, stream, slide, i, f"{stream}_slide_{slide:02d}", name)
    for index in range(settings.n_patients):
        subtype = list(SUBTYPES)[index % len(SUBTYPES)]
        patient = f"patient_{index:03d}"
        for i, name in enumerate(_cells_of_patient(settings, index, SUBTYPES[subtype])):
            path = f"patients/{patient}/{patient}_{i:03d}.png"
            yield PlannedCell(path, name, "patients", index, i, patient, subtype)


def _cells_of_patient(settings: Settings, index: int, mean_mixture: dict[str, float]) -> list[str]:
    rng = _rng(settings.seed, "mixtures", index)
    n_cells = int(rng.integers(settings.cells_per_patient[0], settings.cells_per_patient[1] + 1))
    mixture = rng.dirichlet(MIXTURE_CONCENTRATION * np.array([mean_mixture[name] for name in CELL_CLASSES]))
    return [CELL_CLASSES[i] for i in rng.choice(len(CELL_CLASSES), n_cells, p=mixture)]


def _summary(settings: Settings, plan: pd.DataFrame) -> dict[str, Any]:
    of_stream = {stream: plan[plan["stream"] == stream] for stream in (*N_SLIDES, "patients")}
    subtypes = of_stream["patients"].drop_duplicates("patient")["label"]
    return {
        "version": SET_VERSION,
        "settings": {**asdict(settings), "cells_per_patient": list(settings.cells_per_patient)},
        "pictures": len(plan),
        "slides": {stream: int(cells["slide"].nunique()) for stream, cells in of_stream.items()},
        "classes": {stream: _counts(CELL_CLASSES, cells["cell_class"]) for stream, cells in of_stream.items()},
        "subtypes": _counts(SUBTYPES, subtypes),
    }


def _counts(names: Iterable[str], values: Iterable[str]) -> dict[str, int]:
    counts = Counter(values)
    return {name: counts[name] for name in names}


def _identity(summary: dict[str, Any]) -> dict[str, Any]:
    return {"version": summary["version"], "settings": summary["settings"]}


def _is_finished(output: Path, plan: pd.DataFrame, summary: dict[str, Any]) -> bool:
    """Return True if `output` holds this whole set, False if it is empty or holds a part of it."""
    if not output.exists() or (output.is_dir() and all(entry.name.startswith(".") for entry in output.iterdir())):
        return False
    for name in (UNFINISHED, SUMMARY):
        try:
            found = _identity(json.loads((output / name).read_text(encoding="utf-8")))
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
            continue  # not there, or not of ours
        wanted = _identity(summary)
        if found == wanted:
            return name == SUMMARY and all((output / path).is_file() for path in plan["path"])
        pairs = [("version", found["version"], SET_VERSION)]
        pairs += [(key, found["settings"].get(key), value) for key, value in wanted["settings"].items()]
        differences = ", ".join(
            f"{key} {there} where {here} is asked for" for key, there, here in pairs if there != here
        )
        raise FileExistsError(
            f"output: {str(output)!r} holds another set of sample cells, {differences}; give another folder, or delete "
            f"this one to have it drawn anew"
        )
    raise FileExistsError(
        f"output: {str(output)!r} is not empty and holds no sample cells ({SUMMARY} is missing or not theirs); "
        f"give an empty or new folder"
    )


def draw_file(job: tuple[Path, PlannedCell, int, int]) -> None:
    """Draw and write one cell."""
    output, cell, size, seed = job
    slide = _slide(seed, cell.stream, cell.slide)
    image = draw_cell(cell.cell_class, slide, _image_rng(seed, cell.stream, cell.slide, cell.number), size)
    # neither atomic nor synced, which costs more than drawing: until the summary is there, all are drawn again
    Image.fromarray(image).save(output / cell.path, compress_level=2)


def _write_tables(output: Path, plan: pd.DataFrame) -> None:
    """Write the path lists of the unlabelled images, and the CSVs."""
    of_stream = dict(list(plan.groupby("stream")))
    if "train" in of_stream:
        for slide, cells in of_stream["train"].groupby("slide"):
            with atomic_write(output / "lists" / f"slide_{slide:02d}.txt", "w") as file:
                file.writelines(f"../{path}\n" for path in cells["path"])
    tables = {
        "probe/train.csv": ("probe_train", "label"),
        "probe/test.csv": ("probe_test", "label"),
        "patients.csv": ("patients", "label"),
        "patients_cell_classes.csv": ("patients", "cell_class"),
    }
    for name, (stream, label) in tables.items():
        if stream in of_stream:
            table = of_stream[stream][["path", label, "patient"]].set_axis(
                [PATH_COLUMN, LABEL_COLUMN, PATIENT_COLUMN], axis=1
            )
            # the probe's tables lie in the folder probe/, and paths count from there
            table[PATH_COLUMN] = table[PATH_COLUMN].str.removeprefix("probe/")
            with atomic_write(output / name, "w") as file:
                table.to_csv(file, index=False, lineterminator="\n")


def contact_sheet(n_slides: int = 5, seed: int = 0, size: int = 96) -> np.ndarray:
    """Draw all classes side by side, with their names above and a slide in each row.

    Returns:
        uint8 [height, width, 3] with one image of side `size` per class and slide.
    """
    header = 30
    sheet = Image.new("RGB", (len(CELL_CLASSES) * size, header + n_slides * size), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for column, name in enumerate(CELL_CLASSES):
        middle = (column + 0.5) * size
        for line, word in enumerate(name.split("_")):
            pen.text((middle - pen.textlength(word, font) / 2, 2 + 12 * line), word, fill="black", font=font)
        for row in range(n_slides):
            slide = _slide(seed, "contact_sheet", row)
            image = draw_cell(name, slide, _image_rng(seed, "contact_sheet", row, column), size)
            sheet.paste(Image.fromarray(image), (column * size, header + row * size))
    return np.asarray(sheet)


def _rng(seed: int, stream: str, *key: int) -> np.random.Generator:
    return np.random.default_rng([seed, STREAMS.index(stream), *key])


def _slide(seed: int, stream: str, index: int) -> Slide:
    return Slide.sample(_rng(seed, stream, index))


def _image_rng(seed: int, stream: str, slide: int, number: int) -> np.random.Generator:
    # NumPy pads a key with zeros, so image 0's would be the slide's own: counted from 1
    return _rng(seed, stream, slide, number + 1)
