"""Classification metrics, the same for every protocol.

Letters: N samples, C classes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support


def classification_metrics(labels: np.ndarray, predictions: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """Compare predictions with labels.

    Averages follow scikit-learn: balanced accuracy is the mean recall of the classes that have support, macro F1 the
    mean F1 of the classes that occur among labels or predictions, weighted F1 the mean F1 weighted by support; an
    undefined precision is 0.

    Args:
        labels: [N] integers, positions in `class_names`.
        predictions: [N] integers, likewise.
        class_names: C names.

    Returns:
        `accuracy`, `balanced_accuracy`, `weighted_f1`, `macro_f1` (floats, 0-1), `per_class` ({name: support, recall,
        precision, f1}; the recall of a class without support is None) and `confusion` (C lists of C counts: rows are
        labels, columns predictions). All plain Python, ready for JSON.

    Raises:
        ValueError: if there is no sample, the lengths differ, or a number is not the position of a class.
    """
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    if labels.shape != predictions.shape or labels.ndim != 1 or not len(labels):
        raise ValueError(
            f"labels {labels.shape} and predictions {predictions.shape}: expected one number each per sample"
        )
    n_classes = len(class_names)
    for what, values in (("labels", labels), ("predictions", predictions)):
        if values.min() < 0 or values.max() >= n_classes:
            raise ValueError(
                f"{what}: numbers from {values.min()} to {values.max()}, but there are {n_classes} classes"
            )

    confusion = confusion_matrix(labels, predictions, labels=range(n_classes))  # [C, C]
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, predictions, labels=range(n_classes), zero_division=0.0
    )
    has_support = support > 0
    occurs = has_support | (confusion.sum(axis=0) > 0)
    return {
        "accuracy": float(np.mean(labels == predictions)),
        "balanced_accuracy": float(recall[has_support].mean()),
        "weighted_f1": float(np.average(f1, weights=support)),
        "macro_f1": float(f1[occurs].mean()),
        "per_class": {
            name: {
                "support": int(support[i]),
                "recall": float(recall[i]) if has_support[i] else None,
                "precision": float(precision[i]),
                "f1": float(f1[i]),
            }
            for i, name in enumerate(class_names)
        },
        "confusion": confusion.tolist(),
    }
