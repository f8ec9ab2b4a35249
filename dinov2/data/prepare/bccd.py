"""BCCD: blood smears with boxes of red cells, white cells and platelets.

Annotations are in the Pascal VOC format. `ImageSets/Main/*.txt` has an id a line; trainval is train and val together.
"""

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

from dinov2.data.prepare.base import Box, Cell, DataSet, Notes, images_in

WHITE = "WBC"
CLASSES = ("RBC", WHITE, "Platelets")


def find(top: Path, notes: Notes) -> Iterator[Cell]:
    parts: dict[str, str] = {}
    for part in ("train", "val", "test"):
        file = top / "ImageSets" / "Main" / f"{part}.txt"
        if file.is_file():
            parts.update(dict.fromkeys(file.read_text(encoding="utf-8").split(), part))
        else:
            notes.add("split lists that are not there", f"{part}.txt")
    for image in images_in(top / "JPEGImages"):
        own_part = parts.pop(image.stem, None)
        cells = list(_boxes(top / "Annotations" / f"{image.stem}.xml", notes))
        n_white = sum(label == WHITE for label, _ in cells)
        if n_white != 1:
            kind = "images without a white cell" if n_white == 0 else "images with several white cells"
            notes.add(kind, image.name)
        yield from (Cell(image, label, part=own_part, box=box) for label, box in cells)
        if not cells:
            notes.annotations.add(image)
    for absent, part in parts.items():
        notes.add(f"images that the {part} list names and that are not there", absent)


def _boxes(file: Path, notes: Notes) -> Iterator[tuple[str, Box]]:
    if not file.is_file():
        notes.add("images without an annotation file", file.name)
        return
    try:
        for item in ElementTree.parse(file).getroot().findall("object"):
            sides = [float(item.findtext(f"bndbox/{side}") or "nan") for side in ("xmin", "ymin", "xmax", "ymax")]
            label = (item.findtext("name") or "").strip()
            if label not in CLASSES or any(side != side for side in sides):
                notes.add("objects that are not understood", f"{file.name}: {label or 'no name'} {sides}")
                continue
            yield label, Box(*sides)
    except (ElementTree.ParseError, ValueError) as error:
        notes.add("annotation files that cannot be read", f"{file.name}: {error}")


DATASET = DataSet(
    name="bccd",
    title="BCCD",
    origin="https://github.com/Shenggan/BCCD_Dataset",
    paper="none; cite the repository",
    licence="MIT",
    layout="BCCD/JPEGImages/*.jpg, BCCD/Annotations/*.xml, BCCD/ImageSets/Main/*.txt",
    entries=("JPEGImages", "Annotations"),
    classes={name: name for name in CLASSES},
    expected={"pictures": 364},
    cuts=True,
    keep=(WHITE,),
    remarks="White-Blood-Cell-dataset has the same smears: do not train on one and test on the other",
    find=find,
)
