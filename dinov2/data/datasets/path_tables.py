"""Picture paths out of .txt lists, CSV and parquet files, kept as one block of bytes.

Letters: N paths.
"""

import csv
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dinov2.data.datasets.cells import PATH_COLUMN

PATH_COLUMNS = (PATH_COLUMN, "path")
SET_COLUMN = "dataset"
ROWS_AT_A_TIME = 65536

_NEWLINE, _COMMENT = b"\n#"
_IS_SPACE = np.zeros(256, dtype=bool)
_IS_SPACE[list(b" \t\n\r\v\f")] = True


class PathBlock:
    """N texts as one block of bytes: a million Python strings would cost every worker some 100 MB.

    The arrays are tensors, so that torch's pickling hands them to a spawned worker as shared memory.
    """

    def __init__(self, data: np.ndarray, ends: np.ndarray) -> None:
        """
        Args:
            data: uint8, the texts one after the other, in UTF-8; bytes of a file name that are none stay as they are.
            ends: int64 [N], where each text ends.
        """
        self._data = torch.from_numpy(data)
        self._bounds = torch.from_numpy(np.concatenate([np.zeros(1, dtype=np.int64), ends]))  # [N + 1]

    @classmethod
    def of(cls, texts: Iterable[str]) -> "PathBlock":
        """The block of some texts, which are taken one at a time."""
        data, ends = bytearray(), array("q")
        for text in texts:
            data += text.encode("utf-8", "surrogateescape")
            ends.append(len(data))
        return cls(np.frombuffer(data, dtype=np.uint8), np.frombuffer(ends, dtype=np.int64))

    @classmethod
    def joined(cls, blocks: Sequence["PathBlock"]) -> "PathBlock":
        """The texts of several blocks, one block after the other."""
        if len(blocks) == 1:
            return blocks[0]
        starts = np.cumsum([0, *(len(block._data) for block in blocks)])
        ends = [block._bounds.numpy()[1:] + start for block, start in zip(blocks, starts[:-1], strict=True)]
        return cls(np.concatenate([block._data.numpy() for block in blocks]), np.concatenate(ends))

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, position: int) -> str:
        # views are made each time: sharing a tensor moves its memory, and would leave an older view behind
        bounds = self._bounds.numpy()
        text = self._data.numpy()[bounds[position] : bounds[position + 1]]
        return text.tobytes().decode("utf-8", "surrogateescape")


class RunLengths:
    """A whole number for each of N positions, kept as its runs: which set, or which shard, a picture belongs to."""

    def __init__(self, values: np.ndarray) -> None:
        """`values`: [N] whole numbers."""
        last_of_run = np.flatnonzero(np.diff(values, append=-1))
        self._ends = torch.from_numpy(last_of_run + 1)  # [number of runs]
        self._values = torch.from_numpy(values[last_of_run].astype(np.int32))

    def __getitem__(self, position: int) -> int:
        return int(self._values[int(np.searchsorted(self._ends.numpy(), position, side="right"))])

    def all(self) -> np.ndarray:
        """int32 [N]."""
        return np.repeat(self._values.numpy(), np.diff(self._ends.numpy(), prepend=0))


def read_list(file: Path) -> PathBlock:
    """The lines of a text file without the spaces around them, but for blank lines and those that begin with `#`.

    Raises:
        ValueError: the file is not UTF-8.
    """
    text = file.read_bytes().removeprefix(b"\xef\xbb\xbf")  # Windows editors put this mark before UTF-8
    try:
        if not text.isascii():
            text.decode()
    except UnicodeDecodeError as error:
        line = text.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"train.dataset_path: {str(file)!r}, line {line}, is not UTF-8 text ({error.reason}); save it as UTF-8"
        ) from error
    if b"\r" in text:
        text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    data = np.frombuffer(text, dtype=np.uint8)
    newlines = np.flatnonzero(data == _NEWLINE)
    starts, ends = np.append(0, newlines + 1), np.append(newlines, len(data))
    _strip(data, starts, ends)
    is_path = starts < ends
    is_path[is_path] = data[starts[is_path]] != _COMMENT
    starts, ends = starts[is_path], ends[is_path]
    # +1 where a kept line begins, -1 behind its end: the running sum is 1 on the bytes to keep
    steps = np.zeros(len(data) + 1, dtype=np.int8)
    steps[starts] += 1
    steps[ends] -= 1
    is_kept = np.cumsum(steps, dtype=np.int8, out=steps)[:-1].view(bool)
    return PathBlock(data[is_kept], np.cumsum(ends - starts))


def _strip(data: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> None:
    """Move `starts` and `ends` of lines past the spaces at either side, in place."""
    for edges, step, offset in ((ends, -1, -1), (starts, 1, 0)):
        lines = np.flatnonzero(starts < ends)
        while len(lines := lines[_IS_SPACE[data[edges[lines] + offset]]]):
            edges[lines] += step
            lines = lines[starts[lines] < ends[lines]]


def read_table(file: Path, column: str | None) -> tuple[PathBlock, list[str], np.ndarray, str]:
    """The paths that a CSV or parquet file names, and the set of each: what its column `dataset` says.

    Args:
        file: with the suffix .csv or .parquet.
        column: the one with the paths; None: "Image Path", or else "path".

    Returns:
        the N paths; names of sets, in the order in which they appear; int32 [N], the set of each path as a position in
        these; and the name of the column with the paths. Without a column `dataset`, or where it is empty, a set is
        named as the file is.

    Raises:
        ValueError: the file cannot be read (parquet needs pyarrow), has no such column, or a row has no path.
    """
    if file.suffix.lower() == ".parquet":
        return _read_parquet(file, column)
    return _read_csv(file, column)


def _path_column(file: Path, columns: Sequence[str], wanted: str | None) -> str:
    for name in (wanted,) if wanted else PATH_COLUMNS:
        if name in columns:
            return name
    missing = f"has no column {wanted!r}" if wanted else f"has no column {' or '.join(map(repr, PATH_COLUMNS))}"
    raise ValueError(
        f"train.dataset_path: {str(file)!r} {missing} for the picture paths; it has "
        f"{', '.join(map(repr, columns)) or 'no columns'}; name the right one with :column=<name>"
    )


def _read_csv(file: Path, wanted: str | None) -> tuple[PathBlock, list[str], np.ndarray, str]:
    ids: dict[str, int] = {}
    sets = array("i")

    def paths(rows: Iterator[list[str]], path_at: int, set_at: int | None) -> Iterator[str]:
        for row in rows:
            path = row[path_at].strip() if path_at < len(row) else ""
            if not path:
                if not any(cell.strip() for cell in row):
                    continue  # a blank line, or the commas that spreadsheets leave at the end
                raise ValueError(
                    f"train.dataset_path: {str(file)!r}, line {reader.line_num}: no picture path; "
                    f"fill it in or drop the row"
                )
            name = row[set_at].strip() if set_at is not None and set_at < len(row) else ""
            sets.append(ids.setdefault(name or file.stem, len(ids)))
            yield path

    try:
        with open(file, encoding="utf-8-sig", newline="") as lines:  # -sig: Excel writes a byte-order mark
            reader = csv.reader(lines, skipinitialspace=True)
            header = [name.strip() for name in next(reader, [])]
            column = _path_column(file, header, wanted)
            set_at = header.index(SET_COLUMN) if SET_COLUMN in header else None
            block = PathBlock.of(paths(reader, header.index(column), set_at))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"train.dataset_path: {str(file)!r} is not UTF-8 text ({error.reason}); save it as CSV UTF-8"
        ) from error
    except csv.Error as error:
        raise ValueError(
            f"train.dataset_path: {str(file)!r}, line {reader.line_num}, is not CSV ({error}); save it as CSV UTF-8"
        ) from error
    return block, list(ids) or [file.stem], np.frombuffer(sets, dtype=np.int32), column


def _read_parquet(file: Path, wanted: str | None) -> tuple[PathBlock, list[str], np.ndarray, str]:
    try:
        import pyarrow
        from pyarrow import compute, parquet
    except ModuleNotFoundError as error:
        raise ValueError(
            f"train.dataset_path: reading {str(file)!r} needs pyarrow (`pip install pyarrow`), or save it as CSV"
        ) from error

    def as_text(batch: Any, name: str) -> Any:
        try:
            return compute.cast(batch.column(name), pyarrow.large_string())
        except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
            raise ValueError(
                f"train.dataset_path: column {name!r} of {str(file)!r} holds {batch.column(name).type}, not text"
            ) from error

    ids: dict[str, int] = {}
    blocks, sets, n_read = [], [], 0
    try:
        with parquet.ParquetFile(file) as table:
            columns = table.schema_arrow.names
            column = _path_column(file, columns, wanted)
            has_sets = SET_COLUMN in columns
            for batch in table.iter_batches(ROWS_AT_A_TIME, columns=[column, SET_COLUMN] if has_sets else [column]):
                paths = compute.fill_null(as_text(batch, column), "")
                # one block of text beside its bounds is what an Arrow array is
                bounds = np.frombuffer(paths.buffers()[1], dtype=np.int64)[paths.offset :][: len(paths) + 1]
                if len(empty := np.flatnonzero(np.diff(bounds) == 0)):
                    raise ValueError(
                        f"train.dataset_path: {str(file)!r}, row {n_read + empty[0] + 1}: no value in column "
                        f"{column!r}; fill it in or drop the row"
                    )
                n_read += len(paths)
                data = np.frombuffer(paths.buffers()[2], dtype=np.uint8)[bounds[0] : bounds[-1]]
                blocks.append(PathBlock(data.copy(), bounds[1:] - bounds[0]))
                names = (
                    compute.fill_null(as_text(batch, SET_COLUMN), "") if has_sets else pyarrow.repeat("", len(paths))
                )
                coded = names.dictionary_encode()
                ids_here = [ids.setdefault(name or file.stem, len(ids)) for name in coded.dictionary.to_pylist()]
                sets.append(np.array(ids_here, dtype=np.int32)[coded.indices.to_numpy()])
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"train.dataset_path: {str(file)!r} cannot be read as parquet: {error}") from error
    if not blocks:
        return PathBlock.of([]), [file.stem], np.zeros(0, dtype=np.int32), column
    return PathBlock.joined(blocks), list(ids), np.concatenate(sets), column
