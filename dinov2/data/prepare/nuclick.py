"""NuClick: smears with masks of white cells.

The archive is `hemato_data.zip`, linked by the repository; `ihc_nuclick.zip` has images of tissue and is not used.
"""

from collections.abc import Iterator
from pathlib import Path

from dinov2.data.prepare.base import Cell, DataSet, Notes, boxes_of_mask, child, with_masks

PARTS = {"Train": "train", "Validation": "val"}


def find(top: Path, notes: Notes) -> Iterator[Cell]:
    for name, part in PARTS.items():
        folder = child(top, name)
        pairs = with_masks(folder / "images", folder / "masks", lambda stem: f"{stem}_mask.png", notes)
        for image, mask in pairs:
            yield from (Cell(image, part=part, box=box) for box in boxes_of_mask(image, mask, notes, threshold=0))


DATASET = DataSet(
    name="nuclick",
    title="NuClick",
    origin="https://github.com/navidstuv/NuClick",
    paper="Alemi Koohbanani et al. 2020, Medical Image Analysis 65, arXiv 2005.14511",
    layout="Hemato_Data/Train and Hemato_Data/Validation, each images/<stem>.png and masks/<stem>_mask.png",
    entries=("Train", "Validation"),
    n_entries=1,
    expected={"pictures": 1463},
    cuts=True,
    remarks="cells have no classes: there is a list to train on and no labels.csv",
    find=find,
)
