"""What the packed cache knows of the pictures of a data set: a key for each, and the stamp of its source.

Letters: N pictures, U different ones among them
"""

import hashlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import Protocol

import numpy as np

logger = logging.getLogger("dinov2")

KEY = np.dtype([("high", "<u8"), ("low", "<u8")])  # blake2b of the path; 16 bytes
GONE = (-1, -1)  # the stamp of a source that is not there

_STAT_THREADS = 16  # a network file system answers many at once, each after a while
_STAT_RANGE = 2048


class PictureSource(Protocol):
    """The pictures of a data set, by position. Pickled for worker processes."""

    def __len__(self) -> int: ...

    def path(self, i: int, /) -> str:
        """Absolute, and the same on all machines that share a cache."""
        ...

    def read(self, i: int, /) -> bytes:
        """The file's content; raises UnreadableImageError."""
        ...

    def stamp(self, i: int, /) -> tuple[int, int]:
        """Size and mtime_ns of the file that holds the picture; raises OSError if there is none."""
        ...


class Progress:
    """Lines in the log, each some seconds after the one before: how far, how fast, how much longer.

    Args:
        what: is counted, for instance "pictures packed".
        total: of what there is to do.
        seconds: between two lines; the first one comes after as long.
    """

    def __init__(self, what: str, total: int, seconds: float) -> None:
        self.what, self.total, self.seconds = what, total, seconds
        self._last = time.monotonic()
        self._start: tuple[float, int] | None = None  # time and count once the first ones are done

    def show(self, done: int) -> None:
        """Write a line if it is time for one."""
        now = time.monotonic()
        if self._start is None and done:  # not before: processes take a while to start
            self._start = now, done
        if self._start is None or now - self._last < self.seconds or done == self._start[1]:
            return
        self._last = now
        rate = (done - self._start[1]) / (now - self._start[0])
        logger.info(
            "%s of %s %s, %s/s, about %s to go",
            *(f"{done:,}", f"{self.total:,}", self.what, f"{rate:,.0f}", as_duration((self.total - done) / rate)),
        )


def as_duration(seconds: float) -> str:
    """Hours, minutes and seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def keys_of(pictures: PictureSource) -> np.ndarray:
    """KEY [N]: equal where the paths are."""
    blake2b = hashlib.blake2b
    path_of = pictures.path
    digests = (
        blake2b(path_of(i).encode(errors="surrogateescape"), digest_size=KEY.itemsize).digest()
        for i in range(len(pictures))
    )
    return np.frombuffer(b"".join(digests), KEY)


def first_places(keys: np.ndarray) -> np.ndarray:
    """int64 [U], ascending: where each key stands for the first time."""
    order = np.lexsort((keys["low"], keys["high"]))  # stable: equal keys stay in their order
    ordered = keys[order]
    is_first = np.ones(len(keys), dtype=bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    return np.sort(order[is_first])


def find_keys(keys: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Where each of `keys` stands in `among`, which is sorted by (high, low) and has none twice; -1 where it does not.

    Returns:
        int64 [N].
    """
    found = np.full(len(keys), -1, dtype=np.int64)
    places = np.searchsorted(among["high"], keys["high"])
    looking = np.arange(len(keys))
    while len(looking):  # a second round is for two keys that agree in their first half
        at = places[looking]
        looking = looking[at < len(among)]
        at = places[looking]
        looking = looking[among["high"][at] == keys["high"][looking]]
        at = places[looking]
        is_here = among["low"][at] == keys["low"][looking]
        found[looking[is_here]] = at[is_here]
        looking = looking[~is_here]
        places[looking] += 1
    return found


def stamp_of(pictures: PictureSource, i: int) -> tuple[int, int]:
    """Size and mtime_ns; GONE if the source is not there or cannot be asked for."""
    try:
        return pictures.stamp(i)
    except OSError:
        return GONE


def stamps_of(
    pictures: PictureSource, positions: np.ndarray, should_stop: Callable[[], bool], report_seconds: float
) -> np.ndarray | None:
    """int64 [len(positions), 2]: the stamp of each source; None if told to stop."""
    stamps = np.empty((len(positions), 2), dtype=np.int64)
    progress = Progress("source files looked at", len(positions), report_seconds)

    def look(start: int) -> int:
        end = min(start + _STAT_RANGE, len(positions))
        stamps[start:end] = [stamp_of(pictures, i) for i in positions[start:end].tolist()]
        return end - start

    done = 0
    with ThreadPoolExecutor(_STAT_THREADS) as pool:
        waiting = {pool.submit(look, start) for start in range(0, len(positions), _STAT_RANGE)}
        while waiting:
            finished, waiting = wait(waiting, timeout=1, return_when=FIRST_COMPLETED)
            done += sum(future.result() for future in finished)
            if should_stop():
                pool.shutdown(cancel_futures=True)
                return None
            progress.show(done)
    return stamps
