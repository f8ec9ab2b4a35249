"""Warty pig: white cells of juvenile Visayan warty pigs.

THE LAYOUT IS NOT PUBLISHED in a form that could be checked. Assumed: folders whose names contain a cell type, at any
depth, in any case, also as a plural. Images elsewhere are listed without a label and counted.
"""

from collections.abc import Iterator
from pathlib import Path

from dinov2.data.datasets import find_images
from dinov2.data.prepare.base import Cell, DataSet, Notes

CLASSES = ("basophil", "eosinophil", "lymphocyte", "monocyte", "neutrophil")
PARTS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def find(top: Path, notes: Notes) -> Iterator[Cell]:
    for image in find_images(top):
        folders = [folder.lower() for folder in image.relative_to(top).parts[:-1]]
        named = {name for folder in folders for name in CLASSES if name in folder}
        if len(named) != 1:
            notes.add("images whose folders name no cell type (or several), unlabelled", image)
        part = next((PARTS[folder] for folder in folders if folder in PARTS), None)
        yield Cell(image, named.pop() if len(named) == 1 else None, part=part)


DATASET = DataSet(
    name="warty_pig",
    title="Warty pig",
    modality="peripheral blood of pigs",
    origin="https://ieee-dataport.org/documents/"
    "dataset-machine-learning-based-classification-white-blood-cells-juvenile-visayan-warty-pig",
    paper="Alipo-on et al., IEEE DataPort (see its page)",
    layout="folders named like cell types (" + ", ".join(CLASSES) + "), perhaps in train and test folders",
    entries=(*(f"*{name}*" for name in CLASSES), "train*", "test*"),
    classes={name: name for name in CLASSES},
    remarks="the layout is a guess; see whether the counts are what you expect",
    find=find,
)
