"""Patient vectors against scikit-learn and a plain rendering of mAP@3, and the published protocol."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from dinov2.data.datasets.bag_folds import BagFold, FoldedBags
from dinov2.data.datasets.bags import PatientBags
from dinov2.eval.solvers import patient_vectors

NAMES = ["a", "b", "c"]


def patients(n=30, seed=0):
    """Bags of different sizes, whose classes differ in mean and in spread."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % len(NAMES)
    bags = [rng.normal(0.3 * y, 1 + 0.3 * y, size=(rng.integers(1, 9), 4)).astype(np.float32) for y in labels]
    cells = [[str(i) for i in range(len(bag))] for bag in bags]
    return PatientBags([f"p{i:02d}" for i in range(n)], bags, cells, labels, NAMES)


def two_folds_of_one_test_set(bags):
    rest, test = np.arange(20), np.arange(20, 30)
    return FoldedBags(bags, [BagFold(rest[:12], rest[12:], test), BagFold(rest[8:], rest[:8], test)], ["0", "1"])


def test_each_row_is_scikit_learns_on_the_training_part_of_each_fold():
    data = two_folds_of_one_test_set(patients())
    rows = patient_vectors.evaluate(data)
    assert list(rows) == [
        f"{pooling}_{name}" for pooling in ("mean", "mean_sd") for name in ("knn_1", "knn_5", "knn_10", "logistic")
    ]
    means = np.array([bag.mean(axis=0, dtype=np.float64) for bag in data.bags.features])
    both = np.array(
        [[*bag.mean(axis=0, dtype=np.float64), *bag.std(axis=0, dtype=np.float64)] for bag in data.bags.features]
    )
    for pooling, vectors in (("mean", means), ("mean_sd", both)):
        for number, fold in enumerate(data.folds):
            x, y, tested = vectors[fold.train], data.labels[fold.train], vectors[fold.test]
            for k in (1, 5, 10):
                votes = KNeighborsClassifier(k).fit(x, y).predict_proba(tested)
                np.testing.assert_allclose(rows[f"{pooling}_knn_{k}"][number].probabilities, votes)
            logistic = LogisticRegression(class_weight="balanced", max_iter=10_000).fit(x, y).predict_proba(tested)
            np.testing.assert_allclose(rows[f"{pooling}_logistic"][number].probabilities, logistic, atol=1e-4)


def test_validation_patients_are_not_learned_from():
    bags = patients()
    data = two_folds_of_one_test_set(bags)
    for i in data.folds[0].val:
        bags.features[i][:] = 100
    changed = patient_vectors.evaluate(data)
    same = patient_vectors.evaluate(two_folds_of_one_test_set(patients()))
    for row in same:
        assert changed[row][0].probabilities.tobytes() == same[row][0].probabilities.tobytes()


def test_a_class_without_training_patients_has_probability_zero_and_k_may_exceed_them():
    bags = patients()
    labels = bags.labels
    train = np.flatnonzero(labels < 2)[:6]
    rest = np.setdiff1d(np.arange(30), train)
    fold = BagFold(train, rest[:5], rest[5:])
    data = object.__new__(FoldedBags)  # such a fold is refused where folds are made
    vars(data).update(bags=bags, folds=[fold], fold_names=["0"])
    rows = patient_vectors.evaluate(data)
    for (fit,) in rows.values():
        assert (fit.probabilities[:, 2] == 0).all()
        np.testing.assert_allclose(fit.probabilities.sum(axis=1), 1)
    np.testing.assert_allclose(rows["mean_knn_10"][0].probabilities, np.tile([0.5, 0.5, 0.0], (len(rest) - 5, 1)))


def average_precision_at_3(query, gallery, label, labels):
    """One query at a time, as one would write it on paper."""
    cosine = [query @ other / np.linalg.norm(query) / np.linalg.norm(other) for other in gallery]
    ranked = [labels[i] == label for i in np.argsort(cosine)[::-1][:3]]
    precisions = [sum(ranked[: r + 1]) / (r + 1) for r in range(3) if ranked[r]]
    return sum(precisions) / min(3, sum(np.array(labels) == label))


def test_map_at_3_is_of_test_patients_among_themselves():
    data = two_folds_of_one_test_set(patients())
    found = patient_vectors.retrieval(data)
    test = data.folds[0].test
    vectors = [data.bags.features[i].mean(axis=0, dtype=np.float64) for i in test]
    labels = data.labels[test].tolist()
    scores = [
        average_precision_at_3(vectors[i], vectors[:i] + vectors[i + 1 :], labels[i], labels[:i] + labels[i + 1 :])
        for i in range(len(test))
    ]
    assert found["mean"]["map_at_3"] == pytest.approx(np.mean(scores))
    assert found["mean"]["queries"] == 10
    low, high = found["mean"]["interval"]
    assert low < found["mean"]["map_at_3"] < high


def test_a_query_without_another_patient_of_its_class_does_not_count():
    vectors = np.eye(4)[[0, 0, 1, 2]] + 0.01
    assert patient_vectors._precisions(vectors, np.array([0, 0, 1, 2])).tolist() == [1.0, 1.0]
    assert patient_vectors._mean_with_interval(np.empty(0), 0)["map_at_3"] is None
