"""KRD-WBC: smears with masks of white cells.

The class column of the CSV is spelt "Categoriy". The names of its other columns could not be checked, so the first
value with a number in a row names the image. Masks are JPEGs with grey edges, so a threshold separates the cells.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from dinov2.data.datasets.tables import open_table
from dinov2.data.prepare.base import Cell, DataSet, Notes, boxes_of_mask, child, with_masks

LABEL_COLUMN = re.compile("categor|class|label", re.IGNORECASE)


def find(top: Path, notes: Notes) -> Iterator[Cell]:
    labels = _labels(child(top, "class labels.csv"), notes)
    folder = child(top, "Dataset")
    pairs = with_masks(folder / "image", folder / "mask", lambda stem: f"mask{_number(stem)}.jpg", notes)
    for image, mask in pairs:
        label = labels.pop(_number(image.stem), None)
        if label is None:
            notes.add("images without a class in the CSV", image.name)
        yield from (Cell(image, label, box=box) for box in boxes_of_mask(image, mask, notes))
    for number in labels:
        notes.add("images that the CSV names and that are not there", f"image{number}")


def _labels(file: Path, notes: Notes) -> dict[int | None, str]:
    table = open_table(file, "labels")
    column = next((name for name in table.columns if LABEL_COLUMN.match(name)), None)
    if column is None:
        raise ValueError(f"{str(file)!r}: no column of classes ('Categoriy') among {table.columns or 'none'}")
    labels: dict[int | None, str] = {}
    for _, row in table.records():
        label = row.pop(column)
        number = next((_number(value) for value in row.values() if _number(value) is not None), None)
        if number is None or not label:
            notes.add("rows of the CSV that are not understood", f"{file.name}: {','.join(row.values())}")
        else:
            labels[number] = label.lower()
    return labels


def _number(text: str) -> int | None:
    match = re.search(r"\d+", text)
    return int(match.group()) if match else None


DATASET = DataSet(
    name="krd_wbc",
    title="KRD-WBC",
    origin="https://data.mendeley.com/datasets/jzdj6h7gms/2",
    paper="Mendeley Data, doi 10.17632/jzdj6h7gms.2",
    layout="Dataset/image/image<n>.jpg, Dataset/mask/mask<n>.jpg and 'class labels.csv'",
    entries=("Dataset", "class labels.csv"),
    cuts=True,
    remarks="several cells of one image share the image's class",
    find=find,
)
