"""What can be done to the crops of a batch, and the drawing of what is done to each.

Dimension key:  B pictures, R crops (all crops of one size of a batch)
"""

import math
from dataclasses import dataclass, fields
from itertools import permutations

import torch
from torch import Tensor

CROP_RATIO = (3 / 4, 4 / 3)  # width / height of a crop, drawn log-uniformly
N_BOX_TRIES = 10
N_BOX_UNIFORMS = 2 * N_BOX_TRIES + 2
N_UNIFORMS = N_BOX_UNIFORMS + 16  # a crop

JITTER_NAMES = ("brightness", "contrast", "saturation", "hue")
JITTER_ORDERS = torch.tensor(list(permutations(range(len(JITTER_NAMES)))))  # [24, 4]


@dataclass(frozen=True)
class AugmentationSettings:
    """What is done to a crop and how often. Three values stand for (global crop 1, global crop 2, local crops).

    Attributes:
        hflip_probability: left-right mirror.
        vflip_probability: upside-down mirror.
        quarter_turn_probability: rotation by exactly 90 degrees counter-clockwise.
        rotation_probability: rotation by a uniform angle, corners filled with a uniform gray level.
        jitter_probability: of the four that follow, which come together and in random order.
        brightness: x for a uniform factor from 1 - x (0 at least) to 1 + x.
        contrast: the same.
        saturation: the same.
        hue: x for a uniform shift by up to x turns of the colour circle either way; 0.5 at most.
        grayscale_probability: loss of colour.
        blur_probability: Gaussian blur.
        blur_sigma: lowest and highest standard deviation in pixels.
        blur_kernel_size: taps of the blur on each axis, odd; more is cut off.
        solarize_probability: inversion of the bright values.
        solarize_threshold: level, of 0 to 255, from which on a value is inverted.

    Raises:
        ValueError: if a value is out of range.
    """

    hflip_probability: float
    vflip_probability: float
    quarter_turn_probability: float
    rotation_probability: float
    jitter_probability: float
    brightness: float
    contrast: float
    saturation: float
    hue: float
    grayscale_probability: float
    blur_probability: tuple[float, float, float]
    blur_sigma: tuple[float, float]
    blur_kernel_size: int
    solarize_probability: tuple[float, float, float]
    solarize_threshold: float

    def __post_init__(self) -> None:
        for name, length in (("blur_probability", 3), ("blur_sigma", 2), ("solarize_probability", 3)):
            values = tuple(getattr(self, name))  # a config file gives lists
            if len(values) != length:
                raise ValueError(f"{name}: expected {length} numbers, found {values}")
            object.__setattr__(self, name, values)
        for field in fields(self):
            if field.name.endswith("_probability"):
                value = getattr(self, field.name)
                if not all(0 <= p <= 1 for p in (value if isinstance(value, tuple) else (value,))):
                    raise ValueError(f"{field.name}: probabilities lie in [0, 1], found {value}")
        for name in ("brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: must be 0 (off) or more, found {getattr(self, name)}")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"hue: must lie in [0, 0.5] (turns of the colour circle), found {self.hue}")
        if not 0 < self.blur_sigma[0] <= self.blur_sigma[1] < math.inf:
            raise ValueError(
                f"blur_sigma: expected (lowest, highest) with 0 < lowest <= highest, found {self.blur_sigma}"
            )
        if self.blur_kernel_size < 1 or self.blur_kernel_size % 2 != 1:
            raise ValueError(f"blur_kernel_size: must be odd and at least 1, found {self.blur_kernel_size}")
        if not 0 <= self.solarize_threshold <= 255:
            raise ValueError(f"solarize_threshold: must lie in [0, 255], found {self.solarize_threshold}")


@dataclass(frozen=True)
class CropParameters:
    """What happens to each of R crops: tensors on the CPU, in the order in which the operations follow each other."""

    picture: Tensor  # int64 [R], whose crop it is
    box: Tensor  # int64 [R, 4]: top, left, height, width in pixels
    rotated: Tensor  # bool [R]
    angle: Tensor  # [R] degrees counter-clockwise
    fill: Tensor  # [R] gray level in [0, 1]
    hflip: Tensor  # bool [R]
    vflip: Tensor  # bool [R]
    quarter_turn: Tensor  # bool [R], counter-clockwise
    jittered: Tensor  # bool [R]
    jitter_order: Tensor  # int64 [R, 4]: indices into JITTER_NAMES, first to last
    jitter_strength: Tensor  # [R, 4]: of each of JITTER_NAMES
    grayscale: Tensor  # bool [R]
    blurred: Tensor  # bool [R]
    sigma: Tensor  # [R] pixels
    solarized: Tensor  # bool [R]

    def __len__(self) -> int:
        return len(self.picture)

    def select(self, crops: slice | Tensor) -> "CropParameters":
        """The parameters of some crops: a slice, or their numbers."""
        return CropParameters(**{name: values[crops] for name, values in vars(self).items()})


def draw_boxes(uniforms: Tensor, height: int, width: int, scale: tuple[float, float]) -> Tensor:
    """Random crop boxes with torchvision's RandomResizedCrop distribution.

    Area and log aspect ratio are uniform; the first of ten tries that fits in the picture counts, otherwise the largest
    central box with an allowed ratio.

    Args:
        uniforms: [R, 22] in [0, 1): ten areas, ten ratios, two positions.
        height: of the pictures, in pixels.
        width: of the pictures, in pixels.
        scale: lowest and highest share of the picture's area.

    Returns:
        int64 [R, 4]: top, left, height, width.
    """
    areas, ratios, position = uniforms.double().split([N_BOX_TRIES, N_BOX_TRIES, 2], dim=1)
    area = (scale[0] + (scale[1] - scale[0]) * areas) * (height * width)  # [R, 10]
    log_low, log_high = math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])
    ratio = torch.exp(log_low + (log_high - log_low) * ratios)
    widths, heights = torch.sqrt(area * ratio).round_(), torch.sqrt(area / ratio).round_()
    fits = (0 < widths) & (widths <= width) & (0 < heights) & (heights <= height)  # [R, 10]

    # One more column that always fits: the fallback, in the middle.
    central_width = min(width, round(height * CROP_RATIO[1]))
    central_height = min(height, round(width / CROP_RATIO[0]))
    n = len(uniforms)
    fits = torch.cat([fits, torch.ones(n, 1, dtype=torch.bool)], dim=1)
    first = fits.int().argmax(dim=1, keepdim=True)  # [R, 1]
    box_width = torch.cat([widths, widths.new_full((n, 1), central_width)], dim=1).gather(1, first)
    box_height = torch.cat([heights, heights.new_full((n, 1), central_height)], dim=1).gather(1, first)
    top = (position[:, :1] * (height - box_height + 1)).floor_()
    left = (position[:, 1:] * (width - box_width + 1)).floor_()
    is_central = first == N_BOX_TRIES
    top = torch.where(is_central, (height - central_height) // 2, top)
    left = torch.where(is_central, (width - central_width) // 2, left)
    return torch.cat([top, left, box_height, box_width], dim=1).long()


def draw_crops(
    uniforms: Tensor,
    height: int,
    width: int,
    *,
    picture: Tensor,
    scale: tuple[float, float],
    settings: AugmentationSettings,
    blur_probability: Tensor,
    solarize_probability: Tensor,
) -> CropParameters:
    """Turn uniform numbers [R, N_UNIFORMS] into what happens to R crops.

    `picture` [R] says whose crop each is; the two probabilities [R] differ between the first and second global crop.
    """
    boxes, rest = uniforms[:, :N_BOX_UNIFORMS], uniforms[:, N_BOX_UNIFORMS:]
    rotate, angle, fill, hflip, vflip, quarter_turn, jitter, order = rest[:, :8].unbind(dim=1)
    strengths = rest[:, 8:12]
    grayscale, blur, sigma, solarize = rest[:, 12:].unbind(dim=1)

    spread = torch.tensor([settings.brightness, settings.contrast, settings.saturation])
    low, high = (1 - spread).clamp_min(0.0), 1 + spread
    factors = low + (high - low) * strengths[:, :3]
    hue_shift = settings.hue * (2 * strengths[:, 3:] - 1)
    sigma_low, sigma_high = settings.blur_sigma
    return CropParameters(
        picture=picture,
        box=draw_boxes(boxes, height, width, scale),
        rotated=rotate < settings.rotation_probability,
        angle=360 * angle,
        fill=(256 * fill).floor() / 255,
        hflip=hflip < settings.hflip_probability,
        vflip=vflip < settings.vflip_probability,
        quarter_turn=quarter_turn < settings.quarter_turn_probability,
        jittered=jitter < settings.jitter_probability,
        jitter_order=JITTER_ORDERS[(order * len(JITTER_ORDERS)).long()],
        jitter_strength=torch.cat([factors, hue_shift], dim=1),
        grayscale=grayscale < settings.grayscale_probability,
        blurred=blur < blur_probability,
        sigma=sigma_low + (sigma_high - sigma_low) * sigma,
        solarized=solarize < solarize_probability,
    )
