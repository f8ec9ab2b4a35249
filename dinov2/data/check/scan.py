"""Read every image once, with all cores: its bytes, mode, size and perceptual hash; and compare the hashes.

Each result is appended to a file, so a stopped scan continues; a file is read again only if its size or time changed.

The hash is the signs of the 16 x 16 lowest cosine coefficients of the grey image at 32 x 32. Re-encoding and scaling
change a few of the 256 bits. Of 2,249 real images of four sets, the two most alike differ in 63. A mirrored image has
the odd coefficients with the opposite sign, so the hash of a turned image follows from the image's own. The hashes of
imagehash compare with the median instead, which does not allow that.

Letters: N images
"""

import hashlib
import io
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pandas as pd
from PIL import Image

from dinov2.data.datasets.decode import UnreadableImageError, decode_image
from dinov2.utils.command import progress_bar
from dinov2.utils.parallel import parallel_map

VERSION = 3  # raise it whenever the same file would give other facts
READABLE, MISSING, UNREADABLE = "readable", "missing", "unreadable"

MAX_DISTANCE = 32  # bits
MAX_NEIGHBOURS = 256
FLAT_CONTRAST = 2.0  # of grey levels; below this standard deviation, the signs are those of noise
# the eight ways to turn and mirror a square: (transpose first?, mirror left-right?, mirror top-bottom?)
TURNS = tuple((t, x, y) for t in (False, True) for x in (False, True) for y in (False, True))
# each 16-bit word of the hash has a coefficient of every row and column, so it covers coarse and fine structure
_ROWS = np.tile(np.arange(16), 16)
_COLUMNS = (_ROWS + np.repeat(np.arange(16), 16)) % 16


class ImageFacts(NamedTuple):
    """The facts of an image file; `digest` is "" if its bytes cannot be read, `hash` is "" if it has no contrast."""

    status: str
    reason: str = ""
    size: int = 0
    digest: str = ""
    mode: str = ""
    width: int = 0
    height: int = 0
    hash: str = ""


def scan_images(paths: list[str], folder: Path, with_pixels: bool = True, n_workers: int = 1) -> pd.DataFrame:
    """Return the `ImageFacts` of all images, a row each; a file in `folder` keeps them."""
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
        bar = progress_bar(parallel_map(read_facts, jobs, n_workers), "reading", len(jobs))
        for i, facts in zip(todo, bar, strict=True):
            known[keys[i]] = facts
            if facts.digest:
                stream.write(json.dumps([keys[i], *facts]) + "\n")
    return pd.DataFrame([known[key] for key in keys], columns=ImageFacts._fields)


def _key(path: str) -> str:
    """Return a key that changes with a file's path, size and time."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a null character in the path
        return path
    return f"{status.st_size} {status.st_mtime_ns} {path}"


def read_facts(job: tuple[str, bool]) -> ImageFacts:
    """Read the facts of an image file, given (path, whether to decode it)."""
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


def perceptual_hash(image: np.ndarray) -> np.ndarray:
    """Hash uint8 [H, W, 3] to uint64 [4]; to [0] if the image has too little contrast for a meaningful hash."""
    grey = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
    if small.std() < FLAT_CONTRAST:
        return np.zeros(0, dtype=np.uint64)
    return _pack(cv2.dct(small)[:16, :16] > 0)


def _pack(signs: np.ndarray) -> np.ndarray:
    """Pack bool [..., 16, 16] into uint64 [..., 4], with the bits in the order of `_ROWS` and `_COLUMNS`."""
    return np.ascontiguousarray(np.packbits(signs[..., _ROWS, _COLUMNS], axis=-1)).view("<u8")


def turned_hashes(hashes: np.ndarray, transposes: bool, mirrors_x: bool, mirrors_y: bool) -> np.ndarray:
    """Compute the hashes [N, 4] that the images would have after a turn, see `TURNS`."""
    signs = np.empty((len(hashes), 16, 16), dtype=bool)
    signs[:, _ROWS, _COLUMNS] = np.unpackbits(hashes.view(np.uint8), axis=-1)
    if transposes:
        signs = signs.transpose(0, 2, 1)
    is_odd = np.arange(16) % 2 == 1
    return _pack(signs ^ (mirrors_x & is_odd) ^ (mirrors_y & is_odd)[:, None])


def similar_hashes(hashes: np.ndarray, with_turns: bool = False) -> np.ndarray:
    """Find pairs of hashes [N, 4] that differ in few bits, without comparing every pair.

    Two hashes are compared if one of their sixteen 16-bit words is equal (multi-index hashing, Norouzi et al. 2012).
    That finds every pair with at most 15 different bits, except where many hashes share a word: each of those is
    compared with its next `MAX_NEIGHBOURS`. Equal hashes are paired with the first of them only. The pairs, int64
    [number of pairs, 2], are sorted, the smaller position first.
    """
    different, first, inverse = np.unique(hashes, axis=0, return_index=True, return_inverse=True)
    pairs = [np.stack([first[inverse.ravel()], np.arange(len(hashes))], axis=1)]
    for turn in TURNS if with_turns else TURNS[:1]:
        keys = np.concatenate([different, turned_hashes(different, *turn)]) if any(turn) else different
        words = keys.view("<u2")  # [number of keys, 16]
        for word in range(words.shape[1]):
            # sort by this word and the next two, so that likely pairs become neighbours
            order = np.lexsort([words[:, (word + i) % 16] for i in (2, 1, 0)])
            start = np.arange(len(order))
            for step in range(1, MAX_NEIGHBOURS + 1):
                start = start[start + step < len(order)]
                start = start[words[order[start], word] == words[order[start + step], word]]
                if len(start) == 0:
                    break
                candidates = np.stack([order[start], order[start + step]], axis=1)
                n_bits = np.bitwise_count(keys[candidates[:, 0]] ^ keys[candidates[:, 1]]).sum(axis=1)
                pairs.append(np.sort(first[candidates[n_bits <= MAX_DISTANCE] % len(first)], axis=1))
    merged = np.concatenate(pairs)
    return np.unique(merged[merged[:, 0] != merged[:, 1]], axis=0)
