"""Aslan: blood smears with boxes of red and white cells.

Coordinates are fractions of the image's sides. `labels/*.txt` has them in pixels, with notebook checkpoints beside.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from dinov2.data.datasets.tables import read_table
from dinov2.data.prepare.base import Box, Cell, DataSet, Notes, image_size

WHITE = "wbc"
CLASSES = {"rbc": "rbc", WHITE: WHITE}
SIDES = ("xmin", "ymin", "xmax", "ymax")


def find(top: Path, notes: Notes) -> Iterator[Cell]:
    rows = defaultdict(list)
    for row in read_table(top / "annotations.csv", "labels", ("image", *SIDES, "label")):
        rows[row["image"]].append(row)
    for name in sorted(rows):
        image = top / "images" / name
        if not image.is_file():
            notes.add("images that annotations.csv names and that are not there", name)
            continue
        size = image_size(image, notes)
        if size is None:
            notes.annotations.add(image)
            continue
        width, height = size
        labels = [row["label"] for row in rows[name]]
        if labels.count(WHITE) != 1:
            kind = "images without a white cell" if WHITE not in labels else "images with several white cells"
            notes.add(kind, name)
        for row, label in zip(rows[name], labels, strict=True):
            try:
                left, upper, right, lower = (float(row[side]) for side in SIDES)
                label = CLASSES[label]
            except (ValueError, KeyError) as error:
                notes.add("rows of the CSV that are not understood", f"{name}: {error}")
                continue
            yield Cell(image, label, box=Box(left * width, upper * height, right * width, lower * height))


DATASET = DataSet(
    name="aslan",
    title="Aslan",
    origin="https://github.com/draaslan/blood-cell-detection-dataset",
    paper="none; cite the repository",
    licence="MIT",
    layout="images/image-<n>.png and annotations.csv (image,xmin,ymin,xmax,ymax,label)",
    entries=("images", "annotations.csv"),
    classes=CLASSES,
    expected={"pictures": 100, "rbc": 2237, "wbc": 103},
    cuts=True,
    keep=(WHITE,),
    remarks="annotations.csv has 2,236 red cells where the distributor counts 2,237; the PNGs are RGBA",
    find=find,
)
