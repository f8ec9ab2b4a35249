"""Retrieval of cells of the same class by cosine similarity.

Dimension key:  N gallery cells, M queries, D embedding dim
"""

from collections.abc import Sequence

import numpy as np
from sklearn.preprocessing import normalize

KS = (1, 5, 10)
CHUNK = 256  # queries at a time: some 10 KB for each gallery cell


def retrieval_scores(
    gallery: np.ndarray,
    gallery_labels: np.ndarray,
    queries: np.ndarray,
    query_labels: np.ndarray,
    ks: Sequence[int] = KS,
) -> dict[str, np.ndarray]:
    """Rank the gallery [N, D] for each query [M, D] by cosine, and score the ranking by the query's class.

    Returns:
        `precision_at_<k>`, the share of the class among the first k cells (of all N, if k is larger);
        `average_precision`, the mean precision at the ranks of the class, 0 if the gallery has none of it; and
        `chance`, the share of the class in the gallery; float64 [M] each. Of cells with equal similarity the first
        comes first.
    """
    known = normalize(gallery.astype(np.float64)).T  # [D, N]
    ranks = np.arange(1, len(gallery) + 1)
    of_chunks: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(queries), CHUNK):
        similarity = normalize(queries[start : start + CHUNK].astype(np.float64)) @ known  # [m, N]
        order = np.argsort(-similarity, axis=1, kind="stable")
        is_same = gallery_labels[order] == query_labels[start : start + CHUNK, None]  # [m, N]
        precision = is_same.cumsum(axis=1) / ranks
        n_same = is_same.sum(axis=1)
        scores = {f"precision_at_{k}": precision[:, min(k, len(ranks)) - 1] for k in ks}
        scores["average_precision"] = (precision * is_same).sum(axis=1) / np.maximum(n_same, 1)
        scores["chance"] = n_same / len(ranks)
        for name, values in scores.items():
            of_chunks.setdefault(name, []).append(values)
    return {name: np.concatenate(values) for name, values in of_chunks.items()}
