"""AML Matek: white cells of 100 AML patients and 100 controls, LMU Munich (TCIA, doi 10.7937/tcia.2019.36f5o9ld).

Lines of `annotations.dat` begin with an image's path and its class. The TIFFs have an alpha channel.
"""

from collections.abc import Iterator
from pathlib import Path

from dinov2.data.prepare.base import Cell, DataSet, Notes, class_folders, label_file

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
    annotated = _annotations(top, notes)
    for image, label in class_folders(top, CLASSES, notes):
        code = annotated.pop(image.name, None)
        if code is not None and CLASSES.get(code) != label:
            notes.add("images that annotations.dat calls otherwise than their folder", image.relative_to(top))
        yield Cell(image, label)
    for absent in annotated:
        notes.add("images that annotations.dat names and that are not there", absent)


def _annotations(top: Path, notes: Notes) -> dict[str, str]:
    file = label_file("annotations.dat", notes, top, top.parent)
    lines = (line.replace(",", " ").split() for line in file.read_text(encoding="utf-8").splitlines()) if file else ()
    return {Path(line[0]).name: line[1] for line in lines if len(line) >= 2 and line[1] in CLASSES}


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
