"""Data sets of smears with a mask of the cells for each image.

The archive of NuClick is `hemato_data.zip`, linked by its repository; `ihc_nuclick.zip` has images of tissue. The class
column of KRD-WBC's CSV is spelt "Categoriy"; its other columns could not be checked, so the first value with a number
in a row names the image.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from dinov2.data.datasets.tables import open_table
from dinov2.data.prepare.base import Cell, DataSet, Notes, boxes_of_mask, child, images_in, with_masks

# fmt: off
LISC_CLASSES = {
    "Baso": "basophil", "eosi": "eosinophil", "lymp": "lymphocyte", "mono": "monocyte", "neut": "neutrophil",
}
SSL_CLASSES = {"1": "neutrophil", "2": "lymphocyte", "3": "monocyte", "4": "eosinophil", "5": "basophil"}
# fmt: on
KRD_LABEL_COLUMN = re.compile("categor|class|label", re.IGNORECASE)
NUCLEI_IMAGES, NUCLEI_MASKS = "BloodImageSetS6NucSeg", "BloodImageSetS6NucSeg_masks"


def find_krd_wbc(top: Path, notes: Notes) -> Iterator[Cell]:
    labels = _krd_labels(child(top, "class labels.csv"), notes)
    folder = child(top, "Dataset")
    pairs = with_masks(folder / "image", folder / "mask", lambda stem: f"mask{_number(stem)}.jpg", notes)
    for image, mask in pairs:
        label = labels.pop(_number(image.stem), None)
        if label is None:
            notes.add("images without a class in the CSV", image.name)
        yield from (Cell(image, label, box=box) for box in boxes_of_mask(image, mask, notes))
    for number in labels:
        notes.add("images that the CSV names and that are not there", f"image{number}")


def _krd_labels(file: Path, notes: Notes) -> dict[int | None, str]:
    table = open_table(file, "labels")
    column = next((name for name in table.columns if KRD_LABEL_COLUMN.match(name)), None)
    if column is None:
        raise ValueError(f"{str(file)!r}: no column of classes ('Categoriy') among {table.columns or 'none'}")
    labels: dict[int | None, str] = {}
    for _, row in table.records():
        label = row.pop(column)
        number = next((_number(value) for value in row.values() if _number(value) is not None), None)
        if number is None or not label:
            notes.add("rows of the CSV that are not understood", f"{file.name}: {','.join(row.values())}")
        else:
            labels[number] = label.lower()
    return labels


def _number(text: str) -> int | None:
    match = re.search(r"\d+", text)
    return int(match.group()) if match else None


def find_lisc(top: Path, notes: Notes) -> Iterator[Cell]:
    smears, truth = child(top, "Main Dataset"), child(top, "Ground Truth Segmentation")
    for code, label in {**LISC_CLASSES, "mixt": None}.items():
        folder = child(smears, code)
        masks = child(truth, folder.name) / "areaforexpert1"
        for image, mask in with_masks(folder, masks, lambda stem: f"{stem}_expert.bmp", notes):
            yield from (Cell(image, label, box=box) for box in boxes_of_mask(image, mask, notes, threshold=0))


def find_nuclick(top: Path, notes: Notes) -> Iterator[Cell]:
    for name, part in (("Train", "train"), ("Validation", "val")):
        folder = child(top, name)
        for image, mask in with_masks(folder / "images", folder / "masks", lambda stem: f"{stem}_mask.png", notes):
            yield from (Cell(image, part=part, box=box) for box in boxes_of_mask(image, mask, notes, threshold=0))


def find_ssl_seg(top: Path, notes: Notes) -> Iterator[Cell]:
    for folder in (top / "Dataset 1", top / "Dataset 2"):
        labels = _ssl_labels(top / f"Class Labels of {folder.name}.csv", notes)
        if folder.is_dir() and not labels:
            notes.add("label files that are not there", f"Class Labels of {folder.name}.csv")
        for image in (path for path in images_in(folder) if path.suffix.lower() != ".png"):
            label = labels.pop(int(image.stem), None) if image.stem.isdigit() else None
            if label is None:
                notes.add("images without a class in the CSV", image)
            # black, grey (cytoplasm) and white (nucleus): 0, 128 and 255
            boxes = boxes_of_mask(image, image.with_suffix(".png"), notes, threshold=64, single=True)
            yield Cell(image, label, box=next(boxes, None))
        for absent in labels:
            notes.add("images that the CSV names and that are not there", f"{folder.name}/{absent:03d}")


def _ssl_labels(file: Path, notes: Notes) -> dict[int, str]:
    labels = {}
    for _, row in open_table(file, "labels").rows() if file.is_file() else ():
        if len(row) >= 2 and row[0].isdigit() and row[1] in SSL_CLASSES:
            labels[int(row[0])] = SSL_CLASSES[row[1]]
        elif row[0]:
            notes.add("rows of the CSV that are not understood", f"{file.name}: {','.join(row)}")
    return labels


def find_nuclei(top: Path, notes: Notes) -> Iterator[Cell]:
    for image, mask in with_masks(top / NUCLEI_IMAGES, top / NUCLEI_MASKS, lambda stem: f"{stem}.png", notes):
        # the lobes of a nucleus may be separate: those close to each other are one cell
        yield from (Cell(image, box=box) for box in boxes_of_mask(image, mask, notes, gap=24))


KRD_WBC = DataSet(
    name="krd_wbc",
    title="KRD-WBC",
    origin="https://data.mendeley.com/datasets/jzdj6h7gms/2",
    paper="Mendeley Data, doi 10.17632/jzdj6h7gms.2",
    layout="Dataset/image/image<n>.jpg, Dataset/mask/mask<n>.jpg and 'class labels.csv'",
    entries=("Dataset", "class labels.csv"),
    cuts=True,
    remarks="several cells of one image share the image's class",
    find=find_krd_wbc,
)
LISC = DataSet(
    name="lisc",
    title="LISC",
    origin="http://users.cecs.anu.edu.au/~hrezatofighi/Data/Leukocyte%20Data.htm",
    paper="Rezatofighi and Soltanian-Zadeh 2011, Comput. Med. Imaging Graph. 35(4)",
    layout="'Main Dataset'/<class>/<n>.bmp and 'Ground Truth Segmentation'/<class>/areaforexpert1/<n>_expert.bmp",
    entries=("Main Dataset", "Ground Truth Segmentation"),
    classes=LISC_CLASSES,
    cuts=True,
    remarks="cells of the folder 'mixt' are cut out without a label",
    find=find_lisc,
)
NUCLICK = DataSet(
    name="nuclick",
    title="NuClick",
    origin="https://github.com/navidstuv/NuClick",
    paper="Alemi Koohbanani et al. 2020, Medical Image Analysis 65, arXiv 2005.14511",
    layout="Hemato_Data/Train and Hemato_Data/Validation, each images/<stem>.png and masks/<stem>_mask.png",
    entries=("Train", "Validation"),
    n_entries=1,
    expected={"pictures": 1463},
    cuts=True,
    remarks="cells have no classes: there is a list to train on and no labels.csv",
    find=find_nuclick,
)
SSL_SEG = DataSet(
    name="ssl_seg",
    title="SSL Seg",
    origin="https://github.com/zxaoyou/segmentation_WBC",
    paper="Zheng et al. 2018, Micron 107, doi 10.1016/j.micron.2018.01.010",
    licence="GPL-3.0 (of the repository)",
    layout="Dataset 1/<3 digits>.bmp and .png (masks), 'Class Labels of Dataset 1.csv', the same for Dataset 2",
    entries=("Dataset 1", "Dataset 2", "Class Labels of Dataset ?.csv"),
    classes=SSL_CLASSES,
    expected={"pictures": 400},
    cuts=True,
    remarks="the distributor's own warning: experts did not check the class labels; one class has a single image in "
    "Dataset 1; 112.bmp and 139.bmp there are the same image",
    find=find_ssl_seg,
)
NUCLEI = DataSet(
    name="white_blood_cell_dataset",
    title="White-Blood-Cell-dataset",
    origin="https://github.com/arbackes/White-Blood-Cell-dataset",
    paper="Mohamed and Far 2012, IEEE Healthcom, pp. 202-207",
    layout=f"{NUCLEI_IMAGES}/BloodImage_<number>.jpg and {NUCLEI_MASKS}/BloodImage_<number>.png",
    entries=(NUCLEI_IMAGES, NUCLEI_MASKS),
    expected={"pictures": 367},
    cuts=True,
    margin=0.4,  # wide enough for the cytoplasm
    remarks="the smears seem to be BCCD's: do not train on one and test on the other; there are no classes",
    find=find_nuclei,
)
