"""Our metrics are scikit-learn's, also where classes have no support, and without its warnings."""

import json
import warnings

import numpy as np
import pytest
from sklearn import metrics as reference

from dinov2.eval.metrics import classification_metrics

NAMES = ["basophil", "blast", "eosinophil", "lymphocyte", "monocyte"]


def random_answers(labels_up_to: int, predictions_up_to: int):
    rng = np.random.default_rng(labels_up_to * 10 + predictions_up_to)
    return rng.integers(0, labels_up_to, 200), rng.integers(0, predictions_up_to, 200)


@pytest.mark.parametrize("up_to", [(5, 5), (3, 5), (5, 3), (1, 2)], ids=str)
def test_agrees_with_scikit_learn(up_to):
    labels, predictions = random_answers(*up_to)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = classification_metrics(labels, predictions, NAMES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's, about classes that occur on one side only
        assert ours["accuracy"] == pytest.approx(reference.accuracy_score(labels, predictions))
        assert ours["balanced_accuracy"] == pytest.approx(reference.balanced_accuracy_score(labels, predictions))
        assert ours["weighted_f1"] == pytest.approx(reference.f1_score(labels, predictions, average="weighted"))
        assert ours["macro_f1"] == pytest.approx(reference.f1_score(labels, predictions, average="macro"))
        report = reference.classification_report(
            labels, predictions, labels=range(5), target_names=NAMES, output_dict=True, zero_division=0
        )
    for name in NAMES:
        mine, theirs = ours["per_class"][name], report[name]
        assert mine["support"] == theirs["support"]
        assert mine["f1"] == pytest.approx(theirs["f1-score"])
        assert mine["precision"] == pytest.approx(theirs["precision"])
        assert mine["recall"] == (pytest.approx(theirs["recall"]) if theirs["support"] else None)


def test_rows_of_the_confusion_are_labels():
    ours = classification_metrics(np.array([0, 0, 0, 1]), np.array([0, 2, 2, 1]), NAMES[:3])
    assert ours["confusion"] == [[1, 0, 2], [0, 1, 0], [0, 0, 0]]


def test_results_go_into_json():
    ours = classification_metrics(*random_answers(3, 5), NAMES)
    assert json.loads(json.dumps(ours)) == ours


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
