"""Suspected label errors by confident learning (Northcutt et al. 2021, arXiv 1911.00068).

The threshold of a class is the mean probability of that class over the cells with its label. A probability divided by
the threshold of its class says how sure a method is, compared with how sure it usually is of that class.

Letters: N cells, C classes. Probabilities are [N, C], of a method that did not learn from the cell.
"""

import numpy as np


def class_thresholds(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Return the mean probability of each class over the cells with its label, float64 [C].

    It is NaN for a class without cells, or one that the method never learned.
    """
    of_label = np.take_along_axis(probabilities, labels[:, None], axis=1)[:, 0]
    counts = np.bincount(labels, minlength=probabilities.shape[1])
    sums = np.bincount(labels, of_label, minlength=probabilities.shape[1])
    return np.divide(sums, counts, out=np.full(len(counts), np.nan), where=sums > 0)


def suspected_labels(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the cells for which another class than their label has the highest probability relative to its threshold.

    Returns:
        positions int64 [n] of these cells, the most suspected first; the class suggested for each; and its score, the
        probability of the label divided by the threshold of the label, by which they are ranked: low is suspect.
    """
    relative = probabilities / class_thresholds(labels, probabilities)
    suggested = np.nan_to_num(relative, nan=-1).argmax(axis=1)
    scores = relative[np.arange(len(labels)), labels]
    positions = np.flatnonzero((suggested != labels) & ~np.isnan(scores))
    positions = positions[np.argsort(scores[positions], kind="stable")]
    return positions, suggested[positions], scores[positions]


def estimate_errors(labels: np.ndarray, probabilities: np.ndarray) -> int:
    """Return the number of label errors that the paper's confident joint counts, at about the top of the list.

    A cell counts if a class reaches its threshold, and the most probable one that does is not the label.
    """
    is_confident = probabilities >= class_thresholds(labels, probabilities)  # false for NaN
    likeliest = np.where(is_confident, probabilities, -1).argmax(axis=1)
    return int((is_confident.any(axis=1) & (likeliest != labels)).sum())
