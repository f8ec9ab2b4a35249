"""Read tables (CSV and parquet) and .txt lists; no other module of the package reads such files.

A CSV may have any usual delimiter, and a byte-order mark or none. Values are text without surrounding spaces, and are
not converted: "007" is not 7. The text is UTF-8, except for the names of files, which may have any bytes.
"""

import csv
import importlib.util
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

import pandas as pd

from dinov2.data.datasets.decode import is_image_name
from dinov2.utils.files import check_regular_file
from dinov2.utils.resources import size_text

pd.options.mode.string_storage = "python"  # pyarrow takes UTF-8 only, which names of files need not be

PATH_COLUMN, LABEL_COLUMN, PATIENT_COLUMN, SET_COLUMN = "Image Path", "Label", "patient", "dataset"
PART_COLUMN = "part"  # train, val, test or unused
PATH_COLUMNS = (PATH_COLUMN, "path")  # the first of these that a table has names its images
TABLE_SUFFIXES = (".csv", ".parquet")
DELIMITERS = ",;\t|"
N_PROBED_LINES = 16
MAX_LINE = 2**20  # letters
# of parquet, where few bytes may unpack to any number of rows
ROWS_PER_BATCH, BYTES_PER_ROW, MAX_BYTES, MAX_BYTES_PER_BYTE = 4096, 64, 2**28, 100


@dataclass(frozen=True)
class Table:
    """A table whose header was read."""

    file: Path  # parquet if it has this suffix, else CSV
    setting: str  # the first words of errors: the key, flag or kind of file that named it
    columns: list[str]  # names in the first line, without surrounding spaces

    def first_of(self, names: Iterable[str]) -> str | None:
        """Return the first of these names that is a column, or None."""
        return next((name for name in names if name in self.columns), None)

    def rows(self, *columns: str) -> Iterator[tuple[int, list[str]]]:
        """Yield (line, values) of each row, for the given columns or all; lines without any value are left out."""
        names = columns or self.columns
        twice = sorted({name for name in names if name and self.columns.count(name) > 1})
        if twice:
            raise ValueError(
                f"{self.setting}: {str(self.file)!r} has the column(s) {', '.join(map(repr, twice))} twice; keep one"
            )
        rows = _parquet_rows(self, names) if is_parquet(self.file) else self._csv_rows(names)
        for line, values in rows:
            for value in values:
                check_encoding(value, self.file, line, self.setting)
            yield line, values

    def _csv_rows(self, names: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
        places = [self.columns.index(name) for name in names]
        rows = _csv_rows(self.file, self.setting)
        next(rows, None)  # the header
        for line, row in rows:
            if any(map(str.strip, row[len(self.columns) :])):
                raise ValueError(
                    f"{self.setting}: {str(self.file)!r}, line {line}, has {len(row)} values and the first line "
                    f"{len(self.columns)}; put a value that holds the delimiter in quotation marks"
                )
            yield line, [row[place].strip() if place < len(row) else "" for place in places]

    def records(self) -> Iterator[tuple[int, dict[str, str]]]:
        """Yield (line, {column: value}) of each row."""
        for line, values in self.rows():
            yield line, dict(zip(self.columns, values, strict=True))


def open_table(file: Path, setting: str) -> Table:
    """Read the names of a table's columns; parquet needs pyarrow."""
    check_regular_file(file, setting)
    if is_parquet(file):
        with opened_parquet(file, setting) as opened:
            return Table(file, setting, opened.schema_arrow.names)
    line, header = next(_csv_rows(file, setting), (1, []))
    for name in header:
        check_encoding(name, file, line, setting)
    return Table(file, setting, [name.strip() for name in header])


def read_table(
    file: Path,
    setting: str,
    required: Sequence[str],
    optional: Sequence[str] = (),
    other_names: Mapping[str, Sequence[str]] | None = None,
    may_be_empty: Sequence[str] = (),
) -> list[dict[str, str]]:
    """Read {column: value} of each row of a table, at least one, for the required and optional columns.

    Each row needs a value in all of these that the table has, except for those that `may_be_empty`. `other_names` are
    {column: further names that it may have in the file}; errors begin with `setting`.
    """
    table = open_table(file, setting)
    name_of = {}
    for column in (*required, *optional):
        name = table.first_of((column, *(other_names or {}).get(column, ())))
        if name is not None:
            name_of[column] = name
    missing = [column for column in required if column not in name_of]
    if missing:
        raise ValueError(
            f"{setting}: {str(file)!r} lacks the column(s) {', '.join(map(repr, missing))}; its first line has "
            f"{table.columns or 'nothing'}, expected {','.join(required)}{''.join(f'[,{name}]' for name in optional)}"
        )
    rows = []
    for line, values in table.rows(*name_of.values()):
        row = dict(zip(name_of, values, strict=True))
        gaps = [column for column, value in row.items() if not value]
        if len(gaps) == len(row):
            continue
        if gaps := [column for column in gaps if column not in may_be_empty]:
            raise ValueError(
                f"{setting}: {str(file)!r}, line {line}: no value for {', '.join(map(repr, gaps))}; fill it in or "
                f"drop the row"
            )
        rows.append(row)
    if not rows:
        raise ValueError(f"{setting}: {str(file)!r} has no rows under its first line; add some")
    return rows


def read_list(file: Path, setting: str = "train.dataset_path") -> list[str]:
    """Read the lines of a list of images without surrounding spaces, except blank ones and those that begin with `#`.

    Raises:
        ValueError: it is no list, as a README.txt: none of its first lines is named like an image or names a file.
    """
    check_regular_file(file, setting)
    with open(file, encoding="utf-8-sig", errors="surrogateescape") as stream:  # -sig: Windows editors write a mark
        numbered = ((number, line.strip()) for number, line in enumerate(_lines(stream, file, setting), start=1))
        lines = {number: line for number, line in numbered if line and not line.startswith("#")}
    for number, line in lines.items():
        check_encoding(line, file, number, setting)
    first = list(lines.values())[:N_PROBED_LINES]
    if first and not any(is_image_name(os.path.basename(line)) or (file.parent / line).is_file() for line in first):
        raise ValueError(
            f"{setting}: {str(file)!r} is read as a list of images, and its first line {first[0][:80]!r} names none; "
            f"if it is no list, move it to another folder or give it another suffix than .txt"
        )
    return list(lines.values())


def _lines(stream: TextIO, file: Path, setting: str) -> Iterator[str]:
    """Yield the lines of a file; one that is too long to be text is a ValueError before it takes memory."""
    while line := stream.readline(MAX_LINE):
        if len(line) == MAX_LINE:
            raise ValueError(
                f"{setting}: {str(file)!r} has a line of {MAX_LINE:,} letters or more; it is no table or list"
            )
        yield line


def check_encoding(value: str, file: Path, line: int, setting: str) -> None:
    """Raise ValueError for a value that was not UTF-8, unless it is the name of a file, which may have any bytes."""
    if not value.isascii() and not is_utf8(value) and not os.path.exists(file.parent / value):
        raise ValueError(
            f"{setting}: {str(file)!r}, line {line}, is not UTF-8 text, and there is no file with the bytes of "
            f"{value[:80]!r} as its name; save it as UTF-8, in a spreadsheet as CSV UTF-8"
        )


def is_utf8(text: str) -> bool:
    """Return True if a text can be written as UTF-8, False if it holds bytes that could not be decoded."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def is_folder(path: Path, setting: str, expected: str) -> bool:
    """Return True for a folder, False for a table; raise FileNotFoundError or ValueError for anything else."""
    if not path.exists():
        raise FileNotFoundError(f"{setting}: {str(path)!r} does not exist; give {expected}")
    if not path.is_dir() and path.suffix.lower() not in TABLE_SUFFIXES:
        raise ValueError(f"{setting}: {str(path)!r} is neither a folder nor a .csv or .parquet file; give {expected}")
    return path.is_dir()


def check_files_exist(files: Sequence[Path], table: Path, setting: str, things: str) -> None:
    """Raise FileNotFoundError unless all files that a table names exist."""
    missing = [str(file) for file in files if not os.path.isfile(file)]  # also for names that are too long
    if missing:
        raise FileNotFoundError(
            f"{setting}: {len(missing)} of the {len(files)} {things} in {str(table)!r} do not exist, for instance "
            f"{', '.join(missing[:3])}; relative paths count from {str(table.parent.absolute())!r}"
        )


def is_parquet(file: Path) -> bool:
    """Return whether a table is read as parquet, by its name."""
    return file.suffix.lower() == ".parquet"


def _csv_rows(file: Path, setting: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (line, values) of the header and of each row that is not empty."""
    line = 0
    # -sig: Excel writes a byte-order mark
    with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        lines = _lines(stream, file, setting)
        first = next(lines, "")
        header = re.sub('"[^"]*"', "", first)
        delimiter = max(DELIMITERS, key=header.count)
        n_delimiters = header.count(delimiter)
        reader = csv.reader(chain([first], lines), delimiter=delimiter, skipinitialspace=True, strict=True)
        try:
            for row in reader:
                # two stray quotation marks swallow the lines between them
                if any(0 < n_delimiters * value.count("\n") <= value.count(delimiter) for value in row):
                    raise csv.Error("a value holds whole lines")
                line = reader.line_num
                if any(map(str.strip, row)):  # spreadsheets leave lines of delimiters at the end
                    yield line, row
        except csv.Error as error:
            raise ValueError(
                f"{setting}: {str(file)!r}, line {line + 1}, is not CSV ({error}); is a quotation mark open "
                f"there? inside a value two of them stand for one"
            ) from error


def check_pyarrow(what: str, alternative: str) -> None:
    """Raise ValueError if pyarrow is missing; the message begins with what needs it."""
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"{what} needs pyarrow (`pip install pyarrow`), or {alternative}")


@contextmanager
def opened_parquet(file: Path, setting: str) -> Iterator[Any]:
    """Yield the opened `pyarrow.parquet.ParquetFile`; its errors in this block are ValueErrors that name the file."""
    check_pyarrow(f"{setting}: reading {str(file)!r}", "save it as CSV")
    import pyarrow
    from pyarrow import parquet

    try:
        # as dictionaries, in which a long text that stands in many rows takes memory once
        texts = [
            field.name for field in parquet.read_schema(file) if field.type in (pyarrow.string(), pyarrow.binary())
        ]
        with parquet.ParquetFile(file, read_dictionary=texts) as opened:
            yield opened
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{setting}: {str(file)!r} cannot be read as parquet: {error}") from error


def unpacking_limit(table: Table) -> tuple[int, str]:
    """Return the most bytes that a parquet file of its size may unpack to, and the message if it has more."""
    limit = MAX_BYTES + MAX_BYTES_PER_BYTE * table.file.stat().st_size
    return limit, (
        f"{table.setting}: {str(table.file)!r} unpacks to more than {size_text(limit)}, as no table of images does; "
        f"write it again"
    )


def _parquet_rows(table: Table, names: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield (row, values); numbers become text. Stop with a ValueError before a small file fills the memory."""
    limit, too_large = unpacking_limit(table)
    row = n_bytes = 0
    with opened_parquet(table.file, table.setting) as opened:
        groups = [opened.metadata.row_group(i) for i in range(opened.num_row_groups)]
        if any(group.total_byte_size > limit for group in groups):
            raise ValueError(too_large)
        for batch in opened.iter_batches(ROWS_PER_BATCH, columns=list(names)):
            batch.validate(full=True)  # a damaged file may point beyond its own values
            for values in zip(*(_texts(batch.column(name), name, table) for name in names), strict=True):
                row += 1
                n_bytes += BYTES_PER_ROW + sum(map(len, values))
                if n_bytes > limit:
                    raise ValueError(too_large)
                yield row, list(values)


def _texts(column: Any, name: str, table: Table) -> list[str]:
    """Convert a column of a batch to texts; equal values of a dictionary share their memory."""
    import pyarrow
    from pyarrow import compute

    is_coded = isinstance(column, pyarrow.DictionaryArray)
    try:
        texts = compute.cast(column.dictionary if is_coded else column, pyarrow.large_string()).to_pylist()
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
        kind = column.type.value_type if is_coded else column.type
        raise ValueError(f"{table.setting}: column {name!r} of {str(table.file)!r} holds {kind}, not text") from error
    texts = [(text or "").strip() for text in texts]
    return ["" if i is None else texts[i] for i in column.indices.to_pylist()] if is_coded else texts
