"""Corrections for another hospital: temperatures that are known, statistics that class shares do not move."""

import numpy as np
import pytest
from scipy.special import softmax

from dinov2.eval.metrics.corrections import (
    TEMPERATURES,
    class_balanced_statistics,
    fit_temperature,
    standardise,
    statistics,
)


def drawn(temperature, n=20_000, n_classes=4):
    """Logits, and labels that are drawn with the probabilities of the logits divided by a temperature."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(n, n_classes)) * 4
    cumulative = softmax(logits / temperature, axis=1).cumsum(axis=1)
    return logits, (rng.random((n, 1)) > cumulative).sum(axis=1).clip(max=n_classes - 1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_a_known_temperature_is_recovered(temperature):
    logits, labels = drawn(temperature)
    assert fit_temperature(logits, labels) == pytest.approx(temperature, rel=0.05)
    assert fit_temperature(logits * 2, labels) == pytest.approx(2 * fit_temperature(logits, labels), rel=1e-4)


def test_temperatures_stay_in_their_range():
    logits = np.eye(3)
    assert fit_temperature(logits, np.arange(3)) == pytest.approx(TEMPERATURES[0], rel=1e-3)  # all right
    assert fit_temperature(logits, np.array([1, 2, 0])) == pytest.approx(TEMPERATURES[1], rel=1e-3)  # all wrong


def test_a_class_that_cannot_be_predicted_does_not_count():
    logits, labels = drawn(3.0, n=2000)
    with_unknown = np.concatenate([logits, np.full((len(logits), 1), -np.inf)], axis=1)
    some = np.where(np.arange(len(labels)) < 100, 4, labels)
    assert fit_temperature(with_unknown, some) == pytest.approx(fit_temperature(logits[100:], labels[100:]), rel=1e-4)
    assert fit_temperature(with_unknown, np.full(len(labels), 4)) == 1.0


def test_class_balanced_statistics_by_hand():
    features = np.array([[0.0, 7.0], [2.0, 7.0], [10.0, 7.0], [10.0, 7.0], [10.0, 7.0], [10.0, 7.0]], dtype=np.float32)
    mean, deviation = class_balanced_statistics(features, np.array([3, 3, 0, 0, 0, 0]))
    np.testing.assert_allclose(mean, [5.5, 7.0])  # of the classes' means 1 and 10, not of the cells
    np.testing.assert_allclose(deviation, [np.sqrt(2 / 6), 1.0])
    mean, deviation = statistics(features)
    np.testing.assert_allclose(mean, [7.0, 7.0])
    np.testing.assert_allclose(deviation, [features[:, 0].std(), 1.0])
    np.testing.assert_allclose(standardise(features, mean, deviation)[0], [-7 / features[:, 0].std(), 0.0])


def test_shares_of_classes_do_not_move_class_balanced_statistics():
    rng = np.random.default_rng(0)
    centres = 6 * np.eye(3)

    def of(*counts):
        labels = np.repeat(np.arange(3), counts)
        return class_balanced_statistics(centres[labels] + rng.normal(size=(len(labels), 3)), labels)

    for even, skewed in zip(of(3000, 3000, 3000), of(8000, 1000, 1000), strict=True):
        np.testing.assert_allclose(even, skewed, atol=0.1)
