"""From teacher logits to targets: Sinkhorn-Knopp and softmax centering, for the CLS and patch losses.

Dimension key:  R rows (CLS tokens or masked patches of this process), K prototypes
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dinov2.distributed import is_enabled


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, teacher_temp: float, n_rows_global: int | Tensor, n_iterations: int = 3) -> Tensor:
    """Assign rows to prototypes so that every prototype gets the same mass over all processes (SwAV, arXiv 2006.09882).

    The balanced matrix is diag(v) M diag(u) with M = exp(logits / temp). The iterations update only the two scaling
    vectors; M is multiplied by them once, at the end.

    Args:
        logits: [R, K] teacher outputs; R may differ between processes and may be 0.
        teacher_temp: temperature of the assignment.
        n_rows_global: R summed over all processes.
        n_iterations: rounds of prototype- then row-normalisation.

    Returns:
        float32 [R, K]; each row sums to 1.
    """
    n_rows, n_prototypes = logits.shape
    mass = logits.float() / teacher_temp  # [R, K]
    # Each row of M is divided by its largest entry, so that exp() neither overflows nor turns a whole row to 0. The
    # first v multiplies these factors back, relative to the largest over all processes.
    row_max = mass.amax(dim=1)  # [R]
    largest = row_max.max() if n_rows else row_max.new_full((), float("-inf"))
    if is_enabled():
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    mass.sub_(row_max.unsqueeze(1)).exp_()
    row_scale = torch.exp(row_max - largest)  # v: [R]
    column_scale = mass.new_ones(n_prototypes)  # u: [K]
    for _ in range(n_iterations):
        column_mass = row_scale @ mass  # [K]
        if is_enabled():
            dist.all_reduce(column_mass)
        # a prototype far from all rows has no mass to scale up
        column_scale = 1.0 / (n_prototypes * column_mass.clamp(min=torch.finfo(torch.float32).tiny))
        row_scale = 1.0 / (n_rows_global * (mass @ column_scale))
    return mass.mul_(column_scale).mul_((row_scale * n_rows_global).unsqueeze(1))


class TeacherCenter(nn.Module):
    """Moving average of teacher logits, subtracted before the softmax (DINO, arXiv 2104.14294, section 3.1).

    The all-reduce of an update runs beside the student's forward and takes effect at the next
    `softmax_center_teacher`: a step is centred by earlier steps only.
    """

    center: Tensor

    def __init__(self, shape: tuple[int, ...], momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(shape))
        self._pending: tuple[Tensor, dist.Work | None] | None = None

    @torch.no_grad()
    def softmax_center_teacher(self, teacher_output: Tensor, teacher_temp: float) -> Tensor:
        """Compute softmax((logits - center) / temp) over the last dimension, in float32."""
        self.apply_center_update()
        return torch.softmax((teacher_output.float() - self.center) / teacher_temp, dim=-1)

    @torch.no_grad()
    def _queue_update(self, rows: Tensor) -> None:
        """Start the all-reduce of this batch's logits [R, K]; the next use of the center waits for it.

        Each row has the same weight: processes mask different numbers of patches, and R may be 0.
        """
        self.apply_center_update()
        total = rows.float().sum(dim=0)  # [K]
        sums = torch.cat([total, total.new_full((1,), rows.shape[0])])
        work = dist.all_reduce(sums, async_op=True) if is_enabled() else None
        self._pending = (sums, work)

    @torch.no_grad()
    def apply_center_update(self) -> None:
        """Apply the queued update, if there is one. Checkpoints call this too, so that none is lost."""
        if self._pending is None:
            return
        sums, work = self._pending
        if work is not None:
            work.wait()
        batch_center = sums[:-1] / sums[-1]
        moved = self.center * self.momentum + batch_center.view_as(self.center) * (1 - self.momentum)
        # An update that is not finite is dropped, as the optimizer skips the step: it would stay in all later targets.
        # A batch without a masked patch does not move the center either.
        self.center.copy_(torch.where(moved.isfinite().all(), moved, self.center))
        self._pending = None
