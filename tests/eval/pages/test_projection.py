import sys

import numpy as np
import pytest

from dinov2.eval.pages import projection
from dinov2.eval.pages.projection import (
    UMAP_MISSING,
    has_umap,
    nearest_cells,
    pca_projection,
    projections,
    umap_projection,
)


@pytest.mark.parametrize("shape", [(200, 12), (15, 60)])
def test_pca_is_the_svd_with_fixed_signs(shape):
    features = (np.random.default_rng(0).normal(size=shape) * np.linspace(3, 1, shape[1]) + 5).astype(np.float32)
    pca = pca_projection(features)
    centred = features.astype(np.float64) - features.astype(np.float64).mean(axis=0)
    _, singular, directions = np.linalg.svd(centred, full_matrices=False)
    directions *= np.sign(directions[range(len(directions)), np.abs(directions).argmax(axis=1)])[:, None]
    np.testing.assert_allclose(pca.points, centred @ directions[:2].T, atol=1e-8)
    shares = (singular**2 / (singular**2).sum())[:2]
    assert pca.axes == tuple(f"Component {i + 1} ({share:.1%} of the variance)" for i, share in enumerate(shares))
    np.testing.assert_allclose(pca_projection(features + 100).points, pca.points, atol=1e-3)


def test_pca_is_zero_where_there_is_no_direction():
    for features in (np.ones((1, 4)), np.ones((5, 4))):
        pca = pca_projection(features)
        assert pca.points.shape == (len(features), 2)
        assert not pca.points.any()
        assert all("(0.0% of" in axis for axis in pca.axes)
    pca = pca_projection(np.array([[0.0], [1.0], [5.0]]))
    np.testing.assert_allclose(pca.points, [[-2, 0], [-1, 0], [3, 0]])
    assert "(100.0% of" in pca.axes[0]


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_neighbours_are_other_cells_nearest_first(metric):
    features = np.random.default_rng(1).normal(size=(60, 5)).astype(np.float32)
    positions, distances = nearest_cells(features, 7, metric)
    x = features.astype(np.float64)
    if metric == "cosine":
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        expected = 1 - x @ x.T
    else:
        expected = np.linalg.norm(x[:, None] - x, axis=-1)
    np.fill_diagonal(expected, np.inf)
    np.testing.assert_array_equal(positions, np.argsort(expected, axis=1, kind="stable")[:, :7])
    np.testing.assert_allclose(distances, np.sort(expected, axis=1)[:, :7], rtol=1e-6)


def test_a_cell_is_never_its_own_neighbour_among_copies():
    positions, _ = nearest_cells(np.ones((9, 3), np.float32), 4)
    assert positions.shape == (9, 4)
    assert all(i not in row for i, row in enumerate(positions.tolist()))
    assert nearest_cells(np.ones((1, 3), np.float32), 0)[0].shape == (1, 0)


def test_umap_without_the_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ModuleNotFoundError, match="pip install umap-learn"):
        umap_projection(np.random.default_rng(0).normal(size=(20, 3)))
    assert "--no-umap" in UMAP_MISSING


def test_umap_of_too_few_cells_is_an_error():
    with pytest.raises(ValueError, match="3 cells are too few"):
        umap_projection(np.zeros((3, 2)))


def test_umap_comes_first_where_it_can_be_computed(monkeypatch, caplog):
    features = np.random.default_rng(0).normal(size=(20, 3))
    monkeypatch.setattr(projection, "umap_projection", lambda *_: projection.Projection("UMAP", ("a", "b"), features))
    monkeypatch.setattr(projection, "has_umap", lambda: True)
    assert [plane.title for plane in projections(features, None)[0]] == ["UMAP", "PCA"]
    assert [plane.title for plane in projections(features, False)[0]] == ["PCA"]
    assert projections(features[:7], None)[1] == "UMAP needs at least 8 cells."
    monkeypatch.setattr(projection, "has_umap", lambda: False)
    assert "umap-learn was not installed" in projections(features, None)[1]
    assert "pip install umap-learn" in caplog.text


@pytest.mark.skipif(not has_umap(), reason="needs umap-learn")
@pytest.mark.filterwarnings("ignore")  # numba warns while it compiles
def test_umap_keeps_groups_together_and_is_the_same_again():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(3), 30)
    features = (rng.normal(scale=10, size=(3, 8))[groups] + rng.normal(size=(90, 8))).astype(np.float32)
    points = umap_projection(features, seed=3).points
    assert points.shape == (90, 2)
    near, _ = nearest_cells(points, 5)
    assert (groups[near] == groups[:, None]).mean() > 0.95
    np.testing.assert_array_equal(umap_projection(features, seed=3).points, points)
    assert np.isfinite(umap_projection(features, "cosine").points).all()
    for few in (features[:8], np.ones((20, 4), np.float32)):
        assert np.isfinite(umap_projection(few).points).all()
