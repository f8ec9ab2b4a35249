"""Risk over coverage as a plain loop has it, and thresholds that are chosen and measured on different cells."""

import numpy as np
import pytest

from dinov2.eval.metrics.selective import (
    area_under_risk,
    choose_threshold,
    draw_half,
    risk_coverage,
    selective_metrics,
)


def draw(n=400, seed=0):
    """Cells with confidences on a grid, so that many are equal, and errors that are rarer where confidence is high."""
    rng = np.random.default_rng(seed)
    confidence = rng.uniform(0.3, 1, n).round(2)
    return rng.random(n) > confidence, confidence


def test_the_curve_is_that_of_a_plain_loop():
    is_wrong, confidence = draw()
    coverage, risk, thresholds = risk_coverage(is_wrong, confidence)
    area = 0.0
    before = 0.0
    for i, threshold in enumerate(sorted(set(confidence), reverse=True)):
        accepted = [wrong for wrong, sure in zip(is_wrong, confidence, strict=True) if sure >= threshold]
        assert thresholds[i] == threshold
        assert coverage[i] == pytest.approx(len(accepted) / len(is_wrong))
        assert risk[i] == pytest.approx(sum(accepted) / len(accepted))
        area += risk[i] * (coverage[i] - before)
        before = coverage[i]
    assert area_under_risk(coverage, risk) == pytest.approx(area)
    assert risk[-1] == is_wrong.mean()


def test_weights_count_a_cell_as_often_as_they_say():
    is_wrong, confidence = draw(n=30)
    weights = np.random.default_rng(1).integers(0, 3, 30)
    weights[confidence.argmax()] = 0
    for ours, expected in zip(
        risk_coverage(is_wrong, confidence, weights),
        risk_coverage(np.repeat(is_wrong, weights), np.repeat(confidence, weights)),
        strict=True,
    ):
        np.testing.assert_allclose(ours, expected)


def test_the_threshold_has_the_largest_coverage_with_the_wanted_error():
    is_wrong, confidence = draw()
    threshold = choose_threshold(is_wrong, confidence, 0.1)
    assert is_wrong[confidence >= threshold].mean() <= 0.1
    lower = [sure for sure in set(confidence) if sure < threshold]
    assert lower
    assert all(is_wrong[confidence >= sure].mean() > 0.1 for sure in lower)
    assert choose_threshold(np.ones(3, bool), np.array([0.5, 0.6, 0.7]), 0.1) is None


def test_halves_share_no_patient():
    patients = [f"p{i % 7}" for i in range(50)]
    first = draw_half(50, patients, seed=3)
    of_first, of_second = ({patients[i] for i in np.flatnonzero(side)} for side in (first, ~first))
    assert (len(of_first), len(of_second)) == (4, 3)
    assert not of_first & of_second
    assert draw_half(50, None, seed=3).sum() == 25
    assert not np.array_equal(draw_half(50, None, 3), draw_half(50, None, 4))


def test_the_threshold_is_measured_on_cells_that_did_not_choose_it():
    is_wrong, confidence = draw()
    metrics = selective_metrics(is_wrong, confidence, 0.1, seed=5)
    first, chosen = draw_half(400, None, 5), metrics["threshold"]
    assert chosen["confidence"] == choose_threshold(is_wrong[first], confidence[first], 0.1)
    accepted = confidence[~first] >= chosen["confidence"]
    assert chosen["coverage"] == pytest.approx(accepted.mean())
    assert chosen["error"] == pytest.approx(is_wrong[~first][accepted].mean())
    low, high = chosen["intervals"]["error"]
    assert low <= chosen["error"] <= high
    low, high = metrics["intervals"]["area"]
    assert low <= metrics["area"] <= high
    assert metrics["lowest_area"] < metrics["area"] < metrics["error"]
    assert metrics["curve"]["error"][-1] == metrics["error"] == is_wrong.mean()


def test_what_cannot_be_measured_is_none():
    is_wrong, confidence = draw(n=40)
    hopeless = selective_metrics(np.ones(40, bool), confidence, 0.05)["threshold"]
    assert hopeless["confidence"] is None
    assert hopeless["error"] is None
    assert hopeless["coverage"] == 0
    one_patient = selective_metrics(is_wrong, confidence, 0.9, ["p"] * 40)["threshold"]
    assert one_patient["confidence"] is not None
    assert one_patient["error"] is None
    assert one_patient["coverage"] is None
