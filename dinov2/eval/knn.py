"""k-nearest-neighbour classification of cells.

Protocol `dinobloom`: k = 1 and 20, Euclidean distance between features as they are, plain vote.

Protocol `dino`: k = 10, 20, 100 and 200, cosine similarity, and each neighbour's vote weighs exp(similarity / T) with
T = 0.07 (Wu et al. 2018, arXiv 1805.01978; Caron et al. 2021, arXiv 2104.14294).

A test cell gets the class with the most votes among its k nearest training cells. Between classes with equally many
votes (to a share of 1e-9 where votes are weighed) the one with the smaller id, the first in `class_names`, wins, as in
scikit-learn's KNeighborsClassifier; between training cells at equal distance the earlier one counts. Probabilities are
shares of the votes. Nothing is tuned: each k is reported.

Split. As the linear probe's (`judged_set`): the same folds for the same seed. Averages are those of
`metrics.classification_metrics`, over all test cells together with bootstrap intervals, and over folds.

Dimension key:  N training cells, M test cells, D embedding dim, C classes
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, get_args

import dinov2  # noqa: F401  # before torch loads: it limits how OpenMP threads spin

# isort: split
import numpy as np
import torch

from dinov2.data.splits import Fold
from dinov2.eval.extract_features import device_of, positive_int
from dinov2.eval.judged_report import FewShotMethod, ReportStyle, few_shot_rows, format_report, write_results
from dinov2.eval.judged_set import JudgedSet, add_judging_arguments, complete_arguments, load_judged_set
from dinov2.eval.metrics import classification_metrics
from dinov2.eval.neighbours import ArrayLike, nearest_neighbours
from dinov2.eval.results import FoldPredictions
from dinov2.logging import setup_logging
from dinov2.utils.command import exit_code

logger = logging.getLogger("dinov2")

Protocol = Literal["dinobloom", "dino"]
DEFAULT_KS: dict[Protocol, tuple[int, ...]] = {"dinobloom": (1, 20), "dino": (10, 20, 100, 200)}
TEMPERATURE = 0.07  # T
VOTE_TOLERANCE = 1e-9  # rounding of weights must not decide between classes


def knn_predict(
    train_features: ArrayLike,
    train_labels: ArrayLike,
    test_features: ArrayLike,
    k: int,
    n_classes: int,
    chunk_size: int | None = None,
    protocol: Protocol = "dinobloom",
    temperature: float = TEMPERATURE,
) -> np.ndarray:
    """The class with the most votes among each test cell's k nearest training cells.

    Args:
        train_features: [N, D], array or tensor; distances are computed where the tensor is.
        train_labels: int64 [N], 0 to C - 1.
        test_features: [M, D].
        k: number of neighbours.
        n_classes: C.
        chunk_size: test cells at a time; None for as many as is fast. The result does not depend on it.
        protocol: "dinobloom" or "dino".
        temperature: T of `dino`.

    Returns:
        int64 [M].

    Raises:
        ValueError: if k is not between 1 and N, shapes do not fit, a label is no position of a class, a feature is
            infinite or NaN, the protocol is unknown or T is not above 0; with `dino` also if all features of a cell
            are 0.
    """
    return _winners(
        knn_probabilities(train_features, train_labels, test_features, k, n_classes, chunk_size, protocol, temperature)
    )


def knn_probabilities(
    train_features: ArrayLike,
    train_labels: ArrayLike,
    test_features: ArrayLike,
    k: int,
    n_classes: int,
    chunk_size: int | None = None,
    protocol: Protocol = "dinobloom",
    temperature: float = TEMPERATURE,
) -> np.ndarray:
    """Each class's share of the votes, float64 [M, C]; arguments and errors are those of `knn_predict`."""
    return _vote_shares(
        train_features, train_labels, test_features, (k,), n_classes, protocol, temperature, chunk_size
    )[k]


def evaluate_knn(
    train_features: ArrayLike,
    train_labels: ArrayLike,
    test_features: ArrayLike,
    test_labels: ArrayLike,
    class_names: Sequence[str],
    ks: Sequence[int] | None = None,
    protocol: Protocol = "dinobloom",
    temperature: float = TEMPERATURE,
) -> dict[str, dict[str, Any]]:
    """The protocol on given features.

    Args:
        train_features, train_labels, test_features: as for `knn_predict`.
        test_labels: int64 [M].
        class_names: C names.
        ks: numbers of neighbours; None for `usable_ks`.
        protocol, temperature: as for `knn_predict`.

    Returns:
        {"knn_<k>": classification_metrics} for each k.

    Raises:
        ValueError: as `knn_predict`.
    """
    ks = usable_ks(None, protocol, len(train_features)) if ks is None else ks
    shares = _vote_shares(train_features, train_labels, test_features, ks, len(class_names), protocol, temperature)
    labels = torch.as_tensor(test_labels).cpu().numpy()
    return {f"knn_{k}": classification_metrics(labels, _winners(shares[k]), class_names) for k in ks}


def evaluate_knn_folds(
    features: np.ndarray,
    labels: np.ndarray,
    n_classes: int,
    folds: Sequence[Fold],
    ks: Sequence[int],
    protocol: Protocol = "dinobloom",
    temperature: float = TEMPERATURE,
    device: str | torch.device = "cpu",
) -> dict[int, FoldPredictions]:
    """The protocol on folds of one set.

    Args:
        features: [N, D] of all cells.
        labels: int64 [N].
        n_classes: C.
        folds: training and test positions each.
        ks: numbers of neighbours.
        protocol, temperature: as for `knn_predict`.
        device: where distances are computed.

    Returns:
        predictions and shares of the votes for each k.

    Raises:
        ValueError: as `knn_predict`.
    """
    shares = {k: np.full((len(labels), n_classes), np.nan) for k in ks}
    predictions = {k: np.full(len(labels), -1, dtype=np.int64) for k in ks}
    for train, test in folds:
        learned, judged = (torch.as_tensor(features[side], device=device) for side in (train, test))
        of_fold = _vote_shares(learned, labels[train], judged, ks, n_classes, protocol, temperature)
        for k in ks:
            shares[k][test], predictions[k][test] = of_fold[k], _winners(of_fold[k])
    return {k: FoldPredictions(list(folds), predictions[k], shares[k], [{} for _ in folds]) for k in ks}


def usable_ks(asked: Sequence[int] | None, protocol: Protocol, n_train: int) -> list[int]:
    """The numbers of neighbours to report, ascending: those asked for, or the protocol's as far as there are cells.

    Args:
        asked: numbers; None for the protocol's.
        protocol: "dinobloom" or "dino".
        n_train: of the smallest training side.

    Raises:
        ValueError: if one that was asked for, or each of the protocol's, is more than there are training cells, or for
            an unknown protocol.
    """
    if asked is not None:
        if max(asked) > n_train:
            raise ValueError(
                f"k: {max(asked)} neighbours asked of {n_train} training cells; choose k between 1 and {n_train}"
            )
        return sorted(set(asked))
    defaults = _known(DEFAULT_KS, protocol)
    usable = [k for k in defaults if k <= n_train]
    left_out = ", ".join(str(k) for k in defaults if k > n_train)
    if not usable:
        raise ValueError(
            f"k: protocol {protocol} asks for {left_out} neighbours of {n_train} training cells; choose k (--k) "
            f"between 1 and {n_train}"
        )
    if left_out:
        logger.warning("k = %s left out: there are %d training cells", left_out, n_train)
    return usable


def _vote_shares(
    train_features: ArrayLike,
    train_labels: ArrayLike,
    test_features: ArrayLike,
    ks: Sequence[int],
    n_classes: int,
    protocol: Protocol,
    temperature: float,
    chunk_size: int | None = None,
) -> dict[int, np.ndarray]:
    """`knn_probabilities` for several k, from one search."""
    _known(DEFAULT_KS, protocol)
    if not temperature > 0:
        raise ValueError(f"temperature: {temperature}; choose one above 0")
    labels = torch.as_tensor(train_labels).cpu().numpy()
    if labels.shape != (len(train_features),):
        raise ValueError(f"{list(labels.shape)} labels for {len(train_features)} training cells: expected one each")
    if len(labels) and not 0 <= labels.min() <= labels.max() < n_classes:
        raise ValueError(f"labels: from {labels.min()} to {labels.max()}, but there are {n_classes} classes")
    found = nearest_neighbours(train_features, test_features, max(ks), protocol == "dino", chunk_size)
    # of features of length 1 the squared distance is 2 - 2 similarity; weights are relative to the nearest one's
    surplus = (found.distances - found.distances[:, :1]) / 2
    weights = np.exp(-surplus / temperature) if protocol == "dino" else np.ones_like(surplus)  # [M, max k]
    votes = np.zeros((len(surplus), n_classes))
    everyone, shares = np.arange(len(votes)), {}
    for number, (voters, of_voters) in enumerate(zip(labels[found.positions].T, weights.T, strict=True), start=1):
        votes[everyone, voters] += of_voters
        if number in ks:
            shares[number] = votes / votes.sum(axis=1, keepdims=True)
    return shares


def _winners(shares: np.ndarray) -> np.ndarray:
    """The first class that no other surpasses: int64 [M] of shares [M, C]."""
    return (shares >= shares.max(axis=1, keepdims=True) * (1 - VOTE_TOLERANCE)).argmax(axis=1)


def _known(of_protocols: dict[Protocol, tuple[int, ...]], protocol: Protocol) -> tuple[int, ...]:
    if protocol not in of_protocols:
        raise ValueError(f"protocol: {protocol!r} is unknown; choose one of {', '.join(of_protocols)}")
    return of_protocols[protocol]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Classify cells by their nearest neighbours among features; print a table and write results.json, "
        "predictions_knn_<k>.csv, split.csv, confusion.png, curves.png to <output-dir>. Give --checkpoint or --encoder "
        "with --train and --test or with --data, or else --features, with or without --test-features.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--protocol",
        choices=get_args(Protocol),
        default="dinobloom",
        help="dinobloom: Euclidean distance, plain vote; dino: cosine similarity, votes weighed by exp(similarity / T)",
    )
    parser.add_argument(
        "--k", type=positive_int, nargs="+", help="numbers of neighbours; without it 1 20, or 10 20 100 200 of dino"
    )
    parser.add_argument("--temperature", type=float, default=TEMPERATURE, help="T of dino")
    add_judging_arguments(parser)
    args = parser.parse_args(argv)
    complete_arguments(parser, args)
    if not args.temperature > 0:
        parser.error(f"--temperature {args.temperature}: choose one above 0")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    setup_logging()
    report = judge(args, load_judged_set(args))
    print(format_report(report, _style(args)))


def judge(args: argparse.Namespace, judged: JudgedSet) -> dict[str, Any]:
    """Judge cells as `args` of `parse_arguments` say, and write the results; returns the content of results.json."""
    ks = usable_ks(args.k, args.protocol, min(len(train) for train, _ in judged.folds))
    settings: dict[str, Any] = {"protocol": args.protocol, "temperature": args.temperature}
    n_classes = len(judged.cells.class_names)
    predicted = {}
    for name, features in judged.main_features.items():
        found = evaluate_knn_folds(
            features, judged.cells.labels, n_classes, judged.folds, ks, device=device_of(args), **settings
        )
        predicted[name] = {f"knn_{k}": of_k for k, of_k in found.items()}
    methods = {f"knn_{k}": FewShotMethod(partial(knn_predict, k=k, n_classes=n_classes, **settings), k) for k in ks}
    return write_results(args, judged, predicted, few_shot_rows(args, judged, methods), _style(args))


def _style(args: argparse.Namespace) -> ReportStyle:
    return ReportStyle("knn", "k", f"kNN ({args.protocol})", has_file_per_row=True)


if __name__ == "__main__":
    sys.exit(exit_code(main))
