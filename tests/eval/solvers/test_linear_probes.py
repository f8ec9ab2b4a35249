"""Linear probes: the optimum of scikit-learn's objective, and DINOv2's sweep by hand and by torch's optimizer."""

from functools import partial

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from dinov2.eval.solvers.linear_probes import MAX_ITER, choose_sgd_probe, fit_logistic, fit_sgd_probes


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


def draw_separable(n=240, dim=6, n_classes=3, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, n_classes, n)
    return (rng.normal(size=(n, dim)) + 2 * np.eye(n_classes, dim)[labels]).astype(np.float32), labels


def test_training_is_sgd_with_momentum_and_a_cosine():
    """All cells in each batch, so that torch's own optimizer and schedule can be run beside it."""
    features, labels = draw_separable(n=40)
    n_iterations, rate = 30, 0.4
    (start,) = fit_sgd_probes({"x": features}, labels, 3, (1e-12,), 1, batch_size=40, seed=7).values()
    layer = torch.nn.Linear(6, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(start.weights))
        layer.bias.copy_(torch.from_numpy(start.bias))
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate * 40 / 256, momentum=0.9, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_iterations, eta_min=0)
    for _ in range(n_iterations):
        loss = torch.nn.functional.cross_entropy(layer(torch.from_numpy(features)), torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    (ours,) = fit_sgd_probes({"x": features}, labels, 3, (rate,), n_iterations, batch_size=40, seed=7).values()
    np.testing.assert_allclose(ours.weights, layer.weight.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(ours.bias, layer.bias.detach().numpy(), atol=1e-5)
    assert np.abs(start.weights).max() < 0.05
    assert start.weights.std() == pytest.approx(0.01, rel=0.5)


def test_rates_and_kinds_do_not_disturb_each_other():
    features, labels = draw_separable()
    run = partial(fit_sgd_probes, labels=labels, n_classes=3, n_iterations=20, seed=1)
    both = run({"x": features, "y": features[:, :4]}, learning_rates=(0.01, 0.1))
    assert list(both) == [("x", 0.01), ("x", 0.1), ("y", 0.01), ("y", 0.1)]
    (alone,) = run({"x": features}, learning_rates=(0.1,)).values()
    np.testing.assert_allclose(alone.weights, both["x", 0.1].weights, atol=1e-6)
    again = run({"x": features}, learning_rates=(0.1,))["x", 0.1]
    np.testing.assert_array_equal(again.weights, alone.weights)
    other = fit_sgd_probes({"x": features}, labels, 3, (0.1,), 20, seed=2)["x", 0.1]
    assert not np.array_equal(other.weights, alone.weights)


def test_the_global_random_state_is_left_alone():
    before = torch.random.get_rng_state()
    fit_sgd_probes({"x": draw_separable()[0]}, draw_separable()[1], 3, (0.1,), 5)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_is_best_on_validation_cells_is_chosen():
    features, labels = draw_separable()
    noise = np.random.default_rng(5).normal(size=features.shape).astype(np.float32)
    fold = np.arange(160), np.arange(160, 200)
    fit = partial(fit_sgd_probes, n_classes=3, learning_rates=(1e-9, 0.1), n_iterations=100)
    kinds = {"noise": noise, "features": features}
    kind, rate, accuracy = choose_sgd_probe(kinds, labels, fold, fit)
    assert (kind, rate) == ("features", 0.1)
    assert accuracy > 0.7
    others = {name: x.copy() for name, x in kinds.items()}
    for x in others.values():
        x[200:] = np.nan  # neither fitted nor validated on: not looked at
    assert choose_sgd_probe(others, labels, fold, fit) == (kind, rate, accuracy)


def test_rates_that_diverge_are_not_chosen():
    features, labels = draw_separable()
    fold = np.arange(160), np.arange(160, 240)
    fit = partial(fit_sgd_probes, n_classes=3, n_iterations=20)
    assert not fit({"x": features * 1e20}, labels, learning_rates=(1e20,))["x", 1e20].has_converged
    assert choose_sgd_probe({"x": features}, labels, fold, partial(fit, learning_rates=(1e38, 0.1)))[1] == 0.1
    with pytest.raises(ValueError, match="all learning rates led to infinite weights"):
        choose_sgd_probe({"x": features * 1e20}, labels, fold, partial(fit, learning_rates=(1e20,)))
