"""Where the images of a dataset are, whatever names them: lists, a table, a folder, or tar shards.

Letters: N images, in S sets.
"""

import glob
import logging
import os
import re
import tarfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from braceexpand import braceexpand

from dinov2.data.datasets.decode import UnreadableImageError
from dinov2.data.datasets.image_paths import IMAGE_SUFFIXES, PathBlock, is_image_name, read_list, walk_images
from dinov2.data.datasets.tables import PATH_COLUMN, TABLE_SUFFIXES, open_table
from dinov2.data.datasets.tar_shards import ShardIndex, read_member
from dinov2.utils.paths import local_path

logger = logging.getLogger("dinov2")

PATH_COLUMNS = (PATH_COLUMN, "path")
SET_COLUMN = "dataset"
LOOSE_SET = "."  # images in the folder itself, beside the folders that are sets
MEMBER_MARK = ".tar::"  # between a shard and its member in the path of an image
KINDS = (
    "a folder with *.txt lists or one list (one image path per line; scripts/make_patch_lists.py writes one), a .csv "
    "or .parquet file with a column of paths, a folder of images, or .tar shards, not compressed (one, a "
    "folder with some, or a pattern such as cells-{000..015}.tar)"
)


class ImageSource:
    """N images by number: their bytes, their paths, and the sets that they belong to.

    Attributes:
        kind: what was read, for people, as in "3 .txt lists".
        set_names: S names: of lists without the suffix, of a table's column `dataset`, of the folders at the first
            level, or of shards without the suffix and the number at the end.
        set_sizes: int64 [S], images in each; a list may be empty.

    Large arrays are tensors, whose memory spawned workers share.
    """

    def __init__(
        self, names: PathBlock | ShardIndex, folder: str, set_names: Sequence[str], set_ids: np.ndarray, kind: str
    ) -> None:
        """`names` are paths, absolute or relative to `folder`, which is absolute; or what is in shards."""
        self._names, self._folder, self.kind = names, folder, kind
        self.set_names, self._set_ids = list(set_names), torch.from_numpy(set_ids.astype(np.int32))
        self.set_sizes = np.bincount(set_ids, minlength=len(set_names))

    @classmethod
    def from_root(cls, root: str | os.PathLike[str], column: str | None = None) -> "ImageSource":
        """Read lists, tables and shard headers; no image is opened.

        Args:
            root: one of `KINDS`. Of a folder that holds several kinds, lists win, then shards, then images.
            column: of a table, the column with the paths; None: "Image Path", or else "path".

        Raises:
            FileNotFoundError: nothing is at `root`, or nothing that is known.
            ValueError: what is there cannot be read (parquet needs pyarrow), names no image, or has no such column.
        """
        root = str(local_path(root))
        if _is_table(root):
            images = _from_table(Path(root), column)
        elif column is not None:
            raise ValueError(
                f"train.dataset_path: column={column!r} is for a .csv or .parquet file, and root={root!r} is none; "
                f"leave it out"
            )
        else:
            images = _from_folder(Path(root)) if os.path.isdir(root) else _from_files(root)
        if len(images) == 0:
            raise ValueError(f"train.dataset_path: {images.kind} in {root!r} name no image; it must be {KINDS}")
        return images

    def __len__(self) -> int:
        return len(self._names)

    def path(self, position: int) -> str:
        """Return the absolute path of an image; `<shard>.tar::<member>` of one in a shard."""
        return os.path.join(self._folder, self._names[position])  # which leaves an absolute path as it is

    def read(self, position: int) -> bytes:
        """Read the bytes of an image.

        Raises:
            UnreadableImageError: it is missing or cannot be read.
        """
        path, names = self.path(position), self._names
        if isinstance(names, ShardIndex):
            return _read(path, lambda: names.read(position))
        return _read(path, Path(path).read_bytes)

    def file(self, position: int) -> str:
        """Return the absolute path of the file that holds an image, its own or a shard."""
        return self._names.shard(position) if isinstance(self._names, ShardIndex) else self.path(position)

    def stamp(self, position: int) -> tuple[int, int]:
        """Return size in bytes and time of the last change in ns, of the file that holds the image.

        Raises:
            OSError: there is no such file.
        """
        try:
            status = os.stat(self.file(position))
        except ValueError as error:  # a null character in the path
            raise FileNotFoundError(f"{self.path(position)!r}: {error}") from error
        return status.st_size, status.st_mtime_ns

    def set_ids(self) -> np.ndarray:
        """Return the set of every image as a position in `set_names`, int32 [N]."""
        return self._set_ids.numpy()


def read_image(path: str) -> bytes:
    """Read the bytes of the image that an `ImageSource.path` names.

    Raises:
        UnreadableImageError: it is missing or cannot be read.
    """
    shard, mark, member = path.partition(MEMBER_MARK)
    if mark and not os.path.exists(path):
        return _read(path, lambda: read_member(f"{shard}.tar", member))
    return _read(path, Path(path).read_bytes)


def _read(path: str, read: Callable[[], bytes]) -> bytes:
    try:
        return read()
    except OSError as error:
        raise UnreadableImageError(path, error.strerror or str(error)) from error
    except (KeyError, ValueError, tarfile.TarError) as error:  # no such member; a null character in the path
        raise UnreadableImageError(path, str(error.args[0])) from error


def _from_folder(root: Path) -> ImageSource:
    entries = [entry for entry in sorted(root.iterdir()) if not entry.name.startswith(".")]
    lists = [entry for entry in entries if entry.suffix.lower() == ".txt" and entry.is_file()]
    shards = [entry for entry in entries if entry.suffix.lower() == ".tar" and entry.is_file()]
    if lists:
        if shards:
            logger.info("%s holds lists: its %d tar files are not read", root, len(shards))
        return _from_lists(lists)
    loose = sum(is_image_name(entry.name) for entry in entries)
    if shards:
        if loose:
            logger.info("%s holds tar shards: the %d images beside them are not read", root, loose)
        return _from_shards([str(shard) for shard in shards])
    images = _from_tree(root, entries)
    if len(images) == 0:
        tables = [entry.name for entry in entries if _is_table(entry)]
        hint = f"; to read {tables[0]}, give this file" if tables else ""
        raise FileNotFoundError(
            f"train.dataset_path: no *.txt list, no .tar shard and no image ({', '.join(IMAGE_SUFFIXES)}) in "
            f"{str(root)!r}{hint}; root must be {KINDS}"
        )
    return images


def _from_files(root: str) -> ImageSource:
    files = [root] if os.path.exists(root) else _expanded(root)
    if files == [root] and root.lower().endswith(".txt"):
        return _from_lists([Path(root)])
    others = [file for file in files if not file.lower().endswith(".tar")]
    if others:
        raise ValueError(f"train.dataset_path: {others[0]!r} is a file of another kind; it must be {KINDS}")
    return _from_shards(files)


def _from_lists(files: list[Path]) -> ImageSource:
    lists = [read_list(file) for file in files]
    names, ids = _number([file.stem for file in files], [len(paths) for paths in lists])
    kind = f"{len(files)} .txt list{'s' if len(files) > 1 else ''}"
    return ImageSource(PathBlock(chain.from_iterable(lists)), os.path.abspath(files[0].parent), names, ids, kind)


def _is_table(root: str | os.PathLike[str]) -> bool:
    return os.fspath(root).lower().endswith(TABLE_SUFFIXES) and os.path.isfile(root)


def _from_table(file: Path, column: str | None) -> ImageSource:
    table = open_table(file, "train.dataset_path")
    wanted = (column,) if column else PATH_COLUMNS
    column = next((name for name in wanted if name in table.columns), None)
    if column is None:
        raise ValueError(
            f"train.dataset_path: {str(file)!r} has no column {' or '.join(map(repr, wanted))} for the image paths; it "
            f"has {', '.join(map(repr, table.columns)) or 'no columns'}; name the right one with :column=<name>"
        )
    number_of: dict[str, int] = {}
    ids = array("i")

    def read_paths(columns: list[str]) -> Iterator[str]:
        for line, (path, *set_name) in table.rows(*columns):
            if not path:
                raise ValueError(
                    f"train.dataset_path: {str(file)!r}, line {line}: no image path in column {column!r}; fill it in "
                    f"or drop the row"
                )
            ids.append(number_of.setdefault("".join(set_name) or file.stem, len(number_of)))
            yield path

    block = PathBlock(read_paths([column, SET_COLUMN] if SET_COLUMN in table.columns else [column]))
    kind = f"the column {column!r} of {file.name}"
    return ImageSource(block, os.path.abspath(file.parent), list(number_of), np.array(ids, dtype=np.int32), kind)


def _from_tree(root: Path, entries: list[Path]) -> ImageSource:
    """Take images in `root` and the folders inside it; links to folders are followed at the first level only."""
    loose = [os.path.abspath(entry) for entry in entries if is_image_name(entry.name) and not entry.is_dir()]
    found = {entry.name: list(walk_images(os.path.abspath(entry))) for entry in entries if entry.is_dir()}
    found = {name: paths for name, paths in ({LOOSE_SET: loose} | found).items() if paths}
    names, ids = _number(list(found), [len(paths) for paths in found.values()])
    return ImageSource(PathBlock(chain.from_iterable(found.values())), "", names, ids, f"the images in {str(root)!r}")


def _from_shards(shards: list[str]) -> ImageSource:
    index = ShardIndex([os.path.abspath(shard) for shard in shards])
    stems = [os.path.basename(shard)[: -len(".tar")] for shard in shards]
    names, ids = _number([re.sub(r"[-_.]?\d+$", "", stem) or stem for stem in stems], index.counts)
    return ImageSource(index, "", names, ids, f"{len(shards)} tar shard{'s' if len(shards) > 1 else ''}")


def _number(names: Sequence[str], counts: Sequence[int]) -> tuple[list[str], np.ndarray]:
    """Return the names, each once, and the position in these of each image, given how many each name has."""
    once = list(dict.fromkeys(names))
    return once, np.repeat(np.array([once.index(name) for name in names], dtype=np.int32), counts)


def _expanded(pattern: str) -> list[str]:
    """Find the files that a pattern means: in the order of its braces, sorted for wildcards."""
    try:
        texts = list(braceexpand(pattern, escape=False))
    except ValueError as error:
        raise FileNotFoundError(
            f"train.dataset_path: root={pattern!r} does not exist, and lacks a brace as a pattern; it must be {KINDS}"
        ) from error
    found: list[str] = []
    for text in texts:
        files = sorted(glob.glob(text))
        if not files:
            meaning = "" if text == pattern else f" means {text!r}, too, which"
            raise FileNotFoundError(f"train.dataset_path: root={pattern!r}{meaning} does not exist; it must be {KINDS}")
        found += files
    return found
