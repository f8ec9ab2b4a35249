"""White-Blood-Cell-dataset: 367 smears with masks of the nuclei (github.com/arbackes/White-Blood-Cell-dataset).

`BloodImageSetS6NucSeg/BloodImage_<5 digits>.jpg` (640 x 480) and `BloodImageSetS6NucSeg_masks/<same stem>.png`, of two
archives. Masks show nuclei, whose lobes may lie apart: lobes near each other are one cell, and the margin is wide
enough for the cytoplasm. There are no classes. The smears carry BCCD's file names.
"""

from collections.abc import Iterator
from pathlib import Path

from dinov2.data.prepare.base import Cell, DataSet, Notes, images_in
from dinov2.data.prepare.masks import cells_of_mask

IMAGES, MASKS = "BloodImageSetS6NucSeg", "BloodImageSetS6NucSeg_masks"
GAP_OF_LOBES_PX = 24


def find(top: Path, notes: Notes) -> Iterator[Cell]:
    images = images_in(top / IMAGES)
    masks = images_in(top / MASKS)
    notes.annotations.update(masks)
    for image in images:
        yield from cells_of_mask(image, top / MASKS / f"{image.stem}.png", notes, gap=GAP_OF_LOBES_PX)
    for mask in sorted({mask.stem for mask in masks} - {image.stem for image in images}):
        notes.add("masks of images that are not there", mask)


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
