"""AML Hehr: blood cells of 129 patients with four genetic AML subtypes and 60 controls (Hehr et al. 2023).

`data/<subtype>/<patient>/image_<n>.tif` as TCIA delivers it (doi 10.7937/6PPE-4020). The label of a cell is its
patient's subtype: bags for ABMIL, not cell types. `metadata.csv` beside the subtypes names the patients.
"""

from collections.abc import Iterator
from pathlib import Path

from dinov2.data.datasets.tables import open_table
from dinov2.data.prepare.base import Cell, DataSet, Notes, class_folders

CLASSES = ("CBFB_MYH11", "NPM1", "PML_RARA", "RUNX1_RUNX1T1", "control")


def find(top: Path, notes: Notes) -> Iterator[Cell]:
    subtype_of: dict[str, str] = {}
    for image, subtype in class_folders(top, {name: name for name in CLASSES}, notes):
        folders = image.relative_to(top).parts[1:-1]
        if not folders:
            notes.add("images beside the patients' folders, left out", image.relative_to(top))
            notes.annotations.add(image)
            continue
        patient = folders[0]
        if subtype_of.setdefault(patient, subtype) != subtype:
            notes.add("images of a patient who has another subtype already, left out", image.relative_to(top))
            notes.annotations.add(image)
            continue
        yield Cell(image, subtype, patient=patient)
    file = next((f for f in (top / "metadata.csv", top.parent / "metadata.csv") if f.is_file()), None)
    if file is None:
        notes.add("label files that are not there", "metadata.csv")
        return
    for _, row in open_table(file, "labels").rows():
        if not set(row) & set(subtype_of):
            notes.add("patients that metadata.csv names and that are not there", row[0])


DATASET = DataSet(
    name="aml_hehr",
    title="AML Hehr",
    origin="https://www.cancerimagingarchive.net/collection/aml-cytomorphology_mll_helmholtz/",
    paper="Hehr et al. 2023, PLOS Digital Health 2(3), doi 10.1371/journal.pdig.0000187",
    layout="data/<subtype>/<patient>/image_<n>.tif, the subtypes being " + ", ".join(CLASSES),
    entries=CLASSES,
    classes={name: name for name in CLASSES},
    expected={"patients": 189},
    remarks="labels are the patients' subtypes: bags for abmil.py, not cell types",
    find=find,
)
