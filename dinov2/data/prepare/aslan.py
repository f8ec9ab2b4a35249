"""Aslan: blood smears with boxes of red and white cells (github.com/draaslan/blood-cell-detection-dataset).

`images/image-<n>.png` (256 px, RGBA) and `annotations.csv` with `image,xmin,ymin,xmax,ymax,label`, coordinates being
fractions of the image's sides. `labels/*.txt` repeats them in pixels, with stray notebook checkpoints.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from dinov2.data.prepare.base import Box, Cell, DataSet, Notes, read_rows

WHITE = "wbc"
CLASSES = ("rbc", WHITE)
SIDES = ("xmin", "ymin", "xmax", "ymax")


def find(top: Path, notes: Notes) -> Iterator[Cell]:
    rows = defaultdict(list)
    for row in read_rows(top / "annotations.csv", ("image", *SIDES, "label")):
        rows[row["image"]].append(row)
    for name in sorted(rows):
        image = top / "images" / name
        if not image.is_file():
            notes.add("images that annotations.csv names and that are not there", name)
            continue
        try:
            with Image.open(image) as header:
                width, height = header.size
        except (OSError, SyntaxError, ValueError) as error:
            notes.add("unreadable images and masks", f"{name}: {error}")
            notes.annotations.add(image)
            continue
        labels = [row["label"] for row in rows[name]]
        if labels.count(WHITE) != 1:
            kind = "images without a white cell" if WHITE not in labels else "images with several white cells"
            notes.add(kind, name)
        for row, label in zip(rows[name], labels, strict=True):
            try:
                left, top_edge, right, bottom = (float(row[side]) for side in SIDES)
            except ValueError as error:
                notes.add("rows of the CSV that are not understood", f"{name}: {error}")
                continue
            if label not in CLASSES:
                notes.add("rows of the CSV that are not understood", f"{name}: label {label!r}")
                continue
            yield Cell(image, label, box=Box(left * width, top_edge * height, right * width, bottom * height))


DATASET = DataSet(
    name="aslan",
    title="Aslan",
    origin="https://github.com/draaslan/blood-cell-detection-dataset",
    paper="none; cite the repository",
    licence="MIT",
    layout="images/image-<n>.png and annotations.csv (image,xmin,ymin,xmax,ymax,label)",
    entries=("images", "annotations.csv"),
    classes={name: name for name in CLASSES},
    expected={"pictures": 100, "rbc": 2237, "wbc": 103},
    cuts=True,
    keep=(WHITE,),
    remarks="annotations.csv has 2,236 red cells where the distributor counts 2,237; the PNGs are RGBA",
    find=find,
)
