"""From the dataset string to batch dicts on the training device: decode in workers, everything random here.

What batch i holds is a pure function of (train.seed, i), whatever the number of processes: a resumed run sees what the
unbroken one would have seen.
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
from dinov2.data.balance import Balance
from dinov2.data.collate import assemble_batch, draw_masks
from dinov2.data.datasets.hema_data import HemaStandardDataset
from dinov2.data.loaders import collate_samples
from dinov2.data.transfer import sent_ahead
from dinov2.distributed import get_rank, get_world_size


class BatchShare:  # replaced with the data path
    def __init__(self, *_):
        pass


from dinov2.utils.seeds import derive_seed

_AUGMENTATIONS: dict[str, type[DataAugmentationDINO] | type[DataAugmentationHEMA]] = {
    "default": DataAugmentationDINO,
    "hema": DataAugmentationHEMA,
}


def build_dataset(cfg: Any) -> HemaStandardDataset:
    """The pictures that `train.dataset_path` names, decoded to squares.

    Raises:
        FileNotFoundError, ValueError: they cannot be read, or `train.balance` does not fit them.
    """
    size = cfg.train.image_size or cfg.crops.global_crops_size
    dataset = make_dataset(cfg.train.dataset_path, image_size=size, fit=cfg.train.image_fit, seed=cfg.train.seed)
    build_balance(cfg).quotas(dataset.source.set_names, dataset.source.set_sizes)
    return dataset


def build_balance(cfg: Any) -> Balance:
    """How often each set of pictures is seen, as `train.balance` says."""
    return Balance(dict(cfg.train.balance.weights), cfg.train.balance.temperature)


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


def resolve_batch_size(train: Any, world_size: int) -> None:
    """Settle, in the config's section `train`, how the pictures of a step spread over processes and parts.

    Without global_batch_size it is batch_size_per_gpu x accumulation_steps x processes. With it, batch_size_per_gpu is
    the most that a process takes at once, and accumulation_steps the fewest parts that keep to it.

    Raises:
        ValueError: the global batch does not divide.
    """
    total, parts = train.global_batch_size, train.accumulation_steps
    if total is None:
        train.accumulation_steps = parts or 1
        train.global_batch_size = train.batch_size_per_gpu * train.accumulation_steps * world_size
        return
    share, rest = divmod(total, world_size)
    if rest or not share:
        raise ValueError(
            f"train.global_batch_size: {total} pictures do not spread evenly over {world_size} processes; "
            f"{max(1, round(total / world_size)) * world_size} would"
        )
    if parts is None:
        parts = next(n for n in range(1, share + 1) if share % n == 0 and share // n <= train.batch_size_per_gpu)
    if share % parts:
        raise ValueError(
            f"train.accumulation_steps: {parts} parts do not divide the {share} pictures that each of {world_size} "
            f"processes has of train.global_batch_size={total}; leave accumulation_steps at null to have it chosen"
        )
    train.accumulation_steps, train.batch_size_per_gpu = parts, share // parts


class TrainBatches:
    """The batches of a run, from any of them on without end.

    A batch is spread over W processes and, within each, over A parts (gradient accumulation): this process gives lists
    of A batch dicts. Part a of process r is number a * W + r of W * A shares, each of which holds every (W * A)-th
    picture of the global batch: whether a batch is cut by processes or by parts changes none of them.
    """

    def __init__(self, cfg: Any, dataset: HemaStandardDataset, device: torch.device) -> None:
        self.cfg, self.dataset, self.device = cfg, dataset, device
        record = Path(cfg.train.output_dir) / "bad_images.csv"
        self.bad_images = BadImages(record, len(dataset), cfg.train.max_bad_fraction)
        self.augmentation = build_augmentation(cfg)
        side = cfg.crops.global_crops_size // cfg.student.patch_size
        self.mask_generator = MaskingGenerator(input_size=(side, side), max_num_patches=int(0.5 * side * side))

    def starting_at(self, batch_number: int = 0, position: int = 0) -> Iterator[list[dict[str, Any]]]:
        """Batches `batch_number` and on; those before took `position` pictures of the global stream."""
        cfg = self.cfg
        loader = make_data_loader(
            dataset=self.dataset,
            batch_size=cfg.train.batch_size_per_gpu * cfg.train.accumulation_steps,
            num_workers=cfg.train.num_workers,
            shuffle=True,
            seed=cfg.train.seed,
            sampler_type=SamplerType.SHARDED_INFINITE,
            sampler_advance=position,
            drop_last=True,
            collate_fn=collate_samples,
            pin_memory=self.device.type == "cuda",
            balance=build_balance(cfg),
        )
        for number, samples in enumerate(sent_ahead(loader, self.device), batch_number):
            self.bad_images.record(samples.failures)
            masks = self._draw_masks(number)
            yield [self._part(number, samples.images, masks, part) for part in range(cfg.train.accumulation_steps)]

    def _draw_masks(self, batch_number: int) -> tuple[torch.Tensor, int]:
        """Masks [2, G, P] of the global batch of G pictures, of which each share takes those of its pictures."""
        ibot = self.cfg.ibot
        masks, upperbound = draw_masks(
            N_GLOBAL_CROPS * self.cfg.train.global_batch_size,
            ibot.mask_ratio_min_max,
            ibot.mask_sample_probability if ibot.loss_weight > 0 else 0.0,
            self.mask_generator,
            np.random.default_rng(derive_seed(self.cfg.train.seed, "masks", batch_number)),
        )
        return masks.unflatten(0, (N_GLOBAL_CROPS, -1)), upperbound

    def _part(
        self, batch_number: int, images: torch.Tensor, masks: tuple[torch.Tensor, int], part: int
    ) -> dict[str, Any]:
        n_parts, seed = self.cfg.train.accumulation_steps, self.cfg.train.seed
        share, n_shares = part * get_world_size() + get_rank(), n_parts * get_world_size()
        generator = torch.Generator().manual_seed(derive_seed(seed, "augmentation", batch_number))
        crops = self.augmentation(images[part::n_parts], generator, rank=share, world_size=n_shares)
        own_masks = masks[0][:, share::n_shares].flatten(0, 1)  # [2B, P]
        batch = assemble_batch(crops, own_masks, masks[1], torch.float32)
        # for the stochastic depth, which is drawn for the global batch too
        return {**batch, "seed": derive_seed(seed, "step", batch_number), "share": BatchShare(share, n_shares)}


def timed(batches: Iterator[list[dict[str, Any]]], on_wait: Callable[[float], None]) -> Iterator[list[dict[str, Any]]]:
    """Pass batches on, and tell how long each was waited for."""
    while True:
        started = time.perf_counter()
        batch = next(batches)
        on_wait(time.perf_counter() - started)
        yield batch
