"""k-nearest-neighbour classification of cells.

Protocol `dinobloom`: k = 1 and 20, Euclidean distance between features as they are, each neighbour has one vote.
Protocol `dino`: k = 10, 20, 100 and 200, cosine similarity, each vote has the weight exp(similarity / T) with T = 0.07
(Wu et al. 2018, arXiv 1805.01978; Caron et al. 2021, arXiv 2104.14294). Nothing is tuned: each k is reported.

Of classes with equal votes the first in `class_names` wins, as in scikit-learn; of training cells at equal distance the
earlier one counts. Distances that differ by rounding only are equal, so chunks never change a result.

Dimension key:  N training cells, M test cells, D embedding dim, C classes, m and n cells of a chunk
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

import dinov2  # noqa: F401  # before torch loads: it limits how OpenMP threads spin

# isort: split
import numpy as np
import torch
from torch import Tensor

from dinov2.eval.metrics import classification_metrics
from dinov2.eval.protocol import EvaluationData, Predictions, Protocol, runner
from dinov2.eval.results import FoldPredictions
from dinov2.utils.command import exit_code, number_between, positive_int

logger = logging.getLogger("dinov2")

ArrayLike: TypeAlias = np.ndarray | Tensor
ProtocolName = Literal["dinobloom", "dino"]
DEFAULT_KS: dict[str, tuple[int, ...]] = {"dinobloom": (1, 20), "dino": (10, 20, 100, 200)}
VOTE_TOLERANCE = 1e-9  # rounding of weights must not decide between classes
# Distances closer to each other than this share of the squared lengths involved are equal: the rounding of a matrix
# product depends on its shape, and must not decide between copies of one cell.
TIE_TOLERANCE = 1e-11
CHUNK = 2048  # training or test cells at a time: 32 MiB of distances


@dataclass(frozen=True)
class KnnOptions:
    protocol: ProtocolName = "dinobloom"
    k: Sequence[int] | None = None  # None: the protocol's, as far as there are enough training cells
    temperature: float = 0.07  # T of `dino`

    def __post_init__(self) -> None:
        if self.protocol not in DEFAULT_KS or not self.temperature > 0:
            raise ValueError(
                f"kNN: protocol {self.protocol!r}, temperature {self.temperature}; choose one of "
                f"{', '.join(DEFAULT_KS)}, and a temperature above 0"
            )


def evaluate(data: EvaluationData, options: KnnOptions) -> Predictions:
    """Classify the test cells of each fold by its training cells; one row, knn_<k>, for each k."""
    features, n_classes = data.main_features, len(data.class_names)
    ks = usable_ks(options, min(len(train) for train, _ in data.folds))
    shares = {k: np.full((len(data.labels), n_classes), np.nan) for k in ks}
    predictions = {k: np.full(len(data.labels), -1) for k in ks}
    for train, test in data.folds:
        sides = [torch.as_tensor(features[side], device=data.device) for side in (train, test)]
        of_fold = vote_shares(sides[0], data.labels[train], sides[1], n_classes, replace(options, k=ks))
        for k in ks:
            shares[k][test], predictions[k][test] = of_fold[k], winners(of_fold[k])
    settings: list[dict[str, Any]] = [{} for _ in data.folds]
    return {f"knn_{k}": FoldPredictions(list(data.folds), predictions[k], shares[k], settings) for k in ks}


def evaluate_knn(
    train_features: ArrayLike,
    train_labels: ArrayLike,
    test_features: ArrayLike,
    test_labels: ArrayLike,
    class_names: Sequence[str],
    ks: Sequence[int] | None = None,
) -> dict[str, dict[str, Any]]:
    """Return {knn_<k>: classification_metrics} of protocol `dinobloom` for a training and a test set.

    Features are [N, D] and [M, D]; distances are computed on the device of the training features. `ks` None: the
    protocol's.
    """
    options = KnnOptions(k=usable_ks(KnnOptions(k=ks), len(train_features)))
    shares = vote_shares(train_features, train_labels, test_features, len(class_names), options)
    labels = torch.as_tensor(test_labels).cpu().numpy()
    return {f"knn_{k}": classification_metrics(labels, winners(of_k), class_names) for k, of_k in shares.items()}


def knn_predict(
    train_features: ArrayLike, train_labels: ArrayLike, test_features: ArrayLike, k: int, n_classes: int
) -> np.ndarray:
    """Return the predicted classes int64 [M] of protocol `dinobloom`."""
    return winners(vote_shares(train_features, train_labels, test_features, n_classes, KnnOptions(k=[k]))[k])


def usable_ks(options: KnnOptions, n_train: int) -> list[int]:
    """Return the numbers of neighbours asked for, or those of the protocol that are at most `n_train`, ascending."""
    if options.k is not None:
        return sorted(set(options.k))
    ks = DEFAULT_KS[options.protocol]
    usable = [k for k in ks if k <= n_train] or [ks[0]]  # too many neighbours are an error of the search
    if left_out := ", ".join(str(k) for k in ks if k not in usable):
        logger.warning("k = %s left out: there are %d training cells", left_out, n_train)
    return usable


def vote_shares(
    train_features: ArrayLike, train_labels: ArrayLike, test_features: ArrayLike, n_classes: int, options: KnnOptions
) -> dict[int, np.ndarray]:
    """Return each class's share of the votes, {k: float64 [M, C]}, from one search for all k of `options.k`."""
    assert options.k is not None, "callers choose the numbers of neighbours"
    labels = torch.as_tensor(train_labels).cpu().numpy()
    is_cosine = options.protocol == "dino"
    positions, distances = nearest_neighbours(train_features, test_features, max(options.k), is_cosine)
    # the squared distance of features of length 1 is 2 - 2 similarity; weights are relative to the nearest cell's
    farther = (distances - distances[:, :1]) / 2
    weights = np.exp(-farther / options.temperature) if is_cosine else np.ones_like(farther)  # [M, max k]
    votes, rows, shares = np.zeros((len(farther), n_classes)), np.arange(len(farther)), {}
    for k, (classes, weights_of_kth) in enumerate(zip(labels[positions].T, weights.T, strict=True), start=1):
        votes[rows, classes] += weights_of_kth
        if k in options.k:
            shares[k] = votes / votes.sum(axis=1, keepdims=True)
    return shares


def winners(shares: np.ndarray) -> np.ndarray:
    """Return the first class with the largest share: int64 [M] of shares [M, C]."""
    return (shares >= shares.max(axis=1, keepdims=True) * (1 - VOTE_TOLERANCE)).argmax(axis=1)


# --- search ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def nearest_neighbours(
    train_features: ArrayLike, test_features: ArrayLike, k: int, is_cosine: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Find the k nearest training cells of each test cell, nearest first, with about 200 MiB beside the inputs.

    Distances are computed on the device of the training features [N, D], in float64 with their mean at 0.
    `is_cosine` scales features to length 1 first.

    Returns:
        positions int64 [M, k] in the training set, and squared distances float64 [M, k].
    """
    train = torch.as_tensor(train_features)
    test = torch.as_tensor(test_features, device=train.device)
    if not 1 <= k <= len(train):
        raise ValueError(f"k: {k} neighbours asked of {len(train)} training cells; choose k between 1 and {len(train)}")
    centre = train.new_zeros(train.shape[1], dtype=torch.float64)  # [D]
    centre = sum((_coordinates(chunk, centre, is_cosine).sum(dim=0) for chunk in train.split(CHUNK)), centre)
    centre = centre / len(train)
    found_positions, found_distances = [], []
    for test_chunk in test.split(CHUNK):
        cells = _coordinates(test_chunk, centre, is_cosine)  # [m, D]
        squares = cells.square().sum(dim=1, keepdim=True)  # [m, 1]; not finite if a training or test feature is not
        if not squares.isfinite().all():
            raise ValueError(
                "features: some are infinite or NaN, or (protocol dino) all 0 in a cell, so they have no distances; "
                "check the weights, or leave such cells out"
            )
        distances, positions = cells.new_empty(len(cells), 0), train.new_empty(len(cells), 0, dtype=torch.int64)
        for start, train_chunk in zip(range(0, len(train), CHUNK), train.split(CHUNK), strict=True):
            others = _coordinates(train_chunk, centre, is_cosine)  # [n, D]
            to_others = torch.addmm(others.square().sum(dim=1), cells, others.T, alpha=-2).add_(squares)  # [m, n]
            new_positions = torch.arange(start, start + len(others), device=train.device).expand(len(cells), -1)
            distances = torch.cat([distances, to_others], dim=1)
            positions = torch.cat([positions, new_positions], dim=1)
            columns = _nearest_columns(distances, squares, min(k, distances.shape[1]))
            distances, positions = distances.gather(1, columns), positions.gather(1, columns)  # [m, k]
        found_positions.append(positions.cpu())
        found_distances.append(distances.clamp_min(0).cpu())
    return torch.cat(found_positions).numpy(), torch.cat(found_distances).numpy()


def _coordinates(features: Tensor, centre: Tensor, is_cosine: bool) -> Tensor:
    """Return float64 [n, D], scaled to length 1 if `is_cosine`, minus the centre: products then keep more digits."""
    coordinates = features.double()
    if is_cosine:
        coordinates = coordinates / torch.linalg.vector_norm(coordinates, dim=1, keepdim=True)
    return coordinates - centre


def _nearest_columns(distances: Tensor, squares: Tensor, k: int) -> Tensor:
    """Return the columns int64 [m, k] of the k smallest distances [m, n]: nearest first, of equal ones the first.

    `squares` [m, 1] are the squared lengths of the test cells.
    """
    farthest = distances.topk(k, dim=1, largest=False).values[:, -1:]  # [m, 1]
    tolerance = TIE_TOLERANCE * (squares + farthest.clamp_min(0))  # [m, 1]
    is_nearer = distances < farthest - tolerance
    is_tied = (distances <= farthest + tolerance) & ~is_nearer
    n_open = k - is_nearer.sum(dim=1, keepdim=True)  # [m, 1]
    is_tied &= is_tied.cumsum(dim=1, dtype=torch.int32) <= n_open  # the first ones
    columns = (is_nearer | is_tied).nonzero()[:, 1].view(len(distances), k)  # ascending
    ascending, order = distances.gather(1, columns).sort(dim=1)
    steps = torch.nn.functional.pad((ascending.diff(dim=1) > tolerance).long(), (1, 0))
    ranks = torch.empty_like(columns).scatter_(1, order, steps.cumsum(dim=1))  # the same for equal distances
    return columns.gather(1, ranks.argsort(dim=1, stable=True))


# --- the command -----------------------------------------------------------------------------------------------------


def protocol(options: KnnOptions) -> Protocol:
    """Build the kNN protocol from its options; with few-shot training, each k above `n_train` is left out."""

    def few_shot_options(n_train: int) -> KnnOptions | None:
        ks = [k for k in options.k or DEFAULT_KS[options.protocol] if k <= n_train]
        return replace(options, k=ks) if ks else None

    return Protocol("knn", f"kNN ({options.protocol})", "k", evaluate, options, few_shot_options, has_many_rows=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    protocols = "dinobloom: Euclidean distance, plain vote; dino: cosine similarity, weight exp(similarity / T)"
    add("--protocol", choices=get_args(ProtocolName), default=KnnOptions.protocol, help=protocols)
    add("--k", type=positive_int, nargs="+", help="numbers of neighbours; without it 1 20, or 10 20 100 200 of dino")
    add("--temperature", type=number_between(1e-6, 1e6), default=KnnOptions.temperature, help="T of dino")


COMMAND = (
    "Classify cells by their nearest neighbours among features; print a table and write results.json, "
    "predictions_knn_<k>.csv, split.csv, confusion.png, curves.png to <output-dir>.",
    lambda args: protocol(KnnOptions(args.protocol, args.k, args.temperature)),
    add_arguments,
)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return runner.parse_arguments(*COMMAND, argv)


def main(argv: Sequence[str] | None = None) -> None:
    runner.run_command(*COMMAND, argv)


if __name__ == "__main__":
    sys.exit(exit_code(main))
