"""Stochastic depth (Huang et al. 2016, arXiv 1603.09382): residual branches that some samples skip while training.

Two ways to the same expectation: `DropPath` computes a branch for every sample and zeroes some results;
`choose_samples` names the samples to compute it for at all, which saves the skipped work (DINOv2, section 5).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

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


@dataclass(frozen=True)
class BatchShare:
    """Which samples of a larger batch these are: number `index`, index + n_shares, index + 2 n_shares, ..."""

    index: int = 0
    n_shares: int = 1


_share = BatchShare()


@contextmanager
def batch_share(share: BatchShare) -> Iterator[None]:
    """Samples in this context, forward and backward, are a share of a batch that other processes, or other parts of the
    step, have the rest of: who is dropped is then drawn for the whole batch, so that it does not depend on its cutting.
    """
    global _share
    before, _share = _share, share
    try:
        yield
    finally:
        _share = before


def n_kept_samples(n_samples: int, drop_rate: float) -> int:
    """How many of a batch's samples a branch is computed for: the rest is dropped, but one always stays."""
    return max(int(n_samples * (1 - drop_rate)), 1)


def choose_samples(n_samples: int, drop_rate: float, device: torch.device) -> tuple[Tensor | None, float]:
    """Samples to compute a branch for, uniformly at random, and what to multiply their results by.

    The draw is made on the host, which knows without waiting how many they are. Where all shares are
    drawn with equal generators, each gets its part of one draw for all.

    Returns:
        different indices of 0 .. n_samples - 1, int64 (None where all take part; a share may have none at all), and
        samples over kept samples of the whole batch.
    """
    n_total = n_samples * _share.n_shares
    n_kept = n_kept_samples(n_total, drop_rate)
    if n_kept == n_total:
        return None, 1.0
    kept = torch.randperm(n_total, device="cpu")[:n_kept]
    if _share.n_shares > 1:
        kept = kept[kept % _share.n_shares == _share.index] // _share.n_shares
    if device.type == "cuda":
        kept = kept.pin_memory().to(device, non_blocking=True)
    return kept, n_total / n_kept
