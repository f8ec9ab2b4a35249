"""Corrections of a linear probe for cells of another hospital: temperatures, and statistics to standardise by.

Each is a function of arrays. A temperature divides logits and changes no prediction (Guo et al. 2017, 1706.04599):

    T = argmin_T  mean_n -ln softmax(l_n / T)[y_n]

Class-balanced re-standardisation (CBR, arXiv 2608.25148) standardises the target's features by statistics that its
mixture of classes does not move, in place of the source's mean and deviation. With c(n) the class that the uncorrected
probe predicts, mu_c the mean of the cells of class c, and S the set of predicted classes:

    mean = 1 / |S| sum_{c in S} mu_c,      deviation^2 = 1 / N sum_n (x_n - mu_c(n))^2

Letters: N cells, D feature dim, C classes
"""

import numpy as np
import scipy.optimize
import scipy.special

TEMPERATURES = (0.05, 100.0)  # ends of the search; cells that are all right would give 0
CBR_MIN_CELLS = 32  # with fewer, means of predicted classes are too noisy


def standardise(features: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """Return (x - mean) / deviation of features [N, D], float64; `mean` and `deviation` are [D]."""
    return (features - mean) / deviation


def statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and deviation float64 [D] of features [N, D]; the deviation of a constant feature is 1."""
    return features.mean(axis=0, dtype=np.float64), _positive(features.var(axis=0, dtype=np.float64))


def class_balanced_statistics(features: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean over classes of the class means, and the pooled within-class deviation, float64 [D].

    Features are [N, D], `classes` int64 [N] (predicted for a target, labels for a source); classes without a cell do
    not count. The deviation of a feature that is constant within each class is 1.
    """
    of_classes = [features[classes == present] for present in np.unique(classes)]
    means = [cells.mean(axis=0, dtype=np.float64) for cells in of_classes]
    squares = [len(cells) * cells.var(axis=0, dtype=np.float64) for cells in of_classes]
    return np.mean(means, axis=0), _positive(np.sum(squares, axis=0) / len(features))


def _positive(variances: np.ndarray) -> np.ndarray:
    return np.sqrt(np.where(variances > 0, variances, 1.0))


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the temperature with the lowest log loss for logits [N, C] of cells with labels int64 [N].

    It lies within `TEMPERATURES`: at the lower end if all cells are classified right. Cells of a class that the probe
    cannot predict (logit -inf) do not count.
    """
    is_known = np.isfinite(logits[np.arange(len(labels)), labels])
    if not is_known.any():
        return 1.0
    logits, labels = logits[is_known], labels[is_known]

    def log_loss(log_temperature: float) -> float:
        log_p = scipy.special.log_softmax(logits * np.exp(-log_temperature), axis=1)  # [N, C]
        return -log_p[np.arange(len(labels)), labels].mean()

    bounds = np.log(TEMPERATURES)
    found = scipy.optimize.minimize_scalar(log_loss, bounds=bounds, method="bounded", options={"xatol": 1e-7})
    return float(np.exp(found.x))
