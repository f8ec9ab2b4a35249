"""Pictures inside uncompressed tar files, such as WebDataset's shards: an index by one scan, then reads by offset.

Letters: N members that are pictures.
"""

import logging
import os
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from dinov2.data.datasets.cells import is_picture_name
from dinov2.data.datasets.decode import UnreadableImageError
from dinov2.data.datasets.path_tables import PathBlock

logger = logging.getLogger("dinov2")

MEMBER_MARK = ".tar::"  # between a shard and its member in the path of a picture

BLOCK = 512  # bytes; headers take one, and what follows is padded to whole ones
N_OPEN_SHARDS = 128
N_SCANS_AT_A_TIME = 8  # mostly waits, on a disk behind a network

_REGULAR = (b"0", b"\0", b"7")
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders
_LONG_NAME, _EXTENDED = b"L", b"x"
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class Member(NamedTuple):
    """Where a regular file lies in a tar file."""

    name: str
    offset: int
    size: int


class ShardIndex:
    """The N pictures in some tar files: names, offsets and sizes, in the order of the files."""

    def __init__(self, shards: list[str]) -> None:
        """Scan the headers of all `shards` (absolute paths).

        Raises:
            ValueError: one is compressed, truncated or no tar file.
        """
        self.shards = shards
        with ThreadPoolExecutor(N_SCANS_AT_A_TIME) as pool:
            scans = list(pool.map(_scan, shards))
        self.names = PathBlock.joined([scan.names for scan in scans])
        self._offsets = torch.from_numpy(np.concatenate([scan.offsets for scan in scans]))  # [N]
        self._sizes = torch.from_numpy(np.concatenate([scan.sizes for scan in scans]))  # [N]
        self.counts = np.array([len(scan.names) for scan in scans])
        self._ends = np.cumsum(self.counts).tolist()  # one a shard
        self._stamps = [scan.stamp for scan in scans]

    def __len__(self) -> int:
        return len(self.names)

    def path(self, position: int) -> str:
        """`<shard>.tar::<member>`."""
        return f"{self.shard(position)}::{self.names[position]}"

    def shard(self, position: int) -> str:
        """The tar file that holds a picture."""
        return self.shards[bisect_right(self._ends, position)]

    def read(self, position: int) -> bytes:
        """The bytes of a picture.

        Raises:
            UnreadableImageError: the shard is gone, or is not the file that was scanned.
        """
        number = bisect_right(self._ends, position)
        try:
            data = _open_shard(self.shards[number], self._stamps[number]).read(
                int(self._offsets[position]), int(self._sizes[position])
            )
        except OSError as error:
            raise UnreadableImageError(self.path(position), error.strerror or str(error)) from error
        return data


class _OpenShard:
    """A file descriptor for reads at offsets, which processes and threads may share."""

    def __init__(self, path: str, stamp: tuple[int, int]) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)  # closed when nobody refers to this object any more
        if _stamp_of(os.fstat(self._descriptor)) != stamp:
            raise OSError(None, "the tar file was changed after this run had listed what is in it; start again")

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self._descriptor, size, offset)  # fewer bytes, from a cut file, do not decode


@lru_cache(N_OPEN_SHARDS)
def _open_shard(path: str, stamp: tuple[int, int]) -> _OpenShard:
    return _OpenShard(path, stamp)


def _stamp_of(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


class _Scan(NamedTuple):
    names: PathBlock
    offsets: np.ndarray  # int64 [N]
    sizes: np.ndarray  # int64 [N]
    stamp: tuple[int, int]


def _scan(shard: str) -> _Scan:
    offsets, sizes = array("q"), array("q")

    def names() -> Iterator[str]:
        for member in members_of(shard):
            if is_picture_name(os.path.basename(member.name)):
                offsets.append(member.offset)
                sizes.append(member.size)
                yield member.name

    stamp = _stamp_of(os.stat(shard))
    block = PathBlock.of(names())
    return _Scan(block, np.frombuffer(offsets, dtype=np.int64), np.frombuffer(sizes, dtype=np.int64), stamp)


def read_member(shard: str, name: str) -> bytes:
    """The bytes of one member, by a search through the headers.

    Raises:
        OSError, ValueError: the shard cannot be read, or there is no such member.
    """
    for member in members_of(shard):
        if member.name == name:
            with open(shard, "rb") as file:
                file.seek(member.offset)
                return file.read(member.size)
    raise ValueError(f"no member {name!r} in {shard!r}")


def members_of(shard: str) -> Iterator[Member]:
    """The regular files in a tar file, in order.

    Python's tarfile makes an object for every member and keeps it: four times slower, and a gigabyte for a million.
    Read here are the formats ustar, GNU and pax, as in POSIX.1-2017, `pax`; sparse files are passed over.

    Raises:
        ValueError: the file is compressed, truncated or no tar file.
    """
    with open(shard, "rb", buffering=0) as file:
        descriptor, length = file.fileno(), os.fstat(file.fileno()).st_size
        position = 0
        long_name: str | None = None
        stated: dict[str, str] = {}  # by an extended header, for the member that comes next
        while True:
            header = os.pread(descriptor, BLOCK, position)
            if not header.strip(b"\0"):
                if len(header) < BLOCK:
                    _check_end(shard, position, length)
                return
            kind, size = header[156:157], _checked_size(shard, header, position)
            start = position + BLOCK
            if "size" in stated and kind in _REGULAR:
                size = int(stated["size"])
            if kind in _WITHOUT_DATA:
                size = 0
            position = start + -(-size // BLOCK) * BLOCK
            if start + size > length:
                raise ValueError(
                    f"train.dataset_path: {shard!r} is truncated: a member of {size} bytes begins at byte {start} of "
                    f"{length}; copy or make it again"
                )
            if kind == _LONG_NAME:
                long_name = _text(os.pread(descriptor, size, start))
                continue
            if kind == _EXTENDED:
                stated = _extended(os.pread(descriptor, size, start), shard)
                continue
            if kind in _REGULAR:
                name = stated.get("path") or long_name or _name(header)
                if not name.endswith("/"):  # old archives mark folders so
                    yield Member(name, start, size)
            if kind not in (b"K", b"g"):  # a long link name and global settings do not end what belongs to the next
                long_name, stated = None, {}


def _check_end(shard: str, position: int, length: int) -> None:
    """Called where the file ends without the two empty blocks that close a tar file."""
    if position == 0:
        raise ValueError(f"train.dataset_path: {shard!r} is empty, not a tar file; copy or make it again")
    logger.warning("%s ends at byte %d without a tar file's closing blocks; was it cut there?", shard, length)


def _checked_size(shard: str, header: bytes, position: int) -> int:
    """The size that a header states, once it has been seen to be one."""
    try:
        if len(header) < BLOCK:
            raise ValueError
        # old archives have no mark, only a checksum; that of a million headers takes as long as all the rest
        if header[257:262] != b"ustar" and _stated_checksum(header) != sum(header) - sum(header[148:156]) + 8 * 32:
            raise ValueError
        if header[124] & 0x80:  # sizes from 8 GiB on are binary
            return int.from_bytes(header[125:136], "big")
        return int(header[124:136].strip(b" \0") or b"0", 8)
    except ValueError:
        pass
    compression = next((name for mark, name in _COMPRESSED.items() if header.startswith(mark)), None)
    if position == 0 and compression:
        raise ValueError(
            f"train.dataset_path: {shard!r} is compressed ({compression}), and pictures are read from anywhere in a "
            f"shard; unpack it to a plain .tar"
        )
    if position == 0:
        raise ValueError(f"train.dataset_path: {shard!r} is not a tar file; copy or make it again")
    raise ValueError(
        f"train.dataset_path: {shard!r} is damaged or truncated: no tar header at byte {position}; copy or make it "
        f"again"
    )


def _stated_checksum(header: bytes) -> int:
    """The sum of a header's bytes, where those of the checksum itself count as spaces."""
    return int(header[148:156].strip(b" \0") or b"0", 8)


def _name(header: bytes) -> str:
    name = _text(header[:100])
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(data: bytes) -> str:
    return data.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _extended(data: bytes, shard: str) -> dict[str, str]:
    """The records `<length> <key>=<value>\\n` of an extended header."""
    found = {}
    while data.strip(b"\0"):
        digits = data.partition(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        if not len(digits) < length <= len(data):
            raise ValueError(f"train.dataset_path: {shard!r} has a damaged pax header; copy or make it again")
        key, _, value = data[len(digits) + 1 : length].removesuffix(b"\n").partition(b"=")
        found[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        data = data[length:]
    return found
