"""LISC: smears of healthy people with masks that an expert drew.

Folder names mix cases (`Baso`, `eosi`). The cells in `mixt` are of several kinds and have no labels.
"""

from collections.abc import Iterator
from pathlib import Path

from dinov2.data.prepare.base import Cell, DataSet, Notes, boxes_of_mask, child, with_masks

CLASSES = {"Baso": "basophil", "eosi": "eosinophil", "lymp": "lymphocyte", "mono": "monocyte", "neut": "neutrophil"}
MIXED = "mixt"


def find(top: Path, notes: Notes) -> Iterator[Cell]:
    smears, truth = child(top, "Main Dataset"), child(top, "Ground Truth Segmentation")
    for code, label in {**CLASSES, MIXED: None}.items():
        folder = child(smears, code)
        masks = child(truth, folder.name) / "areaforexpert1"
        for image, mask in with_masks(folder, masks, lambda stem: f"{stem}_expert.bmp", notes):
            yield from (Cell(image, label, box=box) for box in boxes_of_mask(image, mask, notes, threshold=0))


DATASET = DataSet(
    name="lisc",
    title="LISC",
    origin="http://users.cecs.anu.edu.au/~hrezatofighi/Data/Leukocyte%20Data.htm",
    paper="Rezatofighi and Soltanian-Zadeh 2011, Comput. Med. Imaging Graph. 35(4)",
    layout="'Main Dataset'/<class>/<n>.bmp and 'Ground Truth Segmentation'/<class>/areaforexpert1/<n>_expert.bmp",
    entries=("Main Dataset", "Ground Truth Segmentation"),
    classes=CLASSES,
    cuts=True,
    remarks="cells of the folder 'mixt' are cut out without a label",
    find=find,
)
