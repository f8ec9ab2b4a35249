"""Intervals that cover the truth and are wider by patient, as plain resampling has them; paired tests."""

from math import comb

import numpy as np
import pytest

from dinov2.eval.metrics.classification import classification_metrics
from dinov2.eval.metrics.intervals import WeightedMetrics, bootstrap_intervals, compare_paired

COUNTED = ("accuracy", "balanced_accuracy", "weighted_f1", "macro_f1", "kappa")
NAMES = list("abcd")


def random_predictions(n=300, share_right=0.7, n_classes=4, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.minimum(rng.integers(0, n_classes, n), rng.integers(0, n_classes, n))
    return labels, np.where(rng.random(n) < share_right, labels, rng.integers(0, n_classes, n))


def probabilities_of(labels, n_classes=4, seed=0):
    scores = np.random.default_rng(seed).normal(size=(len(labels), n_classes)).round(1)  # with ties
    scores[np.arange(len(labels)), labels] += 1
    return np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)


def resample(labels, predictions, probabilities, groups, n_resamples, seed):
    """The bootstrap as one would write it down: rows drawn, metrics computed anew."""
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(groups == g) for g in np.unique(groups)]
    draws = []
    for _ in range(n_resamples):
        rows = np.concatenate([members[g] for g in rng.integers(len(members), size=len(members))])
        draws.append(classification_metrics(labels[rows], predictions[rows], NAMES, probabilities[rows]))
    return {name: np.quantile([m[name] for m in draws], [0.025, 0.975]) for name in (*COUNTED, "auroc", "log_loss")}


def test_weights_count_a_sample_as_often_as_they_say():
    """The metrics of weights are those of the samples written out that often; some classes lose all their samples."""
    labels, predictions = random_predictions(n=12)
    probabilities = probabilities_of(labels)
    metrics_of = WeightedMetrics(labels, predictions, 4, probabilities)
    for seed in range(20):
        weights = np.bincount(np.random.default_rng(seed).integers(12, size=12), minlength=12)
        rows = np.repeat(np.arange(12), weights)
        expected = classification_metrics(labels[rows], predictions[rows], NAMES, probabilities[rows])
        ours = metrics_of(weights)
        assert set(ours) == {*COUNTED, "auroc", "log_loss"}
        for name, value in ours.items():
            assert value == pytest.approx(np.nan if expected[name] is None else expected[name], nan_ok=True), name


def test_metrics_that_need_two_classes_are_nan_for_one():
    labels = np.array([1, 1, 0])
    weights = np.array([2, 1, 0])
    metrics = WeightedMetrics(labels, labels, 2, probabilities_of(labels, 2))(weights)
    assert np.isnan([metrics["kappa"], metrics["auroc"]]).all()


def test_intervals_by_patient_are_those_of_plain_resampling():
    labels, predictions = random_predictions(n=200)
    probabilities = probabilities_of(labels)
    groups = np.arange(200) // 8
    patients = [f"p{g}" for g in groups]
    ours = bootstrap_intervals(labels, predictions, 4, probabilities, patients, n_resamples=4000, seed=0)
    expected = resample(labels, predictions, probabilities, groups, 150, seed=1)
    assert set(ours) == set(expected)
    for name, (low, high) in expected.items():
        assert ours[name] == pytest.approx([low, high], abs=0.25 * (high - low)), name


def test_intervals_follow_the_seed_and_hold_the_value():
    labels, predictions = random_predictions()
    probabilities = probabilities_of(labels)
    intervals = bootstrap_intervals(labels, predictions, 4, probabilities)
    assert intervals == bootstrap_intervals(labels, predictions, 4, probabilities)
    assert intervals != bootstrap_intervals(labels, predictions, 4, probabilities, seed=1)
    metrics = classification_metrics(labels, predictions, NAMES, probabilities)
    for name, (low, high) in intervals.items():
        assert low < metrics[name] < high


def test_accuracy_is_covered_as_often_as_promised():
    covered = 0
    for seed in range(200):
        labels, predictions = random_predictions(n=150, share_right=0.7, n_classes=2, seed=seed)
        low, high = bootstrap_intervals(labels, predictions, 2, n_resamples=500)["accuracy"]
        covered += low <= 0.85 <= high
    assert 0.90 <= covered / 200 <= 0.99


def test_cells_of_a_patient_alike_make_intervals_wider():
    rng = np.random.default_rng(0)
    is_right = rng.random(20) < 0.7  # all cells of a patient are right, or none
    labels, patients = np.tile([0, 1], 500), [f"p{i // 50}" for i in range(1000)]
    predictions = np.where(np.repeat(is_right, 50), labels, 1 - labels)
    by_cell, by_patient = (
        bootstrap_intervals(labels, predictions, 2, patients=p)["accuracy"] for p in (None, patients)
    )
    assert by_patient[1] - by_patient[0] > 4 * (by_cell[1] - by_cell[0])
    single = [str(i) for i in range(1000)]
    assert bootstrap_intervals(labels, predictions, 2, patients=single)["accuracy"] == by_cell


def test_one_patient_gives_no_interval():
    labels, predictions = random_predictions(n=20)
    assert bootstrap_intervals(labels, predictions, 4, patients=["p"] * 20) == {}
    result = compare_paired(labels, predictions, labels, 4, patients=["p"] * 20)
    assert result["differences"]["accuracy"]["interval"] is None
    assert result["differences"]["accuracy"]["p_value"] is None
    with pytest.raises(ValueError, match="19 patients for 20 samples"):
        bootstrap_intervals(labels, predictions, 4, patients=["p"] * 19)


def test_a_large_set_is_quick():
    """Weights are drawn and counted; computing the metrics of 50,000 rows a thousand times would take a minute."""
    labels, predictions = random_predictions(n=50_000, n_classes=4)
    low, high = bootstrap_intervals(labels, predictions, 4)["accuracy"]
    half_width = 1.96 * np.sqrt(0.775 * 0.225 / 50_000)
    assert (high - low) / 2 == pytest.approx(half_width, rel=0.1)


@pytest.mark.parametrize(("a", "b"), [(0, 0), (5, 0), (0, 6), (3, 9), (12, 12), (40, 71)])
def test_mcnemar_is_a_fair_coins_tail(a, b):
    labels = np.zeros(a + b + 3, dtype=np.int64)
    of_a, of_b = labels.copy(), labels.copy()
    of_b[:a], of_a[a : a + b] = 1, 1
    n, k = a + b, min(a, b)
    expected = min(1, 2 * sum(comb(n, i) for i in range(k + 1)) / 2**n)
    mcnemar = compare_paired(labels, of_a, of_b, 2, n_resamples=2)["mcnemar"]
    assert mcnemar == {"only_a_right": a, "only_b_right": b, "p_value": pytest.approx(expected)}


def test_paired_tests_see_a_difference_that_intervals_hide():
    labels, worse = random_predictions(n=400, share_right=0.7)
    better = worse.copy()
    mended = np.flatnonzero(worse != labels)[:12]
    better[mended] = labels[mended]
    of_worse, of_better = (bootstrap_intervals(labels, p, 4)["accuracy"] for p in (worse, better))
    assert of_worse[1] > of_better[0]  # they overlap
    result = compare_paired(labels, worse, better, 4)
    assert result["mcnemar"] == {"only_a_right": 0, "only_b_right": 12, "p_value": pytest.approx(2 / 2**12)}
    accuracy = result["differences"]["accuracy"]
    assert accuracy["difference"] == pytest.approx(12 / 400)
    assert accuracy["a"] == pytest.approx((worse == labels).mean())
    assert accuracy["interval"][0] > 0
    assert accuracy["p_value"] < 0.01
    back = compare_paired(labels, better, worse, 4)["differences"]["accuracy"]
    assert back["difference"] == -accuracy["difference"]


def test_equal_methods_do_not_differ():
    labels, predictions = random_predictions()
    result = compare_paired(labels, predictions, predictions, 4)
    assert result["mcnemar"]["p_value"] == 1
    assert result["differences"]["macro_f1"]["interval"] == [0, 0]
    assert result["differences"]["macro_f1"]["p_value"] == 1


def test_a_gain_on_one_patient_alone_is_none_by_patient():
    labels = np.zeros(200, dtype=np.int64)
    patients = [f"p{i // 20}" for i in range(200)]
    a, b = labels.copy(), labels.copy()
    a[:20] = 1
    by_cell, by_patient = (compare_paired(labels, a, b, 2, p)["differences"]["accuracy"] for p in (None, patients))
    assert by_cell["p_value"] < 0.01 < 0.2 < by_patient["p_value"]
    assert by_patient["interval"][0] == 0
