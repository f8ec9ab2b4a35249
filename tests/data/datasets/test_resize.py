"""Lanczos resizing against Pillow's, for shrinking, growing, boxes and odd shapes: equal, bit for bit."""

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.data.datasets import decode
from dinov2.data.datasets.decode import Span, decode_image, resize_image, resize_lanczos


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


@pytest.mark.parametrize(("height", "width"), [(363, 360), (104, 120), (31, 700), (1, 1)])
@pytest.mark.parametrize("share", [0.65, 0.5, 0.1])
def test_the_central_share_is_pillows_box(height, width, share):
    image, kept = noise(height, width), share * min(height, width)
    rows, columns = (Span((side - kept) / 2, (side + kept) / 2) for side in (height, width))
    found = resize_image(image, 56, center_crop=share).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(found, by_pillow(image, 56, rows, columns))


@pytest.mark.parametrize(("height", "width", "share"), [(64, 64, 0.5), (40, 100, 0.65), (224, 320, 0.25)])
def test_the_central_share_is_that_of_an_image_cut_before(height, width, share):
    image, side = noise(height, width), round(share * min(height, width))
    top, left = (height - side) // 2, (width - side) // 2
    cut = image[top : top + side, left : left + side]
    found, expected = resize_image(image, 28, center_crop=share), resize_image(cut, 28)
    reach = -(-3 * 28 // min(side, 28))  # of the filter, which reads beyond the square as a resize before a crop does
    inside = slice(reach, 28 - reach)
    assert torch.equal(found[:, inside, inside], expected[:, inside, inside])
    framed = np.full_like(image, 90)
    framed[top + 12 : top + side - 12, left + 12 : left + side - 12] = cut[12:-12, 12:-12]
    framed[: top - 12] = 0  # far from the square
    assert torch.equal(
        resize_image(framed, 28, center_crop=share),
        resize_image(framed[top : top + side, left : left + side], 28),
    )


def test_whole_images_are_as_without_a_share():
    image = noise(363, 300)
    assert torch.equal(resize_image(image, 28, center_crop=1.0), resize_image(image, 28))


@pytest.mark.parametrize("share", [0, -0.5, 1.01, float("nan")])
def test_a_share_beyond_its_range_is_refused(share):
    with pytest.raises(ValueError, match=r"train\.center_crop must be above 0 and at most 1, found"):
        resize_image(noise(8, 8), 4, center_crop=share)


@pytest.mark.parametrize("fit", ["pad", "squash"])
def test_a_share_needs_the_fit_crop(fit):
    with pytest.raises(
        ValueError, match=rf"train\.center_crop=0\.65 .* train\.image_fit={fit} .* train\.image_fit=crop"
    ):
        resize_image(noise(8, 8), 4, fit, center_crop=0.65)
    resize_image(noise(8, 8), 4, fit, center_crop=1)
