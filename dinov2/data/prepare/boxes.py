"""Data sets of smears with boxes around red cells, white cells and platelets, in a CSV or in Pascal VOC files."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from dinov2.data.datasets.tables import read_table
from dinov2.data.prepare.base import Box, Cell, DataSet, Notes, image_size, images_in

BCCD_CLASSES = ("RBC", "WBC", "Platelets")
SIDES = ("xmin", "ymin", "xmax", "ymax")


def find_aslan(top: Path, notes: Notes) -> Iterator[Cell]:
    rows = pd.DataFrame(read_table(top / "annotations.csv", "labels", ("image", *SIDES, "label")))
    for name, cells in rows.groupby("image"):
        image = top / "images" / str(name)
        if not image.is_file():
            notes.add("images that annotations.csv names and that are not there", str(name))
            continue
        size = image_size(image, notes)
        if size is None:
            notes.annotations.add(image)
            continue
        _note_white_cells((cells["label"] == "wbc").sum(), image, notes)
        for row in cells.to_dict("records"):
            try:
                sides = [float(row[side]) * length for side, length in zip(SIDES, size * 2, strict=True)]
                yield Cell(image, ASLAN.classes[row["label"]], box=Box(*sides))
            except (ValueError, KeyError) as error:
                notes.add("rows of the CSV that are not understood", f"{name}: {error}")


def find_bccd(top: Path, notes: Notes) -> Iterator[Cell]:
    parts: dict[str, str] = {}
    for part in ("train", "val", "test"):
        file = top / "ImageSets" / "Main" / f"{part}.txt"
        if file.is_file():
            parts.update(dict.fromkeys(file.read_text(encoding="utf-8").split(), part))
        else:
            notes.add("split lists that are not there", f"{part}.txt")
    for image in images_in(top / "JPEGImages"):
        own_part = parts.pop(image.stem, None)
        cells = list(_voc_boxes(top / "Annotations" / f"{image.stem}.xml", notes))
        _note_white_cells(sum(label == "WBC" for label, _ in cells), image, notes)
        yield from (Cell(image, label, part=own_part, box=box) for label, box in cells)
        if not cells:
            notes.annotations.add(image)
    for absent, part in parts.items():
        notes.add(f"images that the {part} list names and that are not there", absent)


def _note_white_cells(count: int, image: Path, notes: Notes) -> None:
    """Note an image unless it has exactly one white cell."""
    if count != 1:
        notes.add("images without a white cell" if count == 0 else "images with several white cells", image.name)


def _voc_boxes(file: Path, notes: Notes) -> Iterator[tuple[str, Box]]:
    if not file.is_file():
        notes.add("images without an annotation file", file.name)
        return
    try:
        for item in ElementTree.parse(file).getroot().findall("object"):
            box = Box(*(float(item.findtext(f"bndbox/{side}") or "nan") for side in SIDES))
            label = (item.findtext("name") or "").strip()
            if label not in BCCD_CLASSES or any(side != side for side in box):
                notes.add("objects that are not understood", f"{file.name}: {label or 'no name'} {list(box)}")
                continue
            yield label, box
    except (ElementTree.ParseError, ValueError) as error:
        notes.add("annotation files that cannot be read", f"{file.name}: {error}")


ASLAN = DataSet(
    name="aslan",
    title="Aslan",
    origin="https://github.com/draaslan/blood-cell-detection-dataset",
    paper="none; cite the repository",
    licence="MIT",
    layout="images/image-<n>.png and annotations.csv (image,xmin,ymin,xmax,ymax,label)",
    entries=("images", "annotations.csv"),
    classes={"rbc": "rbc", "wbc": "wbc"},
    expected={"pictures": 100, "rbc": 2237, "wbc": 103},
    cuts=True,
    keep=("wbc",),
    remarks="annotations.csv has 2,236 red cells where the distributor counts 2,237; the PNGs are RGBA",
    find=find_aslan,
)
BCCD = DataSet(
    name="bccd",
    title="BCCD",
    origin="https://github.com/Shenggan/BCCD_Dataset",
    paper="none; cite the repository",
    licence="MIT",
    layout="BCCD/JPEGImages/*.jpg, BCCD/Annotations/*.xml, BCCD/ImageSets/Main/*.txt",
    entries=("JPEGImages", "Annotations"),
    classes={name: name for name in BCCD_CLASSES},
    expected={"pictures": 364},
    cuts=True,
    keep=("WBC",),
    remarks="White-Blood-Cell-dataset has the same smears: do not train on one and test on the other",
    find=find_bccd,
)
