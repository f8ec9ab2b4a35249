"""What happens to a picture before a backbone sees it.

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
class PictureTransform:
    """A picture as the released networks and those of this project take it: squared, then ImageNet's mean and std.

    It can be pickled, compared and sent to other processes; `str()` says it in words that differ when it differs.

    Attributes:
        image_size: S.
        mean, std: of red, green and blue in [0, 1].
    """

    image_size: int
    mean = IMAGENET_MEAN
    std = IMAGENET_STD

    def __call__(self, picture: Image.Image | np.ndarray | str | os.PathLike[str]) -> Tensor:
        """A picture, or the path of one, to float32 [3, S, S].

        Raises:
            UnreadableImageError: a path whose file cannot be decoded.
            ValueError: a picture whose pixels have no defined brightness, or an array that is not uint8 [H, W, 3].
        """
        decoded = picture if isinstance(picture, Image.Image | np.ndarray) else decode_image(picture)
        return normalize_images(self.resize(decoded))

    def resize(self, image: Image.Image | np.ndarray) -> Tensor:
        """The part before normalisation: shorter side to S, centre crop; uint8 [3, S, S]."""
        return resize_image(image, self.image_size, fit="crop")

    def __str__(self) -> str:
        return f"RGB, shorter side to {self.image_size} px (Lanczos), centre crop, ImageNet mean and std"
