"""Bootstrap intervals of metrics, and paired tests of two methods on the same samples.

The bootstrap (Efron 1979) draws as many patients as there are, with replacement and with all their samples, because
samples of one patient resemble each other: drawn one by one, their intervals would be too narrow. Where patients are
not known each sample is its own patient. A draw is a weight for each sample: how often the draw has it.

Dimension key:  N samples, C classes, R resamples, P patients
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from dinov2.eval.metrics.classification import checked, log_losses, metrics_of_confusion

logger = logging.getLogger("dinov2")

ENDS = [0.025, 0.975]  # of a 95 % interval
N_RESAMPLES = 1000


def bootstrap_intervals(
    labels: np.ndarray,
    predictions: np.ndarray,
    n_classes: int,
    probabilities: np.ndarray | None = None,
    patients: Sequence[str] | None = None,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Return the 95 % percentile interval of each metric that some draw defines, {metric: [lower, upper]}.

    A class that a draw does not contain is left out of that draw's averages. The calibration error gets no interval:
    each draw is less calibrated than the whole set, and percentiles would lie above the truth. There are no intervals
    if all samples are of one patient, because they say nothing about other patients.

    Args:
        labels, predictions: [N] integers, 0 to C - 1.
        probabilities: [N, C]; adds `auroc` and `log_loss`.
        patients: N ids, to draw patients instead of samples.
    """
    metrics_of = WeightedMetrics(labels, predictions, n_classes, probabilities)
    return intervals_of(metrics_of, len(labels), patients, n_resamples, seed)


def intervals_of(
    metrics_of: Callable[[np.ndarray], dict[str, float]],
    n_samples: int,
    patients: Sequence[str] | None = None,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Return the 95 % percentile interval of any metrics; `metrics_of` takes the weights of a draw, int64 [N].

    It returns NaN where a draw leaves a metric undefined; metrics that no draw defines get no interval.
    """
    draws = _draws(metrics_of, patients, n_samples, n_resamples, seed).dropna(axis="columns", how="all")
    return draws.quantile(ENDS).to_dict("list")


def compare_paired(
    labels: np.ndarray,
    predictions_a: np.ndarray,
    predictions_b: np.ndarray,
    n_classes: int,
    patients: Sequence[str] | None = None,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Test whether two methods differ, beyond chance, on the same samples.

    McNemar's exact test asks whether the samples that only one method gets right are split evenly; it assumes that
    samples are independent, which cells of one patient are not. The paired bootstrap asks the same of each metric, by
    patient if patients are known; its two-sided p-value is never 0, because the samples themselves count as a draw.

    Returns:
        `mcnemar` ({only_a_right, only_b_right, p_value}) and `differences` ({metric: {a, b, difference, interval,
        p_value}}, where `difference` is b - a). Interval and p-value are None if all samples are of one patient.
    """
    metrics_a, metrics_b = (WeightedMetrics(labels, each, n_classes) for each in (predictions_a, predictions_b))

    def differences_of(weights: np.ndarray) -> dict[str, float]:
        of_a, of_b = metrics_a(weights), metrics_b(weights)
        return {name: of_b[name] - of_a[name] for name in of_a}

    everything = np.ones(len(labels), dtype=np.int64)
    values = pd.DataFrame(
        {"a": metrics_a(everything), "b": metrics_b(everything), "difference": differences_of(everything)}
    )
    draws = _draws(differences_of, patients, len(labels), n_resamples, seed).dropna(axis="columns", how="all")
    differences: dict[str, dict[str, Any]] = {}
    for name, row in values.iterrows():
        is_known = name in draws
        differences[str(name)] = {
            **{key: None if np.isnan(value) else float(value) for key, value in row.items()},
            "interval": draws[name].quantile(ENDS).tolist() if is_known else None,
            "p_value": _p_value(draws[name].to_numpy()) if is_known else None,
        }
    is_right_a, is_right_b = predictions_a == labels, predictions_b == labels
    only_a, only_b = int((is_right_a & ~is_right_b).sum()), int((is_right_b & ~is_right_a).sum())
    p_value = float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    mcnemar = {"only_a_right": only_a, "only_b_right": only_b, "p_value": p_value}
    return {"mcnemar": mcnemar, "differences": differences}


class WeightedMetrics:
    """Metrics of samples that each count as often as their weight says."""

    def __init__(
        self, labels: np.ndarray, predictions: np.ndarray, n_classes: int, probabilities: np.ndarray | None = None
    ) -> None:
        labels, predictions, probabilities = checked(labels, predictions, n_classes, probabilities)
        self.entries, self.n_classes = labels * n_classes + predictions, n_classes
        self.ranks: list[tuple[np.ndarray, ...]] = []
        self.losses: np.ndarray | None = None
        if probabilities is not None:
            self.ranks = [_ranks(labels == c, probabilities[:, c]) for c in np.unique(labels)]
            self.losses = log_losses(labels, probabilities)

    def __call__(self, weights: np.ndarray) -> dict[str, float]:
        """Compute the metrics for weights, int64 [N]; NaN where undefined."""
        counts = np.bincount(self.entries, weights, minlength=self.n_classes**2)
        metrics = metrics_of_confusion(counts.reshape(self.n_classes, self.n_classes))
        if self.losses is not None:
            areas = []
            for positives, negatives, n_below, n_not_above in self.ranks:
                cumulative = np.concatenate([[0], np.cumsum(weights[negatives])])
                if pairs := weights[positives].sum() * cumulative[-1]:
                    # a positive wins against the negatives with lower scores, and half against those with equal ones
                    wins = (cumulative[n_below] + cumulative[n_not_above]) / 2
                    areas.append(weights[positives] @ wins / pairs)
            metrics["auroc"] = float(np.mean(areas)) if areas else np.nan
            metrics["log_loss"] = float(self.losses @ weights / weights.sum())
        return metrics


def _ranks(is_positive: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return positives, sorted negatives, and how many negatives are below, and not above, each positive."""
    positives, negatives = np.flatnonzero(is_positive), np.flatnonzero(~is_positive)
    negatives = negatives[np.argsort(scores[negatives])]
    n_below, n_not_above = (np.searchsorted(scores[negatives], scores[positives], side) for side in ("left", "right"))
    return positives, negatives, n_below, n_not_above


def _draws(
    metrics_of: Callable[[np.ndarray], dict[str, float]],
    patients: Sequence[str] | None,
    n_samples: int,
    n_resamples: int,
    seed: int,
) -> pd.DataFrame:
    """Return the metrics of R draws of patients, a column each; nothing if there is only one patient."""
    if patients is not None and len(patients) != n_samples:
        raise ValueError(f"{len(patients)} patients for {n_samples} samples: expected one each")
    numbers = np.arange(n_samples) if patients is None else pd.factorize(np.asarray(patients, dtype=object))[0]
    n_patients = int(numbers.max()) + 1
    if n_patients == 1:
        logger.warning("no intervals: all %d samples are of one patient", n_samples)
        return pd.DataFrame()
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(n_resamples):
        counts = np.bincount(rng.integers(n_patients, size=n_patients), minlength=n_patients)
        drawn.append(metrics_of(counts[numbers]))
    return pd.DataFrame(drawn)


def _p_value(differences: np.ndarray) -> float:
    """Return twice the smaller share of draws on one side of 0; the samples themselves count as one more draw."""
    n_draws = int((~np.isnan(differences)).sum())
    fewer = int(min((differences <= 0).sum(), (differences >= 0).sum()))
    return min(1.0, 2 * (fewer + 1) / (n_draws + 1))
