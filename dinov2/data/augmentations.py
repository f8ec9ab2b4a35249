"""Two global and some local random crops of each picture of a batch, on CPU or GPU.

The recipes `default` (DINOv2, Oquab et al. 2023, arXiv 2304.07193, with flips and turns that suit cells) and `hema`
(DinoBloom, Koch et al. 2024, arXiv 2404.05022) share one implementation and differ in their `AugmentationSettings`.

Dimension key:  B pictures, R crops (all crops of one size of a batch), L local crops, S crop side, s local crop side

All that is random comes from one matrix of uniform numbers, a row per picture, drawn on the CPU: a batch is the same
function of the generator on every device, and a process that holds every W-th picture of a larger batch can draw its
share of it. Which crop gets which operation is settled on the CPU too, so nothing waits for the device. Upstream rounds
to 1/255 after each operation and this module never does, so the two differ by a level or two.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import permutations
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from dinov2.data import image_ops
from dinov2.data.transforms import IMAGENET_MEAN, IMAGENET_STD

CROP_RATIO = (3 / 4, 4 / 3)  # width / height of a crop, drawn log-uniformly
N_BOX_TRIES = 10
N_GLOBAL_CROPS = 2

# Values, of pictures read and crops made, that are worked on at a time. On a CPU a crop or a few stay in the cache; on
# a GPU this bounds the memory (some five float32 buffers of this size) and still fills the device.
CHUNK_VALUES_CPU = 2**19
CHUNK_VALUES_GPU = 2**26


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


# Upstream blurs with 1 - p where its code says p. In both recipes these are the probabilities that act.
DINO_SETTINGS = AugmentationSettings(
    hflip_probability=0.5,
    vflip_probability=0.5,
    quarter_turn_probability=0.5,
    rotation_probability=0.0,
    jitter_probability=0.8,
    brightness=0.4,
    contrast=0.4,
    saturation=0.2,
    hue=0.1,
    grayscale_probability=0.2,
    blur_probability=(0.0, 0.9, 0.5),  # the DINOv2 paper says (1.0, 0.1, 0.5)
    blur_sigma=(0.1, 2.0),
    blur_kernel_size=9,
    solarize_probability=(0.0, 0.2, 0.0),
    solarize_threshold=128,
)
HEMA_SETTINGS = AugmentationSettings(
    hflip_probability=0.5,
    vflip_probability=0.5,
    quarter_turn_probability=0.5,
    rotation_probability=0.3,
    jitter_probability=0.8,
    brightness=0.3,
    contrast=0.2,
    saturation=0.3,
    hue=0.15,
    grayscale_probability=0.1,
    blur_probability=(0.9, 0.7, 0.5),  # DinoBloom's code writes (0.1, 0.3, 0.5)
    blur_sigma=(0.1, 2.0),
    blur_kernel_size=9,
    solarize_probability=(0.0, 0.0, 0.0),
    solarize_threshold=128,
)


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
    jitter_order: Tensor  # int64 [R, 4]: indices into JITTER_OPERATIONS, first to last
    jitter_strength: Tensor  # [R, 4]: of each of JITTER_OPERATIONS
    grayscale: Tensor  # bool [R]
    blurred: Tensor  # bool [R]
    sigma: Tensor  # [R] pixels
    solarized: Tensor  # bool [R]

    def __len__(self) -> int:
        return len(self.picture)

    def select(self, crops: slice) -> "CropParameters":
        """The parameters of some crops."""
        return CropParameters(**{name: values[crops] for name, values in vars(self).items()})


Operation = Callable[..., Tensor]  # (crops [n, S, 3, S], parameters [n], ...) -> crops; may overwrite them


class _Step(NamedTuple):
    """One operation on some crops of a chunk."""

    operation: Operation
    rows: Tensor | None  # int64 [n], which crops; None: all
    arguments: tuple[Tensor, ...]  # [n] each


JITTER_OPERATIONS: tuple[Operation, ...] = (
    image_ops.adjust_brightness_,
    image_ops.adjust_contrast_,
    image_ops.adjust_saturation_,
    image_ops.adjust_hue_,
)
JITTER_ORDERS = torch.tensor(list(permutations(range(len(JITTER_OPERATIONS)))))  # [24, 4]
N_BOX_UNIFORMS = 2 * N_BOX_TRIES + 2
N_UNIFORMS = N_BOX_UNIFORMS + 16  # a crop


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


def apply_crops(images: Tensor, crops: CropParameters, size: int, settings: AugmentationSettings) -> Tensor:
    """Make the crops that `crops` describes.

    Args:
        images: uint8 [B, 3, H, W] on any device.
        crops: R crops of these pictures.
        size: S, the crops' side.
        settings: `blur_kernel_size` and `solarize_threshold` are read from it.

    Returns:
        float32 [R, 3, S, S] on the pictures' device, normalised with ImageNet's mean and standard deviation.
    """
    device = images.device
    height, width = images.shape[2:]
    output = torch.empty(len(crops), 3, size, size, device=device)
    chunk_values = CHUNK_VALUES_CPU if device.type == "cpu" else CHUNK_VALUES_GPU
    chunk = max(1, chunk_values // (3 * (size * size + height * width)))

    # A quarter turn is a left-right flip, made with the cut, and a transposition, the first step of the plan.
    top, left, box_height, box_width = crops.box.unbind(dim=1)
    constants = [torch.tensor(IMAGENET_MEAN).view(3, 1, 1), 1 / torch.tensor(IMAGENET_STD).view(3, 1, 1)]
    [[picture, top, box_height, vflip, left, box_width, hflip], [mean, per_std]] = _send(
        [[crops.picture, top, box_height, crops.vflip, left, box_width, crops.hflip ^ crops.quarter_turn], constants],
        device,
    )
    rows, row_weights = image_ops.resize_taps(top, box_height, vflip, size, height)
    columns, column_weights = image_ops.resize_taps(left, box_width, hflip, size, width)
    column_weights /= 255

    ends = crops.box[:, :2] + crops.box[:, 2:]
    for start in range(0, len(crops), chunk):
        here = slice(start, start + chunk)
        # Only what this chunk's boxes cover is read; with one crop at a time, as on a CPU, that is its own box.
        first_row, first_column = crops.box[here, :2].amin(dim=0).tolist()
        last_row, last_column = ends[here].amax(dim=0).tolist()
        covered = images[:, :, first_row:last_row, first_column:last_column].index_select(0, picture[here])
        work = image_ops.crop_resize(
            covered, (rows[here] - first_row, row_weights[here]), (columns[here] - first_column, column_weights[here])
        ).clamp_(0.0, 1.0)
        work = _carry_out(_plan(crops.select(here), settings), work)
        torch.sub(work.transpose(1, 2), mean, out=output[here]).mul_(per_std)
    return output


def _plan(crops: CropParameters, settings: AugmentationSettings) -> list[_Step]:
    """All steps after the cut, in order; steps that no crop gets are left out."""

    def blur(pictures: Tensor, sigma: Tensor) -> Tensor:
        return image_ops.gaussian_blur(pictures, sigma, settings.blur_kernel_size)

    def solarize(pictures: Tensor) -> Tensor:
        return image_ops.solarize_(pictures, settings.solarize_threshold / 255)

    steps: list[_Step] = []

    def add(operation: Operation, chosen: list[bool], *arguments: Tensor) -> None:
        if all(chosen):
            steps.append(_Step(operation, None, arguments))
        elif any(chosen):
            rows = torch.tensor([row for row, is_chosen in enumerate(chosen) if is_chosen])
            steps.append(_Step(operation, rows, tuple(values[rows] for values in arguments)))

    add(image_ops.transpose, crops.quarter_turn.tolist())
    # The recipe rotates, then mirrors. After the mirroring, the same rotation goes the other way if only one axis was.
    degrees = torch.where(crops.hflip ^ crops.vflip, -crops.angle, crops.angle)
    radians = torch.deg2rad(degrees.double())
    add(image_ops.rotate, crops.rotated.tolist(), radians.cos().float(), radians.sin().float(), crops.fill)
    jittered = crops.jittered.tolist()
    for numbers in crops.jitter_order.T.tolist():
        for number, operation in enumerate(JITTER_OPERATIONS):
            chosen = [is_jittered and number == its for is_jittered, its in zip(jittered, numbers, strict=True)]
            add(operation, chosen, crops.jitter_strength[:, number])
    add(image_ops.to_grayscale_, crops.grayscale.tolist())
    add(blur, crops.blurred.tolist(), crops.sigma)
    add(solarize, crops.solarized.tolist())
    return steps


def _carry_out(steps: list[_Step], work: Tensor) -> Tensor:
    """Take the crops [R, S, 3, S] through the steps; `work` is overwritten."""
    on_device = _send([[*([] if step.rows is None else [step.rows]), *step.arguments] for step in steps], work.device)
    for step, sent in zip(steps, on_device, strict=True):
        if step.rows is None:
            work = step.operation(work, *sent)
        else:
            rows, *arguments = sent
            work.index_copy_(0, rows, step.operation(work.index_select(0, rows), *arguments))
    return work


def _send(groups: list[list[Tensor]], device: torch.device) -> list[list[Tensor]]:
    """Copy many small CPU tensors to `device`, one transfer per type, without waiting for it.

    A copy to a GPU is asynchronous only from pinned memory.
    """
    if device.type == "cpu":
        return groups
    sent: dict[int, Tensor] = {}
    tensors = [tensor for group in groups for tensor in group]
    for dtype in {tensor.dtype for tensor in tensors}:
        same = [tensor for tensor in tensors if tensor.dtype == dtype]
        packed = torch.cat([tensor.flatten() for tensor in same])
        packed = (packed.pin_memory() if device.type == "cuda" else packed).to(device, non_blocking=True)
        for tensor, values in zip(same, packed.split([tensor.numel() for tensor in same]), strict=True):
            sent[id(tensor)] = values.view(tensor.shape)
    return [[sent[id(tensor)] for tensor in group] for group in groups]


class _MultiCropAugmentation:
    """What both recipes share; `preset` is what tells them apart."""

    preset: AugmentationSettings

    def __init__(
        self,
        global_crops_scale: Sequence[float],
        local_crops_scale: Sequence[float],
        local_crops_number: int,
        global_crops_size: int = 224,
        local_crops_size: int = 96,
        **settings: Any,
    ) -> None:
        """Set up the recipe.

        Args:
            global_crops_scale: lowest and highest share of the picture's area in a global crop.
            local_crops_scale: the same for local crops.
            local_crops_number: L local crops a picture; 0 means none.
            global_crops_size: S, side in pixels.
            local_crops_size: s, side in pixels.
            **settings: fields of `AugmentationSettings` that replace the recipe's own value.

        Raises:
            ValueError: if a value is out of range or a setting is unknown.
        """
        known = [field.name for field in fields(AugmentationSettings)]
        unknown = sorted(settings.keys() - known)
        if unknown:
            raise ValueError(f"unknown augmentation settings {unknown}; there are: {', '.join(known)}")
        self.settings = replace(self.preset, **settings)
        self.global_crops_scale = _checked_scale("global_crops_scale", global_crops_scale)
        self.local_crops_scale = _checked_scale("local_crops_scale", local_crops_scale)
        least_size = self.settings.blur_kernel_size // 2 + 1  # the blur mirrors that many pixels
        for name, value, least in (
            ("local_crops_number", local_crops_number, 0),
            ("global_crops_size", global_crops_size, least_size),
            ("local_crops_size", local_crops_size, least_size),
        ):
            if int(value) != value or value < least:
                raise ValueError(f"{name}: must be a whole number, at least {least}, found {value}")
        self.local_crops_number = int(local_crops_number)
        self.global_crops_size = int(global_crops_size)
        self.local_crops_size = int(local_crops_size)

    def draw(
        self,
        n_images: int,
        height: int,
        width: int,
        generator: torch.Generator | None = None,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> tuple[CropParameters, CropParameters]:
        """Draw what happens to `n_images` pictures of one size.

        Numbers are drawn for `world_size * n_images` pictures, of which these are number rank, rank + world_size, ...:
        processes with equal generators together draw what a single one draws.

        Returns:
            parameters of the 2B global crops (all first ones, then all second ones) and of the L * B local crops.
        """
        n_crops = N_GLOBAL_CROPS + self.local_crops_number
        uniforms = torch.rand(world_size * n_images, n_crops, N_UNIFORMS, generator=generator)
        uniforms = uniforms[rank::world_size].transpose(0, 1)  # [2 + L, B, N_UNIFORMS]
        drawn = []
        for group, scale, kinds in (
            (uniforms[:N_GLOBAL_CROPS], self.global_crops_scale, [0, 1]),
            (uniforms[N_GLOBAL_CROPS:], self.local_crops_scale, [2] * self.local_crops_number),
        ):
            blur = torch.tensor([self.settings.blur_probability[kind] for kind in kinds])
            solarize = torch.tensor([self.settings.solarize_probability[kind] for kind in kinds])
            drawn.append(
                draw_crops(
                    group.reshape(-1, N_UNIFORMS),
                    height,
                    width,
                    picture=torch.arange(n_images).repeat(len(kinds)),
                    scale=scale,
                    settings=self.settings,
                    blur_probability=blur.repeat_interleave(n_images),
                    solarize_probability=solarize.repeat_interleave(n_images),
                )
            )
        return drawn[0], drawn[1]

    def __call__(
        self,
        images: Tensor | Image.Image,
        generator: torch.Generator | None = None,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> dict[str, Any]:
        """Make the crops of a batch.

        Args:
            images: uint8 [B, 3, H, W] on any device; or [3, H, W] or a PIL picture, and then the outputs have no B.
            generator: a CPU generator; None takes torch's default one.
            rank: which share of a larger batch this is, see `draw`.
            world_size: number of shares.

        Returns:
            `global_crops`: two float32 [B, 3, S, S], normalised; `global_crops_teacher`: the same two; `local_crops`:
            L of [B, 3, s, s]; `offsets`: (), a key that upstream's users expect.

        Raises:
            ValueError: if the pictures have another type or shape, or the generator is not on the CPU.
        """
        if isinstance(images, Image.Image):
            images = _from_pil(images)
        if images.dtype != torch.uint8 or images.ndim not in (3, 4) or images.shape[-3] != 3 or not images.numel():
            raise ValueError(
                f"images: expected uint8 [B, 3, H, W] or [3, H, W], found {images.dtype} {list(images.shape)}; "
                f"pass the pictures as they are decoded, the augmentation scales and normalises them"
            )
        if generator is not None and generator.device.type != "cpu":
            raise ValueError(f"generator: must be on the CPU, found {generator.device}; torch.Generator() makes one")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: must lie in [0, world_size), found {rank} of {world_size}")
        batch = images if images.ndim == 4 else images[None]
        n, _, height, width = batch.shape
        global_crops, local_crops = self.draw(n, height, width, generator, rank=rank, world_size=world_size)

        made = apply_crops(batch, global_crops, self.global_crops_size, self.settings)
        global_views = list(made.view(N_GLOBAL_CROPS, n, *made.shape[1:]).unbind())
        local_views: list[Tensor] = []
        if self.local_crops_number:
            made = apply_crops(batch, local_crops, self.local_crops_size, self.settings)
            local_views = list(made.view(self.local_crops_number, n, *made.shape[1:]).unbind())
        if images.ndim == 3:
            global_views, local_views = [view[0] for view in global_views], [view[0] for view in local_views]
        return {
            "global_crops": global_views,
            "global_crops_teacher": list(global_views),
            "local_crops": local_views,
            "offsets": (),
        }


class DataAugmentationDINO(_MultiCropAugmentation):
    """The recipe `default`: DINOv2's, with the flips and quarter turns that suit cells."""

    preset = DINO_SETTINGS


class DataAugmentationHEMA(_MultiCropAugmentation):
    """The recipe `hema`: rotations by any angle, stronger hue, no solarisation."""

    preset = HEMA_SETTINGS


def _checked_scale(name: str, scale: Sequence[float]) -> tuple[float, float]:
    values = tuple(scale)
    if len(values) != 2 or not 0 < values[0] <= values[1] <= 1:
        raise ValueError(
            f"{name}: expected (lowest, highest) share of the area, 0 < lowest <= highest <= 1, found {values}"
        )
    return values[0], values[1]


def _from_pil(image: Image.Image) -> Tensor:
    """uint8 [3, H, W] of a PIL picture of any mode."""
    rgb = image.convert("RGB")
    flat = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
    return flat.view(rgb.height, rgb.width, 3).permute(2, 0, 1)
