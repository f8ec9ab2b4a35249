"""The optimum of scikit-learn's objective, however the features lie and however little the penalty holds."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from dinov2.eval.solvers.logistic import MAX_ITER, fit_logistic


def draw(n_samples, dim, n_classes, offset=0.0, apart=1.0, seed=0):
    """Correlated features, a large common offset if asked for, classes of very different sizes."""
    rng = np.random.default_rng(seed)
    labels = np.minimum(rng.integers(0, n_classes, n_samples), rng.integers(0, n_classes, n_samples))
    labels[:n_classes] = np.arange(n_classes)
    axes = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    centres = apart * rng.normal(size=(n_classes, dim))
    scales = (1.0 + np.arange(dim)) ** -1
    features = ((rng.normal(size=(n_samples, dim)) + centres[labels]) * scales) @ axes + offset
    return features.astype(np.float32), labels


@pytest.mark.parametrize(
    ("n_samples", "dim", "n_classes", "offset", "apart"),
    [
        (400, 20, 5, 0.0, 0.3),  # classes overlap
        (400, 20, 5, 100.0, 0.3),  # with an offset that takes digits
        (300, 15, 4, 0.0, 5.0),  # separable: the penalty alone bounds the weights
        (300, 20, 2, 0.0, 0.5),  # two classes have one weight vector
        (12, 40, 3, 0.0, 1.0),  # fewer samples than dimensions
    ],
)
def test_probabilities_are_those_of_scikit_learns_optimum(n_samples, dim, n_classes, offset, apart):
    features, labels = draw(n_samples, dim, n_classes, offset, apart)
    others = draw(200, dim, n_classes, offset, apart, seed=1)[0]
    lams = (100 / (dim * n_classes), 30.0, 1e-3)
    for lam, ours in zip(lams, fit_logistic(features, labels, n_classes, lams), strict=True):
        exact = LogisticRegression(C=1 / lam, tol=1e-10, max_iter=500, solver="newton-cholesky")
        centred = features.astype(np.float64) - offset  # the intercept is free: an offset changes no probability
        expected = exact.fit(centred, labels).predict_proba(others.astype(np.float64) - offset)
        assert ours.has_converged
        np.testing.assert_allclose(ours.predict_proba(others), expected, rtol=0, atol=2e-4)


def test_features_that_are_all_equal_leave_the_shares_of_the_classes():
    labels = np.repeat([0, 1, 2], [6, 3, 1])
    (ours,) = fit_logistic(np.ones((10, 4), np.float32), labels, 3, (1.0,))
    np.testing.assert_allclose(ours.predict_proba(np.ones((1, 4))), [[0.6, 0.3, 0.1]], atol=1e-4)
    assert np.abs(ours.weights).max() < 1e-6


def test_equal_inputs_give_equal_bits():
    features, labels = draw(300, 20, 4)
    first, second = (fit_logistic(features, labels, 4, (0.1, 1.0)) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.weights, other.weights)
        np.testing.assert_array_equal(one.bias, other.bias)


def test_a_fit_that_stops_early_is_reported(monkeypatch, caplog):
    features, labels = draw(300, 20, 4)
    monkeypatch.setitem(MAX_ITER, "torch", 3)
    (probe,) = fit_logistic(features, labels, 4, (0.1,))
    assert not probe.has_converged
    assert "lambda 0.1: not converged in 3 iterations" in caplog.text


@pytest.mark.gpu
def test_a_gpu_finds_the_same_optimum():
    features, labels = draw(400, 20, 5)
    (here,), (there,) = (fit_logistic(features, labels, 5, (1.0,), device) for device in ("cpu", "cuda"))
    np.testing.assert_allclose(there.predict_proba(features), here.predict_proba(features), rtol=0, atol=1e-4)
