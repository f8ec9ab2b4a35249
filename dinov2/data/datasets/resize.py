"""Lanczos resizing with Pillow's result, bit for bit, in a third of its time: two passes of sparse sums.

Dimension key:  H height, W width, T filter taps, [n] pixels of an axis after the resize
"""

from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

LANCZOS_A = 3  # lobes on each side of the centre
WEIGHT_STEPS = 2**22  # per unit, in Pillow
SUM_ERROR = 2.0**-15  # levels for each tap: more than what a float32 sum, below 512 all along, loses at a step
ROWS_AT_ONCE = 512  # bounds the float32 copy of a large picture


class Span(NamedTuple):
    """What a resized axis shows of the original one, from `start` to `end`, in pixels."""

    start: float
    end: float


class Taps(NamedTuple):
    """The filter of an axis.

    Attributes:
        first, end: the range of pixels that it reads.
        lines: int64 [n, T] pixels that each new one is a weighted sum of, counted from `first`.
        weights: float32 [n, T], rows summing to 1.
    """

    first: int
    end: int
    lines: Tensor
    weights: Tensor


def resize_lanczos(picture: np.ndarray, height: int, width: int, rows: Span, columns: Span) -> np.ndarray:
    """Cut out a box, whose borders may lie between pixels, and resize it, as Pillow's `resize(box=...)`.

    As in Pillow the filter (Duchon 1979) is widened by the scale where the picture shrinks, reaches over pixels outside
    the box, is cut off at the picture's borders and normalised; its weights are whole multiples of 2^-22; values are
    rounded and clamped to 0-255 after each pass, which at edges decides about many levels. The few float32 sums that
    are too near to a half to be rounded safely are computed again with integers. The horizontal pass is always the
    first, as in Pillow up to 12; Pillow 13 turns the order for pictures that are much taller than wide.

    Args:
        picture: uint8 [H, W, 3].
        height: rows of the result.
        width: columns of the result.
        rows: within 0 and H.
        columns: within 0 and W.

    Returns:
        uint8 [height, width, 3], contiguous, never sharing memory with `picture`.
    """
    vertical, horizontal = _taps(len(picture), height, *rows), _taps(picture.shape[1], width, *columns)
    picture = picture[vertical.first : vertical.end, horizontal.first : horizontal.end]
    narrowed = np.empty((len(picture), width, 3), dtype=np.uint8)
    for top in range(0, len(picture), ROWS_AT_ONCE):
        part = picture[top : top + ROWS_AT_ONCE]
        filtered = _filter_lines(cv2.transpose(part), horizontal)  # [width, rows of the part, 3]
        cv2.transpose(filtered, dst=narrowed[top : top + ROWS_AT_ONCE])
    return _filter_lines(narrowed, vertical)


def _filter_lines(picture: np.ndarray, taps: Taps) -> np.ndarray:
    """Replace the lines of [lines, length, 3] by weighted sums of them: [n, length, 3]."""
    lines = torch.from_numpy(picture).flatten(1).float()  # [lines, length * 3]
    # A product with a sparse matrix, for which the embedding bag is torch's fastest kernel.
    bags = torch.nn.functional.embedding_bag(taps.lines, lines, per_sample_weights=taps.weights, mode="sum")
    # OpenCV rounds and saturates in one go, but takes absolute values, so no negative ones may be left.
    sums: np.ndarray = bags.relu_().numpy()  # [n, length * 3]
    error = SUM_ERROR * taps.lines.shape[1]
    rounded, lower = cv2.convertScaleAbs(sums, beta=error), cv2.convertScaleAbs(sums, beta=-error)
    doubtful = np.flatnonzero(rounded != lower)
    if len(doubtful):
        row, column = np.divmod(doubtful, rounded.shape[1])
        pixels = picture.reshape(len(picture), -1)[taps.lines.numpy()[row], column[:, None]]  # [doubtful, T]
        exact = (pixels * (taps.weights.numpy()[row] * WEIGHT_STEPS).astype(np.int64)).sum(axis=1)
        rounded.ravel()[doubtful] = ((exact + WEIGHT_STEPS // 2) // WEIGHT_STEPS).clip(0, 255)
    return rounded.reshape(-1, *picture.shape[1:])


@lru_cache(maxsize=128)  # pictures of a data set share few sizes
def _taps(n_in: int, n_out: int, start: float, end: float) -> Taps:
    single = np.float32(start), np.float32(end)  # Pillow's boxes have single precision, and so has their size
    start, scale = float(single[0]), float(single[1] - single[0]) / n_out
    widening = max(scale, 1.0)
    radius = LANCZOS_A * widening
    centres = start + (np.arange(n_out) + 0.5) * scale  # [n]
    firsts = np.maximum(np.trunc(centres - radius + 0.5), 0).astype(np.int64)
    ends = np.minimum(np.trunc(centres + radius + 0.5), n_in).astype(np.int64)
    lines = firsts[:, None] + np.arange((ends - firsts).max())  # [n, T]
    distances = (lines + 0.5 - centres[:, None]) / widening
    weights = np.where(np.abs(distances) < LANCZOS_A, np.sinc(distances) * np.sinc(distances / LANCZOS_A), 0)
    weights[lines >= ends[:, None]] = 0
    weights /= weights.sum(axis=1, keepdims=True)
    weights = np.rint(weights * WEIGHT_STEPS) / WEIGHT_STEPS
    first, end = int(firsts.min()), int(ends.max())
    lines = np.minimum(lines, end - 1)  # those past the end have weight 0, but must exist
    return Taps(first, end, torch.from_numpy(lines - first), torch.from_numpy(weights.astype(np.float32)))
