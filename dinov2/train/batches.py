"""From the dataset string to batch dicts on the training device: decode in workers, everything random here.

What batch i holds is a pure function of (train.seed, i): a resumed run sees what the unbroken one would have seen.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dinov2.data import (
    DataAugmentationDINO,
    DataAugmentationHEMA,
    MaskingGenerator,
    SamplerType,
    make_data_loader,
    make_dataset,
)
from dinov2.data.augmentations import N_GLOBAL_CROPS
from dinov2.data.bad_images import BadImages
from dinov2.data.collate import assemble_batch, draw_masks
from dinov2.data.datasets.hema_data import HemaStandardDataset
from dinov2.data.loaders import collate_samples
from dinov2.distributed import get_rank, get_world_size
from dinov2.utils.seeds import derive_seed

_AUGMENTATIONS: dict[str, type[DataAugmentationDINO] | type[DataAugmentationHEMA]] = {
    "default": DataAugmentationDINO,
    "hema": DataAugmentationHEMA,
}


def build_dataset(cfg: Any) -> HemaStandardDataset:
    """The pictures that `train.dataset_path` names, decoded to squares."""
    size = cfg.train.image_size or cfg.crops.global_crops_size
    return make_dataset(cfg.train.dataset_path, image_size=size, fit=cfg.train.image_fit, seed=cfg.train.seed)


def build_augmentation(cfg: Any) -> DataAugmentationDINO | DataAugmentationHEMA:
    """Global and local crops as `data_transform` and its block of `augmentation` say."""
    crops = cfg.crops
    settings: dict[str, Any] = dict(cfg.augmentation[cfg.data_transform])
    return _AUGMENTATIONS[cfg.data_transform](
        tuple(crops.global_crops_scale),
        tuple(crops.local_crops_scale),
        crops.local_crops_number,
        global_crops_size=crops.global_crops_size,
        local_crops_size=crops.local_crops_size,
        **settings,
    )


class TrainBatches:
    """Iterates over the batch dicts of iterations `start`, `start + 1`, ... without end."""

    def __init__(self, cfg: Any, dataset: HemaStandardDataset, device: torch.device, start: int = 0) -> None:
        self.cfg, self.dataset, self.device, self.start = cfg, dataset, device, start
        record = Path(cfg.train.output_dir) / "bad_images.csv"
        self.bad_images = BadImages(record, len(dataset), cfg.train.max_bad_fraction)
        self.augmentation = build_augmentation(cfg)
        side = cfg.crops.global_crops_size // cfg.student.patch_size
        self.mask_generator = MaskingGenerator(input_size=(side, side), max_num_patches=int(0.5 * side * side))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        cfg, seed = self.cfg, self.cfg.train.seed
        batch_size = cfg.train.batch_size_per_gpu
        loader = make_data_loader(
            dataset=self.dataset,
            batch_size=batch_size,
            num_workers=cfg.train.num_workers,
            shuffle=True,
            seed=seed,
            sampler_type=SamplerType.SHARDED_INFINITE,
            sampler_advance=self.start * batch_size * get_world_size(),
            drop_last=True,
            collate_fn=collate_samples,
        )
        for iteration, samples in enumerate(loader, self.start):
            self.bad_images.record(samples.failures)
            generator = torch.Generator().manual_seed(derive_seed(seed, "augmentation", iteration))
            images = samples.images.to(self.device, non_blocking=True)
            crops = self.augmentation(images, generator, rank=get_rank(), world_size=get_world_size())
            # Masks are drawn for the global batch, and this process takes those of its pictures, as it does with crops
            masks, upperbound = draw_masks(
                N_GLOBAL_CROPS * batch_size * get_world_size(),
                cfg.ibot.mask_ratio_min_max,
                cfg.ibot.mask_sample_probability if cfg.ibot.loss_weight > 0 else 0.0,
                self.mask_generator,
                np.random.default_rng(derive_seed(seed, "masks", iteration)),
            )
            own_masks = masks.unflatten(0, (N_GLOBAL_CROPS, -1))[:, get_rank() :: get_world_size()].flatten(
                0, 1
            )  # [2B, P]
            yield assemble_batch(crops, own_masks, upperbound, torch.float32)


def timed(batches: TrainBatches, on_wait: Callable[[float], None]) -> Iterator[dict[str, Any]]:
    """Pass batches on, and tell how long each was waited for."""
    iterator = iter(batches)
    while True:
        started = time.perf_counter()
        batch = next(iterator)
        on_wait(time.perf_counter() - started)
        yield batch
