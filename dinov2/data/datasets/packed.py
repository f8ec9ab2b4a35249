"""Unpack files that hold images and labels: MedMNIST's .npz, and parquet or Arrow files of Hugging Face data sets.

All other code reads an image from a file of its own: features store its path, copies are found by its bytes. So such a
file is unpacked once, into a folder of images with a table `cells.csv`, in torch.hub's folder or where the caller says.
The name of the folder has the checksum of the packed files, so another version of them is another folder.

Letters: N images of a part, H height, W width.
"""

import hashlib
import io
import json
import logging
import re
import shutil
import uuid
import zipfile
import zlib
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import cv2
import numpy as np
import pandas as pd
from PIL import Image

from dinov2.data.datasets.decode import DAMAGE, FORMATS, IMAGE_SUFFIXES, walk_images
from dinov2.data.datasets.tables import (
    LABEL_COLUMN,
    MAX_BYTES,
    MAX_BYTES_PER_BYTE,
    PART_COLUMN,
    PATH_COLUMN,
    PATH_COLUMNS,
    PATIENT_COLUMN,
    check_encoding,
    open_table,
    opened_parquet,
)
from dinov2.utils.command import progress_bar
from dinov2.utils.files import (
    atomic_write,
    cache_folder,
    check_regular_file,
    file_sha256,
    lock_if_possible,
    name_in_errors,
)
from dinov2.utils.resources import size_text

logger = logging.getLogger("dinov2")

CELLS_FILE = "cells.csv"  # of an unpacked folder
ARROW_SUFFIXES = (".parquet", ".arrow")
IMAGE_COLUMN, HUB_LABEL_COLUMN = "image", "label"  # of Hugging Face data sets
MEDMNIST_CLASSES = {  # {beginning of the file's name: classes}; BloodMNIST has Acevedo's
    "bloodmnist": (
        *("basophil", "eosinophil", "erythroblast", "ig", "lymphocyte", "monocyte", "neutrophil", "platelet"),
    ),
}
PART_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
MAX_SIDE_PX = 8192
ROWS_PER_BATCH = 64  # of images
NPZ_DAMAGE = (zipfile.BadZipFile, zlib.error, ValueError, EOFError, NotImplementedError, RuntimeError, OSError)


class PackedImage(NamedTuple):
    """An image in a packed file."""

    data: bytes  # of an image file
    suffix: str  # of its format
    label: str | None = None
    patient: str | None = None
    part: str | None = None  # of the official split: train, val or test


def unpacked_table(path: Path, setting: str) -> Path | None:
    """Unpack a file, or a folder of Hugging Face files and no images, and return the table; None for anything else.

    A file is packed if it is .npz or .arrow, or parquet with a column `image` and none of paths.
    """
    if path.is_dir() and next(walk_images(path), None) is None:
        files = [file for suffix in ARROW_SUFFIXES for file in path.glob(f"**/[!.]*{suffix}")]
        # the library `datasets` leaves cache-* behind
        files = sorted(file for file in files if not file.name.startswith("cache-") and _is_packed(file, setting))
    else:
        files = [path] if _is_packed(path, setting) else []
    return unpack(files, setting) if files else None


def _is_packed(path: Path, setting: str) -> bool:
    if not path.is_file() or path.suffix.lower() not in (".npz", *ARROW_SUFFIXES):
        return False
    if path.suffix.lower() != ".parquet":
        return True
    table = open_table(path, setting)
    return IMAGE_COLUMN in table.columns and table.first_of(PATH_COLUMNS) is None


def unpack(files: Sequence[Path], setting: str, folder: Path | None = None) -> Path:
    """Unpack the images of files, unless that was done before, and return their table.

    The table has the columns `Image Path`, and `Label`, `patient` and `part` where all images have these. It can be
    read as labelled cells, and as a split if there are parts.

    Args:
        files: of one data set, such as the shards of its parts; each part's name is that of the file or its folder.
        setting: the first words of errors.
        folder: in which the folder of this data set is made; None for one beside torch.hub's downloads.

    Raises:
        ValueError: a file is damaged, unpacks to far more than its size, or holds something else.
    """
    for file in files:
        check_regular_file(file, setting)
        with closing(_rows(file, setting)) as rows:
            next(rows, None)  # a large file of another kind is refused before its checksum is computed
    digests = "".join(file_sha256(file) for file in files)
    name = f"{files[0].stem}-{hashlib.sha256(digests.encode()).hexdigest()[:16]}"
    target = (folder or cache_folder().parent / "unpacked") / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with lock_if_possible(target.with_name(f".{name}.lock")) as is_locked:
        if not (target / CELLS_FILE).is_file():  # no other process has unpacked it meanwhile
            temporary = target.with_name(f".{name}{'' if is_locked else uuid.uuid4().hex[:8]}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
            try:
                _write_images((row for file in files for row in _rows(file, setting)), temporary, files[0], setting)
                temporary.replace(target)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            logger.info("%s: its images were unpacked into %s", files[0], target)
    return target / CELLS_FILE


def _write_images(images: Iterator[PackedImage], folder: Path, file: Path, setting: str) -> None:
    rows = []
    for number, image in enumerate(progress_bar(images, "unpacking", unit=" images")):
        path = f"{image.part or 'images'}/{number:07d}{image.suffix}"
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        with name_in_errors(folder / path):
            (folder / path).write_bytes(image.data)
        rows.append((path, image.label, image.patient, image.part))
    columns = [PATH_COLUMN, LABEL_COLUMN, PATIENT_COLUMN, PART_COLUMN]
    table = pd.DataFrame(rows, columns=columns, dtype=object).dropna(axis="columns", how="all")
    if table.empty:
        raise ValueError(f"{setting}: {str(file)!r} holds no image; give another file")
    gaps = [name for name in table.columns if table[name].isna().any()]
    if gaps:
        row = int(table[gaps[0]].isna().to_numpy().argmax()) + 1
        raise ValueError(
            f"{setting}: {str(file)!r}: image {row} has no {gaps[0]}, and others have one; fill it in or drop the row"
        )
    with atomic_write(folder / CELLS_FILE, "w") as stream:
        table.to_csv(stream, index=False, lineterminator="\n")


def _rows(file: Path, setting: str) -> Generator[PackedImage, None, None]:
    is_npz = file.suffix.lower() == ".npz"
    try:
        yield from _npz_rows(file) if is_npz else _arrow_rows(file, setting)
    except NPZ_DAMAGE as error:
        if str(error).startswith(setting):
            raise
        kind = "a MedMNIST file" if is_npz else "a table of images"
        raise ValueError(
            f"{setting}: {str(file)!r} cannot be read as {kind}: {error}; download or write it again"
        ) from error


# --- MedMNIST -------------------------------------------------------------------------------------------------------


def _npz_rows(file: Path) -> Iterator[PackedImage]:
    """Yield the images of `<part>_images`, uint8 [N, H, W] or [N, H, W, 3], one by one, with `<part>_labels`."""
    names = next((names for start, names in MEDMNIST_CLASSES.items() if file.name.lower().startswith(start)), None)
    with zipfile.ZipFile(file) as archive:
        arrays = set(archive.namelist())
        parts = [part for part in ("train", "val", "test") if f"{part}_images.npy" in arrays]
        if not parts:
            raise ValueError(f"it has no array train_images, but {', '.join(sorted(arrays)[:8]) or 'nothing'}")
        limit = MAX_BYTES + MAX_BYTES_PER_BYTE * file.stat().st_size
        if sum(member.file_size for member in archive.infolist()) > limit:
            raise ValueError(f"it unpacks to more than {size_text(limit)}, as no images do")
        for part in parts:
            with _opened_array(archive, f"{part}_images") as (stream, shape, dtype):
                sides = shape[1:3]
                if dtype != np.uint8 or len(shape) not in (3, 4) or shape[3:] not in ((), (3,)):
                    raise ValueError(
                        f"{part}_images is {dtype} {list(shape)}; expected uint8 [N, H, W] or [N, H, W, 3]"
                    )
                if not all(1 <= side <= MAX_SIDE_PX for side in sides):
                    raise ValueError(f"{part}_images has images of {sides}; expected up to {MAX_SIDE_PX} pixels")
                labels = _npz_labels(archive, part, shape[0])
                for label in labels:
                    if names is not None and not 0 <= label < len(names):
                        raise ValueError(f"{part}_labels has {label}; expected 0 to {len(names) - 1}")
                    pixels = np.frombuffer(_read_all(stream, int(np.prod(shape[1:]))), np.uint8).reshape(shape[1:])
                    data = cv2.imencode(".png", pixels if pixels.ndim == 2 else pixels[..., ::-1])[1].tobytes()
                    yield PackedImage(data, ".png", str(label) if names is None else names[label], None, part)


def _npz_labels(archive: zipfile.ZipFile, part: str, n_images: int) -> list[int]:
    if f"{part}_labels.npy" not in archive.namelist():
        raise ValueError(f"it has no array {part}_labels")
    with _opened_array(archive, f"{part}_labels") as (stream, shape, dtype):
        if dtype.kind not in "iu" or shape not in ((n_images,), (n_images, 1)):
            raise ValueError(f"{part}_labels is {dtype} {list(shape)}; expected {n_images} integers, one an image")
        return np.frombuffer(_read_all(stream, n_images * dtype.itemsize), dtype).tolist()


@contextmanager
def _opened_array(archive: zipfile.ZipFile, name: str) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype]]:
    """Yield the stream after an array's header, its shape and type; its values are not read."""
    with archive.open(f"{name}.npy") as stream:
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(np.lib.format.read_magic(stream))
        if read_header is None:
            raise ValueError(f"{name} has another version of NumPy's format")
        shape, is_by_column, dtype = read_header(stream)
        if is_by_column or not shape or dtype.hasobject:
            raise ValueError(f"{name} is stored column by column, or holds no numbers")
        yield stream, shape, dtype


def _read_all(stream: IO[bytes], n_bytes: int) -> bytes:
    data = stream.read(n_bytes)
    if len(data) < n_bytes:
        raise ValueError("an array ends too early")
    return data


# --- Hugging Face ---------------------------------------------------------------------------------------------------


def _arrow_rows(file: Path, setting: str) -> Iterator[PackedImage]:
    """Yield the images of a column `image`, structs {bytes, path} or bytes, with `label` (a number or a text)."""
    words = [word for name in (file.name, file.parent.name) for word in re.split("[^a-z]+", name.lower())]
    part = next((PART_NAMES[word] for word in words if word in PART_NAMES), None)
    limit = MAX_BYTES + MAX_BYTES_PER_BYTE * file.stat().st_size
    n_bytes = row = 0
    with _opened_batches(file, setting) as (schema, batches):
        if IMAGE_COLUMN not in schema.names:
            raise ValueError(f"it has no column {IMAGE_COLUMN!r}, but {', '.join(schema.names) or 'none'}")
        class_names = _class_names(schema)
        for batch in batches:
            batch.validate(full=True)  # a damaged file may point beyond its own values
            values = {
                name: batch.column(name).to_pylist()
                for name in (IMAGE_COLUMN, HUB_LABEL_COLUMN, PATIENT_COLUMN)
                if name in schema.names
            }
            for i, image in enumerate(values[IMAGE_COLUMN]):
                row += 1
                data = image.get("bytes") if isinstance(image, dict) else image
                if not isinstance(data, bytes):
                    raise ValueError(f"row {row} has no bytes of an image in the column {IMAGE_COLUMN!r}")
                n_bytes += len(data)
                if n_bytes > limit:
                    raise ValueError(f"it unpacks to more than {size_text(limit)}, as no images do")
                label = _label(values[HUB_LABEL_COLUMN][i], class_names, row) if HUB_LABEL_COLUMN in values else None
                patient = values[PATIENT_COLUMN][i] if PATIENT_COLUMN in values else None
                for text in (label, patient):
                    check_encoding(str(text or ""), file, row, setting)
                yield PackedImage(data, _suffix(data), label, None if patient is None else str(patient), part)


@contextmanager
def _opened_batches(file: Path, setting: str) -> Iterator[tuple[Any, Iterator[Any]]]:
    """Yield the schema and the batches of a parquet or Arrow file."""
    if file.suffix.lower() == ".parquet":
        with opened_parquet(file, setting) as opened:
            columns = [IMAGE_COLUMN, HUB_LABEL_COLUMN, PATIENT_COLUMN]
            columns = [name for name in columns if name in opened.schema_arrow.names]
            yield opened.schema_arrow, opened.iter_batches(ROWS_PER_BATCH, columns=columns)
        return
    try:
        import pyarrow
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{setting}: reading {str(file)!r} needs pyarrow (`pip install pyarrow`), or save the images as files"
        ) from error
    try:
        with pyarrow.OSFile(str(file)) as source:
            if source.read(6) == b"ARROW1":  # the format of files; `datasets` writes streams
                reader = pyarrow.ipc.open_file(source)
                yield reader.schema, (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                source.seek(0)
                reader = pyarrow.ipc.open_stream(source)
                yield reader.schema, iter(reader)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{setting}: {str(file)!r} cannot be read as an Arrow file: {error}") from error


def _class_names(schema: Any) -> list[str]:
    """Return the names of the classes that a Hugging Face data set records; empty if it records none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[HUB_LABEL_COLUMN]["names"]]
    except (KeyError, TypeError, ValueError, RecursionError):
        return []


def _label(value: Any, class_names: Sequence[str], row: int) -> str:
    if isinstance(value, int) and class_names:
        if not 0 <= value < len(class_names):
            raise ValueError(f"row {row} has the label {value}; expected 0 to {len(class_names) - 1}")
        return class_names[value]
    if isinstance(value, int | str) and str(value).strip():
        return str(value).strip()
    raise ValueError(f"row {row} has the label {value!r}; expected a number or a text")


def _suffix(data: bytes) -> str:
    """Return the suffix of an image's format; .png for what is none, which reading the image will tell."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            suffix = {"JPEG": ".jpg", "TIFF": ".tif"}.get(image.format or "", f".{(image.format or 'png').lower()}")
    except DAMAGE:
        return ".png"
    return suffix if suffix in IMAGE_SUFFIXES else ".png"
