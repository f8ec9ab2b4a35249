"""Picture operations with OpenCV on one uint8 picture at a time: the fast way on a CPU.

Each has a counterpart of the same name in `image_ops`, which works on float32 batches. Results here are rounded to
whole levels after each operation, as PIL's are; before that rounding they differ from the counterpart's by less than a
quarter of a level, except that `crop_resize`, like PIL, rounds and clamps between its two passes as well and `rotate`
may choose the neighbour at a tie.

Dimension key:  H height, W width, S side of a crop

Pictures are [H, W, 3], red first. No function changes its argument or a global setting, and the work is done without
the interpreter's lock, so that threads can each work on a crop.
"""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from dinov2.data.image_ops import GRAY_WEIGHTS
from dinov2.data.transforms import IMAGENET_MEAN, IMAGENET_STD

Picture = NDArray[Any]  # uint8 [H, W, 3]; OpenCV's signatures are no more precise


def crop_resize(picture: Picture, box: Sequence[int], size: int) -> Picture:
    """Cut out a box and resize it to [S, S, 3] with PIL's antialiased bicubic filter.

    OpenCV's own bicubic is another one (a = -0.75, no antialiasing); torch has PIL's for uint8, within 2 levels of it.

    Args:
        picture: [H, W, 3] of any strides; channels-last memory is the fast one.
        box: top, left, height, width in pixels; it lies in the picture.
        size: S.
    """
    # A contiguous cut: torch would copy any other itself, with OpenMP threads for each thread that calls it.
    top, left, height, width = box
    cut = np.ascontiguousarray(picture[top : top + height, left : left + width])
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(cut)[None].permute(0, 3, 1, 2), (size, size), mode="bicubic", antialias=True
    )
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())


def rotate(picture: Picture, degrees: float, fill: int) -> Picture:
    """Turn a square picture counter-clockwise about its centre, nearest pixel, corners filled with a gray level."""
    size = len(picture)
    centre = (size - 1) / 2
    matrix = cv2.getRotationMatrix2D((centre, centre), degrees, 1)
    return cv2.warpAffine(picture, matrix, (size, size), flags=cv2.INTER_NEAREST, borderValue=(fill, fill, fill))


def flip(picture: Picture, hflip: bool, vflip: bool) -> Picture:
    """Mirror left-right, upside-down, both or neither."""
    if hflip:
        return cv2.flip(picture, -1 if vflip else 1)
    return cv2.flip(picture, 0) if vflip else picture


def quarter_turn(picture: Picture) -> Picture:
    """Turn by 90 degrees counter-clockwise."""
    return cv2.rotate(picture, cv2.ROTATE_90_COUNTERCLOCKWISE)


def adjust_brightness(picture: Picture, factor: float) -> Picture:
    """Multiply by `factor` >= 0 and clamp."""
    return cv2.convertScaleAbs(picture, alpha=factor)


def adjust_contrast(picture: Picture, factor: float) -> Picture:
    """Move away from (factor > 1) or towards the picture's mean luma and clamp; `factor` >= 0."""
    luma = np.dot(cv2.mean(picture)[:3], GRAY_WEIGHTS)
    return cv2.addWeighted(picture, factor, picture, 0, (1 - factor) * luma)


def adjust_saturation(picture: Picture, factor: float) -> Picture:
    """Move away from (factor > 1) or towards each pixel's luma and clamp; `factor` >= 0."""
    return cv2.transform(picture, factor * np.eye(3) + (1 - factor) * np.array(GRAY_WEIGHTS))


def adjust_hue(picture: Picture, shift: float) -> Picture:
    """Add `shift`, in turns of the colour circle, to the hue of HSV; value and saturation stay.

    In float32: PIL's 256 steps of hue are up to 10 levels off for pure colours.
    """
    hsv = cv2.cvtColor(picture.astype(np.float32), cv2.COLOR_RGB2HSV)  # hue in degrees
    lines = hsv.reshape(len(hsv), -1)
    # OpenCV wraps a hue that is too large but not a negative one.
    lines += np.tile(np.array([360 * (shift % 1), 0, 0], dtype=np.float32), hsv.shape[1])
    return cv2.convertScaleAbs(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB))


def to_grayscale(picture: Picture) -> Picture:
    """Replace all three channels by the luma."""
    return cv2.cvtColor(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def gaussian_blur(picture: Picture, sigma: float, kernel_size: int) -> Picture:
    """Blur with a normalised Gaussian of `kernel_size` taps; beyond a border pixel the picture is mirrored."""
    # From 4.5 sigma on a tap weighs less than 5e-5 of the middle one.
    radius = min(kernel_size // 2, int(4.5 * sigma))
    if radius == 0:
        return picture
    weights = cv2.getGaussianKernel(2 * radius + 1, sigma, cv2.CV_32F)
    return cv2.sepFilter2D(picture, -1, weights, weights, borderType=cv2.BORDER_REFLECT_101)


def solarize(picture: Picture, threshold: float) -> Picture:
    """Invert every level >= `threshold`."""
    levels = np.arange(256, dtype=np.uint8)
    return cv2.LUT(picture, np.where(levels >= threshold, 255 - levels, levels))


def normalize(picture: Picture, out: NDArray[np.float32]) -> None:
    """Write the picture into `out` [3, H, W], normalised with ImageNet's mean and standard deviation."""
    for plane, target, mean, std in zip(cv2.split(picture), out, IMAGENET_MEAN, IMAGENET_STD, strict=True):
        cv2.addWeighted(plane, 1 / (255 * std), plane, 0, -mean / std, dst=target, dtype=cv2.CV_32F)
