"""DINOv2's sweep: its update rule by hand and by torch's optimizer, its choice on validation cells alone."""

from functools import partial

import numpy as np
import pytest
import torch

from dinov2.eval.solvers.sgd_probes import choose_sgd_probe, fit_sgd_probes


def draw(n=240, dim=6, n_classes=3, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, n_classes, n)
    return (rng.normal(size=(n, dim)) + 2 * np.eye(n_classes, dim)[labels]).astype(np.float32), labels


def test_training_is_sgd_with_momentum_and_a_cosine():
    """All cells in each batch, so that torch's own optimizer and schedule can be run beside it."""
    features, labels = draw(n=40)
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
    features, labels = draw()
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
    fit_sgd_probes({"x": draw()[0]}, draw()[1], 3, (0.1,), 5)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_is_best_on_validation_cells_is_chosen():
    features, labels = draw()
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
    features, labels = draw()
    fold = np.arange(160), np.arange(160, 240)
    fit = partial(fit_sgd_probes, n_classes=3, n_iterations=20)
    assert not fit({"x": features * 1e20}, labels, learning_rates=(1e20,))["x", 1e20].has_converged
    assert choose_sgd_probe({"x": features}, labels, fold, partial(fit, learning_rates=(1e38, 0.1)))[1] == 0.1
    with pytest.raises(ValueError, match="all learning rates led to infinite weights"):
        choose_sgd_probe({"x": features * 1e20}, labels, fold, partial(fit, learning_rates=(1e20,)))
