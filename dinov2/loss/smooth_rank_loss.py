"""Smooth rank of features: the number of directions they use (RankMe, Garrido et al. 2023, arXiv 2210.02885)."""

import torch
from torch import Tensor


def smooth_rank(features: Tensor, eps: float = 1e-7) -> Tensor:
    """Compute exp(entropy of the normalised singular values) of features [N, D]: between 1 and min(N, D).

    Singular values near 0 are left out of the value and of its gradient, so that features of deficient rank give
    finite numbers.
    """
    with torch.autocast(features.device.type, enabled=False):
        singular_values = torch.linalg.svdvals(features.float())
        p = singular_values / (singular_values.sum() + eps)
        p = p[p > eps]
        return torch.exp(-(p * p.log()).sum())


def smooth_rank_loss(embedding_matrix: Tensor, eps: float = 1e-7) -> Tensor:
    """Return minus `smooth_rank` of features [N, D]; minimising it spreads them over more directions."""
    return -smooth_rank(embedding_matrix, eps)
