"""The optimum of scikit-learn's objective, however the features lie and however little the penalty holds."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from dinov2.eval.linear_solver import LinearProbe, LogisticProblem


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


def probe(problem, lam):
    found = problem.solve(lam)
    return LinearProbe(found.weights.numpy(), found.bias.numpy(), found.n_iterations, found.has_converged)


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
    problem = LogisticProblem(torch.from_numpy(features), torch.from_numpy(labels), n_classes)
    for lam in (100 / (dim * n_classes), 30.0, 1e-3):
        ours = probe(problem, lam)
        exact = LogisticRegression(C=1 / lam, tol=1e-10, max_iter=500, solver="newton-cholesky")
        centred = features.astype(np.float64) - offset  # the intercept is free: an offset changes no probability
        expected = exact.fit(centred, labels).predict_proba(others.astype(np.float64) - offset)
        assert ours.has_converged
        np.testing.assert_allclose(ours.predict_proba(others), expected, rtol=0, atol=2e-4)


def test_features_that_are_all_equal_leave_the_shares_of_the_classes():
    labels = np.repeat([0, 1, 2], [6, 3, 1])
    ours = probe(LogisticProblem(torch.ones(10, 4), torch.from_numpy(labels), 3), 1.0)
    np.testing.assert_allclose(ours.predict_proba(np.ones((1, 4))), [[0.6, 0.3, 0.1]], atol=1e-4)
    assert np.abs(ours.weights).max() < 1e-9


def test_a_neighbours_solution_is_a_start_and_changes_no_result():
    features, labels = draw(300, 20, 4)
    problem = LogisticProblem(torch.from_numpy(features), torch.from_numpy(labels), 4)
    cold, near = problem.solve(1.0), problem.solve(1.1)
    warm = problem.solve(1.0, start=near.rotated)
    assert warm.n_iterations < cold.n_iterations
    torch.testing.assert_close(warm.weights, cold.weights, rtol=0, atol=1e-4)
    assert problem.solve(1.0, start=cold.rotated).n_iterations <= 1


def test_equal_inputs_give_equal_bits_and_threads_are_as_before():
    features, labels = draw(300, 20, 4)
    n_threads = torch.get_num_threads()
    first, second = (
        LogisticProblem(torch.from_numpy(features), torch.from_numpy(labels), 4).solve(0.1) for _ in range(2)
    )
    assert torch.equal(first.weights, second.weights)
    assert torch.equal(first.bias, second.bias)
    assert torch.get_num_threads() == n_threads


@pytest.mark.gpu
def test_a_gpu_finds_the_same_optimum():
    features, labels = (torch.from_numpy(x) for x in draw(400, 20, 5))
    here = LogisticProblem(features, labels, 5).solve(1.0)
    there = LogisticProblem(features.to("cuda"), labels.to("cuda"), 5).solve(1.0)
    torch.testing.assert_close(there.weights.cpu(), here.weights, rtol=0, atol=1e-4)
