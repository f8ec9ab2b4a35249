"""Features as points in the plane, to look at: PCA and UMAP, both without chance; and who is whose neighbour.

Dimension key:  N cells, D embedding dim, k neighbours
"""

import importlib.util
import warnings

import numpy as np
import torch

from dinov2.eval.knn import Neighbours, nearest_neighbours

UMAP_NEIGHBOURS = 15  # umap-learn's own, the cell itself among them
UMAP_MIN_DIST = 0.1
MIN_CELLS_FOR_UMAP = 8  # fewer have no neighbourhoods to speak of, and its spectral start fails
MIN_CELLS_FOR_SPECTRAL_START = 50
UMAP_MISSING = "UMAP needs the package umap-learn, which is not installed; `pip install umap-learn`, or give --no-umap"


def pca_projection(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first two principal components.

    Their signs are fixed: of each component's D loadings the largest by size is positive. Components that the cells do
    not have (one cell, one feature, equal features) are 0.

    Args:
        features: [N, D].

    Returns:
        float64 [N, 2] of coordinates, and float64 [2] of their shares of the variance.
    """
    centred = torch.as_tensor(features).to(torch.float64, copy=True)
    centred -= centred.mean(dim=0)
    n, dim = centred.shape
    coordinates, shares = torch.zeros(n, 2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    total = float(centred.square().sum())
    # the smaller of both products has the same eigenvalues: D x D of features, or N x N of cells
    values, vectors = torch.linalg.eigh(centred.T @ centred if dim <= n else centred @ centred.T)  # ascending
    for i in range(min(2, len(values))):
        value = float(values[-1 - i])
        if value <= 1e-12 * total or total == 0:
            continue  # rounding, not a direction
        vector = vectors[:, -1 - i]
        direction = vector if dim <= n else centred.T @ vector / value**0.5  # [D], of length 1
        direction = direction * direction[direction.abs().argmax()].sign()
        coordinates[:, i] = centred @ direction
        shares[i] = value / total
    return coordinates.numpy(), shares.numpy()


def neighbours_of_each(features: np.ndarray, k: int, is_cosine: bool = False) -> Neighbours:
    """The k nearest other cells of each cell, exactly, nearest first; of cells at one distance the earlier is nearer.

    Args:
        features: [N, D].
        k: at most N - 1; may be 0.
        is_cosine: as for `nearest_neighbours`.

    Raises:
        ValueError: as `nearest_neighbours`.
    """
    n = len(features)
    found = nearest_neighbours(features, features, min(k + 1, n), is_cosine)
    is_other = found.positions != np.arange(n)[:, None]  # [N, k + 1]
    # among more copies of a cell than were asked for, the cell itself may be missing; then the last one is dropped
    has_itself = ~is_other.all(axis=1)
    is_other[~has_itself, -1] = False
    kept = found.positions.shape[1] - 1
    return Neighbours(found.positions[is_other].reshape(n, kept), found.distances[is_other].reshape(n, kept))


def has_umap() -> bool:
    """Whether umap-learn is installed."""
    return importlib.util.find_spec("umap") is not None  # without the seconds that importing it takes


def umap_projection(features: np.ndarray, is_cosine: bool = False, seed: int = 0) -> np.ndarray:
    """UMAP (McInnes et al. 2018, arXiv 1802.03426) from exact neighbours: 15 with the cell itself, min_dist 0.1.

    The same features and seed give the same points on the same machine. Distances within the picture and sizes of
    groups mean little; who stands beside whom means something.

    Args:
        features: [N, D], N at least `MIN_CELLS_FOR_UMAP`.
        is_cosine: compare directions instead of distances.
        seed: of what is drawn.

    Returns:
        float32 [N, 2].

    Raises:
        ModuleNotFoundError: without umap-learn.
        ValueError: for too few cells, and as `nearest_neighbours`.
    """
    n = len(features)
    if n < MIN_CELLS_FOR_UMAP:
        raise ValueError(f"UMAP: {n} cells are too few; give at least {MIN_CELLS_FOR_UMAP}, or --no-umap")
    try:
        import umap
    except ImportError as error:
        raise ModuleNotFoundError(UMAP_MISSING, name="umap") from error
    if is_cosine:
        features = features / np.linalg.norm(features, axis=1, keepdims=True)
    n_neighbours = min(UMAP_NEIGHBOURS, n - 1)
    others = neighbours_of_each(features, n_neighbours - 1)
    # what umap-learn takes: the cell itself first, and distances that are not squared
    positions = np.concatenate([np.arange(n)[:, None], others.positions], axis=1)
    distances = np.concatenate([np.zeros((n, 1)), np.sqrt(others.distances)], axis=1)
    start, _ = pca_projection(features)
    reducer = umap.UMAP(
        n_neighbors=n_neighbours,
        min_dist=UMAP_MIN_DIST,
        init="spectral" if n >= MIN_CELLS_FOR_SPECTRAL_START else _spread(start, seed),
        random_state=seed,
        n_jobs=1,  # what a seed needs; asked for here, umap-learn does not warn of it
        precomputed_knn=(positions, distances.astype(np.float32), None),
        force_approximation_algorithm=True,  # or it computes the neighbours of few cells again
    )
    with warnings.catch_warnings():
        # neither new cells to place nor a disconnected graph is news to who looks at a picture of these cells
        warnings.filterwarnings("ignore", category=UserWarning, module=r"(umap|sklearn)\b.*")
        points = reducer.fit_transform(features.astype(np.float32, copy=False))
    return np.ascontiguousarray(points, dtype=np.float32)


def _spread(points: np.ndarray, seed: int) -> np.ndarray:
    """A start for UMAP from PCA: within 10 units, with copies of a cell a little apart."""
    size = np.abs(points).max()
    scaled = points * (10 / size) if size > 0 else points
    return (scaled + np.random.default_rng(seed).normal(scale=1e-3, size=points.shape)).astype(np.float32)
