"""Raabin Leukemia: blood of patients with leukaemia, from the makers of Raabin-WBC.

THE LAYOUT IS NOT PUBLISHED in a form that could be checked. Assumed: folders whose names contain one leukaemia. Images
elsewhere are listed without a label. The label is the patient's disease, not the type of a cell.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from dinov2.data.datasets import find_images
from dinov2.data.prepare.base import Cell, DataSet, Notes

CLASSES = ("ALL", "AML", "APL", "CLL", "CML")


def find(top: Path, notes: Notes) -> Iterator[Cell]:
    for image in find_images(top):
        folders = image.relative_to(top).parts[:-1]
        words = {word.upper() for folder in folders for word in re.split("[^A-Za-z]+", folder)}
        named = words & set(CLASSES)
        if len(named) != 1:
            notes.add("images whose folders name no leukaemia (or several), unlabelled", image)
        yield Cell(image, named.pop() if len(named) == 1 else None)


DATASET = DataSet(
    name="raabin_leukemia",
    title="Raabin Leukemia",
    origin="https://raabindata.com/free-data/",
    paper="none known; cite the site",
    layout="folders that name the leukaemia (ALL, AML, APL, CLL, CML) with images below",
    entries=tuple(f"*{name}*" for name in CLASSES),
    n_entries=1,
    classes={name: name for name in CLASSES},
    remarks="the layout is a guess; see whether the counts are what you expect",
    find=find,
)
