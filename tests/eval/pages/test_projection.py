import sys

import numpy as np
import pytest

from dinov2.eval.pages.projection import UMAP_MISSING, has_umap, nearest_cells, pca_projection, umap_projection


@pytest.mark.parametrize("shape", [(200, 12), (15, 60)])
def test_pca_is_the_svd_with_fixed_signs(shape):
    features = (np.random.default_rng(0).normal(size=shape) * np.linspace(3, 1, shape[1]) + 5).astype(np.float32)
    points, shares = pca_projection(features)
    centred = features.astype(np.float64) - features.astype(np.float64).mean(axis=0)
    _, singular, directions = np.linalg.svd(centred, full_matrices=False)
    directions *= np.sign(directions[range(len(directions)), np.abs(directions).argmax(axis=1)])[:, None]
    np.testing.assert_allclose(points, centred @ directions[:2].T, atol=1e-8)
    np.testing.assert_allclose(shares, (singular**2 / (singular**2).sum())[:2], atol=1e-12)
    np.testing.assert_allclose(pca_projection(features + 100)[0], points, atol=1e-3)


def test_pca_is_zero_where_there_is_no_direction():
    for features in (np.ones((1, 4)), np.ones((5, 4))):
        points, shares = pca_projection(features)
        assert points.shape == (len(features), 2)
        assert not points.any()
        assert not shares.any()
    points, shares = pca_projection(np.array([[0.0], [1.0], [5.0]]))
    np.testing.assert_allclose(points, [[-2, 0], [-1, 0], [3, 0]])
    np.testing.assert_allclose(shares, [1, 0])


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


@pytest.mark.skipif(not has_umap(), reason="needs umap-learn")
@pytest.mark.filterwarnings("ignore")  # numba warns while it compiles
def test_umap_keeps_groups_together_and_is_the_same_again():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(3), 30)
    features = (rng.normal(scale=10, size=(3, 8))[groups] + rng.normal(size=(90, 8))).astype(np.float32)
    points = umap_projection(features, seed=3)
    assert points.dtype == np.float32
    assert points.shape == (90, 2)
    near, _ = nearest_cells(points, 5)
    assert (groups[near] == groups[:, None]).mean() > 0.95
    np.testing.assert_array_equal(umap_projection(features, seed=3), points)
    assert np.isfinite(umap_projection(features, "cosine")).all()
    for few in (features[:8], np.ones((20, 4), np.float32)):
        assert np.isfinite(umap_projection(few)).all()
