"""Our metrics are scikit-learn's, also where classes have no support, and come without its warnings."""

import json
import warnings

import numpy as np
import pytest
from sklearn import metrics as reference
from sklearn.calibration import calibration_curve

from dinov2.eval.metrics.classification import classification_metrics, expected_calibration_error

NAMES = ["basophil", "blast", "eosinophil", "lymphocyte", "monocyte"]


def random_predictions(labels_up_to: int, predictions_up_to: int):
    rng = np.random.default_rng(labels_up_to * 10 + predictions_up_to)
    return rng.integers(0, labels_up_to, 200), rng.integers(0, predictions_up_to, 200)


def random_probabilities(labels: np.ndarray, n_classes: int = 5, seed: int = 0):
    """Right more often than not, some rows with ties, some with zeros."""
    scores = np.random.default_rng(seed).normal(size=(len(labels), n_classes))
    scores[np.arange(len(labels)), labels] += 1
    probabilities = np.exp(scores).round(1) + 1e-9
    probabilities[::7, 1] = 0
    return probabilities / probabilities.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("up_to", [(5, 5), (3, 5), (5, 3), (1, 2)], ids=str)
def test_agrees_with_scikit_learn(up_to):
    labels, predictions = random_predictions(*up_to)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = classification_metrics(labels, predictions, NAMES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's, about classes that occur on one side only
        assert ours["accuracy"] == pytest.approx(reference.accuracy_score(labels, predictions))
        assert ours["balanced_accuracy"] == pytest.approx(reference.balanced_accuracy_score(labels, predictions))
        assert ours["weighted_f1"] == pytest.approx(reference.f1_score(labels, predictions, average="weighted"))
        assert ours["macro_f1"] == pytest.approx(reference.f1_score(labels, predictions, average="macro"))
        kappa = reference.cohen_kappa_score(labels, predictions)
        assert ours["kappa"] == pytest.approx(kappa)
        report = reference.classification_report(
            labels, predictions, labels=range(5), target_names=NAMES, output_dict=True, zero_division=0
        )
    for name in NAMES:
        mine, theirs = ours["per_class"][name], report[name]
        assert mine["support"] == theirs["support"]
        assert mine["f1"] == pytest.approx(theirs["f1-score"])
        assert mine["precision"] == pytest.approx(theirs["precision"])
        assert mine["recall"] == (pytest.approx(theirs["recall"]) if theirs["support"] else None)


@pytest.mark.parametrize("n_labels", [5, 3])
def test_metrics_of_probabilities_are_scikit_learns(n_labels):
    """Class 4, and with three classes class 3 too, has no sample: it has no curve and takes no part in the mean."""
    labels = np.random.default_rng(0).integers(0, n_labels, 300)
    probabilities = random_probabilities(labels)
    predictions = probabilities.argmax(axis=1)
    ours = classification_metrics(labels, predictions, NAMES, probabilities)
    curves = [reference.roc_auc_score(labels == i, probabilities[:, i]) for i in range(n_labels)]
    assert ours["auroc"] == pytest.approx(np.mean(curves))
    for i, name in enumerate(NAMES):
        assert ours["per_class"][name]["auroc"] == (pytest.approx(curves[i]) if i < n_labels else None)
    assert ours["log_loss"] == pytest.approx(reference.log_loss(labels, probabilities, labels=range(5)))
    if n_labels == 5:
        together = reference.roc_auc_score(labels, probabilities, multi_class="ovr", average="macro")
        assert ours["auroc"] == pytest.approx(together)


def test_a_certain_mistake_costs_a_finite_log_loss():
    probabilities = np.array([[1.0, 0.0], [0.0, 1.0]])
    ours = classification_metrics(np.array([1, 1]), np.array([0, 1]), NAMES[:2], probabilities)
    assert ours["log_loss"] == pytest.approx(reference.log_loss([1, 1], probabilities, labels=[0, 1]))
    assert ours["auroc"] is None  # every sample is of one class
    assert ours["kappa"] == 0.0


def test_calibration_error_bins_the_confidence_as_scikit_learn():
    labels = np.random.default_rng(3).integers(0, 5, 1000)
    probabilities = random_probabilities(labels)
    predictions = probabilities.argmax(axis=1)
    confidence, is_right = probabilities.max(axis=1), predictions == labels
    accuracy_of_bins, confidence_of_bins = calibration_curve(is_right, confidence, n_bins=15)
    sizes = np.histogram(-confidence, -np.linspace(1, 0, 16))[0][::-1]  # without the lower end, with the upper one
    expected = (np.abs(accuracy_of_bins - confidence_of_bins) * sizes[sizes > 0]).sum() / 1000
    assert expected_calibration_error(labels, predictions, probabilities) == pytest.approx(expected)


def test_calibration_error_of_known_cases():
    half = np.full((4, 2), 0.5)
    zeros = np.zeros(4, dtype=int)
    assert expected_calibration_error(np.array([0, 0, 1, 1]), zeros, half) == 0  # half right, half sure
    assert expected_calibration_error(np.array([1, 1, 1, 1]), zeros, half) == 0.5
    sure = np.eye(2)[zeros]
    assert expected_calibration_error(np.array([0, 0, 0, 1]), zeros, sure) == 0.25


def test_kappa_of_one_class_alone_is_undefined():
    assert classification_metrics(np.array([1, 1]), np.array([1, 1]), NAMES)["kappa"] is None


def test_rows_of_the_confusion_are_labels():
    ours = classification_metrics(np.array([0, 0, 0, 1]), np.array([0, 2, 2, 1]), NAMES[:3])
    assert ours["confusion"] == [[1, 0, 2], [0, 1, 0], [0, 0, 0]]


def test_results_go_into_json():
    ours = classification_metrics(*random_predictions(3, 5), NAMES)
    assert json.loads(json.dumps(ours)) == ours
    labels = np.array([0, 1, 2])
    with_probabilities = classification_metrics(labels, labels, NAMES, random_probabilities(labels))
    assert json.loads(json.dumps(with_probabilities)) == with_probabilities


@pytest.mark.parametrize(
    ("labels", "predictions", "message"),
    [
        ([0, 5], [0, 1], "labels: numbers from 0 to 5, but there are 5 classes"),
        ([0, 1], [-1, 1], "predictions: numbers from -1"),
        ([0, 1], [0], "one number each per sample"),
        ([], [], "one number each per sample"),
    ],
)
def test_numbers_that_are_no_classes_are_refused(labels, predictions, message):
    with pytest.raises(ValueError, match=message):
        classification_metrics(np.array(labels), np.array(predictions), NAMES)


@pytest.mark.parametrize(
    ("probabilities", "message"),
    [
        (np.full((2, 3), 1 / 3), r"probabilities \(2, 3\): expected one row for each of 2 samples"),
        (np.array([[1, 0, 0, 0, 0], [0.5, 0, 0, 0, 0]]), "1 of 2 rows are negative, NaN or do not sum to 1.*row 1"),
        (np.array([[np.nan] * 5, [1, 0, 0, 0, 0]]), "the first is row 0"),
        (np.array([[1, 0, 0, 0, 0], [2, -1, 0, 0, 0]]), "the first is row 1"),
    ],
)
def test_numbers_that_are_no_probabilities_are_refused(probabilities, message):
    with pytest.raises(ValueError, match=message):
        classification_metrics(np.array([0, 1]), np.array([0, 1]), NAMES, probabilities)
