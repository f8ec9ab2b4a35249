"""Few cells a class: the draws that a method sees, and the mean and spread of what it makes of them."""

from dataclasses import replace

import numpy as np
import pytest

from dinov2.eval.knn import KnnOptions, protocol
from dinov2.eval.metrics import classification_metrics
from dinov2.eval.protocol import EvaluationData, Protocol
from dinov2.eval.protocol.few_shot import FewShotOptions, evaluate, size_of_draw
from dinov2.eval.results import FoldPredictions

NAMES = ["basophil", "blast", "eosinophil"]


@pytest.fixture
def cells():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [60, 50, 3])
    features = rng.normal(size=(113, 4)) + labels[:, None]
    order = rng.permutation(113)
    folds = [(order[40:], order[:40]), (order[:73], order[73:])]
    return EvaluationData({"cls": features}, labels, NAMES, folds)


def test_a_protocol_gets_n_cells_a_class_and_the_whole_test_side(cells):
    calls = []

    def predict_zero(data, options):
        ((train, test),) = data.folds
        calls.append((np.bincount(data.labels[train])[:2].tolist(), len(train), len(test)))
        predictions = np.full(len(data.labels), -1)
        predictions[test] = 0
        return {"zero_": FoldPredictions(data.folds, predictions, None, [{}])}

    zero = Protocol("zero", "zero", "", predict_zero, None, lambda n_train: "options")
    scores = evaluate(cells, FewShotOptions(zero, numbers=(5, 1), repeats=3))["zero_"]
    assert list(scores) == ["1", "5"]
    assert [counts for counts, _, _ in calls] == [[1, 1]] * 6 + [[5, 5]] * 6
    assert {n_test for _, _, n_test in calls} == {40}
    assert [n_train for _, n_train, _ in calls[-3:]] == [size_of_draw(cells.labels[cells.folds[1][0]], 5)] * 3
    assert scores["5"]["n_draws"] == 6
    of_folds = [
        classification_metrics(cells.labels[test], np.zeros(40, dtype=int), NAMES)["accuracy"]
        for _, test in cells.folds
    ]
    assert scores["1"]["accuracy"]["mean"] == pytest.approx(np.mean(of_folds))
    assert scores["1"]["accuracy"]["sd"] == pytest.approx(np.std([*of_folds] * 3, ddof=1))


def test_knn_gets_better_with_more_cells_and_follows_the_seed(cells):
    one = protocol(KnnOptions(k=[1]))
    scores = evaluate(cells, FewShotOptions(one, (1, 20), repeats=8))["knn_1"]
    assert scores["20"]["accuracy"]["mean"] > scores["1"]["accuracy"]["mean"]
    assert scores["1"] == evaluate(cells, FewShotOptions(one, (1,), repeats=8))["knn_1"]["1"]
    assert scores != evaluate(replace(cells, seed=1), FewShotOptions(one, (1, 20), repeats=8))["knn_1"]


def test_numbers_with_too_few_cells_are_left_out(cells):
    """Draws of 2 and 20 cells a class have 6 and 43 cells; the third class has three."""
    scores = evaluate(cells, FewShotOptions(protocol(KnnOptions(k=[1, 20])), (2, 20), repeats=1))
    assert {row: list(numbers) for row, numbers in scores.items()} == {"knn_1": ["2", "20"], "knn_20": ["20"]}
    assert evaluate(cells, FewShotOptions(protocol(KnnOptions(k=[20])), (2,), repeats=1)) == {}


def test_one_draw_has_no_spread_and_too_many_cells_are_refused(cells):
    one = protocol(KnnOptions(k=[1]))
    scores = evaluate(replace(cells, folds=cells.folds[:1]), FewShotOptions(one, (2,), repeats=1))
    assert scores["knn_1"]["2"]["accuracy"]["sd"] is None
    with pytest.raises(ValueError, match="100 cells a class asked, but the largest class has"):
        evaluate(cells, FewShotOptions(one, (100,)))
