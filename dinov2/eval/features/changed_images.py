"""Change images before an encoder prepares them: corruptions in five severities, and masks of centre and background.

A change takes a decoded image, uint8 [H, W, 3] in RGB, and returns one of the same size. It depends on the image alone,
so that features do not depend on batches or processes.
"""

import copy
import io
import zlib
from collections.abc import Callable
from functools import partial
from types import MappingProxyType

import numpy as np
from PIL import Image
from torch import Tensor

from dinov2.data.augmentations import adjust_brightness, adjust_hue, gaussian_blur
from dinov2.data.datasets.decode import decode_image
from dinov2.eval.features.encoders import Encoder, Preparation

Change = Callable[[np.ndarray], np.ndarray]


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Blur with a Gaussian whose sigma is a share of the shorter side: the same defocus at any resolution."""
    side = min(image.shape[:2])
    return gaussian_blur(image, sigma * side, 2 * side - 1)


def noise(image: np.ndarray, std: float) -> np.ndarray:
    """Add Gaussian noise of this standard deviation, in levels of 255; the pixels seed it."""
    rng = np.random.default_rng(zlib.crc32(image.tobytes()))
    return np.clip(np.rint(image + std * rng.standard_normal(image.shape, np.float32)), 0, 255).astype(np.uint8)


def jpeg(image: np.ndarray, quality: float) -> np.ndarray:
    """Compress by JPEG of this quality, 1-100, and decode."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=int(quality))
    return decode_image(stream.getvalue())


# {name: (change of a writable image and a value, the values of the severities 1 to 5, what they are)}
CORRUPTIONS = MappingProxyType(
    {
        "blur": (blur, (0.0025, 0.005, 0.01, 0.015, 0.02), "sigma, share of the shorter side"),
        "noise": (noise, (4.0, 8.0, 16.0, 24.0, 32.0), "standard deviation, levels of 255"),
        "brightness": (adjust_brightness, (0.9, 0.8, 0.65, 0.5, 0.35), "factor"),
        "hue": (adjust_hue, (0.02, 0.04, 0.06, 0.08, 0.1), "shift, turns of the colour circle"),
        "jpeg": (jpeg, (60.0, 40.0, 25.0, 15.0, 8.0), "quality"),
    }
)


def corrupt(image: np.ndarray, name: str, severity: int) -> np.ndarray:
    """Apply a corruption of `CORRUPTIONS`; severity is 1 to 5."""
    operation, values, _ = CORRUPTIONS[name]
    return operation(image.copy(), values[severity - 1])  # decoded images are read-only


def mask_centre(image: np.ndarray, share: float) -> np.ndarray:
    """Cover the central square, whose side is this share of the shorter side, in the border's median colour."""
    changed = image.copy()
    changed[central_square(image, share)] = _border_colour(image)
    return changed


def keep_centre(image: np.ndarray, share: float) -> np.ndarray:
    """Cover all but the central square in the border's median colour."""
    changed = np.empty_like(image)
    changed[:] = _border_colour(image)
    square = central_square(image, share)
    changed[square] = image[square]
    return changed


def mask_visible(
    image: np.ndarray, mask: Callable[[np.ndarray, float], np.ndarray], share: float, center_crop: float
) -> np.ndarray:
    """Apply one of `MASKS` to what a network sees of an image: all of it, or the central square of `center_crop`."""
    if center_crop == 1:
        return mask(image, share)
    changed, square = image.copy(), central_square(image, center_crop)
    changed[square] = mask(image[square], share)
    return changed


# {source of features in results.json: change of an image and the share of the centre}
MASKS = MappingProxyType({"background": mask_centre, "centre": keep_centre})


def central_square(image: np.ndarray, share: float) -> tuple[slice, slice]:
    """Return rows and columns of the central square, whose side is this share of the shorter side in whole pixels."""
    height, width = image.shape[:2]
    side = max(1, round(share * min(height, width)))
    top, left = (height - side) // 2, (width - side) // 2
    return slice(top, top + side), slice(left, left + side)


def _border_colour(image: np.ndarray) -> np.ndarray:
    """Return the median level of each channel over the outermost pixels, uint8 [3]."""
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])  # [2 (H + W), 3]
    return np.median(border, axis=0).astype(np.uint8)


def with_change(encoder: Encoder, change: Change) -> Encoder:
    """Return the encoder with a change of each decoded image before its preparation; the network is shared."""
    changed = copy.copy(encoder)
    changed.preparation = partial(_prepare_changed, change=change, preparation=encoder.preparation)
    return changed


def _prepare_changed(image: np.ndarray, change: Change, preparation: Preparation) -> Tensor:
    return preparation(change(image))
