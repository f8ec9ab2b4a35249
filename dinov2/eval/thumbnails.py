"""Small pictures of many cells on few sheets, as one page can carry them.

Letters: N pictures, S side of a thumbnail in pixels
"""

import io
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from dinov2.data.datasets.decode import UnreadableImageError, decode_image, resize_image

logger = logging.getLogger("dinov2")

N_COLUMNS = 16
PER_SHEET = 256  # some 300 kB a sheet at 40 px: quick to decode when a cell on it is looked at
QUALITY = 78
EMPTY = 128  # grey level where a picture could not be read
SECONDS_BETWEEN_REPORTS = 10.0


@dataclass(frozen=True)
class ThumbnailSheets:
    """N thumbnails, picture i at row-by-row position i % PER_SHEET of sheet i // PER_SHEET.

    Attributes:
        size: S.
        sheets: JPEG files, `N_COLUMNS` thumbnails wide.
        missing: {picture: why it has none}.
    """

    size: int
    sheets: list[bytes]
    missing: dict[int, str] = field(default_factory=dict)


def make_thumbnails(paths: Sequence[str | os.PathLike[str]], size: int, n_workers: int = 1) -> ThumbnailSheets:
    """Scale pictures to S x S, the middle of oblong ones, as networks see them.

    Pictures that cannot be read are grey, and said to be missing.

    Args:
        paths: N picture files.
        size: S.
        n_workers: threads.
    """
    sheets: list[bytes] = []
    missing: dict[int, str] = {}
    start = reported = time.monotonic()
    with ThreadPoolExecutor(n_workers) as pool:
        for first in range(0, len(paths), PER_SHEET):
            part = paths[first : first + PER_SHEET]
            n_rows = -(-len(part) // N_COLUMNS)
            sheet = np.full((n_rows, size, N_COLUMNS, size, 3), EMPTY, dtype=np.uint8)
            for i, found in enumerate(pool.map(lambda path: _thumbnail(path, size), part)):
                if isinstance(found, str):
                    missing[first + i] = found
                else:
                    sheet[i // N_COLUMNS, :, i % N_COLUMNS] = found
            sheets.append(_jpeg(sheet.reshape(n_rows * size, N_COLUMNS * size, 3)))
            now, done = time.monotonic(), first + len(part)
            if now - reported >= SECONDS_BETWEEN_REPORTS:
                reported, rate = now, done / (now - start)
                message = "thumbnails: %s of %s pictures, %.0f a second, %.0f s to go"
                logger.info(message, f"{done:,}", f"{len(paths):,}", rate, (len(paths) - done) / rate)
    if missing:
        example = next(iter(missing))
        message = "thumbnails: %d of %d pictures cannot be read, for instance %s: %s"
        logger.warning(message, len(missing), len(paths), paths[example], missing[example])
    return ThumbnailSheets(size, sheets, missing)


def _thumbnail(path: str | os.PathLike[str], size: int) -> np.ndarray | str:
    """uint8 [S, S, 3], or why there is none."""
    try:
        return resize_image(decode_image(path), size).permute(1, 2, 0).numpy()
    except UnreadableImageError as error:
        return error.reason


def _jpeg(sheet: np.ndarray) -> bytes:
    stream = io.BytesIO()
    # colour at full resolution: halved, it would run over from a thumbnail into its neighbour
    Image.fromarray(sheet).save(stream, "JPEG", quality=QUALITY, subsampling=0, optimize=True)
    return stream.getvalue()
