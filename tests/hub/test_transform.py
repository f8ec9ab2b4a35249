"""A backbone's transform: an image or its path to what the network takes."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.data.datasets.decode import UnreadableImageError
from dinov2.hub.transform import ImageTransform


def test_an_image_becomes_normalised_squares_by_formula():
    levels = np.full((40, 60, 3), (51, 102, 204), dtype=np.uint8)
    found = ImageTransform(28)(Image.fromarray(levels))
    assert found.shape == (3, 28, 28)
    assert found.dtype == torch.float32
    expected = [(0.2 - 0.485) / 0.229, (0.4 - 0.456) / 0.224, (0.8 - 0.406) / 0.225]
    torch.testing.assert_close(found.amax(dim=(1, 2)), torch.tensor(expected))
    torch.testing.assert_close(found.amin(dim=(1, 2)), torch.tensor(expected))


def test_the_centre_is_kept_with_its_proportions():
    levels = np.zeros((30, 90, 3), dtype=np.uint8)
    levels[:, 30:60] = 255
    found = ImageTransform(30).resize(Image.fromarray(levels))
    assert found.min() == 255


def test_paths_and_images_give_the_same(tmp_path):
    levels = np.random.default_rng(0).integers(0, 256, (33, 44, 3), dtype=np.uint8)
    Image.fromarray(levels).save(tmp_path / "cell.png")
    transform = ImageTransform(28)
    expected = transform(Image.fromarray(levels))
    assert torch.equal(transform(tmp_path / "cell.png"), expected)
    assert torch.equal(transform(str(tmp_path / "cell.png")), expected)
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(UnreadableImageError, match=r"bad\.png"):
        transform(tmp_path / "bad.png")


def test_it_travels_between_processes_and_says_what_it_does():
    transform = ImageTransform(224)
    assert pickle.loads(pickle.dumps(transform)) == transform
    assert transform != ImageTransform(112)
    assert transform.mean == (0.485, 0.456, 0.406)
    assert transform.std == (0.229, 0.224, 0.225)
    assert "224 px" in str(transform)
