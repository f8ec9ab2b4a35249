"""Training steps, ours and upstream's, and made-up crops to take them with, for the benchmarks of this folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from plain_step import PlainStep
from torch import Tensor

from dinov2 import distributed
from dinov2.configs import CONFIG_FOLDER
from dinov2.data.collate import assemble_batch, draw_masks
from dinov2.data.masking import MaskingGenerator
from dinov2.train.batches import resolve_batch_size
from dinov2.train.optimizer import StepGuard, build_optimizer, clip_gradients
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.utils.config import load_run_config
from dinov2.utils.precision import fast_matmul_within, resolve_precision

NETWORKS = [
    f"compute_precision.{role}.{part}"
    for role in ("student", "teacher")
    for part in ("backbone", "dino_head", "ibot_head")
]
LARGE_RECIPE = CONFIG_FOLDER / "train" / "custom.yaml"
SMALL_RECIPE = CONFIG_FOLDER / "train" / "small_from_scratch.yaml"
TEACHER_TEMP, MOMENTUM, MAX_NORM, LR = 0.05, 0.994, 3.0, 1e-5


def recipe(
    device: torch.device, precision: str, overrides: Sequence[str] = (), config: Path = LARGE_RECIPE
) -> DictConfig:
    """A run's configuration, from random weights and with all networks in one `param_dtype`, changed by `overrides`."""
    settings = [
        *("train.dataset_path=none", "student.pretrained_weights=null"),
        # What trained weights come near to. With 1e-5 the CLS tokens of a random net are equal to four digits, and
        # rounding decides which is whose neighbour in KoLeo
        "student.layerscale=1.0",
        *(f"{network}.mixed_precision.param_dtype={precision}" for network in NETWORKS),
    ]
    cfg = load_run_config(config, [*settings, *overrides])
    resolve_batch_size(cfg.train, distributed.get_world_size())
    resolve_precision(cfg.compute_precision, device.type)
    return cfg


def build_model(cfg: DictConfig, device: torch.device) -> SSLMetaArch:
    """The networks with the same random weights each time."""
    torch.manual_seed(0)
    return SSLMetaArch(cfg).to(device)


def made_up_batch(cfg: DictConfig, device: torch.device, seed: int = 0) -> dict[str, Any]:
    """Crops of noise, and masks as a run draws them."""
    batch, crops = cfg.train.batch_size_per_gpu, cfg.crops
    side = crops.global_crops_size // cfg.student.patch_size
    masks, upperbound = draw_masks(
        *(2 * batch, cfg.ibot.mask_ratio_min_max, cfg.ibot.mask_sample_probability),
        *(MaskingGenerator((side, side), max_num_patches=side * side // 2), seed),
    )
    generator = torch.Generator().manual_seed(seed)

    def noise(n: int, size: int) -> list[Tensor]:
        return [torch.randn(batch, 3, size, size, generator=generator) for _ in range(n)]

    made = {
        "global_crops": noise(2, crops.global_crops_size),
        "local_crops": noise(crops.local_crops_number, crops.local_crops_size),
    }
    batch = assemble_batch(made, masks, upperbound, torch.float32)
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


class OurStep:
    """One step as train.py takes it: zero the gradients, forward and backward, clip, AdamW with its guard, EMA."""

    def __init__(self, model: SSLMetaArch) -> None:
        self.model = model
        self.optimizer = build_optimizer(model.cfg.optim, model.get_params_groups())
        self.guard = StepGuard(model.device)
        for group in self.optimizer.param_groups:
            group["lr"] = LR

    def __call__(
        self,
        images: Mapping[str, Any],
        teacher_temp: float = TEACHER_TEMP,
        momentum: float = MOMENTUM,
        max_norm: float = MAX_NORM,
    ) -> dict[str, Tensor]:
        with fast_matmul_within(True, self.model.device):
            self.optimizer.zero_grad(set_to_none=True)
            losses = self.model.forward_backward(images, teacher_temp)
            with self.model.clock.stage("optimizer"):
                self.guard.step(self.optimizer, losses, clip_gradients(self.model.student, max_norm))
            with self.model.clock.stage("teacher update"):
                self.model.update_teacher(momentum)
        return losses


class UpstreamsStep:
    """One step as upstream takes it, from the same weights as `model`'s, with torch's own settings."""

    def __init__(self, model: SSLMetaArch, dtype: torch.dtype, attention: str | None = None) -> None:
        default = "sdpa" if model.device.type == "cuda" else "explicit"
        self.plain = PlainStep(model.cfg, model, dtype, attention or default)
        self.optimizer = self.plain.optimizer
        for group in self.optimizer.param_groups:
            group["lr"] = LR

    def __call__(
        self,
        images: Mapping[str, Any],
        teacher_temp: float = TEACHER_TEMP,
        momentum: float = MOMENTUM,
        max_norm: float = MAX_NORM,
    ) -> dict[str, Tensor]:
        with fast_matmul_within(False):
            return self.plain(images, teacher_temp, momentum, max_norm)
