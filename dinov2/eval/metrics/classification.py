"""Classification metrics, the same for every protocol.

Letters: N samples, C classes
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support, roc_auc_score

N_CALIBRATION_BINS = 15


def classification_metrics(
    labels: np.ndarray, predictions: np.ndarray, class_names: Sequence[str], probabilities: np.ndarray | None = None
) -> dict[str, Any]:
    """Compare predictions [N] with labels [N], positions in `class_names`; probabilities are [N, C].

    Returns:
        The metrics of `metrics_of_confusion`, `per_class` ({name: support, recall, precision, f1}; recall is None for a
        class without support, an undefined precision is 0) and `confusion` (C lists of C counts: rows are labels,
        columns predictions). With probabilities also `auroc` (mean over the classes that have one; None if none has),
        `log_loss` (natural logarithm), `calibration_error` (see `expected_calibration_error`) and the `auroc` of each
        class. All are plain Python values, ready for JSON.
    """
    n_classes = len(class_names)
    labels, predictions, probabilities = checked(labels, predictions, n_classes, probabilities)
    confusion = confusion_matrix(labels, predictions, labels=range(n_classes))  # [C, C]
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, predictions, labels=range(n_classes), zero_division=0.0
    )
    metrics: dict[str, Any] = {
        name: None if np.isnan(value) else value for name, value in metrics_of_confusion(confusion).items()
    }
    per_class: dict[str, dict[str, Any]] = {
        name: {
            "support": int(support[i]),
            "recall": float(recall[i]) if support[i] else None,
            "precision": float(precision[i]),
            "f1": float(f1[i]),
        }
        for i, name in enumerate(class_names)
    }
    if probabilities is not None:
        areas = auroc_per_class(labels, probabilities)
        for name, area in zip(class_names, areas, strict=True):
            per_class[name]["auroc"] = area
        known = [area for area in areas if area is not None]
        metrics |= {
            "auroc": float(np.mean(known)) if known else None,
            "log_loss": float(log_losses(labels, probabilities).mean()),
            "calibration_error": expected_calibration_error(labels, predictions, probabilities),
        }
    return {**metrics, "per_class": per_class, "confusion": confusion.tolist()}


def metrics_of_confusion(confusion: np.ndarray) -> dict[str, float]:
    """Compute the metrics that follow from counts [C, C] (rows are labels), as scikit-learn defines them.

    `accuracy`; `balanced_accuracy`, the mean recall of the classes that have support; `weighted_f1`, the mean F1
    weighted by support; `macro_f1`, the mean F1 of the classes that occur among labels or predictions; `kappa`, Cohen's
    unweighted kappa, NaN if labels and predictions are all of one class. scikit-learn's own functions need the samples
    and are too slow for each draw of a bootstrap.
    """
    n, right = confusion.sum(), np.diagonal(confusion)
    support, n_predicted = confusion.sum(axis=1), confusion.sum(axis=0)  # [C]
    has_support, occurs = support > 0, support + n_predicted > 0
    accuracy, by_chance = right.sum() / n, (support / n) @ (n_predicted / n)
    f1 = 2 * right / np.maximum(support + n_predicted, 1)  # [C]
    return {
        "accuracy": float(accuracy),
        "balanced_accuracy": float((right[has_support] / support[has_support]).mean()),
        "weighted_f1": float(f1 @ support / n),
        "macro_f1": float(f1[occurs].mean()),
        "kappa": float((accuracy - by_chance) / (1 - by_chance)) if by_chance < 1 else np.nan,
    }


def auroc_per_class(labels: np.ndarray, probabilities: np.ndarray) -> list[float | None]:
    """Compute the area under the ROC curve of each class against the rest; None if all samples are on one side."""
    is_of_class = labels[:, None] == np.arange(probabilities.shape[1])  # [N, C]
    return [
        float(roc_auc_score(is_positive, scores)) if 0 < is_positive.sum() < len(labels) else None
        for is_positive, scores in zip(is_of_class.T, probabilities.T, strict=True)
    ]


def log_losses(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Return -ln of the probability of each sample's class, float64 [N]; like scikit-learn, 0 counts as 2.2e-16."""
    smallest = np.finfo(np.float64).eps
    of_label = np.take_along_axis(probabilities.astype(np.float64), labels[:, None], axis=1)[:, 0]  # [N]
    return -np.log(np.clip(of_label, smallest, 1 - smallest))


def expected_calibration_error(labels: np.ndarray, predictions: np.ndarray, probabilities: np.ndarray) -> float:
    """Return the mean over bins of |accuracy - mean confidence|, weighted by size (Guo et al. 2017, 1706.04599)."""
    confidences, accuracies, counts = reliability(labels, predictions, probabilities)
    return float((np.abs(accuracies - confidences) * counts).sum() / len(labels))


def reliability(
    labels: np.ndarray, predictions: np.ndarray, probabilities: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return mean confidence, accuracy and size of the bins of confidence that are not empty, ascending.

    Confidence is the probability of the predicted class. The bins have equal widths from 0 to 1; a value on a border
    belongs to the lower bin.
    """
    confidence = np.take_along_axis(probabilities.astype(np.float64), predictions[:, None], axis=1)[:, 0]  # [N]
    bins = np.searchsorted(np.linspace(0, 1, N_CALIBRATION_BINS + 1)[1:-1], confidence)  # [N]
    _, bins, counts = np.unique(bins, return_inverse=True, return_counts=True)
    return np.bincount(bins, confidence) / counts, np.bincount(bins, labels == predictions) / counts, counts


def checked(
    labels: np.ndarray, predictions: np.ndarray, n_classes: int, probabilities: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Validate labels, predictions and probabilities and return them as arrays."""
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    if labels.shape != predictions.shape or labels.ndim != 1 or not len(labels):
        shapes = f"labels {labels.shape} and predictions {predictions.shape}"
        raise ValueError(f"{shapes}: expected one number each per sample")
    for what, values in (("labels", labels), ("predictions", predictions)):
        low, high = values.min(), values.max()
        if low < 0 or high >= n_classes:
            raise ValueError(f"{what}: numbers from {low} to {high}, but there are {n_classes} classes")
    if probabilities is None:
        return labels, predictions, None
    probabilities = np.asarray(probabilities, dtype=np.float64)
    if probabilities.shape != (len(labels), n_classes):
        raise ValueError(
            f"probabilities {probabilities.shape}: expected one row for each of {len(labels)} samples and one column "
            f"for each of {n_classes} classes"
        )
    # NaN compares as False, so such a row counts as wrong
    is_right = (probabilities >= 0).all(axis=1) & (np.abs(probabilities.sum(axis=1) - 1) <= 1e-4)
    if not is_right.all():
        raise ValueError(
            f"probabilities: {int((~is_right).sum())} of {len(labels)} rows are negative, NaN or do not sum to 1, the "
            f"first is row {int(np.argmin(is_right))}; normalise them (softmax)"
        )
    return labels, predictions, probabilities
