"""Thumbnails of many images as data URIs that a page can carry."""

import base64
import io
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from PIL import Image

from dinov2.data.datasets.decode import UnreadableImageError, decode_image, resize_image
from dinov2.utils.command import progress_bar

logger = logging.getLogger("dinov2")

QUALITY = 75  # WebP: about 450 bytes for a cell at 40 px, half of a JPEG
PLACEHOLDER = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 10 10'%3E"
    "%3Crect width='10' height='10' fill='%23808080'/%3E%3C/svg%3E"
)


class Thumbnails(NamedTuple):
    """Thumbnails of N images: data URIs, and {position: reason} of those that are grey, `PLACEHOLDER`."""

    uris: list[str]
    missing: dict[int, str]


def make_thumbnails(paths: Sequence[str | os.PathLike[str]], size: int, n_workers: int = 1) -> Thumbnails:
    """Read images with `n_workers` threads, crop the centre square and scale it to `size` x `size` pixels."""
    missing: dict[int, str] = {}

    def thumbnail(position: int) -> str:
        try:
            pixels = resize_image(decode_image(paths[position]), size).permute(1, 2, 0).numpy()
        except UnreadableImageError as error:
            missing[position] = error.reason
            return PLACEHOLDER
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "WEBP", quality=QUALITY)
        return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"

    with ThreadPoolExecutor(n_workers) as pool:
        uris = list(progress_bar(pool.map(thumbnail, range(len(paths))), "thumbnails", len(paths)))
    if missing:
        first = min(missing)
        message = "thumbnails: %d of %d images cannot be read, for example %s: %s"
        logger.warning(message, len(missing), len(paths), paths[first], missing[first])
    return Thumbnails(uris, dict(sorted(missing.items())))
