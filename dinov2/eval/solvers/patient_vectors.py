"""Patient vectors: a bag of cells pooled to one vector, classified by kNN and logistic regression, and retrieved.

The protocol is that of GenBloom's published rows (arXiv 2605.29980): vectors as they are, without standardisation;
each fold's training part alone is fitted, not its validation part; kNN with Euclidean distance and plain votes;
multinomial logistic regression with C = 1 and weights that balance the classes; retrieval among the test patients.

Letters: P patients, N cells of one, D feature dim, V vector dim (D or 2 D), C classes, T tested patients, Q queries
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from dinov2.data.datasets.bag_folds import FoldedBags
from dinov2.eval.metrics.intervals import intervals_of
from dinov2.eval.solvers.mil_training import Member

KS = (1, 5, 10)
RANKS = 3  # of mAP@3
MAX_ITER = 10_000


def _mean(cells: np.ndarray) -> np.ndarray:
    return cells.mean(axis=0, dtype=np.float64)


def _mean_and_deviation(cells: np.ndarray) -> np.ndarray:
    return np.concatenate([_mean(cells), cells.std(axis=0, dtype=np.float64)])


# {name: cells [N, D] -> vector [V]}
POOLINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"mean": _mean, "mean_sd": _mean_and_deviation}


def evaluate(data: FoldedBags) -> dict[str, list[Member]]:
    """Fit each classifier on the training part of each fold; return {<pooling>_<classifier>: a fit for each fold}."""
    labels, n_classes = data.labels, len(data.bags.class_names)
    rows: dict[str, list[Member]] = {}
    for pooling, vectors in pooled(data):
        for number, fold in enumerate(data.folds):
            n_train = len(fold.train)
            for name, classifier in {
                # fewer patients than k: all of them vote
                **{f"knn_{k}": KNeighborsClassifier(min(k, n_train)) for k in KS},
                "logistic": LogisticRegression(class_weight="balanced", max_iter=MAX_ITER),
            }.items():
                classifier.fit(vectors[fold.train], labels[fold.train])
                probabilities = np.zeros((len(fold.test), n_classes))  # 0 for a class without a training patient
                probabilities[:, classifier.classes_] = classifier.predict_proba(vectors[fold.test])
                rows.setdefault(f"{pooling}_{name}", []).append(Member(number, 0, fold.test, probabilities))
    return rows


def pooled(data: FoldedBags) -> Iterator[tuple[str, np.ndarray]]:
    """Yield each pooling with the vectors of all patients, float64 [P, V]."""
    for name, pool in POOLINGS.items():
        yield name, np.stack([pool(cells) for cells in data.bags.features])


def retrieval(data: FoldedBags, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Return {pooling: `map_at_3` and its 95 % `interval`} of test patients that look for others of their class.

    Each tested patient ranks the others of its test set by cosine similarity of their vectors. A query counts only if
    another one of its class is among them, and the interval draws queries.
    """
    test_sets = [fold.test for fold in data.test_sets()]
    results = {}
    for pooling, vectors in pooled(data):
        scores = np.concatenate([_precisions(vectors[list(test)], data.labels[list(test)]) for test in test_sets])
        results[pooling] = _mean_with_interval(scores, seed)
    return results


def _precisions(vectors: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the average precision at `RANKS` of each query with another patient of its class, float64 [Q].

    AP@R is the sum of the precision at each rank up to R that holds the query's class, divided by the number of such
    patients, R at most.
    """
    units = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    similarity = units @ units.T  # [T, T]
    np.fill_diagonal(similarity, -np.inf)  # last in its own ranking
    order = np.argsort(-similarity, axis=1, kind="stable")[:, : min(RANKS, len(labels) - 1)]
    is_same = labels[order] == labels[:, None]  # [T, R]
    precision = is_same.cumsum(axis=1) / np.arange(1, is_same.shape[1] + 1)
    n_same = (labels[:, None] == labels).sum(axis=1) - 1
    scores = (precision * is_same).sum(axis=1) / np.minimum(np.maximum(n_same, 1), RANKS)
    return scores[n_same > 0]


def _mean_with_interval(scores: np.ndarray, seed: int) -> dict[str, Any]:
    if not len(scores):
        return {f"map_at_{RANKS}": None, "interval": None, "queries": 0}

    def mean_of(weights: np.ndarray) -> dict[str, float]:
        return {"mean": float(scores @ weights / weights.sum())}

    intervals = intervals_of(mean_of, len(scores), seed=seed)
    return {f"map_at_{RANKS}": float(scores.mean()), "interval": intervals.get("mean"), "queries": len(scores)}
