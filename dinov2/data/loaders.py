"""Make the dataset that a dataset string names, and the loader of its batches."""

import logging
import math
import pickle
import re
import shutil
import time
from collections.abc import Callable, Generator
from random import Random
from typing import Any, NamedTuple

import cv2
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler, get_worker_info

from dinov2.data.datasets.hema_data import HemaStandardDataset
from dinov2.data.samplers import Balance, BalancedSampler, EpochSampler, InfiniteSampler, PositionSampler, SamplerType
from dinov2.distributed import get_rank, get_world_size
from dinov2.utils.command import WORKER_ENDED, ignore_stop_signals
from dinov2.utils.numerics import derive_seed
from dinov2.utils.resources import size_text

logger = logging.getLogger("dinov2")

DATASETS = {"HemaStandardDataset": HemaStandardDataset}
SIGNAL_SECONDS = 2.0  # for the signal of a dead worker process to arrive
SHARED_MEMORY = "/dev/shm"  # of Linux; Docker gives a container 64 MB
INFINITE = (SamplerType.INFINITE, SamplerType.SHARDED_INFINITE, SamplerType.SHARDED_INFINITE_NEW)
# (image uint8 [3, S, S], source of randomness, function that draws another image) -> crops
Augmentation = Callable[[Tensor, Random, Callable[[Random], Tensor]], Any]

# key of a dataset string -> function that reads its value, and raises ValueError or KeyError for other text
VALUE_READERS: dict[str, Callable[[str], Any]] = {
    "root": str,
    "shuffle": lambda value: {"1": True, "true": True, "0": False, "false": False}[value.lower()],
    "image_size": int,
    "fit": str,
    "seed": int,
    "column": str,
    "cache": str,
    "center_crop": float,
}


class AugmentedSample(NamedTuple):
    """The crops of one image."""

    crops: Any  # result of the augmentation
    position: int  # of the image in the global stream
    failures: tuple[tuple[str, str], ...]  # (path, reason) of images that could not be read
    metadata: int | None = None  # as in Sample


class AugmentedDataset(Dataset):
    """The images of a dataset, augmented with a seed for each position in the global stream of a sampler."""

    def __init__(
        self, dataset: HemaStandardDataset, augmentation: Augmentation, seed: int, sampler: InfiniteSampler
    ) -> None:
        self.dataset, self.augmentation, self.seed, self.sampler = dataset, augmentation, seed, sampler

    def __getitem__(self, position_and_index: tuple[int, int]) -> AugmentedSample:
        position, index = position_and_index
        sample = self.dataset[index]
        crops = self.augmentation(sample.image, Random(derive_seed(self.seed, "crops", position)), self._draw_image)
        return AugmentedSample(crops, position, sample.failures, sample.metadata)

    def _draw_image(self, rng: Random) -> Tensor:
        # a file that cannot be read is recorded when its own turn comes
        image: Tensor = self.dataset[self.sampler.draw_index(rng)].image
        return image


def make_dataset(
    dataset_str: str,
    transform: Callable[..., Any] | None = None,
    target_transform: Callable[..., Any] | None = None,
    **settings: Any,
) -> HemaStandardDataset:
    """Make the dataset that a string such as `HemaStandardDataset:root=/data/lists:shuffle=1` names.

    Keys: root (required), shuffle (1 or 0), image_size, fit, seed, column, cache, center_crop. A colon is part of a
    value unless one of these keys and `=` follow it, as in `root=C:\\cells` and `root=/data/12:30`. `settings` are
    values for keys that the string lacks; for the transforms see `HemaStandardDataset`.
    """
    name, stated = _parse_dataset_str(dataset_str)
    dataset = DATASETS[name](transform=transform, target_transform=target_transform, **{**settings, **stated})
    source = dataset.source
    logger.info("dataset %s: %s images in %s", dataset_str, f"{len(source):,}", source.kind)
    return dataset


def _parse_dataset_str(dataset_str: str) -> tuple[str, dict[str, Any]]:
    """Return the name of the dataset and the value of each key in the string."""
    name, _, rest = dataset_str.partition(":")
    if name not in DATASETS:
        raise ValueError(
            f"train.dataset_path: unknown dataset {name!r} in {dataset_str!r}; known: {', '.join(DATASETS)} "
            f"(write HemaStandardDataset:root=<folder with *.txt lists>)"
        )
    keys = ", ".join(VALUE_READERS)
    before, *parts = re.split(r":(?=[A-Za-z_]\w*=)", ":" + rest)
    stated: dict[str, Any] = {}
    for part in parts:
        key, _, value = part.partition("=")
        if key not in VALUE_READERS:
            raise ValueError(f"train.dataset_path: unknown key {key!r} in {dataset_str!r}; {name} knows {keys}")
        if key in stated:
            raise ValueError(f"train.dataset_path: {key!r} stands twice in {dataset_str!r}; keep one")
        try:
            stated[key] = VALUE_READERS[key](value)
        except (ValueError, KeyError) as error:
            expected = {"shuffle": "1 or 0", "center_crop": "a number"}.get(key, "an integer")
            raise ValueError(f"train.dataset_path: {key}={value!r} in {dataset_str!r}; expected {expected}") from error
    if before or not stated.get("root"):
        raise ValueError(
            f"train.dataset_path: {dataset_str!r} must read {name}:root=<folder with *.txt lists>"
            f"[:key=value...], with the keys {keys}"
        )
    return name, stated


def make_data_loader(
    *,
    dataset: Any,
    batch_size: int,
    num_workers: int,
    shuffle: bool = True,
    seed: int = 0,
    sampler_type: SamplerType | None = SamplerType.INFINITE,
    sampler_size: int = -1,
    sampler_advance: int = 0,
    drop_last: bool = True,
    persistent_workers: bool = False,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    pin_memory: bool | None = None,
    balance: Balance | None = None,
    augmentation: Augmentation | None = None,
) -> DataLoader:
    """Make the loader of this process's batches; the names and defaults are upstream's.

    Batches do not depend on `num_workers`. Torch's global generators do not change. Only the infinite samplers have an
    advance, a balance and an augmentation.

    Args:
        batch_size: images of this process.
        seed: of the order, and of random numbers that a transform draws in the workers.
        sampler_type: INFINITE (the SHARDED ones are the same), EPOCH, DISTRIBUTED (torch's) or None (not shuffled).
        sampler_size: length of an epoch over all processes, for EPOCH only; -1 takes the dataset's.
        sampler_advance: samples of the global stream already used.
        pin_memory: None for True if there is a GPU.
        balance: how often each set of the dataset is sampled; None: all images alike.
        augmentation: applied to each image, seeded by (seed, position in the stream), to give `AugmentedSample`s.
    """
    sampler = _make_sampler(dataset, sampler_type, shuffle, seed, sampler_size, sampler_advance, balance)
    if augmentation is not None:
        if not isinstance(sampler, InfiniteSampler):
            raise ValueError(f"augmentation: only infinite samplers have positions to seed it, found {sampler_type}")
        dataset, sampler = AugmentedDataset(dataset, augmentation, seed, sampler), PositionSampler(sampler)
    if num_workers > 0:
        cv2.setNumThreads(1)  # before the fork, which OpenCV's threads do not survive
    # a resumed run must not repeat the random numbers of its first workers
    generator = torch.Generator().manual_seed(derive_seed(seed, "workers", sampler_advance, get_rank()))
    return DataLoader(
        dataset,
        sampler=sampler,
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
        drop_last=drop_last,
        persistent_workers=persistent_workers and num_workers > 0,
        collate_fn=collate_fn,
        generator=generator,
        worker_init_fn=ignore_stop_signals,
    )


def share_batch(batch: Any) -> Any:
    """Move the tensors of a worker's batch into shared memory; where that is full, pickle the batch, for a pipe.

    It runs in the worker. Left to itself, torch shares them in a thread that prints an error and drops the batch, for
    which the main process then waits for ever.
    """
    if get_worker_info() is None:
        return batch
    try:
        for value in batch.values() if isinstance(batch, dict) else batch:
            if isinstance(value, Tensor):
                value.share_memory_()
    except RuntimeError:
        return pickle.dumps(batch)
    return batch


def receive_batches(loader: DataLoader) -> Generator[Any, None, None]:
    """Yield the batches of a loader that collates with `share_batch`; warn once if shared memory is too small."""
    is_warned = False
    for batch in _until_a_worker_dies(loader):
        if not isinstance(batch, bytes):
            yield batch
            continue
        if not is_warned:
            n_batches = loader.num_workers * (loader.prefetch_factor or 1) + 1
            logger.warning(
                "shared memory (/dev/shm) of %s is too small for %d batches of %s that %d workers prefetch: they go "
                "through pipes, which takes longer. In a container, start it with --shm-size=%dg or --ipc=host",
                *(size_text(shutil.disk_usage(SHARED_MEMORY).total), n_batches, size_text(len(batch))),
                *(loader.num_workers, math.ceil(2 * n_batches * len(batch) / 2**30)),
            )
            is_warned = True
        yield pickle.loads(batch)


def _until_a_worker_dies(loader: DataLoader) -> Generator[Any, None, None]:
    """Yield the batches of a loader, and raise ChildProcessError if a worker is killed while it sends one.

    Torch raises RuntimeError if it finds the worker dead, also from its signal handler, wherever the program is then.
    The connection may break a moment before that, so the signal is waited for here.
    """
    try:
        yield from loader
    except (ConnectionError, EOFError) as error:
        if "in DataLoader worker process" in str(error):
            raise  # the dataset's own error, which the worker sent
        time.sleep(SIGNAL_SECONDS)
        raise ChildProcessError(WORKER_ENDED) from error


def _make_sampler(
    dataset: Any,
    sampler_type: SamplerType | None,
    shuffle: bool,
    seed: int,
    size: int,
    advance: int,
    balance: Balance | None,
) -> Sampler | None:
    if size > 0 and sampler_type is not SamplerType.EPOCH:
        raise ValueError(f"sampler_size={size}: only SamplerType.EPOCH has one, found {sampler_type}; leave it at -1")
    if advance > 0 and sampler_type not in INFINITE:
        raise ValueError(f"sampler_advance={advance}: only infinite samplers can start later, found {sampler_type}")
    if balance is not None and not balance.is_natural:
        if sampler_type not in INFINITE or not shuffle:
            raise ValueError(
                f"balance={balance}: only infinite samplers that shuffle have one, found {sampler_type} with "
                f"shuffle={shuffle}"
            )
        quotas = balance.quotas(dataset.source.set_names, dataset.source.set_sizes)
        return BalancedSampler(sets=dataset.sets(), quotas=quotas, seed=seed, advance=advance)
    n = len(dataset)
    if sampler_type is SamplerType.EPOCH:
        return EpochSampler(size=size if size > 0 else n, sample_count=n, shuffle=shuffle, seed=seed)
    if sampler_type is SamplerType.DISTRIBUTED:
        return DistributedSampler(dataset, get_world_size(), get_rank(), shuffle=shuffle, seed=seed)
    if sampler_type is None:
        return None
    return InfiniteSampler(sample_count=n, shuffle=shuffle, seed=seed, advance=advance)
