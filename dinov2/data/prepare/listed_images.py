"""Data sets in which a table names the class, and the part of the official split, of each image."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from dinov2.data.datasets import find_images
from dinov2.data.datasets.packed import CELLS_FILE, MEDMNIST_CLASSES, PART_NAMES
from dinov2.data.datasets.tables import LABEL_COLUMN, PART_COLUMN, PATH_COLUMN, read_table
from dinov2.data.prepare import Cell, Notes, dataset, note_absent

KU_FILE = "metadata_with_patient_level_splits.csv"
KU_CLASSES = (
    *("band_neutrophil", "basophil", "blast", "eosinophil", "erythroblast", "giant_platelet", "lymphocyte"),
    *("metamyelocyte", "monocyte", "myelocyte", "platelet_cluster", "reactive_lymphocyte", "segmented_neutrophil"),
)
KU_COLUMNS = ("path", "image_name", "cell_type", "patient_id", "split")


@dataset(
    title="BloodMNIST+",
    origin="https://medmnist.com/",
    paper="Yang et al. 2023, Scientific Data 10, doi 10.1038/s41597-022-01721-8",
    licence="CC BY 4.0",
    layout="bloodmnist.npz (28 pixels), bloodmnist_64.npz, bloodmnist_128.npz or bloodmnist_224.npz",
    entries=("bloodmnist*.npz",),
    packed="bloodmnist*.npz",
    classes={name: name for name in MEDMNIST_CLASSES["bloodmnist"]},
    expected={"pictures": 17092, "train": 11959, "val": 1712, "test": 3421},
    remarks="the images are Acevedo's, cut and scaled: do not train on one and test on the other; the largest file is "
    "read",
)
def bloodmnist(top: Path, notes: Notes) -> Iterator[Cell]:
    for row in read_table(top / CELLS_FILE, "labels", (PATH_COLUMN, LABEL_COLUMN, PART_COLUMN)):
        yield Cell(top / row[PATH_COLUMN], row[LABEL_COLUMN], part=row[PART_COLUMN])


@dataset(
    title="KU-Optofil PBC",
    origin="https://zenodo.org/records/17333317",
    paper="KU-Optofil PBC, doi 10.5281/zenodo.17333317",
    licence="see its page",
    layout=f"{KU_FILE} ({','.join(KU_COLUMNS)}) and dataset.zip, unpacked, with the images at any depth",
    entries=(KU_FILE,),
    classes={name: name for name in KU_CLASSES},
    expected={"pictures": 31489},
    remarks="images are found by their names; the split is the CSV's, by patients, and not that of the folders; cells "
    "without a patient are one group, unknown",
)
def ku_optofil(top: Path, notes: Notes) -> Iterator[Cell]:
    images_of: dict[str, list[Path]] = defaultdict(list)
    for image in find_images(top):
        images_of[image.name].append(image)
    absent = {}
    for row in read_table(top / KU_FILE, "labels", KU_COLUMNS, may_be_empty=("patient_id",)):
        label = "_".join(row["cell_type"].lower().split())
        part = PART_NAMES.get(row["split"].lower())
        images = images_of.get(row["image_name"], [])
        if label not in KU_CLASSES or part is None:
            notes.add(
                "rows of the CSV that are not understood", f"{row['image_name']}: {row['cell_type']}, {row['split']}"
            )
        elif not images:
            absent[row["image_name"]] = part
        elif len(images) > 1:
            notes.add("images whose name stands for several files, left out", row["image_name"])
        else:
            yield Cell(images[0], label, patient=row["patient_id"] or "unknown", part=part)
    note_absent(absent, notes)
