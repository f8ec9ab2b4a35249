"""Features as points of a plane (PCA, UMAP), and the nearest neighbours of each cell.

Dimension key:  N cells, D embedding dim, k neighbours
"""

import importlib.util
import warnings

import numpy as np
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

MIN_CELLS_FOR_UMAP = 8
UMAP_MISSING = "UMAP needs the package umap-learn, which is not installed; `pip install umap-learn`, or give --no-umap"


def pca_projection(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first two principal components of the cells and their shares of the variance.

    Signs are fixed: the largest loading of each component is positive. Components that do not exist (one cell, one
    feature, equal features) are 0.

    Args:
        features: [N, D].

    Returns:
        float64 [N, 2] and float64 [2].
    """
    n_components = min(2, *features.shape)
    pca = PCA(n_components, svd_solver="covariance_eigh" if len(features) > 1 else "full")
    with np.errstate(invalid="ignore", divide="ignore"):  # no variance to have a share of
        points = pca.fit_transform(features.astype(np.float64))
    padding = (0, 2 - n_components)
    return np.pad(points, ((0, 0), padding)), np.pad(np.nan_to_num(pca.explained_variance_ratio_), padding)


def nearest_cells(features: np.ndarray, k: int, metric: str = "euclidean") -> tuple[np.ndarray, np.ndarray]:
    """Search the k nearest other cells of each cell exactly, nearest first.

    Args:
        features: [N, D].
        k: at most N - 1; may be 0.
        metric: "euclidean" or "cosine" (1 - cosine similarity).

    Returns:
        positions int64 [N, k] and distances float64 [N, k].
    """
    if k == 0:
        return np.empty((len(features), 0), np.int64), np.empty((len(features), 0))
    search = NearestNeighbors(n_neighbors=k, algorithm="brute", metric=metric).fit(features.astype(np.float64))
    distances, positions = search.kneighbors()  # of the fitted cells, each without itself
    return positions, distances


def has_umap() -> bool:
    """Return True if umap-learn is installed (importing it takes seconds)."""
    return importlib.util.find_spec("umap") is not None


def umap_projection(features: np.ndarray, metric: str = "euclidean", seed: int = 0) -> np.ndarray:
    """Compute UMAP (McInnes et al. 2018, arXiv 1802.03426) with the defaults of umap-learn.

    The same features and seed give the same points on the same machine.

    Args:
        features: [N, D], N at least `MIN_CELLS_FOR_UMAP`.
        metric: "euclidean" or "cosine".
        seed: of UMAP's random numbers.

    Returns:
        float32 [N, 2].

    Raises:
        ModuleNotFoundError: without umap-learn.
        ValueError: for too few cells.
    """
    n = len(features)
    if n < MIN_CELLS_FOR_UMAP:
        raise ValueError(f"UMAP: {n} cells are too few; give at least {MIN_CELLS_FOR_UMAP}, or --no-umap")
    try:
        import umap
    except ImportError as error:
        raise ModuleNotFoundError(UMAP_MISSING, name="umap") from error
    reducer = umap.UMAP(n_neighbors=min(15, n - 1), metric=metric, random_state=seed, n_jobs=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"(umap|sklearn)\b.*")  # a disconnected graph
        return np.asarray(reducer.fit_transform(features), dtype=np.float32)
