"""Few-shot protocol: another protocol, trained on a few cells of each class, drawn repeatedly so that the spread shows.

Letters: N cells, C classes
"""

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from dinov2.data.splits import few_shot_draws
from dinov2.eval.metrics import classification_metrics
from dinov2.eval.protocol import EvaluationData, Protocol

logger = logging.getLogger("dinov2")

REPORTED = ("accuracy", "balanced_accuracy", "weighted_f1", "macro_f1")


@dataclass(frozen=True)
class FewShotOptions:
    protocol: Protocol  # with its options
    numbers: Sequence[int] = (1, 5, 10, 20)  # of cells per class; a class with fewer gives all it has
    repeats: int = 10  # draws for each fold and number


def evaluate(data: EvaluationData, options: FewShotOptions) -> dict[str, dict[str, Any]]:
    """Train on n cells of each class of each fold's training side, and test on its whole test side.

    Returns:
        {row of the protocol: {n: {"n_draws", and for each metric {"mean", "sd"} over draws and folds}}}; sd (with
        n - 1) is None for one draw. Numbers with too few cells for the protocol are left out.
    """
    protocol, results = options.protocol, defaultdict[str, dict[str, Any]](dict)
    for number in sorted(set(options.numbers)):
        n_train = min(size_of_draw(data.labels[train], number) for train, _ in data.folds)
        protocol_options = protocol.options if protocol.few_shot_options is None else protocol.few_shot_options(n_train)
        if protocol_options is None:
            logger.info("few-shot, %d per class: %s is left out, %d cells are too few", number, protocol.name, n_train)
            continue
        scores = defaultdict[str, list[list[float]]](list)
        for train, test in data.folds:
            for draw in few_shot_draws(data.labels[train], number, options.repeats, data.seed):
                predicted = protocol.evaluate(replace(data, folds=[(train[draw], test)]), protocol_options)
                for row, predictions in predicted.items():
                    metrics = classification_metrics(data.labels[test], predictions.predictions[test], data.class_names)
                    scores[row].append([metrics[name] for name in REPORTED])
        for row, values in scores.items():
            table = pd.DataFrame(values, columns=REPORTED)
            spread = table.std() if len(table) > 1 else dict.fromkeys(REPORTED)
            results[row][str(number)] = {"n_draws": len(table)} | {
                name: {"mean": float(table[name].mean()), "sd": spread[name]} for name in REPORTED
            }
    return dict(results)


def size_of_draw(labels: np.ndarray, number: int) -> int:
    """Return how many cells a draw of `number` per class has, for the labels int64 [N] to draw from."""
    return int(np.minimum(np.bincount(labels), number).sum())
