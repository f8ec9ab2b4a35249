"""Corruptions grow with the severity and change nothing else; masks cover what they say."""

import pickle
from functools import partial

import numpy as np
import pytest
from PIL import Image

from dinov2.eval.features.changed_images import CORRUPTIONS, corrupt, keep_centre, mask_centre, with_change
from dinov2.eval.features.extract import extract
from dinov2.eval.features.named_encoders import build_encoder


def cell(height=90, width=120):
    """A violet disc with a texture on a light background, read-only as decoded images are."""
    y, x = np.mgrid[:height, :width]
    is_cell = (y - height / 2) ** 2 + (x - width / 2) ** 2 < (height / 3) ** 2
    image = np.where(is_cell[..., None], (140, 80, 170), (235, 215, 205)).astype(np.float64)
    image += 20 * np.sin(x / 2)[..., None] * is_cell[..., None]
    image = image.astype(np.uint8)
    image.setflags(write=False)
    return image


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_severity_is_further_from_the_image(name):
    image = cell(300, 360)
    before = image.copy()
    distances = []
    for severity in range(1, 6):
        changed = corrupt(image, name, severity)
        assert changed.shape == image.shape
        assert changed.dtype == np.uint8
        np.testing.assert_array_equal(changed, corrupt(image, name, severity))  # nothing is random
        distances.append(np.sqrt(((changed.astype(float) - image) ** 2).mean()))
    assert distances[0] > 0.2
    assert (np.diff(distances) > 0).all(), distances
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_smallest_images_are_taken(name):
    image = np.full((1, 2, 3), 200, np.uint8)
    assert corrupt(image, name, 5).shape == (1, 2, 3)


def test_blur_is_the_same_at_any_resolution():
    large, small = cell(360, 360), np.array(Image.fromarray(cell(360, 360)).resize((180, 180), Image.Resampling.BOX))
    blurred_small = np.array(Image.fromarray(corrupt(large, "blur", 4)).resize((180, 180), Image.Resampling.BOX))
    difference = np.abs(blurred_small.astype(int) - corrupt(small, "blur", 4))
    assert difference.mean() < 1


def test_masks_cover_the_centre_or_all_but_it():
    image = cell()
    background, centre = mask_centre(image, 0.5), keep_centre(image, 0.5)
    rows, columns = slice(22, 67), slice(37, 82)  # 45 px of 90
    is_centre = np.zeros(image.shape[:2], bool)
    is_centre[rows, columns] = True
    np.testing.assert_array_equal(background[~is_centre], image[~is_centre])
    np.testing.assert_array_equal(centre[is_centre], image[is_centre])
    for covered in (background[is_centre], centre[~is_centre]):
        np.testing.assert_array_equal(np.unique(covered, axis=0), [[235, 215, 205]])


def test_an_encoder_sees_the_changed_image_and_the_given_one_stays(tmp_path):
    image = cell()
    Image.fromarray(image).save(tmp_path / "cell.png")
    Image.fromarray(keep_centre(image, 0.2)).save(tmp_path / "changed.png")
    encoder = build_encoder("histogram")
    changed = with_change(encoder, partial(keep_centre, share=0.2))
    paths = [tmp_path / "cell.png"]
    expected = extract(encoder, [tmp_path / "changed.png"], progress=False).features
    np.testing.assert_array_equal(extract(changed, paths, progress=False).features, expected)
    assert not np.array_equal(extract(encoder, paths, progress=False).features, expected)
    pickle.dumps(changed.preparation)  # other processes get it
