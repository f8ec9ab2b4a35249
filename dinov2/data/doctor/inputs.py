"""What the doctor looks at: lists, folders and tables read into flat arrays, one entry for each naming of a picture.

Letters: E entries (a line of a list, a row of a table, a file of a folder), N pictures (different absolute paths).
"""

import csv
import hashlib
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np

from dinov2.data.datasets.image_paths import IMAGE_SUFFIXES
from dinov2.data.datasets.tables import LABEL_COLUMN, PATH_COLUMN, PATIENT_COLUMN
from dinov2.data.splits import PART_COLUMN, PATH_COLUMNS

PathLike: TypeAlias = str | os.PathLike[str]

DATASET_COLUMN = "dataset"
TRAINING, EVALUATION, LABELS = "training", "evaluation", "labels"
EVALUATED_PARTS = ("val", "test")


@dataclass(frozen=True)
class Source:
    """One list, table or folder of pictures.

    Attributes:
        file: where it is.
        kind: "list", "table" or "folder".
        role: "training", "evaluation", or "labels" for a table that only tells of pictures.
        name: its own among the sources.
    """

    file: Path
    kind: str
    role: str
    name: str


class EmptyValue(NamedTuple):
    """A row without a value where one is needed; `source` is a position in `Inputs.sources`."""

    source: int
    line: int
    column: str


class Names:
    """Texts and their numbers, in the order of their first use; -1 stands for no text."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._ids: dict[str, int] = {}

    def id_of(self, text: str) -> int:
        if not text:
            return -1
        if text not in self._ids:
            self._ids[text] = len(self.texts)
            self.texts.append(text)
        return self._ids[text]


@dataclass(eq=False)
class Inputs:
    """All entries of all sources; arrays have a row for each entry.

    Attributes:
        sources: what was read.
        source: int32 [E], positions in `sources`.
        line: int64 [E], line or row in the source's file, from 1; 0 in a folder.
        picture: int64 [E], which of the N pictures.
        label, patient, dataset: int32 [E], positions in `labels`, `patients`, `datasets`; -1 for none.
        is_hidden: bool [E], a file that readers of folders leave out: its name or a folder's begins with a dot.
        empty_values: rows that lack a value; they have no entry.
        n_blank_lines: of all lists; they are allowed.
    """

    sources: list[Source]
    source: np.ndarray
    line: np.ndarray
    picture: np.ndarray
    label: np.ndarray
    patient: np.ndarray
    dataset: np.ndarray
    is_hidden: np.ndarray
    labels: list[str]
    patients: list[str]
    datasets: list[str]
    empty_values: list[EmptyValue]
    n_blank_lines: int
    _first_entry: np.ndarray = field(repr=False)  # int64 [N]
    _bytes: bytes = field(repr=False)
    _ends: np.ndarray = field(repr=False)  # int64 [E]

    @property
    def n_pictures(self) -> int:
        return len(self._first_entry)

    def path(self, picture: int) -> str:
        """Absolute path of one of the N pictures."""
        entry = int(self._first_entry[picture])
        start = int(self._ends[entry - 1]) if entry else 0
        return os.fsdecode(self._bytes[start : int(self._ends[entry])])

    def has_role(self, role: str) -> np.ndarray:
        """bool [E]: entries of sources with this role."""
        return np.array([source.role == role for source in self.sources], dtype=bool)[self.source]


class _Builder:
    """Collects entries in compact arrays: a million paths stay one block of bytes."""

    def __init__(self) -> None:
        self.sources: list[Source] = []
        self.columns = {name: array("q") for name in ("source", "line", "label", "patient", "dataset", "ends")}
        self.is_hidden = bytearray()
        self.bytes = bytearray()
        self.digests = bytearray()
        self.labels, self.patients, self.datasets = Names(), Names(), Names()
        self.empty_values: list[EmptyValue] = []
        self.n_blank_lines = 0

    def begin(self, file: Path, kind: str, role: str) -> None:
        stem = file.absolute().name if kind == "folder" else file.stem
        taken = {source.name for source in self.sources}
        name, number = stem, 2
        while name in taken:
            name, number = f"{stem}_{number}", number + 1
        self.sources.append(Source(file, kind, role, name))

    def add(
        self, path: str, line: int = 0, label: str = "", patient: str = "", dataset: str = "", is_hidden: bool = False
    ) -> None:
        data = os.fsencode(os.path.abspath(path))
        self.bytes += data
        self.digests += hashlib.blake2b(data, digest_size=16).digest()
        values = {
            "source": len(self.sources) - 1,
            "line": line,
            "label": self.labels.id_of(label),
            "patient": self.patients.id_of(patient),
            "dataset": self.datasets.id_of(dataset),
            "ends": len(self.bytes),
        }
        for name, value in values.items():
            self.columns[name].append(value)
        self.is_hidden.append(is_hidden)

    def finish(self) -> Inputs:
        columns = {name: np.array(values, dtype=np.int64) for name, values in self.columns.items()}
        digests = np.frombuffer(bytes(self.digests), dtype=np.uint64).reshape(-1, 2)
        first = first_of_equal(digests[:, 0], digests[:, 1])  # [E]
        first_entry = np.flatnonzero(first == np.arange(len(first)))  # [N]
        return Inputs(
            sources=self.sources,
            source=columns["source"].astype(np.int32),
            line=columns["line"],
            picture=np.searchsorted(first_entry, first),
            label=columns["label"].astype(np.int32),
            patient=columns["patient"].astype(np.int32),
            dataset=columns["dataset"].astype(np.int32),
            is_hidden=np.frombuffer(bytes(self.is_hidden), dtype=bool),
            labels=self.labels.texts,
            patients=self.patients.texts,
            datasets=self.datasets.texts,
            empty_values=self.empty_values,
            n_blank_lines=self.n_blank_lines,
            _first_entry=first_entry,
            _bytes=bytes(self.bytes),
            _ends=columns["ends"],
        )


def first_of_equal(*columns: np.ndarray) -> np.ndarray:
    """For each row the position of the first row that equals it in all columns; int64, as long as the columns."""
    n = len(columns[0])
    if n == 0:
        return np.zeros(0, dtype=np.int64)
    order = np.lexsort(columns)  # stable, so each run of equal rows begins with its first
    is_new = np.zeros(n, dtype=bool)
    is_new[0] = True
    for column in columns:
        is_new[1:] |= column[order[1:]] != column[order[:-1]]
    first = np.empty(n, dtype=np.int64)
    first[order] = order[is_new][np.cumsum(is_new) - 1]
    return first


def read_inputs(
    training: Sequence[PathLike], labels: Sequence[PathLike] = (), evaluation: Sequence[PathLike] = ()
) -> Inputs:
    """Read all sources; the pictures themselves are not looked at.

    A source is a .txt list, a CSV with the columns `Image Path[,Label][,patient][,dataset]`, a folder with .txt lists
    (each becomes a source), or a folder of pictures, searched with all folders in it. In a folder of pictures given
    for labels or evaluation, the first folder below it is the label. Files with a picture's suffix that are hidden, or
    lie in a hidden folder, are entries too, and marked.

    Args:
        training: what is to be learned from.
        labels: tables or folders that tell labels, patients and data sets of pictures.
        evaluation: what is judged by. Of a table with the column `part` only val and test are read.

    Raises:
        FileNotFoundError: a source does not exist, or a folder has no list and no picture.
        ValueError: a source is of another kind, is not UTF-8, lacks a column, or nothing is named at all.
    """
    builder = _Builder()
    for role, sources in ((TRAINING, training), (LABELS, labels), (EVALUATION, evaluation)):
        for source in sources:
            _read_source(builder, Path(source), role)
    inputs = builder.finish()
    if inputs.n_pictures == 0:
        raise ValueError(
            f"check lists: {', '.join(str(source.file) for source in inputs.sources)} name no picture; write one "
            f"picture path per line"
        )
    return inputs


def _read_source(builder: _Builder, path: Path, role: str) -> None:
    setting = {TRAINING: "check lists", LABELS: "--labels", EVALUATION: "--eval-splits"}[role]
    if path.is_dir():
        lists = [file for file in sorted(path.glob("[!.]*")) if file.suffix.lower() == ".txt" and file.is_file()]
        if lists and role != LABELS:
            for file in lists:
                _read_list(builder, file, role, setting)
        else:
            _read_folder(builder, path, role, setting)
    elif not path.is_file():
        raise FileNotFoundError(f"{setting}: {str(path)!r} does not exist; give a .txt list, a CSV or a folder")
    elif path.suffix.lower() == ".txt" and role != LABELS:
        _read_list(builder, path, role, setting)
    elif path.suffix.lower() == ".csv":
        _read_table(builder, path, role, setting)
    else:
        kinds = "a CSV or a folder with a folder per class" if role == LABELS else "a .txt list, a CSV or a folder"
        raise ValueError(f"{setting}: {str(path)!r} is of an unknown kind; give {kinds}")


def list_lines(file: Path, setting: str) -> Iterator[tuple[int, str]]:
    """(line number from 1, text without spaces around it) of each line of a list.

    Raises:
        ValueError: if a line is not UTF-8.
    """
    with open(file, "rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")  # Windows editors write a byte-order mark
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{setting}: {str(file)!r}, line {number}, is not UTF-8 text ({error.reason}); save it as UTF-8"
                ) from error
            yield number, text.strip()


def _read_list(builder: _Builder, file: Path, role: str, setting: str) -> None:
    builder.begin(file, "list", role)
    folder = os.path.abspath(file.parent)
    for number, text in list_lines(file, setting):
        if not text:
            builder.n_blank_lines += 1
        elif not text.startswith("#"):
            builder.add(os.path.join(folder, text), number)


def table_rows(file: Path, setting: str) -> Iterator[list[str]]:
    """The rows of a CSV, its header first, without spaces around values; an empty line gives [].

    Raises:
        ValueError: if it is not UTF-8, or not a CSV.
    """
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            for row in csv.reader(stream, skipinitialspace=True):
                yield [value.strip() for value in row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{setting}: {str(file)!r} is not a CSV in UTF-8 ({error}); save it as CSV UTF-8") from error


def path_column(header: Sequence[str]) -> int | None:
    """Position of the column with the pictures' paths."""
    names = (PATH_COLUMN, *PATH_COLUMNS)
    return next((header.index(name) for name in names if name in header), None)


def _read_table(builder: _Builder, file: Path, role: str, setting: str) -> None:
    builder.begin(file, "table", role)
    rows = table_rows(file, setting)
    header = next(rows, [])
    where = path_column(header)
    if where is None or (role == LABELS and LABEL_COLUMN not in header):
        raise ValueError(
            f"{setting}: {str(file)!r} has the columns {header}; expected "
            f"{PATH_COLUMN},{LABEL_COLUMN}[,{PATIENT_COLUMN}][,{DATASET_COLUMN}]"
        )
    columns = {name: header.index(name) for name in (LABEL_COLUMN, PATIENT_COLUMN, DATASET_COLUMN) if name in header}
    part_column = header.index(PART_COLUMN) if PART_COLUMN in header and role == EVALUATION else None
    folder = os.path.abspath(file.parent)
    source = len(builder.sources) - 1
    for number, row in enumerate(rows, 2):
        row += [""] * (len(header) - len(row))
        if not any(row):
            continue  # an empty line, or one of commas, as spreadsheets leave at the end
        if part_column is not None and row[part_column] not in EVALUATED_PARTS:
            continue
        values = {name: row[column] for name, column in columns.items()}
        gaps = [name for name, value in {header[where]: row[where], **values}.items() if not value]
        if gaps:
            builder.empty_values.append(EmptyValue(source, number, ", ".join(gaps)))
            continue
        builder.add(
            os.path.join(folder, row[where]),
            number,
            values.get(LABEL_COLUMN, ""),
            values.get(PATIENT_COLUMN, ""),
            values.get(DATASET_COLUMN, ""),
        )


def _read_folder(builder: _Builder, folder: Path, role: str, setting: str) -> None:
    builder.begin(folder, "folder", role)
    n_before = len(builder.is_hidden)
    for parent, folders, files in os.walk(folder):
        folders.sort()
        inside = Path(parent).relative_to(folder).parts
        label = inside[0] if inside and role != TRAINING else ""
        in_hidden_folder = any(part.startswith(".") for part in inside)
        for name in sorted(files):
            if name.lower().endswith(IMAGE_SUFFIXES):
                is_hidden = in_hidden_folder or name.startswith(".")
                builder.add(os.path.join(parent, name), label="" if is_hidden else label, is_hidden=is_hidden)
    if len(builder.is_hidden) == n_before:
        raise FileNotFoundError(
            f"{setting}: no .txt list and no picture ({', '.join(IMAGE_SUFFIXES)}) in {str(folder)!r}; give the "
            f"folder that has them"
        )
