"""Each operation against torchvision in float32 and against Pillow, on images of several kinds."""

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image
from torchvision.transforms import InterpolationMode

from dinov2.data import augmentations

ROUNDING = 0.51  # levels


def random_images(height=33, width=33):
    """Smooth, noisy, gray, black, white and purely coloured: six uint8 [H, W, 3]."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(6, 3, 5, 5, generator=generator)
    images = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    images[1] = torch.rand(3, height, width, generator=generator)
    images[2] = images[2, :1]
    images[3], images[4] = 0, 1
    images[5] = torch.rand(3, height, width, generator=generator).round()
    return list((images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())


def levels_by_torchvision(operation, image, *arguments):
    """What torchvision's operation makes of the image without rounding: float [H, W, 3], in levels of 0 to 255."""
    exact = operation(torch.from_numpy(image).permute(2, 0, 1) / 255, *arguments)
    return 255 * exact.permute(1, 2, 0).numpy()


@pytest.mark.parametrize(
    ("name", "strengths", "tolerance"),
    [
        ("adjust_brightness", [0.0, 0.6, 1.0, 1.4, 3.0], ROUNDING),
        ("adjust_contrast", [0.0, 0.6, 1.0, 1.4, 3.0], 0.56),  # torchvision's luma weights sum to 0.9999
        ("adjust_saturation", [0.0, 0.7, 1.0, 1.2, 3.0], 0.75),  # OpenCV's weights have steps of 1/1024
        ("adjust_hue", [-0.5, -0.15, -0.01, 0.0, 0.03, 0.2, 0.5], ROUNDING),
    ],
)
def test_jitter_equals_torchvision_to_rounding(name, strengths, tolerance):
    for image in random_images():
        for strength in strengths:
            ours = getattr(augmentations, name)(image, strength)
            exact = levels_by_torchvision(getattr(F, name), image, strength)
            assert ours.dtype == np.uint8
            assert np.abs(ours - exact).max() <= tolerance, strength


@pytest.mark.parametrize("operation", [augmentations.adjust_saturation, augmentations.adjust_hue])
def test_gray_stays_gray(operation):
    levels = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(16, 16, 3)
    for strength in (0.2, 0.7, 1.3):
        np.testing.assert_array_equal(operation(levels, strength), levels)


def test_grayscale_equals_torchvision_and_pil():
    for image in random_images():
        ours = augmentations.to_grayscale(image)
        assert np.abs(ours - levels_by_torchvision(F.rgb_to_grayscale, image, 3)).max() <= 0.54
        of_pil = np.asarray(Image.fromarray(image).convert("L").convert("RGB"), dtype=int)
        assert np.abs(ours - of_pil).max() <= 1


@pytest.mark.parametrize("threshold", [0, 100.5, 128, 255])
def test_solarize_equals_torchvision(threshold):
    for image in random_images():
        reference = F.solarize(torch.from_numpy(image).permute(2, 0, 1), threshold).permute(1, 2, 0)
        np.testing.assert_array_equal(augmentations.solarize(image, threshold), reference)


@pytest.mark.parametrize(("size", "kernel_size"), [(33, 9), (33, 13), (33, 1), (5, 9)])
@pytest.mark.parametrize("sigma", [0.1, 0.23, 0.45, 0.7, 1.0, 2.0, 9.0])
def test_blur_equals_torchvision_to_rounding(size, kernel_size, sigma):
    for image in random_images(size, size):
        planes = torch.from_numpy(image).permute(2, 0, 1).float()
        reference = F.gaussian_blur(planes, [kernel_size] * 2, [sigma] * 2).permute(1, 2, 0).numpy()
        ours = augmentations.gaussian_blur(image, sigma, kernel_size)
        assert np.abs(ours - reference).max() < 0.55  # with the taps that are left out


@pytest.mark.parametrize("size", [32, 33, 98])
def test_rotation_equals_torchvision_and_pil(size):
    """But for near-ties, where fixed-point or float coordinates may pick the neighbour."""
    image = random_images(size, size)[1]
    for angle, fill in ((0.0, 0), (10.0, 51), (45.5, 102), (133.0, 153), (271.3, 204), (359.0, 255)):
        ours = augmentations.rotate(image, angle, fill)
        planes = torch.from_numpy(image).permute(2, 0, 1)
        reference = F.rotate(planes, angle, InterpolationMode.NEAREST, fill=[fill] * 3).permute(1, 2, 0).numpy()
        of_pil = Image.fromarray(image).rotate(angle, Image.Resampling.NEAREST, fillcolor=(fill,) * 3)
        assert (ours != reference).mean() < 0.001
        assert (ours != np.asarray(of_pil)).mean() < 0.003


def test_flips_and_quarter_turn():
    image = random_images(20, 30)[1]
    for hflip in (False, True):
        for vflip in (False, True):
            expected = image[:: -1 if vflip else 1, :: -1 if hflip else 1]
            np.testing.assert_array_equal(augmentations.flip(image, hflip, vflip), expected)
    np.testing.assert_array_equal(augmentations.quarter_turn(image), np.rot90(image))
    planes = augmentations.to_planes(image)
    assert planes.flags.c_contiguous
    np.testing.assert_array_equal(planes, image.transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("height", "width", "box", "size"),
    [
        (40, 40, (0, 0, 40, 40), 24),
        (40, 61, (3, 20, 30, 41), 24),
        (200, 90, (100, 5, 88, 80), 16),
        (20, 18, (0, 0, 20, 18), 37),
        (28, 28, (0, 0, 28, 28), 28),
        (7, 5, (6, 4, 1, 1), 5),
    ],
)
def test_crop_resize_equals_pil(height, width, box, size):
    top, left, box_height, box_width = box
    for image in random_images(height, width):
        ours = augmentations.crop_resize(image, box, size)
        assert ours.flags.c_contiguous
        cut = Image.fromarray(image).crop((left, top, left + box_width, top + box_height))
        difference = np.abs(ours - np.asarray(cut.resize((size, size), Image.Resampling.BICUBIC), dtype=int))
        assert difference.max() <= 2
        assert difference.mean() < 0.05
        planar = np.ascontiguousarray(image.transpose(2, 0, 1)).transpose(1, 2, 0)
        np.testing.assert_array_equal(augmentations.crop_resize(planar, box, size), ours)


def test_arguments_stay_as_they_are():
    image = random_images()[0]
    before = image.copy()
    for operation, *arguments in (
        (augmentations.crop_resize, (0, 0, 33, 33), 33),
        (augmentations.rotate, 20.0, 5),
        (augmentations.flip, True, False),
        (augmentations.quarter_turn,),
        (augmentations.adjust_brightness, 1.2),
        (augmentations.adjust_contrast, 1.2),
        (augmentations.adjust_saturation, 1.2),
        (augmentations.adjust_hue, 0.2),
        (augmentations.to_grayscale,),
        (augmentations.gaussian_blur, 1.0, 9),
        (augmentations.solarize, 128),
    ):
        operation(image, *arguments)
        np.testing.assert_array_equal(image, before)
