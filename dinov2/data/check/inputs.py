"""Read the lists, tables and folders to check into one table, with a row for each time that an image is named."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from dinov2.data.datasets.decode import IMAGE_SUFFIXES
from dinov2.data.datasets.tables import (
    LABEL_COLUMN,
    PATH_COLUMN,
    PATH_COLUMNS,
    PATIENT_COLUMN,
    SET_COLUMN,
    TABLE_SUFFIXES,
    open_table,
    read_list,
)
from dinov2.data.splits import PART_COLUMN
from dinov2.utils.files import PathLike, local_path

TRAINING, LABELS, EVALUATION = "training", "labels", "evaluation"
SETTINGS = {TRAINING: "check lists", LABELS: "--labels", EVALUATION: "--eval-splits"}
VALUE_COLUMNS = (LABEL_COLUMN, PATIENT_COLUMN, SET_COLUMN)


class Source(NamedTuple):
    """A list, table or folder that names images."""

    file: Path
    kind: str  # "list", "table" or "folder"
    role: str  # TRAINING, LABELS or EVALUATION
    rows: pd.DataFrame  # its rows and columns by line number, with absolute paths
    gaps: Sequence[str] = ()  # the rows that lack a value, in words


def read_inputs(
    training: Sequence[PathLike], labels: Sequence[PathLike], evaluation: Sequence[PathLike]
) -> tuple[list[Source], pd.DataFrame, list[str]]:
    """Read all sources, without opening the images.

    A source is a .txt list, a table with the columns `Image Path[,Label][,patient][,dataset]`, a folder with .txt lists
    (each becomes a source), or a folder of images, searched with all folders in it. In a folder of images given for
    labels or evaluation, the folders at the first level are the labels.

    Returns:
        The sources; the entries, one for each time that a source names an image, with the columns source (its
        position), role, line, place, image (position in the paths), label, patient, dataset ("" for none) and is_hidden
        (a folder contains the image and its name begins with a dot); and the absolute path of each image.

    Raises:
        FileNotFoundError: a source does not exist, or a folder has no list and no image.
        ValueError: a source is of another kind, is not UTF-8, lacks a column, or no image is named.
    """
    sources = []
    for role, paths in ((TRAINING, training), (LABELS, labels), (EVALUATION, evaluation)):
        for path in map(local_path, paths):
            lists = [] if role == LABELS else sorted(path.glob("[!.]*.[tT][xX][tT]"))
            sources += [_read_source(file, role) for file in lists or [path]]
    entries = pd.concat([_entries(source).assign(source=i) for i, source in enumerate(sources)], ignore_index=True)
    if entries.empty:
        files = ", ".join(str(source.file) for source in sources)
        raise ValueError(f"check lists: {files} name no image; write one image path per line")
    entries["image"], unique = pd.factorize(entries.pop("path"))
    return sources, entries, list(unique)


def _read_source(file: Path, role: str) -> Source:
    setting, suffix = SETTINGS[role], file.suffix.lower()
    if file.is_dir():
        return Source(file, "folder", role, _read_folder(file, setting, has_labels=role != TRAINING))
    if not file.is_file():
        raise FileNotFoundError(f"{setting}: {str(file)!r} does not exist; give a .txt list, a CSV or a folder")
    if suffix == ".txt" and role != LABELS:
        paths = [os.path.abspath(file.parent / path) for path in read_list(file, setting)]
        return Source(file, "list", role, pd.DataFrame({PATH_COLUMN: paths}))
    if suffix not in TABLE_SUFFIXES:
        kinds = "a CSV or a folder with a folder per class" if role == LABELS else "a .txt list, a CSV or a folder"
        raise ValueError(f"{setting}: {str(file)!r} is of an unknown kind; give {kinds}")
    table = open_table(file, setting)
    columns = [name for name in (*PATH_COLUMNS, *VALUE_COLUMNS) if name in table.columns]
    if not set(PATH_COLUMNS) & set(columns) or (role == LABELS and LABEL_COLUMN not in columns):
        raise ValueError(
            f"{setting}: {str(file)!r} has the columns {table.columns}; expected "
            f"{PATH_COLUMN},{LABEL_COLUMN}[,{PATIENT_COLUMN}][,{SET_COLUMN}]"
        )
    rows = pd.DataFrame.from_dict(dict(table.rows()), orient="index", columns=table.columns)
    is_empty = rows[columns] == ""
    has_gap = is_empty.any(axis=1)
    gaps = [
        f"{file}, line {row.Index}: no value for {', '.join(is_empty.columns[list(row[1:])])}"
        for row in is_empty[has_gap].itertuples()
    ]
    rows = rows[~has_gap].copy()
    rows[columns[0]] = [os.path.abspath(file.parent / path) for path in rows[columns[0]]]
    return Source(file, "table", role, rows, gaps)


def _read_folder(folder: Path, setting: str, has_labels: bool) -> pd.DataFrame:
    folder = folder.absolute()
    entries = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    files = sorted(file for file in entries if file.suffix.lower() in IMAGE_SUFFIXES)  # with the hidden ones
    if not files:
        raise FileNotFoundError(
            f"{setting}: no .txt list and no image ({', '.join(IMAGE_SUFFIXES)}) in {str(folder)!r}; give the "
            f"folder that has them"
        )
    paths = list(map(os.path.abspath, files))
    rows = pd.DataFrame({PATH_COLUMN: paths}, dtype=object)  # pandas' text columns refuse names that are not UTF-8
    if has_labels:
        below = (file.relative_to(folder).parts for file in files)
        rows[LABEL_COLUMN] = [parts[0] if len(parts) > 1 else "" for parts in below]
    return rows


def _entries(source: Source) -> pd.DataFrame:
    rows = source.rows
    if source.role == EVALUATION and PART_COLUMN in rows:
        rows = rows[rows[PART_COLUMN].isin(("val", "test"))]
    path_column = next(name for name in PATH_COLUMNS if name in rows)
    columns = {"path": path_column, "label": LABEL_COLUMN, "patient": PATIENT_COLUMN, "dataset": SET_COLUMN}
    entries = pd.DataFrame({name: rows.get(column, "") for name, column in columns.items()}, rows.index)
    entries = entries.assign(line=rows.index, role=source.role, place=source.file.name, is_hidden=False)
    if source.kind == "table":
        entries["place"] += [f" line {line}" for line in rows.index]
    elif source.kind == "folder":
        below = entries["path"].str.slice(len(os.path.abspath(source.file)))
        entries["is_hidden"] = below.str.contains(f"{os.sep}.", regex=False)
        entries.loc[entries["is_hidden"], "label"] = ""
    return entries
