"""Which pictures are the same: by their bytes, and nearly, by perceptual hash. Arrays in, arrays out.

Letters: N pictures, K pairs.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dinov2.data.doctor.fingerprint import TURNS, turned_hashes
from dinov2.data.doctor.inputs import first_of_equal

logger = logging.getLogger("dinov2")

# Of the 16 words of a hash at least one is equal where 15 bits or fewer differ; beyond that, up to here, most pairs
# still have an equal word.
MAX_DISTANCE = 32
# In a crowd, pictures with one equal word, each is compared with so many neighbours in the order of the other words.
MAX_NEIGHBOURS = 256
MAX_PAIRS = 2_000_000


@dataclass(frozen=True, eq=False)
class NearPairs:
    """Pairs of pictures with similar hashes.

    Attributes:
        pairs: int64 [K, 2], positions, the smaller first; sorted, no pair twice.
        turns: int64 [K], position in `fingerprint.TURNS`: how the second is turned to be like the first.
        n_crowded: pictures with so many of like hash that not all were compared in some part of it.
        is_cut: whether there were more than `MAX_PAIRS`, and the rest is missing.
    """

    pairs: np.ndarray
    turns: np.ndarray
    n_crowded: int = 0
    is_cut: bool = False


def same_bytes(sizes: np.ndarray, digests: np.ndarray, is_read: np.ndarray) -> np.ndarray:
    """For each picture the first with the same content, itself where it is the first or could not be read.

    Args:
        sizes: int64 [N], bytes.
        digests: uint64 [N, 2], of the bytes.
        is_read: bool [N]; what is not read equals nothing.

    Returns:
        int64 [N].
    """
    own = np.where(is_read, -1, np.arange(len(sizes)))
    return first_of_equal(sizes, digests[:, 0], digests[:, 1], own)


def near_pairs(
    hashes: np.ndarray, with_turns: bool = False, max_distance: int = MAX_DISTANCE, max_neighbours: int = MAX_NEIGHBOURS
) -> NearPairs:
    """All pairs that differ in few bits, without comparing each with each.

    Hashes that have one of sixteen 16-bit words in common are compared (Norouzi, Punjani and Fleet 2012, "Fast search
    in Hamming space with multi-index hashing"), so a pair with at most 15 different bits is always found, unless it is
    in a crowd. Equal hashes are paired with their first only.

    Args:
        hashes: uint64 [N, 4].
        with_turns: also look for mirrored and turned pictures.
        max_distance: most different bits of a pair.
        max_neighbours: comparisons of each picture in a crowd.
    """
    n = len(hashes)
    first = first_of_equal(*hashes.T)
    is_first = first == np.arange(n)
    again = np.flatnonzero(~is_first)
    firsts = np.flatnonzero(is_first)
    found = [(np.stack([first[again], again], axis=1), 0)]
    n_found, is_crowded, is_cut = len(again), np.zeros(n, dtype=bool), False
    for turn in range(len(TURNS) if with_turns else 1):
        if turn == 0:
            keys, who, side = hashes[firsts], firsts, None
        else:
            keys = np.concatenate([hashes[firsts], turned_hashes(hashes[firsts], turn)])
            who, side = np.tile(firsts, 2), np.repeat([False, True], len(firsts))
        for positions, crowded in _alike(keys, side, max_distance, max_neighbours):
            is_crowded[who[crowded]] = True
            pairs = np.sort(who[positions], axis=1)
            pairs = pairs[pairs[:, 0] != pairs[:, 1]]  # a symmetric picture is like itself when turned
            n_found += len(pairs)
            found.append((pairs, turn))
            if n_found > MAX_PAIRS:
                is_cut = True
                break
        if is_cut:
            break
    pairs = np.concatenate([pairs for pairs, _ in found])
    turns = np.concatenate([np.full(len(pairs), turn) for pairs, turn in found])
    kept = np.flatnonzero(first_of_equal(pairs[:, 0], pairs[:, 1]) == np.arange(len(pairs)))
    kept = kept[np.lexsort((pairs[kept, 1], pairs[kept, 0]))][:MAX_PAIRS]
    return NearPairs(pairs[kept], turns[kept], int(is_crowded.sum()), is_cut)


def _alike(
    hashes: np.ndarray, side: np.ndarray | None, max_distance: int, max_neighbours: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions of pairs [K, 2] at most so far apart, and positions in crowds, for one word after the other.

    With `side` (bool [N]) only pairs with one on each side.
    """
    words = np.ascontiguousarray(hashes).view("<u2")  # [N, 16]
    n_words = words.shape[1]
    for word in range(n_words):
        # within an equal word, likely twins should be neighbours: sorted by the next words
        next_words = [words[:, (word + i) % n_words] for i in range(3)]
        order = np.lexsort(next_words[::-1])
        key = words[order, word]
        parts = []
        start = np.arange(len(key) - 1)
        for step in range(1, max_neighbours + 1):
            start = start[: np.searchsorted(start, len(key) - step)]
            start = start[key[start] == key[start + step]]
            if not len(start):
                break
            a, b = order[start], order[start + step]
            if side is not None:
                a, b = a[side[a] != side[b]], b[side[a] != side[b]]
            is_near = np.bitwise_count(hashes[a] ^ hashes[b]).sum(axis=1) <= max_distance
            parts.append(np.stack([a[is_near], b[is_near]], axis=1))
        last = start[: np.searchsorted(start, len(key) - max_neighbours - 1)]
        crowded = order[last[key[last] == key[last + max_neighbours + 1]]] if len(last) else last
        yield np.concatenate(parts) if parts else np.zeros((0, 2), dtype=np.int64), crowded
