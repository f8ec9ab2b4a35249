"""Metadata guidance: features forget or keep a value that is known of each image, such as its slide (arXiv 2606.05107).

Dimension key:  R rows (crops), V values of the metadata, d dim of the projections
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.distributed import is_enabled


class MetadataLoss(nn.Module):
    """InfoNCE of a row's projection z against a bank with one prototype p per value:

        loss = -log( exp(cos(z, p_own) / temperature) / sum_v exp(cos(z, p_v) / temperature) )

    The bank follows the projections of the global batch: after each step, p_v <- momentum * p_v + (1 - momentum) * mean
    of the unit vectors z with value v. Values that no step has had yet have no prototype, and rows with such a value,
    or with none, do not take part.
    """

    prototypes: Tensor
    sums: Tensor

    def __init__(self, n_values: int, dim: int, temperature: float = 0.1, momentum: float = 0.9) -> None:
        super().__init__()
        self.temperature, self.momentum = temperature, momentum
        self.register_buffer("prototypes", torch.zeros(n_values, dim))  # [V, d]; zero: no prototype yet
        # of the present step, so never in a checkpoint
        self.register_buffer("sums", torch.zeros(n_values, dim + 1), persistent=False)  # [V, d + 1]: of z, and counts

    def takes_part(self, values: Tensor) -> Tensor:
        """Return whether each of the values [...] has a prototype, bool [...]; negative ones have none."""
        has_prototype = self.prototypes.any(dim=1)  # [V]
        return (values >= 0) & has_prototype[values.clamp(min=0)]

    def forward(self, projections: Tensor, values: Tensor) -> Tensor:
        """Sum the loss over the rows that take part, and queue the rows for the bank.

        Args:
            projections: [R, d], of any length.
            values: int64 [R], positions in the bank; negative for a row without value.
        """
        with torch.autocast(projections.device.type, enabled=False):
            rows = F.normalize(projections.float(), dim=-1)  # [R, d]
            self._queue(rows.detach(), values)
            similarities = rows @ F.normalize(self.prototypes, dim=-1).T  # [R, V]
            absent = ~self.prototypes.any(dim=1)  # [V]
            # not -inf: before the first step no value has a prototype, and its rows would have NaN gradients
            logits = (similarities / self.temperature).masked_fill(absent, torch.finfo(torch.float32).min)
            losses = F.cross_entropy(logits, values.clamp(min=0), reduction="none")  # [R]
            return torch.where(self.takes_part(values), losses, 0.0).sum()

    @torch.no_grad()
    def _queue(self, rows: Tensor, values: Tensor) -> None:
        has_value = (values >= 0) & torch.isfinite(rows).all(dim=1)  # NaN would stay in the bank
        weighted = torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)  # [R, d + 1]
        weighted = torch.where(has_value[:, None], weighted, 0.0)
        self.sums.index_add_(0, values.clamp(min=0), weighted)

    @torch.no_grad()
    def update_bank(self) -> None:
        """Move the prototypes towards the queued rows of all processes; call it once after a step."""
        if is_enabled():
            dist.all_reduce(self.sums)
        count = self.sums[:, -1:]  # [V, 1]
        means = self.sums[:, :-1] / count.clamp(min=1)
        is_new = ~self.prototypes.any(dim=1, keepdim=True)
        moved = torch.where(is_new, means, self.momentum * self.prototypes + (1 - self.momentum) * means)
        self.prototypes.copy_(torch.where(count > 0, moved, self.prototypes))
        self.sums.zero_()


def reverse_gradient(x: Tensor) -> Tensor:
    """Return x; its gradient is multiplied by -1 (Ganin and Lempitsky 2015, arXiv 1409.7495)."""
    return 2 * x.detach() - x
