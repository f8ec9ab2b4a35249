"""Images that show the same, by perceptual hash.

The hash is the signs of the 16 x 16 lowest cosine coefficients of the grey image at 32 x 32. Re-encoding and scaling
change a few of the 256 bits. Of 2,249 real images of four sets, the two most alike differ in 63. A mirrored image has
the odd coefficients with the opposite sign, so the hash of a turned image follows from the image's own (a threshold at
the median, as other perceptual hashes take it, would not allow that).
"""

import cv2
import numpy as np

MAX_DISTANCE = 32  # bits
MAX_NEIGHBOURS = 256
FLAT_CONTRAST = 2.0  # below this spread of grey levels, the signs are those of noise

# the eight ways to turn and mirror a square: (transpose first?, mirror left-right?, mirror top-bottom?)
TURNS = tuple((t, x, y) for t in (False, True) for x in (False, True) for y in (False, True))
# each 16-bit word of the hash has a coefficient of every row and column: it tells of coarse and fine structure
_ROWS = np.tile(np.arange(16), 16)
_COLUMNS = (_ROWS + np.repeat(np.arange(16), 16)) % 16


def perceptual_hash(image: np.ndarray) -> np.ndarray:
    """Hash uint8 [H, W, 3] to uint64 [4]; [0] if the image is too even for a hash to mean anything."""
    grey = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
    if small.std() < FLAT_CONTRAST:
        return np.zeros(0, dtype=np.uint64)
    return _pack(cv2.dct(small)[:16, :16] > 0)


def _pack(signs: np.ndarray) -> np.ndarray:
    """Pack bool [..., 16, 16] into uint64 [..., 4]."""
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
    """Find pairs of hashes that differ in few bits, without comparing each with each.

    Two hashes [N, 4] are compared if one of their sixteen 16-bit words is equal (multi-index hashing, Norouzi et al.
    2012), so a pair with at most 15 different bits is found, unless it is in a crowd: of many with the same word, each
    is compared with its next `MAX_NEIGHBOURS`. Equal hashes are paired with their first only.

    Returns:
        int64 [K, 2], the smaller position first, sorted.
    """
    different, first, inverse = np.unique(hashes, axis=0, return_index=True, return_inverse=True)
    found = [np.stack([first[inverse.ravel()], np.arange(len(hashes))], axis=1)]
    for turn in TURNS if with_turns else TURNS[:1]:
        keys = np.concatenate([different, turned_hashes(different, *turn)]) if any(turn) else different
        words = keys.view("<u2")  # [N, 16]
        for word in range(words.shape[1]):
            # likely pairs become neighbours: with an equal word, sorted by the next two
            order = np.lexsort([words[:, (word + i) % 16] for i in (2, 1, 0)])
            start = np.arange(len(order))
            for step in range(1, MAX_NEIGHBOURS + 1):
                start = start[start + step < len(order)]
                start = start[words[order[start], word] == words[order[start + step], word]]
                if len(start) == 0:
                    break
                pairs = np.stack([order[start], order[start + step]], axis=1)
                is_near = np.bitwise_count(keys[pairs[:, 0]] ^ keys[pairs[:, 1]]).sum(axis=1) <= MAX_DISTANCE
                found.append(np.sort(first[pairs[is_near] % len(first)], axis=1))
    pairs = np.concatenate(found)
    return np.unique(pairs[pairs[:, 0] != pairs[:, 1]], axis=0)
