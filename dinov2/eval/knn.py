"""k-nearest-neighbour classification of cells, DinoBloom's protocol: k = 1 and 20, Euclidean distance, plain vote.

Protocol. Features are CLS tokens, neither scaled nor normalised. A test cell gets the class that most of its k nearest
training cells have. Between classes with equally many votes the one with the smaller id (the first in `class_names`)
wins, as in scikit-learn's KNeighborsClassifier; between training cells at equal distance the earlier one counts.
Nothing is tuned: each k is reported. Averages are those of `metrics.classification_metrics`.

Split. Given as two sets (`--train` and `--test`, or two feature files), or made here from one: stratified by class, and
by whole patients where the set names them; one part of round(1 / test fraction) is the test set, drawn from `--seed`. A
picture file in both sets is an error; a training picture whose bytes equal a test picture's is dropped and counted;
patients in both sets are counted.

Dimension key:  N training cells, M test cells, D embedding dim, C classes
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from dinov2.data.splits import split_cells
from dinov2.eval.cell_sets import (
    add_baseline_argument,
    add_source_arguments,
    baseline_features,
    input_hashes,
    load_sets,
    without_duplicates,
    wrong_combination,
)
from dinov2.eval.extract_features import add_embedder_arguments, embedder_from, positive_int
from dinov2.eval.metrics import classification_metrics
from dinov2.eval.results import class_table, metrics_table, provenance, settings_of, write_report
from dinov2.logging import setup_logging
from dinov2.utils.command import exit_code

logger = logging.getLogger("dinov2")

ArrayLike: TypeAlias = np.ndarray | Tensor

DEFAULT_KS = (1, 20)
DISTANCES_PER_CHUNK = 1 << 24  # 128 MiB of float64, and some copies
# distances nearer to each other than this share of the squared lengths involved are one distance: rounding in a matrix
# product depends on its shape, and equal pictures must not be told apart by it
TIE_TOLERANCE = 1e-11


def knn_predict(
    train_features: ArrayLike,
    train_labels: ArrayLike,
    test_features: ArrayLike,
    k: int,
    n_classes: int,
    chunk_size: int | None = None,
) -> np.ndarray:
    """The majority class among each test cell's k nearest training cells; ties are broken as the module docstring says.

    Args:
        train_features: [N, D], array or tensor; distances are computed where the tensor is.
        train_labels: int64 [N], 0 to C - 1.
        test_features: [M, D].
        k: number of neighbours.
        n_classes: C.
        chunk_size: test cells at a time; None for as many as about half a GiB holds. The result does not depend on it.

    Returns:
        int64 [M].

    Raises:
        ValueError: if k is not between 1 and N, shapes do not fit, or a feature is infinite or NaN.
    """
    return _predict(train_features, train_labels, test_features, (k,), n_classes, chunk_size)[k]


def evaluate_knn(
    train_features: ArrayLike,
    train_labels: ArrayLike,
    test_features: ArrayLike,
    test_labels: ArrayLike,
    class_names: Sequence[str],
    ks: Sequence[int] = DEFAULT_KS,
) -> dict[str, dict[str, Any]]:
    """The protocol on given features.

    Args:
        train_features, train_labels, test_features: as for `knn_predict`.
        test_labels: int64 [M].
        class_names: C names.
        ks: numbers of neighbours.

    Returns:
        {"knn_<k>": classification_metrics} for each k.

    Raises:
        ValueError: as `knn_predict`.
    """
    predictions = _predict(train_features, train_labels, test_features, ks, len(class_names))
    labels = torch.as_tensor(test_labels).cpu().numpy()
    return {f"knn_{k}": classification_metrics(labels, predictions[k], class_names) for k in ks}


def _predict(
    train_features: ArrayLike,
    train_labels: ArrayLike,
    test_features: ArrayLike,
    ks: Sequence[int],
    n_classes: int,
    chunk_size: int | None = None,
) -> dict[int, np.ndarray]:
    """knn_predict for several k, from one pass over the distances."""
    train = torch.as_tensor(train_features)
    labels = torch.as_tensor(train_labels, device=train.device).long()
    test = torch.as_tensor(test_features, device=train.device)
    if train.ndim != 2 or test.ndim != 2 or train.shape[1] != test.shape[1] or labels.shape != train.shape[:1]:
        raise ValueError(
            f"features of {list(train.shape)} (train) and {list(test.shape)} (test) with {list(labels.shape)} labels: "
            f"expected [N, D], [M, D] and [N]"
        )
    n_train = len(train)
    for k in ks:
        if not 1 <= k <= n_train:
            raise ValueError(f"k: {k} neighbours asked of {n_train} training cells; choose k between 1 and {n_train}")
    if not (train.isfinite().all() and test.isfinite().all()):
        raise ValueError("features: some are infinite or NaN, so their distances mean nothing; check the weights")

    # |a - b|^2 = |a|^2 - 2ab + |b|^2 loses the digits that a common offset takes, so that offset goes first
    mean = train.double().mean(dim=0)
    train = train.double() - mean
    squared_lengths = train.square().sum(dim=1)  # [N]
    one_hot = torch.nn.functional.one_hot(labels, n_classes).float()  # [N, C]
    predictions: dict[int, list[Tensor]] = {k: [] for k in ks}
    for chunk in test.split(chunk_size or max(1, DISTANCES_PER_CHUNK // n_train)):
        cells = chunk.double() - mean  # [m, D]
        own_lengths = cells.square().sum(dim=1, keepdim=True)  # [m, 1]
        distances = torch.addmm(squared_lengths, cells, train.T, alpha=-2).add_(own_lengths)  # [m, N], squared
        nearest = distances.topk(max(ks), dim=1, largest=False).values  # [m, max k], ascending
        for k in ks:
            votes = _neighbours(distances, nearest[:, k - 1 : k], own_lengths, k).float() @ one_hot  # [m, C]
            predictions[k].append(votes.argmax(dim=1))  # the first of equal maxima: the smallest class id
    return {k: torch.cat(parts).cpu().numpy() for k, parts in predictions.items()}


def _neighbours(distances: Tensor, farthest: Tensor, own_lengths: Tensor, k: int) -> Tensor:
    """Which k training cells are nearest: bool [m, N], from squared distances [m, N] and the k-th smallest [m, 1]."""
    tolerance = TIE_TOLERANCE * (own_lengths + farthest.clamp_min(0))  # [m, 1]
    is_nearer = distances < farthest - tolerance
    is_tied = distances <= farthest + tolerance
    is_tied &= ~is_nearer
    n_open = k - is_nearer.sum(dim=1, keepdim=True)  # [m, 1]
    return is_nearer | (is_tied & (is_tied.cumsum(dim=1) <= n_open))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Classify cells by their nearest neighbours among features; print a table and write "
        "<output-dir>/results.json. Give --checkpoint with --train and --test or with --data, or else --features, with "
        "or without --test-features.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_embedder_arguments(parser, checkpoint_required=False)
    add_source_arguments(parser)
    parser.add_argument(
        "--test-fraction", type=float, default=0.25, help="share of --data or of --features alone to test on, up to 0.5"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split and of the untrained network")
    parser.add_argument("--k", type=positive_int, nargs="+", default=list(DEFAULT_KS), help="numbers of neighbours")
    add_baseline_argument(parser)
    parser.add_argument("--output-dir", type=Path, required=True, help="for results.json and features; made if missing")
    args = parser.parse_args(argv)
    if problem := wrong_combination(args):
        parser.error(problem)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    setup_logging()

    embedder = embedder_from(args) if args.checkpoint else None
    train, test = load_sets(args, embedder)
    if test is None:
        in_train, in_test = split_cells(train.labels, train.patients, args.test_fraction, args.seed)
        train, test = train.select(in_train), train.select(in_test)
    train, overlap = without_duplicates(train, test)
    class_names, labels = train.class_names, (train.labels, test.labels)
    unseen = sorted({class_names[i] for i in test.labels} - {class_names[i] for i in train.labels})
    if unseen:
        logger.warning("test classes without a training cell, which nothing can get right: %s", ", ".join(unseen))

    sources = {"model": (train.features, test.features)}
    for name in args.baseline:
        both = baseline_features(name, train.paths + test.paths, embedder, args.seed)
        sources[name] = both[: len(train)], both[len(train) :]
    results = {
        name: evaluate_knn(of_train, labels[0], of_test, labels[1], class_names, sorted(set(args.k)))
        for name, (of_train, of_test) in sources.items()
    }
    report = {
        "protocol": "knn",
        "results": results,
        "class_names": class_names,
        "counts": {
            "train": len(train),
            "test": len(test),
            "train_per_class": {name: int((labels[0] == i).sum()) for i, name in enumerate(class_names)},
            "unreadable": len({*train.unreadable, *test.unreadable}),
            **overlap,
        },
        "patients_kept_apart": None if None in (train.patients, test.patients) else not overlap["patients_in_both"],
        **provenance(train.attributes, settings_of(args), input_hashes(args)),
    }
    write_report(args.output_dir, report)
    print(format_report(report))


def format_report(report: dict[str, Any]) -> str:
    """results.json as two tables, in percent: all rows, and the classes of the model's row with the largest k."""
    results, counts, n_classes = report["results"], report["counts"], len(report["class_names"])
    rows = [
        (name, key.removeprefix("knn_"), metrics) for name, by_k in results.items() for key, metrics in by_k.items()
    ]
    last_key = list(results["model"])[-1]
    title = f"model, k = {last_key.removeprefix('knn_')}"
    lines = [
        f"kNN, {counts['train']} training and {counts['test']} test cells, {n_classes} classes (in percent)",
        "",
        *metrics_table(rows, "k"),
        "",
        *class_table(title, results["model"][last_key], counts["train_per_class"]),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(exit_code(main))
