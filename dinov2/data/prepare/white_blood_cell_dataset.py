"""White-Blood-Cell-dataset: 367 smears with masks of the nuclei.

The lobes of a nucleus may be separate: lobes close to each other are one cell, and the margin is wide enough for the
cytoplasm.
"""

from collections.abc import Iterator
from pathlib import Path

from dinov2.data.prepare.base import Cell, DataSet, Notes, boxes_of_mask, with_masks

IMAGES, MASKS = "BloodImageSetS6NucSeg", "BloodImageSetS6NucSeg_masks"
GAP_OF_LOBES_PX = 24


def find(top: Path, notes: Notes) -> Iterator[Cell]:
    for image, mask in with_masks(top / IMAGES, top / MASKS, lambda stem: f"{stem}.png", notes):
        yield from (Cell(image, box=box) for box in boxes_of_mask(image, mask, notes, gap=GAP_OF_LOBES_PX))


DATASET = DataSet(
    name="white_blood_cell_dataset",
    title="White-Blood-Cell-dataset",
    origin="https://github.com/arbackes/White-Blood-Cell-dataset",
    paper="Mohamed and Far 2012, IEEE Healthcom, pp. 202-207",
    layout=f"{IMAGES}/BloodImage_<number>.jpg and {MASKS}/BloodImage_<number>.png",
    entries=(IMAGES, MASKS),
    expected={"pictures": 367},
    cuts=True,
    margin=0.4,
    remarks="the smears seem to be BCCD's: do not train on one and test on the other; there are no classes",
    find=find,
)
