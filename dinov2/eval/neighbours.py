"""The nearest training cells of each test cell: exactly those that float64 finds, mostly for the price of float32.

Distances are Euclidean, or of features scaled to length 1 (whose squared distance is 2 - 2 cosine). Distances that
differ by rounding alone are one distance, and of training cells at one distance the earlier one is nearer. Neither the
order of the test cells nor how many are looked at together matters.

Where training cells are many, a matrix product in float32 gives a lower bound of each squared distance |a - b|^2 of a
test cell a and a training cell b. With c = 2 (D + 8) 2^-24,

    -2 ab + (1 - c) |b|^2 - 2 c |a| |b|   <=   |b|^2 - 2 ab   =   |a - b|^2 - |a|^2

as computed: a product of n terms is off by no more than n 2^-24 of the sum of their sizes, whatever the order of adding
up (Higham 2002, section 3.1), and c is twice what that and the rounding of a and b to float32 amount to. The training
cells with the W smallest bounds are candidates, and their distances are computed in float64 from differences. All
others are at least as far as the W-th bound says; if that is beyond the k-th candidate, the k nearest are among the
candidates. If not (copies of one cell, features that hardly differ), the test cell is compared with all training cells
in float64.

Dimension key:  N training cells, M test cells, D embedding dim, W candidates, m, n cells at a time
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

ArrayLike: TypeAlias = np.ndarray | Tensor

NUMBERS_PER_CHUNK = 1 << 22  # of training features or of bounds: 32 MiB of float64, and half of that of float32
NUMBERS_PER_TEST_CHUNK = 1 << 23
NUMBERS_PER_GATHER = 1 << 22  # features of candidates, and squared distances to all training cells
N_SPARE = 16  # candidates beyond k
MIN_CELLS_PER_CANDIDATE = 64  # with fewer, computing candidates' distances costs more than it saves
# Distances nearer to each other than this share of the squared lengths involved are one distance: rounding in a matrix
# product depends on its shape, and equal pictures must not be told apart by it.
TIE_TOLERANCE = 1e-11
SMALLEST = 1e-30  # more than what float32 loses below its range, with lengths up to 1


@dataclass(frozen=True)
class Neighbours:
    """The k nearest training cells of each test cell, nearest first.

    Attributes:
        positions: int64 [M, k], in the training set.
        distances: float64 [M, k], squared.
    """

    positions: np.ndarray
    distances: np.ndarray


@torch.no_grad()
def nearest_neighbours(
    train_features: ArrayLike,
    test_features: ArrayLike,
    k: int,
    is_cosine: bool = False,
    chunk_size: int | None = None,
) -> Neighbours:
    """Search as the module docstring says, on the device of the training features.

    Beside the inputs it takes some 300 MiB, and more where k is in the thousands.

    Args:
        train_features: [N, D], array or tensor.
        test_features: [M, D].
        k: number of neighbours.
        is_cosine: scale features to length 1 first.
        chunk_size: test cells at a time; None for as many as is fast.

    Raises:
        ValueError: if k is not between 1 and N, shapes do not fit, a feature is infinite or NaN, or all features of a
            cell are 0 and it has no direction to compare.
    """
    train = torch.as_tensor(train_features)
    test = torch.as_tensor(test_features, device=train.device)
    if train.ndim != 2 or test.ndim != 2 or train.shape[1] != test.shape[1]:
        raise ValueError(
            f"features of {list(train.shape)} (train) and {list(test.shape)} (test): expected [N, D] and [M, D]"
        )
    if not 1 <= k <= len(train):
        raise ValueError(f"k: {k} neighbours asked of {len(train)} training cells; choose k between 1 and {len(train)}")
    if not len(test):
        return Neighbours(np.empty((0, k), dtype=np.int64), np.empty((0, k)))
    with torch.autocast(train.device.type, enabled=False):
        frame = _Frame.around(train, test, is_cosine)
        parts = [
            _nearest(frame, train, frame.of(chunk), k)
            for chunk in test.split(chunk_size or max(1, NUMBERS_PER_TEST_CHUNK // test.shape[1]))
        ]
    positions, distances = (torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))
    return Neighbours(positions, distances / frame.unit)


@dataclass(frozen=True)
class _Frame:
    """Coordinates to compute in, with the training cells' mean at 0: products of centred features keep more digits.

    Attributes:
        centre: float64 [D].
        scale: a power of two that keeps lengths of unscaled features below 1.
        is_cosine: whether features are scaled to length 1.
    """

    centre: Tensor
    scale: float
    is_cosine: bool

    @classmethod
    def around(cls, train: Tensor, test: Tensor, is_cosine: bool) -> "_Frame":
        """
        Raises:
            ValueError: for features that are infinite, NaN or, with `is_cosine`, all 0.
        """
        ends = torch.stack([end for features in (train, test) for end in features.aminmax()]).double()
        if not ends.isfinite().all():  # NaN is both ends of a set that has one
            raise ValueError("features: some are infinite or NaN, so their distances mean nothing; check the weights")
        dim = train.shape[1]
        longest = 2 * dim**0.5 * float(ends.abs().max())  # of a difference of features
        scale = 2.0 ** -math.ceil(math.log2(longest)) if longest > 1e-300 else 1.0
        frame = cls(train.new_zeros(dim, dtype=torch.float64), scale, is_cosine)
        if is_cosine:
            n_without = sum(int((chunk == 0).all(dim=1).sum()) for x in (train, test) for _, chunk in _chunks(x))
            if n_without:
                raise ValueError(
                    f"features: all numbers of {n_without} cells are 0, so they have no direction to compare; leave "
                    f"these cells out, or compare distances (protocol dinobloom)"
                )
        total = frame.centre.clone()
        for _, chunk in _chunks(train):
            total += frame.of(chunk).sum(dim=0)
        return cls(total / len(train), frame.scale, is_cosine)

    @property
    def unit(self) -> float:
        """The squared distance here of features at distance 1."""
        return 1.0 if self.is_cosine else self.scale**2

    def of(self, features: Tensor) -> Tensor:
        """Coordinates float64 [..., D] of features [..., D]."""
        coordinates = features.to(torch.float64, copy=True).mul_(self.scale)
        if self.is_cosine:
            coordinates /= torch.linalg.vector_norm(coordinates, dim=-1, keepdim=True)
        return coordinates.sub_(self.centre)


def _chunks(features: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(position of the first, [n, D]) of some cells after the other."""
    size = max(1, NUMBERS_PER_CHUNK // features.shape[1])
    for start in range(0, len(features), size):
        yield start, features[start : start + size]


def _nearest(frame: _Frame, train: Tensor, cells: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Positions int64 [m, k] and squared distances float64 [m, k] of the nearest of train [N, D], nearest first.

    Args:
        frame: of the coordinates.
        train: features.
        cells: coordinates float64 [m, D].
        k: number of neighbours.
    """
    n_candidates = k + N_SPARE
    # what the bounds assume is not so where float32 products are allowed to be rounded to TF32 or bfloat16
    is_float32 = torch.get_float32_matmul_precision() == "highest"
    if not is_float32 or len(train) < MIN_CELLS_PER_CANDIDATE * n_candidates:
        return _nearest_of_all(frame, train, cells, k)
    bound, candidates = _candidates(frame, train, cells, n_candidates)  # [m, 1], [m, W]
    distances = _distances(frame, train, cells, candidates)  # [m, W]
    columns, tied_up_to = _first(distances, _squared_lengths(cells), k)
    positions, distances = candidates.gather(1, columns), distances.gather(1, columns)  # [m, k]
    is_open = ~(bound > tied_up_to)[:, 0]  # [m]
    if is_open.any():
        positions[is_open], distances[is_open] = _nearest_of_all(frame, train, cells[is_open], k)
    return positions, distances


def _candidates(frame: _Frame, train: Tensor, cells: Tensor, n_candidates: int) -> tuple[Tensor, Tensor]:
    """Of each cell the training cells with the smallest lower bounds, int64 [m, W] ascending, and a squared distance
    [m, 1] that all others are at or beyond."""
    dim = cells.shape[1]
    share = 2 * (dim + 8) * 2.0**-24  # c
    lengths = torch.linalg.vector_norm(cells, dim=1, keepdim=True)  # [m, 1]
    of_cells = torch.cat([cells, torch.ones_like(lengths), lengths], dim=1).float()  # [m, D + 2]
    bounds = of_cells.new_full((len(cells), n_candidates), float("inf"))
    positions = torch.zeros_like(bounds, dtype=torch.int64)
    for start, chunk in _chunks(train):
        coordinates = frame.of(chunk)  # [n, D]
        train_lengths = torch.linalg.vector_norm(coordinates, dim=1)  # [n]
        of_train = torch.empty(len(chunk), dim + 2, dtype=torch.float32, device=chunk.device)
        of_train[:, :dim] = coordinates.mul_(-2)
        of_train[:, dim] = (1 - share) * train_lengths.square()
        of_train[:, dim + 1] = -2 * share * train_lengths
        n_cells = max(1, NUMBERS_PER_CHUNK // len(chunk))
        for first in range(0, len(cells), n_cells):
            some = slice(first, first + n_cells)
            # in this order the product is faster, by up to half, than its transpose
            found, at = _smallest(of_train @ of_cells[some].T, n_candidates)  # [m', W]
            both = torch.cat([bounds[some], found], dim=1)
            bounds[some], kept = both.topk(n_candidates, dim=1, largest=False, sorted=False)
            positions[some] = torch.cat([positions[some], at + start], dim=1).gather(1, kept)
    beyond = bounds.amax(dim=1, keepdim=True).double() + lengths.square() - SMALLEST
    return beyond, positions.sort(dim=1).values


def _smallest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` smallest numbers of each column of [n, m], in no order, and in which rows: [m, count]; or all n.

    They lie in the `count` groups of rows with the smallest minima, so that only those are sorted through. A group has
    every so-many-th row.
    """
    height = len(values)
    size = int((height / count) ** 0.5)  # of a group; groups and their members are then equally many
    if size < 4:
        found = values.T.topk(min(count, height), dim=1, largest=False, sorted=False)
        return found.values, found.indices
    n_groups = height // size
    minima = values[: size * n_groups].view(size, n_groups, -1).amin(dim=0).T.contiguous()  # [m, groups]
    groups = minima.topk(count, dim=1, largest=False, sorted=False).indices  # [m, count]
    members = torch.arange(size, device=values.device)[:, None] * n_groups  # [size, 1]
    rest = torch.arange(size * n_groups, height, device=values.device).expand(len(groups), -1)
    rows = torch.cat([(groups[:, None] + members).flatten(1), rest], dim=1)  # [m, size x count + rest]
    found = values.T.gather(1, rows).topk(count, dim=1, largest=False, sorted=False)
    return found.values, rows.gather(1, found.indices)


def _distances(frame: _Frame, train: Tensor, cells: Tensor, candidates: Tensor) -> Tensor:
    """Squared distances float64 [m, W] of cells [m, D] (coordinates) to training cells at positions [m, W]."""
    distances = torch.empty_like(candidates, dtype=torch.float64)
    n_rows = max(1, NUMBERS_PER_GATHER // (candidates.shape[1] * cells.shape[1]))
    for first in range(0, len(cells), n_rows):
        some = slice(first, first + n_rows)
        differences = frame.of(train[candidates[some]]).sub_(cells[some, None])  # [m', W, D]
        distances[some] = differences.square_().sum(dim=2)
    return distances


def _nearest_of_all(frame: _Frame, train: Tensor, cells: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`_nearest` by distances to all training cells."""
    parts = []
    for some in cells.split(max(1, 2 * NUMBERS_PER_GATHER // len(train))):
        own_lengths = _squared_lengths(some)  # [m', 1]
        distances = some.new_empty(len(some), len(train))
        for start, chunk in _chunks(train):
            of_train = frame.of(chunk)  # [n, D]
            lengths = torch.linalg.vector_norm(of_train, dim=1).square()  # [n]
            products = torch.addmm(lengths, some, of_train.T, alpha=-2)  # [m', n]
            distances[:, start : start + len(chunk)] = products.add_(own_lengths)
        columns, _ = _first(distances, own_lengths, k)
        parts.append((columns, distances.gather(1, columns).clamp_min(0)))
    positions, distances = (torch.cat(part) for part in zip(*parts, strict=True))
    return positions, distances


def _first(distances: Tensor, own_lengths: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Which k columns are nearest, int64 [m, k] nearest first, and up to what distance [m, 1] others tie with the last.

    Args:
        distances: float64 [m, columns], squared, of training cells in ascending order.
        own_lengths: float64 [m, 1], squared, of the test cells.
        k: number of neighbours.
    """
    farthest = distances.topk(k, dim=1, largest=False).values[:, -1:]  # [m, 1]
    tolerance = TIE_TOLERANCE * (own_lengths + farthest.clamp_min(0))  # [m, 1]
    is_nearer = distances < farthest - tolerance
    is_tied = distances <= farthest + tolerance
    is_tied &= ~is_nearer
    n_open = k - is_nearer.sum(dim=1, keepdim=True)  # [m, 1]
    is_tied &= is_tied.cumsum(dim=1) <= n_open  # the earlier ones
    columns = (is_nearer | is_tied).nonzero()[:, 1].view(-1, k)  # ascending
    ascending, order = distances.gather(1, columns).sort(dim=1)
    steps = torch.nn.functional.pad((ascending.diff(dim=1) > tolerance).long(), (1, 0))
    ranks = torch.empty_like(columns).scatter_(1, order, steps.cumsum(dim=1))  # equal where distances are
    return columns.gather(1, ranks.argsort(dim=1, stable=True)), farthest + tolerance


def _squared_lengths(cells: Tensor) -> Tensor:
    """Float64 [m, 1] of [m, D]."""
    return torch.linalg.vector_norm(cells, dim=1, keepdim=True).square()
