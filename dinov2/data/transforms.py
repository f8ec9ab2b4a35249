"""Normalise images for the backbone."""

from functools import cache

import torch
from torch import Tensor

# for red, green and blue in [0, 1]; all released DINOv2 and DinoBloom backbones were trained with these
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalize_images(images: Tensor) -> Tensor:
    """Normalise decoded images to the backbone's input: (x / 255 - mean) / std for each colour channel.

    From uint8 [B, 3, H, W] or [3, H, W] to contiguous float32 of the same shape, on the same device.
    """
    if images.dtype != torch.uint8 or images.ndim not in (3, 4) or images.shape[-3] != 3:
        raise ValueError(
            f"images: expected uint8 [B, 3, H, W] or [3, H, W], found {images.dtype} {list(images.shape)}; "
            f"pass the decoded images, before any scaling"
        )
    mean, per_std = _levels(images.device)
    return images.to(torch.float32, memory_format=torch.contiguous_format).sub_(mean).mul_(per_std)


@cache  # a copy to a GPU for each batch would make the host wait
def _levels(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the mean and 1 / standard deviation for levels of 0 to 255: [3, 1, 1] each."""
    mean, std = torch.tensor(IMAGENET_MEAN, device=device), torch.tensor(IMAGENET_STD, device=device)
    return (255 * mean).view(3, 1, 1), (1 / (255 * std)).view(3, 1, 1)
