"""Stochastic depth (Huang et al. 2016, arXiv 1603.09382): residual branches that some samples skip while training.

Two ways to the same expectation: `DropPath` computes a branch for every sample and zeroes some results;
`choose_samples` names the samples to compute it for at all, which saves the skipped work (DINOv2, section 5).
"""

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    """Zero a sample's branch with probability `drop_prob` and divide the kept ones by 1 - drop_prob; training only."""

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...] to the same shape."""
        if not self.training or not self.drop_prob:
            return x
        keep_prob = 1.0 - self.drop_prob
        kept = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) < keep_prob  # [B, 1, ...]
        return x * (kept.to(x.dtype) / keep_prob) if keep_prob else torch.zeros_like(x)


def n_kept_samples(n_samples: int, drop_rate: float) -> int:
    """How many of a batch's samples a branch is computed for: the rest is dropped, but one always stays."""
    return max(int(n_samples * (1 - drop_rate)), 1)


def choose_samples(n_samples: int, n_kept: int, device: torch.device) -> Tensor:
    """`n_kept` different sample indices of 0 .. n_samples - 1, int64 [n_kept], uniformly at random."""
    return torch.randperm(n_samples, device=device)[:n_kept]
