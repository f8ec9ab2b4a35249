"""How sure a number is: bootstrap intervals of metrics, and paired tests of two methods on the same cells.

The bootstrap draws as many samples as there are, with replacement, and takes percentiles of what each draw gives (Efron
1979). Where patients are known it draws patients with all their cells, because cells of one patient resemble each
other: by cell, intervals would come out too narrow. Metrics that count answers need only the counts of each draw, so
that a draw of N samples is one multinomial draw over the distinct answers.

Dimension key:  N samples, C classes, R resamples, U distinct answers, P patients
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dinov2.eval.metrics import check_answers, check_probabilities, log_losses

logger = logging.getLogger("dinov2")

LEVEL = 0.95
N_RESAMPLES = 1000
WEIGHTS_PER_CHUNK = 1 << 22  # resamples x samples at a time: 32 MiB of int64, and some copies


def bootstrap_intervals(
    labels: np.ndarray,
    predictions: np.ndarray,
    n_classes: int,
    probabilities: np.ndarray | None = None,
    patients: Sequence[str] | None = None,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> dict[str, list[float]]:
    """95 % percentile intervals of the metrics of `metrics.classification_metrics`.

    A class that a draw happens to miss counts in that draw's averages as it would in a set without it. The calibration
    error gets no interval: each draw is less calibrated than the whole set, and percentiles would lie above the truth.

    Args:
        labels: [N] integers, 0 to C - 1.
        predictions: [N] integers, likewise.
        n_classes: C.
        probabilities: [N, C]; adds `auroc` and `log_loss`.
        patients: N patient ids, to draw patients instead of samples.
        n_resamples: R.
        seed: of the draws.

    Returns:
        {metric: [lower, upper]}, for `accuracy`, `balanced_accuracy`, `weighted_f1`, `macro_f1` and `kappa` and, with
        probabilities, `auroc` and `log_loss`; without a metric that is undefined in every draw. Empty where all samples
        are of one patient, from whom nothing can be said about others.

    Raises:
        ValueError: if labels, predictions, probabilities or patients do not fit together.
    """
    labels, predictions = check_answers(labels, predictions, n_classes)
    groups = _groups(patients, len(labels))
    if groups is not None and groups.max() == 0:
        logger.warning("no intervals: all %d samples are of one patient", len(labels))
        return {}
    counting, scoring = (np.random.default_rng([seed, stream]) for stream in range(2))
    answers, counts = _draw_answers(np.stack([labels, predictions], axis=1), groups, n_resamples, counting)
    draws = metrics_of_confusions(_confusions(answers[:, 0], answers[:, 1], counts, n_classes))
    if probabilities is not None:
        probabilities = check_probabilities(probabilities, len(labels), n_classes)
        draws |= _score_draws(labels, probabilities, groups, n_resamples, scoring)
    return {name: _interval(values) for name, values in draws.items() if not np.isnan(values).all()}


def compare_paired(
    labels: np.ndarray,
    predictions_a: np.ndarray,
    predictions_b: np.ndarray,
    n_classes: int,
    patients: Sequence[str] | None = None,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Do two methods differ, beyond chance, on the same samples?

    McNemar's exact test asks whether the samples that one method alone gets right are split evenly; it takes samples
    for independent, which cells of one patient are not. The paired bootstrap asks the same of each metric, by patient
    where patients are known; its p-value is twice the smaller share of draws on one side of no difference.

    Args:
        labels: [N] integers, 0 to C - 1.
        predictions_a, predictions_b: [N] integers, likewise.
        n_classes: C.
        patients, n_resamples, seed: as for `bootstrap_intervals`.

    Returns:
        `mcnemar` ({only_a_right, only_b_right, p_value}) and `differences` ({metric: {a, b, difference, interval,
        p_value}}, where `difference` is b - a). Interval and p-value are None where all samples are of one patient.

    Raises:
        ValueError: as `bootstrap_intervals`.
    """
    labels, predictions_a = check_answers(labels, predictions_a, n_classes)
    _, predictions_b = check_answers(labels, predictions_b, n_classes)
    groups = _groups(patients, len(labels))
    is_known = groups is None or groups.max() > 0
    triples = np.stack([labels, predictions_a, predictions_b], axis=1)  # [N, 3]
    answers, counts = _draw_answers(triples, groups, n_resamples, np.random.default_rng([seed, 0]))
    ones = np.ones((1, len(labels)), dtype=np.int64)
    found, draws = (
        [metrics_of_confusions(_confusions(rows[:, 0], rows[:, column], weights, n_classes)) for column in (1, 2)]
        for rows, weights in ((triples, ones), (answers, counts))
    )
    differences = {}
    for name in found[0]:
        (a,), (b,) = (metrics[name].tolist() for metrics in found)
        drawn = draws[1][name] - draws[0][name]
        has_draws = is_known and not np.isnan(drawn).all()
        differences[name] = {
            "a": None if np.isnan(a) else a,
            "b": None if np.isnan(b) else b,
            "difference": None if np.isnan(b - a) else b - a,
            "interval": _interval(drawn) if has_draws else None,
            "p_value": _share_beyond_zero(drawn[~np.isnan(drawn)]) if has_draws else None,
        }
    is_right_a, is_right_b = predictions_a == labels, predictions_b == labels
    only_a, only_b = int((is_right_a & ~is_right_b).sum()), int((is_right_b & ~is_right_a).sum())
    test = {"only_a_right": only_a, "only_b_right": only_b, "p_value": mcnemar_exact(only_a, only_b)}
    return {"mcnemar": test, "differences": differences}


def mcnemar_exact(only_a_right: int, only_b_right: int) -> float:
    """Two-sided p-value of McNemar's test from the two discordant counts: a fair coin's binomial tail, exactly."""
    n, fewer = only_a_right + only_b_right, min(only_a_right, only_b_right)
    term, tail = 1, 1
    for i in range(fewer):
        term = term * (n - i) // (i + 1)  # n over i + 1
        tail += term
    return min(1.0, 2 * tail / 2**n)


def metrics_of_confusions(confusions: np.ndarray) -> dict[str, np.ndarray]:
    """The metrics that count answers, defined as in `metrics.classification_metrics`, of many confusion matrices.

    Args:
        confusions: [R, C, C] counts; rows are labels, columns predictions. None is all zero.

    Returns:
        {metric: float64 [R]}; NaN where kappa is undefined.
    """
    confusions = confusions.astype(np.float64)
    right = np.diagonal(confusions, axis1=1, axis2=2)  # [R, C]
    support, predicted = confusions.sum(axis=2), confusions.sum(axis=1)  # [R, C]
    n = support.sum(axis=1)  # [R]
    accuracy = right.sum(axis=1) / n
    with np.errstate(invalid="ignore"):
        recall = right / support  # NaN without support
        f1 = 2 * right / (support + predicted)  # NaN for a class that does not occur
        by_chance = (support * predicted).sum(axis=1) / n**2
        kappa = np.where(by_chance < 1, (accuracy - by_chance) / (1 - by_chance), np.nan)
    return {
        "accuracy": accuracy,
        "balanced_accuracy": np.nanmean(recall, axis=1),
        "weighted_f1": (np.nan_to_num(f1) * support).sum(axis=1) / n,
        "macro_f1": np.nanmean(f1, axis=1),
        "kappa": kappa,
    }


def _groups(patients: Sequence[str] | None, n_samples: int) -> np.ndarray | None:
    """Which patient each sample is of: int64 [N], from 0; None where samples are drawn themselves."""
    if patients is None:
        return None
    if len(patients) != n_samples:
        raise ValueError(f"{len(patients)} patients for {n_samples} samples: expected one each")
    names, groups = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
    return groups if len(names) < n_samples or n_samples == 1 else None  # one sample each: no need of groups


def _draw_answers(
    rows: np.ndarray, groups: np.ndarray | None, n_resamples: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The distinct rows [U, columns] of what was answered, and how often each draw has them: int64 [R, U]."""
    answers, inverse, counts = np.unique(rows, axis=0, return_inverse=True, return_counts=True)
    if groups is None:
        return answers, rng.multinomial(len(rows), counts / len(rows), size=n_resamples)
    n_patients = int(groups.max()) + 1
    of_patient = np.zeros((n_patients, len(answers)))  # float64: its matrix product is fast, and exact up to 2^53
    np.add.at(of_patient, (groups, inverse.reshape(-1)), 1)
    drawn = rng.multinomial(n_patients, np.full(n_patients, 1 / n_patients), size=n_resamples)  # [R, P]
    return answers, (drawn @ of_patient).round().astype(np.int64)


def _confusions(labels: np.ndarray, predictions: np.ndarray, counts: np.ndarray, n_classes: int) -> np.ndarray:
    """Confusion matrices [R, C, C], given how often each of U answers occurs [R, U]."""
    cells = labels * n_classes + predictions  # [U]
    confusions = np.zeros((n_classes**2, len(counts)), dtype=np.int64)
    np.add.at(confusions, cells, counts.T)
    return confusions.T.reshape(-1, n_classes, n_classes)


def _score_draws(
    labels: np.ndarray,
    probabilities: np.ndarray,
    groups: np.ndarray | None,
    n_resamples: int,
    rng: np.random.Generator,
) -> dict[str, np.ndarray]:
    """`auroc` and `log_loss` of each draw: float64 [R]; NaN where a draw has one class only."""
    losses = log_losses(labels, probabilities)
    curves = [_Curve(labels == c, scores) for c, scores in enumerate(probabilities.T) if (labels == c).any()]
    auroc, log_loss = [], []
    for weights in _weights(len(labels), groups, n_resamples, rng):
        of_classes = np.stack([curve.auroc(weights) for curve in curves])  # [classes, r]
        is_known = ~np.isnan(of_classes)
        n_known = is_known.sum(axis=0)
        total = np.where(is_known, of_classes, 0).sum(axis=0)
        auroc.append(np.where(n_known > 0, total / np.maximum(n_known, 1), np.nan))
        log_loss.append(losses @ weights / weights.sum(axis=0))
    return {"auroc": np.concatenate(auroc), "log_loss": np.concatenate(log_loss)}


def _weights(
    n_samples: int, groups: np.ndarray | None, n_resamples: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """How often each draw has each sample: int32 [N, r], for some draws at a time."""
    n_units = n_samples if groups is None else int(groups.max()) + 1
    at_once = max(1, WEIGHTS_PER_CHUNK // n_samples)
    for start in range(0, n_resamples, at_once):
        n_draws = min(at_once, n_resamples - start)
        units = rng.integers(n_units, size=(n_draws, n_units)) + np.arange(n_draws)[:, None] * n_units
        drawn = np.bincount(units.ravel(), minlength=n_draws * n_units).reshape(n_draws, n_units).astype(np.int32)
        by_unit = np.ascontiguousarray(drawn.T)  # [units, r]: picking samples then copies whole rows
        yield by_unit if groups is None else by_unit[groups]


class _Curve:
    """One class against the rest, sorted once; the area under its curve for many weightings of the samples."""

    def __init__(self, is_of_class: np.ndarray, scores: np.ndarray) -> None:
        self.positives = np.flatnonzero(is_of_class)
        negatives = np.flatnonzero(~is_of_class)
        self.negatives = negatives[np.argsort(scores[negatives], kind="stable")]
        # each positive beats the negatives below it, and half of those level with it
        ranked = scores[self.negatives]
        self.below, self.not_above = (
            np.searchsorted(ranked, scores[self.positives], side) for side in ("left", "right")
        )

    def auroc(self, weights: np.ndarray) -> np.ndarray:
        """Of weights [N, r]: float64 [r], NaN where the positives or the negatives weigh nothing."""
        cumulative = np.zeros((len(self.negatives) + 1, weights.shape[1]), dtype=np.int32)
        np.cumsum(weights[self.negatives], axis=0, out=cumulative[1:])
        of_positives = weights[self.positives].astype(np.float64)  # [positives, r]
        beaten = cumulative[self.below] + cumulative[self.not_above]  # twice
        pairs = of_positives.sum(axis=0) * cumulative[-1]
        return np.einsum("pr,pr->r", of_positives, beaten) / 2 / np.where(pairs > 0, pairs, np.nan)


def _interval(draws: np.ndarray) -> list[float]:
    return np.nanquantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()


def _share_beyond_zero(differences: np.ndarray) -> float:
    """Two-sided; never 0, as the samples themselves count as one more draw."""
    n_draws = len(differences)
    fewer = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    return min(1.0, 2 * (fewer + 1) / (n_draws + 1))
