"""The transform of an image before a backbone.

Dimension key:  S image side in pixels
"""

import os
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor

from dinov2.data.datasets.decode import decode_image, resize_image
from dinov2.data.transforms import IMAGENET_MEAN, IMAGENET_STD, normalize_images


@dataclass(frozen=True)
class ImageTransform:
    """Crop an image to a square and normalise it by ImageNet's mean and std, as all of these networks expect.

    Transforms can be pickled and compared; `str()` describes one in results and cache keys.

    Attributes:
        image_size: S.
        mean, std: of red, green and blue in [0, 1].
    """

    image_size: int
    mean = IMAGENET_MEAN
    std = IMAGENET_STD

    def __call__(self, image: Image.Image | np.ndarray | str | os.PathLike[str]) -> Tensor:
        """Transform an image, or the file at a path, to float32 [3, S, S].

        Raises:
            UnreadableImageError: the file cannot be decoded.
            ValueError: the image has no defined brightness, or the array is not uint8 [H, W, 3].
        """
        decoded = image if isinstance(image, Image.Image | np.ndarray) else decode_image(image)
        return normalize_images(self.resize(decoded))

    def resize(self, image: Image.Image | np.ndarray) -> Tensor:
        """Resize the shorter side to S and crop the centre: uint8 [3, S, S], before normalisation."""
        return resize_image(image, self.image_size, fit="crop")

    def __str__(self) -> str:
        return f"RGB, shorter side to {self.image_size} px (Lanczos), centre crop, ImageNet mean and std"
