"""The robust recipe: what it learns from, how it chooses, and that threads change nothing."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from dinov2.data.datasets.bag_folds import BagFold
from dinov2.eval.solvers import mil_training, robust_mil
from dinov2.eval.solvers.mil_training import TrainingSettings, deletion_curve, train_aggregator
from dinov2.eval.solvers.robust_mil import ROBUST, train_robust
from dinov2.models.abmil import build_aggregator

QUICK = TrainingSettings(epochs=3, optimizer="adamw", batch_size=4, standardise=True)
NONE = np.empty(0, dtype=np.int64)


def task(n=24, dim=5, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    bags = [rng.normal(y, 1, size=(rng.integers(1, 7), dim)).astype(np.float32) * 50 + 300 for y in labels]
    return [torch.from_numpy(bag) for bag in bags], labels


def folds():
    return [BagFold(np.arange(12), np.arange(12, 18), np.arange(18, 24)), BagFold(np.arange(6, 24), NONE, np.arange(6))]


def test_all_patients_but_the_tested_are_learned_from_and_each_stops_some_networks():
    bags, labels = task()
    jobs, trainings = train_robust(bags, labels, folds(), 2, "gated", QUICK, [1e-3, 1e-2], runs=2)
    assert len(jobs) == len(trainings) == 2 * robust_mil.INNER_FOLDS * 2
    for number, fold in enumerate(folds()):
        learned = np.union1d(fold.train, fold.val)
        of_fold = [job for job in jobs if job.fold == number]
        for job in of_fold:
            assert np.union1d(job.train, job.val).tolist() == learned.tolist()
            assert np.intersect1d(job.train, job.val).size == 0
        stopped_by = np.concatenate([job.val for job in of_fold])
        assert np.bincount(stopped_by)[learned].tolist() == [2] * len(learned)
        assert len({job.seed for job in of_fold}) == len(of_fold)


def test_the_rate_has_the_lowest_mean_validation_loss_of_the_inner_folds():
    bags, labels = task()
    rates = [1e-6, 1e-2]
    jobs, trainings = train_robust(bags, labels, folds()[:1], 2, "gated", QUICK, rates, runs=1)
    assert {job.settings.learning_rate for job in jobs} == {1e-2}
    best = np.mean([training.history[training.best_epoch].val_loss for training in trainings])
    others, of_others = train_robust(bags, labels, folds()[:1], 2, "gated", QUICK, rates[:1], runs=1)
    assert [job.val.tolist() for job in others] == [job.val.tolist() for job in jobs]
    assert best < np.mean([training.history[training.best_epoch].val_loss for training in of_others])


def test_test_patients_change_nothing():
    bags, labels = task()
    _, first = train_robust(bags, labels, folds()[:1], 2, "gated", QUICK, [1e-2], runs=1)
    for i in range(18, 24):
        bags[i] = bags[i] * 7
    others = np.where(np.arange(24) < 18, labels, 1 - labels)
    _, second = train_robust(bags, others, folds()[:1], 2, "gated", QUICK, [1e-2], runs=1)
    assert [training.history for training in first] == [training.history for training in second]


def test_standardisation_is_of_training_cells_and_each_patient_counts_the_same():
    bags, labels = task()
    network = train_aggregator(bags, labels, np.arange(4), np.arange(4, 8), 2, "mean", QUICK).network
    means = torch.stack([bag.double().mean(dim=0) for bag in bags[:4]]).mean(dim=0)
    torch.testing.assert_close(network.mean, means.float())
    squares = torch.stack([(bag.double() - means).square().mean(dim=0) for bag in bags[:4]]).mean(dim=0)
    torch.testing.assert_close(network.scale, squares.sqrt().float())
    assert network.architecture == {"model": "mean", "dim": 5, "n_classes": 2, "standardised": True}


@torch.no_grad()
def test_a_standardised_network_is_the_plain_one_of_standardised_cells_and_ignores_padding():
    torch.manual_seed(0)
    network = build_aggregator("classwise", 5, 2, standardised=True).eval()
    network.mean, network.scale = torch.full((5,), 300.0), torch.full((5,), 50.0)
    bags, _ = task(n=3)
    cells, is_cell = mil_training.as_batch(bags)
    assert cells.shape == (3, max(map(len, bags)), 5)
    assert is_cell.sum(dim=1).tolist() == [len(bag) for bag in bags]
    logits, attention = network(cells, is_cell)
    for i, bag in enumerate(bags):
        one = mil_training.as_batch([(bag - 300) / 50])
        alone, of_alone = network.network(*one)
        torch.testing.assert_close(logits[i], alone[0])
        torch.testing.assert_close(attention[i, :, : len(bag)], of_alone[0])


def test_a_feature_that_never_changes_is_not_divided_by_zero():
    bags, labels = task()
    for bag in bags:
        bag[:, 0] = 7
    network = train_aggregator(bags, labels, np.arange(8), np.arange(8, 12), 2, "mean", QUICK).network
    assert network.scale[0] == 1


def test_dropout_leaves_out_a_share_of_the_cells_and_keeps_one():
    rng = np.random.default_rng(0)
    bag = torch.arange(10.0)[:, None]
    kept = [mil_training._some_cells(bag, 0.7, rng)[:, 0].tolist() for _ in range(50)]
    assert {len(cells) for cells in kept} == {3}
    assert all(len(set(cells)) == 3 for cells in kept)
    assert {cell for cells in kept for cell in cells} == set(range(10))
    assert mil_training._some_cells(bag[:1], 0.99, rng).tolist() == [[0.0]]
    assert mil_training._some_cells(bag, 0.0, rng) is bag


def test_the_recipe_is_what_the_documentation_says():
    assert (ROBUST.optimizer, ROBUST.standardise, ROBUST.class_weights) == ("adamw", True, True)
    assert 0 < ROBUST.cell_dropout < 1
    assert ROBUST.weight_decay > 0


@torch.no_grad()
def test_a_deletion_curve_is_the_prediction_of_the_bag_without_these_cells():
    torch.manual_seed(0)
    networks = [build_aggregator("gated", 5, 2).eval() for _ in range(2)]
    bag = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32)
    attention = np.random.default_rng(1).random(20)
    curve = deletion_curve(networks, bag, attention, 1, seed=3)
    assert curve["share"] == [0.0, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8]

    def probability(cells):
        outputs = [
            network(*mil_training.as_batch([torch.from_numpy(cells)]))[0].double().softmax(1) for network in networks
        ]
        return float(torch.stack(outputs).mean(dim=0)[0, 1])

    order = np.argsort(-attention)
    for share, n_removed, value in zip(curve["share"], (0, 1, 2, 4, 8, 12, 16), curve["most_attended"], strict=True):
        assert value == pytest.approx(probability(bag[np.sort(order[n_removed:])]), abs=1e-6), share
    assert curve["random"][0] == pytest.approx(curve["most_attended"][0])
    assert curve == deletion_curve(networks, bag, attention, 1, seed=3)
    assert curve["random"] != deletion_curve(networks, bag, attention, 1, seed=4)["random"]
    one = deletion_curve(networks, bag[:1], attention[:1], 0)  # the last cell stays
    assert len(set(one["most_attended"] + one["random"])) == 1


TRAIN = """
import dinov2, numpy as np, torch, hashlib, sys
torch.set_num_threads(int(sys.argv[1]))
from dinov2.eval.solvers import mil_training
mil_training.available_cores = lambda: int(sys.argv[1])
from dinov2.eval.solvers.mil_training import Job, TrainingSettings, train_all
rng = np.random.default_rng(0)
bags = [torch.from_numpy(rng.normal(size=(700, 384)).astype(np.float32)) for _ in range(6)]
labels = np.arange(6) % 2
jobs = [Job(0, np.arange(4), np.arange(4, 6), TrainingSettings(epochs=2), seed) for seed in range(3)]
trainings = train_all(bags, labels, jobs, 2, "classwise")
weights = [value for training in trainings for value in training.network.state_dict().values()]
print(hashlib.sha256(b"".join(value.numpy().tobytes() for value in weights)).hexdigest(), torch.get_num_threads())
"""


def test_weights_do_not_depend_on_the_number_of_threads():
    outputs = [
        subprocess.run([sys.executable, "-c", TRAIN, n], capture_output=True, text=True, check=True).stdout.split()
        for n in ("1", "2")
    ]
    assert outputs[0][0] == outputs[1][0]
    assert [output[1] for output in outputs] == ["1", "2"]  # the process keeps its own number
