"""Read every image once, with all cores: bytes, mode, size, perceptual hash.

Each result is appended to a file, so a stopped scan goes on, and a file is read again only if its size or time changed.
"""

import hashlib
import io
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from PIL import Image
from tqdm import tqdm

from dinov2.data.check.near_duplicates import perceptual_hash
from dinov2.data.datasets.decode import UnreadableImageError, decode_image
from dinov2.utils.parallel import parallel_map

VERSION = 3  # raise it whenever the same file would give other facts
READABLE, MISSING, UNREADABLE = "readable", "missing", "unreadable"


class ImageFacts(NamedTuple):
    """What is known of an image file; `digest` is "" if its bytes could not be read, `hash` if it has no contrast."""

    status: str
    reason: str = ""
    size: int = 0
    digest: str = ""
    mode: str = ""
    width: int = 0
    height: int = 0
    hash: str = ""


def scan(paths: list[str], folder: Path, with_pixels: bool = True, n_workers: int = 1) -> pd.DataFrame:
    """Return the `ImageFacts` of all images, a row each; `folder` keeps the file with what is known."""
    file = folder / f"{'pixels' if with_pixels else 'bytes'}_v{VERSION}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(16) as pool:  # a network disk answers slowly
        keys = list(pool.map(_key, paths))
    known = {}
    with open(file, "a+", encoding="ascii", errors="replace") as stream:
        stream.seek(0)
        for line in stream:
            try:
                key, *values = json.loads(line)
            except ValueError:  # a kill cut it off
                continue
            known[key] = ImageFacts(*values)
        todo = [i for i, key in enumerate(keys) if key not in known]
        jobs = [(paths[i], with_pixels) for i in todo]
        stream.write("\n")  # ends a line that was cut off
        for i, facts in zip(todo, tqdm(parallel_map(read_facts, jobs, n_workers), "reading", len(jobs)), strict=True):
            known[keys[i]] = facts
            if facts.digest:
                stream.write(json.dumps([keys[i], *facts]) + "\n")
    return pd.DataFrame([known[key] for key in keys], columns=ImageFacts._fields)


def _key(path: str) -> str:
    """Return a key that changes with a file's path, size and time."""
    try:
        about = os.stat(path)
    except (OSError, ValueError):  # ValueError: a null character in the path
        return path
    return f"{about.st_size} {about.st_mtime_ns} {path}"


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
        return facts._replace(status=UNREADABLE, reason=" ".join(error.reason.split()))
    with Image.open(io.BytesIO(data)) as header:
        mode = header.mode
    height, width = image.shape[:2]
    return facts._replace(mode=mode, width=width, height=height, hash=perceptual_hash(image).tobytes().hex())
