"""The packed cache of a data set: opened, completed, read, checked.

Letters: N pictures, U different ones among them, B pictures of a batch, S side in pixels
"""

import logging
import mmap
import os
import resource
import shutil
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dinov2.data.datasets.decode import UnreadableImageError, check_fit
from dinov2.data.packed_cache.build import Builder, cut
from dinov2.data.packed_cache.locks import share
from dinov2.data.packed_cache.pictures import (
    GONE,
    PictureSource,
    Progress,
    as_duration,
    find_keys,
    first_places,
    keys_of,
    stamps_of,
)
from dinov2.data.packed_cache.shards import ENTRY, PIXEL_VERSION, UNREADABLE, DamagedShardError, Shard, Store, explained
from dinov2.distributed import all_gather_objects, get_rank, get_world_size

logger = logging.getLogger("dinov2")

MISSING = -2  # the row of a picture that is not packed
WITHOUT_SOURCE = -3  # of one whose file was gone at the last build, packed or not
N_EXAMPLES = 5
_OTHER_FILES = 256  # that a process may have open beside the shards
_VERIFY_THREADS = 4


def _never() -> bool:
    return False


@dataclass(frozen=True)
class Plan:
    """What a build has to do, and the room it takes.

    Attributes:
        n_pictures: different pictures of the data set.
        todo: int64, positions of the pictures that are missing or stale, each picture once.
        n_stale: how many of them are packed, from a source that is another now.
        gone: int64, positions of those without a source file. They cannot be packed; what was packed of them stays, for
            a file may come back as it was.
        bytes_needed: for what is to do.
        bytes_free: on the disk of the cache.
    """

    n_pictures: int
    todo: np.ndarray
    n_stale: int
    gone: np.ndarray
    bytes_needed: int
    bytes_free: int


@dataclass(frozen=True)
class Summary:
    """What a build did.

    Attributes:
        n_pictures: different pictures of the data set.
        n_there: those that were packed, or on record as unreadable, before.
        n_packed: those that this builder packed.
        n_unreadable: those that cannot be read.
        examples: (path, reason) of some of these.
        seconds: how long it took.
        is_complete: whether all are there now; a build that was told to stop leaves some out.
    """

    n_pictures: int
    n_there: int
    n_packed: int
    n_unreadable: int
    examples: list[tuple[str, str]]
    seconds: float
    is_complete: bool


@dataclass(frozen=True)
class Damage:
    """A shard that is not what was written.

    Attributes:
        shard: its name.
        n_pictures: whose pixels are others, or all of it where a file is missing or truncated.
        examples: paths of some of these.
    """

    shard: str
    n_pictures: int
    examples: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        n_checked: pictures whose pixels were read.
        damaged: shards.
        are_removed: whether the damaged shards were removed, so that the next build packs their pictures again.
        is_complete: False if it was told to stop.
    """

    n_checked: int
    damaged: list[Damage]
    are_removed: bool
    is_complete: bool


class PackedCache:
    """Decoded and resized pictures of a data set in memory-mapped files.

    What is packed is found by path; `build` compares size and time of each source with those it had when it was
    packed, and packs what is missing or stale. A source that changes after that is noticed by the next `build`.

    A pickled copy, as a DataLoader's worker has, can only `fetch` and `copy_into`. It maps the files itself.
    """

    def __init__(
        self, folder: str | os.PathLike[str], pictures: PictureSource, image_size: int, fit: str = "crop"
    ) -> None:
        """Open what is there; nothing is written.

        Args:
            folder: may hold other data sets, sizes and fits too; need not exist.
            pictures: N of them.
            image_size: S, in pixels.
            fit: how a picture becomes square, see `resize_image`.
        """
        check_fit(fit)
        if image_size < 1:
            raise ValueError(f"image_size: {image_size} pixels; give 1 or more")
        self.pictures, self.image_size, self.fit = pictures, image_size, fit
        self.folder = Path(folder).absolute() / f"{image_size}-{fit}-v{PIXEL_VERSION}"
        self._store = Store(self.folder, image_size)
        self._keys = keys_of(pictures)  # [N]
        self._first = first_places(self._keys)  # [U]
        self._shared_location: torch.Tensor | None = None
        self._open()

    def __len__(self) -> int:
        return len(self.pictures)

    def _open(self) -> None:
        share(self._store.in_use)
        self._store.refresh()
        self._match()

    def _match(self) -> None:
        shards = self._store.shards
        entries, shard_of, number = self._store.newest_entries()
        found = find_keys(self._keys, entries["key"])  # [N]
        is_there = found >= 0
        found = found[is_there]
        # a tensor, since processes share those instead of copying them
        self._is_packed = is_there
        location = np.empty((2, len(self._keys)), dtype=np.int32)  # shard and row of each picture
        location[:, ~is_there] = MISSING
        location[:, is_there] = shard_of[found], entries["row"][found]
        self._location: np.ndarray = location
        self._shared_location = None
        self._recorded = np.empty((len(self._keys), 2), dtype=np.int64)  # the stamps when it was packed
        self._recorded[is_there] = np.stack([entries["size"][found], entries["mtime_ns"][found]], axis=1)
        self._shards = [(shard.name, shard.n_rows) for shard in shards]
        self._reasons = {}  # of the unreadable ones
        is_unreadable = entries["row"][found] == UNREADABLE
        for i, at in zip(np.flatnonzero(is_there)[is_unreadable], found[is_unreadable], strict=True):
            self._reasons[int(i)] = shards[shard_of[at]].reasons[int(number[at])]
        self._prepare_reading()

    def _prepare_reading(self) -> None:
        self._shard_of, self._row_of = self._location
        self._mapped: list[tuple[mmap.mmap, np.ndarray] | None] = [None] * len(self._shards)
        # a mapped file counts as an open one
        wanted = len(self._shards) + _OTHER_FILES
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))

    def __getstate__(self) -> dict[str, Any]:
        if self._shared_location is None:
            # a tensor, since worker processes share those; a copy, since its memory moves when it is sent to them
            self._shared_location = torch.from_numpy(self._location.copy())
        kept = ("pictures", "image_size", "fit", "folder", "_shards", "_reasons")
        return {"location": self._shared_location, **{name: self.__dict__[name] for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._location, self._shared_location = state.pop("location").numpy(), None
        self.__dict__.update(state)
        self._prepare_reading()

    # reading

    def fetch(self, i: int) -> np.ndarray:
        """uint8 [S, S, 3]: a read-only view of the file's pages, without a copy.

        Raises:
            UnreadableImageError: the picture could not be read when it was packed; the same error as without a cache.
            KeyError: it is not packed.
        """
        row = self._row_of[i]
        if row < 0:
            raise self._why_not(i)
        shard = self._shard_of[i]
        mapped = self._mapped[shard] or self._map(shard)
        return mapped[1][row]

    def copy_into(self, indices: Sequence[int] | np.ndarray, out: np.ndarray) -> dict[int, UnreadableImageError]:
        """Copy pictures to the rows of `out`, uint8 [B, S, S, 3].

        Returns:
            {row of `out`: why it was left as it is}, for pictures that could not be read when they were packed.

        Raises:
            KeyError: one is not packed.
        """
        row_bytes = self.image_size * self.image_size * 3
        unreadable: dict[int, UnreadableImageError] = {}
        sources: list[tuple[int, np.ndarray]] = []
        for place, i in enumerate(indices):
            row = int(self._row_of[i])
            if row < 0:
                error = self._why_not(int(i))
                if not isinstance(error, UnreadableImageError):
                    raise error
                unreadable[place] = error
                continue
            shard = self._shard_of[i]
            pages, pixels = self._mapped[shard] or self._map(shard)
            # the disk reads the whole batch at once, instead of one page after the other as they are touched
            start = row * row_bytes // mmap.PAGESIZE * mmap.PAGESIZE
            pages.madvise(mmap.MADV_WILLNEED, start, (row + 1) * row_bytes - start)
            sources.append((place, pixels[row]))
        for place, source in sources:
            out[place] = source
        return unreadable

    def _why_not(self, i: int) -> UnreadableImageError | KeyError:
        path = self.pictures.path(i)
        if self._row_of[i] == UNREADABLE:
            return UnreadableImageError(path, self._reasons[int(i)])
        if self._row_of[i] == WITHOUT_SOURCE:
            try:
                self.pictures.read(i)
            except UnreadableImageError as error:
                return error
            return UnreadableImageError(path, "it was not there when the packed cache was built")
        return KeyError(
            f"packed cache: {path!r} is not in {str(self.folder)!r}; build the cache first "
            "(scripts/pack_dataset.py, or PackedCache.build)"
        )

    def _map(self, shard: int) -> tuple[mmap.mmap, np.ndarray]:
        name, n_rows = self._shards[shard]
        file = self.folder / f"{name}.pixels"
        size = self.image_size
        try:
            handle = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"packed cache: {str(file)!r} was removed while it was in use; start the same command again"
            ) from error
        try:
            pages = mmap.mmap(handle, n_rows * size * size * 3, access=mmap.ACCESS_READ)
        except ValueError as error:  # more than the file has; reading on would end the process
            raise FileNotFoundError(
                f"packed cache: {str(file)!r} was truncated while it was in use; start the same command again"
            ) from error
        finally:
            os.close(handle)
        pixels = np.frombuffer(pages, np.uint8).reshape(n_rows, size, size, 3)
        self._mapped[shard] = pages, pixels
        return pages, pixels

    # building

    def look_at_sources(
        self, *, should_stop: Callable[[], bool] = _never, report_seconds: float = 10.0, together: bool = False
    ) -> np.ndarray | None:
        """Size and time of each source now.

        Args:
            should_stop: asked from time to time; ends it early.
            report_seconds: between two lines of the log.
            together: all processes of the group call this at once, and each looks at its share.

        Returns:
            int64 [N, 2], GONE for a source that is not there; None if told to stop.
        """
        n_shares, own = (get_world_size(), get_rank()) if together else (1, 0)
        shares = np.array_split(self._first, n_shares)
        stamps_of_share = stamps_of(self.pictures, shares[own], should_stop, report_seconds)
        gathered = all_gather_objects(stamps_of_share) if together else [stamps_of_share]
        stamps = np.tile(np.array(GONE, dtype=np.int64), (len(self._keys), 1))
        for share_of_first, found in zip(shares, gathered, strict=True):
            if found is None:
                return None
            stamps[share_of_first] = found
        return stamps

    def missing_or_stale(self, stamps: np.ndarray | None = None) -> np.ndarray:
        """int64, ascending: positions of the pictures that `build` would pack, each picture once.

        Args:
            stamps: of the sources; they are looked at if not given.
        """
        return self.plan(stamps).todo

    def plan(self, stamps: np.ndarray | None = None) -> Plan:
        """What `build` would do; writes nothing."""
        if stamps is None:
            stamps = self.look_at_sources()
            assert stamps is not None, "nothing told it to stop"
        first = self._first
        is_gone = stamps[first, 0] == GONE[0]
        is_missing = ~self._is_packed[first] & ~is_gone
        is_stale = self._is_packed[first] & ~is_gone & (self._recorded[first] != stamps[first]).any(axis=1)
        todo = first[is_missing | is_stale]
        disk = next(parent for parent in (self.folder, *self.folder.parents) if parent.is_dir())
        return Plan(
            n_pictures=len(first),
            todo=todo,
            n_stale=int(is_stale.sum()),
            gone=first[is_gone],
            bytes_needed=len(todo) * (self._store.row_bytes + ENTRY.itemsize),
            # what killed builders left is removed, what living ones have in work this builder need not do
            bytes_free=shutil.disk_usage(disk).free + self._store.bytes_in_work(),
        )

    def build(
        self,
        n_workers: int | None = None,
        *,
        should_stop: Callable[[], bool] = _never,
        report_seconds: float = 10.0,
        together: bool = False,
    ) -> Summary:
        """Pack what is missing or stale, beside other builders, and open the result.

        Written is a shard at a time, whole or not at all. A build that was killed at any moment loses what it had in
        work; the next one goes on.

        Args:
            n_workers: processes that decode; 0 decodes in this one; None takes this process's share of the cores.
            should_stop: asked from time to time; what is in work is given up then.
            report_seconds: between two lines of the log that tell how far it is.
            together: all processes of the group call this at once; they share the looking as well as the packing.

        Raises:
            ValueError: the disk has not enough room, before anything is written, or becomes full.
            PermissionError: something is missing, and the folder cannot be written.
        """
        begin = time.monotonic()
        if n_workers is not None and n_workers < 0:
            raise ValueError(f"--workers {n_workers}: give 0 or more")
        share(self._store.in_use)
        if self._store.refresh() or (self._row_of == WITHOUT_SOURCE).any():  # others built, or files came back
            self._match()
        stamps = self.look_at_sources(should_stop=should_stop, report_seconds=report_seconds, together=together)
        if stamps is None:
            return self._summary(n_there=0, n_packed=0, begin=begin, is_complete=False)
        plan = self.plan(stamps)
        logger.info("packed cache %s: %s", self.folder, describe_plan(plan))
        todo = plan.todo
        n_packed, is_complete = 0, True
        if len(todo):
            with explained(self.folder):
                self._check_room(plan)
                self._store.create()
                self._store.remove_leftovers()
                builder = Builder(self.pictures, self._keys, stamps, self._reasons, self._store, self.fit)
                parts = cut(self._keys, self._first, todo, self._store.rows_of_a_shard)
                try:
                    is_complete = builder.run(parts, n_workers, should_stop, report_seconds)
                finally:
                    n_packed = builder.n_packed
                    self._open()
        self._tidy()
        if is_complete:  # what is still missing vanished in the meantime
            self._mark_gone(np.concatenate([plan.gone, todo[~self._is_packed[todo]]]))
        return self._summary(len(self._first) - len(todo) - len(plan.gone), n_packed, begin, is_complete)

    def _mark_gone(self, positions: np.ndarray) -> None:
        keys = np.sort(self._keys[positions], order=["high", "low"])
        self._row_of[find_keys(self._keys, keys) >= 0] = WITHOUT_SOURCE  # also where they are listed again
        self._shared_location = None

    def _check_room(self, plan: Plan) -> None:
        if plan.bytes_needed <= plan.bytes_free:
            return
        stale = plan.n_stale * self._store.row_bytes
        advice = f" ({as_size(stale)} are taken by stale pictures: or remove that folder first)" if stale else ""
        raise ValueError(
            f"packed cache: {len(plan.todo):,} pictures of {self.image_size} x {self.image_size} pixels need "
            f"{as_size(plan.bytes_needed)} in {str(self.folder)!r}, and {as_size(plan.bytes_free)} are free there; "
            f"make room, choose a folder on another disk, or a smaller image_size{advice}"
        )

    def _tidy(self) -> None:
        names = self._store.superseded()
        try:
            self._store.remove_leftovers()
            if not names:
                return
            removed = self._store.remove(names)
        except OSError as error:
            logger.info("packed cache: what nobody needs stays in %s (%s)", self.folder, error.strerror)
            return
        if removed:
            logger.info("packed cache: removed %d superseded shards from %s", len(names), self.folder)
            self._match()
        else:
            logger.info("packed cache: %d superseded shards stay in %s while others use it", len(names), self.folder)

    def _summary(self, n_there: int, n_packed: int, begin: float, is_complete: bool) -> Summary:
        unreadable = self._first[np.isin(self._row_of[self._first], (UNREADABLE, WITHOUT_SOURCE))].tolist()
        errors = [self._why_not(i) for i in unreadable[:N_EXAMPLES]]
        examples = [(error.path, error.reason) for error in errors if isinstance(error, UnreadableImageError)]
        seconds = time.monotonic() - begin
        summary = Summary(len(self._first), n_there, n_packed, len(unreadable), examples, seconds, is_complete)
        logger.info("packed cache %s: %s", self.folder, describe(summary))
        return summary

    # checking

    def verify(self, *, should_stop: Callable[[], bool] = _never, report_seconds: float = 10.0) -> Verification:
        """Read all that is stored in this variant, also for other data sets, and compare it with its checksums.

        Damaged shards are named in the log and removed, unless another process has the cache in use.
        """
        shards = list(self._store.shards)
        n_rows = sum(int((shard.entries["row"] >= 0).sum()) for shard in shards)
        progress = Progress("pictures checked", n_rows, report_seconds)
        damaged = [Damage(name, 0) for name in sorted(self._store.damaged)]
        n_checked = 0
        with ThreadPoolExecutor(_VERIFY_THREADS) as pool:
            looks = [pool.submit(self._verify_shard, shard, should_stop) for shard in shards]
            for look in as_completed(looks):
                n_read, damage = look.result()
                n_checked += n_read
                progress.show(n_checked)
                if damage:
                    damaged.append(damage)
        is_complete = not should_stop()
        for damage in damaged:
            logger.warning(
                "packed cache: shard %s is damaged, %d pictures: %s",
                *(damage.shard, damage.n_pictures, ", ".join(damage.examples)),
            )
        are_removed = False
        if damaged:
            with explained(self.folder):
                are_removed = self._store.remove({damage.shard for damage in damaged})
            if are_removed:
                self._match()
        return Verification(n_checked, damaged, are_removed, is_complete)

    def _verify_shard(self, shard: Shard, should_stop: Callable[[], bool]) -> tuple[int, Damage | None]:
        """How many pictures were read, and what is wrong with them."""
        packed = shard.entries[shard.entries["row"] >= 0]
        packed = packed[np.argsort(packed["row"])]  # as they lie on the disk
        row_bytes = self._store.row_bytes
        bad = []
        n_read = 0
        try:
            self._store.read(shard.name)  # its index, too
            with open(self._store.pixels(shard.name), "rb") if len(packed) else open(os.devnull, "rb") as file:
                for number, (row, crc32) in enumerate(
                    zip(packed["row"].tolist(), packed["crc32"].tolist(), strict=True)
                ):
                    if should_stop():
                        break
                    if zlib.crc32(os.pread(file.fileno(), row_bytes, row * row_bytes)) != crc32:
                        bad.append(number)
                    n_read += 1
        except (OSError, DamagedShardError) as error:
            logger.warning("packed cache: %s", error)
            bad = list(range(len(packed)))
            return n_read, Damage(shard.name, len(bad), self._some_paths(packed["key"][:N_EXAMPLES]))
        if not bad:
            return n_read, None
        return n_read, Damage(shard.name, len(bad), self._some_paths(packed["key"][bad[:N_EXAMPLES]]))

    def _some_paths(self, keys: np.ndarray) -> list[str]:
        # not the path of a picture that is of another data set only
        places = [np.flatnonzero(self._keys == key)[:1] for key in keys]
        return [self.pictures.path(int(place[0])) for place in places if len(place)]


def as_size(n_bytes: int) -> str:
    """In GiB, or MiB below one."""
    return f"{n_bytes / 2**30:,.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:,.1f} MiB"


def describe_plan(plan: Plan) -> str:
    """What a build has to do, in a line."""
    return (
        f"{plan.n_pictures:,} pictures, of which {len(plan.todo) - plan.n_stale:,} are missing and {plan.n_stale:,} "
        f"stale, {len(plan.gone):,} have no file; {as_size(plan.bytes_needed)} needed, {as_size(plan.bytes_free)} free"
    )


def describe(summary: Summary) -> str:
    """A build in a line, or some lines where pictures are unreadable."""
    text = (
        f"{summary.n_pictures:,} pictures: {summary.n_there:,} were there, {summary.n_packed:,} packed now, "
        f"{summary.n_unreadable:,} unreadable, {as_duration(summary.seconds)}"
    )
    if not summary.is_complete:
        text += "; stopped before the end, the same command goes on"
    return "\n".join([text, *(f"  unreadable: {path}: {reason}" for path, reason in summary.examples)])
