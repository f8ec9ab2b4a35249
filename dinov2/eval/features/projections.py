"""Project features on a plane by PCA and UMAP.

Letters: N cells, D numbers each
"""

import logging
import warnings
from typing import Any

import numpy as np
from sklearn.decomposition import PCA

logger = logging.getLogger("dinov2")

UMAP_MISSING = "UMAP needs the package umap-learn, which is not installed; `pip install umap-learn`, or give --no-umap"
MIN_CELLS_FOR_UMAP = 8


def projections(
    features: np.ndarray, with_umap: bool | None = None, metric: str = "euclidean", seed: int = 0
) -> list[dict[str, Any]]:
    """Project features [N, D] on planes by UMAP (McInnes et al. 2018, arXiv 1802.03426) and PCA.

    UMAP has the defaults of umap-learn; the same features and seed give the same points on the same machine.

    Returns:
        title, axes, x and y of each plane, UMAP first; no UMAP of too few cells, if `with_umap` is False, or if it is
        None and umap-learn is missing (True makes that an error).
    """
    pca = PCA(2, svd_solver="covariance_eigh")
    with np.errstate(invalid="ignore"):  # equal features have no variance to have a share of
        points = pca.fit_transform(features.astype(np.float64))
    shares = np.nan_to_num(pca.explained_variance_ratio_)
    axes = [f"Component {i} ({share:.1%} of the variance)" for i, share in enumerate(shares, start=1)]
    planes = [_plane("PCA", axes, points)]
    if with_umap is False or len(features) < MIN_CELLS_FOR_UMAP:
        return planes
    try:
        import umap
    except ImportError as error:
        if with_umap:
            raise ValueError(UMAP_MISSING) from error
        logger.warning("explorer: %s", UMAP_MISSING)
        return planes
    logger.info("explorer: UMAP, which may take minutes")
    reducer = umap.UMAP(n_neighbors=min(15, len(features) - 1), metric=metric, random_state=seed, n_jobs=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"(umap|sklearn)\b.*")  # a disconnected graph
        return [_plane("UMAP", ["UMAP 1", "UMAP 2"], reducer.fit_transform(features)), *planes]


def _plane(title: str, axes: list[str], points: np.ndarray) -> dict[str, Any]:
    (x, y), low, high = map(rounded, points.T), points.min(axis=0), points.max(axis=0)
    middle, size = rounded((low + high) / 2), rounded(high - low)
    return {"title": title, "axes": axes, "x": x, "y": y, "middle": middle, "size": size}


def rounded(values: np.ndarray, digits: int = 6) -> list[float]:
    """Round to significant digits, which keeps the page small."""
    return [float(f"{value:.{digits}g}") for value in values.tolist()]
