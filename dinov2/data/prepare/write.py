"""Prepare a data set: look at every picture, cut cells out, write lists, labels, splits and a summary.

In the output folder, <name> being the data set's:

- `<name>.txt`: the training list, a picture a line;
- `labels.csv`: `Image Path,Label[,patient],dataset`, for pictures with a label; the column `patient` is there where the
  distributor names patients. `labels_dinobloom.csv` is the same with DinoBloom's classes, where they are others;
- `splits/<part>.csv`, as `labels.csv`, where there is an official split; `split.csv` for `--split` of the evaluations,
  if its parts are train, test and perhaps val;
- `cells/`: cells that were cut out, as PNG; `cells/settings.json` how;
- `summary.json`: counts, what was expected, and every oddity.
"""

import csv
import hashlib
import json
import logging
import os
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dinov2.data.datasets.decode import UnreadableImageError, load_image
from dinov2.data.datasets.tables import LABEL_COLUMN, PATH_COLUMN, PATIENT_COLUMN
from dinov2.data.prepare.base import Box, Cell, DataSet, Notes, find_cells
from dinov2.data.splits import PARTS
from dinov2.utils.files import atomic_write

logger = logging.getLogger("dinov2")

DATASET_COLUMN = "dataset"
SECONDS_BETWEEN_REPORTS = 5.0


@dataclass(frozen=True)
class Options:
    """How cells are cut out, and what is left out.

    Attributes:
        margin: added to each side of a cell's box, as a fraction of its longer side; the cut is square where the
            picture is large enough; None for the data set's own choice.
        size: side in pixels to which cuts are scaled; None leaves them as they are.
        keep: classes that are cut out; empty for the data set's own choice, ("all",) for all.
        whole: list whole pictures, cut nothing.
        check: decode every picture and look for byte-identical ones.
        drop_duplicates: list only the first of byte-identical pictures.
        overwrite: cut all cells again.
        n_workers: threads that read pictures.
    """

    margin: float | None = None
    size: int | None = None
    keep: tuple[str, ...] = ()
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


@dataclass(frozen=True)
class _Listed:
    """A line of the list: the picture of one cell (or a whole picture), as written and where it is."""

    path: str
    cell: Cell


@dataclass(frozen=True)
class _Look:
    """What decoding a picture showed; `reason` if it cannot be decoded."""

    size: tuple[int, int] = (0, 0)
    mode: str = ""
    digest: str = ""
    reason: str = ""


def prepare(
    dataset: DataSet, source: str | os.PathLike[str], output: str | os.PathLike[str], options: Options | None = None
) -> dict[str, Any]:
    """Write all files for a data set and return its summary. Running it again goes on where a killed run stopped.

    Raises:
        FileNotFoundError: if `source` does not have the layout.
        ValueError: if no cell is found, `keep` has a class that is not there, or `output` has cells cut in another way.
    """
    options = options or Options()
    output = Path(output).absolute()
    top = dataset.top_folder(source)
    if output == top or top in output.parents:
        raise ValueError(f"--output: {str(output)!r} is inside the data set's own folder; choose one outside")
    cells, notes = find_cells(dataset, top)
    n_found = len(cells)
    looks: dict[Path, _Look] = {}
    if options.check:
        looks = _look_at_pictures(sorted({cell.picture for cell in cells}), top, notes, options.n_workers)
        cells = [cell for cell in cells if not looks[cell.picture].reason]
        cells = _handle_duplicates(cells, looks, top, notes, options.drop_duplicates)
    if not dataset.cuts and (options.margin is not None or options.size or options.keep):
        logger.warning("%s is of single cells: --margin, --size and --keep change nothing", dataset.title)
    if options.whole or not dataset.cuts:
        listed = [_Listed(str(cell.picture), cell) for cell in _whole_pictures(cells, notes)]
    else:
        margin = dataset.margin if options.margin is None else options.margin
        numbered = _with_sound_boxes(cells, top, notes)
        chosen = _chosen(numbered, options.keep or dataset.keep, dataset)
        listed = _cut_out(chosen, top, output, margin, options, notes)
    if not listed:
        raise ValueError(f"{dataset.title}: no picture is left of {n_found}; {_in_words(notes)}")
    _write_lists(dataset, listed, output)
    summary = _summary(dataset, top, listed, n_found, cells, looks, notes, options)
    with atomic_write(output / "summary.json", "w") as file:
        json.dump(summary, file, indent=2, ensure_ascii=False)
        file.write("\n")
    return summary


def _look_at_pictures(pictures: Sequence[Path], top: Path, notes: Notes, n_workers: int) -> dict[Path, _Look]:
    looks = {}
    with ThreadPoolExecutor(n_workers) as pool:  # decoding and hashing let other threads run
        progress = _progress("looking at pictures", len(pictures))
        for picture, look in zip(pictures, pool.map(_look_at, pictures), strict=True):
            looks[picture] = look
            if look.reason:
                notes.add("unreadable pictures and masks", f"{picture.relative_to(top)}: {look.reason}")
            progress(len(looks))
    return looks


def _look_at(picture: Path) -> _Look:
    try:
        size = load_image(picture).size
        with Image.open(picture) as image:
            mode = image.mode
        return _Look(size, mode, hashlib.sha256(picture.read_bytes()).hexdigest())
    except UnreadableImageError as error:
        return _Look(reason=error.reason)


def _handle_duplicates(cells: list[Cell], looks: dict[Path, _Look], top: Path, notes: Notes, drop: bool) -> list[Cell]:
    """Note groups of byte-identical pictures; with `drop` keep their first, without a label if theirs differ."""
    by_digest: dict[str, list[Path]] = defaultdict(list)
    for picture in sorted({cell.picture for cell in cells}):
        by_digest[looks[picture].digest].append(picture)
    labels: dict[Path, set[str | None]] = defaultdict(set)
    for cell in cells:
        labels[cell.picture].add(cell.label)
    dropped, contradicted = set(), set()
    for group in by_digest.values():
        if len(group) == 1:
            continue
        names = " = ".join(str(picture.relative_to(top)) for picture in group)
        notes.add("groups of byte-identical pictures", names)
        dropped |= set(group[1:])
        if len({frozenset(labels[picture]) for picture in group}) > 1:
            notes.add("groups of byte-identical pictures with different labels", names)
            contradicted.add(group[0])
    if not drop:
        return cells
    kept = [cell for cell in cells if cell.picture not in dropped]
    return [replace(cell, label=None, group=None) if cell.picture in contradicted else cell for cell in kept]


def _whole_pictures(cells: list[Cell], notes: Notes) -> Iterator[Cell]:
    """One cell per picture; a picture with cells of several classes has no label."""
    by_picture: dict[Path, list[Cell]] = defaultdict(list)
    for cell in cells:
        by_picture[cell.picture].append(cell)
    for picture, inside in by_picture.items():
        first = inside[0]
        if len({(cell.label, cell.group) for cell in inside}) > 1:
            notes.add("whole pictures with cells of several classes, listed without a label", picture)
            first = Cell(picture, patient=first.patient, part=first.part)
        yield first


def _with_sound_boxes(cells: list[Cell], top: Path, notes: Notes) -> list[tuple[int, Cell]]:
    """Cells whose box can be cut out, and each one's number among the boxes of its picture."""
    sound: list[tuple[int, Cell]] = []
    for picture, group in groupby(cells, key=lambda cell: cell.picture):
        try:
            with Image.open(picture) as header:
                size = header.size
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            notes.add("unreadable pictures and masks", f"{picture.relative_to(top)}: {error}")
            continue
        seen = set()
        for number, cell in enumerate(group):
            if cell.box is None:
                sound.append((number, cell))
                continue
            inside, problem = cell.box.clipped(*size), ""
            if not cell.box.has_area:
                problem = "boxes of no area, left out"
            elif not inside.has_area:
                problem = "boxes outside their picture, left out"
            elif (cell.box, cell.label) in seen:
                problem = "boxes that stand twice, left out"
            else:
                sound.append((number, replace(cell, box=inside)))
                problem = "boxes that reach beyond their picture, cut off" if inside != cell.box else ""
            seen.add((cell.box, cell.label))
            if problem:
                notes.add(problem, f"{picture.relative_to(top)}: {cell.label or 'cell'} {cell.box.sides}")
    return sound


def _chosen(cells: list[tuple[int, Cell]], keep: tuple[str, ...], dataset: DataSet) -> list[tuple[int, Cell]]:
    if not keep or keep == ("all",):
        return cells
    there = {cell.label for _, cell in cells if cell.label is not None}
    unknown = sorted(set(keep) - there - set(dataset.classes.values()))
    if unknown:
        raise ValueError(f"--keep: no class {', '.join(map(repr, unknown))}; there are {', '.join(sorted(there))}")
    return [(number, cell) for number, cell in cells if cell.label in keep]


def _cut_out(
    cells: list[tuple[int, Cell]], top: Path, output: Path, margin: float, options: Options, notes: Notes
) -> list[_Listed]:
    """Write each cell's PNG unless it is there already; cells without a box are listed as whole pictures."""
    folder = output / "cells"
    _check_settings(folder, {"source": str(top), "margin": margin, "size": options.size}, options.overwrite)
    listed: list[_Listed] = []
    progress = _progress("cutting out cells", len(cells))
    opened: tuple[Path, Image.Image] | None = None
    for n_done, (number, cell) in enumerate(cells, 1):
        progress(n_done)
        if cell.box is None:
            listed.append(_Listed(str(cell.picture), cell))
            continue
        relative = cell.picture.relative_to(top)
        # the suffix stays in the name: 001.bmp and 001.jpg are two pictures
        file = folder / relative.parent / f"{relative.name}_{number:03d}.png"
        if not file.is_file():
            if opened is None or opened[0] != cell.picture:
                try:
                    opened = cell.picture, load_image(cell.picture)
                except UnreadableImageError as error:
                    notes.add("unreadable pictures and masks", f"{relative}: {error.reason}")
                    continue
            with atomic_write(file) as stream:
                cut(opened[1], cell.box, margin, options.size).save(stream, format="PNG")
        listed.append(_Listed(file.relative_to(output).as_posix(), cell))
    return listed


def _check_settings(folder: Path, settings: dict[str, Any], overwrite: bool) -> None:
    file = folder / "settings.json"
    if overwrite and file.is_file():
        for entry in folder.iterdir():  # the settings stay until all is gone: killed here, the same command goes on
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry != file:
                entry.unlink()
    elif file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        if before != settings:
            raise ValueError(
                f"--output: {str(folder)!r} has cells that were cut otherwise ({_differences(before, settings)}); give "
                f"--overwrite to cut them again, or another folder"
            )
        return
    elif folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"--output: {str(folder)!r} is in use by something else (it has no settings.json)")
    with atomic_write(file, "w") as stream:
        json.dump(settings, stream, indent=2)


def _differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    return ", ".join(f"{key} {before.get(key)!r}, now {now[key]!r}" for key in now if before.get(key) != now[key])


def cut(image: Image.Image, box: Box, margin: float = 0.1, size: int | None = None) -> Image.Image:
    """The square around a box, moved to lie inside the picture; cut off where the picture is too small for it.

    Args:
        image: the picture, RGB.
        box: inside the picture.
        margin: added on each side, a fraction of the box's longer side.
        size: side to scale to; a cut that is not square is scaled to fit, its border pixels repeated.
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
    if size is None:
        return part
    if part.width == part.height:
        return part.resize((size, size), Image.Resampling.LANCZOS)
    array = np.asarray(part)
    missing = [max(part.size) - length for length in array.shape[:2]]
    padded = np.pad(array, [*((n // 2, n - n // 2) for n in missing), (0, 0)], mode="edge")
    return Image.fromarray(padded).resize((size, size), Image.Resampling.LANCZOS)


def _write_lists(dataset: DataSet, listed: Sequence[_Listed], output: Path) -> None:
    with atomic_write(output / f"{dataset.name}.txt", "w") as file:
        file.writelines(f"{line.path}\n" for line in listed)
    _write_labels(output / "labels.csv", listed, [line.cell.label for line in listed], dataset)
    _write_labels(output / "labels_dinobloom.csv", listed, [line.cell.group for line in listed], dataset)
    parts = sorted({line.cell.part for line in listed if line.cell.part is not None})
    for part in parts:
        labels = [line.cell.label if line.cell.part == part else None for line in listed]
        _write_labels(output / "splits" / f"{part}.csv", listed, labels, dataset)
    labelled = [(line.path, line.cell.part or "unused") for line in listed if line.cell.label is not None]
    if {"train", "test"} <= {part for _, part in labelled} <= set(PARTS):
        with atomic_write(output / "split.csv", "w") as stream:
            csv.writer(stream, lineterminator="\n").writerows([(PATH_COLUMN, "part"), *labelled])
    else:
        (output / "split.csv").unlink(missing_ok=True)  # of an earlier run with other options


def _write_labels(file: Path, listed: Sequence[_Listed], labels: Sequence[str | None], dataset: DataSet) -> None:
    """A row for each picture with a label; no file where none has one."""
    rows = [(line, label) for line, label in zip(listed, labels, strict=True) if label is not None]
    if not rows:
        file.unlink(missing_ok=True)  # of an earlier run with other options
        return
    # readers of labels.csv take an empty field for a mistake, so the column is there for all or for none
    with_patients = all(line.cell.patient is not None for line, _ in rows)
    up = "../" if file.parent.name == "splits" else ""  # relative paths count from the file's own folder
    with atomic_write(file, "w") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([PATH_COLUMN, LABEL_COLUMN, *([PATIENT_COLUMN] if with_patients else []), DATASET_COLUMN])
        for line, label in rows:
            path = line.path if os.path.isabs(line.path) else up + line.path
            writer.writerow([path, label, *([line.cell.patient] if with_patients else []), dataset.name])


def _summary(
    dataset: DataSet,
    top: Path,
    listed: Sequence[_Listed],
    n_found: int,
    cells: Sequence[Cell],
    looks: dict[Path, _Look],
    notes: Notes,
    options: Options,
) -> dict[str, Any]:
    readable = [look for look in looks.values() if not look.reason]
    pictures = {cell.picture for cell in cells}
    patients = {line.cell.patient for line in listed if line.cell.patient is not None}
    counts: dict[str, Any] = {
        "pictures": len(pictures),
        "cells": n_found,
        "listed": len(listed),
        "labelled": sum(line.cell.label is not None for line in listed),
        "patients": len(patients) or None,
        "classes": _counted(line.cell.label for line in listed),
        "dinobloom_classes": _counted(line.cell.group for line in listed),
        "annotated_classes": _counted(cell.label for cell in cells),
        "splits": _counted(line.cell.part for line in listed),
    }
    single = [name for name, count in counts["classes"].items() if count == 1]
    if single:
        notes.add("classes with a single picture", ", ".join(single))
    by_name = {
        **counts["annotated_classes"],
        **counts["splits"],
        "pictures": len(pictures),
        "cells": n_found,
        "patients": len(patients),
    }
    return {
        "dataset": dataset.name,
        "title": dataset.title,
        "origin": dataset.origin,
        "paper": dataset.paper,
        "licence": dataset.licence or "not stated",
        "modality": dataset.modality,
        "remarks": dataset.remarks,
        "source": str(top),
        "options": {key: value for key, value in asdict(options).items() if key not in ("n_workers", "overwrite")},
        "counts": counts,
        "expected": {
            name: {"published": count, "here": by_name.get(name, 0)} for name, count in dataset.expected.items()
        },
        "sizes": _counted(f"{look.size[0]}x{look.size[1]}" for look in readable),
        "modes": _counted(look.mode for look in readable),
        "oddities": notes.report(),
    }


def _counted(values: Any) -> dict[str, int]:
    return dict(sorted(Counter(value for value in values if value is not None).items()))


def _in_words(notes: Notes) -> str:
    return "; ".join(f"{count} {kind}" for kind, count in sorted(notes.counts.items())) or "nothing odd was seen"


def describe(summary: dict[str, Any], output: str | os.PathLike[str]) -> str:
    """A summary for the terminal."""
    counts = summary["counts"]
    lines = [
        f"{summary['title']} ({summary['modality']}; licence: {summary['licence']})",
        f"  {counts['pictures']} pictures, {counts['listed']} lines in the list, {counts['labelled']} labelled"
        + (f", {counts['patients']} patients" if counts["patients"] else ""),
    ]
    for title, found in (("classes", counts["classes"]), ("DinoBloom's classes", counts["dinobloom_classes"])):
        if found:
            lines.append(f"  {title}: " + ", ".join(f"{name} {count}" for name, count in found.items()))
    if counts["splits"]:
        lines.append("  splits: " + ", ".join(f"{name} {count}" for name, count in counts["splits"].items()))
    if len(summary["sizes"]) > 1:
        common = sorted(summary["sizes"].items(), key=lambda item: -item[1])[:3]
        sizes = ", ".join(f"{size} ({count})" for size, count in common)
        lines.append(f"  {len(summary['sizes'])} picture sizes, mostly {sizes}")
    if set(summary["modes"]) - {"RGB"}:
        lines.append("  modes, all read as RGB: " + ", ".join(f"{m} {count}" for m, count in summary["modes"].items()))
    differing = [(name, n) for name, n in summary["expected"].items() if n["published"] != n["here"]]
    for name, n in differing:
        lines.append(f"  published {name}: {n['published']}, here {n['here']}")
    for kind, note in summary["oddities"].items():
        lines.append(f"  {note['count']} {kind}: {'; '.join(note['examples'][:2])}" + _dots(note))
    if summary["remarks"]:
        lines.append(f"  note: {summary['remarks']}")
    lines.append(f"  written to {output}")
    return "\n".join(lines)


def _dots(note: dict[str, Any]) -> str:
    return "; ..." if note["count"] > 2 else ""


def _progress(what: str, total: int) -> Callable[[int], None]:
    """Returns a function that logs how far the work is and how long it still takes, every few seconds."""
    start = last = time.monotonic()

    def report(n_done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_REPORTS:
            last = now
            rest = (now - start) / n_done * (total - n_done)
            logger.info("%s: %d of %d, about %d:%02d min left", what, n_done, total, *divmod(round(rest), 60))

    return report
