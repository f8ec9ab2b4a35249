"""AML Matek: white cells of 100 AML patients and 100 controls, LMU Munich (TCIA, doi 10.7937/tcia.2019.36f5o9ld).

The TIFFs have an alpha channel. Labels are the folders; `annotations.dat` repeats them.
"""

from collections.abc import Iterator
from pathlib import Path

from dinov2.data.prepare.base import Cell, DataSet, Notes, class_folders

CLASSES = {
    "BAS": "basophil",
    "EBO": "erythroblast",
    "EOS": "eosinophil",
    "KSC": "smudge_cell",
    "LYA": "lymphocyte_atypical",
    "LYT": "lymphocyte_typical",
    "MMZ": "metamyelocyte",
    "MOB": "monoblast",
    "MON": "monocyte",
    "MYB": "myelocyte",
    "MYO": "myeloblast",
    "NGB": "neutrophil_band",
    "NGS": "neutrophil_segmented",
    "PMB": "promyelocyte_bilobed",
    "PMO": "promyelocyte",
}


def find(top: Path, notes: Notes) -> Iterator[Cell]:
    for image, label in class_folders(top, CLASSES, notes):
        yield Cell(image, label)


DATASET = DataSet(
    name="aml_matek",
    title="AML Matek",
    origin="https://www.cancerimagingarchive.net/collection/aml-cytomorphology_lmu/",
    paper="Matek et al. 2019, Nature Machine Intelligence 1, doi 10.1038/s42256-019-0101-9",
    licence="CC BY 3.0",
    layout="AML-Cytomorphology_LMU/<CODE>/<CODE>_<number>.tiff, the codes being " + ", ".join(CLASSES),
    entries=tuple(CLASSES),
    classes=CLASSES,
    expected={"pictures": 18365},
    remarks="in this set MYO is the myeloblast and MYB the myelocyte; patients are not named",
    find=find,
)
