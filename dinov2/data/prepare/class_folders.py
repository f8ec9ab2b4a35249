"""Data sets whose folders name the class of each image.

The layout of Warty pig, and the names of Raabin Leukemia's folders, are not published in a form that could be checked.
Assumed: folders whose names contain one leukaemia, or one cell type, at any depth. Images elsewhere are listed without
a label.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from dinov2.data.datasets import find_images
from dinov2.data.datasets.packed import PART_NAMES
from dinov2.data.datasets.tables import open_table, read_table
from dinov2.data.prepare import (
    Cell,
    Notes,
    child,
    class_folders,
    dataset,
    file_near,
    folders_in,
    image_size,
    listed_parts,
    note_absent,
)

CELL_TYPES = ("basophil", "eosinophil", "lymphocyte", "monocyte", "neutrophil")

ACEVEDO_TYPES = ("basophil", "eosinophil", "erythroblast", "ig", "lymphocyte", "monocyte", "neutrophil", "platelet")
# fmt: off
# DinoBloom's ten classes come from the prefixes of file names; platelets and cells of an unspecified stage have none
ACEVEDO_STAGES = {
    "BA": "basophil", "BNE": "neutrophil_band", "EO": "eosinophil", "ERB": "erythroblast", "LY": "lymphocyte_typical",
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
MLL23_CLASSES = (
    "basophil", "eosinophil", "hairy_cell", "lymphocyte", "lymphocyte_large_granular", "lymphocyte_neoplastic",
    "lymphocyte_reactive", "metamyelocyte", "monocyte", "myeloblast", "myelocyte", "neutrophil_band",
    "neutrophil_segmented", "normoblast", "plasma_cell", "promyelocyte", "promyelocyte_atypical", "smudge_cell",
)
# fmt: on
HEHR_SUBTYPES = ("CBFB_MYH11", "NPM1", "PML_RARA", "RUNX1_RUNX1T1", "control")
LEUKAEMIAS = ("ALL", "AML", "APL", "CLL", "CML")
FAB_TYPE = re.compile("L[1-3]|M[0-7]")
APL_COHORTS = {"discovery": "train", "validation": "test"}
APL_MAX_CELL_PX = 1000  # the longer side; overview smears have some 2,900, images of cells a few hundred
APL_MISSPELT = {"arifact": "artifact"}
WBCATT_FOLDERS = (".", "..", "../wbcatt/submission", "../../wbcatt/submission")
RAABIN_PARTS = {"train": "train", "testa": "testA", "testb": "testB"}


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
    # from WBCAtt (Tsutsui et al., NeurIPS 2023), if it is beside the set, which has no official split
    parts = listed_parts(top, "pbc_attr_v1_{}.csv", 2, notes, WBCATT_FOLDERS)
    for image, label in class_folders(top, {name: name for name in ACEVEDO_TYPES}, notes):
        prefix = image.name.split("_")[0].upper()
        if prefix not in ACEVEDO_STAGES and prefix not in ("IG", "NEUTROPHIL", "PLATELET"):
            notes.add("file prefixes that are not known", image)
        yield Cell(image, label, ACEVEDO_STAGES.get(prefix), part=parts.pop(f"{image.parent.name}/{image.name}", None))
    note_absent(parts, notes)


@dataset(
    title="AML Matek",
    origin="https://www.cancerimagingarchive.net/collection/aml-cytomorphology_lmu/",
    paper="Matek et al. 2019, Nature Machine Intelligence 1, doi 10.1038/s42256-019-0101-9",
    licence="CC BY 3.0",
    layout="AML-Cytomorphology_LMU/<CODE>/<CODE>_<number>.tiff, the codes being " + ", ".join(MATEK_CLASSES),
    classes=MATEK_CLASSES,
    expected={"pictures": 18365},
    remarks="in this set MYO is the myeloblast and MYB the myelocyte; patients are not named; one file ends in "
    ".tiff.tiff",
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
    remarks="the 945 patients are not named, so patient-grouped splits cannot be made; classes have from 8 to 29,424 "
    "images; MYB_05527.jpg is damaged; DinoBloom's fixed split is applied if its bm_train.csv and bm_test.csv are in "
    "the set's folder or above it",
)
def bmc(top: Path, notes: Notes) -> Iterator[Cell]:
    parts = listed_parts(top, "bm_{}.csv", 1, notes)  # their folders are of another computer
    for image, label in class_folders(top, BMC_CLASSES, notes):
        if BMC_CLASSES.get(image.name.split("_")[0]) != label:
            notes.add("images whose name says another class than their folder", image)
        yield Cell(image, label, part=parts.pop(image.name, None))
    note_absent(parts, notes)


@dataset(
    title="AML Hehr",
    origin="https://www.cancerimagingarchive.net/collection/aml-cytomorphology_mll_helmholtz/",
    paper="Hehr et al. 2023, PLOS Digital Health 2(3), doi 10.1371/journal.pdig.0000187",
    layout="data/<subtype>/<patient>/image_<n>.tif, the subtypes being " + ", ".join(HEHR_SUBTYPES),
    classes={name: name for name in HEHR_SUBTYPES},
    expected={"pictures": 81214, "patients": 189},
    remarks="labels are the patients' subtypes: bags for abmil.py, not cell types; the archive has no split: folds.csv "
    "is drawn, and GenBloom's published folds have the same patients",
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
            yield Cell(image, subtype, patient=folders[0], diagnosis=subtype)
            continue
        notes.add(kind, image)
        notes.annotations.add(image)


@dataset(
    title="APL_AML",
    origin="https://www.kaggle.com/datasets/eugeneshenderov/acute-promyelocytic-leukemia-apl",
    paper="Sidhom et al. 2021, npj Precision Oncology 5, PubMed 33990660",
    layout="All/Patient_<nn>/'Signed slides'/<cell type>/*.jpg and .../'Unsigned slides'/*.jpg, and master.csv",
    entries=("patient_*",),
    n_entries=1,
    expected={"pictures": 25724, "patients": 106},
    remarks="cells of 'Unsigned slides' have no type: they are in the list and not in labels.csv; most are byte copies "
    "of signed ones, which --drop-duplicates keeps; master.csv has the patients' diagnoses and the split, in which "
    "the validation cohort is the test part; folds.csv has five drawn folds of the other patients",
)
def apl_aml(top: Path, notes: Notes) -> Iterator[Cell]:
    signed, unsigned = "signed slides", "unsigned slides"
    master = file_near(top, "master.csv")
    patients = read_table(master, "labels", ("Patient_ID", "Diagnosis", "Cohort")) if master else []
    facts_of = {row["Patient_ID"].lower(): row for row in patients}
    if master is None:
        notes.add("label files that are not there", "master.csv")
    for patient in (folder for folder in folders_in(top) if folder.name.lower().startswith("patient_")):
        facts = facts_of.get(patient.name.lower(), {})
        if patients and not facts:
            notes.add("patients that master.csv does not name", patient)
        part, diagnosis = APL_COHORTS.get(facts.get("Cohort", "").lower()), facts.get("Diagnosis")
        for image in find_images(patient):
            size = image_size(image, notes)
            if size is None or max(size) > APL_MAX_CELL_PX:
                notes.annotations.add(image)
                if size is not None:
                    notes.add("overview images of smears, which are no cells, left out", image, size)
                continue
            folders = [folder.strip().lower() for folder in image.relative_to(patient).parts[:-1]]
            label = None
            if signed in folders and len(folders) > folders.index(signed) + 1:
                label = "_".join(folders[folders.index(signed) + 1].split())  # spellings differ in case and spaces
                label = APL_MISSPELT.get(label, label)
            elif unsigned not in folders:
                notes.add("images outside '<Signed slides>/<cell type>', unlabelled", image)
            yield Cell(image, label, patient=patient.name, part=part, diagnosis=diagnosis)


@dataset(
    title="Raabin WBC",
    origin="https://raabindata.com/free-data/",
    paper="Mousavi Kouzehkanan et al. 2022, Scientific Reports 12, doi 10.1038/s41598-021-04426-x",
    layout="Train and TestA (.rar) and TestB (.zip), unpacked, each <class>/<smear>_<field>_<cell>.jpg, the classes "
    "being " + ", ".join(CELL_TYPES),
    entries=("Train", "Test*A", "Test*B"),
    n_entries=1,
    classes={name: name for name in CELL_TYPES},
    expected={"train": 10175},
    remarks="TestA and TestB are test sets of their own: splits/testA.csv and splits/testB.csv; some smears have cells "
    "in Train and in TestA; the column smear is for splits that keep smears apart",
)
def raabin_wbc(top: Path, notes: Notes) -> Iterator[Cell]:
    parts_of: dict[str, set[str]] = defaultdict(set)
    for folder in folders_in(top):
        part = RAABIN_PARTS.get(re.sub("[^a-z]", "", folder.name.lower()))
        if part is not None:
            inner = child(folder, folder.name)  # unpacking may make a folder of the same name inside
            for image, label in class_folders(inner if inner.is_dir() else folder, raabin_wbc.classes, notes):
                smear, _, rest = image.stem.partition("_")  # 95-8-12-4_85_1
                parts_of[smear if rest else ""].add(part)
                yield Cell(image, label, part=part, more={"smear": smear} if rest else {})
    for smear, parts in sorted(parts_of.items()):
        if smear and len(parts) > 1:
            notes.add("smears with cells in several parts", smear, ", ".join(sorted(parts)))


@dataset(
    title="Raabin Leukemia",
    origin="https://raabindata.com/free-data/",
    paper="none known; cite the site",
    layout="folders that name the leukaemia (ALL, AML, APL, CLL, CML), in them folders of FAB types (L1, M3, ...)",
    entries=tuple(f"*{name}*" for name in LEUKAEMIAS),
    n_entries=1,
    classes={name: name for name in LEUKAEMIAS},  # the patient's disease, not the type of a cell
    remarks="the layout is a guess; see whether the counts are what you expect",
)
def raabin_leukemia(top: Path, notes: Notes) -> Iterator[Cell]:
    for image in find_images(top):
        words = {word.upper() for word in re.split("[^A-Za-z0-9]+", "/".join(image.relative_to(top).parts[:-1]))}
        fab_types = sorted(filter(FAB_TYPE.fullmatch, words))
        label = _only_name(words & set(LEUKAEMIAS), image, "leukaemia", notes)
        yield Cell(image, label, more={"fab_type": fab_types[0]} if len(fab_types) == 1 else {})


@dataset(
    title="Warty pig",
    modality="peripheral blood of pigs",
    origin="https://ieee-dataport.org/documents/"
    "dataset-machine-learning-based-classification-white-blood-cells-juvenile-visayan-warty-pig",
    paper="Alipo-on et al., IEEE DataPort (see its page)",
    layout="folders named like cell types (" + ", ".join(CELL_TYPES) + "), perhaps in train and test folders",
    entries=(*(f"*{name}*" for name in CELL_TYPES), "train*", "test*"),
    classes={name: name for name in CELL_TYPES},
    remarks="the layout is a guess; DinoBloom counts 667 raw, 1,464 augmented and 1,408 cropped images, and no "
    "lymphocyte; give the folder of one of the three as --source",
)
def warty_pig(top: Path, notes: Notes) -> Iterator[Cell]:
    for image in find_images(top):
        folders = [folder.lower() for folder in image.relative_to(top).parts[:-1]]
        names = {name for folder in folders for name in CELL_TYPES if name in folder}  # also as a plural
        part = next((PART_NAMES[folder] for folder in folders if folder in PART_NAMES), None)
        yield Cell(image, _only_name(names, image, "cell type", notes), part=part)


@dataset(
    title="MLL23",
    origin="https://doi.org/10.1038/s41597-025-06223-x",
    paper="Shetab Boushehri et al. 2025, Scientific Data 12, doi 10.1038/s41597-025-06223-x",
    licence="CC BY 4.0 (second-hand)",
    layout="<class>/*.tif, one .zip a class, unpacked, and labels_harmonised.csv; the classes are "
    + ", ".join(MLL23_CLASSES),
    classes={name: name for name in MLL23_CLASSES},
    expected={"pictures": 41621},
    remarks="the columns matek and acevedo of labels.csv come from labels_harmonised.csv; patients are not named",
)
def mll23(top: Path, notes: Notes) -> Iterator[Cell]:
    others = _harmonised_classes(file_near(top, "labels_harmonised.csv"), notes)
    for image, label in class_folders(top, mll23.classes, notes):
        yield Cell(image, label, more=others.get(label, {}))


def _harmonised_classes(file: Path | None, notes: Notes) -> dict[str, dict[str, str]]:
    """Read {class of MLL23: {"matek": class, "acevedo": class}}; the columns are found by these words."""
    if file is None:
        notes.add("label files that are not there", "labels_harmonised.csv")
        return {}
    table = open_table(file, "labels")
    columns = {
        word: next((name for name in table.columns if word in name.lower()), None) for word in ("matek", "acevedo")
    }
    own = next((name for name in table.columns if "mll" in name.lower()), table.columns[0] if table.columns else None)
    if own is None or None in columns.values() or own in columns.values():
        raise ValueError(
            f"labels: {str(file)!r} has the columns {table.columns or 'none'}; expected one of MLL23's classes, one of "
            f"Matek's and one of Acevedo's; correct it, or move it away"
        )
    classes = {}
    for line, row in table.records():
        label = "_".join(re.findall("[a-z0-9]+", row[own].lower()))
        if label in MLL23_CLASSES:
            classes[label] = {word: row[name] for word, name in columns.items() if name is not None}
        else:
            notes.add("rows of the CSV that are not understood", f"{file.name}, line {line}: {row[own]}")
    return classes


@dataset(
    title="C-NMC 2019",
    modality="blood or bone marrow, see its page",
    origin="https://www.cancerimagingarchive.net/collection/c-nmc-2019/",
    paper="Gupta and Gupta 2019, The Cancer Imaging Archive, doi 10.7937/tcia.2019.dc64i46r",
    licence="see its page",
    layout="C-NMC_training_data/fold_<n>/<all or hem>/UID_<patient>_<n>_<n>_<all or hem>.bmp",
    entries=("fold_0", "fold_1", "fold_2"),
    n_entries=1,
    classes={"all": "all", "hem": "hem"},
    expected={"pictures": 10661},
    remarks="all: of patients with acute lymphoblastic leukaemia, hem: of healthy donors; the cells are cut out on "
    "black; split.csv has the official folds; the two test phases are not read",
)
def c_nmc(top: Path, notes: Notes) -> Iterator[Cell]:
    for fold in folders_in(top):
        if not re.fullmatch(r"fold_\d+", fold.name.lower()):
            continue
        for image, label in class_folders(fold, c_nmc.classes, notes):
            patient = re.match(r"UID_([^_]+)_", image.name, re.IGNORECASE)
            if patient is None:
                notes.add("images whose name names no patient, left out", image)
                notes.annotations.add(image)
            else:
                yield Cell(image, label, patient=patient[1], part=fold.name.lower())


def _only_name(names: set[str], image: Path, what: str, notes: Notes) -> str | None:
    """Return the only element of `names`; if there are none or several, note the image and return None."""
    if len(names) == 1:
        return names.pop()
    notes.add(f"images whose folders name no {what} (or several), unlabelled", image)
    return None
