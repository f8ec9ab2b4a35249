"""Image operations of the augmentation, with OpenCV on one uint8 image at a time.

Each result is rounded to whole levels, as Pillow's are.

Dimension key:  H height, W width, S side of a crop

Images are [H, W, 3], red first. No function changes its argument.
"""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

Image = NDArray[Any]  # uint8 [H, W, 3]; OpenCV's signatures are no more precise

# ITU-R 601 luma, the weights of Pillow's mode "L" and of torchvision.
GRAY_WEIGHTS = np.array([0.299, 0.587, 0.114])
IDENTITY = np.eye(3)


def crop_resize(image: Image, box: Sequence[int], size: int) -> Image:
    """Cut out a box and resize it to [S, S, 3] with Pillow's antialiased bicubic filter.

    OpenCV's own bicubic filter differs (a = -0.75, no antialiasing). PyTorch's is within 2 levels of Pillow's.

    Args:
        image: [H, W, 3] of any strides; channels-last memory is the fast one.
        box: top, left, height, width in pixels, inside the image.
        size: S.
    """
    top, left, height, width = box
    cut = np.ascontiguousarray(image[top : top + height, left : left + width])
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(cut)[None].permute(0, 3, 1, 2), (size, size), mode="bicubic", antialias=True
    )
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())


def rotate(image: Image, degrees: float, fill: int) -> Image:
    """Turn a square image counter-clockwise about its centre (nearest pixel) and fill the corners with a gray level."""
    size = len(image)
    centre = (size - 1) / 2
    matrix = cv2.getRotationMatrix2D((centre, centre), degrees, 1)
    return cv2.warpAffine(image, matrix, (size, size), flags=cv2.INTER_NEAREST, borderValue=(fill, fill, fill))


def flip(image: Image, hflip: bool, vflip: bool) -> Image:
    """Mirror left-right, upside-down, both or neither."""
    if hflip:
        return cv2.flip(image, -1 if vflip else 1)
    return cv2.flip(image, 0) if vflip else image


def quarter_turn(image: Image) -> Image:
    """Turn by 90 degrees counter-clockwise."""
    return cv2.rotate(image, cv2.ROTATE_90_COUNTERCLOCKWISE)


def adjust_brightness(image: Image, factor: float) -> Image:
    """Multiply by `factor` >= 0 and clamp."""
    return cv2.convertScaleAbs(image, alpha=factor)


def adjust_contrast(image: Image, factor: float) -> Image:
    """Move away from (factor > 1) or towards the image's mean luma and clamp; `factor` >= 0."""
    luma = np.dot(cv2.mean(image)[:3], GRAY_WEIGHTS)
    return cv2.addWeighted(image, factor, image, 0, (1 - factor) * luma)


def adjust_saturation(image: Image, factor: float) -> Image:
    """Move away from (factor > 1) or towards each pixel's luma and clamp; `factor` >= 0."""
    return cv2.transform(image, factor * IDENTITY + (1 - factor) * GRAY_WEIGHTS)


def adjust_hue(image: Image, shift: float) -> Image:
    """Add `shift`, in turns of the colour circle, to the hue of HSV; value and saturation stay.

    In float32: Pillow's 256 steps of hue are up to 10 levels off for pure colours.
    """
    hsv: Any = cv2.cvtColor(image.astype(np.float32), cv2.COLOR_RGB2HSV)  # hue in degrees
    # OpenCV wraps a hue that is too large but not a negative one.
    hsv[..., 0] += 360 * (shift % 1)
    return cv2.convertScaleAbs(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB))


def to_grayscale(image: Image) -> Image:
    """Replace all three channels by the luma."""
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def gaussian_blur(image: Image, sigma: float, kernel_size: int) -> Image:
    """Blur with a normalised Gaussian of `kernel_size` taps; the image is mirrored beyond its border pixels."""
    # From 4.5 sigma on a tap weighs less than 5e-5 of the middle one.
    radius = min(kernel_size // 2, int(4.5 * sigma))
    if radius == 0:
        return image
    weights = cv2.getGaussianKernel(2 * radius + 1, sigma, cv2.CV_32F)
    return cv2.sepFilter2D(image, -1, weights, weights, borderType=cv2.BORDER_REFLECT_101)


def to_planes(image: Image) -> Image:
    """Reorder [H, W, 3] to a contiguous [3, H, W]."""
    planes = np.empty((3, *image.shape[:2]), dtype=np.uint8)
    cv2.split(image, list(planes))
    return planes


def solarize(image: Image, threshold: float) -> Image:
    """Invert every level >= `threshold`."""
    levels = np.arange(256, dtype=np.uint8)
    return cv2.LUT(image, np.where(levels >= threshold, 255 - levels, levels))
