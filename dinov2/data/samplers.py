"""Order the images of training: a pure function of (seed, position), for any number of processes.

All processes share one global stream of indices. Process r of W takes the positions r, r + W, r + 2W, ..., so with a
global batch of B the i-th batch is the positions [i B, (i + 1) B), for every W.

Letters: N images in the dataset, in S sets.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from random import Random
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

from dinov2.distributed import get_rank, get_world_size
from dinov2.utils.numerics import derive_seed

MIN_PASS = 65536  # positions; shares are rounded to whole positions of a pass


class SamplerType(Enum):
    """The ways to order images; names and values are upstream's."""

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
    """Endless passes over the dataset; each pass has every index once, in its own order.

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
            step: distance between two of this process's positions; the world size by default.
            advance: positions of the GLOBAL stream, of all processes, used before. (Upstream counts those of one.)
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

    def draw_index(self, rng: Random) -> int:
        """Draw an index beside the stream, each as often as it is in the stream."""
        return rng.randrange(self._pass_length)

    def _pass_order(self, pass_number: int) -> np.ndarray:
        """Return the indices of one pass, in order."""
        n = self._pass_length
        return shuffled_indices(n, self._seed, pass_number) if self._shuffle else np.arange(n)


class PositionSampler(Sampler[tuple[int, int]]):
    """Pairs (position in the global stream, index) of an infinite sampler."""

    def __init__(self, sampler: InfiniteSampler) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(itertools.count(self.sampler.first_position, self.sampler.step), self.sampler, strict=False)


class EpochSampler(Sampler[int]):
    """`size` indices an epoch, divided among the processes; a `size` larger than the dataset repeats it evenly."""

    def __init__(self, *, size: int, seed: int = 0, **settings: Any) -> None:
        """`size` counts all processes together; `settings` are `InfiniteSampler`'s, without `advance`."""
        if size < 1:
            raise ValueError(f"sampler: size={size} must be at least 1")
        self._size, self._seed, self._settings = size, seed, settings
        self.set_epoch(0)

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(self._stream, len(self))

    def __len__(self) -> int:
        return len(range(self._stream.first_position, self._size, self._stream.step))

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose order the next iteration gives."""
        self._stream = InfiniteSampler(seed=derive_seed(self._seed, "epoch", epoch), **self._settings)


@dataclass(frozen=True)
class Balance:
    """How often each set of a dataset is sampled: in proportion to weight_i * n_i^(1 / T), for n_i images in set i."""

    weights: Mapping[str, float] = field(default_factory=dict)  # {set name: weight}; 1 for sets that are not named
    temperature: float = 1.0  # T; 1 gives each set its natural share, infinity gives all sets the same

    def __post_init__(self) -> None:
        for name, weight in self.weights.items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"train.balance.weights: {name} has {weight}; give 0 (never seen) or more")
        if not self.temperature > 0:
            raise ValueError(f"train.balance.temperature: {self.temperature} is not above 0; give more, or .inf")

    @property
    def is_natural(self) -> bool:
        """Return True if all images are sampled equally often, for any sets."""
        return not self.weights and self.temperature == 1

    def quotas(self, names: Sequence[str], sizes: np.ndarray) -> np.ndarray:
        """Compute the number of positions of each set in a pass: int64 [S], with the sum max(N, `MIN_PASS`).

        A set whose share is not 0 has at least one position. `sizes` are the numbers of images, [S].
        """
        unknown = [name for name in self.weights if name not in names]
        if unknown:
            known = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
            raise ValueError(f"train.balance.weights: no set is called {unknown[0]!r}; the sets here are {known}")
        weights = np.array([self.weights.get(name, 1.0) for name in names])
        is_seen = (weights > 0) & (np.asarray(sizes) > 0)
        if not is_seen.any():
            raise ValueError(
                "train.balance.weights: every set that has images has weight 0; give one of them a weight above 0"
            )
        logs = np.full(len(names), -np.inf)  # logarithms, which do not overflow at any temperature
        logs[is_seen] = np.log(weights[is_seen]) + np.log(sizes[is_seen]) / self.temperature
        shares = np.exp(logs - logs.max())
        shares /= shares.sum()
        length = max(int(np.sum(sizes)), MIN_PASS)
        exact = np.round(shares * length, 6)  # the last digit differs between machines
        quotas = np.floor(exact).astype(np.int64)
        # give the positions lost by rounding down to the sets that lost most
        missing = length - int(quotas.sum())
        quotas[np.argsort(-np.where(is_seen, exact - quotas, -1), kind="stable")[:missing]] += 1
        too_small = is_seen & (quotas == 0)
        quotas[too_small] = 1
        quotas[np.argmax(quotas)] -= too_small.sum()
        return quotas


class BalancedSampler(InfiniteSampler):
    """Endless passes in which each set has a fixed number of positions; each pass has its own order.

    Each set repeats permutations of its images, from pass to pass: all of them come once before one comes again. Like
    `InfiniteSampler`, the stream is a pure function of (seed, position).
    """

    def __init__(self, *, sets: np.ndarray, quotas: np.ndarray, **settings: Any) -> None:
        """Take the set of each index [N], each set's positions in a pass [S], and settings of `InfiniteSampler`."""
        super().__init__(sample_count=int(np.sum(quotas)), shuffle=True, **settings)
        by_set = np.argsort(sets, kind="stable").astype(np.int32)
        ends = np.cumsum(np.bincount(sets, minlength=len(quotas)))
        self._members = np.split(by_set, ends[:-1])  # the indices of each set
        self._quotas = np.asarray(quotas)

    def draw_index(self, rng: Random) -> int:
        number = np.searchsorted(np.cumsum(self._quotas), rng.randrange(self._pass_length), side="right")
        return int(rng.choice(self._members[number]))

    def _pass_order(self, pass_number: int) -> np.ndarray:
        parts = [self._indices_of_set(number, pass_number) for number in np.flatnonzero(self._quotas).tolist()]
        indices = np.concatenate(parts)
        return indices[shuffled_indices(len(indices), self._seed, "balanced", pass_number)]

    def _indices_of_set(self, number: int, pass_number: int) -> np.ndarray:
        """Return the indices of one set in one pass."""
        members, quota = self._members[number], int(self._quotas[number])
        n, begin = len(members), pass_number * quota
        first, last = begin // n, (begin + quota - 1) // n
        orders = [shuffled_indices(n, self._seed, "set", number, i) for i in range(first, last + 1)]
        return members[np.concatenate(orders)[begin - first * n :][:quota]]
