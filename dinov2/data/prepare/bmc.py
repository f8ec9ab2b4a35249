"""BMC: bone marrow cells of 945 patients, Munich Leukemia Laboratory (TCIA, doi 10.7937/TCIA.AXH3-T579).

Each class is a folder, with subfolders of a thousand images. The paper counts 171,374 images, TCIA's page one more.
"""

from collections.abc import Iterator
from pathlib import Path

from dinov2.data.prepare.base import Cell, DataSet, Notes, class_folders

CLASSES = {
    "ABE": "abnormal_eosinophil",
    "ART": "artefact",
    "BAS": "basophil",
    "BLA": "blast",
    "EBO": "erythroblast",
    "EOS": "eosinophil",
    "FGC": "faggot_cell",
    "HAC": "hairy_cell",
    "KSC": "smudge_cell",
    "LYI": "immature_lymphocyte",
    "LYT": "lymphocyte",
    "MMZ": "metamyelocyte",
    "MON": "monocyte",
    "MYB": "myelocyte",
    "NGB": "neutrophil_band",
    "NGS": "neutrophil_segmented",
    "NIF": "not_identifiable",
    "OTH": "other",
    "PEB": "proerythroblast",
    "PLM": "plasma_cell",
    "PMO": "promyelocyte",
}


def find(top: Path, notes: Notes) -> Iterator[Cell]:
    for image, label in class_folders(top, CLASSES, notes):
        if CLASSES.get(image.name.split("_")[0]) != label:
            notes.add("images whose name says another class than their folder", image)
        yield Cell(image, label)


DATASET = DataSet(
    name="bmc",
    title="BMC",
    modality="bone marrow",
    origin="https://www.cancerimagingarchive.net/collection/bone-marrow-cytomorphology_mll_helmholtz_fraunhofer/",
    paper="Matek et al. 2021, Blood 138(20), doi 10.1182/blood.2020010568",
    licence="CC BY 4.0",
    layout="BM_cytomorphology_data/<CODE>/<from>-<to>/<CODE>_<number>.jpg, the codes being " + ", ".join(CLASSES),
    entries=tuple(CLASSES),
    classes=CLASSES,
    expected={"pictures": 171374},
    remarks="patients are not named, so patient-grouped splits cannot be made; classes have from 8 to 29,424 images",
    find=find,
)
