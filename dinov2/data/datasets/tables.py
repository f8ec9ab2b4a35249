"""Read tables (CSV and parquet) and .txt lists; no other module of the package reads such files.

A CSV may have any usual delimiter, and a byte-order mark or none. Values are text without surrounding spaces, and are
not converted: "007" is not 7.
"""

import csv
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATH_COLUMN, LABEL_COLUMN, PATIENT_COLUMN, SET_COLUMN = "Image Path", "Label", "patient", "dataset"
PATH_COLUMNS = (PATH_COLUMN, "path")  # the first of these that a table has names its images
TABLE_SUFFIXES = (".csv", ".parquet")
DELIMITERS = ",;\t|"
ROWS_PER_BATCH = 65536  # of parquet


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
        if _is_parquet(self.file):
            yield from _parquet_rows(self.file, self.setting, names)
            return
        places = [self.columns.index(name) for name in names]
        for number, (line, row) in enumerate(_csv_rows(self.file, self.setting)):
            if number:
                yield line, [row[place].strip() if place < len(row) else "" for place in places]

    def records(self) -> Iterator[tuple[int, dict[str, str]]]:
        """Yield (line, {column: value}) of each row."""
        for line, values in self.rows():
            yield line, dict(zip(self.columns, values, strict=True))


def open_table(file: Path, setting: str) -> Table:
    """Read the names of a table's columns, none for an empty file; parquet needs pyarrow."""
    if not file.is_file():
        raise FileNotFoundError(f"{setting}: no file {str(file)!r}; give a CSV or parquet file")
    if _is_parquet(file):
        with _opened_parquet(file, setting) as opened:
            return Table(file, setting, opened.schema_arrow.names)
    _, header = next(_csv_rows(file, setting), (1, []))
    return Table(file, setting, [name.strip() for name in header])


def read_table(
    file: Path,
    setting: str,
    required: Sequence[str],
    optional: Sequence[str] = (),
    other_names: Mapping[str, Sequence[str]] | None = None,
) -> list[dict[str, str]]:
    """Read {column: value} of each row of a table, at least one, for the required and optional columns.

    Each row needs a value in all of these that the table has. `other_names` are {column: further names that it may have
    in the file}; errors begin with `setting`.
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
        if gaps:
            raise ValueError(
                f"{setting}: {str(file)!r}, line {line}: no value for {', '.join(map(repr, gaps))}; fill it in or "
                f"drop the row"
            )
        rows.append(row)
    if not rows:
        raise ValueError(f"{setting}: {str(file)!r} has no rows under its first line; add some")
    return rows


def read_list(file: Path, setting: str = "train.dataset_path") -> list[str]:
    """Read the lines of a text file without surrounding spaces, except blank ones and those that begin with `#`."""
    try:
        text = file.read_text(encoding="utf-8-sig")  # -sig: Windows editors write a byte-order mark
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{setting}: {str(file)!r}, line {line}, is not UTF-8 text ({error.reason}); save it as UTF-8"
        ) from error
    lines = (line.strip() for line in text.split("\n"))
    return [line for line in lines if line and not line.startswith("#")]


def is_folder(path: Path, setting: str, expected: str) -> bool:
    """Return True for a folder, False for a table; raise FileNotFoundError or ValueError for anything else."""
    if not path.exists():
        raise FileNotFoundError(f"{setting}: {str(path)!r} does not exist; give {expected}")
    if not path.is_dir() and path.suffix.lower() not in TABLE_SUFFIXES:
        raise ValueError(f"{setting}: {str(path)!r} is neither a folder nor a .csv or .parquet file; give {expected}")
    return path.is_dir()


def check_files_exist(files: Sequence[Path], table: Path, setting: str, things: str) -> None:
    """Raise FileNotFoundError unless all files that a table names exist."""
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{setting}: {len(missing)} of the {len(files)} {things} in {str(table)!r} do not exist, for instance "
            f"{', '.join(missing[:3])}; relative paths count from {str(table.parent.absolute())!r}"
        )


def _is_parquet(file: Path) -> bool:
    return file.suffix.lower() == ".parquet"


def _csv_rows(file: Path, setting: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (line, values) of the header and of each row that is not empty."""
    line = 0
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:  # -sig: Excel writes a byte-order mark
            header = re.sub('"[^"]*"', "", stream.readline())
            stream.seek(0)
            reader = csv.reader(stream, delimiter=max(DELIMITERS, key=header.count), skipinitialspace=True)
            for row in reader:
                line = reader.line_num
                if any(map(str.strip, row)):  # spreadsheets leave lines of delimiters at the end
                    yield line, row
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{setting}: {str(file)!r} is not UTF-8 text ({error.reason}); save it as CSV UTF-8"
        ) from error
    except csv.Error as error:
        raise ValueError(
            f"{setting}: {str(file)!r}, line {line + 1}, is not CSV ({error}); save it as CSV UTF-8"
        ) from error


@contextmanager
def _opened_parquet(file: Path, setting: str) -> Iterator[Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{setting}: reading {str(file)!r} needs pyarrow (`pip install pyarrow`), or save it as CSV"
        ) from error
    try:
        with parquet.ParquetFile(file) as opened:
            yield opened
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{setting}: {str(file)!r} cannot be read as parquet: {error}") from error


def _parquet_rows(file: Path, setting: str, names: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield (row, values); numbers become text."""
    with _opened_parquet(file, setting) as opened:
        import pyarrow
        from pyarrow import compute

        row = 0
        for batch in opened.iter_batches(ROWS_PER_BATCH, columns=list(names)):
            texts = []
            for name in names:
                try:
                    texts.append(compute.cast(batch.column(name), pyarrow.large_string()).to_pylist())
                except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
                    raise ValueError(
                        f"{setting}: column {name!r} of {str(file)!r} holds {batch.column(name).type}, not text"
                    ) from error
            for values in zip(*texts, strict=True):
                row += 1
                yield row, [(value or "").strip() for value in values]
