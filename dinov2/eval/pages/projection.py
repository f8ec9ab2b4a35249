"""Features as points of a plane (PCA, UMAP), and the nearest neighbours of each cell.

Dimension key:  N cells, D embedding dim, k neighbours
"""

import importlib.util
import logging
import warnings
from dataclasses import dataclass

import numpy as np
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize

logger = logging.getLogger("dinov2")

MIN_CELLS_FOR_UMAP = 8
UMAP_MISSING = "UMAP needs the package umap-learn, which is not installed; `pip install umap-learn`, or give --no-umap"


@dataclass(frozen=True)
class Projection:
    """Cells as points: a title, titles of both axes and coordinates [N, 2]."""

    title: str
    axes: tuple[str, str]
    points: np.ndarray


def pca_projection(features: np.ndarray) -> Projection:
    """Project features [N, D] on their first two principal components.

    Signs are fixed: the largest loading of each component is positive. Components that do not exist (one cell, one
    feature, equal features) are 0.
    """
    n_components = min(2, *features.shape)
    pca = PCA(n_components, svd_solver="covariance_eigh" if len(features) > 1 else "full")
    with np.errstate(invalid="ignore", divide="ignore"):  # no variance to have a share of
        points = pca.fit_transform(features.astype(np.float64))
    padding = (0, 2 - n_components)
    first, second = np.pad(np.nan_to_num(pca.explained_variance_ratio_), padding)
    axes = (f"Component 1 ({first:.1%} of the variance)", f"Component 2 ({second:.1%} of the variance)")
    return Projection("PCA", axes, np.pad(points, ((0, 0), padding)))


def has_umap() -> bool:
    """Return True if umap-learn is installed (importing it takes seconds)."""
    return importlib.util.find_spec("umap") is not None


def umap_projection(features: np.ndarray, metric: str = "euclidean", seed: int = 0) -> Projection:
    """Project features [N, D] by UMAP (McInnes et al. 2018, arXiv 1802.03426) with the defaults of umap-learn.

    The same features and seed give the same points on the same machine.

    Raises:
        ModuleNotFoundError: without umap-learn.
        ValueError: for fewer cells than `MIN_CELLS_FOR_UMAP`.
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
        return Projection("UMAP", ("UMAP 1", "UMAP 2"), reducer.fit_transform(features))


def projections(
    features: np.ndarray, with_umap: bool | None, metric: str = "euclidean", seed: int = 0
) -> tuple[list[Projection], str]:
    """Compute UMAP (if `with_umap` is True, or None and it can be computed) and PCA.

    Returns:
        the projections, and the reason if UMAP is not among them although it was not switched off.
    """
    logger.info("explorer: PCA")
    pca = pca_projection(features)
    if with_umap is False:
        return [pca], ""
    if len(features) < MIN_CELLS_FOR_UMAP:
        return [pca], f"UMAP needs at least {MIN_CELLS_FOR_UMAP} cells."
    if with_umap is None and not has_umap():
        logger.warning("explorer: %s", UMAP_MISSING)
        return [pca], "No UMAP, because umap-learn was not installed where this page was made."
    logger.info("explorer: UMAP, which may take minutes")
    return [umap_projection(features, metric, seed), pca], ""


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
    logger.info("explorer: %d neighbours of each of %s cells", k, f"{len(features):,}")
    features = features.astype(np.float64)
    search = NearestNeighbors(n_neighbors=k, algorithm="brute")
    search.fit(normalize(features) if metric == "cosine" else features)
    distances, positions = search.kneighbors()  # of the fitted cells, each without itself
    # of features with length 1, the squared distance is 2 - 2 cosine
    return positions, distances**2 / 2 if metric == "cosine" else distances
