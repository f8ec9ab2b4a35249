"""From the dataset string to batch dicts on the training device.

Workers decode and augment each image with its own seed, (train.seed, position in the global stream), and collate
micro-batches with their masks. The device normalises the crops. A batch depends on train.seed and its number, not on
the numbers of workers and processes.

Dimension key:  A micro-batches of a step, W processes, B images of a micro-batch, G = A * W * B images of a step
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dinov2.data import (
    DataAugmentationDINO,
    DataAugmentationHEMA,
    MaskingGenerator,
    SamplerType,
    collate_data_and_cast,
    make_data_loader,
    make_dataset,
)
from dinov2.data.bad_images import BadImages
from dinov2.data.collate import MicroBatch
from dinov2.data.datasets.hema_data import HemaStandardDataset
from dinov2.data.loaders import AugmentedSample, receive_batches, share_batch
from dinov2.data.samplers import Balance
from dinov2.data.transforms import normalize_images
from dinov2.distributed import get_rank
from dinov2.utils.numerics import derive_seed

_AUGMENTATIONS = {"default": DataAugmentationDINO, "hema": DataAugmentationHEMA}


def build_dataset(cfg: Any) -> HemaStandardDataset:
    """Open the data set of `train.dataset_path`, whose images are decoded to squares; check `train.balance`.

    Set `train.metadata.n_values`, the number of values of the column of `train.metadata`.
    """
    crop = float(cfg.train.center_crop)
    size, column = cfg.train.image_size or cfg.crops.global_crops_size, cfg.train.metadata.column
    settings = {"image_size": size, "fit": cfg.train.image_fit, "seed": cfg.train.seed, "metadata": column}
    dataset = make_dataset(cfg.train.dataset_path, **settings, center_crop=crop)
    if dataset.center_crop != crop:  # the network's files state the configuration's
        raise ValueError(
            f"train.dataset_path says center_crop={dataset.center_crop} and train.center_crop is {crop}; set "
            f"train.center_crop alone, which evaluation follows too"
        )
    metadata = dataset.source.metadata
    cfg.train.metadata.n_values = None if metadata is None else len(metadata.names)
    build_balance(cfg).quotas(dataset.source.set_names, dataset.source.set_sizes)
    return dataset


def build_balance(cfg: Any) -> Balance:
    """Read `train.balance`, the shares of the image sets."""
    return Balance(dict(cfg.train.balance.weights), cfg.train.balance.temperature)


def build_augmentation(cfg: Any) -> DataAugmentationDINO:
    """Build the multi-crop augmentation from `data_transform` and its block of `augmentation`; crops are uint8."""
    crops = cfg.crops
    settings: dict[str, Any] = dict(cfg.augmentation[cfg.data_transform])
    try:
        return _AUGMENTATIONS[cfg.data_transform](
            tuple(crops.global_crops_scale),
            tuple(crops.local_crops_scale),
            crops.local_crops_number,
            global_crops_size=crops.global_crops_size,
            local_crops_size=crops.local_crops_size,
            dtype=torch.uint8,
            **settings,
        )
    except ValueError as error:
        raise ValueError(f"config values augmentation.{cfg.data_transform}.* and crops.*: {error}") from error


def resolve_batch_size(train: Any, world_size: int) -> None:
    """Set the numbers of micro-batches and of their images in the config's section `train`.

    Without global_batch_size, it becomes batch_size_per_gpu x accumulation_steps x processes. With it,
    batch_size_per_gpu is the maximum size of a micro-batch, and accumulation_steps the smallest number that allows it.
    """
    total, n_steps = train.global_batch_size, train.accumulation_steps
    if total is None:
        train.accumulation_steps = n_steps or 1
        train.global_batch_size = train.batch_size_per_gpu * train.accumulation_steps * world_size
        return
    n_images, rest = divmod(total, world_size)  # of each process
    if rest or not n_images:
        raise ValueError(
            f"train.global_batch_size: {total} images do not spread evenly over {world_size} processes; "
            f"{max(1, round(total / world_size)) * world_size} would"
        )
    if n_steps is None:
        divisors = [n for n in range(1, n_images + 1) if n_images % n == 0]
        n_steps = next(n for n in divisors if n_images // n <= train.batch_size_per_gpu)
    if n_images % n_steps:
        raise ValueError(
            f"train.accumulation_steps: {n_steps} micro-batches do not divide the {n_images} images that each of "
            f"{world_size} processes has of train.global_batch_size={total}; leave accumulation_steps at null, and it "
            f"is chosen"
        )
    train.accumulation_steps, train.batch_size_per_gpu = n_steps, n_images // n_steps


class TrainBatches:
    """Batches of a run on one process: A micro-batches for each step.

    Position p of the global stream belongs to step p // G. Process r gets the positions r, r + W, r + 2W, ...; each
    micro-batch has B consecutive ones of these.
    """

    def __init__(self, cfg: Any, dataset: HemaStandardDataset, device: torch.device) -> None:
        self.cfg, self.dataset, self.device = cfg, dataset, device
        record = Path(cfg.train.output_dir) / "bad_images.csv"
        self.bad_images = BadImages(record, len(dataset), cfg.train.max_bad_fraction)
        side = cfg.crops.global_crops_size // cfg.student.patch_size
        self.collate = partial(
            collate_data_and_cast,
            mask_ratio_tuple=tuple(cfg.ibot.mask_ratio_min_max),
            mask_probability=cfg.ibot.mask_sample_probability if cfg.ibot.loss_weight > 0 else 0.0,
            dtype=torch.uint8,
            mask_generator=MaskingGenerator(input_size=(side, side), max_num_patches=int(0.5 * side * side)),
        )

    def starting_at(self, batch_number: int = 0, position: int = 0) -> Iterator[list[dict[str, Any]]]:
        """Yield the batches from `batch_number` on; earlier ones used `position` images of the global stream."""
        train = self.cfg.train
        loader = make_data_loader(
            dataset=self.dataset,
            batch_size=train.batch_size_per_gpu,
            num_workers=train.num_workers,
            shuffle=True,
            seed=train.seed,
            sampler_type=SamplerType.SHARDED_INFINITE,
            sampler_advance=position,
            drop_last=True,
            collate_fn=partial(
                collate_micro_batch,
                collate=self.collate,
                seed=train.seed,
                first_batch=batch_number,
                first_position=position,
                global_batch_size=train.global_batch_size,
            ),
            pin_memory=self.device.type == "cuda",
            balance=build_balance(self.cfg),
            augmentation=build_augmentation(self.cfg),
        )
        micro_batches = receive_batches(loader)
        for number in itertools.count(batch_number):
            yield [self._on_device(next(micro_batches), number, get_rank(), i) for i in range(train.accumulation_steps)]

    def _on_device(self, batch: dict[str, Any], *numbers: int) -> dict[str, Any]:
        self.bad_images.record(batch.pop("failures"))
        for key, value in batch.items():
            if isinstance(value, torch.Tensor):
                value = value.to(self.device, non_blocking=True)
                batch[key] = normalize_images(value) if key.endswith("_crops") else value
        batch["seed"] = derive_seed(self.cfg.train.seed, "step", *numbers)  # for stochastic depth
        batch["slices_seed"] = derive_seed(self.cfg.train.seed, "slices", numbers[0])  # SIGReg's, for all ranks
        return batch


def collate_micro_batch(
    samples: Sequence[AugmentedSample],
    *,
    collate: Callable[..., dict[str, Any]],
    seed: int,
    first_batch: int,
    first_position: int,
    global_batch_size: int,
) -> dict[str, Any]:
    """Collate the samples of a micro-batch in a worker; `failures` lists the images that could not be read.

    Batch number `first_batch` begins at `first_position` of the global stream.
    """
    places = [divmod(sample.position - first_position, global_batch_size) for sample in samples]
    mask_seed = derive_seed(seed, "masks", first_batch + places[0][0])
    batch = collate(samples, micro_batch=MicroBatch([image for _, image in places], global_batch_size, mask_seed))
    if samples[0].metadata is not None:
        batch["metadata"] = torch.tensor([sample.metadata for sample in samples])  # [B]
    return share_batch({**batch, "failures": [failure for sample in samples for failure in sample.failures]})
