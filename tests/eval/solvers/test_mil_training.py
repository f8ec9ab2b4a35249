"""Training of an aggregator: schedule, steps, class weights, early stopping, and no traces elsewhere."""

import math

import numpy as np
import pytest
import torch

from dinov2.eval.solvers import mil_training
from dinov2.eval.solvers.mil_training import TrainingSettings, train_aggregator
from dinov2.models.abmil import MeanPoolMIL

QUICK = TrainingSettings(epochs=4, learning_rate=0.01)


def random_bags(n_patients=12, dim=5, n_classes=2, seed=0):
    rng = np.random.default_rng(seed)
    bags = [rng.normal(size=(rng.integers(2, 6), dim)).astype(np.float32) for _ in range(n_patients)]
    return bags, np.arange(n_patients) % n_classes


def hard_task():
    """Validation labels that contradict the training labels: the longer the training, the worse the validation loss."""
    bags, labels = random_bags(16)
    bags = [bag + np.float32(2 * label - 1) for bag, label in zip(bags, labels, strict=True)]
    labels = np.concatenate([labels[:12], 1 - labels[12:]])
    return [torch.from_numpy(bag) for bag in bags], labels, np.arange(12), np.arange(12, 16)


def test_the_weights_are_those_of_the_best_epoch_and_not_the_last():
    bags, labels, train, val = hard_task()
    settings = TrainingSettings(epochs=8, learning_rate=0.01)
    trained = train_aggregator(bags, labels, train, val, 2, settings=settings)
    losses = [epoch.val_loss for epoch in trained.history]
    assert trained.best_epoch == int(np.argmin(losses)) < len(losses) - 1
    assert losses[-1] > losses[trained.best_epoch] + 0.01
    with torch.no_grad():
        logits = torch.cat(
            [trained.network(bags[i][None], torch.ones(1, len(bags[i]), dtype=torch.bool))[0] for i in val]
        )
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels[val])).item()
    assert loss == pytest.approx(losses[trained.best_epoch], abs=1e-6)


def test_training_stops_when_patience_is_over():
    bags, labels, train, val = hard_task()
    settings = TrainingSettings(epochs=50, learning_rate=0.01, patience=3)
    trained = train_aggregator(bags, labels, train, val, 2, settings=settings)
    assert len(trained.history) == trained.best_epoch + 1 + 3


@pytest.mark.parametrize("n_train", [4, 10])
def test_the_schedule_steps_once_an_epoch_however_many_bags_there_are(n_train):
    bags, labels = random_bags(12)
    settings = TrainingSettings(epochs=6, learning_rate=0.004)
    tensors = [torch.from_numpy(bag) for bag in bags]
    history = train_aggregator(tensors, labels, np.arange(n_train), np.array([10, 11]), 2, "mean", settings).history
    cosine = [0.002 * (1 + math.cos(math.pi * epoch / 6)) for epoch in range(6)]
    assert [epoch.learning_rate for epoch in history] == pytest.approx(cosine)


def test_a_step_is_nesterovs_on_one_bag():
    """Two steps by hand: v <- 0.9 v + g, w <- w - lr (g + 0.9 v)."""
    bags, labels = random_bags(4)
    tensors = [torch.from_numpy(bag) for bag in bags]
    order = np.random.default_rng(5).permutation(np.array([0, 1]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        network = MeanPoolMIL(5, 2)
    velocity = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    for i in order:
        network.zero_grad()
        logits, _ = network(tensors[i][None], torch.ones(1, len(bags[i]), dtype=torch.bool))
        torch.nn.functional.cross_entropy(logits, torch.tensor(labels[[i]])).backward()
        with torch.no_grad():
            for name, p in network.named_parameters():
                velocity[name] = 0.9 * velocity[name] + p.grad
                p -= 1e-3 * (p.grad + 0.9 * velocity[name])
    settings = TrainingSettings(epochs=1)
    assert (settings.learning_rate, settings.momentum) == (1e-3, 0.9)
    trained = train_aggregator(tensors, labels, np.array([0, 1]), np.array([2, 3]), 2, "mean", settings, seed=5)
    for name, p in trained.network.named_parameters():
        torch.testing.assert_close(p, dict(network.named_parameters())[name])


def test_defaults_are_dinoblooms():
    assert TrainingSettings() == TrainingSettings(150, 1e-3, 0.9, 20, False)


def test_class_weights_count_though_a_batch_has_one_bag():
    """cross_entropy(weight=...) over a batch of one divides by the weight again."""
    bags, _ = random_bags(12)
    tensors, labels = [torch.from_numpy(bag) for bag in bags], np.array([0] * 8 + [1] * 2 + [0, 1])
    train, val = np.arange(10), np.array([10, 11])
    plain, weighted = (
        train_aggregator(tensors, labels, train, val, 2, "mean", TrainingSettings(1, class_weights=on)).history[0]
        for on in (False, True)
    )
    assert plain.train_loss != weighted.train_loss
    assert mil_training._class_weights(labels[train], 2).tolist() == [10 / 16, 10 / 4]
    assert mil_training._class_weights(np.array([0, 0, 2]), 3).tolist() == [0.75, 1.5, 1.5]


def test_other_random_numbers_are_left_alone():
    bags, labels = random_bags(4)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    train_aggregator([torch.from_numpy(b) for b in bags], labels, np.array([0, 1]), np.array([2, 3]), 2, "gated", QUICK)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "--epochs 0"),
        ({"patience": 0}, "--patience 0"),
        ({"learning_rate": 0.0}, "--learning-rate 0.0: choose a number above 0"),
        ({"momentum": 1.0}, "momentum 1.0"),
        ({"learning_rate": 1e30}, r"--learning-rate 1e\+30: the loss is .* after 1 epochs"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    bags, labels = random_bags(4)
    tensors = [torch.from_numpy(bag) for bag in bags]
    with pytest.raises(ValueError, match=message):
        train_aggregator(
            tensors, labels, np.array([0, 1]), np.array([2, 3]), 2, "mean", settings=TrainingSettings(**settings)
        )
