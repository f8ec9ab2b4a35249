"""Attention pooling for bags of cells: gated (Ilse et al. 2018, arXiv 1802.04712) and class-wise.

Dimension key:  B bags (patients), N cells per bag after padding, D feature dim, H attention dim, C classes
"""

import torch
from torch import Tensor, nn


class GatedAttentionPool(nn.Module):
    """Weighted mean of a bag's cell features; permutation-invariant in the cells.

    a_n = softmax_n( w . (tanh(V h_n) * sigmoid(U h_n)) ),   z = sum_n a_n h_n
    """

    def __init__(self, dim: int, hidden_dim: int = 128) -> None:
        super().__init__()
        self.tanh_proj = nn.Linear(dim, hidden_dim)
        self.gate_proj = nn.Linear(dim, hidden_dim)
        self.score = nn.Linear(hidden_dim, 1)

    def forward(self, cells: Tensor, is_cell: Tensor) -> tuple[Tensor, Tensor]:
        """Pool each bag.

        Args:
            cells: [B, N, D] frozen backbone features, zero where padded.
            is_cell: [B, N] bool, False on padding.

        Returns:
            bag features [B, D] and attention [B, N], which sums to 1 over a bag's real cells.
        """
        check_no_bag_is_empty(is_cell)
        gated = torch.tanh(self.tanh_proj(cells)) * torch.sigmoid(self.gate_proj(cells))  # [B, N, H]
        scores = self.score(gated).squeeze(-1).masked_fill(~is_cell, float("-inf"))  # [B, N]
        attention = scores.softmax(dim=1)  # [B, N]
        return torch.einsum("bn,bnd->bd", attention, cells), attention


class ClassWiseAttentionPool(nn.Module):
    """One weighted mean of a bag's cell features per class ("multi-column" attention).

    a_nc = softmax_n( w_c . tanh(V h_n) ),   z_c = sum_n a_nc h_n
    """

    def __init__(self, dim: int, n_classes: int, hidden_dim: int = 128) -> None:
        super().__init__()
        self.tanh_proj = nn.Linear(dim, hidden_dim)
        self.score = nn.Linear(hidden_dim, n_classes)

    def forward(self, cells: Tensor, is_cell: Tensor) -> tuple[Tensor, Tensor]:
        """Pool each bag once per class.

        Args:
            cells: [B, N, D] frozen backbone features, zero where padded.
            is_cell: [B, N] bool, False on padding.

        Returns:
            bag features [B, C, D] and attention [B, C, N], which sums to 1 over a bag's real cells for each class.
        """
        check_no_bag_is_empty(is_cell)
        scores = self.score(torch.tanh(self.tanh_proj(cells))).transpose(1, 2)  # [B, C, N]
        attention = scores.masked_fill(~is_cell[:, None], float("-inf")).softmax(dim=2)  # [B, C, N]
        return attention @ cells, attention


def check_no_bag_is_empty(is_cell: Tensor) -> None:
    """Raise a ValueError that names the bags [B, N] without a cell, for which no mean is defined."""
    empty = (~is_cell.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"bags {empty} of this batch have no cells; drop such patients when building the split")
