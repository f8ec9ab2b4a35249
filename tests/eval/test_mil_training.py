"""Training of aggregators: what is planted is found, shuffled labels are not, and upstream's faults stay away."""

import copy
import math

import numpy as np
import pytest
import torch

from dinov2.data.datasets.bags import PatientBags
from dinov2.data.datasets.labelled_cells import LabelledCells
from dinov2.data.sample_cells import sets
from dinov2.eval import mil_training
from dinov2.eval.mil_training import (
    Fold,
    TrainingSettings,
    check_folds,
    cross_validate,
    crossval_folds,
    describe_networks,
    dinobloom_folds,
    train_aggregator,
)
from dinov2.models.abmil import MeanPoolMIL

QUICK = TrainingSettings(epochs=4, learning_rate=0.01)
PLANTED, NAMES = "promyelocyte", ["PML::RARA", "control"]


def random_bags(n_patients=12, dim=5, n_classes=2, seed=0):
    rng = np.random.default_rng(seed)
    bags = [rng.normal(size=(rng.integers(2, 6), dim)).astype(np.float32) for _ in range(n_patients)]
    return bags, np.arange(n_patients) % n_classes


def patients(n: int) -> list[str]:
    return [f"p{i:02d}" for i in range(n)]


def parts(fold: Fold) -> tuple[list[int], ...]:
    return fold.train.tolist(), fold.val.tolist(), fold.test.tolist()


# --- folds


def assert_is_partition(fold: Fold, n: int) -> None:
    assert sorted(sum(parts(fold), [])) == list(range(n))


def test_dinoblooms_folds_have_one_test_set_and_keep_the_classes_apart_evenly():
    labels = np.repeat([0, 1, 2], [40, 20, 10])
    folds = dinobloom_folds(labels, patients(70), n_folds=4, seed=0)
    assert len(folds) == 4
    assert len({tuple(fold.test) for fold in folds}) == 1
    assert np.bincount(labels[folds[0].test]).tolist() == [8, 4, 2]
    for fold in folds:
        assert_is_partition(fold, 70)
        assert np.bincount(labels[fold.val]).tolist() == [8, 4, 2]
    assert sorted(np.concatenate([fold.val for fold in folds])) == sorted([*folds[0].train, *folds[0].val])


def test_a_given_test_set_is_the_test_set():
    labels, test = np.arange(20) % 2, np.array([0, 1, 7, 12])
    for fold in dinobloom_folds(labels, patients(20), n_folds=4, seed=0, test=test):
        assert_is_partition(fold, 20)
        assert fold.test.tolist() == [0, 1, 7, 12]


def test_cross_validation_tests_every_patient_once():
    labels = np.repeat([0, 1], [20, 10])
    folds = crossval_folds(labels, patients(30), n_folds=5, seed=0)
    assert sorted(np.concatenate([fold.test for fold in folds])) == list(range(30))
    for fold in folds:
        assert_is_partition(fold, 30)
        assert np.bincount(labels[fold.test]).tolist() == np.bincount(labels[fold.val]).tolist() == [4, 2]
    with pytest.raises(ValueError, match="--folds 2: protocol crossval needs"):
        crossval_folds(labels, patients(30), n_folds=2)


@pytest.mark.parametrize("make", [dinobloom_folds, crossval_folds])
def test_folds_follow_the_seed(make):
    labels = np.arange(40) % 2
    first, again, other = ([parts(fold) for fold in make(labels, patients(40), 4, seed)] for seed in (0, 0, 1))
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    ("fold", "message"),
    [
        (([0, 1, 2], [3], []), "fold 0: its part test has no patient"),
        (([0, 1, 2], [2, 3], [4]), "1 patients are in it more than once"),
        (([0, 2], [1, 3], [4, 5]), "fold 0: no patient of b in its training part"),
    ],
)
def test_folds_that_would_leak_or_cannot_learn(fold, message):
    fold = Fold(*(np.array(part, dtype=np.int64) for part in fold))
    with pytest.raises(ValueError, match=message):
        check_folds([fold], np.array([0, 1, 0, 1, 0, 1]), ["a", "b"])


def test_one_class_is_nothing_to_learn():
    with pytest.raises(ValueError, match="all patients are b, one class"):
        check_folds([], np.array([1, 1, 1]), ["a", "b"])


def test_a_test_part_without_a_class_is_told(caplog):
    check_folds([Fold(np.array([0, 1]), np.array([2, 3]), np.array([4]))], np.array([0, 1, 0, 1, 0]), ["a", "b"])
    assert "fold 0: no patient of b in its part test" in caplog.text


# --- one training


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
        (TrainingSettings(epochs=0), "--epochs 0"),
        (TrainingSettings(patience=0), "--patience 0"),
        (TrainingSettings(learning_rate=0.0), "--learning-rate 0.0: choose a number above 0"),
        (TrainingSettings(momentum=1.0), "momentum 1.0"),
        (TrainingSettings(learning_rate=1e30), r"--learning-rate 1e\+30: the loss is .* after 1 epochs"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    bags, labels = random_bags(4)
    tensors = [torch.from_numpy(bag) for bag in bags]
    with pytest.raises(ValueError, match=message):
        train_aggregator(tensors, labels, np.array([0, 1]), np.array([2, 3]), 2, "mean", settings)


# --- all trainings


def test_test_patients_change_nothing_that_is_learned():
    """Upstream once trained on the folder called test."""
    bags, labels = random_bags(12)
    folds = dinobloom_folds(labels, patients(12), n_folds=2, seed=0)
    runs, predictions = cross_validate(bags, labels, ["a", "b"], folds, 1, "gated", QUICK)
    others = copy.deepcopy(bags)
    for i in folds[0].test:
        others[i] = others[i] * 9
    labels_of_others = labels.copy()
    labels_of_others[folds[0].test] = 1 - labels[folds[0].test]
    again, judged = cross_validate(others, labels_of_others, ["a", "b"], folds, 1, "gated", QUICK)
    assert predictions.positions.tolist() == sorted(folds[0].test)
    assert not np.allclose(judged.probabilities, predictions.probabilities)
    for first, second in zip(runs, again, strict=True):
        assert first.history == second.history
        assert all(torch.equal(first.weights[name], second.weights[name]) for name in first.weights)


def test_the_same_inputs_give_the_same_numbers_and_no_network_depends_on_another():
    """Upstream went on with the network and the optimizer of the run before."""
    bags, labels = random_bags(12)
    folds = crossval_folds(labels, patients(12), n_folds=3, seed=0)
    runs, predictions = cross_validate(bags, labels, ["a", "b"], folds, 2, "classwise", QUICK)
    again, others = cross_validate(bags, labels, ["a", "b"], folds, 2, "classwise", QUICK)
    assert [(run.fold, run.run) for run in runs] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert all(a.probabilities.tobytes() == b.probabilities.tobytes() for a, b in zip(runs, again, strict=True))
    assert predictions.probabilities.tobytes() == others.probabilities.tobytes()
    assert all(a.tobytes() == b.tobytes() for a, b in zip(predictions.attention, others.attention, strict=True))
    fewer, _ = cross_validate(bags, labels, ["a", "b"], folds[:2], 1, "classwise", QUICK)
    assert fewer[1].probabilities.tobytes() == runs[2].probabilities.tobytes()
    assert runs[0].probabilities.tobytes() != runs[1].probabilities.tobytes()
    other_seed, _ = cross_validate(bags, labels, ["a", "b"], folds[:1], 1, "classwise", QUICK, seed=1)
    assert other_seed[0].probabilities.tobytes() != runs[0].probabilities.tobytes()


def test_predictions_are_means_over_the_networks_that_did_not_see_the_patient():
    bags, labels = random_bags(12)
    folds = dinobloom_folds(labels, patients(12), n_folds=2, seed=0)
    runs, predictions = cross_validate(bags, labels, ["a", "b"], folds, 2, "classwise", QUICK)
    assert predictions.n_networks.tolist() == [4] * len(folds[0].test)
    np.testing.assert_allclose(predictions.probabilities, np.mean([run.probabilities for run in runs], axis=0))
    np.testing.assert_allclose(predictions.probabilities.sum(axis=1), 1)
    for i, position in enumerate(predictions.positions):
        assert predictions.attention[i].shape == (2, len(bags[position]))
        np.testing.assert_allclose(predictions.attention[i].sum(axis=1), 1, rtol=1e-5)
        chosen = predictions.attention_of_prediction(i)
        np.testing.assert_array_equal(chosen, predictions.attention[i][predictions.probabilities[i].argmax()])


@pytest.mark.gpu
def test_a_gpu_gives_nearly_the_same():
    bags, labels = random_bags(12)
    folds = dinobloom_folds(labels, patients(12), n_folds=2, seed=0)
    on_cpu, on_gpu = (
        cross_validate(bags, labels, ["a", "b"], folds, 1, "classwise", QUICK, device=device)
        for device in ("cpu", "cuda")
    )
    np.testing.assert_allclose(on_gpu[1].probabilities, on_cpu[1].probabilities, atol=1e-3)
    assert {value.device.type for value in on_gpu[0][0].weights.values()} == {"cpu"}


def test_spread_is_over_networks():
    bags, labels = random_bags(12)
    folds = crossval_folds(labels, patients(12), n_folds=3, seed=0)
    runs, _ = cross_validate(bags, labels, ["a", "b"], folds, 2, "mean", QUICK)
    described = describe_networks(runs, labels, ["a", "b"])
    values = [np.mean(run.probabilities.argmax(axis=1) == labels[run.test]) for run in runs]
    assert [network["accuracy"] for network in described["networks"]] == pytest.approx(values)
    assert described["mean"]["accuracy"] == pytest.approx(np.mean(values))
    assert described["sd"]["accuracy"] == pytest.approx(np.std(values, ddof=1))
    assert (described["min"]["accuracy"], described["max"]["accuracy"]) == (min(values), max(values))
    assert describe_networks(runs[:1], labels, ["a", "b"])["sd"]["accuracy"] is None


# --- a planted rule


@pytest.fixture(scope="module")
def sample_patients(tmp_path_factory):
    """Sample patients of two subtypes, which differ in their share of one class of cells, and what each cell is.

    A cell's features tell its class, as a good backbone's would, which spares drawing and embedding a thousand cells.
    """
    folder = tmp_path_factory.mktemp("patients")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sets, "draw_cell", lambda name, slide, rng, size: np.zeros((size, size, 3), np.uint8))
        sets.write_sample_cells(folder, 0, 0, 0, n_patients=100, size=16, cells_per_patient=(12, 20))
    cells = LabelledCells.from_path(folder / "patients.csv")
    kinds = LabelledCells.from_path(folder / "patients_cell_classes.csv")
    rng = np.random.default_rng(0)
    features = rng.normal(size=(10, 12))[kinds.labels] + 0.3 * rng.normal(size=(len(cells), 12))
    chosen = [i for i in range(len(cells)) if cells.class_names[cells.labels[i]] in NAMES]
    return PatientBags.from_cells(
        features[chosen],
        [cells.patients[i] for i in chosen],
        [kinds.class_names[kinds.labels[i]] for i in chosen],
        [cells.class_names[cells.labels[i]] for i in chosen],
    )


@pytest.mark.parametrize("model", ["classwise", "gated"])
def test_a_planted_rule_is_learned_and_the_planted_cells_get_the_attention(sample_patients, model):
    bags, labels = sample_patients, sample_patients.labels
    settings = TrainingSettings(epochs=20, learning_rate=0.03)
    folds = crossval_folds(labels, bags.patients, n_folds=4, seed=0)
    _, predictions = cross_validate(bags.features, labels, NAMES, folds, 1, model, settings)
    assert len(predictions.positions) == len(bags) == 40
    # some controls have more of these cells than some patients do
    assert (predictions.classes == labels).mean() >= 0.75
    share_of_cells, share_of_attention, on_top = [], [], []
    for i, position in enumerate(predictions.positions):
        is_planted = np.array([kind == PLANTED for kind in bags.cells[position]])
        if labels[position] == predictions.classes[i] == NAMES.index("PML::RARA"):
            attention = predictions.attention_of_prediction(i)
            share_of_cells.append(is_planted.mean())
            share_of_attention.append(attention[is_planted].sum())
            on_top.append(is_planted[attention.argmax()])
    assert len(on_top) >= 12
    assert np.mean(on_top) >= 0.8
    assert np.mean(share_of_attention) >= 1.8 * np.mean(share_of_cells)


def test_shuffled_labels_stay_at_chance(sample_patients):
    bags = sample_patients
    labels = np.random.default_rng(0).permutation(bags.labels)
    settings = TrainingSettings(epochs=20, learning_rate=0.03)
    folds = crossval_folds(labels, bags.patients, n_folds=4, seed=0)
    _, predictions = cross_validate(bags.features, labels, NAMES, folds, 1, "classwise", settings)
    # 40 fair coins are within these bounds in 98 of 100 cases
    assert 0.3 <= (predictions.classes == labels).mean() <= 0.7
