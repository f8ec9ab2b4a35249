"""Metadata guidance: features forget or keep a value that is known of each image, such as its slide (arXiv 2606.05107).

Dimension key:  R rows (crops of the global batch), V values of the metadata, d dim of the projections
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MetadataLoss(nn.Module):
    """InfoNCE of a row's projection z against a bank with one prototype p per value:

        loss = -log( exp(cos(z, p_own) / temperature) / sum_v exp(cos(z, p_v) / temperature) )

    The bank follows the projections: after each step, p_v <- momentum * p_v + (1 - momentum) * mean of the unit vectors
    z with value v. Values that no step has had yet have no prototype, and rows with such a value, or with none, do not
    take part.
    """

    prototypes: Tensor

    def __init__(self, n_values: int, dim: int, temperature: float = 0.1, momentum: float = 0.9) -> None:
        super().__init__()
        self.temperature, self.momentum = temperature, momentum
        self.register_buffer("prototypes", torch.zeros(n_values, dim))  # [V, d]; zero: no prototype yet
        self._newest: tuple[Tensor, Tensor] | None = None  # unit vectors [R, d] and their values [R]

    def forward(self, projections: Tensor, values: Tensor) -> Tensor:
        """Average the loss over the rows that take part; 0 if there are none.

        Args:
            projections: [R, d], of any length.
            values: int64 [R], positions in the bank; negative for a row without value.
        """
        with torch.autocast(projections.device.type, enabled=False):
            rows = F.normalize(projections.float(), dim=-1)  # [R, d]
            self._newest = rows.detach(), values
            has_prototype = self.prototypes.any(dim=1)  # [V]
            similarities = rows @ F.normalize(self.prototypes, dim=-1).T  # [R, V]
            # not -inf: before the first step no value has a prototype, and its rows would have NaN gradients
            logits = (similarities / self.temperature).masked_fill(~has_prototype, torch.finfo(torch.float32).min)
            losses = F.cross_entropy(logits, values.clamp(min=0), reduction="none")  # [R]
            takes_part = (values >= 0) & has_prototype[values.clamp(min=0)]  # [R]
            return torch.where(takes_part, losses, 0.0).sum() / takes_part.sum().clamp(min=1)

    @torch.no_grad()
    def update_bank(self) -> None:
        """Move the prototypes towards the newest rows; call it after a step."""
        assert self._newest is not None, "a step has rows"
        rows, values = self._newest
        has_value = (values >= 0) & torch.isfinite(rows).all(dim=1)  # NaN would stay in the bank
        n_values = len(self.prototypes)
        is_of = F.one_hot(torch.where(has_value, values, n_values), n_values + 1)[:, :n_values].to(rows.dtype)  # [R, V]
        counts = is_of.sum(dim=0).unsqueeze(1)  # [V, 1]
        means = is_of.T @ torch.where(has_value.unsqueeze(1), rows, 0.0) / counts.clamp(min=1)  # [V, d]
        is_new = ~self.prototypes.any(dim=1, keepdim=True)
        moved = torch.where(is_new, means, self.momentum * self.prototypes + (1 - self.momentum) * means)
        self.prototypes.copy_(torch.where(counts > 0, moved, self.prototypes))


def reverse_gradient(x: Tensor) -> Tensor:
    """Return x; its gradient is multiplied by -1 (Ganin and Lempitsky 2015, arXiv 1409.7495)."""
    return 2 * x.detach() - x
