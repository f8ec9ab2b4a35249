"""Lists, CSV and parquet tables of all readers, and split files."""

import csv
import io
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from dinov2.data.datasets.bags import read_patient_labels
from dinov2.data.datasets.labelled_cells import LabelledCells
from dinov2.data.datasets.sources import ImageSource
from dinov2.data.splits import read_split
from dinov2.eval.results import read_predictions
from tests.fuzz.mutations import ODD_TEXTS, Content, Format, damaged

PATHS = [f"images/cell_{number}.png" for number in range(12)]
CLASSES = ["eosinophil", "basophil", "monocyte"]


VALUES = {"Image Path": PATHS, "path": PATHS, "fold": ["0", "1", "2"], "patient": ["p1", "p2", "p3", "p4"]}
# the columns of each reader's table; the first word of the file's name chooses the reader
COLUMNS = {
    "images": ("Image Path", "dataset"),
    "cells": ("Image Path", "Label", "patient"),
    "labels": ("patient", "label"),
    "predictions": ("path", "label", "prediction", "patient"),
    "split": ("path", "fold"),
}


def read_images(path: Path) -> None:
    source = ImageSource.from_root(path)
    for position in range(min(len(source), 1000)):
        source.path(position)


READERS = {
    "images": read_images,
    "cells": LabelledCells.from_path,
    "labels": read_patient_labels,
    "predictions": read_predictions,
    "split": lambda path: read_split(path, [str(path.parent / name) for name in PATHS]),
}


def read_table(path: Path) -> object:
    return READERS[path.stem](path)


def rows_of(reader: str) -> list[list[str]]:
    names = COLUMNS[reader]
    values = [(VALUES.get(name, CLASSES) * 12)[: len(PATHS)] for name in names]
    return [list(names), *map(list, zip(*values, strict=True))]


def csv_case(rng: random.Random) -> tuple[str, Content]:
    reader = rng.choice(list(READERS))
    rows, buffer = rows_of(reader), io.StringIO()
    for _ in range(rng.choice((0, 1, 3))):
        row = rng.choice(rows[rng.choice((0, 1)) :])
        row[rng.randrange(len(row))] = rng.choice(ODD_TEXTS)
    if rng.random() < 0.2:
        rng.choice(rows).insert(rng.randrange(3), rng.choice(ODD_TEXTS))
    csv.writer(buffer, delimiter=rng.choice(",;\t|"), lineterminator=rng.choice(("\n", "\r\n", "\r"))).writerows(rows)
    encoding = rng.choice(("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"))
    data = buffer.getvalue().encode(encoding, "replace" if encoding == "latin-1" else "surrogatepass")
    return f"{reader}.csv", damaged(data, rng) if rng.random() < 0.6 else data


def list_case(rng: random.Random) -> tuple[str, Content]:
    lines = [*PATHS, *rng.choices(ODD_TEXTS, k=rng.choice((0, 1, 4)))]
    data = rng.choice(("\n", "\r\n", "\r")).join(lines).encode("utf-8", "surrogateescape")
    return "images.txt", damaged(data, rng) if rng.random() < 0.6 else data


def odd_column(rng: random.Random, n_rows: int) -> Any:
    """Return a parquet column of a type that hardly names a path or a class."""
    kind = rng.randrange(10)
    if kind == 0:
        return pa.array([["a", "b"]] * n_rows)
    if kind == 1:
        return pa.array([{"a": 1}] * n_rows)
    if kind == 2:
        return pa.array([rng.randbytes(9) for _ in range(n_rows)], pa.binary())
    if kind == 3:
        return pa.nulls(n_rows)
    if kind == 4:
        return pa.array(rng.choices([None, "a", "", "\0"], k=n_rows))
    if kind == 5:
        return pa.array(rng.choices([0.5, float("nan"), -1e300], k=n_rows))
    if kind == 6:
        return pa.array(rng.choices(CLASSES, k=n_rows)).dictionary_encode()
    if kind == 7:
        return pa.array([2**62] * n_rows, pa.timestamp("us"))
    if kind == 8:
        return pa.array(["x" * 4_000_000] * n_rows)  # little in the file, 48 MB in memory
    return pa.array([True] * n_rows)


def parquet_case(rng: random.Random) -> tuple[str, Content]:
    reader = rng.choice(list(READERS))
    header, *rows = rows_of(reader)
    columns = [pa.array(values) for values in zip(*rows, strict=True)]
    if rng.random() < 0.4:
        columns[rng.randrange(len(columns))] = odd_column(rng, len(rows))
    if rng.random() < 0.2:
        header[rng.randrange(len(header))] = rng.choice(("", "other", header[0], "\0", "a" * 300))
    buffer = io.BytesIO()
    parquet.write_table(
        pa.Table.from_arrays(columns, header), buffer, compression=rng.choice(("snappy", "zstd", "none"))
    )
    data = buffer.getvalue()
    return f"{reader}.parquet", damaged(data, rng) if rng.random() < 0.7 else data


FORMATS = {
    "list": Format(list_case, read_table),
    "csv": Format(csv_case, read_table),
    "parquet": Format(parquet_case, read_table),
}
