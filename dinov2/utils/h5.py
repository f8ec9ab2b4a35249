"""Read datasets of HDF5 files, each checked before memory is taken, and write texts.

Files are opened without locks, which network file systems may lack. No reader sees a half-written file: writers rename
a file when it is complete.
"""

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import h5py
import numpy as np

from dinov2.utils.command import ADVICE
from dinov2.utils.files import PathLike, check_regular_file, local_path

MOST_COMPRESSED = 100  # bytes that are declared for each byte of compressed data; features reach about 3
SMALL = 2**26  # bytes that compressed data may declare in any case


@contextmanager
def open_h5(path: PathLike, setting: str) -> Iterator[h5py.File]:
    """Open a file, or the download of a URL, for reading; errors within the block get its name.

    Raises:
        ValueError: HDF5 cannot read the file, or a check of the functions below fails.
        FileNotFoundError, PermissionError: as of `check_regular_file`.
        OSError: the disk fails.
    """
    local = check_regular_file(local_path(path), setting)
    try:
        with h5py.File(local, "r", locking=False) as file:
            yield file
    except (OSError, RuntimeError, KeyError, TypeError, OverflowError, UnicodeError) as error:
        if isinstance(error, OSError) and error.errno in ADVICE:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        what = f"{str(path)!r} is not an HDF5 file or is damaged ({error})"
        raise ValueError(f"{setting}: {what}; extract again") from error
    except ValueError as error:
        raise ValueError(f"{setting}: {str(path)!r} {error}; extract again") from error


def read_numbers(file: h5py.File, name: str, dims: tuple[int, ...], kinds: str = "fiu") -> np.ndarray:
    """Read numbers of one of these dimensions; `kinds` are those of numpy: f floats, i and u integers."""
    dataset = checked_dataset(file, name, dims)
    if dataset.dtype.kind not in kinds:
        what = "numbers" if "f" in kinds else "integers"
        raise ValueError(f"has a dataset {name} of type {dataset.dtype} instead of {what}")
    return dataset[:]


def read_texts(file: h5py.File, name: str) -> list[str]:
    """Read a list of texts; bytes that are no UTF-8, as in some file names, become surrogates as in `os.fsdecode`."""
    dataset = checked_dataset(file, name, (1,))
    if h5py.check_string_dtype(dataset.dtype) is None:
        raise ValueError(f"has a dataset {name} of type {dataset.dtype} instead of text")
    return dataset.asstr("utf-8", errors="surrogateescape")[:].tolist()


def write_texts(file: h5py.File, name: str, texts: Iterable[str]) -> None:
    """Write a list of texts as `read_texts` reads it."""
    encoded = [str.encode(text, errors="surrogateescape") for text in texts]
    file.create_dataset(name, data=np.array(encoded, dtype=object), dtype=h5py.string_dtype())


def write_attribute(file: h5py.File, name: str, text: str) -> None:
    """Write a text as an attribute, which h5py reads with surrogates, too."""
    encoded = np.array(text.encode(errors="surrogateescape"), dtype=object)
    file.attrs.create(name, encoded, dtype=h5py.string_dtype())


def checked_dataset(file: h5py.File, name: str, dims: tuple[int, ...]) -> h5py.Dataset:
    """Return a dataset of this file with one of these dimensions, whose values were all written.

    A damaged or malicious file may declare far more values than it has bytes, or name other files as storage.
    """
    if name not in file:
        raise ValueError(f"has no dataset {name}")
    is_own = file.get(name, getclass=True, getlink=True) is h5py.HardLink
    dataset = file[name] if is_own else None
    if not isinstance(dataset, h5py.Dataset) or dataset.external or dataset.is_virtual:
        raise ValueError(f"has a group or a link to elsewhere as {name}, not a dataset with values")
    if dataset.shape is None or dataset.ndim not in dims:
        shape = "no shape" if dataset.shape is None else f"shape {list(dataset.shape)}"
        raise ValueError(f"has a dataset {name} of {shape}; {' or '.join(map(str, dims))} dimension(s) are expected")
    declared = math.prod(dataset.shape) * dataset.id.get_type().get_size()
    stored = min(dataset.id.get_storage_size(), os.path.getsize(file.filename))
    if dataset.id.get_create_plist().get_nfilters():
        n_chunks = math.prod(math.ceil(n / chunk) for n, chunk in zip(dataset.shape, dataset.chunks, strict=True))
        is_whole = declared <= max(SMALL, MOST_COMPRESSED * stored) and dataset.id.get_num_chunks() >= n_chunks
    else:
        is_whole = declared <= stored
    if not is_whole:
        raise ValueError(
            f"declares {declared:,} bytes as {name} and stores {stored:,}, so that values were never written"
        )
    return dataset
