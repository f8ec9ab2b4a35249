"""Read every image once, with all cores: bytes, format, mode, size, perceptual hash.

Each result is appended to a file, so a stopped scan goes on, and a file is read again only if its size or time changed.
"""

import csv
import hashlib
import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from PIL import Image
from tqdm import tqdm

from dinov2.data.check.near_duplicates import perceptual_hash
from dinov2.data.datasets.decode import UnreadableImageError, decode_image
from dinov2.utils.files import atomic_write
from dinov2.utils.parallel import parallel_map

VERSION = 2  # raise it whenever the same file would give other facts
READABLE, MISSING, UNREADABLE, TRUNCATED = "readable", "missing", "unreadable", "truncated"
SAME_FORMAT = {"MPO": "JPEG", "DIB": "BMP"}


class ImageFacts(NamedTuple):
    """What is known of an image file; `digest` is "" if its bytes could not be read."""

    status: str
    reason: str = ""
    size: int = 0
    digest: str = ""
    format: str = ""
    mode: str = ""
    width: int = 0
    height: int = 0
    is_flat: int = 0
    hash: str = ""


TYPES = {name: "int64" if kind is int else "str" for name, kind in ImageFacts.__annotations__.items()}


def scan(paths: list[str], folder: Path, with_pixels: bool = True, n_workers: int = 1) -> pd.DataFrame:
    """Return the `ImageFacts` of all images, a row each.

    Args:
        paths: absolute.
        folder: for the file with what is known.
        with_pixels: decode the images; else only their bytes are read.
        n_workers: processes.
    """
    file = folder / f"{'pixels' if with_pixels else 'bytes'}_v{VERSION}.csv"
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(16) as pool:  # a network disk answers slowly
        keys = pd.Series(list(pool.map(_key, paths)), dtype=str)
    known = _read_known(file)
    todo = keys.index[~keys.isin(known.index)]
    jobs = [(paths[i], with_pixels) for i in todo]
    facts = []
    with open(file, "a", encoding="utf-8", newline="") as stream:
        for i, found in zip(todo, tqdm(parallel_map(read_facts, jobs, n_workers), "reading", len(jobs)), strict=True):
            facts.append(found)
            if found.digest:
                csv.writer(stream).writerow((keys[i], *found))
            if len(facts) % 100 == 0:
                stream.flush()
    fresh = pd.DataFrame(facts, index=todo, columns=ImageFacts._fields)
    seen = pd.concat([known.reindex(keys).reset_index(drop=True).drop(todo), fresh]).sort_index().astype(TYPES)
    with atomic_write(file) as stream:  # without images that are no longer named
        seen.set_index(keys)[(seen["digest"] != "").to_numpy()].to_csv(stream, header=False, lineterminator="\n")
    return seen


def _key(path: str) -> str:
    """Return a key that changes with a file's path, size and time; "" for a file that is not there."""
    try:
        about = os.stat(path)
    except (OSError, ValueError):  # ValueError: a null character in the path
        return ""
    return hashlib.blake2b(
        os.fsencode(path) + b"\0%d %d" % (about.st_size, about.st_mtime_ns), digest_size=16
    ).hexdigest()


def _read_known(file: Path) -> pd.DataFrame:
    """Read the facts of earlier scans, by key; a line that a kill cut off is removed from the file."""
    data = file.read_bytes() if file.is_file() else b""
    whole = data[: data.rfind(b"\n") + 1]
    names = ["key", *ImageFacts._fields]
    try:
        known = pd.read_csv(io.BytesIO(whole), names=names, dtype={"key": str, **TYPES}, keep_default_na=False)
    except ValueError:  # empty or damaged: everything is read again
        whole, known = b"", pd.DataFrame(columns=names)
    if whole != data:
        os.truncate(file, len(whole))
    return known.drop_duplicates("key").set_index("key")


def read_facts(job: tuple[str, bool]) -> ImageFacts:
    """Read an image file once. Without pixels, a file counts as readable if it has bytes."""
    path, with_pixels = job
    try:
        data = Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return ImageFacts(MISSING)
    except (OSError, ValueError) as error:  # a folder, no right to read, a failing disk, a null character in the path
        return ImageFacts(UNREADABLE, getattr(error, "strerror", None) or str(error))
    if not data:
        return ImageFacts(UNREADABLE, "the file is empty")
    facts = ImageFacts(READABLE, size=len(data), digest=hashlib.blake2b(data, digest_size=16).hexdigest())
    if not with_pixels:
        return facts
    try:
        image = decode_image(data, path)
    except UnreadableImageError as error:
        status = TRUNCATED if "truncated" in error.reason else UNREADABLE
        return facts._replace(status=status, reason=" ".join(error.reason.split()))
    with Image.open(io.BytesIO(data)) as header:
        facts = facts._replace(format=SAME_FORMAT.get(header.format, header.format), mode=header.mode)
    bits, is_flat = perceptual_hash(image)
    height, width = image.shape[:2]
    return facts._replace(width=width, height=height, is_flat=int(is_flat), hash=bits.tobytes().hex())
