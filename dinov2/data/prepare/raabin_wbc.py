"""Raabin-WBC: double-labelled white cells, already cropped.

Unpacking may make a folder of the same name inside: `Train/Train/<class>`. TestB is from another microscope and camera.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from dinov2.data.prepare.base import Cell, DataSet, Notes, child, class_folders, folders_in

CLASSES = {name: name for name in ("basophil", "eosinophil", "lymphocyte", "monocyte", "neutrophil")}
PARTS = {"train": "train", "testa": "testA", "testb": "testB"}


def find(top: Path, notes: Notes) -> Iterator[Cell]:
    for folder in folders_in(top):
        part = PARTS.get(re.sub("[^a-z]", "", folder.name.lower()))
        if part is not None:
            inner = child(folder, folder.name)
            for image, label in class_folders(inner if inner.is_dir() else folder, CLASSES, notes):
                yield Cell(image, label, part=part)


DATASET = DataSet(
    name="raabin_wbc",
    title="Raabin WBC",
    origin="https://raabindata.com/free-data/",
    paper="Mousavi Kouzehkanan et al. 2022, Scientific Reports 12, doi 10.1038/s41598-021-04426-x",
    layout="Train, TestA and TestB, each <class>/*.jpg, the classes being " + ", ".join(CLASSES),
    entries=("Train", "Test*A", "Test*B"),
    n_entries=1,
    classes=CLASSES,
    expected={"train": 10175},
    remarks="TestA and TestB are test sets of their own: splits/testA.csv and splits/testB.csv",
    find=find,
)
