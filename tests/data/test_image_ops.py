"""Each batched operation against torchvision's functional counterpart, a picture at a time with the same parameters."""

import pytest
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image
from torchvision.transforms import InterpolationMode

from dinov2.data import image_ops

N, SIZE = 6, 33


def to_lines(pictures):
    """[N, 3, H, W] -> [N, H, 3, W], the layout of image_ops."""
    return pictures.transpose(1, 2).contiguous()


def from_lines(pictures):
    return pictures.transpose(1, 2)


def random_pictures(height=SIZE, width=SIZE):
    """Smooth structure with noise; a gray picture, a black one and one of pure colours are among them."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(N, 3, 5, 5, generator=generator)
    pictures = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    pictures = (pictures + 0.2 * torch.randn(N, 3, height, width, generator=generator)).clamp(0, 1)
    pictures[1] = pictures[1, :1]
    pictures[2] = 0
    pictures[3] = pictures[3].round()
    return pictures


def as_bytes(pictures):
    return (pictures * 255).round().to(torch.uint8)


def assert_same(ours, reference, tolerance=1e-5):
    """Values in [0, 1]; the default tolerance is that of float32 sums in another order."""
    torch.testing.assert_close(from_lines(ours), reference, atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    ("height", "width", "size"), [(40, 40, 24), (40, 61, 24), (200, 90, 16), (20, 18, 37), (7, 5, 5)]
)
@pytest.mark.parametrize("flips", [(False, False), (True, False), (False, True), (True, True)])
def test_crop_resize_and_flips_equal_torchvision(height, width, size, flips):
    pictures = random_pictures(height, width)
    generator = torch.Generator().manual_seed(1)
    heights = torch.randint(1, height + 1, (N,), generator=generator)
    widths = torch.randint(1, width + 1, (N,), generator=generator)
    heights[0], widths[0] = height, width
    heights[1], widths[1] = 1, 1
    tops = (torch.rand(N, generator=generator) * (height - heights + 1)).long()
    lefts = (torch.rand(N, generator=generator) * (width - widths + 1)).long()
    vflip, hflip = (torch.full((N,), flip) for flip in flips)
    ours = image_ops.crop_resize(
        pictures,
        torch.arange(N),
        image_ops.resize_taps(tops, heights, vflip, size, height),
        image_ops.resize_taps(lefts, widths, hflip, size, width),
    )
    for i, box in enumerate(torch.stack([tops, lefts, heights, widths], dim=1).tolist()):
        reference = F.resized_crop(pictures[i], *box, [size, size], InterpolationMode.BICUBIC, antialias=True)
        reference = F.vertical_flip(reference) if flips[0] else reference
        reference = F.horizontal_flip(reference) if flips[1] else reference
        assert_same(ours[i : i + 1], reference[None], 2e-5)


def test_crop_resize_equals_pil_to_rounding():
    """PIL rounds after each of its two passes. It clips overshoots there too, which the low contrast avoids."""
    pictures = as_bytes(0.2 + 0.6 * random_pictures(80, 64))
    start, length, no = torch.tensor([[10, 7]] * N), torch.tensor([[52, 57]] * N), torch.zeros(N, dtype=torch.bool)
    ours = image_ops.crop_resize(
        pictures,
        torch.arange(N),
        image_ops.resize_taps(start[:, 0], length[:, 0], no, 24, 80),
        image_ops.resize_taps(start[:, 1], length[:, 1], no, 24, 64),
    )
    resized = [
        F.to_pil_image(picture).crop((7, 10, 64, 62)).resize((24, 24), Image.Resampling.BICUBIC) for picture in pictures
    ]
    difference = (from_lines(ours).clamp(0, 255) - torch.stack([F.pil_to_tensor(pil) for pil in resized])).abs()
    assert difference.max() < 1.3


def test_transpose_then_flip_is_a_quarter_turn():
    pictures = random_pictures(20, 30)
    assert_same(image_ops.transpose(to_lines(pictures)).flip(1), F.rotate(pictures, 90, expand=True), 0)


@pytest.mark.parametrize("size", [32, 33])
def test_rotation_equals_torchvision_and_pil(size):
    """Nearest pixels are equal but for near-ties, where float32 in another order may pick the neighbour."""
    pictures = as_bytes(random_pictures(size, size))
    angles = torch.tensor([0.0, 10.0, 45.5, 133.0, 271.3, 359.0], dtype=torch.float64)
    fills = [0, 51, 102, 153, 204, 255]
    radians = torch.deg2rad(angles)
    turned = image_ops.rotate(
        to_lines(pictures / 255), radians.cos().float(), radians.sin().float(), torch.tensor(fills) / 255
    )
    ours = as_bytes(from_lines(turned))
    for i, (angle, fill) in enumerate(zip(angles.tolist(), fills, strict=True)):
        reference = F.rotate(pictures[i], angle, InterpolationMode.NEAREST, fill=[fill] * 3)
        pil = F.to_pil_image(pictures[i]).rotate(angle, Image.Resampling.NEAREST, fillcolor=(fill,) * 3)
        assert (ours[i] != reference).float().mean() < 0.003
        assert (ours[i] != F.pil_to_tensor(pil)).float().mean() < 0.003


@pytest.mark.parametrize(
    ("ours", "reference", "strengths"),
    [
        (image_ops.adjust_brightness_, F.adjust_brightness, [0.0, 0.6, 1.0, 1.4, 1.2, 0.9]),
        (image_ops.adjust_contrast_, F.adjust_contrast, [0.0, 0.6, 1.0, 1.4, 1.2, 0.9]),
        (image_ops.adjust_saturation_, F.adjust_saturation, [0.0, 0.8, 1.0, 1.2, 1.3, 0.7]),
        (image_ops.adjust_hue_, F.adjust_hue, [-0.5, -0.15, 0.1, 0.2, 0.5, 0.03]),
    ],
)
def test_jitter_operations_equal_torchvision(ours, reference, strengths):
    """torchvision's luma weights sum to 0.9999, ours to 1: up to 0.0001 of a value."""
    pictures = random_pictures()
    expected = torch.stack([reference(picture, s) for picture, s in zip(pictures, strengths, strict=True)])
    assert_same(ours(to_lines(pictures), torch.tensor(strengths)), expected, 1.5e-4)


def test_gray_equals_torchvision():
    """To 0.0001, as above."""
    pictures = random_pictures()
    assert_same(image_ops.to_grayscale_(to_lines(pictures)), F.rgb_to_grayscale(pictures, 3), 1.5e-4)


def test_solarize_equals_torchvision():
    pictures = as_bytes(random_pictures())
    assert 128 in pictures  # the threshold itself is inverted
    ours = image_ops.solarize_(to_lines(pictures / 255), 128 / 255)
    assert torch.equal(as_bytes(from_lines(ours)), F.solarize(pictures, 128))


@pytest.mark.parametrize(("size", "kernel_size"), [(SIZE, 9), (SIZE, 13), (5, 9)])
def test_blur_equals_torchvision(size, kernel_size):
    sigmas = [0.1, 0.3, 0.7, 1.0, 1.5, 2.0]
    pictures = random_pictures(size, size)
    ours = image_ops.gaussian_blur(to_lines(pictures), torch.tensor(sigmas), kernel_size)
    for i, sigma in enumerate(sigmas):
        reference = F.gaussian_blur(pictures[i : i + 1], [kernel_size] * 2, [sigma] * 2)
        assert_same(ours[i : i + 1], reference)
