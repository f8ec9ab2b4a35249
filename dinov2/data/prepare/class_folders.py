"""Data sets whose folders name the class of each image.

The layouts of Raabin Leukemia and Warty pig are not published in a form that could be checked. Assumed: folders whose
names contain one leukaemia, or one cell type, at any depth. Images elsewhere are listed without a label.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from dinov2.data.datasets import find_images
from dinov2.data.datasets.tables import read_table
from dinov2.data.prepare import Cell, Notes, child, class_folders, dataset, folders_in

CELL_TYPES = ("basophil", "eosinophil", "lymphocyte", "monocyte", "neutrophil")

ACEVEDO_TYPES = ("basophil", "eosinophil", "erythroblast", "ig", "lymphocyte", "monocyte", "neutrophil", "platelet")
# fmt: off
# DinoBloom's ten classes come from the prefixes of file names; platelets and cells of an unspecified stage have none
ACEVEDO_STAGES = {
    "BA": "basophil", "BNE": "neutrophil_band", "EO": "eosinophil", "ERB": "erythroblast", "LY": "lymphocyte",
    "MMY": "metamyelocyte", "MO": "monocyte", "MY": "myelocyte", "PMY": "promyelocyte", "SNE": "neutrophil_segmented",
}
MATEK_CLASSES = {
    "BAS": "basophil", "EBO": "erythroblast", "EOS": "eosinophil", "KSC": "smudge_cell", "LYA": "lymphocyte_atypical",
    "LYT": "lymphocyte_typical", "MMZ": "metamyelocyte", "MOB": "monoblast", "MON": "monocyte", "MYB": "myelocyte",
    "MYO": "myeloblast", "NGB": "neutrophil_band", "NGS": "neutrophil_segmented", "PMB": "promyelocyte_bilobed",
    "PMO": "promyelocyte",
}
BMC_CLASSES = {
    "ABE": "abnormal_eosinophil", "ART": "artefact", "BAS": "basophil", "BLA": "blast", "EBO": "erythroblast",
    "EOS": "eosinophil", "FGC": "faggot_cell", "HAC": "hairy_cell", "KSC": "smudge_cell", "LYI": "immature_lymphocyte",
    "LYT": "lymphocyte", "MMZ": "metamyelocyte", "MON": "monocyte", "MYB": "myelocyte", "NGB": "neutrophil_band",
    "NGS": "neutrophil_segmented", "NIF": "not_identifiable", "OTH": "other", "PEB": "proerythroblast",
    "PLM": "plasma_cell", "PMO": "promyelocyte",
}
# fmt: on
HEHR_SUBTYPES = ("CBFB_MYH11", "NPM1", "PML_RARA", "RUNX1_RUNX1T1", "control")
LEUKAEMIAS = ("ALL", "AML", "APL", "CLL", "CML")
WBCATT_FOLDERS = (".", "..", "../wbcatt/submission", "../../wbcatt/submission")
RAABIN_PARTS = {"train": "train", "testa": "testA", "testb": "testB"}
PIG_PARTS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataset(
    title="Acevedo (PBC)",
    origin="https://data.mendeley.com/datasets/snkd93bnjr/1",
    paper="Acevedo et al. 2020, Data in Brief 30, doi 10.1016/j.dib.2020.105474",
    licence="CC BY 4.0",
    layout="PBC_dataset_normal_DIB/<class>/<PREFIX>_<number>.jpg, the classes being " + ", ".join(ACEVEDO_TYPES),
    classes={name: name for name in ACEVEDO_TYPES},
    expected={"pictures": 17092},
    remarks="neutrophil/.DS_169665.jpg in the archive is no image; 17 images stand twice, one pair as two classes",
)
def acevedo(top: Path, notes: Notes) -> Iterator[Cell]:
    parts = {}  # from WBCAtt (Tsutsui et al., NeurIPS 2023), if it is beside the set, which has no official split
    for part in ("train", "val", "test"):
        file = next((f for f in (top / d / f"pbc_attr_v1_{part}.csv" for d in WBCATT_FOLDERS) if f.is_file()), None)
        for row in read_table(file, "labels", ("path",)) if file else ():
            parts["/".join(Path(row["path"]).parts[-2:])] = part
    for image, label in class_folders(top, {name: name for name in ACEVEDO_TYPES}, notes):
        prefix = image.name.split("_")[0].upper()
        if prefix not in ACEVEDO_STAGES and prefix not in ("IG", "NEUTROPHIL", "PLATELET"):
            notes.add("file prefixes that are not known", image)
        yield Cell(image, label, ACEVEDO_STAGES.get(prefix), part=parts.pop(f"{image.parent.name}/{image.name}", None))
    for absent, part in parts.items():
        notes.add(f"images that the {part} list names and that are not there", absent)


@dataset(
    title="AML Matek",
    origin="https://www.cancerimagingarchive.net/collection/aml-cytomorphology_lmu/",
    paper="Matek et al. 2019, Nature Machine Intelligence 1, doi 10.1038/s42256-019-0101-9",
    licence="CC BY 3.0",
    layout="AML-Cytomorphology_LMU/<CODE>/<CODE>_<number>.tiff, the codes being " + ", ".join(MATEK_CLASSES),
    classes=MATEK_CLASSES,
    expected={"pictures": 18365},
    remarks="in this set MYO is the myeloblast and MYB the myelocyte; patients are not named",
)
def aml_matek(top: Path, notes: Notes) -> Iterator[Cell]:
    yield from (Cell(image, label) for image, label in class_folders(top, MATEK_CLASSES, notes))


@dataset(
    title="BMC",
    modality="bone marrow",
    origin="https://www.cancerimagingarchive.net/collection/bone-marrow-cytomorphology_mll_helmholtz_fraunhofer/",
    paper="Matek et al. 2021, Blood 138(20), doi 10.1182/blood.2020010568",
    licence="CC BY 4.0",
    layout="BM_cytomorphology_data/<CODE>/<from>-<to>/<CODE>_<number>.jpg, the codes being " + ", ".join(BMC_CLASSES),
    classes=BMC_CLASSES,
    expected={"pictures": 171374},  # in the paper; TCIA's page counts one more
    remarks="patients are not named, so patient-grouped splits cannot be made; classes have from 8 to 29,424 images",
)
def bmc(top: Path, notes: Notes) -> Iterator[Cell]:
    for image, label in class_folders(top, BMC_CLASSES, notes):
        if BMC_CLASSES.get(image.name.split("_")[0]) != label:
            notes.add("images whose name says another class than their folder", image)
        yield Cell(image, label)


@dataset(
    title="AML Hehr",
    origin="https://www.cancerimagingarchive.net/collection/aml-cytomorphology_mll_helmholtz/",
    paper="Hehr et al. 2023, PLOS Digital Health 2(3), doi 10.1371/journal.pdig.0000187",
    layout="data/<subtype>/<patient>/image_<n>.tif, the subtypes being " + ", ".join(HEHR_SUBTYPES),
    classes={name: name for name in HEHR_SUBTYPES},
    expected={"patients": 189},
    remarks="labels are the patients' subtypes: bags for abmil.py, not cell types",
)
def aml_hehr(top: Path, notes: Notes) -> Iterator[Cell]:
    subtype_of: dict[str, str] = {}
    for image, subtype in class_folders(top, aml_hehr.classes, notes):
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


@dataset(
    title="APL_AML",
    origin="https://www.kaggle.com/datasets/eugeneshenderov/acute-promyelocytic-leukemia-apl",
    paper="Sidhom et al. 2021, npj Precision Oncology 5, PubMed 33990660",
    layout="Patient_<nn>/'Signed slides'/<cell type>/*.jpg and Patient_<nn>/'Unsigned slides'/*.jpg",
    entries=("patient_*",),
    n_entries=1,
    expected={"patients": 106},
    remarks="cells of 'Unsigned slides' have no type: they are in the list and not in labels.csv",
)
def apl_aml(top: Path, notes: Notes) -> Iterator[Cell]:
    signed, unsigned = "signed slides", "unsigned slides"
    for patient in (folder for folder in folders_in(top) if folder.name.lower().startswith("patient_")):
        for image in find_images(patient):
            folders = [folder.strip().lower() for folder in image.relative_to(patient).parts[:-1]]
            label = None
            if signed in folders and len(folders) > folders.index(signed) + 1:
                label = "_".join(folders[folders.index(signed) + 1].split())  # spellings differ in case and spaces
            elif unsigned not in folders:
                notes.add("images outside '<Signed slides>/<cell type>', unlabelled", image)
            yield Cell(image, label, patient=patient.name)


@dataset(
    title="Raabin WBC",
    origin="https://raabindata.com/free-data/",
    paper="Mousavi Kouzehkanan et al. 2022, Scientific Reports 12, doi 10.1038/s41598-021-04426-x",
    layout="Train, TestA and TestB, each <class>/*.jpg, the classes being " + ", ".join(CELL_TYPES),
    entries=("Train", "Test*A", "Test*B"),
    n_entries=1,
    classes={name: name for name in CELL_TYPES},
    expected={"train": 10175},
    remarks="TestA and TestB are test sets of their own: splits/testA.csv and splits/testB.csv",
)
def raabin_wbc(top: Path, notes: Notes) -> Iterator[Cell]:
    for folder in folders_in(top):
        part = RAABIN_PARTS.get(re.sub("[^a-z]", "", folder.name.lower()))
        if part is not None:
            inner = child(folder, folder.name)  # unpacking may make a folder of the same name inside
            for image, label in class_folders(inner if inner.is_dir() else folder, raabin_wbc.classes, notes):
                yield Cell(image, label, part=part)


@dataset(
    title="Raabin Leukemia",
    origin="https://raabindata.com/free-data/",
    paper="none known; cite the site",
    layout="folders that name the leukaemia (ALL, AML, APL, CLL, CML) with images below",
    entries=tuple(f"*{name}*" for name in LEUKAEMIAS),
    n_entries=1,
    classes={name: name for name in LEUKAEMIAS},  # the patient's disease, not the type of a cell
    remarks="the layout is a guess; see whether the counts are what you expect",
)
def raabin_leukemia(top: Path, notes: Notes) -> Iterator[Cell]:
    for image in find_images(top):
        words = {word.upper() for word in re.split("[^A-Za-z]+", "/".join(image.relative_to(top).parts[:-1]))}
        yield Cell(image, _only_name(words & set(LEUKAEMIAS), image, "leukaemia", notes))


@dataset(
    title="Warty pig",
    modality="peripheral blood of pigs",
    origin="https://ieee-dataport.org/documents/"
    "dataset-machine-learning-based-classification-white-blood-cells-juvenile-visayan-warty-pig",
    paper="Alipo-on et al., IEEE DataPort (see its page)",
    layout="folders named like cell types (" + ", ".join(CELL_TYPES) + "), perhaps in train and test folders",
    entries=(*(f"*{name}*" for name in CELL_TYPES), "train*", "test*"),
    classes={name: name for name in CELL_TYPES},
    remarks="the layout is a guess; see whether the counts are what you expect",
)
def warty_pig(top: Path, notes: Notes) -> Iterator[Cell]:
    for image in find_images(top):
        folders = [folder.lower() for folder in image.relative_to(top).parts[:-1]]
        names = {name for folder in folders for name in CELL_TYPES if name in folder}  # also as a plural
        part = next((PIG_PARTS[folder] for folder in folders if folder in PIG_PARTS), None)
        yield Cell(image, _only_name(names, image, "cell type", notes), part=part)


def _only_name(names: set[str], image: Path, what: str, notes: Notes) -> str | None:
    """Return the only element of `names`; if there are none or several, note the image and return None."""
    if len(names) == 1:
        return names.pop()
    notes.add(f"images whose folders name no {what} (or several), unlabelled", image)
    return None
