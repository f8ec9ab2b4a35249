"""Smooth rank of a batch of features: how many directions they use (RankMe, Garrido et al. 2023, arXiv 2210.02885)."""

import torch
from torch import Tensor


def smooth_rank(features: Tensor, eps: float = 1e-7) -> Tensor:
    """exp(entropy of the normalised singular values) of features [N, D]: between 1 and min(N, D).

    Singular values of (nearly) nothing contribute nothing, to the value and to its gradient, so features of deficient
    rank give finite numbers.
    """
    with torch.autocast(features.device.type, enabled=False):
        singular_values = torch.linalg.svdvals(features.float())
        p = singular_values / (singular_values.sum() + eps)
        p = p[p > eps]
        return torch.exp(-(p * p.log()).sum())


def smooth_rank_loss(embedding_matrix: Tensor, eps: float = 1e-7) -> Tensor:
    """Minus the smooth rank: minimising it spreads features [N, D] over more directions."""
    return -smooth_rank(embedding_matrix, eps)
