"""The baselines see what they say they see: colours of the centre, and small images."""

import numpy as np
import pytest
from PIL import Image

from dinov2.data.datasets.decode import UnreadableImageError
from dinov2.eval.features.baselines import colour_histogram, raw_pixels


def image(height, width, centre, border):
    array = np.empty((height, width, 3), dtype=np.uint8)
    array[:] = border
    array[height // 5 : -(height // 5), width // 5 : -(width // 5)] = centre
    return array


def test_the_histogram_sees_the_centre_only():
    red, blue = (200, 20, 20), (20, 20, 200)
    on_blue, on_red, blue_cell = (image(100, 60, *colours) for colours in ((red, blue), (red, red), (blue, red)))
    features = colour_histogram([on_blue, on_red, blue_cell])
    assert features.shape == (3, 512)
    assert features.dtype == np.float32
    np.testing.assert_array_equal(features[0], features[1])
    assert np.abs(features[0] - features[2]).max() == 1
    np.testing.assert_allclose((features**2).sum(axis=1), 1, rtol=1e-6)


def test_the_histogram_does_not_depend_on_size_or_place():
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    tile = np.tile(colours, (25, 25, 1))
    small, large = colour_histogram([tile[:80, :80], tile])
    np.testing.assert_allclose(small, large, atol=0.02)


def test_pixels_and_files(tmp_path):
    array = image(64, 64, (0, 0, 0), (255, 255, 255))
    Image.fromarray(array).save(tmp_path / "cell.png")
    from_array, from_file = raw_pixels([array, tmp_path / "cell.png"])
    assert from_array.shape == (32 * 32 * 3,)
    np.testing.assert_array_equal(from_array, from_file)
    assert from_array.min() == 0
    assert from_array.max() == 1
    assert from_array.reshape(3, 32, 32)[:, 16, 16].max() == 0


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(UnreadableImageError, match="broken.png"):
        colour_histogram([tmp_path / "broken.png"])
