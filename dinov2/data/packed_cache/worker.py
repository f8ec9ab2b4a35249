"""What a worker process of a build does: read, decode, resize, and write pixels to their rows."""

import multiprocessing
import os
import zlib
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch

from dinov2.data.datasets.decode import UnreadableImageError, decode_image, resize_image
from dinov2.data.packed_cache.pictures import GONE, PictureSource, stamp_of
from dinov2.data.packed_cache.shards import UNREADABLE
from dinov2.utils.pool_workers import become_pool_worker

# The stamp kept for a picture that the file system did not give, though its file is there: no file has it, so the next
# build tries again
RETRY = (-2, -2)


class PackedPicture(NamedTuple):
    """What became of one picture; `reason` is empty if its pixels are in its row, `stamp` GONE if its file vanished."""

    position: int
    row: int
    stamp: tuple[int, int]
    crc32: int
    reason: str


class Batch(NamedTuple):
    """Pictures for one worker.

    Attributes:
        file: gets the pixels, uint8 [rows, S, S, 3].
        jobs: position of each picture and its row.
    """

    file: Path
    jobs: list[tuple[int, int]]


def pixels_of(pictures: PictureSource, i: int, image_size: int, fit: str) -> np.ndarray:
    """uint8 [S, S, 3] as they are without a cache. Raises UnreadableImageError."""
    image = resize_image(decode_image(pictures.read(i), pictures.path(i)), image_size, fit)  # [3, S, S]
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy())


def pack_batch(pictures: PictureSource, image_size: int, fit: str, batch: Batch) -> list[PackedPicture]:
    """Write the rows of a batch.

    Raises:
        OSError: the file cannot be written.
    """
    packed = []
    row_bytes = image_size * image_size * 3
    handle = os.open(batch.file, os.O_WRONLY | os.O_CLOEXEC)
    try:
        for position, row in batch.jobs:
            # before reading: of a file that changes in between, the old stamp is kept, and the next build sees it
            stamp = stamp_of(pictures, position)
            try:
                pixels = pixels_of(pictures, position, image_size, fit)
            except UnreadableImageError as error:
                if stamp != GONE and isinstance(error.__cause__, OSError) and error.__cause__.errno is not None:
                    stamp = RETRY
                packed.append(PackedPicture(position, UNREADABLE, stamp, 0, error.reason))
                continue
            _write(handle, pixels, row * row_bytes)
            packed.append(PackedPicture(position, row, stamp, zlib.crc32(pixels.data), ""))
    finally:
        os.close(handle)
    return packed


def _write(handle: int, pixels: np.ndarray, offset: int) -> None:
    # not through a memory map: there, a full disk ends the process
    data = pixels.data.cast("B")
    while data:
        n = os.pwrite(handle, data, offset)
        data, offset = data[n:], offset + n


class Workers:
    """Some processes that pack batches, or none: then it is done at once, here."""

    def __init__(self, pictures: PictureSource, image_size: int, fit: str, n_workers: int) -> None:
        self._pool: Executor | None = None
        self._here = partial(pack_batch, pictures, image_size, fit)
        if n_workers:
            # a server that has imported the libraries forks the workers: of this process they get no thread, no lock
            # and no GPU, and each starts in milliseconds
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["__main__", __name__])
            self._pool = ProcessPoolExecutor(
                n_workers, context, initializer=_begin, initargs=(pictures, image_size, fit)
            )

    def submit(self, batch: Batch) -> "Future[list[PackedPicture]]":
        if self._pool is not None:
            return self._pool.submit(_pack_in_worker, batch)
        future: Future[list[PackedPicture]] = Future()
        future.set_result(self._here(batch))
        return future

    def close(self) -> None:
        """Give up what has not begun, wait for what has."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


_of_this_process: tuple[PictureSource, int, str] | None = None


def _begin(pictures: PictureSource, image_size: int, fit: str) -> None:
    global _of_this_process
    _of_this_process = pictures, image_size, fit
    become_pool_worker()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


def _pack_in_worker(batch: Batch) -> list[PackedPicture]:
    assert _of_this_process is not None, "the pool calls _begin before any batch"
    return pack_batch(*_of_this_process, batch)
