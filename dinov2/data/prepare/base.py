"""What a public data set is declared to be, and how its folder is searched for cells."""

import fnmatch
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from dinov2.data.datasets.decode import IMAGE_SUFFIXES, find_images, is_image_name

N_EXAMPLES = 5
SEARCH_DEPTH = 5  # folders between --source and the layout: an archive is often unpacked into folders of its own name


class Box(NamedTuple):
    """A cell's place in an image: pixels, the left and upper edge inside, the right and lower one outside."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def has_area(self) -> bool:
        return self.right > self.left and self.bottom > self.top

    def clipped(self, width: int, height: int) -> "Box":
        """Return its part inside an image of that size, which may be of no area."""
        return Box(max(self.left, 0), max(self.top, 0), min(self.right, width), min(self.bottom, height))


@dataclass(frozen=True)
class Cell:
    """One cell as its distributor describes it."""

    image: Path
    label: str | None = None  # the distributor's class
    group: str | None = None  # DinoBloom's class, where it differs; None for a cell that belongs to none of those
    patient: str | None = None
    part: str | None = None  # of the official split, for instance "train"
    box: Box | None = None  # where the cell is; None if the image is the cell


class Notes:
    """Collects what is odd, by kind; `annotations` are known images that show no cell, such as masks."""

    def __init__(self) -> None:
        self.examples: dict[str, list[str]] = defaultdict(list)
        self.annotations: set[Path] = set()

    def add(self, kind: str, example: str | os.PathLike[str]) -> None:
        """Add one more of a kind."""
        self.examples[kind].append(os.fspath(example))

    def report(self) -> dict[str, dict[str, object]]:
        """Return {kind: {"count": n, "examples": the first}}, by name."""
        return {k: {"count": len(found), "examples": found[:N_EXAMPLES]} for k, found in sorted(self.examples.items())}

    def __str__(self) -> str:
        return "; ".join(f"{len(found)} {kind}" for kind, found in sorted(self.examples.items())) or "nothing odd"


Finder = Callable[[Path, Notes], Iterator[Cell]]


@dataclass(frozen=True)
class DataSet:
    """What is known of a data set before its files are read."""

    name: str  # on the command line and of the files written
    title: str  # as DinoBloom's overview calls it
    origin: str  # where the archive can be downloaded
    paper: str
    layout: str  # what lies in the unpacked archive, for messages
    entries: tuple[str, ...]  # patterns of names (any case), of which the layout's top folder has some
    find: Finder = field(repr=False)  # yields the cells below that folder and notes oddities
    modality: str = "peripheral blood"
    licence: str = "not stated"
    n_entries: int = 2  # how many different entries make a folder the top folder
    classes: Mapping[str, str] = field(default_factory=dict)  # {the distributor's code: class name}
    expected: Mapping[str, int] = field(default_factory=dict)  # published counts of "pictures", "patients", a class ...
    cuts: bool = False  # whether cells are cut out of larger images
    margin: float = 0.1  # around a cut cell, as a fraction of its longer side, unless the user gives another
    keep: tuple[str, ...] = ()  # classes that are cut out unless the user chooses others; empty for all
    remarks: str = ""  # what users of the set have to know

    def top_folder(self, source: str | os.PathLike[str]) -> Path:
        """Return the folder at or below `source` that has the layout.

        Raises:
            FileNotFoundError: if there is none.
        """
        source = Path(source).absolute()
        where_to_get = f"{self.title} can be downloaded at {self.origin} (licence: {self.licence})"
        if not source.is_dir():
            what = "is a file; unpack it and give the folder" if source.is_file() else "does not exist"
            raise FileNotFoundError(f"--source: {str(source)!r} {what}. {where_to_get}")
        level = [source]
        for _ in range(SEARCH_DEPTH):
            for folder in level:
                names = [name.lower() for name in os.listdir(folder)]
                n_matching = sum(bool(fnmatch.filter(names, entry.lower())) for entry in self.entries)
                if n_matching >= min(self.n_entries, len(self.entries)):
                    return folder
            level = [inner for folder in level for inner in folders_in(folder)]
        found = ", ".join(sorted(os.listdir(source))[:N_EXAMPLES]) or "nothing"
        raise FileNotFoundError(
            f"--source: {str(source)!r} and the folders inside do not look like {self.title}: expected {self.layout}; "
            f"found {found}. Unpack archives first. {where_to_get}"
        )


def find_cells(dataset: DataSet, top: Path) -> tuple[list[Cell], Notes]:
    """Find the cells of a data set, in the order of their images, and what is odd about its files.

    Raises:
        ValueError: if not a single cell was found.
    """
    notes = Notes()
    cells = sorted(dataset.find(top, notes), key=lambda cell: cell.image)  # stable: boxes keep their order
    known = {cell.image for cell in cells} | notes.annotations
    for image in find_images(top):
        if image not in known:
            notes.add("images that the layout does not explain, left out", image.relative_to(top))
    for parent, folders, files in os.walk(top):
        for name in sorted(name for name in folders if name[0] == "." and name != ".git"):
            notes.add("hidden folders, left out", Path(parent, name).relative_to(top))
        for name in sorted(name for name in files if name[0] == "." and name.lower().endswith(IMAGE_SUFFIXES)):
            notes.add("hidden files that are named like images, left out", Path(parent, name).relative_to(top))
        folders[:] = sorted(name for name in folders if name[0] != ".")
    if not cells:
        raise ValueError(
            f"{dataset.title}: no cell in {str(top)!r}; expected {dataset.layout}. What was there instead: {notes}"
        )
    return cells, notes


def folders_in(folder: Path) -> list[Path]:
    """List the folders in a folder, without hidden ones."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def images_in(folder: Path) -> list[Path]:
    """List the images directly in a folder; none if the folder is missing."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if is_image_name(path.name) and path.is_file())


def image_size(image: Path, notes: Notes) -> tuple[int, int] | None:
    """Read an image's width and height; an unreadable one is noted and has none."""
    try:
        with Image.open(image) as header:
            return header.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        notes.add("unreadable images and masks", f"{image}: {error}")
        return None


def child(folder: Path, name: str) -> Path:
    """Return the entry of that name in any case; where there is none, the path it would have."""
    return next((path for path in folder.iterdir() if path.name.lower() == name.lower()), folder / name)


def class_folders(top: Path, classes: Mapping[str, str], notes: Notes) -> Iterator[tuple[Path, str]]:
    """Yield the images below folders that are named like a class (its code or name, in any case), and the class."""
    names = {key.lower(): name for code, name in classes.items() for key in (code, name)}
    for folder in folders_in(top):
        if folder.name.lower() in names:
            yield from ((image, names[folder.name.lower()]) for image in find_images(folder))
        elif find_images(folder):
            notes.add("folders with images that are no known class", folder.relative_to(top))
