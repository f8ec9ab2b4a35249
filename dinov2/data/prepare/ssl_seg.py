"""SSL Seg (segmentation_WBC): single white cells with masks.

`Dataset 1` (Jiangxi Tecom) and `Dataset 2` (CellaVision blog) have a BMP and a PNG mask with the same stem for each
cell. Masks are black, grey (cytoplasm) and white (nucleus). File names have three digits, ids in the CSVs fewer.
"""

from collections.abc import Iterator
from pathlib import Path

from dinov2.data.datasets.tables import open_table
from dinov2.data.prepare.base import Cell, DataSet, Notes, boxes_of_mask, images_in

CLASSES = {"1": "neutrophil", "2": "lymphocyte", "3": "monocyte", "4": "eosinophil", "5": "basophil"}
CYTOPLASM_OR_NUCLEUS = 64  # of a mask's greys 0, 128 and 255


def find(top: Path, notes: Notes) -> Iterator[Cell]:
    for folder in (top / "Dataset 1", top / "Dataset 2"):
        file = top / f"Class Labels of {folder.name}.csv"
        labels = _labels(file, notes) if file.is_file() else {}
        if folder.is_dir() and not labels:
            notes.add("label files that are not there", file.name)
        for image in (path for path in images_in(folder) if path.suffix.lower() != ".png"):
            label = labels.pop(int(image.stem), None) if image.stem.isdigit() else None
            if label is None:
                notes.add("images without a class in the CSV", image)
            mask = image.with_suffix(".png")
            boxes = boxes_of_mask(image, mask, notes, threshold=CYTOPLASM_OR_NUCLEUS, single=True)
            yield Cell(image, label, box=next(boxes, None))
        for absent in labels:
            notes.add("images that the CSV names and that are not there", f"{folder.name}/{absent:03d}")


def _labels(file: Path, notes: Notes) -> dict[int, str]:
    labels = {}
    for _, row in open_table(file, "labels").rows():
        if len(row) >= 2 and row[0].isdigit() and row[1] in CLASSES:
            labels[int(row[0])] = CLASSES[row[1]]
        elif row[0]:
            notes.add("rows of the CSV that are not understood", f"{file.name}: {','.join(row)}")
    return labels


DATASET = DataSet(
    name="ssl_seg",
    title="SSL Seg",
    origin="https://github.com/zxaoyou/segmentation_WBC",
    paper="Zheng et al. 2018, Micron 107, doi 10.1016/j.micron.2018.01.010",
    licence="GPL-3.0 (of the repository)",
    layout="Dataset 1/<3 digits>.bmp and .png (masks), 'Class Labels of Dataset 1.csv', the same for Dataset 2",
    entries=("Dataset 1", "Dataset 2", "Class Labels of Dataset ?.csv"),
    classes=CLASSES,
    expected={"pictures": 400},
    cuts=True,
    remarks="the distributor's own warning: experts did not check the class labels; one class has a single image in "
    "Dataset 1; 112.bmp and 139.bmp there are the same image",
    find=find,
)
