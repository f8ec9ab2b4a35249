"""Selective classification: the error among the cells that a method is surest of.

A cell is accepted if its confidence, the probability of the predicted class, reaches a threshold. Coverage is the share
of accepted cells, and risk is the error among them (Geifman & El-Yaniv 2017, arXiv 1705.08500).

Letters: N cells, T distinct confidences
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dinov2.eval.metrics.intervals import intervals_of

N_POINTS = 101  # of a curve in results.json


def risk_coverage(
    is_wrong: np.ndarray, confidence: np.ndarray, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return coverage, risk and threshold, float64 [T] each, for every threshold from the highest confidence down.

    Cells of equal confidence are accepted together. `weights` [N] say how often each cell counts.
    """
    weights = np.ones(len(confidence)) if weights is None else weights.astype(np.float64)
    order = np.argsort(-confidence, kind="stable")
    order = order[weights[order] > 0]
    thresholds, weights = confidence[order], weights[order]
    is_last = np.append(thresholds[1:] != thresholds[:-1], True)  # of the cells of equal confidence
    accepted, wrong = np.cumsum(weights)[is_last], np.cumsum(weights * is_wrong[order])[is_last]
    return accepted / accepted[-1], wrong / accepted, thresholds[is_last]


def area_under_risk(coverage: np.ndarray, risk: np.ndarray) -> float:
    """Return the mean risk over all coverages (AURC): a step at each threshold; 0 is best."""
    return float((risk * np.diff(coverage, prepend=0)).sum())


def choose_threshold(is_wrong: np.ndarray, confidence: np.ndarray, wanted_error: float) -> float | None:
    """Return the threshold of the largest coverage whose risk is at most `wanted_error`; None if no threshold is."""
    _, risk, thresholds = risk_coverage(is_wrong, confidence)
    good = np.flatnonzero(risk <= wanted_error)
    return float(thresholds[good[-1]]) if len(good) else None


def draw_half(n: int, patients: Sequence[str] | None, seed: int) -> np.ndarray:
    """Draw one half of the patients, or of the N cells without patients; return where it is, bool [N].

    The cells of a single patient are all in this half.
    """
    numbers = np.arange(n) if patients is None else np.unique(np.asarray(patients), return_inverse=True)[1]
    drawn = np.random.default_rng(seed).permutation(numbers.max() + 1)
    return np.isin(numbers, drawn[: -(-len(drawn) // 2)])


def selective_metrics(
    is_wrong: np.ndarray,
    confidence: np.ndarray,
    wanted_error: float,
    patients: Sequence[str] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure risk over coverage, and a threshold for a wanted error that is chosen and measured on different cells.

    Args:
        is_wrong, confidence: [N], of predictions that did not learn from their cell.
        wanted_error: highest error among accepted cells, 0-1.
        patients: N ids; the two halves then share no patient.

    Returns:
        `error` of all cells, `area` (`area_under_risk`), `lowest_area` (of the same errors in the best order),
        `intervals` of error and area, `curve` (coverage and error), and `threshold`: `wanted_error`, `confidence` (None
        if none reaches the error on the first half), and `coverage`, `error`, `intervals` on the second half (None if
        there is none, or no cell of it is accepted).
    """
    coverage, risk, _ = risk_coverage(is_wrong, confidence)

    def of_draw(weights: np.ndarray) -> dict[str, float]:
        drawn_coverage, drawn_risk, _ = risk_coverage(is_wrong, confidence, weights)
        return {"error": float(drawn_risk[-1]), "area": area_under_risk(drawn_coverage, drawn_risk)}

    points = np.unique(np.linspace(0, len(coverage) - 1, N_POINTS).astype(int))
    first = draw_half(len(is_wrong), patients, seed)
    chosen = choose_threshold(is_wrong[first], confidence[first], wanted_error)
    return {
        "error": float(risk[-1]),
        "area": area_under_risk(coverage, risk),
        "lowest_area": _lowest_area(is_wrong),
        "intervals": intervals_of(of_draw, len(is_wrong), patients, seed=seed),
        "curve": {"coverage": coverage[points].tolist(), "error": risk[points].tolist()},
        "threshold": {
            "wanted_error": wanted_error,
            "confidence": chosen,
            **_measured(is_wrong[~first], confidence[~first], chosen, _of(patients, ~first), seed),
        },
    }


def _lowest_area(is_wrong: np.ndarray) -> float:
    """Return the area if all right cells came before all wrong ones, each with a confidence of its own."""
    wrong = np.sort(is_wrong)
    return area_under_risk(*risk_coverage(wrong, -np.arange(len(wrong), dtype=np.float64))[:2])


def _of(patients: Sequence[str] | None, is_chosen: np.ndarray) -> list[str] | None:
    return None if patients is None else [patients[i] for i in np.flatnonzero(is_chosen).tolist()]


def _measured(
    is_wrong: np.ndarray, confidence: np.ndarray, threshold: float | None, patients: Sequence[str] | None, seed: int
) -> dict[str, Any]:
    """Return coverage and error of a threshold, with intervals."""
    accepted = np.zeros(len(is_wrong), bool) if threshold is None else confidence >= threshold
    if not accepted.any():
        return {"coverage": 0.0 if len(is_wrong) else None, "error": None, "intervals": {}}

    def of_draw(weights: np.ndarray) -> dict[str, float]:
        n = weights[accepted].sum()
        return {"coverage": n / weights.sum(), "error": weights[accepted & is_wrong].sum() / n if n else np.nan}

    metrics = {name: float(value) for name, value in of_draw(np.ones(len(is_wrong))).items()}
    return {**metrics, "intervals": intervals_of(of_draw, len(is_wrong), patients, seed=seed)}
