"""The order in which images are seen: a pure function of (seed, position), whatever the number of processes.

All processes share one global stream of indices. Process r of W takes the positions r, r + W, r + 2W, ..., so with a
global batch of B the i-th batch is the positions [i B, (i + 1) B), for every W. Letters: N images in the dataset.
"""

import itertools
from collections.abc import Iterator
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

from dinov2.distributed import get_rank, get_world_size
from dinov2.utils.seeds import derive_seed


class SamplerType(Enum):
    """Names and values are upstream's."""

    DISTRIBUTED = 0
    EPOCH = 1
    INFINITE = 2
    SHARDED_INFINITE = 3
    SHARDED_INFINITE_NEW = 4


def shuffled_indices(sample_count: int, seed: int, *keys: int | str) -> np.ndarray:
    """Return the permutation of 0 .. N-1 that belongs to `seed` and `keys`: int32 [N]."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", *keys))
    return torch.randperm(sample_count, dtype=torch.int32, generator=generator).numpy()


class InfiniteSampler(Sampler[int]):
    """Endless passes over the dataset; each pass holds every index once, in an order of its own.

    Position p of the global stream belongs to pass p // N, and is the (p mod N)-th index of that pass's permutation.
    """

    def __init__(
        self,
        *,
        sample_count: int,
        shuffle: bool = False,
        seed: int = 0,
        start: int | None = None,
        step: int | None = None,
        advance: int = 0,
    ) -> None:
        """Set up the stream of this process.

        Args:
            sample_count: N.
            shuffle: permute each pass, by (seed, pass); otherwise every pass is 0 .. N-1.
            seed: any integer.
            start: this process's first position after `advance`; its rank by default.
            step: positions between two of this process's; the world size by default.
            advance: positions of the GLOBAL stream that earlier training used up, over all processes together.
                (Upstream counts those of one process.)
        """
        self._pass_length, self._shuffle, self._seed = sample_count, shuffle, seed
        self.first_position = advance + (get_rank() if start is None else start)
        self.step = get_world_size() if step is None else step
        if sample_count < 1 or self.step < 1:
            raise ValueError(f"sampler: sample_count={sample_count} and step={self.step} must be at least 1")
        if advance < 0 or self.first_position < advance:
            raise ValueError(f"sampler: advance={advance} and start={start} must not be negative")

    def __iter__(self) -> Iterator[int]:
        position = self.first_position
        while True:
            pass_number, offset = divmod(position, self._pass_length)
            mine = self._pass_order(pass_number)[offset :: self.step]
            yield from map(int, mine)
            position += len(mine) * self.step

    def _pass_order(self, pass_number: int) -> np.ndarray:
        if self._shuffle:
            return shuffled_indices(self._pass_length, self._seed, pass_number)
        return np.arange(self._pass_length)


class PositionSampler(Sampler[tuple[int, int]]):
    """Pairs (position in the global stream, index) of an infinite sampler."""

    def __init__(self, sampler: InfiniteSampler) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(itertools.count(self.sampler.first_position, self.sampler.step), self.sampler, strict=False)


class EpochSampler(Sampler[int]):
    """`size` indices an epoch, shared among the processes; an epoch larger than the dataset repeats it evenly."""

    def __init__(self, *, size: int, seed: int = 0, **settings: Any) -> None:
        """`size` counts all processes together; `settings` are `InfiniteSampler`'s, but for `advance`."""
        if size < 1:
            raise ValueError(f"sampler: size={size} must be at least 1")
        self._size, self._seed, self._settings = size, seed, settings
        self.set_epoch(0)

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(self._stream, len(self))

    def __len__(self) -> int:
        return len(range(self._stream.first_position, self._size, self._stream.step))

    def set_epoch(self, epoch: int) -> None:
        """Choose which epoch's order the next iteration gives."""
        self._stream = InfiniteSampler(seed=derive_seed(self._seed, "epoch", epoch), **self._settings)
