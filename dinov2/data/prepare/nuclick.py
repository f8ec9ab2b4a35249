"""NuClick: smears with masks of white cells (Alemi Koohbanani et al. 2020, arXiv 2005.14511).

As github.com/navidstuv/NuClick links it, `Hemato_Data/{Train,Validation}/images/<stem>.png` and
`.../masks/<stem>_mask.png`, of `hemato_data.zip`. Stems have blanks and brackets, like `img (1)`. There are no
classes. The archive beside it, `ihc_nuclick.zip`, is of tissue and not for this.
"""

from collections.abc import Iterator
from pathlib import Path

from dinov2.data.prepare.base import Cell, DataSet, Notes, child, images_in
from dinov2.data.prepare.masks import cells_of_mask

PARTS = {"Train": "train", "Validation": "val"}


def find(top: Path, notes: Notes) -> Iterator[Cell]:
    for name, part in PARTS.items():
        folder = child(top, name)
        masks = images_in(folder / "masks")
        notes.annotations.update(masks)
        images = images_in(folder / "images")
        for image in images:
            yield from cells_of_mask(image, folder / "masks" / f"{image.stem}_mask.png", notes, part=part, threshold=0)
        stems = {f"{image.stem}_mask" for image in images}
        for mask in masks:
            if mask.stem not in stems:
                notes.add("masks of images that are not there", mask.relative_to(top))


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
