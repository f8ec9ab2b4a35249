"""Prepare a data set: read every image, cut cells out, write lists, labels, splits and a summary.

docs/datasets.md lists the files of the output folder. `cells/settings.json` has the settings that cut the cells.
"""

import json
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from dinov2.data.check.scan import READABLE, ImageFacts, read_facts
from dinov2.data.datasets.bag_folds import draw_positions, fold_table
from dinov2.data.datasets.decode import UnreadableImageError, load_image, resize_image
from dinov2.data.datasets.packed import unpack
from dinov2.data.datasets.tables import LABEL_COLUMN, PART_COLUMN, PATH_COLUMN, PATIENT_COLUMN, SET_COLUMN
from dinov2.data.prepare import Box, Cell, DataSet, Notes, find_cells, image_size, note_siblings
from dinov2.data.splits import ALWAYS_TRAINING, FOLD_COLUMN, PARTS
from dinov2.utils.command import progress_bar
from dinov2.utils.files import atomic_write

logger = logging.getLogger("dinov2")

FOLD_PREFIX = "fold_"  # of a part that is a fold of an official cross-validation
N_PATIENT_FOLDS = 5  # in folds.csv


@dataclass(frozen=True)
class Options:
    """How cells are cut out, and which are left out; the help of scripts/prepare_dataset.py explains each option."""

    margin: float | None = None  # None: the data set's own
    size: int | None = None  # side in pixels of a scaled cell; None: do not scale
    keep: tuple[str, ...] = ()  # empty: the data set's own choice; ("all",): every class
    whole: bool = False
    check: bool = True
    drop_duplicates: bool = False
    overwrite: bool = False
    n_workers: int = min(8, os.cpu_count() or 1)

    def __post_init__(self) -> None:
        if self.margin is not None and not 0 <= self.margin <= 10:
            raise ValueError(f"--margin {self.margin}: a fraction of the cell's longer side, from 0 to 10")
        if self.size is not None and not 8 <= self.size <= 4096:
            raise ValueError(f"--size {self.size}: the side in pixels, from 8 to 4096")
        if self.n_workers < 1:
            raise ValueError(f"--n-workers {self.n_workers}: give 1 or more")
        if self.drop_duplicates and not self.check:
            raise ValueError("--drop-duplicates needs the check that --no-check leaves out")


def prepare(
    dataset: DataSet, source: str | os.PathLike[str], output: str | os.PathLike[str], options: Options | None = None
) -> dict[str, Any]:
    """Write all files of a data set and return its summary; after a kill, a second call continues."""
    options = options or Options()
    output = Path(output).absolute()
    top = dataset.top_folder(source)
    if not dataset.packed and (output == top or top in output.parents):  # whose images would be found again
        raise ValueError(f"--output: {str(output)!r} is inside the data set's own folder; choose one outside")
    if dataset.packed:
        # of one set with several sizes, the one with the most pixels
        largest = max(top.glob(dataset.packed), key=lambda file: (file.stat().st_size, file.name))
        cells, notes = find_cells(dataset, unpack([largest], "--source", output / "images").parent)
    else:
        cells, notes = find_cells(dataset, top)
        note_siblings(Path(source).absolute(), top, notes)
    n_found = len(cells)
    facts: dict[Path, ImageFacts] = {}
    if options.check:
        facts = _read_images(sorted({cell.image for cell in cells}), notes, options.n_workers)
        cells = [cell for cell in cells if cell.image in facts]
        cells = _without_duplicates(cells, facts, notes, options.drop_duplicates)
    if not dataset.cuts and (options.margin is not None or options.size or options.keep):
        logger.warning("%s is of single cells: --margin, --size and --keep change nothing", dataset.title)
    if options.whole or not dataset.cuts:
        listed = [(str(cell.image), cell) for cell in _whole_images(cells, notes)]
    else:
        kept = _of_classes(list(_with_valid_boxes(cells, notes)), options.keep or dataset.keep, dataset)
        listed = list(_cut_out(kept, dataset, output, options, notes))
    if not listed:
        raise ValueError(f"{dataset.title}: no image is left of {n_found}; {notes}")
    rows = [(path, cell.label, cell.group, cell.patient, cell.part, cell.diagnosis, cell.more) for path, cell in listed]
    columns = ["path", "label", "group", "patient", "part", "diagnosis", "more"]
    table = pd.DataFrame(rows, columns=columns, dtype=object)
    _write_lists(dataset, table, output)
    summary = _summary(dataset, table, n_found, cells, facts.values(), notes, options)
    with atomic_write(output / "summary.json", "w") as file:
        json.dump(summary, file, indent=2, ensure_ascii=False)
        file.write("\n")
    return summary


def _read_images(images: Sequence[Path], notes: Notes, n_workers: int) -> dict[Path, ImageFacts]:
    """Read the facts of all images; note and leave out the unreadable ones."""
    with ThreadPoolExecutor(n_workers) as pool:  # decoding and hashing release the GIL
        results = pool.map(read_facts, [(str(image), True) for image in images])
        facts = dict(zip(images, progress_bar(results, "reading", len(images)), strict=True))
    for image, fact in facts.items():
        if fact.status != READABLE:
            notes.add("unreadable images and masks", image, fact.reason or fact.status)
    return {image: fact for image, fact in facts.items() if fact.status == READABLE}


def _without_duplicates(cells: list[Cell], facts: dict[Path, ImageFacts], notes: Notes, drop: bool) -> list[Cell]:
    """Note groups of byte-identical images; with `drop` keep one of each, a labelled one if there is any.

    If two of them have different labels, the kept one has none; no label is not another label.
    """
    labels: dict[Path, set[str]] = defaultdict(set)
    for cell in cells:
        labels[cell.image] |= set() if cell.label is None else {cell.label}
    digests = pd.Series({image: fact.digest for image, fact in facts.items()}, dtype=object)
    dropped, contradicted = set(), set()
    for _, group in digests[digests.duplicated(keep=False)].groupby(digests, sort=False):
        first, *others = sorted(group.index, key=lambda image: not labels[image])  # stable: labelled ones first
        names = " = ".join(str(image.relative_to(notes.top)) for image in group.index)
        notes.add("groups of byte-identical images", names)
        dropped |= set(others)
        if any(labels[image] and labels[image] != labels[first] for image in others):
            notes.add("groups of byte-identical images with different labels", names)
            contradicted.add(first)
    if not drop:
        return cells
    kept = [cell for cell in cells if cell.image not in dropped]
    return [replace(cell, label=None, group=None) if cell.image in contradicted else cell for cell in kept]


def _whole_images(cells: list[Cell], notes: Notes) -> Iterator[Cell]:
    """Yield one cell per image; an image with cells of several classes has no label."""
    for image, group in groupby(cells, key=lambda cell: cell.image):
        first, *others = group
        if any((cell.label, cell.group) != (first.label, first.group) for cell in others):
            notes.add("whole images with cells of several classes, listed without a label", image)
            first = replace(first, label=None, group=None)
        yield first


def _with_valid_boxes(cells: list[Cell], notes: Notes) -> Iterator[tuple[int, Cell]]:
    """Yield the cells whose box can be cut out, each with its number among the boxes of its image."""
    for image, group in groupby(cells, key=lambda cell: cell.image):
        size = image_size(image, notes)
        if size is None:
            continue
        seen = set()
        for number, cell in enumerate(group):
            if cell.box is None:
                yield number, cell
                continue
            box_text = f"{cell.label or 'cell'} {tuple(cell.box)}"
            inside = cell.box.clipped(*size)
            if not cell.box.has_area:
                notes.add("boxes of no area, left out", image, box_text)
            elif not inside.has_area:
                notes.add("boxes outside their image, left out", image, box_text)
            elif (cell.box, cell.label) in seen:
                notes.add("boxes that stand twice, left out", image, box_text)
            else:
                if inside != cell.box:
                    notes.add("boxes that reach beyond their image, cut off", image, box_text)
                yield number, replace(cell, box=inside)
            seen.add((cell.box, cell.label))


def _of_classes(cells: list[tuple[int, Cell]], keep: tuple[str, ...], dataset: DataSet) -> list[tuple[int, Cell]]:
    if keep in ((), ("all",)):
        return cells
    labels = {cell.label for _, cell in cells if cell.label is not None}
    unknown = sorted(set(keep) - labels - set(dataset.classes.values()))
    if unknown:
        raise ValueError(f"--keep: no class {', '.join(map(repr, unknown))}; there are {', '.join(sorted(labels))}")
    return [(number, cell) for number, cell in cells if cell.label in keep]


def _cut_out(
    cells: list[tuple[int, Cell]], dataset: DataSet, output: Path, options: Options, notes: Notes
) -> Iterator[tuple[str, Cell]]:
    """Write a PNG of each cell, unless it exists, and yield (path, cell); a cell without a box is the whole image."""
    folder, margin = output / "cells", dataset.margin if options.margin is None else options.margin
    _check_settings(folder, {"source": str(notes.top), "margin": margin, "size": options.size}, options.overwrite)
    load = lru_cache(maxsize=1)(load_image)  # the cells of one image follow each other
    for number, cell in progress_bar(cells, "cutting out", unit=" cells"):
        if cell.box is None:
            yield str(cell.image), cell
            continue
        relative = cell.image.relative_to(notes.top)
        # keep the suffix in the name: 001.bmp and 001.jpg are two images
        file = folder / relative.parent / f"{relative.name}_{number:03d}.png"
        if not file.is_file():
            try:
                image = load(cell.image)
            except UnreadableImageError as error:
                notes.add("unreadable images and masks", cell.image, error.reason)
                continue
            with atomic_write(file) as stream:
                cut(image, cell.box, margin, options.size).save(stream, format="PNG")
        yield file.relative_to(output).as_posix(), cell


def _check_settings(folder: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Write the settings; refuse a folder with cells of other settings, or with `overwrite` remove those cells."""
    file = folder / "settings.json"
    if overwrite and file.is_file():
        for cell in list(folder.rglob("*.png")):  # keep the old settings, so that the command can continue after a kill
            cell.unlink()
    elif file.is_file():
        try:
            before = dict(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"--output: {str(file)!r} is damaged ({error}); give --overwrite to cut again") from error
        changes = [f"{key} {before.get(key)!r}, now {now!r}" for key, now in settings.items() if before.get(key) != now]
        if changes:
            raise ValueError(
                f"--output: {str(folder)!r} has cells that were cut otherwise ({', '.join(changes)}); give "
                f"--overwrite to cut them again, or another folder"
            )
    elif folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir()):  # hidden: unfinished
        raise ValueError(f"--output: {str(folder)!r} is in use by something else (it has no settings.json)")
    with atomic_write(file, "w") as stream:
        json.dump(settings, stream, indent=2)


def cut(image: Image.Image, box: Box, margin: float = 0.1, size: int | None = None) -> Image.Image:
    """Cut out the square around a box, shifted to be inside the image, and smaller if the image is too small.

    With a `size`, the cut is scaled to it, and padded to a square by repeating its border pixels.
    """
    longer = max(box.right - box.left, box.bottom - box.top)
    side = max(1, round(longer * (1 + 2 * margin)))
    spans = []
    for low, high, limit in ((box.left, box.right, image.width), (box.top, box.bottom, image.height)):
        length = min(side, limit)
        start = min(max(0, round((low + high - length) / 2)), limit - length)
        spans.append((start, start + length))
    (left, right), (top, bottom) = spans
    part = image.crop((left, top, right, bottom))
    return part if size is None else Image.fromarray(resize_image(part, size, "pad").permute(1, 2, 0).numpy())


def _write_lists(dataset: DataSet, table: pd.DataFrame, output: Path) -> None:
    """Write the training list, the labels of cells and patients, and the splits."""
    with atomic_write(output / f"{dataset.name}.txt", "w") as file:
        file.writelines(f"{path}\n" for path in table["path"])
    tables = [("labels.csv", "label", table), ("labels_dinobloom.csv", "group", table)]
    tables.append(("labels_patients.csv", "diagnosis", table))
    for part, cells in table.groupby("part"):
        # relative paths count from the folder of the file
        paths = [path if os.path.isabs(path) else f"../{path}" for path in cells["path"]]
        tables.append((f"splits/{part}.csv", "label", cells.assign(path=pd.Series(paths, cells.index, dtype=object))))
    for name, column, cells in tables:
        rows = cells[cells[column].notna()].assign(dataset=dataset.name)
        columns = {"path": PATH_COLUMN, column: LABEL_COLUMN, "patient": PATIENT_COLUMN, "dataset": SET_COLUMN}
        if rows["patient"].isna().any():  # readers of labels.csv refuse empty fields
            del columns["patient"]
        more = pd.DataFrame(rows["more"].tolist(), rows.index, dtype=object)
        _write_csv(output / name, rows[list(columns)].rename(columns=columns).join(more))
    labelled = table.loc[table["label"].notna(), ["path", "part"]]
    parts = set(labelled["part"].dropna())
    if {"train", "test"} <= parts <= set(PARTS):
        split = labelled.fillna("unused").set_axis([PATH_COLUMN, PART_COLUMN], axis=1)
    elif parts and all(part.startswith(FOLD_PREFIX) for part in parts):
        numbers = labelled["part"].str.removeprefix(FOLD_PREFIX).fillna(ALWAYS_TRAINING)
        split = labelled.assign(part=numbers).set_axis([PATH_COLUMN, FOLD_COLUMN], axis=1)
    else:
        split = labelled[:0]
    _write_csv(output / "split.csv", split)
    patients = table.dropna(subset=["patient", "diagnosis"]).drop_duplicates("patient").sort_values("patient")
    names = {"patient": "patient", "diagnosis": "label", "part": PART_COLUMN}
    patients = patients[list(names)].rename(columns=names)
    _write_csv(output / "folds.csv", _folds_of(patients))
    _write_csv(output / "patient_labels.csv", patients if patients[PART_COLUMN].any() else patients.iloc[:, :2])


def _folds_of(patients: pd.DataFrame) -> pd.DataFrame:
    """Draw folds of patients, columns `patient,label,part`; a class with fewer patients than folds gives no rows.

    All folds have the patients of the part `test` as their test set; without such patients each one is tested once.
    """
    if has_test_set := "test" in set(patients[PART_COLUMN]):
        patients = patients[patients[PART_COLUMN].isin(("train", "test"))]
    test = np.flatnonzero(patients[PART_COLUMN] == "test")
    n_learned = patients["label"].drop(patients.index[test]).value_counts()
    if len(n_learned) < 2 or n_learned.min() < N_PATIENT_FOLDS:
        if len(patients):
            text = "folds.csv is not written: %d folds need two classes with as many patients each, found %s"
            logger.warning(text, N_PATIENT_FOLDS, n_learned.to_dict())
        return patients[:0]
    ids, labels = patients["patient"].tolist(), patients["label"].tolist()
    folds = draw_positions(
        np.unique(labels, return_inverse=True)[1],
        ids,
        "dinobloom" if has_test_set else "crossval",
        N_PATIENT_FOLDS,
        test=test if has_test_set else None,
    )
    return fold_table(folds, [str(number) for number in range(len(folds))], ids, labels)


def _write_csv(file: Path, table: pd.DataFrame) -> None:
    """Write a table; an empty one removes the file of an earlier run with other options."""
    if table.empty:
        file.unlink(missing_ok=True)
        return
    with atomic_write(file, "w") as stream:
        table.to_csv(stream, index=False, lineterminator="\n")


def _summary(
    dataset: DataSet,
    table: pd.DataFrame,
    n_found: int,
    cells: Sequence[Cell],
    facts: Iterable[ImageFacts],
    notes: Notes,
    options: Options,
) -> dict[str, Any]:
    counts: dict[str, Any] = {
        "pictures": len({cell.image for cell in cells}),
        "cells": n_found,
        "listed": len(table),
        "labelled": int(table["label"].count()),
        "patients": int(table["patient"].nunique()) or None,
        "classes": _counted(table["label"]),
        "dinobloom_classes": _counted(table["group"]),
        "annotated_classes": _counted(cell.label for cell in cells),
        "splits": _counted(table["part"]),
    }
    single = [name for name, count in counts["classes"].items() if count == 1]
    if single:
        notes.add("classes with a single image", ", ".join(single))
    own_counts = {**counts["annotated_classes"], **counts["splits"], **counts}
    about = ("title", "origin", "paper", "licence", "modality", "remarks")
    return {
        "dataset": dataset.name,
        **{key: getattr(dataset, key) for key in about},
        "source": str(notes.top),
        "options": {key: value for key, value in asdict(options).items() if key not in ("n_workers", "overwrite")},
        "counts": counts,
        "expected": {name: {"published": n, "here": own_counts.get(name) or 0} for name, n in dataset.expected.items()},
        "sizes": _counted(f"{fact.width}x{fact.height}" for fact in facts),
        "modes": _counted(fact.mode for fact in facts),
        "oddities": notes.report(),
    }


def _counted(values: Iterable[str | None]) -> dict[str, int]:
    """Return {value: count} without None, sorted by value."""
    return dict(sorted(Counter(value for value in values if value is not None).items()))


def describe(summary: dict[str, Any], output: str | os.PathLike[str]) -> str:
    """Format the counts and oddities of a summary for the terminal."""
    counts = summary["counts"]
    lines = [
        f"{summary['title']} ({summary['modality']}; licence: {summary['licence']})",
        f"  {counts['pictures']} images, {counts['listed']} lines in the list, {counts['labelled']} labelled, "
        f"{counts['patients'] or 'no'} patients named",
    ]
    for title, key in (("classes", "classes"), ("DinoBloom's classes", "dinobloom_classes"), ("splits", "splits")):
        if counts[key]:
            lines.append(f"  {title}: " + ", ".join(f"{name} {count}" for name, count in counts[key].items()))
    for name, n in summary["expected"].items():
        if n["published"] != n["here"]:
            lines.append(f"  published {name}: {n['published']}, here {n['here']}")
    for kind, note in summary["oddities"].items():
        lines.append(f"  {note['count']} {kind}: {'; '.join(note['examples'][:2])}")
    if summary["remarks"]:
        lines.append(f"  note: {summary['remarks']}")
    return "\n".join([*lines, f"  written to {output}"])
