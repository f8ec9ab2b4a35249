"""Lanczos resizing against Pillow's, for shrinking, growing, boxes and odd shapes: equal, bit for bit."""

import numpy as np
import pytest
from PIL import Image

from dinov2.data.datasets import decode
from dinov2.data.datasets.decode import Span, decode_image, resize_lanczos


def by_pillow(image: np.ndarray, size: int, rows: Span, columns: Span) -> np.ndarray:
    # in two steps, because Pillow 13 filters images that are much taller than wide vertically first
    narrowed = Image.fromarray(image).resize(
        (size, len(image)), Image.Resampling.LANCZOS, box=(columns.start, 0, columns.end, len(image))
    )
    return np.asarray(narrowed.resize((size, size), Image.Resampling.LANCZOS, box=(0, rows.start, size, rows.end)))


def noise(height: int, width: int) -> np.ndarray:
    """Black and white at random: clamped after each pass almost everywhere."""
    return np.random.default_rng(0).choice(np.array([0, 255], dtype=np.uint8), (height, width, 3))


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"),
    [
        (363, 360, (0, 363), (0, 360)),
        (480, 640, (0, 480), (80.25, 560.75)),
        (480, 640, (0, 480), (37 * 480 / 224, 261 * 480 / 224)),  # not whole in single precision
        (104, 120, (0, 104), (7.7, 111.7)),
        (256, 256, (0, 256), (0, 256)),  # eighths: many sums end in a half
        (224, 300, (0, 224), (38, 262)),
        (40, 3000, (0, 40), (1480, 1520)),
        (700, 31, (300.5, 331.5), (0, 31)),
        (1, 1, (0, 1), (0, 1)),
        (2, 900, (0, 2), (0, 900)),
        (1500, 3, (0, 1500), (0, 3)),
    ],
)
@pytest.mark.parametrize("size", [28, 224])
def test_the_same_as_pillow(height, width, rows, columns, size):
    image, spans = noise(height, width), (Span(*rows), Span(*columns))
    found = resize_lanczos(image, size, size, *spans)
    assert (found.shape, found.dtype) == ((size, size, 3), np.uint8)
    np.testing.assert_array_equal(found, by_pillow(image, size, *spans))


def test_real_cells_are_the_same_as_pillows(shared_data):
    files = [path for suffix in ("jpg", "bmp") for path in sorted(shared_data.rglob(f"*.{suffix}"))[::60]]
    assert len(files) > 30
    for path in files:
        image = decode_image(path)
        height, width = image.shape[:2]
        theirs = Image.fromarray(image).resize((224, 224), Image.Resampling.LANCZOS)
        ours = resize_lanczos(image, 224, 224, Span(0, height), Span(0, width))
        np.testing.assert_array_equal(ours, np.asarray(theirs), err_msg=path.name)


def test_images_larger_than_a_block_of_rows_are_the_same(monkeypatch):
    image = noise(150, 90)
    whole = resize_lanczos(image, 28, 28, Span(0, 150), Span(0, 90))
    monkeypatch.setattr(decode, "ROWS_PER_PASS", 64)
    np.testing.assert_array_equal(resize_lanczos(image, 28, 28, Span(0, 150), Span(0, 90)), whole)


def test_any_strides_will_do():
    image = noise(50, 60)
    spans = Span(0, 30), Span(0, 20)
    expected = resize_lanczos(np.ascontiguousarray(image[::-1][10:40, 5:25]), 28, 28, *spans)
    np.testing.assert_array_equal(resize_lanczos(image[::-1][10:40, 5:25], 28, 28, *spans), expected)
    turned = resize_lanczos(image.transpose(1, 0, 2), 28, 28, Span(0, 60), Span(0, 50))
    copied = resize_lanczos(image.transpose(1, 0, 2).copy(), 28, 28, Span(0, 60), Span(0, 50))
    np.testing.assert_array_equal(turned, copied)


def test_a_constant_stays_constant():
    for level in (0, 1, 254, 255):
        image = np.full((37, 53, 3), level, dtype=np.uint8)
        assert (resize_lanczos(image, 100, 20, Span(0, 37), Span(0, 53)) == level).all()
