"""Tables with vectors: parquet files with features of cells, which pandas, DuckDB and embedding-atlas open.

The column `vector`, and perhaps `vector_<kind>` for further kinds of features, has a list of D numbers in each of N
rows; `label`, `patient` and `path` are texts, each column only where it is known. The metadata of the schema, JSON
under the key `dinov2`, says what made the vectors.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.data.datasets.tables import (
    BYTES_PER_ROW,
    ROWS_PER_BATCH,
    Table,
    check_pyarrow,
    is_parquet,
    is_utf8,
    open_table,
    opened_parquet,
    read_table,
    unpacking_limit,
)
from dinov2.utils.files import PathLike, atomic_write

VECTOR_COLUMN = "vector"
TEXT_COLUMNS = ("label", "patient", "path")
METADATA_KEY = "dinov2"


@dataclass(frozen=True)
class VectorTable:
    """N cells of a parquet file, with their vectors."""

    vectors: dict[str, np.ndarray]  # {column: float32 [N, D of this column]}; `VECTOR_COLUMN` is always one
    texts: dict[str, list[str]]  # {column: N texts}, of those of `TEXT_COLUMNS` that the file has
    metadata: dict[str, Any] = field(default_factory=dict)  # what made the vectors

    @property
    def attributes(self) -> dict[str, str]:
        """Return those of the metadata that are texts."""
        return {name: value for name, value in self.metadata.items() if isinstance(value, str)}


def has_vectors(path: Path, setting: str) -> bool:
    """Return True for a parquet file with a column of vectors."""
    return is_parquet(path) and path.is_file() and VECTOR_COLUMN in open_table(path, setting).columns


def write_vectors(path: PathLike, table: VectorTable) -> None:
    """Write a parquet file, which appears at `path` when it is complete: vectors as lists of float32, and texts.

    Raises:
        ValueError: pyarrow is missing, or a text, as the name of an image, is not UTF-8.
    """
    check_pyarrow(f"writing {str(path)!r}", "choose another layout")
    import pyarrow
    from pyarrow import parquet

    for name, texts in table.texts.items():
        if (odd := next((text for text in texts if not is_utf8(text)), None)) is not None:
            raise ValueError(
                f"{str(path)!r}: the {name} {odd!r} is not UTF-8, and parquet holds no other text; rename it, or "
                f"choose another layout"
            )
    fields = [(name, pyarrow.list_(pyarrow.float32())) for name in table.vectors]
    fields += [(name, pyarrow.string()) for name in table.texts]
    schema = pyarrow.schema(fields, metadata={METADATA_KEY: json.dumps(table.metadata)})
    repeated = [name for name in table.texts if name != "path"]
    with (
        atomic_write(path) as stream,
        parquet.ParquetWriter(stream, schema, use_dictionary=repeated) as writer,
    ):
        for start in range(0, len(table.vectors[VECTOR_COLUMN]), ROWS_PER_BATCH):
            rows = slice(start, start + ROWS_PER_BATCH)
            columns = [_as_lists(vectors[rows]) for vectors in table.vectors.values()]
            columns += [pyarrow.array(texts[rows], pyarrow.string()) for texts in table.texts.values()]
            writer.write_batch(pyarrow.record_batch(columns, schema=schema), row_group_size=ROWS_PER_BATCH)


def _as_lists(vectors: np.ndarray) -> Any:
    import pyarrow

    offsets = np.arange(len(vectors) + 1, dtype=np.int32) * vectors.shape[1]
    values = np.ascontiguousarray(vectors, dtype=np.float32).ravel()
    return pyarrow.ListArray.from_arrays(pyarrow.array(offsets, pyarrow.int32()), pyarrow.array(values))


def read_vectors(
    file: Path, setting: str, other_names: Mapping[str, Sequence[str]] | None = None, with_values: bool = True
) -> VectorTable:
    """Read a parquet file with vectors; without values, the vectors are [N, 0]. Errors begin with `setting`."""
    table = open_table(file, setting)
    if not is_parquet(file) or table.columns.count(VECTOR_COLUMN) != 1:
        raise ValueError(
            f"{setting}: {str(file)!r} has no column {VECTOR_COLUMN!r} with a list of numbers in each row; "
            f"extract_features.py --layout parquet writes one"
        )
    texts = {}
    if any(table.first_of((column, *(other_names or {}).get(column, ()))) for column in TEXT_COLUMNS):
        rows = read_table(file, setting, (), TEXT_COLUMNS, other_names)
        texts = {column: [row[column] for row in rows] for column in TEXT_COLUMNS if column in rows[0]}
    limit, too_large = unpacking_limit(table)
    with opened_parquet(file, setting) as opened:
        n_rows, schema = opened.metadata.num_rows, opened.schema_arrow
        if BYTES_PER_ROW * n_rows > limit:
            raise ValueError(too_large)
        further = [name for name in table.columns if name.startswith(f"{VECTOR_COLUMN}_") and _is_list(schema, name)]
        vectors = {
            name: _read_lists(opened, name, table) if with_values else np.zeros((n_rows, 0), np.float32)
            for name in (VECTOR_COLUMN, *further)
        }
        metadata = _metadata(table, schema.metadata or {})
    lengths = {name: len(values) for name, values in {**vectors, **texts}.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{setting}: {str(file)!r} has rows without any text or vector ({lengths}); fill them in")
    return VectorTable(vectors, texts, metadata)


def _metadata(table: Table, of_schema: Mapping[bytes, bytes]) -> dict[str, Any]:
    try:
        values = json.loads(of_schema.get(METADATA_KEY.encode(), b"{}"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{table.setting}: {str(table.file)!r} has metadata {METADATA_KEY!r} that is no JSON ({error}); "
            f"write it again"
        ) from error
    return values if isinstance(values, dict) else {}


def _read_lists(opened: Any, name: str, table: Table) -> np.ndarray:
    """Read a column of lists of numbers of one length, float32 [N, D]."""
    import pyarrow
    from pyarrow import compute

    limit, too_large = unpacking_limit(table)
    wrong = f"{table.setting}: column {name!r} of {str(table.file)!r} must have a list of as many numbers in each row"
    if not _is_list(opened.schema_arrow, name):
        raise ValueError(f"{wrong}; it has {opened.schema_arrow.field(name).type}: write it again")
    parts: list[np.ndarray] = []
    n_bytes = 0
    groups = [opened.metadata.row_group(i) for i in range(opened.num_row_groups)]
    # before the first batch: few repeated numbers take no bytes
    if any(4 * group.column(i).num_values > limit for group in groups for i in range(group.num_columns)):
        raise ValueError(too_large)
    for batch in opened.iter_batches(ROWS_PER_BATCH, columns=[name]):
        batch.validate(full=True)  # a damaged file may point beyond its own values
        lists = batch.column(0)
        values = lists.flatten()
        dims = set(compute.list_value_length(lists).to_pylist()) | {part.shape[1] for part in parts[:1]}
        is_number = pyarrow.types.is_floating(values.type) or pyarrow.types.is_integer(values.type)
        if not is_number or lists.null_count or values.null_count or len(dims) != 1 or dims == {0}:
            raise ValueError(f"{wrong}; it has {lists.type} of {len(dims)} lengths, or gaps: write it again")
        numbers = values.to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
        parts.append(numbers.reshape(len(lists), -1))
        n_bytes += numbers.nbytes
        if n_bytes > limit:
            raise ValueError(too_large)
    if not parts:
        raise ValueError(f"{wrong}; it has no rows: write it again")
    return np.concatenate(parts)


def _is_list(schema: Any, name: str) -> bool:
    import pyarrow

    kinds = (pyarrow.ListType, pyarrow.LargeListType, pyarrow.FixedSizeListType)
    return schema.names.count(name) == 1 and isinstance(schema.field(name).type, kinds)
