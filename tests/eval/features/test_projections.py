"""PCA is the SVD of centred features, and UMAP keeps groups together."""

import sys

import numpy as np
import pytest

from dinov2.eval.features.projections import UMAP_MISSING, projections


def points_of(plane: dict) -> np.ndarray:
    return np.stack([plane["x"], plane["y"]], axis=1)


@pytest.mark.parametrize("shape", [(200, 12), (15, 60)])
def test_pca_is_the_svd(shape):
    features = (np.random.default_rng(0).normal(size=shape) * np.linspace(3, 1, shape[1]) + 5).astype(np.float32)
    (pca,) = projections(features, with_umap=False)
    centred = features.astype(np.float64) - features.astype(np.float64).mean(axis=0)
    _, singular, directions = np.linalg.svd(centred, full_matrices=False)
    directions *= np.sign(directions[range(len(directions)), np.abs(directions).argmax(axis=1)])[:, None]
    np.testing.assert_allclose(points_of(pca), centred @ directions[:2].T, rtol=1e-5)  # the largest loading is positive
    shares = (singular**2 / (singular**2).sum())[:2]
    assert pca["axes"] == [f"Component {i + 1} ({share:.1%} of the variance)" for i, share in enumerate(shares)]


def test_pca_of_equal_cells_is_zero():
    (pca,) = projections(np.ones((5, 4)), with_umap=False)
    assert not points_of(pca).any()
    assert all("(0.0% of" in axis for axis in pca["axes"])


def test_without_umap_learn_there_is_pca_and_a_warning(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "umap", None)
    features = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
    assert [plane["title"] for plane in projections(features)] == ["PCA"]
    assert UMAP_MISSING in caplog.text
    with pytest.raises(ValueError, match="pip install umap-learn.*--no-umap"):
        projections(features, with_umap=True)


@pytest.mark.filterwarnings("ignore")  # numba warns while it compiles
def test_umap_keeps_groups_together_and_is_the_same_again():
    pytest.importorskip("umap")
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(3), 30)
    features = (rng.normal(scale=10, size=(3, 8))[groups] + rng.normal(size=(90, 8))).astype(np.float32)
    plane, pca = projections(features, seed=3)
    assert (plane["title"], pca["title"]) == ("UMAP", "PCA")
    points = points_of(plane)
    apart = np.linalg.norm(points[:, None] - points, axis=-1)
    near = apart.argsort(axis=1)[:, 1:6]
    assert (groups[near] == groups[:, None]).mean() > 0.95
    assert projections(features, seed=3)[0] == plane
    for few, metric in ((features, "cosine"), (features[:8], "euclidean"), (np.ones((20, 4), np.float32), "euclidean")):
        assert np.isfinite(points_of(projections(few, metric=metric)[0])).all()
