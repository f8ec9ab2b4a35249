"""Find the images of a dataset, whatever names them: lists, a table, a folder, or tar shards.

Shards are uncompressed tar files, such as WebDataset's: one scan makes an index, then images are read by offset.
(`wids` also reads by index, but needs a JSON file with the lengths of the shards, and returns samples, not files.)

Letters: N images, in S sets.
"""

import glob
import hashlib
import logging
import os
import re
import tarfile
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from braceexpand import braceexpand

from dinov2.data.datasets.decode import KNOWN_SUFFIXES, UnreadableImageError, is_image_name, read_file, walk_images
from dinov2.data.datasets.tables import PATH_COLUMNS, SET_COLUMN, TABLE_SUFFIXES, open_table, read_list
from dinov2.utils.files import check_regular_file, local_path

logger = logging.getLogger("dinov2")

NO_VALUE = -1  # in the place of a value's number, for an image without value
LOOSE_SET = "."  # the set of images that lie in the root folder itself
MAX_SHARDS = 100_000
MEMBER_MARK = ".tar::"  # between a shard and its member in the path of an image
KINDS = (
    "a folder with *.txt lists or one list (one image path per line; scripts/make_patch_lists.py writes one), a .csv "
    "or .parquet file with a column of paths, a folder of images, or .tar shards, not compressed (one, a "
    "folder with some, or a pattern such as cells-{000..015}.tar)"
)


class PathBlock:
    """N texts in one block of bytes: a million Python strings would take 100 MB in every worker.

    The arrays are tensors, so that torch passes them to a spawned worker as shared memory.
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

    def sha256(self) -> str:
        """Return the SHA-256 of the texts in their order."""
        return hashlib.sha256(self._data.numpy().tobytes() + self._ends.numpy().tobytes()).hexdigest()

    def __getitem__(self, position: int) -> str:
        # sharing a tensor moves its memory, so an older NumPy view would be stale: make one each time
        start, end = self._ends.numpy()[position : position + 2]
        return self._data.numpy()[start:end].tobytes().decode("utf-8", "surrogateescape")


class Metadata:
    """A value that a column gives each of N images, or gives none."""

    def __init__(self, column: str, values: Sequence[str]) -> None:
        """Number the distinct `values` [N] in their sorted order; an empty text is no value."""
        self.column, self.names = column, sorted({value for value in values if value})
        number_of = {name: i for i, name in enumerate(self.names)}
        # a tensor, whose memory spawned workers share
        self._ids = torch.tensor([number_of.get(value, NO_VALUE) for value in values], dtype=torch.int32)

    def __getitem__(self, position: int) -> int:
        """Return the position in `names` of an image's value, or NO_VALUE."""
        return int(self._ids[position])

    def fingerprint(self) -> str:
        """Return the name of the column and a checksum of its values, in words."""
        digest = hashlib.sha256("\0".join(self.names).encode() + self._ids.numpy().tobytes()).hexdigest()
        return f"column {self.column} sha256 {digest[:16]}"

    def describe(self) -> str:
        """Count the values, in words."""
        n_without = int((self._ids == NO_VALUE).sum())
        return f"{len(self.names):,} values of {self.column}" + f", {n_without:,} images without" * bool(n_without)


class ImageSource:
    """N images by position: their bytes, their paths, and the sets that they belong to.

    `set_names` are S names: of lists without the suffix, of a table's column `dataset`, of the folders at the first
    level, or of shards without the suffix and the number at the end. `set_sizes` is int64 [S]; a list may be empty.
    `metadata` has the values of a column, if one was asked for.
    """

    metadata: Metadata | None = None

    def __init__(self, names: PathBlock, folder: str, set_names: Sequence[str], set_ids: np.ndarray, kind: str) -> None:
        """`names` are paths, absolute or relative to the absolute `folder`; `kind` says what was read, in words."""
        self._names, self._folder, self.kind = names, folder, kind
        # a tensor, whose memory spawned workers share
        self.set_names, self._set_ids = list(set_names), torch.from_numpy(set_ids.astype(np.int32))
        self.set_sizes = np.bincount(set_ids, minlength=len(set_names))

    @classmethod
    def from_root(
        cls, root: str | os.PathLike[str], column: str | None = None, metadata: str | None = None
    ) -> "ImageSource":
        """Read lists, tables and shard headers at `root`, one of `KINDS`; no image is opened.

        If a folder holds several kinds, lists come first, then shards, then images. `column` is a table's column with
        the paths; by default "Image Path", or else "path". `metadata` is a table's column with a value of each image;
        lists, folders and shards have one column, "dataset", with the name of each image's set.
        """
        root = str(local_path(root))
        if _is_table(root):
            images = _from_table(Path(root), column, metadata)
        elif column is not None:
            raise ValueError(
                f"train.dataset_path: column={column!r} is for a .csv or .parquet file, and root={root!r} is none; "
                f"leave it out"
            )
        else:
            images = _from_folder(Path(root)) if os.path.isdir(root) else _from_files(root)
        if len(images) == 0:
            raise ValueError(f"train.dataset_path: {images.kind} in {root!r} name no image; it must be {KINDS}")
        if metadata is not None and images.metadata is None:
            if metadata != SET_COLUMN:
                raise ValueError(
                    f"train.metadata.column: {images.kind} in {root!r} have no column {metadata!r}, but only "
                    f"{SET_COLUMN!r}, the name of an image's list, folder or shard; name this one, or train from a "
                    f".csv or .parquet file with the column"
                )
            images.metadata = Metadata(metadata, [images.set_names[i] for i in images.set_ids()])
        if images.metadata is not None and len(images.metadata.names) < 2:
            raise ValueError(
                f"train.metadata.column: {metadata!r} has {len(images.metadata.names)} value(s) in {images.kind}, so "
                f"there is nothing to tell apart; name another column, or null for none"
            )
        return images

    def __len__(self) -> int:
        return len(self._names)

    def fingerprint(self) -> str:
        """Return the number of images and a checksum of their names, in words; the images are not read."""
        text = f"{len(self):,} images, names sha256 {self._names.sha256()[:16]}"
        return text if self.metadata is None else f"{text}, {self.metadata.fingerprint()}"

    def path(self, position: int) -> str:
        """Return the absolute path of an image; `<shard>.tar::<member>` for one in a shard."""
        return os.path.join(self._folder, self._names[position])  # join keeps an absolute path as it is

    def read(self, position: int) -> bytes:
        """Read the bytes of an image; raise an UnreadableImageError if that fails."""
        return read_file(self.path(position))

    def file(self, position: int) -> str:
        """Return the absolute path of the file that holds an image: its own, or a shard."""
        return self.path(position)

    def stamp(self, position: int) -> tuple[int, int]:
        """Return the size in bytes and the time of the last change in ns of the file that holds an image."""
        try:
            return _stamp(os.stat(self.file(position)))
        except ValueError as error:  # a null character in the path
            raise FileNotFoundError(f"{self.path(position)!r}: {error}") from error

    def set_ids(self) -> np.ndarray:
        """Return the set of every image as a position in `set_names`, int32 [N]."""
        return self._set_ids.numpy()


class ShardSource(ImageSource):
    """The images in tar files, in the order of the files."""

    def __init__(self, shards: Sequence[str]) -> None:
        self._shards = [os.path.abspath(shard) for shard in shards]
        self._stamps = [_stamp(os.stat(shard)) for shard in self._shards]
        with ThreadPoolExecutor(8) as pool:  # a network disk answers slowly
            scans = list(pool.map(_scan_shard, self._shards))
        counts = [len(scan) for scan in scans]
        self._ends = np.cumsum(counts).tolist()
        places = [(offset, size) for _, offset, size in chain.from_iterable(scans)]
        self._places = torch.from_numpy(np.array(places, dtype=np.int64).reshape(-1, 2))  # [N, 2]
        stems = [os.path.basename(shard)[: -len(".tar")] for shard in shards]
        names, ids = _number([re.sub(r"[-_.]?\d+$", "", stem) or stem for stem in stems], counts)
        members = PathBlock(name for scan in scans for name, _, _ in scan)
        super().__init__(members, "", names, ids, f"{len(shards)} tar shard{'s' if len(shards) > 1 else ''}")

    def path(self, position: int) -> str:
        return f"{self.file(position)}::{self._names[position]}"

    def file(self, position: int) -> str:
        return self._shards[bisect_right(self._ends, position)]

    def read(self, position: int) -> bytes:
        shard, stamp = self.file(position), self._stamps[bisect_right(self._ends, position)]
        offset, size = self._places[position].tolist()
        return _read_member(shard, self.path(position), (offset, size), stamp)


def read_image(path: str) -> bytes:
    """Read the bytes of an image, given a path as `ImageSource.path` returns it; see `ImageSource.read`."""
    shard, mark, name = path.partition(MEMBER_MARK)
    if not mark or os.path.exists(path):
        return read_file(path)
    try:
        places = {member: (offset, size) for member, offset, size in _scan_shard(f"{shard}.tar")}
    except (OSError, ValueError) as error:
        raise UnreadableImageError(path, str(error)) from error
    if name not in places:
        raise UnreadableImageError(path, f"{name!r} not found in the tar file")
    return _read_member(f"{shard}.tar", path, places[name])


def _read_member(shard: str, path: str, place: tuple[int, int], stamp: tuple[int, int] | None = None) -> bytes:
    """Read an image at (offset, size) of a tar file, unless it lacks this stamp and so was changed since its scan."""
    offset, size = place
    try:
        with open(shard, "rb", buffering=0) as file:
            if stamp not in (None, _stamp(os.fstat(file.fileno()))):
                raise UnreadableImageError(
                    path, "the tar file was changed after this run had listed what is in it; start again"
                )
            file.seek(offset)
            return file.read(size)
    except OSError as error:
        raise UnreadableImageError(path, error.strerror or str(error)) from error


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _from_folder(root: Path) -> ImageSource:
    entries = [entry for entry in sorted(root.iterdir()) if not entry.name.startswith(".")]
    lists, shards = ([e for e in entries if e.suffix.lower() == suffix and e.is_file()] for suffix in (".txt", ".tar"))
    if lists:
        if shards:
            logger.info("%s holds lists: its %d tar files are not read", root, len(shards))
        return _from_lists(lists)
    n_loose = sum(is_image_name(entry.name) for entry in entries)
    if shards:
        if n_loose:
            logger.info("%s holds tar shards: the %d images beside them are not read", root, n_loose)
        return ShardSource([str(shard) for shard in shards])
    images = _from_tree(root)
    if len(images) == 0:
        tables = [entry.name for entry in entries if _is_table(entry)]
        hint = f"; to read {tables[0]}, give this file" if tables else ""
        raise FileNotFoundError(
            f"train.dataset_path: no *.txt list, no .tar shard and no image ({KNOWN_SUFFIXES}) in "
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
    return ShardSource(files)


def _from_lists(files: list[Path]) -> ImageSource:
    lists = [read_list(file) for file in files]
    names, ids = _number([file.stem for file in files], [len(paths) for paths in lists])
    kind = f"{len(files)} .txt list{'s' if len(files) > 1 else ''}"
    return ImageSource(PathBlock(chain.from_iterable(lists)), os.path.abspath(files[0].parent), names, ids, kind)


def _is_table(root: str | os.PathLike[str]) -> bool:
    return os.fspath(root).lower().endswith(TABLE_SUFFIXES) and os.path.isfile(root)


def _from_table(file: Path, column: str | None, metadata: str | None) -> ImageSource:
    table = open_table(file, "train.dataset_path")
    names = (column,) if column else PATH_COLUMNS
    path_column = table.first_of(names)
    if path_column is None:
        raise ValueError(
            f"train.dataset_path: {str(file)!r} has no column {' or '.join(map(repr, names))} for the image paths; it "
            f"has {', '.join(map(repr, table.columns)) or 'no columns'}; name the right one with :column=<name>"
        )
    if metadata is not None and metadata not in table.columns:
        raise ValueError(
            f"train.metadata.column: {str(file)!r} has no column {metadata!r}; it has "
            f"{', '.join(map(repr, table.columns))}"
        )
    number_of: dict[str, int] = {}
    ids = array("i")
    values: list[str] = []
    columns = list(dict.fromkeys([path_column, *({SET_COLUMN} & {*table.columns}), *filter(None, [metadata])]))

    def read_paths() -> Iterator[str]:
        for line, row in table.rows(*columns):
            cells = dict(zip(columns, row, strict=True))
            path = cells[path_column]
            if not path:
                raise ValueError(
                    f"train.dataset_path: {str(file)!r}, line {line}: no image path in column {path_column!r}; fill it "
                    f"in or drop the row"
                )
            ids.append(number_of.setdefault(cells.get(SET_COLUMN) or file.stem, len(number_of)))
            if metadata is not None:
                values.append(cells[metadata])
            yield path

    block = PathBlock(read_paths())
    kind = f"the column {path_column!r} of {file.name}"
    images = ImageSource(block, os.path.abspath(file.parent), list(number_of), np.array(ids, dtype=np.int32), kind)
    images.metadata = None if metadata is None else Metadata(metadata, values)
    return images


def _from_tree(root: Path) -> ImageSource:
    """Take the images in `root` and its subfolders; those of a folder at the first level are a set."""
    folder, counts = os.path.abspath(root), Counter[str]()

    def read_paths() -> Iterator[str]:
        for path in walk_images(folder):
            relative = os.path.relpath(path, folder)
            inner, _, is_inner = relative.partition(os.sep)
            counts[inner if is_inner else LOOSE_SET] += 1
            yield relative

    paths = PathBlock(read_paths())
    names, ids = _number(list(counts), list(counts.values()))
    return ImageSource(paths, folder, names, ids, f"the images in {str(root)!r}")


def _number(names: Sequence[str], counts: Sequence[int]) -> tuple[list[str], np.ndarray]:
    """Return the distinct names, and the position in them of each image, given how many images each name has."""
    distinct = list(dict.fromkeys(names))
    return distinct, np.repeat(np.array([distinct.index(name) for name in names], dtype=np.int32), counts)


def _expanded(pattern: str) -> list[str]:
    """Return the files that match a pattern: in the order of its braces, sorted for wildcards."""
    ranges = re.findall(r"\{(-?\d+)\.\.(-?\d+)", pattern)
    try:
        is_large = any(abs(int(end) - int(start)) > MAX_SHARDS for start, end in ranges)
        texts = [] if is_large else list(islice(braceexpand(pattern, escape=False), MAX_SHARDS + 1))
    except (ValueError, RecursionError) as error:
        raise FileNotFoundError(
            f"train.dataset_path: root={pattern!r} does not exist, and lacks a brace as a pattern; it must be {KINDS}"
        ) from error
    if is_large or len(texts) > MAX_SHARDS:
        raise ValueError(
            f"train.dataset_path: root={pattern[:200]!r} means more than {MAX_SHARDS:,} files; correct the numbers in "
            f"its braces, or give a folder of .tar shards"
        )
    matches: list[str] = []
    for text in texts:
        files = sorted(glob.glob(text))
        if not files:
            meaning = "" if text == pattern else f" means {text!r}, too, which"
            raise FileNotFoundError(f"train.dataset_path: root={pattern!r}{meaning} does not exist; it must be {KINDS}")
        matches += files
    return matches


def _scan_shard(shard: str) -> list[tuple[str, int, int]]:
    """Return the name, offset and size of each image in a tar file; the file is not unpacked."""
    members, n_others = [], 0
    try:
        with tarfile.open(check_regular_file(shard, "train.dataset_path"), "r:") as tar:
            for member in tar:
                if member.size < 0 or tar.offset <= member.offset:  # would be read for ever
                    raise tarfile.ReadError(f"{member.name[:80]!r} has {member.size} bytes")
                if not is_image_name(os.path.basename(member.name)):
                    continue
                if member.isreg() and not member.issparse():
                    members.append((member.name, member.offset_data, member.size))
                else:
                    n_others += 1
            end = tar.offset
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"train.dataset_path: {shard!r} is not a tar file, or is compressed, damaged or truncated ({error}); "
            f"unpack it to a plain .tar, or copy or make it again"
        ) from error
    if n_others:
        logger.warning("%s: %d images that are links, folders or sparse files are left out", shard, n_others)
    with open(shard, "rb") as file:
        file.seek(end)
        block = file.read(tarfile.BLOCKSIZE)
    if block.strip(b"\0"):  # where tarfile stops without an error
        raise ValueError(f"train.dataset_path: {shard!r} is damaged at byte {end}; copy or make it again")
    if not block:
        logger.warning("%s ends at byte %d without a tar file's closing blocks; was it cut there?", shard, end)
    return members
