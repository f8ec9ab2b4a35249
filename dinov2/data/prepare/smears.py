"""Data sets of smears, from which cells are cut out: by boxes (in a CSV or in Pascal VOC files) or by masks.

The archive of NuClick is `hemato_data.zip`; `ihc_nuclick.zip` has images of tissue. KRD-WBC's CSV has the columns
`Image ID,Categoriy`; in a copy with other names, the first value with a number in a row names the image.
"""

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pandas as pd

from dinov2.data.datasets.tables import open_table, read_table
from dinov2.data.prepare import Box, Cell, Notes, boxes_of_mask, child, dataset, image_size, images_in, with_masks

BCCD_CLASSES = ("RBC", "WBC", "Platelets")
SIDES = ("xmin", "ymin", "xmax", "ymax")
# fmt: off
LISC_CLASSES = {
    "Baso": "basophil", "eosi": "eosinophil", "lymp": "lymphocyte", "mono": "monocyte", "neut": "neutrophil",
}
SSL_CLASSES = {"1": "neutrophil", "2": "lymphocyte", "3": "monocyte", "4": "eosinophil", "5": "basophil"}
# fmt: on
KRD_LABEL_COLUMN = re.compile("categor|class|label", re.IGNORECASE)
LISC_BORDER_PX = 4  # which the masks lack
NUCLEI_MIN_SIDE_PX = 32  # one mask has a speck of 23 pixels
NUCLEI_IMAGES, NUCLEI_MASKS = "BloodImageSetS6NucSeg", "BloodImageSetS6NucSeg_masks"
smear_dataset = partial(dataset, cuts=True)


@smear_dataset(
    title="Aslan",
    origin="https://github.com/draaslan/blood-cell-detection-dataset",
    paper="none; cite the repository",
    licence="MIT",
    layout="images/image-<n>.png and annotations.csv (image,xmin,ymin,xmax,ymax,label)",
    entries=("images", "annotations.csv"),
    classes={"rbc": "rbc", "wbc": "wbc"},
    expected={"pictures": 100, "rbc": 2237, "wbc": 103},
    keep=("wbc",),
    remarks="annotations.csv has 2,236 red cells where the distributor counts 2,237; the PNGs are RGBA",
)
def aslan(top: Path, notes: Notes) -> Iterator[Cell]:
    rows = pd.DataFrame(read_table(top / "annotations.csv", "labels", ("image", *SIDES, "label")))
    for name, cells in rows.groupby("image"):
        image = top / "images" / str(name)
        if not image.is_file():
            notes.add("images that annotations.csv names and that are not there", str(name))
            continue
        size = image_size(image, notes)
        if size is None:
            notes.annotations.add(image)
            continue
        _note_white_cells((cells["label"] == "wbc").sum(), image, notes)
        for row in cells.to_dict("records"):
            try:
                sides = [float(row[side]) * length for side, length in zip(SIDES, size * 2, strict=True)]
                yield Cell(image, aslan.classes[row["label"]], box=Box(*sides))
            except (ValueError, KeyError) as error:
                notes.add("rows of the CSV that are not understood", f"{name}: {error}")


@smear_dataset(
    title="BCCD",
    origin="https://github.com/Shenggan/BCCD_Dataset",
    paper="none; cite the repository",
    licence="MIT",
    layout="BCCD/JPEGImages/*.jpg, BCCD/Annotations/*.xml, BCCD/ImageSets/Main/*.txt",
    entries=("JPEGImages", "Annotations"),
    classes={name: name for name in BCCD_CLASSES},
    expected={"pictures": 364},
    keep=("WBC",),
    remarks="White-Blood-Cell-dataset has the same images: do not train on one and test on the other",
)
def bccd(top: Path, notes: Notes) -> Iterator[Cell]:
    parts: dict[str, str] = {}
    for part in ("train", "val", "test"):
        file = top / "ImageSets" / "Main" / f"{part}.txt"
        if file.is_file():
            parts.update(dict.fromkeys(file.read_text(encoding="utf-8", errors="surrogateescape").split(), part))
        else:
            notes.add("split lists that are not there", f"{part}.txt")
    for image in images_in(top / "JPEGImages"):
        own_part = parts.pop(image.stem, None)
        cells = list(_voc_boxes(top / "Annotations" / f"{image.stem}.xml", notes))
        _note_white_cells(sum(label == "WBC" for label, _ in cells), image, notes)
        yield from (Cell(image, label, part=own_part, box=box) for label, box in cells)
        if not cells:
            notes.annotations.add(image)
    for absent, part in parts.items():
        notes.add(f"images that the {part} list names and that are not there", absent)


def _note_white_cells(count: int, image: Path, notes: Notes) -> None:
    """Note an image unless it has exactly one white cell."""
    if count != 1:
        notes.add("images without a white cell" if count == 0 else "images with several white cells", image.name)


def _voc_boxes(file: Path, notes: Notes) -> Iterator[tuple[str, Box]]:
    if not file.is_file():
        notes.add("images without an annotation file", file.name)
        return
    try:
        for item in ElementTree.parse(file).getroot().findall("object"):
            box = Box(*(float(item.findtext(f"bndbox/{side}") or "nan") for side in SIDES))
            label = (item.findtext("name") or "").strip()
            if label not in BCCD_CLASSES or any(side != side for side in box):
                notes.add("objects that are not understood", f"{file.name}: {label or 'no name'} {list(box)}")
                continue
            yield label, box
    except (ElementTree.ParseError, ValueError) as error:
        notes.add("annotation files that cannot be read", f"{file.name}: {error}")


@smear_dataset(
    title="KRD-WBC",
    origin="https://data.mendeley.com/datasets/jzdj6h7gms/2",
    paper="Mendeley Data, doi 10.17632/jzdj6h7gms.2",
    licence="CC BY 4.0 (second-hand)",
    layout="Dataset/image/image<n>.jpg, Dataset/mask/mask<n>.jpg and 'class labels.csv' (Image ID,Categoriy)",
    entries=("Dataset", "class labels.csv"),
    expected={"pictures": 600},
    remarks="several cells of one image share the image's class",
)
def krd_wbc(top: Path, notes: Notes) -> Iterator[Cell]:
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


@smear_dataset(
    title="LISC",
    origin="http://users.cecs.anu.edu.au/~hrezatofighi/Data/Leukocyte%20Data.htm",
    paper="Rezatofighi and Soltanian-Zadeh 2011, Comput. Med. Imaging Graph. 35(4)",
    licence="free for research and education, no redistribution",
    layout="'Main Dataset'/<class>/<n>.bmp and 'Ground Truth Segmentation'/<class>/areaforexpert1/<n>_expert.bmp",
    entries=("Main Dataset", "Ground Truth Segmentation"),
    classes=LISC_CLASSES,
    remarks="cells of the folder 'mixt' are cut out without a label; masks lack 4 pixels on each side of their image",
)
def lisc(top: Path, notes: Notes) -> Iterator[Cell]:
    smears, truth = child(top, "Main Dataset"), child(top, "Ground Truth Segmentation")
    for code, label in {**LISC_CLASSES, "mixt": None}.items():
        folder = child(smears, code)
        masks = child(truth, folder.name) / "areaforexpert1"
        for image, mask in with_masks(folder, masks, lambda stem: f"{stem}_expert.bmp", notes):
            boxes = boxes_of_mask(image, mask, notes, threshold=0, border=LISC_BORDER_PX)
            yield from (Cell(image, label, box=box) for box in boxes)


@smear_dataset(
    title="NuClick",
    origin="https://github.com/navidstuv/NuClick",
    paper="Alemi Koohbanani et al. 2020, Medical Image Analysis 65, arXiv 2005.14511",
    layout="Hemato_Data/Train and Hemato_Data/Validation, each images/<stem>.png and masks/<stem>_mask.png",
    entries=("Train", "Validation"),
    n_entries=1,
    expected={"pictures": 1463},
    remarks="cells have no classes: there is a list to train on and no labels.csv; the archive has moved from the "
    "repository to the site of Warwick's Tissue Image Analytics (TIA) Centre",
)
def nuclick(top: Path, notes: Notes) -> Iterator[Cell]:
    for name, part in (("Train", "train"), ("Validation", "val")):
        folder = child(top, name)
        for image, mask in with_masks(folder / "images", folder / "masks", lambda stem: f"{stem}_mask.png", notes):
            boxes = boxes_of_mask(image, mask, notes, threshold=0, numbered=True)
            yield from (Cell(image, part=part, box=box) for box in boxes)


@smear_dataset(
    title="SSL Seg",
    origin="https://github.com/zxaoyou/segmentation_WBC",
    paper="Zheng et al. 2018, Micron 107, doi 10.1016/j.micron.2018.01.010",
    licence="GPL-3.0 (of the repository)",
    layout="Dataset 1/<3 digits>.bmp and .png (masks), 'Class Labels of Dataset 1.csv', the same for Dataset 2",
    entries=("Dataset 1", "Dataset 2", "Class Labels of Dataset ?.csv"),
    classes=SSL_CLASSES,
    expected={"pictures": 400},
    remarks="the distributor's own warning: experts did not check the class labels; one class has a single image in "
    "Dataset 1; 112.bmp and 139.bmp there are the same image",
)
def ssl_seg(top: Path, notes: Notes) -> Iterator[Cell]:
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


@smear_dataset(
    title="White-Blood-Cell-dataset",
    origin="https://github.com/arbackes/White-Blood-Cell-dataset",
    paper="Mohamed and Far 2012, IEEE Healthcom, pp. 202-207",
    layout=f"{NUCLEI_IMAGES}/BloodImage_<number>.jpg and {NUCLEI_MASKS}/BloodImage_<number>.png",
    entries=(NUCLEI_IMAGES, NUCLEI_MASKS),
    expected={"pictures": 367},
    margin=0.4,  # wide enough for the cytoplasm
    remarks="the images are BCCD's: do not train on one and test on the other; there are no classes",
)
def white_blood_cell_dataset(top: Path, notes: Notes) -> Iterator[Cell]:
    for image, mask in with_masks(top / NUCLEI_IMAGES, top / NUCLEI_MASKS, lambda stem: f"{stem}.png", notes):
        # the lobes of a nucleus may be separate: those close to each other are one cell
        boxes = boxes_of_mask(image, mask, notes, gap=24, min_side=NUCLEI_MIN_SIDE_PX)
        yield from (Cell(image, box=box) for box in boxes)
