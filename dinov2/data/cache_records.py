"""The records of the packed cache, and how a worker process fills them.

Letters: n images, S side in pixels.
"""

import hashlib
import multiprocessing
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch

from dinov2.data.datasets.decode import UnreadableImageError, decode_image, resize_image
from dinov2.data.datasets.sources import ImageSource
from dinov2.utils.pool_workers import become_pool_worker

FREE, PACKED, UNREADABLE = range(3)  # status of a record

# 64 bytes, so that no entry crosses a sector of the disk. `size` and `mtime_ns` are the source's when it was read,
# `crc32` is that of key and record, `made` grows from build to build
ENTRY = np.dtype(
    [
        *(("key", "S16"), ("size", "<i8"), ("mtime_ns", "<i8"), ("crc32", "<u4"), ("status", "<u4"), ("made", "<u4")),
        ("unused", "V20"),
    ]
)


def key_of(path: str) -> bytes:
    """Hash a path to 16 bytes."""
    return hashlib.blake2b(path.encode(errors="surrogateescape"), digest_size=16).digest()


def checksum_of(key: bytes, record: bytes) -> int:
    """Return the crc32 of a record and its key."""
    return zlib.crc32(record, zlib.crc32(key.ljust(16, b"\0")))  # numpy takes zeros off the end of a key


class Packer:
    """Decodes images and writes their squares to their records; sent to each worker process once."""

    def __init__(self, source: ImageSource, image_size: int, fit: str, pixels_file: Path) -> None:
        self.source, self.image_size, self.fit, self.pixels_file = source, image_size, fit, pixels_file
        self.record_bytes = image_size * image_size * 3

    def __call__(self, jobs: np.ndarray) -> np.ndarray:
        """Pack images, given their positions and records, int64 [n, 2]; return ENTRY [n]."""
        with open(self.pixels_file, "rb+", buffering=0) as file:
            return np.array([self._pack(file.fileno(), position, row) for position, row in jobs.tolist()], ENTRY)

    def _pack(self, file: int, position: int, row: int) -> tuple[bytes | int, ...]:
        """Write one record and return its entry, which is FREE where the disk did not give the file."""
        try:
            size, mtime_ns = self.source.stamp(position)  # first: the next build sees what changes from here on
            path, data, status = self.source.path(position), self.source.read(position), PACKED
        except (OSError, UnreadableImageError):
            return b"", 0, 0, 0, FREE, 0, b""
        try:
            square = resize_image(decode_image(data, path), self.image_size, self.fit)  # [3, S, S]
            record = square.permute(1, 2, 0).numpy().tobytes()
        except UnreadableImageError as error:
            record = error.reason.encode()[: self.record_bytes].ljust(self.record_bytes, b"\0")
            status = UNREADABLE
        n_written = 0
        while n_written < len(record):  # not through a memory map: on a full disk that ends the process
            n_written += os.pwrite(file, record[n_written:], row * self.record_bytes + n_written)
        return key_of(path), size, mtime_ns, checksum_of(key_of(path), record), status, 0, b""


@contextmanager
def open_pool(packer: Packer, n_workers: int) -> Iterator[Callable[[list[np.ndarray]], Iterable[np.ndarray]]]:
    """Give a `map` of `packer` over worker processes, or over none."""
    if n_workers == 0:
        yield partial(map, packer)
        return
    context = multiprocessing.get_context("forkserver")  # workers have none of this process's threads and GPU
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(n_workers, context, initializer=_begin_worker, initargs=(packer,)) as pool:
        yield partial(pool.map, _pack_in_worker)


_packer: Packer | None = None  # of this worker process


def _begin_worker(packer: Packer) -> None:
    global _packer
    _packer = packer
    become_pool_worker()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


def _pack_in_worker(jobs: np.ndarray) -> np.ndarray:
    assert _packer is not None, "the pool calls _begin_worker first"
    return _packer(jobs)
