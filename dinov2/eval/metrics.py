"""Classification metrics, the same for every protocol.

Letters: N samples, C classes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support, roc_auc_score

N_CALIBRATION_BINS = 15


def classification_metrics(
    labels: np.ndarray,
    predictions: np.ndarray,
    class_names: Sequence[str],
    probabilities: np.ndarray | None = None,
) -> dict[str, Any]:
    """Compare predictions with labels.

    Averages follow scikit-learn: balanced accuracy is the mean recall of the classes that have support, macro F1 the
    mean F1 of the classes that occur among labels or predictions, weighted F1 the mean F1 weighted by support; an
    undefined precision is 0. Cohen's kappa is unweighted; where chance alone explains everything (labels and
    predictions are all of one class) it is undefined and None.

    Args:
        labels: [N] integers, positions in `class_names`.
        predictions: [N] integers, likewise.
        class_names: C names.
        probabilities: [N, C] of each class, rows that sum to 1; None where the method has none.

    Returns:
        `accuracy`, `balanced_accuracy`, `weighted_f1`, `macro_f1`, `kappa` (floats, 0-1, kappa from -1), `per_class`
        ({name: support, recall, precision, f1}; the recall of a class without support is None) and `confusion` (C lists
        of C counts: rows are labels, columns predictions). With probabilities also `auroc` (one class against the
        rest, mean over the classes that some samples are of and some are not; None without such a class), `log_loss`
        (natural logarithm), `calibration_error` (`expected_calibration_error`) and `auroc` of each class. All plain
        Python, ready for JSON.

    Raises:
        ValueError: if there is no sample, the lengths differ, a number is not the position of a class, or the
            probabilities are not such.
    """
    labels, predictions = check_answers(labels, predictions, len(class_names))
    n_classes = len(class_names)
    confusion = confusion_matrix(labels, predictions, labels=range(n_classes))  # [C, C]
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, predictions, labels=range(n_classes), zero_division=0.0
    )
    has_support = support > 0
    occurs = has_support | (confusion.sum(axis=0) > 0)
    metrics: dict[str, Any] = {
        "accuracy": float(np.mean(labels == predictions)),
        "balanced_accuracy": float(recall[has_support].mean()),
        "weighted_f1": float(np.average(f1, weights=support)),
        "macro_f1": float(f1[occurs].mean()),
        "kappa": _kappa(confusion),
    }
    per_class: dict[str, dict[str, Any]] = {
        name: {
            "support": int(support[i]),
            "recall": float(recall[i]) if has_support[i] else None,
            "precision": float(precision[i]),
            "f1": float(f1[i]),
        }
        for i, name in enumerate(class_names)
    }
    if probabilities is not None:
        probabilities = check_probabilities(probabilities, len(labels), n_classes)
        of_classes = auroc_per_class(labels, probabilities)
        for name, value in zip(class_names, of_classes, strict=True):
            per_class[name]["auroc"] = value
        known = [value for value in of_classes if value is not None]
        metrics |= {
            "auroc": float(np.mean(known)) if known else None,
            "log_loss": float(log_losses(labels, probabilities).mean()),
            "calibration_error": expected_calibration_error(labels, predictions, probabilities),
        }
    return {**metrics, "per_class": per_class, "confusion": confusion.tolist()}


def auroc_per_class(labels: np.ndarray, probabilities: np.ndarray) -> list[float | None]:
    """Area under the ROC curve of each class against the rest; None for a class that no sample, or every sample, is of.

    Args:
        labels: [N] integers, 0 to C - 1.
        probabilities: [N, C].
    """
    is_of_class = labels[:, None] == np.arange(probabilities.shape[1])  # [N, C]
    return [
        float(roc_auc_score(is_it, scores)) if 0 < is_it.sum() < len(labels) else None
        for is_it, scores in zip(is_of_class.T, probabilities.T, strict=True)
    ]


def log_losses(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """-ln of the probability of each sample's class, float64 [N]; as scikit-learn has it, 0 counts as 2.2e-16.

    Args:
        labels: [N] integers, 0 to C - 1.
        probabilities: [N, C].
    """
    smallest = np.finfo(np.float64).eps
    of_label = np.take_along_axis(probabilities.astype(np.float64), labels[:, None], axis=1)[:, 0]  # [N]
    return -np.log(np.clip(of_label, smallest, 1 - smallest))


def expected_calibration_error(
    labels: np.ndarray, predictions: np.ndarray, probabilities: np.ndarray, n_bins: int = N_CALIBRATION_BINS
) -> float:
    """By how much confidence and accuracy differ: mean over bins of |accuracy - mean confidence|, weighted by size.

    Confidence is the probability of the predicted class. The bins are `n_bins` intervals of equal width from 0 to 1,
    each without its lower end and with its upper one; empty ones count nothing (Guo et al. 2017, arXiv 1706.04599).

    Args:
        labels: [N] integers, 0 to C - 1.
        predictions: [N] integers, likewise.
        probabilities: [N, C].
        n_bins: number of intervals.
    """
    confidences, accuracies, counts = reliability(labels, predictions, probabilities, n_bins)
    return float((np.abs(accuracies - confidences) * counts).sum() / len(labels))


def reliability(
    labels: np.ndarray, predictions: np.ndarray, probabilities: np.ndarray, n_bins: int = N_CALIBRATION_BINS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean confidence, accuracy and size of the bins of `expected_calibration_error` that are not empty, ascending."""
    confidence = np.take_along_axis(probabilities.astype(np.float64), predictions[:, None], axis=1)[:, 0]  # [N]
    bins = np.searchsorted(np.linspace(0, 1, n_bins + 1)[1:-1], confidence, side="left")  # [N]
    counts = np.bincount(bins, minlength=n_bins)
    is_filled = counts > 0
    sums = [np.bincount(bins, weights=values, minlength=n_bins) for values in (confidence, labels == predictions)]
    confidences, accuracies = (of_bins[is_filled] / counts[is_filled] for of_bins in sums)
    return confidences, accuracies, counts[is_filled]


def check_answers(labels: np.ndarray, predictions: np.ndarray, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays.

    Raises:
        ValueError: if there is no sample, the lengths differ, or a number is not the position of a class.
    """
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    if labels.shape != predictions.shape or labels.ndim != 1 or not len(labels):
        raise ValueError(
            f"labels {labels.shape} and predictions {predictions.shape}: expected one number each per sample"
        )
    for what, values in (("labels", labels), ("predictions", predictions)):
        if values.min() < 0 or values.max() >= n_classes:
            raise ValueError(
                f"{what}: numbers from {values.min()} to {values.max()}, but there are {n_classes} classes"
            )
    return labels, predictions


def check_probabilities(probabilities: np.ndarray, n_samples: int, n_classes: int) -> np.ndarray:
    """As float64.

    Raises:
        ValueError: if they are not [N, C], or a row has negative or NaN entries or does not sum to 1 (within 1e-4).
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)
    if probabilities.shape != (n_samples, n_classes):
        raise ValueError(
            f"probabilities {probabilities.shape}: expected one row for each of {n_samples} samples and one column for "
            f"each of {n_classes} classes"
        )
    # written so that NaN counts as wrong
    is_right = (probabilities >= 0).all(axis=1) & (np.abs(probabilities.sum(axis=1) - 1) <= 1e-4)
    if not is_right.all():
        raise ValueError(
            f"probabilities: {int((~is_right).sum())} of {n_samples} rows are negative, NaN or do not sum to 1, the "
            f"first is row {int(np.argmin(is_right))}; normalise them (softmax)"
        )
    return probabilities


def _kappa(confusion: np.ndarray) -> float | None:
    """Agreement beyond chance, from counts [C, C]."""
    n = confusion.sum()
    by_chance = (confusion.sum(axis=0) / n) @ (confusion.sum(axis=1) / n)
    return float((np.trace(confusion) / n - by_chance) / (1 - by_chance)) if by_chance < 1 else None
