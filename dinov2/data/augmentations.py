"""Two global and some local random crops of each picture of a batch, on CPU or GPU.

The recipes `default` (DINOv2, Oquab et al. 2023, arXiv 2304.07193, with flips and turns that suit cells) and `hema`
(DinoBloom, Koch et al. 2024, arXiv 2404.05022) share one implementation and differ in their `AugmentationSettings`.

Dimension key:  B pictures, L local crops, S crop side, s local crop side

All that is random comes from one matrix of uniform numbers, a row per picture, drawn on the CPU: what happens to a
batch is the same function of the generator on every device, and a process that holds every W-th picture of a larger
batch can draw its share of it. `crop_parameters` turns these numbers into boxes, angles and so on, `crop_making` makes
the crops: with OpenCV on a CPU and tensors on a GPU, whose values differ by the rounding of the former.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dinov2.data.crop_making import apply_crops
from dinov2.data.crop_parameters import N_UNIFORMS, AugmentationSettings, CropParameters, draw_crops

N_GLOBAL_CROPS = 2

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
        *,
        dtype: torch.dtype = torch.float32,
        compiled: bool = False,
        **settings: Any,
    ) -> None:
        """Set up the recipe.

        Args:
            global_crops_scale: lowest and highest share of the picture's area in a global crop.
            local_crops_scale: the same for local crops.
            local_crops_number: L local crops a picture; 0 means none.
            global_crops_size: S, side in pixels.
            local_crops_size: s, side in pixels.
            dtype: of the crops: float32, bfloat16 or float16. They are computed in float32 (OpenCV: in whole levels).
            compiled: on a GPU, let `torch.compile` make a few kernels of all operations.
            **settings: fields of `AugmentationSettings` that replace the recipe's own value.

        Raises:
            ValueError: if a value is out of range or a setting is unknown.
        """
        known = [field.name for field in fields(AugmentationSettings)]
        unknown = sorted(settings.keys() - known)
        if unknown:
            raise ValueError(f"unknown augmentation settings {unknown}; there are: {', '.join(known)}")
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype: must be torch.float32, torch.bfloat16 or torch.float16, found {dtype}")
        self.dtype, self.compiled = dtype, compiled
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
            `global_crops`: two [B, 3, S, S] of `dtype`, normalised; `global_crops_teacher`: the same two;
            `local_crops`: L of [B, 3, s, s]; `offsets`: (), a key that upstream's users expect.

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

        made = apply_crops(batch, global_crops, self.global_crops_size, self.settings, self.dtype, self.compiled)
        global_views = list(made.view(N_GLOBAL_CROPS, n, *made.shape[1:]).unbind())
        local_views: list[Tensor] = []
        if self.local_crops_number:
            made = apply_crops(batch, local_crops, self.local_crops_size, self.settings, self.dtype, self.compiled)
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
