"""A learnt factor per channel on a residual branch (Touvron et al. 2021, arXiv 2103.17239, "LayerScale")."""

import torch
from torch import Tensor, nn


class LayerScale(nn.Module):
    """Multiply x by gamma [D], which starts at `init_values`; `inplace` overwrites x."""

    def __init__(self, dim: int, init_values: float | Tensor = 1e-5, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace
        self.gamma = nn.Parameter(init_values * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Scale the channels of [..., D]."""
        return x.mul_(self.gamma) if self.inplace else x * self.gamma
