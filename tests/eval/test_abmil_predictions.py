"""ABMIL as a function: what is planted is found, shuffled labels are not, and upstream's faults stay away."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from dinov2.data import sample_cells
from dinov2.data.datasets.bag_folds import FoldedBags, draw_folds
from dinov2.data.datasets.bags import PatientBags
from dinov2.data.datasets.labelled_cells import LabelledCells
from dinov2.eval.abmil import AbmilOptions, evaluate
from dinov2.eval.solvers.mil_training import TrainingSettings, describe_members

QUICK = TrainingSettings(epochs=4, learning_rate=0.01)
PLANTED, NAMES = "promyelocyte", ["PML::RARA", "control"]


def random_bags(n_patients=12, dim=5, n_classes=2, seed=0):
    rng = np.random.default_rng(seed)
    bags = [rng.normal(size=(rng.integers(2, 6), dim)).astype(np.float32) for _ in range(n_patients)]
    return bags, np.arange(n_patients) % n_classes


def patients(n: int) -> list[str]:
    return [f"p{i:02d}" for i in range(n)]


def as_bags(bags, labels, names=("a", "b")):
    cells = [[str(cell) for cell in range(len(bag))] for bag in bags]
    return PatientBags(patients(len(bags)), list(bags), cells, labels, list(names))


def drawn(bags, labels, protocol, n_folds):
    return draw_folds(as_bags(bags, labels), protocol, n_folds).folds


def cross_validate(bags, labels, names, folds, runs, model, training, seed=0, device="cpu"):
    """The networks and the predictions for bags in arrays."""
    data = FoldedBags(as_bags(bags, labels, names), folds, [str(i) for i in range(len(folds))])
    predictions, networks = evaluate(data, AbmilOptions(model, runs, seed, device, training))
    return networks, predictions


def test_test_patients_change_nothing_that_is_learned():
    """Upstream once trained on the folder called test."""
    bags, labels = random_bags(12)
    folds = drawn(bags, labels, "dinobloom", 2)
    runs, predictions = cross_validate(bags, labels, ["a", "b"], folds, 1, "gated", QUICK)
    others = copy.deepcopy(bags)
    for i in folds[0].test:
        others[i] = others[i] * 9
    labels_of_others = labels.copy()
    labels_of_others[folds[0].test] = 1 - labels[folds[0].test]
    again, others_predicted = cross_validate(others, labels_of_others, ["a", "b"], folds, 1, "gated", QUICK)
    assert predictions.positions.tolist() == sorted(folds[0].test)
    assert not np.allclose(others_predicted.probabilities, predictions.probabilities)
    for first, second in zip(runs, again, strict=True):
        assert first.training.history == second.training.history
        before, after = (network.training.network.state_dict() for network in (first, second))
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_same_inputs_give_the_same_numbers_and_no_network_depends_on_another():
    """Upstream went on with the network and the optimizer of the run before."""
    bags, labels = random_bags(12)
    folds = drawn(bags, labels, "crossval", 3)
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
    folds = drawn(bags, labels, "dinobloom", 2)
    runs, predictions = cross_validate(bags, labels, ["a", "b"], folds, 2, "classwise", QUICK)
    assert [len(networks) for networks in predictions.by_network] == [4] * len(folds[0].test)
    np.testing.assert_allclose(predictions.probabilities, np.mean([run.probabilities for run in runs], axis=0))
    np.testing.assert_allclose(predictions.probabilities.sum(axis=1), 1)
    for i, position in enumerate(predictions.positions):
        assert predictions.attention[i].shape == (2, len(bags[position]))
        np.testing.assert_allclose(predictions.attention[i].sum(axis=1), 1, rtol=1e-5)
        chosen = predictions.predicted_attention()[i]
        np.testing.assert_array_equal(chosen, predictions.attention[i][predictions.probabilities[i].argmax()])


@pytest.mark.gpu
def test_a_gpu_gives_nearly_the_same():
    bags, labels = random_bags(12)
    folds = drawn(bags, labels, "dinobloom", 2)
    on_cpu, on_gpu = (
        cross_validate(bags, labels, ["a", "b"], folds, 1, "classwise", QUICK, device=device)
        for device in ("cpu", "cuda")
    )
    np.testing.assert_allclose(on_gpu[1].probabilities, on_cpu[1].probabilities, atol=1e-3)
    assert {value.device.type for value in on_gpu[0][0].training.network.parameters()} == {"cpu"}


def test_spread_is_over_networks():
    bags, labels = random_bags(12)
    folds = drawn(bags, labels, "crossval", 3)
    runs, _ = cross_validate(bags, labels, ["a", "b"], folds, 2, "mean", QUICK)
    described = describe_members(runs, labels, ["a", "b"])
    values = [np.mean(run.probabilities.argmax(axis=1) == labels[run.test]) for run in runs]
    assert [network["accuracy"] for network in described["networks"]] == pytest.approx(values)
    assert described["mean"]["accuracy"] == pytest.approx(np.mean(values))
    assert described["sd"]["accuracy"] == pytest.approx(np.std(values, ddof=1))
    assert (described["min"]["accuracy"], described["max"]["accuracy"]) == (min(values), max(values))
    assert describe_members(runs[:1], labels, ["a", "b"])["sd"]["accuracy"] is None


# --- a planted rule


@pytest.fixture(scope="module")
def sample_patients(tmp_path_factory):
    """Sample patients of two subtypes, which differ in their share of one class of cells, and what each cell is.

    A cell's features tell its class, as a good backbone's would, which spares drawing and embedding a thousand cells.
    """
    folder = tmp_path_factory.mktemp("patients")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_cells, "draw_cell", lambda name, slide, rng, size: np.zeros((size, size, 3), np.uint8))
        sample_cells.write_sample_cells(folder, 0, 0, 0, n_patients=100, size=16, cells_per_patient=(12, 20))
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
    folds = draw_folds(replace(bags, labels=labels), "crossval", 4).folds
    _, predictions = cross_validate(bags.features, labels, NAMES, folds, 1, model, settings)
    assert len(predictions.positions) == len(bags) == 40
    # some controls have more of these cells than some patients do
    assert (predictions.classes == labels).mean() >= 0.75
    share_of_cells, share_of_attention, on_top = [], [], []
    for i, position in enumerate(predictions.positions):
        is_planted = np.array([kind == PLANTED for kind in bags.cells[position]])
        if labels[position] == predictions.classes[i] == NAMES.index("PML::RARA"):
            attention = predictions.predicted_attention()[i]
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
    folds = draw_folds(replace(bags, labels=labels), "crossval", 4).folds
    _, predictions = cross_validate(bags.features, labels, NAMES, folds, 1, "classwise", settings)
    # 40 fair coins are within these bounds in 98 of 100 cases
    assert 0.3 <= (predictions.classes == labels).mean() <= 0.7
