"""Paths of image files: which names count, how folders and .txt lists name them, and a compact store for millions.

Letters: N paths.
"""

import os
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


def is_image_name(name: str) -> bool:
    """Return True if a file of this name counts as an image: a known suffix, in any case, and not hidden."""
    return not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)


def walk_images(folder: str | os.PathLike[str]) -> Iterator[str]:
    """Yield paths of images in a folder and those inside it, sorted within each; hidden names are left out."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(parent, name) for name in sorted(files) if is_image_name(name))


def find_images(folder: str | os.PathLike[str]) -> list[Path]:
    """Find all images in `folder` and the folders inside it, sorted as a whole."""
    return sorted(map(Path, walk_images(folder)))


class PathBlock:
    """N texts as one block of bytes: a million Python strings would cost every worker some 100 MB.

    The arrays are tensors, so that torch's pickling hands them to a spawned worker as shared memory.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        data, ends = bytearray(), array("q", [0])
        for text in texts:
            data += text.encode("utf-8", "surrogateescape")
            ends.append(len(data))
        self._data = torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())
        self._ends = torch.from_numpy(np.frombuffer(ends, dtype=np.int64).copy())  # [N + 1]

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, position: int) -> str:
        # views are made each time: sharing a tensor moves its memory, and would leave an older view behind
        start, end = self._ends.numpy()[position : position + 2]
        return self._data.numpy()[start:end].tobytes().decode("utf-8", "surrogateescape")


def read_list(file: Path, setting: str = "train.dataset_path") -> list[str]:
    """Read the lines of a text file without the spaces around them, but for blank lines and those that begin with `#`.

    Raises:
        ValueError: the file is not UTF-8.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")  # -sig: Windows editors write a byte-order mark
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{setting}: {str(file)!r}, line {line}, is not UTF-8 text ({error.reason}); save it as UTF-8"
        ) from error
    lines = (line.strip() for line in text.split("\n"))
    return [line for line in lines if line and not line.startswith("#")]
