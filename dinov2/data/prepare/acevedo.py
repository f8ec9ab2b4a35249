"""PBC / Acevedo: normal peripheral blood cells, Barcelona (Acevedo et al. 2020, doi 10.1016/j.dib.2020.105474).

One folder a class, `<PREFIX>_<number>.jpg`; the prefix tells the stage of neutrophils and immature granulocytes.
DinoBloom's ten classes come from these prefixes; platelets and cells of an unspecified stage are in none of them.
The set has no official split; where WBCAtt's lists (`pbc_attr_v1_{train,val,test}.csv`, Tsutsui et al., NeurIPS 2023,
five white cell types) lie in the same folder or in `wbcatt/submission` beside it, they are taken for one.
"""

from collections.abc import Iterator
from pathlib import Path

from dinov2.data.prepare.base import Cell, DataSet, Notes, class_folders, read_rows

CLASSES = ("basophil", "eosinophil", "erythroblast", "ig", "lymphocyte", "monocyte", "neutrophil", "platelet")
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
    for image, label in class_folders(top, {name: name for name in CLASSES}, notes):
        prefix = image.name.split("_")[0].upper()
        if prefix not in STAGES and prefix not in WITHOUT_STAGE:
            notes.add("file prefixes that are not known", image.relative_to(top))
        yield Cell(image, label, STAGES.get(prefix), part=parts.pop(f"{image.parent.name}/{image.name}", None))
    for absent, part in parts.items():
        notes.add(f"images that the {part} list names and that are not there", absent)


def _parts(top: Path, notes: Notes) -> dict[str, str]:
    parts = {}
    for part in ("train", "val", "test"):
        file = next((f for f in (top / d / f"pbc_attr_v1_{part}.csv" for d in SPLIT_FOLDERS) if f.is_file()), None)
        if file is None:
            continue
        for row in read_rows(file, ("path",)):
            parts["/".join(Path(row["path"]).parts[-2:])] = part
    return parts


DATASET = DataSet(
    name="acevedo",
    title="Acevedo (PBC)",
    origin="https://data.mendeley.com/datasets/snkd93bnjr/1",
    paper="Acevedo et al. 2020, Data in Brief 30, doi 10.1016/j.dib.2020.105474",
    licence="CC BY 4.0",
    layout="PBC_dataset_normal_DIB/<class>/<PREFIX>_<number>.jpg, the classes being " + ", ".join(CLASSES),
    entries=CLASSES,
    classes={name: name for name in CLASSES},
    expected={"pictures": 17092},
    remarks="neutrophil/.DS_169665.jpg in the archive is no image; 17 images stand twice, one pair as two classes",
    find=find,
)
