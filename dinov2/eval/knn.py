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
import json
import logging
import os
import platform
import sys
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import sklearn
import torch
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from torch import Tensor

from dinov2.data.datasets.cells import LabelledCells
from dinov2.eval.baselines import BASELINES
from dinov2.eval.extract_features import CELLS_HELP, add_embedder_arguments, embedder_from, positive_int
from dinov2.eval.features import Embedder, Features, read_features
from dinov2.eval.metrics import classification_metrics
from dinov2.hub.backbones import file_sha256, untrained_backbone
from dinov2.logging import setup_logging
from dinov2.utils.command import exit_code
from dinov2.utils.files import atomic_write

logger = logging.getLogger("dinov2")

ArrayLike: TypeAlias = np.ndarray | Tensor

DEFAULT_KS = (1, 20)
DISTANCES_PER_CHUNK = 1 << 24  # 128 MiB of float64, and some copies
# distances nearer to each other than this share of the squared lengths involved are one distance: rounding in a matrix
# product depends on its shape, and equal pictures must not be told apart by it
TIE_TOLERANCE = 1e-11
TABLE_METRICS = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced acc.",
    "weighted_f1": "weighted F1",
    "macro_f1": "macro F1",
}


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


def split_cells(
    labels: np.ndarray, patients: Sequence[str] | None, test_fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """One stratified split: positions of the training and of the test cells, both ascending.

    Args:
        labels: int64 [N].
        patients: N patient ids; a patient's cells all go to one side. None to split by cell.
        test_fraction: share of the test set: of round(1 / test_fraction) parts it is the one of the most even size.
        seed: of the draw.

    Raises:
        ValueError: if the fraction is not in (0, 0.5], or there are too few patients or cells for it.
    """
    if not 0 < test_fraction <= 0.5:
        raise ValueError(f"--test-fraction {test_fraction}: choose a share above 0 and up to 0.5")
    n_parts = round(1 / test_fraction)
    available = {"cells in its largest class": int(np.bincount(labels).max())}
    if patients is not None:
        available["patients"] = len(set(patients))
    for what, n_available in available.items():
        if n_available < n_parts:
            raise ValueError(
                f"--test-fraction {test_fraction}: the set has {n_available} {what}, fewer than the {n_parts} parts to "
                f"make; choose a larger share, or give --train and --test"
            )
    folds = StratifiedKFold if patients is None else StratifiedGroupKFold
    with warnings.catch_warnings():
        # classes smaller than the number of parts may miss in the test set: the table's support column shows it
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        splits = list(folds(n_parts, shuffle=True, random_state=seed).split(labels, labels, patients))
    # parts of whole patients differ in size
    return min(splits, key=lambda split: abs(len(split[1]) * n_parts - len(labels)))


def without_duplicates(train: Features, test: Features) -> tuple[Features, dict[str, int]]:
    """Drop from the training set what is in the test set too.

    Returns:
        the training set, and counts: `dropped_identical_bytes`, `not_checked` (pictures that are not on this disk) and
        `patients_in_both`.

    Raises:
        ValueError: if a picture file is in both sets, or none is left to train on.
    """
    both = {os.path.realpath(path) for path in train.paths} & {os.path.realpath(path) for path in test.paths}
    if both:
        raise ValueError(
            f"train and test share {len(both)} picture files, for instance {', '.join(sorted(both)[:3])}; "
            f"remove them from one of the two (a picture listed twice can also fall on both sides of a split)"
        )
    # only files of one size can be equal: {bytes: (positions in train, positions in test)}
    sizes: dict[int, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    n_unchecked = 0
    for side, features in enumerate((train, test)):
        for position, path in enumerate(features.paths):
            try:
                sizes[os.path.getsize(path)][side].append(position)
            except OSError:
                n_unchecked += 1
    copies: list[int] = []
    for in_train, in_test in sizes.values():
        if in_train and in_test:
            test_hashes = {file_sha256(test.paths[i]) for i in in_test}
            copies += [i for i in in_train if file_sha256(train.paths[i]) in test_hashes]
    patients = set(train.patients or ()) & set(test.patients or ())
    if copies:
        logger.warning("%d training pictures are byte-equal to test pictures and dropped from training", len(copies))
    if n_unchecked:
        logger.warning("%d pictures are not on this disk: whether train and test share copies is unknown", n_unchecked)
    if patients:
        logger.warning("%d patients have cells in both train and test", len(patients))
    keep = np.ones(len(train), dtype=bool)
    keep[copies] = False
    if not keep.any():
        raise ValueError("train: every picture is a copy of a test picture; give a test set of other cells")
    counts = {"dropped_identical_bytes": len(copies), "not_checked": n_unchecked, "patients_in_both": len(patients)}
    return train.select(keep), counts


def align_classes(features: Features, class_names: list[str]) -> Features:
    """The same features with labels that count in `class_names`.

    Raises:
        ValueError: if a cell's class is not among them.
    """
    unknown = sorted({features.class_names[i] for i in features.labels} - set(class_names))
    if unknown:
        raise ValueError(
            f"test features: classes {', '.join(map(repr, unknown))} are not among the training set's "
            f"{', '.join(map(repr, class_names))}; extract both from sets with the same class names"
        )
    new_ids = np.array([class_names.index(name) if name in class_names else -1 for name in features.class_names])
    return replace(features, labels=new_ids[features.labels], class_names=class_names)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Classify cells by their nearest neighbours among features; print a table and write "
        "<output-dir>/results.json. Give --checkpoint with --train and --test or with --data, or else --features, with "
        "or without --test-features.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_embedder_arguments(parser, checkpoint_required=False)
    parser.add_argument("--train", type=Path, help=f"cells to learn from: {CELLS_HELP}")
    parser.add_argument("--test", type=Path, help="cells to classify, likewise")
    parser.add_argument("--data", type=Path, help="one set to split into both, likewise")
    parser.add_argument("--features", type=Path, help="a features.h5: the training set, or one set to split")
    parser.add_argument("--test-features", type=Path, help="a features.h5 from the same network: the test set")
    parser.add_argument(
        "--test-fraction", type=float, default=0.25, help="share of --data or of --features alone to test on, up to 0.5"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split and of the untrained network")
    parser.add_argument("--k", type=positive_int, nargs="+", default=list(DEFAULT_KS), help="numbers of neighbours")
    parser.add_argument(
        "--baseline",
        choices=("untrained", *BASELINES),
        nargs="+",
        default=[],
        help="judge these on the same split too: the same architecture untrained (with --checkpoint), colour "
        "histograms (HSV), raw 32x32 pixels",
    )
    parser.add_argument("--output-dir", type=Path, required=True, help="for results.json and features; made if missing")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    if problem := _wrong_combination(args):
        parser.error(problem)
    setup_logging()

    embedder = embedder_from(args) if args.checkpoint else None
    train, test = _load_sets(args, embedder)
    train, overlap = without_duplicates(train, test)
    class_names, labels = train.class_names, (train.labels, test.labels)
    unseen = sorted({class_names[i] for i in test.labels} - {class_names[i] for i in train.labels})
    if unseen:
        logger.warning("test classes without a training cell, which nothing can get right: %s", ", ".join(unseen))

    sources = {"model": (train.features, test.features)}
    for name in args.baseline:
        sources[name] = _baseline_features(name, train, test, embedder, args.seed)
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
        "checkpoint": {name: train.attributes.get(name) for name in ("checkpoint", "checkpoint_sha256", "model")},
        "features": train.attributes,
        "settings": {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "scikit-learn": sklearn.__version__,
        },
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    with atomic_write(args.output_dir / "results.json", "w") as file:
        json.dump(report, file, indent=2)
    print(format_report(report))


def format_report(report: dict[str, Any]) -> str:
    """results.json as two tables, in percent: all rows, and the classes of the model's row with the largest k."""
    results, counts, n_classes = report["results"], report["counts"], len(report["class_names"])
    width = max(map(len, results))
    lines = [
        f"kNN, {counts['train']} training and {counts['test']} test cells, {n_classes} classes (in percent)",
        "",
        f"{'':{width}} {'k':>4}" + "".join(f"{title:>15}" for title in TABLE_METRICS.values()),
    ]
    for name, by_k in results.items():
        for key, metrics in by_k.items():
            numbers = "".join(f"{100 * metrics[metric]:15.1f}" for metric in TABLE_METRICS)
            lines.append(f"{name:{width}} {key.removeprefix('knn_'):>4}{numbers}")
    last_key = list(results["model"])[-1]
    title = f"model, k = {last_key.removeprefix('knn_')}"
    width = max(map(len, [title, *report["class_names"]]))
    lines += ["", f"{title:{width}}   train    test  recall  precision      F1"]
    for name, row in results["model"][last_key]["per_class"].items():
        recall = "-" if row["recall"] is None else f"{100 * row['recall']:.1f}"
        lines.append(
            f"{name:{width}} {counts['train_per_class'][name]:7} {row['support']:7} {recall:>7} "
            f"{100 * row['precision']:10.1f} {100 * row['f1']:7.1f}"
        )
    return "\n".join(lines)


def _wrong_combination(args: argparse.Namespace) -> str:
    """What is wrong with the sources that were given, or ""."""
    given = {
        name for name in ("checkpoint", "train", "test", "data", "features", "test_features") if getattr(args, name)
    }
    allowed = (
        {"checkpoint", "train", "test"},
        {"checkpoint", "data"},
        {"features", "test_features"},
        {"features"},
    )
    if given not in allowed:
        flags = ["--" + name.replace("_", "-") for name in sorted(given)]
        return (
            f"got {' '.join(flags) or 'no cells'}; give --checkpoint --train --test, or --checkpoint --data, "
            f"or --features --test-features, or --features"
        )
    if "untrained" in args.baseline and not args.checkpoint:
        return "--baseline untrained needs --checkpoint, which says what architecture to build"
    return ""


def _load_sets(args: argparse.Namespace, embedder: Embedder | None) -> tuple[Features, Features]:
    """Training and test features, as the flags say."""
    if embedder is not None and args.data is None:
        train_cells = LabelledCells.from_path(args.train)
        test_cells = LabelledCells.from_path(args.test, class_names=train_cells.class_names)
        train = embedder.features_of(train_cells, args.output_dir / "features_train.h5", args.overwrite)
        return train, embedder.features_of(test_cells, args.output_dir / "features_test.h5", args.overwrite)
    if args.test_features is not None:
        train, test = read_features(args.features), read_features(args.test_features)
        for name in ("checkpoint_sha256", "transform"):
            if train.attributes.get(name) != test.attributes.get(name):
                raise ValueError(
                    f"--features and --test-features: {name} differs, {train.attributes.get(name)!r} and "
                    f"{test.attributes.get(name)!r}; extract both with one checkpoint and one image size"
                )
        return train, align_classes(test, train.class_names)
    if embedder is not None:
        cells = LabelledCells.from_path(args.data)
        whole = embedder.features_of(cells, args.output_dir / "features.h5", args.overwrite)
    else:
        whole = read_features(args.features)
    in_train, in_test = split_cells(whole.labels, whole.patients, args.test_fraction, args.seed)
    return whole.select(in_train), whole.select(in_test)


def _baseline_features(
    name: str, train: Features, test: Features, embedder: Embedder | None, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Another kind of features [N, D] and [M, D] of the same cells."""
    logger.info("baseline %s", name)
    paths = [Path(path) for path in train.paths + test.paths]
    if name == "untrained":
        assert embedder is not None, "_wrong_combination asks for a checkpoint"
        model = untrained_backbone(embedder.file, embedder.image_size, seed)
        extraction = embedder.extract(paths, model)
        if extraction.unreadable:
            raise ValueError(
                f"--baseline untrained: {len(extraction.unreadable)} pictures can no longer be read, for instance "
                f"{next(iter(extraction.unreadable))}; put them back, or extract again with --overwrite"
            )
        features = extraction.features
    else:
        features = BASELINES[name](paths)
    return features[: len(train)], features[len(train) :]


if __name__ == "__main__":
    sys.exit(exit_code(main))
