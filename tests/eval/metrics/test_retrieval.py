"""Precision and mAP of retrieval against plain loops and scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from dinov2.eval.metrics import retrieval
from dinov2.eval.metrics.retrieval import retrieval_scores


def draw(n, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n)
    return (rng.normal(size=(n, 5)) + np.eye(3, 5)[labels]).astype(np.float32), labels


def test_scores_are_those_of_a_plain_loop_and_of_scikit_learn(monkeypatch):
    monkeypatch.setattr(retrieval, "CHUNK", 7)  # several chunks
    (gallery, of_gallery), (queries, of_queries) = draw(60, 0), draw(25, 1)
    scores = retrieval_scores(gallery, of_gallery, queries, of_queries)
    for i, (query, label) in enumerate(zip(queries, of_queries, strict=True)):
        cosines = [query @ cell / np.linalg.norm(query) / np.linalg.norm(cell) for cell in gallery]
        ranked = sorted(range(60), key=lambda j: -cosines[j])
        for k in (1, 5, 10):
            expected = sum(of_gallery[j] == label for j in ranked[:k]) / k
            assert scores[f"precision_at_{k}"][i] == pytest.approx(expected)
        assert scores["average_precision"][i] == pytest.approx(average_precision_score(of_gallery == label, cosines))
        assert scores["chance"][i] == pytest.approx((of_gallery == label).mean())


def test_a_class_that_the_gallery_lacks_and_a_small_gallery():
    gallery, queries = np.eye(3, 4, dtype=np.float32), np.eye(1, 4, dtype=np.float32)
    scores = retrieval_scores(gallery, np.array([0, 1, 1]), np.repeat(queries, 2, axis=0), np.array([0, 2]))
    assert scores["average_precision"].tolist() == [1, 0]
    assert scores["precision_at_1"].tolist() == [1, 0]
    assert scores["precision_at_10"].tolist() == pytest.approx([1 / 3, 0])  # of all three
