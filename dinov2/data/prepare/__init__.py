"""Prepare public data sets of blood cells: from the unpacked archive to training lists and labels.

Each function with the decorator `dataset` in a module of this package is known by its name; docs/datasets.md shows how
to add one. Here are the common parts, which find cells in class folders, tables and masks.

Letters: H height, W width of an image.
"""

import difflib
import fnmatch
import importlib
import os
import pkgutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image

from dinov2.data.datasets.decode import (
    DAMAGE,
    FORMATS,
    IMAGE_SUFFIXES,
    find_images,
    is_image_name,
    load_image,
    walk_images,
)
from dinov2.data.datasets.tables import PATH_COLUMNS, read_table
from dinov2.utils.files import check_regular_file

N_EXAMPLES = 5
SEARCH_DEPTH = 5  # folders between --source and the layout: an archive is often unpacked into folders of its own name
MIN_SIDE_PX = 4  # smaller specks come from hand-drawn and lossy masks
ARCHIVE_SUFFIXES = (".zip", ".rar", ".7z", ".tar", ".gz", ".tgz")
SPLIT_LISTS = ("train", "val", "test")


class Box(NamedTuple):
    """A cell's place in an image, in pixels; the left and upper edges are inside, the right and lower ones outside."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def has_area(self) -> bool:
        return self.right > self.left and self.bottom > self.top

    def clipped(self, width: int, height: int) -> "Box":
        """Return the part inside an image of that size, which may be empty."""
        return Box(max(self.left, 0), max(self.top, 0), min(self.right, width), min(self.bottom, height))


@dataclass(frozen=True)
class Cell:
    """One cell as its distributor describes it."""

    image: Path
    label: str | None = None  # the distributor's class
    group: str | None = None  # DinoBloom's class, where it differs; None for a cell without one
    patient: str | None = None
    part: str | None = None  # of the official split, for instance "train", or "fold_0" of folds
    box: Box | None = None  # place of the cell; None if the image is the cell
    diagnosis: str | None = None  # the patient's class; `label` may be the type of the cell
    more: Mapping[str, str] = field(default_factory=dict)  # further columns of labels.csv


class Notes:
    """The oddities of a data set by kind; `annotations` are images that show no cell, such as masks."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.examples: dict[str, list[str]] = defaultdict(list)
        self.annotations: set[Path] = set()

    def add(self, kind: str, example: str | Path, detail: object = "") -> None:
        """Add an example of a kind; a path in the top folder is shortened."""
        if isinstance(example, Path) and example.is_relative_to(self.top):
            example = example.relative_to(self.top)
        self.examples[kind].append(f"{example}: {detail}" if detail else str(example))

    def report(self) -> dict[str, dict[str, object]]:
        """Return {kind: {"count": n, "examples": the first}}, sorted by kind."""
        return {k: {"count": len(texts), "examples": texts[:N_EXAMPLES]} for k, texts in sorted(self.examples.items())}

    def __str__(self) -> str:
        return "; ".join(f"{len(texts)} {kind}" for kind, texts in sorted(self.examples.items())) or "nothing odd"


@dataclass(frozen=True)
class DataSet:
    """The properties of a data set that are known before its files are read."""

    name: str  # on the command line and in names of files
    title: str  # in DinoBloom's overview
    origin: str  # URL of the archive
    paper: str
    layout: str  # of the unpacked archive, for messages
    find: Callable[[Path, Notes], Iterator[Cell]]  # yields the cells in that folder and notes oddities
    entries: tuple[str, ...] = ()  # patterns of names (any case) in the layout's top folder; empty: codes of classes
    modality: str = "peripheral blood"
    licence: str = "not stated"
    n_entries: int = 2  # number of `entries` that a top folder must have
    classes: Mapping[str, str] = field(default_factory=dict)  # {the distributor's code: class name}
    expected: Mapping[str, int] = field(default_factory=dict)  # published counts of "pictures", "patients", a class ...
    packed: str = ""  # pattern of the files that hold all images: unpacked before `find`, which gets that folder
    cuts: bool = False  # whether cells are cut out of larger images
    margin: float = 0.1  # default margin around a cut cell, as a fraction of its longer side
    keep: tuple[str, ...] = ()  # classes that are cut out by default; empty for all
    remarks: str = ""  # for users of the set

    def top_folder(self, source: str | os.PathLike[str]) -> Path:
        """Return the folder at or below `source` that has the layout; raise FileNotFoundError if there is none."""
        source = Path(source).absolute()
        where_to_get = f"{self.title} can be downloaded at {self.origin} (licence: {self.licence})"
        if not source.is_dir():
            what = "is a file; unpack it and give the folder" if source.is_file() else "does not exist"
            raise FileNotFoundError(f"--source: {str(source)!r} {what}. {where_to_get}")
        level, entries = [source], self.entries or tuple(self.classes)
        for _ in range(SEARCH_DEPTH):
            for folder in level:
                names = [name.lower() for name in os.listdir(folder)]
                n_matching = sum(bool(fnmatch.filter(names, entry.lower())) for entry in entries)
                if n_matching >= min(self.n_entries, len(entries)):
                    return folder
            level = [inner for folder in level for inner in folders_in(folder)]
        content = ", ".join(sorted(os.listdir(source))[:N_EXAMPLES]) or "nothing"
        raise FileNotFoundError(
            f"--source: {str(source)!r} and the folders inside do not look like {self.title}: expected {self.layout}; "
            f"found {content}. Unpack archives first. {where_to_get}"
        )


def dataset(**known: Any) -> Callable[[Callable[[Path, Notes], Iterator[Cell]]], DataSet]:
    """Make the decorated function, which finds the cells, a `DataSet` of its name; `known` are the other fields."""
    return lambda find: DataSet(name=find.__name__, find=find, **known)


def find_cells(dataset: DataSet, top: Path) -> tuple[list[Cell], Notes]:
    """Find the cells of a data set, at least one, in the order of their images, and the oddities of its files."""
    notes = Notes(top)
    cells = sorted(dataset.find(top, notes), key=lambda cell: cell.image)  # stable: boxes keep their order
    known = {cell.image for cell in cells} | notes.annotations
    for image in find_images(top):
        if image not in known:
            notes.add("images that the layout does not explain, left out", image)
    for parent, folders, files in os.walk(top):
        for name in sorted(name for name in folders if name[0] == "." and name != ".git"):
            notes.add("hidden folders, left out", Path(parent, name))
        for name in sorted(name for name in files if name[0] == "." and name.lower().endswith(IMAGE_SUFFIXES)):
            notes.add("hidden files that are named like images, left out", Path(parent, name))
        for name in sorted(name for name in files if name.lower().endswith(ARCHIVE_SUFFIXES)):
            if not Path(parent, name.partition(".")[0]).is_dir():
                notes.add("archives that are not unpacked, left out", Path(parent, name))
        folders[:] = sorted(name for name in folders if name[0] != ".")
    if not cells:
        raise ValueError(
            f"{dataset.title}: no cell in {str(top)!r}; expected {dataset.layout}. What was there instead: {notes}"
        )
    return cells, notes


def note_siblings(source: Path, top: Path, notes: Notes) -> None:
    """Note the folders with images that lie in `source` beside the data set's folder and are not read."""
    for folder in (top, *top.parents):
        if folder == source:
            return
        for sibling in folders_in(folder.parent):
            if sibling != folder and next(walk_images(sibling), None) is not None:
                notes.add("folders with images beside the one that was read, left out", sibling)


def file_near(top: Path, name: str, folders: Sequence[str] = (".", "..", "../..")) -> Path | None:
    """Return the file of that name in one of these folders, which count from `top`; None if there is none."""
    return next((file for file in (top / folder / name for folder in folders) if file.is_file()), None)


def listed_parts(
    top: Path, pattern: str, n_names: int, notes: Notes, folders: Sequence[str] = (".", "..", "../..")
) -> dict[str, str]:
    """Read a split that is published as lists of images beside the set.

    Args:
        pattern: name of the lists, in which {} stands for train, val and test; lists that are missing are left out.
        n_names: number of names at the end of a path that tell one image from the others.

    Returns:
        {the end of an image's path: its part}.
    """
    parts: dict[str, str] = {}
    for part in SPLIT_LISTS:
        file = file_near(top, pattern.format(part), folders)
        for row in read_table(file, "labels", ("path",), other_names={"path": PATH_COLUMNS}) if file else ():
            end = "/".join(row["path"].replace("\\", "/").split("/")[-n_names:])
            if parts.setdefault(end, part) != part:
                notes.add("images that two lists of the split name, the first counts", end)
    return parts


def note_absent(parts: Mapping[str, str], notes: Notes) -> None:
    """Note the images that the lists of a split name and that were not there."""
    for absent, part in parts.items():
        notes.add(f"images that the {part} list names and that are not there", absent)


def folders_in(folder: Path) -> list[Path]:
    """List the folders in a folder, without hidden ones."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def images_in(folder: Path) -> list[Path]:
    """List the images directly in a folder; none if the folder is missing."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if is_image_name(path.name) and path.is_file())


def image_size(image: Path, notes: Notes) -> tuple[int, int] | None:
    """Read an image's width and height; note an unreadable image and return None."""
    try:
        with Image.open(check_regular_file(image), formats=FORMATS) as header:
            return header.size
    except DAMAGE as error:
        notes.add("unreadable images and masks", image, error)
        return None


def child(folder: Path, name: str) -> Path:
    """Return the entry with that name in any case; if there is none, the path that it would have."""
    return next((path for path in folder.iterdir() if path.name.lower() == name.lower()), folder / name)


def class_folders(top: Path, classes: Mapping[str, str], notes: Notes) -> Iterator[tuple[Path, str]]:
    """Yield (image, class) for all images in folders that are named like a class (code or name, in any case)."""
    names = {key.lower(): name for code, name in classes.items() for key in (code, name)}
    for folder in folders_in(top):
        if folder.name.lower() in names:
            yield from ((image, names[folder.name.lower()]) for image in find_images(folder))
        elif find_images(folder):
            notes.add("folders with images that are no known class", folder)


def with_masks(images: Path, masks: Path, mask_name: Callable[[str], str], notes: Notes) -> Iterator[tuple[Path, Path]]:
    """Yield each image of a folder with its mask; `mask_name` makes the mask's name from the image's stem."""
    unused = set(images_in(masks))
    notes.annotations |= unused
    for image in images_in(images):
        mask = masks / mask_name(image.stem)
        unused.discard(mask)
        yield image, mask
    for mask in sorted(unused):
        notes.add("masks of images that are not there", mask)


def boxes_of_mask(
    image: Path,
    mask: Path,
    notes: Notes,
    gap: int = 0,
    threshold: int = 127,
    single: bool = False,
    numbered: bool = False,
    border: int = 0,
    min_side: int = MIN_SIDE_PX,
) -> Iterator[Box]:
    """Yield the boxes around a mask's cells; note the oddities of mask and image, and both as annotations.

    A missing, unreadable or empty mask, or one of another size than the image, has no boxes.

    Args:
        gap: largest number of background pixels between two parts of a cell, such as the lobes of a nucleus.
        threshold: grey value above which a pixel belongs to a cell.
        single: the whole mask is one cell, with any number of parts.
        numbered: each cell has a number of its own in the mask, so that cells which touch each other stay apart.
        border: largest number of pixels that a mask may lack on each side of the image; it is centred.
        min_side: shorter side in pixels of the smallest cell; what is smaller is a speck.
    """
    notes.annotations.add(image)
    if not mask.is_file():
        notes.add("masks that are missing", mask)
        return
    notes.annotations.add(mask)
    size = image_size(image, notes)
    try:
        values = _numbers_in(mask) if numbered else np.asarray(load_image(mask)).max(axis=2)
    except DAMAGE as error:
        notes.add("unreadable images and masks", mask, error)
        return
    if size is None:
        return
    is_cell = values > (0 if values.max() == 1 else threshold)  # some masks are zeros and ones
    if not is_cell.any():
        notes.add("masks without a cell", mask)
        return
    missing = np.subtract(size, is_cell.shape[::-1])
    if (missing % 2).any() or not 0 <= missing.min() <= missing.max() <= 2 * border:
        notes.add("masks of another size than their image", mask, f"{is_cell.shape[::-1]}, image {size}")
        return
    if missing.any():
        notes.add("masks that lack a border of their image, centred", mask, f"{is_cell.shape[::-1]}, image {size}")
    layers = [values == number for number in np.unique(values[is_cell])] if numbered else [is_cell]
    margins = [(side // 2, side // 2) for side in missing[::-1]]
    boxes = [box for layer in layers for box in components(np.pad(layer, margins), max(size) if single else gap)]
    cells = [box for box in boxes if min(box.right - box.left, box.bottom - box.top) >= min_side]
    for _ in range(len(boxes) - len(cells)):
        notes.add(f"specks in masks, smaller than {min_side} px", mask)
    if (0, 0, *size) in cells:
        notes.add("masks whose cell fills the whole image; is the mask what it should be?", mask)
    if len(cells) > 1:
        notes.add("images with several cells", image)
    yield from cells


def _numbers_in(mask: Path) -> np.ndarray:
    """Read the number of each pixel, int64 [H, W]: grey values with 8 or 16 bits, places in a palette, or colours."""
    with Image.open(check_regular_file(mask), formats=FORMATS) as image:
        values = np.asarray(image).astype(np.int64)
    return values if values.ndim == 2 else values[..., :3] @ (256 ** np.arange(values[..., :3].shape[2]))


def components(is_cell: np.ndarray, gap: int = 0) -> list[Box]:
    """Return the boxes around the connected parts of a mask, bool [H, W], from top to bottom; diagonals connect.

    Parts with at most `gap` pixels (rounded up to an even number) of background between them are one part.
    """
    reach = (gap + 1) // 2
    grown = cv2.dilate(np.pad(is_cell.astype(np.uint8), reach), np.ones((2 * reach + 1, 2 * reach + 1), np.uint8))
    _, part_of, stats, _ = cv2.connectedComponentsWithStats(grown, connectivity=8)
    parts, first_pixel = np.unique(part_of, return_index=True)
    ordered = [part for part in parts[np.argsort(first_pixel)] if part > 0]  # 0 is the background
    # growing moved every edge outwards by `reach`, and padding moved the image's corner as well
    return [
        Box(left, top, left + width - 2 * reach, top + height - 2 * reach)
        for left, top, width, height, _ in stats[ordered].tolist()
    ]


def all_datasets() -> dict[str, DataSet]:
    """Return {name: data set} of all that the modules of this package declare, sorted by name."""
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    datasets = [value for module in modules for value in vars(module).values() if isinstance(value, DataSet)]
    by_name = {dataset.name: dataset for dataset in sorted(datasets, key=lambda dataset: dataset.name)}
    assert len(by_name) == len(datasets), "two data sets have the same name"
    return by_name


def get_dataset(name: str) -> DataSet:
    """Return the data set of that name; a ValueError for an unknown one suggests the most similar name."""
    datasets = all_datasets()
    if name not in datasets:
        near = difflib.get_close_matches(name, datasets, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"data set {name!r} is unknown; {hint}known are {', '.join(datasets)}")
    return datasets[name]


def overview_table() -> str:
    """Return a Markdown table of all data sets."""
    lines = ["| name | data set | modality | images | cells cut out | licence |", "|---|---|---|---|---|---|"]
    for dataset in all_datasets().values():
        counts = [f"{name} {count:,}" for name, count in dataset.expected.items()] or ["not stated"]
        lines.append(
            f"| `{dataset.name}` | [{dataset.title}]({dataset.origin}) | {dataset.modality} | "
            f"{counts[0].removeprefix('pictures ')} | {'yes' if dataset.cuts else ''} | {dataset.licence} |"
        )
    return "\n".join(lines)
