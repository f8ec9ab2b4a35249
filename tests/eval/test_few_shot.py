"""Few cells a class: the draws that a method sees, and the mean and spread of what it makes of them."""

from functools import partial

import numpy as np
import pytest

from dinov2.eval.few_shot import evaluate_few_shot, size_of_draw
from dinov2.eval.knn import knn_predict
from dinov2.eval.metrics import classification_metrics

NAMES = ["basophil", "blast", "eosinophil"]


@pytest.fixture
def cells():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [60, 50, 3])
    features = rng.normal(size=(113, 4)) + labels[:, None]
    order = rng.permutation(113)
    folds = [(order[40:], order[:40]), (order[:73], order[73:])]
    return features, labels, folds


def test_a_method_sees_n_cells_a_class_and_the_whole_test_side(cells):
    features, labels, folds = cells
    seen = []

    def predict(train_features, train_labels, test_features):
        seen.append((np.bincount(train_labels)[:2].tolist(), len(train_features), len(test_features)))
        return np.zeros(len(test_features), dtype=np.int64)

    found = evaluate_few_shot(features, labels, NAMES, folds, predict, numbers=(1, 5), n_repeats=3)
    assert [counts for counts, _, _ in seen] == [[1, 1]] * 6 + [[5, 5]] * 6
    assert {n_test for _, _, n_test in seen} == {40}
    assert [n_train for _, n_train, _ in seen[-3:]] == [size_of_draw(labels[folds[1][0]], 5)] * 3
    assert found["5"]["n_draws"] == 6
    of_folds = [classification_metrics(labels[test], np.zeros(40, dtype=int), NAMES)["accuracy"] for _, test in folds]
    assert found["1"]["accuracy"]["mean"] == pytest.approx(np.mean(of_folds))
    assert found["1"]["accuracy"]["sd"] == pytest.approx(np.std([*of_folds] * 3, ddof=1))


def test_knn_gets_better_with_more_cells_and_follows_the_seed(cells):
    features, labels, folds = cells
    predict = partial(knn_predict, k=1, n_classes=3)
    run = partial(evaluate_few_shot, features, labels, NAMES, folds, predict, n_repeats=8)
    found = run(numbers=(1, 20))
    assert found["20"]["accuracy"]["mean"] > found["1"]["accuracy"]["mean"]
    assert found["1"] == run(numbers=(1,))["1"]
    assert found != run(numbers=(1, 20), seed=1)


def test_one_draw_has_no_spread_and_too_many_cells_are_refused(cells):
    features, labels, folds = cells
    predict = partial(knn_predict, k=1, n_classes=3)
    found = evaluate_few_shot(features, labels, NAMES, folds[:1], predict, numbers=(2,), n_repeats=1)
    assert found["2"]["accuracy"]["sd"] is None
    with pytest.raises(ValueError, match="100 cells a class asked, but the largest class has"):
        evaluate_few_shot(features, labels, NAMES, folds, predict, numbers=(100,))
