"""Sets of drawn blood cells, for demonstrations and tests, and a contact sheet of their classes.

`write_sample_cells` writes a whole set: pictures to train on with their lists, labelled cells to probe features with
(train and test from different slides), and patients, each a bag of cells whose mixture depends on the subtype.
`dinov2.data.cell_drawing` draws the single picture; its public names can be imported from here too.
"""

import csv
import json
import logging
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dinov2.data.cell_drawing import (
    CELL_CLASSES,
    DEFAULT_SIZE_PX,
    DYES,
    FORMS,
    Amounts,
    CellForm,
    Granules,
    NucleusShape,
    Slide,
    draw_cell,
)
from dinov2.data.datasets.tables import LABEL_COLUMN, PATH_COLUMN, PATIENT_COLUMN
from dinov2.utils.files import atomic_write

__all__ = [
    "CELL_CLASSES",
    "DEFAULT_SIZE_PX",
    "DYES",
    "FORMS",
    "N_SLIDES",
    "SET_VERSION",
    "SUBTYPES",
    "SUMMARY",
    "UNFINISHED",
    "Amounts",
    "CellForm",
    "Granules",
    "NucleusShape",
    "Slide",
    "contact_sheet",
    "draw_cell",
    "write_sample_cells",
]

logger = logging.getLogger("dinov2")

# The mean mixture of a patient's cells. Every subtype has every class, and what marks it is a minority of the bag.
_USUAL = {
    "neutrophil_segmented": 0.26,
    "neutrophil_band": 0.12,
    "eosinophil": 0.05,
    "basophil": 0.03,
    "lymphocyte": 0.18,
    "monocyte": 0.08,
    "erythroblast": 0.12,
    "myeloblast": 0.04,
    "promyelocyte": 0.04,
    "platelet": 0.08,
}
_MARKS: dict[str, dict[str, float]] = {
    "control": {},
    "PML::RARA": {"promyelocyte": 0.30},
    "NPM1": {"myeloblast": 0.14, "monocyte": 0.18},
    "CBFB::MYH11": {"eosinophil": 0.18, "monocyte": 0.10, "myeloblast": 0.04},
    "RUNX1::RUNX1T1": {"myeloblast": 0.26, "neutrophil_band": 0.06},
}
SUBTYPES: dict[str, dict[str, float]] = {
    subtype: {name: share * (1 - sum(mark.values())) + mark.get(name, 0.0) for name, share in _USUAL.items()}
    for subtype, mark in _MARKS.items()
}


# --- a contact sheet ------------------------------------------------------------------------------------------------


def contact_sheet(n_slides: int = 5, seed: int = 0, size: int = 96) -> np.ndarray:
    """All classes side by side, named above, a slide in each row.

    Args:
        n_slides: rows.
        seed: decides all that is random.
        size: side of each picture in pixels.

    Returns:
        uint8 [height, width, 3] with one picture of side `size` per class and slide.
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
            picture = draw_cell(name, slide, _picture_rng(seed, "contact_sheet", row, column), size)
            sheet.paste(Image.fromarray(picture), (column * size, header + row * size))
    return np.asarray(sheet)


# --- a whole set on disk --------------------------------------------------------------------------------------------

SET_VERSION = 1  # raise it whenever the same settings would give other files
SUMMARY, UNFINISHED = "summary.json", ".unfinished.json"
# slides of each split; how many pictures there are doesn't change them, and no slide is in two splits
N_SLIDES = {"train": 16, "probe_train": 10, "probe_test": 8}
# position = first number of a random stream's key after the seed, so appending is safe and reordering is not
_STREAMS = ("train", "probe_train", "probe_test", "patients", "mixtures", "contact_sheet")
_BATCH = 20  # pictures that a process draws before it counts them as done
_SECONDS_BETWEEN_REPORTS = 5.0
_MIXTURE_CONCENTRATION = 25.0  # patients of a subtype scatter around its mixture as if it were known from 25 cells


@dataclass(frozen=True)
class _Settings:
    """What decides every byte of a set; stands in its summary."""

    n_train: int
    n_probe_train: int
    n_probe_test: int
    n_patients: int
    cells_per_patient: tuple[int, int]
    size: int
    seed: int

    def check(self) -> None:
        for name in ("n_train", "n_probe_train", "n_probe_test", "n_patients", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)} is negative; give 0 or more")
        if self.size < 16:
            raise ValueError(f"size: {self.size} px is too small to show a cell; give at least 16")
        fewest, most = self.cells_per_patient
        if not 1 <= fewest <= most:
            raise ValueError(
                f"cells_per_patient: {fewest} to {most} is no range; give two numbers from 1 up, ascending"
            )


@dataclass(frozen=True)
class _SlidePlan:
    """The pictures of one slide: where they go (relative to the set's folder) and their classes."""

    stream: str
    index: int
    files: list[str]
    cell_classes: list[str]
    label: str = ""  # the subtype, for a patient's slide

    @property
    def name(self) -> str:
        return f"patient_{self.index:03d}" if self.stream == "patients" else f"{self.stream}_slide_{self.index:02d}"


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
    """Draw a set of pictures into a folder, unless that very set is there already.

    Equal arguments give equal bytes, whatever `n_workers` is. Written are

    - `train/<slide>/*.png` and `lists/<slide>.txt`, unlabelled, for `HemaStandardDataset:root=<output>/lists`;
    - `probe/{train,test}/<class>/*.png` and `probe/{train,test}.csv`, labelled with the cell's class. A slide stands
      for a patient there, and train and test share none;
    - `patients/<patient>/*.png` and `patients.csv`, labelled with the patient's subtype (`SUBTYPES`); what no clinic
      would know, each of these cells' class, is in `patients_cell_classes.csv`, to hold attention against;
    - `summary.json`, last: without it the set is unfinished, and the next call draws it again.

    All CSVs have the columns `Image Path,Label,patient`; paths count from the CSV's (or list's) own folder.

    Args:
        output: an empty or missing folder, or one that an earlier call wrote.
        n_train: unlabelled pictures; classes are balanced up to one picture, here and in the two probe splits.
        n_probe_train: labelled pictures to fit probes on.
        n_probe_test: labelled pictures to test probes on.
        n_patients: bags of cells; subtypes are balanced up to one patient.
        seed: decides all that is random.
        size: side of the pictures in pixels.
        cells_per_patient: fewest and most cells of a patient.
        n_workers: processes. With more than one, call this under `if __name__ == "__main__":`.

    Returns:
        what `summary.json` holds: version, settings, and counts of pictures, slides, classes and subtypes.

    Raises:
        FileExistsError: `output` holds something else, or a set of other settings.
        ValueError: for a negative count or an empty range.
    """
    output = Path(output)
    settings = _Settings(n_train, n_probe_train, n_probe_test, n_patients, cells_per_patient, size, seed)
    settings.check()
    plans = _plan(settings)
    summary = _summary(settings, plans)
    if _is_finished(output, plans, summary):
        logger.info("sample cells: %s already holds this set of %d pictures", output, summary["pictures"])
        return summary

    with atomic_write(output / UNFINISHED, "w") as file:
        json.dump(_identity(summary), file)
    _draw_all(output, plans, settings, n_workers)
    _write_tables(output, plans)
    with atomic_write(output / SUMMARY, "w") as file:
        json.dump(summary, file, indent=2)
        file.write("\n")
    (output / UNFINISHED).unlink()
    return summary


def _plan(settings: _Settings) -> list[_SlidePlan]:
    """Every slide of the set with its pictures, in the order of the tables."""
    counts = {
        "train": settings.n_train,
        "probe_train": settings.n_probe_train,
        "probe_test": settings.n_probe_test,
    }
    plans = []
    for stream, count in counts.items():
        # a class after the other, and the next slide after a round of them: no slide lacks a class
        rounds = [(i // len(CELL_CLASSES), CELL_CLASSES[i % len(CELL_CLASSES)]) for i in range(count)]
        for index in range(N_SLIDES[stream]):
            cell_classes = [name for turn, name in rounds if turn % N_SLIDES[stream] == index]
            if cell_classes:
                plans.append(_SlidePlan(stream, index, _split_files(stream, index, cell_classes), cell_classes))
    return plans + [_patient_plan(settings, index) for index in range(settings.n_patients)]


def _split_files(stream: str, slide: int, cell_classes: list[str]) -> list[str]:
    stems = [f"{stream}_{slide:02d}_{i:04d}.png" for i in range(len(cell_classes))]
    if stream == "train":
        return [f"train/slide_{slide:02d}/{stem}" for stem in stems]
    folder = stream.replace("_", "/")
    return [f"{folder}/{name}/{stem}" for name, stem in zip(cell_classes, stems, strict=True)]


def _patient_plan(settings: _Settings, index: int) -> _SlidePlan:
    subtype = list(SUBTYPES)[index % len(SUBTYPES)]
    rng = _rng(settings.seed, "mixtures", index)
    n_cells = int(rng.integers(settings.cells_per_patient[0], settings.cells_per_patient[1] + 1))
    mean_mixture = np.array([SUBTYPES[subtype][name] for name in CELL_CLASSES])
    mixture = rng.dirichlet(_MIXTURE_CONCENTRATION * mean_mixture)
    cell_classes = [CELL_CLASSES[i] for i in rng.choice(len(CELL_CLASSES), n_cells, p=mixture)]
    files = [f"patients/patient_{index:03d}/patient_{index:03d}_{i:03d}.png" for i in range(n_cells)]
    return _SlidePlan("patients", index, files, cell_classes, subtype)


def _summary(settings: _Settings, plans: list[_SlidePlan]) -> dict[str, Any]:
    streams = ("train", "probe_train", "probe_test", "patients")
    classes = {s: Counter(chain.from_iterable(p.cell_classes for p in plans if p.stream == s)) for s in streams}
    subtypes = Counter(plan.label for plan in plans if plan.stream == "patients")
    return {
        "version": SET_VERSION,
        "settings": {**asdict(settings), "cells_per_patient": list(settings.cells_per_patient)},
        "pictures": sum(len(plan.files) for plan in plans),
        "slides": {s: sum(plan.stream == s for plan in plans) for s in streams},
        "classes": {s: {name: counts[name] for name in CELL_CLASSES} for s, counts in classes.items()},
        "subtypes": {name: subtypes[name] for name in SUBTYPES},
    }


def _identity(summary: dict[str, Any]) -> dict[str, Any]:
    return {"version": summary["version"], "settings": summary["settings"]}


def _is_finished(output: Path, plans: list[_SlidePlan], summary: dict[str, Any]) -> bool:
    """Whether `output` holds the whole of this set; False also for a free folder and for a part of this set."""
    if not output.exists() or (output.is_dir() and all(entry.name.startswith(".") for entry in output.iterdir())):
        return False
    for name in (UNFINISHED, SUMMARY):
        found = _read_identity(output / name)
        if found is None:
            continue
        if found != _identity(summary):
            raise FileExistsError(
                f"output: {str(output)!r} holds another set of sample cells, {_difference(found, _identity(summary))}; "
                f"give another folder, or delete this one to have it drawn anew"
            )
        return name == SUMMARY and all((output / path).is_file() for plan in plans for path in plan.files)
    raise FileExistsError(
        f"output: {str(output)!r} is not empty and holds no sample cells ({SUMMARY} is missing or not theirs); "
        f"give an empty or new folder"
    )


def _read_identity(file: Path) -> dict[str, Any] | None:
    """Version and settings of the set whose summary or mark this is; None if it is not there or something else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    if not (isinstance(found, dict) and "version" in found and isinstance(found.get("settings"), dict)):
        return None
    return _identity(found)


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    pairs = [("version", found["version"], wanted["version"])]
    pairs += [(key, found["settings"].get(key), value) for key, value in wanted["settings"].items()]
    return ", ".join(f"{key} {there} where {here} is asked for" for key, there, here in pairs if there != here)


def _draw_all(output: Path, plans: list[_SlidePlan], settings: _Settings, n_workers: int) -> None:
    n_all = sum(len(plan.files) for plan in plans)
    n_done = n_first = 0
    start = first_at = reported = time.monotonic()
    logger.info("sample cells: drawing %d pictures of %d slides into %s", n_all, len(plans), output)
    for n in _draw_batches(output, plans, settings, n_workers):
        n_done += n
        now = time.monotonic()
        if n_first == 0:  # the rate counts from here: processes that are still starting would spoil it
            n_first, first_at, reported = n_done, now, now
        elif now - reported >= _SECONDS_BETWEEN_REPORTS:
            reported, rate = now, (n_done - n_first) / (now - first_at)
            message = "sample cells: %d of %d pictures, %.0f a second, %.0f s left"
            logger.info(message, n_done, n_all, rate, (n_all - n_done) / rate)
    logger.info("sample cells: %d pictures in %.0f s", n_all, time.monotonic() - start)


def _draw_batches(output: Path, plans: list[_SlidePlan], settings: _Settings, n_workers: int) -> Iterator[int]:
    """Draw the slides' pictures batch after batch; yields the number of pictures whenever one is done."""
    jobs = [
        (output, plan, range(first, min(first + _BATCH, len(plan.files))), settings.seed, settings.size)
        for plan in plans
        for first in range(0, len(plan.files), _BATCH)
    ]
    if n_workers <= 1 or len(jobs) <= 1:
        yield from map(_draw_batch, jobs)
        return
    # a forked child may hang on locks that the parent's other threads (PyTorch's, for one) held at that moment
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(n_workers, len(jobs)), mp_context=context) as pool:
        yield from pool.map(_draw_batch, jobs)


def _draw_batch(job: tuple[Path, _SlidePlan, range, int, int]) -> int:
    """Draw and write some pictures of one slide; returns their number."""
    output, plan, pictures, seed, size = job
    slide = _slide(seed, plan.stream, plan.index)
    for folder in {os.path.dirname(plan.files[i]) for i in pictures}:
        (output / folder).mkdir(parents=True, exist_ok=True)
    for i in pictures:
        picture = draw_cell(plan.cell_classes[i], slide, _picture_rng(seed, plan.stream, plan.index, i), size)
        # neither atomic nor synced, which costs more than drawing: until the summary is there, all are drawn again
        Image.fromarray(picture).save(output / plan.files[i], compress_level=2)
    return len(pictures)


def _write_tables(output: Path, plans: list[_SlidePlan]) -> None:
    """The path lists of the unlabelled pictures, and the CSVs."""
    for plan in plans:
        if plan.stream == "train":
            with atomic_write(output / "lists" / f"slide_{plan.index:02d}.txt", "w") as file:
                file.writelines(f"../{path}\n" for path in plan.files)
    by_stream = {stream: [plan for plan in plans if plan.stream == stream] for stream in _STREAMS}
    _write_csv(output / "probe" / "train.csv", by_stream["probe_train"])
    _write_csv(output / "probe" / "test.csv", by_stream["probe_test"])
    _write_csv(output / "patients.csv", by_stream["patients"])
    _write_csv(output / "patients_cell_classes.csv", [replace(plan, label="") for plan in by_stream["patients"]])


def _write_csv(table: Path, plans: list[_SlidePlan]) -> None:
    """A row per picture with its slide's label or else its own class; no file if there are no pictures."""
    if not plans:
        return
    with atomic_write(table, "w") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow([PATH_COLUMN, LABEL_COLUMN, PATIENT_COLUMN])
        for plan in plans:
            for path, cell_class in zip(plan.files, plan.cell_classes, strict=True):
                # the probe's tables lie in the folder probe/, and paths count from there
                rows.writerow([path.removeprefix("probe/"), plan.label or cell_class, plan.name])


def _rng(seed: int, stream: str, *key: int) -> np.random.Generator:
    return np.random.default_rng([seed, _STREAMS.index(stream), *key])


def _slide(seed: int, stream: str, index: int) -> Slide:
    return Slide.sample(_rng(seed, stream, index))


def _picture_rng(seed: int, stream: str, slide: int, picture: int) -> np.random.Generator:
    # NumPy pads a key with zeros, so picture 0's would be the slide's own: counted from 1
    return _rng(seed, stream, slide, picture + 1)
