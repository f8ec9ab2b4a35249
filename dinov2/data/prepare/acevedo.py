"""PBC / Acevedo: normal peripheral blood cells, Barcelona.

The prefix of a file's name gives the stage of neutrophils and immature granulocytes. DinoBloom's ten classes come from
these prefixes; platelets and cells of an unspecified stage belong to none. The set has no official split: the lists of
WBCAtt (`pbc_attr_v1_{train,val,test}.csv`, Tsutsui et al., NeurIPS 2023) are used if they are beside it.
"""

from collections.abc import Iterator
from pathlib import Path

from dinov2.data.datasets.tables import read_table
from dinov2.data.prepare.base import Cell, DataSet, Notes, class_folders

CELL_TYPES = ("basophil", "eosinophil", "erythroblast", "ig", "lymphocyte", "monocyte", "neutrophil", "platelet")
CLASSES = {name: name for name in CELL_TYPES}
STAGES = {
    "BA": "basophil",
    "BNE": "neutrophil_band",
    "EO": "eosinophil",
    "ERB": "erythroblast",
    "LY": "lymphocyte",
    "MMY": "metamyelocyte",
    "MO": "monocyte",
    "MY": "myelocyte",
    "PMY": "promyelocyte",
    "SNE": "neutrophil_segmented",
}
WITHOUT_STAGE = {"IG", "NEUTROPHIL", "PLATELET"}
SPLIT_FOLDERS = (".", "..", "../wbcatt/submission", "../../wbcatt/submission")


def find(top: Path, notes: Notes) -> Iterator[Cell]:
    parts = _parts(top, notes)
    for image, label in class_folders(top, CLASSES, notes):
        prefix = image.name.split("_")[0].upper()
        if prefix not in STAGES and prefix not in WITHOUT_STAGE:
            notes.add("file prefixes that are not known", image)
        yield Cell(image, label, STAGES.get(prefix), part=parts.pop(f"{image.parent.name}/{image.name}", None))
    for absent, part in parts.items():
        notes.add(f"images that the {part} list names and that are not there", absent)


def _parts(top: Path, notes: Notes) -> dict[str, str]:
    parts = {}
    for part in ("train", "val", "test"):
        file = next((f for f in (top / d / f"pbc_attr_v1_{part}.csv" for d in SPLIT_FOLDERS) if f.is_file()), None)
        for row in read_table(file, "labels", ("path",)) if file else ():
            parts["/".join(Path(row["path"]).parts[-2:])] = part
    return parts


DATASET = DataSet(
    name="acevedo",
    title="Acevedo (PBC)",
    origin="https://data.mendeley.com/datasets/snkd93bnjr/1",
    paper="Acevedo et al. 2020, Data in Brief 30, doi 10.1016/j.dib.2020.105474",
    licence="CC BY 4.0",
    layout="PBC_dataset_normal_DIB/<class>/<PREFIX>_<number>.jpg, the classes being " + ", ".join(CLASSES),
    entries=CELL_TYPES,
    classes=CLASSES,
    expected={"pictures": 17092},
    remarks="neutrophil/.DS_169665.jpg in the archive is no image; 17 images stand twice, one pair as two classes",
    find=find,
)
