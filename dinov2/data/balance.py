"""How often each set of a dataset is seen: weights and a temperature, and a sampler that follows them.

Letters: N images, in S sets.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from dinov2.data.samplers import InfiniteSampler, shuffled_indices

MIN_PASS = 65536  # positions; shares are rounded to whole positions of a pass


@dataclass(frozen=True)
class Balance:
    """Set i is seen in proportion to weight_i * n_i^(1 / T), n_i its number of images and T the temperature.

    Attributes:
        weights: by the name of the set; 1 for the sets not named.
        temperature: 1 gives each set its natural share; infinity gives all sets the same.

    Raises:
        ValueError: a weight is negative or not finite, or the temperature is not above 0.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name, weight in self.weights.items():
            if not 0 <= weight < math.inf:
                raise ValueError(
                    f"train.balance.weights: {name} has {weight}; a weight is 0 (never seen) or a larger number"
                )
        if not self.temperature > 0:
            raise ValueError(
                f"train.balance.temperature: {self.temperature} is not above 0; 1 is the natural share of each set, "
                f"infinity (.inf) the same for all"
            )

    @property
    def is_natural(self) -> bool:
        """Return True if every image is seen as often as any other, whatever the sets are."""
        return not self.weights and self.temperature == 1

    def quotas(self, names: Sequence[str], sizes: np.ndarray) -> np.ndarray:
        """Compute the positions that each set has in a pass: int64 [S], which add up to max(N, `MIN_PASS`).

        A set whose share is not 0 has at least one.

        Args:
            names: S of them, each once.
            sizes: [S], images in each set.

        Raises:
            ValueError: a weight names no set, or no set with images has one above 0.
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
        logs = np.full(len(names), -np.inf)  # as logarithms, which no temperature makes overflow
        logs[is_seen] = np.log(weights[is_seen]) + np.log(sizes[is_seen]) / self.temperature
        shares = np.exp(logs - logs.max())
        shares /= shares.sum()
        length = max(int(np.sum(sizes)), MIN_PASS)
        exact = np.round(shares * length, 6)  # the last digit differs between machines
        quotas = np.floor(exact).astype(np.int64)
        # positions lost by rounding down go to the sets that lost most
        missing = length - int(quotas.sum())
        quotas[np.argsort(-np.where(is_seen, exact - quotas, -1), kind="stable")[:missing]] += 1
        too_small = is_seen & (quotas == 0)
        quotas[too_small] = 1
        quotas[np.argmax(quotas)] -= too_small.sum()
        return quotas


class BalancedSampler(InfiniteSampler):
    """Passes in which each set has a fixed number of positions, in an order of their own.

    From pass to pass, a set goes through permutations of its images: each of them comes once before one comes again.
    Like its base, the stream is a pure function of (seed, position).
    """

    def __init__(
        self,
        *,
        sets: np.ndarray,
        quotas: np.ndarray,
        seed: int = 0,
        start: int | None = None,
        step: int | None = None,
        advance: int = 0,
    ) -> None:
        """
        Args:
            sets: [N], the set that each index of the dataset belongs to.
            quotas: [S], positions of each set in a pass; 0 for sets without images.
            seed, start, step, advance: as for `InfiniteSampler`.
        """
        length = int(np.sum(quotas))
        super().__init__(sample_count=length, shuffle=True, seed=seed, start=start, step=step, advance=advance)
        by_set = np.argsort(sets, kind="stable").astype(np.int32)
        ends = np.cumsum(np.bincount(sets, minlength=len(quotas)))
        self._members = np.split(by_set, ends[:-1])  # of each set, its indices
        self._quotas = np.asarray(quotas)

    def _pass_order(self, pass_number: int) -> np.ndarray:
        parts = [self._of_set(number, pass_number) for number in np.flatnonzero(self._quotas).tolist()]
        indices = np.concatenate(parts)
        return indices[shuffled_indices(len(indices), self._seed, "balanced", pass_number)]

    def _of_set(self, number: int, pass_number: int) -> np.ndarray:
        """Return the indices of one set in one pass."""
        members, quota = self._members[number], int(self._quotas[number])
        n, begin = len(members), pass_number * quota
        first, last = begin // n, (begin + quota - 1) // n
        orders = [shuffled_indices(n, self._seed, "set", number, i) for i in range(first, last + 1)]
        return members[np.concatenate(orders)[begin - first * n :][:quota]]
