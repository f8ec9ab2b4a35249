"""Planted label errors are found, on constructed probabilities and on real cells."""

import numpy as np

from dinov2.data.datasets.labelled_cells import LabelledCells
from dinov2.data.splits import make_folds
from dinov2.eval.features.extract import extract
from dinov2.eval.features.named_encoders import build_encoder
from dinov2.eval.linear import LinearOptions, evaluate
from dinov2.eval.metrics.label_errors import class_thresholds, estimate_errors, suspected_labels
from dinov2.eval.protocol import EvaluationData


def probabilities_by_linear_probe(features, labels, n_classes):
    names = [str(c) for c in range(n_classes)]
    data = EvaluationData({"cls": features}, labels, names, make_folds(labels, None, 5, 0))
    return evaluate(data, LinearOptions())["linear_dinobloom"].probabilities


def flip(labels, n_classes, share, seed):
    rng = np.random.default_rng(seed)
    flipped = rng.choice(len(labels), round(share * len(labels)), replace=False)
    given = labels.copy()
    given[flipped] = (given[flipped] + rng.integers(1, n_classes, len(flipped))) % n_classes
    return given, flipped


def test_list_and_count_are_those_of_the_definition():
    """Cell by cell: the class that is likeliest for its threshold; and the paper's count of confident cells."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 300)
    scores = rng.normal(size=(300, 4))
    scores[np.arange(300), labels] += 1
    probabilities = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    thresholds = [probabilities[labels == c, c].mean() for c in range(4)]
    expected, n_confident = {}, 0
    for i, label in enumerate(labels):
        best = max(range(4), key=lambda c: probabilities[i, c] / thresholds[c])
        if best != label:
            expected[i] = best
        reached = [c for c in range(4) if probabilities[i, c] >= thresholds[c]]
        n_confident += max(reached, key=lambda c: probabilities[i, c], default=label) != label
    positions, suggested, ratios = suspected_labels(labels, probabilities)
    assert dict(zip(positions.tolist(), suggested.tolist(), strict=True)) == expected
    np.testing.assert_allclose(class_thresholds(labels, probabilities), thresholds)
    np.testing.assert_allclose(
        ratios, probabilities[positions, labels[positions]] / np.array(thresholds)[labels[positions]]
    )
    assert (np.diff(ratios) >= 0).all()
    assert 20 < estimate_errors(labels, probabilities) == n_confident < len(expected)


def test_a_class_that_was_never_learned_suspects_and_suggests_nothing():
    probabilities = np.array([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [0.9, 0.1, 0.0], [0.1, 0.9, 0.0]])
    labels = np.array([0, 1, 2, 0])
    positions, suggested, _ = suspected_labels(labels, probabilities)
    assert positions.tolist() == [3]
    assert suggested.tolist() == [1]


def test_all_planted_errors_come_first():
    rng = np.random.default_rng(0)
    truth = np.arange(400) % 4
    features = (rng.normal(size=(400, 8)) + 6 * np.eye(4, 8)[truth]).astype(np.float32)
    given, flipped = flip(truth, 4, 0.05, seed=1)
    probabilities = probabilities_by_linear_probe(features, given, 4)
    positions, suggested, _ = suspected_labels(given, probabilities)
    assert set(positions[: len(flipped)]) == set(flipped)
    assert 0.8 * len(flipped) <= estimate_errors(given, probabilities) <= len(flipped)
    assert (suggested[: len(flipped)] == truth[positions[: len(flipped)]]).all()


def test_flipped_labels_of_real_cells_are_found(shared_data):
    """5 % of the labels flipped: of the first 5 % of the cells in the list, at least 60 % are flipped ones."""
    cells = LabelledCells.from_path(shared_data / "acevedo_pbc" / "PBC_dataset_normal_DIB")
    features = extract(build_encoder("histogram"), cells.paths, progress=False).features
    n_classes = len(cells.class_names)
    given, flipped = flip(cells.labels, n_classes, 0.05, seed=0)
    positions, suggested, _ = suspected_labels(given, probabilities_by_linear_probe(features, given, n_classes))
    is_found = np.isin(positions[: len(flipped)], flipped)
    assert is_found.sum() / len(flipped) >= 0.6
    found = positions[: len(flipped)][is_found]
    assert (suggested[: len(flipped)][is_found] == cells.labels[found]).mean() > 0.8
