"""Multi-crop augmentation: make two global and L local random crops of one image.

The recipes `default` (DINOv2, Oquab et al. 2023, arXiv 2304.07193, with more flips and turns) and `hema` (DinoBloom,
Koch et al. 2024, arXiv 2404.05022) differ in their settings: the block `augmentation` of the config.

Dimension key:  L local crops, S crop side, s local crop side, H height and W width of the image

A crop is made in two steps: `draw_crop` draws all random values, `make_crop` applies the operations. These work with
OpenCV on one uint8 image at a time, [H, W, 3], red first; they round to whole levels, as Pillow does, and do not change
their argument.

Before a crop, the background may be replaced by that of another image: two crops of one image share not only its cell,
but also what lies around it, and a network can recognise that instead.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache
from random import Random
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dinov2.configs import dinov2_default_config
from dinov2.data.transforms import normalize_images

N_GLOBAL_CROPS = 2
CROP_RATIO = (3 / 4, 4 / 3)  # width / height of a crop, drawn log-uniformly
N_BOX_TRIES = 10
BACKGROUND_EDGE = 0.1  # width of the border between cell and background, as a share of half the shorter side
HIGHEST = {"hue": 0.5, "solarize_threshold": 255}  # limits of settings that are no probabilities

Pixels = NDArray[Any]  # uint8 [H, W, 3]; OpenCV's signatures are no more precise
# ITU-R 601 luma, the weights of Pillow's mode "L" and of torchvision
GRAY_WEIGHTS = np.array([0.299, 0.587, 0.114])
IDENTITY = np.eye(3)
# optical density of red, green and blue by hematoxylin, eosin and a residual stain (Ruifrok and Johnston 2001)
STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]], dtype=np.float32)
TO_STAINS = np.linalg.inv(STAINS)
STAIN_SHIFT = 0.2  # largest shift of a stain for a jitter of 1


@dataclass(frozen=True)
class AugmentationSettings:
    """Probabilities and strengths of the operations.

    Three values are for (first global crop, second global crop, local crops). ValueError: a value is out of range.
    """

    hflip_probability: float  # left-right mirror
    vflip_probability: float  # upside-down mirror
    quarter_turn_probability: float  # rotation by exactly 90 degrees counter-clockwise
    rotation_probability: float  # rotation by a uniform angle, corners filled with a uniform gray level
    jitter_probability: float  # of the next four operations, which are applied together in random order
    brightness: float  # x for a uniform factor from 1 - x (0 at least) to 1 + x
    contrast: float  # the same
    saturation: float  # the same
    hue: float  # x for a uniform shift by up to x turns of the colour circle either way; 0.5 at most
    stain: float  # x for factors of the three stains from 1 - x to 1 + x, and shifts by up to 0.2 x either way
    grayscale_probability: float  # conversion to gray
    blur_probability: tuple[float, float, float]  # Gaussian blur
    blur_sigma: tuple[float, float]  # lowest and highest standard deviation in pixels
    blur_kernel_size: int  # taps of the blur on each axis, odd
    solarize_probability: tuple[float, float, float]  # inversion of the bright values
    solarize_threshold: float  # level, of 0 to 255, from which on a value is inverted
    background_probability: float  # another image's pixels outside a disc around the centre
    background_radius: tuple[float, float]  # lowest and highest radius of it, as a share of half the shorter side

    def __post_init__(self) -> None:
        for name, length in (
            *(("blur_probability", 3), ("blur_sigma", 2), ("solarize_probability", 3)),
            ("background_radius", 2),
        ):
            values = tuple(getattr(self, name))  # a config file gives lists
            if len(values) != length:
                raise ValueError(f"{name}: expected {length} numbers, found {values}")
            object.__setattr__(self, name, values)
        for field in fields(self):
            value = getattr(self, field.name)
            highest = 1 if field.name.endswith("_probability") else HIGHEST.get(field.name, math.inf)
            if not all(0 <= v <= highest and v < math.inf for v in (value if isinstance(value, tuple) else (value,))):
                raise ValueError(f"{field.name}: must lie between 0 and {highest}, found {value}")
        for name in ("blur_sigma", "background_radius"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name}: expected 0 < lowest <= highest, found {(low, high)}")
        if self.blur_kernel_size % 2 != 1:
            raise ValueError(f"blur_kernel_size: must be odd and at least 1, found {self.blur_kernel_size}")


class CropParameters(NamedTuple):
    """The random values of one crop, in the order of the operations."""

    box: tuple[int, int, int, int]  # top, left, height, width in pixels
    angle: float  # degrees counter-clockwise; 0: no rotation
    fill: int  # gray level of the corners after a rotation
    hflip: bool
    vflip: bool
    quarter_turn: bool
    stains: tuple[Sequence[float], Sequence[float]] | None  # factors and shifts of the three stains
    jitter: Sequence[tuple[str, float]]  # names of JITTER with their strengths, first to last
    grayscale: bool
    sigma: float  # of the blur, in pixels; 0: no blur
    solarized: bool


def draw_box(rng: Random, height: int, width: int, scale: Sequence[float]) -> tuple[int, int, int, int]:
    """Draw a crop box (top, left, height, width) with the distribution of torchvision's RandomResizedCrop.

    Area (lowest and highest share of the image's in `scale`) and log aspect ratio are uniform. The first of ten tries
    that fits into the image is taken; if none fits, the largest central box with an allowed ratio.
    """
    log_low, log_high = math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])
    for _ in range(N_BOX_TRIES):
        area = rng.uniform(*scale) * height * width
        ratio = math.exp(rng.uniform(log_low, log_high))
        box_height, box_width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < box_height <= height and 0 < box_width <= width:
            return rng.randint(0, height - box_height), rng.randint(0, width - box_width), box_height, box_width
    box_height, box_width = min(height, round(width / CROP_RATIO[0])), min(width, round(height * CROP_RATIO[1]))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def draw_crop(
    rng: Random, height: int, width: int, scale: Sequence[float], settings: AugmentationSettings, kind: int
) -> CropParameters:
    """Draw the random parameters of a crop of an image [H, W]; `kind` 0, 1: first, second global crop, 2: local."""
    s = settings
    jitter: list[tuple[str, float]] = []
    box, stains = draw_box(rng, height, width, scale), None
    if s.stain:  # without it nothing is drawn, so that other values stay those of a recipe that lacks it
        stains = (
            [rng.uniform(max(0.0, 1 - s.stain), 1 + s.stain) for _ in STAINS],
            [rng.uniform(-s.stain, s.stain) * STAIN_SHIFT for _ in STAINS],
        )
    if rng.random() < s.jitter_probability:
        for name in ("brightness", "contrast", "saturation"):
            spread = getattr(s, name)
            jitter.append((name, rng.uniform(max(0.0, 1 - spread), 1 + spread)))
        jitter.append(("hue", rng.uniform(-s.hue, s.hue)))
        rng.shuffle(jitter)
    return CropParameters(
        box=box,
        angle=rng.uniform(0, 360) if rng.random() < s.rotation_probability else 0.0,
        fill=rng.randrange(256),
        hflip=rng.random() < s.hflip_probability,
        vflip=rng.random() < s.vflip_probability,
        quarter_turn=rng.random() < s.quarter_turn_probability,
        stains=stains,
        jitter=jitter,
        grayscale=rng.random() < s.grayscale_probability,
        sigma=rng.uniform(*s.blur_sigma) if rng.random() < s.blur_probability[kind] else 0.0,
        solarized=rng.random() < s.solarize_probability[kind],
    )


def replace_background(image: Pixels, other: Pixels, radius: float) -> Pixels:
    """Take from `other` what lies outside a disc around the centre of [H, W, 3]; `radius` is a share of min(H, W) / 2.

    `other` is resized to the image's size. The border is a linear blend, so that no edge shows which pixels are new.
    """
    height, width = image.shape[:2]
    if other.shape != image.shape:
        other = cv2.resize(other, (width, height), interpolation=cv2.INTER_AREA)
    weights = _disc(height, width)  # of 1 / BACKGROUND_EDGE times the distance from the centre
    own = np.clip(radius / BACKGROUND_EDGE + 0.5 - weights, 0, 1)  # [H, W]
    return cv2.blendLinear(image, other, own, 1 - own)


@cache  # training images have one size
def _disc(height: int, width: int) -> NDArray[np.float32]:
    """Return each pixel's distance from the centre, in units of BACKGROUND_EDGE of half the shorter side: [H, W]."""
    rows, columns = (np.arange(n, dtype=np.float32) - (n - 1) / 2 for n in (height, width))
    return np.hypot(rows[:, None], columns) / (BACKGROUND_EDGE * min(height, width) / 2)


def crop_resize(image: Pixels, box: Sequence[int], size: int) -> Pixels:
    """Cut a box (top, left, height, width) out of [H, W, 3] and resize it to [S, S, 3], bicubic with antialiasing.

    OpenCV's bicubic filter differs (a = -0.75, no antialiasing). PyTorch's is within 2 levels of Pillow's. Any strides
    do; channels-last memory is the fast one.
    """
    top, left, height, width = box
    cut = np.ascontiguousarray(image[top : top + height, left : left + width])
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(cut)[None].permute(0, 3, 1, 2), (size, size), mode="bicubic", antialias=True
    )
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())


def rotate(image: Pixels, degrees: float, fill: int) -> Pixels:
    """Rotate a square image counter-clockwise about its centre, by nearest pixel; the corners get the level `fill`."""
    size = len(image)
    centre = (size - 1) / 2
    matrix = cv2.getRotationMatrix2D((centre, centre), degrees, 1)
    return cv2.warpAffine(image, matrix, (size, size), flags=cv2.INTER_NEAREST, borderValue=(fill, fill, fill))


def flip(image: Pixels, hflip: bool, vflip: bool) -> Pixels:
    """Mirror left-right, upside-down, both or neither."""
    if hflip:
        return cv2.flip(image, -1 if vflip else 1)
    return cv2.flip(image, 0) if vflip else image


def quarter_turn(image: Pixels) -> Pixels:
    """Rotate by 90 degrees counter-clockwise."""
    return cv2.rotate(image, cv2.ROTATE_90_COUNTERCLOCKWISE)


def adjust_brightness(image: Pixels, factor: float) -> Pixels:
    """Multiply by `factor` >= 0 and clamp."""
    return cv2.convertScaleAbs(image, alpha=factor)


def adjust_contrast(image: Pixels, factor: float) -> Pixels:
    """Move away from (factor > 1) or towards the image's mean luma and clamp; `factor` >= 0."""
    luma = np.dot(cv2.mean(image)[:3], GRAY_WEIGHTS)
    return cv2.addWeighted(image, factor, image, 0, (1 - factor) * luma)


def adjust_saturation(image: Pixels, factor: float) -> Pixels:
    """Move away from (factor > 1) or towards each pixel's luma and clamp; `factor` >= 0."""
    return cv2.transform(image, factor * IDENTITY + (1 - factor) * GRAY_WEIGHTS)


def adjust_hue(image: Pixels, shift: float) -> Pixels:
    """Add `shift`, in turns of the colour circle, to the hue of HSV; value and saturation stay.

    In float32: Pillow's 256 steps of hue are up to 10 levels off for pure colours.
    """
    hsv: Any = cv2.cvtColor(image.astype(np.float32), cv2.COLOR_RGB2HSV)  # hue in degrees
    # OpenCV wraps a hue above 360 but not a negative one
    hsv[..., 0] += 360 * (shift % 1)
    return cv2.convertScaleAbs(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB))


def adjust_stains(image: Pixels, factors: Sequence[float], shifts: Sequence[float]) -> Pixels:
    """Multiply the amounts of the three stains in each pixel and add to them (Tellez et al. 2018, arXiv 1808.05896).

    The optical density -ln(level / 255) of a colour is a sum over stains; level 0 counts as 1.
    """
    amounts = -np.log(np.maximum(image, 1).astype(np.float32) / 255) @ TO_STAINS  # [H, W, 3]
    changed = amounts * np.asarray(factors, np.float32) + np.asarray(shifts, np.float32)
    return np.rint(255 * np.exp(-changed @ STAINS)).clip(0, 255).astype(np.uint8)


def to_grayscale(image: Pixels) -> Pixels:
    """Replace all three channels by the luma."""
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def gaussian_blur(image: Pixels, sigma: float, kernel_size: int) -> Pixels:
    """Blur with a normalised Gaussian of `kernel_size` taps; the image is mirrored beyond its border pixels."""
    # a tap further away than 4.5 sigma weighs less than 5e-5 of the middle one
    radius = min(kernel_size // 2, int(4.5 * sigma))
    if radius == 0:
        return image
    weights = cv2.getGaussianKernel(2 * radius + 1, sigma, cv2.CV_32F)
    return cv2.sepFilter2D(image, -1, weights, weights, borderType=cv2.BORDER_REFLECT_101)


def to_planes(image: Pixels) -> Pixels:
    """Reorder [H, W, 3] to a contiguous [3, H, W]."""
    planes = np.empty((3, *image.shape[:2]), dtype=np.uint8)
    cv2.split(image, list(planes))
    return planes


def solarize(image: Pixels, threshold: float) -> Pixels:
    """Invert every level >= `threshold`."""
    levels = np.arange(256, dtype=np.uint8)
    return cv2.LUT(image, np.where(levels >= threshold, 255 - levels, levels))


JITTER = {
    "brightness": adjust_brightness,
    "contrast": adjust_contrast,
    "saturation": adjust_saturation,
    "hue": adjust_hue,
}


def make_crop(image: Pixels, crop: CropParameters, size: int, settings: AugmentationSettings) -> Pixels:
    """Apply the values of `crop` to an image [H, W, 3]; return the crop, uint8 [S, S, 3]."""
    made = crop_resize(image, crop.box, size)
    if crop.angle:
        made = rotate(made, crop.angle, crop.fill)
    made = flip(made, crop.hflip, crop.vflip)
    if crop.quarter_turn:
        made = quarter_turn(made)
    if crop.stains is not None:
        made = adjust_stains(made, *crop.stains)
    for name, strength in crop.jitter:
        made = JITTER[name](made, strength)
    if crop.grayscale:
        made = to_grayscale(made)
    if crop.sigma:
        made = gaussian_blur(made, crop.sigma, settings.blur_kernel_size)
    if crop.solarized:
        made = solarize(made, settings.solarize_threshold)
    return made


class DataAugmentationDINO:
    """The recipe `default`: DINOv2's, with more flips and with quarter turns, which suit cells."""

    recipe = "default"

    def __init__(
        self,
        global_crops_scale: Sequence[float],
        local_crops_scale: Sequence[float],
        local_crops_number: int,
        global_crops_size: int = 224,
        local_crops_size: int = 96,
        *,
        dtype: torch.dtype = torch.float32,
        **settings: Any,
    ) -> None:
        """Set up the recipe.

        Args:
            global_crops_scale, local_crops_scale: lowest and highest share of the image's area in a crop.
            local_crops_number: L; 0 means none.
            global_crops_size, local_crops_size: S and s, in pixels.
            dtype: of the crops: a float type for normalised ones, uint8 for levels of 0 to 255.
            **settings: fields of `AugmentationSettings` that replace the recipe's own value.
        """
        known = [field.name for field in fields(AugmentationSettings)]
        unknown = sorted(settings.keys() - known)
        if unknown:
            raise ValueError(f"unknown augmentation settings {unknown}; there are: {', '.join(known)}")
        if not (dtype.is_floating_point or dtype == torch.uint8):
            raise ValueError(f"dtype: must be a float type or torch.uint8, found {dtype}")
        self.dtype = dtype
        self.settings = AugmentationSettings(**{**dinov2_default_config.augmentation[self.recipe], **settings})
        least_size = self.settings.blur_kernel_size // 2 + 1  # the blur mirrors that many pixels
        for name, value, least in (
            ("local_crops_number", local_crops_number, 0),
            ("global_crops_size", global_crops_size, least_size),
            ("local_crops_size", local_crops_size, least_size),
        ):
            if int(value) != value or value < least:
                raise ValueError(f"{name}: must be a whole number, at least {least}, found {value}")
        for name, (low, high) in (("global_crops_scale", global_crops_scale), ("local_crops_scale", local_crops_scale)):
            if not 0 < low <= high <= 1:
                raise ValueError(f"{name}: expected 0 < lowest <= highest share of the area <= 1, found {low}, {high}")
        self.views = [(kind, int(global_crops_size), tuple(global_crops_scale)) for kind in range(N_GLOBAL_CROPS)]
        self.views += [(N_GLOBAL_CROPS, int(local_crops_size), tuple(local_crops_scale))] * int(local_crops_number)

    def __call__(
        self,
        image: Image.Image | Tensor,
        rng: Random | None = None,
        draw_other: Callable[[Random], Tensor] | None = None,
    ) -> dict[str, Any]:
        """Make the crops of one image, uint8 [3, H, W] or a Pillow image.

        Without `rng`, torch's default generator seeds one. `draw_other` draws the image of another background, uint8
        [3, H, W]; without it, backgrounds stay. The result has `global_crops`, two [3, S, S] of `dtype`;
        `global_crops_teacher`, the same two; `local_crops`, L of [3, s, s]; and `offsets`, (), which upstream's users
        expect.
        """
        pixels = _pixels(image)
        height, width = pixels.shape[:2]
        rng = Random(int(torch.randint(2**62, ()))) if rng is None else rng
        crops, s = [], self.settings
        for kind, size, scale in self.views:
            crop, seen = draw_crop(rng, height, width, scale, s, kind), pixels
            # nothing is drawn if backgrounds stay: the other values are then those of a recipe without them
            if draw_other is not None and s.background_probability and rng.random() < s.background_probability:
                seen = replace_background(pixels, _pixels(draw_other(rng)), rng.uniform(*s.background_radius))
            made = make_crop(seen, crop, size, s)
            levels = torch.from_numpy(to_planes(made))  # [3, S, S]
            crops.append(levels if self.dtype == torch.uint8 else normalize_images(levels).to(self.dtype))
        return {
            "global_crops": crops[:N_GLOBAL_CROPS],
            "global_crops_teacher": crops[:N_GLOBAL_CROPS],
            "local_crops": crops[N_GLOBAL_CROPS:],
            "offsets": (),
        }


class DataAugmentationHEMA(DataAugmentationDINO):
    """The recipe `hema`: rotations by any angle, stronger hue, no solarisation."""

    recipe = "hema"


# for `SupervisedAugmentation`, in the place of values of the recipe `default`: what it leaves of colour and detail is
# what labels depend on
MILD = {
    **{"jitter_probability": 0.8, "brightness": 0.1, "contrast": 0.1, "saturation": 0.05, "hue": 0.01},
    **{"grayscale_probability": 0.0, "blur_probability": (0.0, 0.0, 0.0), "solarize_probability": (0.0, 0.0, 0.0)},
}


class SupervisedAugmentation:
    """One random crop of an image, for training with labels: flips, quarter turns and mild colour changes."""

    def __init__(self, size: int, scale: Sequence[float] = (0.7, 1.0), **settings: Any) -> None:
        """Set S, the share of the central square that a crop covers, and fields of `AugmentationSettings`."""
        self.size, self.scale = size, scale
        self.settings = AugmentationSettings(**{**dinov2_default_config.augmentation["default"], **MILD, **settings})

    def __call__(self, image: np.ndarray, rng: Random) -> np.ndarray:
        """Make a crop, uint8 [S, S, 3], of an image uint8 [H, W, 3]."""
        height, width = image.shape[:2]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = image[
            top : top + side, left : left + side
        ].copy()  # what evaluation keeps; decoded images are read-only
        return make_crop(square, draw_crop(rng, side, side, self.scale, self.settings, 0), self.size, self.settings)


def _pixels(image: Image.Image | Tensor) -> np.ndarray:
    """Return the image as uint8 [H, W, 3], without a copy if it is a tensor."""
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    if image.dtype != torch.uint8 or image.ndim != 3 or len(image) != 3 or not image.numel():
        raise ValueError(
            f"image: expected uint8 [3, H, W], found {image.dtype} {list(image.shape)}; pass one image at a time, "
            f"as it is decoded: the augmentation normalises it"
        )
    return image.permute(1, 2, 0).numpy()
