"""Stochastic depth (Huang et al. 2016, arXiv 1603.09382): during training, some samples skip a residual branch.

`DropPath` computes a branch for every sample and zeroes some results. `choose_samples` selects the samples to compute
it for, which saves the skipped work (DINOv2, section 5). Both have the same expectation.
"""

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    """Zero a sample's branch with probability `drop_prob` and divide the others by 1 - drop_prob, in training only."""

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        """Drop samples of a batch [B, ...]."""
        if not self.training or not self.drop_prob:
            return x
        keep_prob = 1.0 - self.drop_prob
        kept = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) < keep_prob  # [B, 1, ...]
        return x * (kept.to(x.dtype) / keep_prob) if keep_prob else torch.zeros_like(x)


def n_kept_samples(n_samples: int, drop_rate: float) -> int:
    """Return the number of a batch's samples for which a branch is computed: at least one."""
    return max(int(n_samples * (1 - drop_rate)), 1)


def choose_samples(n_samples: int, drop_rate: float, device: torch.device) -> Tensor | None:
    """Choose the samples to compute a branch for, uniformly at random and without repetition.

    The host draws them, so it need not wait for the device.

    Returns:
        int64 indices into 0 .. n_samples - 1, or None if no sample is dropped.
    """
    n_kept = n_kept_samples(n_samples, drop_rate)
    if n_kept == n_samples:
        return None
    kept = torch.randperm(n_samples, device="cpu")[:n_kept]
    if device.type == "cuda":
        kept = kept.pin_memory().to(device, non_blocking=True)
    return kept
