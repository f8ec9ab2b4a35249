import pytest
import torch
import torchvision.transforms.v2.functional as F

from dinov2.data.transforms import IMAGENET_MEAN, IMAGENET_STD, normalize_images


@pytest.mark.parametrize("shape", [(4, 3, 9, 7), (3, 9, 7)])
def test_normalisation_equals_torchvision(shape):
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    before = images.clone()
    normalized = normalize_images(images)
    reference = F.normalize(F.to_dtype(images, torch.float32, scale=True), list(IMAGENET_MEAN), list(IMAGENET_STD))
    torch.testing.assert_close(normalized, reference)
    assert torch.equal(images, before)


def test_scaled_images_are_refused():
    """Floats that were divided by 255 already would come out almost black."""
    with pytest.raises(ValueError, match=r"expected uint8 .* found torch.float32"):
        normalize_images(torch.rand(2, 3, 8, 8))


def test_channels_last_is_refused():
    with pytest.raises(ValueError, match=r"found torch.uint8 \[8, 8, 3\]"):
        normalize_images(torch.zeros(8, 8, 3, dtype=torch.uint8))


def test_mean_and_deviation_are_copied_to_a_device_once(monkeypatch):
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    first = normalize_images(images)
    monkeypatch.setattr(torch, "tensor", None)  # another copy would fail
    assert torch.equal(normalize_images(images), first)
