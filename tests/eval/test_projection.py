import numpy as np
import pytest
from sklearn.decomposition import PCA

from dinov2.eval.projection import (
    UMAP_MISSING,
    has_umap,
    neighbours_of_each,
    pca_projection,
    umap_projection,
)


@pytest.mark.parametrize("shape", [(200, 12), (15, 60)])
def test_pca_is_scikit_learns_up_to_signs_which_are_fixed(shape):
    features = (np.random.default_rng(0).normal(size=shape) * np.linspace(3, 1, shape[1]) + 5).astype(np.float32)
    points, shares = pca_projection(features)
    reference = PCA(2, svd_solver="full").fit(features.astype(np.float64))
    expected = reference.transform(features.astype(np.float64))
    expected *= np.sign(reference.components_[range(2), np.abs(reference.components_).argmax(axis=1)])
    np.testing.assert_allclose(points, expected, atol=1e-9)
    np.testing.assert_allclose(shares, reference.explained_variance_ratio_, atol=1e-12)
    # turned over, the features give the same picture turned over, and nothing else
    np.testing.assert_allclose(pca_projection(-features)[0], -points, atol=1e-9)
    np.testing.assert_allclose(pca_projection(features + 100)[0], points, atol=1e-3)


def test_pca_of_too_little_is_zero_where_there_is_no_direction():
    for features in (np.ones((1, 4)), np.ones((5, 4))):
        points, shares = pca_projection(features)
        assert not points.any()
        assert not shares.any()
    points, shares = pca_projection(np.array([[0.0], [1.0], [5.0]]))
    np.testing.assert_allclose(points, [[-2, 0], [-1, 0], [3, 0]])
    np.testing.assert_allclose(shares, [1, 0])


def test_neighbours_are_other_cells_nearest_first():
    features = np.random.default_rng(1).normal(size=(60, 5)).astype(np.float32)
    found = neighbours_of_each(features, 7)
    squared = np.square(features.astype(np.float64)[:, None] - features.astype(np.float64)).sum(axis=-1)
    np.fill_diagonal(squared, np.inf)
    np.testing.assert_array_equal(found.positions, np.argsort(squared, axis=1, kind="stable")[:, :7])
    np.testing.assert_allclose(found.distances, np.sort(squared, axis=1)[:, :7], rtol=1e-9)


def test_a_cell_is_never_its_own_neighbour_among_copies():
    found = neighbours_of_each(np.ones((9, 3), np.float32), 4)
    assert found.positions.shape == (9, 4)
    assert all(i not in row for i, row in enumerate(found.positions.tolist()))
    assert neighbours_of_each(np.ones((1, 3), np.float32), 0).positions.shape == (1, 0)


def test_umap_without_the_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "umap", None)
    with pytest.raises(ModuleNotFoundError, match="pip install umap-learn"):
        umap_projection(np.random.default_rng(0).normal(size=(20, 3)))
    assert "--no-umap" in UMAP_MISSING


def test_umap_of_too_few_cells_is_an_error():
    with pytest.raises(ValueError, match="3 cells are too few"):
        umap_projection(np.zeros((3, 2)))


@pytest.mark.skipif(not has_umap(), reason="needs umap-learn")
@pytest.mark.filterwarnings("ignore")  # what numba says while it compiles
def test_umap_keeps_groups_together_and_is_the_same_again():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(3), 30)
    features = (rng.normal(scale=10, size=(3, 8))[groups] + rng.normal(size=(90, 8))).astype(np.float32)
    points = umap_projection(features, seed=3)
    assert points.dtype == np.float32
    assert points.shape == (90, 2)
    near = neighbours_of_each(points, 5).positions
    assert (groups[near] == groups[:, None]).mean() > 0.95
    np.testing.assert_array_equal(umap_projection(features, seed=3), points)
    for few in (features[:8], np.ones((20, 4), np.float32)):
        assert np.isfinite(umap_projection(few)).all()
