"""LISC: smears of healthy people with hand-drawn masks (Rezatofighi and Soltanian-Zadeh 2011).

`LISC Database/Main Dataset/<class>/<n>.bmp` (720 x 576) and, drawn by an expert,
`LISC Database/Ground Truth Segmentation/<class>/areaforexpert1/<n>_expert.bmp`. Folder names mix cases (`Baso`,
`eosi`). `mixt` has images with cells of several kinds, which nothing tells apart: they are cut out without a label.
"""

from collections.abc import Iterator
from pathlib import Path

from dinov2.data.prepare.base import Cell, DataSet, Notes, child, images_in
from dinov2.data.prepare.masks import cells_of_mask

CLASSES = {"Baso": "basophil", "eosi": "eosinophil", "lymp": "lymphocyte", "mono": "monocyte", "neut": "neutrophil"}
MIXED = "mixt"


def find(top: Path, notes: Notes) -> Iterator[Cell]:
    smears, truth = child(top, "Main Dataset"), child(top, "Ground Truth Segmentation")
    for code, label in {**CLASSES, MIXED: None}.items():
        folder = child(smears, code)
        masks = child(truth, folder.name) / "areaforexpert1" if truth.is_dir() else truth
        drawn = {mask.stem.split("_")[0]: mask for mask in images_in(masks)}
        for image in images_in(folder):
            mask = drawn.pop(image.stem, masks / f"{image.stem}_expert.bmp")
            yield from cells_of_mask(image, mask, notes, label, threshold=0)
        for mask in drawn.values():
            notes.add("masks of images that are not there", mask.relative_to(top))
            notes.annotations.add(mask)


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
