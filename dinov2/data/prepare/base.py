"""What a public data set is declared to be, and what a look at its folder found: cells, oddities, counts."""

import fnmatch
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dinov2.data.datasets.image_paths import IMAGE_SUFFIXES, find_images, is_image_name
from dinov2.data.datasets.tables import open_table

N_EXAMPLES = 5
SEARCH_DEPTH = 5  # folders between --source and the layout: an archive is often unpacked into folders of its own name
ARCHIVE_SUFFIXES = (".zip", ".rar", ".7z", ".tar", ".tgz", ".gz")


@dataclass(frozen=True)
class Box:
    """A cell's place in a picture: pixels, the left and upper edge inside, the right and lower one outside."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def has_area(self) -> bool:
        """Whether it is wider and higher than nothing."""
        return self.right > self.left and self.bottom > self.top

    @property
    def sides(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom."""
        return self.left, self.top, self.right, self.bottom

    def clipped(self, width: int, height: int) -> "Box":
        """Its part inside a picture of that size, which may be of no area."""
        return Box(max(self.left, 0), max(self.top, 0), min(self.right, width), min(self.bottom, height))


@dataclass(frozen=True)
class Cell:
    """One cell as its distributor describes it.

    Attributes:
        picture: the file that shows it.
        label: the distributor's class; None if there is none.
        group: DinoBloom's class, where it differs; None for a cell that belongs to none of those.
        patient: an id, None if the set names none.
        part: of the official split, for instance "train".
        box: where the cell is; None if the picture is the cell.
    """

    picture: Path
    label: str | None = None
    group: str | None = None
    patient: str | None = None
    part: str | None = None
    box: Box | None = None


class Notes:
    """Counts what is odd, by kind, and keeps some examples of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = defaultdict(list)
        self.annotations: set[Path] = set()  # masks and the like: known pictures that show no cell

    def add(self, kind: str, example: str | os.PathLike[str]) -> None:
        """Count one more of a kind."""
        self.counts[kind] += 1
        if len(self.examples[kind]) < N_EXAMPLES:
            self.examples[kind].append(os.fspath(example))

    def report(self) -> dict[str, dict[str, object]]:
        """{kind: {"count": n, "examples": [...]}}, by name."""
        return {kind: {"count": self.counts[kind], "examples": self.examples[kind]} for kind in sorted(self.counts)}


Finder = Callable[[Path, Notes], Iterator[Cell]]


@dataclass(frozen=True)
class DataSet:
    """What is known of a data set before its files are seen. None stands for "the distributor does not say".

    Attributes:
        name: on the command line and of the files written.
        title: as DinoBloom's overview calls it.
        modality: "peripheral blood" or "bone marrow", and the species if not human.
        origin: where the archive is to be had.
        paper: to cite.
        licence: of the pictures.
        layout: what lies in the unpacked archive, for messages.
        entries: names (patterns as in fnmatch, any case) of which the layout's top folder has some.
        find: yields the cells below that folder and notes oddities.
        n_entries: how many different `entries` a folder needs to be taken for the top folder.
        classes: {the distributor's code: class name}; empty if the set has no classes.
        expected: {what: count} as published, keys being "pictures", "cells", "patients", a class or a part.
        cuts: whether cells are cut out of larger pictures.
        margin: around a cut cell unless the user chooses another, as a fraction of its longer side.
        keep: classes that are cut out unless the user chooses others; empty for all.
        remarks: what users of the set have to know.
    """

    name: str
    title: str
    modality: str
    origin: str
    paper: str
    licence: str | None
    layout: str
    entries: tuple[str, ...]
    find: Finder = field(repr=False)
    n_entries: int = 2
    classes: Mapping[str, str] = field(default_factory=dict)
    expected: Mapping[str, int] = field(default_factory=dict)
    cuts: bool = False
    margin: float = 0.1
    keep: tuple[str, ...] = ()
    remarks: str = ""

    def top_folder(self, source: str | os.PathLike[str]) -> Path:
        """The folder at or below `source` that has the layout.

        Raises:
            FileNotFoundError: if there is none.
        """
        source = Path(source).absolute()
        if not source.is_dir():
            what = "is a file; unpack it and give the folder" if source.is_file() else "does not exist"
            raise FileNotFoundError(f"--source: {str(source)!r} {what}. {self.where_to_get()}")
        level = [source]
        for _ in range(SEARCH_DEPTH):
            for folder in level:
                if self._has_layout(folder):
                    return folder
            level = [inner for folder in level for inner in _folders(folder)]
        found = sorted(os.listdir(source))
        archives = [name for name in found if name.lower().endswith(ARCHIVE_SUFFIXES)]
        hint = f" Unpack {', '.join(archives[:N_EXAMPLES])} first." if archives else ""
        raise FileNotFoundError(
            f"--source: {str(source)!r} and the folders inside do not look like {self.title}: expected {self.layout}; "
            f"found {', '.join(found[:N_EXAMPLES]) or 'nothing'}.{hint} {self.where_to_get()}"
        )

    def where_to_get(self) -> str:
        """A sentence for people who do not have the archive yet."""
        return f"{self.title} is to be had at {self.origin} (licence: {self.licence or 'not stated'})"

    def _has_layout(self, folder: Path) -> bool:
        names = [name.lower() for name in os.listdir(folder)]
        matching = sum(any(fnmatch.fnmatchcase(name, entry.lower()) for name in names) for entry in self.entries)
        return matching >= min(self.n_entries, len(self.entries))


def _folders(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        return sorted(Path(entry.path) for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def find_cells(dataset: DataSet, top: Path) -> tuple[list[Cell], Notes]:
    """The cells of a data set in the order of their pictures, and what was odd about its files.

    Raises:
        ValueError: if not a single cell was found.
    """
    notes = Notes()
    cells = sorted(dataset.find(top, notes), key=lambda cell: cell.picture)  # stable: boxes keep their order
    known = {cell.picture for cell in cells} | notes.annotations
    for picture in find_images(top):
        if picture not in known:
            notes.add("pictures that the layout does not explain, left out", picture.relative_to(top))
    for path in _hidden(top):
        kind = "hidden folders, left out" if path.is_dir() else "hidden files that are named like pictures, left out"
        notes.add(kind, path.relative_to(top))
    if not cells:
        raise ValueError(
            f"{dataset.title}: no cell in {str(top)!r}; expected {dataset.layout}. "
            f"What was there instead: {'; '.join(f'{n} {kind}' for kind, n in notes.counts.items()) or 'no picture'}"
        )
    return cells, notes


def _hidden(top: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(top):
        hidden = sorted(name for name in folders if name.startswith("."))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent, name) for name in hidden if name != ".git")
        yield from (Path(parent, n) for n in sorted(files) if n[0] == "." and n.lower().endswith(IMAGE_SUFFIXES))


def child(folder: Path, name: str) -> Path:
    """The entry of that name in any case; where there is none, the path it would have."""
    with os.scandir(folder) as entries:
        return next((Path(e.path) for e in entries if e.name.lower() == name.lower()), folder / name)


def pictures_in(folder: Path) -> list[Path]:
    """Pictures directly in a folder, sorted; none if the folder is missing."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if is_image_name(path.name) and path.is_file())


def read_rows(file: Path, columns: Iterable[str]) -> list[dict[str, str]]:
    """The rows of a distributor's CSV; empty where a value is missing.

    Raises:
        ValueError: if it lacks a column.
    """
    table, columns = open_table(file, "labels"), list(columns)
    missing = sorted(set(columns) - set(table.columns))
    if missing:
        raise ValueError(
            f"{str(file)!r}: no column {', '.join(map(repr, missing))} among {table.columns or 'none'}; is it the "
            f"distributor's file?"
        )
    return [dict(zip(columns, values, strict=True)) for _, values in table.rows(*columns)]


def class_folders(
    top: Path, classes: Mapping[str, str], notes: Notes, other_folders: Iterable[str] = ()
) -> Iterator[tuple[Path, str]]:
    """Pictures of the folders that are named like a class (its code or name, in any case), and the class.

    Deeper folders count as their class folder. Other folders with pictures are noted, but for `other_folders`.
    """
    names = {key.lower(): name for code, name in classes.items() for key in (code, name)}
    for folder in _folders(top):
        if folder.name.lower() in names:
            yield from ((picture, names[folder.name.lower()]) for picture in find_images(folder))
        elif folder.name not in other_folders and find_images(folder):
            notes.add("folders with pictures that are no known class", folder.relative_to(top))
