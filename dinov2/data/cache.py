"""The packed cache: images decoded and resized once, kept as uint8 squares in a memory-mapped file.

<folder>/224-crop-v2/   one for each side in pixels and fit; v2 is the version of layout and pixels
    pixels.bin          uint8 [R, S, S, 3], a record per image; that of an unreadable image holds the reason as text
    entries.bin         ENTRY [R], each written after its record is on the disk
    lock                held by the build that runs

A record without an entry is free, and the next build uses it. An image whose source changed gets another record, and
the latest record of a path counts: what a running training reads never changes.

Letters: N images of the dataset, R records, S side in pixels.
"""

import errno
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import filelock
import numpy as np
from tqdm import tqdm

from dinov2.data.cache_records import ENTRY, FREE, PACKED, UNREADABLE, Packer, checksum_of, key_of, open_pool
from dinov2.data.datasets.decode import UnreadableImageError, check_fit
from dinov2.data.datasets.sources import ImageSource
from dinov2.distributed import all_gather_objects, get_rank, get_world_size, on_main_process, read_launch
from dinov2.utils.cores import available_cores

logger = logging.getLogger("dinov2")

VERSION = 2  # raise it when the layout changes, or when decode_image or resize_image give other pixels
IMAGES_PER_ROUND = 2048  # of a worker, between two writes of entries: what a killed build loses at most
WAIT_SECONDS = 5.0  # for another build's lock, between two looks at its work
IMAGES_AT_A_TIME = 32  # that a worker packs
FEW_IMAGES = 256  # decoding these here takes less time than starting worker processes
N_EXAMPLES = 5


@dataclass(frozen=True)
class Plan:
    """What a build has to do, by position in the dataset, each path once."""

    n_images: int
    todo: np.ndarray  # missing, or packed from a source that has changed since
    gone: np.ndarray  # without a source file; what was packed of them stays
    bytes_needed: int
    bytes_free: int

    def __str__(self) -> str:
        return (
            f"{self.n_images:,} images, {len(self.todo):,} to pack, {len(self.gone):,} without a file; "
            f"{as_size(self.bytes_needed)} needed, {as_size(self.bytes_free)} free"
        )


@dataclass(frozen=True)
class Summary:
    """What a build did, with (path, reason) of some unreadable images; incomplete if it was told to stop."""

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
    """The squares of a dataset's images. A pickled copy, as a spawned worker gets, can only `fetch`."""

    def __init__(self, folder: str | os.PathLike[str], source: ImageSource, image_size: int, fit: str = "crop") -> None:
        """Open what is there; nothing is written. `folder` may hold other datasets, sizes and fits too."""
        check_fit(fit)
        if image_size < 1:
            raise ValueError(f"image_size: {image_size} pixels; give 1 or more")
        self.source, self.image_size, self.fit = source, image_size, fit
        self.record_bytes = image_size * image_size * 3
        self.folder = Path(folder).absolute() / f"{image_size}-{fit}-v{VERSION}"
        self.pixels_file, self.entries_file = self.folder / "pixels.bin", self.folder / "entries.bin"
        self._keys = np.frombuffer(b"".join(key_of(source.path(i)) for i in range(len(source))), "S16")
        self._first = np.sort(np.unique(self._keys, return_index=True)[1])  # where each path stands first
        old = self.folder.with_name(f"{image_size}-{fit}-v1")
        if old.is_dir() and not self.folder.is_dir():
            logger.warning(
                "packed cache: %s has an older layout, which is not read; train.py packs the images again when it "
                "starts, as does `python scripts/pack_dataset.py <dataset> --cache %s`; then remove the older folder",
                *(old, old.parent),
            )
        self._open()

    def _open(self) -> None:
        """Find the record of each image, -1 for none, and the reasons of the unreadable ones."""
        self._pixels: np.ndarray | None = None
        self._entries = self._read_entries()
        used = np.flatnonzero(self._entries["status"] != FREE)
        used = used[np.argsort(self._entries["made"][used], kind="stable")]
        row_of = dict(zip(self._entries["key"][used].tolist(), used.tolist(), strict=True))  # the latest of each key
        self._rows = np.array([row_of.get(key, -1) for key in self._keys.tolist()], dtype=np.int32)  # [N]
        is_bad = np.isin(self._rows, np.flatnonzero(self._entries["status"] == UNREADABLE))
        self._reasons = {
            int(i): self._read_record(int(self._rows[i])).rstrip(b"\0").decode(errors="replace")
            for i in np.flatnonzero(is_bad)
        }

    def _read_entries(self) -> np.ndarray:
        """Read the entries whose records are in the other file."""
        if not self.entries_file.is_file() or not self.pixels_file.is_file():
            return np.empty(0, ENTRY)
        entries = np.fromfile(self.entries_file, ENTRY)
        n_records = self.pixels_file.stat().st_size // self.record_bytes
        if n_records < len(entries):
            logger.warning("packed cache: %s lacks %d records", self.pixels_file, len(entries) - n_records)
        return entries[:n_records]

    def _read_record(self, row: int) -> bytes:
        with open(self.pixels_file, "rb") as file:
            file.seek(row * self.record_bytes)
            return file.read(self.record_bytes)

    def __getstate__(self) -> dict[str, Any]:
        of_builds = ("_keys", "_first", "_entries")
        return {name: value for name, value in self.__dict__.items() if name not in of_builds} | {"_pixels": None}

    def fetch(self, i: int) -> np.ndarray:
        """Return image i, uint8 [S, S, 3], as a read-only view of the file.

        Raises:
            UnreadableImageError: the image could not be read when it was packed; the same error as without a cache.
            KeyError: it is not packed.
        """
        if i in self._reasons:
            raise UnreadableImageError(self.source.path(i), self._reasons[i])
        if self._rows[i] < 0:
            raise KeyError(
                f"packed cache: {self.source.path(i)!r} is not in {str(self.folder)!r}; build the cache first "
                f"(scripts/pack_dataset.py, or PackedCache.build)"
            )
        if self._pixels is None:
            n_records = self.pixels_file.stat().st_size // self.record_bytes
            if n_records <= self._rows.max():
                raise FileNotFoundError(f"packed cache: {str(self.pixels_file)!r} was cut while in use; start again")
            shape = (n_records, self.image_size, self.image_size, 3)
            self._pixels = np.asarray(np.memmap(self.pixels_file, np.uint8, "r", shape=shape))
        square: np.ndarray = self._pixels[self._rows[i]]
        return square

    def plan(self, should_stop: Callable[[], bool] = lambda: False) -> Plan | None:
        """Compare the sources with what is packed, and write nothing; None if told to stop."""
        found = np.full((len(self._keys), 2), -1, dtype=np.int64)  # size and time of each source

        def stat(positions: np.ndarray) -> None:
            for i in [] if should_stop() else positions.tolist():
                try:
                    found[i] = self.source.stamp(i)
                except OSError:
                    continue

        first = self._first
        with ThreadPoolExecutor(16) as pool:  # a network file system answers many at once, each after a while
            list(pool.map(stat, np.array_split(first, len(first) // 1024 + 1)))
        if should_stop():
            return None
        entries = np.append(self._entries, np.zeros(1, ENTRY))[self._rows[first]]  # -1 is the empty one
        is_gone, is_there = found[first, 0] == -1, entries["status"] != FREE
        is_there &= (entries["size"] == found[first, 0]) & (entries["mtime_ns"] == found[first, 1])
        todo = first[~is_there & ~is_gone]
        disk = next(parent for parent in (self.folder, *self.folder.parents) if parent.is_dir())
        bytes_needed, bytes_free = len(todo) * (self.record_bytes + ENTRY.itemsize), shutil.disk_usage(disk).free
        return Plan(len(first), todo, first[is_gone], bytes_needed, bytes_free)

    def build(self, n_workers: int | None = None, *, should_stop: Callable[[], bool] = lambda: False) -> Summary:
        """Pack what is missing or stale, and open the result; a second build waits for the first.

        In a process group all ranks call this at once and share the work.

        Args:
            n_workers: processes that decode; 0 decodes in this one; None takes this rank's part of the cores.
            should_stop: asked from time to time; what is packed by then stays.

        Raises:
            ValueError: the disk has too little space, before anything is written, or becomes full.
            PermissionError: images are missing, and the folder cannot be written.
        """
        if n_workers is not None and n_workers < 0:
            raise ValueError(f"--workers {n_workers}: give 0 or more")
        lock = filelock.FileLock(self.folder / "lock", mode=0o666)
        with _explain_disk_errors(self.folder):
            try:
                while (plan := on_main_process(lambda: self._plan_and_lock(lock, should_stop))) is None:
                    if any(all_gather_objects(should_stop())):
                        return self._summarize(0, 0, is_complete=False)
                    logger.info("packed cache: another process builds in %s; waiting for it", self.folder)
                logger.info("packed cache %s: %s", self.folder, plan)
                n_packed, is_complete = self._pack(plan.todo, n_workers, should_stop) if len(plan.todo) else (0, True)
            finally:
                lock.release()
        before = self._rows[plan.todo]
        self._open()
        # of files that vanished, or that the disk did not give, the next build tries again
        failed = plan.todo[self._rows[plan.todo] == before] if is_complete else plan.todo[:0]
        is_gone = np.isin(self._keys, self._keys[np.concatenate([plan.gone, failed])])
        self._reasons.update({int(i): self._find_reason(int(i)) for i in np.flatnonzero(is_gone)})
        return self._summarize(plan.n_images - len(plan.todo) - len(plan.gone), n_packed, is_complete)

    def _plan_and_lock(self, lock: filelock.BaseFileLock, should_stop: Callable[[], bool]) -> Plan | None:
        """Plan, and take the lock if there is something to do; None if told to stop or another build has the lock."""
        self._open()
        plan = self.plan(should_stop)
        if plan is None or not len(plan.todo):
            return plan
        if plan.bytes_needed > plan.bytes_free:
            raise ValueError(
                f"packed cache: {len(plan.todo):,} images of {self.image_size} x {self.image_size} pixels need "
                f"{as_size(plan.bytes_needed)} in {str(self.folder)!r}, and {as_size(plan.bytes_free)} are free there; "
                f"make room, choose a folder on another disk, or a smaller image_size"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=WAIT_SECONDS)
        except filelock.Timeout:
            return None
        if not np.array_equal(self._entries, self._read_entries()):  # another build packed some in the meantime
            self._open()
            plan = self.plan(should_stop)
        return plan

    def _pack(self, todo: np.ndarray, n_workers: int | None, should_stop: Callable[[], bool]) -> tuple[int, bool]:
        """Pack images in rounds of all ranks; return how many could be decoded, and False if told to stop."""
        if n_workers is None:
            launch = read_launch()
            n_cores = max(1, available_cores() // (launch.local_world_size if launch else 1))
            n_workers = n_cores if len(todo) > FEW_IMAGES else 0
        rows, n_round = on_main_process(lambda: (self._reserve(len(todo)), IMAGES_PER_ROUND * max(1, n_workers)))
        logger.info("packing %s images into %s with %d worker processes", f"{len(todo):,}", self.folder, n_workers)
        jobs, made, n_packed = np.stack([todo, rows], axis=1), self._entries["made"].max(initial=0) + 1, 0
        packer = Packer(self.source, self.image_size, self.fit, self.pixels_file)
        rank, n_ranks = get_rank(), get_world_size()
        with open_pool(packer, n_workers) as pack, _show_progress("packing", total=len(jobs)) as progress:
            for start in range(0, len(jobs), n_round * n_ranks):
                own = jobs[start : start + n_round * n_ranks][rank::n_ranks]
                outcomes = all_gather_objects(self._pack_round(pack, own, should_stop))
                errors = [error for *_, error in outcomes if error is not None]
                if errors:
                    raise errors[0]
                done, entries = (np.concatenate([outcome[k] for outcome in outcomes]) for k in (0, 1))
                entries["made"] = made
                on_main_process(partial(self._write_entries, done, entries))
                n_packed += int((entries["status"] == PACKED).sum())
                progress.update(len(entries))
                if any(is_stopped for _, _, is_stopped, _ in outcomes):
                    return n_packed, False
        return n_packed, True

    def _reserve(self, n: int) -> np.ndarray:
        """Return the numbers of n free records, int64 [n], after making the files as long as that takes."""
        n_records = len(self._entries)
        free = np.flatnonzero(self._entries["status"] == FREE)[:n]
        n_after = n_records + n - len(free)
        for file, n_bytes in ((self.entries_file, ENTRY.itemsize), (self.pixels_file, self.record_bytes)):
            with open(file, "ab") as opened:
                opened.truncate(n_records * n_bytes)  # what one of the files lacks may not come back in the other
                opened.truncate(n_after * n_bytes)
        return np.concatenate([free, np.arange(n_records, n_after)])

    def _pack_round(
        self, pack: Callable[..., Iterable[np.ndarray]], jobs: np.ndarray, should_stop: Callable[[], bool]
    ) -> tuple[np.ndarray, np.ndarray, bool, Exception | None]:
        """Pack images; return records and entries, whether this rank was told to stop, and what went wrong."""
        done = [np.empty(0, ENTRY)]
        error: Exception | None = None
        try:
            for entries in pack([jobs[i : i + IMAGES_AT_A_TIME] for i in range(0, len(jobs), IMAGES_AT_A_TIME)]):
                done.append(entries)
                if should_stop():
                    break
        except OSError as failure:
            error = failure
        except BrokenProcessPool as failure:
            if not should_stop():  # else by a signal to all processes
                error = ValueError(
                    f"packed cache: a worker process was killed, perhaps for want of memory ({failure}); start the "
                    f"same command again, with fewer --workers; what was packed stays"
                )
        try:
            with open(self.pixels_file, "rb+") as file:
                os.fsync(file.fileno())  # before any entry says that they are there
        except OSError as failure:
            error = failure
        packed = np.concatenate(done)
        return jobs[: len(packed), 1], packed, should_stop(), error

    def _write_entries(self, rows: np.ndarray, entries: np.ndarray) -> None:
        with open(self.entries_file, "rb+", buffering=0) as file:
            for row, entry in zip(rows.tolist(), entries, strict=True):
                os.pwrite(file.fileno(), entry.tobytes(), row * ENTRY.itemsize)
            os.fsync(file.fileno())

    def _find_reason(self, i: int) -> str:
        try:
            self.source.read(i)
        except UnreadableImageError as error:
            return error.reason
        return "it was not there when the packed cache was built"

    def _summarize(self, n_there: int, n_packed: int, is_complete: bool) -> Summary:
        bad = [i for i in self._first.tolist() if i in self._reasons]
        examples = [(self.source.path(i), self._reasons[i]) for i in bad[:N_EXAMPLES]]
        summary = Summary(len(self._first), n_there, n_packed, len(bad), examples, is_complete)
        logger.info("packed cache %s: %s", self.folder, summary)
        return summary

    def verify(self, should_stop: Callable[[], bool] = lambda: False) -> tuple[int, list[str]]:
        """Check all records, also those of other datasets; damaged ones are freed, so that the next build packs them.

        Returns:
            how many were checked, and what is damaged: paths, or numbers of records of other datasets.
        """
        used = np.flatnonzero(self._entries["status"] != FREE)
        n_checked, damaged = 0, []
        for row in _show_progress("checking", used.tolist()):
            if should_stop():
                break
            if checksum_of(self._entries[row]["key"], self._read_record(row)) != self._entries[row]["crc32"]:
                damaged.append(row)
            n_checked += 1
        position_of = {int(self._rows[i]): i for i in self._first.tolist()}
        names = [self.source.path(position_of[row]) if row in position_of else f"record {row}" for row in damaged]
        if damaged:
            logger.warning("packed cache %s: damaged: %s", self.folder, ", ".join(names[:N_EXAMPLES]))
            with _explain_disk_errors(self.folder), filelock.FileLock(self.folder / "lock", mode=0o666):
                self._write_entries(np.array(damaged), np.zeros(len(damaged), ENTRY))
            self._open()
        return n_checked, names


def _show_progress(what: str, images: list[int] | None = None, total: int | None = None) -> Any:
    seconds = 0.5 if sys.stderr.isatty() else 30  # in a log file each update is a line
    return tqdm(images, what, total, unit="image", mininterval=seconds, disable=get_rank() != 0)


def as_size(n_bytes: int) -> str:
    """Write bytes in GiB, or in MiB below one."""
    return f"{n_bytes / 2**30:,.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:,.1f} MiB"


@contextmanager
def _explain_disk_errors(folder: Path) -> Iterator[None]:
    """Turn errors of the disk into what a user can do about them."""
    try:
        yield
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(
            f"packed cache: {str(folder)!r} or a part of its path is a file; choose another folder"
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ValueError(
                f"packed cache: the disk of {str(folder)!r} became full ({error.strerror}); what was packed stays: "
                f"make room or choose another folder, and start the same command again"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise PermissionError(
                f"packed cache: cannot write to {str(folder)!r} ({error.strerror}), where images are missing; get "
                f"the right to write there, or choose another folder"
            ) from error
        raise
