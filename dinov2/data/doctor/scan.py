"""Look at every picture once, with all cores: bytes, format, mode, size, perceptual hash. One array row a picture.

A killed scan goes on: what is known is kept by chunks of paths in files of their own, and a picture is looked at again
only if its size or time of change differ. Letters: N pictures.
"""

import hashlib
import io
import json
import logging
import multiprocessing
import os
import stat
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image

from dinov2.data.datasets.decode import UnreadableImageError, decode_image
from dinov2.data.doctor.fingerprint import TURNS, perceptual_hash, similarity, thumbnail, turned
from dinov2.utils.files import atomic_write
from dinov2.utils.pool_workers import become_pool_worker

logger = logging.getLogger("dinov2")

VERSION = 1  # raise it whenever the same file would give another row
CHUNK = 250
N_PAIRS_IN_CHUNK = 50
SECONDS_BETWEEN_REPORTS = 5.0
N_KEPT_THUMBNAILS = 64

READABLE, MISSING, UNREADABLE, TRUNCATED = range(4)
FORMATS = ("", "JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "JPEG2000", "other")
MODES = ("", "RGB", "L", "1", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "LAB", "I", "I;16", "16-bit RGB", "other")
_ALIASES = {"MPO": "JPEG", "DIB": "BMP", "I;16B": "I;16", "I;16L": "I;16"}

ROW = np.dtype(
    [
        ("status", "u1"),  # READABLE, ...
        ("format", "u1"),  # position in FORMATS
        ("mode", "u1"),  # position in MODES
        ("is_flat", "?"),  # so even that its perceptual hash means nothing
        ("width", "<u4"),
        ("height", "<u4"),
        ("size", "<i8"),  # bytes
        ("mtime", "<i8"),  # nanoseconds
        ("digest", "<u8", 2),  # of the bytes
        ("hash", "<u8", 4),  # perceptual
    ]
)


@dataclass(eq=False)
class Scan:
    """What was seen.

    Attributes:
        rows: `ROW` [N].
        reasons: {picture: why it cannot be read}; of unreadable and truncated pictures only.
    """

    rows: np.ndarray
    reasons: dict[int, str]


class _Chunk(NamedTuple):
    start: int
    paths: list[str]
    file: Path
    with_pixels: bool


class _Seen(NamedTuple):
    start: int
    rows: np.ndarray
    reasons: dict[int, str]  # by position in the chunk
    file: Path


def look_at(path: str, with_pixels: bool = True) -> tuple[np.ndarray, str]:
    """One row of `ROW`, and why the picture cannot be read, or "". The file is read once.

    Without pixels a file counts as readable if its bytes can be had.
    """
    row = np.zeros((), dtype=ROW)
    try:
        about = os.stat(path)
        if not stat.S_ISREG(about.st_mode):
            row["status"] = UNREADABLE
            return row, "not a file"
        row["size"], row["mtime"] = about.st_size, about.st_mtime_ns
        with open(path, "rb") as file:
            data = file.read()
    except (FileNotFoundError, NotADirectoryError):
        row["status"] = MISSING
        return row, ""
    except (OSError, ValueError) as error:  # no right to read, a failing disk; a null character in the path
        row["status"] = UNREADABLE
        return row, getattr(error, "strerror", None) or str(error)
    row["digest"] = np.frombuffer(hashlib.blake2b(data, digest_size=16).digest(), dtype="<u8")
    if not data:
        row["status"] = UNREADABLE
        return row, "the file is empty"
    if not with_pixels:
        return row, ""
    try:
        image = decode_image(data, path)
        row["format"], row["mode"] = _format_and_mode(data)
    except UnreadableImageError as error:
        row["status"] = TRUNCATED if "truncated" in error.reason else UNREADABLE
        return row, error.reason
    row["height"], row["width"] = image.shape[:2]
    row["hash"], row["is_flat"] = perceptual_hash(image)
    return row, ""


def _format_and_mode(data: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(data)) as image:  # the header only, of a file that has just been decoded
        name, mode = image.format or "", image.mode
        is_deep_png = name == "PNG" and data[24] == 16
        is_deep_tiff = name == "TIFF" and max(getattr(image, "tag_v2", {}).get(258, (8,))) == 16
    if mode in ("RGB", "RGBA") and (is_deep_png or is_deep_tiff):
        mode = "16-bit RGB"
    name, mode = _ALIASES.get(name, name), _ALIASES.get(mode, mode)
    return (
        FORMATS.index(name if name in FORMATS else "other"),
        MODES.index(mode if mode in MODES else "other"),
    )


# --- chunks ---------------------------------------------------------------------------------------------------------


def _look_at_chunk(chunk: _Chunk) -> _Seen:
    """Rows of a chunk of paths, from its file where that still holds."""
    before = _read_chunk(chunk.file, len(chunk.paths))
    rows = np.zeros(len(chunk.paths), dtype=ROW)
    reasons: dict[int, str] = {}
    is_news = before is None
    for i, path in enumerate(chunk.paths):
        if before is not None and _is_unchanged(path, before.rows[i]):
            rows[i] = before.rows[i]
            reason = before.reasons.get(i, "")
        else:
            rows[i], reason = look_at(path, chunk.with_pixels)
            is_news = True
        if reason:
            reasons[i] = reason
    if is_news:
        with atomic_write(chunk.file) as file:
            np.savez(file, rows=rows, reasons=np.array(json.dumps(sorted(reasons.items()))))
    return _Seen(chunk.start, rows, reasons, chunk.file)


def _read_chunk(file: Path, n: int) -> _Seen | None:
    try:
        with np.load(file) as arrays:
            rows, reasons = arrays["rows"], dict(json.loads(str(arrays["reasons"])))
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        return None  # not there yet, or damaged: looked at again
    return _Seen(0, rows, reasons, file) if rows.dtype == ROW and len(rows) == n else None


def _is_unchanged(path: str, row: np.ndarray) -> bool:
    # what could not be read is tried again: rights and network disks change without a trace in the file
    if row["status"] in (MISSING, UNREADABLE) and not row["digest"].any():
        return False
    try:
        about = os.stat(path)
    except (OSError, ValueError):
        return False
    return bool(row["size"] == about.st_size and row["mtime"] == about.st_mtime_ns)


def scan(
    n_pictures: int, path_of: Callable[[int], str], folder: Path, with_pixels: bool = True, n_workers: int = 1
) -> Scan:
    """Look at all pictures.

    Args:
        n_pictures: N.
        path_of: gives the absolute path of a picture.
        folder: for the files with what is known; those of other sets of paths are removed at the end.
        with_pixels: decode too; else only bytes are looked at.
        n_workers: processes.

    Raises:
        ValueError: if a process ended by itself.
    """
    rows, reasons = np.zeros(n_pictures, dtype=ROW), {}
    used = set()
    progress = _Progress("looked at", n_pictures, "pictures")
    for seen in _in_processes(_look_at_chunk, _chunks(n_pictures, path_of, folder, with_pixels), n_workers):
        rows[seen.start : seen.start + len(seen.rows)] = seen.rows
        reasons.update({seen.start + i: reason for i, reason in seen.reasons.items()})
        used.add(seen.file)
        progress.add(len(seen.rows))
    progress.end()
    for file in folder.glob("*.npz"):
        if file not in used:
            file.unlink()
    return Scan(rows, reasons)


def _chunks(n_pictures: int, path_of: Callable[[int], str], folder: Path, with_pixels: bool) -> Iterator[_Chunk]:
    for start in range(0, n_pictures, CHUNK):
        paths = [path_of(i) for i in range(start, min(start + CHUNK, n_pictures))]
        key = hashlib.blake2b(f"{VERSION} {with_pixels}".encode(), digest_size=12)
        for path in paths:
            key.update(b"\0" + os.fsencode(path))
        yield _Chunk(start, paths, folder / f"{key.hexdigest()}.npz", with_pixels)


# --- pairs ----------------------------------------------------------------------------------------------------------


class _Pairs(NamedTuple):
    start: int
    paths: list[tuple[str, str]]
    turns: list[int]


def compare_pictures(
    pairs: np.ndarray, turns: np.ndarray, path_of: Callable[[int], str], n_workers: int = 1
) -> np.ndarray:
    """Decode both pictures of each pair and compare them.

    Args:
        pairs: int64 [K, 2].
        turns: int64 [K], as `duplicates.NearPairs` has them.
        path_of: gives the absolute path of a picture.
        n_workers: processes.

    Returns:
        float32 [K, 2]: correlation and that of the fine structure, see `fingerprint.similarity`; 0 where a picture
        cannot be read any more.
    """
    result = np.zeros((len(pairs), 2), dtype=np.float32)
    progress = _Progress("compared", len(pairs), "pairs of pictures")
    chunks = (
        _Pairs(
            start,
            [(path_of(int(a)), path_of(int(b))) for a, b in pairs[start : start + N_PAIRS_IN_CHUNK]],
            turns[start : start + N_PAIRS_IN_CHUNK].tolist(),
        )
        for start in range(0, len(pairs), N_PAIRS_IN_CHUNK)
    )
    for start, values in _in_processes(_compare_chunk, chunks, n_workers if len(pairs) > N_PAIRS_IN_CHUNK else 1):
        result[start : start + len(values)] = values
        progress.add(len(values))
    return result


def _compare_chunk(chunk: _Pairs) -> tuple[int, np.ndarray]:
    thumbnails: OrderedDict[tuple[str, int], np.ndarray | None] = OrderedDict()

    def get(path: str, turn: int) -> np.ndarray | None:
        if (path, turn) not in thumbnails:
            try:
                thumbnails[path, turn] = thumbnail(turned(decode_image(path), turn))
            except UnreadableImageError:
                thumbnails[path, turn] = None
            if len(thumbnails) > N_KEPT_THUMBNAILS:
                thumbnails.popitem(last=False)
        return thumbnails[path, turn]

    values = np.zeros((len(chunk.paths), 2), dtype=np.float32)
    for i, ((a, b), turn) in enumerate(zip(chunk.paths, chunk.turns, strict=True)):
        # a quarter turn is undone by another one, and which of the two was turned is not known
        ways = [(get(a, 0), get(b, turn)), (get(a, turn), get(b, 0))] if TURNS[turn][0] else [(get(a, 0), get(b, turn))]
        values[i] = max((similarity(x, y) for x, y in ways if x is not None and y is not None), default=(0.0, 0.0))
    return chunk.start, values


# --- processes ------------------------------------------------------------------------------------------------------


def _in_processes(work: Callable[[Any], Any], chunks: Iterable[Any], n_workers: int) -> Iterator[Any]:
    """Results of the chunks as they come; few chunks are on their way at a time. One worker works in this process."""
    if n_workers == 1:
        yield from map(work, chunks)
        return
    # a server that has imported the libraries forks the workers: each starts in milliseconds, without this process's
    # threads and locks
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pool: Executor = ProcessPoolExecutor(n_workers, context, initializer=_begin)
    waiting: set[Future[Any]] = set()
    try:
        for chunk in chunks:
            waiting.add(pool.submit(work, chunk))
            if len(waiting) >= 2 * n_workers:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    except BrokenProcessPool as error:
        raise ValueError(
            f"--workers {n_workers}: a process that looked at pictures ended by itself, perhaps for lack of memory; "
            f"what it had finished is kept: start the same command again, with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)  # what has begun takes a second and is kept


def _begin() -> None:
    become_pool_worker()
    cv2.setNumThreads(1)


class _Progress:
    """Tells every few seconds how far the work is, how fast, and how long it still takes."""

    def __init__(self, verb: str, total: int, unit: str) -> None:
        self._verb, self._total, self._unit = verb, total, unit
        self._n_done = 0
        self._start = self._last = time.monotonic()

    def add(self, n: int) -> None:
        self._n_done += n
        now = time.monotonic()
        if now - self._last >= SECONDS_BETWEEN_REPORTS and self._n_done < self._total:
            self._last = now
            rate = self._n_done / (now - self._start)
            minutes, seconds = divmod(round((self._total - self._n_done) / rate), 60)
            logger.info(
                "%s %d of %d %s, %.0f/s, about %d:%02d min left",
                *(self._verb, self._n_done, self._total, self._unit, rate, minutes, seconds),
            )

    def end(self) -> None:
        seconds = max(time.monotonic() - self._start, 1e-9)
        rate = self._n_done / seconds
        logger.info("%s %d %s in %.1f s (%.0f/s)", self._verb, self._n_done, self._unit, seconds, rate)
