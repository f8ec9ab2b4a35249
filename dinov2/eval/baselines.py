"""Features that need no network: what a trained backbone has to beat before its numbers mean anything.

Letters: N pictures, D features of each.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from dinov2.data.datasets.decode import load_image, resize_image

Picture = Path | str | np.ndarray

Description = Callable[[Image.Image], np.ndarray]

CENTRE_SHARE = 0.55  # of each side: about 200 of the 360 px of an Acevedo picture, the cell without its surroundings
BINS = 8  # of hue, saturation and value each
PIXELS_SIDE = 32


def colour_histogram(pictures: Iterable[Picture]) -> np.ndarray:
    """Square roots of the joint histogram of hue, saturation and value over the centre of each picture.

    With the root, Euclidean distance is the Hellinger distance of the histograms, in which the one full bin of a plain
    background no longer outweighs all others: on 1,776 Acevedo cells of eight classes, a quarter of them held out,
    kNN-20 goes from 0.68 to 0.88 accuracy.

    Args:
        pictures: files, or uint8 arrays [H, W, 3] in RGB.

    Returns:
        float32 [N, 512], D = 8 hues x 8 saturations x 8 values; each row's squares sum to 1.
    """
    return _features(pictures, histogram_of)


def raw_pixels(pictures: Iterable[Picture]) -> np.ndarray:
    """The picture itself, its shorter side scaled to 32 px and the centre kept.

    Args:
        pictures: files, or uint8 arrays [H, W, 3] in RGB.

    Returns:
        float32 [N, 3072], 0-1.
    """
    return _features(pictures, pixels_of)


BASELINES: dict[str, Callable[[Iterable[Picture]], np.ndarray]] = {"histogram": colour_histogram, "pixels": raw_pixels}


def _features(pictures: Iterable[Picture], describe: Description) -> np.ndarray:
    return np.stack([describe(_image(picture)) for picture in pictures])  # [N, D]


def _image(picture: Picture) -> Image.Image:
    return Image.fromarray(picture) if isinstance(picture, np.ndarray) else load_image(picture)


def histogram_of(image: Image.Image) -> np.ndarray:
    """`colour_histogram` of one picture: float32 [512]."""
    left, top = (round(side * (1 - CENTRE_SHARE) / 2) for side in image.size)
    centre = image.crop((left, top, image.width - left, image.height - top)).convert("HSV")
    hue, saturation, value = np.moveaxis(np.asarray(centre).astype(np.int64) * BINS // 256, -1, 0)  # [h, w] each, 0-7
    cells = (hue * BINS + saturation) * BINS + value
    counts = np.bincount(cells.ravel(), minlength=BINS**3)  # [512]
    return np.sqrt(counts / cells.size).astype(np.float32)


def pixels_of(image: Image.Image) -> np.ndarray:
    """`raw_pixels` of one picture: float32 [3072]."""
    return resize_image(image, PIXELS_SIDE, fit="crop").numpy().ravel() / np.float32(255)
