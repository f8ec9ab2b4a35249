"""The files of the packed cache, and the folder they lie in.

<folder>/224-crop-v1/                 a variant: side in pixels, fit, version of the pixels
    <part>.<nonce>.pixels             uint8 [rows, S, S, 3], nothing else
    <part>.<nonce>.index              header, an entry a picture, reasons of the unreadable ones
    locks/<part>, in_use              see locks.py

A shard is these two files, written once and never changed. The index is renamed to its name last: without it there
is no shard. `<part>` is a hash of the pictures it was cut for, `<nonce>` makes names that were never there before.

Letters: S side in pixels, n entries of a shard, M entries of all shards
"""

import errno
import json
import logging
import os
import secrets
import struct
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dinov2.data.packed_cache.locks import OnlyUser, PartLock, share
from dinov2.data.packed_cache.pictures import KEY
from dinov2.utils.files import atomic_write, sync_folder

logger = logging.getLogger("dinov2")

# Part of the folder's name. Raise it when decode_image or resize_image come to give other pixels: what was packed
# before is then left alone and packed anew
PIXEL_VERSION = 1

ROWS_OF_A_SHARD = 4096
BYTES_OF_A_SHARD = 512 * 2**20

MAGIC = b"DBpacked"
FORMAT_VERSION = 1
# magic, format, S, entries, rows, when it was made (grows with each shard that supersedes another), bytes of reasons
_HEADER = struct.Struct("<8sIIQQQQ")
_CHECKSUM = struct.Struct("<I")  # crc32 of all before it, at the end of the file

UNREADABLE = -1  # the row of a picture without pixels
ENTRY = np.dtype([("key", KEY), ("size", "<i8"), ("mtime_ns", "<i8"), ("row", "<i4"), ("crc32", "<u4")])


class DamagedShardError(ValueError):
    """A shard whose files are not what was written."""


@dataclass(frozen=True)
class Shard:
    """What an index says.

    Attributes:
        name: of the files, without ending.
        made: the larger, the later.
        n_rows: pictures in the file of pixels.
        entries: ENTRY [n]; `size` and `mtime_ns` of the source when it was read; `row` is UNREADABLE where the
            picture could not be decoded.
        reasons: {number of the entry: why it is unreadable}.
    """

    name: str
    made: int
    n_rows: int
    entries: np.ndarray
    reasons: dict[int, str]


@dataclass
class Store:
    """The shards of one variant.

    Attributes:
        path: its folder.
        image_size: S.
        shards: those that are whole.
        damaged: names of those that are not.
    """

    path: Path
    image_size: int
    shards: list[Shard] = field(default_factory=list)
    damaged: set[str] = field(default_factory=set)

    @property
    def row_bytes(self) -> int:
        return self.image_size * self.image_size * 3

    @property
    def rows_of_a_shard(self) -> int:
        return max(1, min(ROWS_OF_A_SHARD, BYTES_OF_A_SHARD // self.row_bytes))

    @property
    def in_use(self) -> Path:
        return self.path / "in_use"

    def create(self) -> None:
        """Make the folder, if it is missing."""
        (self.path / "locks").mkdir(parents=True, exist_ok=True)
        if not self.in_use.exists():
            self.in_use.touch()
        share(self.in_use)

    def lock(self, part: str) -> PartLock:
        return PartLock(self.path / "locks" / part)

    def refresh(self, names: Iterable[str] = ()) -> list[Shard]:
        """Read the indexes that are new, those in the folder and those of `names`; returns the new shards.

        A damaged shard is as good as none; the log tells of it once.
        """
        known = self.damaged.union(shard.name for shard in self.shards)
        new = []
        for name in sorted(self._names_there().union(names) - known):
            try:
                new.append(self.read(name))
            except FileNotFoundError:
                continue  # removed by another process in between, or never finished
            except DamagedShardError as error:
                self.damaged.add(name)
                logger.warning("packed cache: %s; its pictures count as missing", error)
        self.shards += new
        return new

    def _names_there(self) -> set[str]:
        try:
            return {name.removesuffix(".index") for name in os.listdir(self.path) if _is_index(name)}
        except (FileNotFoundError, NotADirectoryError):
            return set()

    def read(self, name: str) -> Shard:
        """A shard's index, and a look at the size of its other file.

        Raises:
            FileNotFoundError: there is no such index.
            DamagedShardError: either file is not whole, or is of something else.
        """
        file = self.path / f"{name}.index"
        data = file.read_bytes()
        body = data[: -_CHECKSUM.size]
        if len(body) < _HEADER.size or _CHECKSUM.unpack(data[len(body) :]) != (zlib.crc32(body),):
            raise DamagedShardError(f"{str(file)!r} is truncated or damaged")
        magic, version, image_size, n_entries, n_rows, made, n_reasons = _HEADER.unpack_from(body)
        if (magic, version, image_size) != (MAGIC, FORMAT_VERSION, self.image_size):
            raise DamagedShardError(
                f"{str(file)!r} is not an index of format {FORMAT_VERSION} for {self.image_size} pixels"
            )
        # a copy: a view would keep the whole file in memory, and be read-only
        entries = np.frombuffer(body, ENTRY, n_entries, _HEADER.size).copy()
        reasons = json.loads(body[len(body) - n_reasons :])
        if n_rows:
            self._check_size(name, n_rows)
        return Shard(name, made, n_rows, entries, {int(entry): reason for entry, reason in reasons.items()})

    def _check_size(self, name: str, n_rows: int) -> None:
        file = self.pixels(name)
        try:
            size = file.stat().st_size
        except FileNotFoundError:
            raise DamagedShardError(f"{str(file)!r} is missing, its index is there") from None
        if size != n_rows * self.row_bytes:
            raise DamagedShardError(f"{str(file)!r} has {size:,} bytes instead of {n_rows * self.row_bytes:,}")

    def pixels(self, name: str) -> Path:
        return self.path / f"{name}.pixels"

    def newest_entries(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The entry that counts for each key: of several, that of the shard which was made last.

        Returns:
            ENTRY [K], sorted by key (high, low), each key once; int64 [K], the place in `shards` of the shard that
            it is from; int64 [K], its number there.
        """
        counts = [len(shard.entries) for shard in self.shards]
        entries = np.concatenate([np.empty(0, ENTRY), *(shard.entries for shard in self.shards)])  # [M]
        by_age = sorted(range(len(counts)), key=lambda place: (self.shards[place].made, self.shards[place].name))
        age = np.argsort(np.array(by_age, dtype=np.int64))  # of each shard; 0 is the oldest
        shard_of = np.repeat(np.arange(len(counts)), counts)
        number = np.concatenate([np.empty(0, dtype=np.int64), *(np.arange(n) for n in counts)])
        order = np.lexsort((age[shard_of], entries["key"]["low"], entries["key"]["high"]))
        keys = entries["key"][order]
        is_last = np.ones(len(keys), dtype=bool)
        is_last[:-1] = keys[1:] != keys[:-1]
        order = order[is_last]
        return entries[order], shard_of[order], number[order]

    def next_made(self) -> int:
        """For a new shard: later than all that are known here, whatever the clocks of the machines say."""
        return max(time.time_ns(), 1 + max((shard.made for shard in self.shards), default=0))

    def remove_leftovers(self) -> None:
        """Remove what killed builders left of the shards that they had in work, unless somebody holds their locks."""
        for part in self._leftovers():
            lock = self.lock(part)
            if lock.take():
                self.remove_leftovers_of(part, lock)
                lock.release()

    def remove_leftovers_of(self, part: str, lock: PartLock) -> None:
        """The same for one part, whose lock was taken."""
        if lock.is_certain:
            for file in self._leftovers().get(part, []):
                file.unlink(missing_ok=True)

    def bytes_in_work(self) -> int:
        """On the disk for shards that other builders have not finished."""
        total = 0
        for files in self._leftovers().values():
            for file in files:
                with suppress(FileNotFoundError):
                    total += file.stat().st_blocks * 512
        return total

    def _leftovers(self) -> dict[str, list[Path]]:
        try:
            names = set(os.listdir(self.path))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        found: dict[str, list[Path]] = {}
        for name in sorted(names):
            is_orphan = name.endswith(".pixels") and f"{name.removesuffix('.pixels')}.index" not in names
            if is_orphan or name.endswith(".tmp"):
                found.setdefault(name.removeprefix(".").partition(".")[0], []).append(self.path / name)
        return found

    def remove(self, names: set[str]) -> bool:
        """Remove shards, and lock files that nobody needs then; False if other processes have the cache in use."""
        with OnlyUser(self.in_use) as alone:
            if not alone:
                return False
            for name in sorted(names):
                (self.path / f"{name}.index").unlink(missing_ok=True)  # first: without it there is no shard
                self.pixels(name).unlink(missing_ok=True)
            for lock in (self.path / "locks").iterdir():
                lock.unlink()
            sync_folder(self.path)
        self.shards = [shard for shard in self.shards if shard.name not in names]
        self.damaged -= names
        return True

    def superseded(self) -> set[str]:
        """Names of the shards that have no entry which still counts, and of the damaged ones."""
        _, shard_of, _ = self.newest_entries()
        alive = set(np.unique(shard_of).tolist())
        return {shard.name for place, shard in enumerate(self.shards) if place not in alive} | self.damaged


def _is_index(name: str) -> bool:
    return name.endswith(".index") and not name.startswith(".")


class ShardWriter:
    """A shard in the making: room on the disk first, then rows in any order and from any process, then the index.

    Raises:
        OSError: no room; nothing is left behind.
    """

    def __init__(self, store: Store, part: str, n_rows: int) -> None:
        self.store, self.n_rows = store, n_rows
        self.name = f"{part}.{secrets.token_hex(4)}"
        self.temporary = store.path / f".{self.name}.pixels.tmp"
        self._handle = os.open(self.temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            _reserve(self._handle, n_rows * store.row_bytes)
        except BaseException:
            self.abandon()
            raise

    def finish(self, entries: np.ndarray, reasons: dict[int, str], lock: PartLock) -> None:
        """Make it a shard, with what each row holds."""
        store = self.store
        if self.n_rows:
            os.fsync(self._handle)
            os.replace(self.temporary, store.pixels(self.name))
        lock.add(self.name)
        text = json.dumps({str(entry): reason for entry, reason in reasons.items()}).encode()
        header = _HEADER.pack(
            *(MAGIC, FORMAT_VERSION, store.image_size, len(entries), self.n_rows, store.next_made(), len(text))
        )
        body = header + entries.tobytes() + text
        with atomic_write(store.path / f"{self.name}.index") as file:
            file.write(body + _CHECKSUM.pack(zlib.crc32(body)))
        self.abandon()

    def abandon(self) -> None:
        """Close and remove what is not part of a finished shard."""
        os.close(self._handle)
        self.temporary.unlink(missing_ok=True)
        if not (self.store.path / f"{self.name}.index").exists():
            self.store.pixels(self.name).unlink(missing_ok=True)


def _reserve(handle: int, n_bytes: int) -> None:
    """Get the room for a file at once, so that a full disk is seen before the work."""
    if not n_bytes:
        return
    try:
        os.posix_fallocate(handle, 0, n_bytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(handle, n_bytes)  # a file system that cannot reserve: writing will tell


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turn errors of the disk into what a user can do about them.

    Raises:
        ValueError: the disk is full.
        PermissionError: the folder cannot be written.
        NotADirectoryError: it, or a part of its path, is a file.
    """
    try:
        yield
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(
            f"packed cache: {str(folder)!r} or a part of its path is a file; choose another folder"
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ValueError(
                f"packed cache: the disk of {str(folder)!r} became full ({error.strerror}); what was finished stays: "
                "make room or choose another folder, and start the same command again"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise PermissionError(
                f"packed cache: cannot write to {str(folder)!r} ({error.strerror}), where pictures are missing; get "
                "the right to write there, or choose another folder"
            ) from error
        raise
