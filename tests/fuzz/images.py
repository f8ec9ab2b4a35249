"""Images of all suffixes."""

import io
import random
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from dinov2.data.datasets.decode import IMAGE_SUFFIXES, decode_image, resize_image
from tests.fuzz.mutations import Content, Format, damaged

MODES = {"RGB": 3, "L": 1, "RGBA": 4, "I;16": 1, "P": 1, "CMYK": 4, "1": 1}


@cache
def encoded(suffix: str, mode: str, size: int = 30) -> bytes:
    """Return a small image, in mode RGB if the format does not have this mode."""
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    kind = Image.registered_extensions()[suffix]
    image = Image.fromarray(pixels)
    for each in (image.convert("I").convert(mode) if mode == "I;16" else image.convert(mode), image):
        buffer = io.BytesIO()
        try:
            each.save(buffer, kind)
        except (OSError, ValueError):
            continue
        return buffer.getvalue()
    raise AssertionError(f"Pillow cannot write {suffix}")


def image_case(rng: random.Random) -> tuple[str, Content]:
    suffix = rng.choice(IMAGE_SUFFIXES)
    data = damaged(encoded(suffix, rng.choice(list(MODES))), rng)
    return f"cell{rng.choice((suffix, suffix.upper(), rng.choice(IMAGE_SUFFIXES)))}", data


def read_image(path: Path) -> None:
    resize_image(decode_image(path), 28)


FORMATS = {"image": Format(image_case, read_image)}
