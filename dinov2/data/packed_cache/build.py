"""Making what is missing in the packed cache, together with other builders of the same variant.

The pictures are cut into parts, in the order of the lists. A builder takes a part by its lock, packs those of its
pictures that nobody packed meanwhile, and gives the lock back; parts that others hold are looked at again at the end.
So any number of builders share the work, and a part whose builder died is taken over.
"""

import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field

import numpy as np

from dinov2.data.packed_cache.locks import PartLock
from dinov2.data.packed_cache.pictures import GONE, PictureSource, Progress
from dinov2.data.packed_cache.shards import ENTRY, Shard, ShardWriter, Store
from dinov2.data.packed_cache.worker import RETRY, Batch, PackedPicture, Workers
from dinov2.distributed import read_launch
from dinov2.utils.cores import available_cores

logger = logging.getLogger("dinov2")

BATCH_SIZE = 32
_SECONDS_BETWEEN_LOOKS = 0.5  # at parts that others have in work
_FEW = 256  # pictures for which starting processes takes longer than packing here


@dataclass(frozen=True)
class Part:
    """Some consecutive pictures of the lists.

    Attributes:
        name: a hash of their keys, the same for every builder of these lists.
        todo: int64, positions of those that are missing or stale.
    """

    name: str
    todo: np.ndarray


def cut(keys: np.ndarray, first: np.ndarray, todo: np.ndarray, size: int) -> list[Part]:
    """The parts in which there is something to do.

    Args:
        keys: KEY [N].
        first: int64 [U], ascending: where each key stands first; parts are cut through these.
        todo: int64, ascending, some of `first`.
        size: pictures of a part.
    """
    starts = range(0, len(first), size)
    bounds = np.searchsorted(todo, first[list(starts)]).tolist() + [len(todo)]
    parts = []
    for start, begin, end in zip(starts, bounds, bounds[1:], strict=False):
        if end > begin:
            content = keys[first[start : start + size]].tobytes()
            parts.append(Part(hashlib.blake2b(content, digest_size=16).hexdigest(), todo[begin:end]))
    return parts


def default_workers() -> int:
    """This process's share of the cores that it may use."""
    n_cores = available_cores()
    launch = read_launch()
    return max(1, n_cores // (launch.local_world_size if launch else 1))


@dataclass
class _InWork:
    """A part that this builder has the lock of."""

    lock: PartLock
    writer: ShardWriter
    n_left: int
    packed: list[PackedPicture] = field(default_factory=list)


class Builder:
    """Packs parts until all are there.

    Args:
        pictures: of the data set.
        keys: KEY [N].
        stamps: int64 [N, 2], of the sources; only those of the parts' pictures are looked at.
        recorded: {position: reason} of pictures that are on record as unreadable.
        store: to write to.
        fit: how a picture becomes square.
    """

    def __init__(
        self,
        pictures: PictureSource,
        keys: np.ndarray,
        stamps: np.ndarray,
        recorded: dict[int, str],
        store: Store,
        fit: str,
    ) -> None:
        self.pictures, self.keys, self.stamps, self.store, self.fit = pictures, keys, stamps, store, fit
        self.recorded = recorded
        self.n_packed = 0
        self._known = {shard.name for shard in store.shards}
        self._finished: set[str] = set()  # names of shards that came since, of any builder
        self._in_work: list[_InWork] = []
        self._n_done = 0

    def run(
        self, parts: list[Part], n_workers: int | None, should_stop: Callable[[], bool], report_seconds: float
    ) -> bool:
        """Pack all parts; False if told to stop before.

        Raises:
            OSError: the cache cannot be written.
            ValueError: a worker process died.
        """
        n_pictures = sum(len(part.todo) for part in parts)
        if n_workers is None:
            n_workers = default_workers() if n_pictures > _FEW else 0
        by = f"{n_workers} worker processes" if n_workers else "this process"
        logger.info("packing %s pictures into %s with %s", f"{n_pictures:,}", self.store.path, by)
        progress = Progress("pictures packed", n_pictures, report_seconds)
        workers = Workers(self.pictures, self.store.image_size, self.fit, n_workers)
        try:
            return self._pack(parts, workers, 4 * n_workers, should_stop, progress)
        except BrokenProcessPool as error:
            if should_stop():  # the signal went to all processes
                return False
            raise ValueError(
                "packed cache: a worker process was killed, perhaps for want of memory; start the same command again, "
                "with fewer --workers; what was finished stays"
            ) from error
        finally:
            workers.close()
            for part in self._in_work:
                part.writer.abandon()
                part.lock.release()
            self._in_work.clear()
            self.store.refresh(self._finished)

    def _pack(
        self, parts: list[Part], workers: Workers, n_ahead: int, should_stop: Callable[[], bool], progress: Progress
    ) -> bool:
        waiting: dict[Future[list[PackedPicture]], _InWork] = {}
        batches = self._batches(deque(parts), waiting)
        more = True
        while True:
            while more and len(waiting) <= n_ahead and not should_stop():
                following = next(batches, None)
                if following is None:
                    more = False
                    break
                if isinstance(following, float):  # all that is left is in the hands of others
                    break
                part, batch = following
                waiting[workers.submit(batch)] = part
            if should_stop():
                return False
            if waiting:
                done, _ = wait(waiting, timeout=1, return_when=FIRST_COMPLETED)
                for future in done:
                    self._take(waiting.pop(future), future.result())
            elif more:
                time.sleep(_SECONDS_BETWEEN_LOOKS)
            else:
                return True
            progress.show(self._n_done)

    def _batches(
        self, parts: deque[Part], waiting: dict[Future[list[PackedPicture]], _InWork]
    ) -> Iterator[tuple[_InWork, Batch] | float]:
        """Batches of the parts whose lock is free; a number where there is nothing to do but wait."""
        n_refused = 0
        has_told = False
        while parts:
            part = parts.popleft()
            lock = self.store.lock(part.name)
            if not lock.take():
                parts.append(part)
                n_refused += 1
                if n_refused >= len(parts):
                    if not waiting and not has_told:
                        logger.info("parts that other builders have in work: %d; waiting for them", len(parts))
                        has_told = True
                    n_refused = 0
                    yield _SECONDS_BETWEEN_LOOKS
                continue
            n_refused = 0
            try:
                self.store.remove_leftovers_of(part.name, lock)
                todo = self._still_todo(part, lock)
                self._n_done += len(part.todo) - len(todo)
                if not len(todo):
                    lock.release()
                    continue
                in_work = _InWork(lock, ShardWriter(self.store, part.name, len(todo)), len(todo))
            except BaseException:
                lock.release()
                raise
            self._in_work.append(in_work)
            jobs = [(position, row) for row, position in enumerate(todo.tolist())]
            for start in range(0, len(jobs), BATCH_SIZE):
                yield in_work, Batch(in_work.writer.temporary, jobs[start : start + BATCH_SIZE])

    def _still_todo(self, part: Part, lock: PartLock) -> np.ndarray:
        """Positions that no other builder packed since this one looked."""
        names = set(lock.shards()) - self._known
        self._finished |= names
        if not names:
            return part.todo
        done: dict[bytes, tuple[int, int]] = {}
        for shard in self._read(names):
            stamps = zip(shard.entries["size"].tolist(), shard.entries["mtime_ns"].tolist(), strict=True)
            done.update(zip((key.tobytes() for key in shard.entries["key"]), stamps, strict=True))
        is_todo = [done.get(self.keys[i].tobytes()) != tuple(self.stamps[i].tolist()) for i in part.todo.tolist()]
        return part.todo[is_todo]

    def _read(self, names: set[str]) -> list[Shard]:
        self.store.refresh(names)
        return sorted((shard for shard in self.store.shards if shard.name in names), key=lambda shard: shard.made)

    def _take(self, part: _InWork, packed: list[PackedPicture]) -> None:
        part.packed += packed
        part.n_left -= len(packed)
        self._n_done += len(packed)
        if part.n_left:
            return
        # a failure that is on record is not written again, and never that a file is gone: it may come back as it was
        news = [
            picture
            for picture in part.packed
            if picture.stamp != GONE
            and (picture.stamp != RETRY or self.recorded.get(picture.position) != picture.reason)
        ]
        news.sort(key=lambda picture: picture.position)
        entries = np.empty(len(news), ENTRY)
        entries["key"] = self.keys[[picture.position for picture in news]]
        entries["size"] = [picture.stamp[0] for picture in news]
        entries["mtime_ns"] = [picture.stamp[1] for picture in news]
        entries["row"] = [picture.row for picture in news]
        entries["crc32"] = [picture.crc32 for picture in news]
        if len(news):
            reasons = {entry: picture.reason for entry, picture in enumerate(news) if picture.reason}
            part.writer.finish(entries, reasons, part.lock)
            self._finished.add(part.writer.name)
        else:
            part.writer.abandon()
        self._in_work.remove(part)
        part.lock.release()
        self.n_packed += sum(not picture.reason for picture in news)
