"""Images inside uncompressed tar files, such as WebDataset's shards: an index by one scan, then reads by offset.

`wids` reads by index too, but wants a JSON file that lists the shards and their lengths, and reads samples, not files.

Letters: N members that are images.
"""

import logging
import os
import tarfile
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import numpy as np
import torch

from dinov2.data.datasets.image_paths import PathBlock, is_image_name

logger = logging.getLogger("dinov2")


class ShardIndex:
    """The N images in some tar files (absolute paths), in the order of the files."""

    def __init__(self, shards: list[str]) -> None:
        """Read the headers. Raises ValueError if a file is compressed, damaged or no tar file."""
        self.shards = shards
        self._stamps = [_stamp(os.stat(shard)) for shard in shards]
        with ThreadPoolExecutor(8) as pool:  # mostly waits, on a disk behind a network
            scans = list(pool.map(_scan, shards))
        self._names = PathBlock(name for scan in scans for name, _, _ in scan)
        places = [(offset, size) for _, offset, size in chain.from_iterable(scans)]
        self._places = torch.from_numpy(np.array(places, dtype=np.int64).reshape(-1, 2))  # [N, 2]
        self.counts = [len(scan) for scan in scans]
        self._ends = np.cumsum(self.counts).tolist()

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, position: int) -> str:
        return f"{self.shard(position)}::{self._names[position]}"

    def shard(self, position: int) -> str:
        """Return the tar file that holds an image."""
        return self.shards[bisect_right(self._ends, position)]

    def read(self, position: int) -> bytes:
        """Read the bytes of an image. Raises OSError if the shard is gone, or was changed since the scan."""
        offset, size = self._places[position].tolist()
        number = bisect_right(self._ends, position)
        with open(self.shards[number], "rb", buffering=0) as file:
            if _stamp(os.fstat(file.fileno())) != self._stamps[number]:
                raise OSError("the tar file was changed after this run had listed what is in it; start again")
            file.seek(offset)
            return file.read(size)


def read_member(shard: str, name: str) -> bytes:
    """Read one member by its name. Raises OSError or KeyError."""
    with tarfile.open(shard, "r:") as tar:
        member = tar.extractfile(name)
        return member.read() if member else b""


def _scan(shard: str) -> list[tuple[str, int, int]]:
    """Return name, offset and size of each image."""
    try:
        with tarfile.open(shard, "r:") as tar:
            members = [(m.name, m.offset_data, m.size) for m in tar if m.isreg() and not m.issparse()]
            end = tar.offset
    except tarfile.TarError as error:
        raise ValueError(
            f"train.dataset_path: {shard!r} is not a tar file, or is compressed, damaged or truncated ({error}); "
            f"unpack it to a plain .tar, or copy or make it again"
        ) from error
    with open(shard, "rb") as file:
        file.seek(end)
        block = file.read(tarfile.BLOCKSIZE)
    if block.strip(b"\0"):  # where tarfile stops without an error
        raise ValueError(f"train.dataset_path: {shard!r} is damaged at byte {end}; copy or make it again")
    if not block:
        logger.warning("%s ends at byte %d without a tar file's closing blocks; was it cut there?", shard, end)
    return [member for member in members if is_image_name(os.path.basename(member[0]))]


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns
