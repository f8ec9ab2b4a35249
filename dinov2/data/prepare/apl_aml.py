"""APL_AML: cells of 106 patients with APL or other AML, Johns Hopkins.

Cell types have several spellings and are converted to lower case. The archive has a few images under two types.
"""

from collections.abc import Iterator
from pathlib import Path

from dinov2.data.datasets import find_images
from dinov2.data.prepare.base import Cell, DataSet, Notes

SIGNED, UNSIGNED = "signed slides", "unsigned slides"


def find(top: Path, notes: Notes) -> Iterator[Cell]:
    for patient in sorted(path for path in top.iterdir() if path.is_dir() and path.name.lower().startswith("patient_")):
        for image in find_images(patient):
            folders = [folder.strip().lower() for folder in image.relative_to(patient).parts[:-1]]
            label = None
            if SIGNED in folders and len(folders) > folders.index(SIGNED) + 1:
                label = "_".join(folders[folders.index(SIGNED) + 1].split())
            elif UNSIGNED not in folders:
                notes.add("images outside '<Signed slides>/<cell type>', unlabelled", image)
            yield Cell(image, label, patient=patient.name)


DATASET = DataSet(
    name="apl_aml",
    title="APL_AML",
    origin="https://www.kaggle.com/datasets/eugeneshenderov/acute-promyelocytic-leukemia-apl",
    paper="Sidhom et al. 2021, npj Precision Oncology 5, PubMed 33990660",
    layout="Patient_<nn>/'Signed slides'/<cell type>/*.jpg and Patient_<nn>/'Unsigned slides'/*.jpg",
    entries=("patient_*",),
    n_entries=1,
    expected={"patients": 106},
    remarks="cells of 'Unsigned slides' have no type: they are in the list and not in labels.csv",
    find=find,
)
