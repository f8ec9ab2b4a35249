"""The lists, tables and folders to check, read into one table with a row for each time that an image is named."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from dinov2.data.datasets.image_paths import IMAGE_SUFFIXES
from dinov2.data.datasets.tables import LABEL_COLUMN, PATH_COLUMN, PATIENT_COLUMN, TABLE_SUFFIXES, open_table
from dinov2.data.splits import PART_COLUMN, PATH_COLUMNS
from dinov2.utils.files import PathLike
from dinov2.utils.paths import local_path

TRAINING, LABELS, EVALUATION = "training", "labels", "evaluation"
SETTINGS = {TRAINING: "check lists", LABELS: "--labels", EVALUATION: "--eval-splits"}
VALUE_COLUMNS = (LABEL_COLUMN, PATIENT_COLUMN, "dataset")


class Source(NamedTuple):
    """A list, table or folder; `kind` says which, `role` what it is used for, and no two have the same `name`."""

    file: Path
    kind: str
    role: str
    name: str


class Row(NamedTuple):
    """One naming of an image; `gap` names the columns that should have a value and have none."""

    line: int  # from 1; 0 in a folder
    path: str
    label: str = ""
    patient: str = ""
    dataset: str = ""
    is_hidden: bool = False  # in a folder, a name that begins with a dot
    gap: str = ""


class Inputs(NamedTuple):
    """What all sources name.

    Attributes:
        sources: what was read.
        entries: the columns of `Row`, source (position in `sources`), its role, and image (position in `paths`).
        paths: absolute path of each image.
        gaps: the same columns, of rows that lack a value; they are no entries.
    """

    sources: list[Source]
    entries: pd.DataFrame
    paths: list[str]
    gaps: pd.DataFrame


def read_inputs(training: Sequence[PathLike], labels: Sequence[PathLike], evaluation: Sequence[PathLike]) -> Inputs:
    """Read all sources, without opening the images.

    A source is a .txt list, a CSV with the columns `Image Path[,Label][,patient][,dataset]`, a folder with .txt lists
    (each becomes a source), or a folder of images, searched with all folders in it. In a folder of images given for
    labels or evaluation, the first folder below it is the label.

    Raises:
        FileNotFoundError: a source does not exist, or a folder has no list and no image.
        ValueError: a source is of another kind, is not UTF-8, lacks a column, or no image is named.
    """
    readers = {"list": _list_rows, "table": _table_rows, "folder": _folder_rows}
    sources: list[Source] = []
    for role, paths in ((TRAINING, training), (LABELS, labels), (EVALUATION, evaluation)):
        for file, kind in (found for path in paths for found in _sources_in(local_path(path), role)):
            stem = file.absolute().name if kind == "folder" else file.stem
            names = [stem, *(f"{stem}_{number}" for number in range(2, len(sources) + 2))]
            free = (name for name in names if all(name != source.name for source in sources))
            sources.append(Source(file, kind, role, next(free)))
    tables = [
        pd.DataFrame(readers[s.kind](s.file, s.role), columns=Row._fields).assign(source=i, role=s.role)
        for i, s in enumerate(sources)
    ]
    rows = pd.concat(tables, ignore_index=True)
    if rows.empty:
        files = ", ".join(str(source.file) for source in sources)
        raise ValueError(f"check lists: {files} name no image; write one image path per line")
    entries, gaps = rows[rows["gap"] == ""].reset_index(drop=True), rows[rows["gap"] != ""]
    entries["image"], unique = pd.factorize(entries.pop("path"))
    return Inputs(sources, entries, list(unique), gaps)


def _sources_in(path: Path, role: str) -> Iterable[tuple[Path, str]]:
    """Return (file or folder, kind); a folder with lists gives each of them."""
    if path.is_dir():
        lists = [file for file in sorted(path.glob("[!.]*")) if file.suffix.lower() == ".txt" and file.is_file()]
        return [(file, "list") for file in lists] if lists and role != LABELS else [(path, "folder")]
    if not path.is_file():
        raise FileNotFoundError(f"{SETTINGS[role]}: {str(path)!r} does not exist; give a .txt list, a CSV or a folder")
    if path.suffix.lower() == ".txt" and role != LABELS:
        return [(path, "list")]
    if path.suffix.lower() in TABLE_SUFFIXES:
        return [(path, "table")]
    kinds = "a CSV or a folder with a folder per class" if role == LABELS else "a .txt list, a CSV or a folder"
    raise ValueError(f"{SETTINGS[role]}: {str(path)!r} is of an unknown kind; give {kinds}")


def absolute_path(file: Path, path: str) -> str:
    """Resolve a path that a list or table names; relative ones count from its folder."""
    return os.path.abspath(os.path.join(file.parent, path))


def read_lines(file: Path, role: str) -> list[str]:
    """Read the lines of a list, without spaces around them."""
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")]
    except UnicodeDecodeError as error:
        number = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{SETTINGS[role]}: {str(file)!r}, line {number}, is not UTF-8 text ({error.reason}); save it as UTF-8"
        ) from error


def _list_rows(file: Path, role: str) -> Iterator[Row]:
    lines = enumerate(read_lines(file, role), 1)
    return (Row(number, absolute_path(file, line)) for number, line in lines if line and line[0] != "#")


def read_table(file: Path, role: str) -> tuple[pd.DataFrame, str]:
    """Read a table as strings, with line numbers as index and no empty rows, and find its column of paths."""
    opened = open_table(file, SETTINGS[role])
    path_column = next((name for name in (PATH_COLUMN, *PATH_COLUMNS) if name in opened.columns), None)
    if path_column is None or (role == LABELS and LABEL_COLUMN not in opened.columns):
        raise ValueError(
            f"{SETTINGS[role]}: {str(file)!r} has the columns {opened.columns}; expected "
            f"{PATH_COLUMN},{LABEL_COLUMN}[,{PATIENT_COLUMN}][,dataset]"
        )
    lines, rows = [], []
    for line, values in opened.rows():
        lines.append(line)
        rows.append(values)
    return pd.DataFrame(rows, index=lines, columns=opened.columns), path_column


def _table_rows(file: Path, role: str) -> Iterator[Row]:
    table, path_column = read_table(file, role)
    if role == EVALUATION and PART_COLUMN in table:
        table = table[table[PART_COLUMN].isin(("val", "test"))]
    expected = [path_column, *(column for column in VALUE_COLUMNS if column in table)]
    values = table.reindex(columns=[path_column, *VALUE_COLUMNS], fill_value="")
    for line, path, label, patient, dataset in values.itertuples(name=None):
        row = zip(values, (path, label, patient, dataset), strict=True)
        gap = ", ".join(column for column, value in row if not value and column in expected)
        yield Row(line, absolute_path(file, path), label, patient, dataset, gap=gap)


def _folder_rows(folder: Path, role: str) -> Iterator[Row]:
    is_empty = True
    for parent, folders, files in os.walk(folder):
        folders.sort()
        inside = Path(parent).relative_to(folder).parts
        for name in sorted(name for name in files if name.lower().endswith(IMAGE_SUFFIXES)):
            is_hidden = any(part.startswith(".") for part in (*inside, name))
            label = inside[0] if inside and role != TRAINING and not is_hidden else ""
            is_empty = False
            yield Row(0, os.path.abspath(os.path.join(parent, name)), label, is_hidden=is_hidden)
    if is_empty:
        raise FileNotFoundError(
            f"{SETTINGS[role]}: no .txt list and no image ({', '.join(IMAGE_SUFFIXES)}) in {str(folder)!r}; give the "
            f"folder that has them"
        )
