"""Images that show the same: candidates by perceptual hash, decided by correlation.

The hash is the signs of the 16 x 16 lowest cosine coefficients of the grey image at 32 x 32. Re-encoding and scaling
change a few of the 256 bits; two cells of one stain differ in some 70. A mirrored image has the odd coefficients with
the opposite sign, so the hash of a turned image follows from the image's own (a threshold at the median, as other
perceptual hashes take it, would not allow that).
"""

from collections.abc import Iterator
from functools import lru_cache

import cv2
import numpy as np
import pandas as pd
from tqdm import tqdm

from dinov2.data.datasets.decode import UnreadableImageError, decode_image
from dinov2.utils.parallel import parallel_map

MAX_DISTANCE = 32  # bits
MAX_NEIGHBOURS = 256
MAX_PAIRS = 2_000_000
FLAT_CONTRAST = 2.0  # below this spread of grey levels, the signs are those of noise
# On 2,084 real images of four sets, different cells reach correlations of 0.964, and 0.80 without coarse structure;
# JPEG at quality 60 after scaling by 0.8 stays above 0.99 and 0.92.
MIN_CORRELATION, MIN_FINE_CORRELATION = 0.975, 0.85
FINE_SIGMA = 4.0

# the eight ways to turn and mirror a square: (transpose first?, mirror left-right?, mirror top-bottom?)
TURNS = tuple((t, x, y) for t in (False, True) for x in (False, True) for y in (False, True))
# each 16-bit word of the hash has a coefficient of every row and column: it tells of coarse and fine structure
_ROWS = np.tile(np.arange(16), 16)
_COLUMNS = (_ROWS + np.repeat(np.arange(16), 16)) % 16


def perceptual_hash(image: np.ndarray) -> tuple[np.ndarray, bool]:
    """Hash uint8 [H, W, 3] to uint64 [4], and say whether the image is too even for its hash to mean anything."""
    grey = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
    return _pack(cv2.dct(small)[:16, :16] > 0), float(small.std()) < FLAT_CONTRAST


def _pack(signs: np.ndarray) -> np.ndarray:
    """Pack bool [..., 16, 16] into uint64 [..., 4]."""
    return np.ascontiguousarray(np.packbits(signs[..., _ROWS, _COLUMNS], axis=-1)).view("<u8")


def turned_hashes(hashes: np.ndarray, turn: int) -> np.ndarray:
    """Compute the hashes [N, 4] that the images would have after a turn."""
    transposes, mirrors_x, mirrors_y = TURNS[turn]
    signs = np.empty((len(hashes), 16, 16), dtype=bool)
    signs[:, _ROWS, _COLUMNS] = np.unpackbits(np.ascontiguousarray(hashes).view(np.uint8), axis=-1)
    if transposes:
        signs = signs.transpose(0, 2, 1)
    is_odd = np.arange(16) % 2 == 1
    return _pack(signs ^ (mirrors_x & is_odd) ^ (mirrors_y & is_odd)[:, None])


def turned(image: np.ndarray, turn: int) -> np.ndarray:
    """Turn an image [H, W, 3] as `turned_hashes` assumes."""
    transposes, mirrors_x, mirrors_y = TURNS[turn]
    if transposes:
        image = image.transpose(1, 0, 2)
    return np.ascontiguousarray(image[:: -1 if mirrors_y else 1, :: -1 if mirrors_x else 1])


def similar_hashes(hashes: np.ndarray, with_turns: bool = False) -> tuple[np.ndarray, int]:
    """Find pairs of hashes that differ in few bits, without comparing each with each.

    Two hashes are compared if one of their sixteen 16-bit words is equal (multi-index hashing, Norouzi et al. 2012), so
    a pair with at most 15 different bits is found, unless it is in a crowd: of many with the same word, each is
    compared with its next `MAX_NEIGHBOURS`. Equal hashes are paired with their first only.

    Args:
        hashes: uint64 [N, 4].
        with_turns: also pair images that are mirrored or turned.

    Returns:
        int64 [K, 2], the smaller position first, sorted, at most `MAX_PAIRS`; and the number of hashes in a crowd.
    """
    _, first, inverse = np.unique(hashes, axis=0, return_index=True, return_inverse=True)
    first_equal = first[inverse.ravel()]
    found = [np.stack([first_equal, np.arange(len(hashes))], axis=1)]
    is_crowded = np.zeros(len(hashes), dtype=bool)
    for turn in range(len(TURNS) if with_turns else 1):
        keys, owners = hashes[first], first
        if turn:
            keys, owners = np.concatenate([keys, turned_hashes(keys, turn)]), np.tile(first, 2)
        for pairs, crowded in _pairs_by_word(keys):
            found.append(np.sort(owners[pairs], axis=1))
            is_crowded[owners[crowded]] = True
            if sum(map(len, found)) > len(hashes) + MAX_PAIRS:
                break
    pairs = np.concatenate(found)
    pairs = np.unique(pairs[pairs[:, 0] != pairs[:, 1]], axis=0)
    return pairs[:MAX_PAIRS], int(is_crowded.sum())


def _pairs_by_word(hashes: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield similar pairs [K, 2] with an equal word, and the positions in a crowd, one word after the other."""
    words = np.ascontiguousarray(hashes).view("<u2")  # [N, 16]
    for word in range(words.shape[1]):
        # likely pairs become neighbours: with an equal word, sorted by the next two
        order = np.lexsort([np.roll(words, -word, axis=1)[:, i] for i in (2, 1, 0)])
        key = words[order, word]
        pairs = [np.zeros((0, 2), dtype=np.int64)]
        start = np.arange(len(key))
        for step in range(1, MAX_NEIGHBOURS + 2):
            start = start[start + step < len(key)]
            start = start[key[start] == key[start + step]]
            if step > MAX_NEIGHBOURS or len(start) == 0:
                break
            a, b = order[start], order[start + step]
            is_near = np.bitwise_count(hashes[a] ^ hashes[b]).sum(axis=1) <= MAX_DISTANCE
            pairs.append(np.stack([a[is_near], b[is_near]], axis=1))
        yield np.concatenate(pairs), order[start]


def find_near_duplicates(images: pd.DataFrame, with_turns: bool, n_workers: int) -> tuple[pd.DataFrame, list[str]]:
    """Find pairs of images that show the same.

    Args:
        images: path and hash.
        with_turns: find mirrored and turned images too.
        n_workers: processes.

    Returns:
        a row for each pair: a and b (of the index of `images`), correlation; and remarks on the search.
    """
    hashes = np.frombuffer(bytes.fromhex("".join(images["hash"])), dtype="<u8").reshape(-1, 4)
    pairs, n_crowded = similar_hashes(hashes, with_turns)
    near = pd.DataFrame(images.index.to_numpy()[pairs], columns=["a", "b"])
    jobs = [(images["path"][a], images["path"][b], with_turns) for a, b in near.itertuples(index=False)]
    results = parallel_map(compare_images, jobs, n_workers if len(jobs) > 50 else 1)
    near["correlation"] = np.fromiter(tqdm(results, "comparing", len(jobs), unit=" pairs", disable=not jobs), float)
    turned_too = "mirrored and turned ones too" if with_turns else "mirrored and turned ones were not searched"
    remarks = [f"Near-duplicates: re-encoded, scaled, slightly brighter or darker copies; {turned_too}."]
    if n_crowded:
        remarks.append(
            f"{n_crowded} images look like so many others that some of their near-duplicates may be missing."
        )
    if len(pairs) == MAX_PAIRS:
        remarks.append(f"More than {MAX_PAIRS} pairs have similar hashes: the rest was not compared.")
    return near[near["correlation"] > 0], remarks


@lru_cache(maxsize=64)
def _thumbnail(path: str) -> np.ndarray | None:
    try:
        image = np.ascontiguousarray(decode_image(path))
    except UnreadableImageError:
        return None
    return cv2.resize(image, (64, 64), interpolation=cv2.INTER_AREA).astype(np.float32)


def compare_images(job: tuple[str, str, bool]) -> float:
    """Correlate two image files, the second in all turns if asked for; 0 if they do not show the same."""
    one, other, with_turns = job
    a, b = _thumbnail(one), _thumbnail(other)
    if a is None or b is None:
        return 0.0
    values = []
    for turn in range(len(TURNS) if with_turns else 1):
        image = turned(b, turn)
        fine_a, fine_b = (x - cv2.GaussianBlur(x, (0, 0), FINE_SIGMA) for x in (a, image))
        if _correlation(fine_a, fine_b) >= MIN_FINE_CORRELATION:
            values.append(_correlation(a, image))
    best = max(values, default=0.0)
    return best if best >= MIN_CORRELATION else 0.0


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = (x - x.mean(axis=(0, 1)) for x in (a, b))  # colours on their own: a tint is no structure
    scale = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / scale if scale > 0 else 0.0
