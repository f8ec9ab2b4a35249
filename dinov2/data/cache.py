"""Pack images, decoded and resized once, as uint8 squares into a memory-mapped file: the packed cache.

<folder>/224-crop-v2/   one for each side in pixels and fit; v2 is the version of layout and pixels. That of the
                        central 0.65 of the shorter side is 224-crop-0.65-v2
    pixels.bin          uint8 [R, S, S, 3], a record per image; that of an unreadable image holds the reason as text
    entries.bin         ENTRY [R], each appended after its record is on the disk
    lock                held during a build

The next build writes records without an entry again. An image whose source changed gets a new record, and the last
record of a path is the valid one, so a running training always reads the same pixels.

Letters: N images of the dataset, R records, S side in pixels.
"""

import hashlib
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from itertools import islice, takewhile
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import numpy as np

from dinov2.data.datasets.decode import UnreadableImageError, decode_image, resize_image
from dinov2.data.datasets.sources import ImageSource
from dinov2.distributed import all_gather_objects, on_main_process
from dinov2.utils.command import progress_bar
from dinov2.utils.files import user_path
from dinov2.utils.resources import available_cores, parallel_map, size_text

logger = logging.getLogger("dinov2")

VERSION = 2  # raise it when the layout changes, or when decode_image or resize_image give other pixels
IMAGES_PER_ROUND = 2048  # between two writes of entries: the most that a killed build loses
WAIT_SECONDS = 5.0  # between two attempts to take another build's lock
IMAGES_PER_JOB = 32  # of a worker process
MIN_IMAGES_PER_WORKER = 256  # decoding fewer takes less time than starting a process
FREE, PACKED, UNREADABLE = range(3)  # status of a record
NO_STAMP = (-1, -1)  # of a source without a file, or of an image that the next build tries again
# 64 bytes, so that no entry crosses a disk sector; size and time are the source's, crc32 is of key and record
ENTRY = np.dtype(
    [("key", "S16"), ("size", "<i8"), ("mtime_ns", "<i8"), ("crc32", "<u4"), ("status", "<u4"), ("unused", "V24")]
)
ShouldStop = Callable[[], bool]


class Plan(NamedTuple):
    """The work of a build; positions in the dataset, each path once."""

    n_images: int
    n_there: int
    todo: np.ndarray  # positions that are missing, or were packed from a source that changed later
    missing: dict[bytes, str]  # {key: reason} of images without a source file; their records stay
    bytes_needed: int
    bytes_free: int

    def __str__(self) -> str:
        return (
            f"{self.n_images:,} images, {len(self.todo):,} to pack, {len(self.missing):,} without a file; "
            f"{size_text(self.bytes_needed)} needed, {size_text(self.bytes_free)} free"
        )


class Summary(NamedTuple):
    """The result of a build, with (path, reason) of a few unreadable images; incomplete if it was stopped."""

    n_images: int
    n_there: int
    n_packed: int
    n_unreadable: int
    examples: list[tuple[str, str]]
    is_complete: bool

    def __str__(self) -> str:
        text = (
            f"{self.n_images:,} images: {self.n_there:,} were there, {self.n_packed:,} packed now, "
            f"{self.n_unreadable:,} unreadable{'' if self.is_complete else '; stopped, the same command goes on'}"
        )
        return "\n".join([text, *(f"  unreadable: {path}: {reason}" for path, reason in self.examples)])


class PackedCache:
    """The squares of a dataset's images. A pickled copy, as a worker gets, can `fetch` but not build."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        source: ImageSource,
        image_size: int,
        fit: str = "crop",
        center_crop: float = 1.0,
    ) -> None:
        """Open the cache, which may not exist yet; `folder` may hold other datasets, sizes, fits and crops too."""
        self.source, self.image_size, self.fit, self.center_crop = source, image_size, fit, float(center_crop)
        self.record_bytes = image_size * image_size * 3
        squares = f"{image_size}-{fit}" if center_crop == 1 else f"{image_size}-{fit}-{self.center_crop}"
        self.folder = user_path(folder).absolute() / f"{squares}-v{VERSION}"
        self.pixels_file, self.entries_file = self.folder / "pixels.bin", self.folder / "entries.bin"
        self._lock = filelock.FileLock(self.folder / "lock", mode=0o666)
        paths = (source.path(i).encode(errors="surrogateescape") for i in range(len(source)))
        self._keys = np.array([hashlib.blake2b(path, digest_size=16).digest() for path in paths], "S16")
        self._first = np.sort(np.unique(self._keys, return_index=True)[1])  # the first position of each path
        self._open()

    def _open(self) -> None:
        """Read the entries: the record of each image, -1 for none, and the reasons of the unreadable ones."""
        self._pixels: np.ndarray | None = None
        self._entries = np.empty(0, ENTRY)
        if self.entries_file.is_file() and self.pixels_file.is_file():
            entries = np.fromfile(self.entries_file, ENTRY)
            n_records = self.pixels_file.stat().st_size // self.record_bytes
            if n_records < len(entries):
                logger.warning("packed cache: %s lacks %d records", self.pixels_file, len(entries) - n_records)
            self._entries = entries[:n_records]
        used = np.flatnonzero(np.isin(self._entries["status"], (PACKED, UNREADABLE)))  # else free, or damaged
        row_of = dict(zip(self._entries["key"][used].tolist(), used.tolist(), strict=True))  # the last of each key
        self._rows = np.array([row_of.get(key, -1) for key in self._keys.tolist()], dtype=np.int32)  # [N]
        statuses = np.append(self._entries["status"], FREE)[self._rows]  # row -1 is the appended one
        bad = np.flatnonzero(statuses == UNREADABLE).tolist()
        self._reasons = {i: self._read_record(self._rows[i]).rstrip(b"\0").decode(errors="replace") for i in bad}

    def _read_record(self, row: int) -> bytes:
        return np.fromfile(self.pixels_file, np.uint8, self.record_bytes, offset=int(row) * self.record_bytes).tobytes()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | dict.fromkeys(("_pixels", "_keys", "_first", "_entries", "_lock"))

    def fetch(self, i: int) -> np.ndarray:
        """Return image i, uint8 [S, S, 3], as a read-only view of the file; fail for an unreadable one."""
        if i in self._reasons:
            raise UnreadableImageError(self.source.path(i), self._reasons[i])
        if self._rows[i] < 0:
            raise KeyError(
                f"packed cache: {self.source.path(i)!r} is not in {str(self.folder)!r}; run scripts/pack_dataset.py"
            )
        if self._pixels is None:
            n_records = self.pixels_file.stat().st_size // self.record_bytes
            if n_records <= self._rows.max():
                raise FileNotFoundError(f"packed cache: {str(self.pixels_file)!r} was cut while in use; start again")
            shape = (n_records, self.image_size, self.image_size, 3)
            self._pixels = np.asarray(np.memmap(self.pixels_file, np.uint8, "r", shape=shape))
        return np.asarray(self._pixels[self._rows[i]])

    def plan(self, should_stop: ShouldStop = lambda: False) -> Plan:
        """Compare the sources with the packed records; nothing is written. Incomplete if `should_stop` returns True."""
        missing: dict[bytes, str] = {}

        def read_stamp(i: int) -> tuple[int, int]:
            try:
                return NO_STAMP if should_stop() else self.source.stamp(i)
            except OSError as error:
                missing[self._keys[i]] = error.strerror or str(error)
                return NO_STAMP

        with ThreadPool(16) as pool:  # a network file system answers slowly, but many requests at once
            stamps = np.array(pool.map(read_stamp, self._first.tolist(), 1024), dtype=np.int64).reshape(-1, 2)
        entries = np.append(self._entries, np.zeros(1, ENTRY))[self._rows[self._first]]  # row -1 is the empty one
        is_there, is_packed = stamps[:, 0] >= 0, entries["status"] != FREE
        is_packed &= is_there & (entries["size"] == stamps[:, 0]) & (entries["mtime_ns"] == stamps[:, 1])
        todo = self._first[is_there & ~is_packed]
        disk = next(parent for parent in (self.folder, *self.folder.parents) if parent.is_dir())
        bytes_needed, bytes_free = len(todo) * (self.record_bytes + ENTRY.itemsize), shutil.disk_usage(disk).free
        return Plan(len(self._first), int(is_packed.sum()), todo, missing, bytes_needed, bytes_free)

    def build(self, n_workers: int | None = None, *, should_stop: ShouldStop = lambda: False) -> Summary:
        """Pack missing and changed images, and open the result; a second build waits for the first.

        In a process group all ranks call this together, and rank 0 packs for all, with `n_workers` processes (0 or 1:
        this one; None: one for each core). `should_stop` is called regularly on all ranks; a stopped build keeps the
        packed images.
        """
        is_stopped = False
        rounds = self._build(n_workers, lambda: is_stopped or should_stop())
        while (outcome := on_main_process(partial(next, rounds))) is None:
            is_stopped = any(all_gather_objects(should_stop()))  # a signal to one rank stops all
        plan, n_packed, is_complete = outcome
        self._open()
        self._reasons |= {i: plan.missing[key] for i, key in enumerate(self._keys) if key in plan.missing}
        bad = [i for i in self._first.tolist() if i in self._reasons]
        examples = [(self.source.path(i), self._reasons[i]) for i in bad[:5]]
        summary = Summary(plan.n_images, plan.n_there, n_packed, len(bad), examples, is_complete)
        logger.info("packed cache %s: %s", self.folder, summary)
        return summary

    def _build(self, n_workers: int | None, should_stop: ShouldStop) -> Iterator[Any]:
        """Build on rank 0; yield None after each round, and last (plan, number of packed images, is complete)."""
        self._open()
        plan, n_packed = self.plan(should_stop), 0
        logger.info("packed cache %s: %s", self.folder, plan)
        while len(plan.todo) and not should_stop():
            if plan.bytes_needed > plan.bytes_free:
                raise ValueError(
                    f"packed cache: {len(plan.todo):,} images of {self.image_size} x {self.image_size} pixels need "
                    f"{size_text(plan.bytes_needed)} in {str(self.folder)!r}, and {size_text(plan.bytes_free)} are "
                    f"free there; make room, choose a folder on another disk, or a smaller image_size"
                )
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with self._lock.acquire(timeout=WAIT_SECONDS):
                    self._open()  # another build may have packed some
                    plan = self.plan(should_stop)
                    for n in self._pack(plan.todo, n_workers, should_stop):
                        n_packed += n
                        yield None
                    break
            except filelock.Timeout:
                logger.info("packed cache: another process builds in %s; waiting for it", self.folder)
                yield None
            except ValueError:
                if not should_stop():  # a signal to all processes may end workers that are just starting
                    raise
            except OSError as error:
                raise ValueError(
                    f"packed cache: cannot write to {str(self.folder)!r}: {error.strerror or error}; what was packed "
                    f"stays: make room, get write access, or choose another folder, and start the same command again"
                ) from error
        yield plan, n_packed, not should_stop()

    def _pack(self, todo: np.ndarray, n_workers: int | None, should_stop: ShouldStop) -> Iterator[int]:
        """Pack images in rounds; after each, with its entries on the disk, yield the number of decoded images."""
        n_workers = min(available_cores(), 1 + len(todo) // MIN_IMAGES_PER_WORKER) if n_workers is None else n_workers
        row = len(self._entries)
        jobs = list(zip(todo.tolist(), range(row, row + len(todo)), self._keys[todo].tolist(), strict=True))
        with open(self.entries_file, "ab") as entries_file, open(self.pixels_file, "ab") as pixels_file:
            entries_file.truncate(row * ENTRY.itemsize)  # first, so that no old entry gets a new record
            pixels_file.truncate((row + len(todo)) * self.record_bytes)
        with closing(parallel_map(self._pack_image, jobs, n_workers, IMAGES_PER_JOB)) as packed:
            rest = takewhile(lambda _: not should_stop(), progress_bar(packed, "packing", len(jobs)))
            while batch := list(islice(rest, IMAGES_PER_ROUND)):
                with open(self.pixels_file, "rb+") as file:
                    os.fsync(file.fileno())  # before their entries are written
                entries = np.array(batch, ENTRY)
                _write(self.entries_file, row * ENTRY.itemsize, entries.tobytes())
                row += len(entries)
                yield int((entries["status"] == PACKED).sum())

    def _pack_image(self, job: tuple[int, int, bytes]) -> tuple[bytes | int, ...]:
        """Write the record of an image and return its entry; `job` is (position, row, key)."""
        position, row, key = job
        path, stamp, status = self.source.path(position), NO_STAMP, PACKED
        try:
            stamp_before = self.source.stamp(position)  # before reading, so that the next build notices a change
            data = self.source.read(position)
            stamp = stamp_before  # after a read error it stays NO_STAMP, and the next build tries again
            square = resize_image(decode_image(data, path), self.image_size, self.fit, self.center_crop)  # [3, S, S]
            record = square.permute(1, 2, 0).numpy().tobytes()
        except (OSError, UnreadableImageError) as error:
            reason = error.reason if isinstance(error, UnreadableImageError) else error.strerror or str(error)
            status, record = UNREADABLE, reason.encode()[: self.record_bytes].ljust(self.record_bytes, b"\0")
        _write(self.pixels_file, row * self.record_bytes, record)
        return key, *stamp, _checksum(key, record), status, b""

    def verify(self, should_stop: ShouldStop = lambda: False) -> tuple[int, list[str]]:
        """Check all records, also of other datasets; return their number, and the names of the damaged ones.

        The entries of damaged records are cleared, so that the next build packs these images again.
        """
        n_checked, damaged = 0, []
        used = np.flatnonzero(self._entries["status"] != FREE).tolist()
        for row in takewhile(lambda _: not should_stop(), progress_bar(used, "checking")):
            n_checked += 1
            if _checksum(self._entries[row]["key"], self._read_record(row)) != self._entries[row]["crc32"]:
                damaged.append(row)
        position_of = dict(zip(self._rows.tolist(), range(len(self._rows)), strict=True))
        names = [self.source.path(position_of[row]) if row in position_of else f"record {row}" for row in damaged]
        if damaged:
            logger.warning("packed cache %s: damaged: %s", self.folder, ", ".join(names[:5]))
            with self._lock:
                for row in damaged:
                    _write(self.entries_file, row * ENTRY.itemsize, bytes(ENTRY.itemsize))
            self._open()
        return n_checked, names


def _checksum(key: bytes, record: bytes) -> int:
    return zlib.crc32(record, zlib.crc32(key.ljust(16, b"\0")))  # numpy strips zeros from the end of a key


def _write(file: Path, start: int, data: bytes) -> None:
    with open(file, "rb+") as opened:  # not through a memory map, which ends the process on a full disk
        opened.seek(start)
        opened.write(data)
