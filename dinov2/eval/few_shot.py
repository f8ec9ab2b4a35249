"""How well a method does with a few cells a class: drawn again and again, so that luck shows as spread.

Letters: N cells, C classes
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from dinov2.data.splits import Fold, few_shot_draws
from dinov2.eval.metrics import classification_metrics

# training features [n, D], their labels [n], features to classify [m, D] -> labels [m]
Predict: TypeAlias = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]

REPORTED = ("accuracy", "balanced_accuracy", "weighted_f1", "macro_f1")


def evaluate_few_shot(
    features: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    folds: Sequence[Fold],
    predict: Predict,
    numbers: Sequence[int] = (1, 5, 10, 20),
    n_repeats: int = 10,
    seed: int = 0,
) -> dict[str, Any]:
    """Learn from n cells a class of each fold's training side, and classify its whole test side.

    Args:
        features: [N, D].
        labels: int64 [N], 0 to C - 1.
        class_names: C names.
        folds: training and test positions each.
        predict: the method, such as `partial(knn_predict, k=1, n_classes=C)`.
        numbers: of cells a class; a class with fewer gives all it has.
        n_repeats: draws for each fold and number.
        seed: of the draws (`few_shot_draws`).

    Returns:
        {n: {"n_draws", and for each metric {"mean", "sd"} over draws and folds}}; sd (with n - 1) is None for one draw.

    Raises:
        ValueError: if n is below 1 or more than even the largest class has, or as `predict`.
    """
    results: dict[str, Any] = {}
    for number in numbers:
        found = []
        for train, test in folds:
            for draw in few_shot_draws(labels[train], number, n_repeats, seed):
                shown = train[draw]
                predictions = predict(features[shown], labels[shown], features[test])
                metrics = classification_metrics(labels[test], predictions, class_names)
                found.append([metrics[name] for name in REPORTED])
        values = np.array(found)  # [draws, metrics]
        spread = values.std(axis=0, ddof=1).tolist() if len(values) > 1 else [None] * len(REPORTED)
        results[str(number)] = {"n_draws": len(values)} | {
            name: {"mean": mean, "sd": sd}
            for name, mean, sd in zip(REPORTED, values.mean(axis=0).tolist(), spread, strict=True)
        }
    return results


def size_of_draw(labels: np.ndarray, number: int) -> int:
    """How many cells a draw of `number` a class has, given the labels int64 [N] to draw from."""
    return int(np.minimum(np.bincount(labels), number).sum())
