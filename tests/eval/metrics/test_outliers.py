"""Scores against SciPy and plain loops, and detection against scikit-learn's ROC curve."""

import numpy as np
import pytest
from scipy.spatial.distance import mahalanobis
from sklearn.covariance import EmpiricalCovariance, ledoit_wolf
from sklearn.metrics import roc_auc_score, roc_curve

from dinov2.eval.metrics.outliers import detection_metrics, knn_scores, leave_class_out, mahalanobis_scores


def draw(n=90, dim=6, n_classes=3, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % n_classes
    return (rng.normal(size=(n, dim)) + 4 * np.eye(n_classes, dim)[labels]).astype(np.float32), labels


def test_mahalanobis_is_scipys_distance_to_the_nearest_mean():
    (train, labels), (test, _) = draw(), draw(n=12, seed=1)
    means = [train[labels == c].astype(np.float64).mean(axis=0) for c in range(3)]
    centred = train - np.array(means)[labels]
    precision = np.linalg.inv(ledoit_wolf(centred, assume_centered=True)[0])
    expected = [min(mahalanobis(cell, mean, precision) ** 2 for mean in means) for cell in test]
    np.testing.assert_allclose(mahalanobis_scores(train, labels, test), expected, rtol=1e-6)


def test_with_many_cells_it_is_the_papers_empirical_covariance():
    (train, labels), (test, _) = draw(n=30_000), draw(n=12, seed=1)
    train, test = train * np.arange(1, 7), test * np.arange(1, 7)  # no sphere, towards which the covariance is shrunk
    means = np.array([train[labels == c].mean(axis=0) for c in range(3)])
    empirical = EmpiricalCovariance(assume_centered=True).fit(train - means[labels])
    expected = np.min([empirical.mahalanobis(test - mean) for mean in means], axis=0)
    np.testing.assert_allclose(mahalanobis_scores(train, labels, test), expected, rtol=0.01)


def test_fewer_cells_than_features_still_see_every_direction():
    train = np.zeros((8, 20), np.float32)
    train[:, :3] = np.random.default_rng(0).normal(size=(8, 3))
    near, far = np.zeros((1, 20), np.float32), np.eye(20, dtype=np.float32)[-1:] * 5
    labels = np.arange(8) % 2
    assert mahalanobis_scores(train, labels, far) > 10 * mahalanobis_scores(train, labels, near)


def test_training_cells_that_do_not_vary_still_give_distances():
    """With one cell a class there is no covariance; distances then rank as Euclidean ones."""
    train, test = np.eye(2, 5, dtype=np.float32), np.array([[1, 0, 0, 0, 0], [0, 0, 0, 0, 3]], np.float32)
    scores = mahalanobis_scores(train, np.array([0, 1]), test)
    assert scores[0] == 0
    assert 0 < scores[1] < np.inf


def test_knn_is_the_distance_to_the_kth_neighbour_on_the_sphere():
    train, test = draw()[0], draw(n=12, seed=1)[0]
    unit = [cells / np.linalg.norm(cells, axis=1, keepdims=True) for cells in (train, test)]
    expected = [np.sort(np.linalg.norm(unit[0] - cell, axis=1))[4] for cell in unit[1]]
    np.testing.assert_allclose(knn_scores(train, test, k=5), expected, rtol=1e-4)
    np.testing.assert_allclose(knn_scores(3 * train, 7 * test, k=5), expected, rtol=1e-4)
    assert knn_scores(train[:3], test, k=10).shape == (12,)  # of three training cells the third


def test_detection_is_scikit_learns():
    rng = np.random.default_rng(0)
    known, outliers = rng.normal(size=200).round(1), (rng.normal(size=80) + 1).round(1)  # with ties
    metrics = detection_metrics(known, outliers)
    is_outlier, scores = np.repeat([0, 1], [200, 80]), np.concatenate([known, outliers])
    assert metrics["auroc"] == pytest.approx(roc_auc_score(is_outlier, scores))
    false_rate, true_rate, _ = roc_curve(1 - is_outlier, -scores)
    assert metrics["fpr95"] == pytest.approx(false_rate[true_rate >= 0.95].min())
    threshold = min(t for t in known if (known <= t).mean() >= 0.95)
    assert metrics["fpr95"] == pytest.approx((outliers <= threshold).mean())


def test_a_class_apart_is_found_and_nothing_is_learned_from_it():
    features, labels = draw(n=240)
    features[labels == 2] += 30
    folds = [(np.arange(120), np.arange(120, 240)), (np.arange(120, 240), np.arange(120))]
    result = leave_class_out(features, labels, ["a", "b", "far"], folds)
    for score in ("knn", "mahalanobis"):
        assert result[score]["per_class"]["far"]["auroc"] > 0.99
        assert result[score]["per_class"]["far"]["fpr95"] == 0
        for key in ("auroc", "fpr95"):
            of_classes = [row[key] for row in result[score]["per_class"].values()]
            assert len(of_classes) == 3
            assert result[score][key] == pytest.approx(np.mean(of_classes))
    changed = features.copy()
    changed[:120][labels[:120] == 2] += 1000  # the training cells of the class that the first fold leaves out
    again = leave_class_out(changed, labels, ["a", "b", "far"], folds[:1])
    assert (
        again["knn"]["per_class"]["far"]
        == leave_class_out(features, labels, ["a", "b", "far"], folds[:1])["knn"]["per_class"]["far"]
    )


def test_a_class_that_no_fold_tests_is_left_out():
    features, labels = draw()
    test = np.flatnonzero(labels[60:] != 1) + 60
    result = leave_class_out(features, labels, ["a", "b", "c"], [(np.arange(60), test)])
    assert list(result["knn"]["per_class"]) == ["a", "c"]
    assert leave_class_out(features, labels, ["a", "b", "c"], [(np.arange(60), test[:1])])["knn"] == {"per_class": {}}
