"""AML Hehr: blood cells of 129 patients with four genetic AML subtypes and 60 controls (TCIA, doi 10.7937/6PPE-4020).

The label of a cell is its patient's subtype: the set is for bags (ABMIL), not for cell types.
"""

from collections.abc import Iterator
from pathlib import Path

from dinov2.data.prepare.base import Cell, DataSet, Notes, class_folders

CLASSES = {name: name for name in ("CBFB_MYH11", "NPM1", "PML_RARA", "RUNX1_RUNX1T1", "control")}


def find(top: Path, notes: Notes) -> Iterator[Cell]:
    subtype_of: dict[str, str] = {}
    for image, subtype in class_folders(top, CLASSES, notes):
        folders = image.relative_to(top).parts[1:-1]
        if not folders:
            kind = "images beside the patients' folders, left out"
        elif subtype_of.setdefault(folders[0], subtype) != subtype:
            kind = "images of a patient who has another subtype already, left out"
        else:
            yield Cell(image, subtype, patient=folders[0])
            continue
        notes.add(kind, image)
        notes.annotations.add(image)


DATASET = DataSet(
    name="aml_hehr",
    title="AML Hehr",
    origin="https://www.cancerimagingarchive.net/collection/aml-cytomorphology_mll_helmholtz/",
    paper="Hehr et al. 2023, PLOS Digital Health 2(3), doi 10.1371/journal.pdig.0000187",
    layout="data/<subtype>/<patient>/image_<n>.tif, the subtypes being " + ", ".join(CLASSES),
    entries=tuple(CLASSES),
    classes=CLASSES,
    expected={"patients": 189},
    remarks="labels are the patients' subtypes: bags for abmil.py, not cell types",
    find=find,
)
